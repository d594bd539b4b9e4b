"""A data set, a model and a defence of the user's own, defined in the recipe's file. Synthetic cells."""

from __future__ import annotations

import subprocess
import sys

from tests.ranks.launch import ROOT, environment, results

RECIPE = '''
"""Mine."""
import copy
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from gidef.config import Data, Evaluation, Model, NaiveMatching, Recipe, Rounds, Undefended
from gidef.data import synthetic_blood_cells
from gidef.defence import Defence, Plain
from gidef.main import main


def cells():
    return synthetic_blood_cells(train=160, val=40, test=40)


class Net(nn.Module):
    default_cut = "front"

    def __init__(self, num_classes):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.Tanh())
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.front(images).mean((2, 3)))


def net(num_classes, **_):
    return Net(num_classes)


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    amount: float = 0.1

    def build(self, make_model):
        return SmoothedDefence(make_model(), self.amount)


class SmoothedDefence(Defence):
    def __init__(self, model, amount):
        super().__init__(model)
        self.amount = amount

    def player(self):
        return SmoothedPlayer(copy.deepcopy(self.model), self.amount)


class SmoothedPlayer(Plain):
    def __init__(self, model, amount):
        super().__init__(model)
        self.amount = amount

    def loss(self, images, labels, *, rows, epoch):
        return F.cross_entropy(self.model(images), labels, label_smoothing=self.amount)


RECIPE = Recipe(
    data=Data(name="mine:cells", num_clients=4),
    model=Model(name="mine:net"),
    rounds=Rounds(count=2),
    defences={"undefended": Undefended(), "smoothed": Smoothing()},
    attacks={"naive": NaiveMatching(iterations=3)},
    evaluation=Evaluation(num_victims=4, num_tuning=2, judge_epochs=1),
)

main(RECIPE)
'''


OWN_ATTACK = '''
from dataclasses import dataclass

from gidef.methods import Plan


@dataclass(frozen=True, kw_only=True)
class Rough:
    iterations: int = 7
    restarts: int = 1
    labels: str = "known"

    def plan(self, case):
        return Plan(case.observations, case.simulator, case.matching(tv=0.0))
'''


def test_own_data_model_and_defence_train_are_attacked_and_attacked_again(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)

    def call(*arguments):
        place = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
        done = subprocess.run([sys.executable, *arguments], env=place, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr

    call("mine.py", "--out", "mild")
    call("mine.py", "--out", "strong", "--defences.smoothed.amount", "0.5")
    mild, strong = (results(tmp_path / name)["weights_sha256"] for name in ("mild", "strong"))
    assert mild["undefended/0"] == strong["undefended/0"]
    assert len({mild["undefended/0"], mild["smoothed/0"], strong["smoothed/0"]}) == 3
    (tmp_path / "attacks.py").write_text(OWN_ATTACK)
    chosen = ("--attack", "naive", "attacks.py:Rough", "--iterations", "2", "--defence", "undefended", "smoothed")
    call("-m", "gidef", "attack", "strong", *chosen, "--allow-code", "--out", "again")
    found = {(row["defence"], row["attack"], row["attack_id"], row["iterations"]) for row in results(tmp_path / "again")["rows"]}
    assert found == {(defence, *rest) for defence in ("undefended", "smoothed") for rest in (("naive", "A0", 2), ("Rough", "own", 2))}
