"""Cleaning on datatrove: quality filter, decontamination, exact and MinHash deduplication, in front of `prepare`.

    report, cleaned = clean(sources, Path("work"), decontaminate=Path("evaluation-sets"), workers=8)
    prepare(cleaned, Path("data/clean"))

The stages are ordinary datatrove pipelines (`stages`), so they run on its Slurm and Ray executors as they do here on the local
one. Nothing in them knows a language: words are runs of letters and digits, or single characters where a script has no spaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.errors import UserError
from mobilellm.files import disk_errors, write_file
from mobilellm.prepare.documents import ReadSettings, Source, Span, kind, records, text_pieces
from mobilellm.prepare.tasks import plan

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.utils.hashing import HashConfig
except ImportError as error:
    raise UserError(
        f"cleaning needs datatrove ({error})", hint="pip install 'mobilellm[data]'"
    ) from None

WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|[^\W_]+"
)
CLEANING_VERSION = 1  # of the rules below
NGRAM = 13  # words of a passage in common with an evaluation set, as Brown et al. count (arXiv 2005.14165, appendix C)
SHORTEST = 8  # words of an evaluation text that is looked for whole when it has fewer than NGRAM
SHINGLE = 5
EXAMPLES = 10
SHOWN = 200  # characters of an example
HASH = HashConfig(precision=64, hash_fc="sha1")
MINHASH = MinhashConfig(n_grams=SHINGLE, num_buckets=14, hashes_per_bucket=8, hash_config=HASH)
STEPS = ("unreadable", "quality", "decontamination", "exact duplicate", "near duplicate")


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


class Dropped:
    """Counts what a step drops in one task, and keeps the first examples; takes an exclusion writer's place."""

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

    def __init__(self, sources: list[Source], folder: Path, text_field: str, on_bad: str) -> None:
        super().__init__()
        self.tasks, self.folder = plan(sources), folder
        self.settings, self.on_bad = ReadSettings(text_field=text_field), on_bad

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yield documents with `source` and `where` in their metadata; `UserError` for a bad one, or it is counted."""
        count = 0
        with Dropped(self.folder, "unreadable") as dropped:
            for task in self.tasks[rank::world_size]:
                for part in task.parts:
                    for record in records(
                        Path(part.path), Span(part.start, part.end), self.settings
                    ):
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
                        text = (
                            "".join(text_pieces(record.path)) if record.path else record.text or ""
                        )
                        self.stat_update("total")
                        yield Document(text, name, metadata={"source": task.source, "where": where})
        write_file(self.folder / "read" / f"{rank:05d}.json", orjson.dumps(count))


class ReadKept(PipelineStep):
    """What the task of the same number kept one stage before, in its order, which deduplication relies on."""

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
    """Writes documents as JSON lines, complete under their names or not there, and passes them on."""

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
    least_characters = 50
    least_letters = 0.4  # of the characters that are not spaces
    most_broken = 0.005  # replacement and control characters
    most_repeated_lines = 0.3
    most_repeated_characters = 0.2
    least_compressed = 0.08  # of its bytes; prose has 0.35 to 0.45

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        text = doc.text
        solid = len(text) - sum(map(text.count, " \n\t\r"))
        if solid < self.least_characters:
            return self._because(doc, "short", f"{solid} characters")
        counts = Counter(text)
        letters = sum(n for c, n in counts.items() if unicodedata.category(c)[0] in "LM")
        if letters < self.least_letters * solid:
            return self._because(doc, "few letters", f"{letters / solid:.0%}")
        broken = sum(
            n
            for c, n in counts.items()
            if c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\n\t\r\f")
        )
        if broken > self.most_broken * len(text):
            return self._because(doc, "broken characters", f"{broken / len(text):.1%}")
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        repeated = [line for line, n in Counter(lines).items() for _ in range(n - 1)]
        if len(lines) > 5 and len(repeated) > self.most_repeated_lines * len(lines):
            return self._because(doc, "repeated lines", f"{len(repeated) / len(lines):.0%}")
        if len(lines) > 5 and sum(map(len, repeated)) > self.most_repeated_characters * sum(
            map(len, lines)
        ):
            return self._because(
                doc,
                "text in repeated lines",
                f"{sum(map(len, repeated)) / sum(map(len, lines)):.0%}",
            )
        sample = text[: 1 << 16].encode("utf-8", "replace")
        share = len(zlib.compress(sample, 1)) / len(sample)
        if share < self.least_compressed:
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


def evaluation_ngrams(folder: Path) -> dict[int, NDArray[np.uint64]]:
    """Sorted hashes of the word runs in a folder's files (.jsonl, .txt, .raw, also .gz), by length.

    Every string in a row is a text of its own. Those of NGRAM words or more give all their runs of NGRAM; shorter ones, down to
    SHORTEST, are one run. `UserError` when there is nothing to read.
    """
    found: dict[int, list[NDArray[np.uint64]]] = {}

    def add(text: str) -> None:
        words = word_hashes(text)
        if len(words) >= SHORTEST:
            length = min(len(words), NGRAM)
            found.setdefault(length, []).append(runs(words, length))

    for path in evaluation_files(folder):
        if kind(path) == "lines":
            from mobilellm.prepare.documents import unpacked

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
    """The files of evaluation sets in a folder, sorted. `UserError` when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of evaluation sets")
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and (kind(path) in ("text", "lines") or path.suffix == ".raw")
        and path.name.upper() not in ("README.MD", "LICENSE")
    )  # fmt: skip


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


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


@dataclass(frozen=True)
class CleaningStage:
    """One datatrove pipeline, and into how many tasks it is to be divided."""

    name: str
    pipeline: list[Any]
    tasks: int


