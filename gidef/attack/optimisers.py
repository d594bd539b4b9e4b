"""First-order descent of many attacks at once, and the step sizes' schedules.

Every tensor has one row per attack, rows never meet, and nothing waits for the device: an optimiser branches on its settings
alone. Its state is a flat dict, so that `{name: tensor[kept] for name, tensor in state.items()}` drops attacks on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gidef.errors import InputError
from gidef.rng import stream_seed
from gidef.types import Tensors

# K attacks at once

Evaluate = Callable[[Tensors], tuple[Tensor, Tensors]]
"""evaluate(variables) → the objective (K,) of every attack, and its gradients by name."""

SIGNS = ("none", "hard", "soft")


class Optimiser(Protocol):
    """What moves the searched variables of K attacks, each by its own gradient."""

    def begin(self, variables: Tensors) -> Tensors:
        """State at the start; every tensor has K rows."""
        ...

    def step(
        self, variables: Tensors, gradients: Tensors, loss: Tensor, state: Tensors, *, rates: Tensors, iteration: Tensor, evaluate: Evaluate
    ) -> tuple[Tensors, Tensors]:
        """One iteration.

        Args:    variables: (K, …) by name.  gradients, loss (K,): of the descended objective, there.  state: of `begin` or the last step.
                 rates: (K,) by name, step sizes now.  iteration: int64 scalar, from 0.  evaluate: for those that look ahead.
        Returns: variables and state, in new tensors; no input is modified. Boxes are the caller's: it clamps afterwards.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _FirstOrder:
    """Settings of what is done to a gradient before it is used, and of the noise after it; `Adam` describes them."""

    sign: Literal["none", "hard", "soft"] = "none"
    sign_on: tuple[str, ...] = ("images",)
    soft_over: int | None = None
    clip: float | None = None
    langevin: float = 0.0
    langevin_on: tuple[str, ...] = ("images",)

    def __post_init__(self) -> None:
        if self.sign not in SIGNS:
            raise InputError(f"sign={self.sign!r} is unknown: choose one of {', '.join(SIGNS)}.")
        for name in ("sign_on", "langevin_on"):
            if isinstance(value := getattr(self, name), str):
                raise InputError(f"{name}={value!r}: expected a tuple of the variables' names, such as ({value!r},).")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip={self.clip!r}: expected a norm above 0, or None for no clipping.")
        if self.soft_over is not None and self.soft_over < 1:
            raise InputError(f"soft_over={self.soft_over!r}: expected the iterations of the run, at least 1, or None.")
        if not 0 <= self.langevin < math.inf:
            raise InputError(f"langevin={self.langevin!r}: expected a number of at least 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam(_FirstOrder):
    """Adam, on the gradient or on its sign.

        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   x ← x − rate · m̂ / (√v̂ + eps)
        m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ),  t = iteration + 1;  without bias_correction m̂ = m, v̂ = v

    Before that, in this order, each within one attack:
        clip   g ← g · min(1, clip / ‖g‖), the norm over all its variables together; None leaves g
        sign   of the variables named in sign_on: "hard" sign(g), "soft" tanh(g / rms(g)), rms over that variable;
               with soft_over = T it is tanh(s g) / s with s = 1 − iteration / T instead, which is g itself where |g| ≪ 1
    and after it
        langevin   x ← x + rate · langevin · N(0, 1), of the variables named in langevin_on

    The noise is a hash of (the attack's seed, variable, iteration, element): no generator, so neither the number of attacks nor
    their order moves it. Seeds are `begin`'s, or hashed from where the attack begins: attacks from one start share their noise.

    Args:    betas: in [0, 1).  eps: ≥ 0; far below usual, as the gradient of one pixel of many is tiny and steps are to be free
             of its scale.  soft_over: iterations of the run.
    State:   "m.NAME" and "v.NAME", like the variables; with langevin "seed" int64 (K,).
    Raises:  InputError for values out of range, and from `begin` if no searched variable is named.
    Source:  Kingma & Ba 2015, arXiv:1412.6980; hard sign: Geiping et al. 2020, arXiv:2003.14053; soft sign with soft_over: the
             "modern" settings of the breaching package (optimization_based_attack.py); noise: Yin et al. 2021, arXiv:2104.07586.
    Deviates: without soft_over the soft sign has a scale of its own: the package's tanh knows no unit, and gradients of a cosine are
             so small that it never bends them. Noise follows the step, as in the paper; the package adds it to the gradient, where
             Adam divides by it. The norm of `clip` has no 1e-6 added.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-12
    bias_correction: bool = True

    def __post_init__(self) -> None:
        _FirstOrder.__post_init__(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas={self.betas!r}: expected two numbers in [0, 1).")
        if not 0 <= self.eps < math.inf:
            raise InputError(f"eps={self.eps!r}: expected a number of at least 0.")

    def begin(self, variables: Tensors, seeds: Tensor | None = None) -> Tensors:
        """Zero moments. seeds: int64 (K,), of each attack's noise."""
        moments = {f"{moment}.{name}": torch.zeros_like(variable) for moment in "mv" for name, variable in variables.items()}
        return moments | _begun(self, variables, seeds)

    def step(
        self, variables: Tensors, gradients: Tensors, loss: Tensor, state: Tensors, *, rates: Tensors, iteration: Tensor, evaluate: Evaluate
    ) -> tuple[Tensors, Tensors]:
        """As `Optimiser.step`; neither loss nor evaluate is used."""
        gradients = _shaped(self, gradients, iteration)
        # in float64, where 1 − 0.999 has all its digits; a scalar does not widen what it divides
        time = (iteration + 1).double()
        correct1, correct2 = ((1 - beta**time) if self.bias_correction else 1.0 for beta in self.betas)
        stepped, carried = {}, dict(state)
        for name, variable in variables.items():
            gradient, (beta1, beta2) = gradients[name], self.betas
            m = beta1 * state[f"m.{name}"] + _rest(beta1) * gradient
            v = beta2 * state[f"v.{name}"] + _rest(beta2) * gradient.square()
            stepped[name] = variable - rows(rates[name], variable) * (m / correct1) / ((v / correct2).sqrt() + self.eps)
            carried[f"m.{name}"], carried[f"v.{name}"] = m, v
        return _noisy(self, stepped, state, rates, iteration), carried


@dataclass(frozen=True, kw_only=True, slots=True)
class Momentum(_FirstOrder):
    """Gradient descent with a heavy ball.

        b ← momentum · b + g,   x ← x − rate · b,   or with nesterov   x ← x − rate · (g + momentum · b)

    Args:    momentum: in [0, 1); 0 is plain gradient descent.  clip, sign, langevin and the rest: as in `Adam`.
    State:   "b.NAME", like the variables; with langevin "seed" int64 (K,).
    Raises:  InputError for values out of range, and from `begin` if no searched variable is named.
    Source:  Polyak 1964, in torch.optim.SGD's form, where the rate multiplies the ball and not the gradient.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        _FirstOrder.__post_init__(self)
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum!r}: expected a number in [0, 1).")

    def begin(self, variables: Tensors, seeds: Tensor | None = None) -> Tensors:
        """A ball at rest. seeds: int64 (K,), of each attack's noise."""
        return {f"b.{name}": torch.zeros_like(variable) for name, variable in variables.items()} | _begun(self, variables, seeds)

    def step(
        self, variables: Tensors, gradients: Tensors, loss: Tensor, state: Tensors, *, rates: Tensors, iteration: Tensor, evaluate: Evaluate
    ) -> tuple[Tensors, Tensors]:
        """As `Optimiser.step`; neither loss nor evaluate is used."""
        gradients = _shaped(self, gradients, iteration)
        stepped, carried = {}, dict(state)
        for name, variable in variables.items():
            ball = self.momentum * state[f"b.{name}"] + gradients[name]
            move = gradients[name] + self.momentum * ball if self.nesterov else ball
            stepped[name] = variable - rows(rates[name], variable) * move
            carried[f"b.{name}"] = ball
        return _noisy(self, stepped, state, rates, iteration), carried


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "step": lambda done: 0.1 ** sum(done >= mark / 8 for mark in (3, 5, 7)),
    "linear": lambda done: 1 - done,
    "quadratic": lambda done: (1 - done) ** 2,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
DECAYS = tuple(_DECAYS)


def decay_factor(decay: str, done: float) -> float:
    """What multiplies a step size when a fraction of the iterations is done.

    decay: "constant"; "step" ×0.1 after 3/8, 5/8 and 7/8; "linear" 1 − done; "quadratic" (1 − done)²; "cosine" (1 + cos π done) / 2.
    done: in [0, 1].  Returns: in [0, 1].  Raises: InputError for an unknown decay.
    """
    if decay not in _DECAYS:
        raise InputError(f"decay={decay!r} is unknown: choose one of {', '.join(DECAYS)}.")
    return _DECAYS[decay](done)


def rate_table(decay: str, iterations: int, warmup: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """What multiplies the step sizes at each iteration.

        factor(i) = decay(i / iterations) · min(1, (i + 1) / warmup)

    Args:    decay: of `DECAYS`.  iterations: ≥ 0.  warmup: first iterations of a linear rise, which is cut off where the run is shorter.
    Returns: (iterations,) on the CPU, in [0, 1].
    Raises:  InputError for an unknown decay or negative numbers.
    Source:  step, Geiping et al. 2020, arXiv:2003.14053; cosine after 50 iterations of warm-up, the breaching package's "modern" settings.
    Deviates: the package's warm-up begins with a step of zero and delays the decay by its own length.
    """
    decay_factor(decay, 0.0)  # an unknown decay is refused for no iterations too
    for name, value in (("iterations", iterations), ("warmup", warmup)):
        if value < 0:
            raise InputError(f"{name}={value!r}: expected a number of at least 0.")
    factors = [decay_factor(decay, i / iterations) * min(1.0, (i + 1) / max(warmup, 1)) for i in range(iterations)]
    return torch.tensor(factors, dtype=dtype)


def rows(per_attack: Tensor, like: Tensor) -> Tensor:
    """(K,) in the shape (K, 1, …) that broadcasts against `like`."""
    return per_attack.view(-1, *[1] * (like.ndim - 1))


def _rest(beta: float) -> float:
    """1 − β as one writes it: 1 − 0.9 is 0.09999999999999998."""
    return round(1 - beta, 15)


def _begun(how: _FirstOrder, variables: Tensors, seeds: Tensor | None) -> Tensors:
    """The state that shaping needs, after a check that it has something to act on."""
    for needed, field in ((how.sign != "none", "sign_on"), (how.langevin > 0, "langevin_on")):
        if needed and not set(getattr(how, field)) & variables.keys():
            raise InputError(f"{field}={getattr(how, field)} names none of the searched variables {sorted(variables)}: name at least one.")
    if how.langevin == 0:
        return {}
    return {"seed": _hashed(variables) if seeds is None else seeds}


def _shaped(how: _FirstOrder, gradients: Tensors, iteration: Tensor) -> Tensors:
    """Gradients, clipped and signed."""
    if how.clip is not None:
        norm = _norm(gradients)
        factor = (how.clip / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
        gradients = {name: gradient * rows(factor, gradient).to(gradient.dtype) for name, gradient in gradients.items()}
    if how.sign == "none":
        return gradients
    signed = {name: gradients[name] for name in how.sign_on if name in gradients}
    if how.sign == "hard":
        signed = {name: gradient.sign() for name, gradient in signed.items()}
    elif how.soft_over is None:
        signed = {name: _unit_rms(gradient).tanh() for name, gradient in signed.items()}
    else:
        sharpness = (1 - iteration.double() / how.soft_over).clamp_min(1 / how.soft_over)
        signed = {name: (gradient * sharpness).tanh() / sharpness for name, gradient in signed.items()}
    return gradients | signed


def _flat(tensor: Tensor) -> Tensor:
    """(K, numbers of one attack), also of one number."""
    return tensor.reshape(len(tensor), -1)


def _peak(tensor: Tensor) -> Tensor:
    """(K,): largest magnitude, at least the smallest normal number. Squares of what was divided by it neither overflow nor vanish."""
    return _flat(tensor).abs().amax(1).clamp_min(torch.finfo(tensor.dtype).tiny)


def _norm(tensors: Tensors) -> Tensor:
    """(K,): each attack's norm over all its tensors."""
    peak = torch.stack([_peak(tensor) for tensor in tensors.values()]).amax(0)
    return peak * sum(_flat(tensor / rows(peak, tensor)).square().sum(1) for tensor in tensors.values()).sqrt()


def _unit_rms(tensor: Tensor) -> Tensor:
    """Each attack's tensor over its root mean square; zero stays zero."""
    unit = tensor / rows(_peak(tensor), tensor)
    rms = _flat(unit).square().mean(1).sqrt().clamp_min(torch.finfo(tensor.dtype).tiny)
    return unit / rows(rms, tensor)


def _noisy(how: _FirstOrder, stepped: Tensors, state: Tensors, rates: Tensors, iteration: Tensor) -> Tensors:
    """Variables with Langevin noise added."""
    if how.langevin == 0:
        return stepped
    added = {}
    for name in (name for name in how.langevin_on if name in stepped):
        variable = stepped[name]
        added[name] = variable + how.langevin * rows(rates[name], variable) * _noise(state["seed"], name, iteration, variable)
    return stepped | added


_WORD = 0xFFFFFFFF


def _mix(word: Tensor) -> Tensor:
    """A bijection of [0, 2³²) that scatters every bit, in int64. Multipliers below 2³¹: no product leaves 63 bits.

    Source: the low-bias multipliers of the public search "hash-prospector".
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def _noise(seed: Tensor, name: str, iteration: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise like a variable (K, …): Box-Muller of two hashes per element, in float32."""
    element = torch.arange(like[0].numel(), device=like.device)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    uniform = []
    for stream in range(2):
        salt = stream_seed(0, "langevin", name, stream)
        first = _mix(_mix(low ^ (salt & _WORD)) ^ _mix(iteration & _WORD))
        second = _mix(_mix(high ^ (salt >> 32)) ^ first)
        word = _mix(_mix(element ^ first[:, None]) ^ second[:, None])
        uniform.append((word.float() + 0.5) / 2**32)  # never 0; rounds to 1 at most
    normal = (-2 * uniform[0].log()).sqrt() * (2 * math.pi * uniform[1]).cos()
    return normal.view(like.shape).to(like.dtype)


def _hashed(variables: Tensors) -> Tensor:
    """int64 (K,): a hash of each attack's variables, as float32."""
    total = 0
    for variable in variables.values():
        word = _flat(variable.float().contiguous()).view(torch.int32).long() & _WORD
        total = total + _mix(word ^ _mix(torch.arange(word.shape[1], device=word.device))).sum(1)
    return total
