"""The record of a run: JSON lines, appended as things happen, read by tables and figures. Nobody parses a log."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gidef.errors import InputError
from gidef.report.consumers import Consumer
from gidef.report.files import plain, write_atomically, writing

Line = dict[str, Any]


class Record:
    """Appends lines to one file, from any thread.

    An existing file is continued; a torn last line (a crash in the middle of a write) is dropped first.

    Args:   path: created with its folder if missing.
    Raises: InputError if the file cannot be written or holds a bad line (see `read`).
    """

    def __init__(self, path: str | Path):
        self.path, self._consumers = Path(path), []
        self._lock = threading.Lock()
        _clean(self.path, keep=None)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close(); unbuffered: a line is in the file once appended

    @classmethod
    def open(cls, path: str | Path, keep: Callable[[Line], bool] | None = None) -> Record:
        """Continue a record on resume without doubling lines: those for which `keep(line)` is false go, the others stay byte for byte.

        Typical: `keep=lambda line: line["kind"] != "round" or line["round"] <= checkpoint_round`. The file is replaced atomically.
        """
        _clean(Path(path), keep)
        return cls(path)

    def append(self, kind: str, /, **values: Any) -> None:
        """Write one line, "kind" first, then the values in the order given.

        Tensors and arrays become numbers or lists; NaN and ±inf become null, because JSON has neither.
        Raises: InputError on a full disk;  TypeError for a value without JSON form.
        """
        if "kind" in values:
            raise TypeError("append: kind is the first argument, not a value")
        line = json.dumps({"kind": kind, **plain(values)}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock, writing(self.path):
            while line:  # a raw write may stop short of the end on a nearly full disk
                line = line[self._file.write(line) :]

        for consumer in self._consumers:
            consumer.take({"kind": kind, **values})

    def feed(self, consumers: Sequence[Consumer]) -> None:
        """Let consumers follow: they get the lines that are there, and each further one; `close` closes them."""
        lines = read(self.path)
        for consumer in consumers:
            for line in lines:
                consumer.take(line)
        self._consumers += consumers

    def close(self) -> None:
        self._file.close()
        for consumer in self._consumers:
            consumer.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | Path) -> list[Line]:
    """All lines of a record, in order; a torn last line (unfinished, without its newline) is left out.

    Raises: InputError if the file is missing, or for a line that is no JSON object with a "kind", by file and line number.
    """
    return [line for line, _ in _parse(Path(path))]


def _parse(path: Path) -> list[tuple[Line, bytes]]:
    """Each line as an object and as its bytes, which end in a newline."""
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read the record {path}: {error.strerror}. Give the record.jsonl of a run.") from error
    lines = []
    for number, data in enumerate([*whole, rest], start=1):
        torn = number > len(whole)
        try:
            line = json.loads(data.decode())
            if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
                raise ValueError('not an object with a "kind"')
        except ValueError as error:
            if torn:
                continue
            raise InputError(f"{path}, line {number}: {error}. Expected one JSON object per line; remove or repair the line.") from error
        lines.append((line, data + b"\n"))
    return lines


def _clean(path: Path, keep: Callable[[Line], bool] | None) -> None:
    """Drop a torn end and the lines not kept; an unchanged file is not rewritten."""
    if not path.exists():
        return
    data = b"".join(data for line, data in _parse(path) if keep is None or keep(line))
    if len(data) != path.stat().st_size:
        write_atomically(path, data)
