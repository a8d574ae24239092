"""What stands around the code is true: hosted checks, hooks, changelog, contributing, the wheel."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.test_core_imports import PROJECT

from mobilellm.recipe.earlier_keys import OLD_KEYS
from mobilellm.version import __version__

yaml = pytest.importorskip("yaml")  # transformers brings it

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
CI = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())


def commands(job: str) -> list[str]:
    return [step["run"] for step in CI["jobs"][job]["steps"] if "run" in step]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))


def test_every_python_that_is_declared_is_tested() -> None:
    declared = [
        line.rsplit(" ", 1)[1]
        for line in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    assert CI["jobs"]["test"]["strategy"]["matrix"]["python"] == declared
    assert PROJECT["requires-python"] == f">={declared[0]},<3.{int(declared[-1][2:]) + 1}"


@pytest.mark.parametrize("job", ["lint", "test", "core-imports"])
def test_hosted_checks_go_through_make(job: str) -> None:
    found = [c.split()[1] for c in commands(job) if c.startswith("make ")]
    assert found
    assert set(found) <= targets()


def test_hosted_tests_leave_out_what_needs_data_beside_the_checkout() -> None:
    """The host sets CI=true, and then a test without its data fails instead of skipping."""
    (command,) = commands("test")
    assert shlex.split(command)[-1] == 'PYTEST=-m "not long and not shared"'
    assert re.search(r"-m pytest .*\$\(PYTEST\)", MAKEFILE)


def test_hooks_run_what_make_lint_runs_and_fetch_nothing() -> None:
    lint = MAKEFILE.split("\nlint:")[1].split("\n\n")[0]
    (local,) = HOOKS["repos"]
    assert local["repo"] == "local"
    entries = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    assert all(hook["language"] == "system" for hook in local["hooks"])
    for tool in ("ruff check", "ruff format", "mypy"):
        assert f"$(BIN)/{tool}" in lint
        assert any(f".venv/bin/{tool}" in entry for entry in entries.values()), tool


def test_the_changelog_has_this_version_and_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = text.split("\n## ")[1]
    assert newest.startswith(__version__)
    for (section, old), new in OLD_KEYS.items():
        assert f"| `{section}.{old}` | `{section}.{new}` |" in newest


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"])
def test_files_and_targets_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, flags=re.MULTILINE):
        assert "".join(target) in targets(), target
    for path in re.findall(r"(?:docs|scripts|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path


def test_the_wheel_holds_what_is_not_python(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"mobilellm-{__version__}-")
    for name in (
        "py.typed",
        "configs/125M/config.json",
        "recipes/laptop.toml",
        "export/npm_packages.json",
    ):
        assert f"mobilellm/{name}" in held
    for folder in ("export/templates", "report/templates", "sample"):
        inside = {p.name for p in (ROOT / "src/mobilellm" / folder).iterdir() if p.is_file()}
        assert inside
        assert {f"mobilellm/{folder}/{name}" for name in inside} <= held
