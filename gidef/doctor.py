"""`gidef doctor`: what this machine has, what is missing, and how to get it; under a launcher, what does not fit between the ranks.

Imports nothing heavy until it has to.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "torchvision", "timm", "medmnist", "webdataset", "rich", "tyro", "torchmetrics", "scipy", "numpy", "pillow", "safetensors", "matplotlib")
OPTIONAL = {
    "deepspeed": "pip install -e '.[deepspeed]'", "opacus": "pip install -e '.[dp]' (DPSGD only)",
    "tensorboard": "pip install -e '.[tensorboard]' (--log tensorboard only)", "wandb": "pip install -e '.[wandb]' (--log wandb only)",
    "breaching": "pip install -e '.[bench]' (comparisons only)", "pfl": "pip install -e '.[bench]' (comparisons only)",
    "skimage": "pip install -e '.[test]' (tests only)", "pytest": "pip install -e '.[test]'",
}  # fmt: skip
STALE_LOCK_S = 600.0
ALIKE = ("torch", "torchvision", "timm", "numpy", "safetensors")
"""Packages whose versions decide results: the same on every rank."""
APART_S = 1.0
"""Clocks further apart make nonsense of the times in records, and of files' ages."""
JOIN_S = 60.0
"""Wait for the other ranks."""


@dataclass(frozen=True, slots=True)
class Finding:
    """level: "ok", "note" (works without it) or "problem".  cure: what to do, empty if nothing."""

    level: str
    what: str
    cure: str = ""


def examine(out: str | None = None) -> list[Finding]:
    """All checks of this process, in the order in which a reader wants them. out: a run's folder, which is to be written to."""
    return _examine(out) + ([] if out is None else _folder(Path(out)))


def _examine(out: str | None) -> list[Finding]:
    """All checks of this process but the folder's."""
    return [*_python(), *_packages(), *_torch_pair(), *_devices(), *_launch(), *_fabric(os.environ), *_locks(Path(out or "runs")), *_data()]


def examine_ranks(out: str | None = None) -> list[Finding]:
    """All checks of all ranks that a launcher started, which call this together: the first rank's, what else the others found, and what
    differs between them. The same list on every rank. out: a run's folder (default: this one), which they are to share."""
    from gidef.errors import InputError
    from gidef.parallel import open_world, seats

    own = _examine(out)
    if lost := [finding for finding in own if finding.level == "problem" and "SOCKET_IFNAME" in finding.what]:
        return lost  # nobody can be met through an interface that is not there
    try:
        with open_world("cpu", JOIN_S) as world:
            names = [f"rank {seat.rank} ({seat.host})" for seat in seats(world)]
            first, *others = world.all_gather_json([asdict(finding) for finding in own])
            known = [finding["what"] for finding in first if finding["level"] != "ok"]
            found = [Finding(**finding) for finding in first]
            for name, told in zip(names[1:], others, strict=True):
                odd = (finding for finding in told if finding["level"] != "ok" and finding["what"] not in known)
                found += [Finding(finding["level"], f"{name}: {finding['what']}", finding["cure"]) for finding in odd]
            machines = world.all_gather_json([socket.gethostname(), _loopback()])
            return [*found, *_reached(names, machines), *_versions(world, names), *_clocks(world, names), *_shared(world, names, Path(out or "."))]
    except InputError:
        raise
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        cure = f"did every rank start, and can it reach {where}? Behind a firewall, or with several interfaces, set GLOO_SOCKET_IFNAME."
        return [*own, Finding("problem", f"the ranks did not meet within {JOIN_S:.0f} s: {str(error).splitlines()[0]}", cure)]


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


def _fabric(environ: Mapping[str, str]) -> list[Finding]:
    """Interfaces that the environment names, and whether other hosts can reach this one by its name."""
    there, found = [name for _, name in socket.if_nameindex()], []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if not (text := environ.get(variable)):
            continue
        avoids = text.startswith("^")  # NCCL: ^ all but these, = exactly these, else by their beginnings; gloo: exactly these
        names = text.removeprefix("^").removeprefix("=").split(",")
        exact = variable.startswith("GLOO") or text.lstrip("^").startswith("=")
        fits = {name: [one for one in there if one == name or not exact and one.startswith(name)] for name in names}
        missing = [] if avoids else [name for name in names if not fits[name]]
        if missing and (exact or len(missing) == len(names)):
            cure = f"this host has {', '.join(there)}: name one of them, or unset the variable."
            found.append(Finding("problem", f"{variable}={text}: there is no interface {', '.join(missing)}", cure))
        else:
            found.append(Finding("ok", f"{variable}={text}"))
    hosts = environ.get("SLURM_JOB_NUM_NODES") or environ.get("GROUP_WORLD_SIZE") or "1"
    if hosts.isdigit() and int(hosts) > 1 and "RANK" not in environ and "SLURM_STEP_NUM_TASKS" not in environ and _loopback():
        found.append(_unreachable(f"this host's name, {socket.gethostname()}, stands"))
    return found


