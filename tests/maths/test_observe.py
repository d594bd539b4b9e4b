"""What attackers are given of real clients: small synthetic cells, the small net, one round of training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

from gidef import build, cells, observe
from gidef.clients.local import LocalSettings, train_locally
from gidef.clients.participate import DECODER
from gidef.config import (
    Analytic,
    ImprintServer,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    NaiveMatching,
    PostHocDecoder,
    Pruning,
    SingleGradient,
    SkipLayers,
    SurrogateModel,
    Undefended,
)
from gidef.data import Images
from gidef.models import SplitModel
from gidef.rng import generator
from gidef.types import Client, Observation
from tests.small_run import RECIPE, evaluated, trained_once

ATTACKS = {
    "naive": NaiveMatching(), "recovered": NaiveMatching(labels="recovered"), "known": JointMatching(),
    "surrogate": JointMatching(decoder="surrogate"), "unused": JointMatching(decoder="unused"), "skip": SkipLayers(labels="recovered"),
}  # fmt: skip
DEFENCES = {"undefended": Undefended(), "learned": LearnedPerturbation(ramp=0.0), "level": LearnedPerturbation(dependence_weight=0.0, kl_weight=0.1), "pruned": (LearnedPerturbation(ramp=0.0), Pruning(share=0.5)),
            "frozen": IsotropicNoise(frozen=True)}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(policy, defence): (run, what one round of it left); each is trained once."""
    evaluation = dataclasses.replace(RECIPE.evaluation, batch_size=1)
    recipe = dataclasses.replace(RECIPE, defences=DEFENCES, evaluation=evaluation, attacks={"naive": NaiveMatching(), "joint": JointMatching()})
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        yield lambda policy, defence: one(defence, policy)


def guess(one):
    """A decoder that is not the client's."""
    return {name: tensor + 1 for name, tensor in one.training.defence.initial().items() if name.startswith(DECODER)}


def seen(run, one, attack, victims=None) -> tuple[observe.Victims, list[Observation]]:
    snapshot = one.snapshots["final"]
    victims = victims or observe.release(run, one, snapshot, seed=0)
    return victims, observe.observations(run, one, snapshot, attack, victims, surrogate=guess(one))


def tensors_of(observation: Observation) -> dict[str, Tensor]:
    maps = {"params": observation.params, "update": observation.update, "known": observation.known, "unmatched": observation.unmatched}
    found = {f"{place}/{name}": tensor for place, tensors in maps.items() for name, tensor in tensors.items()}
    return found | ({} if observation.labels is None else {"labels": observation.labels})


def holds(tensor: Tensor, image: Tensor) -> bool:
    """Whether the image's values stand somewhere in the tensor, one after another, as pixels in [0, 1], [0, 255] or normalised."""
    values = tensor.detach().double().flatten()
    for wanted in (image, image * 255, (image - 0.5) / 0.25):
        wanted = wanted.double().flatten()
        count = len(values) - len(wanted) + 1
        if count < 1:
            return False
        fits = ((values[:count] - wanted[0]).abs() < 1e-6) & ((values[len(wanted) - 1 :] - wanted[-1]).abs() < 1e-6)
        for place in fits.nonzero().flatten().tolist():
            if torch.allclose(values[place : place + len(wanted)], wanted, atol=1e-6):
                return True
    return False


def cosine_distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    a, b = (torch.cat([side[name].double().flatten() for name in sorted(left)]) for side in (left, right))
    return float(1 - F.cosine_similarity(a, b, dim=0))


# --- what an observation holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "head", "all"])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_observation_holds_a_private_image(policy, name, trained):
    run, one = trained(policy, "learned")
    victims, observations = seen(run, one, ATTACKS[name])
    assert len(observations) == 4
    private = victims.images.flatten(0, 1)
    memory = {t.untyped_storage().data_ptr() for t in (victims.images, run.setting.dataset.train.images, *(n for n in victims.noise))}
    for observation in observations:
        assert {spec.name for spec in dataclasses.fields(observation)} == {"params", "update", "num_examples", "kind", "labels", "known", "unmatched", "scaled", "trust", "noise"}
        for place, tensor in tensors_of(observation).items():
            assert tensor.untyped_storage().data_ptr() not in memory, place
            assert not any(holds(tensor, image) for image in private), place


