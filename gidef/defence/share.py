"""What a client does to its update before it leaves, whatever it trained; and what an attacker may know of that.

A transform of your own is a dataclass with `changes_update = True` and the members of `Transform`, used alone or behind a training-time
defence, in the order of the tuple: `{"learned + pruning": (LearnedPerturbation(), Pruning(share=0.9))}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Generator

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
    `linear` says whether imitate is linear, the same map for all clients, so that to an attack on a sum of clients it does not matter which images are of
    one client. Without the attribute it counts as False: the attack then guesses that where it is not told.
    """

    def apply(self, update: Tensors, *, generator: Generator) -> Tensors: ...
    def reveals(self, update: Tensors) -> Tensors: ...
    def imitate(self, update: Tensors, seen: Tensors) -> Tensors: ...


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


def revealed(transforms: Sequence[Transform], update: Tensors) -> Tensors:
    """All that a released update reveals, under the names that `imitated` looks for in `known`."""
    return {f"{SEEN}{place}/{name}": tensor for place, one in enumerate(transforms) for name, tensor in one.reveals(update).items()}


def imitated(simulate: Simulate, transforms: Sequence[Transform]) -> Simulate:
    """The simulator of an attacker who knows the transforms; the simulator itself where there are none."""
    if not transforms:
        return simulate

    def simulated(params: Tensors, known: Tensors, *rest: object) -> Tensors:
        seen = {name.removeprefix(SEEN): tensor for name, tensor in known.items() if name.startswith(SEEN)}
        update = simulate(params, {name: tensor for name, tensor in known.items() if not name.startswith(SEEN)}, *rest)
        for place, transform in enumerate(transforms):
            prefix = f"{place}/"
            own = {name.removeprefix(prefix): tensor for name, tensor in seen.items() if name.startswith(prefix)}
            update = transform.imitate(update, own)
        return update

    return simulated
