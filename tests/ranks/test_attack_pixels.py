"""Reconstructions do not depend on the number of ranks, on how many attacks are one program, on the schedule, nor on a kill. In float64. Synthetic cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gidef.checkpoint import load_file
from tests.ranks.launch import run, run_until

pytestmark = pytest.mark.ranks
RECIPE = "../tests/ranks/double_recipe.py"


def reconstructed(folder: Path) -> dict[tuple, dict[str, torch.Tensor]]:
    """By cell and attack, what is in the files of whoever attacked."""
    found = {}
    for path in sorted((folder / "attacks").rglob("attacks-*.safetensors")):
        tensors, _ = load_file(path)
        for row, (observation, start) in enumerate(tensors["attacks"].tolist()):
            found[str(path.parent.relative_to(folder)), observation, start] = {name: tensor[row] for name, tensor in tensors.items()}
    return found


def attacked(ranks: int, folder: Path, *more: str) -> dict[tuple, dict[str, torch.Tensor]]:
    run(ranks, RECIPE, "--out", str(folder), "--speed.workers", "1", "--speed.attack-mode", "vmap", *more)
    return reconstructed(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return attacked(1, tmp_path_factory.mktemp("alone") / "run", "--speed.attacks-at-once", "8")


def same(found, expected):
    assert found.keys() == expected.keys() and len(expected) == 3 * 4 * 2 + 2 * 4 + 2 * 2 * 2  # naive twice, joint on the learned net; victims; starts; tuned twice; its settings on other images (one lr gives other pixels than another)
    for key, one in expected.items():
        torch.testing.assert_close(found[key]["images"], one["images"], rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(found[key]["losses"], one["losses"], rtol=1e-6, atol=1e-9)
    images = torch.stack([one["images"] for one in expected.values()])
    assert (images - images[:1]).abs().amax((1, 2, 3, 4))[1:].min() > 0.1  # and they are not all the same


@pytest.mark.parametrize(("ranks", "at_once", "schedule"), [(3, 3, "dynamic"), pytest.param(2, 1, "static", marks=pytest.mark.slow)])
def test_the_pixels_of_one_rank(alone, tmp_path, ranks, at_once, schedule):
    same(attacked(ranks, tmp_path / "run", "--speed.attacks-at-once", str(at_once), "--speed.schedule", schedule), alone)


@pytest.mark.slow
def test_the_pixels_after_a_kill(alone, tmp_path):
    folder = tmp_path / "run"
    more = ("--speed.attacks-at-once", "2")
    run_until(
        lambda: any((folder / "attacks").rglob("attacks-*.safetensors")), 1, RECIPE, "--out", str(folder), "--speed.workers", "1", "--speed.attack-mode", "vmap", *more
    )  # fmt: skip
    before = reconstructed(folder)
    assert 0 < len(before) < len(alone)
    same(attacked(2, folder, *more, "--resume"), alone)
