"""Every change of an update in a run: small synthetic cells, one round of training, what it released, short attacks."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gidef import applications, build, cells, fits, methods, metrics, observe
from gidef import attack as attacks
from gidef.attack import latent
from gidef.attack.batch import targets_of
from gidef.attack.imprint import Imprinted
from gidef.attack.matching import HELD, Unordered
from gidef.config import (
    DPSGD,
    Censor,
    Clipping,
    DecoderAware,
    EotMatching,
    GenerativePrior,
    GradDefense,
    GradientNoise,
    ImprintServer,
    JointMatching,
    LearnedInversion,
    LearnedPerturbation,
    MixUp,
    MultiRound,
    NaiveMatching,
    Pruning,
    Quantisation,
    ReadLatent,
    SecureAggregation,
    Sign,
    SkipLayers,
    Soteria,
    Standard,
    Undefended,
)
from gidef.defence.accounting import Budget
from gidef.defence.base import Defence
from gidef.defence.share import MISFIT
from tests.hasty import of_fewer
from tests.small_run import RECIPE, evaluated, trained_once

ALONE = {
    "pruning": Pruning(share=0.5), "gaussian": GradientNoise(), "laplace": GradientNoise(law="laplace", std=1e-4, relative=False),
    "clipping": Clipping(bound=0.05), "per tensor": Clipping(bound=0.01, per_tensor=True), "sign": Sign(), "quantisation": Quantisation(),
    "censor": Censor(draws=3), "soteria": Soteria(share=0.5), "slices": GradDefense(),
}  # fmt: skip
BEHIND = {"learned + all": (LearnedPerturbation(ramp=0.0), Clipping(bound=1.0), Soteria(), Censor(draws=2), GradDefense(), GradientNoise(), Quantisation(), Sign(), Pruning(share=0.5))}
AWARE = {
    f"learned + {name}": (*((MixUp(),) if name == "pruning" else ()), LearnedPerturbation(ramp=0.0), ALONE[name]) for name in ("pruning", "soteria", "censor")
}  # fmt: skip
COVERED = {
    "noise": GradientNoise(std=1e-9, relative=False), "clients' noise": DPSGD(clip=100.0, noise_multiplier=1e-11, target_epsilon=None, level="client"),
    "censor": Censor(draws=2), "slices": GradDefense(std=1e-9, relative=False),
}  # fmt: skip
"""What lies between pruning and the release, and leaves no zero, or not all of them."""
DEFENCES = {"undefended": Undefended(), **ALONE, **BEHIND, **AWARE}
EXACT = ("pruning", "clipping", "per tensor", "sign", "censor", "soteria")
"""Those whose imitation at the true images is what was released; the others add what nobody can know."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with trained_once(tmp_path_factory.mktemp, dataclasses.replace(RECIPE, defences=DEFENCES)) as one:
        yield one


def released(run, one, **more):
    return observe.release(run, one, one.snapshots["final"], seed=0, **more)


@pytest.mark.parametrize("kind", ["gradient", "delta"])
@pytest.mark.parametrize("name", [*ALONE, *BEHIND])
def test_a_round_is_trained_and_attacked(name, kind, trained):
    run, one = trained(name)
    bare = trained("undefended")[1]
    sent, plain = (o.training.participation.train(o.training.server, run.setting.clients[0]).delta for o in (one, bare))
    assert all(tensor.isfinite().all() for tensor in sent.values())
    assert name in BEHIND or any(not torch.equal(sent[key], plain[key]) for key in plain)
    run = evaluated(run, release=kind, local_steps=1 if kind == "gradient" else 2)
    victims = released(run, one)
    for attack in (NaiveMatching(iterations=3), JointMatching(iterations=3), *([SkipLayers(iterations=3)] if name == "soteria" else [])):
        plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0))
        for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0):
            assert found.status == "ok" and found.images.isfinite().all() and found.losses.isfinite().all(), found.error


@pytest.mark.parametrize("attack", [EotMatching(iterations=2, samples=2), MultiRound(iterations=2, rounds=2)], ids=["eot", "rounds"])
def test_the_mean_over_noise_and_several_rounds_are_attacked_through_every_change(attack, trained):
    run, one = trained("learned + all")
    snapshot = one.snapshots["final"]
    releases = [observe.release(run, one, snapshot, seed=0, repeat=repeat) for repeat in range(getattr(attack, "rounds", 1))]
    plan = methods.plan(methods.make_case(run, one, snapshot, attack, releases, seed=0))
    assert all(found.status == "ok" for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0))


@dataclasses.dataclass(frozen=True)
class Own:
    changes_update = True

    def apply(self, update, *, generator):
        return {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in update.items()}

    def reveals(self, update):
        return {}

    def imitate(self, update, seen):
        return update


class Still(Own):
    random = False

    def apply(self, update, *, generator):
        return update


DRAWS = {"undefended": False, **dict.fromkeys(ALONE, True)} | dict.fromkeys(("pruning", "clipping", "per tensor", "sign", "soteria"), False)
DRAWN = {"none": (GradientNoise(std=0.0), False), "no slices": (GradDefense(std=0.0), False), "own": (Own(), True), "own still": (Still(), False), "own behind": ((Sign(), Own()), True)}


