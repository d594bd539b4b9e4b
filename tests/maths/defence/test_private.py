"""DP-SGD and DP-FedAvg against plain loops, closed forms and statistics. All images are synthetic."""

import dataclasses
import functools
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, stats

pytest.importorskip("opacus")
from opacus.accountants import create_accountant
from opacus.grad_sample import GradSampleModule

from gidef import build, observe
from gidef.clients.local import LocalSettings, train_locally
from gidef.config import (
    DPSGD,
    Data,
    Evaluation,
    ImprintServer,
    JointMatching,
    LearnedInversion,
    LocalTraining,
    Model,
    MultiRound,
    NaiveMatching,
    Pruning,
    Recipe,
    Rounds,
    SecureAggregation,
    Speed,
    Undefended,
)
from gidef.data import Dataset, synthetic_blood_cells
from gidef.defence import ClipAndNoise, Defence, PrivateDefence
from gidef.defence.accounting import Schedule, budget, epsilon, noise_for
from gidef.defence.private import PrivatePlayer, poisson_batches
from gidef.errors import InputError
from gidef.job import run_recipe
from gidef.models import SmallNet, SplitModel, make_backbone
from gidef.parallel import World
from gidef.report import Console, results, tables
from gidef.rng import generator
from gidef.runs import Run
from gidef.training import train
from gidef.types import Client

SIDE, CLASSES = 8, 4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(backbone=None, side=SIDE):
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        backbone = backbone or SmallNet(CLASSES, 3)
    return SplitModel(backbone, image_shape=(3, side, side), num_classes=CLASSES, input_mean=(0.5,) * 3, input_std=(0.25,) * 3)


