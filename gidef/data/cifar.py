"""CIFAR-10 as torchvision keeps it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gidef.data.download import Progress, fetch
from gidef.data.images import Images
from gidef.data.npz import md5_of
from gidef.errors import InputError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_IMAGES = 50_000


def cache() -> Path:
    return Path.home() / ".cache" / "gidef" / "cifar10"


def cached() -> dict[str, Images] | None:
    """Train and test split from torchvision's files in the cache, or None if there are none.

    torchvision compares every file with its published MD5 before it unpickles it, so that only CIFAR's own pickles are ever loaded.
    """
    archive, folder = cache() / _set().filename, cache() / _set().base_folder
    if not archive.is_file() and not folder.is_dir():
        return None
    if archive.is_file() and md5_of(archive) != _set().tgz_md5:
        raise InputError(f"{archive}: MD5 differs from {_set().tgz_md5}. The file is broken: delete it and run again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy 2.4 about the align flag in these pickles of 2009
            halves = {split: _set()(cache(), train=split == "train", download=archive.is_file()) for split in ("train", "test")}
    except (RuntimeError, OSError, EOFError) as error:
        raise InputError(f"{cache()}: CIFAR-10 is incomplete or changed ({error}): delete the folder and run again.") from error
    return {split: Images(torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(half.targets)) for split, half in halves.items()}


def download(*, progress: Progress | None, notice: Callable[[str], None]) -> dict[str, Images]:
    """Fetch torchvision's archive into the cache and read it.

    Raises: Unreachable or InputError; see download.fetch.
    """
    notice(f"CIFAR-10 is not on this machine: trying {_set().url}")
    fetch(_set().url, cache() / _set().filename, md5=_set().tgz_md5, progress=progress)
    return cached()


def archive_md5() -> str:
    return _set().tgz_md5


def _set() -> Any:
    """torchvision's class, imported when needed: it takes seconds."""
    from torchvision.datasets import CIFAR10

    return CIFAR10
