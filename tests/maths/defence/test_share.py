"""Changes of an update before it leaves, against plain NumPy, and how a user's own one is taken in."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from gidef import build
from gidef.config import Data, LearnedPerturbation, Model, Pruning, Recipe, Undefended, problems
from gidef.defence.accounting import Budget
from gidef.defence.base import Defence
from gidef.defence.censor import Orthogonal
from gidef.defence.clipping import Clip
from gidef.defence.noise import AddNoise
from gidef.defence.private import ClipAndNoise
from gidef.defence.pruning import Prune
from gidef.defence.quantisation import Quantise
from gidef.defence.share import MISFIT, apply_all, blur_of, imitated, left_out, noise_share, revealed, scale_kept, settled, trust_of, trusted
from gidef.defence.sign import SignOnly
from gidef.defence.slices import NoisySlices
from gidef.defence.soteria import PruneFeatures
from gidef.errors import InputError
from gidef.rng import generator


def an_update():
    g = generator(0, "share")
    return {"weight": torch.randn(4, 3, 2, generator=g), "bias": torch.randn(5, generator=g), "level": torch.randn(1, generator=g)}


class Halved:
    """A transform of one's own that says nothing of its scale."""

    def apply(self, update, *, generator):
        return {name: tensor / 2 for name, tensor in update.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_pruning_keeps_the_largest(share):
    update = an_update()
    pruned = Prune(share=share).apply(update, generator=generator(0))
    for name, tensor in update.items():
        values = tensor.numpy().flatten()
        kept = len(values) - int(share * len(values))
        smallest = np.argsort(np.abs(values))[: len(values) - kept]
        values = values.copy()
        values[smallest] = 0
        np.testing.assert_array_equal(pruned[name].numpy().flatten(), values)


def test_pruning_nothing_changes_no_bit_and_a_sign_passes_through():
    update = an_update()
    assert all(torch.equal(tensor, update[name]) for name, tensor in Prune(share=0.0).apply(update, generator=generator(0)).items())
    negated = Prune(share=0.5).apply({name: -tensor for name, tensor in update.items()}, generator=generator(0))
    pruned = Prune(share=0.5).apply(update, generator=generator(0))
    assert all(torch.equal(-tensor, negated[name]) for name, tensor in pruned.items())


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"share=1\.2"):
        Prune(share=1.2)


def long(update, length):
    whole = torch.cat([tensor.flatten() for tensor in update.values()]).norm()
    return {name: tensor * length / whole for name, tensor in update.items()}


@pytest.mark.parametrize(("transforms", "length", "kept"), [
    ((), 5.0, True),
    ((Prune(share=0.9), AddNoise(std=1.0), Quantise(bits=3), PruneFeatures(), NoisySlices(), Orthogonal()), 5.0, True),
    ((Clip(bound=1.0),), 0.9, True), ((Clip(bound=1.0),), 5.0, False),
    ((Clip(bound=1.0, per_tensor=True),), 0.9, True), ((Clip(bound=1.0, per_tensor=True),), 5.0, False),
    ((Prune(share=0.5), Clip(bound=1.0)), 0.9, True), ((Clip(bound=1.0), Prune(share=0.5)), 0.9, False),
    ((SignOnly(),), 0.9, False), ((AddNoise(std=1.0), SignOnly()), 0.9, False),
    ((ClipAndNoise(1.0, 0.0, 4),), 0.9, True), ((ClipAndNoise(1.0, 0.0, 4),), 5.0, False),
    ((ClipAndNoise(1.0, 0.05, 4),), 0.5, True), ((ClipAndNoise(1.0, 0.05, 4),), 5.0, False), ((ClipAndNoise(1.0, 1.0, 4),), 0.5, False),
    ((Halved(),), 0.9, False),
])  # fmt: skip
def test_a_released_update_says_whether_its_scale_is_the_gradient_s(transforms, length, kept):
    """A clip tells by the norm of what left, if it is the last, and never in a mean over clients."""
    released = long(an_update(), length)
    for one in transforms:
        if not getattr(one, "needs_own", False):
            released = one.apply(released, generator=generator(0))
    assert scale_kept(transforms, released) is kept
    clips = any(isinstance(one, (Clip, ClipAndNoise)) for one in transforms)
    assert scale_kept(transforms, None) is (kept and not clips)


