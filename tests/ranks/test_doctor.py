"""What `gidef doctor` finds between two ranks, one of which has another clock, another numpy and another folder. They meet through a file."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gidef
from gidef import doctor

pytestmark = pytest.mark.ranks


def look(folder: Path, rank: int, name: str, out: Path) -> list[doctor.Finding]:
    import gidef.parallel as parallel
    from gidef.parallel.world import open_world

    parallel.open_world = functools.partial(open_world, init_method=f"file://{folder}/{name}", rank=rank, size=2)
    return doctor.examine_ranks(str(out))


def main(folder: Path, rank: int) -> None:
    """Both looks of one rank, as JSON."""
    doctor._torch_pair = list  # saves an import; tests/maths/test_cli.py has it
    alike = look(folder, rank, "alike", folder / "shared" / "run")
    if rank == 1:
        now, version = time.time, importlib.metadata.version
        time.time = lambda: now() - 100
        importlib.metadata.version = lambda name: "1.0" if name == "numpy" else version(name)
        doctor._locks = lambda folder: [doctor.Finding("problem", "stale lock of a killed compilation: here", "delete it")]
    apart = look(folder, rank, "apart", folder / f"own-{rank}")
    print(json.dumps([[(finding.level, finding.what) for finding in found] for found in (alike, apart)]))


def test_what_differs_between_ranks_is_found_and_named(tmp_path):
    environ = os.environ | {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environ = {name: value for name, value in environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE", "GLOO", "NCCL"))}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environ, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    try:
        said = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert said[0] == said[1]  # all ranks know the same
    alike, apart = said[0]
    fine = [what for level, what in alike if level == "ok"]
    assert f"{tmp_path}/shared/run is shared by 2 ranks" in fine and "the same versions on 2 ranks" in fine and "2 ranks on one machine" in fine
    assert any(what.startswith("clocks agree") for what in fine)
    assert not (tmp_path / "shared").exists()  # nothing stays
    assert sum(what.startswith("Python") for _, what in apart) == 1  # what the second rank shares with the first is said once
    problems = [what for level, what in apart if level == "problem"]
    host = alike and next(what for what in problems if "stale lock" in what)
    assert host.startswith("rank 1 (") and host.endswith("): stale lock of a killed compilation: here")
    assert any(what.startswith("clocks differ: ") and ("-100.0 s" in what or "+100.0 s" in what) for what in problems)
    assert any(what.startswith("numpy differs between ranks: ") and "1.0 on rank 1" in what for what in problems)
    assert any(what.startswith("rank 1 (") and f"does not see what rank 0 ({host[8:].split(')')[0]}) writes" in what for what in problems)
    assert len(problems) == 4


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
