"""Closed forms: linear layers, the first layer of a ViT, and the choice between them. Images are made up unless GIDEF_DATA names a folder."""

import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from gidef.attack.analytic import (
    analytic,
    april_tokens,
    can_invert,
    input_candidates,
    invert_linear,
    invert_patches,
    layer_inputs,
    linear_inputs,
    patch_inputs,
    pixels_of_tokens,
    separate_inputs,
)
from gidef.attack.analytic.april import find_patch_layer
from gidef.errors import InputError
from gidef.models import SplitModel, make_backbone
from gidef.types import Observation

SHAPE, CLASSES = (3, 8, 8), 5
SETTING = {"image_shape": SHAPE, "num_classes": CLASSES}
DOUBLE = torch.float64


def images_of(size, shape=SHAPE, seed=0, dtype=DOUBLE):
    return torch.rand(size, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(act=nn.ReLU, width=64, dtype=DOUBLE, seed=0, bias=True, classes=CLASSES):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width, bias=bias), act(), nn.Linear(width, classes)).to(dtype)


def observe(model, images, labels=None, *noise, factor=1.0, **fields):
    """The released update: factor times the gradient of the cross-entropy."""
    labels = torch.arange(len(images)) % CLASSES if labels is None else labels
    params = dict(model.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(model(images, *noise), labels), list(params.values()), allow_unused=True)
    update = {n: factor * (torch.zeros_like(p) if g is None else g) for (n, p), g in zip(params.items(), found, strict=True)}
    return Observation({n: p.detach() for n, p in params.items()}, update, len(images), **{"labels": labels, **fields})


def psnr_db(found, truth):
    return float(-10 * (found.double().clamp(0, 1) - truth.double()).square().mean().clamp(min=1e-14).log10())


def nearest_psnr_db(found, truth):
    """Per true image, of the reconstruction that is nearest to it."""
    return [max(psnr_db(one, image) for one in found) for image in truth]


# one biased linear layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize(("factor", "kind"), [(1.0, "gradient"), (-0.03, "delta")])
def test_every_biased_layer_tells_its_input_for_one_image(dtype, tolerance, factor, kind):
    model, images = mlp(nn.LeakyReLU, dtype=dtype), images_of(1, dtype=dtype)
    observation = observe(model, images, factor=factor, kind=kind)
    for weight, bias, expected in (("1.weight", "1.bias", images.flatten()), ("3.weight", "3.bias", model[:3](images)[0])):
        found = linear_inputs(observation.update, weight, bias)
        assert found.dtype == DOUBLE and (found - expected).abs().max() < tolerance
        assert torch.equal(layer_inputs(observation, weight, bias), found[None])


def test_the_input_of_a_batch_is_the_mean_weighted_as_documented():
    model, images = mlp(nn.Tanh), images_of(3)
    observation = observe(model, images)
    hidden = model[1](images.flatten(1)).detach().requires_grad_()
    delta = torch.autograd.grad(F.cross_entropy(model[3](hidden.tanh()), torch.arange(3)), hidden)[0]
    weights = [sum(delta[i, j] * delta[:, j].sum() for j in range(64)) for i in range(3)]
    expected = sum(w * image.flatten() for w, image in zip(weights, images, strict=True)) / sum(weights)
    torch.testing.assert_close(linear_inputs(observation.update, "1.weight", "1.bias"), expected)
    torch.testing.assert_close(layer_inputs(observation, "1.weight", "1.bias"), expected.expand(3, -1))


def test_a_neuron_that_fires_for_one_image_only_gives_that_image_and_agreement_comes_first():
    x = images_of(3).flatten(1)
    delta = torch.tensor([[0.9, 0.0, 0.0], [0.2, 0.0, -0.3], [0.0, 0.4, 0.0], [0.5, 0.1, 0.2], [0.0, -0.1, 0.0], [0.0, 0.0, 0.0]], dtype=DOUBLE)
    update = {"weight": delta @ x, "bias": delta.sum(1)}
    candidates, repeats = input_candidates(update, "weight", "bias")
    assert repeats.tolist() == [2, 1, 1, 1]
    torch.testing.assert_close(candidates[0], x[1])
    torch.testing.assert_close(candidates[1], x[0])  # the largest ∂L/∂b of those without repeats


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", [2, 4, 7])
def test_behind_relu_a_whole_batch_is_separated_exactly(size, dtype, tolerance):
    model, images = mlp(width=256, dtype=dtype, classes=10), images_of(size, dtype=dtype)
    observation = observe(model, images, torch.arange(size))
    found = separate_inputs(observation.update, "1.weight", "1.bias", size, params=observation.params)
    assert found.shape == (size, 192)
    assert torch.cdist(found, images.flatten(1).double()).amin(0).max() < tolerance
    result = invert_linear(observation, model, image_shape=SHAPE, num_classes=10)
    assert result.status == "ok" and result.loss < 1e-5 and min(nearest_psnr_db(result.images, images)) > 60


