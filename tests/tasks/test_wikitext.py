"""WikiText-2 perplexity against a plain transformers loop of the same procedure."""

import math
from pathlib import Path

import pytest
import torch
from tests.conftest import without_data

from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tasks.engine import Engine, NetworkBackend
from mobilellm.tasks.requests import OwnEncoder
from mobilellm.tasks.wikitext import FILE, joined, overlapping, wikitext_perplexity
from mobilellm.tokenizer.tokenizer import train_bpe


def test_it_is_the_plain_loops(tmp_path: Path, sample_text: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [line + "\n" if line else " \n" for line in sample_text[:12_000].splitlines()]
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text("".join(lines))
    tokenizer = train_bpe([sample_text[:30_000]], 400)
    torch.manual_seed(6)
    network = Network(
        ModelConfig.preset("1M", vocab_size=400, num_hidden_layers=2, initializer_range=0.2)
    ).eval()
    (tmp_path / "hf").mkdir()
    save_checkpoint(tmp_path / "hf", network, tokenizer, {})
    model, words = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
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


@pytest.mark.parametrize(("length", "stride"), [(64, 63), (64, 20), (50, 7)])
def test_overlapping_windows_score_each_token_once_with_as_much_before_it(
    length: int, stride: int
) -> None:
    tokens = list(range(1000, 1333))
    requests = overlapping(tokens, length, stride)
    assert [token for each in requests for token in each.targets] == tokens[1:]
    assert all(len(each.tokens) == length for each in requests[:-1])
    assert all(each.scored <= stride for each in requests[1:])
    for each in requests:
        start = each.tokens[0] - 1000
        assert list(each.tokens) == tokens[start : start + len(each.tokens)]


def test_a_stride_gives_the_mean_over_all_tokens(tmp_path: Path, sample_text: str) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(sample_text[:2_000])
    tokenizer = train_bpe([sample_text[:30_000]], 400)
    torch.manual_seed(6)
    network = Network(
        ModelConfig.preset("1M", vocab_size=400, num_hidden_layers=2, initializer_range=0.2)
    ).eval()
    engine, encoder = Engine(NetworkBackend(network)), OwnEncoder(tokenizer)
    found = wikitext_perplexity(engine, encoder, tmp_path, length=48, stride=16)
    ids = torch.tensor(encoder.encode_batch([joined(tmp_path / FILE)], True)[0])
    losses = []
    for i in range(1, len(ids)):
        end = (
            48 if i < 48 else min(len(ids), 48 + -(-(i + 1 - 48) // 16) * 16)
        )  # of the window that scores token i
        window = ids[max(0, end - 48) : i]
        with torch.no_grad():
            losses.append(
                torch.nn.functional.cross_entropy(network(window[None])[0, -1], ids[i]).item()
            )
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert (found["stride"], found["protocol"]) == (16, "sliding")
    with pytest.raises(UserError, match="stride 48"):
        wikitext_perplexity(engine, encoder, tmp_path, length=48, stride=48)


def test_the_joined_text_has_the_published_number_of_tokens(shared: Path) -> None:
    from mobilellm.tokenizer.tokenizer import Tokenizer

    if not (shared / "tokenizer/llama2-32k").is_dir():
        without_data("no Llama-2 tokenizer")
    text = joined(shared / "eval" / FILE)
    assert 1 + len(Tokenizer.load(shared / "tokenizer/llama2-32k").encode(text)) == 341_469
