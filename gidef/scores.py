"""Scores of reconstructions against the truth: the evaluator's judge, the trivial bounds, intervals over observations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gidef import metrics
from gidef.metrics import bounds
from gidef.observe import Victims
from gidef.runs import Run
from gidef.types import Reconstruction

MEASURES = ("mse", "nmse", "psnr_db", "ssim", "attacker_accuracy", "iip", "feature_distance")
ABOVE = "above_class_mean_db"
"""A victim's PSNR less that of its class mean: paired, so that its interval is that of the difference."""
GUESSES = ("constant grey", "mean image", "class mean", "nearest public neighbour")
"""What draws without any gradient: the trivial bounds, in the tables' order."""
JUDGED = "attacker_accuracy by "
"""Before the name of a further judge, in `Scorer.measure`."""
POOL = 2000
"""Further images, beside the victims, among which a reconstruction has to be identified (IIP)."""


class Scorer:
    """Scores reconstructions against the truth, as the evaluator, with the judge and the trivial bounds. more: further judges, by name."""

    def __init__(self, run: Run, judge: torch.nn.Module, more: Mapping[str, torch.nn.Module] | None = None) -> None:
        self._run, self._judge, self._more = run, judge, dict(more or {})
        dataset, roles = run.setting.dataset, run.setting.roles
        train, device = dataset.train, run.world.device
        self.rows = roles.victims
        self.truth = train.images[self.rows].to(device, torch.float32).div_(255)
        self.labels = train.labels[self.rows].to(device)
        self._public = dataset.val.images.to(device, torch.float32).div_(255)
        self._public_labels = dataset.val.labels.to(device)
        self._variance = metrics.variance(self._public)
        pool = torch.cat([self.rows, roles.judge[:POOL]])
        self._pool, self._pool_labels = train.images[pool].to(device, torch.float32).div_(255), train.labels[pool].to(device)

    def measure(self, images: Tensor, truth: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per-image values (N,) on the CPU; images and truth (N, C, H, W) paired."""
        images = images.to(truth)
        with torch.no_grad():
            values = {
                "mse": metrics.mse(images, truth), "nmse": metrics.nmse(images, truth, variance=self._variance), "psnr_db": metrics.psnr_db(images, truth), "ssim": metrics.ssim(images, truth),
                "attacker_accuracy": metrics.attacker_correct(self._judge, images, labels),
                "iip": metrics.iip(images, truth, labels, self._pool, self._pool_labels),
                "feature_distance": metrics.feature_distance(self._judge.features, images, truth),
                **{JUDGED + name: metrics.attacker_correct(judge, images, labels) for name, judge in self._more.items()},
            }  # fmt: skip
        return {name: value.double().cpu() for name, value in values.items()}

    def score(self, victims: Victims, reconstructions: list[Reconstruction]) -> dict[str, Tensor]:
        """Values per victim in the order of victims.rows, after pairing each batch with its truth; plus `recovered` labels (NaN of failed
        attacks, which guessed none), the PSNR of the start that the truth would choose, and psnr_on_the_way (observations, snapshots) where attacks kept any."""
        paired, oracle, recovered, curves = [], [], [], []
        for batch, (found, truth) in enumerate(zip(reconstructions, victims.images, strict=True)):
            images = found.images.to(truth)
            paired.append(images[metrics.pair(images, truth)])
            recovered.append(_recovered(found.labels.cpu(), victims, batch) if found.status == "ok" else math.nan)
            starts = found.restart_images if found.restart_images is not None else found.images[None]
            oracle.append(float(torch.stack([_paired_psnr(start, truth) for start in starts]).max()))
            if found.snapshots is not None:
                curves.append(torch.stack([_paired_psnr(images, truth) for images in found.snapshots.float()]))
        images = torch.cat(paired)
        values = self.measure(images, victims.images.flatten(0, 1), victims.labels.flatten())
        truth, labels = victims.images.flatten(0, 1), victims.labels.flatten()
        values[ABOVE] = values["psnr_db"] - metrics.psnr_db(self.guess("class mean", truth, labels), truth).double().cpu()
        values["images"] = images.cpu()
        values["recovered"] = torch.tensor(recovered, dtype=torch.float64).repeat_interleave(victims.labels.shape[1])
        values["oracle_psnr_db"] = torch.tensor(oracle, dtype=torch.float64).repeat_interleave(victims.labels.shape[1])
        if len(curves) == len(reconstructions):
            values["psnr_on_the_way"] = torch.stack(curves).cpu()
        return values

    def guess(self, name: str, truth: Tensor, labels: Tensor) -> Tensor:
        """What a guess without any gradient draws of images (N, C, H, W) with labels (N,): one of the trivial bounds."""
        match name:
            case "constant grey":
                return bounds.grey(truth)
            case "mean image":
                return bounds.mean_image(self._public, len(truth))
            case "class mean":
                return bounds.class_means(self._public, self._public_labels, labels)
            case "nearest public neighbour":
                return bounds.nearest_public(truth, labels, self._public, self._public_labels)
        raise ValueError(f"no bound is called {name!r}")

    def bounds(self) -> list[dict[str, Any]]:
        """What guesses without any gradient score on the same victims, from public images: of each image by itself, whatever its batch."""
        found = []
        for name in GUESSES:
            values = self.measure(self.guess(name, self.truth, self.labels), self.truth, self.labels)
            measures = {key: measured(values[key], key, seed=0) for key in ("mse", "nmse", "psnr_db", "ssim", "attacker_accuracy")}
            found.append({"name": name, **measures, **by_judge(values)})
        return found

    def judge_record(self) -> dict[str, Any]:
        others = {name: self._known(judge) for name, judge in self._more.items()}
        own = self._known(self._judge) | {"chance": 1 / self._run.setting.dataset.num_classes, "pool": len(self._pool)}
        return own | ({"others": others} if others else {})

    def _known(self, judge: torch.nn.Module) -> dict[str, float]:
        test = self._run.setting.dataset.test
        with torch.no_grad():
            outputs = [judge(batch.to(self._run.world.device, torch.float32).div_(255)).cpu() for batch in test.images.split(500)]
            truth = metrics.attacker_accuracy(judge, self.truth, self.labels)
        return {"accuracy_on_truth": truth, "accuracy_on_test": metrics.accuracy(torch.cat(outputs), test.labels.cpu())}


def _recovered(found: Tensor, victims: Victims, batch: int) -> float:
    """Share of the labels that an attacker had right: of everybody's where it recovered the sum of a cohort."""
    everybody = victims.all_labels(batch) if len(found) > victims.labels.shape[1] else victims.labels[batch]
    return metrics.label_recovery(found, everybody.cpu())


def _paired_psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Mean PSNR of a batch after pairing, in dB."""
    images = images.to(truth)
    return metrics.psnr_db(images[metrics.pair(images, truth)], truth).mean()


def by_judge(values: Mapping[str, Tensor], *, batch: int = 1) -> dict[str, Any]:
    """A row's field with the attacker accuracy by each further judge; none without any. Values and batch as in `measured`."""
    judged = {name.removeprefix(JUDGED): value for name, value in values.items() if name.startswith(JUDGED)}
    found = {name: measured(value, "attacker_accuracy", seed=0, batch=batch) for name, value in judged.items()}
    return {"attacker_accuracy_by": found} if found else {}


def measured(values: Tensor, name: str, *, seed: int, batch: int = 1) -> dict[str, float | None]:
    """Mean over victims, 95 % bootstrap interval over observations, the most leaked image and the mean of the most leaked tenth.

    Args:    values: (victims,), or (seeds, victims): the mean and its interval are of each victim's mean over seeds, the most leaked of the seed in
             which it leaked most, since one training that gives a patient away is not made good by the others.
             batch: images of one observation, side by side among the victims, which are resampled together; 1 for what depends on no batch.
    Returns: the interval's ends are None of one observation of several images (`metrics.bootstrap_interval`).
    """
    higher = name not in ("mse", "nmse", "feature_distance")
    values = torch.atleast_2d(values)
    pooled, most = values.mean(0), values.amax(0) if higher else values.amin(0)
    low, high = metrics.bootstrap_interval(pooled, seed=seed, batch=batch) or (None, None)
    return {
        "mean": float(pooled.mean()), "low": low, "high": high, "worst": float(most.max() if higher else most.min()),
        "worst_decile": metrics.worst_decile(most, higher_is_leak=higher),
    }  # fmt: skip