def test_images_that_repeat_are_found_once_and_fill_the_batch():
    model, images = mlp(width=128), images_of(2)[[0, 1, 0, 0]]
    observation = observe(model, images, torch.tensor([1, 2, 1, 1]))
    assert separate_inputs(observation.update, "1.weight", "1.bias", 4, params=observation.params).shape == (2, 192)
    result = invert_linear(observation, model, **SETTING)
    assert result.images.shape == (4, *SHAPE) and min(nearest_psnr_db(result.images, images)) > 100
    same = observe(model, images[:1].expand(4, -1, -1, -1), torch.tensor([0, 1, 2, 3]))
    assert min(psnr_db(one, images[0]) for one in invert_linear(same, model, **SETTING).images) > 100


@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.GELU])
def test_without_relu_a_batch_is_not_claimed_to_be_exact(act):
    model, images = mlp(act), images_of(4)
    observation = observe(model, images)
    assert separate_inputs(observation.update, "1.weight", "1.bias", 4, params=observation.params, tries=5) is None
    result = invert_linear(observation, model, **SETTING)
    assert result.status == "ok" and result.loss == 1.0 and result.images.shape == (4, *SHAPE)
    assert max(nearest_psnr_db(result.images, images)) > 14  # the neuron that tells most; grey is at 10.8


def test_candidates_of_a_batch_too_large_to_separate_contain_images_that_neurons_saw_alone():
    """Neurons that fire for few images, as rare positive biases make them."""
    model, images = mlp(width=512), images_of(14)
    with torch.no_grad():
        model[1].bias -= torch.quantile(model[1](images.flatten(1)), 0.93, dim=0)
    result = invert_linear(observe(model, images), model, **SETTING)
    exact = sum(db > 100 for db in nearest_psnr_db(result.images, images))
    assert exact >= 12 and result.loss <= 1 - exact / 14 + 0.5


def test_a_normalised_image_behind_a_wrapper_is_given_back_in_the_box_whatever_noise_the_latent_got():
    statistics = {"input_mean": (0.4, 0.5, 0.6), "input_std": (0.2, 0.3, 0.1)}
    model = SplitModel(mlp().float(), cut="2", perturbation={}, image_shape=SHAPE, num_classes=CLASSES, **statistics).double()
    images = images_of(1)
    result = analytic(observe(model, images, None, torch.randn(1, 64, dtype=DOUBLE)), model, **SETTING)
    assert result.status == "ok" and (result.images - images).abs().max() < 1e-6 and result.labels.tolist() == [0]


def test_zero_and_broken_updates_fail_with_their_reason_and_other_models_are_refused():
    model = mlp()
    good = observe(model, images_of(1), labels=torch.tensor([3]))
    for name, value, reason in (
        ("1.weight", torch.nan, "not finite"),
        ("1.bias", torch.inf, "not finite"),
        ("1.bias", 0.0, "'1.bias' is zero"),
        (None, 0.0, "is zero: it holds nothing"),
    ):
        update = {n: torch.full_like(t, value) if name in (n, None) else t for n, t in good.update.items()}
        found = analytic(dataclasses.replace(good, update=update), model, **SETTING)
        assert found.status == "failed" and reason in found.error and (found.images == 0.5).all() and found.images.shape == (1, *SHAPE)
        assert found.loss == torch.inf and found.labels.tolist() == [3]
        hidden = analytic(dataclasses.replace(good, update=update, labels=None), model, **SETTING)
        assert hidden.status == "failed" and hidden.labels.shape == (1,)
    for wrong in ({"1.weight": torch.zeros(64, 191)}, {"other.weight": torch.zeros(3)}):
        with pytest.raises(InputError, match="not one of this model"):
            analytic(dataclasses.replace(good, update={**good.update, **wrong}), model, **SETTING)
        with pytest.raises(InputError, match="in its params"):
            analytic(dataclasses.replace(good, params={**good.params, **wrong}), model, **SETTING)
    with pytest.raises(InputError, match="granted labels"):
        analytic(dataclasses.replace(good, labels=torch.tensor([CLASSES])), model, **SETTING)
    with pytest.raises(InputError, match="no tensor"):
        analytic(dataclasses.replace(good, update={}), model, **SETTING)
    with pytest.raises(InputError, match="num_examples=0"):
        analytic(dataclasses.replace(good, num_examples=0), model, **SETTING)
    with pytest.raises(InputError, match="image_shape"):
        analytic(good, model, image_shape=(8, 8), num_classes=CLASSES)
    with pytest.raises(InputError, match="cannot take images"):
        analytic(good, model, image_shape=(3, 9, 9), num_classes=CLASSES)


