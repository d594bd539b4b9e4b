"""Several attackers, and judges of several architectures and trainings (E5): does the verdict depend on who attacks or on who judges?

Shows:  attacker accuracy by the evaluator's own net after 2, 6 and 12 epochs, the client's small net, a ResNet-18 and a small vision transformer, beside PSNR
        and SSIM, for attacks with and without knowledge of the labels.
Expect: the order of the defences is the same for every judge.
Costs:  an hour on 2 CPU cores; --small: some minutes.
"""

from dataclasses import replace

from gidef.config import (
    Data,
    Evaluation,
    GradInversion,
    InvertingGradients,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    ModernInvertingGradients,
    NaiveMatching,
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
    rounds=Rounds(count=30),
    defences={"undefended": Undefended(), "isotropic": IsotropicNoise(), "learned": LearnedPerturbation()},
    attacks={
        "naive": NaiveMatching(iterations=1000), "labels recovered": NaiveMatching(iterations=1000, labels="recovered"),
        "Inverting Gradients": InvertingGradients(iterations=1000), "its later settings": ModernInvertingGradients(iterations=1000),
        "GradInversion": GradInversion(iterations=1000, restarts=2), "joint": JointMatching(iterations=1000),
        "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000),
    },
    evaluation=Evaluation(num_victims=32, checkpoints=("early",), judges=("judge@2", "judge@12", "small@6", "resnet18@4", "vit_tiny_patch16_224@6")),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2, judges=("judge@1", "small@2", "resnet10t@1")), only=("undefended", "isotropic"),
    attacks={"naive": NaiveMatching(iterations=60), "Inverting Gradients": InvertingGradients(iterations=60), "joint": JointMatching(iterations=60), "read-noise": ReadNoise(iterations=60), "read-latent": ReadLatent(iterations=60)},
)  # fmt: skip

main(RECIPE, small=SMALL)
