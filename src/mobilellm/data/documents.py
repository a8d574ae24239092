"""Documents out of files: plain text, Markdown and JSON lines, each also gzipped, one at a time in constant memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from mobilellm.errors import UserError

TEXT = (".txt", ".md", ".text", "")
LINES = (".jsonl",)
LONGEST_LINE = 1 << 30  # bytes of one JSON line


@dataclass(frozen=True)
class Source:
    """A named set of files."""

    name: str
    """Told apart from other sources by it: letters, digits, "-" and "_"."""
    paths: list[Path]
    """Files, and folders that are walked for the known kinds."""

    def files(self) -> list[Path]:
        """Every file, sorted within each folder. `UserError` when there is none."""
        found: list[Path] = []
        for path in self.paths:
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file() and kind(p) and not p.name.startswith("."))
                if not inside:
                    raise UserError(f"{path}: holds no text", mend="files end in .txt, .md or .jsonl, each also .gz")
                found.extend(inside)
            elif path.is_file():
                if not kind(path):
                    raise UserError(f"{path}: of a kind that is not read", mend="give .txt, .md or .jsonl, each also .gz")
                found.append(path)
            else:
                raise UserError(f"{path}: no such file or folder")
        return found


def kind(path: Path) -> str | None:
    """ "text", "lines", or none for what is not read."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return "text" if suffix in TEXT else "lines" if suffix in LINES else None


def documents(path: Path, text_field: str = "text") -> Iterator[tuple[str, int]]:
    """The documents of a file, each with the bytes of the file read so far: the whole file, or a JSON line each.

    `UserError` with the file and line for what is not UTF-8, holds NUL bytes, or is not an object with a text.
    """
    try:
        with open(path, "rb") as raw:
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
            if kind(path) == "text":
                yield _decode(stream.read(), str(path)), raw.tell()
                return
            number = 0
            while line := stream.readline(LONGEST_LINE):
                number += 1
                if line.isspace():
                    continue
                yield _field(line, text_field, f"{path}:{number}"), raw.tell()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut-off gzip ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {error.start}", mend="is it binary, or in another encoding?") from None
    if "\0" in text:
        raise UserError(f"{where}: a NUL byte at character {text.index(chr(0))}: a binary file, not text")
    return text


def _field(line: bytes, text_field: str, where: str) -> str:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error})") from None
    if not isinstance(row, dict) or text_field not in row:
        keys = ", ".join(list(row)[:10]) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no field {text_field!r} (found {keys})", mend="name the field with --text-field")
    if not isinstance(row[text_field], str):
        raise UserError(f"{where}: field {text_field!r} is {type(row[text_field]).__name__}, not text")
    return str(row[text_field])
