"""Federated training of one defence and seed: consumes the rounds, evaluates, saves, resumes, stops early."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import socket
import statistics
import time
from collections import ChainMap, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gidef import at_once, build, config, memory, metrics
from gidef.checkpoint import Behind, export_model, load_export, load_file, load_latest, save_checkpoint, save_file, weights_sha256
from gidef.clients.evaluate import CHUNK, num_chunks, predict_chunk
from gidef.clients.local import load_parameters
from gidef.clients.sharded import predict_part
from gidef.data import Dataset, Images
from gidef.errors import InputError
from gidef.models import moving_statistics
from gidef.parallel import Beside, SlicedCheckpoints, World, checkpoints
from gidef.report import Console, Record
from gidef.rng import generator
from gidef.rounds.algorithm import federate
from gidef.spans import span
from gidef.types import ServerState, Tensors
from gidef.updates import CohortMean

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


# --- evaluation ------------------------------------------------------------------------------------------------------


def logits(run: Run, training: build.Training, tensors: Tensors, images: Images, *, seed: int, split: str) -> Tensor:
    """Logits (N, K) float32 on the CPU, the same bits on every rank: chunks are dealt out over ranks and worker threads.

    A perturbation is on at its trained strength, with noise from (seed, split, chunk), unless predictions are to be without.
    """
    world = run.world
    if training.sharded is not None:
        return _logits_of_shards(run, training, tensors, images, seed=seed, split=split)
    models = [player.model for player in training.participation.players]
    for model in models:
        load_parameters(model, tensors)
        model.eval()
    result = torch.zeros(len(images), run.setting.dataset.num_classes)
    mine, noise = _own_chunks(world, images), _noise_of_predictions(run, training, seed=seed, split=split)

    def work(worker: int) -> None:
        torch.set_num_threads(run.recipe.speed.threads)
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # the current device is per thread
        _predict(result, models[worker], images, mine[worker :: len(models)], noise)

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, range(len(models))))
    for model in models:
        model.train()
    world.all_reduce_sum_(result)  # every row comes from one rank and zeros from the others: exact
    return result


def _own_chunks(world: World, images: Images) -> list[int]:
    """This rank's."""
    return list(range(num_chunks(images.images)))[world.rank :: world.size]


def _predict(result: Tensor, model: nn.Module, images: Images, chunks: Iterable[int], noise: Callable[[int, int], Tensor | None]) -> None:
    """Fill in the chunks' rows of the logits."""
    for chunk in chunks:
        result[chunk * CHUNK : (chunk + 1) * CHUNK] = predict_chunk(model, images.images, chunk, noise)


def _noise_of_predictions(run: Run, training: build.Training, *, seed: int, split: str) -> Callable[[int, int], Tensor | None]:
    """noise(count, chunk), see `Model.noisy_prediction`."""

    def noise(count: int, chunk: int) -> Tensor | None:
        if not run.recipe.model.noisy_prediction:
            return None
        return training.defence.draw_noise(count, generator=generator(seed, "evaluation", split, chunk, device=run.world.device))

    return noise


def _logits_of_shards(run: Run, training: build.Training, tensors: Tensors, images: Images, *, seed: int, split: str) -> Tensor:
    """`logits` where a network lies on a group of ranks: chunks are dealt out over groups, and a chunk's rows over the group."""
    world, mesh, model = run.world, run.world.mesh, training.participation.players[0].model
    training.sharded.engine.load(tensors)
    model.eval()
    result = torch.zeros(len(images), run.setting.dataset.num_classes)
    noise = _noise_of_predictions(run, training, seed=seed, split=split)
    with mesh.shard.explained():
        for chunk in range(mesh.clients.rank, num_chunks(images.images), mesh.clients.size):
            for rows, found in predict_part(model, images.images, chunk, noise, mesh.shard, device=world.device):
                result[rows] = found
    model.train()
    world.all_reduce_sum_(result)
    return result


def _names(training: build.Training) -> list[str]:
    """Of what a client trains of the model: parameters, and running statistics that move."""
    model = training.defence.model
    return [*(name for name, _ in model.named_parameters()), *moving_statistics(model)]


