"""What the victims' clients release to each attack: once, several times, or to a malicious server. Each is computed once and shared."""

from __future__ import annotations

import dataclasses
from typing import Any

from gidef import config, observe
from gidef.attack.imprint import zeroed_level
from gidef.cells import Cell
from gidef.rng import stream_seed
from gidef.runs import Run


class Releases:
    """Computes releases when they are first asked for. stream: names other draws of the clients' noise than those of the run itself."""

    def __init__(self, run: Run, *, stream: str | None = None) -> None:
        self._run, self._stream, self._made = run, stream, {}

    def of(self, cell: Cell) -> list[observe.Victims]:
        """One per round that the attack sees; of the control, those that say nothing of the images. A malicious server's weights become the cell's snapshot."""
        place, attack = (cell.defence, cell.seed, cell.checkpoint, cell.control), cell.attack
        if isinstance(attack, config.ZeroedLevel):
            cell.snapshot = dataclasses.replace(cell.snapshot, params={**cell.snapshot.params, **zeroed_level(cell.snapshot.params)})
            return [self._once((*place, "zeroed"), cell)]
        if isinstance(attack, config.ImprintServer):
            return [self._once((*place, 0), cell)]  # the images and labels; the imprinted release is computed where it is attacked
        return [self._once((*place, repeat), cell, repeat=repeat) for repeat in range(getattr(attack, "rounds", 1))]

    def _once(self, key: tuple[Any, ...], cell: Cell, **how: Any) -> observe.Victims:
        if key not in self._made:
            seed = cell.seed if self._stream is None else stream_seed(cell.seed, self._stream)
            self._made[key] = observe.release(self._run, cell.trained, cell.snapshot, seed=seed, control=cell.control, **how)
        return self._made[key]
