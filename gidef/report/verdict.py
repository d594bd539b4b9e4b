"""What a run showed, in sentences for a first reader, computed from its results and nothing else.

A defence *holds* against an attack only if
  - the upper end of the attack's 95 % PSNR interval is at most the class mean's PSNR + 0.5 dB (`MARGIN_DB`): no better than a
    picture that a label alone buys;
  - the same attack (else the strongest one) beats that limit on the undefended net, at the same checkpoint and share policy:
    otherwise the run cannot tell a defence from a weak attack;
  - an attack other than the naive one was tried, because a naive attacker overlooks the noise and overstates protection.
It holds *on average only* if the worst image, of any seed, is above the class mean's own worst + 0.5 dB, or SSIM's upper end is above the
class mean's SSIM + 0.05 (`MARGIN_SSIM`): one patient, or structure that PSNR does not price, gets out.
A decoder on the latent itself (A12) is a bound on attackers and has its own sentence. Accuracies are called matched within
2 points (`MATCHED_POINTS`); below 64 victims or 3 seeds (`CLAIM_VICTIMS`, `CLAIM_SEEDS`) a run is a demonstration, not a claim. Victims that are
observed together count as one, because they leak together; of one observation of several images there is no interval, and nothing is said to hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gidef.report.certificate import certificates
from gidef.report.choice import chosen
from gidef.report.claim import claim
from gidef.report.control import controls
from gidef.report.masking import CONTROL, masking
from gidef.report.paired import comparisons
from gidef.report.results import alone, batches, bound_named, failed, interval_of, mean_of, observations_of, recipe_name
from gidef.report.starts import starts

MARGIN_DB = 0.5
MARGIN_SSIM = 0.05
MATCHED_POINTS = 2.0
CLAIM_VICTIMS = 64
CLAIM_SEEDS = 3
NAIVE, ON_LATENT, MALICIOUS, ENSEMBLE = "A0", "A12", "A11", "standard"
_APART = (ON_LATENT, MALICIOUS, ENSEMBLE, CONTROL)
"""Ids with sentences of their own: bounds, another threat model, a worst case over several, and what is no attack."""

Row = dict[str, Any]
_SHARED = {"full": "the whole classifier", "head": "the predictor only", "all": "the classifier and the private decoder"}


def verdict(results: dict[str, Any]) -> list[str]:
    """Sentences on what was attacked, by whom, how well each defence held, and what it cost.

    Args: results: in the layout of `gidef.report`. Several rows of one defence, attack and checkpoint (one per seed) count by
          the row that pools them, else by the seed with the highest PSNR. The input is not modified.
    """
    rows = [row for row in results["rows"] if mean_of(row["psnr_db"]) is not None]
    said = []
    if results["data"]["synthetic"]:
        said.append("SYNTHETIC DATA: the images are made up, so no number here says anything about patients.")
    if part := results.get("part"):
        said.append(f"Part {part[0]} of {part[1]} of a run: what follows is about its own rows, and what it misses may stand in another part. Read the page that joins them.")
    said += failed(results)
    if not results["rows"]:
        return [*said, "No attack was run, so this run says nothing about privacy.", *_accuracy_cost(results)]
    said += [_scope(results), *_demonstration(results)]
    for policy, checkpoint in dict.fromkeys((row["share_policy"], row["checkpoint"]) for row in rows):
        here = [row for row in rows if (row["share_policy"], row["checkpoint"]) == (policy, checkpoint)]
        for defence in dict.fromkeys(row["defence"] for row in here):
            of_defence = _pooled([row for row in here if row["defence"] == defence])
            matching = [row for row in of_defence if row["attack_id"] not in _APART]
            undefended = _pooled([row for row in here if is_undefended(results, row["defence"]) and row["attack_id"] not in _APART])
            if matching and is_undefended(results, defence):
                said.append(_on_undefended(results, _strongest(matching)))
            elif matching:
                said.append(_on_defended(results, matching, undefended))
            said += [_on_latent(results, row) for row in of_defence if row["attack_id"] == ON_LATENT and not row.get("ensemble")]
            said += [_ensemble(results, row) for row in of_defence if row["attack_id"] == ENSEMBLE]
            said += [_malicious(results, row) for row in of_defence if row["attack_id"] == MALICIOUS]
    unmeasured = [row for row in results["rows"] if mean_of(row["psnr_db"]) is None]
    said += [f"{_called(results, row, start=True)} under {_attack(results, row)} has no PSNR: not judged." for row in unmeasured]
    return said + masking(results, is_undefended=is_undefended) + starts(results) + _failures(results) + _judged(results, rows) + _accuracy_cost(results) + criteria(results)


def criteria(results: dict[str, Any]) -> list[str]:
    """The defence to take, of a recipe that chooses; and what is judged: the paper's claim, the learned perturbation beside its controls, and the criterion of
    noise with a certificate."""
    compared = results["comparisons"] if "comparisons" in results else compare(results, ())
    return chosen(results) + claim(results, compared) + controls(results, compared) + certificates(results, is_undefended=is_undefended)


def compare(results: dict[str, Any], lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`results["comparisons"]`, from the rows and the run's record."""
    return comparisons(results, lines, strongest=strongest)


