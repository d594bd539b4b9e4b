"""Every attack of the suite against every kind of defence (E4): an attack that a defence was not made for is the one that counts.

Shows:  the fixed ensemble and the attacks beside it, on noise of the latent, on changed updates, and on training-time baselines.
Expect: each defence has an attack that is far above the naive one.
Costs:  hours on 2 CPU cores; --small: ten minutes.
"""

from dataclasses import replace

from gidef.config import (
    CVB,
    BiDO,
    Data,
    DecoderAware,
    EotMatching,
    Evaluation,
    GradientNoise,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    MultiRound,
    NaiveMatching,
    Pruning,
    Recipe,
    Rounds,
    SkipLayers,
    Soteria,
    Standard,
    Undefended,
)
from gidef.main import main

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(), "isotropic": IsotropicNoise(), "learned": LearnedPerturbation(), "CVB": CVB(), "BiDO": BiDO(),
        "pruning": Pruning(share=0.9), "gradient noise": GradientNoise(std=0.1), "Soteria": Soteria(),
    },
    attacks={
        "standard": Standard(), "skip layers": SkipLayers(iterations=4000), "decoder-aware": DecoderAware(iterations=4000),
    },
    evaluation=Evaluation(num_victims=64, checkpoints=("early",)),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    only=("undefended", "isotropic", "pruning", "Soteria"),
    attacks={
        "naive": NaiveMatching(iterations=100), "joint": JointMatching(iterations=100), "EoT": EotMatching(iterations=40, samples=2),
        "skip layers": SkipLayers(iterations=100), "two rounds": MultiRound(iterations=60, rounds=2),
    },
)  # fmt: skip

main(RECIPE, small=SMALL)
