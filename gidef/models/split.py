"""One network as encoder, perturbation and predictor: any backbone, cut behind a named module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gidef.errors import InputError
from gidef.models.bottleneck import Bottleneck
from gidef.models.cuts import BEFORE, check_cut, cuts, default_cut, shown_cuts
from gidef.models.norms import Moving, moving_statistics
from gidef.models.perturbation import Perturbation, latent_norm

PARTS = ("encoder", "perturbation", "predictor")


class Outputs(NamedTuple):
    """logits (B, K).  latent: m, the latent (B, *latent_shape) after the norm (before noise); with a bottleneck its code's mean
    (B, *noise_shape).  std: σ_eff, broadcastable to `latent`, None without a perturbation.  perturbed: z̃ (B, *latent_shape), what
    the predictor saw."""

    logits: Tensor
    latent: Tensor
    std: Tensor | None
    perturbed: Tensor


class _Call:
    """State of one forward pass. Not attributes of the module: nn.Module would adopt an nn.Parameter given as noise."""

    __slots__ = ("active", "noise", "replacement", "seen")

    def __init__(self) -> None:
        self.active, self.noise, self.replacement, self.seen = False, None, None, None

    def __deepcopy__(self, memo: dict) -> _Call:
        return _Call()

    def __reduce__(self) -> tuple:
        return _Call, ()


class SplitModel(nn.Module):
    """A backbone with a latent norm and a perturbation inserted behind one of its modules.

    The insertion is a forward hook at the cut, so parameters keep the backbone's names, and blocks with extra inputs
    or channels-last layouts work as they are. The backbone, called by itself, stays what it was. A backbone serves one
    SplitModel: building another on it takes the first one's hook away.

    Args:
        backbone:     images (B, C, H, W) → logits (B, K).
        cut:          name of the module whose output is the latent; "before:NAME" for the module's input, "before:classifier" for the last
                      layer's, "stage:0" for the first stage's output (see `stages`); None takes the backbone's default (see `cuts`).
        perturbation: a Perturbation or a Bottleneck for the latent at the cut; a Perturbation's keyword arguments after the shapes; a
                      function (latent_shape, channel_dim) → either of them; or None.
        image_shape:  (C, H, W).  num_classes: K.
        latent_norm:  normalise the latent although there is no perturbation; a Perturbation always normalises, a Bottleneck never.
        input_mean, input_std: per channel, applied to the images in [0, 1] before the backbone; None leaves them.
    Attributes:
        latent_shape: of one sample.  channel_dim: 1 for maps (B, C, H, W), −1 for tokens, (B, H, W, C) and vectors.
        cut:          the name in use.  image_shape, num_classes: as given.
        parts:        "encoder" | "perturbation" | "predictor" → names, as in `named_parameters()`. Encoder: parameters
                      with a gradient path to the latent; predictor: the rest of the backbone.
        statistics:   "encoder" | "predictor" → names of the running statistics that training moves, as in `named_buffers()`.
    Raises:  InputError if the cut is unknown, gives no single tensor, is passed more than once, or is bypassed (the
             image reaches the logits around it, as inside a residual branch); if the backbone cannot take such
             images; if the perturbation's shapes are another latent's.

    Works under `torch.func.functional_call`, `vmap(grad(grad))` and `torch.compile`. `copy.deepcopy` gives an
    independent model; two threads must not share one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        cut: str | None = None,
        perturbation: Perturbation | Bottleneck | Mapping[str, Any] | Callable[..., Perturbation | Bottleneck] | None = None,
        image_shape: Sequence[int],
        num_classes: int,
        latent_norm: bool = False,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.image_shape, self.num_classes = tuple(image_shape), num_classes
        self.cut = default_cut(backbone) if cut is None else check_cut(backbone, cut)
        self.latent_norm = latent_norm
        self.backbone = backbone
        self._call = _Call()
        self._resumes = hasattr(backbone, "forward_from") and self.cut in cuts(backbone)
        self.register_buffer("input_mean", _per_channel("input_mean", input_mean, self.image_shape[0]), persistent=False)
        self.register_buffer("input_std", _per_channel("input_std", input_std, self.image_shape[0]), persistent=False)
        _remove_hooks(backbone)
        encoder, before, self.latent_shape, self.channel_dim = _probe(backbone, self.cut, self.image_shape, num_classes)
        module = backbone.get_submodule(self.cut.removeprefix(BEFORE))
        if self.cut.startswith(BEFORE):
            module.register_forward_pre_hook(self._before_cut)
        else:
            module.register_forward_hook(self._at_cut)  # a bound method: deepcopy rebinds it to the copy
        if isinstance(perturbation, Mapping):
            perturbation = Perturbation(self.latent_shape, self.channel_dim, **perturbation)
        elif callable(perturbation) and not isinstance(perturbation, nn.Module):
            perturbation = perturbation(self.latent_shape, self.channel_dim)
        if perturbation is not None and (perturbation.latent_shape, perturbation.channel_dim) != (self.latent_shape, self.channel_dim):
            raise InputError(
                f"the perturbation is made for latents {perturbation.latent_shape} with channel_dim {perturbation.channel_dim}, but those at "
                f"{self.cut!r} are {self.latent_shape} with channel_dim {self.channel_dim}. Build it from the model's latent_shape and channel_dim."
            )
        self.perturbation = perturbation
        names = [name for name, _ in self.named_parameters()]
        of_backbone = [name for name in names if name.startswith("backbone.")]
        self.parts: dict[str, tuple[str, ...]] = {
            "encoder": tuple(name for name in of_backbone if name in encoder),
            "perturbation": tuple(name for name in names if name.startswith("perturbation.")),
            "predictor": tuple(name for name in of_backbone if name not in encoder),
        }
        found = tuple(moving_statistics(self))
        early = tuple(name for name in found if name.rpartition(".")[0].removeprefix("backbone").removeprefix(".") in before)
        self.statistics = {"encoder": early, "predictor": tuple(name for name in found if name not in early)}

    def forward(self, images: Tensor, noise: Tensor | None = None, *, full: bool = False) -> Tensor | Outputs:
        """Logits (B, K), or with `full` all Outputs.

        Args:    images: floating (B, *image_shape) in [0, 1].  noise: ε of unit variance, (B, *perturbation.noise_shape); None is no noise.
        Raises:  InputError for noise without a perturbation.
        """
        if noise is not None and self.perturbation is None:
            raise InputError("noise was given to a model without a perturbation: build it with one, or pass noise=None.")
        call = self._call
        call.active, call.noise = True, noise
        try:
            logits = self.backbone(self._normalised(images))
            latent, std, perturbed = call.seen
        finally:
            call.active, call.noise, call.seen = False, None, None
        return Outputs(logits, latent, std, perturbed) if full else logits

    def run(self, images: Tensor, noise: Tensor | None = None) -> Outputs:
        """`forward` with all Outputs."""
        return self(images, noise, full=True)

    def predict(self, perturbed: Tensor) -> Tensor:
        """Logits (B, K) from z̃ (B, *latent_shape), as the predictor would give them.

        A backbone with `forward_from(cut, latent)`, such as SmallNet, skips the encoder; others run it on black images.
        """
        if self._resumes:
            return self.backbone.forward_from(self.cut, perturbed)
        call = self._call
        call.active, call.replacement = True, perturbed
        try:
            return self.backbone(perturbed.new_zeros((perturbed.shape[0], *self.image_shape)))
        finally:
            call.active, call.replacement = False, None

    def _before_cut(self, module: nn.Module, inputs: tuple) -> tuple:
        return self._at_cut(module, inputs, inputs[0]), *inputs[1:]

    def _at_cut(self, module: nn.Module, inputs: tuple, latent: Tensor) -> Tensor:
        call = self._call
        if not call.active:
            return latent
        if call.replacement is not None:
            return call.replacement
        std = None
        if self.perturbation is not None:
            latent, std = self.perturbation(latent)
        elif self.latent_norm:
            latent = latent_norm(latent)
        perturbed = latent if call.noise is None else latent + std * call.noise
        if self.perturbation is not None:
            perturbed = self.perturbation.restore(perturbed)
        call.seen = (latent, std, perturbed)
        return perturbed

    def _normalised(self, images: Tensor) -> Tensor:
        if self.input_mean is not None:
            images = images - self.input_mean
        return images if self.input_std is None else images / self.input_std


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> Tensor | None:
    """(C, 1, 1) from one value per channel."""
    if values is None:
        return None
    tensor = torch.tensor(list(values), dtype=torch.get_default_dtype()).reshape(-1, 1, 1)
    if len(tensor) != channels or not tensor.isfinite().all() or (name == "input_std" and (tensor <= 0).any()):
        raise InputError(f"{name}={list(values)}: expected {channels} finite values, one per image channel{', above 0' * (name == 'input_std')}.")
    return tensor


