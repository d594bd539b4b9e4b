"""Attacks that do not search by matching: closed forms, a malicious server's imprint, networks that were trained beforehand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

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
from gidef.types import Observation, Reconstruction

GAIN = 0.1
"""Of the imprint block's pattern where clients take several steps, in which its weights are hardly to move."""
Invert = Callable[[Run, Cell, Callable[[float], None]], list[Reconstruction]]
"""invert(run, cell, report): what an attack makes of all of a cell's observations; it reports often, so that it can be stopped."""


def tasks(run: Run, cells: list[Cell]) -> list[Task]:
    """One per cell that has such an attack."""
    attacks: dict[type, tuple[Invert, Callable[[Cell], float]]] = {
        config.Analytic: (_analytic, lambda cell: 100.0),
        config.ImprintServer: (_imprinted, lambda cell: 100.0),
        config.LearnedInversion: (fits.learned, lambda cell: 50.0),
        config.LatentDecoding: (fits.latent, lambda cell: float(cell.attack.iterations)),
    }
    found = []
    for cell in cells:
        if type(cell.attack) in attacks:
            invert, cost = attacks[type(cell.attack)]
            found.append(Task(cell.label, cost(cell), _path(cell), _doer(run, cell, invert)))
    return found


def _doer(run: Run, cell: Cell, invert: Invert) -> Callable[..., None]:
    def do(worker: int, report: Callable[[float], None]) -> None:
        began = time.perf_counter()
        try:
            found = sound(invert(run, cell, report))
        except StorageError:
            raise
        except Exception as error:  # of the model's code or the device: this attack failed, which is a result; the others go on
            text = worded(error)
            run.console.notice(f"{cell.label}: the attack failed: {text}")
            found = failures(cell, text)
        tensors = {"images": torch.stack([one.images for one in found]), "labels": torch.stack([one.labels for one in found])}
        told = [{"loss": one.loss, "status": one.status, "error": one.error} for one in found]
        save_file(_path(cell), {name: tensor.cpu() for name, tensor in tensors.items()}, {"mark": mark(run, cell), "seconds": time.perf_counter() - began, "told": told})

    return do


def collect(run: Run, cell: Cell) -> None:
    """Read a cell's results from the file of whoever computed them."""
    source = cell.twin or cell
    tensors, meta = load_marked(_path(source), mark(run, source))
    cell.seconds += meta["seconds"] if cell.twin is None else 0.0
    cell.reconstructions = [
        Reconstruction(images=images, labels=labels, losses=torch.zeros(1), **told)
        for images, labels, told in zip(tensors["images"], tensors["labels"], meta["told"], strict=True)
    ]
    if isinstance(cell.attack, config.LatentDecoding):
        cell.note = "; ".join(filter(None, (note_of(run, cell.trained, cell.attack), _residual(cell))))
    own = mark(run, source)[:16]
    cell.attempts = [{"observation": number, "start": 0, "mark": own, **told} for number, told in enumerate(meta["told"])]


def _residual(cell: Cell) -> str:
    """How well the latents that were read explain the update, and whether that determines them."""
    losses, predictor = sorted(one.loss for one in cell.reconstructions if one.status == "ok"), Predictor(cell.trained.training.defence.model)
    said = [f"its latents' gradients are {losses[len(losses) // 2]:.0e} from the update, {losses[-1]:.0e} at most"] if losses else []
    if (sought := cell.victims.labels.shape[1] * math.prod(predictor.latent_shape)) > predictor.told:
        said.append(f"which has {predictor.told:,} numbers for the latents' {sought:,}: it does not determine them")
    return ", ".join(said)


def _path(cell: Cell) -> Path:
    return cell.folder / "reconstructed.safetensors"


def without_closed_form(run: Run, cells: list[Cell]) -> dict[str, str]:
    """By defence, why A4 has nothing to go by in its model and what is released of it."""
    found: dict[str, str] = {}
    for cell in cells:
        if not isinstance(cell.attack, config.Analytic) or cell.defence in found:
            continue
        model = copy.deepcopy(cell.trained.training.defence.model).cpu()
        names = [name for name, _ in model.named_parameters() if name in cell.snapshot.params]
        try:
            found[cell.defence] = can_invert(model, names, image_shape=run.setting.dataset.image_shape, num_examples=run.recipe.evaluation.batch_size).reason
        except Exception:  # of the model's code: the attack runs into it too, and is a row with that error
            found[cell.defence] = ""
    return {defence: reason for defence, reason in found.items() if reason}


def _analytic(run: Run, cell: Cell, report: Callable[[float], None]) -> list[Reconstruction]:
    """A4, on everything that is released."""
    dataset, victims = run.setting.dataset, cell.victims
    model = copy.deepcopy(cell.trained.training.defence.model).cpu()
    names = dict(model.named_parameters())
    found = []
    for update, labels in zip(victims.updates, victims.labels, strict=True):
        report(100.0 / len(victims.updates))
        params, seen = ({n: t.cpu() for n, t in tensors.items() if n in names} for tensors in (cell.snapshot.params, update))
        granted = labels.cpu() if cell.attack.labels == "known" else None
        observation = Observation(params, seen, len(labels), kind=run.recipe.evaluation.release, labels=granted)
        load_parameters(model, {**cell.trained.training.defence.initial_model(), **params})
        found.append(analytic(observation, model, image_shape=dataset.image_shape, num_classes=dataset.num_classes))
    return found


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


def _imprinted(run: Run, cell: Cell, report: Callable[[float], None]) -> list[Reconstruction]:
    """A11: the clients compute their gradient with the imprint block before their model; all of it goes through the defence, and no label is granted. Or a
    delta, in whose steps block and model move, with the sparse block, of which a row goes on seeing the images of its own bin alone."""
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
        return simulate.loss({name: own[name] for name in of_model}, known, functional_call(block, {name: own[name] for name in sent}, (x,)), y, e)

    victims, found = cell.victims, []
    for images, labels, owner, noise, private in zip(victims.images, victims.labels, victims.owners, victims.noise, victims.private, strict=True):
        report(100.0 / len(victims.updates))
        images, targets = observe.trained_on(
            run, cell.trained, cell.snapshot, images, labels, owner=owner, private=private, batch=len(found), seed=cell.seed
        )  # fmt: skip
        known = {**private, **cell.snapshot.params}
        drawn = generator(cell.seed, "imprint-steps", cell.snapshot.name, len(found))
        step = defence.stepped(lambda: grad(loss), generator=drawn)()
        step = observe.local_training(run, step) if delta else step
        update = step(weights, known, images, targets, noise)
        own = observe.at_hand(run, behind, {**known, **weights}, images, targets.argmax(1))
        update = defence.share({name: tensor.detach() for name, tensor in update.items()}, generator=drawn, own=own)
        observation = Observation(weights, update, len(labels), kind=evaluation.release)
        found.append(invert_imprint(observation, image_shape=dataset.image_shape, num_classes=dataset.num_classes, sparse=delta))
    return found
