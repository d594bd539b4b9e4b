"""Checkpoints: whole or not at all. All tensors are synthetic."""

import errno
import hashlib
import os
import stat
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gidef import checkpoint
from gidef.checkpoint import Behind, export_model, load_export, load_file, load_latest, save_checkpoint, save_file, weights_sha256
from gidef.errors import InputError, StorageError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return {
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "tied": base,
        "again": base,
        "half": base.to(torch.bfloat16),
        "double": base.double(),
        "steps": torch.tensor(seed),
        "mask": base > 0,
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0]),
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_come_back_with_their_dtypes_shapes_bits_and_metadata(tmp_path: Path) -> None:
    meta = {"round": 3, "losses": [0.1, 1e-300, -0.0], "name": "größe", "nested": {"a": None}}
    save_file(tmp_path / "new" / "folder" / "x.safetensors", tensors(), meta)
    back, back_meta = load_file(tmp_path / "new" / "folder" / "x.safetensors")
    assert back_meta == meta and back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype and not back[name].requires_grad
    assert names(tmp_path / "new" / "folder") == ["x.safetensors"]


def test_what_was_loaded_outlives_the_file_and_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(path, tensors(), {})
    first, _ = load_file(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place, as a mapped file would show
    first["tied"] += 1
    assert torch.equal(first["tied"], tensors()["tied"] + 1) and torch.equal(first["again"], tensors()["again"])


def test_the_file_is_as_readable_as_any_other_that_the_user_makes(tmp_path: Path) -> None:
    save_file(tmp_path / "x.safetensors", tensors(), {})
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_file_cut_anywhere_or_changed_in_any_byte_is_refused(tmp_path: Path) -> None:
    path, bad = tmp_path / "x.safetensors", tmp_path / "bad.safetensors"
    values = {"w": torch.arange(1.0, 9.0), "b": torch.tensor([1, 2])}
    save_file(path, values, {"round": 3})
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        bad.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"bad.safetensors is (truncated or )?damaged|bad.safetensors has format"):
            load_file(bad)
    (header,) = struct.unpack("<Q", whole[:8])
    harmless = 0
    for position in range(len(whole)):
        bad.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            back, meta = load_file(bad)
        except InputError:
            continue
        harmless += 1  # such as the padding's blanks
        assert position < 8 + header and meta == {"round": 3}
        assert all(torch.equal(back[name], values[name]) for name in values), position
    assert harmless < 10


def test_files_of_others_and_missing_files_are_bad_input(tmp_path: Path) -> None:
    checkpoint.write_safetensors({"w": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="format None"):
        load_file(tmp_path / "foreign")
    with pytest.raises(InputError, match="does not exist"):
        load_file(tmp_path / "nowhere")
    with pytest.raises(TypeError):
        save_file(tmp_path / "x", {}, {"not json": object()})
    assert names(tmp_path) == ["foreign"]


def test_a_folder_in_a_files_place_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run cannot be read \(a folder\): expected a file"):
        (tmp_path / "run").mkdir()
        load_file(tmp_path / "run")


def test_the_newest_checkpoints_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    notices: list[str] = []
    assert load_latest(tmp_path / "none", notices.append) is None
    (tmp_path / "round-000001.safetensors.0123.tmp").touch()  # of a killed process
    (tmp_path / "round-notes.txt").touch()
    for number in (1, 2, 10, 1_000_000):
        save_checkpoint(tmp_path, number, tensors(number), {"number": number}, keep=3)
    assert names(tmp_path) == ["round-000002.safetensors", "round-000010.safetensors", "round-1000000.safetensors", "round-notes.txt"]
    number, values, meta = load_latest(tmp_path, notices.append)
    assert (number, int(values["steps"]), meta) == (1_000_000, 1_000_000, {"number": 1_000_000})
    assert load_latest(tmp_path, notices.append, at=10)[0] == 10
    with pytest.raises(InputError, match="no checkpoint of round 3"):
        load_latest(tmp_path, notices.append, at=3)
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, 4, tensors(), {}, keep=0)
    assert not notices


