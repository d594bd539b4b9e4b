"""Arithmetic on updates, and a weighted sum of them whose bits depend on neither order nor number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gidef.errors import Diverged, InputError
from gidef.types import Client, Tensors, Update, check_same_names


def subtract(left: Tensors, right: Tensors) -> Tensors:
    """left − right, tensor by tensor. Raises ValueError when names or shapes differ; inputs stay as they are."""
    check_same_names(left, right, "subtract")
    return {name: tensor - right[name] for name, tensor in left.items()}


def add(left: Tensors, right: Tensors) -> Tensors:
    """left + right, tensor by tensor. Raises ValueError when names or shapes differ; inputs stay as they are."""
    check_same_names(left, right, "add")
    return {name: tensor + right[name] for name, tensor in left.items()}


def scale(tensors: Tensors, factor: float | Tensor) -> Tensors:
    """factor · tensors, with a number or a 0-dim tensor as factor; the input stays as it is."""
    return {name: tensor * factor for name, tensor in tensors.items()}


def norm(tensors: Tensors) -> Tensor:
    """Global L2 norm over all entries of all tensors: float64, 0-dim, differentiable; 0 for an empty map.

    Summed in name order, so two maps that differ only in the order of names have the same bits.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(tensors[name], dtype=torch.float64) for name in sorted(tensors)]
    return torch.linalg.vector_norm(torch.stack(norms))


def sign_slope(tensor: Tensor, width: Tensor) -> Tensor:
    """0 everywhere, with the slope of tanh(u / width), width > 0: what a sign lacks to be descended. Straight through (BPDA, Athalye et al. 2018,
    arXiv:1802.00420)."""
    soft = torch.tanh(tensor / width)
    return soft - soft.detach()


AT_ONCE = {"cpu": 2**16, "cuda": 2**22}
"""Entries of an update that are taken to float64 at the same time: on a CPU few enough to stay in the cache, which halves the time of the sum; on
a GPU no more than come at a time over ranks (`parallel.cohort.BUCKET`)."""


