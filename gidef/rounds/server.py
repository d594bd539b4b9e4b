"""Server steps: what becomes of the shared parameters once the cohort's mean update is in.

A step is a pure function step(state, Δ) → state. Δ = w_client − w_server, averaged over the cohort, so the server adds.
For all steps here:

- Only floating tensors move; each keeps its shape, dtype and device. Other tensors (counters) are carried over from the
  state as they are, and Δ may hold them or not.
- No input is modified; `state.round` grows by one; slots of other names are carried over.
- ValueError if an argument is out of range, or Δ, parameters and slots differ in names or shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from gidef.types import ServerState, Tensors, check_same_names

ServerStep = Callable[[ServerState, Tensors], ServerState]
CONTROL = "control/"
"""In SCAFFOLD's Δ, `control/<name>` is the mean change of the clients' control variates for parameter `<name>`."""


def fed_avg(*, lr: float = 1.0, momentum: float = 0.0) -> ServerStep:
    """Federated averaging, with server momentum if asked for (FedAvgM).

        m ← β m + Δ,   w ← w + η m

    Args:    lr: η > 0, per round.  momentum: β in [0, 1).
    Returns: step(state, Δ) → state; slot "m", starting at 0, only if momentum > 0.
    Source:  McMahan et al. 2017, arXiv:1602.05629, Algorithm 1 (lr 1, momentum 0); Hsu et al. 2019, arXiv:1909.06335.
    Deviates: nothing.
    """
    _check("lr", lr, lr > 0)
    _check("momentum", momentum, 0 <= momentum < 1)

    @torch.no_grad()
    def step(state: ServerState, delta: Tensors) -> ServerState:
        delta = _fitted(state, delta)
        if not momentum:
            return _moved(state, delta, lr)
        slot = _slot(state, "m", 0.0)
        m = {name: momentum * slot[name] + change for name, change in delta.items()}
        return _moved(state, m, lr, m=m)

    return step


def fed_adagrad(*, lr: float, beta1: float = 0.0, tau: float = 1e-3) -> ServerStep:
    """FedAdagrad server optimiser.

        m ← β₁ m + (1 − β₁) Δ,   v ← v + Δ²,   w ← w + η m / (√v + τ)

    Args:    lr: η > 0, per round.  beta1: in [0, 1); 0 as in the paper's experiments.  tau: > 0; v starts at τ².
    Returns: step(state, Δ) → state, with slots "m" and "v".
    Source:  Reddi et al. 2021, arXiv:2003.00295, Algorithm 2.
    Deviates: nothing.
    """
    return _adaptive(lambda v, squared: v + squared, lr=lr, beta1=beta1, tau=tau)


def fed_adam(*, lr: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerStep:
    """FedAdam server optimiser.

        m ← β₁ m + (1 − β₁) Δ,   v ← β₂ v + (1 − β₂) Δ²,   w ← w + η m / (√v + τ)

    Args:    lr: η > 0, per round.  beta1, beta2: in [0, 1).  tau: > 0; v starts at τ².
    Returns: step(state, Δ) → state, with slots "m" and "v".
    Source:  Reddi et al. 2021, arXiv:2003.00295, Algorithm 2; v squares Δ, not m (google-research/federated#41).
    Deviates: nothing (the paper has no bias correction either).
    """
    _check("beta2", beta2, 0 <= beta2 < 1)
    return _adaptive(lambda v, squared: beta2 * v + (1 - beta2) * squared, lr=lr, beta1=beta1, tau=tau)


def fed_yogi(*, lr: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerStep:
    """FedYogi server optimiser.

        m ← β₁ m + (1 − β₁) Δ,   v ← v − (1 − β₂) Δ² sign(v − Δ²),   w ← w + η m / (√v + τ)

    Args:    lr: η > 0, per round.  beta1, beta2: in [0, 1).  tau: > 0; v starts at τ².
    Returns: step(state, Δ) → state, with slots "m" and "v".
    Source:  Reddi et al. 2021, arXiv:2003.00295, Algorithm 2; v squares Δ, not m (google-research/federated#41).
    Deviates: nothing (the paper has no bias correction either).
    """
    _check("beta2", beta2, 0 <= beta2 < 1)
    return _adaptive(
        lambda v, squared: v - (1 - beta2) * squared * (v - squared).sign(), lr=lr, beta1=beta1, tau=tau
    )


def scaffold(*, lr: float = 1.0, participation: float) -> ServerStep:
    """SCAFFOLD's server: it moves the model and its control variate c.

        w ← w + η Δ,   c ← c + (|S| / N) Δc

    Δ holds both halves: for each floating parameter `<name>` the mean model change under `<name>` and the mean change
    c_i⁺ − c_i of the clients' control variates under `control/<name>`.

    Args:    lr: η > 0, per round.  participation: |S| / N in (0, 1], the cohort's share of all clients.
    Returns: step(state, Δ) → state; c is slot "control", starting at 0, which the clients need beside the parameters.
    Source:  Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, lines 16–17.
    Deviates: nothing if Δ is a plain mean over the cohort. With weights n_k, c stays the weighted mean of the clients'
             c_i only if `participation` is the cohort's share of all examples.
    """
    _check("lr", lr, lr > 0)
    _check("participation", participation, 0 < participation <= 1)

    @torch.no_grad()
    def step(state: ServerState, delta: Tensors) -> ServerState:
        change = _fitted(state, {name: half for name, half in delta.items() if not name.startswith(CONTROL)})
        halves = {name.removeprefix(CONTROL): half for name, half in delta.items() if name.startswith(CONTROL)}
        control = _slot(state, "control", 0.0)
        drift = _fitted(state, halves)
        return _moved(
            state, change, lr, control={name: c + participation * drift[name] for name, c in control.items()}
        )

    return step


def averaging(step: ServerStep, names: Collection[str]) -> ServerStep:
    """`step`, but for some tensors, such as BatchNorm's running statistics, that become the cohort's mean: t ← t + Δ, whatever the server's optimiser.

    Returns: step(state, Δ) → state, without slots for these tensors.
    Raises:  KeyError if Δ lacks one of them.
    """

    def stepped(state: ServerState, delta: Tensors) -> ServerState:
        rest = {name: tensor for name, tensor in state.params.items() if name not in names}
        after = step(dataclasses.replace(state, params=rest), {name: change for name, change in delta.items() if name not in names})
        params = {name: after.params[name] if name in rest else tensor + delta[name].to(tensor) for name, tensor in state.params.items()}
        return dataclasses.replace(after, params=params)

    return stepped


def _adaptive(second_moment: Callable[[Tensor, Tensor], Tensor], *, lr: float, beta1: float, tau: float) -> ServerStep:
    """Algorithm 2 of Reddi et al. for one rule v ← second_moment(v, Δ²)."""
    _check("lr", lr, lr > 0)
    _check("beta1", beta1, 0 <= beta1 < 1)
    _check("tau", tau, tau > 0)

    @torch.no_grad()
    def step(state: ServerState, delta: Tensors) -> ServerState:
        delta = _fitted(state, delta)
        first, second = _slot(state, "m", 0.0), _slot(state, "v", tau**2)
        m = {name: beta1 * first[name] + (1 - beta1) * change for name, change in delta.items()}
        v = {name: second_moment(second[name], change.square()) for name, change in delta.items()}
        return _moved(state, {name: m[name] / (v[name].sqrt() + tau) for name in m}, lr, m=m, v=v)

    return step


def _check(name: str, value: float, valid: bool) -> None:
    """Raise ValueError unless the value is finite and valid."""
    if not valid or not math.isfinite(value):
        ranges = {"lr": "> 0", "tau": "> 0", "participation": "in (0, 1]"}
        raise ValueError(f"server step: {name}={value}: expected a finite number {ranges.get(name, 'in [0, 1)')}")


def _floating(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _fitted(state: ServerState, delta: Tensors) -> Tensors:
    """The floating part of Δ in the parameters' dtype and device; ValueError unless it matches theirs by name and shape."""
    params, delta = _floating(state.params), _floating(delta)
    check_same_names(params, delta, "server step: parameters (left) against the mean update (right)")
    return {name: delta[name].to(param) for name, param in params.items()}


def _slot(state: ServerState, name: str, start: float) -> Tensors:
    """The named slot, or one filled with `start` in the first round."""
    params = _floating(state.params)
    if name not in state.slots:
        return {key: torch.full_like(param, start) for key, param in params.items()}
    check_same_names(params, state.slots[name], f"server step: parameters (left) against slot {name!r} (right)")
    return state.slots[name]


def _moved(state: ServerState, direction: Tensors, lr: float, **slots: Tensors) -> ServerState:
    """The next state: floating parameters moved by lr × direction, the given slots replaced."""
    params = {name: tensor + lr * direction[name] if name in direction else tensor for name, tensor in state.params.items()}
    return ServerState(params=params, round=state.round + 1, slots={**state.slots, **slots})
