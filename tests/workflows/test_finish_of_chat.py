"""The report of a fine-tuning: before and after on held-out answers, and conversations beside each
other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.interop.networks import checkpoint, network
from tests.rows import write_rows

from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.data.token_folder import TokenFolder
from mobilellm.evaluate.held_out import held_out
from mobilellm.interop.load import load
from mobilellm.recipe.recipe import Recipe
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.train.start import train
from mobilellm.workflows.conversation_samples import conversation_samples
from mobilellm.workflows.finish import finish
from mobilellm.workflows.teacher_flops import teacher_flops


def test_before_and_after_and_conversations_are_in_the_report(tmp_path: Path) -> None:
    text = "what is a fox an oak or rye an animal a tree a grass " * 20
    tokenizer = train_bpe([text], 340, reserved=4)
    checkpoint(tmp_path / "base", network(vocab_size=tokenizer.vocab_size), tokenizer)
    rows = [{"instruction": f"what is {i}", "output": "an animal"} for i in range(90)]
    write_rows(tmp_path / "talks.jsonl", rows)
    prepare_chat([tmp_path / "talks.jsonl"], tmp_path / "data", tokenizer=tokenizer, held_out=0.1)
    recipe = Recipe.from_dict(
        {
            "start": {"from": str(tmp_path / "base")},
            "data": {
                "path": str(tmp_path / "data"),
                "sequence_length": 64,
                "mask_documents": True,
            },
            "train": {
                "steps": 40,
                "batch_tokens": 512,
                "compile": "off",
                "precision": "fp32",
                "evaluate_every": 0,
            },
            "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2},
        }
    )
    outcome = train(tmp_path / "run", recipe)
    result = finish(outcome)
    data = TokenFolder.open(tmp_path / "data")
    before = held_out(load(tmp_path / "base").network, data, sequence_length=64)
    assert result["held_out_before"]["bits_per_byte"] == pytest.approx(before.bits_per_byte)
    assert result["held_out"]["bits_per_byte"] < result["held_out_before"]["bits_per_byte"] / 4
    assert result["held_out"]["bytes"] == data.text_bytes("held_out")
    assert result["baselines"] == {}
    talks = result["conversations"]
    assert len(talks) == 4
    for talk in talks:
        assert talk["asked"].startswith("<|im_start|>user\nwhat is ")
        assert talk["asked"].endswith("<|im_start|>assistant\n")
        assert (talk["said"], talk["tuned"]) == ("an animal", "an animal")
        assert talk["base"] != "an animal"
    page = (tmp_path / "run/report.html").read_text()
    assert "Before and after" in page
    assert "Bits a byte on the held-out answers" in page
    assert "&lt;|im_start|&gt;user" in page
    assert "mobilellm chat" in page
    shutil.rmtree(tmp_path / "base")
    alone = conversation_samples(data, load(tmp_path / "run"), tmp_path / "base")
    assert [talk["tuned"] for talk in alone] == ["an animal"] * 4
    assert all("base" not in talk for talk in alone)


def test_what_a_teacher_took(tmp_path: Path) -> None:
    model = network(vocab_size=340)
    checkpoint(tmp_path / "base", model, train_bpe(["a fox " * 90], 340, reserved=4))
    size = sum(p.numel() for p in model.parameters())

    def of(**distill: str) -> dict[str, int]:
        return teacher_flops(Recipe.from_dict({"distill": distill}), 1000)

    assert of() == {}
    assert of(teacher=str(tmp_path / "base")) == {"teacher_flops": 2 * size * 1000}
    assert of(teacher=str(tmp_path / "gone")) == {}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"facts": {"teacher_parameters": 7, "tokens": 300}})
    )
    assert of(cache=str(tmp_path)) == {"teacher_flops": 2 * 7 * 300}
