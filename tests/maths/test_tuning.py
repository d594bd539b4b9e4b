"""The search for a strength at a wanted accuracy: on functions with known answers, and in a recipe of seconds. Synthetic cells."""

import dataclasses
import json
import math
import types

import pytest

from gidef.cli import main as command
from gidef.config import (
    CVB,
    DCS,
    DPSGD,
    BiDO,
    CapacityNoise,
    Censor,
    Clipping,
    Data,
    Evaluation,
    GradDefense,
    InstaHide,
    IsotropicNoise,
    LearnedPerturbation,
    LocalTraining,
    Matched,
    MixUp,
    Model,
    NaiveMatching,
    Precode,
    Pruning,
    Quantisation,
    Recipe,
    Rounds,
    SecureAggregation,
    Soteria,
    Speed,
    Undefended,
    problems,
)
from gidef.config.defences import DEFENCES, PROTECTS
from gidef.data import synthetic_blood_cells
from gidef.errors import InputError
from gidef.main import main
from gidef.tuning import _target, _tell, closest, missed, noted, outcome, search, undecided
from tests.alone import by_itself  # noqa: F401  (serves every test here)
from tests.ranks.launch import results

TEXTS = ("cut", "layer")
"""Fields of defences whose default is None, and which are no numbers."""


@dataclasses.dataclass(frozen=True)
class Mine:
    """A defence of one's own."""

    level: float = 1.0


def falling(value):
    """Accuracy 0.9 at 0.01, 0.5 at 100."""
    return 0.7 - 0.1 * math.log10(value)


@pytest.mark.parametrize("target", [0.85, 0.7, 0.55])
def test_bisection_closes_in_on_the_strength(target):
    tried = search(falling, low=0.01, high=100.0, target=target, trials=9)
    assert len(tried) <= 9 and tried[:2] == [(100.0, falling(100.0)), (0.01, falling(0.01))]
    assert abs(falling(closest(tried, target)) - target) < 0.01


def test_both_ends_on_one_side_of_the_target_end_the_search():
    never, always = (search(falling, low=0.01, high=100.0, target=target, trials=9) for target in (0.4, 0.95))
    assert never == always == [(100.0, falling(100.0)), (0.01, falling(0.01))]
    assert closest(never, 0.4) == 100.0 and closest(always, 0.95) == 0.01
    assert search(falling, low=0.01, high=100.0, target=0.4, trials=1) == [(100.0, falling(100.0))]
    assert search(falling, low=0.01, high=100.0, target=0.499, trials=9) == [(100.0, falling(100.0))]  # on the target


def plain_bisection(measure, low, high, target, trials):
    """The search for a falling measure alone, as it was before it looked at both ends."""
    tried = [(high, measure(high)), (low, measure(low))]
    while len(tried) < trials and min(abs(found - target) for _, found in tried) > 0.002:
        middle = float(f"{math.sqrt(low * high):.4g}")
        tried.append((middle, measure(middle)))
        low, high = (middle, high) if tried[-1][1] > target else (low, middle)
    return tried


STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
TABLES = {  # accuracy at each strength
    "falling": (0.90, 0.88, 0.85, 0.80, 0.60),
    "rising": (0.60, 0.80, 0.85, 0.88, 0.90),
    "never costs": (0.90, 0.91, 0.90, 0.92, 0.914),
    "never costs, rising": (0.87, 0.89, 0.90, 0.92, 0.93),
    "always costs": (0.80, 0.78, 0.70, 0.60, 0.40),
    "always costs, rising": (0.40, 0.60, 0.70, 0.78, 0.80),
    "flat": (0.90,) * 5,
    "a cliff": (0.90, 0.90, 0.90, 0.40, 0.40),
    "not monotone": (0.90, 0.70, 0.88, 0.86, 0.60),
    "a dip": (0.90, 0.85, 0.70, 0.85, 0.91),
}
CASES = [  # name, target, private end: values tried; value taken; reached, end, direction, monotone
    ("falling", 0.85, "high", (8.0, 0.5, 2.0), 2.0, (True, None, "falling", True)),
    ("falling", 0.875, "high", (8.0, 0.5, 2.0, 1.0), 1.0, (True, None, "falling", True)),
    ("rising", 0.85, "low", (8.0, 0.5, 2.0), 2.0, (True, None, "rising", True)),
    ("rising", 0.795, "low", (8.0, 0.5, 2.0, 1.0), 1.0, (True, None, "rising", True)),
    ("rising", 0.85, None, (8.0, 0.5, 2.0), 2.0, (True, None, "rising", True)),
    ("never costs", 0.85, "high", (8.0, 0.5), 8.0, (False, "high", "rising", True)),  # by chance the weak end is nearer
    ("never costs, rising", 0.85, "low", (8.0, 0.5), 0.5, (False, "low", "rising", True)),
    ("never costs, rising", 0.85, None, (8.0, 0.5), 0.5, (False, "low", "rising", True)),
    ("always costs", 0.85, "high", (8.0, 0.5), 0.5, (False, "low", "falling", True)),
    ("always costs, rising", 0.85, "low", (8.0, 0.5), 8.0, (False, "high", "rising", True)),
    ("flat", 0.85, "high", (8.0, 0.5), 8.0, (False, "high", "flat", True)),
    ("flat", 0.85, "low", (8.0, 0.5), 0.5, (False, "low", "flat", True)),
    ("flat", 0.901, "high", (8.0, 0.5), 8.0, (True, "high", "flat", True)),
    ("a cliff", 0.70, "high", (8.0, 0.5, 2.0, 4.0), 2.0, (False, None, "falling", True)),
    ("not monotone", 0.87, "high", (8.0, 0.5, 2.0, 4.0), 4.0, (True, None, "falling", True)),
    ("not monotone", 0.885, "high", (8.0, 0.5, 2.0, 1.0), 2.0, (True, None, "falling", False)),
    ("a dip", 0.80, "high", (8.0, 0.5), 8.0, (False, "high", "rising", True)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "private", "values", "taken", "ended"), CASES)
def test_the_search_on_plain_tables_of_accuracies(name, target, private, values, taken, ended):
    table = dict(zip(STRENGTHS, TABLES[name], strict=True))
    tried = search(table.__getitem__, low=0.5, high=8.0, target=target, trials=4)
    assert tuple(value for value, _ in tried) == values and all(table[value] == found for value, found in tried)
    if max(tried)[1] < target < min(tried)[1]:
        assert tried == plain_bisection(table.__getitem__, 0.5, 8.0, target, 4)
    value = closest(tried, target, private=private)
    told = outcome(tried, value, low=0.5, high=8.0, target=target)
    assert value == taken and told["accuracy"] == table[taken]
    assert (told["reached"], told["end"], told["direction"], told["monotone"]) == ended


def test_a_rising_measure_is_the_mirror_of_a_falling_one():
    """With the reciprocal strength every trial after the ends, and what is taken of equals, is the same."""
    there = search(falling, low=0.01, high=100.0, target=0.81, trials=7)
    mirrored = search(lambda value: falling(1 / value), low=0.01, high=100.0, target=0.81, trials=7)
    assert len(there) > 4 and [value for value, _ in there[2:]] == pytest.approx([1 / value for value, _ in mirrored[2:]], rel=1e-3)
    assert closest([(1.0, 0.6), (2.0, 0.6), (3.0, 0.9)], 0.5, private="low") == 1.0
    assert closest([(1.0, 0.6), (2.0, 0.4)], 0.5, private="low") == 1.0 and closest([(1.0, 0.6), (2.0, 0.4)], 0.5) == 2.0


