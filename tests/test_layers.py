"""The order in which rooms may know each other, circles, and sizes; read off the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import mobilellm

PACKAGE = Path(mobilellm.__file__).parent
GROUND = {
    "version",
    "divisors",
    "intervals",
    "errors",
    "damage",
    "printable",
    "schema",
    "files",
    "budget",
    "records",
}
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "divisors": set(),
    "intervals": set(),
    "damage": set(),
    "printable": set(),
    "schema": set(),
    "files": set(),
    "budget": set(),
    "records": set(),
    "hardware": set(),
    "kernels": {"hardware"},
    "jobs": set(),
    "report": set(),
    "patterns": set(),
    "tokenizer": {"patterns", "jobs"},
    "model": {"hardware", "kernels"},
    "data": {"tokenizer", "jobs"},
    "streams": set(),
    "readers": {"data", "streams"},
    "prepare": {"data", "tokenizer", "jobs", "readers", "streams"},
    "clean": {"prepare", "readers", "streams"},
    "conversations": {"data", "prepare", "readers", "streams", "tokenizer"},
    "quantize": {"model"},
    "decoding": {"hardware", "model", "quantize"},
    "weights": {"model"},
    "gguf": {"model", "tokenizer"},
    "families": {"model", "quantize"},
    "cards": {"model"},
    "interop": {
        "decoding",
        "weights",
        "model",
        "tokenizer",
        "quantize",
        "gguf",
        "families",
        "cards",
    },
    "export": {"interop", "quantize", "model", "tokenizer", "gguf"},
    "runtimes": {
        "decoding",
        "hardware",
        "interop",
        "export",
        "model",
        "quantize",
        "tokenizer",
    },
    "calls": {"conversations", "model", "runtimes", "tokenizer"},
    "chat": {"calls", "model", "runtimes", "tokenizer"},
    "evaluate": {"model", "tokenizer", "data", "streams"},
    "tasks": {"model", "tokenizer", "data", "evaluate", "runtimes", "streams"},
    "objectives": {"model"},
    "derived": {"model", "tokenizer", "data", "evaluate", "objectives"},
    "plan": {"model", "hardware"},
    "recipe": {"plan"},
    "distributed": {"hardware", "model", "recipe", "kernels"},
    "optimizers": {"kernels", "model", "plan", "recipe", "distributed"},
    "tracking": {"recipe"},
    "train": {
        "model",
        "kernels",
        "tokenizer",
        "data",
        "hardware",
        "quantize",
        "interop",
        "weights",
        "evaluate",
        "tasks",
        "plan",
        "recipe",
        "distributed",
        "derived",
        "objectives",
        "optimizers",
        "tracking",
    },
}
BELOW = set(MAY_IMPORT)
MAY_IMPORT |= {
    "profiling": BELOW,
    "workflows": BELOW | {"profiling"},
    "lab": BELOW | {"profiling", "workflows"},
    "terminal": BELOW | {"profiling", "workflows", "lab"},
    "cli": BELOW | {"profiling", "workflows", "lab", "terminal"},
}
# What the command line's help must not load.
NOT_AT_THE_TOP = {"torch", "transformers", "tokenizers", "rich", "numpy", "safetensors"}
MAX_FILE_LINES = 500
MAX_ROOM_LINES = 2500


def module_name(path: Path) -> str:
    """mobilellm.train.loop for train/loop.py, mobilellm.report for report/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["mobilellm", *(part for part in parts if part != "__init__")])


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(path: Path, top_level: bool = False) -> Iterator[str]:
    """What a file imports, inside functions and under TYPE_CHECKING too unless `top_level`.

    `from a.b import c` is a.b.c where that is a module of ours, else a.b.
    """
    tree = ast.parse(path.read_text())
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def import_graph() -> dict[str, set[str]]:
    """Module of ours -> the modules of ours that it imports anywhere in its text."""
    return {
        name: {other for other in imported_names(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other: Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def line_counts() -> dict[Path, int]:
    return {path: len(path.read_text().splitlines()) for path in MODULES.values()}


def test_rooms_import_only_what_they_may() -> None:
    for path in MODULES.values():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for name in imported_names(path):
            if name == "mobilellm" or name.startswith("mobilellm."):
                other = (name + ".").split(".")[1]
                assert other in MAY_IMPORT[room] | GROUND | {room}, (
                    f"{path.relative_to(PACKAGE)} imports {name}"
                )


def test_every_room_has_its_line_in_the_table() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES.values()}
    assert rooms - {"__init__", "__main__"} <= set(MAY_IMPORT)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """An import inside a function, or one for annotations alone, closes a circle too."""
    assert circles(import_graph()) == []


def test_circles_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == [["b", "c"]]
    assert circles(graph | {"c": {"d"}}) == []


def test_no_file_is_too_long() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p, n in line_counts().items() if n > MAX_FILE_LINES}
    assert not long


def test_no_room_is_too_large() -> None:
    rooms: dict[str, int] = {}
    for path, lines in line_counts().items():
        room = path.relative_to(PACKAGE).parts[0]
        rooms[room] = rooms.get(room, 0) + lines
    assert not {room: lines for room, lines in rooms.items() if lines > MAX_ROOM_LINES}


def test_the_command_line_loads_nothing_heavy_at_its_top() -> None:
    for path in [
        *(PACKAGE / "cli").glob("*.py"),
        PACKAGE / "recipe/recipe.py",
        PACKAGE / "train/__init__.py",
        PACKAGE / "__init__.py",
    ]:
        heavy = {name.split(".")[0] for name in imported_names(path, top_level=True)}
        assert not heavy & NOT_AT_THE_TOP, f"{path.relative_to(PACKAGE)} imports {heavy}"


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not [p for p in MODULES.values() if p.stem in ("utils", "helpers", "common", "misc")]
