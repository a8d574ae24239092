"""A session and the tokens that it holds, so that of each prompt only what is new is read.

session = RememberingSession(model.session)
fresh = session.fresh(prompt)          # forgets what the prompt does not begin with
logits = session.feed(fresh)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mobilellm.runtimes.session import Session


class RememberingSession:
    """A session that remembers its tokens."""

    def __init__(self, session: Session) -> None:
        """It begins with an empty sequence."""
        self.session = session
        self.vocab_size, self.context = session.vocab_size, session.context
        self.end_tokens = session.end_tokens
        self.held: list[int] = []
        """The tokens of the sequence."""
        session.reset()

    def fresh(self, prompt: Sequence[int]) -> list[int]:
        """What of the prompt is still to be fed, the last token always; everything that the prompt
        does not begin with is forgotten."""
        same, most = 0, min(len(self.held), len(prompt) - 1)
        while same < most and self.held[same] == prompt[same]:
            same += 1
        return list(prompt[self.rewind(same) :])

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says. Where it breaks off, all is forgotten: the session may hold a part."""
        try:
            logits = self.session.feed(ids)
        except BaseException:
            self.reset()
            raise
        self.held += ids
        return logits

    def rewind(self, length: int) -> int:
        """As `Session` says."""
        before, self.held = self.held, []  # so that nothing is held of what is broken off here
        kept = self.session.rewind(length)
        self.held = before[:kept]
        return kept

    def reset(self) -> None:
        """As `Session` says."""
        self.held = []
        self.session.reset()

    def close(self) -> None:
        """As `Session` says."""
        self.session.close()
