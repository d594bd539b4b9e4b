"""The command line of a recipe. No run is started: `run_recipe` is replaced by a recorder."""

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from gidef import main as entry
from gidef.config import (
    Data,
    Dirichlet,
    FedAdam,
    FedAvg,
    Iid,
    JointMatching,
    LearnedPerturbation,
    LocalTraining,
    NaiveMatching,
    PostHocDecoder,
    QuantitySkew,
    Recipe,
    Rounds,
    Scaffold,
    Shards,
    SingleGradient,
    Undefended,
)
from gidef.errors import InputError
from gidef.main import main, parse


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """A user's own defence."""

    amount: float = 0.1
    size: int = 2

    def build(self, make_model):
        return make_model()


RECIPE = Recipe(
    data=Data(name="synthetic", num_clients=4),
    rounds=Rounds(count=2),
    defences={"undefended": Undefended(), "learned": LearnedPerturbation(), "own": Smoothing()},
    attacks={"naive": NaiveMatching(iterations=6), "joint": JointMatching(iterations=6), "decoder": PostHocDecoder(steps=4)},
)


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(entry.time, "sleep", lambda seconds: None)


@pytest.fixture
def runs(monkeypatch):
    """(recipe, name) of every run that main would have started."""
    started = []
    monkeypatch.setitem(sys.modules, "gidef.job", SimpleNamespace(run_recipe=lambda recipe, name: started.append((recipe, name))))
    return started


def ended(capsys, args, recipe=RECIPE):
    """(exit code, standard output, standard error) of a main that must end."""
    with pytest.raises(SystemExit) as end:
        main(recipe, name="tiny", args=args)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_without_arguments_the_recipe_runs_as_it_is_written(runs):
    main(RECIPE, name="tiny", args=[])
    assert runs == [(RECIPE, "tiny")]


OVERRIDES = {
    ("--data.path", "somewhere"): ("data", "path", "somewhere"),
    ("--data.name", "dermamnist"): ("data", "name", "dermamnist"),
    ("--rounds.count", "7"): ("rounds", "count", 7),
    ("--rounds.cohort-size", "3"): ("rounds", "cohort_size", 3),
    ("--seeds", "4", "5"): ("seeds", (4, 5)),
    ("--out", "runs/a"): ("out", "runs/a"),
    ("--defences.learned.dependence-weight", "0.5"): ("defences", "learned", "dependence_weight", 0.5),
    ("--defences.learned.law", "laplace"): ("defences", "learned", "law", "laplace"),
    ("--defences.own.amount", "0.4"): ("defences", "own", "amount", 0.4),
    ("--attacks.naive.iterations", "9"): ("attacks", "naive", "iterations", 9),
    ("--attacks.joint.decoder", "unused"): ("attacks", "joint", "decoder", "unused"),
    ("--attacks.joint.kink-width", "None"): ("attacks", "joint", "kink_width", None),
    ("--attacks.decoder.steps", "5"): ("attacks", "decoder", "steps", 5),
    ("--clients.optimiser", "sgd"): ("clients", "optimiser", "sgd"),
    ("--rounds.server.momentum", "0.9"): ("rounds", "server", "momentum", 0.9),
    ("--rounds.patience", "None"): ("rounds", "patience", None),
    ("--evaluation.checkpoints", "early", "final"): ("evaluation", "checkpoints", ("early", "final")),
    ("--only", "learned", "own"): ("only", ("learned", "own")),
    ("--speed.attack-mode", "loop"): ("speed", "attack_mode", "loop"),
    ("--threads", "3"): ("speed", "threads", 3),
    ("--threads=4",): ("speed", "threads", 4),
    ("--data.no-download",): ("data", "download", False),
}


def put(holder, names, value):
    """The same recipe, dict or dataclass with the value at the end of the names replaced."""
    if not names:
        return value
    first, *rest = names
    if isinstance(holder, dict):
        return holder | {first: put(holder[first], rest, value)}
    return replace(holder, **{first: put(getattr(holder, first), rest, value)})


@pytest.mark.parametrize("args", OVERRIDES, ids=[" ".join(args) for args in OVERRIDES])
def test_an_override_changes_its_field_and_nothing_else(args, runs):
    *names, value = OVERRIDES[args]
    main(RECIPE, name="tiny", args=list(args))
    [(recipe, _)] = runs
    assert recipe == put(RECIPE, names, value) != RECIPE


def test_many_overrides_and_resume_go_together(runs):
    main(RECIPE, name="tiny", args=["--rounds.count", "5", "--out", "x", "--resume", "--rounds.cohort-size", "4", "--seeds", "2"])
    expected = replace(RECIPE, rounds=Rounds(count=5, cohort_size=4), out="x", resume=True, seeds=(2,))
    assert runs == [(expected, "tiny")]


def test_a_defence_of_your_own_stays_what_it_is_on_the_command_line():
    recipe = parse(RECIPE, ["--defences.own.size", "3"], "tiny")
    assert type(recipe.defences["own"]) is Smoothing and recipe.defences["own"].build(lambda: "model") == "model"
    assert list(recipe.defences) == ["undefended", "learned", "own"]


