"""What a run reports of its reconstructions, on made-up values."""

import torch

from gidef.findings import _most_leaked_first


def test_victims_stand_in_the_order_of_their_leakage():
    best = torch.tensor([20.0, 30.0, 30.0, 25.0])
    other = torch.tensor([19.0, 10.0, 12.0, 24.0])
    assert _most_leaked_first([best, other], 4).tolist() == [2, 1, 3, 0]
    assert _most_leaked_first([], 3).tolist() == [0, 1, 2]
