"""The processes of a run: who this one is, how they agree, and who is missing.

    with World.join(timeout=600) as world:     # one process, or those that torchrun started
        world.rank, world.size, world.device

Gradients travel over NCCL on GPUs and gloo on CPUs. Small agreements (stop now, that checkpoint
failed) travel over a gloo group of their own, so that they never wait for a device.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from mobilellm.errors import UserError, first_line


@dataclass
class World:
    """One process among `size`."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None
    """Gloo group of the small agreements; none for a single process."""
    saving: Any = None
    """Gloo group of the checkpoint writers, which work beside the training."""
    timeout: float = 600.0
    watchdog: Watchdog | None = None
    _pending: tuple[Any, torch.Tensor] | None = field(default=None, repr=False)

    @classmethod
    @contextlib.contextmanager
    def join(cls, timeout: float = 600.0) -> Iterator[World]:
        """This process alone, or the world that torchrun's environment describes; left again at the
        end of the block.

        `UserError` when others do not come within `timeout` seconds, or there are fewer GPUs than
        processes here.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls(device=_device(0), timeout=timeout)
            return
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"WORLD_SIZE is set, but {error} is not a rank",
                hint="start several processes with torchrun",
            ) from None
        # The backends' own limit comes after the watchdog's, which knows whom to name.
        device, limit = _device(local_rank), datetime.timedelta(seconds=1.5 * timeout + 5)
        try:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=_store(rank, size, limit), rank=rank, world_size=size, timeout=limit
            )
        except dist.DistError as error:
            raise UserError(
                f"rank {rank}: not all {size} processes came within {limit.seconds} s "
                f"({first_line(error)})",
                hint="start every node, with the same --nnodes and rendezvous",
            ) from None
        world = cls(device=device, rank=rank, size=size, local_rank=local_rank, timeout=timeout)
        try:
            world.control, world.saving = (
                dist.new_group(backend="gloo", timeout=limit) for _ in range(2)
            )
            world.watchdog = Watchdog(rank, size, timeout)
            world.watchdog.start()
            yield world
        except UserError as error:
            world._tell_once(error)
            raise
        except RuntimeError as error:
            if not any(
                sign in str(error)
                for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
            ):
                raise
            raise UserError(
                f"rank {rank}: another process of this job has ended",
                hint="look for its own message; --resume auto goes on",
            ) from error
        finally:
            if world.watchdog is not None:
                world.watchdog.stop()
            # After a fault others may be waiting for this one: the group is not destroyed, which
            # would wait too.
            if sys.exc_info()[0] is None:
                dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def beat(self, step: int) -> None:
        """Tell the others where this process is: at the beginning of `step`."""
        if self.watchdog is not None:
            self.watchdog.step = step

    def flag(self, value: int) -> int:
        """The largest `value` that any process gave at the call before this one: known everywhere
        at the same step.

        One call late, so that nobody waits: the numbers travel while a step is computed. A single
        process has its own at once.
        """
        if self.size == 1:
            return value
        agreed = 0
        if self._pending is not None:
            work, tensor = self._pending
            work.wait()
            agreed = int(tensor)
        tensor = torch.tensor(value)
        self._pending = (
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control, async_op=True),
            tensor,
        )
        return agreed

    def settle_flag(self) -> None:
        """Wait for the last `flag`, before other agreements or the end."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a small device tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def smallest(self, value: int) -> int:
        """The smallest `value` of all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.control)
        return int(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain data), everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def after_main(self, what: str, done: bool = False) -> None:
        """Wait, however long it takes, until rank 0 has called this with `done` for the same
        `what`."""
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        if done:
            store.set(f"mobilellm/done/{what}", "1")
        while not store.check([f"mobilellm/done/{what}"]):
            time.sleep(0.2)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in this block may take longer than a step is allowed to."""
        if self.watchdog is not None:
            self.watchdog.paused = True
        try:
            yield
        finally:
            if self.watchdog is not None:
                self.watchdog.paused = False

    def barrier(self, what: str) -> None:
        """Wait for all processes. `UserError` names those that did not come to `what` in time."""
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(
                self.control, timeout=datetime.timedelta(seconds=self.timeout), wait_all_ranks=True
            )
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank} waited in vain at {what}: {first_line(error)}"
            ) from None

    def _tell_once(self, error: UserError) -> None:
        """Of equal complaints of several processes only the first to arrive is to be printed."""
        with contextlib.suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            error.said = store.add(f"mobilellm/said/{error}", 1) > 1
        if not error.said:
            error.what = f"rank {self.rank}: {error.what}" if not self.main else error.what
            error.args = (f"{error.what}; {error.hint}" if error.hint else error.what,)


def _store(rank: int, size: int, limit: datetime.timedelta) -> Any:
    """The rendezvous store, under a prefix of this start of the job.

    torchrun's store outlives a restart, with the addresses of the processes before it (torch 2.13):
    those who read them first would call the dead.
    """
    address, port = (
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "29500")),
    )
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    mine = rank == 0 and not held_by_torchrun
    store = dist.TCPStore(address, port, size, is_master=mine, timeout=limit)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"mobilellm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU of its own "
            f"({torch.cuda.device_count()} here)",
            hint=f"use torchrun --nproc-per-node {torch.cuda.device_count()}",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


class Watchdog(threading.Thread):
    """Ends this process with a line naming the ranks that hang, when no step has begun for
    `timeout` seconds.

    Every process writes its step to the rendezvous store now and then; who waits in a collective
    can read there who has not come. The thread works while the main one is stuck inside a native
    call.
    """

    STATUS = 75  # sysexits' "try again later": a scheduler may start the job anew

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="mobilellm-watchdog", daemon=True)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.step = -1
        self.paused = False
        self._ended = threading.Event()
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own: the main thread may hold the other one while it waits.
        self.store: Any = store.clone()  # type: ignore[attr-defined]

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()

    def run(self) -> None:
        seen, since = -2, time.monotonic()
        while not self._ended.wait(min(2.0, self.timeout / 5)):
            if self.step != seen or self.paused:
                seen, since = self.step, time.monotonic()
                with contextlib.suppress(Exception):
                    self.store.set(f"mobilellm/step/{self.rank}", str(self.step))
            elif time.monotonic() - since > self.timeout:
                print(
                    f"mobilellm: {self.complaint(time.monotonic() - since)}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(self.STATUS)

    def complaint(self, waited: float) -> str:
        """The processes that have not come, in one line."""
        steps = {self.rank: self.step}
        for rank in range(self.size):
            key = f"mobilellm/step/{rank}"
            with contextlib.suppress(Exception):
                if rank != self.rank and self.store.check(
                    [key]
                ):  # asking for what is not there would wait for it
                    steps[rank] = int(self.store.get(key))
        behind = [rank for rank in range(self.size) if steps.get(rank, -1) < max(steps.values())]
        line = f"rank {self.rank} has waited {waited:.0f} s in step {self.step + 1}"
        if behind:
            named = ", ".join(
                f"rank {rank} (last seen before step {steps.get(rank, -1) + 1})" for rank in behind
            )
            return f"{line} for {named}; the job ends here and can be resumed"
        together = "together with all others: a collective or the device hangs"
        return f"{line} {together}; the job ends here and can be resumed"
