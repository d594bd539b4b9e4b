"""From reconstructions to what a run reports: rows of the table, lines of the record, pictures."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from gidef import attack as attacks
from gidef import build, config, metrics, observe, tuned_attacks
from gidef.cells import CONTROL, Cell, beyond, chosen_attacks
from gidef.checkpoint import load_file, save_file
from gidef.defence.base import Defence
from gidef.defence.capacity import certify, fano_bound, lifetime_releases
from gidef.defence.instahide import Hide
from gidef.defence.mixup import Mix
from gidef.defence.private import PrivateNoise
from gidef.defence.transformations import Transformed
from gidef.errors import InputError
from gidef.models.perturbation import Perturbation
from gidef.report import attack_curves, grid
from gidef.report.pictures import progress_curves
from gidef.runs import Run
from gidef.scores import ABOVE, GUESSES, JUDGED, MEASURES, Scorer, by_judge, measured
from gidef.threats import threat

Scored = dict[int, dict[str, Tensor]]
"""Values per victim of a cell, by id(cell); see `Scorer.score`."""


def rows(run: Run, cells: list[Cell], scored: Scored) -> list[dict[str, Any]]:
    """One row per (defence, attack, checkpoint), and one or two per ensemble: of several seeds each victim's mean counts, and the seed
    in which it leaked most for the most leaked images (`measured`)."""
    found = []
    for defence, checkpoint in dict.fromkeys((cell.defence, cell.checkpoint) for cell in cells):
        here = [cell for cell in cells if (cell.defence, cell.checkpoint) == (defence, checkpoint)]
        for name in dict.fromkeys(cell.name for cell in here):
            group = [cell for cell in here if cell.name == name]
            found.append(_row(run, group, _by_seed([scored[id(cell)] for cell in group], _keys(scored))))
        for ensemble in dict.fromkeys(cell.ensemble for cell in here if cell.ensemble):
            found += _worst_rows(run, [cell for cell in here if cell.ensemble == ensemble and not cell.control], scored, ensemble)
    return found


def _keys(scored: Scored) -> tuple[str, ...]:
    judged = [key for key in next(iter(scored.values()), {}) if key.startswith(JUDGED)]
    return (*MEASURES, ABOVE, *judged, "recovered", "oracle_psnr_db")


def _by_seed(seeds: list[dict[str, Tensor]], keys: Iterable[str]) -> dict[str, Tensor]:
    """Each victim's values of every seed (seeds, victims)."""
    return {key: torch.stack([values[key] for values in seeds]) for key in keys}


