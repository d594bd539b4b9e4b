"""The training-time baselines from training to attack: one round each on small synthetic cells, and every attack that has something to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gidef import build, cells, config, fits, inversions, observe
from gidef.config import CVB, BiDO, IsotropicNoise, LearnedPerturbation, Model, Precode, Speed, Undefended
from gidef.evaluation import logits
from gidef.releases import Releases
from tests.small_run import RECIPE, trained_once

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
NOISY = {"naive", "joint", "eot", "skip", "rounds", "latent", "decoder"}
APPLY = {
    "undefended": {"naive", "joint"}, "isotropic": NOISY, "late": NOISY, "bido": {"naive", "joint"}, "precode": NOISY | {"zeroed"},
    "cvb": NOISY | {"zeroed"}, "learned late": set(ATTACKS),
}  # fmt: skip
"""Which attacks have something to do under `full`. A fixed level is no tensor to be zeroed; BiDO has no noise."""
FAST = {name: (attacks if name in ("late", "precode") else attacks - {"latent"}) & (NOISY | {"zeroed"}) for name, attacks in APPLY.items()}
"""Those that are run here: reading an early latent of two images takes seconds."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(policy, defence): (run, what one round of it left); each is trained once."""
    speed = Speed(device="cpu", workers=1, attacks_at_once=2, attack_mode="vmap")
    with trained_once(tmp_path_factory.mktemp, dataclasses.replace(RECIPE, defences=DEFENCES, attacks=ATTACKS, model=Model(), speed=speed)) as one:
        yield lambda policy, defence: one(defence, policy)


def cells_of(run, one, defence, folder):
    return {cell.name: cell for cell in cells.make_cells(run, {(defence, 0): one}, folder)}


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
    assert set(found) == APPLY[defence] - ({"zeroed", "skip"} if policy == "head" else set())
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
        found["latent"].reconstructions = fits.latent(run, found["latent"], lambda units: None)
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
        simulate = observe.observed_simulator(run, one, snapshot, terms=observe.terms(ATTACKS[name], "client"))()
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


def test_notes_say_what_each_attack_is_granted(trained, tmp_path):
    notes = {name: {key: cell.note for key, cell in cells_of(*trained("full", name), name, tmp_path).items()} for name in DEFENCES}
    assert notes["bido"]["joint"] == notes["undefended"]["joint"] == "no noise to search"
    assert notes["precode"]["joint"] == notes["isotropic"]["joint"] == ""
    assert "no floor" in notes["precode"]["zeroed"] and "floor holds" in notes["learned late"]["zeroed"]


def test_without_noise_the_joint_attack_is_the_naive_one_only_where_the_loss_is_cross_entropy(trained, tmp_path):
    for defence, released, twins in (("undefended", "client", True), ("bido", "client", False), ("bido", "utility", True)):
        run, one = trained("full", defence)
        evaluation = dataclasses.replace(run.recipe.evaluation, released_loss=released)
        recipe = dataclasses.replace(run.recipe, evaluation=evaluation)
        run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
        found = cells_of(run, one, defence, tmp_path)
        assert (found["joint"].twin is found["naive"]) == twins
