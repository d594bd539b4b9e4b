"""Whether a launcher started its job again, and where that job's run is. No process is started."""

from __future__ import annotations

import json
import os
import socket

import pytest

from gidef import restart
from gidef.errors import InputError
from gidef.states import compare_states

TORCHRUN = {"TORCHELASTIC_RUN_ID": "t1"}
SLURM = {"SLURM_JOB_ID": "7"}


def begin(folder, environ):
    folder.mkdir(parents=True)
    (folder / restart.RECIPE).write_text(json.dumps({"job": restart.job(environ)}))


def test_a_plain_process_has_no_job_and_goes_on_with_nothing(tmp_path):
    begin(tmp_path / "a", {})
    assert restart.job({}) == [] and restart.began(tmp_path / "a", {}) is None and restart.recall(tmp_path, {}) is None
    assert restart.began(tmp_path / "missing", TORCHRUN) is None
    (tmp_path / "a" / restart.RECIPE).write_text("[torn")
    assert restart.began(tmp_path / "a", TORCHRUN) is None


def test_torchruns_id_names_the_job_on_every_host_and_its_default_none_names_only_the_agent(tmp_path):
    begin(tmp_path / "a", TORCHRUN)
    assert restart.began(tmp_path / "a", TORCHRUN) == "torchrun-t1"
    other = {"TORCHELASTIC_RUN_ID": "t2"}
    assert restart.job(other)[-1] == f"agent-{socket.gethostname()}-{os.getppid()}" == restart.began(tmp_path / "a", other)
    content = {"job": ["torchrun-none", "agent-elsewhere-1"]}
    (tmp_path / "a" / restart.RECIPE).write_text(json.dumps(content))
    assert restart.began(tmp_path / "a", {"TORCHELASTIC_RUN_ID": "none"}) is None


def test_a_slurm_jobs_number_counts_after_a_requeue_only(tmp_path):
    begin(tmp_path / "a", SLURM)
    assert restart.began(tmp_path / "a", SLURM) is None
    assert restart.began(tmp_path / "a", SLURM | {"SLURM_RESTART_COUNT": "1"}) == "slurm-7"
    assert restart.began(tmp_path / "a", {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}) is None


def test_a_folder_that_the_first_life_chose_is_found_until_its_run_has_ended(tmp_path):
    folder = tmp_path / "2026"
    restart.remember(tmp_path, folder, TORCHRUN)
    assert restart.recall(tmp_path, TORCHRUN) is None  # nothing was begun there yet
    begin(folder, TORCHRUN)
    assert restart.recall(tmp_path, TORCHRUN) == folder
    (folder / "results.json").touch()
    assert restart.recall(tmp_path, TORCHRUN) is None


class Told:
    """Ranks that say what the test says."""

    def __init__(self, *told):
        self.told = list(told)

    def all_gather_json(self, value):
        return [list(value) if one is None else one for one in self.told]


def test_ranks_at_other_rounds_or_states_are_named():
    compare_states(Told(None, [5, "a", "h2"]), "k", 5, "a")
    with pytest.raises(InputError, match=r"k: rank 0 on host .* starts after round 98, and rank 1 on host h2 \(round 40\), rank 2 on host h3 \(round 98\) with another"):
        compare_states(Told(None, [40, "a", "h2"], [98, "b", "h3"], [98, "a", "h4"]), "k", 98, "a")