def _mean_of_known(values: Tensor) -> float | None:
    """The mean of the values that are there, None without any."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def _row(run: Run, group: list[Cell], values: dict[str, Tensor], *, releases: int = 1) -> dict[str, Any]:
    """values: as `_by_seed` gives them. The label recovery is that of attacks which did not fail. releases: that one of an ensemble's attacks sees, if not this one."""
    first = group[0]
    accuracies = [cell.trained.summary["test_accuracy"] for cell in group]
    gap = [cell.in_loop_psnr_db for cell in group if cell.in_loop_psnr_db is not None]
    reconstructions = [found for cell in group for found in cell.reconstructions]
    note = first.note or (f"the clients' own decoder reaches {sum(gap) / len(gap):.1f} dB" if gap else "")
    budget = {name: getattr(first.attack, name) for name in ("iterations", "restarts", "steps", "samples", "rounds") if hasattr(first.attack, name)}
    certificate, said = _certificate(run, group, releases=max(releases, getattr(first.attack, "rounds", 1)))
    size = first.victims.rows.shape[1]
    lost = sum(one.status == "ok" and one.error.endswith(attacks.KEPT) for one in reconstructions) * size
    cut = f"of {lost} of {len(reconstructions) * size} images the attacker's loss became infinite or NaN on the way, and its best point counts" if lost else ""
    fits = torch.tensor([[one.first_fit, one.fit] for one in reconstructions if one.status == "ok"], dtype=torch.float64)
    fits = fits[fits.isfinite().all(1)] if len(fits) else fits
    return {
        "defence": first.defence, "attack": first.name, "attack_id": first.attack_id, "checkpoint": first.checkpoint,
        "seeds": [cell.seed for cell in group], "share_policy": run.recipe.share_policy, "threat": threat(run, first),
        "victims": first.victims.rows.numel(), "observations": len(first.victims.rows),
        "failed": sum(found.status == "failed" for found in reconstructions) * size,
        "client_accuracy": sum(accuracies) / len(accuracies), "client_accuracies": accuracies,
        **{name: measured(values[name], name, seed=0, batch=size) for name in (*MEASURES, ABOVE)}, **by_judge(values, batch=size),
        "label_recovery": _mean_of_known(values["recovered"].nanmean(0)), "oracle_restart_psnr_db": float(values["oracle_psnr_db"].mean(0).mean()),
        **budget, **_privacy(group), **certificate, "seconds": sum(cell.seconds for cell in group),
        "note": "; ".join(filter(None, (note, tuned_attacks.words(first.tuned) if first.tuned else "", _beyond_epsilon(first), said, cut))), **({"tuned": first.tuned} if first.tuned else {}),
        **({"in_loop_psnr_db": sum(gap) / len(gap)} if gap else {}),
        **({"fit_first": float(fits[:, 0].median()), "fit": float(fits[:, 1].median())} if len(fits) else {}),
        **({"noise": noise} if (noise := _noise(group)) else {}),
        **({"ensemble": first.ensemble} if first.ensemble else {}), **({"of": _shuffles(run, first)} if first.control else {}),
        **({"calibration": dataclasses.asdict(first.calibration)} if first.calibration is not None else {}),
    }  # fmt: skip


def _noise(group: list[Cell]) -> str:
    """What an attack that matches does about the noise on the latent, where there is any: "read" first, in all observations of all seeds, or "searched" with the
    images; else ""."""
    first = group[0]
    if first.trained.training.defence.noise_shape is None or first.control or not isinstance(first.attack, config.JointMatching):
        return ""
    return "read" if all((cell.twin or cell).read == len(cell.victims.rows) for cell in group) else "searched"


def _shuffles(run: Run, control: Cell) -> str:
    """Name of the attack that a control repeats."""
    return next(name for name, (attack, ensemble, other) in chosen_attacks(run.recipe).items() if not other and (attack, ensemble) == (control.attack, control.ensemble))


def _privacy(group: list[Cell]) -> dict[str, Any]:
    """(ε, δ) of the training, the largest over seeds; None where it is not differentially private. ε is infinite without noise."""
    spent = [cell.trained.training.defence.budget for cell in group]
    if None in spent:
        return {"epsilon": None, "delta": None}
    worst = max(spent, key=lambda one: one.epsilon)
    return {"epsilon": worst.epsilon, "delta": worst.delta, "privacy_unit": worst.unit, "noise_multiplier": max(one.noise_multiplier for one in spent)}


def _beyond_epsilon(cell: Cell) -> str:
    """That a client's epsilon says nothing of an attack on its single update, which carries its own share of a cohort's noise alone; "" elsewhere."""
    defence = cell.trained.training.defence
    if defence.budget is None or defence.budget.unit != "client" or defence.secure is not None:
        return ""
    return "epsilon is against who sees sums of cohorts alone, and this server reads single updates: add SecureAggregation()"


