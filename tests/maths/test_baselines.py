"""The training-time baselines from training to attack: one round each on small synthetic cells, and every attack that has something to do."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from gidef import attack as attacks
from gidef import build, cells, config, fits, inversions, methods, metrics, observe, threats
from gidef.config import CVB, BiDO, IsotropicNoise, LearnedPerturbation, Model, Precode, Speed, Undefended
from gidef.evaluation import logits
from gidef.releases import Releases
from tests.small_run import RECIPE, evaluated, trained_once

SHORT = {"iterations": 3, "restarts": 1}
ATTACKS = {
    "naive": config.NaiveMatching(**SHORT), "joint": config.JointMatching(**SHORT), "eot": config.EotMatching(samples=2, **SHORT),
    "skip": config.SkipLayers(**SHORT), "rounds": config.MultiRound(rounds=2, **SHORT), "zeroed": config.ZeroedLevel(**SHORT),
    "latent": config.LatentDecoding(iterations=3, restarts=1, steps=2, shadow_steps=2), "decoder": config.PostHocDecoder(steps=2),
    "guessed": config.JointMatching(decoder="surrogate", **SHORT), "aware": config.DecoderAware(**SHORT),
}  # fmt: skip
DEFENCES = {
    "undefended": Undefended(), "isotropic": IsotropicNoise(std=0.7), "late": IsotropicNoise(std=0.7, frozen=True, cut="before:classifier"),
    "bido": BiDO(measure="coco", x_weight=1.0, y_weight=50.0), "precode": Precode(width=24), "cvb": CVB(kernel=3),
    "learned late": LearnedPerturbation(ramp=0.0, cut="blocks.2"),
}  # fmt: skip
FLOOR = {"learned": LearnedPerturbation(ramp=0.0, std_floor=0.3, cut="blocks.0")}
"""Whose floor is worth a search."""
HEAVY = {"precode heavy": Precode(width=24, kl_weight=1.0), "ramped": LearnedPerturbation(ramp=1.0, kl_weight=1.0, cut="blocks.2")}
"""Whose terms beside cross-entropy are much of the gradient; of the second, the decoder's only after the first round."""
NOISY = {"naive", "joint", "eot", "skip", "rounds", "latent", "decoder"}
APPLY = {
    "undefended": {"naive", "joint"}, "isotropic": NOISY, "late": NOISY, "bido": {"naive", "joint"}, "precode": NOISY | {"zeroed"},
    "cvb": NOISY | {"zeroed"}, "learned late": set(ATTACKS),
}  # fmt: skip
"""Which attacks have something to do under `full`. A fixed level is no tensor to be zeroed; BiDO has no noise, and its latent is read under `head` alone."""
FAST = {name: (attacks if name in ("late", "precode") else attacks - {"latent"}) & (NOISY | {"zeroed"}) for name, attacks in APPLY.items()}
"""Those that are run here: reading an early latent of two images takes seconds."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(policy, defence): (run, what one round of it left); each is trained once."""
    speed = Speed(device="cpu", workers=1, attacks_at_once=2, attack_mode="vmap")
    with trained_once(tmp_path_factory.mktemp, dataclasses.replace(RECIPE, defences=DEFENCES | FLOOR | HEAVY, attacks=ATTACKS, model=Model(), speed=speed)) as one:
        yield lambda policy, defence: one(defence, policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """The joint attack, written by somebody else."""

    iterations: int = 3
    restarts: int = 1
    labels: str = "known"
    decoder: str = "known"

    def plan(self, case):
        return methods.Plan(case.observations, case.simulator, case.matching(noise_shape=case.noise_shape))


def cells_of(run, one, defence, folder):
    return {cell.name: cell for cell in cells.make_cells(run, {(defence, 0): one}, folder)}


@pytest.mark.parametrize(
    ("asked", "bare"),
    [
        ({"batch_size": 1}, "a batch of one image"), ({"batch_size": 2}, ""), ({"release": "delta", "batch_size": 1}, "a batch of one image"),
        ({"release": "delta", "batch_size": 4, "local_steps": 4}, "local steps of one image"), ({"release": "delta", "batch_size": 4, "local_steps": 2}, ""),
    ],
)  # fmt: skip
def test_a_row_says_so_where_what_is_released_of_bido_has_no_terms(asked, bare, trained):
    """Which is where the client's whole loss, of the images of a step, has the gradient of cross-entropy alone."""
    run, one = trained("full", "bido")
    evaluation = evaluated(run, **asked).recipe.evaluation
    note = cells.note_of(evaluated(run, **asked), one, config.NaiveMatching())
    assert ("undefended" in note) == bool(bare) and bare in note
    count = evaluation.batch_size // evaluation.local_steps
    images, labels = torch.rand(count, *run.setting.dataset.image_shape, generator=torch.Generator().manual_seed(0)), torch.eye(8)[:count]
    client, utility = (one.training.defence.simulator(terms=terms)()(one.snapshots["final"].params, {}, images, labels, None) for terms in ("client", "utility"))
    assert all(torch.equal(client[name], utility[name]) for name in client) == bool(bare)


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_round_changes_the_weights_and_the_model_can_be_read_back(defence, trained):
    run, one = trained("full", defence)
    initial = one.training.defence.initial_model()
    moved = {name for name, tensor in one.snapshots["final"].params.items() if not torch.equal(tensor, initial[name])}
    assert moved == set(initial) and all(tensor.isfinite().all() for tensor in one.snapshots["final"].params.values())
    model, meta = build.load_model(run.folder / "models" / f"{defence}-0.safetensors")
    assert model.cut == one.training.defence.model.cut
    assert all(torch.equal(p, one.snapshots["final"].params[name]) for name, p in model.named_parameters())
    scores = logits(run, one.training, one.snapshots["final"].params, run.setting.dataset.test, seed=0, split="test")
    assert scores.shape == (16, 8) and scores.isfinite().all()


@pytest.mark.parametrize("defence", [name for name in DEFENCES if name != "undefended"])
@pytest.mark.parametrize("policy", ["full", "head"])
def test_every_attack_that_has_something_to_do_runs_and_the_others_are_left_out(defence, policy, trained, tmp_path):
    run, one = trained(policy, defence)
    found = cells_of(run, one, defence, tmp_path)
    assert set(found) == (APPLY[defence] - {"zeroed", "skip"} | {"latent"} if policy == "head" else APPLY[defence])
    if policy == "head":  # the slow one where its answer is a closed form, and what is new there
        found = {name: cell for name, cell in found.items() if name in (("naive", "joint", "latent") if "latent" in FAST[defence] else ("naive", "joint"))}
    else:
        found = {name: cell for name, cell in found.items() if name in FAST[defence]}
    releases = Releases(run)
    for cell in found.values():
        cell.releases = releases.of(cell)
    for task in fits.tasks(run, list(found.values()), tmp_path):
        task.do(0, lambda units: None)
    matching = [cell for cell in found.values() if cell.matches]
    for task in inversions.matching_tasks(run, matching, lambda cell: fits.fitted(run, cell, tmp_path), tmp_path):
        task.do(0, lambda units: None)
    for cell in matching:
        inversions.collect(run, cell)
    if "decoder" in found:
        fits.collect_decoded(run, found["decoder"])
    if "latent" in found:
        found["latent"].reconstructions = fits.latent(run, found["latent"])(range(len(found["latent"].victims.updates)), lambda units: None)
    for name, cell in found.items():
        assert len(cell.reconstructions) == 2 and cell.twin is None, name
        for reconstruction in cell.reconstructions:
            assert (reconstruction.status, reconstruction.error) == ("ok", ""), name
            assert reconstruction.images.shape == (2, 3, 16, 16) and reconstruction.images.isfinite().all()


@pytest.mark.parametrize("defence", [name for name in DEFENCES if name != "undefended"])
@pytest.mark.parametrize("policy", ["full", "head"])
def test_the_joint_attack_matches_exactly_at_the_truth_and_the_naive_one_does_not(defence, policy, trained):
    run, one = trained(policy, defence)
    snapshot = one.snapshots["final"]
    victims = observe.release(run, one, snapshot, seed=0)
    apart = {}
    for name in ("naive", "joint"):
        observation = observe.observations(run, one, snapshot, ATTACKS[name], victims)[0]
        simulate = observe.observed_simulator(run, one, snapshot, terms=observe.terms(run, one, ATTACKS[name], progress=snapshot.progress))()
        noise = victims.noise[0] if name == "joint" else None
        targets = F.one_hot(victims.labels[0], 8).float()
        update = simulate(observation.params, observation.known, victims.images[0], targets, noise)
        assert set(update) == set(observation.update)
        mine, theirs = (torch.cat([side[key].flatten().double() for key in sorted(update)]) for side in (update, observation.update))
        apart[name] = float(1 - F.cosine_similarity(mine, theirs, dim=0))
    assert apart["joint"] < 1e-6 < 1e-4 < apart["naive"]


def test_the_naive_attack_matches_what_its_noise_free_model_has(trained):
    """A bottleneck without its noise still has its mean and its way back; a perturbation without its noise has nothing."""
    for defence, layers in (("precode", {"mean", "back"}), ("cvb", {"mean", "back"}), ("isotropic", set()), ("learned late", set())):
        run, one = trained("full", defence)
        for name, left_out in (("naive", True), ("joint", False)):
            matched = observe.matched_names(one, one.snapshots["final"], ATTACKS[name])
            own = {part.split(".")[1] for part in matched if part.startswith("perturbation.")}
            assert own == layers | (set() if left_out or defence == "isotropic" else {"level"}), (defence, name)
            assert matched[-1] == "backbone.head.bias"


def test_what_head_shares_begins_at_the_defences_own_place(trained):
    for defence, modules in (("late", {"head"}), ("precode", {"head"}), ("learned late", {"head"}), ("cvb", {"blocks", "head"})):
        run, one = trained("head", defence)
        assert {name.split(".")[1] for name in one.snapshots["final"].params} == modules
        assert {name.split(".")[1] for name in one.training.shared} == modules
        kept = one.training.participation.state(0)
        assert not set(kept) & set(one.training.shared) and any(name.startswith("backbone.blocks.0") for name in kept)


def watched(monkeypatch, name):
    """What `fits` hands to a training of this name, which is left out: the arguments of each call."""
    calls = []
    monkeypatch.setattr(fits, name, lambda *given, **how: calls.append((given, how)) or iter(()))
    return calls


def cell_of(trained, policy, defence, attack, folder, **evaluation):
    """(run, the cell of one attack with its releases)"""
    run, one = trained(policy, defence)
    run = evaluated(run, **evaluation)
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, attacks={"one": attack})))
    cell = cells_of(run, one, defence, folder)["one"]
    cell.folder.mkdir(parents=True, exist_ok=True)
    cell.releases = Releases(run).of(cell)
    return run, cell


