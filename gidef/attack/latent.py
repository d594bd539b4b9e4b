"""A5: the perturbed latent z̃ from the predictor's gradients, then a decoder. The attack on private fronts.

The server knows the predictor φ and sees ∂L/∂φ, a function of z̃ and the labels alone (but where a decoder in the game sees gradients, see defence.seeing). The span of a batch's latents can often be
written down (`latent_basis`), and then few numbers are left to find (`unmix`); otherwise all of z̃ is matched (`match_latent`).
The decoder is trained on public images through a front: the true one (a bound), or a shadow that the attacker trains in front of
the known φ (`fit_shadow`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from gidef.attack.kinks import CurvedKinks
from gidef.attack.labels import LabelsHidden, recover_labels
from gidef.attack.predictor import Predictor
from gidef.attack.unmix import UNMIXED, latent_basis, most_steps, unmix
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Observation, Reconstruction, Tensors

# K attacks (observation × restart), O observations, B images of one, r latents of a basis
ITERATIONS, AT_ONCE, STARTS = 400, 16, 32
"""Of `match_latent` from each start; attacks in one program of it; starts of `unmix`, at most. Unless asked for otherwise."""
STEPPED = 8
"""Starts of `unmix` through local steps, at most, each of which takes about S times as long."""


class Matched(NamedTuple):
    """latents: (O, B, *latent), of the best start by the attacker's own loss.  loss: (O,), of it, ∞ where every start failed.
    losses: (O, starts), the lowest of each.  curve: (O, points), of the best start.  restart: int64 (O,), which it is.  labels: int64 (O, B).
    iterations: int64 (O, starts), evaluated for each; none for a start that was not needed, or of an update that cannot be matched.
    free: bool (O,), whether nothing told the span of the latents, so that what the gradient does not tell of them is as it began."""

    latents: Tensor
    loss: Tensor
    losses: Tensor
    curve: Tensor
    restart: Tensor
    labels: Tensor
    iterations: Tensor
    free: Tensor


def match_latent(
    observations: Sequence[Observation], predictor: Predictor, *, seed: int, iterations: int = ITERATIONS, restarts: int = 1, lr: float = 0.1,
    distance: Literal["cosine", "l2"] = "cosine", kink_width: tuple[float, float] | None = (1.0, 0.02), start_scale: float = 0.5,
    at_once: int = AT_ONCE, mode: Literal["vmap", "loop"] = "vmap", dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", every: int = 20, numbers: Sequence[int] | None = None,
) -> Iterator[int]:  # fmt: skip
    """Search the latents whose gradient of φ is the observed one; yields the iterations done, over all chunks.

        min over z   distance(∂L/∂φ (z, labels), observed)

    Adam with steps that fall to zero as (1 − t)², all of a chunk's attacks in one program. z is not bounded.

    Args:    observations: alike in sizes; updates and params hold at least the predictor's tensors (others are ignored). A delta is taken
             for one step of SGD, or for the predictor's `local` steps, whose latents stand one step after another.
             predictor: owned by this thread.  restarts: chosen by their own loss.  distance, kink_width: as in `Matching`.
             start_scale: deviation of the first z. What the gradient does not tell (behind a pooling layer, differences within a window)
             stays about as it began, so that small starts give latents of small norm.
             at_once: attacks in one program.  every: iterations between reports.
             numbers: of the observations, from which they draw, whatever others are attacked with them; None counts them from 0.
    Returns: Matched, on the CPU, in `dtype`.
    Raises:  InputError if observations differ in sizes, lack the predictor's tensors, or labels can neither be had nor recovered.
    Source:  gradient matching (Zhu et al. 2019, arXiv:1906.08935; Geiping et al. 2020), with the latent for the image.
    """
    if restarts < 1 or iterations < 0 or at_once < 1 or not lr > 0:
        raise InputError(f"restarts={restarts}, iterations={iterations}, at_once={at_once}, lr={lr}: expected at least 1, 0 and 1, and lr above 0.")
    if distance == "l2" and any(observation.kind == "delta" for observation in observations):
        raise InputError('a delta has an unknown step size: match it by distance="cosine".')
    size, numbers = _check(observations, predictor), _numbered(observations, numbers)
    cast, names, shape = {"device": torch.device(device), "dtype": dtype}, predictor.names, predictor.latent_shape
    labels, told = _labels(observations, predictor.num_classes)
    predictor.to(**cast)
    attacks = [(index, restart) for index in range(len(observations)) for restart in range(restarts)]

    def objective(z: Tensor, params: Tensors, target: Tensors, scale: Tensor, labels: Tensor, width: float | None) -> Tensor:
        with contextlib.nullcontext() if width is None else CurvedKinks(width):
            update = predictor.gradient(params, z, labels)
        return _distance(distance, update, target, scale)

    latents, losses, curves, spent, done = [], [], [], [], 0
    for first in range(0, len(attacks), at_once):
        chunk = attacks[first : first + at_once]
        rows = torch.tensor([index for index, _ in chunk])
        params, dims = _gathered([observations[index].params for index, _ in chunk], names, cast)
        target, scale, alive = _targets([observations[index] for index, _ in chunk], names, cast)
        alive = alive & told[rows].to(alive.device)
        z = start_scale * torch.stack([torch.randn((size, *shape), generator=generator(seed, "latent", numbers[index], restart)) for index, restart in chunk]).to(**cast)
        wanted = F.one_hot(labels[rows], predictor.num_classes).to(**cast)
        evaluate = _over(grad_and_value(objective), len(chunk), mode, (0, dims, 0, 0, 0, None))
        m, v, best = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
        lowest, curve = torch.full((len(chunk),), torch.inf, **cast), []
        for iteration in range(iterations + 1):
            width = None if kink_width is None else kink_width[0] * (kink_width[1] / kink_width[0]) ** (iteration / max(iterations, 1))
            with torch.no_grad():  # never around the yield, it would leak to the consumer
                gradient, loss = evaluate(z, params, target, scale, wanted, width)
            better = alive & (loss < lowest)
            best, lowest = torch.where(_rows(better, z), z, best), torch.where(better, loss, lowest)
            curve.append(loss)
            if iteration < iterations:
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
                step = lr * (1 - iteration / iterations) ** 2 * (m / (1 - 0.9 ** (iteration + 1)))
                z = z - step / ((v / (1 - 0.999 ** (iteration + 1))).sqrt() + 1e-15)
            if iteration % every == 0 and 0 < iteration < iterations:
                yield done + iteration
        done += iterations
        yield done
        points = torch.linspace(0, iterations, min(iterations + 1, 200)).round().long()
        latents.append(best.cpu())
        losses.append(lowest.cpu())
        spent.append(iterations * alive.cpu().long())
        curves.append(torch.stack(curve, 1)[:, points.to(device)].cpu())
    every_loss = torch.cat(losses).view(len(observations), restarts)
    restart = every_loss.argmin(1)
    chosen = torch.arange(len(observations)) * restarts + restart
    spent = torch.cat(spent).view(len(observations), restarts)
    return Matched(torch.cat(latents)[chosen], every_loss.min(1).values, every_loss, torch.cat(curves)[chosen], restart, labels, spent, torch.ones(len(observations), dtype=torch.bool))


def read_latent(
    observations: Sequence[Observation], predictor: Predictor, *, seed: int, starts: int = STARTS, enough: float = 1e-4, numbers: Sequence[int] | None = None,
    **settings: Any,
) -> Iterator[float]:  # fmt: skip
    """The latents of each observation by the best way there is; yields the share of the work that is over, in [0, 1].

    Where a layer tells the span of the latents (`latent_basis`), they are sought in it (`unmix`); where none does, or the result is
    further than `enough` from the observed gradient, by free matching (`match_latent`), whose result `unmix` polishes: a latent's scale hardly
    shows before a norm layer. The smaller cosine distance counts.

    Args:    observations, predictor, seed, numbers, settings: as `match_latent`, whose iterations bound the free matching alone.
             starts: of `unmix`, 2 at most for one number, and for more than 16 behind a convolution
             so few that they cost no more than at 16, or one, and at most `STEPPED` through local steps. Above `UNMIXED` images there is free matching alone.
    Yields:  shares by the steps that all of this takes at most; what ends earlier, or is not needed, counts as over at once.
    Returns: Matched, on the CPU, float64; loss and losses are cosine distances; the curve is a single point, the loss, where `unmix` alone
             gave it, and so are all starts' losses. Updates that are zero or not finite have an infinite loss. What `unmix` took counts to the start that is kept.
    """
    size, shape, numbers = _check(observations, predictor), predictor.latent_shape, _numbered(observations, numbers)
    labels, told = _labels(observations, predictor.num_classes)
    latents = torch.zeros(len(observations), size, *shape, dtype=torch.float64)
    loss = torch.full((len(observations),), torch.inf, dtype=torch.float64)
    restarts, device, exact = settings.get("restarts", 1), settings.get("device", "cpu"), {"device": torch.device("cpu"), "dtype": torch.float64}
    unmixed, spent = torch.zeros(len(observations), dtype=torch.int64), torch.zeros((len(observations), restarts), dtype=torch.int64)
    able = [index for index, one in enumerate(observations) if told[index] and bool(_targets([one], predictor.names, exact)[2])]
    spans: dict[int, tuple[Tensor, int]] = {}
    for index in able:
        bases = ((reader, latent_basis(observations[index].update, reader, shape, size)) for reader in predictor.readers if size <= UNMIXED)
        reader, basis = next((one for one in bases if one[1] is not None), (None, None))
        if basis is not None:
            tries = _tries(starts, size, len(basis), reader.kernel is None)
            spans[index] = basis, min(tries, STEPPED) if predictor.local else tries
        yield 0.0
    iterations, polish = settings.get("iterations", ITERATIONS), most_steps(1) if size <= UNMIXED else 0
    total, over = sum(most_steps(tries) for _, tries in spans.values()) + len(able) * (iterations * restarts + polish), 0
    for index, (basis, tries) in spans.items():
        running = unmix(observations[index], predictor, basis, labels[index], seed=seed, stream=numbers[index], starts=tries, device=device)
        (latents[index], *_), taken = yield from _shared(running, over, most_steps(tries), total)
        over, unmixed[index] = over + most_steps(tries), taken
        loss[index] = _fit(observations[index], predictor, latents[index].to(device), labels[index])
    unspanned = torch.tensor([index not in spans for index in range(len(observations))])
    losses, curve, restart = loss[:, None].repeat(1, spent.shape[1]), loss[:, None], torch.zeros(len(observations), dtype=torch.int64)
    left = [index for index in able if not loss[index] <= enough]
    if left:
        over = total - len(left) * (iterations * restarts + polish)
        running = match_latent([observations[index] for index in left], predictor, seed=seed, numbers=[numbers[index] for index in left], **settings)
        chunks = -(-len(left) * restarts // settings.get("at_once", AT_ONCE))
        free, _ = yield from _shared(running, over, len(left) * iterations * restarts, total, steps=chunks * iterations)
        over += len(left) * iterations * restarts
        spent[left], curve = free.iterations, curve.repeat(1, free.curve.shape[1])
        for place, index in enumerate(left):
            observation, near, tried = observations[index], {"starts": 1, "first_step": 0.1, "device": device}, [free.latents[place].double()]
            if size <= UNMIXED:
                running = unmix(observation, predictor, free.latents[place], labels[index], seed=seed, stream=numbers[index], **near)
                (polished, *_), taken = yield from _shared(running, over, polish, total)
                over, unmixed[index] = over + polish, unmixed[index] + taken
                tried.append(polished.cpu())
            for found in tried:
                fit = _fit(observation, predictor, found.to(device), labels[index])
                if fit < loss[index]:
                    latents[index], loss[index], restart[index], unspanned[index] = found, fit, free.restart[place], True
                    losses[index], curve[index] = free.losses[place], free.curve[place]
    spent[torch.arange(len(observations)), restart] += unmixed
    return Matched(latents, loss, losses, curve, restart, labels, spent, unspanned)


@torch.no_grad()
def decode(latents: Tensor, decoder: nn.Module, *, at_once: int = 64) -> Tensor:
    """Images float32 (O, B, C, H, W) in [0, 1], on the CPU, from latents (O, B, *latent) of any dtype and device. The decoder's mode is left."""
    some = next(decoder.parameters())
    parts = [decoder(part.to(some)).clamp(0, 1).float().cpu() for part in latents.flatten(0, 1).split(at_once)]
    return torch.cat(parts).unflatten(0, latents.shape[:2])