def fronts(training: build.Training, params: Tensors, clients: list[int]) -> list[Tensors]:
    """The whole model's tensors: one if the server has all of them, else one per client, with the client's own front."""
    return list(_each_front(training, params, clients, training.participation.versions))


def _each_front(training: build.Training, params: Tensors, clients: list[int], versions: Mapping[int, int]) -> Iterator[Tensors]:
    """`fronts` one at a time, of the clients as they stood after those rounds."""
    names = _names(training)
    if all(name in params for name in names):
        yield {name: params[name] for name in names}
        return
    for k in clients:
        whole = {**training.participation.state(k, versions), **params}
        yield {name: whole[name] for name in names}


@span("evaluation")
def accuracies(run: Run, training: build.Training, params: Tensors, images: Images, *, seed: int, split: str, clients: list[int]) -> list[float]:
    """Accuracy on a split, of the server's model or of each client's own front under `head`."""
    return [
        metrics.accuracy(logits(run, training, tensors, images, seed=seed, split=split), images.labels.cpu())
        for tensors in fronts(training, params, clients)
    ]


class _EvaluationBeside(Beside):
    """`accuracies` of a round on the validation split, computed while the next round is: on a thread with a network of its own, the one further copy
    of the model that it takes. The sums over ranks, and so the accuracies, are the calling thread's: the thread computes this rank's rows alone.

    A round's evaluation reads the server's tensors and the clients' states of that round, which nothing changes: a server step makes new tensors,
    the next round's states are other files, and what a round no longer needs is removed once its evaluation is there.
    """

    def __init__(self, run: Run, training: build.Training, *, seed: int) -> None:
        super().__init__(run.world.device, threads=run.recipe.speed.threads)
        self._run_of, self._training = run, training
        self._model = copy.deepcopy(training.participation.players[0].model).eval()
        self._noise = _noise_of_predictions(run, training, seed=seed, split="validation")
        self.seconds: list[float] = []
        """Of each evaluation on the thread."""
        self.waited: list[float] = []
        """Of each: how long the calling thread waited for its end, and for the sums over ranks."""

    def begin(self, params: Tensors, clients: list[int], versions: Mapping[int, int]) -> None:
        """versions: client → its last round, as it is now; the caller's own copy."""
        self.call(self._evaluate, params, clients, versions)

    def accuracies(self) -> list[float]:
        """Of the evaluation that was begun. All ranks call this together."""
        began, val = time.perf_counter(), self._run_of.setting.dataset.val
        found = [metrics.accuracy(self._run_of.world.all_reduce_sum_(rows), val.labels.cpu()) for rows in self.wait()]
        self.waited.append(time.perf_counter() - began)
        return found

    @span("evaluation")
    def _evaluate(self, params: Tensors, clients: list[int], versions: Mapping[int, int]) -> list[Tensor]:
        """This rank's rows of each front's logits, zeros elsewhere."""
        began, setting = time.perf_counter(), self._run_of.setting
        mine, found = _own_chunks(self._run_of.world, setting.dataset.val), []
        for tensors in _each_front(self._training, params, clients, versions):
            load_parameters(self._model, tensors)
            found.append(torch.zeros(len(setting.dataset.val), setting.dataset.num_classes))
            _predict(found[-1], self._model, setting.dataset.val, itertools.takewhile(lambda _: not self.stopped.is_set(), mine), self._noise)
            if self.stopped.is_set():
                break
        self.seconds.append(time.perf_counter() - began)
        return found


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Progress:
    """What a checkpoint holds beside the server: plain numbers."""

    best_round: int = 0
    best_accuracy: float = -1.0
    best_versions: dict[int, int] = field(default_factory=dict)
    early_versions: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Computed:
    """A round that is computed, and neither in the record nor on disk, for want of its evaluation; all as it stood then. seconds: since the training
    began.  versions: client → its last round, after this one.  costs: what the next round is planned by."""

    number: int
    server: ServerState
    cohort: list[int]
    mean: CohortMean
    versions: dict[int, int]
    costs: dict[str, Any]
    seconds: float = 0.0


