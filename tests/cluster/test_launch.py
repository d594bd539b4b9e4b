"""launch/*.sh: what they ask torchrun and deepspeed for, and that a recipe needs no other flag under any launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT
from tests.cluster.hosts import until

FEW = "tests/cluster/few_cells.py"


@pytest.fixture
def shell(tmp_path):
    """Runs a line of bash in the clone with programs of our own in front, which say what they were called with."""
    tools = {
        "torchrun": 'printf "%s\\n" torchrun "$@"; env | grep -E "^(OMP_NUM|TORCH|GIDEF)"',
        "deepspeed": 'printf "%s\\n" deepspeed "$@"; while [ $# -gt 0 ]; do [ "$1" != --hostfile ] || cat "$2"; shift; done',
        "nvidia-smi": "exit 1",
        "scontrol": 'if [ "$2" = hostnames ]; then printf "%s\\n" n1 n2 n3; else echo "   NodeAddr=10.0.0.${3#n} NodeHostName=$3"; fi',
        "hostname": "echo n2",
    }
    (tmp_path / "bin").mkdir()
    for name, script in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    dropped = ("SLURM", "GIDEF", "CUDA", "RANK", "WORLD_SIZE", "PBS", "LSB", "TORCH", "OMP")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environ |= {"PATH": os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}

    def run(line: str, status: int = 0, **more: str) -> list[str]:
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environ | more, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and not (status and done.stdout), done.stderr
        return (done.stderr if status else done.stdout).splitlines()

    return run


def test_one_host_asks_for_its_gpus_or_for_one_rank(shell):
    said = shell("bash launch/torchrun.sh recipes/tiny.py --out runs/a")
    assert said[:6] == ["torchrun", "--nproc-per-node=1", "--max-restarts=0", "--standalone", "recipes/tiny.py", "--out"]
    for line in ("OMP_NUM_THREADS=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_EXTENSIONS_DIR=runs/a/extensions"):
        assert line in said
    assert "--nproc-per-node=3" in shell("bash launch/torchrun.sh x.py", CUDA_VISIBLE_DEVICES="1,2,5")
    assert "--nproc-per-node=1" in shell("bash launch/torchrun.sh x.py", CUDA_VISIBLE_DEVICES="")
    assert {"--nproc-per-node=4", "--max-restarts=2", "OMP_NUM_THREADS=3"} <= set(
        shell("bash launch/torchrun.sh x.py", CUDA_VISIBLE_DEVICES="1,2", GIDEF_RANKS="4", GIDEF_RESTARTS="2", GIDEF_THREADS="3")
    )


@pytest.mark.parametrize(
    ("environ", "meet", "count"),
    [
        ({"GIDEF_HOSTS": "a,b c"}, "a:29400", "3"),
        ({"GIDEF_HOSTS": "a,b", "GIDEF_PORT": "7000", "GIDEF_NODES": "1:4"}, "a:7000", "1:4"),
        ({"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_JOB_NODELIST": "n[1-9]"}, "10.0.0.1:20055", "3"),
        ({"PBS_NODEFILE": "{folder}/nodes"}, "p1:29400", "2"),
        ({"LSB_HOSTS": "l1 l1 l2 l2"}, "l1:29400", "2"),
    ],
)
def test_several_hosts_come_from_a_list_or_the_scheduler(environ, meet, count, shell, tmp_path):
    (tmp_path / "nodes").write_text("p1\np1\np2\np2\n")
    said = shell("bash launch/torchrun.sh x.py --seeds 1", **{name: text.replace("{folder}", str(tmp_path)) for name, text in environ.items()})
    assert f"--nnodes={count}" in said and f"--rdzv-endpoint={meet}" in said and "--standalone" not in said
    assert said[said.index("x.py") :][:3] == ["x.py", "--seeds", "1"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_that_is_told_nothing_says_how_it_is_used_and_starts_nothing(launcher, shell):
    [said] = shell(f"bash launch/{launcher}.sh", status=2)
    assert said.startswith(f"usage: bash launch/{launcher}.sh recipes/")


def test_an_elastic_run_needs_a_place_to_meet_and_restarts_by_itself(shell):
    for nodes in ("1:4", "2"):
        [said] = shell("bash launch/torchrun.sh x.py", status=2, GIDEF_NODES=nodes)  # torchrun, which would have spoken, was not started
        assert said.startswith(f"gidef: GIDEF_NODES={nodes} without a host to meet on") and "GIDEF_HOSTS=n2" in said
    asked = {nodes: shell("bash launch/torchrun.sh x.py", GIDEF_HOSTS="n2", GIDEF_NODES=nodes) for nodes in ("1:4", "2")}
    assert {"--max-restarts=10", "--nnodes=1:4", "--rdzv-endpoint=n2:29400"} <= set(asked["1:4"]) and "--max-restarts=0" in asked["2"]
    assert "--max-restarts=0" in shell("bash launch/torchrun.sh x.py", GIDEF_HOSTS="n2", GIDEF_NODES="1:4", GIDEF_RESTARTS="0")


@pytest.mark.parametrize(
    ("listed", "hosts"),
    [("a", "a"), ("a,b7", "a b7"), ("n[1-3]", "n1 n2 n3"), ("n[008-010,2]x,m[1-2]", "n008x n009x n010x n2x m1 m2"), ("r[1-2]n[1,3]", "r1n1 r1n3 r2n1 r2n3")],
)
def test_a_list_of_hosts_is_spelt_out_in_a_container_too(listed, hosts, shell, tmp_path):
    (tmp_path / "bin" / "scontrol").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert shell(". launch/ranks.sh; gidef_hosts", SLURM_STEP_NODELIST=listed) == hosts.split()


def test_a_batch_script_on_several_nodes_that_starts_no_step_stays_alone(shell):
    assert "--standalone" in shell("bash launch/torchrun.sh x.py", SLURM_JOB_ID="4", SLURM_JOB_NODELIST="n[1-3]")


def test_deepspeed_is_given_hosts_without_ssh(shell, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra deepspeed is not installed")
    name, option, port, *rest = shell("bash launch/deepspeed.sh x.py -a", GIDEF_RANKS="2")
    assert (name, option) == ("deepspeed", "--master_port") and 1024 < int(port) < 65536  # a free one
    assert rest == ["--hostfile", "/dev/null", "--num_gpus", "2", "x.py", "-a"]
    assert "7001" in shell("bash launch/deepspeed.sh x.py", GIDEF_PORT="7001")
    step = {"SLURM_JOB_ID": "41", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_NODEID": "2"}
    said = shell("bash launch/deepspeed.sh x.py", GIDEF_RANKS="2", **step)
    assert said[-3:] == ["n1 slots=2", "n2 slots=2", "n3 slots=2"]
    assert said[said.index("--master_addr") :][:6] == ["--master_addr", "10.0.0.1", "--no_ssh", "--node_rank", "2", "x.py"]
    (tmp_path / "hosts").write_text("# ours\nn1 slots=4\nn2 slots=4\n")
    said = shell("bash launch/deepspeed.sh -m gidef doctor", GIDEF_HOSTFILE=str(tmp_path / "hosts"))
    assert said[said.index("--hostfile") + 1] == str(tmp_path / "hosts") and said[said.index("--node_rank") + 1] == "1"  # this is n2
    assert said[said.index("--module") :][:3] == ["--module", "gidef", "doctor"]
    assert "--no_ssh" not in shell("bash launch/deepspeed.sh x.py", GIDEF_HOSTFILE=str(tmp_path / "hosts"), GIDEF_SSH="1")


def test_a_scaling_job_measures_whole_nodes_with_one_list_of_ranks(shell, tmp_path):
    (tmp_path / "bin" / "srun").write_text('#!/usr/bin/env bash\necho "$GIDEF_RANKS per node: $*"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "3", "GIDEF_VENV": str(tmp_path / "venv")}

    def started(**more: str) -> tuple[list[tuple[str, str]], str]:
        lines = shell("bash slurm/scaling.sbatch --small", **job, **more)
        assert all("launch/torchrun.sh recipes/scaling.py --small --out runs/slurm-5 --ranks" in line for line in lines)
        assert len({line.split("--ranks ")[1] for line in lines}) == 1
        return [(line[0], line.split("--nodes=")[1][0]) for line in lines], lines[0].split("--ranks ")[1]

    assert started() == ([("1", "1"), ("1", "2")], "1 2")
    assert started(GIDEF_RANKS="4") == ([("1", "1"), ("2", "1"), ("4", "1"), ("4", "2")], "1 2 4 8")
    assert started(GIDEF_RANKS="3") == ([("1", "1"), ("2", "1")], "1 2")


def test_a_job_has_a_folder_of_its_own_that_it_may_go_on_in(shell):
    again = ". launch/ranks.sh; . slurm/requeue.sh; gidef_again runs/slurm-5"
    assert shell(f"{again} --seeds 1") == ["--out", "runs/slurm-5", "--resume"]
    assert shell(f"{again} --out runs/a") == [] == shell(f"{again} --out=runs/a")
    assert shell(f"{again} --out runs/a", SLURM_RESTART_COUNT="2") == ["--resume"]


@pytest.mark.parametrize(
    ("command", "environ", "requeued", "status"),
    [
        ("true", {}, False, "0"),
        ("false", {}, False, "1"),  # a failure stays one
        ('touch "$GIDEF_PREEMPTED"; exit 143', {}, True, "143"),  # gidef was told to end
        ('touch "$GIDEF_PREEMPTED"; exit 0', {}, False, "0"),  # and had ended
        ("exit 1", {"PREEMPTED": "2026-01-01T00:00:00"}, True, "1"),  # before gidef could say so
        ("kill -USR1 $SCRIPT; sleep 0.5; exit 1", {}, True, "1"),  # the time limit is near
        ("kill -TERM $SCRIPT; sleep 0.5; exit 1", {}, True, "1"),
        ("kill -TERM $SCRIPT; sleep 0.5; exit 1", {"STATE": "COMPLETING", "REASON": "TimeLimit"}, True, "1"),  # it is over
        ("kill -TERM $SCRIPT; sleep 0.5; exit 1", {"STATE": "CANCELLED"}, False, "1"),
        ("kill -TERM $SCRIPT; sleep 0.5; exit 1", {"STATE": "PENDING"}, False, "1"),  # requeued by somebody
        ("kill -USR1 $SCRIPT; sleep 0.5; exit 0", {}, False, "0"),
        ("kill -USR1 $SCRIPT; sleep 0.5; exit 1", {"SLURM_RESTART_COUNT": "100"}, False, "1"),  # it gets nowhere
    ],
)
def test_a_job_is_requeued_if_and_only_if_it_was_stopped_before_its_end(command, environ, requeued, status, shell, tmp_path):
    for name, script in {"scontrol": 'echo "scontrol $*"; [ "$1" != show ] || echo "JobState=${STATE:-RUNNING} Reason=${REASON:-None} PreemptTime=${PREEMPTED:-None}"; [ "$1" != requeue ] || exit 1', "scancel": 'echo "scancel $*"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "preempted").touch()  # of an earlier life
    line = f"(. slurm/requeue.sh; export SCRIPT=$BASHPID; gidef_job {tmp_path}/preempted bash -c '{command}'); echo status $?"
    said = shell(line, SLURM_JOB_ID="5", **environ)
    assert ("scontrol requeue 5" in said) == requeued and said[-1] == f"status {status}", said
    assert ("scancel --signal=TERM 5" in said) == ("$SCRIPT" in command)  # passed on to the tasks


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_python_torchrun_and_deepspeed_end_with_the_same_bits_from_the_same_line(tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra deepspeed is not installed")
    environ = os.environ | {"GIDEF_RANKS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GIDEF_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    lines = {"python": [sys.executable], "torchrun": ["bash", "launch/torchrun.sh"], "deepspeed": ["bash", "launch/deepspeed.sh"]}
    found = {}
    for name, start in lines.items():
        done = subprocess.run([*start, FEW, "--out", str(tmp_path / name)], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads((tmp_path / name / "results.json").read_text())
        found[name] = results["weights_sha256"]
        assert results["world_size"] == (1 if name == "python" else 2)
    assert found["python"] == found["torchrun"] == found["deepspeed"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_run_that_is_told_to_end_under_deepspeed_s_launcher_goes_on_to_the_same_bits(tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra deepspeed is not installed")
    environ = os.environ | {"GIDEF_RANKS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GIDEF_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])

    def launched(*start: str, out: Path, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*start, "--out", str(out)], cwd=ROOT, env=environ | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ends_well(process: subprocess.Popen[str]) -> None:
        said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said

    line, out = ("bash", "launch/deepspeed.sh", FEW), tmp_path / "run"
    told = launched(*line, out=out, FEW_SLOW_S="0.5")  # seconds a round, so that it does not end before it is told
    try:
        until(lambda: list(out.glob("checkpoints/learned-0/round-000002.safetensors")) or told.poll() is not None, 300, "no second round")
        told.terminate()
        said = told.communicate(timeout=60)[0]
    finally:
        told.kill()
    assert told.returncode != 0 and (out / "preempted").exists() and not (out / "results.json").exists(), said
    ends_well(launched(*line, "--resume", out=out))
    ends_well(launched(sys.executable, FEW, out=tmp_path / "alone"))
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "alone")]
    assert [one["world_size"] for one in results] == [2, 1] and results[0]["weights_sha256"] == results[1]["weights_sha256"]
    lines = [json.loads(text) for text in (out / "record.jsonl").read_text().splitlines()]
    assert [one["resumed"] for one in lines if one["kind"] == "start"] == [False, True]
    assert [one["round"] for one in lines if one["kind"] == "round"] == list(range(1, 9))


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_zero_configurations_train_as_one_process_does_under_both_launchers(launcher, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the extra deepspeed is not installed")
    environ = os.environ | {"GIDEF_RANKS": "2", "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    names = [f"zero{stage}.json" for stage in (1, 2, 3)]
    line = ["bash", f"launch/{launcher}.sh", "tests/cluster/zero_steps.py", str(tmp_path / "losses.json"), *(f"launch/{name}" for name in names)]
    done = subprocess.run(line, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = _plain_losses()
    assert json.loads((tmp_path / "losses.json").read_text()) == {name: pytest.approx(expected, abs=2e-4) for name in names}
    assert expected[0] - expected[-1] > 0.05  # it learns


def _plain_losses() -> list[float]:
    """The same steps on the whole batch, by torch alone."""
    import torch

    from gidef.data import synthetic_blood_cells
    from gidef.models import make_backbone

    net = make_backbone("small", num_classes=8, image_shape=(3, 28, 28), small_stem=True, norm="group", pretrained=None, activation="leaky_relu", seed=0)
    optimiser, data, found = torch.optim.AdamW(net.parameters(), lr=1e-3), synthetic_blood_cells(train=16, val=8, test=8).train, []
    for _ in range(3):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(data.images.float().div(255)), data.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        found.append(float(loss.detach()))
    return found