def _certificate(run: Run, group: list[Cell], *, releases: int = 1) -> tuple[dict[str, Any], str]:
    """What noise on the latent certifies for so many releases of these cells, or why nothing; fields of a row, and words for its note.

    Nothing is said of noise without a certificate by its nature; under a share policy other than `head` only of a defence that asks for one.
    """
    defence, policy = group[0].trained.training.defence, run.recipe.share_policy
    noise, settings = defence.model.perturbation, getattr(defence, "settings", None)
    if not isinstance(noise, Perturbation) or (policy != "head" and not _asks(run.recipe.chosen[group[0].trained.summary.get("trained_as", group[0].defence)])):
        return {}, ""
    noise, zeros = copy.deepcopy(noise).cpu(), torch.zeros(1, *noise.latent_shape)
    stds = []
    for cell in group:
        for private in cell.victims.private:
            own = {name.removeprefix("perturbation."): tensor.cpu() for name, tensor in private.items() if name.startswith("perturbation.")}
            stds.append(functional_call(noise, own, (zeros,))[1].detach().expand(zeros.shape)[0])
    frozen, front_frozen = bool(getattr(settings, "frozen", False)), bool(getattr(settings, "front_frozen", False))
    once, strength = frozen and front_frozen, group[0].trained.strength
    classes = [int(count) for count in run.setting.counts.sum(0) if count]
    try:
        found = certify(stds, level=noise.mode, law=noise.law, policy=policy, frozen_noise=once, front_frozen=once, draws=releases, candidates=classes)
        if defence.model.statistics["encoder"]:
            raise InputError("BatchNorm in train mode before the noise (model.norm=keep) carries an image into the latents of its batch. Set model.norm=frozen or group.")
        if reason := _clipped_together(run, defence, still=front_frozen and (noise.mode == "fixed" or settings.level_still)):
            raise InputError(reason)
        if looks := [type(one).__name__ for one in defence.transforms if getattr(one, "needs_own", False)]:
            raise InputError(f"{looks[0]} looks at the images themselves, so that what leaves is no function of the noisy latent. Leave it out.")
        if defence.encoders and once:
            raise InputError("images are encoded anew in every round, under noise that stays: the difference of two releases has none. Train on them as they are.")
        alone = (Transformed, Mix, Hide) if run.recipe.evaluation.batch_size == 1 else (Transformed,)
        if mixing := [type(one).__name__ for one in defence.encoders if not isinstance(one, alone)]:
            raise InputError(f"{mixing[0]} may put an image into several latents of a release, and one is counted. Set evaluation.batch_size=1, or leave it out.")
        if (told_of := run.recipe.evaluation).release == "delta" and told_of.local_steps > 1 and not (front_frozen and (noise.mode == "fixed" or settings.level_still)):
            raise InputError(
                f"in a delta of {told_of.local_steps} local steps the private layers move, by gradients that are no functions of the noisy latents. "
                "Set evaluation.local_steps=1, or leave them as they are (front=frozen, level=fixed)."
            )
        if (draws := observe.draws_in_release(run, group[0].trained)) > 1:
            raise InputError(f"a delta of {draws} local epochs draws the noise of each image as often, and one draw is counted.")
        if once and strength != 1:
            raise InputError("the training released each image once, with the same draw of noise at another strength: two such releases give the latent away.")
    except InputError as error:
        return {"certified_bits": None, "uncertified": str(error)}, f"no certificate: {error}"
    told = {"certified_bits": found.bits, "releases": found.releases, "fano": found.fano, "lifetime_bits": None}
    what = "in all rounds together" if once else "a release" if releases == 1 else f"in {releases} releases together"
    said = f"certified: at most {found.lifetime_bits:.1f} bits of an image beyond its label {what}, to name it among the {sum(classes)} of all classes at most {100 * found.fano:.0f} %"
    try:
        if strength != 1:
            raise InputError(f"the training released at another strength than this one, {strength:g} times its own.")
        count = lifetime_releases(
            policy=policy, frozen_noise=frozen, front_frozen=front_frozen, level_still=noise.mode == "fixed" or settings.level_still,
            encoded=bool(defence.encoders), draws=_draws(run, group),
        )  # fmt: skip
    except InputError as error:
        return told | {"uncertified_lifetime": str(error)}, f"{said}; no lifetime bound: {error}"
    told |= {"lifetime_bits": count * found.bits, "lifetime_releases": count, "lifetime_fano": fano_bound(count * found.bits, classes)}
    if not once:
        said += f"; {count * found.bits:.1f} bits in the {count} releases of the whole training ({100 * told['lifetime_fano']:.0f} %)"
    return told, said