def strongest(rows: list[Row], measure: str = "psnr_db") -> Row | None:
    """The attack whose interval of a measure ends highest, of equal ones that of the highest mean, among those of the run's own threat model; None where there is none.

    Args: rows: of one defence, checkpoint and share policy. A decoder that is handed the latent, malicious servers, ensembles and the control do not compete;
    an attack that is granted the client's private decoder or front, as its note says, does: no weaker attacker than that is assumed.
    """
    fair = [row for row in rows if row["attack_id"] not in _APART and mean_of(row["psnr_db"]) is not None]
    return max((row for row in _pooled(fair) if mean_of(row.get(measure)) is not None), key=lambda row: (_high(row[measure]), mean_of(row[measure])), default=None)


def is_undefended(results: dict[str, Any], name: str) -> bool:
    """Whether the recipe's defence of that name is none; without a recipe, by the name itself."""
    spec = (results["recipe"].get("defences") or {}).get(name)
    return spec.get("type") == "Undefended" if isinstance(spec, dict) else name == "undefended"


def _scope(results: dict[str, Any]) -> str:
    """Which images, against whom."""
    rows = results["rows"]

    def all_of(value: Callable[[Row], Any]) -> list[Any]:
        return [item for item in dict.fromkeys(map(value, rows)) if item is not None]

    releases = all_of(lambda row: row.get("threat", {}).get("release")) or ["update"]
    sizes = all_of(lambda row: row.get("threat", {}).get("batch_size"))
    labels = all_of(lambda row: row.get("threat", {}).get("labels"))
    what = {"gradient": "gradient", "delta": "weight change"}
    text = f"Attacked: {max(row['victims'] for row in rows)} training images of {results['data']['name']}"
    text += f", observed {' and '.join(map(str, sizes))} at a time" if sizes else ""
    text += f" (intervals are over the observations: {counted})" if (counted := batches(results)) else ""
    text += f"; the adversary is an honest-but-curious server that sees a client's {' or '.join(what.get(item, item) for item in releases)} of "
    text += " or ".join(f"{_SHARED.get(policy, policy)} (share policy {policy})" for policy in all_of(lambda row: row["share_policy"]))
    text += " after the defence"
    told = {"known": "is told the labels", "recovered": "recovers the labels itself", "soft": "recovers the labels as probabilities", "searched": "searches the labels, too", "unknown": "does not know the labels"}
    text += f" and {' or '.join(told.get(item, f'has labels {item}') for item in labels)}" if labels else ""
    mean, grey = _psnr_of_bound(results, "class mean"), _psnr_of_bound(results, "constant grey")
    guesses = [f"{value:.1f} dB for {name}" for name, value in (("a constant grey", grey), ("the class mean", mean)) if value is not None]
    return f"{text}. PSNR of guesses without any gradient: {', '.join(guesses)}." if guesses else f"{text}."


