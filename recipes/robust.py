"""Clients that lie: three of ten train on flipped labels, plainly or with a loss three times as large, under five rules that put updates together.

Shows:  what liars cost the global model under the mean, the median, the trimmed mean, Krum and Multi-Krum, and what each rule costs when nobody lies.
Expect: liars cost the mean most, those that push more; a robust rule costs some points when nobody lies. In the small form on synthetic cells (three
        rounds, one seed; `--small --data.name synthetic --rows mean "trimmed mean"`) the mean falls from 60.7 % to 45.3 % under flipped labels and to
        41.3 % under pushed ones, the trimmed mean has 57.3, 55.3 and 58.3 %. Each rule needs a client's own update, which gives its images away as
        under the mean: what it guards against is liars, not curiosity.
Costs:  hours on 2 CPU cores; --small: some minutes.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from gidef.config import Data, Evaluation, Iid, Krum, LocalTraining, Mean, Median, Model, NaiveMatching, Recipe, Rounds, TrimmedMean, Undefended
from gidef.defence.encode import probabilities
from gidef.main import sweep


@dataclass(frozen=True, kw_only=True)
class Liars:
    """The first clients, by number, train on K − 1 − y in the place of y, with their loss times `push`: of plain SGD, their update grows alike until
    the clip. An encoder of no draws (see gidef.defence.encode): whoever attacks sees what was sent, and searches nothing beside the image."""

    changes_data: ClassVar[bool] = True
    clients: int = 3
    push: float = 1.0
    classes: int = 8

    def encode(self, images: torch.Tensor, labels: torch.Tensor, *, client: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        if client.id >= self.clients:
            return images, labels
        return images, self.push * probabilities(labels, self.classes).flip(1)

    def unknowns(self, image_shape: tuple[int, ...], size: int) -> dict[str, Any]:
        return {}

    def imitate(self, images: torch.Tensor, labels: torch.Tensor, found: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return images, labels


RECIPE = Recipe(
    data=Data(name="bloodmnist", num_clients=10, partition=Iid()),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=32, optimiser="sgd", lr=0.05, momentum=0.9),
    rounds=Rounds(count=30, patience=None),
    defences={"honest": Undefended()},
    attacks={"naive": NaiveMatching(iterations=600)},
    evaluation=Evaluation(num_victims=16, checkpoints=("final",)),
)
SMALL = replace(
    RECIPE,
    rounds=Rounds(count=3, patience=None), attacks={"naive": NaiveMatching(iterations=40)}, evaluation=Evaluation(num_victims=4, checkpoints=("final",), judge_epochs=1),
)  # fmt: skip
LIES = {"honest": Undefended(), "flipped": Liars(), "pushed": Liars(push=3.0)}
RULES = {"mean": Mean(), "median": Median(), "trimmed mean": TrimmedMean(share=0.3), "Krum": Krum(byzantine=3), "Multi-Krum": Krum(byzantine=3, chosen=5)}


def rows(recipe: Recipe) -> dict[str, Recipe]:
    return {name: replace(recipe, defences=LIES, rounds=replace(recipe.rounds, aggregate=rule)) for name, rule in RULES.items()}


sweep(rows(RECIPE), small=rows(SMALL))
