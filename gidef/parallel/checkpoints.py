"""Checkpoints of a client's network in slices: each rank of a group writes and reads its own, through torch.distributed.checkpoint.

A checkpoint is a folder `round-000012` of safetensors files, so nothing in it is a pickle or can run, and `meta.json`, written last: a folder without it
is half a checkpoint and counts for nothing. They are read from a run's own folder only, into slices for any number of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gidef.errors import InputError
from gidef.parallel.mesh import Layout
from gidef.parallel.world import World
from gidef.types import Tensors

FORMAT = "gidef-slices-1"
META = "meta.json"
_NAME = re.compile(r"round-(\d+)(\.safetensors)?")


class SlicedCheckpoints:
    """Saves rounds in the background: `save` returns once the slices are copied, and a thread writes while the next round trains.

    All ranks of the run call the methods together; the first group's write. The `keep` newest whole checkpoints stay.
    """

    def __init__(self, folder: Path | str, world: World, layout: Layout, *, keep: int = 2) -> None:
        self._folder, self._world, self._layout, self._keep = Path(folder), world, layout, keep
        self._writes = world.mesh.clients.rank == 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if self._writes else None
        self._pending: Future | None = None

    def save(self, number: int, slices: Tensors, meta: dict[str, Any]) -> None:
        """Begin to save round `number`, once the one before is written. Raises as `wait`."""
        self.wait()
        path = _path(self._folder, number)
        if self._world.rank == 0:
            if path.exists():  # of a life that was killed while saving, or went on from an older round
                shutil.rmtree(path)
            path.mkdir(parents=True)
        self._world.barrier()
        if not self._writes:
            return
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        written = async_save(self._layout.spread(slices), storage_writer=writer, process_group=self._world.mesh.saving)
        head = {"format": FORMAT, "number": number, "meta": meta, "tensors": self._described(slices)}
        self._pending = self._pool.submit(self._settle, written, path, head)

    def wait(self) -> None:
        """Return once the last checkpoint is whole and on disk. Raises: InputError on every rank when the disk is full; all earlier ones are intact."""
        failed = None
        if self._pending is not None:
            try:
                self._pending.result()
            except Exception as error:  # what torch makes of another rank's is no subclass of OSError
                failed = error
            self._pending = None
        texts = [text for text in self._world.all_gather_json(None if failed is None else _text(failed)) if text]
        if not texts:
            return
        if any(text == "full" for text in texts):
            raise InputError(
                f"disk full: {self._folder} has no room for a checkpoint; free space or raise the quota, and start again with --resume: "
                "the run goes on from its last checkpoint, which is intact"
            ) from failed
        raise RuntimeError(f"a checkpoint in {self._folder} could not be written: {texts[0]}") from failed

    def close(self) -> None:
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()

    def _described(self, slices: Tensors) -> dict[str, Any]:
        """Whole shape and dtype by name."""
        return {name: [list(self._layout.shape(name) or tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in slices.items()}

    def _settle(self, written: Any, path: Path, head: dict[str, Any]) -> None:
        """Rank 0, once all files are written: describe them, which makes the checkpoint count, and remove older ones."""
        written.result()
        if self._world.rank != 0:
            return
        head["files"] = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(path.glob("*.safetensors"))}
        temporary = path / f"{META}.tmp"
        with temporary.open("w") as stream:
            json.dump(head, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path / META)
        prune(self._folder, before=head["number"] - self._keep + 1)


def newest(folder: Path | str, notice: Callable[[str], None]) -> int | None:
    """The number of the newest whole checkpoint in slices, None if there is none; one rank asks.

    One that is damaged is passed over, renamed to `*.damaged` and reported. Raises: InputError when there are some and all are damaged.
    """
    damaged: list[Path] = []
    for number in sorted((number for number, path in _found(Path(folder)) if path.is_dir() and (path / META).exists()), reverse=True):
        path = _path(Path(folder), number)
        if not _good(path, number):
            damaged.append(path)
            continue
        for bad in damaged:
            notice(f"{bad} is damaged: take another copy, or an older checkpoint; going on from {path.name}")
            bad.replace(bad.with_name(f"{bad.name}.damaged"))
        return number
    if damaged:
        raise InputError(f"no good checkpoint in {folder}, damaged: {', '.join(path.name for path in damaged)}. Restore one, or remove the folder to start over.")
    return None


def load(folder: Path | str, number: int, layout: Layout | None, device: torch.device) -> tuple[Tensors, dict[str, Any]]:
    """(this rank's slices under `layout`, or whole tensors without, and the metadata) of a checkpoint that `newest` found."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as fill

    path = _path(Path(folder), number)
    try:
        head = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"no checkpoint of round {number} in {folder}: all ranks must see the same folder") from error
    described = {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in head["tensors"].items()}
    if layout is None:
        tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in described.items()}
    else:
        tensors = layout.empty(described, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which is what no_dist asks for
        fill(tensors if layout is None else layout.spread(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return tensors, head["meta"]


def prune(folder: Path | str, *, before: int) -> None:
    """Remove the checkpoints of rounds below `before`, in slices or in one file."""
    for number, path in _found(Path(folder)):
        if number < before and path.is_dir():
            (path / META).unlink(missing_ok=True)  # first: what is half removed must not count
            shutil.rmtree(path, ignore_errors=True)
        elif number < before:
            path.unlink(missing_ok=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}"


def _found(folder: Path) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for path in folder.glob("round-*") if (match := _NAME.fullmatch(path.name))]


def _good(path: Path, number: int) -> bool:
    """Whether every byte is as it was written."""
    try:
        head = json.loads((path / META).read_text())
        whole = head["format"] == FORMAT and head["number"] == number
        return whole and all((path / name).stat().st_size == size and _sha256(path / name) == sha for name, (size, sha) in head["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text(error: Exception) -> str:
    """"full" for a full disk, which torch and safetensors tell in their texts only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    text = f"{type(error).__name__}: {error}"
    full = getattr(error, "errno", None) in numbers or any(f"os error {n})" in text or f"[Errno {n}]" in text for n in numbers)
    return "full" if full else text