def make_client(examples=20, number=1):
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(256, (examples, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    return Client(number, images, torch.randint(CLASSES, (examples,), generator=draw))


def begun(model, client, *, clip, noise=0.0, batch_size=8, seed=0, round=0):
    """A player in its round."""
    player = PrivatePlayer(model, clip=clip, noise_multiplier=noise)
    player.begin(client, seed=seed, round=round, progress=0.0, first=True)
    player.draw_batches(client, batch_size=batch_size, epochs=1, seed=seed, round=round)
    return player


def grads(player, images, labels):
    loss = player.fill_gradients(images, labels, rows=torch.arange(len(images)), epoch=0)
    return loss, {name: p.grad.clone() for name, p in player.model.named_parameters()}


def clipped_sum_of(model, images, labels, clip):
    """Σ_i g_i min(1, C / ‖g_i‖), one image after another; and the norms."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total, norms = [np.zeros(p.shape) for p in parameters], []
    for image, label in zip(images, labels, strict=True):
        own = [g.double().numpy() for g in torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), parameters)]
        norms.append(math.sqrt(sum((g**2).sum() for g in own)))
        total = [t + g * min(1.0, clip / norms[-1]) for t, g in zip(total, own, strict=True)]
    return dict(zip(names, total, strict=True)), norms


def some_images(count, seed=5, side=SIDE):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=draw), torch.randint(CLASSES, (count,), generator=draw)


# --- one step ------------------------------------------------------------------------------------------------------------


def test_each_image_is_clipped_by_itself_as_a_plain_loop_does():
    model, (images, labels) = make_model(), some_images(6)
    norms = clipped_sum_of(model, images, labels, 1.0)[1]
    clip = float(np.median(norms))  # some are clipped, some are not
    wanted, norms = clipped_sum_of(model, images, labels, clip)
    assert min(norms) < clip < max(norms)
    loss, found = grads(begun(model, make_client(), clip=clip, batch_size=8), images, labels)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name] / 8, atol=2e-6)  # by the expected size, not by the 6 of this batch
    assert float(loss) == pytest.approx(F.cross_entropy(model(images), labels).item(), abs=1e-5)


def test_the_images_own_gradients_are_those_of_opacus_hooks():
    model, (images, labels) = make_model(), some_images(5)
    found = grads(begun(model, make_client(), clip=1e9, batch_size=1), images, labels)[1]
    hooked = make_model()
    GradSampleModule(hooked, strict=False)
    F.cross_entropy(hooked(images.requires_grad_()), labels).backward()
    for name, p in hooked.named_parameters():
        torch.testing.assert_close(found[name], p.grad_sample.sum(0), atol=1e-5, rtol=1e-4)


def test_a_residual_net_with_additions_in_place_is_clipped_image_by_image():
    backbone = make_backbone(
        "resnet10t", num_classes=CLASSES, image_shape=(3, 32, 32), small_stem=True, norm="group", pretrained=None, activation=None, seed=0
    )
    model, (images, labels) = make_model(backbone, 32), some_images(2, side=32)
    wanted, _ = clipped_sum_of(model, images, labels, 0.5)
    for name, tensor in grads(begun(model, make_client(), clip=0.5, batch_size=1), images, labels)[1].items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], atol=2e-5)


def test_a_batch_in_parts_has_the_gradient_of_the_whole_with_noise_once():
    model, (images, labels) = make_model(), some_images(7)
    whole = grads(begun(model, make_client(), clip=0.3, noise=1.0), images, labels)[1]
    player = begun(model, make_client(), clip=0.3, noise=1.0)
    player._part = 3
    grads(player, images, labels)
    player._mechanism.generator = generator(0, "step-noise", 0, 1)
    parts = grads(player, images, labels)[1]  # the second batch starts from nothing
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)


def test_the_noise_is_gaussian_of_the_noise_multiplier_times_the_clip_over_the_expected_size():
    client = make_client(20)
    player = begun(make_model(), client, clip=0.7, noise=3.0, batch_size=5)
    nothing = torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, dtype=torch.int64)
    first, second = (torch.cat([g.flatten() for g in grads(player, *nothing)[1].values()]).double().numpy() for _ in range(2))
    std, count = 3.0 * 0.7 / 5, len(first)
    assert count > 90_000
    assert abs(first.std() / std - 1) < 5 / math.sqrt(2 * count) and abs(first.mean()) < 5 * std / math.sqrt(count)
    assert stats.kstest(first / std, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(count)  # fresh in every step


def test_noise_repeats_with_seed_round_and_client_and_with_nothing_else():
    nothing = torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, dtype=torch.int64)

    def noise(number=1, **stream):
        return grads(begun(make_model(), make_client(number=number), clip=1.0, noise=1.0, **stream), *nothing)[1]["backbone.head.bias"]

    assert noise().equal(noise())
    others = [noise(seed=1), noise(round=1), noise(number=2)]
    assert not any(noise().equal(other) for other in others) and not others[0].equal(others[1])


# --- samples -------------------------------------------------------------------------------------------------------------


def test_every_image_is_in_a_batch_with_the_same_probability_by_itself():
    client = make_client(10)
    drawn = [rows for round in range(2000) for _, rows in poisson_batches(client, batch_size=3, epochs=1, seed=0, round=round)]
    assert len(drawn) == 2000 * 4
    taken = torch.stack([torch.zeros(10).index_fill(0, rows, 1.0) for rows in drawn])
    rate, count = 3 / 10, len(drawn)
    spread = math.sqrt(rate * (1 - rate) / count)
    assert (taken.mean(0) - rate).abs().max() < 5 * spread
    sizes = taken.sum(1)  # binomial: images do not push one another out
    assert abs(float(sizes.var()) / (10 * rate * (1 - rate)) - 1) < 0.1
    assert (torch.corrcoef(taken.T) - torch.eye(10)).abs().max() < 5 / math.sqrt(count)
    assert (sizes == 0).any() and abs(float((sizes == 0).double().mean()) - 0.7**10) < 0.01


def test_batches_are_a_function_of_seed_round_and_client_and_a_small_client_is_whole():
    def rows(client=None, **stream):
        return [r.tolist() for _, r in poisson_batches(client or make_client(), **({"batch_size": 4, "epochs": 2, "seed": 0, "round": 0} | stream))]

    assert rows() == rows() and len(rows()) == 10
    assert rows() != rows(seed=1) and rows() != rows(round=1) and rows() != rows(make_client(number=2))
    assert rows(make_client(3)) == [[0, 1, 2]] * 2


def settings(**fields):
    return LocalSettings(**({"optimiser": "sgd", "lr": 0.1, "batch_size": 4, "grad_clip": 0.0} | fields))


def test_no_noise_and_no_clip_is_plain_training_on_the_same_samples():
    client, model = make_client(22), make_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    used = settings(epochs=2, momentum=0.9, weight_decay=0.01, grad_clip=1.0, proximal=0.1)
    found = train_locally(begin(PrivatePlayer(make_model(), clip=1e9, noise_multiplier=0.0), client), start, client, used, seed=0, round=0)

    class Summed:
        """Cross-entropy summed over a Poisson batch, over the expected size."""

        kept, model, draw_batches = None, make_model(), staticmethod(poisson_batches)

        def loss(self, images, labels, *, rows, epoch):
            return F.cross_entropy(self.model(images), labels, reduction="sum") / 4

    plain = train_locally(Summed(), start, client, used, seed=0, round=0)
    assert found.steps == plain.steps == 12
    for name, tensor in found.delta.items():
        torch.testing.assert_close(tensor, plain.delta[name], atol=1e-6, rtol=0)


def begin(player, client):
    player.begin(client, seed=0, round=0, progress=0.0, first=True)
    return player


def test_a_client_whose_samples_are_all_its_images_trains_as_undefended():
    client, model = make_client(6), make_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = settings(batch_size=64, epochs=3)
    private = train_locally(begin(PrivatePlayer(make_model(), clip=1e9, noise_multiplier=0.0), client), start, client, one, seed=0, round=0)
    plain = train_locally(Defence(model).player(), start, client, one, seed=0, round=0)
    for name, tensor in private.delta.items():
        torch.testing.assert_close(tensor, plain.delta[name], atol=1e-6, rtol=0)
    assert private.loss == pytest.approx(plain.loss, abs=1e-5) and private.steps == plain.steps == 3


def test_empty_samples_are_steps_of_noise_alone():
    client = make_client(3)
    sizes = [len(rows) for _, rows in poisson_batches(client, batch_size=1, epochs=4, seed=0, round=0)]
    assert sizes.count(0) >= 1 and len(sizes) == 12
    start = {name: p.detach().clone() for name, p in make_model().named_parameters()}

    def trained(noise):
        player = begin(PrivatePlayer(make_model(), clip=1.0, noise_multiplier=noise), client)
        return train_locally(player, start, client, settings(batch_size=1, epochs=4), seed=0, round=0)

    assert trained(1.0).steps == 12 and all(t.isfinite().all() for t in trained(1.0).delta.values())
    player = begun(make_model(), client, clip=1.0, noise=0.0)
    loss, found = grads(player, torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, dtype=torch.int64))
    assert float(loss) == 0.0 and all(not g.any() for g in found.values())


# --- the accountant ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["prv", "rdp"])
def test_epsilon_is_what_opacus_says_after_the_same_steps_one_by_one(mechanism):
    theirs = create_accountant(mechanism)
    for _ in range(300):
        theirs.step(noise_multiplier=1.3, sample_rate=0.05)
    wanted = theirs.get_epsilon(delta=1e-5)
    assert epsilon(Schedule(0.05, 300), noise_multiplier=1.3, delta=1e-5, accountant=mechanism) == wanted


def exact_gaussian_epsilon(noise, steps, delta):
    """Of the Gaussian mechanism without sampling, composed: Balle and Wang 2018, arXiv:1805.06530, Theorem 8."""
    mu = math.sqrt(steps) / noise

    def excess(eps):
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu) - delta

    return optimize.brentq(excess, 0.0, 100.0, xtol=1e-9)


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 40), (1.0, 1), (20.0, 10)])
def test_epsilon_without_sampling_is_the_closed_form(noise, steps):
    exact = exact_gaussian_epsilon(noise, steps, 1e-5)
    assert exact <= epsilon(Schedule(1.0, steps), noise_multiplier=noise, delta=1e-5) <= exact + 0.03
    assert exact <= epsilon(Schedule(1.0, steps), noise_multiplier=noise, delta=1e-5, accountant="rdp") <= 1.15 * exact + 0.03


@pytest.mark.parametrize(("target", "accountant"), [(1.0, "prv"), (3.0, "rdp"), (0.1, "prv")])
def test_the_noise_for_a_target_keeps_every_client_within_it_and_wastes_little(target, accountant):
    schedules = [Schedule(0.05, 200), Schedule(0.2, 50), Schedule(0.01, 1000), Schedule(0.5, 0)]
    spends = budget(schedules, noise_multiplier=None, target_epsilon=target, delta=1e-5, unit="image", accountant=accountant)
    each = [epsilon(one, noise_multiplier=spends.noise_multiplier, delta=1e-5, accountant=accountant) for one in schedules]
    assert max(each) == spends.epsilon and 0.98 * target <= spends.epsilon <= target and each[3] == 0.0


def test_noise_that_all_but_vanishes_has_a_bound_at_once():
    assert epsilon(Schedule(0.05, 1000), noise_multiplier=0.02, delta=1e-5) > 1000
    assert 49.5 <= budget([Schedule(1.0, 5)], noise_multiplier=None, target_epsilon=50.0, delta=1e-5, unit="image").epsilon <= 50.0
    assert 59.0 <= budget([Schedule(1.0, 5)], noise_multiplier=None, target_epsilon=63.0, delta=1e-5, unit="image").epsilon <= 63.0


def test_more_noise_fewer_steps_and_rarer_samples_spend_less():
    def spent(rate=0.1, steps=100, noise=1.0):
        return epsilon(Schedule(rate, steps), noise_multiplier=noise, delta=1e-5, accountant="rdp")

    assert spent(noise=2.0) < spent() and spent(steps=50) < spent() and spent(rate=0.05) < spent()
    assert spent(noise=0.0) == math.inf and spent(steps=0) == 0.0


def test_targets_that_cannot_be_and_settings_that_contradict_are_refused():
    with pytest.raises(InputError, match="target_epsilon=1e-06 at delta=1e-12 cannot be reached"):
        noise_for([Schedule(1.0, 10**6)], target=1e-6, delta=1e-12, accountant="rdp")
    for noise, target in ((1.0, 8.0), (None, None)):
        with pytest.raises(ValueError, match="exactly one"):
            budget([Schedule(1.0, 1)], noise_multiplier=noise, target_epsilon=target, delta=1e-5, unit="image")


def test_without_opacus_there_is_one_message_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(InputError, match=r"DPSGD needs Opacus.*pip install -e '\.\[dp\]'"):
        PrivatePlayer(make_model(), clip=1.0, noise_multiplier=1.0)


def test_batch_norm_is_refused():
    model = make_model(make_backbone("resnet10t", num_classes=CLASSES, image_shape=(3, 32, 32), small_stem=True, norm="keep", pretrained=None, activation=None, seed=0), 32)
    with pytest.raises(InputError, match="BatchNorm mixes.*model.norm=frozen or group"):
        PrivateDefence(model, clip=1.0, noise_multiplier=1.0)


# --- what is released, and what attackers simulate of it -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_the_simulated_gradient_is_the_clipped_mean_of_a_plain_loop(size):
    model, (images, labels) = make_model(), some_images(size)
    clip = 0.9 * max(clipped_sum_of(model, images, labels, 1.0)[1])
    defence = PrivateDefence(model, clip=clip, noise_multiplier=1.0)
    params = {name: p.detach() for name, p in model.named_parameters()}
    targets = F.one_hot(labels, CLASSES).float()
    simulate = defence.stepped(defence.simulator())()
    wanted, _ = clipped_sum_of(model, images, labels, clip)
    for name, tensor in simulate(params, {}, images, targets, None).items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name] / size, atol=2e-6)
    images.requires_grad_()
    slope = torch.autograd.grad(sum(g.square().sum() for g in simulate(params, {}, images, targets, None).values()), images)[0]
    assert slope.isfinite().all() and slope.any()


def test_a_huge_clip_and_no_noise_release_the_undefended_gradient():
    model, (images, labels) = make_model(), some_images(3)
    params, targets = {name: p.detach() for name, p in model.named_parameters()}, F.one_hot(labels, CLASSES).float()
    defence = PrivateDefence(model, clip=1e9, noise_multiplier=0.0)
    found = defence.stepped(defence.simulator(), generator=torch.Generator())()(params, {}, images, targets, None)
    for name, tensor in Defence(model).simulator()()(params, {}, images, targets, None).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_the_released_noise_has_the_scale_of_training_at_the_victims_batch_size():
    model, (images, labels) = make_model(), some_images(3)
    params, targets = {name: p.detach() for name, p in model.named_parameters()}, F.one_hot(labels, CLASSES).float()
    defence = PrivateDefence(model, clip=0.4, noise_multiplier=2.0)
    clean, noisy = (defence.stepped(defence.simulator(), generator=draw)()(params, {}, images, targets, None) for draw in (None, torch.Generator()))
    noise = torch.cat([(noisy[name] - clean[name]).flatten() for name in clean]).double().numpy() / (2.0 * 0.4 / 3)
    assert abs(noise.std() - 1) < 0.012 and stats.kstest(noise, "norm").pvalue > 1e-4


# --- clients -------------------------------------------------------------------------------------------------------------


def test_an_update_is_clipped_over_all_its_tensors_and_noised_by_its_share():
    update = {"a": torch.full((400, 100), 0.03), "b": torch.ones(9)}
    length = math.sqrt(40_000 * 0.03**2 + 9)
    rule = ClipAndNoise(clip=0.5, noise_multiplier=2.0, cohort_size=4)
    clipped = rule.imitate(update, {})
    assert torch.cat([t.flatten() for t in clipped.values()]).norm().item() == pytest.approx(0.5, rel=2e-5)
    torch.testing.assert_close(clipped["b"], torch.full((9,), 0.5 / length), atol=1e-6, rtol=0)
    noise = (rule.apply(update, generator=torch.Generator().manual_seed(1))["a"] - clipped["a"]).double().flatten().numpy()
    assert abs(noise.std() / (2.0 * 0.5 / 2) - 1) < 5 / math.sqrt(80_000) and stats.kstest(noise / 0.5, "norm").pvalue > 1e-4
    assert rule.reveals(update) == {}


def test_a_small_update_without_noise_leaves_as_it_is():
    update = {"a": torch.tensor([3e-3, -4e-3])}
    assert ClipAndNoise(clip=1.0, noise_multiplier=0.0, cohort_size=4).apply(update, generator=torch.Generator())["a"].equal(update["a"])


# --- in a recipe ---------------------------------------------------------------------------------------------------------


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=24, test=16, size=16)


DEFENCES = {
    "undefended": Undefended(), "image": DPSGD(clip=0.5, target_epsilon=3.0, delta=1e-3),
    "clipped": DPSGD(clip=0.5, noise_multiplier=0.0, target_epsilon=None, accountant="rdp"),
    "client": DPSGD(level="client", noise_multiplier=1.5, target_epsilon=None, accountant="rdp"),
    "client, clipped": DPSGD(level="client", clip=0.05, noise_multiplier=0.0, target_epsilon=None, accountant="rdp"),
}  # fmt: skip
RECIPE = Recipe(
    data=Data(name=f"{__file__}:few_cells", num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=4, cohort_size=2, patience=None),
    clients=LocalTraining(batch_size=6, optimiser="sgd", lr=0.1, grad_clip=0.0), speed=Speed(device="cpu", workers=1), defences=DEFENCES,
    evaluation=Evaluation(num_victims=4, num_tuning=4, judge_epochs=1), attacks={"naive": NaiveMatching(iterations=2), "joint": JointMatching(iterations=2)},
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    setting = build.load_setting(RECIPE, world=World(), notice=lambda text: None)
    return Run(setting, World(), tmp_path_factory.mktemp("run"), Console(rank=1), None, "mark")


@pytest.fixture(scope="module")
def trained(run):
    """trained(name): each defence is trained once."""
    return functools.cache(lambda name: train(run, name, DEFENCES[name], 0))


def test_the_planned_schedule_is_the_one_that_the_clients_step_through(run, trained, monkeypatch):
    """Opacus' accountants, one per client, are stepped with what the players do, and say the ε that was planned."""
    counts = {}
    steps, begins = PrivatePlayer.fill_gradients, PrivatePlayer.begin

    def begin(self, client, **rest):
        self.client = client
        begins(self, client, **rest)

    def fill_gradients(self, *batch, **rest):
        theirs = counts.setdefault(self.client.id, create_accountant("prv"))
        theirs.step(noise_multiplier=self._mechanism.noise_multiplier, sample_rate=min(1.0, 6 / self.client.num_examples))
        return steps(self, *batch, **rest)

    monkeypatch.setattr(PrivatePlayer, "begin", begin)
    monkeypatch.setattr(PrivatePlayer, "fill_gradients", fill_gradients)
    found = trained("image")
    assert len({theirs.history[0][2] for theirs in counts.values()}) > 1  # clients took part more or less often
    spent = found.training.defence.budget
    assert max(theirs.get_epsilon(delta=1e-3) for theirs in counts.values()) == pytest.approx(spent.epsilon, rel=1e-12)
    assert 0.98 * 3.0 <= spent.epsilon <= 3.0 and spent.unit == "image" and found.summary["epsilon"] == spent.epsilon


def test_a_whole_client_spends_one_gaussian_release_for_each_round_that_it_takes_part_in(run, trained):
    """The server draws the cohorts, so that nothing is amplified; the client that takes part most often counts."""
    spent = build.privacy_budget(run.setting, DEFENCES["client"], seed=0)
    taken = [client for number in range(4) for client in trained("client").training.draw(number)]
    theirs = create_accountant("rdp")
    for _ in range(max(taken.count(client) for client in range(3))):
        theirs.step(noise_multiplier=1.5, sample_rate=1.0)
    assert 2 <= theirs.history[0][2] < 4, "some round is without that client"
    assert spent.epsilon == pytest.approx(theirs.get_epsilon(delta=1e-5), rel=1e-12) and spent.unit == "client"
    assert build.privacy_budget(run.setting, (Pruning(), Undefended()), seed=0) is None


def test_a_cohorts_mean_is_that_of_clipped_updates_that_count_alike(run):
    plain, private = (build.make_training(run.setting, DEFENCES[name], seed=0, world=World(), state_folder=run.folder / name) for name in ("undefended", "client, clipped"))
    cohort = [run.setting.clients[k] for k in plain.draw(0)]
    mean = private.run(private.server, cohort)[1]
    updates = [plain.participation.train(plain.server, client).delta for client in cohort]
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in one.values())) for one in updates]
    assert min(norms) > 0.05 and mean.num_examples == 2
    for name, tensor in mean.delta.items():
        wanted = sum(one[name] * 0.05 / norm for one, norm in zip(updates, norms, strict=True)) / 2
        torch.testing.assert_close(tensor, wanted, atol=1e-7, rtol=1e-4)


