"""Local training: steps around an injected loss, and the difference as the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gidef.errors import Diverged, InputError
from gidef.models import count_afresh, moving, moving_statistics, running_statistics
from gidef.precision import in_own_precision
from gidef.rng import generator
from gidef.spans import span
from gidef.types import Client, Tensors


class Player(Protocol):
    """What a client optimises; a defence provides it, one per worker.

    model:  trained by the client's optimiser. Its parameters are what policies share or keep.
    kept:   what the client trains by itself and keeps, such as a decoder; None if nothing.
    begin:  called once per client and round, after the weights are loaded. first: the client's first round.
            progress: share of the rounds that are over, in [0, 1].
    loss:   scalar for one batch; may first take steps on `kept`. images float32 (B, C, H, W) in [0, 1], labels
            int64 (B,), rows int64 (B,): the examples' positions in the client's data, epoch: from 0.

    Three more may be there, and then take the place of what this page has.
    draw_batches:   as `batches`; a batch may be empty.
    backward:       of the loss's backward pass, without an argument and without autocast, for a player whose gradients are not all `loss`'s.
    fill_gradients: of `loss` and its backward pass: leaves in every parameter's `grad` what the client's optimiser is to step by, and returns
                    the loss. Called without autocast.
    """

    model: nn.Module
    kept: nn.Module | None

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None: ...
    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """How a client steps; see `config.LocalTraining` for the meaning and ranges. steps: stop after so many, None for whole epochs. fused,
    channels_last: see `config.Speed`."""

    epochs: int = 1
    batch_size: int = 64
    optimiser: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    grad_clip: float = 5.0
    accumulate: int = 1
    proximal: float = 0.0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    steps: int | None = None
    fused: bool = False
    channels_last: bool = False

    def steps_in_round(self, num_examples: int) -> int:
        """Optimiser steps of a client in a round."""
        return self.steps or self.epochs * -(-num_examples // (self.batch_size * self.accumulate))


@dataclass(frozen=True, slots=True)
class LocalResult:
    """delta: w_after − w_before of every parameter of player.model, and of the running statistics that it moves.  steps: optimiser steps taken.  loss: mean over batches, nats."""

    delta: Tensors
    steps: int
    loss: float


def batches(client: Client, *, batch_size: int, epochs: int, seed: int, round: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, rows) of each batch: a fresh permutation per epoch, a function of (seed, round, client) alone. The last batch may be smaller."""
    order = generator(seed, "order", round, client.id)
    for epoch in range(epochs):
        # to the images' device once an epoch: each copy waits for the device
        for rows in torch.randperm(client.num_examples, generator=order).to(client.images.device).split(batch_size):
            yield epoch, rows