def test_an_imitation_at_the_truth_is_the_released_update():
    transforms = (Prune(share=0.5), Prune(share=0.2))
    update = an_update()
    released = apply_all(transforms, update, generator=generator(0))

    def simulate(params, known, *rest):
        assert set(known) == {"front"}
        return update

    found = imitated(simulate, transforms)({}, {"front": torch.ones(1), **revealed(transforms, released)}, None, None, None)
    assert all(torch.equal(tensor, released[name]) for name, tensor in found.items())
    assert imitated(simulate, ()) is simulate


# --- pruning whose zeros do not leave as they are --------------------------------------------------------------------------

SHAPES = {"weight": (20, 10), "bias": (7,), "level": (1,)}


def some_update(seed):
    g = generator(seed, "blurred")
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def largest(values, share):
    """Where the entries stand that pruning keeps, plainly: bool, of the same shape."""
    flat = np.abs(values).flatten()
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: len(flat) - int(share * len(flat))]] = True
    return chosen.reshape(values.shape)


def simulated(transforms, update, released, **summed):
    """What an attacker who adapts simulates of a candidate's update."""
    known = revealed(transforms, released, **summed)
    return imitated(lambda params, known, *rest: update, transforms, **summed)({}, known, None, None, None)


@pytest.mark.parametrize(
    ("behind", "exact"),
    [
        ((AddNoise(std=1e-4, relative=False),), True), ((ClipAndNoise(clip=1e3, noise_multiplier=1e-7, cohort_size=1),), True), ((Quantise(bits=2),), True),
        ((Quantise(bits=8), AddNoise(std=1e-4, relative=False)), True), ((Clip(bound=1e3),), True), ((SignOnly(),), False), ((Prune(share=0.9),), False),
    ],
)  # fmt: skip
def test_pruning_is_simulated_at_the_truth_whatever_became_of_its_zeros(behind, exact):
    transforms, update = (Prune(share=0.7), *behind), some_update(0)
    released = apply_all(transforms, update, generator=generator(1))
    found = simulated(transforms, update, released)
    pruned = apply_all(transforms[:1], update, generator=generator(1))
    for name, tensor in found.items():
        expected = pruned[name] if exact else released[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=0)
        assert tensor.numel() < 2 or int((tensor == 0).sum()) >= int(0.7 * tensor.numel())


def test_behind_noise_a_candidate_keeps_what_is_largest_of_it_and_of_the_release_together():
    transforms, other = (Prune(share=0.7), AddNoise(std=0.3, relative=False)), some_update(1)
    released = apply_all(transforms, some_update(0), generator=generator(1))
    found = simulated(transforms, other, released)
    for name, tensor in other.items():
        mine, theirs = tensor.numpy(), released[name].numpy()
        order = np.abs(mine) / np.linalg.norm(mine) + np.abs(theirs) / np.linalg.norm(theirs)
        np.testing.assert_array_equal(found[name].numpy(), np.where(largest(order, 0.7), mine, 0))


def test_behind_rounding_what_was_sent_is_surely_kept_and_the_rest_is_the_candidates_largest():
    transforms, other = (Prune(share=0.5), Quantise(bits=2)), some_update(1)
    released = apply_all(transforms, some_update(0), generator=generator(1))
    found = simulated(transforms, other, released)["weight"]
    sent = released["weight"] != 0
    assert 0 < int(sent.sum()) < 100
    order = np.where(sent, 1e3, np.abs(other["weight"].numpy()))
    np.testing.assert_array_equal(found.numpy(), np.where(largest(order, 0.5), other["weight"].numpy(), 0))


def test_nothing_of_a_redrawn_update_is_a_hint():
    class Redrawn(Clip):
        zeros = "redrawn"

    transforms, other = (Prune(share=0.5), Redrawn(bound=1.0)), some_update(1)
    found = simulated(transforms, other, some_update(0))["weight"]
    mine = other["weight"].numpy()
    np.testing.assert_array_equal(found.numpy() != 0, largest(mine, 0.5))