def _clipped_together(run: Run, defence: Defence, *, still: bool) -> str:
    """Why what leaves would tell of gradients that stay with the client: one norm of both has scaled it; "" if none has. still: no private tensor is trained."""
    if still:
        return ""
    if run.recipe.clients.grad_clip > 0:
        return (
            f"clients.grad_clip={run.recipe.clients.grad_clip:g} scales the head's gradient by a norm that the private layers' gradient, a function of the image "
            "itself, is part of. Set clients.grad_clip=0, or leave the private layers as they are (front=frozen, level=fixed)."
        )
    if isinstance(defence, PrivateNoise):
        return "DP-SGD's clipping scales the head's gradient by a norm that the private layers' gradient, a function of the image itself, is part of. Take one of the two."
    return ""


def _asks(chosen: Any) -> bool:
    """Whether a defence of the recipe is one that learns for the sake of a certificate, alone or in a search or a combination."""
    chosen = chosen.defence if isinstance(chosen, config.Matched) else chosen
    return any(isinstance(part, config.CapacityNoise) for part in (chosen if isinstance(chosen, tuple) else (chosen,)))


def _draws(run: Run, group: list[Cell]) -> int:
    """Releases of a victim's image over all rounds of the recipe, also those that patience leaves out: the most of any victim's client and seed.

    One in an epoch; under DP-SGD of images, whose batches are drawn with each image by itself, any step may take it, and all count.
    """
    most, settings = 0, build.local_settings(run.recipe.clients)
    for cell in group:
        poisson = isinstance(cell.trained.training.defence, PrivateNoise)
        taken = Counter(client for number in range(run.setting.rounds) for client in cell.trained.training.draw(number))
        for owner in cell.victims.owners:
            often = settings.steps_in_round(run.setting.clients[owner].num_examples) if poisson else settings.epochs
            most = max(most, taken[owner] * often)
    return most


def _worst_rows(run: Run, members: list[Cell], scored: Scored, ensemble: str) -> list[dict[str, Any]]:
    """An ensemble's rows, the last one over all of its members; where some are bounds on attackers, one without these comes before."""
    bounds = {cell.name.removeprefix(f"{ensemble} - "): beyond(run, cell.trained, cell.attack) for cell in members}
    bounds = {name: said for name, said in bounds.items() if said}
    fair = [cell for cell in members if cell.name.removeprefix(f"{ensemble} - ") not in bounds]
    rows = [_worst_row(run, members, scored, ensemble)]
    if bounds:
        told = "; ".join(f"{name} {' and '.join(said)}" for name, said in bounds.items())
        rows[0]["threat"] |= {"name": f"{rows[0]['threat']['name']}; bounds beyond that: {told}", "beyond": bounds}
        rows[0]["note"] += f"; bounds among them: {told}"
    if bounds and fair:
        row = _worst_row(run, fair, scored, ensemble)
        rows.insert(0, row | {"attack": f"{ensemble} without bounds", "without": list(bounds), "note": f"{row['note']}; left out are the bounds {', '.join(bounds)}"})
    return rows


def _worst_row(run: Run, members: list[Cell], scored: Scored, ensemble: str) -> dict[str, Any]:
    """The ensemble: for every victim and seed its worst case, the member's reconstruction of the highest PSNR, of those that did not fail if there are any."""
    seeds = dict.fromkeys(cell.seed for cell in members)
    per_seed, winners, lost = [], [], 0
    size = members[0].victims.rows.shape[1]
    for seed in seeds:
        here = [cell for cell in members if cell.seed == seed]
        failed = torch.tensor([[found.status == "failed" for found in cell.reconstructions] for cell in here]).repeat_interleave(size, dim=1)
        values = torch.stack([scored[id(cell)]["psnr_db"] for cell in here])
        best = values.masked_fill(failed & ~failed.all(0), -torch.inf).argmax(0)
        lost += int(failed.all(0).sum())
        winners += [here[number].name.removeprefix(f"{ensemble} - ") for number in best[~failed.all(0)].tolist()]
        per_seed.append({key: torch.stack([scored[id(cell)][key] for cell in here]).gather(0, best[None])[0] for key in _keys(scored)})
    group = [next(cell for cell in members if cell.seed == seed) for seed in seeds]
    several = max((getattr(cell.attack, "rounds", 1) for cell in members), default=1)
    row = _row(run, group, _by_seed(per_seed, _keys(scored)), releases=several) | {"threat": threat(run, group[0], members)}
    counts = {name: winners.count(name) for name in dict.fromkeys(winners)}
    version = next(attack for name, attack in run.recipe.attacks.items() if name == ensemble).version
    for key in ("iterations", "restarts", "steps", "samples", "rounds", "fit", "fit_first", "noise", "calibration", "in_loop_psnr_db", "ensemble"):
        row.pop(key, None)
    told = [f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])] + ([f"none {lost}, where all failed"] if lost else [])
    told_of = row["threat"] | ({"name": f"{row['threat']['name']}; one attack sees {several} releases", "rounds": several} if several > 1 else {})
    return row | {
        "attack": ensemble, "attack_id": "standard", "version": version, "failed": lost, "threat": told_of,
        "seconds": sum(cell.seconds for cell in members), "members": len({cell.name for cell in members}), "worst_by": counts,
        "note": "worst case per victim of its members: " + ", ".join(told),
    }  # fmt: skip


