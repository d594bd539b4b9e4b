"""Attacks whose tasks are slices of the victims: two ranks find what one finds, also after slices were lost. Synthetic cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gidef.checkpoint import load_file
from tests.ranks.launch import record, results, run

pytestmark = pytest.mark.ranks
RECIPE = "../tests/ranks/sliced_recipe.py"
SLICES = ["reconstructed-00000-002", "reconstructed-00002-002", "reconstructed-00004-001"]


def attempts(folder: Path) -> list[tuple]:
    """What the record says of every start of every victim."""
    told = [line for line in record(folder) if line["kind"] == "attempt"]
    return sorted((line["attack"], line["victim"], line["start"], line["status"], line["iterations"]) for line in told)


def sliced(folder: Path) -> dict[str, torch.Tensor]:
    return {str(path.relative_to(folder)): load_file(path)[0]["images"] for path in sorted((folder / "attacks").rglob("reconstructed-*.safetensors"))}


def latents(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)[0]["latents"] for path in sorted((folder / "attacks").rglob("latents-*.safetensors"))}


def test_two_ranks_find_in_slices_what_one_finds_also_after_slices_were_lost(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(1, RECIPE, "--out", str(one), "--speed.workers", "1")
    run(2, RECIPE, "--out", str(two), "--speed.workers", "1", "--speed.schedule", "dynamic")
    expected, found = sliced(one), sliced(two)
    for attack in ("latent", "learned", "imprint"):
        assert [name.split("/")[-1][:23] for name in expected if f"/{attack}/" in name] == SLICES
    assert found.keys() == expected.keys()

    def same(found: dict[str, torch.Tensor]) -> None:
        for name, images in expected.items():
            torch.testing.assert_close(found[name], images, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")

    def same_latents() -> None:
        expected, found = latents(one), latents(two)
        assert list(expected) == list(found) == ["latents-known-00000-004.safetensors", "latents-known-00004-001.safetensors"]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    same(found)
    same_latents()
    assert attempts(two) == attempts(one) and len(attempts(one)) == 5 * (2 + 1 + 1 + 1 + 1)  # two starts of A5; A12 learns for all victims at once
    rows = [{(row["attack"], row["checkpoint"]): row["psnr_db"]["mean"] for row in results(folder)["rows"]} for folder in (one, two)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-2) and len(rows[0]) == 5

    lost = [two / name for name in expected if name.endswith(f"{SLICES[1]}.safetensors")]
    kept = {name: (two / name).stat().st_mtime_ns for name in expected if two / name not in lost}
    for path in [*lost, *(two / "attacks").rglob("latents-known-00000-*"), *(two / "attacks").rglob("read/attacks-*")]:
        path.unlink()
    (two / "results.json").unlink()
    run(2, RECIPE, "--out", str(two), "--speed.workers", "1", "--resume")
    same(sliced(two))
    same_latents()
    assert {name: (two / name).stat().st_mtime_ns for name in kept} == kept  # what was there was not done again
