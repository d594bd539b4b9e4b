"""The final model is the same bits on 1, 2, 3 and 4 ranks, and after a kill and a resumption. Synthetic cells."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from gidef.checkpoint import load_file
from tests.ranks.launch import ROOT, environment, record, results, run, run_until

pytestmark = pytest.mark.ranks
RECIPE = "../tests/ranks/quick_recipe.py"
SCRIPT = ROOT / "tests" / "ranks" / "quick_recipe.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(1, RECIPE, "--out", str(folder))
    return folder


@pytest.mark.parametrize(("ranks", "schedule", "only"), [(2, "static", ["undefended", "learned"]), (3, "dynamic", ["learned"]), pytest.param(4, "longest_first", ["undefended"], marks=pytest.mark.slow)])
def test_two_three_and_four_ranks_end_with_the_bits_of_one(ranks, schedule, only, alone, tmp_path):
    expected = results(alone)
    run(ranks, RECIPE, "--out", str(tmp_path / "run"), "--speed.clients-schedule", schedule, "--only", *only)
    found = results(tmp_path / "run")
    assert found["world_size"] == ranks
    assert found["weights_sha256"] == {f"{name}/0": expected["weights_sha256"][f"{name}/0"] for name in only}
    assert len(set(expected["weights_sha256"].values())) == 2  # two defences, two models
    for name in only:
        mine_and_theirs = [[row for row in one["rows"] if row["defence"] == name] for one in (found, expected)]
        for mine, theirs in zip(*mine_and_theirs, strict=True):
            assert mine["psnr_db"]["mean"] == pytest.approx(theirs["psnr_db"]["mean"], abs=1e-3)


def test_the_record_tells_what_each_client_took_and_the_checkpoint_keeps_it(alone):
    rounds = [line for line in record(alone) if line["kind"] == "round" and line["defence"] == "learned"]
    assert all(len(line["client_seconds"]) == line["cohort"] and min(line["client_seconds"].values()) > 0 for line in rounds)
    _, meta = load_file(alone / "checkpoints" / "learned-0" / "round-000003.safetensors")
    assert meta["costs"].keys() == {client for line in rounds for client in line["client_seconds"]}
    once = [client for client in meta["costs"] if sum(client in line["client_seconds"] for line in rounds) == 1]
    for client in once:
        assert meta["costs"][client][0] == pytest.approx(next(line["client_seconds"][client] for line in rounds if client in line["client_seconds"]), abs=1e-5)


def test_a_run_killed_in_training_and_resumed_on_other_ranks_ends_with_the_same_bits(alone, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--out", str(folder))
    run_until(lambda: (folder / "checkpoints" / "learned-0" / "round-000001.safetensors").exists(), 1, RECIPE, *arguments)
    assert not (folder / "results.json").exists()
    run(2, RECIPE, *arguments, "--resume")
    assert results(folder)["weights_sha256"] == results(alone)["weights_sha256"]
    _no_line_is_doubled(folder, alone)


def test_a_run_killed_in_the_attacks_and_resumed_gives_the_same_reconstructions(alone, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--out", str(folder))
    run_until(lambda: any((folder / "attacks").glob("undefended-0/untrained/naive/*.safetensors")), 1, RECIPE, *arguments)
    run(1, RECIPE, *arguments, "--resume")
    found, expected = results(folder), results(alone)
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert [row["psnr_db"] for row in found["rows"]] == [row["psnr_db"] for row in expected["rows"]]
    _no_line_is_doubled(folder, alone)


def test_sigterm_in_training_evaluation_and_attack_ends_soon_and_loses_nothing_that_was_saved(alone, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--only", "undefended", "--out", str(folder))
    checkpoints = folder / "checkpoints" / "undefended-0"
    stages = {
        "training": lambda: (checkpoints / "round-000002.safetensors").exists(),
        "evaluation": lambda: (checkpoints / "round-000003.safetensors").exists(),
        "attack": lambda: any((folder / "attacks").glob("undefended-0/*/naive/*.safetensors")),
    }
    for stage, ready in stages.items():
        more = () if stage == "training" else ("--resume",)
        assert run_until(ready, 1, RECIPE, *arguments, *more, end=signal.SIGTERM) == 143, stage
        assert not (folder / "results.json").exists() and not list(folder.rglob("*.tmp")), stage
        if stage == "training":  # what is worse: the disk lost half of the newest checkpoint
            newest = sorted(checkpoints.glob("round-*.safetensors"))[-1]
            newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = run(2, RECIPE, *arguments, "--resume")
    assert results(folder)["weights_sha256"] == {"undefended/0": results(alone)["weights_sha256"]["undefended/0"]}, done.stdout
    assert list(checkpoints.glob("*.damaged"))
    assert "rank 1 of 2 on" in (folder / "logs" / "rank-00001.txt").read_text()
    rounds = [line["round"] for line in record(folder) if line["kind"] == "round"]
    assert rounds == [1, 2, 3]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_by_torchrun_and_the_run_goes_on_without_being_told_where(alone, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", str(SCRIPT),
        "--only", "undefended",
    ]  # fmt: skip
    agent = subprocess.Popen(command, env=environment(PYTHONPATH=str(ROOT)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("runs/quick_recipe/*/checkpoints/undefended-0/round-000001.safetensors")):
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        worker = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()[-1]
        os.kill(int(worker), signal.SIGKILL)
        said = agent.communicate(timeout=240)[0]
    finally:
        agent.kill()
    assert agent.returncode == 0, said
    (folder,) = (path.parent for path in tmp_path.glob("runs/quick_recipe/*/recipe.json"))
    assert results(folder)["weights_sha256"] == {"undefended/0": results(alone)["weights_sha256"]["undefended/0"]}
    assert [line["resumed"] for line in record(folder) if line["kind"] == "start"] == [False, True]


def test_ranks_that_do_not_see_the_same_folder_are_named(alone, tmp_path):
    for rank in range(2):
        shutil.copytree(alone, tmp_path / str(rank) / "run")
        shutil.rmtree(tmp_path / str(rank) / "run" / "models")
        (tmp_path / str(rank) / "run" / "results.json").unlink()
    (tmp_path / "1" / "run" / "checkpoints" / "undefended-0" / "round-000003.safetensors").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(SCRIPT), "--out", "run", "--resume"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(command, env=environment(RANK=str(rank), **shared), cwd=tmp_path / str(rank), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [one.communicate(timeout=240)[1] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert [one.returncode for one in ranks] == [2, 2], errors
    assert f"rank 1 on host {socket.gethostname()}: no checkpoint of round 3 in run" in errors[0] and "all ranks must see the same folder" in errors[0]


def _no_line_is_doubled(folder, alone) -> None:
    def key(line):
        return tuple(str(line.get(name)) for name in ("kind", "defence", "seed", "round", "checkpoint", "attack", "victim"))

    counts = Counter(key(line) for line in record(folder) if line["kind"] != "start")
    assert max(counts.values()) == 1
    assert counts.keys() == {key(line) for line in record(alone) if line["kind"] != "start"}
