"""The criterion of noise with a certificate beside made-up rows (see conftest)."""

import csv
import io

import pytest

from gidef.report import html, tables
from gidef.report.certificate import certificates
from gidef.report.verdict import criteria, is_undefended, verdict


def paired(mean, half):
    return {"mean": mean, "low": mean - half, "high": mean + half, "worst": mean + 5, "worst_decile": mean + 4}


@pytest.fixture
def certified(results, make_row):
    """Capacity noise under `head`: the decoder (A12) is 0.5 ± 0.3 dB above the class mean, all others below it; 1.5 points of accuracy lost."""
    bits = {"share_policy": "head", "certified_bits": 17.25, "releases": 1, "fano": 1.0, "lifetime_bits": None}
    results["recipe"]["defences"]["noise"] = {"type": "CapacityNoise"}
    results["training"].append({"defence": "noise", "seed": 0, "test_accuracy": 0.900})
    rows = [("naive", "A0", -7.0), ("joint", "A3", -3.0), ("latent", "A5", 0.1), ("decoder", "A12", 0.5)]
    plain = [row | {"share_policy": "head"} for row in results["rows"]]
    results["rows"] = plain + [make_row("noise", name, kind, 19.0 + mean, **bits, above_class_mean_db=paired(mean, 0.3)) for name, kind, mean in rows]
    return results


def judged(results):
    return certificates(results, is_undefended=is_undefended)


def test_it_is_met_by_the_strongest_of_all_attacks_and_said_in_every_form(certified):
    [text] = judged(certified)
    assert text == (
        'The certificate of "noise" at the untrained checkpoint: at most 17.2 bits of an image beyond its label a release, no bound on the whole training. The strongest '
        "attack, decoder (A12), is +0.5 dB [+0.2, +0.8] from the class mean (allowed +1.0: pass); accuracy -1.5 points (allowed -2.0: pass). "
        "Within 1 dB of the class mean at no more than 2 points: pass."
    )
    assert text in verdict(certified) and text in criteria(certified) and f"- {text}" in tables.markdown(certified).splitlines()
    certified["verdict"] = verdict(certified)
    page = html.render([html.Page(name="run", results=certified)])
    assert text.replace('"', "&quot;") in page or text.replace('"', "&#34;") in page or text in page


@pytest.mark.parametrize(
    ("mean", "half", "accuracy", "said"),
    [
        (0.9, 0.3, 0.900, ("allowed +1.0: FAIL, by the upper end", "points: FAIL.")),
        (1.4, 0.3, 0.900, ("allowed +1.0: FAIL)", "points: FAIL.")),
        (0.7, 0.3, 0.895, ("+1.0] from the class mean (allowed +1.0: pass)", "-2.0 points (allowed -2.0: pass)", "points: pass.")),
        (0.5, 0.3, 0.894, ("allowed +1.0: pass", "-2.1 points (allowed -2.0: FAIL)", "points: FAIL.")),
        (0.5, 0.3, 0.920, ("+0.5 points (allowed -2.0: pass)", "points: pass.")),
    ],
)
def test_either_side_alone_fails_it(certified, mean, half, accuracy, said):
    certified["rows"][-1]["above_class_mean_db"] = paired(mean, half)
    certified["training"][-1]["test_accuracy"] = accuracy
    [text] = judged(certified)
    assert all(part in text for part in said), text


def test_any_attack_of_the_threat_model_can_be_the_strongest_and_no_other(certified, make_row):
    certified["rows"][-3]["above_class_mean_db"] = paired(3.0, 0.3)
    assert "The strongest attack, joint (A3), is +3.0 dB" in judged(certified)[0]
    for kind in ("A11", "standard", "control"):
        certified["rows"][-3]["attack_id"] = kind
        assert "The strongest attack, decoder (A12)" in judged(certified)[0]


def test_without_the_attacks_on_the_latent_or_the_undefended_net_nothing_is_judged(certified):
    certified["rows"] = [row for row in certified["rows"] if row["attack_id"] != "A5"]
    assert judged(certified)[0].endswith("Not judged: no attack A5.")
    certified["training"] = certified["training"][1:]
    assert judged(certified)[0].endswith("Not judged: no attack A5, no undefended net.")
    certified["bounds"], certified["rows"] = [], [{**row, "above_class_mean_db": None} for row in certified["rows"]]
    assert judged(certified)[0].endswith("Not judged: there is no class-mean bound to compare with.")