def test_every_member_of_a_sum_prunes_its_own_update_within_what_anybody_sent():
    transforms, updates = (Prune(share=0.7),), [some_update(seed) for seed in range(3)]
    sent = [apply_all(transforms, update, generator=generator(0)) for update in updates]
    mean = {name: torch.stack([one[name] for one in sent]).mean(0) for name in SHAPES}
    for update, one in zip(updates, sent, strict=True):
        assert all(torch.equal(tensor, one[name]) for name, tensor in simulated(transforms, update, mean, summed=True).items())
    assert not torch.equal(simulated(transforms, updates[0], mean)["weight"], sent[0]["weight"])  # the union of all
    other = some_update(7)
    mine, anybody = other["weight"].numpy(), mean["weight"].numpy() != 0
    found = simulated(transforms, other, mean, summed=True)["weight"].numpy()
    np.testing.assert_array_equal(found, np.where(largest(np.where(anybody, mine, 0), 0.7), mine, 0))


@pytest.mark.parametrize("summed", [False, True])
def test_a_guessed_choice_has_no_slope_and_is_fit_for_vmap(summed):
    transforms = (Prune(share=0.7), AddNoise(std=0.3, relative=False))
    released = apply_all(transforms, some_update(0), generator=generator(1))
    known = revealed(transforms, released, summed=summed)

    def simulate(update):
        return imitated(lambda params, known, *rest: update, transforms, summed=summed)({}, known, None, None, None)

    one, two = some_update(1), some_update(2)
    both = vmap(simulate)({name: torch.stack([one[name], two[name]]) for name in one})
    for name in one:
        assert torch.equal(both[name][0], simulate(one)[name]) and torch.equal(both[name][1], simulate(two)[name])
    slopes = grad(lambda update: sum(tensor.sum() for tensor in simulate(update).values()))(one)
    assert all(torch.equal(slopes[name], (simulate(one)[name] != 0).float()) for name in one)


def test_bare_or_last_pruning_is_read_off_the_release_as_ever():
    for transforms in ((Prune(share=0.7),), (Clip(bound=0.1), Prune(share=0.7)), (AddNoise(std=0.1), Prune(share=0.7)), (Prune(share=0.7), SignOnly())):
        assert all(blur_of(transforms, place, summed=False) is None for place, one in enumerate(transforms) if isinstance(one, Prune))
        released, other = apply_all(transforms, some_update(0), generator=generator(1)), some_update(1)
        place = next(place for place, one in enumerate(transforms) if isinstance(one, Prune))
        seen = {name.removeprefix(f"share/{place}/"): tensor for name, tensor in revealed(transforms, released).items()}
        assert all(torch.equal(seen[name], (tensor != 0).float()) for name, tensor in released.items())
        assert all(torch.equal(tensor, other[name] * seen[name]) for name, tensor in transforms[place].imitate(other, seen).items())


def test_a_change_of_ones_own_may_say_what_it_leaves_of_zeros():
    """Without a word, zeros that are still there tell as much as before, and where they are not, nothing does."""

    class Filled(Halved):
        def apply(self, update, *, generator):
            return {name: 0.5 * tensor + 1.0 for name, tensor in update.items()}

    class Said(Halved):
        zeros = "kept"

    other = some_update(1)
    for behind, open in ((Halved(), False), (Said(), False), (Filled(), True)):
        transforms = (Prune(share=0.7), behind)
        released = apply_all(transforms, some_update(0), generator=generator(1))
        found = simulated(transforms, other, released)["weight"].numpy()
        mine, sent = other["weight"].numpy(), released["weight"].numpy() != 0
        np.testing.assert_array_equal(found, 0.5 * np.where(largest(mine, 0.7) if open else sent, mine, 0))
        assert (blur_of(transforms, 0, summed=False) is None) is isinstance(behind, Said)


@pytest.mark.parametrize(
    ("transform", "zeros"),
    [
        (AddNoise(std=0.0), "kept"), (AddNoise(), "noisy"), (NoisySlices(), "noisy"), (NoisySlices(std=0.0), "kept"), (Quantise(bits=2), "rounded"), (Clip(), "kept"),
        (SignOnly(), "kept"), (Prune(), "pruned"), (PruneFeatures(), "pruned"), (Orthogonal(), "redrawn"),
        (ClipAndNoise(clip=1.0, noise_multiplier=0.0, cohort_size=2), "kept"), (ClipAndNoise(clip=1.0, noise_multiplier=1.0, cohort_size=2), "noisy"),
    ],
)  # fmt: skip
def test_what_a_change_says_of_zeros_is_what_it_does(transform, zeros):
    assert transform.zeros == zeros
    if getattr(transform, "needs_own", False):
        return
    update = Prune(share=0.5).apply(some_update(0), generator=generator(0))
    found = transform.apply(update, generator=generator(1))
    filled = any(bool(((found[name] != 0) & (tensor == 0)).any()) for name, tensor in update.items())
    lost = any(bool(((found[name] == 0) & (tensor != 0)).any()) for name, tensor in update.items())
    assert filled == (zeros == "noisy") and lost == (zeros in ("rounded", "pruned"))