@pytest.mark.parametrize(("name", "draws"), [*DRAWS.items(), *((name, draws) for name, (_, draws) in DRAWN.items())])
def test_several_releases_are_attacked_where_they_differ(name, draws, trained, tmp_path):
    run, one = trained(name if name in DEFENCES else "undefended")
    if name in DRAWN:
        defence = build.make_defence(DRAWN[name][0], run.recipe, run.setting.dataset, seed=0)
        one = dataclasses.replace(one, training=dataclasses.replace(one.training, defence=defence))
    first, other = (released(run, one, repeat=repeat).updates[0] for repeat in range(2))
    assert any(not torch.equal(first[key], tensor) for key, tensor in other.items()) is draws
    recipe = dataclasses.replace(run.recipe, attacks={"rounds": MultiRound(rounds=2)}, defences={name: Undefended()})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    assert [cell.name for cell in cells.make_cells(run, {(name, 0): one}, tmp_path)] == ["rounds"] * draws
    assert [row["reason"] for row in cells.not_applicable(run, {(name, 0): one})] == ["it needs a defence that draws something in every release"] * (not draws)


def test_a_training_time_defence_of_ones_own_counts_as_drawing_where_it_changes_what_leaves_by_itself(trained):
    model = trained("undefended")[1].training.defence.model
    for name in ("share", "encode", "stepped"):
        own = type("OwnDefence", (Defence,), {name: lambda self, *given, **more: given[0]})
        assert own(model).random and not Defence(model).random
    assert not type("Silent", (Defence,), {"draw_noise": lambda self, count, **more: None})(model).random


def test_several_releases_average_the_noise_on_updates_out(trained):
    run, bare = trained("undefended")
    defence = build.make_defence(GradientNoise(std=2.0), run.recipe, run.setting.dataset, seed=0)
    run, one = evaluated(run, batch_size=1), dataclasses.replace(bare, training=dataclasses.replace(bare.training, defence=defence))
    found = {}
    for attack in (JointMatching(iterations=50), MultiRound(iterations=50, rounds=4)):
        releases = [released(run, one, repeat=repeat) for repeat in range(getattr(attack, "rounds", 1))]
        plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, releases, seed=0))
        [got] = attacks.run(plan.observations[:1], plan.make_simulate, plan.matching, seed=0)
        found[type(attack)] = float(metrics.psnr_db(got.images.clamp(0, 1), releases[0].images[0]))
    assert found[MultiRound] > found[JointMatching] + 1.5, found


@pytest.mark.parametrize("chosen", [GradientNoise(std=1.0), Quantisation(bits=2)], ids=["noise", "2 bits"])
def test_an_attacker_who_adapts_gains_by_trusting_tensors_by_their_noise(chosen, trained):
    run, one = with_defence(chosen, trained, 1)
    victims = observe.release(run, one, one.snapshots["untrained"], seed=0)
    plan = methods.plan(methods.make_case(run, one, one.snapshots["untrained"], JointMatching(iterations=60), [victims], seed=0))
    found = {}
    for trusts in (True, False):
        seen = [seen if trusts else dataclasses.replace(seen, trust={}) for seen in plan.observations[:2]]
        got = attacks.run(seen, plan.make_simulate, plan.matching, seed=0)
        found[trusts] = sum(float(metrics.psnr_db(one.images.clamp(0, 1), truth)) for one, truth in zip(got, victims.images[:2], strict=True)) / 2
    assert found[True] > found[False] + 0.5, found


def rounds_of(run, one, attack, count):
    """Releases of the same batches, and what an attack is given of them."""
    name = list(one.snapshots)[-1]
    releases = [observe.release(run, one, one.snapshots[name], seed=0, repeat=repeat) for repeat in range(count)]
    return releases, methods.make_case(run, one, one.snapshots[name], attack, releases, seed=0)


def test_what_two_releases_leave_alike_is_read_as_it_was(trained):
    """GradDefense's noise is on other slices in every release: averaged over them, much of it is left."""
    run, one = with_defence(GradDefense(std=3.0), trained, 1)
    bare = with_defence(Undefended(), trained, 1)[1]
    attack, truth = MultiRound(iterations=150, rounds=4), observe.release(run, bare, bare.snapshots["untrained"], seed=0)
    releases, case = rounds_of(run, one, attack, 4)
    plan = methods.plan(case)
    assert len(case.rounds) == 1 and "read as one: exact where two agree bit for bit" in cells.note_of(run, one, attack)
    for seen, update in zip(plan.observations, truth.updates, strict=True):
        exact = {name: factor == 1 for name, factor in seen.trust.items()}
        assert all(torch.equal(seen.update[name][chosen], update[name][chosen]) for name, chosen in exact.items())
        share = sum(int(chosen.sum()) for chosen in exact.values()) / sum(map(torch.numel, exact.values()))
        assert 0.3 < share < 0.95 and seen.trust.keys() == seen.update.keys()
    seen, found = plan.observations[0], {}
    mean = {name: torch.stack([release.updates[0][name] for release in releases]).mean(0) for name in seen.update}
    for way, one in (("settled", seen), ("averaged", dataclasses.replace(seen, update=mean, trust={}))):
        [got] = attacks.run([one], plan.make_simulate, plan.matching, seed=0)
        found[way] = float(metrics.psnr_db(got.images.clamp(0, 1), releases[0].images[0]))
    assert found["settled"] > found["averaged"] + 2.5, found


