"""The gradients of K clients' losses as a graph of plain operators, recorded once per shape and replayed without Python's dispatch through `vmap`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Gradients = Callable[..., tuple[Tensor, Tensor]]
"""(weights (K, P), images, labels, shares, noise if there is some) → gradients (K, P) and losses (K,)."""

_RECORDING = threading.Lock()


class Recorder:
    """Programs by shape and setting; threads share them, as a graph holds the constants of a model and no state."""

    def __init__(self) -> None:
        self._made: dict[tuple, Gradients | None] = {}

    def get(self, program: Gradients, inputs: tuple[Tensor, ...], setting: str) -> Gradients | None:
        """`program` for these inputs' shapes, None if it cannot be recorded: a matter of the model alone, so that every rank decides alike.

        setting: what else its operators depend on.
        """
        key = (setting, *((tuple(one.shape), one.dtype, one.device) for one in inputs))
        with _RECORDING:
            if key not in self._made:
                self._made[key] = _recorded(program, inputs)
            return self._made[key]


def _recorded(program: Gradients, inputs: tuple[Tensor, ...]) -> Gradients | None:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = make_fx(program)(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model's code raises when it is recorded; it may still run
        return None
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
