"""A folder of images: one sub-folder per class, under train/, val/ and test/ or not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from gidef.data.decode import decode, stack
from gidef.data.images import SPLITS, Images
from gidef.errors import InputError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}


def read_folder(root: Path, size: int | None) -> tuple[dict[str, Images], tuple[str, ...], str, tuple[str, ...]]:
    """(splits, class names, md5 over names and bytes, notes). Splits are {"all"} when the folder has none.

    Files are read in the order of their names; classes are numbered in the order of theirs. Other endings are left out and counted.

    Args:   size: side to resize to; None takes the first image's size.
    Raises: InputError naming the file or folder.
    """
    splits = [split for split in SPLITS if (root / split).is_dir()]
    bases = {split: root / split for split in splits} or {"all": root}
    if len(splits) == 1:
        raise InputError(f"{root}: holds {splits[0]}/ alone: expected train/ and test/ (and val/), each with one sub-folder per class.")
    class_names = tuple(folder.name for folder in _subfolders(next(iter(bases.values()))))
    if len(class_names) < 2:
        raise InputError(f"{root}: found {len(class_names)} class folders, expected two or more: one sub-folder of images per class.")
    files: list[tuple[str, int, Path]] = []
    others = 0
    for split, base in bases.items():
        for folder in _subfolders(base):
            if folder.name not in class_names:
                raise InputError(f"{folder}: this class has no folder in {next(iter(bases.values()))}.")
            inside = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
            images = [path for path in inside if path.suffix.lower() in FORMATS]
            others += len(inside) - len(images)
            files += [(split, class_names.index(folder.name), path) for path in images]
    for split, base in bases.items():
        if not any(entry[0] == split for entry in files):
            raise InputError(f"{base}: holds no images ({', '.join(FORMATS)}) in its class folders.")
    digest = hashlib.md5(usedforsecurity=False)

    def read(path: Path) -> torch.Tensor:
        try:
            data = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
            return decode(data, tuple(dict.fromkeys(FORMATS.values())))
        except (OSError, InputError) as error:
            raise InputError(f"{path}: {error}. Repair or remove it.") from error

    images, notes = stack((read(path) for _, _, path in files), size, str(root))
    labels = torch.tensor([label for _, label, _ in files])
    if others:
        notes += (f"{others} files that are no images were left out.",)
    rows = {split: torch.tensor([entry[0] == split for entry in files]) for split in bases}
    everything = Images(images, labels)
    return {split: everything[mask] for split, mask in rows.items()}, class_names, digest.hexdigest(), notes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
