"""Learned inversion: the sketch against plain arithmetic, and inverters of models whose gradients hold the image."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from gidef.attack.labels import LabelsHidden
from gidef.attack.learned import _set_loss, fit_inverter, image_loss, invert_learned, seen, seen_length
from gidef.data import synthetic_blood_cells
from gidef.errors import InputError
from gidef.models.inverter import inverter_for
from gidef.rng import stream_seed
from gidef.sketches import shares, sketch
from gidef.types import Observation

CLASSES, SHAPE = 8, (3, 12, 12)
PIXELS = math.prod(SHAPE)


def update(seed=0, **sizes):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=draw, dtype=torch.float64) for name, size in sizes.items()}


# --- the sketch ------------------------------------------------------------------------------------------------------


def test_a_small_update_is_kept_whole_in_name_order_at_unit_mean_square():
    given = update(b=(2, 3), a=4)
    whole = torch.cat([given["a"], given["b"].flatten()])
    torch.testing.assert_close(sketch(given, 10), whole / whole.square().mean().sqrt())
    padded = sketch(given, 14)
    torch.testing.assert_close(padded[:10], whole / whole.norm() * math.sqrt(14))
    assert padded[10:].tolist() == [0.0] * 4


def test_a_large_tensor_is_hashed_as_the_formula_says_beside_small_ones_kept_whole():
    given = update(big=(7, 11), bias=3)
    assert shares([77, 3], 20) == [17, 3]
    mask = 2**64 - 1
    summed = [0.0] * 17
    for place, value in enumerate(given["big"].flatten().tolist()):  # SplitMix64, one number at a time
        x = ((place + 1) * 0x9E3779B97F4A7C15 + stream_seed(5, "sketch", "big")) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        summed[place % 17] += value if (x >> 40) & 1 else -value
    norm = math.sqrt(sum(float(t.square().sum()) for t in given.values()))
    expected = torch.tensor([*given["bias"].tolist(), *summed], dtype=torch.float64) * math.sqrt(20) / norm
    torch.testing.assert_close(sketch(given, 20, 5), expected)


def test_shares_fill_the_sketch_and_give_small_tensors_all_they_have():
    sizes = [864, 32, 32, 18_432, 64, 73_728, 8, 4_096]
    found = shares(sizes, 4_096)
    assert all(share == size for share, size in zip(found, sizes, strict=True) if size <= 900)
    assert 4_096 - 12 <= sum(found) <= 4_096 and all(share % 2 and share % 3 for share, size in zip(found, sizes, strict=True) if share < size)
    assert shares([5, 5, 5], 3) == [1, 1, 1]


def test_stacked_updates_have_the_sketches_of_single_ones():
    stack = update(seed=1, a=(4, 50), b=(4, 3, 2))
    together = vmap(lambda one: sketch(one, 31, 2))(stack)
    for row in range(4):
        torch.testing.assert_close(together[row], sketch({name: t[row] for name, t in stack.items()}, 31, 2))


def test_sketches_keep_inner_products():
    """Unit vectors: a deviation of about 1/√d per pair, 0.018 with 3,000 buckets; five of them are allowed."""
    vectors = [update(seed=seed, kernel=60_000) for seed in range(3)]
    vectors.append({"kernel": 0.8 * vectors[0]["kernel"] + 0.6 * vectors[1]["kernel"]})
    for left, right in itertools.combinations(vectors, 2):
        true = float(F.cosine_similarity(left["kernel"], right["kernel"], dim=0))
        found = float(sketch(left, 3_000) @ sketch(right, 3_000)) / 3_000
        assert found == pytest.approx(true, abs=0.09)


def test_structure_that_repeats_at_the_strides_of_a_kernel_is_not_cancelled_or_piled_up():
    kernel = torch.zeros(64, 64, 3, 3)
    kernel[:, 5] = 1.0  # one input channel, in every filter
    norm = float(sketch({"kernel": kernel}, 1_000).square().sum()) / 1_000
    assert norm == pytest.approx(1, abs=0.3)


def test_the_sketch_depends_on_the_seed_and_not_on_scale_or_on_the_order_of_names():
    given = update(a=200, b=5)
    one = sketch(given, 40, 1)
    torch.testing.assert_close(one, sketch({"b": 1e-3 * given["b"], "a": 1e-3 * given["a"]}, 40, 1))
    assert not torch.equal(one, sketch(given, 40, 2)) and (sketch({"a": torch.zeros(50)}, 7) == 0).all()


def test_a_sketch_too_short_for_its_tensors_is_refused():
    with pytest.raises(InputError, match="at least one number per tensor"):
        sketch(update(a=3, b=3, c=3), 2)


def test_updates_up_to_the_limit_are_to_be_kept_whole():
    small, large = update(a=100, b=20), update(a=100, b=21)
    assert seen_length(small, 4, dim=50, whole=120) == 120 and seen_length(large, 4, dim=50, whole=120) == 50
    assert seen_length({**small, "head.weight": torch.zeros(4, 6)}, 4, 3, dim=50, whole=120) == 50 + 3 * 6


@pytest.mark.parametrize("bias", [True, False])
def test_the_classifier_s_rows_of_the_batch_s_labels_are_seen_in_the_order_of_the_labels(bias):
    """For one image the ratio is what the last layer reads."""
    features, logits = update(h=(1, 5))["h"], update(seed=1, z=(1, 4))["z"]
    apart = logits.softmax(1) - F.one_hot(torch.tensor([2]), 4)
    released = {"head.weight": apart.T @ features} | ({"head.bias": apart[0]} if bias else {})
    given = seen(released, torch.tensor([2]), 4, 30)
    torch.testing.assert_close(given[:30], sketch(released, 30))
    torch.testing.assert_close(given[30:], features[0] if bias else -features[0] / features[0].norm())
    several = seen(released, torch.tensor([3, 0]), 4, 30)[30:].view(2, 5)
    torch.testing.assert_close(several, features.expand(2, 5) if bias else features.expand(2, 5) / features.norm())
    stacked = vmap(lambda one, labels: seen(one, labels, 4, 30))({name: t[None] for name, t in released.items()}, torch.tensor([[2]]))
    torch.testing.assert_close(stacked[0], given)
    assert torch.equal(seen({"a": features}, torch.tensor([1]), 4, 6), sketch({"a": features}, 6))
    nothing = {name: torch.zeros_like(t) for name, t in released.items()}
    assert (seen(nothing, torch.tensor([2]), 4, 30) == 0).all()


# --- fitting ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    """Public images of one split, victims of another, both synthetic."""
    return synthetic_blood_cells(train=200, val=160, test=8, size=SHAPE[1], seed=3)


class Linear(nn.Module):
    """Known answer: ∂L/∂W = Σ (p − y) xᵀ."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, images, noise=None):
        return self.head(images.flatten(1) if noise is None else images.flatten(1) + noise)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [[nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.LeakyReLU()] for before, after in ((3, 12), (12, 24))]
        self.body = nn.Sequential(*blocks[0], *blocks[1])
        self.head = nn.Linear(24 * 9, CLASSES)

    def forward(self, images, noise=None):
        return self.head(self.body(images).flatten(1))