def test_the_search_for_images_finds_one_that_is_there(trained):
    run, _ = trained("full", "learned")
    pixels = run.setting.dataset.train.images[3]
    image = pixels.float() / 255
    assert holds(torch.cat([torch.rand(100), image.flatten(), torch.rand(7)]), image)
    assert holds(pixels[None], image) and holds((image - 0.5) / 0.25, image)
    assert not holds(image + 0.01, image) and not holds(image.flatten()[1:], image)


@pytest.mark.parametrize("name", ["naive", "known"])
def test_other_victims_images_change_nothing_in_an_observation(name, trained):
    run, one = trained("full", "learned")
    train_set, rows = run.setting.dataset.train, run.setting.roles.victims
    images = train_set.images.clone()
    images[rows[1:]] = images[rows[1:].flip(0)].flip(-1)
    other = dataclasses.replace(run.setting, dataset=dataclasses.replace(run.setting.dataset, train=Images(images, train_set.labels)))
    _, before = seen(run, one, ATTACKS[name])
    _, after = seen(dataclasses.replace(run, setting=other), one, ATTACKS[name])
    for place, tensor in tensors_of(before[0]).items():
        assert torch.equal(tensor, tensors_of(after[0])[place]), place
    for first, second in zip(before[1:], after[1:], strict=True):
        assert not torch.equal(first.update["backbone.head.weight"], second.update["backbone.head.weight"])


def test_labels_are_granted_only_where_the_threat_model_says_so(trained):
    run, one = trained("full", "undefended")
    victims, granted = seen(run, one, ATTACKS["naive"])
    assert [observation.labels.tolist() for observation in granted] == victims.labels.tolist()
    assert all(observation.labels is None for observation in seen(run, one, ATTACKS["recovered"])[1])


@pytest.mark.parametrize("defence", ["undefended", "learned"])
def test_under_head_naive_gets_the_initial_front_and_joint_the_true_one(defence, trained):
    run, one = trained("head", defence)
    initial, defended = one.training.defence.initial(), one.training.defence.model.parts
    front = [*defended["encoder"], *defended["perturbation"]]
    victims, naive = seen(run, one, ATTACKS["naive"])
    _, joint = seen(run, one, ATTACKS["known"])
    one.training.participation.versions = dict(one.snapshots["final"].versions)
    for owner, common, true in zip(victims.owners, naive, joint, strict=True):
        state = one.training.participation.state(owner)
        assert set(common.params) == set(true.params) == set(defended["predictor"]) and set(front) <= set(state)
        assert all(torch.equal(common.known[name], initial[name]) for name in front)
        assert all(torch.equal(true.known[name], state[name]) for name in front)
        assert any(not torch.equal(state[name], initial[name]) for name in front)
        assert not any(name.startswith(DECODER) for name in common.known)


def test_under_head_the_joint_attack_without_noise_is_work_of_its_own_and_called_a_bound(trained, tmp_path):
    for policy, twins in (("full", True), ("head", False)):
        run, one = trained(policy, "undefended")
        naive, joint = cells.make_cells(run, {("undefended", 0): one}, tmp_path)
        assert (joint.twin is naive) == twins
        assert ("a bound" in joint.note) != twins


def test_without_the_decoder_only_the_predictor_is_matched(trained):
    run, one = trained("full", "learned")
    predictor = set(one.training.defence.model.parts["predictor"])
    for observation in seen(run, one, ATTACKS["unused"])[1]:
        assert set(observation.update) == set(observation.params) == predictor
        assert set(one.training.defence.model.parts["encoder"]) <= set(observation.known)
    for observation in seen(run, one, ATTACKS["naive"])[1]:
        assert set(observation.update) == {name for name in one.snapshots["final"].params if name.startswith("backbone.")}

    def told(name):
        return observe.terms(run, one, ATTACKS[name], progress=1.0)

    assert told("unused") == told("naive") == "utility" and told("known") == "client"


