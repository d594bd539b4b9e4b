"""`gidef plan`: from a record or from numbers, to a table and a picture."""

from __future__ import annotations

import csv
import json

import pytest

from gidef.cli import main
from gidef.errors import InputError
from gidef.forecasts import measured
from gidef.parallel.forecast import Evaluation, Network, forecast
from gidef.parallel.traffic import Traffic


def run_folder(folder, world_size=1, **trained):
    lines = [
        {"kind": "start", "world_size": world_size},
        *({"kind": "round", "defence": "a", "seed": 0, "round": n, "seconds": s, "cohort": 2} for n, s in ((1, 9.0), (2, 12.0), (3, 15.0), (4, 18.5))),
        {"kind": "trained", "defence": "a", "seed": 0, **({"client_seconds": {"0": {"median": 1.0, "spread": 0.1}, "1": {"median": 1.5, "spread": 0.3}}, "traffic": {"entries": 1000, "cohort": 2}, "evaluation": {"seconds": 0.25, "models": 1, "chunks": 4, "bytes": 320}, "saving_seconds": 0.125} | trained)},
    ]
    lines[-1] = {name: value for name, value in lines[-1].items() if value is not None}
    folder.mkdir()
    (folder / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_record_gives_times_their_spread_the_rest_and_the_message(tmp_path):
    found = measured(run_folder(tmp_path / "run"))
    evaluation = Evaluation(seconds=0.25, models=1, chunks=4, bytes=320)
    assert found == {
        "times": [1.0, 1.5], "spread": 0.2, "rest_s": pytest.approx(0.125), "evaluation": evaluation, "save_s": 0.125, "message": Traffic(entries=1000, cohort=2), "cohort": 2, "round_s": 3.0
    }  # fmt: skip
    found.pop("round_s")
    assert forecast(ranks=1, network=Network(), **found | {"spread": 0.0, "message": 0}).round_s == pytest.approx(3.0)


def test_an_evaluation_beside_the_next_round_costs_what_was_waited_for(tmp_path):
    beside = {"seconds": 2.75, "models": 1, "chunks": 4, "bytes": 0, "overlapped": True}
    found = measured(run_folder(tmp_path / "run", evaluation=beside, waiting_seconds=0.125))
    assert found["rest_s"] == pytest.approx(3.0 - 2.5 - 0.125 - 0.125) and found["evaluation"] == Evaluation(**beside)
    found.pop("round_s")
    (one, two) = (forecast(ranks=ranks, network=Network(), **found | {"spread": 0.0, "message": 0}) for ranks in (1, 2))
    assert one.evaluate_s == pytest.approx(0.0) and one.round_s == pytest.approx(2.875)  # 2.75 s hide behind 2.5 s of clients and 0.25 s of rest
    assert two.evaluate_s < 1e-4 and two.clients_s == 1.5  # its sum over ranks is left


def test_what_ranks_send_depends_on_how_many_they_are_and_on_the_cohort(tmp_path, capsys):
    krum = {"entries": 10**6, "cohort": 2, "robust": True, "chosen": 1}
    folder, network = run_folder(tmp_path / "run", traffic=krum), ["--algorithm", "ring", "--inter-gbytes", "0.01", "--gpus-per-node", "1", "--inter-us", "0", "--intra-us", "0"]
    main(["plan", str(folder), "--ranks", "1", "2", "8", "--clients-per-rank", "3", *network, "--out", str(tmp_path / "out")])
    for row in csv.DictReader((tmp_path / "out" / "plan.csv").read_text().splitlines()):
        ranks = int(row["ranks"])
        message = Traffic(**krum | {"cohort": 3 * ranks}).reduced(ranks)
        assert float(row["reduce_s"]) == pytest.approx(2 * (ranks - 1) / ranks * message / 1e7)
    assert "all-reduce of 0.0 to " in capsys.readouterr().out


def test_records_that_do_not_say_it_are_refused(tmp_path):
    with pytest.raises(InputError, match="no client times"):
        measured(run_folder(tmp_path / "old", client_seconds=None))
    with pytest.raises(InputError, match="this version of gidef"):
        measured(run_folder(tmp_path / "older", traffic=None))
    with pytest.raises(InputError, match="several ranks"):
        measured(run_folder(tmp_path / "two", world_size=2))


def test_the_command_writes_a_table_and_a_picture(tmp_path, capsys):
    main(["plan", str(run_folder(tmp_path / "run")), "--ranks", "1", "2", "8", "--spread", "0", "--cohort", "64", "--out", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "plan.csv").read_text().splitlines()))
    assert [int(row["ranks"]) for row in rows] == [1, 2, 8]
    assert float(rows[0]["round_s"]) > float(rows[1]["round_s"]) > float(rows[2]["round_s"]) > 0.5
    assert (tmp_path / "out" / "plan.png").stat().st_size > 10_000
    assert "useful ranks at most" in capsys.readouterr().out


def test_fronts_of_clients_are_evaluated_as_many_as_the_cohort_has(tmp_path, capsys):
    evaluation = {"seconds": 0.5, "models": 2, "chunks": 1, "bytes": 0}
    options = ["--ranks", "1", "--spread", "0", "--rest", "0", "--clients-per-rank", "6", "--out", str(tmp_path / "out")]
    main(["plan", str(run_folder(tmp_path / "run", evaluation=evaluation)), *options])
    (row,) = csv.DictReader((tmp_path / "out" / "plan.csv").read_text().splitlines())
    assert float(row["evaluate_s"]) == 1.5 and float(row["save_s"]) == 0.125 and "evaluate s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("", "give a run's folder"), ("--times 1", "give a run's folder"), ("--times 0 --megabytes 1", "--times 0"), ("--times nan", "--times nan"),
        ("--times 1e308", "--times 1e+308"), ("--megabytes nan", "--megabytes nan"), ("--megabytes -1", "--megabytes -1"), ("--inter-gbytes 0", "--inter-gbytes 0"),
        ("--scale inf", "--scale inf"), ("--spread 1e9", "--spread 1e+09"), ("--rest -1", "--rest -1"), ("--cohort 0", "--cohort 0"),
        ("--clients-per-rank -2", "--clients-per-rank -2"), ("--clients-per-rank 1000 --ranks 4096", "rounds of 4096000 clients"), ("--ranks 0", "--ranks 0"),
        ("--ranks 8 100000000000", "--ranks 1e+11"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_end_with_one_message(wrong, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *wrong.split()])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and err.startswith("gidef: ") and said in err and err.count("\n") == 1 and not out
