"""What a client's part in a round is expected to cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gidef.types import Client


class Costs:
    """Seconds that each client's training took in earlier rounds, smoothed; they plan who trains whom, and move no result.

        c ← (1 − s) c + s · measured

    A client that was not measured yet is expected to cost what its examples cost elsewhere; before any measurement, its number of examples.
    Equal on all ranks if all learn the same, as `mean_over_world` sees to.

    Args: smoothing: s in (0, 1], the weight of the latest round.
    """

    def __init__(self, smoothing: float = 0.5) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing={smoothing}: expected a weight in (0, 1]")
        self._smoothing = smoothing
        self._known: dict[int, tuple[float, int]] = {}  # client → seconds, examples

    def __call__(self, client: Client) -> float:
        """Expected seconds of a client; examples while nothing was measured."""
        if client.id in self._known:
            return self._known[client.id][0]
        examples = sum(count for _, count in self._known.values())
        return client.num_examples * (sum(seconds for seconds, _ in self._known.values()) / examples if examples else 1.0)

    def learn(self, cohort: Sequence[Client], seconds: Sequence[float]) -> None:
        for client, measured in zip(cohort, seconds, strict=True):
            before, _ = self._known.get(client.id, (measured, 0))
            self._known[client.id] = before + self._smoothing * (measured - before), client.num_examples

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON takes it."""
        return {str(client): list(known) for client, known in sorted(self._known.items())}

    def load(self, state: dict[str, Any]) -> None:
        self._known = {int(client): (float(seconds), int(examples)) for client, (seconds, examples) in state.items()}
