"""The formats, and how a case of each is made: FORMATS[name](case) -> the commands to run.

    case = Case(random.Random("gguf:7"), base, folder)
    for command in FORMATS["gguf"](case):
        ...

A command is the arguments of the command line; "read" calls a reader that no verb has.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tests.hostile import gguf_file
from tests.hostile.mutation import (
    ESCAPES,
    hostile_value,
    json_bytes,
    mutated_bytes,
    mutated_json,
)
from tests.lab.labs import LAB

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Command = list[str]


@dataclass
class Case:
    """What a case is made of, and where."""

    rng: random.Random
    base: Path
    folder: Path
    """Its own, empty."""

    @property
    def out(self) -> Path:
        """Where a verb may write; nothing may be there when it failed."""
        return self.folder / "out"

    def copy(self, name: str) -> Path:
        """A copy of a sound input; a folder's files are links, which `write` replaces."""
        source, target = self.base / name, self.folder / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)
        return target

    def write(self, path: Path, data: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def change_json(self, path: Path) -> None:
        self.write(
            path, json_bytes(self.rng, mutated_json(self.rng, json.loads(path.read_bytes())))
        )

    def use(self, model: Path) -> list[Command]:
        """Read a model in one of three ways."""
        tokens = ["--prompt", "a", "--max-new-tokens", "1"]
        return [
            self.rng.choice(
                [
                    ["info", str(model)],
                    ["generate", str(model), *tokens],
                    ["generate", str(model), *tokens],
                    ["convert", str(model), str(self.out), "--to", "hf"],
                ]
            )
        ]


def config(case: Case) -> list[Command]:
    model = case.copy("hf")
    name = case.rng.choice(["config.json"] * 5 + ["generation_config.json", "mobilellm.json"])
    values = json.loads((model / name).read_bytes())
    if name == "config.json":
        values |= case.rng.choice(
            [
                {},
                {"model_type": case.rng.choice(["qwen3", "mobilellm", "llama4_text", "cwm"])},
                {"max_position_embeddings": 1 << 20, "head_dim": 1 << 16},
                {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
                {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
                {"layer_types": ["sliding_attention"], "sliding_window": 8},
                {"layer_repeats": 2, "shared_kv": "own", "model_type": "mobilellm"},
                {"layer_sharing": True, "share_embedding": True},
            ]
        )  # fmt: skip
    case.write(model / name, json_bytes(case.rng, mutated_json(case.rng, values)))
    return case.use(model)


def rotary_bomb(case: Case) -> list[Command]:
    """Weights of a few KB whose tables of all positions would take gigabytes."""
    rng, model = case.rng, case.copy("hf")
    head, width = rng.choice([2048, 16384, 65536]), 2
    values = json.loads((model / "config.json").read_bytes())
    values |= {
        "vocab_size": 300, "hidden_size": width, "intermediate_size": width, "head_dim": head,
        "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1,
        "max_position_embeddings": 1 << rng.randrange(14, 21),
    }  # fmt: skip
    case.write(model / "config.json", json.dumps(values).encode())
    named = {
        "model.embed_tokens.weight": torch.randn(300, width),
        "model.norm.weight": torch.ones(width),
    }
    layer = "model.layers.0."
    for name in "qkv":
        named[f"{layer}self_attn.{name}_proj.weight"] = torch.zeros(head, width)
    named[f"{layer}self_attn.o_proj.weight"] = torch.zeros(width, head)
    for name in ("gate", "up", "down"):
        named[f"{layer}mlp.{name}_proj.weight"] = torch.zeros(width, width)
    for name in ("input", "post_attention"):
        named[f"{layer}{name}_layernorm.weight"] = torch.ones(width)
    case.write(model / "model.safetensors", safetensors_bytes(named))
    new = rng.choice(["1", "1", str(values["max_position_embeddings"] - 2)])
    if new == "1":
        return [["generate", str(model), "--prompt", "a", "--max-new-tokens", new]]
    return [["info", str(model)]]


def safetensors_bytes(named: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(named)


def safetensors(case: Case) -> list[Command]:
    model = case.copy("hf")
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if case.rng.random() < 0.3:
        case.write(path, mutated_bytes(case.rng, data, header=length + 8))
        return case.use(model)
    header = json.loads(data[8 : 8 + length])
    tensors = [name for name in header if name != "__metadata__"]
    name = case.rng.choice(tensors)
    kind = case.rng.random()
    if kind < 0.2:
        header[name]["dtype"] = case.rng.choice(
            ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "X"]
        )
    elif kind < 0.4:
        header[name]["data_offsets"] = header[case.rng.choice(tensors)]["data_offsets"]
    elif kind < 0.6:
        header[name]["shape"] = case.rng.choice(
            [[2**62, 4], [-1, 3], [], [0], [1] * 60, header[name]["shape"][::-1]]
        )
    elif kind < 0.7:
        header[case.rng.choice([ESCAPES, "model.x", ""])] = header.pop(name)
    else:
        header = mutated_json(case.rng, header)
    text = json.dumps(header).encode()
    case.write(path, struct.pack("<Q", len(text)) + text + data[8 + length :])
    return case.use(model)


def index(case: Case) -> list[Command]:
    model = case.copy("hf")
    (model / "model.safetensors").rename(model / "part-1.safetensors")
    names = list(load_file(model / "part-1.safetensors"))
    listed = {
        "metadata": {"total_size": 5},
        "weight_map": dict.fromkeys(names, "part-1.safetensors"),
    }
    hostile = case.rng.choice(
        [
            "../m.gguf",
            "/dev/zero",
            "/etc/passwd",
            ".",
            "",
            "a\0b",
            "x" * 300,
            "pipe",
            "folder",
            ESCAPES,
        ]
    )
    if case.rng.random() < 0.5:
        os.mkfifo(model / "pipe")
        (model / "folder").mkdir()
        listed["weight_map"][case.rng.choice(names)] = hostile
    else:
        listed = mutated_json(case.rng, listed)
    case.write(model / "model.safetensors.index.json", json_bytes(case.rng, listed))
    return case.use(model)


def pickle(case: Case) -> list[Command]:
    model, rng = case.copy("hf"), case.rng
    named: dict[Any, Any] = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    name = rng.choice(list(named))
    kind = rng.randrange(14)
    value = named[name]
    if kind == 0:
        named[name] = torch.ones(1).expand(*[10**6] * value.ndim)
    elif kind == 1:
        named[name] = value.to("meta")
    elif kind == 2:
        named[name] = value.to_sparse()
    elif kind == 3:
        named[name] = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    elif kind == 4:
        named[name] = rng.choice([{name: value}, [value], None, 3, ESCAPES, value.numpy()])
    elif kind == 5:
        named[rng.choice([ESCAPES, 3, None, "x"])] = named.pop(name)
    elif kind == 6:
        named[name] = torch.nested.nested_tensor([value, value])
    elif kind == 7:
        named[name] = value.to(rng.choice([torch.complex64, torch.int8, torch.bool, torch.float64]))
    elif kind == 8:
        named = rng.choice([[named], named[name], None, {"model": named}])  # type: ignore[assignment]
    stream = io.BytesIO()
    torch.save(named, stream, _use_new_zipfile_serialization=rng.random() < 0.8)
    data = stream.getvalue()
    if kind in (9, 10):
        data = mutated_bytes(rng, data, header=4000)
    elif kind == 11 and data[:2] == b"PK":
        data = _packed_again(rng, data)
    elif kind == 12:
        data = rng.choice(PROGRAMS)
    case.write(model / "pytorch_model.bin", data)
    return case.use(model)


PROGRAMS = [
    b"cos\nsystem\n(S'touch /tmp/mobilellm-pwned'\ntR.",
    b"\x80\x02c__builtin__\neval\nX\x04\x00\x00\x001+1 \x85R.",
    b"cbuiltins\nbytearray\n(L99999999999L\ntR.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    b"(" * 100_000 + b".",
    b"]" + b"q\x00h\x00a" * 50_000 + b".",
    b"I99999999999999999999\n.",
    b"",
    b"PK\x03\x04",
    b"PK\x05\x06" + bytes(18),
]


def _packed_again(rng: random.Random, data: bytes) -> bytes:
    """The archive with its instructions changed, or one record compressed and much larger."""
    out = io.BytesIO()
    bomb = rng.random() < 0.3
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data.pkl") and not bomb:
                content = mutated_bytes(rng, content)
            if bomb and record.filename.endswith("data/0"):
                content = bytes(64 << 20)
            kind = zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED
            new.writestr(record.filename, content, compress_type=kind)
    return out.getvalue()


def gguf(case: Case) -> list[Command]:
    rng, path = case.rng, case.folder / "m.gguf"
    kind = rng.randrange(10)
    keys = gguf_file.keys() | gguf_file.tokenizer_keys()
    tensors = gguf_file.shapes()
    if kind < 2:
        data = mutated_bytes(rng, (case.base / "m.gguf").read_bytes(), header=8000)
    elif kind < 4:  # a key that says what no key should
        name = rng.choice(
            [*keys, "llama.attention.key_length", "llama.rope.scaling.type", "general.alignment"]
        )
        keys[name] = rng.choice(
            [
                ("u32", rng.choice([0, 1, 3, 1 << 16, 1 << 20, 2**32 - 1])),
                ("i32", -1), ("f32", float("nan")), ("f64", 1e300), ("bool", True),
                ("str", rng.choice([ESCAPES, "", "x" * 100_000])), ("u64", 2**64 - 1),
                ("arr", ("u32", [1, 2])), ("arr", ("str", [ESCAPES] * 300)),
                ("arr", ("arr", [("u8", [1])] * 300)), ("arr", ("f32", [float("inf")] * 300)),
            ]
        )  # fmt: skip
        data = gguf_file.whole(keys, tensors)
    elif kind < 5:
        keys.pop(rng.choice(list(keys)))
        data = gguf_file.whole(keys, tensors)
    elif kind < 6:
        place = rng.randrange(len(tensors))
        name, size = tensors[place]
        tensors[place] = rng.choice(
            [(ESCAPES, size), (name, (4, 4)), (name, (*size, 1)), ("x" * 70_000, size)]
        )
        data = gguf_file.whole(keys, tensors)
    elif kind < 7:  # every tensor in the same place
        layers = rng.choice([2, 1024])
        shape = {"vocab": 64, "width": 64, "ffn": 256, "layers": layers}
        tensors = gguf_file.shapes(**shape)
        listed = [gguf_file.tensor(n, s[::-1], 0 if len(s) == 1 else 2, 0) for n, s in tensors]
        entries = [gguf_file.key(n, *v) for n, v in gguf_file.keys(**shape).items()]
        data = gguf_file.build(entries, listed, bytes(64 * 256 // 32 * 18))
    elif kind < 8:  # counts and offsets
        listed = [
            gguf_file.tensor(
                name,
                size[::-1] if rng.random() < 0.9 else (2**40, 2**23),
                rng.choice([0, 0, 0, 1, 2, 8, 12, 30, 99]),
                rng.choice([0, 32, 2**63, 2**64 - 32, i * 4096]),
            )
            for i, (name, size) in enumerate(tensors)
        ]
        entries = [gguf_file.key(name, *value) for name, value in keys.items()]
        counts = [None, None, 0, 2**32, 2**63, 2**64 - 1]
        data = gguf_file.build(
            entries, listed, bytes(1 << 18), version=rng.choice([1, 2, 3, 3, 3, 99]),
            tensor_count=rng.choice(counts), key_count=rng.choice(counts),
        )  # fmt: skip
    elif kind < 9:  # rotary tables of gigabytes
        shape = {"vocab": 300, "layers": 1, "heads": 1, "kv": 1, "context": 1 << 20}
        keys = gguf_file.keys(**shape) | gguf_file.tokenizer_keys()
        keys["llama.attention.key_length"] = ("u32", 16384)
        data = gguf_file.whole(keys, gguf_file.shapes(head_width=16384, **shape))
    else:
        pieces = keys["tokenizer.ggml.tokens"][1][1]
        pieces[rng.randrange(300)] = rng.choice(
            [ESCAPES, "", "a", "ab" * rng.choice([9, 9000]), "\ud800"]
        )
        data = gguf_file.whole(keys, tensors)
    path.write_bytes(data)
    return case.use(path)


def tokenizer_parts(rng: random.Random) -> list[dict[str, Any]]:
    """Parts of a tokenizer.json that lengthen a text, match nothing, or name what is not there."""
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    pattern = {"Regex": rng.choice(["", "(", ".", "a*", "(?=a)", "\\p{X}"])}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {"type": "TemplateProcessing", "single": [first, first], "special_tokens": {}}
    token = {
        "id": rng.choice([300, 2**32 - 1, 5]), "content": rng.choice([ESCAPES, "", "a"]),
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": rng.random() < 0.5,
    }  # fmt: skip
    put = "x" * rng.choice([1, 5000])
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    many = rng.choice([3, 40])
    return [
        {"normalizer": {"type": "Sequence", "normalizers": [doubling] * many}},
        {"normalizer": {"type": "Replace", "pattern": pattern, "content": put}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}},
        {"decoder": {"type": "Sequence", "decoders": [doubling] * 40}},
        {
            "post_processor": {
                "type": "Sequence",
                "processors": [template | {"pair": [first, second]}] * many,
            }
        },
        {"added_tokens": [token]},
        {"pre_tokenizer": split},
    ]


def tokenizer_json(case: Case) -> list[Command]:
    model, rng = case.copy("hf"), case.rng
    name = rng.choice(["tokenizer.json"] * 6 + ["tokenizer_config.json", "special_tokens_map.json"])
    values = json.loads((model / name).read_bytes())
    if name == "tokenizer.json" and rng.random() < 0.6:
        values |= rng.choice(tokenizer_parts(rng))
    elif name == "tokenizer.json" and rng.random() < 0.5:
        part = rng.choice(
            ["normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"]
        )
        values[part] = mutated_json(rng, values[part]) if values[part] else hostile_value(rng)
    else:
        values = mutated_json(rng, values)
    case.write(model / name, json_bytes(rng, values))
    return case.use(model)


def tokenizer_model(case: Case) -> list[Command]:
    model = case.copy("sp")
    path = model / "tokenizer.model"
    case.write(path, mutated_bytes(case.rng, path.read_bytes()))
    if case.rng.random() < 0.3:
        case.write(
            model / "added_tokens.json", json_bytes(case.rng, mutated_json(case.rng, {"<x>": 300}))
        )
    if case.rng.random() < 0.2:
        decoded = {"added_tokens_decoder": {"300": {"content": "<x>", "special": True}}}
        case.write(
            model / "tokenizer_config.json", json_bytes(case.rng, mutated_json(case.rng, decoded))
        )
    return case.use(model)


def chat_template(case: Case) -> list[Command]:
    rng, model = case.rng, case.copy("hf")
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.4:
        text = (case.base / "hf" / "chat_template.jinja").read_bytes()
        case.write(model / "chat_template.jinja", mutated_bytes(rng, text))
    else:
        case.write(model / "chat_template.jinja", template.encode())
    return [["chat", str(model), "--max-new-tokens", "1", "--temperature", "0"]]


TEMPLATES = [
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}{% import os %}",
    "{{ [1] * 10**9 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 9**9**9 }}",
    "{{ range(10**12) | list }}",
    "{{ messages | tojson | replace('a', 'b' * 100000) }}",
    "{% if %}",
    "{{",
    "",
    "\x1b]0;pwned\x07{{ messages[0].content }}",
    "{{ raise_exception('\x1b[2J\nsecond') }}",
    "{{ 'x' | center(10**9) }}",
    "{{ lipsum(10**6) }}",
    "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
]


def prepare(case: Case, path: Path) -> list[Command]:
    """Prepare one file, skipping what is bad or not."""
    settings = ["--tokenizer", str(case.base / "hf"), "--workers", "1"]
    bad = ["--on-bad", case.rng.choice(["skip", "stop"])]
    return [["prepare", str(path), "--out", str(case.out), *settings, *bad]]


def lines(case: Case) -> bytes:
    """Lines of JSON, some of them not."""
    rng, found = case.rng, []
    for i in range(rng.choice([2, 30])):
        row = {"text": f"The quick brown fox {i}. " * 5, "n": i}
        kind = rng.random()
        if kind < 0.2:
            found.append(json_bytes(rng, mutated_json(rng, row)))
        elif kind < 0.3:
            found.append(
                rng.choice([b"[" * 5000, b"\xff\xfe", b"null", b"{}", b'{"text":', b"\0" * 50])
            )
        else:
            found.append(json.dumps(row).encode())
    return b"\n".join(found) + b"\n"


def jsonl(case: Case) -> list[Command]:
    name = case.rng.choice(["rows.jsonl"] * 8 + ["a\x1b[2J\nb.jsonl", "\udcff.jsonl", "'\".jsonl"])
    path = case.folder / name
    path.write_bytes(lines(case))
    return prepare(case, path)


def streams(case: Case) -> list[Command]:
    """Compressed files: cut, with bytes changed, or holding much more than they weigh."""
    import zstandard

    rng = case.rng
    kind = rng.choice(["gz", "bz2", "zst"])
    pack: Callable[[bytes], bytes] = {
        "gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor().compress,
    }[kind]  # fmt: skip
    content = lines(case)
    if rng.random() < 0.15:
        piece = rng.choice([b"a", b" ", b"\n", b'{"text": "' + b"a" * 1000])
        content = piece * ((1 << 21) if len(piece) == 1 else (1 << 16))
    packed = pack(content)
    if rng.random() < 0.6:
        packed = mutated_bytes(rng, packed)
    elif rng.random() < 0.2:
        packed = pack(packed)
    path = case.folder / f"rows.{rng.choice(['jsonl', 'txt'])}.{kind}"
    path.write_bytes(packed)
    return prepare(case, path)


def parquet(case: Case) -> list[Command]:
    import pyarrow
    import pyarrow.parquet

    rng, path = case.rng, case.folder / "rows.parquet"
    texts: list[Any] = [f"The quick brown fox {i}. " * 5 for i in range(30)]
    name = rng.choice(["text", "text", "text", "content", ESCAPES])
    kind = rng.random()
    if kind < 0.3:
        texts[3] = rng.choice([None, ESCAPES, "", "a" * 300_000])
    columns = {name: texts, "n": list(range(30))}
    if kind > 0.9:
        columns[name] = rng.choice([[1] * 30, [[1]] * 30, [{"a": 1}] * 30, [b"\xff"] * 30])
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    data = stream.getvalue()
    if 0.3 < kind < 0.9:
        data = mutated_bytes(rng, data)
    path.write_bytes(data)
    return prepare(case, path)


def recipe(case: Case) -> list[Command]:
    values = tomllib.loads((case.base / "run" / "recipe.toml").read_text())
    values["data"]["path"] = str(case.folder / "none")
    return [["train", str(_changed_toml(case, values)), "--out", str(case.out)]]


def lab(case: Case) -> list[Command]:
    return [["read", "lab", str(_changed_toml(case, tomllib.loads(LAB)))]]


def _changed_toml(case: Case, values: dict[str, Any]) -> Path:
    import tomli_w

    changed = mutated_json(case.rng, values)
    try:
        data = tomli_w.dumps(changed).encode()
    except (TypeError, ValueError, AttributeError):  # what TOML cannot say
        data = tomli_w.dumps(values).encode()
    if case.rng.random() < 0.3:
        data = mutated_bytes(case.rng, data)
    path = case.folder / "r.toml"
    path.write_bytes(data)
    return path


def manifest(case: Case) -> list[Command]:
    data, rng = case.copy("data"), case.rng
    path = data / "manifest.json"
    values = json.loads(path.read_bytes())
    shard = values["splits"]["train"]["shards"][0]
    if rng.random() < 0.4:
        os.mkfifo(data / "train" / "pipe.npy")
        (data / "train" / "folder.npy").mkdir()
        os.symlink("/dev/zero", data / "train" / "zero.npy")
        shard["file"] = rng.choice(
            ["/dev/zero", "train/../../../x.npy", "train/pipe.npy", "train/folder.npy",
             "train/zero.npy", "train/" + "a" * 300 + ".npy", f"train/{ESCAPES}.npy",
             "train/a\0.npy", ""]
        )  # fmt: skip
    else:
        values = mutated_json(rng, values)
    if rng.random() < 0.5 and isinstance(values, dict):
        with_fingerprint(values)
    case.write(path, json_bytes(rng, values))
    return [rng.choice([["data-stats", str(data)], ["prepare", "--validate", str(data)]])]


def with_fingerprint(values: Any) -> None:
    """As whoever edits a manifest with care would do."""
    from mobilellm.data.manifest import fingerprint

    try:
        values["fingerprint"] = fingerprint(values)
    except Exception:
        return


def layout_index(case: Case) -> list[Command]:
    data, rng = case.copy("layout"), case.rng
    if rng.random() < 0.6:
        for name in ("1/a.jsonl",):  # hard links keep the times that the index holds
            assert (data / name).is_file()
        case.change_json(data / ".mobilellm-index" / "index.json")
    else:
        shutil.rmtree(data / ".mobilellm-index")
        samples: list[Any] = [
            {"token_ids": [i % 300] * 17, "source": "ab"[i % 2]} for i in range(20)
        ]
        samples[3] = mutated_json(rng, samples[3])
        if rng.random() < 0.1:
            samples = [{"token_ids": [1] * 17, "source": f"s{i}"} for i in range(1500)]
        rows = b"".join(json_bytes(rng, one) + b"\n" for one in samples)
        case.write(data / "1" / "a.jsonl", rows)
    return [rng.choice([["data-stats", str(data)], ["prepare", "--validate", str(data)]])]


def train_state(case: Case) -> list[Command]:
    """A checkpoint's own files, its checksums made anew in half of the cases."""
    run, rng = case.copy("run"), case.rng
    (checkpoint,) = (run / "checkpoints").iterdir()
    name = rng.choice(["train_state/state.json"] * 3 + ["checksums.json", "config.json"])
    path = checkpoint / name
    if rng.random() < 0.8:
        case.change_json(path)
    else:
        case.write(path, mutated_bytes(rng, path.read_bytes()))
    if name != "checksums.json" and rng.random() < 0.7:
        sums = json.loads((checkpoint / "checksums.json").read_bytes())
        sums[name] = {
            "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }  # fmt: skip
        case.write(checkpoint / "checksums.json", json.dumps(sums).encode())
    if rng.random() < 0.05:
        return [["train", "--resume", str(run)]]
    return [["read", "state", str(checkpoint)]]


def run_files(case: Case) -> list[Command]:
    """What a run's folder says of it: rows, result, environment, recipe."""
    run, rng = case.copy("run"), case.rng
    name = rng.choice(
        ["metrics.jsonl"] * 4 + ["result.json"] * 4 + ["environment.json", "recipe.toml"]
    )
    path = run / name
    if name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        data = b"".join(json_bytes(rng, mutated_json(rng, row)) + b"\n" for row in rows * 3)
        case.write(path, mutated_bytes(rng, data) if rng.random() < 0.3 else data)
    elif name == "recipe.toml":
        case.write(path, mutated_bytes(rng, path.read_bytes()))
    else:
        case.change_json(path)
    return [rng.choice([["report", str(run)], ["watch", str(run), "--once"]])]


def profile(case: Case) -> list[Command]:
    path = case.copy("profile.json")
    case.change_json(path)
    return [["read", "profile", str(path)]]


def quantized(case: Case) -> list[Command]:
    model = case.copy("quantized")
    if case.rng.random() < 0.7:
        case.change_json(model / "quantization.json")
    else:
        path = model / "quantization.safetensors"
        case.write(path, mutated_bytes(case.rng, path.read_bytes(), header=2000))
    return case.use(model)


def llama2c(case: Case) -> list[Command]:
    """A header and numbers, where the header asks for another size, or a huge context."""
    rng, path = case.rng, case.folder / "m.bin"
    numbers = [32, 64, 1, 2, 1, 300, 64]
    version_1 = rng.random() < 0.7
    if version_1:
        numbers[6] = rng.choice([64, 1 << 20])
    if rng.random() < 0.6:
        place = rng.randrange(7)
        numbers[place] = rng.choice([0, -1, 1, 1 << 20, 2**31 - 1, numbers[place] + 1])
    head = struct.pack("<7i", *numbers)
    if version_1:
        head = struct.pack("<Ii", 0x616B3432, 1) + head + b"\1" + bytes(256 - 37)
    count = (
        300 * 32 + 32 * 3 + 32 * 32 * 2 + 2 * 16 * 32 + 3 * 64 * 32 + (0 if version_1 else 64 * 16)
    )
    data = head + (np.random.default_rng(0).standard_normal(count) * 0.1).astype("<f4").tobytes()
    path.write_bytes(mutated_bytes(rng, data, header=300) if rng.random() < 0.2 else data)
    return (
        [["info", str(path)]]
        if rng.random() < 0.5
        else [["convert", str(path), str(case.out), "--to", "hf"]]
    )


def whole(case: Case, number: int) -> list[Command]:
    """A sound input, as it is."""
    base, out = case.base, str(case.out)
    tokens = ["--prompt", "a", "--max-new-tokens", "1"]
    models = ["hf", "m.gguf", "sp", "quantized", "run"]
    if number < len(models):
        return [["generate", str(base / models[number]), *tokens]]
    (checkpoint,) = (base / "run" / "checkpoints").iterdir()
    commands = [
        ["convert", str(base / "hf"), out, "--to", "hf"],
        ["data-stats", str(base / "data")],
        ["data-stats", str(base / "layout")],
        ["watch", str(base / "run"), "--once"],
        ["read", "state", str(checkpoint)],
        ["read", "profile", str(base / "profile.json")],
        ["prepare", str(base / "rows.jsonl"), "--out", out, "--tokenizer", str(base / "hf")],
    ]
    return [commands[number - len(models)]]


Make = Callable[[Case], list[Command]]
FORMATS: dict[str, tuple[Make, int]] = {
    "GGUF": (gguf, 480),
    "config.json": (config, 420),
    "rotary tables": (rotary_bomb, 30),
    "safetensors": (safetensors, 260),
    "safetensors index": (index, 150),
    "pickle": (pickle, 280),
    "llama2.c": (llama2c, 100),
    "tokenizer.json": (tokenizer_json, 280),
    "tokenizer.model": (tokenizer_model, 160),
    "chat template": (chat_template, 100),
    "quantization": (quantized, 100),
    "jsonl": (jsonl, 120),
    "gz, bz2, zst": (streams, 120),
    "Parquet": (parquet, 80),
    "recipe": (recipe, 160),
    "lab": (lab, 160),
    "manifest": (manifest, 180),
    "layout and its index": (layout_index, 100),
    "train_state": (train_state, 160),
    "metrics, result, environment": (run_files, 220),
    "device profile": (profile, 120),
}
"""Name -> what makes a case, and how many cases the long test tries."""