def test_layers_that_are_not_there_or_no_linear_ones_are_refused_by_name():
    update = observe(mlp(), images_of(1)).update
    with pytest.raises(InputError, match=r"'9\.weight' is not released"):
        linear_inputs(update, "9.weight", "1.bias")
    with pytest.raises(InputError, match="are no linear layer's"):
        linear_inputs(update, "1.weight", "3.bias")
    with pytest.raises(InputError, match="zero, or one of the two is not finite"):
        linear_inputs({"w": torch.ones(3, 2), "b": torch.zeros(3)}, "w", "b")


def test_a_linear_layer_without_a_bias_or_not_on_the_image_is_not_used():
    found = analytic(observe(model := mlp(nn.GELU, bias=False), images_of(1)), model, **SETTING)
    assert found.status == "failed" and "has no bias" in found.error
    head = observe(model := mlp(nn.GELU), images_of(1))
    found = analytic(dataclasses.replace(head, update={n: head.update[n] for n in ("3.weight", "3.bias")}), model, **SETTING)
    assert found.status == "failed" and "not both released" in found.error


# the first layer of a vision transformer


def vit(name="vit_tiny_patch16_224", dtype=DOUBLE, seed=0, **options):
    torch.manual_seed(seed)
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return timm.create_model(name, **{**tiny, **options}).to(dtype).eval()


VIT_SHAPE = (3, 16, 16)
VIT_SETTING = {"image_shape": VIT_SHAPE, "num_classes": CLASSES}
FAMILIES = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "two tokens": {"name": "deit_tiny_distilled_patch16_224"},
    "positions of patches only": {"name": "deit3_small_patch16_224"},
    "registers": {"reg_tokens": 4},
    "norm before the blocks": {"pre_norm": True},
    "no bias of the projection": {"pre_norm": True, "qkv_bias": False},
}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_one_image_is_read_off_a_vit_s_first_layer_exactly(options):
    model, images = vit(**options), images_of(1, VIT_SHAPE)
    observation = observe(model, images)
    found = invert_patches(observation, model, **VIT_SETTING)
    assert found.status == "ok" and found.loss < 1e-10 and (found.images - images).abs().max() < 1e-6
    delta = {name: -0.05 * tensor for name, tensor in observation.update.items()}
    changed = analytic(dataclasses.replace(observation, update=delta, kind="delta"), model, **VIT_SETTING)
    assert (changed.images - images).abs().max() < 1e-6


