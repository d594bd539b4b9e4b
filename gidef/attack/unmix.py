"""The span of a batch's latents in closed form, and which of its combinations the batch is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gidef.attack.predictor import Predictor, Reader
from gidef.attack.simulate import along
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Observation, Tensors


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
ITERATIONS, SETTLING = 30, 12
"""Of a start of `unmix`."""


@torch.no_grad()
def unmix(
    observation: Observation, predictor: Predictor, basis: Tensor, labels: Tensor, *, seed: int, stream: int = 0, starts: int = 32,
    iterations: int = ITERATIONS, settling: int = SETTLING, first_step: float = 0.3, enough: float = 1e-10, at_once: int = 128, device: torch.device | str = "cpu",
) -> Iterator[int]:  # fmt: skip
    """Find which B combinations z = M · basis of known latents a gradient is of; yields the iterations done.

        min over M (B, r)   ‖α w ⊙ ∂L/∂φ(M) − w ⊙ observed‖²,   w = 1 / each tensor's observed norm, α the best scalar

    or through the predictor's `local` steps, whose images stand one step after another: the span of a delta is that of all of them.
    Levenberg–Marquardt with the Jacobian by central differences, whose step shrinks geometrically from `first_step` to 1e-6: with so
    few unknowns it is cheap, needs no second derivatives, and sees the gates that open and shut within a step, which derivatives of ReLU networks
    do not. Every other start takes twice the iterations of small steps, for smooth predictors whose images' gradients are nearly alike. Dampings of 1e-12 … 1 are tried at once, and the best point is kept. It mostly ends a few per cent from the truth, at a point where
    a few gates are wrong and all of M gives way to them. `settling` further iterations ignore such gates: least absolute residuals
    (iteratively reweighted), the reader's in coordinates of the patches at hand, where the gradient is a δ per gate, and a wrong gate one outlier.

    Args:    predictor: owned by this thread.  basis: (r, *latent), of order 1.  labels: int64 (B,).  stream: distinguishes observations.
             starts: random M, one after another until the loss is below `enough`, or what rounding leaves of a delta; the first is the identity where r = B.
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
    enough = max(enough, min(1e-6, 4 * parts.rounding))
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


