"""Robust rules and the sharded server step on one, two and three gloo ranks against one alone. Data are synthetic; ranks meet through a file."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gidef
from gidef.checkpoint import weights_sha256
from gidef.parallel import World, open_world, robust, robust_over_world
from gidef.rng import generator
from gidef.rounds.robust import krum, median, trimmed_mean
from gidef.types import Client, Update

pytestmark = pytest.mark.ranks
TEMPLATE = {"w": torch.zeros(301, 7), "b": torch.zeros(3), "s": torch.zeros(())}
SIZES = (5, 90, 1, 33, 8, 8, 60)
SCHEDULES = ("longest_first", "static", "dynamic")
RULES = {"median": median(), "trimmed": trimmed_mean(share=0.2), "krum": krum(byzantine=1), "multi": krum(byzantine=2, chosen=4)}


def clients() -> list[Client]:
    return [Client(k, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)) for k, n in enumerate(SIZES)]


def shared_update(client: Client, worker: int, *, round: int = 0) -> Update:
    draws = generator(0, "update", round, client.id)
    lie = 1e6 if client.id == 3 else 1.0
    return Update({name: lie * torch.randn(t.shape, generator=draws) for name, t in TEMPLATE.items()}, client.num_examples, {"loss": client.id / 7})


def rules(world: World) -> dict[str, str]:
    """Hashes of the results, the same for all schedules."""
    robust.BLOCK = 256  # nine blocks
    found = {}
    for name, rule in RULES.items():
        hashes = set()
        for schedule in SCHEDULES:
            run = robust_over_world(world, rule, workers=1 + (schedule == "static"), schedule=schedule)
            mean = run(shared_update, clients(), template=TEMPLATE, metric_names=["loss"])
            hashes.add(weights_sha256(mean.delta))
            assert max(t.abs().max() for t in mean.delta.values()) < 5 and mean.num_examples == sum(SIZES) and min(mean.seconds) > 0
        (found[name],) = hashes
    few = robust_over_world(world, median())(shared_update, clients()[:2], template=TEMPLATE, metric_names=["loss"])  # the third rank has none
    return found | {"few": weights_sha256(few.delta), "loss": str(few.metrics)}


CASES = {"rules": rules}


@functools.cache
def alone(case: str) -> str:
    return json.dumps(CASES[case](World()))


@pytest.mark.parametrize("case", CASES)
def test_two_and_three_ranks_give_the_bits_of_one(case: str, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
    environ |= {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for size in (2, 3):
        commands = [[sys.executable, "-m", "tests.ranks.test_server_side", case, str(rank), str(size), str(tmp_path)] for rank in range(size)]
        processes = [
            subprocess.Popen(one, env=environ, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for one in commands
        ]
        try:
            outputs = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)
        assert {output.splitlines()[-1] for output in outputs} == {alone(case)}


if __name__ == "__main__":
    case, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    with open_world("cpu", timeout_s=60, init_method=f"file://{folder / f'meet-{size}'}", rank=rank, size=size) as world:
        print(json.dumps(CASES[case](world)))
