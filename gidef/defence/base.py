"""What every defence offers, and the undefended client."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad

from gidef.defence.accounting import Budget
from gidef.defence.compiled import Compiled
from gidef.defence.encode import EncodedPlayer, Encoder, encode_all
from gidef.defence.secure_sum import SecureCohorts
from gidef.defence.share import Transform, apply_all, scale_kept
from gidef.defence.stacked import StackedPlain
from gidef.defence.upload import FLOAT, MASKED, Packed
from gidef.models import SplitModel, moving_statistics
from gidef.types import Client, Own, Tensors

Simulate = Callable[[Tensors, Tensors, Tensor, Tensor, "Tensor | None"], Tensors]
"""simulate(params, known, images, labels, noise) → tensors named as `params`: the gradient that a client would release.

params: the shared tensors.  known: tensors that the simulated client has and does not share (front, decoder).
images: float (B, C, H, W) in [0, 1].  labels: float (B, K), class probabilities.  noise: float (B, *latent_shape), or None.
Pure, differentiable twice, and fit for vmap. An attribute `loss`, of the same arguments, is the scalar whose gradient it is: attacks
without second derivatives differentiate that.
"""

DECODER = "decoder."
"""Prefix of the decoder's tensors wherever they stand beside the model's."""


class Defence:
    """The undefended client, and the interface of the others.

    model:       the network's architecture and its initial weights; never trained itself.
    decoder:     what the client trains and keeps beside it, or None.
    noise_shape: of one image's noise, or None if the training has none.
    transforms:  what happens to an update before it leaves, in order (see defence.share).
    encoders:    what happens to images and labels before they are trained on, in order (see defence.encode).
    secure:      who stays in a round whose updates the server sees the sum of alone, None where it sees each (see defence.secure_sum).
    budget:      the (ε, δ) of the training, None where it is not differentially private.
    """

    transforms: tuple[Transform, ...] = ()
    encoders: tuple[Encoder, ...] = ()
    own_terms: bool = False
    """Whether the client's loss has terms beside cross-entropy although there is no noise."""
    budget: Budget | None = None
    secure: SecureCohorts | None = None

    def __init__(self, model: SplitModel, decoder: nn.Module | None = None) -> None:
        self.model, self.decoder = model, decoder

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        return None

    @property
    def random(self) -> bool:
        """Whether another release of the same images at the same weights differs by more than the noise on the latent: by DP-SGD's noise, or by what the
        changes of updates or of images draw. A `share`, `encode` or `stepped` of one's own counts as drawing."""
        return self._draws_in((*self.transforms, *self.encoders))

    @property
    def spares(self) -> bool:
        """Whether such releases differ by the last change of updates alone, if the noise on the latent is the same, and it spares entries (see defence.share)."""
        return bool(self.transforms) and getattr(self.transforms[-1], "spares", False) and not self._draws_in((*self.transforms[:-1], *self.encoders))

    def _draws_in(self, changes: Sequence[Any]) -> bool:
        own = any(getattr(type(self), name) is not getattr(Defence, name) for name in ("share", "encode", "stepped"))
        return self.budget is not None or own or any(getattr(one, "random", True) for one in changes)

    def initial(self) -> Tensors:
        """Every tensor that a client starts from, the decoder's under the prefix `decoder.`; fresh copies."""
        tensors = self.initial_model()
        if self.decoder is not None:
            tensors |= {DECODER + name: p.detach().clone() for name, p in self.decoder.named_parameters()}
        return tensors

    def initial_model(self) -> Tensors:
        """The model's part of `initial`: its parameters, and the running statistics that training moves."""
        return {name: p.detach().clone() for name, p in {**dict(self.model.named_parameters()), **moving_statistics(self.model)}.items()}

    @property
    def noises_updates(self) -> bool:
        """Whether what leaves has noise on it of which the law tells a variance (see defence.share.noise_share)."""
        return any(hasattr(one, "variances") and getattr(one, "random", True) for one in self.transforms)

    def player(self) -> Plain:
        """A fresh player with copies of its own, for one worker (see clients.local.Player)."""
        return Plain(copy.deepcopy(self.model))

    def encoded_player(self) -> Plain | EncodedPlayer:
        """`player`, on encoded batches where there are encoders."""
        return EncodedPlayer(self.player(), self.encode) if self.encoders else self.player()

    def encode(self, images: Tensor, labels: Tensor, *, client: Client, generator: Generator, model: nn.Module, params: Tensors) -> tuple[Tensor, Tensor]:
        """What the client trains on instead of a batch (see defence.encode). model, params: its network, and all of its weights now."""
        return encode_all(self.encoders, images, labels, client=client, generator=generator, model=model, params=params)

    def draw_noise(self, count: int, *, generator: Generator) -> Tensor | None:
        """Noise as a client draws it for `count` images, or None."""
        return None

    def frozen_noise(self, client: Client, *, seed: int) -> Tensor | None:
        """The client's noise (n, *latent_shape) where every image keeps one draw for ever, else None."""
        return None

    def given(self, model: nn.Module, weights: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None, perturbed: Tensor) -> Any:
        """What the decoder is called with. weights: of the model, by name.  labels: int64 (B,) or probabilities.  perturbed: z̃ of these images."""
        return perturbed

    def share(self, update: Tensors, *, generator: Generator, own: Own | None = None) -> Tensors:
        """What leaves the client of its update, a gradient or a delta of the shared tensors. own: what the client has at hand."""
        return apply_all(self.transforms, update, generator=generator, own=own)

    def keeps_scale(self, released: Tensors | None) -> bool:
        """Whether what left has the scale of the client's gradient or delta (see defence.share.scale_kept). A `share` or `stepped` of one's own counts as
        changing it: DP-SGD's clips every image's gradient by itself."""
        own = any(getattr(type(self), name) is not getattr(Defence, name) for name in ("share", "stepped"))
        return not own and scale_kept(self.transforms, released)

    def upload_bits(self, changed: Mapping[str, int], others: Mapping[str, int] | None = None) -> int:
        """Bits that a client of a cohort sends of its update, see defence.upload.

        changed: entries of each tensor that `share` acts on.  others: of those that leave beside them as they are, such as running statistics.
        """
        others = sum((others or {}).values())
        if self.secure is not None:
            return MASKED * (sum(changed.values()) + others)
        if type(self).share is not Defence.share:  # of one's own, which may send anything
            return FLOAT * (sum(changed.values()) + others)
        bits = FLOAT * others
        for entries in changed.values():
            packed = Packed.plain(entries)
            for one in self.transforms:
                packed = one.packed(packed) if callable(getattr(one, "packed", None)) else Packed.plain(entries)
            bits += packed.total
        return bits

    def stepped(self, make: Callable[[], Simulate], *, generator: Generator | None = None) -> Callable[[], Simulate]:
        """What the client makes of every gradient before it steps by it or sends it, where that is more than the gradient: from a factory of
        simulators to another. generator: draws the noise of this; None leaves it out, as attackers do who know the rest."""
        return make

    def gradient_noise(self, images: int) -> float:
        """Standard deviation of the noise that `stepped` adds to every entry of a gradient of so many images; 0 where nothing says that it does."""
        return 0.0

    def cross_entropy_alone(self, progress: float) -> bool:
        """Whether what a client releases then is the gradient of the cross-entropy of one pass, model(images, noise). A simulator of the user's own may be more."""
        return not self.own_terms and type(self).simulator is Defence.simulator and type(self).stepped is Defence.stepped

    def couples_images(self, terms: Literal["client", "utility"], progress: float) -> bool:
        """Whether what a client makes of a batch, by these terms of its loss, is more than the mean of what it makes of each image, before updates are
        changed. A `simulator` or `stepped` of one's own counts as more."""
        return type(self).stepped is not Defence.stepped or (terms == "client" and not self.cross_entropy_alone(progress))

    def needs_decoder(self, progress: float) -> bool:
        """Whether a decoder is in the loss of what a client releases then."""
        return self.decoder is not None

    def simulator(self, *, terms: Literal["client", "utility"] = "client", progress: float = 0.0) -> Callable[[], Simulate]:
        """A factory of gradient simulators, each with module copies of its own (threads must not share a module).

        terms: gradient of the client's whole loss, or of its cross-entropy alone.  progress: share of the rounds
        that were over when the gradient was released.
        """

        def make() -> Simulate:
            model = copy.deepcopy(self.model).requires_grad_(False)

            def loss(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
                return F.cross_entropy(functional_call(model, {**known, **params}, (images,)), labels)

            def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
                return grad(loss)(params, known, images, labels, noise)

            simulate.loss = loss
            return simulate

        return make


class Plain:
    """Plays cross-entropy only (see clients.local.Player)."""

    kept: nn.Module | None = None

    def __init__(self, model: SplitModel) -> None:
        self.model, self._forward = model, model

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        return None

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(self._forward(images), labels)

    def stacked(self) -> StackedPlain | None:
        """This game as functions (see clients.vectorised.Stacked); None for a player that plays another."""
        own = type(self)
        same = own.loss is Plain.loss and own.begin is Plain.begin and not hasattr(own, "fill_gradients") and not hasattr(own, "draw_batches")
        return StackedPlain(self.model) if same else None

    def compile(self, **options: Any) -> None:
        """The net's passes as a program, see `Compiled`."""
        self._forward = Compiled(self.model, modules=[self.model], **options)
