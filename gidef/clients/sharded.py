"""One client on several ranks: its network in slices under FSDP2, its batches in parts, its state in one file.

Everything below runs on each rank of a group in step. A tensor of the network is this rank's slice of it (`parallel.mesh.Layout`); a decoder is
whole on every rank, and its gradient is averaged over the group, so that the copies stay alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gidef.clients.evaluate import CHUNK
from gidef.clients.local import LocalResult, LocalSettings, Player, batches, torch_optimiser
from gidef.clients.participate import Store
from gidef.errors import Diverged, InputError
from gidef.precision import in_own_precision
from gidef.types import Client, Tensors


class Group(Protocol):
    """The ranks that work on one client; see `parallel.World`."""

    rank: int
    size: int

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor: ...
    def all_gather(self, tensor: Tensor) -> list[Tensor]: ...
    def any(self, flag: bool) -> bool: ...


class Layout(Protocol):
    """What lies where; see `parallel.Layout`."""

    def slices(self, tensors: Tensors) -> Tensors: ...
    def whole(self, slices: Tensors) -> Mapping[str, Tensor]: ...
    def gathered(self, slices: Tensors, *, keep: bool = True) -> Tensors: ...


class Engine(Protocol):
    """A network in shards and its optimiser.

    model:    what a player calls.
    load:     set every parameter from this rank's slices.
    begin:    drop the optimiser's state and all gradients.
    backward: of this rank's part of a batch's loss; gradients are averaged over the group.
    step:     one step by the mean of `count` backward passes, clipped, with FedProx's pull towards the loaded weights and `shift` added.
    slices:   this rank's part of the parameters as they are now.
    """

    model: Any

    def load(self, tensors: Tensors) -> None: ...
    def begin(self, settings: LocalSettings) -> None: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, count: int, shift: Tensors | None) -> None: ...
    def slices(self) -> Tensors: ...


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered one at a time: the members, with parameters, of the outermost lists and sequences of modules."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, inside: bool) -> None:
        for child in module.children():
            container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if inside and not container and next(child.parameters(), None) is not None:
                found.append(child)
            else:
                visit(child, isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)))

    visit(model, False)
    return found


def cut_up(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 over a model, in place: its `units`, and the root."""
    from torch.distributed.fsdp import fully_shard  # more than half a second, which few runs need

    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # that outputs are views, into which nobody writes here
    for module in [*units(model), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # the root too, else new weights would not reach a gathered copy


class Fsdp:
    """FSDP2: every parameter is cut along dim 0; a block's are gathered for its forward and again for its backward pass.

    The optimiser runs on plain tensors that are this rank's slices; so does the clip, by the norm over all slices.

    Args: model: is changed in place.  mesh: of one axis, the group's.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, group: Group) -> None:
        self.model, self._group = model, group
        cut_up(model, mesh)
        self._sharded = dict(model.named_parameters())
        self._own = {name: nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad) for name, p in self._sharded.items()}

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        torch._foreach_copy_([self._own[name] for name in tensors], [value.to(self._own[name].device) for name, value in tensors.items()])

    def begin(self, settings: LocalSettings) -> None:
        self._settings, self._step = settings, torch_optimiser(settings, list(self._own.values()))
        self._origin = {name: p.detach().clone() for name, p in self._own.items()} if settings.proximal > 0 else {}
        self._drop()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self, count: int, shift: Tensors | None) -> None:
        names, settings = list(self._own), self._settings
        gradients = [p.grad.to_local() if p.grad is not None else torch.zeros_like(self._own[name]) for name, p in self._sharded.items()]
        if count > 1:
            torch._foreach_div_(gradients, count)
        if settings.grad_clip > 0:
            clip_(gradients, settings.grad_clip, self._group)
        if settings.proximal > 0:
            pull = torch._foreach_sub([self._own[name].detach() for name in names], [self._origin[name] for name in names])
            torch._foreach_add_(gradients, pull, alpha=settings.proximal)
        if shift is not None:
            torch._foreach_add_(gradients, [shift[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            self._own[name].grad = gradient
        self._step.step()
        self._drop()

    def slices(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self._own.items()}

    def _drop(self) -> None:
        for p in (*self._sharded.values(), *self._own.values()):
            p.grad = None


def clip_(gradients: list[Tensor], bound: float, group: Group) -> None:
    """Scale slices of gradients in place so that the norm of the whole is at most `bound`, as torch's clip_grad_norm_; the same factor on every rank."""
    square = sum(torch._foreach_pow(torch._foreach_norm(gradients), 2.0), start=torch.zeros((), device=gradients[0].device)).double().reshape(1)
    norm = torch.cat(group.all_gather(square)).sum().sqrt()
    torch._foreach_mul_(gradients, (bound / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype))


# --- players, training, prediction, state ----------------------------------------------------------------------------


class PartPlayer:
    """A player of which each rank of a group computes its part of every batch.

    The loss is weighted by the part's share, so that the mean over the group is the batch's loss and gradient. Noise is drawn for the whole
    batch, so that an image has the same on any number of ranks.

    Args: player: is changed: its perturbation draws parts, its decoder's gradients are averaged.  split: whether its loss is a mean over
          examples; else, and for a batch with fewer images than ranks, every rank computes the whole batch.
    Raises: InputError for a player that makes its own batches or gradients.
    """

    def __init__(self, player: Player, group: Group, *, split: bool) -> None:
        if own := [name for name in ("draw_batches", "fill_gradients", "backward") if hasattr(player, name)]:
            raise InputError(f"{type(player).__name__} has a {' and a '.join(own)} of its own, which a client on several ranks cannot: set speed.shard_size=1.")
        self._player, self._group, self._split = player, group, split
        self._count, self._rows, self._weight = 0, slice(None), 1.0
        perturbation = getattr(player.model, "perturbation", None)
        if perturbation is not None:
            self._draw, perturbation.draw = perturbation.draw, self._drawn
        for p in player.kept.parameters() if player.kept is not None else ():
            p.register_hook(self._averaged)

    @property
    def model(self) -> Any:
        return self._player.model

    @property
    def kept(self) -> nn.Module | None:
        return self._player.kept

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        self._player.begin(client, seed=seed, round=round, progress=progress, first=first)

    def loss(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        """This rank's part, weighted: the group's mean of it is the loss of the batch."""
        self._count, size = len(images), self._group.size
        self._rows = _part(len(images), self._group) if self._split and len(images) >= size else slice(0, len(images))
        self._weight = 1.0 if self._rows.stop - self._rows.start == len(images) else (self._rows.stop - self._rows.start) * size / len(images)
        loss = self._player.loss(images[self._rows], labels[self._rows], rows=rows[self._rows], epoch=epoch)
        return loss if self._weight == 1.0 else loss * self._weight

    def _drawn(self, batch: int, **options: Any) -> Tensor:
        return self._draw(self._count, **options)[self._rows]

    def _averaged(self, gradient: Tensor) -> Tensor:
        return self._group.all_reduce_sum_(gradient * (self._weight / self._group.size))


def _part(count: int, group: Group) -> slice:
    """Of `count` rows, the group's rank's."""
    return slice(count * group.rank // group.size, count * (group.rank + 1) // group.size)


def train_sharded(engine: Engine, group: Group) -> Callable[..., LocalResult]:
    """`clients.local.train_locally` on the engine's network; delta, start and correction are slices, and all ranks of the group call it together.

    Raises: Diverged on all of them if the loss stops being finite.
    """

    @in_own_precision
    def train(
        player: Player, start: Tensors, client: Client, settings: LocalSettings, *, seed: int, round: int, correction: Callable[[str], Tensor] | None = None
    ) -> LocalResult:
        engine.load(start)
        engine.begin(settings)
        shift = {name: correction(name) for name in start} if correction else None
        device = next(player.model.parameters()).device
        total, num_batches, steps, pending = torch.zeros((), dtype=torch.float64, device=device), 0, 0, 0
        per_epoch = -(-client.num_examples // settings.batch_size)
        for epoch, rows in batches(client, batch_size=settings.batch_size, epochs=settings.epochs, seed=seed, round=round):
            rows = rows.to(client.images.device)
            images, labels = client.images[rows].to(device, torch.float32).div_(255), client.labels[rows].to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16", cache_enabled=False):
                loss = player.loss(images, labels, rows=rows, epoch=epoch)
            engine.backward(loss)
            total += loss.detach()
            num_batches, pending = num_batches + 1, pending + 1
            if pending == settings.accumulate or num_batches % per_epoch == 0:
                engine.step(pending, shift)
                steps, pending = steps + 1, 0
                if steps == settings.steps:
                    break
        mean_loss = float(torch.stack(group.all_gather(total)).sum() / (group.size * max(num_batches, 1)))
        if mean_loss != mean_loss or abs(mean_loss) == float("inf"):
            raise Diverged(f"client {client.id}'s loss is {mean_loss} in round {round}: training diverged. Lower clients.lr, or set clients.grad_clip.")
        after = engine.slices()
        return LocalResult({name: tensor - start[name].to(tensor.device) for name, tensor in after.items()}, steps, mean_loss)

    return train


@torch.no_grad()
def predict_part(
    model: Any, images: Tensor, chunk: int, noise: Callable[[int, int], Tensor | None], group: Group, *, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """(rows of all images, logits float32 on the CPU): this rank's part of a chunk; see `clients.evaluate.predict_chunk`.

    Of a chunk with fewer images than ranks all compute all, and only the first gives them.
    """
    start = chunk * CHUNK
    count = min(CHUNK, len(images) - start)
    rows = _part(count, group) if count >= group.size else slice(0, count)
    batch = images[start + rows.start : start + rows.stop].to(device, torch.float32).div_(255)
    drawn = noise(count, chunk)
    logits = (model(batch) if drawn is None else model(batch, drawn[rows])).float().cpu()
    if count >= group.size or group.rank == 0:
        yield slice(start + rows.start, start + rows.stop), logits


class SlicedStore:
    """A client store whose files hold whole tensors, and whose callers hold slices: so a client may follow to a group of another size."""

    def __init__(self, store: Store, layout: Layout, group: Group) -> None:
        self._store, self._layout, self._group = store, layout, group

    def get(self, client_id: int, version: int | None) -> Tensors | None:
        """This rank's slices. Raises InputError on all ranks of the group if one cannot read the state."""
        state = self._agreed(lambda: self._store.get(client_id, version), f"client {client_id}'s state of round {version} could not be read")
        return None if state is None else self._layout.slices(state)

    def put(self, client_id: int, round: int, tensors: Tensors) -> None:
        """One rank of the group writes; all return once the file is there. Raises InputError on all of them when the disk is full."""
        leads = self._group.rank == 0
        whole = self._layout.gathered(tensors, keep=leads)
        self._agreed(lambda: self._store.put(client_id, round, whole) if leads else None, f"client {client_id}'s state of round {round} could not be written")

    def _agreed(self, do: Callable[[], Any], what: str) -> Any:
        result, failed = None, None
        try:
            result = do()
        except InputError as error:
            failed = error
        if self._group.any(failed is not None):
            raise failed or InputError(f"{what} by another rank of its group")
        return result
