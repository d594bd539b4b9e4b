"""What clients keep between rounds, such as private modules and control variates, in a folder that all ranks share."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path

import torch

from gidef.checkpoint import load_file, save_file
from gidef.errors import InputError, StorageError
from gidef.types import Tensors

_FILE = re.compile(r"client-(\d+)\.round-(\d+)\.safetensors(\.[0-9a-f]+\.tmp)?")


class ClientStore:
    """Clients' states by (client, version), a version being the last round in which the client took part.

    Every state is a file of its own, `client-00012.round-00007.safetensors`, written whole or not at all, so a client may follow to any
    rank; the `memory` states used last also stay in memory. Several ranks may write different clients, and several threads
    may use one store. What `get` returns belongs to the caller.

    Args: folder: shared by all ranks.  memory: states held in memory on this rank, at least 0.
    """

    def __init__(self, folder: Path | str, *, memory: int) -> None:
        if memory < 0:
            raise ValueError(f"memory={memory}: the number of states to hold cannot be negative")
        self.folder = Path(folder)
        self._memory = memory
        self._states: OrderedDict[tuple[int, int], Tensors] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, client: int, version: int | None, device: torch.device | str = "cpu") -> Tensors | None:
        """The client's state after round `version`; None for version None, a client that has not taken part yet.

        Raises: InputError when that state is missing or damaged.
        """
        if version is None:
            return None
        with self._lock:
            state = self._states.get((client, version))
        if state is None:
            state = self._read(client, version)
        self._remember(client, version, state)
        return {name: tensor.to(device, copy=True) for name, tensor in state.items()}

    def put(self, client: int, round: int, tensors: Tensors) -> None:
        """Store the client's state after `round`; the same round again replaces it. Raises InputError when the disk is full."""
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        save_file(self._path(client, round), state, {"client": client, "round": round})
        self._remember(client, round, state)

    def prune(self, keep: set[tuple[int, int]]) -> None:
        """Remove, of each client in `keep`, the states older than its newest there, except those in `keep` themselves.

        `keep` holds the (client, version) pairs that the kept checkpoints refer to. Newer states, such as those of a round not yet
        saved, and the states of clients that are not in `keep` stay. Several ranks may prune at once.
        """
        newest = dict(sorted(keep))  # sorted: a client's last version wins

        def is_old(client: int, version: int) -> bool:
            return (client, version) not in keep and version < newest.get(client, -1)

        for path in self.folder.glob("client-*"):
            match = _FILE.fullmatch(path.name)
            if match and is_old(int(match[1]), int(match[2])):
                path.unlink(missing_ok=True)
        with self._lock:
            for key in [key for key in self._states if is_old(*key)]:
                del self._states[key]

    def _path(self, client: int, version: int) -> Path:
        return self.folder / f"client-{client:05d}.round-{version:05d}.safetensors"

    def _read(self, client: int, version: int) -> Tensors:
        """The state in the file, which must be that client's and that round's."""
        try:
            state, meta = load_file(self._path(client, version))
        except InputError as error:
            raise StorageError(
                f"client {client} took part in round {version}, but its state of that round cannot be read: {error}. "
                "All ranks must see the same folder; restore the file, or start over in an empty folder"
            ) from error
        if meta != {"client": client, "round": version}:
            raise StorageError(f"{self._path(client, version)} holds the state of {meta}: a renamed file? Restore it, or start over")
        return state

    def _remember(self, client: int, version: int, state: Tensors) -> None:
        """Put a state at the recent end and forget the least recent beyond `memory`."""
        with self._lock:
            self._states[client, version] = state
            self._states.move_to_end((client, version))
            while len(self._states) > self._memory:
                self._states.popitem(last=False)