def _client_seconds(turns: dict[int, list[float]]) -> dict[str, dict[str, float]]:
    """Per client: the median of its turns' seconds, and the standard deviation of their logarithms (0 for one turn). The process's first turn is slow."""
    logs = {client: [math.log(max(one, 1e-6)) for one in seconds] for client, seconds in turns.items()}
    return {str(client): {"median": statistics.median(seconds), "spread": statistics.pstdev(logs[client])} for client, seconds in sorted(turns.items())}


def _for_plan(
    run: Run, training: build.Training, turns: dict[int, list[float]], evaluating: list[float], saving: list[float], beside: _EvaluationBeside | None
) -> dict[str, Any]:
    """What `gidef plan` reads, of this life's rounds: seconds of clients, of a round's evaluations, which ranks share, and of saving, which rank 0 alone
    does; bytes of the sums over ranks. Where evaluations ran beside the next round: their seconds on that thread, and those that were waited for."""
    rows, classes = len(run.setting.dataset.val), run.setting.dataset.num_classes
    names = _names(training)
    template = training.participation.template()
    models = 1 if training.sharded or all(name in template for name in names) else run.recipe.rounds.cohort_size or run.recipe.data.num_clients
    found: dict[str, Any] = {"client_seconds": _client_seconds(turns), "reduced_bytes": 8 * sum(tensor.numel() for tensor in template.values())}  # int64, see FixedPointSum
    overlapped = beside is not None and bool(beside.seconds)
    if overlapped or evaluating:
        seconds = statistics.median(beside.seconds if overlapped else evaluating)
        found["evaluation"] = {"seconds": seconds, "models": models, "chunks": num_chunks(run.setting.dataset.val.images), "bytes": 4 * rows * classes, "overlapped": overlapped}
        found["saving_seconds"] = statistics.median(saving)
    if overlapped:
        found["waiting_seconds"] = statistics.median(beside.waited)
    return found