def control_bounds(cells: list[Cell], scored: Scored) -> list[dict[str, Any]]:
    """What the attacker's priors draw from a shuffled gradient, as a bound of each defence and checkpoint, over seeds; of the first control there."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        group = groups.setdefault((cell.defence, cell.checkpoint), [])
        if cell.control and (not group or group[0].name == cell.name):
            group.append(cell)
    found = []
    for (defence, checkpoint), group in groups.items():
        if not group:
            continue
        size, values = group[0].victims.rows.shape[1], _by_seed([scored[id(cell)] for cell in group], _keys(scored))
        measures = {key: measured(values[key], key, seed=0, batch=size) for key in ("mse", "nmse", "psnr_db", "ssim", "attacker_accuracy")}
        found.append({"name": CONTROL, "of": defence, "checkpoint": checkpoint, **measures, **by_judge(values, batch=size)})
    return found


def record(run: Run, cell: Cell, values: dict[str, Tensor]) -> None:
    """One line per victim, and one per attack."""
    size = cell.victims.labels.shape[1]
    named = {"defence": cell.defence, "seed": cell.seed, "checkpoint": cell.checkpoint, "attack": cell.name}
    for index, row in enumerate(cell.victims.rows.flatten().tolist()):
        found = cell.reconstructions[index // size]
        run.append(
            "attack", **named, victim=row, batch=index // size,
            client=cell.victims.owners[index // size], status=found.status, error=found.error, loss=found.loss, restart=found.restart,
            **{name: float(values[name][index]) for name in MEASURES},
        )  # fmt: skip
    for attempt in cell.attempts:
        run.append("attempt", **named, victim=cell.victims.rows[attempt["observation"]].tolist(), **attempt)


# --- pictures ------------------------------------------------------------------------------------------------------------


UNFAIR = (config.PostHocDecoder, config.ImprintServer, config.ZeroedLevel)
"""Attackers with more than the run's adversary has; whose image they get tells of nobody's leakage."""


def _most_leaked_first(leaks: list[Tensor], count: int) -> Tensor:
    """Order of victims by the best attack on each (dB), and by all attacks' mean where that is equal; NaN: it failed, and shows nothing."""
    if not leaks:
        return torch.arange(count)
    values = torch.stack(leaks)
    mean, best = values.nanmean(0), values.masked_fill(values.isnan(), -torch.inf).amax(0)
    by_mean = mean.masked_fill(mean.isnan(), -torch.inf).argsort(descending=True, stable=True)
    return by_mean[best[by_mean].argsort(descending=True, stable=True)]


def _leaks(cells: list[Cell], scored: Scored) -> list[Tensor]:
    """Of each attack that tells of leakage, the PSNR of each victim; NaN where it failed. A shuffled gradient tells of none."""
    fair = [cell for cell in cells if not cell.control and not isinstance(cell.attack, UNFAIR)]
    lost = [torch.tensor([found.status == "failed" for found in cell.reconstructions]).repeat_interleave(cell.victims.rows.shape[1]) for cell in fair]
    return [scored[id(cell)]["psnr_db"].masked_fill(failed, torch.nan) for cell, failed in zip(fair, lost, strict=True)]