def _loopback() -> bool:
    """Whether gloo, which takes the address of this host's name, would offer one that only this host can reach."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return False
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return True
    return all(str(address).startswith("127.") or address == "::1" for address in addresses)


def _unreachable(who: str) -> Finding:
    cure = "set GLOO_SOCKET_IFNAME to the interface between the hosts (see `ip -br addr`), or mend /etc/hosts."
    return Finding("problem", f"{who} for its loopback address, where no other host can reach it", cure)


def _reached(names: list[str], machines: list[Any]) -> list[Finding]:
    """On several machines, none may offer its loopback address."""
    if len({machine for machine, _ in machines}) == 1:
        return [Finding("ok", f"{len(names)} ranks on one machine")]
    found = [_unreachable(f"{name}: its host's name, {machine}, stands") for name, (machine, loops) in zip(names, machines, strict=True) if loops]
    return found or [Finding("ok", f"{len(names)} ranks on {len({machine for machine, _ in machines})} machines")]


def _versions(world: Any, names: list[str]) -> list[Finding]:
    """What decides the bits of a result is to be the same on every rank."""
    import torch

    import gidef

    own = {"python": platform.python_version(), "gidef": gidef.__version__}
    for name in ALIKE:
        try:
            own[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            own[name] = "missing"
    own["vector instructions"] = torch.backends.cpu.get_cpu_capability()
    told, found = world.all_gather_json(own), []
    for name in own:
        common, _ = Counter(one[name] for one in told).most_common(1)[0]
        if odd := [f"{one[name]} on {rank}" for rank, one in zip(names, told, strict=True) if one[name] != common]:
            hardware = name == "vector instructions"
            cure = (
                "the last bits of a client's update depend on where it trains: take nodes of one kind to repeat a run bit by bit."
                if hardware else "install the same on every host, or share one environment."
            )  # fmt: skip
            found.append(Finding("note" if hardware else "problem", f"{name} differs between ranks: {common}, but {', '.join(odd)}", cure))
    return found or [Finding("ok", f"the same versions on {len(names)} ranks")]


def _clocks(world: Any, names: list[str]) -> list[Finding]:
    world.barrier()
    told = world.all_gather_json(time.time())
    middle = sorted(told)[len(told) // 2]
    odd = [f"{rank} by {clock - middle:+.1f} s" for rank, clock in zip(names, told, strict=True) if abs(clock - middle) > APART_S]
    if odd:
        return [Finding("problem", f"clocks differ: {', '.join(odd)}", "let the hosts keep time by NTP (chronyd, systemd-timesyncd).")]
    return [Finding("ok", f"clocks agree within {max(max(told) - min(told), 0.01):.2f} s")]


def _folder(folder: Path) -> list[Finding]:
    """A run's folder is to be written to; what was not there is not there afterwards."""
    made = _missing(folder)
    token = folder / f".gidef-doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text("a look by gidef doctor\n")
        token.unlink()
        for one in made:
            one.rmdir()
    except OSError as error:
        return [Finding("problem", f"{folder} cannot be written to: {error.strerror}", "choose another --out, or mend its permissions.")]
    return [Finding("ok", f"{folder} can be written to")]


def _shared(world: Any, names: list[str], folder: Path) -> list[Finding]:
    """Every rank is to read what the first one writes there, and the other way round; file systems of a network may take a while to show it."""
    failed = _folder(folder)[0] if world.rank == 0 else None
    unfit = world.broadcast_json(asdict(failed) if failed is not None and failed.level == "problem" else None)
    if unfit:
        return [Finding(**{**unfit, "what": f"{names[0]}: {unfit['what']}"})]
    made = _missing(folder)
    stem, text = world.broadcast_json([f".gidef-doctor-{uuid.uuid4().hex}", uuid.uuid4().hex])
    own, problem = folder / f"{stem}-{world.rank}", None
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(text)
    world.barrier()
    if world.rank != 0:
        if not _comes(folder / f"{stem}-0", text):
            problem = f"does not see what {names[0]} writes to {folder}"
        else:
            try:
                own.write_text(text)
            except OSError as error:
                problem = f"cannot write to {folder}: {error.strerror}"
    problems = world.all_gather_json(problem)
    if world.rank == 0:
        unseen = [rank for rank in range(1, world.size) if problems[rank] is None and not _comes(folder / f"{stem}-{rank}", text)]
        problems = [f"writes to another {folder} than {names[0]}" if rank in unseen else told for rank, told in enumerate(problems)]
    problems = world.broadcast_json(problems)
    if problems[world.rank] is None:
        own.unlink(missing_ok=True)
    world.barrier()
    for one in made if world.rank == 0 else ():
        one.rmdir()
    cure = "ranks meet in the run's folder: give an --out on a file system that all hosts share."
    found = [Finding("problem", f"{name} {told}", cure) for name, told in zip(names, problems, strict=True) if told]
    return found or [Finding("ok", f"{folder.absolute()} is shared by {len(names)} ranks")]


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, from the inside out."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def _comes(path: Path, text: str, *, wait_s: float = 5.0) -> bool:
    """Whether the file is there with that text, soon."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        time.sleep(0.1)
    return False


def _locks(folder: Path) -> list[Finding]:
    """A process killed while it compiled an extension leaves a lock that makes every later start wait for ever: of the user, or of a run that
    launch/ranks.sh started in the folder or below it."""
    own = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    now, stale = time.time(), set()
    for root in (own, *folder.glob("extensions"), *folder.glob("*/extensions")):
        for path in root.rglob("lock"):
            with contextlib.suppress(OSError):  # a compilation ends meanwhile
                if path.is_file() and now - path.stat().st_mtime > STALE_LOCK_S:
                    stale.add(path)
    return [Finding("problem", f"stale lock of a killed compilation: {path}", "delete it if nothing is compiling; DeepSpeed waits on it for ever.") for path in sorted(stale)]


def _data() -> list[Finding]:
    folder = os.environ.get("GIDEF_DATA")
    if not folder:
        return [Finding("note", "GIDEF_DATA is not set: data come from --data.path, the MedMNIST cache or a download")]
    path = Path(folder).expanduser()
    if not path.is_dir():
        return [Finding("problem", f"GIDEF_DATA={folder} is no folder", "set it to a folder of <name>.npz files, or unset it.")]
    names = sorted(file.name for file in path.glob("*.npz"))
    return [Finding("ok", f"GIDEF_DATA={folder} holds {', '.join(names) or 'no .npz file'}")]
