"""A small transformer, undefended and against a decoder, without attacks: for the tests of a client on several ranks, as a recipe and as a worker."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

from torch import nn

from gidef import config
from gidef.config import Data, Dirichlet, Evaluation, FedAvg, LearnedPerturbation, LocalTraining, Model, Recipe, Rounds, Speed
from gidef.data import Dataset, synthetic_blood_cells
from gidef.main import main

HERE = Path(__file__)


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=70, val=33, test=33)


def transformer(*, num_classes: int, image_shape: tuple[int, ...], **_: object) -> nn.Module:
    """Tensors of odd sizes, and of one row, which two ranks share unevenly."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image_shape[1:], patch_size=7, in_chans=image_shape[0], num_classes=num_classes, embed_dim=30, depth=3, num_heads=3, mlp_ratio=1.5
    )


RECIPE = Recipe(
    data=Data(name=f"{HERE}:few_cells", num_clients=3, partition=Dirichlet(alpha=2.0), min_examples=8),
    model=Model(name=f"{HERE}:transformer", cut="blocks.0"),
    clients=LocalTraining(batch_size=9, optimiser="sgd", lr=0.1, grad_clip=1.0),
    rounds=Rounds(count=2, cohort_size=2, server=FedAvg(momentum=0.5)),
    defences={"learned": LearnedPerturbation(mean=True, ramp=0.0, decoder_steps_first=2)},
    evaluation=Evaluation(num_victims=8, num_tuning=0, judge_epochs=1),
)


def _variant(**changes: object) -> Recipe:
    return dataclasses.replace(RECIPE, **changes)


def _clients(**changes: object) -> LocalTraining:
    return dataclasses.replace(RECIPE.clients, **changes)


VARIANTS = {
    "plain": RECIPE,
    "coupled": _variant(defences={"learned": LearnedPerturbation(dependence="cka", ramp=0.0)}),  # a loss that is no mean over examples
    "head": _variant(share_policy="head", rounds=Rounds(count=2, cohort_size=2, server=config.Scaffold())),
}
FURTHER = {
    "adam": _variant(clients=_clients(optimiser="adam", lr=1e-3)),
    "frozen": _variant(defences={"learned": LearnedPerturbation(frozen=True)}, clients=_clients(accumulate=2, proximal=0.1)),
    "changed": _variant(defences={"learned": (config.MixUp(), config.Precode(width=12), config.Pruning(share=0.5))}),
    "bfloat16": _variant(clients=_clients(precision="bfloat16")),
}


class Killed(Exception):
    """Stands for a kill in the second round."""


def trained(recipe: Recipe, folder: Path, world, *, killed: bool = False) -> dict[str, object]:
    """Train the recipe's defence, without the rest of a run: the final model's hash and the folder."""
    from gidef.build import load_setting
    from gidef.report import Console
    from gidef.runs import Run
    from gidef.training import train

    setting = load_setting(recipe, world=world, notice=lambda text: None)
    run = Run(setting, world, folder, Console(rank=1), _Fuse(folder) if killed else None, "a mark")
    try:
        done = train(run, "learned", recipe.defences["learned"], 0)
    except Killed:
        return {}
    return {"sha": done.sha256, "loss": done.summary["val_accuracy"], "parameters": done.summary["parameters_shared"], "bytes": done.summary["bytes_per_round"]}


class _Fuse:
    """A record that ends the run after the second round, before its checkpoint, once the first one's is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, kind: str, **values: object) -> None:
        if kind == "round" and values["round"] == 2:
            whole = self.folder / "checkpoints" / "learned-0" / "round-000001" / "meta.json"
            deadline = time.monotonic() + 60
            while not whole.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            raise Killed


def _asked(task: str, folder: Path, world) -> dict[str, object]:
    """What a task of the worker says: a variant, and behind a colon what is special."""
    from gidef.errors import InputError
    from gidef.parallel import with_mesh

    name, _, how = task.partition(":")
    speed = Speed(shard_size=2)
    if how.startswith("zero"):
        speed = Speed(shard_size=2, shard_backend="deepspeed", zero_stage=int(how[4]), offload="cpu" if how.endswith("offload") else "none")
    recipe = dataclasses.replace((VARIANTS | FURTHER)[name], speed=speed, resume=how.startswith("resume"))
    if how == "diverges":
        recipe = dataclasses.replace(recipe, clients=_clients(lr=1e30, grad_clip=0.0))
    if how == "resume" and world.rank == 0:
        shutil.copytree(folder.parent / "2" / "plain-killed", folder / "plain-resume")
    world.barrier()
    try:
        meshed = with_mesh(world, 3 if how == "three" else 2)
        return trained(recipe, folder / task.replace(":", "-"), meshed, killed=how == "killed")
    except InputError as error:
        return {"error": str(error)}


def worker(rank: int, folder: Path, stages: list[str]) -> None:
    """Several worlds, one after another, each written as size=task,task: so that one start of four processes, which costs seconds, serves all."""
    from gidef.parallel import open_world

    for stage in stages:
        size, tasks = int(stage.partition("=")[0]), stage.partition("=")[2].split(",")
        if rank >= size:
            continue
        found = {}
        with open_world("cpu", 900, init_method=f"file://{folder}/meet-{size}", rank=rank, size=size) as world:
            for task in tasks:
                found[task] = _asked(task, folder / str(size), world)
                world.barrier()
        (folder / f"rank-{rank}-of-{size}.json").write_text(json.dumps(found))


if sys.argv[1:2] == ["--worker"]:
    worker(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
else:
    main(RECIPE)
