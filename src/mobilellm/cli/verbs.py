"""The verbs: the name of each, its line in the list of them, and where its class is.

A verb's file is loaded when the verb is used, so that the list appears at once:

    VERBS["train"].load()       # the class Train of mobilellm/cli/train.py
"""

from __future__ import annotations

import functools
import importlib
import operator
import shutil
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    home: str
    """Module in this folder and the class in it, which has flags as fields and a method `run`."""
    line: str
    """What it does, for the list of verbs. With the name it fits a terminal of 80 columns."""

    def load(self) -> Any:
        """The verb's class, its fields explained to tyro."""
        from mobilellm.terminal.field_docs import explain

        module, name = self.home.split(":")
        verb = getattr(importlib.import_module(f"mobilellm.cli.{module}"), name)
        explain(verb)
        return verb


VERBS = {
    "quickstart": Verb("quickstart:Quickstart", "text to a small trained model, in one command"),
    "prepare": Verb("prepare:Prepare", "text to a folder of tokens, with a held-out part"),
    "data-stats": Verb("data_stats:DataStats", "what prepared data holds, with a page"),
    "plan": Verb("plan:Plan", "what a training run will cost, before it is paid"),
    "distill": Verb("distill:Distill", "what a teacher says of data, once, for many runs"),
    "train": Verb("train:Train", "tokens to a model, from a recipe; goes on with --resume"),
    "search": Verb("search:Search", "the best shape within a device's limits"),
    "lab": Verb("lab:Lab", "tables of ablations, with paired seeds and intervals"),
    "watch": Verb("watch:Watch", "curves of a run in the terminal, while it trains"),
    "report": Verb("report:Report", "the HTML report of a run, or of several together"),
    "eval": Verb("eval:Eval", "loss and bits a byte on any text, or scores on tasks"),
    "generate": Verb("generate:Generate", "continue a prompt"),
    "chat": Verb("chat:Chat", "talk with a model, in the terminal or over a pipe"),
    "info": Verb("info:Info", "parameters, FLOPs and memory of a model or a size"),
    "profile": Verb("profile:Profile", "how fast model files run here, all runtimes in turns"),
    "serve": Verb("serve:Serve", "a folder's page for a browser on this machine"),
    "quantize": Verb("quantize:Quantize", "weights in 4 or 8 bits, the same for every runtime"),
    "convert": Verb("convert:Convert", "Hugging Face, GGUF and llama2.c, in and out"),
}


def list_verbs() -> str:
    """The text of `mobilellm --help`, as wide as the terminal."""
    columns = max(40, shutil.get_terminal_size().columns)
    around = (
        "VERB --help explains a verb. Anywhere: --debug (tracebacks), --max-memory 4GiB (of what "
        "files ask for). Alone: --version, --tyro-write-completion bash FILE."
    )
    return "\n".join(
        [
            "usage: mobilellm VERB [OPTIONS]",
            "From text to a language model that runs on a phone.",
            *(
                textwrap.fill(f"  {name:<12}{verb.line}", columns, subsequent_indent=" " * 14)
                for name, verb in VERBS.items()
            ),
            "",
            textwrap.fill(around, min(columns, 100), break_on_hyphens=False),
        ]
    )


def union_of_verbs() -> Any:
    """All verbs as one type whose members are tyro's subcommands; shell completion needs them."""
    import tyro

    named = [Annotated[verb.load(), tyro.conf.subcommand(name)] for name, verb in VERBS.items()]
    return functools.reduce(operator.or_, named)
