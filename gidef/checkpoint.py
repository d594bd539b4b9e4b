"""Checkpoints and exported models: safetensors files that are written whole or not at all, and checked when read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as write_safetensors
from torch import Tensor

from gidef.errors import InputError, StorageError
from gidef.types import Tensors

FORMAT = "gidef-1"
_CHECKPOINT = re.compile(r"round-(\d+)\.safetensors")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save_file(path: Path | str, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata to one file, atomically and durably.

    The file appears under its name only when it is whole and on disk: temporary file in the same folder, fsync, rename, fsync
    of the folder. A file of that name is replaced. The folder is made. Any device, dtype and layout; tied tensors are written twice.
    A SHA-256 over metadata, names, dtypes, shapes and bytes is stored with them.

    Raises: StorageError when the disk or quota is full: nothing half-written stays, and what was there before is intact.
    """
    path = Path(path)
    packed = _pack(tensors)
    text = json.dumps(meta, sort_keys=True)
    header = {"format": FORMAT, "meta": text, "sha256": _checksum(packed, text)}
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write_safetensors(packed, temporary, metadata=header)
        temporary.chmod(mode)  # safetensors makes files of mode 600, which a group's other users could not read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if not _is_full(error):
            raise
        size = sum(tensor.nbytes for tensor in packed.values()) / 2**20
        raise StorageError(
            f"disk full: {path} needs {size:.1f} MiB; free space or raise the quota, or choose another output folder, and start again: "
            "the run goes on from its last checkpoint, which is intact"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_file(path: Path | str, device: torch.device | str = "cpu") -> tuple[Tensors, dict[str, Any]]:
    """(tensors, metadata) as saved, dtypes kept, in memory of their own.

    Raises: StorageError when the file is missing, no file that can be read, truncated, damaged in any byte that matters, or not written by gidef.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header, names = file.metadata() or {}, file.keys()
            # Copied before the checksum: the file is only mapped, and another host may remove it under us.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist") from error
    except OSError as error:  # safetensors names a folder "No such device"
        raise StorageError(f"{path} cannot be read ({'a folder' if path.is_dir() else error.strerror or error}): expected a file that gidef wrote") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise StorageError(f"{path} is truncated or damaged ({error}): take another copy, or an older checkpoint") from error
    if header.get("format") != FORMAT:
        raise StorageError(f"{path} has format {header.get('format')!r}, expected {FORMAT!r}: it was not written by this version of gidef")
    if header.get("sha256") != _checksum(tensors, header.get("meta", "")):
        raise StorageError(f"{path} is damaged: its SHA-256 does not match; take another copy, or an older checkpoint")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(header["meta"])


def save_checkpoint(folder: Path | str, number: int, tensors: Tensors, meta: dict[str, Any], *, keep: int = 2) -> Path:
    """Save round `number` as `round-000012.safetensors`, then remove all but the `keep` newest. One rank per folder calls this.

    Raises: InputError when the disk is full, with all earlier checkpoints intact; ValueError if keep is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint must stay")
    folder = Path(folder)
    path = folder / f"round-{number:06d}.safetensors"
    save_file(path, tensors, meta)
    for _, old in _checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    for left in folder.glob("round-*.tmp"):  # of a process that was killed while saving
        left.unlink(missing_ok=True)
    return path


class Behind:
    """Calls in one thread of its own, one at a time: a checkpoint is written while the next round is computed. A context manager.

    A call waits for the one before; what that one raised is raised then, or at the end of the context. The end waits in any case, also for an
    error of the caller's, which comes first.
    """

    def __init__(self) -> None:
        self._pool, self._running = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Start it. Its arguments must not change any more."""
        self.wait()
        self._running = self._pool.submit(function, *args, **options)

    def wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()


def load_latest(
    folder: Path | str, notice: Callable[[str], None], device: torch.device | str = "cpu", *, at: int | None = None
) -> tuple[int, Tensors, dict[str, Any]] | None:
    """(number, tensors, metadata) of the newest good checkpoint, or None when the folder has none.

    A damaged newer one is passed over, renamed to `*.damaged`, and reported through `notice(text)`. One rank chooses; the others
    then load `at` the number it found, and no other.

    Raises: InputError when checkpoints exist but all are damaged, since starting over would hide that, or when the one `at` is missing.
    """
    damaged: list[tuple[Path, InputError]] = []
    found = [(number, path) for number, path in _checkpoints(Path(folder)) if at is None or number == at]
    if at is not None and not found:
        raise InputError(f"no checkpoint of round {at} in {folder}: all ranks must see the same folder")
    for number, path in found:
        try:
            tensors, meta = load_file(path, device)
        except InputError as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:
            notice(f"{error}; going on from {path.name}")
            if bad.exists():  # not if another rank was faster
                bad.replace(bad.with_name(f"{bad.name}.damaged"))  # so that it does not count as one to keep
        return number, tensors, meta
    if damaged:
        names = ", ".join(path.name for _, path in found)
        raise InputError(f"no good checkpoint in {folder}, damaged: {names}. Restore one, or remove the folder to start over. {damaged[0][1]}")
    return None


def export_model(path: Path | str, tensors: Tensors, recipe: dict[str, Any], extra: dict[str, Any] | None = None) -> None:
    """Write a trained model with the recipe that made it: metadata {recipe, weights_sha256, **extra}. Raises as `save_file`."""
    save_file(path, tensors, {**(extra or {}), "recipe": recipe, "weights_sha256": weights_sha256(tensors)})


def load_export(path: Path | str, device: torch.device | str = "cpu") -> tuple[Tensors, dict[str, Any]]:
    """(tensors, metadata) of an exported model. Raises InputError as `load_file`, and for a file that is no export."""
    tensors, meta = load_file(path, device)
    if "recipe" not in meta:
        raise InputError(f"{path} holds no recipe: expected a file written by export, not a checkpoint")
    return tensors, meta


def weights_sha256(tensors: Tensors) -> str:
    """SHA-256, in hex, of the tensors' float32 little-endian bytes in name order. Names and dtypes do not enter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _pack(tensors: Tensors) -> Tensors:
    """Contiguous CPU tensors, no two in one storage, which safetensors refuses to write."""
    packed: Tensors = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        packed[name] = own
    return packed


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _checksum(tensors: Tensors, text: str) -> str:
    """SHA-256 of the metadata and of every name, dtype, shape and byte."""
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    digest = hashlib.sha256(json.dumps([text, layout]).encode())
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(number, path) of the folder's checkpoints, newest first."""
    matches = [(match, path) for path in folder.glob("round-*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in matches), reverse=True)


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether the disk or quota was full; safetensors tells only in its text, as "(os error 28)"."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"os error {number})" in str(error) for number in _FULL)


def _fsync_folder(folder: Path) -> None:
    """Make the rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)
