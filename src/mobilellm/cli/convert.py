"""`mobilellm convert`: other people's formats in and out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mobilellm.cli.terminal import print_json, say
from mobilellm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a model between Hugging Face, GGUF (llama.cpp), llama2.c and our own checkpoints; the input's format is found.

    What was written is read back and its logits are compared, before it appears under its name.

    Example: mobilellm convert runs/demo demo.gguf --to gguf --precision Q8_0
    """

    source: tyro.conf.Positional[Path]
    """A run, a checkpoint, a Hugging Face folder (the original MobileLLM's too), a GGUF file or a llama2.c .bin."""
    out: tyro.conf.Positional[Path]
    """Folder (hf, mobilellm) or file (gguf, llama2c) to make."""
    to: Literal["hf", "gguf", "llama2c", "mobilellm"]
    """hf: a plain LlamaForCausalLM, shared layers unrolled; mobilellm: the same with layer sharing kept."""
    precision: Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"] = "F32"
    """Of a GGUF's matrices."""
    fold: bool = False
    """Recognize equal neighbouring blocks as one block that is repeated."""
    shared_kv: Literal["own", "first"] | None = None
    """Kind of layer sharing of a checkpoint that does not say: each application's own keys and values, or the first one's."""
    text: Path | None = None
    """A text to find out that kind with: both are measured on it, and the better one is taken."""
    approximate: bool = False
    """Write layer sharing of kind "first" to formats that cannot say it, as if it were "own"."""
    tokenizer: Path | None = None
    """Tokenizer to use instead of the source's own: a folder, a tokenizer.json, a tokenizer.model, or llama2.c's tok*.bin."""
    tokenizer_out: Path | None = None
    """With --to llama2c: write the tokenizer here, in llama2.c's format."""
    llama2c_version: Literal[0, 1] = 0
    """Version of the llama2.c file."""
    verify: bool = True
    """Read the result back and compare logits."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Convert, and say how well it came out."""
        from mobilellm.interop.checkpoint import load
        from mobilellm.interop.convert import convert

        shared_kv, measured = self.shared_kv, None
        if self.text is not None:
            measured = self.measure(self.text)
            shared_kv = measured["trained_for"]
            losses = ", ".join(f"{kind} {loss:.4f}" for kind, loss in measured["loss"].items())
            say(
                f"layer sharing: loss {losses} nats a token over {measured['tokens']:,} tokens: trained for {shared_kv!r}"
            )
        if self.tokenizer_out is not None and self.to != "llama2c":
            raise UserError(
                "--tokenizer-out is for --to llama2c",
                hint="other formats hold the tokenizer themselves",
            )
        result = convert(
            self.source, self.out, self.to, precision=self.precision, fold=self.fold, shared_kv=shared_kv,
            approximate=self.approximate, tokenizer=self.tokenizer, llama2c_version=self.llama2c_version, verify=self.verify,
        )  # fmt: skip
        if self.tokenizer_out is not None:
            from mobilellm.files import write_file
            from mobilellm.interop.llama2c import tokenizer_bytes

            tokenizer = load(self.source, shared_kv=shared_kv, tokenizer=self.tokenizer).tokenizer
            if tokenizer is None:
                raise UserError(f"{self.source}: has no tokenizer to write")
            write_file(self.tokenizer_out, tokenizer_bytes(tokenizer))
        if self.json:
            print_json(dataclasses.asdict(result) | {"measured_sharing": measured})
            return 0
        print(
            f"{result.out}: {result.to}" + (f" {result.precision}" if result.to == "gguf" else "")
        )
        for note in result.notes:
            print(f"- {note}")
        if result.largest_difference is not None:
            print(
                f"read back: logits differ by at most {result.largest_difference:.3g} (their spread is {result.logit_std:.3g}), "
                f"the first choice is the same at {result.same_first_choice:.1%} of positions"
            )
        return 0

    def measure(self, text: Path) -> dict:  # type: ignore[type-arg]
        """Both kinds of sharing on a text."""
        from mobilellm.evaluate.heldout import read_text
        from mobilellm.evaluate.sharing import measure_sharing
        from mobilellm.interop.checkpoint import load

        if self.shared_kv is not None:
            raise UserError("--shared-kv and --text are both given", hint="give one of them")
        loaded = load(self.source, shared_kv="own", tokenizer=self.tokenizer)
        if loaded.tokenizer is None or loaded.config.layer_repeats == 1:
            lacks = "tokenizer" if loaded.tokenizer is None else "shared layers"
            raise UserError(
                f"{self.source}: has no {lacks}, so that there is nothing to measure",
                hint="leave out --text",
            )
        return measure_sharing(loaded.network, loaded.tokenizer, read_text(text))
