"""A chunk's attacks as stacked tensors: inputs checked, gathered along one leading dim, and run over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gidef.attack.labels import recover_labels
from gidef.attack.matching import Matching
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Observation, Tensors

Chunk = tuple[tuple[int, int], ...]
"""(index of the observation, restart) of each attack."""

Dims = dict[str, int | None]

OK, ZERO, NOT_FINITE, LOST = range(4)
REASONS = {
    ZERO: "the observed update is zero: it holds nothing to match",
    NOT_FINITE: "the observed update is not finite",
    LOST: "the attacker's loss became infinite or NaN at iteration {}",
}


def labels_of(observations: Sequence[Observation], matching: Matching) -> Tensor:
    """int64 (K, B): granted, or recovered."""
    found, classes = [], matching.num_classes
    for observation in observations:
        labels, size = observation.labels, observation.num_examples
        if labels is None:
            labels = recover_labels(observation, classes)
        elif labels.shape != (size,) or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise InputError(f"granted labels {tuple(labels.shape)} do not fit {size} images of {classes} classes: give one class index per image.")
        found.append(labels.long().cpu())
    return torch.stack(found)


def gather(each: Sequence[Tensors], cast: dict[str, Any]) -> tuple[Tensors, Dims]:
    """One map for all attacks, and its vmap dims: a tensor that all attacks share stays one, the others are stacked."""
    if len({tuple(sorted((name, tensor.shape) for name, tensor in tensors.items())) for tensors in each}) > 1:
        raise InputError("the observations of one attack differ in names or shapes of params or known tensors: attack them in separate calls.")
    tensors, dims = {}, {}
    for name, first in each[0].items():
        shared = all(one[name] is first for one in each)
        tensors[name] = (first if shared else torch.stack([one[name] for one in each])).detach().to(**cast)
        dims[name] = None if shared else 0
    return tensors, dims


def normalised(updates: Sequence[Tensors], cast: dict[str, Any]) -> tuple[Tensors, Tensor, Tensor]:
    """Observed updates over their norms, one over the norms (K,), and failure codes (K,); a failed attack's target is zero."""
    target, _ = gather(updates, {"device": cast["device"], "dtype": torch.float64})
    target = {name: tensor.expand(len(updates), *updates[0][name].shape) for name, tensor in target.items()}
    norm = sum(tensor.flatten(1).square().sum(1) for tensor in target.values()).sqrt()
    failure = torch.where(norm == 0, ZERO, torch.where(norm.isfinite(), OK, NOT_FINITE))
    scale = torch.where(failure == OK, 1 / norm, 1.0)
    target = {name: torch.where(rows(failure == OK, t), t * rows(scale, t), 0.0).to(cast["dtype"]) for name, t in target.items()}
    return target, scale.to(cast["dtype"]), failure


def starts(chunk: Chunk, size: int, matching: Matching, seed: int, cast: dict[str, Any]) -> tuple[Tensor, ...]:
    """Where the attacks begin: images (K, B, C, H, W), and noise (K, *noise_shape) if it is searched."""
    images, noises, shape = [], [], (size, *matching.image_shape)
    for observation, restart in chunk:
        draw, noise = generator(seed, "attack", observation, restart), None
        if callable(matching.start):
            image, noise = matching.start(observation, restart)
        elif matching.start == "normal":
            image = (0.5 + 0.2 * torch.randn(shape, generator=draw)).clamp(0, 1)
        else:
            image = torch.rand(shape, generator=draw)
        images.append(image)
        if matching.noise_shape is not None:
            noises.append(matching.noise_start * torch.randn(matching.noise_shape, generator=draw) if noise is None else noise)
    for what, given, expected in (("images", images, shape), ("noise", noises, matching.noise_shape)):
        if any(one.shape != expected for one in given):
            raise InputError(f"start gave {what} of shapes {[tuple(one.shape) for one in given][:3]}, expected {expected}.")
    return tuple(torch.stack(each).to(**cast) for each in (images, noises) if each)


def check_fit(simulated: Tensors, observations: Sequence[Observation]) -> None:
    """Raise InputError unless every observed update has the simulated one's names and shapes."""
    for observation in observations:
        for name in sorted(simulated.keys() | observation.update.keys()):
            ours, theirs = (tuple(side[name].shape) if name in side else "missing" for side in (simulated, observation.update))
            if ours != theirs:
                raise InputError(
                    f"the simulated update does not fit the observed one: {name!r} is {ours} in the simulation and {theirs} in the observation. "
                    "Simulate the model that the client trains, and match the tensors that it releases."
                )


def over_attacks(function: Callable[..., tuple[Tensor, ...]], dims: tuple[Any, ...], attacks: int, mode: str) -> Callable[..., tuple[Tensor, ...]]:
    """The function over the leading dim of all attacks, as one vectorised program or as a loop."""
    if mode == "vmap":
        return vmap(function, in_dims=dims)
    if mode != "loop":
        raise InputError(f'mode={mode!r} is unknown: choose "vmap" or "loop".')

    def loop(*inputs: Any) -> tuple[Tensor, ...]:
        each = [function(*pick(inputs, dims, attack)) for attack in range(attacks)]
        return tuple(torch.stack(outputs) for outputs in zip(*each, strict=True))

    return loop


def pick(value: Any, dims: Any, attack: int) -> Any:
    """One attack's part of a value; dims as vmap's in_dims."""
    if isinstance(value, dict):
        return {name: pick(part, dims[name] if isinstance(dims, dict) else dims, attack) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(pick(part, dims[place] if isinstance(dims, tuple) else dims, attack) for place, part in enumerate(value))
    return value if dims is None else value[attack]


def rows(per_attack: Tensor, like: Tensor) -> Tensor:
    """(K,) in the shape (K, 1, …) that broadcasts against `like`."""
    return per_attack.view(-1, *[1] * (like.ndim - 1))
