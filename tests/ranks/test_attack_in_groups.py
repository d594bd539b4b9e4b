"""An attack of a run whose clients span two ranks: one network over both, images as of one rank. Synthetic cells, gloo, a small transformer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gidef.config import DeepLeakage, Evaluation, IsotropicNoise, JointMatching, NaiveMatching, Recipe, Rounds, Speed
from gidef.errors import InputError
from gidef.parallel import World
from tests.ranks.launch import ROOT, environment
from tests.ranks.shards_recipe import RECIPE as CLIENTS

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
RECIPE = dataclasses.replace(
    CLIENTS, defences={"noise": IsotropicNoise()}, rounds=Rounds(count=1, cohort_size=2),
    attacks={"naive": NaiveMatching(iterations=3), "joint": JointMatching(iterations=3, restarts=2), "refused": NaiveMatching(iterations=2), "DLG": DeepLeakage(iterations=1)},
    evaluation=Evaluation(num_victims=3, num_tuning=0, judge_epochs=1), speed=Speed(shard_size=2, workers=1, device="cpu"),
)  # fmt: skip


def attacked(recipe: Recipe, folder: Path, world: World, *, groups: bool) -> dict[str, list]:
    """What is in the files of each attack after `in_groups`, or what one rank finds on the module itself; and what one rank's program is left with."""
    from gidef import build, fits, inversions, methods
    from gidef.cells import make_cells
    from gidef.releases import Releases
    from gidef.report import Console
    from gidef.runs import Run
    from gidef.training import train

    setting = build.load_setting(recipe, world=world, notice=lambda text: None)
    run = Run(setting, world, folder, Console(rank=1), None, "a mark")
    cells, releases = make_cells(run, {("noise", 0): train(run, "noise", recipe.defences["noise"], 0)}, folder / "attacks"), Releases(run)
    found: dict[str, list] = {}
    for cell in cells:
        cell.releases = releases.of(cell)
    if groups:
        real = inversions.invert_large

        def sometimes(observation, module, matching, *, chunk, **options):
            if matching.iterations == 2 and chunk[0][0] == 1:
                raise InputError("granted labels do not fit")
            return real(observation, module, matching, chunk=chunk, **options)

        inversions.invert_large = lambda *given, **options: (yield from sometimes(*given, **options))
        inversions.in_groups(run, cells, lambda cell: fits.fitted(run, cell, folder / "attacks"))
    for cell in cells:
        if groups:
            rows = [inversions.load_marked(path, inversions.mark(run, cell)) for path in sorted(cell.folder.glob("attacks-*"))]
            found[cell.name] = [[tensors["images"].tolist(), tensors["attacks"].tolist(), meta["mode"]] for tensors, meta in rows]
            if cell.name == "refused":
                inversions.collect(run, cell)
                found["told"] = [[attempt["status"], attempt["error"], attempt["iterations"]] for attempt in cell.attempts]
        else:
            plan = methods.plan(methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=0))
            large = inversions._large(run, cell, plan)
            chunks = [tuple((victim, start) for start in range(plan.matching.starts)) for victim in range(3)] if large else []
            results = [inversions.attacks.drain(large(chunk)) for chunk in chunks]
            found[cell.name] = [[tensors["images"].tolist(), tensors["attacks"].tolist(), "module"] for tensors in results]
    return found


def test_attacks_of_two_ranks_find_on_one_network_in_slices_what_one_rank_finds(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    mine, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert mine == other  # both read what the group wrote
    alone = attacked(dataclasses.replace(RECIPE, speed=Speed(workers=1, device="cpu")), tmp_path / "alone", World(), groups=False)
    assert mine["DLG"] == alone["DLG"] == []  # left to the vectorised program
    failed = mine["refused"].pop(1)  # one victim's error fails that victim alone
    alone["refused"].pop(1)
    assert mine["told"] == [["ok", "", 3], ["failed", "granted labels do not fit", 0], ["ok", "", 3]] and (torch.tensor(failed[0]) == 0.5).all()
    for name, starts in (("naive", 1), ("joint", 2), ("refused", 1)):
        assert [(len(attacks), mode) for _, attacks, mode in mine[name]] == [(starts, "groups")] * len(alone[name])
        for (images, attacks, _), (expected, same, _) in zip(mine[name], alone[name], strict=True):
            apart = (torch.tensor(images) - torch.tensor(expected)).abs()
            assert attacks == same and float(apart.mean()) < 2e-3 and float(apart.quantile(0.95)) < 5e-3, apart.max()
            assert float(torch.tensor(images).std()) > 0.1


if __name__ == "__main__":
    from gidef.parallel import open_world, with_mesh

    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    with open_world("cpu", 300, init_method=f"file://{folder}/meet", rank=rank, size=2) as world:
        found = attacked(RECIPE, folder / "run", with_mesh(world, 2), groups=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))
