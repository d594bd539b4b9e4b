"""WebDataset shards: .tar files of `key.png` (or .jpg, or .npy) beside `key.cls`, read without running anything, and written losslessly.

`write_webdataset` adds `dataset.json`, which keeps the splits, the names and the number of examples of every shard.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urljoin

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gidef.data.decode import stack
from gidef.data.download import open_url
from gidef.data.images import SPLITS, Dataset, Images
from gidef.data.tar_stream import INDEX, LABEL, ShardReader, name_of, remote
from gidef.errors import InputError

FORMAT = "gidef-webdataset-1"
MAX_SHARDS = 100_000
_CLIENT = re.compile(r"\{client(?::(\d*d))?\}")


@dataclass(frozen=True)
class Shards:
    """What `read_shards` found. splits: {"all"} when nothing tells them apart. index: the content of dataset.json, None without one."""

    splits: dict[str, Images]
    index: dict[str, Any] | None
    md5: str
    notes: tuple[str, ...]


def is_shards(path: str) -> bool:
    """Whether a data path means shards: an address, a .tar, a pattern with braces, or a folder with .tar files in it."""
    folder = Path(path)
    if re.match(r"\w+://|pipe:", path, re.IGNORECASE) or ".tar" in folder.name or "{" in path:
        return True
    return folder.is_dir() and any(folder.glob("*.tar*"))


def read_shards(path: str, size: int | None) -> Shards:
    """All examples of the shards, in their order.

    Args:   path: a .tar or .tar.gz file, a folder of them, or a pattern with braces or *; local, or http(s) with braces.
            size: side to resize to; None takes the first image's size.
            Splits come from dataset.json beside the shards, else from file names that begin with train, val and test.
    Raises: InputError for any other address (`pipe:` would run a command), a missing, broken or cut archive, and when no example is left.

    Members are decoded by gidef, from PNG, JPEG and text alone; webdataset's own decoders, which know pickles, are not used. Broken
    examples and members of other kinds are left out and counted in the notes. See tar_stream.
    """
    places = places_of(path)
    index, notes = read_index(places[0])
    found = _read(path, places, _splits_of(path, places, index), index, size)
    return replace(found, notes=(*notes, *found.notes))


def read_splits(place: str, index: dict[str, Any] | None, size: int | None) -> Shards | None:
    """Validation and test from the shards beside one of `place`, which dataset.json lists, or which are there as `val-*` and `test-*`; None unless
    both are. Raises as `read_shards`."""
    splits: dict[str, list[str]] = {}
    for split in ("val", "test"):
        if index is not None:
            names = index["splits"].get(split, {})
            splits[split] = [urljoin(place, name) if remote(place) else str(Path(place).with_name(name)) for name in names]
        elif not remote(place):
            splits[split] = sorted(str(file) for file in Path(place).parent.glob(f"{split}-*.tar*"))
    if not splits or not all(splits.values()):
        return None
    places = [place for names in splits.values() for place in names]
    return _read(place, places, [split for split, names in splits.items() for _ in names], index, size)


def _read(path: str, places: list[str], splits: list[str], index: dict[str, Any] | None, size: int | None) -> Shards:
    """All examples of the shards, by split."""
    reader = ShardReader()
    rows: list[tuple[str, int]] = []

    def images() -> Iterator[Tensor]:
        for place, split in zip(places, splits, strict=True):
            for image, label in reader.examples(place, None if index is None else index["splits"][split][name_of(place)]):
                rows.append((split, label))
                yield image

    examples = images()
    first = next(examples, None)
    if first is None:
        raise InputError(f"{path}: no example has both a readable image and a class. {' '.join(reader.notes())}")
    stacked, resized = stack(itertools.chain([first], examples), size, path)
    everything = Images(stacked, torch.tensor([label for _, label in rows]))
    found = {split: everything[torch.tensor([row[0] == split for row in rows])] for split in dict.fromkeys(splits)}
    return Shards(found, index, reader.digest.hexdigest(), (*resized, *reader.notes()))


def places_of_clients(path: str | None, shards: Sequence[str], num_clients: int) -> list[list[str]]:
    """The shards of every client, in order.

    Args:   path: a pattern with `{client}` or `{client:05d}`, client numbers from 0, or a folder that `write_webdataset` filled for clients.
            shards: in its place, one pattern per client; each as in `read_shards`.
    Raises: InputError as `read_shards`; for a number of patterns other than `num_clients`.
    """
    if shards:
        if len(shards) != num_clients:
            raise InputError(f"data.client_shards names the shards of {len(shards)} clients: data.num_clients={num_clients}. Make them equal.")
        return [places_of(pattern) for pattern in shards]
    if path is not None and not remote(path) and Path(path).is_dir():
        there = {match[1] for file in Path(path).glob("client-*.tar*") if (match := re.match(r"client-(\d{5})-", file.name))}
        if len(there) != num_clients:
            raise InputError(f"{path} holds shards of {len(there)} clients (client-00000-*.tar, …): data.num_clients={num_clients}. Make them equal.")
        path = str(Path(path) / "client-{client:05d}-*.tar*")
    if path is None or not _CLIENT.search(path):
        raise InputError(f"data.stream takes shards per client: give data.path={path!r} a {{client}}, e.g. shards/client-{{client:05d}}-*.tar, or data.client_shards.")
    return [places_of(_CLIENT.sub(lambda match, k=k: format(k, match[1] or ""), path)) for k in range(num_clients)]


def write_webdataset(
    dataset: Dataset, folder: str | Path, *, examples_per_shard: int, clients: Sequence[Tensor] | None = None, kind: Literal["png", "npy"] = "png"
) -> list[Path]:
    """Write `{split}-{number}.tar` and dataset.json; images as PNG or raw, so that reading them back gives the same bits.

    Args:    folder: created; must hold no shards yet.  examples_per_shard: >= 1.
             clients: rows of dataset.train by client: they become `client-{client}-{number}.tar` in the place of `train-*`.
             kind: "npy" takes more space than "png", and next to no time to decode.
    Returns: the shards' paths. Equal data sets give equal bytes.
    Raises:  InputError if the folder holds shards already or cannot be written.
    """
    folder = Path(folder)
    if examples_per_shard < 1:
        raise InputError(f"examples_per_shard={examples_per_shard}: expected at least 1.")
    if (folder / INDEX).exists() or (folder.is_dir() and any(folder.glob("*.tar"))):
        raise InputError(f"{folder}: holds shards already: choose another folder or empty it.")
    index: dict[str, Any] = {"format": FORMAT, "splits": {}, "class_names": dataset.class_names, "image_shape": dataset.image_shape}
    index |= {key: getattr(dataset, key) for key in ("name", "title", "modality", "source", "md5", "synthetic", "notes")}
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            part: Images = getattr(dataset, split)
            sizes = index["splits"][split] = {}
            owners = {split: torch.arange(len(part))}
            if clients is not None and split == "train":
                owners = {f"client-{number:05d}": rows for number, rows in enumerate(clients)}
            for owner, rows in owners.items():
                for number, chosen in enumerate(rows.split(examples_per_shard)):
                    path = folder / f"{owner}-{number:05d}.tar"
                    sizes[path.name] = _write_shard(path, part, split, chosen.tolist(), kind)
                    paths.append(path)
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")  # last: its presence says that all shards are there
    except OSError as error:
        raise InputError(f"{folder}: shards cannot be written ({error.strerror or error}).") from error
    return paths


def _write_shard(path: Path, part: Images, split: str, rows: list[int], kind: str) -> int:
    """Write one shard through a temporary file; returns its number of examples."""
    from webdataset import TarWriter

    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0, user="gidef", group="gidef") as tar:
            for row in rows:
                image, buffer = part.images[row].cpu(), io.BytesIO()
                if kind == "npy":
                    np.lib.format.write_array(buffer, image.contiguous().numpy(), version=(1, 0), allow_pickle=False)
                else:
                    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(buffer, "PNG")
                tar.write({"__key__": f"{split}-{row:08d}", kind: buffer.getvalue(), LABEL: str(int(part.labels[row])).encode()})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def places_of(path: str) -> list[str]:
    """The shards that a path means, in order."""
    from braceexpand import UnbalancedBracesError, braceexpand

    if not remote(path) and re.match(r"\w+:", path):
        raise InputError(f"{path!r}: expected a local path or an http(s) address. pipe: and the like would run commands: fetch the shards first.")
    if not remote(path) and Path(path).is_dir():
        return sorted(str(file) for file in Path(path).iterdir() if file.name.endswith((".tar", ".tar.gz")) and not file.name.startswith("."))
    try:
        places = list(itertools.islice(braceexpand(path), MAX_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise InputError(f"{path!r}: unbalanced braces; expected a pattern such as shard-{{000000..000009}}.tar.") from error
    if len(places) > MAX_SHARDS:
        raise InputError(f"{path!r} means more than {MAX_SHARDS} shards.")
    if remote(path):
        if any(".tar" not in name_of(place) for place in places):
            raise InputError(f"{path!r}: only WebDataset shards (.tar) are read from an address; fetch other files first.")
    else:
        places = [match for place in places for match in (sorted(glob.glob(place)) if set("*?[") & set(place) else [place])]
        for place in places:
            if not Path(place).is_file():
                raise InputError(f"{place}: no such file (of the shards {path}).")
    if not places:
        raise InputError(f"{path!r} matches no shards.")
    return places


def read_index(place: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """dataset.json beside a shard, checked, or None; and notes."""
    try:
        if remote(place):
            with open_url(urljoin(place, INDEX)) as response:
                data = response.read(1 << 24)
        else:
            data = Path(place).with_name(INDEX).read_bytes()
    except OSError:
        return None, ()
    try:
        index = json.loads(data)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            return None, (f"the {INDEX} beside the shards is not gidef's: ignored.",)
        texts = [index[key] for key in ("name", "title", "modality", "source")] + [*index["class_names"], *index["notes"]]
        counts = [count for split in SPLITS for count in index["splits"].get(split, {}).values()]
        good = all(isinstance(text, str) for text in texts) and all(isinstance(count, int) for count in counts)
        good = good and set(index["splits"]) <= set(SPLITS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{INDEX} beside {place} is broken ({type(error).__name__}: {error}): remove it or write the shards again.") from error
    if not good:
        raise InputError(f"{INDEX} beside {place} holds values of a wrong type: remove it or write the shards again.")
    return index, ()


def _splits_of(path: str, places: list[str], index: dict[str, Any] | None) -> list[str]:
    """The split of every shard, all "all" when neither dataset.json nor the names tell."""
    names = [name_of(place) for place in places]
    if index is None:
        matches = [re.match(r"train|val|test", name) for name in names]
        told = all(matches) and len({match[0] for match in matches}) > 1
        return [match[0] if told else "all" for match in matches]
    known = {name: split for split, sizes in index["splits"].items() for name in sizes}
    for name in names:
        if name not in known:
            raise InputError(f"{path}: {INDEX} beside the shards does not know {name}: remove one of the two.")
    if not remote(path) and Path(path).is_dir() and (missing := sorted(set(known) - set(names))):
        raise InputError(f"{path}: {len(missing)} shards that {INDEX} lists are missing, first {missing[0]}.")
    return [known[name] for name in names]