@pytest.mark.parametrize("released", ["client", "utility"])
def test_a_learned_inversion_is_trained_on_what_is_released_noise_and_terms_and_all(released, trained, tmp_path, monkeypatch):
    run, cell = cell_of(trained, "full", "precode heavy", config.LearnedInversion(steps=2, gradients=30), tmp_path, released_loss=released)
    calls, victims, defence = watched(monkeypatch, "fit_inverter"), cell.victims, cell.trained.training.defence
    fits.inverter_task(run, cell).do(0, lambda units: None)
    [((_, simulate, params, known, images, labels, draw_noise), how)] = calls
    assert draw_noise == defence.draw_noise and how["noise_shape"] == (2, *defence.noise_shape) and torch.equal(images, run.setting.dataset.val.images)
    for batch, update in enumerate(victims.updates):  # at a victim's own images and noise it is the victim's update
        targets = F.one_hot(victims.labels[batch], run.setting.dataset.num_classes).float()
        found = simulate(params, known, victims.images[batch], targets, victims.noise[batch])
        assert found.keys() == update.keys()
        for name, tensor in update.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    bare = defence.simulator(terms="utility" if released == "client" else "client", progress=cell.snapshot.progress)()
    other = bare(params, known, victims.images[-1], targets, victims.noise[-1])
    assert not all(torch.allclose(other[name], tensor, rtol=1e-2, atol=1e-4) for name, tensor in update.items())


