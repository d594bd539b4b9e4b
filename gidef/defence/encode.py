"""What a client trains on instead of its images and labels; and what an attacker may search of that.

An encoder of your own is a dataclass with `changes_data = True` and the members of `Encoder`, alone, before a training-time defence or a change
of updates, in the order of the tuple: `{"mixup + pruning": (MixUp(), Pruning(share=0.9))}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gidef.models import moving
from gidef.rng import generator
from gidef.types import Client, Tensors

Simulate = Callable[..., Tensors]

ENCODED = "encode/"
"""Prefix in a simulator's `known` of what an adaptive attack searches of the encoders."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A further unknown of an attack that adapts: its shape, where it starts, the first step of the optimiser, and its bounds.

    start: a number, or start(shape, generator) → the tensor.
    """

    shape: tuple[int, ...]
    start: float | Callable[[tuple[int, ...], Generator], Tensor] = 0.0
    lr: float = 0.1
    low: float = -math.inf
    high: float = math.inf


class Encoder(Protocol):
    """One change of what a client trains on.

    encode:   (images float32 (B, C, H, W) in [0, 1], labels int64 (B,) or probabilities (B, K)) → images and labels of N ≥ B entries, where what
              came of an image stands before what came of the next; labels as they were or probabilities. Partners come from `client`, its own
              data, not encoded themselves; draws from the generator alone, a CPU's.
              An encoder of strength zero returns what it was given.
    unknowns: what an adaptive attack on B images searches beside them, by name; it knows the encoder, not the draw.
    imitate:  (images, labels (B, K) as the attack has them, the unknowns) → what the client would have trained on; differentiable.

    With an attribute `needs_model = True`, encode takes two more keywords: model, the client's network, and params, its weights now.
    `random` says whether encode draws anything, so that another release of the same images differs, as for `share.Transform`; without the attribute it
    counts as True.
    Whose encodings mix the images with others, one for one, may say what several of them tell of the images (A9): unmixed(encoded (T, B, C, H, W),
    labels (T, B, K) they were trained under, granted (B, K), means (K, C, H, W) of public images by class) → (B, C, H, W); and with `smooth = False` that
    encodings are no pictures, whose total variation would be small.
    """

    def encode(self, images: Tensor, labels: Tensor, *, client: Client, generator: Generator) -> tuple[Tensor, Tensor]: ...
    def unknowns(self, image_shape: tuple[int, ...], size: int) -> dict[str, Unknown]: ...
    def imitate(self, images: Tensor, labels: Tensor, found: Tensors) -> tuple[Tensor, Tensor]: ...


def encode_all(
    encoders: Sequence[Encoder], images: Tensor, labels: Tensor, *, client: Client, generator: Generator, model: nn.Module, params: Tensors
) -> tuple[Tensor, Tensor]:
    """What the client trains on; without encoders what it was given."""
    for encoder in encoders:
        more = {"model": model, "params": params} if getattr(encoder, "needs_model", False) else {}
        images, labels = encoder.encode(images, labels, client=client, generator=generator, **more)
    return images, labels


def searched_of(encoders: Sequence[Encoder], image_shape: tuple[int, ...], size: int) -> dict[str, Unknown]:
    """All that an adaptive attack searches of them, under the names that `imitating` looks for."""
    return {f"{ENCODED}{place}/{name}": one for place, encoder in enumerate(encoders) for name, one in encoder.unknowns(image_shape, size).items()}


def imitating(simulate: Simulate, encoders: Sequence[Encoder]) -> Simulate:
    """The simulator of an attacker who knows the encoders and searches their draws; where `known` holds no draw of an encoder it is left out.
    The simulator itself where there are none."""
    if not encoders:
        return simulate

    def encoded(known: Tensors, images: Tensor, labels: Tensor) -> tuple[Tensors, Tensor, Tensor]:
        for place, encoder in enumerate(encoders):
            prefix = f"{ENCODED}{place}/"
            found = {name.removeprefix(prefix): tensor for name, tensor in known.items() if name.startswith(prefix)}
            if found:
                images, labels = encoder.imitate(images, labels, found)
        return {name: tensor for name, tensor in known.items() if not name.startswith(ENCODED)}, images, labels

    def simulated(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        return simulate(params, *encoded(known, images, labels), noise)

    if hasattr(simulate, "loss"):
        simulated.loss = lambda params, known, images, labels, noise: simulate.loss(params, *encoded(known, images, labels), noise)
    return simulated


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """float32 (B, K) of int64 (B,); probabilities as they are."""
    return labels if labels.dim() == 2 else F.one_hot(labels, num_classes).float()


def partners(client: Client, count: int, *, num_classes: int, generator: Generator, like: Tensor) -> tuple[Tensor, Tensor]:
    """Images of the client, drawn evenly with replacement: float32 (count, C, H, W) in [0, 1], labels (count, K); on the device of `like`.
    A client that streams its images takes them from those that it keeps in memory."""
    rows = torch.randint(len(client.labels), (count,), generator=generator).to(client.images.device)
    return client.images[rows].to(like.device, torch.float32).div_(255), probabilities(client.labels[rows].to(like.device), num_classes)


def softened(labels: Tensor, logits: Tensor, trust: float = 0.5) -> Tensor:
    """Labels of an attacker who knows one image's class of a mixture: softmax(log(trust · y + (1 − trust) / K) + logits), (B, K)."""
    return (labels * trust + (1 - trust) / labels.shape[-1]).log().add(logits).softmax(-1)


