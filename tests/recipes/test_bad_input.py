"""Bad input, damaged files and a full disk: one clear error, status 2, nothing half-written. In process, small synthetic cells.

What loading alone refuses is in tests/maths/data/; here it goes through a recipe's `main`, as a user meets it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gidef import main as entry
from gidef import training
from gidef.build import load_model
from gidef.checkpoint import load_file, save_file
from gidef.config import Data, Evaluation, LearnedPerturbation, LocalTraining, Model, Recipe, Rounds, Speed
from gidef.data import Dataset, synthetic_blood_cells
from gidef.errors import InputError
from gidef.main import main
from gidef.parallel import World, run_tasks
from gidef.report import Console, files

RECIPE = Recipe(
    data=Data(name=f"{__file__}:few_cells", num_clients=3, min_examples=4), model=Model(cut="blocks.0"), clients=LocalTraining(batch_size=16),
    rounds=Rounds(count=3, cohort_size=2), defences={"learned": LearnedPerturbation(ramp=0.0)}, attacks={},
    evaluation=Evaluation(num_victims=4, num_tuning=0, judge_epochs=1), speed=Speed(device="cpu", workers=1),
)  # fmt: skip


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=48, val=16, test=16, size=16)


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    """A run sets its own SIGTERM handler and number of threads."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("GIDEF_DATA", "RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIDEF_OFFLINE", "1")


