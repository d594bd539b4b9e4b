"""`gidef doctor`: what this machine has, what is missing, and how to get it. Imports nothing heavy until it has to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REQUIRED = ("torch", "torchvision", "timm", "medmnist", "webdataset", "rich", "tyro", "torchmetrics", "scipy", "numpy", "safetensors", "matplotlib")
OPTIONAL = {"deepspeed": "pip install 'gidef[deepspeed]'", "opacus": "pip install 'gidef[dp]' (DPSGD only)", "skimage": "pip install 'gidef[test]' (tests only)", "pytest": "pip install 'gidef[test]'"}
STALE_LOCK_S = 600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """level: "ok", "note" (works without it) or "problem".  cure: what to do, empty if nothing."""

    level: str
    what: str
    cure: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which a reader wants them."""
    return [*_python(), *_packages(), *_torch_pair(), *_devices(), *_launch(), *_locks(), *_data()]


def _python() -> list[Finding]:
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("problem", f"Python {version}", "gidef is tested on Python 3.11 to 3.13: make the virtual environment with one of these.")]
    return [Finding("ok", f"Python {version}, {platform.platform()}, {os.cpu_count()} cores")]


def _packages() -> list[Finding]:
    found = []
    for name in REQUIRED:
        try:
            found.append(Finding("ok", f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("problem", f"{name} is missing", f"pip install {name}, or pip install -e . in gidef's folder."))
    for name, cure in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            found.append(Finding("note", f"{name} is not installed (optional)", cure))
    return found


def _torch_pair() -> list[Finding]:
    """A torchvision built for another torch fails at import, and timm with it."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
        return []
    import torch

    try:
        import torchvision
    except (RuntimeError, ImportError, OSError) as error:  # a missing operator, symbol or library
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return [
            Finding(
                "problem", f"torchvision does not load beside this torch ({torch.__version__}, {build}): {error}",
                "install both from the same index: pip install --force-reinstall torch torchvision.",
            )
        ]  # fmt: skip
    return [Finding("ok", f"torch {torch.__version__} and torchvision {torchvision.__version__} load together")]


def _devices() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch
    import torch.distributed as dist

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(Finding("ok", f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"))
    elif torch.version.cuda and Path("/proc/driver/nvidia").exists():
        found.append(Finding("problem", "an NVIDIA driver is loaded, but torch sees no GPU", "compare nvidia-smi's CUDA version with torch.version.cuda."))
    else:
        found.append(Finding("note", "no GPU: everything runs on the CPU"))
    for backend, available in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        if available:
            found.append(Finding("ok", f"torch.distributed has {backend}"))
        else:
            level = "problem" if backend == "gloo" else "note"
            found.append(Finding(level, f"torch.distributed lacks {backend}", "install a torch build that has it to run on several ranks."))
    return found


def _launch() -> list[Finding]:
    found = [
        Finding("ok", f"{name} at {path}") if (path := shutil.which(name)) else Finding("note", f"{name} is not on the PATH", cure)
        for name, cure in (
            ("torchrun", "activate the virtual environment (. .venv/bin/activate)."),
            ("sbatch", "only needed to queue on SLURM."),
        )
    ]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    found.append(Finding("ok" if free > 2 else "problem", f"{free:.1f} GiB free in {Path.cwd()}", "" if free > 2 else "free some space before a run."))
    if not os.access(Path.cwd(), os.W_OK):
        found.append(Finding("problem", f"{Path.cwd()} is not writable", "runs are saved below it by default: pass --out, or change the folder."))
    return found


def _locks() -> list[Finding]:
    """A process killed while it compiled an extension leaves a lock that makes every later start wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    if not root.is_dir():
        return []
    now = time.time()
    stale = [path for path in root.rglob("lock") if path.is_file() and now - path.stat().st_mtime > STALE_LOCK_S]
    return [Finding("problem", f"stale lock of a killed compilation: {path}", "delete it if nothing is compiling; DeepSpeed waits on it for ever.") for path in stale]


def _data() -> list[Finding]:
    folder = os.environ.get("GIDEF_DATA")
    if not folder:
        return [Finding("note", "GIDEF_DATA is not set: data come from --data.path, the MedMNIST cache or a download")]
    path = Path(folder).expanduser()
    if not path.is_dir():
        return [Finding("problem", f"GIDEF_DATA={folder} is no folder", "set it to a folder of <name>.npz files, or unset it.")]
    names = sorted(file.name for file in path.glob("*.npz"))
    return [Finding("ok", f"GIDEF_DATA={folder} holds {', '.join(names) or 'no .npz file'}")]