@pytest.mark.parametrize("args", [["--rounds.cohort-sise", "5"], ["--defences.learned.lambda", "1"], ["--attacks.gone.iterations", "5"], ["stray"]])
def test_a_misspelt_field_is_named(args, runs, capsys):
    code, _, err = ended(capsys, args)
    assert code == 2 and args[0] in err and not runs


def test_a_misspelt_field_is_told_what_is_near(capsys):
    assert "--rounds.cohort-size" in ended(capsys, ["--rounds.cohort-sise", "5"])[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rounds.count", "-1"], "rounds.count=-1"),
        (["--rounds.cohort-size", "5"], "rounds.cohort_size=5 exceeds data.num_clients=4"),
        (["--evaluation.batch-size", "0"], "evaluation.batch_size=0"),
        (["--clients.lr", "nan"], "clients.lr=nan"),
        (["--seeds"], "seeds is empty"),
        (["--only", "gone"], "gone"),
        (["--resume"], "--out"),
    ],
)
def test_a_value_that_cannot_be_is_one_message_and_status_2(args, said, runs, capsys):
    code, out, err = ended(capsys, args)
    assert (code, out, err.count("gidef: "), err.count("\n")) == (2, "", 1, 1)
    assert said in err and not runs


WRONG_TEXT = [["--rounds.count", "many"], ["--clients.lr", "fast"], ["--share-policy", "none"], ["--seeds", "a1"], ["--resume", "3"]]


@pytest.mark.parametrize("args", WRONG_TEXT)
def test_text_where_a_number_or_choice_is_due_is_one_message_and_status_2(args, runs, capsys):
    code, out, err = ended(capsys, args)
    assert code == 2 and not out and not runs
    assert args[-1] in err and err.count("--help") == 1 and "Traceback" not in err  # each of tyro's messages ends in that hint


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, {"RANK": "3", "SLURM_PROCID": "0"}])
@pytest.mark.parametrize("args", [["--rounds.count", "-1"], ["--rounds.count", "many"], ["--rounds.kount", "1"], ["--help"], ["--resume"]])
def test_only_rank_zero_prints(args, environment, monkeypatch, capsys):
    spoken = ended(capsys, args)
    assert spoken[1] or spoken[2]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stdout, stderr = sys.stdout, sys.stderr
    assert ended(capsys, args) == (spoken[0], "", "")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": "3"}])
def test_rank_zero_and_single_processes_print(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "rounds.count=-1" in ended(capsys, ["--rounds.count", "-1"])[2]


def test_a_silent_rank_waits_so_that_rank_zero_can_speak(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    for args in (["--rounds.count", "-1"], ["--rounds.kount", "1"]):
        ended(capsys, args)
    assert waited == [1.0, 1.0]


def test_bad_input_of_a_run_is_one_line_and_anything_else_keeps_its_traceback(monkeypatch, capsys):
    def job(error):
        def run_recipe(recipe, name):
            raise error

        monkeypatch.setitem(sys.modules, "gidef.job", SimpleNamespace(run_recipe=run_recipe))

    job(InputError("data.path=x does not exist: give another."))
    assert ended(capsys, []) == (2, "", "gidef: data.path=x does not exist: give another.\n")
    job(ValueError("a defect"))
    with pytest.raises(ValueError, match="a defect"):
        main(RECIPE, name="tiny", args=[])


def test_the_local_rank_of_a_launcher_is_passed_over(runs):
    main(RECIPE, name="tiny", args=["--local_rank=1", "--rounds.count", "3"])
    assert runs[0][0].rounds.count == 3


def test_an_imported_recipe_does_not_run(tmp_path, monkeypatch, runs):
    path = tmp_path / "page.py"
    path.write_text("from gidef.config import Recipe\nfrom gidef.main import main\nRECIPE = Recipe()\nmain(RECIPE)\nREACHED = True\n")
    monkeypatch.setattr(sys, "argv", ["pytest", "--not-an-option-of-ours"])

    def load(name):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    assert load("page").REACHED and not runs
    monkeypatch.setattr(sys, "argv", ["page.py", "--rounds.count", "3"])
    load("__main__")
    assert runs == [(Recipe(rounds=Rounds(count=3)), "page")]


UNIONS = [
    replace(RECIPE, data=replace(RECIPE.data, partition=partition), clients=clients, rounds=Rounds(server=server))
    for partition, clients, server in (
        (Iid(), LocalTraining(), FedAvg()),
        (Dirichlet(), SingleGradient(), Scaffold()),
        (Shards(), LocalTraining(), FedAdam()),
        (QuantitySkew(), SingleGradient(), FedAvg()),
    )
]


@pytest.mark.parametrize("recipe", UNIONS)
def test_help_names_the_fields_of_the_choices_that_the_recipe_made(recipe, runs, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    code, out, err = ended(capsys, ["--help"], recipe)
    assert code == 0 and not err and not runs
    for option in ("data.name", "rounds.cohort-size", "defences.own.amount", "attacks.joint.noise-lr", "seeds", "resume", "speed.device"):
        assert f"--{option} " in out or f"--{option}," in out
    for choice, option in ((recipe.data.partition, "--data.partition"), (recipe.clients, "--clients"), (recipe.rounds.server, "--rounds.server")):
        for field in type(choice).__dataclass_fields__:
            assert f"{option}.{field.replace('_', '-')}" in out
