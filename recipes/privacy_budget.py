"""Accuracy against the privacy budget (E2): DP-SGD over epsilon and the learned perturbation over lambda, everything shared; and beside them, where the
head alone is shared, capacity noise over bits.

Shows:  what each unit of privacy costs, and what the attacks get for it. Epsilon "inf" is DP-SGD's clipping without its noise. Capacity noise has no bound on
        bits but under share policy `head`: it is a row of its own, on a late latent of 64 numbers, and is not to be compared number by number.
Expect: at 1 to 2 points of accuracy DP-SGD's epsilon is far above what is called private.
Costs:  two hours on 2 CPU cores; --small: some minutes. One of the two: --rows budget, --rows bits. Needs the extra `dp`.
"""

from dataclasses import replace

from gidef.config import (
    DPSGD,
    CapacityNoise,
    Data,
    Evaluation,
    IsotropicNoise,
    JointMatching,
    LatentDecoding,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    PostHocDecoder,
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
    defences={
        "undefended": Undefended(),
        **{f"epsilon {value:g}": DPSGD(target_epsilon=value) for value in (1.0, 3.0, 8.0, 50.0)},
        "epsilon inf": DPSGD(noise_multiplier=0.0, target_epsilon=None),
        **{f"lambda {value:g}": LearnedPerturbation(dependence_weight=value) for value in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)},
    },
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
    seeds=(0, 1, 2),
)  # fmt: skip
BITS = replace(
    RECIPE,
    model=Model(name="small", cut="neck", neck=64), share_policy="head", evaluation=Evaluation(num_victims=32, checkpoints=("final",)),
    defences={
        "undefended": Undefended(), "isotropic 1": IsotropicNoise(std=1.0),
        **{f"beta {value:g}": CapacityNoise(bits_weight=value) for value in (1e-3, 5e-3, 2e-2, 8e-2)},
    },
    attacks={"latent": LatentDecoding(front="known", steps=1000), "decoder": PostHocDecoder(steps=1000)},
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), only=("undefended", "epsilon 8", "epsilon 50", "lambda 1"),
    evaluation=Evaluation(num_victims=8, checkpoints=("final",), judge_epochs=2),
    attacks={"naive": NaiveMatching(iterations=100), "joint": JointMatching(iterations=100)},
)  # fmt: skip
SMALL_BITS = replace(
    BITS,
    rounds=Rounds(count=2), seeds=(0,), only=("undefended", "beta 0.02"), evaluation=SMALL.evaluation,
    attacks={"latent": LatentDecoding(front="known", steps=60), "decoder": PostHocDecoder(steps=60)},
)  # fmt: skip

sweep({"budget": RECIPE, "bits": BITS}, small={"budget": SMALL, "bits": SMALL_BITS})
