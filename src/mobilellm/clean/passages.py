"""Runs of words in any script, hashed: what documents have in common with evaluation sets.

    known = evaluation_ngrams(Path("evaluation-sets"))[NGRAM]       # sorted hashes
    np.isin(ngram_hashes(text, NGRAM), known).any()

Nothing here knows a language: words are runs of letters and digits, or single characters where a
script has no spaces.
"""

from __future__ import annotations

import functools
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.errors import UserError
from mobilellm.readers.table import reader_of
from mobilellm.streams.compression import unpacked
from mobilellm.streams.text import text_pieces

WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|[^\W_]+"
)
NGRAM = 13
"""Words of a passage in common, as Brown et al. count (arXiv 2005.14165, appendix C)."""
MIN_WORDS = 8
"""Words of an evaluation text of fewer than NGRAM that is looked for as a whole."""


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return zlib.crc32(word.encode()) << 32 | zlib.adler32(word.encode()[::-1]) ^ len(word)


def words_of(text: str) -> list[str]:
    """The words of a text, small letters, in order."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_hashes(text: str) -> NDArray[np.uint64]:
    """64 bits for each word of a text, (words,)."""
    return np.fromiter(map(_word_hash, words_of(text)), dtype=np.uint64)


def runs(words: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """64 bits for each run of `length` words, (words - length + 1,)."""
    if len(words) < length:
        return np.empty(0, dtype=np.uint64)
    found = np.zeros(len(words) - length + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for place in range(length):
            found = (found ^ words[place : len(words) - length + 1 + place]) * np.uint64(
                0x9E3779B97F4A7C15
            )
            found ^= found >> np.uint64(29)
    return found


def ngram_hashes(text: str, length: int) -> NDArray[np.uint64]:
    """64 bits for each run of `length` words of a text, (words - length + 1,)."""
    return runs(word_hashes(text), length)


def evaluation_ngrams(folder: Path) -> dict[int, NDArray[np.uint64]]:
    """Sorted hashes of the word runs in a folder's files (.jsonl, .txt, .raw, also .gz), by length.

    Every string in a row is a text of its own. Those of NGRAM words or more give all their runs of
    NGRAM; shorter ones, down to MIN_WORDS, are one run. `UserError` when there is nothing to read.
    """
    found: dict[int, list[NDArray[np.uint64]]] = {}

    def add(text: str) -> None:
        words = word_hashes(text)
        if len(words) >= MIN_WORDS:
            length = min(len(words), NGRAM)
            found.setdefault(length, []).append(runs(words, length))

    for path in evaluation_files(folder):
        if _reader_name(path) == "jsonl":
            for line in b"".join(block for _, block in unpacked(path)).splitlines():
                try:
                    row = orjson.loads(line) if line.strip() else None
                except orjson.JSONDecodeError as error:
                    raise UserError(f"{path}: broken JSON ({error})") from None
                for text in _strings(row):
                    add(text)
        else:
            for text in "".join(text_pieces(path)).split("\n"):
                add(text)
    if not found:
        raise UserError(
            f"{folder}: no evaluation set in it", hint="it must hold .jsonl or .txt files"
        )
    return {length: np.unique(np.concatenate(hashes)) for length, hashes in sorted(found.items())}


def evaluation_files(folder: Path) -> list[Path]:
    """The files of evaluation sets in a folder, sorted. `UserError` when there is no such
    folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of evaluation sets")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and (_reader_name(path) in ("text", "jsonl") or path.suffix == ".raw")
        and path.name.upper() not in ("README.MD", "LICENSE")
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _reader_name(path: Path) -> str:
    reader = reader_of(path)
    return reader.name if reader else ""
