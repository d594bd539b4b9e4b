"""Frozen BatchNorm against PyTorch's own in eval mode, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from gidef.errors import InputError
from gidef.models import freeze_batch_norm, frozen_statistics, has_batch_statistics
from tests.normed import net

torch.set_num_threads(1)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    model = net(5, (3, 16, 16)).double().train()
    for _ in range(3):
        model(torch.rand(9, 3, 16, 16, dtype=torch.float64))  # statistics of their own
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


IMAGES, LABELS = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 1, 1])


def gradient(model):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(F.cross_entropy(model(IMAGES), LABELS), list(model.parameters())), strict=True))


def test_frozen_layers_are_those_of_eval_mode_in_every_mode_and_nothing_changes_their_statistics(plain):
    frozen = freeze_batch_norm(copy.deepcopy(plain))
    assert has_batch_statistics(plain) and not has_batch_statistics(frozen)
    before = {name: tensor.clone() for name, tensor in frozen_statistics(frozen).items()}
    assert sorted(before) == sorted(name for name, _ in plain.named_buffers() if not name.endswith("tracked")) and len(before) == 6
    expected, logits = gradient(plain.eval()), plain(IMAGES)
    for mode in (True, False):
        for model in (frozen.train(mode), copy.deepcopy(frozen).train(mode)):
            torch.testing.assert_close(model(IMAGES), logits, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient(model), expected, rtol=1e-10, atol=1e-12)
            assert model[0].training is mode and not model[1].training and all(torch.equal(frozen_statistics(model)[name], before[name]) for name in before)
    assert frozen.state_dict().keys() == plain.state_dict().keys() and isinstance(frozen[1], nn.BatchNorm2d)
    assert not torch.allclose(plain.train()(IMAGES), logits, atol=0.01)  # the check could fail


def test_frozen_layers_serve_gradients_of_gradients_of_several_weights_at_once(plain):
    frozen = freeze_batch_norm(copy.deepcopy(plain)).requires_grad_(False)
    params = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in frozen.named_parameters()}

    def slope(model, one, images):
        def size(x):
            found = grad(lambda own: F.cross_entropy(functional_call(model, own, (x,)), LABELS))(one)
            return sum(g.square().sum() for g in found.values())

        return grad(size)(images)

    found = vmap(lambda one: slope(frozen, one, IMAGES))(params)
    for row in range(2):
        expected = slope(copy.deepcopy(plain).eval(), {name: tensor[row] for name, tensor in params.items()}, IMAGES)
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-12)


def test_frozen_layers_take_low_precision_and_normalise_in_float32(plain):
    frozen = freeze_batch_norm(copy.deepcopy(plain)).float()
    x = torch.rand(2, 6, 4, 4).bfloat16()
    expected = F.batch_norm(x.float(), frozen[1].running_mean, frozen[1].running_var, frozen[1].weight, frozen[1].bias).bfloat16()
    assert frozen[1](x).dtype == torch.bfloat16
    torch.testing.assert_close(frozen[1](x), expected, rtol=0.01, atol=0.01)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("layer", "said"), [
    (nn.BatchNorm2d(4, track_running_stats=False), "'0' keeps no running statistics"), (OwnNorm(4), r"'0' \(OwnNorm\).*forward of its own"),
    (nn.InstanceNorm2d(4, track_running_stats=True), r"'0' \(InstanceNorm2d\) keeps running statistics, and is no BatchNorm"),
])  # fmt: skip
def test_what_cannot_be_frozen_is_named(layer, said):
    with pytest.raises(InputError, match=f"model.norm=frozen.*{said}"):
        freeze_batch_norm(nn.Sequential(layer))
