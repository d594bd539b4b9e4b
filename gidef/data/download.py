"""Fetching one file: quick to give up where there is no network, whole or not at all where there is."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from gidef.errors import InputError

CONNECT_S, READ_S = 4.0, 30.0
Progress = Callable[[int, int | None], None]
"""Called with the bytes so far and in all (None if unknown)."""


class Unreachable(Exception):
    """The network or the server did not give the file; says why."""


def fetch(url: str, path: Path, *, md5: str, progress: Progress | None = None) -> None:
    """Download to `path` through a temporary file beside it.

    Args:   progress: without it, a bar on the terminal if standard error is one.
    Raises: Unreachable without a connection (after about four seconds) or when the transfer breaks; InputError for a wrong checksum and
            where the folder cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        file = os.fdopen(handle, "wb")
    partial, digest, done = Path(name), hashlib.md5(usedforsecurity=False), 0
    try:
        with file, _bar(path.name, progress) as report:
            try:
                with open_url(url) as response:
                    total = response.length
                    while block := response.read(1 << 18):
                        with _writing(path):
                            file.write(block)
                        digest.update(block)
                        done += len(block)
                        report(done, total)
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable(str(error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error))) from error
        if total is not None and done != total:
            raise Unreachable(f"the transfer broke off after {done} of {total} bytes")
        if digest.hexdigest() != md5:
            raise InputError(f"{url}: MD5 {digest.hexdigest()} instead of {md5}: something changed it on the way. Fetch {path.name} another way.")
        with _writing(path):
            os.chmod(partial, 0o644)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_url(url: str) -> http.client.HTTPResponse:
    """A readable response of an http(s) address; proxies as in the environment. OSError without one."""
    opener = urllib.request.build_opener(_Http, _Https)
    opener.addheaders = [("User-Agent", "gidef")]
    return opener.open(url, timeout=CONNECT_S)


class _PatientHttp(http.client.HTTPConnection):
    """Connects within CONNECT_S, then waits READ_S for every block."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_S)


class _PatientHttps(http.client.HTTPSConnection):
    """The same with encryption."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_S)


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PatientHttp, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PatientHttps, request)


@contextlib.contextmanager
def _bar(label: str, progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress, a bar on a terminal, or nothing."""
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        cause = "the disk is full: make room" if error.errno == errno.ENOSPC else f"{error.strerror or error}: make the folder writable"
        raise InputError(f"{path}: cannot be written ({cause}, or put the file elsewhere and set GIDEF_DATA).") from error
