"""What lies behind the cut of a split model as a function of its weights and the latent z̃: all that the attacker of a private front knows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gidef.attack.labels import LocalSteps
from gidef.attack.matching import Simulate
from gidef.attack.simulate import along
from gidef.models import SplitModel
from gidef.types import Tensors


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear or convolutional layer whose input is z̃ itself.  weight, bias: names of its tensors; bias None if it has none.
    kernel, stride, padding, dilation: of a convolution, None for a linear layer over all of a flattened z̃."""

    weight: str
    bias: str | None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def patches(self, latents: Tensor) -> Tensor:
        """What each output position reads: (N, entries, positions) of latents (N, *latent)."""
        if self.kernel is None:
            return latents.flatten(1)[..., None]
        return F.unfold(latents, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)

    def gathered(self, patches: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """The adjoint of `patches`: sums over the positions that read an entry, (N, *latent)."""
        if self.kernel is None:
            return patches[..., 0].unflatten(1, latent_shape)
        return F.fold(patches, latent_shape[1:], self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)


class Predictor:
    """What lies behind the cut of a split model, as a function of its weights and z̃.

    Attributes: names: of its parameters.  latent_shape, num_classes: of the model.  readers: layers that read z̃ itself.
                told: how many numbers its gradient can tell at most; latents of more entries are not determined by it. A linear layer that gives
                the logits tells an input less than it has weights, as the logits' gradients sum to zero.
                couples: whether a norm looks at the batch.
                local: the steps of SGD behind a delta, in one epoch; None for one gradient.
    Owns a copy of the model: threads must not share a predictor.
    """

    def __init__(self, model: SplitModel, *, local: LocalSteps | None = None) -> None:
        self.local = local if local is not None and local.steps > 1 else None
        self._module = _Behind(copy.deepcopy(model).requires_grad_(False))
        self.names, self.latent_shape, self.num_classes = model.parts["predictor"], model.latent_shape, model.num_classes
        norms = [layer for layer in self._module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self.couples = any(layer.training or layer.running_mean is None for layer in norms)
        self.readers = _readers(self._module.model, self.names)
        self.told = _told(self._module.model, self.names)

    def __call__(self, params: Tensors, latents: Tensor) -> Tensor:
        """Logits (B, K) from latents (B, *latent). params: at least those in `names`; further ones are ignored."""
        return functional_call(self._module, {f"model.{name}": params[name] for name in self.names}, (latents,))

    def loss(self, params: Tensors, latents: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats; labels (B, K) as probabilities."""
        return F.cross_entropy(self(params, latents), labels)

    def gradient(self, params: Tensors, latents: Tensor, labels: Tensor) -> Tensors:
        """∂ cross-entropy / ∂ φ, by `names`. What a client releases under `head`: no other term of its loss reaches φ. Of `local` steps, whose latents
        stand one step after another, the delta of φ over −lr."""
        return along(grad(self.loss), {name: params[name] for name in self.names}, self.local, latents, labels)[0]

    def backward(self, params: Tensors, latents: Tensor, labels: Tensor) -> Tensor:
        """∂ cross-entropy / ∂ z̃, (B, *latent); of `local` steps each at the φ that it met."""
        path, parts = along(grad(self.loss), {name: params[name] for name in self.names}, self.local, latents, labels)[1], []
        for weights, z, wanted in zip(path, latents.chunk(len(path)), labels.chunk(len(path)), strict=True):
            parts.append(grad(self.loss, argnums=1)(weights, z, wanted))
        return torch.cat(parts)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Predictor:
        """Moves its own copy of what is no parameter of the predictor, too."""
        self._module.to(device=device, dtype=dtype)
        return self


def latent_simulator(predictor: Predictor) -> Simulate:
    """A simulator whose unknown is z̃: known["latent"] (B, *latent) instead of images and noise, which it ignores.

    For the engine, with "latent" among the searched variables; `match_latent` needs no engine.
    """

    def loss(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
        return predictor.loss(params, known["latent"], labels)

    def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        return predictor.gradient(params, known["latent"], labels)

    simulate.loss = loss
    return simulate


class _Behind(nn.Module):
    """The predictor as a module of its own, for functional_call."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.predict(latents)


def _readers(model: SplitModel, names: Sequence[str]) -> tuple[Reader, ...]:
    """Layers of the predictor that are handed the latent itself, found by running it."""
    weight = next(model.parameters())
    probe, found, handles = weight.new_ones((2, *model.latent_shape)), [], []

    def look(name: str, module: nn.Module, inputs: tuple) -> None:
        given = inputs[0]
        if given.data_ptr() != probe.data_ptr() or given.numel() != probe.numel() or not given.is_contiguous():
            return
        own, bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        if own not in names:
            return
        if isinstance(module, nn.Linear):
            if given.ndim == 2:
                found.append(Reader(own, bias))
        elif given.shape == probe.shape and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            found.append(Reader(own, bias, module.kernel_size, module.stride, module.padding, module.dilation))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(lambda module, inputs, name=name: look(name, module, inputs)))
    try:
        with torch.no_grad():
            model.predict(probe)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _told(model: SplitModel, names: Sequence[str]) -> int:
    """Numbers that the gradient of the predictor has, less those that the others give."""
    outputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in names:
            handles.append(module.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output)))
    try:
        with torch.no_grad():
            logits = model.predict(next(model.parameters()).new_ones((2, *model.latent_shape)))
    finally:
        for handle in handles:
            handle.remove()
    last = [model.get_submodule(name) for name, output in outputs.items() if output.data_ptr() == logits.data_ptr()]
    sums = sum(layer.in_features + (layer.bias is not None) for layer in last)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names) - sums