def test_a_surrogate_stands_for_the_private_decoder_and_never_the_other_way_round(trained):
    run, one = trained("full", "learned")
    victims, granted = seen(run, one, ATTACKS["known"])
    names = set(guess(one))
    assert names == {name for name in granted[0].known if name.startswith(DECODER)}
    for private, observation in zip(victims.private, granted, strict=True):
        assert all(torch.equal(observation.known[name], private[name]) for name in names)
    for private, observation in zip(victims.private, seen(run, one, ATTACKS["surrogate"], victims)[1], strict=True):
        assert all(torch.equal(observation.known[name], guess(one)[name]) for name in names)
        assert not any(torch.equal(observation.known[name], private[name]) for name in names)
    with pytest.raises(ValueError, match="surrogate"):
        observe.observations(run, one, one.snapshots["final"], ATTACKS["surrogate"], victims)


# --- what is released --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defence", ["learned", "level"])
def test_at_strength_zero_the_release_is_that_of_the_normed_net_without_noise(defence, trained, monkeypatch):
    run, one = trained("full", defence)
    run, model, snapshot = evaluated(run, released_loss="utility", batch_size=2), one.training.defence.model, one.snapshots["final"]
    noisy = observe.release(run, one, snapshot, seed=0)
    monkeypatch.setattr(model.perturbation, "strength", 0.0)
    monkeypatch.setattr(model.perturbation, "std_floor", 0.0)
    silent = observe.release(run, one, snapshot, seed=0)
    backbone = build.make_model(run.recipe, run.setting.dataset, seed=0).backbone
    plain = SplitModel(
        backbone, cut="blocks.0", image_shape=(3, 16, 16), num_classes=8, latent_norm=True, input_mean=(0.5,) * 3, input_std=(0.25,) * 3
    )  # fmt: skip
    weights = {name: tensor for name, tensor in snapshot.params.items() if name.startswith("backbone.")}
    for batch in range(2):
        images, labels = silent.images[batch], silent.labels[batch]
        expected = grad(lambda w, images=images, labels=labels: F.cross_entropy(functional_call(plain, w, (images,)), labels))(weights)
        for name, tensor in expected.items():
            torch.testing.assert_close(silent.updates[batch][name], tensor, rtol=1e-5, atol=1e-7)
        assert cosine_distance(expected, noisy.updates[batch]) > 1e-3


# "unused" for one gradient only: over several steps the encoder moves too, which an attack on the predictor alone does not follow
@pytest.mark.parametrize(("name", "changes"), [("known", {}), ("unused", {}), ("known", {"release": "delta", "batch_size": 4, "local_steps": 2})])
def test_the_true_image_and_noise_match_exactly_and_the_wrong_noise_does_not(name, changes, trained):
    run, one = trained("full", "learned")
    run, snapshot = evaluated(run, **changes), one.snapshots["final"]
    victims, observations = seen(run, one, ATTACKS[name])
    simulate = observe.observed_simulator(run, one, snapshot, terms=observe.terms(run, one, ATTACKS[name], progress=snapshot.progress))()
    for batch, observation in enumerate(observations):
        labels = F.one_hot(victims.labels[batch], 8).float()

        def matched(noise, observation=observation, batch=batch, labels=labels):
            update = simulate(observation.params, observation.known, victims.images[batch], labels, noise)
            return cosine_distance(update, observation.update)

        assert victims.noise[batch].shape == observe.noise_shape(run, one)
        assert matched(victims.noise[batch]) < 1e-6
        assert matched(torch.zeros_like(victims.noise[batch])) > 1e-3


def test_the_noise_of_a_batch_is_its_own_and_reproducible(trained):
    run, one = trained("full", "learned")
    first, again, other = (observe.release(run, one, one.snapshots["final"], seed=seed) for seed in (0, 0, 1))
    for batch, noise in enumerate(first.noise):
        assert torch.equal(noise, again.noise[batch]) and not torch.equal(noise, other.noise[batch])
        assert not any(torch.equal(noise, first.noise[k]) for k in range(batch))


def placed(images: Tensor, labels: Tensor) -> Client:
    """A client whose batches in round 5 of seed 0 are consecutive slices of the images."""
    client = Client(7, images.clone(), labels.clone())
    order = torch.randperm(len(labels), generator=generator(0, "order", 5, client.id))
    client.images[order], client.labels[order] = images, labels
    return client


