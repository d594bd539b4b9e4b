"""Strong and weak scaling over ranks, of training and of attacks, beside the bound that the longest client or attack chunk sets.

    python recipes/scaling.py --ranks 1 2 4 --out runs/scaling       starts torchrun for each
    sbatch slurm/scaling.sbatch                                      the same on nodes

Shows:  how many ranks are of use.  Expect: a line below the ideal one that ends at the bound; attacks closer to it than training.
Costs:  on 2 CPU cores some minutes a row; --small: a minute a row. Give each rank a core or GPU of its own.
"""

from dataclasses import replace

from gidef.config import Data, Dirichlet, Evaluation, LocalTraining, Model, NaiveMatching, Recipe, Rounds, Speed, Undefended
from gidef.scaling import scale

RECIPE = Recipe(
    data=Data(num_clients=128, partition=Dirichlet(alpha=1.0), min_examples=8),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=32, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=6, cohort_size=64),
    defences={"undefended": Undefended()},
    attacks={"naive": NaiveMatching(iterations=400)},
    evaluation=Evaluation(num_victims=64, checkpoints=("final",)),
    speed=Speed(attacks_at_once=2, attack_mode="vmap"),
)
SMALL = replace(
    RECIPE,
    data=replace(RECIPE.data, num_clients=16), rounds=Rounds(count=3, cohort_size=8),
    attacks={"naive": NaiveMatching(iterations=10)}, evaluation=Evaluation(num_victims=8, num_tuning=8, checkpoints=("final",), judge_epochs=1),
)  # fmt: skip

scale(RECIPE, small=SMALL)