def test_without_pairs_the_class_mean_itself_is_taken_off(certified):
    for row in certified["rows"]:
        row.pop("above_class_mean_db", None)
    assert "decoder (A12), is +0.5 dB [-0.1, +1.1] from the class mean (allowed +1.0: FAIL, by the upper end)" in judged(certified)[0]


@pytest.mark.parametrize("place", [-1, -4])
def test_of_several_certificates_the_one_that_grants_most_is_said(certified, place):
    certified["rows"][place] |= {"certified_bits": 20.5, "lifetime_bits": 300.0}
    certified["rows"][-2] |= {"certified_bits": 3.0}
    [text] = judged(certified)
    assert "at most 20.5 bits of an image beyond its label a release, 300.0 in the whole training." in text


def test_other_policies_and_rows_without_a_certificate_are_not_judged(certified, results):
    for row in certified["rows"]:
        row["certified_bits"] = None
    assert judged(certified) == []
    for row in certified["rows"]:
        row |= {"certified_bits": 17.0, "share_policy": "full"}
    assert judged(certified) == []


def test_tables_say_bits_of_a_release_and_of_a_lifetime_with_fano(certified):
    certified["rows"][-1] |= {"lifetime_bits": 5175.0, "lifetime_releases": 300, "lifetime_fano": 1.0, "fano": 0.874}
    certified["rows"][-2] |= {"certified_bits": None, "uncertified": "because"}
    head, _, *lines = [line for line in tables.markdown(certified).splitlines() if line.startswith("|")]
    place = [cell.strip() for cell in head.split("|")].index("bits per release")
    cells = [[cell.strip() for cell in line.split("|")][place : place + 3] for line in lines]
    assert cells[0] == ["", "", ""] and cells[3] == ["17.2", "none", "100"]
    assert cells[5] == ["none", "none", ""] and cells[6] == ["17.2", "5175.0", "87; 100"]
    assert "17.2\n" not in tables.text(certified, width=80) and "5175.0" in tables.text(certified, width=80)
    wide = next(csv.DictReader(io.StringIO("".join(tables.csv(certified).splitlines(keepends=True)[:1] + tables.csv(certified).splitlines(keepends=True)[7:8]))))
    assert float(wide["lifetime_bits"]) == 5175.0 and float(wide["fano"]) == 0.874 and wide["lifetime_releases"] == "300"
    page = html.render([html.Page(name="run", results=certified)])
    assert "lifetime bits" in page and 'data-key="lifetime" data-value="5175.0"' in page


def test_runs_without_a_certificate_have_no_such_columns(results):
    assert "bits" not in tables.markdown(results).splitlines()[2] and "lifetime bits" not in html.render([html.Page(name="run", results=results)])


def test_a_refused_certificate_says_why_and_keeps_its_columns(results, make_row):
    reason = "share policy 'full' releases the encoder's gradients: there is no such bound. Use head."
    refused = {"certified_bits": None, "uncertified": reason, "note": f"no certificate: {reason}"}
    results["rows"] += [make_row("noise", name, "A0", 12.0, **refused) for name in ("naive", "joint")]
    assert judged(results) == [f'There is no certificate for "noise": {reason}'] and judged(results)[0] in verdict(results)
    page = html.render([html.Page(name="run", results=results)])
    for key in ("bits", "lifetime"):
        assert page.count(f'<td class="number" data-key="{key}">no certificate</td>') == 2 and f'<td class="number" data-key="{key}">–</td>' in page
    head, _, *lines = [line for line in tables.markdown(results).splitlines() if line.startswith("|")]
    place = [cell.strip() for cell in head.split("|")].index("bits per release")
    assert [[cell.strip() for cell in line.split("|")][place : place + 3] for line in lines[3:5]] == [["none", "none", ""]] * 2
    assert "Bits none: no certificate" in tables.text(results) and f"no certificate: {reason}"[:40] in tables.text(results)


def test_of_one_observation_of_several_images_nothing_is_judged(certified):
    for row in certified["rows"][-4:]:
        row |= {"observations": 1, "above_class_mean_db": row["above_class_mean_db"] | {"low": None, "high": None}}
    [text] = judged(certified)
    assert text.endswith("Not judged: one observation alone.") and "is +0.5 dB from the class mean" in text
