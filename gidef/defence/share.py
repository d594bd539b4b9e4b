"""What a client does to its update before it leaves, whatever it trained; and what an attacker may know of that.

A transform of your own is a dataclass with `changes_update = True` and the members of `Transform`, used alone or behind a training-time
defence, in the order of the tuple: `{"learned + pruning": (LearnedPerturbation(), Pruning(share=0.9))}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, nn

from gidef.types import Own, Tensors

Simulate = Callable[..., Tensors]

SEEN = "share/"
"""Prefix in an observation's `known` of what a released update reveals about its transforms."""


class Transform(Protocol):
    """One change of an update, a gradient or w_client − w_server: maps tensors to tensors of the same names and shapes.

    apply:    what leaves. Randomness comes from the generator alone, on the CPU. Equal in sign and scale: apply(−u) = −apply(u) in law,
              so that a gradient and the step against it are treated alike.
    reveals:  what anybody can read off a released update about the change, e.g. which entries were pruned.
    imitate:  the change as an adaptive attacker simulates it, differentiable: of a candidate's update, given what was revealed. A matching
              attack may leave tensors out: of those, nothing is revealed and nothing is in the update.

    With an attribute `needs_own = True`, apply takes one more keyword, own: Own, what the client alone has: images, labels, weights.
    packed(before: Packed) → Packed says in how many bits a tensor leaves (see defence.upload). Without it all entries count as float32.
    `random` says whether apply draws anything, so that another release of the same update differs, which is what attacks over several releases (A9)
    live on. Without the attribute it counts as True: A9 then runs, if on releases that are all the same.
    `zeros` says what apply makes of entries that are 0 and of the others, which is what is left to read off a release of an earlier transform's zeros:
    "kept" (each stays what it is), "pruned" (others become 0, and imitate makes the same ones 0), "rounded" (others may become 0), "noisy" (any may become
    something else, near what it was), "redrawn" (nothing of their sizes is left). Without the attribute it may be any of these: the zeros of a tensor then
    count as kept if they are not fewer than before, else as redrawn.
    Whose `reveals` reads zeros has reveals_blurred(update, blur: Blur) → Tensors and imitate_blurred(update, seen) → Tensors for releases that do not show
    them as they were; or left_out(model) → names of tensors that attacks which adapt then do not match.
    `keeps_scale` says whether what leaves has the scale of what was given, up to noise and to what is missing: True, False, or a function of the released
    tensors that reads it off them. Label recovery believes the scale then, and searches it otherwise, as it does without the attribute.
    variances(update) → Tensors says how much noise apply adds to each tensor: the mean square of an entry's, 0-d, of what was released or a mean of such over
    clients, read off it by the law, up to a factor that all of them have. Attacks that adapt compare tensors by it (`trusted`); without it, the noise counts as none.
    `spares` says whether apply leaves entries, others in every release, exactly as they are, and gives all the rest noise of a continuous law: where two
    releases of one update agree bit for bit, they then show what was given, which attacks over several releases (A9) use (`settled`). Without the attribute it
    counts as False: zeros of a pruned update agree as well, and levels of a rounded one, and are not what was given.
    `linear` says whether imitate is linear, the same map for all clients, so that to an attack on a sum of clients it does not matter which images are of
    one client. Without the attribute it counts as False: the attack then guesses that where it is not told.
    """

    def apply(self, update: Tensors, *, generator: Generator) -> Tensors: ...
    def reveals(self, update: Tensors) -> Tensors: ...
    def imitate(self, update: Tensors, seen: Tensors) -> Tensors: ...


MISFIT = 0.05
"""What an attack leaves of an entry where there is no noise, squared, of a release's mean square: alike on all tensors, as plain distances have it.
In the setting of `AddNoise`'s figures for trust, at 0.001, 0.01 and 0.05, and all alike: std 0.01 32.2 dB, 33.1, –, 33.1; 0.1 –, 30.6, 31.1, 31.2; 1 20.4, 20.3, 20.4, 18.7."""


