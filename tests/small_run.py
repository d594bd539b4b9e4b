"""One round of a small run, trained once and shared by the tests of a module: 16-pixel synthetic cells, three clients, the small net."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gidef import build
from gidef.config import Data, Evaluation, LocalTraining, Model, Recipe, Rounds, Speed
from gidef.data import Dataset, synthetic_blood_cells
from gidef.parallel import World
from gidef.report import Console
from gidef.runs import Run, Trained
from gidef.training import train


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=24, test=16, size=16)


CELLS = f"{__file__}:few_cells"
RECIPE = Recipe(
    data=Data(name=CELLS, num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=1), clients=LocalTraining(batch_size=8),
    speed=Speed(device="cpu", workers=1), evaluation=Evaluation(num_victims=4, num_tuning=0, batch_size=2, checkpoints=("final",)),
)  # fmt: skip


class Heard(Console):
    """A silent console that remembers."""

    def __init__(self) -> None:
        super().__init__(rank=1)
        self.notices: list[str] = []
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def say(self, text: str) -> None:
        self.said.append(text)


def start(recipe: Recipe, folder: Path) -> Run:
    """A run of a recipe without screen and record."""
    setting = build.load_setting(recipe, world=World(), notice=lambda text: None)
    return Run(setting, World(), folder, Console(rank=1), None, "mark")


def evaluated(run: Run, **changes: Any) -> Run:
    """The run with other fields of its evaluation."""
    recipe = dataclasses.replace(run.recipe, evaluation=dataclasses.replace(run.recipe.evaluation, **changes))
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def trained_once(make_folder: Callable[[str], Path], recipe: Recipe) -> Iterator[Callable[..., tuple[Run, Trained]]]:
    """trained(defence, policy="full"): (run, what training left); each of the recipe's defences is trained once per policy, on one thread.

    make_folder: tmp_path_factory.mktemp.
    """
    runs: dict[str, Run] = {}
    found: dict[tuple[str, str], Trained] = {}

    def trained(defence: str, policy: str = "full") -> tuple[Run, Trained]:
        if policy not in runs:
            runs[policy] = start(dataclasses.replace(recipe, share_policy=policy), make_folder(policy))
        if (policy, defence) not in found:
            found[policy, defence] = train(runs[policy], defence, recipe.defences[defence], 0)
        return runs[policy], found[policy, defence]

    with one_thread():
        yield trained
