"""A run on pairs of answers: what it reports, what is kept beside the data, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.networks import checkpoint, network
from tests.rows import write_rows
from tests.train.runs import Listener, metrics, same

from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.conversations.prepare_preferences import prepare_preferences
from mobilellm.data.token_folder import TokenFolder
from mobilellm.derived import reference
from mobilellm.derived.parts import network_sha256
from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.recipe.recipe import Recipe
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.train.start import resume, train

LENGTH = 120
WORDS = ("an animal", "a tree", "a grass")


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A base model and pairs of answers."""
    text = "what is a fox an oak or rye an animal a tree a grass " * 20
    tokenizer = train_bpe([text], 340, reserved=4)
    checkpoint(tmp_path / "base", network(vocab_size=tokenizer.vocab_size), tokenizer)
    rows = [
        {"prompt": f"what is {i}", "chosen": WORDS[i % 3], "rejected": f"rye {WORDS[i % 2]}"}
        for i in range(60)
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    prepare_preferences(
        [tmp_path / "pairs.jsonl"],
        tmp_path / "pairs",
        tokenizer=tokenizer,
        sequence_length=LENGTH,
        held_out=0.2,
    )
    return tmp_path


def settings(places: Path, **changes: dict[str, Any]) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "start": {"from": str(places / "base")},
        "objective": {"name": "dpo", "beta": 0.1},
        "data": {
            "path": str(places / "pairs"),
            "sequence_length": LENGTH,
            "mask_documents": True,
        },
        "train": {
            "steps": 6,
            "batch_tokens": 4 * LENGTH,
            "micro_batch_size": 2,
            "evaluate_every": 3,
            "checkpoint_every": 3,
            "keep_checkpoints": 0,
            "compile": "off",
            "precision": "fp32",
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1, "weight_decay": 0.0},
    }
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return Recipe.from_dict(values)


def kept(places: Path) -> list[Path]:
    return [p for p in places.glob("pairs.reference-*") if p.is_dir()]


def test_blocks_that_are_shared_anew_are_compared_with_the_model_as_it_was(places: Path) -> None:
    override = {"override": {"layer_repeats": 2}}
    tables = []
    for name, model in (("twice", override), ("once", {})):
        train(places / name, settings(places, model=model, train={"steps": 1}))
        (folder,) = kept(places)  # one model, one table
        tables.append({file.name: file.read_bytes() for file in folder.iterdir()})
        if name == "twice":
            shutil.rmtree(folder)
    assert tables[0] == tables[1]
    once, twice = network(), network(layer_repeats=2)
    assert network_sha256(once) == network_sha256(network())
    assert network_sha256(once) != network_sha256(twice)


