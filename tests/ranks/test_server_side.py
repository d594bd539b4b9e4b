"""Robust rules and the sharded server step on one, two and three gloo ranks against one alone. Data are synthetic."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gidef
from gidef import build, config
from gidef.checkpoint import weights_sha256
from gidef.data import Dataset, synthetic_blood_cells
from gidef.parallel import World, mean_over_world, open_world, robust, robust_over_world, sharded_server
from gidef.parallel.sharded_server import Slices, own, sharded_step, whole
from gidef.rng import generator
from gidef.rounds.algorithm import federate
from gidef.rounds.robust import krum, median, trimmed_mean
from gidef.rounds.server import fed_adam, fed_avg, fed_yogi
from gidef.types import Client, ServerState, Update
from tests.ranks.launch import free_port
from tests.ranks.test_streamed import shards_of_tiny

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


def sharded(world: World) -> dict[str, Any]:
    """Hashes of the server after three rounds, and of its slots; the same for the whole step and the sharded one."""
    start = {name: torch.full_like(t, 0.5) for name, t in TEMPLATE.items()}
    found: dict[str, Any] = {}
    for name, step in {"momentum": fed_avg(lr=0.5, momentum=0.9), "adam": fed_adam(lr=0.1), "plain": fed_avg(), "median": fed_yogi(lr=0.1)}.items():
        slices = Slices(world, TEMPLATE)
        if name == "median":
            over, steps = robust_over_world(world, median()), (step, sharded_step(step, slices, sliced=False))
            overs = (over, over)
        else:
            overs = mean_over_world(world), mean_over_world(world, slices=slices)
            steps = step, sharded_step(step, slices, sliced=True)
        whole_state, sliced_state = ServerState(start), ServerState(start)
        for round in range(3):
            update = functools.partial(shared_update, round=round)
            both = [over(update, clients(), template=TEMPLATE, metric_names=["loss"]) for over in overs]
            assert both[0].metrics == both[1].metrics and both[0].num_examples == both[1].num_examples and min(both[1].seconds) > 0
            whole_state, sliced_state = steps[0](whole_state, both[0].delta), steps[1](sliced_state, both[1].delta)
            again = whole(sliced_state, slices, everywhere=True)
            assert all(bool(values) == (world.rank == 0) for values in whole(sliced_state, slices).slots.values())
            for slot, values in sliced_state.slots.items():
                assert sum(t.numel() for t in values.values()) == slices.end - slices.begin <= -(-2111 // world.size), "a slice of the slots"
                assert all(torch.equal(t, own(again, slices).slots[slot][n]) for n, t in values.items())
            assert all(torch.equal(sliced_state.params[n], t) for n, t in whole_state.params.items())
            assert again.slots.keys() == whole_state.slots.keys()
            assert all(torch.equal(again.slots[slot][n], t) for slot, values in whole_state.slots.items() for n, t in values.items())
        found[name] = [weights_sha256(sliced_state.params), *(weights_sha256(again.slots[slot]) for slot in sorted(again.slots))]
    exact = mean_over_world(world)(shared_update, clients(), template=TEMPLATE, metric_names=["loss"])
    for slices in (None, Slices(world, TEMPLATE)):
        rounded = mean_over_world(world, reduction="float32", slices=slices)(shared_update, clients(), template=TEMPLATE, metric_names=["loss"])
        world.agree("a sum in float32", json.dumps(rounded.metrics))
        delta = rounded.delta if slices is None else slices.gather(rounded.delta, TEMPLATE)
        world.agree("a sum in float32", weights_sha256(delta))
        assert rounded.metrics == exact.metrics and rounded.count == 7
        for name, t in exact.delta.items():
            torch.testing.assert_close(delta[name], t, rtol=1e-5, atol=1e-1)  # beside terms of 1e6
    return found


def streamed(world: World, folder: Path) -> dict[str, str]:
    """Hashes after two rounds with clients that stream in several windows, a sharded server and a common queue; and in one window, as in memory."""
    if world.rank == 0:
        shards_of_tiny(folder / f"shards-{world.size}")
    world.barrier()
    found = {}
    for name, data in {
        "windows": {"stream": True, "stream_buffer": 20},
        "one window": {"stream": True},
        "memory": {"name": "tests.ranks.test_server_side:few_cells", "partition": config.Dirichlet(alpha=1.0), "min_examples": 8},
    }.items():
        place = {"path": str(folder / f"shards-{world.size}")} if "stream" in data else {}
        recipe = config.Recipe(
            data=config.Data(num_clients=4, stream_sample=64, **place, **data), clients=config.LocalTraining(batch_size=16),
            rounds=config.Rounds(count=2, cohort_size=3, server=config.FedAdam()), evaluation=config.Evaluation(num_victims=2, num_tuning=0),
            speed=config.Speed(workers=1, sharded_server=name != "memory", clients_schedule="longest_first" if name == "memory" else "dynamic"),
        )  # fmt: skip
        assert not config.problems(recipe)
        setting = build.load_setting(recipe, world=world, notice=lambda text: None)
        training = build.make_training(setting, config.Undefended(), seed=0, world=world, state_folder=folder / f"clients-{world.size}")
        *_, last = federate(training.server, setting.clients, rounds=2, draw=training.draw, run=training.run)
        server = last.server if training.slices is None else whole(last.server, training.slices, everywhere=True)
        found[name] = weights_sha256(server.params) + weights_sha256(server.slots["v"])
        again = training.to_save(training.taken_up(server))
        assert world.rank or weights_sha256(again.slots["v"]) == weights_sha256(server.slots["v"])
    assert found["one window"] == found["memory"] != found["windows"]
    return found


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=240, val=64, test=64)


def everything(world: World, folder: Path) -> str:
    robust.BLOCK, sharded_server.BLOCK = 256, 100  # several blocks each
    return json.dumps({"rules": rules(world), "sharded": sharded(world), "streamed": streamed(world, folder)})


@pytest.mark.timeout(600)
def test_two_and_three_ranks_give_the_bits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "BLOCK", robust.BLOCK)  # put back afterwards
    monkeypatch.setattr(sharded_server, "BLOCK", sharded_server.BLOCK)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
    environ |= {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    alone = everything(World(), tmp_path)
    for size in (2, 3):
        port = free_port()
        commands = [[sys.executable, "-m", "tests.ranks.test_server_side", str(rank), str(size), str(tmp_path), str(port)] for rank in range(size)]
        processes = [
            subprocess.Popen(one, env=environ, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for one in commands
        ]
        try:
            outputs = [process.communicate(timeout=250)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)
        assert {output.splitlines()[-1] for output in outputs} == {alone}


if __name__ == "__main__":
    rank, size, folder, port = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    with open_world("cpu", timeout_s=60, init_method=f"tcp://127.0.0.1:{port}", rank=rank, size=size) as world:
        print(everything(world, folder))
