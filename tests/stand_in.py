"""A device that needs no GPU: tensors on `DEVICE` have no values (torch's meta device), and meet those of the CPU where a GPU's would: in copies and as indices.

What is read back from it is made up, 0.25 or 1, so that a run goes on; its numbers mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
DRAWS = ((torch, ("randn", "rand", "randint", "randperm", "normal")), (torch.Tensor, ("normal_", "uniform_", "exponential_", "bernoulli_", "random_")))
_Generator = torch.Generator


class Mixed(Exception):
    """Tensors, or a generator and a tensor, that a GPU would not take together."""


class _Own(_Generator):
    """A generator that says it is the device's."""

    def __new__(cls, device: Any = "cpu") -> _Own:
        return _Generator.__new__(cls, "cpu")

    device = DEVICE


class _Made(_Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return _Own() if torch.device(device).type == DEVICE.type else _Generator(device)


def _there(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE.type


def _read(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.full(tensor.shape, 0.25 if tensor.is_floating_point() else 1, dtype=dtype or tensor.dtype, device="cpu")


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if not any(map(_there, tensors)):
            return function(*args, **kwargs)
        match function:
            case aten._local_scalar_dense.default:
                return _read(args[0].detach()).tolist()
            case aten._to_copy.default if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
                return _read(args[0], kwargs.get("dtype"))
            case aten.copy_.default if not _there(args[0]):
                return args[0].fill_(1)
        here = [one for one in tensors if not _there(one) and one.dim() > 0]
        indices = function in INDEXED and _there(args[0]) and all(_there(value) or value.dim() == 0 for value in args[2:3])
        if here and function not in COPIES and not indices:
            raise Mixed(f"{function} takes {[(one.device.type, tuple(one.shape)) for one in tensors]}")
        return function(*args, **kwargs)


def _checked(draw: Callable[..., Any]) -> Callable[..., Any]:
    """A draw whose generator must be where its numbers are."""

    def drawn(*args: Any, **options: Any) -> Any:
        own = next((one for one in (*args, options.get("generator")) if isinstance(one, _Generator)), None)
        place = args[0].device if args and isinstance(args[0], torch.Tensor) else torch.device(options.get("device") or "cpu")
        if own is not None and own.device.type != place.type:
            raise Mixed(f"a generator on {own.device} draws for {place}")
        if place.type == DEVICE.type:
            args, options = tuple(one for one in args if one is not own), {name: value for name, value in options.items() if name != "generator"}
        return draw(*args, **options)

    return drawn


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, whatever the device would refuse raises Mixed, on the thread that enters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", _Made)
        autocast, enabled = torch.autocast, torch.is_autocast_enabled
        patch.setattr(torch, "autocast", lambda kind, *args, **options: contextlib.nullcontext() if kind == DEVICE.type else autocast(kind, *args, **options))
        patch.setattr(torch, "is_autocast_enabled", lambda kind=None: False if kind == DEVICE.type else enabled(*([kind] if kind else [])))
        for place, names in DRAWS:
            for name in names:
                patch.setattr(place, name, _checked(getattr(place, name)))
        with _Watch():
            yield
