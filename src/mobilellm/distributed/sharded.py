"""Tensors that FSDP2 has spread over the processes (DTensors), beside ordinary ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This process's share, in place; an ordinary tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, who must all ask; an ordinary one as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def whole(part: Tensor, like: Any) -> Tensor:
    """All processes' parts of a tensor that is sharded as `like` is."""
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return sharded.full_tensor()


def share(tensor: Tensor, like: Any) -> Tensor:
    """The part of a tensor known to every process that `like` holds here; all of it when `like` is
    not sharded."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(like, DTensor):
        return tensor
    replicated = DTensor.from_local(
        tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False
    )
    return replicated.redistribute(like.device_mesh, like.placements).to_local()