def _tries(starts: int, size: int, rank: int, cheap: bool) -> int:
    """Starts of `unmix` for a batch of this size, in latents of this number; cheap: linear layers read them."""
    return min(starts, 2) if size * rank == 1 else starts if cheap else max(1, int(starts * min(1.0, 16 / (size * rank))))


def invert_latent(observations: Sequence[Observation], predictor: Predictor, decoder: nn.Module, *, seed: int, **settings: Any) -> Iterator[float]:
    """A5: `read_latent`, then `decode`; yields the share of the work that is over.

    Args:    as `read_latent`.  decoder: (N, *latent) → images, trained on z̃ of public images, in eval mode.
    Returns: one Reconstruction per observation. An update that is zero or not finite, or tells no labels where none are granted, is a failure, with mid-grey images.
    """
    matched = yield from read_latent(observations, predictor, seed=seed, **settings)
    images, found = decode(matched.latents, decoder), []
    for index in range(len(observations)):
        failed = not math.isfinite(float(matched.loss[index]))
        found.append(
            Reconstruction(
                images=torch.full_like(images[index], 0.5) if failed else images[index],
                labels=matched.labels[index],
                loss=float(matched.loss[index]),
                losses=matched.curve[index].float(),
                restart=int(matched.restart[index]),
                restart_losses=matched.losses[index].float(),
                iterations=int(matched.iterations[index, matched.restart[index]]),
                restart_iterations=matched.iterations[index],
                status="failed" if failed else "ok",
                error="no latent was found: the observed update is zero or not finite, tells no labels, or the loss became infinite" if failed else "",
            )
        )
    return found


