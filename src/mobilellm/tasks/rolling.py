"""Whole texts as requests: each token scored once, in windows of the model's context, as the
harness rolls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mobilellm.tasks.requests import Encoder, Request, request


def rolling_requests(
    texts: Sequence[str], encoder: Encoder, max_length: int
) -> Iterator[list[Request]]:
    """The windows of each text. The first follows the token that begins a text; the last reaches
    back to be full."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for tokens in encoder.encode_batch(list(texts), True):
        windows = get_rolling_token_windows(
            token_list=tokens, prefix_token=encoder.prefix_id, max_seq_len=max_length, context_len=1
        )
        yield [
            request([*context, *scored], len(scored), max_length)
            for context, scored in map(make_disjoint_window, windows)
        ]
