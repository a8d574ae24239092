"""Our own network as a runtime: any model that `load` reads, with its cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mobilellm.decoding.decoder import Decoder, decoder_of
from mobilellm.decoding.library import fault as library_fault
from mobilellm.errors import UserError
from mobilellm.hardware.device_memory import empty_cache, use_huge_pages
from mobilellm.interop.huggingface import weight_files
from mobilellm.interop.load import load, recognize
from mobilellm.model.cache import KVCache
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.quantize.activations import rounded_activations
from mobilellm.quantize.packed import KERNEL_ROWS, pack
from mobilellm.runtimes.session import Runtime, check_ids
from mobilellm.tokenizer.tokenizer import Tokenizer


class NetworkSession:
    """A network and its cache. Single tokens are computed by decoding/decoder.py where it can, a
    prompt by the network."""

    def __init__(
        self,
        network: Network,
        context: int | None = None,
        precision: Precision = Precision.FP32,
        notes: Sequence[str] = (),
    ) -> None:
        """`precision` is what the products of a prompt compute in. `UserError` when `context`
        exceeds the model's positions."""
        longest = network.config.max_position_embeddings
        if context is not None and not 1 <= context <= longest:
            raise UserError(f"context {context}: must be from 1 to the model's {longest} positions")
        self.network, self.precision, self.notes = network, precision, tuple(notes)
        self.vocab_size = network.config.vocab_size
        self.context = context or longest
        self.end_tokens = tuple(network.config.end_tokens)
        self.cache: KVCache | None = None

    @functools.cached_property
    def decoder(self) -> Decoder | None:
        """What computes single tokens; None where the network does that, too."""
        return decoder_of(self.network)

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says."""
        check_ids(ids, self.cache.length if self.cache is not None else 0, self)
        like = self.network.norm.weight
        if self.cache is None:
            self.cache = KVCache(self.network.config, 1, self.context, like=like)
        if len(ids) == 1 and self.decoder is not None:
            return self.decoder.step(self.cache, ids[0])
        with self.precision.autocast(like.device):
            hidden = self.network.hidden(torch.tensor([list(ids)]), self.cache)[:, -1]
            return self.network.output(hidden)[0].float().numpy()

    def reset(self) -> None:
        """As `Session` says."""
        self.rewind(0)

    def rewind(self, length: int) -> int:
        """As `Session` says; a sliding window that is full has lost what stood before."""
        if self.cache is None:
            return 0
        if length < self.cache.length:
            full = self.cache.length > self.cache.shortest
            self.cache.length = 0 if full else length
        return self.cache.length

    def close(self) -> None:
        """As `Session` says."""
        self.cache = None
        self.__dict__.pop("decoder", None)  # and its threads


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


def open_network(
    path: Path,
    context: int | None = None,
    threads: int | None = None,
    precision: Precision | None = None,
) -> NetworkSession:
    """The model at `path`, its weights held as they are stored: integers where it is quantized,
    bf16 where the file has bf16, else float32; all products are float32.

    `precision` holds the weights that are not integers in float32 or bf16, and computes the
    products of a prompt in it. Without a C++ compiler matrices on the grid run by torch's kernels,
    whose products are bf16, and what is stored in bf16 is held in float32.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    fault, half = library_fault(), precision is Precision.BF16
    loaded = load(path, halves=half or (precision is None and not fault), release=True)
    network = rounded_activations(loaded.network, loaded.quantized)
    unfit = pack(network, loaded.quantized, half=half, kernels=bool(fault))
    empty_cache(torch.device("cpu"))
    if not fault:
        use_huge_pages([*network.parameters(), *network.buffers()])
    notes = []
    if fault:
        notes.append(f"tokens come from torch's products, several times slower: {fault}")
    if unfit:
        notes.append(
            f"{len(unfit)} matrices of a shape that torch's 4-bit kernel does not take (rows in "
            f"multiples of {KERNEL_ROWS}) are made float32 for each token"
        )
    return NetworkSession(network, context, precision or Precision.FP32, notes)


RUNTIME = Runtime(
    name="mobilellm",
    what="our own network, in torch",
    package="torch",
    extra="",
    recognizes=_recognizes,
    open=open_network,
    read_tokenizer=_read_tokenizer,
    imports=("torch._dynamo",),  # by operations on tensors without storage
)
