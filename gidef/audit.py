"""The evaluation: every (defence, seed, checkpoint, attack) is a cell; what is computed, by whom, and how it is scored.

Attackers get observations (see `observe`); the truth stays here. Work is cut into independent tasks with results in
files, so that ranks and threads share it out and a stopped run takes it up again.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gidef import attack as attacks
from gidef import build, config, metrics, observe
from gidef.checkpoint import load_file, save_file
from gidef.clients.local import load_parameters
from gidef.clients.participate import DECODER
from gidef.data import Images
from gidef.errors import InputError
from gidef.fit import fit_decoder, fit_judge
from gidef.models import decoder_for, make_judge
from gidef.parallel import run_tasks
from gidef.report import attack_curves, grid
from gidef.rng import generator, stream_seed
from gidef.scores import MEASURES, Scorer, measured
from gidef.training import Run, Snapshot, Trained, fronts, run_key
from gidef.types import Reconstruction, Tensors

ATTACK_ID = {config.NaiveMatching: "A0", config.InvertingGradients: "A0", config.JointMatching: "A3", config.PostHocDecoder: "A12"}
SURROGATE_STEPS = 600


@dataclass(frozen=True, slots=True)
class Findings:
    """The parts of results.json that the evaluation fills; see the docstring of gidef.report."""

    rows: list[dict[str, Any]]
    bounds: list[dict[str, Any]]
    judge: dict[str, Any]
    pictures: list[str]
    seconds: dict[str, float]


@dataclass(slots=True)
class Cell:
    """One entry of the table for one seed. `twin`: another cell with the same computation, whose result serves for both."""

    defence: str
    seed: int
    checkpoint: str
    name: str
    attack: Any
    trained: Trained
    snapshot: Snapshot
    folder: Path
    note: str = ""
    twin: Cell | None = None
    victims: observe.Victims | None = None
    reconstructions: list[Any] = field(default_factory=list)
    in_loop_psnr_db: float | None = None
    """Of the decoder that the clients trained against, beside a post-hoc one."""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.defence} / {self.name} / {self.checkpoint} / seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Task:
    """cost: in iterations of work, for the division over ranks and for the progress bar.  do: do(worker, report(units))."""

    name: str
    cost: float
    path: Path
    do: Callable[[int, Callable[[float], None]], None]


def effort(attack: Any) -> str:
    """An attack's budget in words."""
    if isinstance(attack, config.PostHocDecoder):
        return f"{attack.steps} decoder steps"
    return f"{attack.iterations} iterations, {attack.restarts} start{'s' if attack.restarts > 1 else ''}"


def audit(run: Run, trained: dict[tuple[str, int], Trained], *, folder: Path, pictures: Path | None = None) -> Findings:
    """Attack every cell, score it, draw it. Every rank calls this together; rank 0 gets the findings, the others empty ones."""
    pictures = pictures or run.folder / "pictures"
    cells = _cells(run, trained, folder)
    judge_path = folder / f"judge-{_roles_mark(run)}.safetensors"
    fits, tasks = [_judge_task(run, judge_path)], []
    released: dict[tuple[str, int, str], observe.Victims] = {}
    for cell in cells:
        key = cell.defence, cell.seed, cell.checkpoint
        if key not in released:  # all attacks see the same updates
            released[key] = observe.release(run, cell.trained, cell.snapshot, seed=cell.seed)
        cell.victims = released[key]
        if cell.twin is None and isinstance(cell.attack, config.PostHocDecoder):
            fits.append(_decoder_task(run, cell))
        elif cell.twin is None and getattr(cell.attack, "decoder", None) == "surrogate" and _keeps_decoder(run, cell.trained):
            fits.append(_surrogate_task(run, cell))
    _work(run, fits, "fit judge and decoders: step")
    for cell in cells:
        if cell.twin is None and not isinstance(cell.attack, config.PostHocDecoder):
            tasks += _matching_tasks(run, cell)
    _work(run, tasks, "attack: iteration")
    if not run.leads:
        return Findings([], [], {}, [], {})
    judge = _load_judge(run, judge_path)
    for cell in cells:
        _collect(run, cell)
    scorer = Scorer(run, judge)
    scored = {id(cell): scorer.score(cell.victims, cell.reconstructions) for cell in cells}
    for cell in cells:
        _record(run, cell, scored[id(cell)])
    rows = _rows(run, cells, scored)
    drawn = _draw(run, cells, scored, scorer, pictures)
    seconds = {cell.label: cell.seconds for cell in cells}
    return Findings(rows, scorer.bounds(), scorer.judge_record(), drawn, seconds)


