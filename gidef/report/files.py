"""Plain JSON values, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gidef.errors import StorageError


def plain(value: Any) -> Any:
    """A value as JSON takes it: tensors and arrays of any device become numbers or lists, paths strings, tuples lists; NaN and ±inf become None.

    Raises: TypeError for anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"disk full while writing {path}: free some space, then continue the run.") from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}. Choose a folder that can be written to.") from error


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replace `path` by a file that holds `data`: written beside it, synced, renamed. A reader sees the old file or the new one.

    Raises: StorageError on a full disk or a folder that cannot be written to; the old file stays and no temporary one is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


WAIT_S = 10.0
"""For so long a process that was told to end may still hold a folder."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, for this process alone: by a lock on a file in it, which ends with the process, however that ends.

    Where the file system knows no locks, nothing is held.
    Raises: StorageError when another process holds it, after a wait, or it cannot be written to.
    """
    import fcntl

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")  # noqa: SIM115  closed below
    with file:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StorageError(f"another process is writing {folder}: wait for its end, or choose another --out.") from error
                time.sleep(0.1)
            except OSError:
                break
        yield
