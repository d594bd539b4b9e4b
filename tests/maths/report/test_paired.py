"""The learned perturbation beside its controls: made-up rows (see conftest) and a made-up record of their victims."""

import copy

import numpy as np
import pytest

from gidef.report.control import controls
from gidef.report.verdict import compare, criteria, verdict

VICTIMS, SEEDS = 64, (0, 1, 2)
ATTACKS = (("naive", "A0"), ("joint", "A3"))


def values_of(defence, attack, shift):
    """(victims, seeds) PSNR of a cell: images differ by 4 dB, and the defences of one image by 0.2 dB and a shift."""
    images = 12.0 + 4.0 * np.random.default_rng(0).standard_normal((VICTIMS, 1)) + 6.0 * (attack == "joint")
    own = 0.2 * np.random.default_rng(len(defence) + 10 * len(attack)).standard_normal((VICTIMS, len(SEEDS)))
    return images + own + shift


def compared(results, make_row, shifts, accuracy=None, attacks=ATTACKS):
    """Results and record of defences shifted by some dB against one another."""
    results = copy.deepcopy(results)
    types = {"ours": "LearnedPerturbation", "iso": "IsotropicNoise", "iso far": "IsotropicNoise", "cvb": "CVB", "dp": "DPSGD"}
    results["recipe"]["defences"] = {"plain": {"type": "Undefended"}, **{name: {"type": types[name]} for name in shifts}}
    results["rows"], lines = [], [{"kind": "round", "round": 1}]
    for name, shift in shifts.items():
        for attack, number in attacks:
            psnr = values_of(name, attack, shift)
            row = make_row(name, attack, number, float(psnr.mean()), accuracy=(accuracy or {}).get(name, 0.9))
            results["rows"].append(row | {"attacker_accuracy": 0.5, "mse": float((10 ** (-psnr / 10)).mean())})
            lines += [
                {"kind": "attack", "defence": name, "attack": attack, "checkpoint": "untrained", "seed": seed, "victim": 100 + victim,
                 "psnr_db": psnr[victim, place], "mse": 10 ** (-psnr[victim, place] / 10), "attacker_accuracy": float(victim % 2)}
                for place, seed in enumerate(SEEDS) for victim in range(VICTIMS)
            ]  # fmt: skip
    return results, lines


def said(results, lines):
    return controls(results, compare(results, lines))


def test_the_intervals_are_of_the_differences_of_the_same_images(results, make_row):
    results, lines = compared(results, make_row, {"ours": -0.3, "iso": 0.0})
    naive, strongest = compare(results, lines)
    assert (naive["under"], naive["attacks"], strongest["under"], strongest["attacks"]) == ("naive", ["naive"] * 2, "strongest", ["joint"] * 2)
    for one, attack in ((naive, "naive"), (strongest, "joint")):
        ours, iso = (values_of(name, attack, shift).mean(1) for name, shift in (("ours", -0.3), ("iso", 0.0)))
        drawn = np.random.default_rng(1).integers(VICTIMS, size=(4000, VICTIMS))
        expected = np.quantile((ours - iso)[drawn].mean(1), [0.025, 0.975])
        found = one["psnr_db_difference"]
        assert found["mean"] == pytest.approx((ours - iso).mean()) and [found["low"], found["high"]] == pytest.approx(expected.tolist(), abs=0.01)
        assert found["high"] - found["low"] < 0.2, "images differ by 4 dB: unpaired intervals would be ten times as wide"
        sides = [np.mean([10 ** (-values_of(name, attack, shift)[:, seed] / 10) for seed in range(3)], axis=0) for name, shift in (("ours", -0.3), ("iso", 0.0))]
        change = np.quantile(sides[0][drawn].mean(1) / sides[1][drawn].mean(1) - 1, [0.025, 0.975])
        assert [one["mse_change"]["low"], one["mse_change"]["high"]] == pytest.approx(change.tolist(), abs=0.01) and one["victims"] == VICTIMS


@pytest.mark.parametrize(
    ("shift", "words"),
    [(-0.3, "It leaks less than isotropic noise of the same accuracy: learning the noise pays."),
     (0.0, "It does NOT beat isotropic noise of the same accuracy: the method is plain feature noise here."),
     (0.3, "It leaks MORE than isotropic noise of the same accuracy: learning the noise does harm.")],
)  # fmt: skip
def test_it_is_said_whether_learning_the_noise_pays(shift, words, results, make_row):
    results, lines = compared(results, make_row, {"ours": shift, "iso": 0.0})
    [text] = said(results, lines)
    mean = compare(results, lines)[0]["psnr_db_difference"]["mean"]
    assert abs(mean - shift) < 0.05 and text.endswith(words) and f"under the naive attack PSNR {mean:+.1f} dB [" in text and "under the strongest attack on each (joint) PSNR" in text
    assert 'Learned perturbation against isotropic noise at the untrained checkpoint, "ours" against "iso", client accuracy 90.0 % against 90.0 %' in text
    results["comparisons"] = compare(results, lines)
    assert text in verdict(results) and text in criteria(results)


def test_a_lower_psnr_of_which_a_judge_names_more_is_no_win(results, make_row):
    results, lines = compared(results, make_row, {"ours": -0.3, "iso": 0.0})
    for line in lines:
        if line.get("defence") == "iso":
            line["attacker_accuracy"] = 0.0
    assert "does NOT beat" in said(results, lines)[0]


