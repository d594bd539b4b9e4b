"""Every preset through `gidef attack`, on a finished run of the tiny recipe. Synthetic cells, a few iterations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gidef.cli import main as gidef
from gidef.config import IDS, PRESETS
from tests.alone import by_itself, ended  # noqa: F401  (serves every test here)
from tests.ranks.launch import ROOT, environment, record, results, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run(1, "tiny.py", "--out", str(folder), "--evaluation.checkpoints", "untrained")
    return folder


@pytest.fixture(autouse=True)
def recipes_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


def attack(folder, out, *arguments, ranks=1, check=True):
    asked = ["attack", str(folder), "--allow-code", "--checkpoint", "untrained", "--out", str(out), *arguments]
    if ranks == 1:
        return ended(gidef, asked, check=check)
    place = environment(PYTHONPATH=os.pathsep.join([str(ROOT / "recipes"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "gidef", *asked]
    done = subprocess.run(command, env=place, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def test_every_preset_runs_on_a_finished_run_and_names_its_threat_model(finished, tmp_path):
    names = [name for name in PRESETS if name not in ("standard", "quick", "smoke", "surrogate-model")]
    attack(finished, tmp_path / "out", "--attack", *names, "--iterations", "3", "--steps", "4", "--victims", "2")
    rows = results(tmp_path / "out")["rows"]
    found = {(row["defence"], row["attack"]) for row in rows}
    idle = {(one["defence"], one["attack"]): one["reason"] for one in results(tmp_path / "out")["not_applicable"]}
    assert {name for defence, name in found if defence == "learned"} == set(names) - {"analytic", "statistics", "read-latent"}  # the last where there is no noise
    for defence in ("undefended", "learned"):
        assert "no closed form applies" in idle[defence, "analytic"]  # no biased layer sees the image
        assert "BatchNorm" in idle[defence, "statistics"]  # which the net has none of
    assert {(name, any(word in why for word in ("noise", "decoder", "draws something"))) for (defence, name), why in idle.items() if name not in ("analytic", "statistics")} == {
        (name, True) for name in set(names) - {name for defence, name in found if defence == "undefended"} - {"analytic", "statistics"} | {"read-latent"}
    }  # fmt: skip
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| undefended | zeroed |  | - |" in table and "not applicable: it needs a defence with noise" in table
    assert {name for defence, name in found if defence == "undefended"} >= {"naive", "dlg", "gradinversion", "learned", "generative", "imprint"}
    for row in rows:
        assert row["attack_id"] == IDS[type(PRESETS[row["attack"]])]
        assert row["threat"]["name"].startswith("malicious" if row["attack_id"] == "A11" else "honest but curious")
        assert row["psnr_db"]["mean"] > 0 and row["failed"] == 0
    imprint = next(row for row in rows if row["attack"] == "imprint" and row["defence"] == "learned")
    assert imprint["psnr_db"]["mean"] > 50
    attempts = [line for line in record(tmp_path / "out") if line["kind"] == "attempt"]
    own_settings = results(tmp_path / "out")["recipe"]["attacks"]  # a recipe's own attack wins over a preset of its name
    for defence, name in found:
        own = [line for line in attempts if (line["defence"], line["attack"]) == (defence, name)]
        starts = own_settings[name].get("restarts", 1)
        assert sorted((line["observation"], line["start"]) for line in own) == [(o, s) for o in range(2) for s in range(starts)], (defence, name)
        assert all(line["status"] == "ok" and line["error"] == "" and line["seconds"] > 0 and len(line["mark"]) == 16 for line in own), (defence, name)
        closed = IDS[type(PRESETS[name])] == "A11" and not hasattr(PRESETS[name], "iterations")
        assert all((line["iterations"] == 0) == closed for line in own), (defence, name)
    group = [line for line in attempts if line["attack"] == "gradinversion" and line["defence"] == "learned"]
    assert sorted((line["observation"], line["start"]) for line in group) == [(o, s) for o in range(2) for s in range(4)]
    assert all(line["status"] == "ok" and line["iterations"] == 4 and line["mark"] for line in group)


def test_a_surrogate_model_attacks_deltas(finished, tmp_path):
    arguments = ("--attack", "surrogate-model", "naive", "--release", "delta", "--local-steps", "2", "--local-epochs", "2", "--batch-size", "2", "--victims", "4", "--iterations", "3")
    attack(finished, tmp_path / "out", *arguments)
    rows = results(tmp_path / "out")["rows"]
    assert {row["attack_id"] for row in rows} == {"A0", "A10"} and all(row["failed"] == 0 and row["threat"]["local_epochs"] == 2 for row in rows)
    assert all("2 epochs of 2 local steps of SGD, lr 0.01" in row["threat"]["name"] for row in rows)
    assert all("clients train with Adam, and the delta that is attacked is of SGD" in row["note"] for row in rows)
    refused = attack(finished, tmp_path / "no", "--attack", "surrogate-model", check=False)
    assert refused.returncode == 2 and "release=gradient" in refused.stderr and not (tmp_path / "no").exists()


def test_the_gradient_of_cross_entropy_alone_can_be_attacked_too(finished, tmp_path):
    found = {}
    for terms in ("client", "utility"):
        attack(finished, tmp_path / terms, "--attack", "joint", "--victims", "2", "--iterations", "3", "--defence", "learned", "--checkpoint", "final", "--released-loss", terms)
        [line] = [line for line in record(tmp_path / terms) if line["kind"] == "attempt" and line["observation"] == 0]
        found[terms] = line["loss"]
    assert found["client"] != found["utility"]


def test_the_standard_ensemble_counts_the_worst_case_per_victim_beside_a_control(finished, tmp_path):
    attack(finished, tmp_path / "out", "--attack", "smoke", "--victims", "2", "--defence", "learned")
    content = results(tmp_path / "out")
    names = [row["attack"] for row in content["rows"]]
    assert names[-2:] == ["smoke without bounds", "smoke"] and {"smoke - naive", "smoke - joint", "smoke - rounds", "smoke - learned", "smoke - decoder"} <= set(names)
    worst, lines = content["rows"][-1], [line for line in record(tmp_path / "out") if line["kind"] == "attack"]
    members = [line for line in lines if line["attack"] != "smoke - shuffled gradient" and line["status"] == "ok"]
    best = [max(line["psnr_db"] for line in members if line["victim"] == victim) for victim in {line["victim"] for line in lines}]
    assert worst["psnr_db"]["mean"] == pytest.approx(sum(best) / len(best), abs=1e-6) and sum(worst["worst_by"].values()) == 2
    control = next(row for row in content["rows"] if row["attack_id"] == "control")
    bound = next(bound for bound in content["bounds"] if bound["name"] == "shuffled gradient")
    assert bound["psnr_db"]["mean"] == pytest.approx(control["psnr_db"]["mean"])
    assert any("worst case per image" in sentence and "first look" in sentence for sentence in content["verdict"])


def test_ranks_with_a_common_queue_find_what_one_rank_finds(finished, tmp_path):
    arguments = ("--attack", "joint", "gradinversion", "--iterations", "4", "--victims", "4", "--at-once", "2", "--mode", "vmap", "--defence", "learned")
    attack(finished, tmp_path / "one", *arguments)
    attack(finished, tmp_path / "three", *arguments, "--schedule", "dynamic", ranks=3)
    alone, together = results(tmp_path / "one"), results(tmp_path / "three")
    assert together["world_size"] == 3
    for mine, theirs in zip(together["rows"], alone["rows"], strict=True):
        assert mine["psnr_db"]["mean"] == pytest.approx(theirs["psnr_db"]["mean"], abs=1e-3)


def test_an_unknown_attack_is_one_error_that_names_the_presets(finished, tmp_path):
    done = attack(finished, tmp_path / "out", "--attack", "telepathy", check=False)
    fixed = attack(finished, tmp_path / "out", "--attack", "standard", "--iterations", "5", check=False)
    assert fixed.returncode == 2 and "budgets of an ensemble are fixed" in fixed.stderr and not (tmp_path / "out").exists()
    counts = attack(finished, tmp_path / "out", "--attack", "naive", "analytic", "--labels", "counts", check=False)
    assert counts.returncode == 2 and "the attack analytic takes known or recovered labels" in counts.stderr
    assert done.returncode == 2 and "telepathy" in done.stderr and "gradinversion" in done.stderr and "Traceback" not in done.stderr
