"""The smallest job, with attacks computed in float64, in which no rounding is amplified into another image."""

import dataclasses
import functools

import torch

from gidef import inversions
from gidef.config import Data, Evaluation, JointMatching, LearnedPerturbation, LocalTraining, Model, NaiveMatching, Recipe, Rounds, Tuned, Undefended
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main
from gidef.report import pictures

pictures._DPI = 10
inversions.climb = functools.partial(inversions.climb, dtype=torch.float64)


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=24, test=16, size=16)


naive = NaiveMatching(iterations=30, restarts=2)
main(
    Recipe(
        data=Data(name="double_recipe:few_cells", num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=1),
        clients=LocalTraining(batch_size=8), defences={"undefended": Undefended(), "learned": LearnedPerturbation(dependence_weight=0.0)},
        attacks={"naive": naive, "joint": JointMatching(**{spec.name: getattr(naive, spec.name) for spec in dataclasses.fields(NaiveMatching)}),
            "tuned": Tuned(attack=NaiveMatching(iterations=10), grid={"lr": (0.03, 0.3)})},
        evaluation=Evaluation(num_victims=4, num_tuning=2, checkpoints=("untrained",), judge_epochs=1),
    )
)  # fmt: skip