def test_the_noise_of_a_cohorts_mean_is_that_of_the_accountant(run):
    noisy = dataclasses.replace(DEFENCES["client, clipped"], noise_multiplier=4.0)
    means = []
    for chosen in (DEFENCES["client, clipped"], noisy):
        one = build.make_training(run.setting, chosen, seed=0, world=World(), state_folder=run.folder / "noise")
        means.append(one.run(one.server, [run.setting.clients[k] for k in one.draw(0)])[1].delta)
    noise = torch.cat([(means[1][name] - means[0][name]).flatten() for name in means[0]]).double()
    assert abs(float(noise.std()) / (4.0 * 0.05 / 2) - 1) < 0.012  # σ C / m


def test_naive_attackers_see_clipped_noise_and_overlook_it_and_adaptive_ones_simulate_the_clipping(run, trained):
    one = trained("clipped")
    snapshot, batch = one.snapshots["untrained"], dataclasses.replace(run.recipe.evaluation, batch_size=2)
    here = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, evaluation=batch)))
    released = observe.release(here, one, snapshot, seed=0)
    clipped, plain = (observe.observed_simulator(here, one, snapshot, terms="client", adaptive=knows)() for knows in (True, False))
    for images, labels, update in zip(released.images, released.labels, released.updates, strict=True):
        targets = F.one_hot(labels, run.setting.dataset.num_classes).float()
        simulated, naive = (simulate(snapshot.params, {}, images, targets, None) for simulate in (clipped, plain))
        assert all(torch.allclose(update[name], simulated[name], atol=1e-7) for name in update)
        assert not all(torch.allclose(update[name], naive[name], atol=1e-3) for name in update)


