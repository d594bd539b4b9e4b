"""Streamed clients end with the bits of clients in memory, on any number of ranks. Synthetic cells."""

from __future__ import annotations

import pytest

from gidef.data import partition, synthetic_blood_cells, write_webdataset
from tests.ranks.launch import record, results, run

pytestmark = pytest.mark.ranks


def test_two_ranks_that_stream_end_with_the_bits_of_one_in_memory(tmp_path):
    dataset = synthetic_blood_cells(train=240, val=64, test=64)
    clients = partition.dirichlet(dataset.train.labels, num_clients=4, alpha=1.0, seed=0, min_examples=8)  # as tiny.py cuts them
    write_webdataset(dataset, tmp_path / "shards", examples_per_shard=25, clients=clients)
    arguments = ("--only", "learned", "--evaluation.num-victims", "2", "--evaluation.num-tuning", "0", "--evaluation.checkpoints", "untrained")
    run(1, "tiny.py", *arguments, "--out", str(tmp_path / "memory"))
    streamed = ("--data.stream", "--data.path", str(tmp_path / "shards"), "--data.stream-sample", "64")
    run(2, "tiny.py", *arguments, *streamed, "--out", str(tmp_path / "streamed"))
    found, expected = results(tmp_path / "streamed"), results(tmp_path / "memory")
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["data"]["counts"]["train"] == expected["data"]["counts"]["train"] == 240 and found["data"]["counts"]["judge"] < 100
    losses = [[line["loss"] for line in record(tmp_path / name) if line["kind"] == "round"] for name in ("memory", "streamed")]
    assert losses[0] == losses[1]
