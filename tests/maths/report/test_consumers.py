"""TensorBoard and Weights & Biases as readers of the record; skipped where they are not installed."""

from __future__ import annotations

import pytest

from gidef.errors import InputError
from gidef.report import Record, consumers

ROUND = {"defence": "learned", "seed": 1, "loss": 0.5, "val_accuracy": 0.75, "val_accuracy_worst": 0.5, "seconds": 2.0, "cohort": 3}
NAME = "learned/seed 1/val_accuracy"


class Kept:
    def __init__(self):
        self.lines, self.closed = [], False

    def take(self, line):
        self.lines.append(line)

    def close(self):
        self.closed = True


def test_a_consumer_gets_what_is_there_and_what_comes_and_is_closed(tmp_path):
    with Record(tmp_path / "record.jsonl") as record:
        record.append("round", round=1, **ROUND)
        record.feed([kept := Kept()])
        record.append("round", round=2, **ROUND)
    assert [line["round"] for line in kept.lines] == [1, 2] and kept.closed


def test_scalars_carry_their_round_and_skip_what_is_no_number():
    step, values = consumers.scalars({"kind": "round", "round": 7, **ROUND})
    assert step == 7 and values[NAME] == 0.75 and len(values) == 4
    step, values = consumers.scalars({"kind": "trained", "defence": "a", "seed": 0, "rounds": 9, "test_accuracy": 0.5, "epsilon": None})
    assert (step, values) == (9, {"a/seed 0/test_accuracy": 0.5})
    attack = {"kind": "attack", "defence": "a", "attack": "joint", "checkpoint": "final", "seed": 0, "victim": 12, "psnr_db": 20.0, "ssim": None}
    assert consumers.scalars(attack) == (12, {"attacks/a/joint/final/seed 0/psnr_db": 20.0})
    assert consumers.scalars({"kind": "start"}) == (0, {})


def test_a_package_that_is_missing_is_bad_input(monkeypatch):
    monkeypatch.setattr(consumers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"log=wandb, but the package wandb is not installed: pip install -e '\.\[wandb\]'"):
        consumers.check(["wandb"])
    consumers.check([])


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_each_round_once_also_after_a_resumption(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rounds in ([1, 2], [3]):
        with Record(tmp_path / "record.jsonl") as record:
            record.feed(consumers.consumers(["tensorboard"], tmp_path, "a run"))
            for number in rounds:
                record.append("round", round=number, **ROUND)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars(NAME)] == [(1, 0.75), (2, 0.75), (3, 0.75)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_of_its_own_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with Record(tmp_path / "record.jsonl") as record:
        record.feed(consumers.consumers(["wandb"], tmp_path, "a run"))
        record.append("round", round=1, **ROUND)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
