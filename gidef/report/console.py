"""One console for a run: a live bar on a terminal, aligned plain lines elsewhere, silence off rank zero; and one file per rank.

    round  120/500   loss 0.842   acc 71.3 %   psnr 11.8 dB   12.4 rounds/s   left 0:00:31

The same lines go to the run's log file, without escape codes.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from gidef.errors import InputError
from gidef.report.files import writing

PLAIN_WIDTH = 120
"""Columns of a log, and of the screen where it is no terminal."""
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-_])")


class Console:
    """Prints to standard output and, if `log` is given, appends the same to that file.

    Args:   rank: every rank but 0 is silent and opens no log.  log: created with its folder.
            own: this rank's file, on every rank: the same lines, what goes to standard error meanwhile (warnings), and the
            traceback of an error that ends the block.
            force_terminal: True for the live bar, False for plain lines; None looks at standard output.
            width: columns; None takes the terminal's, or 120 where there is none.
            every_s: least seconds between two plain lines of a track; its first and last are always printed.
    Raises: InputError if the log cannot be written.
    All methods may be called from any thread. Text is printed as it is: square brackets are no markup.
    """

    def __init__(
        self, rank: int = 0, log: str | Path | None = None, force_terminal: bool | None = None, width: int | None = None, *, every_s: float = 10.0,
        own: str | Path | None = None,
    ):  # fmt: skip
        self.silent = rank != 0
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" if force_terminal is None else force_terminal
        self.every_s = every_s
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._tracks = 0
        # force_terminal here overrules FORCE_COLOR, which sbatch would carry over from the login shell into log files
        self._screen = RichConsole(force_terminal=self.live, width=width if width or self.live else PLAIN_WIDTH, highlight=False)
        self._log: Path | None = None
        if log is not None and not self.silent:
            self._log = Path(log)
            with writing(self._log):
                self._log.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._log, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
            self._paper = RichConsole(file=self._file, force_terminal=False, color_system=None, width=max(PLAIN_WIDTH, self.width), highlight=False)

        self._own: Path | None = None
        if own is not None:
            self._own = Path(own)
            with writing(self._own):
                self._own.parent.mkdir(parents=True, exist_ok=True)
                self._own_file = open(self._own, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by close()
            self._own_paper = RichConsole(file=self._own_file, force_terminal=False, color_system=None, width=PLAIN_WIDTH, highlight=False)
            self._stderr = sys.stderr
            sys.stderr = _Both(sys.stderr, self._own_file)

    @property
    def width(self) -> int:
        """Columns of the screen, e.g. for `tables.table`."""
        return self._screen.width

    def say(self, text: str) -> None:
        """Print a line, never wrapped."""
        self._print(text)

    def note(self, text: str) -> None:
        """A line for this rank's own file alone."""
        if self._own is not None:
            with self._lock, writing(self._own):
                self._own_paper.print(_ESCAPES.sub("", text), markup=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Print a line that opens a part of the run."""
        self._print(f"\n{text}\n{'-' * len(text)}", style="bold")

    def notice(self, text: str) -> None:
        """Print a line that must not be missed, such as "synthetic data"."""
        self._print(f"NOTICE: {text}", style="bold yellow")

    def table(self, table: RenderableType) -> None:
        """Print a rich table, on the log at 120 columns or more."""
        self._print(table)

    def track(self, label: str, total: int, *, unit: str | None = None, start: int = 0) -> Track:
        """Follow a loop: `with console.track("round", 500) as track: track.update(done, loss=0.842, acc=0.713)`.

        Args:    label: opens the line.  total: steps in all.  unit: one step, for the rate; None takes the label's last word.
                 start: steps done before this process began (a resumed run), left out of the rate.
        Returns: a context manager; tracks may follow or contain one another.
        """
        return Track(self, label, total, unit or (label.split() or ["step"])[-1], start)

    def close(self) -> None:
        """Stop a bar that is still up and close the log; may be called twice."""
        with self._lock:
            self._tracks = 0
            self._stop_bar()
            own, self._own = self._own, None
            if own is not None:
                if isinstance(sys.stderr, _Both) and sys.stderr.screen is self._stderr:
                    sys.stderr = self._stderr
                with writing(own):
                    self._own_file.close()
            if self._log is not None:
                log, self._log = self._log, None
                with writing(log):
                    self._file.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is not None:
                with contextlib.suppress(InputError):
                    self.note("".join(traceback.format_exception(error)).rstrip())
            self.close()
        except InputError:
            if kind is None:  # else the block's own error is the one to tell; on a full disk it was this log's already
                raise

    def _print(self, what: RenderableType, style: str | None = None, *, screen: bool = True, log: bool = True) -> None:
        """To the screen, the log and this rank's file; a string is neither wrapped nor read as markup."""
        text = isinstance(what, str)
        what = _ESCAPES.sub("", what) if text else what
        with self._lock:
            if log and self._own is not None:
                with writing(self._own):
                    self._own_paper.print(what, markup=False, soft_wrap=text)
            if self.silent:
                return
            if screen:
                self._screen.print(what, style=style, markup=False, soft_wrap=text)
            if log and self._log is not None:
                with writing(self._log):
                    self._paper.print(what, markup=False, soft_wrap=text)

    def _stop_bar(self) -> None:
        if self._progress is not None and self._tracks == 0:
            self._progress.stop()
            self._progress = None


class _Both:
    """Standard error, of which a file gets a copy."""

    def __init__(self, screen: Any, file: Any) -> None:
        self.screen, self._file = screen, file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed file, must not silence an error
            self._file.write(_ESCAPES.sub("", text))
        return self.screen.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)