@pytest.mark.parametrize("kind", ["gradient", "delta"])
def test_what_the_releases_of_a_sum_leave_alike_is_its_own(kind, trained):
    """All clients of the sum must have left an entry as it is, twice."""
    run, one = defended(trained, GradDefense(std=1.0, noisy=2), SecureAggregation())
    bare = defended(trained, Undefended(), SecureAggregation())[1]
    run = evaluated(run, release=kind)
    truth = released(run, bare)
    _, case = rounds_of(run, one, MultiRound(rounds=6), 6)
    [seen, *_], update = case.observations, truth.updates[0]
    exact = {name: factor == 1 for name, factor in seen.trust.items()}
    assert len(case.rounds) == 1 and sum(int(chosen.sum()) for chosen in exact.values()) > 1000
    assert all(torch.equal(seen.update[name][chosen], update[name][chosen]) for name, chosen in exact.items())


UNSETTLED = {
    "pruning behind": (GradDefense(), Pruning(share=0.9)), "signs behind": (GradDefense(), Sign()), "noise before": (GradientNoise(), GradDefense()), "2 bits": (Quantisation(bits=2),),
    "all noisy": (GradDefense(slices=4, noisy=4),), "noise": (GradientNoise(),), "noise on the latent": (LearnedPerturbation(ramp=0.0), GradDefense()), "MixUp": (MixUp(), GradDefense()),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSETTLED)
def test_releases_that_agree_on_what_is_not_the_update_are_left_as_they_are(name, trained):
    """Pruned zeros, signs and levels of a rounded update agree bit for bit as well; and of updates that differ, nothing is the same."""
    run, one = defended(trained, *UNSETTLED[name], name="learned + soteria" if name == "noise on the latent" else "undefended")
    attack = MultiRound(rounds=3)
    releases, case = rounds_of(run, one, attack, 3)
    [seen, *_] = methods.plan(case).observations
    assert not observe.settles(run, one) and len(case.rounds) == 3 and "read as one" not in cells.note_of(run, one, attack)
    for number, release in enumerate(releases):
        assert all(torch.equal(seen.update[f"{number}/{key}"], release.updates[0][key]) for key in case.observations[0].update)
    assert all(factor.ndim == 0 for factor in seen.trust.values())
    if name in ("pruning behind", "signs behind", "2 bits"):
        weights = [release.updates[0]["backbone.head.weight"] for release in releases]
        assert float((weights[0].sign() == weights[1].sign() if "signs" in name else weights[0] == weights[1]).float().mean()) > 0.3


def test_releases_under_noise_that_images_keep_for_ever_settle(trained):
    """The noise on the latent is the same unknown in all of them, and searched as such."""
    run, one = defended(trained, LearnedPerturbation(ramp=0.0, frozen=True), GradDefense(), name="learned + soteria")
    _, case = rounds_of(run, one, MultiRound(rounds=2), 2)
    assert observe.settles(run, one) and len(case.rounds) == 1
    assert methods.plan(case).matching.noise_shape == case.noise_shape


@pytest.mark.parametrize("kind", ["gradient", "delta"])
@pytest.mark.parametrize("attack", [NaiveMatching(), SkipLayers(), JointMatching(), EotMatching(), MultiRound(rounds=2)], ids=lambda one: type(one).__name__)
def test_who_adapts_trusts_tensors_by_their_noise_and_nobody_else_does(attack, kind, trained):
    run, one = defended(trained, GradientNoise(std=1.0), SecureAggregation())
    run = evaluated(run, release=kind)
    releases = [released(run, one, repeat=repeat) for repeat in range(getattr(attack, "rounds", 1))]
    seen = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, releases, seed=0)).observations[0]
    if isinstance(attack, NaiveMatching) and not observe.adapts(attack):
        assert seen.trust == {}
        return
    assert seen.trust.keys() == seen.update.keys()
    for number, part in enumerate(seen.rounds()):
        powers, entries = ({name: float(function(tensor)) for name, tensor in part.update.items()} for function in (lambda one: one.square().sum(), torch.numel))
        levels = {name: (0.8 * power / entries[name] + MISFIT * sum(powers.values()) / sum(entries.values())) ** 0.5 for name, power in powers.items()}
        for name, level in levels.items():
            assert float(part.trust[name]) == pytest.approx(min(levels.values()) / level, rel=5e-3), (number, name)


def private(trained, noise_multiplier, size, *others):
    """The undefended run at its first weights, with DP-SGD of images in its place."""
    run, one = with_defence(Undefended(), trained, size)
    spends = Budget(noise_multiplier, math.inf, 1e-5, "sample")
    defence = build.make_defence((DPSGD(noise_multiplier=noise_multiplier, target_epsilon=None), *others), run.recipe, run.setting.dataset, seed=0, spends=spends)
    return run, dataclasses.replace(one, training=dataclasses.replace(one.training, defence=defence))


