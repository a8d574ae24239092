"""Files of a run cut, emptied or absent, as a loss of power leaves them."""

import json
import shutil
from pathlib import Path

import pytest
from tests.train.runs import Listener, StopAt, metrics, same

from mobilellm.errors import UserError
from mobilellm.files import plain_name, read_json, read_regular
from mobilellm.recipe.recipe import (
    CutRecipeError,
    DataSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    TrainSection,
)
from mobilellm.records import metrics_row
from mobilellm.report.run_files import RunFiles
from mobilellm.train import checkpoint
from mobilellm.train.run_folder import Metrics, mend_environment
from mobilellm.train.start import resume, train


@pytest.mark.parametrize("content", ["", '{"torch": "2', "[]", "null", None, '{"torch": "2"}'])
def test_a_torn_environment_is_written_anew(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "environment.json"
    if content is not None:
        path.write_text(content)
    said = mend_environment(tmp_path, {"torch": "3"})
    if content == '{"torch": "2"}':
        assert (said, json.loads(path.read_text())) == ("", {"torch": "2"})
        return
    assert "written anew" in said
    assert "\n" not in said
    assert json.loads(path.read_text())["torch"] == "3"
    aside = tmp_path / "environment.json.damaged"
    assert aside.read_text() == content if content is not None else not aside.exists()


ROWS = [{"step": i, "loss": 1.0, "tokens": i * 8} for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("damage", "steps", "kept"),
    [
        (lambda lines: [*lines[:3], lines[3][:9]], [1, 2, 3], False),
        (lambda lines: [*lines[:3], lines[3][:-1]], [1, 2, 3], False),  # without its line feed
        (lambda lines: [lines[0], lines[1][:9] + "\n", *lines[2:]], [1, 3], True),
        (lambda lines: [lines[0], "\0" * 20 + "\n", *lines[2:]], [1, 3], True),
        (lambda lines: [lines[0], '{"step": "2"}\n', *lines[2:]], [1, 3], True),
        (lambda lines: [], [], False),
    ],
)
def test_torn_metrics_lose_their_damaged_lines(
    tmp_path: Path, damage, steps: list[int], kept: bool
) -> None:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "metrics.jsonl").write_text("".join(damage(lines)))
    said = Metrics(tmp_path).rewind(3)
    assert [row["step"] for row in metrics(tmp_path)] == steps
    assert (tmp_path / "metrics.jsonl.damaged").exists() == kept == ("damaged lines" in said)


def test_a_report_is_made_of_what_is_whole(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"torch"')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    found = RunFiles.read(tmp_path)
    assert (len(found.rows), found.broken, found.environment) == (1, 1, {})
    assert len(found.damaged) == 1
    assert "environment.json" in found.damaged[0]


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b"null", b"{}", b'{"step": -1}', b'{"step": 1, "loss": "x"}']
)
def test_a_row_is_whole_or_none(line: bytes) -> None:
    assert metrics_row(line) is None
    assert metrics_row(b'{"step": 1, "loss": null}') == {"step": 1, "loss": None}


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "a/../b", "./a", "a//b", "a\\b", "a\0b", "a\nb", "x" * 256, 5, None],
)
def test_names_that_lead_elsewhere_are_none_of_ours(name: object) -> None:
    assert not plain_name(name)
    assert plain_name("train_state/shard-00001.safetensors")


def test_devices_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
        with pytest.raises(UserError, match=r"not a regular file|cannot be read"):
            read_regular(path, limit=10)
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    with pytest.raises(UserError, match="9 bytes, the limit is 8"):
        read_json(tmp_path / "x.json", limit=8)
    assert read_json(tmp_path / "x.json", limit=9) == [1, 2, 3]


STATE = {
    "format": checkpoint.FORMAT, "step": 2, "tokens": 9, "guard": [0.0] * 5, "skipped": 0,
    "averaged": 0, "tokenizer_sha256": "x",
    "data": {"seed": 0, "epoch": 0, "samples": 2, "fingerprint": "f", "tokens": 0, "sources": {}},
}  # fmt: skip


