"""Who sees which training image: victims, the images that attacks are tuned on, and the judge's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gidef.data.images import Dataset
from gidef.data.splits import class_shares, shuffled_classes
from gidef.errors import InputError
from gidef.rng import generator


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """Rows of `dataset.train`, int64 and sorted; together they are all of it, and no row has two roles.

    victims: whose gradients are attacked.  tuning: held out, to tune attacks on.  judge: trains the judge.
    The public images of an attacker are `dataset.val`, and none of these.
    """

    victims: Tensor
    tuning: Tensor
    judge: Tensor


def split_roles(dataset: Dataset, *, num_victims: int, num_tuning: int, seed: int) -> Roles:
    """Draw the roles, stratified: classes in their proportion, and at least one image each where the number allows it.

    Args:    num_victims: >= 1.  num_tuning: >= 0.  seed: equal seeds give equal roles; the victims do not depend on num_tuning.
    Returns: Roles; the judge keeps at least one image of every class.
    Raises:  InputError if the numbers are out of range or exceed the training images.
    """
    if num_victims < 1 or num_tuning < 0:
        raise InputError(f"num_victims={num_victims}, num_tuning={num_tuning}: expected at least 1 victim and no negative number.")
    labels = dataset.train.labels.cpu()
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    free = int((counts - 1).clamp(min=0).sum())
    if num_victims + num_tuning > free:
        raise InputError(
            f"num_victims={num_victims} and num_tuning={num_tuning} exceed the {free} training images to draw from "
            f"({len(labels)}, less one of each class for the judge): lower one of them."
        )
    victims = class_shares(counts, num_victims)
    tuning = class_shares(counts - torch.tensor(victims), num_tuning)
    rows = shuffled_classes(labels, dataset.num_classes, generator(seed, "roles"))
    chosen = torch.full((len(labels),), 2)
    for row, first, second in zip(rows, victims, tuning, strict=True):
        chosen[row[:first]] = 0
        chosen[row[first : first + second]] = 1
    return Roles(*((chosen == role).nonzero().flatten() for role in range(3)))