def case(make=Linear):
    torch.manual_seed(0)
    model = make().requires_grad_(False)

    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(functional_call(model, p, (images, noise)), labels))(params)

    return simulate, dict(model.named_parameters())


def observe(simulate, params, images, labels, noise=None):
    gradient = simulate(params, {}, images.float() / 255, F.one_hot(labels, CLASSES).float(), noise)
    return Observation(params, gradient, len(labels), labels=labels)


def fitted(cells, make=Linear, *, batch_size=1, **settings):
    simulate, params = case(make)
    inverter = inverter_for(seen_length(params, CLASSES, batch_size), CLASSES, SHAPE, batch_size=batch_size, width_factor=0.25)
    settings = {"steps": 40, "seed": 0, "samples": 300, **settings}
    steps = list(fit_inverter(inverter, simulate, params, {}, settings.pop("images", cells.val.images), cells.val.labels, **settings))
    assert steps == sorted(steps) and steps[-1] == settings["steps"]
    return inverter, simulate, params


def psnr_db(found, truth):
    return float(-10 * (found - truth).square().flatten(1).mean(1).log10().mean())


@pytest.mark.parametrize(("make", "margin_db"), [(Linear, 8.0), (Conv, 2.5)])
def test_held_out_images_come_back_better_than_the_mean_image_by_several_db(cells, make, margin_db):
    inverter, simulate, params = fitted(cells, make)
    images, labels = cells.train.images[:40], cells.train.labels[:40]
    found = invert_learned([observe(simulate, params, images[i : i + 1], labels[i : i + 1]) for i in range(40)], inverter)
    truth, mean = images.float() / 255, cells.val.images.float().mean(0) / 255
    guess = psnr_db(mean.expand_as(truth), truth)
    reached = psnr_db(torch.cat([one.images for one in found]), truth)
    assert reached > guess + margin_db, (reached, guess)
    assert all(one.status == "ok" and one.labels.tolist() == [int(label)] for one, label in zip(found, labels, strict=True))


