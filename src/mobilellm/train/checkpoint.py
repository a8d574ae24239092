"""Checkpoints of a run: complete or absent, checksummed, written beside the training, and
folders that other tools load.

    step-00001000/
      config.json model.safetensors tokenizer.json ...   <- loads in transformers as it stands
      train_state/shard-00001-...safetensors   <- moments by parameter name, a file a process
      train_state/state.json                   <- step, tokens, data position, the guard's numbers
      checksums.json                           <- size and SHA-256 of every file above; written last

The optimizer's state goes through torch.distributed.checkpoint with its safetensors storage: any
number of processes and either parallelism reads what any other wrote, and nothing is pickled. A
checkpoint is read only after its checksums hold.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save as save_tensors_later
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from mobilellm.data.loader import DataState
from mobilellm.distributed.sharded import full, local, share
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.files import (
    PARTIAL,
    check_file,
    disk_errors,
    plain_name,
    publish,
    read_json,
    sha256_file,
    write_json,
)
from mobilellm.interop.folder import write_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import from_named, to_named
from mobilellm.optimizers.optimizer import empty_state
from mobilellm.recipe.recipe import Recipe
from mobilellm.schema import AtLeast, checked
from mobilellm.train.average import Average

if TYPE_CHECKING:
    from mobilellm.tokenizer.tokenizer import Tokenizer

FORMAT = 2
STATE_FILE = "train_state/state.json"
RECIPE_FILE = "train_state/recipe.toml"
"""The run's recipe once more, should its own file be damaged."""
warnings.filterwarnings(
    "ignore", "torch.distributed is disabled, unavailable or uninitialized"
)  # it says what no_dist asks for
MAX_STATE_BYTES = 1 << 20


