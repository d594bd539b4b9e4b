"""BiDO: hidden features that depend little on the images and much on the labels.

    L = CE + Σ_j [λ_x d(X, Z_j) − λ_y d(Z_j, Y)],   Z_j the output of the j-th stage of the backbone

    kernels:  k(a, b) = exp(−‖a − b‖² / (2 s² dim)), s = 5, of X and Z;   k(a, b) = a · b of Y, class probabilities
    hsic:     d = trace(R_x R_y),   R = K̃ (K̃ + m · 1e-5 · I)⁻¹,   K̃ = K H,   H = I − 11ᵀ / m
    coco:     d = (1/m) √‖K_c L_c‖,   K_c = H K H;   the spectral norm, or Frobenius'

Source: Peng et al., KDD 2022, arXiv:2206.05483; the kernel's normalisation, 1e-5 and Frobenius' norm for COCO from the authors' code, where the
paper's COCO has the spectral norm. Published (λ_x, λ_y): hsic (0.05, 0.5) and (0.1, 2), coco (1, 50).
Deviates: X are the images in [0, 1], before any normalisation of the net's. It was made against model inversion, not against gradients.
Trap: in a batch of one image all is centred away, and the loss is cross-entropy, exactly: such a release is undefended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gidef.defence.base import Defence, Simulate
from gidef.errors import InputError
from gidef.models import SplitModel, stages
from gidef.types import Client, Tensors

BANDWIDTH = 5.0
RIDGE = 1e-5


@dataclass(frozen=True, slots=True)
class BiDOSettings:
    """See `config.BiDO` for meanings and ranges."""

    measure: Literal["hsic", "coco"] = "hsic"
    x_weight: float = 0.05
    y_weight: float = 0.5
    norm: Literal["spectral", "frobenius"] = "spectral"

    @property
    def idle(self) -> bool:
        return self.x_weight == 0 and self.y_weight == 0


def gaussian_kernel(samples: Tensor) -> Tensor:
    """exp(−‖a − b‖² / (2 s² dim)) − 1 of all pairs, float64 (m, m), of samples (m, ...).

    Less 1, which both centrings take off anyway: the kernel is close to 1, and its differences would drown in rounding.
    """
    flat = _precise(samples)
    flat = flat - flat.mean(0)
    squares = flat.square().sum(1)
    apart = squares[:, None] + squares - 2 * _products(flat)
    return torch.expm1(-apart / (2 * BANDWIDTH**2 * flat.shape[1]))


def linear_kernel(samples: Tensor) -> Tensor:
    """Inner products of all pairs, float64 (m, m), with the mean sample taken off."""
    flat = _precise(samples)
    return _products(flat - flat.mean(0))


def prepared(kernel: Tensor, measure: Literal["hsic", "coco"]) -> Tensor:
    """What of a kernel (m, m) is compared: R for hsic, K_c for coco."""
    centred = kernel - kernel.mean(1, keepdim=True)
    if measure == "coco":
        return centred - centred.mean(0)
    ridge = len(kernel) * RIDGE * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return torch.linalg.solve(centred + ridge, centred)  # a matrix commutes with the inverse of itself plus a ridge


def compared(left: Tensor, right: Tensor, measure: Literal["hsic", "coco"], norm: Literal["spectral", "frobenius"] = "spectral") -> Tensor:
    """d of two prepared kernels (m, m); scalar ≥ 0, in hsic up to m. coco is 0 with zero gradient where one side is constant."""
    if measure == "hsic":
        return (left * right.T).sum()
    product = torch.einsum("ij,jk->ik", left, right)
    squared = product.square().sum() if norm == "frobenius" else _largest_eigenvalue(torch.einsum("ij,kj->ik", product, product))
    some = squared > 1e-24  # else √‖·‖ has no finite slope
    return torch.where(some, torch.where(some, squared, 1.0) ** 0.25, 0.0) / len(left)


def _largest_eigenvalue(matrix: Tensor) -> Tensor:
    """λ₁ of a symmetric matrix, with its first and second derivatives also where other eigenvalues coincide, where those of eigh are NaN.

    The Rayleigh quotient of v = v₁ + (λ₁ I − M₀)⁺ M v₁, with v₁, λ₁ and M₀ = M held constant: v is the eigenvector to first order in
    M − M₀, so its quotient is the eigenvalue to third. Where λ₁ itself is multiple, the second derivative leaves its partners out.
    """
    values, vectors = torch.linalg.eigh(matrix.detach())
    first, gaps = vectors[:, -1], values[-1] - values
    apart = gaps > 1e-9 * values[-1].abs()
    inverse = torch.where(apart, 1 / torch.where(apart, gaps, 1.0), 0.0)
    moved = torch.einsum("ij,j->i", matrix, first)
    vector = first + torch.einsum("ij,j->i", vectors * inverse, torch.einsum("ji,j->i", vectors, moved))
    return torch.einsum("i,ij,j->", vector, matrix, vector) / vector.square().sum()


def _precise(samples: Tensor) -> Tensor:
    """(m, D) in float64: the matrices' condition numbers reach 1e5."""
    return samples.flatten(1).double()


