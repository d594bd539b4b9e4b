"""Secure aggregation in a run: the model of the open sum, bit for bit; and what the server sees of it, the mean over a cohort."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad

from gidef import applications, build, cells, findings, fits, methods, metrics, observe, threats
from gidef import attack as attacks
from gidef.attack.imprint import Imprinted
from gidef.attack.matching import Unordered
from gidef.attack.predictor import Predictor
from gidef.attack.simulate import cohort_mean
from gidef.config import (
    DPSGD,
    Analytic,
    BiDO,
    Data,
    DecoderAware,
    DeepLeakage,
    EotMatching,
    GenerativePrior,
    GradientNoise,
    GradInversion,
    ImprintServer,
    JointMatching,
    LatentDecoding,
    LearnedInversion,
    LearnedPerturbation,
    MixUp,
    MultiRound,
    NaiveMatching,
    PostHocDecoder,
    Precode,
    Pruning,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    SecureAggregation,
    Sign,
    SkipLayers,
    Soteria,
    SurrogateModel,
    Undefended,
    ZeroedLevel,
    problems,
)
from gidef.defence.secure_sum import MaskedSum
from gidef.errors import InputError
from gidef.models.prior import autoencoder_for
from gidef.parallel import World, mean_over_world
from gidef.releases import Releases
from gidef.scores import _recovered
from gidef.training import train
from gidef.types import Client, Update
from gidef.updates import FixedPointSum
from tests.hasty import hasty
from tests.small_run import CELLS, RECIPE, Heard, evaluated, start, trained_once

LEARNED = LearnedPerturbation(ramp=0.0, dependence="pearson2")
DEFENCES = {
    "plain": Undefended(), "sum": SecureAggregation(), "gone": SecureAggregation(dropouts=0.3),
    "learned": LEARNED, "learned sum": (LEARNED, SecureAggregation()), "pruned sum": (Pruning(share=0.5), SecureAggregation()),
    "soteria sum": (Soteria(share=0.5), SecureAggregation()),
    "signed sum": (Sign(), SecureAggregation()), "noisy sum": (GradientNoise(), SecureAggregation()), "bido sum": (BiDO(measure="coco", x_weight=1.0, y_weight=50.0), SecureAggregation()),
    "clipped images": (DPSGD(target_epsilon=None, noise_multiplier=0.1, accountant="rdp"), SecureAggregation()), "bottleneck sum": (Precode(width=24, kl_weight=1.0), SecureAggregation()),
}  # fmt: skip
ATTACKS = {"naive": NaiveMatching(), "joint": JointMatching(), "learned": LearnedInversion(), "decoder": PostHocDecoder()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = Data(name=CELLS, num_clients=4, min_examples=8)
    with trained_once(tmp_path_factory.mktemp, dataclasses.replace(RECIPE, data=data, defences=DEFENCES, attacks=ATTACKS)) as one:
        yield one


def released(run, one, **more):
    return observe.release(run, one, one.snapshots["final"], seed=0, **more)


def apart(left, right) -> float:
    return (sum(float((left[name] - right[name]).square().sum()) for name in right) / sum(float(t.square().sum()) for t in right.values())) ** 0.5


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("open_one", "summed", "policy"), [("plain", "sum", "full"), ("learned", "learned sum", "head")])
def test_the_model_is_that_of_the_open_sum_bit_for_bit(open_one, summed, policy, trained):
    (_, plain), (_, secure) = trained(open_one, policy), trained(summed, policy)
    assert secure.sha256 == plain.sha256 and secure.summary["rounds"] == 1
    assert secure.training.defence.secure is not None and plain.training.defence.secure is None


def updates(count):
    draw = torch.Generator().manual_seed(0)
    return [Update({"w": torch.randn(5, generator=draw), "b": torch.randn(2, generator=draw)}, 3 + k, {"loss": 0.5 * k}) for k in range(count)]


@pytest.mark.parametrize("stayed", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 5, 6, 7, 9]])
def test_of_those_who_stay_the_mean_is_exact_and_no_partial_sum_is_readable(stayed):
    """Over worker threads, as in a run; ids are not places in the cohort."""
    sent, template = updates(10), {"w": torch.zeros(5), "b": torch.zeros(2)}
    clients = [Client(100 + 7 * k, torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(3 + k, dtype=torch.int64)) for k in range(10)]
    cohort, seen = [clients[k] for k in stayed], []

    class Watched(MaskedSum):
        def mean(self, own=None):
            seen.append(self.buffer.clone())
            return super().mean(own)

    def sum_of(template, **options):
        return Watched(template, members=[client.id for client in clients], stayed=[client.id for client in cohort], seed=0, round=3, **options)

    over = mean_over_world(World(), workers=2)
    arguments = {"template": template, "metric_names": ("loss",)}
    plain = over(lambda client, worker: sent[clients.index(client)], cohort, **arguments)
    masked = over(lambda client, worker: sent[clients.index(client)], cohort, **arguments, sum_of=sum_of)
    assert all(torch.equal(masked.delta[name], tensor) for name, tensor in plain.delta.items())
    assert (masked.num_examples, masked.metrics, masked.count) == (plain.num_examples, plain.metrics, plain.count) == (plain.num_examples, plain.metrics, len(stayed))
    open_sum = FixedPointSum(template, metric_names=("loss",), max_terms=10)
    for k in stayed:
        open_sum.add(sent[k].delta, sent[k].num_examples, sent[k].metrics)
    hidden = seen[0][: len(open_sum.buffer)]
    assert not (hidden == open_sum.buffer).any() and hidden.abs().double().mean() > 2**59


def test_sums_of_several_ranks_merge_before_the_masks_come_off():
    sent, template, stayed = updates(6), {"w": torch.zeros(5), "b": torch.zeros(2)}, [0, 1, 3, 4, 5]
    options = {"metric_names": ("loss",), "max_terms": 5}
    ranks = [MaskedSum(template, members=range(6), stayed=stayed, seed=1, round=2, **options) for _ in range(3)]
    plain = FixedPointSum(template, **options)
    for k in stayed:
        ranks[k % 3].add(sent[k].delta, sent[k].num_examples, sent[k].metrics, client=k)
        plain.add(sent[k].delta, sent[k].num_examples, sent[k].metrics, client=k)
    merged = sum(rank.buffer for rank in ranks)  # as an all-reduce leaves it on each
    for rank in ranks:
        rank.buffer.copy_(merged)
        mean, weight, metrics = rank.mean()
        assert (weight, metrics) == plain.mean()[1:] and all(torch.equal(mean[name], tensor) for name, tensor in plain.mean()[0].items())
        assert rank.buffer.equal(plain.buffer)


def test_below_the_threshold_there_is_no_mean():
    total = MaskedSum({"w": torch.zeros(5)}, members=[4, 5, 6], stayed=[5, 6], seed=0, round=0, max_terms=2)
    for client in (5, 6):
        total.add({"w": torch.ones(5)}, 1, {}, client=client)
    with pytest.raises(InputError, match="2 of 3 masked updates arrived, 3 are needed"):
        total.mean()


def test_who_drops_out_trains_nothing_and_changes_with_the_round(trained):
    _, one = trained("gone")
    _, plain = trained("plain")
    draws = [one.training.draw(number) for number in range(12)]
    assert all(len(draw) == 3 and set(draw) < set(plain.training.draw(number)) for number, draw in enumerate(draws))
    assert len(set(map(tuple, draws))) == 4
    assert set(one.snapshots["final"].versions) == set(draws[0]) and one.sha256 != plain.sha256


def test_a_round_with_drop_outs_is_the_open_round_of_those_who_stayed(trained):
    (run, one), (_, plain) = trained("gone"), trained("plain")
    cohort = [run.setting.clients[k] for k in one.training.draw(0)]
    expected, _ = plain.training.run(plain.training.server, cohort)
    found, mean = one.training.run(one.training.server, cohort)
    assert mean.count == 3 and all(torch.equal(found.params[name], tensor) for name, tensor in expected.params.items())


# --- what the server sees ------------------------------------------------------------------------------------------------


def test_what_is_released_is_the_mean_gradient_of_the_whole_cohort(trained):
    run, one = trained("sum")
    _, plain = trained("plain")
    victims, alone = released(run, one), released(run, plain)
    model, params = one.training.defence.model, one.snapshots["final"].params
    for batch, update in enumerate(victims.updates):
        company = victims.company[batch]
        assert len({victims.owners[batch], *company.owners}) == 4 and company.images.shape == (3, 2, 3, 16, 16)
        for owner, images, labels in zip(company.owners, company.images, company.labels, strict=True):
            pool = run.setting.clients[owner]
            for image, label in zip(images, labels, strict=True):
                same = ((pool.images.float() / 255 - image).abs().amax((1, 2, 3)) == 0) & (pool.labels == label)
                assert same.any()
        everything = torch.cat([victims.images[batch], company.images.flatten(0, 1)])
        expected = grad(lambda w, x=everything, y=victims.all_labels(batch): F.cross_entropy(functional_call(model, w, (x,)), y))(params)
        assert apart(update, expected) < 1e-5 and apart(update, alone.updates[batch]) > 0.1
    again, other = released(run, one), released(run, one, repeat=1)
    assert all(torch.equal(again.updates[0][name], tensor) for name, tensor in victims.updates[0].items())
    assert torch.equal(other.company[0].images, victims.company[0].images)


STEPS = {"release": "delta", "local_steps": 2}


@pytest.mark.parametrize(
    ("name", "policy", "changes"),
    [
        ("sum", "full", {}), ("learned sum", "full", {}), ("learned sum", "head", {}), ("learned sum", "full", STEPS), ("pruned sum", "full", {}),
        ("pruned sum", "full", STEPS), ("soteria sum", "full", {}), ("soteria sum", "full", STEPS),
    ],
)  # fmt: skip
def test_an_attacker_who_has_everybodys_images_and_noise_matches_the_sum(name, policy, changes, trained):
    """Of what it matches: the columns that Soteria prunes of each are unknown, and their layer is left out."""
    run, one = trained(name, policy)
    run = evaluated(run, **changes)
    victims = released(run, one)
    case = methods.make_case(run, one, one.snapshots["final"], JointMatching(), [victims], seed=0)
    observation, company = case.observations[0], victims.company[0]
    assert observation.num_examples == 8 and torch.equal(observation.labels, victims.all_labels(0))
    noise = None
    if victims.noise[0] is not None:
        axis = 1 if changes else 0
        noise = torch.cat([victims.noise[0], *company.noise], dim=axis)
        assert noise.shape == case.noise_shape
    images = torch.cat([victims.images[0], company.images.flatten(0, 1)])
    labels = F.one_hot(observation.labels, 8).float()
    update = case.simulator()(observation.params, observation.known, images, labels, noise)
    assert apart(update, observation.update) < 1e-4
    hidden = {"backbone.head.weight"} if name == "soteria sum" else set()
    assert observation.unmatched.keys() == hidden and observation.update.keys() | hidden == one.snapshots["final"].params.keys()
    if noise is not None:
        assert apart(case.simulator()(observation.params, observation.known, images, labels, noise.flip(0)), observation.update) > 1e-3
    wrong = torch.cat([victims.images[0], company.images.flatten(0, 1).flip(-1)])
    assert apart(case.simulator()(observation.params, observation.known, wrong, labels, noise), observation.update) > 1e-3


@pytest.mark.parametrize("changes", [{}, STEPS], ids=["gradient", "delta"])
def test_several_rounds_and_a_level_of_nought_have_a_zero_at_everybodys_images_and_noise(changes, trained, tmp_path):
    run, one = trained("learned sum")
    run = evaluated(run, **changes)
    for attack in (MultiRound(rounds=2), ZeroedLevel()):
        cell = cells.Cell("learned sum", 0, "final", "one", attack, one, one.snapshots["final"], tmp_path)
        victims = Releases(run).of(cell)
        plan = methods.plan(methods.make_case(run, one, cell.snapshot, attack, victims, seed=0))
        noise = [torch.cat([each.noise[0], *each.company[0].noise], dim=1 if changes else 0) for each in victims]
        noise = torch.stack(noise) if len(noise) > 1 else noise[0]
        images = torch.cat([victims[0].images[0], victims[0].company[0].images.flatten(0, 1)])
        seen, labels = plan.observations[0], F.one_hot(victims[0].all_labels(0), 8).float()
        assert noise.shape == plan.matching.noise_shape and torch.equal(seen.labels, victims[0].all_labels(0))
        update = plan.make_simulate()(seen.params, seen.known, images, labels, noise)
        assert apart(update, seen.update) < 1e-4
        assert apart(plan.make_simulate()(seen.params, seen.known, images, labels, noise.flip(0)), seen.update) > 1e-3


def mean_of_all(run, one, victims, seen, batch, pruned):
    """What the cohort's clients send on average, each with the block before its net, one client after another."""
    company, count = victims.company[batch], len(seen.params["imprint.back"][0])
    model = Imprinted(one.training.defence.model, image_shape=(3, 16, 16), bins=count)
    names = {key if key.startswith("imprint.") else f"backbone.{key}": key for key in seen.params}
    sent = []
    for images, labels in [(victims.images[batch], victims.labels[batch]), *zip(company.images, company.labels, strict=True)]:
        weights = {inside: seen.params[key].clone().requires_grad_() for inside, key in names.items()}
        F.cross_entropy(functional_call(model, weights, (images,)), labels).backward()
        sent.append({key: weights[inside].grad for inside, key in names.items()})
        if pruned:
            for key, tensor in sent[-1].items():
                least = tensor.abs().flatten().sort().values[int(pruned * tensor.numel())]
                sent[-1][key] = torch.where(tensor.abs() >= least, tensor, 0.0)
    return {key: sum(each[key] for each in sent) / len(sent) for key in seen.params}


