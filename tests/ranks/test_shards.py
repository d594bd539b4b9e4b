"""A client on two ranks learns what it learns on one, and ends with the same bits on any number of groups, killed or not. Synthetic cells, gloo."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gidef.config import LocalTraining, Recipe, Soteria, Speed, problems
from gidef.errors import InputError
from gidef.parallel import Layout, World, checkpoints
from tests.ranks.launch import ROOT, environment
from tests.ranks.shards_recipe import VARIANTS, trained

pytestmark = pytest.mark.ranks
SCRIPT = Path(__file__).parent / "shards_recipe.py"
CLOSE = 1e-5  # of plain steps; of Adam's see test_shards_for_long


def work(folder: Path, **stages: str) -> dict[int, list[dict]]:
    """What each rank tells, by the size of its world; stages: two="task,task", four="task"."""
    sizes = {2 if name == "two" else 4: tasks for name, tasks in stages.items()}
    written = [f"{size}={tasks}" for size, tasks in sizes.items()]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--worker", str(rank), str(folder), *written],
            cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(max(sizes))
    ]  # fmt: skip
    said = [process.communicate(timeout=1200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * len(ranks), "\n".join(said)
    return {size: [json.loads((folder / f"rank-{rank}-of-{size}.json").read_text()) for rank in range(size)] for size in sizes}


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "models" / "learned-0.safetensors")


def apart(left: Path, right: Path) -> float:
    """‖left − right‖ / ‖what right learned‖ over the final models, which began with the same weights."""
    mine, theirs, start = model(left), model(right), load_file(right / "snapshots" / "learned-0" / "untrained.safetensors")
    begun = load_file(left / "snapshots" / "learned-0" / "untrained.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(begun[name], start[name]) for name in start)
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: tensor.shape for name, tensor in theirs.items()}
    learned = torch.cat([(theirs[name] - start.get(name, 0)).flatten() for name in theirs]).norm()
    return float(torch.cat([(mine[name] - theirs[name]).flatten() for name in theirs]).norm() / learned)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each variant on one rank per client."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {name: trained(recipe, folder / name, World()) for name, recipe in VARIANTS.items()}


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone):
    """Each variant on one group of two ranks, and on two groups; folders by the number of ranks."""
    folder = tmp_path_factory.mktemp("together")
    whole = folder / "2" / "plain-resume_whole"  # begun by one rank
    shutil.copytree(alone[0] / "plain", whole)
    (whole / "models" / "learned-0.safetensors").unlink()
    (whole / "checkpoints" / "learned-0" / "round-000002.safetensors").unlink()
    two = [*VARIANTS, *(f"plain:{how}" for how in ("three", "diverges", "killed", "resume", "resume_whole"))]
    return folder, work(folder, two=",".join(two), four="plain,plain:resume")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_client_on_two_ranks_learns_what_it_learns_on_one(alone, together, name):
    assert apart(together[0] / "2" / name, alone[0] / name) < CLOSE
    mine, theirs = together[1][2][0][name], alone[1][name]
    assert (mine["parameters"], mine["bytes"]) == (theirs["parameters"], theirs["bytes"])


def test_two_groups_of_ranks_end_with_the_bits_of_one_and_so_does_a_killed_run_on_either(together):
    folder, ranks = together
    assert not (folder / "2" / "plain-killed" / "models").exists()
    told = [rank[task]["sha"] for size in (2, 4) for rank in ranks[size] for task in ("plain", "plain:resume")]
    assert len(told) == 12 and len(set(told)) == 1


def test_a_run_may_change_its_shard_size_between_two_lives(alone, together, tmp_path):
    shutil.copytree(together[0] / "2" / "plain-killed", tmp_path / "run")
    trained(dataclasses.replace(VARIANTS["plain"], resume=True), tmp_path / "run", World())
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "learned-0").iterdir()) == ["round-000001", "round-000002.safetensors"]
    for place in (tmp_path / "run", together[0] / "2" / "plain-resume_whole"):
        assert apart(place, alone[0] / "plain") < CLOSE


def test_the_newest_checkpoints_are_whole_and_in_slices_that_no_pickle_holds(together):
    folder = together[0] / "2" / "plain" / "checkpoints" / "learned-0"
    assert sorted(path.name for path in folder.iterdir()) == ["round-000001", "round-000002"]
    files = sorted(path.name for path in (folder / "round-000002").iterdir())
    assert files[0] == "meta.json" and len(files) == 3 and all(name.endswith(".safetensors") for name in files[1:])
    sizes = [path.stat().st_size for path in (folder / "round-000002").glob("*.safetensors")]
    assert min(sizes) > 0.4 * sum(sizes)  # each rank wrote its half


def test_a_damaged_checkpoint_is_passed_over_and_half_a_one_does_not_count(together, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(together[0] / "2" / "plain" / "checkpoints" / "learned-0", folder)
    (folder / "round-000003").mkdir()
    (folder / "round-000003" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoints.newest(folder, lambda text: None) == 2
    place = next((folder / "round-000002").glob("*.safetensors"))
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    said: list[str] = []
    assert checkpoints.newest(folder, said.append) == 1
    assert "damaged" in said[0] and (folder / "round-000002.damaged").exists()
    shutil.rmtree(folder / "round-000001")
    (folder / "round-000002.damaged").rename(folder / "round-000002")
    for _ in range(2):  # it stays where it is, so that no later start begins anew in silence
        with pytest.raises(InputError, match="no good checkpoint"):
            checkpoints.newest(folder, said.append)


def test_whole_tensors_are_read_from_slices_as_they_were(together):
    tensors, meta = checkpoints.load(together[0] / "2" / "plain" / "checkpoints" / "learned-0", 2, None, torch.device("cpu"))
    assert meta["round"] == 2
    for name, tensor in model(together[0] / "2" / "plain").items():
        assert torch.equal(tensors[f"best/{name}"], tensor)


def test_ranks_that_fill_no_group_and_a_loss_that_is_not_finite_are_told_on_every_rank(together):
    for rank in together[1][2]:
        assert "speed.shard_size=3" in rank["plain:three"]["error"] and "2 rank(s)" in rank["plain:three"]["error"]
        assert "diverged" in rank["plain:diverges"]["error"]


@pytest.mark.parametrize(
    ("speed", "change", "message"),
    [
        (Speed(offload="cpu"), {}, "speed.offload=cpu needs"),
        (Speed(shard_backend="deepspeed"), {}, "speed.shard_size above 1"),
        (Speed(shard_size=2, workers=2), {}, "speed.workers=2"),
        (Speed(shard_size=2, shard_backend="deepspeed"), {"clients": LocalTraining(accumulate=2)}, "clients.accumulate=2"),
        (Speed(shard_size=2, shard_backend="deepspeed"), {"clients": LocalTraining(proximal=0.1)}, "clients.proximal=0.1"),
        (Speed(shard_size=2), {"defences": {"own": Soteria()}}, "Soteria looks into"),
        (Speed(shard_size=0), {}, "speed.shard_size=0 is too small"),
    ],
)
def test_what_a_client_on_several_ranks_cannot_do_is_said_before_anything_starts(speed, change, message):
    found = problems(Recipe(speed=speed, **change))
    assert len(found) == 1 and message in found[0]
    assert problems(Recipe(speed=Speed(shard_size=2, shard_backend="deepspeed", zero_stage=2, offload="cpu"))) == []


def test_a_layout_cuts_as_torch_chunk_does_and_leaves_other_names_whole():
    tensors = {"odd": torch.arange(15.0).reshape(5, 3), "one": torch.ones(1, 4), "decoder.weight": torch.zeros(2)}
    for size in (2, 3, 7):
        for rank in range(size):
            mesh = SimpleNamespace(shard=SimpleNamespace(rank=rank, size=size))
            layout = Layout(mesh, {name: tensors[name].shape for name in ("odd", "one")})
            slices = layout.slices({**tensors, "control/odd": tensors["odd"]})
            for name in ("odd", "one"):
                chunks = tensors[name].chunk(size)
                expected = chunks[rank] if rank < len(chunks) else tensors[name][:0]
                assert torch.equal(slices[name], expected)
            assert torch.equal(slices["control/odd"], slices["odd"]) and torch.equal(slices["decoder.weight"], tensors["decoder.weight"])
            assert layout.numel(slices) == 15 + 4 + 2 + 15
            slices["odd"].zero_()
    assert tensors["odd"].sum() == 105  # slices have memory of their own