def _shared(running: Iterator[int], over: int, part: int, total: int, *, steps: int | None = None) -> Iterator[float]:
    """Runs a search that yields its steps as the next `part` of a total of which `over` are over; returns what the search returns, and its steps.

    steps: that it takes at most; as many as its part, unless said otherwise.
    """
    done, most = 0, max(part if steps is None else steps, 1)
    while True:
        try:
            done = next(running)
        except StopIteration as end:
            return end.value, done
        yield (over + part * min(1.0, done / most)) / max(total, 1)


def _labels(observations: Sequence[Observation], classes: int) -> tuple[Tensor, Tensor]:
    """int64 (O, B): granted, or recovered; and bool (O,): whether an update told them. They are zeros where it did not."""
    labels = torch.stack([_labels_of(observation, classes) for observation in observations])
    return labels.clamp_min(0), (labels >= 0).all(1)


def _labels_of(observation: Observation, classes: int) -> Tensor:
    """int64 (B,), −1 where the update tells none."""
    labels, size = observation.labels, observation.num_examples
    if labels is None:
        try:
            labels = recover_labels(observation, classes)
        except (LabelsHidden, torch.linalg.LinAlgError):
            labels = torch.full((size,), -1)
    elif labels.shape != (size,) or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"granted labels {tuple(labels.shape)} do not fit {size} images of {classes} classes: give one class index per image.")
    return labels.long().cpu()