@pytest.mark.parametrize("key", ["step", "tokens", "data", "guard", "format"])
@pytest.mark.parametrize("value", ["2", [2], 2.5, -1, None, "absent", {}])
def test_an_altered_state_is_one_line(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "train_state").mkdir()
    path = tmp_path / "train_state" / "state.json"
    path.write_text(json.dumps(STATE))
    assert checkpoint.read_state(tmp_path).step == 2
    changed = {name: part for name, part in STATE.items() if name != key}
    if value != "absent":
        changed[key] = value
    path.write_text(json.dumps(changed))
    if (key, value) == ("guard", "absent"):  # the one that has a value of its own
        assert checkpoint.read_state(tmp_path).guard == (0.0,) * 5
        return
    with pytest.raises(UserError) as caught:
        checkpoint.read_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_checksums_name_files_of_the_checkpoint_alone(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000002"
    (folder / "train_state").mkdir(parents=True)
    for name in ("model.safetensors", "train_state/state.json"):
        (folder / name).write_text("x")
    entry = {
        "size": 1,
        "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
    }
    listed = dict.fromkeys(("model.safetensors", "train_state/state.json"), entry)
    for more, fits in (
        ({}, True),
        ({"../away": entry}, False),
        ({"/dev/zero": entry}, False),
        ({"model.safetensors": {"size": "1"}}, False),
        ({"model.safetensors": 1}, False),
    ):
        (folder / "checksums.json").write_text(json.dumps(listed | more))
        if fits:
            checkpoint.verify(folder)
        else:
            with pytest.raises(UserError):
                checkpoint.verify(folder)
    (folder / "checksums.json").write_text("{}")
    with pytest.raises(UserError, match="does not list the files"):
        checkpoint.verify(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stopped(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was stopped behind its second of four steps, with a checkpoint of each; and the
    last checkpoint of the same run to the end."""
    folder = tmp_path_factory.mktemp("torn")
    recipe = Recipe(
        model=ModelSection(preset="1M", override={"num_hidden_layers": 1}),
        data=DataSection(path=str(small_data), sequence_length=16),
        train=TrainSection(
            steps=4, batch_tokens=32, precision="fp32", compile="off", products="torch",
            evaluate_every=0, checkpoint_every=1,
        ),
        optimizer=OptimizerSection(warmup_steps=2),
    )  # fmt: skip
    whole = train(folder / "whole", recipe).checkpoint
    train(folder / "run", recipe, StopAt(2))
    assert len(checkpoint.complete(folder / "run")) == 2
    return folder / "run", whole


# The files of a run whose newest checkpoint is NEWEST; a README is for people.
NEWEST = "checkpoints/step-00000002"
RUN_FILES = (
    "recipe.toml", "environment.json", "metrics.jsonl", ".lock",
    *(
        f"{NEWEST}/{name}"
        for name in (
            "README.md", "checksums.json", "config.json", "generation_config.json",
            "mobilellm.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
            "tokenizer_config.json", "train_state/recipe.toml", "train_state/state.json",
            "train_state/shard-00001-model-00001-of-00001.safetensors",
        )
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_goes_on_to_the_bit_whichever_file_was_cut(
    stopped: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """A loss of power cuts any file of a run: empty, in its middle, or by its last byte."""
    run, whole = stopped
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {file for file in found if NEWEST in file or "/" not in file} == {*RUN_FILES}
    content = (run / name).read_bytes()
    for kept in (0, len(content) // 2, len(content) - 1):
        copy = tmp_path / str(kept)
        shutil.copytree(run, copy)
        (copy / name).write_bytes(content[:kept])
        listener = Listener()
        outcome = resume(copy, listener)
        assert same(outcome.checkpoint, whole), kept
        assert [row["step"] for row in metrics(copy)][-1] == 4
        assert all("\n" not in line for line in listener.lines)
        told = [line for line in listener.lines if Path(name).name in line]
        last_byte = kept == len(content) - 1
        silent = name in (".lock", "metrics.jsonl") or (last_byte and name.endswith(".json"))
        assert told or silent or (last_byte and name == "recipe.toml"), listener.lines
        if name == "recipe.toml" and not last_byte:
            assert (copy / "recipe.toml").read_bytes() == content
            assert (copy / "recipe.toml.damaged").read_bytes() == content[:kept]
        shutil.rmtree(copy)


def test_a_recipe_that_was_cut_is_not_taken_for_one_of_fewer_settings(
    stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    text = (stopped[0] / "recipe.toml").read_text()
    path = tmp_path / "recipe.toml"
    for cut in ("", text[:9], text[: text.index("[train]")], text[:-8], "\0" * 99):
        path.write_text(cut)
        with pytest.raises(CutRecipeError, match="cut short, or empty"):
            Recipe.read(path)
    path.write_text("[train]\nsteps = 5\n")  # by hand, without a last line that says anything
    assert Recipe.read(path).train.steps == 5
    shutil.copytree(stopped[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/recipe.toml").write_text(text[:-30])
    with pytest.raises(CutRecipeError, match="cut short, or empty"):
        resume(tmp_path / "run")
