"""Three hosts in network namespaces: workers, agents, hosts and links that fail. Every run ends with the weights of an uninterrupted single process."""

from __future__ import annotations

import pytest

from gidef.report import read
from tests.cluster.hosts import Hosts, missing, until
from tests.ranks.launch import ROOT, results, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
TINY = ("--rounds.count", "12", "--only", "undefended", "--evaluation.checkpoints", "final")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(1, "tiny.py", *TINY, "--out", str(folder), timeout=500)
    return results(folder)["weights_sha256"]


class Case:
    """One run over some hosts, in a folder that all see."""

    def __init__(
        self, hosts: Hosts, folder, key: str, nodes: str, on: tuple[int, ...],
        *, restarts: int = 2, more: tuple[str, ...] = (), script: tuple[str, ...] | None = None, **environ: str,
    ) -> None:  # fmt: skip
        self.hosts, self.folder, self.out, self.key = hosts, folder, folder / "run", key
        self.script = (str(ROOT / "recipes" / "tiny.py"), *TINY, "--out", str(self.out), *more) if script is None else (*script, "--out", str(self.out))
        self.nodes, self.restarts, self.environ = nodes, restarts, environ
        self.agents = {}
        for i in on:
            self.start(i)

    def start(self, i: int) -> None:
        """An agent on another host."""
        self.agents[i] = self.hosts.torchrun(i, self.nodes, self.key, *self.script, restarts=self.restarts, log=self.log(i), **self.environ)

    def log(self, i: int):
        return self.folder / f"{self.key}-host-{i}.log"

    def said(self, i: int) -> str:
        return self.log(i).read_text(errors="replace")

    def saved(self) -> int:
        """Number of the newest checkpoint."""
        found = sorted((self.out / "checkpoints").glob("*-0/round-*.safetensors"))
        return int(found[-1].stem.removeprefix("round-")) if found else 0

    def until_round(self, number: int, world: int) -> None:
        """Until so many rounds are saved, on so many hosts: a host may come late, and is then waited for."""

        def ready() -> bool:
            return self.saved() >= number and self.worlds()[-1:] == [world]

        until(lambda: ready() or all(one.poll() is not None for one in self.agents.values()), 300, "the run did not get that far")
        assert ready() and not (self.out / "results.json").exists(), "\n".join(map(self.said, self.agents))

    def ends(self, *on: int) -> None:
        for i in on:
            assert self.agents[i].wait(400) == 0, self.said(i)

    def worlds(self) -> list[int]:
        """World sizes of the run's lives so far."""
        path = self.out / "record.jsonl"
        return [line["world_size"] for line in read(path) if line["kind"] == "start"] if path.exists() else []


def test_a_killed_worker_is_replaced(hosts, expected, tmp_path):
    case = Case(hosts, tmp_path, "a", "3", (1, 2, 3))
    case.until_round(2, world=3)
    hosts.kill(hosts.workers(2))
    case.ends(1, 2, 3)
    assert results(case.out)["weights_sha256"] == expected
    assert case.worlds() == [3, 3]


def test_a_host_whose_agent_and_worker_are_killed_is_done_without(hosts, expected, tmp_path):
    case = Case(hosts, tmp_path, "b", "1:3", (1, 2, 3), restarts=3)
    case.until_round(2, world=3)
    hosts.kill(hosts.pids(3))
    case.ends(1, 2)
    assert results(case.out)["weights_sha256"] == expected
    assert case.worlds()[-1] == 2


def test_a_cut_link_is_noticed_named_and_outlived(hosts, expected, tmp_path):
    case = Case(hosts, tmp_path, "c", "1:2", (1, 2), restarts=5, more=("--speed.timeout-s", "6"))
    case.until_round(2, world=2)
    try:
        hosts.link(2, "down")
        until(lambda: len(case.worlds()) > 1 and case.worlds()[-1] == 1, 240, "host 1 did not go on by itself\n" + case.said(1))
    finally:
        hosts.link(2, "up")
    case.ends(1)
    assert results(case.out)["weights_sha256"] == expected
    logs = "".join(path.read_text() for path in (case.out / "logs").glob("rank-*.txt"))
    assert f"on host {hosts.name(2)} is silent for 6 s" in logs or f"rank 0 on host {hosts.name(2)}" in logs, logs


def test_a_lost_first_host_ends_the_run_with_its_name_and_a_requeued_job_goes_on(hosts, expected, tmp_path):
    case = Case(hosts, tmp_path, "d", "2", (1, 3), restarts=0, more=("--speed.timeout-s", "10"))
    case.until_round(2, world=2)
    hosts.kill(hosts.pids(1))  # the rendezvous and the store are gone: by design nobody can go on
    assert case.agents[3].wait(200) != 0
    logs = "".join(path.read_text() for path in (case.out / "logs").glob("rank-*.txt"))
    assert f"on {hosts.name(1)}, where the ranks meet, is gone" in logs or f"on host {hosts.name(1)} is gone" in logs, logs
    again = Case(hosts, tmp_path, "e", "1", (1,), restarts=0, more=("--resume",))
    again.ends(1)
    assert results(again.out)["weights_sha256"] == expected


def test_a_host_that_comes_later_is_taken_in(hosts, tmp_path):
    few = str(ROOT / "tests" / "cluster" / "few_cells.py")
    # three clients of a second a round: time to come; and as launch/torchrun.sh sets it, else the first host never tells the second where to meet
    case = Case(hosts, tmp_path, "f", "1:2", (1,), script=(few,), FEW_SLOW_S="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    case.until_round(2, world=1)
    case.start(2)
    case.until_round(3, world=2)
    case.ends(1, 2)
    assert case.worlds() == [1, 2]
    assert [line["round"] for line in read(case.out / "record.jsonl") if line["kind"] == "round"] == list(range(1, 9))
    run(1, few, "--out", str(tmp_path / "alone"), timeout=300)
    assert results(case.out)["weights_sha256"] == results(tmp_path / "alone")["weights_sha256"]