def _demonstration(results: dict[str, Any]) -> list[str]:
    rowed = {recipe_name(results, row["defence"]) for row in results["rows"]}
    lost = Counter(one["defence"] for one in results.get("failed") or [] if one["defence"] in rowed)
    fewest, seeds = min(results["rows"], key=observations_of), len(results["seeds"]) - max(lost.values(), default=0)
    seen = observations_of(fewest)
    if seen >= CLAIM_VICTIMS and seeds >= CLAIM_SEEDS:
        return []
    found = _count(seen, "victim") if seen == fewest["victims"] else f"{_count(fewest['victims'], 'victim')} in {_count(seen, 'observation')}"
    found += f" and {_count(seeds, 'seed')}"
    return [f"A demonstration, not a claim: {found}, where a claim takes {CLAIM_VICTIMS} and {CLAIM_SEEDS}."]


def _on_undefended(results: dict[str, Any], row: Row) -> str:
    limit = _limit(results)
    start = f"Undefended, {_attack(results, row)} reaches {_db(row)}"
    if limit is None:
        return f"{start}; without the class-mean bound that cannot be judged."
    class_mean, psnr_db = limit - MARGIN_DB, mean_of(row["psnr_db"])
    if psnr_db <= limit:
        return f"{start}, no better than the class mean ({class_mean:.1f} dB){_effort(row)}: this run cannot tell whether any defence helps."
    return f"{start}, {psnr_db - class_mean:.1f} dB above the class mean ({class_mean:.1f} dB): what is shared gives the private images away."


def _on_defended(results: dict[str, Any], rows: list[Row], undefended: list[Row]) -> str:
    row, limit = _strongest(rows), _limit(results)
    defence, where = _called(results, row), _attack(results, row)
    if limit is None:
        return f"This run cannot tell whether {defence} holds: {where} reaches {_db(row)}, and there is no class-mean bound to compare with."
    against = f"{limit - MARGIN_DB:.1f} dB for the class mean"
    grey = _psnr_of_bound(results, "constant grey")
    against += f" and {grey:.1f} dB for a constant grey" if grey is not None else ""
    if _high(row["psnr_db"]) > limit:
        text = f"{_called(results, row, start=True)} does NOT hold under {where}: {_db(row)} against {against}"
        if mean_of(row["psnr_db"]) <= limit:
            text += "; the upper end of the interval decides"
        naive = [other for other in rows if other["attack_id"] == NAIVE]
        if naive and mean_of(naive[0]["psnr_db"]) < mean_of(row["psnr_db"]) - MARGIN_DB:
            text += f"; a naive attacker alone would have suggested {mean_of(naive[0]['psnr_db']):.1f} dB"
        return text + "."
    same = [other for other in undefended if other["attack"] == row["attack"]] or undefended
    cannot = f"This run cannot tell whether {defence} holds: {where} stays at {_db(row)}, against {against}, but"
    if not same:
        return f"{cannot} no undefended net was attacked to show that the attack works."
    reference = _strongest(same)
    if mean_of(reference["psnr_db"]) <= limit:
        return f"{cannot} the {reference['attack']} attack fails on the undefended net too: {_db(reference)}{_effort(reference)}."
    if all(other["attack_id"] == NAIVE for other in rows):
        return f"{cannot} only a naive attacker was tried, who overlooks the defence and overstates it. Run the joint attack."
    if alone(row):
        return f"{cannot} its {row['victims']} images are of one observation, which says nothing of others. Attack more victims."
    gaps = _gaps(results, row)
    text = f"{_called(results, row, start=True)} holds{' on average only' if gaps else ''} under {where}: {_db(row)} against {against}"
    text += f"; undefended, the {reference['attack']} attack reaches {_db(reference)}"
    return f"{text}. But {' and '.join(gaps)}." if gaps else f"{text}."


