"""Clients' state between rounds. All tensors are synthetic."""

import threading
from pathlib import Path

import pytest
import torch

from gidef.clients.store import ClientStore
from gidef.errors import InputError


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), value), "steps": torch.tensor(int(value))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("memory", [0, 1, 5])
def test_a_state_comes_back_from_memory_disk_and_another_rank_alike(memory: int, tmp_path: Path) -> None:
    here, there = ClientStore(tmp_path / "new", memory=memory), ClientStore(tmp_path / "new", memory=memory)
    assert here.get(12, None) is None
    for client in range(4):
        here.put(client, 7, state(client))
    for store in (here, there, here):
        for client in range(4):
            back = store.get(client, 7)
            assert torch.equal(back["w"], state(client)["w"]) and back["steps"].dtype == torch.int64
    assert names(tmp_path / "new")[3] == "client-00003.round-00007.safetensors"
    assert len(here._states) == min(memory, 4)


def test_callers_may_change_what_they_put_and_what_they_got(tmp_path: Path) -> None:
    store, mine = ClientStore(tmp_path, memory=2), state(1)
    store.put(0, 1, mine)
    mine["w"] += 5
    store.get(0, 1)["w"].zero_()
    assert torch.equal(store.get(0, 1)["w"], state(1)["w"])


def test_the_least_recently_used_state_leaves_memory_first(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, memory=2)
    for client in (0, 1):
        store.put(client, 0, state(client))
    store.get(0, 0)
    store.put(2, 0, state(2))
    for path in tmp_path.iterdir():
        path.unlink()
    assert store.get(0, 0) is not None and store.get(2, 0) is not None
    with pytest.raises(InputError, match="client 1 took part in round 0"):
        store.get(1, 0)


def test_a_missing_damaged_or_renamed_state_is_bad_input(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, memory=0)
    with pytest.raises(InputError, match="client 3 took part in round 9, but its state .* does not exist.*same folder"):
        store.get(3, 9)
    store.put(3, 9, state(1))
    (tmp_path / "client-00003.round-00009.safetensors").rename(tmp_path / "client-00003.round-00010.safetensors")
    with pytest.raises(InputError, match="'round': 9.*renamed"):
        store.get(3, 10)
    (tmp_path / "client-00003.round-00010.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="damaged"):
        store.get(3, 10)
    with pytest.raises(ValueError, match="memory=-1"):
        ClientStore(tmp_path, memory=-1)


def test_pruning_removes_older_states_only(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, memory=50)
    for client, version in [(0, 1), (0, 4), (0, 6), (0, 9), (1, 2), (1, 5), (2, 3)]:
        store.put(client, version, state(version))
    (tmp_path / "client-00000.round-00001.safetensors.00ff.tmp").touch()  # of a killed process
    (tmp_path / "client-00000.round-00009.safetensors.00ff.tmp").touch()  # being written
    (tmp_path / "client-notes.txt").touch()
    store.prune({(0, 4), (0, 6), (1, 5)})
    left = {name.removeprefix("client-0000").removesuffix(".safetensors").replace(".round-0000", " ") for name in names(tmp_path)}
    assert left == {"0 4", "0 6", "0 9", "0 9.safetensors.00ff.tmp", "1 5", "2 3", "client-notes.txt"}
    for client, version in [(0, 1), (1, 2)]:
        with pytest.raises(InputError):  # neither on disk nor in memory
            store.get(client, version)


def test_resuming_from_either_of_the_last_two_checkpoints_finds_every_client_s_state(tmp_path: Path) -> None:
    store, versions, past = ClientStore(tmp_path, memory=0), {}, []
    for number in range(1, 9):
        for client in (number % 4, number * number % 4):
            store.put(client, number, state(number))
            versions[client] = number
        past = [*past[-1:], dict(versions)]
        store.prune({pair for checkpoint in past for pair in checkpoint.items()})
        for checkpoint in past:
            assert all(int(store.get(client, version)["steps"]) == version for client, version in checkpoint.items())
    assert all(len(list(tmp_path.glob(f"client-0000{client}.*"))) <= 2 for client in range(4))


def test_threads_and_ranks_may_write_and_read_different_clients_at_once(tmp_path: Path) -> None:
    stores = [ClientStore(tmp_path, memory=2) for _ in range(2)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for version in range(5):
            stores[number % 2].put(number, version, state(100 * number + version))
            back = stores[(number + version) % 2].get(number, version)
            if int(back["steps"]) != 100 * number + version:
                wrong.append(number)
            stores[number % 2].prune({(number, version)})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert names(tmp_path) == [f"client-0000{number}.round-00004.safetensors" for number in range(4)]
