"""`gidef` on the command line, called in process; small synthetic cells."""

from __future__ import annotations

import builtins
import os
import sys
import time

import pytest
import torch

from gidef import cli, doctor, job
from gidef.config import JointMatching, NaiveMatching, Recipe, to_json
from gidef.data import Dataset, load_dataset, synthetic_blood_cells
from gidef.report.files import write_atomically
from gidef.report.results import load as load_results

OWN = f"{__file__}:few_cells"


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=24, val=8, test=8, size=16)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No cache, no data, no network, no launcher, and a folder of its own."""
    for name in ("GIDEF_DATA", "RANK", "SLURM_STEP_NUM_TASKS", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIDEF_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def ended(capsys, *argv: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    code = 0
    try:
        cli.main(list(argv))
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *argv: str) -> str:
    """The one line on standard error with which bad input ends."""
    code, _, err = ended(capsys, *argv)
    assert code == 2
    assert err.startswith("gidef: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# --- parsing -----------------------------------------------------------------------------------------------------------


def test_without_a_command_the_help_comes_with_status_2(capsys):
    code, out, _ = ended(capsys)
    assert code == 2
    assert all(command in out for command in ("data", "attack", "report", "doctor"))


@pytest.mark.parametrize("argv", [("data",), ("attack",), ("report",), ("dance",), ("data", "list", "more"), ("attack", "x", "--victims", "many")])
def test_an_incomplete_or_unknown_command_is_status_2_without_a_traceback(argv, capsys):
    code, _, err = ended(capsys, *argv)
    assert code == 2 and "usage: gidef" in err and "Traceback" not in err


def test_an_error_that_is_no_bad_input_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise ValueError("a defect")

    monkeypatch.setattr(cli, "_data_list", broken)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["data", "list"])


# --- data --------------------------------------------------------------------------------------------------------------


def test_the_list_has_every_set_and_why_some_are_not_supported(capsys):
    code, out, _ = ended(capsys, "data", "list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "28/64/128/224" in lines["bloodmnist"] and "not supported" not in lines["bloodmnist"]
    assert "not supported: " in lines["chestmnist"] and "several labels" in lines["chestmnist"]
    assert "cifar10" in lines and "synthetic" in lines


def test_converting_for_clients_writes_shards_of_each_and_says_how_to_stream_them(tmp_path, capsys):
    code, out, _ = ended(capsys, "data", "convert", OWN, "--out", str(tmp_path), "--clients", "2", "--alpha", "0.5", "--kind", "npy")
    assert code == 0 and f"--data.stream --data.path {tmp_path} --data.num-clients 2" in " ".join(out.split())
    assert {path.name for path in tmp_path.glob("*.tar")} == {"client-00000-00000.tar", "client-00001-00000.tar", "val-00000.tar", "test-00000.tar"}
    assert "give their number as --clients" in refused(capsys, "data", "convert", OWN, "--out", str(tmp_path), "--alpha", "0.5")


def test_converted_images_come_back_bit_for_bit(tmp_path, capsys):
    folder = tmp_path / "shards"
    code, out, _ = ended(capsys, "data", "convert", OWN, "--out", str(folder), "--examples-per-shard", "10")
    assert code == 0 and f"--data.path {folder}" in out and "SYNTHETIC" in out.upper()
    back, before = load_dataset("synthetic", path=folder, notice=lambda text: None), few_cells()
    for split in ("train", "val", "test"):
        mine, theirs = getattr(back, split), getattr(before, split)
        assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)
    assert back.class_names == before.class_names and back.synthetic
    assert len(list(folder.glob("train-*.tar"))) == 3
    assert "holds shards already" in refused(capsys, "data", "convert", OWN, "--out", str(folder))


def test_a_refused_conversion_leaves_nothing(tmp_path, capsys):
    assert "examples_per_shard=0" in refused(capsys, "data", "convert", OWN, "--out", str(tmp_path / "shards"), "--examples-per-shard", "0")
    assert "chestmnist" in refused(capsys, "data", "convert", "chestmnist", "--out", str(tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_the_preview_is_a_picture(tmp_path, capsys):
    path = tmp_path / "cells.png"
    code, out, _ = ended(capsys, "data", "preview", OWN, "--out", str(path), "--per-class", "2")
    assert code == 0 and str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


def test_what_cannot_be_shown_is_one_line(tmp_path, capsys):
    assert "nowhere.npz" in refused(capsys, "data", "preview", "--path", "nowhere.npz")
    assert "--per-class 0" in refused(capsys, "data", "preview", OWN, "--per-class", "0")
    assert "nothing to download" in refused(capsys, "data", "download", "synthetic")
    assert "GIDEF_DATA" in refused(capsys, "data", "download", "bloodmnist")
    assert "size=-3" in refused(capsys, "data", "preview", OWN, "--size", "-3")
    assert "no_such_module" in refused(capsys, "data", "preview", "no_such_module:make")
    (tmp_path / "file").touch()
    assert "file/cells.png" in refused(capsys, "data", "preview", OWN, "--out", str(tmp_path / "file" / "cells.png"))
    assert not list((tmp_path / "here").iterdir())


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["attack", "report"])
def test_a_folder_without_a_run_is_one_line(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", str(tmp_path / "file"), str(tmp_path / "empty")):
        assert place in refused(capsys, command, place)
    assert not list((tmp_path / "empty").iterdir()) and not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be read: it is not JSON"),
        (b"{}", "'recipe' is missing in it"),
        (b"[]", "cannot be read"),
        (b'{"name": "x", "recipe": {"type": "Data"}}', "expected a Recipe"),
        (b'{"name": "x", "recipe": {"type": "Recipe", "evaluation": 3}}', "evaluation=3"),
        (b'{"name": "x", "recipe": {"type": "os:system"}}', "--allow-code"),
        (b'{"name": "x", "recipe": {"type": "Recipe", "data": {"type": "Data", "name": "os:getcwd"}}}', "--allow-code"),
        (b'{"name": "x", "recipe": {"type": "Recipe", "kount": 1}}', "kount"),
    ],
)
def test_a_spoilt_or_foreign_recipe_is_one_line_and_runs_no_code(content, said, tmp_path, capsys):
    write_atomically(tmp_path / "recipe.json", content)
    assert said in refused(capsys, "attack", str(tmp_path))


def test_of_several_runs_none_is_rewritten_when_one_cannot_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job.results, "load", lambda path: {} if "good" in str(path) else load_results(path))
    assert "bad/results.json" in refused(capsys, "report", str(tmp_path / "good"), str(tmp_path / "bad"))
    assert not (tmp_path / "good").exists()


def test_attacks_and_defences_that_the_run_has_not_are_named(tmp_path, capsys):
    import json

    write_atomically(tmp_path / "recipe.json", json.dumps({"name": "x", "recipe": to_json(Recipe())}).encode())
    assert "nothing" in refused(capsys, "attack", str(tmp_path), "--attack", "nothing")
    assert "undefended" in refused(capsys, "attack", str(tmp_path), "--defence", "nothing")
    assert "num_victims=0" in refused(capsys, "attack", str(tmp_path), "--victims", "0")


def test_a_share_of_the_attacks_may_be_empty_and_must_be_one_that_there_is(tmp_path, capsys):
    import json

    recipe = Recipe(attacks={"naive": NaiveMatching(), "joint": JointMatching()})
    write_atomically(tmp_path / "recipe.json", json.dumps({"name": "x", "recipe": to_json(recipe)}).encode())
    for part in ("4/4", "1", "-1/3", "a/b"):
        assert "--part" in refused(capsys, "attack", str(tmp_path), f"--part={part}")
    code, out, err = ended(capsys, "attack", str(tmp_path), "--part", "2/3")
    assert (code, out) == (0, "") and "part 2/3 of the attacks is empty" in err
    assert "num_victims=0" in refused(capsys, "attack", str(tmp_path), "--part", "1/3", "--victims", "0")


def test_code_from_a_file_never_takes_another_modules_place(tmp_path):
    from gidef import importing

    (tmp_path / "json.py").write_text("VALUE = 3\n")
    (tmp_path / "broken.py").write_text("raise ImportError('not today')\n")
    before = sys.modules["json"] if "json" in sys.modules else __import__("json")
    assert importing.load(f"{tmp_path}/json.py:VALUE") == 3
    assert sys.modules["json"] is before
    for _ in range(2):  # the half-made module of the first time must not serve the second
        with pytest.raises(ValueError, match="not today"):
            importing.load(f"{tmp_path}/broken.py:VALUE")


# --- doctor ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch):
    """A machine that lacks nothing, whatever this one does."""
    for check in ("_python", "_packages", "_devices", "_launch"):
        monkeypatch.setattr(doctor, check, lambda: [doctor.Finding("ok", "fine")])


def test_the_doctor_is_content_with_a_healthy_machine(healthy, capsys):
    code, out, _ = ended(capsys, "doctor")
    assert code == 0 and "PROBLEM" not in out and "Everything that gidef needs is here." in out


def test_the_doctor_looks_at_this_machine_without_failing():
    findings = doctor.examine()
    assert {finding.level for finding in findings} <= {"ok", "note", "problem"}
    assert all(finding.cure for finding in findings if finding.level == "problem")
    assert any(finding.what.startswith("torch ") for finding in findings)


def test_a_stale_lock_is_found_and_a_fresh_one_is_not(healthy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("old", 3600), ("new", 10)):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    code, out, _ = ended(capsys, "doctor")
    assert code == 1 and "1 problem found" in out
    assert f"{tmp_path}/py311_cpu/old/lock" in out and "py311_cpu/new/lock" not in out


@pytest.mark.parametrize(
    "error", [RuntimeError("operator torchvision::nms does not exist"), ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so")]
)
def test_a_torchvision_of_another_torch_is_found(error, healthy, monkeypatch, capsys):
    real = builtins.__import__

    def mismatched(name, *rest, **more):
        if name == "torchvision":
            raise error
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", mismatched)
    code, out, _ = ended(capsys, "doctor")
    assert code == 1
    assert str(error) in out and torch.__version__ in out and "same index" in out


def test_a_data_folder_that_is_none_is_found(healthy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "nowhere"))
    code, out, _ = ended(capsys, "doctor")
    assert code == 1 and f"GIDEF_DATA={tmp_path}/nowhere is no folder" in out
    (tmp_path / "home" / "sets").mkdir(parents=True)
    (tmp_path / "home" / "sets" / "bloodmnist.npz").touch()
    monkeypatch.setenv("GIDEF_DATA", "~/sets")  # as load_dataset reads it
    code, out, _ = ended(capsys, "doctor")
    assert code == 0 and "bloodmnist.npz" in out


def test_a_missing_package_is_a_problem_with_a_cure(monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "gidef_is_missing_this"))
    levels = {finding.what.split()[0]: finding for finding in doctor._packages()}
    assert levels["torch"].level == "ok"
    assert levels["gidef_is_missing_this"].level == "problem" and "pip install" in levels["gidef_is_missing_this"].cure
