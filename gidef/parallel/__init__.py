"""Ranks and worker threads: the executors that take the serial ones' places. The maths knows nothing of them."""

from gidef.parallel.checkpoints import SlicedCheckpoints
from gidef.parallel.cohort import OVERLAP_ABOVE, mean_over_world
from gidef.parallel.costs import Costs
from gidef.parallel.mesh import Layout, Mesh, mean_over_mesh, with_mesh
from gidef.parallel.robust import robust_over_world
from gidef.parallel.seats import Seat, seated, seats
from gidef.parallel.threads import Beside
from gidef.parallel.work import run_tasks
from gidef.parallel.world import World, open_world

__all__ = [
    "OVERLAP_ABOVE", "Beside", "Costs", "Layout", "Mesh", "Seat", "SlicedCheckpoints", "World", "mean_over_mesh", "mean_over_world", "open_world", "robust_over_world", "run_tasks",
    "seated", "seats", "with_mesh",
]  # fmt: skip