STEPS = {
    "gradient": {}, "delta": {"release": "delta", "local_lr": 0.05}, "steps": {"release": "delta", "local_lr": 0.05, "local_steps": 2, "local_epochs": 2},
    "momentum": {"release": "delta", "local_lr": 0.05, "local_steps": 2, "local_epochs": 2, "local_momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("others", [(), (SecureAggregation(),)], ids=["alone", "sum"])
@pytest.mark.parametrize("steps", STEPS)
def test_who_adapts_is_told_the_share_of_dp_sgd_s_noise_in_a_release(steps, others, trained):
    run, one = private(trained, 0.02, 4, *others)
    run = evaluated(run, **STEPS[steps])
    releases = [observe.release(run, one, one.snapshots["untrained"], seed=0, repeat=repeat) for repeat in range(6)]
    first = releases[0].updates[0]
    noise = sum(float(torch.stack([release.updates[0][name] for release in releases]).var(0).sum()) for name in first)
    adapted, naive = (observe.observations(run, one, one.snapshots["untrained"], attack, releases[0])[0] for attack in (JointMatching(), NaiveMatching()))
    expected = noise / sum(float(tensor.square().sum()) for tensor in first.values())
    assert naive.noise == 0.0 and adapted.noise == pytest.approx(expected, rel=0.03) and adapted.noise > 0.3


def test_of_noise_behind_adam_s_steps_the_law_tells_nothing(trained):
    run, one = private(trained, 0.02, 4)
    run = evaluated(run, release="delta", local_steps=2, local_optimiser="adam", local_lr=1e-3)
    victims = observe.release(run, one, one.snapshots["untrained"], seed=0)
    assert observe.observations(run, one, one.snapshots["untrained"], JointMatching(), victims)[0].noise == 0.0


class Components(torch.nn.Module):
    """A generator: the mean of public images and their principal components."""

    def __init__(self, images, count):
        super().__init__()
        self.shape, flat = images.shape[1:], images.flatten(1)
        self.mean = torch.nn.Parameter(flat.mean(0))
        _, sizes, parts = torch.linalg.svd(flat - self.mean, full_matrices=False)
        self.parts = torch.nn.Parameter(parts[:count] * sizes[:count, None] / len(flat) ** 0.5)

    def forward(self, codes):
        return (self.mean + codes @ self.parts).clamp(0, 1).unflatten(1, self.shape)


def generative_plan(run, one, attack, victims):
    fitted = {"generator": Components(run.setting.dataset.val.images.float() / 255, attack.code)}
    return methods.plan(methods.make_case(run, one, one.snapshots["untrained"], attack, [victims], seed=0, fitted=fitted))


def stage(plan, settings, chunk):
    return attacks.drain(attacks.run_chunk(chunk, plan.observations, plan.make_simulate(), settings, seed=0))


def generative(run, one, attack):
    """(plan, rows of its first stage, those of its second one)."""
    plan = generative_plan(run, one, attack, observe.release(run, one, one.snapshots["untrained"], seed=0))
    chunk = tuple((observation, 0) for observation in range(len(plan.observations)))
    first = stage(plan, plan.matching, chunk)
    return plan, first, stage(plan, methods.refined(plan, first), chunk)


def test_under_noise_on_the_update_pixels_stay_by_the_codes_that_saw_through_it(trained):
    """Pixels that are free lose it in as many iterations."""
    run, one = private(trained, 0.02, 1)
    victims, attack = observe.release(run, one, one.snapshots["untrained"], seed=0), GenerativePrior(iterations=30, code=16, tv=0.0)
    plan, chunk = generative_plan(run, one, attack, victims), ((0, 0), (1, 0))
    plan = dataclasses.replace(plan, refine=dataclasses.replace(plan.refine, iterations=30))
    codes = stage(plan, plan.matching, chunk)
    held = stage(plan, settings := methods.refined(plan, codes), chunk)
    free = stage(plan, dataclasses.replace(settings, priors=()), chunk)
    found = [float(metrics.psnr_db(rows["images"][:, 0], victims.images[:2, 0]).mean()) for rows in (codes, held, free)]
    assert found[1] > found[0] - 0.1 and found[2] < found[0] - 2, found


@pytest.mark.parametrize("labels", ["known", "recovered", "searched"])
@pytest.mark.parametrize("chosen", ["dp-sgd", "noise", "sum"])
def test_pixels_are_held_to_the_codes_images_by_what_the_law_makes_likely(chosen, labels, trained):
    noises = {"noise": GradientNoise(std=1.0), "sum": (GradientNoise(std=1.0), SecureAggregation())}
    run, one = private(trained, 0.01, 2) if chosen == "dp-sgd" else with_defence(noises[chosen], trained, 2)
    attack = GenerativePrior(iterations=10, code=16, code_share=0.3, labels=labels)
    plan, first, second = generative(run, one, attack)
    share = sum(seen.noise for seen in plan.observations) / len(plan.observations)
    assert 0 < share < 1 and plan.matching.iterations == round((0.3 + 0.7 * share) * 10) and plan.whole.iterations in (10, 11)
    assert (first["failure"] == 0).all() and (second["failure"] == 0).all()
    torch.testing.assert_close(second["first_fit"], first["fit"], rtol=1e-4, atol=1e-6)
    [name] = [name for name in plan.refine.searched if name.startswith(HELD)]
    assert torch.equal(second[name], first["images"])
    (weight, prior), seen = plan.refine.priors[-1], plan.observations[0]
    assert not plan.matching.priors and not any(name.startswith(HELD) for name in plan.matching.searched)
    entries, pixels = sum(tensor.numel() for tensor in seen.update.values()), seen.num_examples * 3 * 16 * 16
    likely = pixels / (2 * 0.05**2) * seen.noise / (entries * (1 - seen.noise) ** 0.5)
    codes = first["images"][0]
    point = attacks.Point(codes + 0.2, None, None, seen.params, {**seen.known, name: codes})
    assert weight * float(prior(point)) == pytest.approx(likely * 0.2**2, rel=1e-4)


@pytest.mark.parametrize("chosen", [Undefended(), Pruning(share=0.5), GradientNoise(std=0.0), (GradientNoise(), Sign())], ids=["undefended", "pruning", "none", "signs"])
def test_without_noise_that_the_law_tells_of_a_generator_s_codes_and_pixels_are_searched_as_ever(chosen, trained):
    run, one = with_defence(chosen, trained, 1)
    plan, first, second = generative(run, one, GenerativePrior(iterations=10, code=16, code_share=0.3))
    assert (plan.matching.iterations, plan.refine.iterations) == (3, 7) and not plan.refine.priors and not plan.refine.searched
    assert not any(name.startswith(HELD) for seen in plan.observations for name in seen.known) and not any(name.startswith(HELD) for name in second)
    assert not torch.equal(first["images"], second["images"])


def test_images_of_codes_follow_their_rows_into_the_order_of_a_guess():
    rows, order = torch.rand(2, 4, 3, 2, 2), torch.tensor([[3, 1, 2, 0], [1, 0, 3, 2]])
    moved = Unordered(batches=2).placed({"images": rows, f"{HELD}images": rows, "alpha": rows}, order)
    assert torch.equal(moved[f"{HELD}images"], moved["images"]) and not torch.equal(moved["images"], rows) and torch.equal(moved["alpha"], rows)


@pytest.mark.parametrize(("name", "takes"), [("gaussian", True), ("quantisation", True), ("pruning", False), ("sign", False), ("undefended", False), ("no noise", False), ("dp-sgd", True), ("unlocked", True)])
def test_an_ensemble_takes_codes_of_a_generator_where_updates_carry_noise_and_who_asks_gets_them_anywhere(name, takes, trained, tmp_path):
    run, one = trained(name if name in DEFENCES else "undefended")
    if name == "no noise":
        run, one = defended(trained, GradientNoise(std=0.0))
    if name in ("dp-sgd", "unlocked"):
        _, one = private(trained, 0.02, 2)
        one = dataclasses.replace(one, snapshots={"final": one.snapshots["untrained"]})
    if name == "unlocked":  # a private model that is only looked at
        one.training.defence.noise_multiplier = None
    recipe = dataclasses.replace(run.recipe, attacks={"smoke": Standard(version="smoke"), "alone": GenerativePrior()}, defences={name: Undefended()})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    made = [cell.name for cell in cells.make_cells(run, {(name, 0): one}, tmp_path)]
    assert "alone" in made and ("smoke - generative" in made) is takes
    reasons = {row["attack"]: row["reason"] for row in cells.not_applicable(run, {(name, 0): one})}
    assert reasons.get("smoke - generative") == (None if takes else "the updates carry no noise that a prior could see through")


@pytest.mark.parametrize(("name", "distance", "reads"), [("clipping", "cosine", True), ("clipping", "l2", False), ("per tensor", "cosine", False), ("pruning", "cosine", False)])
def test_a_latent_is_read_of_an_update_that_was_shortened_and_of_none_that_was_changed_otherwise(name, distance, reads, trained, tmp_path):
    run, one = trained(name)
    attack = ReadLatent(iterations=1, distance=distance)
    recipe = dataclasses.replace(run.recipe, attacks={"read": attack, "naive": NaiveMatching()}, defences={name: Undefended()})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    assert [cell.name for cell in cells.make_cells(run, {(name, 0): one}, tmp_path)] == (["read", "naive"] if reads else ["naive"])
    if not reads:
        return
    run = of_fewer(evaluated(run, batch_size=1), 2)
    victims = released(run, one)
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0))
    assert "read in 2 of 2" in plan.note
    matching = dataclasses.replace(plan.matching, start=lambda o, r: (victims.images[o], None), iterations=0, snapshots=0)
    assert all(found.fit < 1e-3 for found in attacks.run(plan.observations, plan.make_simulate, matching, seed=0))


