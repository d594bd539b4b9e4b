"""Backbones by name: the small net, any timm model, or a network of the user's own."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
from timm.layers import PatchEmbed
from torch import nn

from gidef import importing
from gidef.errors import InputError
from gidef.models.pretrained import load_pretrained
from gidef.models.seeding import seeded
from gidef.models.small import SmallNet
from gidef.models.surgery import group_norm_for_batch_norm, make_differentiable, switch_off_drops, use_small_stem

SMALL_SIDE = 64
"""Largest image side, in pixels, that gets the small stem."""

_SMALL_PATCH_FILES = ("vision_transformer", "deit", "beit", "eva", "cait")
"""timm's source files whose models take a patch_size of 4; the others keep their own."""

_OURS = ("num_classes", "in_chans", "image_shape", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir", "type")
"""Options that the caller's other arguments settle, or that would have timm read files or fetch them."""


def make_backbone(
    name: str | Callable[..., nn.Module],
    *,
    num_classes: int,
    image_shape: Sequence[int],
    small_stem: bool = True,
    norm: Literal["group", "keep"] = "group",
    pretrained: str | Path | None = None,
    activation: Literal["leaky_relu", "none"] | None = None,
    fused_attention: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    untouched: bool = False,
) -> nn.Module:
    """A network from images (B, *image_shape) to logits (B, num_classes), the same in train and eval mode when norm is "group".

    Args:
        name:        "small"; a timm model's name; a callable, or its name as `importing.load` takes it, that returns an nn.Module
                     when called with num_classes=, image_shape= and the options.
        image_shape: (C, H, W).
        small_stem:  for images of at most 64 pixels a side: ResNet-like models get a 3×3 convolution of stride 1 and no
                     max-pool, ConvNeXt a patch of 2, ViT-like models a patch of 4, Swin a window that divides its grid.
                     Other models keep their stem.
        norm:        "group" turns every BatchNorm into GroupNorm with gcd(32, C) groups; "keep" leaves them.
        pretrained:  a local .safetensors file, see `load_pretrained`.
        activation:  of the small net only.
        fused_attention: timm's fused attention, which has no second derivative on the CPU.
        seed:        of the initial weights. The global random state is as before when this returns.
        options:     further keyword arguments of the model's constructor; they win over what small_stem would set.
        untouched:   without what makes it fit for gradients of gradients, and with its dropout: the same weights, to compare with.
    Raises:  InputError for unknown names (with near matches), options that the model does not take, unusable images.

    Dropout and drop-path are off unless an option whose name contains "drop" asks for them.
    """
    image_shape, options = tuple(image_shape), dict(options or {})
    if norm not in ("group", "keep"):
        raise InputError(f'norm={norm!r} is unknown: choose "group" or "keep".')
    if settled := [option for option in options if option in _OURS]:
        raise InputError(f"model options {settled} cannot be set: data, classes and weights (pretrained=, a local .safetensors file) are settled elsewhere. Leave them out.")
    with seeded(seed, "backbone"):
        if name == "small":
            backbone = _with_options(SmallNet, name, options, num_classes=num_classes, in_channels=image_shape[0], activation=activation or "leaky_relu")
        elif callable(name) or ":" in name:
            backbone = _own(name, options, num_classes=num_classes, image_shape=image_shape)
        else:
            backbone = _from_timm(name, num_classes, image_shape, small_stem, options)
    if norm == "group":
        backbone = group_norm_for_batch_norm(backbone)
    if not untouched:
        make_differentiable(backbone, fused_attention=fused_attention)
    if not untouched and not any("drop" in option for option in options):
        switch_off_drops(backbone)
    if pretrained is not None:
        load_pretrained(backbone, pretrained, statistics=norm == "keep")
    return backbone


def _with_options(make: Callable[..., nn.Module], name: object, options: Mapping[str, Any], **settled: Any) -> nn.Module:
    """make(**settled, **options); InputError where it takes no such option."""
    try:
        inspect.signature(make).bind(**settled, **options)
    except TypeError as error:
        raise InputError(f"model {name!r} does not take {sorted([*settled, *options])} as keyword arguments: {error}.") from error
    return make(**settled, **options)


def _own(name: str | Callable[..., nn.Module], options: Mapping[str, Any], **settled: Any) -> nn.Module:
    """The user's own network."""
    backbone = _with_options(importing.load(name) if isinstance(name, str) else name, name, options, **settled)
    if not isinstance(backbone, nn.Module):
        raise InputError(f"model {name!r} returned {type(backbone).__name__}: expected a torch.nn.Module.")
    return backbone


def _from_timm(name: str, num_classes: int, image_shape: tuple[int, ...], small_stem: bool, options: dict[str, Any]) -> nn.Module:
    """A timm model with random weights, for images of this shape."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, ["small", *timm.list_models()], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise InputError(f'model {name!r} is unknown.{hint} Valid names are "small", those of timm.list_models(), and "package.module:callable".')
    side = max(image_shape[1:])
    small = small_stem and side <= SMALL_SIDE
    wishes: dict[str, Any] = {"img_size": image_shape[1:]}
    if small:
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        if family in _SMALL_PATCH_FILES:
            wishes["patch_size"] = 4
        elif family.startswith("swin_transformer"):
            grid = -(-side // options.get("patch_size", 4))
            wishes["window_size"] = max(w for w in range(1, 8) if grid % w == 0)
    try:
        backbone = _create(name, wishes, {"num_classes": num_classes, "in_chans": image_shape[0]} | options)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InputError(f"model {name!r} cannot be built for images {image_shape} with options {options}: {error}") from error
    if any(0 in window for module in backbone.modules() if isinstance(window := getattr(module, "window_size", None), tuple)):
        raise InputError(  # they round a stage's grid down, where its features are rounded up
            f"timm {timm.__version__} gives {name!r} windows of 0 patches for images of {image_shape[1:]}, as do all versions before 1.0.31 where a "
            "grid of patches is odd: take timm>=1.0.31, or resize images to sides of 32 pixels (data.size=32) or a multiple of it."
        )
    patches = getattr(backbone, "patch_embed", None)
    if isinstance(patches, PatchEmbed) and any(extent % patch for extent, patch in zip(image_shape[1:], patches.patch_size, strict=True)):
        raise InputError(  # timm would leave the border out
            f"model {name!r} cuts images into patches of {patches.patch_size} pixels, which do not divide {image_shape[1:]}: "
            "choose another image size, or options with another patch_size."
        )
    return use_small_stem(backbone) if small else backbone


def _create(name: str, wishes: dict[str, Any], firm: dict[str, Any]) -> nn.Module:
    """timm's constructor, without those wishes that it does not take: only convolutional nets take no img_size, say."""
    wishes = {key: value for key, value in wishes.items() if key not in firm}
    while True:
        try:
            return timm.create_model(name, pretrained=False, **wishes, **firm)
        except TypeError as error:  # raised when arguments are bound, before any weight is made
            refused = re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error))
            if refused is None or refused[1] not in wishes:
                raise
            del wishes[refused[1]]
