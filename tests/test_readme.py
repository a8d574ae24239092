"""The README's commands, executed: in order, in a fresh folder, on a text of a few minutes' typing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mobilellm.cli.verbs import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_file_named_exists() -> None:
    for name in re.findall(r"(?:docs|recipes|src|benchmarks|configs)/[\w./-]+", README):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_the_verbs_are_those_of_the_command_line() -> None:
    named = set(re.findall(r"^\| `mobilellm ([\w-]+)`", README, flags=re.MULTILINE))
    assert named == set(VERBS)


@pytest.mark.long
def test_every_command_runs(tmp_path: Path, sample_text: str) -> None:
    (tmp_path / "book.txt").write_text(sample_text[:80_000])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "mobilellm").write_text(f'#!/bin/sh\nexec {sys.executable} -m mobilellm "$@"\n')
    (bin_folder / "mobilellm").chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    def shell(command: str) -> str:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    shell(
        "mobilellm quickstart --text book.txt --steps 10 --preset 1M --vocab-size 400"
    )  # what `make demo` leaves
    commands = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("mobilellm ")
    ]
    assert len(commands) >= 8
    for command in commands:
        # The same commands, for a moment instead of minutes.
        if " quickstart " in command:
            command += " --steps 10 --preset 1M"
        elif "train recipes" in command:
            command += " --train.steps 10 --model.preset 1M --optimizer.warmup-steps 2"
        shell(command)
    (script,) = blocks("python")
    (tmp_path / "script.py").write_text(script)
    assert "ROMEO" not in shell(f"{sys.executable} script.py").splitlines()[0]