class Track:
    """One followed loop, made by `Console.track`."""

    def __init__(self, console: Console, label: str, total: int, unit: str, start: int):
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._start = self._done = start
        self._values: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._recent = deque([(self._began, start)], maxlen=100)  # the rate forgets a slow start, such as compilation
        self._line_at = self._bar_at = -math.inf
        self._unprinted = False
        self._widths: dict[str, int] = {}
        self._task: Any = None

    def __enter__(self) -> Track:
        console = self._console
        if console.live and not console.silent:
            with console._lock:
                if console._progress is None:
                    values = TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
                    columns = [TextColumn("{task.description}", markup=False), BarColumn(12), MofNCompleteColumn(), TextColumn("left")]
                    console._progress = Progress(
                        *columns, TimeRemainingColumn(), values, console=console._screen, transient=True, expand=True, speed_estimate_period=600
                    )
                    console._progress.start()
                console._tracks += 1
                self._task = console._progress.add_task(self._label, total=self._total, completed=self._done, text="")
        return self

    def update(self, done: int, /, **values: Any) -> None:
        """Report that `done` steps of the total are finished, with their values.

        Values carry their unit in the name: `psnr_db`, `train_s`, `peak_gib`; `acc`, `accuracy`, `..._acc` and `..._accuracy` lie
        in [0, 1] and are shown in per cent. A tensor of one element is read only when it is shown, so that a GPU is not waited for.
        """
        console = self._console
        if console.silent and console._own is None:
            return
        with console._lock:
            now, before = time.monotonic(), self._done
            self._done, self._values = max(done, self._done), values  # worker threads may report out of order
            if self._done == before >= self._total and self._line_at > -math.inf:
                return  # the last line is out
            self._recent.append((now, self._done))
            self._unprinted = True
            if self._task is not None and console._progress is not None and now - self._bar_at >= 0.1:
                self._bar_at = now
                text = "   ".join(["", *self._shown(), *self._rate()[:1]])
                console._progress.update(self._task, completed=self._done, text=text)
            if now - self._line_at >= console.every_s or self._done >= self._total:
                self._line_at, self._unprinted = now, False
                console._print(self._line(), screen=self._task is None)

    def __exit__(self, *_: object) -> None:
        console = self._console
        with console._lock:
            on_bar, self._task = self._task, None
            if on_bar is not None and console._progress is not None:
                console._progress.remove_task(on_bar)
                console._tracks -= 1
                console._stop_bar()
            if self._values is not None and (self._unprinted or on_bar is not None):
                console._print(self._line(), log=self._unprinted)
            self._unprinted = False

    def _line(self) -> str:
        width = len(str(self._total))
        return "   ".join([f"{self._label}  {self._done:>{width}}/{self._total}", *self._shown(), *self._rate()])

    def _shown(self) -> list[str]:
        """The values with names and units, each as wide as its widest so far."""
        parts = []
        for key, value in (self._values or {}).items():
            name, number, unit = _display(key, value)
            self._widths[key] = max(self._widths.get(key, 4 if unit else 0), len(number))
            parts.append(f"{name} {number:>{self._widths[key]}}{unit}")
        return parts

    def _rate(self) -> list[str]:
        """The rate over the last hundred reports and the time left; in the end, over the whole track and the time taken."""
        over = self._done >= self._total
        (first_at, first), (last_at, last) = (self._began, self._start) if over else self._recent[0], self._recent[-1]
        if last <= first or last_at <= first_at:
            return []
        rate = (last - first) / (last_at - first_at)
        speed = f"{rate:.1f} {self._unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit}"
        return [speed, f"took {_clock(last_at - self._began)}" if over else f"left {_clock((self._total - self._done) / rate)}"]


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


_UNITS = {"_db": " dB", "_gib": " GiB", "_mib": " MiB", "_ms": " ms", "_s": " s"}


def _display(key: str, value: Any) -> tuple[str, str, str]:
    """Name, number and unit of a value, from the unit in its name."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (int, float)) and (key in ("acc", "accuracy") or key.endswith(("_acc", "_accuracy"))):
        return key.replace("_", " "), f"{100 * value:.1f}", " %"
    if not isinstance(value, float):
        return key.replace("_", " "), "none" if value is None else str(value), ""
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace("_", " "), f"{value:.1f}", unit
    return key.replace("_", " "), f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}", ""