def recovered(run, one, attack):
    """Share of the labels that an attack recovers of all victims, and whether each update's scale is known."""
    releases = [observe.release(run, one, one.snapshots["untrained"], seed=0, repeat=repeat) for repeat in range(getattr(attack, "rounds", 1))]
    plan = methods.plan(methods.make_case(run, one, one.snapshots["untrained"], attack, releases, seed=0))
    labels, _, untold = targets_of(plan.observations, plan.matching, {"device": "cpu", "dtype": torch.float32})
    assert not untold.any()
    right = [metrics.label_recovery(found, releases[0].all_labels(batch)) for batch, found in enumerate(labels)]
    return sum(right) / len(right), {seen.scaled for seen in plan.observations}


def with_defence(chosen, trained, size):
    """The undefended run, at its first weights, with what another defence would release of batches of this size."""
    run, one = trained("undefended")
    defence = build.make_defence(chosen, run.recipe, run.setting.dataset, seed=0)
    first = dataclasses.replace(one.snapshots["final"], params=one.training.defence.initial(), name="untrained")
    one = dataclasses.replace(one, training=dataclasses.replace(one.training, defence=defence), snapshots={"untrained": first})
    return evaluated(run, batch_size=size), one


@pytest.mark.parametrize("kind", ["gradient", "delta"])
@pytest.mark.parametrize("chosen", [Clipping(bound=0.01), Clipping(bound=1e-3, per_tensor=True), (Clipping(bound=0.01), SecureAggregation())], ids=["clip", "tensors", "sum"])
def test_clipping_hides_no_label_that_the_undefended_update_tells(chosen, kind, trained):
    bare = (Undefended(), SecureAggregation()) if isinstance(chosen, tuple) else Undefended()
    for defence, known in ((bare, True), (chosen, False)):
        run, one = with_defence(defence, trained, 2)
        found, scaled = recovered(evaluated(run, release=kind), one, NaiveMatching(labels="recovered"))
        assert scaled == {known} and found == 1.0


