"""The cut: where it acts, which parameters lie before it, and that function transforms see through it. Random images."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from gidef.errors import InputError
from gidef.models import SmallNet, SplitModel, cuts, latent_norm, make_backbone
from gidef.rng import generator

torch.set_num_threads(1)

K = 4


def split(name: str = "small", shape: tuple[int, ...] = (3, 16, 16), *, norm: str = "group", options: dict | None = None, **arguments) -> SplitModel:
    backbone = make_backbone(name, num_classes=K, image_shape=shape, norm=norm, options=options)
    return SplitModel(backbone, image_shape=shape, num_classes=K, **arguments)


def tiny_vit(**arguments) -> SplitModel:
    return split("vit_tiny_patch16_224", options={"depth": 3, "embed_dim": 48, "num_heads": 3}, cut="blocks.1", **arguments)


def batch(model: SplitModel, count: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = generator(0, "batch")
    images = torch.rand((count, *model.image_shape), generator=draw, dtype=dtype)
    return images, torch.randn((count, *model.latent_shape), generator=draw, dtype=dtype)


def test_cut_of_the_small_net_equals_the_computation_by_hand():
    model = split(perturbation={"std_init": 0.7})
    images, noise = batch(model)
    outputs, net = model.run(images, noise), model.backbone
    m = latent_norm(net.blocks[1](net.blocks[0](images)))
    perturbed = m + 0.7 * noise
    logits = net.head(F.adaptive_avg_pool2d(net.blocks[2](perturbed), 2).flatten(1))
    for got, want in zip(outputs, (logits, m, torch.full((64, 1, 1), 0.7), perturbed), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(model(images, noise), outputs.logits)


def test_cut_of_resnet18_equals_the_computation_by_hand():
    model = split("resnet18", perturbation={}, cut="layer1")
    images, noise = batch(model)
    net = model.backbone
    z = net.layer1(net.act1(net.bn1(net.conv1(images))))
    perturbed = latent_norm(z) + noise
    logits = net.fc(net.global_pool(net.layer4(net.layer3(net.layer2(perturbed)))))
    torch.testing.assert_close(model(images, noise), logits)


def test_without_norm_and_perturbation_the_backbone_is_unchanged():
    model = split()
    images, _ = batch(model)
    outputs = model.run(images)
    assert outputs.std is None and torch.equal(outputs.latent, outputs.perturbed)
    untouched = make_backbone("small", num_classes=K, image_shape=model.image_shape)
    assert torch.equal(outputs.logits, untouched(images))


def test_latent_norm_without_a_perturbation_is_what_the_perturbed_model_does_without_noise():
    plain, noisy = split(latent_norm=True), split(perturbation={})
    images, _ = batch(plain)
    assert torch.equal(plain(images), noisy(images))


@pytest.mark.parametrize("make", [lambda: split(perturbation={"mean": True}), lambda: tiny_vit(perturbation={"mode": "conditional"})])
def test_no_noise_equals_strength_zero_above_a_floor_of_zero_bit_for_bit(make):
    model = make()
    images, noise = batch(model)
    without = model.run(images)
    model.perturbation.strength = model.perturbation.std_floor = 0.0
    silenced = model.run(images, noise)
    assert torch.equal(without.logits, silenced.logits) and torch.equal(without.perturbed, silenced.perturbed)


def test_noise_for_a_model_without_perturbation_is_refused():
    model = split()
    with pytest.raises(InputError, match="without a perturbation"):
        model(*batch(model))


@pytest.mark.parametrize("make", [lambda: split(perturbation={}), lambda: tiny_vit(perturbation={}), lambda: split("resnet18", perturbation={})])
def test_predictor_alone_gives_the_logits_of_the_whole(make):
    model = make()
    outputs = model.run(*batch(model))
    torch.testing.assert_close(model.predict(outputs.perturbed), outputs.logits)
    assert not torch.allclose(model.predict(-outputs.perturbed), outputs.logits)


def test_predictor_of_the_small_net_skips_the_encoder():
    model = split(perturbation={})
    model.backbone.blocks[0].register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
    model.predict(torch.zeros(2, *model.latent_shape))


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_parts_name_every_parameter_once(name):
    model = split(name, perturbation={"mean": True})
    names = [name for part in model.parts.values() for name in part]
    assert sorted(names) == sorted(dict(model.named_parameters()))


def test_parts_of_resnet18_cut_at_layer1():
    parts = split("resnet18", cut="layer1", perturbation={}).parts
    tops = {part: {name.split(".")[1] for name in names} for part, names in parts.items()}
    assert tops == {"encoder": {"conv1", "bn1", "layer1"}, "perturbation": {"level"}, "predictor": {"layer2", "layer3", "layer4", "fc"}}


def test_position_and_class_tokens_of_a_vit_belong_to_its_encoder():
    parts = tiny_vit(perturbation={}).parts
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.blocks.1.mlp.fc2.bias"} <= set(parts["encoder"])
    assert {"backbone.blocks.2.norm1.weight", "backbone.norm.weight", "backbone.head.bias"} <= set(parts["predictor"])


def test_only_the_encoder_feels_a_loss_on_the_latent():
    model = split("resnet18", perturbation={})
    model.run(batch(model)[0]).perturbed.square().sum().backward()
    felt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert felt == set(model.parts["encoder"])


def test_probing_leaves_gradients_flags_modes_and_running_statistics_alone():
    backbone = make_backbone("resnet18", num_classes=K, image_shape=(3, 16, 16), norm="keep")
    backbone.fc.requires_grad_(False)
    before = copy.deepcopy(backbone.state_dict())
    model = SplitModel(backbone, image_shape=(3, 16, 16), num_classes=K)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert backbone.training and not backbone.fc.weight.requires_grad and all(p.grad is None for p in backbone.parameters())
    assert "backbone.fc.weight" in model.parts["predictor"]


@pytest.mark.parametrize("make", [lambda: split(perturbation={"mode": "conditional", "mean": True}), lambda: tiny_vit(perturbation={})])
def test_batched_gradient_of_a_gradient_equals_a_loop_of_autograd(make):
    """In float64: the derivative of a gradient's squared norm by images and noise, as attacks take it, over 3 observations."""
    model = make().double().requires_grad_(False)
    params, labels = dict(model.named_parameters()), torch.tensor([0, 1])
    images, noise = (t.unflatten(0, (3, 2)) for t in batch(model, 6, torch.float64))

    def objective(params, images, noise):
        released = grad(lambda p: F.cross_entropy(functional_call(model, p, (images, noise)), labels))(params)
        return sum(g.square().sum() for g in released.values())

    got = vmap(grad(objective, argnums=(1, 2)), in_dims=(None, 0, 0))(params, images, noise)
    slow = copy.deepcopy(model).requires_grad_(True)
    for k in range(3):
        x, e = images[k].clone().requires_grad_(), noise[k].clone().requires_grad_()
        released = torch.autograd.grad(F.cross_entropy(slow(x, e), labels), list(slow.parameters()), create_graph=True)
        want = torch.autograd.grad(sum(g.square().sum() for g in released), (x, e))
        for fast, loop in zip(got, want, strict=True):
            assert loop.abs().max() > 0
            torch.testing.assert_close(fast[k], loop, rtol=1e-9, atol=1e-12)