def test_a_shadow_s_front_is_trained_with_the_client_s_noise_and_so_is_the_decoder_behind_it(trained, tmp_path, monkeypatch):
    run, cell = cell_of(trained, "head", "late", ATTACKS["latent"], tmp_path)
    shadows, decoders = watched(monkeypatch, "fit_shadow"), watched(monkeypatch, "fit_decoder")
    fits.latent_decoder_task(run, cell).do(0, lambda units: None)
    [((_, phi, images, _), how)], [((_, latents, _), _)] = shadows, decoders
    assert how["draw_noise"] == cell.trained.training.defence.draw_noise and phi is cell.snapshot.params and torch.equal(images, run.setting.dataset.val.images)
    noisy = [latents(images[:2].float() / 255, torch.Generator().manual_seed(seed), 0, None) for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])


def test_a_decoder_of_latents_sees_the_fronts_of_all_the_victims_clients_in_turn(trained, tmp_path, monkeypatch):
    run, cell = cell_of(trained, "head", "isotropic", ATTACKS["decoder"], tmp_path, batch_size=1)
    calls, victims, defence = watched(monkeypatch, "fit_decoder"), cell.victims, cell.trained.training.defence
    fits.decoder_task(run, cell).do(0, lambda units: None)
    [((_, latents, _), _)] = calls
    images, private = run.setting.dataset.val.images[:2].float() / 255, dict(zip(victims.owners, victims.private, strict=True))
    assert len(private) > 1
    for step, owner in enumerate(sorted(private) * 2):
        model = copy.deepcopy(defence.model).eval()
        noise = defence.draw_noise(2, generator=torch.Generator().manual_seed(step))
        expected = functional_call(model, {**private[owner], **cell.snapshot.params}, (images, noise), {"full": True}).perturbed
        torch.testing.assert_close(latents(images, torch.Generator().manual_seed(step), step, None), expected, rtol=1e-4, atol=1e-5)


