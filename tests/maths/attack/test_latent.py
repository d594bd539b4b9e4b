"""The perturbed latent from the predictor's gradients: known answers on small networks, in float64 unless said otherwise."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.func import functional_call, grad

from gidef.attack import latent
from gidef.attack.labels import LocalSteps
from gidef.attack.latent import decode, invert_latent, match_latent, read_latent
from gidef.attack.predictor import Predictor, Reader, latent_simulator
from gidef.attack.shadow import fit_shadow, front_latents
from gidef.attack.unmix import UNMIXED, _Parts, latent_basis, unmix
from gidef.data import synthetic_blood_cells
from gidef.errors import InputError
from gidef.fit import fit_decoder
from gidef.models import SplitModel, decoder_for, make_backbone
from gidef.types import Observation

CLASSES, SHAPE = 6, (2, 12, 12)


class Layers(nn.Module):
    """front, then a predictor of ones own."""

    def __init__(self, *behind, latent=3):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(2, latent, 3, 3, 0), nn.LeakyReLU())  # latent × 4 × 4
        self.behind = nn.Sequential(*behind)

    def forward(self, images):
        return self.behind(self.front(images))


def smooth():
    return Layers(nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, CLASSES))


def small():
    return make_backbone("small", num_classes=CLASSES, image_shape=SHAPE)


def split(make=small, cut=None, dtype=torch.float64, sigma=0.7):
    torch.manual_seed(0)
    backbone = make()
    cut = cut or (None if make is small else "front")
    model = SplitModel(backbone, cut=cut, perturbation={"std_init": sigma}, image_shape=SHAPE, num_classes=CLASSES)
    return model.requires_grad_(False).to(dtype)


def observe(model, size=1, seed=0, labels=None, **fields):
    """(observation of φ's gradient alone, the perturbed latents, labels), with noise on the latent."""
    draw = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    images = torch.rand(size, *SHAPE, generator=draw, dtype=dtype)
    noise = torch.randn(size, *model.latent_shape, generator=draw, dtype=dtype)
    labels = torch.randperm(CLASSES, generator=draw)[:size] if labels is None else torch.tensor(labels)
    names = model.parts["predictor"]
    phi = {name: dict(model.named_parameters())[name].detach() for name in names}
    update = grad(lambda p: F.cross_entropy(functional_call(model, p, (images, noise)), labels))(phi)
    observation = Observation(phi, update, size, **{"labels": labels, **fields})
    return observation, model.run(images, noise).perturbed, labels


def result(running):
    counts = []
    while True:
        try:
            counts.append(next(running))
        except StopIteration as end:
            assert counts == sorted(counts)
            return end.value


def apart(found, truth):
    """Relative error of each latent."""
    return (found - truth).flatten(-truth.ndim + 1).norm(dim=-1) / truth.flatten(-truth.ndim + 1).norm(dim=-1)


# --- the predictor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [smooth, small])
def test_the_predictor_s_gradient_is_the_share_of_the_whole_model_s(make):
    model = split(make)
    observation, latents, labels = observe(model, size=3)
    predictor = Predictor(model)
    found = predictor.gradient(observation.params, latents, F.one_hot(labels, CLASSES).double())
    assert found.keys() == observation.update.keys() == set(model.parts["predictor"])
    for name, tensor in observation.update.items():
        torch.testing.assert_close(found[name], tensor)


def test_the_simulator_of_a_latent_gives_that_gradient_and_its_loss():
    model = split()
    observation, latents, labels = observe(model)
    simulate, targets = latent_simulator(Predictor(model)), F.one_hot(labels, CLASSES).double()
    for name, tensor in simulate(observation.params, {"latent": latents}, None, targets, None).items():
        torch.testing.assert_close(tensor, observation.update[name])
    slope = grad(lambda p: simulate.loss(p, {"latent": latents}, None, targets, None))(observation.params)
    torch.testing.assert_close(slope["backbone.head.bias"], observation.update["backbone.head.bias"])


def test_layers_that_read_the_latent_itself_are_found():
    (conv,) = Predictor(split()).readers
    assert conv == Reader("backbone.blocks.2.conv.weight", "backbone.blocks.2.conv.bias", (3, 3), (2, 2), (1, 1), (1, 1))
    (linear,) = Predictor(split(smooth)).readers
    assert linear == Reader("backbone.behind.1.weight", "backbone.behind.1.bias")
    assert Predictor(split(cut="blocks.2")).readers == ()  # pooled first
    assert Predictor(split(lambda: Layers(nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)))).readers == ()


