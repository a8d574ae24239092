"""The training loop: fetch, forward and backward, step, record.

    outcome = train(Path("runs/mine"), recipe)     # a new run
    outcome = resume(Path("runs/mine"))            # goes on with the bits of a run that was not stopped

Both take the `World` of processes to train in; alone by default. Ctrl-C, SIGTERM and SIGUSR1 end the step in hand, save and
return. A step whose loss or gradient is not finite, or a spike, is not taken; several in a row stop the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mobilellm.data.dataset import SampleFolder, open_dataset
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.mixture import Mixture, Stage
from mobilellm.data.shards import TokenFolder
from mobilellm.errors import UserError
from mobilellm.evaluate.perplexity import Score
from mobilellm.hardware import device
from mobilellm.model.config import ModelConfig, preset_names
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network, initialize
from mobilellm.train import checkpoint
from mobilellm.train.batches import Prefetch
from mobilellm.train.checkpoint import Saver, TrainState
from mobilellm.train.guard import Guard
from mobilellm.train.heldout import document_border, held_out, total_loss
from mobilellm.train.optimizer import build, schedule, set_learning_rate, skip_when
from mobilellm.train.parallel import Parallel
from mobilellm.train.recipe import Recipe, largest_divisor
from mobilellm.train.resolve import resolve
from mobilellm.train.run_folder import Metrics, create, locked, now, read_recipe
from mobilellm.train.sharded import full
from mobilellm.train.stopwatch import Lap, Stopwatch
from mobilellm.train.trackers import Trackers
from mobilellm.train.world import World

MAX_VERIFIED = (
    32 << 30
)  # bytes of tokens whose checksums are verified at every start, at about 1 GB/s
SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
# What may differ when a run goes on. Nothing of it changes what is computed but in the order of sums, save the mixture,
# which is meant to.
CHANGEABLE = {
    "data": {"stages"},
    "train": {"micro_batch_size", "evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_every", "async_checkpoints",
              "log_every", "threads", "profile_steps", "max_skipped_in_a_row", "compile"},
    "parallel": {"kind", "shard_group_size", "timeout"},
    "track": {"tensorboard", "trackio", "wandb", "every"},
    "eval": {"tasks", "every", "limit", "data"},
}  # fmt: skip


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
    """Optimizer steps done."""
    steps: int
    """Optimizer steps asked for."""
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
    """Remembers SIGINT, SIGTERM or SIGUSR1, so that the step in hand is finished first; a second SIGINT acts at once."""

    def __init__(self) -> None:
        self.code = 0
        """Place in SIGNALS, from 1; 0 is none."""
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            try:
                self.previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: there the caller's handling stays
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        # torchrun and schedulers repeat their signals; only a person who presses Ctrl-C twice wants no checkpoint.
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = max(self.code, SIGNALS.index(signal.Signals(number)) + 1)


Data = TokenFolder | SampleFolder


def model_config(recipe: Recipe, data: Data) -> ModelConfig:
    """The network's configuration: the recipe's model, with the vocabulary of the data's tokenizer."""
    section = recipe.model
    if (
        section.preset.lower() not in {name.lower() for name in preset_names()}
        and Path(section.preset).is_file()
    ):
        base = ModelConfig.read(Path(section.preset))
    else:
        base = ModelConfig.preset(section.preset)
    values = base.to_dict() | {
        "vocab_size": data.vocab_size,
        "bos_token_id": data.bos_id,
        "eos_token_id": data.eos_id,
        "layer_repeats": section.layer_repeats or base.layer_repeats,
        "shared_kv": section.shared_kv or base.shared_kv,
        "qk_norm": base.qk_norm if section.qk_norm is None else section.qk_norm,
        "num_hidden_layers": section.num_hidden_layers or base.num_hidden_layers,
        "max_position_embeddings": section.max_position_embeddings or base.max_position_embeddings,
    }
    config = ModelConfig.from_dict(values, "model")
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length} exceeds the model's context of {config.max_position_embeddings}",
            hint="shorten it, or raise model.max_position_embeddings",
        )
    return config


@dataclass
class Pending:
    """A step that was made, whose figures are still on the device."""

    loss: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor
    lap: Lap
    row: dict[str, Any]
    first_sample: DataState


