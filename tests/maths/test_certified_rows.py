"""What a row of the table says of the bits that a noisy latent lets through: small synthetic cells, the small net, one round of training."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gidef import config, findings, observe
from gidef.cells import make_cells
from gidef.config import (
    ATS,
    DPSGD,
    CapacityNoise,
    Data,
    Evaluation,
    IsotropicNoise,
    LearnedPerturbation,
    LocalTraining,
    MixUp,
    Model,
    MultiRound,
    NaiveMatching,
    Rounds,
    SingleGradient,
    Soteria,
)
from gidef.defence.capacity import capacity_bits
from gidef.job import run_recipe
from gidef.models import make_backbone
from gidef.training import train
from gidef.types import Client
from tests.small_run import CELLS, RECIPE, one_thread, start

DEFENCES = {
    "capacity": CapacityNoise(bits_weight=0.1), "isotropic": IsotropicNoise(std=2.0), "once": CapacityNoise(frozen=True, front="frozen"),
    "still": CapacityNoise(front="frozen", level="fixed", std_init=4.0), "moving": CapacityNoise(front="frozen"),
    "mixed": (CapacityNoise(front="frozen", level="fixed"), MixUp()), "looking": (CapacityNoise(), Soteria()),
    "mixed once": (CapacityNoise(front="frozen", level="fixed", frozen=True), MixUp()), "turned": (CapacityNoise(front="frozen", level="fixed"), ATS(policy=("rotate 2",))),
    "sampled": (CapacityNoise(front="frozen", level="fixed"), DPSGD(target_epsilon=50.0)),
    "searched": config.Matched(defence=CapacityNoise(), field="bits_weight", accuracy=0.5), "private": (CapacityNoise(), DPSGD(target_epsilon=50.0)), "conditional": LearnedPerturbation(level="conditional", dependence_weight=0.0), "none": config.Undefended(),
}  # fmt: skip


@pytest.fixture(scope="module")
def row_of(tmp_path_factory):
    """row_of(policy, defence, attack) → (fields, words, its cell); row_of.classes: training images of each class."""

    def row_of(policy, name, attack=None, rounds=None, clients=None, **evaluation):
        recipe = dataclasses.replace(
            RECIPE, data=Data(name=CELLS, num_clients=2, min_examples=8), model=Model(cut="neck", neck=8), rounds=rounds or RECIPE.rounds,
            clients=clients or dataclasses.replace(RECIPE.clients, grad_clip=0.0), defences=DEFENCES, share_policy=policy, attacks={"a": attack or NaiveMatching()},
            evaluation=Evaluation(num_victims=2, num_tuning=0, checkpoints=("final",), **evaluation),
        )  # fmt: skip
        run = start(recipe, tmp_path_factory.mktemp(f"{policy}-{name}"))
        chosen = DEFENCES[name]
        trained = train(run, name, chosen.at(0.1) if isinstance(chosen, config.Matched) else chosen, 0)
        [cell] = make_cells(run, {(name, 0): trained}, run.folder)
        cell.releases = [observe.release(run, trained, cell.snapshot, seed=0)]
        row_of.classes = run.setting.dataset.train.labels.bincount().tolist()
        return *findings._certificate(run, [cell], releases=getattr(cell.attack, "rounds", 1)), cell

    with one_thread():
        yield row_of


def test_the_bits_are_the_capacity_of_the_least_noisy_client(row_of):
    told, words, cell = row_of("head", "capacity")
    levels = [private["perturbation.level"] for private in cell.victims.private]
    bits = max(float(capacity_bits(F.softplus(level).clamp_min(0.1).double())) for level in levels)
    assert told["certified_bits"] == pytest.approx(bits, abs=1e-4) and told["lifetime_bits"] is None
    assert f"at most {bits:.1f} bits of an image beyond its label a release" in words and "among the 48 of all classes" in words


def test_a_level_that_is_fixed_is_certified_too_and_releases_add_up(row_of):
    told, words, _ = row_of("head", "isotropic", MultiRound(rounds=3))
    expected = 4 * float(torch.log2(torch.tensor(1.25)))
    assert told["certified_bits"] == pytest.approx(expected, abs=1e-5) and told["releases"] == 3
    assert f"{3 * expected:.1f} bits of an image beyond its label in 3 releases together" in words


@pytest.mark.parametrize(("name", "epochs", "certified"), [("isotropic", 1, True), ("isotropic", 2, False), ("once", 2, True)])
def test_a_delta_that_draws_the_noise_of_an_image_twice_is_not_certified_for_one_draw(name, epochs, certified, row_of):
    told, words, cell = row_of("head", name, release="delta", local_epochs=epochs)
    assert len(cell.victims.noise[0]) == (1 if certified else epochs)
    if certified:
        assert told["certified_bits"] > 0 and "certified: at most" in words
    else:
        assert told["certified_bits"] is None and words == f"no certificate: {told['uncertified']}" and "2 local epochs" in words


@pytest.mark.parametrize(("name", "steps", "certified"), [("capacity", 1, True), ("capacity", 2, False), ("isotropic", 2, False), ("moving", 2, False), ("still", 2, True), ("once", 2, True)])
def test_a_delta_in_whose_steps_the_private_layers_move_is_not_certified(name, steps, certified, row_of):
    told, words, _ = row_of("head", name, release="delta", local_steps=steps, batch_size=2)
    assert (told["certified_bits"] is not None) == certified
    assert certified or ("2 local steps the private layers move" in told["uncertified"] and words == f"no certificate: {told['uncertified']}")


def test_images_that_are_encoded_anew_under_noise_that_stays_are_not_certified(row_of):
    told, words, _ = row_of("head", "mixed once")
    assert told["certified_bits"] is None and "the difference of two releases has none" in told["uncertified"] and words == f"no certificate: {told['uncertified']}"


@pytest.mark.parametrize(("name", "batch", "certified"), [("mixed", 1, True), ("mixed", 2, False), ("turned", 2, True)])
def test_a_batch_whose_images_are_mixed_into_one_another_is_not_certified_for_one_latent(name, batch, certified, row_of):
    told, _, _ = row_of("head", name, batch_size=batch)
    assert (told["certified_bits"] is not None) == certified
    assert certified or "Mix may put an image into several latents" in told["uncertified"]


def test_under_dp_sgd_s_samples_an_image_may_be_released_in_every_step(row_of):
    told, _, cell = row_of("head", "sampled", None, Rounds(count=3), LocalTraining(batch_size=8, epochs=2))
    client = Client(0, torch.zeros(24, 3, 16, 16, dtype=torch.uint8), torch.zeros(24, dtype=torch.int64))
    assert told["lifetime_releases"] == 3 * 2 * 3, "rounds, epochs, steps of an epoch"
    player, drawn = cell.trained.training.defence.player(), torch.zeros(24)
    for number in range(3):
        player.begin(client, seed=0, round=number, progress=1.0, first=False)
        for _, rows in player.draw_batches(client, batch_size=8, epochs=2, seed=0, round=number):
            drawn[rows] += 1
    assert 3 * 2 < drawn.max() <= told["lifetime_releases"], "once an epoch would have been too few"


def test_frozen_noise_before_a_frozen_front_is_one_release(row_of):
    told, words, _ = row_of("head", "once")
    assert told["lifetime_bits"] == told["certified_bits"] and "in all rounds together" in words


def test_where_there_is_no_bound_none_is_given(row_of):
    told, words, _ = row_of("head", "conditional")
    assert told["certified_bits"] is None and "depends on the image" in told["uncertified"] and words == f"no certificate: {told['uncertified']}"
    assert row_of("full", "isotropic")[:2] == row_of("full", "conditional")[:2] == row_of("head", "none")[:2] == ({}, ""), "these do not ask for one"


@pytest.mark.parametrize(("policy", "name"), [("full", "capacity"), ("all", "still"), ("full", "looking"), ("all", "searched")])
def test_where_the_encoder_is_shared_the_row_says_that_there_is_no_bound(policy, name, row_of):
    told, words, _ = row_of(policy, name)
    assert set(told) == {"certified_bits", "uncertified"} and told["certified_bits"] is None and words == f"no certificate: {told['uncertified']}"
    assert f"share policy '{policy}' releases the encoder's gradients" in told["uncertified"] and "there is no such bound" in told["uncertified"]


def test_fresh_noise_adds_up_over_the_rounds_of_a_client_and_its_epochs(row_of):
    rounds = Rounds(count=5, cohort_size=1)
    told, words, cell = row_of("head", "still", None, rounds, LocalTraining(batch_size=8, epochs=3))
    taken = [[cell.trained.training.draw(number) for number in range(5)].count([client]) for client in range(2)]
    count = 3 * max(taken[owner] for owner in cell.victims.owners)
    bits = 4 * float(torch.log2(torch.tensor(1 + 1 / 16)))
    assert sum(taken) == 5 and told["releases"] == 1 and told["lifetime_releases"] == count
    assert told["certified_bits"] == pytest.approx(bits, abs=1e-6) and told["lifetime_bits"] == pytest.approx(count * bits, abs=1e-4)
    assert sum(row_of.classes) == 48 and len(row_of.classes) > 1
    for fano, all_bits in (("fano", bits), ("lifetime_fano", count * bits)):
        named = [min(1.0, (all_bits + 1) / math.log2(size)) if size > 1 else 1.0 for size in row_of.classes]
        assert told[fano] == pytest.approx(sum(size * share for size, share in zip(row_of.classes, named, strict=True)) / 48, abs=1e-5), "of who knows the label"
    assert f"{count * bits:.1f} bits in the {count} releases of the whole training" in words


def test_a_single_gradient_a_round_releases_an_image_once_a_round(row_of):
    told, _, _ = row_of("head", "still", None, Rounds(count=4), SingleGradient(batch_size=8))
    assert told["lifetime_releases"] == 4


@pytest.mark.parametrize(("name", "reason"), [("capacity", "the front trains"), ("isotropic", "the front trains"), ("moving", "the level learns"), ("mixed", "encoded")])
def test_where_releases_cannot_be_counted_there_is_no_lifetime_bound_and_a_reason(name, reason, row_of):
    told, words, _ = row_of("head", name)
    assert told["certified_bits"] > 0 and told["lifetime_bits"] is None and reason in told["uncertified_lifetime"] and "no lifetime bound" in words


def test_a_defence_that_looks_at_the_images_when_it_shares_voids_the_certificate(row_of):
    told, words, _ = row_of("head", "looking")
    assert told["certified_bits"] is None and "looks at the images" in told["uncertified"] and words == f"no certificate: {told['uncertified']}"


def test_a_norm_of_private_and_shared_gradients_together_tells_of_the_image_and_voids_the_certificate(row_of):
    """Two images behind the same noisy latent and label: without a clip the same gradient leaves, with it another, so that the channel's bits do not bound it."""
    clipping = dataclasses.replace(RECIPE.clients, grad_clip=0.05)
    told, _, cell = row_of("head", "capacity", None, None, clipping)
    assert told["certified_bits"] is None and "clients.grad_clip=0.05" in told["uncertified"] and "Set clients.grad_clip=0" in told["uncertified"]
    assert row_of("head", "still", None, None, clipping)[0]["certified_bits"] > 0, "nothing private is trained: the norm is the head's own"
    assert "DP-SGD's clipping" in row_of("head", "private")[0]["uncertified"]

    model = copy.deepcopy(cell.trained.training.defence.model)
    named = dict(model.named_parameters())
    shared, front = ([named[name] for name in model.parts[part]] for part in ("predictor", "encoder"))
    images, label, left = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1]), {}
    seen = model.run(images[0]).latent.detach() + 1.0
    for clip in (0.0, 0.05):
        left[clip] = []
        for image in images:
            latent = model.run(image).latent
            gradients = torch.autograd.grad(F.cross_entropy(model.predict(latent + (seen - latent.detach())), label), shared + front)
            head, norm = (torch.cat([one.flatten() for one in some]) for some in (gradients[: len(shared)], gradients))
            left[clip].append(head * (min(1.0, clip / float(norm.norm())) if clip else 1.0))
    (plain, same), (clipped, other) = left[0.0], left[0.05]
    assert (plain - same).norm() < 1e-5 * plain.norm() and (clipped - other).norm() > 1e-2 * clipped.norm()


