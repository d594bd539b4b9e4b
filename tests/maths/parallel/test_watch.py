"""The common name of one life of the ranks, in a store that outlives them."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from gidef.parallel.watch import fresh_name


def life(store: dist.Store, ranks: list[int], size: int, *, late: dict[int, threading.Event] | None = None, timeout_s: float = 20) -> dict[int, str]:
    """Names by rank, or the error's text; ranks that are not listed never come."""
    found: dict[int, str] = {}

    def come(rank: int) -> None:
        if late and rank in late:
            late[rank].wait(10)
        try:
            found[rank] = fresh_name(store, rank, size, timeout_s=timeout_s)
        except RuntimeError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for event in (late or {}).values():
        event.set()
    for thread in threads:
        thread.join()
    return found


def test_every_life_gets_a_name_of_its_own_whatever_earlier_ones_left() -> None:
    store, names = dist.HashStore(), []
    for size in (2, 3, 1, 3):
        found = life(store, list(range(size)), size)
        assert len(set(found.values())) == 1 and len(found) == size
        names.append(found[0])
    assert len(set(names)) == 4


def test_a_rank_that_comes_late_gets_the_new_name_though_its_dead_self_was_answered_before() -> None:
    store = dist.HashStore()
    old = life(store, [0, 1, 2], 3)[0]
    found = life(store, [0, 1, 2], 3, late={2: threading.Event()})
    assert len(set(found.values())) == 1 and old not in found.values()


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    life(store, [0, 1, 2], 3)  # a dead life, whose words are still there
    found = life(store, [0, 1], 3, timeout_s=0.3)
    assert found[0] == "no answer from ranks [2]"
    assert life(dist.HashStore(), [1], 2, timeout_s=0.1) == {1: "no answer from rank 0"}


@pytest.mark.parametrize("size", [1, 5])
def test_all_come_at_once(size: int) -> None:
    assert len(set(life(dist.HashStore(), list(range(size)), size).values())) == 1
