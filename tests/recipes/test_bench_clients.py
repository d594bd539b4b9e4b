"""The benchmarks of clients, rounds and growth: short runs of them, and their yardsticks by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gidef.errors import InputError
from gidef.parallel import World

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "bench"


def load(name: str) -> ModuleType:
    """A benchmark as a module; it imports its neighbours by name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def _neighbours() -> Iterator[None]:
    before, kept = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in ("attack", "clients", "flower_side", "round", "growth"):
        if name not in before:
            sys.modules.pop(name, None)
    torch.set_num_threads(kept)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = load("attack")
    monkeypatch.setattr(attack, "peak_gflops", lambda device, by_cpu, seconds=1.0: {"gemm": 10.0})
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_clients_at_once_beside_the_loop(tmp_path):
    clients = load("clients")
    told = clients.main(clients.Options(small=True, at_once=(2, 4), out=tmp_path / "clients.json"))
    (row,) = told["rows"]
    assert row["parameters"] == 4258 and row["clients"] == 4 and row["steps"] == 2
    assert set(row["ratio"]) == {1, 2, 4} and row["ratio"][1] == 1 and all(len(values) == 2 and min(values) > 0 for values in row["ms"].values())
    assert 0 < max(row["distance"].values()) < 1e-3 and row["chosen"] in (1, 2, 4)
    assert json.loads((tmp_path / "clients.json").read_text())["rows"][0]["case"] == row["case"]
    with pytest.raises(InputError, match="--cases"):
        clients.main(clients.Options(cases=("none such",)))
    with pytest.raises(InputError, match="--at-once takes numbers from 2"):
        clients.main(clients.Options(at_once=(1, 2)))


def test_the_nets_are_those_of_the_settings():
    clients, round_ = load("clients"), load("round")
    sizes = {name: sum(p.numel() for p in setting.net().parameters()) for name, setting in round_.SETTINGS.items() if name != "B"}
    assert sizes == {"A": 1_626_442, "tiny": 4_882}
    assert sum(p.numel() for p in clients.mlp().parameters()) == 302_144


def test_a_round_beside_a_bare_loop(tmp_path):
    round_ = load("round")
    told = round_.main(round_.Options(small=True, peer=False, flower=False, recipe=False, cohort=3, out=tmp_path / "round.json"))
    (row,) = told["rows"]
    assert {"bare", "gidef"} <= set(row["sides"]) and row["parameters"] == 4882 and told["clock"] == "cpu"
    assert max(row["apart"].values()) < 1e-5
    assert row["flops"] == 50 * 2 * 192 * 24 * 3 + 50 * 2 * 24 * 10 * 3  # forward, and backward to weights and inputs
    bare, gidef = row["sides"]["bare"], row["sides"]["gidef"]
    assert bare["ratio"] == 1 and gidef["extra_ms"] == pytest.approx(statistics.median(b - a for a, b in zip(bare["ms"], gidef["ms"], strict=True)))
    assert json.loads((tmp_path / "round.json").read_text())["ranks"] == 1
    with pytest.raises(InputError, match="--settings"):
        round_.main(round_.Options(settings=("C",)))


def test_sides_that_do_not_agree_are_not_timed(tmp_path, monkeypatch):
    round_ = load("round")
    monkeypatch.setattr(round_, "agree", lambda problem, with_peer, with_flower: {"gidef": 0.1})
    with pytest.raises(RuntimeError, match="do not agree"):
        round_.main(round_.Options(small=True, peer=False, flower=False, recipe=False, cohort=2, out=tmp_path / "round.json"))


@pytest.mark.slow
def test_a_round_beside_the_peer_and_from_end_to_end(tmp_path):
    pytest.importorskip("pfl", reason='the peer `pfl` is not installed here: pip install -e ".[bench]"')
    round_ = load("round")
    (row,) = round_.main(round_.Options(small=True, flower=False, out=tmp_path / "round.json"))["rows"]
    assert {"bare", "gidef", "pfl", "recipe"} <= set(row["sides"]) and row["apart"]["pfl"] < 1e-5