def train(run: Run, name: str, chosen: Any, seed: int) -> Trained:
    """Train one defence and seed to its end, or continue it; every rank calls this together.

    The final model is the best round's on validation accuracy (ties: the earlier). Where `build.overlaps_evaluation` says so on all ranks, a round is
    evaluated while the next one is computed; its line in the record, its snapshot and its checkpoint follow then, in order, with the same bits, and a
    kill costs one round more than else. The last round, and one after which `rounds.patience` may end the training, is evaluated before anything follows.
    Raises InputError on a checkpoint of another run.
    """
    recipe, world, key = run.recipe, run.world, run_key(name, seed)
    export = run.folder / "models" / f"{key}.safetensors"
    if recipe.resume and export.exists():
        run.console.say(f"{name}, seed {seed}: training had ended.")
        return _finished(run, _as_attacked(run, chosen, seed, key), key, export)

    memory.forget_peak(world.device)
    training = _made(run, chosen, seed, key, world)
    if build.lacks_tf32(recipe, world):
        run.console.notice(f"{name}, seed {seed}: {world.device} has no TF32 (clients.precision): float32 is used.")
    if recipe.speed.compile_training:
        build.compile_steps(training, recipe, notice=run.console.notice)
    participation, best, progress = training.participation, dict(training.server.params), _Progress()
    sharded, server = training.sharded, training.server
    saver = SlicedCheckpoints(_checkpoints(run, key), world, sharded.layout, keep=recipe.speed.checkpoints_kept) if sharded else None
    state = _load_checkpoint(run, key, training)
    if state is not None:
        server, best, progress = _unpack(*state, participation, world.device)
        training.costs.load(state[1].get("costs", {}))
        run.console.say(f"{name}, seed {seed}: continues after round {server.round}.")
    elif recipe.resume:
        run.console.say(f"{name}, seed {seed}: no checkpoint, starts from the beginning.")
    # versions of the checkpoints that stay, the newest last: two at least, as a checkpoint is on disk only later than its round is settled
    kept = deque([*(map(_numbers, state[1].get("kept_versions", [])) if state else []), dict(participation.versions)], maxlen=max(recipe.speed.checkpoints_kept, 2))
    participation.at_once = _clients_at_once(run, name, training, server) if state is None else state[1].get("clients_at_once", 1)
    _compare_states(world, key, server.round, _state_hash(training, server, best, participation.versions, progress))
    server = training.taken_up(server)
    if server.round == 0:
        _save_snapshot(run, training, key, Snapshot("untrained", 0, 0.0, server.params))
    val, total = run.setting.dataset.val, run.setting.rounds
    turns: dict[int, list[float]] = defaultdict(list)
    evaluating, saving = [], []
    started = time.perf_counter() - progress.seconds
    early = early_round(total)
    beside = _EvaluationBeside(run, training, seed=seed) if not world.any(not build.overlaps_evaluation(recipe, world)) else None
    with run.console.track(f"{name}, seed {seed}: round", total, start=server.round) as bar, Behind() as behind, beside or contextlib.nullcontext():

        def settle(done: _Computed, values: list[float]) -> None:
            """What follows once a round is evaluated."""
            nonlocal best
            accuracy, after, server, mean = sum(values) / len(values), done.number + 1, done.server, done.mean
            if accuracy > progress.best_accuracy:
                best = dict(server.params)
                progress.best_round, progress.best_accuracy, progress.best_versions = after, accuracy, done.versions
            if after == early:
                progress.early_versions = done.versions
                _save_snapshot(run, training, key, Snapshot("early", early, early / total, server.params, progress.early_versions))
            progress.seconds = done.seconds
            run.append(
                "round", defence=name, seed=seed, round=after, loss=mean.metrics["loss"], val_accuracy=accuracy,
                val_accuracy_worst=min(values), cohort=len(done.cohort), examples=mean.num_examples, seconds=progress.seconds,
                client_seconds={str(client): round(seconds, 6) for client, seconds in zip(done.cohort, mean.seconds, strict=True)},
            )  # fmt: skip
            began = time.perf_counter()
            kept.append(done.versions)
            at_hand = {"kept_versions": list(kept)[:-1], "costs": done.costs, "clients_at_once": participation.at_once}
            held = _state(run, training.to_save(server), best, done.versions, progress, at_hand)
            # after its line in the record: a resumed run drops lines beyond the checkpoint, but could not write one again
            if saver is not None:
                saver.save(server.round, *held)
            elif run.leads:
                tensors, meta = held
                tensors = {one: tensor.detach().cpu() for one, tensor in tensors.items()}
                behind.call(_save_checkpoint, run, key, server.round, (tensors, meta))  # while the next round is computed
            if run.leads:
                # what the kept checkpoints, the best round and the early snapshot refer to
                referred = (*kept, progress.best_versions, progress.early_versions)
                training.store.prune({pair for versions in referred for pair in versions.items()})
            saving.append(time.perf_counter() - began)
            bar.update(after, loss=mean.metrics["loss"], acc=accuracy)

        waiting: _Computed | None = None
        stop = _patience_over(recipe, server.round, progress)
        rounds = federate(server, run.setting.clients, rounds=total, draw=training.draw, run=training.run)
        for number, server, cohort, mean in () if stop else rounds:
            if waiting is not None:
                settle(waiting, beside.accuracies())
            participation.versions |= dict.fromkeys(cohort, number)
            for client, seconds in zip(cohort, mean.seconds, strict=True):
                turns[client].append(seconds)
            done = _Computed(number, server, cohort, mean, dict(participation.versions), training.costs.state())
            # while even a worse accuracy could not end the training here, no evaluation can
            if beside is not None and number + 1 < total and not _patience_over(recipe, number + 1, progress):
                beside.begin(server.params, cohort, done.versions)
                waiting = dataclasses.replace(done, seconds=time.perf_counter() - started)
                continue
            waiting, began = None, time.perf_counter()
            values = accuracies(run, training, server.params, val, seed=seed, split="validation", clients=cohort)
            evaluating.append(time.perf_counter() - began)
            settle(dataclasses.replace(done, seconds=time.perf_counter() - started), values)
            if _patience_over(recipe, number + 1, progress):
                run.console.say(f"{name}, seed {seed}: stops early, {recipe.rounds.patience} rounds without a better validation accuracy.")
                break
    if saver is not None:
        saver.close()
    rounds_run = server.round
    if rounds_run < early:  # patience ended training before a tenth of it
        _save_snapshot(run, training, key, Snapshot("early", rounds_run, rounds_run / total, server.params, dict(participation.versions)))
    participation.versions = dict(progress.best_versions)
    _save_snapshot(run, training, key, Snapshot("final", progress.best_round, progress.best_round / total, best, progress.best_versions))
    summary = _summary(run, training, name, seed, best, progress, rounds_run)
    sha = final_hash(training, best, run.recipe.data.num_clients)
    run.append("trained", weights_sha256=sha, **summary, **_for_plan(run, training, turns, evaluating, saving, beside))  # before the export, whose presence tells a resumed run to keep this line
    exported = _gathered(training, _exported(training, best, recipe.data.num_clients), keep=run.leads)
    if run.leads:
        meta = {"summary": summary, "sha256": sha, "defence": name, "as_trained": config.to_json(chosen), "seed": seed, "fingerprint": run.fingerprint}
        meta |= _shape(run)
        export_model(export, {**exported, **training.frozen}, config.to_json(recipe), meta)
    world.barrier()
    if sharded is not None and recipe.attacks:
        return _finished(run, _as_attacked(run, chosen, seed, key), key, export)
    return Trained(training, _snapshots(run, key, training), summary, sha)


