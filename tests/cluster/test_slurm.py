"""Jobs on a real two-node SLURM: whatever happens to one, its final model has the bits of an uninterrupted process."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster

FEW = "tests/cluster/few_cells.py"
pytestmark = pytest.mark.timeout(900)  # a machine may be busy
TWO_NODES = ("--nodes=2", "--cpus-per-task=1")


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "results.json").read_text())["weights_sha256"]


def lives(folder: Path) -> list[dict]:
    """The record's lines of starts, one per life of the run."""
    return [line for line in map(json.loads, (folder / "record.jsonl").read_text().splitlines()) if line["kind"] == "start"]


def rounds(folder: Path) -> list[int]:
    return [line["round"] for line in map(json.loads, (folder / "record.jsonl").read_text().splitlines()) if line["kind"] == "round"]


@pytest.fixture(scope="session")
def alone(cluster: Cluster, tmp_path_factory) -> Path:
    """One process, never interrupted."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    cluster.run(sys.executable, FEW, "--out", folder)
    return folder


def train(cluster: Cluster, folder: Path, *options: str, more: tuple[str, ...] = ()) -> str:
    return cluster.submit(*TWO_NODES, *options, "slurm/train.sbatch", FEW, "--out", folder, *more)


def trained(cluster: Cluster, folder: Path, number: int, job: str) -> None:
    """Wait until that round is over, and the run is not."""
    cluster.until(lambda: any((folder / "checkpoints").glob(f"*/round-{number:06d}.safetensors")), 180, f"at round {number}", job)
    assert not (folder / "results.json").exists()


def check(cluster: Cluster, folder: Path, alone: Path, job: str, *, began: int) -> None:
    """The job is done, had so many lives, and left the model and the record of an uninterrupted run, and no marker."""
    cluster.finished(job)
    assert hashes(folder) == hashes(alone), cluster.told(job)
    assert rounds(folder) == rounds(alone)
    assert len(lives(folder)) == began and all(life["world_size"] == 2 for life in lives(folder))
    assert not (folder / "preempted").exists()


def test_a_job_on_two_nodes_that_is_requeued_goes_on_and_ends_with_the_bits_of_one_process(cluster, alone, tmp_path):
    """The short form of this file, for every run of the tests."""
    job = train(cluster, tmp_path / "run")
    trained(cluster, tmp_path / "run", 2, job)
    cluster.run("scontrol", "requeue", job)
    check(cluster, tmp_path / "run", alone, job, began=2)
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.cluster
def test_a_job_gives_way_to_one_of_higher_priority_and_comes_back(cluster, alone, tmp_path):
    job = train(cluster, tmp_path / "run", "--partition=low")
    trained(cluster, tmp_path / "run", 2, job)
    urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "srun hostname")
    cluster.finished(urgent)
    check(cluster, tmp_path / "run", alone, job, began=2)
    assert "goes back into the queue" in cluster.told(job)


@pytest.mark.cluster
def test_a_job_that_is_preempted_before_training_began_comes_back(cluster, alone, tmp_path):
    job = train(cluster, tmp_path / "run", "--partition=low")
    cluster.until(lambda: cluster.states(job) == {"RUNNING"}, 60, "running", job)
    cluster.finished(cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "srun hostname"))
    check(cluster, tmp_path / "run", alone, job, began=1)


@pytest.mark.cluster
def test_a_job_stops_before_its_time_is_over_and_goes_on_in_another_life(cluster, alone, tmp_path):
    """SLURM may warn a minute early: of three minutes, USR1@60 comes after 60 to 120 seconds."""
    job = cluster.submit(*TWO_NODES, "--time=3", "--signal=B:USR1@60", "slurm/train.sbatch", FEW, "--out", tmp_path / "run", FEW_SLOW_S="8")
    cluster.finished(job, timeout=800)
    assert "USR1 received" in cluster.told(job) and int(cluster.job(job)["Restarts"]) >= 1
    assert hashes(tmp_path / "run") == hashes(alone) and rounds(tmp_path / "run") == rounds(alone)
    assert len(lives(tmp_path / "run")) >= 2 and not (tmp_path / "run" / "preempted").exists()


@pytest.mark.cluster
def test_a_cancelled_job_stays_cancelled_and_a_new_one_takes_it_up(cluster, alone, tmp_path):
    job = train(cluster, tmp_path / "run")
    trained(cluster, tmp_path / "run", 2, job)
    cluster.run("scancel", job)
    cluster.until(lambda: not cluster.run("squeue", "-h", "-j", job), 60, "out of the queue", job)
    time.sleep(8)  # a requeue takes 6 s here
    assert cluster.states(job) == {"CANCELLED"} and cluster.job(job)["Restarts"] == "0", cluster.told(job)
    check(cluster, tmp_path / "run", alone, train(cluster, tmp_path / "run", more=("--resume",)), began=2)


@pytest.mark.cluster
def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    job = cluster.submit(*TWO_NODES, "slurm/train.sbatch", FEW, "--out", tmp_path / "run", "--data.path", "nowhere.npz")
    cluster.until(lambda: cluster.states(job) == {"FAILED"}, 180, "failed", job)
    assert "nowhere.npz" in cluster.told(job) and cluster.job(job)["Restarts"] == "0"


@pytest.mark.cluster
def test_a_recipe_under_srun_alone_needs_no_flag(cluster, alone, tmp_path):
    """Without torchrun: ranks are the tasks. MASTER_ADDR, since node1 is no name that this machine resolves."""
    cluster.run("srun", "--nodes=2", "--ntasks=3", "--overcommit", sys.executable, FEW, "--out", tmp_path / "run", MASTER_ADDR="127.0.0.1")
    assert hashes(tmp_path / "run") == hashes(alone) and lives(tmp_path / "run")[0]["world_size"] == 3


@pytest.mark.cluster
def test_the_doctor_looks_at_both_nodes(cluster, tmp_path):
    said = cluster.run("srun", "--nodes=2", "--ntasks=2", sys.executable, "-m", "gidef", "doctor", "--out", tmp_path / "run", MASTER_ADDR="127.0.0.1")
    assert f"{tmp_path}/run is shared by 2 ranks" in said and "the same versions on 2 ranks" in said and said.count("Everything that gidef needs") == 1


@pytest.mark.cluster
def test_the_deepspeed_launcher_on_two_nodes_needs_no_flag(cluster, alone, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra deepspeed is not installed")
    cluster.run("srun", "--nodes=2", "--ntasks=2", "bash", "launch/deepspeed.sh", FEW, "--out", tmp_path / "run")
    assert hashes(tmp_path / "run") == hashes(alone) and lives(tmp_path / "run")[0]["world_size"] == 2


@pytest.mark.cluster
def test_training_attacks_and_report_follow_one_another(cluster, alone, tmp_path):
    told = {"CHAIN_ATTACKS": "naive joint", "CHAIN_ATTACK_ARGS": "--iterations 2", "CHAIN_SBATCH": f"--output={cluster.folder}/job-%A-%a.log"}
    said = cluster.run("bash", "slurm/chain.sh", FEW, "--out", tmp_path / "run", **told)
    words = said.split()
    jobs = dict(zip(words[::2], words[1::2], strict=True))
    assert jobs.pop("run") == str(tmp_path / "run")
    cluster.finished(*jobs.values(), timeout=600)
    assert hashes(tmp_path / "run") == hashes(alone)
    parts = sorted((tmp_path / "run" / "attacked").iterdir())
    assert [{row["attack"] for row in json.loads((part / "results.json").read_text())["rows"]} for part in parts] == [{"naive"}, {"joint"}]
    assert all(part.name in (tmp_path / "run" / "report.html").read_text() for part in parts)


@pytest.mark.cluster
def test_a_sweep_in_an_array_has_a_task_requeued_and_ends_with_one_page(cluster, alone, tmp_path):
    out = tmp_path / "sweep"
    job = cluster.submit("--array=0-1", "--cpus-per-task=1", "slurm/sweep.sbatch", "tests/cluster/few_rows.py", "--out", out, "--resume")
    cluster.until(lambda: any((out / "first" / "checkpoints").glob("*/round-000002.safetensors")), 180, "in training", f"{job}-*")
    cluster.run("scontrol", "requeue", f"{job}_0")
    cluster.finished(job, timeout=400)
    assert hashes(out / "first") == hashes(alone)
    assert (out / "second" / "results.json").exists() and (out / "report.html").exists()
    assert len(lives(out / "first")) == 2 and len(lives(out / "second")) == 1
