"""Before the attacks: the network that they differentiate beside its untouched build."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gidef import build, copies
from gidef.config import BiDO, GradInversion, IsotropicNoise, LearnedPerturbation, Model, NaiveMatching, Precode, Pruning, Undefended
from gidef.errors import InputError
from gidef.models import make_backbone
from gidef.models.surgery import changes_between
from gidef.report import Console
from tests.small_run import RECIPE, start

ATTACKED = dataclasses.replace(RECIPE, attacks={"naive": NaiveMatching()})


class Forgetful(nn.Module):
    """Its builds differ: every one has another slope."""

    slopes = itertools.count(0.1, 1e-6)

    def __init__(self, *, num_classes, image_shape):
        super().__init__()
        self.first, self.last, self.slope = nn.Conv2d(image_shape[0], 4, 3, stride=2), nn.Linear(4, num_classes), next(self.slopes)

    def forward(self, x):
        return self.last(F.leaky_relu(self.first(x), self.slope).mean((2, 3)))


class Dropping(Forgetful):
    """It drops by a function, which no module's rate switches off."""

    slopes = itertools.repeat(0.1)

    def forward(self, x):
        return self.last(F.dropout(F.leaky_relu(self.first(x), self.slope), 0.5).mean((2, 3)))


def compared(recipe, tmp_path, **options):
    run = start(recipe, tmp_path)
    defence = build.make_defence(next(iter(recipe.chosen.values())), recipe, run.setting.dataset, seed=0)
    images, labels = run.setting.dataset.val.images[:4].double() / 255, run.setting.dataset.val.labels[:4]
    return defence, functools.partial(
        copies.compare, defence, lambda: build.make_net(recipe, run.setting.dataset, seed=0, untouched=True), images, labels, **options
    )


def with_model(**fields):
    return dataclasses.replace(ATTACKED, model=Model(**fields))


@pytest.mark.parametrize("defence", [Undefended(), LearnedPerturbation(), BiDO(), Precode()])
def test_every_defences_network_has_the_gradients_of_its_untouched_build(defence, tmp_path):
    _, compare = compared(dataclasses.replace(ATTACKED, defences={"one": defence}), tmp_path)
    net = compare()
    assert net["parity"] < 1e-12 and net["changes"] == [] and net["skipped"] is None


def test_changes_are_counted_and_hardsigmoid_and_batch_norm_keep_the_gradients(tmp_path):
    _, compare = compared(with_model(name="mobilenetv3_small_050", norm="keep"), tmp_path, batch=True, statistics=True)
    net = compare()
    gates = sum(type(module) is nn.Hardsigmoid for module in make_backbone("mobilenetv3_small_050", num_classes=8, image_shape=(3, 16, 16), untouched=True).modules())
    assert net["parity"] < 1e-9 and f"{gates} x Hardsigmoid -> relu6(x + 3) / 6" in net["changes"] and gates > 5
    assert net["statistics"]["parity"] < 1e-9 and any("BatchNorm" in line for line in net["statistics"]["changes"])


def test_what_swin_would_drop_is_named():
    few = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16}
    plain, changed = (
        make_backbone("swin_tiny_patch4_window7_224", num_classes=8, image_shape=(3, 32, 32), untouched=one, options=few) for one in (True, False)
    )
    assert changes_between(plain, changed) == [
        "4 x DropPath of rate 0.05 to 0.1 -> off (layers.1.blocks.0.drop_path1, layers.1.blocks.0.drop_path2, layers.1.blocks.1.drop_path1, …)"
    ]
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), changed.parameters(), strict=True))


def test_another_network_than_the_untouched_one_is_refused(tmp_path):
    defence, compare = compared(ATTACKED, tmp_path)
    act = next(module for module in defence.model.modules() if isinstance(module, nn.LeakyReLU))
    act.negative_slope *= 1 + 1e-6
    with pytest.raises(InputError, match=r"the attack copy of SmallNet is not the model: the gradients of 'backbone"):
        compare()


@pytest.mark.parametrize("kind", [Forgetful, Dropping])
def test_a_network_whose_gradients_cannot_be_told_again_is_refused_before_any_attack(kind, tmp_path):
    recipe = with_model(name=f"{__file__}:{kind.__name__}", cut="first")
    run = start(recipe, tmp_path)
    with pytest.raises(InputError, match="is not the model"):
        copies.check(run, recipe.chosen, tmp_path / copies.FILE)
    assert not (tmp_path / copies.FILE).exists()


def test_each_network_is_compared_once_and_said_and_kept(tmp_path, capsys):
    defences = {"none": Undefended(), "pruned": Pruning(), "noisy": IsotropicNoise(), "learned": LearnedPerturbation()}
    recipe = dataclasses.replace(ATTACKED, defences=defences, attacks={"naive": NaiveMatching(), "statistics": GradInversion()})
    run = dataclasses.replace(start(recipe, tmp_path), console=Console(rank=0))
    found = copies.check(run, recipe.chosen, tmp_path / copies.FILE)
    assert [net["defences"] for net in found][0] == ["none", "pruned"] and sum(len(net["defences"]) for net in found) == 4
    assert json.loads((tmp_path / copies.FILE).read_text()) == found
    assert "small (none, pruned): gradients as the untouched network's to" in capsys.readouterr().out


def test_a_network_that_would_take_long_is_left_out_and_that_is_said(tmp_path, monkeypatch, capsys):
    run = dataclasses.replace(start(ATTACKED, tmp_path), console=Console(rank=0))
    monkeypatch.setattr(copies, "MOST_GFLOP", {"cpu": 1e-6})
    (net,) = copies.check(run, ATTACKED.chosen, tmp_path / copies.FILE)
    assert net["parity"] is None and "GFLOP" in net["skipped"] and "not compared with its untouched build: an image takes" in capsys.readouterr().out
    monkeypatch.setattr(copies, "MOST_PARAMETERS", 10)
    assert "million parameters" in copies.check(run, ATTACKED.chosen, tmp_path / copies.FILE)[0]["skipped"]


def test_nothing_is_compared_where_nothing_is_attacked(tmp_path):
    recipe = dataclasses.replace(RECIPE, attacks={})
    assert copies.check(start(recipe, tmp_path), recipe.chosen, tmp_path / copies.FILE) == [] and not (tmp_path / copies.FILE).exists()