def test_a_frozen_front_of_pretrained_weights_bounds_the_whole_training(tmp_path):
    """The practical case: a timm net from a local file, whose front stays what it was while the head learns behind the noise."""
    net = make_backbone("test_resnet", num_classes=5, image_shape=(3, 16, 16), norm="keep", seed=7, untouched=True)
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1.5)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, tmp_path / "net.safetensors")
    chosen = CapacityNoise(front="frozen", level="fixed", std_init=4.0, bits_weight=0.0)
    recipe = dataclasses.replace(
        RECIPE, data=Data(name=CELLS, num_clients=2, min_examples=8), defences={"front": chosen}, share_policy="head", attacks={"a": NaiveMatching()},
        model=Model(name="test_resnet", norm="frozen", cut="before:classifier", normalise="timm", pretrained=str(tmp_path / "net.safetensors")),
        rounds=Rounds(count=2), evaluation=Evaluation(num_victims=2, num_tuning=0, checkpoints=("final",)),
    )  # fmt: skip
    run = start(recipe, tmp_path / "run")
    with one_thread():
        trained = train(run, "front", chosen, 0)
        [cell] = make_cells(run, {("front", 0): trained}, run.folder)
        cell.releases = [observe.release(run, trained, cell.snapshot, seed=0)]
        told, words = findings._certificate(run, [cell], releases=1)
    model, weights = trained.training.defence.model, net.state_dict()
    assert model.parts["encoder"] and not set(model.parts["encoder"]) & set(cell.snapshot.params)
    for private in cell.victims.private:
        for name in model.parts["encoder"]:
            assert private[name].equal(weights[name.removeprefix("backbone.")])
    bits = math.prod(model.latent_shape) / 2 * math.log2(1 + 1 / 16)
    assert told["certified_bits"] == pytest.approx(bits, rel=1e-5) and told["lifetime_releases"] == 2 and told["lifetime_bits"] == pytest.approx(2 * bits, rel=1e-5)
    assert "in the 2 releases of the whole training" in words


def test_an_ensemble_is_certified_for_as_many_releases_as_any_of_its_attacks_sees(tmp_path):
    recipe = dataclasses.replace(
        RECIPE, data=Data(name=CELLS, num_clients=2, min_examples=8), model=Model(cut="neck", neck=8), clients=dataclasses.replace(RECIPE.clients, grad_clip=0.0),
        defences={"still": DEFENCES["still"]}, share_policy="head", attacks={"standard": config.Standard(version="smoke")},
        evaluation=Evaluation(num_victims=2, num_tuning=0, checkpoints=("final",), judge_epochs=1), out=str(tmp_path / "out"),
    )  # fmt: skip
    rows = {row["attack"]: row for row in run_recipe(recipe, "ensemble")["rows"]}
    rounds = {name: row["releases"] for name, row in rows.items() if name.startswith("standard - ")}
    assert max(rounds.values()) > 1 == min(rounds.values()) and rows["standard"]["releases"] == max(rounds.values())
    assert rows["standard"]["fano"] == max(row["fano"] for row in rows.values()) > rows["standard - joint"]["fano"]
