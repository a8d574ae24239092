"""Our own network as a runtime: any model that `load` reads, with its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mobilellm.errors import UserError
from mobilellm.interop.huggingface import weight_files
from mobilellm.interop.load import load, recognize
from mobilellm.model.cache import KVCache
from mobilellm.model.network import Network
from mobilellm.runtimes.session import Runtime, check_ids
from mobilellm.tokenizer.tokenizer import Tokenizer


class NetworkSession:
    """A network and its cache."""

    def __init__(self, network: Network, context: int | None = None) -> None:
        """`UserError` when `context` exceeds the model's positions."""
        longest = network.config.max_position_embeddings
        if context is not None and not 1 <= context <= longest:
            raise UserError(f"context {context}: must be from 1 to the model's {longest} positions")
        self.network = network
        self.vocab_size = network.config.vocab_size
        self.context = context or longest
        eos = network.config.eos_token_id
        self.end_tokens = tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self.cache: KVCache | None = None

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says."""
        check_ids(ids, self.cache.length if self.cache is not None else 0, self)
        if self.cache is None:
            like = self.network.norm.weight
            self.cache = KVCache(self.network.config, 1, self.context, like=like)
        hidden = self.network.hidden(torch.tensor([list(ids)]), self.cache)[0, -1]
        return self.network.output(hidden).float().numpy()

    def reset(self) -> None:
        """As `Session` says."""
        if self.cache is not None:
            self.cache.length = 0

    def close(self) -> None:
        """As `Session` says."""
        self.cache = None


def _recognizes(path: Path) -> bool:
    """Whether a model of ours lies there; a folder needs weights beside its config.json, since the
    folders of other runtimes have such a file, too."""
    try:
        _, where = recognize(path)
        return not where.is_dir() or bool(weight_files(where))
    except UserError:
        return False


def _read_tokenizer(path: Path) -> Tokenizer | None:
    reader, where = recognize(path)
    return reader.read_tokenizer(where)


def _open(path: Path, context: int | None, threads: int | None) -> NetworkSession:
    if threads is not None:
        torch.set_num_threads(threads)
    return NetworkSession(load(path).as_run, context)


RUNTIME = Runtime(
    name="mobilellm",
    what="our own network, in torch",
    package="torch",
    extra="",
    recognizes=_recognizes,
    open=_open,
    read_tokenizer=_read_tokenizer,
    imports=("torch._dynamo",),  # by operations on tensors without storage
)