def _clients_at_once(run: Run, name: str, training: build.Training, server: ServerState) -> int:
    """K of a training that begins; says what was found, and once for each defence."""
    speed, path, participation = run.recipe.speed, run.folder / at_once.FILE, training.participation
    cohort = [run.setting.clients[number] for number in training.draw(server.round)]
    chosen = at_once.choose(
        speed.clients_at_once, participation, server, cohort, world=run.world, slots=run.world.size * len(participation.players), path=path, name=name
    )
    if chosen.reason:
        run.console.say(f"{name}: clients train one by one, as they cannot be vectorised: {chosen.reason}.")
    elif chosen.milliseconds:
        table = ", ".join(f"{size}: {value:.2f}" for size, value in chosen.milliseconds.items())
        run.console.say(f"{name}: {chosen.at_once} clients at once (ms of a client's step by clients at once: {table}).")
    return chosen.at_once


def _summary(run: Run, training: build.Training, name: str, seed: int, best: Tensors, progress: _Progress, rounds_run: int) -> dict[str, Any]:
    """Costs and test results of the final model; peaks of memory are each the largest of any rank, in the life of the run that ends the training."""
    scores = scores_on_test(run, training, best, seed=seed)
    told = run.world.all_gather_json(memory.peaks(run.world.device))
    everyone = list(range(run.recipe.data.num_clients))
    shared_bytes = sum(_numel(training, {name: tensor}) * tensor.itemsize for name, tensor in training.participation.template().items())
    spent = training.defence.budget
    return {
        "defence": name, "seed": seed, "epsilon": spent and spent.epsilon, "delta": spent and spent.delta, "rounds": rounds_run, "best_round": progress.best_round, "val_accuracy": progress.best_accuracy,
        **scores,
        "seconds": progress.seconds, "seconds_per_round": progress.seconds / max(rounds_run, 1), "bytes_per_round": 2 * shared_bytes * (run.recipe.rounds.cohort_size or len(everyone)),
        "parameters_shared": _numel(training, best), "clients_at_once": training.participation.at_once,
        **{name: max(one[name] for one in told) for name in told[0]},
    }  # fmt: skip


