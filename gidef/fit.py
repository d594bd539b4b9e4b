"""Networks that the evaluator and the attacker fit by themselves on images that no client holds: the judge, and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.data import Images
from gidef.defence.perturbation import decoder_loss
from gidef.rng import generator


def fit_judge(judge: nn.Module, train: Images, *, epochs: int, seed: int, batch_size: int = 64, lr: float = 2e-3) -> Iterator[int]:
    """Fit a classifier in place with Adam and a one-cycle rate; yields the steps done. `train`: images without the victims."""
    device = next(judge.parameters()).device
    order = generator(seed, "judge")
    total = epochs * -(-len(train) // batch_size)
    optimiser = torch.optim.Adam(judge.parameters(), lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=max(total, 2))
    judge.train()
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=order).split(batch_size):
            rows = rows.to(train.images.device)
            images = train.images[rows].to(device, torch.float32).div_(255)
            if torch.rand((), generator=order) < 0.5:
                images = images.flip(-1)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(judge(images), train.labels[rows].to(device)).backward()
            optimiser.step()
            schedule.step()
            step += 1
            if step % 20 == 0:
                yield step
    judge.eval()
    yield total


def fit_decoder(
    decoder: nn.Module, latents: Callable[[Tensor, torch.Generator, int, Tensor], Any], public: Images,
    *, steps: int, seed: int, batch_size: int = 64, lr: float = 1e-3,
) -> Iterator[int]:  # fmt: skip
    """Fit a decoder in place to reconstruct public images from their latents (L_d of the minimax); yields the steps done.

    latents: latents(images float (B, C, H, W), generator, step, labels int64 (B,)) → what the attacker is given of them, without gradients.
    Adam with the rate falling to zero along a cosine.
    """
    device = next(decoder.parameters()).device
    order, noise = generator(seed, "decoder-order"), generator(seed, "decoder-noise", device=device)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    decoder.train()
    for step in range(steps):
        rows = torch.randint(len(public), (min(batch_size, len(public)),), generator=order).to(public.images.device)
        images = public.images[rows].to(device, torch.float32).div_(255)
        with torch.no_grad():
            given = latents(images, noise, step, public.labels[rows].to(device))
        optimiser.zero_grad(set_to_none=True)
        decoder_loss(images, decoder(given)).backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 20 == 0:
            yield step + 1
    decoder.eval()
    yield steps
