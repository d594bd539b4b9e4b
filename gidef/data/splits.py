"""Seeded, stratified cuts: what the authors of a data set left out, and the draw behind the roles."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from gidef.data.images import Images
from gidef.errors import InputError
from gidef.rng import generator


def class_shares(counts: Tensor, total: int, *, keep: int = 1) -> list[int]:
    """How many of `total` draws fall to each class: proportional, after one each if there are enough for that.

    Args:    counts: int64 (K,), images per class.  total: draws in all.  keep: images that every class keeps back.
    Raises:  ValueError if the classes cannot give so many.
    """
    limits = (counts - keep).clamp(min=0).tolist()
    if total > sum(limits):
        raise ValueError(f"{total} draws from {sum(limits)} images")
    quotas = [total * count / max(1, int(counts.sum())) for count in counts.tolist()]
    least = 1 if total >= sum(limit > 0 for limit in limits) else 0
    shares = [min(limit, least) for limit in limits]
    behind = [(shares[number] - quotas[number], number) for number, limit in enumerate(limits) if shares[number] < limit]
    heapq.heapify(behind)
    for _ in range(total - sum(shares)):  # each to the class that is furthest behind its quota
        excess, number = heapq.heappop(behind)
        shares[number] += 1
        if shares[number] < limits[number]:
            heapq.heappush(behind, (excess + 1, number))
    return shares


def shuffled_classes(labels: Tensor, num_classes: int, draws: torch.Generator) -> list[Tensor]:
    """Per class, its row numbers in random order."""
    return [rows[torch.randperm(len(rows), generator=draws)] for rows in ((labels == number).nonzero().flatten() for number in range(num_classes))]


def cut(images: Images, fraction: float, seed: int, purpose: str) -> tuple[Images, Images]:
    """(rest, part): `fraction` of the images, stratified; at least one of each class, but never a class's last. Both keep their order.

    Raises: InputError if every class has a single image.
    """
    counts = torch.bincount(images.labels)
    free, giving = int((counts - 1).clamp(min=0).sum()), int((counts > 1).sum())
    if not free:
        raise InputError(f"{len(images)} images in {int((counts > 0).sum())} classes are too few to cut a {purpose} split from them.")
    shares = class_shares(counts, min(free, max(giving, round(fraction * len(images)))))
    rows = shuffled_classes(images.labels, len(counts), generator(seed, "cut", purpose))
    part = torch.cat([row[:share] for row, share in zip(rows, shares, strict=True)])
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[part] = True
    return images[~chosen], images[chosen]


def complete(found: dict[str, Images], *, where: str, fraction: float, seed: int) -> tuple[dict[str, Images], tuple[str, ...]]:
    """All three splits and notes on what was cut, from {"all"}, {"train", "test"} or all three.

    Raises: InputError if a train or test split is missing.
    """
    if set(found) == {"all"}:
        rest, test = cut(found["all"], 0.2, seed, "test")
        train, val = cut(rest, 0.125, seed, "validation")  # an eighth of 80 % is 10 % of all
        sizes = f"{len(train)} / {len(val)} / {len(test)}"
        note = f"no splits: cut into {sizes} train / validation / test images (70 / 10 / 20 %, stratified, seed {seed})."
        return {"train": train, "val": val, "test": test}, (note,)
    missing = {"train", "test"} - set(found)
    if missing:
        raise InputError(f"{where}: no {' and no '.join(sorted(missing))} images: expected train and test (and val), or no splits at all.")
    if "val" in found:
        return found, ()
    train, val = cut(found["train"], fraction, seed, "validation")
    note = f"no validation split: {len(val)} images cut from the {len(found['train'])} training images (stratified, seed {seed})."
    return {"train": train, "val": val, "test": found["test"]}, (note,)
