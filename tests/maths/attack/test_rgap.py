"""R-GAP. Images are made up unless GIDEF_DATA names a folder."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gidef.attack.analytic import Rank, rank_index, rgap, rgap_ranks
from gidef.attack.analytic.rgap import find_chain
from gidef.errors import InputError
from gidef.models import SplitModel
from gidef.types import Observation

SHAPE, DOUBLE = (3, 8, 8), torch.float64


def chain(
    outputs=5, *, bias=False, head_bias=None, act=None, layers=((12, 4, 2, 2), (16, 3, 1, 1), (24, 3, 2, 1)), shape=SHAPE, seed=0, dtype=DOUBLE
):
    """Convolutions (channels, kernel, stride, padding), each with an activation, and a linear layer."""
    torch.manual_seed(seed)
    net, channels = nn.Sequential(), shape[0]
    for width, kernel, stride, padding in layers:
        net.extend([nn.Conv2d(channels, width, kernel, stride, padding, bias=bias), (act or (lambda: nn.LeakyReLU(0.2)))()])
        channels = width
    net.append(nn.Flatten())
    features = net(torch.zeros(1, *shape)).shape[1]
    net.append(nn.Linear(features, outputs, bias=bias if head_bias is None else head_bias))
    return net.to(dtype)


def cnn6(**options):
    """The paper's six convolutions."""
    return chain(layers=((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)), **options)


def image_of(shape=SHAPE, seed=0, dtype=DOUBLE):
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(logits, labels):
    return F.cross_entropy(logits, labels) if logits.shape[1] > 1 else F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits))


def observe(model, images, label=1, *, factor=1.0, loss=loss_of, **fields):
    params = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(model(images), torch.full((len(images),), label)), list(params.values()))
    update = {name: factor * gradient for name, gradient in zip(params, gradients, strict=True)}
    return Observation({name: p.detach() for name, p in params.items()}, update, len(images), **fields)


def psnr_db(found, truth):
    return float(-10 * (found.double() - truth.double()).square().mean().clamp(min=1e-14).log10())


def invert(observation, model, outputs=5, shape=SHAPE):
    return rgap(observation, model, image_shape=shape, num_classes=outputs)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_an_image_is_recovered_to_rounding_with_and_without_biases_for_one_or_several_outputs(outputs, bias, label):
    model, image = chain(outputs, bias=bias), image_of()
    found = invert(observe(model, image, label), model, outputs)
    assert found.status == "ok" and found.error == "" and found.loss < 1e-10 and found.labels.tolist() == [label]
    assert (found.images - image).abs().max() < 1e-6
    granted = invert(observe(model, image, label, labels=torch.tensor([label])), model, outputs)
    assert (granted.images - image).abs().max() < 1e-6


def test_the_last_layer_alone_may_have_the_bias_and_a_delta_needs_it():
    model, image = chain(bias=False, head_bias=True), image_of()
    found = invert(observe(model, image, factor=-0.03, kind="delta"), model)
    assert (found.images - image).abs().max() < 1e-6 and found.labels.tolist() == [1]
    model = chain(bias=True, head_bias=False)
    assert (invert(observe(model, image), model).images - image).abs().max() < 1e-6
    found = invert(observe(model, image, factor=-0.03, kind="delta"), model)
    assert found.status == "failed" and "delta of unknown scale" in found.error and (found.images == 0.5).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_an_update_of_unknown_length_gives_the_image_too_where_anything_tells_its_length(outputs, bias):
    model, image = chain(outputs, bias=bias), image_of()
    for factor in (0.01, 1.0, 3.0):
        result = invert(observe(model, image, factor=factor, scaled=False), model, outputs)
        if bias or outputs > 2:
            assert result.status == "ok" and psnr_db(result.images, image) > 100 and result.labels.tolist() == [1], (factor, result.error)
        else:
            assert result.status == "failed" and f"{outputs} output" in result.error


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Identity])
def test_other_activations_are_undone_too_and_relu_where_it_is_on(act):
    model, image = chain(act=act, bias=True, layers=((24, 3, 1, 1), (24, 3, 2, 1))), image_of()
    found = invert(observe(model, image), model)
    assert found.status == "ok" and found.loss < 1e-6 and (found.images - image).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, {"kernel_size": 2, "dilation": 2, "stride": 2},
                                     {"kernel_size": 3, "stride": 3}, {"kernel_size": 4, "stride": 3, "padding": 2}])  # fmt: skip
