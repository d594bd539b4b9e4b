"""From a gradient simulator to one of local training: the delta that FedAvg releases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gidef.attack.matching import Simulate
from gidef.errors import InputError
from gidef.types import Tensors


def local_sgd(gradient: Simulate, *, steps: int, lr: float, momentum: float = 0.0, epochs: int = 1) -> Simulate:
    """A simulator of local SGD, unrolled and differentiable.

        v ← μ v + g_t(w, batch_t, noise_t),   w ← w − η v,   t = 1 … steps;   the update is w − w_server

    Args:    gradient: simulator of one step's gradient; tensors that it does not return stay as they are.
             steps: in all epochs together.  lr: η > 0.  momentum: μ in [0, 1), as torch.optim.SGD.
             epochs: passes over the B images. The batches are the candidate's consecutive slices of B · epochs / steps images,
             in the same order in every epoch.
    Returns: simulate(params, known, images, labels, noise) → delta. noise has a leading axis of steps:
             (steps, B · epochs / steps, *latent), or is None.
    Raises:  InputError if an argument is out of range; from `simulate`, if the images do not divide into the batches.
    Source:  Geiping et al. 2020, arXiv:2003.14053, section 6 (federated averaging).
    """
    _check(steps, lr, epochs)
    if not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum}: expected a number in [0, 1).")

    def step(t: int, slots: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
        slots = {name: momentum * slots[name] + g if slots else g for name, g in gradients.items()} if momentum else gradients
        return slots, {name: lr * slot for name, slot in slots.items()}

    return _unrolled(gradient, step, steps, epochs)


def local_adam(
    gradient: Simulate, *, steps: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, epochs: int = 1
) -> Simulate:
    """A simulator of local Adam, as `local_sgd` otherwise.

    Args:    lr, betas, eps: as torch.optim.Adam.
    Source:  Kingma and Ba 2015, arXiv:1412.6980. The slope of √v at v = 0 is taken for 0 instead of ∞.
    Trap:    one step of Adam releases little more than the gradient's sign, whose derivative is nearly 0 everywhere: matching has
             little to descend until there are several steps.
    """
    _check(steps, lr, epochs)
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
        raise InputError(f"betas={betas}, eps={eps}: expected betas in [0, 1) and eps above 0.")

    def step(t: int, slots: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
        slots = {
            **{f"m {name}": betas[0] * slots.get(f"m {name}", 0.0) + (1 - betas[0]) * g for name, g in gradients.items()},
            **{f"v {name}": betas[1] * slots.get(f"v {name}", 0.0) + (1 - betas[1]) * g.square() for name, g in gradients.items()},
        }
        changes = {}
        for name in gradients:
            m, v = slots[f"m {name}"] / (1 - betas[0] ** t), slots[f"v {name}"] / (1 - betas[1] ** t)
            root = torch.where(v > 0, torch.where(v > 0, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v))
            changes[name] = lr * m / (root + eps)
        return slots, changes

    return _unrolled(gradient, step, steps, epochs)


def _check(steps: int, lr: float, epochs: int) -> None:
    if steps < 1 or epochs < 1 or steps % epochs or not lr > 0:
        raise InputError(f"steps={steps}, epochs={epochs}, lr={lr}: expected steps a multiple of epochs, both at least 1, and lr above 0.")


def _unrolled(gradient: Simulate, step: Callable[[int, Tensors, Tensors], tuple[Tensors, Tensors]], steps: int, epochs: int) -> Simulate:
    """Local training as a simulator; step(t, slots, gradients) → slots, what is taken off the weights."""

    def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        batches = steps // epochs
        if len(images) % batches:
            raise InputError(f"{len(images)} images do not divide into {batches} local batches of equal size: change the batch size or the steps.")
        size, weights, slots = len(images) // batches, dict(params), {}
        for t in range(steps):
            rows = slice((t % batches) * size, (t % batches + 1) * size)
            gradients = gradient(weights, known, images[rows], labels[rows], None if noise is None else noise[t])
            slots, changes = step(t + 1, slots, gradients)
            weights = {name: tensor - changes[name] if name in changes else tensor for name, tensor in weights.items()}
        return {name: weights[name] - params[name] for name in changes}

    return simulate
