"""PNG, JPEG, BMP, TIFF and plain arrays to tensors, nothing else: no format that could run code is ever opened."""

from __future__ import annotations

import functools
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


def decode_array(data: bytes) -> Tensor:
    """uint8 (C, H, W) of an .npy file that holds uint8 (C, H, W), (H, W, C) or (H, W), 1 or 3 channels, in C order.

    Its bytes are taken as they are: no pickle is ever opened, and nothing is allocated by what a header claims. Raises InputError.
    """
    try:
        begin, shape = _layout(data[:128])
    except Exception as error:  # numpy raises ValueError, SyntaxError, EOFError, ... on broken headers
        raise InputError(f"not a readable npy array ({error})") from error
    count = int(np.prod(shape, dtype=np.float64))
    if len(data) - begin != count:
        raise InputError(f"an npy array of shape {shape} with {len(data) - begin} bytes")
    array = np.frombuffer(data, np.uint8, count, begin).reshape(shape)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in (1, 3):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or array.shape[1] * array.shape[2] > MAX_PIXELS:
        raise InputError(f"an npy array of shape {shape}: expected (C, H, W), (H, W, C) or (H, W) with 1 or 3 channels")
    return torch.from_numpy(array.copy())


@functools.lru_cache(64)  # the headers of a set are alike, and parsing one takes longer than copying a small image
def _layout(header: bytes) -> tuple[int, tuple[int, ...]]:
    """(where the entries begin, shape) of an .npy file in format 1.0, whose header of so few dimensions has 128 bytes."""
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected format 1.0")
    shape, transposed, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.uint8 or transposed or not shape:
        raise ValueError(f"{dtype}{' in Fortran order' if transposed else ''} of shape {shape}: expected uint8 in C order")
    return stream.tell(), shape


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
