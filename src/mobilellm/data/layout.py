"""The original's layout: `basepath/1..N/*.jsonl`, a folder a node, one sample a line.

{"token_ids": [1, 15043, ...], "source": "c4"}      2,048 or 2,049 ids; the source may be left out

for folder in node_folders(Path("basepath")): ...
ids, source = parse_sample(line, "1/a.jsonl:7", vocab_size=32000)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.errors import UserError

HELD_OUT = "held_out"  # a folder of ours beside the nodes', which the original does not look into
OLD_HELD_OUT = "heldout"  # its name before version 0.2
UNNAMED = "all"  # the source of samples that name none
LONGEST_SAMPLE = 64 << 20  # bytes of a line; one of 2,049 ids has about 12,000


def node_folders(base: Path) -> list[Path]:
    """The nodes' folders, 1 to N; empty when this is not the layout."""
    try:
        numbers = sorted(
            int(p.name)
            for p in base.iterdir()
            if p.is_dir() and p.name.isascii() and p.name.isdecimal()
        )
    except OSError:
        return []
    return [base / str(number) for number in numbers if (base / str(number)).is_dir()]


def held_out_folder(base: Path) -> Path:
    """The folder of held-out samples: by its name of today, or of before where only that is
    there."""
    old = base / OLD_HELD_OUT
    return old if old.is_dir() and not (base / HELD_OUT).is_dir() else base / HELD_OUT


def sample_files(folder: Path) -> list[Path]:
    """The .jsonl files of one node, sorted by name."""
    return sorted(p for p in folder.glob("*.jsonl") if p.is_file())


def parse_sample(
    line: bytes, where: str, vocab_size: int | None = None
) -> tuple[NDArray[np.uint32], str]:
    """The ids of a sample, 1-D, and its source. `UserError` naming `where` for anything else,
    and ids out of range."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error})") from None
    return sample_of(row, where, vocab_size)


def sample_of(
    row: Any, where: str, vocab_size: int | None = None
) -> tuple[NDArray[np.uint32], str]:
    """As `parse_sample`, of a line that has been read."""
    if not isinstance(row, dict) or "token_ids" not in row:
        keys = ", ".join(list(row)[:10]) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no field 'token_ids' (found {keys})")
    given = row["token_ids"]
    if not isinstance(given, list) or not given:
        raise UserError(
            f"{where}: token_ids is {type(given).__name__ if given != [] else 'empty'}, must be a "
            "list of ids"
        )
    try:
        ids = np.array(given)
    except (ValueError, OverflowError):
        ids = np.empty(0)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise UserError(f"{where}: token_ids holds something that is not a whole number")
    limit = vocab_size or 1 << 32
    if int(ids.min()) < 0 or int(ids.max()) >= limit:
        bad = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
        raise UserError(
            f"{where}: id {ids[bad]} at place {bad}, must be from 0 to {limit - 1}",
            hint="made with another tokenizer?",
        )
    source = row.get("source", UNNAMED)
    if source is None:
        source = UNNAMED
    if not isinstance(source, str) or not source or len(source) > 200:
        raise UserError(f"{where}: source is {source!r:.80}, must be a name")
    return ids.astype(np.uint32), source


def ends_in(ids: NDArray[Any], eos_id: int | None) -> NDArray[np.int64]:
    """Where documents end within a row: after each EOS, and at the row's end."""
    after = np.flatnonzero(ids == eos_id) + 1 if eos_id is not None else np.empty(0, dtype=np.int64)
    return after if len(after) and after[-1] == len(ids) else np.append(after, len(ids))


def lines_of(file: Path) -> Iterator[tuple[str, bytes]]:
    """("file:number", line) of every line that is not blank. `UserError` for a line too long to
    be a sample."""
    try:
        with open(file, "rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_SAMPLE):
                number += 1
                if len(line) == LONGEST_SAMPLE and not line.endswith(b"\n"):
                    raise UserError(
                        f"{file}:{number}: a line of more than {LONGEST_SAMPLE} bytes is no sample"
                    )
                if not line.isspace():
                    yield f"{file}:{number}", line
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
