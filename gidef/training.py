"""Federated training of one defence and seed: consumes the rounds, evaluates, saves, resumes, stops early."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import ChainMap, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gidef import at_once, build, config, memory
from gidef.checkpoint import Behind, export_model, load_export, load_file, weights_sha256
from gidef.clients.evaluate import num_chunks
from gidef.errors import Diverged, InputError
from gidef.evaluation import EvaluationBeside, accuracies, model_names, scores_on_test
from gidef.parallel import OVERLAP_ABOVE, SlicedCheckpoints, World
from gidef.rounds.algorithm import federate
from gidef.runs import FROZEN, Run, Snapshot, Trained, early_round, run_key, snapshot_path
from gidef.states import (
    Progress,
    by_client,
    checkpoint_folder,
    compare_states,
    gathered,
    load_snapshots,
    load_state,
    numel,
    save_snapshot,
    save_state,
    state_hash,
    state_of,
    unpack,
    whole_of,
)  # fmt: skip
from gidef.types import ServerState, Tensors
from gidef.updates import CohortMean


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
    run: Run, training: build.Training, server: ServerState, turns: dict[int, list[float]], evaluating: list[float], saving: list[float], beside: EvaluationBeside | None
) -> dict[str, Any]:
    """What `gidef plan` reads, of this life's rounds: seconds of clients, of a round's evaluations, which ranks share, and of saving, which rank 0 alone
    does; what ranks send one another. Where evaluations ran beside the next round: their seconds on that thread, and those that were waited for."""
    rows, classes = len(run.setting.dataset.val), run.setting.dataset.num_classes
    names = model_names(training)
    template = training.participation.template()
    models = 1 if training.sharded or all(name in template for name in names) else run.recipe.cohort
    found: dict[str, Any] = {"client_seconds": _client_seconds(turns), "traffic": dataclasses.asdict(build.traffic(run.recipe, server, template))}
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
    Raises InputError on a checkpoint of another run, and Diverged, on every rank, if the loss, an update or a prediction stops being finite.
    """
    recipe, world, key = run.recipe, run.world, run_key(name, seed)
    export = run.folder / "models" / f"{key}.safetensors"
    if recipe.resume and export.exists():
        run.console.say(f"{name}, seed {seed}: training had ended.")
        return _finished(run, _as_attacked(run, chosen, seed, key), key, export)

    anew = memory.forget_peak(world.device)
    training = _made(run, chosen, seed, key, world)
    if build.lacks_tf32(recipe, world):
        run.console.notice(f"{name}, seed {seed}: {world.device} has no TF32 (clients.precision): float32 is used.")
    if recipe.speed.compile_training:
        build.compile_steps(training, recipe, notice=run.console.notice)
    participation, best, progress = training.participation, dict(training.server.params), Progress()
    sharded, server = training.sharded, training.server
    saver = SlicedCheckpoints(checkpoint_folder(run, key), world, sharded.layout, keep=recipe.speed.checkpoints_kept) if sharded else None
    state = load_state(run, key, training)
    if state is not None:
        server, best, progress = unpack(*state, participation, world.device)
        training.costs.load(state[1].get("costs", {}))
        run.console.say(f"{name}, seed {seed}: continues after round {server.round}.")
    elif recipe.resume:
        run.console.say(f"{name}, seed {seed}: no checkpoint, starts from the beginning.")
    # versions of the checkpoints that stay, the newest last: two at least, as a checkpoint is on disk only later than its round is settled
    kept = deque([*(map(by_client, state[1].get("kept_versions", [])) if state else []), dict(participation.versions)], maxlen=max(recipe.speed.checkpoints_kept, 2))
    participation.at_once = _clients_at_once(run, name, training, server) if state is None else state[1].get("clients_at_once", 1)
    compare_states(world, key, server.round, state_hash(training, server, best, participation.versions, progress))
    server = training.taken_up(server)
    if server.round == 0:
        save_snapshot(run, training, key, Snapshot("untrained", 0, 0.0, server.params))
    val, total = run.setting.dataset.val, run.setting.rounds
    turns: dict[int, list[float]] = defaultdict(list)
    evaluating, saving, summing = [], [], []
    life = time.perf_counter()
    started = life - progress.seconds
    early = early_round(total)
    beside = EvaluationBeside(run, training, seed=seed) if not world.any(not build.overlaps_evaluation(recipe, world)) else None
    with run.console.track(f"{name}, seed {seed}: round", total, start=server.round) as bar, Behind() as behind, beside or contextlib.nullcontext(), _closing(saver):

        def settle(done: _Computed, values: list[float]) -> None:
            """What follows once a round is evaluated."""
            nonlocal best
            accuracy, after, server, mean = sum(values) / len(values), done.number + 1, done.server, done.mean
            if accuracy > progress.best_accuracy:
                best = dict(server.params)
                progress.best_round, progress.best_accuracy, progress.best_versions = after, accuracy, done.versions
            if after == early:
                progress.early_versions = done.versions
                save_snapshot(run, training, key, Snapshot("early", early, early / total, server.params, progress.early_versions))
            progress.seconds = done.seconds
            run.append(
                "round", defence=name, seed=seed, round=after, loss=mean.metrics["loss"], val_accuracy=accuracy,
                val_accuracy_worst=min(values), cohort=len(done.cohort), examples=mean.num_examples, seconds=progress.seconds,
                client_seconds={str(client): round(seconds, 6) for client, seconds in zip(done.cohort, mean.seconds, strict=True)},
                sum_seconds=round(mean.sum_seconds, 6),
            )  # fmt: skip
            began = time.perf_counter()
            kept.append(done.versions)
            at_hand = {"kept_versions": list(kept)[:-1], "costs": done.costs, "clients_at_once": participation.at_once}
            held = state_of(run, training.to_save(server), best, done.versions, progress, at_hand)
            # after its line in the record: a resumed run drops lines beyond the checkpoint, but could not write one again
            if saver is not None:
                saver.save(server.round, *held)
            elif run.leads:
                tensors, meta = held
                tensors = {one: tensor.detach().cpu() for one, tensor in tensors.items()}
                behind.call(save_state, run, key, server.round, (tensors, meta))  # while the next round is computed
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
            summing.append(mean.sum_seconds)
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
    if told := _costly_sums(sum(summing), time.perf_counter() - life):
        run.console.say(f"{name}, seed {seed}: {told}")
    rounds_run = server.round
    if rounds_run < early:  # patience ended training before a tenth of it
        save_snapshot(run, training, key, Snapshot("early", rounds_run, rounds_run / total, server.params, dict(participation.versions)))
    participation.versions = dict(progress.best_versions)
    save_snapshot(run, training, key, Snapshot("final", progress.best_round, progress.best_round / total, best, progress.best_versions))
    summary = _summary(run, training, name, seed, best, progress, rounds_run, anew=anew)
    sha = final_hash(training, best, run.recipe.data.num_clients)
    run.append("trained", weights_sha256=sha, **summary, **_for_plan(run, training, server, turns, evaluating, saving, beside))  # before the export, whose presence tells a resumed run to keep this line
    exported = gathered(training, _exported(training, best, recipe.data.num_clients), keep=run.leads)
    if run.leads:
        meta = {"summary": summary, "sha256": sha, "defence": name, "as_trained": config.to_json(chosen), "seed": seed, "fingerprint": run.fingerprint}
        meta |= _shape(run)
        export_model(export, {**exported, **training.frozen}, config.to_json(recipe), meta)
    world.barrier()
    if sharded is not None and recipe.attacks:
        return _finished(run, _as_attacked(run, chosen, seed, key), key, export)
    return Trained(training, load_snapshots(run, key, training), summary, sha)