def test_the_nearest_in_accuracy_is_the_control_and_one_that_is_not_near_is_said(results, make_row):
    results, lines = compared(results, make_row, {"ours": -0.3, "iso far": 0.0, "iso": 0.0, "cvb": 0.0}, {"ours": 0.9, "iso": 0.905, "iso far": 0.8, "cvb": 0.88})
    iso, cvb = said(results, lines)
    assert '"ours" against "iso"' in iso and "pays" in iso
    assert "the variational bottleneck (CVB)" in cvb and "90.0 % against 88.0 %: these are not matched within 1 point, so they are not compared." in cvb and "dB" not in cvb
    results["rows"][-1]["client_accuracy"] = results["rows"][-2]["client_accuracy"] = 0.9
    assert said(results, lines)[1].endswith("It leaks less than the variational bottleneck (CVB) of the same accuracy.")
    results["rows"][-1]["client_accuracy"] = results["rows"][-2]["client_accuracy"] = None
    assert "are not known" in said(results, lines)[1]


def test_a_naive_attack_alone_or_a_record_with_other_victims_concludes_nothing(results, make_row):
    alone, lines = compared(results, make_row, {"ours": -0.3, "iso": 0.0}, attacks=ATTACKS[:1])
    [text] = said(alone, lines)
    assert "nothing is concluded" in text and text.count("PSNR") == 1 and "Only naive" in text
    both, lines = compared(results, make_row, {"ours": -0.3, "iso": 0.0})
    for record in ((), lines[:-1], [line for line in lines if line.get("victim") != 163], [line | {"psnr_db": None} for line in lines]):
        [text] = said(both, record)
        assert ("[" not in text and "no paired interval" in text) or record == lines[:-1], "a seed of one victim may be missing, a victim may not"
    assert said(results, lines) == [], "no control in the recipe"


def test_the_papers_claim_has_paired_intervals(results, make_row):
    results, lines = compared(results, make_row, {"ours": -0.3, "dp": 0.0})
    results["comparisons"] = compare(results, lines)
    naive, strongest = [text for text in verdict(results) if "paper's claim" in text]
    for text, one in ((naive, results["comparisons"][0]), (strongest, results["comparisons"][1])):
        assert f"MSE {100 * one['mse_change']['mean']:+.1f} % [{100 * one['mse_change']['low']:+.1f}, {100 * one['mse_change']['high']:+.1f}] (claimed" in text
        assert "+0.0 points [+0.0, +0.0] (claimed -12.5: FAIL)" in text


def test_victims_that_are_observed_together_are_drawn_together(results, make_row):
    results, lines = compared(results, make_row, {"ours": -0.3, "iso": 0.0})
    before = compare(results, [line | {"batch": 63 - line["victim"] % 100} if line["kind"] == "attack" else line for line in lines])
    assert before == compare(results, lines), "batches of one are the victims, however they are numbered"
    batch, size = {victim: (victim * 7) % 16 for victim in range(VICTIMS)}, 4  # not side by side, as victims come sorted
    shift = np.random.default_rng(5).standard_normal(16)
    for row in results["rows"]:
        row["threat"], row["observations"] = row["threat"] | {"batch_size": size}, VICTIMS // size
    for line in lines[1:]:
        line["batch"] = batch[line["victim"] - 100]
        line["psnr_db"] += shift[line["batch"]] if line["defence"] == "ours" else 0.0
    naive, _ = compare(results, lines)
    ours, iso = (values_of(name, "naive", move).mean(1) for name, move in (("ours", -0.3), ("iso", 0.0)))
    apart = ours + shift[[batch[victim] for victim in range(VICTIMS)]] - iso
    means = np.array([np.mean([apart[victim] for victim in range(VICTIMS) if batch[victim] == number]) for number in range(16)])
    expected = np.quantile(means[np.random.default_rng(1).integers(16, size=(20_000, 16))].mean(1), [0.025, 0.975])
    found = naive["psnr_db_difference"]
    assert [found["low"], found["high"]] == pytest.approx(expected.tolist(), abs=0.03) and (naive["victims"], naive["observations"]) == (VICTIMS, 16)
    assert found["high"] - found["low"] > 0.8, "by single images it would be half as wide"
    assert naive["attacker_accuracy_change"]["low"] == naive["attacker_accuracy_change"]["high"] == 0.0
    for broken in ([line | {"batch": line["batch"] % 15} if line["kind"] == "attack" else line for line in lines],
                   [line | {"batch": 15 - line["batch"]} if line.get("defence") == "ours" else line for line in lines],
                   [{key: value for key, value in line.items() if key != "batch"} for line in lines]):  # fmt: skip
        one = compare(results, broken)[0]
        assert one["psnr_db_difference"]["low"] is None and one["victims"] == one["observations"] == 0, "batches of two sizes, of two kinds, and none"


def test_one_observation_of_all_victims_concludes_nothing(results, make_row):
    results, lines = compared(results, make_row, {"ours": -0.3, "iso": 0.0})
    for row in results["rows"]:
        row["observations"] = 1
    [text] = said(results, [line | {"batch": 0} for line in lines])
    assert "[" not in text and text.endswith("or with one observation of them all, there is no paired interval, so nothing is concluded.")
