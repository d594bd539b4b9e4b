import copy as copying
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.func import grad, vmap

from gidef.attack.client import gradient_of, observed
from gidef.attack.simulate import local_sgd
from gidef.attack.surgery import batch_statistics, draw_masks, granted_statistics, norm_names, running_statistics
from gidef.errors import InputError

CLASSES, SIZE, SHAPE = 3, 4, (2, 6, 6)


class Block(nn.Module):
    """A convolution with BatchNorm, a residual path that may be dropped, and dropout before the last layer."""

    def __init__(self, drop=0.3, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), norm(4)
        self.inner, self.path = nn.Conv2d(4, 4, 3, padding=1), DropPath(drop)
        self.drop, self.head = nn.Dropout(drop), nn.Linear(4 * 36, CLASSES)

    def forward(self, images):
        x = F.silu(self.norm(self.conv(images)))
        return self.head(self.drop((x + self.path(self.inner(x))).flatten(1)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Block().double()
    model.norm.running_mean.copy_(torch.randn(4) / 4)
    model.norm.running_var.copy_(torch.rand(4) + 0.3)
    return model


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(SIZE, *SHAPE, generator=draw, dtype=torch.float64), torch.randint(CLASSES, (SIZE,), generator=draw)


def targets(labels):
    return F.one_hot(labels, CLASSES).double()


def masks_of(simulate, seed=0):
    return {name: mask.double() for name, mask in draw_masks(simulate.model, (SIZE, *SHAPE), torch.Generator().manual_seed(seed)).items()}


def apart(update, observation):
    """Distance of an update from the observed one, relative to its norm."""
    assert update.keys() == observation.update.keys()
    pairs = [(update[name].detach(), tensor) for name, tensor in observation.update.items()]
    return float(sum((one - other).square().sum() for one, other in pairs) / sum(other.square().sum() for _, other in pairs)) ** 0.5


POLICIES = {
    "eval": {"mode": "eval"},
    "train": {"mode": "train"},
    "train without dropout": {"mode": "train", "dropout": "off"},
    "frozen BatchNorm": {"mode": "train", "batch_norm": "eval"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulator_at_the_truth_releases_what_an_untouched_client_does(model, policy):
    images, labels = batch()
    simulate = gradient_of(model, **POLICIES[policy])
    masks = masks_of(simulate)
    assert list(masks) == ([] if policy in ("eval", "train without dropout") else ["masks.path", "masks.drop"])
    seen = observed(model, images, labels, masks=masks, masks_known=True, **POLICIES[policy])
    assert apart(simulate(seen.params, seen.known, images, targets(labels), None), seen) < 1e-12
    assert apart(simulate(seen.params, seen.known, batch(1)[0], targets(labels), None), seen) > 0.01
    assert seen.kind == "gradient" and seen.num_examples == SIZE and torch.equal(seen.labels, labels)


def test_the_modes_release_different_gradients(model):
    images, labels = batch()
    masks = masks_of(gradient_of(model, mode="train"))
    seen = {name: observed(model, images, labels, masks=masks, **policy) for name, policy in POLICIES.items() if policy["mode"] == "train"}
    seen["eval"] = observed(model, images, labels)
    assert all(apart(one.update, other) > 0.01 for a, one in seen.items() for b, other in seen.items() if a != b)


def test_an_observation_is_plain_autograd_on_the_model(model):
    """The reference is written out: no function of the package is in it but `observed`."""
    images, labels = batch()
    seen = observed(model, images, labels, mode="train", masks=None, dropout="off")
    client = copying.deepcopy(model).train()
    client.drop.eval(), client.path.eval()
    F.cross_entropy(client(images), labels).backward()
    for name, parameter in client.named_parameters():
        torch.testing.assert_close(seen.update[name], parameter.grad, rtol=1e-12, atol=1e-14)


def test_an_undirected_client_draws_its_own_masks(model):
    images, labels = batch()
    torch.manual_seed(0)
    one, other = (observed(model, images, labels, mode="train") for _ in range(2))
    assert apart(one.update, other) > 0.01 and one.known == {}
    with pytest.raises(InputError, match=r"mask 'masks\.path' is missing"):
        gradient_of(model, mode="train")(one.params, one.known, images, targets(labels), None)
    wrong = masks_of(gradient_of(model, mode="train"), seed=5)
    assert apart(gradient_of(model, mode="train")(one.params, wrong, images, targets(labels), None), one) > 0.01


def test_masks_may_be_given_in_any_order(model):
    images, labels = batch()
    masks = masks_of(gradient_of(model, mode="train"))
    backwards = dict(reversed(masks.items()))
    one, other = (observed(model, images, labels, mode="train", masks=given) for given in (masks, backwards))
    assert apart(one.update, other) == 0


def test_observing_leaves_the_model_as_it_was(model):
    model.eval()
    before = copying.deepcopy(model.state_dict())
    observed(model, *batch(), mode="train", statistics="batch")
    gradient_of(model, mode="train")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules()) and not model.norm._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_granted_running_statistics_replace_the_attackers_proxy(model):
    images, labels = batch()
    proxy = copying.deepcopy(model)
    proxy.norm.reset_running_stats()
    simulate = gradient_of(proxy)
    known = observed(model, images, labels, statistics="running")
    unknown = observed(model, images, labels)
    assert sorted(known.known) == ["norm.running_mean", "norm.running_var"]
    assert apart(simulate(known.params, known.known, images, targets(labels), None), known) < 1e-12
    assert apart(simulate(unknown.params, unknown.known, images, targets(labels), None), unknown) > 0.01


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_granted_batch_statistics_are_those_at_the_truth(model, mode):
    images, labels = batch()
    simulate = gradient_of(model, mode=mode)
    seen = observed(model, images, labels, mode=mode, masks=masks_of(simulate) or None, masks_known=mode == "train", statistics="batch")
    granted = granted_statistics(simulate.model, seen.known)
    for ours, theirs in zip(batch_statistics(simulate.model, seen.params, images, seen.known), granted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert norm_names(simulate.model) == ["norm"]
    assert not torch.allclose(granted[0][0], running_statistics(model)[0][0], atol=0.01)


def test_soft_labels_are_matched_and_granted_or_not(model):
    images, labels = batch()
    soft = 0.7 * targets(labels) + 0.3 * targets(labels.roll(1))
    seen = observed(model, images, soft)
    simulate = gradient_of(model)
    assert apart(simulate(seen.params, {}, images, soft, None), seen) < 1e-12
    assert apart(simulate(seen.params, {}, images, targets(labels), None), seen) > 0.01
    assert apart(simulate(seen.params, seen.known, images, targets(labels), None), seen) < 1e-12  # what is granted takes their place
    assert torch.equal(seen.labels, labels)
    hidden = observed(model, images, soft, labels_known=False)
    assert hidden.labels is None and hidden.known == {}
    hard, one_hot = observed(model, images, labels), observed(model, images, targets(labels))
    assert apart(hard.update, one_hot) < 1e-12 and hard.known == {}


def test_another_loss_and_normalised_images_are_the_clients(model):
    images, labels = batch()
    mean, std = (0.4, 0.6), (0.2, 0.3)
    settings = {"loss": lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1), "normalise": (mean, std)}
    seen = observed(model, images, labels, **settings)
    client = copying.deepcopy(model).eval()
    scaled = (images - torch.tensor(mean).double().view(2, 1, 1)) / torch.tensor(std).double().view(2, 1, 1)
    F.cross_entropy(client(scaled), labels, label_smoothing=0.1).backward()
    for name, parameter in client.named_parameters():
        torch.testing.assert_close(seen.update[name], parameter.grad)
    assert apart(gradient_of(model, **settings)(seen.params, {}, images, targets(labels), None), seen) < 1e-12


def test_the_loss_of_a_simulator_has_the_update_for_its_gradient(model):
    images, labels = batch()
    simulate = gradient_of(model, mode="train")
    params, masks = {n: p.detach() for n, p in model.named_parameters()}, masks_of(simulate)
    value = simulate.loss(params, masks, images, targets(labels), None)
    assert value.shape == ()
    gradients = grad(simulate.loss)(params, masks, images, targets(labels), None)
    update = simulate(params, masks, images, targets(labels), None)
    assert all(torch.equal(update[name], tensor) for name, tensor in gradients.items())


def test_the_surgery_is_reported(model):
    assert gradient_of(model).changes == ["1 x BatchNorm -> affine map of running statistics"]
    assert gradient_of(model, mode="train").changes == [
        "1 x BatchNorm -> batch statistics, without updates", "1 x DropPath -> explicit mask", "1 x Dropout -> explicit mask",
    ]  # fmt: skip


def test_a_simulator_is_vmappable_over_weights_masks_and_images(model):
    simulate = gradient_of(model, mode="train")
    params = {name: torch.stack([p.detach(), p.detach() + 0.1]) for name, p in model.named_parameters()}
    known = {name: torch.stack([mask, masks_of(simulate, 1)[name]]) for name, mask in masks_of(simulate).items()}
    images = torch.stack([batch()[0], batch(1)[0]])
    labels = torch.stack([targets(batch()[1]), targets(batch(1)[1])])

    def objective(params, known, images, labels):
        return sum(t.square().sum() for t in simulate(params, known, images, labels, None).values())

    together = vmap(grad(objective, argnums=(1, 2)))(params, known, images, labels)
    for attack in range(2):
        alone = grad(objective, argnums=(1, 2))(*({n: t[attack] for n, t in each.items()} for each in (params, known)), images[attack], labels[attack])
        torch.testing.assert_close(together[1][attack], alone[1])
        for name, tensor in alone[0].items():  # masks are searched
            torch.testing.assert_close(together[0][name][attack], tensor)
            assert tensor.abs().max() > 0


def test_some_parameters_are_released_and_the_rest_known_or_frozen(model):
    images, labels = batch()
    model.conv.requires_grad_(False)
    seen = observed(model, images, labels)
    assert not any(name.startswith("conv") for name in seen.params) and seen.params.keys() == seen.update.keys()
    assert apart(gradient_of(model)(seen.params, {}, images, targets(labels), None), seen) < 1e-12
    other = Block().double()
    known = {name: p.detach() for name, p in model.named_parameters() if name.startswith("conv")} | dict(model.named_buffers())
    assert apart(gradient_of(other)(seen.params, known, images, targets(labels), None), seen) < 1e-12
    assert apart(gradient_of(other)(seen.params, {}, images, targets(labels), None), seen) > 0.01


def test_local_steps_of_a_simulator_are_those_of_a_plain_optimiser(model):
    images, labels = batch()
    client = copying.deepcopy(model).eval()
    optimiser = torch.optim.SGD(client.parameters(), lr=0.1)
    for rows in (slice(0, 2), slice(2, 4)):
        optimiser.zero_grad()
        F.cross_entropy(client(images[rows]), labels[rows]).backward()
        optimiser.step()
    params = {name: p.detach() for name, p in model.named_parameters()}
    delta = local_sgd(gradient_of(model), steps=2, lr=0.1)(params, {}, images, targets(labels), None)
    for name, parameter in client.named_parameters():
        torch.testing.assert_close(delta[name], parameter.detach() - params[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_attack_descends_to_the_truth_of_a_net_with_batch_norm(model, policy):
    """A plain optimiser on the images, from near the truth; the engine has its own tests."""
    images, labels = batch()
    simulate = gradient_of(model, **POLICIES[policy])
    seen = observed(model, images, labels, masks=masks_of(simulate), masks_known=True, **POLICIES[policy])
    scale = sum(t.square().sum() for t in seen.update.values())

    def objective(x):
        update = simulate(seen.params, seen.known, x, targets(labels), None)
        return sum((update[name] - t).square().sum() for name, t in seen.update.items()) / scale

    x = (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).requires_grad_()
    first = float(objective(x.detach()))
    optimiser = torch.optim.LBFGS([x], max_iter=60, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0)

    def closure():
        x.grad = grad(objective)(x.detach())
        return objective(x.detach())

    optimiser.step(closure)
    assert float(objective(x.detach())) < 1e-3 * first


@pytest.mark.parametrize("broken, message", [
    (lambda m, x, y: gradient_of(m, mode="test"), "mode='test'"),
    (lambda m, x, y: observed(m, x, y, mode="test"), "mode='test'"),
    (lambda m, x, y: observed(m, x, y[:2]), r"labels \(2,\) do not fit 4 images"),
    (lambda m, x, y: observed(m, x, targets(y)[0]), "do not fit"),
    (lambda m, x, y: observed(m, x, y, statistics="exact"), "statistics='exact'"),
    (lambda m, x, y: observed(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), x, y, statistics="batch"), "has no BatchNorm"),
    (lambda m, x, y: observed(m, x, y, mode="train", masks_known=True), "masks_known needs the masks"),
    (lambda m, x, y: observed(m, x, y, mode="train", masks={"masks.drop": torch.ones(SIZE, 144)}), "do not fit the model, which draws"),
    (lambda m, x, y: observed(m, x[:, :1], y), "cannot take images"),
    (lambda m, x, y: gradient_of(m, normalise=((0.5,), (0.0,))), "deviation above 0"),
    (lambda m, x, y: observed(m, x, y, normalise=((0.5,), (1.0,))), "have 2: give one value per channel"),
    (lambda m, x, y: gradient_of(m)({"convolution": y.double()}, {}, x, targets(y), None), "no parameter 'convolution'"),
])  # fmt: skip
def test_bad_input_is_refused(model, broken, message):
    with pytest.raises(InputError, match=message):
        broken(model, *batch())


def test_one_image_without_statistics_of_its_own_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 6), nn.BatchNorm2d(3), nn.Flatten()).double()
    images, labels = batch()
    with pytest.raises(InputError, match="cannot take images"):
        observed(model, images[:1], labels[:1], mode="train")
    seen = observed(model, images, labels, mode="train")
    assert dataclasses.asdict(seen)["num_examples"] == SIZE
    with pytest.raises(InputError, match="one value per channel"):
        gradient_of(model, mode="train")(seen.params, {}, images[:1], targets(labels[:1]), None)
