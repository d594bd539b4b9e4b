"""The control of fixed noise, and the noise's place per defence. Random images, the small net and a tiny transformer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gidef import build, config
from gidef.clients.participate import shared_names
from gidef.defence.isotropic import isotropic_noise
from gidef.defence.perturbation import LearnedDefence
from gidef.errors import InputError
from gidef.models import Perturbation
from gidef.rng import generator
from gidef.types import Client

SHAPE = build.Shape(4, (3, 16, 16))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(chosen, name="small", seed=0):
    return build.make_defence(chosen, config.Recipe(model=config.Model(name=name)), SHAPE, seed=seed)


def a_batch(size=3):
    draw = torch.Generator().manual_seed(0)
    return torch.rand(size, 3, 16, 16, generator=draw), torch.arange(size) % 4


def one_hot(labels):
    return F.one_hot(labels, 4).float()


def np_latent(z, noise, std):
    z = z.reshape(len(z), -1)
    normed = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-8)
    return normed + std * noise.reshape(len(noise), -1)


@pytest.mark.parametrize("std", [0.0, 0.3, 2.0])
def test_the_perturbed_latent_is_numpys(std):
    defence, (images, _) = made(config.IsotropicNoise(std=std)), a_batch()
    noise = defence.draw_noise(3, generator=generator(0, "x"))
    model = defence.model
    outputs = model.run(images, noise)
    z = model.backbone.blocks[:2]((images - 0.5) / 0.25).detach().double().numpy()
    expected = np_latent(z, noise.double().numpy(), std)
    np.testing.assert_allclose(outputs.perturbed.detach().flatten(1).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert float(outputs.std.expand_as(outputs.latent).max()) == float(outputs.std.min()) == pytest.approx(std)


def test_no_noise_equals_the_net_with_the_latent_norm_alone_bit_for_bit():
    """In the client's loss and gradient, and in what an attacker simulates."""
    defence, (images, labels) = made(config.IsotropicNoise(std=0.0)), a_batch()
    plain = build.make_model(config.Recipe(), SHAPE, seed=0)
    plain.latent_norm = True
    expected = F.cross_entropy(plain(images), labels)
    expected.backward()
    player = defence.player()
    player.begin(Client(0, images, labels), seed=0, round=0, progress=0.0, first=True)
    loss = player.loss(images, labels, rows=torch.arange(3), epoch=0)
    loss.backward()
    assert torch.equal(loss, expected)
    noise = defence.draw_noise(3, generator=generator(0, "x"))
    simulated = defence.simulator()()(defence.initial(), {}, images, one_hot(labels), noise)
    assert simulated.keys() == dict(plain.named_parameters()).keys()
    silent = defence.simulator()()(defence.initial(), {}, images, one_hot(labels), None)
    for name, p in plain.named_parameters():
        assert torch.equal(player.model.get_parameter(name).grad, p.grad)
        assert torch.equal(simulated[name], silent[name])


def test_the_level_is_no_tensor_that_a_server_could_send_or_see():
    defence = made(config.IsotropicNoise(std=0.7))
    assert defence.decoder is None and defence.model.parts["perturbation"] == () and defence.noise_shape == defence.model.latent_shape == (64, 4, 4)
    assert defence.initial().keys() == made(config.Undefended()).initial().keys()
    assert isinstance(defence, LearnedDefence) and defence.model.perturbation.std == 0.7
    fresh = [defence.draw_noise(2, generator=generator(0, "x", k)) for k in range(2)]
    assert not torch.equal(*fresh)
    laplace = made(config.IsotropicNoise(law="laplace")).draw_noise(500, generator=generator(0, "x"))
    assert float(laplace.var()) == pytest.approx(1.0, rel=0.02) and float((laplace**4).mean()) == pytest.approx(6.0, rel=0.1)


