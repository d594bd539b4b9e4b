"""As tiny.py, of what tells runs apart: seconds less of pictures, images and victims."""

from gidef.config import (
    Data,
    Dirichlet,
    Evaluation,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    Model,
    NaiveMatching,
    PostHocDecoder,
    Recipe,
    Rounds,
    Undefended,
)
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main
from gidef.report import pictures

pictures._DPI = 10


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=96, val=24, test=16, size=16)


main(
    Recipe(
        data=Data(name="quick_recipe:few_cells", num_clients=4, partition=Dirichlet(alpha=1.0), min_examples=8), model=Model(cut="blocks.0"),
        clients=LocalTraining(batch_size=16), rounds=Rounds(count=3, cohort_size=3), defences={"undefended": Undefended(), "learned": LearnedPerturbation()},
        attacks={"naive": NaiveMatching(iterations=6), "joint": JointMatching(iterations=6), "decoder": PostHocDecoder(steps=4)},
        evaluation=Evaluation(num_victims=2, num_tuning=2, checkpoints=("untrained", "final"), judge_epochs=1),
    )
)  # fmt: skip