def test_what_an_actor_of_flower_computes_is_the_bare_loop_s_client(tmp_path, monkeypatch, capsys):
    """Without Flower: its mean over clients' weights after a step on all of their images, by hand. Where it is missing, the run says so."""
    round_, side = load("round"), load("flower_side")
    problem = round_.Problem(dataclasses.replace(round_.SETTINGS["tiny"], cohort=3), World(0, 1, 0, torch.device("cpu")))
    start = [tensor.numpy().copy() for tensor in problem.start.values()]
    each = [side.trained(start, "tiny", 3, "cpu", 50, place) for place in range(3)]
    expected = round_.bare(problem, 50)()
    for number, tensor in enumerate(expected.values()):
        mean = sum(torch.from_numpy(weights[number]) for weights, _ in each) / 3
        torch.testing.assert_close(mean, tensor, rtol=1e-5, atol=1e-6)
    assert {examples for _, examples in each} == {50} and not torch.equal(torch.from_numpy(each[0][0][0]), torch.from_numpy(each[1][0][0]))
    monkeypatch.setattr(side, "is_there", lambda: False)
    (row,) = round_.main(round_.Options(small=True, peer=False, recipe=False, cohort=2, out=tmp_path / "round.json"))["rows"]
    assert "flower" not in row["sides"] and "Flower is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_round_on_two_ranks_beside_the_peer(tmp_path):
    """The peer joins the ranks, and gidef goes along."""
    pytest.importorskip("pfl", reason='the peer `pfl` is not installed here: pip install -e ".[bench]"')
    out = tmp_path / "round.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FOLDER / "round.py"), "--small", "--no-recipe", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"})
    (row,) = json.loads(out.read_text())["rows"]
    assert {"bare", "gidef", "pfl"} <= set(row["sides"]) and max(row["apart"].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_round_beside_flower(tmp_path):
    pytest.importorskip("flwr", reason='Flower is not installed here: pip install "flwr[simulation]"')
    round_ = load("round")
    (row,) = round_.main(round_.Options(small=True, peer=False, recipe=False, out=tmp_path / "round.json"))["rows"]
    assert len(row["sides"]["flower"]["ms"]) == 2 and row["apart"]["flower"] < 1e-4


def test_the_exponent_of_a_power_is_that_power():
    growth = load("growth")
    assert growth.exponent([1, 10, 100], [2.0, 20.0, 200.0]) == pytest.approx(1)
    assert growth.exponent([2, 4, 8], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_growth_is_measured_written_drawn_and_joined(tmp_path):
    growth = load("growth")
    rows = growth.main(growth.Options(small=True, axes=("parameters",), repetitions=1, out=tmp_path / "one"))
    assert [row["size"] for row in rows] == [4_882, 986_570] and all(math.isclose(row["seconds"] * row["rounds_per_s"], 1) for row in rows)
    assert growth.read(tmp_path / "one" / "growth.csv") == rows and (tmp_path / "one" / "growth.png").stat().st_size > 5000
    other = [{**row, "ranks": 2} for row in rows]
    growth.write(tmp_path / "two.csv", other)
    joined = growth.main(growth.Options(join=(tmp_path / "one" / "growth.csv", tmp_path / "two.csv"), out=tmp_path / "both"))
    assert joined == rows + other and set(growth.lines(joined)) == {("parameters", 1), ("parameters", 2)}
    with pytest.raises(InputError, match="--axes"):
        growth.main(growth.Options(axes=("none",)))


def test_joined_rows_of_several_ranks_are_drawn_against_ranks_beside_the_ideal_line(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    growth, figures, close = load("growth"), [], plt.close
    seconds = {("clients", 10): {1: 1.0, 2: 0.6, 4: 0.4}, ("clients", 100): {1: 8.0, 2: 4.0, 4: 2.5}, ("clients", 300): {1: 30.0}, ("pixels", 28): {1: 2.0}}
    for ranks in (1, 2, 4):  # a CSV of each number of ranks; 300 clients, and pixels, were measured on one rank alone
        rows = [(axis, size, ranks, by[ranks], 1 / by[ranks], 10.0 * ranks, "cpu") for (axis, size), by in seconds.items() if ranks in by]
        growth.write(tmp_path / f"{ranks}.csv", [dict(zip(growth.FIELDS, row, strict=True)) for row in rows])
    monkeypatch.setattr(plt, "close", figures.append)
    paths = tuple(tmp_path / f"{ranks}.csv" for ranks in (4, 1, 2))
    rows = growth.main(growth.Options(join=paths, out=tmp_path / "both"))
    assert {key: [row["ranks"] for row in line] for key, line in growth.by_ranks(rows).items()} == {("clients", 100): [1, 2, 4]}
    (figure,) = figures
    assert [place.get_title() for place in figure.axes[:3]] == ["clients", "pixels", "ranks"]
    measured, ideal = figure.axes[2].get_lines()
    assert measured.get_label() == "100 clients" and list(measured.get_xdata()) == list(ideal.get_xdata()) == [1, 2, 4]
    assert list(measured.get_ydata()) == [1 / 8, 1 / 4, 1 / 2.5] and list(ideal.get_ydata()) == [1 / 8, 1 / 4, 1 / 2] and ideal.get_linestyle() == ":"
    assert [list(line.get_ydata()) for line in figure.axes[5].get_lines()] == [[10, 20, 40]]
    close(figure)
    growth.main(growth.Options(join=paths[1:2], out=tmp_path / "one"))
    assert [place.get_title() for place in figures[1].axes[:2]] == ["clients", "pixels"] and len(figures[1].axes) == 4
    close(figures[1])


def test_memory_of_a_round_is_flat_in_the_number_of_clients():
    growth = load("growth")
    net = growth.perceptron(32)  # of 0.4 MiB: a hundred updates would take 38 MiB at once
    few, many = (growth.measure("clients", growth.Case(count, net, count, 4, 4, 32), growth.Options(repetitions=1), World()) for count in (5, 100))
    if few["mib"] is None:
        pytest.skip("this system does not tell a process' peak memory")
    assert many["mib"] < few["mib"] + 12
