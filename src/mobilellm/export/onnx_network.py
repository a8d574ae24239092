"""The network as an ONNX graph: a few large operators a block, put together without tracing.

    build = Build(network, quantized=None, context=1024)
    build.graph.write(path, build.inputs, build.outputs)

The graph takes tokens, the mask over all positions, and the cache; it returns the logits of the
last position, and the cache with the new positions.

| input or output | shape |
|---|---|
| input_ids | (batch_size, sequence_length), int64 |
| attention_mask | (batch_size, total_sequence_length), int64 |
| past_key_values.N.key, .value | (batch_size, K, past_sequence_length, D), float32 |
| logits | (batch_size, 1, V), float32 |
| present.N.key, .value | (batch_size, K, total_sequence_length, D), float32 |

Attention is onnxruntime's GroupQueryAttention, which turns queries and keys by cosines and sines of
as many positions as the context has; any scaling of the rotary frequencies is in these. The file
holds the frequencies, and runtimes compute the tables when they load it. A shared block's tensors
occur in several nodes and are stored once. Where later applications attend to the keys and values
of the first, they are given the first one's again, with its past.

How a matrix is stored:

| on the grid | operator | stored as |
|---|---|---|
| no | FusedMatMul | float32 |
| 4 bits | MatMulNBits | two integers a byte, float16 scales |
| 8 bits | MatMulNBits | bytes, a float16 scale a row |
| 8 bits, `int8_columns` | DynamicQuantizeMatMul | int8 by column, a float32 scale a row |

MatMulNBits rounds activations to int8 within each block of 32 at accuracy level 4, and not at all
at level 1. DynamicQuantizeMatMul rounds them with one scale for all that enters a product; it is
the one that is fast in WebAssembly.

A quantized embedding is read from the bytes of the output layer when the two are tied. Scales are
exact in float16 (quantize/grid.py); runtimes turn them into float32 once, when they load a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.export.onnx_graph import CONTRIB, Graph, Port, Shape
from mobilellm.model.attention_spec import AttentionSpec
from mobilellm.model.network import Network
from mobilellm.model.rope import inverse_frequencies
from mobilellm.quantize.grid import GridWeight
from mobilellm.quantize.quantized import Quantized

BLOCK = 32
"""Inputs that share a scale in MatMulNBits."""
INT8_ACTIVATIONS, FLOAT_ACTIVATIONS = 4, 1
"""Accuracy levels of MatMulNBits: activations rounded to int8 within the product, or not at all."""
HEAD_MULTIPLE = 16  # GroupQueryAttention turns heads whose width is a multiple of it
LAST = 2**62  # end of a slice that reaches to the end


class Build:
    """A network's graph, with its inputs and outputs."""

    def __init__(
        self,
        network: Network,
        *,
        context: int,
        quantized: Quantized | None = None,
        int8_columns: bool = False,
        accuracy_level: int = INT8_ACTIVATIONS,
    ) -> None:
        """`UserError` for a network that onnxruntime's operators cannot say.

        `quantized` has the integers of the parameters that are on the grid. With `int8_columns`
        they are for DynamicQuantizeMatMul, else for MatMulNBits at that `accuracy_level`.
        """
        config = network.config
        if config.head_dim % HEAD_MULTIPLE:
            raise UserError(
                f"head_dim {config.head_dim}: onnxruntime's attention turns heads of a multiple of "
                f"{HEAD_MULTIPLE}",
                hint="convert --to gguf",
            )
        self.network, self.config, self.quantized = network, config, quantized
        self.context, self.accuracy_level = context, accuracy_level
        self.int8_columns = int8_columns
        self._made: set[str] = set()
        self.parameters: dict[str, Tensor] = dict(network.named_parameters())
        # A QK-norm without a gain is one with a gain of 1.
        buffers = network.named_buffers()
        self.parameters |= {name: b for name, b in buffers if name.endswith("norm.weight")}
        self.graph = Graph()
        cache = [config.num_key_value_heads, config.head_dim]
        past: list[Port] = []
        present: list[Port] = []
        for slot in range(config.kv_slots):
            for part in ("key", "value"):
                for ports, name, length in (
                    (past, "past_key_values", "past_sequence_length"),
                    (present, "present", "total_sequence_length"),
                ):
                    shape: Shape = ["batch_size", cache[0], length, cache[1]]
                    ports.append((f"{name}.{slot}.{part}", np.float32, shape))
        self.inputs: list[Port] = [
            ("input_ids", np.int64, ["batch_size", "sequence_length"]),
            ("attention_mask", np.int64, ["batch_size", "total_sequence_length"]),
            *past,
        ]
        # Runtimes take memory for the shape that is declared: one position, not sequence_length.
        self.outputs: list[Port] = [
            ("logits", np.float32, ["batch_size", 1, config.vocab_size]),
            *present,
        ]
        self._build()

    def _build(self) -> None:
        graph, config = self.graph, self.config
        one, minus_one = graph.number([1], np.int64), graph.number([-1], np.int64)
        lengths = graph.node("ReduceSum", ["attention_mask", one], "/lengths", keepdims=0)
        before = graph.node("Sub", [lengths, one], "/lengths_less_one")
        shape = graph.node("Shape", ["attention_mask"], "/mask_shape")
        total = graph.node("Gather", [shape, graph.number(1, np.int64)], "/total_int64")
        self.seqlens = graph.cast(before, np.int32, "/seqlens_k")
        self.total = graph.cast(total, np.int32, "/total_sequence_length")
        self.rotary = self._rotary()
        x, residual, slot = self._embedding(), "", 0
        for i, own in enumerate(config.attention_specs):
            spec = own.within(self.context)
            shared: tuple[str, str] | None = None
            for repeat in range(config.layer_repeats):
                at = f"/layers.{i}" + (f"/{repeat}" if config.layer_repeats > 1 else "")
                p = f"layers.{i}."
                first = shared is None or config.shared_kv == "own"
                slot += first
                h, residual = self._norm(x, residual, f"{p}input_layernorm.weight", at + "/norm1")
                x, shared = self._attention(h, p, at, slot - 1, spec, None if first else shared)
                h, residual = self._norm(
                    x, residual, f"{p}post_attention_layernorm.weight", at + "/norm2"
                )
                x = self._feed_forward(h, p, at)
        h, _ = self._norm(x, residual, "norm.weight", "/norm")
        ends = [minus_one, graph.number([LAST], np.int64), one]
        h = graph.node("Slice", [h, *ends], "/last_position")
        output = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._product(h, f"{output}.weight", "logits")

    def _rotary(self) -> list[str]:
        """Cosines and sines of every position, (context, D / 2).

        They depend on constants alone: runtimes compute them once, when they load the file.
        """
        graph, frequencies = self.graph, inverse_frequencies(self.config)
        name = graph.tensor(
            "inverse_frequencies", (len(frequencies),), np.float32, _floats(frequencies)
        )
        ends = [graph.number(n, np.float32) for n in (0, self.context, 1)]
        positions = graph.node("Range", ends, "/positions")
        column = graph.node("Unsqueeze", [positions, graph.number([-1], np.int64)], "/position")
        angles = graph.node("Mul", [column, name], "/angles")
        return [graph.node(kind, [angles], f"/{kind.lower()}") for kind in ("Cos", "Sin")]

    def _norm(self, x: str, residual: str, name: str, output: str) -> tuple[str, str]:
        """RMSNorm of x plus residual, and that sum; x alone where there is no residual yet."""
        weight, eps = self._floats(name), self.config.rms_norm_eps
        if not residual:
            return self._rms_norm(x, weight, output), x
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, weight],
            [output, "", "", output + "_sum"],
            domain=CONTRIB,
            epsilon=eps,
        )
        return output, output + "_sum"

    def _rms_norm(self, x: str, weight: str, output: str) -> str:
        """RMSNorm over the last dimension."""
        return self.graph.node(
            "SimplifiedLayerNormalization",
            [x, weight],
            output,
            epsilon=self.config.rms_norm_eps,
            axis=-1,
            stash_type=1,
        )

    def _attention(
        self,
        h: str,
        p: str,
        at: str,
        slot: int,
        spec: AttentionSpec,
        shared: tuple[str, str] | None,
    ) -> tuple[str, tuple[str, str] | None]:
        """Attention of h, and the new keys and values where another application may need them."""
        config, graph = self.config, self.graph
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = heads * config.head_dim, kv_heads * config.head_dim
        name, reused = f"{p}self_attn.qkv_proj.weight", False
        query = [h, "", ""]
        if config.layer_repeats > 1 and config.shared_kv == "first":
            query[0], reused = self._product(h, name, at + "/q", (0, width)), shared is not None
            if shared is None:
                rows = (width, width + 2 * kv_width)
                both = self._product(h, name, at + "/kv", rows)
                query[1:] = self._split(both, [kv_width, kv_width], at, ("k", "v"))
            else:
                query[1:] = shared
        else:
            query[0] = self._product(h, name, at + "/qkv")
            if config.qk_norm:
                query = self._split(query[0], [width, kv_width, kv_width], at, ("q", "k", "v"))
        if config.qk_norm:
            for part, letter, count in ((0, "q", heads), (1, "k", kv_heads)):
                if part == 0 or not reused:
                    norm = self._floats(f"{p}self_attn.{letter}_norm.weight")
                    query[part] = self._head_norm(query[part], norm, count, f"{at}/{letter}")
        past = [f"past_key_values.{slot}.{part}" for part in ("key", "value")]
        # A later application computes the same cache once more: nobody reads it.
        filled = [
            f"{at}/{part}" if reused else f"present.{slot}.{part}" for part in ("key", "value")
        ]
        attended = graph.node(
            "GroupQueryAttention",
            [*query, *past, self.seqlens, self.total, *self.rotary],
            [at + "/attention", *filled],
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=float(config.head_dim) ** -0.5,
            **({} if spec.window is None else {"local_window_size": spec.window}),
        )
        pair = (query[1], query[2]) if query[1] else None
        return self._product(attended, f"{p}self_attn.o_proj.weight", at + "/o"), pair

    def _split(self, x: str, widths: list[int], at: str, letters: tuple[str, ...]) -> list[str]:
        names = [f"{at}/{letter}" for letter in letters]
        self.graph.node("Split", [x, self.graph.number(widths, np.int64)], names, axis=-1)
        return names

    def _head_norm(self, x: str, norm: str, heads: int, at: str) -> str:
        """RMSNorm over each of the heads of x (B, T, heads * D)."""
        graph, D = self.graph, self.config.head_dim
        apart = graph.node("Reshape", [x, graph.number([0, 0, heads, D], np.int64)], at + "_heads")
        normed = self._rms_norm(apart, norm, at + "_norm_heads")
        together = graph.number([0, 0, heads * D], np.int64)
        return graph.node("Reshape", [normed, together], at + "_norm")

    def _feed_forward(self, h: str, p: str, at: str) -> str:
        graph, F = self.graph, self.config.intermediate_size
        both = self._product(h, f"{p}mlp.gate_up_proj.weight", at + "/gate_up")
        gate, up = self._split(both, [F, F], at, ("gate", "up"))
        sigmoid = graph.node("Sigmoid", [gate], at + "/sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], at + "/silu")
        swiglu = graph.node("Mul", [silu, up], at + "/swiglu")
        return self._product(swiglu, f"{p}mlp.down_proj.weight", at + "/down")

    def _embedding(self) -> str:
        """The embeddings of input_ids."""
        graph, name = self.graph, "embed_tokens.weight"
        weight = self._grid(name)
        if weight is None:
            return graph.node("Gather", [self._floats(name), "input_ids"], "/embedding")
        minus_one = graph.number([-1], np.int64)
        if self.int8_columns:  # (C, V): a token is a column
            columns, scales = self._columns(name, weight)
            found = graph.node("Gather", [columns, "input_ids"], "/embedding_int8", axis=1)
            numbers = graph.cast(found, np.float32, "/embedding_columns")
            numbers = graph.node("Transpose", [numbers], "/embedding_steps", perm=[1, 2, 0])
            scale = graph.node("Gather", [scales, "input_ids"], "/embedding_scale")
            scale = graph.node("Unsqueeze", [scale, minus_one], "/embedding_row_scale")
            return graph.node("Mul", [numbers, scale], "/embedding")
        values, scales = self._bytes(name, weight)
        found = graph.node("Gather", [values, "input_ids"], "/embedding_uint8")
        numbers = graph.cast(found, np.float32, "/embedding_bytes")
        zero = graph.number(128, np.float32)
        numbers = graph.node("Sub", [numbers, zero], "/embedding_steps")
        together = graph.number([0, 0, self.config.hidden_size], np.int64)
        numbers = graph.node("Reshape", [numbers, together], "/embedding_rows")
        # Cast before a row is taken: that is done once, at loading, and some GPUs have no float16.
        exact = graph.cast(scales, np.float32, "/embedding_scales")
        scale = graph.node("Gather", [exact, "input_ids"], "/embedding_row_scale")
        return graph.node("Mul", [numbers, scale], "/embedding")

    def _product(self, x: str, name: str, output: str, rows: tuple[int, int] | None = None) -> str:
        """x times the transpose of a parameter, or of some of its rows, (..., in) -> (..., out)."""
        graph, weight = self.graph, self._grid(name)
        if weight is None:
            matrix = self._floats(name, rows)
            return graph.node("FusedMatMul", [x, matrix], output, domain=CONTRIB, transB=1)
        if rows is not None:
            name, weight = f"{name}.{rows[0]}", weight.rows(*rows)
        R, C = weight.integers.shape
        if self.int8_columns:
            columns, scales = self._columns(name, weight)
            return graph.node("DynamicQuantizeMatMul", [x, columns, scales], output, domain=CONTRIB)
        if weight.bits == 4:
            values = graph.tensor(
                name + ".q", (R, C // BLOCK, BLOCK // 2), np.uint8, lambda: pack_int4(weight)
            )
            scales = self._half_scales(name, weight)
        else:
            values, scales = self._bytes(name, weight)
        blocks = self._block_scales(name, scales, R, C // BLOCK, weight.scales.shape[1] == 1)
        return graph.node(
            "MatMulNBits",
            [x, values, blocks],
            output,
            domain=CONTRIB,
            K=C,
            N=R,
            bits=weight.bits,
            block_size=BLOCK,
            accuracy_level=self.accuracy_level,
        )

    # --- tensors ---

    def _grid(self, name: str) -> GridWeight | None:
        """The parameter's integers and scales, where it has some. `UserError` where the operators
        have no such grid."""
        weight = None if self.quantized is None else self.quantized.weights.get(name)
        if weight is None:
            return None
        columns = weight.integers.shape[1]
        if self.int8_columns and weight.bits != 8:
            raise UserError(
                f"{name}: {weight.bits} bits with int8 activations is not a product of onnxruntime",
                hint="use --precision INT4",
            )
        if not self.int8_columns and columns % BLOCK:
            raise UserError(
                f"{name}: its {columns} columns do not divide by {BLOCK}",
                hint="use --precision INT8, which fits any width",
            )
        return weight

    def _floats(self, name: str, rows: tuple[int, int] | None = None) -> str:
        values = self.parameters[name].detach()
        if rows is not None:
            name, values = f"{name}.{rows[0]}", values[rows[0] : rows[1]]
        return self.graph.tensor(name, tuple(values.shape), np.float32, _floats(values))

    def _bytes(self, name: str, weight: GridWeight) -> tuple[str, str]:
        """8-bit integers plus 128, (R, blocks, BLOCK), and scales (R, 1) in float16."""
        R, C = weight.integers.shape
        values = self.graph.tensor(
            name + ".q",
            (R, C // BLOCK, BLOCK),
            np.uint8,
            lambda: (weight.integers.numpy().view(np.uint8) ^ 128).reshape(R, -1, BLOCK),
        )
        return values, self._half_scales(name, weight)

    def _columns(self, name: str, weight: GridWeight) -> tuple[str, str]:
        """8-bit integers by column, (C, R), and scales (R,) in float32."""
        R, C = weight.integers.shape
        columns = self.graph.tensor(name + ".q", (C, R), np.int8, lambda: weight.integers.numpy().T)
        scales = weight.scales.flatten()
        return columns, self.graph.tensor(name + ".scale", (R,), np.float32, _floats(scales))

    def _half_scales(self, name: str, weight: GridWeight) -> str:
        shape = tuple(weight.scales.shape)
        return self.graph.tensor(
            name + ".scale", shape, np.float16, functools.partial(_halves, weight.scales, name)
        )

    def _block_scales(self, name: str, scales: str, rows: int, blocks: int, alike: bool) -> str:
        """Scales for MatMulNBits, (rows, blocks) in float32, of those in the file."""
        output = f"/{name}.block_scale"
        if output in self._made:
            return output
        self._made.add(output)
        singles = self.graph.cast(scales, np.float32, output + "s" if alike else output)
        if not alike:
            return singles
        shape = self.graph.number([rows, blocks], np.int64)
        return self.graph.node("Expand", [singles, shape], output)


def pack_int4(weight: GridWeight) -> np.ndarray:
    """Integers (R, C) from -8 to 7 as (R, blocks, BLOCK / 2) bytes, the earlier in the low half,
    each with 8 added."""
    unsigned = (weight.integers.numpy() + 8).view(np.uint8)
    packed = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return packed.reshape(len(packed), -1, BLOCK // 2)


def _floats(values: Tensor) -> Callable[[], np.ndarray]:
    return lambda: values.detach().to(torch.float32).numpy()


def _halves(scales: Tensor, name: str) -> np.ndarray:
    halves = scales.to(torch.float16)
    if not torch.equal(halves.float(), scales):
        raise UserError(f"{name}: a scale is no float16", hint="quantize the model again")
    return halves.numpy()
