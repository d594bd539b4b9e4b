"""A small job whose attacks go through the victims in slices of one or two, or four where latents are read, and search nothing on the module."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from gidef import applications
from gidef.config import (
    Data,
    Evaluation,
    ImprintServer,
    LatentDecoding,
    LearnedInversion,
    LearnedPerturbation,
    LocalTraining,
    Model,
    PostHocDecoder,
    ReadNoise,
    Recipe,
    Rounds,
)
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main
from gidef.report import pictures
from tests.hasty import hasty

hasty(pytest.MonkeyPatch())  # for the life of this process
pictures._DPI = 10
applications.KINDS = {attack: dataclasses.replace(kind, at_once=min(kind.at_once, 2)) for attack, kind in applications.KINDS.items()}


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=24, test=16, size=16)


if __name__ == "__main__":
    main(
        Recipe(
            data=Data(name="sliced_recipe:few_cells", num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=1),
            clients=LocalTraining(batch_size=8), defences={"learned": LearnedPerturbation(dependence_weight=0.0)},
            attacks={
                "latent": LatentDecoding(iterations=6, restarts=2, steps=4), "learned": LearnedInversion(steps=4, gradients=12, surrogate_steps=4),
                "imprint": ImprintServer(bins=8), "decoder": PostHocDecoder(steps=4), "read": ReadNoise(iterations=2),
            },
            evaluation=Evaluation(num_victims=5, num_tuning=0, checkpoints=("untrained",), judge_epochs=1),
        )
    )  # fmt: skip
