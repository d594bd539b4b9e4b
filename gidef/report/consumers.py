"""Programs that follow a run's record as it is written: TensorBoard, and Weights & Biases. Imported when asked for; rank 0 alone has them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from gidef.errors import InputError


class Consumer(Protocol):
    def take(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check(names: Iterable[str]) -> None:
    """Raises InputError, with what to install, for a consumer whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log={name}, but the package {name} is not installed: pip install -e '.[{name}]', or leave it out.")


def consumers(names: Iterable[str], folder: Path, title: str) -> list[Consumer]:
    """Opened for a run's folder. Raises InputError as `check`."""
    names = tuple(names)
    check(names)
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [kinds[name](folder, title) for name in names]


def scalars(line: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, values by name) of a line of the record: rounds and their step, final test values, and each attacked image; others give none."""
    if line["kind"] == "round":
        place, step, kept = f"{line['defence']}/seed {line['seed']}", line["round"], ("loss", "val_accuracy", "val_accuracy_worst", "seconds")
    elif line["kind"] == "trained":
        place, step = f"{line['defence']}/seed {line['seed']}", line["rounds"]
        kept = ("test_accuracy", "macro_f1", "auc", "client_accuracy_worst", "seconds_per_round", "epsilon")
    elif line["kind"] == "attack":
        place = f"attacks/{line['defence']}/{line['attack']}/{line['checkpoint']}/seed {line['seed']}"
        step, kept = line["victim"], ("psnr_db", "ssim", "mse")
    else:
        return 0, {}
    return step, {f"{place}/{name}": float(line[name]) for name in kept if isinstance(line.get(name), (int, float))}


class TensorBoard:
    """Event files in <folder>/tensorboard. A resumed run writes them anew from its record, so that no round is there twice."""

    def __init__(self, folder: Path, title: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def take(self, line: dict[str, Any]) -> None:
        step, values = scalars(line)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in <folder>/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it. Each life of a resumed run is a run of its own."""

    def __init__(self, folder: Path, title: str) -> None:
        import wandb

        self._run = wandb.init(project="gidef", name=title, dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline"), settings=wandb.Settings(silent=True))

    def take(self, line: dict[str, Any]) -> None:
        step, values = scalars(line)
        if values:
            self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()
