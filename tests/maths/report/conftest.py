"""Made-up results in the documented layout; no images and no training stand behind them."""

import copy

import pytest


def interval(mean, half, worst):
    return {"mean": mean, "low": mean - half, "high": mean + half, "worst": worst, "worst_decile": (mean + worst) / 2}


def row(defence, attack, attack_id, psnr_db, half=0.6, *, checkpoint="untrained", ssim=0.3, accuracy=0.9, **more):
    values = {"defence": defence, "attack": attack, "attack_id": attack_id, "checkpoint": checkpoint, "seeds": [0, 1, 2], "share_policy": "full"}
    values |= {"threat": {"release": "gradient", "batch_size": 1, "labels": "known"}, "victims": 64, "failed": 0, "client_accuracy": accuracy}
    values |= {"attacker_accuracy": 0.5, "mse": interval(0.02, 0.003, 0.01), "psnr_db": interval(psnr_db, half, psnr_db + 1.5)}
    return values | {"ssim": interval(ssim, 0.03, 0.4), "iterations": 2000, "restarts": 3, "seconds": 61.0, "note": ""} | more


def make_results():
    bound = {"mse": interval(0.012, 0.002, 0.004), "ssim": interval(0.42, 0.03, 0.6), "attacker_accuracy": 0.98}
    return {
        "format": 1,
        "recipe": {"type": "Recipe", "defences": {"plain": {"type": "Undefended"}, "learned": {"type": "LearnedPerturbation"}}},
        "recipe_name": "quickstart",
        "data": {"name": "bloodmnist", "source": "a file", "md5": "00", "synthetic": False, "counts": {"train": 11959}},
        "versions": {"python": "3.11"},
        "hardware": {"cpu": "x86"},
        "seeds": [0, 1, 2],
        "world_size": 1,
        "threads": 1,
        "seconds": {"total": 61.0, "train": {"plain/0": 30.0}, "attack": {"joint": 31.0}},
        "weights_sha256": {"plain/0": "ab"},
        "training": [
            {"defence": "plain", "seed": 0, "rounds": 40, "best_round": 37, "val_accuracy": 0.92, "test_accuracy": 0.915},
            {"defence": "learned", "seed": 0, "rounds": 40, "best_round": 39, "val_accuracy": 0.91, "test_accuracy": 0.903},
        ],
        "rows": [row("plain", "naive", "A0", 24.4), row("learned", "naive", "A0", 8.0), row("learned", "joint", "A3", 12.1)],
        "bounds": [
            {"name": "constant grey", "psnr_db": interval(11.2, 0.3, 13.0), "mse": 0.08, "ssim": 0.05, "attacker_accuracy": 0.125},
            {"name": "mean image", "psnr_db": interval(16.0, 0.3, 20.0)} | {key: bound[key] for key in ("mse", "ssim")},
            {"name": "class mean", "psnr_db": interval(19.0, 0.3, 24.0)} | bound,
            {"name": "nearest public neighbour", "psnr_db": interval(18.0, 0.3, 23.0)} | bound,
        ],
        "judge": {"accuracy_on_truth": 0.95, "accuracy_on_test": 0.94, "chance": 0.125},
        "pictures": [],
        "verdict": [],
    }


@pytest.fixture
def results():
    return copy.deepcopy(make_results())


@pytest.fixture
def make_row():
    return row
