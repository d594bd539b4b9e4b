"""Recipes of a net with BatchNorm: trained, saved, taken up again and attacked. Synthetic cells of 16 pixels, three clients."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file as safetensors_load
from safetensors.torch import save_file

from gidef import attack as attacks
from gidef import build, cli, config, findings, importing, inversions, job, methods, observe
from gidef.cells import Cell, make_cells
from gidef.checkpoint import load_file
from gidef.clients.local import batches
from gidef.config import DPSGD, JointMatching, LearnedPerturbation, LocalTraining, Model, NaiveMatching, Rounds, Speed, Undefended
from gidef.errors import InputError
from gidef.evaluation import logits
from gidef.parallel import World
from gidef.rng import stream_seed
from gidef.runs import run_key
from gidef.training import reload, train
from tests import normed
from tests.small_run import RECIPE, evaluated, one_thread, start

SGD = LocalTraining(epochs=2, batch_size=8, optimiser="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3, grad_clip=0.0)


@pytest.fixture(autouse=True)
def thread():
    with one_thread():
        yield


def recipe(norm, tmp_path, **changes):
    if not (tmp_path / "weights.safetensors").exists():
        normed.pretrained(tmp_path / "weights.safetensors")
    model = Model(name=normed.NET, cut=normed.CUT, norm=norm, pretrained=str(tmp_path / "weights.safetensors"))
    data = dataclasses.replace(RECIPE.data, partition=config.Dirichlet(alpha=1.0))
    return dataclasses.replace(RECIPE, **{"model": model, "data": data, "clients": SGD, "rounds": Rounds(count=2), "out": str(tmp_path / "run"), **changes})


def plain_net(run):
    """The recipe's initial net with PyTorch's own BatchNorm: images in [0, 1] are normalised outside of it."""
    model = run.recipe.model
    net = build.make_backbone(
        model.name, num_classes=8, image_shape=(3, 16, 16), norm="keep", pretrained=model.pretrained, seed=stream_seed(0, "weights") % 2**31
    )
    return net.double()


def hand_written(run, net, *, step):
    """FedAvg of plain PyTorch in float64, over the state named by `step(net, client, number)` → {name: tensor after the client's epochs}."""
    clients = run.setting.clients
    total = sum(client.num_examples for client in clients)
    for number in range(run.setting.rounds):
        each = [step(copy.deepcopy(net), client, number) for client in clients]
        mean = {name: sum(client.num_examples / total * one[name] for client, one in zip(clients, each, strict=True)) for name in each[0]}
        with torch.no_grad():
            for name, tensor in mean.items():
                net.get_parameter(name).copy_(tensor) if name in dict(net.named_parameters()) else net.get_buffer(name).copy_(tensor)
    return net


def local_epochs(net, client, number):
    optimiser = torch.optim.SGD(net.parameters(), lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    for _, rows in batches(client, batch_size=SGD.batch_size, epochs=SGD.epochs, seed=0, round=number):
        optimiser.zero_grad()
        F.cross_entropy(net((client.images[rows].double() / 255 - 0.5) / 0.25), client.labels[rows]).backward()
        optimiser.step()


def everything(net):
    return {f"backbone.{name}": tensor for name, tensor in net.state_dict().items() if not name.endswith("tracked")}


def overwrite(tmp_path):
    """Other statistics beside the same weights."""
    path = tmp_path / "weights.safetensors"
    weights = safetensors_load(path)
    save_file({name: tensor + 0.5 if "running" in name else tensor for name, tensor in weights.items()}, path)


ATTACKS = {"naive": NaiveMatching(iterations=3), "joint": JointMatching(iterations=3)}


def attacked_again(folder, out, *names, **more):
    given = ["attack", str(folder), "--out", str(out), "--attack", *names, "--allow-code", "--iterations", "3", "--steps", "3"]
    arguments = cli._parser().parse_args(given)
    vars(arguments).update(more)
    job.attack_again(arguments)
    return json.loads((out / "results.json").read_text())["rows"]


# --- frozen ----------------------------------------------------------------------------------------------------------------


def test_frozen_training_is_a_hand_written_loop_in_eval_mode(tmp_path):
    run = start(recipe("frozen", tmp_path), tmp_path / "run")
    trained = train(run, "undefended", Undefended(), 0)
    best = trained.snapshots["final"]

    def step(net, client, number):
        local_epochs(net.eval(), client, number)
        return {name: p.detach() for name, p in net.named_parameters()}

    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, rounds=Rounds(count=best.round))))
    reference = hand_written(run, plain_net(run), step=step)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(best.params[f"backbone.{name}"].double(), p.detach(), rtol=1e-4, atol=1e-5)
    test = run.setting.dataset.test
    found = logits(run, trained.training, best.params, test, seed=0, split="test")
    torch.testing.assert_close(found.double(), reference.eval()((test.images.double() / 255 - 0.5) / 0.25).detach(), rtol=1e-3, atol=1e-4)


