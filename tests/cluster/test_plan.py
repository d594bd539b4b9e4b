"""`gidef plan` against measured rounds: one host, then two, one core each, over a link of a known bandwidth. Needs two cores for
itself, and takes them from other processes by priority: else the two ranks wait for each other's turns, and the forecast, made of one rank's times, is
far too short."""

from __future__ import annotations

import os
import shutil
import statistics
import sys

import pytest

from gidef.forecasts import measured
from gidef.parallel.forecast import Network, forecast
from tests.cluster.hosts import Hosts, missing
from tests.ranks.launch import ROOT, record

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ARGUMENTS = (
    "--data.num-clients", "8", "--rounds.cohort-size", "8", "--rounds.count", "8", "--only", "undefended", "--evaluation.checkpoints", "final", "--speed.workers", "1",
)  # fmt: skip
FIRST = ("setsid", "nice", "-n", "-20", "sh", "-c", 'echo -20 2>/dev/null > /proc/self/autogroup; exec "$@"', "_")
"""In front of other processes: by niceness where the kernel weighs processes, and where it weighs sessions, too. Not real-time: that also stops the kernel's
threads that write to disks."""
MBIT = (None, 20.0, 5.0)
PAYLOAD = 1448 / (1514 + 66)
"""Of what a link carries, in TCP's full Ethernet frames, each with the acknowledgement of one that came: a sum flows both ways."""
TOLERANCE = 0.25
"""Of the forecast, where the link is what a round waits for; where compute decides, another process on the core decides too, and the error is told only."""


def round_s(out) -> float:
    ends = [line["seconds"] for line in record(out) if line["kind"] == "round"]
    return statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False))


def test_the_forecast_of_two_hosts_from_one_is_close_where_the_link_is_slow(tmp_path):
    if why := missing() or ("" if all(map(shutil.which, ("tc", "taskset", "setsid"))) else "tc (iproute2), taskset and setsid (util-linux) are needed"):
        pytest.skip(why)
    cores = sorted(os.sched_getaffinity(0))

    def run(hosts: Hosts, size: int, out) -> None:
        processes = [
            hosts.start(
                rank + 1, *FIRST, "taskset", "-c", str(cores[rank % len(cores)]), sys.executable, str(ROOT / "recipes" / "tiny.py"), *ARGUMENTS, "--out", str(out),
                log=tmp_path / f"{out.name}-{rank}.log", RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR=hosts.name(1), MASTER_PORT="29500",
            )
            for rank in range(size)
        ]  # fmt: skip
        for rank, process in enumerate(processes):
            assert process.wait(400) == 0, (tmp_path / f"{out.name}-{rank}.log").read_text()

    told = []
    with Hosts(tmp_path, 2) as hosts:
        run(hosts, 1, tmp_path / "one")
        found = measured(tmp_path / "one")
        found.pop("round_s")
        message = found.pop("message").reduced(2)
        for mbit in MBIT:
            if mbit is not None:
                for i in (1, 2):
                    hosts.limit(i, mbit)
            run(hosts, 2, tmp_path / f"two-{mbit}")
            network = Network(gpus_per_node=1, inter_gbytes=PAYLOAD * (mbit or 8000.0) / 8000, inter_us=100, algorithm="ring", meet_us=200)
            guess, real = forecast(ranks=2, network=network, message=message, **found), round_s(tmp_path / f"two-{mbit}")
            told.append((mbit, guess.round_s, guess.reduce_s, real, guess.round_s / real - 1))
            print(f"link {mbit or 'free'} Mbit/s: error {100 * told[-1][-1]:+.0f} %, measured {real:.3f} s, forecast {guess.round_s:.3f} s: {guess}")
    for _, guess, reduce, _, error in told:
        assert reduce < 0.5 * guess or abs(error) < TOLERANCE, told
    assert told[-1][2] > 0.5 * told[-1][1], "the slowest link does not show: lower its bandwidth"
