import math

import pytest
import torch

from gidef.data import class_counts, partition, summary
from gidef.errors import InputError

LABELS = torch.arange(10).repeat_interleave(100)[torch.randperm(1000, generator=torch.Generator().manual_seed(5))]
KINDS = {
    "iid": lambda labels, **options: partition.iid(labels, **options),
    "dirichlet": lambda labels, **options: partition.dirichlet(labels, **{"alpha": 0.3, **options}),
    "shards": lambda labels, **options: partition.shards(labels, shards_per_client=2, **options),
    "quantity skew": lambda labels, **options: partition.quantity_skew(labels, **{"alpha": 0.3, **options}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def check(parts, labels, num_clients, min_examples):
    assert len(parts) == num_clients
    assert all(part.dtype == torch.int64 and torch.equal(part, part.sort().values) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))  # each row once
    assert min(map(len, parts)) >= min_examples


@each_kind
@pytest.mark.parametrize(("num_clients", "min_examples"), [(1, 1), (7, 1), (7, 60), (20, 50), (100, 10)])
def test_every_row_goes_to_one_client_and_nobody_gets_too_few(kind, num_clients, min_examples):
    parts = KINDS[kind](LABELS, num_clients=num_clients, seed=0, min_examples=min_examples)
    check(parts, LABELS, num_clients, min_examples)


@each_kind
def test_the_seed_alone_decides(kind):
    first, again, other = (KINDS[kind](LABELS, num_clients=6, seed=seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again)) and not all(left.equal(right) for left, right in zip(first, other, strict=True))


@each_kind
def test_the_global_generator_is_left_alone(kind):
    before = torch.random.get_rng_state()
    KINDS[kind](LABELS, num_clients=6, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_iid_sizes_differ_by_one_and_classes_are_alike():
    parts = partition.iid(LABELS, num_clients=7, seed=0)
    assert {len(part) for part in parts} == {142, 143}
    assert int(class_counts(LABELS, parts, 10).min()) > 4  # 14 expected


@pytest.mark.parametrize("draw", [partition.dirichlet, partition.quantity_skew])
def test_alpha_runs_from_one_owner_to_equal_shares(draw):
    def largest_share(alpha):
        parts = draw(LABELS, num_clients=5, alpha=alpha, seed=1)
        counts = class_counts(LABELS, parts, 10).float()
        table = counts if draw is partition.dirichlet else counts.sum(1, keepdim=True)
        return float((table.max(0).values / table.sum(0)).mean())

    shares = [largest_share(alpha) for alpha in (1e-3, 0.1, 1.0, 100.0, math.inf)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.95 and shares[-1] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1e-3, 1e12, math.inf])
def test_extreme_concentrations_stay_finite_and_within_the_minimum(alpha):
    check(partition.dirichlet(LABELS, num_clients=8, alpha=alpha, seed=0, min_examples=20), LABELS, 8, 20)
    check(partition.quantity_skew(LABELS, num_clients=8, alpha=alpha, seed=0, min_examples=20), LABELS, 8, 20)


def test_dirichlet_spreads_each_class_with_the_variance_of_its_law():
    shares = []
    for seed in range(60):
        parts = partition.dirichlet(LABELS, num_clients=4, alpha=1.0, seed=seed)
        shares.append(class_counts(LABELS, parts, 10)[:, 0] / 100)
    variance = float(torch.stack(shares).var(0).mean())
    assert variance == pytest.approx(3 / 16 / 5, rel=0.2)  # Var = a(A−a)/(A²(A+1)) with a = 1, A = 4


def test_quantity_skew_keeps_classes_alike():
    parts = partition.quantity_skew(LABELS, num_clients=4, alpha=1.0, seed=0, min_examples=100)
    counts = class_counts(LABELS, parts, 10).float()
    assert float((counts / counts.sum(1, keepdim=True) - 0.1).abs().max()) < 0.1
    assert counts.sum(1).max() > 1.5 * counts.sum(1).min()


def test_two_shards_hold_about_two_classes():
    counts = class_counts(LABELS, partition.shards(LABELS, num_clients=10, shards_per_client=2, seed=0), 10)
    assert int((counts > 0).sum(1).max()) <= 4 and counts.sum(1).tolist() == [100] * 10


def test_an_absent_class_is_no_obstacle():
    labels = LABELS[LABELS != 4]
    check(partition.dirichlet(labels, num_clients=5, alpha=0.5, seed=0), labels, 5, 1)


def test_as_many_clients_as_images_is_the_limit():
    for kind in ("iid", "dirichlet", "quantity skew"):
        check(KINDS[kind](LABELS[:12], num_clients=12, seed=0), LABELS[:12], 12, 1)


@each_kind
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 1001}, "need 1001 images: there are 1000"),
        ({"num_clients": 10, "min_examples": 101}, "need 1010 images"),
        ({"num_clients": 0}, "num_clients=0"),
        ({"num_clients": 3, "min_examples": 0}, "min_examples=0"),
    ],
)
def test_impossible_demands_are_refused(kind, options, message):
    with pytest.raises(InputError, match=message):
        KINDS[kind](LABELS, seed=0, **options)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_a_concentration_must_be_positive(alpha):
    for draw in (partition.dirichlet, partition.quantity_skew):
        with pytest.raises(InputError, match="greater than 0"):
            draw(LABELS, num_clients=3, alpha=alpha, seed=0)


def test_too_many_shards_are_refused():
    for number in (0, 101):
        with pytest.raises(InputError, match=f"shards_per_client={number}"):
            partition.shards(LABELS, num_clients=10, shards_per_client=number, seed=0)


def test_the_summary_has_one_aligned_line_per_client():
    parts = partition.dirichlet(LABELS, num_clients=11, alpha=0.1, seed=0)
    counts = class_counts(LABELS, parts, 10)
    assert counts.sum(0).tolist() == [100] * 10
    lines = summary(counts)
    assert len(lines) == 11 and len({len(line) for line in lines}) == 1
    assert lines[10].startswith(f"client 10  {len(parts[10]):>3} images")
    numbers = [0 if word == "." else int(word) for word in lines[3].split("classes")[1].split()]
    assert numbers == counts[3].tolist()
