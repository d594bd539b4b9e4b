"""Both players' steps at once, or one after the other: what the faster schedule of the minimax game costs in accuracy and in what a decoder recovers.

Shows:  the alternating game (the decoder's step, then the client's against the new decoder) beside the simultaneous one (both from one pass, at the
        same weights), with the default losses, with a decoder of three steps a batch, and with the MSE as both players' scalar; accuracy, the
        post-hoc decoder's PSNR on the perturbed latent, seconds a round.
Expect: differences within the spread over seeds, and a simultaneous round that is shorter.
Costs:  hours on 2 CPU cores; --small: some minutes.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    PostHocDecoder,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import main

GAMES = {
    "default": LearnedPerturbation(),
    "three steps": LearnedPerturbation(decoder_steps=3),
    "one scalar": LearnedPerturbation(dependence="neg_mse", decoder_loss="mse", mse_cap=1.0),
}

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        **{f"{name} alternating": game for name, game in GAMES.items()},
        **{f"{name} simultaneous": replace(game, schedule="simultaneous") for name, game in GAMES.items()},
    },
    attacks={"joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000), "decoder": PostHocDecoder(steps=1000)},
    evaluation=Evaluation(num_victims=32, checkpoints=("final",)),
    seeds=(0, 1, 2),
)
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    only=("undefended", "default alternating", "default simultaneous", "one scalar simultaneous"),
    attacks={"joint": JointMatching(iterations=60), "read-noise": ReadNoise(iterations=60), "read-latent": ReadLatent(iterations=60), "decoder": PostHocDecoder(steps=40)},
)  # fmt: skip

main(RECIPE, small=SMALL)
