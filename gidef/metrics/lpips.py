"""LPIPS, optional: its backbone's ImageNet weights are a download, so nothing else depends on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gidef.errors import InputError
from gidef.metrics.images import clamped_pair

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
SMALLEST = 64  # pixels: AlexNet's pooling leaves nothing of 28 px images


def lpips_distance(
    net: str = "alex", *, device: torch.device | str = "cpu", download: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Load LPIPS once and return distance(x, y) → (B,) in [0, ∞), 0 for equal images.

    distance takes images (B, C, H, W), C of 1 or 3, floating, and clamps them to [0, 1]. Grey images are repeated to
    three channels; sides shorter than 64 px are enlarged to 64 bilinearly, a deviation from LPIPS to be stated.

    Args:    net: "alex", "vgg" or "squeeze".  device: where it runs.  download: let torchvision fetch missing weights.
    Raises:  InputError for an unknown net, or if the weights are absent and may not, or cannot, be fetched.
    Source:  Zhang et al. 2018, linear weights v0.1, through TorchMetrics.
    """
    if net not in BACKBONES:
        raise InputError(f"LPIPS net {net!r} is unknown: choose one of {', '.join(BACKBONES)}")
    from torchvision.models import get_model_weights  # late: seconds of import that nobody else needs

    url = get_model_weights(BACKBONES[net]).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not file.exists() and not download:
        raise InputError(
            f"LPIPS needs the {BACKBONES[net]} weights at {file}, which are absent. Put {url} there, "
            "pass download=True on a machine with network, or leave LPIPS out"
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        with torch.random.fork_rng(devices=[]):  # building the net draws initial weights that the file replaces
            network = LearnedPerceptualImagePatchSimilarity(net, reduction="none", normalize=True).net.to(device).eval()
    except OSError as error:
        raise InputError(f"LPIPS could not fetch {url}: {error}. Copy the file to {file}, or leave LPIPS out") from error

    def distance(x: Tensor, y: Tensor) -> Tensor:
        images = [_prepared(batch).to(device) for batch in clamped_pair(x, y)]
        with torch.no_grad():
            return network(*images, normalize=True).flatten()

    return distance


def _prepared(images: Tensor) -> Tensor:
    """Three float32 channels, at least SMALLEST on each side."""
    height, width = (max(side, SMALLEST) for side in images.shape[-2:])
    images = images.float().expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(images, (height, width), mode="bilinear", align_corners=False)
