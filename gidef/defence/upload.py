"""How many bits an update takes that leaves a client as its defence makes it: of names and sizes alone, whatever the values.

Counted is what a client has to send for the server to know the update: values, and where not all are sent, their places. Not counted are keys, shares
of keys and other messages about masks, headers and any further (entropy) coding.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 32
MASKED = 64
"""Bits of an entry behind the masks of a secure sum, whatever it held before."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor on its way. entries: n.  kept: of these, those that are not set to 0.  bits: of a value.  numbers: float32 beside the values, such as a scale.

    A value of one bit is a sign; values of more bits have one that says 0. A change of updates maps one to another by a method `packed` (see
    `defence.share.Transform`).
    """

    entries: int
    kept: int
    bits: int = FLOAT
    numbers: int = 0

    @staticmethod
    def plain(entries: int) -> Packed:
        """Every entry in float32."""
        return Packed(entries, entries)

    @property
    def total(self) -> int:
        """Bits. Where some entries are 0, the least of: each kept value with its place, ⌈log₂ n⌉ bits; a bitmap of n and the kept values; all n values."""
        beside = FLOAT * self.numbers
        if self.kept == self.entries:
            return self.entries * self.bits + beside
        places = min(self.kept * (self.entries - 1).bit_length(), self.entries)
        sparse = self.kept * self.bits + places
        return beside + (sparse if self.bits == 1 else min(sparse, self.entries * self.bits))