def _numbered(observations: Sequence[Observation], numbers: Sequence[int] | None) -> Sequence[int]:
    """The numbers of observations, counted from 0 unless given. InputError if there are more or fewer of them."""
    if numbers is not None and len(numbers) != len(observations):
        raise InputError(f"{len(numbers)} numbers for {len(observations)} observations: give one for each.")
    return range(len(observations)) if numbers is None else numbers


def _check(observations: Sequence[Observation], predictor: Predictor) -> int:
    """The batch size; InputError unless observations are alike in it and hold the predictor's tensors."""
    if len(sizes := {observation.num_examples for observation in observations}) != 1:
        raise InputError(f"observations with {sorted(sizes)} images: give at least one observation, and batches of one size.")
    for observation in observations:
        for name in predictor.names:
            if name not in observation.update or name not in observation.params or observation.update[name].shape != observation.params[name].shape:
                raise InputError(
                    f"{name!r} of the predictor is not in the update, or has another shape there: the latent is read from the predictor's gradient. "
                    "Build the predictor from the model that is attacked."
                )
    return sizes.pop()


def _gathered(each: Sequence[Tensors], names: Sequence[str], cast: dict[str, Any]) -> tuple[Tensors, int | None]:
    """Tensors of all attacks, and their vmap dim: one map if they share it, else stacked."""
    if all(one[name] is each[0][name] for one in each for name in names):
        return {name: each[0][name].detach().to(**cast) for name in names}, None
    return {name: torch.stack([one[name].detach() for one in each]).to(**cast) for name in names}, 0