def test_frozen_noise_is_one_draw_per_image_for_ever():
    client = Client(3, *a_batch(5))
    frozen, fresh = made(config.IsotropicNoise(frozen=True)), made(config.IsotropicNoise())
    assert fresh.frozen_noise(client, seed=0) is None
    table = frozen.frozen_noise(client, seed=0)
    assert table.shape == (5, 64, 4, 4) and torch.equal(table, frozen.frozen_noise(client, seed=0))
    player, images = frozen.player(), client.images
    losses = []
    for number in range(2):
        player.begin(client, seed=0, round=number, progress=0.0, first=not number)
        losses.append(player.loss(images[:2], client.labels[:2], rows=torch.tensor([0, 1]), epoch=0))
    assert torch.equal(*losses)
    torch.testing.assert_close(losses[0], F.cross_entropy(frozen.model(images[:2], table[:2]), client.labels[:2]))


def test_a_level_below_nought_and_a_learned_one_are_refused():
    with pytest.raises(InputError, match="std_init=-1.0"):
        Perturbation((4, 2, 2), 1, mode="fixed", std_init=-1.0)
    with pytest.raises(InputError, match="std_init=0.0"):
        Perturbation((4, 2, 2), 1, mode="global", std_init=0.0)
    with pytest.raises(ValueError, match="fixed"):
        isotropic_noise(made(config.LearnedPerturbation()).model)
    with pytest.raises(ValueError, match="fixed"):
        isotropic_noise(made(config.Undefended()).model)


# --- the noise's place --------------------------------------------------------------------------------------------------

PLACES = {
    "stage:0": ("blocks.0", (32, 8, 8), {"blocks"}), None: ("blocks.1", (64, 4, 4), {"blocks"}), "blocks.2": ("blocks.2", (128, 2, 2), set()),
    "before:classifier": ("before:head", (512,), set()),
}  # fmt: skip


@pytest.mark.parametrize("chosen", [config.LearnedPerturbation, config.IsotropicNoise])
@pytest.mark.parametrize("cut", PLACES)
def test_a_defence_places_its_noise_and_what_head_shares_begins_there(cut, chosen):
    defence, (place, latent, behind) = made(chosen(cut=cut)), PLACES[cut]
    assert (defence.model.cut, defence.model.latent_shape, defence.noise_shape) == (place, latent, latent)
    predictor = defence.model.parts["predictor"]
    shared = shared_names(defence.initial(), predictor, "head")
    assert shared == predictor and {name.split(".")[1] for name in shared} == behind | {"head"}
    assert not set(shared) & {*defence.model.parts["encoder"], *defence.model.parts["perturbation"]}
    images, labels = a_batch()
    noise = defence.draw_noise(3, generator=generator(0, "x"))
    outputs = defence.model.run(images, noise)
    torch.testing.assert_close(defence.model.predict(outputs.perturbed), outputs.logits)
    params = {name: tensor for name, tensor in defence.initial().items() if name in shared}
    known = {name: tensor for name, tensor in defence.initial().items() if name not in shared}
    found = defence.simulator()()(params, known, images, one_hot(labels), noise)
    assert set(found) == set(shared) and all(gradient.count_nonzero() for gradient in found.values())


def test_the_head_of_a_transformer_has_its_place_too():
    defence = made(config.IsotropicNoise(cut="before:classifier"), name="vit_tiny_patch16_224")
    assert defence.model.cut == "before:head" and defence.noise_shape == (192,)
    assert defence.model.parts["predictor"] == ("backbone.head.weight", "backbone.head.bias")


def test_without_a_place_of_its_own_the_recipes_cut_is_taken():
    recipe = config.Recipe(model=config.Model(cut="blocks.0"))
    for chosen, place in ((config.IsotropicNoise(), "blocks.0"), (config.IsotropicNoise(cut="blocks.2"), "blocks.2"), (config.Undefended(), "blocks.0")):
        assert build.make_defence(chosen, recipe, SHAPE, seed=0).model.cut == place
