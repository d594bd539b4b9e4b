import math

import pytest
import torch

from gidef.metrics import bootstrap_change, bootstrap_interval, interval, worst_decile


def test_equal_seeds_give_equal_intervals_and_the_global_generator_is_untouched():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values.tolist(), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_interval_covers_the_mean_at_about_its_level():
    draw = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(torch.randn(50, generator=draw), seed=trial, resamples=400)
        covered += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.99  # 0.95, less 1 point for percentile bootstrap at n = 50, ± 3 standard errors


def test_the_interval_matches_the_normal_one_for_many_values_and_widens_with_the_level():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values, seed=0, resamples=4000)
    half = 1.96 * values.std().item() / math.sqrt(2000)
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)
    narrow = bootstrap_interval(values, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_drawing_in_chunks_keeps_the_number_of_resamples(monkeypatch):
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_interval(values, seed=0)
    monkeypatch.setattr(interval, "CHUNK", 100)
    assert bootstrap_interval(values, seed=0) == pytest.approx(whole, abs=0.02)


def test_one_value_or_equal_values_have_no_width():
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)
    assert bootstrap_interval(torch.full((9,), 0.5), seed=0) == (0.5, 0.5)


def test_the_worst_decile_is_the_tenth_that_leaks_most_rounded_up():
    values = torch.arange(25.0)  # ⌈25/10⌉ = 3 values
    assert worst_decile(values) == 23
    assert worst_decile(values, higher_is_leak=False) == 1
    assert worst_decile([4.0, 9.0, 5.0]) == 9
    assert values.tolist() == list(range(25))


def test_empty_and_broken_values_are_refused():
    for broken in ([], [1.0, math.nan], [math.inf], torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="finite values"):
            bootstrap_interval(broken, seed=0)
        with pytest.raises(ValueError, match="finite values"):
            worst_decile(broken)
    with pytest.raises(ValueError, match="level=1.0"):
        bootstrap_interval([1.0], seed=0, level=1.0)
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_interval([1.0], seed=0, resamples=0)


def test_a_change_of_means_is_paired_image_by_image():
    draw = torch.Generator().manual_seed(0)
    other = torch.rand(64, generator=draw, dtype=torch.float64) + 0.1
    assert bootstrap_change(1.25 * other, other, seed=0) == pytest.approx((0.25, 0.25), abs=1e-12), "of a fixed share, whatever images are drawn"
    ours = other * (0.8 + 0.1 * torch.randn(64, generator=draw, dtype=torch.float64))
    low, high = bootstrap_change(ours, other, seed=0, resamples=4000)
    ratio = (ours.mean() / other.mean()).item()
    half = 1.96 * ((ours - ratio * other).std() / other.mean()).item() / 8  # the delta method
    assert low == pytest.approx(ratio - 1 - half, abs=0.15 * half) and high == pytest.approx(ratio - 1 + half, abs=0.15 * half)
    apart = bootstrap_change(ours.flip(0), other, seed=0)
    assert apart[1] - apart[0] > 3 * (high - low), "of other pairs it is wider"


def test_a_change_of_what_may_be_nought_is_not_to_be_had_and_nonsense_is_refused():
    assert bootstrap_change([1.0, 1.0], [0.0, 1.0], seed=0) is None and bootstrap_change([0.0, 0.0], [1.0, 1.0], seed=0) == (-1.0, -1.0)
    with pytest.raises(ValueError, match="pairs"):
        bootstrap_change([1.0], [1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match="other >= 0"):
        bootstrap_change([1.0, 1.0], [-1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_change([1.0], [1.0], seed=0, level=1.0)


def test_images_of_one_observation_are_drawn_together():
    draw = torch.Generator().manual_seed(0)
    covered = {1: 0, 4: 0}
    for trial in range(200):
        together = torch.randn(40, 1, generator=draw, dtype=torch.float64) + 0.3 * torch.randn(40, 4, generator=draw, dtype=torch.float64)
        for batch in covered:
            low, high = bootstrap_interval(together.flatten(), seed=trial, batch=batch, resamples=400)
            covered[batch] += low <= 0 <= high
    assert covered[1] / 200 < 0.75 and 0.88 <= covered[4] / 200 <= 0.99, covered
    assert bootstrap_interval(together.flatten(), seed=3, batch=4) == bootstrap_interval(together.mean(1), seed=3)
    other = together.exp().flip(0)
    means = together.exp().mean(1), other.mean(1)
    assert bootstrap_change(together.exp().flatten(), other.flatten(), seed=3, batch=4) == bootstrap_change(*means, seed=3)


def test_one_observation_of_several_images_has_no_interval_and_its_batches_are_whole():
    assert bootstrap_interval([1.0, 2.0], seed=0, batch=2) is None and bootstrap_change([1.0, 2.0], [2.0, 2.0], seed=0, batch=2) is None
    assert bootstrap_interval([1.0], seed=0, batch=1) == (1.0, 1.0)
    for batch in (0, 2):
        with pytest.raises(ValueError, match=f"3 values in batches of {batch}"):
            bootstrap_interval([1.0, 2.0, 3.0], seed=0, batch=batch)
        with pytest.raises(ValueError, match=f"3 values in batches of {batch}"):
            bootstrap_change([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], seed=0, batch=batch)
