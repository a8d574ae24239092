"""Text to token ids by the fastest library whose ids are right, which is checked in every run;
and long texts in pieces.

    encoder = Encoder(tokenizer, FAST)
    # Flat uint32 ids, and how many each text has.
    ids, lengths = encoder.batch(["one text", "another"])
    for ids in encoder.long(pieces_of_a_long_text): ...

`tokenizers` is the reference. fastokens gives the same ids several times as fast (docs/data.md
has the comparison that chose it); it is optional, and whoever uses it compares a sample of what
it gives with the reference (`check`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.damage import is_failure
from mobilellm.errors import UserError, first_line
from mobilellm.jobs.task import TaskError
from mobilellm.patterns.limits import within_time
from mobilellm.tokenizer.tokenizer import Tokenizer

REFERENCE, FAST = "tokenizers", "fastokens"
PIECE = 1 << 20  # characters of a long text that are tokenized at once
REACH = 1 << 14  # how far around that length a place to cut is looked for
AROUND = (
    256  # characters on either side of a cut that are tokenized to see whether it changes an id
)
CUTS = re.compile(r"(?<=\S) (?=\S)|(?<=\n)(?=\S)")
MAX_UNBROKEN = 1 << 23  # characters without a place to cut, which are tokenized as a whole
PROBE = [
    "",
    " ",
    "\n\n",
    "Two  spaces,\ttabs\r\nand lines.",
    " leading and trailing ",
    "naïve café Ünïcödé ½ ﬁ",
    "日本語 漢字",
    "мир العالم שלום हिन्दी",
    "👩‍👩‍👧 😀🏳️‍🌈",
    "don't we're I'LL",
    "1234567890 3.14159 1,000,000",
    "a" * 300,
    " " * 70 + "x",
    "x\u00a0y\u200bz e\u0301 \u1e9b\u0323",
    "<s></s><unk><pad><|endoftext|> <0x0A> [INST]",
    "▁▁ x ▁",
    "def f(x):\n    return x**2  # code\n",
    "http://a.b/c?d=e&f#g",
]


class MismatchError(TaskError):
    """The fast library gave other ids than the reference, or failed."""


class UnbrokenTextError(UserError):
    """A text has no place to cut for too long: nothing of it can be tokenized in bounded memory."""


def library_version(library: str) -> str:
    """ "fastokens 0.3.5"."""
    return f"{library} {metadata.version(library)}"


def choose(tokenizer: Tokenizer, wanted: str = "auto") -> tuple[str, str]:
    """(library, reason for not taking the fast one or nothing): FAST where it is installed and
    passes the probe."""
    if wanted == REFERENCE:
        return REFERENCE, ""
    try:
        import fastokens  # noqa: F401
    except ImportError:
        return (
            REFERENCE,
            "fastokens is not installed (pip install 'mobilellm[data]': several times as fast)",
        )
    if not covers_all_text(tokenizer):
        return (
            REFERENCE,
            "the vocabulary cannot spell every text, and only tokenizers says where it cannot",
        )
    try:
        encoder = Encoder(tokenizer, FAST)
        ids, lengths = encoder.batch(PROBE)
        encoder.check(PROBE, ids, lengths, range(len(PROBE)))
    except MismatchError as error:
        return REFERENCE, f"fastokens is not used: {error}"
    return FAST, ""


def covers_all_text(tokenizer: Tokenizer) -> bool:
    """Whether every byte has a token, so that no text can fail or lose anything."""
    from tokenizers import pre_tokenizers

    settings = orjson.loads(tokenizer.fast.to_str())
    vocabulary = tokenizer.fast.get_vocab(with_added_tokens=True)
    if settings["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    parts = orjson.dumps([settings["pre_tokenizer"], settings["normalizer"]])
    return b'"ByteLevel"' in parts and all(
        letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet()
    )


class Encoder:
    """One library at work with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, library: str) -> None:
        self.tokenizer, self.library = tokenizer, library
        self._fast: Any = None
        if library == FAST:
            import fastokens

            try:
                self._fast = fastokens.Tokenizer.from_json_str(tokenizer.fast.to_str())
            except BaseException as error:  # a Rust panic is no Exception
                if not is_failure(error):
                    raise
                raise MismatchError(
                    f"it cannot load this tokenizer ({first_line(error)})"
                ) from None
        vocabulary = tokenizer.fast.get_vocab(with_added_tokens=False)
        self._space = vocabulary.get("▁")

    def batch(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids of all texts end to end, and how many each has. `MismatchError` when the fast
        library fails."""
        if self._fast is None:
            found = self.tokenizer.encode_batch(texts)
            lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
            ids = np.fromiter(
                (i for one in found for i in one), dtype=np.uint32, count=int(lengths.sum())
            )
            return ids, lengths

        def encode() -> Any:
            return self._fast.encode_batch_flat(
                texts, add_special_tokens=False, split_special_tokens=True
            )

        try:
            raw, offsets = within_time(encode, sum(map(len, texts)), self.tokenizer.name)
        except BaseException as error:
            if isinstance(error, UserError) or not is_failure(error):
                raise
            raise MismatchError(f"it fails on a text ({first_line(error)})") from None
        bounds: NDArray[np.int64] = np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        return np.frombuffer(raw, dtype="<u4"), bounds[1:] - bounds[:-1]

    def check(
        self,
        texts: list[str],
        ids: NDArray[np.uint32],
        lengths: NDArray[np.int64],
        which: Iterable[int],
    ) -> int:
        """Compare the ids of some texts with the reference; returns how many. `MismatchError`
        when any differs."""
        chosen = list(which)
        if self._fast is None or not chosen:
            return 0
        ends = np.cumsum(lengths)
        for i, expected in zip(
            chosen, self.tokenizer.encode_batch([texts[i] for i in chosen]), strict=True
        ):
            if ids[ends[i] - lengths[i] : ends[i]].tolist() != expected:
                raise MismatchError(f"its ids differ from tokenizers' on {texts[i][:40]!r}")
        return len(chosen)

    def long(self, pieces: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
        """The ids of one text that comes in pieces, in constant memory, the same as those of the
        whole.

        It is cut only at a space or after a line's end where tokenizing both sides by
        themselves is seen to change nothing. A text without such a place is tokenized whole.
        `UnbrokenTextError` where more than `MAX_UNBROKEN` characters have none.
        """
        held, strip = "", False
        for piece in (
            whole[at : at + 4 * PIECE] for whole in pieces for at in range(0, len(whole), 4 * PIECE)
        ):
            held += piece  # of a few megabytes at most, since what is held is copied at each cut
            while len(held) > PIECE + REACH:
                cut = self._cut(held)
                if cut is None:
                    if len(held) > MAX_UNBROKEN:
                        raise UnbrokenTextError(
                            f"{len(held):,} characters without a place to cut (a space or a line's "
                            f"end after which tokenizer {self.tokenizer.name!r} goes on alike); "
                            f"the limit is {MAX_UNBROKEN:,}",
                            hint="is it text? If so, break it into lines",
                        )
                    break
                end, start, strip_next = cut
                yield self._one(held[:end], strip)
                held, strip = held[start:], strip_next
        yield self._one(held, strip)

    def _one(self, text: str, strip: bool) -> NDArray[np.uint32]:
        ids = self.batch([text])[0]
        return ids[1:] if strip else ids

    def _cut(self, text: str) -> tuple[int, int, bool] | None:
        """(end of the left side, start of the right, whether the right's first id is to be taken
        away), or nothing."""
        around = [(middle - REACH, middle + REACH) for middle in (PIECE, len(text) - REACH)]
        if len(text) > MAX_UNBROKEN // 2:
            around.append((AROUND, len(text) - AROUND))
        for first, last in around:
            places = [match.span() for match in CUTS.finditer(text, first, last)]
            for start, end in places[:: -max(1, len(places) // 8)]:
                whole = self.tokenizer.encode(text[max(0, start - AROUND) : start + AROUND])
                before = self.tokenizer.encode(text[max(0, start - AROUND) : start])
                for begin in (start, end):
                    following = self.tokenizer.encode(text[begin : start + AROUND])
                    if before + following == whole:
                        return start, begin, False
                    if (
                        self._space is not None
                        and following[:1] == [self._space]
                        and before + following[1:] == whole
                    ):
                        return start, begin, True
        return None
