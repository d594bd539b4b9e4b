"""What a round's sums and gathers over ranks put on the network, counted beforehand. Only the standard library, so that `gidef plan` runs anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 1 << 16
"""Coordinates that `robust` gathers at a time, of each rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """One round's. entries: float32 numbers in an update, on a rank that holds a slice of it its own.  cohort: clients of the round.  entry_bytes: of one
    entry in the sum.  robust: whether a rule combines the clients' own updates, which travel then, in place of a sum.  chosen: how many of them it chooses by
    their distances, whose updates travel again; 0 for a rule that combines all.  sharded_server: whether ranks hold slices of the server.  slots: tensors that its optimiser keeps for each parameter, gathered for a checkpoint.
    tail_bytes: of the exact numbers beside an update: a metric, weight, count and counters; they travel apart where the sum comes in buckets.
    """

    entries: int
    cohort: int
    entry_bytes: int = 8
    robust: bool = False
    chosen: int = 0
    sharded_server: bool = False
    slots: int = 0
    tail_bytes: int = 48

    def reduced(self, ranks: int) -> float:
        """Bytes of the all-reduce over so many ranks that moves as much from each rank, on average, as all of the round's collectives.

        An all-reduce of B bytes moves 2 (G−1)/G · B from a rank. Half as much: a reduce-scatter of B, an all-gather of B together, and an all-to-all of B
        on each rank. The seconds that clients took, and an evaluation's logits, are not in it.
        """
        if ranks == 1:
            return 0.0
        total = float(self.tail_bytes)
        if self.robust:
            own = 4 * (self.cohort + self.chosen) * self.entries / ranks
            turns = math.ceil(math.ceil(self.entries / BLOCK) / ranks)
            total += own / 2 + 4 * turns * ranks * BLOCK / 2
            total += 8 * 8 * self.cohort**2 if self.chosen else 0  # distances, see robust.LIMBS
        else:
            total += self.entry_bytes * self.entries / (2 if self.sharded_server else 1)
        if self.sharded_server:
            total += 4 * self.entries * (1 + self.slots) / 2
        return total