def scores_on_test(run: Run, training: build.Training, params: Tensors, *, seed: int) -> dict[str, Any]:
    """Of a model on the test split; per client: the accuracy under the client's own mix of classes. Every rank calls this together."""
    dataset, counts = run.setting.dataset, run.setting.counts.double()
    everyone = list(range(run.recipe.data.num_clients))
    outputs = [logits(run, training, tensors, dataset.test, seed=seed, split="test") for tensors in fronts(training, params, everyone)]
    labels = dataset.test.labels.cpu()
    scores = [metrics.accuracy(output, labels) for output in outputs]
    mixes = counts / counts.sum(1, keepdim=True)
    per_class = [torch.tensor(metrics.per_class_accuracy(output, labels), dtype=torch.float64) for output in outputs]
    per_client = [_expected(mixes[k], per_class[k % len(per_class)]) for k in everyone]
    return {
        "test_accuracy": sum(scores) / len(scores), "test_accuracy_worst_front": min(scores),
        "macro_f1": sum(metrics.macro_f1(o, labels) for o in outputs) / len(outputs),
        "auc": sum(metrics.auc(o, labels) for o in outputs) / len(outputs),
        "client_accuracy_mean": sum(per_client) / len(per_client), "client_accuracy_worst": min(per_client), "client_accuracies": per_client,
    }  # fmt: skip


def _shape(run: Run) -> dict[str, Any]:
    return {"num_classes": run.setting.dataset.num_classes, "image_shape": list(run.setting.dataset.image_shape)}


def _expected(mix: Tensor, per_class: Tensor) -> float:
    """Accuracy under a mix of classes; classes without test images are left out."""
    known = per_class.isfinite()
    share = mix * known
    return float((share * per_class.nan_to_num()).sum() / share.sum().clamp_min(1e-12))


def _exported(training: build.Training, params: Tensors, num_clients: int) -> Tensors:
    """The final model: the shared tensors, and under `head` every client's private front as `client-<k>/<name>`."""
    tensors = dict(params)
    names = _names(training)
    if not all(name in params for name in names):
        for k in range(num_clients):
            state = training.participation.state(k)
            tensors |= {f"client-{k:05d}/{name}": state[name] for name in names if name not in params}
    return tensors


def final_hash(training: build.Training, params: Tensors, num_clients: int) -> str:
    """SHA-256 of the final model: fp32 little-endian bytes, name order (see checkpoint.weights_sha256)."""
    return weights_sha256(ChainMap(training.frozen, _whole(training, _exported(training, params, num_clients))))


# --- where a client spans several ranks, the server's tensors are slices ---------------------------------------------


def _whole(training: build.Training, tensors: Tensors) -> Mapping[str, Tensor]:
    """The whole tensors, gathered one at a time as all ranks read them."""
    return training.sharded.layout.whole(tensors) if training.sharded else tensors


def _gathered(training: build.Training, tensors: Tensors, *, keep: bool) -> Tensors:
    return training.sharded.layout.gathered(tensors, keep=keep) if training.sharded else tensors


def _numel(training: build.Training, tensors: Tensors) -> int:
    return training.sharded.layout.numel(tensors) if training.sharded else sum(t.numel() for t in tensors.values())


def _as_attacked(run: Run, chosen: Any, seed: int, key: str) -> build.Training:
    """The parts of a training on each rank by itself, as attacks take them; where there are none, they stay in slices."""
    world = dataclasses.replace(run.world, mesh=None) if run.recipe.attacks else run.world
    return _made(run, chosen, seed, key, world)


def _made(run: Run, chosen: Any, seed: int, key: str, world: World) -> build.Training:
    """A training; frozen running statistics are those that this run's folder has of its start, if it has begun, whatever model.pretrained holds now."""
    began = snapshot_path(run.folder, key, "untrained")
    tensors = load_file(began)[0] if run.recipe.model.norm == "frozen" and began.exists() else {}
    frozen = {name.removeprefix(FROZEN): tensor for name, tensor in tensors.items() if name.startswith(FROZEN)}
    return build.make_training(run.setting, chosen, seed=seed, world=world, state_folder=run.folder / "clients" / key, frozen=frozen)


# --- saving and loading ----------------------------------------------------------------------------------------------


