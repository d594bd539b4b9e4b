"""The names of threat models: what each attack is told, by hand, over small synthetic cells and one round of training."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from gidef import cells, config, methods, threats
from gidef.config import JointMatching, LearnedPerturbation, NaiveMatching, Pruning, Undefended
from tests.small_run import RECIPE, evaluated, trained_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    iterations: int = 3
    restarts: int = 1
    labels: str = "recovered"

    def plan(self, case):
        return methods.Plan(case.observations, case.simulator, case.matching(noise_shape=case.noise_shape))


ATTACKS = {
    "naive": NaiveMatching(), "other settings": config.InvertingGradients(), "counts": NaiveMatching(labels="counts"), "recovered": NaiveMatching(labels="recovered"),
    "skip": config.SkipLayers(), "joint": JointMatching(), "aware": config.DecoderAware(), "guessed": JointMatching(decoder="surrogate"), "unused": JointMatching(decoder="unused"),
    "eot": config.EotMatching(), "rounds": config.MultiRound(rounds=4), "generative": config.GenerativePrior(), "learned": config.LearnedInversion(),
    "latent": config.LatentDecoding(), "decoder": config.PostHocDecoder(), "imprint": config.ImprintServer(), "zeroed": config.ZeroedLevel(), "own": Own(),
}  # fmt: skip
DEFENCES = {"undefended": Undefended(), "learned": LearnedPerturbation(ramp=0.0), "pruned": (LearnedPerturbation(ramp=0.0), Pruning(share=0.5))}
TOLD = {  # of the learned defence: server, releases, what the attack knows, in the words of the name
    "naive": ("honest but curious", 1, "knows the labels"),
    "other settings": ("honest but curious", 1, "knows the labels"),
    "counts": ("honest but curious", 1, "knows the label counts"),
    "recovered": ("honest but curious", 1, "knows no labels"),
    "skip": ("honest but curious", 1, "knows the labels"),
    "joint": ("honest but curious", 1, "knows the labels, the noise law, the client's loss and the private decoder"),
    "aware": ("honest but curious", 1, "knows the labels, the noise law, the client's loss and the private decoder"),
    "guessed": ("honest but curious", 1, "knows the labels, the noise law, the client's loss and public images"),
    "unused": ("honest but curious", 1, "knows the labels and the noise law"),
    "eot": ("honest but curious", 1, "knows the labels and the noise law"),
    "rounds": ("honest but curious", 4, "knows the labels, the noise law, the client's loss and the private decoder"),
    "generative": ("honest but curious", 1, "knows the labels, the noise law, the client's loss, public images and the private decoder"),
    "learned": ("honest but curious", 1, "knows the labels, the noise law, the client's loss and public images"),
    "latent": ("honest but curious", 1, "knows the labels, the noise law and public images"),
    "decoder": ("honest but curious", 1, "is given the latent, knows the noise law and public images"),
    "imprint": ("malicious", 1, "knows public images but no labels"),
    "zeroed": ("malicious", 1, "knows the labels, the noise law, the client's loss and the private decoder"),
    "own": ("honest but curious", 1, "knows the noise law, the client's loss and the private decoder but no labels"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(defence, policy): (run, what one round of it left)."""
    evaluation = dataclasses.replace(RECIPE.evaluation, checkpoints=("untrained", "final"))
    with trained_once(tmp_path_factory.mktemp, dataclasses.replace(RECIPE, defences=DEFENCES, evaluation=evaluation)) as one:
        yield one


def named(trained, folder, defence="learned", policy="full", attacks=ATTACKS, **evaluation):
    """{(attack, checkpoint): threat model}, and the cells."""
    run, one = trained(defence, policy)
    run = evaluated(run, **evaluation)
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, attacks=attacks)))
    made = cells.make_cells(run, {(defence, 0): one}, folder, tell=False)
    return {(cell.name, cell.checkpoint): threats.threat(run, cell) for cell in made}, made


def test_the_name_says_what_the_attack_is_told_and_differs_just_where_that_does(trained, tmp_path):
    found, _ = named(trained, tmp_path, checkpoints=("final",))
    assert {name for name, _ in found} == set(TOLD)
    for (name, _), threat in found.items():
        server, releases, knows = TOLD[name]
        seen = "gradient of one batch of 2" + (f"; {releases} releases" if releases > 1 else "")
        assert threat["name"] == f"{server} server; final checkpoint; {seen}; {knows}; no BatchNorm", name
    for (one, mine), (other, theirs) in itertools.combinations(found.items(), 2):
        assert (mine["name"] == theirs["name"]) == (TOLD[one[0]] == TOLD[other[0]])
    assert found["generative", "final"]["knows"] == ["the labels", "the noise law", "the client's loss", "public images", "the private decoder"]
    assert found["decoder", "final"]["knows"] == ["the noise law", "public images", "is given the latent"]