@pytest.mark.parametrize("target", [0.45, 0.62, 0.79, 0.88])
@pytest.mark.parametrize(("low", "high", "step"), [(1, 8, 1), (2, 3, 1), (3, 4096, 1), (1, 2, 1), (1, 9, 2), (5, 7, 2), (3, 31, 2)])
def test_a_search_over_whole_numbers_tries_no_other_and_none_twice_and_ends_between_neighbours(low, high, step, target):
    def measure(value):
        assert isinstance(value, int) and low <= value <= high and (value - low) % step == 0
        return 0.9 - 0.5 * math.log(value / low) / math.log(high / low)

    tried = search(measure, low=low, high=high, target=target, trials=50, step=step)
    values, found = sorted(value for value, _ in tried), dict(tried)
    assert len(set(values)) == len(values)
    around = [max(value for value in values if found[value] > target), min(value for value in values if found[value] < target)]
    assert around[1] - around[0] == step or min(abs(one - target) for one in found.values()) <= 0.002
    mirrored = search(lambda value: 1.3 - measure(value), low=low, high=high, target=1.3 - target, trials=50, step=step)
    assert [value for value, _ in mirrored] == [value for value, _ in tried]


def test_the_middle_of_whole_numbers_is_the_one_next_to_the_logarithmic_middle():
    steep = {64: 0.1, 4: 0.9, 16: 0.8, 32: 0.6}
    assert [value for value, _ in search(steep.__getitem__, low=4, high=64, target=0.6, trials=9, step=1)] == [64, 4, 16, 32]


def test_a_range_of_fewer_than_four_digits_ends_where_nothing_new_lies_between():
    tried = search(lambda value: 1.5 - value, low=1.0001, high=1.0003, target=0.4998, trials=9)
    assert [value for value, _ in tried] == [1.0003, 1.0001]


@pytest.mark.parametrize(
    ("defence", "field", "step"),
    [
        (Precode(), "width", 1), (CVB(), "kernel", 2), (Censor(), "draws", 1), (GradDefense(), "noisy", 1), (InstaHide(), "mixed", 1), (Quantisation(), "bits", 1),
        (DCS(), "concealed", 1), ((LearnedPerturbation(), Quantisation()), "bits", 1), (CVB(), "kl_weight", 0), (DPSGD(), "target_epsilon", 0), (Mine(), "level", 0),
    ],
)  # fmt: skip
def test_a_value_keeps_the_type_of_its_field_also_from_a_file(defence, field, step):
    matched = Matched(defence=defence, field=field, low=3, high=5.0)
    assert matched.step == step
    for value in (matched.value(matched.low), matched.value(matched.high), matched.value(json.loads(json.dumps(matched.value(3))))):
        assert type(value) is (int if step else float)
        found = matched.at(value)
        [owner] = [part for part in (found if isinstance(found, tuple) else (found,)) if hasattr(part, field)]
        assert type(getattr(owner, field)) is type(value) and getattr(owner, field) == value


@pytest.mark.parametrize("field", ["noise_multiplier", "target_epsilon"])
@pytest.mark.parametrize("defence", [DPSGD(), DPSGD(noise_multiplier=1.0, target_epsilon=None), DPSGD(target_epsilon=None)])
def test_of_noise_and_epsilon_the_one_that_is_searched_is_given_and_the_other_follows(field, defence):
    matched = Matched(defence=(IsotropicNoise(), defence), field=field, low=0.5, high=2.0)
    found = matched.at(0.7)[1]
    assert {name: getattr(found, name) for name in ("noise_multiplier", "target_epsilon")} == {"noise_multiplier": None, "target_epsilon": None, field: 0.7}
    assert problems(Recipe(defences={"u": Undefended(), "m": matched})) == []