def test_frozen_statistics_outlive_the_file_that_they_came_from(tmp_path):
    run = start(recipe("frozen", tmp_path), tmp_path / "run")
    trained, test = train(run, "undefended", Undefended(), 0), run.setting.dataset.test
    final, key = trained.snapshots["final"].params, run_key("undefended", 0)
    expected = logits(run, trained.training, final, test, seed=0, split="test")
    began = {name: tensor for name, tensor in everything(plain_net(run)).items() if "running" in name}
    for name in ("untrained", "early", "final"):
        kept, _ = load_file(run.folder / "snapshots" / key / f"{name}.safetensors")
        assert all(torch.equal(kept[f"frozen/{one}"], tensor.float()) for one, tensor in began.items()) and len(began) == 6
    overwrite(tmp_path)
    again = reload(run, "undefended", Undefended(), 0)
    assert torch.equal(logits(run, again.training, final, test, seed=0, split="test"), expected) and again.sha256 == trained.sha256
    assert all(torch.equal(tensor, began[name].float()) for name, tensor in again.training.frozen.items())
    (tmp_path / "weights.safetensors").unlink()
    model, _ = build.load_model(run.folder / "models" / f"{key}.safetensors", load_code=importing.load)
    torch.testing.assert_close(model(test.images.float() / 255), expected)
    assert not torch.allclose(model.train()(test.images.float() / 255) * 0 + expected, expected * 1.01)


def test_a_resumed_training_goes_on_by_the_statistics_that_it_began_with(tmp_path):
    whole = start(recipe("frozen", tmp_path), tmp_path / "whole")
    expected = train(whole, "undefended", Undefended(), 0)
    key, cut = run_key("undefended", 0), start(recipe("frozen", tmp_path, resume=True), tmp_path / "whole")
    (whole.folder / "models" / f"{key}.safetensors").unlink()
    (whole.folder / "checkpoints" / key / "round-000002.safetensors").unlink()
    overwrite(tmp_path)
    assert train(cut, "undefended", Undefended(), 0).sha256 == expected.sha256
    other = start(recipe("frozen", tmp_path), tmp_path / "other")
    assert train(other, "undefended", Undefended(), 0).sha256 != expected.sha256


@pytest.mark.slow
def test_frozen_clients_at_once_train_as_in_the_loop(tmp_path):
    found = {}
    for at_once in (1, 3):
        run = start(recipe("frozen", tmp_path, speed=Speed(device="cpu", workers=1, clients_at_once=at_once)), tmp_path / str(at_once))
        trained = train(run, "learned", LearnedPerturbation(ramp=0.0, dependence="pearson2"), 0)
        assert trained.summary["clients_at_once"] == at_once
        found[at_once] = trained.snapshots["final"].params
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[3][name], tensor, rtol=1e-3, atol=1e-4)


def test_frozen_layers_leave_each_image_a_gradient_of_its_own(tmp_path):
    pytest.importorskip("opacus")
    run = start(recipe("frozen", tmp_path, clients=dataclasses.replace(SGD, momentum=0.0, epochs=1)), tmp_path / "run")
    private = DPSGD(clip=0.5, noise_multiplier=0.5, target_epsilon=None)
    trained = train(run, "private", private, 0)
    assert trained.summary["epsilon"] > 0
    model = trained.training.defence.model
    from gidef.defence.ghost import Ghost
    from gidef.defence.private import factors_of

    with pytest.raises(Exception, match=r"backbone.4 \(BatchNormAct2d\)"):
        Ghost(model)  # an activation inside of the norm
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 8)).double()
    net(torch.rand(6, 3, 16, 16).double())
    build.freeze_batch_norm(net)
    images, labels = torch.rand(5, 3, 16, 16).double(), torch.tensor([0, 1, 7, 3, 3])
    found, _ = Ghost(net).clipped_sum(images, labels, lambda squares: factors_of(squares, 0.1))
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        own = torch.autograd.grad(F.cross_entropy(net(image[None]), label[None]), list(net.parameters()))
        factor = min(1.0, 0.1 / float(torch.cat([g.flatten() for g in own]).norm()))
        for name, g in zip(total, own, strict=True):
            total[name] += factor * g
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """folder and results by norm, of one run each."""
    found = {}

    def run_of(norm, **changes):
        if norm not in found:
            folder = tmp_path_factory.mktemp(norm)
            defences = {"learned": LearnedPerturbation(ramp=0.0)}
            given = {"attacks": ATTACKS, "defences": defences, "evaluation": dataclasses.replace(RECIPE.evaluation, judge_epochs=1), "rounds": Rounds(count=1)}
            found[norm] = folder, job.run_recipe(recipe(norm, folder, **{**given, **changes}), norm)
        return found[norm]

    with one_thread():
        yield run_of