def test_the_images_of_a_batch_come_back_with_their_labels(cells):
    inverter, simulate, params = fitted(cells, batch_size=2, samples=500, steps=60)
    draw, truth, observations = torch.Generator().manual_seed(0), [], []
    for _ in range(30):
        rows = torch.randperm(200, generator=draw)[:2]
        observations.append(observe(simulate, params, cells.train.images[rows], cells.train.labels[rows]))
        truth.append(cells.train.images[rows].float() / 255)
    found, truth = torch.stack([one.images for one in invert_learned(observations, inverter)]), torch.stack(truth)
    different = torch.tensor([int(o.labels[0]) != int(o.labels[1]) for o in observations])
    guess = psnr_db((cells.val.images.float().mean(0) / 255).expand_as(truth).flatten(0, 1), truth.flatten(0, 1))
    right, swapped = (psnr_db(one[different].flatten(0, 1), truth[different].flatten(0, 1)) for one in (found, found.flip(1)))
    assert right > guess + 2 and right > swapped + 1, (right, swapped, guess)


def test_training_never_ends_worse_on_held_out_images_than_the_linear_solution(cells):
    wild, _, _ = fitted(cells, lr=10.0, steps=25)
    linear, _, _ = fitted(cells, steps=0)
    assert wild.heldout_loss <= linear.heldout_loss and linear.heldout_loss.isfinite()


def test_training_finds_what_no_linear_map_tells():
    """Grey images, of whose brightness cosine and sine are released: their angle is not linear in them."""
    grey = torch.rand(160, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, *SHAPE)

    def turned(params, known, images, labels, noise):
        angle = 5 * images.mean()
        return {"w": torch.stack([angle.cos(), angle.sin()])}

    losses = []
    for steps in (100, 0):
        inverter = inverter_for(2, CLASSES, SHAPE, width_factor=0.25)
        given = inverter, turned, {"w": torch.zeros(2)}, {}, grey, torch.arange(160) % CLASSES
        list(fit_inverter(*given, steps=steps, seed=0, samples=300, lr=3e-3, ssim_weight=0.0))
        losses.append(float(inverter.heldout_loss))
    assert losses[0] < 0.5 * losses[1], losses


def test_the_fit_depends_on_neither_chunks_nor_vectorisation_nor_the_type_of_the_images(cells):
    noise = {"draw_noise": lambda count, generator: torch.randn(count, PIXELS, generator=generator), "samples": 60, "steps": 3}
    one, _, _ = fitted(cells, at_once=7, **noise)
    state = one.state_dict()
    for change in ({"at_once": 100}, {"mode": "loop"}, {"images": cells.val.images.float() / 255}):
        other = fitted(cells, **{**noise, **change})[0].state_dict()
        for name in state:
            torch.testing.assert_close(other[name], state[name], rtol=1e-3, atol=1e-4)
    assert not torch.equal(fitted(cells, **{**noise, "seed": 1})[0].state_dict()["mean"], state["mean"])


def test_the_noise_law_of_the_defence_is_drawn_afresh_for_every_gradient(cells):
    """The released number is the noise itself: its sketches vary as the law says, and a law of nothing is no noise."""
    params = {"w": torch.zeros(3)}

    def simulate(params, known, images, labels, noise):
        assert noise.shape == (2, 1, 3)  # local steps lead
        return {"w": noise[:, 0].mean(0) + known["shift"]}

    inverter = inverter_for(3, CLASSES, SHAPE, width_factor=0.1)
    known = {"shift": torch.tensor([100.0, 0.0, 0.0])}
    law = {"draw_noise": lambda count, generator: torch.randn(count, 3, generator=generator), "noise_shape": (2, 1, 3)}
    list(fit_inverter(inverter, simulate, params, known, cells.val.images, cells.val.labels, steps=0, seed=0, samples=400, **law))
    spread = inverter.std[1:] * 100 / math.sqrt(3)  # of unit-norm updates of norm 100
    torch.testing.assert_close(spread, torch.full((2,), 0.5**0.5), rtol=0.15, atol=0)

    def silent(params, known, images, labels, noise):
        assert noise is None
        return {"w": images.mean((0, 2, 3))}

    list(fit_inverter(inverter, silent, params, {}, cells.val.images, cells.val.labels, lambda count, generator: None, steps=0, seed=0, samples=40))


def test_the_loss_of_a_batch_pairs_equal_labels_as_fits_best_and_no_others():
    draw = torch.Generator().manual_seed(0)
    found, truth = torch.rand(3, 4, 1, 8, 8, generator=draw), torch.rand(3, 4, 1, 8, 8, generator=draw)
    labels = torch.tensor([[0, 0, 0, 1], [2, 1, 2, 1], [0, 1, 2, 3]])
    for sample, loss in enumerate(_set_loss(found, truth, labels, 0.5).tolist()):
        allowed = [order for order in itertools.permutations(range(4)) if labels[sample][list(order)].tolist() == labels[sample].tolist()]
        best = min(allowed, key=lambda order: float((found[sample] - truth[sample][list(order)]).square().mean()))
        assert loss == pytest.approx(float(image_loss(found[sample], truth[sample][list(best)]).mean()), rel=1e-5)
        assert len(allowed) == (6, 4, 1)[sample]


