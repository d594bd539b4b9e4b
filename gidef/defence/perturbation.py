"""The learned perturbation of the latent, played as a minimax game against a decoder.

    z = E(x),  m = LN(z + μ(z)),  z̃ = m + max(κ σ, σ_min) ⊙ ε,  logits = C(z̃),  x̂ = D(z̃)
    decoder:  min_ψ  L_d = MSE(x, x̂) + ½ (1 − SSIM(x, x̂))
    client:   min_θηφ  L_c = CE(C(z̃), y) + λ R(x, x̂) + β KL(N(m, σ²) ‖ N(0, 1))

Source: Jiang, Firouzi, Chakrabarty, arXiv 2503.16542. Deviates: the paper's layers, noise law and correlation are not
public, so this reconstructs the published idea; the choices are the defaults here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad

from gidef.defence.base import DECODER, Defence, Simulate
from gidef.defence.capacity import capacity_bits
from gidef.defence.stacked import StackedMinimax
from gidef.errors import InputError
from gidef.models import Outputs, SplitModel
from gidef.rng import generator
from gidef.similarity import COUPLES_BATCH, dependence, ssim
from gidef.types import Client, Tensors

MIN_CKA = 4
"""Below this batch size the unbiased CKA does not exist, and a batch (the rest of an epoch, a single victim) goes without R."""


@dataclass(frozen=True, slots=True)
class MinimaxSettings:
    """See `config.LearnedPerturbation` and `config.CapacityNoise` for meanings and ranges."""

    dependence: str = "pearson2"
    dependence_weight: float = 1.0
    ramp: float = 0.1
    frozen: bool = False
    kl_weight: float = 0.0
    decoder_steps: int = 1
    decoder_steps_first: int = 5
    decoder_lr: float = 1e-3
    ssim_threshold: float = 0.1
    mse_cap: float = 0.1
    bits_weight: float = 0.0
    front_frozen: bool = False
    level_frozen: bool = False

    @property
    def level_still(self) -> bool:
        """Whether the level keeps its start: under frozen noise before a frozen front too, as releases of m + σ ε at two levels would give m away."""
        return self.level_frozen or (self.front_frozen and self.frozen)

    def weight(self, progress: float) -> float:
        """λ when a share `progress` of the rounds is over: rises linearly from 0 over the first `ramp` of them."""
        return self.dependence_weight * (1.0 if self.ramp <= 0 else min(1.0, progress / self.ramp))


def decoder_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """L_d = MSE + ½ (1 − SSIM), scalar; both (B, C, H, W) in [0, 1]."""
    return F.mse_loss(reconstruction, images) + 0.5 * (1 - ssim(images, reconstruction).mean())


def client_loss(
    outputs: Outputs,
    images: Tensor,
    labels: Tensor,
    *,
    settings: MinimaxSettings,
    weight: float,
    reconstruct: Callable[[Tensor], Tensor],
    kl: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """L_c, scalar in nats. labels: int64 (B,) or probabilities (B, K). weight: λ now; at 0 the decoder is not called."""
    loss = F.cross_entropy(outputs.logits, labels)
    if settings.dependence == "cka" and len(images) < MIN_CKA:
        weight = 0.0
    if weight > 0:
        reconstruction = reconstruct(outputs.perturbed)
        loss = loss + weight * dependence(
            settings.dependence, images, reconstruction, ssim_threshold=settings.ssim_threshold, mse_cap=settings.mse_cap
        )
    if settings.kl_weight > 0:
        loss = loss + settings.kl_weight * kl(outputs.latent, outputs.std)
    if settings.bits_weight > 0:
        loss = loss + settings.bits_weight * capacity_bits(outputs.std.expand(outputs.latent.shape[1:]))
    return loss


class MinimaxPlayer:
    """The client's side of the game: k decoder steps on the detached z̃, then its own loss with the decoder frozen.

    One forward pass of encoder and predictor serves both: the decoder's steps do not change what the client's loss
    reads from the model. Kept between rounds: the decoder's weights; its Adam state starts afresh in every round, like the client's.
    """

    def __init__(self, model: SplitModel, decoder: nn.Module | None, settings: MinimaxSettings, frozen_noise: Callable[..., Tensor | None]) -> None:
        self.model, self.kept, self._settings, self._frozen_noise = model, decoder, settings, frozen_noise
        still = [*(["encoder"] if settings.front_frozen else []), *(["perturbation"] if settings.level_still else [])]
        for name in (name for part in still for name in model.parts[part]):
            model.get_parameter(name).requires_grad_(False)

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        device = next(self.model.parameters()).device
        self._weight = self._settings.weight(progress)
        self._first = first
        self._noise = generator(seed, "noise", round, client.id, device=device)
        table = self._frozen_noise(client, seed=seed)
        self._table = table.to(device) if table is not None else None
        if self.kept is not None:
            self._decoder_step = torch.optim.Adam(self.kept.parameters(), lr=self._settings.decoder_lr, foreach=True)

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        if self._table is not None:
            noise = self._table[rows.to(self._table.device)]
        else:
            noise = self.model.perturbation.draw(len(images), generator=self._noise, device=images.device, dtype=images.dtype)
        outputs = self.model.run(images, noise)
        if self.kept is not None:
            steps = self._settings.decoder_steps_first if self._first and epoch == 0 else self._settings.decoder_steps
            perturbed = outputs.perturbed.detach()
            for _ in range(steps):
                self._decoder_step.zero_grad(set_to_none=True)
                decoder_loss(images, self.kept(perturbed)).backward()
                self._decoder_step.step()
            self._decoder_step.zero_grad(set_to_none=True)
            self.kept.requires_grad_(False)  # ψ frozen, while gradients still flow through it to z̃
        loss = client_loss(
            outputs, images, labels, settings=self._settings, weight=self._weight, reconstruct=self.kept, kl=self.model.perturbation.kl
        )
        if self.kept is not None:
            self.kept.requires_grad_(True)
        return loss

    def stacked(self) -> StackedMinimax | None:
        """This game as functions (see clients.vectorised.Stacked); None where a term couples the images of a batch, and for a player that plays another."""
        same = type(self).loss is MinimaxPlayer.loss and type(self).begin is MinimaxPlayer.begin
        if not same or self._settings.dependence_weight > 0 and self._settings.dependence in COUPLES_BATCH:
            return None
        return StackedMinimax(self.model, self.kept, self._settings, self._frozen_noise)


class LearnedDefence(Defence):
    """The full method. `decoder` None (λ = 0) learns the level without an opponent; with a fixed level it is isotropic noise, with a
    bottleneck in the perturbation's place PRECODE or CVB."""

    def __init__(self, model: SplitModel, decoder: nn.Module | None, settings: MinimaxSettings) -> None:
        super().__init__(model, decoder)
        if model.perturbation is None:
            raise ValueError("LearnedDefence needs a model with a perturbation layer")
        if decoder is None and settings.dependence_weight > 0:
            raise ValueError("dependence_weight > 0 needs a decoder")
        self.settings = settings

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.model.perturbation.noise_shape)

    def player(self) -> MinimaxPlayer:
        return MinimaxPlayer(copy.deepcopy(self.model), copy.deepcopy(self.decoder), self.settings, self.frozen_noise)

    def draw_noise(self, count: int, *, generator: Generator) -> Tensor:
        return self.model.perturbation.draw(count, generator=generator, device=generator.device, dtype=torch.float32)

    def frozen_noise(self, client: Client, *, seed: int) -> Tensor | None:
        if not self.settings.frozen:
            return None
        return self.draw_noise(client.num_examples, generator=generator(seed, "frozen-noise", client.id))

    def simulator(self, *, terms: Literal["client", "utility"] = "client", progress: float = 0.0) -> Callable[[], Simulate]:
        weight = self.settings.weight(progress) if terms == "client" else 0.0
        settings = self.settings if terms == "client" else MinimaxSettings(dependence_weight=0.0)

        def make() -> Simulate:
            model = copy.deepcopy(self.model).requires_grad_(False)
            decoder = copy.deepcopy(self.decoder).requires_grad_(False) if self.decoder is not None else None

            def parted(params: Tensors, known: Tensors) -> tuple[Tensors, Tensors, Tensors]:
                """The model's shared tensors, its private ones, and the decoder's."""
                decoders = {name.removeprefix(DECODER): t for name, t in {**known, **params}.items() if name.startswith(DECODER)}
                own, rest = ({name: t for name, t in tensors.items() if not name.startswith(DECODER)} for tensors in (params, known))
                return own, rest, decoders

            def forward(shared: Tensors, rest: Tensors, images: Tensor, noise: Tensor | None) -> Outputs:
                return functional_call(model, {**rest, **shared}, (images, noise), {"full": True})

            def loss(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
                own, rest, fixed_decoder = parted(params, known)
                return client_loss(
                    forward(own, rest, images, noise), images, labels, settings=settings, weight=weight, kl=model.perturbation.kl,
                    reconstruct=lambda perturbed: functional_call(decoder, fixed_decoder, (perturbed,)),
                )  # fmt: skip

            def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
                own, rest, fixed_decoder = parted(params, known)
                beside = {DECODER + name: tensor for name, tensor in fixed_decoder.items()}
                gradients = grad(loss)(own, {**rest, **beside}, images, labels, noise)
                if len(own) < len(params):  # policy `all`: the decoder's gradient is released as well
                    perturbed = forward(own, rest, images, noise).perturbed
                    shared_decoder = {name: params[DECODER + name] for name in fixed_decoder}
                    opponent = grad(lambda psi: decoder_loss(images, functional_call(decoder, psi, (perturbed,))))(shared_decoder)
                    gradients |= {DECODER + name: g for name, g in opponent.items()}
                return {name: gradients[name] for name in params}

            def of_the_model(params: Tensors, *rest: Any) -> Tensor:
                if any(name.startswith(DECODER) for name in params):
                    raise InputError("share policy all releases gradients of two losses: a first-order form has one; use form=double_backward.")
                return loss(params, *rest)

            simulate.loss = of_the_model
            return simulate

        return make
