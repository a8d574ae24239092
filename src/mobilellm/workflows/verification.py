"""Whether a file that was just written is the model that it was written from.

    found = run_and_compare(staging, runtime, network, tokenizer, exact=True)
    found.largest_difference, found.kl

A format of weights is read back by our own reader; a program is run by the runtime that it is for:
the whole prompt at once, in chunks, and token by token. Files in float32 are held to the largest
difference of their logits. Where activations are rounded to int8 that difference says nothing,
since rounding noise grows from block to block; such files are held to the Kullback-Leibler
divergence from the network on the same grid, and to the loss on a text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.gguf.tokenizer_parts import unsayable
from mobilellm.interop import gguf_reader
from mobilellm.interop.loaded import Loaded
from mobilellm.model.network import Network
from mobilellm.runtimes import llama_cpp
from mobilellm.runtimes.llama_cpp_tokens import llama_cpp_tokens
from mobilellm.runtimes.session import Runtime, Session
from mobilellm.runtimes.table import open_session
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.workflows.token_probe import TokenDifference, compare_ids, compare_tokens, probes

# Logits in float32 may differ by this much of their spread: the same products in another order
# differ by far less.
EXACT = 1e-4
# Or, at a position where our own float32 is that far from float64, by a few times as much.
NOISE = 4.0
# Nats by which a file with rounded activations may be away from the network on its grid: rounding
# costs a twentieth of a nat at 135M parameters, and a fault several nats.
MAX_KL = 0.5
PROMPT_TOKENS = 32
TEXT_TOKENS = 64
TEXT = (
    "The river rises in the hills north of the town and flows past three villages before it "
    "reaches the sea. In spring the water is high, and the children are told to stay away from "
    "its banks. Most of the old mills are gone now; one of them, built of grey stone, is a school."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How well a result came out."""

    largest_difference: float
    """Of the logits, on a prompt that is the same for every model."""
    logit_std: float
    """Spread of the logits, to set the difference against."""
    same_first_choice: float
    """Share of positions where the likeliest token is the same."""
    kl: float | None = None
    """Mean divergence of the file's distributions from the network's, nats a token."""
    loss_before: float | None = None
    """Of the network on a short text, nats a token; None without a tokenizer."""
    loss_after: float | None = None
    """Of the file on the same text."""
    context: int | None = None
    """Positions that the file has room for, as its runtime says."""

    def __str__(self) -> str:
        """In a few words, for notes."""
        said = (
            f"logits differ by at most {self.largest_difference:.3g} (their spread is "
            f"{self.logit_std:.3g}), the first choice is the same at {self.same_first_choice:.1%}"
        )
        if self.kl is not None:
            said += f", KL {self.kl:.3g} nats"
        if self.loss_before is not None and self.loss_after is not None:
            said += f", loss {self.loss_before:.3f} -> {self.loss_after:.3f}"
        return said


def prompt(network: Network) -> list[int]:
    """A prompt that is the same for every format: tokens from all over the vocabulary."""
    config = network.config
    count = min(PROMPT_TOKENS, config.max_position_embeddings)
    return [(7919 * i + 1) % config.vocab_size for i in range(count)]


@torch.inference_mode()
def logits(network: Network, ids: Sequence[int] | None = None) -> Tensor:
    """Logits (T, V) of `ids`, or of the prompt that is the same for every format."""
    wanted = prompt(network) if ids is None else list(ids)
    return network(torch.tensor([wanted]))[0].float()


def compare(before: Tensor, after: Tensor) -> Comparison:
    """Logits (T, V) before and after."""
    return Comparison(
        largest_difference=float((after - before).abs().max()),
        logit_std=float(before.std()),
        same_first_choice=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    )


def run_and_compare(
    path: Path, runtime: Runtime, network: Network, tokenizer: Tokenizer | None, *, exact: bool
) -> Comparison:
    """Run the program at `path` and compare it with the network that it should be.

    `exact` says that its numbers are float32 throughout; a difference that is large for these is
    set against that of our own float32 from the network in float64. `UserError` when it is another
    network, or brings another tokenizer than `tokenizer`.
    """
    check_tokenizer(runtime.read_tokenizer(path), tokenizer)
    with open_session(path, runtime.name) as session:
        ids = prompt(network)[: session.context]
        before = logits(network, ids)
        positions, after = zip(*fed(session, ids), strict=True)
        expected, found = before[list(positions)], torch.stack(after)
        worst = max(
            _kl(before[places], values)
            for places, values in _by_way(positions, after, before.shape[0])
        )
        losses = _losses(session, network, tokenizer)
        context = session.context
    result = compare(expected, found)
    limit = EXACT * max(1.0, result.logit_std)
    if exact and not result.largest_difference <= limit:
        # Where activations are large float32 itself is further off, ours as much as the runtime's.
        precise = logits(copy.deepcopy(network).double(), ids)[list(positions)]
        result = compare(precise, found)
        noise = NOISE * (expected - precise).abs().amax(-1)
        if not bool(((found - precise).abs().amax(-1) <= noise.clamp(min=limit)).all()):
            raise _another_network(
                f"logits that differ by {result.largest_difference:.3g}", runtime
            )
    if not worst <= MAX_KL:
        raise _another_network(f"distributions {worst:.3g} nats away", runtime)
    return Comparison(
        largest_difference=result.largest_difference,
        logit_std=result.logit_std,
        same_first_choice=result.same_first_choice,
        kl=_kl(expected, found),
        loss_before=losses[0],
        loss_after=losses[1],
        context=context,
    )


