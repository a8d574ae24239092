"""Families of small models through every format: ids, logits and text of the tool that opens it.

A family is what people bring: a tiny random network as transformers writes it, or as the original
does, with a tokenizer of the family's kind. Each format is opened by its own tool: transformers,
our network, llama.cpp, onnxruntime. `docs/formats.md` shows the table that comes out, between two
marks, and a test holds it to what is found here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.interop.networks import checkpoint, network
from tests.sentencepiece_files import sentencepiece_file

from mobilellm.errors import UserError
from mobilellm.gguf.pre_tokenizers import named
from mobilellm.gguf.tokenizer_parts import ByteLevelParts, byte_level_tokenizer
from mobilellm.interop.load import Loaded, load
from mobilellm.runtimes.llama_cpp_tokens import llama_cpp_tokens
from mobilellm.runtimes.table import RUNTIMES, open_session
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.workflows.convert import convert
from mobilellm.workflows.token_probe import TEXTS

transformers = pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")
pytest.importorskip("onnxruntime")
pytest.importorskip("sentencepiece")

DOC = Path(__file__).resolve().parents[2] / "docs/formats.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
FORMATS = {"hf": "transformers", "mobilellm": "ours", "gguf": "llama.cpp", "onnx": "onnxruntime"}
ROWS = 512
PROMPT = [i * 37 % 400 + 40 for i in range(24)]
NEW = 8
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# llama.cpp has keys and values in F16.
CLOSE = {"hf": 1e-5, "mobilellm": 1e-5, "gguf": 2e-2, "onnx": 1e-4}


@functools.cache
def byte_level(cut: str, text: str) -> Tokenizer:
    """A byte-level BPE of ROWS pieces whose text is cut as `cut` says."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, trainers

    pre = named(cut)
    assert pre is not None
    content = json.loads(Fast(models.BPE()).to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre.stages()}
    fast = Fast.from_str(json.dumps(content))
    special = ["<|endoftext|>", "<|begin_of_text|>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator([text, *TEXTS], trainer)
    model = json.loads(fast.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if piece in special else 1 for piece in pieces]
    merges = [" ".join(pair) for pair in model["merges"]]
    parts = ByteLevelParts(pieces=pieces, types=types, merges=merges, cut=pre)
    begins = cut == "llama-bpe"
    return byte_level_tokenizer(
        parts, name=cut, bos_id=1, eos_id=2, add_bos=begins, chat_template=None
    )


@functools.cache
def trained(text: str, **settings: object) -> bytes:
    """A SentencePiece model of ROWS pieces of Llama's kind, or as the settings say."""
    return sentencepiece_file(text, **({"vocab_size": ROWS} | settings))


def theirs(folder: Path, kind: str, **changes: object) -> None:
    """A network of transformers, whose norms are not one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | changes))
    name = kind.removesuffix("Text")
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(folder)


def llama_2(folder: Path, text: str) -> None:
    theirs(folder, "Llama", num_key_value_heads=2)
    (folder / "tokenizer.model").write_bytes(trained(text))


def tiny_llama(folder: Path, text: str) -> None:
    theirs(folder, "Llama")
    (folder / "t").mkdir()
    (folder / "t/tokenizer.model").write_bytes(trained(text, pad_id=3))
    Tokenizer.load(folder / "t").save(folder)


def gemma_tokens(folder: Path, text: str) -> None:
    theirs(folder, "Llama", tie_word_embeddings=True)
    pieces = "<start_of_turn>,<end_of_turn>,ing"
    content = trained(text, add_dummy_prefix=False, user_defined_symbols=pieces)
    (folder / "tokenizer.model").write_bytes(content)


def llama_3(folder: Path, text: str) -> None:
    theirs(folder, "Llama", rope_parameters=LLAMA3, tie_word_embeddings=True)
    byte_level("llama-bpe", text).save(folder)


def smollm2(folder: Path, text: str) -> None:
    theirs(folder, "Llama", tie_word_embeddings=True)
    byte_level("smollm", text).save(folder)


def qwen3(folder: Path, text: str) -> None:
    theirs(folder, "Qwen3", tie_word_embeddings=True)
    byte_level("qwen2", text).save(folder)


def r1(folder: Path, text: str) -> None:
    theirs(
        folder,
        "Llama4Text",
        intermediate_size_mlp=96,
        num_local_experts=0,
        moe_layers=[],
        no_rope_layers=[1, 1],
        attn_temperature_tuning=False,
        attention_chunk_size=128,
        tie_word_embeddings=True,
    )
    byte_level("llama-bpe", text).save(folder)


def original(folder: Path, text: str) -> None:
    """MobileLLM-LS as its makers' code writes it: shared layers, of a kind that is told."""
    values = {key: value for key, value in SHAPE.items() if key != "initializer_range"}
    checkpoint(folder / "own", network(**values, layer_repeats=2, shared_kv="own"))
    for file in (folder / "own").iterdir():
        file.rename(folder / file.name)
    (folder / "mobilellm.json").unlink()
    where = folder / "config.json"
    config = json.loads(where.read_text())
    for key in ("layer_repeats", "shared_kv", "mobilellm_version"):
        config.pop(key, None)
    config |= {"model_type": "mobilellm", "layer_sharing": True, "share_embedding": True}
    where.write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(trained(text))


def windows(folder: Path, text: str) -> None:
    kinds = ["sliding_attention", "full_attention"]
    changes = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds}
    theirs(folder, "Qwen3", **changes)
    byte_level("qwen2", text).save(folder)


