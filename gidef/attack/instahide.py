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
    5  the likeliest images: least squares takes no two pixels for neighbours, so few or inexact encodings leave it to chance. From the images of 4, and
       again from the public mean image, X descends on

           J(X) = N/2 · log(‖ |Λ X| − |e| ‖² / N + σ₀²) + Σ |differences of neighbours in X| / b,   N entries in all encodings

       (errors of encodings normal and of unknown size, differences of neighbours Laplace), by which starts and members are compared. Members are searched
       in the same way beside 3: in turn with a descent from the public mean image

Source:  Carlini et al. 2021, "Is Private Learning Possible with Instance Encoding?", IEEE S&P, arXiv:2011.05315, section 4; the absolute values and steps
         1 to 3 are theirs.
Deviates: weights are known, encoding by encoding, but not of which image, where the paper reads them off the mixed labels; the number of images is known;
         similarity is a fixed cosine, where theirs is a network trained on public images, so that images which look alike are told apart less well; members
         come from alternating least squares instead of cliques and a minimum-cost flow; steps 4 and 5 are ours. Encodings are given as they are: in federated
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
_LEAST, _SCALE, _RATE = 0.02, 0.1, 0.05
"""σ₀ and b of J on [−1, 1], and the rate of Adam on it."""
_ITERATIONS = 200
"""Of the descent in step 5."""