def test_the_layer_of_pruned_features_is_left_out_where_its_columns_are_not_to_be_read():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    last, first = PruneFeatures(share=0.5), PruneFeatures(share=0.5, layer="1")
    assert left_out((last, AddNoise()), model) == left_out((last,), model, summed=True) == {"3.weight"}
    assert left_out((first, Orthogonal()), model) == {"1.weight"}
    for transforms in ((last,), (last, Clip()), (AddNoise(), last), (last, Quantise()), (last, Prune()), (PruneFeatures(share=0.1), AddNoise()), (Prune(), AddNoise())):
        assert left_out(transforms, model) == set()


@dataclass(frozen=True, kw_only=True)
class Halved:
    """A user's own."""

    changes_update: ClassVar[bool] = True
    factor: float = 0.5

    def apply(self, update, *, generator):
        return {name: self.factor * tensor for name, tensor in update.items()}

    def reveals(self, update):
        return {}

    def imitate(self, update, seen):
        return {name: self.factor * tensor for name, tensor in update.items()}


class Shapes:
    num_classes, image_shape = 8, (3, 28, 28)


def layered(count=20_000):
    """Tensors of three sizes, one of them of heavy tails, and one of zeros alone."""
    g = generator(3, "layered")
    sizes = {"small": 1e-3, "middle": 0.03, "large": 1.0}
    update = {name: size * torch.randn(count, generator=g) for name, size in sizes.items()} | {"dead": torch.zeros(7)}
    update["middle"] *= torch.randn(count, generator=g)
    return update


def mean_square(update):
    return float(sum(tensor.double().square().sum() for tensor in update.values())) / sum(tensor.numel() for tensor in update.values())


def deviations(transforms, update, draws=64):
    """Of a release's noise on each tensor: measured, over draws of the transforms on the same update."""
    seen = [apply_all(transforms, update, generator=generator(number, "deviations")) for number in range(draws)]
    return {name: float(torch.stack([one[name].double() for one in seen]).var(0).mean().sqrt()) for name in update}


@pytest.mark.parametrize(
    ("transforms", "within"),
    [
        ([AddNoise(std=1.0)], 0.1), ([AddNoise(std=0.3, law="laplace")], 0.3), ([Quantise(bits=2)], 0.25), ([Quantise(bits=3)], 0.25), ([Quantise(bits=6)], 0.25),
        ([Quantise(bits=4, norm="l2")], 0.25), ([AddNoise(std=1.0), Quantise(bits=3)], 0.25), ([AddNoise(std=1.0), Clip(bound=1.0, per_tensor=True)], 0.1),
        ([AddNoise(std=0.1, relative=False), AddNoise(std=1.0)], 0.25),
    ],
    ids=["noise", "laplace", "2 bits", "3 bits", "6 bits", "l2", "both", "clipped", "two noises"],
)  # fmt: skip
def test_tensors_are_trusted_by_the_noise_that_a_release_has(transforms, within):
    update = layered()
    released = apply_all(transforms, update, generator=generator(0))
    found, measured = trusted(transforms, released), deviations(transforms, update)
    misfit = MISFIT * mean_square(released)
    for name in ("small", "middle", "dead"):
        expected = ((measured["large"] ** 2 + misfit) / (measured[name] ** 2 + misfit)) ** 0.5
        assert float(found[name] / found["large"]) == pytest.approx(expected, rel=within), (name, found, measured)
        assert found[name].ndim == 0 and torch.equal(found[name], found[name].bfloat16().float())
    assert max(float(factor) for factor in found.values()) == 1


