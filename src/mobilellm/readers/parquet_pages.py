"""The sizes of a Parquet file's pages, read from their headers before any is unpacked.

    sizes = page_sizes(file, start=4, end=5000)
    sizes.dictionary, sizes.page, sizes.value

A page header is a Thrift struct in the compact protocol (parquet.thrift, `PageHeader`): its type,
the unpacked and the packed size of the page, and how many values there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

MAX_HEADER = 1 << 20  # bytes; statistics in it hold the least and the greatest value
DICTIONARY_PAGE = 2
UNPACKED_SIZE, PACKED_SIZE, TYPE = 2, 3, 1  # fields of a page header
VALUES_IN = (5, 7, 8)  # the structs for data, dictionary and data of version 2: values come first
STRUCT, LIST, SET, MAP, BINARY, DOUBLE, BYTE = 12, 9, 10, 11, 8, 7, 3  # types of the protocol
TRUE, FALSE = 1, 2


@dataclass
class PageSizes:
    """What the pages of one column in one row group unpack to, in bytes."""

    dictionary: int = 0
    """The dictionary, each of whose entries may be any row's value."""
    page: int = 0
    """The largest page."""
    value: int = 0
    """A value, on average in the page where that is most."""


class _Cursor:
    """Bytes of one header, read from their start."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        """`ValueError` at the end, as all that follow."""
        if self.at >= len(self.data):
            raise ValueError("cut off")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number without an end")

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def skip(self, kind: int, depth: int = 0) -> None:
        if depth > 8:
            raise ValueError("too deep")
        if kind in (TRUE, FALSE):
            return
        if kind == STRUCT:
            field = 0
            while (inner := self.field(field)) is not None:
                field, its_kind = inner
                self.skip(its_kind, depth + 1)
        elif kind == BINARY:
            length = self.varint()
            self.at += length
        elif kind == DOUBLE:
            self.at += 8
        elif kind == BYTE:
            self.at += 1
        elif kind in (LIST, SET):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            for _ in range(count):
                self.skip(BYTE if head & 15 in (TRUE, FALSE) else head & 15, depth + 1)
        elif kind in (4, 5, 6):
            self.varint()
        else:
            raise ValueError(f"type {kind}")

    def field(self, before: int) -> tuple[int, int] | None:
        """(number, type) of the next field of a struct; none at its end."""
        head = self.byte()
        if head == 0:
            return None
        return (before + (head >> 4) if head >> 4 else self.integer()), head & 15


def _header(data: bytes) -> tuple[int, int, int, int, int]:
    """(length of the header, type, unpacked size, packed size, values)."""
    cursor, field, found, values = _Cursor(data), 0, dict[int, int](), 0
    while (inner := cursor.field(field)) is not None:
        field, kind = inner
        if field in (TYPE, UNPACKED_SIZE, PACKED_SIZE) and kind == 5:
            found[field] = cursor.integer()
        elif field in VALUES_IN and kind == STRUCT:
            start = cursor.at
            first = cursor.field(0)
            if first == (1, 5):
                values = cursor.integer()
            cursor.at = start
            cursor.skip(STRUCT)
        else:
            cursor.skip(kind)
    if cursor.at > len(data) or len(found) < 3 or min(found.values()) < 0:
        raise ValueError("not a page header")
    return cursor.at, found[TYPE], found[UNPACKED_SIZE], found[PACKED_SIZE], values


def page_sizes(file: IO[bytes], start: int, end: int, most: int | None = None) -> PageSizes:
    """Sizes of the pages that lie from byte `start` up to `end` of a file; of the first `most`
    alone where the rest would have to be fetched. `ValueError` for what is no page header."""
    found, at, count = PageSizes(), start, 0
    while at < end and (most is None or count < most):
        length = 256
        while True:
            file.seek(at)
            data = file.read(length)
            try:
                header, kind, unpacked, packed, values = _header(data)
                break
            except ValueError:
                if length >= MAX_HEADER or len(data) < length:
                    raise
                length *= 16
        if kind == DICTIONARY_PAGE:
            found.dictionary = max(found.dictionary, unpacked)
        else:
            found.value = max(found.value, unpacked // max(1, values))
        found.page = max(found.page, unpacked)
        at += header + packed
        count += 1
    return found