class Trainer:
    """Network, optimizers and data of one run, in one process of a world."""

    def __init__(
        self, recipe: Recipe, data: Data, watcher: Watcher | None = None, world: World | None = None
    ) -> None:
        self.recipe, self.data, self.watcher = recipe, data, watcher or Watcher()
        self.world = world or World(device=device.pick_device())
        self.device = self.world.device
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.config = model_config(recipe, data)
        self.numbers = ModelCosts.of(self.config)
        self.flops_per_token = self.numbers.flops_per_token(recipe.data.sequence_length)
        self.micro_batch_size = recipe.micro_batch_size(self.world.size)
        # Weights are drawn on the CPU, so that every device and every process starts from the same ones.
        torch.manual_seed(recipe.train.seed)
        self.network = Network(self.config, initialized=False)
        initialize(self.network, zero_residual=recipe.model.initial_residual == "zero")
        self.network.to(self.device)
        if self.device.type == "cuda" and not recipe.train.micro_batch_size:
            self.micro_batch_size = self.find_micro_batch()
        self.parallel = Parallel(self.network, recipe, self.world)
        self.optimizers = build(
            self.network, recipe.optimizer, recipe.train.precision, recipe.learning_rate_factor
        )
        self.guard = Guard(self.device, recipe.train.spike_threshold)
        self.state = TrainState(
            step=0, tokens=0, tokenizer_sha256=data.tokenizer().sha256,
            data=DataState(seed=recipe.train.seed, epoch=0, samples=0, fingerprint=data.fingerprint),
        )  # fmt: skip
        self.pending: list[Pending] = []
        self.skipped_in_a_row = 0
        self.saver: Saver | None = None
        self._peak = 0.0

    def loader(self) -> Loader | Mixture:
        """Batches of this process from where the run stands."""
        section, place = self.recipe.data, (self.world.rank, self.world.size)
        common = (
            section.sequence_length,
            self.recipe.sequences,
            self.state.data,
            *place,
            section.mask_documents,
        )
        sources = getattr(self.data, "manifest", {}).get("sources", [])
        if not section.stages and not any(source.get("weight") is not None for source in sources):
            return Loader(self.data.tokens("train"), *common)
        streams = {name: self.data.tokens("train", name) for name in self.data.sources()}
        if not section.stages:  # prepared with weights, and nothing else is asked for
            return Mixture(
                streams, [Stage(until_tokens=None, weights=self.data.weights())], *common
            )
        last = section.stages[-1]  # goes on for ever, whatever it says
        stages = [
            Stage(until_tokens=None if s is last else s.until_tokens, weights=s.weights)
            for s in section.stages
        ]
        return Mixture(streams, stages, *common)

    @property
    def peak_flops(self) -> float:
        """What the devices of all processes could do at best, FLOP/s: from the table of devices, or measured here."""
        if not self._peak:
            self._peak = (
                device.peak_flops(self.device, self.recipe.train.precision) * self.world.size
            )
        return self._peak

    def restore(self, path: Path, allow_data_change: bool) -> None:
        """Go to where a verified checkpoint stands. `UserError` when data or tokenizer are not the ones it was trained on,
        or it is of another model."""
        state, data, where = checkpoint.read_state(path), self.data, self.recipe.data.path
        found = data.tokenizer().sha256
        if state.tokenizer_sha256 != found:
            raise UserError(
                f"{where}: the data changed since {path.name} was written: made with tokenizer {found[:12]}, "
                f"not {state.tokenizer_sha256[:12]}",
                hint="prepare them with the run's own tokenizer, which lies in the checkpoint",
            )
        if state.data.fingerprint != data.fingerprint:
            if not allow_data_change:
                raise UserError(
                    f"{where}: the data changed since {path.name} was written",
                    hint="restore them, or go on with the new ones from their beginning: --allow-data-change",
                )
            self.watcher.said(
                f"{where}: other data than {path.name} was trained on; they are read from their beginning"
            )
            fresh = DataState(
                seed=state.data.seed,
                epoch=state.data.epoch + 1,
                samples=0,
                fingerprint=data.fingerprint,
            )
            state = dataclasses.replace(state, data=fresh)
        checkpoint.load(path, self.network, self.optimizers)
        self.state = state

    # --- one step ---

    def forward_backward(
        self, inputs: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gradients of the mean loss over the batch of all processes; returns that loss.

        inputs, targets (and documents) are this process's rows. When memory runs out the micro-batch is halved.
        """
        while True:
            try:
                return self._accumulate(inputs, targets, documents)
            except RuntimeError as error:
                if (
                    not device.is_out_of_memory(error)
                    or self.world.size > 1
                    or self.micro_batch_size == 1
                ):
                    raise self._out_of_memory(error) from error
            self.network.zero_grad(set_to_none=True)
            self.micro_batch_size = largest_divisor(len(inputs), self.micro_batch_size // 2)
            device.empty_cache(self.device)
            self.watcher.said(
                f"out of memory: the micro-batch is {self.micro_batch_size} sequences from now on"
            )

    def _out_of_memory(self, error: RuntimeError) -> Exception:
        if not device.is_out_of_memory(error):
            return error
        return UserError(
            f"out of memory with a micro-batch of {self.micro_batch_size} x {self.recipe.data.sequence_length} tokens",
            hint="lower train.micro_batch_size, use parallel.kind fsdp, or ask `mobilellm plan` what fits",
        )

    def _accumulate(
        self, inputs: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        rows, everything = self.micro_batch_size, targets.numel() * self.world.size
        pieces = list(
            zip(
                inputs.split(rows), targets.split(rows),
                documents.split(rows) if documents is not None else [None] * -(-len(inputs) // rows), strict=True,
            )
        )  # fmt: skip
        total = torch.zeros((), device=self.device)
        for number, (x, y, d) in enumerate(pieces, 1):
            with (
                contextlib.nullcontext() if number == len(pieces) else self.parallel.accumulating()
            ):
                loss = self.parallel(x, y, d) / everything
                loss.backward()
            total += loss.detach()
        return self.world.sum_(total / self.world.size)

    def update(self, step: int, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and step every optimizer at the learning rate of `step`, unless the guard rules the step out; drop the
        gradients. Returns the gradient norm before clipping, and whether the step was skipped."""
        section = self.recipe.optimizer
        norm = full(
            torch.nn.utils.clip_grad_norm_(
                self.network.parameters(), section.max_grad_norm or math.inf, foreach=True
            )
        )
        skip = self.guard.check(loss, norm)
        skip_when(self.optimizers, skip)
        set_learning_rate(self.optimizers, schedule(step, self.recipe.train.steps, section))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm, skip

    def learning_rate(self, step: int) -> float:
        """Of the matrices inside the blocks at `step`."""
        section = self.recipe.optimizer
        return (
            section.learning_rate
            * self.recipe.learning_rate_factor
            * schedule(step, self.recipe.train.steps, section)
        )

    def find_micro_batch(self) -> int:
        """The largest micro-batch whose forward and backward pass fit into the device's memory, found by trying."""
        rows, length = self.recipe.rows(self.world.size), self.recipe.data.sequence_length
        size = largest_divisor(rows, max(1, (1 << 17) // length))
        step = Parallel(self.network, self.recipe, World(device=self.device))
        reserve = 3 * sum(
            p.numel() * p.element_size() for p in self.network.parameters()
        )  # gradients and moments
        while True:
            ids = torch.zeros(size, length, dtype=torch.long, device=self.device)
            try:
                held = torch.empty(reserve, dtype=torch.uint8, device=self.device)
                step(ids, ids).backward()
                del held
                fits = True
            except RuntimeError as error:
                if not device.is_out_of_memory(error):
                    raise
                if size == 1:
                    raise self._out_of_memory(error) from error
                fits = False
            self.network.zero_grad(set_to_none=True)
            held = None  # type: ignore[assignment]
            device.empty_cache(self.device)
            if fits:
                return self.world.smallest(size)
            size = largest_divisor(rows, size // 2)

    # --- the run ---

    def evaluate(self) -> Score:
        """Score of the held-out split, in windows of the training length."""
        with self.waiting():
            return held_out(
                self.network, self.data, sequence_length=self.recipe.data.sequence_length,
                precision=self.recipe.train.precision, world=self.world, sharded=self.parallel.sharded,
            )  # fmt: skip

    def evaluate_sources(self) -> dict[str, float]:
        """Held-out loss of each source, where there are several, as metrics."""
        sources = self.data.sources()
        if len(sources) < 2:
            return {}
        found = {}
        with self.waiting():
            for name in sources:
                stream = self.data.tokens("heldout", name)
                if len(stream) < 2:
                    continue
                nats, counted = total_loss(
                    self.network, stream, document_border(self.data), self.recipe.data.sequence_length,
                    self.recipe.train.precision, self.world, self.parallel.sharded,
                )  # fmt: skip
                found[f"held_out_loss/{name}"] = nats / max(1, counted)
        return found

    def evaluate_tasks(self) -> dict[str, float]:
        """Zero-shot scores of the recipe's tasks as metrics, by rank 0 while the others wait."""
        from mobilellm.evaluate.tasks import score_tasks

        section, what = self.recipe.eval, f"tasks-{self.state.step}"
        with self.waiting():
            network = self.whole_network()
            found: dict[str, float] = {}
            if self.world.main:
                scores = score_tasks(
                    network, self.data.tokenizer(), list(section.tasks), Path(section.data) if section.data else None,
                    limit=section.limit or None,
                )  # fmt: skip
                for task, score in scores.items():
                    found |= {
                        f"{task}/{key}": score[key]
                        for key in ("acc", "acc_norm")
                        if score.get(key) is not None
                    }
            self.world.after_main(what, done=self.world.main)
        return found

    def whole_network(self) -> Network:
        """The network itself, or a copy gathered from all processes where it is sharded."""
        if not self.parallel.sharded:
            return self.network
        copy = Network(self.config, initialized=False).to(self.device)
        with torch.no_grad():
            for mine, gathered in zip(copy.parameters(), self.network.parameters(), strict=True):
                mine.copy_(full(gathered.detach()))
        return copy

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in this block may take longer than a step is allowed to."""
        if self.world.watchdog is not None:
            self.world.watchdog.paused = True
        try:
            yield
        finally:
            if self.world.watchdog is not None:
                self.world.watchdog.paused = False

    def fit(self, run: Path, stop: StopRequest) -> Outcome:
        """Train from where the run stands to its last step, or until stopped."""
        train, metrics, begun = self.recipe.train, Metrics(run), time.perf_counter()
        saver = Saver(
            run, self.world, train.async_checkpoints, train.keep_checkpoints, train.keep_every
        )
        self.saver = saver
        trackers = Trackers(run, self.recipe, self.watcher.said) if self.world.main else None
        score: Score | None = None
        code, saved_step, profiler, made = 0, -1, None, 0
        self.guard.state.copy_(torch.tensor(self.state.guard, dtype=torch.float64))
        if self.world.main:
            self.watcher.started(self, self.state.step)
        watch, batches = Stopwatch(self.device), Prefetch(self.loader(), self.device)
        try:
            clock = time.perf_counter()
            watch.mark("data")
            for inputs, targets, documents, data_state in batches:
                code = self.world.flag(stop.code)
                if self.state.step >= train.steps or code:
                    break
                if train.profile_steps and made == 10:
                    profiler = device.profiler(self.device)
                    profiler.start()
                step, first_sample = self.state.step, self.state.data
                self.world.beat(step)
                watch.mark("compute")
                loss = self.forward_backward(inputs, targets, documents)
                watch.mark("optimizer")
                norm, skipped = self.update(step, loss)
                made += 1
                tokens = self.state.tokens + train.batch_tokens
                self.state = dataclasses.replace(
                    self.state, step=step + 1, tokens=tokens, data=data_state
                )
                row = {
                    "step": step + 1,
                    "learning_rate": self.learning_rate(step),
                    "tokens": tokens,
                }
                row |= {
                    f"epochs/{name}": round(passes, 4)
                    for name, passes in data_state.epochs().items()
                }
                self.pending.append(Pending(loss, norm, skipped, watch.lap(), row, first_sample))
                if profiler is not None and made == 10 + train.profile_steps:
                    profiler.stop()
                    profiler.export_chrome_trace(str(run / f"profile-rank{self.world.rank}.json"))
                    profiler = None
                last = step + 1 == train.steps
                evaluating = last or (
                    train.evaluate_every and (step + 1) % train.evaluate_every == 0
                )
                saving = last or (step + 1) % train.checkpoint_every == 0
                testing = bool(self.recipe.eval.tasks) and (
                    last or (step + 1) % self.recipe.eval.every == 0
                )
                if evaluating or saving or testing or (step + 1) % train.log_every == 0:
                    rows = self.collect(run, metrics, watch, clock, begun)
                    if evaluating:
                        score = self.evaluate()
                        rows[-1] |= {
                            f"held_out_{key}": getattr(score, key)
                            for key in ("loss", "perplexity", "bits_per_byte")
                        }
                        rows[-1] |= self.evaluate_sources()
                    if testing:
                        rows[-1] |= self.evaluate_tasks()
                    if saving:
                        start = time.perf_counter()
                        self.save(saver, metrics)
                        rows[-1]["checkpoint_seconds"] = round(time.perf_counter() - start, 6)
                        saved_step = self.state.step
                    elif line := saver.complaint():
                        self.failed(line)
                    self.publish(metrics, trackers, rows)
                    clock = (
                        time.perf_counter()
                    )  # evaluations and checkpoints do not count as training time
                watch.mark("data")
        finally:
            batches.close()
        if self.pending:
            self.publish(metrics, trackers, self.collect(run, metrics, watch, clock, begun))
        self.world.settle_flag()
        with self.waiting():
            if saved_step != self.state.step:
                self.save(saver, metrics)
            if line := self.world.broadcast(saver.settle()):
                good, _ = checkpoint.newest_valid(run)
                raise UserError(
                    f"the last checkpoint was not written: {line}; last good one: {good or 'none'}"
                )
            self.world.barrier("the end of the run")
        if trackers is not None:
            trackers.close()
        return Outcome(
            run=run, step=self.state.step, steps=train.steps, tokens=self.state.tokens,
            checkpoint=checkpoint.checkpoint_folder(run, self.state.step), held_out=score,
            seconds=time.perf_counter() - begun,
            interrupted=SIGNALS[code - 1].name if code and self.state.step < train.steps else None,
        )  # fmt: skip

    def collect(
        self, run: Path, metrics: Metrics, watch: Stopwatch, clock: float, begun: float
    ) -> list[dict[str, Any]]:
        """The metrics of the pending steps. `UserError` when too many in a row were skipped, naming their samples."""
        # The one place that waits for the device: once in log_every steps, for three numbers a step.
        values = torch.stack(
            [torch.stack((p.loss, p.norm, p.skipped.to(p.loss.dtype))) for p in self.pending]
        ).tolist()
        end = time.perf_counter()
        speed = len(self.pending) * self.recipe.train.batch_tokens / max(end - clock, 1e-9)
        shared = {
            "tokens_per_second": round(speed, 1),
            "mfu_6n": round(speed * self.flops_per_token["six_n"] / self.peak_flops, 5),
            "mfu_palm": round(speed * self.flops_per_token["palm"] / self.peak_flops, 5),
            "memory_bytes": device.peak_memory(self.device),
            "seconds": round(end - begun, 3),
        }
        rows: list[dict[str, Any]] = []
        skipped = self.state.skipped
        for (loss, norm, skip), step in zip(values, self.pending, strict=True):
            phases = {f"{k}_seconds": round(v, 6) for k, v in watch.seconds(step.lap).items()}
            skipped += int(skip)
            rows.append(
                step.row | {"loss": loss, "grad_norm": norm, "skipped": skipped} | phases | shared
            )
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
            if skip:
                where = (
                    f"epoch {step.first_sample.epoch}, samples from {step.first_sample.samples} on"
                )
                if self.world.main:
                    self.watcher.said(
                        f"step {rows[-1]['step']}: loss {loss:.6g}, gradient norm {norm:.6g}: skipped ({where})"
                    )
            if self.skipped_in_a_row >= self.recipe.train.max_skipped_in_a_row:
                if self.world.main:
                    self.publish(metrics, None, rows)
                if self.saver is not None:
                    self.saver.settle()  # one may be in the writing
                good, _ = checkpoint.newest_valid(run)
                raise UserError(
                    f"step {rows[-1]['step']}: loss {loss:.6g}, gradient norm {norm:.6g}: {self.skipped_in_a_row} steps "
                    f"skipped in a row ({where}, {self.recipe.sequences} a step), training stopped; "
                    f"last good checkpoint: {good or 'none'}",
                    hint="look at that data, or lower optimizer.learning_rate in a new run",
                )
        self.state = dataclasses.replace(self.state, skipped=skipped)
        self.pending = []
        return rows

    def publish(
        self, metrics: Metrics, trackers: Trackers | None, rows: list[dict[str, Any]]
    ) -> None:
        """Write rows to metrics.jsonl and the trackers, and show them."""
        if not self.world.main:
            return
        metrics.append(rows)
        for row in rows:
            self.watcher.stepped(row)
        if trackers is not None:
            trackers.send(rows)

    def save(self, saver: Saver, metrics: Metrics) -> None:
        """Have a checkpoint written, and say so when the one before could not be."""
        if self.world.main:
            metrics.sync()
        self.state = dataclasses.replace(self.state, guard=tuple(self.guard.state.tolist()))
        origin = {"made_by": "mobilellm train", "run": saver.run.name, "step": self.state.step,
                  "data_fingerprint": self.data.fingerprint, "preset": self.recipe.model.preset}  # fmt: skip
        with self.waiting():
            line = saver.save(
                self.state, self.network, self.optimizers, self.data.tokenizer(), origin
            )
        if line:
            self.failed(line)

    def failed(self, line: str) -> None:
        """A checkpoint that could not be written does not end the training, but is not to be overlooked."""
        self.watcher.said(
            f"CHECKPOINT NOT WRITTEN: {line}; training goes on, the checkpoints before it stand"
        )


def open_data(recipe: Recipe, world: World | None = None) -> Data:
    """The data a recipe names; one process of all reads it whole, to check it."""
    if not recipe.data.path:
        raise UserError("data.path is not set", hint="name a folder made by `mobilellm prepare`")
    tokenizer = Path(recipe.data.tokenizer) if recipe.data.tokenizer else None
    data = open_dataset(Path(recipe.data.path), tokenizer)  # every size, in no time
    if world is not None and world.broadcast(data.fingerprint) != data.fingerprint:
        raise UserError(
            f"{data.path}: other data than rank 0 has", hint="let all nodes see one folder"
        )
    if world is not None and not world.main:
        return data
    small = 2 * (len(data.tokens("train")) + len(data.tokens("heldout"))) <= MAX_VERIFIED
    return open_dataset(data.path, tokenizer, verify=True) if small else data


def train(
    run: Path, recipe: Recipe, watcher: Watcher | None = None, world: World | None = None
) -> Outcome:
    """Start a new run in the folder `run`, which must be empty or absent, and train it to the end."""
    world = world or World(device=device.pick_device())
    return _begin(run, recipe, watcher, world, None)


def branch(
    run: Path,
    source: Path,
    watcher: Watcher | None = None,
    world: World | None = None,
    decay_steps: int = 0,
) -> Outcome:
    """Start a new run from a checkpoint of another one and let its learning rate fall over `decay_steps` (0: as the
    recipe has it): what a wsd schedule's stable part is good for. `UserError` for a run without one."""
    world = world or World(device=device.pick_device())
    origin = source.parent.parent if source.parent.name == "checkpoints" else source
    recipe = read_recipe(origin)
    path = source if source != origin else checkpoint.newest_valid(origin)[0]
    if path is None:
        raise UserError(f"{origin}: no checkpoint verifies", hint="name another run")
    checkpoint.verify(path)
    step = int(path.name.removeprefix("step-"))
    decay = decay_steps or recipe.optimizer.decay_steps or max(1, recipe.train.steps // 5)
    if recipe.optimizer.schedule not in ("wsd", "constant"):
        raise UserError(
            f"{origin}: its schedule is {recipe.optimizer.schedule}, whose learning rate falls from the start",
            hint="branch from a run with optimizer.schedule wsd or constant",
        )
    stable = recipe.train.steps - (recipe.optimizer.decay_steps or max(1, recipe.train.steps // 5))
    if recipe.optimizer.schedule == "wsd" and step > stable:
        raise UserError(
            f"{path}: its learning rate falls already (since step {stable})",
            hint=f"name one up to step {stable}",
        )
    recipe = recipe.replace("train", steps=step + decay).replace(
        "optimizer", schedule="wsd", decay_steps=decay
    )
    return _begin(run, recipe, watcher, world, path)


def _begin(
    run: Path, recipe: Recipe, watcher: Watcher | None, world: World, start: Path | None
) -> Outcome:
    recipe.check()
    data = open_data(recipe, world)
    recipe = recipe.replace("data", path=str(Path(recipe.data.path).resolve()))
    recipe = Recipe.from_dict(
        world.broadcast(resolve(recipe, world.device).to_dict() if world.main else None)
    )
    trainer = Trainer(recipe, data, watcher, world)
    trainer.loader()  # complains about data too short for one batch before anything is written
    if start is not None:
        trainer.restore(start, allow_data_change=False)
    if world.main:
        environment = device.describe(trainer.device) | {
            "precision": recipe.train.precision,
            "compile": recipe.train.compile,
            "processes": world.size,
            "data_fingerprint": data.fingerprint,
            "started": now(),
        }
        if start is not None:
            environment["branched_from"] = str(start.resolve())
        create(run, recipe, environment)
    with locked(run) if world.main else contextlib.nullcontext(), StopRequest() as stop:
        world.barrier("the beginning of the run")
        return trainer.fit(run, stop)


def resume(
    run: Path, watcher: Watcher | None = None, world: World | None = None, changes: Recipe | None = None,
    allow_data_change: bool = False,
) -> Outcome:  # fmt: skip
    """Go on with a run from its newest checkpoint that verifies, or from its start when it has none.

    The run's own recipe holds; `changes` may differ from it in what CHANGEABLE lists. `UserError` when the data or the
    tokenizer changed since; with `allow_data_change` the new data are read from their beginning.
    """
    world, watcher = world or World(device=device.pick_device()), watcher or Watcher()
    recipe = read_recipe(run)
    if changes is not None:
        recipe = merged(recipe, changes, run)
    recipe.check()
    with locked(run) if world.main else contextlib.nullcontext(), StopRequest() as stop:
        path = None
        if world.main:
            path, rejected = checkpoint.newest_valid(run)
            for line in rejected:
                watcher.said(f"rejected: {line}")
            if rejected and path is None:
                raise UserError(
                    f"{run}: no checkpoint verifies: {rejected[0]}", hint="start a new run"
                )
            for bad in checkpoint.complete(run):  # out of the way, under a name that says why
                if path is not None and bad.name > path.name:
                    aside = bad.with_name(f"rejected-{bad.name}")
                    shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
                    bad.rename(aside)
        path = world.broadcast(path)
        data = open_data(recipe, world)
        trainer = Trainer(recipe, data, watcher, world)
        if path is not None:
            trainer.restore(path, allow_data_change)
        if world.main:
            Metrics(run).rewind(trainer.state.step)
        world.barrier("the beginning of the run")
        return trainer.fit(run, stop)


def merged(own: Recipe, changes: Recipe, run: Path) -> Recipe:
    """The run's own recipe with what may change taken from `changes`. `UserError` names what else differs."""
    mine, given = own.to_dict(), changes.to_dict()
    given["data"]["path"] = (
        str(Path(given["data"]["path"]).resolve())
        if given["data"]["path"]
        else mine["data"]["path"]
    )
    differing = []
    for section, values in given.items():
        for key in values.keys() | mine[section].keys():
            new, old = values.get(key), mine[section].get(key)
            if new == old or new == "auto":  # "auto" was resolved when the run began
                continue
            if key in CHANGEABLE.get(section, ()):
                mine[section][key] = new
            else:
                differing.append(f"{section}.{key} is {old!r} there, {new!r} here")
    if differing:
        raise UserError(
            f"{run}: another recipe began this run ({'; '.join(sorted(differing))})",
            hint="resume it with its own recipe, or choose another --out",
        )
    return Recipe.from_dict(mine)