@pytest.mark.slow
def test_a_frozen_run_is_attacked_at_once_and_later(attacked, tmp_path):
    folder, content = attacked("frozen")
    overwrite(folder)
    rows = attacked_again(folder / "run", tmp_path / "again", "naive", "gradinversion")
    assert {row["threat"]["batch_norm"] for row in content["rows"] + rows} == {"eval"} and "BatchNorm frozen (eval mode)" in rows[0]["threat"]["name"]
    first, again = ({row["attack"]: row["psnr_db"]["mean"] for row in some} for some in (content["rows"], rows))
    assert first.keys() == ATTACKS.keys() and again["naive"] == first["naive"]
    assert all(row["failed"] == 0 for row in [*content["rows"], *rows]) and len(again) == 2


@pytest.mark.slow
def test_every_attack_runs_on_a_frozen_net(attacked, tmp_path):
    names = [name for name in config.PRESETS if name not in ("standard", "quick", "smoke", "surrogate-model")]
    rows = attacked_again(attacked("frozen")[0] / "run", tmp_path / "all", *names)
    assert {row["attack"] for row in rows} == set(names) - {"analytic"} and all(row["failed"] == 0 for row in rows)


def test_a_net_that_keeps_other_statistics_is_refused(tmp_path):
    setting = start(recipe("frozen", tmp_path), tmp_path / "run").setting
    wrong = dataclasses.replace(setting, recipe=dataclasses.replace(setting.recipe, model=Model(norm="group", name=f"{__file__}:instance_net")))
    with pytest.raises(Exception, match="model.norm=group leaves .*instance_net with running statistics that are no BatchNorm's"):
        build.make_training(wrong, Undefended(), seed=0, world=World(), state_folder=tmp_path)


def instance_net(num_classes, image_shape):
    return torch.nn.Sequential(torch.nn.InstanceNorm2d(3, track_running_stats=True), torch.nn.Flatten(), torch.nn.Linear(768, num_classes))


# --- keep ------------------------------------------------------------------------------------------------------------------

