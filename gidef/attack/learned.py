"""A7: learned inversion. A network, trained on public images and the gradients that a defended client would release of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import vmap

from gidef.attack.labels import LabelsHidden, classifier_names, recover_labels
from gidef.attack.matching import Simulate
from gidef.errors import InputError
from gidef.models.inverter import Inverter
from gidef.rng import generator, stream_seed
from gidef.similarity import ssim
from gidef.sketches import hashed, sketch
from gidef.types import Observation, Reconstruction, Tensors

# N samples (gradients), B images of one gradient, C channels, H, W
DrawNoise = Callable[..., "Tensor | None"]
"""draw_noise(count, generator=g) → the defence's noise of `count` images, (count, *latent), or None if there is none."""

SKETCH_DIM, WHOLE, ROWS = 8_192, 30_000, 1_024
FOLDS = 4
RIDGE = tuple(10 ** (half / 2) for half in range(-6, 3))
"""Strengths of the ridge that are tried, as multiples of the number of standardised inputs."""


def seen(update: Tensors, labels: Tensor, num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """All that an inverter is given of an update: its sketch, and what the classifier's rows of the batch's own labels say.

        sketch(update, dim)  |  for each label c of the batch, in order:  (∂L/∂W)_c / (∂L/∂b)_c

    For one image the ratio is what the last layer reads, h, whatever its class and its loss; for several it is a mixture of theirs. A
    network would have to learn the same for every class's rows. Without a bias, rows of unit length.

    Args:    update: as simulated or observed, the classifier's tensors last (see `classifier_names`).  labels: int64 (B,).
    Returns: (dim + B · f,), f = min(features, ROWS), hashed if there are more; (dim,) if no tensor looks like a classifier's. Vmappable.
    """
    kept = sketch(update, dim, seed)
    name, bias = _classifier(update, num_classes)
    if name is None:
        return kept
    labels = labels.sort().values
    rows = update[name][labels]
    scale = rows.norm(dim=1, keepdim=True) if bias is None else update[bias][labels][:, None]
    rows = torch.where(scale == 0, 0.0, rows / torch.where(scale == 0, 1.0, scale))
    share = min(rows.shape[1], ROWS)
    return torch.cat([kept, *(hashed(row, share, stream_seed(seed, "rows")) for row in rows.unbind())])


def seen_length(update: Tensors, num_classes: int, batch_size: int = 1, *, dim: int = SKETCH_DIM, whole: int = WHOLE) -> int:
    """Numbers that an inverter should be built for: an update of up to `whole` numbers is kept whole, else sketched to `dim`, but at
    least one per tensor; and the classifier's rows, see `seen`. update: or anything of its names and shapes, such as the parameters."""
    total = sum(tensor.numel() for tensor in update.values())
    return (total if total <= whole else max(dim, len(update))) + _rows_length(update, num_classes, batch_size)


def _rows_length(update: Tensors, num_classes: int, batch_size: int) -> int:
    name, _ = _classifier(update, num_classes)
    return 0 if name is None else batch_size * min(update[name].shape[1], ROWS)


def _classifier(update: Tensors, num_classes: int) -> tuple[str | None, str | None]:
    """Names of the last layer's weight and bias, None for what there is not."""
    try:
        return classifier_names(update, num_classes)
    except InputError:
        return None, None


def fit_inverter(
    inverter: Inverter, simulate: Simulate, params: Tensors, known: Tensors, images: Tensor, labels: Tensor, draw_noise: DrawNoise | None = None,
    *, steps: int, seed: int, samples: int = 4_000, noise_shape: tuple[int, ...] | None = None, flips: bool = True, lr: float = 1e-3,
    ssim_weight: float = 0.05, examples: int = 64, at_once: int = 32, mode: Literal["vmap", "loop"] = "vmap", sketch_seed: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Train an inverter in place on what a defended client would release of public images; yields the steps done.

        simulate  what is `seen` of `samples` batches of public images, each with fresh noise
        solve     ridge regression from it to principal components of the images around their class means
        train     the network on top, against MSE + ssim_weight · (1 − SSIM), Adam with the rate falling to zero along a cosine

    A tenth of the public images is held out; the weights that do best there are kept, the linear solution alone included, so training
    cannot make it worse. The strength of the ridge is chosen, and the network trained, on coefficients of images
    that the regression has not seen (a fold out of four), so that it learns how far to trust them.

    Args:    inverter: `inverter_for(seen_length(params, num_classes, B), …)`, of the batch size that is attacked, on the device to use.
             simulate, params, known: as for matching; the update that is released, with the attacker's knowledge of the defence.
             images: public, (P, C, H, W), uint8 or floating in [0, 1].  labels: int64 (P,).
             draw_noise: the defence's noise law, draw_noise(count, generator=g) → (count, *latent); None, or a result of None, is no noise.
             noise_shape: of one batch, as `simulate` takes it; (B, *latent) unless given.  samples: gradients that are simulated, and a
             tenth as many again of held-out images; the regression takes samples² numbers of memory and samples³ steps.
             flips: mirror half of the images.  ssim_weight: one of 0, 0.05 and ½ tried; under noise 0.05 came within
             0.1 dB of 0 and reached the SSIM of ½, which cost 0.4 dB.
             examples: images per training step.  at_once: gradients in one vectorised program.
             mode: "loop" for models that cannot be vectorised.  sketch_seed: of the hash; `invert_learned` needs the same.
    Yields:  0 while it simulates and solves, then the steps done.  Everything is drawn from `seed`, whatever at_once is.
    Raises:  InputError for fewer than 20 public images, labels that do not fit, or a simulated update that is not finite.
    Measured: the linear solution, untrained small net, mean PSNR of 256 private blood cells, where their class mean has 18.7 dB: 25.1 undefended and
             19.5 with noise of σ = 1 on the latent (3,000 gradients), in batches of 4 20.6 and 19.0 (2,000). Without the classifier's rows: 21.1 and
             19.2 in batches of 1. On these 400 steps of the network gained 0.0 to 0.1 dB at most, and at ssim_weight 0.05, under noise, 0.03 of SSIM.
             The same images served to choose the sketch, the rows and ssim_weight, so that fresh ones may score a little lower.
    Source:  Wu et al. 2023, "Learning to Invert" (arXiv:2210.10880): an MLP from hashed gradients to images, trained on defended ones.
    Deviates: hashing is per tensor; the ridge regression, which on blood cells (3,424 gradients, strength chosen by folds) gave 21.4 dB where the
             network alone gave 20.8 after 1,200 steps, is new, and so are labels as inputs.
    """
    if images.ndim != 4 or len(images) < 20 or labels.shape != images.shape[:1]:
        raise InputError(
            f"public images {tuple(images.shape)} and labels {tuple(labels.shape)}: expected at least 20 images (P, C, H, W) and one label for each."
        )
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < inverter.num_classes:
        raise InputError(f"public labels: expected class indices below {inverter.num_classes}.")
    device = inverter.mean.device
    public = _Public(images, labels.to("cpu", torch.int64), seed, inverter.batch_size, flips, device)
    picked = [public.pick(group, max(1, round(samples * share))) for group, share in enumerate((0.1, *[1 / FOLDS] * FOLDS))]
    folds = torch.cat([torch.full((len(rows),), group) for group, (rows, _) in enumerate(picked)])
    rows, flipped = (torch.cat(parts) for parts in zip(*picked, strict=True))

    sketches = torch.empty(len(rows), inverter.sketch_dim, device=device)
    params, known = ({name: t.detach().to(device, torch.float32) for name, t in tensors.items()} for tensors in (params, known))
    one = _seen_by(inverter, simulate, params, known, sketch_seed)
    for part in torch.arange(len(rows)).split(at_once):
        batch, classes = public.images(rows[part], flipped[part]), public.labels[rows[part]].to(device)
        noise = _noise(draw_noise, part.tolist(), inverter.batch_size, noise_shape, seed, device)
        with torch.no_grad():
            sketches[part.to(device)] = _over(one, (batch, classes, noise), mode).float()
        yield 0
    if not sketches.isfinite().all():
        raise InputError("the simulated update of a public image is not finite: an inverter cannot be trained at this checkpoint.")
    with torch.no_grad():
        release = one(*(value if value is None else value[0] for value in (batch, classes, noise)), released=True)
    inverter.fingerprint.fill_(_fingerprint(release))
    yield 0

    rows_length = _rows_length(release, inverter.num_classes, inverter.batch_size)
    coefficients = yield from _solve(inverter, sketches, rows_length, public, rows, flipped, folds)
    targets = public.labels[rows].to(device)
    heldout, training = (folds == 0).nonzero()[:, 0], (folds > 0).nonzero()[:, 0]

    def loss(part: Tensor) -> Tensor:
        at = part.to(device)
        truth = public.images(rows[part], flipped[part])
        return _set_loss(inverter(sketches[at], targets[at], coefficients[at]), truth, targets[at], ssim_weight)

    def heldout_loss() -> float:
        inverter.eval()
        with torch.no_grad():
            total = sum(float(loss(part).sum()) for part in heldout.split(64))
        inverter.train()
        return total / len(heldout)

    order = generator(seed, "inverter", "order")
    optimiser = torch.optim.Adam(inverter.parameters(), lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    best, kept, every = heldout_loss(), copy.deepcopy(inverter.state_dict()), max(20, steps // 20)
    for step in range(1, steps + 1):
        part = training[torch.randint(len(training), (max(1, examples // inverter.batch_size),), generator=order)]
        optimiser.zero_grad(set_to_none=True)
        loss(part).mean().backward()
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == steps:
            now = heldout_loss()
            if now < best:
                best, kept = now, copy.deepcopy(inverter.state_dict())
        if step % 20 == 0:
            yield step
    inverter.load_state_dict(kept)
    inverter.heldout_loss.fill_(best)
    inverter.eval()
    yield steps


@torch.no_grad()
def invert_learned(observations: Sequence[Observation], inverter: Inverter, *, sketch_seed: int = 0) -> list[Reconstruction]:
    """Reconstruct each observation's batch with a fitted inverter.

    Args:    observations: released as the inverter's training simulated.  sketch_seed: as in the fit.
    Returns: one Reconstruction each; labels granted or recovered; loss: the inverter's on held-out public images, the same for all.
             An update that is zero or not finite, or tells no labels where none are granted, is a failure, with mid-grey images.
    Raises:  InputError if a batch size, names or shapes are others than the inverter was trained for, or labels can neither be had
             nor recovered.
    """
    if int(inverter.fingerprint) == 0:
        raise InputError("the inverter was never fitted: call fit_inverter first.")
    inverter.eval()
    device, found = inverter.mean.device, []
    for observation in observations:
        size, classes = observation.num_examples, inverter.num_classes
        if size != inverter.batch_size:
            raise InputError(f"an observation of {size} images for an inverter of {inverter.batch_size} per gradient: train one for this batch size.")
        if _fingerprint(observation.update) != int(inverter.fingerprint):
            raise InputError("the observed update has other names or shapes than the inverter was trained on: simulate the update that is released.")
        finite = all(bool(tensor.isfinite().all()) for tensor in observation.update.values())
        if not finite or not any(bool(tensor.any()) for tensor in observation.update.values()):
            images, labels = torch.full((size, *inverter.image_shape), 0.5), torch.zeros(size, dtype=torch.int64)
            labels = observation.labels if observation.labels is not None else labels
            reason = "the observed update is zero: it holds nothing to invert" if finite else "the observed update is not finite"
            found.append(Reconstruction(images, labels.cpu(), math.inf, torch.tensor([math.inf]), status="failed", error=reason))
            continue
        try:
            labels = (recover_labels(observation, classes) if observation.labels is None else observation.labels).long().cpu()
        except (LabelsHidden, torch.linalg.LinAlgError) as error:
            images, labels = torch.full((size, *inverter.image_shape), 0.5), torch.zeros(size, dtype=torch.int64)
            found.append(Reconstruction(images, labels, math.inf, torch.tensor([math.inf]), status="failed", error=str(error)))
            continue
        if labels.shape != (size,) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise InputError(f"granted labels {labels.tolist()} do not fit {size} images of {classes} classes: give one class index per image.")
        given = _seen(observation.update, labels.to(next(iter(observation.update.values())).device), inverter, sketch_seed).to(device, torch.float32)
        images = inverter(given[None], labels.to(device)[None])[0].cpu()
        loss = float(inverter.heldout_loss)
        found.append(Reconstruction(images, labels, loss, torch.tensor([loss])))
    return found


def image_loss(reconstruction: Tensor, images: Tensor, ssim_weight: float = 0.5) -> Tensor:
    """MSE + ssim_weight · (1 − SSIM), one value per image (N,); both (N, C, H, W) in [0, 1]."""
    return (reconstruction - images).square().mean((-3, -2, -1)) + ssim_weight * (1 - ssim(reconstruction, images))


def public_images(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Some rows of public images as float32 in [0, 1], on a device; uint8 ones are divided by 255."""
    chosen = images[rows.to(images.device)]
    return chosen.to(device, torch.float32) / (255 if chosen.dtype == torch.uint8 else 1)


class _Public:
    """Public images in a held-out group, 0, and the folds, 1 … FOLDS; a gradient's images all come from one of them."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, batch_size: int, flips: bool, device: torch.device) -> None:
        self._images, self.labels, self._flips, self._batch, self._device, self.seed = images, labels, flips, batch_size, device, seed
        order = torch.randperm(len(images), generator=generator(seed, "inverter", "groups"))
        held = max(1, len(images) // 10)
        self._groups = [order[:held], *order[held:].tensor_split(FOLDS)]

    @property
    def seen(self) -> Tensor:
        """Rows of all images but the held-out ones."""
        return torch.cat(self._groups[1:])

    def pick(self, group: int, count: int) -> tuple[Tensor, Tensor]:
        """Batches from a group: rows (count, B), every image equally often, and which of them are mirrored."""
        draw, members = generator(self.seed, "inverter", "rows", group), self._groups[group]
        rounds = -(-count // len(members))
        columns = [torch.cat([members[torch.randperm(len(members), generator=draw)] for _ in range(rounds)])[:count] for _ in range(self._batch)]
        flipped = torch.rand(count, self._batch, generator=draw) < (0.5 if self._flips else 0.0)
        return torch.stack(columns, 1), flipped

    def images(self, rows: Tensor, flipped: Tensor) -> Tensor:
        """float32 (N, B, C, H, W) of rows (N, B)."""
        chosen = public_images(self._images, rows.flatten(), self._device)
        mirrored = flipped.flatten().to(self._device)[:, None, None, None]
        return torch.where(mirrored, chosen.flip(-1), chosen).unflatten(0, rows.shape)


def _seen_by(inverter: Inverter, simulate: Simulate, params: Tensors, known: Tensors, seed: int) -> Callable[..., Tensor | Tensors]:
    """images (B, C, H, W), labels (B,), noise → what the inverter is given of the release, or the release itself."""

    def one(images: Tensor, labels: Tensor, noise: Tensor | None, *, released: bool = False) -> Tensor | Tensors:
        update = simulate(params, known, images, F.one_hot(labels, inverter.num_classes).to(images), noise)
        return update if released else _seen(update, labels, inverter, seed)

    return one


def _seen(update: Tensors, labels: Tensor, inverter: Inverter, seed: int) -> Tensor:
    dim = inverter.sketch_dim - _rows_length(update, inverter.num_classes, inverter.batch_size)
    return seen(update, labels, inverter.num_classes, dim, seed)


def _over(one: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], mode: str) -> Tensor:
    """The function over the leading dim of its inputs, as one program or a loop."""
    if mode == "vmap":
        return vmap(one, in_dims=tuple(None if value is None else 0 for value in inputs))(*inputs)
    if mode != "loop":
        raise InputError(f'mode={mode!r} is unknown: choose "vmap" or "loop".')
    return torch.stack([one(*(value if value is None else value[row] for value in inputs)) for row in range(len(inputs[0]))])


def _noise(draw: DrawNoise | None, numbers: list[int], batch: int, shape: tuple[int, ...] | None, seed: int, device: torch.device) -> Tensor | None:
    """Fresh noise (N, *shape) of the numbered gradients, each from a stream of its own, so that chunks do not matter."""
    first = draw(1, generator=generator(seed, "inverter", "noise")) if draw is not None else None
    if first is None:
        return None
    shape = (batch, *first.shape[1:]) if shape is None else shape
    count = math.prod(shape) // first.numel()
    drawn = [draw(count, generator=generator(seed, "inverter", "noise", number)).reshape(shape) for number in numbers]
    return torch.stack(drawn).to(device)


@torch.no_grad()
def _solve(
    inverter: Inverter, sketches: Tensor, rows_length: int, public: _Public, rows: Tensor, flipped: Tensor, folds: Tensor
) -> Iterator[int]:
    """Set the inverter's linear part; returns its coefficients (N, B · rank) of images that it was not fitted to."""
    device, training = sketches.device, (folds > 0).nonzero()[:, 0]
    fitted = sketches[training.to(device)]
    std, mean = torch.std_mean(fitted, dim=0, correction=0)
    std = torch.where(std <= 1e-6 * fitted.square().mean().sqrt(), torch.inf, std)  # numbers that do not vary are switched off
    std[len(std) - rows_length :] *= min(1.0, math.sqrt(rows_length / max(len(std) - rows_length, 1)))  # as much weight as the sketch
    class_means, components = _components(inverter, public)
    sorted_rows, places = _sorted(public.labels, rows)
    targets = []
    for part in torch.arange(len(rows)).split(256):
        around = public.images(sorted_rows[part], flipped[part].gather(1, places[part])) - class_means[public.labels[sorted_rows[part]].to(device)]
        targets.append((around.flatten(2) @ components.T).flatten(1))
    targets, scaled = torch.cat(targets), (sketches - mean) / std
    yield 0
    gram, wanted = (scaled @ scaled.T).double(), targets.double()
    folds = folds.to(device)

    def predicted(fit: Tensor, at: Tensor, strength: float) -> Tensor | None:
        """Coefficients at some gradients from a regression fitted to others; None if rounding makes it unsolvable."""
        dual = _dual(gram[fit][:, fit], wanted[fit], strength * inverter.sketch_dim)
        return None if dual is None else gram[at][:, fit] @ dual

    inner, outer = ((folds > 1).nonzero()[:, 0], (folds == 1).nonzero()[:, 0])
    errors = {}
    for strength in RIDGE:
        guess = predicted(inner, outer, strength)
        if guess is not None:
            errors[strength] = float((guess - wanted[outer]).square().mean())
        yield 0
    strength = min(errors, key=errors.__getitem__, default=RIDGE[-1])
    coefficients = torch.zeros_like(wanted)
    for fold in range(FOLDS + 1):  # the held-out group from all folds, each fold from the others
        fit, at = ((folds > 0) & (folds != fold)).nonzero()[:, 0], (folds == fold).nonzero()[:, 0]
        guess = predicted(fit, at, strength)
        if guess is not None:
            coefficients[at] = guess
        yield 0
    at = training.to(device)
    dual = _dual(gram[at][:, at], wanted[at], strength * inverter.sketch_dim)
    weight = torch.zeros_like(inverter.weight) if dual is None else (scaled[at].T.double() @ dual).to(inverter.weight)
    spread = coefficients[at].std(0).clamp(min=1e-6).float()
    inverter.set_linear(mean=mean, std=std, weight=weight, class_means=class_means, components=components, spread=spread)
    return coefficients.float()


def _dual(gram: Tensor, targets: Tensor, strength: float) -> Tensor | None:
    """(G + λ)⁻¹ targets, or None if rounding leaves the matrix indefinite."""
    factor, failed = torch.linalg.cholesky_ex(gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return None if int(failed) else torch.cholesky_solve(targets, factor)


def _components(inverter: Inverter, public: _Public) -> tuple[Tensor, Tensor]:
    """Class means (K, C, H, W) and principal components (rank, C·H·W) around them, of the images that are not held out."""
    rows, device = public.seen, inverter.mean.device
    images, labels = public.images(rows, torch.zeros_like(rows, dtype=torch.bool)), public.labels[rows].to(device)
    means = images.mean(0).expand(inverter.num_classes, *inverter.image_shape).clone()  # of a class without images: the mean image
    for label in labels.unique().tolist():
        means[label] = images[labels == label].mean(0)
    around = (images - means[labels]).flatten(1)
    basis = torch.randn(around.shape[1], inverter.rank, generator=generator(public.seed, "inverter", "components")).to(device)
    for _ in range(4):  # orthogonal iteration; seeded, unlike torch.pca_lowrank
        basis = torch.linalg.qr(around.T @ (around @ basis)).Q
    turned = torch.linalg.svd(basis.T @ (around.T @ (around @ basis))).Vh  # of all directions, with fewer images than those too
    return means, turned @ basis.T


def _sorted(labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, B) in the order of their labels, and the places they come from."""
    places = labels[rows].argsort(dim=1, stable=True)
    return rows.gather(1, places), places


def _set_loss(reconstruction: Tensor, images: Tensor, labels: Tensor, ssim_weight: float) -> Tensor:
    """`image_loss` (N,) of batches (N, B, C, H, W), images of equal labels paired as fits best."""
    if images.shape[1] > 1:
        with torch.no_grad():
            apart = (reconstruction.flatten(2)[:, :, None] - images.flatten(2)[:, None]).square().mean(-1)
            apart = apart + 1e3 * (labels[:, :, None] != labels[:, None, :])
            pairs = [linear_sum_assignment(cost)[1] for cost in apart.cpu().numpy()]
            chosen = torch.tensor(np.array(pairs), device=images.device)
        images = images[torch.arange(len(images), device=images.device)[:, None], chosen]
    return image_loss(reconstruction.flatten(0, 1), images.flatten(0, 1), ssim_weight).unflatten(0, images.shape[:2]).mean(1)


def _fingerprint(update: Tensors) -> int:
    """Of names and shapes; never 0."""
    return 1 + stream_seed(0, *(f"{name} {tuple(update[name].shape)}" for name in sorted(update))) // 2
