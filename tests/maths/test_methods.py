"""What attacks are given, and what the engine makes of it, over every attack that matches gradients. Small synthetic cells, one round."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

from gidef import attack as attacks
from gidef import build, config, methods, models, observe
from gidef.attack.matching import Unordered
from gidef.attack.optimisers import Adam
from gidef.cells import NEEDS_NOISE, note_of
from gidef.config import (
    Data,
    Evaluation,
    LearnedPerturbation,
    LocalTraining,
    MixUp,
    Model,
    Pruning,
    Recipe,
    Rounds,
    SecureAggregation,
    Speed,
    Undefended,
)
from gidef.data import Dataset, synthetic_blood_cells
from gidef.errors import InputError
from gidef.models import SplitModel, decoder_for
from gidef.parallel import World
from gidef.report import Console
from gidef.runs import Run
from gidef.training import train
from gidef.types import Observation
from tests.hasty import hasty, of_fewer

SHORT = {"iterations": 3}
MATCHING = {
    name: dataclasses.replace(attack, **SHORT) for name, attack in config.PRESETS.items() if isinstance(attack, config.NaiveMatching)
}  # fmt: skip
MATCHING |= {
    "soft": config.NaiveMatching(labels="soft", **SHORT), "searched": config.JointMatching(labels="searched", **SHORT), "langevin": config.NaiveMatching(langevin=0.2, **SHORT),
}  # fmt: skip
MATCHING |= {"decoded": config.DecoderAware(begin="decoded", **SHORT)}
MATCHING |= {"guessed": config.JointMatching(decoder="surrogate", **SHORT), "unused": config.JointMatching(decoder="unused", **SHORT)}
DELTA_ONLY = ("surrogate-model",)


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=16, test=16, size=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run, {defence: what one round of it left}) under share policy full."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    learned = LearnedPerturbation(ramp=0.0, std_floor=0.2)
    defences = {
        "undefended": Undefended(), "learned": learned, "frozen": dataclasses.replace(learned, frozen=True), "mixup": (MixUp(), Pruning(share=0.5)),
        "secure": (learned, SecureAggregation()),
    }  # fmt: skip
    recipe = Recipe(
        data=Data(name=f"{__file__}:few_cells", num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=1),
        clients=LocalTraining(batch_size=8), defences=defences, speed=Speed(device="cpu", workers=1),
        evaluation=Evaluation(num_victims=4, num_tuning=0, checkpoints=("final",)), attacks={"naive": config.NaiveMatching()},
    )  # fmt: skip
    setting = build.load_setting(recipe, world=World(), notice=lambda text: None)
    run = Run(setting, World(), tmp_path_factory.mktemp("run"), Console(rank=1), None, "mark")
    yield run, {name: train(run, name, defence, 0) for name, defence in defences.items()}
    torch.set_num_threads(before)


def reads(attack) -> bool:
    """Whether an attack reads latents, which takes seconds of every observation."""
    return isinstance(attack, (config.ReadLatent, config.ReadNoise)) or getattr(attack, "begin", "drawn") == "decoded"


def case_of(trained, defence, attack, control=False, **evaluation):
    run, found = trained
    recipe = dataclasses.replace(run.recipe, evaluation=dataclasses.replace(run.recipe.evaluation, **evaluation))
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    run = of_fewer(run, 2 * evaluation.get("batch_size", 1)) if reads(attack) else run
    one = found[defence]
    snapshot = one.snapshots["final"]
    releases = [observe.release(run, one, snapshot, seed=0, repeat=repeat, control=control) for repeat in range(getattr(attack, "rounds", 1))]
    fitted = {"surrogate": {n: t + 0.01 for n, t in one.training.defence.initial().items() if n.startswith("decoder.")}}
    fitted["generator"] = decoder_for((64,), -1, (3, 16, 16), size="loop", seed=0)
    return methods.make_case(run, one, snapshot, attack, releases, seed=0, fitted=fitted), run, releases


def reconstructed(plan):
    rows = attacks.drain(attacks.run_chunk(((0, 0), (1, 0)), plan.observations, plan.make_simulate(), plan.matching, seed=0))
    if plan.refine is not None:
        rows = attacks.drain(attacks.run_chunk(((0, 0), (1, 0)), plan.observations, plan.make_simulate(), methods.refined(plan, rows), seed=0))
    return rows["images"]


def fit_of(plan, images):
    """The distance that a plan's attack has at images, for the first observation."""
    matching = dataclasses.replace(plan.matching, start=lambda o, r: (images, None), iterations=0, snapshots=0)
    return float(attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))["fit"])


def _each():
    for name, attack in MATCHING.items():
        for defence in ("undefended", "learned"):
            noise_only = isinstance(attack, (*NEEDS_NOISE, config.MultiRound, config.DecoderAware)) or getattr(attack, "decoder", "known") != "known"
            if not (defence == "undefended" and noise_only):
                yield pytest.param(defence, attack, name in DELTA_ONLY, id=f"{name}-{defence}")


@pytest.mark.parametrize(("defence", "attack", "delta"), list(_each()))
def test_no_attack_can_see_the_truth(trained, monkeypatch, defence, attack, delta):
    """The evaluator's truth, images, victims and training set alike, is overwritten after the release: no reconstruction changes in any bit."""
    hasty(monkeypatch, read=True)
    if isinstance(attack, config.GradInversion):
        attack = dataclasses.replace(attack, group=0.0)
    evaluation = {"release": "delta", "local_steps": 2, "batch_size": 2} if delta else {}
    case, run, releases = case_of(trained, defence, attack, **evaluation)
    plan = methods.plan(case)
    before = reconstructed(plan)
    assert before.shape[-3:] == (3, 16, 16) and before.isfinite().all()
    kept = run.setting.dataset.train.images.clone()
    try:
        run.setting.dataset.train.images.copy_(kept.flip(0))
        for client in run.setting.clients:
            client.images.copy_(client.images.flip(0))
        for release in releases:
            release.images.copy_(release.images.flip(0).roll(3, -1))
            release.rows.copy_(release.rows.flip(0))
        assert torch.equal(before, reconstructed(methods.plan(dataclasses.replace(case, seed=case.seed))))
    finally:
        run.setting.dataset.train.images.copy_(kept)
        for client in run.setting.clients:
            client.images.copy_(client.images.flip(0))


