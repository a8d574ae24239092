"""What a teacher says of training data, once: for every token the k likeliest ones before it came.

    make_cache(out, teacher, data, sequence_length=2048, top_k=32)
    cache = TeacherCache.open(out, data, sequence_length=2048, mask_documents=False, vocab_size=512)
    stream.beside = cache.beside["wiki"]

A token takes k ids of 2 bytes (4 above 65,536 tokens) and k + 1 log-probabilities of 2 bytes, the
last one of all other tokens together: 130 bytes with k = 32. The teacher sees what the student will
see: samples of the same length, cut at the same places, at multiples of the length from each
source's beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm.data.dataset import Data
from mobilellm.data.loader import Samples
from mobilellm.data.shard_file import token_dtype
from mobilellm.derived.parts import ArrayFile, Folder, Part, make, network_sha256
from mobilellm.errors import UserError
from mobilellm.model.linear import linear
from mobilellm.model.loss import chunk_rows, products_dtype
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision

KIND = "distributions of a teacher"
PART_TOKENS = 1 << 20
BATCH_TOKENS = 8192
LOG_PROBABILITIES = np.dtype("<f2")
MAKE_AGAIN = "make one for this run: mobilellm distill"


def make_cache(
    out: Path,
    teacher: Network,
    data: Data,
    *,
    sequence_length: int,
    top_k: int = 32,
    mask_documents: bool = False,
    temperature: float = 1.0,
    precision: Precision = Precision.FP32,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make the folder `out`, on the teacher's device; returns its facts.

    What a stopped start computed is taken over. `UserError` for a k that the vocabulary does not
    have, a length beyond the teacher's context, and data shorter than a sample.
    """
    rows, context = teacher.config.vocab_size, teacher.config.max_position_embeddings
    if not 1 <= top_k <= rows:
        raise UserError(f"top-k {top_k}: must be from 1 to the vocabulary's {rows}")
    if not 1 <= sequence_length <= context:
        raise UserError(
            f"sequence length {sequence_length}: the teacher's context is {context}",
            hint="shorten --sequence-length; data.sequence_length of the run must be the same",
        )
    if not temperature > 0:
        raise UserError(f"temperature {temperature:g}: must be above 0")
    facts: dict[str, Any] = {
        "kind": KIND,
        "teacher": network_sha256(teacher),
        "tokenizer": data.tokenizer().sha256,
        "data": data.fingerprint,
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "vocab_size": rows,
        "sequence_length": sequence_length,
        "mask_documents": mask_documents,
        "top_k": top_k,
        "temperature": temperature,
        "precision": precision.value,
    }
    plan = list(_parts(data, facts))
    facts["tokens"] = sum(len(numbers) for _, numbers, _ in plan) * sequence_length

    def compute(number: int) -> list[NDArray[Any]]:
        source, numbers, _ = plan[number]
        samples = Samples(data.tokens("train", source), sequence_length)
        found: list[tuple[NDArray[Any], NDArray[Any]]] = []
        size = max(1, BATCH_TOKENS // sequence_length)
        for start in range(numbers.start, numbers.stop, size):
            some = np.arange(start, min(start + size, numbers.stop))
            batch = samples.gather(samples.places(some), mask_documents)
            found.append(
                _likeliest(teacher, batch.inputs, batch.documents, top_k, temperature, precision)
            )
        return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]

    make(out, facts, [files for _, _, files in plan], compute, progress)
    return facts


