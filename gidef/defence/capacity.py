"""How many bits a noisy latent can carry, and what that certifies.

The latent norm fixes the power, Σ mᵢ² = d. For z̃ = m + σ ⊙ ε with Gaussian ε and a σ that does not depend on the image,

    I(x; z̃) ≤ ½ Σ log₂(1 + Pᵢ / σᵢ²),  Pᵢ = E[mᵢ²]     measured power: needs the population's moments
            ≤ C(σ) = max over P ≥ 0, Σ Pᵢ = d              capacity: whatever the images are, by water-filling

Under share policy `head` with a private front (or a public and frozen one), all that a server sees of an image is a function of z̃, the label y
and what it knows already, so no attack whatever learns more bits of it than that per release, beyond its label (data processing). The label is told
exactly, by the sign of the head's bias gradient if by nothing else, and is granted: every bound here is of who knows it, I(x; z̃ | y) ≤ C(σ).

Source: Shannon 1949; Cover and Thomas, Elements of Information Theory, 2nd edition, sections 9.4 (parallel Gaussian channels) and 2.10 (Fano).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gidef.errors import InputError


def water_filling(variance: Tensor, power: float) -> Tensor:
    """Pᵢ = max(ν − σᵢ², 0) with Σ Pᵢ = power: how a source spends its power to get the most through.

    Args:    variance: σ² (d,), floating, above 0.  power: above 0.
    Returns: (d,), without a gradient; NaN for a variance that is NaN, as in a training that diverged.
    """
    with torch.no_grad():
        rising = variance.sort().values
        count = torch.arange(1, len(rising) + 1, device=variance.device, dtype=variance.dtype)
        levels = (power + rising.cumsum(0)) / count  # ν if the k least noisy channels are in use
        used = ((levels > rising).sum() - 1).clamp_min(0)
        return (levels.gather(0, used[None]) - variance).clamp_min(0)


def capacity_bits(std: Tensor, power: float | None = None) -> Tensor:
    """C(σ) in bits, a scalar; differentiable in std: at the best P its change costs nothing (envelope theorem).

    Args:    std: σ of any shape, above 0, one value per entry of the latent.  power: Σ Pᵢ; None is the number of entries, the latent norm's.
    """
    variance = std.flatten().square()
    best = water_filling(variance.detach(), float(variance.numel() if power is None else power))
    return 0.5 * torch.log2(1 + best / variance).sum()


def measured_bits(latents: Tensor, std: Tensor) -> Tensor:
    """½ Σ log₂(1 + E[mᵢ²] / σᵢ²), a scalar, from latents (N, *shape) of a population and σ broadcastable to one of them."""
    return 0.5 * torch.log2(1 + latents.square().mean(0) / std.square()).sum()


def fano_bound(bits: float, candidates: Sequence[int]) -> float:
    """Largest probability with which anybody who knows an image's class names it among N = Σ N_y equally likely ones.

        Σ_y N_y / N · min(1, (bits + 1) / log₂ N_y),   1 for a class of one image

    Args:   bits: of an image beyond its label.  candidates: N_y, the images of each class; classes without any are left out.
    Raises: InputError for no image at all, or a negative count.
    """
    total = sum(candidates)
    if total < 1 or min(candidates) < 0:
        raise InputError(f"candidates={list(candidates)}: expected numbers of images of each class, one image at least.")
    return sum(count / total * (1.0 if count == 1 else min(1.0, (bits + 1) / math.log2(count))) for count in candidates if count)


@dataclass(frozen=True, slots=True)
class Certificate:
    """bits: of one image in one release, beyond its label.  releases: of the same image over the whole training.  lifetime_bits: of all of them.
    fano: bound on naming an image among `candidates`, the images of each class, after the whole training."""

    bits: float
    releases: int
    lifetime_bits: float
    candidates: tuple[int, ...]
    fano: float


def certify(
    stds: list[Tensor], *, level: str, law: str, policy: str, frozen_noise: bool, front_frozen: bool, draws: int | None, candidates: Sequence[int]
) -> Certificate:
    """The certificate of a training.

    Args:    stds: σ per entry of the latent, one of every client (or state) whose images are released: the least noisy one counts.
             level, law: of the perturbation.  policy: of sharing.  frozen_noise: one draw per image for ever.  front_frozen: the encoder
             and, under frozen noise, the level stood still (two releases of m + σ ε at two levels would give m away).  draws: noisy releases of one image with fresh noise (epochs × rounds in
             which its client took part, at most); None if they were not counted.  candidates: N_y of Fano's bound.
    Raises:  InputError, with the assumption that fails: σ depends on the image, the noise is not Gaussian or nought somewhere, the encoder is shared, the front
             trains under frozen noise, or releases were not counted.
    """
    if level not in ("global", "fixed"):
        raise InputError(f'level={level!r}: sigma depends on the image, so its own size tells of it, and no capacity is known. Use level="global".')
    if law != "gaussian":
        raise InputError(f"law={law!r}: the capacity is the Gaussian channel's. Use gaussian noise.")
    if policy != "head":
        raise InputError(
            f"share policy {policy!r} releases the encoder's gradients, which are no functions of the noisy latent: there is no such bound. Use head."
        )
    if frozen_noise and not front_frozen:
        raise InputError("noise frozen per image under a front that trains: releases differ by the latent alone, which cancels the noise. Freeze the front.")
    if not frozen_noise and draws is None:
        raise InputError("fresh noise adds up over the releases of an image, and they were not counted: give draws.")
    if any((std <= 0).any() for std in stds):
        raise InputError("an entry of the latent has no noise (sigma is 0), so that its capacity is infinite. Raise the level.")
    bits = max(float(capacity_bits(std.double())) for std in stds)
    releases = 1 if frozen_noise else draws
    return Certificate(bits, releases, bits * releases, tuple(candidates), fano_bound(bits * releases, candidates))


def lifetime_releases(*, policy: str, frozen_noise: bool, front_frozen: bool, level_still: bool, encoded: bool, draws: int | None) -> int:
    """Noisy releases of one image over a whole training: its bits, times this, bound what anybody learns of it from all of them.

    With fresh noise every release adds its own: I(x; z̃₁, …, z̃_T) ≤ Σ_t I(x; z̃_t), as given x they are independent. That needs a front and a level
    that do not learn from the images: else the releases of other images tell of x as well, and none of these is counted.

    Args:    policy: of sharing.  frozen_noise: one draw per image for ever.  front_frozen: the encoder stood still.  level_still: the level did.
             encoded: images are mixed or changed before they are trained on.  draws: rounds in which the client takes part × local epochs.
    Raises:  InputError, with the assumption that fails.
    """
    if policy != "head":
        raise InputError(f"share policy {policy!r} releases the encoder's gradients, which are no functions of the noisy latent: there is no such bound. Use head.")
    if encoded:
        raise InputError("images are encoded before they are trained on, so that one stands in the releases of others, which are not counted. Train on them as they are.")
    if not front_frozen:
        raise InputError('the front trains on the images, so that releases of other images tell of this one, and they are not counted. Set front="frozen".')
    if not level_still:
        raise InputError('the level learns from the images, so that releases of other images tell of this one, and they are not counted. Set level="fixed".')
    if frozen_noise:
        return 1
    if draws is None:
        raise InputError("fresh noise adds up over the releases of an image, and they were not counted: give draws.")
    return draws
