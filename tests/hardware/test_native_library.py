"""C++ of ours: compiled once a machine, and without a compiler the reason is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mobilellm.hardware import native_library as module
from mobilellm.hardware.native_library import native_library

SOURCE = 'extern "C" long double_of(long x) { return 2 * x; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    native_library.cache_clear()
    yield path
    native_library.cache_clear()


def test_a_library_is_compiled_once_and_again_when_it_is_damaged(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, compiled = module._compile, []

    def counted(source: Path, compiler: str, flags: tuple[str, ...], path: Path) -> None:
        compiled.append(path)
        compile_(source, compiler, flags, path)

    monkeypatch.setattr(module, "_compile", counted)
    first = native_library(source).library
    assert first is not None
    assert first.double_of(21) == 42
    (kept,) = (tmp_path / "cache" / "mobilellm" / "native").iterdir()
    native_library.cache_clear()
    assert native_library(source).library is not None
    assert compiled == [kept]
    damaged = tmp_path / "other" / kept.relative_to(tmp_path / "cache")
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    native_library.cache_clear()
    assert native_library(source).library is not None
    assert compiled == [kept, damaged]


def test_another_source_and_other_options_are_other_libraries(source: Path) -> None:
    first = native_library(source).library
    assert first is not None
    assert first.double_of(2) == 4
    source.write_text(SOURCE.replace("2 * x", "2 * x + OFFSET"))
    native_library.cache_clear()
    second = native_library(source, "-DOFFSET=1").library
    assert second is not None
    assert second.double_of(2) == 5
    third = native_library(source, "-DOFFSET=2").library
    assert third is not None
    assert third.double_of(2) == 6


def test_a_compiler_that_fails_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'small.cpp:1: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = native_library(source)
    assert found.library is None
    assert found.fault == f"{compiler} did not compile it (small.cpp:1: no such thing)"
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    native_library.cache_clear()
    assert native_library(source).fault == "there is no C++ compiler (g++ or clang++)"