def test_a_run_begins_at_no_margin_learns_and_resumes_to_the_bit(places: Path) -> None:
    listener = Listener()
    run = train(places / "run", settings(places), listener).run
    rows = metrics(run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["reward_margin"] > 0.1
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert rows[-1]["held_out_reward_accuracy"] > 0.9
    assert rows[-1]["held_out_preference_loss"] < rows[2]["held_out_preference_loss"]
    (folder,) = kept(places)
    assert sum("log-probabilities of the reference" in line for line in listener.lines) == 1
    shutil.copytree(run, places / "again")
    shutil.rmtree(places / "again/checkpoints/step-00000006")
    resume(places / "again", listener)
    step = "checkpoints/step-00000006"
    assert same(places / "again" / step, run / step)
    assert sum("log-probabilities of the reference" in line for line in listener.lines) == 1
    assert kept(places) == [folder]


def test_beta_acts(places: Path) -> None:
    losses = []
    for beta in (0.1, 0.5):
        recipe = settings(places, objective={"beta": beta}, train={"steps": 2})
        losses.append(metrics(train(places / f"run-{beta}", recipe).run)[1]["loss"])
    assert losses[0] != losses[1]


def test_the_table_is_what_the_reference_says_of_each_answer_alone(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_ROWS", 2)
    train(places / "run", settings(places, train={"steps": 1}))
    data = TokenFolder.open(places / "pairs")
    model = load(places / "base").network
    tables = reference.Reference(reference.Folder.open(kept(places)[0]), data).tables
    grown = load(places / "run").network.config.vocab_size
    assert grown == model.config.vocab_size  # reserved rows took the template's tokens
    for split in ("train", "held_out"):
        stream, begin, row, place, seen = data.tokens(split), 0, 0, 0, 0
        for end in stream.ends().tolist():
            ids = torch.from_numpy(stream.read(begin, end - begin).astype("int64"))
            bits = torch.from_numpy(stream.trained(begin, end - begin))
            with torch.no_grad():
                scores = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            expected = scores[bits[1:]].sum().item()
            assert tables[split][row, place] == pytest.approx(expected, abs=1e-3)
            seen += 1
            begin, place = end, place + 1
            if end % (LENGTH + 1) == 0:
                assert not tables[split][row, place:].any()
                row, place = row + 1, 0
        assert row == len(tables[split])
        assert seen == len(stream.ends())


def test_a_computation_that_was_stopped_goes_on(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PART_ROWS", 2)
    train(places / "whole", settings(places, train={"steps": 1}))
    (folder,) = kept(places)
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(expected) > 4
    folder.rename(places / "aside")
    real, made = reference._log_probabilities, []

    def failing(*arguments: Any) -> Any:
        made.append(arguments[2:4])
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(reference, "_log_probabilities", failing)
    with pytest.raises(KeyboardInterrupt):
        train(places / "stopped", settings(places, train={"steps": 1}))
    assert not kept(places) or kept(places)[0].name.endswith(".making")
    train(places / "on", settings(places, train={"steps": 1}))
    assert made.count(made[0]) == 1
    assert len(made) == len(expected) - 1 + 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_what_is_damaged_or_of_something_else_is_refused(places: Path) -> None:
    train(places / "run", settings(places, train={"steps": 1}))
    (folder,) = kept(places)
    shutil.copytree(folder, places / "aside")
    file = folder / "train-00000.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    for damage, message in (
        (lambda: None, "its checksum differs"),
        (lambda: file.write_bytes(bytes(data[:-4])), "bytes where"),
        (file.unlink, "missing"),
        (lambda: (folder / "manifest.json").write_text(
            (places / "aside/manifest.json").read_text().replace("fp32", "bf16")), "edited"),
    ):  # fmt: skip
        damage()
        with pytest.raises(UserError, match=message):
            train(places / "other", settings(places))
    train(places / "bf16", settings(places, train={"steps": 1, "precision": "bf16"}))
    (other,) = (path for path in kept(places) if path != folder)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    with pytest.raises(UserError, match="made for precision bf16, not fp32"):
        train(places / "other", settings(places))
    assert not (places / "other").exists()


def test_data_and_settings_that_do_not_fit_are_one_line(places: Path) -> None:
    rows = [{"prompt": f"what is {i}", "completion": "a tree"} for i in range(60)]
    write_rows(places / "talks.jsonl", rows)
    tokenizer = load(places / "base").require_tokenizer()
    prepare_chat([places / "talks.jsonl"], places / "talks", tokenizer=tokenizer, held_out=0.2)
    for changes, message in (
        ({"data": {"path": str(places / "talks")}}, "holds no pairs of answers"),
        ({"data": {"sequence_length": LENGTH // 2}}, "packed into rows for 120"),
        ({"data": {"mask_documents": False}}, "would see the other one"),
        ({"start": {"from": ""}}, "starts from no model"),
        ({"distill": {"teacher": "start"}}, "goes with neither distill nor"),
        ({"optimizer": {"z_loss": 1e-4}}, "goes with neither"),
        ({"objective": {"name": "next_token"}}, "half of which are not to be learnt"),
        ({"objective": {"beta": 0.0}}, "objective.beta = 0.0: must be a number above 0"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train(places / "run", settings(places, **changes))
        assert "\n" not in str(caught.value)
        assert not (places / "run").exists()
    assert not kept(places)
