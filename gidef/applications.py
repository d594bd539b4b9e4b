"""Attacks that do not search by matching: closed forms, a malicious server's imprint, networks that were trained beforehand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from gidef import config, fits, observe
from gidef.attack.analytic import analytic, can_invert
from gidef.attack.imprint import Imprinted, craft, invert_imprint
from gidef.attack.predictor import Predictor
from gidef.cells import Cell, Task, mark, note_of
from gidef.checkpoint import save_file
from gidef.clients.local import load_parameters
from gidef.clients.participate import DECODER
from gidef.errors import StorageError
from gidef.inversions import failures, load_marked, sound, worded
from gidef.rng import generator
from gidef.runs import Run
from gidef.types import Observation, Reconstruction, Tensors

GAIN = 0.1
"""Of the imprint block's pattern where clients take several steps, in which its weights are hardly to move."""
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class _Kind:
    """prepare(run, cell): what a task makes once, for itself.  at_once: victims of a task, which are lost together at a kill.  cost(cell, victims): of a task."""

    prepare: Callable[[Run, Cell], fits.Invert]
    at_once: int
    cost: Callable[[Cell, int], float]


def tasks(run: Run, cells: list[Cell]) -> list[Task]:
    """One per slice of the victims of each cell that has such an attack."""
    found = []
    for cell in cells:
        if kind := _kind(cell):
            found += [_task(run, cell, kind, victims) for victims in _slices(cell, kind)]
    return found


def _slices(cell: Cell, kind: _Kind) -> list[range]:
    """The same on any number of ranks, so that another number of them takes up what is there."""
    count = len(cell.victims.rows)
    return [range(first, min(first + kind.at_once, count)) for first in range(0, count, kind.at_once)]


def _task(run: Run, cell: Cell, kind: _Kind, victims: range) -> Task:
    cost, path = kind.cost(cell, len(victims)), _path(cell, victims)

    def do(worker: int, report: Callable[[float], None]) -> None:
        began, reported = time.perf_counter(), 0.0

        def advance(units: float) -> None:
            nonlocal reported
            units = min(units, cost - reported)
            reported += units
            report(units)

        found = _found(run, cell, kind, victims, advance)
        advance(cost)
        attempts = [_attempts(cell, victim, one) for victim, one in zip(victims, found, strict=True)]
        told = [{name: getattr(one, name) for name in ("loss", "status", "error", "iterations")} for one in found]
        told = [values | {"restart": one.restart if one.restart_iterations is not None else 0} for values, one in zip(told, found, strict=True)]
        meta = {"mark": mark(run, cell), "seconds": time.perf_counter() - began, "told": told, "attempts": sum(attempts, [])}
        save_file(path, {name: torch.stack([getattr(one, name).cpu() for one in found]) for name in ("images", "labels")}, meta)

    return Task(f"{cell.label} {victims.start}", cost, path, do)


def _found(run: Run, cell: Cell, kind: _Kind, victims: range, report: Callable[[float], None]) -> list[Reconstruction]:
    """One for each victim. Where an attack on several raises, each is attacked by itself: it may be the fault of one alone."""
    invert = _or_why(lambda: kind.prepare(run, cell))

    def inverted(some: Sequence[int]) -> list[Reconstruction] | str:
        return invert if isinstance(invert, str) else _or_why(lambda: sound(invert(some, report)))

    parts = [(victims, inverted(victims))]
    if isinstance(parts[0][1], str) and len(victims) > 1:
        parts = [([victim], inverted([victim])) for victim in victims]
    errors = [text for _, text in parts if isinstance(text, str)]
    for text in dict.fromkeys(errors):
        run.console.notice(f"{cell.label}: {errors.count(text)} attacks failed: {text}")
    return [one for some, result in parts for one in (failures(cell, result, some) if isinstance(result, str) else result)]


def _or_why(do: Callable[[], Found]) -> Found | str:
    """What it returns, or why there is nothing."""
    try:
        return do()
    except StorageError:
        raise
    except Exception as error:  # of the model's code or the device: these attacks failed, which is a result; the others go on
        return worded(error)


def _attempts(cell: Cell, victim: int, one: Reconstruction) -> list[dict[str, Any]]:
    """One per start. Of the start that was kept, the loss is that of the result."""
    found = []
    for start in range(getattr(cell.attack, "restarts", 1)):
        attempt = {"observation": victim, "start": start, "iterations": one.iterations, "status": one.status, "error": one.error, "loss": one.loss, "fit": one.fit}
        if one.restart_iterations is not None:
            attempt["iterations"] = int(one.restart_iterations[start])
            if start != one.restart and one.status == "ok":
                attempt["loss"] = float(one.restart_losses[start])
                if not math.isfinite(attempt["loss"]):
                    attempt |= {"status": "failed", "error": "no latent was found from this start: its loss became infinite"}
        found.append(attempt)
    return found


