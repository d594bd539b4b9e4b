"""Seconds on one core, training alone: 160 synthetic cells, more rounds than `recipes/tiny.py`, so that a run can be stopped in the middle.

FEW_SLOW_S: seconds that each client waits before it trains, so that a run outlasts a time limit of minutes.
"""

import functools
import os
import time

from gidef.clients.participate import Participation
from gidef.config import Data, Dirichlet, Evaluation, LearnedPerturbation, LocalTraining, Model, Recipe, Rounds
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=160, val=16, test=16)


RECIPE = Recipe(
    data=Data(name="few_cells:few_cells", num_clients=4, partition=Dirichlet(alpha=1.0), min_examples=8),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=32),
    rounds=Rounds(count=8, cohort_size=3, patience=None),
    defences={"learned": LearnedPerturbation(dependence_weight=1.0)},
    share_policy="full",
    attacks={},
    evaluation=Evaluation(num_victims=2, num_tuning=0, judge_epochs=1),
)

if __name__ == "__main__" and "FEW_SLOW_S" in os.environ:

    @functools.wraps(train := Participation.train)
    def train_late(*arguments, **more):
        time.sleep(float(os.environ["FEW_SLOW_S"]))
        return train(*arguments, **more)

    Participation.train = train_late

main(RECIPE)
