"""Backbones by name, at image sizes they were not made for; random images and weights."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import nn

from gidef.errors import InputError
from gidef.models import SmallNet, SplitModel, decoder_for, default_cut, has_batch_statistics, make_backbone
from gidef.rng import generator

torch.set_num_threads(1)

K = 5


def backbone(name, shape=(3, 32, 32), **arguments) -> nn.Module:
    return make_backbone(name, num_classes=K, image_shape=shape, **arguments)


ODD_GRIDS = tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3]) < (1, 0, 31)
"""Whether this timm gives Swin windows of 0 where a grid of patches is odd."""
CASES = [  # name, cut, image shape, latent, channel_dim
    ("small", "blocks.1", (3, 28, 28), (64, 7, 7), 1),
    ("small", "blocks.1", (3, 32, 32), (64, 8, 8), 1),
    ("resnet18", "layer1", (1, 28, 28), (64, 28, 28), 1),
    ("resnet50", "layer2", (3, 32, 32), (512, 16, 16), 1),
    ("convnext_tiny", "stages.0", (3, 32, 32), (96, 16, 16), 1),
    ("vit_tiny_patch16_224", "blocks.2", (3, 32, 32), (65, 192), -1),
    ("vit_small_patch16_224", "blocks.2", (3, 28, 28), (50, 384), -1),
    pytest.param("swin_tiny_patch4_window7_224", "layers.0", (3, 28, 28), (7, 7, 96), -1, marks=pytest.mark.skipif(ODD_GRIDS, reason="timm before 1.0.31")),
    ("swin_tiny_patch4_window7_224", "layers.1", (3, 32, 32), (4, 4, 192), -1),
]


@pytest.mark.parametrize(("name", "cut", "shape", "latent", "channel_dim"), CASES)
def test_backbone_is_split_trains_a_step_with_noise_and_its_latent_is_decoded(name, cut, shape, latent, channel_dim):
    model = SplitModel(backbone(name, shape), cut=cut, perturbation={}, image_shape=shape, num_classes=K)
    assert (model.latent_shape, model.channel_dim) == (latent, channel_dim)
    assert sorted(n for names in model.parts.values() for n in names) == sorted(n for n, _ in model.named_parameters())
    assert all(model.parts.values())
    draw = generator(0, "batch")
    images, labels = torch.rand((2, *shape), generator=draw), torch.tensor([0, 1])
    noise = model.perturbation.draw(2, generator=draw)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = F.cross_entropy(model(images, noise), labels)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimiser.step()
    outputs = model.run(images, noise)
    assert F.cross_entropy(outputs.logits, labels) < before
    decoder = decoder_for(model.latent_shape, model.channel_dim, shape, size="loop")
    assert decoder(outputs.perturbed).shape == images.shape


@pytest.mark.parametrize(
    ("name", "cut"),
    [("resnet18", "layer1"), ("convnext_atto", "stages.0"), ("vit_tiny_patch16_224", "blocks.2"), ("regnety_002", "s1"), ("mobilenetv3_small_050", "blocks.0")],
)
def test_default_cut_is_an_early_stage_or_the_third_block(name, cut):
    assert default_cut(backbone(name)) == cut


def test_train_and_eval_mode_agree_and_dropouts_are_off_even_in_swin():
    net = backbone("swin_tiny_patch4_window7_224", options={"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)})
    images = torch.rand((2, 3, 32, 32), generator=generator(0))
    assert torch.equal(net.train()(images), net.eval()(images))
    asked = backbone("vit_tiny_patch16_224", options={"depth": 1, "drop_rate": 0.5})
    assert not torch.equal(asked.train()(images), asked.eval()(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "regnety_002"])
def test_batch_norms_become_group_norms_whose_groups_divide_the_channels(name):
    kept, grouped = backbone(name, norm="keep"), backbone(name)
    assert has_batch_statistics(kept) and not has_batch_statistics(grouped)
    assert [n for n, _ in kept.named_parameters()] == [n for n, _ in grouped.named_parameters()]
    norms = [m for m in grouped.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in kept.modules()) > 0
    assert all(m.num_groups == math.gcd(32, m.num_channels) for m in norms)


def test_group_norm_keeps_affine_parameters_and_the_activation_of_timms_norm():
    class Own(nn.Module):
        def __init__(self, num_classes, image_shape):
            super().__init__()
            self.norm, self.head = BatchNormAct2d(48, act_layer=nn.SiLU), nn.Linear(48, num_classes)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            return self.head(self.norm(x).mean((2, 3)))

    norm = backbone(Own, (48, 8, 8)).norm
    x = torch.randn((2, 48, 8, 8), generator=generator(0))
    assert norm.weight.std() > 0.5
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 16, norm.weight, norm.bias)))


def test_no_operation_without_second_derivative_or_in_place_is_left():
    for name in ("mobilenetv3_small_050", "vit_tiny_patch16_224"):
        for module in backbone(name).modules():
            assert not getattr(module, "inplace", False) and not isinstance(module, nn.Hardsigmoid) and not getattr(module, "fused_attn", False)
    x = torch.linspace(-5, 5, 101)
    gate = next(m for m in backbone("mobilenetv3_small_050").modules() if type(m).__name__ == "Hardsigmoid")
    torch.testing.assert_close(gate(x), F.hardsigmoid(x))


def test_small_stem_keeps_the_resolution_and_large_images_keep_the_usual_stem():
    small = backbone("resnet18")
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1) and isinstance(small.maxpool, nn.Identity)
    for other in (backbone("resnet18", small_stem=False), backbone("resnet18", (3, 224, 224))):
        assert other.conv1.kernel_size == (7, 7) and isinstance(other.maxpool, nn.MaxPool2d)
    assert backbone("convnext_atto").stem[0].stride == (2, 2)
    assert backbone("vit_tiny_patch16_224", options={"depth": 1}).patch_embed.patch_size == (4, 4)
    assert backbone("vit_tiny_patch16_224", options={"depth": 1, "patch_size": 8}).patch_embed.patch_size == (8, 8)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    state = torch.get_rng_state()
    one = backbone("resnet18", seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)  # moves the global generator; restored below
    two, other = backbone("resnet18", seed=3).state_dict(), backbone("resnet18", seed=4).state_dict()
    torch.set_rng_state(state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_a_swin_with_windows_of_nought_is_refused_and_even_grids_are_not(monkeypatch):
    """As timm before 1.0.31 makes it for images of 28 pixels, a grid of 7 patches."""
    options = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    made = timm.create_model

    def old(name, **arguments):
        model = made(name, **{**arguments, "img_size": (32, 32)})
        if arguments["img_size"] != (32, 32):
            model.layers[3].blocks[0].window_size = (0, 0)
        return model

    monkeypatch.setattr(timm, "create_model", old)
    with pytest.raises(InputError, match=r"windows of 0.*timm>=1\.0\.31.*32 pixels"):
        backbone("swin_tiny_patch4_window7_224", (3, 28, 28), options=options)
    assert backbone("swin_tiny_patch4_window7_224", options=options)(torch.rand(2, 3, 32, 32)).shape == (2, K)


def test_an_unknown_model_is_refused_with_near_matches():
    with pytest.raises(InputError, match=r"'resnt18'.*Did you mean.*'resnet18'.*timm\.list_models"):
        backbone("resnt18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet18", "norm": "batch"}, "norm='batch'"),
        ({"name": "small", "activation": "tanh"}, "activation='tanh'"),
        ({"name": "resnet18", "options": {"no_such": 1}}, "no_such"),
        ({"name": "small", "options": {"no_such": 1}}, r"'small' does not take.*no_such"),
        ({"name": SmallNet, "options": {"no_such": 1}}, "does not take.*no_such"),
        ({"name": "resnet18", "options": {"checkpoint_path": "weights.pth"}}, r"\['checkpoint_path'\] cannot be set.*Leave them out"),
        ({"name": "resnet18", "options": {"num_classes": 3}}, r"\['num_classes'\] cannot be set"),
        ({"name": "no_such_package:net"}, "no_such_package"),
        ({"name": "math:no_such"}, "math:no_such"),
        ({"name": lambda num_classes, image_shape: 3}, "torch.nn.Module"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=message):
        backbone(**arguments)


def test_an_image_that_the_patches_do_not_divide_is_refused_with_advice():
    with pytest.raises(InputError, match=r"\(4, 4\) pixels.*another image size"):
        backbone("vit_tiny_patch16_224", (3, 30, 30), options={"depth": 1})
    assert backbone("vit_tiny_patch16_224", (3, 30, 30), options={"depth": 1, "patch_size": 5}).pos_embed.shape[1] == 37


def test_a_network_of_ones_own_comes_as_a_callable_or_by_its_name(monkeypatch, tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, image_shape, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(image_shape[0], width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = backbone("my_nets:net", (2, 20, 12), options={"width": 24})
    assert isinstance(net[1], nn.GroupNorm) and net[1].num_groups == 8
    model = SplitModel(net, cut="2", perturbation={}, image_shape=(2, 20, 12), num_classes=K)
    assert (model.latent_shape, model.channel_dim) == ((24, 9, 5), 1)
    with pytest.raises(InputError, match="no default cut"):
        SplitModel(net, image_shape=(2, 20, 12), num_classes=K)

    import my_nets

    same = backbone(my_nets.net, (2, 20, 12), options={"width": 24})
    assert torch.equal(same[0].weight, net[0].weight)


def test_pretrained_weights_load_except_a_head_for_other_classes(tmp_path):
    source = timm.create_model("resnet18", num_classes=9)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    net = backbone("resnet18", small_stem=False, pretrained=tmp_path / "w.safetensors")
    fresh = backbone("resnet18", small_stem=False)
    assert torch.equal(net.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    assert torch.equal(net.layer1[0].bn1.weight, source.layer1[0].bn1.weight) and isinstance(net.layer1[0].bn1, nn.GroupNorm)
    assert torch.equal(net.fc.weight, fresh.fc.weight)
    kept = backbone("resnet18", small_stem=False, norm="keep", pretrained=tmp_path / "w.safetensors")
    assert torch.equal(kept.bn1.running_var, source.bn1.running_var)


def test_pretrained_weights_with_a_fitting_head_load_whole(tmp_path):
    source = SmallNet(K, 3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    net = backbone("small", seed=1, pretrained=tmp_path / "w.safetensors")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in source.state_dict().items())


def test_pretrained_weights_that_do_not_fit_are_refused_with_the_list_and_nothing_is_loaded(tmp_path):
    state = {name: value for name, value in SmallNet(K, 1).state_dict().items() if not name.startswith("blocks.2.norm")}
    save_file(state | {"extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as refusal:
        backbone("small", pretrained=tmp_path / "w.safetensors")
    for part in ("blocks.0.conv.weight is (32, 1, 3, 3) instead of (32, 3, 3, 3)", "blocks.2.norm.bias is missing", "extra is not in the model"):
        assert part in str(refusal.value)


def test_a_pretrained_file_that_is_absent_or_broken_is_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    for name in ("absent.safetensors", "broken.safetensors"):
        with pytest.raises(InputError, match=name):
            backbone("small", pretrained=str(tmp_path / name))


def test_a_resnets_residual_branches_share_nothing_of_an_image_until_they_are_asked_to():
    """timm's zero_init_last: the last norm of a branch multiplies by 0, and so are the gradients of what lies before it."""
    for options, silent in (({}, 16), ({"zero_init_last": False}, 0)):
        net = backbone("resnet18", options=options)
        F.cross_entropy(net(torch.rand(1, 3, 32, 32)), torch.tensor([1])).backward()
        assert sum(bool((weight.grad == 0).all()) for name, weight in net.named_parameters() if ".conv" in name) == silent
