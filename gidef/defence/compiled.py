"""Parts of a client's step as compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Compiled:
    """A function of tensors that runs compiled for the shapes that it meets first, and as it is for others, such as an epoch's last batch.

    Args:    graphs: as CUDA graphs, where that is possible. What is returned is then overwritten by the next call.
             notice: told once, with the reason, if the function cannot be compiled (no C++ compiler, an operator without a lowering); it then
                     runs as it is.
             backend: torch.compile's.
    """

    def __init__(self, function: Callable[..., Any], *, notice: Callable[[str], None], graphs: bool = False, backend: str = "inductor") -> None:
        self._function, self._notice, self._graphs, self._shapes = function, notice, graphs, None
        self._program = torch.compile(function, dynamic=False, backend=backend, **({"mode": "reduce-overhead"} if graphs else {}))

    def __call__(self, *args: Tensor | None) -> Any:
        shapes = [None if arg is None else (arg.shape, arg.dtype) for arg in args]
        self._shapes = self._shapes or shapes
        from torch._dynamo.exc import TorchDynamoException  # here, as importing the compiler takes seconds
        from torch._inductor.exc import InductorError

        if self._program is None or shapes != self._shapes:
            return self._function(*args)
        try:
            if self._graphs:
                torch.compiler.cudagraph_mark_step_begin()
            return self._program(*args)
        except (TorchDynamoException, InductorError) as error:
            self._program = None
            cause = getattr(error, "inner_exception", error)
            self._notice(f"a client's step could not be compiled ({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}): it runs as it is.")
            return self._function(*args)
