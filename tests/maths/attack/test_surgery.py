import copy as copying

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropBlock2d, DropPath
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.ops import StochasticDepth

from gidef.attack.surgery import (
    batch_statistics,
    check_parity,
    differences,
    draw_masks,
    granted_statistics,
    logits_of,
    mask_shapes,
    norm_names,
    parity,
    plain_gradient,
    prepare,
    running_statistics,
    set_modes,
)
from gidef.errors import InputError

SHAPE, LABELS = (4, 2, 6, 6), torch.tensor([0, 2, 1, 1])
TRAIN = {"batch_norm": "train", "dropout": "masks"}


def images(seed=0, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def net(*middle, channels=4):
    """A convolution, what is to be tested on maps (B, 4, 6, 6), and a linear layer; float64, with running statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *middle, nn.Flatten(), nn.LazyLinear(3)).double()
    with torch.no_grad():
        model(torch.zeros(SHAPE, dtype=torch.float64))
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(torch.randn(module.num_features) / 4)
                module.running_var.copy_(torch.rand(module.num_features) + 0.2)
                if module.affine:
                    module.weight.copy_(torch.rand(module.num_features) + 0.5)
                    module.bias.copy_(torch.randn(module.num_features) / 4)
    return model.eval()


def params_of(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


class Tokens(nn.Module):
    """Maps (B, C, H, W) as tokens (B, H W, C), through a module, and back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


class Calls(nn.Module):
    """A function as a module, whose code the surgery reads; `drop_rate` is what some of them read."""

    def __init__(self, function, rate=0.4):
        super().__init__()
        self.rate = rate
        type(self)._function = staticmethod(function)

    def forward(self, x):
        return self._function(self, x)


def calls(function, **settings):
    return type("Calls", (Calls,), {})(function, **settings)


def attacked_alike(model, known=None, **policies):
    """Two attacks as one program against one after the other: a gradient through the first gradient."""
    copy, _ = prepare(model, **policies)
    params = params_of(model)
    known = known or {}
    target = {name: torch.randn_like(tensor) for name, tensor in params.items()}

    def objective(x, known):
        update = grad(lambda p: F.cross_entropy(logits_of(copy, p, known, x), LABELS))(params)
        return sum((update[name] - tensor).square().sum() for name, tensor in target.items())

    candidates = torch.stack([images(7), images(8)])
    stacked = {name: torch.stack([tensor, 1 - tensor]) for name, tensor in known.items()}
    gradients, losses = vmap(grad_and_value(objective))(candidates, stacked)
    for attack in range(2):
        gradient, loss = grad_and_value(objective)(candidates[attack], {name: tensor[attack] for name, tensor in stacked.items()})
        torch.testing.assert_close(gradients[attack], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(losses[attack], loss)
    assert gradients.abs().max() > 0
    return gradients


# --- BatchNorm ------------------------------------------------------------------------------------------------------------------------

NORMS = {
    "1d": lambda: Tokens(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Unflatten(0, (4, 36)))),
    "1d of sequences": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4)),
    "2d": lambda: nn.BatchNorm2d(4),
    "3d": lambda: nn.Sequential(nn.Unflatten(2, (3, 2)), nn.BatchNorm3d(4)),
    "synchronised": lambda: nn.SyncBatchNorm(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "without running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "timm's with activation": lambda: BatchNormAct2d(4, act_layer=nn.SiLU),
    "a subclass": lambda: type("Own", (nn.BatchNorm2d,), {})(4),
    "own code": lambda: type("Own", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * nn.BatchNorm2d.forward(self, x) + x})(4),
    "instances": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("policy", ["eval", "train"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_has_pytorchs_gradient_and_changes_nothing_when_it_runs(norm, policy):
    model = net(NORMS[norm](), nn.Tanh())
    if policy == "train" and norm == "synchronised":  # PyTorch's own needs a GPU: the same layer, unsynchronised, is what it must equal
        plain = net(nn.BatchNorm2d(4), nn.Tanh())
        plain.load_state_dict(model.state_dict())
        assert parity(plain, prepare(model, batch_norm="train")[0], images(), LABELS) < 1e-12
        return
    copy, _ = prepare(model, batch_norm=policy)
    before = copying.deepcopy(copy.state_dict())
    assert parity(model, copy, images(), LABELS) < 1e-12
    attacked_alike(model, batch_norm=policy)
    logits_of(copy, params_of(model), {}, images())
    after = copy.state_dict()
    assert before.keys() == after.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_affine_map_takes_a_third_of_the_operators_away():
    """The peers' note counts 39 % in a ResNet."""
    model = net(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    copy, params = prepare(model)[0], params_of(model)
    buffers = dict(model.named_buffers())

    def operators(forward):
        def objective(x):
            return sum(t.square().sum() for t in grad(lambda p: F.cross_entropy(forward(p, x), LABELS))(params).values())

        graph = make_fx(vmap(grad_and_value(objective)))(torch.stack([images(1), images(2)]))
        return sum(node.op == "call_function" for node in graph.graph.nodes)

    ours, pytorchs = operators(lambda p, x: logits_of(copy, p, {}, x)), operators(lambda p, x: functional_call(model, {**buffers, **p}, (x,)))
    assert ours < 0.67 * pytorchs


def test_low_precision_is_computed_as_pytorch_does():
    model = net(nn.BatchNorm2d(4)).float()
    x = images().bfloat16()
    for policy in ("eval", "train"):
        copy = prepare(model, batch_norm=policy)[0].bfloat16()
        ours, theirs = logits_of(copy, {}, {}, x), copying.deepcopy(model).bfloat16().train(policy == "train")(x)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


class Frozen(nn.Module):
    """Keeps its first BatchNorm frozen in train mode, as fine-tuning does."""

    def __init__(self):
        super().__init__()
        self.parts = net(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.parts(x)

    def train(self, mode=True):
        super().train(mode)
        self.parts[1].eval()
        return self


def test_layers_that_a_model_keeps_frozen_stay_frozen_and_keep_takes_every_flag():
    model = Frozen()
    copy, changes = prepare(model, batch_norm="train")
    assert changes == ["1 x BatchNorm -> affine map of running statistics", "1 x BatchNorm -> batch statistics, without updates"]
    assert parity(model, copy, images(), LABELS) < 1e-12
    flags = net(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    flags[3].train()
    copy, changes = prepare(flags, batch_norm="keep")
    assert len(changes) == 2 and parity(flags, copy, images(), LABELS) < 1e-12
    assert not torch.equal(flags.eval()(images()), logits_of(copy, {}, {}, images()))


def test_one_value_per_channel_has_no_statistics():
    model = net(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="one value per channel"):
        logits_of(prepare(model, batch_norm="train")[0], {}, {}, images()[:1])


class Crossed(nn.Module):
    """Calls its second norm before its first, its third twice, and its last one never."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.unused = (nn.BatchNorm2d(2) for _ in range(4))
        self.head = nn.Linear(72, 3)

    def forward(self, x):
        return self.head(self.third(self.third(self.first(self.second(x) ** 2))).flatten(1))


@pytest.mark.parametrize("policy", ["eval", "train"])
def test_statistics_are_those_of_a_hook_in_the_order_of_registration(policy):
    torch.manual_seed(0)
    model, seen = Crossed().double(), {}
    model.unused.running_mean += 3
    copy, _ = prepare(model, batch_norm=policy)
    model.train(policy == "train")
    for name in norm_names(model):
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    with torch.no_grad():
        model(images())
    found = dict(zip(norm_names(model), batch_statistics(copy, params_of(model), images()), strict=True))
    assert norm_names(copy) == ["first", "second", "third", "unused"]
    for name, inputs in seen.items():
        torch.testing.assert_close(found[name][0], torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
        torch.testing.assert_close(found[name][1], torch.stack([x.var((0, 2, 3), correction=0) for x in inputs]).mean(0))
    assert torch.equal(found["unused"][0], torch.full((2,), 3.0, dtype=torch.float64))


def test_statistics_are_differentiable_and_of_one_attack_alone():
    model = net(nn.BatchNorm2d(4))
    copy, params = prepare(model)[0], params_of(model)

    def prior(x):
        pairs = zip(batch_statistics(copy, params, x), running_statistics(copy), strict=True)
        return sum((m - n).square().sum() + (v - w).square().sum() for (m, v), (n, w) in pairs)

    together = vmap(grad(prior))(torch.stack([images(1), images(2)]))
    torch.testing.assert_close(together[1], grad(prior)(images(2)))
    assert together.abs().min() > 0


def test_running_and_granted_statistics_come_from_what_is_known():
    model = net(nn.BatchNorm2d(4))
    known = {"1.running_mean": torch.ones(4), "statistics.1.mean": torch.zeros(4), "statistics.1.var": torch.full((4,), 2.0)}
    ((mean, var),) = running_statistics(prepare(model)[0], known)
    assert torch.equal(mean, known["1.running_mean"]) and torch.equal(var, model[1].running_var)
    ((mean, var),) = granted_statistics(model, known)
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(var, torch.full((4,), 2.0))
    with pytest.raises(InputError, match="grants no batch statistics of '1'"):
        granted_statistics(model, {"statistics.1.mean": torch.zeros(4)})
    with pytest.raises(InputError, match="keeps no running statistics"):
        running_statistics(net(nn.BatchNorm2d(4, track_running_stats=False)))


# --- dropout --------------------------------------------------------------------------------------------------------------------------

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


SEEDED = 0.3 / 9 * 36 / 16  # γ of DropBlock (Ghiasi et al. 2018, equation 1): rate / block² · feature² / (feature − block + 1)²
DROPS = {  # and the probability of a 1 in the mask
    "Dropout": (lambda: nn.Dropout(0.3), 0.7),
    "Dropout in place": (lambda: nn.Dropout(0.3, inplace=True), 0.7),
    "Dropout1d": (lambda: nn.Sequential(nn.Flatten(2), nn.Dropout1d(0.3)), 0.7),
    "Dropout2d": (lambda: nn.Dropout2d(0.3), 0.7),
    "Dropout3d": (lambda: nn.Sequential(nn.Unflatten(2, (3, 2)), nn.Dropout3d(0.3)), 0.7),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), 0.7),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.3), 0.7),
    "DropPath": (lambda: DropPath(0.3), 0.7),
    "DropPath unscaled": (lambda: DropPath(0.3, scale_by_keep=False), 0.7),
    "StochasticDepth of examples": (lambda: StochasticDepth(0.3, "row"), 0.7),
    "StochasticDepth of the batch": (lambda: StochasticDepth(0.3, "batch"), 0.7),
    "DropBlock": (lambda: DropBlock2d(0.3, block_size=3), SEEDED),
    "functional": (lambda: calls(lambda self, x: F.dropout(x, self.rate, self.training)), 0.6),
    "functional of channels": (lambda: calls(lambda self, x: torch.nn.functional.dropout2d(x, p=self.rate, training=self.training)), 0.6),
    "functional alpha": (lambda: calls(lambda self, x: F.alpha_dropout(x, self.rate, training=self.training)), 0.6),
    "Bernoulli": (lambda: calls(lambda self, x: x * torch.empty_like(x).bernoulli_(1 - self.rate) if self.training else x), 0.6),
    "attention": (lambda: Tokens(calls(lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=self.rate if self.training else 0.0))), 0.6),
    "MultiheadAttention": (lambda: Tokens(Heads()), 0.7),
}


@pytest.mark.parametrize("kind", DROPS)
def test_with_the_mask_of_a_clients_own_draw_the_copy_has_the_clients_gradient(kind):
    """The client is the untouched model in train mode with PyTorch's generator; its draw is repeated from the same seed."""
    make, keep = DROPS[kind]
    model = net(make(), nn.Tanh()).train()
    copy, changes = prepare(model, **TRAIN)
    ((name, shape),) = mask_shapes(copy, SHAPE).items()
    assert any("explicit mask" in change for change in changes) or kind == "attention"
    torch.manual_seed(6)
    expected = plain_gradient(copying.deepcopy(model), images(), LABELS)
    torch.manual_seed(6)
    mask = torch.empty(shape, dtype=torch.float64).bernoulli_(keep)
    found = grad(lambda p: F.cross_entropy(logits_of(copy, p, {name: mask}, images()), LABELS))(params_of(model))
    for parameter, tensor in expected.items():
        torch.testing.assert_close(found[parameter], tensor, rtol=1e-9, atol=1e-12)
    assert len(mask.unique()) == 2 or kind == "StochasticDepth of the batch"
    assert parity(model, copy, images(), LABELS) < 1e-12


@pytest.mark.parametrize("kind", DROPS)
def test_masks_are_inputs_of_each_attack(kind):
    model = net(DROPS[kind][0](), nn.Tanh()).train()
    copy, _ = prepare(model, **TRAIN)
    masks = {name: mask.double() for name, mask in draw_masks(copy, SHAPE, draws(1)).items()}
    attacked_alike(model, masks, **TRAIN)


@pytest.mark.parametrize("kind", [kind for kind in DROPS if kind not in ("Bernoulli", "functional alpha")])
def test_dropout_that_is_off_is_the_model_without_it(kind):
    model = net(DROPS[kind][0](), nn.Tanh()).train()
    copy, changes = prepare(model, batch_norm="train", dropout="off")
    assert any("-> off" in change for change in changes) or kind == "attention"
    assert mask_shapes(copy, SHAPE) == {}
    torch.manual_seed(0)
    one, other = logits_of(copy, {}, {}, images()), logits_of(copy, {}, {}, images())
    assert torch.equal(one, other)
    assert parity(model, copy, images(), LABELS) < 1e-12
    assert not any("off" in change for change in prepare(model.eval())[1])  # nothing drops in eval mode, and nothing is reported


def test_masks_have_names_shapes_and_rates_in_the_order_of_use():
    shared = nn.Dropout(0.25)
    model = net(shared, nn.ReLU(), nn.Dropout2d(0.5), shared, DropPath(0.0), nn.Dropout(0.0))
    copy, changes = prepare(model, **TRAIN)
    assert changes == ["1 x Dropout -> explicit mask", "1 x Dropout2d -> explicit mask"]
    assert list(mask_shapes(copy, SHAPE).items()) == [("masks.1", (4, 4, 6, 6)), ("masks.3", (4, 4, 1, 1)), ("masks.1:2", (4, 4, 6, 6))]
    masks = draw_masks(copy, (64, *SHAPE[1:]), draws(3))
    again = draw_masks(copy, (64, *SHAPE[1:]), draws(3))
    assert all(torch.equal(mask, again[name]) and set(mask.unique().tolist()) == {0.0, 1.0} for name, mask in masks.items())
    assert abs(float(masks["masks.1"].mean()) - 0.75) < 0.02 and abs(float(masks["masks.3"].mean()) - 0.5) < 0.1
    assert not torch.equal(masks["masks.1"], masks["masks.1:2"])


def test_a_dropout_that_drops_all_takes_no_mask():
    model = net(nn.Dropout(1.0))
    copy, _ = prepare(model, **TRAIN)
    assert mask_shapes(copy, SHAPE) == {} and parity(model, copy, images(), LABELS) < 1e-12


def test_missing_and_misshapen_masks_are_refused_by_name():
    copy, _ = prepare(net(nn.Dropout(0.5)), **TRAIN)
    with pytest.raises(InputError, match=r"'masks\.1' is missing: expected \(4, 4, 6, 6\)"):
        logits_of(copy, {}, {}, images())
    with pytest.raises(InputError, match=r"has shape \(1,\)"):
        logits_of(copy, {}, {"masks.1": torch.ones(1)}, images())


def test_other_randomness_is_refused():
    noisy = calls(lambda self, x: x + torch.randn_like(x) if self.training else x)
    model = net(noisy)
    assert parity(model, prepare(model)[0], images(), LABELS) < 1e-12
    copy, _ = prepare(model, **TRAIN)
    with pytest.raises(InputError, match="draws random numbers by aten.randn"):
        mask_shapes(copy, SHAPE)
    with pytest.raises(InputError, match="draws random numbers by aten.randn"):
        check_parity(model, copy, images(), LABELS)


def test_dropout_with_frozen_norms_is_a_mode_of_its_own():
    model = net(nn.BatchNorm2d(4), nn.Dropout(0.5))
    copy, _ = prepare(model, batch_norm="eval", dropout="masks")
    assert parity(model, copy, images(), LABELS) < 1e-12
    masks = {"masks.2": torch.full((4, 4, 6, 6), 0.5)}
    torch.testing.assert_close(logits_of(copy, {}, masks, images()), model.eval()(images()))


# --- attention ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 3, "vdim": 5}, {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
])  # fmt: skip
@pytest.mark.parametrize("hidden", [None, "flags", "numbers", "per head", "padding", "padding numbers"])
def test_multi_head_attention_by_products_is_pytorchs(options, hidden):
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(6, 2, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    copy, changes = prepare(layer)
    assert changes == ["1 x MultiheadAttention -> math"]
    batch, queries, keys = 3, 4, 5
    q, k, v = (torch.randn(batch, length, width, dtype=torch.float64) for length, width in ((queries, 6), (keys, layer.kdim), (keys, layer.vdim)))
    given = {
        None: {},
        "flags": {"attn_mask": torch.rand(queries, keys) < 0.3},
        "numbers": {"attn_mask": torch.randn(queries, keys, dtype=torch.float64)},
        "per head": {"attn_mask": torch.rand(batch * 2, queries, keys) < 0.3},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])},
        "padding numbers": {"key_padding_mask": torch.randn(batch, keys, dtype=torch.float64)},
    }[hidden]
    inputs = (q, k, v) if layer.batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    for wanted in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        for ours, theirs in zip(copy(*inputs, **given, **wanted), layer(*inputs, **given, **wanted), strict=True):
            torch.testing.assert_close(ours, theirs)
    if hidden in (None, "numbers"):
        for ours, theirs in zip(copy(q[0], k[0], v[0], **given), layer(q[0], k[0], v[0], **given), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("call", [
    lambda self, x: F.scaled_dot_product_attention(x, 2 * x, x),
    lambda self, x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    lambda self, x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(36, 36, dtype=torch.bool).tril(2)),
    lambda self, x: F.scaled_dot_product_attention(x, x, x, torch.arange(36.0, dtype=torch.float64) / 9),
    lambda self, x: F.scaled_dot_product_attention(x.unsqueeze(1).expand(-1, 4, -1, -1), *[x.unsqueeze(1).expand(-1, 2, -1, -1)] * 2, enable_gqa=True).mean(1),
    lambda self, x: helper(x),
])  # fmt: skip
def test_functional_attention_is_replaced_where_a_modules_code_calls_it(call):
    model = net(Tokens(calls(call)))
    copy, changes = prepare(model)
    assert changes == ["1 x functional attention -> math"]
    assert parity(model, copy, images(), LABELS) < 1e-12
    attacked_alike(model)


def helper(x):
    return F.scaled_dot_product_attention(x, x, x)


def test_pooled_attention_through_the_functional_form_of_heads_is_replaced():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            h = self.heads
            return F.multi_head_attention_forward(
                x, x, x, 4, 2, h.in_proj_weight, h.in_proj_bias, None, None, False, 0.0, h.out_proj.weight, h.out_proj.bias, need_weights=False
            )[0]

    model = net(Tokens(Pooled()))
    copy, changes = prepare(model)
    assert "1 x functional attention -> math" in changes
    assert parity(model, copy, images(), LABELS) < 1e-12
    attacked_alike(model)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_pytorchs_own_transformer_layer_is_attacked_without_its_fast_path(mode):
    model = net(Tokens(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)))
    policies = TRAIN if mode == "train" else {}
    copy, changes = prepare(model, **policies)
    assert any(change.startswith("1 x TransformerEncoderLayer's fast path") for change in changes)
    assert parity(model, copy, images(), LABELS) < 1e-12
    masks = {name: mask.double() for name, mask in draw_masks(copy, SHAPE, draws(1)).items()}
    assert len(masks) == (4 if mode == "train" else 0)
    attacked_alike(model, masks, **policies)