def _gaps(results: dict[str, Any], row: Row) -> list[str]:
    """What a mean PSNR hides. The worst image of any seed stands beside the class mean's, whose guess every seed draws alike."""
    bound, gaps = bound_named(results, "class mean"), []
    worst, usual = _worst(row["psnr_db"]), _worst(bound.get("psnr_db"))
    if worst is not None and usual is not None and worst > usual + MARGIN_DB:
        gaps.append(f"the worst image is recovered at {worst:.1f} dB (class mean's best match: {usual:.1f} dB)")
    ssim, usual = _high(row.get("ssim")), mean_of(bound.get("ssim"))
    if ssim is not None and usual is not None and ssim > usual + MARGIN_SSIM:
        gaps.append(f"SSIM is up to {ssim:.2f}, above the class mean's {usual:.2f}, so that structure gets out")
    return gaps


def _on_latent(results: dict[str, Any], row: Row) -> str:
    limit = _limit(results)
    latent = "latent" if is_undefended(results, row["defence"]) else "perturbed latent"
    text = f"{_called(results, row, start=True)} {_at(results, row)}: a decoder that is handed the {latent}, more than this adversary has,"
    text += f" reaches {_db(row)}"
    if limit is None:
        return f"{text}."
    verb = "above" if _high(row["psnr_db"]) > limit else "no better than"
    return f"{text}, {verb} the class mean ({limit - MARGIN_DB:.1f} dB)."


def _ensemble(results: dict[str, Any], row: Row) -> str:
    limit, worst = _limit(results), _worst(row["psnr_db"])
    text = f"{_called(results, row, start=True)} {_at(results, row)}: the worst case per image over the {row.get('members', 'several')} attacks of "
    text += f'version "{row.get("version", "standard")}"{" that are handed nothing beyond the threat model" if row.get("without") else ""} is {_db(row)}'
    text += f", {worst:.1f} dB for the most leaked image" if worst is not None else ""
    if limit is not None:
        text += f"; the class mean has {limit - MARGIN_DB:.1f} dB"
    quick = ". Its budgets are for a first look, not for a claim" if row.get("version", "standard") != "standard" else ""
    return f"{text} ({row['note'].partition(': ')[2]}){quick}."


def _malicious(results: dict[str, Any], row: Row) -> str:
    return f"A malicious server gets {_db(row)} of {_called(results, row)} by {row['attack']} {_at(results, row)} ({row['note']})."


def _failures(results: dict[str, Any]) -> list[str]:
    bad = [row for row in results["rows"] if row.get("failed")]
    if not bad:
        return []
    failed, tried = sum(row["failed"] for row in bad), sum(row["victims"] * len(row.get("seeds") or [0]) for row in bad)
    where = ", ".join(dict.fromkeys(f"{row['defence']} under {row['attack']}" for row in bad))
    return [f"{failed} of {tried} reconstructions failed and count as mid-grey, which flatters the defence ({where})."]


def _judged(results: dict[str, Any], rows: list[Row]) -> list[str]:
    """The class that a clean judge reads off reconstructions, and the MSE: both readings of a relative change."""
    judge, said = results.get("judge") or {}, []
    matching = [row for row in rows if row["attack_id"] not in _APART and mean_of(row.get("attacker_accuracy")) is not None]
    for policy, checkpoint in dict.fromkeys((row["share_policy"], row["checkpoint"]) for row in matching):
        here = [row for row in matching if (row["share_policy"], row["checkpoint"]) == (policy, checkpoint)]
        plain = _pooled([row for row in here if is_undefended(results, row["defence"])])
        if not plain:
            continue
        reference = _strongest(plain)
        base, base_mse = mean_of(reference["attacker_accuracy"]), mean_of(reference.get("mse"))
        for defence in dict.fromkeys(row["defence"] for row in here if not is_undefended(results, row["defence"])):
            row = _strongest(_pooled([row for row in here if row["defence"] == defence]))
            seen, mse = mean_of(row["attacker_accuracy"]), mean_of(row.get("mse"))
            text = f"A judge names the class of {_percent(seen)} of the reconstructions from {_called(results, row)} {_at(results, row)}"
            text += f" ({row['attack']} attack), {_percent(base)} undefended: {100 * (seen - base):+.1f} points"
            text += f", {100 * (seen / base - 1):+.1f} % relative" if base else ""
            known = [("true images", judge.get("accuracy_on_truth")), ("chance", judge.get("chance"))]
            known.insert(1, ("class means", mean_of(bound_named(results, "class mean").get("attacker_accuracy"))))
            known = [f"{name} {_percent(value)}" for name, value in known if value is not None]
            text += f" ({', '.join(known)})" if known else ""
            text += f". MSE changes by {100 * (mse / base_mse - 1):+.1f} %" if mse is not None and base_mse else ""
            said.append(f"{text}.")
    return said


