"""A run whose clients stream ends with the bits of one in memory (on more ranks: test_server_side.py). Synthetic cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from gidef import config
from gidef.data import partition, synthetic_blood_cells, write_webdataset
from tests.ranks.launch import record, results, run

pytestmark = pytest.mark.ranks


def shards_of_tiny(folder: Path) -> None:
    """The clients of tiny.py, as it cuts them."""
    dataset = synthetic_blood_cells(train=240, val=64, test=64)
    clients = partition.dirichlet(dataset.train.labels, num_clients=4, alpha=1.0, seed=0, min_examples=8)
    write_webdataset(dataset, folder, examples_per_shard=25, clients=clients)


def test_a_run_that_streams_ends_with_the_bits_of_one_in_memory(tmp_path):
    shards_of_tiny(tmp_path / "shards")
    arguments = ("--only", "learned", "--rounds.count", "1", "--evaluation.num-victims", "2", "--evaluation.num-tuning", "0", "--evaluation.checkpoints", "untrained")
    run(1, "tiny.py", *arguments, "--out", str(tmp_path / "memory"))
    streamed = ("--data.stream", "--data.path", str(tmp_path / "shards"), "--data.stream-sample", "64")
    run(1, "tiny.py", *arguments, *streamed, "--out", str(tmp_path / "streamed"))
    found, expected = results(tmp_path / "streamed"), results(tmp_path / "memory")
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["data"]["counts"]["train"] == expected["data"]["counts"]["train"] == 240 and found["data"]["counts"]["judge"] < 100
    lines = [[line for line in record(tmp_path / name) if line["kind"] in ("start", "round")] for name in ("memory", "streamed")]
    assert lines[0][0]["reduction"] == "fixed_point" and [line["loss"] for line in lines[0][1:]] == [line["loss"] for line in lines[1][1:]]


def test_what_cannot_stream_is_refused_with_the_reason():
    def said(**data):
        return "\n".join(config.problems(config.Recipe(data=config.Data(**data), defences={"dp": config.DPSGD(noise_multiplier=1.0, target_epsilon=None)})))

    assert "needs the clients' shards" in said(stream=True) and "and not both" in said(stream=True, path="{client}.tar", client_shards=("0.tar",))
    assert "set data.stream=True" in said(client_shards=("0.tar",)) and "draws each step from all" in said(stream=True, path="{client}.tar")