@pytest.mark.parametrize(
    ("transforms", "within"),
    [
        ([AddNoise(std=1.0)], 0.1), ([AddNoise(std=0.1, relative=False)], 0.02), ([Quantise(bits=2)], 0.25), ([AddNoise(std=0.1, relative=False), Quantise(bits=3)], 0.25),
        ([ClipAndNoise(clip=30.0, noise_multiplier=0.01, cohort_size=4)], 0.02), ([Clip(bound=30.0), AddNoise(std=0.1, relative=False)], 0.02),
    ],
    ids=["noise", "one level", "2 bits", "both", "clients'", "clipped before"],
)  # fmt: skip
@pytest.mark.parametrize("trusting", [False, True])
def test_the_share_of_noise_is_that_of_releases(transforms, within, trusting):
    update = layered()
    released = apply_all(transforms, update, generator=generator(0))
    trust, measured = trusted(transforms, released) if trusting else {}, deviations(transforms, update)
    factors = {name: float(trust.get(name, 1.0)) for name in update}
    noise = sum((factors[name] * measured[name]) ** 2 * tensor.numel() for name, tensor in update.items())
    whole = sum(factors[name] ** 2 * float(tensor.double().square().sum()) for name, tensor in released.items())
    assert noise_share(transforms, released, trust, released=released) == pytest.approx(noise / whole, rel=within)


def test_in_a_mean_over_clients_noise_is_as_much_less_and_steps_leave_theirs():
    g, transform = generator(4, "clients"), AddNoise(std=0.5, relative=False)
    update = {"a": torch.randn(20_000, generator=g), "pruned": torch.cat([torch.zeros(9_000), torch.randn(1_000, generator=g)])}
    mean = {name: torch.stack([transform.apply(update, generator=generator(number, "client"))[name] for number in range(4)]).mean(0) for name in update}
    whole = sum(float(tensor.double().square().sum()) for tensor in mean.values())
    assert noise_share([transform], mean, {}, released=None, clients=4) == pytest.approx(30_000 * 0.25 / 4 / whole)
    power = sum(float(tensor.double().square().sum()) for tensor in update.values())
    assert noise_share([], update, {}, released=update, stepped=0.25) == pytest.approx(21_000 * 0.25 / power)  # none on what is 0
    assert noise_share([], update, {}, released=update, stepped=9.0) == pytest.approx(1 - (2 / 30_000) ** 0.5)


def test_no_noise_is_told_of_where_the_law_tells_none_or_its_scale_is_changed_behind_it():
    update = layered()
    told = lambda *transforms, **more: noise_share(transforms, update, {}, released=update, **more)  # noqa: E731
    assert told() == told(Prune(share=0.5), Clip(bound=0.1)) == told(AddNoise(std=0.0)) == told(Halved()) == 0.0
    assert told(AddNoise(), Clip(bound=0.1)) == told(AddNoise(), SignOnly()) == told(Clip(bound=0.1), stepped=0.1) == 0.0 < told(stepped=0.1)
    assert told(AddNoise(), Clip(bound=1e6)) == told(AddNoise()) > 0  # nothing was clipped
    assert noise_share([AddNoise()], {"a": torch.zeros(3)}, {}, released=None) == 0.0


def test_trust_is_the_law_s_by_hand():
    """std² q² of a mean square r² = q² / 4 + std² q²; t |u| of steps of width t, at most t² / 6; the sum of both."""
    update = layered()
    for std in (0.1, 1.0):
        noise = {name: float((tensor.double() ** 2).mean()) * std**2 / (0.25 + std**2) for name, tensor in update.items()}
        for bits in (2, 5):
            steps = {name: float(tensor.abs().max()) / (2 ** (bits - 1) - 1) for name, tensor in update.items()}
            rounding = {name: min(steps[name] * float(tensor.abs().double().mean()), steps[name] ** 2 / 6) for name, tensor in update.items()}
            for transforms, parts in (([AddNoise(std=std)], [noise]), ([Quantise(bits=bits)], [rounding]), ([AddNoise(std=std), Quantise(bits=bits)], [noise, rounding])):
                levels = {name: (sum(part[name] for part in parts) + MISFIT * mean_square(update)) ** 0.5 for name in update}
                for name, factor in trusted(transforms, update).items():
                    assert float(factor) == pytest.approx(min(levels.values()) / levels[name], rel=5e-3), name


