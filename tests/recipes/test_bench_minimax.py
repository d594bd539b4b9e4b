"""The benchmark of training steps: its contenders take the steps that it says, its bars, and a short run of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "bench"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The script as a module, which finds attack.py beside it."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("bench_minimax", FOLDER / "minimax.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_minimax"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(bench, **changes):
    return bench.Options(**{"cases": ("small",), "turns": 1, "steps": 1, "batch": 4} | changes)


@pytest.mark.parametrize("game", ["mse", "default"])
def test_the_steps_that_are_timed_are_the_same_step(bench, game):
    case = bench.CASES["small"]
    assert bench.disagreement(case, game, CPU) < 1e-11
    # naive, thrifty and alternating are one algorithm: a decoder step, then the client's against the new decoder
    naive, thrifty = (bench.ByHand(case, game, 4, CPU, torch.float64) for _ in range(2))
    ours = bench.game_player(case, game, "alternating", CPU, torch.float64)
    client = bench.a_client(case, 4, CPU)
    ours.begin(client, seed=0, round=0, progress=1.0, first=False)
    sgd = bench.sgd(ours.model)
    for _ in range(2):
        naive.naive()
        thrifty.thrifty()
        sgd.zero_grad()
        ours.loss(bench.floating(client, torch.float64), client.labels, rows=torch.arange(4), epoch=0).backward()
        sgd.step()
    front, head = case.halves(ours.model.backbone)
    mine = [*front.parameters(), *ours.model.perturbation.parameters(), *head.parameters(), *ours.kept.parameters()]
    for p, q, r in zip([*naive.client.parameters(), *naive.decoder.parameters()], [*thrifty.client.parameters(), *thrifty.decoder.parameters()], mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-8)


def test_bido_by_hand_takes_the_library_s_step(bench, monkeypatch):
    nets = []
    sgd = bench.sgd
    monkeypatch.setattr(bench, "sgd", lambda net: nets.append(net) or sgd(net))
    case, options = bench.CASES["small"], small(bench, batch=8)
    bench.bido_by_hand(case, options, CPU)()
    bench.played(bench.BiDODefence(case.model(), bench.BiDOSettings()).player(), bench.a_client(case, 8, CPU))()
    bench.plain(case, 8, CPU)()
    by_hand, ours, plain = ([p.detach() for p in net.parameters()] for net in nets)
    moved = max(float((p - q).abs().max()) for p, q in zip(ours, plain, strict=True))
    assert max(float((p - q).abs().max()) for p, q in zip(by_hand, ours, strict=True)) < 0.05 * moved  # theirs inverts in float32


def test_the_bars_are_told_by_medians(bench):
    rows = {name: {"ms": ms, "fastest": fastest} for name, ms, fastest in (
        ("plain", 10.0, 9.0), ("naive mse", 18.0, 15.0), ("thrifty mse", 14.0, 13.0), ("simultaneous mse", 12.1, 10.0), ("simultaneous default", 13.0, 11.0),
    )}  # fmt: skip
    pairs = {name: {"ms": ms, "fastest": ms} for name, ms in (("plain", 1.0), ("BiDO: as its authors", 2.0), ("BiDO", 2.7), ("DP-SGD", 3.0), ("DP-SGD: Opacus, hooks", 4.0), ("DP-SGD: Opacus, ghost clipping", 2.5))}
    told = {(one["step"], one["beside"]): one for one in bench.verdicts({"resnet18 minimax": rows, "small defences": pairs})}
    assert [one["holds"] for one in told.values()] == [False, True, False, True, False, True]
    assert told["simultaneous mse", "plain"]["ratio"] == pytest.approx(1.21)
    assert told["DP-SGD", "DP-SGD: Opacus, ghost clipping"]["ratio"] == pytest.approx(1.2)  # the faster of theirs
    assert bench.verdicts({"small minimax": rows}) == []


def test_a_compiled_step_is_held_against_the_compiled_plain_one_at_the_operations_of_the_step_as_it_is(bench, monkeypatch):
    spent = {"plain": 8.0, "mse": 12.0, "plain, compiled": 2.0, "mse, compiled": 2.5}
    now = {"step": 0.0}

    class Watch:
        def __init__(self, device):
            self.begun = now["step"]

        def read(self):
            return SimpleNamespace(cpu=now["step"] - self.begun, wall=now["step"] - self.begun)

    def step_of(name):
        def step():
            now["step"] += spent[name]
        return step

    steps = {name: step_of(name) for name in spent}
    flops = {steps["plain"]: 100, steps["mse"]: 110}
    monkeypatch.setattr(bench.attack, "Watch", Watch)
    monkeypatch.setattr(bench, "operations", lambda step: flops.get(step, 0))
    rows = bench.measure(steps, small(bench, turns=2), CPU, peak=1e9)
    assert rows["mse"]["over"] == pytest.approx(1.5 / 1.1) and rows["plain, compiled"]["over"] == pytest.approx(1)
    assert rows["mse, compiled"]["over"] == pytest.approx(1.25 / 1.1) and rows["mse, compiled"]["ratio"] == pytest.approx(2.5 / 8)
    assert "1.14" in _printed(bench.table("", rows))


def _printed(table):
    from rich.console import Console

    with (console := Console(width=200)).capture() as caught:
        console.print(table)
    return caught.get()


def test_a_short_run_measures_prints_and_saves(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.attack, "peak_gflops", functools.partial(bench.attack.peak_gflops, seconds=0.05))
    options = small(bench, parts=("minimax",), small=True, out=tmp_path / "bench.json")
    bench.main(options)
    said, saved = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    rows = saved["rows"]["small minimax"]
    assert set(rows) == {"plain", *(f"{step} {game}" for step in ("naive", "thrifty", "alternating", "simultaneous") for game in bench.GAMES)}
    for row in rows.values():
        assert row["ms"] > 0 and row["gflop"] > 0 and 0 < row["of_peak"] < 1.5 and len(row["all_ms"]) == 1
    flop = {name: row["ratio_flop"] for name, row in rows.items()}
    assert 1 < flop["simultaneous mse"] < flop["alternating mse"] < flop["thrifty mse"] < flop["naive mse"]
    assert flop["simultaneous mse"] < flop["simultaneous default"] < flop["alternating default"]
    assert rows["naive mse"]["over"] == pytest.approx(rows["naive mse"]["ratio"] / flop["naive mse"])
    assert "simultaneous default" in said and saved["gradients_apart"]["small"]["mse"] < 1e-9
    with pytest.raises(bench.InputError, match="cases"):
        bench.main(dataclasses.replace(options, cases=("vit",)))