def _patience_over(recipe: config.Recipe, rounds_run: int, progress: _Progress) -> bool:
    patience = recipe.rounds.patience
    return patience is not None and rounds_run > 0 and rounds_run - progress.best_round >= patience


def _checkpoints(run: Run, key: str) -> Path:
    return run.folder / "checkpoints" / key


@span("checkpoint")
def _save_checkpoint(run: Run, key: str, number: int, held: tuple[Tensors, dict[str, Any]]) -> None:
    keep = run.recipe.speed.checkpoints_kept
    save_checkpoint(_checkpoints(run, key), number, *held, keep=keep)
    checkpoints.prune(_checkpoints(run, key), before=number - keep + 1)  # in slices, from before a resumption


def _state(
    run: Run, server: ServerState, best: Tensors, versions: dict[int, int], progress: _Progress, speed: dict[str, Any]
) -> tuple[Tensors, dict[str, Any]]:
    """What a checkpoint holds. speed: what decides, or only speeds up, how the next rounds are computed."""
    tensors = {f"params/{name}": tensor for name, tensor in server.params.items()}
    tensors |= {f"slots/{slot}/{name}": tensor for slot, slots in server.slots.items() for name, tensor in slots.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    return tensors, {
        "fingerprint": run.fingerprint, "round": server.round, "versions": versions, "best_round": progress.best_round,
        "best_accuracy": progress.best_accuracy, "best_versions": progress.best_versions, "early_versions": progress.early_versions,
        "seconds": progress.seconds, **speed,
    }  # fmt: skip


def _load_checkpoint(run: Run, key: str, training: build.Training) -> tuple[Tensors, dict[str, Any]] | None:
    """Rank 0 finds the newest good checkpoint, in one file or in slices, and all read it into what they hold now: whole tensors or slices.

    What one of them cannot read is told on all.
    """
    if not run.recipe.resume:
        return None
    folder, layout = _checkpoints(run, key), training.sharded.layout if training.sharded else None
    found = cut = error = tensors = meta = None
    try:
        found = load_latest(folder, notice=run.console.notice) if run.leads else None
        cut = checkpoints.newest(folder, run.console.notice) if run.leads else None
    except InputError as refused:
        error = str(refused)
    whole = found[0] if found else 0
    number, in_slices, error = run.world.broadcast_json([max(whole, cut or 0) or None, (cut or 0) > whole, error])
    if error is not None:
        raise InputError(error)
    if number is None:
        return None
    try:
        if in_slices:
            tensors, meta = checkpoints.load(folder, number, layout, run.world.device)
        else:
            found = found or load_latest(folder, notice=lambda text: None, at=number)
            if found is not None:
                _, tensors, meta = found
                tensors = layout.slices(tensors) if layout else tensors
        if meta is None or meta["fingerprint"] != run.fingerprint:
            error = (
                f"the checkpoint of round {number} in {folder} belongs to another recipe or other data: "
                "resume with the recipe and data that began it, or choose another --out."
            )
    except InputError as refused:
        error = str(refused)
    told = run.world.all_gather_json([socket.gethostname(), error])
    bad = [(rank, host, text) for rank, (host, text) in enumerate(told) if text is not None]
    if bad:
        rank, host, text = bad[0]
        raise InputError(text if run.world.size == 1 else f"rank {rank} on host {host}: {text}")
    return tensors, meta


def _state_hash(training: build.Training, server: ServerState, best: Tensors, versions: dict[int, int], progress: _Progress) -> str:
    """SHA-256 of all that the next round depends on."""
    slots = {f"{slot}/{name}": tensor for slot, slots in server.slots.items() for name, tensor in slots.items()}
    plain = [sorted(versions.items()), progress.best_round, progress.best_accuracy, sorted(progress.best_versions.items()), sorted(slots)]
    parts = [weights_sha256(_whole(training, tensors)) for tensors in (server.params, slots, best)]
    parts += [weights_sha256(training.frozen)] if training.frozen else []
    return hashlib.sha256("|".join([*parts, json.dumps(plain)]).encode()).hexdigest()


def _compare_states(world: World, key: str, number: int, state: str) -> None:
    """All ranks must be where rank 0 is. Raises InputError on every rank, with those that are elsewhere."""
    told = world.all_gather_json([number, state, socket.gethostname()])
    odd = [f"rank {rank} on host {host} (round {at})" for rank, (at, one, host) in enumerate(told) if (at, one) != tuple(told[0][:2])]
    if odd:
        raise InputError(
            f"{key}: rank 0 on host {told[0][2]} starts after round {told[0][0]}, and {', '.join(odd)} with another state: all ranks must see the same "
            "run folder, on a disk that all hosts share. Give such a folder as --out, or remove what differs."
        )


def _unpack(tensors: Tensors, meta: dict[str, Any], participation: Any, device: torch.device) -> tuple[ServerState, Tensors, _Progress]:
    def part(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)}

    slots = {name.split("/")[1] for name in tensors if name.startswith("slots/")}
    server = ServerState(part("params/"), meta["round"], {slot: part(f"slots/{slot}/") for slot in slots})
    participation.versions = _numbers(meta["versions"])
    progress = _Progress(
        meta["best_round"], meta["best_accuracy"], _numbers(meta["best_versions"]), _numbers(meta["early_versions"]), meta["seconds"]
    )
    return server, part("best/"), progress


