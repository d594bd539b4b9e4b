"""What a gradient-matching attack minimises and how it descends: its parts, settings, distances and schedules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import grad_and_value

from gidef.attack.labels import LocalSteps
from gidef.attack.optimisers import DECAYS, Adam, Optimiser, decay_factor
from gidef.attack.starts import STARTS
from gidef.errors import InputError
from gidef.types import Tensors

Simulate = Callable[[Tensors, Tensors, Tensor, Tensor, Tensor | None], Tensors]
"""simulate(params, known, images (B, C, H, W), labels (B, classes) probabilities, noise) → the update that a client would
release, with the observed update's names. Pure, differentiable and vmappable. A simulator of one gradient may carry its loss as
an attribute, simulate.loss(the same arguments) → scalar, which the first-order forms need."""

Start = Callable[[int, int], tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensors]]
"""start(index of the observation, restart) → images (B, C, H, W) and noise (noise_shape) to begin from; None is the default noise. It may give a third:
other unknowns by name, "logits" (B, classes) of searched labels and those of `Matching.searched`; what it leaves out begins as ever. With an attribute
`of_variants = True` it is asked for the number of the start, which counts the variants too, in the restart's place."""


class Point(NamedTuple):
    """A candidate of one attack, as priors see it: images (B, C, H, W) in [0, 1], labels (B, classes) as probabilities, the noise
    or None, and what the attacker knows."""

    images: Tensor
    labels: Tensor
    noise: Tensor | None
    params: Tensors
    known: Tensors


Prior = Callable[[Point], Tensor]
"""prior(point) → scalar, added to the objective by its weight. Differentiable and vmappable."""

Distance = Callable[[Tensors, Tensors, Tensor], Tensor]
"""distance(update, target, scale) → scalar, see `distance`."""

Coupling = Callable[[Tensor, list[list[int]], float, Tensor], tuple[Tensor, Tensor]]
"""coupling(images (K, B, C, H, W), groups, share of the iterations done, labels (K, B)) → loss (K,) and its gradient: what the starts of one
observation, whose rows `groups` lists, tell one another. Called outside the vectorised program."""

