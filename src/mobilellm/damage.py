"""The last net: what an input raised that is damaged in a way nobody thought of, as one line.

    with reading(path, "a GGUF file"):      # marks what is raised within, and lets it pass
        ...
    line_of(error)                          # "m.gguf: not read as a GGUF file (KeyError: 'x'); ..."

Readers check what they read and raise `UserError`; what gets as far as this is their fault, and
`--debug` shows its traceback. An error that no input is to blame for has no line: it is a bug.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from mobilellm.errors import UserError, first_line

NET = "not read as"
"""What every line of the net says."""
INPUT = "mobilellm_input"
"""The attribute of an exception that holds the path and the kind of the input it came from."""


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Mark what is raised within as the doing of the input at `path`, which should be `kind`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if is_failure(error) and not hasattr(error, INPUT):
            with contextlib.suppress(AttributeError):  # of an exception that takes no attributes
                setattr(error, INPUT, (str(path), kind))
        raise


def as_user_error(error: BaseException) -> UserError | None:
    """An exception as a user's error: that itself, one marked by `reading`, the operating system's
    refusal of a file, or memory that ran out. None for a bug."""
    if isinstance(error, UserError):
        return error
    if not is_failure(error):
        return None
    path, kind = getattr(error, INPUT, ("", ""))
    if _out_of_memory(error):
        what = f"{path}: memory ran out" if path else "memory ran out"
        return UserError(f"{what} ({first_line(error)})", hint="use a machine with more")
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fspath(error.filename) if not isinstance(error.filename, int) else path
        name = os.fsdecode(name) if isinstance(name, bytes) else str(name)
        return UserError(f"{name or path}: {(error.strerror or first_line(error)).lower()}")
    if not path:
        return None
    said = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"{path}: {NET} {kind} ({said})", hint="--debug shows where that was met")


def line_of(error: BaseException) -> str | None:
    """The line for an exception, without a bug's; None for a bug."""
    found = as_user_error(error)
    return None if found is None else str(found)


def is_failure(error: BaseException) -> bool:
    """Whether something failed, and nobody asked this process to end. A panic of a library written
    in Rust arrives as a BaseException of a module that cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in said
        or "not enough memory" in said
    )
