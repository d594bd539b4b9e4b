"""Ghost clipping: the clipped sum of a batch without holding the images' own gradients.

    ‖∂ℓ_i/∂W‖² = Σ_{q,r} ⟨a_iq, a_ir⟩ ⟨g_iq, g_ir⟩     of a layer's input patches a (q positions) and the gradients g of its output
    Σ_i min(1, C / ‖∇ℓ_i‖) ∇ℓ_i = ∇ Σ_i min(1, C / ‖∇ℓ_i‖) ℓ_i, the factors held constant

One forward pass and two backward passes of the batch, as in plain training twice; between them each layer gives its share of the norms. A convolution
takes the first formula where 2 q² is below the number of its weights, else its images' own gradients, of this layer alone; linear layers and norms
as Opacus has them.

Source: Li et al. 2022, arXiv:2110.05679 (linear layers); Bu et al. 2022, arXiv:2205.10683 (mixed, for convolutions).
Measured: see `PrivatePlayer`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.errors import InputError
from gidef.models.norms import affine, is_frozen
from gidef.types import Tensors


class Ghost:
    """Norms and clipped sums of a model's cross-entropy.

    Raises: InputError for a parameter that is not of a Linear, Conv2d, GroupNorm, LayerNorm or frozen BatchNorm (without an activation in it) of its own, and, when called, for a layer that is not
            used exactly once: norms would lack something.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
        self._layers = {name: layer for name, layer in model.named_modules() if any(True for _ in layer.parameters(recurse=False))}
        odd = [f"{name} ({type(layer).__name__})" for name, layer in self._layers.items() if not _plain(layer, kinds)]
        owned = [p for layer in self._layers.values() for p in layer.parameters(recurse=False)]
        if odd or len({id(p) for p in owned}) < len(owned):
            raise InputError(f"ghost clipping does not know {', '.join(odd[:3]) or 'parameters that several layers share'}: set form=per_sample.")

    def clipped_sum(self, images: Tensor, labels: Tensor, clip_factors: Callable[[Tensor], Tensor]) -> tuple[Tensors, Tensor]:
        """(Σ_i f_i ∇ℓ_i by name, losses (B,)); clip_factors maps squared norms (B,) to f.

        Args: images: (B, C, H, W), B ≥ 1.  labels: int64 (B,) or probabilities (B, K).
        """
        squares, calls, counting = torch.zeros(len(images), dtype=images.dtype, device=images.device), dict.fromkeys(self._layers, 0), True

        def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                calls[name] += 1
                given = inputs[0].detach()

                def arrived(gradient: Tensor) -> None:  # on the output as the layer made it: later additions in place do not touch it
                    if counting:
                        squares.add_(_squares(layer, given, gradient))

                output.register_hook(arrived)

            return layer.register_forward_hook(seen)

        handles = [watch(name, layer) for name, layer in self._layers.items()]
        try:
            losses = F.cross_entropy(self._model(images), labels, reduction="none")
            parameters = dict(self._model.named_parameters())
            wanted = {name: p for name, p in parameters.items() if p.requires_grad}
            torch.autograd.grad(losses.sum(), list(wanted.values()), retain_graph=True)
            counting = False
            found = torch.autograd.grad((clip_factors(squares) * losses).sum(), list(wanted.values()))
        finally:
            for handle in handles:
                handle.remove()
        if others := [name for name, count in calls.items() if count != 1]:
            raise InputError(f"ghost clipping takes layers that are used once; {others[0]} was used {calls[others[0]]} times: set form=per_sample.")
        sums = dict(zip(wanted, found, strict=True))
        return {name: sums.get(name, torch.zeros_like(p)) for name, p in parameters.items()}, losses.detach()


def _plain(layer: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a layer is one of these very types, with zeros beyond its border."""
    if is_frozen(layer):
        return not hasattr(layer, "act")
    return type(layer) in kinds and getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(layer, "padding", 0), str)


@torch.no_grad()
def _squares(layer: nn.Module, given: Tensor, gradient: Tensor) -> Tensor:
    """‖∂ℓ_i/∂θ‖² (B,) over a layer's parameters."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        patches = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (B, p, q)
        outputs = gradient.flatten(2)  # (B, o, q)
        if 2 * patches.shape[2] ** 2 < layer.weight.numel():
            found = (patches.mT @ patches * (outputs.mT @ outputs)).sum((1, 2))
        else:
            found = (outputs @ patches.mT).square().sum((1, 2))
        return found if layer.bias is None else found + outputs.sum(2).square().sum(1)
    if is_frozen(layer):
        normalised = affine(given, layer.running_mean, layer.running_var, None, None, layer.eps)
        return sum((part.flatten(2).sum(2) if part.dim() > 2 else part).square().sum(1) for part in (gradient * normalised, gradient))
    if isinstance(layer, nn.Linear):
        given, gradient = (t if t.dim() < 4 else t.flatten(1, -2) for t in (given, gradient))
        parts = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[nn.Linear](layer, [given], gradient).values()
        return sum(norm.square() for norm in parts)
    parts = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, [given], gradient).values()
    return sum(own.flatten(1).square().sum(1) for own in parts)
