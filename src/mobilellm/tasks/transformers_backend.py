"""Any causal language model that transformers knows, as a backend of the engine: shared
beginnings are computed once for it too.

    backend, encoder = load_transformers(Path("opt-125m"))

These networks take one sequence a row, so a batch goes in two passes: the beginnings, then what
each choice adds, on copies of their keys and values. Items are sorted by their shared length,
and a batch shares what all its items do. A model whose cache cannot do this (found by trying)
reads every request whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobilellm.errors import UserError, first_line
from mobilellm.files import read_json
from mobilellm.tasks.engine import collect, from_logits
from mobilellm.tasks.requests import Item, Result

DEFAULT_LENGTH = 2048  # the harness's, where neither model nor tokenizer names one
NO_LENGTH = 10**15  # what a tokenizer says that has no limit lies above this
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
TOLERANCE = 1e-3  # logits of the trial that decides whether a cache can be shared


@dataclass
class TransformersEncoder:
    """A tokenizer of transformers, used as the harness's Hugging Face backend uses it."""

    tokenizer: Any

    @property
    def prefix_id(self) -> int:
        """BOS where there is one, else EOS. `UserError` when there is neither."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise UserError("the tokenizer has neither BOS nor EOS to begin a text with")
        return int(eos if bos is None else bos)

    def encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        """As `Encoder` says; a text that spells out BOS at its beginning gets no second one."""
        opening = self.tokenizer.decode(self.prefix_id)
        found: list[list[int]] = [[] for _ in texts]
        for adding in (True, False):
            chosen = [
                i
                for i, text in enumerate(texts)
                if (special and not text.startswith(opening)) == adding
            ]
            if chosen:
                ids = self.tokenizer(
                    [texts[i] for i in chosen], add_special_tokens=adding, verbose=False
                )["input_ids"]
                for i, each in zip(chosen, ids, strict=True):
                    found[i] = list(each)
        return found


@dataclass
class TransformersBackend:
    """A `PreTrainedModel` in evaluation mode."""

    model: Any
    max_length: int
    pads: ClassVar[bool] = True
    shares: bool = field(init=False)
    """Whether beginnings are computed once."""

    def __post_init__(self) -> None:
        self.parameters = inspect.signature(self.model.forward).parameters
        self.shares = self.can_share()

    def order(self, item: Item) -> tuple[int, ...]:
        """Items of one shared length stand together, the longest first."""
        shared, rows = self.plan(item)
        return (-(shared if self.shares and len(rows) > 1 else 0), -max(map(len, rows)), -len(rows))

    def cost(self, item: Item) -> int:
        """Tokens of its rows: keys and values are held for each of them."""
        _, rows = self.plan(item)
        return max(map(len, rows)) * len(rows)

    def plan(self, item: Item) -> tuple[int, list[tuple[int, ...]]]:
        """Tokens that are shared and hold nothing scored, and the different rows."""
        first = min(len(request.inputs) - request.scored for request in item.requests)
        return min(item.shared, first), list(
            dict.fromkeys(request.inputs for request in item.requests)
        )

    @torch.inference_mode()
    def score(self, items: Sequence[Item]) -> list[list[Result]]:
        """As `Backend` says."""
        plans = [self.plan(item) for item in items]
        common = min(shared for shared, _ in plans)
        if not self.shares or all(len(rows) == 1 for _, rows in plans):
            common = 0
        device = self.model.device
        places: dict[tuple[int, tuple[int, ...]], int] = {}  # (item, row) -> row of the batch
        for b, (_, rows) in enumerate(plans):
            for row in rows:
                places[b, row] = len(places)
        width = max(len(row) for _, row in places) - common
        ids = torch.zeros(len(places), width, dtype=torch.long)
        for (_, row), place in places.items():
            ids[place, : len(row) - common] = torch.tensor(row[common:])
        past = None
        if common:
            beginnings = torch.tensor([rows[0][:common] for _, rows in plans], device=device)
            past = self.forward(beginnings, None, 1).past_key_values
            past.batch_select_indices(torch.tensor([b for b, _ in places], device=device))
        firsts = [
            len(request.inputs) - request.scored - common
            for item in items
            for request in item.requests
        ]
        logits = self.forward(
            ids.to(device), past, width - min(firsts)
        ).logits  # (rows, positions, V)
        skipped = width - logits.shape[1]
        at: list[tuple[int, int]] = []
        targets: list[int] = []
        for b, item in enumerate(items):
            for request in item.requests:
                end = len(request.inputs) - common - skipped
                at += [(places[b, request.inputs], p) for p in range(end - request.scored, end)]
                targets += request.targets
        values, greedy = [], []
        step = max(1, (1 << 24) // logits.shape[2])
        for start in range(0, len(at), step):
            index = torch.tensor(at[start : start + step], device=device)
            wanted = torch.tensor(targets[start : start + step], device=device)
            value, is_first = from_logits(logits[index[:, 0], index[:, 1]], wanted)
            values.append(value)
            greedy.append(is_first)
        return collect(items, torch.cat(values), torch.cat(greedy))

    def forward(self, ids: Tensor, past: Any, keep: int) -> Any:
        """One pass; logits of at least the last `keep` positions."""
        more: dict[str, Any] = (
            {"logits_to_keep": keep} if "logits_to_keep" in self.parameters else {}
        )
        if past is not None or self.shares:
            more |= {"past_key_values": past, "use_cache": past is not None or keep == 1}
        return self.model(input_ids=ids, **more)

    @torch.inference_mode()
    def can_share(self) -> bool:
        """Whether continuing from a selected cache gives the same logits as reading everything,
        found by trying."""
        size = self.model.config.get_text_config().vocab_size
        ids = (torch.arange(2 * 12, device=self.model.device).view(2, 12) * 37 + 5) % size
        expected = self.model(input_ids=ids[[0, 0, 1]]).logits
        try:
            past = self.model(input_ids=ids[:, :8], use_cache=True).past_key_values
            past.batch_select_indices(torch.tensor([0, 0, 1], device=ids.device))
            found = self.model(
                input_ids=ids[[0, 0, 1], 8:], past_key_values=past, use_cache=True
            ).logits
        except (
            AttributeError,
            TypeError,
            ValueError,
            NotImplementedError,
            RuntimeError,
            IndexError,
        ):
            return False  # a cache of another kind
        return bool(
            (found - expected[:, 8:]).abs().max()
            < TOLERANCE * max(1.0, float(expected.abs().max()))
        )


def max_length(config: Any, tokenizer: Any) -> int:
    """The model's context as the harness finds it: the config's, else the tokenizer's, else
    2048."""
    for each in (config.get_text_config(), config):
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if isinstance(found := getattr(each, name, None), int):
                return found
    length = tokenizer.model_max_length
    return int(length) if length < NO_LENGTH else DEFAULT_LENGTH


def load_transformers(folder: Path) -> tuple[TransformersBackend, TransformersEncoder]:
    """A Hugging Face folder through transformers, in float32, without running code from it and
    without pickles.

    `UserError` when transformers cannot read it, or it has no tokenizer.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{folder}: needs the package transformers", hint="pip install 'mobilellm[eval]'"
        ) from None
    if not any(
        (folder / name).is_file() for name in TOKENIZER_FILES
    ):  # transformers would make up an empty one
        raise UserError(
            f"{folder}: has no tokenizer",
            hint=f"put one of {', '.join(TOKENIZER_FILES)} into the folder",
        )
    kind = read_json(folder / "config.json", limit=16 << 20).get("model_type", "unknown")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, by the file that is missing
        raise UserError(
            f"{folder}: no tokenizer that transformers can read ({first_line(error)})"
        ) from error
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(
            f"{folder}: a model of type {kind} that transformers cannot read ({first_line(error)})",
            hint="a causal language model with model.safetensors is needed",
        ) from error
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise UserError(
            f"{folder}: {len(missing)} weights of a {kind} model are missing ({missing[0]}, ...)",
            hint="the folder is incomplete, or holds another network than its config.json says",
        )
    model.eval()
    return TransformersBackend(model, max_length(model.config, tokenizer)), TransformersEncoder(
        tokenizer
    )
