"""Where a run's parts meet, and what a training hands to the attacks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gidef import build, config
from gidef.data import Dataset
from gidef.parallel import World
from gidef.report import Console, Record
from gidef.types import Tensors

CHECKPOINTS = ("untrained", "early", "final")
FROZEN = "frozen/"
"""Prefix in a snapshot's file of the running statistics that the training leaves as they are."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run's parts meet: the recipe's setting, the ranks, the folder, the console and the record."""

    setting: build.Setting
    world: World
    folder: Path
    console: Console
    record: Record | None
    """On rank 0 only."""
    fingerprint: str
    """Of the scientific fields and the data; a checkpoint resumes only under the same."""

    @property
    def recipe(self) -> config.Recipe:
        return self.setting.recipe

    @property
    def leads(self) -> bool:
        return self.world.rank == 0

    def append(self, kind: str, **values: Any) -> None:
        if self.record is not None:
            self.record.append(kind, **values)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model at one of CHECKPOINTS: shared tensors, and which state of each client belongs to it."""

    name: str
    round: int
    progress: float
    params: Tensors
    versions: dict[int, int] = field(default_factory=dict)
    statistics: Tensors = field(default_factory=dict)
    """Running statistics of BatchNorm that the server holds and clients move; of a loaded snapshot, beside `params`."""


@dataclass(frozen=True, slots=True)
class Trained:
    """summary: the "training" entry of results.json.  snapshots: by checkpoint name.  sha256: of the final model."""

    training: build.Training
    snapshots: dict[str, Snapshot]
    summary: dict[str, Any]
    sha256: str
    strength: float = 1.0
    """Of the evaluation, times the trained one (see `strengths`)."""


def fingerprint(recipe: config.Recipe | dict[str, Any], dataset: Dataset) -> str:
    """SHA-256 of the recipe's scientific fields and of all labels and images (of the source file's MD5 instead, where there is one)."""
    digest = hashlib.sha256(f"{config.science(recipe)}|{dataset.name}|{dataset.md5}".encode())
    for split in (dataset.train, dataset.val, dataset.test):
        digest.update(split.labels.cpu().numpy().tobytes())
        if dataset.md5 is None:
            digest.update(split.images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_key(defence: str, seed: int) -> str:
    return f"{defence}-{seed}"


def snapshot_path(folder: Path, key: str, name: str) -> Path:
    return folder / "snapshots" / key / f"{name}.safetensors"


def early_round(rounds: int) -> int:
    """Rounds that the `early` checkpoint has seen: a tenth, at least one."""
    return max(1, rounds // 10)
