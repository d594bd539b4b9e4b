"""One queue of task numbers that all ranks and all their worker threads pull from."""

from __future__ import annotations

import threading
import uuid

from gidef.parallel.world import World


class Queue:
    """The numbers 0 … length − 1, each handed out once, in order, over all ranks and threads.

    All ranks make a queue together; after that any thread of any rank calls `take`, as often as it likes, and waits for nobody.
    The count is one integer in the store through which the ranks met: no further port, and nobody has to serve it. Its name is
    drawn anew for every queue, so that no queue can meet the count of an earlier one.
    """

    def __init__(self, world: World, length: int) -> None:
        self._length, self._lock = length, threading.Lock()
        self._taken, self._ended = 0, False
        self._name = world.broadcast_json(f"gidef/queue/{uuid.uuid4().hex}")
        self._watch = world.watch

    def take(self) -> int | None:
        """The next number that nobody has had, or None at the end. Raises RankFailure if the store's host is gone."""
        with self._lock:
            if self._ended:
                return None
            self._ended = True  # also when the store fails: the other threads are not to wait for it in turn
            self._taken = self._taken + 1 if self._watch is None else self._watch.count(self._name)
            self._ended = self._taken > self._length
            return None if self._ended else self._taken - 1
