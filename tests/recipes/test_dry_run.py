"""`--dry-run N` against what a real run does. In process, small synthetic cells."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gidef import dryrun, methods
from gidef.clients.sharded import units
from gidef.config import (
    Data,
    Evaluation,
    FedAdam,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    PostHocDecoder,
    QuantitySkew,
    ReadNoise,
    Recipe,
    Rounds,
    Speed,
    Undefended,
)
from gidef.data import Dataset, synthetic_blood_cells
from gidef.errors import InputError
from gidef.main import main, sweep
from gidef.parallel import World

RECIPE = Recipe(
    data=Data(name=f"{__file__}:few_cells", num_clients=5, partition=QuantitySkew(alpha=1.0), min_examples=4), model=Model(cut="blocks.0"),
    clients=LocalTraining(batch_size=8), rounds=Rounds(count=2, cohort_size=4, server=FedAdam()), attacks={},
    defences={"undefended": Undefended(), "learned": LearnedPerturbation(ramp=0.0)}, share_policy="head",
    evaluation=Evaluation(num_victims=4, num_tuning=0, judge_epochs=1), speed=Speed(device="cpu", workers=2),
)  # fmt: skip


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=96, val=16, test=16, size=16)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    for name in ("GIDEF_DATA", "RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIDEF_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def size(folder: Path, *parts: str) -> int:
    return sum(path.stat().st_size for part in parts for path in (folder / part).rglob("*") if path.is_file())


def test_a_forecast_counts_what_a_run_then_sends_and_stores_and_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    told = {}
    rehearse = dryrun.rehearse
    monkeypatch.setattr(dryrun, "rehearse", lambda *arguments: told.update(rehearse(*arguments)))
    main(RECIPE, name="small", args=["--dry-run", "3", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for words in ("rank 0 ", "rank 2 ", "memory", "useful ranks", "for 2 training(s) of 2 rounds on 3 rank(s)", "are free in"):
        assert words in said
    assert "rank 3 " not in said

    main(RECIPE, name="small", args=["--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    start = json.loads((tmp_path / "run" / "record.jsonl").read_text().splitlines()[0])
    listed = [line.split("clients ")[1].split("   ")[0].split(",") for line in said.splitlines() if line.startswith("  rank ")]
    assert len(listed) == 3 and sorted(start["ranks"][0]["clients"]) == sorted(int(number) for one in listed for number in one)
    for summary in results["training"]:
        assert told[summary["defence"]].bytes_per_round == summary["bytes_per_round"]
        key = f"{summary['defence']}-0"
        used = size(tmp_path / "run", f"checkpoints/{key}", f"snapshots/{key}", f"clients/{key}", f"models/{key}.safetensors")
        used += (tmp_path / "run" / "models" / f"{key}.safetensors").stat().st_size
        assert 0.5 * used < told[summary["defence"]].disk_bytes < 4 * used
    assert told["learned"].rank_gib == pytest.approx(told["learned"].cost.base_gib + 2 * told["learned"].cost.step_gib)
    assert all(one.cost.step_s > 0 and one.train_s > 0 and one.evaluate_s > 0 and one.cost.base_gib > 0.05 for one in told.values())


def test_attacks_are_measured_where_nothing_is_trained_for_them_first(capsys):
    attacks = {"naive": NaiveMatching(iterations=40), "longer": JointMatching(iterations=400), "decoder": PostHocDecoder(steps=2)}
    recipe = dataclasses.replace(RECIPE, attacks=attacks, defences={"learned": LearnedPerturbation(ramp=0.0)}, seeds=(0, 1), share_policy="full")
    found = dryrun.rehearse(recipe, "small", 2)["learned"].attacks_s
    assert list(found) == list(attacks) and found["decoder"] is None and 0 < found["naive"] < found["longer"]
    assert f"attacks       {2 * (found['naive'] + found['longer']):.0f} s without decoder: not measured" in capsys.readouterr().out


def test_a_reading_of_one_latent_stands_for_those_of_all_victims(monkeypatch):
    """A clock that a reading alone moves: what it costs is counted for every victim that a worker is left with."""
    read, now, numbers = methods.latents_of, [0.0], []

    def slow(case, one, number):
        numbers.append(number)
        now[0] += 1000.0
        return read(case, one, number)

    monkeypatch.setattr(methods, "latents_of", slow)
    monkeypatch.setattr(dryrun, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + now[0]))
    evaluation = dataclasses.replace(RECIPE.evaluation, num_victims=8)
    recipe = dataclasses.replace(
        RECIPE, attacks={"read": ReadNoise(iterations=1)}, defences={"learned": LearnedPerturbation(ramp=0.0)}, share_policy="full", evaluation=evaluation
    )  # fmt: skip
    found = dryrun.rehearse(recipe, "small", 2)["learned"].attacks_s["read"]
    assert numbers == [0] and found // 1000 == 8 // (2 * RECIPE.speed.workers)


def test_an_evaluation_beside_the_next_round_takes_a_copy_of_the_model_and_counts_where_it_is_the_longer(monkeypatch, capsys):
    recipe = dataclasses.replace(RECIPE, defences={"undefended": Undefended()})
    found = {}
    for overlap in (True, False):
        monkeypatch.setattr(dryrun.build, "overlaps_evaluation", lambda recipe, world, overlap=overlap: overlap)
        found[overlap] = dryrun.rehearse(recipe, "small", 1)["undefended"]
        assert ("beside the next round" in capsys.readouterr().out) is overlap
    beside, in_line = found[True], found[False]
    assert beside.round_s == max(beside.train_s, beside.evaluate_s) and in_line.round_s == in_line.train_s + in_line.evaluate_s
    assert beside.evaluate_s == pytest.approx(4 * beside.cost.chunk_s)  # a front for each of four clients, one chunk, on one thread
    assert beside.rank_gib > beside.cost.base_gib + 2 * beside.cost.step_gib


def test_a_network_that_no_device_holds_is_counted_for_a_group_and_refused_where_a_rank_cannot_hold_its_part(monkeypatch, capsys):
    recipe = dataclasses.replace(RECIPE, defences={"learned": LearnedPerturbation(ramp=0.0)}, share_policy="full", attacks={"naive": NaiveMatching(iterations=2)})
    several = dataclasses.replace(recipe, speed=Speed(device="cpu", shard_size=2))
    measured = dryrun.rehearse(several, "small", 4)["learned"]
    assert "GiB per rank at most" in capsys.readouterr().out and measured.cost is not None and measured.attacks_s["naive"] > 0
    assert dryrun.rehearse(recipe, "small", 2)["learned"].bytes_per_round == measured.bytes_per_round  # a client counts once, on however many ranks

    world = World(device=torch.device("meta"))
    setting = dryrun.build.load_setting(recipe, world=World(), notice=print)
    made = dryrun.build.make_training(setting, recipe.defences["learned"], seed=0, world=world, state_folder=Path("none"))
    model, decoder = made.defence.model, sum(p.numel() for p in made.defence.decoder.parameters())
    numel, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (False, True))
    block = max(sum(p.numel() for p in module.parameters()) for module in units(model))

    def gib(values: float) -> float:
        return pytest.approx(4 * values / 2**30)

    whole, part = numel + 3 * trained + 3 * numel, (numel + 3 * trained + 3 * numel) / 2
    assert dryrun.counted_gib(made, recipe) == gib(whole + 4 * decoder) and dryrun.counted_gib(made, several) == gib(part + 2 * block + 4 * decoder)
    for stage, held in {0: numel + 3 * trained, 1: numel + 2 * trained, 2: numel + trained + trained / 2, 3: (numel + 3 * trained) / 2}.items():
        zero = dataclasses.replace(several, speed=Speed(shard_size=2, shard_backend="deepspeed", zero_stage=stage))
        assert dryrun.counted_gib(made, zero) == gib(held + 3 * numel / 2 + (2 * block if stage == 3 else 0) + 4 * decoder)
    offloaded = dataclasses.replace(several, speed=Speed(shard_size=2, shard_backend="deepspeed", zero_stage=2, offload="cpu"))
    assert dryrun.counted_gib(made, offloaded) == gib(numel + trained / 2 + 3 * numel / 2 + 4 * decoder)

    low, high = sorted((dryrun.counted_gib(made, several), dryrun.counted_gib(made, recipe)))
    capsys.readouterr()
    monkeypatch.setattr(dryrun, "_device_gib", lambda device: (low + high) / 2)  # a part fits, the whole does not
    counted = dryrun.rehearse(several, "small", 4)["learned"]
    said = capsys.readouterr().out
    assert counted.cost is None and counted.rank_gib == low and math.isnan(counted.round_s) and counted.bytes_per_round == measured.bytes_per_round
    assert (counted.reduced_bytes, counted.disk_bytes) == (measured.reduced_bytes, measured.disk_bytes)
    assert "no seconds" in said and "unknown seconds" in said and "GiB per rank at least" in said
    with pytest.raises(InputError, match=rf"about {high:.3g} GiB, and the device \(cpu\) has {(low + high) / 2:.3g}\. Raise speed.shard_size"):
        dryrun.rehearse(recipe, "small", 1)
    monkeypatch.setattr(dryrun, "_device_gib", lambda device: low / 2)
    with pytest.raises(InputError, match=f"about {low:.3g} GiB"):
        dryrun.rehearse(several, "small", 2)


def test_a_step_that_takes_all_memory_is_one_message_or_goes_uncounted_in_a_group(monkeypatch):
    recipe = dataclasses.replace(RECIPE, defences={"undefended": Undefended()}, share_policy="full")

    def greedy(*_: object) -> dryrun.Cost:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dryrun, "_device_gib", lambda device: 64.0)
    monkeypatch.setattr(dryrun, "_measure", greedy)
    with pytest.raises(InputError, match=r"undefended: a rank needs about 64 GiB or more, and the device \(cpu\) has 64\."):
        dryrun.rehearse(recipe, "small", 1)
    assert dryrun.rehearse(dataclasses.replace(recipe, speed=Speed(shard_size=2)), "small", 2)["undefended"].cost is None
    monkeypatch.setattr(dryrun, "_measure", lambda *_: dryrun.Cost(0.1, 0.1, 0.1, 1.0, 40.0))
    with pytest.raises(InputError, match="about 81 GiB, and the device"):  # two workers
        dryrun.rehearse(recipe, "small", 1)
    monkeypatch.setattr(dryrun, "_measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dryrun.rehearse(recipe, "small", 1)


def test_the_slowest_rank_decides_and_more_ranks_than_useful_do_not_help():
    assert dryrun.useful_ranks([4.0, 2.0, 2.0]) == 2.0
    assert dryrun.makespan([[4.0], [2.0, 2.0]], 1) == 4.0 == dryrun.makespan([[4.0], [2.0], [2.0]], 1)
    assert dryrun.makespan([[4.0, 2.0, 2.0]], 1) == 8.0
    assert dryrun.makespan([[4.0, 2.0, 2.0]], 2) == 4.0  # 4 beside 2 + 2
    assert dryrun.makespan([[1.0], []], 3) == 1.0


def test_what_a_run_would_refuse_a_dry_run_refuses(tmp_path, monkeypatch, capsys):
    def refused(*arguments: str, recipe: Recipe = RECIPE) -> str:
        with pytest.raises(SystemExit) as end:
            main(recipe, name="small", args=list(arguments))
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "--dry-run many" in refused("--dry-run", "many") and "--dry-run 0" in refused("--dry-run", "2", "--ranks", "0")
    assert "--ranks is of --dry-run" in refused("--ranks", "4")
    assert "exceeds" in refused("--dry-run", "2", "--rounds.cohort-size", "9")
    assert "nowhere.npz" in refused("--dry-run", "2", "--data.path", "nowhere.npz")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").touch()
    assert "--resume" in refused("--dry-run", "2", "--out", str(tmp_path / "run"))
    assert "cannot be written to" in refused("--dry-run", "2", "--out", str(tmp_path / "run" / "recipe.json" / "run"))
    assert "at most 1000000 ranks" in refused("--dry-run", "10000000000")
    monkeypatch.setattr(dryrun.shutil, "disk_usage", lambda path: dryrun.shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="on disk"):
        dryrun.rehearse(dataclasses.replace(RECIPE, defences={"undefended": Undefended()}), "small", 1)


def test_a_sweep_forecasts_each_row(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dryrun, "rehearse", lambda recipe, name, ranks: seen.append((recipe.seeds, name, ranks)))
    rows = {"a": RECIPE, "b": dataclasses.replace(RECIPE, seeds=(1,))}
    sweep(rows, name="two", args=["--dry-run", "8", "--rows", "b"])
    sweep(rows, name="two", args=["--dry-run", "--ranks", "2"])
    assert seen == [((1,), "two b", 8), ((0,), "two a", 2), ((1,), "two b", 2)] and list(tmp_path.iterdir()) == []
