"""The card of a folder is read by the hub's own library, and says what its files say."""

import json
from pathlib import Path

import pytest
import torch
from tests.interop.networks import checkpoint, network

from mobilellm.cards.model_card import CardFacts, model_card
from mobilellm.cli import main
from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

RESULT = {
    "checkpoint": "checkpoints/step-00000020",
    "held_out": {"loss": 4.25, "perplexity": 70.1, "bits_per_byte": 2.4, "tokens": 9, "bytes": 9},
    "training": {"steps": 20, "tokens": 40960, "seconds": 3.5, "tokens_per_second": 11702.9},
    "data": {
        "sources": [{"name": "plays | *all*", "documents": 3, "tokens": 40000, "bytes": 110000}],
        "tokenizer": {"name": "byte-level BPE", "vocab_size": 320},
    },
}
SCORES = {"run": {
    "arc_easy": {"acc": 0.31, "acc_norm": 0.29, "acc_stderr": 0.01, "count": 2376, "split": "test"},
    "average": {"acc": 0.31, "count": 2376},
}}  # fmt: skip


def run_folder(folder: Path) -> Path:
    """A run with a checkpoint, figures and scores."""
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint(folder / "checkpoints/step-00000020", network(qk_norm=True))
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "scores.json").write_text(json.dumps(SCORES))
    return folder


def test_the_hub_reads_license_base_model_and_results(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run = run_folder(tmp_path / "run")
    names = {"license": "apache-2.0", "base_model": "some/base-135M"}
    convert(run, tmp_path / "out", "hf", **names)
    card = hub.ModelCard.load(tmp_path / "out/README.md")
    found = card.data
    assert (found.license, found.base_model) == ("apache-2.0", "some/base-135M")
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    assert "qwen3" in found.tags
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in found.eval_results}
    held_out = "held-out part of plays | *all*"
    assert results[held_out, "perplexity"] == 70.1
    assert results[held_out, "bits_per_byte"] == 2.4
    assert results["arc_easy", "acc"] == 0.31
    assert found.model_name == "run"
    for words in ("40,960", "plays \\| \\*all\\*", "31.00 % ± 1.00, 2,376 items", "11,702.9"):
        assert words in card.text, words
    parameters = sum(p.numel() for p in load(run).network.parameters())
    assert f"{parameters:,}" in card.text


def test_what_nobody_says_is_absent(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = checkpoint(tmp_path / "m", network(layer_repeats=2))
    for out, to, library in (("hf", "hf", "transformers"), ("own", "mobilellm", "mobilellm")):
        convert(folder, tmp_path / out, to)
        card = hub.ModelCard.load(tmp_path / out / "README.md")
        assert card.data.license is None
        assert card.data.base_model is None
        assert card.data.eval_results is None
        assert card.data.library_name == library
        assert "## Evaluation" not in card.text
        assert "## Training" not in card.text
    assert (folder / "README.md").is_file()  # a checkpoint has one, too


def test_the_base_model_is_the_one_that_the_source_names(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", network())
    where = folder / "config.json"
    values = json.loads(where.read_text()) | {"_name_or_path": "HuggingFaceTB/SmolLM2-135M"}
    where.write_text(json.dumps(values))
    convert(folder, tmp_path / "out", "hf")
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M"' in (tmp_path / "out/README.md").read_text()


def test_a_result_of_another_checkpoint_is_not_claimed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    early = checkpoint(run / "checkpoints/step-00000010", network())
    convert(early, tmp_path / "out", "hf")
    assert "70.1" not in (tmp_path / "out/README.md").read_text()


def test_names_of_others_are_text(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    config = network().config
    name = 'x"\n---\nlicense: mit\n# <script>alert(1)</script> \x1b[2J'
    sources = [{"name": name, "documents": 1, "tokens": 1, "bytes": 1}]
    run = {"held_out": {"loss": 1.0}, "data": {"sources": sources}, "training": {"steps": 1}}
    facts = CardFacts(name=name, run=run, scores={name: {"acc": 0.5, "split": name}})
    text = model_card(config, {"source": name, "came_from": {"run": name}}, facts)
    head, body = text.split("---\n")[1:3]
    found = yaml.safe_load(head)
    assert "license" not in found
    assert len(found["model-index"][0]["results"]) == 2
    for bad in ("<script>", "\x1b", "\nlicense", "\n# <", "\n---"):
        assert bad not in body


@pytest.mark.parametrize(
    ("flag", "value"), [("--license", "My Own!"), ("--base-model", "https://x/y/z")]
)
def test_names_that_the_hub_would_not_take_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    folder = checkpoint(tmp_path / "m", network())
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(folder), str(tmp_path / "out"), "--to", "hf", flag, value])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_license_is_in_a_gguf_too(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    convert(checkpoint(tmp_path / "m", network()), tmp_path / "m.gguf", "gguf", license="mit")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.license"].contents() == "mit"


def test_a_quantized_folder_keeps_the_makers_sampling(tmp_path: Path, sample_text: str) -> None:
    from mobilellm.workflows.quantize import quantize

    tokenizer = train_bpe([sample_text[:20_000]], 320)
    folder = checkpoint(tmp_path / "m", network(), tokenizer)
    where = folder / "generation_config.json"
    where.write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    quantize(folder, tmp_path / "q", scheme="int8", method="round")
    assert load(tmp_path / "q").generation == {"do_sample": True, "temperature": 0.6}
    assert (tmp_path / "q/README.md").is_file()


def test_broken_figures_beside_a_model_are_passed_over(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "result.json").write_text('{"held_out": ')
    (run / "scores.json").write_text(json.dumps({"run": {"t": {"acc": float("nan")}}}))
    convert(run, tmp_path / "out", "hf")
    assert "model-index" not in (tmp_path / "out/README.md").read_text()
    assert torch.is_tensor(load(tmp_path / "out").network.norm.weight)


def test_no_model_is_named_after_nothing() -> None:
    with pytest.raises(UserError, match="small letters"):
        convert(Path("a"), Path("b"), "hf", license="")
