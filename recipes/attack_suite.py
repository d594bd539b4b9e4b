"""Every attack of the suite on the same victims: blood cells, an untrained small net, undefended and with a learned perturbation.

Shows:  which attack draws how much from one shared gradient; what each is granted stands in its note.
Expect: joint matching (A3) far above the naive attack (A0) where there is noise, and furthest where the noise is read; with --evaluation.control, the priors' own picture.
A10:    reads deltas where these read gradients; in the run's folder, beside the attack that simulates the local steps:
        gidef attack RUN --attack surrogate-model naive --release delta --local-steps 4 --batch-size 4 --checkpoint untrained
Costs:  about 20 minutes of one CPU core. Other images: --data.name pneumoniamnist, or cifar10 (GIDEF_DATA holds the files).
"""

from gidef.config import (
    Analytic,
    Data,
    DecoderAware,
    DeepLeakage,
    EotMatching,
    Evaluation,
    GenerativePrior,
    GradInversion,
    ImprintServer,
    InvertingGradients,
    JointMatching,
    LatentDecoding,
    LearnedInversion,
    LearnedPerturbation,
    LocalTraining,
    Model,
    ModernInvertingGradients,
    MultiRound,
    NaiveMatching,
    PostHocDecoder,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    SkipLayers,
    Undefended,
    ZeroedLevel,
)
from gidef.main import main

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=1),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation()},
    attacks={
        "naive": NaiveMatching(iterations=400),
        "Inverting Gradients": InvertingGradients(iterations=400),
        "its later settings": ModernInvertingGradients(iterations=400),
        "DLG": DeepLeakage(iterations=60),
        "iDLG": DeepLeakage(iterations=60, labels="recovered"),
        "GradInversion": GradInversion(iterations=400, restarts=2),
        "EoT": EotMatching(iterations=200, samples=4),
        "skip layers": SkipLayers(iterations=400),
        "joint": JointMatching(iterations=400),
        "joint guessed decoder": JointMatching(iterations=400, decoder="surrogate"),
        "read noise": ReadNoise(iterations=400), "read latent": ReadLatent(iterations=400),
        "analytic": Analytic(),
        "latent": LatentDecoding(iterations=400, steps=400, front="known"),
        "decoder-aware": DecoderAware(iterations=400),
        "learned": LearnedInversion(steps=600, gradients=1500),
        "generative": GenerativePrior(iterations=400, fit_steps=600),
        "four rounds": MultiRound(iterations=400, rounds=4),
        "imprint": ImprintServer(),
        "zeroed level": ZeroedLevel(iterations=400),
        "decoder": PostHocDecoder(steps=300),
    },
    evaluation=Evaluation(num_victims=8, checkpoints=("untrained",), judge_epochs=4),
)

main(RECIPE)
