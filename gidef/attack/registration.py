"""Registration of images, and the restarts of one observation that pull one another to a registered consensus.

Nothing here asks the device for a value: which restart is the reference, how far images are shifted and whether a registration is
believed are all tensors. Nothing is differentiated either.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gidef.attack.matching import Coupling
from gidef.errors import InputError

# K attacks, G groups of R restarts, B images, N images in a flat batch, C channels, H, W
SNAP = 1e-2  # pixels; a smaller displacement is none, so that equal images stay bit for bit what they are
DAMPING = 1e-3  # of Gauss-Newton, relative to the Hessian
GAIN = 1e-4  # by which a registration must raise the correlation to be believed
PAIRS = 2**24  # entries of images that are resampled at once
LARGEST_STRETCH = 0.2  # of the affine part's entries, off the identity

# An affine transform is (2, 3), [A | t]: the pixel at offset u = (x, y) from the centre of the fixed image shows what the moving image has
# at offset A u + t. Offsets and t are in pixels.


def shifts(moving: Tensor, fixed: Tensor, *, max_shift: float) -> Tensor:
    """Translations by phase correlation, to a fraction of a pixel.

        t = argmax over |t|∞ ≤ max_shift of F⁻¹( Σ_c F(fixed) F(moving)* / |·| ),   peak refined by a parabola along each side

    Args:    moving, fixed: (N, C, H, W), floating.  max_shift: ≥ 0, in pixels; a peak outside is not looked for.
    Returns: (N, 2), (x, y): fixed(u) ≈ moving(u + t). 0 where an image is constant.
    Source:  Kuglin and Hines 1975. Images lose their channels' means and fade to 0 at the border (Hann window), and the spectrum is
             whitened by its square root only, as sharp as is useful for small images full of noise.
    """
    _check_pair(moving, fixed, max_shift)
    window = _window(moving)
    spectrum = (torch.fft.rfft2(_centred(fixed) * window).conj() * torch.fft.rfft2(_centred(moving) * window)).sum(-3)
    power = spectrum.abs()
    floor = 1e-6 * power.amax((-2, -1), keepdim=True) + torch.finfo(power.dtype).tiny
    return _peak(spectrum * (power + floor).rsqrt(), moving.shape[-2:], max_shift)[0]


def register(moving: Tensor, fixed: Tensor, *, max_shift: float, affine: bool = False, iterations: int = 4) -> Tensor:
    """Transforms that bring each moving image onto its fixed one.

        phase correlation, then Gauss–Newton steps on Σ (moving(A u + t) − fixed(u))² over the overlap, with the mean of both images'
        slopes; believed only if the images then correlate better than unregistered, else the identity. All on images smoothed by
        (1, 2, 1)/4 along both sides

    Args:    moving, fixed: (N, C, H, W), floating.  max_shift: ≥ 0; translations stay within it.  affine: also rotation, scale and
             shear, entries of A − 1 within ±0.2; else A = 1.  iterations: Gauss–Newton steps; twice as many for A.
    Returns: (N, 2, 3); exactly the identity for equal images, for constant ones, and where an image is not finite.
    Raises:  InputError if shapes differ or max_shift is negative.
    Source:  Lucas and Kanade 1981; Benhimane and Malis 2004 for the mean of both slopes.
    Measured: Blood cropped to 20 px, shifts up to 3 px, share registered to within 0.25 / 1 px, with noise of standard deviation 0.05 on
             both: 1.00 / 1.00, 0.1: .99 / 1.00, 0.2: .77 / 1.00, 0.4: .22 / .92. Without smoothing .05 / .56 at 0.4.
    """
    _check_pair(moving, fixed, max_shift)
    finite = (moving.isfinite() & fixed.isfinite()).flatten(1).all(1)
    clean = finite[:, None, None, None]
    moving, fixed = torch.where(clean, moving, 0.0), torch.where(clean, fixed, 0.0)
    best, reach = _identity(len(moving), moving), math.ceil(max_shift)
    moving, fixed = _softened(moving), _softened(fixed)
    score = _overlap_correlation(moving, fixed, best, 0)
    begin = torch.cat([best[:, :, :2], shifts(moving, fixed, max_shift=max_shift)[:, :, None]], 2)
    for general in (False, True) if affine else (False,):
        found = _refine(moving, fixed, begin, max_shift, general, 2 * iterations if general else iterations)
        reached = _overlap_correlation(moving, fixed, found, None if general else reach)
        moved = _displacement(found, moving.shape[-2:]) > SNAP
        believed = (finite & moved & (reached > score + GAIN))[:, None, None]
        best, score, begin = torch.where(believed, found, best), torch.where(believed[:, 0, 0], reached, score), found
    return best


def warp(images: Tensor, transforms: Tensor) -> tuple[Tensor, Tensor]:
    """What fixed images see of moving ones: out(u) = images(A u + t), bicubic with Catmull–Rom weights.

    Args:    images: (N, C, H, W).  transforms: (N, 2, 3).
    Returns: images (N, C, H, W), untouched where nothing moves by more than 0.01 pixel; and (N, 1, H, W), 1 where the image was seen and
             0 where its nearest border was taken for it.
    Source:  Keys 1981 with a = −1/2. The a = −3/4 of `torch.nn.functional.grid_sample` does not even keep a ramp: it moves edges by up to 0.04
             pixel, which a registration would then report.
    """
    count, channels, height, width = images.shape
    x, y = _places(transforms, height, width)
    seen = ((x > -SNAP) & (x < width - 1 + SNAP) & (y > -SNAP) & (y < height - 1 + SNAP))[:, None]
    left, above = x.floor(), y.floor()
    flat, moved = images.flatten(2), torch.zeros_like(images)
    for row in range(-1, 3):
        rows = (above + row).clamp(0, height - 1)
        for column in range(-1, 3):
            index = (rows * width + (left + column).clamp(0, width - 1)).long().view(count, 1, -1).expand(-1, channels, -1)
            taps = _keys(y - above - row) * _keys(x - left - column)
            moved = moved + taps[:, None] * flat.gather(2, index).view_as(images)
    return _unless_still(images, moved, seen, transforms)


def group_consistency(
    weight: float,
    *,
    begin: float = 0.3,
    ramp: float = 0.1,
    max_shift: float = 4.0,
    affine: bool = False,
    register_images: bool = True,
    least_correlation: float = 0.2,
    permute: Literal["never", "labels", "all"] = "never",
) -> Coupling:
    """The restarts of one observation pull one another towards their registered consensus.

        loss_r = w(t) · mean (x_r − E_r)²,   E_r(u) = Σ_q m_q(u) x_q(T_q T_r⁻¹ u) / Σ_q m_q(u),   gradient with E_r held constant

    The reference is the restart that correlates best with the others at any allowed shift; T_q registers restart q to it. The consensus
    E_r is the mean in restart r's own frame, over what each restart shows of it (m_q = 1), so that no restart has to move as a whole, and
    x_r itself is not resampled. A restart that is not finite, or whose registered images correlate less than `least_correlation` with the
    reference's, is left out of the others' consensus (image by image), but still pulled.

    Args:    weight: w ≥ 0.  begin, ramp: w(t) is 0 before this share of the iterations and then rises linearly over `ramp`: noise has
             nothing to agree on, and its mean is grey.  max_shift, affine: as `register`; clipped to a quarter of the image's side.
             register_images: False gives the plain mean, for comparison.
             permute: what may change places within a batch between restarts. "never": images keep their place, which the labels fix if all
             differ. "labels": images of one label, by greedy nearest pairs at their best shifts, given the call's `labels`. "all": any.
    Returns: coupling(images (K, B, C, H, W), groups, progress, labels=None) → loss (K,), gradient (K, B, C, H, W). labels: int64 (K, B);
             with "labels" and none given nothing changes places. A group of one, equal restarts, and rows in no group get exactly 0.
    Raises:  InputError for settings out of range; from the coupling, for groups that overlap or name attacks that do not exist.
    Source:  Yin et al. 2021, arXiv:2104.07586, section 3.3, equation 11.
    Deviates: RANSAC-flow, a trained dense flow, becomes phase correlation and Lucas–Kanade; each restart has the consensus in its own frame
             instead of one for all; the paper registers to the pixel-wise mean, which shifted restarts blur; a mean, not a norm.
    """
    for name, value in (("weight", weight), ("begin", begin), ("ramp", ramp), ("max_shift", max_shift)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"group_consistency: {name}={value}: expected a number of at least 0.")
    if permute not in ("never", "labels", "all"):
        raise InputError(f'group_consistency: permute={permute!r} is unknown: choose one of "never", "labels", "all".')
    if not -1 <= least_correlation < 1:
        raise InputError(f"group_consistency: least_correlation={least_correlation}: expected a number in [-1, 1).")
    kept: dict[tuple, list[Tensor]] = {}  # indices on the device: copying them anew in every iteration would make the host wait

    def rows_of(groups: list[list[int]], count: int, device: torch.device) -> list[Tensor]:
        """Groups of equal size as one index (G, R) each."""
        key = (tuple(map(tuple, groups)), count, str(device))
        if key not in kept:
            members = [row for group in groups for row in group]
            if len(set(members)) != len(members) or not all(0 <= row < count for row in members):
                raise InputError(f"group_consistency: groups {groups} of {count} attacks: expected each attack in one group at most.")
            sizes = sorted({len(group) for group in groups if len(group) > 1})
            kept.clear()  # successive halving moves on and does not come back
            kept[key] = [torch.tensor([group for group in groups if len(group) == size], device=device) for size in sizes]
        return kept[key]

    @torch.no_grad()
    def coupling(images: Tensor, groups: list[list[int]], progress: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss, gradient = images.new_zeros(len(images)), torch.zeros_like(images)
        every = rows_of(groups, len(images), images.device)  # at the first iteration too, so that none in the middle waits for the copy
        now = weight * min(1.0, max(0.0, progress - begin) / ramp) if ramp > 0 else weight * (progress >= begin)
        if now == 0:
            return loss, gradient
        allowed = min(max_shift, min(images.shape[-2:]) / 4)
        for rows in every:
            given = labels[rows] if permute == "labels" and labels is not None else None
            apart = _apart(images[rows], allowed, affine, register_images, least_correlation, permute, given)
            loss[rows] = now * apart.square().mean((-4, -3, -2, -1))
            gradient[rows] = now * 2 * apart / apart[0, 0].numel()
        return loss, gradient

    return coupling


def consensus(images: Tensor, *, max_shift: float, affine: bool = False, least_correlation: float = -1.0) -> Tensor:
    """The registered consensus of restarts, each in its own frame: (R, B, C, H, W) → (R, B, C, H, W). See `group_consistency`."""
    apart = _apart(images[None], min(max_shift, min(images.shape[-2:]) / 4), affine, True, least_correlation, "never", None)
    return images - apart[0]


def _apart(images: Tensor, max_shift: float, affine: bool, registered: bool, least_correlation: float, permute: str, labels: Tensor | None) -> Tensor:
    """x − E of groups of equal size, (G, R, B, C, H, W); 0 where a restart is not finite."""
    groups, restarts, size = images.shape[:3]
    frame = images.shape[3:]
    finite = images.isfinite().flatten(2).all(2)  # (G, R)
    wide = finite[..., None, None, None, None]
    images = torch.where(wide, images, 0.0)
    reference = _medoid(images, finite, max_shift if registered else 0.0)
    anchor = images[torch.arange(groups, device=images.device), reference]  # (G, B, C, H, W)
    order = None
    if size > 1 and (permute == "all" or labels is not None):
        order = _matched(images, anchor, labels, reference, max_shift if registered else 0.0)
        images = images.gather(2, _along(order, images))
    fixed = anchor[:, None].expand_as(images).reshape(-1, *frame)
    flat = images.reshape(-1, *frame)
    reach = math.ceil(max_shift)
    transforms = register(flat, fixed, max_shift=max_shift, affine=affine) if registered else _identity(len(flat), flat)
    alike = _overlap_correlation(_softened(flat), _softened(fixed), transforms, None if affine else reach)
    trusted = (alike >= least_correlation).view(groups, restarts, size) & finite[..., None]
    transforms = transforms.view(groups, restarts, size, 2, 3)
    back = _inverse(transforms)
    total, seen_total = torch.zeros_like(images), torch.zeros_like(images[..., :1, :, :])
    itself = torch.eye(restarts, dtype=images.dtype, device=images.device)  # counts where it is not trusted too: its own mean begins at itself
    at_once = max(1, PAIRS // images.numel())
    for some in (slice(first, first + at_once) for first in range(0, restarts, at_once)):
        # (G, Q, R, B, …): one resampling from frame to frame; through the reference's frame every image would be blurred twice
        across = _composed(transforms[:, some, None], back[:, None])
        theirs = images[:, some, None].expand(-1, -1, restarts, -1, -1, -1, -1)
        shown, seen = _shown(theirs.reshape(-1, *frame), across.reshape(-1, 2, 3), None if affine else 2 * reach)
        counted = torch.maximum(trusted[:, some, None].to(images.dtype), itself[some, :, None])[..., None, None, None]
        seen = seen.view(*theirs.shape[:4], 1, *frame[1:]) * counted
        total = total + (seen * (images[:, None] - shown.view_as(theirs))).sum(1)  # differences, so that equal images give exactly 0
        seen_total = seen_total + seen.sum(1)
    apart = torch.where(wide, total / seen_total, 0.0)
    if order is not None:
        apart = torch.zeros_like(apart).scatter(2, _along(order, apart), apart)
    return apart


def _medoid(images: Tensor, finite: Tensor, max_shift: float) -> Tensor:
    """(G,): the restart whose images correlate best with the others', each at its best shift."""
    restarts = images.shape[1]
    spectra = torch.fft.rfft2(_standard(images))
    likeness = []
    for one in range(restarts):
        product = (spectra[:, one, None].conj() * spectra).sum(-3)
        best = _peak(product, images.shape[-2:], max_shift)[1].mean(2)  # (G, R)
        others = finite.clone()
        others[:, one] = False
        likeness.append((best * others).sum(1) / others.sum(1).clamp_min(1))
    likeness = torch.where(finite, torch.stack(likeness, 1), -torch.inf)
    return likeness.argmax(1)