def reachable(root):
    """All that can be reached from a value without its modules' globals: fields, attributes, items, and what functions and methods are bound to."""
    seen, left = {}, [root]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, complex)):
            continue
        seen[id(value)] = value  # kept, or another could get its id
        yield value
        if isinstance(value, (dict, types.MappingProxyType)):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
        elif isinstance(value, types.FunctionType):
            left += [cell.cell_contents for cell in value.__closure__ or ()]
            left += [value.__defaults__, value.__kwdefaults__]
        elif isinstance(value, types.MethodType):
            left += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            left += [value.func, value.args, value.keywords]
        slots = itertools.chain.from_iterable(vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
        left += [getattr(value, name) for name in slots if hasattr(value, name)]
        left.append(getattr(value, "__dict__", None))


def private_tensors(root, run, *more):
    """Reachable tensors that hold an image of the training split, or one of `more`, or share their memory."""
    held = [run.setting.dataset.train.images, *(client.images for client in run.setting.clients), *more]
    memory = {tensor.untyped_storage().data_ptr() for tensor in held}
    starts = {tuple(row) for tensor in held for row in _starts(tensor)}
    tensors = [value for value in reachable(root) if isinstance(value, torch.Tensor)]
    return [one for one in tensors if one.untyped_storage().data_ptr() in memory or any(tuple(row) in starts for row in _starts(one))], tensors


def _starts(tensor):
    """The first pixels of each image in a tensor, in [0, 1]."""
    if tensor.shape[-3:] != (3, 16, 16):
        return []
    rows = tensor.reshape(-1, 3 * 16 * 16)[:, :50].float()
    return (rows if tensor.is_floating_point() else rows / 255).tolist()


DELTA = {"release": "delta", "local_steps": 2, "batch_size": 2}
WALKED = {
    "undefended": ("undefended", config.NaiveMatching(**SHORT), {}), "learned": ("learned", config.JointMatching(**SHORT), {}),
    "several rounds": ("learned", config.MultiRound(rounds=2, **SHORT), {}), "frozen": ("frozen", config.JointMatching(**SHORT), {}),
    "delta": ("learned", config.JointMatching(**SHORT), DELTA), "surrogate model": ("undefended", config.SurrogateModel(**SHORT), DELTA),
    "mixup": ("mixup", config.JointMatching(**SHORT), {"batch_size": 2}), "mixup delta": ("mixup", config.NaiveMatching(**SHORT), DELTA),
    "secure": ("secure", config.JointMatching(**SHORT), {}), "secure delta": ("secure", config.NaiveMatching(**SHORT), DELTA),
    "A1": ("learned", config.EotMatching(samples=2, **SHORT), {}), "A6": ("learned", config.DecoderAware(begin="decoded", **SHORT), {}),
    "A8": ("learned", config.GenerativePrior(**SHORT), {}), "proxy statistics": ("undefended", config.GradInversion(statistics="proxy", **SHORT), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WALKED)
def test_a_case_holds_no_tensor_of_the_private_images(trained, name):
    """Nor can one be reached from it, or from the plan that is made of it, through whatever its functions are bound to."""
    case, run, releases = case_of(trained, *WALKED[name][:2], **WALKED[name][2])
    made = methods.plan(case)
    private = [release.images for release in releases] + [company.images for release in releases for company in release.company]
    for root in (case, made, (case.simulator(), case.gradient(), made.make_simulate(), case, made)):
        leaked, tensors = private_tensors(root, run, *private)
        assert len(tensors) > 20 and not leaked, [tuple(one.shape) for one in leaked]
        evaluator = (Run, observe.Victims, observe.Company, Dataset, build.Setting, build.Training)
        assert not [type(value) for value in reachable(root) if isinstance(value, evaluator)]


def test_the_walk_finds_images_behind_closures_defaults_partials_methods_and_attributes(trained):
    run, images = trained[0], trained[0].setting.dataset.train.images

    class Own:
        def method(self):
            return self.held

    own, one = Own(), images[3].float() / 255
    own.held = {"a": [(one,)]}
    ways = [lambda: lambda: run, functools.partial(print, sep=run), own.method, lambda x=run: x, dataclasses.make_dataclass("Box", ["x"])(one), images[5:7]]
    for way in ways:
        assert private_tensors(way, run)[0], way
    assert not private_tensors([torch.rand(2, 3, 16, 16), lambda: torch.nn.Linear(2, 2)], run)[0]


def test_fresh_noise_in_every_round_and_the_same_labels(trained):
    case, _, releases = case_of(trained, "learned", config.MultiRound(rounds=3, **SHORT))
    first, second, third = (release.noise[0] for release in releases)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    plan = methods.plan(case)
    names = {name.partition("/")[0] for name in plan.observations[0].update}
    assert names == {"0", "1", "2"} and plan.matching.noise_shape == (3, 1, *case.latent_shape)
    assert torch.equal(plan.observations[0].labels, releases[0].labels[0])


TWICE = {"release": "delta", "local_steps": 2, "local_epochs": 2, "batch_size": 4, "local_lr": 0.05}
TRAININGS = {"sgd": TWICE, "momentum": {**TWICE, "local_momentum": 0.9}, "adam": {**TWICE, "local_optimiser": "adam", "local_lr": 1e-3}}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(("defence", "name"), [("undefended", "naive"), ("learned", "joint"), ("learned", "rounds"), ("learned", "decoder-aware")])
def test_the_local_epochs_are_simulated_as_the_client_trains_them(trained, defence, name, training):
    """At the true images and noise the simulated delta is the observed one, and an attack comes closer than it began."""
    attack = dataclasses.replace(config.PRESETS[name], iterations=12, **({"rounds": 2} if name == "rounds" else {}))
    case, run, releases = case_of(trained, defence, attack, **TRAININGS[training])
    assert config.problems(dataclasses.replace(run.recipe, attacks={name: attack})) == []
    plan, truth = methods.plan(case), None
    if defence == "learned":
        truth = torch.stack([release.noise[0] for release in releases]) if name == "rounds" else releases[0].noise[0]
        assert truth.shape == plan.matching.noise_shape and truth.shape[-len(case.latent_shape) - 2 : -len(case.latent_shape)] == (4, 2)
    still = dataclasses.replace(plan.matching, start=lambda o, r: (releases[0].images[o], truth), iterations=0)
    [row] = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), still, seed=0))["fit"]
    assert float(row) < 1e-6
    flipped = dataclasses.replace(still, start=lambda o, r: (releases[0].images[o].flip(-1), truth))
    assert float(attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), flipped, seed=0))["fit"]) > 1e-3
    [found] = attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0)
    assert found.status == "ok" and found.images.shape == (4, 3, 16, 16) and found.fit < 0.99 * found.first_fit


def test_a_candidate_is_kept_near_what_the_decoder_makes_of_it_in_every_epoch(trained):
    case, _, (release, *_) = case_of(trained, "learned", config.DecoderAware(**SHORT), **TWICE)
    [(weight, prior)] = methods.plan(case).matching.priors
    one, images = case.observations[0], release.images[0]
    every, guesses = {**one.known, **one.params}, []
    weights = {name: tensor for name, tensor in every.items() if not name.startswith("decoder.")}
    decoder = {name.removeprefix("decoder."): tensor for name, tensor in every.items() if name.startswith("decoder.")}
    for epoch in range(2):
        drawn = torch.cat([release.noise[0][2 * epoch + step] for step in range(2)])
        perturbed = functional_call(case.model, weights, (images, drawn), {"full": True}).perturbed
        guesses.append(functional_call(case.decoder, decoder, (perturbed,)).clamp(0, 1))
    point = SimpleNamespace(images=images, params=one.params, known=one.known, noise=release.noise[0])
    expected = (images - (guesses[0] + guesses[1]) / 2).square().mean()
    assert weight == 1e-2 and not torch.allclose(*guesses, atol=1e-4)
    torch.testing.assert_close(prior(point).mean(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("evaluation", [{}, {"release": "delta", "local_steps": 2, "batch_size": 2}], ids=["gradient", "delta"])
def test_rounds_say_more_than_one_as_their_true_point_is_a_zero_of_all(trained, evaluation):
    """At the true images and noise the simulated updates are the observed ones; of local steps, too."""
    attack = config.MultiRound(rounds=2, **SHORT)
    case, run, releases = case_of(trained, "learned", attack, **evaluation)
    assert config.problems(dataclasses.replace(run.recipe, attacks={"rounds": attack})) == []
    plan = methods.plan(case)
    truth = torch.stack([release.noise[0] for release in releases])
    matching = dataclasses.replace(plan.matching, start=lambda o, r: (releases[0].images[o], truth), iterations=0, tv=0.0, noise_weight=0.0)
    rows = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))
    assert float(rows["fit"]) < 1e-9
    other = dataclasses.replace(matching, start=lambda o, r: (releases[0].images[1], truth))
    assert float(attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), other, seed=0))["fit"]) > 1e-3