def batch_norm_round(net, client, number):
    local_epochs(net.train(), client, number)
    return {name: tensor.detach() for name, tensor in net.state_dict().items() if not name.endswith("tracked")}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(run, what training left, folder of the weights) under `full` and `head`, once each."""
    found = {}

    def one(policy="full"):
        if policy not in found:
            folder = tmp_path_factory.mktemp(policy)
            run = start(recipe("keep", folder, share_policy=policy), folder / "run")
            found[policy] = run, train(run, "undefended", Undefended(), 0), folder
        return found[policy]

    with one_thread():
        yield one


def test_a_round_is_a_hand_written_fedavg_with_batch_norm(kept):
    run, trained, _ = kept()
    tensors, meta = load_file(run.folder / "checkpoints" / run_key("undefended", 0) / "round-000002.safetensors")
    reference = hand_written(run, plain_net(run), step=batch_norm_round)
    expected = everything(reference)
    assert meta["round"] == 2 and {name.removeprefix("params/") for name in tensors if name.startswith("params/")} == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[f"params/{name}"].double(), tensor.detach(), rtol=2e-3, atol=2e-5)
    began = everything(plain_net(run))
    assert all(not torch.allclose(expected[name], began[name], atol=0.01) for name in expected if "running" in name)
    test, params = run.setting.dataset.test, {name.removeprefix("params/"): tensor for name, tensor in tensors.items() if name.startswith("params/")}
    found = logits(run, trained.training, params, test, seed=0, split="test")
    torch.testing.assert_close(found.double(), reference.eval()((test.images.double() / 255 - 0.5) / 0.25).detach(), rtol=1e-3, atol=1e-3)


def test_kept_statistics_outlive_the_training_and_the_file_that_they_came_from(kept, tmp_path):
    run, trained, folder = kept()
    final, key, test = trained.snapshots["final"], run_key("undefended", 0), run.setting.dataset.test
    assert len(final.statistics) == 6 and not final.statistics.keys() & final.params.keys()
    expected = logits(run, trained.training, {**final.params, **final.statistics}, test, seed=0, split="test")
    again = reload(run, "undefended", Undefended(), 0)
    assert all(torch.equal(again.snapshots["final"].statistics[name], tensor) for name, tensor in final.statistics.items()) and again.sha256 == trained.sha256
    model, _ = build.load_model(run.folder / "models" / f"{key}.safetensors", load_code=importing.load)
    torch.testing.assert_close(model(test.images.float() / 255), expected)
    cut = tmp_path / "cut"
    shutil.copytree(run.folder, cut)
    (cut / "models" / f"{key}.safetensors").unlink()
    (cut / "checkpoints" / key / "round-000002.safetensors").unlink()
    resumed = start(dataclasses.replace(run.recipe, resume=True), cut)
    assert train(resumed, "undefended", Undefended(), 0).sha256 == trained.sha256


def test_statistics_stay_with_the_client_where_the_layer_is_private(kept):
    run, trained, _ = kept("head")
    training, final = trained.training, trained.snapshots["final"]
    assert training.defence.model.statistics == {  # the cut is behind the second convolution
        "encoder": ("backbone.1.running_mean", "backbone.1.running_var"),
        "predictor": tuple(f"backbone.{layer}.running_{which}" for layer in (4, 6) for which in ("mean", "var")),
    }
    assert final.statistics.keys() == set(training.defence.model.statistics["predictor"])
    states = [training.participation.state(k) for k in range(3)]
    assert all(state.keys() >= set(training.defence.model.statistics["encoder"]) for state in states)
    assert not torch.allclose(states[0]["backbone.1.running_mean"], states[1]["backbone.1.running_mean"], atol=1e-4)
    exported, _ = load_file(run.folder / "models" / f"{run_key('undefended', 0)}.safetensors")
    assert torch.equal(exported["client-00001/backbone.1.running_var"], states[1]["backbone.1.running_var"]) and "backbone.4.running_var" in exported


@pytest.mark.parametrize("server", [config.FedAdam(), config.Scaffold(), config.FedAvg(lr=0.5, momentum=0.9)])
def test_statistics_are_averaged_whatever_the_server_does_with_weights(server, tmp_path):
    clients = dataclasses.replace(SGD, momentum=0.0, weight_decay=0.0)
    run = start(recipe("keep", tmp_path, clients=clients, rounds=Rounds(count=1, server=server)), tmp_path / "run")
    training = build.make_training(run.setting, Undefended(), seed=0, world=World(), state_folder=tmp_path / "state")
    before, updates = training.server.params, [training.participation.train(training.server, client) for client in run.setting.clients]
    after, mean = training.run(training.server, run.setting.clients)
    total = sum(update.num_examples for update in updates)
    for name in training.defence.model.statistics["encoder"]:
        expected = before[name] + sum(update.num_examples / total * update.delta[name] for update in updates)
        torch.testing.assert_close(after.params[name], expected, rtol=1e-4, atol=1e-6)
    assert all("running" not in name for slot in after.slots.values() for name in slot)
    assert all("running" not in name for name in mean.delta if name.startswith("control/"))


def test_cumulative_averages_start_afresh_in_every_round(tmp_path):
    run = start(recipe("keep", tmp_path), tmp_path / "run")
    training = build.make_training(run.setting, Undefended(), seed=0, world=World(), state_folder=tmp_path / "state")
    (player,), client = training.participation.players, run.setting.clients[0]
    player.model.backbone[1].momentum = None
    first = training.participation.train(training.server, client).delta["backbone.1.running_mean"]
    again = training.participation.train(training.server, client).delta["backbone.1.running_mean"]
    batches_seen = 2 * -(-client.num_examples // 8)
    assert torch.equal(first, again) and int(player.model.backbone[1].num_batches_tracked) == batches_seen
    net, found = plain_net(run).train(), []
    net[1].register_forward_pre_hook(lambda module, given: found.append(given[0].mean((0, 2, 3)).detach()))
    local_epochs(net, client, 0)
    torch.testing.assert_close((first + training.server.params["backbone.1.running_mean"]).double(), torch.stack(found).mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("release", "epochs", "momentum"), [("gradient", 1, 0.0), ("delta", 1, 0.0), ("delta", 2, 0.9)])
def test_a_client_releases_its_gradient_in_train_mode_and_the_change_of_its_statistics(release, epochs, momentum, kept):
    run, trained, _ = kept()
    more = {} if release == "gradient" else {"release": "delta", "batch_size": 4, "local_steps": 2, "local_lr": 0.1, "local_epochs": epochs, "local_momentum": momentum}
    run, snapshot = evaluated(run, **more), trained.snapshots["final"]
    victims, steps = observe.release(run, trained, snapshot, seed=0), 1 if release == "gradient" else 2
    net = plain_net(run).train()
    net.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in {**snapshot.params, **snapshot.statistics}.items()}, strict=False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    inputs, sgd = [], torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
    net[4].register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    for images, labels in [*zip(victims.images[0].double().chunk(steps), victims.labels[0].chunk(steps), strict=True)] * epochs:
        sgd.zero_grad()
        F.cross_entropy(net((images - 0.5) / 0.25), labels).backward()
        gradients = [p.grad for p in net.parameters()]
        if release == "delta":
            sgd.step()
    expected = dict(zip(before, gradients, strict=True)) if release == "gradient" else {name: p.detach() - before[name] for name, p in net.named_parameters()}
    found = victims.updates[0]
    assert {f"backbone.{name}" for name in expected} == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"backbone.{name}"].double(), tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()) + 1e-6)
    for name, tensor in victims.statistics[0].items():
        torch.testing.assert_close((tensor + snapshot.statistics[name]).double(), net.state_dict()[name.removeprefix("backbone.")], rtol=1e-3, atol=1e-5)
    told = observe.read_off(run, trained, snapshot, victims.statistics[0])
    weights = [0.9 ** (steps * epochs - 1 - step) for step in range(steps * epochs)]
    for which, of in (("mean", lambda x: x.mean((0, 2, 3))), ("var", lambda x: x.var((0, 2, 3), correction=0))):
        mean = sum(w * of(x) for w, x in zip(weights, inputs, strict=True)) / sum(weights)
        torch.testing.assert_close(told[f"statistics.backbone.4.{which}"].double(), mean, rtol=1e-3, atol=1e-4)


def test_gradinversion_matches_the_statistics_that_were_released_and_stays_at_the_truth(kept):
    run, trained, _ = kept()
    snapshot, attack = trained.snapshots["final"], config.GradInversion(iterations=2, restarts=2)
    case = methods.make_case(run, trained, snapshot, attack, [observe.release(run, trained, snapshot, seed=0)], seed=0)
    plan, victims = methods.plan(case), observe.release(run, trained, snapshot, seed=0)
    (_, prior), = [one for one in plan.matching.priors if hasattr(one[1], "source")]
    one = plan.observations[0]

    def apart(images):
        return float(prior(SimpleNamespace(images=images, params=one.params, known=one.known)))

    assert prior.source == "batch" and apart(victims.images[0]) < 1e-3 < 0.1 < apart(victims.images[1])
    simulated = plan.make_simulate()(one.params, one.known, victims.images[0], F.one_hot(victims.labels[0], 8).float(), None)
    torch.testing.assert_close(simulated, dict(one.update), rtol=1e-3, atol=1e-5)
    programs = attacks.Programs()
    loop, recorded = (
        attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0, mode=mode, at_once=2, programs=programs) for mode in ("loop", "traced")
    )
    assert not programs.notices and [one.loss for one in loop] == pytest.approx([one.loss for one in recorded], rel=1e-3)
    for asked, known in (("running", "running"), ("none", "none")):
        other = methods.make_case(run, trained, snapshot, dataclasses.replace(attack, statistics=asked), [victims], seed=0)
        assert other.statistics == known and not any(name.startswith("statistics.") for name in other.observations[0].known)
        assert len(methods.plan(other).matching.priors) == 1 + (known != "none")
    _, headed, _ = kept("head")
    assert observe.statistics_known(kept("head")[0], headed, headed.snapshots["final"], attack) == "batch"


def test_statistics_beside_tuned_settings_are_a0_and_that_prior_and_in_the_ensembles(kept):
    run, trained, _ = kept()
    snapshot, victims = trained.snapshots["final"], [observe.release(run, trained, trained.snapshots["final"], seed=0)]
    with_prior, plain = (methods.plan(methods.make_case(run, trained, snapshot, attack, victims, seed=0)) for attack in (config.StatisticsMatching(), config.NaiveMatching()))
    (nought, _), (weight, prior) = with_prior.matching.priors
    assert (nought, weight, prior.source) == (0.0, 0.1, "batch") and plain.matching.priors == ()
    assert dataclasses.replace(with_prior.matching, priors=()) == plain.matching
    recipe = dataclasses.replace(run.recipe, attacks={"smoke": config.Standard(version="smoke")})
    again = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    assert "smoke - statistics" in {cell.name for cell in make_cells(again, {("undefended", 0): trained}, run.folder, tell=False)}


def test_the_control_of_gradinversion_is_told_statistics_of_public_images_and_nothing_of_the_victims(kept):
    """Its reconstructions keep every bit when the victims' images change; those of the attack itself do not."""
    run, trained, _ = kept()
    snapshot, attack = trained.snapshots["final"], config.GradInversion(iterations=3, restarts=2)
    images, found = run.setting.dataset.train.images, {True: [], False: []}
    before, told = images.clone(), []
    try:
        for control in (True, False):
            for place in (before, 255 - before.flip(-1)):
                images.copy_(place)
                case = methods.make_case(run, trained, snapshot, attack, [observe.release(run, trained, snapshot, seed=0, control=control)], seed=0)
                plan = methods.plan(case)
                assert case.statistics == "batch"
                told.append(case.observations[0].known["statistics.backbone.1.mean"])
                found[control].append(attacks.drain(attacks.run_chunk(((0, 0), (0, 1)), plan.observations, plan.make_simulate(), plan.matching, seed=0))["images"])
    finally:
        images.copy_(before)
    assert torch.equal(*found[True]) and not torch.equal(*found[False])
    assert torch.equal(told[0], told[1]) and not torch.allclose(told[0], told[2]) and not torch.allclose(told[2], told[3])


