"""A round's evaluation while the next round is computed: the same files as in line, in the same order, and errors where they belong."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import pytest
import torch

from gidef import build, config, evaluation, metrics, training
from gidef.checkpoint import load_file
from gidef.errors import InputError
from gidef.parallel import Beside, World
from gidef.report import Console
from gidef.runs import Run
from gidef.stopping import leave_on_sigterm
from gidef.training import train
from tests.small_run import RECIPE, one_thread

PRIVATE = {"chosen": config.LearnedPerturbation(ramp=0.0), "share_policy": "head", "cohort_size": 2}
CASES = {"one model": {"chosen": config.Undefended(), "share_policy": "full", "cohort_size": None}, "a private front each": PRIVATE}
SOON = 60.0
"""Seconds after which what should happen at once has not."""


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread():
        yield


class Lines(list):
    """In the place of a record."""

    def append(self, kind, **values):
        super().append({"kind": kind, **values})


def start(folder, *, overlap=True, chosen=None, share_policy="full", cohort_size=None, count=4, patience=None, resume=False, record=None, kept=2):
    """(the run's lines, what training left), with a core free for the evaluation."""
    recipe = dataclasses.replace(
        RECIPE, rounds=config.Rounds(count=count, cohort_size=cohort_size, patience=patience), share_policy=share_policy, resume=resume,
        speed=dataclasses.replace(RECIPE.speed, overlap_evaluation=overlap, checkpoints_kept=kept),
    )  # fmt: skip
    record = Lines() if record is None else record
    world = World(cores=2)
    run = Run(build.load_setting(recipe, world=world, notice=lambda text: None), world, folder, Console(rank=1), record, "mark")
    return record, train(run, "d", chosen or config.Undefended(), 0)


def timeless(values):
    """Without what a clock told, and how much memory the process took."""
    return {name: value for name, value in values.items() if not any(word in name for word in ("seconds", "costs", "evaluation", "peak"))}


def files(folder):
    """What a run left: content by name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors, meta = load_file(path)
        if "summary" in meta:  # an export
            meta["summary"] = timeless(meta["summary"])
            del meta["recipe"]["speed"], meta["recipe"]["resume"]
        found[str(path.relative_to(folder))] = ({name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, timeless(meta))
    return found


@pytest.fixture
def begun(monkeypatch):
    """The rounds whose evaluation began beside the next one, by number of the server's state."""
    seen, begin = [], evaluation.EvaluationBeside.begin

    def counted(self, params, clients, versions):
        seen.append(max(versions.values()) + 1)
        begin(self, params, clients, versions)

    monkeypatch.setattr(evaluation.EvaluationBeside, "begin", counted)
    return seen


@pytest.fixture(scope="module")
def in_line(tmp_path_factory):
    """in_line(case): (lines, what training left, files) of a run whose rounds are evaluated one after another."""
    found = {}

    def of(case):
        if case not in found:
            folder = tmp_path_factory.mktemp("line")
            with one_thread():
                found[case] = *start(folder, overlap=False, **CASES[case]), files(folder)
        return found[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_record_checkpoints_snapshots_states_and_model_are_those_of_an_evaluation_in_line(case, tmp_path, begun, in_line):
    expected, plain, left = in_line(case)
    assert begun == []
    lines, done = start(tmp_path, **CASES[case])
    assert begun == [1, 2, 3]  # the last round has none to run beside
    assert [timeless(line) for line in lines] == [timeless(line) for line in expected] and done.sha256 == plain.sha256
    assert files(tmp_path) == left
    seconds = [line["seconds"] for line in lines if line["kind"] == "round"]
    assert seconds == sorted(seconds) and seconds[0] > 0 and done.summary["seconds"] == seconds[-1]
    assert lines[-1]["evaluation"]["overlapped"] and lines[-1]["waiting_seconds"] > 0
    assert not expected[-1]["evaluation"]["overlapped"] and "waiting_seconds" not in expected[-1]


def test_an_evaluation_runs_while_the_next_round_trains_and_its_line_and_checkpoint_follow_in_order(tmp_path, monkeypatch):
    told, begins = [], {number: threading.Event() for number in range(5)}
    evaluate, save, rounds = evaluation.EvaluationBeside._evaluate, training.save_state, training.federate

    def evaluated(self, params, clients, versions):
        number = max(versions.values()) + 1
        assert begins[number].wait(SOON), "the next round waits for the evaluation"  # in line it never begins
        found = evaluate(self, params, clients, versions)
        told.append(f"evaluated {number}")
        return found

    def told_rounds(server, clients, *, run, **options):
        def one(server, cohort):
            begins[server.round].set()
            if server.round:  # the round does not end before the evaluation of the one before: they run at the same time
                assert spins(lambda: server.round == 3 or f"evaluated {server.round}" in told)
            return run(server, cohort)

        for done in rounds(server, clients, run=one, **options):
            told.append(f"computed {done.number + 1}")
            yield done

    class Told(Lines):
        def append(self, kind, **values):
            told.append(f"line {values['round']}" if kind == "round" else kind)

    def saved(run, key, number, held):
        save(run, key, number, held)
        told.append(f"saved {number}")

    monkeypatch.setattr(evaluation.EvaluationBeside, "_evaluate", evaluated)
    monkeypatch.setattr(training, "federate", told_rounds)
    monkeypatch.setattr(training, "save_state", saved)
    start(tmp_path, count=4, record=Told())
    expected = ["computed 1", "evaluated 1", "computed 2", "line 1", "evaluated 2", "computed 3", "line 2", "evaluated 3", "computed 4", "line 3", "line 4", "trained"]
    order = [one for one in told if not one.startswith("saved")]
    order.remove("evaluated 3"), expected.remove("evaluated 3")  # beside the fourth round, anywhere in it
    assert order == expected
    assert [one for one in told if one.startswith("saved")] == [f"saved {number}" for number in (1, 2, 3, 4)]
    assert all(told.index(f"line {number}") < told.index(f"saved {number}") for number in (1, 2, 3, 4))


def spins(ready):
    """Whether it became true soon."""
    pause, waited = threading.Event(), 0.0
    while not ready() and waited < SOON:
        pause.wait(0.005)
        waited += 0.005
    return ready()


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("case", "where"), [("one model", "in a round"), ("a private front each", "in a round"), ("a private front each", "before a checkpoint")])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_files_and_has_lost_one_round_more(case, where, tmp_path, monkeypatch, in_line):
    expected, plain, left = in_line(case)

    class Fuse(Lines):
        def append(self, kind, **values):
            if where == "before a checkpoint" and values.get("round") == 2:
                raise Killed
            super().append(kind, **values)

    with monkeypatch.context() as patch:
        if where == "in a round":
            rounds = training.federate

            def cut_off(server, clients, *, run, **options):
                def one(server, cohort):
                    if server.round == 2:
                        raise Killed  # in the third round, while the second is evaluated
                    return run(server, cohort)

                return rounds(server, clients, run=one, **options)

            patch.setattr(training, "federate", cut_off)
        first = Fuse()
        with pytest.raises(Killed):
            start(tmp_path / "killed", record=first, **CASES[case])
    assert [path.name for path in (tmp_path / "killed" / "checkpoints" / "d-0").iterdir()] == ["round-000001.safetensors"]
    assert [line["round"] for line in first] == [1]
    lines, done = start(tmp_path / "killed", resume=True, **CASES[case])
    assert done.sha256 == plain.sha256 and files(tmp_path / "killed") == left
    assert [timeless(line) for line in [*first, *lines][:-1]] == [timeless(line) for line in expected[:-1]]  # what each life tells at its end is its own


def test_as_many_checkpoints_stay_as_were_asked_for_each_good_to_resume_from_also_with_another_number(tmp_path, in_line):
    (_, plain, _), case, checkpoints = in_line("a private front each"), CASES["a private front each"], tmp_path / "checkpoints" / "d-0"

    def names():
        return sorted(path.name for path in checkpoints.iterdir())

    def damage(*numbers):
        for number in numbers:
            (checkpoints / f"round-{number:06d}.safetensors").write_bytes(b"damaged")
        (tmp_path / "models" / "d-0.safetensors").unlink()  # as if killed before the end

    def go_on(**options):
        return start(tmp_path, **case, **options)[1].sha256 == plain.sha256

    assert go_on(kept=3) and names() == [f"round-00000{number}.safetensors" for number in (2, 3, 4)]
    damage(4, 3)
    assert go_on(kept=3, resume=True)  # from round 2, whose clients' fronts are still there
    damaged = ["round-000003.safetensors.damaged", "round-000004.safetensors.damaged"]
    assert names() == sorted([*damaged, *(f"round-00000{number}.safetensors" for number in (2, 3, 4))])
    damage(4)
    assert go_on(kept=4, resume=True) and len(names()) == 5
    damage(4, 3)  # after a resumption from round 3, which held round 2's fronts as well
    assert go_on(kept=1, resume=True) and names() == sorted([*damaged, "round-000004.safetensors"])
    damage()
    assert go_on(kept=5, resume=True) and names() == sorted([*damaged, "round-000004.safetensors"])


def test_sums_over_ranks_that_take_more_than_a_twentieth_of_the_training_are_told(tmp_path, monkeypatch):
    assert training._costly_sums(5.0, 100.0) is None and training._costly_sums(0.0, 0.0) is None
    assert "took 6% of the training" in training._costly_sums(6.0, 100.0)
    said, rounds = [], training.federate

    def slow(*args, **options):
        for done in rounds(*args, **options):
            yield done._replace(mean=dataclasses.replace(done.mean, sum_seconds=1e6))

    monkeypatch.setattr(Console, "say", lambda self, text: said.append(text))
    start(tmp_path / "quick", count=1)
    assert not any("sums over ranks" in text for text in said)
    monkeypatch.setattr(training, "federate", slow)
    lines, _ = start(tmp_path / "slow", count=1)
    assert sum("sums over ranks" in text for text in said) == 1 and lines[0]["sum_seconds"] == 1e6


def beside_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("beside")]


