"""Where the ranks sit: which host, device and cores each has."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections import Counter
from dataclasses import dataclass

import torch

from gidef.parallel.world import World


@dataclass(frozen=True, slots=True)
class Seat:
    """cores: the rank's share, at least 1: those that its host lets it use, divided by the ranks that are let use the same ones."""

    rank: int
    host: str
    device: str
    cores: int


def host_name() -> str:
    """This host, as SLURM calls it where it runs the step, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def allowed_cores() -> list[int]:
    """Cores that this process may use: a scheduler may have bound it to some."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def seats(world: World) -> list[Seat]:
    """Every rank's seat, by rank, the same on all; all ranks call it together."""
    device = f"{world.device} ({torch.cuda.get_device_name(world.device)})" if world.device.type == "cuda" else str(world.device)
    told = world.all_gather_json([socket.gethostname(), host_name(), device, allowed_cores()])
    sharing = Counter((machine, *cores) for machine, _, _, cores in told)
    return [
        Seat(rank, host, device, max(1, len(cores) // sharing[machine, *cores])) for rank, (machine, host, device, cores) in enumerate(told)
    ]


def seated(world: World) -> World:
    """The world that knows this rank's cores."""
    return dataclasses.replace(world, cores=seats(world)[world.rank].cores)