@pytest.mark.parametrize(("name", "pruned"), [("sum", 0.0), ("pruned sum", 0.5)])
def test_an_imprint_block_s_bins_are_read_off_the_mean_of_what_every_client_sends(name, pruned, trained, tmp_path, monkeypatch):
    run, one = trained(name)
    cell = cells.Cell(name, 0, "final", "imprint", ImprintServer(bins=256), one, one.snapshots["final"], tmp_path)
    cell.releases, seen, invert = [released(run, one)], [], applications.invert_imprint
    monkeypatch.setattr(applications, "invert_imprint", lambda observation, **how: seen.append(observation) or invert(observation, **how))
    found = applications._imprinted(run, cell)(range(2), lambda units: None)
    for batch, (observation, got) in enumerate(zip(seen, found, strict=True)):
        assert observation.num_examples == 8 and got.images.shape == (8, 3, 16, 16) and got.status == "ok"
        expected, whole = (mean_of_all(run, one, cell.victims, observation, batch, share) for share in (pruned, 0.0))
        keys = [key for key in expected if not (pruned and key.startswith("imprint."))]  # of the block's equal entries, others may be pruned
        assert apart(observation.update, {key: expected[key] for key in keys}) < 1e-4
        assert not pruned or apart(observation.update, {key: whole[key] for key in keys}) > 1e-2
    truth = cell.victims.images[:2].flatten(0, 1)
    paired = torch.cat([got.images[metrics.pair(got.images, images)] for got, images in zip(found, cell.victims.images, strict=False)])
    if not pruned:
        assert int((metrics.psnr_db(paired, truth) > 50).sum()) >= 3
        everybody = torch.cat([cell.victims.images[0], cell.victims.company[0].images.flatten(0, 1)])
        assert int((metrics.psnr_db(found[0].images[metrics.pair(found[0].images, everybody)], everybody) > 50).sum()) >= 6
        assert _recovered(found[0].labels, cell.victims, 0) > 0.5


