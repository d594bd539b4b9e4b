"""Images as tensors, the data set that holds them, and the checks that every source passes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gidef.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Images and their classes, row by row. Treated as read-only: data sets are shared.

    images: uint8 (N, C, H, W) in [0, 255].  labels: int64 (N,) in [0, num_classes).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def __getitem__(self, index: Tensor) -> Images:
        """The rows of an index or boolean tensor, as a copy."""
        return Images(self.images[index.to(self.images.device)], self.labels[index.to(self.labels.device)])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in three splits, on the CPU.

    name:  short, as in a recipe.  title: for people; contains "synthetic" if no camera was involved.  modality: what took the images.
    class_names: one per class.  source: file, folder or address.  md5: of the source's bytes, None if it has none.
    notes: what a reader of results has to know, such as "a re-split".
    """

    name: str
    title: str
    modality: str
    class_names: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    source: str
    md5: str | None
    synthetic: bool
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def as_float(images: Tensor) -> Tensor:
    """uint8 of any shape to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of uint8 (N, C, H, W) to uint8 (N, C, *size); the input itself if it has that size."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    result = images.new_empty(*images.shape[:2], *size)
    for start in range(0, len(images), 512):  # the float copy stays small
        part = images[start : start + 512].to(torch.float32)
        result[start : start + 512] = F.interpolate(part, size=size, mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)
    return result


def resize_dataset(dataset: Dataset, size: int | None) -> Dataset:
    """The data set at size × size pixels, with a note; unchanged if it has that size already or `size` is None."""
    if size is None or dataset.image_shape[1:] == (size, size):
        return dataset
    height, width = dataset.image_shape[1:]
    parts = {split: Images(resize(getattr(dataset, split).images, (size, size)), getattr(dataset, split).labels) for split in SPLITS}
    note = f"images resized from {height}x{width} to {size}x{size} pixels (antialiased bilinear)."
    return replace(dataset, **parts, notes=(*dataset.notes, note))


def check_size(size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or not 8 <= size <= 2048):
        raise InputError(f"size={size!r}: expected an image side of 8 to 2048 pixels, or None for the native size.")


def check_dataset(dataset: Dataset) -> Dataset:
    """Return the data set if it keeps the promises above, in particular that every class has a training image.

    Raises: InputError that names the source and the split.
    """
    where = functools.partial("{}: {}".format, dataset.source)
    if dataset.num_classes < 2:
        raise InputError(where(f"{dataset.num_classes} class: classification needs two or more."))
    shape = None
    for split in SPLITS:
        part = getattr(dataset, split)
        images, labels = part.images, part.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            got = f"{images.dtype} {tuple(images.shape)}"
            raise InputError(where(f"{split}_images are {got}: expected uint8 (N, C, H, W) with 1 or 3 channels."))
        if labels.dtype != torch.int64 or labels.ndim != 1 or len(labels) != len(images):
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise InputError(where(f"{split}_labels are {got}: expected int64 ({len(images)},), one class number per image."))
        if len(labels) == 0:
            raise InputError(where(f"{split}_images is empty: every split needs images."))
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            got = f"{tuple(images.shape[1:])}, train_images {tuple(shape)}"
            raise InputError(where(f"{split}_images have shape {got}: all splits need the same (C, H, W)."))
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= dataset.num_classes:
            wrong = low if low < 0 else high
            raise InputError(where(f"{split}_labels hold class {wrong}: expected 0 to {dataset.num_classes - 1}."))
    counts = torch.bincount(dataset.train.labels, minlength=dataset.num_classes)
    for number in (counts == 0).nonzero().flatten().tolist():
        name = dataset.class_names[number]
        advice = f"number the classes 0 to {dataset.num_classes - 1} without a gap, or add images."
        raise InputError(where(f"train_labels: class {number} ({name}) has no training image; {advice}"))
    return dataset
