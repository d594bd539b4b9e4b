"""A recipe in parts: joined, they are the run that one job makes, row by row. In process, small synthetic cells."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from gidef import parts
from gidef.config import (
    CVB,
    Data,
    Dirichlet,
    Evaluation,
    IsotropicNoise,
    JointMatching,
    LocalTraining,
    Matched,
    Model,
    NaiveMatching,
    PostHocDecoder,
    Recipe,
    Rounds,
    Speed,
    Undefended,
)
from gidef.main import main
from gidef.report import pictures
from gidef.tuning import shares
from tests.alone import by_itself  # noqa: F401  (serves every test here)
from tests.ranks.launch import record, results
from tests.small_run import CELLS

RECIPE = Recipe(
    data=Data(name=CELLS, num_clients=3, partition=Dirichlet(alpha=math.inf), min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=1), clients=LocalTraining(batch_size=8),
    defences={
        "undefended": Undefended(), "CVB": CVB(),
        "matched": Matched(defence=IsotropicNoise(), field="std", low=0.1, high=50.0, points=1.0, trials=2),
    },
    attacks={"naive": NaiveMatching(iterations=1), "joint": JointMatching(iterations=1, restarts=2), "decoder": PostHocDecoder(steps=1, batch_size=2)},
    speed=Speed(device="cpu", workers=1, attacks_at_once=4, attack_mode="loop"), seeds=(3, 1),
    evaluation=Evaluation(num_victims=2, num_tuning=0, checkpoints=("final",), judge_epochs=1),
)  # fmt: skip
SECONDS = ("seconds", "seconds_per_round", "process_peak_gib")


def timeless(value):
    """A part of results.json without its clocks."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key not in SECONDS}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def sorted_lines(folder, kind):
    clocks = (*SECONDS, "client_seconds")
    found = [{key: value for key, value in line.items() if key not in clocks} for line in record(folder) if line["kind"] == kind]
    return sorted(json.dumps(line, sort_keys=True) for line in found)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 20])
