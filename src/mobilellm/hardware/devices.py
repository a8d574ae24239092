"""The table of accelerators: peak rates, memory, power, and the document with the figures.

DEVICES["a100-80g"].bf16             # 312e12 FLOP/s, dense
recognize("NVIDIA H100 PCIe")        # DEVICES["h100-pcie"], from the name that torch gives
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobilellm.errors import unknown_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator. Rates are dense, without structured sparsity."""

    name: str
    """As torch.cuda.get_device_name has it, in part."""
    bf16: float
    """Peak FLOP/s of bf16 matrix products (fp16 where the device has no bf16)."""
    fp32: float
    """Peak FLOP/s of float32 matrix products (TF32 not counted)."""
    memory: float
    """Bytes of device memory."""
    bandwidth: float
    """Bytes a second of device memory."""
    watts: float
    """Board power."""
    source: str
    """Document with the figures."""

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s of products of numbers of this type."""
        return self.fp32 if dtype.itemsize == 4 else self.bf16


DEVICES = {
    "v100-32g": Device(
        name="V100", bf16=125e12, fp32=15.7e12, memory=32e9, bandwidth=900e9, watts=300,
        source="NVIDIA V100 datasheet (SXM2; fp16: it has no bf16)",
    ),
    "a100-40g": Device(
        name="A100-SXM4-40GB", bf16=312e12, fp32=19.5e12, memory=40e9, bandwidth=1555e9, watts=400,
        source="NVIDIA A100 datasheet (SXM)",
    ),
    "a100-80g": Device(
        name="A100-SXM4-80GB", bf16=312e12, fp32=19.5e12, memory=80e9, bandwidth=2039e9, watts=400,
        source="NVIDIA A100 datasheet (SXM)",
    ),
    "a100-80g-pcie": Device(
        name="A100 80GB PCIe", bf16=312e12, fp32=19.5e12, memory=80e9, bandwidth=1935e9, watts=300,
        source="NVIDIA A100 datasheet (PCIe)",
    ),
    "h100": Device(
        name="H100 80GB HBM3", bf16=989.4e12, fp32=66.9e12, memory=80e9, bandwidth=3350e9,
        watts=700, source="NVIDIA H100 datasheet (SXM5)",
    ),
    "h100-pcie": Device(
        name="H100 PCIe", bf16=756e12, fp32=51.2e12, memory=80e9, bandwidth=2000e9, watts=350,
        source="NVIDIA H100 datasheet (PCIe)",
    ),
    "h200": Device(
        name="H200", bf16=989.4e12, fp32=66.9e12, memory=141e9, bandwidth=4800e9, watts=700,
        source="NVIDIA H200 datasheet (SXM)",
    ),
    "l4": Device(
        name="L4", bf16=121e12, fp32=30.3e12, memory=24e9, bandwidth=300e9, watts=72,
        source="NVIDIA L4 datasheet",
    ),
    "a10": Device(
        name="A10", bf16=125e12, fp32=31.2e12, memory=24e9, bandwidth=600e9, watts=150,
        source="NVIDIA A10 datasheet",
    ),
    "l40s": Device(
        name="L40S", bf16=362e12, fp32=91.6e12, memory=48e9, bandwidth=864e9, watts=350,
        source="NVIDIA L40S datasheet",
    ),
    "rtx-3090": Device(
        name="RTX 3090", bf16=71e12, fp32=35.6e12, memory=24e9, bandwidth=936e9, watts=350,
        source="NVIDIA GA102 whitepaper (fp32 accumulation)",
    ),
    "rtx-4090": Device(
        name="RTX 4090", bf16=165.2e12, fp32=82.6e12, memory=24e9, bandwidth=1008e9, watts=450,
        source="NVIDIA Ada whitepaper (fp32 accumulation)",
    ),
}  # fmt: skip


def device(name: str) -> Device:
    """A device by its key, such as "h100". `UserError` for an unknown key names the nearest."""
    if name.lower() not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    return DEVICES[name.lower()]


def recognize(name: str) -> Device | None:
    """The device that torch calls `name`, or None. The longest match wins: an H100 PCIe is no SXM
    H100."""
    matching = [d for d in DEVICES.values() if all(part in name for part in d.name.split())]
    return max(matching, key=lambda d: len(d.name), default=None)
