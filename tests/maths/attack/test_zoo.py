"""The attack's surgery over timm's families at 32 pixels, with random weights. The default run takes most of them with fewer blocks."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from gidef.attack.client import gradient_of, observed
from gidef.attack.surgery import check_parity, draw_masks, prepare

PATCHES = {"img_size": 32, "patch_size": 8}
ZOO = {  # constructor's arguments, and those that make it short
    "resnet18": ({}, {"layers": (1, 1, 1, 1)}),
    "resnet50": ({}, {"layers": (1, 1, 1, 1)}),
    "resnetv2_50": ({}, {"layers": (1, 1, 1, 1)}),
    "regnetx_002": ({}, {}),
    "convnext_tiny": ({"drop_path_rate": 0.2}, {"depths": (1, 1, 1, 1), "dims": (48, 96, 192, 384)}),
    "efficientnet_b0": ({"drop_rate": 0.2, "drop_path_rate": 0.2}, {}),
    "mobilenetv3_small_100": ({"drop_rate": 0.2}, {}),
    "mobilenetv3_large_100": ({}, None),
    "densenet121": ({"drop_rate": 0.1}, {"block_config": (2, 2, 2, 2)}),
    "vit_tiny_patch16_224": ({"drop_rate": 0.1, **PATCHES}, {"depth": 2}),
    "vit_small_patch16_224": (PATCHES, {"depth": 1}),
    "vit_base_patch16_224": (PATCHES, {"depth": 1}),
    "deit_tiny_patch16_224": ({"attn_drop_rate": 0.2, "drop_path_rate": 0.2, **PATCHES}, {"depth": 2}),
    "swin_tiny_patch4_window7_224": ({"img_size": 32, "window_size": 4}, {"depths": (2, 2), "embed_dim": 48, "num_heads": (2, 4)}),
    "mixer_s32_224": ({"img_size": 32}, {}),
    "mixer_s16_224": ({"img_size": 32}, None),
    "beit_base_patch16_224": (PATCHES, {"depth": 1}),
    "eva02_tiny_patch14_224": (PATCHES, {"depth": 2}),
}
EXPECTED = {  # a line of the report that each must have
    "resnet18": "BatchNorm -> affine map", "mobilenetv3_small_100": "9 x Hardsigmoid", "vit_tiny_patch16_224": "2 x fused attention",
    "eva02_tiny_patch14_224": "2 x fused attention", "convnext_tiny": "1 x pooling to one position", "efficientnet_b0": "16 x convolution of many groups",
}  # fmt: skip
MASKED = {"convnext_tiny", "efficientnet_b0", "mobilenetv3_small_100", "densenet121", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"}


def build(name, *, short):
    torch.manual_seed(0)
    settings, fewer = ZOO[name]
    return timm.create_model(name, pretrained=False, num_classes=4, **settings, **(fewer if short else {}))


def random_images(*shape, seed=0):
    """Smooth fields of colour, which differ from one another as photographs do: pixel noise looks alike to a deep net."""
    coarse = torch.rand(*shape, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse.flatten(0, -4), size=32, mode="bilinear").view(*shape, 3, 32, 32)


def check_one(model, mode):
    """Parity in float64 with the untouched model, and a vectorised double backward against a loop over the attacks.

    That is in float32 in eval mode. In train mode two images leave deep layers two values per channel, which BatchNorm turns into ±1
    whatever they were: float32 then has no digit left in EfficientNet, vectorised or not, and float64 is taken.
    """
    labels, policies = torch.tensor([0, 3, 1]), {"eval": {}, "train": {"batch_norm": "train", "dropout": "masks"}}[mode]
    copy, changes = prepare(model, **policies)
    check_parity(model, copy, random_images(3), labels)
    size, dtype, tolerance = {"eval": (1, torch.float32, 5e-4), "train": (2, torch.float64, 1e-5)}[mode]
    simulate = gradient_of(model.to(dtype), mode=mode)
    masks = draw_masks(simulate.model, (size, 3, 32, 32), torch.Generator().manual_seed(1))
    truth, candidates = random_images(size).to(dtype), random_images(2, size, seed=1).to(dtype)
    seen = observed(model, truth, labels[:size], mode=mode, masks=masks, masks_known=True)
    objective = matching(simulate, seen, F.one_hot(labels[:size], 4).to(dtype))
    gradients, losses = vmap(grad_and_value(objective))(candidates)
    alone = [grad_and_value(objective)(candidate) for candidate in candidates]
    for together, (gradient, _) in zip(gradients, alone, strict=True):
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
        assert float((together - gradient).norm() / gradient.norm()) < tolerance
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in alone]), rtol=1e-4, atol=1e-5)
    assert losses.min() > 1e-3 and float(objective(truth)) < 0.01 * losses.min()  # zero at the truth alone
    return changes


def matching(simulate, seen, targets):
    """1 − cosine of the simulated and the observed update."""

    def objective(images):
        update = simulate(seen.params, seen.known, images, targets, None)
        dot = sum((update[name] * tensor).sum() for name, tensor in seen.update.items())
        norms = [sum(tensor.square().sum() for tensor in side.values()).sqrt() for side in (update, seen.update)]
        return 1 - dot / (norms[0] * norms[1])

    return objective


def with_statistics(model):
    """Running statistics of a batch, as a trained net's fit its data: with those of a fresh net, gradients of deep nets vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        if norms:
            model.train()(random_images(16, seed=2))
    return model


@pytest.mark.parametrize("name", [name for name, (_, fewer) in ZOO.items() if fewer is not None])
def test_a_short_net_of_each_family_has_parity_and_is_attacked_as_one_program(name):
    model = with_statistics(build(name, short=True))
    changes = check_one(model, "eval")
    assert EXPECTED.get(name, "") in " ".join(changes)
    if name != "efficientnet_b0" and (name in MASKED or any("BatchNorm" in change for change in changes)):  # which takes ten seconds
        changes = check_one(model, "train")
        assert any("explicit mask" in change for change in changes) == (name in MASKED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_full_net_has_parity_and_is_attacked_as_one_program(name):
    model = with_statistics(build(name, short=False))
    changes = check_one(model, "eval")
    if name in MASKED or any("BatchNorm" in change for change in changes):
        check_one(model, "train")


@pytest.mark.parametrize("name, mode", [
    ("resnet18", "train"), ("vit_small_patch16_224", "eval"),
    pytest.param("vit_tiny_patch16_224", "train", marks=pytest.mark.slow), pytest.param("mobilenetv3_small_100", "eval", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_attack_of_a_net_is_recorded_as_a_graph_with_the_same_numbers(name, mode):
    model = with_statistics(build(name, short=True))
    labels, simulate = torch.tensor([0, 3]), gradient_of(model, mode=mode)
    masks = draw_masks(simulate.model, (2, 3, 32, 32), torch.Generator().manual_seed(1))
    seen = observed(model, random_images(2), labels, mode=mode, masks=masks, masks_known=True)
    program = vmap(grad_and_value(matching(simulate, seen, F.one_hot(labels, 4).float())))
    graph = make_fx(program)(random_images(2, 2, seed=1))
    candidates = random_images(2, 2, seed=5)
    gradients, losses = graph(candidates)
    expected, values = program(candidates)
    torch.testing.assert_close(losses, values, rtol=1e-5, atol=1e-6)
    assert float((gradients - expected).norm() / expected.norm()) < 1e-3
