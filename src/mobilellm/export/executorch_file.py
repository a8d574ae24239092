"""The file of an ExecuTorch program: data that it holds twice, held once.

    saved = store_once(Path("model.pte"))       # bytes that the file became shorter

A program's constant tensors lie in one segment of its file, and what a backend keeps (XNNPACK's
weights) in segments of their own, found by name. The exporter writes a tied embedding to both. Here
the name is pointed at the bytes among the constants, and the second copy is cut out. The layout is
that of ExecuTorch's published schema (schema/program.fbs, version 0) and of the extended header
before it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobilellm.errors import UserError

HEADER = struct.Struct("<8x4sIQQQ")
"""After the root's offset and the file's kind: magic, length, then bytes of the program, where the
segments begin, and the bytes of all segments."""
HEADER_MAGIC = b"eh00"
SEGMENT_BYTES_AT = HEADER.size - 8
SEGMENTS, CONSTANTS, NAMED = 4, 5, 7
"""Fields of the schema's Program."""
LEAST = 1024
"""Bytes from which a second copy is cut out."""
ALIGNMENT = 16
"""Bytes that a constant tensor is aligned to in its segment, and what it takes to stand in for a
segment of a backend."""


class _Table:
    """A table of a flatbuffer: where its fields lie."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at
        self.fields = at - struct.unpack_from("<i", data, at)[0]
        self.length: int = struct.unpack_from("<H", data, self.fields)[0]

    def position(self, field: int) -> int | None:
        """Where a field's value lies, or None where it has its default."""
        entry = 4 + 2 * field
        if entry >= self.length:
            return None
        (offset,) = struct.unpack_from("<H", self.data, self.fields + entry)
        return self.at + offset if offset else None

    def number(self, field: int, layout: str) -> int:
        """A field that is a whole number; 0 where it is not written."""
        at = self.position(field)
        return 0 if at is None else int(struct.unpack_from(layout, self.data, at)[0])

    def follow(self, field: int) -> int | None:
        """Where what a field refers to begins."""
        at = self.position(field)
        return None if at is None else at + struct.unpack_from("<I", self.data, at)[0]

    def table(self, field: int) -> _Table | None:
        """The table that a field holds."""
        at = self.follow(field)
        return None if at is None else _Table(self.data, at)

    def tables(self, field: int) -> Iterator[_Table]:
        """The tables of a field that holds many."""
        at = self.follow(field)
        if at is not None:
            for i in range(struct.unpack_from("<I", self.data, at)[0]):
                entry = at + 4 + 4 * i
                yield _Table(self.data, entry + struct.unpack_from("<I", self.data, entry)[0])

    def numbers(self, field: int) -> list[int]:
        """The 64-bit numbers of a field that holds many."""
        at = self.follow(field)
        if at is None:
            return []
        (count,) = struct.unpack_from("<I", self.data, at)
        return list(struct.unpack_from(f"<{count}Q", self.data, at + 4))


@dataclass
class _Segment:
    """A stretch of the file behind the program."""

    table: _Table
    offset: int
    size: int
    removed: bool = False

    def move(self, offset: int) -> None:
        """Write another offset. A segment at 0, whose offset is not written, never moves."""
        at = self.table.position(0)
        assert at is not None, "only a segment behind another one moves"
        struct.pack_into("<Q", self.table.data, at, offset)
        self.offset = offset


def store_once(path: Path) -> int:
    """Cut named data out of a program's file that its constants hold, too; returns the bytes saved.

    The file is changed in place. `UserError` when it is no program with an extended header.
    """
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0) as data:
            saved = _cut_copies(data, path)
        if saved:
            file.truncate(path.stat().st_size - saved)
    return saved


def _cut_copies(data: mmap.mmap, path: Path) -> int:
    """Redirect, move what lies behind together, and return how much shorter the file is."""
    if len(data) < HEADER.size or HEADER.unpack_from(data)[0] != HEADER_MAGIC:
        raise UserError(f"{path}: no ExecuTorch program with segments")
    _, _, _, base, total = HEADER.unpack_from(data)
    program = _Table(data, struct.unpack_from("<I", data)[0])
    segments = [
        _Segment(table, table.number(0, "<Q"), table.number(1, "<Q"))
        for table in program.tables(SEGMENTS)
    ]
    constants = program.table(CONSTANTS)
    if constants is None:
        return 0
    first = segments[constants.number(0, "<I")]
    places = [first.offset + offset for offset in constants.numbers(1)]
    end = first.offset + first.size
    targets: dict[int, int] = {}
    for named in program.tables(NAMED):
        number = named.number(1, "<I")
        segment = segments[number]
        within = first.offset <= segment.offset < end
        if within or segment.size < LEAST or segment.removed:
            continue
        own = data[base + segment.offset : base + segment.offset + segment.size]
        for place in places:
            fits = place + segment.size <= end and (base + place) % ALIGNMENT == 0
            if fits and data[base + place : base + place + segment.size] == own:
                targets[number], segment.removed = place, True
                break
    ordered = sorted(segments, key=lambda segment: segment.offset)
    stops = [segment.offset for segment in ordered[1:]] + [total]
    saved = 0
    for segment, stop in zip(ordered, stops, strict=True):
        start, length = segment.offset, stop - segment.offset
        if segment.removed:
            saved += length
        elif saved:
            data.move(base + start - saved, base + start, length)
            segment.move(start - saved)
    # The constants lie before what was cut out, or have moved by what lay before them.
    shift = places[0] - (first.offset + constants.numbers(1)[0]) if places else 0
    for number, place in targets.items():
        segments[number].move(place - shift)
    struct.pack_into("<Q", data, SEGMENT_BYTES_AT, total - saved)
    data.flush()
    return saved
