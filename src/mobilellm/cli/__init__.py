"""The command line: one verb a file; each parses, calls one function, prints.

`mobilellm --help` lists the verbs (`mobilellm.cli.verbs`), and each explains itself:

    mobilellm train recipes/laptop.toml --data.path data/book --out runs/book

Help must be quick: nothing here or at the top of a verb's file imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mobilellm.budget import limit_memory
from mobilellm.damage import as_user_error
from mobilellm.errors import unknown_name
from mobilellm.printable import one_line
from mobilellm.terminal.output import say


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit.

    The status is 0 when it went well, 2 with one line for a user's error, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        status = run(with_limit([a for a in given if a != "--debug"]))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        status = 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("mobilellm: interrupted", file=sys.stderr)
        status = 130
    except BaseException as error:
        complaint = as_user_error(error)
        if debug or complaint is None:
            raise
        if not complaint.said:
            say(f"mobilellm: {one_line(str(complaint))}")
        status = 2
    sys.exit(status)


def with_limit(arguments: list[str]) -> list[str]:
    """The arguments without --max-memory, which any verb takes and which is obeyed from here on."""
    rest: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == "--max-memory":
            limit_memory(value if equals else next(given, ""))
        else:
            rest.append(argument)
    return rest


def run(arguments: list[str]) -> int:
    """Parse and run; returns the exit status. `UserError` for an unknown verb names the nearest."""
    from mobilellm.cli.verbs import VERBS, list_verbs, union_of_verbs
    from mobilellm.terminal.notes import warnings_as_notes
    from mobilellm.version import __version__

    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("--help", "-h"):
        print(list_verbs())
        return 0 if arguments else 2
    if verb == "--version":
        print(f"mobilellm {__version__}")
        return 0
    import tyro

    from mobilellm.terminal.key_value import key_value_registry

    if verb.startswith(("--tyro-", "--tyro_")):
        tyro.cli(union_of_verbs(), prog="mobilellm", args=arguments, registry=key_value_registry())
    verb = verb.replace("_", "-")
    if verb not in VERBS:
        raise unknown_name("verb", verb, VERBS)
    silent = "--json" in rest
    options: dict[str, Any] = {}
    with warnings_as_notes(silent):
        if verb == "train":
            from mobilellm.cli.train import from_recipe
            from mobilellm.cli.train_help import HELP_ALL, short_help
            from mobilellm.terminal.notes import renamed_flags

            rest = renamed_flags(rest, silent)
            options["default"] = from_recipe(rest)  # the flags override the recipe's values
            if "--help" in rest or "-h" in rest:
                print(short_help(options["default"]))
                return 0
            rest = ["--help" if argument == HELP_ALL else argument for argument in rest]
        parsed: Any = tyro.cli(
            VERBS[verb].load(),
            prog=f"mobilellm {verb}",
            args=rest,
            registry=key_value_registry(),
            config=(tyro.conf.DisallowNone,),
            **options,
        )
        return int(parsed.run() or 0)
