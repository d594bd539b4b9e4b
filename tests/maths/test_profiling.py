"""Where a round's time goes: the partition by hand, and the command on synthetic cells."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from gidef import cli, profiling, spans
from gidef.data import Dataset, synthetic_blood_cells
from gidef.profiling import Stretch, shares

PAGE = f"""
from gidef.config import *
RECIPE = Recipe(
    data=Data(name="{__file__}:few_cells", num_clients=3), clients=LocalTraining(batch_size=8), rounds=Rounds(count=50),
    defences={{"plain": Undefended(), "learned": LearnedPerturbation(schedule="simultaneous"), "private": Matched(defence=Clipping(), field="bound", accuracy=0.5)}},
    evaluation=Evaluation(num_victims=1, num_tuning=0),
)
SMALL = Recipe(data=RECIPE.data, rounds=Rounds(count=1), evaluation=RECIPE.evaluation)
NUMBER = 3
"""


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=8, test=8, size=16)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A recipe's file, away from launchers and networks."""
    for name in ("GIDEF_DATA", "RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIDEF_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"page_{tmp_path.name}.py"
    path.write_text(PAGE)
    before = torch.get_num_threads()
    yield path
    torch.set_num_threads(before)


def test_each_moment_counts_for_the_stretch_that_was_entered_last():
    told = [
        Stretch("round", 10, 90), Stretch("client", 12, 60), Stretch("steps", 14, 50), Stretch("data", 15, 17), Stretch("operator", 15, 16),
        Stretch("operator", 20, 40), Stretch("operator", 22, 30), Stretch("optimiser", 44, 48), Stretch("operator", 45, 47),
        Stretch("evaluation", 90, 95), Stretch("operator", 91, 94), Stretch("checkpoint", 97, 120),
    ]  # fmt: skip
    found = shares(told, 0, 100)
    by_hand = {
        "arithmetic": 20, "steps": 36 - 2 - 20 - 4, "data": 2, "optimiser": 4, "client": 48 - 36, "round": 80 - 48, "evaluation": 5, "checkpoint": 3,
        "rest": 10 + 2,
    }  # fmt: skip
    assert found == pytest.approx({kind: time / 100 for kind, time in by_hand.items()})
    assert sum(found.values()) == pytest.approx(1)
    assert shares([], 0, 10)["rest"] == 1


def test_a_gpu_idles_under_the_names_of_stretches_that_are_repeated_on_it():
    def event(start, end, device, annotation=False):
        return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=device, is_user_annotation=annotation)

    events = [event(0, 10, DeviceType.CUDA, True), event(1, 3, DeviceType.CUDA), event(2, 4, DeviceType.CUDA), event(0, 9, DeviceType.CPU)]
    assert profiling._idle(events, 0, 10) == pytest.approx(0.7)
    assert profiling._idle(events[3:], 0, 10) is None


def test_stretches_are_named_only_while_somebody_watches():
    @spans.span("thing")
    def thing(x):
        return x + 1

    def names():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            assert thing(1) == 2
        return {event.name for event in seen.events()}

    assert spans.PREFIX + "thing" not in names()
    with spans.watched():
        assert spans.PREFIX + "thing" in names()
    assert spans.PREFIX + "thing" not in names()
    assert thing.__name__ == "thing"


def test_a_recipe_is_profiled_one_defence_at_a_time(page, capsys):
    found = profiling.profile(str(page), ["--out", "traces", "--profiled-rounds", "2", "--only", "learned", "private"])
    said = capsys.readouterr().out
    assert list(found) == ["learned", "private"]
    for name, profile in found.items():
        assert sum(profile.shares.values()) == pytest.approx(1) and min(profile.shares.values()) >= 0
        # all of a round is there: training, aggregation, what follows; of two rounds the first's checkpoint is written beside the second
        assert all(profile.shares[kind] > 0 for kind in ("arithmetic", "steps", "data", "optimiser", "client", "round", "evaluation", "checkpoint")), profile.shares
        assert profile.seconds > 0 and profile.watched_s > 0 and (profile.idle is None) == (not torch.cuda.is_available())
        costs = [cost for _, _, cost in profile.costs]
        assert costs == sorted(costs, reverse=True)
        assert torch.cuda.is_available() or "convolution" in " ".join(row[0] for row in profile.costs[:5])
        trace = json.loads(gzip.decompress((page.parent / "traces" / f"{name}-0.json.gz").read_bytes()))
        events = [event["name"] for event in trace["traceEvents"] if event.get("cat") != "gpu_user_annotation"]  # a GPU's own line repeats the spans
        assert events.count("gidef: client") == 2 * 3 and events.count("gidef: round") == 2
        assert events.count("gidef: optimiser") == 2 * 3 * 2  # rounds, clients, batches
        assert f"{name}: " in said and f"{profile.outside:.0%} outside the arithmetic" in said
    assert {path.name for path in page.parent.iterdir()} >= {"traces"} and not (page.parent / "runs").exists()  # no run is left behind


def test_what_is_no_recipe_is_refused(page, capsys):
    cases = {
        (str(page), "--profiled-rounds", "0"): "give at least 1",
        (f"{page}:NUMBER",): "is a int: expected a Recipe",
        (f"{page}:MISSING",): "cannot load",
        ("tiny",): "is no recipe's file",
        (str(page), "--data.num-clients", "0"): "data.num_clients=0 is too small",
        (str(page), "--out", str(page)): f"cannot write {page}: File exists",
    }
    for arguments, words in cases.items():
        with pytest.raises(SystemExit) as end:
            cli.main(["profile", *arguments])
        assert end.value.code == 2 and words in capsys.readouterr().err, arguments
