import pytest
import torch
import torch.nn.functional as F

from gidef.attack import classifier_names, recover_labels
from gidef.errors import InputError
from gidef.types import Observation


def head_update(labels, num_classes, *, bias=True, seed=0, spread=0.3, lr=None):
    """Update of a linear layer on positive features, with logits as spread as an untrained model's."""
    draw = torch.Generator().manual_seed(seed)
    size = len(labels)
    features = torch.rand(size, 16, generator=draw) + 0.5
    probabilities = (spread * (torch.randn(num_classes, generator=draw) + 0.1 * torch.randn(size, num_classes, generator=draw))).softmax(1)
    residual = (probabilities - F.one_hot(labels, num_classes)) / size
    update = {"body.weight": torch.randn(num_classes, 3, 3, generator=draw), "head.weight": residual.T @ features}
    if bias:
        update["head.bias"] = residual.sum(0)
    if lr is not None:
        update = {name: -lr * tensor for name, tensor in update.items()}
    kind = "gradient" if lr is None else "delta"
    return Observation(update, update, size, kind=kind), probabilities.mean(0)


@pytest.mark.parametrize("lr", [None, 0.05])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_classes", [2, 8, 100])
def test_one_label_is_always_recovered(num_classes, bias, lr):
    for label in range(0, num_classes, max(1, num_classes // 8)):
        observation, _ = head_update(torch.tensor([label]), num_classes, bias=bias, seed=label, lr=lr)
        assert recover_labels(observation, num_classes).tolist() == [label]


def test_one_label_is_recovered_from_features_of_either_sign_without_a_bias():
    draw = torch.Generator().manual_seed(0)
    for label in range(8):
        residual = torch.randn(8, generator=draw).softmax(0) - F.one_hot(torch.tensor(label), 8)
        update = {"head.weight": torch.outer(residual, torch.randn(16, generator=draw) - 0.5)}
        assert recover_labels(Observation(update, update, 1), 8).tolist() == [label]


@pytest.mark.parametrize("labels", [[1, 1], [0, 0, 0, 7], [2, 2, 2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7], [3, 3, 1, 5, 5, 5, 0, 3, 3, 7, 7, 0]])
def test_counts_are_exact_with_a_bias_and_the_mean_prediction_duplicates_and_more_images_than_classes_included(labels):
    observation, mean = head_update(torch.tensor(labels), 8)
    assert recover_labels(observation, 8, mean_probabilities=mean).tolist() == sorted(labels)


@pytest.mark.parametrize(("bias", "lr", "least"), [(True, None, 0.85), (False, None, 0.75), (True, 0.1, 0.75), (False, 0.1, 0.75)])
def test_most_labels_of_random_batches_are_recovered_without_the_mean_prediction(bias, lr, least):
    right = []
    for seed in range(40):
        size = 2 + seed % 15
        labels = torch.randint(8, (size,), generator=torch.Generator().manual_seed(seed))
        observation, _ = head_update(labels, 8, bias=bias, seed=seed, lr=lr)
        found = recover_labels(observation, 8)
        assert found.shape == (size,) and found.dtype == torch.int64
        counts = [torch.bincount(one, minlength=8) for one in (found, labels)]
        right.append(float(torch.minimum(*counts).sum()) / size)
    assert sum(right) / 40 > least


def test_the_last_layer_is_found_by_its_rows_or_named():
    update = {"a.weight": torch.zeros(8, 4), "b.weight": torch.zeros(8, 5), "b.bias": torch.zeros(8), "norm.weight": torch.zeros(8)}
    assert classifier_names(update, 8) == ("b.weight", "b.bias")
    assert classifier_names({"weight": torch.zeros(8, 5)}, 8) == ("weight", None)
    observation, _ = head_update(torch.tensor([3]), 8)
    assert recover_labels(observation, 8, bias="head.bias").tolist() == [3]


def test_without_a_last_layer_or_with_a_wrong_or_broken_one_the_user_is_told():
    observation, _ = head_update(torch.tensor([3]), 8)
    with pytest.raises(InputError, match="9 rows"):
        recover_labels(observation, 9)
    with pytest.raises(InputError, match="'tail'"):
        recover_labels(observation, 8, weight="tail")
    broken = {"head.weight": torch.full((8, 2), torch.nan)}
    with pytest.raises(InputError, match="not finite"):
        recover_labels(Observation(broken, broken, 1), 8)
