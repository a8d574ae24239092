"""MobileLLM (arXiv 2402.14905) on one device: deep and thin, SwiGLU, tied embedding, grouped-query
attention, and blocks that can be applied several times in a row with the same weights.

    network = Network(ModelConfig.preset("125M"))
    logits = network(input_ids)                  # (B, T) -> (B, T, V)
    loss = network.loss(input_ids, targets)      # mean nats a token, without the whole logits
    network.generate([1, 2, 3], max_new_tokens=20)

Shapes: B batch, T new positions, S all positions (cached and new), C hidden_size, H query heads, K
key/value heads, D head_dim, F intermediate_size, V vocabulary. Compilation and parallelism are
wrapped around this from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mobilellm.budget import ask
from mobilellm.model.attention_mask import DocumentMask, Span, attention_mask, masked_attention
from mobilellm.model.cache import KeyValue, KVCache
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.dropout import dropped
from mobilellm.model.fused import rms_norm, swiglu
from mobilellm.model.generation import Sampling, generate
from mobilellm.model.linear import Embedding, Linear
from mobilellm.model.loss import linear_cross_entropy
from mobilellm.model.rope import cos_sin, first_positions


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (arXiv 1910.07467). Without a `gain`
    the weight stays 1 and is no parameter."""

    def __init__(self, width: int, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.weight: Tensor
        if gain:
            self.weight = nn.Parameter(torch.ones(width))
        else:
            self.register_buffer("weight", torch.ones(width), persistent=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x (B, T, heads, D) by the angles of their positions; cos and
    sin (T, 1, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions. Q, K and V are one matrix: one product
    instead of three."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_width, self.kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, self.q_width + 2 * self.kv_width)
        self.o_proj = Linear(self.q_width, config.hidden_size)
        norm = (config.head_dim, config.rms_norm_eps, config.qk_norm_gain)
        self.q_norm = RMSNorm(*norm) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: DocumentMask | None,
        causal: bool,
        cache: KVCache | None = None,
        slot: int = 0,
        shared: KeyValue | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x (B, T, C) -> (B, T, C) and the keys and values attended to; `shared` ones replace this
        block's own.

        With `rows` (N,) the output is that of these positions alone, (B, N, C).
        """
        B, T, _ = x.shape
        if shared is None:
            qkv = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = qk.split((self.heads, self.kv_heads), dim=2)
                qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
            if torch.is_grad_enabled():
                # A view would keep Q and K as they were before their rotation until the backward
                # pass.
                v = v.contiguous()
            q, k = rotate(qk, *rotation).split((self.heads, self.kv_heads), dim=2)
            key, value = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, D)
            if cache is not None:
                key, value = cache.append(slot, key, value)
        else:
            q = self.qkv_proj.first(x, self.q_width).view(B, T, self.heads, self.head_dim)
            q = rotate(q if self.q_norm is None else self.q_norm(q), *rotation)
            key, value = shared
        out = masked_attention(q.transpose(1, 2), key, value, mask, causal)  # (B, H, T, D)
        out = out.transpose(1, 2).reshape(B, T, self.q_width)
        return self.o_proj(out if rows is None else out[:, rows]), (key, value)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)). Gate and up are one matrix.

    Or, for comparisons, down(relu(up(x))): there is no gate in `gate_up_proj` then.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        rows = config.intermediate_size * (2 if self.gated else 1)
        self.gate_up_proj = Linear(config.hidden_size, rows)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        up = self.gate_up_proj(x)  # (B, T, 2 F), or (B, T, F) without a gate
        return self.down_proj(swiglu(up) if self.gated else up.relu())  # (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Attention and feed-forward; each reads through a norm and adds to the residual stream."""

    dropout = 0.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: DocumentMask | None,
        causal: bool,
        cache: KVCache | None = None,
        slot: int = 0,
        shared: KeyValue | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        y, key_value = self.self_attn(
            self.input_layernorm(x), rotation, mask, causal, cache, slot, shared, rows
        )
        x = (x if rows is None else x[:, rows]) + dropped(y, self.dropout)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + dropped(y, self.dropout), key_value


class Network(nn.Module):
    """The language model. Parameters are float32, set by `initialize` from torch's generator.

    With `initialized` false they are left for the caller to set. `UserError` where they take more
    memory than there is.
    """

    dropout = 0.0
    """Of what is written to the residual stream where gradients are taken (see `drop`)."""

    def __init__(self, config: ModelConfig, initialized: bool = True) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":
            ask(4 * ModelCosts.of(config).parameters["total"], "a network's weights in float32")
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = cos_sin(config, first_positions(config))
        self.register_buffer("cos", cos.unsqueeze(1), persistent=False)  # (positions, 1, D/2)
        self.register_buffer("sin", sin.unsqueeze(1), persistent=False)
        if initialized:
            initialize(self)

    def rotation(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions `start` to `stop`, (stop - start, 1, D/2) each.

        The tables of a long context grow when a position is first asked for.
        """
        if stop > self.cos.shape[0] < self.config.max_position_embeddings:
            length = min(self.config.max_position_embeddings, max(stop, 2 * self.cos.shape[0]))
            with torch.inference_mode(False):  # they may be used in training later
                cos, sin = (
                    table.unsqueeze(1).to(self.cos) for table in cos_sin(self.config, length)
                )
            self.cos, self.sin = cos, sin
        return self.cos[start:stop], self.sin[start:stop]

    def drop(self, rate: float) -> None:
        """From now on drop this share of what is written to the residual stream, where gradients
        are taken. It is torch's generator that draws."""
        for part in (self, *self.layers):
            part.dropout = rate

    @property
    def output_weight(self) -> Tensor:
        """(V, C): the embedding itself when tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).used_weight

    def hidden(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        packed: tuple[Tensor, Sequence[Span]] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states, normalized: (B, T) -> (B, T, C). Positions follow those in
        `cache`, which grows by T.

        With `documents` (B, T), the number of the document each token belongs to within its row, a
        token attends to its own document alone. Rotary positions are relative, so each document
        gets the numbers that it would get alone.

        `packed`, without a cache and for B = 1, is (positions (T,), spans): a row of spans, each of
        which may hold several continuations of one beginning, or continue earlier ones. With
        `rows` (N,) only these positions are wanted, (B, N, C): the last block computes no
        others."""
        T, past = input_ids.shape[1], cache.length if cache is not None else 0
        rotation = self.rotation(past, past + T)
        if packed is not None and not past:
            positions, _ = packed
            rotation = (rotation[0][positions], rotation[1][positions])
        specs = [spec.within(past + T) for spec in self.config.attention_specs]
        masks = {
            spec: attention_mask(spec, past, T, input_ids.device, documents, packed)
            for spec in dict.fromkeys(specs)
        }
        x = dropped(self.embed_tokens(input_ids), self.dropout)
        applications = self.config.applications
        shared: KeyValue | None = None
        for place, (number, slot, fills) in enumerate(applications, 1):
            mask, causal = masks[specs[number]]
            wanted = rows if place == len(applications) else None
            x, shared = self.layers[number](
                x, rotation, mask, causal, cache, slot, None if fills else shared, wanted
            )
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position: (B, T) -> (B, T, V)."""
        return self.output(self.hidden(input_ids, cache))

    def output(self, hidden: Tensor) -> Tensor:
        """Logits of last hidden states: (..., C) -> (..., V)."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).product(hidden)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        documents: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of `targets` (B, T), -100 where none: the mean over the targets
        that count, or their sum. `documents` as in `hidden`. Training minimizes an objective
        instead (see model/loss.py)."""
        hidden = self.hidden(input_ids, documents=documents).flatten(0, 1)
        return linear_cross_entropy(hidden, self.output_weight, targets.flatten(), reduction)

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Continue `prompt`, token by token (see model/generation.py); greedy unless `sampling`
        says otherwise."""
        return generate(self, prompt, max_new_tokens, sampling or Sampling(), stop)


def initialize(
    network: Network, zero_residual: bool = False, generator: torch.Generator | None = None
) -> None:
    """Set every parameter; the one place where that is done.

    | parameter            | value                       | with zero_residual          |
    |----------------------|-----------------------------|-----------------------------|
    | embed_tokens, lm_head | normal, `initializer_range` | the same                    |
    | qkv_proj, gate_up_proj | normal, `initializer_range` | normal, 0.7 / sqrt(columns) |
    | o_proj, down_proj    | normal, `initializer_range` | 0: a block begins as identity |
    | norms                | 1                           | 1                           |

    "normal" gives the standard deviation around a mean of 0.

    The first is what the original trains from. The second starts faster where the training is
    short (docs/log.md)."""
    std = network.config.initializer_range
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif zero_residual and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif zero_residual and name.startswith("layers."):
                parameter.normal_(0.0, 0.7 / parameter.shape[1] ** 0.5, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)