@pytest.mark.parametrize("evaluation", [{}, {"release": "delta", "local_steps": 2, "batch_size": 2}], ids=["gradient", "delta"])
def test_noise_that_an_image_keeps_for_ever_is_one_unknown_of_all_rounds(trained, evaluation):
    case, _, releases = case_of(trained, "frozen", config.MultiRound(rounds=2, **SHORT), **evaluation)
    plan, truth = methods.plan(case), releases[0].noise[0]
    assert torch.equal(truth, releases[1].noise[0]) and plan.matching.noise_shape == truth.shape
    matching = dataclasses.replace(plan.matching, start=lambda o, r: (releases[0].images[o], truth), iterations=0)
    rows = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))
    assert float(rows["fit"]) < 1e-9
    other = dataclasses.replace(matching, start=lambda o, r: (releases[0].images[o], -truth))
    assert float(attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), other, seed=0))["fit"]) > 1e-3
    run, found = trained
    said = [note_of(run, found[name], config.MultiRound(rounds=2)) for name in ("frozen", "learned")]
    assert "all the same, as the noise is drawn once for ever" in said[0] and "the same, as" not in said[1]


def test_skipped_layers_are_the_predictor_s_and_the_perturbation_s(trained):
    case, _, _ = case_of(trained, "learned", config.SkipLayers(**SHORT))
    assert set(case.observations[0].update) == set(case.model.parts["encoder"])


def test_where_the_encoder_s_gradient_holds_no_noise_only_the_attack_that_skips_the_rest_has_a_zero_at_the_truth(trained, monkeypatch):
    """The noise lies on channels that the predictor's first weights pass over: of all gradients only those of these weights hold it."""
    run, found = trained
    one, first = found["learned"], "backbone.blocks.1.conv.weight"
    snapshot, drawn = one.snapshots["final"], one.training.defence.draw_noise
    weights = snapshot.params[first].clone()
    weights[:, :16] = 0
    deaf = dataclasses.replace(one, snapshots={"final": dataclasses.replace(snapshot, params={**snapshot.params, first: weights})})
    masked = lambda count, **options: drawn(count, **options) * (torch.arange(32) < 16).view(32, 1, 1)  # noqa: E731
    monkeypatch.setattr(one.training.defence, "draw_noise", masked)
    fits = {}
    for attack in (config.SkipLayers(**SHORT), config.NaiveMatching(**SHORT)):
        case, _, (release,) = case_of((run, {"learned": deaf}), "learned", attack, released_loss="utility")
        assert all(float(noise.abs().max()) > 1 for noise in release.noise)
        plan = methods.plan(case)
        fits[type(attack)] = fit_of(plan, release.images[0]), fit_of(plan, release.images[1])
    assert fits[config.SkipLayers][0] < 1e-12 and fits[config.SkipLayers][1] > 1e-3
    assert fits[config.NaiveMatching][0] > 1e-3


def test_the_mean_update_over_draws_that_are_known_is_explained_by_the_truth_alone(trained):
    """A1 with the very draws behind what is observed: a zero at the true image, which descent goes for; no single draw has it."""
    attack = config.EotMatching(iterations=40, samples=4, kink_width=None, tv=0.0)
    case, _, (release,) = case_of(trained, "learned", attack, released_loss="utility")
    draws = case.draw_noise(4, generator=torch.Generator().manual_seed(5)).view(4, 1, *case.latent_shape)
    (one, *_), simulate = case.observations, case.simulator()
    labels = F.one_hot(one.labels, 8).float()
    each = [simulate(one.params, one.known, release.images[0], labels, draw) for draw in draws]
    observed = dataclasses.replace(one, update={name: sum(update[name] for update in each) / 4 for name in one.update})
    case = dataclasses.replace(case, rounds=[[observed]], draw_noise=lambda count, **options: draws.flatten(0, 1)[:count])
    plan = methods.plan(case)
    assert fit_of(plan, release.images[0]) < 1e-10 and fit_of(plan, release.images[1]) > 1e-3
    single = methods.plan(dataclasses.replace(case, attack=dataclasses.replace(attack, samples=1)))
    assert fit_of(single, release.images[0]) > 1e-3
    near = (release.images[0] + 0.1 * torch.randn(release.images[0].shape, generator=torch.Generator().manual_seed(6))).clamp(0, 1)
    matching = dataclasses.replace(plan.matching, start=lambda o, r: (near, None), lr=0.01)
    rows = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))
    assert float(rows["fit"]) < 0.2 * float(rows["first_fit"])
    apart = [float((images - release.images[0]).square().mean()) for images in (rows["images"][0], near)]
    assert apart[0] < apart[1]


def test_without_noise_the_mean_over_draws_is_the_naive_attack(trained, monkeypatch):
    run, found = trained
    perturbation = found["learned"].training.defence.model.perturbation
    monkeypatch.setattr(perturbation, "strength", 0.0)
    monkeypatch.setattr(perturbation, "std_floor", 0.0)
    made = []
    for attack in (config.EotMatching(iterations=6, samples=3), config.NaiveMatching(iterations=6)):
        plan = methods.plan(case_of((run, found), "learned", attack, released_loss="utility")[0])
        made.append(attacks.drain(attacks.run_chunk(((0, 0), (1, 0)), plan.observations, plan.make_simulate(), plan.matching, seed=0, dtype=torch.float64)))
    for name in ("losses", "images"):
        torch.testing.assert_close(made[0][name], made[1][name], rtol=1e-5, atol=1e-6)
    assert (made[0]["loss"] < made[0]["losses"][:, 0]).all()


def test_a_decoded_start_is_what_the_decoder_makes_of_the_true_latent(trained):
    case, _, (release,) = case_of(trained, "learned", config.DecoderAware(begin="decoded", **SHORT))
    start, one = methods.plan(case).matching.start, case.observations[1]
    every = {**one.known, **one.params}
    weights = {name: tensor for name, tensor in every.items() if not name.startswith("decoder.")}
    perturbed = functional_call(case.model, weights, (release.images[1], release.noise[1]), {"full": True}).perturbed
    expected = functional_call(case.decoder, {name.removeprefix("decoder."): t for name, t in every.items() if name.startswith("decoder.")}, (perturbed,))
    (first, noise), (second, _) = start(1, 0), start(1, 1)
    assert noise is None and (first - expected.clamp(0, 1)).abs().max() < 1e-3 and (first - start(0, 0)[0]).abs().max() > 0.01
    assert 0.01 < (first - second).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("labels", "evaluation"),
    [
        ("searched", {}), ("soft", {}), ("known", {"release": "delta", "local_steps": 2, "batch_size": 2}), ("known", {"release": "delta", "local_epochs": 2}),
        ("known", {"release": "delta", "local_optimiser": "adam"}),
    ],
)  # fmt: skip
def test_a_decoded_start_wants_one_gradient_and_its_classes(trained, labels, evaluation):
    attack = config.DecoderAware(begin="decoded", labels=labels, **SHORT)
    case, run, _ = case_of(trained, "learned", attack, **evaluation)
    assert any("attacks.aware.begin=decoded" in text for text in config.problems(dataclasses.replace(run.recipe, attacks={"aware": attack})))
    with pytest.raises(InputError, match='set begin="drawn"'):
        methods.plan(case)


