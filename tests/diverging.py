"""A defence whose training diverges at one client, in one round and under one seed, or above a level; and a run of seconds around it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch.nn.functional as F

from gidef.config import Data, Evaluation, IsotropicNoise, LocalTraining, Matched, Model, NaiveMatching, Recipe, Rounds, Speed, Undefended
from gidef.defence import Defence, Plain
from tests.small_run import CELLS


@dataclass(frozen=True, kw_only=True)
class Breaking:
    """Plays cross-entropy, which is no number from `round` on at `client` under `seed` (None: under each), where `level` is above 5."""

    level: float = 10.0
    client: int = 1
    round: int = 1
    seed: int | None = None

    def build(self, make_model):
        return BreakingDefence(make_model(), self)


class BreakingDefence(Defence):
    def __init__(self, model, how):
        super().__init__(model)
        self.how = how

    def player(self):
        return BreakingPlayer(copy.deepcopy(self.model), self.how)


class BreakingPlayer(Plain):
    def __init__(self, model, how):
        super().__init__(model)
        self.how, self.factor = how, 1.0

    def begin(self, client, *, seed, round, progress, first):
        how = self.how
        here = how.level > 5 and client.id == how.client and round >= how.round and how.seed in (None, seed)
        self.factor = float("nan") if here else 1.0

    def loss(self, images, labels, *, rows, epoch):
        return self.factor * F.cross_entropy(self.model(images), labels)


ERROR = "client 1's loss is nan in round 1: training diverged. Lower clients.lr, or set clients.grad_clip."
RECIPE = Recipe(
    data=Data(name=CELLS, num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=2), clients=LocalTraining(batch_size=8),
    defences={
        "bad": Breaking(), "half": Breaking(seed=1), "undefended": Undefended(),
        "searched": Matched(defence=Breaking(), field="level", low=1.0, high=100.0, accuracy=0.05, trials=3), "after": IsotropicNoise(),
    },
    attacks={"naive": NaiveMatching(iterations=1)}, speed=Speed(device="cpu", workers=1), seeds=(0, 1),
    evaluation=Evaluation(num_victims=2, num_tuning=0, checkpoints=("final",), judge_epochs=1),
)  # fmt: skip
