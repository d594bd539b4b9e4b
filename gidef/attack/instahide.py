"""InstaHide undone, from many encodings of the same private images: the known break, in its smallest form.

An encoding is e_j = s_j ⊙ Σ_i λ_ji x_i on [−1, 1], with random signs s_j. Absolute values take the signs off, |e_j| = |Λ_j X|, so that hiding comes down
to mixing, and an image that stands in several encodings makes them alike:

    1  similarity: the cosine of |e_j| and |e_l|, each less the mean over all encodings, is high where they share an image
    2  which images stand in which encoding: as many groups as images, seeded far apart; then in turn the members of every encoding by least squares,
       given the images, and the images given the members (on |e| less its mean, as if signs were those of the mean)
    3  the images: min_X ‖ |Λ X| − |e| ‖², pixel by pixel, by alternating between the signs of Λ X and least squares, from several starts; then the members
       again by the fit of |Λ X| itself, until they stay
    4  at each pixel all images have one sign in common that |Λ X| does not show: it is carried from neighbour to neighbour where their values agree most
       (a spanning tree in each channel), and the last one is that of the public mean image

Source:  Carlini et al. 2021, "Is Private Learning Possible with Instance Encoding?", IEEE S&P, arXiv:2011.05315, section 4; the absolute values and the four
         steps are theirs.
Deviates: weights are known, encoding by encoding, but not of which image, where the paper reads them off the mixed labels; the number of images is known;
         similarity is a fixed cosine, where theirs is a network trained on public images, so that images which look alike are told apart less well; members
         come from alternating least squares instead of cliques and a minimum-cost flow; step 4 is ours. Encodings are given as they are: in federated
         learning each has to be taken out of a gradient first (A3 gets them back at batch 1), which is not done here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Generator, Tensor

from gidef.errors import InputError
from gidef.rng import generator

MOST_CHOICES = 4096
"""n^k, memberships of an encoding that are tried one by one."""
ENOUGH = 1e-3
"""Of the fit: further restarts are left out."""
_STEPS = 60
"""Of alternating between signs and least squares; most pixels settle within thirty."""


@dataclass(frozen=True, slots=True)
class Undone:
    """images: float64 (n, C, H, W) in [0, 1], in no order.  members: int64 (m, k), which of them stand in each encoding, beside its weights.
    fit: ‖ |Λ X| − |e| ‖² / ‖e‖², by which the attacker knows whether it worked."""

    images: Tensor
    members: Tensor
    fit: float


def similarity(encodings: Tensor) -> Tensor:
    """Cosine (m, m), float64, of the encodings' absolute values less their mean over encodings: high where two share an image.

    Args: encodings: (m, C, H, W) on [0, 1], ½ standing for nought.
    """
    return _cosine(_centred(_absolute(encodings)))


def undo_instahide(
    encodings: Tensor, weights: Tensor, *, num_images: int, public: Tensor, seed: int = 0, restarts: int = 16, rounds: int = 8, starts: int = 6
) -> Undone:
    """The private images behind encodings of them.

    Args:    encodings: (m, C, H, W) on [0, 1], ½ standing for nought, with or without signs.  weights: (m, k), λ of each encoding, in any order of
             its images.  num_images: n.  public: (C, H, W), the mean of public images.  restarts: of step 2; with the best quarter of them, in turn, step
             3 is taken until one fits.  rounds: of images and members in turn, at most.  starts: of every pixel, four times as many in the end.
    Raises:  InputError for shapes that do not fit, fewer encodings than images, or n^k above MOST_CHOICES.
    """
    m, k = weights.shape
    if len(encodings) != m or public.shape != encodings.shape[1:]:
        raise InputError(f"encodings {tuple(encodings.shape)}, weights {tuple(weights.shape)}, public {tuple(public.shape)}: expected (m, C, H, W), (m, k), (C, H, W).")
    if m < num_images:
        raise InputError(f"{m} encodings of num_images={num_images}: fewer equations than unknowns at every pixel. Collect more encodings.")
    if num_images**k > MOST_CHOICES:
        raise InputError(f"num_images={num_images} in mixtures of {k}: {num_images**k} memberships are more than the {MOST_CHOICES} that are tried. Take fewer images.")
    seen, weights, draw = _absolute(encodings), weights.double().cpu(), generator(seed, "instahide")
    choices = torch.tensor(list(itertools.product(range(num_images), repeat=k)))
    centred = _centred(seen)
    alike = _cosine(centred)
    tried = sorted((_grouped(centred, alike, weights, choices, num_images, draw) for _ in range(restarts)), key=lambda one: one[0])
    scale, best = float(seen.square().sum()), None
    for _, members in tried[: -(-restarts // 4)]:
        for _ in range(rounds):
            values, _ = _retrieved(seen, _mixing(members, weights, num_images), starts, draw)
            fits = torch.stack([(torch.einsum("mk,kp->mp", weights, values[choice]).abs() - seen).square().sum(1) for choice in choices])
            fit, chosen = fits.min(0)
            if best is None or float(fit.sum()) < best[0]:
                best = float(fit.sum()), values, choices[chosen]
            if choices[chosen].equal(members):
                break
            members = choices[chosen]
        if best[0] < ENOUGH * scale:
            break
    _, values, members = best
    values, fit = _retrieved(seen, _mixing(members, weights, num_images), 4 * starts, draw)
    images = _signed(values.view(num_images, *encodings.shape[1:]), 2 * public.double().cpu() - 1)
    return Undone((images / 2 + 0.5).clamp(0, 1), members, fit / scale)


def _absolute(encodings: Tensor) -> Tensor:
    return (2 * encodings.double().cpu() - 1).abs().flatten(1)


def _centred(seen: Tensor) -> Tensor:
    return seen - seen.mean(0)


def _cosine(rows: Tensor) -> Tensor:
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows @ rows.T


def _mixing(members: Tensor, weights: Tensor, count: int) -> Tensor:
    """Λ (m, n); an image that stands twice in an encoding has both weights."""
    return weights.new_zeros(len(members), count).scatter_add_(1, members, weights)


def _grouped(centred: Tensor, alike: Tensor, weights: Tensor, choices: Tensor, count: int, draw: Generator) -> tuple[float, Tensor]:
    """(loss, members) of one start of step 2."""
    seeds = [int(torch.randint(len(alike), (1,), generator=draw))]
    while len(seeds) < count:
        far = (1 - alike[:, seeds].amax(1)).clamp_min(1e-9) ** 4
        seeds.append(int(torch.multinomial(far, 1, generator=draw)))
    near = max(2, len(alike) // (2 * count))
    values = torch.stack([centred[alike[seed].topk(near).indices].mean(0) for seed in seeds])
    members = None
    for _ in range(15):
        cross, gram = centred @ values.T, values @ values.T
        # ‖c − Σ_a λ_a z_a‖² of every choice, less ‖c‖²
        loss = -2 * torch.einsum("mk,mqk->mq", weights, cross[:, choices]) + torch.einsum("mk,ml,qkl->mq", weights, weights, gram[choices[:, :, None], choices[:, None]])
        least, chosen = loss.min(1)
        if members is not None and choices[chosen].equal(members):
            break
        members = choices[chosen]
        mixing = _mixing(members, weights, count)
        values = torch.linalg.solve(mixing.T @ mixing + 1e-3 * torch.eye(count, dtype=torch.float64), mixing.T @ centred)
    return float(least.sum()), members


def _retrieved(seen: Tensor, mixing: Tensor, starts: int, draw: Generator) -> tuple[Tensor, float]:
    """X (n, pixels) of the least ‖ |Λ X| − |e| ‖² at every pixel among the starts, and this over all pixels."""
    inverse, pixels = torch.linalg.pinv(mixing), seen.shape[1]
    many = seen.repeat(1, starts)
    values = torch.randn(mixing.shape[1], starts * pixels, generator=draw, dtype=torch.float64)
    for _ in range(_STEPS):
        values = inverse @ torch.where(mixing @ values < 0, -many, many)
    fits = ((mixing @ values).abs() - many).square().sum(0).view(starts, pixels)
    return values.view(-1, starts, pixels)[:, fits.argmin(0), torch.arange(pixels)], float(fits.amin(0).sum())


def _signed(values: Tensor, public: Tensor) -> Tensor:
    """(n, C, H, W) with a sign for each pixel, the same in all images."""
    (height, width), found = values.shape[2:], values.clone()
    place = torch.arange(height * width).view(height, width)
    left, right = (torch.cat(side) for side in zip((place[:-1].flatten(), place[1:].flatten()), (place[:, :-1].flatten(), place[:, 1:].flatten()), strict=True))
    for channel, mean in enumerate(public):
        flat = values[:, channel].flatten(1)
        unit = flat / flat.norm(dim=0).clamp_min(1e-12)
        agree = (unit[:, left] * unit[:, right]).sum(0)
        # the tree over the pairs of largest |cosine|; scipy takes a cost of nought for no edge
        tree = minimum_spanning_tree(coo_matrix(((1 + 1e-9 - agree.abs()).numpy(), (left.numpy(), right.numpy())), shape=(place.numel(), place.numel())))
        order, parents = breadth_first_order(tree, 0, directed=False)
        signs = torch.ones(place.numel(), dtype=values.dtype)
        for node in order[1:].tolist():
            parent = int(parents[node])
            signs[node] = signs[parent] * (1.0 if float(unit[:, node] @ unit[:, parent]) >= 0 else -1.0)
        one = (flat * signs).view(-1, height, width)
        found[:, channel] = one if float((one.mean(0) * mean).sum()) >= 0 else -one
    return found
