"""Clients that differ (E7): label skew by Dirichlet, sizes that differ, and ten to a hundred clients. Accuracy and leakage per client.

Shows:  whether a skewed client leaks more, and what the defence costs it.
Expect: accuracy falls with the skew; leakage does not depend on it, as it depends on the gradient of single images.
Costs:  hours on 2 CPU cores; --small: some minutes.
"""

import math
from dataclasses import replace

from gidef.config import (
    Data,
    Dirichlet,
    Evaluation,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    QuantitySkew,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import sweep

RECIPE = Recipe(
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation()},
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000)},
    evaluation=Evaluation(num_victims=64, checkpoints=("early",)),
)
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=8, checkpoints=("final",), judge_epochs=2),
    attacks={"naive": NaiveMatching(iterations=80), "joint": JointMatching(iterations=80), "read-noise": ReadNoise(iterations=80), "read-latent": ReadLatent(iterations=80)},
)  # fmt: skip
SPREADS = {
    **{f"alpha {alpha:g}": Data(partition=Dirichlet(alpha=alpha), min_examples=8) for alpha in (0.05, 0.1, 0.5, 1.0, math.inf)},
    "sizes": Data(partition=QuantitySkew(alpha=0.5), min_examples=8),
    **{f"{number} clients": Data(num_clients=number, partition=Dirichlet(alpha=0.5), min_examples=8) for number in (50, 100)},
}

sweep(
    {name: replace(RECIPE, data=data) for name, data in SPREADS.items()},
    small={name: replace(SMALL, data=SPREADS[name]) for name in ("alpha 0.1", "alpha inf", "sizes")},
)