def examples(
    player: Player, client: Client, settings: LocalSettings, *, device: torch.device, seed: int, round: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(epoch, rows, images float32 (b, C, H, W) in [0, 1], labels) of each batch of a client's round, on the device; from memory or streamed.

    Raises: InputError for a streamed client whose player draws its batches itself: they would need every image at hand.
    """
    drawn = {"batch_size": settings.batch_size, "epochs": settings.epochs, "seed": seed, "round": round}
    if client.source is None:
        for epoch, rows in getattr(player, "draw_batches", batches)(client, **drawn):
            yield epoch, *_batch(client, rows, device, channels_last=settings.channels_last)
        return
    if hasattr(player, "draw_batches"):
        raise InputError(f"client {client.id} streams its images, and the defence draws its batches itself: keep the images in memory (data.stream=False).")
    with contextlib.closing(client.source.batches(**drawn)) as streamed:
        for epoch, rows, images, labels in streamed:  # bytes travel to the device, not floats
            images = images.to(device, non_blocking=True).to(torch.float32).div_(255)
            yield epoch, rows.to(client.images.device), images.contiguous(memory_format=torch.channels_last) if settings.channels_last else images, labels.to(device)


def load_parameters(module: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into the module's parameters, and running statistics, of the same names, in place; names that the module lacks raise KeyError."""
    parameters = dict(module.named_parameters())
    if not tensors.keys() <= parameters.keys():
        parameters |= running_statistics(module)
    with torch.no_grad():
        torch._foreach_copy_([parameters[name] for name in tensors], [value.to(parameters[name].device) for name, value in tensors.items()])


@span("steps")
@in_own_precision
def train_locally(
    player: Player,
    start: Tensors,
    client: Client,
    settings: LocalSettings,
    *,
    seed: int,
    round: int,
    correction: Callable[[str], Tensor] | None = None,
) -> LocalResult:
    """Train `player.model` from `start` on one client's images.

    Args:
        player:     after `begin`. Its model's parameters are overwritten.
        start:      every parameter of the model, and the running statistics that it moves.
        settings:   see LocalSettings. With `accumulate` A, the gradients of A batches are averaged before a step
                    (the rest of an epoch makes a smaller step); the clip acts on the average.
        correction: name → tensor added to each step's gradient (SCAFFOLD's c − c_i).
    Returns: LocalResult; `start` is not modified.
    Raises:  Diverged if the loss stops being finite.

    Everything random is a function of (seed, round, client.id). FedProx (Li et al. 2020) adds proximal · (w − start)
    to the gradient, after clipping, as its proximal term is exact.
    """
    named = dict(player.model.named_parameters())
    parameters = list(named.values())
    origin = [start[name].to(p.device) for name, p in named.items()]
    known = getattr(player.model, "statistics", None)  # a SplitModel's: looking through the small net's layers takes 0.04 ms a client
    moves = known is None or any(known.values())
    statistics = moving_statistics(player.model) if moves else {}
    with torch.no_grad():
        torch._foreach_copy_(parameters, origin)
        for name, tensor in statistics.items():
            tensor.copy_(start[name])
    if statistics:
        count_afresh(player.model)
    take_step = _optimiser(settings, parameters)
    shift = [correction(name).to(p.device) for name, p in named.items()] if correction else None
    device = parameters[0].device
    total, num_batches, steps, pending = torch.zeros((), dtype=torch.float64, device=device), 0, 0, 0

    @span("optimiser")
    def step() -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if pending > 1:
            torch._foreach_div_(gradients, pending)
        if settings.grad_clip > 0:
            _clip([p.grad for p in parameters if p.grad is not None], settings.grad_clip)
        if settings.proximal > 0:
            torch._foreach_add_(gradients, torch._foreach_sub([p.detach() for p in parameters], origin), alpha=settings.proximal)
        if shift is not None:
            torch._foreach_add_(gradients, shift)
        take_step(gradients)
        for p in parameters:
            p.grad = None

    for p in parameters:
        p.grad = None
    half = settings.precision == "bfloat16"
    # without the cache: it would give a player that steps inside its loss the rounded weights of before the step
    autocast = (lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)) if half else contextlib.nullcontext
    per_epoch = -(-client.num_examples // settings.batch_size)
    fill_gradients = getattr(player, "fill_gradients", None)
    with moving(player.model) if statistics else contextlib.nullcontext():
        for epoch, rows, images, labels in examples(player, client, settings, device=device, seed=seed, round=round):
            if fill_gradients is not None:
                loss = fill_gradients(images, labels, rows=rows, epoch=epoch)
            else:
                with autocast():
                    loss = player.loss(images, labels, rows=rows, epoch=epoch)
                (player.backward if hasattr(player, "backward") else loss.backward)()
            total += loss.detach()
            num_batches, pending = num_batches + 1, pending + 1
            if pending == settings.accumulate or num_batches % per_epoch == 0:  # an epoch's rest is stepped on its own
                step()
                steps, pending = steps + 1, 0
                if steps == settings.steps:
                    break
    mean_loss = float(total) / max(num_batches, 1)  # the only wait for the device
    if not math.isfinite(mean_loss):
        raise Diverged(f"client {client.id}'s loss is {mean_loss} in round {round}: training diverged. Lower clients.lr, or set clients.grad_clip.")
    delta = [step.contiguous() for step in torch._foreach_sub([p.detach() for p in parameters], origin)]
    delta += [tensor - start[name].to(tensor.device) for name, tensor in statistics.items()]
    return LocalResult(dict(zip([*named, *statistics], delta, strict=True)), steps, mean_loss)


@span("data")
def _batch(client: Client, rows: Tensor, device: torch.device, *, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """rows, images float32 in [0, 1], labels."""
    rows = rows.to(client.images.device)
    images = client.images[rows].to(device, torch.float32).div_(255)
    return rows, images.contiguous(memory_format=torch.channels_last) if channels_last else images, client.labels[rows].to(device)


@torch.no_grad()
def _clip(gradients: list[Tensor], largest: float) -> None:
    """nn.utils.clip_grad_norm_, to the bit, without its bookkeeping, which costs as much as a small net's whole step."""
    if len({(g.device, g.dtype) for g in gradients}) > 1:
        factor = largest / (nn.utils.get_total_norm(gradients, foreach=True) + 1e-6)
        torch._foreach_mul_(gradients, [factor.clamp(max=1.0).to(g.device) for g in gradients])
    elif gradients:
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)), 2.0)
        torch._foreach_mul_(gradients, (largest / (length + 1e-6)).clamp(max=1.0))


def torch_optimiser(settings: LocalSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Torch's own optimiser with these settings."""
    more = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused" if settings.fused else "foreach": True}
    return torch.optim.Adam(parameters, **more) if settings.optimiser == "adam" else torch.optim.SGD(parameters, momentum=settings.momentum, **more)


def _optimiser(settings: LocalSettings, parameters: list[nn.Parameter]) -> Callable[[list[Tensor]], None]:
    """step(gradients), fresh in every round, so that a client's result does not depend on where it trained before."""
    if settings.optimiser == "adam" or settings.fused:
        made = torch_optimiser(settings, parameters)

        def step(gradients: list[Tensor]) -> None:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            made.step()

        return step
    buffers: list[Tensor] = []

    @torch.no_grad()
    def descend(gradients: list[Tensor]) -> None:
        """torch.optim.SGD(foreach=True), to the bit, without its bookkeeping."""
        if settings.weight_decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=settings.weight_decay)
        if settings.momentum and buffers:
            torch._foreach_mul_(buffers, settings.momentum)
            torch._foreach_add_(buffers, gradients)
        elif settings.momentum:
            buffers.extend(gradient.clone() for gradient in gradients)
        torch._foreach_add_(parameters, buffers or gradients, alpha=-settings.lr)

    return descend
