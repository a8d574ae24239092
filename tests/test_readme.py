"""The commands of README and docs, executed: in order, in a fresh folder, on a short text.

A `bash` block runs as it stands, with less to do. Of an `sh` block, whose commands need a cluster,
a download or data, a stand-in looks at the arguments: flags are known, files exist, and scripts run
as far as the program that they would start.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mobilellm.cli.verbs import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "docs/data.md",
    "docs/models.md",
    "docs/training.md",
    "docs/chat.md",
    "docs/evaluation.md",
    "docs/commands.md",
    "docs/architecture.md",
    "docs/recipe.md",
]
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES)
ELSEWHERE = ("make ", "source .venv/bin/activate", "pip install")
"""Lines that other tests or the set-up hold to."""
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> started.txt
"""


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def lines(language: str) -> list[str]:
    text = "\n".join(blocks(language)).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip()]


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(
        r"(?:docs|recipes|src|benchmarks|configs|scripts|tests)/[\w./-]*\w", text
    ):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_verbs_are_those_of_the_command_line() -> None:
    named = set(re.findall(r"^\| `mobilellm ([\w-]+)`", README, flags=re.MULTILINE))
    assert named == set(VERBS)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 120


@pytest.fixture
def folder(tmp_path: Path, sample_text: str) -> Path:
    """Where a reader of the README would stand, with `mobilellm` and stand-ins in bin."""
    (tmp_path / "book.txt").write_text(sample_text[:80_000])
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    programs = dict.fromkeys(("python", "sbatch", "torchx"), STAND_IN)
    programs["mobilellm"] = f'#!/bin/sh\nexec {sys.executable} -m mobilellm "$@"\n'
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def shell(command: str, folder: Path) -> str:
    path = f"{folder}/bin:{os.environ['PATH']}"
    # One thread: on cores that other work has, a network this small waits for its threads alone.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    environment |= {"PATH": path, "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1800)  # some forty programs, each with its imports
def test_every_command_runs(folder: Path) -> None:
    # What `make demo` leaves.
    shell("mobilellm quickstart --text book.txt --steps 10 --preset 1M --vocab-size 400", folder)
    commands = [line for line in lines("bash") if not line.startswith(ELSEWHERE)]
    assert len(commands) >= 20
    for command in commands:
        # The same commands, for a moment instead of minutes.
        if " quickstart " in command:
            command += " --steps 10 --preset 1M"
        elif "train recipes" in command and "--help" not in command:
            command += " --train.steps 10 --model.preset 1M --optimizer.warmup-steps 2"
        elif "train --start" in command:
            command += " --train.steps 3 --train.batch-tokens 1024"
        shell(command, folder)
    (script,) = blocks("python", README)
    (folder / "script.py").write_text(script)
    assert "ROMEO" not in shell(f"{sys.executable} script.py", folder).splitlines()[0]


def test_commands_for_elsewhere_name_flags_files_and_scripts_that_are_there(folder: Path) -> None:
    commands = [line for line in lines("sh") if not line.startswith(ELSEWHERE)]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        for word in words:
            name = word.partition(":")[0]
            if name.startswith(("scripts/", "recipes/")):
                assert (folder / name).exists(), command
        if words[0] == "mobilellm":
            everything = "--help-all" if words[1] == "train" else "--help"
            known = shell(f"COLUMNS=200 mobilellm {words[1]} {everything}", folder)
            for word in words:
                if word.startswith("--"):
                    assert re.search(rf"{word.split('=')[0]}\b", known), f"{word}: {command}"
        else:
            shell(command, folder)
    started = (folder / "started.txt").read_text()
    for program in ("python", "sbatch", "torchx"):
        assert f"{program} " in started
    assert "python -m torch.distributed.run" in started
    assert "recipes/paper/125M.toml" in started
    shell("bash -n scripts/train.sbatch", folder)
