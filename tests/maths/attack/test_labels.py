import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

from gidef.attack import classifier_names, merge_rounds, recover_labels
from gidef.attack.labels import (
    METHODS,
    LocalSteps,
    _last_layer,
    _without_masked_bias,
    attacker_labels,
    labels_from_counts,
    recover_features,
    recover_soft_labels,
)
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


# --- an actual net in float64 ----------------------------------------------------------------------------------------

CLASSES = 8
BATCHES = ([1, 1], [0, 0, 0, 7], [6, 2, 4, 0, 1, 3, 7], [5, 5, 5, 5, 5, 5, 5], [2] * 12, [3, 3, 1, 5, 5, 5, 0, 3, 3, 7, 7, 0, 1, 1, 1, 1, 6, 6, 4, 2])
SMALL = BATCHES[:4]
"""Duplicates, fewer and more images than classes."""


class Classifier(nn.Module):
    """Convolution, pooling to 3 × 3, linear layer of 36 features."""

    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(36, CLASSES, bias=bias)

    def forward(self, images):
        return self.head(self.body(images))


class Case:
    """A client with images and labels, and what it computes; confidence scales the head, as training does."""

    def __init__(self, labels, *, seed=0, confidence=1.0, bias=True, identical=False, soft=None):
        draw = torch.Generator().manual_seed(seed)
        self.model, self.size = Classifier(bias).double(), len(labels)
        self.params = {name: 0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64) for name, p in self.model.named_parameters()}
        self.params["head.weight"] *= confidence
        self.images = torch.rand(1 if identical else self.size, 3, 12, 12, generator=draw, dtype=torch.float64).expand(self.size, -1, -1, -1)
        self.labels = F.one_hot(torch.as_tensor(labels), CLASSES).double() if soft is None else soft
        self.hard = sorted(labels)

    def gradient(self, params=None, rows=slice(None)):
        loss = lambda p: F.cross_entropy(functional_call(self.model, p, (self.images[rows],)), self.labels[rows])  # noqa: E731
        return grad(loss)(self.params if params is None else params)

    def trained(self, lr, batch, epochs=1, momentum=0.0):
        """The delta of torch.optim.SGD, by hand."""
        params, slots, steps = dict(self.params), {}, 0
        for _ in range(epochs):
            for first in range(0, self.size, batch):
                found = self.gradient(params, slice(first, first + batch))
                slots = {name: momentum * slots.get(name, 0.0) + g for name, g in found.items()}
                params = {name: p - lr * slots[name] for name, p in params.items()}
                steps += 1
        delta = {name: p - self.params[name] for name, p in params.items()}
        return Observation(self.params, delta, self.size, kind="delta"), LocalSteps(lr=lr, steps=steps, momentum=momentum)

    def observed(self, **change):
        return Observation(self.params, {**self.gradient(), **change}, self.size)

    def features(self):
        return functional_call(self.model.body, {n.removeprefix("body."): p for n, p in self.params.items() if "body" in n}, (self.images,))

    def residuals(self):
        """p − y of each image."""
        return functional_call(self.model, self.params, (self.images,)).softmax(1) - self.labels


def test_the_last_layer_s_gradient_is_the_mean_of_residuals_times_features():
    """What all rules rest on."""
    case = Case(BATCHES[5])
    update, apart = case.gradient(), case.residuals()
    torch.testing.assert_close(update["head.weight"], apart.T @ case.features() / case.size)
    torch.testing.assert_close(update["head.bias"], apart.mean(0))


@pytest.mark.parametrize("method", ["auto", "idlg", "bias", "llg", "ilrg", "fit"])
@pytest.mark.parametrize("confidence", [1.0, 6.0])
def test_every_method_recovers_the_label_of_one_image(method, confidence):
    for label in range(CLASSES):
        case = Case([label], seed=label, confidence=confidence)
        assert recover_labels(case.observed(), CLASSES, method=method).tolist() == [label]