def test_shares_hold_every_defence_and_seed_once_and_a_search_as_one_piece_with_all_its_seeds(count):
    recipe = dataclasses.replace(RECIPE, seeds=(3, 1, 2))
    found = shares(recipe, count)
    assert len(found) == count
    assert sorted(place for share in found for place in share) == sorted((key, seed) for key in recipe.defences for seed in recipe.seeds)
    searched = [{seed for key, seed in share if key == "matched"} for share in found]
    assert sorted(map(len, searched)) == [0] * (count - 1) + [3]
    work = [len(share) for share in found if not any(key == "matched" for key, _ in share)]
    assert not work or max(work) - min(work) <= 1
    assert all(share == sorted(share, key=[(key, seed) for key in recipe.defences for seed in recipe.seeds].index) for share in found)
    assert shares(dataclasses.replace(recipe, only=("CVB",)), 2) == [[("CVB", 3), ("CVB", 2)], [("CVB", 1)]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One job's run, and the one that two parts made."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_DPI", 10)  # drawing is half of the seconds
        main(RECIPE, name="small", args=["--out", str(folder / "whole")])
        for number in (1, 0):
            assert not (folder / "joined" / "results.json").exists()
            main(RECIPE, name="small", args=["--out", str(folder / "joined"), "--part", f"{number}/2"])
    return folder / "whole", folder / "joined"


def test_joined_parts_are_the_run_of_one_job_row_by_row(folders):
    whole, joined = map(results, folders)
    assert len(joined["rows"]) == 2 + 3 + 3 and joined["tuned"] == whole["tuned"] and "part" not in joined
    for mine, theirs in zip(joined["rows"], whole["rows"], strict=True):
        assert timeless(mine) == timeless(theirs)
    for key in ("training", "bounds", "judge", "weights_sha256", "verdict", "data", "seeds", "pictures"):
        assert timeless(joined[key]) == timeless(whole[key]), key
    for kind in ("round", "tuned", "attack", "attempt"):
        assert sorted_lines(folders[1], kind) == sorted_lines(folders[0], kind), kind
    for name in ("table.md", "table.tex", "table.txt", "tuning.json"):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
    there = [{str(path.relative_to(folder)) for path in folder.rglob("*.png")} for folder in (folders[0], folders[1])]
    assert {path for path in there[1] if not path.startswith("parts")} == there[0]
    assert (folders[1] / "report.html").exists() and {line["kind"] for line in record(folders[1])} >= {"start", "matched", "end"}


def test_a_part_is_a_run_of_its_rows_and_says_so(folders):
    seen = []
    for number, share in enumerate(shares(RECIPE, 2)):
        folder = parts.folder_of(folders[1], number, 2)
        told = results(folder)
        assert told["part"] == [number, 2] and told["verdict"][1].startswith(f"Part {number} of 2 of a run")
        assert [(one["defence"], one["seed"]) for one in told["training"]] == share
        assert {(row["defence"], seed) for row in told["rows"] for seed in row["seeds"]} == set(share)
        seen += share
        if ("matched", 3) in share:  # its target is its own undefended net's, which it trains though another part attacks it
            assert ("undefended", 3) not in share and {line["defence"] for line in record(folder) if line["kind"] == "round"} > {"undefended"}
            mine = next(line for line in record(folder) if line["kind"] == "trained" and line["defence"] == "undefended")
            assert told["tuned"]["matched"]["target"] == mine["val_accuracy"] - 0.01
    assert len(seen) == 6


def test_a_join_that_was_killed_is_made_again_without_hard_links_and_can_be_attacked(folders, tmp_path, monkeypatch, capsys):
    from gidef.cli import main as command

    monkeypatch.setattr(parts.os, "link", lambda *a: (_ for _ in ()).throw(OSError("not here")))
    before = results(folders[1])
    (folders[1] / "results.json").unlink()
    monkeypatch.setattr(parts.job, "run_recipe", lambda *a, **b: pytest.fail("nothing is to be trained again"))
    with pytest.raises(SystemExit):
        main(RECIPE, name="small", args=["--out", str(folders[1]), "--part", "1/2"])
    assert "--resume" in capsys.readouterr().err
    main(RECIPE, name="small", args=["--out", str(folders[1]), "--part", "1/2", "--resume"])
    assert timeless(results(folders[1])["rows"]) == timeless(before["rows"])
    main(RECIPE, name="small", args=["--out", str(folders[1]), "--part", "0/2", "--resume"])
    assert "holds the whole run already" in capsys.readouterr().out
    command(["attack", str(folders[1]), "--attack", "naive", "--defence", "undefended", "matched", "--iterations", "1", "--allow-code"])
    [again] = (folders[1] / "attacked").iterdir()
    assert {row["defence"] for row in results(again)["rows"]} == {"undefended", "matched"}
    command(["attack", str(folders[1]), "--attack", "naive", "--defence", "matched", "--iterations", "1", "--allow-code", "--out", str(tmp_path / "alone")])
    assert {row["defence"] for row in results(tmp_path / "alone")["rows"]} == {"matched"}  # its strength was found before: nothing is to be trained beside it


def test_parts_of_another_recipe_are_not_joined(folders, tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, only=("undefended", "CVB"), seeds=(1,), attacks={})
    main(recipe, name="small", args=["--out", str(tmp_path / "run"), "--part", "0/2", "--clients.lr", "0.002"])
    main(recipe, name="small", args=["--out", str(tmp_path / "run"), "--part", "4/5"])
    assert "part 4 of 5 is empty" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(recipe, name="small", args=["--out", str(tmp_path / "run"), "--part", "1/2"])
    assert "0-of-2 was run with another recipe" in capsys.readouterr().err and not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [(["--part", "0/2"], "needs --out"), (["--part", "2/2", "--out", "a"], "--part 2/2"), (["--part"], "expected I/N"), (["--part", "0/2", "--dry-run"], "leave out --part")],
)
def test_what_makes_no_sense_is_one_message(args, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(RECIPE, name="small", args=args)
    assert left.value.code == 2 and said in capsys.readouterr().err
