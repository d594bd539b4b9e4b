"""Attacks on what a client releases. Nothing in this room sees the private images, not even to choose a restart."""

from gidef.attack.batch import KEPT, Chunk
from gidef.attack.calibrate import Calibration, calibrate, fitting, free_bytes
from gidef.attack.engine import Progress, broken, drain, invert, joined, outcome, plan, run, run_chunk, select
from gidef.attack.joint import joint
from gidef.attack.kinks import CurvedKinks
from gidef.attack.labels import classifier_names, recover_labels
from gidef.attack.matching import Matching, Point, Searched, Simulate, Start
from gidef.attack.naive import inverting_gradients, naive
from gidef.attack.presets import deep_leakage, gradinversion, improved_deep_leakage, modern_inverting_gradients
from gidef.attack.program import Programs
from gidef.attack.simulate import (
    averaged,
    local_adam,
    local_sgd,
    merge_rounds,
    multi_round,
    rounds_apart,
    surrogate_model,
    with_final_weights,
    without_noise,
)

__all__ = [
    "KEPT",
    "Calibration",
    "Chunk",
    "CurvedKinks",
    "Matching",
    "Point",
    "Programs",
    "Progress",
    "Searched",
    "Simulate",
    "Start",
    "averaged",
    "broken",
    "calibrate",
    "classifier_names",
    "deep_leakage",
    "drain",
    "fitting",
    "free_bytes",
    "gradinversion",
    "improved_deep_leakage",
    "inverting_gradients",
    "invert",
    "joined",
    "joint",
    "local_adam",
    "local_sgd",
    "merge_rounds",
    "modern_inverting_gradients",
    "multi_round",
    "naive",
    "outcome",
    "plan",
    "recover_labels",
    "rounds_apart",
    "run",
    "run_chunk",
    "select",
    "surrogate_model",
    "with_final_weights",
    "without_noise",
]