def test_all_are_trusted_alike_where_noise_does_not_differ_or_is_not_there():
    update = layered()
    for transforms in ([], [AddNoise(std=0.0)], [AddNoise(std=0.3, relative=False)], [Prune(share=0.5), SignOnly()], [Clip(bound=0.1)], [Halved()]):
        assert trusted(transforms, update) == {}
    assert trusted([AddNoise()], {name: torch.zeros(3) for name in "ab"}) == trusted([Quantise()], {}) == {}
    assert trusted([AddNoise()], {"a": torch.ones(3), "b": torch.full((3,), torch.nan)}) == {}


def test_a_tensor_without_noise_is_trusted_by_the_misfit_alone_and_little_noise_changes_next_to_nothing():
    update = {"a": torch.ones(9), "rounding": torch.full((9,), 1e-9), "dead": torch.zeros(9)}
    a = (MISFIT / 3 / (0.8 + MISFIT / 3)) ** 0.5
    assert {name: float(factor) for name, factor in trusted([AddNoise(std=1.0)], update).items()} == {"a": pytest.approx(a, rel=5e-3), "rounding": 1, "dead": 1}
    assert all(float(factor) > 0.99 for factor in trusted([AddNoise(std=1e-3)], update).values())


def test_much_noise_of_a_fixed_level_leaves_little_of_what_rounding_says():
    """Of clients' noise and rounding together the larger one decides."""
    update = {name: tensor for name, tensor in layered().items() if name != "dead"}
    loud = trusted([ClipAndNoise(clip=1e3, noise_multiplier=1.0, cohort_size=4), Quantise(bits=4)], update)
    assert loud == {} and min(map(float, trusted([Quantise(bits=4)], update).values())) < 0.8


def test_single_entries_are_trusted_by_what_noise_they_have_left():
    update = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([[0.5], [0.25]])}
    misfit = MISFIT * mean_square(update)
    found = trust_of({"a": torch.tensor([0.0, 0.7, 0.0]), "b": torch.tensor([[2.0], [0.1]])}, update)
    for name, variances in (("a", [0.0, 0.7, 0.0]), ("b", [[2.0], [0.1]])):
        expected = (misfit / (np.array(variances) + misfit)) ** 0.5
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=5e-3)
        assert torch.equal(found[name], found[name].bfloat16().float())
    assert trust_of({"a": torch.zeros(3), "b": torch.zeros(2, 1)}, update) == {}  # all alike
    assert trust_of({"a": torch.tensor([0.0, torch.nan, 1.0]), "b": torch.zeros(2, 1)}, update) == {}


def settled_by_hand(releases):
    """One entry after another: the value that most releases share, at least two, of equals the earliest; else the mean. And the variances."""
    values, variances = {}, {}
    for name, first in releases[0].items():
        each, flat, spreads, open = [one[name].flatten().tolist() for one in releases], [], [], []
        for drawn in zip(*each, strict=True):
            most = max(drawn, key=drawn.count)
            open.append(drawn.count(most) < 2)
            flat.append(sum(drawn) / len(drawn) if open[-1] else most)
            spreads.append(float(np.var(drawn, ddof=1)))
        level = np.mean([spread for spread, is_open in zip(spreads, open, strict=True) if is_open] or [0.0]) / len(releases)
        values[name], variances[name] = (np.array(one).reshape(first.shape) for one in (flat, np.where(open, level, 0.0)))
    return values, variances


def spared(update, seed, std=2.0, share=0.5):
    """What leaves: noise on some entries, which are others for every seed."""
    g = generator(seed, "spared")
    return {name: torch.where(torch.rand(tensor.shape, generator=g) < share, tensor + std * torch.randn(tensor.shape, generator=g), tensor) for name, tensor in update.items()}


