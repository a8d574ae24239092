"""The one exception that means "the user can put right".

The command line prints it as a single line and exits with status 2; anything else that escapes
is a bug and keeps its traceback.

    what = "data/train-00000.npy: 512 bytes, the manifest says 8192"
    raise UserError(what, hint="prepare the data again")
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Bad input: what was wrong and where (`what`), and what to do about it (`hint`)."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what, self.hint = what, hint
        self.said = False  # by another process of the same job: not to be printed again
        super().__init__(f"{what}; {hint}" if hint else what)


@contextlib.contextmanager
def located(where: object) -> Iterator[None]:
    """Put `where` before what a `UserError` of the block says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error.what}", hint=error.hint) from None


class MissingPackageError(UserError):
    """A file needs a package that is not installed.

    That is no fault of the file, which is never skipped for it.
    """


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not among `known`, naming the nearest one, or all of them
    when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return UserError(
        f"{where}: unknown {kind} {name!r}" if where else f"unknown {kind} {name!r}", hint=hint
    )


MAX_LINE = 160  # characters of another library's message that fit into a line of ours


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, cut to `MAX_LINE` characters; its type's name
    when it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip()[:MAX_LINE]