@pytest.mark.parametrize(
    ("defence", "field", "low", "high", "said"),
    [
        (SecureAggregation(), "dropouts", 0.1, 0.9, "defences.m: dropouts=0.9 leave"),
        (Pruning(), "share", 0.1, 10.0, "defences.m: share=10.0 of Pruning"),
        (Soteria(), "share", 0.1, 10, "defences.m: share=10.0 of Soteria"),
        ((LearnedPerturbation(), Pruning()), "share", 0.1, 5.0, "defences.m: share=5.0 of Pruning"),
        (CVB(), "kernel", 1, 8, "defences.m.kernel=8 is even"),
        (CVB(), "kernel", 2, 9, "defences.m.kernel=2 is even"),
        (Quantisation(), "bits", 2, 20, "defences.m: bits=20 of Quantisation"),
        (Quantisation(), "bits", 1, 8, "defences.m.bits=1 is too small"),
        (Quantisation(), "bits", 2.5, 8, "low=2.5, high=8: bits is a whole number"),
        (InstaHide(largest=0.3), "mixed", 2, 6, "defences.m: largest=0.3 leaves next to no coefficients of 2"),
        (GradDefense(), "noisy", 1, 12, "defences.m: noisy=12 of slices=10"),
        (DCS(), "blend", 0.5, 2.0, "defences.m: blend=2.0"),
        (DPSGD(), "delta", 1e-6, 1.0, "defences.m.delta=1.0 is not below 1"),
        ((MixUp(), DPSGD()), "target_epsilon", 1.0, 8.0, "defences.m: MixUp changes the images"),
    ],
)  # fmt: skip
def test_the_ends_of_a_search_are_checked_as_the_plain_defence_is(defence, field, low, high, said):
    [found] = problems(Recipe(defences={"u": Undefended(), "m": Matched(defence=defence, field=field, low=low, high=high)}))
    assert said in found
    assert said.startswith("low=") or "MixUp" in said or found.endswith((f"The search tries low={low}.", f"The search tries high={high}."))


def test_what_a_search_sets_is_checked_and_not_what_stands_in_its_place():
    assert problems(Recipe(defences={"m": Matched(defence=CVB(kernel=4), field="kernel", low=3, high=9, accuracy=0.5)})) == []
    cka = LearnedPerturbation(dependence="cka", dependence_weight=0.0)
    recipe = Recipe(defences={"m": Matched(defence=cka, field="dependence_weight", accuracy=0.5)}, clients=LocalTraining(batch_size=2))
    assert ["dependence=cka needs 4 images" in text for text in problems(recipe)] == [True]


@pytest.mark.parametrize(
    ("defence", "field", "end"),
    [
        (LearnedPerturbation(), "strength", "high"), (DPSGD(), "target_epsilon", "low"), ((LearnedPerturbation(), Clipping()), "bound", "low"), (Mine(), "level", None),
        (GradDefense(), "slices", "low"), (GradDefense(), "noisy", "high"), (Precode(), "width", "low"), (LearnedPerturbation(), "ssim_threshold", "low"),
        (LearnedPerturbation(), "ramp", "low"), (SecureAggregation(), "dropouts", "low"), (DPSGD(), "clip", None), (LearnedPerturbation(), "kl_weight", None),
        (CVB(), "kl_weight", "high"), (BiDO(), "y_weight", None), ((IsotropicNoise(), BiDO()), "y_ratio", None),
    ],
)  # fmt: skip
def test_which_end_of_a_range_is_the_private_one(defence, field, end):
    assert Matched(defence=defence, field=field).private_end == end


def test_of_every_number_of_every_defence_it_is_said_whether_it_protects_more_where_it_rises():
    for kind in DEFENCES:
        numbers = sorted(spec.name for spec in dataclasses.fields(kind) if isinstance(value := getattr(kind(), spec.name), (int, float, type(None))) and not isinstance(value, bool) and spec.name not in TEXTS)
        assert sorted(name for names in PROTECTS.get(kind, ()) for name in names) == numbers, kind  # each once, and no other


