"""A4: closed forms. What an update says of the private images exactly, without a search."""

from gidef.attack.analytic.april import april_tokens, invert_patches, patch_inputs, pixels_of_tokens
from gidef.attack.analytic.choose import Applicable, analytic, can_invert
from gidef.attack.analytic.linear import input_candidates, invert_linear, layer_inputs, linear_inputs, separate_inputs
from gidef.attack.analytic.rgap import Rank, rank_index, rgap, rgap_ranks

__all__ = [
    "Applicable",
    "Rank",
    "analytic",
    "april_tokens",
    "can_invert",
    "input_candidates",
    "invert_linear",
    "invert_patches",
    "layer_inputs",
    "linear_inputs",
    "patch_inputs",
    "pixels_of_tokens",
    "rank_index",
    "rgap",
    "rgap_ranks",
    "separate_inputs",
]
