"""A lab's file: a base recipe, what varies, what is held equal, and the table beside it.

    lab = read_lab("table11")                       # a shipped one, or the path of a file
    lab.cell_settings()                             # [("4", {"num_hidden_layers": 4}), ...]

    title = "Depth against width"
    equal = "parameters"
    [recipe.model]
    preset = "5M"
    [shape]
    head_dim = 32
    ffn_multiple = 8
    ffn = "fit"
    [axes]
    num_hidden_layers = [4, 8, 12]

A key without a dot is one of the model's (config.json), one with a dot is SECTION.KEY of the
recipe.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mobilellm.errors import UserError, unknown_name
from mobilellm.lab.shapes import ShapeRule
from mobilellm.model.config import ModelConfig
from mobilellm.quantize.schemes import SCHEMES
from mobilellm.recipe.recipe import Recipe
from mobilellm.recipe.settings import build, check_ranges, key_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Equal = Literal["", "parameters", "flops", "time", "latency"]
BITS = "held_out.bits_per_byte"
MAX_CELLS = 1000
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CellEntry:
    """A row of the table that is written out."""

    name: str
    set_: dict[str, Any] = field(default_factory=dict)
    """Its settings, over those of the base recipe."""


@dataclass(frozen=True, kw_only=True)
class MetricEntry:
    """A column of the table."""

    key: str
    """A path in a run's result.json, such as held_out.bits_per_byte or training.tokens_per_second,
    or last/NAME for a figure of its last evaluation."""
    name: str = ""
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A column of a paper, beside the table."""

    source: str
    column: str
    better: Literal["lower", "higher"] = "higher"
    values: dict[str, float] = field(default_factory=dict)
    """Name of a cell -> what the paper has."""


