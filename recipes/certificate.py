"""Noise with a certificate on three kinds of images: blood cells, chest X-rays, natural images. Only the head leaves the client.

Shows:  capacity noise on a late latent of 64 numbers beside isotropic noise there: accuracy, the strongest attack, bits per release and Fano's bound.
        Clients predict for themselves, so without noise. "hardly any" noise is the control: what the attacks get from the latent as it is. Before a frozen
        front the releases of the whole training are bounded too (lifetime bits); it is worth its name with weights of public images:
        --model.name resnet18 --model.norm frozen --model.cut before:classifier --model.neck None --model.pretrained FILE.safetensors --only undefended "frozen front".
        Gradients are not clipped: the norm would tell of the private front.
Expect: the strongest attack (the latent read off the gradients and decoded, or a decoder handed the latent) gets within 1 dB of the class mean. Of the fixed levels 0.5 tells 74 bits
        a release, which bounds nothing, 1 tells 32, 2 tells 10 for 0.1 to 1.3 points of accuracy on any of the three, 4 tells 2.8, and costs more on blood cells
        (3.9 points) than on the others (at most 0.4).
Costs:  five hours of a CPU core; --small: some minutes.
"""

from dataclasses import replace

from gidef.config import (
    CapacityNoise,
    Data,
    Evaluation,
    IsotropicNoise,
    LatentDecoding,
    LocalTraining,
    Model,
    PostHocDecoder,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import sweep

RECIPE = Recipe(
    data=Data(num_clients=10),
    model=Model(name="small", cut="neck", neck=64, noisy_prediction=False),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3, grad_clip=0.0),
    rounds=Rounds(count=20),
    defences={
        "undefended": Undefended(), "isotropic 1": IsotropicNoise(std=1.0), "hardly any": IsotropicNoise(std=0.01),
        "capacity 0.005": CapacityNoise(bits_weight=5e-3), "capacity 0.02": CapacityNoise(bits_weight=2e-2),
        **{f"level {level:g}": CapacityNoise(bits_weight=0.0, level="fixed", std_init=level) for level in (0.5, 1.0, 2.0, 4.0)},
        "frozen front": CapacityNoise(bits_weight=0.0, level="fixed", std_init=0.5, front="frozen"),
    },
    share_policy="head",
    attacks={"latent": LatentDecoding(front="known", steps=400, batch_size=32), "decoder": PostHocDecoder(steps=400, batch_size=32)},
    evaluation=Evaluation(num_victims=64, checkpoints=("final",)),
    seeds=(0, 1, 2),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2), only=("undefended", "capacity 0.02"),
    attacks={"latent": LatentDecoding(front="known", steps=60), "decoder": PostHocDecoder(steps=60)},
)  # fmt: skip


def rows(recipe: Recipe) -> dict[str, Recipe]:
    return {name: replace(recipe, data=replace(recipe.data, name=name)) for name in ("bloodmnist", "pneumoniamnist", "cifar10")}


sweep(rows(RECIPE), small=rows(SMALL))
