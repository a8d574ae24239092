"""`mobilellm quickstart`: from a text to a working small model in one command.

    mobilellm quickstart --text book.txt --minutes 5 --out runs/book

The stages are those of prepare, train and eval; this verb chooses their settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import cast

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.printable import one_line
from mobilellm.recipe.recipe import PrecisionName
from mobilellm.records import Result
from mobilellm.report.figures import fixed, formatted
from mobilellm.schema import fault_of
from mobilellm.terminal.output import duration, print_json, put, say

HELD_OUT = 0.1  # the split nanoGPT uses on this text: the last tenth is validation


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Prepare a text, train a small model on it, score it, generate from it, and write a report
    and a page in which the model writes.

    Without --text it uses the tiny Shakespeare that comes with the package. Called again, it goes
    on where it stopped.

    Example: mobilellm quickstart --text book.txt --out runs/book
    """

    text: Path | None = None
    """Your own text: .txt, .md or .jsonl, each also .gz, or a folder of them."""
    out: Path = Path("runs/demo")
    """Run folder to make; the tokens go beside it, in OUT-data."""
    minutes: float = 2.5
    """About how long to train, wall clock; the speed of this machine is measured first. A size that
    cannot be trained in that time is refused, with the minutes that would do."""
    steps: int = 0
    """Train for exactly so many steps instead."""
    preset: str = "5M"
    """A shipped size (see `mobilellm info`)."""
    vocab_size: int = 2048
    """Tokens of the tokenizer."""
    seed: int = 0
    """Seeds the first weights, the order of the samples and the split."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Every stage in turn; stages that are done already are kept."""
        if not 0.05 <= self.minutes <= 60 * 24 * 30:
            raise UserError(f"--minutes {self.minutes}: must be from 0.05 to 43200")
        from mobilellm.prepare.sources import parse_sources
        from mobilellm.terminal.live_view import live_view
        from mobilellm.terminal.run_end import conclude
        from mobilellm.train import start
        from mobilellm.workflows.finish import finish
        from mobilellm.workflows.quickstart import fast_precision_for, recipe_for

        data = self.out.with_name(self.out.name + "-data")
        precision: PrecisionName = "auto"
        if self.text is not None:
            # A text that is not there is told before anything is measured.
            parse_sources((str(self.text),))
        if not self.steps and not (self.out / "recipe.toml").is_file():
            precision = fast_precision_for(self.preset, self.vocab_size, self.minutes * 60)
        self.prepare(data)
        earlier = self.finished()
        if earlier is not None:
            say(f"{self.out} is finished already, with these results; another --out is another run")
            self.page()
            return self.show(earlier)
        with live_view() as watcher:
            if (self.out / "recipe.toml").is_file():
                say(f"{self.out} was begun before: going on with it")
                outcome = start.resume(self.out, watcher)
            else:
                say("setting up" if self.steps else "measuring the speed of this machine")
                recipe = recipe_for(
                    data,
                    self.preset,
                    steps=self.steps,
                    seconds=self.minutes * 60,
                    seed=self.seed,
                    precision=precision,
                )
                outcome = start.train(self.out, recipe, watcher)
        if outcome.interrupted:
            return conclude(outcome, {}, self.json)
        say("baselines, samples and report")
        result = finish(outcome)
        self.page()
        return self.show(result)

    def finished(self) -> Result | None:
        """The result of an earlier call; None where there is none, or a damaged one."""
        path = self.out / "result.json"
        if not path.is_file():
            return None
        try:
            found = read_json(path)
            fault = fault_of(found, Result)
            if not fault and not (found.get("samples") and "next" in found):
                fault = "it is not whole"
        except UserError as error:
            fault = str(error)
        if fault:
            say(f"{path}: damaged ({one_line(fault)}): it is written again")
            return None
        return cast("Result", found)

    def page(self) -> None:
        """Write the page in which the model writes, unless it is there; say so where it cannot."""
        from mobilellm.workflows.demo_page import write_demo_page

        try:
            write_demo_page(self.out)
        except UserError as error:
            say(f"without the page that runs the model in a browser: {error}")

    def prepare(self, data: Path) -> None:
        """Make the tokens of the text, unless they are there from an earlier call.

        `UserError` when those are of another text.
        """
        from mobilellm.data.token_folder import TokenFolder
        from mobilellm.prepare.prepare import made_from, prepare
        from mobilellm.prepare.sources import parse_sources
        from mobilellm.terminal.output import progress

        with as_file(files("mobilellm") / "sample" / "tiny_shakespeare.txt.gz") as sample:
            sources = parse_sources((str(self.text or sample),))
            if data.exists():
                if not made_from(TokenFolder.open(data).manifest, sources):
                    raise UserError(
                        f"{data}: made from another text than {self.text or 'the sample'}",
                        hint="give another --out",
                    )
                return
            with progress("preparing", "bytes") as update:
                manifest = prepare(
                    sources,
                    data,
                    vocab_size=self.vocab_size,
                    held_out=HELD_OUT,
                    seed=self.seed,
                    progress=update,
                )
        train, held_out = manifest["splits"]["train"], manifest["splits"]["held_out"]
        say(f"tokens: {train['tokens']:,} to train on, {held_out['tokens']:,} held out")

    def show(self, result: Result) -> int:
        """The figures, a sample, and where the report and the model's page are."""
        from mobilellm.report.run_page import DEMO_PAGE

        page = self.out / DEMO_PAGE
        if self.json:
            files = {"report": str(self.out / "report.html")}
            if page.is_file():
                files["page"] = str(page)
            print_json(result | {"run": str(self.out)} | files)
            return 0
        held_out, training, baselines = result["held_out"], result["training"], result["baselines"]
        rival = ", ".join(
            f"{name} {baselines[name]:.2f}"
            for name in ("unigram", "gzip", "xz")
            if name in baselines
        )
        put(
            f"\nheld-out  {formatted(held_out['bits_per_byte'], '.3f')} bits a byte ({rival}), "
            f"perplexity {fixed(held_out['perplexity'], 2)} a token\n"
            f"model     {result['model']['parameters']['total']:,} parameters, "
            f"{training['tokens']:,} tokens in "
            f"{duration(training['seconds'])} ({training['tokens_per_second']:,.0f} tokens/s)"
        )
        sample = result["samples"][-1]
        text = (sample["prompt"] + sample["text"]).strip().splitlines()
        put("sample    " + "\n          ".join(text[:8]))
        put(f"\nreport    {self.out / 'report.html'}")
        if page.is_file():
            put(f"page      {page}: open it in a browser, and the model writes there")
        for step in result["next"]:
            put(f"{step['what'] + ':':26}{step['command']}")
        return 0
