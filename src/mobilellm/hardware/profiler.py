"""torch's profiler, set up for one device. Its trace opens in chrome://tracing or Perfetto.

with profiler(device) as profile:
    network(input_ids)
profile.export_chrome_trace("profile.json")
"""

from __future__ import annotations

import torch


def profiler(device: torch.device) -> torch.profiler.profile:
    """A profiler of the host and, where there is one, the GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=kinds, record_shapes=True)
