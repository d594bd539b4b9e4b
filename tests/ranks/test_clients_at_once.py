"""Groups of clients are cut before they are dealt out to ranks: equal K, equal bits on any number of them. Synthetic cells, two rounds, no attacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import launch

pytestmark = pytest.mark.ranks
SIZES = (1, 4, 8)


def train(rank: int, size: int, folder: Path, port: str) -> dict[str, Any]:
    """Digest of the weights after two rounds by K, and how far they are from K = 1."""
    import torch

    from gidef import build, config
    from gidef.checkpoint import weights_sha256
    from gidef.data import synthetic_blood_cells
    from gidef.parallel import open_world

    torch.set_num_threads(1)
    build.load_dataset = lambda *args, **kwargs: synthetic_blood_cells(train=120, val=16, test=16)
    recipe = config.Recipe(
        data=config.Data(name="synthetic", num_clients=10, partition=config.Dirichlet(alpha=1.0), min_examples=3), model=config.Model(activation="none"),
        clients=config.LocalTraining(batch_size=8, optimiser="sgd", lr=0.05, momentum=0.9), rounds=config.Rounds(count=2, cohort_size=9),
        evaluation=config.Evaluation(num_victims=4, num_tuning=4), speed=config.Speed(workers=1),
    )  # fmt: skip
    told = {}
    with open_world("cpu", 60, init_method=f"tcp://127.0.0.1:{port}", rank=rank, size=size) as world:
        setting = build.load_setting(recipe, world=world, notice=lambda text: None)
        one = None
        for at_once in SIZES:
            training = build.make_training(setting, config.LearnedPerturbation(dependence_weight=0.0), seed=0, world=world, state_folder=folder / str(at_once))
            training.participation.at_once, server = at_once, training.server
            for number in range(2):
                server, _ = training.run(server, [setting.clients[k] for k in training.draw(number)])
            one = one or server.params
            told[f"distance {at_once}"] = max(float((one[name] - server.params[name]).abs().max()) for name in one)
            told[str(at_once)] = weights_sha256(server.params)
            if at_once == 4:
                groups = training.participation.groups([setting.clients[k] for k in training.draw(0)])
                told["groups"] = sorted(map(len, groups))
    return told


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[int, int], dict]:
    told = {}
    for size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        command, port = [sys.executable, __file__], str(launch.free_port())
        place = launch.environment(PYTHONPATH=str(launch.ROOT))
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), str(folder), port], env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        try:
            for rank, process in enumerate(ranks):
                out, err = process.communicate(timeout=200)
                assert process.returncode == 0, err
                told[size, rank] = json.loads(out.splitlines()[-1])
        finally:
            for process in ranks:
                process.kill()
    return told


def test_equal_k_gives_equal_bits_on_one_two_and_three_ranks(found):
    for at_once in SIZES:
        assert len({one[str(at_once)] for one in found.values()}) == 1
    assert found[1, 0]["groups"] == [3, 3, 3]


def test_k_1_and_k_8_agree_after_two_rounds(found):
    assert found[1, 0]["distance 1"] == 0
    assert 0 < found[1, 0]["distance 4"] < 1e-5 and 0 < found[1, 0]["distance 8"] < 1e-5


if __name__ == "__main__":
    print(json.dumps(train(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