class ChecksumEntry(TypedDict):
    """A file in checksums.json."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, beside its weights and moments."""

    step: Annotated[int, AtLeast(0)]
    """Optimizer steps done."""
    tokens: Annotated[int, AtLeast(0)]
    """Tokens trained on."""
    data: DataState
    """Position in the data: of all processes together, not of one."""
    guard: tuple[float, ...] = (0.0,) * 5
    """Statistics by which steps are skipped (optimizers/guard.py)."""
    skipped: int = 0
    """Steps skipped so far."""
    averaged: int = 0
    """Steps whose weights the average is made of, where there is one."""
    tokenizer_sha256: str = ""
    """Of the tokenizer that the data was made with."""
    micro_batch_size: Annotated[int, AtLeast(0)] = 0
    """Of the last step, where the recipe leaves it open; else 0."""
    device: str = ""
    """The type of what computed the last step, as "cuda"."""
    processes: Annotated[int, AtLeast(0)] = 0
    """That took the last step."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-00001000."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step-"))


class Saver:
    """Writes checkpoints of one run, one at a time, while the training goes on."""

    def __init__(self, run: Path, world: World, recipe: Recipe) -> None:
        """What is written when is the recipe's; it goes into each checkpoint."""
        self.run, self.world, self.recipe = run, world, recipe
        self.last: Path | None = None
        """The newest checkpoint that is complete on disk, as far as this process wrote it."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        state: TrainState,
        network: Network,
        optimizers: list[torch.optim.Optimizer],
        tokenizer: Tokenizer,
        origin: dict[str, Any],
        average: Average | None = None,
    ) -> str | None:
        """Take a copy of everything, and write it. All processes call this; rank 0 gets the failure
        of the one before, if any.

        With an average, that is what model.safetensors holds, and train_state has the network's
        own weights too.
        """
        failure = self.settle()
        path = checkpoint_folder(self.run, state.step)
        staging = path.with_name(f".{path.name}{PARTIAL}saving")
        # A resumed run that comes by a checkpoint it has already written has the same bits.
        begun = self.world.broadcast(self._begin(path, staging) if self.world.main else None)
        if begun != "ready":
            return failure or (begun or None)
        with average.applied() if average is not None else contextlib.nullcontext():
            named = self._copy_weights(network)
        # Each process writes what it holds; replicated tensors are divided among them. The copy is
        # made before this returns.
        writer = HuggingFaceStorageWriter(str(staging / "train_state"), save_distributed=True)
        tensors = _optimizer_tensors(network, optimizers) | {"torch_rng": torch.get_rng_state()}
        if state.averaged:
            tensors |= _own_weights(network)
        group = {"process_group": self.world.saving, "no_dist": self.world.size == 1}
        wait: Callable[[], Any]
        try:
            if self.recipe.train.async_checkpoints:
                wait = save_tensors_later(tensors, storage_writer=writer, **group).result  # type: ignore[union-attr]
            else:
                save_tensors(tensors, storage_writer=writer, **group)
                wait = _nothing
        except (CheckpointException, OSError) as error:
            wait = _raiser(error)

        def finish() -> None:
            try:
                with disk_errors(path):
                    _unwrapped(wait)
                    if self.world.main:
                        self._finish(path, staging, state, network.config, named, tokenizer, origin)
            except BaseException as error:
                self._failure = error
                if self.world.main:
                    shutil.rmtree(staging, ignore_errors=True)

        if self.recipe.train.async_checkpoints:
            self._thread = threading.Thread(target=finish, name="mobilellm-checkpoint")
            self._thread.start()
        else:
            finish()
            failure = failure or self.settle()
        return failure

    def settle(self) -> str | None:
        """Wait for the checkpoint that is being written. A line for what it could not write, on
        rank 0; a bug is raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.complaint()

    def complaint(self) -> str | None:
        """A line for a writing that has ended badly, once."""
        if self._failure is None or (self._thread is not None and self._thread.is_alive()):
            return None
        error, self._failure = self._failure, None
        if isinstance(error, (UserError, OSError)):
            return str(error) if self.world.main else None
        if self.world.main:
            raise error
        return None  # another process's failure reaches rank 0 through torch.distributed.checkpoint

    def _begin(self, path: Path, staging: Path) -> str:
        """Make room; "ready", "" when there is nothing to do, or what is wrong."""
        if path.exists():
            return ""
        try:
            with disk_errors(path):
                shutil.rmtree(staging, ignore_errors=True)
                (staging / "train_state").mkdir(parents=True)
        except (UserError, OSError) as error:
            return str(error)
        return "ready"

    def _copy_weights(self, network: Network) -> dict[str, Tensor]:
        """The weights under their names on disk, as copies in main memory; on rank 0 alone."""
        copies: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters():
            gathered = full(parameter.detach())
            if self.world.main:
                copies[name] = gathered.to("cpu", copy=True)
        return to_named(network.config, copies) if self.world.main else {}

    def _finish(
        self,
        path: Path,
        staging: Path,
        state: TrainState,
        config: ModelConfig,
        named: dict[str, Tensor],
        tokenizer: Tokenizer,
        origin: dict[str, Any],
    ) -> None:
        write_checkpoint(staging, config, named, tokenizer, origin)
        write_json(
            staging / STATE_FILE,
            {"format": FORMAT} | state.__dict__ | {"data": state.data.to_dict()},
        )
        self.recipe.write(staging / RECIPE_FILE)
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        write_json(
            staging / "checksums.json",
            {
                str(p.relative_to(staging)): {"size": p.stat().st_size, "sha256": sha256_file(p)}
                for p in files
            },
        )
        publish(staging, path)
        self.last = path
        train = self.recipe.train
        prune(self.run, train.keep_checkpoints, train.keep_every)


def _nothing() -> None:
    pass


def _raiser(error: BaseException) -> Callable[[], Any]:
    def wait() -> None:
        raise error

    return wait


