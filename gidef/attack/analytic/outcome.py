"""What closed-form attacks check before they begin, and what they hand back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gidef.attack.labels import recover_labels
from gidef.errors import InputError
from gidef.types import Observation, Reconstruction


def check_fit(observation: Observation, model: nn.Module, image_shape: Sequence[int]) -> None:
    """Raise InputError unless the observation is one of this model: names and shapes, of what was sent and of what was released."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape={tuple(image_shape)}: expected (channels, height, width).")
    if observation.num_examples < 1:
        raise InputError(f"num_examples={observation.num_examples}: expected at least one image in the private batch.")
    if not observation.update:
        raise InputError("the observation's update holds no tensor: release at least one.")
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    for what, tensors in (("update", observation.update), ("params", observation.params)):
        for name, tensor in tensors.items():
            shape = tuple(ours[name].shape) if name in ours else "missing"
            if shape != tuple(tensor.shape):
                raise InputError(
                    f"the observation is not one of this model: {name!r} is {tuple(tensor.shape)} in its {what} and {shape} in the model. "
                    "Give the attack the architecture that the client trains, and only that model's tensors."
                )


def trouble(observation: Observation, names: Iterable[str]) -> str:
    """Why nothing can be read from the tensors of these names, or ""."""
    tensors = [observation.update[name] for name in names]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return "the observed update is not finite"
    if not any(bool(tensor.any()) for tensor in tensors):
        return "the observed update is zero: it holds nothing to invert"
    return ""


def labels_of(observation: Observation, num_classes: int) -> Tensor:
    """int64 (B,): granted, or recovered, or zeros where the update does not tell: no closed form here depends on them past R-GAP."""
    labels, size = observation.labels, observation.num_examples
    if labels is not None:
        if labels.shape != (size,) or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < max(num_classes, 2):
            raise InputError(
                f"granted labels {tuple(labels.shape)} do not fit {size} images of {num_classes} classes: give one class index per image."
            )
        return labels.long().cpu()
    try:
        return recover_labels(observation, num_classes)
    except (InputError, torch.linalg.LinAlgError):
        return torch.zeros(size, dtype=torch.int64)


def recovered(observation: Observation, images: Tensor, labels: Tensor, loss: float) -> Reconstruction:
    """A result: images (B, C, H, W) of any floating dtype, clamped to [0, 1]."""
    return Reconstruction(images=images.detach().clamp(0, 1).float().cpu(), labels=labels, loss=loss, losses=torch.tensor([loss]))


def failed(observation: Observation, image_shape: Sequence[int], labels: Tensor, reason: str) -> Reconstruction:
    """The failure that a table counts: mid-grey images and the reason."""
    images = torch.full((observation.num_examples, *image_shape), 0.5)
    return Reconstruction(images=images, labels=labels, loss=torch.inf, losses=torch.tensor([torch.inf]), status="failed", error=reason)
