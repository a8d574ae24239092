"""Results of requests on disk, so that an interrupted evaluation continues where it stopped.

    with ResultCache(folder / "hellaswag.jsonl") as cache:
        cache.add(requests, results)

One line a request, appended batch by batch: its hash, which covers tokens and what is scored of
them, and its result. A line torn by a crash is dropped and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import orjson

from mobilellm.files import disk_errors
from mobilellm.tasks.engine import Engine
from mobilellm.tasks.requests import Request, Result

Progress = Callable[[int, int], None]


class ResultCache:
    """Results by request, kept in one file. The model and its precision are part of the path, by
    whoever chooses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Result] = {}
        self.file: BinaryIO | None = None

    def __enter__(self) -> ResultCache:
        whole = 0  # bytes of complete lines
        if self.path.is_file():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for line in content[:whole].splitlines():
                try:
                    key, value, greedy = orjson.loads(line)
                    self.found[str(key)] = Result(float(value), bool(greedy))
                except (orjson.JSONDecodeError, ValueError, TypeError):
                    continue  # not ours; its request is computed again
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")
            self.file.truncate(whole)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def get(self, request: Request) -> Result | None:
        """The result of an earlier run."""
        return self.found.get(request.key)

    def add(self, requests: Sequence[Request], results: Sequence[Result]) -> None:
        """Keep results; they are in the system's hands when this returns."""
        assert self.file is not None, "used outside its with block"
        with disk_errors(self.path):
            for request, result in zip(requests, results, strict=True):
                self.file.write(
                    orjson.dumps([request.key, result.loglikelihood, result.greedy]) + b"\n"
                )
            self.file.flush()
        self.found.update(
            (request.key, result) for request, result in zip(requests, results, strict=True)
        )


def score_cached(
    engine: Engine,
    requests: Sequence[Request],
    keys: Sequence[Hashable],
    cache: ResultCache | None,
    progress: Progress | None = None,
) -> list[Result]:
    """Results of all requests; what the cache knows is taken from it, and what is new is added.

    Requests with equal `keys` belong to one item; `progress(done, total)` counts items.
    """
    known = {request: hit for request in requests if cache and (hit := cache.get(request))}
    rest = [
        (request, key) for request, key in zip(requests, keys, strict=True) if request not in known
    ]
    total, left = len(set(keys)), len({key for _, key in rest})

    def update(done: int, of: int) -> None:
        if progress:
            progress(total - left + round(left * done / of), total)

    fresh = engine.score(
        [request for request, _ in rest],
        [key for _, key in rest],
        store=cache.add if cache else None,
        progress=update,
    )
    known.update(zip((request for request, _ in rest), fresh, strict=True))
    return [known[request] for request in requests]
