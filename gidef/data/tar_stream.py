"""One shard at a time: a tar archive's examples, decoded without running anything, and what is wrong with them.

The archive is read with `tarfile` and grouped by webdataset. webdataset's own loop over the members would take a broken header in the
middle for the end of the archive, as tarfile does.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from torch import Tensor

from gidef.data.decode import decode, decode_array
from gidef.data.download import open_url
from gidef.errors import InputError

INDEX = "dataset.json"
PICTURES, ARRAY, LABEL, JSON = ("png", "jpg", "jpeg"), "npy", "cls", "json"
IMAGES = (*PICTURES, ARRAY)
Sample = dict[str, Any]
"""One example as it stands in a shard: its members' bytes by kind, and `__key__`."""


def remote(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def name_of(place: str) -> str:
    return Path(urlsplit(place).path if remote(place) else place).name


class ShardReader:
    """Reads shards one after another and counts what it leaves out."""

    def __init__(self, *, digest: bool = True) -> None:
        self.digest = hashlib.md5(usedforsecurity=False) if digest else None
        self.broken: list[str] = []
        self.foreign: dict[str, int] = {}

    def examples(self, place: str, expected: int | None) -> Iterator[tuple[Tensor, int]]:
        """Decoded images (C, H, W) and classes of one shard. InputError if the archive is broken or holds other than `expected` examples."""
        for sample in self.samples(place, expected):
            try:
                yield image_of(sample), label_of(sample)
            except (InputError, ValueError) as error:
                self.refuse(place, sample, error)

    def refuse(self, place: str, sample: Sample, error: Exception) -> None:
        """Count an example that could not be decoded."""
        self.broken.append(f"{name_of(place)}: {sample['__key__']}: {error}")

    def samples(self, place: str, expected: int | None = None) -> Iterator[Sample]:
        """The examples of one shard in their order, not yet decoded. Raises as `examples`, which decodes them."""
        count = 0
        for sample in self._grouped(self._members(place)):
            count += 1
            yield sample
        if expected is not None and count != expected:
            raise InputError(f"{place}: {count} examples, {INDEX} says {expected}: the shard is cut or was changed.")

    def spans(self, place: str) -> Iterator[Sample]:
        """As `samples`, of an uncompressed file: in the place of each member's bytes (where they begin, how many), so that only headers are read."""
        return self._grouped(self._spans(place))

    def _grouped(self, members: Iterator[dict[str, Any]]) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys

        return group_by_keys(members, handler=self._duplicate)

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.broken:
            notes.append(f"{len(self.broken)} broken examples were skipped (first: {self.broken[0]}).")
        if self.foreign:
            number, kinds = sum(self.foreign.values()), ", ".join(sorted(self.foreign)[:5])
            notes.append(f"{number} members of other kinds ({kinds}) were left out: only png, jpg, npy, cls and json are ever decoded.")
        return tuple(notes)

    def _members(self, place: str) -> Iterator[dict[str, Any]]:
        try:
            with _opened(place, self.digest) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in self._known(tar):
                    yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": place}
                stream.check_end(tar.offset)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{place}: not a whole tar archive ({error}).") from error

    def _spans(self, place: str) -> Iterator[dict[str, Any]]:
        try:
            with tarfile.open(place, mode="r:") as tar:
                for member in self._known(tar):
                    yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": place}
        except (tarfile.TarError, EOFError, OSError) as error:
            raise InputError(f"{place}: not a whole tar archive ({error}).") from error

    def _known(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """The members that may be decoded; the others are counted."""
        for member in tar:
            tar.members = []  # or a long stream collects them
            suffix = Path(member.name).name.partition(".")[2].lower()
            if member.isfile() and not member.issparse() and suffix in (*IMAGES, LABEL, JSON):
                yield member
            elif not member.isdir():
                self.foreign[suffix or "no ending"] = self.foreign.get(suffix or "no ending", 0) + 1

    def _duplicate(self, error: Exception) -> bool:
        """webdataset's handler, called for a second member of one name: count it and go on."""
        self.broken.append(str(error.args[0]).partition(" dict_keys")[0])
        return True


class _Stream:
    """A file that hashes what is read, and remembers the end of it."""

    KEPT = 4 * tarfile.RECORDSIZE

    def __init__(self, file: BinaryIO, digest: Any = None):
        self.file, self.digest, self.tail, self.position = file, digest, b"", 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        while data and len(data) < size and (more := self.file.read(size - len(data))):
            data += more
        if self.digest is not None:
            self.digest.update(data)
        self.position += len(data)
        self.tail = (self.tail + data)[-self.KEPT :]
        return data

    def check_end(self, offset: int) -> None:
        """Raise TarError unless the archive's end mark, a block of zeros, is at `offset`; then read the rest of the file."""
        begin = offset - (self.position - len(self.tail))
        if self.tail[begin : begin + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
            raise tarfile.TarError("it is cut, or the header of a member is broken")
        while self.read(1 << 20):
            pass


@contextlib.contextmanager
def _opened(place: str, digest: Any) -> Iterator[_Stream]:
    """The bytes of a tar archive, uncompressed."""
    with open_url(place) if remote(place) else open(place, "rb") as file:
        stream = _Stream(file, digest)
        if place.endswith(("gz", "gzip")):
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield _Stream(unpacked)
        else:
            yield stream
        if remote(place) and file.length:
            raise OSError(f"the transfer broke off {file.length} bytes before the end")


def image_of(sample: Sample) -> Tensor:
    """uint8 (C, H, W). Raises InputError if there is none or it is broken."""
    data = next((sample[kind] for kind in PICTURES if kind in sample), None)
    if data is not None:
        return decode(data)
    if ARRAY not in sample:
        raise InputError("no png, jpg or npy")
    return decode_array(sample[ARRAY])


def label_of(sample: Sample) -> int:
    """The class number: text in .cls, else "label" or "cls" in .json."""
    if LABEL in sample:
        label = int(sample[LABEL].decode("ascii"))
    else:
        content = json.loads(sample.get(JSON, b"{}"))
        label = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < 2**31:
        raise InputError(f"class {label!r} is no number from 0 on")
    return label
