"""A token folder of lines of JSON or rows of a table, each put into its split by itself.

    manifest = make_folder(files, out, "chat", tokenizer, rule, "stop", encode, sinks, facts)

Conversations and pairs of answers are read by this one loop; what they have of their own is
`encode` and the `sinks` that their results go to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mobilellm.data.manifest import ShardEntry
from mobilellm.errors import UserError
from mobilellm.files import PARTIAL, check_absent, disk_errors, sweep_partial
from mobilellm.prepare.assembly import describe, put_together
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import MAX_LISTED, Count, FinishedTask, TaskResult, TaskShard
from mobilellm.readers.table import rows
from mobilellm.streams.places import Place, is_file, sha256_of, status_of
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.special_tokens import with_special_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)


class Sink(Protocol[ItemIn]):
    """Where the encoded lines of a split go."""

    def add(self, item: ItemIn) -> tuple[int, int]:
        """Take one; returns its tokens and its bytes of text."""
        ...

    def close(self) -> list[ShardEntry]:
        """Finish; returns the manifest entries of the shards."""
        ...


def check_given(files: Sequence[Place], out: Path, held_out: float, what: str) -> None:
    """`UserError` for files that are not there, an `out` that is, and an impossible share."""
    if not files:
        raise UserError(f"no {what} given", hint="name files of JSON lines")
    check_absent(out)
    if not 0 < held_out < 1:
        raise UserError(f"held-out {held_out:g}: must be between 0 and 1")
    for file in files:
        if not is_file(file):
            raise UserError(f"{file}: no such file")


def with_template(
    tokenizer: Tokenizer, file: Path | None
) -> tuple[Tokenizer, ChatTemplate, dict[str, Any]]:
    """The tokenizer with the template in `file`, or its own or ChatML, and with the special tokens
    that this spells; the template, and what the manifest says of them."""
    template = ChatTemplate.of(tokenizer, file)
    grown, added = with_special_tokens(tokenizer, template.markers())
    facts = {"template": template.source, "special_tokens_added": added}
    return grown.replaced(chat_template=template.source), template, facts


def make_folder(
    files: Sequence[Place],
    out: Path,
    source: str,
    tokenizer: Tokenizer,
    rule: SplitRule,
    on_bad: str,
    encode: Callable[[Any, str], Item],
    sinks: Callable[[Path], dict[str, Sink[Item]]],
    facts: Callable[[Count], dict[str, Any]],
) -> dict[str, Any]:
    """Make the token folder `out`; returns its manifest.

    `encode(row, where)` gives what a line becomes, and raises `UserError` for a bad one; `sinks`
    takes the folder to write to and has one for each split; `facts` are what the manifest says
    beside what all manifests say, asked for at the end.
    """
    sweep_partial(out.parent, out.name)
    work = out.with_name(f".{out.name}{PARTIAL}{source}")
    result = TaskResult(counts={source: Count()})
    with disk_errors(out):
        work.mkdir(parents=True)
        try:
            writers = sinks(work)
            _read(files, result, source, rule, on_bad, encode, writers)
            count = result.counts[source]
            for split, writer in writers.items():
                shards = writer.close()
                if not shards:
                    part = "held out" if split == "held_out" else "trained on"
                    raise UserError(
                        f"of {count.documents:,} lines none is {part}",
                        hint="give more, or another --held-out",
                    )
                result.shards += [TaskShard(**{**shard, "split": split}) for shard in shards]
            given = [Source(source, list(files))]
            how = {"bos": False, "eos": False, "library": "tokenizers", "reason": ""}
            manifest = describe(given, [result], tokenizer, rule, **how)  # type: ignore[arg-type]
            manifest |= facts(count)
            put_together(out, [FinishedTask(work, result)], manifest, tokenizer)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def _read(
    files: Sequence[Place],
    result: TaskResult,
    source: str,
    rule: SplitRule,
    on_bad: str,
    encode: Callable[[Any, str], Item],
    sinks: dict[str, Sink[Item]],
) -> None:
    """Encode every line, and give it to the sink of its split."""
    count = result.counts[source]
    for file_number, file in enumerate(files):
        result.files.append([str(file), status_of(file).size, sha256_of(file)])
        for row in rows(file):
            where = row.where()
            count.records += 1
            try:
                if row.fault is not None:
                    raise row.fault
                item = encode(row.value, where)
            except UserError as error:
                if on_bad == "stop":
                    raise
                count.bad += 1
                if len(result.skipped) < MAX_LISTED:
                    result.skipped.append([where, error.what.removeprefix(f"{where}: ")])
                continue
            held, _ = rule.held_out(source, file_number, row.key)
            tokens, size = sinks["held_out" if held else "train"].add(item)
            count.documents += 1
            count.tokens += tokens
            count.bytes += size
