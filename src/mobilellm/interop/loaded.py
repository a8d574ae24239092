"""What a reader returns: a model from disk, and the entry by which a format describes itself.

    loaded = mobilellm.load("runs/demo")
    loaded.network, loaded.tokenizer, loaded.origin
    loaded.generate("ROMEO:", max_new_tokens=50)

Every reader imports this module, and `load` imports every reader: nothing here knows a format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilellm.decoding.decoder import decoder_of
from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.generation import Sampling, generate
from mobilellm.model.network import Network
from mobilellm.quantize.activations import rounded_activations
from mobilellm.quantize.packed import pack
from mobilellm.quantize.quantized import Quantized
from mobilellm.tokenizer.chat_template import ChatTemplate, Message, with_call_ids
from mobilellm.tokenizer.conversation import Tools, encode_prompt, ends_of_turn
from mobilellm.tokenizer.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a prompt, with BOS before it where the tokenizer puts one.

    With `special` a special token that the text spells out is that token, else it is text; BOS at
    its beginning is then not put there once more. An empty prompt becomes BOS, or the end-of-text
    token where there is no BOS.
    """
    begin = [tokenizer.bos_id] if tokenizer.bos_id is not None and tokenizer.add_bos else []
    ids = tokenizer.encode(text, parse_special=special)
    if not special or ids[:1] != begin:
        ids = begin + ids
    alone = tokenizer.prefix_id
    return ids or ([] if alone is None else [alone])


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text that `tokens` add to the prompt's.

    Both are decoded together, since pieces can join where the one ends and the other begins.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)[len(before) :]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model read from disk."""

    network: Network
    """In float32, on the CPU, in evaluation mode."""
    tokenizer: Tokenizer | None
    """None where there is none, or where it could not be read (see `tokenizer_fault`)."""
    origin: dict[str, Any]
    """Where the model came from, as far as its files say."""
    quantized: Quantized | None = None
    """What of the network lies on the grid, where the checkpoint was quantized."""
    generation: dict[str, Any] = field(default_factory=dict)
    """How its makers sample from it, in generation_config.json's keys, ids left out."""
    notes: tuple[str, ...] = ()
    """A line for each thing that was left out in reading."""
    tokenizer_fault: UserError | None = None
    """Why the model's own tokenizer could not be read; its weights can be used all the same."""

    @property
    def config(self) -> ModelConfig:
        """The network's configuration."""
        return self.network.config

    @property
    def as_run(self) -> Network:
        """The network as runtimes compute it: from now on a quantized model's matrices are held as
        their integers, and its activations rounded where its scheme rounds them. For evaluation
        and generation, not for writing."""
        network = rounded_activations(self.network, self.quantized)
        if self.quantized is not None:
            pack(network, self.quantized)
        return network

    def _continue(
        self,
        ids: list[int],
        max_new_tokens: int,
        sampling: Sampling | None,
        stop: Sequence[int] | None,
    ) -> list[int]:
        """The tokens that follow `ids`."""
        network = self.as_run
        decoder = decoder_of(network)
        step = None if decoder is None else decoder.step
        return list(generate(network, ids, max_new_tokens, sampling or Sampling(), stop, step=step))

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, as the function of this name. `UserError` without a tokenizer."""
        return prompt_ids(self.require_tokenizer(), text)

    def require_tokenizer(self, where: str | Path = "the model") -> Tokenizer:
        """The tokenizer. `UserError` when there is none, or with the reason why it was not read."""
        if self.tokenizer_fault is not None:
            raise self.tokenizer_fault
        if self.tokenizer is None:
            raise UserError(
                f"{where}: has no tokenizer",
                hint="put its tokenizer.json or tokenizer.model into the folder",
            )
        return self.tokenizer

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """The text that `tokens` add to the prompt's, as the function of this name."""
        return continuation(self.require_tokenizer(), prompt, tokens)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> str:
        """The text that follows `prompt`; greedy unless `sampling` says otherwise."""
        ids = self.prompt_ids(prompt)
        return self.continuation(ids, self._continue(ids, max_new_tokens, sampling, stop))

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        tools: Tools | None = None,
    ) -> str:
        """The assistant's next words after `messages`, which are in OpenAI's form, by the model's
        own chat template or ChatML; greedy unless `sampling` says otherwise."""
        tokenizer = self.require_tokenizer()
        template = ChatTemplate.of(tokenizer)
        ids = encode_prompt(tokenizer, template, with_call_ids(messages), tools)
        stop = [*self.config.end_tokens, *ends_of_turn(tokenizer, template)]
        tokens = self._continue(ids, max_new_tokens, sampling, stop)
        return tokenizer.decode(tokens, skip_special_tokens=True)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format that can be read. Each of the functions takes the folder or file that holds it."""

    name: str
    """Short name, as `info` and `convert` print it."""
    what: str
    """What a user gives, in a few words."""
    recognizes: Callable[[Path], bool]
    """Whether what lies at this path, which exists, is of this format."""
    read: Callable[..., Loaded]
    """The model without its tokenizer, of (path, shared_kv, ignored, halves, release), which are
    those of `load`. A reader may have no use for any but the first."""
    read_tokenizer: Callable[[Path], Tokenizer | None]
    """The model's own tokenizer, or None where it has none."""
    describe: Callable[[Path], tuple[ModelConfig, dict[str, Any]]]
    """Configuration and origin, without reading the weights."""
    read_settings: Callable[[Path], dict[str, Any]] = lambda _: {}
    """How the model's makers sample from it, in generation_config.json's keys."""
