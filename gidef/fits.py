"""What the evaluator and the attackers train on images that no client holds, as tasks with results in files."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gidef import config, methods, metrics, observe
from gidef.attack.generative import fit_autoencoder, fit_gan
from gidef.attack.latent import STARTS, invert_latent
from gidef.attack.learned import fit_inverter, invert_learned, seen_length
from gidef.attack.predictor import Predictor
from gidef.attack.shadow import fit_shadow, front_latents
from gidef.attack.unmix import UNMIXED, most_steps
from gidef.cells import BLIND, Cell, Task, evaluated, mark
from gidef.checkpoint import load_file, save_file
from gidef.clients.local import load_parameters
from gidef.clients.participate import DECODER
from gidef.data import Images
from gidef.errors import StorageError
from gidef.evaluation import fronts
from gidef.fit import fit_decoder, fit_judge
from gidef.inversions import Unfit, failures, load_marked, sound, worded
from gidef.models import decoder_for, judge_called
from gidef.models.inverter import inverter_for
from gidef.models.prior import Generator, autoencoder_for, gan_for
from gidef.rng import generator, stream_seed
from gidef.runs import Run
from gidef.types import Observation, Reconstruction, Tensors

Invert = Callable[[Sequence[int], Callable[[float], None]], list[Reconstruction]]
"""invert(victims, report): what an attack makes of the observations of these numbers, one for each; it reports often, so that it can be stopped."""
LATENTS_AT_ONCE = 16
"""Observations of A5 in a task, and attacks in one program unless asked for otherwise."""
READ_AT_ONCE = 4
"""Observations in a task that reads their latents for A3."""


def _task(run: Run, name: str, what: str, cost: float, path: Path, own: str, fit: Callable[[Callable[[float], None]], Tensors], *, verb: str = "trained") -> Task:
    """A task that keeps what fit(report) returns under a mark, or why there is nothing: attacks that need it are failed rows then, and the others go on."""

    def do(worker: int, report: Callable[[float], None]) -> None:
        began, meta = time.perf_counter(), {"mark": own}
        try:
            tensors = fit(report)
        except StorageError:
            raise
        except Exception as error:  # of the model's code or the device
            tensors, meta["unfit"] = {}, f"{what} could not be {verb}: {worded(error)}"
            run.console.notice(f"{name}: {meta['unfit']}")
        save_file(path, tensors, {**meta, "seconds": time.perf_counter() - began})

    return Task(name, cost, path, do)


def _follow(running: Iterator[float], report: Callable[[float], None]) -> Any:
    """Run what yields the steps done, or the share that is over, to its end, and return what it returns."""
    before = 0
    while True:
        try:
            step = next(running)
        except StopIteration as end:
            return end.value
        report(step - before)
        before = step


# --- the judge -----------------------------------------------------------------------------------------------------------


def judge_path(run: Run, folder: Path, which: str | None = None) -> Path:
    """Named by what it is trained on. which: of `evaluation.judges`; None is the evaluator's own."""
    roles, epochs = run.setting.roles, run.recipe.evaluation.judge_epochs
    which = "" if which is None else "|{}@{}".format(*run.recipe.evaluation.judge_named(which))
    named = hashlib.sha256(f"{run.fingerprint}|{epochs}|{roles.judge.tolist()}{which}".encode()).hexdigest()[:12]
    return folder / f"judge-{named}.safetensors"


