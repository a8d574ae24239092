"""How the tokens of a step are divided: into sequences, over processes, into micro-batches.

    batching = Batching.of(sequence_length=2048, batch_tokens=2_097_152, world_size=32)
    batching.sequences, batching.rows                # 1024 a step, 32 of one process
    batching.micro_batch_size, batching.passes       # 8 at a time, 4 times

Planning, training and measuring ask here; none divides again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mobilellm.divisors import largest_divisor, nearest_divisors, nearest_multiples
from mobilellm.errors import UserError

MICRO_BATCH_TOKENS = 16384  # of a forward and backward pass, where the micro-batch is not given


@dataclass(frozen=True, kw_only=True)
class Batching:
    """One step's tokens, divided. `of` makes it, and checks that everything divides."""

    sequence_length: int
    """Tokens a sequence."""
    batch_tokens: int
    """Tokens a step, over all processes."""
    world_size: int
    """Processes."""
    micro_batch_size: int
    """Sequences in one forward and backward pass of one process."""

    @classmethod
    def of(
        cls,
        *,
        sequence_length: int,
        batch_tokens: int,
        world_size: int = 1,
        micro_batch_size: int = 0,
    ) -> Batching:
        """The division of a step. `micro_batch_size` 0 takes up to 16,384 tokens; another is
        lowered to a divisor.

        `UserError` when the batch does not divide into sequences, or these do not divide by the
        processes; it names the nearest numbers that do.
        """
        check_batch(sequence_length, batch_tokens)
        sequences = batch_tokens // sequence_length
        if sequences % world_size:
            processes = nearest_divisors(sequences, world_size)
            batches = [n * sequence_length for n in nearest_multiples(world_size, sequences)]
            raise UserError(
                f"{sequences} sequences a step (batch_tokens / sequence_length) do not "
                f"divide by {world_size} processes",
                hint=f"use {either(processes)} processes, or batch_tokens = {either(batches)}",
            )
        most = micro_batch_size or max(1, MICRO_BATCH_TOKENS // sequence_length)
        return cls(
            sequence_length=sequence_length,
            batch_tokens=batch_tokens,
            world_size=world_size,
            micro_batch_size=largest_divisor(sequences // world_size, most),
        )

    @property
    def sequences(self) -> int:
        """Sequences a step, over all processes."""
        return self.batch_tokens // self.sequence_length

    @property
    def rows(self) -> int:
        """Sequences a step of one process."""
        return self.sequences // self.world_size

    @property
    def passes(self) -> int:
        """Forward and backward passes a step of one process: more than one accumulates
        gradients."""
        return self.rows // self.micro_batch_size

    def with_micro_batch(self, most: int) -> Batching:
        """The same step in micro-batches of at most `most` sequences (at least 1)."""
        return dataclasses.replace(self, micro_batch_size=largest_divisor(self.rows, most))


def check_batch(sequence_length: int, batch_tokens: int) -> None:
    """`UserError` unless the batch divides into whole sequences; it names the nearest batches that
    do."""
    if sequence_length < 1 or batch_tokens < 1 or batch_tokens % sequence_length:
        raise UserError(
            f"batch_tokens = {batch_tokens} does not divide by sequence_length = {sequence_length}",
            hint=(
                f"the nearest is {either(nearest_multiples(max(1, sequence_length), batch_tokens))}"
            ),
        )


def either(numbers: list[int]) -> str:
    """ "4 or 8"."""
    return " or ".join(map(str, numbers))