def test_several_rounds_tell_the_labels_that_the_mean_of_their_updates_tells(trained):
    """Of the noise of one round a seventh of the labels is chance, and twice as much is right."""
    run, one = with_defence(GradientNoise(std=1.0), trained, 1)
    several, alone = recovered(run, one, MultiRound(rounds=8, labels="recovered"))[0], recovered(run, one, NaiveMatching(labels="recovered"))[0]
    assert several == 1.0 > alone, (several, alone)


@pytest.mark.parametrize("policy", ["full", "all"])
@pytest.mark.parametrize("name", AWARE)
def test_a_candidate_is_kept_near_what_the_decoder_makes_of_it_whatever_an_update_reveals(name, policy, trained):
    run, one = trained(name, policy)
    case = methods.make_case(run, one, one.snapshots["final"], DecoderAware(iterations=3), [victims := released(run, one)], seed=0)
    plan, seen = methods.plan(case), case.observations[0]
    assert any(key.startswith("share/") for key in seen.known) and ("pruning" not in name or any(key.startswith("encode/") for key in plan.matching.searched))
    [(_, prior)] = plan.matching.priors
    held = {**one.training.defence.initial(), **seen.known, **seen.params}
    model, decoder = copy.deepcopy(case.model), copy.deepcopy(case.decoder)
    for module, prefix in ((model, ""), (decoder, "decoder.")):
        module.load_state_dict({key: held[prefix + key] for key in module.state_dict()})
    with torch.no_grad():
        made = decoder(model.run(victims.images[0], victims.noise[0]).perturbed).clamp(0, 1)
    point = attacks.Point(victims.images[0], seen.labels, victims.noise[0], seen.params, {**seen.known, "encode/0/": torch.zeros(3)})
    torch.testing.assert_close(prior(point), (victims.images[0] - made).square().mean())
    found = attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0)
    assert [result.status for result in found] == ["ok"] * len(found), [result.error for result in found]


def test_a_gradient_alone_is_simulated_whatever_an_update_reveals(trained):
    """For an attack of one's own that builds on `Case.gradient`, as on the whole release."""
    run, one = trained("learned + pruning")
    case = methods.make_case(run, one, one.snapshots["final"], JointMatching(iterations=2), [victims := released(run, one)], seed=0)
    seen, labels = case.observations[0], F.one_hot(victims.labels[0], 8).float()
    every = {**seen.known, **{name: torch.zeros(found.shape) for name, found in case.searched.items()}}
    assert {name.partition("/")[0] for name in every} >= {"share", "encode"}
    rest = {name: tensor for name, tensor in every.items() if "/" not in name}
    expected = one.training.defence.simulator(terms="utility")()(seen.params, rest, victims.images[0], labels, victims.noise[0])
    for name, tensor in case.gradient()(seen.params, every, victims.images[0], labels, victims.noise[0]).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("name", ALONE)
def test_at_the_true_images_an_attacker_who_adapts_simulates_what_was_released(name, trained):
    """Exactly where the change can be known; closer than the naive one wherever that is off."""
    run, one = trained(name)
    victims, snapshot = released(run, one), one.snapshots["final"]
    apart = {}
    for attack in (NaiveMatching(), JointMatching()):
        observation = observe.observations(run, one, snapshot, attack, victims)[0]
        simulate = observe.observed_simulator(run, one, snapshot, terms="client", adaptive=observe.adapts(attack))()
        found = simulate(observation.params, observation.known, victims.images[0], F.one_hot(victims.labels[0], 8).float(), None)
        distance = sum(float((found[key] - tensor).square().sum()) for key, tensor in observation.update.items())
        apart[type(attack)] = (distance / sum(float(tensor.square().sum()) for tensor in observation.update.values())) ** 0.5
    assert apart[NaiveMatching] > 1e-3
    if name in EXACT:
        assert apart[JointMatching] < 1e-5
    else:
        assert apart[JointMatching] == apart[NaiveMatching]


def defended(trained, *chosen, name="undefended"):
    """A run with another defence, or other changes of its updates."""
    run, one = trained(name)
    spends = Budget(1e-11, math.inf, 1e-5, "client") if any(isinstance(part, DPSGD) for part in chosen) else None
    defence = build.make_defence(chosen, run.recipe, run.setting.dataset, seed=0, spends=spends)
    return run, dataclasses.replace(one, training=dataclasses.replace(one.training, defence=defence))


