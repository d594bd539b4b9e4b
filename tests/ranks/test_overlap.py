"""Evaluation beside the next round on two ranks: the bits of one, and an end on all ranks when one evaluation fails or its rank dies. Synthetic cells."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gidef import build, evaluation
from gidef.config import LearnedPerturbation, Rounds
from gidef.errors import InputError, RankFailure
from gidef.parallel import World, open_world
from gidef.report import Console
from gidef.runs import Run
from gidef.training import train
from tests.ranks.launch import ROOT, environment, free_port
from tests.small_run import RECIPE

pytestmark = pytest.mark.ranks
CHUNK = 5
"""Images of a chunk here, so that each rank has some of the 24."""


def trained(world: World, folder: Path, *, overlap: bool = True) -> str:
    """Hash of the model after three rounds with private fronts."""
    recipe = dataclasses.replace(
        RECIPE, rounds=Rounds(count=3, cohort_size=2), share_policy="head", speed=dataclasses.replace(RECIPE.speed, overlap_evaluation=overlap),
    )  # fmt: skip
    world = dataclasses.replace(world, cores=2)  # one is free for the evaluation
    run = Run(build.load_setting(recipe, world=world, notice=lambda text: None), world, folder, Console(rank=1), None, "mark")
    return train(run, "d", LearnedPerturbation(ramp=0.0), 0).sha256


def in_small_chunks() -> list[float]:
    """Cut evaluations into small chunks; returns where accuracies will be told."""
    from gidef import metrics
    from gidef.clients import evaluate

    evaluation.CHUNK = evaluate.CHUNK = CHUNK
    told, accuracy = [], metrics.accuracy

    def telling(logits, labels):
        told.append(accuracy(logits, labels))
        return told[-1]

    metrics.accuracy = telling
    return told


def begins_beside() -> list[int]:
    """Of each evaluation that this rank begins beside a round from now on: how many fronts."""
    seen, begin = [], evaluation.EvaluationBeside.begin

    def counted(self, params, clients, versions):
        seen.append(len(clients))
        begin(self, params, clients, versions)

    evaluation.EvaluationBeside.begin = counted
    return seen


def worker(rank: int, folder: Path, ports: list[str]) -> None:
    told, begun = in_small_chunks(), begins_beside()
    found: dict[str, object] = {}

    def meet(number: int):
        return open_world("cpu", 60, init_method=f"tcp://127.0.0.1:{ports[number]}", rank=rank, size=2)

    predict = evaluation.predict_chunk
    with meet(0) as world:
        found |= {"sha256": trained(world, folder / "beside"), "accuracies": told[:], "begun": begun[:]}

    def on_thread() -> bool:
        return threading.current_thread() is not threading.main_thread()

    def fails(*args):
        if rank == 1 and on_thread():
            raise InputError("a state is damaged")
        return predict(*args)

    evaluation.predict_chunk = fails
    try:
        with meet(1) as world:
            trained(world, folder / "fails")
    except (InputError, RankFailure) as error:
        found["failed"] = [type(error).__name__, str(error)]
    (folder / f"told-{rank}.json").write_text(json.dumps(found))  # now, as a rank is going to die

    def dies(*args):
        if rank == 1 and on_thread():
            os.kill(os.getpid(), signal.SIGKILL)
        return predict(*args)

    evaluation.predict_chunk = dies
    try:
        with meet(2) as world:
            trained(world, folder / "dies")
    except RankFailure as error:
        found["died"] = [type(error).__name__, str(error)]
    (folder / f"told-{rank}.json").write_text(json.dumps(found))


@pytest.mark.timeout(300)
def test_two_ranks_give_the_bits_of_one_and_end_together_when_an_evaluation_fails(tmp_path):
    ports = [str(free_port()) for _ in range(3)]
    command, place = [sys.executable, "-m", "tests.ranks.test_overlap", str(tmp_path), *ports], environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=place, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert json.loads(done.stdout.splitlines()[-1]) == [0, -signal.SIGKILL], f"{done.stdout}\n{done.stderr}"
    first, second, alone = (json.loads((tmp_path / f"told-{name}.json").read_text()) for name in (0, 1, "alone"))
    assert all(one[name] == alone[name] for one in (first, second) for name in ("sha256", "accuracies"))
    assert len(alone["accuracies"]) == 3 * 2 + 3  # two fronts a round; all three on the test split
    assert first["begun"] == second["begun"] == [2, 2] and alone["begun"] == []
    assert second["failed"] == ["InputError", "a state is damaged"]
    assert first["failed"][0] == "RankFailure" and "rank 1 on host" in first["failed"][1] and first["failed"][1].endswith("a state is damaged")
    assert first["died"][0] == "RankFailure" and "rank 1 on host" in first["died"][1] and "gone" in first["died"][1]
    assert not [*(tmp_path / "fails").glob("checkpoints/*/*"), *(tmp_path / "dies").glob("checkpoints/*/*")]  # their first rounds were not evaluated


def everything(folder: Path, ports: list[str]) -> list[int]:
    """Both ranks and, in this process, the run on one, whose rounds are evaluated in line: of one import, which costs seconds. Returns the ranks' ends."""
    ranks = []
    for rank in range(2):
        if (process := os.fork()) == 0:
            worker(rank, folder, ports)
            os._exit(0)
        ranks.append(process)
    told, begun = in_small_chunks(), begins_beside()
    sha256 = trained(World(), folder / "alone", overlap=False)
    (folder / "told-alone.json").write_text(json.dumps({"sha256": sha256, "accuracies": told, "begun": begun}))
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(everything(Path(sys.argv[1]), sys.argv[2:])))
