"""Reconstruction against the strength of the perturbation (E1).

Shows:  lambda, the weight of the game, over a grid of trainings, and kappa over a grid of evaluations of each: the noise is weakened and strengthened
        after training, in what is released and in the accuracy beside it, as a level that is trained at another kappa learns it away. Batches of one
        image and of eight. kappa 0 is the net with the latent norm alone.
Expect: accuracy falls before the joint attack does.
Costs:  some ten hours on 2 CPU cores, reckoned from shorter runs; --small: some minutes. Rows: one, eight. An array job gives each task --part I/N.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    PostHocDecoder,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import sweep

RECIPE = Recipe(
    data=Data(name="cifar10", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        **{f"lambda {value:g}": LearnedPerturbation(dependence_weight=value) for value in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)},
    },
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000), "decoder": PostHocDecoder(steps=500)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early", "final"), strengths=(0.0, 0.25, 0.5, 1.0, 2.0, 4.0)),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), only=("undefended", "lambda 0", "lambda 3"),
    evaluation=Evaluation(num_victims=8, checkpoints=("final",), judge_epochs=2, strengths=(0.0, 1.0, 4.0)),
    attacks={"naive": NaiveMatching(iterations=100), "joint": JointMatching(iterations=100), "read-noise": ReadNoise(iterations=100), "read-latent": ReadLatent(iterations=100), "decoder": PostHocDecoder(steps=40)},
)  # fmt: skip


def rows(recipe: Recipe) -> dict[str, Recipe]:
    return {"one": recipe, "eight": replace(recipe, evaluation=replace(recipe.evaluation, batch_size=8))}


sweep(rows(RECIPE), small=rows(SMALL))