def _remove_hooks(backbone: nn.Module) -> None:
    """Take away the hook of an earlier SplitModel on the same backbone."""
    own = (SplitModel._at_cut, SplitModel._before_cut)
    for module in backbone.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__func__", None) in own:
                    del hooks[key]


def _probe(backbone: nn.Module, cut: str, image_shape: tuple[int, ...], num_classes: int) -> tuple[set[str], set[str], tuple[int, ...], int]:
    """Run two grey images through: (names of the encoder's parameters, BatchNorm that ran before the latent was there, latent_shape, channel_dim)."""
    # A copy in eval mode, on aliases of the weights: running statistics, train mode and frozen parameters stay as they are.
    shadow = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()}).eval()
    weights = {name: p.detach().requires_grad_() for name, p in backbone.named_parameters()}
    some = next(iter(weights.values()), torch.zeros(()))
    images = torch.full((2, *image_shape), 0.5, device=some.device, dtype=some.dtype, requires_grad=True)
    latents: list[Any] = []

    def cut_off(module: nn.Module, inputs: tuple, output: Any) -> Any:
        latents.append(output)
        return output.detach().requires_grad_() if isinstance(output, Tensor) else output

    before: set[str] = set()
    for name, layer in shadow.named_modules():
        if isinstance(layer, Moving):
            layer.register_forward_hook(lambda module, inputs, output, name=name: None if latents else before.add(name))
    place = shadow.get_submodule(cut.removeprefix(BEFORE))
    if cut.startswith(BEFORE):
        place.register_forward_pre_hook(lambda module, inputs: (cut_off(module, inputs, inputs[0] if inputs else None), *inputs[1:]))
    else:
        place.register_forward_hook(cut_off)
    with torch.enable_grad():
        try:
            logits = functional_call(shadow, weights, (images,))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise InputError(
                f"{type(backbone).__name__} cannot take images of shape {image_shape} ({error}). Choose another image size, cut or backbone."
            ) from error
        if len(latents) != 1 or not isinstance(latents[0], Tensor) or latents[0].ndim < 2 or len(latents[0]) != 2:
            what = f"is passed {len(latents)} times" if len(latents) != 1 else "does not give one tensor with the batch first"
            raise InputError(f"cut {cut!r} {what} in {type(backbone).__name__}. Choose one of {shown_cuts(backbone)}.")
        latent = latents[0]
        if logits.shape != (2, num_classes):
            raise InputError(f"{type(backbone).__name__} gives {tuple(logits.shape)} for 2 images; expected (2, {num_classes}), logits per class.")
        if not latent.requires_grad or (logits.requires_grad and torch.autograd.grad(logits.sum(), images, allow_unused=True, retain_graph=True)[0] is not None):
            raise InputError(
                f"cut {cut!r} is bypassed in {type(backbone).__name__}: the logits see the image around it, so noise there would protect "
                f"nothing. Choose one of {shown_cuts(backbone)}."
            )
        gradients = torch.autograd.grad(latent.sum(), list(weights.values()), allow_unused=True) if weights else ()
    encoder = {"backbone." + name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    return encoder, before, tuple(latent.shape[1:]), _channel_dim(backbone, latent, image_shape)


def _channel_dim(backbone: nn.Module, latent: Tensor, image_shape: tuple[int, ...]) -> int:
    """Where the channels of a latent are. A square image's map has two equal sides; timm's output_fmt decides the rest."""
    if latent.ndim != 4:
        return -1
    first, second, third = latent.shape[1:]
    if image_shape[1] == image_shape[2] and (first == second) != (second == third):
        return -1 if first == second else 1
    return -1 if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else 1
