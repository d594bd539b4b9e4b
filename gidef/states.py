"""What a training leaves on disk: checkpoints to go on from, and snapshots to attack. Where a client spans several ranks, the server's tensors are slices."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gidef import build
from gidef.checkpoint import load_file, load_latest, save_checkpoint, save_file, weights_sha256
from gidef.errors import InputError
from gidef.models import moving_statistics
from gidef.parallel import World, checkpoints
from gidef.runs import CHECKPOINTS, FROZEN, Run, Snapshot, snapshot_path
from gidef.spans import span
from gidef.types import ServerState, Tensors


@dataclass(slots=True)
class Progress:
    """What a checkpoint holds beside the server: plain numbers."""

    best_round: int = 0
    best_accuracy: float = -1.0
    best_versions: dict[int, int] = field(default_factory=dict)
    early_versions: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


def whole_of(training: build.Training, tensors: Tensors) -> Mapping[str, Tensor]:
    """The whole tensors, gathered one at a time as all ranks read them."""
    return training.sharded.layout.whole(tensors) if training.sharded else tensors


def gathered(training: build.Training, tensors: Tensors, *, keep: bool) -> Tensors:
    return training.sharded.layout.gathered(tensors, keep=keep) if training.sharded else tensors


def numel(training: build.Training, tensors: Tensors) -> int:
    return training.sharded.layout.numel(tensors) if training.sharded else sum(t.numel() for t in tensors.values())


def checkpoint_folder(run: Run, key: str) -> Path:
    return run.folder / "checkpoints" / key


@span("checkpoint")
def save_state(run: Run, key: str, number: int, held: tuple[Tensors, dict[str, Any]]) -> None:
    keep = run.recipe.speed.checkpoints_kept
    save_checkpoint(checkpoint_folder(run, key), number, *held, keep=keep)
    checkpoints.prune(checkpoint_folder(run, key), before=number - keep + 1)  # in slices, from before a resumption


def state_of(
    run: Run, server: ServerState, best: Tensors, versions: dict[int, int], progress: Progress, speed: dict[str, Any]
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


def load_state(run: Run, key: str, training: build.Training) -> tuple[Tensors, dict[str, Any]] | None:
    """Rank 0 finds the newest good checkpoint, in one file or in slices, and all read it into what they hold now: whole tensors or slices.

    What one of them cannot read is told on all.
    """
    if not run.recipe.resume:
        return None
    folder, layout = checkpoint_folder(run, key), training.sharded.layout if training.sharded else None
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


def state_hash(training: build.Training, server: ServerState, best: Tensors, versions: dict[int, int], progress: Progress) -> str:
    """SHA-256 of all that the next round depends on."""
    slots = {f"{slot}/{name}": tensor for slot, slots in server.slots.items() for name, tensor in slots.items()}
    plain = [sorted(versions.items()), progress.best_round, progress.best_accuracy, sorted(progress.best_versions.items()), sorted(slots)]
    parts = [weights_sha256(whole_of(training, tensors)) for tensors in (server.params, slots, best)]
    parts += [weights_sha256(training.frozen)] if training.frozen else []
    return hashlib.sha256("|".join([*parts, json.dumps(plain)]).encode()).hexdigest()


def compare_states(world: World, key: str, number: int, state: str) -> None:
    """All ranks must be where rank 0 is. Raises InputError on every rank, with those that are elsewhere."""
    told = world.all_gather_json([number, state, socket.gethostname()])
    odd = [f"rank {rank} on host {host} (round {at})" for rank, (at, one, host) in enumerate(told) if (at, one) != tuple(told[0][:2])]
    if odd:
        raise InputError(
            f"{key}: rank 0 on host {told[0][2]} starts after round {told[0][0]}, and {', '.join(odd)} with another state: all ranks must see the same "
            "run folder, on a disk that all hosts share. Give such a folder as --out, or remove what differs."
        )


def unpack(tensors: Tensors, meta: dict[str, Any], participation: Any, device: torch.device) -> tuple[ServerState, Tensors, Progress]:
    def part(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)}

    slots = {name.split("/")[1] for name in tensors if name.startswith("slots/")}
    server = ServerState(part("params/"), meta["round"], {slot: part(f"slots/{slot}/") for slot in slots})
    participation.versions = by_client(meta["versions"])
    progress = Progress(
        meta["best_round"], meta["best_accuracy"], by_client(meta["best_versions"]), by_client(meta["early_versions"]), meta["seconds"]
    )
    return server, part("best/"), progress


def by_client(versions: dict[str, int]) -> dict[int, int]:
    """JSON turns integer keys into text."""
    return {int(client): int(version) for client, version in versions.items()}


@span("checkpoint")
def save_snapshot(run: Run, training: build.Training, key: str, snapshot: Snapshot) -> None:
    params = gathered(training, snapshot.params, keep=run.leads)
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
    return Snapshot(meta["name"], meta["round"], meta["progress"], params, by_client(meta["versions"]), apart)


def load_snapshots(run: Run, key: str, training: build.Training) -> dict[str, Snapshot]:
    """None where nothing attacks them and a whole model may not fit on a rank."""
    statistics = moving_statistics(training.defence.model)
    return {name: load_snapshot(run, key, name, statistics) for name in CHECKPOINTS} if run.recipe.attacks or run.world.mesh is None else {}
