"""Steps of datatrove pipelines that clean text: readers, writers, filters, signatures.

    pipeline = [ReadSources(sources, folder, "text", "stop"), Keep(folder / "kept")]

`stages` puts them in order.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.clean.passages import evaluation_ngrams, ngram_hashes, runs, word_hashes, words_of
from mobilellm.errors import UserError
from mobilellm.files import write_file
from mobilellm.prepare.sources import Source
from mobilellm.prepare.tasks import plan
from mobilellm.readers.reader import ReadSettings
from mobilellm.readers.table import records
from mobilellm.streams.places import place_of

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.utils.hashing import HashConfig
except ImportError as error:
    raise UserError(
        f"cleaning needs datatrove ({error})", hint="pip install 'mobilellm[data]'"
    ) from None

SHINGLE = 5  # words of a run of which MinHash takes signatures
EXAMPLES = 10  # dropped documents that are shown of each step
SHOWN = 200  # characters of each
HASH = HashConfig(precision=64, hash_fc="sha1")
MINHASH = MinhashConfig(n_grams=SHINGLE, num_buckets=14, hashes_per_bucket=8, hash_config=HASH)


class Dropped:
    """Counts what a step drops in one task, and keeps the first examples; takes an exclusion
    writer's place."""

    def __init__(self, folder: Path, step: str) -> None:
        self.folder, self.step = folder, step
        self.rank, self.count, self.reasons = 0, 0, Counter[str]()
        self.examples: list[dict[str, str]] = []

    def __enter__(self) -> Dropped:
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        """Take note of a document."""
        reason, detail = (
            str(document.metadata.get(key, "")) for key in ("filter_reason", "detail")
        )
        self.rank, self.count = rank, self.count + 1
        self.reasons[reason] += 1
        if len(self.examples) < EXAMPLES:
            where = str(document.metadata.get("where", document.id))
            self.examples.append(
                {
                    "where": where,
                    "why": f"{reason}: {detail}" if detail else reason,
                    "text": document.text[:SHOWN],
                }
            )

    def __exit__(self, *_: object) -> None:
        note = {"count": self.count, "reasons": dict(self.reasons), "examples": self.examples}
        if self.count:
            write_file(
                self.folder / "dropped" / self.step / f"{self.rank:05d}.json", orjson.dumps(note)
            )


class ReadSources(PipelineStep):
    """The documents of sources, a task's share at a time."""

    type, name = "READER", "mobilellm sources"

    def __init__(
        self,
        sources: list[Source],
        folder: Path,
        text_field: str,
        on_bad: str,
        separator: str | None = None,
    ) -> None:
        super().__init__()
        self.tasks, self.folder = plan(sources), folder
        self.settings = ReadSettings(text_field=text_field, separator=separator)
        self.on_bad = on_bad

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield documents with `source` and `where` in their metadata.

        A bad one is raised as a `UserError`, or counted, as `on_bad` says.
        """
        count = 0
        with Dropped(self.folder, "unreadable") as dropped:
            for task in self.tasks[rank::world_size]:
                for part in task.parts:
                    for record in records(place_of(part.path), part.span, self.settings):
                        count += 1
                        name = f"{task.source}/{part.file}/{record.key}"
                        where = record.where or f"{part.path} at {record.key}"
                        if record.fault is not None:
                            if self.on_bad == "stop":
                                raise record.fault
                            about = {
                                "where": where,
                                "filter_reason": "cannot be read",
                                "detail": record.fault.what,
                            }
                            dropped.write(Document("", name, metadata=about), rank)
                            continue
                        text = "".join(record.pieces())
                        self.stat_update("total")
                        yield Document(text, name, metadata={"source": task.source, "where": where})
        write_file(self.folder / "read" / f"{rank:05d}.json", orjson.dumps(count))


class ReadKept(PipelineStep):
    """What the task of the same number kept one stage before, in its order, which deduplication
    relies on."""

    type, name = "READER", "mobilellm kept"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield the documents of one file."""
        path = self.folder / f"{rank:05d}.jsonl"
        if path.is_file():
            with open(path, "rb") as file:
                for line in file:
                    row = orjson.loads(line)
                    self.stat_update("total")
                    yield Document(row["text"], row["id"], metadata=row["metadata"])


