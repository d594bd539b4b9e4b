"""Threads inside one rank: workers that share out items, and one beside the calling thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import Any, TypeVar

import torch

from gidef.errors import Diverged

Item = TypeVar("Item")


def run_on_threads(
    do: Callable[[Item, int], None],
    items: Sequence[Item],
    *,
    workers: int,
    threads: int,
    device: torch.device,
    stop_at_error: bool = False,
    on_done: Callable[[Item], None] | None = None,
) -> dict[int, Exception]:
    """Call `do(item, worker)` for every item, in order, on `workers` threads; an item's error does not stop the others.

    worker: 0 ... workers − 1, one item at a time each, so that it can own a model copy. Each worker computes with
    `threads` threads of its own. One worker runs in the calling thread, where a signal's exception
    stops it at once; with several, an exception raised by a signal handler cancels what has not started and
    propagates, while what is running still ends in the background.

    Args:    stop_at_error: start nothing more after the first error.  on_done: called in the calling thread
             after each item that succeeded.
    Returns: index of the item → its exception, for the failed ones. KeyboardInterrupt and SystemExit propagate.
    """
    if workers < 1 or threads < 1:
        raise ValueError(f"workers={workers}, threads={threads}: both must be at least 1")
    errors: dict[int, Exception] = {}
    stop = threading.Event()

    def attempt(index: int, worker: int) -> bool:
        if stop.is_set():
            return False
        try:
            do(items[index], worker)
        except Exception as error:  # of any kind: the caller raises it, once all ranks know
            errors[index] = error
            if stop_at_error:
                stop.set()
            return False
        except BaseException:  # an exit: the others start nothing more
            stop.set()
            raise
        return True

    if workers == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for index, item in enumerate(items):
                if attempt(index, 0) and on_done is not None:
                    on_done(item)
        finally:
            torch.set_num_threads(before)
        return errors

    numbers, own = itertools.count(), threading.local()

    def start() -> None:
        own.worker = next(numbers)
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is per thread

    pool = ThreadPoolExecutor(workers, thread_name_prefix="worker", initializer=start)
    try:
        futures = {pool.submit(lambda index=index: attempt(index, own.worker)): index for index in range(len(items))}
        for future in as_completed(futures):
            if future.result() and on_done is not None:
                on_done(items[futures[future]])
    except BaseException:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return errors


class Beside:
    """Calls on one thread beside the calling one, one at a time: an evaluation runs while the next round is computed. A context manager.

    What runs there must take part in no collective, as those belong to the calling thread, in one order on all ranks, and must look at `stopped` now
    and then. What it reads must neither change nor, on a GPU, be given back before `wait` has returned. On a GPU it works on a stream of its own,
    behind all that the calling thread had launched when it called.

    An error surfaces where the calling thread waits. The context's end waits for nothing if the caller has failed: `stopped` is set, what is
    running ends in the background, and its own error, if any, is dropped for the caller's, which came first. Of a training that diverged the run goes on,
    so that what is running is waited for.

    Args: device: the rank's.  threads: that an operator computes with.
    """

    def __init__(self, device: torch.device, *, threads: int) -> None:
        self.stopped = threading.Event()
        self._device, self._threads = device, threads
        self._running: Future | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beside", initializer=self._start)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Start it, once `wait` has returned what was called before."""
        if self._running is not None:
            raise RuntimeError("a call is running: wait for it first")
        launched = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._running = self._pool.submit(self._run, launched, function, args)

    def wait(self) -> Any:
        """What the call returned. Raises what it raised."""
        running, self._running = self._running, None
        while not wait([running], timeout=1.0).done:  # open to signals, also to those that another thread was handed
            pass
        return running.result()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.stopped.set()
        self._pool.shutdown(wait=kind is None or issubclass(kind, Diverged), cancel_futures=True)

    def _start(self) -> None:
        torch.set_num_threads(self._threads)
        if self._stream is not None:
            torch.cuda.set_device(self._device)  # the current device is per thread

    def _run(self, launched: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._stream is None:
            return function(*args)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(launched)
            found = function(*args)
            self._stream.synchronize()
        return found