DISTANCES = ("cosine", "l2", "cosine_layers")
FORMS = ("double_backward", "forward_over_reverse", "central_difference")
RESERVED = ("images", "noise", "logits", "code")
"""Names of variables with a meaning of their own; others are handed to the simulator in `known`."""
HELD = "held/"
"""Prefix in `Matching.searched` and `known` of what a plan holds candidates to. Such unknowns are (B, ...), image by image, and move with the images where an
order is guessed."""
TRUST = "trust/"
"""Prefix in the `known` of an attack's programs of its observation's `trust`; simulators and priors are not handed it."""
VARIED = ("tv", "tv_boost", "noise_weight", "lr", "noise_lr")
"""Fields of `Matching` that `variants` may change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """A further unknown of an attack, merged into `known` under its name: α of a surrogate model, a latent, …

    shape: of one attack's.  start: its first value, or draw(shape, generator).  lr: first step size.  low, high: it is kept in between.
    smooth: of images (B, C, H, W), what their total variation weighs beside the candidate's.
    """

    shape: tuple[int, ...] = ()
    start: float | Callable[[tuple[int, ...], Generator], Tensor] = 0.0
    lr: float = 0.1
    low: float = -math.inf
    high: float = math.inf
    smooth: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Unordered:
    """Of a delta of several local batches, or a sum of several clients, whose labels are known without their order: what an attack needs to guess which images
    were in which batch.

    Images, labels and noise keep their rows, and an order (B,) says whose row stands in each place of the simulator's. Restart 0 begins with the order as
    it is, each other restart with a draw of its own; then two rows of different labels are exchanged whenever the objective is lower with them exchanged.
    It is tried once in EXCHANGES iterations, with every pair in turn, and costs an evaluation.

    Trap: images soon adapt to a wrong order, and an exchange then rarely pays, so a single start is mostly the sorted guess: take restarts. In deltas of 4
    steps of one image (synthetic cells of 16 pixels, small net, lr 0.05, 200 iterations, 6 of them) counts gave 11.0 dB on average in sorted order and
    with exchanges from one start, 12.4 dB with 4 starts; known labels gave 13.2 dB.
    Of sums over three clients of 4 images each, counts in sorted order, with exchanges from one start, from 4, and known labels gave 13.8, 15.6, 15.7 and 16.0 dB
    against signs, and 17.2, 18.4, 18.7 and 18.9 dB against BiDO (the same cells, an untrained net, 250 iterations, 8 victims).

    batches: local batches of one epoch, at least 2 of a single client.  clients: in the observed update, whose images stand one client after another.  Unknowns in `Matching.searched` stay where they are, but those under `HELD`.  latent_dims: the
    trailing dims of `Matching.noise_shape` that are of one image; before them stand those of (steps, clients · batch), in each step client after client.
    first: first(observation, start) → order int64 (B,), in place of the draws; None for them.
    """

    batches: int
    clients: int = 1
    latent_dims: int = 3
    first: Callable[[int, int], Tensor] | None = None

    def __post_init__(self) -> None:
        for name, least in (("batches", 1 if self.clients > 1 else 2), ("clients", 1), ("latent_dims", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)!r} of unordered labels: expected at least {least}.")

    @property
    def parts(self) -> int:
        """Batches of all clients."""
        return self.batches * self.clients

    def placed(self, variables: Tensors, order: Tensor) -> Tensors:
        """Variables of K attacks, rows in the places that their orders (K, B) say."""
        return {name: self._moved(name, tensor, order) for name, tensor in variables.items()}

    def returned(self, gradients: Tensors, order: Tensor) -> Tensors:
        """From places back to rows."""
        return self.placed(gradients, order.argsort(1))

    def _moved(self, name: str, tensor: Tensor, order: Tensor) -> Tensor:
        if name in ("images", "code") or name.startswith(HELD):
            return torch.take_along_dim(tensor, order.view(*order.shape, *[1] * (tensor.ndim - 2)), 1)
        if name != "noise":
            return tensor
        wide = tensor.shape[tensor.ndim - 1 - self.latent_dims]
        by_step = tensor.reshape(len(tensor), -1, self.batches, self.clients, wide // self.clients, math.prod(tensor.shape[tensor.ndim - self.latent_dims :]))
        by_image = by_step.transpose(2, 3)
        moved = torch.take_along_dim(by_image.flatten(2, 4), order[:, None, :, None], 2)
        return moved.view_as(by_image).transpose(2, 3).reshape(tensor.shape)


EXCHANGES = 4
"""Iterations between exchanges of rows whose order is guessed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """Settings of a gradient-matching attack; `naive`, `joint` and the other presets give tuned or published ones.

        min over x (and e, …)   distance(g(x, e), g_observed) + tv · TV(x) + noise_weight · mean e² + Σ wᵢ · priorᵢ

    The parts are exchangeable: a distance, priors, a start, an optimiser, a coupling; the simulator comes with the observations.

    image_shape:  (C, H, W).  num_classes: of the labels.
    noise_shape:  of one observation's noise e, as `simulate` takes it, e.g. (B, *latent); None searches no noise.
    distance:     "cosine" 1 − cos over all tensors as one vector, in [0, 2]; "l2" ‖g − g_observed‖² / ‖g_observed‖²;
                  "cosine_layers" the mean of 1 − cos over tensors; or a Distance.
    tv:           weight of the anisotropic total variation (mean over images).  tv_boost: it starts this many times higher and
                  falls geometrically to `tv` over the first 3/4; ≥ 1.
    priors:       (weight, Prior) each.  coupling: of the restarts of an observation, which then share a chunk; None for none.
    lr, noise_lr, label_lr: first step sizes, in image units [0, 1], in standard deviations of the noise, in logits.
    signed:       the optimiser sees only the sign of the pixels' gradient (never of the noise's); "soft": a smooth sign.
    decay:        of all steps: "constant"; "step" ×0.1 after 3/8, 5/8 and 7/8; "linear" 1 − t; "quadratic" (1 − t)²; "cosine".
    warmup:       iterations over which the steps rise linearly from 0.
    optimiser:    None for Adam; else an Optimiser.
    kink_width:   first and last width of `CurvedKinks`, geometric in between; None leaves autograd's flat kinks.
    start:        images "normal" 0.5 + 0.2 N(0, 1), clipped, "uniform" on [0, 1], another name of `starts.STARTS`, or a Start.
    noise_start:  standard deviation of the first e.
    search_labels: the labels are unknowns too (DLG): logits that start at N(0, 1).  soft_labels: those that are not granted are recovered as
                  probabilities (`recover_soft_labels`), for clients that train on mixed or smoothed ones.  local: the SGD behind deltas, as far
                  as it was declared, for both recoveries.
    unordered:    the labels that are granted or recovered stand in an order that is not that of the clients and local batches, and is searched; None where
                  it is, or where there is one batch.
    searched:     further unknowns by name.  drawn: further tensors by name, drawn afresh in every iteration by draw(generator of the attack
                  and iteration); both are handed to the simulator in `known`.
    render, code_shape: search a code (B, *code_shape) ~ N(0, 1) instead of pixels; render(code) → images (B, C, H, W) in [0, 1].
    code_weight:  weight of the mean squared code.
    iterations:   steps per attack; the loss is evaluated iterations + 1 times.
    restarts:     starts per observation.  variants: changes to the fields `VARIED`, each tried from every start, e.g.
                  ({"tv": 1e-3}, {"tv": 1e-2}); () tries these settings alone.
    halving:      1 runs every start to its end. h > 1: at iterations …, T/h², T/h of T, all but the best 1/h of an observation's starts, by
                  the attacker's own loss, stop, until one is left (successive halving, Jamieson and Talwalkar 2016). It goes on as it would
                  have without: 8 starts with h = 2 cost 2.5 full ones, 16 with h = 4 the same.
    patience:     an attack whose best loss fell by less than a thousandth in so many iterations stops; None never stops early.
    choose_by:    what picks a start: the "objective", the "fit" without priors, or the "tv" of the result (as LAMP and breaching offer), among the starts
                  that ran longest: those that halving gave up, or whose loss was lost, are unfinished.
    form:         how ∂distance/∂x is computed: "double_backward"; or without second derivatives of operators, as the derivative of the input
                  gradient along v = ∂distance/∂g: exactly, by "forward_over_reverse", or by "central_difference" (see large.py).
    difference_step: h of the central difference, relative to ‖θ‖ / ‖v‖.
    snapshots:    best candidates so far that are kept, evenly spaced, for the evaluator's curves.

    Reported losses and the choice of candidates use the final `tv` and the settings' own weights: schedules and variants bend the path,
    never the objective.
    Raises: InputError for values out of range.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    noise_shape: tuple[int, ...] | None = None
    distance: Literal["cosine", "l2", "cosine_layers"] | Distance = "cosine"
    tv: float = 3e-3
    tv_boost: float = 100.0
    noise_weight: float = 1e-3
    priors: tuple[tuple[float, Prior], ...] = ()
    coupling: Coupling | None = None
    lr: float = 0.1
    noise_lr: float = 0.3
    label_lr: float = 0.1
    signed: bool | Literal["soft"] = False
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "quadratic"
    warmup: int = 0
    optimiser: Optimiser | None = None
    kink_width: tuple[float, float] | None = (1.0, 0.1)
    start: str | Start = "normal"
    noise_start: float = 0.0
    search_labels: bool = False
    soft_labels: bool = False
    local: LocalSteps | None = None
    unordered: Unordered | None = None
    searched: Mapping[str, Searched] = dataclasses.field(default_factory=dict)
    drawn: Mapping[str, Callable[[Generator], Tensor]] = dataclasses.field(default_factory=dict)
    render: Callable[[Tensor], Tensor] | None = None
    code_shape: tuple[int, ...] = ()
    code_weight: float = 1e-3
    iterations: int = 1000
    restarts: int = 1
    variants: tuple[Mapping[str, float], ...] = ()
    halving: int = 1
    patience: int | None = None
    choose_by: Literal["objective", "fit", "tv"] = "objective"
    form: Literal["double_backward", "forward_over_reverse", "central_difference"] = "double_backward"
    difference_step: float = 1e-3
    snapshots: int = 0

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise InputError(f"image_shape={self.image_shape}: expected (channels, height, width).")
        choices = (("distance", self.distance, DISTANCES), ("decay", self.decay, DECAYS), ("form", self.form, FORMS), ("signed", self.signed, SIGNS))
        for name, value, allowed in (*choices, ("choose_by", self.choose_by, ("objective", "fit", "tv")), ("start", self.start, tuple(STARTS))):
            if not callable(value) and value not in allowed:
                hint = ", or give a function" if name in ("distance", "start") else ""
                raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(map(str, allowed))}{hint}.")
        for name in (*self.searched, *self.drawn):
            if name in RESERVED:
                raise InputError(f"searched or drawn {name!r}: that name has a meaning of its own; choose another.")
        for change in self.variants:
            if unknown := sorted(change.keys() - set(VARIED)):
                raise InputError(f"variants change {unknown}: only {', '.join(VARIED)} may differ between the attacks of one program.")
        if self.search_labels and self.soft_labels:
            raise InputError("search_labels and soft_labels: labels are searched or recovered. Choose one.")
        if self.search_labels and self.unordered is not None:
            raise InputError("search_labels and unordered: labels that are searched have no order to be guessed. Leave unordered out.")
        if self.render is not None and not self.code_shape:
            raise InputError("render needs code_shape, the shape of one image's code.")
        least_values = {
            "num_classes": 2, "restarts": 1, "iterations": 0, "tv": 0, "noise_weight": 0, "noise_start": 0, "tv_boost": 1, "halving": 1,
            "warmup": 0, "snapshots": 0, "code_weight": 0,
        }  # fmt: skip
        for name, least in least_values.items():
            for value in (getattr(self, name), *(change[name] for change in self.variants if name in change)):
                if not (math.isfinite(value) and value >= least):
                    raise InputError(f"{name}={value!r}: expected a number of at least {least}.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience={self.patience!r}: expected at least 1 iteration, or None.")
        positive = {name: getattr(self, name) for name in ("lr", "noise_lr", "label_lr", "difference_step")}
        positive |= {f"searched[{name!r}].lr": one.lr for name, one in self.searched.items()}
        positive |= {f"variants {name}": change[name] for change in self.variants for name in ("lr", "noise_lr") if name in change}
        if self.kink_width is not None:
            positive |= {"kink_width[0]": self.kink_width[0], "kink_width[1]": self.kink_width[1]}
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value!r}: expected a number above 0.")

    @property
    def starts(self) -> int:
        """Attacks per observation: every restart under every variant; start s is restart s mod restarts of variant s // restarts."""
        return self.restarts * max(1, len(self.variants))

    def evaluations(self, first: int = 0, last: int | None = None) -> int:
        """Of the objective from iteration first to before last (default: to the end), the one after the last step and those of exchanged rows included."""
        last = self.iterations if last is None else last
        exchanged = 0 if self.unordered is None else last // EXCHANGES - first // EXCHANGES
        return last - first + (last == self.iterations) + exchanged

    @property
    def together(self) -> bool:
        """Whether an observation's starts must be in one chunk."""
        return self.halving > 1 or self.coupling is not None

    def of(self, start: int) -> Matching:
        """The settings of a start, with its variant's changes."""
        return dataclasses.replace(self, **self.variants[start // self.restarts], variants=()) if self.variants else self

    def descent(self) -> Optimiser:
        """The optimiser in use."""
        if self.optimiser is not None:
            return self.optimiser
        return Adam(sign={False: "none", True: "hard"}.get(self.signed, "soft"))


SIGNS = (False, True, "soft")


def step_factor(matching: Matching, iteration: int) -> float:
    """What multiplies the step sizes at an iteration in [0, iterations)."""
    rise = min(1.0, (iteration + 1) / matching.warmup) if matching.warmup else 1.0
    return rise * decay_factor(matching.decay, iteration / max(matching.iterations, 1))


def tv_weight(matching: Matching, iteration: int) -> float:
    """Weight of the total variation that the step at an iteration follows."""
    done = iteration / max(matching.iterations, 1)
    return matching.tv * matching.tv_boost ** max(0.0, 1 - done / 0.75)


def kink_width(matching: Matching, iteration: int) -> float | None:
    """Width of CurvedKinks at an iteration."""
    if matching.kink_width is None:
        return None
    first, last = matching.kink_width
    return first * (last / first) ** (iteration / max(matching.iterations, 1))


def tables(matching: Matching, starts: list[int], variables: list[str], cast: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Every schedule as device tensors, so that the loop asks the host for nothing.

    Returns: knobs (iterations + 1, K) of the objective: tv, noise_weight, and width where kinks are curved; rates (iterations + 1, K) of each variable.
    """
    own = {variant: matching.of(variant * matching.restarts) for variant in {start // matching.restarts for start in starts}}
    own = {start: own[start // matching.restarts] for start in starts}
    points = range(matching.iterations + 1)

    def table(value: Callable[[Matching, int], float]) -> Tensor:
        columns = {id(one): [value(one, i) for i in points] for one in own.values()}
        return torch.tensor([columns[id(own[start])] for start in starts], dtype=torch.float64).T.to(**cast).contiguous()

    knobs = {"tv": table(tv_weight), "noise_weight": table(lambda one, i: one.noise_weight)}
    if matching.kink_width is not None:
        knobs["width"] = table(kink_width)
    first = {"images": lambda one: one.lr, "code": lambda one: one.lr, "noise": lambda one: one.noise_lr, "logits": lambda one: one.label_lr}
    first |= {name: lambda one, lr=spec.lr: lr for name, spec in matching.searched.items()}
    rates = {name: table(lambda one, i, lr=first[name]: lr(one) * step_factor(one, i)) for name in variables}
    return knobs, rates


def distance(name: str | Distance, update: Tensors, target: Tensors, scale: Tensor) -> Tensor:
    """Distance of an update from the observed one, a scalar.

        cosine          ½ ‖u/‖u‖ − t‖² = 1 − cos(u, t), without its cancellation near 0
        l2              ‖scale · u − t‖²
        cosine_layers   mean over tensors of ½ ‖u/‖u‖ − t/‖t‖‖², those with t = 0 left out

    target: t, the observed update over its norm.  scale: one over that norm. ‖u‖ is softened below 1e-6 of the observed norm,
    so that a vanishing update has a finite gradient.
    """
    if callable(name):
        return name(update, target, scale)
    if name == "cosine":
        squared = sum(tensor.square().sum() for tensor in update.values()) * scale.square()
        return 0.5 * sum((tensor * (scale * (squared + 1e-12).rsqrt()) - target[key]).square().sum() for key, tensor in update.items())
    if name == "cosine_layers":
        apart, count = 0.0, 0.0
        for key, tensor in update.items():
            power = target[key].square().sum()
            there = (power > 0).to(power.dtype)
            goal = target[key] * torch.where(power > 0, power, 1.0).rsqrt()
            own = tensor * (scale * ((tensor * scale).square().sum() + 1e-12 * power + 1e-24).rsqrt())
            apart, count = apart + 0.5 * there * (own - goal).square().sum(), count + there
        return apart / count.clamp_min(1)
    return sum((tensor * scale - target[key]).square().sum() for key, tensor in update.items())


def distance_and_slope(name: str | Distance, update: Tensors, target: Tensors, scale: Tensor) -> tuple[Tensor, Tensors]:
    """`distance`, and its derivative with respect to the update; by hand for "cosine" and "l2", which saves half of the passes over memory.

        cosine   û = u / ‖u‖,  d = ½ ‖û − t‖²,  ∂d/∂u = (û − t − ⟨û, û − t⟩ û) / ‖u‖   for ‖t‖ = 1
        l2       2 scale (scale · u − t)
    """
    if name == "cosine":
        squared = _squares(update) * scale.square()
        unit = scale * (squared + 1e-12).rsqrt()  # u · unit = û
        apart = {key: tensor * unit - target[key] for key, tensor in update.items()}
        fit = 0.5 * _squares(apart)
        # ⟨û, û − t⟩ = ½ ‖û − t‖² + ½ (‖û‖² − 1), without another pass: ‖û‖ is a little less than 1, as ‖u‖ is softened
        along = fit - 0.5e-12 / (squared + 1e-12)
        return fit, {key: torch.addcmul(apart[key] * unit, tensor, -along * unit.square()) for key, tensor in update.items()}
    if name == "l2":
        apart = {key: tensor * scale - target[key] for key, tensor in update.items()}
        return _squares(apart), {key: 2 * scale * tensor for key, tensor in apart.items()}
    slope, fit = grad_and_value(lambda update: distance(name, update, target, scale))(update)
    return fit, slope


def _squares(tensors: Tensors) -> Tensor:
    """Σ of all squares, in one reading of each tensor."""
    return sum(torch.linalg.vector_norm(tensor).square() for tensor in tensors.values())
