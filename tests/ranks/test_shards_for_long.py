"""DeepSpeed's ZeRO in the place of FSDP2, under both launchers; and a ViT-L on two ranks. Minutes; 14 GiB of memory for the ViT-L."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gidef.parallel import World
from tests.ranks.launch import ROOT, environment, results, run
from tests.ranks.shards_recipe import FURTHER, VARIANTS, trained
from tests.ranks.test_shards import CLOSE, SCRIPT, apart, model, work

pytestmark = [pytest.mark.ranks, pytest.mark.cluster, pytest.mark.timeout(1800)]
ZERO = ("--speed.shard-size", "2", "--speed.shard-backend", "deepspeed", "--speed.zero-stage", "3")
deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason='DeepSpeed is not installed: pip install -e ".[deepspeed]"')
GIB = 2**30
TOLERANCE = {"adam": 0.02, "bfloat16": 0.03}  # Adam's first steps are lr · sign(g), where g may be but rounding; bfloat16 has 8 bits


def differences(folder: Path, tasks: list[str]) -> dict[str, float]:
    """How far each task on two ranks ends from its variant on one."""
    for name in {task.partition(":")[0] for task in tasks}:
        trained((VARIANTS | FURTHER)[name], folder / "alone" / name, World())
    work(folder, two=",".join(tasks))
    return {task: apart(folder / "2" / task.replace(":", "-"), folder / "alone" / task.partition(":")[0]) for task in tasks}


def test_further_clients_learn_on_two_ranks_what_they_learn_on_one(tmp_path):
    found = differences(tmp_path, list(FURTHER))
    assert {name for name, value in found.items() if value > TOLERANCE.get(name, CLOSE)} == set(), found


@deepspeed
def test_every_stage_of_zero_learns_what_one_rank_learns(tmp_path):
    stages = [f"plain:zero{stage}" for stage in range(4)]
    found = differences(tmp_path, [*stages, "plain:zero1-offload", "plain:zero3-offload", "adam:zero2", "coupled:zero3", "changed:zero1"])
    assert {task for task, value in found.items() if value > TOLERANCE.get(task.partition(":")[0], CLOSE)} == set(), found


@deepspeed
def test_both_launchers_start_the_same_recipe_to_the_same_bits(tmp_path):
    run(2, str(SCRIPT), *ZERO, "--out", str(tmp_path / "torchrun"), timeout=900)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port), str(SCRIPT), *ZERO]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "deepspeed")], env=environment(DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT)), cwd=tmp_path,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert results(tmp_path / "deepspeed")["world_size"] == 2
    assert results(tmp_path / "deepspeed")["weights_sha256"] == results(tmp_path / "torchrun")["weights_sha256"]


MEASURE = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"


def largest_rank(ranks: int, folder: Path) -> int:
    """Train the small form of recipes/vit_large.py; peak bytes of its largest process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(ROOT / "recipes" / "vit_large.py")]
    command += ["--small", "--speed.shard-size", str(ranks), "--out", str(folder)]
    alone = environment(MALLOC_MMAP_THRESHOLD_="1048576")  # else glibc keeps what is freed, as much again as is held
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], env=alone, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return int(done.stdout.split()[-1])


def available() -> int:
    """Bytes that processes can get: free memory, and on Linux also what caches of files hold."""
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(available() < 14 * GIB, reason="needs 14 GiB of available memory")
def test_a_vit_large_learns_on_two_ranks_what_it_learns_on_one_in_less_memory_each(tmp_path):
    peaks = {ranks: largest_rank(ranks, tmp_path / str(ranks)) for ranks in (2, 1)}
    mine, theirs = (model(tmp_path / ranks) for ranks in ("2", "1"))
    assert all((mine[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)  # weights near 1, of which one round moves few by more than 1e-3
    assert apart(tmp_path / "2", tmp_path / "1") < 1e-3
    assert results(tmp_path / "2")["training"][0]["parameters_shared"] > 300e6
    assert peaks[2] < 0.7 * peaks[1]
    seconds = {ranks: results(tmp_path / str(ranks))["training"][0]["seconds_per_round"] for ranks in (2, 1)}
    print(json.dumps({"peak_gib": {ranks: peak / GIB for ranks, peak in peaks.items()}, "seconds_per_round": seconds}))
