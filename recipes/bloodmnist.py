"""Blood cells, 10 clients, everything shared: does a learned perturbation of the latent keep the patients' images private?

Shows:  undefended and defended clients under the naive (A0) and the joint (A3) attack, this with the noise searched and with it read; where there is none, with the
        latent read (A5); and the post-hoc decoder (A12).
Expect: the picture and the table in the README.
Costs:  about 6 minutes on 2 CPU cores, sized for that: raise --rounds.count and the iterations of the attacks (--attacks.naive.iterations, …) for results to quote.
"""

from gidef.config import (
    Data,
    Evaluation,
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

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(local_steps=2000),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation(dependence_weight=1.0)},
    share_policy="full",
    attacks={
        "naive": NaiveMatching(iterations=600), "joint": JointMatching(iterations=600), "read-noise": ReadNoise(iterations=600), "read-latent": ReadLatent(iterations=600),
        "decoder": PostHocDecoder(steps=150, batch_size=32),
    },
    evaluation=Evaluation(num_victims=16, checkpoints=("early", "final"), judge_epochs=4),
)

main(RECIPE)