@dataclass(frozen=True, slots=True)
class Blur:
    """Why a transform's zeros are not those of the release.

    summed:  it is a mean over clients, each of which has zeros of its own.
    noisy:   zeros may have become others, mostly small ones.  redrawn: as any others.  unsaid: something did that does not say what it does to zeros.
    lost:    others may have become 0.
    """

    summed: bool
    noisy: bool
    redrawn: bool
    unsaid: bool
    lost: bool

    @property
    def covers(self) -> bool:
        """Whether zeros may have become others."""
        return self.summed or self.noisy or self.redrawn or self.unsaid


def blur_of(transforms: Sequence[Transform], place: int, *, summed: bool) -> Blur | None:
    """What lies between a transform and the release; None where its zeros are read off as they are. summed: the release is a mean over clients."""
    later = {getattr(one, "zeros", "unsaid") for one in transforms[place + 1 :]}
    noisy, redrawn, unsaid = (what in later for what in ("noisy", "redrawn", "unsaid"))
    lost = redrawn or unsaid or "rounded" in later or ("pruned" in later and (summed or noisy))
    blur = Blur(summed=summed, noisy=noisy, redrawn=redrawn, unsaid=unsaid, lost=lost)
    return blur if blur.covers or blur.lost else None


def apply_all(transforms: Sequence[Transform], update: Tensors, *, generator: Generator, own: Own | None = None) -> Tensors:
    """What leaves the client. own: for the transforms that need it.  Raises: ValueError if one does and there is none."""
    for transform in transforms:
        if not getattr(transform, "needs_own", False):
            update = transform.apply(update, generator=generator)
            continue
        if own is None:
            raise ValueError(f"{type(transform).__name__} looks at the client's own images, and was given none.")
        update = transform.apply(update, generator=generator, own=own)
    return update


def revealed(transforms: Sequence[Transform], update: Tensors, *, summed: bool = False) -> Tensors:
    """All that a released update, or a mean over clients (`summed`), reveals, under the names that `imitated` looks for in `known`."""
    found = {}
    for place, one in enumerate(transforms):
        blur = blur_of(transforms, place, summed=summed)
        seen = one.reveals_blurred(update, blur) if blur is not None and hasattr(one, "reveals_blurred") else one.reveals(update)
        found |= {f"{SEEN}{place}/{name}": tensor for name, tensor in seen.items()}
    return found


def trusted(transforms: Sequence[Transform], update: Tensors) -> Tensors:
    """By what attacks that adapt multiply each tensor of a release, and of its simulation, before they compare them: one over the deviation of what remains
    of an entry, its noise and the attack's own MISFIT. The largest is 1; {} where there is no noise, or as much on all tensors.

    Variances of several transforms add up. Each is read off the release, so that what stands between it and a transform, such as a clip of each tensor,
    is left out of account for noise of a fixed level. A tensor without noise, as one of zeros alone under relative noise, is left the misfit, which keeps
    its trust finite; where noise is small beside it, all are trusted nearly alike, as without noise.
    """
    noises = [one.variances(update) for one in transforms if hasattr(one, "variances")]
    return trust_of({name: sum(noise[name].double() for noise in noises if name in noise) for name in update} if any(noises) else {}, update)


def trust_of(variances: Tensors, update: Tensors) -> Tensors:
    """`trusted`, of the noise's variances themselves: by name, 0-d or of every entry, in which case the factors are as well."""
    power = sum(tensor.double().square().sum() for tensor in update.values()) / max(1, sum(tensor.numel() for tensor in update.values()))
    left = {name: variance + MISFIT * power for name, variance in variances.items()}
    if not left or not all(((variance > 0) & (variance < math.inf)).all() for variance in left.values()):  # nothing to compare, which the attack says
        return {}
    least = torch.stack([variance.min() for variance in left.values()]).min()
    # bfloat16's values, so that the release and its simulation are multiplied by the same in every precision
    found = {name: (least / variance).sqrt().bfloat16().to(update[name].dtype) for name, variance in left.items()}
    return {} if all((factor == 1).all() for factor in found.values()) else found


