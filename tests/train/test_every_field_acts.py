"""Every field of a recipe acts: two values of it give two traces.

Each field has an entry below: what the two runs differ in, and the parts of their traces that must
differ. A field without an entry fails, so that no setting is read and then forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.golden.cases import BASE, make_data

from mobilellm.data.token_folder import TokenFolder
from mobilellm.distributed.parallel import Parallel
from mobilellm.errors import UserError
from mobilellm.kernels import flash, products
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.recipe.recipe import Recipe
from mobilellm.recipe.settings import key_of
from mobilellm.tasks import task_scores
from mobilellm.tracking import trackers
from mobilellm.train import checkpoint
from mobilellm.train.rows import Recorder
from mobilellm.train.start import train

Settings = dict[str, dict[str, Any]]


class Acts(NamedTuple):
    """Two settings, and the parts of the trace in which they differ."""

    parts: str
    """Names of parts, separated by spaces."""
    first: Settings
    second: Settings


def of(parts: str, field: str, first: Any, second: Any, **context: dict[str, Any]) -> Acts:
    """Runs in which one field, section.key, has one value and another; `context` holds in both."""
    section, key = field.split(".")

    def having(value: Any) -> Settings:
        return context | {section: context.get(section, {}) | {key: value}}

    return Acts(parts, having(first), having(second))


MUON = {"name": "muon"}
WSD = {"schedule": "wsd", "warmup_steps": 1, "final_lr_fraction": 0.0}
EACH = {"checkpoint_every": 1}
STILL = {"learning_rate": 1e-6}  # the loss then goes up and down with the batches alone
TASKS = {"tasks": ["piqa"], "every": 2}
FROM_SEED = {"model": {"preset": "", "override": {}}}
# {run} is a run of the base settings, {data} its data, {other} data of another text, {rows} rows of
# token ids as the original has them, {own} and {foreign} the tokenizers of the two data.
LAYOUT = {"path": "{rows}", "sequence_length": 64}

ENTRIES: dict[str, Acts] = {
    "model.preset": of("losses", "model.preset", "1M", "5M"),
    "model.override": of(
        "losses", "model.override", {"num_hidden_layers": 2}, {"num_hidden_layers": 1}
    ),
    "model.initial_residual": of("losses", "model.initial_residual", "normal", "zero"),
    "start.from": Acts("losses", FROM_SEED, FROM_SEED | {"start": {"from": "{run}"}}),
    "data.path": of("losses", "data.path", "{data}", "{other}"),
    "data.tokenizer": of("losses", "data.tokenizer", "{own}", "{foreign}", data=LAYOUT),
    "data.sequence_length": of("losses", "data.sequence_length", 64, 32),
    "data.mask_documents": of("losses", "data.mask_documents", False, True),
    "data.stages": of("losses", "data.stages", [], [{"weights": {"second": 1.0}}]),
    "data.stages.weights": of(
        "losses", "data.stages", [{"weights": {"first": 1.0}}], [{"weights": {"second": 1.0}}]
    ),
    "data.stages.until_tokens": of(
        "losses",
        "data.stages",
        *(
            [{"weights": {"first": 1.0}, "until_tokens": n}, {"weights": {"second": 1.0}}]
            for n in (512, 1024)
        ),
    ),
    "train.steps": of("losses learning_rates", "train.steps", 4, 3),
    "train.batch_tokens": of("losses", "train.batch_tokens", 512, 256),
    "train.batch_doublings": of("losses", "train.batch_doublings", 0, 2),
    "train.batch_doubling_steps": of(
        "losses", "train.batch_doubling_steps", 1, 2, train={"batch_doublings": 2}
    ),
    "train.micro_batch_size": of("rows_at_once", "train.micro_batch_size", 0, 2),
    "train.seed": of("losses", "train.seed", 7, 8),
    "train.dropout": of("losses", "train.dropout", 0.0, 0.1),
    "train.precision": of("losses", "train.precision", "fp32", "bf16"),
    "train.products": of("products", "train.products", "mixed", "onednn"),
    "train.attention": of("in_tiles", "train.attention", "torch", "tiles"),
    "train.compile": of("compiled", "train.compile", "off", "block"),
    "train.evaluate_every": of("evaluated", "train.evaluate_every", 0, 2),
    "train.checkpoint_every": of("checkpoints", "train.checkpoint_every", 100, 2),
    "train.keep_checkpoints": of("checkpoints", "train.keep_checkpoints", 0, 1, train=EACH),
    "train.keep_every": of(
        "checkpoints", "train.keep_every", 0, 2, train=EACH | {"keep_checkpoints": 1}
    ),
    "train.async_checkpoints": of("writers", "train.async_checkpoints", False, True),
    "train.spike_threshold": of("skipped", "train.spike_threshold", 0.0, 1e-6, optimizer=STILL),
    "train.max_skipped_in_a_row": of(
        "error", "train.max_skipped_in_a_row", 1, 4,
        train={"spike_threshold": 1e-6}, optimizer=STILL,
    ),
    "train.profile_steps": of("files", "train.profile_steps", 0, 1, train={"steps": 12}),
    "train.log_every": of("published", "train.log_every", 4, 1),
    "train.threads": of("threads", "train.threads", 1, 2),
    "optimizer.name": of("losses", "optimizer.name", "adamw", "muon"),
    "optimizer.learning_rate": of("losses learning_rates", "optimizer.learning_rate", 3e-3, 1e-3),
    "optimizer.embedding_learning_rate": of(
        "losses", "optimizer.embedding_learning_rate", 0.0, 1e-2
    ),
    "optimizer.betas": of("losses", "optimizer.betas", [0.9, 0.95], [0.5, 0.95]),
    "optimizer.eps": of("losses", "optimizer.eps", 1e-8, 1e-3),
    "optimizer.momentum": of("losses", "optimizer.momentum", 0.95, 0.5, optimizer=MUON),
    "optimizer.weight_decay": of("losses", "optimizer.weight_decay", 0.1, 1.0),
    "optimizer.weight_decay_schedule": of(
        "losses", "optimizer.weight_decay_schedule", "constant", "learning_rate"
    ),
    "optimizer.cautious_weight_decay": of(
        "losses", "optimizer.cautious_weight_decay", False, True
    ),
    "optimizer.max_grad_norm": of("losses", "optimizer.max_grad_norm", 1.0, 1e-6),
    "optimizer.warmup_steps": of("losses learning_rates", "optimizer.warmup_steps", 3, 1),
    "optimizer.schedule": of(
        "losses learning_rates", "optimizer.schedule", "cosine", "linear",
        optimizer={"warmup_steps": 1}, train={"steps": 5},
    ),
    "optimizer.final_lr_fraction": of(
        "learning_rates", "optimizer.final_lr_fraction", 0.1, 0.0, optimizer={"warmup_steps": 1}
    ),
    "optimizer.decay_steps": of("losses learning_rates", "optimizer.decay_steps", 2, 3,
                                optimizer=WSD),
    "optimizer.decay_shape": of("losses learning_rates", "optimizer.decay_shape", "linear", "sqrt",
                                optimizer=WSD | {"decay_steps": 3}),
    "optimizer.reference_batch_tokens": of(
        "losses learning_rates", "optimizer.reference_batch_tokens", 0, 2048
    ),
    "optimizer.batch_scaling": of(
        "losses learning_rates", "optimizer.batch_scaling", "linear", "sqrt",
        optimizer={"reference_batch_tokens": 2048},
    ),
    "optimizer.z_loss": of("grad_norms", "optimizer.z_loss", 0.0, 1e-2),
    "transfer.kind": of("losses", "transfer.kind", "", "mup"),
    "transfer.base_width": of(
        "losses", "transfer.base_width", 256, 64, transfer={"kind": "mup"}
    ),
    "transfer.base_layers": of(
        "losses", "transfer.base_layers", 8, 1, transfer={"kind": "completep"}
    ),
    "distill.teacher": of("losses", "distill.teacher", "", "{run}"),
    "distill.weight": of("losses", "distill.weight", 0.5, 0.9, distill={"teacher": "{run}"}),
    "distill.temperature": of(
        "losses", "distill.temperature", 1.0, 2.0, distill={"teacher": "{run}"}
    ),
    "quantize.scheme": of("losses", "quantize.scheme", "", "int4"),
    "quantize.embedding": of(
        "losses", "quantize.embedding", "int8", "float", quantize={"scheme": "int4"}
    ),
    "average.kind": of("held_out", "average.kind", "ema", "tail", train={"evaluate_every": 2}),
    "average.decay": of(
        "held_out", "average.decay", 0.1, 0.5,
        train={"evaluate_every": 2}, average={"kind": "ema"},
    ),
    "average.start": of(
        "held_out", "average.start", 0, 2, train={"evaluate_every": 2}, average={"kind": "tail"}
    ),
    "eval.tasks": of("asked keys", "eval.tasks", [], ["piqa"]),
    "eval.every": of("tested", "eval.every", 2, 3, eval=TASKS),
    "eval.limit": of("asked", "eval.limit", 200, 0, eval=TASKS),
    "eval.data": of("asked", "eval.data", "", "somewhere", eval=TASKS),
    "track.tensorboard": of("files", "track.tensorboard", False, True),
    "track.trackio": of("tracked", "track.trackio", "", "mine"),
    "track.wandb": of("tracked", "track.wandb", "", "mine"),
    "track.every": of("tracked", "track.every", 1, 2, track={"wandb": "mine"}),
}  # fmt: skip

# What one process on text cannot show, and the test that does.
ELSEWHERE = {
    "objective.name": ("test_dpo.py", "test_data_and_settings_that_do_not_fit_are_one_line"),
    "distill.cache": ("test_distill.py", "test_a_cache_gives_the_losses_of_its_teacher"),
    "objective.beta": ("test_dpo.py", "test_beta_acts"),
    "parallel.kind": ("test_world.py", "test_gradients_are_those_of_one_process"),
    "parallel.shard_group_size": ("test_world.py", "test_gradients_are_those_of_one_process"),
    "parallel.timeout": ("test_world.py", "test_a_rank_that_hangs_is_named"),
}


def fields(cls: type, prefix: str = "") -> Iterator[str]:
    """The path of every field of a recipe: sections, their keys, and keys of tables within."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, hint = prefix + key_of(field.name), hints[field.name]
        inner = next(
            (a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), None
        )
        if inner is None or prefix:
            yield path
        if inner is not None:
            yield from fields(inner, path + ".")


