"""PNG, JPEG, BMP and TIFF to tensors, nothing else: no format that could run code is ever opened."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gidef.data.images import resize
from gidef.errors import InputError

MAX_PIXELS = 64 << 20
MIN_SIDE, MAX_SIDE = 8, 512  # of images whose size nobody gave


def decode(data: bytes, formats: tuple[str, ...] = ("PNG", "JPEG")) -> Tensor:
    """uint8 (C, H, W) with 1 or 3 channels; palettes and alpha become RGB or grey.

    Raises: InputError saying what is wrong, for the caller to add the file's name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; oversized images are refused below
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{image.width}x{image.height} pixels are too many")
                if image.mode.startswith(("I", "F")):
                    raise InputError(f"mode {image.mode} has more than 8 bits per channel: convert it to 8 bits with a window of your choice")
                grey = image.mode in ("1", "L", "LA")
                array = np.array(image.convert("L" if grey else "RGB"))
    except InputError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ... on broken files
        raise InputError(f"not a readable {'/'.join(formats)} image ({error})") from error
    return torch.from_numpy(array)[None] if grey else torch.from_numpy(array).permute(2, 0, 1).contiguous()


def stack(images: Iterable[Tensor], size: int | None, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """One uint8 (N, C, H, W) and notes, from (C, H, W) of any sizes: all become `size` × `size`, or as large as the first.

    RGB if any image is. Expects at least one image. Raises InputError if no size is given and the first image has an unlikely one.
    """
    kept: list[Tensor] = []
    target, resized = None if size is None else (size, size), 0
    for image in images:
        if target is None:
            target = first = tuple(image.shape[1:])
            if not MIN_SIDE <= min(first) <= max(first) <= MAX_SIDE:
                raise InputError(f"{where}: the first image has {first[1]}x{first[0]} pixels; pass size (a side in pixels) to resize all.")
        if tuple(image.shape[1:]) != target:
            image, resized = resize(image[None], target)[0], resized + 1
        kept.append(image)
    channels = {image.shape[0] for image in kept}
    result = torch.empty(len(kept), max(channels), *target, dtype=torch.uint8)
    for row, image in zip(result, kept, strict=True):
        row.copy_(image.expand_as(row))
    notes = []
    if resized:
        notes.append(f"{resized} of {len(kept)} images resized to {target[1]}x{target[0]} pixels (antialiased bilinear).")
    if len(channels) > 1:
        notes.append("grey and RGB images are mixed: the grey ones became RGB.")
    return result, tuple(notes)
