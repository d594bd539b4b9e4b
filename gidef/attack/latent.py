"""A5: the perturbed latent z̃ from the predictor's gradients, then a decoder. The attack on private fronts.

The server knows the predictor φ and sees ∂L/∂φ, a function of z̃ and the labels alone. The span of a batch's latents can often be
written down (`latent_basis`), and then few numbers are left to find (`unmix`); otherwise all of z̃ is matched (`match_latent`).
The decoder is trained on public images through a front: the true one (a bound), or a shadow that the attacker trains in front of
the known φ (`fit_shadow`).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from gidef.attack.kinks import CurvedKinks
from gidef.attack.labels import LabelsHidden, recover_labels
from gidef.attack.learned import DrawNoise, public_images
from gidef.attack.matching import Simulate
from gidef.errors import InputError
from gidef.models import SplitModel
from gidef.rng import generator
from gidef.types import Observation, Reconstruction, Tensors

# K attacks (observation × restart), O observations, B images of one, r latents of a basis


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear or convolutional layer whose input is z̃ itself.  weight, bias: names of its tensors; bias None if it has none.
    kernel, stride, padding, dilation: of a convolution, None for a linear layer over all of a flattened z̃."""

    weight: str
    bias: str | None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def patches(self, latents: Tensor) -> Tensor:
        """What each output position reads: (N, entries, positions) of latents (N, *latent)."""
        if self.kernel is None:
            return latents.flatten(1)[..., None]
        return F.unfold(latents, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)

    def gathered(self, patches: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """The adjoint of `patches`: sums over the positions that read an entry, (N, *latent)."""
        if self.kernel is None:
            return patches[..., 0].unflatten(1, latent_shape)
        return F.fold(patches, latent_shape[1:], self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)


class Predictor:
    """What lies behind the cut of a split model, as a function of its weights and z̃.

    Attributes: names: of its parameters.  latent_shape, num_classes: of the model.  readers: layers that read z̃ itself.
                told: how many numbers its gradient can tell at most; latents of more entries are not determined by it. A linear layer that gives
                the logits tells an input less than it has weights, as the logits' gradients sum to zero.
    Owns a copy of the model: threads must not share a predictor.
    """

    def __init__(self, model: SplitModel) -> None:
        self._module = _Behind(copy.deepcopy(model).requires_grad_(False))
        self.names, self.latent_shape, self.num_classes = model.parts["predictor"], model.latent_shape, model.num_classes
        self.readers = _readers(self._module.model, self.names)
        self.told = _told(self._module.model, self.names)

    def __call__(self, params: Tensors, latents: Tensor) -> Tensor:
        """Logits (B, K) from latents (B, *latent). params: at least those in `names`; further ones are ignored."""
        return functional_call(self._module, {f"model.{name}": params[name] for name in self.names}, (latents,))

    def loss(self, params: Tensors, latents: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats; labels (B, K) as probabilities."""
        return F.cross_entropy(self(params, latents), labels)

    def gradient(self, params: Tensors, latents: Tensor, labels: Tensor) -> Tensors:
        """∂ cross-entropy / ∂ φ, by `names`. What a client releases under `head`: no other term of its loss reaches φ."""
        return grad(self.loss)({name: params[name] for name in self.names}, latents, labels)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Predictor:
        """Moves its own copy of what is no parameter of the predictor, too."""
        self._module.to(device=device, dtype=dtype)
        return self


def latent_simulator(predictor: Predictor) -> Simulate:
    """A simulator whose unknown is z̃: known["latent"] (B, *latent) instead of images and noise, which it ignores.

    For the engine, with "latent" among the searched variables; `match_latent` needs no engine.
    """

    def loss(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
        return predictor.loss(params, known["latent"], labels)

    def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        return predictor.gradient(params, known["latent"], labels)

    simulate.loss = loss
    return simulate


def latent_basis(update: Tensors, reader: Reader, latent_shape: tuple[int, ...], size: int) -> Tensor | None:
    """Latents (r, *latent) that span the B perturbed latents of a batch, in closed form; r = B mostly, and for B = 1 and a bias, z̃ itself.

    The gradient of a linear map's weight is Σ δ uᵀ over what it reads: over images, u = z̃, or over images and P positions, u = a patch of z̃.
    With B · P ≤ its rows and columns, the row space V of that gradient is the span of all patches. A latent is in the batch's span if
    and only if all of its patches are in V (it may differ from them only by chance): with Π the projection of patches
    that disagree about a pixel, or about the zeros of the padding, onto those of a latent, these are the fixed points

        z ∈ span{z̃₁ … z̃_B}   ⇔   c = (I ⊗ V)ᵀ Π (I ⊗ V) c,   patches(z) = (I ⊗ V) c.

    Where a side of the map has padding and the other has none that is read, as at stride 2 and even sides, a latent that is shifted towards the latter
    side by whole strides has patches in V, too: r is B times the number of such shifts, 16 of a map of 8×8.
    With one image, a bias and r = 1, ∂L/∂b = Σ_positions δ gives the missing factor.

    Args:    update: gradient or delta, floating, not stacked.  reader: of the layer.  size: B.
    Returns: (r, *latent), orthogonal and of root mean square 1 unless r = 1 and there is a bias; None if its gradient does not determine
             them: too many patches for the layer (or images for its classes, as logits' gradients sum to zero), or too little overlap, r · B > `MIXES`.
    Raises:  InputError if the reader's tensors are missing.
    Source:  The linear case is the ratio of Phong et al. 2017 and its span that of SPEAR (Dimitrov et al. 2024, arXiv:2403.03945); the
             span of patches with the consistency of their overlaps is ours.
    Exact for: any activation, norm and loss behind the layer. Noise added to gradients, or entries pruned from them, spoil it.
    """
    for name in (reader.weight, reader.bias):
        if name is not None and name not in update:
            raise InputError(f"{name!r}, of the layer that reads the latent, is not in the update: give one that holds the predictor's gradient.")
    weight = update[reader.weight].double().flatten(1)
    shape = (1, *latent_shape)
    seen = reader.gathered(torch.ones_like(reader.patches(weight.new_ones(shape))), latent_shape)  # how often each entry is read
    positions = reader.patches(weight.new_ones(shape)).shape[-1]
    if size * positions > min(weight.shape) or not weight.isfinite().all():
        return None
    _, singular, rows = torch.linalg.svd(weight, full_matrices=False)
    if not float(singular[size * positions - 1]) > 8 * torch.finfo(update[reader.weight].dtype).eps * float(singular[0]):
        return None  # of less rank than patches
    space = rows[: size * positions]  # (B·P, entries)
    placed = space[:, None, :, None] * torch.eye(positions, dtype=weight.dtype, device=weight.device)[:, None]  # each at each position
    halves = (reader.gathered(placed.flatten(0, 1), latent_shape) / seen.clamp(min=1).sqrt()).flatten(1)  # rows of (I ⊗ V)ᵀ Π^½
    values, vectors = torch.linalg.eigh(halves @ halves.T)
    rank = max(size, int((values > 1 - 1e-4).sum()))
    if rank * size > MIXES:
        return None
    vectors = vectors[:, -rank:]
    found = (vectors.T @ halves).unflatten(1, latent_shape) / seen.clamp(min=1).sqrt()
    basis = torch.linalg.qr(found.flatten(1).T).Q.T * math.sqrt(math.prod(latent_shape))
    if rank == 1 and reader.bias is not None:
        read = reader.patches(basis.unflatten(1, latent_shape))[0]  # (entries, P)
        # on the CPU, whose driver bears patches that depend on one another, as those of a smooth latent do; a GPU has none that does
        delta = torch.linalg.lstsq(read.cpu(), weight.T.cpu()).solution.sum(0).to(weight)  # Σ δ, were the basis the latent itself
        bias = update[reader.bias].double()
        if float(bias.square().sum()) > 0:
            basis = basis * (delta @ bias / bias.square().sum())
    return basis.unflatten(1, latent_shape).to(update[reader.weight].dtype)


UNMIXED = 8
"""Largest batch that `read_latent` unmixes."""
MIXES = UNMIXED**2
"""Most numbers that `unmix` is to find: a start takes twice as many gradients of an image in each iteration."""


class Matched(NamedTuple):
    """latents: (O, B, *latent), of the best start by the attacker's own loss.  loss: (O,), of it, ∞ where every start failed.
    losses: (O, starts), the lowest of each.  curve: (O, points), of the best start.  restart: int64 (O,), which it is.  labels: int64 (O, B)."""

    latents: Tensor
    loss: Tensor
    losses: Tensor
    curve: Tensor
    restart: Tensor
    labels: Tensor


@torch.no_grad()
def unmix(
    observation: Observation, predictor: Predictor, basis: Tensor, labels: Tensor, *, seed: int, stream: int = 0, starts: int = 32,
    iterations: int = 30, settling: int = 12, first_step: float = 0.3, enough: float = 1e-10, at_once: int = 128, device: torch.device | str = "cpu",
) -> Iterator[int]:  # fmt: skip
    """Find which B combinations z = M · basis of known latents a gradient is of; yields the iterations done.

        min over M (B, r)   ‖α w ⊙ ∂L/∂φ(M) − w ⊙ observed‖²,   w = 1 / each tensor's observed norm, α the best scalar

    Levenberg–Marquardt with the Jacobian by central differences, whose step shrinks geometrically from `first_step` to 1e-6: with so
    few unknowns it is cheap, needs no second derivatives, and sees the gates that open and shut within a step, which derivatives of ReLU networks
    do not. Every other start takes twice the iterations of small steps, for smooth predictors whose images' gradients are nearly alike. Dampings of 1e-12 … 1 are tried at once, and the best point is kept. It mostly ends a few per cent from the truth, at a point where
    a few gates are wrong and all of M gives way to them. `settling` further iterations ignore such gates: least absolute residuals
    (iteratively reweighted), the reader's in coordinates of the patches at hand, where the gradient is a δ per gate, and a wrong gate one outlier.

    Args:    predictor: owned by this thread.  basis: (r, *latent), of order 1.  labels: int64 (B,).  stream: distinguishes observations.
             starts: random M, one after another until the loss is below `enough`; the first is the identity where r = B.
             at_once: images in one vectorised program; batches, for a predictor whose norms look at the batch.
    Returns: latents (B, *latent) and loss, float64 on the device; a list of losses, one per start; the curve of the best, a list; its number.
             A loss that is not of the order of rounding tells that the latents were not found; it tells nothing where `Predictor.told` is
             below the B latents' entries.
    Source:  ours; SPEAR's sparsity needs plain ReLU layers.
    Measured: the small net before training on 28-pixel synthetic blood cells, noise of σ = 1, batches of 4 and 8 in 8 classes, with repeated labels: exact
             from the first start, to 2e-13 in float64, 5e-6 of a latent's norm in float32 at 8 images, of which 3 s on a core. At 32 pixels, where r = 16 B,
             batches of 1 and 2: to 2e-7 in float32. One linear layer to 10 classes, 8 images in pairs of a label: 5 of 7 within 32 starts; the
             losses of the others, 7e-7 and 2e-6, tell so.
    """
    cast = {"device": torch.device(device), "dtype": torch.float64}
    size, flat = len(labels), basis.to(**cast).flatten(1)
    parts = _Parts(observation, predictor.to(**cast), flat, F.one_hot(labels, predictor.num_classes).to(**cast), at_once)
    best, lowest, curve, chosen, tried, done = torch.zeros(size, len(flat), **cast), math.inf, [math.inf], 0, [], 0
    for start in range(starts):
        mix = torch.randn(size, len(flat), generator=generator(seed, "unmix", stream, start), dtype=torch.float64).to(**cast) * math.sqrt(size / len(flat))
        if start == 0 and size == len(flat):
            mix = torch.eye(size, **cast)
        now = parts.residuals(mix[None])[0]
        points = [float(now @ now) + parts.beyond]
        first, length = (first_step, iterations) if start % 2 == 0 else (min(first_step, 1e-3), 2 * iterations)
        for iteration in range(length):
            step = first * (1e-6 / first) ** (iteration / max(length - 1, 1))
            candidates = mix - _damped(parts.slopes(mix, step), now).unflatten(1, mix.shape)
            others = parts.residuals(candidates)
            losses = others.square().sum(1).nan_to_num(nan=torch.inf) + parts.beyond
            place = int(losses.argmin())
            if float(losses[place]) < points[-1]:
                mix, now = candidates[place], others[place]
            points.append(min(points[-1], float(losses[place])))
            done += 1
            yield done
            if points[-1] < enough and points[-1] > 0.5 * points[-2] or len(points) > 10 and points[-1] == points[-10]:
                break  # rounding is all that is left, or this start leads nowhere
        moved = mix
        for _ in range(settling):
            moved = parts.settled(moved)
            residual = parts.residuals(moved[None])[0]
            loss = float(residual @ residual) + parts.beyond
            points.append(points[-1])
            if loss < points[-1]:
                mix, points[-1] = moved, loss
            done += 1
            yield done
            if not math.isfinite(loss) or points[-1] < enough and points[-1] > 0.5 * points[-2]:
                break
        tried.append(points[-1] if math.isfinite(points[-1]) else math.inf)
        if tried[-1] < lowest:
            best, lowest, curve, chosen = mix, tried[-1], points, start
        if lowest < enough:
            break
    return (best @ flat).unflatten(-1, predictor.latent_shape), lowest, tried, curve, chosen


def _damped(jacobian: Tensor, residual: Tensor) -> Tensor:
    """Steps (dampings, n) of Levenberg–Marquardt by a Jacobian (n, D) and a residual (D,)."""
    dampings = torch.tensor([1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1.0], dtype=jacobian.dtype, device=jacobian.device)
    normal = jacobian @ jacobian.T
    damped = normal + torch.diag_embed(dampings[:, None] * normal.diagonal() + 1e-30)
    return torch.linalg.solve_ex(damped, (jacobian @ residual).expand(len(dampings), -1)).result


class _Parts:
    """A batch's weighted gradient at mixes M of known latents, as the mean of its images' parts, in few numbers.

    Unless a norm looks at the batch, an image's part depends on its own row of M alone, so that a step along one entry of M costs the gradient of one
    image. A reader's weight gets Σ δ uᵀ over the positions, with u in the span of the basis's patches: its coordinates there have the same products.

    Attributes: beyond: the squared part of the observed gradient that no mix can explain, as it is outside of these coordinates.
    """

    def __init__(self, observation: Observation, predictor: Predictor, flat: Tensor, wanted: Tensor, at_once: int) -> None:
        cast, sign, names = {"device": flat.device, "dtype": flat.dtype}, 1.0 if observation.kind == "gradient" else -1.0, predictor.names
        self._flat, self._wanted, self._shape, self._names = flat, wanted, predictor.latent_shape, names
        self._module = copy.deepcopy(predictor._module)
        norms = [layer for layer in self._module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self._apart = not any(layer.training or layer.running_mean is None for layer in norms)
        self._params = {name: observation.params[name].detach().to(**cast) for name in names}
        self._read: dict[str, Tensor] = {}
        self._mixtures: dict[str, _Mixture] = {}
        self.beyond = 0.0
        target = {name: sign * observation.update[name].to(**cast) for name in names}
        self._scale = {name: 1 / (tensor.norm().clamp(min=1e-300) * math.sqrt(len(names))) for name, tensor in target.items()}
        latents = flat.unflatten(1, self._shape)
        for reader in predictor.readers if self._apart else ():
            name, patches, path = reader.weight, reader.patches(latents), reader.weight.rpartition(".")[0]
            layer = self._module.model.get_submodule(path)
            if patches.shape[0] * patches.shape[2] < patches.shape[1] and type(layer) in (nn.Linear, nn.Conv2d):
                images = len(wanted) * patches.shape[2]  # patches that the batch has; of more latents than it has, all others are made of them
                span, rows = torch.linalg.svd(patches.mT.flatten(0, 1), full_matrices=False).Vh[:images], target[name].flatten(1)
                target[name], self._read[name] = rows @ span.T, span @ patches  # (out, k) and (r, k, P)
                self.beyond += float(((rows - target[name] @ span) * self._scale[name]).square().sum())
                given = latents if reader.kernel is not None else flat
                silent = {} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)}
                self._mixtures[name] = _Mixture(layer, functional_call(layer, {"weight": self._params[name], **silent}, (given,)))
                self._module.model.set_submodule(path, self._mixtures[name])
        self._observed = torch.cat([(target[name] * self._scale[name]).flatten() for name in names])
        ends = torch.tensor([target[name].numel() for name in names]).cumsum(0).tolist()
        self._widths = [slice(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]  # each tensor's place
        self._others = [name for name in names if name not in self._read]
        self._each = vmap(self._part if self._apart else self._whole, chunk_size=at_once)

    def _loss(self, params: Tensors, zeros: Tensors, latents: Tensor, wanted: Tensor) -> Tensor:
        for name, mixture in self._mixtures.items():
            mixture.zero = zeros[name]
        logits = functional_call(self._module, {f"model.{name}": params[name] for name in self._others}, (latents.unflatten(-1, self._shape),))
        return F.cross_entropy(logits, wanted)

    def _part(self, row: Tensor, wanted: Tensor) -> Tensor:
        """Of one image: (D,), from its row of M (r,)."""
        for mixture in self._mixtures.values():
            mixture.row = row
        zeros = {name: torch.zeros_like(mixture.outputs[:1]) for name, mixture in self._mixtures.items()}
        others = {name: self._params[name] for name in self._others}
        own, deltas = grad(self._loss, argnums=(0, 1))(others, zeros, (row @ self._flat)[None], wanted[None])
        for name, coordinates in self._read.items():
            own[name] = deltas[name].view(deltas[name].shape[1], -1) @ torch.tensordot(row, coordinates, 1).T
        return torch.cat([(own[name] * self._scale[name]).flatten() for name in self._names])

    def _whole(self, mix: Tensor) -> Tensor:
        """Of the batch: (D,), from M (B, r)."""
        own = grad(self._loss)(self._params, {}, mix @ self._flat, self._wanted)
        return torch.cat([(own[name] * self._scale[name]).flatten() for name in self._names])

    def _scaled(self, updates: Tensor) -> Tensor:
        """α u with the best α, of each update (N, D), in their place."""
        along = (updates @ self._observed) / (torch.linalg.vector_norm(updates, dim=1).square() + 1e-300)
        return updates.mul_(along[:, None])

    def _updates(self, mixes: Tensor) -> Tensor:
        """(N, D) at mixes (N, B, r)."""
        if not self._apart:
            return self._each(mixes)
        return self._each(mixes.flatten(0, 1), self._wanted.repeat(len(mixes), 1)).unflatten(0, mixes.shape[:2]).mean(1)

    def residuals(self, mixes: Tensor) -> Tensor:
        """(N, D) at mixes (N, B, r)."""
        return self._scaled(self._updates(mixes)).sub_(self._observed)

    def _ends(self, mix: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Updates (B · r, D) a step ahead and behind along each entry of a mix (B, r)."""
        size, rank = mix.shape
        if self._apart:
            axes = step * torch.eye(rank, dtype=mix.dtype, device=mix.device)
            rows = torch.cat([mix[:, None] + axes, mix[:, None] - axes, mix[:, None]], 1)  # (B, 2r + 1, r)
            parts = self._each(rows.flatten(0, 1), self._wanted.repeat_interleave(2 * rank + 1, 0)).unflatten(0, (size, -1))
            whole = parts[:, -1].mean(0)
            ends = (parts[:, :-1] - parts[:, -1:]).div_(size).add_(whole)
            return ends[:, :rank].flatten(0, 1), ends[:, rank:].flatten(0, 1)
        axes = step * torch.eye(size * rank, dtype=mix.dtype, device=mix.device).view(-1, size, rank)
        ahead, behind = self._each(torch.cat([mix + axes, mix - axes])).chunk(2)
        return ahead, behind

    def slopes(self, mix: Tensor, step: float) -> Tensor:
        """Central differences (B · r, D) of the residual along each entry of a mix (B, r)."""
        ahead, behind = self._ends(mix, step)
        return self._scaled(ahead).sub_(self._scaled(behind)).div_(2 * step)

    def settled(self, mix: Tensor) -> Tensor:
        """The next mix (B, r): a step towards the least Σ log(1 + |residual| / typical one), which a few wrong gates do not pull at."""
        inverse, own = {}, self._updates(mix[None])[0]
        for name, coordinates in self._read.items():
            patches = torch.tensordot(mix, coordinates, 1).permute(1, 0, 2).flatten(1)  # (k, B · P)
            if not patches.isfinite().all():
                return torch.full_like(mix, torch.nan)
            inverse[name] = torch.linalg.pinv(patches.T)

        def turned(updates: Tensor) -> Tensor:
            """Of each tensor, the reader's as δ of each position; relative to the root mean square of the observed one."""
            found = []
            for name, width in zip(self._names, self._widths, strict=True):
                part, seen = updates[..., width], self._observed[width]
                if name in inverse:
                    part, seen = ((one.unflatten(-1, (-1, len(inverse[name]))) @ inverse[name]).flatten(-2) for one in (part, seen))
                found.append(part / seen.square().mean().sqrt().clamp_min(1e-300))
            return torch.cat(found, -1)

        alpha = (own @ self._observed) / (own @ own + 1e-300)
        ahead, behind = self._ends(mix, 1e-6)
        now = turned(alpha * own - self._observed)
        typical = 0.5 * now.abs().median() + 1e-14
        weights = (now.abs() + typical).rsqrt()
        jacobian = torch.cat([turned((ahead - behind).mul_(alpha / 2e-6)), turned(alpha * own)[None]]) * weights
        moves = _damped(jacobian, now * weights)
        mixes, alphas = mix - moves[:, :-1].unflatten(1, mix.shape), alpha * (1 - moves[:, -1:])
        losses = (turned(alphas * self._updates(mixes) - self._observed).abs() / typical).log1p().sum(1)
        return mixes[int(losses.nan_to_num(nan=torch.inf).argmin())]


class _Mixture(nn.Module):
    """A reader of a mix of known latents: the mix of its outputs for them (r, out, …), its bias, and a zero whose gradient is δ."""

    row: Tensor
    zero: Tensor

    def __init__(self, layer: nn.Module, outputs: Tensor) -> None:
        super().__init__()
        self.bias, self.outputs = layer.bias, outputs

    def forward(self, latents: Tensor) -> Tensor:
        output = torch.tensordot(self.row, self.outputs, 1)[None] + self.zero
        return output if self.bias is None else output + self.bias.view(-1, *[1] * (output.ndim - 2))


def match_latent(
    observations: Sequence[Observation], predictor: Predictor, *, seed: int, iterations: int = 400, restarts: int = 1, lr: float = 0.1,
    distance: Literal["cosine", "l2"] = "cosine", kink_width: tuple[float, float] | None = (1.0, 0.02), start_scale: float = 0.5,
    at_once: int = 16, mode: Literal["vmap", "loop"] = "vmap", dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", every: int = 20,
) -> Iterator[int]:  # fmt: skip
    """Search the latents whose gradient of φ is the observed one; yields the iterations done, over all chunks.

        min over z   distance(∂L/∂φ (z, labels), observed)

    Adam with steps that fall to zero as (1 − t)², all of a chunk's attacks in one program. z is not bounded.

    Args:    observations: alike in sizes; updates and params hold at least the predictor's tensors (others are ignored). A delta is taken
             for one step of SGD; several local steps have no single latent.
             predictor: owned by this thread.  restarts: chosen by their own loss.  distance, kink_width: as in `Matching`.
             start_scale: deviation of the first z. What the gradient does not tell (behind a pooling layer, differences within a window)
             stays about as it began, so that small starts give latents of small norm.
             at_once: attacks in one program.  every: iterations between reports.
    Returns: Matched, on the CPU, in `dtype`.
    Raises:  InputError if observations differ in sizes, lack the predictor's tensors, or labels can neither be had nor recovered.
    Source:  gradient matching (Zhu et al. 2019, arXiv:1906.08935; Geiping et al. 2020), with the latent for the image.
    """
    if restarts < 1 or iterations < 0 or at_once < 1 or not lr > 0:
        raise InputError(f"restarts={restarts}, iterations={iterations}, at_once={at_once}, lr={lr}: expected at least 1, 0 and 1, and lr above 0.")
    if distance == "l2" and any(observation.kind == "delta" for observation in observations):
        raise InputError('a delta has an unknown step size: match it by distance="cosine".')
    size = _check(observations, predictor)
    cast, names, shape = {"device": torch.device(device), "dtype": dtype}, predictor.names, predictor.latent_shape
    labels, told = _labels(observations, predictor.num_classes)
    predictor.to(**cast)
    attacks = [(index, restart) for index in range(len(observations)) for restart in range(restarts)]

    def objective(z: Tensor, params: Tensors, target: Tensors, scale: Tensor, labels: Tensor, width: float | None) -> Tensor:
        with contextlib.nullcontext() if width is None else CurvedKinks(width):
            update = predictor.gradient(params, z, labels)
        return _distance(distance, update, target, scale)

    latents, losses, curves, done = [], [], [], 0
    for first in range(0, len(attacks), at_once):
        chunk = attacks[first : first + at_once]
        rows = torch.tensor([index for index, _ in chunk])
        params, dims = _gathered([observations[index].params for index, _ in chunk], names, cast)
        target, scale, alive = _targets([observations[index] for index, _ in chunk], names, cast)
        alive = alive & told[rows].to(alive.device)
        z = start_scale * torch.stack([torch.randn((size, *shape), generator=generator(seed, "latent", *attack)) for attack in chunk]).to(**cast)
        wanted = F.one_hot(labels[rows], predictor.num_classes).to(**cast)
        evaluate = _over(grad_and_value(objective), len(chunk), mode, (0, dims, 0, 0, 0, None))
        m, v, best = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
        lowest, curve = torch.full((len(chunk),), torch.inf, **cast), []
        for iteration in range(iterations + 1):
            width = None if kink_width is None else kink_width[0] * (kink_width[1] / kink_width[0]) ** (iteration / max(iterations, 1))
            with torch.no_grad():  # never around the yield, it would leak to the consumer
                gradient, loss = evaluate(z, params, target, scale, wanted, width)
            better = alive & (loss < lowest)
            best, lowest = torch.where(_rows(better, z), z, best), torch.where(better, loss, lowest)
            curve.append(loss)
            if iteration < iterations:
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
                step = lr * (1 - iteration / iterations) ** 2 * (m / (1 - 0.9 ** (iteration + 1)))
                z = z - step / ((v / (1 - 0.999 ** (iteration + 1))).sqrt() + 1e-15)
            if iteration % every == 0 and 0 < iteration < iterations:
                yield done + iteration
        done += iterations
        yield done
        points = torch.linspace(0, iterations, min(iterations + 1, 200)).round().long()
        latents.append(best.cpu())
        losses.append(lowest.cpu())
        curves.append(torch.stack(curve, 1)[:, points.to(device)].cpu())
    every_loss = torch.cat(losses).view(len(observations), restarts)
    restart = every_loss.argmin(1)
    chosen = torch.arange(len(observations)) * restarts + restart
    return Matched(torch.cat(latents)[chosen], every_loss.min(1).values, every_loss, torch.cat(curves)[chosen], restart, labels)


def read_latent(
    observations: Sequence[Observation], predictor: Predictor, *, seed: int, starts: int = 32, enough: float = 1e-4, **settings: Any
) -> Iterator[int]:
    """The latents of each observation by the best way there is; yields the iterations done.

    Where a layer tells the span of the latents (`latent_basis`), they are sought in it (`unmix`); where none does, or the result is
    further than `enough` from the observed gradient, by free matching (`match_latent`), whose result `unmix` polishes: a latent's scale hardly
    shows before a norm layer. The smaller cosine distance counts.

    Args:    observations, predictor, seed, settings: as `match_latent`.  starts: of `unmix`, 2 at most for one number, and for more than 16 behind a convolution
             so few that they cost no more than at 16, or one. Above `UNMIXED` images there is free matching alone.
    Returns: Matched, on the CPU, float64; loss and losses are cosine distances; the curve is a single point, the loss, where `unmix` alone
             gave it. Updates that are zero or not finite have an infinite loss.
    """
    size, shape = _check(observations, predictor), predictor.latent_shape
    labels, told = _labels(observations, predictor.num_classes)
    latents = torch.zeros(len(observations), size, *shape, dtype=torch.float64)
    loss = torch.full((len(observations),), torch.inf, dtype=torch.float64)
    left, done, device = [], 0, settings.get("device", "cpu")
    for index, observation in enumerate(observations):
        if not told[index] or not bool(_targets([observation], predictor.names, {"device": torch.device("cpu"), "dtype": torch.float64})[2]):
            continue
        bases = ((reader, latent_basis(observation.update, reader, shape, size)) for reader in predictor.readers if size <= UNMIXED)
        reader, basis = next((one for one in bases if one[1] is not None), (None, None))
        if basis is not None:
            tries = _tries(starts, size, len(basis), reader.kernel is None)
            running = unmix(observation, predictor, basis, labels[index], seed=seed, stream=index, starts=tries, device=device)
            (latents[index], *_), done = yield from _counted(running, done)
            loss[index] = _fit(observation, predictor, latents[index].to(device), labels[index])
        if not loss[index] <= enough:
            left.append(index)
    losses, curve, restart = loss[:, None], loss[:, None], torch.zeros(len(observations), dtype=torch.int64)
    if left:
        running = match_latent([observations[index] for index in left], predictor, seed=seed, **settings)
        free, done = yield from _counted(running, done)
        losses, curve = losses.repeat(1, free.losses.shape[1]), curve.repeat(1, free.curve.shape[1])
        for place, index in enumerate(left):
            observation, near, tried = observations[index], {"starts": 1, "first_step": 0.1, "device": device}, [free.latents[place].double()]
            if size <= UNMIXED:
                running = unmix(observation, predictor, free.latents[place], labels[index], seed=seed, stream=index, **near)
                (polished, *_), done = yield from _counted(running, done)
                tried.append(polished.cpu())
            for found in tried:
                fit = _fit(observation, predictor, found.to(device), labels[index])
                if fit < loss[index]:
                    latents[index], loss[index], restart[index] = found, fit, free.restart[place]
                    losses[index], curve[index] = free.losses[place], free.curve[place]
    return Matched(latents, loss, losses, curve, restart, labels)


def fit_shadow(
    model: SplitModel, phi: Tensors, images: Tensor, labels: Tensor, *, steps: int, seed: int, draw_noise: DrawNoise | None = None,
    loss: Callable[[SplitModel, Tensor, Tensor, Tensor | None], Tensor] | None = None, batch_size: int = 64, lr: float = 1e-3,
) -> Iterator[int]:  # fmt: skip
    """Train a front, θ and η, in place for a frozen predictor φ, on public images; yields the steps done.

    The fronts of clients are private, but trained in front of the φ that the server knows: so is the shadow, and, begun at the common
    initialisation, it tends to end up close to them.

    Args:    model: the common initialisation, which becomes the shadow; on the device to use.  phi: the predictor's tensors by name; further
             ones are ignored.  images: public, (P, C, H, W), uint8 or floating in [0, 1].  labels: int64 (P,).
             draw_noise: draw_noise(count, generator=g) → (count, *latent); None, or a result of None, is no noise.
             loss: loss(model, images, labels, noise) → scalar, to train as clients do; cross-entropy unless given.
             Adam with the rate falling to zero along a cosine; half of the images are mirrored.
    Raises:  InputError if phi lacks a tensor of the predictor or has another shape for it.
    """
    own = dict(model.named_parameters())
    for name in model.parts["predictor"]:
        if name not in phi or phi[name].shape != own[name].shape:
            raise InputError(f"phi lacks {name!r}, or it has another shape than the model's: give the predictor's tensors of the same architecture.")
        with torch.no_grad():
            own[name].copy_(phi[name])
    front = [own[name] for name in (*model.parts["encoder"], *model.parts["perturbation"])]
    model.requires_grad_(False).train()
    for parameter in front:
        parameter.requires_grad_(True)
    device = front[0].device
    order, noises = generator(seed, "shadow", "order"), generator(seed, "shadow", "noise")
    optimiser = torch.optim.Adam(front, lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (min(batch_size, len(images)),), generator=order)
        batch, wanted = public_images(images, rows, device), labels[rows.to(labels.device)].to(device)
        mirrored = (torch.rand(len(rows), generator=order) < 0.5).to(device)
        batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        noise = _drawn(draw_noise, len(rows), noises, device)
        optimiser.zero_grad(set_to_none=True)
        value = F.cross_entropy(model(batch, noise), wanted) if loss is None else loss(model, batch, wanted, noise)
        value.backward()
        nn.utils.clip_grad_norm_(front, 5.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            yield step
    optimiser.zero_grad(set_to_none=True)
    model.requires_grad_(False).eval()
    yield steps


def front_latents(model: SplitModel, draw_noise: DrawNoise | None = None) -> Callable[[Tensor, Generator, int], Tensor]:
    """latents(images (B, C, H, W), generator, step) → z̃ through a front, the shadow or the true one: what a decoder is trained on."""

    def latents(images: Tensor, noises: Generator, step: int) -> Tensor:
        return model.run(images, _drawn(draw_noise, len(images), noises, images.device)).perturbed

    return latents


@torch.no_grad()
def decode(latents: Tensor, decoder: nn.Module, *, at_once: int = 64) -> Tensor:
    """Images float32 (O, B, C, H, W) in [0, 1], on the CPU, from latents (O, B, *latent) of any dtype and device. The decoder's mode is left."""
    some = next(decoder.parameters())
    parts = [decoder(part.to(some)).clamp(0, 1).float().cpu() for part in latents.flatten(0, 1).split(at_once)]
    return torch.cat(parts).unflatten(0, latents.shape[:2])


def _tries(starts: int, size: int, rank: int, cheap: bool) -> int:
    """Starts of `unmix` for a batch of this size, in latents of this number; cheap: linear layers read them."""
    return min(starts, 2) if size * rank == 1 else starts if cheap else max(1, int(starts * min(1.0, 16 / (size * rank))))


def invert_latent(observations: Sequence[Observation], predictor: Predictor, decoder: nn.Module, *, seed: int, **settings: Any) -> Iterator[int]:
    """A5: `read_latent`, then `decode`; yields the iterations done.

    Args:    as `read_latent`.  decoder: (N, *latent) → images, trained on z̃ of public images, in eval mode.
    Returns: one Reconstruction per observation. An update that is zero or not finite, or tells no labels where none are granted, is a failure, with mid-grey images.
    """
    matched = yield from read_latent(observations, predictor, seed=seed, **settings)
    images, found = decode(matched.latents, decoder), []
    for index in range(len(observations)):
        failed = not math.isfinite(float(matched.loss[index]))
        found.append(
            Reconstruction(
                images=torch.full_like(images[index], 0.5) if failed else images[index],
                labels=matched.labels[index],
                loss=float(matched.loss[index]),
                losses=matched.curve[index].float(),
                restart=int(matched.restart[index]),
                restart_losses=matched.losses[index].float(),
                status="failed" if failed else "ok",
                error="no latent was found: the observed update is zero or not finite, tells no labels, or the loss became infinite" if failed else "",
            )
        )
    return found


class _Behind(nn.Module):
    """The predictor as a module of its own, for functional_call."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.predict(latents)


def _readers(model: SplitModel, names: Sequence[str]) -> tuple[Reader, ...]:
    """Layers of the predictor that are handed the latent itself, found by running it."""
    weight = next(model.parameters())
    probe, found, handles = weight.new_ones((2, *model.latent_shape)), [], []

    def look(name: str, module: nn.Module, inputs: tuple) -> None:
        given = inputs[0]
        if given.data_ptr() != probe.data_ptr() or given.numel() != probe.numel() or not given.is_contiguous():
            return
        own, bias = f"{name}.weight", f"{name}.bias" if module.bias is not None else None
        if own not in names:
            return
        if isinstance(module, nn.Linear):
            if given.ndim == 2:
                found.append(Reader(own, bias))
        elif given.shape == probe.shape and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            found.append(Reader(own, bias, module.kernel_size, module.stride, module.padding, module.dilation))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(lambda module, inputs, name=name: look(name, module, inputs)))
    try:
        with torch.no_grad():
            model.predict(probe)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _told(model: SplitModel, names: Sequence[str]) -> int:
    """Numbers that the gradient of the predictor has, less those that the others give."""
    outputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in names:
            handles.append(module.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output)))
    try:
        with torch.no_grad():
            logits = model.predict(next(model.parameters()).new_ones((2, *model.latent_shape)))
    finally:
        for handle in handles:
            handle.remove()
    last = [model.get_submodule(name) for name, output in outputs.items() if output.data_ptr() == logits.data_ptr()]
    sums = sum(layer.in_features + (layer.bias is not None) for layer in last)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names) - sums


def _counted(running: Iterator[int], before: int) -> Iterator[int]:
    """Goes on counting from an earlier search; returns what the search returns, and the count."""
    done = before
    while True:
        try:
            done = before + next(running)
        except StopIteration as end:
            return end.value, done
        yield done


def _labels(observations: Sequence[Observation], classes: int) -> tuple[Tensor, Tensor]:
    """int64 (O, B): granted, or recovered; and bool (O,): whether an update told them. They are zeros where it did not."""
    labels = torch.stack([_labels_of(observation, classes) for observation in observations])
    return labels.clamp_min(0), (labels >= 0).all(1)


def _labels_of(observation: Observation, classes: int) -> Tensor:
    """int64 (B,), −1 where the update tells none."""
    labels, size = observation.labels, observation.num_examples
    if labels is None:
        try:
            labels = recover_labels(observation, classes)
        except (LabelsHidden, torch.linalg.LinAlgError):
            labels = torch.full((size,), -1)
    elif labels.shape != (size,) or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"granted labels {tuple(labels.shape)} do not fit {size} images of {classes} classes: give one class index per image.")
    return labels.long().cpu()


def _check(observations: Sequence[Observation], predictor: Predictor) -> int:
    """The batch size; InputError unless observations are alike in it and hold the predictor's tensors."""
    if len(sizes := {observation.num_examples for observation in observations}) != 1:
        raise InputError(f"observations with {sorted(sizes)} images: give at least one observation, and batches of one size.")
    for observation in observations:
        for name in predictor.names:
            if name not in observation.update or name not in observation.params or observation.update[name].shape != observation.params[name].shape:
                raise InputError(
                    f"{name!r} of the predictor is not in the update, or has another shape there: the latent is read from the predictor's gradient. "
                    "Build the predictor from the model that is attacked."
                )
    return sizes.pop()


def _gathered(each: Sequence[Tensors], names: Sequence[str], cast: dict[str, Any]) -> tuple[Tensors, int | None]:
    """Tensors of all attacks, and their vmap dim: one map if they share it, else stacked."""
    if all(one[name] is each[0][name] for one in each for name in names):
        return {name: each[0][name].detach().to(**cast) for name in names}, None
    return {name: torch.stack([one[name].detach() for one in each]).to(**cast) for name in names}, 0


def _targets(observations: Sequence[Observation], names: Sequence[str], cast: dict[str, Any]) -> tuple[Tensors, Tensor, Tensor]:
    """Gradients over their norms, one over the norms (K,), and which can be matched (K,); the others are zero."""
    device = cast["device"]
    observed = {name: torch.stack([o.update[name].detach() for o in observations]).to(device, torch.float64) for name in names}
    sign = torch.tensor([1.0 if o.kind == "gradient" else -1.0 for o in observations], device=device, dtype=torch.float64)
    norm = sum(t.flatten(1).square().sum(1) for t in observed.values()).sqrt()
    alive = norm.isfinite() & (norm > 0)
    target = {name: torch.where(_rows(alive, t), t * _rows(sign / norm, t), 0.0).to(cast["dtype"]) for name, t in observed.items()}
    return target, torch.where(alive, 1 / norm, 0.0).to(cast["dtype"]), alive


@torch.no_grad()
def _fit(observation: Observation, predictor: Predictor, latents: Tensor, labels: Tensor) -> float:
    """Cosine distance of some latents' gradient from the observed one, in float64; infinite if it is not finite."""
    cast = {"device": latents.device, "dtype": torch.float64}
    target, scale, alive = _targets([observation], predictor.names, cast)
    params, _ = _gathered([observation.params], predictor.names, cast)
    update = predictor.to(**cast).gradient(params, latents.to(**cast), F.one_hot(labels, predictor.num_classes).to(**cast))
    value = float(_distance("cosine", update, {name: t[0] for name, t in target.items()}, scale[0]))
    return value if bool(alive) and math.isfinite(value) else math.inf


def _distance(name: str, update: Tensors, target: Tensors, scale: Tensor) -> Tensor:
    """Of an update from the observed one over its norm, as in `matching.distance`; scale is one over that norm."""
    if name == "cosine":
        squared = sum(tensor.square().sum() for tensor in update.values()) * scale.square()
        return 0.5 * sum((tensor * (scale * (squared + 1e-12).rsqrt()) - target[key]).square().sum() for key, tensor in update.items())
    if name != "l2":
        raise InputError(f'distance={name!r} is unknown: choose "cosine" or "l2".')
    return sum((tensor * scale - target[key]).square().sum() for key, tensor in update.items())


def _over(function: Callable, attacks: int, mode: str, dims: tuple) -> Callable:
    """The function over the leading dim of all attacks, as one program or a loop."""
    if mode == "vmap":
        return vmap(function, in_dims=dims)
    if mode != "loop":
        raise InputError(f'mode={mode!r} is unknown: choose "vmap" or "loop".')

    def pick(value: Tensor | Tensors | None, attack: int, dim: int | None) -> Tensor | Tensors | None:
        if dim is None:
            return value
        return {name: tensor[attack] for name, tensor in value.items()} if isinstance(value, dict) else value[attack]

    def loop(*inputs: Any) -> tuple[Tensor, ...]:
        each = [function(*(pick(value, attack, dim) for value, dim in zip(inputs, dims, strict=True))) for attack in range(attacks)]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))

    return loop


def _rows(per_attack: Tensor, like: Tensor) -> Tensor:
    """(K,) in the shape (K, 1, …) that broadcasts against `like`."""
    return per_attack.view(-1, *[1] * (like.ndim - 1))


def _drawn(draw: DrawNoise | None, count: int, draws: Generator, device: torch.device) -> Tensor | None:
    noise = None if draw is None else draw(count, generator=draws)
    return None if noise is None else noise.to(device)
