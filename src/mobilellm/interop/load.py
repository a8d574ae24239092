"""A model on disk, of whatever format: the format is recognized, and its reader is called.

    loaded = load(Path("runs/demo"))       # a run, or any of the formats of READERS
    loaded.network, loaded.tokenizer, loaded.origin

A new format is one entry in READERS and the file that the entry comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilellm.damage import reading
from mobilellm.errors import UserError
from mobilellm.files import sha256_file
from mobilellm.interop import gguf_reader, huggingface, llama2c
from mobilellm.interop.loaded import Loaded, Reader
from mobilellm.interop.repeats import folded
from mobilellm.interop.sampling_defaults import sampling_of
from mobilellm.model.config import ModelConfig, SharedKV
from mobilellm.tokenizer.tokenizer import Tokenizer

READERS: tuple[Reader, ...] = (huggingface.READER, gguf_reader.READER, llama2c.READER)


def recognize(path: Path) -> tuple[Reader, Path]:
    """The reader of what lies at `path`, and the folder or file that it reads.

    Of a run that is the newest checkpoint. `UserError` when there is no model at `path`.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and not (path / "config.json").is_file():
        steps = sorted((path / "checkpoints").glob("step-????????"))
        if not steps:
            raise UserError(
                f"{path}: no model here",
                hint="give a run with a checkpoint, or a folder with config.json",
            )
        path = steps[-1]
    for reader in READERS:
        if reader.recognizes(path):
            return reader, path
    raise UserError(
        f"{path}: not a model file that is known",
        hint=f"give a run, {', '.join(reader.what for reader in READERS)}",
    )


def load(
    path: Path,
    *,
    shared_kv: SharedKV | None = None,
    fold: bool = False,
    tokenizer: Path | None = None,
    ignored: Collection[str] = (),
    halves: bool = False,
    release: bool = False,
) -> Loaded:
    """Read network and tokenizer, in float32.

    Two are for a network that is packed next, as `Loaded.as_run` does with a quantized one
    (quantize/packed.py): with `halves` matrices that are stored in bf16 stay so, and with `release`
    the float32 of matrices on the grid is given back as soon as their integers are known.

    `shared_kv` says which kind of layer sharing a checkpoint has that does not say so itself.
    `fold` turns equal neighboring blocks into repeats of one. `tokenizer` is used instead of the
    model's own, which is then not looked at. `ignored` are keys of its configuration that change
    nothing, as a user says. `UserError` names what is wrong with a file; a tokenizer that cannot be
    read leaves the weights usable (`Loaded.tokenizer_fault`).
    """
    reader, where = recognize(path)
    with reading(where, reader.what):
        read = reader.read(where, shared_kv, ignored, halves, release and not fold)
    network, quantized, origin = read.network, read.quantized, read.origin
    found: Tokenizer | None
    fault: UserError | None = None
    if tokenizer is not None:
        found = _given_tokenizer(tokenizer, network.config)
    else:
        found, fault = _own_tokenizer(reader, where)
    if fold:
        blocks = network.config.num_hidden_layers
        network = folded(network)
        if quantized is not None:
            quantized = quantized.folded(blocks // network.config.num_hidden_layers)
    notes = []
    left_out = origin.get("left_out")
    if isinstance(left_out, dict) and left_out:
        notes.append(f"keys that change nothing are left out: {', '.join(left_out)}")
    if chunk := origin.get("first_chunk"):
        notes.append(f"context of {chunk:,} tokens: after them its attention begins anew")
    if found is not None and found.vocab_size > network.config.vocab_size:
        found, beyond = _within(found, network.config.vocab_size, path)
        notes.append(
            f"left out of the tokenizer: {beyond}, which comes out of no text and has no row "
            "in the embedding"
        )
    network.eval()
    return replace(
        read,
        network=network,
        tokenizer=found,
        quantized=quantized,
        notes=tuple(notes),
        tokenizer_fault=fault,
    )


def _within(tokenizer: Tokenizer, rows: int, path: Path) -> tuple[Tokenizer, str]:
    """The tokenizer without the special tokens that the embedding has no rows for, and their names.

    They come out of no text, unless it spells them out and is read as markup. `UserError` for other
    tokens beyond the rows: then tokenizer and weights belong to different models.
    """
    from tokenizers import Tokenizer as Fast

    content = json.loads(tokenizer.fast.to_str())
    beyond = [token for token in content["added_tokens"] if token["id"] >= rows]
    pieces = tokenizer.fast.get_vocab(with_added_tokens=True).values()
    put_around = tokenizer.encode_batch(["a"], alone=True)[0]
    if (
        not all(token["special"] for token in beyond)
        or sum(i >= rows for i in pieces) != len(beyond)
        or any(i is not None and i >= rows for i in (tokenizer.bos_id, tokenizer.eos_id))
        or max(put_around, default=0) >= rows
        or any(i >= rows for i in tokenizer.fast.get_vocab(with_added_tokens=False).values())
    ):
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {rows} rows",
            hint="they belong to different models",
        )
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    names = ", ".join(f"{token['content']} ({token['id']})" for token in beyond[:5])
    return tokenizer.replaced(Fast.from_str(json.dumps(content))), names


def _own_tokenizer(reader: Reader, where: Path) -> tuple[Tokenizer | None, UserError | None]:
    """The model's own tokenizer, and why it could not be read."""
    try:
        with reading(where, "a model's tokenizer"):
            return reader.read_tokenizer(where), None
    except UserError as fault:
        return None, fault


def _given_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """A tokenizer that a user names: any that `named_tokenizer` reads, or llama2.c's."""
    with reading(path, "a tokenizer"):
        if path.suffix == ".bin":
            return llama2c.read_tokenizer(path, config.vocab_size)
        return named_tokenizer(path)


def named_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: what `Tokenizer.load` reads, or that of a run's newest checkpoint or
    of a GGUF. `UserError` where there is none."""
    if not (path / "checkpoints").is_dir() and path.suffix != ".gguf":
        return Tokenizer.load(path)
    reader, where = recognize(path)
    with reading(where, "a model's tokenizer"):
        found = reader.read_tokenizer(where)
    if found is None:
        raise UserError(f"{where}: holds no tokenizer")
    return found


def sampling_defaults(path: Path) -> dict[str, Any]:
    """How a model's makers sample from it (`sampling_of`); empty where its files do not say."""
    try:
        reader, where = recognize(path)
    except UserError:  # what another runtime runs
        return {}
    with reading(where, reader.what):
        return sampling_of(reader.read_settings(where))


def describe(path: Path) -> tuple[ModelConfig, dict[str, Any] | None, dict[str, Any]]:
    """Configuration, facts of the tokenizer, and origin; the weights are not read.

    The facts are None without a tokenizer, and only `fault` for one that cannot be read.
    """
    reader, where = recognize(path)
    with reading(where, reader.what):
        config, origin = reader.describe(where)
    tokenizer, fault = _own_tokenizer(reader, where)
    facts: dict[str, Any] | None = None
    if tokenizer is not None:
        facts = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "sha256")}
    elif fault is not None:
        facts = {"fault": str(fault)}
    return config, facts, {"format": reader.name} | origin


def source_hash(path: Path) -> str:
    """SHA-256 of a model file, or of the names and hashes of a folder's files."""
    _, where = recognize(path)
    if where.is_file():
        return sha256_file(where)
    digest = hashlib.sha256()
    for file in sorted(p for p in where.iterdir() if p.is_file()):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
