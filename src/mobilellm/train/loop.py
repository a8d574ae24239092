"""The training loop: fetch, forward and backward, step, record.

    trainer = Trainer(recipe, open_data(recipe))
    outcome = trainer.fit(Path("runs/mine"), stop)

`train/start.py` begins, resumes and branches runs. Ctrl-C, SIGTERM and SIGUSR1 end the step in
progress, save and return. A step whose loss or gradient is not finite, or a spike, is not taken;
several in a row stop the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobilellm.data.dataset import Data
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.mixture import Mixture
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.evaluate.perplexity import Score
from mobilellm.hardware.allocator import keep_freed_memory
from mobilellm.hardware.probes import peak_flops, pick_device
from mobilellm.hardware.profiler import profiler
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network, initialize
from mobilellm.model.precision import Precision
from mobilellm.model.weights import load_weights
from mobilellm.optimizers.transfer import scale_initial, transfer_factors
from mobilellm.quantize.training import fake_quantize
from mobilellm.recipe.recipe import Recipe
from mobilellm.records import MetricsRow, add_figures
from mobilellm.train import checkpoint
from mobilellm.train.average import Average
from mobilellm.train.batches import Prefetch
from mobilellm.train.checkpoint import Saver, TrainState
from mobilellm.train.evaluation import Evaluation
from mobilellm.train.inputs import Weights, batches, model_config
from mobilellm.train.interrupts import SIGNALS, StopRequest
from mobilellm.train.objective import build_objective
from mobilellm.train.rows import Recorder, SkippedTooOften, Watcher, stopped
from mobilellm.train.step import TrainStep

FIRST_PROFILED = 10  # steps of this process before the profile begins: compilation is over


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


class Trainer:
    """Network, optimizers and data of one run, in one process of a world."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        watcher: Watcher | None = None,
        world: World | None = None,
        weights: Weights | None = None,
    ) -> None:
        """Without `weights` the first ones are drawn from the recipe's seed."""
        self.recipe, self.data, self.watcher = recipe, data, watcher or Watcher()
        self.world = world or World(device=pick_device())
        if self.world.device.type == "cpu":
            keep_freed_memory()
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.config = model_config(recipe, data, weights.config if weights else None)
        self.costs = ModelCosts.of(self.config)
        # Weights are drawn on the CPU, so that every device and every process starts from the same
        # ones.
        torch.manual_seed(recipe.train.seed)
        self.network = Network(self.config, initialized=False)
        if weights is None:
            initialize(self.network, zero_residual=recipe.model.initial_residual == "zero")
            scale_initial(self.network, transfer_factors(self.network, recipe))
        elif weights.named is not None:
            load_weights(self.network, weights.named)
        self.network.to(self.device).drop(recipe.train.dropout)
        said = self.watcher.said if self.world.main else lambda _: None
        started = None  # the network as it was given, while it is
        if weights is not None and weights.named is not None:
            shares_anew = weights.config.applications != self.config.applications
            started = None if shares_anew else self.network
        with self.world.waiting():
            self.aim = build_objective(recipe, self.config, data, self.device, started, said)
        if recipe.quantize.scheme:
            fake_quantize(self.network, recipe.quantize.scheme, recipe.quantize.embedding)
        self.step = TrainStep(
            self.network, recipe, self.world, data.masked, self.watcher.said, self.aim.objective
        )
        self.average = Average(self.network, recipe.average) if recipe.average.kind else None
        self.evaluation = Evaluation(
            self.network,
            data,
            recipe,
            self.world,
            self.step.parallel.sharded,
            self.aim.reference,
        )
        self.state = TrainState(
            step=0,
            tokens=0,
            tokenizer_sha256=data.tokenizer().sha256,
            data=DataState(
                seed=recipe.train.seed, epoch=0, samples=0, fingerprint=data.fingerprint
            ),
        )
        self._peak = 0.0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    def loader(self) -> Loader | Mixture:
        """Batches of this process from where the run stands."""
        world = self.world
        place = (self.state.data, world.rank, world.size)
        return batches(self.recipe, self.data, *place, self.aim.beside, self.state.step)

    def peak_flops(self) -> float:
        """What the devices of all processes could do at best, FLOP/s: from the table of devices, or
        measured once."""
        if not self._peak:
            peak = peak_flops(self.device, Precision(self.recipe.train.precision).dtype)
            self._peak = peak * self.world.size
        return self._peak

    def restore(self, path: Path, allow_data_change: bool) -> None:
        """Go to where a verified checkpoint stands. `UserError` when data or tokenizer are not the
        ones it was trained on, or it is of another model."""
        state, data, where = checkpoint.read_state(path), self.data, self.recipe.data.path
        found = data.tokenizer().sha256
        if state.tokenizer_sha256 != found:
            raise UserError(
                f"{where}: the data changed since {path.name} was written: made with tokenizer "
                f"{found[:12]}, not {state.tokenizer_sha256[:12]}",
                hint="prepare them with the run's own tokenizer, which lies in the checkpoint",
            )
        if state.data.fingerprint != data.fingerprint:
            if not allow_data_change:
                raise UserError(
                    f"{where}: the data changed since {path.name} was written",
                    hint=(
                        "restore them, or go on with the new ones from their beginning: "
                        "--allow-data-change"
                    ),
                )
            self.watcher.said(
                f"{where}: other data than {path.name} was trained on; they are read from their "
                "beginning"
            )
            fresh = DataState(
                seed=state.data.seed,
                epoch=state.data.epoch + 1,
                samples=0,
                fingerprint=data.fingerprint,
            )
            state = dataclasses.replace(state, data=fresh)
        checkpoint.load(path, self.network, self.step.optimizers, self.average)
        self.state = state
        self._keep_micro_batch(state)

    def _keep_micro_batch(self, state: TrainState) -> None:
        """Go on with the micro-batch of the last step, where nothing but this process chose it and
        it fits: sums in another order are other bits."""
        before, found = state.micro_batch_size, self.step.batching.micro_batch_size
        alike = (state.device, state.processes) == (self.device.type, self.world.size)
        if self.recipe.train.micro_batch_size or not before or not alike:
            return
        if found < before:
            self.watcher.said(
                f"{before} sequences at a time do not fit any more: the micro-batch is {found}, "
                "and what follows differs in the last bits"
            )
        self.step.batching = self.step.batching.with_micro_batch(min(before, found))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """In this block the network has its averaged weights, where an average is kept."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def fit(self, run: Path, stop: StopRequest) -> Outcome:
        """Train from where the run stands to its last step, or until stopped."""
        return Fit(self, run, stop).to_the_end()


class Fit:
    """One process's part of a run: from where it stands to its last step, or until stopped."""

    def __init__(self, trainer: Trainer, run: Path, stop: StopRequest) -> None:
        self.trainer, self.run, self.stop = trainer, run, stop
        self.recipe, self.world, self.watcher = trainer.recipe, trainer.world, trainer.watcher
        self.saver = Saver(run, self.world, self.recipe)
        length = self.recipe.data.sequence_length
        self.recorder = Recorder(
            run,
            self.recipe,
            self.world,
            self.watcher,
            trainer.costs.flops_per_token(length),
            trainer.peak_flops,
            trainer.state.skipped,
        )
        self.made = 0
        """Steps of this process."""
        self.score: Score | None = None
        self.saved_step = -1
        self.profiler: Any = None

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.trainer.state.step

    def to_the_end(self) -> Outcome:
        """Every step that is left, then the last checkpoint."""
        trainer, watch, code = self.trainer, self.recorder.stopwatch, 0
        statistics = torch.tensor(trainer.state.guard, dtype=torch.float64)
        trainer.step.guard.state.copy_(statistics)
        if self.world.main:
            self.watcher.started(trainer, self.done)
        fetched = Prefetch(trainer.loader(), trainer.device)
        try:
            self.recorder.restart_clock()
            watch.mark("data")
            for batch, position in fetched:
                code = self.world.flag(self.stop.code)
                if self.done >= self.recipe.train.steps or code:
                    break
                if self.made == FIRST_PROFILED and self.recipe.train.profile_steps:
                    self.profiler = profiler(trainer.device)
                    self.profiler.start()
                self.take(batch, position)
                self.end_profile()
                self.pause()
                watch.mark("data")
        except SkippedTooOften as error:
            self.saver.settle()  # one checkpoint may still be on its way to the disk
            raise stopped(error, checkpoint.newest_valid(self.run)[0]) from None
        finally:
            fetched.close()
        return self.end(code)

    def take(self, batch: tuple[Any, ...], position: DataState) -> None:
        """One step; `position` is where the data stand after it."""
        trainer, watch = self.trainer, self.recorder.stopwatch
        step, before = self.done, trainer.state.data
        self.world.beat(step)
        watch.mark("compute")
        if self.recipe.train.dropout:  # a step draws alike however often the run was stopped
            place = step * self.world.size + self.world.rank
            torch.manual_seed((self.recipe.train.seed * 1_000_003 + place) % (1 << 63))
        loss = trainer.step.forward_backward(*batch)
        watch.mark("optimizer")
        norm, skipped = trainer.step.update(step, loss)
        if trainer.average is not None:
            trainer.average.update(step + 1)
        self.made += 1
        tokens = trainer.state.tokens + self.recipe.batch_tokens(step)
        trainer.state = dataclasses.replace(
            trainer.state,
            step=step + 1,
            tokens=tokens,
            data=position,
            micro_batch_size=0
            if self.recipe.train.micro_batch_size
            else trainer.step.batching.micro_batch_size,
            device=trainer.device.type,
            processes=self.world.size,
        )
        rate = trainer.step.learning_rate(step)
        row: MetricsRow = {"step": step + 1, "learning_rate": rate, "tokens": tokens}
        add_figures(row, {f"epochs/{name}": round(n, 4) for name, n in position.epochs().items()})
        self.recorder.add(loss, norm, skipped, row, before, trainer.step.figures)

    def pause(self) -> None:
        """What is due after this step: rows, the held-out loss, tasks, a checkpoint."""
        train, tasks, step = self.recipe.train, self.recipe.eval, self.done
        last = step == train.steps

        def due(every: int) -> bool:
            return last or bool(every and step % every == 0)

        evaluating, saving = due(train.evaluate_every), due(train.checkpoint_every)
        testing = bool(tasks.tasks) and due(tasks.every)
        if not (evaluating or saving or testing or step % train.log_every == 0):
            return
        rows = self.collect()
        with self.trainer.averaged():
            if evaluating:
                self.score = self.trainer.evaluation.held_out()
                rows[-1]["held_out_loss"] = self.score.loss
                rows[-1]["held_out_perplexity"] = self.score.perplexity
                rows[-1]["held_out_bits_per_byte"] = self.score.bits_per_byte
                add_figures(rows[-1], self.trainer.evaluation.sources())
                add_figures(rows[-1], self.trainer.evaluation.preferences())
            if testing:
                add_figures(rows[-1], self.trainer.evaluation.tasks(step))
        if saving:
            start = time.perf_counter()
            self.save()
            rows[-1]["checkpoint_seconds"] = round(time.perf_counter() - start, 6)
        elif line := self.saver.complaint():
            self.not_written(line)
        self.recorder.publish(rows)
        self.recorder.restart_clock()

    def collect(self) -> list[MetricsRow]:
        """The rows of the steps since the last time; what was skipped becomes part of the state."""
        rows = self.recorder.collect()
        state = self.trainer.state
        self.trainer.state = dataclasses.replace(state, skipped=self.recorder.skipped)
        return rows

    def end(self, code: int) -> Outcome:
        """Write what is not yet written, once all processes are here."""
        trainer = self.trainer
        if self.recorder.pending:
            self.recorder.publish(self.collect())
        self.world.settle_flag()
        with self.world.waiting():
            if self.saved_step != self.done:
                self.save()
            if line := self.world.broadcast(self.saver.settle()):
                good, _ = checkpoint.newest_valid(self.run)
                raise UserError(
                    f"the last checkpoint was not written: {line}; last good one: {good or 'none'}"
                )
            self.world.barrier("the end of the run")
        self.recorder.close()
        steps = self.recipe.train.steps
        return Outcome(
            run=self.run,
            step=self.done,
            steps=steps,
            tokens=trainer.state.tokens,
            checkpoint=checkpoint.checkpoint_folder(self.run, self.done),
            held_out=self.score,
            seconds=time.perf_counter() - self.recorder.begun,
            interrupted=SIGNALS[code - 1].name if code and self.done < steps else None,
        )

    def save(self) -> None:
        """Have a checkpoint written, and say so when the one before could not be."""
        trainer = self.trainer
        if self.world.main:
            self.recorder.metrics.sync()
        guard = tuple(trainer.step.guard.state.tolist())
        averaged = trainer.average.count if trainer.average is not None else 0
        trainer.state = dataclasses.replace(trainer.state, guard=guard, averaged=averaged)
        origin = {
            "made_by": "mobilellm train",
            "run": self.run.name,
            "step": self.done,
            "data_fingerprint": trainer.data.fingerprint,
            "preset": self.recipe.model.preset,
        }
        if self.recipe.quantize.scheme:
            # The weights are those before rounding: this says how they are meant to be rounded.
            origin["trained_for"] = {
                "scheme": self.recipe.quantize.scheme,
                "method": "round",
                "embedding": self.recipe.quantize.embedding,
            }
        if self.recipe.start.from_:
            origin["started_from"] = self.recipe.start.from_
        with self.world.waiting():
            line = self.saver.save(
                trainer.state,
                trainer.network,
                trainer.step.optimizers,
                trainer.data.tokenizer(),
                origin,
                trainer.average,
            )
        if line:
            self.not_written(line)
        self.saved_step = self.done

    def not_written(self, line: str) -> None:
        """A checkpoint that could not be written does not end the training, but is not to be
        overlooked."""
        self.watcher.said(
            f"CHECKPOINT NOT WRITTEN: {line}; training goes on, the checkpoints before it stand"
        )

    def end_profile(self) -> None:
        """Write the profile once its last step is made."""
        last = FIRST_PROFILED + self.recipe.train.profile_steps
        if self.profiler is not None and self.made == last:
            self.profiler.stop()
            trace = self.run / f"profile-rank{self.world.rank}.json"
            self.profiler.export_chrome_trace(str(trace))
            self.profiler = None
