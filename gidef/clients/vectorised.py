"""Local training of K clients as one program: stacked weights, one forward pass through `vmap`, one backward pass, one step for all.

A client trains as in `local.train_locally`, on the same batches with the same noise, to rounding: sums run over stacked tensors in another
order. Clients are sorted by batches; one that has ended leaves the stack, and a batch shorter than its neighbours' is padded with rows of weight 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.overrides import TorchFunctionMode

from gidef.clients.local import LocalResult, LocalSettings, batches
from gidef.clients.recorded import Recorder
from gidef.errors import Diverged
from gidef.precision import in_own_precision
from gidef.types import Client, Tensors

# K clients, B images of a batch, P parameters


class Stacked(Protocol):
    """A player's game as functions of its weights; a player that can be vectorised returns one from `stacked()`, the others None.

    model, kept: the player's modules. Their own weights are neither read nor written.
    steady:      whether `forward` and `loss` are the same functions in every round, so that they may be recorded; False if there is none.
    begin:      `Player.begin` of K clients at once; a place, below, is a client's index among them.
    noise:      of one batch, drawn as the player draws it: (B, ...), or None if there is none. Called once per batch, in the loop's order.
    kept_steps: steps on `kept` before the client's own, in this epoch.
    forward:    (params, images (B, C, H, W), noise) → a tuple of tensors that the two losses read.
    kept_loss:  (kept, outputs without their graph, images, share) → scalar, minimised by `kept_lr`'s Adam.
    loss:       (outputs, kept, images, labels (B,), share) → scalar. share: float (B,), the weight of each image, 0 for padding; it sums to 1.

    The last three are pure and go through `vmap`: no `.item()`, no branch on values, no random numbers.
    """

    model: nn.Module
    kept: nn.Module | None
    kept_lr: float

    def begin(self, clients: Sequence[Client], *, seed: int, round: int, progress: float, first: Sequence[bool]) -> None: ...
    def noise(self, place: int, rows: Tensor) -> Tensor | None: ...
    def kept_steps(self, place: int, epoch: int) -> int: ...
    def forward(self, params: Tensors, images: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]: ...
    def kept_loss(self, kept: Tensors, outputs: tuple[Tensor, ...], images: Tensor, share: Tensor) -> Tensor: ...
    def loss(self, outputs: tuple[Tensor, ...], kept: Tensors, images: Tensor, labels: Tensor, share: Tensor) -> Tensor: ...


def cut_into_groups(costs: Sequence[float], at_once: int) -> list[list[int]]:
    """Positions of a cohort in ⌈n / K⌉ groups of nearly equal size, the costliest together. A function of the costs and K alone."""
    order = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
    number = -(-len(costs) // at_once)
    ends = [-(-len(costs) * index // number) for index in range(number + 1)]
    return [order[first:last] for first, last in zip(ends, ends[1:], strict=False)]


@in_own_precision
def train_together(
    stacked: Stacked,
    starts: Sequence[Tensors],
    kept: Sequence[Tensors],
    clients: Sequence[Client],
    settings: LocalSettings,
    *,
    seed: int,
    round: int,
    progress: float,
    first: Sequence[bool],
    corrections: Sequence[Callable[[str], Tensor]] | None = None,
    recorder: Recorder | None = None,
) -> list[tuple[LocalResult, Tensors]]:
    """Train K clients from their starts; the stacked twin of `train_locally`.

    Args:
        starts, kept: every parameter of `stacked.model`, and of `stacked.kept` (empty without one), per client; not modified.
        corrections:  per client, see `train_locally`.
        recorder:     keeps the steps of all clients with full batches recorded, where nothing is `kept` and the game is steady. Those with fewer
                      are not worth a recording. A function of the clients alone, so that bits do not depend on what ran before.
    Returns: per client its LocalResult and what became of `kept`.
    Raises:  Diverged if a client's loss stops being finite.  Whatever `vmap` raises for a model that it cannot take.
    """
    plans = [_plan(client, settings, seed=seed, round=round) for client in clients]
    order = sorted(range(len(clients)), key=lambda place: -len(plans[place]))  # the longest first: those who still train are a prefix
    plans, clients = [plans[place] for place in order], [clients[place] for place in order]
    layout, of_kept = _Layout(stacked.model), _Layout(stacked.kept) if stacked.kept is not None else None
    device = next(stacked.model.parameters()).device
    origin = layout.flattened([starts[place] for place in order], device)
    weights = origin.clone()
    shift = layout.flattened([{name: corrections[place](name) for name in layout.names} for place in order], device) if corrections else None
    optimiser = _adam(weights, settings.lr, settings.weight_decay) if settings.optimiser == "adam" else _sgd(weights, settings)
    opponents = of_kept.flattened([kept[place] for place in order], device) if of_kept else None
    kept_step = _adam(opponents, stacked.kept_lr, 0.0) if of_kept else None
    stacked.begin(clients, seed=seed, round=round, progress=progress, first=[first[place] for place in order])
    images, labels, index, share = _laid_out(clients, plans, settings.batch_size)
    share = share.to(device, weights.dtype)
    total = torch.zeros(len(clients), dtype=torch.float64, device=device)
    pending: Tensor | None = None

    steady = recorder is not None and of_kept is None and getattr(stacked, "steady", False)

    @contextlib.contextmanager
    def in_context() -> Iterator[None]:
        with _FoldedNorms(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16", cache_enabled=False):
            yield

    def passed(weights: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        return vmap(stacked.forward, in_dims=(0, 0, None if noise is None else 0))(layout.named(weights), x, noise)

    def gradients(weights: Tensor, x: Tensor, y: Tensor, parts: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
        def summed(weights: Tensor) -> tuple[Tensor, Tensor]:
            with in_context():
                losses = vmap(stacked.loss)(passed(weights, x, noise[0] if noise else None), {}, x, y, parts)
            return losses.sum(), losses

        gradient, (_, losses) = grad_and_value(summed, has_aux=True)(weights)
        return gradient, losses

    for number in range(len(plans[0])):
        now = [plan[number] for plan in plans if len(plan) > number]
        count, width = len(now), max(len(batch.rows) for batch in now)
        picked, parts = index[number, :count, :width], share[number, :count, :width]
        x = images[picked].to(device, torch.float32).div_(255)
        y = labels[picked].to(device)
        noise = _padded([stacked.noise(place, batch.rows) for place, batch in enumerate(now)], width)
        program = None
        if steady and count == len(clients) and width == settings.batch_size:
            inputs = (weights[:count].detach(), x, y, parts, *(() if noise is None else (noise,)))
            program = recorder.get(gradients, inputs, settings.precision)
        if program is not None:
            with torch.no_grad():
                gradient, losses = program(*inputs)
        else:
            leaf = weights[:count].detach().requires_grad_()
            with in_context():
                outputs = passed(leaf, x, noise)
                beside: Tensors = {}
                if of_kept:
                    seen = tuple(output.detach() for output in outputs)
                    wanted = [stacked.kept_steps(place, batch.epoch) for place, batch in enumerate(now)]
                    for step in range(max(wanted)):
                        rows = _rows([place for place, steps in enumerate(wanted) if steps > step], count, device)
                        own = opponents[rows].detach().requires_grad_()
                        losses = vmap(stacked.kept_loss)(of_kept.named(own), tuple(output[rows] for output in seen), x[rows], parts[rows])
                        kept_step(rows, torch.autograd.grad(losses.sum(), own)[0])
                    beside = of_kept.named(opponents[:count])
                losses = vmap(stacked.loss)(outputs, beside, x, y, parts)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        total[:count] += losses.detach()
        if settings.accumulate > 1:
            pending = gradient if pending is None else pending[:count] + gradient
            ending = [place for place, batch in enumerate(now) if batch.averages]
            if not ending:
                continue
            rows = _rows(ending, count, device)
            gradient = pending[rows] / torch.tensor([[now[place].averages] for place in ending], dtype=pending.dtype, device=device)
            pending[rows] = 0
        else:
            rows = slice(0, count)
        if settings.grad_clip > 0:
            gradient = gradient * (settings.grad_clip / (torch.linalg.vector_norm(gradient, dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        if settings.proximal > 0:
            gradient = torch.add(gradient, weights[rows] - origin[rows], alpha=settings.proximal)
        if shift is not None:
            gradient = gradient + shift[rows]
        optimiser(rows, gradient)

    means = (total / torch.tensor([len(plan) for plan in plans], device=device)).tolist()
    for client, mean in zip(clients, means, strict=True):
        if not math.isfinite(mean):
            raise Diverged(f"client {client.id}'s loss is {mean} in round {round}: training diverged. Lower clients.lr, or set clients.grad_clip.")
    deltas = layout.each(weights - origin)
    ends = of_kept.each(opponents) if of_kept else [{} for _ in clients]
    found: list[Any] = [None] * len(clients)
    for place, plan, delta, mean, end in zip(order, plans, deltas, means, ends, strict=True):
        found[place] = LocalResult(delta, sum(batch.averages > 0 for batch in plan), mean), end
    return found


@dataclass(frozen=True, slots=True)
class _Batch:
    """averages: batches whose gradients the step behind this one averages, 0 for no step."""

    epoch: int
    rows: Tensor
    averages: int


def _plan(client: Client, settings: LocalSettings, *, seed: int, round: int) -> list[_Batch]:
    """A client's batches, and where it steps, as `train_locally` meets them."""
    per_epoch, pending, steps, plan = -(-client.num_examples // settings.batch_size), 0, 0, []
    for epoch, rows in batches(client, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed, round=round):
        pending += 1
        stepped = pending == settings.accumulate or (len(plan) + 1) % per_epoch == 0
        plan.append(_Batch(epoch, rows, pending if stepped else 0))
        if stepped:
            steps, pending = steps + 1, 0
            if steps == settings.steps:
                break
    return plan


def _laid_out(clients: Sequence[Client], plans: list[list[_Batch]], batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All clients' images and labels, one behind the other; which of them each batch holds, int64 (steps, K, B); and the images' shares,
    float64 (steps, K, B). Padding is the client's own first image, of share 0."""
    width = min(batch_size, max(client.num_examples for client in clients))
    index = np.zeros((len(plans[0]), len(clients), width), dtype=np.int64)
    share, offset = np.zeros(index.shape), 0
    for place, (client, plan) in enumerate(zip(clients, plans, strict=True)):
        index[:, place] = offset
        for number, batch in enumerate(plan):
            index[number, place, : len(batch.rows)] += batch.rows.to("cpu").numpy()
            share[number, place, : len(batch.rows)] = 1 / len(batch.rows)
        offset += client.num_examples
    images, labels = torch.cat([client.images for client in clients]), torch.cat([client.labels for client in clients])
    return images, labels, torch.from_numpy(index).to(images.device), torch.from_numpy(share)


def _padded(parts: Sequence[Tensor | None], width: int) -> Tensor | None:
    """Noise (b, ...) of every client as one (K, B, ...), zeros behind shorter ones; None if there is none."""
    if parts[0] is None:
        return None
    if all(len(part) == width for part in parts):
        return torch.stack(list(parts))
    stacked = parts[0].new_zeros((len(parts), width, *parts[0].shape[1:]))
    for place, part in enumerate(parts):
        stacked[place, : len(part)] = part
    return stacked


Rows = slice | Tensor
"""Which clients of a stack: a slice, hence a view, or their places."""


def _rows(places: list[int], count: int, device: torch.device) -> Rows:
    return slice(0, count) if len(places) == count else torch.tensor(places, device=device)


class _Layout:
    """Where a module's parameters stand in a row (P,) of a stack (K, P). Frozen parameters are cut off from the graph."""

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self.names = tuple(parameters)
        self._shapes, self._trained = [p.shape for p in parameters.values()], [p.requires_grad for p in parameters.values()]
        self._sizes = [p.numel() for p in parameters.values()]

    def flattened(self, each: Sequence[Tensors], device: torch.device) -> Tensor:
        """(K, P) from one map per client."""
        return torch.stack([torch.cat([tensors[name].detach().to(device).flatten() for name in self.names]) for tensors in each])

    def named(self, stack: Tensor) -> Tensors:
        """Views (K, *shape); gradients come back as one (K, P)."""
        parts = zip(self.names, stack.split(self._sizes, dim=1), self._shapes, self._trained, strict=True)
        return {name: (part if trained else part.detach()).view(-1, *shape) for name, part, shape, trained in parts}

    def each(self, stack: Tensor) -> list[Tensors]:
        """One map per client, views."""
        return [dict(zip(self.names, (p.view(s) for p, s in zip(row.split(self._sizes), self._shapes, strict=True)), strict=True)) for row in stack]


class _GroupNorm(torch.autograd.Function):
    """group_norm of K clients as one of K times the groups, the clients' channels side by side, as a grouped convolution leaves them and wants them.

    PyTorch's own rule under vmap moves the clients to the front, which copies, and applies scale and shift in passes of their own.
    """

    @staticmethod
    def forward(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return torch.group_norm(x, groups, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, int]:  # fmt: skip
        count = info.batch_size

        def stacked(tensor: Tensor, at: int | None, to: int) -> Tensor:
            return tensor.unsqueeze(to).expand(*tensor.shape[:to], count, *tensor.shape[to:]) if at is None else tensor.movedim(at, to)

        affine = [None if one is None else stacked(one, at, 0).reshape(-1) for one, at in ((weight, in_dims[2]), (bias, in_dims[3]))]
        side_by_side = stacked(x, in_dims[0], 1).flatten(1, 2)
        return torch.group_norm(side_by_side, count * groups, *affine, eps).unflatten(1, (count, -1)), 1


class _FoldedNorms(TorchFunctionMode):
    """Inside, `group_norm` is `_GroupNorm`."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is F.group_norm and torch._C._functorch.is_batchedtensor(args[0]):
            return _group_norm(*args, **kwargs or {})
        return function(*args, **kwargs or {})


def _group_norm(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return _GroupNorm.apply(x, num_groups, weight, bias, eps)


def _sgd(weights: Tensor, settings: LocalSettings) -> Callable[[Rows, Tensor], None]:
    """torch.optim.SGD on some rows of the stack."""
    buffer = torch.zeros_like(weights) if settings.momentum else None

    def step(rows: Rows, gradient: Tensor) -> None:
        own = weights[rows]
        if settings.weight_decay:
            gradient = gradient.add(own, alpha=settings.weight_decay)
        if buffer is not None:
            gradient = buffer[rows].mul_(settings.momentum).add_(gradient)
        own.add_(gradient, alpha=-settings.lr)
        if not isinstance(rows, slice):  # copies so far
            weights[rows] = own
            if buffer is not None:
                buffer[rows] = gradient

    return step


def _adam(weights: Tensor, lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Callable[[Rows, Tensor], None]:
    """torch.optim.Adam on some rows of the stack; every row counts its own steps."""
    first, second, steps = torch.zeros_like(weights), torch.zeros_like(weights), [0] * len(weights)

    def step(rows: Rows, gradient: Tensor) -> None:
        places = range(rows.stop) if isinstance(rows, slice) else rows.tolist()
        for place in places:
            steps[place] += 1
        taken = [steps[place] for place in places]
        sizes, roots = [lr / (1 - beta1**t) for t in taken], [math.sqrt(1 - beta2**t) for t in taken]
        own, m, v = weights[rows], first[rows], second[rows]
        if weight_decay:
            gradient = gradient.add(own, alpha=weight_decay)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if len(set(taken)) == 1:
            own.addcdiv_(m, v.sqrt().div_(roots[0]).add_(eps), value=-sizes[0])
        else:
            column = torch.tensor([sizes, roots], dtype=weights.dtype).to(weights.device)[..., None]
            own.sub_(column[0] * m / (v.sqrt() / column[1] + eps))
        if not isinstance(rows, slice):  # copies so far
            weights[rows], first[rows], second[rows] = own, m, v

    return step