def _unwrapped(wait: Callable[[], Any]) -> None:
    """Wait, and raise the first failure of any process as it was raised there."""
    try:
        wait()
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def verify(path: Path) -> None:
    """`UserError` unless every file of the checkpoint has the size and SHA-256 it was written
    with."""
    where = path / "checksums.json"
    files = checked(read_json(where, limit=MAX_STATE_BYTES), dict[str, ChecksumEntry], str(where))
    if "model.safetensors" not in files or STATE_FILE not in files:
        raise UserError(f"{where}: does not list the files of a checkpoint")
    for name, entry in files.items():
        if not plain_name(name):
            raise UserError(f"{where}: {name!r:.200} is not a file of this checkpoint")
        check_file(path / name, size=entry["size"], sha256=entry["sha256"])


def read_state(path: Path) -> TrainState:
    """Where the run stood at a verified checkpoint. `UserError` for another format's."""
    values = read_json(path / STATE_FILE, limit=MAX_STATE_BYTES)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(
            f"{path}: its training state is not of format {FORMAT}, which this version reads",
            hint="start a new run",
        )
    checked(values, TrainState, str(path / STATE_FILE))
    guard = tuple(values.get("guard", TrainState.guard))
    if len(guard) != len(TrainState.guard):
        raise UserError(f"{path / STATE_FILE}: guard has {len(guard)} numbers")
    return TrainState(**values | {"data": DataState.from_dict(values["data"]), "guard": guard})


def load(
    path: Path,
    network: Network,
    optimizers: list[torch.optim.Optimizer],
    average: Average | None = None,
) -> None:
    """Put a verified checkpoint's weights, moments, average and random state in place.

    `UserError` for a checkpoint of another model or another optimizer.
    """
    saved, own = ModelConfig.read(path / "config.json"), network.config
    if saved != own:
        before, now = saved.to_dict(), own.to_dict()
        changed = ", ".join(
            f"{k} {before.get(k)!r} there, {now.get(k)!r} here"
            for k in now
            if now[k] != before.get(k)
        )
        raise UserError(
            f"{path}: a checkpoint of another model ({changed})",
            hint="resume the run it belongs to",
        )
    state = from_named(own, read_weights(path), str(path / "model.safetensors"))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            local(parameter).copy_(share(state[name].to(parameter.device), parameter))
    del state
    averaged = read_state(path).averaged
    if average is not None:
        average.restore(averaged)
    empty_state(optimizers)
    tensors = _optimizer_tensors(network, optimizers) | {
        "torch_rng": torch.empty_like(torch.get_rng_state())
    }
    if averaged:
        tensors |= _own_weights(network)
    try:
        load_tensors(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path / "train_state")),
            no_dist=True,
        )
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(
            f"{path}: the optimizer's state does not fit this recipe ({reason})",
            hint="keep optimizer.name",
        ) from None
    torch.set_rng_state(tensors["torch_rng"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, under their names on disk."""
    return load_file(path / "model.safetensors")


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or none; and a line for each newer one that had to be
    rejected."""
    rejected: list[str] = []
    for path in reversed(complete(run)):
        try:
            verify(path)
        except UserError as error:
            rejected.append(str(error))
        else:
            return path, rejected
    return None, rejected


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all but the `keep` newest checkpoints and those at multiples of `keep_every` steps;
    `keep` 0 keeps all."""
    for path in complete(run)[:-keep] if keep else []:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        doomed = path.with_name(f".{path.name}{PARTIAL}removed")
        path.rename(
            doomed
        )  # gone from its name at once, so that no half-removed checkpoint is ever found
        shutil.rmtree(doomed)


def _own_weights(network: Network) -> dict[str, Tensor]:
    """ "PARAMETER/value" -> the network's weights themselves, beside an average of them."""
    return {f"{name}/value": p.detach() for name, p in network.named_parameters()}


def _optimizer_tensors(
    network: Network, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """ "PARAMETER/KEY" -> tensor, over all optimizers; the very tensors, not copies."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach()
        for optimizer in optimizers
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