FIELDS = list(fields(Recipe))


def test_every_field_has_an_entry() -> None:
    assert set(FIELDS) == set(ENTRIES) | set(ELSEWHERE)
    assert not set(ENTRIES) & set(ELSEWHERE)
    for file, name in ELSEWHERE.values():
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> dict[str, str]:
    """Data of two texts, rows of ids as the original has them, and a run to go on from."""
    folder = tmp_path_factory.mktemp("fields")
    data = make_data(folder)
    (folder / "text.txt").write_text(sample_text[200_000:240_000])
    prepare([Source("text", [folder / "text.txt"])], folder / "other", vocab_size=290, held_out=0.1)
    ids = np.minimum(TokenFolder.open(data).tokens("train").read(0, 80 * 65), 280).reshape(80, 65)
    (folder / "rows/1").mkdir(parents=True)
    lines = [json.dumps({"token_ids": row.tolist()}) + "\n" for row in ids]
    (folder / "rows/1/a.jsonl").write_text("".join(lines))
    for name, source in (("own", data), ("foreign", folder / "other")):
        TokenFolder.open(source).tokenizer().save(folder / name)
    train(folder / "run", recipe({}, {"data": str(data)}))
    names = ("data", "other", "rows", "run", "own", "foreign")
    return {name: str(folder / name) for name in names}


