"""Accuracy against the privacy budget (E2): DP-SGD over epsilon and the learned perturbation over lambda, everything shared; and beside them, where the
head alone is shared, capacity noise over bits. The curves of the other baselines are a third row.

Shows:  what each unit of privacy costs, and what the attacks get for it. Epsilon "inf" is DP-SGD's clipping without its noise. Capacity noise has no bound on
        bits but under share policy `head`: it is a row of its own, on a late latent of 64 numbers, and is not to be compared number by number.
Expect: at 1 to 2 points of accuracy DP-SGD's epsilon is far above what is called private.
Costs:  six hours on 2 CPU cores, reckoned from shorter runs; --small: some minutes. One of the three: --rows budget, baselines or bits. Needs the extra `dp`.
"""

from dataclasses import replace

from gidef.config import (
    CVB,
    DPSGD,
    BiDO,
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
    Precode,
    ReadLatent,
    ReadNoise,
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
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000)},
    evaluation=Evaluation(num_victims=32, checkpoints=("early", "final")),
    seeds=(0, 1, 2),
)  # fmt: skip
BASELINES = replace(
    RECIPE,
    defences={
        "undefended": Undefended(),
        **{f"isotropic {value:g}": IsotropicNoise(std=value) for value in (0.5, 1.0, 2.0, 4.0)},
        **{f"BiDO {value:g}": BiDO(x_weight=value, y_ratio=10.0) for value in (0.05, 0.5, 5.0)},
        **{f"CVB {value:g}": CVB(kl_weight=value) for value in (1e-4, 1e-2, 1e-1, 1.0)},
        **{f"PRECODE {value:g}": Precode(kl_weight=value) for value in (1e-4, 1e-3, 1e-2, 1e-1)},
    },
)  # fmt: skip
BITS = replace(
    RECIPE,
    clients=replace(RECIPE.clients, grad_clip=0.0), model=Model(name="small", cut="neck", neck=64), share_policy="head", evaluation=Evaluation(num_victims=32, checkpoints=("final",)),
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
    attacks={"naive": NaiveMatching(iterations=100), "joint": JointMatching(iterations=100), "read-noise": ReadNoise(iterations=100), "read-latent": ReadLatent(iterations=100)},
)  # fmt: skip
SMALL_BASELINES = replace(SMALL, defences=BASELINES.defences, only=("undefended", "isotropic 1", "isotropic 4", "CVB 0.1", "PRECODE 0.1"))
SMALL_BITS = replace(
    BITS,
    rounds=Rounds(count=2), seeds=(0,), only=("undefended", "beta 0.02"), evaluation=SMALL.evaluation,
    attacks={"latent": LatentDecoding(front="known", steps=60), "decoder": PostHocDecoder(steps=60)},
)  # fmt: skip

sweep({"budget": RECIPE, "baselines": BASELINES, "bits": BITS}, small={"budget": SMALL, "baselines": SMALL_BASELINES, "bits": SMALL_BITS})