@pytest.mark.parametrize("norm", ["keep", "frozen"])
def test_gradinversion_estimates_statistics_from_public_images_as_pytorchs_own_net_has_them(norm, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "PUBLIC", 6)
    run = start(recipe(norm, tmp_path, rounds=Rounds(count=1)), tmp_path / "run")
    trained = train(run, "undefended", Undefended(), 0)
    snapshot, attack = trained.snapshots["untrained"], config.GradInversion(iterations=2, restarts=2, statistics="proxy")
    case = methods.make_case(run, trained, snapshot, attack, [observe.release(run, trained, snapshot, seed=0)], seed=0)
    (_, prior), = [one for one in methods.plan(case).matching.priors if hasattr(one[1], "source")]
    net, seen = plain_net(run).train(norm == "keep"), {1: [], 4: [], 6: []}
    for place, each in seen.items():
        net[place].register_forward_pre_hook(lambda module, given, each=each: each.append(given[0].detach()))
    assert len(case.public) == 6 and all(any(torch.equal(image, one.float() / 255) for one in run.setting.dataset.val.images) for image in case.public)
    for pair in case.public.double().split(2):  # the victims' batches are of two
        net((pair - 0.5) / 0.25)
    moments = {place: ([x.mean((0, 2, 3)) for x in each], [x.var((0, 2, 3), correction=0) for x in each]) for place, each in seen.items()}
    wanted = {place: tuple(torch.stack(part).mean(0) for part in pair) for place, pair in moments.items()}
    for each in seen.values():
        each.clear()
    net((case.public[:2].double() - 0.5) / 0.25)  # a candidate
    expected = sum(float((x.mean((0, 2, 3)) - wanted[place][0]).norm() + (x.var((0, 2, 3), correction=0) - wanted[place][1]).norm()) for place, (x,) in seen.items())
    found = prior(SimpleNamespace(images=case.public[:2], params=case.observations[0].params, known=case.observations[0].known))
    assert prior.source == "proxy" and expected > 0.1 and float(found) == pytest.approx(expected, rel=1e-3)
    bare = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, model=Model())))
    grouped = SimpleNamespace(training=SimpleNamespace(defence=build.make_defence(Undefended(), bare.recipe, run.setting.dataset, seed=0)))
    assert observe.statistics_known(bare, grouped, snapshot, attack) == "none"


