import os

import pytest
import torch

from gidef.data import load_dataset, split_roles
from gidef.data.splits import class_shares
from gidef.errors import InputError

REAL = os.environ.get("GIDEF_DATA")  # read before the fixture empties the environment


def test_roles_are_disjoint_complete_and_stratified(make_dataset):
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 8 + [3] * 2)
    dataset = make_dataset((100, 10, 10), labels=labels)
    roles = split_roles(dataset, num_victims=10, num_tuning=7, seed=0)
    everything = torch.cat([roles.victims, roles.tuning, roles.judge])
    assert torch.equal(everything.sort().values, torch.arange(100))
    assert (len(roles.victims), len(roles.tuning), len(roles.judge)) == (10, 7, 83)
    assert torch.bincount(labels[roles.victims], minlength=4).tolist() == [6, 2, 1, 1]  # proportions 6, 3, .8, .2, and one each
    assert torch.bincount(labels[roles.judge], minlength=4).min() >= 1
    assert all(torch.equal(part, part.sort().values) for part in (roles.victims, roles.tuning, roles.judge))


def test_roles_depend_on_the_seed_and_victims_not_on_the_tuning(make_dataset):
    dataset = make_dataset((200, 10, 10))
    settings = [(8, 0), (8, 0), (8, 1), (0, 0)]
    first, again, other, less = (split_roles(dataset, num_victims=16, num_tuning=tuning, seed=seed) for tuning, seed in settings)
    assert torch.equal(first.victims, again.victims) and torch.equal(first.tuning, again.tuning)
    assert not torch.equal(first.victims, other.victims)
    assert torch.equal(first.victims, less.victims) and len(less.tuning) == 0


def test_fewer_victims_are_some_of_the_same(make_dataset):
    dataset = make_dataset((200, 10, 10))
    many, few = (set(split_roles(dataset, num_victims=count, num_tuning=0, seed=0).victims.tolist()) for count in (32, 8))
    assert few < many


@pytest.mark.parametrize(("victims", "tuning"), [(37, 0), (20, 17), (10**9, 1)])
def test_more_victims_than_images_is_an_error(make_dataset, victims, tuning):
    dataset = make_dataset((40, 10, 10))
    split_roles(dataset, num_victims=36, num_tuning=0, seed=0)  # all but one of each class
    with pytest.raises(InputError, match=f"num_victims={victims} .* exceed the 36 training images"):
        split_roles(dataset, num_victims=victims, num_tuning=tuning, seed=0)


@pytest.mark.parametrize(("victims", "tuning"), [(0, 4), (-1, 4), (4, -1)])
def test_numbers_below_their_least_are_refused(make_dataset, victims, tuning):
    with pytest.raises(InputError, match="at least 1 victim"):
        split_roles(make_dataset(), num_victims=victims, num_tuning=tuning, seed=0)


@pytest.mark.parametrize("total", [0, 1, 3, 4, 5, 17, 50, 96])
def test_shares_add_up_and_follow_the_proportions(total):
    counts = torch.tensor([50, 30, 15, 5, 0])
    shares = class_shares(counts, total)
    assert sum(shares) == total and shares[4] == 0
    assert all(share <= max(0, count - 1) for share, count in zip(shares, counts.tolist(), strict=True))
    assert all(abs(share - total * count / 100) < 1.6 for share, count in zip(shares, counts.tolist(), strict=True)) or total > 90
    if total >= 4:
        assert all(shares[:4])


def test_roles_on_blood_cells(monkeypatch):
    """On real images where GIDEF_DATA is set, on synthetic ones elsewhere."""
    if REAL:
        monkeypatch.setenv("GIDEF_DATA", REAL)
    dataset = load_dataset("bloodmnist", size=None if REAL else 8, download=False, notice=lambda text: None)
    roles = split_roles(dataset, num_victims=64, num_tuning=32, seed=0)
    assert torch.bincount(dataset.train.labels[roles.victims], minlength=8).min() >= 4
    assert not set(roles.victims.tolist()) & set(roles.tuning.tolist() + roles.judge.tolist())
