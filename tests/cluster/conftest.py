"""A two-node SLURM on this machine, in a temporary folder of its own, with ports of its own, without systemd; ended by process id."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged")
CONF = """
ClusterName=gidef
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=low  Nodes=node[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=node[1-2] Default=NO  MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """What a user does on the cluster: `sbatch`, `scontrol`, and looking at jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_")) and name not in ("RANK", "WORLD_SIZE")}
        path = [str(Path(sys.executable).parent), kept.get("PATH", "")]
        self.environ = kept | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "GIDEF_OFFLINE": "1", "MPLBACKEND": "Agg",
        }  # fmt: skip

    def run(self, *command: str | Path, **more: str) -> str:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=self.environ | more, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str | Path, **more: str) -> str:
        """The job's number. Logs go to the cluster's folder."""
        return self.run("sbatch", "--parsable", f"--output={self.folder}/job-%j.log", *arguments, **more).split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says; of an array, its first task."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", number).split("\n\n")[0]))

    def states(self, number: str) -> set[str]:
        """Of a job, or of all tasks of an array."""
        return set(re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", number)))

    def until(self, ready, timeout: float, what: str, *jobs: str) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            assert time.monotonic() < deadline, f"not {what} within {timeout} s\n{self.told(*jobs)}"
            time.sleep(0.1)

    def finished(self, *jobs: str, timeout: float = 240) -> None:
        """Wait until every job has completed; any other end is an error that shows its log."""
        ends = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
        deadline = time.monotonic() + timeout
        for number in jobs:
            while (states := self.states(number)) != {"COMPLETED"}:
                assert not states & ends and time.monotonic() < deadline, f"job {number} is {states}\n{self.told(*jobs)}"
                time.sleep(0.3)

    def told(self, *jobs: str) -> str:
        """The jobs' logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-20000:]}" for number in jobs or ("*",) for path in sorted(self.folder.glob(f"job-{number}.log")))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(pid_file: Path) -> None:
    """End one daemon and wait for it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Skipped where root or a package is missing."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM of our own needs root")
    if missing := [name for name in NEEDED if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None]:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge")
    folder = Path(tempfile.mkdtemp(prefix="gidef-slurm-"))
    folder.chmod(0o755)  # slurmd and munged want to reach their files whatever user asks
    here = Cluster(folder)
    here.environ["PATH"] += ":/usr/sbin:/sbin"
    daemons = ("slurmd.node1.pid", "slurmd.node2.pid", "slurmctld.pid", "munged.pid")
    for name in ("state", "spool.node1", "spool.node2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=socket.gethostname().split(".")[0], ports=_free_ports(3)))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))  # else a cancelled run leaves its daemons behind
    try:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
        here.run("munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
        here.run("slurmctld", "-c", "-f", folder / "slurm.conf")
        for node in ("node1", "node2"):
            here.run("slurmd", "-f", folder / "slurm.conf", "-N", node)
        here.until(lambda: here.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2", 30, "two idle nodes")
        yield here
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            here.run("scancel", "--user=root")
            here.until(lambda: not here.run("squeue", "-h"), 30, "an empty queue")
        for name in daemons:
            _end(folder / name)
        shutil.rmtree(folder, ignore_errors=True)