def test_gradinversion_takes_frozen_statistics_of_a_pretrained_file_and_none_of_random_weights(tmp_path):
    run = start(recipe("frozen", tmp_path, rounds=Rounds(count=1)), tmp_path / "run")
    trained = train(run, "undefended", Undefended(), 0)
    snapshot, attack = trained.snapshots["untrained"], config.GradInversion(iterations=2, restarts=2)
    assert observe.statistics_known(run, trained, snapshot, attack) == "running"
    plan = methods.plan(methods.make_case(run, trained, snapshot, attack, [observe.release(run, trained, snapshot, seed=0)], seed=0))
    (_, prior), = [one for one in plan.matching.priors if hasattr(one[1], "source")]
    images, net, inputs = torch.rand(2, 3, 16, 16), plain_net(run).eval(), {}
    for place in (1, 4, 6):
        net[place].register_forward_pre_hook(lambda module, given, place=place: inputs.setdefault(place, given[0]))
    net((images.double() - 0.5) / 0.25)
    expected = sum((inputs[k].mean((0, 2, 3)) - net[k].running_mean).norm() + (inputs[k].var((0, 2, 3), correction=0) - net[k].running_var).norm() for k in inputs)
    one = plan.observations[0]
    found = prior(SimpleNamespace(images=images, params=one.params, known=one.known))
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    bare = dataclasses.replace(run.recipe, model=dataclasses.replace(run.recipe.model, pretrained=None))
    assert observe.statistics_known(dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=bare)), trained, snapshot, attack) == "none"