def test_where_the_private_end_is_not_known_a_choice_by_accuracy_alone_is_told():
    flat, cliff = [(8.0, 0.9), (0.5, 0.9)], [(8.0, 0.6), (0.5, 0.9)]
    assert [undecided(tried, target) for tried, target in ((flat, 0.85), (flat, 0.901), (flat, 0.95), (cliff, 0.85), (cliff, 0.75), (cliff, 0.5), (cliff[:1], 0.5))] == [
        True, True, True, False, True, True, False,
    ]  # fmt: skip
    for tried, target, said in ((flat, 0.85, True), (cliff, 0.85, False)):
        value, heard = closest(tried, target, private=None), []
        one = {"field": "draws", "value": value, "target": target, "tried": tried, **outcome(tried, value, low=0.5, high=8.0, target=target)}
        one |= {"undecided": True} if undecided(tried, target) else {}
        _tell(types.SimpleNamespace(console=types.SimpleNamespace(say=lambda text: None, notice=heard.append)), "censored", one, 4)
        assert any("it is not known at which end of its range draws protects most" in text for text in heard) == said
        assert missed(one).endswith("not known at which end draws protects most") == said and missed(one)


def test_rows_say_that_a_target_was_missed_and_by_how_much():
    one = {"field": "x_weight", "value": 5.0, "accuracy": 0.861, "target": 0.84, "end": "high", "reached": False}
    rows = [{"defence": "BiDO", "note": "no noise to search"}, {"defence": "BiDO", "note": ""}, {"defence": "none", "note": ""}]
    said = "target not reached: nearest is x_weight = 5 at 86.1 % validation accuracy, 84.0 % wanted, at the upper end of the range"
    assert [row["note"] for row in noted(rows, {"BiDO": one})] == [f"no noise to search; {said}", said, ""]
    assert noted(rows, {"BiDO": one | {"reached": True}}) == rows and noted(rows, {"BiDO": {"field": "x_weight", "value": 5.0}}) == rows


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
        ({"points": 100.0}, "points=100.0"),
        ({"points": 250}, "points=250"),
        ({"points": -0.5}, "points=-0.5"),
        ({"defence": 3}, "defence=3"),
        ({"defence": ()}, "defence=()"),
        ({"defence": (LearnedPerturbation(), CapacityNoise()), "field": "std_init"}, "exactly one"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(given, said):
    assert any(said in text for text in problems(Recipe(defences={"u": Undefended(), "m": matched(**given)})))


def test_points_below_nothing_are_refused():
    assert any("add Undefended()" in text for text in problems(Recipe(defences={"m": matched()})))
    assert problems(Recipe(defences={"m": matched(accuracy=0.8)})) == []
    both = Recipe(defences={"u": Undefended(), "m": matched(), "p": Pruning()})
    assert problems(dataclasses.replace(both, only=("p",))) == [] and any("add Undefended()" in text for text in problems(dataclasses.replace(both, only=("m",))))


@pytest.mark.parametrize(("points", "target"), [(1.0, 0.64), (52.0, 0.13), (52.5, None), (60.0, None), (99.0, None)])
def test_a_target_at_chance_is_refused(points, target):
    """An undefended net of 65 % among eight classes, of which guessing gets 12.5 %."""
    searched = matched(points=points)
    recipe = Recipe(defences={"u": Undefended(), "m": searched})
    run = types.SimpleNamespace(recipe=recipe, setting=types.SimpleNamespace(dataset=types.SimpleNamespace(num_classes=8)))
    trained = {("u", 0): types.SimpleNamespace(summary={"val_accuracy": 0.65})}
    if target is not None:
        assert _target(run, "m", searched, trained) == pytest.approx(target)
        return
    with pytest.raises(InputError, match=f"defences.m: points={points:g} below the undefended net's 65.0 % .*8 classes gets 12.5 %.*Lower points"):
        _target(run, "m", searched, trained)
    assert _target(run, "m", matched(accuracy=0.05), trained) == 0.05 and _target(run, "m", searched, {}) is None


@pytest.mark.parametrize(
    ("name", "target", "notice"),
    [
        ("never costs", 0.85, "costs less than wanted"), ("always costs", 0.85, "costs more than wanted"), ("a cliff", 0.7, "unless accuracy jumps there"),
        ("not monotone", 0.885, "does not go one way"), ("falling", 0.85, None), ("rising", 0.85, None),
    ],
)  # fmt: skip
def test_the_console_says_in_plain_words_how_a_search_ended(name, target, notice):
    table, heard = dict(zip(STRENGTHS, TABLES[name], strict=True)), []
    tried = search(table.__getitem__, low=0.5, high=8.0, target=target, trials=4)
    value = closest(tried, target)
    one = {"field": "std", "value": value, "target": target, "tried": tried, **outcome(tried, value, low=0.5, high=8.0, target=target)}
    _tell(types.SimpleNamespace(console=types.SimpleNamespace(say=lambda text: None, notice=heard.append)), "noisy", one, 4)
    assert len(heard) == (notice is not None) and all(notice in text and text.startswith("noisy: ") for text in heard)


def few_cells():
    return synthetic_blood_cells(train=96, val=40, test=16, size=16)


RECIPE = Recipe(
    data=Data(name=f"{__file__}:few_cells", num_clients=2), model=Model(cut="blocks.0"), rounds=Rounds(count=3), clients=LocalTraining(batch_size=16, epochs=2, lr=3e-3),
    defences={
        "undefended": Undefended(),
        "noisy": Matched(defence=(LearnedPerturbation(dependence_weight=0.0), Pruning(share=0.5)), field="strength", low=0.1, high=1000.0, points=5.0, trials=3),
    },
    attacks={"naive": NaiveMatching(iterations=2)}, speed=Speed(device="cpu", workers=1), evaluation=Evaluation(num_victims=2, judge_epochs=1),
)  # fmt: skip


def test_a_recipe_trains_its_trials_and_goes_on_with_the_closest(tmp_path, capsys):
    folder = tmp_path / "out"
    main(RECIPE, name="mine", args=["--out", str(folder)])
    told = results(folder)
    tuned = told["tuned"]["noisy"]
    values = dict(tuned["tried"])
    val = {one["defence"]: one["val_accuracy"] for one in told["training"]}
    assert set(val) == {"undefended", "noisy"} and tuned["target"] == pytest.approx(val["undefended"] - 0.05)
    assert val["noisy"] == values[tuned["value"]] and tuned["value"] in values
    assert min(abs(found - tuned["target"]) for found in values.values()) == abs(val["noisy"] - tuned["target"])
    assert json.loads((folder / "tuning.json").read_text()) == told["tuned"]
    assert tuned["accuracy"] == val["noisy"] and tuned["trials"] == len(tuned["tried"]) and tuned["reached"] == (abs(tuned["accuracy"] - tuned["target"]) <= 0.01 + 1e-9)
    missed = not tuned["reached"]
    assert all(("target not reached" in row["note"]) == (missed and row["defence"] == "noisy") for row in told["rows"])
    assert ("target not reached" in (folder / "log.txt").read_text()) == missed
    # a resumed run finds its trials again, and an attack on the finished run the strength
    before = told["weights_sha256"]
    (folder / "results.json").unlink()
    main(RECIPE, name="mine", args=["--out", str(folder), "--resume"])
    assert results(folder)["weights_sha256"] == before and results(folder)["tuned"] == told["tuned"]
    again = ["attack", str(folder), "--attack", "naive", "--allow-code"]
    command([*again, "--out", str(tmp_path / "again")])
    assert results(tmp_path / "again")["tuned"] == told["tuned"]
    (folder / "tuning.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        command([*again, "--out", str(tmp_path / "lost")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "tuning.json" in said and "Traceback" not in said
