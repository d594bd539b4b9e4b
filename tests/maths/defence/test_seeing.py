"""A decoder that sees each image's own gradient: the game, what an attacker simulates of it, and runs. All images are synthetic."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gidef import config
from gidef.config import DecoderAware, JointMatching, LearnedInversion, LearnedPerturbation, NaiveMatching
from gidef.config.checks import problems
from gidef.defence import LearnedDefence
from gidef.defence.perturbation import MinimaxSettings, SeeingPlayer, decoder_loss
from gidef.defence.seeing import CHANNELS, SeeingDecoder, told_by_gradients
from gidef.errors import InputError
from gidef.job import run_recipe
from gidef.similarity import dependence
from gidef.sketches import sketch
from tests import small_run
from tests.maths.defence.test_perturbation import CLASSES, LATENT, SHAPE, a_batch, filled, make_client, make_model

LENGTH = 40
GAME = LearnedPerturbation(decoder_sees="gradient", decoder_sketch=64, ramp=0.0)


def make_defence(**settings):
    decoder = filled(SeeingDecoder(LATENT, 1, SHAPE, sketch=LENGTH, width_factor=0.25), seed=3).double()
    return LearnedDefence(make_model(), decoder, MinimaxSettings(ramp=0.0, **settings))


def plainly_told(model, images, labels, noise):
    """Image by image, by autograd."""
    found = []
    for image, label, eps in zip(images, labels, noise, strict=True):
        own = dict(model.named_parameters())
        gradients = torch.autograd.grad(F.cross_entropy(model(image[None], eps[None]), label[None]), list(own.values()), create_graph=True)
        found.append(sketch(dict(zip(own, gradients, strict=True)), LENGTH))
    return torch.stack(found)


def test_what_is_told_are_the_gradients_of_single_images():
    model, (images, labels, noise) = make_model(), a_batch()
    weights = dict(model.named_parameters())
    told = told_by_gradients(model, weights, images, labels, noise, length=LENGTH)
    assert told.shape == (4, LENGTH) and torch.allclose(told, plainly_told(model, images, labels, noise), rtol=1e-10, atol=1e-12)
    soft = F.one_hot(labels, CLASSES).double()
    assert torch.allclose(told_by_gradients(model, weights, images, soft, noise, length=LENGTH), told, rtol=1e-12)
    alone = told_by_gradients(model, weights, images[2:3], labels[2:3], noise[2:3], length=LENGTH)
    assert torch.allclose(alone[0], told[2], rtol=1e-10)
    with pytest.raises(InputError, match="cannot hold"):
        told_by_gradients(model, weights, images, labels, noise, length=2)


@pytest.mark.parametrize(("latent", "channel_dim"), [((8, 4, 4), 1), ((4, 4, 8), -1), ((17, 8), -1), ((8,), 1)])
def test_every_kind_of_latent_takes_more_channels_which_the_sketch_alone_fills(latent, channel_dim):
    decoder = SeeingDecoder(latent, channel_dim, (3, 16, 16), sketch=30, seed=2)
    z, told = torch.randn(5, *latent), torch.randn(5, 30)
    images = decoder((z, told))
    assert images.shape == (5, 3, 16, 16) and bool((images >= 0).all() and (images <= 1).all())
    assert not torch.allclose(images, decoder((z, told.roll(1, 0)))) and not torch.allclose(images, decoder((z.roll(1, 0), told)))
    assert decoder.read.out_features % CHANNELS == 0
    again = SeeingDecoder(latent, channel_dim, (3, 16, 16), sketch=30, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(decoder.parameters(), again.parameters(), strict=True))


def losses(defence, images, labels, noise):
    """Both players' losses, written down plainly."""
    outputs = defence.model.run(images, noise)
    reconstruction = defence.decoder((outputs.perturbed, plainly_told(defence.model, images, labels, noise)))
    mine = F.cross_entropy(outputs.logits, labels) + defence.settings.dependence_weight * dependence(defence.settings.dependence, images, reconstruction)
    return mine, decoder_loss(images, reconstruction)


def test_the_client_plays_against_what_the_decoder_has_learned_of_its_gradients():
    """A step of the decoder and the client's gradient, against plain autograd; the client's reaches the weights through what is told."""
    defence = make_defence(dependence="neg_mse", dependence_weight=3.0, decoder_steps=1, decoder_steps_first=1)
    player, client = defence.player(), make_client(examples=4)
    assert type(player) is SeeingPlayer and player.stacked() is None
    player.begin(client, seed=0, round=0, progress=0.5, first=True)
    images, labels = client.images.double() / 255, client.labels
    noise = defence.draw_noise(4, generator=torch.Generator()).double()
    player._draw = lambda *_: noise
    loss = player.loss(images, labels, rows=torch.arange(4), epoch=0)
    loss.backward()

    opponent = torch.optim.Adam(defence.decoder.parameters(), lr=defence.settings.decoder_lr)
    losses(defence, images, labels, noise)[1].backward()
    defence.model.zero_grad()
    opponent.step()
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(player.kept.parameters(), defence.decoder.parameters(), strict=True))
    mine, _ = losses(defence, images, labels, noise)
    mine.backward()
    assert torch.allclose(loss, mine, rtol=1e-10)
    for (name, p), own in zip(player.model.named_parameters(), defence.model.parameters(), strict=True):
        assert torch.allclose(p.grad, own.grad, rtol=1e-7, atol=1e-11), name
    # and were what is told a constant, it would be another gradient
    outputs = defence.model.run(images, noise)
    constant = (outputs.perturbed, plainly_told(defence.model, images, labels, noise).detach())
    cut = F.cross_entropy(outputs.logits, labels) + 3.0 * dependence("neg_mse", images, defence.decoder(constant))
    first = next(defence.model.parameters())
    assert not torch.allclose(torch.autograd.grad(cut, first)[0], first.grad, rtol=1e-3)


