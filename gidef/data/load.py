"""One data set by name or path: the order in which places are searched, and what each of them makes of it."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gidef import importing
from gidef.data import cifar, medmnist_sets
from gidef.data.download import Progress, Unreachable
from gidef.data.folder import read_folder
from gidef.data.images import Dataset, Images, check_dataset, check_size, resize_dataset
from gidef.data.medmnist_sets import Entry
from gidef.data.npz import md5_of, read_npz
from gidef.data.splits import complete
from gidef.data.synthetic import CELLS, synthetic_blood_cells
from gidef.data.webdataset_shards import is_shards, read_shards
from gidef.errors import InputError

SYNTHETIC = Entry("synthetic", "synthetic blood cells", "drawn", medmnist_sets.SIZES, tuple(cell.name for cell in CELLS), "multi-class")
CIFAR10 = Entry("cifar10", "CIFAR-10", "photographs", (32,), cifar.CLASS_NAMES, "multi-class")


@dataclass(frozen=True)
class _Request:
    """The arguments of load_dataset."""

    name: str
    size: int | None
    seed: int
    download: bool
    validation_fraction: float
    progress: Progress | None
    notice: Callable[[str], None]


def load_dataset(
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    size: int | None = None,
    seed: int = 0,
    download: bool = True,
    validation_fraction: float = 0.1,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set from the first place that has it.

    1. `path`: an .npz archive, a folder of images, or WebDataset shards. Missing or broken: an error, never another place.
    2. The folder in the environment variable GIDEF_DATA: `<name>.npz`, `<name>_<size>.npz`, or `<name>_resplit.npz` (with a notice).
    3. The medmnist package's cache, ~/.medmnist (MD5 checked); for CIFAR-10 ~/.cache/gidef/cifar10.
    4. A download into that cache, unless `download` is False or GIDEF_OFFLINE is set to anything but 0.
    5. For "bloodmnist" alone: the generator of synthetic images, with a notice.

    Args:
        name:   a 2-D MedMNIST set, "cifar10", "synthetic", an archive's name in GIDEF_DATA, or "package.module:callable", which is
                imported and called without arguments and returns a Dataset. With `path`, a label that may stay at its default.
        size:   side in pixels. MedMNIST's own sizes (28, 64, 128, 224) load that file; others are resized. None: the native size.
        seed:   of splits that are missing: validation (`validation_fraction` of train), or all three (70 / 10 / 20 %).
        progress: called with (bytes, bytes in all or None) during a download; None: a bar if standard error is a terminal.
        notice: called with each note of the Dataset, which a user must not miss; None: `warnings.warn`. Who asks for "synthetic" needs none.
    Returns: Dataset, checked: see images.check_dataset.
    Raises:  InputError for anything missing, broken or unsupported, saying what was tried and what to do.
    """
    check_size(size)
    if not 0 < validation_fraction < 0.5:
        raise InputError(f"validation_fraction={validation_fraction}: expected a share of the training images in (0, 0.5).")
    if notice is None:
        notice = _warn
    request = _Request(name, size, seed, download and os.environ.get("GIDEF_OFFLINE", "0") in ("", "0"), validation_fraction, progress, notice)
    if path is not None and ":" in name:
        raise InputError(f"name={name!r} and path={path!r}: a data set of your own code takes no path. Give one of the two.")
    if path is not None:
        dataset = _from_path(request, os.fspath(path))
    elif ":" in name:
        dataset = _from_callable(name)
    else:
        dataset = _from_name(request)
    dataset = resize_dataset(check_dataset(dataset), size)
    for note in dataset.notes if name != "synthetic" or path is not None else ():
        notice(note)
    return dataset


