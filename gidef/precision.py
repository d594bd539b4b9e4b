"""What a GPU makes of float32: products as they are, or with factors rounded to TF32 (10 bits of mantissa), which PyTorch's default does to convolutions."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_LOCK, _inside, _before = threading.Lock(), 0, (False, False)


def full_float32() -> None:
    """From here on, products of float32 are products of float32, in convolutions as well. The switch is the process', not the thread's."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32", UserWarning)  # the compiler's advice to change just that
    _switch(False, False)


@contextlib.contextmanager
def tf32(rounded: bool = True) -> Iterator[None]:
    """Within this context, products of float32 on a GPU round their factors to TF32, or do not, whatever was so before; nothing on a CPU.

    The switch is the process', not the thread's: it goes back to where it was once the last thread has left.
    """
    global _inside, _before
    with _LOCK:
        if _inside == 0:
            _before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        _switch(rounded, rounded)
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _switch(*_before)


def in_own_precision(train: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function with an argument `settings`: the call is in `tf32` where that is its `precision`."""
    place = list(inspect.signature(train).parameters).index("settings")

    @functools.wraps(train)
    def trained(*args: Any, **options: Any) -> Any:
        settings = options["settings"] if "settings" in options else args[place]
        with tf32() if settings.precision == "tf32" else contextlib.nullcontext():
            return train(*args, **options)

    return trained


def _switch(products: bool, convolutions: bool) -> None:
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)  # of some versions; the compiler reads the old ones
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
