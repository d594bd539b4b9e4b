"""BiDO's two weights over a grid around the published ones, with both of its measures, beside the undefended net: where to start from when it is compared.

Shows:  lambda_x of 0.01, 0.05, 0.1, 0.5 and 1, lambda_y of 5, 10 and 20 times as much, with HSIC and COCO (published: 0.05 and 0.1 with 10 and 20 times as much; COCO 1 with 50): validation accuracy beside what attacks
        get of batches of eight, as a batch of one is undefended. Attacked are images kept for tuning, in the place of as many victims as the comparison has,
        so that those tune nothing. Under the table, and as `choice` in results.json, the weights to take: those within two points that leak least.
Expect: the large weights cost accuracy; none of them keeps the naive attack near the class mean.
Costs:  some hours on 2 CPU cores; --small: some minutes. Cells in parts: --only undefended "hsic 0.05 x10" "coco 1 x20", or --part I/N.
"""

from dataclasses import replace

from gidef.config import BiDO, Choose, Data, Evaluation, LocalTraining, Model, NaiveMatching, Recipe, Rounds, Undefended
from gidef.main import main

WEIGHTS, RATIOS = (0.01, 0.05, 0.1, 0.5, 1.0), (5.0, 10.0, 20.0)
RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=30),
    defences={
        "undefended": Undefended(),
        **{
            f"{measure} {weight:g} x{ratio:g}": BiDO(measure=measure, x_weight=weight, y_ratio=ratio)
            for measure in ("hsic", "coco") for weight in WEIGHTS for ratio in RATIOS
        },
    },
    attacks={"naive": NaiveMatching(iterations=1000)},
    evaluation=Evaluation(num_victims=64, num_tuning=32, batch_size=8, checkpoints=("early",)), choose=Choose(points=2.0),
)  # fmt: skip
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=2), evaluation=Evaluation(num_victims=8, num_tuning=8, batch_size=8, checkpoints=("final",), judge_epochs=2),
    only=("undefended", "hsic 0.05 x10", "hsic 1 x20", "coco 0.05 x10", "coco 1 x20"), attacks={"naive": NaiveMatching(iterations=80)},
)  # fmt: skip

main(RECIPE, small=SMALL)