@pytest.mark.parametrize("policy", ["full", "head"])
@pytest.mark.parametrize("defence", ["undefended", "level"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_released_delta_is_what_local_training_with_plain_sgd_gives(defence, steps, policy, trained):
    """Under head, the front and the level that the client keeps take the steps, too."""
    run, one = trained(policy, defence)
    run, snapshot = evaluated(run, release="delta", batch_size=4, local_steps=steps, local_lr=0.05), one.snapshots["final"]
    victims = observe.release(run, one, snapshot, seed=0)
    rows = victims.rows[0]
    client = placed(run.setting.dataset.train.images[rows], victims.labels[0])
    settings = LocalSettings(epochs=1, batch_size=4 // steps, optimiser="sgd", lr=0.05, grad_clip=0.0)
    player = one.training.defence.player()
    player.begin(client, seed=0, round=5, progress=1.0, first=False)
    private = victims.private[0]
    assert bool(private) == (policy == "head")
    found = train_locally(player, {**snapshot.params, **private}, client, settings, seed=0, round=5)
    update, shape = victims.updates[0], observe.noise_shape(run, one)
    if shape is not None:  # the player draws noise of its own
        draws = generator(0, "noise", 5, client.id)
        noise = torch.stack([one.training.defence.draw_noise(4 // steps, generator=draws) for _ in range(steps)])
        assert noise.shape == shape
        simulate = observe.observed_simulator(run, one, snapshot, terms="client")()
        update = simulate(snapshot.params, private, victims.images[0], F.one_hot(victims.labels[0], 8).float(), noise)
    assert found.steps == steps
    assert set(update) == set(snapshot.params)
    assert set(found.delta) == set(update) | set(private)
    for name, tensor in update.items():
        torch.testing.assert_close(tensor, found.delta[name], rtol=1e-4, atol=1e-6)


OPTIMISERS = {
    "sgd": ({}, lambda weights: torch.optim.SGD(weights, lr=0.05)),
    "momentum": ({"local_momentum": 0.9}, lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9)),
    "adam": ({"local_optimiser": "adam"}, lambda weights: torch.optim.Adam(weights, lr=0.05)),
}


@pytest.mark.parametrize("defence", ["undefended", "learned", "frozen"])
@pytest.mark.parametrize("how", OPTIMISERS)
def test_a_delta_of_two_epochs_is_that_of_a_plain_loop_over_the_same_batches_twice(how, defence, trained):
    """Of cross-entropy, in float64; every image has its noise again where it is frozen, and fresh noise in each epoch where not."""
    run, one = trained("full", defence)
    changes, optimiser = OPTIMISERS[how]
    run, snapshot = evaluated(run, release="delta", batch_size=4, local_steps=2, local_epochs=2, local_lr=0.05, released_loss="utility", **changes), one.snapshots["final"]
    victims = observe.release(run, one, snapshot, seed=0)
    noise, images, labels = victims.noise[0], victims.images[0].double(), victims.labels[0]
    weights = {name: tensor.double().requires_grad_() for name, tensor in snapshot.params.items()}
    taking = optimiser(list(weights.values()))
    for epoch in range(2):
        for step in range(2):
            rows, drawn = slice(2 * step, 2 * step + 2), None
            if noise is not None:
                drawn = noise[step if defence == "frozen" else 2 * epoch + step].double()
            taking.zero_grad()
            F.cross_entropy(functional_call(one.training.defence.model, weights, (images[rows], drawn)), labels[rows]).backward()
            taking.step()
    expected = {name: tensor.detach() - snapshot.params[name].double() for name, tensor in weights.items()}
    simulate = observe.observed_simulator(run, one, snapshot, terms="utility")()
    double = {name: tensor.double() for name, tensor in snapshot.params.items()}
    found = simulate(double, {}, images, F.one_hot(labels, 8).double(), None if noise is None else noise.double())
    assert set(found) == set(expected) and all(float(tensor.abs().max()) > 0 for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-10)
    again = simulate(snapshot.params, {}, victims.images[0], F.one_hot(labels, 8).float(), noise)
    assert all(torch.equal(tensor, again[name]) for name, tensor in victims.updates[0].items())
    assert cosine_distance(expected, victims.updates[0]) < 1e-4
    assert noise is None or (noise.shape == observe.noise_shape(run, one) and len(noise) == (2 if defence == "frozen" else 4))


def test_frozen_noise_is_the_client_s_own_for_each_image(trained):
    run, one = trained("full", "frozen")
    run = evaluated(run, release="delta", batch_size=4, local_steps=2, local_epochs=2)
    victims = observe.release(run, one, one.snapshots["final"], seed=0)
    rows, drawn = victims.rows[0].tolist(), victims.noise[0].flatten(0, 1)
    for row, noise in zip(rows, drawn, strict=True):
        client, place = run.setting.owner(row)
        assert torch.equal(one.training.defence.frozen_noise(run.setting.clients[client], seed=0)[place], noise)


@pytest.mark.parametrize("defence", ["undefended", "learned"])
def test_one_epoch_of_plain_sgd_is_bit_by_bit_what_it_was(defence, trained):
    run, one = trained("full", defence)
    run, snapshot = evaluated(run, release="delta", batch_size=4, local_steps=2, local_lr=0.05), one.snapshots["final"]
    victims = observe.release(run, one, snapshot, seed=0)
    simulate = one.training.defence.simulator(terms="client", progress=snapshot.progress)()
    weights, labels = dict(snapshot.params), F.one_hot(victims.labels[0], 8).float()
    for step in range(2):
        rows, noise = slice(2 * step, 2 * step + 2), victims.noise[0]
        gradients = simulate(weights, victims.private[0], victims.images[0][rows], labels[rows], None if noise is None else noise[step])
        weights = {name: tensor - 0.05 * gradients[name] for name, tensor in weights.items()}
    for name, tensor in victims.updates[0].items():
        assert torch.equal(tensor, weights[name] - snapshot.params[name])


# --- changes of what leaves ----------------------------------------------------------------------------------------------


def test_a_pruned_update_is_what_the_server_and_every_attacker_see(trained):
    run, one = trained("full", "pruned")
    victims, found = seen(run, one, ATTACKS["naive"])
    for observation in found:
        for tensor in observation.update.values():
            assert int((tensor == 0).sum()) >= tensor.numel() // 2 > 0 or tensor.numel() == 1
    bare = dataclasses.replace(one, training=dataclasses.replace(one.training, defence=build.make_defence(
        LearnedPerturbation(ramp=0.0), run.recipe, run.setting.dataset, seed=0)))  # fmt: skip
    whole = observe.release(run, bare, one.snapshots["final"], seed=0)
    for update, other in zip(victims.updates, whole.updates, strict=True):
        for name, tensor in update.items():
            torch.testing.assert_close(tensor, torch.where(tensor != 0, other[name], 0.0))


def test_the_joint_attack_simulates_pruning_and_starts_at_nought_from_the_truth(trained):
    """At the true images and noise the simulated update is the released one; the naive attack's is not."""
    run, one = trained("full", "pruned")
    snapshot = one.snapshots["final"]
    victims = observe.release(run, one, snapshot, seed=0)
    for attack, exact in ((ATTACKS["known"], True), (ATTACKS["naive"], False)):
        observation = observe.observations(run, one, snapshot, attack, victims)[0]
        assert any(name.startswith("share/") for name in observation.known) == exact
        simulate = observe.observed_simulator(run, one, snapshot, terms="client", adaptive=observe.adapts(attack))()
        known = {**observation.known, **victims.private[0]}
        targets = F.one_hot(victims.labels[0], 8).float()
        found = simulate(observation.params, known, victims.images[0], targets, victims.noise[0])
        apart = max(float((found[name] - tensor).abs().max()) for name, tensor in observation.update.items())
        assert (apart < 1e-6) == exact


def test_clients_send_pruned_updates(trained):
    """In training, too: a client's delta as the server adds it."""
    run, one = trained("full", "pruned")
    training = one.training
    update = training.participation.train(training.server, run.setting.clients[0])
    for tensor in update.delta.values():
        if tensor.numel() > 1:
            assert 0 < int((tensor != 0).sum()) <= -(-tensor.numel() // 2)


# --- what a row says of the local training --------------------------------------------------------------------------------


def alike(**changes):
    """Clients that train as the attacked delta does."""
    return LocalTraining(**{"optimiser": "sgd", "lr": 0.01, "grad_clip": 0.0, **changes})


@pytest.mark.parametrize(
    ("clients", "asked", "said"),
    [
        (LocalTraining(), {}, "the recipe's clients train with Adam, and the delta that is attacked is of SGD"),
        (alike(optimiser="adam"), {"local_optimiser": "adam"}, ""),
        (alike(), {}, ""),
        (alike(momentum=0.9), {}, "train with SGD with momentum 0.9, and the delta that is attacked is of SGD"),
        (alike(momentum=0.9), {"local_momentum": 0.9}, ""),
        (SingleGradient(), {"local_momentum": 0.5}, "the recipe's clients send single gradients, and the delta that is attacked is of SGD with momentum 0.5"),
        (alike(weight_decay=0.1), {}, "the recipe's clients have weight decay 0.1, and the delta that is attacked has no such thing"),
        (alike(proximal=0.5, grad_clip=5.0), {}, "clients have a proximal term of weight 0.5, gradients clipped at norm 5, and the delta"),
        (SingleGradient(grad_clip=1.0), {}, "the recipe's clients have gradients clipped at norm 1, and the delta that is attacked has no such thing"),
        (alike(lr=0.1), {}, "the recipe's clients step at rate 0.1, and the delta that is attacked is of rate 0.01"),
        (alike(lr=0.1), {"local_lr": 0.1}, ""),
        (LocalTraining(), {"release": "gradient"}, ""),
    ],
)
def test_a_row_says_where_the_clients_train_otherwise_than_the_attacked_delta(clients, asked, said, trained):
    run, one = trained("full", "undefended")
    run = evaluated(run, **{"release": "delta", "batch_size": 2, **asked})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, clients=clients)))
    note = cells.note_of(run, one, NaiveMatching())
    assert said in note and ("clients" in note) == bool(said)


def test_a_row_says_that_steps_of_adam_are_little_more_than_signs(trained):
    run, one = trained("full", "undefended")
    said = "steps of Adam tell little more than signs; the slope that the attack follows is a surrogate"
    for changes, says in (({"release": "delta", "local_optimiser": "adam"}, True), ({"release": "delta"}, False), ({"release": "gradient"}, False)):
        for attack in (NaiveMatching(), JointMatching(), PostHocDecoder()):
            expected = says and not isinstance(attack, PostHocDecoder)  # which reads no update
            assert (said in cells.note_of(evaluated(run, batch_size=2, **changes), one, attack)) == expected


def test_a_row_says_that_the_order_of_the_labels_over_the_local_steps_was_guessed(trained):
    run, one = trained("full", "undefended")
    run = evaluated(run, release="delta", batch_size=2, local_steps=2)
    said = "the order of the labels over the local steps was guessed"
    assert f"{said} (1 assignment to begin with, exchanges tried on the way)" in cells.note_of(run, one, NaiveMatching(labels="counts"))
    assert f"{said} (4 assignments to begin with, " in cells.note_of(run, one, NaiveMatching(labels="recovered", restarts=4))
    for attack in (NaiveMatching(), NaiveMatching(labels="searched"), SurrogateModel(labels="recovered"), Analytic(labels="recovered")):
        assert said not in cells.note_of(run, one, attack)
    assert said not in cells.note_of(evaluated(run, local_steps=1), one, NaiveMatching(labels="counts"))


def test_an_imprint_block_reads_nothing_off_steps_of_adam(trained, tmp_path):
    run, one = trained("full", "undefended")
    for optimiser, idle in (("sgd", False), ("adam", True)):
        asked = evaluated(run, release="delta", batch_size=2, local_optimiser=optimiser)
        recipe = dataclasses.replace(asked.recipe, attacks={"imprint": ImprintServer()})
        asked = dataclasses.replace(asked, setting=dataclasses.replace(asked.setting, recipe=recipe))
        assert ["ratio of two changes" in row["reason"] for row in cells.not_applicable(asked, {("undefended", 0): one})] == [True] * idle
        assert [cell.name for cell in cells.make_cells(asked, {("undefended", 0): one}, tmp_path)] == ["imprint"] * (not idle)
