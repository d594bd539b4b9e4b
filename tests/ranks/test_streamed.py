"""A whole run whose clients stream (its bits, also on more ranks: test_server_side.py). Synthetic cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from gidef import config
from gidef.data import partition, synthetic_blood_cells, write_webdataset
from gidef.forecasts import measured
from tests.ranks.launch import record, results, run

pytestmark = pytest.mark.ranks


def shards_of_tiny(folder: Path) -> None:
    """The clients of tiny.py, as it cuts them."""
    dataset = synthetic_blood_cells(train=240, val=64, test=64)
    clients = partition.dirichlet(dataset.train.labels, num_clients=4, alpha=1.0, seed=0, min_examples=8)
    write_webdataset(dataset, folder, examples_per_shard=25, clients=clients)


def test_a_run_that_streams_trains_on_all_and_attacks_what_stays_in_memory(tmp_path):
    shards_of_tiny(tmp_path / "shards")
    arguments = ("--only", "learned", "--rounds.count", "1", "--evaluation.num-victims", "2", "--evaluation.num-tuning", "0", "--evaluation.checkpoints", "untrained")
    streamed = ("--data.stream", "--data.path", str(tmp_path / "shards"), "--data.stream-sample", "64", "--speed.reduction", "float32")
    said = run(1, "tiny.py", *arguments, *streamed, "--out", str(tmp_path / "run")).stdout
    assert "240 for training" in said and "4 (streamed)" in said
    found = results(tmp_path / "run")
    assert len(list((tmp_path / "run" / "scans").iterdir())) == 4  # found again when the run is resumed: tests/maths/data/test_stream.py
    assert found["data"]["counts"]["train"] == 240 and found["data"]["counts"]["judge"] < 100 and len(found["rows"]) == 3
    plan = measured(tmp_path / "run")
    assert plan["evaluation"].models == plan["evaluation"].chunks == 1 and plan["evaluation"].bytes == 4 * 64 * 8 and plan["evaluation"].seconds > 0 < plan["save_s"]
    start, one = (line for line in record(tmp_path / "run") if line["kind"] in ("start", "round"))
    assert start["reduction"] == "float32" and one["examples"] > 150 and len(one["client_seconds"]) == 3


def test_what_cannot_stream_is_refused_with_the_reason():
    def said(**data):
        return "\n".join(config.problems(config.Recipe(data=config.Data(**data), defences={"dp": config.DPSGD(noise_multiplier=1.0, target_epsilon=None)})))

    assert "needs the clients' shards" in said(stream=True) and "and not both" in said(stream=True, path="{client}.tar", client_shards=("0.tar",))
    assert "set data.stream=True" in said(client_shards=("0.tar",)) and "draws each step from all" in said(stream=True, path="{client}.tar")