@dataclass(frozen=True, kw_only=True)
class LabFile:
    """What a lab is to do."""

    title: str
    about: str = ""
    base: str = ""
    """A recipe's file, beside the lab's; its settings, but for train.steps, lie under those of
    `recipe`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Sections of a recipe."""
    requires: tuple[str, ...] = ()
    """Settings that whoever runs it must give."""
    equal: Equal = ""
    """What all cells have alike: parameters or latency by their shape, flops or time by their
    steps. Empty: the cells are as they are written."""
    profile: str = ""
    """With latency: a device profile, by which it is predicted."""
    free: Literal["hidden_size", "num_hidden_layers"] = "hidden_size"
    """What the shape is solved for, where it is."""
    shape: ShapeRule | None = None
    """How heads and feed-forward follow the width; None leaves the shapes as written."""
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key -> the values that it takes; every combination is a cell."""
    cells: tuple[CellEntry, ...] = ()
    """Rows that are written out, each with every combination of the axes."""
    compare: str = ""
    """The cell that the others are compared with; the first one when empty."""
    optimum: str = ""
    """The last of the axes, of three or more numbers: for each row, where the first metric is best
    along it, by a parabola over its logarithm."""
    quantized: tuple[str, ...] = ()
    """Schemes by which each finished run is rounded and scored anew; their figures are metrics:
    quantized.w8a8.bits_per_byte, quantized.w8a8.added_bits_per_byte."""
    metrics: tuple[MetricEntry, ...] = (MetricEntry(key=BITS, name="bits a byte"),)
    """The columns; the first is the one that ranks."""
    published: Published | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Rows of the published table that are not among the cells -> why."""

    def check(self, where: str) -> None:
        """`UserError` for what no data and no machine could make right."""
        if not self.axes and not self.cells:
            raise UserError(f"{where}: no cells", hint="give [axes] or [[cells]]")
        keys = [*self.axes, *(key for cell in self.cells for key in cell.set_)]
        for key in [*keys, *self.requires]:
            check_key(key, where)
        empty = [key for key, values in self.axes.items() if not values]
        if empty:
            raise UserError(f"{where}: axes.{empty[0]} has no values")
        for key in ("train.seed", "data.path"):
            if key in keys:
                raise UserError(
                    f"{where}: {key} is the same in every cell",
                    hint="give --seeds" if key == "train.seed" else "give --data",
                )
        if self.optimum:
            self._check_optimum(where)
        unknown = next((name for name in self.quantized if name not in SCHEMES), None)
        if unknown is not None:
            raise unknown_name("scheme", unknown, SCHEMES, f"{where}: quantized")
        if self.shape is not None:
            check_ranges(self.shape, "shape.")
        if self.equal in ("parameters", "latency"):
            self._check_solvable(where, keys)
        if self.profile and self.equal != "latency":
            raise UserError(
                f'{where}: a device profile is for equal = "latency"', hint="leave profile out"
            )
        if self.equal in ("flops", "time") and "train.steps" in keys:
            raise UserError(
                f'{where}: train.steps varies, and equal = "{self.equal}" is held by it',
                hint="leave one of them out",
            )
        names = [name for name, _ in self.cell_settings()]
        if len(names) > MAX_CELLS:
            raise UserError(f"{where}: {len(names)} cells (at most {MAX_CELLS})")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: two cells are called {twice!r}")
        if self.compare and self.compare not in names:
            raise unknown_name("cell", self.compare, names, f"{where}: compare")
        if not self.metrics:
            raise UserError(f"{where}: no metrics", hint="leave metrics out for bits a byte")
        if self.published is not None:
            unknown = next((n for n in self.published.values if n not in names), None)
            if unknown is not None:
                raise unknown_name("cell", unknown, names, f"{where}: published.values")

    def _check_optimum(self, where: str) -> None:
        """`UserError` unless the last axis can be the optimum's."""
        axis = next(reversed(self.axes), "")
        values = [v for v in self.axes.get(axis, ()) if isinstance(v, (int, float)) and v > 0]
        if axis != self.optimum or len(values) < 3 or len(values) < len(self.axes[axis]):
            what = f"{where}: optimum = {self.optimum!r} must be the last of the axes"
            raise UserError(f"{what}, with three or more numbers above 0")

    def _check_solvable(self, where: str, keys: list[str]) -> None:
        """`UserError` where an axis takes what the shape is solved by."""
        if self.shape is None:
            raise UserError(
                f'{where}: equal = "{self.equal}" is held by the shape, and there is no [shape]',
                hint="add [shape] with head_dim, ffn_multiple and ffn",
            )
        ruled = {"intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
        taken = sorted((ruled | {self.free}) & set(keys))
        if taken:
            raise UserError(
                f"{where}: {taken[0]} cannot vary and hold {self.equal} equal: the shape is solved "
                "by it",
                hint='vary another key, choose free = "num_hidden_layers", or leave out equal',
            )

    @property
    def base_name(self) -> str:
        """The cell that the others are compared with."""
        return self.compare or self.cell_settings()[0][0]

    def cell_settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Every cell with its settings over the base recipe's, in the order of the table."""
        rows = self.cells or (CellEntry(name=""),)
        found = []
        for row in rows:
            for values in itertools.product(*self.axes.values()):
                name = "/".join([*([row.name] if row.name else []), *map(str, values)])
                found.append((name, row.set_ | dict(zip(self.axes, values, strict=True))))
        return found

    def gives(self, key: str) -> bool:
        """Whether the file or who runs it gives this setting of the recipe, in any cell."""
        section, _, name = key.partition(".")
        varied = [*self.axes, *(k for cell in self.cells for k in cell.set_)]
        return name in self.recipe.get(section, {}) or key in varied

    def content(self) -> dict[str, Any]:
        """Everything of it that decides what is trained and compared: two files with equal content
        are one lab."""
        values = dataclasses.asdict(self)
        for key in ("title", "about", "published", "left_out", "metrics", "profile", "optimum"):
            del values[key]
        if not self.quantized:  # so that a lab of an earlier version goes on
            del values["quantized"]
        return values


def model_keys() -> set[str]:
    """Keys of the model that a cell may set; the vocabulary and its tokens are the data's."""
    names = {each.name for each in dataclasses.fields(ModelConfig)}
    return names - {"vocab_size", "bos_token_id", "eos_token_id"}


def recipe_keys() -> set[str]:
    """SECTION.KEY of every setting of a recipe."""
    return {
        f"{name}.{key_of(each.name)}"
        for name, section in Recipe().sections()
        for each in dataclasses.fields(section)
    }


def check_key(key: str, where: str) -> None:
    """`UserError` for a key that neither the model nor the recipe has, with the nearest."""
    if key.partition("[")[0] not in (known := model_keys() | recipe_keys()):
        raise unknown_name("key", key, known, where)


def labs_folder() -> Path:
    """Where the shipped labs lie: in the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "labs" if (package / "labs").is_dir() else package.parent.parent / "labs"


def shipped() -> list[str]:
    """Names of the shipped labs, table by table."""
    names = [path.stem for path in labs_folder().glob("*.toml")]
    return sorted(names, key=lambda name: ([*map(int, re.findall(r"\d+", name)), 1 << 30], name))


def lab_path(name: str) -> Path:
    """The file of a lab: a path, or the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped():
        return labs_folder() / f"{name}.toml"
    if path.suffix or "/" in name:
        raise UserError(f"{path}: no such lab", hint=f"shipped: {', '.join(shipped())}")
    raise unknown_name("lab", name, shipped())


def read_lab(name: str, given: Settings | None = None) -> LabFile:
    """Read and check a lab's file; `given` are settings over those of its recipe.

    `UserError`, one line, for broken TOML, unknown keys (with the nearest), cells that cannot be
    held equal, and settings that it requires and nobody gave.
    """
    path = lab_path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken TOML ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if "title" not in values:
        raise UserError(f"{path}: no title", hint='add title = "..."')
    found = build(LabFile, values, str(path))
    assert isinstance(found, LabFile)
    recipe = merged(_base(found, path), found.recipe)
    for key, value in (given or {}).items():
        check_key(key, "--set")
        recipe = merged(recipe, nested(key, value))
    if found.profile and not Path(found.profile).is_absolute():
        found = dataclasses.replace(found, profile=str(path.parent / found.profile))
    found = dataclasses.replace(found, recipe=recipe, base="")
    found.check(str(path))
    Recipe.from_dict(recipe, str(path)).check()
    for key in found.requires:
        section, _, name = key.partition(".")
        if not recipe.get(section, {}).get(name):
            raise UserError(f"{path}: needs {key}", hint=f"add --set {key}=VALUE")
    return found


def _base(lab: LabFile, path: Path) -> dict[str, Any]:
    """The settings that the lab's base recipe names, but for its steps: those are the lab's own, or
    as many as the budget has room for."""
    if not lab.base:
        return {}
    base = path.parent / lab.base
    Recipe.read(base)  # complains of what is wrong with it
    values = tomllib.loads(base.read_text(encoding="utf-8"))
    values.get("train", {}).pop("steps", None)
    return values


def nested(key: str, value: Any) -> dict[str, Any]:
    """A setting as a recipe's sections have it; one of the model stands among its overrides."""
    section, dot, name = key.partition(".")
    return {section: {name: value}} if dot else {"model": {"override": {key: value}}}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables; what both have is the second's, tables within are merged alike."""
    found = dict(first)
    for key, value in second.items():
        old = found.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        found[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return found
