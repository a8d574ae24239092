"""The network's configuration, in the key names of the Hugging Face Llama family.

    ModelConfig.preset("125M")
    ModelConfig.read(Path("checkpoint/config.json"))

A plain network is written as `model_type: llama` and loads in transformers as it stands. A
layer-sharing one is written as `model_type: mobilellm` with `layer_repeats` and `shared_kv`, so
that no other tool takes it for the plain one. With `qk_norm` the plain network is Qwen3's, and
is written as `model_type: qwen3`. Where some layers look through a sliding window it is Qwen3's
with `layer_types`, or without `qk_norm` that of CWM, and written as `model_type: cwm`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from mobilellm.divisors import divisors, nearest_multiples
from mobilellm.errors import UserError, located, unknown_name
from mobilellm.files import read_json
from mobilellm.model.attention_spec import FULL, AttentionSpec

SharedKV = Literal["own", "first"]
LayerOrder = Literal["immediate", "all_over", "reverse"]
FeedForwardKind = Literal["swiglu", "relu"]
SLIDING, ALL = "sliding_attention", "full_attention"  # transformers' names in layer_types

# Keys of the Llama family that name parts our network does not have: these values mean "absent".
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
}
# Keys that say nothing about the network.
INFORMATIVE = frozenset(
    {
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "unk_token_id",
        "is_llama_config",
        "rope_interleaved",
        "_name_or_path",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "mobilellm_version",
        "_attn_implementation_autoset",
        "transformers.js_config",
        "chunk_size_feed_forward",
        "problem_type",
        "id2label",
        "label2id",
    }
)
# Far above any model this is for, and low enough that no file can ask for all the memory there is.
LARGEST = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 15,
    "intermediate_size": 1 << 17,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "max_position_embeddings": 1 << 20,
    "layer_repeats": 1 << 6,
}


class Application(NamedTuple):
    """One application of a block."""

    block: int
    slot: int
    """Which of a cache's `kv_slots` has the keys and values that it attends to."""
    fills: bool
    """Whether they are its own."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a MobileLLM network (arXiv 2402.14905, Table 9). `ValueError`-like faults are
    `UserError`s."""

    vocab_size: int
    """Rows of the embedding, which is also the output layer when tied."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward."""
    num_hidden_layers: int
    """Blocks with weights of their own."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads, each shared by num_attention_heads / num_key_value_heads query heads."""
    head_dim: int = 0
    """Width of one head; 0 means hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    """The longest sequence, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """Scaling of the rotary frequencies for longer contexts (see model/rope.py), in
    transformers' keys."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    """Whether the embedding is the output layer."""
    layer_repeats: int = 1
    """How many times in a row each block is applied (2 in MobileLLM-LS)."""
    shared_kv: SharedKV = "own"
    """With layer_repeats > 1: whether each application has its own keys and values, or attends
    to the first one's."""
    layer_order: LayerOrder = "immediate"
    """With layer_repeats > 1: each block so many times in a row (0 0 1 1), all blocks and then all
    again (0 1 0 1), or again from the last one back (0 1 1 0)."""
    feed_forward: FeedForwardKind = "swiglu"
    """swiglu has three matrices. relu, two with a ReLU between them, is for comparisons: it is
    trained and evaluated here, and no other format holds it."""
    qk_norm: bool = False
    """Whether an RMSNorm over each head stands between the query and key projections and their
    rotation (as in Qwen3)."""
    qk_norm_gain: bool = True
    """Whether that norm has a learned gain; MobileLLM-R1's has none. On disk it is a gain of 1."""
    sliding_window: int | None = None
    """How many positions a token of a `sliding_attention` layer sees, its own included."""
    layer_types: list[str] | None = None
    """For each layer `full_attention` or `sliding_attention`; None is full in all."""
    bos_token_id: int | None = None
    """Token that opens a text, or none."""
    eos_token_id: int | list[int] | None = None
    """Token or tokens that end a document, or none."""

    def __post_init__(self) -> None:
        for name in LARGEST:
            value = getattr(self, name)
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not 1 <= value <= LARGEST[name]
            ):
                raise UserError(
                    f"{name} = {repr(value)[:60]}: must be a whole number from 1 to {LARGEST[name]}"
                )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                heads, width = self.num_attention_heads, self.hidden_size
                near = " or ".join(map(str, nearest_multiples(heads, width)))
                raise UserError(
                    f"hidden_size {width} does not divide by num_attention_heads {heads}",
                    hint=f"nearest that does: {near}, or give head_dim",
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if (
            not isinstance(self.head_dim, int)
            or isinstance(self.head_dim, bool)
            or self.head_dim < 2
            or self.head_dim % 2
            or self.head_dim > 1 << 16
        ):
            raise UserError(
                f"head_dim = {self.head_dim!r}: must be an even number from 2 on "
                "(rotary positions turn pairs)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            fitting = ", ".join(map(str, divisors(self.num_attention_heads)))
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} does not divide by "
                f"num_key_value_heads {self.num_key_value_heads}",
                hint=f"num_key_value_heads can be {fitting}",
            )
        if not self.qk_norm:
            object.__setattr__(self, "qk_norm_gain", True)  # of no norm: it says nothing
        self._check_windows()
        if self.shared_kv not in ("own", "first"):
            raise unknown_name("shared_kv", str(self.shared_kv), ("own", "first"))
        orders = ("immediate", "all_over", "reverse")
        if self.layer_order not in orders:
            raise unknown_name("layer_order", str(self.layer_order), orders)
        if self.feed_forward not in ("swiglu", "relu"):
            raise unknown_name("feed_forward", str(self.feed_forward), ("swiglu", "relu"))
        if self.shared_kv == "first" and self.layer_order != "immediate":
            raise UserError(
                f'shared_kv = "first" with layer_order = "{self.layer_order}": keys and values are '
                "those of another depth there",
                hint='leave shared_kv out, or take layer_order = "immediate"',
            )
        for name in ("tie_word_embeddings", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} = {repr(getattr(self, name))[:60]}: must be true or false")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not math.isfinite(value)
                or value <= 0
            ):
                raise UserError(f"{name} = {value!r}: must be a positive number")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = isinstance(value, list) and name == "eos_token_id"
            for token in value if several else [value]:
                if token is not None and (
                    not isinstance(token, int) or not 0 <= token < self.vocab_size
                ):
                    raise UserError(
                        f"{name} = {repr(token)[:60]}: outside the vocabulary of {self.vocab_size}"
                    )

    def _check_windows(self) -> None:
        """`UserError` for windows that do not say what each layer does; none are None."""
        kinds, window = self.layer_types, self.sliding_window
        if kinds is not None:
            if not isinstance(kinds, (list, tuple)) or len(kinds) != self.num_hidden_layers:
                raise UserError(
                    f"layer_types: must name a kind for each of {self.num_hidden_layers} layers"
                )
            for kind in kinds:
                if kind not in (SLIDING, ALL):
                    raise unknown_name("layer type", str(kind), (SLIDING, ALL))
        if kinds is None or SLIDING not in kinds:
            if window is not None and kinds is None:
                raise UserError(
                    f"sliding_window = {window!r} without layer_types is not supported",
                    hint="layer_types says for which layers it is",
                )
            object.__setattr__(self, "sliding_window", None)
            object.__setattr__(self, "layer_types", None)
            return
        if type(window) is not int or window < 1:
            raise UserError(
                f"sliding_window = {window!r}: a whole number from 1, where layer_types has "
                f"{SLIDING}"
            )
        object.__setattr__(self, "layer_types", list(kinds))

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a document: none, one or several."""
        eos = self.eos_token_id
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """What each block's attention looks at."""
        if self.layer_types is None:
            return (FULL,) * self.num_hidden_layers
        sliding = AttentionSpec(self.sliding_window)
        return tuple(sliding if kind == SLIDING else FULL for kind in self.layer_types)

    @property
    def slot_specs(self) -> tuple[AttentionSpec, ...]:
        """The same for each pair of keys and values in a cache (`kv_slots`)."""
        specs = self.attention_specs
        return tuple(specs[block] for block, _, fills in self.applications if fills)

    def windows_within(self, length: int) -> bool:
        """Whether a window hides anything of a sequence of `length` tokens."""
        return any(spec.within(length) != FULL for spec in self.attention_specs)

    @property
    def kv_slots(self) -> int:
        """Pairs of keys and values that a token leaves in a cache: one a block, times
        `layer_repeats` where each application has its own."""
        own = self.layer_repeats if self.shared_kv == "own" else 1
        return self.num_hidden_layers * own

    @property
    def application_order(self) -> list[int]:
        """The blocks in the order in which they are applied: layer_repeats times each."""
        blocks, repeats = range(self.num_hidden_layers), self.layer_repeats
        if self.layer_order == "immediate":
            return [block for block in blocks for _ in range(repeats)]
        back = self.layer_order == "reverse"
        return [
            block
            for repeat in range(repeats)
            for block in (reversed(blocks) if back and repeat % 2 else blocks)
        ]

    @property
    def applications(self) -> list[Application]:
        """What is applied, in `application_order`: repeats of a block in a row attend to the keys
        and values of the first of them where `shared_kv` says so."""
        found: list[Application] = []
        slot, before = -1, -1
        for block in self.application_order:
            fills = self.shared_kv == "own" or block != before
            slot, before = slot + fills, block
            found.append(Application(block, slot, fills))
        return found

    # --- from and to the names of the Hugging Face Llama family ---

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> ModelConfig:
        """Build from `config.json`'s keys. `UserError` for a key that is unknown or asks for
        what the network lacks."""
        if not isinstance(values, dict):
            raise UserError(
                f"{where}: a configuration is a JSON object, found {type(values).__name__}"
            )
        values = dict(values)
        if values.get("feed_forward") == "relu":
            values.pop("hidden_act", None)
        if rope := values.pop("rope_parameters", None):  # transformers 5 groups the rotary settings
            if not isinstance(rope, dict):
                raise UserError(f"{where}: rope_parameters must be an object")
            rope = dict(rope)
            values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", cls.rope_theta))
            if any(isinstance(value, dict) for value in rope.values()):
                raise UserError(f"{where}: rope_parameters that differ by layer are not supported")
            if rope.pop("partial_rotary_factor", None) not in (None, 1):
                raise UserError(f"{where}: rotary positions over a part of each head")
            if rope_kind(rope) != "default":
                values["rope_scaling"] = rope
        if values.get("model_type") == "qwen3":  # the Llama family's network with qk_norm
            values.setdefault("qk_norm", True)
            values = _qwen3_windows(values)
        fields = {field.name for field in dataclasses.fields(cls)}
        kept: dict[str, Any] = {}
        for key, value in values.items():
            if key in fields:
                kept[key] = value
            elif key in FIXED:
                if value not in FIXED[key]:
                    raise UserError(
                        f"{where}: {key} = {value!r} is not supported",
                        hint=f"this network has {key} = {FIXED[key][0]!r}",
                    )
            elif key not in INFORMATIVE:
                raise unknown_name("key", key, fields | set(FIXED), where)
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in kept
        ]
        if (
            "num_key_value_heads" in missing and "num_attention_heads" in kept
        ):  # absent in old files: one per query head
            kept["num_key_value_heads"] = kept["num_attention_heads"]
            missing.remove("num_key_value_heads")
        if missing:
            raise UserError(f"{where}: missing {', '.join(missing)}")
        kept["head_dim"] = kept.get("head_dim") or 0
        if kept.get("rope_scaling") is not None and not isinstance(kept["rope_scaling"], dict):
            raise UserError(f"{where}: rope_scaling must be an object or null")
        with located(where):
            return cls(**kept)

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a `config.json`."""
        return cls.from_dict(read_json(path, limit=1 << 20), str(path))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """One of the shipped sizes (see `preset_names`), with fields replaced by `changes`."""
        by_lower = {known.lower(): known for known in preset_names()}
        if name.lower() not in by_lower:
            raise unknown_name("model", name, by_lower.values())
        return dataclasses.replace(
            cls.read(presets_folder() / by_lower[name.lower()] / "config.json"), **changes
        )

    @classmethod
    def find(cls, name: str) -> ModelConfig:
        """A shipped size by its name, or the configuration in a file. `UserError` names the
        nearest size."""
        known = {known.lower() for known in preset_names()}
        if name.lower() not in known and Path(name).is_file():
            return cls.read(Path(name))
        return cls.preset(name)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        values = dataclasses.asdict(self)
        repeats, shared_kv, qk_norm, order, feed_forward = (
            values.pop(key)
            for key in ("layer_repeats", "shared_kv", "qk_norm", "layer_order", "feed_forward")
        )
        shared, windows = repeats > 1, self.layer_types is not None
        if not qk_norm or values["qk_norm_gain"]:
            del values["qk_norm_gain"]
        if not windows:
            del values["sliding_window"], values["layer_types"]
        # transformers' cwm divides the width by the heads.
        divides = self.hidden_size % self.num_attention_heads == 0
        relu = feed_forward == "relu"
        if shared or relu or (windows and not qk_norm and not divides):
            name, kind = "MobileLLM", "mobilellm"
        elif qk_norm:
            name, kind = "Qwen3", "qwen3"
        else:
            name, kind = ("Cwm", "cwm") if windows else ("Llama", "llama")
        if windows and kind == "qwen3":
            values["use_sliding_window"] = True
        if kind == "cwm":  # which takes Llama 3's scaling where these are absent
            rope = self.rope_scaling or {"rope_type": "default"}
            values["rope_parameters"] = {"rope_theta": self.rope_theta} | rope
        head = {"architectures": [f"{name}ForCausalLM"], "model_type": kind}
        tail = {
            "hidden_act": "relu" if relu else "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
        }
        if kind == "mobilellm":
            values |= {"layer_repeats": repeats, "shared_kv": shared_kv} | (
                {"qk_norm": True} if qk_norm else {}
            )
            values |= {} if order == "immediate" else {"layer_order": order}
            values |= {"feed_forward": "relu"} if relu else {}
        if kind == "qwen3":
            del tail["mlp_bias"]
        return head | values | tail


def _qwen3_windows(values: dict[str, Any]) -> dict[str, Any]:
    """Qwen3's keys with its windows as `layer_types` alone says them.

    Without `use_sliding_window` a window does nothing; with it and without `layer_types` the layers
    from `max_window_layers` on have it.
    """
    values = dict(values)
    first, using = values.pop("max_window_layers", 28), values.pop("use_sliding_window", None)
    kinds, layers = values.get("layer_types"), values.get("num_hidden_layers")
    if using is None:
        using = isinstance(kinds, list) and SLIDING in kinds
    if not using:
        values["sliding_window"] = None
    elif kinds is None and values.get("sliding_window") and plausible_layers(layers):
        if type(first) not in (int, type(None)):
            raise UserError(f"max_window_layers = {repr(first)[:60]}: must be a whole number")
        values["layer_types"] = [ALL if i < (first or 0) else SLIDING for i in range(layers)]
    return values


def rope_kind(scaling: dict[str, Any]) -> Any:
    """The kind of a rotary scaling, whose key has two spellings."""
    return scaling.get("rope_type", scaling.get("type", "default"))


def one_or_several(tokens: list[Any]) -> Any:
    """The value of `eos_token_id` that names these tokens: a list of several, one, or None."""
    return tokens if len(tokens) > 1 else tokens[0] if tokens else None


def plausible_layers(value: Any) -> TypeGuard[int]:
    """Whether a file's number of layers is one that a list may be made for."""
    return type(value) is int and 1 <= value <= LARGEST["num_hidden_layers"]


def presets_folder() -> Path:
    """Where the presets lie: in the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return (
        package / "configs" if (package / "configs").is_dir() else package.parent.parent / "configs"
    )


def preset_names() -> list[str]:
    """The shipped sizes, smallest first."""
    names = [path.parent.name for path in presets_folder().glob("*/config.json")]
    return sorted(names, key=lambda name: (_size(name), name))


def _size(name: str) -> float:
    digits = name.removesuffix("-LS").split("-")[-1]  # "R1-140M": a family, and then the size
    return float(digits[:-1]) * {"M": 1e6, "B": 1e9}.get(digits[-1], 1)
