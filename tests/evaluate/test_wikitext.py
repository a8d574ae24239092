"""WikiText-2 perplexity against a plain transformers loop of the same procedure."""

import math
from pathlib import Path

import pytest
import torch

from mobilellm.data.tokenizer import train_bpe
from mobilellm.errors import UserError
from mobilellm.evaluate.engine import Engine, NetworkBackend
from mobilellm.evaluate.requests import OwnEncoder
from mobilellm.evaluate.wikitext import FILE, joined, wikitext_perplexity
from mobilellm.interop.checkpoint import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network


def test_it_is_the_plain_loops(tmp_path: Path, sample_text: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [line + "\n" if line else " \n" for line in sample_text[:12_000].splitlines()]
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text("".join(lines))
    tokenizer = train_bpe([sample_text[:30_000]], 400)
    torch.manual_seed(6)
    network = Network(ModelConfig.preset("1M", vocab_size=400, num_hidden_layers=2, initializer_range=0.2)).eval()
    (tmp_path / "hf").mkdir()
    save_checkpoint(tmp_path / "hf", network, tokenizer, {})
    model, words = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "\n\n".join("" if line == " \n" else line for line in lines)
    ids, losses = words(text, return_tensors="pt").input_ids, []
    for i in range(ids.shape[1] // 128):
        window = ids[:, i * 128 : (i + 1) * 128]
        with torch.no_grad():
            losses.append(model(window, labels=window).loss * 128)
    expected = math.exp(torch.stack(losses).sum().item() / (len(losses) * 128))
    engine, encoder = Engine(NetworkBackend(network)), OwnEncoder(tokenizer)
    found = wikitext_perplexity(engine, encoder, tmp_path, length=128)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["count"] == len(losses)
    assert "altered" in found
    with pytest.raises(UserError, match="must be from 2"):
        wikitext_perplexity(engine, encoder, tmp_path, length=4096)


def test_the_joined_text_has_the_published_number_of_tokens(shared: Path) -> None:
    from mobilellm.data.tokenizer import Tokenizer

    if not (shared / "tokenizer/llama2-32k").is_dir():
        pytest.skip("no Llama-2 tokenizer")
    text = joined(shared / "eval" / FILE)
    assert 1 + len(Tokenizer.load(shared / "tokenizer/llama2-32k").encode(text)) == 341_469