def test_every_geometry_of_a_convolution_is_solved(options):
    """Strides that leave pixels at the border out included: only the gradients' rank may then be missing."""
    torch.manual_seed(0)
    shape = (2, 9, 8)
    conv = nn.Conv2d(2, 40, **options)
    features = conv(torch.zeros(1, *shape)).numel()
    model = nn.Sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(features, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    image = image_of(shape)
    found = invert(observation := observe(model, image), model, 4, shape)
    first, second = rgap_ranks(observation, model, image_shape=shape, num_classes=4)
    seen = conv.weight.grad is None and torch.autograd.grad(conv(x := image.clone().requires_grad_()).sum(), x)[0] != 0
    assert first.rank == int(seen.sum()) and second.rank == second.unknowns
    assert ((found.images - image).abs()[seen] < 1e-6).all() and (found.images[~seen] == 0.5).all()


def test_ranks_are_those_of_the_matrices_written_out():
    """The layer's own map and its gradient's, as Jacobians, with the true k."""
    model = chain(4, layers=((5, 3, 2, 1), (6, 3, 1, 1)))
    observation = observe(model, image := image_of())
    ranks = rgap_ranks(observation, model, image_shape=SHAPE, num_classes=4)
    inputs, errors = [image, model[:2](image)], []
    for place in (0, 2):
        out = model[: place + 1](image).detach().requires_grad_()
        errors.append(torch.autograd.grad(loss_of(model[place + 1 :](out), torch.tensor([1])), out)[0])
    for rank, place, x, k in zip(ranks, (0, 2), inputs, errors, strict=True):
        conv = model[place]

        def forward(x, conv=conv):
            return conv(x).flatten()

        def gradient(x, conv=conv, k=k):
            weight = conv.weight.detach().requires_grad_()
            out = F.conv2d(x, weight, None, conv.stride, conv.padding)
            return torch.autograd.grad((out * k).sum(), weight, create_graph=True)[0].flatten()

        matrix = torch.cat([torch.autograd.functional.jacobian(one, x.detach()).flatten(1) for one in (forward, gradient)])
        matrix = matrix / matrix.norm(dim=1, keepdim=True)
        assert (rank.rank, rank.unknowns) == (int(torch.linalg.matrix_rank(matrix, rtol=1e-8)), x.numel())
        assert (rank.weight_equations, rank.gradient_equations) == (forward(x).numel(), conv.weight.numel())


def test_a_chain_with_too_few_equations_says_so_and_by_how_much():
    model, image = chain(4, layers=((3, 4, 4, 0), (8, 3, 1, 1))), image_of()
    observation = observe(model, image)
    ranks = rgap_ranks(observation, model, image_shape=SHAPE, num_classes=4)
    found = invert(observation, model, 4)
    short = ranks[0].unknowns - ranks[0].rank
    assert ranks[0].unknowns == 192 and short > 0 and ranks[1].rank == ranks[1].unknowns == 12
    assert found.status == "ok" and f"rank-deficient, index {-short}: 0 {ranks[0].rank} of 192" in found.error
    assert 5 < psnr_db(found.images, image) < 40  # its part in the solvable directions, and grey in the others
    assert rank_index([Rank("a", 10, 8, 0, 0), Rank("b", 6, 5, 0, 0)]) == pytest.approx(-2 - 2 / 3)


def test_weights_alone_do_where_they_are_many_and_gradients_of_a_layer_are_withheld():
    model, image = chain(layers=((12, 3, 1, 1), (16, 3, 1, 1))), image_of()
    observation = observe(model, image)
    update = {name: tensor for name, tensor in observation.update.items() if name != "0.weight"}
    assert (invert(dataclasses.replace(observation, update=update), model).images - image).abs().max() < 1e-6
    update = {name: tensor for name, tensor in observation.update.items() if name != "5.weight"}
    found = invert(dataclasses.replace(observation, update=update), model)
    assert found.status == "failed" and "'5.weight', where the recursion begins, is not released" in found.error


def test_a_twin_image_with_the_same_gradient_is_found_and_the_box_decides():
    """Without any bias LeakyReLU nets are homogeneous, so a multiple of the image may have the very same gradient."""
    model, image = chain(1, seed=3), image_of()
    with torch.no_grad():
        model[-1].weight *= -3 / float(model(image))  # an answer of −3 for label 0: confident enough to have a twin
    found = invert(observe(model, image, label=0), model, 1)
    twins = (found.restart_losses < 1e-8).nonzero().flatten().tolist()
    assert len(twins) == 2 and found.restart in twins and (found.images - image).abs().max() < 1e-6
    other = found.restart_images[sum(twins) - found.restart]
    inside = (other > 0.01) & (other < 0.99)
    ratio = (other / image)[inside]
    assert inside.any() and float(ratio.std() / ratio.mean()) < 1e-3 and abs(float(ratio.mean()) - 1) > 0.1


def test_a_normalised_input_and_a_split_without_perturbation_are_seen_through():
    statistics = {"input_mean": (0.4, 0.5, 0.6), "input_std": (0.2, 0.3, 0.1)}
    model = SplitModel(chain(dtype=torch.float32), cut="1", image_shape=SHAPE, num_classes=5, **statistics).double()
    image = image_of()
    found = invert(observe(model, image), model)
    assert found.status == "ok" and (found.images - image).abs().max() < 1e-6
    noisy = SplitModel(chain(dtype=torch.float32), cut="1", perturbation={}, image_shape=SHAPE, num_classes=5)
    reason = find_chain(noisy, [name for name, _ in noisy.named_parameters()], SHAPE)
    assert isinstance(reason, str) and "is changed on the way" in reason


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 5)], "'1' (GroupNorm) cannot be inverted"),
        ([nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5)], "'1' (MaxPool2d) cannot be inverted"),
        ([nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(216, 5)], "groups"),
        ([nn.Conv2d(3, 8, 3, padding="same"), nn.Flatten(), nn.Linear(512, 5)], "plain zero padding"),
        ([nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5), nn.Tanh()], "without an activation behind it"),
        ([nn.LeakyReLU(), nn.Tanh(), nn.Flatten(), nn.Linear(192, 5)], "'1' (Tanh) cannot be inverted"),
        ([nn.Flatten(2), nn.Linear(64, 5), nn.Flatten(), nn.Linear(15, 5)], "acts on several positions"),
    ],
)
def test_models_that_are_no_chain_fail_with_the_layer_that_breaks_it(layers, reason):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double()
    found = invert(observe(model, image_of()), model)
    assert found.status == "failed" and reason in found.error and (found.images == 0.5).all()
    with pytest.raises(InputError, match="no system to solve"):
        rgap_ranks(observe(model, image_of()), model, image_shape=SHAPE, num_classes=5)