# --- cells -----------------------------------------------------------------------------------------------------------


def _cells(run: Run, trained: dict[tuple[str, int], Trained], folder: Path) -> list[Cell]:
    cells: list[Cell] = []
    for (defence, seed), one in trained.items():
        noisy = one.training.defence.noise_shape is not None
        for checkpoint in run.recipe.evaluation.checkpoints:
            here: list[Cell] = []
            for name, attack in run.recipe.attacks.items():
                if isinstance(attack, config.PostHocDecoder) and not noisy:
                    continue  # without noise on it, a latent gives the image away by construction
                place = folder / run_key(defence, seed) / checkpoint / name
                cell = Cell(defence, seed, checkpoint, name, attack, one, one.snapshots[checkpoint], place)
                if isinstance(attack, config.JointMatching):
                    cell.note = _note(run, one, attack)
                    if not noisy and run.recipe.share_policy != "head":  # under `head` the joint attack alone is given the private front
                        cell.twin = next((other for other in here if _same_work(other.attack, attack)), None)
                here.append(cell)
            cells += here
    return cells


def _keeps_decoder(run: Run, one: Trained) -> bool:
    """Whether clients have a decoder that the server does not see."""
    return one.training.defence.decoder is not None and run.recipe.share_policy != "all"


def _note(run: Run, one: Trained, attack: config.JointMatching) -> str:
    """What sets a joint attack apart, above all what it is granted beyond the threat model."""
    said = ["no noise to search"] if one.training.defence.noise_shape is None else []
    if run.recipe.share_policy == "head":
        said.append("private front known: a bound")
    if _keeps_decoder(run, one):
        words = {"known": "private decoder known: a bound", "surrogate": "decoder guessed from public data", "unused": "predictor only"}
        said.append(words[attack.decoder])
    return "; ".join(said)


def _same_work(naive: Any, joint: config.JointMatching) -> bool:
    """Whether the joint attack, without noise to search, is the naive one."""
    shared = [spec.name for spec in dataclasses.fields(config.NaiveMatching)]
    return isinstance(naive, config.NaiveMatching) and all(getattr(naive, name) == getattr(joint, name) for name in shared)


def _roles_mark(run: Run) -> str:
    """Names the judge by what it was trained on."""
    roles, epochs = run.setting.roles, run.recipe.evaluation.judge_epochs
    return hashlib.sha256(f"{run.fingerprint}|{epochs}|{roles.judge.tolist()}".encode()).hexdigest()[:12]