@pytest.mark.slow
def test_a_kept_run_is_attacked_at_once_and_later(attacked, tmp_path):
    folder, content = attacked("keep", speed=Speed(device="cpu", workers=1, clients_at_once=2))
    assert "cannot be vectorised: BatchNorm moves its running statistics" in (folder / "run" / "log.txt").read_text()
    rows = attacked_again(folder / "run", tmp_path / "again", "naive", "gradinversion")
    assert {(row["threat"]["batch_norm"], row["threat"]["statistics"]) for row in content["rows"] + rows} == {("train", "batch")}
    assert "BatchNorm in train mode, told the batch's statistics" in rows[0]["threat"]["name"]
    first, again = ({row["attack"]: row["psnr_db"]["mean"] for row in some} for some in (content["rows"], rows))
    assert first.keys() == ATTACKS.keys() and again["naive"] == first["naive"]
    assert all(row["failed"] == 0 for row in [*content["rows"], *rows]) and len(again) == 2


@pytest.mark.slow
def test_every_attack_runs_on_a_kept_net(attacked, tmp_path):
    names = [name for name in config.PRESETS if name not in ("standard", "quick", "smoke", "surrogate-model")]
    rows = attacked_again(attacked("keep")[0] / "run", tmp_path / "all", *names)
    assert {row["attack"] for row in rows} == set(names) - {"analytic"} and all(row["failed"] == 0 for row in rows)


def test_a_cohort_is_seen_as_the_mean_of_gradients_each_by_its_own_batch(tmp_path):
    """So it matters whose images have which label, and where that is guessed nothing is attacked on the module, which knows no order."""
    run = start(recipe("keep", tmp_path, rounds=Rounds(count=1), share_policy="head"), tmp_path / "run")
    one = train(run, "sum", config.SecureAggregation(), 0)
    snapshot, bare = one.snapshots["final"], one.training
    victims = observe.release(run, one, snapshot, seed=0)
    plan = methods.plan(methods.make_case(run, one, snapshot, JointMatching(), [victims], seed=0))
    seen, company = plan.observations[0], victims.company[0]
    images = torch.cat([victims.images[0], *company.images])
    found = plan.make_simulate()(seen.params, seen.known, images, F.one_hot(victims.all_labels(0), 8).float(), None)
    assert len(company.owners) == 2 and found.keys() == seen.update.keys() == set(bare.defence.model.parts["predictor"])
    torch.testing.assert_close(found, dict(seen.update), rtol=1e-4, atol=1e-6)
    assert victims.statistics[0].keys() == set(bare.defence.model.statistics["predictor"])
    assert observe.dealt(run, one, config.SurrogateModel(labels="counts"), progress=1.0) == (1, 3)
    for labels, clients in (("known", 1), ("counts", 3)):
        attack = NaiveMatching(labels=labels)
        plan = methods.plan(methods.make_case(run, one, snapshot, attack, [victims], seed=0))
        assert observe.dealt(run, one, attack, progress=1.0) == (1, clients)
        assert inversions.on_itself(run, Cell("sum", 0, "final", "one", attack, one, snapshot, tmp_path), plan) == (clients == 1)


