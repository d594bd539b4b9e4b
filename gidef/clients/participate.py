"""A client's part in a round under a share policy: what it loads, trains, sends and keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch

from gidef.clients.local import LocalResult, LocalSettings, Player, load_parameters, train_locally
from gidef.clients.recorded import Recorder
from gidef.clients.vectorised import cut_into_groups, train_together
from gidef.rng import generator
from gidef.spans import span
from gidef.types import Client, Own, ServerState, Tensors, Update

SharePolicy = Literal["full", "head", "all"]
CONTROL = "control/"
"""Prefix of SCAFFOLD's control variates in an update and in a client's state."""
DECODER = "decoder."
AT_HAND = 8
"""Of its images that a client looks at, at most, when it changes an update: trial losses and Jacobians of more would cost like training."""


class Store(Protocol):
    def get(self, client_id: int, version: int | None) -> Tensors | None: ...
    def put(self, client_id: int, round: int, tensors: Tensors) -> None: ...


class _Begun(NamedTuple):
    """What a client starts its round with: all tensors, the model's, SCAFFOLD's correction and control variate, and whether it is new."""

    tensors: Tensors
    start: Tensors
    correction: Callable[[str], torch.Tensor] | None
    control: Tensors
    first: bool


def shared_names(initial: Tensors, predictor: Sequence[str], policy: SharePolicy) -> tuple[str, ...]:
    """Names of the tensors that leave the client: `full` the whole classifier, `head` its predictor, `all` the decoder too."""
    if policy == "head":
        return tuple(predictor)
    return tuple(name for name in initial if policy == "all" or not name.startswith(DECODER))


class Participation:
    """Trains a client in a round and applies the share policy.

    Args:
        players:  one per worker thread.
        initial:  every tensor that a client starts from, the decoder's under `decoder.`.
        shared:   names of the tensors that leave the client; all others are client state.
        store:    keeps client state between rounds; `versions` says which round's state of a client is current.
        rounds:   total number, for the progress that schedules see.
        share:    what leaves of an update: share(delta, generator=…, own=…); None lets all leave as it is. Control variates are not changed.
        scaffold: add control variates (Karimireddy et al. 2020, option II). Their mean is unweighted, as published:
                  each update then counts as one example.
        alike:    each update counts as one example, whatever the client's size.
        statistics: those of the initial tensors that are running statistics: they move like the others, and are sent or kept like them, but no
                  `share` changes them, and no control variate corrects them.
        train_player: `train_locally`, or its twin for a client on several ranks (see clients.sharded); initial and server tensors are then slices.
    """

    def __init__(
        self, players: Sequence[Player], initial: Tensors, shared: Sequence[str], settings: LocalSettings, store: Store,
        *, seed: int, rounds: int, scaffold: bool = False, share: Callable[..., Tensors] | None = None, alike: bool = False,
        statistics: Sequence[str] = (), train_player: Callable[..., LocalResult] = train_locally,
    ) -> None:  # fmt: skip
        self.players, self._initial, self._shared = players, initial, frozenset(shared)
        self._settings, self._store, self._seed, self._rounds, self._scaffold = settings, store, seed, rounds, scaffold
        self._share, self._alike, self._train_player = share, alike or scaffold, train_player
        self._private = tuple(name for name in initial if name not in self._shared)
        self._statistics = frozenset(statistics)
        self._stacked = [None if statistics else getattr(player, "stacked", lambda: None)() for player in players]
        self.recorder: Recorder | None = Recorder()
        """Of the steps of clients that train as one program; None: they go unrecorded."""
        self.at_once = 1
        """Clients that train as one program, see `groups`."""
        self.versions: dict[int, int] = {}
        """client → the last round in which it took part; the consumer of the rounds keeps it, the same on every rank."""

    def template(self) -> Tensors:
        """Names, shapes and dtypes of an update's delta."""
        shared = {name: tensor for name, tensor in self._initial.items() if name in self._shared}
        if self._scaffold:
            shared |= {CONTROL + name: self._initial[name] for name in shared if name not in self._statistics}
        return shared

    def state(self, client_id: int, versions: Mapping[int, int] | None = None) -> Tensors:
        """The model's and decoder's tensors that the client keeps, as they stand: the common initialisation before its first round. versions: take
        them from there, as they stood then."""
        kept = self._kept(client_id, versions)
        return {name: kept[name] for name in self._private}

    def _kept(self, client_id: int, versions: Mapping[int, int] | None = None) -> Tensors:
        """`state`, and SCAFFOLD's control variate beside it once there is one."""
        versions = self.versions if versions is None else versions
        stored = self._store.get(client_id, versions.get(client_id)) if self._private or self._scaffold else None
        return stored if stored is not None else {name: self._initial[name] for name in self._private}

    @property
    def can_vectorise(self) -> bool:
        """Whether the players' game can be stacked at all."""
        return None not in self._stacked

    @property
    def moves_statistics(self) -> bool:
        """Whether clients move running statistics of BatchNorm."""
        return bool(self._statistics)

    def groups(self, cohort: Sequence[Client]) -> list[list[int]]:
        """Positions in the cohort of the clients that train as one program: a function of the cohort and `at_once` alone."""
        if self.at_once == 1:
            return [[position] for position in range(len(cohort))]
        return cut_into_groups([client.num_examples for client in cohort], self.at_once)

    @span("client")
    def train(self, server: ServerState, client: Client, worker: int = 0) -> Update:
        """Local training in round `server.round`; only the returned update leaves the client."""
        begun = self._begin(server, client)
        return self._end(server, client, self.players[worker], begun, *self._alone(server, client, begun, self._settings, worker))

    def train_group(self, server: ServerState, clients: Sequence[Client], worker: int = 0) -> list[Update]:
        """`train` of several clients as one program, or of one."""
        if len(clients) == 1:
            return [self.train(server, clients[0], worker)]
        begun = [self._begin(server, client) for client in clients]
        results = self._together(server, clients, begun, self._settings, worker)
        return [self._end(server, client, self.players[worker], own, *result) for client, own, result in zip(clients, begun, results, strict=True)]

    def rehearse(self, server: ServerState, clients: Sequence[Client], steps: int) -> int:
        """The first steps of `train_group`, of which nothing is left; returns how many all clients took together."""
        settings, begun = dataclasses.replace(self._settings, steps=steps), [self._begin(server, client) for client in clients]
        if len(clients) == 1:
            return self._alone(server, clients[0], begun[0], settings, 0)[0].steps
        return sum(result.steps for result, _ in self._together(server, clients, begun, settings, 0))

    def _alone(self, server: ServerState, client: Client, begun: _Begun, settings: LocalSettings, worker: int) -> tuple[LocalResult, Tensors]:
        """What local training makes of the model, and the decoder as it is then."""
        player = self.players[worker]
        if player.kept is not None:
            load_parameters(player.kept, _decoders(begun.tensors))
        player.begin(client, seed=self._seed, round=server.round, progress=self._progress(server), first=begun.first)
        result = self._train_player(player, begun.start, client, settings, seed=self._seed, round=server.round, correction=begun.correction)
        return result, {name: p.detach().clone() for name, p in player.kept.named_parameters()} if player.kept is not None else {}

    def _together(
        self, server: ServerState, clients: Sequence[Client], begun: Sequence[_Begun], settings: LocalSettings, worker: int
    ) -> list[tuple[LocalResult, Tensors]]:
        """`_alone` of each, as one program."""
        return train_together(
            self._stacked[worker], [own.start for own in begun], [_decoders(own.tensors) for own in begun], clients, settings,
            seed=self._seed, round=server.round, progress=self._progress(server), first=[own.first for own in begun],
            corrections=[own.correction for own in begun] if self._scaffold else None, recorder=self.recorder,
        )  # fmt: skip

    def _progress(self, server: ServerState) -> float:
        return server.round / max(self._rounds, 1)

    def _begin(self, server: ServerState, client: Client) -> _Begun:
        kept = self._kept(client.id)
        tensors = {name: server.params.get(name, kept.get(name)) for name in self._initial}
        start = {name: tensor for name, tensor in tensors.items() if not name.startswith(DECODER)}
        correction, control = self._correction(server, kept) if self._scaffold else (None, {})
        return _Begun(tensors, start, correction, control, client.id not in self.versions)

    def _end(self, server: ServerState, client: Client, player: Player, begun: _Begun, result: LocalResult, decoder: Tensors) -> Update:
        """What leaves and what stays."""
        tensors, start, control = begun.tensors, begun.start, begun.control
        delta = {name: step.to(start[name].device) for name, step in result.delta.items()}
        after = {name: start[name] + delta[name] for name in self._private if name in start}
        decoder = {DECODER + name: tensor.to(tensors[DECODER + name].device) for name, tensor in decoder.items()}
        after |= decoder
        delta |= {name: tensor - tensors[name] for name, tensor in decoder.items()}
        keep = {name: after[name] for name in self._private}
        sent = {name: delta[name] for name in self._initial if name in self._shared}
        if self._share is not None:
            params = {name: after.get(name, tensor) for name, tensor in start.items() if name not in self._statistics}
            own, changed = self._at_hand(player, params, client, server.round), {name: step for name, step in sent.items() if name not in self._statistics}
            sent = {**sent, **self._share(changed, generator=generator(self._seed, "share", server.round, client.id), own=own)}
        if self._scaffold:
            moved = {name: -step / (result.steps * self._settings.lr) for name, step in sent.items() if name not in self._statistics}  # (x − y) / (K η)
            server_control = server.slots.get("control", {})
            for name, gradient in moved.items():
                old = control.get(name, torch.zeros_like(gradient))
                new = old - server_control.get(name, torch.zeros_like(gradient)) + gradient
                keep[CONTROL + name] = new
                sent[CONTROL + name] = new - old
        if keep:
            self._store.put(client.id, server.round, keep)
        return Update(sent, 1 if self._alike else client.num_examples, {"loss": result.loss})

    def _at_hand(self, player: Player, params: Tensors, client: Client, round: int) -> Own:
        """Some of the client's images, beside its model."""
        rows = torch.randperm(len(client.labels), generator=generator(self._seed, "at hand", round, client.id))[:AT_HAND].to(client.images.device)
        device = next(player.model.parameters()).device
        images = client.images[rows].to(device, torch.float32).div_(255)
        return Own(player.model, {name: tensor.to(device) for name, tensor in params.items()}, images, client.labels[rows].to(device))

    def _correction(self, server: ServerState, kept: Tensors) -> tuple[Callable[[str], torch.Tensor], Tensors]:
        """SCAFFOLD's c − c_i, and c_i; private parameters are not corrected."""
        control = {name.removeprefix(CONTROL): t for name, t in kept.items() if name.startswith(CONTROL)}
        control = {name: t.to(self._initial[name].device) for name, t in control.items()}  # the store is in main memory
        server_control = server.slots.get("control", {})

        def correction(name: str) -> torch.Tensor:
            zero = torch.zeros_like(self._initial[name])
            return server_control.get(name, zero) - control.get(name, zero) if name in self._shared else zero

        return correction, control


def _decoders(tensors: Tensors) -> Tensors:
    """The decoder's tensors under its own names."""
    return {name.removeprefix(DECODER): tensor for name, tensor in tensors.items() if name.startswith(DECODER)}
