"""The judge: a clean classifier, trained apart from the clients, that says what can be recognised in reconstructions."""

from __future__ import annotations

import math

from torch import Tensor, nn

from gidef.models.backbone import make_backbone
from gidef.models.seeding import seeded


def make_judge(num_classes: int, image_shape: tuple[int, ...], seed: int) -> Judge:
    """A judge with initial weights from `seed`; the global random state is as before when this returns."""
    with seeded(seed, "judge"):
        return Judge(num_classes, image_shape)


def judge_called(name: str, *, num_classes: int, image_shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """A judge by the name of its network: "judge" is `Judge`; all others as `make_backbone` takes them, with their own BatchNorm, after (x − ½) / ¼.

    Raises: InputError for unknown names.
    """
    if name == "judge":
        return make_judge(num_classes, image_shape, seed)
    return nn.Sequential(Halved(), make_backbone(name, num_classes=num_classes, image_shape=image_shape, norm="keep", seed=seed))


class Halved(nn.Module):
    """(x − ½) / ¼ of images in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5) / 0.25


class Judge(nn.Module):
    """A small residual net, 24-48-96 channels, 0.26 M parameters; images are halved three times up to 45 pixels, and once more per doubling.

    With BatchNorm, which no client ever trains here and which learns faster than GroupNorm: 0.95 instead of 0.93
    accuracy on 28-pixel blood cells after 6 epochs of Adam with a one-cycle rate. Use it in eval mode, or reconstructions judged
    together influence each other.

    Shapes:  images (B, C, H, W) in [0, 1] → logits (B, num_classes).
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        extra = max(0, round(math.log2(max(image_shape[1:]) / 32)))
        self.body = nn.Sequential(
            _conv(image_shape[0], 24, stride=2),
            *(_conv(24, 24, stride=2) for _ in range(extra)),
            _conv(24, 48, stride=2), _Residual(48), _conv(48, 96, stride=2), _Residual(96),
        )  # fmt: skip
        self.head = nn.Linear(96, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer reads: (B, 96)."""
        return self.body(images).mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
