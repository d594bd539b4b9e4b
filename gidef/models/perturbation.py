"""The learned perturbation of the latent: what sets its level, and the norm that gives that level a meaning."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gidef.errors import InputError
from gidef.rng import unit_noise


def latent_norm(latent: Tensor) -> Tensor:
    """LayerNorm without parameters over everything but the batch: mean 0 and root mean square 1 per sample.

    Args:    latent: floating, (B, ...); maps are normalised over C×H×W, tokens over all tokens and channels.
    Returns: as `latent`. The variance is floored softly by ε = 1e-8, so a latent of standard deviation s comes out
             with RMS 1/√(1 + ε/s²): 0.995 at s = 1e-3; a constant latent gives zeros with finite gradients.
    """
    return F.layer_norm(latent, latent.shape[1:], eps=1e-8)


class Perturbation(nn.Module):
    """Where the noise of a latent is centred, and how strong it is.

        m = LN(z + μ(z)),   σ_eff = max(κ · softplus(s), σ_min),   z̃ = m + σ_eff ⊙ ε

    Args:
        latent_shape: of one sample.  channel_dim: which dim of a batch holds the channels: 1 for maps (B, C, H, W),
                      −1 for tokens (B, N, C), maps (B, H, W, C) and vectors.
        mode:         "global": s is a parameter per channel.  "conditional": s is a 1×1 convolution of z.  "fixed": softplus(s) is the
                      number std_init and no parameter, so that nothing is learned of the level and nothing of it shared.
        law:          of ε, "gaussian" or "laplace", both of unit variance.
        mean:         learn μ, a 1×1 convolution of z; otherwise μ = 0.
        std_init:     softplus(s) at the start, > 0, in mode "fixed" ≥ 0; μ starts at 0.
        std_floor:    σ_min ≥ 0.  strength: κ ≥ 0.

    `strength` and `std_floor` are plain attributes, not tensors: a server's weights never reach them, so the floor
    holds in the client's own forward pass whatever s is. Only an evaluator sets them.

    Raises:  InputError for arguments out of range.
    """

    noise_only: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes of the parameters that the net would not have without its noise: all."""

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        channel_dim: int,
        *,
        mode: Literal["global", "conditional", "fixed"] = "global",
        law: Literal["gaussian", "laplace"] = "gaussian",
        mean: bool = False,
        std_init: float = 1.0,
        std_floor: float = 0.1,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        if mode not in ("global", "conditional", "fixed"):
            raise InputError(f'mode={mode!r} of the perturbation is unknown: choose "global", "conditional" or "fixed".')
        if law not in ("gaussian", "laplace"):
            raise InputError(f'law={law!r} of the noise is unknown: choose "gaussian" or "laplace".')
        if not (std_init == 0 and mode == "fixed") and not 0 < std_init < math.inf or not 0 <= std_floor < math.inf or not 0 <= strength < math.inf:
            raise InputError(f"std_init={std_init}, std_floor={std_floor}, strength={strength}: expected > 0, >= 0 and >= 0, all finite.")
        if channel_dim not in (1, -1):
            raise InputError(f"channel_dim={channel_dim}: expected 1 (channels first) or -1 (channels last).")
        self.latent_shape, self.channel_dim = tuple(latent_shape), channel_dim
        self.mode, self.law = mode, law
        self.strength, self.std_floor = float(strength), float(std_floor)
        channels = self.latent_shape[0 if channel_dim == 1 else -1]
        if mode == "fixed":
            self.std = float(std_init)
        else:
            level = std_init + math.log(-math.expm1(-std_init))  # the inverse of softplus, without overflow
            self.level = nn.Parameter(torch.full((channels,), level)) if mode == "global" else _constant_channel_map(channels, level)
        self.shift = _constant_channel_map(channels, 0.0) if mean else None

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(m, σ_eff) for z: m as `latent` (B, *latent_shape), σ_eff ≥ σ_min broadcastable to m ((C, 1, 1) or (C,) in mode "global")."""
        if self.mode == "fixed":
            std = latent.new_full((1,) * len(self.latent_shape), max(self.strength * self.std, self.std_floor))
        else:
            level = self.level if self.mode == "global" else self._per_channel(self.level, latent)
            if self.mode == "global" and self.channel_dim == 1:
                level = level.reshape(-1, *(1,) * (len(self.latent_shape) - 1))
            std = torch.clamp(self.strength * F.softplus(level), min=self.std_floor)
        if self.shift is not None:
            latent = latent + self._per_channel(self.shift, latent)
        return latent_norm(latent), std

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of one image's ε: the latent's."""
        return self.latent_shape

    def restore(self, perturbed: Tensor) -> Tensor:
        """The latent that the predictor goes on with: z̃ itself."""
        return perturbed

    def draw(self, batch: int, *, generator: Generator, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """ε for `batch` images: (batch, *latent_shape), independent entries of mean 0 and variance 1.

        Laplace noise has scale 1/√2, hence the power of the Gaussian. device: the generator's unless given.
        """
        return unit_noise((batch, *self.latent_shape), law=self.law, generator=generator, device=device, dtype=dtype)

    def kl(self, m: Tensor, std: Tensor) -> Tensor:
        """KL(N(m, σ²) ‖ N(0, 1)) = ½ (σ² + m² − 1) − ln σ, the mean over all entries of m; scalar, nats. std > 0.

        Raises:  InputError for Laplace noise, for which this is not the divergence.
        """
        if self.law != "gaussian":
            raise InputError(f"the KL term is Gaussian, but law={self.law!r}: set kl_weight to 0, or law to gaussian.")
        return (0.5 * (std.square() + m.square() - 1) - std.log()).mean()

    def _per_channel(self, layer: nn.Linear, latent: Tensor) -> Tensor:
        """A linear layer over channels at every position: a 1×1 convolution for any layout."""
        return layer(latent.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


def _constant_channel_map(channels: int, value: float) -> nn.Linear:
    """A linear layer that starts as a constant; skipping the random initialisation leaves the global generator alone."""
    layer = nn.utils.skip_init(nn.Linear, channels, channels)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)
    return layer
