"""The MedMNIST sets: what the `medmnist` package knows of them, its cache, and the download."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gidef.data.download import Progress, fetch
from gidef.data.npz import md5_of
from gidef.errors import InputError

SIZES = (28, 64, 128, 224)
MODALITIES = {  # not in the package; Yang et al. 2023, table 1
    "pathmnist": "colon pathology", "chestmnist": "chest X-ray", "dermamnist": "dermatoscopy", "octmnist": "retinal OCT",
    "pneumoniamnist": "chest X-ray", "retinamnist": "fundus camera", "breastmnist": "breast ultrasound", "bloodmnist": "blood-cell microscopy",
    "tissuemnist": "kidney-cortex microscopy", "organamnist": "abdominal CT", "organcmnist": "abdominal CT", "organsmnist": "abdominal CT",
    "organmnist3d": "abdominal CT", "nodulemnist3d": "chest CT", "adrenalmnist3d": "abdominal CT", "fracturemnist3d": "chest CT",
    "vesselmnist3d": "brain MRA", "synapsemnist3d": "electron microscopy",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One set that gidef knows. why_not: the reason where `supported` is False."""

    name: str
    title: str
    modality: str
    sizes: tuple[int, ...]
    class_names: tuple[str, ...]
    task: str
    supported: bool = True
    why_not: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@functools.cache
def info() -> dict[str, dict[str, Any]]:
    """`medmnist.INFO`, read from its file: the package itself imports pandas and scikit-learn, two seconds for a table."""
    spec = importlib.util.find_spec("medmnist")
    if spec is None or spec.origin is None:
        raise InputError("the medmnist package, which lists the MedMNIST sets, is not installed: pip install medmnist.")
    spec = importlib.util.spec_from_file_location("medmnist_info", Path(spec.origin).with_name("info.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.INFO


@functools.cache
def entries() -> dict[str, Entry]:
    """All MedMNIST sets, supported or not."""
    found = {}
    for name, item in info().items():
        flat = not name.endswith("3d")
        why_not = "" if flat else "3-D volumes; gidef trains on 2-D images"
        if item["task"].startswith("multi-label"):
            why_not = "several labels per image; gidef needs one class each"
        sizes = tuple(size for size in SIZES if _key("MD5", size) in item)
        names = tuple(re.sub(r"\s*\(.*\)", "", item["label"][key]) for key in sorted(item["label"], key=int))
        found[name] = Entry(name, item["python_class"], MODALITIES.get(name, "unknown"), sizes, names, item["task"], not why_not, why_not)
    return found


def file_name(name: str, size: int | None) -> str:
    """The archive's name without its ending; sizes that MedMNIST does not offer are made from the 28-pixel file."""
    return f"{name}_{size}" if size in SIZES[1:] else name


def official_md5(name: str, size: int | None) -> str:
    return info()[name][_key("MD5", size if size in SIZES else 28)]


def official_md5s(name: str) -> set[str]:
    return {value for key, value in info()[name].items() if key.startswith("MD5")}


def cached(name: str, size: int | None) -> Path | None:
    """The file in the medmnist package's cache, checked against its MD5; None if there is none."""
    path = _cache() / f"{file_name(name, size)}.npz"
    if not path.is_file():
        return None
    md5, official = md5_of(path), official_md5(name, size)
    if md5 != official:
        raise InputError(f"{path}: MD5 {md5} instead of {official}: broken or not the official file. Delete it and run again.")
    return path


def download(name: str, size: int | None, *, progress: Progress | None, notice: Callable[[str], None]) -> Path:
    """Fetch the file into the medmnist package's cache.

    Raises: Unreachable, or InputError for a wrong checksum or an unwritable cache; see download.fetch.
    """
    path, url = _cache() / f"{file_name(name, size)}.npz", info()[name][_key("url", size if size in SIZES else 28)]
    notice(f"{path.name} is not on this machine: trying {url}")
    fetch(url, path, md5=official_md5(name, size), progress=progress)
    return path


def _key(kind: str, size: int) -> str:
    return kind if size == 28 else f"{kind}_{size}"


def _cache() -> Path:
    return Path.home() / ".medmnist"
