"""A front in place of a private one: what an attacker trains on public images before the predictor that the server knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gidef.attack.learned import DrawNoise, public_images
from gidef.errors import InputError
from gidef.models import SplitModel
from gidef.rng import generator
from gidef.types import Tensors


def fit_shadow(
    model: SplitModel, phi: Tensors, images: Tensor, labels: Tensor, *, steps: int, seed: int, draw_noise: DrawNoise | None = None,
    loss: Callable[[SplitModel, Tensor, Tensor, Tensor | None], Tensor] | None = None, batch_size: int = 64, lr: float = 1e-3,
) -> Iterator[int]:  # fmt: skip
    """Train a front, θ and η, in place for a frozen predictor φ, on public images; yields the steps done.

    The fronts of clients are private, but trained in front of the φ that the server knows: so is the shadow, and, begun at the common
    initialisation, it tends to end up close to them.

    Args:    model: the common initialisation, which becomes the shadow; on the device to use.  phi: the predictor's tensors by name; further
             ones are ignored.  images: public, (P, C, H, W), uint8 or floating in [0, 1].  labels: int64 (P,).
             draw_noise: draw_noise(count, generator=g) → (count, *latent); None, or a result of None, is no noise.
             loss: loss(model, images, labels, noise) → scalar, to train as clients do; cross-entropy unless given.
             Adam with the rate falling to zero along a cosine; half of the images are mirrored.
    Raises:  InputError if phi lacks a tensor of the predictor or has another shape for it.
    """
    own = dict(model.named_parameters())
    for name in model.parts["predictor"]:
        if name not in phi or phi[name].shape != own[name].shape:
            raise InputError(f"phi lacks {name!r}, or it has another shape than the model's: give the predictor's tensors of the same architecture.")
        with torch.no_grad():
            own[name].copy_(phi[name])
    front = [own[name] for name in (*model.parts["encoder"], *model.parts["perturbation"])]
    model.requires_grad_(False).train()
    for parameter in front:
        parameter.requires_grad_(True)
    device = front[0].device
    order, noises = generator(seed, "shadow", "order"), generator(seed, "shadow", "noise")
    optimiser = torch.optim.Adam(front, lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (min(batch_size, len(images)),), generator=order)
        batch, wanted = public_images(images, rows, device), labels[rows.to(labels.device)].to(device)
        mirrored = (torch.rand(len(rows), generator=order) < 0.5).to(device)
        batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        noise = _drawn(draw_noise, len(rows), noises, device)
        optimiser.zero_grad(set_to_none=True)
        value = F.cross_entropy(model(batch, noise), wanted) if loss is None else loss(model, batch, wanted, noise)
        value.backward()
        nn.utils.clip_grad_norm_(front, 5.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            yield step
    optimiser.zero_grad(set_to_none=True)
    model.requires_grad_(False).eval()
    yield steps


def front_latents(model: SplitModel, draw_noise: DrawNoise | None = None) -> Callable[[Tensor, Generator, int, Tensor], Tensor]:
    """latents(images (B, C, H, W), generator, step, labels) → z̃ through a front, the shadow or the true one: what a decoder is trained on."""

    def latents(images: Tensor, noises: Generator, step: int, labels: Tensor) -> Tensor:
        return model.run(images, _drawn(draw_noise, len(images), noises, images.device)).perturbed

    return latents


def _drawn(draw: DrawNoise | None, count: int, draws: Generator, device: torch.device) -> Tensor | None:
    noise = None if draw is None else draw(count, generator=draws)
    return None if noise is None else noise.to(device)
