"""Updates in few numbers, for networks that read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gidef.errors import InputError
from gidef.rng import stream_seed
from gidef.types import Tensors


def sketch(update: Tensors, dim: int, seed: int = 0) -> Tensor:
    """An update in few numbers: its entries over its norm, large tensors hashed to a few numbers each.

        tensor of n entries, d ≥ n:  its entries        d < n:  s_i = Σ_{j mod d = i} r_j t_j,   r_j = ±1 from a hash of j

    and all of it · √dim / ‖update‖, so that numbers are of order 1. The d's are one level, the highest that dim allows, lowered to n
    for tensors that have fewer: biases and norms are kept whole, which one hash over everything would drown in the large kernels.
    Signed sums keep inner products in the mean (count sketch), tensor by tensor and with no more memory than the largest one.

    Args:    update: floating, of any names, whose order carries no meaning.  dim: length of the result, at least one per tensor; with
             as many as there are entries nothing is hashed, and what is left over is zero.  seed: of the signs.
    Returns: (dim,), of the update's dtype; zero for a zero update. Pure and vmappable, the same numbers for stacks.
    Raises:  InputError if dim is too small.
    Source:  Charikar et al. 2002, count sketch; Weinberger et al. 2009, feature hashing.
    Deviates: buckets are remainders instead of a second hash, so that sums are in a fixed order on every device; d is chosen free of
             the factors 2 and 3, so that the strides of kernels and channels do not meet the same bucket again and again.
    """
    names = sorted(update)
    sizes = [update[name].numel() for name in names]
    if dim < len(names):
        raise InputError(f"a sketch of {dim} numbers cannot hold {len(names)} tensors: give it at least one number per tensor.")
    parts = []
    for name, share in zip(names, shares(sizes, dim), strict=True):
        parts.append(hashed(update[name].flatten(), share, stream_seed(seed, "sketch", name)))
    squared = sum(update[name].square().sum() for name in names)
    kept = torch.cat(parts)
    inverse = torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).rsqrt(), 0.0)
    return F.pad(kept * (math.sqrt(dim) * inverse), (0, dim - len(kept)))


def hashed(flat: Tensor, share: int, key: int) -> Tensor:
    """Signed sums over remainders, (n,) → (share,); the numbers themselves if that is as many."""
    if share >= len(flat):
        return flat
    signed = flat * _signs(len(flat), key, flat.device).to(flat.dtype)
    return F.pad(signed, (0, -len(flat) % share)).view(-1, share).sum(0)


def shares(sizes: Sequence[int], dim: int) -> list[int]:
    """Numbers kept of each tensor: min(size, level) with the highest level that fits, hashed ones free of the factors 2 and 3."""
    left, found = dim, [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda place: sizes[place])
    for done, place in enumerate(order):
        level = left // (len(order) - done)
        found[place] = sizes[place] if sizes[place] <= level else max(n for n in range(max(level - 4, 1), level + 1) if n == 1 or (n % 2 and n % 3))
        left -= found[place]
    return found


def _signs(count: int, key: int, device: torch.device) -> Tensor:
    """±1 per place, int64: a bit of SplitMix64's finaliser. Integer arithmetic, so that devices agree and vmap sees no random call."""
    x = torch.arange(1, count + 1, device=device) * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, wrapping
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return ((x >> 40) & 1) * 2 - 1