def read_noise(trained, defence="learned", *, monkeypatch=None, **changes):
    """(case, its plan, a release, the plan's simulator at the true images of observation 1 with some noise)."""
    case, run, (release,) = case_of(trained, defence, config.ReadNoise(**SHORT), **changes)
    if monkeypatch is not None:
        handed(monkeypatch, [release])
    plan = methods.plan(case)
    one = plan.observations[1]

    def simulated(images, noise):
        return plan.make_simulate()(one.params, one.known, images, F.one_hot(one.labels, case.num_classes).float(), noise)

    return case, plan, release, simulated


STEPS = {"release": "delta", "local_steps": 2, "batch_size": 2, "local_lr": 0.05, "local_momentum": 0.5}
"""Each of one image: the second step meets other weights than the server's, in the front and behind it."""


def handed(monkeypatch, release):
    """Latents of local steps are the client's own, stepped here by hand; those of single gradients are read."""
    latents_of = methods.latents_of

    def own(case, one, number):
        if case.local is None or case.local.steps == 1:
            return latents_of(case, one, number)
        gradient, weights, slots, found = case.step(), {**one.params}, {}, []
        images, labels = release[0].images[number], F.one_hot(release[0].labels[number].cpu(), case.num_classes).float()
        for step, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
            noise = None if case.noise_shape is None else release[0].noise[number][step]
            known = {name: tensor for name, tensor in {**one.known, **weights}.items() if name in case.model.state_dict()}
            found.append(functional_call(case.model, known, (image, noise), {"full": True}).perturbed.detach())
            slots = {name: 0.5 * slots.get(name, 0.0) + tensor for name, tensor in gradient(weights, one.known, image, label, noise).items()}
            weights = {name: weights[name] - 0.05 * slot for name, slot in slots.items()}
        assert all(torch.allclose(weights[name] - one.params[name], delta, atol=1e-5) for name, delta in one.update.items())
        return torch.cat(found), 0.0, release[0].labels[number]

    monkeypatch.setattr(methods, "latents_of", own)


@pytest.mark.parametrize("evaluation", [{}, STEPS], ids=["gradient", "steps"])
def test_where_the_latent_is_read_the_noise_follows_from_the_images(trained, monkeypatch, evaluation):
    """At the true images the front's gradient is the observed one, whatever noise is searched; what lies behind is left out on both sides."""
    case, plan, release, simulated = read_noise(trained, monkeypatch=monkeypatch, **evaluation)
    one, behind = plan.observations[1], set(case.model.parts["predictor"])
    assert plan.note == f"the latent was read in {len(plan.observations)} of {len(plan.observations)} observations"
    found = [simulated(release.images[1], noise) for noise in (torch.zeros_like(release.noise[1]), torch.randn_like(release.noise[1]))]
    assert behind and behind < set(one.update) == set(found[0])
    for name, seen in one.update.items():
        assert torch.equal(found[0][name], found[1][name])
        expected = torch.zeros_like(seen) if name in behind else case.observations[1].update[name]
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
        torch.testing.assert_close(found[0][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-12)
    other = simulated(release.images[1].flip(-1), release.noise[1])
    assert max(float((other[name] - one.update[name]).abs().max()) for name in set(one.update) - behind) > 1e-3


def test_recovered_labels_are_those_that_the_latent_was_read_with(trained):
    """They lie in the predictor's gradient, which is not matched."""
    case, _, (release,) = case_of(trained, "learned", config.ReadNoise(labels="recovered", **SHORT))
    assert all(one.labels is None for one in case.observations)
    plan = methods.plan(case)
    found = attacks.drain(attacks.run_chunk(tuple((o, 0) for o in range(len(release.labels))), plan.observations, plan.make_simulate(), plan.matching, seed=0))
    assert (found["failure"] == 0).all() and torch.equal(found["labels"], release.labels.cpu())


def test_where_it_is_not_read_the_noise_is_searched_as_by_a3(trained, monkeypatch):
    hasty(monkeypatch)
    monkeypatch.setattr(methods, "READ", -1.0)
    case, plan, release, simulated = read_noise(trained)
    joint = methods.plan(dataclasses.replace(case, attack=config.JointMatching(**SHORT)))
    one, noise = joint.observations[1], torch.randn(release.noise[1].shape, generator=torch.Generator().manual_seed(0))
    assert f"0 of {len(plan.observations)}" in plan.note and "searched" in plan.note
    expected = joint.make_simulate()(one.params, one.known, release.images[1], F.one_hot(one.labels, case.num_classes).float(), noise)
    found = simulated(release.images[1], noise)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
        assert torch.equal(plan.observations[1].update[name], one.update[name])


@pytest.mark.parametrize(("shape", "channel_dim"), [((6,), -1), ((6, 2, 3), 1), ((2, 3, 6), -1)])
def test_a_bottleneck_s_code_is_had_from_what_it_restores(shape, channel_dim):
    made = models.LinearBottleneck(shape, channel_dim, width=4) if len(shape) == 1 else models.ConvBottleneck(shape, channel_dim, kernel=1)
    code = torch.randn(5, *made.noise_shape, generator=torch.Generator().manual_seed(0))
    weights = {f"perturbation.{name}": tensor.detach() for name, tensor in made.named_parameters()}
    if made.noise_shape[0] > 6:  # longer than the latent: what it restores is all that can be had
        code = methods._code(made.restore(code).detach(), weights, channel_dim)
    found = methods._code(made.restore(code).detach(), weights, channel_dim)
    torch.testing.assert_close(found, code, rtol=1e-4, atol=1e-5)


def test_a_level_of_nought_leaves_the_candidate_s_own_latent(trained, monkeypatch):
    hasty(monkeypatch, read=True)
    case, _, _, _ = read_noise(trained)
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.perturbation.level.fill_(-200.0)
    model.perturbation.std_floor = 0.0
    levelled = dataclasses.replace(case, model=model)
    plan = methods.plan(levelled)
    one = plan.observations[1]
    params = {name: torch.full_like(t, -200.0) if name == "perturbation.level" else t for name, t in one.params.items()}
    found = plan.make_simulate()(params, one.known, torch.rand(1, 3, 16, 16), F.one_hot(one.labels, case.num_classes).float(), torch.zeros(1, *case.latent_shape))
    assert all(tensor.isfinite().all() for tensor in found.values())


def read_latent(trained, defence="undefended", **changes):
    """(case, its plan, a release, the plan's simulator and its prior at some images of observation 1)."""
    fields = {**SHORT, **changes.pop("fields", {})}
    monkeypatch = changes.pop("monkeypatch", None)
    case, run, (release,) = case_of(trained, defence, config.ReadLatent(**fields), **changes)
    if monkeypatch is not None:
        handed(monkeypatch, [release])
    plan = methods.plan(case)
    one = plan.observations[1]

    def simulated(images):
        labels = F.one_hot(release.labels[1], case.num_classes).float()
        point = attacks.Point(images=images, labels=labels, noise=None, params=one.params, known=one.known)
        assert {weight for weight, _ in plan.matching.priors} == {1.0}
        return plan.make_simulate()(one.params, one.known, images, labels, None), *(float(prior(point)) for _, prior in plan.matching.priors)

    return case, plan, release, simulated


@pytest.mark.parametrize(("labels", "evaluation"), [(labels, one) for labels in ("known", "recovered") for one in ({}, {"release": "delta", "local_lr": 0.3})] + [("known", STEPS)])
def test_at_the_true_images_the_front_s_gradient_at_the_read_latent_is_the_observed_one(trained, monkeypatch, labels, evaluation):
    """And the images' own latent is the one that was read; what lies behind is left out on both sides."""
    case, plan, release, simulated = read_latent(trained, fields={"labels": labels}, monkeypatch=monkeypatch, **evaluation)
    one, behind = plan.observations[1], set(case.model.parts["predictor"])
    assert plan.note == f"the latent was read in {len(plan.observations)} of {len(plan.observations)} observations"
    assert torch.equal(one.labels.cpu(), release.labels[1].cpu())
    found, apart = simulated(release.images[1])
    assert behind and behind < set(one.update) == set(found) and apart < 1e-4
    for name, seen in one.update.items():
        expected = torch.zeros_like(seen) if name in behind else case.observations[1].update[name]
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
        torch.testing.assert_close(found[name], expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()) + 1e-12)
    other, further = simulated(release.images[1].flip(-1))
    assert max(float((other[name] - one.update[name]).abs().max()) for name in set(one.update) - behind) > 1e-4 and further > 0.01


