"""The benchmark against `breaching`: its yardsticks by hand, a short run of it, and both sides on one path where the peer is installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gidef.attack import drain
from gidef.errors import InputError

CPU = torch.device("cpu")
there = all(importlib.util.find_spec(name) is not None for name in ("breaching", "hydra", "omegaconf"))
needs_peer = pytest.mark.skipif(not there, reason='the peer `breaching` is not installed here: pip install -e ".[bench]"')


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script as a module."""
    path = Path(__file__).resolve().parents[2] / "recipes" / "bench" / "attack.py"
    spec = importlib.util.spec_from_file_location("bench_attack", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_attack"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_it_was(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Synthetic images, a short look at the machine's peak, and the caller's number of threads."""
    monkeypatch.setattr(bench, "peak_gflops", functools.partial(bench.peak_gflops, seconds=0.05))
    for name in ("GIDEF_DATA", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIDEF_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case_of(bench: ModuleType, name: str, **changes: int):
    return dataclasses.replace(next(case for case in bench.CASES if case.name == name), **changes)


def options(bench: ModuleType, folder: Path, **changes: object):
    """A run of seconds."""
    small = {"models": ("lenet",), "modes": ("loop", "vmap"), "attacks": 3, "iterations": 24, "repetitions": 2, "out": folder / "bench.json"}
    return bench.Options(**small | changes)


# --- yardsticks ----------------------------------------------------------------------------------------------------------


def test_flops_are_those_counted_by_hand_on_lenet(bench: ModuleType) -> None:
    forward, iteration = bench.flops(bench.pose(case_of(bench, "lenet-b1", attacks=1), 0, CPU))
    by_hand = 2 * 16 * 16 * 12 * 3 * 25 + 2 * (2 * 8 * 8 * 12 * 12 * 25) + 2 * 768 * 10
    assert forward == by_hand
    assert 6 * forward < iteration < 9 * forward


def test_the_peer_s_total_variation_sees_zeros_beyond_two_borders(bench: ModuleType) -> None:
    constant = torch.full((2, 3, 4, 8), bench.MEAN + 3 * bench.STD)  # 3 once normalised: only the last column and the last row differ, from 0
    assert bench.peer_tv(SimpleNamespace(images=constant)).item() == pytest.approx(3 / 8 + 3 / 4)
    pixel = torch.full((1, 1, 4, 8), bench.MEAN)
    pixel[..., 1, 1] += 2 * bench.STD  # four edges of height 2 around one pixel of 32
    assert bench.peer_tv(SimpleNamespace(images=pixel)).item() == pytest.approx(4 * 2 / 32)


def test_steps_fall_tenfold_at_the_peer_s_marks(bench: ModuleType) -> None:
    class Noted:
        seen: list[float] = []

        def step(self, variables, gradients, loss, state, *, rates, iteration, evaluate):
            self.seen.append(float(rates["images"]))
            return variables, state

    steps = bench.PeerSteps(iterations=24, adam=Noted())
    for iteration in range(24):
        steps.step({}, {}, None, {}, rates={"images": torch.ones(1)}, iteration=torch.tensor(iteration), evaluate=None)
    # torch.optim.lr_scheduler.MultiStepLR with milestones 24 // 2.667 = 8, 24 // 1.6 = 14 and 24 // 1.142 = 21
    assert Noted.seen == pytest.approx([1.0] * 8 + [0.1] * 6 + [0.01] * 7 + [0.001] * 3)


def test_images_a_tenth_apart_are_at_20_db_in_any_order(bench: ModuleType) -> None:
    problem = bench.pose(case_of(bench, "convnetsmall-b4", attacks=2), 0, CPU)
    grey = dataclasses.replace(problem, images=0.2 + 0.5 * problem.images)
    assert bench.psnr(grey.images.flip(1) + 0.1, grey) == pytest.approx([20.0, 20.0], abs=1e-3)


def test_a_problem_holds_the_gradient_of_its_images_and_depends_on_its_seed_alone(bench: ModuleType) -> None:
    case = case_of(bench, "resnet20-b1", attacks=2)
    problem, again, other = (bench.pose(case, seed, CPU) for seed in (0, 0, 1))
    assert torch.equal(problem.starts, again.starts) and torch.equal(problem.images, again.images)
    assert not torch.equal(problem.starts, other.starts) and not torch.equal(problem.images, other.images)
    names = dict(problem.net.named_parameters())
    assert all(torch.equal(names[name], tensor) for name, tensor in again.net.named_parameters())
    logits = problem.net((problem.images[1] - 0.5) / 0.25)
    true = torch.autograd.grad(-logits.log_softmax(-1)[0, problem.labels[1, 0]], list(names.values()))
    for name, tensor in zip(names, true, strict=True):
        torch.testing.assert_close(problem.gradients[1][name], tensor)
    assert not problem.net.training


# --- runs ------------------------------------------------------------------------------------------------------------------


def test_without_the_peer_the_engine_is_measured_alone_and_an_unknown_mode_left_out(bench: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "MODES", (*bench.MODES, "quantum"))
    monkeypatch.setattr(bench, "peer_is_there", lambda: False)
    results = bench.main(options(bench, tmp_path, modes=("loop", "vmap", "quantum"), iterations=4, seeds=(0, 1)))
    said = capsys.readouterr().out
    assert "has no mode 'quantum'; it is left out" in said and "breaching is not installed" in said and "lenet-b1" in said
    (row,) = results["rows"]
    assert list(row["contenders"]) == ["loop", "vmap"] and row["best"] in row["contenders"] and "ratio" not in row
    for one in row["contenders"].values():
        spread = one["ms"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"] and len(spread["all"]) == 2
        assert one["gflops"] == pytest.approx(row["gflop_iteration"] / spread["median"] * 1e3) and one["first_s"] > 0
        assert one["of_floor"] == pytest.approx(7 * row["gflop_forward"] / max(results["peak_gflops"].values()) / spread["median"] * 1e3)
    assert len(row["psnr_db"]["ours_all"]) == 2 * 3 and row["psnr_db"]["ours"] == pytest.approx(sum(row["psnr_db"]["ours_all"]) / 6)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == results["rows"]
    assert {"python", "torch", "gidef", "breaching", "commit"} <= results["versions"].keys() and results["hardware"]["threads"] == 1


def test_unknown_names_and_impossible_numbers_are_refused_in_words(bench: ModuleType, tmp_path: Path) -> None:
    for changes, text in (
        ({"models": ("lenet", "alexnet")}, "--models alexnet: choose of lenet, resnet20"),
        ({"modes": ("fast",)}, "--modes fast: choose of loop, vmap"),
        ({"repetitions": 0}, "expected at least 1"),
        ({"device": "cuda"} if not torch.cuda.is_available() else {"threads": 0}, "--device cuda|expected at least 1"),
    ):
        with pytest.raises(InputError, match=text):
            bench.main(options(bench, tmp_path, **changes))


# --- beside the peer -------------------------------------------------------------------------------------------------------


@needs_peer
def test_the_nets_are_the_peer_s(bench: ModuleType) -> None:
    with bench.quiet():
        from breaching.cases.models.model_preparation import ConvNetSmall, construct_model

        data = SimpleNamespace(modality="vision", task="classification", name="CIFAR10", classes=10, shape=(3, 32, 32))
        theirs = {"lenet": construct_model("lenet_zhu", data)[0], "resnet20": construct_model("ResNet20", data)[0], "convnetsmall": ConvNetSmall()}
    images = torch.rand(2, 3, 32, 32)
    for name, their in theirs.items():
        torch.manual_seed(0)
        our = bench.NETS[name]().eval()
        parameters = list(our.parameters())
        assert [parameter.shape for parameter in their.parameters()] == [parameter.shape for parameter in parameters], name
        with torch.no_grad():
            for parameter, value in zip(their.parameters(), parameters, strict=True):
                parameter.copy_(value)
            torch.testing.assert_close(our(images), their.eval()(images), msg=name)


@needs_peer
@pytest.mark.parametrize(("name", "attacks", "iterations"), [("lenet-b1", 2, 24), ("resnet20-b1", 1, 4), ("convnetsmall-b4", 1, 4)])
def test_both_sides_follow_one_path_in_double_precision(bench: ModuleType, name: str, attacks: int, iterations: int) -> None:
    problem = bench.pose(case_of(bench, name, attacks=attacks), 0, CPU, torch.float64)
    theirs = bench.peer_attack(problem, iterations, dtype="double")
    ours = drain(bench.Engine(problem, bench.settings_for(problem, iterations), "vmap", attacks).start(iterations))
    losses = torch.tensor(theirs.losses)
    torch.testing.assert_close(ours["losses"][:, :iterations], losses, rtol=1e-5, atol=0)
    # the peer keeps the image after the step from its lowest loss, we that of the lowest: the same one here
    assert torch.equal(losses.argmin(1) + 1, ours["losses"].argmin(1))
    assert (ours["images"] - theirs.images).abs().max() < 1e-6
    assert (ours["images"] - problem.starts).abs().mean() > 0.01


@needs_peer
def test_a_run_beside_the_peer_agrees_in_psnr_and_says_how_fast_both_are(bench: ModuleType, tmp_path: Path, capsys) -> None:
    (row,) = bench.main(options(bench, tmp_path))["rows"]
    assert list(row["contenders"]) == ["breaching", "loop", "vmap"]
    assert abs(row["psnr_db"]["ours"] - row["psnr_db"]["peer"]) <= 0.05 and row["counts"] is True
    assert row["psnr_db"]["ours_all"] == pytest.approx(row["psnr_db"]["peer_all"], abs=0.05)
    speeds = {name: one["ms"]["median"] for name, one in row["contenders"].items()}
    assert row["ratio"] == pytest.approx(speeds["breaching"] / min(speeds["loop"], speeds["vmap"])) and math.isfinite(row["ratio"])
    assert 0 < row["seconds_to_peer_quality"] <= row["whole_s"]["ours"]
    said = capsys.readouterr().out
    assert "ratio" in said and f"{row['ratio']:.2f}" in said


@needs_peer
def test_a_ratio_between_unequal_results_does_not_count(bench: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    true = bench.settings_for
    monkeypatch.setattr(bench, "settings_for", lambda problem, iterations, **more: true(problem, iterations, **more | {"lr": 1e-4}))
    (row,) = bench.main(options(bench, tmp_path, modes=("vmap",), attacks=1, iterations=8, repetitions=1))["rows"]
    assert row["counts"] is False and row["seconds_to_peer_quality"] is None
    assert "PSNR differs" in capsys.readouterr().out


# --- streamed data --------------------------------------------------------------------------------------------------------


def test_the_benchmark_of_streams_trains_to_the_same_bits_and_says_what_it_measured(tmp_path, capsys):
    path = Path(__file__).resolve().parents[2] / "recipes" / "bench" / "data.py"
    spec = importlib.util.spec_from_file_location("bench_data", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_data"] = module
    spec.loader.exec_module(module)
    module.main(module.Options(images=12, size=32, model="small", batch_size=5, per_shard=5, repetitions=2, out=tmp_path / "data.json"))
    told = json.loads((tmp_path / "data.json").read_text())
    assert set(told["ratios"]) == {"npy", "png", "jpeg"} and all(len(turns) == 2 and min(turns) > 0 for turns in told["rates"].values())
    assert "% of memory" in capsys.readouterr().out
