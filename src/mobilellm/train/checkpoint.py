"""Checkpoints of a run: complete or absent, checksummed, and themselves folders that other tools load.

    step-00001000/
      config.json model.safetensors generation_config.json tokenizer.json ...   <- loads in transformers as it stands
      train_state/optimizer.safetensors   <- moments and momenta, by parameter name
      train_state/state.json              <- step, tokens, data position, random state
      checksums.json                      <- size and SHA-256 of every file above; written last

Nothing is pickled. A checkpoint is read only after its checksums hold.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobilellm.data.loader import DataState
from mobilellm.errors import UserError
from mobilellm.files import check_file, new_folder, read_json, sha256_file, write_json
from mobilellm.interop.checkpoint import save_checkpoint
from mobilellm.model.network import Network
from mobilellm.model.weights import load_weights

if TYPE_CHECKING:
    from mobilellm.data.tokenizer import Tokenizer

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, beside its weights and moments."""

    step: int
    """Optimiser steps done."""
    tokens: int
    """Tokens trained on."""
    data: DataState
    """Position in the data: of all processes together, not of one."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-00001000."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    run: Path, state: TrainState, network: Network, optimizers: list[torch.optim.Optimizer], tokenizer: Tokenizer,
    origin: dict[str, Any],
) -> Path:  # fmt: skip
    """Write the checkpoint of `state.step`; under its name only once it is complete and synced."""
    path = checkpoint_folder(run, state.step)
    if path.exists():  # a resumed run that comes by here again has the same bits
        return path
    with new_folder(path) as staging:
        save_checkpoint(staging, network, tokenizer, origin)
        inner = staging / "train_state"
        inner.mkdir()
        save_file(_optimizer_tensors(network, optimizers) | {"torch_rng": torch.get_rng_state()}, inner / "optimizer.safetensors")
        write_json(
            inner / "state.json",
            {"format": FORMAT, "step": state.step, "tokens": state.tokens, "data": state.data.__dict__},
        )
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        write_json(
            staging / "checksums.json",
            {str(p.relative_to(staging)): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files},
        )
    return path


def verify(path: Path) -> None:
    """`UserError` unless every file of the checkpoint has the size and SHA-256 it was written with."""
    listed = read_json(path / "checksums.json", limit=1 << 20)
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{path}/checksums.json: lists no files")
    for name, entry in listed.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(entry, dict):
            raise UserError(f"{path}/checksums.json: {name!r} is not a file of this checkpoint")
        check_file(path / name, size=entry.get("size", -1), sha256=entry.get("sha256", ""))


def load(path: Path, network: Network, optimizers: list[torch.optim.Optimizer]) -> TrainState:
    """Put a verified checkpoint's weights, moments and random state in place; returns where the run stood."""
    load_weights(network, load_file(path / "model.safetensors"), str(path / "model.safetensors"))
    tensors = load_file(path / "train_state" / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("torch_rng"))
    _restore_optimizer(network, optimizers, tensors, str(path))
    state = read_json(path / "train_state" / "state.json", limit=1 << 20)
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: training state of format {state.get('format')!r}, this version reads {FORMAT}")
    return TrainState(step=state["step"], tokens=state["tokens"], data=DataState(**state["data"]))


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or none; and a line for each newer one that had to be rejected."""
    rejected: list[str] = []
    for path in reversed(complete(run)):
        try:
            verify(path)
        except UserError as error:
            rejected.append(str(error))
        else:
            return path, rejected
    return None, rejected


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints; 0 keeps all."""
    for path in complete(run)[:-keep] if keep else []:
        doomed = path.with_name(f".{path.name}.partial-removed")
        path.rename(doomed)  # gone from its name at once, so that no half-removed checkpoint is ever found
        shutil.rmtree(doomed)


def _optimizer_tensors(network: Network, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """ "PARAMETER/KEY" -> tensor, over all optimisers."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value.detach().clone().contiguous()
        for optimizer in optimizers
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def _restore_optimizer(network: Network, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor], where: str) -> None:
    names = {id(p): name for name, p in network.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = names[id(parameter)] + "/"
                # Taken out by hand: load_state_dict numbers parameters by their order, and casts what it takes.
                entry = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
                for key, value in entry.items():
                    if value.ndim and value.shape != parameter.shape:
                        raise UserError(f"{where}: optimiser state {prefix}{key} has shape {tuple(value.shape)}")
                    entry[key] = value.to(parameter.device) if value.ndim else value
                optimizer.state[parameter] = entry
