"""Recipes as a user starts them. Synthetic cells, except where a test says otherwise."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from gidef import importing
from gidef.cli import main as gidef
from gidef.config import from_json, problems, to_json
from gidef.job import report_again
from gidef.main import main
from tests.alone import by_itself, ended  # noqa: F401  (serves every test here)
from tests.ranks.launch import ROOT, record, results, run

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RECIPE


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_read_without_running_and_has_no_problem(name):
    recipe = load(name)
    assert problems(recipe) == []
    assert from_json(json.loads(json.dumps(to_json(recipe))), load=importing.load) == recipe


@pytest.fixture(autouse=True)
def recipes_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


def here(*arguments: str, check: bool = True):
    """The tiny recipe in this process."""
    return ended(lambda: main(load("tiny"), name="tiny", args=list(arguments)), check=check)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return folder, run(1, "tiny.py", "--out", str(folder))


def test_the_tiny_run_says_what_was_protected_and_shows_it(tiny):
    folder, done = tiny
    found = results(folder)
    table = {(row["defence"], row["attack"], row["checkpoint"]) for row in found["rows"]}
    for checkpoint in ("untrained", "final"):
        assert {(d, a, c) for d, a, c in table if c == checkpoint} == {
            ("undefended", "naive", checkpoint), ("undefended", "joint", checkpoint), ("learned", "naive", checkpoint),
            ("learned", "joint", checkpoint), ("learned", "decoder", checkpoint),
        }  # fmt: skip
    assert {bound["name"] for bound in found["bounds"]} >= {"constant grey", "mean image", "class mean"}
    assert [net["defences"] for net in found["nets"]] == [["undefended"], ["learned"]] and all(net["parity"] < 1e-12 for net in found["nets"])
    assert json.loads((folder / "nets.json").read_text()) == found["nets"] and "small (learned): gradients as the untouched network's to" in done.stdout
    assert found["data"]["synthetic"] is True
    assert "synthetic" in done.stdout.lower()
    assert all(sentence in " ".join(done.stdout.split()) for sentence in found["verdict"])
    for picture in found["pictures"]:
        assert (folder / picture).stat().st_size > 1000
        assert picture in done.stdout
    for name in ("table.csv", "table.md", "table.tex", "report.html", "pictures/tradeoff.png", "pictures/tradeoff.csv", "log.txt", "recipe.json", "models/learned-0.safetensors"):
        assert (folder / name).exists()


def test_the_record_holds_every_round_and_every_attacked_victim(tiny):
    folder, _ = tiny
    lines = record(folder)
    rounds = [(line["defence"], line["round"]) for line in lines if line["kind"] == "round"]
    assert rounds == [("undefended", 1), ("undefended", 2), ("learned", 1), ("learned", 2)]
    attacks = [line for line in lines if line["kind"] == "attack"]
    assert len(attacks) == 2 * 5 * 8
    for row in results(folder)["rows"]:
        values = [line["psnr_db"] for line in attacks if (line["defence"], line["attack"], line["checkpoint"]) == (row["defence"], row["attack"], row["checkpoint"])]
        assert sum(values) / len(values) == pytest.approx(row["psnr_db"]["mean"])


def test_runs_are_reported_again_each_and_side_by_side(tiny, tmp_path, capsys):
    folder, _ = tiny
    before, copies = results(folder), [tmp_path / "a", tmp_path / "b"]
    for copy in copies:
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "attacks", "checkpoints", "clients", "models", "snapshots"))
        (copy / "results.json").write_text(json.dumps({key: value for key, value in before.items() if key not in ("comparisons", "verdict")} | {"verdict": []}))
    report_again(copies)
    for copy in copies:
        told = results(copy)
        assert told | {"pictures": sorted(told["pictures"])} == before | {"pictures": sorted(before["pictures"])}, "from the rows and the record"
        assert (copy / "table.csv").read_text() == (folder / "table.csv").read_text()
    joined = [line.split(",")[0] for line in (copies[0] / "joined-table.csv").read_text().splitlines()]
    lines = len(before["rows"]) + len(before.get("not_applicable", ())) + len(before["bounds"])
    assert joined == ["run", *["tiny a"] * lines, *["tiny b"] * lines] and "joined-table.tex, tradeoff.png, tradeoff.csv beside it" in " ".join(capsys.readouterr().out.split())


def test_the_trained_model_loads_in_three_lines(tiny):
    import torch

    from gidef.build import load_model

    folder, _ = tiny
    model, meta = load_model(folder / "models" / "learned-0.safetensors")

    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 8)
    assert meta["sha256"] == results(folder)["weights_sha256"]["learned/0"]


def test_an_existing_run_is_refused_without_resume(tiny):
    folder, _ = tiny
    before = (folder / "results.json").read_bytes()
    done = run(1, "tiny.py", "--out", str(folder), check=False)
    assert done.returncode == 2 and "--resume" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "results.json").read_bytes() == before


def test_a_run_resumes_only_under_the_same_science(tiny):
    folder, _ = tiny
    done = run(1, "tiny.py", "--out", str(folder), "--resume", "--clients.lr", "0.5", check=False)
    assert done.returncode == 2 and "clients.lr" in done.stderr and "Traceback" not in done.stderr


def test_attack_and_report_take_up_a_finished_run(tiny, tmp_path):
    folder, _ = tiny
    out = tmp_path / "again"
    asked = ["attack", str(folder), "--attack", "naive", "--checkpoint", "untrained", "--victims", "4", "--iterations", "3", "--allow-code", "--out", str(out)]
    ended(gidef, asked)
    rows = results(out)["rows"]
    assert {(row["attack"], row["victims"], row["iterations"]) for row in rows} == {("naive", 4, 3)}
    lines = len((out / "record.jsonl").read_text().splitlines())
    (out / "results.json").unlink()  # as if it had been killed right before its last step
    ended(gidef, asked)
    assert results(out)["rows"][0]["psnr_db"] == rows[0]["psnr_db"]
    assert len((out / "record.jsonl").read_text().splitlines()) == lines
    refused = ended(gidef, [*asked[:-3], "--out", str(tmp_path / "no")], check=False)
    assert refused.returncode == 2 and "--allow-code" in refused.stderr
    picture = folder / "pictures" / "reconstructions-final.png"
    picture.unlink()
    ended(gidef, ["report", str(folder)])
    assert picture.exists()


def test_speed_moves_nothing_past_tolerance(tiny, tmp_path):
    folder, _ = tiny
    other = tmp_path / "run"
    here("--out", str(other), "--speed.workers", "1", "--speed.attacks-at-once", "3", "--speed.attack-mode", "loop")
    found, expected = results(other), results(folder)
    assert found["weights_sha256"] == expected["weights_sha256"]
    for mine, theirs in zip(found["rows"], expected["rows"], strict=True):
        assert mine["psnr_db"]["mean"] == pytest.approx(theirs["psnr_db"]["mean"], abs=0.05)


@pytest.mark.parametrize("policy", ["head", "all"])
def test_the_other_share_policies_run_through(policy, tmp_path):
    folder = tmp_path / "run"
    here("--out", str(folder), "--share-policy", policy, "--evaluation.checkpoints", "final", "--only", "learned")
    found = results(folder)
    assert {row["share_policy"] for row in found["rows"]} == {policy}
    assert len(found["rows"]) == 3


def test_a_released_delta_of_several_local_steps_is_attacked_with_recovered_labels(tmp_path):
    folder = tmp_path / "run"
    changes = ("--evaluation.release", "delta", "--evaluation.local-steps", "2", "--evaluation.batch-size", "2", "--attacks.joint.labels", "recovered")
    here("--out", str(folder), "--evaluation.checkpoints", "untrained", *changes)
    rows = results(folder)["rows"]
    assert {(row["threat"]["release"], row["threat"]["batch_size"], row["failed"]) for row in rows} == {("delta", 2, 0)}
    assert all(0 <= row["label_recovery"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.path", "nowhere.npz"], "nowhere.npz"),
        (["--data.name", "chestmnist"], "several labels"),
        (["--rounds.cohort-size", "9"], "cohort_size=9"),
        (["--data.num-clients", "1000"], "1000"),
        (["--rounds.count", "-1"], "rounds.count=-1"),
        (["--model.name", "resnet81"], "resnet81"),
        (["--model.cut", "blocks.9"], "blocks.9"),
        (["--model.pretrained", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--only", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_no_folder(arguments, said, tmp_path, monkeypatch):
    folder = Path(tmp_path) / "run"
    monkeypatch.setenv("GIDEF_OFFLINE", "1")
    done = here("--out", str(folder), *arguments, check=False)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not folder.exists()