def _matched(images: Tensor, anchor: Tensor, labels: Tensor | None, reference: Tensor, max_shift: float) -> Tensor:
    """(G, R, B): the place, in each restart, of the image that goes with the reference's b-th; greedy, the likest pair first."""
    groups, restarts, size = images.shape[:3]
    mine, theirs = torch.fft.rfft2(_standard(anchor)), torch.fft.rfft2(_standard(images))
    likeness = torch.stack(
        [_peak((mine[:, None, place, None].conj() * theirs).sum(-3), images.shape[-2:], max_shift)[1] for place in range(size)], 2
    )  # (G, R, B of the reference, B of the restart)
    likeness = likeness + 1e-4 * torch.eye(size, dtype=images.dtype, device=images.device)  # in place, where nothing tells images apart
    if labels is not None:
        wanted = labels[torch.arange(groups, device=labels.device), reference][:, None, :, None]
        likeness = torch.where(wanted == labels[:, :, None, :], likeness, likeness - 10.0)
    order = torch.zeros(groups, restarts, size, dtype=torch.int64, device=images.device)
    for _ in range(size):
        best = likeness.flatten(2).argmax(2)
        row, column = best // size, best % size
        order.scatter_(2, row[..., None], column[..., None])
        taken = torch.zeros_like(likeness).scatter(2, row[..., None, None].expand(-1, -1, 1, size), 1.0)
        taken = taken.scatter(3, column[..., None, None].expand(-1, -1, size, 1), 1.0)
        likeness = torch.where(taken > 0, -torch.inf, likeness)
    return order


