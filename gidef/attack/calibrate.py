"""How many attacks to run as one program, and how: by a short measurement of time and memory on the machine at hand.

Batching is no gain as such: where one attack fills a core, a vectorised program can be slower than a loop. So every candidate runs a few
iterations of the real attack, and the one that would finish all of them first is taken, recording and compiling included.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gidef.attack.batch import make_batch
from gidef.attack.engine import stages, width_of
from gidef.attack.matching import Matching, Simulate
from gidef.attack.program import Programs
from gidef.errors import InputError
from gidef.types import Observation

MOST = {"cpu": 256, "cuda": 1024}
"""Attacks in one program, at most."""
SHORT_S, PAYS = 5.0, 0.2
"""Seconds that are always granted, and the share of the attacks' own time that a calibration may take."""
SPARED = 0.2
"""Share of the free memory that is left alone."""
GAIN = 0.97
"""A larger program is tried as long as it takes at most this share of the time per attack of the last one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One line of the calibration's table. ms: per attack and iteration, the median.  first_s: of the first call, with recording and
    compiling.  peak_bytes: of the program, None where it was not measured.  error: why it is out of the question."""

    mode: str
    at_once: int
    ms: float | None
    first_s: float
    peak_bytes: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The candidates that were measured, and the chosen one."""

    mode: str
    at_once: int
    candidates: tuple[Candidate, ...]
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        candidates = tuple(Candidate(**one) for one in value["candidates"])
        return cls(value["mode"], value["at_once"], candidates, tuple(value["notices"]))

    def lines(self) -> list[str]:
        """The table in words, one line per candidate, the chosen one marked."""
        found = []
        for one in self.candidates:
            chosen = "  <- chosen" if (one.mode, one.at_once) == (self.mode, self.at_once) else ""
            cost = f"{one.ms:9.3f} ms per attack-iteration, first call {one.first_s:6.2f} s" if one.ms is not None else f"not usable: {one.error}"
            memory = f", {one.peak_bytes / 2**20:.0f} MiB" if one.peak_bytes is not None else ""
            found.append(f"{one.mode:9} {one.at_once:4} at once  {cost}{memory}{chosen}")
        return found


def calibrate(
    observations: Sequence[Observation],
    simulate: Simulate,
    matching: Matching,
    *,
    seed: int,
    modes: Sequence[str] = ("loop", "vmap", "traced"),
    workers: int = 1,
    at_once: int | None = None,
    most: int | None = None,
    attacks: int | None = None,
    iterations: int = 3,
    budget_s: float = 60.0,
    memory_bytes: int | None = None,
    precision: str = "float32",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    programs: Programs | None = None,
    measured: Sequence[Candidate] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure and choose.

    Args:    observations, simulate, matching, seed, precision, dtype, device, programs: of the attack, as in `run_chunk`.
             modes: candidates, see program.py.  workers: programs that run at the same time, each with its share of the attacks.
             at_once: only this many, instead of 1, 2, 4, … `most`.  attacks: to be run in all (default: every start of every observation).
             iterations: measured after the first.  budget_s: no further candidate is begun after so long, nor after a fifth of what all
             attacks would take with the best one.
             measured: candidates that were measured before; they are in the table, and are not measured again.
             memory_bytes: what a program may take; None takes 80 % of the device's free memory, on a CPU divided by `workers`, and is no limit where
             that is not known.
    Returns: the choice. Ties within a per cent go to fewer attacks at once, which lose less when a run is killed.
    Raises:  InputError if no candidate runs, with the first one's error.
    """
    device, programs = torch.device(device), programs or Programs()
    total = attacks or len(observations) * matching.starts
    share = max(1, -(-total // max(workers, 1)))
    if matching.together:  # the starts of an observation are one chunk, in turns of at_once
        share = max(share, matching.starts)
    sizes = [at_once] if at_once else _sizes(min(share, most or MOST.get(device.type, MOST["cpu"])))
    everyone = [(o, s) for o in range(len(observations)) for s in range(matching.starts)]
    if memory_bytes is None:
        memory_bytes = free_bytes(device, workers)
    resident = _resident("VmRSS") if device.type == "cpu" else None
    began, found = clock(), list(measured)
    known = {(one.mode, one.at_once): one for one in measured}
    for mode in modes:
        before: Candidate | None = None
        for size in _worth_trying(mode, sizes, found) if at_once is None else sizes:
            if (mode, size) in known:
                before = known[mode, size]
                continue
            best = min((_seconds(one, share, matching) for one in found if one.ms is not None), default=math.inf)
            if found and clock() - began > min(budget_s, max(SHORT_S, PAYS * best)):
                break
            if _too_large(before, size, memory_bytes):
                found.append(Candidate(mode, size, None, 0.0, error="it would not fit into memory"))
                break
            chunk = tuple((everyone * (1 + size // len(everyone)))[:size])
            # CUDA graphs keep their memory: those that are measured are not kept beside one another
            made = programs if device.type == "cpu" else Programs()
            one = _measured(chunk, observations, simulate, matching, mode, iterations, seed, precision, dtype, device, made, clock, resident)
            if made is not programs:
                programs.notices += [text for text in made.notices if text not in programs.notices]
            found.append(one)
            if one.ms is None or (before is not None and one.ms > GAIN * before.ms and size > 4):
                break
            before = one
    usable = [one for one in found if one.ms is not None]
    if not usable:
        raise InputError(f"the attack cannot run in any of the modes {', '.join(modes)}: {found[0].error}")
    costs = [(_seconds(one, share, matching), one) for one in usable]
    least = min(cost for cost, _ in costs)
    chosen = min((one for cost, one in costs if cost <= 1.01 * least), key=lambda one: one.at_once)
    return Calibration(chosen.mode, chosen.at_once, tuple(found), tuple(programs.notices))


def free_bytes(device: torch.device, workers: int = 1) -> int | None:
    """What one of so many programs that run at the same time may take: 80 % of the free memory, all of a GPU's, a part of the machine's. None where unknown."""
    if device.type == "cuda":
        return int((1 - SPARED) * torch.cuda.mem_get_info(device)[0])
    free = available_bytes()
    return None if free is None else int((1 - SPARED) * free / max(workers, 1))


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that this process can still have, in bytes: the machine's available one, within what is left of the limits of its control groups (v1, v2),
    beyond which Linux kills. None where there is no /proc/meminfo."""
    try:
        found = [1024 * int(line.split()[1]) for line in (proc / "meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
        places = [line.split(":", 2)[1:] for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    for kinds, place in places:
        if kinds and "memory" not in kinds.split(","):
            continue
        base, limit, used, cache = (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if kinds else (groups, "memory.max", "memory.current", "inactive_file")
        folder = base / place.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                found.append(int((group / limit).read_text()) - int((group / used).read_text()) + int(kept.get(cache, 0)))
            except (OSError, ValueError):  # no such group here, or no limit ("max")
                pass
            if group == base:
                break
    return max(0, min(found)) if found else None


def fitting(one: Candidate, memory_bytes: int | None) -> int:
    """How many attacks at once fit into so much memory, at least 1, if memory grows in proportion from a measured candidate."""
    if memory_bytes is None or not one.peak_bytes:
        return MOST["cuda"]
    return max(1, memory_bytes * one.at_once // one.peak_bytes)


def _resident(what: str) -> int | None:
    """Bytes of this process in memory now (VmRSS) or at most (VmHWM); None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), None)


def _forget_peak() -> bool:
    """Let VmHWM begin anew; whether that is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _sizes(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    sizes = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return sizes if sizes[-1] == most else [*sizes, most]


def _worth_trying(mode: str, sizes: list[int], found: list[Candidate]) -> list[int]:
    """A loop has one size; recording takes seconds and compiling minutes, so those try the sizes about the best one of the plain program."""
    if mode == "loop":
        return [1]
    plain = [one for one in found if one.mode in ("vmap", "traced") and one.ms is not None]
    if mode == "vmap" or not plain:
        return sizes
    best = min(plain, key=lambda one: one.ms).at_once
    return [size for size in sizes if best <= 2 * size <= 4 * best] if mode == "traced" else [best]


def _too_large(before: Candidate | None, size: int, memory_bytes: int | None) -> bool:
    """By the last candidate's memory, which grows at most in proportion."""
    return memory_bytes is not None and before is not None and before.peak_bytes is not None and before.peak_bytes * size / before.at_once > memory_bytes


def _seconds(one: Candidate, attacks: int, matching: Matching) -> float:
    """Until this many attacks are done by one worker: full programs, padded where they are recorded, the rungs of halving, and the first call of each program."""
    rows, widths = 0.0, set()
    for first, last, kept in stages(matching):
        left, width = attacks * kept / matching.starts, width_of(matching, one.at_once, kept)
        widths.add(width)
        padded = -(-left // width) * width if one.mode in ("traced", "compiled") else left
        rows += padded * matching.evaluations(first, last)
    return one.first_s * (len(widths) if one.mode in ("traced", "compiled") else 1) + 1e-3 * one.ms * rows


def _measured(
    chunk: tuple[tuple[int, int], ...], observations: Sequence[Observation], simulate: Simulate, matching: Matching, mode: str, iterations: int, seed: int,
    precision: str, dtype: torch.dtype, device: torch.device, programs: Programs, clock: Callable[[], float], resident: int | None,
) -> Candidate:  # fmt: skip
    """Run a few iterations of a candidate. resident: bytes of the process before the first one, on a CPU."""
    on_gpu, peak = device.type == "cuda", None
    cast = {"device": device, "dtype": dtype}

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return clock()

    try:
        batch, variables, _ = make_batch(chunk, observations, simulate, matching, seed=seed, cast=cast)
        batch = batch.spread() if mode in ("traced", "compiled") else batch
        optimiser = matching.descent()
        state = optimiser.begin(variables)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        watched = resident is not None and _forget_peak()
        began, times = wait(), []
        dims = (dict.fromkeys(variables, 0), batch.dims[0], batch.dims[1], 0, dict.fromkeys(batch.knobs, 0))
        for iteration in range(1 + min(iterations, max(matching.iterations, 1))):
            before = wait()
            knobs, rates = ({name: table[min(iteration, len(table) - 1)] for name, table in tables.items()} for tables in (batch.knobs, batch.rates))
            with torch.no_grad():
                given = batch.given_at(iteration, matching)
                inputs = (variables, given, batch.target, batch.scale, knobs)
                evaluate = programs.get(simulate, matching, dims, inputs, mode=mode, precision=precision)
                loss, _, _, gradients = evaluate(*inputs)
                index = torch.full((), iteration, device=device, dtype=torch.int64)
                variables, state = optimiser.step(
                    variables, gradients, loss, state, rates=rates, iteration=index,
                    evaluate=lambda v, inputs=inputs, evaluate=evaluate: evaluate(v, *inputs[1:])[::3],
                )  # fmt: skip
            times.append(wait() - before)
            if iteration == 0:
                first = wait() - began
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device)
        elif watched and (most := _resident("VmHWM")) is not None:
            peak = max(0, most - resident)
        steady = sorted(times[1:])[len(times[1:]) // 2]
        return Candidate(mode, len(chunk), 1e3 * steady / len(chunk), max(0.0, first - steady), peak)
    except InputError:
        raise
    except (RuntimeError, MemoryError) as error:  # out of memory, or an operator without a batching rule
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return Candidate(mode, len(chunk), None, 0.0, error=text)