def _accuracy_cost(results: dict[str, Any]) -> list[str]:
    """Utility: test accuracy after training, averaged over seeds, against the undefended net."""
    found: dict[str, list[float]] = {}
    for run in results["training"]:
        if run.get("test_accuracy") is not None:
            found.setdefault(run["defence"], []).append(mean_of(run["test_accuracy"]))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    plain = next((value for name, value in means.items() if is_undefended(results, name)), None)
    said = []
    for name, value in means.items():
        if is_undefended(results, name):
            continue
        text = f'Test accuracy with "{name}" is {_percent(value)}'
        if plain is None:
            said.append(f"{text}; no undefended net was trained to compare with.")
            continue
        points = 100 * (plain - value)
        change = f"costs {points:.1f} points" if points >= 0 else f"gains {-points:.1f} points"
        fair = "matched" if abs(points) <= MATCHED_POINTS else "not matched, so the privacy figures do not compare like with like"
        said.append(f"{text} against {_percent(plain)} undefended: it {change} ({fair}).")
    return said


def _pooled(rows: list[Row]) -> list[Row]:
    """One row per attack: the one over most seeds, else the seed that leaked most."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (len(row.get("seeds") or ()), _high(row["psnr_db"]))):
        best[row["attack"]] = row
    return [best[name] for name in dict.fromkeys(row["attack"] for row in rows)]


def _strongest(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: _high(row["psnr_db"]))


def _called(results: dict[str, Any], row: Row, *, start: bool = False) -> str:
    """The defence in a sentence, with a capital at its start."""
    name = "undefended net" if is_undefended(results, row["defence"]) else f'defence "{row["defence"]}"'
    return f"{'The' if start else 'the'} {name}"


def _at(results: dict[str, Any], row: Row) -> str:
    several = len({other["share_policy"] for other in results["rows"]}) > 1
    return f"at the {row['checkpoint']} checkpoint" + (f", share policy {row['share_policy']}" if several else "")


def _attack(results: dict[str, Any], row: Row) -> str:
    return f"the {row['attack']} attack {_at(results, row)}"


def _high(value: Any) -> float | None:
    interval = interval_of(value)
    return interval[1] if interval else mean_of(value)


def _worst(value: Any) -> float | None:
    return value.get("worst") if isinstance(value, dict) else None


def _limit(results: dict[str, Any]) -> float | None:
    value = _psnr_of_bound(results, "class mean")
    return None if value is None else value + MARGIN_DB


def _psnr_of_bound(results: dict[str, Any], name: str) -> float | None:
    return mean_of(bound_named(results, name).get("psnr_db"))


def _db(row: Row) -> str:
    interval = interval_of(row["psnr_db"])
    text = f"{mean_of(row['psnr_db']):.1f} dB" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
    return f"{text} (seed {row['seed']})" if row.get("seed") is not None and not row.get("seeds") else text


def _effort(row: Row) -> str:
    if row.get("iterations") is None:
        return " (too few iterations?)"
    return f" after {row['iterations']} iterations, {_count(row.get('restarts') or 1, 'restart')} (too few?)"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