@pytest.mark.parametrize("attack", [config.ReadNoise, config.ReadLatent])
@pytest.mark.parametrize("read", [True, False])
def test_local_steps_that_are_read_are_the_same_one_by_one_at_once_and_recorded(trained, monkeypatch, attack, read):
    """Or, where they are not, held to row spaces; in float64, over a few iterations."""
    case, _, release = case_of(trained, "learned" if attack is config.ReadNoise else "undefended", attack(iterations=3), **STEPS)
    handed(monkeypatch, release)
    monkeypatch.setattr(methods, "READ", 1e-4 if read else -1.0)
    plan = methods.plan(case)
    assert plan.read == (2 if read else 0)
    chunk, common = ((0, 0), (1, 0)), {"seed": 0, "dtype": torch.float64}
    one, *others = (
        attacks.drain(attacks.run_chunk(chunk, plan.observations, plan.make_simulate(), plan.matching, mode=mode, **common)) for mode in ("loop", "vmap", "traced")
    )
    for other in others:
        assert (other["failure"] == 0).all() and (other["fit"] <= other["first_fit"]).all()
        torch.testing.assert_close(other["images"], one["images"], rtol=1e-5, atol=1e-5)


class Behind(nn.Module):
    """A front, a latent of (3, 4, 4), and what is given behind it."""

    def __init__(self, *behind):
        super().__init__()
        self.front, self.behind = nn.Conv2d(2, 3, 3, 3), nn.Sequential(*behind, nn.Flatten(), nn.LazyLinear(20), nn.Tanh(), nn.Linear(20, 6))

    def forward(self, images):
        return self.behind(self.front(images))


@pytest.mark.parametrize(("behind", "told"), [((), True), ((nn.Tanh(),), True), ((nn.AvgPool2d(2),), False)], ids=["read", "found", "pooled"])
def test_a_latent_is_read_only_if_the_gradient_tells_it(behind, told):
    """Behind a pooling layer a search explains the gradient as well, with a latent that differs within the windows as its start did."""
    torch.manual_seed(0)
    model, (images, labels) = Behind(*behind), (torch.rand(1, 2, 12, 12), torch.tensor([3]))
    model(images)
    model = SplitModel(model, cut="front", image_shape=(2, 12, 12), num_classes=6).requires_grad_(False)
    params = dict(model.named_parameters())
    seen = Observation(params, grad(lambda p: F.cross_entropy(functional_call(model, p, (images,)), labels))(params), 1, labels=labels)
    latent = model.run(images, None).latent
    for attack, trusted in ((config.ReadLatent(), told), (config.ReadNoise(), True)):
        found, loss, _ = methods.latents_of(SimpleNamespace(model=model, seed=0, attack=attack, readable=True, local=None), seen, 0)
        assert (loss <= methods.READ) == trusted
        assert (float((found - latent).norm() / latent.norm()) < 0.1) == told


@pytest.mark.parametrize(("count", "evaluation"), [(0, {}), (1, {}), (0, STEPS)], ids=["none", "one", "steps"])
def test_where_no_latent_is_read_the_attack_is_the_naive_one(trained, monkeypatch, count, evaluation):
    """Of none, or of one among others, which is not matched otherwise for them."""
    hasty(monkeypatch)
    latents_of = methods.latents_of

    def some(case, one, number):
        latents, _, labels = latents_of(case, one, number)
        return latents, 0.0 if number < count else 1.0, labels

    monkeypatch.setattr(methods, "latents_of", some)
    case, _, releases = case_of(trained, "undefended", config.ReadLatent(**SHORT), **evaluation)
    _, plan, _, simulated = read_latent(trained) if count else (case, methods.plan(case), None, None)
    assert f"{count} of {len(plan.observations)}" in plan.note and "in the others it is A0" in plan.note
    naive = methods.plan(dataclasses.replace(case, attack=config.NaiveMatching(**SHORT)))
    one, seen = plan.observations[1], naive.observations[1]
    assert all(torch.equal(tensor, seen.update[name]) for name, tensor in one.update.items())
    images = torch.rand(one.num_examples, *case.image_shape, generator=torch.Generator().manual_seed(0))
    given = (images, F.one_hot(seen.labels, case.num_classes).float(), None)
    expected, found = (each.make_simulate()(its.params, its.known, *given) for each, its in ((naive, seen), (plan, one)))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert "layers tell of their inputs" in plan.note and plan.matching.tv == pytest.approx(methods.SMOOTHER * case.attack.tv)
    [*_, (weight, within)] = plan.matching.priors
    truth, other = (attacks.Point(images=x, labels=given[1], noise=None, params=one.params, known=one.known) for x in (releases[0].images[1], images))
    assert weight == 1.0 and within(truth) < 1e-4 and within(other) > 0.01
    if count:
        assert simulated(images)[1] == 0.0  # its latent was not read
        assert within(truth._replace(images=images, known=plan.observations[0].known)) == 0.0  # of which it was, nothing is held to rows
    else:
        assert len(plan.matching.priors) == 1


def test_reading_the_latent_finds_more_than_the_naive_attack(trained):
    case, run, (release,) = case_of(trained, "undefended", config.ReadLatent(iterations=60))
    truth = release.images[:2].cpu()
    errors = {}
    for attack in (case.attack, config.NaiveMatching(iterations=60)):
        found = reconstructed(methods.plan(dataclasses.replace(case, attack=attack)))
        errors[type(attack).__name__] = float((found - truth).square().mean())
    assert errors["ReadLatent"] < 0.7 * errors["NaiveMatching"]


@pytest.mark.parametrize(("changes", "said"), [({"labels": "counts"}, "known or recovered"), ({"labels": "searched"}, "known or recovered"), ({"decoder": "unused"}, "all but the predictor")])
def test_noise_is_read_with_classes_and_all_but_the_predictor_is_matched(trained, changes, said):
    recipe = trained[0].recipe
    found = config.problems(dataclasses.replace(recipe, attacks={"read": config.ReadNoise(**changes, **SHORT)}))
    assert any("attacks.read" in text and said in text for text in found)


