"""A teacher read, compared with the data, and asked once.

facts = distill(Path("runs/large"), Path("data/book"), Path("caches/large-book"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm.data.dataset import open_dataset
from mobilellm.derived.teacher_cache import make_cache
from mobilellm.errors import UserError
from mobilellm.hardware.probes import pick_device
from mobilellm.model.precision import Precision
from mobilellm.train.origin import read_origin


def distill(
    teacher: Path,
    data: Path,
    out: Path,
    *,
    sequence_length: int = 256,
    top_k: int = 32,
    mask_documents: bool = False,
    temperature: float = 1.0,
    precision: str = "auto",
    tokenizer: Path | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make the cache `out` of what the model at `teacher` says of the training part of `data`;
    returns its facts.

    `tokenizer` is that of samples that have none beside them. `UserError` for a teacher of another
    tokenizer or vocabulary.
    """
    opened = open_dataset(data, tokenizer, verify=True)
    if opened.preferences is not None:
        raise UserError(f"{data}: pairs of answers", hint="a teacher speaks of text or chats")
    where = f"teacher {str(teacher)!r}"
    origin = read_origin(teacher, opened, where)
    config, added = origin.weights.config, origin.facts["added_rows"]
    if added:
        raise UserError(
            f"{where}: its vocabulary has {config.vocab_size - added} rows, the data's "
            f"{opened.vocab_size}",
            hint="a teacher gives a probability to every token: both need one vocabulary",
        )
    device = pick_device()
    kind = Precision.fast_on(device) if precision == "auto" else Precision(precision)
    return make_cache(
        out,
        origin.network().to(device),
        opened,
        sequence_length=sequence_length,
        top_k=top_k,
        mask_documents=mask_documents,
        temperature=temperature,
        precision=kind,
        progress=progress,
    )
