"""Networks: backbones, the perturbed split, decoders and the judge. Plain nn.Modules; nothing here trains."""

from gidef.models.backbone import make_backbone
from gidef.models.bottleneck import ConvBottleneck, LinearBottleneck
from gidef.models.cuts import cuts, default_cut, stages
from gidef.models.decoder import Decoder, decoder_for
from gidef.models.judge import Judge, judge_called, make_judge
from gidef.models.norms import (
    count_afresh,
    freeze_batch_norm,
    frozen_statistics,
    has_batch_statistics,
    move_batch_norm,
    moving,
    moving_statistics,
    running_statistics,
)
from gidef.models.perturbation import Perturbation, latent_norm
from gidef.models.small import SmallNet
from gidef.models.small_maps import multiply_over_small_maps
from gidef.models.split import Outputs, SplitModel

__all__ = [
    "ConvBottleneck",
    "Decoder",
    "Judge",
    "LinearBottleneck",
    "Outputs",
    "Perturbation",
    "SmallNet",
    "SplitModel",
    "count_afresh",
    "cuts",
    "decoder_for",
    "default_cut",
    "freeze_batch_norm",
    "frozen_statistics",
    "has_batch_statistics",
    "latent_norm",
    "make_backbone",
    "judge_called",
    "make_judge",
    "move_batch_norm",
    "moving",
    "moving_statistics",
    "multiply_over_small_maps",
    "running_statistics",
    "stages",
]