def test_noise_in_the_steps_and_soft_or_searched_labels_are_settings_of_every_matching_attack(trained):
    plain, noisy = (methods.plan(case_of(trained, "undefended", config.InvertingGradients(langevin=langevin, **SHORT))[0]) for langevin in (0.0, 0.2))
    assert plain.matching.optimiser is None and noisy.matching.descent() == Adam(sign="hard", langevin=0.2)
    images = [reconstructed(one) for one in (plain, noisy, noisy)]
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])
    soft = config.GradInversion(langevin=0.2, labels="soft", **SHORT)
    matching = methods.plan(case_of(trained, "undefended", soft)[0]).matching
    assert matching.soft_labels and not matching.search_labels and matching.optimiser == Adam(langevin=0.2) and matching.coupling is not None
    case, run, releases = case_of(trained, "undefended", config.NaiveMatching(labels="searched", **SHORT))
    plan = methods.plan(case)
    assert plan.matching.search_labels and all(one.labels is None for one in plan.observations)
    [dlg] = {methods.plan(case_of(trained, "undefended", config.DeepLeakage(labels=labels, **SHORT))[0]).matching.search_labels for labels in ("soft", "recovered")}
    assert not dlg


def test_published_settings_reach_the_engine_as_the_dataclasses_say(trained):
    modern = methods.plan(case_of(trained, "undefended", config.ModernInvertingGradients(**SHORT))[0]).matching
    assert modern.descent() == Adam(sign="soft", soft_over=3) and modern.tv == 0.0 and [weight for weight, _ in modern.priors] == [0.1]
    noisy = methods.plan(case_of(trained, "undefended", config.ModernInvertingGradients(langevin=0.1, tv=0.3, **SHORT))[0]).matching
    assert noisy.descent() == Adam(sign="soft", soft_over=3, langevin=0.1) and [weight for weight, _ in noisy.priors] == [0.3]
    plain = methods.plan(case_of(trained, "undefended", config.ModernInvertingGradients(opponents=False, sharpening=False, tv_boost=9.0, **SHORT))[0]).matching
    assert plain.descent() == Adam(sign="soft") and (plain.tv, plain.tv_boost, plain.priors) == (0.1, 9.0, ())
    for langevin, descent in ((0.2, Adam(langevin=0.2)), (0.0, Adam())):
        assert methods.plan(case_of(trained, "undefended", config.GradInversion(langevin=langevin, **SHORT))[0]).matching.descent() == descent


@pytest.mark.parametrize("how", [{"signed": True}, {"soft_sign": True}, {"langevin": 0.2}, {"soft_sign": True, "langevin": 0.2}])
def test_signs_and_noise_of_steps_are_for_pixels_and_leave_the_codes_of_a_generator_alone(trained, how):
    plain, asked = (methods.plan(case_of(trained, "learned", config.GenerativePrior(iterations=6, code_share=0.5, **one))[0]) for one in ({}, how))
    assert plain.matching.descent() == asked.matching.descent() == Adam()
    sign = "soft" if "soft_sign" in how else "hard" if "signed" in how else "none"
    assert asked.refine.descent() == Adam(sign=sign, langevin=how.get("langevin", 0.0)) and plain.refine.descent() == Adam()
    codes = [attacks.drain(attacks.run_chunk(((0, 0),), one.observations, one.make_simulate(), one.matching, seed=0))["code"] for one in (plain, asked)]
    assert torch.equal(*codes)
    ends = [reconstructed(one) for one in (plain, asked)]
    assert all(one.isfinite().all() for one in ends) and not torch.equal(*ends)


def test_a_generator_s_codes_are_searched_by_the_step_that_its_attack_says(trained):
    attack = config.GenerativePrior(iterations=24, code_share=0.5, code_lr=0.07)
    settings = (plan := methods.plan(case_of(trained, "undefended", attack)[0])).matching
    begun = attacks.batch.first_variables(((0, 0),), 1, settings, 0, {"device": "cpu", "dtype": torch.float32})["code"]
    rows = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), settings, seed=0))
    assert settings.lr == 0.07 and (rows["fit"] < rows["first_fit"]).all() and (rows["code"] - begun).abs().max() > 0.05  # codes are all that it moves


def two_stages(plan, chunk):
    """(the first stage's rows, the second one's), of attacks in their stages."""
    run = lambda settings: attacks.drain(attacks.run_chunk(chunk, plan.observations, plan.make_simulate(), settings, seed=0))  # noqa: E731
    first = run(plan.matching)
    return first, run(methods.refined(plan, first))


@pytest.mark.parametrize(
    ("defence", "labels", "carried"),
    [("undefended", "searched", {"logits"}), ("learned", "searched", {"logits", "noise"}), ("mixup", "known", {"encode/0/"}), ("mixup", "searched", {"logits", "encode/0/"})],
)
def test_pixels_go_on_from_all_that_the_search_of_codes_found(trained, defence, labels, carried):
    case, _, _ = case_of(trained, defence, config.GenerativePrior(iterations=24, code_share=0.5, labels=labels))
    plan = methods.plan(case)
    names = {*(["logits"] if plan.refine.search_labels else []), *plan.refine.searched, *(["noise"] if plan.refine.noise_shape else [])}
    assert all(any(name.startswith(one) for name in names) for one in carried)
    first, second = two_stages(plan, ((0, 0), (1, 0)))
    torch.testing.assert_close(second["first_fit"], first["fit"], rtol=1e-4, atol=1e-6)
    assert (first["fit"] < first["first_fit"]).all() and (second["fit"] < second["first_fit"]).all()
    begun = attacks.batch.first_variables(((1, 0),), 1, methods.refined(plan, first), 0, {"device": "cpu", "dtype": torch.float32})
    anew = attacks.batch.first_variables(((1, 0),), 1, plan.refine, 0, {"device": "cpu", "dtype": torch.float32})
    for name in names:
        assert torch.equal(begun[name][0], first[name][1]) and not torch.equal(begun[name], anew[name]), name


def test_every_variant_goes_on_from_where_it_was_itself_and_a_failed_start_from_new_unknowns(trained):
    case, _, _ = case_of(trained, "learned", config.JointMatching(iterations=4, labels="searched"))
    matching = methods.plan(case).matching
    matching = dataclasses.replace(matching, restarts=2, variants=({"lr": 0.1}, {"lr": 0.01}), snapshots=0)
    plan = methods.Plan(case.observations, case.simulator, matching, refine=matching)
    first, second = two_stages(plan, ((0, 1), (0, 3)))
    torch.testing.assert_close(second["first_fit"], first["fit"], rtol=1e-4, atol=1e-6)
    assert abs(first["fit"][0] - first["fit"][1]) > 1e-3
    _, alone = two_stages(plan, ((0, 3),))
    torch.testing.assert_close(alone["fit"], second["fit"][1:], rtol=1e-4, atol=1e-6)
    failed = {**first, "failure": torch.tensor([0, attacks.batch.LOST])}
    begun = attacks.batch.first_variables(((0, 1), (0, 3)), 1, methods.refined(plan, failed), 0, {"device": "cpu", "dtype": torch.float32})
    assert torch.equal(begun["logits"][0], first["logits"][0]) and torch.equal(begun["noise"][0], first["noise"][0])
    assert not torch.equal(begun["logits"][1], first["logits"][1]) and begun["logits"][1].abs().max() > 0.1 and not begun["noise"][1].any()


