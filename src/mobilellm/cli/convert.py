"""`mobilellm convert`: other people's formats in and out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mobilellm.errors import UserError
from mobilellm.export.targets import NUMBER_TYPES, TARGETS
from mobilellm.printable import one_line
from mobilellm.terminal.output import print_json, put, say

if TYPE_CHECKING:
    from mobilellm.workflows.convert import ConvertResult

    Target = str
    NumberType = str
else:  # the choices that the table of targets has
    Target = Literal[tuple(TARGETS)]
    NumberType = Literal[NUMBER_TYPES]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a model into a Hugging Face folder, a GGUF file or our own checkpoint.

    The source's format is recognized. What was written is read back, or run by the runtime that it
    is for, and compared, before it appears under its name.

    Example: mobilellm convert runs/demo demo.gguf --to gguf --precision Q8_0
    """

    source: tyro.conf.Positional[Path]
    """A run, a checkpoint, a Hugging Face folder (the original MobileLLM's too), a GGUF file or a
    llama2.c .bin."""
    out: tyro.conf.Positional[Path]
    """Folder (hf, mobilellm) or file (gguf, web) to make."""
    to: Target
    """hf: a plain LlamaForCausalLM, shared layers unrolled; gguf: a file for llama.cpp, unrolled
    too; mobilellm: a Hugging Face folder with layer sharing kept; web: one .html that writes in a
    browser, without a network; with another name a folder for `serve`; webgpu: such a folder that
    computes on the GPU where the browser has WebGPU."""
    precision: NumberType | None = None
    """How the result stores its matrices; what each target can is named when it cannot."""
    context: int | None = None
    """Positions that the result has room for, where the target takes memory for them; the target's
    usual number when left out, at most the model's own."""
    fold: bool = False
    """Recognize equal neighboring blocks as one block that is repeated."""
    shared_kv: Literal["own", "first"] | None = None
    """Kind of layer sharing of a checkpoint that does not say: each application's own keys and
    values, or the first one's."""
    text: Path | None = None
    """A text to find out that kind with: both are measured on it, and the better one is taken."""
    approximate: bool = False
    """Write layer sharing of kind "first" to formats that cannot say it, as if it were "own"."""
    tokenizer: Path | None = None
    """Tokenizer to use instead of the source's own: a run, a folder, a tokenizer.json, a
    tokenizer.model, a GGUF, or llama2.c's tok*.bin."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of the source's config.json that are not known here and, as you know, do not change the
    network."""
    license: str | None = None
    """License that the folder's card names, as the hub spells it (apache-2.0); none when left
    out."""
    base_model: str | None = None
    """Model on the hub that this one was made from (ORG/NAME), for the card."""
    verify: bool = True
    """Read the result back, or run it, and compare logits and tokens before it appears."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Convert, and say how well it came out."""
        from mobilellm.workflows.convert import convert

        shared_kv, measured = self.shared_kv, None
        if self.text is not None:
            measured = self.measure(self.text)
            shared_kv = measured["trained_for"]
            losses = ", ".join(f"{kind} {loss:.4f}" for kind, loss in measured["loss"].items())
            say(
                f"layer sharing: loss {losses} nats a token over {measured['tokens']:,} tokens: "
                f"trained for {shared_kv!r}"
            )
        result = convert(
            self.source,
            self.out,
            self.to,
            precision=self.precision,
            context=self.context,
            fold=self.fold,
            shared_kv=shared_kv,
            approximate=self.approximate,
            tokenizer=self.tokenizer,
            ignore_keys=self.ignore_keys,
            license=self.license,
            base_model=self.base_model,
            verify=self.verify,
        )
        if self.json:
            print_json(dataclasses.asdict(result) | {"measured_sharing": measured})
            return 0
        several = len(TARGETS[result.to].number_types) > 1
        put(f"{result.out}: {result.to}" + (f" {result.precision}" if several else ""))
        for note in result.notes:
            put(one_line(f"- {note}"))
        if result.largest_difference is not None:
            how = "read back" if result.runtime is None else f"run by {result.runtime}"
            put(
                f"{how}: logits differ by at most {result.largest_difference:.3g} "
                f"(their spread is {result.logit_std:.3g}), "
                f"the first choice is the same at {result.same_first_choice:.1%} of positions"
            )
        if result.kl is not None:
            put(
                f"divergence from what was written: {result.kl:.2g} nats a token"
                + _loss_words(result)
            )
        return 0

    def measure(self, text: Path) -> dict[str, Any]:
        """The loss of both kinds of layer sharing on a text."""
        from mobilellm.evaluate.held_out import read_text
        from mobilellm.evaluate.sharing_kind import measure_sharing
        from mobilellm.interop.load import load

        if self.shared_kv is not None:
            raise UserError("--shared-kv and --text are both given", hint="give one of them")
        loaded = load(self.source, shared_kv="own", tokenizer=self.tokenizer)
        if loaded.config.layer_repeats == 1:
            raise UserError(
                f"{self.source}: has no shared layers, so that there is nothing to measure",
                hint="leave out --text",
            )
        return measure_sharing(loaded.network, loaded.require_tokenizer(), read_text(text))


def _loss_words(result: ConvertResult) -> str:
    """The loss before and after, as the end of a line."""
    if result.loss_before is None or result.loss_after is None:
        return ""
    return f"; loss on a short text {result.loss_before:.4f} before, {result.loss_after:.4f} after"