def test_a_vit_s_patches_are_the_solution_of_the_normal_equations():
    model, images = vit(), images_of(1, VIT_SHAPE)
    update = observe(model, images).update
    gradient, rows = update["pos_embed"][0, 1:], update["patch_embed.proj.weight"].flatten(1)
    solved = patch_inputs(rows, gradient)
    assert solved.rank == 16 and solved.residual < 1e-12
    torch.testing.assert_close(solved.inputs, torch.linalg.solve(gradient @ gradient.T, gradient @ rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solved.inputs, F.unfold(images, 4, stride=4)[0].T, rtol=0, atol=1e-8)


def test_noise_on_the_latent_and_a_normalised_input_do_not_hide_a_vit_s_image():
    statistics = {"input_mean": (0.4, 0.5, 0.6), "input_std": (0.2, 0.3, 0.1)}
    model = SplitModel(vit(dtype=torch.float32), cut="blocks.0", perturbation={}, image_shape=VIT_SHAPE, num_classes=CLASSES, **statistics).double()
    images = images_of(1, VIT_SHAPE)
    noise = 3 * torch.randn(1, *model.latent_shape, dtype=DOUBLE)
    found = analytic(observe(model, images, None, noise), model, **VIT_SETTING)
    assert found.status == "ok" and (found.images - images).abs().max() < 1e-6


def test_in_float32_a_vit_s_image_is_recovered_beyond_what_an_eye_can_tell():
    model, images = vit(dtype=torch.float32), images_of(1, VIT_SHAPE, dtype=torch.float32)
    assert psnr_db(analytic(observe(model, images), model, **VIT_SETTING).images, images) > 60


def test_a_vit_narrower_than_its_patches_are_many_leaves_directions_open_and_stays_at_grey_there():
    model, images = vit(embed_dim=12, num_heads=2), images_of(1, VIT_SHAPE)
    observation = observe(model, images)
    layer = find_patch_layer(model, list(observation.update), VIT_SHAPE)
    solved = patch_inputs(observation.update[layer.weight], observation.update[layer.position][0, 1:])
    assert solved.rank < 12 < 16
    found = invert_patches(observation, model, **VIT_SETTING)
    assert found.status == "ok" and 11 < psnr_db(found.images, images) < 40


def test_a_noisy_gradient_is_solved_in_fewer_directions_and_better_for_it():
    model, images = vit(embed_dim=64), images_of(1, VIT_SHAPE)
    update, draw = observe(model, images).update, torch.Generator().manual_seed(0)
    size = 0.02 * update["pos_embed"].square().mean().sqrt()
    noisy = [t + size * torch.randn(t.shape, generator=draw, dtype=DOUBLE) for t in (update["patch_embed.proj.weight"], update["pos_embed"])]
    truth = F.unfold(images, 4, stride=4)[0].T
    grey = torch.full_like(truth, 0.5)
    solved = patch_inputs(noisy[0], noisy[1][0, 1:], start=grey)
    everything = grey + torch.linalg.pinv(noisy[1][0, 1:].T) @ (noisy[0].flatten(1) - noisy[1][0, 1:].T @ grey)
    assert 0 < solved.rank < 16
    assert (solved.inputs - truth).norm() < 0.8 * (everything - truth).norm() and (solved.inputs - truth).norm() < (grey - truth).norm()


def test_a_batch_gives_one_blend_in_the_box_and_a_residual_that_tells():
    model, images = vit(embed_dim=64), images_of(2, VIT_SHAPE)
    found = analytic(observe(model, images), model, **VIT_SETTING)
    assert found.status == "ok" and torch.equal(found.images[0], found.images[1]) and found.loss > 1e-3
    assert not can_invert(model, dict(model.named_parameters()), image_shape=VIT_SHAPE, num_examples=2).exact


def test_zero_and_broken_gradients_of_a_vit_fail_with_their_reason():
    model = vit()
    good = observe(model, images_of(1, VIT_SHAPE))
    for name, value, reason in (("pos_embed", torch.nan, "not finite"), ("pos_embed", 0.0, "zero"), ("patch_embed.proj.weight", 0.0, "zero")):
        found = analytic(dataclasses.replace(good, update={**good.update, name: torch.full_like(good.update[name], value)}), model, **VIT_SETTING)
        assert found.status == "failed" and reason in found.error and name in found.error and (found.images == 0.5).all()
    rows = good.update["pos_embed"].clone()
    rows[:, 1:] = 0
    found = analytic(dataclasses.replace(good, update={**good.update, "pos_embed": rows}), model, **VIT_SETTING)
    assert found.status == "failed" and "patches' rows" in found.error
    with pytest.raises(InputError, match=r"expected \(D, …\) and \(N, D\)"):
        patch_inputs(torch.zeros(8, 3), torch.zeros(4, 7))


def test_transformers_without_learned_positions_on_the_patches_are_told_apart():
    for model, shape in (
        (vit(pos_embed="none"), VIT_SHAPE),
        (timm.create_model("mixer_s32_224", img_size=32, num_classes=CLASSES), (3, 32, 32)),
    ):
        found = can_invert(model, dict(model.named_parameters()), image_shape=shape)
        assert not found and "without a learned position" in found.reason

    class Interpolated(nn.Module):
        """Positions stretched to the grid: their gradient is not the tokens'."""

        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, 32, 4, stride=4)
            self.pos = nn.Parameter(torch.randn(1, 16, 32))
            self.head = nn.Linear(32, CLASSES)

        def forward(self, images):
            tokens = self.proj(images).flatten(2).transpose(1, 2) + self.pos.flip(1).cumsum(1)
            return self.head(tokens.tanh().mean(1))

    torch.manual_seed(0)
    found = can_invert(model := Interpolated(), dict(model.named_parameters()), image_shape=VIT_SHAPE)
    assert not found and "is not that of the patch tokens" in found.reason
    model = vit()
    names = set(dict(model.named_parameters())) - {"pos_embed"}
    assert "'pos_embed' is not released" in can_invert(model, names, image_shape=VIT_SHAPE).reason


