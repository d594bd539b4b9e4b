"""Which clients take part in a round."""

from __future__ import annotations

import torch

from gidef.rng import generator


def draw_cohort(*, num_clients: int, size: int, seed: int, round: int) -> list[int]:
    """Client numbers of one round's cohort, sorted.

    Args:    num_clients: clients that exist.  size: clients to draw without replacement, in [1, num_clients].
             seed, round: the draw is a function of these two alone.
    Raises:  ValueError if size is out of range.
    """
    if not 1 <= size <= num_clients:
        raise ValueError(f"cohort size {size} is not in [1, {num_clients}]")
    order = torch.randperm(num_clients, generator=generator(seed, "cohort", round))
    return sorted(order[:size].tolist())
