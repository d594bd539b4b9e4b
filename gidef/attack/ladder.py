"""Attacks that go on when memory runs out: with less at once, then in other forms that need less."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gidef.attack.batch import Chunk
from gidef.attack.engine import Progress, run_chunk
from gidef.attack.matching import Matching, Simulate
from gidef.types import Observation, Tensors

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc", "not enough memory", "status_alloc_failed")
"""Of allocators, and of cuBLAS, cuDNN and cuSOLVER, which tell by their status when their workspaces or handles find no room."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A way to run a chunk. large: on the module itself, one attack at a time."""

    at_once: int
    precision: str
    form: str
    large: bool = False

    def words(self) -> str:
        if self.large:
            return "one attack at a time on the module itself, with activation checkpointing"
        form = "" if self.form == "double_backward" else f", {self.form.replace('_', ' ')} instead of double backward, which finds less where there are ReLUs"
        return f"{self.at_once} attack{'s' if self.at_once > 1 else ''} at once, {self.precision}{form}"


def rungs(matching: Matching, simulate: Simulate, at_once: int, precision: str, *, large: bool) -> list[Rung]:
    """From the asked way down: half as many at once and so on to one, bfloat16, the module itself; in its place, where there is none, no second derivatives."""
    if matching.coupling is not None:  # its starts are one program
        found = [Rung(at_once, precision, matching.form)]
    else:
        found, size = [], at_once
        while size >= 1:
            found.append(Rung(size, precision, matching.form))
            size //= 2
    last = found[-1].at_once
    if precision != "bfloat16_all":
        found.append(Rung(last, "bfloat16_all", matching.form))
    if large:
        return [*found, Rung(1, "float32", "central_difference", large=True)]
    if matching.form == "double_backward" and callable(getattr(simulate, "loss", None)):
        found += [Rung(last, "float32", "central_difference"), Rung(last, "bfloat16_all", "central_difference")]
    return found


def climb(
    chunk: Chunk,
    observations: Sequence[Observation],
    simulate: Simulate,
    matching: Matching,
    *,
    notice: Callable[[str], None],
    at_once: int | None = None,
    precision: str = "float32",
    mode: str = "vmap",
    large: Callable[[Chunk], Generator[Progress, None, Tensors]] | None = None,
    **options: Any,
) -> Generator[Progress, None, Tensors]:
    """`run_chunk`, and the same with less each time that memory runs out.

    The chunk then begins anew, so that its result does not depend on where it ran out. In order: half of the attacks at once, down to one;
    parameters, targets and the client's pass in bfloat16; `large`, the attack on the module itself with activation checkpointing (see large.py).
    Where there is no such form: the central difference, which needs no second derivatives, if the simulator carries its loss, in float32 and in
    bfloat16. In a program it moves kinks, and finds less where there are ReLUs (`recipes/bench/first_order.py`); on the module they are held.

    Args:    notice: is told once of each step down.  large: large(chunk) runs these attacks as `invert_large` does.
             The rest as `run_chunk`.
    Yields:  Progress.  Returns: as `run_chunk`.  Raises: the last rung's error, and at once whatever is no lack of memory.
    """
    ways = rungs(matching, simulate, at_once or len(chunk), precision, large=large is not None)
    for number, way in enumerate(ways):
        settings = matching if way.form == matching.form else dataclasses.replace(matching, form=way.form)
        # a recorded program keeps what it needs; below the first rung memory counts, not dispatch
        how = mode if way.at_once == ways[0].at_once and number == 0 else ("loop" if way.at_once == 1 else "vmap")
        try:
            if way.large:
                return (yield from large(chunk))
            return (
                yield from run_chunk(chunk, observations, simulate, settings, mode=how, precision=way.precision, at_once=way.at_once, **options)
            )
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error) or number + 1 == len(ways):
                raise
            notice(f"memory ran out with {way.words()}: it goes on with {ways[number + 1].words()}.")
        gc.collect()  # outside the handler, whose traceback holds the tensors of the failed try
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no more."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error).lower() for word in _WORDS)
