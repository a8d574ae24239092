"""Conversations to a token folder whose mask holds what the assistant says.

    manifest = prepare_chat([Path("talks.jsonl")], Path("data/talks"), tokenizer=tokenizer)
    manifest["conversations"]        # how many came whole, shortened, or not at all

Each conversation is a document, so that `--mask-documents` of training keeps them apart. One that
is longer than the context loses its last turns as a whole, and is counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from mobilellm.conversations.forms import Conversation, read_conversation
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.files import PARTIAL, disk_errors, sha256_file, sweep_partial
from mobilellm.prepare.assembly import describe, put_together
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import MAX_LISTED, Count, FinishedTask, TaskResult, TaskShard
from mobilellm.readers.lines import lines
from mobilellm.readers.reader import Span
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import EncodedConversation, encode_conversation
from mobilellm.tokenizer.special_tokens import with_special_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer

SOURCE = "chat"


@dataclass
class Tally:
    """What became of the conversations, and of their tokens."""

    whole: int = 0
    shortened: int = 0
    """Without their last turns, which the context has no room for."""
    messages_left_out: int = 0
    """Of those that were shortened."""
    left_out: int = 0
    """Bad ones, or without a turn of the assistant within the context."""
    trained_tokens: int = 0


def prepare_chat(
    files: Sequence[Path],
    out: Path,
    *,
    tokenizer: Tokenizer,
    template: Path | None = None,
    context: int = 2048,
    held_out: float = 0.01,
    seed: int = 0,
    on_bad: str = "stop",
) -> dict[str, Any]:
    """Make the token folder `out` of files of JSON lines; returns the manifest.

    `template` is a Jinja file; without it the tokenizer's own is taken, or ChatML. `on_bad` "skip"
    counts a bad conversation and goes on; "stop" raises. `UserError` names file and line.

    Special tokens that the template spells and the tokenizer lacks take reserved rows, or are
    appended; the folder's tokenizer has them, and the template.
    """
    if not files:
        raise UserError("no conversations given", hint="name files of JSON lines")
    if out.exists():
        raise UserError(f"{out}: exists already", hint="choose another name or remove it")
    if not 0 < held_out < 1:
        raise UserError(f"held-out {held_out:g}: must be between 0 and 1")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    form = ChatTemplate.of(tokenizer, template)
    tokenizer, added = with_special_tokens(tokenizer, form.markers())
    tokenizer = tokenizer.replaced(chat_template=form.source)
    rule = SplitRule(rule="documents", fraction=held_out, seed=seed)
    sweep_partial(out.parent, out.name)
    work = out.with_name(f".{out.name}{PARTIAL}chat")
    tally, result = Tally(), TaskResult(counts={SOURCE: Count()})
    with disk_errors(out):
        work.mkdir(parents=True)
        try:
            _write(files, work, tokenizer, form, rule, context, on_bad, tally, result)
            manifest = describe(
                [Source(SOURCE, list(files))],
                [result],
                tokenizer,
                rule,
                bos=False,
                eos=False,
                library="tokenizers",
                reason="",
            )
            manifest["conversations"] = {
                **asdict(tally),
                "template": form.source,
                "context": context,
                "special_tokens_added": added,
            }
            put_together(out, [FinishedTask(work, result)], manifest, tokenizer)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return manifest


def _write(
    files: Sequence[Path],
    work: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rule: SplitRule,
    context: int,
    on_bad: str,
    tally: Tally,
    result: TaskResult,
) -> None:
    """Encode every conversation, and write it to the shards of its split."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {s: ShardWriter(work, s, SOURCE, dtype) for s in ("train", "held_out")}
    count = result.counts[SOURCE]
    for file_number, file in enumerate(files):
        result.files.append([str(file), file.stat().st_size, sha256_file(file)])
        for number, position, line, fault in lines(file, Span()):
            if not fault and line.isspace():
                continue
            where = f"{file}:{number()}"
            count.records += 1
            try:
                if fault:
                    raise UserError(f"{where}: {fault}")
                talk = read_conversation(_row(line, where), where)
                encoded, dropped = _fitted(tokenizer, template, talk, context, where)
            except UserError as error:
                if on_bad == "stop":
                    raise
                count.bad += 1
                tally.left_out += 1
                if len(result.skipped) < MAX_LISTED:
                    result.skipped.append([where, error.what.removeprefix(f"{where}: ")])
                continue
            tally.whole += not dropped
            tally.shortened += bool(dropped)
            tally.messages_left_out += dropped
            tally.trained_tokens += sum(encoded.trained)
            held, _ = rule.held_out(SOURCE, file_number, position)
            split = "held_out" if held else "train"
            writers[split].add(encoded.ids, encoded.bytes, trained=encoded.trained)
            count.documents += 1
            count.tokens += len(encoded.ids)
            count.bytes += encoded.bytes
    for split, writer in writers.items():
        shards = writer.close()
        if not shards:
            part = "held out" if split == "held_out" else "trained on"
            raise UserError(
                f"of {count.documents:,} conversations none is {part}",
                hint="give more, or another --held-out",
            )
        result.shards += [TaskShard(**{**shard, "split": split}) for shard in shards]


def _row(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error})") from None


def _fitted(
    tokenizer: Tokenizer, template: ChatTemplate, talk: Conversation, context: int, where: str
) -> tuple[EncodedConversation, int]:
    """The conversation in tokens, and how many of its last messages had to go for it to fit."""
    messages = talk.messages
    ends = [n for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
    for end in [len(messages), *(n for n in reversed(ends) if n < len(messages))]:
        try:
            encoded = encode_conversation(tokenizer, template, messages[:end], talk.tools)
        except UserError as error:
            raise UserError(f"{where}: {error.what}", hint=error.hint) from None
        if len(encoded.ids) <= context:
            if not any(encoded.trained):
                raise UserError(f"{where}: the template marks no token of the assistant")
            return encoded, len(messages) - end
        if end == ends[0]:
            break
    raise UserError(
        f"{where}: {len(encoded.ids):,} tokens up to the first answer, the context has {context:,}",
        hint="give a longer --sequence-length, or --on-bad skip",
    )
