"""Which documents are held out: by a hash of their place, so that no pass over the data is
needed to know.

    rule = decide(sources, fraction=0.01, seed=0, settings=ReadSettings(), on_bad="stop")
    rule.held_out("wiki", 0, 4711)

A document's place is its source, the number of its file there, and its position in that file.
Only where there are so few documents that chance leaves one side empty is one of them moved, and
a source that is a single document is cut in two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from mobilellm.errors import UserError
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.readers.reader import ReadSettings, Record, Span
from mobilellm.readers.table import records


def all_records(
    sources: list[Source], settings: ReadSettings, on_bad: str
) -> Iterator[tuple[str, int, Record]]:
    """(source, number of the file, record) of everything that is neither empty nor bad.

    `UserError` for the first bad one where `on_bad` is "stop".
    """
    for source in sources:
        for number, path in enumerate(source.files()):
            for record in records(path, Span(), settings):
                if record.fault is not None:
                    if on_bad == "stop":
                        raise record.fault
                elif record.text != "":
                    yield source.name, number, record


def decide(
    sources: list[Source], fraction: float, seed: int, settings: ReadSettings, on_bad: str
) -> SplitRule:
    """The rule for these sources.

    Documents are read until one of each side is found, which mostly is at once. `UserError` for a
    fraction out of range, and for sources too small to hold anything out.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held out {fraction}: must be a fraction above 0 and below 1")
    tails = tuple(
        source.name for source in sources if _is_one_text(source, fraction, settings, on_bad)
    )
    rule = SplitRule(
        rule="tail" if len(tails) == len(sources) else "documents",
        fraction=fraction,
        seed=seed,
        tails=tails,
    )
    if tails:
        return rule  # which leaves neither side empty
    first: list[tuple[float, list[object]]] = []
    lowest: tuple[float, list[object]] = (2.0, [])
    any_held_out = any_trained = False
    total, is_sample = 0, False
    for source, file, record in all_records(sources, settings, on_bad):
        place = [source, file, record.key]
        draw, _ = rule.draw(source, file, record.key)
        any_held_out, any_trained = any_held_out or draw < fraction, any_trained or draw >= fraction
        if any_held_out and any_trained:
            return rule
        total, is_sample = total + 1, record.ids is not None
        lowest = min(lowest, (draw, place), key=lambda one: one[0])
        first = [*first, (draw, place)][:2]
    if not total:
        for _ in all_records(sources, settings, "stop"):
            pass  # which raises the first fault, where there is one
        raise UserError(
            f"{sources[0].paths[0]}: no text in it"
            + (" or the other sources" if len(sources) > 1 else "")
        )
    if total == 1 and not is_sample:
        # It is too short to be cut, which is said where it is cut.
        return SplitRule(rule="tail", fraction=fraction, seed=seed, tails=(str(lowest[1][0]),))
    if total == 1:
        raise UserError(
            f"{sources[0].paths[0]}: a single sample is too little to train on and hold out from"
        )
    # All draws fell on one side: the lowest is moved out, or the first of the others is moved in.
    if not any_held_out:
        return SplitRule(rule="documents", fraction=fraction, seed=seed, forced_out=lowest[1])
    moved = next(place for _, place in first if place != lowest[1])
    return SplitRule(rule="documents", fraction=fraction, seed=seed, forced_in=moved)


def _is_one_text(source: Source, fraction: float, settings: ReadSettings, on_bad: str) -> bool:
    """Whether a source is a single document that is long enough to be cut in two."""
    found = list(itertools.islice(all_records([source], settings, on_bad), 2))
    if len(found) != 1 or found[0][2].ids is not None:
        return False
    characters = found[0][2].length()
    return 0 < int(characters * (1 - fraction)) < characters


def training_texts(
    sources: list[Source], rule: SplitRule, settings: ReadSettings, on_bad: str, share: float = 1.0
) -> Iterator[str]:
    """The texts that are not held out, for training a tokenizer.

    They are all of them, or a `share` that is chosen by hash.
    """
    for source, file, record in all_records(sources, settings, on_bad):
        if source in rule.tails:
            left = int(record.length() * (1 - rule.fraction))
            for piece in record.pieces():
                yield piece[:left]
                left = max(0, left - len(piece))
            continue
        held_out, bits = rule.held_out(source, file, record.key)
        if not held_out and (bits & 0xFFFFFFFF) / 2.0**32 < share:
            yield from record.pieces()