@pytest.mark.parametrize("rounds", [2, 4, 7])
def test_entries_on_which_releases_agree_are_exact_and_the_others_averaged(rounds):
    update = some_update(0) | {"zeros": torch.zeros(40), "one": torch.ones(1)}
    releases = [spared(update, seed) for seed in range(rounds)]
    before = [{name: tensor.clone() for name, tensor in one.items()} for one in releases]
    (found, variances), (values, spreads) = settled(releases), settled_by_hand(releases)
    quiet = {name: sum((one[name] == tensor).int() for one in releases) for name, tensor in update.items()}
    for name, tensor in update.items():
        exact = quiet[name] >= 2
        assert torch.equal(found[name][exact], tensor[exact]) and (variances[name][exact] == 0).all() and (variances[name][~exact] > 0).all()
        np.testing.assert_allclose(found[name].numpy(), values[name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variances[name].numpy(), spreads[name], rtol=1e-9)
        assert found[name].dtype == tensor.dtype and all(torch.equal(one[name], old[name]) for one, old in zip(releases, before, strict=True))
    assert 0.1 < float((quiet["weight"] >= 2).float().mean()) < 0.99
    if rounds > 2:  # what the variance is of: mostly the noise's own, 4, over the releases, less where one of them is quiet
        left = variances["weight"][variances["weight"] > 0]
        errors = (found["weight"] - update["weight"])[variances["weight"] > 0].double().square().mean()
        assert len(left) > 10 and float(left[0]) == pytest.approx(float(errors), rel=0.5)


def test_of_values_that_recur_the_most_frequent_one_is_exact():
    releases = [{"a": torch.tensor([value, other])} for value, other in ((5.0, 1.0), (3.0, 2.0), (5.0, 2.0), (3.0, 3.0), (3.0, 1.0))]
    found, variances = settled(releases)
    assert found["a"].tolist() == [3.0, 1.0] and variances["a"].tolist() == [0.0, 0.0]


class Spares:
    """A user's own, which says so."""

    spares = True

    def apply(self, update, *, generator):
        return update


@pytest.mark.parametrize(
    ("transforms", "spares"),
    [
        ([], False), ([NoisySlices()], True), ([NoisySlices(std=0.0)], False), ([NoisySlices(slices=4, noisy=4)], False), ([Spares()], True), ([Halved()], False),
        ([AddNoise(std=1.0)], False), ([Quantise(bits=2)], False), ([Prune()], False), ([SignOnly()], False), ([Orthogonal()], False),
        ([Prune(share=0.9), NoisySlices()], True), ([Clip(bound=1.0), NoisySlices()], True), ([AddNoise(std=0.0), NoisySlices()], True),
        ([NoisySlices(), Prune(share=0.9)], False), ([NoisySlices(), SignOnly()], False), ([NoisySlices(), Clip()], False), ([NoisySlices(), Quantise(bits=8)], False),
        ([AddNoise(std=0.1), NoisySlices()], False), ([NoisySlices(), NoisySlices()], False), ([Halved(), NoisySlices()], False),
    ],
)  # fmt: skip
def test_agreement_means_truth_where_the_last_change_alone_draws_and_spares_entries(transforms, spares):
    defence = Defence(torch.nn.Linear(2, 2))
    defence.transforms = tuple(transforms)
    assert defence.spares is spares


def test_agreement_means_nothing_where_more_is_drawn_than_changes_of_updates():
    model = torch.nn.Linear(2, 2)
    for name in ("share", "encode", "stepped"):
        own = type("OwnDefence", (Defence,), {name: lambda self, *given, **more: given[0], "transforms": (NoisySlices(),)})
        assert not own(model).spares
    encoded, private = Defence(model), Defence(model)
    encoded.transforms = private.transforms = (NoisySlices(),)
    assert encoded.spares and private.spares
    encoded.encoders, private.budget = (Spares(),), Budget(epsilon=1.0, delta=1e-5, noise_multiplier=1.0, unit="client")
    assert not encoded.spares and not private.spares


def test_combinations_are_built_in_their_order():
    recipe = Recipe(data=Data(name="synthetic"), model=Model(cut="blocks.1"))
    defence = build.make_defence((LearnedPerturbation(), Halved(), Pruning(share=0.5)), recipe, Shapes, seed=0)
    assert defence.noise_shape is not None and [type(one) for one in defence.transforms] == [Halved, Prune]
    alone = build.make_defence(Pruning(), recipe, Shapes, seed=0)
    assert alone.noise_shape is None and len(alone.transforms) == 1
    shared = defence.share(an_update(), generator=generator(0))
    assert int((shared["weight"] != 0).sum()) == 12


def test_what_cannot_be_combined_is_said():
    recipe = Recipe(defences={"x": (LearnedPerturbation(), Undefended())})
    assert any("at most one may change the training" in text for text in problems(recipe))
    assert any("empty tuple" in text for text in problems(Recipe(defences={"x": ()})))