# --- in closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [smooth, small])
def test_one_perturbed_latent_is_recovered_exactly_in_closed_form(make):
    """The linear layer: a ratio. The convolution: the span of its patches and where they overlap."""
    model = split(make)
    predictor = Predictor(model)
    for seed in range(3):
        observation, latents, _ = observe(model, seed=seed)
        found = latent_basis(observation.update, predictor.readers[0], predictor.latent_shape, 1)
        assert apart(found, latents).max() < 1e-9
    row = observation.update["backbone.behind.1.weight"] if make is smooth else None
    if row is not None:
        torch.testing.assert_close((row[0] / observation.update["backbone.behind.1.bias"][0]).view_as(latents), latents)


def test_without_a_bias_its_direction_is_recovered():
    model = split(lambda: Layers(nn.Conv2d(3, 30, 3, 1, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(480, CLASSES)))
    observation, latents, _ = observe(model)
    (reader,) = Predictor(model).readers
    found = latent_basis(observation.update, reader, model.latent_shape, 1)
    assert reader.bias is None and found.square().mean() == pytest.approx(1)
    assert F.cosine_similarity(found.flatten(), latents.flatten(), dim=0).abs() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("make", [smooth, small])
@pytest.mark.parametrize("size", [2, 4])
def test_the_span_of_a_batch_s_latents_is_recovered_exactly(make, size):
    model = split(make)
    observation, latents, _ = observe(model, size)
    found = latent_basis(observation.update, Predictor(model).readers[0], model.latent_shape, size).flatten(1)
    torch.testing.assert_close(found @ found.T / found.shape[1], torch.eye(size, dtype=torch.float64))
    within = latents.flatten(1) @ found.T @ found / found.shape[1]
    assert apart(within, latents.flatten(1)).max() < 1e-8


def test_a_gradient_that_does_not_determine_the_latents_gives_no_basis():
    model = split(lambda: Layers(nn.Conv2d(3, 5, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(80, CLASSES)))  # 16 patches, 5 filters
    observation, _, _ = observe(model)
    assert latent_basis(observation.update, Predictor(model).readers[0], model.latent_shape, 1) is None
    model = split(lambda: Layers(nn.Conv2d(3, 30, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(120, CLASSES), latent=3))  # patches do not overlap
    observation, _, _ = observe(model)
    assert latent_basis(observation.update, Predictor(model).readers[0], model.latent_shape, 1) is None
    broken = {**observation.update, "backbone.behind.0.weight": torch.full((30, 3, 1, 1), torch.nan)}
    assert latent_basis(broken, Predictor(model).readers[0], model.latent_shape, 1) is None
    with pytest.raises(InputError, match="not in the update"):
        latent_basis({}, Predictor(model).readers[0], model.latent_shape, 1)


class Normed(nn.Module):
    """A predictor with BatchNorm behind the layer that reads the latent."""

    def __init__(self):
        super().__init__()
        self.front, self.read, self.norm = nn.Sequential(nn.Conv2d(2, 3, 3, 3, 0), nn.LeakyReLU()), nn.Conv2d(3, 64, 3, 2, bias=False), nn.BatchNorm2d(64, track_running_stats=False)
        self.head = nn.Linear(64, CLASSES, bias=False)

    def forward(self, images):
        return self.head(self.norm(self.read(self.front(images))).tanh().mean((2, 3)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", [smooth, small, lambda: Layers(nn.Conv2d(3, 20, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(80, CLASSES)), Normed])
def test_an_image_s_part_of_the_gradient_serves_for_the_whole_one(make, size):
    """Residuals and Jacobian from single images' gradients, the reader's in coordinates of its patches, have the products of the plain ones."""
    model = split(make)
    if make is Normed:
        model.train()  # statistics of the batch: no image has a part of its own
    observation, _, labels = observe(model, size)
    draw, predictor = torch.Generator().manual_seed(5), Predictor(model)
    flat = torch.randn(size, *model.latent_shape, generator=draw, dtype=torch.float64).flatten(1)
    mix, wanted = torch.randn(size, size, generator=draw, dtype=torch.float64), F.one_hot(labels, CLASSES).double()
    parts = _Parts(observation, predictor, flat, wanted, 4)
    assert bool(parts._read) == (make is not Normed)
    weights = {name: 1 / (tensor.norm() * len(predictor.names) ** 0.5) for name, tensor in observation.update.items()}
    observed = torch.cat([(observation.update[name] * weights[name]).flatten() for name in predictor.names])

    def plain(mix):
        update = predictor.gradient(observation.params, (mix @ flat).unflatten(-1, model.latent_shape), wanted)
        one = torch.cat([(update[name] * weights[name]).flatten() for name in predictor.names])
        return one * (one @ observed) / (one @ one) - observed

    now, [found] = plain(mix), parts.residuals(mix[None])
    torch.testing.assert_close(found @ found + parts.beyond, now @ now)
    axes = 1e-4 * torch.eye(size * size, dtype=torch.float64).view(-1, size, size)
    jacobian, slopes = torch.stack([(plain(mix + axis) - plain(mix - axis)) / 2e-4 for axis in axes]), parts.slopes(mix, 1e-4)
    torch.testing.assert_close(slopes @ slopes.T, jacobian @ jacobian.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(slopes @ found, jacobian @ now, rtol=1e-6, atol=1e-8)


def one_layer(classes):
    return lambda: Layers(nn.Flatten(), nn.Linear(48, classes))


def hidden(classes):
    return lambda: Layers(nn.Flatten(), nn.Linear(48, 24), nn.LeakyReLU(), nn.Linear(24, classes))


def paired(found, truth):
    """The largest relative error, images in the best order: images of one label have none."""
    distances = (found[:, None] - truth).flatten(2).norm(dim=2) / truth.flatten(1).norm(dim=1)
    rows, columns = linear_sum_assignment(distances.numpy())
    return distances[rows, columns].max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("make", "classes", "labels"), [
    *((one_layer(10), 10, list(range(size))) for size in (1, 2, 4, 8)), (one_layer(6), 6, [0, 1, 2, 3, 3]), (one_layer(10), 10, [1, 1, 4, 4]),
    *((hidden(10), 10, list(range(size))) for size in (1, 2, 4, 8)), (hidden(6), 6, [0, 0, 1, 1, 2, 2, 5, 5]), (hidden(6), 6, [0, 1, 2, 3, 4, 5, 0, 1]),
])  # fmt: skip
def test_the_latents_of_a_batch_are_exact_up_to_rounding_and_the_loss_tells_so(monkeypatch, make, classes, labels, dtype):
    """One linear layer: by the softmax's consistency, fewer images than classes; a hidden layer: more images than classes and repeated labels, too."""
    monkeypatch.setattr(f"{__name__}.CLASSES", classes)
    model = split(make, dtype=dtype)
    observation, latents, _ = observe(model, len(labels), labels=labels)
    monkeypatch.setattr(latent, "match_latent", lambda *_, **__: pytest.fail("matched freely"))
    found = result(read_latent([observation], Predictor(model), seed=0))
    assert paired(found.latents[0], latents.double()) < (1e-9 if dtype is torch.float64 else 1e-5) and found.loss < 1e-10


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 5, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_eight_images_before_a_convolution_are_told_apart_though_gates_go_wrong_on_the_way(labels):
    model = split(dtype=torch.float32)
    observation, latents, _ = observe(model, 8, labels=labels)
    predictor = Predictor(model)
    basis = latent_basis(observation.update, predictor.readers[0], model.latent_shape, 8)
    searched = observation, predictor, basis, observation.labels
    found, loss, tried, *_ = result(unmix(*searched, seed=0, starts=4))  # of which nearly every one gets there
    assert paired(found, latents.double()) < 1e-5 and loss < 1e-10, (loss, tried)
    found, loss, *_ = result(unmix(*searched, seed=0, starts=len(tried), settling=0))
    assert paired(found, latents.double()) > 1e-3 and loss > 1e-6, (loss, tried)  # least squares alone stop short


@pytest.mark.parametrize("size", [6, 8])
def test_one_layer_does_not_determine_as_many_images_as_it_has_classes_and_says_so(size):
    """K − 1 independent rows: other latents have the very same gradient, so that a low loss tells nothing, and `told` does."""
    model = split(one_layer(CLASSES))
    observation, latents, labels = observe(model, size, labels=[number % CLASSES for number in range(size)])
    predictor, entries = Predictor(model), size * 48
    assert predictor.told == (CLASSES - 1) * 49 < entries and Predictor(split(hidden(CLASSES))).told > entries
    assert latent_basis(observation.update, predictor.readers[0], model.latent_shape, size) is None
    targets, flat = F.one_hot(labels, CLASSES).double(), latents.flatten(1).clone().requires_grad_(True)
    layers = torch.autograd.functional.jacobian(
        lambda z: torch.cat([t.flatten() for t in predictor.gradient(observation.params, z.view_as(latents), targets).values()]), flat, vectorize=True
    )  # fmt: skip
    assert torch.linalg.matrix_rank(layers.flatten(1)) <= predictor.told  # of 6 · 49 equations


def test_a_map_of_even_sides_leaves_shifted_latents_that_the_rest_of_the_gradient_excludes():
    """3×3 at stride 2 with padding reads zeros above and left of a 4×4 map, none below: a latent moved down by 2 has patches in the span, too."""
    model = split(lambda: Layers(nn.Conv2d(3, 40, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(160, CLASSES)))
    predictor = Predictor(model)
    for size in (1, 2):
        observation, latents, _ = observe(model, size)
        basis = latent_basis(observation.update, predictor.readers[0], model.latent_shape, size)
        assert len(basis) == 4 * size
        moved = F.pad(latents, (2, 0, 2, 0))[..., :4, :4]
        for inside in (latents, moved):
            assert apart(inside.flatten(1) @ torch.linalg.pinv(basis.flatten(1)) @ basis.flatten(1), inside.flatten(1)).max() < 1e-8
        found = result(read_latent([observation], predictor, seed=0))
        assert apart(found.latents[0], latents).max() < 1e-9 and found.loss < 1e-10


@pytest.mark.parametrize("make", [smooth, small])
@pytest.mark.parametrize(("labels", "same_label"), [([0, 3], False), ([2, 2], True)])
def test_the_latents_of_a_batch_of_two_are_told_apart(make, labels, same_label):
    model = split(make)
    observation, latents, _ = observe(model, 2, labels=labels)
    predictor = Predictor(model)
    basis = latent_basis(observation.update, predictor.readers[0], model.latent_shape, 2)
    found, loss, tried, curve, start = result(unmix(observation, predictor, basis, observation.labels, seed=0))
    errors = apart(found, latents)
    if same_label:  # either order explains the gradient
        errors = torch.minimum(errors, apart(found.flip(0), latents))
    assert errors.max() < 1e-3 and loss < 1e-6, (errors, loss, tried)
    assert loss == min(tried) == min(curve) and tried[start] == loss and curve == sorted(curve, reverse=True)


# --- matching --------------------------------------------------------------------------------------------------------


MATCH = {"seed": 0, "dtype": torch.float64, "kink_width": None, "distance": "l2", "iterations": 600}


@pytest.mark.parametrize("size", [1, 2])
def test_matching_recovers_the_perturbed_latents_of_a_smooth_predictor(size):
    model = split(smooth)
    made = [observe(model, size, seed=seed) for seed in range(2)]
    found = result(match_latent([one[0] for one in made], Predictor(model), restarts=2, **MATCH))
    for index, (_, latents, labels) in enumerate(made):
        assert apart(found.latents[index], latents).max() < 1e-3, (size, index)
        assert torch.equal(found.labels[index], labels)
    assert found.loss.max() < 1e-6 and torch.equal(found.loss, found.losses.min(1).values)
    assert torch.equal(found.losses.gather(1, found.restart[:, None])[:, 0], found.loss)


def test_matching_gets_closer_to_the_latents_of_a_convolutional_predictor_with_kinks():
    model = split()
    observation, latents, _ = observe(model)
    settings = {"seed": 0, "dtype": torch.float64}
    first, last = (result(match_latent([observation], Predictor(model), iterations=n, **settings)) for n in (0, 150))
    assert last.loss < 0.01 * first.loss and apart(last.latents[0], latents).max() < 0.6 < 0.9 < apart(first.latents[0], latents).min()


def test_one_program_gives_the_numbers_of_a_plain_loop_whatever_the_chunks():
    made, models = [], []
    for seed in range(3):  # each with weights of its own
        model = split(smooth)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        models.append(model)
        made.append(observe(model, 2, seed=seed)[0])
    settings = {**MATCH, "iterations": 20, "restarts": 2}
    together = result(match_latent(made, Predictor(models[0]), at_once=100, **settings))
    for change in ({"mode": "loop"}, {"at_once": 4}, {"at_once": 1}):
        other = result(match_latent(made, Predictor(models[0]), **{**settings, **change}))
        torch.testing.assert_close(other.latents, together.latents, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(other.curve, together.curve, rtol=1e-6, atol=1e-10)
    alone = result(match_latent(made[:1], Predictor(models[2]), **settings))
    torch.testing.assert_close(alone.latents[0], together.latents[0], rtol=1e-6, atol=1e-8)
    assert not torch.equal(alone.latents, result(match_latent(made[:1], Predictor(models[0]), **{**settings, "seed": 1})).latents)


def test_what_the_gradient_does_not_tell_stays_as_small_as_it_began():
    """Behind 2×2 pooling only window means are told."""
    model = split(lambda: Layers(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, CLASSES)))
    observation, latents, _ = observe(model)
    found = result(match_latent([observation], Predictor(model), start_scale=0.01, **{**MATCH, "iterations": 250})).latents[0]
    means = F.avg_pool2d(found, 2)
    assert apart(means, F.avg_pool2d(latents, 2)).max() < 0.1
    hidden, private = (one - F.interpolate(F.avg_pool2d(one, 2), scale_factor=2) for one in (found, latents))
    assert hidden.square().mean() < 0.01 < 0.1 < private.square().mean()


# --- the attack ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float64), (1, torch.float32), (3, torch.float32)])
def test_the_best_way_there_is_reads_the_latents_of_the_small_net(size, dtype):
    model = split(dtype=dtype)
    made = [observe(model, size, seed=seed) for seed in range(2 if size == 1 else 1)]
    found = result(read_latent([one[0] for one in made], Predictor(model), seed=0))
    for index, (_, latents, _) in enumerate(made):
        assert apart(found.latents[index], latents.double()).max() < 1e-3
    assert found.loss.max() < 1e-8


def test_labels_that_are_not_granted_are_recovered():
    model = split()
    observation, latents, labels = observe(model)
    found = result(read_latent([dataclasses.replace(observation, labels=None)], Predictor(model), seed=0))
    assert found.labels[0].tolist() == labels.tolist() and apart(found.latents[0], latents).max() < 1e-3


def test_the_delta_of_one_step_of_unknown_size_tells_as_much_as_a_gradient():
    model = split()
    observation, latents, _ = observe(model, 2)
    delta = {name: -0.03 * tensor for name, tensor in observation.update.items()}
    found = result(read_latent([dataclasses.replace(observation, update=delta, kind="delta")], Predictor(model), seed=0))
    assert apart(found.latents[0], latents).max() < 1e-3
    with pytest.raises(InputError, match="step size"):
        next(match_latent([dataclasses.replace(observation, update=delta, kind="delta")], Predictor(model), seed=0, distance="l2"))


def test_a_gradient_that_no_closed_form_explains_is_matched_and_the_better_one_counts():
    model = split(smooth)
    observation, latents, _ = observe(model)
    draw = torch.Generator().manual_seed(0)
    noisy = {name: t + 0.3 * t.std() * torch.randn(t.shape, generator=draw, dtype=t.dtype) for name, t in observation.update.items()}
    observation = dataclasses.replace(observation, update=noisy)
    settings = {"seed": 0, "dtype": torch.float64, "kink_width": None}
    closed = result(read_latent([observation], Predictor(model), iterations=0, **settings))
    found = result(read_latent([observation], Predictor(model), iterations=100, **settings))
    free = result(match_latent([observation], Predictor(model), iterations=100, **settings))
    assert 1e-4 < found.loss < closed.loss and found.loss <= free.loss and torch.equal(found.curve, free.curve)
    assert torch.equal(found.losses, free.losses)


def test_a_latent_that_is_matched_before_a_norm_layer_has_its_scale_polished():
    model = split(lambda: Layers(nn.Conv2d(3, 12, 3, 1, 1), nn.GroupNorm(2, 12), nn.Tanh(), nn.Flatten(), nn.Linear(192, CLASSES)))
    observation, latents, _ = observe(model)
    settings = {"seed": 0, "dtype": torch.float64, "kink_width": None, "iterations": 80, "start_scale": 1.5}
    free = result(match_latent([observation], Predictor(model), **settings))
    found = result(read_latent([observation], Predictor(model), **settings))
    assert found.loss < free.loss and apart(found.latents[0], latents).max() < 0.8 * apart(free.latents[0], latents).max()


def test_with_nothing_behind_the_latent_none_is_read():
    observation, *_ = observe(split(cut="head"))
    assert observation.update == {} and result(read_latent([observation], Predictor(split(cut="head")), seed=0)).loss.isinf().all()


def test_broken_updates_fail_alone_with_mid_grey_images():
    model = split(dtype=torch.float32)
    good, latents, _ = observe(model)
    nothing = dataclasses.replace(good, update={name: torch.zeros_like(t) for name, t in good.update.items()})
    broken = dataclasses.replace(good, update={**good.update, "backbone.head.bias": torch.full((CLASSES,), torch.nan)})
    decoder = decoder_for(model.latent_shape, 1, SHAPE, size="loop").eval()
    found = result(invert_latent([nothing, good, broken], Predictor(model), decoder, seed=0, iterations=5))
    assert [one.status for one in found] == ["failed", "ok", "failed"] and found[0].error
    for one in (found[0], found[2]):
        assert (one.images == 0.5).all() and one.loss == torch.inf
    torch.testing.assert_close(found[1].images, decoder(latents).detach(), rtol=1e-3, atol=1e-4)
    assert found[1].images.dtype == torch.float32 and found[1].loss < 1e-8


def test_large_batches_are_matched_in_bounded_time(monkeypatch):
    """A start of `unmix` costs as B · r: fewer of them above 16 behind a convolution, none above UNMIXED images, where the free matching counts as it is."""
    assert [latent._tries(32, size, size, False) for size in (1, 2, 4, 8)] == [2, 32, 32, 8]
    assert [latent._tries(32, size, 16 * size, False) for size in (1, 2)] == [32, 8] and latent._tries(32, 8, 8, True) == 32
    model = split(dtype=torch.float32)
    size = UNMIXED + 1
    seen, *_ = observe(model, size, labels=[number % CLASSES for number in range(size)])
    monkeypatch.setattr(latent, "unmix", lambda *_, **__: pytest.fail("unmixed"))
    read = result(latent.read_latent([seen], Predictor(model), seed=0, iterations=3, restarts=2))
    matched = result(match_latent([seen], Predictor(model), seed=0, iterations=3, restarts=2))
    torch.testing.assert_close(read.latents, matched.latents.double())
    assert read.loss.isfinite().all() and read.losses.shape == (1, 2)


def test_updates_that_tell_no_labels_fail_alone_where_none_are_granted():
    model = split(dtype=torch.float32)
    good, *_ = observe(model)
    pruned = {name: torch.zeros_like(t) if name.startswith("backbone.head.") else t for name, t in good.update.items()}
    updates = ({name: torch.zeros_like(t) for name, t in good.update.items()}, good.update, pruned)
    hidden = [dataclasses.replace(good, update=update, labels=None) for update in updates]
    decoder = decoder_for(model.latent_shape, 1, SHAPE, size="loop").eval()
    found = result(invert_latent(hidden, Predictor(model), decoder, seed=0, iterations=5))
    assert [one.status for one in found] == ["failed", "ok", "failed"] and "labels" in found[2].error and (found[2].images == 0.5).all()
    matched = result(match_latent(hidden, Predictor(model), seed=0, iterations=5))
    assert matched.loss.isfinite().tolist() == [False, True, False]


def test_an_observation_s_draws_do_not_depend_on_what_is_read_with_it(monkeypatch):
    model = split(smooth)
    (first, *_), (last, *_) = (observe(model, seed=seed) for seed in range(2))
    nothing = dataclasses.replace(first, update={name: torch.zeros_like(t) for name, t in first.update.items()})
    settings = {"seed": 0, "dtype": torch.float64, "kink_width": None, "iterations": 10, "restarts": 2}
    monkeypatch.setattr(latent, "UNMIXED", 0)  # all by free matching, but for the update that cannot be matched
    together = result(read_latent([first, nothing, last], Predictor(model), **settings))
    assert together.iterations.tolist() == [[10, 10], [0, 0], [10, 10]] and together.loss.isfinite().tolist() == [True, False, True]
    alone, other = (result(read_latent([last], Predictor(model), numbers=numbers, **settings)) for numbers in ([2], [1]))
    torch.testing.assert_close(alone.latents[0], together.latents[2], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(alone.losses[0], together.losses[2], rtol=1e-6, atol=1e-12)
    assert not torch.allclose(other.losses[0], together.losses[2], rtol=1e-3)
    for attack in (match_latent, read_latent):
        with pytest.raises(InputError, match="2 numbers for 1 observations"):
            result(attack([first], Predictor(model), seed=0, numbers=[0, 1]))


def test_a_start_that_the_span_of_the_latents_made_needless_takes_no_iterations():
    model = split(smooth)
    found = result(read_latent([observe(model)[0]], Predictor(model), seed=0, iterations=10, restarts=2))
    assert found.iterations[0, 1] == 0 < found.iterations[0, 0] and found.losses[0].tolist() == [float(found.loss)] * 2


def test_the_share_that_is_over_follows_every_search_and_is_whole_no_sooner_than_the_last_one(monkeypatch):
    model, searches = split(smooth), []
    exact, other = (observe(model, seed=seed)[0] for seed in range(2))
    draw = torch.Generator().manual_seed(0)
    noisy = dataclasses.replace(other, update={name: t + 0.3 * t.std() * torch.randn(t.shape, generator=draw, dtype=t.dtype) for name, t in other.update.items()})
    nothing = dataclasses.replace(exact, update={name: torch.zeros_like(t) for name, t in exact.update.items()})

    def watched(search):
        def running(*given, **options):
            searches.append(0)
            inner = search(*given, **options)
            while True:
                try:
                    searches[-1] = next(inner)
                except StopIteration as end:
                    return end.value
                yield searches[-1]

        return running

    for name in ("unmix", "match_latent"):
        monkeypatch.setattr(latent, name, watched(getattr(latent, name)))
    running, seen = latent.read_latent([exact, nothing, noisy], Predictor(model), seed=0, iterations=10, restarts=3, at_once=2, every=3, dtype=torch.float64), []
    with contextlib.suppress(StopIteration):
        while True:
            share = next(running)
            if searches:
                seen.append((len(searches) - 1, searches[-1], share))
    # two starts of 42 and 72 steps for each that can be read, 3 · 10 of the free search in 2 programs of 10 iterations, 42 of the polish
    total, places = 2 * (114 + 30 + 42), ((0, 114, 114), (114, 114, 114), (2 * 114 + 72, 30, 20), (2 * 114 + 72 + 30, 42, 42))
    assert len(searches) == 4 and searches[0] < 114 and searches[2] == 20 and {number for number, *_ in seen} == {0, 1, 2, 3}
    for number, done, share in seen:
        over, part, most = places[number]
        assert share == pytest.approx((over + part * done / most) / total)
    assert all(share < 1 for number, done, share in seen if number < 3 or done < 42)
    assert (shares := [share for *_, share in seen]) == sorted(shares)


def test_observations_that_do_not_fit_are_refused():
    model = split()
    predictor, (good, _, _), (pair, _, _) = Predictor(model), observe(model), observe(model, 2)
    without = dataclasses.replace(good, update={name: t for name, t in good.update.items() if name != "backbone.head.bias"})
    for observations, message in (([], "at least one"), ([good, pair], "batches of one size"), ([without], "head.bias"),
                                  ([dataclasses.replace(good, labels=torch.tensor([CLASSES]))], "granted labels")):  # fmt: skip
        for attack in (match_latent, read_latent):
            with pytest.raises(InputError, match=message):
                result(attack(observations, predictor, seed=0))
    for change, message in (({"restarts": 0}, "restarts=0"), ({"mode": "fast"}, "mode"), ({"distance": "l1"}, "distance")):
        with pytest.raises(InputError, match=message):
            result(match_latent([good], predictor, seed=0, iterations=1, **change))


def test_an_attack_modifies_none_of_its_inputs():
    model = split(dtype=torch.float32)
    observation, _, _ = observe(model, 2)
    kept, state, weights = copy.deepcopy(observation), torch.get_rng_state(), copy.deepcopy(model.state_dict())
    result(read_latent([observation], Predictor(model), seed=0, starts=1, enough=0.0, iterations=2))
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    for name, tensor in observation.update.items():
        assert torch.equal(kept.update[name], tensor) and torch.equal(kept.params[name], observation.params[name])


# --- fronts and decoders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    return synthetic_blood_cells(train=16, val=160, test=8, size=12, seed=5)


def client(seed=0):
    backbone = make_backbone("small", num_classes=8, image_shape=(3, 12, 12), seed=seed)
    return SplitModel(backbone, perturbation={"std_init": 0.3}, image_shape=(3, 12, 12), num_classes=8)


def law(model):
    return lambda count, generator: model.perturbation.draw(count, generator=generator)


def test_a_shadow_front_is_trained_and_the_predictor_stays_as_it_was_given(cells):
    model, other = client(), client(seed=1)
    phi = {name: dict(other.named_parameters())[name].detach().clone() for name in model.parts["predictor"]}
    before = copy.deepcopy(model.state_dict())
    images = cells.val.images.float() / 255

    @torch.no_grad()
    def loss(one):
        noise = law(one)(len(images), torch.Generator().manual_seed(0))
        return float(F.cross_entropy(functional_call(one, phi, (images, noise)), cells.val.labels))

    start, twin = loss(model), copy.deepcopy(model)
    steps = list(fit_shadow(model, phi, cells.val.images, cells.val.labels, steps=40, seed=0, draw_noise=law(model)))
    assert steps == [20, 40, 40] and loss(model) < 0.8 * start
    now = dict(model.named_parameters())
    for part, moved in (("encoder", True), ("perturbation", True), ("predictor", False)):
        for name in model.parts[part]:
            reference = before[name] if moved else phi[name]
            assert torch.equal(now[name], reference) != moved, name
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    list(fit_shadow(twin, phi, images, cells.val.labels, steps=40, seed=0, draw_noise=law(twin)))
    assert all(torch.allclose(p, now[name], atol=1e-5) for name, p in twin.named_parameters())
    with pytest.raises(InputError, match="phi lacks"):
        next(fit_shadow(twin, {}, images, cells.val.labels, steps=1, seed=0))


def test_a_shadow_is_trained_against_the_clients_own_loss_where_one_is_given(cells):
    model, called = client(), []
    phi = {name: dict(model.named_parameters())[name].detach().clone() for name in model.parts["predictor"]}

    def loss(one, images, labels, noise):
        called.append((images.shape, labels.shape, noise))
        return one.run(images).latent.square().mean() * 0 + F.cross_entropy(one(images), labels)

    list(fit_shadow(model, phi, cells.val.images, cells.val.labels, steps=2, seed=0, loss=loss, batch_size=10))
    assert called == [((10, 3, 12, 12), (10,), None)] * 2


def test_latents_read_from_gradients_decode_to_the_private_images(cells):
    """End to end through the true front: a decoder fitted to public images beats their mean by decibels on private ones."""
    model = client().requires_grad_(False).eval()
    decoder = decoder_for(model.latent_shape, model.channel_dim, (3, 12, 12), size="loop")
    list(fit_decoder(decoder, front_latents(model, law(model)), cells.val, steps=150, seed=0, lr=5e-3))
    phi = {name: dict(model.named_parameters())[name].detach() for name in model.parts["predictor"]}
    truth, observations = cells.train.images.float() / 255, []
    for index in range(16):
        noise, labels = law(model)(1, torch.Generator().manual_seed(index)), cells.train.labels[index : index + 1]
        update = grad(lambda p, i=index, n=noise, y=labels: F.cross_entropy(functional_call(model, p, (truth[i : i + 1], n)), y))(phi)
        observations.append(Observation(phi, update, 1, labels=labels))
    found = torch.cat([one.images for one in result(invert_latent(observations, Predictor(model), decoder, seed=0))])
    mean = (cells.val.images.float().mean(0) / 255).expand_as(truth)
    reached, guess = (float(-10 * (one - truth).square().flatten(1).mean(1).log10().mean()) for one in (found, mean))
    assert reached > guess + 2, (reached, guess)


def test_decoding_keeps_the_order_and_any_type_of_latents():
    decoder = decoder_for((3, 4, 4), 1, SHAPE, size="loop").eval()
    latents = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = decode(latents, decoder, at_once=4)
    assert images.shape == (3, 2, *SHAPE) and images.dtype == torch.float32 and not images.requires_grad
    torch.testing.assert_close(images[2, 1], decoder(latents[2, 1:].float()).detach()[0])


def stepped(model, steps, *, momentum, lr=0.01, seed=0):
    """(the observed delta of steps of one image each, their latents, LocalSteps), by hand."""
    draw, start = torch.Generator().manual_seed(seed), {name: tensor.detach() for name, tensor in model.named_parameters()}
    images, labels = torch.rand(steps, *SHAPE, generator=draw, dtype=torch.float64), torch.randperm(CLASSES, generator=draw)[:steps]
    noise, weights, slots, latents = torch.randn(steps, *model.latent_shape, generator=draw, dtype=torch.float64), start, {}, []
    for t in range(steps):
        rows = slice(t, t + 1)
        latents.append(functional_call(model, weights, (images[rows], noise[rows]), {"full": True}).perturbed)
        slope = grad(lambda p, rows=rows: F.cross_entropy(functional_call(model, p, (images[rows], noise[rows])), labels[rows]))(weights)
        slots = {name: momentum * slots.get(name, 0.0) + tensor for name, tensor in slope.items()}
        weights = {name: weights[name] - lr * slot for name, slot in slots.items()}
    names = model.parts["predictor"]
    delta = {name: weights[name] - start[name] for name in names}
    return Observation({name: start[name] for name in names}, delta, steps, kind="delta", labels=labels), torch.cat(latents), LocalSteps(lr=lr, steps=steps, momentum=momentum)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_of_local_steps_the_latent_of_each_is_read_at_the_weights_that_it_met(momentum):
    model = split()
    observation, latents, local = stepped(model, 3, momentum=momentum)
    predictor = Predictor(model, local=local)
    cast = {"params": observation.params, "latents": latents, "labels": F.one_hot(observation.labels, CLASSES).double()}
    for name, tensor in predictor.gradient(**cast).items():
        torch.testing.assert_close(-local.lr * tensor, observation.update[name])
    found = result(read_latent([observation], predictor, seed=0))
    assert float(found.loss) < 1e-8 and not bool(found.free)
    assert float(apart(found.latents[0], latents).max()) < 1e-3
    at_once = result(read_latent([observation], Predictor(model), seed=0, starts=2, iterations=20))
    assert float(at_once.loss) > 100 * float(found.loss)  # as one step of three images they do not explain it as well


def test_the_gradient_at_a_latent_of_local_steps_is_that_of_its_own_step():
    model = split()
    observation, latents, local = stepped(model, 2, momentum=0.5, lr=0.1)
    predictor, targets = Predictor(model, local=local), F.one_hot(observation.labels, CLASSES).double()
    found = predictor.backward(observation.params, latents, targets)
    alone = Predictor(model)
    slope = alone.gradient(observation.params, latents[:1], targets[:1])
    moved = {name: observation.params[name] - 0.1 * slope[name] for name in slope}
    for row, weights in ((0, observation.params), (1, moved)):
        expected = grad(lambda z, weights=weights, row=row: alone.loss(weights, z, targets[row : row + 1]))(latents[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected)


def test_a_delta_s_rounding_ends_the_search_that_nothing_more_can_be_found_in():
    model = split(dtype=torch.float32)
    observation, _, _ = observe(model, 2)
    lr = 1e-3
    rounded = {name: (observation.params[name] - lr * tensor) - observation.params[name] for name, tensor in observation.update.items()}
    delta = dataclasses.replace(observation, update=rounded, kind="delta")
    predictor = Predictor(model)
    basis = latent_basis(observation.update, predictor.readers[0], model.latent_shape, 2)
    _, loss, tried, *_ = result(unmix(delta, predictor, basis, observation.labels, seed=0, starts=6))
    assert 1e-10 < loss < 1e-6 and len(tried) < 6
