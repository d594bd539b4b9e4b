"""Every defence of data in a run: small synthetic cells, one round of training, what it released, short attacks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad

from gidef import applications, build, cells, config, fits, methods, observe
from gidef import attack as attacks
from gidef.attack import Searched
from gidef.attack.matching import Point
from gidef.config import (
    ATS,
    DCS,
    BiDO,
    DeepLeakage,
    EotMatching,
    GenerativePrior,
    ImprintServer,
    InstaHide,
    IsotropicNoise,
    JointMatching,
    LearnedInversion,
    LearnedPerturbation,
    MixUp,
    MultiRound,
    NaiveMatching,
    Pruning,
    Speed,
    Undefended,
)
from gidef.defence.encode import ENCODED
from gidef.errors import InputError
from gidef.metrics import psnr_db
from gidef.rng import generator
from tests.small_run import RECIPE, evaluated, trained_once

ALONE = {"mixup": MixUp(), "instahide": InstaHide(), "ats": ATS(), "dcs": DCS(iterations=4)}
NOTHING = {"mixup 0": MixUp(mixing=0.0), "instahide 0": InstaHide(mixed=1, signs=False), "ats 0": ATS(policy=()), "dcs 0": DCS(concealed=0)}
TOGETHER = {
    "all": (ATS(policy=("rotate 3", "color 9")), MixUp(mixing=0.5), InstaHide(mixed=2), LearnedPerturbation(ramp=0.0), Pruning(share=0.5)),
    "bido": (MixUp(), BiDO()),
}  # fmt: skip
DEFENCES = {"undefended": Undefended(), **ALONE, **NOTHING, **TOGETHER}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = dataclasses.replace(RECIPE, defences=DEFENCES, attacks={"naive": NaiveMatching(), "joint": JointMatching()}, speed=Speed(device="cpu", workers=2))
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        yield one


def released(run, one, **more):
    return observe.release(run, one, one.snapshots["final"], seed=0, **more)


def trained_on(run, one, victims, batch, *repeat):
    """What the victims' client trained on instead of a batch, by the law of the draws that the docs state."""
    snapshot, defence = one.snapshots["final"], one.training.defence
    return defence.encode(
        victims.images[batch], F.one_hot(victims.labels[batch], 8).float(), client=run.setting.clients[victims.owners[batch]],
        generator=generator(0, "victim-encode", "final", batch, *repeat), model=defence.model, params=snapshot.params,
    )  # fmt: skip


def the_draws(encoder, images, moved):
    """Weights, as an attacker may search them, of the sequence that each image went through."""
    count = len(encoder.draws())
    each = [encoder.imitate(images, None, {"draw": 1e3 * F.one_hot(torch.full((len(images),), place), count)})[0] for place in range(count)]
    errors = torch.stack([(one - moved).abs().amax((1, 2, 3)) for one in each], dim=1)
    assert errors.amin(1).max() < 1e-5
    return 1e3 * F.one_hot(errors.argmin(1), count).float()


def apart(left, right) -> float:
    return (sum(float((left[name] - right[name]).square().sum()) for name in right) / sum(float(t.square().sum()) for t in right.values())) ** 0.5


