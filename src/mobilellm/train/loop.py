"""The training loop: fetch, forward and backward, step, record.

    outcome = train(Path("runs/mine"), recipe)     # a new run
    outcome = resume(Path("runs/mine"))            # goes on with the bits of a run that was not stopped

Ctrl-C and SIGTERM end the step in hand, save, and return. A loss or gradient that is not finite stops the run.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mobilellm.data.loader import DataState, Loader
from mobilellm.data.shards import TokenFolder
from mobilellm.errors import UserError
from mobilellm.evaluate.heldout import document_border
from mobilellm.evaluate.perplexity import Score, autocast, perplexity
from mobilellm.model.config import ModelConfig, preset_names
from mobilellm.model.network import Network, initialise
from mobilellm.model.numbers import Numbers
from mobilellm.train import checkpoint, device
from mobilellm.train.checkpoint import TrainState
from mobilellm.train.optimizer import build, schedule, set_learning_rate
from mobilellm.train.recipe import Recipe
from mobilellm.train.run import Metrics, create, locked, now, read_recipe

MOST_VERIFIED = 32 << 30  # bytes of tokens whose checksums are verified at every start, at about 1 GB/s


class Watcher:
    """What a caller may want to see of a run; the command line draws it, tests and benchmarks leave it."""

    def started(self, trainer: Trainer, step: int) -> None:
        """Before the first step, with the steps already done."""

    def stepped(self, row: dict[str, Any]) -> None:
        """After each recorded step, with its metrics."""

    def said(self, line: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    run: Path
    """Its folder."""
    step: int
    """Optimiser steps done."""
    steps: int
    """Optimiser steps asked for."""
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Wall clock of this process's part: training, evaluations and checkpoints."""
    checkpoint: Path
    """The last one."""
    held_out: Score | None
    """Score of the last evaluation."""
    interrupted: str | None
    """The signal that stopped it, or none."""


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that the step in hand is finished first; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: there the caller's handling stays
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


def model_config(recipe: Recipe, data: TokenFolder) -> ModelConfig:
    """The network's configuration: the recipe's model, with the vocabulary of the data's tokenizer."""
    section = recipe.model
    if section.preset.lower() not in {name.lower() for name in preset_names()} and Path(section.preset).is_file():
        base = ModelConfig.read(Path(section.preset))
    else:
        base = ModelConfig.preset(section.preset)
    values = base.to_dict() | {
        "vocab_size": data.vocab_size,
        "bos_token_id": data.bos_id,
        "eos_token_id": data.eos_id,
        "layer_repeats": section.layer_repeats or base.layer_repeats,
        "shared_kv": section.shared_kv or base.shared_kv,
        "num_hidden_layers": section.num_hidden_layers or base.num_hidden_layers,
        "max_position_embeddings": section.max_position_embeddings or base.max_position_embeddings,
    }
    config = ModelConfig.from_dict(values, "model")
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length} exceeds the model's context of {config.max_position_embeddings}",
            mend="shorten it, or raise model.max_position_embeddings",
        )
    return config