def stages(
    sources: list[Source], folder: Path, *, decontaminate: Path | None = None, text_field: str = "text", on_bad: str = "stop"
) -> list[CleaningStage]:  # fmt: skip
    """The pipelines, to be run one after the other, by any datatrove executor; documents end up in folder/cleaned/SOURCE."""
    tasks = len(plan(sources))
    exact = ExactDedupConfig(content_getter=content_of, hash_config=HASH, only_dedup_in_index=False)
    first: list[Any] = [
        ReadSources(sources, folder, text_field, on_bad),
        QualityFilter(Dropped(folder, "quality")),
    ]
    if decontaminate is not None:
        first.append(Decontaminate(decontaminate, Dropped(folder, "decontamination")))
    first += [Keep(folder / "kept-1"), ExactDedupSignature(str(folder / "exact/signatures"), exact)]
    second = [
        ReadKept(folder / "kept-1"),
        ExactDedupFilter(
            str(folder / "exact/duplicates"), exact, Dropped(folder, "exact duplicate")
        ),
        Keep(folder / "kept-2"),
        Signature(folder / "near/signatures"),
    ]
    buckets = MinhashDedupBuckets(
        str(folder / "near/signatures"),
        str(folder / "near/pairs"),
        config=MINHASH,
        only_dedup_in_index=False,
    )
    third = [
        ReadKept(folder / "kept-2"),
        MinhashDedupFilter(str(folder / "near/removed"), Dropped(folder, "near duplicate")),
        Keep(folder / "cleaned", by_source=True),
    ]
    return [
        CleaningStage("filter", first, tasks),
        CleaningStage(
            "exact",
            [
                ExactFindDedups(
                    str(folder / "exact/signatures"), str(folder / "exact/duplicates"), exact
                )
            ],
            1,
        ),
        CleaningStage("unique", second, tasks),
        CleaningStage("pairs", [buckets], MINHASH.num_buckets),
        CleaningStage(
            "clusters",
            [
                MinhashDedupCluster(
                    str(folder / "near/pairs"), str(folder / "near/removed"), config=MINHASH
                )
            ],
            1,
        ),
        CleaningStage("final", third, tasks),
    ]


def clean(
    sources: list[Source], folder: Path, *, decontaminate: Path | None = None, text_field: str = "text", on_bad: str = "stop",
    workers: int = 1, say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[Source]]:  # fmt: skip
    """Run the stages here, with so many processes; returns the report and the cleaned sources, which lie in `folder`.

    A run that was stopped goes on where it was. `UserError` for bad input, and when nothing is left.
    """
    from datatrove.executor import LocalPipelineExecutor

    against = [
        (path, path.stat()) for path in (evaluation_files(decontaminate) if decontaminate else ())
    ]
    settings = [
        CLEANING_VERSION, [asdict(task) for task in plan(sources)], text_field, on_bad,
        [[str(path), status.st_size, status.st_mtime_ns] for path, status in against],
    ]  # fmt: skip
    place = (
        folder / hashlib.sha256(orjson.dumps(settings)).hexdigest()[:16]
    )  # other settings take nothing over
    with disk_errors(folder):
        place.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another process is cleaning there",
                hint="wait for it, or choose another name",
            ) from None
        for stage in stages(
            sources, place, decontaminate=decontaminate, text_field=text_field, on_bad=on_bad
        ):
            say(f"cleaning: {stage.name}, {stage.tasks} tasks")
            executor = LocalPipelineExecutor(
                pipeline=stage.pipeline, tasks=stage.tasks, workers=min(workers, stage.tasks), skip_completed=True,
                logging_dir=str(place / "logs" / stage.name),
            )  # fmt: skip
            with _quiet(place / "console.log"):
                executor.run()
    report = summary(place)
    cleaned = [
        Source(source.name, sorted((place / "cleaned" / source.name).glob("*.jsonl")), source.weight, source.given)
        for source in sources if (place / "cleaned" / source.name).is_dir()
    ]  # fmt: skip
    if not cleaned:
        raise UserError(
            f"{sources[0].paths[0]}: no document is left after cleaning",
            hint=f"the reasons are in {place}/dropped",
        )
    return report, cleaned


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Send what datatrove prints, here and in its processes, to a file: some pages for every task."""
    from datatrove.utils.logging import setup_default_logger

    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(path, "a") as log, contextlib.redirect_stderr(log):
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        setup_default_logger()


def summary(folder: Path) -> dict[str, Any]:
    """Documents read and kept, and for each step how many it dropped, why, and ten examples. Checks that none is lost."""
    read = sum(orjson.loads(path.read_bytes()) for path in (folder / "read").glob("*.json"))
    kept = 0
    for path in (folder / "cleaned").rglob("*.jsonl"):
        with open(path, "rb") as file:
            kept += sum(1 for _ in file)
    dropped: dict[str, Any] = {}
    for step in STEPS:
        notes = [
            orjson.loads(path.read_bytes())
            for path in sorted((folder / "dropped" / step).glob("*.json"))
        ]
        reasons = sum((Counter(note["reasons"]) for note in notes), Counter[str]())
        dropped[step] = {
            "documents": sum(note["count"] for note in notes),
            "reasons": dict(sorted(reasons.items())) if any(reasons) else {},
            "examples": [example for note in notes for example in note["examples"]][:EXAMPLES],
        }
    lost = read - kept - sum(step["documents"] for step in dropped.values())
    assert not lost, f"{lost} of {read} documents were lost in cleaning"
    return {"documents_read": read, "documents_kept": kept, "dropped": dropped}