def collect(run: Run, cell: Cell) -> None:
    """Read a cell's results from the files of whoever computed them."""
    source = cell.twin or cell
    own = mark(run, source)
    cell.reconstructions, cell.attempts = [], []
    for victims in _slices(source, _kind(source)):
        tensors, meta = load_marked(_path(source, victims), own)
        cell.seconds += meta["seconds"] if cell.twin is None else 0.0
        cell.reconstructions += [
            Reconstruction(images=images, labels=labels, losses=torch.zeros(1), **told)
            for images, labels, told in zip(tensors["images"], tensors["labels"], meta["told"], strict=True)
        ]
        cell.attempts += [{**attempt, "seconds": meta["seconds"] / len(meta["attempts"]), "mark": own[:16]} for attempt in meta["attempts"]]
    if isinstance(cell.attack, config.LatentDecoding):
        cell.note = "; ".join(filter(None, (note_of(run, cell.trained, cell.attack, progress=cell.snapshot.progress), _residual(cell))))


def _residual(cell: Cell) -> str:
    """How well the latents that were read explain the update, and whether that determines them."""
    losses, predictor = sorted(one.loss for one in cell.reconstructions if one.status == "ok"), Predictor(cell.trained.training.defence.model)
    said = [f"its latents' gradients are {losses[len(losses) // 2]:.0e} from the update, {losses[-1]:.0e} at most"] if losses else []
    if (sought := cell.reconstructions[0].labels.numel() * math.prod(predictor.latent_shape)) > predictor.told:
        said.append(f"which has {predictor.told:,} numbers for the latents' {sought:,}: it does not determine them")
    return ", ".join(said)


def _path(cell: Cell, victims: range) -> Path:
    return cell.folder / f"reconstructed-{victims.start:05d}-{len(victims):03d}.safetensors"


def without_closed_form(run: Run, cells: list[Cell]) -> dict[str, str]:
    """By defence, why A4 has nothing to go by in its model and what is released of it."""
    found: dict[str, str] = {}
    for cell in cells:
        if not isinstance(cell.attack, config.Analytic) or cell.defence in found:
            continue
        model = copy.deepcopy(cell.trained.training.defence.model).cpu()
        names = [name for name, _ in model.named_parameters() if name in cell.snapshot.params]
        try:
            size = run.recipe.evaluation.batch_size * observe.members(run, cell.trained)
            found[cell.defence] = can_invert(model, names, image_shape=run.setting.dataset.image_shape, num_examples=size).reason
        except Exception:  # of the model's code: the attack runs into it too, and is a row with that error
            found[cell.defence] = ""
    return {defence: reason for defence, reason in found.items() if reason}


def _analytic(run: Run, cell: Cell) -> fits.Invert:
    """A4, on everything that is released."""
    dataset, defence = run.setting.dataset, cell.trained.training.defence
    model = copy.deepcopy(defence.model).cpu()
    names = dict(model.named_parameters())
    params = {n: t.cpu() for n, t in cell.snapshot.params.items() if n in names}
    load_parameters(model, {**defence.initial_model(), **params})

    def one(victim: int) -> Reconstruction:
        labels = cell.victims.all_labels(victim)
        seen = observe.as_gradient(run.recipe.evaluation, {n: t.cpu() for n, t in cell.victims.updates[victim].items() if n in names})
        granted = labels.cpu() if cell.attack.labels == "known" else None
        observation = Observation(params, seen, len(labels), labels=granted, scaled=observe.scale_told(cell.trained, cell.victims, victim))
        return analytic(observation, model, image_shape=dataset.image_shape, num_classes=dataset.num_classes)

    return _one_by_one(one)


class _Behind(nn.Module):
    """A client's model behind the imprint block that a malicious server put before it: parameters under the names of both, the block's first."""

    def __init__(self, block: Imprinted, model: nn.Module) -> None:
        super().__init__()
        self.imprint, self._parts = block.imprint, (block, model)
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, images: Tensor, *inputs: Tensor | None) -> Tensor:
        block, model = self._parts
        return model(block(images), *inputs)