def test_fused_attention_stays_where_it_is_asked_to():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=8, depth=1, embed_dim=8, num_heads=2)
    assert prepare(model)[1] == ["1 x fused attention -> math"]
    copy, changes = prepare(model, fused_attention=True)
    assert changes == [] and copy.blocks[0].attn.fused_attn
    assert not prepare(model)[0].blocks[0].attn.fused_attn and model.blocks[0].attn.fused_attn


# --- convolutions of many groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32),
    lambda: nn.Conv2d(32, 64, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1), groups=32, bias=False),
    lambda: nn.Conv2d(64, 32, 2, groups=32),
    lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(32, 32, 3, groups=32)),
    lambda: nn.Sequential(nn.Unflatten(2, (3, 2)), nn.Conv3d(32, 32, 2, groups=32)),
])  # fmt: skip
def test_convolutions_of_many_groups_have_pytorchs_derivatives_of_first_and_second_order(make):
    torch.manual_seed(0)
    inner = make()
    first = next(module for module in inner.modules() if hasattr(module, "in_channels")).in_channels
    model = net(nn.Conv2d(4, first, 1), nn.Tanh(), inner, nn.Tanh())
    copy, changes = prepare(model)
    assert changes == ["1 x convolution of many groups -> without a loop over them"]
    assert parity(model, copy, images(), LABELS) < 1e-12
    params = params_of(model)
    target = {name: torch.randn_like(tensor) for name, tensor in params.items()}

    def objective(params, x, forward):
        update = grad(lambda p: F.cross_entropy(forward(p, x), LABELS))(params)
        return sum((update[name] * tensor).sum() for name, tensor in target.items())

    def ours(p, x):
        return logits_of(copy, p, {}, x)

    def theirs(p, x):
        return functional_call(model, p, (x,))

    found, expected = (grad(objective, argnums=(0, 1))(params, images(), forward) for forward in (ours, theirs))
    torch.testing.assert_close(found[1], expected[1])
    for name in params:
        torch.testing.assert_close(found[0][name], expected[0][name])

    def ahead(x):
        """The same gradient by the images, forward over reverse."""
        return jvp(lambda p: grad(lambda x: F.cross_entropy(ours(p, x), LABELS))(x), (params,), (target,))[1]

    torch.testing.assert_close(ahead(images()), expected[1])
    torch.testing.assert_close(vmap(ahead)(torch.stack([images(1), images()]))[1], expected[1])
    attacked_alike(model)