def test_an_imprint_block_s_bins_are_read_off_the_mean_of_deltas(trained, tmp_path):
    run, one = trained("sum")
    run = evaluated(run, **STEPS, local_lr=0.01)
    cell = cells.Cell("sum", 0, "final", "imprint", ImprintServer(bins=256), one, one.snapshots["final"], tmp_path)
    cell.releases = [released(run, one)]
    found = applications._imprinted(run, cell)(range(2), lambda units: None)
    paired = torch.cat([got.images[metrics.pair(got.images, images)] for got, images in zip(found, cell.victims.images, strict=False)])
    assert int((metrics.psnr_db(paired, cell.victims.images[:2].flatten(0, 1)) > 30).sum()) >= 3
    everybody = torch.cat([cell.victims.images[0], cell.victims.company[0].images.flatten(0, 1)])
    assert int((metrics.psnr_db(found[0].images[metrics.pair(found[0].images, everybody)], everybody) > 30).sum()) >= 6


def test_a_failure_on_a_sum_is_of_everybodys_images(trained, tmp_path, monkeypatch):
    run, one = trained("sum")
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, attacks={"imprint": ImprintServer(bins=64)})))
    [cell] = cells.make_cells(run, {("sum", 0): one}, tmp_path)
    cell.releases, invert, calls = [released(run, one)], applications.invert_imprint, []

    def fails_on_the_first(observation, **how):
        calls.append(observation)
        if len(calls) in (1, 2):  # together with the others, then by itself
            raise RuntimeError("it broke")
        return invert(observation, **how)

    monkeypatch.setattr(applications, "invert_imprint", fails_on_the_first)
    [task] = applications.tasks(run, [cell])
    task.do(0, lambda units: None)
    applications.collect(run, cell)
    assert [found.status for found in cell.reconstructions] == ["failed", "ok"] and all(found.images.shape == (8, 3, 16, 16) for found in cell.reconstructions)


