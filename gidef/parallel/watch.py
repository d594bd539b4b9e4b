"""Who is there: heartbeats and roll calls through the store where the ranks met, so that a hang ends with the names of the missing ranks."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gidef.errors import InputError, RankFailure

_EVER = timedelta(days=365)
_CANARY, _ABORT = 71, 72
"""Tags of two messages: one that is received when the right neighbour leaves in peace, one that is never sent."""
_NEVER = "!"
"""In place of a collective's label: it will not take place."""
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


class Watch:
    """One rank's eye on the others. `meet` before a collective; `fail` or `leave` at the end.

    Every rank writes a heartbeat into the store and reads its right neighbour's. A rank is given up when its connection to its left
    neighbour closes (at once), or when it has not beaten for `timeout_s`; whoever notices first writes down which ranks are missing,
    and the others read it. All of it runs on three threads beside the calling one, which stays open to signals. A rank that lives but does
    not come is waited for, up to `stall_s`: it may have the longest attack.

    Collectives of groups that `guard` was given meet nobody beforehand, and wait inside: a fourth thread breaks these groups once a rank is lost.

    Args:    store: any c10d store.  timeout_s: above 0.  stall_s: longest wait for a rank that gives signs of life.
             store_host: where the store is, in words, for messages.
    """

    def __init__(self, rank: int, size: int, store: Any, *, timeout_s: float, stall_s: float, store_host: str = "rank 0's host") -> None:
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        self._timeout_s, self._stall_s, self._store_host = timeout_s, stall_s, store_host
        self._beat_s = min(timeout_s / 5, max(0.5, size / 500))
        self._tick_s = min(1.0, timeout_s / 5)
        self._store, self._asked = dist.PrefixStore("gidef-watch", store), queue.SimpleQueue()
        self._count, self._where, self._beats, self._leaving = 0, "", 0, threading.Event()
        self._failure: dict[str, Any] | None = None
        self._broken = ""
        self._guarded: list[Any] = []
        self._main = threading.main_thread().ident
        self._threads = [threading.Thread(target=target, daemon=True, name=f"watch-{target.__name__}") for target in (self._serve, self._beat, self._listen)]
        self._canary = dist.irecv(torch.zeros(1), src=self._neighbour, tag=_CANARY)
        self._write_beat(self._own())
        for thread in self._threads:
            thread.start()

    @property
    def _neighbour(self) -> int:
        return (self.rank + 1) % self.size

    # --- what the calling thread does --------------------------------------------------------------------------------

    def meet(self, label: str) -> None:
        """Return when every rank has called this as often as this one; they must be in the same collective.

        Raises: RankFailure, with the ranks that failed or are missing; RuntimeError if they came with different labels.
        """
        self._count += 1
        self._where = label
        number = self._count

        def arrive(store: Any) -> str:
            if store.add(f"come/{number}", 1) == self.size:
                store.set(f"go/{number}", label)
                return label
            return store.get(f"go/{number}").decode()

        other = self._ask(arrive, label)
        self._where = ""
        if other == _NEVER:
            raise self.explain(RuntimeError("another rank left"), label)
        if other != label:
            raise RuntimeError(f"the ranks are in different collectives: rank {self.rank} in {label}, another in {other}")

    def count(self, name: str) -> int:
        """Add one to a common number and return it; from any thread. A rank that is gone does not matter here, only the store does."""
        return self._ask(lambda store: store.add(name, 1), name, alone=True)

    def guard(self, groups: Sequence[Any]) -> None:
        """From now on the end of any rank ends the waiting collectives of these groups of torch's, gloo or NCCL, with an error. Those of one rank are left out."""
        if not self._guarded:
            self._threads.append(threading.Thread(target=self._guard, daemon=True, name="watch-_guard"))
            self._threads[-1].start()
        self._guarded += [group for group in groups if group.size() > 1]

    def explain(self, error: Exception, label: str) -> RankFailure:
        """The failure to raise in place of torch's, after a collective broke: by then somebody knows who is gone."""
        return self.blamed() or RankFailure(f"{label} broke off on rank {self.rank}: {error}", ranks=(), lines=())

    def blamed(self) -> RankFailure | None:
        """The first failure of another rank, for which this waits some seconds; None where no rank is lost."""
        deadline = time.monotonic() + max(3.0, 6 * self._beat_s)
        while self._failure is None and not self._broken and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._known()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank leaves; the first to tell is the one that they name. Takes seconds at the most."""
        if not isinstance(error, RankFailure):
            self._tell_of(error)
        self._end(linger_s=2.0, together=False)
        # a receive that times out closes every connection of the group, which ends the thread that listens
        with contextlib.suppress(RuntimeError):
            dist.irecv(torch.zeros(1), src=self._neighbour, tag=_ABORT).wait(timedelta(milliseconds=1))
        self._cut()
        for thread in self._threads[2:]:
            thread.join(2.0)

    def leave(self) -> None:
        """Leave together: returns when all are here."""
        self.meet("the end")
        self._leaving.set()
        dist.send(torch.zeros(1), dst=(self.rank - 1) % self.size, tag=_CANARY)
        self._threads[2].join(10.0)
        self._end(linger_s=10.0, together=True)

    def _ask(self, do: Callable[[Any], Any], label: str, *, alone: bool = False) -> Any:
        """Let the serving thread ask the store, which may never answer, and wait for it with open ears."""
        reply: list[Any] = []
        done = threading.Event()
        self._asked.put((do, reply, done))
        began, silent, beats, told = time.monotonic(), 0, self._beats, False
        while not done.wait(self._tick_s):
            if self._failure is not None and not alone:
                if self._failure["kind"] == "signal":
                    time.sleep(1.0)  # if it is for all ranks, this one's is on its way
                raise self._known()
            if self._broken:
                raise self._known()
            silent, beats = 0 if self._beats != beats else silent + 1, self._beats
            if silent * self._tick_s > self._timeout_s + self._beat_s:
                raise RankFailure(self._unanswered(), ranks=(0,), lines=())
            waited = time.monotonic() - began
            if not alone and self.rank == 0 and waited > self._timeout_s and not told:
                told = True
                print(f"gidef: rank 0 has waited for {waited:.0f} s in {label}. {self._absent()}", file=sys.stderr, flush=True)
            if not alone and waited > self._stall_s:
                raise RankFailure(f"rank {self.rank} has waited for {waited:.0f} s in {label}, longer than stall_s. {self._absent()}", ranks=(), lines=())
        if not reply:
            raise self._known() or RankFailure(f"{label} got no answer on rank {self.rank}", ranks=(), lines=())
        return reply[0]

    def _known(self) -> RankFailure | None:
        """What is known of the first failure, as an exception of this rank."""
        told = self._failure
        if told is not None:
            return RankFailure(told["text"], ranks=told["ranks"], lines=told["lines"], bad_input=told["kind"] == "input")
        if self._broken:
            text = f"{self._store_host}, where the ranks meet, is gone: rank {self.rank} on {self.host} has lost it ({self._broken})"
            return RankFailure(text, ranks=(0,), lines=())
        return None

    def _unanswered(self) -> str:
        return (
            f"{self._store_host}, where the ranks meet, has not answered rank {self.rank} on {self.host} for {self._timeout_s:g} s: "
            "it was stopped, or one of the two was cut off"
        )

    def _absent(self) -> str:
        """Ranks that have not come yet, and where they are, from their heartbeats; "" where the store does not say."""
        found = self._briefly(self._all_beats, 2.0) or []
        behind = [f"rank {rank} on {beat['host']}, which is at {beat['in'] or 'the start'}" for rank, beat in enumerate(found) if beat["at"] < self._count]
        return f"Not there, but alive: {'; '.join(behind)}." if behind else ""

    def _tell_of(self, error: BaseException) -> None:
        at = f"rank {self.rank} on host {self.host}"
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            code = getattr(error, "code", None)
            told = {"kind": "signal", "text": f"{at} was ended by a signal" if code is None or isinstance(code, int) and code > 128 else f"{at} left with {code!r}"}
        else:
            kind = "input" if isinstance(error, InputError) else "error"
            told = {"kind": kind, "text": f"{at}: {error}" if kind == "input" else f"{at} failed first: {type(error).__name__}: {error}"}
            told["lines"] = traceback.format_exception(error)[-1:] if kind == "input" else "".join(traceback.format_exception(error)).splitlines()[-15:]
        self._briefly(lambda: self._write_failure({"ranks": [self.rank], "lines": [], **told}), 2.0)

    def _end(self, linger_s: float, *, together: bool) -> None:
        """Stop the threads. Rank 0, which may hold the store, waits until the others have read what they need."""
        self._leaving.set()
        self._asked.put(None)
        if self._broken:
            return

        def farewell() -> None:
            if not together:  # wakes whoever waits for this rank, and its own serving thread: a process must not end while one is inside the store
                self._store.set(f"go/{self._count}", _NEVER)
                self._store.set(f"go/{self._count + 1}", _NEVER)
            gone, deadline = self._store.add("left", 1), time.monotonic() + linger_s
            while self.rank == 0 and gone < self.size and time.monotonic() < deadline:
                time.sleep(0.01)
                gone = self._store.add("left", 0)

        self._briefly(farewell, linger_s + 1.0)
        self._threads[0].join(2.0)
        self._threads[1].join(self._beat_s + 1.0)

    def _briefly(self, do: Callable[[], Any], seconds: float) -> Any:
        """What `do` returns, or None if the store did not answer in time or not at all."""
        found: list[Any] = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(do())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        return found[0] if found else None

    # --- the threads ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Ask the store what the calling thread wants to know."""
        store = self._store.clone()
        store.set_timeout(_EVER)
        while (asked := self._asked.get()) is not None:
            do, reply, done = asked
            try:
                reply.append(do(store))
            except RuntimeError as error:
                self._break(error)
            done.set()

    def _listen(self) -> None:
        """Receive the right neighbour's farewell; an error means that it went without one."""
        try:
            self._canary.wait(_EVER)
        except RuntimeError:
            if not self._leaving.is_set():
                time.sleep(2 * self._beat_s)  # if it could still tell why, others have read it by now
                self._give_up([self._neighbour], "gone: the connection closed, so it was killed, or its host went down")

    def _beat(self) -> None:
        """Beat, and look whether the neighbour does and whether anybody has failed."""
        store = self._store.clone()
        before, unchanged = b"", 0
        try:
            while not self._leaving.wait(self._beat_s):
                store.set(f"beat/{self.rank}", self._own())
                if self._failure is None and store.check(["first"]):
                    self._failure = json.loads(store.get("first"))
                if store.check([f"beat/{self._neighbour}"]):
                    beat = store.get(f"beat/{self._neighbour}")
                    before, unchanged = beat, unchanged + 1 if beat == before else 0
                self._beats += 1
                # looks are counted, not seconds: a rank that was itself stopped has not looked meanwhile
                if unchanged * self._beat_s > self._timeout_s and self._failure is None:
                    self._give_up_silent()
        except RuntimeError as error:
            if not self._leaving.is_set():
                self._break(error)

    def _guard(self) -> None:
        """Break the guarded groups once somebody is lost; the calling thread, inside one of their collectives, would not look."""
        silent, beats = 0, self._beats
        while not self._leaving.wait(self._tick_s):
            silent, beats = 0 if self._beats != beats else silent + 1, self._beats
            if self._failure is None and silent * self._tick_s > self._timeout_s + self._beat_s:  # the store cannot be told
                self._failure = {"kind": "missing", "ranks": [0], "text": self._unanswered(), "lines": []}
            if self._failure is not None or self._broken:
                if self._failure is not None and self._failure["kind"] == "signal":
                    time.sleep(1.0)  # as in `_ask`
                return self._cut()

    def _cut(self) -> None:
        groups, self._guarded = self._guarded, []
        for group in groups:
            if dist.get_backend(group) == "nccl":
                group.abort()
                continue
            other = next(rank for rank in dist.get_process_group_ranks(group) if rank != self.rank)
            with contextlib.suppress(RuntimeError):  # see `fail`
                dist.irecv(torch.zeros(1), src=other, group=group, tag=_ABORT).wait(timedelta(milliseconds=1))

    def _give_up_silent(self) -> None:
        """The neighbour has stopped beating: see who else has, and tell."""
        first = self._all_beats()
        if self._leaving.wait(2.5 * self._beat_s):
            return
        silent = [rank for rank, (old, new) in enumerate(zip(first, self._all_beats(), strict=True)) if old == new and rank != self.rank]
        if silent:
            self._give_up(silent, f"silent for {self._timeout_s:g} s: stopped, or cut off from the others")

    def _give_up(self, ranks: list[int], why: str) -> None:
        try:
            beats = self._all_beats()
            hosts = ", ".join(dict.fromkeys(beats[rank]["host"] for rank in ranks))
            last = f", last seen at {beats[ranks[0]]['in']}" if beats[ranks[0]]["in"] else ""
            named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
            self._write_failure({"kind": "missing", "ranks": ranks, "text": f"{named} on host {hosts} {'is' if len(ranks) == 1 else 'are'} {why}{last}", "lines": []})
        except RuntimeError as error:
            self._break(error)

    # --- the store -----------------------------------------------------------------------------------------------------

    def _write_failure(self, told: dict[str, Any]) -> None:
        """The first one stays."""
        store = self._store.clone()
        store.compare_set("first", "", json.dumps(told))
        self._failure = json.loads(store.get("first"))

    def _write_beat(self, beat: str) -> None:
        self._store.set(f"beat/{self.rank}", beat)

    def _all_beats(self) -> list[dict[str, Any]]:
        store = self._store.clone()
        unknown = json.dumps({"n": -1, "host": "?", "at": 0, "in": ""}).encode()
        return [json.loads(store.get(key) if store.check([key]) else unknown) for key in (f"beat/{rank}" for rank in range(self.size))]

    def _own(self) -> str:
        return json.dumps({"n": self._beats, "host": self.host, "at": self._count, "in": self._where or _place(self._main)})

    def _break(self, error: Exception) -> None:
        self._broken = self._broken or str(error).strip().splitlines()[0][:200]