class Trainer:
    """Network, optimisers and data of one run, on one device."""

    def __init__(self, recipe: Recipe, data: TokenFolder, watcher: Watcher | None = None) -> None:
        self.recipe, self.data, self.watcher = recipe, data, watcher or Watcher()
        self.device = device.pick_device()
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.config = model_config(recipe, data)
        self.numbers = Numbers.of(self.config)
        self.train_tokens, self.heldout_tokens = data.tokens("train"), data.tokens("heldout")
        # Weights are drawn on the CPU, so that every device starts from the same ones.
        torch.manual_seed(recipe.train.seed)
        self.network = Network(self.config, initialised=False)
        initialise(self.network, zero_residual=recipe.model.initial_residual == "zero")
        self.network.to(self.device)
        self.optimizers = build(self.network, recipe.optimizer, recipe.train.precision)
        if recipe.train.compile == "block":
            for layer in self.network.layers:
                layer.compile(dynamic=False)
        self.state = TrainState(
            step=0, tokens=0, data=DataState(seed=recipe.train.seed, epoch=0, samples=0, fingerprint=data.fingerprint)
        )
        self.pending: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []  # recorded, not yet looked at

    def loader(self) -> Loader:
        """Batches from where the run stands."""
        sequences = self.recipe.train.batch_tokens // self.recipe.data.sequence_length
        return Loader(self.train_tokens, self.recipe.data.sequence_length, sequences, self.state.data)

    def forward_backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Gradients of the mean loss over the whole batch, accumulated over micro-batches; returns that loss."""
        total = torch.zeros((), device=self.device)
        rows = self.recipe.micro_batch
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            with autocast(self.network, self.recipe.train.precision):
                loss = self.network.loss(x, y, "sum") / targets.numel()
            loss.backward()
            total += loss.detach()
        return total

    def update(self, step: int) -> torch.Tensor:
        """Clip, step every optimiser at the learning rate of `step`, drop the gradients; returns the gradient norm."""
        section = self.recipe.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), section.clip or math.inf, foreach=True)
        set_learning_rate(self.optimizers, schedule(step, self.recipe.train.steps, section))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def evaluate(self) -> Score:
        """Score of the held-out split, in windows of the training length."""
        # Uncompiled: its shapes differ from training's, and compiling them would cost more than it saves.
        with torch.compiler.set_stance("force_eager"):
            return perplexity(
                self.network, self.heldout_tokens, self.data.text_bytes("heldout"), prefix=document_border(self.data),
                sequence_length=self.recipe.data.sequence_length, precision=self.recipe.train.precision,
            )  # fmt: skip

    def fit(self, run: Path, stop: StopRequest) -> Outcome:
        """Train from where the run stands to its last step, or until stopped."""
        train, metrics, begun = self.recipe.train, Metrics(run), time.perf_counter()
        score: Score | None = None
        self.watcher.started(self, self.state.step)
        clock = time.perf_counter()
        for batch, data_state in self.loader():
            if self.state.step >= train.steps or stop.signal:
                break
            step = self.state.step
            inputs, targets = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in (batch.inputs, batch.targets))
            loss = self.forward_backward(inputs, targets)
            norm = self.update(step)
            self.state = TrainState(step=step + 1, tokens=self.state.tokens + inputs.numel(), data=data_state)
            row = {"learning_rate": self.optimizers[0].param_groups[0]["lr"], "tokens": self.state.tokens}
            evaluating = self.state.step == train.steps or (train.evaluate_every and self.state.step % train.evaluate_every == 0)
            saving = self.state.step == train.steps or self.state.step % train.checkpoint_every == 0
            self.pending.append((loss, norm, {"step": self.state.step} | row))
            if evaluating or saving or self.state.step % train.log_every == 0:
                rows = self.collect(run, metrics, clock, begun)
                if evaluating:
                    score = self.evaluate()
                    rows[-1] |= {f"held_out_{key}": getattr(score, key) for key in ("loss", "perplexity", "bits_per_byte")}
                self.publish(metrics, rows)
                if saving:
                    self.save(run, metrics)
                clock = time.perf_counter()  # evaluations and checkpoints do not count as training time
        if self.pending:
            self.publish(metrics, self.collect(run, metrics, clock, begun))
        saved = self.save(run, metrics)
        return Outcome(
            run=run, step=self.state.step, steps=train.steps, tokens=self.state.tokens, checkpoint=saved, held_out=score,
            seconds=time.perf_counter() - begun, interrupted=stop.signal if self.state.step < train.steps else None,
        )  # fmt: skip

    def collect(self, run: Path, metrics: Metrics, clock: float, begun: float) -> list[dict[str, Any]]:
        """The metrics of the pending steps; `UserError` at the first whose loss or gradient is not finite."""
        # The one place that waits for the device: once in log_every steps, for two numbers a step.
        values = torch.stack([torch.stack((loss, norm)) for loss, norm, _ in self.pending]).tolist()
        end = time.perf_counter()
        speed = round(len(self.pending) * self.recipe.train.batch_tokens / max(end - clock, 1e-9), 1)
        rows: list[dict[str, Any]] = []
        for (loss, norm), (_, _, row) in zip(values, self.pending, strict=True):
            rows.append(row | {"loss": loss, "grad_norm": norm, "tokens_per_second": speed, "seconds": round(end - begun, 3)})
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.publish(metrics, rows)
                good, _ = checkpoint.newest_valid(run)
                raise UserError(
                    f"step {row['step']}: loss {loss}, gradient norm {norm}: not finite, training stopped; "
                    f"last good checkpoint: {good or 'none'}",
                    mend="lower optimizer.learning_rate or lengthen optimizer.warmup_steps in a new run",
                )
        self.pending = []
        return rows

    def publish(self, metrics: Metrics, rows: list[dict[str, Any]]) -> None:
        """Write rows to metrics.jsonl and show them."""
        metrics.append(rows)
        for row in rows:
            self.watcher.stepped(row)

    def save(self, run: Path, metrics: Metrics) -> Path:
        """Write a checkpoint, and drop those that are no longer kept."""
        metrics.sync()
        origin = {"made_by": "mobilellm train", "run": run.name, "step": self.state.step,
                  "data_fingerprint": self.data.fingerprint, "preset": self.recipe.model.preset}  # fmt: skip
        path = checkpoint.save(run, self.state, self.network, self.optimizers, self.data.tokenizer(), origin)
        checkpoint.prune(run, self.recipe.train.keep_checkpoints)
        return path


def open_data(recipe: Recipe) -> TokenFolder:
    """The data a recipe names."""
    if not recipe.data.path:
        raise UserError("data.path is not set", mend="name a folder made by `mobilellm prepare`")
    data = TokenFolder.open(Path(recipe.data.path))  # every size, in no time
    size = sum(shard["size"] for split in data.manifest["splits"].values() for shard in split["shards"])
    return TokenFolder.open(data.path, verify=True) if size <= MOST_VERIFIED else data


def train(run: Path, recipe: Recipe, watcher: Watcher | None = None) -> Outcome:
    """Start a new run in the folder `run`, which must be empty or absent, and train it to the end."""
    recipe.check()
    data = open_data(recipe)
    recipe = device.resolve(recipe.replace("data", path=str(Path(recipe.data.path).resolve())), device.pick_device())
    trainer = Trainer(recipe, data, watcher)
    trainer.loader()  # complains about data too short for one batch before anything is written
    environment = device.describe(trainer.device) | {
        "precision": recipe.train.precision,
        "compile": recipe.train.compile,
        "data_fingerprint": data.fingerprint,
        "started": now(),
    }
    create(run, recipe, environment)
    with locked(run), StopRequest() as stop:
        return trainer.fit(run, stop)


def resume(run: Path, watcher: Watcher | None = None) -> Outcome:
    """Go on with a run from its newest checkpoint that verifies, or from its start when it has none."""
    recipe = read_recipe(run)
    recipe.check()
    watcher = watcher or Watcher()
    with locked(run), StopRequest() as stop:
        path, rejected = checkpoint.newest_valid(run)
        for line in rejected:
            watcher.said(f"rejected: {line}")
        if rejected and path is None:
            raise UserError(f"{run}: no checkpoint verifies: {rejected[0]}", mend="start a new run")
        for bad in checkpoint.complete(run):  # out of the way, under a name that says why
            if path is not None and bad.name > path.name:
                bad.rename(bad.with_name(f"rejected-{bad.name}"))
        data = open_data(recipe)
        trainer = Trainer(recipe, data, watcher)
        if path is not None:
            trainer.state = checkpoint.load(path, trainer.network, trainer.optimizers)
            if trainer.state.data.fingerprint != data.fingerprint:
                raise UserError(
                    f"{recipe.data.path}: the data changed since {path.name} was written",
                    mend="restore it, or start a new run",
                )
        Metrics(run).rewind(trainer.state.step)
        return trainer.fit(run, stop)