def test_residuals_and_activations_outside_of_modules_are_noticed():
    class Residual(nn.Module):
        def __init__(self, middle, after):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, 5)
            self.middle, self.after = middle, after

        def forward(self, images):
            x = self.first(images)
            return self.after(self.head(self.middle(x, self.second(x)).flatten(1)))

    for middle, after, reason in (
        (lambda x, y: x + y, lambda z: z, "'head' is not given"),
        (lambda x, y: F.relu(y), lambda z: z, "'head' is not given"),
        (lambda x, y: y, torch.tanh, "is not the model's output"),
    ):
        model = Residual(middle, after).double()
        found = invert(observe(model, image_of()), model)
        assert found.status == "failed" and reason in found.error


def test_batches_broken_updates_and_other_losses_fail_with_their_reason_and_other_models_are_refused():
    model, image = chain(), image_of()
    good = observe(model, image, labels=torch.tensor([1]))
    batch = invert(observe(model, image.expand(3, -1, -1, -1)), model)
    assert batch.status == "failed" and "not of a batch of 3" in batch.error and batch.images.shape == (3, *SHAPE)
    for change, reason in (
        ({name: torch.zeros_like(t) for name, t in good.update.items()}, "is zero: it holds nothing"),
        ({"0.weight": torch.full_like(good.update["0.weight"], torch.nan)}, "not finite"),
        ({"7.weight": torch.zeros_like(good.update["7.weight"])}, "'7.weight' is zero"),
    ):
        found = invert(dataclasses.replace(good, update={**good.update, **change}), model)
        assert found.status == "failed" and reason in found.error and found.labels.tolist() == [1] and found.loss == torch.inf
    biased = chain(head_bias=True)
    unbiased = observe(biased, image)
    found = invert(dataclasses.replace(unbiased, update={**unbiased.update, "7.bias": torch.zeros(5)}), biased)
    assert found.status == "failed" and "'7.bias' is zero" in found.error
    squared = observe(model, image, loss=lambda logits, labels: (logits - 1).square().sum())
    assert "another loss than cross-entropy" in invert(squared, model).error
    with pytest.raises(InputError, match="not one of this model"):
        invert(good, chain(layers=((12, 4, 2, 2), (16, 3, 1, 1), (20, 3, 2, 1))))


