"""The order in which the stages may know each other, read off the source."""

import ast
from pathlib import Path

import mobilellm

PACKAGE = Path(mobilellm.__file__).parent
GROUND = {"divisors", "errors", "files"}
MAY_IMPORT = {
    "errors": set(),
    "divisors": set(),
    "files": set(),
    "hardware": set(),
    "jobs": set(),
    "report": set(),
    "tokenizer": {"jobs"},
    "model": {"hardware"},
    "data": {"tokenizer", "jobs"},
    "prepare": {"data", "tokenizer", "jobs"},
    "quantize": {"model"},
    "interop": {"model", "tokenizer", "quantize"},
    "export": {"interop", "quantize", "model", "tokenizer"},
    "runtimes": {"interop", "export", "model", "tokenizer"},
    "evaluate": {"model", "tokenizer", "data", "runtimes"},
    "plan": {"model", "hardware"},
    "train": {"model", "tokenizer", "data", "hardware", "quantize", "interop", "evaluate", "plan"},
}
BELOW = set(MAY_IMPORT)
MAY_IMPORT |= {
    "workflows": BELOW,
    "lab": BELOW | {"workflows"},
    "cli": BELOW | {"workflows", "lab"},
}
NOT_AT_THE_TOP = {
    "torch",
    "transformers",
    "tokenizers",
    "rich",
    "tyro",
    "numpy",
    "safetensors",
}  # of what help must load


def imports(path: Path, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    if top_level:
        nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    else:
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {
        name
        for node in nodes
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }


def test_stages_import_only_what_stands_before_them() -> None:
    for path in PACKAGE.rglob("*.py"):
        stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if stage in ("__init__", "__main__"):
            continue
        for name in imports(path, top_level=False):
            if name.startswith("mobilellm."):
                other = name.split(".")[1]
                assert other in MAY_IMPORT[stage] | GROUND | {stage}, (
                    f"{path.relative_to(PACKAGE)} imports {name}"
                )


def test_the_command_line_loads_nothing_heavy_at_its_top() -> None:
    for path in [
        *(PACKAGE / "cli").glob("*.py"),
        PACKAGE / "train/recipe.py",
        PACKAGE / "train/__init__.py",
        PACKAGE / "__init__.py",
    ]:
        heavy = {name.split(".")[0] for name in imports(path, top_level=True)} & (
            NOT_AT_THE_TOP - {"tyro"}
        )
        assert not heavy, f"{path.relative_to(PACKAGE)} imports {heavy}"


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not [
        p for p in PACKAGE.rglob("*.py") if p.stem in ("utils", "helpers", "common", "misc")
    ]
