"""DP-SGD of images on nets with noise on the latent, against plain loops. All images are synthetic."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

pytest.importorskip("opacus")

from gidef import build, config, observe
from gidef.clients.local import LocalSettings, train_locally
from gidef.config import (
    CVB,
    DPSGD,
    BiDO,
    CapacityNoise,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Precode,
    Recipe,
    Undefended,
)
from gidef.defence import PrivateNoise
from gidef.defence.capacity import capacity_bits
from gidef.errors import InputError
from gidef.rng import generator
from gidef.training import train
from gidef.types import Client
from tests.small_run import RECIPE, evaluated, few_cells, one_thread, start

SILENT = DPSGD(clip=0.3, noise_multiplier=0.0, target_epsilon=None)
NOISE = {
    "isotropic": IsotropicNoise(std=0.8), "frozen": IsotropicNoise(std=0.8, frozen=True), "laplace": IsotropicNoise(law="laplace"),
    "level": LearnedPerturbation(dependence_weight=0.0, kl_weight=0.1, mean=True), "conditional": LearnedPerturbation(dependence_weight=0.0, level="conditional"),
    "capacity": CapacityNoise(bits_weight=0.01), "still": CapacityNoise(bits_weight=0.01, front="frozen", level="fixed"), "precode": Precode(width=6), "cvb": CVB(),
}  # fmt: skip
SHAPE = build.Shape(8, (3, 16, 16))


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def client():
    train = few_cells().train
    return Client(3, train.images[:6], train.labels[:6])


def made(name, private=SILENT):
    chosen = NOISE[name] if private is None else (NOISE[name], private)
    defence = build.make_defence(chosen, dataclasses.replace(RECIPE, defences={"x": chosen}), SHAPE, seed=0)
    if private is not None:
        defence.noise_multiplier = private.noise_multiplier
    return defence


def loss_of(name, model, image, label, noise):
    """The loss of one image, written down again."""
    out = model(image[None], noise[None], full=True)
    found, chosen = F.cross_entropy(out.logits, label[None]), NOISE[name]
    if getattr(chosen, "kl_weight", 0.0):
        found = found + chosen.kl_weight * model.perturbation.kl(out.latent, out.std)
    if isinstance(chosen, CapacityNoise):
        found = found + chosen.bits_weight * capacity_bits(out.std.expand(out.latent.shape[1:]))
    return found


@pytest.mark.parametrize("name", NOISE)
def test_a_step_is_the_sum_of_each_images_clipped_gradient_under_its_own_noise(name, client):
    defence = made(name)
    player, model, rows = defence.player(), made(name, None).model, torch.tensor([4, 0, 2])
    player.begin(client, seed=1, round=2, progress=0.5, first=False)
    assert next(player.draw_batches(client, batch_size=3, epochs=1, seed=1, round=2))
    images, labels = client.images[rows].float() / 255, client.labels[rows]
    noise = defence.frozen_noise(client, seed=1)
    noise = model.perturbation.draw(3, generator=generator(1, "noise", 2, 3)) if noise is None else noise[rows]
    player.fill_gradients(images, labels, rows=rows, epoch=0)
    wanted, clipped = None, 0
    names = [n for n, p in player.model.named_parameters() if p.requires_grad]
    held = {n for n, p in player.model.named_parameters() if not p.requires_grad}
    assert held == ({*model.parts["encoder"], *model.parts["perturbation"]} if name == "still" else set())
    for image, label, draw in zip(images, labels, noise, strict=True):
        gradients = torch.autograd.grad(loss_of(name, model, image, label, draw), [model.get_parameter(n) for n in names], allow_unused=True)
        gradients = [torch.zeros_like(model.get_parameter(n)) if g is None else g for n, g in zip(names, gradients, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        clipped += norm > 0.3
        mine = [g * min(1.0, 0.3 / norm) for g in gradients]
        wanted = mine if wanted is None else [a + b for a, b in zip(wanted, mine, strict=True)]
    assert clipped
    for n, tensor in zip(names, wanted, strict=True):
        torch.testing.assert_close(player.model.get_parameter(n).grad, tensor / 3, atol=1e-6, rtol=1e-3)


def test_no_clip_and_no_noise_of_its_own_is_the_noisy_defence_on_the_same_samples(client):
    """All images in every sample, so that both train on the same batches; Laplace noise, frozen per image, so that both draw the same."""
    chosen = IsotropicNoise(std=0.5, law="laplace", frozen=True)
    huge = DPSGD(clip=1e6, noise_multiplier=0.0, target_epsilon=None)
    settings, found = LocalSettings(batch_size=6, epochs=2, optimiser="sgd", lr=0.1, grad_clip=0.0), []
    for one in (chosen, (chosen, huge)):
        defence = build.make_defence(one, RECIPE, SHAPE, seed=0)
        defence.noise_multiplier = 0.0
        player = defence.player()
        player.begin(client, seed=0, round=0, progress=0.0, first=True)
        found.append(train_locally(player, defence.initial(), client, settings, seed=0, round=0).delta)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=1e-4)
    assert any(tensor.abs().max() > 1e-3 for tensor in found[0].values())


def test_the_private_noise_is_sigma_c_and_an_empty_sample_is_noise_alone(client):
    private = DPSGD(clip=0.3, noise_multiplier=2.0, target_epsilon=None)
    flat = []
    for rows in (torch.arange(6), torch.arange(0)):
        for one in (private, SILENT):
            player = made("isotropic", one).player()
            player.begin(client, seed=0, round=0, progress=0.0, first=True)
            assert next(player.draw_batches(client, batch_size=6, epochs=1, seed=0, round=0))
            player.fill_gradients(client.images[rows].float() / 255, client.labels[rows], rows=rows, epoch=0)
            flat.append(torch.cat([p.grad.flatten() for p in player.model.parameters()]))
    assert float((flat[0] - flat[1]).std()) == pytest.approx(2.0 * 0.3 / 6, rel=0.02)
    assert float(flat[2].std()) == pytest.approx(2.0 * 0.3 / 6, rel=0.02) and not flat[3].any()


@pytest.mark.parametrize("how", [{}, {"release": "delta", "local_steps": 2, "batch_size": 4}])
def test_a_victim_releases_clipped_gradients_and_who_knows_its_noise_simulates_them(how, tmp_path):
    chosen = {"both": (IsotropicNoise(std=0.8), SILENT)}
    run = start(dataclasses.replace(RECIPE, defences=chosen, attacks={"joint": JointMatching()}, clients=LocalTraining(batch_size=8)), tmp_path)
    one = train(run, "both", chosen["both"], 0)
    assert one.summary["epsilon"] == math.inf and isinstance(one.training.defence, PrivateNoise)
    here, there = evaluated(run, **how), one.snapshots["final"]
    released = observe.release(here, one, there, seed=0)
    simulate = observe.observed_simulator(here, one, there, terms="client", adaptive=observe.adapts(JointMatching()))()
    naive = observe.observed_simulator(here, one, there, terms="client")()
    model = one.training.defence.model
    for images, labels, noise, update in zip(released.images, released.labels, released.noise, released.updates, strict=True):
        targets = F.one_hot(labels, 8).float()
        found, plain = simulate(there.params, {}, images, targets, noise), naive(there.params, {}, images, targets, noise)
        for name, tensor in update.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)
        assert not all(torch.allclose(plain[name], tensor, rtol=0.05) for name, tensor in update.items())
        if not how:  # by hand
            total = {name: torch.zeros_like(p) for name, p in there.params.items()}
            for image, label, draw in zip(images, labels, noise, strict=True):
                params = {name: p.detach().clone().requires_grad_() for name, p in there.params.items()}
                loss = F.cross_entropy(functional_call(model, params, (image[None], draw[None])), label[None])
                gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
                norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
                total = {name: g + gradients[name] * min(1.0, 0.3 / norm) / len(images) for name, g in total.items()}
            for name, tensor in total.items():
                torch.testing.assert_close(update[name], tensor, atol=1e-6, rtol=1e-3)


def test_epsilon_is_that_of_dp_sgd_alone(tmp_path):
    run = start(RECIPE, tmp_path)
    private = DPSGD(noise_multiplier=1.0, target_epsilon=None, delta=1e-3, accountant="rdp")
    alone, beside = (build.privacy_budget(run.setting, chosen, seed=0) for chosen in (private, (private, IsotropicNoise())))
    assert alone == beside and 0 < alone.epsilon < math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine:
    def build(self, make_model):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ((LearnedPerturbation(), DPSGD()), "decoder learns from the images by steps that are neither clipped nor noised"), ((BiDO(), DPSGD()), "couples the images"),
        ((DPSGD(), LearnedPerturbation(dependence="dcor")), "couples the images"), ((Mine(), DPSGD()), "is not known here"), ((IsotropicNoise(), DPSGD(form="ghost")), "set form=per_sample"),
        ((IsotropicNoise(), CVB(), DPSGD()), "at most one may change the training, beside a DPSGD"), ((Undefended(), DPSGD()), "at most one may change the training"),
        ((IsotropicNoise(), CVB()), "at most one may change the training"),
    ],
)  # fmt: skip
def test_what_epsilon_would_not_count_is_refused_with_the_reason(chosen, said):
    found = config.problems(Recipe(defences={"x": chosen}))
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize("name", NOISE)
def test_noise_without_a_decoder_may_stand_beside_it(name):
    assert config.problems(Recipe(defences={"x": (NOISE[name], DPSGD()), "y": (DPSGD(), NOISE[name], config.Pruning())})) == []
    coupled = LearnedPerturbation(dependence="dcor", dependence_weight=0.0)  # without a weight nothing couples
    assert config.problems(Recipe(defences={"x": (coupled, DPSGD()), "z": (LearnedPerturbation(), DPSGD(level="client"))})) == []


def test_a_decoder_and_batch_norm_are_refused_by_the_defence_itself():
    inner = build.make_defence(LearnedPerturbation(), RECIPE, SHAPE, seed=0)
    with pytest.raises(InputError, match="without a decoder"):
        PrivateNoise(inner, clip=1.0, noise_multiplier=1.0)
    keeps = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, name="resnet18", cut="layer1", norm="keep"))
    with pytest.raises(InputError, match="BatchNorm mixes"):
        build.make_defence((IsotropicNoise(), SILENT), keeps, SHAPE, seed=0)
