"""How a run ends that does not end well."""

from __future__ import annotations

import json
import os
import signal

import pytest

from gidef import main
from gidef.errors import InputError, RankFailure

LOST = {"lines": ["a line", "KeyError: 'x'\n"], "ranks": (0, 1)}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("rank", "speaks"), [(1, False), (2, True), (3, False)])
def test_one_of_the_ranks_that_are_left_sums_up_what_the_first_failing_one_said(rank, speaks, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    error = RankFailure("ranks 0, 1 on host a are gone", **LOST)
    error.log = "runs/a/logs/rank-00000.txt"
    with pytest.raises(SystemExit) as caught, main.ending():
        raise error
    told = capsys.readouterr().err
    assert caught.value.code == 1
    assert bool(told) == speaks
    if speaks:
        assert told.splitlines() == [
            "gidef: the run ended, because ranks 0, 1 on host a are gone", "gidef: its last lines (all of them: runs/a/logs/rank-00000.txt):",
            "    a line", "    KeyError: 'x'", "gidef: what was saved is whole: --resume goes on from it.",
        ]  # fmt: skip


def test_bad_input_of_another_rank_has_the_status_of_bad_input():
    with pytest.raises(SystemExit) as caught, main.ending():
        raise RankFailure("rank 1 on host b: disk full", ranks=(1,), bad_input=True)
    assert caught.value.code == main.ERROR


def test_sigterm_does_not_wait_for_threads_and_other_exits_pass(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with main.ending():
        raise SystemExit(143)
    assert left == [143]
    with pytest.raises(SystemExit) as caught, main.ending():
        raise SystemExit(5)
    assert caught.value.code == 5 and left == [143]


def test_an_interrupt_is_one_line_and_does_not_wait_for_threads(monkeypatch, capsys):
    left, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", left.append)
    try:
        with main.ending():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
    assert left == [130] and capsys.readouterr().err == "gidef: interrupted. What was saved is whole: --resume goes on from it.\n"


def test_torchrun_is_told_of_an_error_for_its_closing_message(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(KeyError), main.ending():
        raise KeyError("no such image")
    assert "no such image" in json.dumps(json.loads((tmp_path / "error.json").read_text()))
    with pytest.raises(SystemExit), main.ending():
        raise InputError("the disk is full")
    assert "the disk is full" in (tmp_path / "error.json").read_text()
