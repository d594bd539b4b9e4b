"""Several judges of the same reconstructions: a small run, attacked for one iteration, and what is said of it."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest
import torch
from torch import nn

from gidef import audit, fits
from gidef.config import Evaluation, NaiveMatching, Recipe, Undefended, problems
from gidef.errors import InputError
from gidef.models import Judge, judge_called
from gidef.report import html, tables
from gidef.scores import JUDGED, Scorer
from tests.small_run import RECIPE, trained_once

JUDGES = ("judge@2", "small", "resnet10t@1")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(run, folder of its attacks, findings)"""
    evaluation = Evaluation(num_victims=4, num_tuning=0, checkpoints=("final",), judge_epochs=1, judges=JUDGES)
    recipe = dataclasses.replace(RECIPE, defences={"undefended": Undefended()}, attacks={"naive": NaiveMatching(iterations=1)}, evaluation=evaluation)
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        run, trained = one("undefended")
        folder = run.folder / "attacks"
        yield run, folder, audit.audit(run, {("undefended", 0): trained}, folder=folder)


def test_each_judge_is_fitted_once_by_name_and_epochs(judged):
    run, folder, _ = judged
    paths = [fits.judge_path(run, folder, one) for one in (None, *JUDGES)]
    assert len(set(paths)) == 4 and set(paths) == set(folder.glob("judge-*.safetensors"))
    judges = [fits.load_judge(run, path, one) for path, one in zip(paths, (None, *JUDGES), strict=True)]
    assert isinstance(judges[0], Judge) and isinstance(judges[1], Judge) and not any(judge.training for judge in judges)
    assert not torch.equal(judges[0].head.weight, judges[1].head.weight)  # one epoch, and two
    assert [type(judge[1]).__name__ for judge in judges[2:]] == ["SmallNet", "ResNet"]


def test_a_row_holds_every_judge_s_accuracy_by_itself(judged):
    run, folder, found = judged
    [row] = found.rows
    assert list(row["attacker_accuracy_by"]) == list(JUDGES)
    grey = torch.full((4, 3, 16, 16), 0.5)
    labels = run.setting.dataset.train.labels[run.setting.roles.victims]
    truth = run.setting.dataset.train.images[run.setting.roles.victims].float() / 255
    for name in (None, *JUDGES):
        judge = fits.load_judge(run, fits.judge_path(run, folder, name), name)
        bound = next(bound for bound in found.bounds if bound["name"] == "constant grey")
        told = bound["attacker_accuracy"] if name is None else bound["attacker_accuracy_by"][name]
        assert told["mean"] == float((judge(grey).argmax(1) == labels).double().mean())
        known = found.judge if name is None else found.judge["others"][name]
        assert known["accuracy_on_truth"] == pytest.approx(float((judge(truth).argmax(1) == labels).double().mean()))
        test = run.setting.dataset.test
        assert known["accuracy_on_test"] == pytest.approx(float((judge(test.images.float() / 255).argmax(1) == test.labels).double().mean()))


def test_a_further_judge_is_asked_about_the_reconstructions_not_the_truth(judged):
    class Bright(nn.Module):
        def forward(self, images):
            return nn.functional.one_hot((images.mean((1, 2, 3)) > 0.5).long(), 8).float()

    run, folder, _ = judged
    scorer = Scorer(run, fits.load_judge(run, fits.judge_path(run, folder)), {"bright": Bright()})
    bright = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None, None, None].expand(4, 3, 16, 16)
    found = scorer.measure(bright, scorer.truth, scorer.labels)
    assert found[JUDGED + "bright"].tolist() == [float(label == one) for label, one in zip(scorer.labels.tolist(), (1, 0, 1, 0), strict=True)]


def results_of(judged):
    run, _, found = judged
    data = {"name": "cells", "synthetic": True, "title": "cells"}
    return {
        "format": 1, "recipe": {"defences": {"undefended": {"type": "Undefended"}}}, "recipe_name": "r", "data": data, "versions": {}, "seeds": [0],
        "training": [], "rows": found.rows, "bounds": found.bounds, "judge": found.judge, "pictures": [], "verdict": [],
    }  # fmt: skip


def test_tables_and_page_have_a_column_for_each(judged):
    results = results_of(judged)
    head, *lines = tables.judged_cells(results)
    assert head[3:] == ("judge", *JUDGES) and len(lines) == 1 + 4 + 2
    percent = f"{100 * results['rows'][0]['attacker_accuracy_by']['small']['mean']:.1f}"
    assert lines[0][5].startswith(percent) and lines[-2][0] == "true images"
    assert "| defence | attack | checkpoint | judge | judge@2 | small | resnet10t@1 |" in tables.markdown(results)
    [row] = list(csv.DictReader(io.StringIO(tables.csv(results))))[:1]
    assert float(row["attacker_accuracy_by_small"]) == results["rows"][0]["attacker_accuracy_by"]["small"]["mean"]
    assert "Attacker accuracy by judge" in html.render([html.Page(name="run", results=results)])
    assert tables.judges_table(results).row_count == 7
    results["judge"].pop("others")
    assert tables.judges_table(results) is None and "by judge" not in html.render([html.Page(name="run", results=results)])


def test_judges_that_cannot_be_are_refused():
    for text in ("small@", "small@0", "small@two", "@3", "small@-1"):
        [said] = problems(Recipe(evaluation=Evaluation(judges=(text,))))
        assert repr(text) in said and "NAME@EPOCHS" in said
    assert "repeats one" in problems(Recipe(evaluation=Evaluation(judges=("small", "small"))))[0]
    assert problems(Recipe(evaluation=Evaluation(judges=JUDGES))) == []
    with pytest.raises(InputError, match="resnet18"):
        judge_called("resnet188", num_classes=8, image_shape=(3, 16, 16))
