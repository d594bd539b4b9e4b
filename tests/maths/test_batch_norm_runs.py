"""Recipes of a net with BatchNorm: trained, saved, taken up again and attacked. Synthetic cells of 16 pixels, three clients."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file as safetensors_load
from safetensors.torch import save_file

from gidef import build, config, importing, job
from gidef.checkpoint import load_file
from gidef.clients.local import batches
from gidef.config import DPSGD, JointMatching, LearnedPerturbation, LocalTraining, Model, NaiveMatching, Rounds, Speed, Undefended
from gidef.parallel import World
from gidef.rng import stream_seed
from gidef.training import logits, reload, run_key, train
from tests import normed
from tests.small_run import RECIPE, one_thread, start

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
    common = dict.fromkeys(("defence", "victims", "checkpoint", "batch_size", "release", "local_steps", "device", "at_once", "mode", "compile", "schedule", "threads", "restarts", "labels"))
    arguments = argparse.Namespace(**{**common, "folder": str(folder), "out": str(out), "attack": list(names), "allow_code": True, "iterations": 3, "steps": 3, **more})
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


def test_a_frozen_run_is_attacked_at_once_and_later(attacked, tmp_path):
    folder, content = attacked("frozen")
    overwrite(folder)
    rows = attacked_again(folder / "run", tmp_path / "again", "naive", "joint", "gradinversion")
    assert {row["threat"]["batch_norm"] for row in content["rows"] + rows} == {"eval"} and "BatchNorm frozen (eval mode)" in rows[0]["threat"]["name"]
    first, again = ({row["attack"]: row["psnr_db"]["mean"] for row in some} for some in (content["rows"], rows))
    assert first.keys() == ATTACKS.keys() and all(again[key] == value for key, value in first.items())
    assert all(row["failed"] == 0 for row in rows) and len(again) == 3


@pytest.mark.slow
def test_every_attack_runs_on_a_frozen_net(attacked, tmp_path):
    names = [name for name in config.PRESETS if name not in ("standard", "quick", "smoke", "surrogate-model")]
    rows = attacked_again(attacked("frozen")[0] / "run", tmp_path / "all", *names)
    assert {row["attack"] for row in rows} == set(names) and all(row["failed"] == 0 or row["attack"] == "analytic" for row in rows)


def test_a_net_that_keeps_other_statistics_is_refused(tmp_path):
    setting = start(recipe("frozen", tmp_path), tmp_path / "run").setting
    wrong = dataclasses.replace(setting, recipe=dataclasses.replace(setting.recipe, model=Model(norm="group", name=f"{__file__}:instance_net")))
    with pytest.raises(Exception, match="model.norm=group leaves .*instance_net with running statistics"):
        build.make_training(wrong, Undefended(), seed=0, world=World(), state_folder=tmp_path)


def instance_net(num_classes, image_shape):
    return torch.nn.Sequential(torch.nn.InstanceNorm2d(3, track_running_stats=True), torch.nn.Flatten(), torch.nn.Linear(768, num_classes))