def test_the_checkpoint_is_in_the_name_and_so_is_what_the_training_adds_to_the_loss(trained, tmp_path):
    attacks = {"naive": NaiveMatching(), "joint": JointMatching()}
    found, _ = named(trained, tmp_path, attacks=attacks)
    assert len({threat["name"] for threat in found.values()}) == 4 and all(f"; {checkpoint} checkpoint; " in threat["name"] for (_, checkpoint), threat in found.items())
    utility, _ = named(trained, tmp_path, attacks=attacks, released_loss="utility")
    assert "the client's loss" in found["joint", "final"]["knows"] and "the client's loss" not in utility["joint", "final"]["knows"]


def test_attacks_that_are_the_same_computation_have_one_name(trained, tmp_path):
    found, made = named(trained, tmp_path, "undefended", attacks={"naive": NaiveMatching(), "joint": JointMatching()})
    twins = [cell for cell in made if cell.twin is not None]
    assert len(twins) == 2 and all(found[cell.name, cell.checkpoint] | {"decoder": 0} == found[cell.twin.name, cell.checkpoint] | {"decoder": 0} for cell in twins)


def test_what_is_private_under_head_or_shared_under_all_is_told_apart(trained, tmp_path):
    head, _ = named(trained, tmp_path, policy="head", checkpoints=("final",))
    assert head["joint", "final"]["knows"] == ["the labels", "the noise law", "the client's loss", "the private front", "the private decoder"]
    assert head["latent", "final"]["knows"] == ["the labels", "the noise law", "public images"] and head["naive", "final"]["knows"] == ["the labels"]
    plain, _ = named(trained, tmp_path, "undefended", policy="head", checkpoints=("final",))
    assert plain["latent", "final"]["knows"] == ["the labels", "public images"], "there is no noise whose law to know"
    everything, _ = named(trained, tmp_path, policy="all", checkpoints=("final",))
    assert everything["joint", "final"]["knows"] == everything["guessed", "final"]["knows"] == ["the labels", "the noise law", "the client's loss"]


def test_who_simulates_the_change_of_updates_knows_it(trained, tmp_path):
    found, _ = named(trained, tmp_path, "pruned", checkpoints=("final",))
    assert found["eot", "final"]["knows"] == ["the labels", "the noise law", "the change of updates"] and found["naive", "final"]["knows"] == ["the labels"]
    assert "the change of updates" in found["learned", "final"]["knows"] and "the change of updates" in found["own", "final"]["knows"]


def test_of_a_delta_the_local_training_is_in_the_name_and_who_simulates_it_knows_it(trained, tmp_path):
    attacks = {"naive": NaiveMatching(), "recovered": NaiveMatching(labels="recovered"), "own": Own()}
    attacks |= {"surrogate model": config.SurrogateModel(), "labelless": config.SurrogateModel(labels="recovered"), "imprint": config.ImprintServer()}
    common = {"checkpoints": ("final",), "attacks": attacks, "release": "delta", "batch_size": 4, "local_steps": 2}
    found, _ = named(trained, tmp_path, "undefended", **common, local_epochs=2, local_lr=1e-3, local_momentum=0.9)
    knows = {name: threat["name"].split("; ")[3] for (name, _), threat in found.items()}
    assert knows == {
        "naive": "knows the labels, the local steps and the order of the local batches", "recovered": "knows the local steps but no labels",
        "own": "knows the local steps but no labels", "surrogate model": "knows the labels", "labelless": "knows the local steps but no labels",
        "imprint": "knows public images but no labels",
    }  # fmt: skip
    assert all("; weight change after 2 epochs of 2 local steps of SGD with momentum 0.9, lr 0.001, on a batch of 4; " in threat["name"] for threat in found.values())
    plain, _ = named(trained, tmp_path, "undefended", **{**common, "local_steps": 1, "attacks": {"naive": NaiveMatching()}})
    assert plain["naive", "final"]["name"].split("; ")[2:4] == ["weight change after 1 local step of SGD, lr 0.01, on a batch of 4", "knows the labels and the local steps"]
    assert plain["naive", "final"]["local_training"] == "1 local step of SGD, lr 0.01"


def test_an_ensemble_is_told_what_any_of_its_members_is_but_for_bounds(trained, tmp_path):
    run, one = trained("learned")
    members = {name: ATTACKS[name] for name in ("naive", "eot", "guessed", "joint", "decoder")}
    _, made = named(trained, tmp_path, attacks=members, checkpoints=("final",))
    found = threats.threat(run, made[0], made)
    assert found["knows"] == ["the labels", "the noise law", "the client's loss", "public images"]
    assert "knows the labels, the noise law, the client's loss and public images;" in found["name"] and "decoder" not in found["name"] and "latent" not in found["name"]
