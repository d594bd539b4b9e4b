"""What of the method does the work (E9): noise alone, a learned level, a decoder to play against, its size, the measure, the place.

Shows:  latent norm and isotropic noise; a level learned without a decoder; the full game with decoders of a quarter and four times the size;
        each measure of dependence; a decoder of three steps a batch, and one that also sees each image's own gradient; the full game, a level alone and isotropic noise after block 0, 1 (the other rows' place), 2 and before the head.
        Strengths are the defaults: read accuracy beside PSNR. Under --share-policy head leave "decoder sees gradient" out by --only.
Expect: isotropic noise of the same accuracy does as well, unless a row says otherwise.
Costs:  three hours on 2 CPU cores, or in parts (--part I/N); --small: ten minutes.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    IsotropicNoise,
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
from gidef.main import main

PLACES = {"after block 0": "blocks.0", "after block 2": "blocks.2", "before the head": "before:classifier"}
RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        "isotropic 1": IsotropicNoise(std=1.0), "isotropic 2": IsotropicNoise(std=2.0), "isotropic 4": IsotropicNoise(std=4.0),
        "level alone": LearnedPerturbation(dependence_weight=0.0),
        "full": LearnedPerturbation(), "weight 5": LearnedPerturbation(dependence_weight=5.0),
        "decoder quarter": LearnedPerturbation(decoder_width=0.25), "decoder fourfold": LearnedPerturbation(decoder_width=4.0),
        **{f"measure {name}": LearnedPerturbation(dependence=name) for name in ("ssim", "neg_mse", "dcor", "cka")},
        "conditional": LearnedPerturbation(level="conditional"), "three steps": LearnedPerturbation(decoder_steps=3),
        "decoder sees gradient": LearnedPerturbation(decoder_sees="gradient"),
        **{f"full {place}": LearnedPerturbation(cut=cut) for place, cut in PLACES.items()},
        **{f"level alone {place}": LearnedPerturbation(dependence_weight=0.0, cut=cut) for place, cut in PLACES.items()},
        **{f"isotropic 1 {place}": IsotropicNoise(std=1.0, cut=cut) for place, cut in PLACES.items()},
    },
    attacks={"naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000), "decoder": PostHocDecoder(steps=500)},
    evaluation=Evaluation(num_victims=32, checkpoints=("final",)),
    seeds=(0, 1, 2),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    only=("undefended", "isotropic 1", "level alone", "full", "decoder fourfold", "measure cka", "full before the head", "isotropic 1 before the head"),
    attacks={"naive": NaiveMatching(iterations=100), "joint": JointMatching(iterations=100), "read-noise": ReadNoise(iterations=100), "read-latent": ReadLatent(iterations=100), "decoder": PostHocDecoder(steps=40)},
)  # fmt: skip

main(RECIPE, small=SMALL)