@pytest.mark.parametrize("labels", BATCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_counts_of_equal_images_are_exact_even_if_their_labels_differ(labels, bias):
    """Equal images leave one feature vector, so the class model of ilrg is no approximation."""
    case = Case(labels, identical=True, bias=bias)
    assert recover_labels(case.observed(), CLASSES, method="ilrg").tolist() == case.hard


@pytest.mark.parametrize("labels", BATCHES)
def test_the_bias_rule_is_exact_with_the_mean_prediction_and_rounds_without(labels):
    case = Case(labels, confidence=4.0)
    mean = functional_call(case.model, case.params, (case.images,)).softmax(1).mean(0)
    assert recover_labels(case.observed(), CLASSES, mean_probabilities=mean).tolist() == case.hard
    score = case.gradient()["head.bias"]
    wanted, counts = len(labels) * (1 / CLASSES - score), [0] * CLASSES
    for _ in labels:
        counts[max(range(CLASSES), key=lambda c: float(wanted[c]) - counts[c])] += 1
    assert torch.bincount(recover_labels(case.observed(), CLASSES, method="bias"), minlength=CLASSES).tolist() == counts


@pytest.mark.parametrize("labels", BATCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_counts_of_different_images_are_exact_from_the_update_and_the_head_alone(labels, bias):
    case = Case(labels, confidence=0.5, bias=bias)
    assert recover_labels(case.observed(), CLASSES).tolist() == case.hard
    assert recover_labels(case.observed(), CLASSES, method="ilrg").tolist() == case.hard


def without_bias(num_classes, size, seed, normed=False):
    """(observation, counts) of a batch for an untrained net of ReLU and pooling, or with a LayerNorm, whose features have either sign."""
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*body, nn.LayerNorm(32) if normed else nn.Identity(), nn.Linear(32, num_classes, bias=False))
    images, labels = torch.rand(size, 3, 16, 16) * torch.rand(size, 3, 1, 1), torch.randint(num_classes, (size,))
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    update = grad(lambda p: F.cross_entropy(functional_call(model, p, (images,)), labels))(params)
    return Observation(params, update, size), torch.bincount(labels, minlength=num_classes)


def share_right(num_classes, size, normed=False):
    """(of the labels of 30 batches that are recovered from a head without a bias, of those in a balanced guess)."""
    found, guess = 0, 0
    for seed in range(30):
        observation, truth = without_bias(num_classes, size, seed, normed)
        found += int(torch.minimum(torch.bincount(recover_labels(observation, num_classes), minlength=num_classes), truth).sum())
        guess += int(torch.minimum(torch.tensor([size // num_classes + (c < size % num_classes) for c in range(num_classes)]), truth).sum())
    return found / (30 * size), guess / (30 * size)


@pytest.mark.parametrize(("num_classes", "more"), [(2, 0.02), (3, -0.02)])
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_few_classes_without_a_bias_are_told_at_least_as_well_as_by_a_balanced_guess(num_classes, size, more):
    """Positive features; three classes with a tolerance of .02. The sign that is nearest to whole numbers has for two classes .38, .72, .68 and .67."""
    found, guess = share_right(num_classes, size)
    assert found > guess + more, (found, guess)


@pytest.mark.parametrize(("normed", "least"), [(False, 0.99), (True, 0.97)])
def test_more_classes_without_a_bias_are_told_from_features_of_one_sign_or_of_both(normed, least):
    for size in (4, 8):
        assert share_right(8, size, normed)[0] >= least


def test_class_counts_follow_the_linear_system_of_their_paper():
    """h_c = row / score, P = softmax(W h + b), n from B g = Pᵀ n − n and Σ n = B; shrinkage matters where images differ."""
    case = Case(BATCHES[5], confidence=0.5, identical=True)
    update = case.gradient()
    probabilities = (update["head.weight"] / update["head.bias"][:, None] @ case.params["head.weight"].T + case.params["head.bias"]).softmax(1)
    system = torch.cat([probabilities.T - torch.eye(CLASSES), torch.ones(1, CLASSES)])
    wanted = torch.linalg.lstsq(system, torch.cat([case.size * update["head.bias"], torch.tensor([float(case.size)])])[:, None]).solution[:, 0]
    found = case.size * recover_soft_labels(case.observed(), CLASSES)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(wanted.round().long(), torch.bincount(torch.tensor(case.hard), minlength=CLASSES))


@pytest.mark.parametrize("labels", SMALL)
def test_the_fit_finds_the_labels_that_a_confident_net_s_update_has(labels):
    for seed in range(3):
        case = Case(labels, confidence=3.0, seed=seed)
        assert recover_labels(case.observed(), CLASSES, method="fit").tolist() == case.hard
        assert recover_labels(case.observed(), CLASSES).tolist() == case.hard


def test_the_fit_finds_most_labels_without_a_bias_too():
    cases = [Case(labels, confidence=1.0, seed=seed, bias=False) for labels in SMALL for seed in range(3)]
    assert sum(recover_labels(case.observed(), CLASSES, method="fit").tolist() == case.hard for case in cases) >= 11


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("confidence", [0.5, 3.0])
def test_the_features_of_images_with_different_labels_are_exact(confidence, bias):
    case = Case([6, 2, 4, 0], confidence=confidence, bias=bias)
    torch.testing.assert_close(recover_features(case.observed(), CLASSES, torch.tensor([6, 2, 4, 0])), case.features(), rtol=0, atol=1e-4)


def test_the_fit_beats_the_other_methods_on_confident_nets():
    right = dict.fromkeys(("fit", "ilrg", "bias", "llg"), 0)
    for seed in range(12):
        labels = torch.randint(CLASSES, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        case = Case(labels, seed=seed, confidence=5.0)
        for method in right:
            right[method] += recover_labels(case.observed(), CLASSES, method=method).tolist() == case.hard
    assert right["fit"] >= 11 and right["fit"] > max(right[method] for method in ("ilrg", "bias", "llg"))


def test_different_labels_have_the_rows_with_the_lowest_minimum():
    for seed in range(5):
        case = Case([6, 2, 4, 0], seed=seed, confidence=0.02)
        case.params |= {name: p.abs() for name, p in case.params.items() if "body" in name}  # features of one sign
        rows = case.gradient()["head.weight"]
        expected = sorted(sorted(range(CLASSES), key=lambda c: float(rows[c].min()))[:4])
        assert recover_labels(case.observed(), CLASSES, method="yin").tolist() == expected == case.hard


@pytest.mark.parametrize("method", ["ilrg", "bias", "fit"])
def test_declared_label_smoothing_is_taken_off(method):
    labels = [5, 5, 1, 0, 5]
    soft = 0.7 * F.one_hot(torch.tensor(labels), CLASSES).double() + 0.3 / CLASSES
    case = Case(labels, soft=soft, confidence=0.5)
    mean = (case.residuals() + soft).mean(0)
    assert recover_labels(case.observed(), CLASSES, method=method, smoothing=0.3, mean_probabilities=mean).tolist() == case.hard


# --- a scale that is not known, rounds, masks ------------------------------------------------------------------------


def scaled_by(factor, observation):
    """The update of an observation that was made shorter or longer, which it says."""
    return dataclasses.replace(observation, update={name: factor * tensor for name, tensor in observation.update.items()}, scaled=False)


@pytest.mark.parametrize("labels", BATCHES)
def test_an_update_of_unknown_length_tells_the_labels_that_the_gradient_tells(labels):
    case = Case(labels, confidence=0.5)
    for factor in (0.01, 0.3, 1.0, 20.0):
        assert recover_labels(scaled_by(factor, case.observed()), CLASSES).tolist() == case.hard
    observation, local = case.trained(0.05, case.size)
    assert recover_labels(scaled_by(0.01, observation), CLASSES, local=local).tolist() == case.hard
    believed = dataclasses.replace(scaled_by(0.01, case.observed()), scaled=True)
    assert case.size > 11 or recover_labels(believed, CLASSES).tolist() != case.hard


def test_the_fit_finds_the_length_of_a_confident_net_s_update_along_with_its_labels_and_features():
    for seed in range(3):
        case = Case([6, 2, 4, 0], confidence=3.0, seed=seed)
        seen = scaled_by(0.03, case.observed())
        assert recover_labels(seen, CLASSES).tolist() == case.hard
        torch.testing.assert_close(recover_features(seen, CLASSES, torch.tensor([6, 2, 4, 0])), case.features(), rtol=0, atol=1e-4)


def test_images_clipped_one_by_one_are_counted_where_no_multiple_of_a_gradient_explains_them():
    for seed in range(4):
        case = Case([6, 2, 4, 2], seed=seed, confidence=0.5)
        each = [case.gradient(rows=slice(i, i + 1)) for i in range(case.size)]
        factors = [0.1 / torch.cat([t.flatten() for t in one.values()]).norm() for one in each]
        update = {name: sum(f * one[name] for f, one in zip(factors, each, strict=True)) / case.size for name in each[0]}
        assert recover_labels(Observation(case.params, update, case.size, scaled=False), CLASSES).tolist() == case.hard


@pytest.mark.parametrize("factor", [0.02, 1.0, 7.0])
def test_a_soft_label_without_a_class_is_exact_whatever_the_update_s_length(factor):
    soft = (0.3 * F.one_hot(torch.tensor([2]), CLASSES) + 0.7 * F.one_hot(torch.tensor([5]), CLASSES)).double()
    case = Case([0], soft=soft, confidence=4.0)
    torch.testing.assert_close(recover_soft_labels(scaled_by(factor, case.observed()), CLASSES), soft, rtol=0, atol=1e-9)
    several = Case([0] * 6, soft=soft.expand(6, -1), confidence=0.5)
    torch.testing.assert_close(recover_soft_labels(scaled_by(factor, several.observed()), CLASSES)[0], soft[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("labels", [[3], [6, 2, 4, 2]])
def test_rounds_tell_by_their_mean_what_none_of_them_tells(labels):
    case, right = Case(labels, confidence=0.5), []
    level = 2.0 * case.gradient()["head.bias"].square().mean().sqrt()
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        rounds = [case.observed(**{n: t + level * torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in case.gradient().items()}) for _ in range(16)]
        mean = {name: sum(one.update[name] for one in rounds) / 16 for name in rounds[0].update}
        found = recover_labels(merge_rounds(rounds), CLASSES).tolist()
        assert found == recover_labels(case.observed(**mean), CLASSES).tolist()
        right.append((found == case.hard, recover_labels(rounds[-1], CLASSES).tolist() == case.hard))
    together, alone = (sum(column) for column in zip(*right, strict=True))
    assert together > alone, right


def test_rounds_with_weights_of_their_own_are_read_under_the_mean_of_their_predictions():
    cases = [Case(BATCHES[5], confidence=0.5) for _ in range(3)]
    for number, case in enumerate(cases):
        case.params["head.bias"] = case.params["head.bias"] + 2.0 * F.one_hot(torch.tensor(number), CLASSES)  # each expects another class
    merged = merge_rounds([case.observed() for case in cases])
    assert recover_labels(merged, CLASSES).tolist() == cases[0].hard
    one = {name: tensor for name, tensor in merged.params.items() if name.startswith("2/")}
    as_if_alike = dataclasses.replace(merged, params={f"{number}/{name[2:]}": tensor for number in range(3) for name, tensor in one.items()})
    assert recover_labels(as_if_alike, CLASSES).tolist() != cases[0].hard


def test_rounds_of_local_steps_are_read_along_every_path():
    case = Case(BATCHES[5], confidence=0.5)
    delta, local = case.trained(0.05, case.size)
    other = Case(BATCHES[5], confidence=0.5)
    other.params["head.bias"] = other.params["head.bias"] + 0.5
    merged = merge_rounds([delta, other.trained(0.05, case.size)[0]])
    assert recover_labels(merged, CLASSES, local=local).tolist() == case.hard
    torch.testing.assert_close(recover_soft_labels(merge_rounds([delta, delta]), CLASSES, local=local), recover_soft_labels(delta, CLASSES, local=local))


@pytest.mark.parametrize("labels", BATCHES[:2] + BATCHES[4:5])
def test_a_bias_with_entries_that_pruning_took_is_left_out(labels):
    case = Case(labels, confidence=0.5)
    scores = case.gradient()["head.bias"]
    pruned = torch.where(scores.abs() >= scores.abs().topk(4).values[-1], scores, 0.0)
    assert recover_labels(case.observed(**{"head.bias": pruned}), CLASSES).tolist() == case.hard


def test_zeros_of_saturated_or_rounded_updates_leave_the_bias_in():
    case = Case([6, 2, 4, 2], confidence=0.5)
    rows = case.gradient()["head.weight"].clone()
    scores = case.gradient()["head.bias"].clone()
    rows[0], scores[0] = 0.0, 0.0  # as where no prediction is above the smallest number
    level = rows.abs().max() / 3
    for update in ({"head.weight": rows, "head.bias": scores}, {"head.weight": (rows / level).round() * level, "head.bias": scores}):
        layer = _last_layer(case.observed(**update), CLASSES, None, None, None)
        assert _without_masked_bias(layer) is layer
    masked = _last_layer(case.observed(**{"head.bias": scores}), CLASSES, None, None, None)
    assert _without_masked_bias(masked).scores is None


# --- deltas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", BATCHES)
def test_one_declared_step_tells_what_its_gradient_tells(labels):
    case = Case(labels, confidence=0.5)
    observation, local = case.trained(0.05, case.size)
    assert recover_labels(observation, CLASSES, local=local).tolist() == recover_labels(case.observed(), CLASSES).tolist() == case.hard
    torch.testing.assert_close(recover_soft_labels(observation, CLASSES, local=local), recover_soft_labels(case.observed(), CLASSES))
    undeclared = torch.bincount(recover_labels(observation, CLASSES), minlength=CLASSES)  # whole labels tell the step's size
    assert (undeclared - torch.bincount(torch.tensor(labels), minlength=CLASSES)).clamp_min(0).sum() <= len(labels) // 6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_path_of_equal_gradients_ends_where_sgd_ends(momentum):
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd, visited = torch.optim.SGD([weight], lr=0.1, momentum=momentum), []
    for _ in range(6):
        visited.append(float(weight.detach()))
        weight.grad = torch.ones_like(weight)
        sgd.step()
    shares, counts = LocalSteps(lr=0.1, steps=6, momentum=momentum).path()
    torch.testing.assert_close(-counts.sum(), weight.detach()[0])
    torch.testing.assert_close(shares * weight.detach(), torch.tensor(visited, dtype=torch.float64))


def test_counts_of_local_training_are_better_with_the_drift_of_the_predictions_than_with_the_first_model_s():
    """Ten epochs of one batch, after which the model knows the labels: where its predictions end is half of what the delta says."""
    right = {"drift": 0, "first": 0, "undeclared": 0, "llg": 0}
    for seed in range(10):
        labels = torch.randint(CLASSES, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        case = Case(labels, seed=seed, confidence=0.3)
        observation, local = case.trained(0.1, 12, epochs=10)
        frozen = dataclasses.replace(observation, update={name: t / 10 for name, t in observation.update.items()})
        found = {
            "drift": recover_labels(observation, CLASSES, local=local),
            "first": recover_labels(frozen, CLASSES, local=LocalSteps(lr=0.1)),
            "undeclared": recover_labels(observation, CLASSES),
            "llg": recover_labels(observation, CLASSES, method="llg"),
        }
        truth = torch.bincount(torch.tensor(labels), minlength=CLASSES)
        for name, one in found.items():
            assert one.shape == (12,)
            right[name] += int(torch.minimum(torch.bincount(one, minlength=CLASSES), truth).sum())
    assert right["drift"] > 0.9 * 120 and right["drift"] > right["first"] + 6 and right["undeclared"] > right["llg"] + 6


def test_the_bias_rule_takes_the_mean_predictions_of_the_first_and_the_last_model():
    case = Case(BATCHES[5], confidence=0.5)
    observation, local = case.trained(0.05, 5, epochs=2, momentum=0.5)
    last = {name: p + observation.update[name] for name, p in case.params.items()}
    means = torch.stack([functional_call(case.model, params, (case.images,)).softmax(1).mean(0) for params in (case.params, last)])
    shares, counts = local.path()
    late = float((shares * counts).sum() / counts.sum())
    score = -observation.update["head.bias"] / counts.sum()
    wanted = case.size * ((1 - late) * means[0] + late * means[1] - score)
    found = torch.bincount(recover_labels(observation, CLASSES, method="bias", local=local, mean_probabilities=means), minlength=CLASSES)
    assert (found - wanted).abs().max() < 1
    assert torch.minimum(found, torch.bincount(torch.tensor(case.hard), minlength=CLASSES)).sum() >= 18


# --- soft labels, features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 6.0])
def test_the_soft_label_of_one_image_is_exact(confidence):
    draw = torch.Generator().manual_seed(1)
    mixed = 0.3 * F.one_hot(torch.tensor([2]), CLASSES) + 0.7 * F.one_hot(torch.tensor([5]), CLASSES)
    for soft in (
        mixed.double(),
        torch.rand(1, CLASSES, generator=draw, dtype=torch.float64).softmax(1),
        0.1 / CLASSES + 0.9 * F.one_hot(torch.tensor([3]), CLASSES).double(),
    ):
        case = Case([0], soft=soft, confidence=confidence)
        torch.testing.assert_close(recover_soft_labels(case.observed(), CLASSES), soft, rtol=0, atol=1e-9)
        torch.testing.assert_close(recover_features(case.observed(), CLASSES, torch.tensor([0])), case.features())


def test_soft_labels_of_a_batch_are_its_class_proportions():
    draw = torch.Generator().manual_seed(2)
    soft = torch.randn(12, CLASSES, generator=draw, dtype=torch.float64).mul(3).softmax(1)
    for identical, tolerance in ((True, 1e-3), (False, 0.02)):
        case = Case([0] * 12, soft=soft, identical=identical, confidence=0.5)
        found = recover_soft_labels(case.observed(), CLASSES)
        assert found.shape == (12, CLASSES) and (found == found[0]).all()
        torch.testing.assert_close(found[0], soft.mean(0), rtol=0, atol=tolerance)


def test_features_of_a_class_are_shared_where_images_are_more_than_classes():
    case = Case(BATCHES[5], confidence=0.3)
    order = torch.tensor(BATCHES[5])
    found, truth = recover_features(case.observed(), CLASSES, order), case.features()
    assert found.shape == truth.shape and torch.equal(found[order == 3], found[order == 3][:1].expand_as(found[order == 3]))
    assert F.cosine_similarity(found, truth).min() > 0.8
    alike = Case(BATCHES[5], confidence=0.3, identical=True)
    torch.testing.assert_close(recover_features(alike.observed(), CLASSES, order), alike.features())


# --- what is declared, and what is broken ----------------------------------------------------------------------------


def test_counts_become_sorted_labels_and_nothing_else_does():
    assert labels_from_counts(torch.tensor([2, 0, 3])).tolist() == [0, 0, 2, 2, 2]
    assert labels_from_counts(torch.tensor([0.0, 1.0])).tolist() == [1]
    for wrong in ([[1, 2]], [-1, 2], [0, 0], [0.5, 0.5], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="label counts"):
            labels_from_counts(torch.tensor(wrong))


def test_an_attacker_uses_what_is_declared_and_no_more():
    case = Case([5, 1, 5, 0], confidence=0.5)
    granted = dataclasses.replace(case.observed(), labels=torch.tensor([5, 1, 5, 0]))
    assert attacker_labels(granted, CLASSES, "labels").tolist() == [5, 1, 5, 0]
    assert attacker_labels(granted, CLASSES, "counts").tolist() == [0, 1, 5, 5]
    counted = dataclasses.replace(granted, labels=None, known={"label_counts": torch.tensor([0, 0, 4, 0, 0, 0, 0, 0])})
    assert attacker_labels(counted, CLASSES, "counts").tolist() == [2, 2, 2, 2]
    wrong = dataclasses.replace(granted, labels=torch.tensor([7, 7, 7, 7]))
    assert attacker_labels(wrong, CLASSES).tolist() == [0, 1, 5, 5]
    for knowledge in ("labels", "counts"):
        with pytest.raises(InputError, match=f"grants no {knowledge}"):
            attacker_labels(case.observed(), CLASSES, knowledge)
    with pytest.raises(InputError, match="do not fit 4 images"):
        attacker_labels(dataclasses.replace(granted, labels=torch.tensor([8, 0, 0, 0])), CLASSES, "labels")
    with pytest.raises(InputError, match="knowledge='all'"):
        attacker_labels(granted, CLASSES, "all")


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_or_broken_update_is_refused_by_every_method(method):
    case = Case([3])
    for value, reason in ((0.0, "is zero"), (torch.nan, "not finite"), (torch.inf, "not finite")):
        broken = {name: torch.full_like(t, value) for name, t in case.gradient().items()}
        for recover in (
            lambda o: recover_labels(o, CLASSES, method=method),
            lambda o: recover_soft_labels(o, CLASSES),
            lambda o: recover_features(o, CLASSES),
        ):
            with pytest.raises(InputError, match=reason):
                recover(case.observed(**broken))


def test_a_bias_that_a_defence_set_to_zero_is_passed_over():
    case = Case([6, 2, 4], confidence=0.5)
    assert recover_labels(case.observed(**{"head.bias": torch.zeros(CLASSES, dtype=torch.float64)}), CLASSES).tolist() == [2, 4, 6]


def test_the_order_of_images_and_the_inputs_themselves_stay_untouched():
    case = Case([6, 2, 4, 2], confidence=4.0)
    observation = case.observed()
    before = {name: t.clone() for name, t in (observation.update | observation.params).items()}
    assert recover_labels(observation, CLASSES).tolist() == recover_labels(observation, CLASSES).tolist()
    recover_soft_labels(observation, CLASSES)
    recover_features(observation, CLASSES)
    assert all(torch.equal(t, before[name]) for name, t in (observation.update | observation.params).items())


def test_methods_that_do_not_apply_say_which_do():
    case = Case(BATCHES[5])
    delta, local = case.trained(0.1, 10)
    hidden = dataclasses.replace(case.observed(), params={})
    for observation, settings, reason in (
        (case.observed(), {"method": "guess"}, "method='guess'"),
        (case.observed(), {"method": "idlg"}, "20 images"),
        (case.observed(), {"method": "yin"}, "20 images of 8 classes"),
        (case.observed(), {"method": "fit"}, "fewer images"),
        (hidden, {"method": "ilrg"}, "in params"),
        (delta, {"method": "bias"}, "local steps declared"),
        (delta, {"method": "fit"}, "one declared step"),
        (dataclasses.replace(delta, update={"head.weight": delta.update["head.weight"]}), {"method": "ilrg"}, "its bias or declared"),
        (case.observed(), {"local": local}, "kind delta"),
        (case.observed(), {"smoothing": 1.0}, "smoothing"),
        (case.observed(), {"mean_probabilities": torch.ones(3)}, "mean_probabilities"),
    ):
        with pytest.raises(InputError, match=reason):
            recover_labels(observation, CLASSES, **settings)
    for observation in (hidden, delta, Case([0], bias=False).observed()):
        with pytest.raises(InputError, match="soft labels need"):
            recover_soft_labels(observation, CLASSES)
    with pytest.raises(InputError, match="features cannot be recovered"):
        recover_features(Case(BATCHES[5], bias=False).observed(), CLASSES, torch.tensor(BATCHES[5]))
    with pytest.raises(InputError, match="labels"):
        recover_features(case.observed(), CLASSES, torch.tensor([0]))
    for wrong in ({"lr": 0.0}, {"lr": 0.1, "steps": 0}, {"lr": 0.1, "momentum": 1.0}):
        with pytest.raises(InputError, match="momentum"):
            LocalSteps(**wrong)
    assert recover_labels(hidden, CLASSES).shape == recover_labels(delta, CLASSES).shape == (20,)
