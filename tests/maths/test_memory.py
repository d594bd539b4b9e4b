"""Peaks of memory: what is counted, and what a training records of it. Small synthetic cells, the small net, one round."""

import mmap
import os
import resource
from pathlib import Path

import pytest
import torch

from gidef import memory
from gidef.config import Undefended
from gidef.parallel import World
from gidef.training import train
from tests.small_run import RECIPE, one_thread, start

GIB = 2**30
CPU = torch.device("cpu")


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the reference is Linux'")
def test_the_peak_of_a_process_counts_what_it_holds_and_does_not_fall():
    before = resident()
    with mmap.mmap(-1, 2**28) as ballast:  # a quarter of a GiB of its own: an allocator could hand out what it kept
        ballast.write(bytes([1]) * 2**28)
        held = resident()
    [(name, peak)] = memory.peaks(CPU).items()
    assert name == "process_peak_gib" and held > before + 0.2 and peak >= 0.99 * held
    assert peak < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    assert memory.peaks(CPU)[name] >= peak


def held_once():
    """A quarter of a GiB, taken and given back."""
    with mmap.mmap(-1, 2**28) as ballast:
        ballast.write(bytes([1]) * 2**28)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process can be forgotten on Linux alone")
def test_the_peak_of_a_process_is_counted_anew_once_it_is_forgotten():
    held_once()
    before = memory.peaks(CPU)["process_peak_gib"]
    assert memory.forget_peak(CPU) is True
    after = memory.peaks(CPU)["process_peak_gib"]
    assert 0.9 * resident() < after < before - 0.2
    held_once()
    assert memory.peaks(CPU)["process_peak_gib"] > after + 0.2


def test_where_a_peak_cannot_be_forgotten_it_is_said(monkeypatch):
    def refused(self, text):
        raise PermissionError(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refused)
        assert memory.forget_peak(CPU) is False
    monkeypatch.setattr(memory, "_mark", lambda: None)  # what is read instead is not counted anew
    assert memory.forget_peak(CPU) is False


def test_without_the_kernels_mark_getrusage_is_asked_in_its_unit(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 1024 * most <= memory.peaks(CPU)["process_peak_gib"] * GIB <= 1.01 * 1024 * most + 2**20
    monkeypatch.setattr(memory.sys, "platform", "darwin")  # where it is in bytes
    assert most <= memory.peaks(CPU)["process_peak_gib"] * GIB <= 1.01 * most + 2**10


def test_on_a_gpu_tensors_of_one_training_are_counted_anew(monkeypatch):
    """On a stand-in for the allocator's counters."""
    device, told = torch.device("cuda:1"), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", told.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda one: {device: 3 * GIB}[one])
    memory.forget_peak(CPU)
    assert told == []
    memory.forget_peak(device)
    assert told == [device] and memory.peaks(device)["gpu_peak_gib"] == 3.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_peak_is_that_of_its_tensors():
    device = torch.device("cuda")
    memory.forget_peak(device)
    before = torch.cuda.memory_allocated(device) / GIB
    held = torch.ones(2**26, device=device)
    del held
    assert memory.peaks(device)["gpu_peak_gib"] == pytest.approx(before + 0.25, abs=0.001)
    memory.forget_peak(device)
    assert memory.peaks(device)["gpu_peak_gib"] == pytest.approx(before, abs=0.001)


def test_a_training_records_the_largest_peak_of_any_rank(tmp_path, monkeypatch):
    asked, gather = [], World.all_gather_json

    def of_two(self, value):
        if isinstance(value, dict) and "process_peak_gib" in value:
            asked.append(value["process_peak_gib"])
            return [value, {"process_peak_gib": 100.0, "anew": False}]
        return gather(self, value)

    held_once()
    before = memory.peaks(CPU)["process_peak_gib"]
    with one_thread():
        plain = train(start(RECIPE, tmp_path / "one"), "undefended", Undefended(), 0)
        monkeypatch.setattr(World, "all_gather_json", of_two)
        both = train(start(RECIPE, tmp_path / "two"), "undefended", Undefended(), 0)
    assert plain.summary["process_peak_gib"] > 0.05 and asked[0] < 100.0 == both.summary["process_peak_gib"]
    assert both.summary["process_peak_of"] == "process", "one of two ranks could not forget"
    if plain.summary["process_peak_of"] == "training":
        assert plain.summary["process_peak_gib"] < before - 0.1, "what was held before is none of it"
    assert both.sha256 == plain.sha256
