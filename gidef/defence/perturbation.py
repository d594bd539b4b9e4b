"""The learned perturbation of the latent, played as a minimax game against a decoder.

    z = E(x),  m = LN(z + μ(z)),  z̃ = m + max(κ σ, σ_min) ⊙ ε,  logits = C(z̃),  x̂ = D(z̃)
    decoder:  min_ψ  L_d = MSE(x, x̂) + ½ (1 − SSIM(x, x̂))
    client:   min_θηφ  L_c = CE(C(z̃), y) + λ R(x, x̂) + β KL(N(m, σ²) ‖ N(0, 1))

The steps come in turn, the decoder's first (MinimaxPlayer), or at once, from one pass (SimultaneousPlayer). A decoder may be told each image's own
gradient beside z̃ (SeeingPlayer).

Source: Jiang, Firouzi, Chakrabarty, arXiv 2503.16542. Deviates: the paper's layers, noise law and correlation are not
public, so this reconstructs the published idea; the choices are the defaults here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad

from gidef.defence.base import DECODER, Defence, Simulate
from gidef.defence.capacity import capacity_bits
from gidef.defence.compiled import Compiled
from gidef.defence.seeing import SeeingDecoder, told_by_gradients
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
    decoder_loss: Literal["mse_ssim", "mse"] = "mse_ssim"
    schedule: Literal["alternating", "simultaneous"] = "alternating"
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


def decoder_loss(images: Tensor, reconstruction: Tensor, measure: Literal["mse_ssim", "mse"] = "mse_ssim") -> Tensor:
    """L_d = MSE + ½ (1 − SSIM), or the MSE alone; scalar; both (B, C, H, W) in [0, 1]."""
    error = F.mse_loss(reconstruction, images)
    return error if measure == "mse" else error + 0.5 * (1 - ssim(images, reconstruction).mean())


def client_loss(
    outputs: Outputs,
    images: Tensor,
    labels: Tensor,
    *,
    settings: MinimaxSettings,
    weight: float,
    reconstruct: Callable[[Tensor], Tensor],  # of z̃
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


def hold_still(model: SplitModel, settings: MinimaxSettings) -> None:
    """Training leaves out `still_parts` of a player's model."""
    for name in still_parts(model, settings):
        model.get_parameter(name).requires_grad_(False)


def still_parts(model: SplitModel, settings: MinimaxSettings) -> list[str]:
    """Names of what is not trained: a frozen front, a level that stands still."""
    still = [*(["encoder"] if settings.front_frozen else []), *(["perturbation"] if settings.level_still else [])]
    return [name for part in still for name in model.parts[part]]