class Keep(PipelineStep):
    """Writes documents as JSON lines, complete under their names or not there, and passes them
    on."""

    type, name = "WRITER", "mobilellm keep"

    def __init__(self, folder: Path, by_source: bool = False) -> None:
        super().__init__()
        self.folder, self.by_source = folder, by_source

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Write to folder/RANK.jsonl, or to folder/SOURCE/RANK.jsonl."""
        files: dict[Path, Any] = {}
        try:
            for document in data:
                folder = (
                    self.folder / document.metadata["source"] if self.by_source else self.folder
                )
                path = folder / f"{rank:05d}.jsonl"
                if path not in files:
                    folder.mkdir(parents=True, exist_ok=True)
                    files[path] = open(path.with_suffix(".partial"), "wb")  # noqa: SIM115  (closed below)
                row = {"text": document.text, "id": document.id, "metadata": document.metadata}
                files[path].write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                self.stat_update("total")
                yield document
        finally:
            for file in files.values():
                file.close()
        for path in files:
            path.with_suffix(".partial").replace(path)


class QualityFilter(BaseFilter):
    """Drops what is no text in any language: too short, few letters, broken encoding, repetition.

    The limits on repeated lines are those of Rae et al. (arXiv 2112.11446, table A1).
    """

    name = "mobilellm quality"
    min_characters = 50
    min_letters = 0.4  # of the characters that are not spaces
    max_broken = 0.005  # replacement and control characters
    max_repeated_lines = 0.3
    max_repeated_characters = 0.2
    min_compressed = 0.08  # of its bytes; prose has 0.35 to 0.45

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        text = doc.text
        solid = len(text) - sum(map(text.count, " \n\t\r"))
        if solid < self.min_characters:
            return self._because(doc, "short", f"{solid} characters")
        counts = Counter(text)
        letters = sum(n for c, n in counts.items() if unicodedata.category(c)[0] in "LM")
        if letters < self.min_letters * solid:
            return self._because(doc, "few letters", f"{letters / solid:.0%}")
        broken = sum(
            n
            for c, n in counts.items()
            if c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\n\t\r\f")
        )
        if broken > self.max_broken * len(text):
            return self._because(doc, "broken characters", f"{broken / len(text):.1%}")
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        repeated = [line for line, n in Counter(lines).items() for _ in range(n - 1)]
        if len(lines) > 5 and len(repeated) > self.max_repeated_lines * len(lines):
            return self._because(doc, "repeated lines", f"{len(repeated) / len(lines):.0%}")
        if len(lines) > 5 and sum(map(len, repeated)) > self.max_repeated_characters * sum(
            map(len, lines)
        ):
            return self._because(
                doc,
                "text in repeated lines",
                f"{sum(map(len, repeated)) / sum(map(len, lines)):.0%}",
            )
        beginning = text[: 1 << 16].encode("utf-8", "replace")
        share = len(zlib.compress(beginning, 1)) / len(beginning)
        if share < self.min_compressed:
            return self._because(doc, "repetitive", f"compresses to {share:.1%}")
        return True

    @staticmethod
    def _because(doc: Document, reason: str, detail: str) -> tuple[bool, str]:
        doc.metadata["detail"] = detail
        return False, reason


class Decontaminate(BaseFilter):
    """Drops documents that share a passage with an evaluation set."""

    name = "mobilellm decontamination"

    def __init__(self, folder: Path, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.hashes = {
            length: hashes for length, hashes in evaluation_ngrams(folder).items() if len(hashes)
        }

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        hashes = word_hashes(doc.text)
        for length, known in self.hashes.items():
            found = runs(hashes, length)
            if not len(found):
                continue
            at = np.searchsorted(known, found)
            hit = known[np.minimum(at, len(known) - 1)] == found
            if hit.any():
                words, first = words_of(doc.text), int(np.argmax(hit))
                doc.metadata["detail"] = " ".join(words[first : first + length])
                return False, "shares a passage with an evaluation set"
        return True


class Signature(MinhashDedupSignature):
    """datatrove's MinHash signatures over words of any script, in constant memory."""

    def __init__(self, output_folder: Path) -> None:
        PipelineStep.__init__(self)
        from datatrove.io import get_datafolder

        self.output_folder, self.config = get_datafolder(str(output_folder)), MINHASH
        self.num_hashes = MINHASH.num_buckets * MINHASH.hashes_per_bucket
        self._parameters, self.language, self.skip_existing_sigs = None, "", False

    def get_shingles(self, text: str) -> NDArray[np.uint64]:
        """Hashes of the runs of SHINGLE words, (runs, 1)."""
        return (ngram_hashes(text, SHINGLE) >> np.uint64(3)).reshape(-1, 1)

    def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
        """As datatrove computes it, in steps, so that a book takes no gigabytes."""
        a, b = self.parameters
        prime, least = np.uint64((1 << 61) - 1), None
        for start in range(0, len(shingles), 4096):
            with np.errstate(over="ignore"):
                values = ((shingles[start : start + 4096] * a + b) % prime).min(axis=0)
            least = values if least is None else np.minimum(least, values)
        assert least is not None
        return [part.tolist() for part in np.split(least, self.config.num_buckets)]


def content_of(document: Document) -> str:
    """What makes two documents exact duplicates: their text, but for spaces at the ends."""
    return str(document.text.strip())
