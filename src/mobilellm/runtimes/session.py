"""One protocol over what runs a model file.

    with open_session(Path("model.gguf"), threads=2) as session:
        logits = session.feed([1, 2, 3])       # (V,) after the last token
        logits = session.feed([4])             # goes on from there

A session is one sequence with its cache. Each runtime has an entry in table.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mobilellm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from mobilellm.tokenizer.tokenizer import Tokenizer


class Session(Protocol):
    """A model that runs: one sequence of tokens and what the model remembers of them."""

    vocab_size: int
    """Logits that `feed` returns, V."""
    context: int
    """Most tokens that the sequence can have."""
    end_tokens: tuple[int, ...]
    """Tokens that end a text, as the file says; empty where it names none."""

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Logits (V,), float32, of what follows once `ids` are appended to the sequence.

        `UserError` when `ids` is empty, has a token outside the vocabulary, or the sequence would
        be longer than `context`.
        """
        ...

    def reset(self) -> None:
        """Forget the sequence; the next `feed` begins a new one."""
        ...

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens of the sequence. Returns how many are held
        then: 0 where the runtime cannot forget a part."""
        ...

    def close(self) -> None:
        """Give back what the runtime holds. Nothing else may be called after it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Something that runs files of some kind."""

    name: str
    """Key in RUNTIMES, as tables print it."""
    what: str
    """What it runs, in a few words."""
    package: str
    """The Python package that it needs, by the name that is imported."""
    extra: str
    """The extra of mobilellm that brings the package; empty where it needs none."""
    recognizes: Callable[[Path], bool]
    """Whether what lies at this path, which exists, is for it."""
    open: Callable[[Path, int | None, int | None], Session]
    """Takes path, context (the file's own when None) and threads (the machine's when None)."""
    read_tokenizer: Callable[[Path], Tokenizer | None]
    """The tokenizer in the file or beside it, or None."""
    file_of: Callable[[Path], Path] = lambda path: path
    """The file that is run for a path: that of a folder where one holds several."""
    keeps_repeats: bool = True
    """Whether its files hold blocks once that are applied several times."""
    imports: tuple[str, ...] = ()
    """Modules beside `package` that opening a file imports when it is the first, in their order."""

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None

    def require(self) -> None:
        """`UserError` that names the extra, when the package is not installed."""
        if not self.installed:
            mend = f"'mobilellm[{self.extra}]'" if self.extra else self.package
            raise UserError(
                f"{self.name} is not installed ({self.package})", hint=f"pip install {mend}"
            )


def check_ids(ids: Sequence[int], held: int, session: Session) -> None:
    """What every `feed` checks first, with `held` tokens in the sequence so far."""
    if not ids:
        raise UserError("no tokens to go on with", hint="give at least one token")
    if min(ids) < 0 or max(ids) >= session.vocab_size:
        raise UserError(
            f"token {max(ids)} is outside the vocabulary of {session.vocab_size}"
            if min(ids) >= 0
            else f"token {min(ids)} is negative"
        )
    if held + len(ids) > session.context:
        raise UserError(
            f"{held + len(ids)} tokens exceed the file's context of {session.context}",
            hint="shorten the prompt, or convert with a longer --context",
        )
