"""`gidef plan`: the round time on 8 … 4096 GPUs, from a run's record or from given numbers, as a table, a CSV and a picture."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import statistics
from pathlib import Path
from typing import Any

from gidef.errors import InputError
from gidef.parallel.forecast import Evaluation, Forecast, Network, forecast
from gidef.parallel.traffic import Traffic
from gidef.report import Console, read
from gidef.report.files import write_atomically


def measured(folder: Path) -> dict[str, Any]:
    """What a run on one rank says: seconds of each client, their spread over rounds, seconds of evaluation, of saving and of the rest of a round, what
    ranks send one another, cohort.

    The first trained defence of the record is taken. The rest is the round's median time minus what is known of it; of an evaluation beside the next
    round, that is what the round waited for it.
    Raises: InputError for a record without them, or of several ranks, whose rounds hold waiting time.
    """
    lines = read(folder / "record.jsonl")
    trained = next((line for line in lines if line["kind"] == "trained" and line.get("client_seconds") and {"evaluation", "traffic"} <= line.keys()), None)
    if trained is None:
        raise InputError(f"{folder / 'record.jsonl'} holds no client times: give the folder of a run that trained to its end with this version of gidef, or --times.")
    if any(line["world_size"] != 1 for line in lines if line["kind"] == "start"):
        raise InputError(f"{folder} ran on several ranks, so its rounds hold waiting time: measure on one, with --speed.workers 1.")
    rounds = [line for line in lines if line["kind"] == "round" and (line["defence"], line["seed"]) == (trained["defence"], trained["seed"])]
    ends = [0.0, *(line["seconds"] for line in rounds)]
    lasted = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    kept = lasted[1:] or lasted  # the first round warms up
    times = [one["median"] for one in trained["client_seconds"].values()]
    spreads = [one["spread"] for one in trained["client_seconds"].values()]
    cohort = rounds[-1]["cohort"]
    evaluation, save, round_s = Evaluation(**trained["evaluation"]), trained["saving_seconds"], statistics.median(kept)
    evaluating = trained["waiting_seconds"] if evaluation.overlapped else evaluation.seconds
    return {
        "times": times, "spread": statistics.median(spreads), "evaluation": evaluation, "save_s": save, "message": Traffic(**trained["traffic"]), "cohort": cohort,
        "rest_s": max(0.0, round_s - statistics.fmean(times) * cohort - evaluating - save), "round_s": round_s,
    }  # fmt: skip


def plan(arguments: argparse.Namespace) -> list[Forecast]:
    """Print the table, and write plan.csv and plan.png into --out. Raises InputError for numbers that mean nothing."""
    _check(arguments)
    given = {"spread": arguments.spread, "rest_s": arguments.rest, "cohort": arguments.cohort}
    given |= {"times": arguments.times, "message": arguments.megabytes and arguments.megabytes * 1e6}
    found = (measured(Path(arguments.folder)) if arguments.folder else {}) | {name: value for name, value in given.items() if value is not None}
    if not found.get("times") or found.get("message") is None:
        raise InputError("give a run's folder, or --times with the seconds of each client and --megabytes of the summed update.")
    found.pop("round_s", None)
    network = Network(
        gpus_per_node=arguments.gpus_per_node, intra_gbytes=arguments.intra_gbytes, inter_gbytes=arguments.inter_gbytes, intra_us=arguments.intra_us,
        inter_us=arguments.inter_us, algorithm=arguments.algorithm, meet_us=arguments.meet_us,
    )  # fmt: skip
    found["times"] = [time * arguments.scale for time in found["times"]]
    cohort = found.pop("cohort", None) or len(found["times"])
    evaluation = found.pop("evaluation", None)
    sent, rows, messages = found.pop("message"), [], []
    for ranks in arguments.ranks:
        size = cohort if arguments.clients_per_rank is None else arguments.clients_per_rank * ranks
        messages.append(dataclasses.replace(sent, cohort=size).reduced(ranks) if isinstance(sent, Traffic) else sent)
        rows.append(forecast(ranks=ranks, network=network, cohort=size, evaluation=evaluation and _of_cohort(evaluation, size), message=messages[-1], **found))
    with Console() as console:
        _show(console, rows, network, found["times"], messages)
        if arguments.out:
            out = Path(arguments.out)
            write_atomically(out / "plan.csv", _csv(rows).encode())
            _draw(out / "plan.png", rows)
            console.say(f"table    {out / 'plan.csv'}, picture {out / 'plan.png'}")
    return rows


LARGEST = 10**6
"""Ranks, and clients of a round, that a forecast simulates."""
NUMBERS = {
    "times": (1e-9, 1e9), "scale": (1e-9, 1e9), "intra_gbytes": (1e-9, 1e9), "inter_gbytes": (1e-9, 1e9), "intra_us": (0, 1e9), "inter_us": (0, 1e9),
    "meet_us": (0, 1e9), "megabytes": (0, 1e12), "rest": (0, 1e9), "spread": (0, 10), "ranks": (1, LARGEST), "cohort": (1, LARGEST),
    "clients_per_rank": (1, LARGEST), "gpus_per_node": (1, LARGEST),
}  # fmt: skip
"""Smallest and largest value of each option."""


def _check(arguments: argparse.Namespace) -> None:
    for name, (low, high) in NUMBERS.items():
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not low <= value <= high:  # nor is NaN
                raise InputError(f"--{name.replace('_', '-')} {value:g}: expected a number from {low:g} to {high:g}.")
    if (largest := (arguments.clients_per_rank or 0) * max(arguments.ranks)) > LARGEST:
        raise InputError(f"--clients-per-rank {arguments.clients_per_rank} makes rounds of {largest} clients: at most {LARGEST} are simulated. Lower it, or --ranks.")


def _of_cohort(one: Evaluation, size: int) -> Evaluation:
    """Where each client of a cohort has a front of its own that is evaluated, that of another cohort."""
    return one if one.models == 1 else dataclasses.replace(one, models=size, seconds=one.seconds * size / one.models)


def _show(console: Console, rows: list[Forecast], network: Network, times: list[float], messages: list[float]) -> None:
    megabytes = " to ".join(dict.fromkeys(f"{message / 1e6:.1f}" for message in (min(messages), max(messages))))
    console.heading("Forecast of a round")
    console.say(
        f"network   {network.gpus_per_node} GPUs a node, {network.intra_gbytes:g} GB/s and {network.intra_us:g} us inside, "
        f"{network.inter_gbytes:g} GB/s and {network.inter_us:g} us between nodes, {network.algorithm} all-reduce of {megabytes} MB"
    )
    console.say(f"clients   {len(times)} times, {sum(times) / len(times):.3g} s on average; useful ranks at most {rows[0].useful:.1f} for {rows[0].cohort}")
    console.say("ranks  clients    round s   busiest s   save s   reduce s   evaluate s   meet s   rest s   efficiency")
    for row in rows:
        console.say(
            f"{row.ranks:>5}  {row.cohort:>7}  {row.round_s:>9.4g}  {row.clients_s:>10.4g}  {row.save_s:>7.2g}  {row.reduce_s:>9.3g}  {row.evaluate_s:>11.3g}"
            f"  {row.meet_s:>7.2g}  {row.rest_s:>7.3g}"
            f"  {100 * row.ideal_s / row.round_s:>9.0f} %"
        )


def _csv(rows: list[Forecast]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["ranks", "cohort", "round_s", "clients_s", "save_s", "reduce_s", "evaluate_s", "meet_s", "rest_s", "ideal_s", "useful_ranks"])
    writer.writerows([r.ranks, r.cohort, r.round_s, r.clients_s, r.save_s, r.reduce_s, r.evaluate_s, r.meet_s, r.rest_s, r.ideal_s, r.useful] for r in rows)
    return text.getvalue()


def _draw(path: Path, rows: list[Forecast]) -> None:
    from gidef.report.pictures import scaling_curves

    ranks = [row.ranks for row in rows]
    total = [row.ideal_s * row.ranks for row in rows]
    scaling_curves(
        path, ranks, {"forecast": [whole / row.round_s for whole, row in zip(total, rows, strict=True)]},
        ideal=ranks, bound=[min(row.ranks, row.useful) for row in rows], title="Forecast of training", ylabel="clients' seconds per second",
    )  # fmt: skip
