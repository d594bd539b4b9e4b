"""SIGTERM: a scheduler takes the machine back, or torchrun's ranks change. The run ends where it is; its last checkpoint stays. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

MARKER = "preempted"
"""In the run's folder: a SIGTERM ended the run before its end, so whoever sent it may start it again with --resume. The run is never marked as ended."""
ENVIRON = "GIDEF_PREEMPTED"
"""Names another file in its place: an array's tasks that share a folder have one each."""


def leave_on_sigterm(folder: str | os.PathLike[str] | None, *, clear: bool = False) -> None:
    """From now on SIGTERM leaves the marker and ends the process, through its finally clauses, with status 143.

    Written from the handler itself: what follows may wait for a rank that has gone. Every rank that is told writes the same file.

    Args:    folder: the run's; None while it is unknown, which leaves no marker unless the environment names one.
             clear: remove the marker of an earlier life; one rank does.
    """
    named = os.environ.get(ENVIRON)
    marker = Path(named) if named else Path(folder, MARKER) if folder is not None else None
    if clear and marker is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be made is refused elsewhere
            marker.unlink(missing_ok=True)

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher and a scheduler may both tell: once is enough
        if marker is not None:
            with contextlib.suppress(OSError):  # a full disk must not keep the process from ending
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
