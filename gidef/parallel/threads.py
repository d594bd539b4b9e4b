"""Worker threads inside one rank."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

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