@contextlib.contextmanager
def _closing(saver: SlicedCheckpoints | None) -> Iterator[None]:
    """A training that diverges, which all ranks see, ends with its last checkpoint on disk, so that the next training's saver meets no other."""
    try:
        yield
    except Diverged:
        if saver is not None:
            saver.close()
        raise


def _costly_sums(summing: float, seconds: float) -> str | None:
    """What to say of sums over ranks that took so much of a training's seconds; None where that is little."""
    if summing <= OVERLAP_ABOVE * seconds:
        return None
    ways = "more local steps or larger clients make them rarer, and speed.reduction=float32 halves their bytes"
    return f"the sums over ranks took {summing / seconds:.0%} of the training, once all ranks had come: {ways}."


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


def _summary(run: Run, training: build.Training, name: str, seed: int, best: Tensors, progress: Progress, rounds_run: int, *, anew: bool) -> dict[str, Any]:
    """Costs and test results of the final model; peaks of memory are each the largest of any rank, in the life of the run that ends the training. anew:
    whether this rank's process counts its peak since the training began."""
    scores = scores_on_test(run, training, best, seed=seed)
    told = run.world.all_gather_json({**memory.peaks(run.world.device), "anew": anew})
    spent = training.defence.budget
    return {
        "defence": name, "seed": seed, "epsilon": spent and spent.epsilon, "delta": spent and spent.delta, "rounds": rounds_run, "best_round": progress.best_round, "val_accuracy": progress.best_accuracy,
        **scores,
        "seconds": progress.seconds, "seconds_per_round": progress.seconds / max(rounds_run, 1), "bytes_per_round": build.bytes_per_round(training, run.recipe),
        "parameters_shared": numel(training, best), "clients_at_once": training.participation.at_once,
        **{name: max(one[name] for one in told) for name in told[0] if name != "anew"},
        "process_peak_of": "training" if all(one["anew"] for one in told) else "process",
    }  # fmt: skip


def _shape(run: Run) -> dict[str, Any]:
    return {"num_classes": run.setting.dataset.num_classes, "image_shape": list(run.setting.dataset.image_shape)}


def _exported(training: build.Training, params: Tensors, num_clients: int) -> Tensors:
    """The final model: the shared tensors, and under `head` every client's private front as `client-<k>/<name>`."""
    tensors = dict(params)
    names = model_names(training)
    if not all(name in params for name in names):
        for k in range(num_clients):
            state = training.participation.state(k)
            tensors |= {f"client-{k:05d}/{name}": state[name] for name in names if name not in params}
    return tensors


def final_hash(training: build.Training, params: Tensors, num_clients: int) -> str:
    """SHA-256 of the final model: fp32 little-endian bytes, name order (see checkpoint.weights_sha256)."""
    return weights_sha256(ChainMap(training.frozen, whole_of(training, _exported(training, params, num_clients))))


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


def _patience_over(recipe: config.Recipe, rounds_run: int, progress: Progress) -> bool:
    patience = recipe.rounds.patience
    return patience is not None and rounds_run > 0 and rounds_run - progress.best_round >= patience


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
    snapshots = load_snapshots(run, key, training)
    if snapshots:
        training.participation.versions = dict(snapshots["final"].versions)
    return Trained(training, snapshots, meta["summary"], meta["sha256"])
