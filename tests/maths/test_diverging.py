"""A training that diverges is left out and told, and the rest of the comparison goes on: alone, resumed, in parts, attacked again. Synthetic cells."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch

from gidef.cli import main as command
from gidef.config import LocalTraining
from gidef.errors import Diverged
from gidef.evaluation import _finite
from gidef.main import main
from gidef.parallel import Beside
from gidef.report import pictures
from tests.alone import by_itself  # noqa: F401  (serves every test here)
from tests.diverging import ERROR, RECIPE
from tests.ranks.launch import record, results

LOST = [("bad", 0), ("bad", 1), ("half", 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverging") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_DPI", 10)
        main(RECIPE, name="small", args=["--out", str(folder)])
    return folder


def failed_of(found):
    return [(one["defence"], one["seed"]) for one in found["failed"]]


def test_the_others_are_trained_and_attacked_and_what_diverged_stays_a_line_with_its_error(whole):
    found = results(whole)
    assert failed_of(found) == LOST and {one["error"] for one in found["failed"]} == {ERROR}
    assert [(one["defence"], one["seed"]) for one in found["training"]] == [("half", 0), *((name, seed) for name in ("undefended", "searched", "after") for seed in (0, 1))]
    assert {row["defence"]: row["seeds"] for row in found["rows"]} == {"half": [0], "undefended": [0, 1], "searched": [0, 1], "after": [0, 1]}
    assert {row["defence"]: row["note"] for row in found["rows"]}["half"].endswith("without seed 1, whose training diverged")
    assert all("diverged" not in row["note"] for row in found["rows"] if row["defence"] != "half")
    lines = [f"Not trained: {name}, seed {seed}: {ERROR}" for name, seed in LOST]
    assert [text for text in found["verdict"] if text.startswith("Not trained")] == lines
    assert "2 victims and 1 seed, where a claim" in " ".join(found["verdict"])
    for name in ("table.txt", "table.md", "table.tex", "report.html", "log.txt"):
        text = " ".join((whole / name).read_text().replace("&#39;", "'").replace("\\", "").split())
        assert all(line in text for line in lines), name
    with (whole / "table.csv").open() as stream:
        assert [(one["defence"], int(one["seed"]), one["note"]) for one in csv.DictReader(stream) if one["kind"] == "not trained"] == [(*place, ERROR) for place in LOST]
    assert [(line["defence"], line["seed"], line["error"]) for line in record(whole) if line["kind"] == "failed"] == [(*place, ERROR) for place in LOST]
    assert "NOTICE" in (whole / "log.txt").read_text() and f"half, seed 1 is left out: {ERROR}" in " ".join((whole / "log.txt").read_text().split())


def test_a_trial_that_diverges_counts_as_no_accuracy_and_is_not_taken_though_it_is_nearest(whole):
    found = results(whole)
    tuned = found["tuned"]["searched"]
    own = next(one["val_accuracy"] for one in found["training"] if (one["defence"], one["seed"]) == ("searched", 0))
    assert tuned["tried"] == [[100.0, 0.0], [1.0, own], [10.0, 0.0]] and own > 0.1 and tuned["diverged"] == [100.0, 10.0]
    assert tuned["value"] == 1.0 and tuned["accuracy"] == own
    assert "diverged at 100, 10" in " ".join((whole / "table.txt").read_text().split())
    log = " ".join((whole / "log.txt").read_text().split())
    assert f"searched: the training at level = 100 counts as accuracy 0: {ERROR}" in log and f"level = 10 counts as accuracy 0: {ERROR}" in log


def test_a_resumed_run_ends_as_it_did_and_no_line_is_doubled(whole):
    before = results(whole)
    (whole / "results.json").unlink()
    main(RECIPE, name="small", args=["--out", str(whole), "--resume"])
    after = results(whole)
    for key in ("failed", "tuned", "weights_sha256", "verdict"):
        assert after[key] == before[key], key
    assert [row["psnr_db"] for row in after["rows"]] == [row["psnr_db"] for row in before["rows"]]
    assert [(line["defence"], line["seed"]) for line in record(whole) if line["kind"] == "failed"] == LOST


def test_what_was_trained_can_be_attacked_again_and_what_was_not_is_refused(whole, tmp_path, capsys):
    again = ["attack", str(whole), "--attack", "naive", "--iterations", "1", "--allow-code"]
    command([*again, "--out", str(tmp_path / "all")])
    found = results(tmp_path / "all")
    assert failed_of(found) == LOST and found["tuned"] == results(whole)["tuned"]
    assert {row["defence"]: row["seeds"] for row in found["rows"]} == {row["defence"]: row["seeds"] for row in results(whole)["rows"]}
    command([*again, "--defence", "after", "--out", str(tmp_path / "one")])
    assert "failed" not in results(tmp_path / "one")
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        command([*again, "--defence", "bad", "--out", str(tmp_path / "none")])
    assert left.value.code == 2 and f"nothing was trained. The first of 2: bad, seed 0: {ERROR}" in capsys.readouterr().err
    (whole / "report.html").unlink()
    command(["report", str(whole)])
    assert [text for text in results(whole)["verdict"] if text.startswith("Not trained")] and "Not trained: bad" in (whole / "report.html").read_text()


@pytest.mark.parametrize("count", [2, 9])
def test_parts_with_and_without_anything_to_train_are_joined_to_the_run_of_one_job(whole, tmp_path, count):
    """Of nine, one has but a training that diverges, and ends as the others do."""
    for number in reversed(range(count)):
        main(RECIPE, name="small", args=["--out", str(tmp_path / "joined"), "--part", f"{number}/{count}"])
    joined, alone = results(tmp_path / "joined"), results(whole)
    for key in ("failed", "tuned", "weights_sha256", "verdict"):
        assert joined[key] == alone[key], key
    assert (tmp_path / "joined" / "table.txt").read_bytes() == (whole / "table.txt").read_bytes()
    failed = [[(line["defence"], line["seed"]) for line in record(folder) if line["kind"] == "failed"] for folder in (tmp_path / "joined", whole)]
    assert sorted(failed[0]) == sorted(failed[1]) == LOST


def test_predictions_that_are_not_finite_are_a_training_that_diverged():
    assert torch.equal(_finite(torch.ones(2, 3)), torch.ones(2, 3))
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(Diverged, match="the network predicts NaN or infinity: training diverged"):
            _finite(torch.tensor([[0.0, float(value)]]))


def test_what_runs_beside_a_training_that_diverges_has_ended_when_the_next_one_begins():
    ended = []

    def work(beside):
        assert beside.stopped.wait(10.0)
        ended.append(True)

    with pytest.raises(Diverged), Beside(torch.device("cpu"), threads=1) as beside:
        beside.call(work, beside)
        raise Diverged("gone")
    assert ended == [True]


SEARCHED = dataclasses.replace(RECIPE.defences["searched"], accuracy=None)
EXPLODING = dataclasses.replace(
    RECIPE, defences=RECIPE.defences | {"searched": SEARCHED}, only=("undefended", "searched"), seeds=(0,), clients=LocalTraining(batch_size=8, epochs=2, optimiser="sgd", lr=1e30, grad_clip=0.0)
)


@pytest.mark.parametrize("parts", [None, ("0/2", "1/2")])
def test_a_run_in_which_nothing_can_be_trained_says_so_and_ends_with_an_error(tmp_path, capsys, parts):
    out = ["--out", str(tmp_path / "run")]
    for part in (parts or [])[:-1]:
        main(EXPLODING, name="small", args=[*out, "--part", part])
        assert not (tmp_path / "run" / "results.json").exists()
    with pytest.raises(SystemExit) as left:
        main(EXPLODING, name="small", args=[*out, *(("--part", parts[-1]) if parts else ())])
    assert left.value.code == 2 and "gidef: nothing was trained. The first of 2: undefended, seed 0: " in capsys.readouterr().err
    found = results(tmp_path / "run")
    assert failed_of(found) == [("undefended", 0), ("searched", 0)] and found["rows"] == found["training"] == []
    assert "training diverged" in found["failed"][0]["error"]
    assert found["failed"][1]["error"] == "its target is 1 points below the undefended net, whose training diverged."
