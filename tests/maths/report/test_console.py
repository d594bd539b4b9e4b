import io
import sys
import threading
import time

import pytest
import torch

from gidef.errors import InputError
from gidef.report import console as console_module
from gidef.report.console import Console


class Clock:
    """Stands in for time.monotonic, so that rates and throttling are exact."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(console_module, "time", self)

    def monotonic(self):
        return self.now


def live_console(monkeypatch, **more):
    """A console that believes in a terminal of 100 columns, and what it wrote."""
    page = io.StringIO()
    monkeypatch.setattr(sys, "stdout", page)
    return Console(force_terminal=True, width=100, **more), page


def no_more_than(threads):
    """Whether the number of threads falls back; rich tells its own to end and does not wait for it."""
    end = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    return threading.active_count() <= threads


def test_a_plain_line_shows_values_with_their_units_rate_and_time_left(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with Console().track("round", 500) as track:
        clock.now += 10
        track.update(120, loss=0.842, acc=0.713, psnr_db=11.8, peak_gib=1.25, clients=10, note="[a]", lr=5e-5, gap=None)
    line = "round  120/500   loss 0.842   acc 71.3 %   psnr 11.8 dB   peak  1.2 GiB   clients 10   note [a]   lr 5e-05   gap none"
    assert capsys.readouterr().out == f"{line}   12.0 rounds/s   left 0:00:32\n"


def test_lines_are_throttled_but_the_first_and_the_last_are_printed(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with Console(every_s=10).track("round", 100) as track:
        for done in range(1, 101):
            clock.now += 0.3
            track.update(done, loss=1.0)
    out = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[-1] for line in out] == ["1", "35", "69", "100"]
    assert out[-1].endswith("3.3 rounds/s   took 0:00:30")


def test_reports_after_the_last_step_print_no_line_twice(capsys):
    with Console().track("step", 2) as track:
        for done in (0, 2, 1, 2):
            track.update(done)
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["step  0", "step  2"]


def test_a_track_that_ends_early_prints_its_last_values(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(KeyError), Console(every_s=10).track("round", 100) as track:
        for done in (1, 2, 3):
            clock.now += 0.1
            track.update(done, loss=float(done))
        raise KeyError
    found = [line.split()[1:4] for line in capsys.readouterr().out.splitlines()]
    assert found == [["1/100", "loss", "1.000"], ["3/100", "loss", "3.000"]]


def test_a_resumed_track_counts_only_its_own_steps_in_the_rate(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with Console().track("seed 0, round", 100, start=90) as track:
        clock.now += 8
        track.update(92, loss=float("nan"))
    assert capsys.readouterr().out == "seed 0, round   92/100   loss nan   4.0 s/round   left 0:00:32\n"


def test_columns_stay_aligned_when_numbers_change_width(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    with Console(every_s=0).track("round", 10) as track:
        for done, psnr_db in ((1, 9.8), (9, 11.8), (10, 9.1)):
            clock.now += 1
            track.update(done, psnr_db=psnr_db, acc=psnr_db / 100)
    assert len({line.index(" %") for line in capsys.readouterr().out.splitlines()}) == 1


def test_other_ranks_are_silent_and_open_no_log(capsys, tmp_path):
    with Console(rank=1, log=tmp_path / "log.txt", force_terminal=True) as console:
        console.heading("a"), console.say("b"), console.notice("c"), console.table("d")
        with console.track("round", 2) as track:
            track.update(1, loss=torch.ones(3))  # never read
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_the_log_holds_what_the_screen_shows_without_escape_codes(capsys, tmp_path):
    with Console(log=tmp_path / "run" / "log.txt") as console:
        console.heading("Training")
        console.notice("synthetic data [not a tag] \x1b[31mred\x1b[0m")
        console.say("x" * 300)
        with console.track("round", 1) as track:
            track.update(1, loss=torch.tensor(0.5))
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text == capsys.readouterr().out
    assert "\x1b" not in text and "\nTraining\n--------\nNOTICE: synthetic data [not a tag] red\n" + "x" * 300 in text


def test_the_log_is_continued_and_close_may_be_called_twice(tmp_path):
    for word in ("first", "second"):
        console = Console(log=tmp_path / "log.txt")
        console.say(word)
        console.close()
        console.close()
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_a_log_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Console(log=tmp_path / "file" / "log.txt")


def test_forced_colours_in_the_environment_do_not_draw_a_bar_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Console().track("round", 1) as track:
        track.update(1)
    assert "\x1b" not in capsys.readouterr().out


def test_the_live_bar_goes_and_leaves_its_last_line(monkeypatch, tmp_path):
    threads = threading.active_count()
    console, page = live_console(monkeypatch, log=tmp_path / "log.txt")
    with console, console.track("outer", 2) as outer, console.track("inner [b]", 1) as inner:
        inner.update(1, acc=0.5)
        outer.update(1, acc=0.25)
        console.say("between")
    shown = page.getvalue()
    assert "━" in shown and "\x1b" in shown and "inner [b]  1/1   acc 50.0 %" in shown and "outer  1/2   acc 25.0 %" in shown
    log = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in log and "━" not in log and [line.split()[0] for line in log.splitlines()] == ["inner", "outer", "between"]
    assert no_more_than(threads)


def test_an_exception_leaves_no_thread_behind_and_the_next_track_works(monkeypatch):
    threads = threading.active_count()
    console, page = live_console(monkeypatch)
    with pytest.raises(ZeroDivisionError), console.track("round", 2) as track:
        track.update(1, loss=1 / 0)
    assert no_more_than(threads)
    with console.track("next", 1) as track:
        track.update(1)
    assert no_more_than(threads) and "next  1/1" in page.getvalue()


def test_closing_under_an_open_track_stops_the_bar(monkeypatch):
    threads = threading.active_count()
    console, _ = live_console(monkeypatch)
    with console.track("round", 2) as track:
        console.close()
        track.update(1, loss=0.5)
        assert no_more_than(threads)


@pytest.mark.parametrize("live", [False, True])
def test_workers_may_report_at_once_and_the_count_never_runs_back(monkeypatch, live):
    page = io.StringIO()
    monkeypatch.setattr(sys, "stdout", page)
    console = Console(force_terminal=live, width=100, every_s=0)
    with console.track("step", 800) as track:

        def work(first):
            for done in range(first, 801, 8):
                track.update(done, loss=0.5)

        workers = [threading.Thread(target=work, args=(first,)) for first in range(1, 9)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    assert "800/800" in page.getvalue()
    if not live:
        counts = [int(line.split("/")[0].split()[-1]) for line in page.getvalue().splitlines()]
        assert counts == sorted(counts)


def test_a_track_without_steps_or_reports_prints_nothing(capsys):
    with Console().track("round", 0):
        pass
    assert capsys.readouterr().out == ""


def test_every_rank_has_a_file_of_its_own_with_its_lines_warnings_and_last_error(tmp_path, capsys):
    own = tmp_path / "logs" / "rank-00003.txt"
    before = sys.stderr
    with pytest.raises(KeyError), Console(rank=3, own=own, log=tmp_path / "log.txt") as console:
        console.say("hello")
        console.note("for the file alone")
        with console.track("round", 2) as track:
            track.update(2, loss=0.5)
        print("a warning", file=sys.stderr)
        raise KeyError("no such image")
    text = own.read_text()
    for part in ("hello", "for the file alone", "round  2/2   loss 0.500", "a warning", "Traceback (most recent call last)", "KeyError: 'no such image'"):
        assert part in text
    assert sys.stderr is before and not (tmp_path / "log.txt").exists()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "a warning\n"


def test_the_file_of_rank_0_holds_what_the_screen_shows_and_a_later_life_adds_to_it(tmp_path, capsys):
    for word in ("first", "second"):
        with Console(rank=0, own=tmp_path / "own.txt", force_terminal=False) as console:
            console.say(word)
    assert (tmp_path / "own.txt").read_text() == capsys.readouterr().out == "first\nsecond\n"
