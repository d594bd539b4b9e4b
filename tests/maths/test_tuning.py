"""The search for a strength at a wanted accuracy: on functions with known answers, and in a recipe of seconds. Synthetic cells."""

import json
import math
import subprocess
import sys

import pytest

from gidef.config import CapacityNoise, LearnedPerturbation, Matched, Pruning, Recipe, Undefended, problems
from gidef.tuning import closest, search
from tests.ranks.launch import ROOT, environment, results


def falling(value):
    """Accuracy 0.9 at 0.01, 0.5 at 100."""
    return 0.7 - 0.1 * math.log10(value)


@pytest.mark.parametrize("target", [0.85, 0.7, 0.55])
def test_bisection_closes_in_on_the_strength(target):
    tried = search(falling, low=0.01, high=100.0, target=target, trials=9)
    assert len(tried) <= 9 and tried[:2] == [(100.0, falling(100.0)), (0.01, falling(0.01))]
    assert abs(falling(closest(tried, target)) - target) < 0.01


def test_an_end_on_the_near_side_of_the_target_ends_the_search():
    assert search(falling, low=0.01, high=100.0, target=0.4, trials=9) == [(100.0, falling(100.0))]
    tried = search(falling, low=0.01, high=100.0, target=0.95, trials=9)
    assert len(tried) == 2 and closest(tried, 0.95) == 0.01


def test_what_is_close_enough_is_taken_and_of_equals_the_strongest():
    tried = search(falling, low=0.01, high=100.0, target=0.7, trials=9)
    assert tried[-1][0] == 1.0 and len(tried) == 3
    assert closest([(1.0, 0.8), (2.0, 0.6), (3.0, 0.6)], 0.7) in (1.0, 3.0) and closest([(2.0, 0.6), (3.0, 0.6)], 0.7) == 3.0


def matched(**fields):
    return Matched(**{"defence": LearnedPerturbation(), "field": "strength", "low": 0.1, "high": 10.0} | fields)


def test_the_field_is_set_in_the_one_member_that_has_it():
    assert matched().at(2.5) == LearnedPerturbation(strength=2.5)
    both = matched(defence=(LearnedPerturbation(), Pruning()), field="share")
    assert both.at(0.3) == (LearnedPerturbation(), Pruning(share=0.3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"field": "strengh"}, "field='strengh'"),
        ({"field": "law"}, "field='law'"),
        ({"low": 2.0, "high": 1.0}, "low=2.0, high=1.0"),
        ({"low": 0.0}, "low=0.0"),
        ({"accuracy": 1.2}, "accuracy=1.2"),
        ({"defence": 3}, "defence=3"),
        ({"defence": (LearnedPerturbation(), CapacityNoise()), "field": "std_init"}, "exactly one"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(given, said):
    assert any(said in text for text in problems(Recipe(defences={"u": Undefended(), "m": matched(**given)})))


def test_points_below_nothing_are_refused():
    assert any("add Undefended()" in text for text in problems(Recipe(defences={"m": matched()})))
    assert problems(Recipe(defences={"m": matched(accuracy=0.8)})) == []


SCRIPT = '''
"""Mine."""
from gidef.config import Data, Evaluation, LearnedPerturbation, LocalTraining, Matched, Model, NaiveMatching, Pruning, Recipe, Rounds, Undefended
from gidef.data import synthetic_blood_cells
from gidef.main import main


def cells():
    return synthetic_blood_cells(train=160, val=40, test=40)


main(Recipe(
    data=Data(name="{place}:cells", num_clients=2), model=Model(cut="blocks.1"), rounds=Rounds(count=1), clients=LocalTraining(batch_size=16),
    defences={{
        "undefended": Undefended(),
        "noisy": Matched(defence=(LearnedPerturbation(dependence_weight=0.0), Pruning(share=0.5)), field="strength", low=0.1, high=1000.0, points=5.0, trials=3),
    }},
    attacks={{"naive": NaiveMatching(iterations=2)}}, evaluation=Evaluation(num_victims=2, judge_epochs=1),
))
'''


def test_a_recipe_trains_its_trials_and_goes_on_with_the_closest(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(place=script))

    def run(*arguments):
        done = subprocess.run([sys.executable, str(script), *arguments], env=environment(), capture_output=True, text=True, timeout=240, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folder = tmp_path / "out"
    run("--out", str(folder))
    told = results(folder)
    tuned = told["tuned"]["noisy"]
    values = dict(tuned["tried"])
    val = {one["defence"]: one["val_accuracy"] for one in told["training"]}
    assert set(val) == {"undefended", "noisy"} and tuned["target"] == pytest.approx(val["undefended"] - 0.05)
    assert val["noisy"] == values[tuned["value"]] and tuned["value"] in values
    assert min(abs(found - tuned["target"]) for found in values.values()) == abs(val["noisy"] - tuned["target"])
    assert json.loads((folder / "tuning.json").read_text()) == told["tuned"]
    # a resumed run finds its trials again, and an attack on the finished run the strength
    before = told["weights_sha256"]
    run("--out", str(folder), "--resume")
    assert results(folder)["weights_sha256"] == before
    again = subprocess.run(
        [sys.executable, "-m", "gidef", "attack", str(folder), "--attack", "naive", "--allow-code", "--out", str(tmp_path / "again")],
        env=environment(), capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert results(tmp_path / "again")["tuned"] == told["tuned"]
    (folder / "tuning.json").unlink()
    lost = subprocess.run(
        [sys.executable, "-m", "gidef", "attack", str(folder), "--attack", "naive", "--allow-code", "--out", str(tmp_path / "lost")],
        env=environment(), capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert lost.returncode and "tuning.json" in lost.stderr and "Traceback" not in lost.stderr
