"""A model in shards (FSDP2) is attacked as one in a piece: two gloo ranks that meet through a file, float64, images to 1e-8."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import gidef
from gidef.attack import Matching, drain, naive
from gidef.attack.large import invert_large
from gidef.types import Observation

pytestmark = pytest.mark.ranks
SHAPE, CLASSES, SIZE = (2, 6, 6), 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.qkv, self.project = nn.LayerNorm(10), nn.LayerNorm(10), nn.Linear(10, 30), nn.Linear(10, 10)
        self.mlp = nn.Sequential(nn.Linear(10, 15), nn.ReLU(), nn.Linear(15, 10))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 5)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """Fused attention, gates, and tensors that two ranks share unevenly: 1, 3 and 15 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(2, 10, 2, 2), nn.Parameter(torch.zeros(1, 9, 10))
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(2)]), nn.Linear(10, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def case() -> tuple[nn.Module, Observation]:
    """The same net and observation on every rank."""
    torch.manual_seed(0)
    model = Transformer().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images, labels = torch.rand(2, *SHAPE, dtype=torch.float64), torch.tensor([0, 2])
    update = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return model, Observation(params, dict(zip(params, update, strict=True)), 2, labels=labels)


def sharded(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    names = ("replicas", "shards")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = copy.deepcopy(model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def attacked(observation: Observation, model: nn.Module, settings: Matching, **options: object) -> tuple[dict[str, Tensor], Tensor]:
    """The result, and the float64 candidates of all iterations."""
    seen = []

    def watch(images: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        seen.append(images.clone())
        return torch.zeros(len(images), dtype=images.dtype), torch.zeros_like(images)

    result = drain(invert_large(observation, model, dataclasses.replace(settings, coupling=watch), seed=3, **options))
    return result, torch.stack(seen)


def shards(rank: int) -> None:
    whole, observation = case()
    # whole observations on every rank, over all ranks and over replicas of one shard; and one in shards
    for shape, change, options, held in (
        ((SIZE,), {}, {}, "whole"),
        ((SIZE,), {"distance": "l2", "kink_width": None}, {"checkpointing": True}, "whole"),
        ((SIZE, 1), {"distance": "cosine_layers"}, {}, "whole"),
        ((1, SIZE), {}, {}, "shards"),
    ):
        settings = naive(image_shape=SHAPE, num_classes=CLASSES, iterations=6, difference_step=1e-4, **change)
        expected, reference = attacked(observation, whole, settings, **options)
        model = sharded(whole, shape)
        weights, given = dict(model.named_parameters()), observation
        assert all(isinstance(parameter, DTensor) for parameter in weights.values())
        if held == "shards":
            laid = {
                field: {n: distribute_tensor(t, weights[n].device_mesh, weights[n].placements) for n, t in getattr(observation, field).items()}
                for field in ("params", "update")
            }
            given = dataclasses.replace(observation, **laid)
        before = {name: parameter.to_local().clone() for name, parameter in weights.items()}
        with torch.no_grad():
            for parameter in weights.values():
                parameter.to_local().zero_()  # the attack itself sets the observation's
        found, seen = attacked(given, model, settings, **options)
        assert reference[-1].sub(reference[0]).abs().max() > 0.05, "nothing moved"
        torch.testing.assert_close(seen, reference, rtol=0, atol=1e-8)
        for name in ("images", "losses", "fit", "first_fit"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
        assert found["loss"] < found["losses"][0, 0]
        for name, parameter in weights.items():
            assert torch.equal(parameter.to_local(), before[name]), name
        everyone = [torch.empty_like(seen) for _ in range(SIZE)]
        dist.all_gather(everyone, seen)
        assert all(torch.equal(seen, other) for other in everyone), "ranks have drifted apart"


def start(case: str, rank: int, folder: Path) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
    environ |= {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, case, str(rank), str(folder)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_model_in_shards_gives_the_images_of_one_in_a_piece_and_comes_back_bit_by_bit(tmp_path: Path) -> None:
    processes = [start("shards", rank, tmp_path) for rank in range(SIZE)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * SIZE, "\n".join(outputs)


if __name__ == "__main__":
    name, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=SIZE)
    try:
        {"shards": shards}[name](rank)
    finally:
        dist.destroy_process_group()
