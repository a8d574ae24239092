"""`mobilellm chat`: talk with a model in the terminal, or over a pipe.

mobilellm chat runs/chat --system "Be brief."
echo "What is a fox?" | mobilellm chat runs/chat
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.terminal.output import print_json, say
from mobilellm.terminal.running import PrecisionFlag, opened, sampling_of


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with a model. Answers come token by token; /help lists the commands.

    From a pipe each line is a message, and standard output has the answers alone. A line editor
    comes with mobilellm[chat]; without it lines are read plainly.

    Example: mobilellm chat runs/chat --system "Be brief."
    """

    model: tyro.conf.Positional[Path]
    """A run, a checkpoint, a Hugging Face folder or a GGUF file; or a file that another runtime
    runs (.pte, ONNX folder)."""
    system: str = ""
    """What the model is told before the first message."""
    template: Path | None = None
    """Jinja file of a chat template, or "chatml"; the model's own when not given, ChatML when it
    has none, or one that does not write the tools."""
    tools: tuple[str, ...] = ()
    """Functions that the model may call, FILE.py:function,...; the file is imported. Calls are
    shown, and run when you say so in a terminal."""
    run_tools: bool = False
    """Run what the model calls without asking."""
    schema: str = ""
    """Hold answers to the JSON schema in this file, or to a call of one of the tools (`tool`)."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""
    temperature: float | None = None
    """Divides the logits; 0 always takes the likeliest token. When not given, the model's own
    (generation_config.json, or GGUF's keys), or 0.7 where its files do not say how to sample."""
    top_k: int | None = None
    """Draw among the k likeliest tokens; 0 is no limit. The model's own, or 0."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens whose probabilities reach p; 1 is no limit. The
    model's own, or 0.95."""
    seed: int = 0
    """Seeds the draws: the same seed and messages give the same answers."""
    runtime: str | None = None
    """What runs the model: our own network for what it reads, else the file's runtime. A GGUF file
    also runs by llama.cpp."""
    threads: int | None = None
    """Threads; when not given, as many as the runtime takes."""
    precision: PrecisionFlag = None
    """How our own network holds weights that are not quantized, and what a prompt is computed in;
    when not given, as the file has them and in fp32."""
    json: bool = False
    """Print one JSON object when the input ends: the messages, and the figures of each answer."""

    def run(self) -> int:
        """Talk until the input ends."""
        from mobilellm.calls.functions import read_tools
        from mobilellm.chat.dialogue import dialogue_of
        from mobilellm.chat.line_reader import asked, has_editor, line_reader
        from mobilellm.chat.loop import NAMES, ChatLoop
        from mobilellm.errors import UserError
        from mobilellm.tokenizer.chat_template import NO_TOOLS, passed_over

        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be 1 or more")
        flags = (self.temperature, self.top_k, self.top_p)
        sampling = sampling_of(self.model, *flags, seed=self.seed, usual_temperature=0.7)
        tools = read_tools(self.tools)
        interactive = sys.stdin.isatty() and sys.stdout.isatty() and not self.json
        with opened(self.model, self.runtime, self.threads, self.precision) as model:
            dialogue = dialogue_of(
                model,
                system=self.system,
                template=self.template,
                tools=[tool.as_openai() for tool in tools.values()],
                schema=self.schema,
            )
            if dialogue.stop_texts and not self.json:
                say(f"note: {self.model} was not made for chat: no token {dialogue.stop_texts[0]}")
            if passed_over(model.tokenizer, dialogue.template):
                say(f"note: {self.model}: {NO_TOOLS}")
            if interactive:
                say(f"{self.model.name}, by {model.runtime}; /help lists the commands")
                if not has_editor():
                    say("note: pip install 'mobilellm[chat]' brings a line editor (1 MB)")
            loop = ChatLoop(dialogue, self.max_new_tokens, sampling, interactive, self.json)
            loop.tools, loop.run_tools = tools, self.run_tools
            loop.confirm = (lambda: asked("run it? [y/N] ")) if interactive else None
            answers = loop.run(line_reader("> ", NAMES))
        if self.json:
            facts = {"messages": dialogue.messages, "answers": answers, "runtime": model.runtime}
            print_json(facts)
        return 0