def fed(session: Session, ids: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(position, its logits (V,)) of `ids` in one piece, in chunks, and then one by one."""
    count = len(ids)
    for chunks in ([count], _chunks(count), [1] * count):
        session.reset()
        at = 0
        for size in chunks:
            found = torch.from_numpy(session.feed(ids[at : at + size]).copy())
            at += size
            yield at - 1, found.float()


def _chunks(count: int) -> list[int]:
    """Sizes of about 7 that add up to `count`, with a single token between."""
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, (7, 1, 5)[len(sizes) % 3]))
    return sizes


def _by_way(
    positions: Sequence[int], found: Sequence[Tensor], count: int
) -> Iterator[tuple[list[int], Tensor]]:
    """What `fed` yielded, apart: each way of feeding ends with the last position."""
    start = 0
    for i, position in enumerate(positions, 1):
        if position == count - 1:
            yield list(positions[start:i]), torch.stack(list(found[start:i]))
            start = i


def _kl(expected: Tensor, found: Tensor) -> float:
    """Mean over positions of KL(expected || found), nats; both are logits (N, V)."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def _losses(
    session: Session, network: Network, tokenizer: Tokenizer | None
) -> tuple[float | None, float | None]:
    """Nats a token on a short text, of the network and of the file."""
    if tokenizer is None:
        return None, None
    start = [] if tokenizer.prefix_id is None else [tokenizer.prefix_id]
    ids = [*start, *tokenizer.encode(TEXT)][: min(TEXT_TOKENS, session.context)]
    if len(ids) < 2:
        return None, None
    session.reset()
    after = torch.stack([torch.from_numpy(session.feed([i]).copy()).float() for i in ids[:-1]])
    wanted = torch.tensor(ids[1:])
    before = logits(network, ids[:-1])
    return float(F.cross_entropy(before, wanted)), float(F.cross_entropy(after, wanted))


def check_tokenizer(found: Tokenizer | None, wanted: Tokenizer | None) -> None:
    """`UserError` when the tokenizer in a result is missing, or is another one."""
    if wanted is None:
        return
    if found is None:
        raise UserError(
            "the result came out without its tokenizer: not written",
            hint="this is a bug, report it",
        )
    if differences := compare_tokens(wanted, found):
        raise _another_tokenizer(differences)


def check_tokens(path: Path, read_back: Loaded, wanted: Tokenizer | None) -> list[str]:
    """Compare the tokens of a file or folder of weights with those that it was written from.

    Ids of a GGUF file are llama.cpp's where it is installed, else those of `read_back`, which is
    our own reading of `path`. Returns a line where ids differ because the format cannot say what
    the tokenizer does; `UserError` where they differ and nothing says why.
    """
    if wanted is None:
        return []
    found, fault = read_back.tokenizer, read_back.tokenizer_fault
    in_gguf = gguf_reader.recognizes(path)
    reasons = unsayable(wanted) if in_gguf else []
    by_llama_cpp = in_gguf and llama_cpp.RUNTIME.installed
    notes: list[str] = []
    if found is not None:
        differences = compare_tokens(wanted, found)
    elif fault is None or not by_llama_cpp:
        said = "its tokenizer is missing" if fault is None else fault.what
        raise UserError(
            f"the result cannot be read back ({said.removeprefix(f'{path}: ')}): not written",
            hint="--no-verify writes it all the same",
        )
    else:
        differences = []
        notes.append(f"mobilellm itself cannot read back the tokenizer in it: {fault.what}")
    if by_llama_cpp:
        differences = [one for one in differences if one.is_setting]
        with llama_cpp_tokens(path) as encode:
            differences += compare_ids(
                wanted, lambda text, parse: encode(text, parse_special=parse)
            )
    if differences and not (reasons and not any(one.is_setting for one in differences)):
        raise _another_tokenizer(differences)
    if differences:
        reader = "llama.cpp" if by_llama_cpp else "the file"
        notes.append(
            f"{reader} has other ids for {len(differences)} of {len(probes(wanted))} texts that "
            f"were tried, for the reasons above; {differences[0]}"
        )
    return notes


def _another_tokenizer(differences: Sequence[TokenDifference]) -> UserError:
    return UserError(
        f"the result's tokenizer is another one in {len(differences)} of the probes "
        f"({differences[0]}): not written",
        hint="--no-verify writes it all the same",
    )


def _another_network(what: str, runtime: Runtime) -> UserError:
    return UserError(
        f"{runtime.name} computes {what} from those it was written from: not written",
        hint="this is a bug, report it",
    )
