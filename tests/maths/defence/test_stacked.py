"""Defended clients as one program against the loop: the update of a round, and what the clients keep. Synthetic cells.

The net and the decoder have no kinks here: at a LeakyReLU's zero two correct roundings differ by a whole slope.
"""

import functools

import pytest
import torch
from torch import nn

from gidef import config
from gidef.build import Shape, make_defence
from gidef.clients.local import LocalSettings
from gidef.clients.participate import Participation, shared_names
from gidef.clients.store import ClientStore
from gidef.defence.base import Plain
from gidef.defence.perturbation import MinimaxPlayer
from gidef.types import Client, ServerState

SGD = LocalSettings(batch_size=4, optimiser="sgd", lr=0.05, momentum=0.9, epochs=2)
DEFENCES = {
    "undefended": config.Undefended(),
    "learned": config.LearnedPerturbation(ramp=0.0),
    "learned, conditional, shifted, with KL": config.LearnedPerturbation(level="conditional", mean=True, kl_weight=0.1, ramp=0.0),
    "learned, SSIM, with KL": config.LearnedPerturbation(dependence="ssim", kl_weight=0.1, ramp=0.0, ssim_threshold=-1.0),
    "learned, MSE, Laplace": config.LearnedPerturbation(dependence="neg_mse", law="laplace", ramp=0.0, mse_cap=10.0),
    "isotropic": config.IsotropicNoise(),
    "isotropic, frozen": config.IsotropicNoise(frozen=True),
    "capacity, front frozen": config.CapacityNoise(front="frozen"),
    "precode": config.Precode(width=8),
    "cvb": config.CVB(),
    "learned + pruning": (config.LearnedPerturbation(ramp=0.0), config.Pruning(share=0.5)),
}
ALONE = {
    "bido": config.BiDO(), "mixup": config.MixUp(),
    "dcor": config.LearnedPerturbation(dependence="dcor"), "cka": config.LearnedPerturbation(dependence="cka"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without_kinks(module):
    for name, child in module.named_children():
        if isinstance(child, nn.LeakyReLU):
            setattr(module, name, nn.Tanh())
        without_kinks(child)


@functools.cache
def clients():
    sizes, draw = (6, 3, 9), torch.Generator().manual_seed(0)
    return [Client(k, torch.randint(256, (n, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.randint(3, (n,), generator=draw)) for k, n in enumerate(sizes)]


def participation(chosen, folder, policy, settings=SGD):
    recipe = config.Recipe(model=config.Model(activation="none"), share_policy=policy)
    defence = make_defence(chosen, recipe, Shape(3, (1, 8, 8)), seed=0)
    if defence.decoder is not None:
        without_kinks(defence.decoder)
    initial = defence.initial()
    shared = shared_names(initial, defence.model.parts["predictor"], policy)
    part = Participation(
        [defence.encoded_player()], initial, shared, settings, ClientStore(folder, memory=4), seed=3, rounds=4,
        share=defence.share if defence.transforms else None,
    )  # fmt: skip
    return part, ServerState({name: initial[name] for name in shared}, round=2)


@pytest.mark.parametrize("policy", ["full", "head", "all"])
@pytest.mark.parametrize("name", DEFENCES)
def test_three_clients_send_and_keep_what_each_sends_and_keeps_alone(name, policy, tmp_path):
    if policy != "full" and name not in ("learned", "capacity, front frozen"):
        pytest.skip("one defence with a decoder and one without show what a policy changes")
    (alone, server), (together, _) = (participation(DEFENCES[name], tmp_path / place, policy) for place in ("alone", "together"))
    assert together.can_vectorise
    for one in (alone, together):
        one.versions[1] = 1
        one._store.put(1, 1, {key: one._initial[key] for key in one._private})
    expected = [alone.train(server, client) for client in clients()]
    found = together.train_group(server, clients())
    for one, other in zip(expected, found, strict=True):
        assert (one.num_examples, set(one.delta)) == (other.num_examples, set(other.delta))
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-4)
        moved = False
        for key in one.delta:
            torch.testing.assert_close(other.delta[key], one.delta[key], rtol=0, atol=1e-5)
            moved |= bool(one.delta[key].abs().max() > 1e-3)
        assert moved
    for part in (alone, together):
        part.versions = dict.fromkeys(range(3), 2)
    for client in range(3):
        for key, tensor in alone.state(client).items():
            # Adam divides a decoder's gradient by itself at first: one that is zero but for rounding moves either way
            torch.testing.assert_close(together.state(client)[key], tensor, rtol=0, atol=2e-3 if key.startswith("decoder") else 1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_stacked_says_so(name, tmp_path):
    assert not participation(ALONE[name], tmp_path, "full")[0].can_vectorise


def test_a_player_that_plays_another_loss_is_not_taken_for_its_parent():
    class Smoothed(Plain):
        def loss(self, images, labels, *, rows, epoch):
            return super().loss(images, labels, rows=rows, epoch=epoch) * 2

    class Private(Plain):
        def fill_gradients(self, images, labels, *, rows, epoch):
            raise NotImplementedError

    class Later(MinimaxPlayer):
        def begin(self, client, **options):
            super().begin(client, **options)

    plain = make_defence(config.Undefended(), config.Recipe(), Shape(3, (1, 8, 8)), seed=0)
    learned = make_defence(config.LearnedPerturbation(), config.Recipe(), Shape(3, (1, 8, 8)), seed=0)
    assert plain.player().stacked() is not None and learned.player().stacked() is not None
    assert Smoothed(plain.model).stacked() is None and Private(plain.model).stacked() is None
    assert Later(learned.model, learned.decoder, learned.settings, learned.frozen_noise).stacked() is None


def test_under_bfloat16_a_group_stays_close_to_its_clients(tmp_path):
    settings = LocalSettings(batch_size=4, optimiser="sgd", lr=0.05, precision="bfloat16")
    (alone, server), (together, _) = (participation(DEFENCES["learned"], tmp_path / place, "full", settings) for place in "ab")
    for one, other in zip([alone.train(server, client) for client in clients()], together.train_group(server, clients()), strict=True):
        for key, delta in one.delta.items():
            assert delta.dtype == other.delta[key].dtype == torch.float32
            assert (delta - other.delta[key]).norm() <= 0.1 * delta.norm() + 1e-4, key
