"""Everything that `mobilellm convert --to` can write: weights for others, and programs.

    TARGETS["gguf"].what

A target is an entry of the same kind as those of interop/writers.py; its `write` imports what it
needs when it is called, so that the command line takes its choices from here.
"""

from __future__ import annotations

from mobilellm.interop.writer import Writer
from mobilellm.interop.writers import WRITERS

PROGRAMS: dict[str, Writer] = {}
TARGETS: dict[str, Writer] = WRITERS | PROGRAMS
NUMBER_TYPES = tuple(dict.fromkeys(t for target in TARGETS.values() for t in target.number_types))
