"""A quantized model: which weights lie on the grid, by which scheme and method.

    quantized = read(folder, network)              # None where the checkpoint is not quantized
    quantized.weights["layers.0.self_attn.qkv_proj.weight"].integers
    quantized.save(folder, network.config)

A quantized checkpoint is an ordinary one, whose float weights lie on the grid, with two files
beside them: `quantization.json` says scheme, method, calibration and what lies on which grid, and
`quantization.safetensors` holds the scales under the names that the weights have on disk. The
integers follow from weights and scales, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mobilellm.errors import UserError, first_line, unknown_name
from mobilellm.files import read_json, write_json
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import stacks, write_tensors
from mobilellm.quantize.grid import GridWeight, groups_of, on_grid
from mobilellm.quantize.schemes import SCHEMES, Scheme
from mobilellm.schema import checked

FORMAT_VERSION = 1
FACTS_FILE, SCALES_FILE = "quantization.json", "quantization.safetensors"
MAX_FACTS = 16 << 20  # bytes of quantization.json


class GridEntry(TypedDict):
    """A tensor in quantization.json."""

    bits: int
    group: int
    """Columns that share a scale."""


class FactsFile(TypedDict):
    """quantization.json."""

    format_version: int
    scheme: str
    method: str
    facts: dict[str, Any]
    grids: dict[str, GridEntry]
    """By the tensors' names on disk."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What of a network lies on the grid."""

    scheme: str
    """Key of SCHEMES."""
    method: str
    """How the integers were chosen: round, search, gptq, or training."""
    weights: Mapping[str, GridWeight]
    """By the name of the parameter in the network (`layers.0.mlp.down_proj.weight`)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is recorded: calibration text and hashes, versions."""

    @property
    def kind(self) -> Scheme:
        """The scheme's entry."""
        return SCHEMES[self.scheme]

    def with_scales(self, rounding: Callable[[Tensor], Tensor]) -> Quantized:
        """The same integers with their scales rounded: `rounding` takes and gives float32."""
        weights = {
            name: replace(weight, scales=rounding(weight.scales))
            for name, weight in self.weights.items()
        }
        return replace(self, weights=weights)

    def unrolled(self, order: Sequence[int]) -> Quantized:
        """As the network that has a block for each application; `order` says of which one
        (interop/repeats.py)."""
        return self._renumbered(lambda i: [at for at, block in enumerate(order) if block == i])

    def folded(self, repeats: int) -> Quantized:
        """As the network of which each `repeats` equal neighboring blocks became one."""
        return self._renumbered(lambda i: range(i // repeats, i // repeats + (i % repeats == 0)))

    def _renumbered(self, places: Callable[[int], Sequence[int]]) -> Quantized:
        weights: dict[str, GridWeight] = {}
        for name, weight in self.weights.items():
            match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
            if match is None:
                weights[name] = weight
                continue
            for i in places(int(match[1])):
                weights[f"layers.{i}.{match[2]}"] = weight
        return replace(self, weights=weights)

    def save(self, folder: Path, config: ModelConfig) -> None:
        """Write both files into a checkpoint's folder."""
        grids: dict[str, dict[str, int]] = {}
        scales: dict[str, Tensor] = {}
        for ours, parts in stacks(config).items():
            weight = self.weights.get(ours)
            if weight is None:
                continue
            pieces = weight.scales.split([rows for _, rows in parts])
            for (name, _), piece in zip(parts, pieces, strict=True):
                grids[name] = {"bits": weight.bits, "group": weight.group}
                short = piece.to(torch.bfloat16)
                scales[name] = (short if torch.equal(short.float(), piece) else piece).contiguous()
        write_tensors(folder / SCALES_FILE, scales)
        write_json(
            folder / FACTS_FILE,
            {
                "format_version": FORMAT_VERSION,
                "scheme": self.scheme,
                "method": self.method,
                "facts": self.facts,
                "grids": grids,
            },
        )


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Scheme, method and facts of a folder; None where nothing says that it is quantized."""
    if not (folder / FACTS_FILE).is_file():
        return None
    said = read_json(folder / FACTS_FILE, limit=MAX_FACTS)
    wanted = ("scheme", "method", "facts")
    return {key: said.get(key) for key in wanted} if isinstance(said, dict) else None


def read(folder: Path, network: Network, release: bool = False) -> Quantized | None:
    """What of the network read from `folder` lies on the grid; None where nothing says so. With
    `release` the parameters of what does are emptied one by one, for a network that is packed next
    (quantize/packed.py).

    `UserError` for files that are damaged, or that no longer belong to the weights.
    """
    where = folder / FACTS_FILE
    if not where.is_file():
        return None
    hint = "quantize the model again"
    damaged = UserError(f"{where}: damaged, or of another version", hint=hint)
    said = checked(read_json(where, limit=MAX_FACTS), FactsFile, str(where), hint=hint)
    if said["format_version"] != FORMAT_VERSION:
        raise damaged
    scheme, grids = said["scheme"], said["grids"]
    if scheme not in SCHEMES:
        raise unknown_name("scheme", scheme[:60], SCHEMES, str(where))
    scales = _read_scales(folder / SCALES_FILE)
    parameters = dict(network.named_parameters())
    weights: dict[str, GridWeight] = {}
    # From the last to the first: when the embedding's integers come, other floats are given back.
    for ours, parts in reversed(stacks(network.config).items()):
        names = [name for name, _ in parts]
        if not any(name in grids for name in names):
            continue
        bits = {grids[name]["bits"] if name in grids else 0 for name in names}
        if len(bits) != 1 or (one := bits.pop()) not in (4, 8):
            raise damaged
        columns = parameters[ours].shape[1]
        groups = groups_of(columns, one)
        for name, count in parts:
            found = scales.get(name)
            if found is None or not groups or found.shape != (count, groups):
                raise UserError(
                    f"{folder / SCALES_FILE}: the scales of {name} are missing or misshapen",
                    hint="quantize the model again",
                )
        together = torch.cat([scales[name] for name in names]).float()
        weights[ours] = on_grid(parameters[ours].detach(), together, one, f"{folder}: {ours}")
        if release:
            parameters[ours].data = torch.empty(0)
    in_order = dict(reversed(weights.items()))
    return Quantized(scheme=scheme, method=said["method"], weights=in_order, facts=said["facts"])


def _read_scales(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: missing", hint="quantize the model again")
    try:
        scales = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({first_line(error)})",
            hint="quantize the model again",
        ) from None
    for name, tensor in scales.items():
        if not tensor.is_floating_point() or tensor.ndim != 2 or not bool((tensor > 0).all()):
            raise UserError(
                f"{path}: the scales of {name} are not positive numbers",
                hint="quantize the model again",
            )
    return scales