def _numbers(versions: dict[str, int]) -> dict[int, int]:
    """JSON turns integer keys into text."""
    return {int(client): int(version) for client, version in versions.items()}


@span("checkpoint")
def _save_snapshot(run: Run, training: build.Training, key: str, snapshot: Snapshot) -> None:
    params = _gathered(training, snapshot.params, keep=run.leads)
    if run.leads:
        params = {**params, **{FROZEN + name: tensor for name, tensor in training.frozen.items()}}
        meta = {"name": snapshot.name, "round": snapshot.round, "progress": snapshot.progress, "versions": snapshot.versions, "fingerprint": run.fingerprint}
        save_file(snapshot_path(run.folder, key, snapshot.name), params, meta)


def load_snapshot(run: Run, key: str, name: str, statistics: Collection[str] = ()) -> Snapshot:
    """Raises InputError if the snapshot is missing, damaged or of another recipe."""
    path = snapshot_path(run.folder, key, name)
    tensors, meta = load_file(path)
    if meta["fingerprint"] != run.fingerprint:
        raise InputError(f"{path} belongs to another recipe or other data: attack it with the recipe and data that made it.")
    params = {n: t.to(run.world.device) for n, t in tensors.items() if not n.startswith(FROZEN)}
    apart = {n: params.pop(n) for n in statistics if n in params}
    return Snapshot(meta["name"], meta["round"], meta["progress"], params, _numbers(meta["versions"]), apart)


def _snapshots(run: Run, key: str, training: build.Training) -> dict[str, Snapshot]:
    """None where nothing attacks them and a whole model may not fit on a rank."""
    statistics = moving_statistics(training.defence.model)
    return {name: load_snapshot(run, key, name, statistics) for name in CHECKPOINTS} if run.recipe.attacks or run.world.mesh is None else {}


def reload(run: Run, name: str, chosen: Any, seed: int) -> Trained:
    """A trained defence and seed of a finished run. Raises InputError if its training has not ended."""
    key = run_key(name, seed)
    export = run.folder / "models" / f"{key}.safetensors"
    if not export.exists():
        raise InputError(f"{name}, seed {seed}: {export} is missing, so its training has not ended. Finish the run with --resume first.")
    return _finished(run, _as_attacked(run, chosen, seed, key), key, export)


def _finished(run: Run, training: build.Training, key: str, export: Path) -> Trained:
    """What an ended training left."""
    _, meta = load_export(export)
    if meta["fingerprint"] != run.fingerprint:
        raise InputError(f"{export} belongs to another recipe or other data: resume with those that made it, or choose another --out.")
    snapshots = _snapshots(run, key, training)
    if snapshots:
        training.participation.versions = dict(snapshots["final"].versions)
    return Trained(training, snapshots, meta["summary"], meta["sha256"])
