"""How long a round takes on many GPUs, before one has them: measured client times, the real planner, and a stated model of the network.

    T(G) = max_r (Σ_{i on r} t_i + [r = 0] T_save) + T_reduce(G) + T_evaluate ⌈chunks / G⌉ / chunks + T_meet(G) + T_rest

Rank 0 saves while the others begin the next round. Where a round's evaluation runs beside the next round, only what outlasts that counts,
max(0, T_evaluate ⌈chunks / G⌉ / chunks − all else but saving); clients are taken to be as slow beside it on any number of ranks as where they were measured. Only the standard library, so that it runs where no GPU is. Limits: ranks do not slow one another down (memory bandwidth, disks), the network is
idle otherwise, and the model knows no congestion; a rank's clients run one after another.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gidef.parallel.plan import longest_first


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """gpus_per_node: g.  *_gbytes: bandwidth of payload, GB/s (10^9), of one GPU inside a node and of one node's interface, as iperf3 or nccl-tests
    show it: over TCP on Ethernet, 1448 of 1580 bytes are payload, the rest headers and acknowledgements.  *_us: latency of a message, µs.
    algorithm: of the all-reduce, see `reduce_s`.  meet_us: what the store at rank 0 needs for each rank's roll call, µs."""

    gpus_per_node: int = 8
    intra_gbytes: float = 300.0
    inter_gbytes: float = 20.0
    intra_us: float = 5.0
    inter_us: float = 15.0
    algorithm: str = "hierarchical"
    meet_us: float = 40.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """seconds: of all evaluations of a round on one rank.  models: how many are evaluated, one after another.  chunks: of images, which ranks
    share out.  bytes: of one model's logits, summed over ranks.  overlapped: they run while the next round is computed."""

    seconds: float = 0.0
    models: int = 1
    chunks: int = 1
    bytes: float = 0.0
    overlapped: bool = False


@dataclass(frozen=True, slots=True)
class Forecast:
    """One round on `ranks` GPUs, in seconds. clients: the busiest rank's.  save: by how much saving makes the busiest rank busier.  evaluate: what a
    round waits for, with its sums over ranks.  ideal: Σt / G.  useful: Σt / max t."""

    ranks: int
    cohort: int
    clients_s: float
    save_s: float
    reduce_s: float
    evaluate_s: float
    meet_s: float
    rest_s: float
    ideal_s: float
    useful: float

    @property
    def round_s(self) -> float:
        return self.clients_s + self.save_s + self.reduce_s + self.evaluate_s + self.meet_s + self.rest_s


ALGORITHMS = ("ring", "tree", "hierarchical")


def reduce_s(network: Network, message: float, ranks: int) -> float:
    """Seconds of one all-reduce of `message` bytes.

    With G ranks on N = ⌈G/g⌉ nodes, latency a and bandwidth B of the slowest link on the way (a ring crosses nodes as soon as N > 1):
        ring          2 (G−1) a + 2 (G−1)/G · bytes / B
        tree          2 (⌈log2 min(G, g)⌉ a_intra + ⌈log2 N⌉ a_inter) + 2 bytes / B, pipelined
        hierarchical  reduce-scatter in the node, ring over nodes on 1/g of it per GPU, all-gather in the node:
                      2 (g−1) a_intra + 2 (g−1)/g · bytes / B_intra + 2 (N−1) a_inter + 2 (N−1)/N · bytes / B_inter
    Source:  Thakur et al. 2005, "Optimization of collective communication operations in MPICH", for the ring's terms.
    Raises:  ValueError for an unknown algorithm.
    """
    if network.algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={network.algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    if ranks == 1:
        return 0.0
    inside, nodes = min(ranks, network.gpus_per_node), math.ceil(ranks / network.gpus_per_node)
    a, b = network.intra_us * 1e-6, network.intra_gbytes * 1e9
    far_a, far_b = network.inter_us * 1e-6, network.inter_gbytes * 1e9
    step, slowest = (max(a, far_a), min(b, far_b)) if nodes > 1 else (a, b)
    if network.algorithm == "ring":
        return 2 * (ranks - 1) * step + 2 * (ranks - 1) / ranks * message / slowest
    if network.algorithm == "tree":
        return 2 * (math.ceil(math.log2(inside)) * a + math.ceil(math.log2(nodes)) * far_a) + 2 * message / slowest
    near = 2 * (inside - 1) * a + 2 * (inside - 1) / inside * message / b
    return near + (2 * (nodes - 1) * far_a + 2 * (nodes - 1) / nodes * message / far_b if nodes > 1 else 0.0)


def forecast(
    times: Sequence[float], ranks: int, network: Network, *, cohort: int | None = None, spread: float = 0.0, message: float = 0.0, rest_s: float = 0.0,
    save_s: float = 0.0, evaluation: Evaluation | None = None, collectives: int = 2, rounds: int = 20, seed: int = 0,
) -> Forecast:  # fmt: skip
    """Mean round over simulated ones.

    Args:    times: measured seconds of each client, above 0.  cohort: clients per round (default all); more than there are times are drawn
             with repetition, as a larger federation of the same kind.  spread: a client's time varies around its measured one by a log-normal
             factor of this standard deviation, which the planner does not see.  message: bytes of the sum over ranks.
             rest_s: what does not get shorter with more ranks (server step).  save_s: what rank 0 alone does.  evaluation: None for none.
             collectives: roll calls per round, beside one for each evaluated model.
    Raises:  ValueError for no times, a time that is not above 0, or fewer than one rank.
    """
    if not times or not all(time > 0 for time in times) or ranks < 1:
        raise ValueError(f"{len(times)} client times and {ranks} ranks: give at least one time, each above 0, and one rank")
    size, draws = cohort or len(times), random.Random(seed)
    slowest, saving, totals, useful = [], [], [], []
    for _ in range(rounds):
        drawn = draws.sample(list(times), size) if size <= len(times) else draws.choices(list(times), k=size)
        real = [time * math.exp(draws.gauss(-spread * spread / 2, spread)) for time in drawn] if spread else drawn
        busy = [sum(real[i] for i in mine) for mine in longest_first(drawn, ranks)]
        slowest.append(max(busy))
        saving.append(max(0.0, busy[0] + save_s - slowest[-1]))
        totals.append(sum(real))
        useful.append(sum(real) / max(real))
    found = evaluation or Evaluation(models=0)
    gathers = reduce_s(network, 0.0, ranks)  # of the seconds that clients took
    meet = (collectives + found.models) * ranks * network.meet_us * 1e-6 + gathers if ranks > 1 else 0.0
    clients, reduce = statistics.fmean(slowest), reduce_s(network, message, ranks)
    evaluate = found.seconds * math.ceil(found.chunks / ranks) / found.chunks
    if found.overlapped:
        evaluate = max(0.0, evaluate - clients - reduce - meet - rest_s)
    return Forecast(
        ranks=ranks, cohort=size, clients_s=clients, save_s=statistics.fmean(saving), reduce_s=reduce,
        evaluate_s=evaluate + found.models * reduce_s(network, found.bytes, ranks), meet_s=meet, rest_s=rest_s, ideal_s=statistics.fmean(totals) / ranks, useful=statistics.fmean(useful),
    )  # fmt: skip
