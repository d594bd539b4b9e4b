"""The evaluator's strengths: a trained defence whose noise on the latent is weaker or stronger than it was in training.

    z̃ = m + s · max(κ σ, σ_min) ⊙ ε        s: one of evaluation.strengths; in training s = 1

The weights are those of the one training; s decides what noise the victims release with and what noise the test images are predicted with. The
floor falls with s, as only the evaluator may let it: s = 0 is the net with the latent norm, and a learned shift where there is one, without noise.
Attackers are told s as they are told the noise's law: whatever simulates or draws the client's noise does so at this strength.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from gidef.defence import Defence
from gidef.errors import InputError
from gidef.evaluation import scores_on_test
from gidef.models.perturbation import Perturbation
from gidef.runs import Run, Trained


def levelled(defence: Defence) -> bool:
    """Whether a defence has noise whose level a strength can multiply."""
    return isinstance(defence.model.perturbation, Perturbation)


def check(defence: Defence, strengths: Iterable[float], name: str) -> None:
    """Raises InputError for strengths other than 1 of noise without a level of its own."""
    if tuple(strengths) != (1.0,) and defence.noise_shape is not None and not levelled(defence):
        kind = type(defence.model.perturbation).__name__
        raise InputError(f"{name}: evaluation.strengths={tuple(strengths)} multiply the level of a models.Perturbation, and {kind} is none: leave them at 1.")


def evaluated(run: Run, trained: dict[tuple[str, int], Trained]) -> dict[tuple[str, int], Trained]:
    """What is attacked: each training at every strength, under the name `Evaluation.named` but at 1; once, as it is, where there is no noise on the latent.

    Every rank calls this together: test results at the strengths are computed here.
    """
    evaluation, found = run.recipe.evaluation, {}
    for (name, seed), one in trained.items():
        check(one.training.defence, evaluation.strengths, name)
        for strength in evaluation.strengths if run.recipe.attacks and levelled(one.training.defence) else (1.0,):
            found[evaluation.named(name, strength), seed] = one if strength == 1 else _at(run, one, strength, name=name, seed=seed)
    return found


def scaled(defence: Defence, strength: float) -> Defence:
    """The same defence, on the same weights, with its noise `strength` times as strong."""
    modules = [module for module in (defence.model, defence.decoder) if module is not None]
    found = copy.deepcopy(defence, {id(p): p for module in modules for p in module.parameters()})
    _scale(found.model, strength)
    return found


def _at(run: Run, one: Trained, strength: float, *, name: str, seed: int) -> Trained:
    training, final = one.training, one.snapshots["final"]
    training.participation.versions = dict(final.versions)
    with _for_a_while([player.model for player in training.participation.players], strength):
        scores = scores_on_test(run, training, {**final.params, **final.statistics}, seed=seed)
    named: dict[str, Any] = {"defence": run.recipe.evaluation.named(name, strength), "trained_as": name, "strength": strength}
    kept = {key: one.summary[key] for key in ("seed", "epsilon", "delta")}
    training = dataclasses.replace(training, defence=scaled(training.defence, strength))
    return dataclasses.replace(one, training=training, summary={**named, **kept, **scores}, strength=strength)


def _scale(model: nn.Module, strength: float) -> None:
    layer = model.perturbation
    layer.strength, layer.std_floor = strength * layer.strength, strength * layer.std_floor


@contextlib.contextmanager
def _for_a_while(models: list[nn.Module], strength: float) -> Iterator[None]:
    before = [(model.perturbation.strength, model.perturbation.std_floor) for model in models]
    try:
        for model in models:
            _scale(model, strength)
        yield
    finally:
        for model, (own, floor) in zip(models, before, strict=True):
            model.perturbation.strength, model.perturbation.std_floor = own, floor
