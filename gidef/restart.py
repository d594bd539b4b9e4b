"""Which launcher's job this process belongs to, so that a job which its launcher starts again goes on by itself. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

RECIPE = "recipe.json"


def job(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the job, of which a later life of it has at least one; [] where nobody would start it again.

    slurm-N:     a Slurm job, which keeps its number when it is requeued.
    torchrun-ID: torchrun's --rdzv-id (a fresh one with --standalone), which every host and every membership change share.
    agent-…:     the torchrun agent on this host, for a single host without an id.
    """
    names = []
    if number := environ.get("SLURM_JOB_ID"):
        names.append(f"slurm-{number}")
    if run := environ.get("TORCHELASTIC_RUN_ID"):
        names += [f"torchrun-{run}"] if run != "none" else []
        names.append(f"agent-{socket.gethostname()}-{os.getppid()}")
    return names


def began(folder: Path, environ: Mapping[str, str] = os.environ) -> str | None:
    """The name under which an earlier life of this job began the run in `folder`, or None.

    A Slurm job's number counts only after a requeue: in an interactive allocation all runs have the same.
    """
    try:
        theirs = json.loads((folder / RECIPE).read_text()).get("job", [])
    except (OSError, ValueError, AttributeError):
        return None
    return next((name for name in job(environ) if name in theirs and _again(name, environ)), None)


def remember(runs: Path, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Leave a note in `runs` by which a later life finds the folder that this one chose. Raises OSError."""
    for name in job(environ):
        note = _note(runs, name)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(folder))


def recall(runs: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of this job's unfinished run, as an earlier life left it in `runs`; None without one."""
    for name in job(environ):
        try:
            folder = Path(_note(runs, name).read_text())
        except OSError:
            continue
        if _again(name, environ) and not (folder / "results.json").exists() and began(folder, environ):
            return folder
    return None


def _again(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a name that an earlier process had too means that the launcher started this one again."""
    return not name.startswith("slurm-") or environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _note(runs: Path, name: str) -> Path:
    return runs / ".jobs" / hashlib.sha256(name.encode()).hexdigest()[:20]
