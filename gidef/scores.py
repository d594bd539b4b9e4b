"""Scores of reconstructions against the truth: the evaluator's judge, the trivial bounds, intervals over victims."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gidef import metrics
from gidef.metrics import bounds
from gidef.observe import Victims
from gidef.training import Run
from gidef.types import Reconstruction

MEASURES = ("mse", "psnr_db", "ssim", "attacker_accuracy", "iip", "feature_distance")
POOL = 2000
"""Further images, beside the victims, among which a reconstruction has to be identified (IIP)."""


class Scorer:
    """Scores reconstructions against the truth, as the evaluator, with the judge and the trivial bounds."""

    def __init__(self, run: Run, judge: torch.nn.Module) -> None:
        self._run, self._judge = run, judge
        dataset, roles = run.setting.dataset, run.setting.roles
        train, device = dataset.train, run.world.device
        self.rows = roles.victims
        self.truth = train.images[self.rows].to(device, torch.float32).div_(255)
        self.labels = train.labels[self.rows].to(device)
        self._public = dataset.val.images.to(device, torch.float32).div_(255)
        self._public_labels = dataset.val.labels.to(device)
        pool = torch.cat([self.rows, roles.judge[:POOL]])
        self._pool, self._pool_labels = train.images[pool].to(device, torch.float32).div_(255), train.labels[pool].to(device)

    def measure(self, images: Tensor, truth: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per-image values (N,) on the CPU; images and truth (N, C, H, W) paired."""
        images = images.to(truth)
        with torch.no_grad():
            values = {
                "mse": metrics.mse(images, truth), "psnr_db": metrics.psnr_db(images, truth), "ssim": metrics.ssim(images, truth),
                "attacker_accuracy": metrics.attacker_correct(self._judge, images, labels),
                "iip": metrics.iip(images, truth, labels, self._pool, self._pool_labels),
                "feature_distance": metrics.feature_distance(self._judge.features, images, truth),
            }  # fmt: skip
        return {name: value.double().cpu() for name, value in values.items()}

    def score(self, victims: Victims, reconstructions: list[Reconstruction]) -> dict[str, Tensor]:
        """Values per victim in the order of victims.rows, after pairing each batch with its truth; plus `recovered` labels and the oracle's PSNR."""
        paired, oracle, recovered = [], [], []
        for found, truth, labels in zip(reconstructions, victims.images, victims.labels, strict=True):
            images = found.images.to(truth)
            paired.append(images[metrics.pair(images, truth)])
            recovered.append(metrics.label_recovery(found.labels.cpu(), labels.cpu()))
            starts = found.restart_images if found.restart_images is not None else found.images[None]
            best = [metrics.psnr_db(start.to(truth)[metrics.pair(start.to(truth), truth)], truth).mean() for start in starts]
            oracle.append(float(torch.stack(best).max()))
        images = torch.cat(paired)
        values = self.measure(images, victims.images.flatten(0, 1), victims.labels.flatten())
        values["images"] = images.cpu()
        values["recovered"] = torch.tensor(recovered, dtype=torch.float64).repeat_interleave(victims.labels.shape[1])
        values["oracle_psnr_db"] = torch.tensor(oracle, dtype=torch.float64).repeat_interleave(victims.labels.shape[1])
        return values

    def bounds(self) -> list[dict[str, Any]]:
        """What guesses without any gradient score on the same victims, from public images."""
        guesses = {
            "constant grey": bounds.grey(self.truth),
            "mean image": bounds.mean_image(self._public, len(self.truth)),
            "class mean": bounds.class_means(self._public, self._public_labels, self.labels),
            "nearest public neighbour": bounds.nearest_public(self.truth, self.labels, self._public, self._public_labels),
        }
        found = []
        for name, images in guesses.items():
            values = self.measure(images, self.truth, self.labels)
            found.append({"name": name, **{key: measured(values[key], key, seed=0) for key in ("mse", "psnr_db", "ssim", "attacker_accuracy")}})
        return found

    def judge_record(self) -> dict[str, Any]:
        test = self._run.setting.dataset.test
        with torch.no_grad():
            outputs = [
                self._judge(batch.to(self._run.world.device, torch.float32).div_(255)).cpu() for batch in test.images.split(500)
            ]
            truth = metrics.attacker_accuracy(self._judge, self.truth, self.labels)
        return {
            "accuracy_on_truth": truth, "accuracy_on_test": metrics.accuracy(torch.cat(outputs), test.labels.cpu()),
            "chance": 1 / self._run.setting.dataset.num_classes, "pool": len(self._pool),
        }  # fmt: skip


def measured(values: Tensor, name: str, *, seed: int) -> dict[str, float]:
    """Mean over victims, 95 % bootstrap interval, the most leaked image and the mean of the most leaked tenth."""
    higher = name not in ("mse", "feature_distance")
    low, high = metrics.bootstrap_interval(values, seed=seed)
    return {
        "mean": float(values.mean()), "low": low, "high": high, "worst": float(values.max() if higher else values.min()),
        "worst_decile": metrics.worst_decile(values, higher_is_leak=higher),
    }  # fmt: skip