@pytest.mark.parametrize("kind", ["gradient", "delta"])
@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_a_round_is_trained_and_attacked(name, kind, trained):
    run, one = trained(name)
    bare, client = trained("undefended")[1], run.setting.clients[0]
    sent, again, plain = (o.training.participation.train(o.training.server, client, worker=worker).delta for o, worker in ((one, 0), (one, 1), (bare, 0)))
    assert name == "all" or all(torch.equal(tensor, again[key]) for key, tensor in sent.items())  # whatever worker it is; a kept decoder has moved
    assert all(tensor.isfinite().all() for tensor in sent.values()) and any(not torch.equal(sent[key], plain[key]) for key in plain)
    run = evaluated(run, release=kind, local_steps=1 if kind == "gradient" else 2)
    victims = released(run, one)
    for attack in (NaiveMatching(iterations=3), JointMatching(iterations=3), JointMatching(iterations=3, labels="recovered")):
        case = methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0)
        assert bool(case.searched) == (isinstance(attack, JointMatching))
        for batch, observation in enumerate(case.observations):
            assert observation.num_examples == 2 and not any(key.startswith(ENCODED) for key in observation.known)
            assert observation.labels is None if attack.labels == "recovered" else torch.equal(observation.labels, victims.labels[batch])
        plan = methods.plan(case)
        for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0):
            assert found.status == "ok" and found.images.isfinite().all() and found.losses.isfinite().all(), found.error
            assert found.images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", NOTHING)
def test_at_strength_zero_training_and_release_are_the_undefended_ones_bit_for_bit(name, trained):
    (run, one), (_, bare) = trained(name), trained("undefended")
    for key, tensor in bare.snapshots["final"].params.items():
        assert torch.equal(one.snapshots["final"].params[key], tensor), key
    for mine, theirs in zip(released(run, one).updates, released(run, bare).updates, strict=True):
        assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
    case = methods.make_case(run, one, one.snapshots["final"], JointMatching(), [released(run, one)], seed=0)
    assert case.searched == {}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_released_is_the_gradient_of_what_was_trained_on_and_scored_against_the_private_images(name, trained):
    run, one = trained(name)
    victims, model = released(run, one), one.training.defence.model
    private = run.setting.dataset.train.images[victims.rows].float() / 255
    assert torch.equal(victims.images, private)
    for batch, update in enumerate(victims.updates):
        images, labels = trained_on(run, one, victims, batch)
        expected = grad(lambda w, x=images, y=labels: -(y * functional_call(model, w, (x,)).log_softmax(1)).sum(1).mean())(one.snapshots["final"].params)
        assert apart(update, expected) < 1e-5
        raw = grad(lambda w, x=private[batch], y=victims.labels[batch]: F.cross_entropy(functional_call(model, w, (x,)), y))(one.snapshots["final"].params)
        assert apart(update, raw) > 0.01


