"""What a run reports of its reconstructions, on made-up values."""

from types import SimpleNamespace

import torch

from gidef.config import NaiveMatching, PostHocDecoder
from gidef.findings import _leaks, _most_leaked_first


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
