"""A4 as one attack: the closed form that applies to a model, or the reasons why none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

from gidef.attack.analytic.april import PatchLayer, find_patch_layer, invert_patches
from gidef.attack.analytic.linear import FirstLinear, find_first_linear, invert_linear
from gidef.attack.analytic.outcome import check_fit, failed, labels_of
from gidef.attack.analytic.rgap import Chain, find_chain, rgap
from gidef.types import Observation, Reconstruction


class Applicable(NamedTuple):
    """method: "patches" | "linear" | "rgap", or "" if no closed form applies.  exact: whether it promises the images to rounding, as
    far as its systems have full rank: for a batch of one.  reason: for people: why each method does not apply, where none does.
    found: what the method needs."""

    method: Literal["patches", "linear", "rgap", ""]
    exact: bool
    reason: str
    found: PatchLayer | FirstLinear | Chain | None

    def __bool__(self) -> bool:
        return bool(self.method)


def can_invert(model: nn.Module, names: Iterable[str], *, image_shape: Sequence[int], num_examples: int = 1) -> Applicable:
    """Which closed form recovers images from an update with tensors of these names.

    In this order: a ViT's patch projection and position embedding; a biased linear layer on the image; a chain of convolutions (R-GAP,
    one image only). It depends on the architecture, on what is released and on the batch size, never on an update's values.

    Args:    model: the attacker's copy of the architecture; it is copied and run on a few made-up images.
    """
    names, reasons = list(names), []
    looks = {"patches": find_patch_layer, "linear": find_first_linear, "rgap": find_chain}
    for method, look in looks.items():
        found = look(model, names, image_shape)
        if method == "rgap" and num_examples != 1 and not isinstance(found, str):
            found = f"the recursion is that of one image, not of a batch of {num_examples}"
        if not isinstance(found, str):
            return Applicable(method, num_examples == 1, "", found)
        reasons.append(found)
    return Applicable(
        "", False, f"no closed form applies: as a transformer, {reasons[0]}; as a linear layer, {reasons[1]}; as a chain, {reasons[2]}", None
    )


def analytic(observation: Observation, model: nn.Module, *, image_shape: Sequence[int], num_classes: int) -> Reconstruction:
    """The closed form that applies to this observation, see `can_invert`, `invert_patches`, `invert_linear` and `rgap`.

    Args:    observation: a gradient, or the delta of one local step of SGD; of more steps, an approximation.
             model: the attacker's copy of the architecture, from images in [0, 1] to logits, with its normalisation inside, such as a
             SplitModel. Its own weights are used where the observation sends none.
    Returns: one Reconstruction; "failed" with the reason where no closed form applies, or the update is zero or not finite.
    Raises:  InputError if the observation is not one of this model, or granted labels do not fit.
    """
    check_fit(observation, model, image_shape)
    applicable = can_invert(model, observation.update, image_shape=image_shape, num_examples=observation.num_examples)
    setting = {"image_shape": image_shape, "num_classes": num_classes}
    if applicable.method == "patches":
        return invert_patches(observation, model, layer=applicable.found, **setting)
    if applicable.method == "linear":
        return invert_linear(observation, model, layer=applicable.found, **setting)
    if applicable.method == "rgap":
        return rgap(observation, model, chain=applicable.found, **setting)
    return failed(observation, image_shape, labels_of(observation, num_classes), applicable.reason)