def _refine(moving: Tensor, fixed: Tensor, transforms: Tensor, max_shift: float, affine: bool, iterations: int) -> Tensor:
    """Gauss–Newton steps of translations, or of all six numbers."""
    height, width = moving.shape[-2:]
    reach = max(height, width) / 2  # brings the slopes by A to those by t
    x, y = _offsets(height, width, moving)
    own_x, own_y = _slopes(fixed)
    for _ in range(iterations):
        shown, seen = _shown(moving, transforms, None if affine else math.ceil(max_shift))
        shown_x, shown_y = _slopes(shown)
        slope_x, slope_y = 0.5 * (own_x + shown_x), 0.5 * (own_y + shown_y)
        columns = [slope_x, slope_y]
        if affine:
            columns += [slope * offset / reach for slope in (slope_x, slope_y) for offset in (x, y)]
        jacobian = (torch.stack(columns, 1) * seen[:, None]).flatten(2)  # (N, 2 or 6, C·H·W)
        residual = ((fixed - shown) * seen).flatten(1)
        normal = jacobian @ jacobian.mT
        scale = normal.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        damped = normal + (DAMPING * scale + torch.finfo(moving.dtype).tiny) * torch.eye(normal.shape[1], dtype=moving.dtype, device=moving.device)
        step = torch.linalg.solve_ex(damped, jacobian @ residual[..., None])[0][..., 0]
        step = torch.where(step.isfinite().all(1, keepdim=True), step, 0.0)
        change = torch.zeros_like(transforms)
        change[:, :, 2] = step[:, :2].clamp(-1, 1)
        if affine:
            change[:, :, :2] = (step[:, 2:] / reach).view(-1, 2, 2).clamp(-0.05, 0.05)
        transforms = transforms + change
        shift = transforms[:, :, 2:].clamp(-max_shift, max_shift)
        stretch = (transforms[:, :, :2] - _identity(len(moving), moving)[:, :, :2]).clamp(-LARGEST_STRETCH, LARGEST_STRETCH)
        transforms = torch.cat([_identity(len(moving), moving)[:, :, :2] + stretch, shift], 2)
    return transforms