def available() -> list[Entry]:
    """Every set that gidef knows by name, the unsupported ones with their reason."""
    return [*medmnist_sets.entries().values(), CIFAR10, SYNTHETIC]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _from_path(request: _Request, path: str) -> Dataset:
    local = Path(path).expanduser()
    place = path if "://" in path else str(local)
    if is_shards(place):
        return _from_shards(request, place)
    if local.is_dir():
        splits, class_names, md5, notes = read_folder(local, request.size)
        return _assemble(request, splits, _unknown(request, local.name, class_names), source=place, md5=md5, notes=notes)
    if not local.exists():
        raise InputError(f"{path}: no such file or folder. Expected an .npz archive, a folder of images, or WebDataset shards.")
    if local.suffix != ".npz":
        raise InputError(f"{path}: unknown kind of file. Expected an .npz archive, a folder of images, or WebDataset shards (.tar).")
    return _from_npz(request, local)


def _from_npz(request: _Request, file: Path) -> Dataset:
    """An archive. Its file name tells which set it is, since `name` may be a default."""
    splits, md5, name = read_npz(file), md5_of(file), re.sub(r"(_64|_128|_224)?(_resplit)?$", "", file.stem)
    known = {entry.name: entry for entry in available() if entry.supported}
    if name not in known:
        return _assemble(request, splits, _unknown(request, file.stem), source=str(file), md5=md5)
    entry, notes = known[name], ()
    if file.stem.endswith("_resplit"):
        entry = replace(entry, title=f"{entry.title} (re-split)")
        notes = (f"{file.name} is a re-split of {name}: numbers do not compare image for image with the official split's.",)
    elif entry is CIFAR10 and len(splits["train"]) < cifar.TRAIN_IMAGES:
        notes = (f"{file.name} is a subset of CIFAR-10: {len(splits['train'])} of {cifar.TRAIN_IMAGES} training images.",)
    elif name in medmnist_sets.entries() and md5 not in medmnist_sets.official_md5s(name):
        notes = (f"{file} is not an official {name} archive (by its MD5): numbers may not compare with published ones.",)
    return _assemble(request, splits, entry, source=str(file), md5=md5, notes=notes)


def _from_shards(request: _Request, path: str) -> Dataset:
    shards = read_shards(path, request.size)
    if shards.index is None:
        label = re.split(r"[-_.]?[{*?.]", Path(path).name)[0] or "shards"
        return _assemble(request, shards.splits, _unknown(request, label), source=path, md5=shards.md5, notes=shards.notes)
    index = shards.index
    entry = Entry(index["name"], index["title"], index["modality"], (), tuple(index["class_names"]), "")
    source, notes = f"{path} (from {index['source']})", (*index["notes"], *shards.notes)
    dataset = _assemble(request, shards.splits, entry, source=source, md5=shards.md5, notes=notes)
    return replace(dataset, synthetic=index.get("synthetic") is True)


def _unknown(request: _Request, label: str, class_names: tuple[str, ...] = ()) -> Entry:
    """What is known of somebody's own images: the name that was asked for, unless that is a public set's and so perhaps a default."""
    name = label if request.name in [entry.name for entry in available()] else request.name
    return Entry(name, name, "unknown", (), class_names, "")


def _assemble(request: _Request, splits: dict[str, Images], entry: Entry, *, source: str, md5: str, notes: tuple[str, ...] = ()) -> Dataset:
    """A Dataset from what a reader found; missing splits are cut, missing class names made up."""
    number, count = max(int(part.labels.max()) for part in splits.values()) + 1, sum(map(len, splits.values()))
    if number > count:  # before anything counts up to it
        raise InputError(f"{source}: labels: class {number - 1} in a set of {count} images leaves classes empty: number them without gaps.")
    whole, cut_notes = complete(splits, where=source, fraction=request.validation_fraction, seed=request.seed)
    names = entry.class_names or tuple(f"class {label}" for label in range(number))
    return Dataset(entry.name, entry.title, entry.modality, names, **whole, source=source, md5=md5, synthetic=False, notes=(*notes, *cut_notes))


def _from_callable(name: str) -> Dataset:
    make = importing.load(name)
    dataset = make()
    if not isinstance(dataset, Dataset):
        raise InputError(f"data set {name!r} returned {type(dataset).__name__}: expected a gidef.data.Dataset.")
    return dataset