def judge_task(run: Run, path: Path, which: str | None = None) -> Task:
    setting, evaluation = run.setting, run.recipe.evaluation
    rows, epochs = setting.roles.judge, evaluation.judge_epochs if which is None else evaluation.judge_named(which)[1]
    train = Images(setting.dataset.train.images[rows], setting.dataset.train.labels[rows])
    steps = epochs * -(-len(train) // 64)

    def do(worker: int, report: Callable[[float], None]) -> None:
        judge = _new_judge(run, which)
        _follow(fit_judge(judge, train, epochs=epochs, seed=0), report)
        save_file(path, dict(judge.state_dict()), {"fingerprint": run.fingerprint})

    return Task("judge" if which is None else f"judge {which}", steps, path, do)


def load_judge(run: Run, path: Path, which: str | None = None) -> torch.nn.Module:
    judge = _new_judge(run, which)
    judge.load_state_dict(load_file(path, run.world.device)[0])
    return judge.eval()


def _new_judge(run: Run, which: str | None) -> torch.nn.Module:
    dataset, name = run.setting.dataset, "judge" if which is None else run.recipe.evaluation.judge_named(which)[0]
    return judge_called(name, num_classes=dataset.num_classes, image_shape=dataset.image_shape).to(run.world.device)


# --- decoders of the latent ----------------------------------------------------------------------------------------------


Latents = Callable[[Tensor, torch.Generator, int, Tensor], Any]
"""latents(images, generator, step, labels): what a decoder of public images is given."""


def _public_latents(run: Run, cell: Cell, *, game: bool = False) -> Latents:
    """z̃ of public images through the front at hand; under `head` the owners' fronts in turn. game: what the game's decoder is given."""
    training = cell.trained.training
    training.participation.versions = dict(cell.snapshot.versions)
    models, weights = [], list(fronts(training, {**cell.snapshot.params, **cell.snapshot.statistics}, sorted(set(cell.victims.owners))))
    for tensors in weights:
        model = copy.deepcopy(training.defence.model)
        load_parameters(model, tensors)
        models.append(model.eval())

    def latents(images: Tensor, noise: torch.Generator, step: int, labels: Tensor) -> Any:
        drawn, model = training.defence.draw_noise(len(images), generator=noise), models[step % len(models)]
        perturbed = model.run(images, drawn).perturbed
        return training.defence.given(model, weights[step % len(models)], images, labels, drawn, perturbed) if game else perturbed

    return _as_clients_do(run, cell, models, latents)


def _as_clients_do(run: Run, cell: Cell, models: list[nn.Module], latents: Latents) -> Latents:
    """The latents in batches of the victims' size, by their statistics, where clients normalise so."""
    if not cell.trained.training.participation.moves_statistics:
        return latents
    evaluation = run.recipe.evaluation
    size = evaluation.batch_size // (evaluation.local_steps if evaluation.release == "delta" else 1)
    for model in models:
        model.train()
    return lambda images, noise, step, labels: torch.cat([latents(part, noise, step, labels) for part in images.tensor_split(max(1, len(images) // size))])


def decoder_task(run: Run, cell: Cell) -> Task:
    """A12: fit on public images, then decode the victims' own perturbed latents (their client's front, fresh noise)."""
    path = cell.folder / "decoded.safetensors"
    latents = _public_latents(run, cell)

    def fit(report: Callable[[float], None]) -> Tensors:
        dataset, training, settings = run.setting.dataset, cell.trained.training, cell.attack
        model = copy.deepcopy(training.defence.model)
        decoder = decoder_for(
            model.latent_shape, model.channel_dim, dataset.image_shape, size="posthoc", seed=stream_seed(cell.seed, "post-hoc decoder") % 2**31
        ).to(run.world.device)
        public = dataset.val.to(run.setting.clients[0].images.device)
        _follow(fit_decoder(decoder, latents, public, steps=settings.steps, seed=cell.seed, batch_size=settings.batch_size, lr=settings.lr), report)
        in_loop = copy.deepcopy(training.defence.decoder)
        images, guesses = [], []
        with torch.no_grad():
            victims = cell.victims
            for batch, labels, owner, private in zip(victims.images, victims.labels, victims.owners, victims.private, strict=True):
                batch, targets = observe.trained_on(
                    run, cell.trained, cell.snapshot, batch, labels, owner=owner, private=private, batch=len(images), seed=cell.seed
                )  # fmt: skip
                held = {**private, **cell.snapshot.params}
                load_parameters(model, {n: t for n, t in held.items() if not n.startswith(DECODER)})
                noise = training.defence.draw_noise(len(batch), generator=generator(cell.seed, "given-latent", len(images)))
                noise = None if noise is None else noise.to(batch.device)
                perturbed = model.run(batch, noise).perturbed
                images.append(decoder(perturbed).clamp(0, 1).cpu())
                if in_loop is not None:  # the opponent that the client trained against, for the gap
                    load_parameters(in_loop, {n.removeprefix(DECODER): t for n, t in held.items() if n.startswith(DECODER)})
                    weights = {n: t for n, t in held.items() if not n.startswith(DECODER)}
                    guesses.append(in_loop(training.defence.given(model, weights, batch, targets, noise, perturbed)).clamp(0, 1).cpu())
        return {"images": torch.stack(images)} | ({"in_loop": torch.stack(guesses)} if guesses else {})

    return _task(run, cell.label, "the decoder", cell.attack.steps, path, mark(run, cell), fit)


def collect_decoded(run: Run, cell: Cell) -> None:
    """Read what a post-hoc decoder made of the latents. Its attempts' iterations are the steps of the decoder's training, which they share; 0 if that failed."""
    own = mark(run, cell.twin or cell)
    try:
        tensors, meta = load_marked((cell.twin or cell).folder / "decoded.safetensors", own)
    except Unfit as error:
        cell.reconstructions = failures(cell, worded(error))
        cell.attempts = _decodings(cell, seconds=0.0, iterations=0, own=own)
        return
    cell.seconds += meta["seconds"] if cell.twin is None else 0.0
    if "in_loop" in tensors and tensors["in_loop"].isfinite().all():
        truth = cell.victims.images.flatten(0, 1).cpu()
        cell.in_loop_psnr_db = float(metrics.psnr_db(tensors["in_loop"].flatten(0, 1), truth).mean())
    cell.reconstructions = sound([
        Reconstruction(images=batch, labels=labels.cpu(), loss=0.0, losses=torch.zeros(1))
        for batch, labels in zip(tensors["images"], cell.victims.labels, strict=True)
    ])
    cell.attempts = _decodings(cell, seconds=meta["seconds"], iterations=cell.attack.steps, own=own)


def _decodings(cell: Cell, *, seconds: float, iterations: int, own: str) -> list[dict[str, Any]]:
    """A12's attempts: one per observation, of its share of the seconds."""
    common = {"start": 0, "iterations": iterations, "fit": math.nan, "seconds": seconds / len(cell.reconstructions), "mark": own[:16]}
    return [
        {"observation": number, "status": one.status, "error": one.error, "loss": one.loss, **common} for number, one in enumerate(cell.reconstructions)
    ]


def surrogate_path(run: Run, cell: Cell) -> Path:
    """Shared by all attacks on one defence, seed and checkpoint whose guess is trained as long."""
    return cell.folder.parent / f"surrogate-{_surrogate_steps(cell)}.safetensors"


def _surrogate_steps(cell: Cell) -> int:
    """Of the guessed decoder's training; A3's for an attack of one's own that says nothing of it."""
    return getattr(cell.attack, "surrogate_steps", config.JointMatching().surrogate_steps)


def _surrogate_mark(run: Run, cell: Cell) -> str:
    named = f"{run.fingerprint}|{cell.defence}|{cell.seed}|{cell.checkpoint}|{_surrogate_steps(cell)}"
    return hashlib.sha256(named.encode()).hexdigest()


def surrogate_task(run: Run, cell: Cell) -> Task:
    """The attacker's own decoder of the in-loop kind, fitted on public images, at the level that clients train by, whatever a malicious server sends once."""
    honest = dataclasses.replace(cell, snapshot=cell.trained.snapshots[cell.checkpoint])
    latents, path, steps = _public_latents(run, honest, game=True), surrogate_path(run, cell), _surrogate_steps(cell)

    def fit(report: Callable[[float], None]) -> Tensors:
        decoder = copy.deepcopy(cell.trained.training.defence.decoder)
        _follow(fit_decoder(decoder, latents, run.setting.dataset.val, steps=steps, seed=stream_seed(cell.seed, "surrogate") % 2**31), report)
        return {DECODER + name: p for name, p in decoder.named_parameters()}

    return _task(run, f"{cell.label}: surrogate", "the surrogate decoder", steps, path, _surrogate_mark(run, cell), fit)


def surrogate(run: Run, cell: Cell) -> Tensors:
    """The surrogate decoder's tensors, as the clients name theirs."""
    return load_marked(surrogate_path(run, cell), _surrogate_mark(run, cell), run.world.device)[0]


# --- A7: a network from gradients to images ------------------------------------------------------------------------------


def _seen_by_network(run: Run, cell: Cell) -> tuple[Tensors, Tensors]:
    """What a learned inversion reads and knows: everything released but the decoder's part, and a decoder of its own for the private one."""
    params = {name: tensor for name, tensor in cell.snapshot.params.items() if not name.startswith(DECODER)}
    known = {name: tensor for name, tensor in cell.snapshot.params.items() if name.startswith(DECODER)}
    initial = cell.trained.training.defence.initial()
    known |= {name: tensor.to(run.world.device) for name, tensor in initial.items() if name not in params and not name.startswith(DECODER)}
    if observe.keeps_decoder(run, cell.trained):
        known |= surrogate(run, cell)
    return params, known


def _inverter(run: Run, cell: Cell) -> nn.Module:
    dataset, params = run.setting.dataset, {n: t for n, t in cell.snapshot.params.items() if not n.startswith(DECODER)}
    size = run.recipe.evaluation.batch_size * observe.members(run, cell.trained)
    length = seen_length(params, dataset.num_classes, size, dim=cell.attack.sketch)
    seed = stream_seed(cell.seed, "inverter") % 2**31
    return inverter_for(length, dataset.num_classes, dataset.image_shape, batch_size=size, seed=seed).to(run.world.device)


def inverter_task(run: Run, cell: Cell) -> Task:
    def fit(report: Callable[[float], None]) -> Tensors:
        params, known = _seen_by_network(run, cell)
        drawn, defence = generator(cell.seed, "inverter", "step-noise"), cell.trained.training.defence
        simulate = observe.observed_simulator(run, cell.trained, cell.snapshot, terms=run.recipe.evaluation.released_loss, drawn=drawn)()
        released_by_one, evaluation = observe.changed(run, cell.trained, simulate, seed=cell.seed), run.recipe.evaluation
        in_turn = defence.budget is not None or bool(defence.transforms or defence.encoders)  # what steps and changes draw is drawn one after another
        released = observe.cohort_simulator(run, cell.trained, lambda: released_by_one, in_turn=in_turn)()
        inverter, public = _inverter(run, cell), run.setting.dataset.val
        running = fit_inverter(
            inverter, lambda *given: observe.as_gradient(evaluation, released(*given)), params, known, public.images, public.labels, defence.draw_noise,
            steps=cell.attack.steps, samples=cell.attack.gradients, seed=cell.seed, mode="loop" if in_turn else "vmap",
            noise_shape=observe.noise_shape(run, cell.trained, members=observe.members(run, cell.trained)),
        )  # fmt: skip
        _follow(running, report)
        return dict(inverter.state_dict())

    cost, path = cell.attack.steps + cell.attack.gradients / 4, cell.folder / "inverter.safetensors"
    return _task(run, f"{cell.label}: inverter", "the inverter", cost, path, mark(run, cell), fit)


def learned(run: Run, cell: Cell) -> Invert:
    """A7, with the network that was trained for it; its iterations are the steps of that training, which all victims share."""
    inverter = _inverter(run, cell)
    inverter.load_state_dict(load_marked(cell.folder / "inverter.safetensors", mark(run, cell), run.world.device)[0])
    params, known = _seen_by_network(run, cell)

    def invert(victims: Sequence[int], report: Callable[[float], None]) -> list[Reconstruction]:
        found = []
        for victim in victims:
            report(1.0)
            update, labels = cell.victims.updates[victim], cell.victims.all_labels(victim)
            granted = labels if cell.attack.labels == "known" else None
            seen = observe.as_gradient(run.recipe.evaluation, {name: update[name] for name in params})
            told = observe.scale_told(cell.trained, cell.victims, victim)
            found += invert_learned([Observation(params, seen, len(labels), labels=granted, known=known, scaled=told)], inverter)
        return [dataclasses.replace(one, iterations=cell.attack.steps) for one in found]

    return invert


# --- A5: the latent, then a decoder --------------------------------------------------------------------------------------


def _shadowed(run: Run, cell: Cell) -> bool:
    """Whether the attacker has to train a front of its own: it is private, and not granted."""
    return run.recipe.share_policy == "head" and cell.attack.front == "shadow"


def latent_decoder_task(run: Run, cell: Cell) -> Task:
    """A decoder of the latents that a front, the attacker's own or the true one, gives of public images."""
    path, attack, defence = cell.folder / "latent-decoder.safetensors", cell.attack, cell.trained.training.defence
    latents = None if _shadowed(run, cell) else _public_latents(run, cell)

    def fit(report: Callable[[float], None]) -> Tensors:
        public, given = run.setting.dataset.val, latents
        if given is None:
            shadow = copy.deepcopy(defence.model).to(run.world.device)
            load_parameters(shadow, {name: tensor.to(run.world.device) for name, tensor in defence.initial_model().items()})
            _follow(
                fit_shadow(shadow, cell.snapshot.params, public.images, public.labels, steps=attack.shadow_steps, seed=cell.seed, draw_noise=defence.draw_noise), report
            )
            given = _as_clients_do(run, cell, [shadow], front_latents(shadow, defence.draw_noise))
        decoder = _latent_decoder(run, cell)
        _follow(fit_decoder(decoder, given, public.to(run.setting.clients[0].images.device), steps=attack.steps, seed=cell.seed, batch_size=attack.batch_size), report)
        return dict(decoder.state_dict())

    cost = attack.steps + (attack.shadow_steps if latents is None else 0)
    return _task(run, f"{cell.label}: decoder", "the latent's decoder", cost, path, mark(run, cell), fit)


def _latent_decoder(run: Run, cell: Cell) -> nn.Module:
    model, seed = cell.trained.training.defence.model, stream_seed(cell.seed, "latent decoder") % 2**31
    return decoder_for(model.latent_shape, model.channel_dim, run.setting.dataset.image_shape, size="posthoc", seed=seed).to(run.world.device)


def latent_cost(cell: Cell, victims: int) -> float:
    """Steps of A5 on so many victims at most."""
    return victims * _latent_steps(cell, cell.attack.iterations * cell.attack.restarts)


def _latent_steps(cell: Cell, iterations: int) -> float:
    """Of reading one observation's latents at most, but for the polish: of the search in their span, where batches are small enough, and of the free one."""
    size = cell.victims.all_labels(0).numel()
    return float((most_steps(STARTS) if size <= UNMIXED else 0) + iterations)


def latent(run: Run, cell: Cell) -> Invert:
    """A5: the latent by the predictor's released gradient, then the decoder that was trained for it."""
    decoder = _latent_decoder(run, cell)
    decoder.load_state_dict(load_marked(cell.folder / "latent-decoder.safetensors", mark(run, cell), run.world.device)[0])
    decoder, predictor = decoder.eval(), Predictor(cell.trained.training.defence.model)
    params = {name: cell.snapshot.params[name] for name in predictor.names}
    at_once = run.recipe.speed.attacks_at_once or LATENTS_AT_ONCE

    def invert(victims: Sequence[int], report: Callable[[float], None]) -> list[Reconstruction]:
        seen = []
        for victim in victims:
            update, labels = cell.victims.updates[victim], cell.victims.all_labels(victim)
            granted = labels if cell.attack.labels == "known" else None
            update = observe.as_gradient(run.recipe.evaluation, {name: update[name] for name in predictor.names})
            seen.append(Observation(params, update, len(labels), labels=granted, scaled=observe.scale_told(cell.trained, cell.victims, victim)))
        running = invert_latent(
            seen, predictor, decoder, seed=cell.seed, iterations=cell.attack.iterations, restarts=cell.attack.restarts, at_once=at_once,
            device=run.world.device, numbers=victims,
        )  # fmt: skip
        cost = latent_cost(cell, len(victims))
        return _follow(running, lambda share: report(cost * share))

    return invert


# --- A3 with the noise read, A5 with the latent matched: the latents ---------------------------------------------------------------------------------


def read_tasks(run: Run, cell: Cell) -> list[Task]:
    """The latent of every observation off the predictor's gradient (`methods.reading`), each by itself. The decoder has no part in it: whoever guesses one shares them."""
    own, lock, made = _read_mark(run, cell), threading.Lock(), []

    def case() -> methods.Case:
        with lock:
            if not made:
                attack = dataclasses.replace(cell.attack, decoder="known") if isinstance(cell.attack, config.ReadNoise) else cell.attack
                made.append(methods.make_case(run, cell.trained, cell.snapshot, attack, cell.releases, seed=cell.seed))
            return made[0]

    def task(victims: range) -> Task:
        each = _latent_steps(cell, methods.READING)

        def fit(report: Callable[[float], None]) -> Tensors:
            one = case()
            found = [_follow(methods.reading(one, one.observations[victim], victim), lambda share: report(each * share)) for victim in victims]
            latents, losses, labels = zip(*found, strict=True)
            return {"latents": torch.stack(latents), "losses": torch.tensor(losses, dtype=torch.float64), "labels": torch.stack(labels)}

        return _task(run, f"{cell.label}: latents {victims.start}", "its latents", each * len(victims), _read_path(cell, victims), own, fit, verb="read")

    return [task(victims) for victims in _read_slices(cell)]


def _read_slices(cell: Cell) -> list[range]:
    count = len(cell.victims.rows)
    return [range(first, min(first + READ_AT_ONCE, count)) for first in range(0, count, READ_AT_ONCE)]


def _read_path(cell: Cell, victims: range) -> Path:
    """Shared by all attacks on one defence, seed and checkpoint that are granted the same of the labels, and by no control, whose updates are others."""
    whose = "control-" if cell.control else ""
    return cell.folder.parent / f"latents-{whose}{cell.attack.labels}-{victims.start:05d}-{len(victims):03d}.safetensors"


def _read_mark(run: Run, cell: Cell) -> str:
    parts = [run.fingerprint, evaluated(run), cell.attack.labels, cell.defence, cell.seed, cell.checkpoint, cell.control and BLIND]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _latents_read(run: Run, cell: Cell) -> list[tuple[Tensor, float, Tensor]]:
    """As `methods.latents_of` returns them, of every observation."""
    found, own = [], _read_mark(run, cell)
    for victims in _read_slices(cell):
        tensors, _ = load_marked(_read_path(cell, victims), own)
        found += zip(tensors["latents"].to(run.world.device), tensors["losses"].tolist(), tensors["labels"], strict=True)
    return found


def reading_seconds(run: Run, cell: Cell) -> float:
    """Of the tasks that read a cell's latents; 0 for a cell that has none, or whose result is another's."""
    if not isinstance(cell.attack, config.READS) or cell.twin is not None or cell.failure:
        return 0.0
    return sum(load_marked(_read_path(cell, victims), _read_mark(run, cell))[1]["seconds"] for victims in _read_slices(cell))


# --- A8: a generator of public images ------------------------------------------------------------------------------------


def _generator(run: Run, cell: Cell) -> tuple[nn.Module, Generator, nn.Module | None]:
    """(what is trained, the generator in it, a GAN's critic)."""
    seed, shape = stream_seed(cell.seed, "generator") % 2**31, run.setting.dataset.image_shape
    if cell.attack.generator == "gan":
        made, critic = (module.to(run.world.device) for module in gan_for(shape, code_dim=cell.attack.code, seed=seed))
        return made, made, critic
    model = autoencoder_for(shape, code_dim=cell.attack.code, seed=seed).to(run.world.device)
    return model, model.generator, None


def generator_path(run: Run, cell: Cell, folder: Path) -> Path:
    """Shared by all cells that search codes of this size: it knows the public images only."""
    return folder / f"generator-{_generator_mark(run, cell)[:12]}.safetensors"


def _generator_mark(run: Run, cell: Cell) -> str:
    return hashlib.sha256(f"{run.fingerprint}|{cell.seed}|{cell.attack.generator}|{cell.attack.code}|{cell.attack.fit_steps}".encode()).hexdigest()


def generator_task(run: Run, cell: Cell, folder: Path) -> Task:
    path = generator_path(run, cell, folder)

    def fit(report: Callable[[float], None]) -> Tensors:
        (model, made, critic), public = _generator(run, cell), run.setting.dataset.val.images
        budget = {"steps": cell.attack.fit_steps, "seed": cell.seed}
        _follow(fit_autoencoder(model, public, **budget) if critic is None else fit_gan(model, critic, public, **budget), report)
        return dict(made.state_dict())

    return _task(run, f"{cell.label}: generator", "the generator", cell.attack.fit_steps, path, _generator_mark(run, cell), fit)


# --- all of them ---------------------------------------------------------------------------------------------------------


def tasks(run: Run, cells: list[Cell], folder: Path) -> list[Task]:
    """What is trained on public images alone."""
    found: dict[Path, Task] = {}
    for cell in cells:
        for task in _tasks_of(run, cell, folder):
            found.setdefault(task.path, task)
    return list(found.values())


def _tasks_of(run: Run, cell: Cell, folder: Path) -> list[Task]:
    needed = []
    if getattr(cell.attack, "decoder", "") == "surrogate" or isinstance(cell.attack, config.LearnedInversion):
        needed += [surrogate_task(run, cell)] if observe.keeps_decoder(run, cell.trained) else []
    match cell.attack:
        case config.PostHocDecoder():
            needed.append(decoder_task(run, cell))
        case config.LatentDecoding():
            needed.append(latent_decoder_task(run, cell))
        case config.GenerativePrior():
            needed.append(generator_task(run, cell, folder))
    return needed


def later_tasks(run: Run, cells: list[Cell]) -> list[Task]:
    """What needs the others' results, or reads the victims' gradients."""
    found: dict[Path, Task] = {}
    for cell in cells:
        needed = [inverter_task(run, cell)] if isinstance(cell.attack, config.LearnedInversion) else []
        for task in needed + (read_tasks(run, cell) if isinstance(cell.attack, config.READS) else []):
            found.setdefault(task.path, task)
    return list(found.values())


def fitted(run: Run, cell: Cell, folder: Path) -> dict[str, Any]:
    """What was trained for a matching attack, read from its file."""
    found: dict[str, Any] = {}
    if getattr(cell.attack, "decoder", "") == "surrogate" and observe.keeps_decoder(run, cell.trained):
        found["surrogate"] = surrogate(run, cell)
    if isinstance(cell.attack, config.READS):
        found["latents"] = _latents_read(run, cell)
    if isinstance(cell.attack, config.GenerativePrior):
        made = _generator(run, cell)[1]
        made.load_state_dict(load_marked(generator_path(run, cell, folder), _generator_mark(run, cell), run.world.device)[0])
        found["generator"] = made.eval()
    return found