def test_a_start_of_unknowns_that_are_not_searched_or_of_another_shape_is_refused(trained):
    plan = methods.plan(case_of(trained, "undefended", config.NaiveMatching(labels="searched", **SHORT))[0])
    for told, said in (({"weights": torch.zeros(2)}, "weights.*does not search"), ({"images": torch.zeros(2)}, "does not search"), ({"logits": torch.zeros(8)}, r"logits of shape \(8,\), expected \(1, 8\)")):
        matching = dataclasses.replace(plan.matching, start=lambda o, r, told=told: (torch.zeros(1, 3, 16, 16), None, told))
        with pytest.raises(InputError, match=said):
            attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))


def test_labels_read_off_as_probabilities_are_those_that_a_client_mixed(trained):
    """At the true image the simulated gradient is the observed one, whatever mixture of classes the client trained on."""
    case, _, releases = case_of(trained, "undefended", config.NaiveMatching(labels="soft", **SHORT))
    mixed = 0.7 * F.one_hot(releases[0].labels[0], 8).float() + 0.3 * F.one_hot((releases[0].labels[0] + 3) % 8, 8).float()
    seen = case.observations[0]
    update = case.simulator()(seen.params, seen.known, releases[0].images[0], mixed, None)
    case = dataclasses.replace(case, rounds=[[dataclasses.replace(seen, update={name: update[name] for name in seen.update})]])
    fits = []
    for soft in (True, False):
        start = dataclasses.replace(methods.plan(case).matching, soft_labels=soft, start=lambda o, r: (releases[0].images[0], None), iterations=0, tv=0.0)
        rows = attacks.drain(attacks.run_chunk(((0, 0),), case.observations, methods.plan(case).make_simulate(), start, seed=0))
        fits.append(float(rows["fit"]))
        assert rows["labels"].tolist() == releases[0].labels[:1].tolist()
    assert fits[0] < 1e-8 and fits[1] > 1e-3


def test_counts_grant_the_labels_without_their_order(trained):
    attack = config.NaiveMatching(labels="counts", **SHORT)
    case, _, releases = case_of(trained, "undefended", attack, batch_size=4)
    granted, true = case.observations[0].labels, releases[0].labels[0]
    assert granted.tolist() == sorted(true.tolist())


def test_the_order_of_labels_over_local_steps_is_searched_just_where_nobody_grants_it(trained):
    """By counts, recovered or soft labels, of several steps; with known or searched labels, one step or a gradient nothing changes."""
    delta = {"release": "delta", "local_steps": 2, "batch_size": 4}

    def asked(attack, defence="undefended", **evaluation):
        return methods.plan(case_of(trained, defence, attack, **evaluation)[0]).matching.unordered

    for labels in ("counts", "recovered", "soft"):
        assert asked(config.NaiveMatching(labels=labels, **SHORT), **delta) == Unordered(batches=2, latent_dims=0)
        assert asked(config.NaiveMatching(labels=labels, **SHORT), **{**delta, "local_steps": 1, "local_epochs": 2}) is None
        assert asked(config.NaiveMatching(labels=labels, **SHORT), batch_size=4) is None
        assert asked(config.SurrogateModel(labels=labels, **SHORT), **delta) is None  # one gradient has no order
    assert asked(config.DeepLeakage(labels="recovered", **SHORT), **delta).batches == 2
    for attack in (config.NaiveMatching(**SHORT), config.NaiveMatching(labels="searched", **SHORT), config.DeepLeakage(**SHORT)):
        assert asked(attack, **delta) is None
    joint = config.JointMatching(labels="counts", **SHORT)
    assert asked(joint, "learned", **delta) == Unordered(batches=2, latent_dims=3)
    assert asked(joint, "secure", **delta).clients == 3


@pytest.mark.parametrize("attack", [config.JointMatching, config.MultiRound, config.GenerativePrior])
def test_every_attack_that_simulates_local_steps_bears_a_guessed_order(trained, attack):
    """A8's second stage begins in the order in which the first one ended."""
    case, _, _ = case_of(trained, "learned", attack(labels="counts", restarts=2, **SHORT), release="delta", local_steps=2, batch_size=4)
    plan, chunk = methods.plan(case), ((0, 0), (0, 1))
    rows = attacks.drain(attacks.run_chunk(chunk, plan.observations, plan.make_simulate(), plan.matching, seed=0))
    assert rows["failure"].tolist() == [0, 0] and (rows["order"].sort(1).values == torch.arange(4)).all()
    assert torch.equal(rows["labels"], case.observations[0].labels.expand(2, -1))
    if plan.refine is not None:
        rows["order"] = torch.tensor([[3, 1, 2, 0], [1, 0, 3, 2]])
        first = dataclasses.replace(methods.refined(plan, rows), iterations=0)
        second = attacks.drain(attacks.run_chunk(chunk, plan.observations, plan.make_simulate(), first, seed=0))
        assert torch.equal(second["order"], rows["order"])


def test_a_shuffled_update_keeps_every_tensor_s_entries_and_loses_their_places(trained):
    case, _, (release,) = case_of(trained, "undefended", config.NaiveMatching(**SHORT))
    orders = [observe.shuffled(release.updates[0], seed=0, batch=batch, repeat=repeat) for batch, repeat in ((0, 0), (0, 0), (1, 0), (0, 1))]
    for name, tensor in release.updates[0].items():
        assert all(torch.equal(tensor.flatten().sort().values, order[name].flatten().sort().values) for order in orders)
    first, again, other, later = (order["backbone.blocks.0.conv.weight"] for order in orders)
    assert torch.equal(first, again) and not any(torch.equal(first, one) for one in (other, later, release.updates[0]["backbone.blocks.0.conv.weight"]))


@contextlib.contextmanager
def other_images(run):
    """Every training image, victims and clients alike, is another one meanwhile; labels and shapes stay."""
    held = [run.setting.dataset.train.images, *(client.images for client in run.setting.clients)]
    kept = [images.clone() for images in held]
    try:
        for images, before in zip(held, kept, strict=True):
            images.copy_(255 - before.flip(-1))
        yield
    finally:
        for images, before in zip(held, kept, strict=True):
            images.copy_(before)


def _controlled():
    yield from (param for param in _each() if param.values[0] == "learned")
    for name, defence, attack, evaluation in (
        ("joint-frozen", "frozen", config.JointMatching(**SHORT), {}), ("joint-mixup", "mixup", config.JointMatching(**SHORT), {"batch_size": 2}),
        ("joint-secure", "secure", config.JointMatching(**SHORT), {}), ("proxy-undefended", "undefended", config.GradInversion(statistics="proxy", group=0.0, **SHORT), {}),
        ("recovered-undefended", "undefended", config.NaiveMatching(labels="recovered", **SHORT), {}),
    ):  # fmt: skip
        yield pytest.param(defence, attack, evaluation, id=name)


@pytest.mark.parametrize(("defence", "attack", "how"), list(_controlled()))
def test_the_control_draws_the_same_whatever_the_private_images_are(trained, monkeypatch, defence, attack, how):
    """No bit of its result changes with the victims' images, nor with those of the clients beside them: it is what priors, labels and weights tell."""
    hasty(monkeypatch, read=True)  # a shuffled update has no latent, however long one is sought
    evaluation = how if isinstance(how, dict) else DELTA if how else {}
    attack = dataclasses.replace(attack, **({"group": 0.0} if isinstance(attack, config.GradInversion) else {}))
    run = trained[0]

    def drawn(control):
        case, _, releases = case_of(trained, defence, attack, control=control, **evaluation)
        return reconstructed(methods.plan(case)), releases

    found, releases = drawn(control=True)
    with other_images(run):
        again, others = drawn(control=True)
    assert torch.equal(found, again) and found.isfinite().all()
    assert not torch.equal(releases[0].images, others[0].images) and torch.equal(releases[0].labels, others[0].labels)