def _mark(run: Run, cell: Cell) -> str:
    """Of everything that a cell's saved result depends on."""
    evaluation = config.to_json(run.recipe.evaluation)
    text = json.dumps([run.fingerprint, config.to_json(cell.attack), evaluation, cell.defence, cell.seed, cell.checkpoint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- tasks -----------------------------------------------------------------------------------------------------------


def _work(run: Run, tasks: list[Task], label: str) -> None:
    """Do the tasks over ranks and threads with one bar; finished ones (their file is there) are left as they are."""
    names = run.world.broadcast_json([task.path.exists() for task in tasks])
    tasks = [task for task, there in zip(tasks, names, strict=True) if not there]
    if not tasks:
        return
    total = sum(task.cost for task in tasks)
    lock, done = threading.Lock(), 0.0
    share = max(1.0, total / run.world.size)  # this rank's part, for the time left
    with run.console.track(label, int(share)) as bar:

        def report(units: float) -> None:
            nonlocal done
            with lock:
                done += units
                bar.update(int(min(done, share)))

        run_tasks(
            run.world, tasks, [task.cost for task in tasks], lambda task, worker: task.do(worker, report),
            workers=build.num_workers(run.recipe, run.world), threads=run.recipe.speed.threads, name=lambda task: task.name,
        )  # fmt: skip


def _judge_task(run: Run, path: Path) -> Task:
    setting, recipe = run.setting, run.recipe
    rows = setting.roles.judge
    train = Images(setting.dataset.train.images[rows], setting.dataset.train.labels[rows])
    steps = recipe.evaluation.judge_epochs * -(-len(train) // 64)

    def do(worker: int, report: Callable[[float], None]) -> None:
        judge = make_judge(setting.dataset.num_classes, setting.dataset.image_shape, seed=0).to(run.world.device)
        before = 0
        for step in fit_judge(judge, train, epochs=recipe.evaluation.judge_epochs, seed=0):
            report(step - before)
            before = step
        save_file(path, dict(judge.state_dict()), {"fingerprint": run.fingerprint})

    return Task("judge", steps, path, do)


def _load_judge(run: Run, path: Path) -> torch.nn.Module:
    judge = make_judge(run.setting.dataset.num_classes, run.setting.dataset.image_shape, seed=0).to(run.world.device)
    judge.load_state_dict(load_file(path, run.world.device)[0])
    return judge.eval()


def _public_latents(run: Run, cell: Cell) -> Callable[[Tensor, torch.Generator, int], Tensor]:
    """latents(images, generator, step): z̃ of public images through the front at hand; under `head` the owners' fronts in turn."""
    training = cell.trained.training
    training.participation.versions = dict(cell.snapshot.versions)
    models = []
    for tensors in fronts(training, cell.snapshot.params, sorted(set(cell.victims.owners))):
        model = copy.deepcopy(training.defence.model)
        load_parameters(model, tensors)
        models.append(model.eval())

    def latents(images: Tensor, noise: torch.Generator, step: int) -> Tensor:
        drawn = training.defence.draw_noise(len(images), generator=noise)
        return models[step % len(models)].run(images, drawn).perturbed

    return latents


def _decoder_task(run: Run, cell: Cell) -> Task:
    """A12: fit on public images, then decode the victims' own perturbed latents (their client's front, fresh noise)."""
    path = cell.folder / "decoded.safetensors"
    latents = _public_latents(run, cell)

    def do(worker: int, report: Callable[[float], None]) -> None:
        began, dataset, training = time.perf_counter(), run.setting.dataset, cell.trained.training
        model = copy.deepcopy(training.defence.model)
        decoder = decoder_for(
            model.latent_shape, model.channel_dim, dataset.image_shape, size="posthoc", seed=stream_seed(cell.seed, "post-hoc decoder") % 2**31
        ).to(run.world.device)
        public = dataset.val.to(run.setting.clients[0].images.device)
        before, settings = 0, cell.attack
        for step in fit_decoder(decoder, latents, public, steps=settings.steps, seed=cell.seed, batch_size=settings.batch_size, lr=settings.lr):
            report(step - before)
            before = step
        in_loop = copy.deepcopy(training.defence.decoder)
        images, guesses = [], []
        with torch.no_grad():
            for batch, private in zip(cell.victims.images, cell.victims.private, strict=True):
                held = {**private, **cell.snapshot.params}
                load_parameters(model, {n: t for n, t in held.items() if not n.startswith(DECODER)})
                noise = training.defence.draw_noise(len(batch), generator=generator(cell.seed, "given-latent", len(images), device=run.world.device))
                perturbed = model.run(batch, noise).perturbed
                images.append(decoder(perturbed).clamp(0, 1).cpu())
                if in_loop is not None:  # the opponent that the client trained against, for the gap
                    load_parameters(in_loop, {n.removeprefix(DECODER): t for n, t in held.items() if n.startswith(DECODER)})
                    guesses.append(in_loop(perturbed).clamp(0, 1).cpu())
        saved = {"images": torch.stack(images)} | ({"in_loop": torch.stack(guesses)} if guesses else {})
        save_file(path, saved, {"mark": _mark(run, cell), "seconds": time.perf_counter() - began})

    return Task(cell.label, cell.attack.steps, path, do)


def _surrogate_path(cell: Cell) -> Path:
    return cell.folder / "surrogate.safetensors"


def _surrogate_task(run: Run, cell: Cell) -> Task:
    """The attacker's own decoder of the in-loop kind, fitted on public images."""
    latents = _public_latents(run, cell)

    def do(worker: int, report: Callable[[float], None]) -> None:
        decoder = copy.deepcopy(cell.trained.training.defence.decoder)
        before = 0
        for step in fit_decoder(decoder, latents, run.setting.dataset.val, steps=SURROGATE_STEPS, seed=stream_seed(cell.seed, "surrogate") % 2**31):
            report(step - before)
            before = step
        save_file(_surrogate_path(cell), {DECODER + name: p for name, p in decoder.named_parameters()}, {"mark": _mark(run, cell)})

    return Task(f"{cell.label}: surrogate", SURROGATE_STEPS, _surrogate_path(cell), do)


def _matching(run: Run, cell: Cell) -> attacks.Matching:
    """The attack's settings for the engine."""
    fields = {spec.name for spec in dataclasses.fields(attacks.Matching)}
    own = {spec.name: getattr(cell.attack, spec.name) for spec in dataclasses.fields(cell.attack) if spec.name in fields}
    shape = observe.noise_shape(run, cell.trained) if isinstance(cell.attack, config.JointMatching) else None
    dataset = run.setting.dataset
    return attacks.Matching(image_shape=dataset.image_shape, num_classes=dataset.num_classes, noise_shape=shape, **own)


def _matching_tasks(run: Run, cell: Cell) -> list[Task]:
    """One task per chunk of attacks, each with a result file of its own."""
    speed, matching = run.recipe.speed, _matching(run, cell)
    terms = observe.terms(cell.attack, run.recipe.evaluation.released_loss)
    make = observe.observed_simulator(run, cell.trained, cell.snapshot, terms=terms)
    surrogate = _load_marked(_surrogate_path(cell), _mark(run, cell))[0] if _surrogate_path(cell).exists() else None
    seen = observe.observations(run, cell.trained, cell.snapshot, cell.attack, cell.victims, surrogate=surrogate)

    def task(number: int, chunk: attacks.Chunk) -> Task:
        path = cell.folder / f"chunk-{speed.attacks_at_once}-{number:04d}.safetensors"

        def do(worker: int, report: Callable[[float], None]) -> None:
            began, before = time.perf_counter(), 0
            running = attacks.run_chunk(chunk, seen, make(), matching, seed=cell.seed, mode=speed.attack_mode, device=run.world.device)
            while True:
                try:
                    progress = next(running)
                except StopIteration as end:
                    result = end.value
                    break
                report((progress.iteration - before) * len(chunk))
                before = progress.iteration
            save_file(path, result, {"mark": _mark(run, cell), "seconds": time.perf_counter() - began})

        return Task(f"{cell.label} {number}", matching.iterations * len(chunk), path, do)

    return [task(number, chunk) for number, chunk in enumerate(attacks.plan(len(seen), matching.restarts, speed.attacks_at_once))]


def _load_marked(path: Path, mark: str) -> tuple[Tensors, dict[str, Any]]:
    """A task's result file, which must be of this recipe, victims and attack."""
    tensors, meta = load_file(path)
    if meta["mark"] != mark:
        raise InputError(f"{path} is of another recipe: remove {path.parent}, or choose another --out.")
    return tensors, meta


def _collect(run: Run, cell: Cell) -> None:
    """Read a cell's results from the files of whoever computed them."""
    source = cell.twin or cell
    mark = _mark(run, source)

    def read(path: Path) -> Tensors:
        tensors, meta = _load_marked(path, mark)
        cell.seconds += meta["seconds"] if cell.twin is None else 0.0
        return tensors

    if isinstance(cell.attack, config.PostHocDecoder):
        tensors = read(cell.folder / "decoded.safetensors")
        images = tensors["images"]
        if "in_loop" in tensors:
            truth = cell.victims.images.flatten(0, 1).cpu()
            cell.in_loop_psnr_db = float(metrics.psnr_db(tensors["in_loop"].flatten(0, 1), truth).mean())
        cell.reconstructions = [
            Reconstruction(images=batch, labels=labels.cpu(), loss=0.0, losses=torch.zeros(1)) for batch, labels in zip(images, cell.victims.labels, strict=True)
        ]
        return
    paths = sorted(source.folder.glob(f"chunk-{run.recipe.speed.attacks_at_once}-*.safetensors"))
    cell.reconstructions = attacks.select([read(path) for path in paths], len(cell.victims.rows))


# --- rows, record, pictures ------------------------------------------------------------------------------------------


def _threat(run: Run, cell: Cell) -> dict[str, Any]:
    """The threat model in words and numbers, for the row."""
    evaluation = run.recipe.evaluation
    return {
        "server": "honest but curious", "release": evaluation.release, "batch_size": evaluation.batch_size,
        "local_steps": evaluation.local_steps, "released_loss": evaluation.released_loss,
        "round": cell.snapshot.round, **{name: getattr(cell.attack, name) for name in ("labels", "decoder") if hasattr(cell.attack, name)},
    }  # fmt: skip


def _rows(run: Run, cells: list[Cell], scored: dict[int, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """One row per (defence, attack, checkpoint): seeds are pooled by averaging each victim's values, so that intervals are over victims."""
    rows = []
    for key in dict.fromkeys((cell.defence, cell.checkpoint, cell.name) for cell in cells):
        group = [cell for cell in cells if (cell.defence, cell.checkpoint, cell.name) == key]
        first = group[0]
        values = {name: torch.stack([scored[id(cell)][name] for cell in group]).mean(0) for name in (*MEASURES, "recovered", "oracle_psnr_db")}
        failed = sum(found.status == "failed" for cell in group for found in cell.reconstructions)
        accuracies = [cell.trained.summary["test_accuracy"] for cell in group]
        gap = [cell.in_loop_psnr_db for cell in group if cell.in_loop_psnr_db is not None]
        note = first.note or (f"the clients' own decoder reaches {sum(gap) / len(gap):.1f} dB" if gap else "")
        budget = {name: getattr(first.attack, name) for name in ("iterations", "restarts", "steps") if hasattr(first.attack, name)}
        rows.append({
            "defence": first.defence, "attack": first.name, "attack_id": ATTACK_ID[type(first.attack)], "checkpoint": first.checkpoint,
            "seeds": [cell.seed for cell in group], "share_policy": run.recipe.share_policy, "threat": _threat(run, first),
            "victims": first.victims.rows.numel(), "failed": failed, "client_accuracy": sum(accuracies) / len(accuracies),
            "client_accuracies": accuracies, **{name: measured(values[name], name, seed=0) for name in MEASURES},
            "label_recovery": float(values["recovered"].mean()), "oracle_restart_psnr_db": float(values["oracle_psnr_db"].mean()),
            **budget, "seconds": sum(cell.seconds for cell in group), "note": note,
            **({"in_loop_psnr_db": sum(gap) / len(gap)} if gap else {}),
        })  # fmt: skip
    return rows


def _record(run: Run, cell: Cell, values: dict[str, Tensor]) -> None:
    """One line per victim."""
    size = cell.victims.labels.shape[1]
    for index, row in enumerate(cell.victims.rows.flatten().tolist()):
        found = cell.reconstructions[index // size]
        run.append(
            "attack", defence=cell.defence, seed=cell.seed, checkpoint=cell.checkpoint, attack=cell.name, victim=row, batch=index // size,
            client=cell.victims.owners[index // size], status=found.status, error=found.error, loss=found.loss, restart=found.restart,
            **{name: float(values[name][index]) for name in MEASURES},
        )  # fmt: skip


def _draw(run: Run, cells: list[Cell], scored: dict[int, dict[str, Tensor]], scorer: Scorer, folder: Path) -> list[str]:
    """A contact sheet per checkpoint (private | each defence under each attack), most leaked victim first; and the attackers' losses."""
    drawn, title = [], run.setting.dataset.title
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in cells):
        here = [cell for cell in cells if cell.checkpoint == checkpoint and cell.seed == cells[0].seed]
        columns = [cell for cell in here if cell.twin is None]
        rows = columns[0].victims.rows.flatten()
        leaks = [scored[id(cell)]["psnr_db"] for cell in columns if not isinstance(cell.attack, config.PostHocDecoder)]
        order = torch.stack(leaks or [torch.zeros(len(rows))]).max(0).values.argsort(descending=True, stable=True)
        truth = columns[0].victims.images.flatten(0, 1).cpu()
        names = run.setting.dataset.class_names
        labels = columns[0].victims.labels.flatten().tolist()
        sheet = [("private", truth[order])]
        captions: list[list[str] | None] = [None]
        for cell in columns:
            sheet.append((f"{cell.defence}:\n{cell.name}", scored[id(cell)]["images"][order]))
            captions.append([f"{value:.1f} dB" for value in scored[id(cell)]["psnr_db"][order].tolist()])
        data = folder / f"reconstructions-{checkpoint}.safetensors"
        meta = {
            "titles": [name for name, _ in sheet], "captions": captions, "title": f"{title}: attacked at the {checkpoint} checkpoint",
            "row_labels": [f"{names[labels[i]]} #{int(rows[i])}" for i in order.tolist()],
        }  # fmt: skip
        save_file(data, {f"{number:03d}": images for number, (_, images) in enumerate(sheet)}, meta)
        drawn.append(_draw_sheet(data))
        losses = {f"{cell.defence}, {cell.name}": torch.stack([found.losses for found in cell.reconstructions]) for cell in columns
                  if not isinstance(cell.attack, config.PostHocDecoder)}  # fmt: skip
        if losses:
            attack_curves(folder / f"attack-losses-{checkpoint}.png", losses, title=f"{title}: the attackers' losses at the {checkpoint} checkpoint",
                          iterations={f"{cell.defence}, {cell.name}": cell.attack.iterations for cell in columns if hasattr(cell.attack, "iterations")})  # fmt: skip
            drawn.append(f"pictures/attack-losses-{checkpoint}.png")
    return drawn


def _draw_sheet(data: Path) -> str:
    """Draw a saved contact sheet; returns its path relative to the run."""
    tensors, meta = load_file(data)
    columns = [(title, tensors[f"{number:03d}"]) for number, title in enumerate(meta["titles"])]
    grid(data.with_suffix(".png"), columns, row_labels=meta["row_labels"], title=meta["title"], captions=meta["captions"])
    return f"pictures/{data.with_suffix('.png').name}"


def redraw(folder: Path) -> list[str]:
    """Draw a run's contact sheets again from their saved images."""
    return [_draw_sheet(data) for data in sorted((folder / "pictures").glob("reconstructions-*.safetensors"))]