@pytest.mark.parametrize("behind", COVERED)
@pytest.mark.parametrize("first", [Pruning(share=0.9), Soteria(share=0.5)], ids=["pruning", "soteria"])
def test_zeros_that_something_else_covers_are_simulated_or_left_out(first, behind, trained):
    run, one = defended(trained, first, COVERED[behind])
    for changes in ({}, {"release": "delta", "local_steps": 2}):
        run = evaluated(run, **changes)
        victims, snapshot, apart = released(run, one), one.snapshots["final"], {}
        for attack in (NaiveMatching(), JointMatching()):
            observation = observe.observations(run, one, snapshot, attack, victims)[0]
            simulate = observe.observed_simulator(run, one, snapshot, terms="client", adaptive=observe.adapts(attack))()
            found = simulate(observation.params, observation.known, victims.images[0], F.one_hot(victims.labels[0], 8).float(), None)
            distance = sum(float((found[key] - tensor).square().sum()) for key, tensor in observation.update.items())
            apart[type(attack)] = (distance / sum(float(tensor.square().sum()) for tensor in observation.update.values())) ** 0.5
            hidden = {"backbone.head.weight"} if isinstance(first, Soteria) and isinstance(attack, JointMatching) else set()
            assert observation.unmatched.keys() == hidden and observation.params.keys() == observation.update.keys() == snapshot.params.keys() - hidden
        assert apart[JointMatching] < 1e-3 < 0.1 < apart[NaiveMatching]


def test_a_layer_that_is_left_out_still_tells_the_labels_and_the_row_says_so(trained):
    run, one = defended(trained, Soteria(share=0.5), COVERED["noise"])
    run = evaluated(run, batch_size=1)
    victims, attack = released(run, one), JointMatching(iterations=2, labels="recovered")
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0))
    found = attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0)
    assert all(torch.equal(result.labels, labels) for result, labels in zip(found, victims.labels, strict=True))
    said = "the layer whose columns Soteria prunes is not matched"
    assert said in cells.note_of(run, one, attack) and said not in cells.note_of(run, one, NaiveMatching())
    assert said not in cells.note_of(*trained("soteria"), attack)


def test_a_decoded_start_reads_the_latent_off_what_is_not_matched_too(trained, monkeypatch):
    run, one = defended(trained, LearnedPerturbation(ramp=0.0), Soteria(share=0.5), COVERED["noise"], name="learned + soteria")
    run, seen = evaluated(run, batch_size=1), []
    victims, attack = released(run, one), DecoderAware(iterations=1, begin="decoded")
    case = methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0)

    def read(observations, predictor, **how):
        latent._check(observations, predictor)
        seen.extend(observations)
        return SimpleNamespace(latents=[torch.zeros(1, *case.latent_shape)], loss=torch.zeros(1), labels=torch.zeros(1, 1, dtype=torch.int64))
        yield

    monkeypatch.setattr(methods, "read_latent", read)
    images, _ = methods.plan(case).matching.start(0, 0)
    assert images.isfinite().all() and case.observations[0].unmatched.keys() == {"backbone.head.weight"}
    assert seen[0].update.keys() == seen[0].params.keys() >= {"backbone.head.weight"}
    assert torch.equal(seen[0].update["backbone.head.weight"], victims.updates[0]["backbone.head.weight"])


def test_nothing_is_left_out_where_no_matrix_would_be_left(trained):
    run, one = defended(trained, Soteria(share=0.5), COVERED["noise"])
    only = dataclasses.replace(one.snapshots["final"], params={name: t for name, t in one.snapshots["final"].params.items() if name.startswith("backbone.head")})
    assert observe.hidden_names(one, one.snapshots["final"], JointMatching()) == {"backbone.head.weight"}
    assert observe.hidden_names(one, only, JointMatching()) == set()


@pytest.mark.parametrize("chosen", [(Pruning(share=0.9), COVERED["noise"]), (Pruning(share=0.9), Quantisation(bits=2))], ids=["noise", "rounding"])
def test_guessed_entries_are_the_same_in_every_execution(chosen, trained):
    run, one = defended(trained, *chosen)
    victims, programs = released(run, one), attacks.Programs()
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], JointMatching(iterations=2), [victims], seed=0))
    found = {
        mode: attacks.run(plan.observations[:1], plan.make_simulate, plan.matching, seed=0, mode=mode, programs=programs, dtype=torch.float64)
        for mode in ("loop", "vmap", "traced")
    }  # fmt: skip
    assert programs.notices == []
    for mode in ("vmap", "traced"):
        for one, other in zip(found["loop"], found[mode], strict=True):
            torch.testing.assert_close(one.images, other.images)
            assert one.status == "ok" and one.fit != one.first_fit


def test_victims_and_clients_of_orthogonal_updates_send_nothing_along_the_true_one(trained):
    run, one = trained("censor")
    bare = dataclasses.replace(one, training=dataclasses.replace(one.training, defence=build.make_defence(Undefended(), run.recipe, run.setting.dataset, seed=0)))
    for sent, true in zip(released(run, one).updates, released(run, bare).updates, strict=True):
        for name, tensor in sent.items():
            a, b = tensor.double().flatten(), true[name].double().flatten()
            assert abs(float(a @ b)) <= 1e-5 * float(a.norm() * b.norm()) and float(a.norm() / b.norm()) == pytest.approx(1, rel=1e-5)


