"""Lines of a file, plain or compressed, by spans: what every reader of a file of lines stands on.

    for number, position, line, fault in lines(Path("wiki.jsonl.gz"), Span(1 << 20, 2 << 20)): ...

A span holds the lines that begin in it. A span of a compressed file is reached by unpacking what
lies before it, from the file's start or from where this process ended an earlier span of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mobilellm.errors import MissingPackageError, UserError
from mobilellm.readers.reader import MAX_BYTES, Span, spans_between
from mobilellm.streams.compression import EXPANSION, is_compressed, unpacked
from mobilellm.streams.places import Address, Place, open_bytes

LONGEST_LINE = MAX_BYTES  # bytes of one line
MAX_SPANS = 16  # of a compressed file, since each unpacks it from its start
MARK = b"\xef\xbb\xbf"  # a byte order mark, which is no part of the first line

Line = tuple[Callable[[], int], int, bytes | bytearray, str]
"""(line number, position, line, fault); the number is a function, since it may cost a pass."""


def spans(path: Place, size: int, wanted: int) -> list[Span]:
    """A file of `size` bytes divided into spans of about `wanted` bytes of text each."""
    step = wanted
    if is_compressed(path):
        if isinstance(path, Address):
            return [Span()]  # which is fetched once
        step = max(wanted // EXPANSION, -(-size // MAX_SPANS))
    return spans_between(list(range(0, max(1, size - step // 2), step)))  # the last: up to 1.5


def lines(path: Place, span: Span) -> Iterator[Line]:
    """The lines that begin in a span."""
    if is_compressed(path):
        yield from _compressed_lines(path, span)
        return
    with open_bytes(path) as file:
        position = span.start
        if position:
            file.seek(position - 1)
            while (piece := file.readline(1 << 24)) and not piece.endswith(b"\n"):
                position += len(piece)
            position = file.tell()
        before, count = -1, 0

        def number() -> int:
            nonlocal before
            if before < 0:
                before = _newlines(path, span.start) if span.start else 0
            return before + count

        while span.end is None or position < span.end:
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            count += 1
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                rest = len(line)
                while (piece := file.readline(1 << 24)) and not piece.endswith(b"\n"):
                    rest += len(piece)
                yield number, position, b"", f"a line of more than {LONGEST_LINE} bytes"
                position += rest + len(piece)
                continue
            yield number, position, line if position else line.removeprefix(MARK), ""
            position += len(line)


def _newlines(path: Place, end: int) -> int:
    """Lines that begin before byte `end`, where a span starts, which may be within a line."""
    count = 0
    with open_bytes(path) as file:
        left = end
        last = b"\n"
        while left and (block := file.read(min(left, 1 << 22))):
            count += block.count(b"\n")
            left -= len(block)
            last = block[-1:]
    return count if last == b"\n" else count + 1


def _constant(number: int) -> Callable[[], int]:
    return lambda: number


@dataclass(slots=True)
class _Walk:
    """How far a compressed file was unpacked for a span, for the one after it to go on from."""

    blocks: Iterator[tuple[int, bytes]]
    """What `unpacked` gives, from here on."""
    waiting: tuple[int, bytes] | None = None
    """The rest of a block that the span before did not want."""
    number: int = 0
    """Lines passed."""
    start: int = 0
    """Bytes of text passed."""

    def next(self) -> tuple[int, bytes] | None:
        """The next (position, block)."""
        found, self.waiting = self.waiting, None
        return found or next(self.blocks, None)


_left: dict[tuple[str, int, int, int], _Walk] = {}
"""Of the file that was read last in spans: who does them in order unpacks it once, not once a span.
The key is its path, size and time of change, and where the span ended."""


def _walk(path: Place, span: Span) -> _Walk:
    """The walk that a span before this one left, or one from the file's start."""
    if span.start and not isinstance(path, Address):
        status = path.stat()
        at = (str(path), status.st_size, status.st_mtime_ns, span.start)
        fitting = [key for key in list(_left) if key[:3] == at[:3] and key[3] <= span.start]
        for key in fitting:
            if walk := _left.pop(key, None):
                return walk
    return _Walk(unpacked(path))


def _leave(path: Place, span: Span, walk: _Walk) -> None:
    _left.clear()
    if span.end is not None and not isinstance(path, Address):
        status = path.stat()
        _left[str(path), status.st_size, status.st_mtime_ns, span.end] = walk


def _compressed_lines(path: Place, span: Span) -> Iterator[Line]:
    walk = _walk(path, span)
    begun_at, parts, held = 0, bytearray(), 0

    def line_of(line: bytes | bytearray, start: int) -> bytes | bytearray:
        return line if start else line.removeprefix(MARK)

    def wanted(line: bytes | bytearray, length: int) -> Iterator[Line]:
        if length > LONGEST_LINE:
            fault = f"a line of more than {LONGEST_LINE} bytes"
            yield _constant(walk.number), walk.start, b"", fault
        elif line:
            yield _constant(walk.number), walk.start, line_of(line, walk.start), ""

    try:
        while (found := walk.next()) is not None:
            at, block = found
            if not held:
                begun_at = at
            behind = span.end is not None and at >= span.end
            if b"\n" not in block and (held or not behind):
                held += len(block)
                if held <= LONGEST_LINE and begun_at in span:
                    parts += block
                else:
                    parts.clear()
                continue
            if held:  # the line that an earlier block began
                piece, block = block.split(b"\n", 1)
                length = held + len(piece) + 1
                walk.number += 1
                if begun_at in span:
                    if length <= LONGEST_LINE:
                        parts += piece
                    yield from wanted(parts, length)
                walk.start += length
            if behind:
                walk.waiting = (at, block)
                _leave(path, span, walk)
                return
            whole, newline, rest = block.rpartition(b"\n")
            if newline and at in span:
                for piece in whole.split(b"\n"):
                    walk.number += 1
                    yield from wanted(piece, len(piece) + 1)
                    walk.start += len(piece) + 1
            elif newline:
                walk.number += whole.count(b"\n") + 1
                walk.start += len(whole) + 1
            parts, held, begun_at = bytearray(rest if at in span else b""), len(rest), at
        if held and begun_at in span:
            walk.number += 1
            yield from wanted(parts, held)
    except MissingPackageError:
        raise
    except UserError as error:
        if span.end is None:  # told once, by whoever reads to the end
            what = error.what.removeprefix(f"{path}: ")
            fault = f"{what}: nothing from here on can be read"
            yield _constant(walk.number + 1), walk.start, b"", fault