def test_the_forward_pass_is_one_graph_for_the_compiler():
    model = split(perturbation={})
    images, noise = batch(model)
    compiled = torch.compile(model.run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, noise).perturbed, model.run(images, noise).perturbed)


def test_state_of_a_call_is_cleared_even_when_the_backbone_fails():
    model = split(perturbation={})
    images, noise = batch(model)
    with pytest.raises(RuntimeError):
        model(images[:, :1], noise)
    call = model._call
    assert (call.active, call.noise, call.replacement, call.seen) == (False, None, None, None)


def test_a_parameter_given_as_noise_does_not_become_one_of_the_models():
    model = split(perturbation={})
    names = list(dict(model.named_parameters()))
    images, noise = batch(model)
    model(images, nn.Parameter(noise)).sum().backward()
    assert list(dict(model.named_parameters())) == names and set(model.state_dict()) == set(names)


def test_hooks_of_a_deep_copy_refer_to_the_copy():
    model = split(perturbation={})
    images, noise = batch(model)
    before = model(images, noise)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.perturbation.level.fill_(3.0)
    assert not torch.equal(twin(images, noise), before) and torch.equal(model(images, noise), before)
    hooks = [h for m in twin.modules() for h in m._forward_hooks.values()]
    assert [h.__self__ for h in hooks] == [twin]