def whole(victims, batch, *, stepped=False):
    """Everybody's images and noise, one client after another."""
    company = victims.company[batch]
    images = torch.cat([victims.images[batch], company.images.flatten(0, 1)])
    return images, None if victims.noise[batch] is None else torch.cat([victims.noise[batch], *company.noise], dim=int(stepped))


@pytest.mark.parametrize("attack", [DeepLeakage(iterations=2), GradInversion(iterations=2, restarts=2, langevin=0.0), GenerativePrior(iterations=4)], ids=lambda one: type(one).__name__)
def test_more_attacks_that_match_have_a_zero_at_everybodys_images(attack, trained):
    run, one = trained("sum")
    victims, fitted = released(run, one), {"generator": autoencoder_for((3, 16, 16), code_dim=attack.code, seed=0).generator} if isinstance(attack, GenerativePrior) else {}
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0, fitted=fitted))
    seen, (images, _) = plan.observations[0], whole(victims, 0)
    labels = F.one_hot(victims.all_labels(0), 8).float()
    assert apart(plan.make_simulate()(seen.params, seen.known, images, labels, None), seen.update) < 1e-4
    assert apart(plan.make_simulate()(seen.params, seen.known, images.flip(-1), labels, None), seen.update) > 1e-3
    # one by one, as a run does where torch has no rule for many (2.11, of the generator's norms behind a mean over clients)
    for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0, mode="loop"):
        assert found.status == "ok" and found.images.shape == (8, 3, 16, 16), found.error