def test_a_damaged_newest_falls_back_says_so_and_does_not_count_as_kept(tmp_path: Path) -> None:
    notices: list[str] = []
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, tensors(number), {}, keep=3)
    cut, flipped = tmp_path / "round-000003.safetensors", tmp_path / "round-000002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    whole = flipped.read_bytes()
    flipped.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    number, values, _ = load_latest(tmp_path, notices.append)
    assert (number, int(values["steps"])) == (1, 1) and len(notices) == 2
    assert all("damaged" in notice and "going on from round-000001.safetensors" in notice for notice in notices)
    save_checkpoint(tmp_path, 4, tensors(4), {}, keep=2)
    assert {"round-000001.safetensors", "round-000003.safetensors.damaged", "round-000004.safetensors"} < set(names(tmp_path))
    assert load_latest(tmp_path, notices.append)[0] == 4 and len(notices) == 2


def test_starting_over_is_refused_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    for number in (1, 2):
        save_checkpoint(tmp_path, number, tensors(), {})
        (tmp_path / f"round-00000{number}.safetensors").write_bytes(b"")
    for _ in range(2):  # and the second attempt is refused as well
        with pytest.raises(InputError, match="round-000002.safetensors, round-000001.safetensors. Restore one, or remove"):
            load_latest(tmp_path, pytest.fail)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(_tensors: object, path: Path, **__: object) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("module", "function", "fails"), [(os, "fsync", full_disk), (checkpoint, "write_safetensors", half_written)])
def test_a_full_disk_says_what_to_do_and_leaves_the_last_checkpoint_alone(
    module: object, function: str, fails: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {"number": 1}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, fails)
        with pytest.raises(InputError, match=r"disk full: .*round-000002.* needs 0\.0 MiB; free space"):
            save_checkpoint(tmp_path, 2, tensors(2), {}, keep=1)
        with pytest.raises(InputError, match="disk full"):
            save_checkpoint(tmp_path, 1, tensors(2), {}, keep=1)  # over the good one
    assert names(tmp_path) == ["round-000001.safetensors"]
    assert load_latest(tmp_path, pytest.fail)[2] == {"number": 1}


def test_other_errors_and_interrupts_leave_nothing_half_written_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    for fails, error in ((interrupted, KeyboardInterrupt), (broken, OSError)):
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(error):
            save_file(tmp_path / "x", tensors(), {})
        assert names(tmp_path) == []


def test_an_export_carries_its_recipe_and_hash_and_a_checkpoint_is_no_export(tmp_path: Path) -> None:
    export_model(tmp_path / "model.safetensors", tensors(), {"rounds": 3}, {"accuracy": 0.5})
    back, meta = load_export(tmp_path / "model.safetensors")
    assert meta == {"recipe": {"rounds": 3}, "accuracy": 0.5, "weights_sha256": weights_sha256(back)}
    save_file(tmp_path / "x", tensors(), {})
    with pytest.raises(InputError, match="no recipe"):
        load_export(tmp_path / "x")


def test_the_weights_hash_is_that_of_float32_little_endian_bytes_in_name_order() -> None:
    values = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(), "a": torch.tensor(0.5, dtype=torch.float64)}
    expected = hashlib.sha256(struct.pack("<5f", 0.5, 1.0, 3.0, 2.0, 4.0)).hexdigest()
    assert weights_sha256(values) == expected == weights_sha256(dict(reversed(values.items())))
    assert weights_sha256({}) == hashlib.sha256().hexdigest()


def test_a_call_behind_runs_beside_its_caller_and_the_next_waits_for_it():
    began, go, order = threading.Event(), threading.Event(), []

    def slow():
        began.set()
        assert go.wait(30)
        order.append("slow")

    with Behind() as behind:
        behind.call(slow)
        assert began.wait(30) and order == []  # it is on its way, and the caller is here
        threading.Timer(0.1, go.set).start()
        behind.call(order.append, "next")
        assert order[0] == "slow"
    assert order == ["slow", "next"]


def test_what_a_call_behind_raises_is_raised_at_the_next_or_at_the_end():
    def full():
        raise StorageError("disk full")

    with pytest.raises(StorageError, match="disk full"), Behind() as behind:
        behind.call(full)
        behind.call(pytest.fail, "after an error")
    with pytest.raises(StorageError, match="disk full"), Behind() as behind:
        behind.call(full)
    done = []
    with pytest.raises(KeyError), Behind() as behind:  # the caller's own error comes first, and the file is finished
        behind.call(lambda: (time.sleep(0.05), done.append(1)))
        raise KeyError
    assert done == [1]
