"""Simulators of a client that computes one gradient of any plain network, and what such a client releases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

from gidef.attack.matching import Simulate
from gidef.attack.surgery import (
    STATISTICS,
    BatchNormPolicy,
    DropoutPolicy,
    Loss,
    duplicate,
    logits_of,
    mask_shapes,
    norm_names,
    plain_gradient,
    prepare,
    running_statistics,
    set_modes,
)
from gidef.errors import InputError
from gidef.types import Observation, Tensors

Mode = Literal["eval", "train"]
Normalise = tuple[Sequence[float], Sequence[float]]
"""(mean, standard deviation), per channel, of the images as the network takes them: (x − mean) / std."""

SOFT_LABELS = "soft_labels"
"""Name in `known` of granted labels (B, classes) that are probabilities: mixed up, or smoothed by the client."""


def gradient_of(
    model: nn.Module, *, mode: Mode = "eval", loss: Loss = F.cross_entropy, batch_norm: BatchNormPolicy | None = None,
    dropout: DropoutPolicy | None = None, normalise: Normalise | None = None, fused_attention: bool = False,
) -> Simulate:  # fmt: skip
    """A simulator of the gradient that a client of this network releases.

        simulate(params, known, x, y, noise) = ∇_params loss(model((x − mean) / std), y)

    It differentiates by `params`, all or some of the parameters, and takes the rest of the network from `known` (by name:
    parameters, buffers such as running statistics, "masks.<module>"), or else from the model that is given here: its buffers are the
    attacker's proxy for what `known` does not grant. "soft_labels" in `known` take the place of y. The noise is ignored.

    Args:    model: any nn.Module from images to logits. A copy is attacked (see `prepare`), the model is not modified.
             mode: the victim's. "eval": running statistics, no dropout. "train": the batch's own statistics, and dropout's masks
             taken from `known`: granted, searched (`Searched` under the mask's name), or drawn afresh in each iteration.
             batch_norm, dropout: instead of the mode's, for an attacker who simplifies: in mode "train", batch_norm="eval" attacks by
             running statistics, dropout="off" by the mean of all masks.
             loss: of logits and probabilities, a mean over the batch.  normalise: what the client does to images in [0, 1] first.
             fused_attention: leave it in the copy, for first-order forms of the attack.
             Put the model on the attack's device first: what neither params nor known hold is else copied there at every call.
    Returns: simulate, with attributes `loss(params, known, x, y, noise)` → scalar, `changes` (what the surgery did, one line per kind) and
             `model` (the copy; `mask_shapes`, `draw_masks` and `batch_statistics` take it). Pure, twice differentiable, vmappable.
             One thread at a time may use it.
    Raises:  InputError for unknown modes; from `simulate`, for masks that are missing and parameters that the model lacks.
    """
    policies = _policies(mode, batch_norm, dropout)
    copy, changes = prepare(model, batch_norm=policies[0], dropout=policies[1], fused_attention=fused_attention)
    prepared = _normaliser(normalise)

    def value(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        return loss(logits_of(copy, params, known, prepared(images)), known.get(SOFT_LABELS, labels))

    def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensors:
        return grad(value)(params, known, images, labels)

    simulate.loss, simulate.changes, simulate.model = value, changes, copy
    return simulate


def observed(
    model: nn.Module, images: Tensor, labels: Tensor, *, mode: Mode = "eval", loss: Loss = F.cross_entropy, batch_norm: BatchNormPolicy | None = None,
    dropout: DropoutPolicy | None = None, normalise: Normalise | None = None, masks: Tensors | None = None, labels_known: bool = True,
    masks_known: bool = False, statistics: Literal["running", "batch"] | None = None,
) -> Observation:  # fmt: skip
    """What an untouched client releases of one batch, by plain autograd; the evaluator's side, and a reference for the simulator.

    Args:    model: as the server sent it; it is not modified.  images: (B, C, H, W) in [0, 1].
             labels: (B,) indices, or (B, classes) probabilities.  mode, loss, batch_norm, dropout, normalise: as `gradient_of`.
             masks: what the client's dropout draws, by name (`draw_masks`); None lets it draw from PyTorch's own generator.
             labels_known, masks_known: grant them. Granted probabilities are in `known` as "soft_labels", their likeliest classes in `labels`.
             statistics: "running": grant the running statistics as sent, under the buffers' names; "batch": those of the private
             batch, "statistics.<module>.mean" and ".var", without Bessel's correction.
    Returns: Observation of kind "gradient"; its params are those that require a gradient.
    Raises:  InputError for unknown modes, unusable images, labels or masks, and statistics of a model without BatchNorm.
    """
    if labels.shape[:1] != images.shape[:1] or labels.ndim != (2 if labels.is_floating_point() else 1):
        raise InputError(f"labels {tuple(labels.shape)} do not fit {len(images)} images: expected one class index, or one row of probabilities, per image.")
    if statistics not in (None, "running", "batch"):
        raise InputError(f'statistics={statistics!r} is unknown: choose "running", "batch" or None.')
    if statistics is not None and not norm_names(model):
        raise InputError(f"statistics={statistics!r}: {type(model).__name__} has no BatchNorm. Grant none.")
    if masks_known and masks is None:
        raise InputError("masks_known needs the masks: draw them with draw_masks and give them.")
    policies = _policies(mode, batch_norm, dropout)
    known: Tensors = {}
    if statistics == "running":
        for name, pair in zip(norm_names(model), running_statistics(model), strict=True):
            known |= {f"{name}.{which}".removeprefix("."): tensor.detach().clone() for which, tensor in zip(("running_mean", "running_var"), pair, strict=True)}
    client = duplicate(model)
    set_modes(client, *policies)
    found = _watch_statistics(client) if statistics == "batch" else {}
    forced: Tensors | Literal["expected"] | None = "expected" if policies[1] == "off" else _in_order(model, masks, images, policies)
    update = plain_gradient(client, _normaliser(normalise)(images), labels, loss=loss, masks=forced)
    for name, (mean, var) in found.items():
        known |= {f"{STATISTICS}{name}.mean": mean, f"{STATISTICS}{name}.var": var}
    if masks_known and policies[1] == "masks":
        known |= forced
    granted = None
    if labels_known:
        granted = labels.argmax(1) if labels.is_floating_point() else labels
        if labels.is_floating_point():
            known[SOFT_LABELS] = labels
    params = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return Observation(params, update, len(images), labels=granted, known=known)


def _policies(mode: str, batch_norm: BatchNormPolicy | None, dropout: DropoutPolicy | None) -> tuple[BatchNormPolicy, DropoutPolicy]:
    if mode not in ("eval", "train"):
        raise InputError(f'mode={mode!r} is unknown: choose "eval" or "train".')
    return batch_norm or mode, dropout or ("masks" if mode == "train" else "off")


def _normaliser(normalise: Normalise | None) -> Callable[[Tensor], Tensor]:
    if normalise is None:
        return lambda images: images
    mean, std = ([float(value) for value in values] for values in normalise)
    if len(mean) != len(std) or not min(std, default=0) > 0:
        raise InputError(f"normalise={normalise}: expected a mean and a deviation above 0 for each channel.")

    def apply(images: Tensor) -> Tensor:
        if images.shape[1] != len(mean):
            raise InputError(f"normalise is for {len(mean)} channels, the images {tuple(images.shape)} have {images.shape[1]}: give one value per channel.")
        # by numbers, not tensors, which a recorded program would copy to the device at each replay
        return torch.cat([(images[:, c : c + 1] - m) / s for c, (m, s) in enumerate(zip(mean, std, strict=True))], 1)

    return apply


def _in_order(model: nn.Module, masks: Tensors | None, images: Tensor, policies: tuple[BatchNormPolicy, DropoutPolicy]) -> Tensors | None:
    """The masks in the order in which the model draws; their names are all that is asked of an attack copy."""
    if masks is None:
        return None
    expected = mask_shapes(prepare(model, batch_norm=policies[0], dropout=policies[1])[0], images.shape)
    if expected.keys() != masks.keys():
        raise InputError(f"masks {sorted(masks)[:3]} … do not fit the model, which draws {sorted(expected)[:3]} …: give those of mask_shapes.")
    return {name: masks[name] for name in expected}


def _watch_statistics(client: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Filled, when the client runs, with (mean, variance) of each BatchNorm's input: the mean over its calls."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach().transpose(0, 1).flatten(1)
            calls.setdefault(name, []).append((x.mean(1), x.var(1, correction=0)))
            found[name] = tuple(torch.stack(each).mean(0) for each in zip(*calls[name], strict=True))

        return note

    for name in norm_names(client):
        client.get_submodule(name).register_forward_pre_hook(hook(name))
    return found
