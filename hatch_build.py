"""The hook of the build: a wheel brings along the engine of the page that runs a model.

Nothing of the engine lies in the repository. Its archives are fetched by npm, are held to their
checksums, and lie in the wheel as mobilellm/export/engines. Where they cannot be had the wheel is
built without them, with a warning, and `convert --to web` fetches them when it is used.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def load_client(root: Path) -> ModuleType:
    """The project's module that fetches packages of npm, by its path: nothing is installed yet."""
    path = root / "src/mobilellm/export/npm_client.py"
    spec = importlib.util.spec_from_file_location("npm_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class EngineHook(BuildHookInterface):
    """Adds the archives to a wheel, not to an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is made; `version` is "standard" or "editable"."""
        if version != "standard":
            return
        client = load_client(Path(self.root))
        folder = Path(self.root, "build", "engines")
        for name, pin in client.read_pins().items():
            if not pin.in_wheel:
                continue
            path = folder / client.file_name(name, pin)
            try:
                if not (path.is_file() and client.is_intact(path.read_bytes(), pin)):
                    client.fetch(name, pin, folder)
            except (client.NpmError, OSError) as error:
                self.app.display_warning(f"the wheel goes without {name}: {error}")
                continue
            build_data["force_include"][str(path)] = f"mobilellm/export/engines/{path.name}"
