"""L-BFGS of many attacks at once, each with its own history and its own line search."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gidef.attack.optimisers import Evaluate
from gidef.errors import InputError
from gidef.types import Tensors

# K attacks at once, D numbers in all variables of one, m pairs of its history


@dataclass(frozen=True, kw_only=True, slots=True)
class Lbfgs:
    """Limited-memory BFGS with a strong Wolfe line search.

        d = −H g,   H from the last m pairs (s, y) of step and change of gradient, on H₀ = (s·y / y·Wy) W
        accept t when   f(x + t d) ≤ f + decrease · t · g·d   and   |g(x + t d)·d| ≤ flatness · |g·d|

    All attacks are evaluated together, each at the point that its own search asks for next. One that has accepted goes on from
    there with its next direction, and waits for no other, so a step costs `max_evaluations` evaluations whatever happens and makes
    as many L-BFGS iterations as fit (torch.optim.LBFGS.step with max_eval, which stops early, does the same). Where a search is
    under way when the evaluations are spent, its best point is accepted if it decreases enough; else the next step goes on smaller.

    A point with an infinite or NaN loss or slope is rejected like one that is too high. A pair with s·y ≤ curvature · ‖s‖ ‖y‖ is
    skipped. A search without success in `max_search` evaluations, or a direction that does not descend, throws that attack's history
    away; without a history the attack rests until the next step. One whose loss is not finite to begin with stays where it is.

    Rates: t starts at the largest of the attack's rates (1 is the usual one), and while there is no history at
    min(1, 1 / ‖Wg‖₁) of it. W is each variable's rate over the largest: a variable of rate 0 is held.
    Boxes: trials leave them freely; the caller clamps what it gets back. Pairs stay true, as they come from evaluated points.
    The loss must be the function whose gradient is given: a gradient that was bent (a boosted weight that the loss leaves out,
    `CurvedKinks`) makes searches fail. Between steps it may change.

    Args:    history: m ≥ 1; the state holds 2 m numbers for each variable's.  max_evaluations: per step, ≥ 1.  max_search: per line
             search, ≥ 1.  decrease, flatness: 0 < decrease < flatness < 1.  curvature: ≥ 0.  tolerance: an attack rests where
             max |g| ≤ tolerance.
    State:   "steps", "changes" (K, m, D), rings;  "rho" float64 (K, m), 1 / s·y or 0 in an empty slot;  "head" int64 (K,), the next slot;
             "scale" float64 (K,), s·y / y·Wy;  "start" float64 (K,) and "tried" int64 (K,), of a search to be gone on with;
             "evaluations" int64 (K,), those that searches used.
    Raises:  InputError for values out of range.
    Source:  Nocedal & Wright 2006, Algorithms 7.4, 3.5 and 3.6; first step and interpolation as torch.optim.LBFGS. Attacks: Zhu et al. 2019,
             arXiv:1906.08935.
    Deviates: the curvature condition is relative, as near a solution all pairs fall below torch's s·y > 1e-10; no tolerance on changes.
    """

    history: int = 10
    max_evaluations: int = 20
    max_search: int = 10
    decrease: float = 1e-4
    flatness: float = 0.9
    curvature: float = 1e-8
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("history", "max_evaluations", "max_search"):
            if not getattr(self, name) >= 1:
                raise InputError(f"{name}={getattr(self, name)!r}: expected at least 1.")
        if not 0 < self.decrease < self.flatness < 1:
            raise InputError(f"decrease={self.decrease!r} and flatness={self.flatness!r}: expected 0 < decrease < flatness < 1.")
        for name in ("curvature", "tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)!r}: expected a number of at least 0.")

    def begin(self, variables: Tensors) -> Tensors:
        """An empty history."""
        flat = _flat(variables)
        attacks, device = len(flat), flat.device
        return {
            "steps": flat.new_zeros(attacks, self.history, flat.shape[1]),
            "changes": flat.new_zeros(attacks, self.history, flat.shape[1]),
            "rho": torch.zeros(attacks, self.history, dtype=torch.float64, device=device),
            "head": torch.zeros(attacks, dtype=torch.int64, device=device),
            "scale": torch.ones(attacks, dtype=torch.float64, device=device),
            "start": torch.full((attacks,), torch.inf, dtype=torch.float64, device=device),
            "tried": torch.zeros(attacks, dtype=torch.int64, device=device),
            "evaluations": torch.zeros(attacks, dtype=torch.int64, device=device),
        }

    def step(
        self, variables: Tensors, gradients: Tensors, loss: Tensor, state: Tensors, *, rates: Tensors, iteration: Tensor, evaluate: Evaluate
    ) -> tuple[Tensors, Tensors]:
        """As `Optimiser.step`; calls evaluate max_evaluations times, and the variables returned have a finite loss if those given had."""
        x, g, f = _flat(variables), _flat(gradients), loss.double()
        rate = torch.stack([rates[name] for name in sorted(variables)]).amax(0).double()
        weight = _weights(variables, rates, rate).to(x.dtype)
        memory = _Memory(*(state[field.name].clone() for field in fields(_Memory)))
        start, tried, evaluations = state["start"], state["tried"], state["evaluations"]
        live, fresh, search, d = f.isfinite() & (rate > 0), torch.ones_like(f, dtype=torch.bool), None, torch.zeros_like(x)
        accepted = torch.zeros_like(fresh)
        for _ in range(self.max_evaluations):
            new, slope, first = self._direction(memory, g, weight, rate, fresh)
            live = live & ~(fresh & ~((slope < 0) & (g.abs().amax(1) > self.tolerance)))
            d = _choose(fresh, new, d)
            search = _Search.begun(f, slope, torch.minimum(first, start), tried, g).where(fresh, search)
            start, tried = torch.full_like(start, torch.inf), torch.zeros_like(tried)

            trial = _choose(live, x + search.t[:, None].to(x.dtype) * d, x)
            found, found_gradients = evaluate(_unflat(trial, variables))
            evaluations = evaluations + live
            settled = search.judge(found.double(), _flat(found_gradients), d, self.decrease, self.flatness)

            spent = search.tried >= self.max_search
            accepted = live & (settled | (spent & (search.low_t > 0)))
            failed = live & ~accepted & spent
            live = live & ~(failed & memory.empty)
            memory.forget(failed)
            x, g, f = self._accept(accepted, x, g, f, d, search, memory, weight)
            fresh = accepted | failed
        under_way = live & ~fresh
        x, g, f = self._accept(under_way & (search.low_t > 0), x, g, f, d, search, memory, weight)
        pending = under_way & (search.low_t == 0)
        carried = {field.name: getattr(memory, field.name) for field in fields(_Memory)} | {
            "start": torch.where(pending, search.t, torch.inf),
            "tried": torch.where(pending, search.tried, 0),
            "evaluations": evaluations,
        }
        return _unflat(x, variables), carried

    def _direction(self, memory: _Memory, g: Tensor, weight: Tensor, rate: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Direction (K, D), its slope (K,) and the first t (K,). Attacks in `fresh` whose history does not descend lose it."""
        d = memory.direction(g, weight)
        slope = _dot(g, d)
        memory.forget(fresh & ~(slope < 0))
        plain = memory.empty
        steepest = -weight * g
        d, slope = _choose(plain, steepest, d), torch.where(plain, _dot(g, steepest), slope)
        first = torch.where(plain, (1 / steepest.abs().sum(1, dtype=torch.float64)).clamp_max(1.0), 1.0)
        return d, slope, rate * first

    def _accept(
        self, accepted: Tensor, x: Tensor, g: Tensor, f: Tensor, d: Tensor, search: _Search, memory: _Memory, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Go to the search's best point where accepted, and remember the pair."""
        step, change = search.low_t[:, None].to(x.dtype) * d, search.low_g - g
        curved = _dot(step, change) > self.curvature * (_dot(step, step) * _dot(change, change)).sqrt()
        memory.remember(accepted & curved, step, change, weight)
        return _choose(accepted, x + step, x), _choose(accepted, search.low_g, g), torch.where(accepted, search.low_f, f)


@dataclass(slots=True)
class _Memory:
    """Every attack's pairs. Owned by one step, which writes its rows in place."""

    steps: Tensor
    changes: Tensor
    rho: Tensor
    head: Tensor
    scale: Tensor

    @property
    def empty(self) -> Tensor:
        return ~(self.rho > 0).any(1)

    def direction(self, g: Tensor, weight: Tensor) -> Tensor:
        """−H g by the two-loop recursion, in g's dtype. An empty slot has rho = 0 and takes no part."""
        attacks, length = self.rho.shape
        order = (self.head[:, None] - torch.arange(1, length + 1, device=g.device)) % length  # newest first
        rhos = self.rho.gather(1, order).to(g.dtype).split(1, 1)
        # whole rows by their number: advanced indexing would copy them element by element
        places = (order + length * torch.arange(attacks, device=g.device)[:, None]).unbind(1)
        steps, changes, shares = self.steps.flatten(0, 1), self.changes.flatten(0, 1), []
        q = -g
        for rho, place in zip(rhos, places, strict=True):
            share = rho * (steps.index_select(0, place) * q).sum(1, keepdim=True)
            q = torch.addcmul(q, share, changes.index_select(0, place), value=-1)
            shares.append(share)
        d = self.scale[:, None].to(q.dtype) * weight * q
        for rho, place, share in zip(reversed(rhos), reversed(places), reversed(shares), strict=True):
            share = share - rho * (changes.index_select(0, place) * d).sum(1, keepdim=True)
            d = torch.addcmul(d, share, steps.index_select(0, place))
        return d

    def remember(self, where: Tensor, step: Tensor, change: Tensor, weight: Tensor) -> None:
        attack, slot, product = torch.arange(len(step), device=step.device), self.head, _dot(step, change)
        for ring, new in ((self.steps, step), (self.changes, change), (self.rho, 1 / product)):
            ring[attack, slot] = _choose(where, new, ring[attack, slot])
        self.scale = torch.where(where, product / _dot(change, weight * change), self.scale)
        self.head = torch.where(where, (slot + 1) % self.rho.shape[1], slot)

    def forget(self, where: Tensor) -> None:
        self.rho = _choose(where, torch.zeros_like(self.rho), self.rho)
        self.scale = torch.where(where, 1.0, self.scale)


@dataclass(slots=True)
class _Search:
    """Every attack's line search: φ(t) = f(x + t d) between `low`, the best t with enough decrease (0 at first), and `high`.

    f0, slope0: φ and φ′ at 0.  t: the next trial.  low_t, low_f, low_slope, low_g: at low.  high_t, high_f, high_slope: beyond or before low,
    meaningful once bracketed.  near: the last trial was close to an end of the bracket.  tried: evaluations of this search.
    """

    f0: Tensor
    slope0: Tensor
    t: Tensor
    low_t: Tensor
    low_f: Tensor
    low_slope: Tensor
    low_g: Tensor
    high_t: Tensor
    high_f: Tensor
    high_slope: Tensor
    bracketed: Tensor
    near: Tensor
    tried: Tensor

    @classmethod
    def begun(cls, f: Tensor, slope: Tensor, t: Tensor, tried: Tensor, g: Tensor) -> _Search:
        zero, no = torch.zeros_like(t), torch.zeros_like(t, dtype=torch.bool)
        return cls(f, slope, t, zero, f, slope, g, zero, f, slope, no, no, tried)

    def where(self, new: Tensor, other: _Search | None) -> _Search:
        """These searches where new, elsewhere the others."""
        if other is None:
            return self
        return _Search(*(_choose(new, getattr(self, field.name), getattr(other, field.name)) for field in fields(_Search)))

    def judge(self, f: Tensor, g: Tensor, d: Tensor, decrease: float, flatness: float) -> Tensor:
        """Take in the trial's loss and gradient, choose the next t, and say which searches are settled, at low."""
        slope, t, before = _dot(g, d), self.t, (self.low_t, self.low_f, self.low_slope)
        high = ~(f.isfinite() & slope.isfinite()) | (f > self.f0 + decrease * t * self.slope0) | ((self.low_t > 0) & (f >= self.low_f))
        settled = ~high & (slope.abs() <= -flatness * self.slope0)
        turned = ~high & torch.where(self.bracketed, slope * (self.high_t - self.low_t) >= 0, slope >= 0)
        trial = (t, f, slope)
        self.high_t, self.high_f, self.high_slope = (
            torch.where(high, new, torch.where(turned, low, old))
            for new, low, old in zip(trial, before, (self.high_t, self.high_f, self.high_slope), strict=True)
        )
        self.low_t, self.low_f, self.low_slope = (torch.where(high, low, new) for new, low in zip(trial, before, strict=True))
        self.low_g = _choose(high, self.low_g, g)
        self.bracketed, self.tried = self.bracketed | high | turned, self.tried + 1

        self.t = torch.where(self.bracketed, self._within(), _cubic(before, trial, t + 0.01 * (t - before[0]), 10 * t))
        return settled

    def _within(self) -> Tensor:
        """The next t in a bracket: the cubic's minimiser, but a tenth off an end that it comes close to for the second time."""
        width = self.high_t - self.low_t
        least, most = torch.minimum(self.low_t, self.high_t), torch.maximum(self.low_t, self.high_t)
        t = _cubic((self.low_t, self.low_f, self.low_slope), (self.high_t, self.high_f, self.high_slope), least, most)
        # a wall says nothing of the shape before it, and may be far too far out for halving
        t = torch.where(self.high_f.isfinite() & self.high_slope.isfinite(), t, self.low_t + 0.1 * width)
        margin = 0.1 * width.abs()
        close = torch.minimum(t - least, most - t) < margin
        push = close & (self.near | (t >= most) | (t <= least))
        self.near = torch.where(self.bracketed, close & ~push, self.near)
        return torch.where(push, torch.where(most - t < t - least, most - margin, least + margin), t)


def _cubic(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], least: Tensor, most: Tensor) -> Tensor:
    """The minimiser in [least, most] of the cubic with the values and slopes (t, f, slope) at two points; their middle if it has none."""
    swap = one[0] > other[0]
    (t1, f1, slope1), (t2, f2, slope2) = (
        [torch.where(swap, theirs, ours) for ours, theirs in zip(a, b, strict=True)] for a, b in ((one, other), (other, one))
    )
    bend = slope1 + slope2 - 3 * (f1 - f2) / (t1 - t2)
    root = (bend.square() - slope1 * slope2).sqrt()  # NaN without a minimum
    t = t2 - (t2 - t1) * (slope2 + root - bend) / (slope2 - slope1 + 2 * root)
    return torch.where(t.isnan(), 0.5 * (least + most), torch.maximum(torch.minimum(t, most), least))


def _choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where by attack."""
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (K,) over the last dim, summed in float64: what a search decides by."""
    return (one * other).sum(-1, dtype=torch.float64)


def _flat(tensors: Tensors) -> Tensor:
    """(K, D): all variables of each attack, in the order of their names."""
    return torch.cat([tensors[name].reshape(len(tensors[name]), -1) for name in sorted(tensors)], 1)


def _unflat(flat: Tensor, like: Tensors) -> Tensors:
    """The inverse of _flat."""
    names = sorted(like)
    parts = flat.split([like[name][0].numel() for name in names], 1)
    named = {name: part.reshape(like[name].shape).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}
    return {name: named[name] for name in like}


def _weights(variables: Tensors, rates: Tensors, largest: Tensor) -> Tensor:
    """(K, D): each variable's rate over the attack's largest."""
    share = {name: rates[name].double() / largest.clamp_min(torch.finfo(torch.float64).tiny) for name in variables}
    return torch.cat([share[name][:, None].expand(-1, variables[name][0].numel()) for name in sorted(variables)], 1)