# --- inverting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(cells):
    return fitted(cells, steps=0, samples=100)


def test_hidden_labels_are_recovered(cells, ready):
    inverter, simulate, params = ready
    seen = observe(simulate, params, cells.train.images[:1], cells.train.labels[:1])
    (granted,), (hidden,) = invert_learned([seen], inverter), invert_learned([Observation(params, seen.update, 1)], inverter)
    assert torch.equal(granted.images, hidden.images) and granted.labels.tolist() == hidden.labels.tolist() == cells.train.labels[:1].tolist()


def test_a_broken_update_fails_alone_with_its_reason_and_mid_grey_images(cells, ready):
    inverter, simulate, params = ready
    good = observe(simulate, params, cells.train.images[:1], cells.train.labels[:1])
    nothing = {name: torch.zeros_like(t) for name, t in good.update.items()}
    broken = {**good.update, "head.bias": torch.full((CLASSES,), torch.nan)}
    found = invert_learned([Observation(params, nothing, 1, labels=good.labels), good, Observation(params, broken, 1)], inverter)
    assert [one.status for one in found] == ["failed", "ok", "failed"] and "zero" in found[0].error and "not finite" in found[2].error
    assert (found[0].images == 0.5).all() and found[0].loss == math.inf and torch.equal(found[1].images, invert_learned([good], inverter)[0].images)


def test_an_update_that_tells_no_labels_fails_alone_where_none_are_granted(cells, ready, monkeypatch):
    inverter, simulate, params = ready
    good = observe(simulate, params, cells.train.images[:1], cells.train.labels[:1])

    def recover(observation, classes):
        raise LabelsHidden("labels cannot be recovered")

    monkeypatch.setattr("gidef.attack.learned.recover_labels", recover)
    found = invert_learned([Observation(params, good.update, 1), good], inverter)
    assert [one.status for one in found] == ["failed", "ok"] and "labels" in found[0].error and (found[0].images == 0.5).all()


def test_observations_that_do_not_fit_the_inverter_are_refused(cells, ready):
    inverter, simulate, params = ready
    good = observe(simulate, params, cells.train.images[:1], cells.train.labels[:1])
    renamed = {"other": good.update["head.weight"], "head.bias": good.update["head.bias"]}
    for wrong, message in (
        (Observation(params, renamed, 1, labels=good.labels), "other names or shapes"),
        (observe(simulate, params, cells.train.images[:2], cells.train.labels[:2]), "2 images for an inverter of 1"),
        (Observation(params, good.update, 1, labels=torch.tensor([CLASSES])), "granted labels"),
    ):
        with pytest.raises(InputError, match=message):
            invert_learned([wrong], inverter)
    with pytest.raises(InputError, match="never fitted"):
        invert_learned([good], inverter_for(inverter.sketch_dim, CLASSES, SHAPE))


def test_public_images_that_cannot_serve_are_refused(cells):
    simulate, params = case()
    images, labels = cells.val.images, cells.val.labels
    inverter = inverter_for(seen_length(params, CLASSES), CLASSES, SHAPE, width_factor=0.1)
    for bad in ((images[:10], labels[:10]), (images, labels[:-1]), (images, labels + 1), (images, labels.float())):
        with pytest.raises(InputError, match="public"):
            next(fit_inverter(inverter, simulate, params, {}, *bad, steps=1, seed=0))

    def exploding(params, known, images, labels, noise):
        return {name: t / 0 for name, t in simulate(params, known, images, labels, noise).items()}

    with pytest.raises(InputError, match="not finite"):
        list(fit_inverter(inverter, exploding, params, {}, images, labels, steps=1, seed=0, samples=20))


def test_fitting_and_inverting_modify_none_of_their_inputs(cells):
    simulate, params = case()
    kept, images = copy.deepcopy(params), cells.val.images.clone()
    state = torch.get_rng_state()
    inverter, _, _ = fitted(cells, steps=2, samples=40)
    seen = observe(simulate, params, cells.train.images[:1], cells.train.labels[:1])
    before = {name: t.clone() for name, t in seen.update.items()}
    state = torch.get_rng_state()
    invert_learned([seen], inverter)
    list(fit_inverter(inverter, simulate, params, {}, images, cells.val.labels, steps=2, seed=0, samples=40))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(images, cells.val.images)
    assert all(torch.equal(before[name], t) for name, t in seen.update.items()) and all(torch.equal(kept[name], t) for name, t in params.items())
