"""Max-pooling whose second derivatives run under vmap on every supported version of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.overrides import TorchFunctionMode

_POOLS = {torch.max_pool2d, F.max_pool2d, F._max_pool2d}


class GatheredPools(TorchFunctionMode):
    """Within this context, 2-D max-pooling is a look-up of the entries that PyTorch's own finds: the same values and derivatives, bit for bit.

    PyTorch up to 2.13 refuses the second derivative of its own under vmap (``is_contiguous inside of vmap``).
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in _POOLS or len(args) > 6 or kwargs.get("return_indices"):
            return function(*args, **kwargs)
        kwargs.pop("return_indices", None)
        x, *rest = args if args else (kwargs.pop("input"),)
        _, index = F.max_pool2d(x.detach(), *rest, **kwargs, return_indices=True)
        return x.flatten(-2).gather(-1, index.flatten(-2)).unflatten(-1, index.shape[-2:])


@functools.cache
def pools_need_help() -> bool:
    """Whether this version of PyTorch refuses."""

    def through(x: Tensor) -> Tensor:
        update, pull = vjp(lambda x: grad(lambda x: F.max_pool2d(x, 2).square().sum())(x), x)
        return pull(update)[0]

    try:
        vmap(through)(torch.rand(2, 1, 1, 4, 4))
    except RuntimeError:
        return True
    return False