@pytest.mark.parametrize("how", [{}, {"release": "delta", "local_steps": 2, "batch_size": 4}])
def test_releases_are_noisy_and_repeat_with_their_seed(run, trained, how):
    one = trained("image")
    evaluation = dataclasses.replace(run.recipe.evaluation, **how)
    here = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, evaluation=evaluation)))
    first, again, other, repeat = (observe.release(here, one, one.snapshots["untrained"], **stream).updates for stream in ({"seed": 0}, {"seed": 0}, {"seed": 1}, {"seed": 0, "repeat": 1}))
    name = "backbone.head.weight"
    assert all(a[name].equal(b[name]) for a, b in zip(first, again, strict=True))
    assert not first[0][name].equal(other[0][name]) and not first[0][name].equal(repeat[0][name])
    if not how:  # noise σC on one image's gradient of norm C at most
        sigma = one.training.defence.budget.noise_multiplier
        flat = torch.cat([t.flatten() for t in first[0].values()])
        assert float(flat.std()) == pytest.approx(sigma * 0.5, rel=0.03)


def test_one_run_from_recipe_to_table_says_epsilon_and_delta_in_every_row(tmp_path):
    chosen = {name: DEFENCES[name] for name in ("undefended", "image", "clipped")}
    few = {"naive": NaiveMatching(iterations=2), "imprint": ImprintServer(bins=16), "learned": LearnedInversion(steps=2, gradients=24), "rounds": MultiRound(iterations=2, rounds=2)}
    recipe = dataclasses.replace(RECIPE, defences=chosen, attacks=few, rounds=Rounds(count=1), clients=LocalTraining(batch_size=20), out=str(tmp_path / "run"))
    content = run_recipe(recipe, "private")
    saved = results.load(tmp_path / "run" / "results.json")
    assert len(saved["rows"]) == len(content["rows"]) == 3 * 3 + 2  # the noise of several releases averages out; the undefended client has none
    exact = {row["defence"]: row["psnr_db"]["mean"] for row in saved["rows"] if row["attack"] == "imprint"}
    assert exact["undefended"] > 60 and exact["clipped"] > 60 and exact["image"] < 20  # a malicious server meets the noise as well
    for row in saved["rows"]:
        assert {"epsilon", "delta"} <= row.keys()
        if row["defence"] == "image":
            assert 2.9 <= row["epsilon"] <= 3.0 and row["delta"] == 1e-3 and row["privacy_unit"] == "image"
        if row["defence"] == "clipped":
            assert row["epsilon"] is None and row["delta"] == 1e-5
        if row["defence"] == "undefended":
            assert row["epsilon"] is None and row["delta"] is None
    for render in (tables.text, tables.markdown, tables.latex):
        text = " ".join(render(saved).split())
        assert "1e-03" in text and "inf" in text and "presence of one image," in text
    for run in saved["training"]:
        assert {"epsilon", "delta"} <= run.keys()
    saved["rows"] = [row for row in saved["rows"] if row["defence"] == "undefended"]
    assert all("eps, delta" not in " ".join(render(saved).split()) for render in (tables.text, tables.markdown, tables.latex))
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["defences"]["image"]["type"] == "DPSGD"


def test_the_epsilon_of_clients_is_said_to_hold_for_sums_alone_where_the_server_reads_single_updates(tmp_path):
    private = DPSGD(level="client", noise_multiplier=1.0, target_epsilon=None, accountant="rdp")
    chosen = {"read": private, "summed": (private, SecureAggregation())}
    recipe = dataclasses.replace(RECIPE, defences=chosen, attacks={"naive": NaiveMatching(iterations=2)}, rounds=Rounds(count=1), out=str(tmp_path / "run"))
    run_recipe(recipe, "private")
    saved = results.load(tmp_path / "run" / "results.json")
    notes = {row["defence"]: row["note"] for row in saved["rows"] if row["attack"] == "naive"}
    assert "this server reads single updates" in notes["read"] and "single updates" not in notes["summed"]
    assert all(row["epsilon"] > 0 and row["privacy_unit"] == "client" for row in saved["rows"] if row["attack"] == "naive")
    assert "presence of one client, over all rounds of the training; of a client, against who sees sums of cohorts alone." in " ".join(tables.text(saved).split())