def test_what_is_no_control_draws_something_else_of_other_images(trained, monkeypatch):
    hasty(monkeypatch)
    kinds = [config.NaiveMatching(**SHORT), config.JointMatching(**SHORT), config.DecoderAware(begin="decoded", **SHORT), config.MultiRound(rounds=2, **SHORT)]
    for attack in kinds:
        found = reconstructed(methods.plan(case_of(trained, "learned", attack)[0]))
        with other_images(trained[0]):
            assert not torch.equal(found, reconstructed(methods.plan(case_of(trained, "learned", attack)[0])))


def test_a_control_s_stand_ins_are_public_images_of_the_victims_labels(trained):
    """Of the entries of their very gradient, in another order; of all labels where public images have none of one."""
    run, one = trained[0], trained[1]["undefended"]
    public, labels = run.setting.dataset.val, torch.tensor([3, 0, 3])
    images = observe._stand_ins(run, labels, seed=0, batch=0)
    places = [int((public.images.float().div(255) - image).flatten(1).abs().amax(1).argmin()) for image in images]
    assert torch.equal(images, public.images[places].float() / 255) and public.labels[places].tolist() == labels.tolist()
    assert observe._stand_ins(run, torch.tensor([99]), seed=0, batch=0).shape == (1, 3, 16, 16)
    [victims] = case_of(trained, "undefended", config.NaiveMatching(**SHORT), control=True)[2]
    simulate, params = one.training.defence.simulator()(), one.snapshots["final"].params
    for batch, update in enumerate(victims.updates):
        stand_in = observe._stand_ins(run, victims.labels[batch], seed=0, batch=batch)
        expected = simulate(params, {}, stand_in, F.one_hot(victims.labels[batch], 8).float(), None)
        for name, tensor in expected.items():
            torch.testing.assert_close(update[name].flatten().sort().values, tensor.flatten().sort().values)
        assert (update["backbone.blocks.0.conv.weight"] - expected["backbone.blocks.0.conv.weight"]).abs().max() > 0


def test_a_surrogate_model_at_the_end_of_one_step_explains_the_delta(trained):
    """With one local step the update is −lr times the gradient at the server's weights: α = 0 matches it in direction."""
    case, _, releases = case_of(trained, "undefended", config.SurrogateModel(**SHORT), release="delta", local_steps=1)
    plan = methods.plan(case)
    spec = dataclasses.replace(plan.matching.searched["alpha"], start=0.0)
    matching = dataclasses.replace(plan.matching, searched={"alpha": spec}, start=lambda o, r: (releases[0].images[o], None), iterations=0, tv=0.0)
    rows = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), matching, seed=0))
    assert float(rows["fit"]) < 1e-6


def test_the_place_between_the_first_and_the_last_weights_is_searched(trained):
    evaluation = {"release": "delta", "local_steps": 2, "batch_size": 2}
    plan = methods.plan(case_of(trained, "undefended", config.SurrogateModel(iterations=50), **evaluation)[0])
    rows = attacks.drain(attacks.run_chunk(((0, 0), (1, 0)), plan.observations, plan.make_simulate(), plan.matching, seed=0))
    assert ((rows["alpha"] - 0.5).abs() > 0.01).all() and ((rows["alpha"] >= 0) & (rows["alpha"] <= 1)).all()


def test_every_round_counts_alike_in_the_distance_of_several(trained):
    assert methods.plan(case_of(trained, "learned", config.MultiRound(rounds=2, **SHORT))[0]).matching.distance is attacks.rounds_apart


def test_an_attack_of_one_s_own_is_twenty_lines(trained):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Smooth:
        """Joint matching with a quadratic smoothness prior."""

        weight: float = 0.1
        iterations: int = 3
        restarts: int = 1
        labels: str = "known"

        def plan(self, case):
            def roughness(point):
                return point.images.diff(dim=-1).square().mean() + point.images.diff(dim=-2).square().mean()

            matching = case.matching(priors=((self.weight, roughness),), noise_shape=case.noise_shape)
            return methods.Plan(case.observations, case.simulator, matching)

    case, _, _ = case_of(trained, "undefended", Smooth())
    assert reconstructed(methods.plan(case)).shape == (2, 1, 3, 16, 16)
    assert config.problems(dataclasses.replace(Recipe(), attacks={"smooth": Smooth()})) == []
    assert copy.copy(case).attack == Smooth()


def test_labels_of_a_delta_are_recovered_by_the_steps_that_the_server_asked_for(trained, monkeypatch):
    """The whole way from the recipe: hard labels as by hand from what was declared, and other ones than without it."""
    evaluation = {"release": "delta", "local_steps": 2, "batch_size": 4, "local_lr": 0.5}
    case, run, (release,) = case_of(trained, "undefended", config.NaiveMatching(labels="recovered", iterations=0), **evaluation)
    plan = methods.plan(case)
    one, told = plan.observations[0], attacks.labels.LocalSteps(lr=0.5, steps=2)
    assert one.labels is None and plan.matching.local == told
    seen = []
    recover = attacks.batch.recover_labels
    monkeypatch.setattr(attacks.batch, "recover_labels", lambda *given, **more: seen.append(more["local"]) or recover(*given, **more))
    rows = attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), plan.matching, seed=0))
    params = {**one.known, **one.params}
    assert seen == [told] and torch.equal(rows["labels"][0], attacks.recover_labels(dataclasses.replace(one, params=params), 8, local=told))
    for asked, known in ((TRAININGS["momentum"], attacks.labels.LocalSteps(lr=0.05, steps=4, momentum=0.9)), (TRAININGS["adam"], None), ({}, None)):
        other, _, _ = case_of(trained, "undefended", config.NaiveMatching(labels="recovered", iterations=0), **asked)
        assert methods.plan(other).matching.local == known


@pytest.mark.parametrize("steps", [1, 2])
def test_soft_labels_of_a_delta_are_those_that_the_client_trained_on(trained, steps):
    """One image and one step: exact. Two images in two steps: their mean."""
    size = steps
    evaluation = {"release": "delta", "local_steps": steps, "batch_size": size, "local_lr": 1e-3}
    attack = config.NaiveMatching(labels="soft", iterations=0)
    case, run, (release,) = case_of(trained, "undefended", attack, **evaluation)
    assert config.problems(dataclasses.replace(run.recipe, attacks={"soft": config.NaiveMatching(labels="soft")})) == []
    plan, draw = methods.plan(case), torch.Generator().manual_seed(0)
    mixed = torch.rand(size, 8, generator=draw).softmax(1)
    one = plan.observations[0]
    update = plan.make_simulate()(one.params, one.known, release.images[0], mixed, None)
    _, found, untold = attacks.batch.targets_of([dataclasses.replace(one, update=update)], plan.matching, {"device": "cpu", "dtype": torch.float64})
    assert not untold.any()
    torch.testing.assert_close(found[0].mean(0), mixed.mean(0).double(), atol=1e-3 if steps == 1 else 0.02, rtol=0)
    assert (found[0].mean(0) - 1 / 8).abs().max() > 0.005