def _targets(observations: Sequence[Observation], names: Sequence[str], cast: dict[str, Any]) -> tuple[Tensors, Tensor, Tensor]:
    """Gradients over their norms, one over the norms (K,), and which can be matched (K,); the others are zero."""
    device = cast["device"]
    observed = {name: torch.stack([o.update[name].detach() for o in observations]).to(device, torch.float64) for name in names}
    sign = torch.tensor([1.0 if o.kind == "gradient" else -1.0 for o in observations], device=device, dtype=torch.float64)
    norm = sum((t.flatten(1).square().sum(1) for t in observed.values()), torch.zeros_like(sign)).sqrt()  # 0 where nothing lies behind the latent
    alive = norm.isfinite() & (norm > 0)
    target = {name: torch.where(_rows(alive, t), t * _rows(sign / norm, t), 0.0).to(cast["dtype"]) for name, t in observed.items()}
    return target, torch.where(alive, 1 / norm, 0.0).to(cast["dtype"]), alive


@torch.no_grad()
def _fit(observation: Observation, predictor: Predictor, latents: Tensor, labels: Tensor) -> float:
    """Cosine distance of some latents' gradient from the observed one, in float64; infinite if it is not finite."""
    cast = {"device": latents.device, "dtype": torch.float64}
    target, scale, alive = _targets([observation], predictor.names, cast)
    params, _ = _gathered([observation.params], predictor.names, cast)
    update = predictor.to(**cast).gradient(params, latents.to(**cast), F.one_hot(labels, predictor.num_classes).to(**cast))
    value = float(_distance("cosine", update, {name: t[0] for name, t in target.items()}, scale[0]))
    return value if bool(alive) and math.isfinite(value) else math.inf


def _distance(name: str, update: Tensors, target: Tensors, scale: Tensor) -> Tensor:
    """Of an update from the observed one over its norm, as in `matching.distance`; scale is one over that norm."""
    if name == "cosine":
        squared = sum(tensor.square().sum() for tensor in update.values()) * scale.square()
        return 0.5 * sum((tensor * (scale * (squared + 1e-12).rsqrt()) - target[key]).square().sum() for key, tensor in update.items())
    if name != "l2":
        raise InputError(f'distance={name!r} is unknown: choose "cosine" or "l2".')
    return sum((tensor * scale - target[key]).square().sum() for key, tensor in update.items())


def _over(function: Callable, attacks: int, mode: str, dims: tuple) -> Callable:
    """The function over the leading dim of all attacks, as one program or a loop."""
    if mode == "vmap":
        return vmap(function, in_dims=dims)
    if mode != "loop":
        raise InputError(f'mode={mode!r} is unknown: choose "vmap" or "loop".')

    def pick(value: Tensor | Tensors | None, attack: int, dim: int | None) -> Tensor | Tensors | None:
        if dim is None:
            return value
        return {name: tensor[attack] for name, tensor in value.items()} if isinstance(value, dict) else value[attack]

    def loop(*inputs: Any) -> tuple[Tensor, ...]:
        each = [function(*(pick(value, attack, dim) for value, dim in zip(inputs, dims, strict=True))) for attack in range(attacks)]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    return loop


def _rows(per_attack: Tensor, like: Tensor) -> Tensor:
    """(K,) in the shape (K, 1, …) that broadcasts against `like`."""
    return per_attack.view(-1, *[1] * (like.ndim - 1))
