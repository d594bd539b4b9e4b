"""Forms of an attack that differ in their restarts: made-up rows (see conftest) and a made-up record of their victims."""

import numpy as np
import pytest

from gidef.report.paired import starts
from gidef.report.verdict import verdict

FORMS = {"one": (1, 1), "eight": (8, 1), "halved": (8, 2)}
VICTIMS = 64


@pytest.fixture
def case(results, make_row):
    """(results, record): one start 1 dB below eight, and eight halved 0.2 dB below; images differ by 4 dB."""
    shared = {"type": "NaiveMatching", "iterations": 400}
    results["recipe"]["attacks"] = {name: {**shared, "restarts": count, "halving": rate} for name, (count, rate) in FORMS.items()}
    results["recipe"]["attacks"] |= {"longer": {**shared, "iterations": 800, "restarts": 4, "halving": 1}, "decoder": {"type": "PostHocDecoder"}}
    images, lines, results["rows"] = 20 + 4 * np.random.default_rng(0).standard_normal(VICTIMS), [], []
    for place, (name, shift, seconds) in enumerate((("one", -1.0, 10.0), ("halved", -0.2, 30.0), ("eight", 0.0, 80.0), ("longer", 2.0, 90.0))):
        psnr = images + shift + 0.1 * np.random.default_rng(1 + place).standard_normal(VICTIMS)
        results["rows"].append(make_row("plain", name, "A0", float(psnr.mean())) | {"attacker_accuracy": 0.5, "mse": 0.01, "seconds": seconds})
        cell = {"kind": "attack", "defence": "plain", "attack": name, "checkpoint": "untrained", "seed": 0, "attacker_accuracy": 1.0, "mse": 0.01}
        lines += [{**cell, "victim": victim, "psnr_db": value} for victim, value in enumerate(psnr.tolist())]
    return results, lines


def test_every_form_stands_beside_the_most_restarts_that_all_run_to_their_end_on_the_same_images(case):
    results, lines = case
    found = starts(results, lines)
    assert [one["attacks"] for one in found] == [["one", "eight"], ["halved", "eight"]], "an attack of other iterations is another attack"
    assert [one["seconds"] for one in found] == [[10.0, 80.0], [30.0, 80.0]]
    psnr = {name: np.array([line["psnr_db"] for line in lines if line["attack"] == name]) for name in FORMS}
    drawn = np.random.default_rng(2).integers(VICTIMS, size=(4000, VICTIMS))
    for one, name in zip(found, ("one", "halved"), strict=True):
        apart, difference = psnr[name] - psnr["eight"], one["psnr_db_difference"]
        expected = np.quantile(apart[drawn].mean(1), [0.025, 0.975])
        assert difference["mean"] == pytest.approx(apart.mean()) and [difference["low"], difference["high"]] == pytest.approx(expected.tolist(), abs=0.01)
        assert difference["high"] - difference["low"] < 0.1, "images differ by 4 dB: unpaired intervals would be twenty times as wide"


def test_the_sentence_tells_seconds_and_the_paired_difference(case):
    results, lines = case
    results["starts"] = starts(results, lines)
    [text] = [text for text in verdict(results) if text.startswith("Restarts")]
    assert text.startswith('Restarts on "plain" at the untrained checkpoint, beside "eight" (') and " dB in 80 s): " in text
    ends = results["starts"][1]["psnr_db_difference"]
    assert f"[{ends['low']:+.2f}, {ends['high']:+.2f}] over 64 victims, in 30 s, 38 % of its time." in text and '"one"' in text and '"longer"' not in text


def test_without_the_record_there_is_no_interval_and_without_forms_nothing_is_said(case):
    results, lines = case
    results["starts"] = starts(results, ())
    [text] = [text for text in verdict(results) if text.startswith("Restarts")]
    assert "[" not in text and "victims" not in text
    for name in ("one", "eight"):
        results["recipe"]["attacks"][name]["halving"] = 2
    assert starts(results, lines) == [], "nothing ran all of its starts"
    results["recipe"].pop("attacks")
    results["starts"] = starts(results, lines)
    assert results["starts"] == [] and not any(text.startswith("Restarts") for text in verdict(results))


def test_of_victims_that_are_observed_together_the_sentence_counts_the_observations(case):
    results, lines = case
    for row in results["rows"]:
        row["observations"] = 16
    results["starts"] = starts(results, [line | {"batch": line["victim"] // 4} for line in lines])
    [text] = [text for text in verdict(results) if text.startswith("Restarts")]
    assert "] over 64 victims in 16 observations, in 30 s" in text
