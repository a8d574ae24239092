"""Lets modules of this folder be imported as parts of the package; workers preload it."""

from pathlib import Path

import mobilellm

mobilellm.__path__.append(str(Path(__file__).parent))
