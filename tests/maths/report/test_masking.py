"""Warnings that a defence hides gradients. Made-up results."""

import csv
import io

import pytest

from gidef.report import tables, verdict


def warnings(results):
    return [sentence for sentence in verdict(results) if sentence.startswith("Warning")]


def test_nothing_is_said_of_a_defence_that_no_attack_sees_through(results):
    results["rows"][2]["psnr_db"] = {"mean": 9.0, "low": 8.0, "high": 10.0}
    assert warnings(results) == []


def test_an_attack_that_knows_of_the_defence_and_does_much_better_is_a_sign(results):
    [sentence] = warnings(results)  # 12.1 dB against 8.0
    assert '"learned"' in sentence and "joint, which knows of it, gets 4.1 dB more" in sentence


@pytest.mark.parametrize(("fits", "said"), [((0.5, 0.49), "hardly fell, from 0.5 to 0.49"), ((0.9, 0.4), "a failed optimiser is no defence"), ((0.9, 0.1), None)])
def test_a_flat_or_a_high_loss_is_a_sign(results, fits, said):
    results["rows"][2]["psnr_db"] = {"mean": 9.0, "low": 8.0, "high": 10.0}
    results["rows"][1].update(fit_first=fits[0], fit=fits[1])
    found = warnings(results)
    assert (said is None and not found) or said in found[0]


def searching(results, psnr_db=12.1, fit=0.0021, **more):
    results["rows"][1]["psnr_db"]["mean"] = 11.0
    results["rows"][2]["psnr_db"]["mean"] = psnr_db
    results["rows"][2].update(noise="searched", fit_first=0.7, fit=fit, **more)
    return results


def test_an_update_that_is_explained_by_a_wrong_image_is_ambiguous_and_no_protection(results):
    [sentence] = warnings(searching(results))  # the class mean has 19.0 dB
    assert sentence == (
        'Warning, "learned" at the untrained checkpoint is ambiguous to the search of joint, which explains the update almost exactly (distance 0.002) with images worse than '
        "the class mean (12.1 against 19.0 dB): many pairs of image and noise do, so the search is underdetermined and shows no protection; an attack that reads the noise "
        "(read-noise) or several releases (A9) may do better."
    )


@pytest.mark.parametrize(
    "changes", [{"fit": 0.02}, {"psnr_db": 19.1}, {"noise": "read"}, {"noise": None}, {"attack_id": "A11"}, {"fit": None}], ids=["not explained", "a better image", "read", "none", "malicious", "unknown"]
)
def test_nothing_is_ambiguous_where_no_search_of_noise_ends_at_a_wrong_image(results, changes):
    assert "ambiguous" in " ".join(warnings(searching(results)))
    searching(results, **{"psnr_db": 12.1, "fit": 0.0021} | {key: value for key, value in changes.items() if key in ("psnr_db", "fit")})
    results["rows"][2].update({key: value for key, value in changes.items() if key not in ("psnr_db", "fit")})
    assert "ambiguous" not in " ".join(warnings(results))


def test_who_reads_the_noise_in_the_same_table_is_pointed_to(results, make_row):
    """Of the same defence and checkpoint alone; the best of several, and no other attack."""
    searching(results)
    results["rows"] += [
        make_row("learned", name, "A3", psnr_db, checkpoint=at, noise=noise, fit=0.001, fit_first=0.7)
        for name, psnr_db, at, noise in (("guessed", 10.0, "untrained", "read"), ("read-noise", 13.5, "untrained", "read"), ("late", 30.0, "final", "read"), ("other", 12.5, "untrained", "searched"))
    ]
    [sentence] = [said for said in warnings(results) if "ambiguous" in said]
    assert "ambiguous to the search of joint and other, which" in sentence
    assert "shows no protection; read-noise, which reads the noise, gets 13.5 dB, see its row, and several releases (A9) may do better too." in sentence


def test_who_saw_several_releases_is_not_told_to(results):
    [sentence] = warnings(searching(results, attack_id="A9"))
    assert "A9" not in sentence and sentence.endswith("an attack that reads the noise (read-noise) may do better.")


def test_an_ambiguous_update_of_the_undefended_net_or_without_a_class_mean_is_not_spoken_of(results):
    searching(results)["rows"][0].update(noise="searched", fit=0.001, fit_first=0.7)
    results["rows"][0]["psnr_db"]["mean"] = 10.0
    assert all('"plain"' not in sentence for sentence in warnings(results))
    results["bounds"] = [bound for bound in results["bounds"] if bound["name"] != "class mean"]
    assert "ambiguous" not in " ".join(warnings(results))


def test_an_attack_no_better_than_on_a_shuffled_gradient_shows_its_priors(results, make_row):
    results["rows"][2]["psnr_db"] = {"mean": 9.0, "low": 8.0, "high": 10.0}
    results["rows"].append(make_row("learned", "control", "control", 7.8))
    assert "than from a shuffled one (7.8 dB)" in warnings(results)[0]
    results["rows"][-1]["psnr_db"]["mean"] = 6.0
    assert warnings(results) == []


@pytest.mark.parametrize("controls", [(7.8, 6.0), (6.0, 7.8)])
def test_of_several_controls_the_best_is_what_an_attack_has_to_beat(results, make_row, controls):
    results["rows"][2]["psnr_db"] = {"mean": 9.0, "low": 8.0, "high": 10.0}
    results["rows"] += [make_row("learned", f"control {number}", "control", psnr_db) for number, psnr_db in enumerate(controls)]
    [sentence] = warnings(results)  # 8.0 dB
    assert "than from a shuffled one (7.8 dB)" in sentence


def test_the_warning_of_a_control_is_one_per_checkpoint_and_of_whatever_attack_it_repeats(results, make_row):
    results["rows"] = [make_row("plain", "joint", "A3", 24.0), make_row("learned", "joint", "A3", 8.0), make_row("learned", "joint", "A3", 15.0, checkpoint="final")]
    results["rows"] += [make_row("learned", "shuffled gradient", "control", psnr_db, checkpoint=at, of="joint") for psnr_db, at in ((7.8, "untrained"), (14.9, "final"))]
    found = warnings(results)
    assert len(found) == 2 and "joint draws no more from the update than from a shuffled one (7.8 dB)" in found[0] and "(14.9 dB)" in found[1]
    results["bounds"].append({"name": "shuffled gradient", "of": "learned", "checkpoint": "final", "psnr_db": 14.9})
    lines = [line for line in tables.markdown(results).splitlines() if line.startswith("| shuffled gradient of learned | none | final |")]
    [row] = [line for line in csv.DictReader(io.StringIO(tables.csv(results))) if line["defence"] == "shuffled gradient of learned"]
    assert len(lines) == 1 and row["kind"] == "bound" and row["checkpoint"] == "final" and float(row["psnr_db_mean"]) == 14.9


def test_the_undefended_net_is_never_warned_of_and_a_control_never_counts_as_an_attack(results, make_row):
    results["rows"][0].update(fit_first=0.5, fit=0.5)
    results["rows"].append(make_row("learned", "control", "control", 30.0))
    text = " ".join(verdict(results))
    assert "plain" not in " ".join(warnings(results)) and "under the control attack" not in text