def _products(flat: Tensor) -> Tensor:
    """Gram matrix; by einsum, which an attack in bfloat16 leaves alone."""
    return torch.einsum("id,jd->ij", flat, flat)


def dependence_terms(images: Tensor, hidden: Sequence[Tensor], labels: Tensor, settings: BiDOSettings) -> Tensor:
    """Σ_j [λ_x d(X, Z_j) − λ_y d(Z_j, Y)], scalar, float64.  hidden: (m, ...) each.  labels: class probabilities (m, K)."""
    with torch.autocast(images.device.type, enabled=False):
        x, y = (prepared(kernel, settings.measure) for kernel in (gaussian_kernel(images), linear_kernel(labels)))
        total = x.new_zeros(())
        for features in hidden:
            z = prepared(gaussian_kernel(features), settings.measure)
            total = total + settings.x_weight * compared(x, z, settings.measure, settings.norm)
            total = total - settings.y_weight * compared(z, y, settings.measure, settings.norm)
        return total


class _Watch:
    """The outputs of some modules during a pass. The net must be this object's own: threads do not share one."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        self._seen: list[Tensor] | None = None
        for name in names:
            backbone.get_submodule(name).register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._seen is not None:
            if not isinstance(output, Tensor):
                raise InputError(f"BiDO: a stage of type {type(module).__name__} gives no tensor: the backbone's `cuts` should name blocks that do.")
            self._seen.append(output)

    def during(self, forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the pass returns, and the outputs in the order of the pass."""
        self._seen = []
        try:
            return forward(), self._seen
        finally:
            self._seen = None


def _loss(watch: _Watch, forward: Callable[[], Tensor], images: Tensor, labels: Tensor, settings: BiDOSettings) -> Tensor:
    """labels: int64 (B,) or probabilities (B, K)."""
    if settings.idle or len(images) == 1:
        return F.cross_entropy(forward(), labels)
    logits, hidden = watch.during(forward)
    loss = F.cross_entropy(logits, labels)
    targets = F.one_hot(labels, logits.shape[1]) if labels.dim() == 1 else labels
    return loss + dependence_terms(images, hidden, targets, settings).to(loss.dtype)


class BiDODefence(Defence):
    """Trains with the two terms; nothing is random, and all leaves as it is.

    Its loss couples the images of a batch: there is no gradient of one image alone, and so no DP-SGD on top.
    """

    own_terms = True

    def __init__(self, model: SplitModel, settings: BiDOSettings) -> None:
        super().__init__(model)
        self.settings, self.stages = settings, stages(model.backbone)

    def player(self) -> BiDOPlayer:
        return BiDOPlayer(copy.deepcopy(self.model), self.stages, self.settings)

    def simulator(self, *, terms: Literal["client", "utility"] = "client", progress: float = 0.0) -> Callable[[], Simulate]:
        settings = self.settings if terms == "client" else BiDOSettings(x_weight=0.0, y_weight=0.0)

        def make() -> Simulate:
            model = copy.deepcopy(self.model).requires_grad_(False)
            watch = _Watch(model.backbone, self.stages)

            def loss(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
                return _loss(watch, lambda: functional_call(model, {**known, **params}, (images,)), images, labels, settings)

            def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
                return grad(loss)(params, known, images, labels, noise)

            simulate.loss = loss
            return simulate

        return make


class BiDOPlayer:
    """Plays the loss above (see clients.local.Player)."""

    kept: nn.Module | None = None

    def __init__(self, model: SplitModel, names: Sequence[str], settings: BiDOSettings) -> None:
        self.model, self._settings, self._watch = model, settings, _Watch(model.backbone, names)

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        return None

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        return _loss(self._watch, lambda: self.model(images), images, labels, self._settings)