def test_april_s_own_form_holds_without_a_norm_and_a_residual():
    torch.manual_seed(0)
    weight, position = torch.randn(24, 3, 2, 2, dtype=DOUBLE), torch.randn(1, 16, 24, dtype=DOUBLE)
    params = {
        "q": 0.2 * torch.randn(8, 24, dtype=DOUBLE),
        "k": 0.2 * torch.randn(8, 24, dtype=DOUBLE),
        "v": torch.randn(24, 24, dtype=DOUBLE),
        "pos": position,
    }
    params = {name: tensor.requires_grad_() for name, tensor in params.items()}
    bias, head, images = torch.randn(24, dtype=DOUBLE), torch.randn(5, 24, dtype=DOUBLE), images_of(1)
    tokens = F.conv2d(images, weight, bias, stride=2).flatten(2).transpose(1, 2) + params["pos"]
    q, k, v = (tokens @ params[name].T for name in "qkv")
    attended = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v
    loss = F.cross_entropy(attended.tanh().mean(1) @ head.T, torch.tensor([2]))
    update = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    found = april_tokens(params, update, weights=("q", "k", "v"), position="pos")
    torch.testing.assert_close(found, tokens[0].detach(), rtol=1e-6, atol=1e-6)
    patches = pixels_of_tokens(found, weight, bias, position[0].detach())
    torch.testing.assert_close(patches, F.unfold(images, 2, stride=2)[0].T, rtol=1e-6, atol=1e-6)


# the choice


def test_the_method_is_chosen_by_architecture_and_batch_and_reasons_are_given_for_none():
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(512, CLASSES))
    small = SplitModel(make_backbone("small", num_classes=CLASSES, image_shape=SHAPE), image_shape=SHAPE, num_classes=CLASSES)
    for model, shape, size, method in (
        (vit(), VIT_SHAPE, 8, "patches"),
        (mlp(), SHAPE, 8, "linear"),
        (chain, SHAPE, 1, "rgap"),
        (chain, SHAPE, 2, ""),
        (small, SHAPE, 1, ""),
    ):
        found = can_invert(model, dict(model.named_parameters()), image_shape=shape, num_examples=size)
        assert found.method == method and bool(found) == bool(method) and found.exact == (bool(method) and size == 1)
        assert bool(found.reason) != bool(method)
    failed = analytic(observe(small, images_of(2, dtype=torch.float32)), small, **SETTING)
    assert failed.status == "failed" and (failed.images == 0.5).all() and failed.images.shape == (2, *SHAPE)
    for part in ("as a transformer", "as a linear layer", "as a chain", "GroupNorm", "blocks.0.norm"):
        assert part in failed.error
    found = analytic(observe(chain, images_of(1, dtype=torch.float32)), chain, **SETTING)
    assert found.status == "ok" and found.loss < 1e-5


def test_an_attack_changes_neither_the_model_nor_the_observation():
    model = vit().train()
    model.requires_grad_(False)
    observation = observe(copy.deepcopy(model).requires_grad_(), images_of(1, VIT_SHAPE))
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(observation)
    analytic(observation, model, **VIT_SETTING)
    assert model.training and not any(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(kept.update[name], tensor) for name, tensor in observation.update.items())


def test_labels_that_are_not_granted_are_recovered():
    model = vit(dtype=torch.float32)
    observation = dataclasses.replace(observe(model, images_of(1, VIT_SHAPE, dtype=torch.float32), torch.tensor([3])), labels=None)
    assert analytic(observation, model, **VIT_SETTING).labels.tolist() == [3]


@pytest.mark.skipif(not os.environ.get("GIDEF_DATA"), reason="real images only with GIDEF_DATA")
@pytest.mark.parametrize("file", ["bloodmnist_resplit.npz", "cifar10.npz", "pneumoniamnist.npz"])
def test_real_images_are_read_off_a_perturbed_vit_in_float32(file):
    path = Path(os.environ["GIDEF_DATA"]) / file
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with np.load(path) as archive:
        image = torch.tensor(archive["train_images"][3]).float() / 255
    image = image[None, None] if image.ndim == 2 else image.permute(2, 0, 1)[None]
    shape = tuple(image.shape[1:])
    net = make_backbone("vit_tiny_patch16_224", num_classes=10, image_shape=shape)
    model = SplitModel(net, perturbation={}, image_shape=shape, num_classes=10).eval()
    observation = observe(model, image, torch.tensor([4]), torch.randn(1, *model.latent_shape))
    found = analytic(observation, model, image_shape=shape, num_classes=10)
    assert found.status == "ok" and psnr_db(found.images, image) > 60