def test_images_at_hand_are_the_clients_own(trained):
    run, one = trained("censor")
    participation, client, seen = one.training.participation, run.setting.clients[1], []
    share = participation._share
    participation._share = lambda update, *, generator, own: seen.append(own) or share(update, generator=generator, own=own)
    try:
        participation.train(one.training.server, client)
    finally:
        participation._share = share
    [own] = seen
    images = client.images.float() / 255
    assert own.lr is None and 0 < len(own.images) <= 8 and len({tuple(image.flatten().tolist()) for image in own.images}) == len(own.images)
    for image, label in zip(own.images, own.labels, strict=True):
        rows = (images == image).flatten(1).all(1).nonzero().flatten()
        assert len(rows) and int(label) in client.labels[rows].tolist()
    assert all(torch.equal(own.params[name], tensor) for name, tensor in one.training.server.params.items())


@pytest.mark.parametrize("name", ["sign", "soteria", "gaussian", "undefended"])
def test_who_plays_the_client_on_public_images_sees_updates_as_they_leave(name, trained):
    run, one = trained(name)
    victims, snapshot = released(run, one), one.snapshots["final"]
    plain = observe.observed_simulator(run, one, snapshot, terms="client")()
    simulate = observe.changed(run, one, plain, seed=0)
    assert (simulate is plain) == (name == "undefended")
    place = (snapshot.params, {}, victims.images[0], F.one_hot(victims.labels[0], 8).float(), None)
    first, second = simulate(*place), simulate(*place)
    for key, tensor in victims.updates[0].items():
        if name == "gaussian":
            assert not torch.equal(first[key], second[key])
        else:
            torch.testing.assert_close(first[key], tensor, rtol=1e-5, atol=1e-7)


def test_a_learned_inversion_is_trained_on_changed_updates(trained, tmp_path, monkeypatch):
    run, one = trained("sign")
    run = evaluated(dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(
        run.recipe, attacks={"a7": LearnedInversion(steps=2, gradients=30)}))), batch_size=1)  # fmt: skip
    dataset = run.setting.dataset
    public = dataclasses.replace(dataset, val=dataset.train)  # twenty images at least
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, dataset=public))
    [cell] = cells.make_cells(run, {("sign", 0): one}, tmp_path)
    cell.releases, seen, fit = [released(run, one)], [], fits.fit_inverter
    cell.folder.mkdir(parents=True, exist_ok=True)

    def watched(inverter, simulate, *rest, **options):
        def noted(*place):
            seen.append(simulate(*place))
            return seen[-1]

        return fit(inverter, noted, *rest, **options)

    monkeypatch.setattr(fits, "fit_inverter", watched)
    fits.inverter_task(run, cell).do(0, lambda units: None)
    assert len(seen) >= 30 and all(len(set(update["backbone.head.weight"].abs().flatten().tolist()) - {0.0}) == 1 for update in seen)
    for found in fits.learned(run, cell)(range(len(cell.victims.updates)), lambda units: None):
        assert found.status == "ok" and found.images.isfinite().all()


@pytest.mark.parametrize(
    ("defence", "least", "most"),
    [
        (Undefended(), 60, 101), (Clipping(bound=0.05), 60, 101), (Soteria(share=0.5), 60, 101), (Pruning(share=0.99), 0, 20), (Sign(), 0, 20),
        (GradientNoise(std=1.0), 0, 20), (Censor(draws=3), 0, 20), ((Pruning(share=0.0), Sign()), 0, 20),
    ],
)  # fmt: skip
def test_what_leaves_an_imprinted_client_went_through_the_defence_and_no_label_is_granted(defence, least, most, trained, tmp_path, monkeypatch):
    run, bare = trained("undefended")
    run, snapshot, seen = evaluated(run, batch_size=1), bare.snapshots["final"], []
    one = dataclasses.replace(bare, training=dataclasses.replace(bare.training, defence=build.make_defence(defence, run.recipe, run.setting.dataset, seed=0)))
    cell = cells.Cell("defended", 0, "final", "imprint", ImprintServer(bins=32), one, snapshot, tmp_path)
    cell.releases = [released(run, bare)]
    invert = applications.invert_imprint
    monkeypatch.setattr(applications, "invert_imprint", lambda observation, **how: seen.append(observation) or invert(observation, **how))
    found = applications._imprinted(run, cell)(range(len(cell.victims.rows)), lambda units: None)
    errors = torch.stack([(one.images - images).square().mean() for one, images in zip(found, cell.victims.images, strict=True)])
    assert least < float(-10 * errors.clamp_min(1e-10).log10().mean()) < most
    assert all(observation.labels is None and observation.update.keys() == observation.params.keys() for observation in seen)
    if isinstance(defence, Clipping):  # the bound is one of the whole client's update
        assert all(float(sum(t.square().sum() for t in o.update.values())) == pytest.approx(0.05**2, rel=1e-4) for o in seen)
    if isinstance(defence, Undefended):
        assert all(torch.equal(one.labels, labels) for one, labels in zip(found, cell.victims.labels, strict=True))
        model = Imprinted(one.training.defence.model, image_shape=(3, 16, 16), bins=32)
        inside = {key if key.startswith("imprint.") else f"backbone.{key}": tensor for key, tensor in seen[0].params.items()}
        weights = {key: tensor.clone().requires_grad_() for key, tensor in inside.items()}
        F.cross_entropy(torch.func.functional_call(model, weights, (cell.victims.images[0],)), cell.victims.labels[0]).backward()
        for key, tensor in seen[0].update.items():
            torch.testing.assert_close(tensor, weights[key if key.startswith("imprint.") else f"backbone.{key}"].grad, rtol=1e-4, atol=1e-6)