@pytest.mark.parametrize("error", [InputError("a chunk is bad"), torch.OutOfMemoryError("no memory")], ids=["input", "memory"])
def test_an_error_of_the_evaluation_is_raised_once_by_the_training_and_nothing_stays_behind(error, tmp_path, monkeypatch):
    predict, calls = evaluation.predict_chunk, []

    def fails(*args):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            raise error
        return predict(*args)

    monkeypatch.setattr(evaluation, "predict_chunk", fails)
    record = Lines()
    with pytest.raises(type(error)) as caught:
        start(tmp_path, record=record)
    assert caught.value is error and caught.value.__context__ is None
    assert threading.main_thread() not in calls and len(calls) == 2
    assert [line["round"] for line in record] == [1]
    assert (tmp_path / "checkpoints" / "d-0" / "round-000001.safetensors").exists()
    assert spins(lambda: not beside_threads())


def test_a_failing_round_does_not_wait_for_the_evaluation_beside_it_which_then_stops_between_two_chunks(tmp_path, monkeypatch):
    inside, released, chunks = threading.Event(), threading.Event(), []

    def slow(model, images, chunk, noise):
        chunks.append(chunk)
        inside.set()
        assert released.wait(SOON)
        return torch.zeros(len(images[chunk * 8 : chunk * 8 + 8]), 8)

    def failing(server, clients, *, run, **options):
        def one(server, cohort):
            if server.round == 1:
                assert inside.wait(SOON)
                raise Killed
            return run(server, cohort)

        return rounds(server, clients, run=one, **options)

    rounds = training.federate
    monkeypatch.setattr(evaluation, "CHUNK", 8)
    monkeypatch.setattr(evaluation, "num_chunks", lambda images: 3)
    monkeypatch.setattr(evaluation, "predict_chunk", slow)
    monkeypatch.setattr(training, "federate", failing)
    with pytest.raises(Killed):
        start(tmp_path)  # returns although the chunk hangs
    assert beside_threads()
    released.set()
    assert spins(lambda: not beside_threads()) and chunks == [0]


