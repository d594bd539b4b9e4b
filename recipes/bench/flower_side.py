"""Flower's side of round.py: its simulation of the same clients, net, batches and steps, in one Ray actor of one thread.

Actors are processes that import this page and make the clients' data themselves, once; weights travel to each client and back as arrays. Ray opens ports
on this machine while the simulation lasts. Neither it nor Flower is told to report anything to anyone.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "flower"


def is_there() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("flwr", "ray"))


@functools.cache
def at_hand(setting: str, cohort: int, device: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], float]:
    """An actor's net, every client's float images and labels, and the rate."""
    import dataclasses

    import round as bench

    from gidef.parallel import World

    torch.set_num_threads(1)
    problem = bench.Problem(dataclasses.replace(bench.SETTINGS[setting], cohort=cohort), World(0, 1, 0, torch.device(device)))
    return problem.net, [(client.images.float() / 255, client.labels) for client in problem.clients], problem.setting.lr


def trained(weights: list[Any], setting: str, cohort: int, device: str, batch: int, place: int) -> tuple[list[Any], int]:
    """A client's weights after an epoch from `weights`, and its examples."""
    net, data, lr = at_hand(setting, cohort, device)
    images, labels = data[place]
    parameters = list(net.parameters())
    with torch.no_grad():
        for parameter, array in zip(parameters, weights, strict=True):
            parameter.copy_(torch.from_numpy(array.copy()))
    optimiser = torch.optim.SGD(parameters, lr=lr)
    for rows in torch.randperm(len(labels)).to(labels.device).split(batch):
        optimiser.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimiser.step()
    return [parameter.detach().cpu().numpy().copy() for parameter in parameters], len(labels)


def simulate(setting: str, cohort: int, batch: int, rounds: int, device: str, start: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Wall seconds of each round but the first, in which the actor starts, and the server's weights after the first."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    paths = [str(Path(__file__).resolve().parent), *filter(None, sys.path)]
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join(dict.fromkeys(paths))  # of the actors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _simulated(setting, cohort, batch, rounds, device, start)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _simulated(setting: str, cohort: int, batch: int, rounds: int, device: str, start: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    ends: list[float] = []
    first: list[Any] = []

    class Client(NumPyClient):
        def __init__(self, place: int) -> None:
            self.place = place

        def fit(self, parameters: list[Any], config: Any) -> tuple[list[Any], int, dict]:
            import flower_side as own  # by name, so that an actor keeps its data from one client to the next

            return (*own.trained(parameters, setting, cohort, device, batch, self.place), {})

    def clock(number: int, weights: list[Any], _: Any) -> tuple[float, dict]:
        ends.append(time.perf_counter())
        if number == 1:
            first.extend(torch.from_numpy(array.copy()) for array in weights)
        return 0.0, {}

    def server(_: Any) -> ServerAppComponents:
        strategy = FedAvg(
            fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=cohort, min_available_clients=cohort, evaluate_fn=clock,
            initial_parameters=ndarrays_to_parameters([tensor.detach().cpu().numpy() for tensor in start]),
        )  # fmt: skip
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    gpu = float(device.startswith("cuda"))
    run_simulation(
        ServerApp(server_fn=server), ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client()), num_supernodes=cohort,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": gpu}, "init_args": {"num_cpus": 1, "include_dashboard": False, "logging_level": "ERROR"}},
    )  # fmt: skip
    if len(ends) != rounds + 1 or not first:
        raise RuntimeError(f"Flower's simulation ended after {len(ends) - 1} of {rounds} rounds; what its actors said stands above")
    return [after - before for before, after in zip(ends[1:], ends[2:], strict=False)], first