def start(capsys, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a recipe in this process."""
    code = 0
    try:
        main(RECIPE, name="small", args=["--out", str(folder), *arguments])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, folder: Path, *arguments: str) -> str:
    """The one line that says what is wrong."""
    code, _, err = start(capsys, folder, *arguments)
    assert code == 2
    assert err.startswith("gidef: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "results.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed; copy it before changing it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(RECIPE, name="small", args=["--out", str(folder)])
    return folder


def unfinished(whole: Path, folder: Path) -> Path:
    """The run as a kill after its last round would have left it; returns the folder of its checkpoints."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "models")
    (folder / "results.json").unlink()
    return folder / "checkpoints" / "learned-0"


# --- images ------------------------------------------------------------------------------------------------------------


def spoil(key, value):
    return lambda arrays: arrays.__setitem__(key, value(arrays[key]))


ARCHIVES = {
    "wrong keys": (lambda arrays: arrays.__setitem__("images", arrays.pop("train_images")), "train_images is missing"),
    "float images": (spoil("train_images", lambda x: x / 255.0), "train_images has dtype float64"),
    "text labels": (spoil("train_labels", lambda y: y.astype(str)), "train_labels has dtype"),
    "a negative label": (spoil("test_labels", lambda y: y.astype(np.int64) - 1), "test_labels holds -1"),
    "a label out of range": (spoil("test_labels", lambda y: y + 8), "class 8"),
    "a huge label": (spoil("val_labels", lambda y: y.astype(np.int64) + 10**12), "number them without gaps"),
    "pickled objects": (spoil("train_images", lambda x: x.astype(object)), "pickled"),
    "an empty class": (spoil("train_labels", lambda y: np.where(y == 5, 4, y)), "class 5"),
}


def archive(path: Path, change=lambda arrays: None) -> Path:
    dataset, arrays = few_cells(), {}
    for split in ("train", "val", "test"):
        part = getattr(dataset, split)
        arrays |= {f"{split}_images": part.images.permute(0, 2, 3, 1).numpy(), f"{split}_labels": part.labels[:, None].numpy().astype(np.uint8)}
    change(arrays)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_wrong_archive_is_one_line_and_leaves_no_run(case, tmp_path, capsys):
    change, said = ARCHIVES[case]
    path = archive(tmp_path / "cells.npz", change)
    err = refused(capsys, tmp_path / "run", "--data.name", "mine", "--data.path", str(path))
    assert said in err and str(path) in err
    assert not (tmp_path / "run").exists()


def test_a_truncated_archive_and_a_pickle_are_one_line(tmp_path, capsys):
    path = archive(tmp_path / "cells.npz")
    path.write_bytes(path.read_bytes()[:-500])
    assert "truncated" in refused(capsys, tmp_path / "run", "--data.name", "mine", "--data.path", str(path))
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.")
    assert "cells.npz" in refused(capsys, tmp_path / "run", "--data.name", "mine", "--data.path", str(path))
    assert not (tmp_path / "run").exists() and not Path("evil").exists()


# --- declarations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.num-clients", "49", "--data.min-examples", "1"], "49"),
        (["--data.num-clients", "3", "--data.min-examples", "17"], "17"),
        (["--evaluation.num-victims", "48"], "num_victims=48"),
        (["--rounds.cohort-size", "4"], "cohort_size=4"),
        (["--clients.batch-size", "-1"], "clients.batch_size=-1"),
        (["--clients.lr", "nan"], "clients.lr=nan"),
        (["--model.name", "no_such_net"], "no_such_net"),
        (["--model.name", "resnet18", "--model.cut", "layer9"], "layer9"),
        (["--model.name", "no_such_module:net"], "no_such_module"),
        (["--data.name", "no_such_module:cells"], "no_such_module"),
        (["--data.name", "nothing"], "nothing"),
        (["--speed.device", "abacus"], "abacus"),
        (["--speed.device", "mps"], "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_an_impossible_recipe_is_one_line_and_leaves_no_run(arguments, said, tmp_path, capsys):
    assert said in refused(capsys, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [("--rounds.count", "many"), ("--rounds.count", "1.5"), ("--rounds.kount", "1"), ("--model.norm", "none")])
def test_what_cannot_be_parsed_is_named_without_a_traceback(arguments, tmp_path, capsys):
    code, _, err = start(capsys, tmp_path / "run", *arguments)
    assert code == 2 and arguments[0] in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(capsys, tmp_path / "file")
    assert "file/run" in refused(capsys, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_processes_do_not_write_one_folder(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "WAIT_S", 0.2)
    unfinished(whole, tmp_path / "run")
    with files.held(tmp_path / "run"), files.held(tmp_path / "new"):
        for arguments in ((tmp_path / "run", "--resume"), (tmp_path / "new",)):
            assert "another process is writing" in refused(capsys, *arguments)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    assert start(capsys, tmp_path / "run", "--resume")[0] == 0


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    newest = unfinished(whole, folder) / "round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    code, out, _ = start(capsys, folder, "--resume")
    assert code == 0
    assert "NOTICE" in out and "round-000003.safetensors is truncated" in out and "going on from round-000002" in out
    assert "continues after round 2" in out
    assert hashes(folder) == hashes(whole)
    lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "round"] == [1, 2, 3]
    assert [line["kind"] for line in lines].count("trained") == 1


def test_when_all_checkpoints_are_damaged_nothing_starts_over(whole, tmp_path, capsys):
    checkpoints = unfinished(whole, tmp_path / "run")
    for path in checkpoints.glob("round-*"):
        path.write_bytes(b"")
    assert "no good checkpoint" in refused(capsys, tmp_path / "run", "--resume")
    assert len(list(checkpoints.glob("round-*.safetensors"))) == 2


def test_a_checkpoint_of_another_recipe_is_refused(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    checkpoints = unfinished(whole, folder)
    for path in checkpoints.glob("round-*"):
        tensors, meta = load_file(path)
        save_file(path, tensors, meta | {"fingerprint": "another"})
    before = sorted(path.read_bytes() for path in checkpoints.glob("round-*"))
    assert "belongs to another recipe" in refused(capsys, folder, "--resume")
    assert sorted(path.read_bytes() for path in checkpoints.glob("round-*")) == before
    assert not (folder / "results.json").exists()


def test_a_run_killed_right_before_its_model_is_saved_goes_on_without_a_line_lost_or_doubled(tmp_path, capsys, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "export_model", killed)
        with pytest.raises(Killed):
            main(RECIPE, name="small", args=["--out", str(tmp_path / "run")])
    assert start(capsys, tmp_path / "run", "--resume")[0] == 0
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "record.jsonl").read_text().splitlines()]
    assert kinds == ["start", "round", "round", "round", "start", "trained", "matched", "end"]


def test_a_trained_model_needs_no_file_that_its_training_began_with(whole, tmp_path):
    tensors, meta = load_file(whole / "models" / "learned-0.safetensors")
    meta["recipe"]["model"]["pretrained"] = "long/gone.safetensors"
    save_file(tmp_path / "moved.safetensors", tensors, meta)
    model, _ = load_model(tmp_path / "moved.safetensors")
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


def test_a_spoilt_recipe_file_is_one_line(whole, tmp_path, capsys):
    unfinished(whole, tmp_path / "run")
    for content, said in ((b"{", "not JSON"), (b"\xff" * 1000, "not JSON"), (b"{}", "'recipe' is missing"), (b"[]", ""), (b'{"recipe": {"speed": 3}}', "")):
        (tmp_path / "run" / "recipe.json").write_bytes(content)
        err = refused(capsys, tmp_path / "run", "--resume")
        assert "recipe.json cannot be read" in err and said in err and len(err) < 500
        assert (tmp_path / "run" / "recipe.json").read_bytes() == content


# --- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """grow(mebibytes) of a file system of its own, and where it is."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of limited size can only be mounted by root")
    try:
        yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_once_there_is_space(whole, small_disk, capsys):
    place, grow = small_disk
    kept = [*(whole / "snapshots" / "learned-0").glob("[eu]*"), whole / "checkpoints" / "learned-0" / "round-000003.safetensors"]
    grow(sum(path.stat().st_size for path in kept) + 2**19)  # enough for the first round, not for the next round's checkpoint
    assert "disk full" in refused(capsys, place / "run")
    assert not [path for path in place.rglob("*") if "tmp" in path.name]
    assert [path.name for path in sorted((place / "run" / "checkpoints").rglob("*.safetensors"))] == ["round-000001.safetensors"]
    grow("64m")
    code, out, _ = start(capsys, place / "run", "--resume")
    assert code == 0 and "continues after round 1" in out
    assert hashes(place / "run") == hashes(whole)


def test_a_task_that_meets_a_full_disk_is_bad_input_and_not_a_defect():
    def full(task, worker):
        raise InputError("disk full: free some space.")

    with pytest.raises(InputError, match=r"^naive 3: disk full: free some space\.$"):
        run_tasks(World(), ["naive 3"], [1.0], full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_log_on_a_full_disk_is_one_error_and_hides_no_other():
    with pytest.raises(InputError, match="disk full while writing /dev/full"), Console(log="/dev/full") as console:
        console.say("hello")
    with pytest.raises(KeyError, match="the reason"), Console(log="/dev/full") as console:
        console._file.write("not on disk yet")
        raise KeyError("the reason")


# --- several ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"RANK": "two"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "few"}])
def test_a_launchers_contradictory_variables_are_one_line(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entry, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(capsys, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_input_of_one_rank_alone_is_told_by_that_rank_if_it_still_lives(monkeypatch, capsys):
    def run_recipe(recipe, name):
        raise InputError("client 3's state is missing.")

    waited = []
    monkeypatch.setattr(entry, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setitem(sys.modules, "gidef.job", SimpleNamespace(run_recipe=run_recipe))
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit) as end:
        main(dataclasses.replace(RECIPE), name="small", args=[])
    assert end.value.code == 2 and waited == [1.0]
    assert capsys.readouterr().err == "gidef: rank 2: client 3's state is missing.\n"