def draw(run: Run, cells: list[Cell], scored: Scored, scorer: Scorer, folder: Path) -> list[str]:
    """Per checkpoint a contact sheet (private | bounds | each defence under each attack), most leaked victim first; the attackers' losses and
    the evaluator's PSNR on the way."""
    drawn, title = [], run.setting.dataset.title
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in cells):
        here = [cell for cell in cells if cell.checkpoint == checkpoint and cell.seed == cells[0].seed]
        columns = [cell for cell in here if cell.twin is None]
        victims = columns[0].victims
        rows = victims.rows.flatten()
        order = _most_leaked_first(_leaks(columns, scored), len(rows))
        truth = victims.images.flatten(0, 1).cpu()
        names, labels = run.setting.dataset.class_names, victims.labels.flatten().tolist()
        sheet: list[tuple[str, Tensor]] = [("private", truth[order])]
        captions: list[list[str] | None] = [None]
        for name in GUESSES:
            guess = scorer.guess(name, truth.to(run.world.device), victims.labels.flatten().to(run.world.device)).cpu()
            sheet.append((f"no gradient:\n{name}", guess[order]))
            captions.append([f"{value:.1f} dB" for value in metrics.psnr_db(guess, truth)[order].tolist()])
        for cell in columns:
            sheet.append((f"{cell.defence}:\n{cell.name}", scored[id(cell)]["images"][order]))
            captions.append([f"{value:.1f} dB" for value in scored[id(cell)]["psnr_db"][order].tolist()])
        data = folder / f"reconstructions-{checkpoint}.safetensors"
        meta = {
            "titles": [name for name, _ in sheet], "captions": captions, "title": f"{title}: attacked at the {checkpoint} checkpoint",
            "row_labels": [f"{names[labels[i]]} #{int(rows[i])}" for i in order.tolist()],
        }  # fmt: skip
        save_file(data, {f"{number:03d}": images for number, (_, images) in enumerate(sheet)}, meta)
        drawn.append(_draw_sheet(data))
        matched = [cell for cell in columns if cell.matches]
        losses = {f"{cell.defence}, {cell.name}": torch.stack([found.losses for found in cell.reconstructions]) for cell in matched}
        iterations = {f"{cell.defence}, {cell.name}": cell.attack.iterations for cell in matched if hasattr(cell.attack, "iterations")}
        losses = {name: values for name, values in losses.items() if name in iterations}
        if losses:
            attack_curves(folder / f"attack-losses-{checkpoint}.png", losses, title=f"{title}: the attackers' losses at the {checkpoint} checkpoint", iterations=iterations)
            drawn.append(f"pictures/attack-losses-{checkpoint}.png")
        curves = {f"{cell.defence}, {cell.name}": scored[id(cell)]["psnr_on_the_way"] for cell in matched if "psnr_on_the_way" in scored[id(cell)]}
        curves = {name: values for name, values in curves.items() if name in iterations}
        if curves:
            progress_curves(
                folder / f"attack-psnr-{checkpoint}.png", curves, iterations=iterations,
                title=f"{title}: what the evaluator sees of the attacks at the {checkpoint} checkpoint",
            )  # fmt: skip
            drawn.append(f"pictures/attack-psnr-{checkpoint}.png")
    return drawn


def _draw_sheet(data: Path) -> str:
    """Draw a saved contact sheet; returns its path relative to the run."""
    tensors, meta = load_file(data)
    columns = [(title, tensors[f"{number:03d}"]) for number, title in enumerate(meta["titles"])]
    grid(data.with_suffix(".png"), columns, row_labels=meta["row_labels"], title=meta["title"], captions=meta["captions"])
    return f"pictures/{data.with_suffix('.png').name}"


def redraw(folder: Path) -> list[str]:
    """Draw a run's contact sheets again from their saved images."""
    return [_draw_sheet(data) for data in sorted((folder / "pictures").glob("reconstructions-*.safetensors"))]