@pytest.mark.parametrize("changes", [{}, {"release": "delta", "batch_size": 4, "local_steps": 2, "local_lr": 1e-4}], ids=["gradient", "delta"])
def test_gradinversion_matches_the_mean_of_everybodys_statistics(changes, tmp_path):
    run = start(recipe("keep", tmp_path, rounds=Rounds(count=1)), tmp_path / "run")
    one, run = train(run, "sum", config.SecureAggregation(), 0), evaluated(run, **changes)
    snapshot, victims = one.snapshots["final"], observe.release(run, one, one.snapshots["final"], seed=0)
    far = {}
    for asked in ("released", "proxy"):
        attack = config.GradInversion(iterations=2, restarts=2, statistics=asked)
        plan = methods.plan(methods.make_case(run, one, snapshot, attack, [victims], seed=0))
        (_, prior), = [each for each in plan.matching.priors if hasattr(each[1], "source")]
        seen, images = plan.observations[0], torch.cat([victims.images[0], *victims.company[0].images])
        for name, candidate in {"truth": images, "other order": images.flip(0), "mixed": images.roll(1, 0), "others": 1 - images}.items():
            far[asked, name] = float(prior(SimpleNamespace(images=candidate, params=seen.params, known=seen.known)))
        assert all(found.status == "ok" for found in attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0))
    near = 1e-3 if not changes else 0.01  # the second step's statistics are of weights that have moved
    assert far["released", "truth"] < near and far["released", "others"] > 0.1 and far["released", "mixed"] > 2 * far["released", "truth"]
    assert far["proxy", "truth"] > 0.1


@pytest.mark.parametrize(("changes", "said"), [
    ({"clients": dataclasses.replace(SGD, batch_size=1)}, "clients.batch_size=1: model.norm=keep"),
    ({"evaluation": dataclasses.replace(RECIPE.evaluation, batch_size=1), "attacks": ATTACKS}, "evaluation.batch_size=1 in 1 step"),
    ({"evaluation": dataclasses.replace(RECIPE.evaluation, batch_size=2, release="delta", local_steps=2), "attacks": ATTACKS}, "evaluation.batch_size=2 in 2 step"),
    ({"speed": Speed(shard_size=2)}, "speed.shard_size=2"), ({"speed": Speed(sharded_server=True)}, "speed.sharded_server=True"),
    ({"defences": {"p": (config.Pruning(), DPSGD(level="client"))}}, "defences.p: DPSGD clips"), ({"defences": {"s": config.Soteria()}}, "defences.s: Soteria"),
    ({"defences": {"c": config.CapacityNoise(front="frozen")}, "clients": LocalTraining()}, "defences.c: front=frozen"),
])  # fmt: skip
def test_what_batch_statistics_cannot_do_is_refused(changes, said, tmp_path):
    (problem,) = config.problems(recipe("keep", tmp_path, **changes))
    assert said in problem and "model.norm=frozen or group" in problem
    assert not [text for text in config.problems(recipe("frozen", tmp_path, **changes)) if "BatchNorm" in text or "model.norm" in text]


@pytest.mark.parametrize("norm", ["keep", "frozen"])
def test_noise_behind_batch_statistics_certifies_nothing(norm, tmp_path):
    defence = config.IsotropicNoise(std=2.0)
    asked = recipe(norm, tmp_path, share_policy="head", defences={"noise": defence}, attacks={"a": NaiveMatching()}, rounds=Rounds(count=1))
    run = start(asked, tmp_path / "run")
    trained = train(run, "noise", defence, 0)
    [cell] = make_cells(run, {("noise", 0): trained}, run.folder)
    cell.releases = [observe.release(run, trained, cell.snapshot, seed=0)]
    told, _ = findings._certificate(run, [cell])
    assert ("carries an image into the latents of its batch" in told.get("uncertified", "")) is (norm == "keep") and (told["certified_bits"] is None) is (norm == "keep")


def test_steps_that_move_statistics_run_uncompiled_and_say_so(tmp_path):
    run, said = start(recipe("keep", tmp_path), tmp_path / "run"), []
    training = build.make_training(run.setting, Undefended(), seed=0, world=World(), state_folder=tmp_path / "state")
    build.compile_steps(training, run.recipe, notice=said.append)
    (player,) = training.participation.players
    assert said == ["speed.compile_training: steps that move BatchNorm's running statistics run uncompiled."] and player._forward is player.model


def test_a_client_whose_last_batch_is_one_image_is_named(tmp_path):
    sizes = [client.num_examples for client in start(recipe("frozen", tmp_path), tmp_path / "run").setting.clients]
    odd = next(size for size in range(2, 40) if sizes[1] % size == 1)
    alone = dataclasses.replace(SGD, batch_size=odd)
    with pytest.raises(InputError, match=rf"clients \[.*1.*\] have batches of one image at clients.batch_size={odd}, which model.norm=keep"):
        start(recipe("keep", tmp_path, clients=alone), tmp_path / "run")
    assert start(recipe("frozen", tmp_path, clients=alone), tmp_path / "run")
