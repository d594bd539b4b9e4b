"""What a model does to its image before a layer sees it, found by running the attacker's own copy on images of its choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gidef.errors import InputError
from gidef.rng import generator


class Step(NamedTuple):
    """A module without children as it ran: its name, itself, what it was given and what it gave."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


class ImageMap(NamedTuple):
    """A layer's input as an affine function of the image, entry by entry: input = shift + scale · image, both (C·H·W,)."""

    shift: Tensor
    scale: Tensor

    def image(self, inputs: Tensor, image_shape: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) in [0, 1], not clamped, from layer inputs (B, …) of C·H·W entries each."""
        flat = (inputs.flatten(1) - self.shift.to(inputs)) / self.scale.to(inputs)
        return flat.view(-1, *image_shape)


def attack_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model in eval mode, on the CPU, a copy: the caller's own stays as it is."""
    return copy.deepcopy(model).eval().to("cpu", dtype)


def trace(model: nn.Module, images: Tensor, keep: Callable[[nn.Module, Tensor], bool]) -> tuple[list[Step], Any]:
    """The modules without children that `keep(module, input)` wants, in the order in which they ran, and the model's output.

    Raises:  InputError if the model cannot take these images.
    """
    steps: list[Step] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue

        def record(module: nn.Module, inputs: tuple, output: Any, name: str = name) -> None:
            if len(inputs) and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and keep(module, inputs[0]):
                steps.append(Step(name, module, inputs[0].detach(), output.detach()))

        handles.append(module.register_forward_hook(record))
    try:
        with torch.no_grad():
            output = model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot take images of shape {tuple(images.shape[1:])} ({error}). Give the shape of the client's images."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return steps, output


def probes(image_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Three images (3, C, H, W): black, white, and noise."""
    noise = torch.rand(tuple(image_shape), generator=generator(0, "probe"), dtype=torch.float64)
    return torch.stack([torch.zeros_like(noise), torch.ones_like(noise), noise]).to(dtype)


def image_map(inputs: Tensor, images: Tensor) -> ImageMap | None:
    """How a layer's inputs (3, …) come from the images of `probes`; None unless it is affine and invertible, entry by entry.

    A normalisation by mean and deviation is found wherever it is done, in the model or in a wrapper around it.
    """
    if inputs.shape[0] != 3 or inputs[0].numel() != images[0].numel():
        return None
    black, white, noise = inputs.double().flatten(1)
    shift, scale = black, white - black
    expected = shift + scale * images[2].double().flatten()
    size = float(scale.abs().max())
    if (
        not size > 0
        or not (scale.abs() > 1e-6 * size).all()
        or not torch.allclose(noise, expected, rtol=0, atol=1e-5 * (size + float(shift.abs().max())))
    ):
        return None
    return ImageMap(shift, scale)


def first_layers(model: nn.Module, image_shape: Sequence[int], kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module, ImageMap]]:
    """Modules of these kinds whose input is the image, or the normalised image; in the order in which they run."""
    some = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    images = probes(image_shape, some.dtype)
    pixels = images[0].numel()
    steps, _ = trace(model, images, lambda module, given: isinstance(module, kinds) and given.shape[:1] == (3,) and given[0].numel() == pixels)
    found = [(step.name, step.module, image_map(step.input, images)) for step in steps]
    return [(name, module, mapped) for name, module, mapped in found if mapped is not None]
