"""The command line: one verb a file; each parses, calls one function, prints.

Help must be quick: nothing here or at the top of a verb's file imports torch.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from mobilellm.errors import UserError

DESCRIPTION = """From text to a language model that runs on a phone: prepare, plan, train, evaluate, generate, convert.

`mobilellm VERB --help` explains a verb. `--debug` anywhere shows the traceback of an error; `--version` the version."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 when it went well, 2 with one line for a user's error, 130 after
    Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        status = run([a for a in given if a != "--debug"])
    except UserError as error:
        if debug:
            raise
        if not error.said:
            print(f"mobilellm: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("mobilellm: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        status = 1
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Parse and run; returns the exit status."""
    import tyro

    from mobilellm.cli.convert import Convert
    from mobilellm.cli.data_stats import DataStats
    from mobilellm.cli.eval import Eval
    from mobilellm.cli.generate import Generate
    from mobilellm.cli.info import Info
    from mobilellm.cli.key_value import key_value_registry
    from mobilellm.cli.plan import Plan
    from mobilellm.cli.prepare import Prepare
    from mobilellm.cli.quickstart import Quickstart
    from mobilellm.cli.report import Report
    from mobilellm.cli.train import Train, from_recipe
    from mobilellm.cli.watch import Watch
    from mobilellm.version import __version__

    if arguments == ["--version"]:
        print(f"mobilellm {__version__}")
        return 0
    defaults: dict[type, Any] = {}
    if arguments[:1] == ["train"]:
        defaults[Train] = from_recipe(
            arguments[1:]
        )  # the recipe's values are what the flags override
    verbs = [
        Annotated[
            verb,
            tyro.conf.subcommand(
                re.sub(r"(?<=[a-z])(?=[A-Z])", "-", verb.__name__).lower(),
                **({"default": defaults[verb]} if verb in defaults else {}),
            ),
        ]
        for verb in (
            Prepare,
            DataStats,
            Plan,
            Train,
            Watch,
            Report,
            Eval,
            Generate,
            Info,
            Convert,
            Quickstart,
        )
    ]
    union: Any = functools.reduce(operator.or_, verbs)
    parsed: Any = tyro.cli(
        union,
        prog="mobilellm",
        description=DESCRIPTION,
        args=arguments,
        registry=key_value_registry(),
    )
    return int(parsed.run() or 0)