def test_copies_work_in_threads_without_noticing_each_other():
    model = split(perturbation={})
    images, noise = batch(model, 8)
    labels = torch.arange(8) % K

    def gradient(worker: int) -> list[torch.Tensor]:
        own, results = copy.deepcopy(model).requires_grad_(False), []
        for step in range(10):
            params = {name: p * (1 + worker + 0.1 * step) for name, p in own.named_parameters()}
            results.append(grad(lambda p: F.cross_entropy(functional_call(own, p, (images, noise)), labels))(params)["backbone.blocks.0.conv.weight"])
        return results

    serial = [gradient(worker) for worker in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for alone, together in zip(serial, pool.map(gradient, range(2)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_second_split_of_a_backbone_takes_the_first_ones_place():
    first = split(perturbation={})
    second = SplitModel(first.backbone, cut="blocks.0", perturbation=None, image_shape=(3, 16, 16), num_classes=K)
    assert [h.__self__ for m in second.modules() for h in m._forward_hooks.values()] == [second]


def test_images_are_shifted_and_scaled_per_channel_when_asked():
    plain, shifted = split(), split(input_mean=(0.1, 0.2, 0.3), input_std=(0.5, 0.6, 0.7))
    images, _ = batch(plain)
    by_hand = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(shifted(images), plain(by_hand))
    assert set(shifted.state_dict()) == set(plain.state_dict())
    with pytest.raises(InputError, match="input_std"):
        split(input_std=(1.0, 0.0, 1.0))


def test_an_unknown_cut_is_refused_with_near_matches_and_valid_names():
    with pytest.raises(InputError, match=r"'layer9'.*Did you mean.*'layer.'.*Valid cuts are .*layer1\.0"):
        split("resnet18", cut="layer9")


def test_a_cut_inside_a_residual_branch_is_refused_because_the_image_goes_around_it():
    with pytest.raises(InputError, match="bypassed"):
        split("resnet18", cut="layer1.0.conv2")


def test_a_cut_that_is_passed_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, K)

        def forward(self, x):
            return self.head(self.mix(self.mix(x)).mean((2, 3)))

    with pytest.raises(InputError, match="passed 2 times"):
        SplitModel(Twice(), cut="mix", image_shape=(3, 8, 8), num_classes=K)


def test_wrong_class_counts_and_image_sizes_are_refused():
    with pytest.raises(InputError, match=r"expected \(2, 7\)"):
        SplitModel(SmallNet(K, 3), image_shape=(3, 16, 16), num_classes=7)
    with pytest.raises(InputError, match="another image size"):
        SplitModel(SmallNet(K, 3), image_shape=(1, 16, 16), num_classes=K)


def test_a_perturbation_made_for_another_latent_is_refused():
    layer = split(perturbation={}).perturbation
    with pytest.raises(InputError, match=r"\(64, 4, 4\)"):
        split(cut="blocks.0", perturbation=layer)


@pytest.mark.parametrize("cut", SmallNet.cuts)
def test_every_listed_cut_of_the_small_net_works(cut):
    model = split(cut=cut, perturbation={})
    outputs = model.run(*batch(model))
    torch.testing.assert_close(model.predict(outputs.perturbed), outputs.logits)


def test_every_listed_cut_of_resnet18_works():
    backbone = make_backbone("resnet18", num_classes=K, image_shape=(3, 16, 16))
    for cut in cuts(backbone):
        SplitModel(backbone, cut=cut, image_shape=(3, 16, 16), num_classes=K)


def test_a_cut_before_a_module_takes_what_goes_into_it():
    model = split(cut="before:head", perturbation={"std_init": 0.7})
    images, noise = batch(model)
    net = model.backbone
    m = latent_norm(F.adaptive_avg_pool2d(net.blocks(images), 2).flatten(1))
    torch.testing.assert_close(model.run(images, noise).perturbed, m + 0.7 * noise)
    torch.testing.assert_close(model(images, noise), net.head(m + 0.7 * noise))
    torch.testing.assert_close(model.predict(m + 0.7 * noise), model(images, noise))
    assert model.parts["predictor"] == ("backbone.head.weight", "backbone.head.bias")
    twin = copy.deepcopy(model)
    hooks = [h for m in twin.modules() for h in m._forward_pre_hooks.values()]
    assert [h.__self__ for h in hooks] == [twin] and torch.equal(twin(images, noise), model(images, noise))
    second = SplitModel(model.backbone, cut="blocks.0", image_shape=(3, 16, 16), num_classes=K)
    assert not any(m._forward_pre_hooks for m in second.modules())


@pytest.mark.parametrize(("name", "cut", "found"), [
    ("small", "before:classifier", "before:head"), ("small", "stage:2", "blocks.2"), ("resnet18", "before:classifier", "before:fc"),
    ("resnet18", "stage:0", "layer1"),
])  # fmt: skip
def test_places_that_every_net_has_are_found_by_their_own_names(name, cut, found):
    assert split(name, cut=cut).cut == found


@pytest.mark.parametrize(("cut", "wrong"), [("stage:3", "stages 0 to 2"), ("stage:x", "stages 0 to 2"), ("before:heed", "'head'")])
def test_places_that_a_net_lacks_are_refused(cut, wrong):
    with pytest.raises(InputError, match=wrong):
        split(cut=cut)