@pytest.mark.parametrize("name", ALONE)
def test_an_attacker_who_adapts_can_match_exactly_and_one_who_does_not_cannot(name, trained):
    run, one = trained(name)
    victims, snapshot = released(run, one), one.snapshots["final"]
    images, labels = trained_on(run, one, victims, 0)
    shown = victims.images[0] if name == "ats" else images[:: len(images) // 2]  # what the candidate can become at best
    found = {}
    for attack in (NaiveMatching(), JointMatching()):
        case = methods.make_case(run, one, snapshot, attack, [victims], seed=0)
        assert bool(case.searched) == (isinstance(attack, JointMatching))
        granted = F.one_hot(victims.labels[0], 8).float()
        draws = {}
        for key in case.searched:
            if key.endswith("images"):
                draws[key] = images[1::2]
            elif key.endswith("draw"):
                draws[key] = the_draws(one.training.defence.encoders[0], victims.images[0], images)
            else:
                trust = 0.5 if name != "dcs" else 0.3
                mine = labels if name != "dcs" else labels[1::2]
                draws[key] = (mine + 1e-12).log() - (trust * granted + (1 - trust) / 8).log()
        observation = case.observations[0]
        update = case.simulator()(observation.params, {**observation.known, **draws}, shown, granted, None)
        found[type(attack)] = apart(update, observation.update)
    assert found[JointMatching] < 1e-4
    assert found[NaiveMatching] > 0.01


def test_partners_come_from_the_victims_own_client_alone(trained):
    run, one = trained("mixup")
    victims = released(run, one)
    for batch in range(2):
        client = run.setting.clients[victims.owners[batch]]
        images, _ = trained_on(run, one, victims, batch)
        for image, private in zip(images, victims.images[batch], strict=True):
            pool = client.images.float() / 255 - private
            share = ((image - private) * pool).flatten(1).sum(1) / pool.flatten(1).square().sum(1).clamp(min=1e-9)
            rest = (image - private - share[:, None, None, None] * pool).flatten(1).norm(dim=1)
            assert rest.min() < 1e-4


def test_several_releases_of_a_batch_are_mixed_afresh(trained):
    for name in ALONE:
        run, one = trained(name)
        first, again, other = released(run, one), released(run, one), released(run, one, repeat=1)
        for a, b, c in zip(first.updates, again.updates, other.updates, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a) and any(not torch.equal(a[key], c[key]) for key in a), name


@pytest.mark.parametrize("name", [*ALONE, *NOTHING])
def test_several_releases_are_attacked_where_they_differ(name, trained, tmp_path):
    run, one = trained(name)
    first, other = (released(run, one, repeat=repeat).updates[0] for repeat in range(2))
    assert any(not torch.equal(first[key], tensor) for key, tensor in other.items()) is (name in ALONE)
    recipe = dataclasses.replace(run.recipe, attacks={"rounds": MultiRound(rounds=2)})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    made = cells.make_cells(run, {(name, 0): one}, tmp_path)
    assert [cell.name for cell in made] == ["rounds"] * (name in ALONE)
    assert all(("each of another mixture" in cell.note) == (name in ("mixup", "instahide")) for cell in made)
    assert len(cells.not_applicable(run, {(name, 0): one})) == (name in NOTHING)


@pytest.mark.parametrize("name", ["mixup", "instahide"])
def test_a9_searches_every_mixture_by_itself_and_the_image_is_what_they_tell_together(name, trained):
    run, one = trained(name)
    releases, attack, encoder = [released(run, one, repeat=repeat) for repeat in range(3)], MultiRound(rounds=3), one.training.defence.encoders[0]
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, releases, seed=0))
    (weight, apart_from),  = plan.matching.priors
    public, observation, granted = run.setting.dataset.val, plan.observations[0], F.one_hot(releases[0].labels[0], 8).float()
    means = torch.stack([public.images[public.labels == k if (public.labels == k).any() else ...].float().div(255).mean(0) for k in range(8)])
    mixtures, labels, found = [], [], {}
    for number, victims in enumerate(releases):
        images, soft = trained_on(run, one, victims, 0, *([number] if number else []))
        mixtures.append(images)
        labels.append(soft)
        found |= {f"{number}/mixture": images, f"{number}/{ENCODED}0/labels": (soft + 1e-12).log() - (0.5 * granted + 0.5 / 8).log()}
    found = {key: found[key] for key in plan.matching.searched}  # these and no others
    # whatever the candidate, the truth of the mixtures explains the updates, in direction and length
    update = plan.make_simulate()(observation.params, {**observation.known, **found}, torch.zeros(2, 3, 16, 16), granted, None)
    assert apart(update, observation.update) < 1e-4
    power = sum(tensor.square().sum() for tensor in observation.update.values()).sqrt()
    target = {key: tensor / power for key, tensor in observation.update.items()}
    assert plan.matching.distance(update, target, 1 / power) < 1e-6
    assert plan.matching.distance({key: 2 * tensor for key, tensor in update.items()}, target, 1 / power) > 0.09
    told = encoder.unmixed(torch.stack(mixtures), torch.stack(labels), granted, means)
    point = Point(told, granted, None, observation.params, found)
    assert weight == 1.0 and apart_from(point) < 1e-9 and apart_from(point._replace(images=told + 0.1)) == pytest.approx(0.01, rel=1e-3)


