"""A ViT-L (304 million parameters) with noise after its sixth block, trained by clients that span several ranks each.

Shows:  a federated round of a network of which parameters, gradients and Adam's state fill a rank: with --speed.shard-size G, one client on G ranks.
Expect: the same training for every shard size but for rounding.  Costs: for GPUs; --small is one round of 2 clients on tiny pictures, minutes on a CPU.

    torchrun --nproc-per-node 8 recipes/vit_large.py --speed.shard-size 2                 # four clients at a time, two ranks each
    torchrun --nproc-per-node 2 recipes/vit_large.py --speed.shard-size 2 --small
"""

import dataclasses

from gidef.config import Data, Evaluation, LearnedPerturbation, LocalTraining, Model, Recipe, Rounds, Undefended
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=16, val=8, test=8, size=32)


RECIPE = Recipe(
    data=Data(name="bloodmnist", size=224, num_clients=10),
    model=Model(name="vit_large_patch16_224", cut="blocks.5", small_stem=False),
    clients=LocalTraining(epochs=1, batch_size=32, optimiser="adam", lr=1e-4, precision="bfloat16"),
    rounds=Rounds(count=60, cohort_size=4),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation(dependence_weight=1.0)},
)

SMALL = dataclasses.replace(
    RECIPE,
    data=Data(name="vit_large:few_cells", num_clients=4, min_examples=4),
    clients=LocalTraining(epochs=1, batch_size=2, optimiser="sgd", lr=1e-2),
    rounds=Rounds(count=1, cohort_size=2),
    defences={"learned": LearnedPerturbation(dependence_weight=1.0, ramp=0.0, decoder_steps_first=1)},
    evaluation=Evaluation(num_victims=1, num_tuning=0, judge_epochs=1),
)

main(RECIPE, small=SMALL)
