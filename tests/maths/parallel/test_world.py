"""What launchers say, and a world of one. Several ranks are in tests/ranks."""

import pytest
import torch
import torch.distributed as dist

from gidef.errors import InputError
from gidef.parallel.world import Placement, World, first_host, open_world, placement

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "gpu[07-08,11]", "SLURM_STEP_NODELIST": "gpu[08,11]",
}  # fmt: skip


def test_a_plain_process_is_alone_and_so_are_a_shell_in_an_allocation_and_srun_with_one_task() -> None:
    assert placement({}) == Placement(0, 1, 0, "env://")
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a[1-4]"}
    assert placement(allocation).size == 1
    assert placement({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).size == 1


def test_torchrun_wins_over_the_srun_that_started_it() -> None:
    assert placement({**SRUN, **TORCHRUN}) == Placement(3, 4, 1, "env://")


def test_srun_ranks_meet_on_the_first_node_of_the_step_unless_told_otherwise() -> None:
    assert placement(SRUN) == Placement(2, 4, 0, "tcp://gpu08:21234")
    assert placement({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5"}).init_method == "tcp://head:5"
    assert placement({**SRUN, "MASTER_ADDR": "head"}).init_method == "tcp://head:21234"
    without_step = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    assert placement(without_step).init_method == "tcp://gpu07:21234"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("alone", "alone"),
        ("a1,b2", "a1"),
        ("node[1-2]", "node1"),
        ("node[003-010,12]", "node003"),
        ("rack[1-2]n[04,05]-ib,x", "rack1n04-ib"),
        ("gpu-a.cluster.org,gpu-b", "gpu-a.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list_keeps_its_zeros(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE=None"),
        ({"WORLD_SIZE": "2"}, "RANK=None"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_ADDR and MASTER_PORT"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "set MASTER_ADDR"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_JOB_ID"}, "SLURM_JOB_ID=None"),
    ],
)
def test_contradictory_variables_are_bad_input_and_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        placement(environ)


def test_a_world_of_one_has_no_process_group_and_its_collectives_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    with open_world("cpu") as world:
        assert not dist.is_initialized() and world == World() and world.device == torch.device("cpu")
        tensor = torch.arange(3)
        assert world.all_reduce_sum_(tensor) is tensor and tensor.tolist() == [0, 1, 2]
        world.barrier()
        world.agree("nothing", "text")
        assert (world.any(True), world.any(False)) == (True, False)
        assert world.broadcast_json({"a": (1, 2)}) == {"a": [1, 2]} and world.all_gather_json((1,)) == [[1]]


@pytest.mark.parametrize("device", ["cuda:99", "no such thing", "meta"])
def test_a_device_that_is_not_there_is_bad_input(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=device), open_world(device):
        pass
