"""Help, completion, and notes on settings that have another name now."""

import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.command_line import call

from mobilellm import cli
from mobilellm.cli.train import Train
from mobilellm.cli.verbs import VERBS
from mobilellm.recipe.earlier_keys import OLD_KEYS, OVERRIDES_BEFORE
from mobilellm.recipe.recipe import OptimizerSection, Recipe
from mobilellm.terminal.field_docs import field_docs, type_name
from mobilellm.terminal.notes import renamed_flags

SCREEN = (24, 80)  # lines and columns of the smallest terminal anyone has


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(SCREEN[1]))


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_the_list_of_verbs_is_a_line_each_and_fits_a_screen(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int
) -> None:
    lines = call(capsys, *arguments, status=status)[0].splitlines()
    assert len(lines) < SCREEN[0]
    assert max(map(len, lines)) <= 83
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS)


def test_the_list_of_verbs_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = call(capsys, "--help")[0]
    monkeypatch.setenv("COLUMNS", "60")
    narrow = call(capsys, "--help")[0]
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == wide.split()


def test_a_verb_is_a_file_and_a_file_is_a_verb() -> None:
    for name, verb in VERBS.items():
        assert verb.home.split(":")[0] == name.replace("-", "_")
        assert verb.load().run
    folder = Path(cli.__file__).parent
    with_run = {p.stem for p in folder.glob("*.py") if "    def run(self)" in p.read_text()}
    assert with_run == {name.replace("-", "_") for name in VERBS}


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = call(capsys, "trian", status=2)
    assert err == "mobilellm: unknown verb 'trian'; did you mean 'train'?\n"


def test_trains_help_has_ten_settings_and_says_how_to_see_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "r.toml").write_text("[train]\nsteps = 4321\n")
    out, _ = call(capsys, "train", str(tmp_path / "r.toml"), "--help")
    settings = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert len([name for name in settings if "." in name]) == 10
    assert "default: 4321" in out  # the recipe's value is what a flag would override
    assert "mobilellm train --help-all" in out
    assert len(out) < 5000
    everything, _ = call(capsys, "train", "--help-all")
    for section, values in Recipe().to_dict().items():
        for key in values:
            if key != "stages":  # a list of tables: in the recipe alone
                assert f"--{section}.{key.replace('_', '-')}" in everything, (section, key)


def test_helps_lines_break_where_the_terminal_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """A docstring's own line breaks, some columns further right, would leave single words."""
    out, _ = call(capsys, "train", "--help-all")
    text = " ".join(line.strip("│ ") for line in out.splitlines())
    for section in ("optimizer", "train"):
        cls = type(getattr(Recipe(), section))
        for name, doc in field_docs(cls).items():
            assert " ".join(text.split()).count(doc) >= 1, name
    start = out.index("--train.spike-threshold")
    lines = [line.strip("│ ") for line in out[start:].splitlines()[1:3]]
    assert all(len(line) > 55 for line in lines), lines


def test_field_docs_and_types() -> None:
    assert field_docs(OptimizerSection)["momentum"] == "Muon's momentum."
    assert set(field_docs(Train)) >= {"recipe", "out", "resume", "json"}
    hints = typing.get_type_hints(OptimizerSection)
    assert type_name(hints["betas"]) == "2 x number"
    assert type_name(hints["name"]) == "adamw or muon or normuon"


@pytest.mark.parametrize(("key", "new"), OLD_KEYS.items())
def test_an_old_flag_is_read_and_its_new_name_said(
    capsys: pytest.CaptureFixture[str], key: tuple[str, str], new: str
) -> None:
    section, old = key
    given = f"--{section}.{old.replace('_', '-')}"
    wanted = f"--{section}.{new.replace('_', '-')}"
    assert renamed_flags([given, "3"], silent=False) == [wanted, "3"]
    assert capsys.readouterr().err == f"mobilellm: note: {given} is called {wanted} now\n"
    assert renamed_flags([f"--{section}.{old}=3"], silent=True) == [f"{wanted}=3"]
    assert capsys.readouterr().err == ""


def test_old_overrides_become_entries_of_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["r.toml", "--model.layer-repeats", "2", "--out", "x", "--model.shared_kv=own"]
    found = renamed_flags(given, silent=True)
    assert found == ["r.toml", "--out", "x", "--model.override", "layer_repeats=2", "shared_kv=own"]
    mixed = ["--model.override", "rope_theta=5e5", "--model.qk-norm", "true"]
    assert renamed_flags(mixed, silent=True) == [
        "--model.override",
        "qk_norm=true",
        "rope_theta=5e5",
    ]
    assert capsys.readouterr().err == ""
    assert "qk_norm" in OVERRIDES_BEFORE


def old_recipe(folder: Path) -> Path:
    path = folder / "old.toml"
    path.write_text("[optimizer]\nclip = 0.5\nkind = 'adamw'\n")
    return path


def lines_of(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if "is called" in line)


def test_an_old_key_is_one_plain_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = old_recipe(tmp_path)
    arguments = ("train", str(path), "--out", str(tmp_path / "r"))
    out, err = call(capsys, *arguments, status=2)  # it names no data
    assert out == ""
    assert sorted(lines_of(err)) == [
        f"mobilellm: note: {path}: optimizer.clip is called optimizer.max_grad_norm now",
        f"mobilellm: note: {path}: optimizer.kind is called optimizer.name now",
    ]
    assert len(err.splitlines()) == 3
    assert "Warning" not in err


def test_json_output_has_no_notes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("train", str(old_recipe(tmp_path)), "--out", str(tmp_path / "r"), "--json")
    _, err = call(capsys, *arguments, "--optimizer.momentum", "0.9", status=2)
    assert not list(lines_of(err))
    assert len(err.splitlines()) == 1


def test_only_the_first_process_notes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    _, err = call(capsys, "train", str(old_recipe(tmp_path)), "--help")
    assert not list(lines_of(err))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["mobilellm", ""], set(VERBS)),
        (["mobilellm", "qu"], {"quantize", "quickstart"}),
        (["mobilellm", "prepare", "--val"], {"--validate"}),
        (["mobilellm", "train", "--optimizer.max"], {"--optimizer.max-grad-norm"}),
        (["mobilellm", "convert", "--to", "g"], {"gguf"}),
    ],
)
def test_bash_completes_verbs_flags_and_choices(
    tmp_path: Path, typed: list[str], offered: set[str]
) -> None:
    script = tmp_path / "mobilellm"
    command = [sys.executable, "-m", "mobilellm", "--tyro-write-completion", "bash", str(script)]
    subprocess.run(command, check=True, capture_output=True)
    words = " ".join(f"'{word}'" for word in typed)
    shell = (
        f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; COMPREPLY=();"
        '_tyro_mobilellm; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()) - {"--help", "-h"} == offered, done.stderr
