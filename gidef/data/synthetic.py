"""Made-up blood cells in a stained smear: the data of last resort, so that everything runs on a machine without images."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gidef.data.images import Dataset, Images, check_size
from gidef.errors import InputError
from gidef.rng import generator

LOBES, RED_CELLS, CHUNK = 5, 9, 8  # CHUNK: images at a time, so that one field stays in the processor's cache
BALL_REACH, BALL_LEVEL = 1.5, (1 - 1 / 1.5**2) ** 2  # a ball of radius r reaches 1.5 r; its outline is the level set at r


@dataclass(frozen=True)
class _Look:
    """One class. Lengths in half image sides, colours in [0, 255], pairs are ranges."""

    name: str
    radius: tuple[float, float]
    ragged: float  # amplitude of the outline's warp
    lobes: tuple[int, int]
    lobe_radius: tuple[float, float]  # as a share of the cell's radius
    orbit: tuple[float, float]  # distance of the lobes from the cell's centre, same share
    spread: tuple[float, float]  # angle between neighbouring lobes, radians
    cytoplasm: tuple[int, int, int]
    nucleus: tuple[int, int, int]
    granule: tuple[int, int, int]
    granules: float  # density, 0 to 1
    over_nucleus: float  # how far granules cover the nucleus
    vacuoles: float


CELLS = (
    _Look(
        "basophil", (0.5, 0.68), 0.025, (2, 4), (0.45, 0.6), (0.3, 0.5), (1.2, 2.2),
        (140, 85, 150), (92, 45, 132), (62, 28, 104), 0.7, 0.8, 0.1,
    ),
    _Look(
        "eosinophil", (0.56, 0.74), 0.02, (2, 3), (0.34, 0.44), (0.4, 0.54), (1.7, 2.5),
        (198, 122, 145), (96, 50, 142), (182, 92, 115), 0.65, 0.15, 0.1,
    ),
    _Look(
        "erythroblast", (0.32, 0.52), 0.018, (1, 1), (0.55, 0.8), (0.0, 0.22), (0.0, 0.0),
        (158, 134, 174), (64, 32, 106), (125, 98, 152), 0.2, 0.0, 0.0,
    ),
    _Look(
        "immature granulocyte", (0.58, 0.78), 0.03, (1, 2), (0.52, 0.66), (0.14, 0.36), (0.6, 1.1),
        (168, 134, 186), (106, 56, 150), (138, 92, 166), 0.5, 0.2, 0.1,
    ),
    _Look(
        "lymphocyte", (0.4, 0.58), 0.025, (1, 1), (0.74, 0.94), (0.0, 0.14), (0.0, 0.0),
        (156, 138, 198), (88, 42, 132), (120, 85, 160), 0.15, 0.0, 0.0,
    ),
    _Look(
        "monocyte", (0.66, 0.86), 0.07, (2, 3), (0.42, 0.54), (0.2, 0.36), (0.8, 1.3),
        (164, 146, 190), (112, 60, 152), (140, 115, 170), 0.2, 0.0, 0.6,
    ),
    _Look(
        "neutrophil", (0.52, 0.7), 0.03, (3, 5), (0.25, 0.33), (0.44, 0.6), (0.85, 1.3),
        (208, 172, 190), (84, 42, 134), (190, 140, 172), 0.4, 0.0, 0.1,
    ),
    _Look(
        "platelet", (0.15, 0.3), 0.015, (1, 1), (0.35, 0.7), (0.0, 0.3), (0.0, 0.0),
        (168, 132, 182), (128, 82, 162), (105, 62, 148), 0.5, 0.5, 0.0,
    ),
)  # fmt: skip


@functools.lru_cache(maxsize=2)
def synthetic_blood_cells(*, train: int = 2400, val: int = 400, test: int = 600, size: int = 28, seed: int = 0) -> Dataset:
    """Eight classes of white blood cells, erythroblasts and platelets, in BloodMNIST's order, drawn rather than photographed.

    Args:    train, val, test: images per split, at least 8; classes are equally frequent.  size: side in pixels; the scenes do not
             depend on it.  seed: of every draw.
    Returns: Dataset of RGB images, `synthetic` set; kept in memory for the next call with the same arguments.
    Raises:  InputError for a size or number out of range.

    Shapes are implicit: a nucleus is a level set of summed balls, outlines are warped ellipses; both are drawn on a finer grid
    (four times at 28 pixels) and averaged down. Position, size, rotation, stain, texture and blur vary. No number measured on these
    images says anything about real ones.
    """
    check_size(size)
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if count < len(CELLS):
            raise InputError(f"{split}={count} synthetic images: expected at least {len(CELLS)}, one per class.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks this small are up to ten times slower on several
    try:
        parts = {split: _draw_split(split, count, size, seed) for split, count in counts.items()}
    finally:
        torch.set_num_threads(threads)
    return Dataset(
        name="synthetic", title="synthetic blood cells", modality="drawn, after blood-cell microscopy",
        class_names=tuple(cell.name for cell in CELLS), **parts, source=f"generator, seed {seed}", md5=None, synthetic=True,
        notes=("synthetic images: results say nothing about real ones.",),
    )  # fmt: skip


def _draw_split(split: str, count: int, size: int, seed: int) -> Images:
    labels = (torch.arange(count) % len(CELLS))[torch.randperm(count, generator=generator(seed, "synthetic labels", split))]
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for start in range(0, count, CHUNK):  # a stream of its own for each chunk: the sensor's noise takes more numbers for larger images
        images[start : start + CHUNK] = _render(labels[start : start + CHUNK], size, generator(seed, "synthetic cells", split, start))
    return Images(images, labels)


class _Draw:
    """Random numbers for B images, all from one generator."""

    def __init__(self, batch: int, draws: torch.Generator):
        self.batch, self.draws = batch, draws

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.draws)

    def uniform(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.batch, *shape, generator=self.draws)

    def sometimes(self, share: float) -> Tensor:
        return (torch.rand(self.batch, generator=self.draws) < share).float()


def _render(labels: Tensor, size: int, draws: torch.Generator) -> Tensor:
    """uint8 (B, 3, size, size). Layers' coverages are drawn fine, averaged down, and then coloured."""
    draw, looks = _Draw(len(labels), draws), [CELLS[int(label)] for label in labels]
    fine = size * (4 if size <= 48 else 2 if size <= 112 else 1)
    sharp = fine / 3.0  # one over the width of an edge: 1.5 fine pixels
    centre, radius = draw.normal(2).mul_(0.09).clamp_(-0.22, 0.22), draw.uniform(*_range(looks, "radius"))

    axis = (torch.arange(fine) + 0.5) * (2 / fine) - 1
    plain = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).flatten(1)  # (2, P)
    ragged = (_values(looks, "ragged") * draw.uniform(0.6, 1.4)).view(-1, 1, 1, 1)
    warp = _enlarge(draw.normal(2, 7, 7) * ragged, fine, "bicubic")

    points, warped = _monomials(plain), _monomials(plain + warp)
    cell = _coverage((_ellipse(draw, centre, radius, 0.16)[:, None] @ warped)[:, 0], radius, sharp)
    nucleus = _nucleus(draw, looks, warped, centre, radius, sharp) * cell
    red, pale = _red_cells(draw, points, centre, radius, sharp)
    bystander = _bystander(draw, points, sharp)

    texture = _enlarge(draw.normal(3, 34, 34), fine, "bilinear")
    density = (_values(looks, "granules") * draw.uniform(0.7, 1.3)).view(-1, 1)
    granule = (1.6 * texture[:, 0] + 2.6 * density - 1.3).clamp_(0, 1)
    chromatin = (0.9 * texture[:, 1] + 0.2).clamp_(0, 1)
    vacuole = (3 * texture[:, 2] - 3.6 + 1.6 * _values(looks, "vacuoles").view(-1, 1)).clamp_(0, 1)

    cytoplasm, uncovered = cell - nucleus, (1 - cell) * (1 - bystander)
    over = _values(looks, "over_nucleus").view(-1, 1)
    layers = (
        red * uncovered, red * pale * uncovered, bystander * (1 - cell), cytoplasm, cytoplasm * granule, cytoplasm * vacuole,
        nucleus, nucleus * chromatin * (1 - over * granule), nucleus * over * granule, cell,
    )  # fmt: skip
    layers = torch.stack([F.avg_pool2d(layer.view(-1, fine, fine), fine // size) for layer in layers], 1)
    return _develop(draw, _colour(draw, looks, layers), size)


@functools.lru_cache(maxsize=4)
def _interpolation(coarse: int, fine: int, mode: str) -> Tensor:
    """(fine, coarse): the matrix that interpolates along one side."""
    rows = torch.eye(coarse).view(coarse, 1, coarse, 1).expand(-1, -1, -1, 2)
    return F.interpolate(rows, size=(fine, 2), mode=mode)[:, 0, :, 0].T.contiguous()


def _enlarge(grid: Tensor, fine: int, mode: str) -> Tensor:
    """(B, K, G, G) to (B, K, fine²), smoothly; two matrix products are five times faster than F.interpolate."""
    matrix = _interpolation(grid.shape[-1], fine, mode)
    return (matrix @ grid @ matrix.T).flatten(2)


def _range(looks: list[_Look], field: str) -> tuple[Tensor, Tensor]:
    """The low and high ends (B,) of a field that holds a pair."""
    low, high = torch.tensor([getattr(look, field) for look in looks], dtype=torch.float32).unbind(1)
    return low, high


def _values(looks: list[_Look], field: str) -> Tensor:
    return torch.tensor([getattr(look, field) for look in looks], dtype=torch.float32)


def _monomials(points: Tensor) -> Tensor:
    """x², xy, y², x, y, 1 as (..., 6, P) of points (..., 2, P): one matrix product then evaluates many quadrics."""
    x, y = points.unbind(-2)
    return torch.stack([x * x, x * y, y * y, x, y, torch.ones_like(x)], -2)


def _ellipse(draw: _Draw, centre: Tensor, radius: Tensor, flattening: float) -> Tensor:
    """Coefficients (B, ..., 6) of a random ellipse's quadric q, 0 at `centre` (B, ..., 2) and 1 on the outline, `radius` (B, ...) away."""
    angle, stretch = draw.uniform(0, math.pi, *radius.shape[1:]), 1 + draw.uniform(-flattening, flattening, *radius.shape[1:])
    cos, sin, long, short = angle.cos(), angle.sin(), (stretch / radius) ** 2, (1 / (stretch * radius)) ** 2
    xx, yy, xy = cos**2 * long + sin**2 * short, sin**2 * long + cos**2 * short, cos * sin * (long - short)
    x, y = centre.unbind(-1)
    return torch.stack([xx, 2 * xy, yy, -2 * (xx * x + xy * y), -2 * (xy * x + yy * y), xx * x * x + 2 * xy * x * y + yy * y * y], -1)


def _coverage(quadric: Tensor, radius: Tensor, sharp: float) -> Tensor:
    """Coverage in [0, 1] of an ellipse's inside; near the outline, (1 - q) r / 2 is the signed distance."""
    return ((1 - quadric) * (radius[..., None] * (sharp / 2)) + 0.5).clamp_(0, 1)


def _nucleus(draw: _Draw, looks: list[_Look], points: Tensor, centre: Tensor, radius: Tensor, sharp: float) -> Tensor:
    """Coverage of the union of lobes on an arc around the cell's centre, blended where they meet."""
    low, high = _range(looks, "lobes")
    number = (low + (high - low + 1) * torch.rand(draw.batch, generator=draw.draws)).floor().clamp(max=high)
    steps = draw.uniform(*(end[:, None] for end in _range(looks, "spread")), LOBES)
    angle = draw.uniform(0, 2 * math.pi, 1) + steps.cumsum(1)
    orbit = draw.uniform(*(end[:, None] for end in _range(looks, "orbit")), 1) * draw.uniform(0.85, 1.15, LOBES)
    places = centre[:, None] + (radius[:, None] * orbit)[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    radii = draw.uniform(*(end[:, None] for end in _range(looks, "lobe_radius")), 1) * draw.uniform(0.88, 1.12, LOBES) * radius[:, None]
    present = torch.arange(LOBES) < number[:, None]
    balls = (1 - _ellipse(draw, places, BALL_REACH * radii, 0.14) @ points).clamp_(min=0).square_()
    field = (present[:, None].float() @ balls)[:, 0]
    slope = radii.mean(1, keepdim=True)  # at the level set, field − level ≈ distance / r
    return ((field - BALL_LEVEL) * (slope * sharp) + 0.5).clamp_(0, 1)


def _red_cells(draw: _Draw, points: Tensor, centre: Tensor, radius: Tensor, sharp: float) -> tuple[Tensor, Tensor]:
    """Coverage of the red blood cells around the cell, and of their pale middles."""
    angle = draw.uniform(0, 2 * math.pi, RED_CELLS)
    away = radius[:, None] + draw.uniform(0.2, 0.75, RED_CELLS)
    places = centre[:, None] + away[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    size = draw.uniform(0.24, 0.32, 1) * draw.uniform(0.9, 1.1, RED_CELLS)
    absent = torch.arange(RED_CELLS) >= draw.uniform(2, RED_CELLS + 1, 1)
    nearest = (_ellipse(draw, places + 9.0 * absent[..., None], size, 0.12) @ points).amin(1)
    return _coverage(nearest, size.mean(1), sharp), (0.9 - 1.5 * nearest).clamp_(0, 1)


def _bystander(draw: _Draw, points: Tensor, sharp: float) -> Tensor:
    """Coverage of a second stained cell that the edge cuts, in one image of ten; a speck of debris in one of five."""
    angle, far = draw.uniform(0, 2 * math.pi), draw.uniform(1.2, 1.45)
    place = (far + 2 * (1 - draw.sometimes(0.1)))[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    radius = draw.uniform(0.35, 0.5)
    cell = _coverage(_ellipse(draw, place, radius, 0.15) @ points, radius, sharp)
    speck_place = draw.uniform(-0.9, 0.9, 2) + 4 * (1 - draw.sometimes(0.2))[:, None]
    speck = draw.uniform(0.04, 0.1)
    return torch.maximum(cell, _coverage(_ellipse(draw, speck_place, speck, 0.15) @ points, speck, sharp))


def _colour(draw: _Draw, looks: list[_Look], layers: Tensor) -> Tensor:
    """float (B, 3, H, W) in [0, 255]: background plus each layer's difference from what lies under it."""
    background = torch.tensor([254.0, 229.0, 203.0]) + draw.normal(1) * 3 + draw.normal(3) * 3
    bluish = draw.sometimes(0.05)[:, None]
    background = background + bluish * (torch.tensor([214.0, 212.0, 236.0]) - background)
    ring = background * torch.tensor([0.79, 0.72, 0.80]) + draw.normal(3) * 6
    middle = ring + (background - ring) * draw.uniform(0.1, 0.95, 1)
    stain = draw.normal(1) * 8  # strength of the purple stain, shared by all of a cell's parts
    cytoplasm, nucleus, granule = (_values(looks, part) + stain + draw.normal(3) * 5 for part in ("cytoplasm", "nucleus", "granule"))
    mixing = draw.uniform(0.0, 0.25, 1)
    cytoplasm = cytoplasm + mixing * (nucleus - cytoplasm)
    second = torch.tensor([100.0, 55.0, 135.0]) + draw.normal(3) * 10
    differences = torch.stack([
        ring - background, middle - ring, second - background, cytoplasm, granule - cytoplasm, 0.7 * (background - cytoplasm),
        nucleus, nucleus * -0.28, granule - nucleus, -background,
    ], dim=1)  # fmt: skip
    return background[..., None, None] + torch.einsum("blc,blhw->bchw", differences, layers)


def _develop(draw: _Draw, images: Tensor, size: int) -> Tensor:
    """The microscope and the camera: tone, focus, uneven light, sensor noise."""
    gamma = 1 + draw.normal(1) * 0.05 + draw.normal(3) * 0.02
    images = (images / 255).clamp_(0.02, 1).pow(gamma[..., None, None])
    kernel = 2 * max(1, round(size / 28)) + 1
    soft = F.avg_pool2d(F.pad(images, [kernel // 2] * 4, mode="replicate"), (kernel, 1), stride=1)
    soft = F.avg_pool2d(soft, (1, kernel), stride=1)
    images = torch.lerp(images, soft, draw.uniform(0.05, 0.75).view(-1, 1, 1, 1) ** 1.5)
    tilt, axis = draw.normal(2) * 0.025, torch.linspace(-1, 1, size)
    images = images * (1 + tilt[:, 0, None, None] * axis + tilt[:, 1, None, None] * axis[:, None])[:, None]
    images = images + draw.normal(3, size, size) * 0.012
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)
