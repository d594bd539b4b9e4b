"""What a run reports of its reconstructions, on made-up values."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from gidef import findings, observe
from gidef.cells import make_cells
from gidef.config import (
    DecoderAware,
    GenerativePrior,
    JointMatching,
    LatentDecoding,
    MultiRound,
    NaiveMatching,
    PostHocDecoder,
    ReadNoise,
    Standard,
    Undefended,
)
from gidef.findings import _leaks, _most_leaked_first
from gidef.metrics import bootstrap_interval
from gidef.scores import ABOVE, JUDGED, MEASURES, measured
from gidef.types import Reconstruction
from tests.small_run import RECIPE, trained_once

KEYS = (*MEASURES, ABOVE, f"{JUDGED}other", "recovered", "oracle_psnr_db")


def test_victims_stand_in_the_order_of_their_leakage():
    best = torch.tensor([20.0, 30.0, 30.0, 25.0])
    other = torch.tensor([19.0, 10.0, 12.0, 24.0])
    assert _most_leaked_first([best, other], 4).tolist() == [2, 1, 3, 0]
    assert _most_leaked_first([], 3).tolist() == [0, 1, 2]


def test_what_failed_or_saw_a_shuffled_gradient_puts_no_victim_first():
    def cell(values, *, failed=(), attack=None, control=False):
        found = [SimpleNamespace(status="failed" if batch in failed else "ok") for batch in range(2)]
        victims = SimpleNamespace(rows=torch.zeros(2, 2))
        one = SimpleNamespace(attack=attack or NaiveMatching(), control=control, reconstructions=found, victims=victims)
        return one, torch.tensor(values)

    def order(*cells):
        return _most_leaked_first(_leaks([one for one, _ in cells], {id(one): {"psnr_db": values} for one, values in cells}), 4).tolist()

    plain = cell([15.0, 11.0, 12.0, 13.0])
    assert order(plain) == [0, 3, 2, 1]
    assert order(plain, cell([10.0, 17.0, 16.0, 10.0], control=True)) == [0, 3, 2, 1]
    assert order(plain, cell([10.0, 17.0, 16.0, 10.0], attack=PostHocDecoder())) == [0, 3, 2, 1]
    assert order(plain, cell([30.0, 29.0, 14.0, 10.0], failed=(0,))) == [0, 2, 3, 1], "its first batch is mid-grey"
    assert order(cell([30.0, 29.0, 14.0, 15.0], failed=(0,))) == [3, 2, 0, 1], "victims of whom nothing is known come last"
    assert order(cell([30.0, 29.0, 14.0, 15.0], failed=(0, 1))) == [0, 1, 2, 3]


def test_one_training_that_gives_a_patient_away_is_not_made_good_by_the_others():
    psnr = torch.full((3, 32), 12.0, dtype=torch.float64)
    psnr[1, 5] = 36.0
    found = measured(psnr, "psnr_db", seed=0)
    assert (found["mean"], found["worst"]) == (12.25, 36.0) and found["worst_decile"] == (36 + 3 * 12) / 4
    assert (found["low"], found["high"]) == bootstrap_interval(psnr.mean(0), seed=0)
    distance = measured(-psnr, "mse", seed=0)
    assert (distance["worst"], distance["worst_decile"]) == (-36.0, -(36 + 3 * 12) / 4)
    one = torch.rand(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert measured(one, "psnr_db", seed=0) == measured(one[None], "psnr_db", seed=0) == measured(one.expand(3, 32).clone(), "psnr_db", seed=0)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """(run, cells of two seeds and two batches of two, made-up values of each cell)"""
    attacks = {"naive": NaiveMatching(), "smoke": Standard(version="smoke")}
    recipe = dataclasses.replace(RECIPE, defences={"undefended": Undefended()}, attacks=attacks)
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        run, trained = one("undefended")
        cells = make_cells(run, {("undefended", 0): trained, ("undefended", 1): trained}, run.folder)
        draw, scored = torch.Generator().manual_seed(0), {}
        for cell in cells:
            cell.releases = [observe.release(run, trained, cell.snapshot, seed=cell.seed, control=cell.control)]
            truth = zip(cell.victims.images, cell.victims.labels, strict=True)
            cell.reconstructions = [Reconstruction(images=images, labels=labels, loss=0.0, losses=torch.zeros(1)) for images, labels in truth]
            scored[id(cell)] = {key: torch.rand(4, generator=draw, dtype=torch.float64) for key in KEYS}
        yield run, cells, scored


def expected(group, key):
    """Of values (seeds, victims): mean over victims, interval over the two batches, and the most leaked over seeds and victims."""
    low, high = bootstrap_interval(group.mean(0).view(2, 2).mean(1), seed=0)
    most = group.min() if key in ("mse", "nmse", "feature_distance") else group.max()
    return pytest.approx({"mean": float(group.mean()), "low": low, "high": high, "worst": float(most), "worst_decile": float(most)}, abs=1e-12)


def test_rows_count_observations_and_their_intervals_are_over_them(attacked):
    run, cells, scored = attacked
    rows = {row["attack"]: row for row in findings.rows(run, cells, scored)}
    assert {(row["victims"], row["observations"], *row["seeds"]) for row in rows.values()} == {(4, 2, 0, 1)}

    def values(name, key):
        return torch.stack([scored[id(cell)][key] for cell in cells if cell.name == name])

    for name in ("naive", "smoke - naive", "smoke - shuffled gradient"):
        for key in (*MEASURES, ABOVE):
            assert rows[name][key] == expected(values(name, key), key), key
        assert rows[name]["attacker_accuracy_by"]["other"] == expected(values(name, f"{JUDGED}other"), "")
        assert rows[name]["oracle_restart_psnr_db"] == pytest.approx(float(values(name, "oracle_psnr_db").mean()))
        assert rows[name]["label_recovery"] == pytest.approx(float(values(name, "recovered").mean()))
    [bound] = findings.control_bounds(cells, scored)
    assert bound["psnr_db"] == rows["smoke - shuffled gradient"]["psnr_db"] and bound["mse"] == rows["smoke - shuffled gradient"]["mse"]
    assert bound["attacker_accuracy_by"] == rows["smoke - shuffled gradient"]["attacker_accuracy_by"]


def test_a_row_says_what_became_of_the_noise_on_the_latent(attacked):
    run, cells, scored = attacked
    some = [cell for cell in cells if cell.name == "naive"]

    def said(attack, *, noise_shape=(4, 2, 2), control=False, read=(None, None)):
        trained, victims = SimpleNamespace(training=SimpleNamespace(defence=SimpleNamespace(noise_shape=noise_shape))), SimpleNamespace(rows=[0, 1, 2])
        return findings._noise([SimpleNamespace(attack=attack, control=control, trained=trained, victims=victims, twin=None, read=count) for count in read])

    assert [said(attack()) for attack in (JointMatching, DecoderAware, GenerativePrior, MultiRound)] == ["searched"] * 4
    assert [said(ReadNoise(), read=read) for read in ((3, 3), (3, 2), (0, 0))] == ["read", "searched", "searched"]
    assert [said(attack()) for attack in (NaiveMatching, LatentDecoding, PostHocDecoder)] == [""] * 3
    assert said(JointMatching(), noise_shape=None) == said(ReadNoise(), noise_shape=None) == said(JointMatching(), control=True) == ""
    assert all("noise" not in row for row in findings.rows(run, cells, scored))  # of the undefended net
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "_noise", lambda group: "searched")
        assert [row["noise"] for row in findings.rows(run, some, scored)] == ["searched"]
        ensemble = [row for row in findings.rows(run, cells, scored) if row["attack_id"] == "standard"]
    assert ensemble and all("noise" not in row for row in ensemble)


def test_an_ensemble_s_most_leaked_image_is_that_of_any_member_and_seed(attacked):
    run, cells, scored = attacked
    [row] = [row for row in findings.rows(run, cells, scored) if row["attack"] == "smoke"]
    names = [name for name in dict.fromkeys(cell.name for cell in cells) if name.startswith("smoke - ") and "shuffled" not in name]
    seeds = [[scored[id(cell)] for cell in cells if cell.name == name] for name in names]
    of = {key: torch.stack([torch.stack([values[key] for values in member]) for member in seeds]) for key in ("psnr_db", "mse")}
    best = of["psnr_db"].argmax(0, keepdim=True)
    for key, all_of_them in of.items():
        assert row[key] == expected(all_of_them.gather(0, best)[0], key), key
    assert row["psnr_db"]["worst"] == of["psnr_db"].max() and row["observations"] == 2 and len(names) > 1
