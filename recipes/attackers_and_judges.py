"""Several attackers, and a judge after few and after many epochs (E5): does the verdict depend on who attacks or on who judges?

Shows:  attacker accuracy by judges of 2, 6 and 12 epochs beside PSNR and SSIM, for attacks with and without knowledge of the labels.
Expect: the order of the defences is the same for every judge.
Costs:  an hour on 2 CPU cores; --small: some minutes.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    GradInversion,
    InvertingGradients,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    ModernInvertingGradients,
    NaiveMatching,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import sweep

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={"undefended": Undefended(), "isotropic": IsotropicNoise(), "learned": LearnedPerturbation()},
    attacks={
        "naive": NaiveMatching(iterations=1000), "labels recovered": NaiveMatching(iterations=1000, labels="recovered"),
        "Inverting Gradients": InvertingGradients(iterations=1000), "its later settings": ModernInvertingGradients(iterations=1000),
        "GradInversion": GradInversion(iterations=1000, restarts=2), "joint": JointMatching(iterations=1000),
    },
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=4, checkpoints=("final",)), only=("undefended", "isotropic"),
    attacks={"naive": NaiveMatching(iterations=60), "Inverting Gradients": InvertingGradients(iterations=60), "joint": JointMatching(iterations=60)},
)  # fmt: skip


def rows(recipe: Recipe, epochs: tuple[int, ...]) -> dict[str, Recipe]:
    return {f"{number} epochs": replace(recipe, evaluation=replace(recipe.evaluation, judge_epochs=number)) for number in epochs}


sweep(rows(RECIPE, (2, 6, 12)), small=rows(SMALL, (1, 3)))
