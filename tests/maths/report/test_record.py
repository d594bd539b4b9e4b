import json
import threading

import numpy as np
import pytest
import torch

from gidef.errors import InputError
from gidef.report import files
from gidef.report.record import Record, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "record.jsonl"


def test_lines_come_back_in_order_with_kind_first(path):
    with Record(path) as record:
        record.append("round", round=3, loss=0.5)
        record.append("round", loss=0.25, round=4)
    assert [list(line) for line in read(path)] == [["kind", "round", "loss"], ["kind", "loss", "round"]]
    assert [line["loss"] for line in read(path)] == [0.5, 0.25]


def test_tensors_arrays_and_paths_become_json_and_what_is_not_finite_becomes_null(path):
    with Record(path) as record:
        record.append(
            "a",
            scalar=torch.tensor(2.5, requires_grad=True),
            half=torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
            number=np.float32(0.5),
            flags=(True, None),
            nan=float("nan"),
            folder=path,
            nested={1: {"x": [-float("inf")]}},
            name="Blutkörperchen",
        )
    (line,) = read(path)
    expected = {"kind": "a", "scalar": 2.5, "half": [1.5, None], "number": 0.5, "flags": [True, None], "nan": None, "folder": str(path)}
    assert line == expected | {"nested": {"1": {"x": [None]}}, "name": "Blutkörperchen"}
    assert "NaN" not in path.read_text()


def test_a_value_without_json_form_is_a_defect_and_leaves_no_half_line(path):
    with Record(path) as record:
        record.append("a")
        with pytest.raises(TypeError, match="no JSON form"):
            record.append("b", value=object())
    assert [line["kind"] for line in read(path)] == ["a"]


def test_each_line_is_on_disk_as_soon_as_it_is_appended(path):
    record = Record(path)
    record.append("a", x=1)
    assert read(path) == [{"kind": "a", "x": 1}]
    record.close()


def test_a_torn_last_line_is_left_out_and_the_next_line_does_not_stick_to_it(path):
    with Record(path) as record:
        record.append("a", text="é")
    whole = path.read_bytes()
    for torn in (b'{"kind": "b", "te', b'{"kind": "b", "text": "\xc3', b"\0\0\0", b"{}", b"12"):
        path.write_bytes(whole + torn)
        assert [line["kind"] for line in read(path)] == ["a"]
        with Record(path) as record:
            record.append("c")
        assert [line["kind"] for line in read(path)] == ["a", "c"]


def test_a_last_line_that_lacks_only_its_newline_is_kept(path):
    with Record(path) as record:
        record.append("a")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Record(path) as record:
        record.append("b")
    assert [line["kind"] for line in read(path)] == ["a", "b"]


def test_resuming_keeps_the_lines_before_the_checkpoint_and_doubles_none(path):
    with Record(path) as record:
        record.append("start")
        for number in range(5):
            record.append("round", round=number)
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes() + b'{"kind": "rou')
    with Record.open(path, keep=lambda line: line["kind"] != "round" or line["round"] <= 2) as record:
        assert path.read_bytes() == b"".join(before[:4])
        record.append("round", round=3)
    assert [line.get("round") for line in read(path)] == [None, 0, 1, 2, 3]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_unchanged_file_is_not_rewritten(path, monkeypatch):
    with Record(path) as record:
        record.append("a")
    monkeypatch.setattr("gidef.report.record.write_atomically", None)
    Record.open(path, keep=lambda line: True).close()


@pytest.mark.parametrize("bad", ["{oops}", "[1]", '{"no": "kind"}', "", '{"kind": 3}'])
def test_a_bad_line_in_the_middle_is_named_by_file_and_number(path, bad):
    path.parent.mkdir()
    path.write_text(f'{{"kind": "a"}}\n{bad}\n{{"kind": "b"}}\n')
    with pytest.raises(InputError, match=r"record.jsonl, line 2: "):
        read(path)
    with pytest.raises(InputError, match=r"line 2"):
        Record(path)


def test_a_missing_record_is_an_input_error(path):
    with pytest.raises(InputError, match="cannot read the record"):
        read(path)


def test_threads_do_not_mix_their_lines(path):
    with Record(path) as record:

        def work(worker):
            for number in range(50):
                record.append("step", worker=worker, number=number, text="x" * 500)

        workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    lines = read(path)
    assert len(lines) == 200
    assert all([line["number"] for line in lines if line["worker"] == worker] == list(range(50)) for worker in range(4))


def test_a_short_write_is_completed(path):
    class Slow:
        """A file that takes three bytes at a time."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:3])

        def close(self):
            self.file.close()

    with Record(path) as record:
        record._file = Slow(record._file)
        record.append("a", text="abcdefgh")
    assert json.loads(path.read_text()) == {"kind": "a", "text": "abcdefgh"}


def test_a_full_disk_says_so_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="disk full while writing .*results.json"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["results.json"]