FAMILIES: dict[str, Callable[[Path, str], None]] = {
    "Llama 2": llama_2,
    "Llama 3": llama_3,
    "TinyLlama": tiny_llama,
    "SmolLM2": smollm2,
    "Qwen3": qwen3,
    "MobileLLM-LS": original,
    "MobileLLM-R1": r1,
    "Gemma's tokenizer": gemma_tokens,
    "sliding windows": windows,
}


def read(out: Path, to: str) -> tuple[Callable[[str], list[int]], np.ndarray, list[int]]:
    """Ids, the last logits of PROMPT and a greedy continuation, by the format's own tool."""
    if to == "hf":
        model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT])).logits[0, -1].numpy()
            text = model.generate(
                torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1
            )
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        return encode, logits, text[0, len(PROMPT) :].tolist()
    name = {"mobilellm": "mobilellm", "gguf": "llama.cpp", "onnx": "onnxruntime"}[to]
    tokenizer = RUNTIMES[name].read_tokenizer(out)
    assert tokenizer is not None
    with open_session(out, name, context=64, threads=1) as session:
        logits = np.array(session.feed(PROMPT))
        tokens, last = [int(logits.argmax())], logits
        while len(tokens) < NEW:
            last = session.feed([tokens[-1]])
            tokens.append(int(last.argmax()))
    return tokenizer.encode, logits, tokens


def differences(loaded: Loaded, out: Path, to: str) -> Iterator[str]:
    """What the tool that opens `out` has otherwise than the source."""
    source = loaded.require_tokenizer()
    encode, logits, tokens = read(out, to)
    if to == "gguf":
        with llama_cpp_tokens(out) as llama_cpp:
            ids_equal = all(llama_cpp(text) == source.encode(text) for text in TEXTS)
    elif to == "hf":  # transformers reads special tokens that a text spells out as tokens
        ids_equal = all(encode(t) == source.encode(t, parse_special=True) for t in TEXTS)
    else:
        ids_equal = all(encode(text) == source.encode(text) for text in TEXTS)
    if not ids_equal:
        yield "ids"
    with torch.no_grad():
        expected = loaded.network(torch.tensor([PROMPT]))[0, -1].numpy()
    if np.abs(logits - expected).max() > CLOSE[to] * max(1.0, float(expected.std())):
        yield "logits"
    if tokens != list(loaded.network.generate(PROMPT, NEW, stop=())):
        yield "text"


@functools.cache
def cell(folder: Path, family: str, to: str, text: str) -> str:
    """What a family has in a format: "same", what differs, or "refused"."""
    source = folder / family.replace(" ", "_")
    if not source.exists():
        source.mkdir()
        FAMILIES[family](source, text)
    shared = "own" if family == "MobileLLM-LS" else None
    out = folder / f"{source.name}-{to}{'.gguf' if to == 'gguf' else ''}"
    precision = None if to == "mobilellm" else "F32"
    try:
        convert(source, out, to, precision=precision, shared_kv=shared)
    except UserError:
        return "refused"
    found = list(differences(load(source, shared_kv=shared), out, to))
    return f"other {' and '.join(found)}" if found else "same"


def table(folder: Path, text: str) -> str:
    """The matrix as Markdown."""
    lines = ["| | " + " | ".join(f"{to} ({tool})" for to, tool in FORMATS.items()) + " |"]
    lines.append("|---" * (1 + len(FORMATS)) + "|")
    for family in FAMILIES:
        cells = [cell(folder, family, to, text) for to in FORMATS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.long
def test_the_documented_matrix_is_what_is_found(
    tmp_path_factory: pytest.TempPathFactory, sample_text: str
) -> None:
    found = table(tmp_path_factory.mktemp("matrix"), sample_text[:30_000])
    _, _, rest = DOC.read_text().partition(BEGIN)
    documented, ended, _ = rest.partition(END)
    assert ended
    assert documented == found, found


@pytest.mark.parametrize(
    ("family", "to"), [("MobileLLM-R1", "gguf"), ("SmolLM2", "hf"), ("Gemma's tokenizer", "gguf")]
)
def test_common_families_are_the_same_everywhere(
    tmp_path_factory: pytest.TempPathFactory, sample_text: str, family: str, to: str
) -> None:
    assert cell(tmp_path_factory.mktemp("cell"), family, to, sample_text[:30_000]) == "same"