def test_convolutions_of_many_groups_follow_autocast_and_others_are_left_alone():
    model = net(nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 3, groups=32)).float()
    copy, _ = prepare(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = copy[2](copy[1](copy[0](images().float()))), model[2](model[1](model[0](images().float())))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    same, reflected = nn.Conv2d(32, 32, 3, groups=32, padding="same"), nn.Conv2d(32, 32, 3, groups=32, padding=1, padding_mode="reflect")
    assert prepare(net(nn.Conv2d(4, 32, 1, groups=4), same, reflected))[1] == []


# --- the rest -------------------------------------------------------------------------------------------------------------------------


def test_hardsigmoid_in_every_form_is_replaced():
    shared = nn.Hardsigmoid()

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = F.hardsigmoid

        def forward(self, x):
            return self.gate(3 * x)

    model = net(shared, calls(lambda self, x: F.hardsigmoid(x * 4)), Holds(), shared)
    copy, changes = prepare(model)
    assert changes == ["2 x Hardsigmoid -> relu6(x + 3) / 6", "1 x functional hardsigmoid -> relu6(x + 3) / 6"]
    assert parity(model, copy, images(), LABELS) < 1e-12
    attacked_alike(model)
    assert isinstance(model[1], nn.Hardsigmoid) and model[3].gate is F.hardsigmoid


def test_timms_activations_with_a_backward_of_their_own_are_replaced():
    from timm.layers.activations_me import HardSigmoidMe, HardSwishMe, MishMe, SwishMe

    model = net(HardSwishMe(), SwishMe(), MishMe(), HardSigmoidMe())
    copy, changes = prepare(model)
    assert changes[0] == "4 x activation with its own backward -> PyTorch's"
    assert parity(model, copy, images(), LABELS) < 1e-7  # their hard sigmoid is exact, PyTorch's slope is off by 3e-8
    attacked_alike(model)


def test_in_place_activations_are_switched_off_in_the_copy_alone():
    model = net(nn.ReLU(inplace=True), nn.SiLU(inplace=True))
    copy, changes = prepare(model)
    assert changes == ["2 x in-place -> out of place"]
    assert model[1].inplace and not copy[1].inplace


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1))])
def test_pooling_channels_last_maps_does_not_fall_back_to_a_loop(pool):
    """The fallback's warning is an error in these tests."""
    model = net(calls(lambda self, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).sin()), pool)
    copy, changes = prepare(model)
    assert changes == ["1 x pooling to one position -> mean"]
    assert parity(model, copy, images(), LABELS) < 1e-12
    attacked_alike(model)


