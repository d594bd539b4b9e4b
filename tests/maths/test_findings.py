"""What a run reports of its reconstructions, on made-up values."""

from types import SimpleNamespace

import torch

from gidef.config import NaiveMatching, PostHocDecoder
from gidef.findings import _leaks, _most_leaked_first
from gidef.metrics import bootstrap_interval
from gidef.scores import measured


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
