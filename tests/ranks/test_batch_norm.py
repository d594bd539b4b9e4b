"""BatchNorm on two ranks: the bits of one, resumed there, and a frozen net in slices to rounding. Synthetic cells, two rounds, no attacks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import launch

pytestmark = pytest.mark.ranks
POLICIES = {"keep": "head", "frozen": "full"}


def trainings(norm: str, rank: int, folder: Path, port: str) -> dict[str, Any]:
    """Hashes on two ranks, on the first alone, and resumed from its first round on two; how far a net in slices is from a whole one."""
    import dataclasses

    import torch

    from gidef import build, config
    from gidef.build import load_model
    from gidef.importing import load
    from gidef.parallel import World, open_world, with_mesh
    from gidef.report import Console
    from gidef.runs import Run, run_key
    from gidef.training import train
    from tests import normed
    from tests.small_run import RECIPE

    torch.set_num_threads(1)
    weights = normed.pretrained(folder / f"weights-{rank}.safetensors")
    data = dataclasses.replace(RECIPE.data, partition=config.Dirichlet(alpha=1.0))

    def recipe(**changes: Any) -> config.Recipe:
        model = config.Model(name=normed.NET, cut=normed.CUT, norm=norm, pretrained=str(weights))
        return dataclasses.replace(RECIPE, model=model, data=data, rounds=config.Rounds(count=2), share_policy=POLICIES[norm], **changes)

    def trained(asked: config.Recipe, world: World, where: str) -> str:
        setting = build.load_setting(asked, world=world, notice=lambda text: None)
        return train(Run(setting, world, folder / where, Console(rank=1), None, "mark"), "undefended", config.Undefended(), 0).sha256

    told: dict[str, Any] = {}
    with open_world("cpu", 60, init_method=f"tcp://127.0.0.1:{port}", rank=rank, size=2) as world:
        told["sha256"] = [trained(recipe(), world, "both")]
        if rank == 0:
            told["sha256"].append(trained(recipe(), World(), "alone"))
            key = run_key("undefended", 0)
            shutil.copytree(folder / "alone", folder / "again")
            (folder / "again" / "models" / f"{key}.safetensors").unlink()
            (folder / "again" / "checkpoints" / key / "round-000002.safetensors").unlink()
        world.barrier()
        told["sha256"].append(trained(recipe(resume=True), world, "again"))
        if norm == "frozen":
            trained(recipe(speed=dataclasses.replace(RECIPE.speed, shard_size=2)), with_mesh(world, 2, timeout_s=60), "sharded")
            cut, whole = (load_model(folder / where / "models" / "undefended-0.safetensors", load_code=load)[0].state_dict() for where in ("sharded", "both"))
            told["apart"] = max(float((cut[name] - tensor).abs().max()) for name, tensor in whole.items() if "running" not in name)
            told["statistics"] = max(float((cut[name] - tensor).abs().max()) for name, tensor in whole.items() if "running" in name)
    return told


@pytest.mark.parametrize("norm", ["keep", pytest.param("frozen", marks=pytest.mark.slow)])
def test_two_ranks_and_a_resumption_there_end_with_the_bits_of_one(norm, tmp_path):
    command, port = [sys.executable, __file__, norm], str(launch.free_port())
    place = launch.environment(PYTHONPATH=str(launch.ROOT))
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), port], env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    told = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=250)
            assert process.returncode == 0, err
            told.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
    found = [sha for one in told for sha in one["sha256"]]
    assert len(found) == 5 and len(set(found)) == 1
    if norm == "frozen":  # in slices: to rounding, with the same statistics
        assert all(one["apart"] < 2e-3 and one["statistics"] == 0 for one in told)


if __name__ == "__main__":
    norm, rank, folder, port = sys.argv[1:]
    print(json.dumps(trainings(norm, int(rank), Path(folder), port)))