def test_mixtures_are_taken_apart_only_where_their_shares_are_told(trained):
    run, one = trained("mixup")
    for name, attack, taken in (("mixup", MultiRound(), True), ("mixup", MultiRound(labels="recovered"), False), ("mixup", JointMatching(), False),
                                ("all", MultiRound(), False), ("bido", MultiRound(), True), ("ats", MultiRound(), False)):  # fmt: skip
        assert (observe.taken_apart(trained(name)[1], attack) is not None) == taken, (name, attack)
    summed = copy.copy(one.training.defence)
    object.__setattr__(summed, "secure", config.SecureAggregation())
    one = dataclasses.replace(one, training=dataclasses.replace(one.training, defence=summed))
    assert observe.taken_apart(one, MultiRound()) is None


def test_three_rounds_of_mixup_give_far_more_than_the_class_does(trained):
    run, one = trained("mixup")
    releases = [released(run, one, repeat=repeat) for repeat in range(3)]
    case = methods.make_case(run, one, one.snapshots["final"], MultiRound(rounds=3, iterations=160), releases, seed=0)
    plan, truth = methods.plan(case), releases[0].images[1]
    (found,) = attacks.run(plan.observations[1:], plan.make_simulate, plan.matching, seed=0)
    assert psnr_db(found.images, truth).mean() > psnr_db(case.means[releases[0].labels[1]], truth).mean() + 2


def test_one_alternative_without_directions_draws_nothing(trained):
    run, _ = trained("undefended")
    for policy, draws in ((("autocontrast 1, invert 0",), False), (("rotate 3",), False), (("autocontrast 1", "invert 0"), True), (("color 9",), True)):
        assert build.make_defence(ATS(policy=policy), run.recipe, run.setting.dataset, seed=0).random is draws, policy


def test_each_round_s_draw_is_searched_by_itself_and_the_truth_is_a_zero_of_all(trained):
    run, bare = trained("undefended")
    defence = build.make_defence((ATS(policy=("rotate 6", "color 9")), IsotropicNoise(std=0.3)), run.recipe, run.setting.dataset, seed=0)
    bare = dataclasses.replace(bare, training=dataclasses.replace(bare.training, defence=defence))
    snapshot, defence = bare.snapshots["final"], bare.training.defence
    releases = [released(run, bare, repeat=repeat) for repeat in range(3)]
    plan = methods.plan(methods.make_case(run, bare, snapshot, MultiRound(rounds=3), releases, seed=0))
    images, labels = releases[0].images[0], releases[0].labels[0]
    draws = []
    for number, release in enumerate(releases):
        moved, _ = defence.encode(
            images, F.one_hot(labels, 8).float(), client=run.setting.clients[release.owners[0]],
            generator=generator(0, "victim-encode", "final", 0, *([number] if number else [])), model=defence.model, params=snapshot.params,
        )  # fmt: skip
        draws.append(the_draws(defence.encoders[0], images, moved))
    assert not all(torch.equal(draws[0], draw) for draw in draws)
    noise = torch.stack([release.noise[0] for release in releases])
    assert set(plan.matching.searched) == {f"{number}/{ENCODED}0/draw" for number in range(3)}

    def fit(draws):
        searched = {f"{n}/{ENCODED}0/draw": Searched(shape=draw.shape, start=lambda shape, generator, draw=draw: draw) for n, draw in enumerate(draws)}
        matching = dataclasses.replace(plan.matching, start=lambda o, r: (images, noise), searched=searched, iterations=0)
        return float(attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))["fit"])

    assert fit(draws) < 1e-6
    assert fit([draws[0]] * 3) > 1e-3 and fit([draws[1], draws[0], draws[2]]) > 1e-3


@pytest.mark.parametrize(
    "attack", [EotMatching(iterations=2, samples=2), MultiRound(iterations=2, rounds=2), DeepLeakage(iterations=2)], ids=["eot", "rounds", "dlg"]
)
def test_other_attacks_run_through_a_whole_tuple(attack, trained):
    run, one = trained("all")
    releases = [released(run, one, repeat=repeat) for repeat in range(getattr(attack, "rounds", 1))]
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, releases, seed=0))
    assert all(found.status == "ok" for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0))