@dataclass(frozen=True, slots=True)
class Undone:
    """images: float64 (n, C, H, W) in [0, 1], in no order.  members: int64 (m, k), which of them stand in each encoding, beside its weights.
    fit: ‖ |Λ X| − |e| ‖² / ‖e‖²; few encodings are fitted by wrong images as well.  held: ‖ |Λ X| − |e| ‖² over a quarter of the encodings, by images
    that were searched without them, over what the mean of the other |e| leaves of it. By both the attacker knows whether it worked: near 1 of `held` the
    images foretell no encoding, and are worth no more than the public mean image; near 0 they do, but for signs, which leave no trace in either."""

    images: Tensor
    members: Tensor
    fit: float
    held: float


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
             its images.  num_images: n.  public: (C, H, W), the mean of public images.  restarts: of step 2; with the best quarter of them, in turn, steps
             3 to 5 are taken until one fits.  rounds: of images and members in turn, at most.  starts: of every pixel in step 3, four times as many before step 5.
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
    choices, blank = torch.tensor(list(itertools.product(range(num_images), repeat=k))), 2 * public.double().cpu() - 1
    centred = _centred(seen)
    alike = _cosine(centred)
    tried = sorted((_grouped(centred, alike, weights, choices, num_images, draw) for _ in range(restarts)), key=lambda one: one[0])
    scale, best, fits = float(seen.square().sum()), None, False
    for (_, grouped), settle in itertools.product(tried[: -(-restarts // 4)], (_by_squares, _by_descent)):
        members = settle(seen, weights, grouped, choices, blank, rounds, starts, draw)
        mixing = _mixing(members, weights, num_images)
        loss, values = _likeliest(seen, mixing, blank, 4 * starts, draw)
        if best is None or loss < best[0]:
            best, fits = (loss, values, members), float(_residual(seen, mixing, values)) < ENOUGH * scale
        if fits:
            break
    for _ in range(rounds):
        _, members = _chosen(seen, weights, best[1], choices)
        again = *_likeliest(seen, _mixing(members, weights, num_images), blank, 4 * starts, draw), members
        if members.equal(best[2]) or again[0] >= best[0]:
            break
        best = again
    _, values, members = best
    mixing = _mixing(members, weights, num_images)
    images = (values.view(num_images, *public.shape) / 2 + 0.5).clamp(0, 1)
    return Undone(images, members, float(_residual(seen, mixing, values)) / scale, _held(seen, weights, mixing, choices, blank, starts, draw))


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


def _residual(seen: Tensor, mixing: Tensor, values: Tensor) -> Tensor:
    """‖ |Λ X| − |e| ‖²."""
    return ((mixing @ values).abs() - seen).square().sum()


def _chosen(seen: Tensor, weights: Tensor, values: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) least squares left of each encoding, and the members (m, k) that leave them, of given images."""
    fits = torch.stack([(torch.einsum("mk,kp->mp", weights, values[choice]).abs() - seen).square().sum(1) for choice in choices])
    fit, chosen = fits.min(0)
    return fit, choices[chosen]


def _by_squares(seen: Tensor, weights: Tensor, members: Tensor, choices: Tensor, blank: Tensor, rounds: int, starts: int, draw: Generator) -> Tensor:
    """Members that fit best among those met by least squares (step 3) and members in turn."""
    best, count = None, int(choices.max()) + 1
    for _ in range(rounds):
        values, _ = _retrieved(seen, _mixing(members, weights, count), starts, draw)
        fit, found = _chosen(seen, weights, values, choices)
        if best is None or float(fit.sum()) < best[0]:
            best = float(fit.sum()), found
        if found.equal(members):
            break
        members = found
    return best[1]


def _by_descent(seen: Tensor, weights: Tensor, members: Tensor, choices: Tensor, blank: Tensor, rounds: int, starts: int, draw: Generator) -> Tensor:
    """Members after descents on J from the public mean image (step 5) and members in turn."""
    count = int(choices.max()) + 1
    values = _near(blank, count, draw)
    for _ in range(rounds):
        values = _descended(seen, _mixing(members, weights, count), values, blank.shape, _ITERATIONS // 2)
        _, found = _chosen(seen, weights, values, choices)
        if found.equal(members):
            break
        members = found
    return members


def _near(blank: Tensor, count: int, draw: Generator) -> Tensor:
    """(count, pixels): the public mean image, and noise by which images part."""
    return blank.flatten() + 0.1 * torch.randn(count, blank.numel(), generator=draw, dtype=torch.float64)


def _likeliest(seen: Tensor, mixing: Tensor, blank: Tensor, starts: int, draw: Generator) -> tuple[float, Tensor]:
    """(J, X) of the lower J: descended from signed least squares, or from the public mean image."""
    squares = _signed(_retrieved(seen, mixing, starts, draw)[0].view(-1, *blank.shape), blank).flatten(1)
    tried = [_descended(seen, mixing, start, blank.shape, _ITERATIONS) for start in (squares, _near(blank, mixing.shape[1], draw))]
    return min(((float(_loss(seen, mixing, values, blank.shape)), values) for values in tried), key=lambda one: one[0])


def _loss(seen: Tensor, mixing: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """J of step 5."""
    images = values.view(-1, *shape)
    rough = images.diff(dim=-1).abs().sum() + images.diff(dim=-2).abs().sum()
    return seen.numel() / 2 * torch.log(_residual(seen, mixing, values) / seen.numel() + _LEAST**2) + rough / _SCALE


def _descended(seen: Tensor, mixing: Tensor, values: Tensor, shape: torch.Size, iterations: int) -> Tensor:
    """X by Adam on J, its rate falling to nought."""
    values = values.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([values], _RATE)
    for iteration in range(iterations):
        optimiser.param_groups[0]["lr"] = _RATE * (1 - iteration / iterations)
        (values.grad,) = torch.autograd.grad(_loss(seen, mixing, values, shape), values)
        optimiser.step()
    return values.detach()


def _held(seen: Tensor, weights: Tensor, mixing: Tensor, choices: Tensor, blank: Tensor, starts: int, draw: Generator) -> float:
    """`Undone.held`; encodings left out take the members that fit best."""
    order = torch.randperm(len(seen), generator=draw)
    left, rest = order[: -(-len(seen) // 4)], order[-(-len(seen) // 4) :]
    _, values = _likeliest(seen[rest], mixing[rest], blank, starts, draw)
    fit, _ = _chosen(seen[left], weights[left], values, choices)
    return float(fit.sum() / (seen[rest].mean(0) - seen[left]).square().sum())


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