def test_notes_say_what_each_attack_is_granted(trained, tmp_path):
    notes = {name: {key: cell.note for key, cell in cells_of(*trained("full", name), name, tmp_path).items()} for name in DEFENCES}
    assert notes["bido"]["joint"] == notes["undefended"]["joint"] == "no noise to search"
    assert notes["precode"]["joint"] == notes["isotropic"]["joint"] == ""
    run, one = trained("head", "bido")
    for asked, terms in (({}, True), ({"released_loss": "utility"}, False), ({"batch_size": 1}, False)):
        note = cells.note_of(evaluated(run, **asked), one, ATTACKS["latent"])
        assert "front guessed on public images" in note and ("the defence's own terms are in the released one" in note) == terms
    assert "no floor" in notes["precode"]["zeroed"] and "floor holds" in notes["learned late"]["zeroed"]


def test_without_noise_the_joint_attack_is_the_naive_one_only_where_the_loss_is_cross_entropy(trained, tmp_path):
    for defence, released, twins in (("undefended", "client", True), ("bido", "client", False), ("bido", "utility", True)):
        run, one = trained("full", defence)
        evaluation = dataclasses.replace(run.recipe.evaluation, released_loss=released)
        recipe = dataclasses.replace(run.recipe, evaluation=evaluation)
        run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
        found = cells_of(run, one, defence, tmp_path)
        assert (found["joint"].twin is found["naive"]) == twins


def zeroed_case(trained, defence, folder, attack, **evaluation):
    """The case of an attack on what a malicious server's level of nought makes the clients release; and the victims."""
    run, one = trained("full", defence)
    run = evaluated(run, **evaluation)
    cell = cells_of(run, one, defence, folder)["zeroed"]
    [victims] = Releases(run).of(cell)
    return methods.make_case(run, one, cell.snapshot, attack, [victims], seed=0), victims


def test_a_zeroed_level_is_explained_by_the_true_image_and_the_floor_s_noise_together(trained, tmp_path):
    """The released gradient, whatever of the client's loss is in it, is matched there and nowhere else that was tried."""
    case, victims = zeroed_case(trained, "learned late", tmp_path, config.ZeroedLevel())
    plan, fits_at = methods.plan(case), {}
    assert plan.matching.noise_shape == case.noise_shape == tuple(victims.noise[0].shape)
    wrong = torch.randn(victims.noise[0].shape, generator=torch.Generator().manual_seed(1))
    for name, noise in (("true", victims.noise[0]), ("none", torch.zeros_like(wrong)), ("other", wrong)):
        start = dataclasses.replace(plan.matching, start=lambda o, r, noise=noise: (victims.images[o], noise), iterations=0, tv=0.0, noise_weight=0.0)
        fits_at[name] = float(attacks.drain(attacks.run_chunk(((0, 0),), plan.observations, plan.make_simulate(), start, seed=0))["fit"])
    assert fits_at["true"] < 1e-9 and fits_at["none"] > 1e-4 and fits_at["other"] > 1e-4, fits_at