def fresh_name(store: Any, rank: int, size: int, *, timeout_s: float) -> str:
    """A name that this life's ranks have in common, and no earlier life's: for a store which outlives them, as torchrun's does.

    Every rank says hello with a word of its own; rank 0 answers each hello with the name, again whenever one changes, until all have
    taken it. So words that dead ranks left do no harm, and no counter is needed that all hosts agree on.

    Raises: RuntimeError with the ranks that did not come within `timeout_s`.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(f"gidef/hello/{rank}", word)
    answered: dict[int, str] = {}
    left = set(range(size)) if rank == 0 else {rank}
    while left:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer from ranks {sorted(left)}" if rank == 0 else "no answer from rank 0")
        for other in sorted(left):
            if rank == 0 and store.check([f"gidef/hello/{other}"]):
                hello = store.get(f"gidef/hello/{other}").decode()
                if answered.get(other) != hello:
                    answered[other] = hello
                    store.set(f"gidef/answer/{other}", f"{hello}:{word}")
            if other == rank and store.check([f"gidef/answer/{rank}"]):
                hello, _, name = store.get(f"gidef/answer/{rank}").decode().partition(":")
                if hello == word:
                    store.set(f"gidef/taken/{rank}", name)
                    left.discard(rank)
            if rank == 0 and store.check([f"gidef/taken/{other}"]) and store.get(f"gidef/taken/{other}").decode() == word:
                left.discard(other)
        time.sleep(0.01)
    return store.get(f"gidef/taken/{rank}").decode()


def _place(thread: int | None) -> str:
    """Where in gidef a thread is: innermost file, line and function."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"gidef/{path.removeprefix(_PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
