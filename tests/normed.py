"""A small net with BatchNorm of PyTorch's and timm's, as a recipe names it, and a file with weights and running statistics of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import nn

from gidef.rng import generator


def net(num_classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Tanh(),
        nn.Conv2d(6, 8, 3, 2, 1), BatchNormAct2d(8, act_layer=nn.SiLU), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8, affine=False), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


NET, CUT = f"{__file__}:net", "3"


def pretrained(path: Path, seed: int = 0, num_classes: int = 8, image_shape: tuple[int, ...] = (3, 16, 16)) -> Path:
    """Weights and statistics as a training may have left them."""
    draw, model = generator(seed, "pretrained"), net(num_classes, image_shape)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=draw) + 0.3
        elif tensor.is_floating_point():
            state[name] = (1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0) + 0.3 * torch.randn(tensor.shape, generator=draw)
    save_file({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)
    return path
