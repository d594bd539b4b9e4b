"""Accuracy against the privacy budget (E2): DP-SGD over epsilon, the learned perturbation over lambda, capacity noise over bits beside it.

Shows:  what each unit of privacy costs, and what the attacks get for it.
Expect: at 1 to 2 points of accuracy DP-SGD's epsilon is far above what is called private.
Costs:  an hour on 2 CPU cores; --small: some minutes. Needs the extra `dp`.
"""

from dataclasses import replace

from gidef.config import DPSGD, Data, Evaluation, JointMatching, LearnedPerturbation, LocalTraining, Model, NaiveMatching, Recipe, Rounds, Undefended
from gidef.main import main

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        **{f"epsilon {value:g}": DPSGD(target_epsilon=value) for value in (1.0, 3.0, 8.0, 50.0)},
        "clipping alone": DPSGD(noise_multiplier=0.0, target_epsilon=None),
        **{f"lambda {value:g}": LearnedPerturbation(dependence_weight=value) for value in (0.0, 1.0, 5.0, 20.0)},
    },
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
    seeds=(0, 1, 2),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), only=("undefended", "epsilon 8", "epsilon 50", "lambda 1"),
    evaluation=Evaluation(num_victims=8, checkpoints=("final",), judge_epochs=2),
    attacks={"naive": NaiveMatching(iterations=100), "joint": JointMatching(iterations=100)},
)  # fmt: skip

main(RECIPE, small=SMALL)