def _overlap_correlation(moving: Tensor, fixed: Tensor, transforms: Tensor, reach: int | None) -> Tensor:
    """(N,): correlation of warped and fixed images over all channels of what both show; 0 if either is constant there."""
    shown, seen = _shown(moving, transforms, reach)
    area = seen.sum((-2, -1), keepdim=True).clamp_min(1)

    def centred(images: Tensor) -> Tensor:
        return ((images - (images * seen).sum((-2, -1), keepdim=True) / area) * seen).flatten(1)

    def power(images: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:  # what rounding leaves of a constant is no image: it correlates with anything
        found, rounding = images.square().sum(1), 64 * torch.finfo(of.dtype).eps * of.flatten(1).abs().amax(1)
        return found, found <= images.shape[1] * rounding.square()

    left, right = centred(shown), centred(fixed)
    (strong, flat), (bright, plain) = power(left, shown), power(right, fixed)
    empty = flat | plain
    correlation = (left * right).sum(1) / torch.where(empty, 1.0, strong * bright).sqrt()
    enough = seen.mean((-3, -2, -1)) >= 0.25  # of the image; a sliver may correlate by chance
    return torch.where(empty | ~enough, 0.0, correlation)


def _peak(spectrum: Tensor, frame: torch.Size, max_shift: float) -> tuple[Tensor, Tensor]:
    """The largest value of an inverse transform within max_shift: its place (…, 2), (x, y), refined below the pixel, and the value (…)."""
    height, width = frame
    surface = torch.fft.irfft2(spectrum, s=(height, width))
    reach = min(int(max_shift), (min(height, width) - 1) // 2)
    surface = surface.roll((reach, reach), (-2, -1))[..., : 2 * reach + 1, : 2 * reach + 1]
    side = 2 * reach + 1
    value, place = surface.flatten(-2).max(-1)
    # ties, and constant images whose surface is all 0, mean no shift
    centre = surface[..., reach, reach]
    place = torch.where(centre >= value, reach * side + reach, place)
    row, column = place // side, place % side
    flat = surface.flatten(-2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return flat.gather(-1, (row.clamp(0, side - 1) * side + column.clamp(0, side - 1))[..., None])[..., 0]

    def vertex(before: Tensor, after: Tensor) -> Tensor:
        bend = before + after - 2 * value
        return torch.where(bend < 0, 0.5 * (before - after) / torch.where(bend < 0, bend, -1.0), 0.0).clamp(-0.5, 0.5)

    inside_x, inside_y = (column > 0) & (column < side - 1), (row > 0) & (row < side - 1)
    x = column - reach + torch.where(inside_x, vertex(at(row, column - 1), at(row, column + 1)), 0.0)
    y = row - reach + torch.where(inside_y, vertex(at(row - 1, column), at(row + 1, column)), 0.0)
    return torch.stack([x, y], -1).to(surface.dtype), value


def _standard(images: Tensor) -> Tensor:
    """Windowed images of unit power over all channels, so that a peak of their correlation is a coefficient; 0 for constant ones."""
    flat = _centred(images) * _window(images)
    power = flat.square().sum((-3, -2, -1), keepdim=True)
    empty = power <= flat[0].numel() * (8 * torch.finfo(flat.dtype).eps) ** 2
    return torch.where(empty, 0.0, flat * torch.where(empty, 1.0, power).rsqrt())


def _centred(images: Tensor) -> Tensor:
    return images - images.mean((-2, -1), keepdim=True)


def _softened(images: Tensor) -> Tensor:
    """Smoothed by (1, 2, 1)/4 along both sides, borders repeated: noise has most of its power, and images little, in what that removes."""
    rows = F.pad(images, (0, 0, 1, 1), mode="replicate")
    images = 0.25 * (rows[..., :-2, :] + rows[..., 2:, :]) + 0.5 * images
    columns = F.pad(images, (1, 1, 0, 0), mode="replicate")
    return 0.25 * (columns[..., :-2] + columns[..., 2:]) + 0.5 * images


def _window(images: Tensor) -> Tensor:
    """(H, W): Hann along both sides, nowhere 0."""
    rows, columns = (torch.hann_window(side + 2, periodic=False, dtype=images.dtype, device=images.device)[1:-1] for side in images.shape[-2:])
    return rows[:, None] * columns


def _shown(images: Tensor, transforms: Tensor, reach: int | None) -> tuple[Tensor, Tensor]:
    """`warp`; with a reach given, transforms are known to be translations of at most that."""
    return warp(images, transforms) if reach is None else _shifted(images, transforms, reach)


def _shifted(images: Tensor, transforms: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """`warp` for translations of at most `reach` pixels, as two products with band matrices: several times faster."""
    height, width = images.shape[-2:]
    x, y = transforms[:, 0, 2], transforms[:, 1, 2]
    (across, seen_x), (down, seen_y) = _band(x, width, reach), _band(y, height, reach)
    moved = down[:, None] @ images @ across[:, None].mT
    return _unless_still(images, moved, (seen_y[:, :, None] & seen_x[:, None, :])[:, None], transforms)


def _band(shift: Tensor, side: int, reach: int) -> tuple[Tensor, Tensor]:
    """(N, side, side) weights of a shift along one side, the border repeated beyond it, and (N, side), which places lie inside."""
    if side == 1:
        return torch.ones(len(shift), 1, 1, dtype=shift.dtype, device=shift.device), shift[:, None].abs() < SNAP
    margin = reach + 2
    places = torch.arange(side, dtype=shift.dtype, device=shift.device) + shift[:, None]
    taps = _keys(places[:, :, None] - torch.arange(-margin, side + margin, dtype=shift.dtype, device=shift.device))
    first, last = taps[:, :, : margin + 1].sum(2, keepdim=True), taps[:, :, -margin - 1 :].sum(2, keepdim=True)
    return torch.cat([first, taps[:, :, margin + 1 : -margin - 1], last], 2), (places > -SNAP) & (places < side - 1 + SNAP)


def _keys(distance: Tensor) -> Tensor:
    """Keys' cubic kernel, a = −1/2."""
    d = distance.abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def _unless_still(images: Tensor, moved: Tensor, seen: Tensor, transforms: Tensor) -> tuple[Tensor, Tensor]:
    still = (_displacement(transforms, images.shape[-2:]) <= SNAP)[:, None, None, None]
    return torch.where(still, images, moved), (seen | still).to(images.dtype)


def _slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, one-sided at borders."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]), 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])


def _offsets(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets from the image's centre: x (1, W), y (H, 1)."""
    x = torch.arange(width, dtype=like.dtype, device=like.device) - (width - 1) / 2
    y = torch.arange(height, dtype=like.dtype, device=like.device) - (height - 1) / 2
    return x[None, :], y[:, None]


def _places(transforms: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel coordinates in the moving images, (N, H, W) each, of every pixel of the fixed ones."""
    x, y = _offsets(height, width, transforms)
    row = transforms[:, :, :, None, None]
    across = row[:, 0, 0] * x + row[:, 0, 1] * y + row[:, 0, 2]
    down = row[:, 1, 0] * x + row[:, 1, 1] * y + row[:, 1, 2]
    return across + (width - 1) / 2, down + (height - 1) / 2


def _displacement(transforms: Tensor, frame: tuple[int, int] | torch.Size) -> Tensor:
    """(N,): how far the transform moves any pixel, at most."""
    height, width = frame
    offset = transforms - _identity(len(transforms), transforms)
    return (offset[:, :, 0].abs() * width / 2 + offset[:, :, 1].abs() * height / 2 + offset[:, :, 2].abs()).amax(1)


def _identity(count: int, like: Tensor) -> Tensor:
    return torch.eye(2, 3, dtype=like.dtype, device=like.device).expand(count, 2, 3)


def _composed(outer: Tensor, inner: Tensor) -> Tensor:
    """First inner, then outer: u → A_o (A_i u + t_i) + t_o."""
    return torch.cat([outer[..., :2] @ inner[..., :2], outer[..., :2] @ inner[..., 2:] + outer[..., 2:]], -1)


def _inverse(transforms: Tensor) -> Tensor:
    a, b, c, d = transforms[..., 0, 0], transforms[..., 0, 1], transforms[..., 1, 0], transforms[..., 1, 1]
    determinant = a * d - b * c  # at least 0.6: the affine part stays near the identity
    linear = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2) / determinant[..., None, None]
    return torch.cat([linear, -linear @ transforms[..., 2:]], -1)


def _along(order: Tensor, images: Tensor) -> Tensor:
    """An order (G, R, B) of images as an index of their shape."""
    return order[..., None, None, None].expand_as(images)


def _check_pair(moving: Tensor, fixed: Tensor, max_shift: float) -> None:
    if moving.ndim != 4 or moving.shape != fixed.shape:
        raise InputError(f"expected moving and fixed images (N, C, H, W) of equal shape, got {tuple(moving.shape)} and {tuple(fixed.shape)}.")
    if not (math.isfinite(max_shift) and max_shift >= 0):
        raise InputError(f"max_shift={max_shift}: expected a number of pixels of at least 0.")