def test_noise_on_the_update_shows_in_the_loss():
    model, image = chain(bias=True), image_of()
    observation, draw = observe(model, image), torch.Generator().manual_seed(0)
    size = 0.01 * torch.cat([t.flatten() for t in observation.update.values()]).square().mean().sqrt()
    noisy = {name: t + size * torch.randn(t.shape, generator=draw, dtype=DOUBLE) for name, t in observation.update.items()}
    found = invert(dataclasses.replace(observation, update=noisy), model)
    assert found.loss > 1e-3 and (found.status == "failed" or psnr_db(found.images, image) < 60)


def test_a_float32_gradient_is_enough_for_six_layers():
    shape = (3, 16, 16)
    model, image = cnn6(shape=shape, dtype=torch.float32), image_of(shape, dtype=torch.float32)
    found = invert(observe(model, image), model, shape=shape)
    assert found.status == "ok" and found.error == "" and psnr_db(found.images, image) > 49


def cifar(count):
    with np.load(Path(os.environ["GIDEF_DATA"]) / "cifar10.npz") as archive:
        images = torch.tensor(archive["train_images"][10 : 10 + count]).permute(0, 3, 1, 2).double() / 255
        return images, archive["train_labels"][10 : 10 + count, 0].tolist()


@pytest.mark.skipif(not os.environ.get("GIDEF_DATA"), reason="real images only with GIDEF_DATA")
@pytest.mark.parametrize("outputs", [1, 10])
def test_cifar_images_come_back_at_more_than_the_published_49_db(outputs):
    """cnn6 on the middle 16×16 pixels; Zhu and Blaschko report 49.0 dB on CIFAR-10, batch 1."""
    images, labels = cifar(1)
    shape, label = (3, 16, 16), labels[0] % max(outputs, 2)
    model, image = cnn6(outputs=outputs, shape=shape), images[:, :, 8:24, 8:24]
    found = invert(observe(model, image, label, labels=torch.tensor([label])), model, outputs, shape)
    assert found.status == "ok" and psnr_db(found.images, image) > 49


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GIDEF_DATA"), reason="real images only with GIDEF_DATA")
def test_whole_cifar_images_come_back_from_cnn6_at_more_than_the_published_49_db():
    images, labels = cifar(2)
    model = cnn6(outputs=10, shape=(3, 32, 32), dtype=torch.float32)
    for image, label in zip(images[:, None].float(), labels, strict=True):
        assert psnr_db(invert(observe(model, image, label), model, 10, (3, 32, 32)).images, image) > 49
