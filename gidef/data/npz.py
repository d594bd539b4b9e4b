"""NumPy archives in MedMNIST's layout: {train,val,test}_images and _labels; val may be missing."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from gidef.data.images import SPLITS, Images
from gidef.errors import InputError


def md5_of(path: Path) -> str:
    """The file's MD5, as MedMNIST publishes it (a checksum, no protection)."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_npz(path: Path) -> dict[str, Images]:
    """The archive's splits, images as uint8 (N, C, H, W). Never unpickles.

    Args:   path: keys as above; images uint8 (N, H, W) or (N, H, W, C) with C of 1 or 3, labels of an integer type, (N,) or (N, 1).
    Raises: InputError naming the file and the key.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: a single array, expected an .npz archive with train_images, train_labels and so on.")
            present = [split for split in SPLITS if {f"{split}_images", f"{split}_labels"} & set(archive.files)]
            for key in [f"{split}_{kind}" for split in dict.fromkeys([*present, "train", "test"]) for kind in ("images", "labels")]:
                if key not in archive.files:
                    raise InputError(f"{path}: key {key} is missing (found {', '.join(archive.files) or 'none'}).")
            return {split: _split(path, split, archive) for split in present}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    except MemoryError as error:
        raise InputError(f"{path}: does not fit into memory ({error}).") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, pickle.UnpicklingError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a whole .npz archive ({error}): it may be truncated; fetch it again.") from error


def _split(path: Path, split: str, archive: np.lib.npyio.NpzFile) -> Images:
    """One split, checked key by key."""
    images, labels = _array(path, archive, f"{split}_images"), _array(path, archive, f"{split}_labels")
    where = f"{path}: {split}_images"
    if images.dtype != np.uint8:
        raise InputError(f"{where} has dtype {images.dtype}: expected uint8 in 0..255.")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(f"{where} has shape {images.shape}: expected (N, H, W) or (N, H, W, C) with 1 or 3 channels.")
    if 0 in images.shape:
        raise InputError(f"{where} has shape {images.shape}: it is empty.")
    where = f"{path}: {split}_labels"
    if labels.dtype.kind not in "iu":
        raise InputError(f"{where} has dtype {labels.dtype}: expected integers, the class numbers.")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise InputError(f"{where} has shape {labels.shape}: several labels per image are not supported, expected (N,) or (N, 1).")
    if labels.ndim not in (1, 2) or labels.size != len(images):
        raise InputError(f"{where} has shape {labels.shape}: expected ({len(images)},) or ({len(images)}, 1), one per image.")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"{where} holds {labels.min()}: classes are numbered from 0.")
    return Images(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels))


def _array(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        return archive[key]
    except ValueError as error:
        reason = "pickled Python objects, which gidef never loads: save plain arrays" if "allow_pickle" in str(error) else str(error)
        raise InputError(f"{path}: {key} cannot be read ({reason}).") from error
