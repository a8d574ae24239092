"""What a compiler does for a training step on a CPU, beside the blocks.

keep_little()                   # before blocks are compiled
compile_many_kinds()
with compiled_steps(True):      # losses and attention may have their own kernels compiled
    loss = network.loss(inputs, targets)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

MAX_KINDS = 1024
"""Of input that a function is compiled for."""

_compiled = False


@contextlib.contextmanager
def compiled_steps(on: bool) -> Iterator[None]:
    """In this block `steps_are_compiled` gives `on`."""
    global _compiled
    before, _compiled = _compiled, on
    try:
        yield
    finally:
        _compiled = before


def steps_are_compiled() -> bool:
    """Whether what runs outside of the blocks may be compiled: a run with train.compile does."""
    return _compiled


def keep_little() -> None:
    """Let the compiler keep less for the backward pass of what it compiles from now on: what a pass
    over memory makes anew (norms, SwiGLU's product, weights in bf16) is not kept, products and
    attention are. At 125M and 2,048 tokens it is a tenth of the peak, at no measurable cost
    (docs/log.md)."""
    import torch._functorch.config as config

    config.ban_recompute_materialized_backward = False
    config.ban_recompute_used_far_apart = False
    config.ban_recompute_long_fusible_chains = False


def compile_many_kinds() -> None:
    """Let the compiler make a block for each shape of network that a process trains. It stops after
    eight, and computes the next ones uncompiled, with no more than a warning."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, MAX_KINDS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, MAX_KINDS)