def _parts(data: Data, facts: dict[str, Any]) -> Iterator[tuple[str, range, Part]]:
    """(source, the numbers of its samples, the files) of every part."""
    length, k = facts["sequence_length"], facts["top_k"]
    size = max(1, PART_TOKENS // length)
    dtype = token_dtype(facts["vocab_size"])
    for place, source in enumerate(data.sources()):
        count = Samples(data.tokens("train", source), length).count
        for number, start in enumerate(range(0, count, size)):
            numbers = range(start, min(start + size, count))
            name, tokens = f"{place:03d}-{number:05d}", len(numbers) * length
            files = (
                ArrayFile(f"{name}.ids.npy", dtype, tokens * k),
                ArrayFile(f"{name}.logp.npy", LOG_PROBABILITIES, tokens * (k + 1)),
            )
            yield source, numbers, files


@torch.no_grad()
def _likeliest(
    teacher: Network,
    inputs: NDArray[np.int64],
    documents: NDArray[np.int32] | None,
    top_k: int,
    temperature: float,
    precision: Precision,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The likeliest tokens after each of `inputs` (B, T), (B, T, k), and the log-probabilities of
    these and of all others together, (B, T, k + 1)."""
    device = next(teacher.parameters()).device
    ids: list[Tensor] = []
    scores: list[Tensor] = []
    with precision.autocast(device):
        seen = None if documents is None else torch.from_numpy(documents).to(device)
        hidden = teacher.hidden(torch.from_numpy(inputs).to(device), documents=seen).flatten(0, 1)
        dtype = products_dtype(hidden)
    weight = teacher.output_weight.to(dtype)
    for part in hidden.to(dtype).split(chunk_rows(len(weight), device.type)):
        logits = linear(part, weight).float() / temperature
        total = logits.logsumexp(dim=1, keepdim=True)
        values, index = logits.topk(top_k, dim=1)
        # Not 1 - the sum, which would lose a small rest to rounding; -inf where nothing is left.
        rest = logits.scatter_(1, index, -torch.inf).logsumexp(dim=1, keepdim=True)
        ids.append(index.cpu())
        scores.append((torch.cat((values, rest), dim=1) - total).cpu())
    shape = inputs.shape
    return (
        torch.cat(ids).view(*shape, top_k).numpy().astype(token_dtype(len(weight))),
        torch.cat(scores).view(*shape, top_k + 1).numpy().astype(LOG_PROBABILITIES),
    )


class CachedRows:
    """A source's part of a cache, read beside its stream."""

    def __init__(self, arrays: list[tuple[NDArray[Any], NDArray[Any]]], size: int) -> None:
        """`arrays` are the parts' (samples, T, k) and (samples, T, k + 1), `size` samples each but
        for the last."""
        self.arrays, self.size = arrays, size
        self.rows = tuple((array.shape[1:], array.dtype) for array in arrays[0])

    def read(self, sample: int) -> tuple[NDArray[Any], ...]:
        """What the teacher says of a sample."""
        part, place = divmod(sample, self.size)
        ids, scores = self.arrays[part]
        return ids[place], scores[place]


class TeacherCache:
    """A cache, opened for a run."""

    def __init__(self, folder: Folder, data: Data) -> None:
        self.facts = folder.facts
        """What it was made from, as `make_cache` returns it."""
        length, k = self.facts["sequence_length"], self.facts["top_k"]
        arrays: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
        for source, numbers, (ids, scores) in _parts(data, self.facts):
            shape = (len(numbers), length)
            arrays.setdefault(source, []).append(
                (
                    np.asarray(folder.array(ids.name)).reshape(*shape, k),
                    np.asarray(folder.array(scores.name)).reshape(*shape, k + 1),
                )
            )
        size = max(1, PART_TOKENS // length)
        self.beside = {source: CachedRows(found, size) for source, found in arrays.items()}
        """What lies beside the training tokens of each source."""

    @classmethod
    def open(
        cls,
        path: Path,
        data: Data,
        *,
        sequence_length: int,
        mask_documents: bool,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> TeacherCache:
        """Open a cache, comparing all checksums, for a run of these settings on `data`. `UserError`
        when it is damaged, or was made for another tokenizer, other data or other settings."""
        folder = Folder.open(path)
        wanted = {
            "kind": KIND,
            "tokenizer": data.tokenizer().sha256,
            "data": data.fingerprint,
            "vocab_size": vocab_size,
            "sequence_length": sequence_length,
            "mask_documents": mask_documents,
            "temperature": temperature,
        }
        folder.check(wanted, MAKE_AGAIN)
        return cls(folder, data)