def settled(updates: Sequence[Tensors]) -> tuple[Tensors, Tensors]:
    """What several releases of one update tell of it, where its last change `spares` entries: (the update, the variance of the noise left in each entry).

    Entries on which at least two releases agree bit for bit are what was given, and without noise; of several such values, the one that most have. The others
    are the mean of the T releases. Their variance is the releases' own around it over T, in the mean over the tensor's others, as an entry has but T of them.
    """
    found, variances = {}, {}
    for name in updates[0]:
        each = torch.stack([update[name] for update in updates])
        alike = torch.stack([(each == one).sum(0, dtype=torch.int16) for one in each])
        most = alike.max(0)
        exact = most.values > 1
        spread = each.double().var(0)
        found[name] = torch.where(exact, each.gather(0, most.indices[None])[0], each.double().mean(0).to(each.dtype))
        variances[name] = torch.where(exact, 0.0, spread[~exact].mean() / len(updates))
    return found, variances


def noise_share(
    transforms: Sequence[Transform], update: Tensors, trust: Tensors, *, released: Tensors | None, stepped: float = 0.0, clients: int = 1
) -> float:  # fmt: skip
    """Share of a release's squared norm that is noise on average, in [0, 1): what attackers read off it by the law.

        ρ = Σ_t f_t² n_t v_t / Σ_t f_t² ‖u_t‖²,   with f_t the trust in a tensor, n_t its entries and v_t the variance of their noise

    At most 1 − √(2 / Σ n_t), as two deviations of the noise's own power may hide no more. Noise before a change of scale is left out, as nobody knows how
    much is left of it.

    Args:    update: what is matched.  trust: as of `trusted`.  released: all that left; None where only a mean over clients is seen.  stepped: variance of
             the noise that the client's steps left on an entry before the transforms; entries of 0 have none.  clients: in the mean.
    """
    power = {name: tensor.double().square().sum() * trust.get(name, tensor.new_ones(())).double() ** 2 for name, tensor in update.items()}
    entries, whole, total = sum(tensor.numel() for tensor in update.values()), float(sum(power.values())), 0.0
    noises = [(place, one.variances(update)) for place, one in enumerate(transforms) if hasattr(one, "variances")]
    if stepped:
        noises.append((-1, {name: stepped * tensor.count_nonzero() / tensor.numel() for name, tensor in update.items()}))
    for place, variances in noises:
        if scale_kept(transforms[place + 1 :], released):
            total += sum(float(v) * update[name].numel() * float(trust.get(name, 1.0)) ** 2 for name, v in variances.items()) / clients
    if not (0 < total < math.inf and 0 < whole < math.inf):
        return 0.0
    return max(0.0, min(total / whole, 1 - math.sqrt(2 / entries)))


def scale_kept(transforms: Sequence[Transform], released: Tensors | None) -> bool:
    """Whether a released update has the scale of the one that the client computed.

    released: all that left; None where only a mean over several clients is seen. A transform is asked about it if it is the last.
    """
    for place, transform in enumerate(transforms, start=1):
        kept = getattr(transform, "keeps_scale", False)
        if callable(kept):
            kept = released is not None and place == len(transforms) and kept(released)
        if not kept:
            return False
    return True


def imitated(simulate: Simulate, transforms: Sequence[Transform], *, summed: bool = False) -> Simulate:
    """The simulator of an attacker who knows the transforms; the simulator itself where there are none. summed: it is of one of the clients in a mean."""
    if not transforms:
        return simulate
    blurred = [blur_of(transforms, place, summed=summed) is not None and hasattr(one, "imitate_blurred") for place, one in enumerate(transforms)]

    def simulated(params: Tensors, known: Tensors, *rest: object) -> Tensors:
        seen = {name.removeprefix(SEEN): tensor for name, tensor in known.items() if name.startswith(SEEN)}
        update = simulate(params, {name: tensor for name, tensor in known.items() if not name.startswith(SEEN)}, *rest)
        for place, transform in enumerate(transforms):
            prefix = f"{place}/"
            own = {name.removeprefix(prefix): tensor for name, tensor in seen.items() if name.startswith(prefix)}
            update = transform.imitate_blurred(update, own) if blurred[place] else transform.imitate(update, own)
        return update

    return simulated


def left_out(transforms: Sequence[Transform], model: nn.Module, *, summed: bool = False) -> set[str]:
    """Names of the model's tensors that attacks which adapt do not match, as what happened to them can be neither read off a release nor simulated."""
    found = set()
    for place, one in enumerate(transforms):
        blur = blur_of(transforms, place, summed=summed)
        if blur is not None and blur.covers and hasattr(one, "left_out"):
            found |= one.left_out(model)
    return found