def test_pools_to_more_positions_are_left_alone():
    assert prepare(net(nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((1, 2))))[1] == []


def test_biases_that_timm_caches_in_eval_mode_are_computed_at_each_call():
    """A cache filled outside would leave the biases without a gradient; one filled inside would outlive its transform."""
    from timm.models.levit import Attention

    model = net(Tokens(Attention(4, 2, 2, resolution=(6, 6)))).eval()
    with torch.no_grad():
        model(images())
    copy, changes = prepare(model)
    assert "1 x cached attention bias -> computed" in changes
    logits_of(copy, {}, {}, images())
    copy = copying.deepcopy(copy.double())
    assert parity(model, copy, images(), LABELS) < 1e-12
    params = params_of(model)
    gradients = grad(lambda p: F.cross_entropy(logits_of(copy, p, {}, images()), LABELS))(params)
    assert gradients["1.inner.attention_biases"].abs().max() > 0
    attacked_alike(model)


def test_gradient_checkpointing_is_off_in_the_copy():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=8, depth=1, embed_dim=8, num_heads=2)
    model.set_grad_checkpointing(True)
    copy, changes = prepare(model)
    assert "1 x gradient checkpointing -> off" in changes and not copy.grad_checkpointing and model.grad_checkpointing


def test_weight_norm_is_attacked_through_its_parametrisation():
    model = net(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    copy, _ = prepare(model)
    assert "1.parametrizations.weight.original0" in params_of(copy)
    assert parity(model, copy, images(), LABELS) < 1e-12


def test_the_model_is_not_touched():
    model = net(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Hardsigmoid(), nn.AdaptiveAvgPool2d(1)).train()
    types, state = [type(module) for module in model.modules()], copying.deepcopy(model.state_dict())
    copy, _ = prepare(model)
    parity(model, copy, images(), LABELS)
    assert [type(module) for module in model.modules()] == types and model[2].inplace and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    with torch.no_grad():
        copy[0].weight.zero_()
    assert model[0].weight.abs().min() > 0


def test_set_modes_sets_flags_alone():
    model = net(nn.BatchNorm2d(4), nn.Dropout(0.5))
    flags = {}
    for policies in (("eval", "off"), ("train", "masks"), ("train", "off"), ("eval", "masks")):
        set_modes(model, *policies)
        flags[policies] = (model.training, model[1].training, model[2].training)
    assert flags == {
        ("eval", "off"): (False, False, False), ("train", "masks"): (True, True, True),
        ("train", "off"): (True, True, False), ("eval", "masks"): (True, False, True),
    }  # fmt: skip


def test_what_is_not_given_is_the_copys_own_in_the_images_dtype():
    model = net(nn.BatchNorm2d(4)).float()
    copy, _ = prepare(model)
    exact = copying.deepcopy(model).double()
    torch.testing.assert_close(logits_of(copy, {}, {}, images()), exact(images()))
    known = {"1.running_mean": torch.ones(4).double(), "unrelated": torch.zeros(3), "0.bias": torch.ones(4).double()}
    exact[1].running_mean.fill_(1)
    nn.init.ones_(exact[0].bias)
    torch.testing.assert_close(logits_of(copy, {}, known, images()), exact(images()))
    nn.init.zeros_(exact[0].bias)
    torch.testing.assert_close(logits_of(copy, {"0.bias": torch.zeros(4).double()}, known, images()), exact(images()))  # params come first


def test_a_copy_that_is_not_the_model_is_refused_with_the_layer():
    model = net(nn.BatchNorm2d(4), nn.Tanh())
    copy, _ = prepare(model)
    assert check_parity(model, copy, images(), LABELS) < 1e-12
    copy[1].eps = 0.1
    apart = differences(model, copy, images(), LABELS)
    assert parity(model, copy, images(), LABELS) == max(apart.values()) > 1e-3
    with pytest.raises(InputError, match=f"gradients of '{max(apart, key=apart.get)}' differ"):
        check_parity(model, copy, images(), LABELS)
    other = copying.deepcopy(model)
    nn.init.constant_(other[4].weight, torch.nan)
    assert parity(other, prepare(other)[0], images(), LABELS) == torch.inf


def test_rounding_that_the_model_itself_amplifies_is_no_reason_to_refuse_a_copy():
    """Two nearly equal values per channel: BatchNorm divides their rounding by their distance."""
    model = net(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4, eps=1e-8), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh())
    copy, _ = prepare(model, batch_norm="train")
    alike = images()[:2]
    alike[1] = alike[0] + 0.01 * images(1)[0]
    assert check_parity(model, copy, alike, LABELS[:2], tolerance=0.0) > 1e-13
    copy[5].register_forward_hook(lambda module, inputs, output: output * (1 + 1e-5))
    with pytest.raises(InputError, match="is not the model"):
        check_parity(model, copy, alike, LABELS[:2])