def test_sigterm_while_a_round_waits_for_its_evaluation_ends_the_training_at_once(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    released = threading.Event()

    def slow(model, images, chunk, noise):
        assert waiting.wait(SOON)
        os.kill(os.getpid(), signal.SIGTERM)
        assert released.wait(SOON)
        return torch.zeros(24, 8)

    waiting, wait = threading.Event(), Beside.wait

    def waits(self):
        waiting.set()
        return wait(self)

    monkeypatch.setattr(Beside, "wait", waits)
    monkeypatch.setattr(evaluation, "predict_chunk", slow)
    leave_on_sigterm(tmp_path)
    try:
        with pytest.raises(SystemExit) as end:
            start(tmp_path)
        assert end.value.code == 143 and (tmp_path / "preempted").exists()
    finally:
        released.set()
        signal.signal(signal.SIGTERM, before)
    assert spins(lambda: not beside_threads())


@pytest.mark.parametrize(
    ("patience", "accuracies", "rounds", "beside"),
    [
        (1, [0.1, 0.2, 0.3, 0.3, 0.5, 0.6], 4, []),  # every round may end it
        (2, [0.5, 0.4, 0.6, 0.6, 0.6, 0.7], 5, [1, 2, 4]),  # the third and the fifth may
        (3, [0.5, 0.1, 0.1, 0.1, 0.9, 0.9], 4, [1, 2, 3]),
        (3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, [1, 2, 3, 4, 5]),
        (None, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], 6, [1, 2, 3, 4, 5]),
    ],
)
def test_patience_ends_the_training_where_it_ends_it_in_line(patience, accuracies, rounds, beside, tmp_path, monkeypatch, begun):
    found = []
    for overlap in (True, False):
        told = iter([*accuracies[:rounds], 0.5])  # and of the test split
        monkeypatch.setattr(metrics, "accuracy", lambda logits, labels, told=told: next(told))
        lines, done = start(tmp_path / str(overlap), overlap=overlap, count=6, cohort_size=1, patience=patience)
        found.append(([timeless(line) for line in lines], done.sha256, files(tmp_path / str(overlap))))
        assert done.summary["rounds"] == rounds and next(told, None) is None
        assert done.summary["best_round"] == max(range(rounds), key=lambda n: (accuracies[n], -n)) + 1
    assert found[0] == found[1]
    assert begun == beside


