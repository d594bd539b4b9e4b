"""Changes of an update before it leaves, against plain NumPy, and how a user's own one is taken in."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from gidef import build
from gidef.config import Data, LearnedPerturbation, Model, Pruning, Recipe, Undefended, problems
from gidef.defence.censor import Orthogonal
from gidef.defence.clipping import Clip
from gidef.defence.noise import AddNoise
from gidef.defence.private import ClipAndNoise
from gidef.defence.pruning import Prune
from gidef.defence.quantisation import Quantise
from gidef.defence.share import apply_all, imitated, revealed, scale_kept
from gidef.defence.sign import SignOnly
from gidef.defence.slices import NoisySlices
from gidef.defence.soteria import PruneFeatures
from gidef.errors import InputError
from gidef.rng import generator


def an_update():
    g = generator(0, "share")
    return {"weight": torch.randn(4, 3, 2, generator=g), "bias": torch.randn(5, generator=g), "level": torch.randn(1, generator=g)}


class Halved:
    """A transform of one's own that says nothing of its scale."""

    def apply(self, update, *, generator):
        return {name: tensor / 2 for name, tensor in update.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_pruning_keeps_the_largest(share):
    update = an_update()
    pruned = Prune(share=share).apply(update, generator=generator(0))
    for name, tensor in update.items():
        values = tensor.numpy().flatten()
        kept = len(values) - int(share * len(values))
        smallest = np.argsort(np.abs(values))[: len(values) - kept]
        values = values.copy()
        values[smallest] = 0
        np.testing.assert_array_equal(pruned[name].numpy().flatten(), values)


def test_pruning_nothing_changes_no_bit_and_a_sign_passes_through():
    update = an_update()
    assert all(torch.equal(tensor, update[name]) for name, tensor in Prune(share=0.0).apply(update, generator=generator(0)).items())
    negated = Prune(share=0.5).apply({name: -tensor for name, tensor in update.items()}, generator=generator(0))
    pruned = Prune(share=0.5).apply(update, generator=generator(0))
    assert all(torch.equal(-tensor, negated[name]) for name, tensor in pruned.items())


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"share=1\.2"):
        Prune(share=1.2)


def long(update, length):
    whole = torch.cat([tensor.flatten() for tensor in update.values()]).norm()
    return {name: tensor * length / whole for name, tensor in update.items()}


@pytest.mark.parametrize(("transforms", "length", "kept"), [
    ((), 5.0, True),
    ((Prune(share=0.9), AddNoise(std=1.0), Quantise(bits=3), PruneFeatures(), NoisySlices(), Orthogonal()), 5.0, True),
    ((Clip(bound=1.0),), 0.9, True), ((Clip(bound=1.0),), 5.0, False),
    ((Clip(bound=1.0, per_tensor=True),), 0.9, True), ((Clip(bound=1.0, per_tensor=True),), 5.0, False),
    ((Prune(share=0.5), Clip(bound=1.0)), 0.9, True), ((Clip(bound=1.0), Prune(share=0.5)), 0.9, False),
    ((SignOnly(),), 0.9, False), ((AddNoise(std=1.0), SignOnly()), 0.9, False),
    ((ClipAndNoise(1.0, 0.0, 4),), 0.9, True), ((ClipAndNoise(1.0, 0.0, 4),), 5.0, False),
    ((ClipAndNoise(1.0, 0.05, 4),), 0.5, True), ((ClipAndNoise(1.0, 0.05, 4),), 5.0, False), ((ClipAndNoise(1.0, 1.0, 4),), 0.5, False),
    ((Halved(),), 0.9, False),
])  # fmt: skip
def test_a_released_update_says_whether_its_scale_is_the_gradient_s(transforms, length, kept):
    """A clip tells by the norm of what left, if it is the last, and never in a mean over clients."""
    released = long(an_update(), length)
    for one in transforms:
        if not getattr(one, "needs_own", False):
            released = one.apply(released, generator=generator(0))
    assert scale_kept(transforms, released) is kept
    clips = any(isinstance(one, (Clip, ClipAndNoise)) for one in transforms)
    assert scale_kept(transforms, None) is (kept and not clips)


def test_an_imitation_at_the_truth_is_the_released_update():
    transforms = (Prune(share=0.5), Prune(share=0.2))
    update = an_update()
    released = apply_all(transforms, update, generator=generator(0))

    def simulate(params, known, *rest):
        assert set(known) == {"front"}
        return update

    found = imitated(simulate, transforms)({}, {"front": torch.ones(1), **revealed(transforms, released)}, None, None, None)
    assert all(torch.equal(tensor, released[name]) for name, tensor in found.items())
    assert imitated(simulate, ()) is simulate


@dataclass(frozen=True, kw_only=True)
class Halved:
    """A user's own."""

    changes_update: ClassVar[bool] = True
    factor: float = 0.5

    def apply(self, update, *, generator):
        return {name: self.factor * tensor for name, tensor in update.items()}

    def reveals(self, update):
        return {}

    def imitate(self, update, seen):
        return {name: self.factor * tensor for name, tensor in update.items()}


class Shapes:
    num_classes, image_shape = 8, (3, 28, 28)


def test_combinations_are_built_in_their_order():
    recipe = Recipe(data=Data(name="synthetic"), model=Model(cut="blocks.1"))
    defence = build.make_defence((LearnedPerturbation(), Halved(), Pruning(share=0.5)), recipe, Shapes, seed=0)
    assert defence.noise_shape is not None and [type(one) for one in defence.transforms] == [Halved, Prune]
    alone = build.make_defence(Pruning(), recipe, Shapes, seed=0)
    assert alone.noise_shape is None and len(alone.transforms) == 1
    shared = defence.share(an_update(), generator=generator(0))
    assert int((shared["weight"] != 0).sum()) == 12


def test_what_cannot_be_combined_is_said():
    recipe = Recipe(defences={"x": (LearnedPerturbation(), Undefended())})
    assert any("at most one may change the training" in text for text in problems(recipe))
    assert any("empty tuple" in text for text in problems(Recipe(defences={"x": ()})))
