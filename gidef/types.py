"""The records that rooms hand to one another. No behaviour beyond checks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
"""Named tensors, such as a model's parameters or an update. The order of names carries no meaning."""


class Source(Protocol):
    """A client's training data where they do not fit in memory.

    batches: (epoch, rows, images uint8 (b, C, H, W), labels int64 (b,)) of each batch, on the CPU; rows int64 (b,): positions in the client's
             data. A function of (seed, round, client) alone; a generator, which `close` ends early.
    """

    @property
    def num_examples(self) -> int: ...
    def batches(self, *, batch_size: int, epochs: int, seed: int, round: int) -> Generator[tuple[int, Tensor, Tensor, Tensor]]: ...


@dataclass(frozen=True, slots=True)
class Client:
    """One client's own data.

    images: uint8 (n, C, H, W) in [0, 255].  labels: int64 (n,) in [0, num_classes).
    source: what it trains on in their place, if they are only a part of its data, kept in memory.
    """

    id: int
    images: Tensor
    labels: Tensor
    source: Source | None = None

    @property
    def num_examples(self) -> int:
        return int(self.labels.shape[0]) if self.source is None else self.source.num_examples


@dataclass(frozen=True, slots=True)
class Update:
    """What one client sends: Δ = w_client − w_server of the shared tensors, so that the server adds.

    metrics: sums over examples or steps are not allowed here, only means; the mean over the cohort is weighted by num_examples.
    """

    delta: Tensors
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Own:
    """What a client has at hand when its update is about to leave. None of it leaves.

    model:  its network, whose weights may be any.  params: every parameter that an update starts from, the private ones as trained.
    images: float32 (B, C, H, W) in [0, 1].  labels: int64 (B,).
    lr:     the step that stands behind an update which is a gradient: w − lr · g; None for a delta: w + Δ.
    """

    model: nn.Module
    params: Tensors
    images: Tensor
    labels: Tensor
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server between rounds: shared parameters, optimiser slots (e.g. "m", "v", "control") and the next round's number."""

    params: Tensors
    round: int = 0
    slots: dict[str, Tensors] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observation:
    """All that the adversary sees of one client in one round, and what the threat model grants on top.

    params:       shared tensors, as the server sent them.
    update:       shared tensors' gradient (kind "gradient") or w_client − w_server (kind "delta"), after the defence.
    num_examples: B, images in the private batch.
    labels:       int64 (B,) when the threat model grants them, else None.
    known:        further tensors granted, such as the private decoder's parameters (an upper bound on the attacker).
    unmatched:    the released tensors beside those in `update` that an attack sees but does not match; labels are recovered from them, too.
    trust:        by name, 0-d or for every entry: what multiplies a tensor of `update`, and what an attack simulates of it, before the two are compared, as
                  their noise differs; 1 for those without, and {} where nothing says that it does.
    noise:        share of the squared norm of `update`, each tensor times its trust, that noise on it makes on average, as far as the defence's law tells;
                  0 where it tells of none.
    scaled:       whether `update` and `unmatched` have the scale that the client's gradient or delta had, up to noise; False after clipping and the like.

    The private images are not a field: nothing that attacks can reach them.
    """

    params: Tensors
    update: Tensors
    num_examples: int
    kind: Literal["gradient", "delta"] = "gradient"
    labels: Tensor | None = None
    known: Tensors = field(default_factory=dict)
    unmatched: Tensors = field(default_factory=dict)
    scaled: bool = True
    trust: Tensors = field(default_factory=dict)
    noise: float = 0.0

    def rounds(self) -> list[Observation]:
        """The observations of which `attack.merge_rounds` made this one, without what is known; itself if it is of one round."""
        numbers = sorted({int(head) for head, slash, _ in (name.partition("/") for name in self.update) if slash and head.isdigit()})
        if not numbers:
            return [self]
        places = ("params", "update", "unmatched", "trust")
        each = ({place: of_round(getattr(self, place), number) for place in places} for number in numbers)
        return [replace(self, **one, known={}) for one in each]


def of_round(tensors: Tensors, number: int) -> Tensors:
    """Of several rounds' tensors, named "ROUND/name", those of one round, by name."""
    prefix = f"{number}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What an attack returns for one observation: its best restart by the attacker's own loss.

    images: float32 (B, C, H, W) in [0, 1].  labels: int64 (B,), granted or recovered.  loss: the attacker's final
    objective.  losses: float32 (points,), its curve.  restart: which start won.  restart_losses: float32 (restarts,).
    restart_images: float32 (restarts, B, C, H, W), for the evaluator's separate oracle column only.
    status: "ok", or "failed" with the reason in `error`; a failed attack's images are mid-grey. Of an attack that is "ok" `error` says what it lacks, such
    as that its loss became NaN on the way, where its best point counts.
    fit, first_fit: distance of the matched updates at the end and at the start; NaN for attacks that match nothing.
    iterations: evaluated.  snapshots: float16 (S, B, C, H, W), the best candidates on the way, for the evaluator's curves.
    restart_iterations: int64 (restarts,), evaluated for each start; None where they are as many for all.
    """

    images: Tensor
    labels: Tensor
    loss: float
    losses: Tensor
    restart: int = 0
    restart_losses: Tensor | None = None
    restart_images: Tensor | None = None
    status: Literal["ok", "failed"] = "ok"
    error: str = ""
    fit: float = float("nan")
    first_fit: float = float("nan")
    iterations: int = 0
    snapshots: Tensor | None = None
    restart_iterations: Tensor | None = None


def check_same_names(left: Tensors, right: Tensors, what: str) -> None:
    """Raise ValueError unless both maps hold the same names and shapes."""
    if left.keys() != right.keys():
        only_left, only_right = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
        raise ValueError(f"{what}: tensors differ in names: only left {only_left[:3]}, only right {only_right[:3]}")
    for name, tensor in left.items():
        if tensor.shape != right[name].shape:
            raise ValueError(f"{what}: {name} has shape {tuple(tensor.shape)} against {tuple(right[name].shape)}")


def to_device(tensors: Tensors, device: torch.device | str) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