def most_steps(starts: int, *, iterations: int = ITERATIONS, settling: int = SETTLING) -> int:
    """Iterations that `unmix` takes at most: every other start has twice as many of small steps, and each settles."""
    return sum(iterations * (1 + start % 2) + settling for start in range(starts))


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
                rounding: what the weights, from whose difference a delta is taken, lose of it at most, squared.
    """

    def __init__(self, observation: Observation, predictor: Predictor, flat: Tensor, wanted: Tensor, at_once: int) -> None:
        cast, sign, names = {"device": flat.device, "dtype": flat.dtype}, 1.0 if observation.kind == "gradient" else -1.0, predictor.names
        self._flat, self._wanted, self._shape, self._names = flat, wanted, predictor.latent_shape, names
        self._module = copy.deepcopy(predictor._module)
        self._apart, self._local = not predictor.couples, predictor.local
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
                self._params[name] = torch.zeros_like(target[name])  # its change since the first step
                self.beyond += float(((rows - target[name] @ span) * self._scale[name]).square().sum())
                given = latents if reader.kernel is not None else flat
                weight = observation.params[name].detach().to(**cast)
                silent = {} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)}
                self._mixtures[name] = _Mixture(layer, functional_call(layer, {"weight": weight, **silent}, (given,)), self._read[name])
                self._module.model.set_submodule(path, self._mixtures[name])
        self.rounding = 0.0
        if observation.kind == "delta":
            lost = [torch.finfo(observation.update[name].dtype).eps * self._scale[name] * observation.params[name].double().norm() for name in names]
            self.rounding = sum(float(one) ** 2 for one in lost)
        self._observed = torch.cat([(target[name] * self._scale[name]).flatten() for name in names])
        ends = torch.tensor([target[name].numel() for name in names]).cumsum(0).tolist()
        self._widths = [slice(first, last) for first, last in zip([0, *ends[:-1]], ends, strict=True)]  # each tensor's place
        self._others = [name for name in names if name not in self._read]
        self._parts = vmap(self._part, in_dims=(None, 0, 0), chunk_size=None if self._local else at_once)
        self._wholes = vmap(self._whole, chunk_size=at_once)

    def _loss(self, params: Tensors, zeros: Tensors, latents: Tensor, wanted: Tensor) -> Tensor:
        for name, mixture in self._mixtures.items():
            mixture.zero, mixture.change = zeros[name], params[name] if self._local else None
        logits = functional_call(self._module, {f"model.{name}": params[name] for name in self._others}, (latents.unflatten(-1, self._shape),))
        return F.cross_entropy(logits, wanted)

    def _part(self, params: Tensors, row: Tensor, wanted: Tensor) -> Tensors:
        """Of one image, from its row of M (r,)."""
        for mixture in self._mixtures.values():
            mixture.row = row
        zeros = {name: torch.zeros_like(mixture.outputs[:1]) for name, mixture in self._mixtures.items()}
        others, held = ({name: params[name] for name in names} for names in (self._others, self._read))
        own, deltas = grad(lambda *places: self._loss({**places[0], **held}, *places[1:]), argnums=(0, 1))(others, zeros, (row @ self._flat)[None], wanted[None])
        for name, coordinates in self._read.items():
            own[name] = deltas[name].view(deltas[name].shape[1], -1) @ torch.tensordot(row, coordinates, 1).T
        return own

    def _whole(self, mix: Tensor) -> Tensor:
        """Of the batch, or of local steps: (D,), from M (B, r)."""
        return self._flattened(along(self._gradient, self._params, self._local, mix, self._wanted)[0])

    def _gradient(self, params: Tensors, mix: Tensor, wanted: Tensor) -> Tensors:
        """Of a step's batch, from its rows of M."""
        if self._apart:
            return {name: tensor.mean(0) for name, tensor in self._parts(params, mix, wanted).items()}
        return grad(self._loss)(params, {}, mix @ self._flat, wanted)

    def _flattened(self, own: Tensors, start: int = 0) -> Tensor:
        return torch.cat([(own[name] * self._scale[name]).flatten(start) for name in self._names], -1)

    def _each(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """Of each image, (N, D), at the first weights."""
        return self._flattened(self._parts(self._params, rows, wanted), 1)

    def _scaled(self, updates: Tensor) -> Tensor:
        """α u with the best α, of each update (N, D), in their place."""
        along = (updates @ self._observed) / (torch.linalg.vector_norm(updates, dim=1).square() + 1e-300)
        return updates.mul_(along[:, None])

    def _updates(self, mixes: Tensor) -> Tensor:
        """(N, D) at mixes (N, B, r)."""
        if not self._apart or self._local:
            return self._wholes(mixes)
        return self._each(mixes.flatten(0, 1), self._wanted.repeat(len(mixes), 1)).unflatten(0, mixes.shape[:2]).mean(1)

    def residuals(self, mixes: Tensor) -> Tensor:
        """(N, D) at mixes (N, B, r)."""
        return self._scaled(self._updates(mixes)).sub_(self._observed)

    def _ends(self, mix: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Updates (B · r, D) a step ahead and behind along each entry of a mix (B, r)."""
        size, rank = mix.shape
        if self._apart and not self._local:
            axes = step * torch.eye(rank, dtype=mix.dtype, device=mix.device)
            rows = torch.cat([mix[:, None] + axes, mix[:, None] - axes, mix[:, None]], 1)  # (B, 2r + 1, r)
            parts = self._each(rows.flatten(0, 1), self._wanted.repeat_interleave(2 * rank + 1, 0)).unflatten(0, (size, -1))
            whole = parts[:, -1].mean(0)
            ends = (parts[:, :-1] - parts[:, -1:]).div_(size).add_(whole)
            return ends[:, :rank].flatten(0, 1), ends[:, rank:].flatten(0, 1)
        axes = step * torch.eye(size * rank, dtype=mix.dtype, device=mix.device).view(-1, size, rank)
        ahead, behind = self._wholes(torch.cat([mix + axes, mix - axes])).chunk(2)
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
    """A reader of a mix of known latents: the mix of its outputs for them (r, out, …), its bias, and a zero whose gradient is δ; with a change of its weight, (out, k)
    in the coordinates of their patches (r, k, P)."""

    row: Tensor
    zero: Tensor
    change: Tensor | None

    def __init__(self, layer: nn.Module, outputs: Tensor, coordinates: Tensor) -> None:
        super().__init__()
        self.bias, self.outputs, self.coordinates = layer.bias, outputs, coordinates

    def forward(self, latents: Tensor) -> Tensor:
        output = torch.tensordot(self.row, self.outputs, 1)[None] + self.zero
        if self.change is not None:
            output = output + (self.change @ torch.tensordot(self.row, self.coordinates, 1)).view_as(output)
        return output if self.bias is None else output + self.bias.view(-1, *[1] * (output.ndim - 2))