def test_a_network_is_trained_on_encoded_public_images_with_public_partners(trained, tmp_path):
    run, one = trained("mixup")
    attack = LearnedInversion(steps=2, gradients=24)
    cell = cells.Cell("mixup", 0, "final", "learned", attack, one, one.snapshots["final"], tmp_path)
    cell.releases = [released(run, one)]
    seen, encode = [], one.training.defence.encode
    one.training.defence.encode = lambda images, labels, **more: seen.append(more["client"]) or encode(images, labels, **more)
    try:
        fits.inverter_task(run, cell).do(0, lambda units: None)
    finally:
        del one.training.defence.encode
    assert len(seen) >= 24 and all(client.images is run.setting.dataset.val.images for client in seen)


def test_the_joint_attack_is_work_of_its_own_where_it_searches_the_draw(trained, tmp_path):
    for name in (*ALONE, *NOTHING):
        run, one = trained(name)
        naive, joint = cells.make_cells(run, {(name, 0): one}, tmp_path)
        assert (joint.twin is naive) == (name in NOTHING), name
        assert "scored against the private ones" in joint.note


@dataclasses.dataclass(frozen=True)
class Half:
    changes_data = True

    def encode(self, images, labels, *, client, generator):
        return images / 2, labels

    def unknowns(self, image_shape, size):
        return {}

    def imitate(self, images, labels, found):
        raise AssertionError("nothing is searched")


@dataclasses.dataclass(frozen=True)
class Unfinished:
    changes_data = True


def test_a_defence_of_data_of_ones_own_is_taken_as_it_is_or_refused(trained):
    run, _ = trained("undefended")
    defence = build.make_defence((Half(), Undefended()), run.recipe, run.setting.dataset, seed=0)
    images, labels = torch.rand(3, 3, 16, 16), torch.arange(3)
    found = defence.encode(images, labels, client=run.setting.clients[0], generator=generator(0), model=defence.model, params={})
    assert torch.equal(found[0], images / 2) and found[1] is labels
    with pytest.raises(InputError, match="Unfinished has changes_data, but no encode, unknowns, imitate"):
        build.make_defence(Unfinished(), run.recipe, run.setting.dataset, seed=0)


def test_the_bins_of_a_malicious_server_catch_what_was_trained_on(trained, tmp_path):
    found = {}
    for name in ("undefended", "instahide"):
        run, one = trained(name)
        run = evaluated(run, batch_size=1)
        cell = cells.Cell(name, 0, "final", "imprint", ImprintServer(bins=16), one, one.snapshots["final"], tmp_path)
        cell.releases = [released(run, one)]
        images = torch.cat([one.images for one in applications._imprinted(run, cell)(range(len(cell.victims.rows)), lambda units: None)])
        shown = torch.cat([trained_on(run, one, cell.victims, batch)[0] for batch in range(4)])
        found[name] = [float((images - other).abs().amax()) for other in (shown, cell.victims.images.flatten(0, 1))]
    assert max(found["undefended"]) < 1e-2
    assert found["instahide"][0] < 1e-2 < 0.1 < found["instahide"][1]


def test_a_model_of_a_defence_of_data_is_read_back(trained):
    run, one = trained("mixup")
    model, _ = build.load_model(run.folder / "models" / "mixup-0.safetensors")
    assert all(torch.equal(p, one.snapshots["final"].params[name]) for name, p in model.named_parameters())


def test_codes_of_a_generator_are_searched_with_the_draw(trained):
    run, one = trained("mixup")
    fitted = {"generator": torch.nn.Sequential(torch.nn.Linear(4, 768), torch.nn.Sigmoid(), torch.nn.Unflatten(1, (3, 16, 16)))}
    attack = GenerativePrior(iterations=4, code=4)
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [released(run, one)], seed=0, fitted=fitted))
    assert all(found.status == "ok" for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0))