def test_parity_is_relative_per_parameter():
    """A layer whose gradient is a thousandth of the others' is held to its own size."""
    model = net(nn.Tanh())
    expected = plain_gradient(copying.deepcopy(model), images(), LABELS)
    copy, _ = prepare(model)
    copy[0].register_forward_hook(lambda module, inputs, output: output + 1e-6 * (module.bias - module.bias.detach()).view(-1, 1, 1))
    apart = differences(model, copy, images(), LABELS)
    assert apart["0.bias"] == pytest.approx(1e-6, rel=1e-3)
    assert expected["0.bias"].norm() > 0 and apart["0.weight"] < 1e-12


@pytest.mark.parametrize("broken, message", [
    (lambda: prepare(net(), batch_norm="frozen"), "batch_norm='frozen'"),
    (lambda: prepare(net(), dropout="on"), "dropout='on'"),
    (lambda: logits_of(net(), {}, {}, images()), "is no attack copy"),
    (lambda: logits_of(prepare(net())[0], {"0.weights": torch.zeros(1)}, {}, images()), "has no parameter '0.weights'"),
    (lambda: logits_of(prepare(nn.Conv2d(2, 4, 3).double())[0], {}, {}, images()), r"a tensor of shape \(4, 4, 4, 4\): expected logits"),
    (lambda: logits_of(prepare(calls(lambda self, x: (x, x)))[0], {}, {}, images()), "gives tuple: expected logits"),
    (lambda: plain_gradient(net(), images(shape=(4, 3, 6, 6)), LABELS), "cannot take images"),
    (lambda: plain_gradient(net().requires_grad_(False), images(), LABELS), "no parameter that requires a gradient"),
    (lambda: plain_gradient(net(nn.Dropout(0.5)).train(), images(), LABELS, masks={}), "for which none is given"),
    (lambda: plain_gradient(net(nn.Dropout(0.5)).train(), images(), LABELS, masks={"masks.1": torch.ones(2)}), r"has shape \(2,\)"),
    (lambda: plain_gradient(net(), images(), LABELS, masks={"masks.1": torch.ones(2)}), "never draws mask 'masks.1'"),
])  # fmt: skip
def test_bad_input_is_refused(broken, message):
    with pytest.raises(InputError, match=message):
        broken()


def test_a_model_that_cannot_be_copied_is_refused():
    model = net()
    model.kept = model[0].weight * 2
    with pytest.raises(InputError, match="cannot be copied"):
        prepare(model)