@pytest.mark.parametrize("policy", ["full", "all"])
def test_an_attacker_simulates_the_gradient_that_leaves(policy):
    defence = make_defence(dependence="neg_mse", dependence_weight=3.0)
    images, labels, noise = a_batch()
    initial = defence.initial()
    params = {name: t for name, t in initial.items() if policy == "all" or not name.startswith("decoder.")}
    known = {name: t for name, t in initial.items() if name not in params}
    found = defence.simulator(progress=1.0)()(params, known, images, F.one_hot(labels, CLASSES).double(), noise)
    mine, opponent = losses(defence, images, labels, noise)
    own = torch.autograd.grad(mine, list(defence.model.parameters()), retain_graph=True)
    wanted = {name: g for (name, _), g in zip(defence.model.named_parameters(), own, strict=True)}
    if policy == "all":
        theirs = torch.autograd.grad(opponent, list(defence.decoder.parameters()))
        wanted |= {f"decoder.{name}": g for (name, _), g in zip(defence.decoder.named_parameters(), theirs, strict=True)}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-7, atol=1e-11) for name in wanted)


def test_a_run_trains_attacks_and_says_what_has_nothing_to_do(tmp_path):
    quick = {"iterations": 4}
    recipe = dataclasses.replace(
        small_run.RECIPE, defences={"seeing": GAME}, out=str(tmp_path),
        attacks={
            "naive": NaiveMatching(**quick), "joint": JointMatching(**quick), "guessed": JointMatching(decoder="surrogate", surrogate_steps=3, **quick),
            "aware": DecoderAware(**quick), "learned": LearnedInversion(steps=3, gradients=16, surrogate_steps=3), "decoder": config.PostHocDecoder(steps=3),
        },
    )  # fmt: skip
    assert not problems(recipe)
    with small_run.one_thread():
        results = run_recipe(recipe, "seeing")
    rows = {row["attack"]: row for row in results["rows"] if row["attack"] in recipe.attacks}
    assert set(rows) == set(recipe.attacks) - {"aware"} and all(row["failed"] == 0 for row in rows.values()), rows
    assert rows["decoder"]["in_loop_psnr_db"] > 0
    [nothing] = results["not_applicable"]
    assert nothing["attack"] == "aware" and "handed the latent alone" in nothing["reason"]


def test_the_opponent_of_mixed_images_is_told_their_mixed_labels(tmp_path, monkeypatch):
    recipe = dataclasses.replace(small_run.RECIPE, defences={"both": (GAME, config.MixUp())}, attacks={"decoder": config.PostHocDecoder(steps=3)}, out=str(tmp_path))
    seen, given = [], LearnedDefence.given

    def watched(self, model, weights, images, labels, *rest):
        seen.append((images, labels))
        return given(self, model, weights, images, labels, *rest)

    monkeypatch.setattr(LearnedDefence, "given", watched)
    with small_run.one_thread():
        [row] = [row for row in run_recipe(recipe, "both")["rows"] if row["attack"] == "decoder"]
    assert row["failed"] == 0 and seen
    for images, labels in seen:
        assert len(labels) == len(images) and labels.ndim == 2 and torch.allclose(labels.sum(1), torch.ones(len(labels)))
    assert any(((labels > 0) & (labels < 1)).any() for _, labels in seen)


def test_what_cannot_be_played_is_refused():
    def told(game=GAME, **changes):
        return problems(dataclasses.replace(small_run.RECIPE, defences={"seeing": game}, **changes))

    assert not told()
    assert "schedule=alternating" in told(dataclasses.replace(GAME, schedule="simultaneous"))[0]
    assert "model.norm" in told(model=dataclasses.replace(small_run.RECIPE.model, norm="keep"))[0]
    assert "share_policy=full" in told(share_policy="head")[0]
    others = {"seeing": GAME, "plain": LearnedPerturbation()}
    assert not problems(dataclasses.replace(small_run.RECIPE, defences=others, only=("plain",), share_policy="head"))
    assert any("shard_size" in text for text in told(speed=dataclasses.replace(small_run.RECIPE.speed, shard_size=2)))
    assert not told(dataclasses.replace(GAME, schedule="simultaneous", dependence_weight=0.0))  # no decoder
    with pytest.raises(InputError, match="decoder_sketch=3 cannot hold"), small_run.one_thread():
        run_recipe(dataclasses.replace(small_run.RECIPE, defences={"seeing": dataclasses.replace(GAME, decoder_sketch=3)}, attacks={}), "seeing")
