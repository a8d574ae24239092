"""Lines of a file, plain or compressed, by spans: what every reader of a file of lines stands on.

    for number, position, line, fault in lines(Path("wiki.jsonl.gz"), Span(1 << 20, 2 << 20)): ...

A span holds the lines that begin in it. Each span of a compressed file unpacks it from its start,
but gives only the lines that are in the span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def _compressed_lines(path: Place, span: Span) -> Iterator[Line]:
    number, start, begun_at, parts, held = 0, 0, 0, bytearray(), 0

    def line_of(line: bytes | bytearray) -> bytes | bytearray:
        return line if start else line.removeprefix(MARK)

    try:
        for at, block in unpacked(path):
            if not held:
                begun_at = at
                if span.end is not None and at >= span.end:
                    return
            if b"\n" not in block:
                held += len(block)
                if held <= LONGEST_LINE and begun_at in span:
                    parts += block
                else:
                    parts.clear()
                continue
            whole, rest = block.rsplit(b"\n", 1)
            first = True
            for piece in whole.split(b"\n"):
                number += 1
                where = begun_at if first else at
                length = (held + len(piece) if first else len(piece)) + 1
                if where in span:
                    line: bytes | bytearray = piece
                    if first and held and length <= LONGEST_LINE:
                        parts += piece
                        line = parts
                    if length > LONGEST_LINE:
                        fault = f"a line of more than {LONGEST_LINE} bytes"
                        yield _constant(number), start, b"", fault
                    elif line:
                        yield _constant(number), start, line_of(line), ""
                start += length
                first = False
            parts, held, begun_at = bytearray(rest), len(rest), at
        if held and begun_at in span:
            if held > LONGEST_LINE:
                fault = f"a line of more than {LONGEST_LINE} bytes"
                yield _constant(number + 1), start, b"", fault
            else:
                yield _constant(number + 1), start, line_of(parts), ""
    except MissingPackageError:
        raise
    except UserError as error:
        if span.end is None:  # told once, by whoever reads to the end
            what = error.what.removeprefix(f"{path}: ")
            fault = f"{what}: nothing from here on can be read"
            yield _constant(number + 1), start, b"", fault
