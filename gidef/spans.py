"""Names for stretches of a run, which `gidef profile` tells apart. While nobody profiles, they cost a fraction of a microsecond."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

PREFIX = "gidef: "
"""Of a stretch's name in a trace."""
_watched = False


def span(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: calls of the function are a stretch of that name. Stretches nest."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def named(*args: Any, **options: Any) -> Any:
            if not _watched:
                return function(*args, **options)
            with torch.profiler.record_function(PREFIX + name):
                return function(*args, **options)

        return named

    return decorate


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, stretches go to the profiler that is running."""
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before