def recipe(changes: Settings, places: dict[str, str]) -> Recipe:
    """The golden runs' base with changes, four steps long."""
    values: Settings = {}
    short = {"steps": 4, "evaluate_every": 0}
    for section in BASE.keys() | changes.keys() | {"data", "train"}:
        values[section] = BASE.get(section, {}) | (short if section == "train" else {})
        if section == "data":
            values[section]["path"] = "{data}"
        for key, value in changes.get(section, {}).items():
            values[section][key] = value
        for key, value in values[section].items():
            if isinstance(value, str):
                values[section][key] = value.format(**places) if "{" in value else value
    return Recipe.from_dict(values)


class Traces:
    """What runs leave, each trained once."""

    def __init__(self, folder: Path, places: dict[str, str]) -> None:
        self.folder, self.places = folder, places
        self.known: dict[str, dict[str, Any]] = {}

    def of(self, changes: Settings) -> dict[str, Any]:
        """The trace of a run with these changes. Changes that leave the recipe as it is, are the
        same run."""
        given = recipe(changes, self.places)
        name = json.dumps(given.to_dict(), sort_keys=True)
        if name not in self.known:
            self.known[name] = trace(given, self.folder / str(len(self.known)))
        return self.known[name]


@pytest.fixture(scope="module")
def traces(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Traces:
    return Traces(tmp_path_factory.mktemp("traces"), folders)


def trace(given: Recipe, run: Path) -> dict[str, Any]:
    """Train, and gather whatever a setting can show in."""
    found: dict[str, Any] = {
        name: []
        for name in (
            "rows_at_once",
            "compiled",
            "products",
            "in_tiles",
            "writers",
            "published",
            "asked",
            "tracked",
        )
    }
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        listen(patch, found)
        try:
            train(run, given)
            found["error"] = None
        except UserError as error:
            if not (run / "metrics.jsonl").exists():
                raise
            found["error"] = str(error)
        finally:
            found["threads"] = torch.get_num_threads()
            torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found | {
        "losses": [row["loss"] for row in rows],
        "learning_rates": [row["learning_rate"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "skipped": [row["skipped"] for row in rows],
        "evaluated": [row["step"] for row in rows if "held_out_loss" in row],
        "held_out": [row["held_out_loss"] for row in rows if "held_out_loss" in row],
        "tested": [row["step"] for row in rows if "piqa/acc" in row],
        "keys": sorted({key for row in rows for key in row}),
        "checkpoints": [path.name for path in checkpoint.complete(run)],
        "files": sorted({path.relative_to(run).parts[0] for path in run.rglob("*")}),
    }


def listen(patch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """Write down what a run does that no file of it shows; outside services stay untouched."""
    forward, write, publish = Parallel.__call__, checkpoint.write_checkpoint, Recorder.publish

    def called(self: Parallel, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        found["rows_at_once"].append(len(inputs))
        return forward(self, inputs, *rest)

    def written(*arguments: Any) -> Any:
        found["writers"].append(threading.current_thread() is threading.main_thread())
        return write(*arguments)

    def published(self: Recorder, rows: list[Any]) -> None:
        found["published"].append([row["step"] for row in rows])
        publish(self, rows)

    def scored(_: Any, __: Any, names: list[str], data: Path | None, limit: int | None) -> Any:
        found["asked"].append((names, data, limit))
        return {name: {"acc": 0.5} for name in names}

    def tracker(kind: str, project: str) -> Any:
        found["tracked"].append((kind, project))
        return (lambda step, _: found["tracked"].append(step)), lambda: None

    product = products._product

    def multiplied(x: torch.Tensor, weight: torch.Tensor, by_weight: bool) -> torch.Tensor:
        found["products"].append(by_weight)
        return product(x, weight, by_weight)

    attend = flash.attend

    def attended(*given: Any) -> Any:
        found["in_tiles"].append(True)
        return attend(*given)

    patch.setattr(flash, "attend", attended)
    patch.setattr(products, "_product", multiplied)
    patch.setattr(Parallel, "__call__", called)
    patch.setattr(checkpoint, "write_checkpoint", written)
    patch.setattr(Recorder, "publish", published)
    patch.setattr(task_scores, "score_tasks", scored)
    patch.setattr(trackers, "_trackio", lambda project, *_: tracker("trackio", project))
    patch.setattr(trackers, "_wandb", lambda project, *_: tracker("wandb", project))
    patch.setattr(torch.nn.Module, "compile", lambda *_, **__: found["compiled"].append(True))


@pytest.mark.parametrize("field", [field for field in FIELDS if field in ENTRIES])
def test_two_values_give_two_traces(field: str, traces: Traces) -> None:
    if field == "train.attention" and flash.fault(torch.float32):
        pytest.skip(flash.fault(torch.float32))
    entry = ENTRIES[field]
    section, key = field.split(".")[:2]
    # But for the field itself the two settings are equal.
    rest = [
        {
            s: {k: v for k, v in values.items() if (s, k) != (section, key)}
            for s, values in one.items()
        }
        for one in (entry.first, entry.second)
    ]
    assert {s: v for s, v in rest[0].items() if v} == {s: v for s, v in rest[1].items() if v}
    first, second = traces.of(entry.first), traces.of(entry.second)
    for part in entry.parts.split():
        assert first[part] != second[part], part