def test_who_searches_the_floor_s_noise_gets_more_of_a_zeroed_level_than_who_overlooks_it(trained, tmp_path):
    """The same release, starts and iterations; what overlooks the floor is A0 with the settings that both have."""
    settings = {"iterations": 150, "restarts": 1}
    found = {}
    for name, attack in (("searched", config.ZeroedLevel(**settings)), ("overlooked", config.NaiveMatching(**settings))):
        case, victims = zeroed_case(trained, "learned", tmp_path, attack)
        plan = methods.plan(case)
        images = attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0)
        found[name] = [metrics.psnr_db(one.images[metrics.pair(one.images, truth)], truth) for one, truth in zip(images, victims.images, strict=True)]
    found = {name: torch.cat(values) for name, values in found.items()}
    assert float(found["searched"].mean()) > float(found["overlooked"].mean()) + 0.5, found


def test_where_the_client_has_no_floor_a_zeroed_level_is_attacked_as_by_the_naive_attack(trained, tmp_path):
    """Bit for bit: the noise that is searched reaches nothing. Of cross-entropy, as A0 does not know the loss's other terms."""
    settings = {"iterations": 20, "restarts": 1, "tv": 1e-3}
    layer = trained("full", "learned")[1].training.defence.model.perturbation
    kept, layer.std_floor = layer.std_floor, 0.0
    try:
        plans = [methods.plan(zeroed_case(trained, "learned", tmp_path, kind(**settings), released_loss="utility")[0]) for kind in (config.ZeroedLevel, config.NaiveMatching)]
        found = [attacks.drain(attacks.run_chunk(((0, 0), (1, 0)), plan.observations, plan.make_simulate(), plan.matching, seed=0)) for plan in plans]
    finally:
        layer.std_floor = kept
    assert plans[0].matching.noise_shape is not None and plans[1].matching.noise_shape is None
    torch.testing.assert_close(found[0]["images"], found[1]["images"], rtol=0, atol=1e-5)
    assert (found[0]["noise"] == 0).all() and (found[0]["images"] - 0.5).abs().mean() > 0.05


def test_a_decoder_guessed_for_a_zeroed_level_is_trained_at_the_level_that_clients_train_by(trained, tmp_path):
    run, one = trained("full", "learned")
    kinds = {"zeroed": config.ZeroedLevel(decoder="surrogate", surrogate_steps=2), "joint": config.JointMatching(decoder="surrogate", surrogate_steps=2)}
    run, made = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, attacks=kinds))), {}
    for name in kinds:
        cell = cells_of(run, one, "learned", tmp_path / name)[name]
        cell.releases = Releases(run).of(cell)
        [task] = fits.tasks(run, [cell], tmp_path / name)
        task.do(0, lambda units: None)
        made[name] = fits.surrogate(run, cell)
        assert cells.beyond(run, one, config.ZeroedLevel()) == ["knows the private decoder"] and "decoder guessed" in cell.note
    assert all(torch.equal(tensor, made["joint"][name]) for name, tensor in made["zeroed"].items())


def fit_at_the_truth(plan, victims, **known):
    """Of the first observation's images and noise, with more that is known."""
    one, targets = plan.observations[0], F.one_hot(victims.labels[0], 8).float()
    update = plan.make_simulate()(one.params, {**one.known, **known}, victims.images[0], targets, victims.noise[0])
    assert set(update) == set(one.update)
    mine, theirs = (torch.cat([side[key].flatten().double() for key in sorted(update)]) for side in (update, one.update))
    return float(1 - F.cosine_similarity(mine, theirs, dim=0))


@pytest.mark.parametrize("policy", ["full", "head", "all"])
@pytest.mark.parametrize("defence", ["bido", "precode heavy", "cvb", "isotropic", "learned late"])
def test_an_attack_of_one_s_own_is_granted_what_the_joint_one_is(defence, policy, trained):
    """The loss's terms, the tensors, the private parts; and its row says what of them makes it a bound."""
    run, one = trained(policy, defence)
    snapshot = one.snapshots["final"]
    victims = observe.release(run, one, snapshot, seed=0)
    own, joint = (methods.plan(methods.make_case(run, one, snapshot, attack, [victims], seed=0)) for attack in (Own(), ATTACKS["joint"]))
    for mine, theirs in zip(own.observations, joint.observations, strict=True):
        for place in ("params", "update", "known"):
            ours, beside = getattr(mine, place), getattr(theirs, place)
            assert list(ours) == list(beside) and all(torch.equal(ours[name], beside[name]) for name in ours), place
    assert fit_at_the_truth(own, victims) < 1e-6
    bounds = cells.beyond(run, one, Own())
    assert bounds == cells.beyond(run, one, ATTACKS["joint"])
    assert bounds == ["knows the private front"] * (policy == "head") + ["knows the private decoder"] * (defence == "learned late" and policy != "all")
    note = cells.note_of(run, one, Own())
    assert ("private front known: a bound" in note) == (policy == "head") and ("private decoder known: a bound" in note) == ("knows the private decoder" in bounds)


