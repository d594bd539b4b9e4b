"""Attacks on what a client releases. Nothing in this room sees the private images, not even to choose a restart."""

from gidef.attack.batch import Chunk
from gidef.attack.engine import Progress, drain, invert, plan, run, run_chunk, select
from gidef.attack.joint import joint
from gidef.attack.kinks import CurvedKinks
from gidef.attack.labels import classifier_names, recover_labels
from gidef.attack.matching import Matching, Simulate, Start
from gidef.attack.naive import inverting_gradients, naive
from gidef.attack.simulate import local_adam, local_sgd

__all__ = [
    "Chunk",
    "CurvedKinks",
    "Matching",
    "Progress",
    "Simulate",
    "Start",
    "classifier_names",
    "drain",
    "inverting_gradients",
    "invert",
    "joint",
    "local_adam",
    "local_sgd",
    "naive",
    "plan",
    "recover_labels",
    "run",
    "run_chunk",
    "select",
]