def test_a_surrogate_model_points_along_the_mean_of_everybodys_first_steps(trained):
    run, one = trained("sum")
    run = evaluated(run, release="delta")
    victims = released(run, one)
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], SurrogateModel(iterations=2), [victims], seed=0))
    seen, (images, _) = plan.observations[0], whole(victims, 0)
    labels, known = F.one_hot(victims.all_labels(0), 8).float(), {**plan.observations[0].known, "alpha": torch.tensor(0.0)}
    found = plan.make_simulate()(seen.params, known, images, labels, None)
    cosine = torch.cosine_similarity(*(torch.cat([tensors[name].flatten() for name in seen.update]) for tensors in (found, seen.update)), dim=0)
    assert cosine > 1 - 1e-4
    [result, *_] = attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0)
    assert result.status == "ok" and result.images.shape == (8, 3, 16, 16)


@pytest.mark.parametrize("changes", [{}, {**STEPS, "batch_size": 4}], ids=["gradient", "delta"])
@pytest.mark.parametrize("policy", ["full", "all"])
def test_everybodys_candidates_are_kept_near_what_his_own_decoder_makes_of_them(policy, changes, trained, monkeypatch):
    hasty(monkeypatch)
    run, one = trained("learned sum", policy)
    run = evaluated(run, **changes)
    victims = released(run, one)
    case = methods.make_case(run, one, one.snapshots["final"], DecoderAware(iterations=2, begin="decoded" if policy == "all" and not changes else "drawn"), [victims], seed=0)
    plan, seen = methods.plan(case), case.observations[0]
    images, noise = whole(victims, 0, stepped=bool(changes))
    made = []
    for client in range(4):
        own = victims.private[0] if client == 0 else victims.company[0].private[client - 1]
        drawn = victims.noise[0] if client == 0 else victims.company[0].noise[client - 1]
        model, decoder, held = copy.deepcopy(case.model), copy.deepcopy(case.decoder), {**seen.known, **seen.params, **own}
        for module, prefix in ((model, ""), (decoder, "decoder.")):
            module.load_state_dict({key: held[prefix + key] for key in module.state_dict()})
        with torch.no_grad():
            made.append(decoder(model.run(images.chunk(4)[client], drawn.flatten(0, 1) if changes else drawn).perturbed).clamp(0, 1))
    [(_, prior)] = plan.matching.priors
    point = attacks.Point(images, seen.labels, noise, seen.params, seen.known)
    torch.testing.assert_close(prior(point), (images - torch.cat(made)).square().mean())
    for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0):
        assert found.status == "ok" and found.images.shape == (images.shape), found.error


@pytest.mark.parametrize("name", ["sum", "pruned sum"])
def test_a_network_learns_from_sums_as_the_cohort_would_send_them(name, trained, tmp_path, monkeypatch):
    run, one = trained(name)
    given, fit = [], fits.fit_inverter
    monkeypatch.setattr(fits, "fit_inverter", lambda net, simulate, *more, **how: given.append(simulate) or fit(net, simulate, *more, **how))
    recipe = dataclasses.replace(run.recipe, attacks={"learned": LearnedInversion(steps=2, gradients=24)})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    [cell] = cells.make_cells(run, {(name, 0): one}, tmp_path)
    cell.releases = [released(run, one)]
    cell.folder.mkdir(parents=True, exist_ok=True)
    fits.inverter_task(run, cell).do(0, lambda units: None)
    images, _ = whole(cell.victims, 1)
    labels = F.one_hot(cell.victims.all_labels(1), 8).float()
    assert apart(given[0](one.snapshots["final"].params, {}, images, labels, None), cell.victims.updates[1]) < 1e-4
    assert apart(given[0](one.snapshots["final"].params, {}, images.flip(0), labels, None), cell.victims.updates[1]) > 1e-3
    found = fits.learned(run, cell)(range(2), lambda units: None)
    assert [one.status for one in found] == ["ok"] * 2 and all(one.images.shape == (8, 3, 16, 16) for one in found)


