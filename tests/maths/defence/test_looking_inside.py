"""Defences that look at the client's own images: orthogonal updates, pruned features, noisy slices. A tiny net against plain NumPy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from gidef.defence.censor import Orthogonal
from gidef.defence.noise import AddNoise, draw
from gidef.defence.share import apply_all, settled, trusted
from gidef.defence.slices import NoisySlices, sensitivities, sliced
from gidef.defence.soteria import PruneFeatures
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Own

B, PIXELS, WIDTH, CLASSES = 3, 4, 6, 3


class Net(nn.Module):
    """r = tanh(W x + b),  logits = H r + c: every derivative below is by hand."""

    def __init__(self):
        super().__init__()
        self.front, self.head = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images):
        return self.head(self.front(images.flatten(1)).tanh())


def at_hand(lr=None, seed=0, net=None):
    g, net = generator(seed, "at hand"), (net or Net()).double()
    params = {name: torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in net.named_parameters()}
    images = torch.rand(B, 1, 2, 2, generator=g, dtype=torch.float64)
    return Own(net, params, images, torch.randint(CLASSES, (B,), generator=g), lr)


def an_update(own, seed=1):
    g = generator(seed, "update")
    return {name: torch.randn(tensor.shape, generator=g, dtype=torch.float64) for name, tensor in own.params.items()}


def arrays(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def forward(p, own):
    x = own.images.flatten(1).numpy()
    r = np.tanh(x @ p["front.weight"].T + p["front.bias"])
    logits = r @ p["head.weight"].T + p["head.bias"]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return x, r, odds / odds.sum(1, keepdims=True)


def cross_entropy(p, own):
    return -np.log(forward(p, own)[2][np.arange(B), own.labels.numpy()]).mean()


# --- orthogonal updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_sent_is_orthogonal_and_as_long(dtype):
    own = at_hand()
    update = {name: tensor.to(dtype) for name, tensor in an_update(own).items()} | {"decoder.x": torch.full((50,), 1e-6, dtype=dtype)}
    sent = Orthogonal(draws=3).apply(update, generator=generator(0), own=own)
    assert list(sent) == list(update)
    for name, tensor in sent.items():
        a, b = (one.double().numpy().flatten() for one in (tensor, update[name]))
        assert tensor.dtype == dtype and tensor.shape == update[name].shape
        assert abs(a @ b) <= 1e-6 * np.linalg.norm(a) * np.linalg.norm(b)
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-6)


def test_what_has_no_orthogonal_direction_is_not_sent():
    own = at_hand()
    update = an_update(own) | {"head.bias": torch.zeros(CLASSES, dtype=torch.float64), "level": torch.ones(1, dtype=torch.float64)}
    sent = Orthogonal(draws=2).apply(update, generator=generator(0), own=own)
    assert not sent["head.bias"].any() and not sent["level"].any() and sent["head.weight"].any()


@pytest.mark.parametrize("lr", [None, 0.1])
def test_the_draw_with_the_lowest_loss_after_its_step_is_sent(lr):
    own = at_hand(lr)
    update, draws = an_update(own), generator(7)
    sent = Orthogonal(draws=20).apply(update, generator=generator(7), own=own)
    tried = []
    for _ in range(20):
        trial = {}
        for name in sorted(update):
            r, g = draw(update[name], law="gaussian", generator=draws).numpy().flatten(), update[name].numpy().flatten()
            o = r - (r @ g) / (g @ g) * g
            trial[name] = (o * np.linalg.norm(g) / np.linalg.norm(o)).reshape(update[name].shape)
        after = {name: p + (trial[name] if lr is None else -lr * trial[name]) for name, p in arrays(own.params).items()}
        tried.append((cross_entropy(after, own), trial))
    losses = [loss for loss, _ in tried]
    chosen = tried[int(np.argmin(losses))][1]
    assert len(set(losses)) == 20 and int(np.argmin(losses)) > 0
    for name, tensor in sent.items():
        np.testing.assert_allclose(tensor.numpy(), chosen[name], rtol=1e-9, atol=1e-12)


def test_at_the_true_update_the_imitation_is_what_was_sent_and_elsewhere_not():
    own = at_hand()
    update, transform = an_update(own), Orthogonal(draws=2)
    sent = transform.apply(update, generator=generator(0), own=own)
    seen = transform.reveals(sent)
    for name, tensor in transform.imitate(update, seen).items():
        torch.testing.assert_close(tensor, sent[name], rtol=1e-9, atol=1e-12)
    other = transform.imitate(an_update(own, seed=2), seen)
    assert all(float((other[name] - sent[name]).norm() / sent[name].norm()) > 1e-2 for name in sent)
    zero = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    slopes = grad(lambda u: sum(t.sum() for t in transform.imitate(u, seen).values()))(zero)
    assert all(slope.isfinite().all() for slope in slopes.values())
    two = vmap(lambda u: transform.imitate(u, seen))({name: torch.stack([tensor, 2 * tensor]) for name, tensor in update.items()})
    assert all(torch.allclose(two[name][1], 2 * sent[name]) for name in sent)


def test_a_transform_that_looks_inside_refuses_to_work_blind():
    own = at_hand()
    with pytest.raises(ValueError, match="Orthogonal"):
        apply_all([Orthogonal()], an_update(own), generator=generator(0))
    with pytest.raises(InputError, match="draws=0"):
        Orthogonal(draws=0)


# --- pruned features -----------------------------------------------------------------------------------------------------


def scores(own):
    """Σ_b ‖∂r_i/∂x_b‖ / |r_i| of the net above: ∂r_i/∂x = (1 − r_i²) W_i."""
    p = arrays(own.params)
    _, r, _ = forward(p, own)
    return ((1 - r**2) * np.linalg.norm(p["front.weight"], axis=1) / np.abs(r)).sum(0)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_features_of_the_smallest_score_lose_their_columns_and_nothing_else_changes(share):
    own = at_hand()
    update = an_update(own)
    sent = PruneFeatures(share=share).apply(update, generator=generator(0), own=own)
    pruned = np.argsort(scores(own))[: int(share * WIDTH)]
    expected = update["head.weight"].numpy().copy()
    expected[:, pruned] = 0
    np.testing.assert_array_equal(sent["head.weight"].numpy(), expected)
    assert all(torch.equal(sent[name], update[name]) for name in update if name != "head.weight")


def test_a_layer_can_be_named_and_closed_relus_go_first():
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.middle = nn.Linear(WIDTH, 2)
            self.head = nn.Linear(2, CLASSES)

        def forward(self, images):
            return self.head(self.middle(self.front(images.flatten(1)).relu()))

    own = at_hand(net=Deep())
    own.params["front.bias"][:2] = -100.0  # two features that no image opens
    update = an_update(own)
    sent = PruneFeatures(share=2 / WIDTH, layer="middle").apply(update, generator=generator(0), own=own)
    assert not sent["middle.weight"][:, :2].any() and sent["middle.weight"][:, 2:].equal(update["middle.weight"][:, 2:])
    with pytest.raises(InputError, match="layer='gone'.*middle"):
        PruneFeatures(layer="gone").apply(update, generator=generator(0), own=own)
    with pytest.raises(InputError, match="does not leave the client"):
        PruneFeatures().apply({"front.weight": update["front.weight"]}, generator=generator(0), own=own)
    with pytest.raises(InputError, match=r"share=-0\.1"):
        PruneFeatures(share=-0.1)


def test_an_attacker_matches_the_columns_that_were_sent_and_may_leave_the_layer_out():
    own = at_hand()
    update, transform = an_update(own), PruneFeatures(share=0.5)
    sent = transform.apply(update, generator=generator(0), own=own)
    for name, tensor in transform.imitate(update, transform.reveals(sent)).items():
        assert torch.equal(tensor, sent[name])
    rest = {name: tensor for name, tensor in update.items() if name != "head.weight"}
    assert all(torch.equal(tensor, rest[name]) for name, tensor in transform.imitate(rest, transform.reveals(rest)).items())


# --- noisy slices --------------------------------------------------------------------------------------------------------


def test_sensitivities_are_the_jacobians_by_hand():
    """By central differences of the gradient by hand, through the whole batch as the formula has it."""
    own = at_hand()
    p = arrays(own.params)

    def sums(x_flat):
        moved = Own(own.model, own.params, torch.from_numpy(x_flat.reshape(B, 1, 2, 2)), own.labels)
        x, r, odds = forward(p, moved)
        error = odds.copy()
        error[np.arange(B), own.labels.numpy()] -= 1
        error /= B
        back = error @ p["head.weight"] * (1 - r**2)
        gradients = {"front.weight": back.T @ x, "front.bias": back.sum(0), "head.weight": error.T @ r, "head.bias": error.sum(0)}
        return {name: g.sum() for name, g in gradients.items()}

    point, step = own.images.numpy().flatten(), 1e-5
    slopes = {name: np.zeros(len(point)) for name in p}
    for k in range(len(point)):
        ahead, behind = point.copy(), point.copy()
        ahead[k] += step
        behind[k] -= step
        above, below = sums(ahead), sums(behind)
        for name in p:
            slopes[name][k] = (above[name] - below[name]) / (2 * step)
    found = sensitivities(own)
    assert list(found) == [name for name, _ in own.model.named_parameters()]
    for name, slope in slopes.items():
        assert found[name] == pytest.approx(np.linalg.norm(slope.reshape(B, -1), axis=1).mean(), rel=1e-5, abs=1e-9)


def test_slices_are_equally_sensitive():
    update = {"a": torch.zeros(30, 10), "b": torch.zeros(600), "z": torch.zeros(4), "c": torch.zeros(2000)}
    sensitivity = {"a": 3.0, "b": 6.0, "c": 1.0}
    found = sliced(update, sensitivity, 5)
    weight = np.concatenate([np.full(update[name].numel(), share / update[name].numel()) for name, share in sensitivity.items()])
    number = np.concatenate([found[name].numpy().flatten() for name in sensitivity])
    assert (np.diff(number) >= 0).all() and found["a"].shape == (30, 10) and (found["z"] == 4).all()
    np.testing.assert_allclose([weight[number == k].sum() for k in range(5)], 2.0, atol=0.02)


def test_the_drawn_slices_get_noise_and_the_others_keep_every_bit():
    own = at_hand()
    update = an_update(own)
    transform, g = NoisySlices(std=0.3, relative=False, slices=4, noisy=2), generator(5)
    found = transform.apply(update, generator=generator(5), own=own)
    chosen = set(torch.randperm(4, generator=g)[:2].tolist())
    whole = AddNoise(std=0.3, relative=False).apply(update, generator=g)
    places = sliced(update, sensitivities(own), 4)
    assert {int(place) for tensor in places.values() for place in tensor.flatten()} == {0, 1, 2, 3}
    for name, tensor in found.items():
        noisy = np.isin(places[name].numpy(), list(chosen))
        np.testing.assert_array_equal(tensor.numpy(), np.where(noisy, whole[name].numpy(), update[name].numpy()))
        assert not np.equal(whole[name].numpy(), update[name].numpy()).any()
    silent = NoisySlices(std=0.0).apply(update, generator=generator(5), own=own)
    assert all(torch.equal(silent[name], update[name]) for name in update)
    with pytest.raises(InputError, match="noisy=3 of slices=2"):
        NoisySlices(slices=2, noisy=3)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_noise_on_drawn_slices_is_distrusted_as_its_law_says(std, relative):
    update = an_update(at_hand())
    update["head.bias"] = update["head.bias"] * 1e-3
    found = NoisySlices(std=std, relative=relative, slices=4, noisy=1).variances(update)
    for name, tensor in arrays(update).items():
        power, part = (tensor**2).mean(), std**2 / (0.25 + std**2)
        assert found[name].ndim == 0 and float(found[name]) == pytest.approx(0.25 * power * part**4 if relative else min(0.25 * std**2, power))
    assert NoisySlices(std=0.0).variances(update) == {} and NoisySlices(std=std).variances({"dead": torch.zeros(3)}) == {"dead": 0}


def test_a_loud_tensor_is_trusted_less_only_where_noise_is_much_of_what_left():
    update = {name: torch.full((100,), size) for name, size in (("quiet", 0.1), ("loud", 2.0))}
    trust = {std: float(trusted([NoisySlices(std=std)], update).get("loud", 1.0)) for std in (0.1, 3.0)}
    assert trust[0.1] > 0.99 and trust[3.0] < 0.4


def test_releases_of_noisy_slices_settle_at_the_update():
    """What is exact is what at least two of them left as it was, to the bit."""
    own = at_hand()
    update, transform = {name: tensor.float() for name, tensor in an_update(own).items()}, NoisySlices(std=2.0, slices=4, noisy=2)
    own = Own(own.model.float(), {name: tensor.float() for name, tensor in own.params.items()}, own.images.float(), own.labels)
    releases = [transform.apply(update, generator=generator(seed), own=own) for seed in range(4)]
    found, variances = settled(releases)
    chosen = [set(torch.randperm(4, generator=generator(seed))[:2].tolist()) for seed in range(4)]
    places = sliced(update, sensitivities(own), 4)
    for name, tensor in update.items():
        quiet = sum(~np.isin(places[name].numpy(), list(some)) for some in chosen)
        np.testing.assert_array_equal((variances[name] == 0).numpy(), quiet >= 2)
        np.testing.assert_array_equal(found[name].numpy()[quiet >= 2], tensor.numpy()[quiet >= 2])
    assert 0 < sum(int((variance == 0).sum()) for variance in variances.values()) < sum(map(torch.numel, update.values()))
