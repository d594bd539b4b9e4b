"""`gidef attack RUN --attack package.module:Class`: what is imported, and what is refused before that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from gidef import cli, config, job
from gidef.errors import InputError
from tests.small_run import RECIPE

HERE = __file__


@dataclass(frozen=True, kw_only=True)
class Mine:
    iterations: int = 5
    labels: str = "known"

    def plan(self, case):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Greedy(Mine):
    weight: float


class Plain:
    def plan(self, case):
        raise NotImplementedError


SLOW = Greedy(weight=2.0, iterations=9)
STRONG = config.NaiveMatching(iterations=11)


def altered(*attacks, allow_code=True, **more):
    arguments = cli._parser().parse_args(["attack", "run", "--attack", *attacks])
    vars(arguments).update(allow_code=allow_code, **more)
    return job._altered(RECIPE, arguments).attacks


def test_a_class_with_its_defaults_or_an_instance_is_the_attack_and_takes_the_commands_budget():
    found = altered(f"{HERE}:Mine", f"{HERE}:SLOW", f"{HERE}:STRONG", "joint")
    assert [(name, type(one).__name__, one.iterations) for name, one in found.items()] == [
        ("Mine", "Mine", 5), ("SLOW", "Greedy", 9), ("STRONG", "NaiveMatching", 11), ("joint", "JointMatching", config.JointMatching().iterations),
    ]  # fmt: skip
    assert altered(f"{HERE}:Mine", iterations=3, labels="recovered")["Mine"] == type(found["Mine"])(iterations=3, labels="recovered")


def test_nothing_is_imported_without_leave(tmp_path):
    (tmp_path / "boom.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="names code, which would be imported and run: add --allow-code"):
        altered(f"{tmp_path}/boom.py:Attack", allow_code=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{HERE}:Greedy", "weight.*Give every field of the class a default"),
        (f"{HERE}:Plain", "is a Plain: expected a dataclass with a method plan"),
        (f"{HERE}:Missing", "cannot load"),
        ("nowhere.at_all:Attack", "cannot load"),
        ("unknown", "nor a preset.*package.module:Class"),
    ],
)
def test_what_is_no_attack_is_refused(name, said):
    with pytest.raises(InputError, match=said):
        altered(name)


def test_the_local_training_behind_a_delta_is_asked_for_on_the_command_line():
    asked = ["attack", "run", "--release", "delta", "--local-steps", "2", "--local-epochs", "5", "--local-lr", "0.5", "--local-optimiser", "sgd", "--local-momentum", "0.9"]
    recipe = dataclasses.replace(RECIPE, evaluation=dataclasses.replace(RECIPE.evaluation, batch_size=4))
    found = job._altered(recipe, cli._parser().parse_args(asked)).evaluation
    expected = {"release": "delta", "local_steps": 2, "local_epochs": 5, "local_lr": 0.5, "local_optimiser": "sgd", "local_momentum": 0.9}
    assert found == dataclasses.replace(recipe.evaluation, **expected)
    assert job._altered(recipe, cli._parser().parse_args(asked[:2])).evaluation == recipe.evaluation


def test_two_attacks_of_one_name_are_refused():
    with pytest.raises(InputError, match="another attack called Mine"):
        altered(f"{HERE}:Mine", f"{HERE}:Mine")
