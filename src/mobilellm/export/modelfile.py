"""Ollama's Modelfile beside a GGUF: chat template in Ollama's language, ends of turns, sampling.

    modelfile("demo.gguf", tokenizer, config, generation)     # None without a chat template
    write_beside(Path("demo.gguf"), model)                    # "Modelfile", or "demo.Modelfile"

Ollama does not run the Jinja template that a GGUF holds: it has templates of its own, in Go's
language, and takes the one it knows to be nearest. Where what stands between messages does not
depend on them (export/turns.py), the very texts are written here; every text is a quoted Go string,
so that nothing in it is read as the language. A template that is more than that is left to Ollama,
with a line that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.export.turns import Piece, Turns, turns_of
from mobilellm.files import write_file
from mobilellm.interop.sampling_defaults import sampling_of
from mobilellm.interop.writer import ModelToWrite
from mobilellm.model.config import ModelConfig
from mobilellm.printable import one_line
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import ends_of_turn
from mobilellm.tokenizer.tokenizer import Tokenizer

NAME = "Modelfile"
CONTEXT = 4096  # positions that Ollama takes memory for, at most the model's own
# generation_config.json's name -> Ollama's
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def modelfile(
    gguf: str, tokenizer: Tokenizer | None, config: ModelConfig, generation: Mapping[str, Any]
) -> str | None:
    """The text of a Modelfile for the GGUF file of this name; None without a chat template."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    lines = [f"FROM ./{gguf}"]
    turns: Turns | None = None
    try:
        turns = turns_of(tokenizer)
    except UserError as error:
        lines.append(f"# No TEMPLATE: {one_line(error.what)}. Ollama takes one of its own.")
    if turns is not None:
        lines.append(f'TEMPLATE """{go_template(turns, tokenizer)}"""')
    for stop in _stops(tokenizer, config, turns):
        quotes = '"' if stop.isprintable() and '"' not in stop else '"""'
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    lines.append(f"PARAMETER num_ctx {min(CONTEXT, config.max_position_embeddings)}")
    values = dict(generation) | sampling_of(generation)
    for name, theirs in PARAMETERS.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.append(f"PARAMETER {theirs} {value}")
    return "\n".join(lines) + "\n"


def go_template(turns: Turns, tokenizer: Tokenizer) -> str:
    """The turns as a template in Go's language over Ollama's `.Messages`."""

    def opening(pieces: list[Piece]) -> list[Piece]:
        """Without BOS where llama.cpp puts one itself."""
        put = tokenizer.add_bos and tokenizer.bos_id is not None
        return pieces[1:] if put and pieces[:1] == [tokenizer.bos_id] else pieces

    def quoted(pieces: list[Piece]) -> str:
        text = "".join(p if isinstance(p, str) else tokenizer.token(p) or "" for p in pieces)
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

    head = quoted(opening(turns.head))
    reply, after, ask = map(quoted, (turns.reply, turns.next, turns.ask))
    system = ""
    if turns.system is not None:
        before, past = quoted(opening(turns.system[0])), quoted(turns.system[1])
        system = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{past}{{{{ end }}}}'
    last = "$last := eq (len (slice $.Messages $i)) 1"
    user = f"{{{{ .Content }}}}{{{{ if $last }}}}{ask}{{{{ else }}}}{reply}{{{{ end }}}}"
    assistant = f"{{{{ .Content }}}}{{{{ if not $last }}}}{after}{{{{ end }}}}"
    begin = f"{{{{ if not .System }}}}{head}{{{{ end }}}}" if system else head
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}{{{{ {last} }}}}{system}"
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ end }}}}'
        f'{{{{ if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
    )


def _stops(tokenizer: Tokenizer, config: ModelConfig, turns: Turns | None) -> list[str]:
    """What ends an answer, as text."""
    ids = [*config.end_tokens, *ends_of_turn(tokenizer, ChatTemplate.of(tokenizer))]
    named = [tokenizer.token(i) for i in ids]
    return list(dict.fromkeys([name for name in named if name] + (turns.stop if turns else [])))


def write_beside(out: Path, model: ModelToWrite) -> list[str]:
    """Write the Modelfile of the GGUF at `out` beside it, under a name that is free or its own;
    returns a line that says so."""
    text = modelfile(out.name, model.tokenizer, model.network.config, model.generation)
    if text is None:
        return []
    path = out.parent / NAME
    if path.exists() and not path.read_bytes().startswith(f"FROM ./{out.name}\n".encode()):
        path = out.with_suffix(f".{NAME}")
    write_file(path, text.encode())
    return [f"{path.name} beside it: ollama create NAME -f {path.name}"]