def _imprinted(run: Run, cell: Cell) -> fits.Invert:
    """A11: the clients compute their gradient with the imprint block before their model; all of it goes through the defence, and no label is granted. Or a
    delta, in whose steps block and model move, with the sparse block, of which a row goes on seeing the images of its own bin alone. Where the server sees
    sums alone, every client of the cohort does so, and the bins are read off the mean: they hold everybody's images as those of one larger batch."""
    dataset, bins, defence, evaluation = run.setting.dataset, cell.attack.bins, cell.trained.training.defence, run.recipe.evaluation
    delta = evaluation.release == "delta"
    block = Imprinted(nn.Identity(), image_shape=dataset.image_shape, bins=bins, sparse=delta).requires_grad_(False).to(run.world.device)
    public = dataset.val.images.to(torch.float32) / 255
    crafted = craft(dict(block.named_parameters()), public=public, seed=cell.seed, gain=GAIN if delta else 1.0)
    sent = {name: tensor.to(run.world.device) for name, tensor in crafted.items()}
    of_model = [name for name in observe.ordered(cell.trained, cell.snapshot) if not name.startswith(DECODER)]  # the classifier's last, for the labels
    weights = {**sent, **{name: cell.snapshot.params[name] for name in of_model}}
    simulate = defence.simulator(terms="utility", progress=cell.snapshot.progress)()
    behind = _Behind(block, copy.deepcopy(defence.model))

    def loss(own: dict[str, Tensor], known: dict[str, Tensor], x: Tensor, y: Tensor, e: Tensor | None) -> Tensor:
        known = {**known, **{name: tensor for name, tensor in own.items() if name not in weights}}  # of a delta, a private front that has moved
        return simulate.loss({name: own[name] for name in of_model}, known, functional_call(block, {name: own[name] for name in sent}, (x,)), y, e)

    def leaves(owner: int, images: Tensor, labels: Tensor, noise: Tensor | None, private: Tensors, batch: int | str) -> Tensors:
        images, targets = observe.trained_on(run, cell.trained, cell.snapshot, images, labels, owner=owner, private=private, batch=batch, seed=cell.seed)
        known = {**private, **cell.snapshot.params}
        drawn = generator(cell.seed, "imprint-steps", cell.snapshot.name, batch)
        step = defence.stepped(lambda: grad(loss), generator=drawn)()
        step = observe.local_training(evaluation, step, moving=observe.trained_names(cell.trained)) if delta else step
        update = step(weights, known, images, targets, noise)
        own = observe.at_hand(run, behind, {**known, **weights}, images, targets.argmax(1))
        return defence.share({name: tensor.detach() for name, tensor in update.items()}, generator=drawn, own=own)

    def one(victim: int) -> Reconstruction:
        victims = cell.victims
        update = leaves(victims.owners[victim], victims.images[victim], victims.labels[victim], victims.noise[victim], victims.private[victim], victim)
        if victims.company:
            beside = victims.company[victim]
            everybody = zip(beside.owners, beside.images, beside.labels, beside.noise, beside.private, strict=True)
            others = [leaves(*each, f"{victim} beside {each[0]}") for each in everybody]
            update = {name: torch.stack([tensor, *(other[name] for other in others)]).mean(0) for name, tensor in update.items()}
        told = defence.keeps_scale(None if victims.company else update)
        observation = Observation(weights, update, len(victims.all_labels(victim)), kind=evaluation.release, scaled=told)
        return invert_imprint(observation, image_shape=dataset.image_shape, num_classes=dataset.num_classes, sparse=delta)

    return _one_by_one(one)


def _one_by_one(one: Callable[[int], Reconstruction]) -> fits.Invert:
    def invert(victims: Sequence[int], report: Callable[[float], None]) -> list[Reconstruction]:
        found = []
        for victim in victims:
            report(0.0)
            found.append(one(victim))
        return found

    return invert


KINDS = {
    config.Analytic: _Kind(_analytic, 4, lambda cell, victims: 10.0 * victims),
    config.ImprintServer: _Kind(_imprinted, 8, lambda cell, victims: 10.0 * victims),
    config.LearnedInversion: _Kind(fits.learned, 64, lambda cell, victims: float(victims)),
    config.LatentDecoding: _Kind(fits.latent, fits.LATENTS_AT_ONCE, fits.latent_cost),
}
"""By the attack's type."""


def _kind(cell: Cell) -> _Kind | None:
    """Of a subclass, that of the attack which it changes; None for what the engine runs, or a decoder of given latents."""
    return None if cell.matches else next((kind for attack, kind in KINDS.items() if isinstance(cell.attack, attack)), None)
