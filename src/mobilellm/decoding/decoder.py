"""The one-token step of a network on a CPU: every product in one call of step.cpp.

    decoder = decoder_of(network)                 # None where there is no compiler
    cache = KVCache(network.config, 1, 256, like=network.norm.weight)
    network.hidden(prompt, cache)                 # as ever
    logits = decoder.step(cache, token)           # (V,) float32; the cache grows by one

Reading the weights bounds decoding, so they are read where and as they lie: float32 parameters, or
what quantize/packed.py holds. In torch a token of a 135M model is six hundred operations and a
thousand meetings of threads, of which each costs about as much as a small product (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mobilellm.decoding.library import library
from mobilellm.decoding.threads import Pace
from mobilellm.model.cache import KVCache
from mobilellm.model.linear import Embedding, Linear
from mobilellm.model.network import Block, Network, RMSNorm
from mobilellm.quantize.activations import RoundedLinear, RoundedNorm
from mobilellm.quantize.packed import Held, HeldEmbedding, HeldLinear

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
"""As step.cpp numbers them."""
INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p
MATRICES = (Linear, RoundedLinear, HeldLinear, Embedding, HeldEmbedding)
NORMS = (RMSNorm, RoundedNorm)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", POINTER),
        ("scales", POINTER),
        ("rows", INTEGER),
        ("columns", INTEGER),
        ("kind", INTEGER),
        ("rounds", INTEGER),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((f"{name}_norm", POINTER) for name in ("input", "query", "key", "post")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
    )


class _Application(ctypes.Structure):
    _fields_ = tuple((name, INTEGER) for name in ("block", "slot", "own"))


class _Network(ctypes.Structure):
    _fields_ = (
        *(
            (name, INTEGER)
            for name in ("width", "heads", "kv_heads", "head_dim", "ffn", "blocks", "applications")
        ),
        ("eps", ctypes.c_double),
        ("norm", POINTER),
        *((name, _Matrix) for name in ("embedding", "output")),
        ("block", ctypes.POINTER(_Block)),
        ("application", ctypes.POINTER(_Application)),
    )


class _Slot(ctypes.Structure):
    _fields_ = (("keys", POINTER), ("values", POINTER), ("room", INTEGER))


class Decoder:
    """A network's one-token step, with threads of its own. It reads the network's weights where
    they are: they may change in place, but must stay there."""

    def __init__(self, network: Network, found: ctypes.CDLL, threads: int) -> None:
        self.network, self.library, self.threads = network, found, threads
        self.pace = Pace(threads)
        self._kept: list[Any] = []  # what the description points at
        self._handle: int | None = None
        self._process = 0
        self._cache: tuple[weakref.ref[KVCache], ctypes.Array[_Slot]] | None = None
        self._description = self._describe()
        self.vocab_size = network.config.vocab_size

    def step(self, cache: KVCache, token: int) -> np.ndarray:
        """Logits (V,), float32, of what follows `token`, which comes after all tokens in `cache`.

        The cache is one of float32 for a batch of one, with room for another position.
        """
        assert 0 <= token < self.vocab_size
        cos, sin = self.network.rotation(cache.length, cache.length + 1)
        logits = np.empty(self.vocab_size, dtype=np.float32)
        handle, slots, start = self._opened(), self._slots(cache), time.perf_counter()
        self.library.mobilellm_step(
            handle,
            slots,
            token,
            cache.length,
            cos.data_ptr(),
            sin.data_ptr(),
            logits.ctypes.data,
            self.pace.threads(),
        )
        self.pace.took(time.perf_counter() - start)
        cache.length += 1
        return logits

    def _slots(self, cache: KVCache) -> ctypes.Array[_Slot]:
        """Where the cache has the keys and values of each slot."""
        if self._cache is None or self._cache[0]() is not cache:
            pairs = [
                cache.store[:, cache.places[slot]] if slot in cache.places else cache.windows[slot]
                for slot in range(self.network.config.kv_slots)
            ]  # each (2, 1, K, room, D)
            for pair in pairs:
                assert pair.dtype == torch.float32
                assert pair.shape[1] == 1
                assert pair[0].is_contiguous()
            found = (_Slot * len(pairs))(
                *(_Slot(pair[0].data_ptr(), pair[1].data_ptr(), pair.shape[3]) for pair in pairs)
            )
            self._cache = weakref.ref(cache), found
        return self._cache[1]

    def _opened(self) -> int:
        """The library's decoder of this process; a fork has none of its parent's threads."""
        if self._handle is None or self._process != os.getpid():
            handle = self.library.mobilellm_open(ctypes.byref(self._description), self.threads)
            self._handle, self._process = handle, os.getpid()
            weakref.finalize(self, _close, self.library, handle, self._process).atexit = False
        return self._handle

    def _describe(self) -> _Network:
        network, config = self.network, self.network.config
        blocks = (_Block * config.num_hidden_layers)(
            *(self._block(cast(Block, layer)) for layer in network.layers)
        )
        applications = self._applications()
        self._kept += [blocks, applications]
        embedding = self._matrix(network.embed_tokens)
        output = embedding if network.lm_head is None else self._matrix(network.lm_head)
        output = _Matrix.from_buffer_copy(output)
        output.rounds = isinstance(network.norm, RoundedNorm)
        return _Network(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            ffn=config.intermediate_size,
            blocks=config.num_hidden_layers,
            applications=len(applications),
            eps=config.rms_norm_eps,
            norm=self._pointer(network.norm.weight),
            embedding=embedding,
            output=output,
            block=blocks,
            application=applications,
        )

    def _applications(self) -> ctypes.Array[_Application]:
        found = [_Application(*each) for each in self.network.config.applications]
        return (_Application * len(found))(*found)

    def _block(self, block: Block) -> _Block:
        attention = block.self_attn
        return _Block(
            input_norm=self._pointer(block.input_layernorm.weight),
            query_norm=None if attention.q_norm is None else self._pointer(attention.q_norm.weight),
            key_norm=None if attention.k_norm is None else self._pointer(attention.k_norm.weight),
            post_norm=self._pointer(block.post_attention_layernorm.weight),
            qkv=self._matrix(attention.qkv_proj),
            o=self._matrix(attention.o_proj),
            gate_up=self._matrix(block.mlp.gate_up_proj),
            down=self._matrix(block.mlp.down_proj),
        )

    def _matrix(self, module: Linear | Embedding) -> _Matrix:
        held: Held | None = getattr(module, "held", None)
        numbers = module.weight if held is None else held.numbers
        rows, columns = numbers.shape if held is None else (held.rows, held.columns)
        return _Matrix(
            data=self._pointer(numbers),
            scales=None
            if held is None or held.numbers.is_floating_point()
            else self._pointer(held.scales),
            rows=rows,
            columns=columns,
            kind=KINDS["fp32" if held is None else held.kind],
            rounds=isinstance(module, RoundedLinear) or bool(getattr(module, "rounds", False)),
        )

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _close(found: ctypes.CDLL, handle: int, process: int) -> None:
    """Give back a decoder's threads, in the process that has them."""
    if process == os.getpid():
        found.mobilellm_close(handle)


def decoder_of(network: Network, threads: int | None = None) -> Decoder | None:
    """The one-token step of a network, with at most as many threads as torch has unless given.

    None without a C++ compiler (`library.fault` says so), for a network that is not on a CPU, and
    for one with modules, number types or a feed-forward that step.cpp does not know.
    """
    if network.config.feed_forward != "swiglu":
        return None
    if not _known(network) or (found := library()) is None:
        return None
    return Decoder(network, found, threads or torch.get_num_threads())


def _known(network: Network) -> bool:
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and type(module) not in MATRICES:
            return False
        if isinstance(module, RMSNorm) and type(module) not in NORMS:
            return False
    return all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
        for tensor in (*network.parameters(), network.cos)
    )
