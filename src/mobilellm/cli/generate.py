"""`mobilellm generate`: continue a prompt.

    mobilellm generate runs/demo --prompt "ROMEO:" --max-new-tokens 100

The text is printed as it comes; the same seed gives the same text.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.printable import printable
from mobilellm.terminal.output import print_json, say
from mobilellm.terminal.running import PrecisionFlag, opened, sampling_of


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt, token by token, until the end-of-text token or the limit.

    Example: mobilellm generate runs/demo --prompt "ROMEO:" --max-new-tokens 100
    """

    model: tyro.conf.Positional[Path]
    """A run, a checkpoint, a Hugging Face folder or a GGUF file; or a file that another runtime
    runs (.pte, ONNX folder)."""
    prompt: str = ""
    """Text to continue; when empty, the model begins from its BOS or end-of-text token."""
    special: bool = False
    """Take special tokens that the prompt spells out ("<|im_start|>") as these tokens; else they
    are text like any other."""
    schema: Path | None = None
    """A JSON schema, in a file: what is added is a value of it (needs mobilellm[chat]). A value
    that the limit of tokens cuts off is closed."""
    max_new_tokens: int = 200
    """Most tokens to add."""
    temperature: float | None = None
    """Divides the logits; 0 always takes the likeliest token. When not given, the model's own
    (generation_config.json, or GGUF's keys), or 0.8 where its files do not say how to sample."""
    top_k: int | None = None
    """Draw among the k likeliest tokens; 0 is no limit. The model's own, or 0."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens whose probabilities reach p; 1 is no limit. The
    model's own, or 0.95."""
    seed: int = 0
    """Seeds the draw: the same seed gives the same text."""
    runtime: str | None = None
    """What runs the model: our own network for what it reads, else the file's runtime. A GGUF file
    also runs by llama.cpp."""
    threads: int | None = None
    """Threads; when not given, as many as the runtime takes."""
    precision: PrecisionFlag = None
    """How our own network holds weights that are not quantized, and what a prompt is computed in;
    when not given, as the file has them and in fp32."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Generate, printing as the text comes."""
        from mobilellm.calls.held import held_to_file
        from mobilellm.interop.loaded import continuation, prompt_ids
        from mobilellm.runtimes.running import generate

        flags = (self.temperature, self.top_k, self.top_p)
        sampling = sampling_of(self.model, *flags, seed=self.seed, usual_temperature=0.8)
        tokens: list[int] = []
        shown = ""
        with opened(self.model, self.runtime, self.threads, self.precision) as model:
            prompt = prompt_ids(model.tokenizer, self.prompt, special=self.special)
            session, held = model.session, None
            if self.schema is not None:
                stop, size = session.end_tokens, session.vocab_size
                held = held_to_file(self.schema, model.tokenizer, size, stop).begin()
            start = time.perf_counter()
            # A terminal shows and does not obey what a model wrote; a file gets its text.
            shown_as = printable if sys.stdout.isatty() else str
            if not self.json:
                sys.stdout.write(shown_as(self.prompt))
            for token in generate(session, prompt, self.max_new_tokens, sampling, held=held):
                tokens.append(token)
                if not self.json:
                    # Decoded from the start each time: a character can span tokens, and an
                    # unfinished one must wait.
                    text = continuation(model.tokenizer, prompt, tokens)
                    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                        sys.stdout.write(shown_as(text[len(shown) :]))
                        sys.stdout.flush()
                        shown = text
            seconds = time.perf_counter() - start
        drawn = len(tokens)
        if held is not None:
            tokens += held.closing()
            if closed := len(tokens) - drawn:
                say(f"the limit of {drawn:,} tokens: {closed} more close the value")
            elif not held.complete:
                say(f"the limit of {drawn:,} tokens: the value is not complete")
        text = continuation(model.tokenizer, prompt, tokens)
        if self.json:
            facts = {
                "prompt": self.prompt,
                "text": text,
                "tokens": tokens,
                "sampling": dataclasses.asdict(sampling),
                "prompt_tokens": len(prompt),
                "runtime": model.runtime,
                "tokens_per_second": round(drawn / max(seconds, 1e-9), 1),
            }
            if held is not None:
                facts |= {"complete": held.complete, "closed": len(tokens) - drawn}
            print_json(facts)
        else:
            sys.stdout.write(shown_as(text[len(shown) :]) + "\n")
        return 0
