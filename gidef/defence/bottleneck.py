"""PRECODE and CVB: a variational bottleneck in the net, whose noise the gradients depend on.

    μ, s = bottleneck(E(x)),  σ = softplus(s),  z̃ = back(μ + σ ε),  logits = C(z̃);   min CE(C(z̃), y) + β KL(N(μ, σ²) ‖ N(0, 1))

Source: Scheliga, Mäder, Seeland, WACV 2022, arXiv:2108.04725 (PRECODE: linear, before the last layer, β = 1e-3, K = 256); the same, 2023,
arXiv:2309.04515 (CVB: convolutional, after the first block). Layers, reductions and deviations: models.bottleneck.
Broken by: Balunović et al. 2022, arXiv:2111.04706, who go around the bottleneck (A2), and the search for its noise with the image (A3);
nothing keeps a malicious server from sending a level of nought (A11).
"""

from __future__ import annotations

from gidef.defence.perturbation import LearnedDefence, MinimaxSettings
from gidef.models import SplitModel


def variational_bottleneck(model: SplitModel, *, kl_weight: float) -> LearnedDefence:
    """The client of a model with a bottleneck in the place of a perturbation. kl_weight: β ≥ 0."""
    return LearnedDefence(model, None, MinimaxSettings(dependence_weight=0.0, kl_weight=kl_weight))
