"""Every attack of the suite against every kind of defence (E4): an attack that a defence was not made for is the one that counts.

Shows:  the fixed ensemble (A0, A1, A3, A4, A7, A9, A12) and the attacks beside it (A2, A5, A6, A8, A11), on noise of the latent, on bottlenecks, on
        changed updates, on changed images, on sums and on training-time baselines. What cannot be attacked so is named with its reason.
        A0 with its papers' settings is in attack_suite.
Expect: each defence has an attack that is far above the naive one.
A10:    reads deltas where these read gradients; in the run's folder, beside the attacks that simulate the local steps:
        gidef attack RUN --attack surrogate-model naive joint --release delta --local-steps 4 --batch-size 4 --checkpoint early
Costs:  days of a CPU core, in parts (--part I/N) or on a GPU, and a good part of them for DCS, whose batches cost 300 as much as others; --small, on
        some of the defences: ten minutes on 2 CPU cores. Needs the extra `dp`.
"""

from dataclasses import replace

from gidef.config import (
    ATS,
    CVB,
    DCS,
    DPSGD,
    Analytic,
    BiDO,
    Censor,
    Clipping,
    Data,
    DecoderAware,
    EotMatching,
    Evaluation,
    GenerativePrior,
    GradDefense,
    GradientNoise,
    ImprintServer,
    InstaHide,
    IsotropicNoise,
    JointMatching,
    LatentDecoding,
    LearnedInversion,
    LearnedPerturbation,
    LocalTraining,
    MixUp,
    Model,
    MultiRound,
    NaiveMatching,
    PostHocDecoder,
    Precode,
    Pruning,
    Quantisation,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    SecureAggregation,
    Sign,
    SkipLayers,
    Soteria,
    Standard,
    Undefended,
    ZeroedLevel,
)
from gidef.main import main

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        "isotropic": IsotropicNoise(), "learned": LearnedPerturbation(), "CVB": CVB(), "PRECODE": Precode(), "BiDO": BiDO(), "DP-SGD": DPSGD(target_epsilon=8.0),
        "pruning": Pruning(share=0.9), "gradient noise": GradientNoise(std=0.1), "clipping": Clipping(bound=1.0), "sign": Sign(),
        "quantisation": Quantisation(bits=4), "Soteria": Soteria(), "CENSOR": Censor(), "GradDefense": GradDefense(),
        "ATS": ATS(), "MixUp": MixUp(), "InstaHide": InstaHide(), "DCS": DCS(), "secure sum": SecureAggregation(),
    },
    attacks={
        "standard": Standard(), "skip layers": SkipLayers(iterations=4000), "latent": LatentDecoding(front="known"),
        "decoder-aware": DecoderAware(iterations=4000), "generative": GenerativePrior(iterations=4000), "imprint": ImprintServer(),
        "zeroed level": ZeroedLevel(iterations=4000),
    },
    evaluation=Evaluation(num_victims=64, checkpoints=("early",)),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    only=("undefended", "isotropic", "learned", "CVB", "pruning", "Soteria", "MixUp", "secure sum"),
    attacks={
        "naive": NaiveMatching(iterations=100), "EoT": EotMatching(iterations=40, samples=2), "skip layers": SkipLayers(iterations=100),
        "joint": JointMatching(iterations=100), "read-noise": ReadNoise(iterations=100), "read-latent": ReadLatent(iterations=100), "analytic": Analytic(), "latent": LatentDecoding(front="known", iterations=60, steps=60),
        "decoder-aware": DecoderAware(iterations=60), "learned inversion": LearnedInversion(steps=60, gradients=200),
        "generative": GenerativePrior(iterations=60, fit_steps=60), "two rounds": MultiRound(iterations=60, rounds=2), "imprint": ImprintServer(),
        "zeroed level": ZeroedLevel(iterations=60), "decoder": PostHocDecoder(steps=60),
    },
)  # fmt: skip

main(RECIPE, small=SMALL)