@pytest.mark.parametrize("policy", ["full", "head"])
def test_everybodys_latents_are_read_off_the_sum(policy, trained, tmp_path, monkeypatch):
    hasty(monkeypatch)
    run, one = trained("learned sum", policy)
    recipe = dataclasses.replace(run.recipe, attacks={"latent": LatentDecoding(front="known", steps=2, iterations=3)}, evaluation=dataclasses.replace(run.recipe.evaluation, released_loss="utility"))
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    [cell] = cells.make_cells(run, {("learned sum", 0): one}, tmp_path)
    cell.releases, handed, invert = [released(run, one)], [], fits.invert_latent
    cell.folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(fits, "invert_latent", lambda seen, *more, **how: handed.extend(seen) or invert(seen, *more, **how))
    fits.latent_decoder_task(run, cell).do(0, lambda units: None)
    found = fits.latent(run, cell)(range(2), lambda units: None)
    assert all(one.status == "ok" and one.images.shape == (8, 3, 16, 16) for one in found)
    seen, victims, model = handed[0], cell.victims, copy.deepcopy(one.training.defence.model)
    images, noise = whole(victims, 0)
    latents = []
    for client, own in enumerate([victims.private[0], *victims.company[0].private]):
        held = {**one.snapshots["final"].params, **own}
        model.load_state_dict({key: held[key] for key in model.state_dict()})
        with torch.no_grad():
            latents.append(model.run(images.chunk(4)[client], noise.chunk(4)[client]).perturbed)
    predictor = Predictor(model)
    update = predictor.gradient({key: seen.params[key] for key in predictor.names}, torch.cat(latents), F.one_hot(victims.all_labels(0), 8).float())
    assert seen.num_examples == 8 and apart(update, {key: seen.update[key] for key in update}) < 1e-3


@pytest.mark.parametrize(("name", "attack"), [("sum", ReadLatent(iterations=2)), ("learned sum", ReadNoise(iterations=2))], ids=["latent", "noise"])
def test_the_sum_is_read_as_one_batch_of_everybodys_images_and_matched_there(name, attack, trained, monkeypatch):
    """Given everybody's latents, as they would be read off the gradient of a batch."""
    run, one = trained(name, "full")
    run = evaluated(run, batch_size=1)
    assert [cell.name for cell in cells_of(run, one, {"read": attack})] == ["read"]
    victims = released(run, one)
    case = methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0)
    assert case.members == 4 and case.readable

    def read(case, observation, number):
        weights, (images, noise) = {name: t for name, t in {**observation.known, **observation.params}.items() if name in case.model.state_dict()}, whole(victims, number)
        return functional_call(case.model, weights, (images, noise), {"full": True}).perturbed, 0.0, observation.labels

    monkeypatch.setattr(methods, "latents_of", read)
    plan = methods.plan(case)
    assert plan.read == len(plan.observations) and plan.observations[0].num_examples == 4
    seen, (images, noise), labels = plan.observations[0], whole(victims, 0), victims.all_labels(0)
    nowhere = None if noise is None else torch.zeros_like(noise)  # the noise that is searched does not matter: it is read
    update = plan.make_simulate()(seen.params, seen.known, images, F.one_hot(labels, 8).float(), nowhere)
    assert apart(update, seen.update) < 5e-3
    other = plan.make_simulate()(seen.params, seen.known, images.flip(-1), F.one_hot(labels, 8).float(), nowhere)
    assert apart(other, seen.update) > 0.05


def test_a_sum_of_coupled_losses_is_not_read_as_a_batch(trained):
    run, one = trained("bido sum", "full")
    assert cells_of(run, one, {"latent": ReadLatent()}) == []
    assert not observe.cross_entropy_behind(evaluated(run, batch_size=2), one) and observe.cross_entropy_behind(evaluated(run, batch_size=2, released_loss="utility"), one)


def cells_of(run, one, attacks):
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, attacks=attacks)))
    return [cell for cell in cells.make_cells(run, {("d", 0): one}, run.folder) if cell.checkpoint == "final"]


def test_a_closed_form_is_handed_the_sum_with_everybodys_labels(trained, tmp_path, monkeypatch):
    run, one = trained("sum")
    cell = cells.Cell("sum", 0, "final", "analytic", Analytic(), one, one.snapshots["final"], tmp_path)
    cell.releases, seen = [released(run, one)], []
    monkeypatch.setattr(applications, "analytic", lambda observation, *more, **how: seen.append(observation))
    applications._analytic(run, cell)([0], lambda units: None)
    assert seen[0].num_examples == 8 and torch.equal(seen[0].labels, cell.victims.all_labels(0))
    assert all(torch.equal(seen[0].update[name], tensor) for name, tensor in cell.victims.updates[0].items())


def test_every_attack_on_a_sum_says_how_many_are_in_it(trained, tmp_path):
    run, one = trained("sum")
    recipe = dataclasses.replace(run.recipe, attacks={"learned": LearnedInversion(), "imprint": ImprintServer(), "naive": NaiveMatching()})
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe), console=(heard := Heard()))
    made = cells.make_cells(run, {("sum", 0): one}, tmp_path)
    assert {cell.name for cell in made} == {"imprint", "naive", "learned"} and all("the sum of 4 clients" in cell.note for cell in made)
    assert heard.notices == [] and cells.not_applicable(run, {("sum", 0): one}) == []


@pytest.mark.parametrize("policy", ["head", "full"])
def test_attacks_run_against_sums(policy, trained):
    run, one = trained("learned sum", policy)
    victims = released(run, one)
    for attack in (NaiveMatching(iterations=2), JointMatching(iterations=2, labels="recovered"), EotMatching(iterations=1, samples=2), *([SkipLayers(iterations=2)] if policy == "full" else [])):
        plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0))
        for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0):
            assert found.status == "ok" and found.images.shape == (8, 3, 16, 16), found.error


