"""Fine-tuning is `prepare --chat` and `train`: its loss is transformers', and a model learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.interop.networks import checkpoint, network
from tests.rows import write_rows

from mobilellm import cli
from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.token_folder import TokenFolder
from mobilellm.interop.load import load
from mobilellm.model.loss import NextToken
from mobilellm.tokenizer.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {"fox": "an animal", "oak": "a tree", "rye": "a grass"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokenizer has reserved rows, and talks."""
    found = tmp_path_factory.mktemp("sft")
    text = "what is a fox an oak or rye an animal a tree a grass " * 20
    tokenizer = train_bpe([text], 340, reserved=4)
    checkpoint(found / "base", network(vocab_size=tokenizer.vocab_size), tokenizer)
    rows = [
        {"instruction": f"what is {what}", "output": answer}
        for what, answer in list(ANSWERS.items()) * 30
    ]
    write_rows(found / "talks.jsonl", rows)
    prepare_chat([found / "talks.jsonl"], found / "data", tokenizer=tokenizer, held_out=0.1)
    return found


def test_the_loss_is_that_of_transformers_on_each_conversation_alone(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = TokenFolder.open(folder / "data")
    state = DataState(seed=0, epoch=0, samples=0, fingerprint="")
    loader = Loader(data.tokens("train"), 64, 4, state, mask_documents=True)
    batch, _ = next(iter(loader))
    inputs, targets = (torch.as_tensor(part).long() for part in (batch.inputs, batch.targets))
    documents = torch.as_tensor(batch.documents)
    counted = int((targets != -100).sum())
    assert 0 < counted < targets.numel()
    other = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    total = 0.0
    with torch.no_grad():
        for ids, wanted, numbers in zip(inputs, targets, documents, strict=True):
            for number in numbers.unique():
                mine = numbers == number
                logits = other(ids[mine][None]).logits[0]
                total += torch.nn.functional.cross_entropy(
                    logits, wanted[mine], ignore_index=-100, reduction="sum"
                ).item()
        ours = NextToken()(load(folder / "base").network, inputs, targets, documents).item()
    assert ours / counted == pytest.approx(total / counted, abs=1e-5)


@pytest.mark.long
def test_a_small_model_learns_to_answer(folder: Path) -> None:
    settings = {
        "--start.from": folder / "base",
        "--data.path": folder / "data",
        "--out": folder / "run",
        "--data.sequence-length": 64,
        "--train.steps": 120,
        "--train.batch-tokens": 512,
        "--train.compile": "off",
        "--optimizer.warmup-steps": 5,
        "--optimizer.learning-rate": 5e-3,
    }
    given = [str(part) for pair in settings.items() for part in pair]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(ROOT / "recipes/chat/sft.toml"), *given])
    assert not ended.value.code
    tuned = load(folder / "run")
    for what, answer in ANSWERS.items():
        asked = [{"role": "user", "content": f"what is {what}"}]
        assert tuned.chat(asked, max_new_tokens=20) == answer
