"""Combinations (E11): the learned perturbation with changed updates, with differential privacy and with secure aggregation.

Shows:  whether two defences add up, under the attack that adapts to both. The full game stands beside DP of clients alone: its decoder learns from the
        images by steps that DP-SGD of images neither clips nor counts. Beside that stands noise without a decoder: isotropic, or of a learned level.
Expect: pruning adds nothing against an attacker who matches what was sent; a sum over ten clients is a batch of ten times the size.
Costs:  some hours on 2 CPU cores; --small: some minutes. Needs the extra `dp`.
"""

from dataclasses import replace

from gidef.config import (
    DPSGD,
    Data,
    Evaluation,
    GradientNoise,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    Pruning,
    Quantisation,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    SecureAggregation,
    Undefended,
)
from gidef.main import main

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        "learned": LearnedPerturbation(),
        "pruning": Pruning(share=0.9),
        "learned + pruning": (LearnedPerturbation(), Pruning(share=0.9)),
        "learned + noise": (LearnedPerturbation(), GradientNoise(std=0.1)),
        "learned + quantisation": (LearnedPerturbation(), Quantisation(bits=4)),
        "learned + client DP": (LearnedPerturbation(), DPSGD(target_epsilon=8.0, level="client")),
        "DP-SGD": DPSGD(target_epsilon=8.0),
        "isotropic": IsotropicNoise(),
        "isotropic + DP-SGD": (IsotropicNoise(), DPSGD(target_epsilon=8.0)),
        "level + DP-SGD": (LearnedPerturbation(dependence_weight=0.0), DPSGD(target_epsilon=8.0)),
        "secure sum": SecureAggregation(),
        "learned + secure sum": (LearnedPerturbation(), SecureAggregation()),
        "learned + client DP + secure sum": (LearnedPerturbation(), DPSGD(target_epsilon=8.0, level="client"), SecureAggregation()),
    },
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
    seeds=(0, 1, 2),
)
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    attacks={"naive": NaiveMatching(iterations=80), "joint": JointMatching(iterations=80), "read-noise": ReadNoise(iterations=80), "read-latent": ReadLatent(iterations=80)},
)  # fmt: skip

main(RECIPE, small=SMALL)
