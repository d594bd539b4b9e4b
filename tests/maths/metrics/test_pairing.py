import itertools

import pytest
import torch

from gidef.metrics import mse, pair


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_shuffled_batch_is_put_back_in_order():
    truth = images(9, 3, 6, 6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    noisy = truth[order] + 0.05 * images(9, 3, 6, 6, seed=2)
    found = pair(noisy, truth)
    assert found.dtype == torch.int64
    assert torch.equal(order[found], torch.arange(9))
    torch.testing.assert_close(mse(noisy[found], truth), mse(truth + 0.05 * images(9, 3, 6, 6, seed=2)[found], truth), atol=1e-3, rtol=0)


def test_the_total_is_the_least_of_all_permutations_and_no_image_is_used_twice():
    truth, guesses = images(5, 1, 4, 4), images(5, 1, 4, 4, seed=1)
    found = pair(guesses, truth)
    assert sorted(found.tolist()) == list(range(5))
    best = min(mse(guesses[list(p)], truth).sum().item() for p in itertools.permutations(range(5)))
    assert mse(guesses[found], truth).sum().item() == pytest.approx(best, abs=1e-6)


def test_one_image_pairs_with_itself_and_failures_are_refused():
    x = images(2, 1, 4, 4)
    assert pair(x[:1], x[1:]).tolist() == [0]
    with pytest.raises(ValueError, match="NaN"):
        pair(x * float("nan"), x)
    for few in (x[:1], torch.rand(2, 1, 4, 5)):
        with pytest.raises(ValueError, match="one shape, as many or more"):
            pair(few, x)


def test_of_more_reconstructions_than_images_the_best_fitting_stand_for_them():
    truth = images(3, 1, 4, 4)
    more = torch.cat([1 - truth, truth.flip(0), torch.rand(2, 1, 4, 4)])
    found = pair(more, truth)
    assert found.tolist() == [5, 4, 3] and torch.equal(more[found], truth)
    assert sorted(pair(truth[:1].repeat(3, 1, 1, 1), truth[:2]).tolist()) != [0, 0]
