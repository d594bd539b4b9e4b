"""Seconds on one core: the main job at the smallest scale that still goes through all of it. For tests and first looks.

Shows:  every part of a run on 240 synthetic cells.  Expect: nothing about privacy; the attacks are far too short.
"""

from gidef.config import (
    Data,
    Dirichlet,
    Evaluation,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    PostHocDecoder,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=240, val=64, test=64)


RECIPE = Recipe(
    data=Data(name="tiny:few_cells", num_clients=4, partition=Dirichlet(alpha=1.0), min_examples=8),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=32, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=2, cohort_size=3),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation(dependence_weight=1.0)},
    share_policy="full",
    attacks={"naive": NaiveMatching(iterations=6), "joint": JointMatching(iterations=6), "decoder": PostHocDecoder(steps=4)},
    evaluation=Evaluation(num_victims=8, num_tuning=8, checkpoints=("untrained", "final"), judge_epochs=1),
)

main(RECIPE)
