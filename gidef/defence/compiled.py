"""Parts of a client's step as programs: compiled on a CPU, CUDA graphs on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn


class Compiled:
    """A function of tensors that runs as a program for the shapes that it meets first, and as it is for others, such as an epoch's last batch.

    Args:    modules: whose parameters the function reads, and its result is differentiated by. They change in place alone.
             graphs: not compiled, but captured as two CUDA graphs, of the function and of its backward pass: two launches instead of hundreds.
             What is returned, and the gradients, are then overwritten by the next call. Whatever is constant at the first call stays so.
             notice: told once, with the reason, if the function cannot be compiled (no C++ compiler, an operator without a lowering) or
                     captured (it asks the device for a value); it then runs as it is.
             backend: torch.compile's.
    """

    def __init__(
        self, function: Callable[..., Any], *, notice: Callable[[str], None], modules: Sequence[nn.Module] = (), graphs: bool = False, backend: str = "inductor"
    ) -> None:
        self._function, self._notice, self._graphs, self._modules = function, notice, graphs, modules
        self._shapes: dict[tuple[bool, ...], list[Any]] = {}
        self._captured: dict[tuple[bool, ...], _Captured] = {}
        self._program = function if graphs else torch.compile(function, dynamic=False, backend=backend)

    def __call__(self, *args: Tensor | None) -> Any:
        form, shapes = tuple(arg is None for arg in args), [None if arg is None else (arg.shape, arg.dtype) for arg in args]
        if self._program is None or shapes != self._shapes.setdefault(form, shapes):
            return self._function(*args)
        if self._graphs:
            return self._replayed(form, args)
        from torch._dynamo.exc import TorchDynamoException  # here, as importing the compiler takes seconds
        from torch._inductor.exc import InductorError

        try:
            return self._program(*args)
        except (TorchDynamoException, InductorError) as error:
            return self._given_up("compiled", getattr(error, "inner_exception", error), args)

    def _replayed(self, form: tuple[bool, ...], args: Sequence[Tensor | None]) -> Any:
        if form not in self._captured:
            try:
                self._captured[form] = _Captured(self._function, self._modules, args)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError) as error:
                torch.cuda.synchronize()
                return self._given_up("captured as a CUDA graph", error, args)
        return self._captured[form](*args)

    def _given_up(self, what: str, cause: Exception, args: Sequence[Tensor | None]) -> Any:
        self._program = None
        self._notice(f"a client's step could not be {what} ({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}): it runs as it is.")
        return self._function(*args)


class _Captured:
    """torch.cuda.make_graphed_callables of a function that reads parameters of modules, and may take and return None in some places."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module], args: Sequence[Tensor | None]) -> None:
        holder = _Holder(function, modules, [arg is not None for arg in args])
        given = tuple(arg.detach().clone() for arg in args if arg is not None)
        with warnings.catch_warnings():  # it is about what a backward pass adds up, and a captured one returns its gradients
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
            self._graphed = torch.cuda.make_graphed_callables(holder, given, allow_unused_input=True)
        self._holder = holder

    def __call__(self, *args: Tensor | None) -> Any:
        found = iter(self._graphed(*(arg for arg in args if arg is not None)))
        leaves = [None if moves is None else next(found) if moves else next(found).detach() for moves in self._holder.moves]
        return pytree.tree_unflatten(leaves, self._holder.layout)


class _Holder(nn.Module):
    """The function as a module, so that its parameters are found; of tensors alone."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module], given: Sequence[bool]) -> None:
        super().__init__()
        self._function, self._given, self._modules_read = function, given, nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        leaves, self.layout = pytree.tree_flatten(self._function(*(next(rest) if there else None for there in self._given)))
        self.moves = [None if leaf is None else leaf.requires_grad for leaf in leaves]
        return tuple(leaf for leaf in leaves if leaf is not None)
