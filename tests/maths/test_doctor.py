"""`gidef doctor`, one process: fabric and run folders. What it finds between ranks is in tests/ranks/test_doctor.py."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import tomllib
from pathlib import Path

import pytest

from gidef import doctor
from gidef.parallel import World

HERE = [(1, "lo"), (2, "eth0"), (3, "ib0"), (4, "ib1")]


@pytest.fixture(autouse=True)
def interfaces(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: HERE)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


@pytest.mark.parametrize(
    ("variable", "text", "missing"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", None),
        ("GLOO_SOCKET_IFNAME", "ib0,ib1", None),
        ("GLOO_SOCKET_IFNAME", "ib", "ib"),  # gloo takes no beginnings
        ("GLOO_SOCKET_IFNAME", "eth0,eth1", "eth1"),
        ("NCCL_SOCKET_IFNAME", "ib", None),
        ("NCCL_SOCKET_IFNAME", "=ib0", None),
        ("NCCL_SOCKET_IFNAME", "=ib", "ib"),
        ("NCCL_SOCKET_IFNAME", "hsn,ib", None),  # one of them is enough
        ("NCCL_SOCKET_IFNAME", "hsn", "hsn"),
        ("NCCL_SOCKET_IFNAME", "^docker,virbr", None),
    ],
)
def test_an_interface_that_the_environment_names_must_be_there(variable, text, missing):
    [finding] = doctor._fabric({variable: text})
    if missing is None:
        assert finding.level == "ok"
    else:
        assert finding.level == "problem" and finding.what.endswith(f"no interface {missing}") and "ib0, ib1" in finding.cure


@pytest.mark.parametrize(("address", "bad"), [("127.0.1.1", True), ("::1", True), ("10.0.0.7", False)])
def test_a_host_of_several_whose_name_is_its_loopback_is_found(address, bad, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(None, None, None, "", (address, 0))])
    assert [finding.level for finding in doctor._fabric({"SLURM_JOB_NUM_NODES": "2"})] == ["problem"] * bad
    assert doctor._fabric({"SLURM_JOB_NUM_NODES": "1"}) == [] == doctor._fabric({})
    assert [finding.level for finding in doctor._reached(["rank 0 (a)", "rank 1 (b)"], [["a", False], ["b", bad]])] == ["problem" if bad else "ok"]
    assert doctor._reached(["rank 0 (a)", "rank 1 (a)"], [["a", bad], ["a", bad]])[0].level == "ok"  # one machine
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert not doctor._loopback()


def test_a_run_folder_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    [refused] = doctor._folder(tmp_path / "file" / "run")
    assert refused.level == "problem" and "--out" in refused.cure
    [fine] = doctor._folder(tmp_path / "deep" / "down" / "run")
    assert fine.level == "ok" and sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    (tmp_path / "kept").mkdir()
    assert doctor._folder(tmp_path / "kept")[0].level == "ok" and list((tmp_path / "kept").iterdir()) == []


def test_a_stale_lock_is_found_where_the_launchers_compile_and_a_fresh_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    old = time.time() - 2 * doctor.STALE_LOCK_S
    places = [tmp_path / "own" / "py311", tmp_path / "runs" / "host-17" / "extensions" / "shm", tmp_path / "a" / "extensions" / "shm"]
    for place in places:
        place.mkdir(parents=True)
        (place / "lock").touch()
    assert doctor._locks(Path("runs")) == []
    for place in places:
        os.utime(place / "lock", (old, old))

    def found(*looked: doctor.Finding) -> list[str]:
        return [finding.what.rpartition(": ")[2] for finding in looked if "stale lock" in finding.what]

    own, run, named = (str(place / "lock") for place in places)
    monkeypatch.setattr(doctor, "_torch_pair", list)
    assert found(*doctor.examine()) == [own, os.path.relpath(run, tmp_path)]
    assert found(*doctor.examine(str(tmp_path / "a"))) == [named, own] and found(*doctor.examine(str(tmp_path))) == [named, own]
    monkeypatch.setattr("gidef.parallel.open_world", lambda *_: contextlib.nullcontext(World()))
    assert found(*doctor.examine_ranks(str(tmp_path / "a"))) == [named, own]


def test_all_that_the_package_wants_is_looked_for():
    project = tomllib.loads((Path(doctor.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [_name(text) for text in project["dependencies"]]
    assert sorted(wanted) == sorted(doctor.REQUIRED)
    extras = {_name(text) for name in ("deepspeed", "dp", "tensorboard", "wandb", "bench") for text in project["optional-dependencies"][name]}
    assert extras < set(doctor.OPTIONAL)


def _name(text: str) -> str:
    return re.match(r"[\w-]+", text)[0].lower()