def test_a_cohort_of_two_mixes_what_the_closed_form_reads_off_one():
    """Known answer of a linear layer: x = ∂W_i / ∂b_i gives one client's image away, and of two clients' sum their mixture."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, generator=draw, dtype=torch.float64) / 4
    params = {"w": weight, "b": torch.zeros(12, dtype=torch.float64)}

    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(F.linear(images.flatten(1), p["w"], p["b"]), labels))(params)

    both = cohort_mean(simulate, 2)
    images, labels = torch.rand(2, 1, 4, 4, generator=draw, dtype=torch.float64), torch.eye(12, dtype=torch.float64)[[3, 8]]
    halves = [simulate(params, {}, images[k : k + 1], labels[k : k + 1], None) for k in range(2)]
    mean = both(params, {}, images, labels, None)
    assert all(torch.allclose(mean[name], (halves[0][name] + halves[1][name]) / 2) for name in mean)
    assert torch.allclose(halves[0]["w"][3] / halves[0]["b"][3], images[0].flatten())
    shares = torch.stack([half["b"][3] for half in halves]) / (2 * mean["b"][3])
    assert torch.allclose(mean["w"][3] / mean["b"][3], (shares[:, None] * images.flatten(1)).sum(0)) and shares.abs().min() > 0.01


def test_scores_take_the_best_of_everybody_and_say_whose_sum_it_was(trained, tmp_path):
    run, one = trained("sum")
    made = {cell.name: cell for cell in cells.make_cells(run, {("sum", 0): one}, tmp_path)}
    assert set(made) == {"naive", "joint", "learned"}  # the decoder needs noise
    assert made["joint"].twin is made["naive"] and "the sum of 4 clients" in made["naive"].note
    told = findings.threat(run, made["naive"])
    assert told["clients_in_sum"] == 4 and "gradient of one batch of 2, summed over 4 clients" in told["name"]
    assert findings.threat(run, cells.make_cells(run, {("plain", 0): trained("plain")[1]}, tmp_path)[0])["clients_in_sum"] == 1


def test_labels_of_everybody_count_where_a_sum_is_read(trained):
    run, one = trained("sum")
    victims = released(run, one)
    everybody = victims.all_labels(0)
    assert _recovered(everybody.flip(0), victims, 0) == 1.0 and _recovered(victims.labels[0], victims, 0) == 1.0
    wrong = everybody.clone()
    wrong[:4] = 7 - wrong[:4]
    assert _recovered(wrong, victims, 0) < 1.0


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "rounds", "said"),
    [
        ((SecureAggregation(), SecureAggregation()), Rounds(), "keep one"),
        (SecureAggregation(), Rounds(cohort_size=1), "at least 2"),
        (SecureAggregation(dropouts=0.4), Rounds(), "leave 6 of 10 clients, fewer than the 7"),
        (SecureAggregation(dropouts=-0.1), Rounds(), "too small"),
        ((MixUp(), SecureAggregation()), Rounds(), "encoded batches"),
        ((DPSGD(level="client"), SecureAggregation(dropouts=0.3)), Rounds(), "DPSGD's noise"),
    ],
)
def test_what_makes_no_sense_is_refused(parts, rounds, said):
    assert any(said in text for text in problems(Recipe(defences={"s": parts}, rounds=rounds))), problems(Recipe(defences={"s": parts}, rounds=rounds))


def test_what_makes_sense_is_not():
    for parts in (SecureAggregation(dropouts=0.3), (LEARNED, Pruning(), SecureAggregation()), (DPSGD(), SecureAggregation()), (SecureAggregation(), DPSGD(level="client"))):
        assert problems(Recipe(defences={"s": parts})) == []
    assert math.isclose(build.make_defence((LEARNED, SecureAggregation(dropouts=0.3)), RECIPE, build.Shape(8, (3, 16, 16)), seed=3).secure.dropouts, 0.3)


def test_two_rounds_with_a_part_of_the_clients_keep_their_bits(tmp_path):
    recipe = dataclasses.replace(RECIPE, data=Data(name=CELLS, num_clients=4, min_examples=8), rounds=Rounds(count=2, cohort_size=3), defences=DEFENCES)
    found = [train(start(recipe, tmp_path / name), name, DEFENCES[name], 0).sha256 for name in ("plain", "sum")]
    assert found[0] == found[1]


# --- whose images have which label -----------------------------------------------------------------------------------------

EPOCHS = {"release": "delta", "local_epochs": 2, "local_lr": 0.5}
TOGETHER = [  # by hand: whether it matters to what an attack simulates which images are of one client
    ("sum", "full", JointMatching(), {}, False), ("sum", "full", JointMatching(), {"release": "delta"}, False), ("sum", "full", NaiveMatching(), EPOCHS, True),
    ("sum", "full", SurrogateModel(), EPOCHS, False), ("sum", "full", NaiveMatching(), {"release": "delta", "local_optimiser": "adam"}, True),
    ("sum", "head", JointMatching(), {}, True), ("sum", "head", NaiveMatching(), {}, False),
    ("learned sum", "full", JointMatching(), {}, True), ("learned sum", "full", JointMatching(decoder="surrogate"), {}, False), ("learned sum", "all", JointMatching(), {}, False),
    ("learned sum", "full", EotMatching(), {}, False), ("bottleneck sum", "full", JointMatching(), {}, False), ("noisy sum", "full", JointMatching(), {}, False),
    ("clipped images", "full", JointMatching(), {}, False), ("signed sum", "full", JointMatching(), {}, True), ("signed sum", "full", NaiveMatching(), {}, False),
    ("bido sum", "full", JointMatching(), {}, True), ("bido sum", "full", NaiveMatching(), {}, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "policy", "attack", "changes", "together"), TOGETHER)
def test_labels_are_dealt_to_the_clients_by_guess_just_where_it_matters_and_nobody_tells(name, policy, attack, changes, together, trained):
    """It matters where images that change places with their labels and noise change the simulated sum."""
    if name == "clipped images":
        pytest.importorskip("opacus")
    run, one = trained(name, policy)
    run, snapshot = evaluated(run, **changes), one.snapshots["final"]
    victims, guess = released(run, one), {n: t + 1 for n, t in one.training.defence.initial().items() if n.startswith("decoder.")}

    def made(labels):
        return methods.make_case(run, one, snapshot, dataclasses.replace(attack, labels=labels), [victims], seed=0, fitted={"surrogate": guess})

    case = made("known")
    images, noise = whole(victims, 0)
    seen, labels, simulate = case.observations[0], F.one_hot(victims.all_labels(0), 8).float(), case.gradient if isinstance(attack, SurrogateModel) else case.simulator
    plain, moved = (
        simulate()(seen.params, seen.known, images.roll(by, 0), labels.roll(by, 0), None if noise is None else noise.roll(by, 0)) for by in (0, 1)
    )
    assert apart(moved, plain) > 1e-3 if together else apart(moved, plain) < 1e-5, apart(moved, plain)
    assert case.unordered() is None and made("searched").unordered() is None
    expected = Unordered(batches=1, clients=4, latent_dims=len(one.training.defence.noise_shape or ())) if together else None
    assert made("counts").unordered() == made("recovered").unordered() == expected
    said = "the order of the labels over the clients was guessed (1 assignment to begin with, exchanges tried on the way)"
    counted = dataclasses.replace(attack, labels="counts")
    assert (said in cells.note_of(run, one, counted, progress=snapshot.progress)) == together
    assert "guessed (" not in cells.note_of(run, one, attack, progress=snapshot.progress)
    told = [threats.known(run, [cells.Cell(name, 0, "final", "one", each, one, snapshot, run.folder)]) for each in (attack, counted)]
    assert ["who of the cohort has which label" in facts for facts in told] == [together, False]


def test_before_training_what_clients_keep_is_the_same_and_over_local_steps_all_is_guessed(trained):
    run, one = trained("learned sum")
    joint = JointMatching(labels="counts")
    assert observe.dealt(run, one, joint, progress=0.0) == (1, 1) and observe.dealt(run, one, joint, progress=1.0) == (1, 4)
    assert observe.dealt(evaluated(run, **STEPS), one, joint, progress=0.0) == (2, 4)
    assert "the order of the labels over the clients and local steps was guessed" in cells.note_of(evaluated(run, **STEPS), one, joint)
    open_one = trained("learned")[1]
    assert observe.dealt(run, open_one, joint, progress=1.0) == (1, 1) and observe.dealt(evaluated(run, **STEPS), open_one, joint, progress=1.0) == (2, 1)


def test_a_sum_of_coupled_gradients_is_attacked_from_guessed_deals(trained):
    """Every start has an order of its own, and images come back as rows of the sorted labels."""
    run, one = trained("signed sum")
    victims, attack = released(run, one), JointMatching(labels="counts", iterations=9, restarts=2)
    plan = methods.plan(methods.make_case(run, one, one.snapshots["final"], attack, [victims], seed=0))
    rows = attacks.drain(attacks.run_chunk(((0, 0), (0, 1)), plan.observations, plan.make_simulate(), plan.matching, seed=0))
    assert rows["failure"].tolist() == [0, 0] and (rows["order"].sort(1).values == torch.arange(8)).all() and not torch.equal(*rows["order"])
    assert torch.equal(rows["labels"], victims.all_labels(0).sort().values.expand(2, -1))