def test_an_attack_of_one_s_own_says_otherwise_by_a_field_decoder(trained, tmp_path):
    run, one = trained("full", "learned late")
    snapshot, names = one.snapshots["final"], {"decoder." + name for name, _ in one.training.defence.decoder.named_parameters()}
    victims, guess = observe.release(run, one, snapshot, seed=0), {name: tensor + 1 for name, tensor in one.training.defence.initial().items() if name in {*names}}
    seen = {}
    for asked in ("known", "surrogate", "unused", "a net of mine"):
        case = methods.make_case(run, one, snapshot, Own(decoder=asked), [victims], seed=0, fitted={"surrogate": guess})
        seen[asked] = methods.plan(case)
        expected = {"surrogate": guess, "unused": {}}.get(asked, victims.private[0])
        found = {name: tensor for name, tensor in case.observations[0].known.items() if name.startswith("decoder.")}
        assert found.keys() == {*expected} and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert cells.beyond(run, one, Own(decoder=asked)) == (["knows the private decoder"] if asked in ("known", "a net of mine") else [])
    assert set(seen["unused"].observations[0].update) == set(one.training.defence.model.parts["predictor"])
    assert "predictor only" in cells.note_of(run, one, Own(decoder="unused")) and "guessed" in cells.note_of(run, one, Own(decoder="surrogate"))
    assert fit_at_the_truth(seen["known"], victims) < 1e-6 and fit_at_the_truth(seen["unused"], victims) < 1e-6 < fit_at_the_truth(seen["surrogate"], victims)
    with pytest.raises(ValueError, match="without the surrogate"):
        methods.make_case(run, one, snapshot, Own(decoder="surrogate"), [victims], seed=0)
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, attacks={"mine": Own(decoder="surrogate")})))
    cell = cells_of(run, one, "learned late", tmp_path)["mine"]
    cell.releases = Releases(run).of(cell)
    assert [task.path.name for task in fits.tasks(run, [cell], tmp_path)] == [f"surrogate-{config.JointMatching().surrogate_steps}.safetensors"]


@pytest.mark.parametrize(
    ("defence", "policy", "checkpoint", "told"),
    [
        ("precode heavy", "full", "final", True), ("cvb", "full", "final", True), ("precode heavy", "head", "final", True), ("learned late", "full", "final", False),
        ("learned late", "all", "final", True), ("ramped", "full", "final", False), ("ramped", "full", "untrained", True),
    ],
)  # fmt: skip
def test_averaging_knows_the_loss_s_terms_but_where_a_decoder_that_stays_is_in_them(defence, policy, checkpoint, told, trained, tmp_path):
    """At the true images and noise it matches what was released just where it does. Under `head` its front is the first one, and its row no bound."""
    run, one = trained(policy, defence)
    run, start = evaluated(run, checkpoints=("untrained", "final")), one.training.defence.initial()
    final = one.snapshots["final"]
    first = dataclasses.replace(final, name="untrained", round=0, progress=0.0, params={name: start[name] for name in final.params})
    one = dataclasses.replace(one, snapshots={"untrained": first, "final": final})
    snapshot = one.snapshots[checkpoint]
    victims = observe.release(run, one, snapshot, seed=0)
    plan = methods.plan(methods.make_case(run, one, snapshot, ATTACKS["eot"], [victims], seed=0))
    assert observe.terms(run, one, ATTACKS["eot"], progress=snapshot.progress) == ("client" if told else "utility")
    if policy != "head":
        apart = fit_at_the_truth(plan, victims, draws=victims.noise[0][None])
        assert apart < 1e-6 if told else apart > 1e-5
    assert cells.beyond(run, one, ATTACKS["eot"]) == []
    knows = {cell.checkpoint: threats.threat(run, cell)["knows"] for cell in cells.make_cells(run, {(defence, 0): one}, tmp_path, tell=False) if cell.name == "eot"}
    assert ("the client's loss" in knows[checkpoint]) == told
    assert observe.terms(evaluated(run, released_loss="utility"), one, ATTACKS["eot"], progress=snapshot.progress) == "utility"
