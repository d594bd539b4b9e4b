"""Cuts of the training images into clients.

Every function takes labels, int64 (N,), and returns one sorted int64 tensor of rows per client: disjoint, every row used once, at
least `min_examples` each. Equal seeds give equal cuts, whatever the ranks. InputError for arguments out of range or more than N
images asked for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gidef.errors import InputError
from gidef.rng import stream_seed

REDRAWS = 100


def iid(labels: Tensor, *, num_clients: int, seed: int, min_examples: int = 1) -> list[Tensor]:
    """Every client draws from the same distribution; sizes differ by one at most."""
    draws = _draws(labels, num_clients, seed, min_examples, "iid")
    return _finish(np.array_split(draws.permutation(len(labels)), num_clients), min_examples)


def dirichlet(labels: Tensor, *, num_clients: int, alpha: float, seed: int, min_examples: int = 1) -> list[Tensor]:
    """Each class is spread over the clients in proportions from Dirichlet(alpha, ..., alpha).

    Args:   alpha: > 0; small is heterogeneous, `math.inf` gives equal proportions.
    Source: Hsu et al. 2019, arXiv:1909.06335, in the per-class form of Yurochkin et al. 2019, arXiv:1905.12022.
    Deviates: a draw that leaves a client below `min_examples` is repeated, 100 times at most; after that, images move to the
            smallest client from the largest.
    """
    draws = _draws(labels, num_clients, seed, min_examples, "dirichlet")
    _check_alpha(alpha)
    classes = [np.flatnonzero(labels.cpu().numpy() == number) for number in labels.unique().tolist()]
    for _ in range(REDRAWS):
        pieces = [_cut(draws.permutation(rows), _proportions(draws, alpha, num_clients)) for rows in classes]
        parts = [np.concatenate(piece) for piece in zip(*pieces, strict=True)]
        if min(map(len, parts)) >= min_examples:
            break
    return _finish(parts, min_examples)


def shards(labels: Tensor, *, num_clients: int, shards_per_client: int, seed: int, min_examples: int = 1) -> list[Tensor]:
    """Rows sorted by label and cut into num_clients · shards_per_client equal shards, dealt out at random.

    Args:   shards_per_client: >= 1; a client then sees about that many classes.
    Source: McMahan et al. 2017, arXiv:1602.05629, section 3 (2 shards for each of 100 clients).
    """
    draws = _draws(labels, num_clients, seed, min_examples, "shards")
    if shards_per_client < 1 or num_clients * shards_per_client > len(labels):
        asked = f"shards_per_client={shards_per_client} for num_clients={num_clients}"
        raise InputError(f"{asked}: expected at least 1, and no more shards in all than the {len(labels)} images.")
    rows = draws.permutation(len(labels))
    pieces = np.array_split(rows[np.argsort(labels.cpu().numpy()[rows], kind="stable")], num_clients * shards_per_client)
    hands = draws.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return _finish([np.concatenate([pieces[piece] for piece in hand]) for hand in hands], min_examples)


def quantity_skew(labels: Tensor, *, num_clients: int, alpha: float, seed: int, min_examples: int = 1) -> list[Tensor]:
    """Client sizes from Dirichlet(alpha, ..., alpha), classes alike.

    Args:   alpha: > 0; small is skewed, `math.inf` gives equal sizes.
    Source: Li et al. 2022, arXiv:2102.02079, "quantity skew".
    Deviates: as `dirichlet`.
    """
    draws = _draws(labels, num_clients, seed, min_examples, "quantity skew")
    _check_alpha(alpha)
    for _ in range(REDRAWS):
        parts = _cut(draws.permutation(len(labels)), _proportions(draws, alpha, num_clients))
        if min(map(len, parts)) >= min_examples:
            break
    return _finish(parts, min_examples)


def class_counts(labels: Tensor, parts: list[Tensor], num_classes: int) -> Tensor:
    """int64 (num_clients, num_classes): images of every class at every client."""
    labels = labels.cpu()
    return torch.stack([torch.bincount(labels[part], minlength=num_classes) for part in parts])


def summary(counts: Tensor) -> list[str]:
    """One line per client: its number, its size, and its images of every class. `counts` as from `class_counts`."""
    width, client = max(len(str(int(counts.max()))), 1), len(str(len(counts) - 1))
    total = len(str(int(counts.sum(1).max())))
    return [
        f"client {number:>{client}}  {sum(row):>{total}} images   classes " + " ".join(f"{count or '.':>{width}}" for count in row)
        for number, row in enumerate(counts.tolist())
    ]


def _draws(labels: Tensor, num_clients: int, seed: int, min_examples: int, kind: str) -> np.random.Generator:
    """The partition's random numbers, once its arguments make sense."""
    if num_clients < 1 or min_examples < 1:
        raise InputError(f"num_clients={num_clients}, min_examples={min_examples}: expected at least 1 of each.")
    if num_clients * min_examples > len(labels):
        asked = f"num_clients={num_clients} with min_examples={min_examples}"
        raise InputError(f"{asked} need {num_clients * min_examples} images: there are {len(labels)}. Lower one of the two.")
    return np.random.default_rng(stream_seed(seed, "partition", kind))


def _check_alpha(alpha: float) -> None:
    if not alpha > 0:  # also refuses NaN
        raise InputError(f"alpha={alpha}: the concentration of a Dirichlet distribution is greater than 0 (0.1 skewed, 100 nearly even).")


def _proportions(draws: np.random.Generator, alpha: float, num_clients: int) -> np.ndarray:
    """One Dirichlet draw; its two limits where floating point has none."""
    if alpha > 1e8:
        return np.full(num_clients, 1 / num_clients)
    proportions = draws.dirichlet(np.full(num_clients, alpha)) if alpha > 1e-8 else np.zeros(num_clients)
    if not math.isclose(proportions.sum(), 1, abs_tol=1e-6):  # alpha near zero: all to one client
        proportions = np.eye(num_clients)[draws.integers(num_clients)]
    return proportions


def _cut(rows: np.ndarray, proportions: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.rint(np.cumsum(proportions[:-1]) * len(rows)).astype(np.int64))


def _finish(parts: list[np.ndarray], min_examples: int) -> list[Tensor]:
    """Sorted tensors, after moving images from the largest client (ties: the first) to those below the least number."""
    for number in range(len(parts)):
        while (missing := min_examples - len(parts[number])) > 0:
            sizes = [len(part) for part in parts]
            donor = int(np.argmax(sizes))
            moved = max(1, min(missing, (sizes[donor] - sizes[number]) // 2, sizes[donor] - min_examples))
            parts[number] = np.concatenate([parts[number], parts[donor][-moved:]])
            parts[donor] = parts[donor][:-moved]
    return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]
