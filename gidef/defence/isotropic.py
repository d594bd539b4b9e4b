"""The control of every learned perturbation: noise of one stated level on the normed latent, no decoder, nothing learned of it.

    m = LN(E(x)),  z̃ = m + σ ε,  logits = C(z̃);   min_θφ CE(C(z̃), y),   σ a number

A defence that learns its level and does not beat this one at equal accuracy is feature noise, and no more.

Source: noise on features, e.g. Titcombe et al. 2021, arXiv:2104.05743 (Laplace noise on the intermediate data of split learning).
Deviates: the latent norm, which gives σ its meaning; Gaussian noise by default.
"""

from __future__ import annotations

from gidef.defence.perturbation import LearnedDefence, MinimaxSettings
from gidef.models import SplitModel


def isotropic_noise(model: SplitModel, *, frozen: bool = False) -> LearnedDefence:
    """The client of a model whose perturbation has mode "fixed"; what an attacker simulates and draws is what he does of a learned one.

    frozen: one draw per image for ever.
    Raises: ValueError if the level is learned, or there is none.
    """
    if getattr(model.perturbation, "mode", None) != "fixed":
        raise ValueError('isotropic noise needs a perturbation of mode "fixed"')
    return LearnedDefence(model, None, MinimaxSettings(dependence_weight=0.0, frozen=frozen))