def from_mixtures(encoded: Tensor, labels: Tensor, granted: Tensor, means: Tensor, *, mixed: int, largest: float, signs: bool = False) -> Tensor:
    """The likeliest private images behind T mixtures of each with k − 1 others, whose labels tell the shares.

        e_t = λ_t x + (1 − λ_t) r_t,   x ~ N(μ_y, s²),   r_t ~ N(ρ_t, s² / (k − 1))
        x = (μ_y + Σ_t p_t (e_t − (1 − λ_t) ρ_t) / λ_t) / (1 + Σ_t p_t),   p_t = (k − 1) λ_t² / (1 − λ_t)²

    with μ the means of public images by class, y the image's own, and ρ_t their mean by what the label holds beside λ_t of y. λ_t is y's share of the label;
    half of it above `largest`, where another image of y must be in the mixture. With signs, every entry of e_t − ½ has the one of λ_t x + (1 − λ_t) ρ_t − ½, x
    from a pass before.

    Args:    encoded: (T, B, C, H, W) on [0, 1].  labels: (T, B, K).  granted: (B, K), y.  means: (K, C, H, W).  mixed: k ≥ 2.  largest: of λ.
    Returns: (B, C, H, W) in [0, 1].
    Source:  ours.
    """
    share = (labels * granted).sum(-1)
    share = torch.where(share > largest, share / 2, share).clamp(0.02, largest)
    beside = (labels - share[..., None] * granted).clamp(min=1e-6)
    own, others = torch.einsum("bk,kchw->bchw", granted, means), torch.einsum("tbk,kchw->tbchw", beside / beside.sum(-1, keepdim=True), means)
    share = share[..., None, None, None]
    trust, found = (mixed - 1) * (share / (1 - share)).square(), own
    for _ in range(3 if signs else 1):
        shown = encoded
        if signs:
            expected = share * found + (1 - share) * others - 0.5
            shown = torch.where(expected * (encoded - 0.5) < 0, 1 - encoded, encoded)
        found = (own + (trust * (shown - (1 - share) * others) / share).sum(0)) / (1 + trust.sum(0))
    return found.clamp(0, 1)


class EncodedPlayer:
    """A player whose batches are encoded first (see clients.local.Player). Draws are a function of (seed, round, client)."""

    def __init__(self, player: Any, encode: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._player, self._encode = player, encode

    @property
    def model(self) -> nn.Module:
        return self._player.model

    @property
    def kept(self) -> nn.Module | None:
        return self._player.kept

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        self._client, self._generator = client, generator(seed, "encode", round, client.id)
        self._player.begin(client, seed=seed, round=round, progress=progress, first=first)

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        with torch.autocast(images.device.type, enabled=False), moving(self.model, on=False):
            images, labels = self._encode(images, labels, client=self._client, generator=self._generator, model=self.model, params=params)
        return self._player.loss(images, labels, rows=rows, epoch=epoch)

    def __getattr__(self, name: str) -> Any:
        """`backward`, `compile` and `fuse`, where the player has them; what else it has would see the images as they are."""
        if name in ("backward", "compile", "fuse"):
            return getattr(self._player, name)
        raise AttributeError(name)
