"""Batches fetched one step ahead, by a thread, so that the device does not wait for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mobilellm.data.loader import Batch, DataState


class Prefetch:
    """Iterates over ((inputs, targets, documents, ...), state), tensors pinned where a GPU will
    take them; what follows the documents lies beside the stream."""

    def __init__(
        self, batches: Iterable[tuple[Batch, DataState]], device: torch.device, depth: int = 2
    ) -> None:
        self.device = device
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._fetch, args=(batches,), name="mobilellm-data", daemon=True
        )
        self._thread.start()

    def _fetch(self, batches: Iterable[tuple[Batch, DataState]]) -> None:
        pin = self.device.type == "cuda"
        try:
            for batch, state in batches:
                arrays = (batch.inputs, batch.targets, batch.documents, *batch.beside)
                tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
                item: Any = (
                    [t.pin_memory() if pin and t is not None else t for t in tensors],
                    state,
                )
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Wait for room; False once nobody fetches any more."""
        self._queue.put(item)  # `close` makes room
        return not self._ended.is_set()

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], DataState]]:
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            tensors, state = item
            yield tuple(None if t is None else self._move(t) for t in tensors), state

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the thread, which may wait for room."""
        self._ended.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()