class MinimaxPlayer:
    """The client's side of the game: k decoder steps on the detached z̃, then its own loss with the decoder frozen.

    One forward pass of encoder and predictor serves both: the decoder's steps do not change what the client's loss
    reads from the model. Kept between rounds: the decoder's weights; its Adam state starts afresh in every round, like the client's.
    """

    _fused: bool = False
    """Whether the decoder's Adam is one kernel."""

    def __init__(self, model: SplitModel, decoder: nn.Module | None, settings: MinimaxSettings, frozen_noise: Callable[..., Tensor | None]) -> None:
        self.model, self.kept, self._settings, self._frozen_noise = model, decoder, settings, frozen_noise
        self._forward: Callable[..., Outputs] = model.run
        hold_still(model, settings)

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        device = next(self.model.parameters()).device
        self._weight = self._settings.weight(progress)
        self._first = first
        self._noise = generator(seed, "noise", round, client.id, device=device)
        table = self._frozen_noise(client, seed=seed)
        self._table = table.to(device) if table is not None else None
        if self.kept is not None:
            self._decoder_step = torch.optim.Adam(self.kept.parameters(), lr=self._settings.decoder_lr, **{"fused" if self._fused else "foreach": True})

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        noise = self._draw(images, rows)
        outputs = self._forward(images, noise)
        if self.kept is None:
            return self._client_loss(outputs, images, labels, self._weight, self.kept)
        beside = self._beside(images, labels, noise)
        self._train_decoder(images, _given(outputs.perturbed.detach(), beside.detach() if beside is not None else None), self._steps(epoch))
        self.kept.requires_grad_(False)  # ψ frozen, while gradients still flow through it to what it is given
        loss = self._client_loss(outputs, images, labels, self._weight, lambda perturbed: self.kept(_given(perturbed, beside)))
        self.kept.requires_grad_(True)
        return loss

    def _beside(self, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor | None:
        """What the decoder is told beside z̃."""
        return None

    def _client_loss(self, outputs: Outputs, images: Tensor, labels: Tensor, weight: float, reconstruct: Callable[[Tensor], Tensor]) -> Tensor:
        kl = self.model.perturbation.kl
        return client_loss(outputs, images, labels, settings=self._settings, weight=weight, reconstruct=reconstruct, kl=kl)

    def fuse(self) -> None:
        """The decoder's optimiser as one kernel from the next round on; other last bits."""
        self._fused = True

    def compile(self, **options: Any) -> None:
        """Encoder and predictor as a program, see `Compiled`; the decoder's steps run as they are."""
        self._forward = Compiled(self.model.run, modules=[self.model], **options)

    def _draw(self, images: Tensor, rows: Tensor) -> Tensor:
        if self._table is not None:
            return self._table[rows.to(self._table.device)]
        return self.model.perturbation.draw(len(images), generator=self._noise, device=images.device, dtype=images.dtype)

    def _steps(self, epoch: int) -> int:
        """k, the decoder's steps beside this batch."""
        return self._settings.decoder_steps_first if self._first and epoch == 0 else self._settings.decoder_steps

    def _train_decoder(self, images: Tensor, given: Any, steps: int) -> None:
        for _ in range(steps):
            self._decoder_step.zero_grad(set_to_none=True)
            decoder_loss(images, self.kept(given), self._settings.decoder_loss).backward()
            self._decoder_step.step()
        self._decoder_step.zero_grad(set_to_none=True)

    def stacked(self) -> StackedMinimax | None:
        """This game as functions (see clients.vectorised.Stacked); None where a term couples the images of a batch, for a decoder's loss without
        SSIM, and for a player that plays another."""
        same = type(self).loss is MinimaxPlayer.loss and type(self)._beside is MinimaxPlayer._beside and type(self).begin is MinimaxPlayer.begin and self._settings.decoder_loss == "mse_ssim"
        if not same or self._settings.dependence_weight > 0 and self._settings.dependence in COUPLES_BATCH:
            return None
        return StackedMinimax(self.model, self.kept, self._settings, self._frozen_noise)


def _given(perturbed: Tensor, beside: Tensor | None) -> Any:
    """What a decoder is called with."""
    return perturbed if beside is None else (perturbed, beside)


class SeeingPlayer(MinimaxPlayer):
    """The same game against a `SeeingDecoder`, which is also told each image's gradient at the weights before the step."""

    def __init__(self, model: SplitModel, decoder: SeeingDecoder, settings: MinimaxSettings, frozen_noise: Callable[..., Tensor | None]) -> None:
        super().__init__(model, decoder, settings, frozen_noise)
        self._shown = copy.deepcopy(model)  # whose layers nobody exchanges for faster ones that know no second derivative

    def _beside(self, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        weights = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.set_grad_enabled(self._weight > 0):
            return told_by_gradients(self._shown, weights, images, labels, noise, length=self.kept.sketch)


class SimultaneousPlayer(MinimaxPlayer):
    """The same game, but the client's step and the first of the decoder's k are taken at once, both gradients at the same (θ, η, φ, ψ).

    Jacobi's order in the place of Gauss and Seidel's, so another algorithm: the client plays against the decoder that the batch before has left,
    not against one that has already seen this batch. One pass of encoder, predictor and decoder serves both players, and gradients go to whose
    they are: one backward pass for each over the shared graph, or a single one where both play for the same scalar, L_d = MSE and R = −MSE,
    with the gradient of z̃ reversed on its way out of the decoder (Ganin & Lempitsky 2015). The decoder's other k − 1 steps follow, on z̃ detached.
    """

    _fused = True
    _program: Compiled | None = None

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        """L_c, detached: its graph is for `backward`."""
        self._more = self._steps(epoch) - 1
        if self._more < 0:
            loss = super().loss(images, labels, rows=rows, epoch=epoch)
            self._pending = [(loss, None)]
            return loss.detach()
        self._images, self._autocast = images, functools.partial(
            torch.autocast, images.device.type, torch.bfloat16, enabled=torch.is_autocast_enabled(images.device.type), cache_enabled=False
        )
        if self._program is not None:
            weighted = self._weight > 0 and (self._settings.dependence != "cka" or len(images) >= MIN_CKA)
            weight = torch.full((), self._weight, device=images.device, dtype=images.dtype) if weighted else None
            both, loss, self._perturbed = self._program(images, labels, self._draw(images, rows), weight)
            self._pending = [(both, None)]
            return loss
        outputs = self._forward(images, self._draw(images, rows))
        self._perturbed = outputs.perturbed.detach()
        reversible = self._settings.decoder_loss == "mse" and self._settings.dependence == "neg_mse" and self._weight > 0
        loss, self._pending = (self._reversed if reversible else self._shared)(outputs, images, labels)
        return loss.detach()

    def backward(self) -> None:
        """Every player's gradient into its own parameters' `grad`, then the decoder's steps; in the place of the loss's backward pass."""
        for number, (loss, parameters) in enumerate(self._pending, start=1):
            loss.backward(inputs=parameters, retain_graph=number < len(self._pending))
        self._pending = None
        if self._more >= 0:
            self._decoder_step.step()
            with self._autocast():
                self._train_decoder(self._images, self._perturbed, self._more)
            self._images = self._perturbed = None

    def compile(self, **options: Any) -> None:
        """Both players' losses as one program, in the place of both forms that follow."""
        self._program = Compiled(self._both, modules=[self.model, self.kept], **options)

    def _both(self, images: Tensor, labels: Tensor, noise: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A scalar whose backward pass leaves both players' gradients, as neither loss reaches the other's weights; L_c; z̃.

        The decoder is written down twice, and the compiler finds that both are one pass.
        """
        outputs, settings = self.model.run(images, noise), self._settings
        loss = self._client_loss(outputs, images, labels, 0.0, self.kept)
        if weight is not None:
            frozen = {name: p.detach() for name, p in self.kept.named_parameters()}
            reconstruction = functional_call(self.kept, frozen, (outputs.perturbed,))
            loss = loss + weight * dependence(
                settings.dependence, images, reconstruction, ssim_threshold=settings.ssim_threshold, mse_cap=settings.mse_cap
            )
        perturbed = outputs.perturbed.detach()
        return loss + decoder_loss(images, self.kept(perturbed), settings.decoder_loss), loss.detach(), perturbed

    def _shared(self, outputs: Outputs, images: Tensor, labels: Tensor) -> tuple[Tensor, list[tuple[Tensor, list[Tensor]]]]:
        """L_c; L_d and L_c, each with the parameters that it is differentiated by."""
        shown: list[Tensor] = []

        def reconstruct(perturbed: Tensor) -> Tensor:
            shown.append(self.kept(perturbed))
            return shown[0]

        loss = self._client_loss(outputs, images, labels, self._weight, reconstruct)
        opponent = decoder_loss(images, shown[0] if shown else self.kept(outputs.perturbed.detach()), self._settings.decoder_loss)
        mine = [p for p in self.model.parameters() if p.requires_grad]
        return loss, [(opponent, list(self.kept.parameters())), (loss, mine)]

    def _reversed(self, outputs: Outputs, images: Tensor, labels: Tensor) -> tuple[Tensor, list[tuple[Tensor, None]]]:
        """L_c; one scalar whose backward pass leaves both players' gradients."""
        alone, cap = self._client_loss(outputs, images, labels, 0.0, self.kept), self._settings.mse_cap
        latent = outputs.perturbed.view_as(outputs.perturbed)  # a node of its own: what comes back through it comes from the decoder alone
        errors = (self.kept(latent) - images).square().mean((1, 2, 3))
        # image by image, as R is flat above its cap; the decoder itself is upstream of the hook
        factors = ((errors.detach() <= cap).to(latent.dtype) * -self._weight).view(-1, *[1] * (latent.dim() - 1))
        latent.register_hook(lambda gradient: gradient * factors)
        return alone - self._weight * errors.clamp(max=cap).mean(), [(alone + errors.mean(), None)]


class LearnedDefence(Defence):
    """The full method. `decoder` None (λ = 0) learns the level without an opponent; with a fixed level it is isotropic noise, with a
    bottleneck in the perturbation's place PRECODE or CVB."""

    def __init__(self, model: SplitModel, decoder: nn.Module | None, settings: MinimaxSettings) -> None:
        super().__init__(model, decoder)
        if model.perturbation is None:
            raise ValueError("LearnedDefence needs a model with a perturbation layer")
        if decoder is None and settings.dependence_weight > 0:
            raise ValueError("dependence_weight > 0 needs a decoder")
        if isinstance(decoder, SeeingDecoder) and settings.schedule != "alternating":
            raise ValueError("a decoder that sees the gradient plays in turn: schedule=alternating")
        self.settings = settings

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.model.perturbation.noise_shape)

    def player(self) -> MinimaxPlayer:
        at_once = self.decoder is not None and self.settings.schedule == "simultaneous"
        made = SeeingPlayer if isinstance(self.decoder, SeeingDecoder) else SimultaneousPlayer if at_once else MinimaxPlayer
        return made(copy.deepcopy(self.model), copy.deepcopy(self.decoder), self.settings, self.frozen_noise)

    def draw_noise(self, count: int, *, generator: Generator) -> Tensor:
        return self.model.perturbation.draw(count, generator=generator, device=generator.device, dtype=torch.float32)

    def frozen_noise(self, client: Client, *, seed: int) -> Tensor | None:
        if not self.settings.frozen:
            return None
        return self.draw_noise(client.num_examples, generator=generator(seed, "frozen-noise", client.id))

    def given(self, model: nn.Module, weights: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None, perturbed: Tensor) -> Any:
        """z̃, and for a decoder that sees the gradient what it is told."""
        sees = isinstance(self.decoder, SeeingDecoder)
        return _given(perturbed, told_by_gradients(model, weights, images, labels, noise, length=self.decoder.sketch) if sees else None)

    def cross_entropy_alone(self, progress: float) -> bool:
        settings = self.settings
        return type(self).simulator is LearnedDefence.simulator and not (settings.weight(progress) or settings.kl_weight or settings.bits_weight)

    def couples_images(self, terms: Literal["client", "utility"], progress: float) -> bool:
        if type(self).simulator is not LearnedDefence.simulator or type(self).stepped is not Defence.stepped:
            return super().couples_images(terms, progress)
        return terms == "client" and self.settings.weight(progress) > 0 and self.settings.dependence in COUPLES_BATCH

    def needs_decoder(self, progress: float) -> bool:
        return self.decoder is not None and (type(self).simulator is not LearnedDefence.simulator or self.settings.weight(progress) > 0)

    def simulator(self, *, terms: Literal["client", "utility"] = "client", progress: float = 0.0) -> Callable[[], Simulate]:
        weight = self.settings.weight(progress) if terms == "client" else 0.0
        settings = self.settings if terms == "client" else MinimaxSettings(dependence_weight=0.0)
        measure = self.settings.decoder_loss

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

            def shown(own: Tensors, rest: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None, perturbed: Tensor) -> Any:
                return self.given(model, {**dict(model.named_parameters()), **rest, **own}, images, labels, noise, perturbed)

            def loss(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
                own, rest, fixed_decoder = parted(params, known)
                return client_loss(
                    forward(own, rest, images, noise), images, labels, settings=settings, weight=weight, kl=model.perturbation.kl,
                    reconstruct=lambda perturbed: functional_call(decoder, fixed_decoder, (shown(own, rest, images, labels, noise, perturbed),)),
                )  # fmt: skip

            def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
                own, rest, fixed_decoder = parted(params, known)
                beside = {DECODER + name: tensor for name, tensor in fixed_decoder.items()}
                gradients = grad(loss)(own, {**rest, **beside}, images, labels, noise)
                if len(own) < len(params):  # policy `all`: the decoder's gradient is released as well
                    given = shown(own, rest, images, labels, noise, forward(own, rest, images, noise).perturbed)
                    shared_decoder = {name: params[DECODER + name] for name in fixed_decoder}
                    opponent = grad(lambda psi: decoder_loss(images, functional_call(decoder, psi, (given,)), measure))(shared_decoder)
                    gradients |= {DECODER + name: g for name, g in opponent.items()}
                return {name: gradients[name] for name in params}

            def of_the_model(params: Tensors, *rest: Any) -> Tensor:
                if any(name.startswith(DECODER) for name in params):
                    raise InputError("share policy all releases gradients of two losses: a first-order form has one; use form=double_backward.")
                return loss(params, *rest)

            simulate.loss = of_the_model
            return simulate

        return make