def test_it_overlaps_on_a_gpu_or_beside_free_cores_and_not_where_threads_would_disturb_each_other():
    def overlaps(cores, device="cpu", mesh=None, clients=None, **speed):
        recipe = config.Recipe(clients=clients or config.LocalTraining(), speed=config.Speed(**speed))
        return build.overlaps_evaluation(recipe, World(device=torch.device(device), cores=cores, mesh=mesh))

    tf32 = config.LocalTraining(precision="tf32")
    assert overlaps(2, workers=1) and not overlaps(1, workers=1) and not overlaps(2, workers=2) and overlaps(3, workers=2)
    assert not overlaps(4) and not overlaps(3, workers=1, threads=2) and overlaps(4, workers=1, threads=2)  # workers take all cores unless told otherwise
    assert overlaps(1, "cuda") and not overlaps(1, "cuda", overlap_evaluation=False) and not overlaps(2, workers=1, overlap_evaluation=False)
    assert not overlaps(1, "cuda", clients=tf32) and overlaps(2, workers=1, clients=tf32)
    for device in ("cpu", "cuda"):
        assert not overlaps(2, device, workers=1, compile_training=True) and not overlaps(2, device, workers=1, mesh=object())


def test_calls_beside_take_turns_and_threads_of_their_own():
    with Beside(torch.device("cpu"), threads=1) as beside:
        beside.call(lambda a, b: (a + b, threading.current_thread(), torch.get_num_threads()), 1, 2)
        with pytest.raises(RuntimeError, match="wait for it first"):
            beside.call(print)
        found, thread, threads = beside.wait()
        assert found == 3 and thread is not threading.current_thread() and threads == 1
        assert not beside.stopped.is_set()
    assert beside.stopped.is_set() and not thread.is_alive()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_files_are_those_of_an_evaluation_in_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as run_recipe has it
    found = {}
    for overlap in (True, False):
        recipe = dataclasses.replace(RECIPE, rounds=config.Rounds(count=6, patience=None), speed=config.Speed(device="cuda", overlap_evaluation=overlap))
        world = World(device=torch.device("cuda", 0))
        run = Run(build.load_setting(recipe, world=world, notice=lambda text: None), world, tmp_path / str(overlap), Console(rank=1), Lines(), "mark")
        train(run, "d", config.LearnedPerturbation(ramp=0.0), 0)
        found[overlap] = files(tmp_path / str(overlap)), [timeless(line) for line in run.record]
    assert found[True] == found[False]