class FixedPointSum:
    """Weighted sum of updates in int64 fixed point.

        S = Σ_k round(2^f · n_k · Δ_k),   mean = S / (2^f · Σ_k n_k)

    Integer addition is exactly associative, so the bits of the mean depend on neither the order of clients, nor on
    threads, nor on how the clients are spread over ranks. `buffer` is one flat int64 tensor,
    [tensors in name order | metrics · weight | total weight | count | counters]: summing it over ranks in place
    (one all-reduce) merges the ranks' sums. `add` may be called from several threads.

    Each term is refused beyond 2^62 / max_terms, and more than max_terms terms are refused, so no sum can overflow,
    merged or not. At f = 32 and 64 terms that is |n_k Δ_k| ≤ 1.6e7; the rounding error of the mean is
    at most 2^-33 · count / total weight, far below float32's own at any weight of interest.

    Args:    template: names, shapes, dtypes and device of the mean; floating point only (no step counters).
             metric_names: the metrics that every update brings.  max_terms: most updates that the sum will hold
             over all ranks, at least 1.  fraction_bits: f.  counters: further int64 entries for the caller's own
             use, merged like the rest.
    Raises:  ValueError if the template holds integer tensors or max_terms is below 1.
    """

    def __init__(
        self,
        template: Tensors,
        *,
        metric_names: Sequence[str] = (),
        max_terms: int,
        fraction_bits: int = 32,
        counters: int = 0,
    ) -> None:
        if max_terms < 1:
            raise ValueError(f"max_terms={max_terms}: a sum needs room for at least one update")
        integers = [name for name, tensor in template.items() if not tensor.is_floating_point()]
        if integers:
            raise ValueError(f"integer tensors cannot be averaged; leave them out of updates: {sorted(integers)[:3]}")
        self._template = {name: (tensor.shape, tensor.dtype) for name, tensor in template.items()}
        self._names = sorted(template)
        device = _device_of(template)
        self._parts = _parts_of(template, device)
        end = sum(tensor.numel() for tensor in template.values())
        self._metric_names = tuple(sorted(metric_names))
        self._tail = end  # first entry after the tensors
        self._max_terms = max_terms
        self._limit = 2**62 // max_terms
        self._one = 2.0**fraction_bits
        self._lock = threading.RLock()
        self._terms = 0  # that this object has added, whatever was merged into the buffer
        self._pending = [0] * (len(self._metric_names) + 2)  # of the tail, on their way to the buffer: each copy waits for a GPU
        self._in_parts = device.type == "cuda"  # peaks by part, where a launch costs more than reading a part
        self._written: torch.cuda.Event | None = None
        self._buffer = torch.zeros(end + len(self._metric_names) + 2 + counters, dtype=torch.int64, device=device)
        self._mark_written()

    @property
    def buffer(self) -> Tensor:
        """All of the sum, see above; to be read, or changed in place."""
        with self._lock:
            self._await_written()
            if any(self._pending):
                self._buffer[self._tail : self._tail + len(self._pending)].add_(torch.tensor(self._pending, device=self._buffer.device))
                self._pending = [0] * len(self._pending)
                self._mark_written()
            return self._buffer

    @property
    def counters(self) -> Tensor:
        """The caller's own entries of the buffer: a view, int64 (counters,)."""
        return self.buffer[self._tail + len(self._metric_names) + 2 :]

    def add(self, delta: Tensors, weight: int, metrics: Mapping[str, float], *, client: int | str = "?") -> None:
        """Add weight · delta and weight · metrics, and count one term. A refused update leaves the sum as it was.

        Args:    delta: the template's names and shapes, any float dtype and device.  weight: examples, at least 0.
                 client: who sent it, for the message.
        Raises:  Diverged when an entry is NaN, infinite or too large for the exact sum; ValueError when names,
                 shapes or metrics differ from the template's, or the sum is full.
        """
        if weight < 0:
            raise ValueError(f"client {client}: weight {weight} is negative")
        if delta.keys() != self._template.keys():
            odd = sorted(delta.keys() ^ self._template.keys())
            raise ValueError(f"client {client}: the update's names differ from the template's: {odd[:3]}")
        if tuple(sorted(metrics)) != self._metric_names:
            raise ValueError(f"client {client}: metrics {sorted(metrics)} instead of {list(self._metric_names)}")
        tail = self._checked(delta, weight, metrics, client)
        with self._lock:
            if self._terms >= self._max_terms:
                raise ValueError(f"client {client}: the sum already holds max_terms={self._max_terms} updates")
            self._terms += 1
            self._pending = [left + right for left, right in zip(self._pending, tail, strict=True)]
        self._add_terms(delta, weight)

    @property
    def body(self) -> Tensor:
        """The tensors' entries in name order: a view."""
        return self.buffer[: self._tail]

    @property
    def tail(self) -> Tensor:
        """All after them: a view."""
        return self.buffer[self._tail :]

    def mean(self, own: Tensors | None = None, *, arriving: Iterable[int] | None = None) -> tuple[Tensors, int, dict[str, float]]:
        """(mean, total weight, mean metrics), all weighted by the weights; the mean has the template's dtypes.

        Args:   own: sums in the place of the buffer's, 1-D parts of some of the tensors; the mean is then of those.
                arriving: counts of the body's first entries that are there, ascending up to all of them: what is there is averaged before the
                next is asked for. The tail must be there already.
        Raises: InputError if the total weight is 0; ValueError if more than max_terms updates were merged.
        """
        *metrics, weight, count = self._numbers()
        if count > self._max_terms:
            raise ValueError(f"{count} updates were merged into a sum with max_terms={self._max_terms}")
        if weight == 0:
            raise InputError(f"{count} clients hold 0 examples together: a mean needs at least one example")
        # A tensor, not a number: CUDA divides by a Python number through its reciprocal, one rounding more than the CPU.
        divisor = torch.tensor(self._one * weight, dtype=torch.float64, device=self.buffer.device)
        if own is not None:
            mean = {name: part.to(torch.float64).div_(divisor).to(self._template[name][1]) for name, part in own.items()}
        else:
            mean = _divided(self.body, divisor, self._template, self._parts, arriving)
        means = {name: value / (self._one * weight) for name, value in zip(self._metric_names, metrics, strict=True)}
        return mean, weight, means

    @property
    def count(self) -> int:
        """How many updates the sum holds."""
        return self._numbers()[-1]

    def _numbers(self) -> list[int]:
        """[metrics…, total weight, count] as Python numbers."""
        return self.buffer[self._tail : self._tail + len(self._metric_names) + 2].tolist()

    @torch.no_grad()
    def _checked(self, delta: Tensors, weight: int, metrics: Mapping[str, float], client: int | str) -> list[int]:
        """The update's [metrics · weight | weight | 1] in fixed point, once all of it is known to fit."""
        for name in self._names:
            if delta[name].shape != self._template[name][0]:
                wanted = tuple(self._template[name][0])
                raise ValueError(f"client {client}: {name!r} has shape {tuple(delta[name].shape)} instead of {wanted}")
        factor = weight * self._one
        names = [name for name in self._names if delta[name].numel()]
        tail = [float(metrics[name]) * factor for name in self._metric_names]
        peaks: list[tuple[str, float]] = []
        if not self._in_parts or not all(peak <= self._limit for peak in self._peaks(self._joined(delta), factor)):  # else which one is asked only now
            peaks = list(zip(names, self._peaks((delta[name].detach() for name in names), factor), strict=True))
        peaks += [(f"metric {name}", abs(value)) for name, value in zip(self._metric_names, tail, strict=True)]
        for name, peak in [*peaks, ("weight", weight)]:
            if not peak <= self._limit:  # NaN fails every comparison
                self._refuse(name, peak, weight, client)
        return [*map(round, tail), weight, 1]

    def _joined(self, delta: Tensors) -> Iterator[Tensor]:
        """The entries of each part, on the buffer's device."""
        flat = {name: delta[name].detach().to(self._buffer.device).flatten() for name in self._names}
        return (torch.cat([flat[name][piece] for name, piece in pieces]) for _, pieces in self._parts)

    def _peaks(self, tensors: Iterable[Tensor], factor: float) -> list[float]:
        """The largest term of each, rounded; NaN where there is one. Waits for the device once.

        Rounding keeps order, so the largest term is the largest entry's.
        """
        ends = [end.to(self._buffer.device) for tensor in tensors for end in torch.aminmax(tensor)]
        return (torch.stack(ends).cpu().double() * factor).round().abs().view(-1, 2).amax(1).tolist() if ends else []

    @torch.no_grad()
    def _encode(self, delta: Tensors, weight: int, metrics: Mapping[str, float], client: int | str) -> Tensor:
        """One update's terms, checked: int64, laid out as the buffer without the counters."""
        tail = torch.tensor(self._checked(delta, weight, metrics, client), device=self._buffer.device)
        factor = weight * self._one
        terms = [delta[name].detach().to(self._buffer.device, torch.float64).mul(factor).round_().flatten().to(torch.int64) for name in self._names]
        return torch.cat([*terms, tail])

    @torch.no_grad()
    def _add_terms(self, delta: Tensors, weight: int) -> None:
        """round(2^f · n_k · Δ_k), part by part."""
        if not self._parts:
            return
        device, factor = self._buffer.device, weight * self._one  # a power of two times an integer: double(Δ)·factor rounds once
        flat = {name: delta[name].detach().to(device).flatten() for name in self._names}
        most = max(span.stop - span.start for span, _ in self._parts)
        values, terms = (torch.empty(most, dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
        for span, pieces in self._parts:
            size = span.stop - span.start
            value = torch.cat([flat[name][piece] for name, piece in pieces], out=values[:size])
            term = terms[:size].copy_(value.mul_(factor).round_())
            with self._lock:
                self._await_written()
                self._buffer[span].add_(term)  # `+=` on a slice would copy it once more
                self._mark_written()

    def _refuse(self, name: str, peak: float, weight: int, client: int | str) -> None:
        """Say which entry cannot be summed and why."""
        if peak != peak or peak == float("inf"):
            what = "holds NaN or infinity"
        else:
            most = self._limit / self._one / max(weight, 1)
            what = f"reaches {peak / self._one / max(weight, 1):.3g}, where weight {weight} allows {most:.3g}"
        raise Diverged(f"client {client}: {name} {what}; training diverged: lower the learning rate or clip gradients")

    def _mark_written(self) -> None:
        """Threads may work on different CUDA streams: the lock orders their launches, and these two their writes, without a wait of the host's."""
        if self._buffer.is_cuda:
            self._written = torch.cuda.current_stream(self._buffer.device).record_event()

    def _await_written(self) -> None:
        """What this thread's stream does next to the buffer comes after all that was written so far."""
        if self._written is not None:
            torch.cuda.current_stream(self._buffer.device).wait_event(self._written)


class Float32Sum:
    """As `FixedPointSum`, in half the bytes: weighted updates are added up in float32, so that the last bits depend on the order of clients, on threads
    and on ranks. Metrics, weight, count and counters stay exact.

    body: float32, the tensors' entries in name order.  tail: int64, all after them. Both are summed over ranks in place.
    """

    def __init__(self, template: Tensors, *, metric_names: Sequence[str] = (), max_terms: int, counters: int = 0) -> None:
        self._rest = FixedPointSum({}, metric_names=metric_names, max_terms=max_terms, counters=counters)
        self._template = {name: template[name] for name in sorted(template)}
        self._lock = threading.Lock()
        device = _device_of(template)
        self.body = torch.zeros(sum(tensor.numel() for tensor in template.values()), dtype=torch.float32, device=device)

    @property
    def tail(self) -> Tensor:
        return self._rest.buffer

    @property
    def counters(self) -> Tensor:
        return self._rest.counters

    @property
    def count(self) -> int:
        return self._rest.count

    @torch.no_grad()
    def add(self, delta: Tensors, weight: int, metrics: Mapping[str, float], *, client: int | str = "?") -> None:
        """As FixedPointSum.add. Raises Diverged for NaN or infinity."""
        check_same_names(delta, self._template, f"client {client}: the update (left) against the template (right)")
        flat = torch.cat([delta[name].to(self.body).flatten() for name in self._template]) * weight
        if not torch.isfinite(flat).all():
            raise Diverged(f"client {client}: the update holds NaN or infinity; training diverged: lower the learning rate or clip gradients")
        with self._lock:
            self._rest.add({}, weight, metrics, client=client)
            self.body += flat
            if self.body.is_cuda:
                torch.cuda.current_stream(self.body.device).synchronize()

    def mean(self, own: Tensors | None = None, *, arriving: Iterable[int] | None = None) -> tuple[Tensors, int, dict[str, float]]:
        """As FixedPointSum.mean."""
        _, weight, metrics = self._rest.mean()
        divisor = torch.tensor(float(weight), dtype=torch.float64, device=self.body.device)
        if own is not None:
            mean = {name: part.to(torch.float64).div_(divisor).to(self._template[name].dtype) for name, part in own.items()}
        else:
            shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self._template.items()}
            mean = _divided(self.body, divisor, shapes, _parts_of(self._template, self.body.device), arriving)
        return mean, weight, metrics


Parts = list[tuple[slice, list[tuple[str, slice]]]]
"""Runs of a flat sum of tensors in name order, each with the pieces of flattened tensors in it."""


def _device_of(template: Tensors) -> torch.device:
    return next((tensor.device for tensor in template.values()), torch.device("cpu"))


def _parts_of(template: Tensors, device: torch.device) -> Parts:
    """Runs of at most `AT_ONCE` entries."""
    most, end = AT_ONCE.get(device.type, AT_ONCE["cuda"]), 0
    parts: Parts = []
    for name in sorted(template):
        size = template[name].numel()
        for first in range(0, size, most):
            piece = slice(first, min(first + most, size))
            if not parts or parts[-1][0].stop - parts[-1][0].start + piece.stop - piece.start > most:
                parts.append((slice(end + first, end + first), []))
            span, pieces = parts[-1]
            parts[-1] = (slice(span.start, end + piece.stop), [*pieces, (name, piece)])
        end += size
    return parts


def _divided(body: Tensor, divisor: Tensor, template: Mapping[str, tuple[torch.Size, torch.dtype]], parts: Parts, arriving: Iterable[int] | None) -> Tensors:
    """body / divisor in float64, cut into the template's tensors, part by part as they arrive."""
    mean = {name: torch.empty(shape, dtype=dtype, device=body.device) for name, (shape, dtype) in template.items()}
    flat, left = {name: tensor.view(-1) for name, tensor in mean.items()}, iter(parts)
    values = torch.empty(max((span.stop - span.start for span, _ in parts), default=0), dtype=torch.float64, device=body.device)
    part = next(left, None)
    for there in (len(body),) if arriving is None else arriving:
        while part is not None and part[0].stop <= there:
            span, pieces = part
            value = values[: span.stop - span.start].copy_(body[span]).div_(divisor)
            for (name, piece), entries in zip(pieces, value.split([piece.stop - piece.start for _, piece in pieces]), strict=True):
                flat[name][piece].copy_(entries)
            part = next(left, None)
    if part is not None:
        raise ValueError(f"the sum stopped arriving before entry {part[0].stop} of {len(body)}")
    return mean


@dataclass(frozen=True, slots=True)
class CohortMean:
    """Σ n_k Δ_k / Σ n_k over a cohort: delta with the template's dtypes, Σ n_k, metrics weighted alike, and the clients counted.
    seconds: that each client took, in the cohort's order, where they were measured.  sum_seconds: of the sum over ranks, once all had come; where it came
    in buckets, of averaging them too."""

    delta: Tensors
    num_examples: int
    metrics: dict[str, float]
    count: int
    seconds: tuple[float, ...] = ()
    sum_seconds: float = 0.0


def mean_over(shared_update: Callable[..., Update], cohort: Sequence[Client], *, template: Tensors, metric_names: Sequence[str] = ()) -> CohortMean:
    """Weighted mean of the cohort's updates, one client after another; the sharded twin is `parallel.cohort`.

    Args:    shared_update: `shared_update(client, worker=0)` → Update.  cohort: at least one client.
             template: names, shapes, dtypes and device of the mean.  metric_names: what each Update.metrics holds.
    Raises:  ValueError for an empty cohort; whatever `shared_update` and `FixedPointSum` raise.
    """
    total = FixedPointSum(template, metric_names=metric_names, max_terms=len(cohort))
    for client in cohort:
        update = shared_update(client, worker=0)
        total.add(update.delta, update.num_examples, update.metrics, client=client.id)
    return CohortMean(*total.mean(), count=total.count)
