"""`mobilellm prepare`: text to token shards.

    mobilellm prepare book.txt --out data/book --vocab-size 2048

`--validate` checks what was prepared, or the original's layout of samples.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilellm.errors import UserError
from mobilellm.files import check_absent
from mobilellm.printable import one_line
from mobilellm.terminal.output import print_json, progress, put, say

if TYPE_CHECKING:
    from mobilellm.tokenizer.tokenizer import Tokenizer

SAMPLE_TOKENS = 2048  # of the original's samples


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn text into a folder of token shards with a held-out part; or check one (--validate).

    The held-out part is never trained on.
    Reads .txt, .md, .jsonl, .json, .csv, .tsv, each also .gz, .zst, .bz2 or .xz, .parquet, samples
    of token ids ({"token_ids": [...]}), and folders of them; also by address (https://, s3://,
    gs://, hf://datasets/...). A run that was stopped is continued by the same command.

    Example: mobilellm prepare book.txt --out data/book --vocab-size 2048
    """

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders, addresses and patterns; NAME=PATH puts one under a name of its own."""
    source: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A named source, NAME=PATTERN or NAME:WEIGHT=PATTERN; may be given again and again."""
    source_list: Path | None = None
    """TOML file with a list of [[source]]: name, paths, and optionally weight."""
    out: Path | None = None
    """Folder to make."""
    tokenizer: Path | None = None
    """Existing tokenizer: that of a run, a folder with tokenizer.json, a SentencePiece
    tokenizer.model or a GGUF. Without one, a byte-level BPE is trained on the training part of the
    text."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained."""
    held_out: float = 0.01
    """Fraction held out: of documents, or the tail of a single document."""
    text_field: str = "text"
    """Field of a line of JSON, or column of a table, that holds the text."""
    separator: str | None = None
    """What lies between the documents of a text file, as '<|endoftext|>'; blank-lines for empty
    lines. When not given a file is one document."""
    bos: bool = False
    """Put a BOS token before each document."""
    eos: str | None = None
    """Token that ends documents, when it is not the one that the tokenizer names."""
    no_eos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Put no EOS token after documents."""
    seed: int = 0
    """Chooses the documents that are held out, and the order of samples."""
    format: Literal["shards", "jsonl"] = "shards"
    """Token shards, or the original's layout of samples, OUT/1..N/*.jsonl."""
    nodes: int = 1
    """Folders among which --format jsonl divides the samples."""
    sequence_length: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Of samples that are read or written: they have one id more (or, when read, as many). Not
    given it is 2048, with --validate what the manifest says."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Processes; one a core when not given. The result does not depend on it."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do about a document that cannot be read: stop and name it, or leave it out and count
    it."""
    library: Literal["auto", "tokenizers"] = "auto"
    """Tokenize by the fastest library whose ids are right, or by the reference."""
    clean: bool = False
    """First drop what is no text, exact and near duplicates, and say of each step what it dropped.
    Needs mobilellm[data]."""
    decontaminate: Path | None = None
    """With --clean: drop documents that share a passage with an evaluation set in this folder."""
    chat: bool = False
    """The files hold conversations, a line of JSON each: messages as OpenAI has them, prompt and
    completion, instruction and output, or ShareGPT's. Only the assistant's tokens are trained on.
    Needs --tokenizer: the model's folder."""
    preferences: bool = False
    """The files hold pairs of answers, a line of JSON each: OpenAI's preferred_output and
    non_preferred_output, or chosen and rejected. Needs --tokenizer."""
    template: Path | None = None
    """With --chat or --preferences: Jinja file of the chat template, or "chatml"; when not given,
    the tokenizer's own, or ChatML."""
    validate: Path | None = None
    """Check this token folder, layout of samples, or .jsonl file of samples instead, and say all
    that is wrong with it."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Prepare, and say what came out."""
        if self.validate is not None:
            return self.check(self.validate)
        from mobilellm.prepare.prepare import prepare
        from mobilellm.prepare.sources import parse_sources
        from mobilellm.terminal.data_lines import print_prepared

        if self.out is None:
            raise UserError("no --out given", hint="name the folder to make")
        if self.format == "shards" and self.nodes != 1:
            raise UserError(
                "--nodes is of --format jsonl", hint="shards need no division: leave it out"
            )
        if self.eos is not None and self.no_eos:
            raise UserError("--eos and --no-eos are both given", hint="give one of them")
        if self.template and not (self.chat or self.preferences):
            raise UserError("--template is of --chat", hint="add --chat")
        if self.chat or self.preferences:
            return self.prepare_conversations(self.out)
        if self.decontaminate and not self.clean:
            raise UserError("--decontaminate is a step of --clean", hint="add --clean")
        sources = parse_sources(self.sources, self.source, self.source_list)
        work, extra = self.out.with_name(f"{self.out.name}.cleaning"), dict[str, Any]()
        if self.clean:
            check_absent(self.out)
            from mobilellm.clean.stages import clean

            extra["cleaning"], sources = clean(
                sources,
                work,
                decontaminate=self.decontaminate,
                text_field=self.text_field,
                separator=self.separator,
                on_bad=self.on_bad,
                workers=self.workers or os.cpu_count() or 1,
                say=say,
            )
        with progress("preparing", "bytes") as update:
            manifest = prepare(
                sources,
                self.out,
                tokenizer=_tokenizer(self.tokenizer) if self.tokenizer else None,
                vocab_size=self.vocab_size,
                held_out=self.held_out,
                seed=self.seed,
                bos=self.bos,
                eos=not self.no_eos,
                eos_token=self.eos,
                text_field="text" if self.clean else self.text_field,
                separator=None if self.clean else self.separator,
                sequence_length=self.sequence_length or SAMPLE_TOKENS,
                workers=self.workers,
                on_bad=self.on_bad,
                library=self.library,
                nodes=self.nodes if self.format == "jsonl" else None,
                progress=update,
                say=say,
                extra=extra,
            )
        if self.clean:
            shutil.rmtree(work)
        if self.json:
            print_json(manifest)
            return 0
        print_prepared(manifest, self.out, self.format, self.nodes)
        return 0

    def prepare_conversations(self, out: Path) -> int:
        """Conversations, or pairs of answers, to tokens with a mask."""
        from mobilellm.conversations.prepare_chat import prepare_chat
        from mobilellm.conversations.prepare_preferences import prepare_preferences
        from mobilellm.streams.places import place_of
        from mobilellm.terminal.conversation_lines import chat_lines, preference_lines

        flag = "--chat" if self.chat else "--preferences"
        if self.chat and self.preferences:
            raise UserError("--chat and --preferences are two things", hint="give one of them")
        if self.tokenizer is None:
            raise UserError(f"{flag} needs --tokenizer", hint="name the folder of the model")
        only_text = self.separator is not None or self.eos is not None or self.no_eos
        if self.clean or self.format != "shards" or self.source or self.source_list or only_text:
            raise UserError(
                f"{flag} takes files, and makes shards", hint="leave the other flags out"
            )
        files = [place_of(source) for source in self.sources]
        length = self.sequence_length or SAMPLE_TOKENS
        common: dict[str, Any] = {
            "tokenizer": _tokenizer(self.tokenizer),
            "template": self.template,
            "held_out": self.held_out,
            "seed": self.seed,
            "on_bad": self.on_bad,
        }
        if self.chat:
            manifest = prepare_chat(files, out, context=length, **common)
        else:
            manifest = prepare_preferences(files, out, sequence_length=length, **common)
        if self.json:
            print_json(manifest)
            return 0
        for line in (chat_lines if self.chat else preference_lines)(manifest, out):
            put(one_line(line))
        return 0

    def check(self, path: Path) -> int:
        """Validate, and print every fault; 2 when there is one."""
        from mobilellm.data.validate import validate

        with progress("checking", "bytes") as update:
            report = validate(
                path,
                tokenizer=_tokenizer(self.tokenizer) if self.tokenizer else None,
                progress=update,
                sequence_length=self.sequence_length,
                workers=self.workers or os.cpu_count() or 1,
            )
        if self.json:
            print_json({**vars(report), "path": str(path), "valid": not report.faults_in_all})
            return 2 if report.faults_in_all else 0
        for where, what in report.faults:
            put(one_line(f"{where}: {what}" if where else what))
        unit = "documents" if report.kind == "token folder" else "samples"
        put(
            f"{path}: {report.kind}, {report.files:,} files, {report.records:,} {unit}, "
            f"{report.tokens:,} tokens: "
            f"{f'{report.faults_in_all:,} faults' if report.faults_in_all else 'sound'}"
        )
        return 2 if report.faults_in_all else 0


def _tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a user names. torch is imported for that of a model alone."""
    if not (path / "checkpoints").is_dir() and path.suffix != ".gguf":
        from mobilellm.tokenizer.tokenizer import Tokenizer

        return Tokenizer.load(path)
    from mobilellm.interop.load import named_tokenizer

    return named_tokenizer(path)
