"""What leaves the client (E10): all of the classifier, its head alone, or the decoder too; and noise with a certificate under `head`.

Shows:  the same defences under each policy, and capacity noise on a late latent of 64 numbers, whose bits per release are certified under `head`.
        Under `head` the latent is read (A5) with a front that the attacker trains on public images and, as a bound, with the client's own; under `all` the
        clients' decoder serves the attacker as well (A6). In the row "head matched" every noise has the strength that costs two points of validation
        accuracy: does learning its level beat noise of one level? Gradients are not clipped: under `head` the norm would tell of the private front.
Expect: under `head`, noise on a small late latent keeps the strongest attack near the class mean; at equal accuracy learned, capacity and isotropic noise do alike.
Costs:  two hours on 2 CPU cores; --small: some minutes, without the matched row.
"""

from dataclasses import replace

from gidef.config import (
    CapacityNoise,
    Data,
    DecoderAware,
    Evaluation,
    IsotropicNoise,
    JointMatching,
    LatentDecoding,
    LearnedPerturbation,
    LocalTraining,
    Matched,
    Model,
    NaiveMatching,
    PostHocDecoder,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.main import sweep

RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="neck", neck=64),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3, grad_clip=0.0),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(), "isotropic 1": IsotropicNoise(std=1.0), "isotropic 2": IsotropicNoise(std=2.0), "learned": LearnedPerturbation(),
        "capacity 0.005": CapacityNoise(bits_weight=5e-3), "capacity 0.02": CapacityNoise(bits_weight=2e-2),
    },
    attacks={
        "naive": NaiveMatching(iterations=1000), "joint": JointMatching(iterations=1000), "read-noise": ReadNoise(iterations=1000), "read-latent": ReadLatent(iterations=1000),
        "latent": LatentDecoding(front="known", steps=1000), "decoder": PostHocDecoder(steps=1000),
    },
    evaluation=Evaluation(num_victims=64, checkpoints=("final",)),
    seeds=(0, 1, 2),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), seeds=(0,), evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=2),
    only=("undefended", "isotropic 1", "learned", "capacity 0.02"),
    attacks={"naive": NaiveMatching(iterations=60), "latent": LatentDecoding(front="known", steps=60), "decoder": PostHocDecoder(steps=60)},
)  # fmt: skip


def rows(recipe: Recipe) -> dict[str, Recipe]:
    naive, latent = recipe.attacks["naive"], recipe.attacks["latent"]
    own = {
        "full": {}, "head": {"latent shadow": replace(latent, front="shadow", shadow_steps=latent.steps)},
        "all": {"decoder-aware": DecoderAware(iterations=naive.iterations)},
    }  # fmt: skip
    return {policy: replace(recipe, share_policy=policy, attacks=recipe.attacks | more) for policy, more in own.items()}


MATCHED = replace(
    RECIPE,
    share_policy="head",
    defences={
        "undefended": Undefended(),
        "isotropic": Matched(defence=IsotropicNoise(), field="std", low=0.1, high=10.0, points=2.0),
        "learned": Matched(defence=LearnedPerturbation(), field="dependence_weight", low=0.001, high=20.0, points=2.0),
        "capacity": Matched(defence=CapacityNoise(), field="bits_weight", low=1e-4, high=0.1, points=2.0),
    },
    attacks={name: RECIPE.attacks[name] for name in ("latent", "decoder")},
)  # fmt: skip

sweep(rows(RECIPE) | {"head matched": MATCHED}, small=rows(SMALL))