def _from_name(request: _Request) -> Dataset:
    name, size = request.name, request.size
    if name == "synthetic":
        return synthetic_blood_cells(size=size or 28)
    entry = {entry.name: entry for entry in available()}.get(name)
    if entry is not None and not entry.supported:
        raise InputError(f"{name} is not supported: {entry.why_not}. `gidef data list` shows the sets that are.")
    tried: list[str] = []
    file = _in_folder(name, size, tried)
    if file is not None:
        return _from_npz(request, file)
    if entry is None:
        near = difflib.get_close_matches(name, [known.name for known in available()], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"unknown data set {name!r}: {'; '.join(tried)}.{hint} See `gidef data list`.")
    dataset = _cifar10(request, tried) if entry is CIFAR10 else _medmnist(request, tried)
    if dataset is not None:
        return dataset
    looked = "; ".join(tried)
    if name == "bloodmnist":
        text = f"bloodmnist was not found ({looked}): using SYNTHETIC images instead. Set GIDEF_DATA to a folder with bloodmnist.npz for real ones."
        dataset = synthetic_blood_cells(size=size or 28)
        return replace(dataset, notes=(text, *dataset.notes))
    raise InputError(
        f"{name} was not found ({looked}). Run `gidef data download {name}` on a machine with network access, "
        f"or put {medmnist_sets.file_name(name, size)}.npz into a folder and set GIDEF_DATA to it."
    )


def find_local(name: str, size: int | None = None) -> Path | None:
    """The archive of a MedMNIST set that `load_dataset` would read without downloading, or None. Raises InputError if GIDEF_DATA is no folder."""
    return _in_folder(name, size, []) or (medmnist_sets.cached(name, size) if name in medmnist_sets.entries() else None)


def _in_folder(name: str, size: int | None, tried: list[str]) -> Path | None:
    """The set's archive in GIDEF_DATA."""
    setting = os.environ.get("GIDEF_DATA")
    if not setting:
        tried.append("GIDEF_DATA is not set")
        return None
    folder = Path(setting).expanduser()
    if not folder.is_dir():
        raise InputError(f"GIDEF_DATA={setting} is no folder: set it to a folder of <name>.npz files, or unset it.")
    if Path(name).name != name:
        raise InputError(f"data set {name!r} is no name: give files and folders as path.")
    # another size of a MedMNIST set is another file, not the small one enlarged; of any other set it may be made
    stems = [medmnist_sets.file_name(name, size)] if name in medmnist_sets.entries() or size is None else [f"{name}_{size}", name]
    for file in (folder / f"{stem}{ending}.npz" for stem in stems for ending in ("", "_resplit")):
        if file.exists():
            return file
    tried.append(f"no {stems[0]}.npz in GIDEF_DATA={setting}")
    return None


def _medmnist(request: _Request, tried: list[str]) -> Dataset | None:
    name, size = request.name, request.size
    file = medmnist_sets.cached(name, size)
    if file is None:
        tried.append("not in ~/.medmnist")
        file = _attempt(request, tried, lambda: medmnist_sets.download(name, size, progress=request.progress, notice=request.notice))
    return None if file is None else _from_npz(request, file)


def _cifar10(request: _Request, tried: list[str]) -> Dataset | None:
    splits = cifar.cached()
    if splits is None:
        tried.append(f"not in {cifar.cache()}")
        splits = _attempt(request, tried, lambda: cifar.download(progress=request.progress, notice=request.notice))
    return None if splits is None else _assemble(request, splits, CIFAR10, source=str(cifar.cache()), md5=cifar.archive_md5())


def _attempt(request: _Request, tried: list[str], download: Callable[[], Any]) -> Any:
    """A download, or None with the reason in `tried`."""
    if not request.download:
        tried.append("no download: switched off")
        return None
    try:
        return download()
    except Unreachable as error:
        tried.append(f"no download: {error}")
        return None
