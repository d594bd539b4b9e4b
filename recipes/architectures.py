"""Architectures (E6): the small net, a ResNet-18 with group norm and a small ViT.

Shows:  the same defences and attacks on other backbones, the noise at each one's default place, and after its first, second and third block (of a
        ResNet: stage) and before the head. Without the places: --only undefended isotropic learned.
Expect: the ViT's first layer gives its patches away whatever lies on a later latent (A4).
Costs:  for a GPU; --small: the small net and a tiny ViT, some minutes on 2 CPU cores.
"""

from dataclasses import replace

from gidef.config import (
    Analytic,
    Data,
    Evaluation,
    IsotropicNoise,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import sweep

PLACES = {**{f"after block {number}": f"stage:{number}" for number in range(3)}, "before the head": "before:classifier"}
RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(), "isotropic": IsotropicNoise(), "learned": LearnedPerturbation(),
        **{f"isotropic {place}": IsotropicNoise(cut=cut) for place, cut in PLACES.items()},
        **{f"learned {place}": LearnedPerturbation(cut=cut) for place, cut in PLACES.items()},
    },
    attacks={
        "naive": NaiveMatching(iterations=2000), "joint": JointMatching(iterations=2000), "read-noise": ReadNoise(iterations=2000), "read-latent": ReadLatent(iterations=2000),
        "analytic": Analytic(),
    },
    evaluation=Evaluation(num_victims=32, checkpoints=("early",)),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=1), evaluation=Evaluation(num_victims=2, num_tuning=2, checkpoints=("untrained",), judge_epochs=1),
    only=("undefended", "isotropic", "isotropic before the head"),
    attacks={"naive": NaiveMatching(iterations=30), "joint": JointMatching(iterations=30), "read-noise": ReadNoise(iterations=30), "read-latent": ReadLatent(iterations=30), "analytic": Analytic()},
)  # fmt: skip
NETS = {"small": Model(name="small"), "resnet18": Model(name="resnet18"), "vit": Model(name="vit_small_patch16_224")}
TINY = {"small": Model(name="small"), "vit": Model(name="vit_tiny_patch16_224")}

sweep(
    {name: replace(RECIPE, data=replace(RECIPE.data, size=32), model=model) for name, model in NETS.items()},
    small={
        name: replace(SMALL, data=Data(name="synthetic", num_clients=2, size=32), model=model, clients=LocalTraining(batch_size=256))
        for name, model in TINY.items()
    },
)
