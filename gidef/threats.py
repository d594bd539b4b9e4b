"""The threat model of a row: what the server is, what it sees of a client, and what an attack is told beside that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gidef import config, observe
from gidef.cells import Cell, beyond, optimiser
from gidef.defence.encode import searched_of
from gidef.runs import Run
from gidef.strengths import levelled

STATISTICS = {
    "batch": "told the batch's statistics by the change of the running ones", "running": "knows the running statistics", "none": "knows no statistics of use",
    "proxy": "estimates the batch's statistics from public images",
}  # fmt: skip
DRAW_NOISE = (config.EotMatching, config.JointMatching, config.LatentDecoding, config.LearnedInversion, config.PostHocDecoder)
"""Attacks that search or draw the noise on the latent; those of one's own are handed its law."""
FROM_PUBLIC = (config.GenerativePrior, config.LatentDecoding, config.LearnedInversion, config.PostHocDecoder, config.ImprintServer)
"""Attacks that train, or craft a block, on public images."""
LOCAL = ("local_epochs", "local_lr", "local_optimiser", "local_momentum")


def threat(run: Run, cell: Cell, members: Sequence[Cell] = ()) -> dict[str, Any]:
    """The threat model in words and numbers, for the row; its name in clauses, parted by "; ". members: of an ensemble, told what any of them is but for
    bounds, and whose releases are not counted here."""
    evaluation = run.recipe.evaluation
    server = "malicious" if isinstance(cell.attack, (config.ImprintServer, config.ZeroedLevel)) else "honest but curious"
    count, norms, of_norms = observe.members(run, cell.trained), *_norms(run, cell)
    knows, handed = known(run, members or [cell]), [] if members else beyond(run, cell.trained, cell.attack)
    strength, releases = cell.trained.strength, 1 if members else getattr(cell.attack, "rounds", 1)
    said = [
        f"{server} server", f"{cell.checkpoint} checkpoint", _seen(evaluation, count), *([] if releases == 1 else [f"{releases} releases"]), _knowledge(knows, handed), norms,
        *([] if strength == 1 else [f"knows that the noise is {strength:g} times as strong as in training"]),
    ]  # fmt: skip
    swept = tuple(evaluation.strengths) != (1.0,) and levelled(cell.trained.training.defence)
    return {
        "name": "; ".join(said), "server": server, "knows": knows + [text.removeprefix("knows ") for text in handed], "release": evaluation.release,
        "batch_size": evaluation.batch_size, "local_steps": evaluation.local_steps, "clients_in_sum": count,
        **({"local_training": _local(evaluation), **{name: getattr(evaluation, name) for name in LOCAL}} if evaluation.release == "delta" else {}),
        "released_loss": evaluation.released_loss, "round": cell.snapshot.round, **of_norms,
        **({"strength": strength} if swept else {}),
        **{name: getattr(cell.attack, name) for name in ("labels", "decoder", "rounds", "front") if hasattr(cell.attack, name)},
    }  # fmt: skip


def _seen(evaluation: config.Evaluation, count: int) -> str:
    """What the server sees of a client, or of a sum of `count` clients."""
    what = "gradient of one batch" if evaluation.release == "gradient" else f"weight change after {_local(evaluation)}, on a batch"
    return f"{what} of {evaluation.batch_size}" + (f", summed over {count} clients" if count > 1 else "")


def _local(evaluation: config.Evaluation) -> str:
    """The local training behind a released delta."""
    epochs = f"{evaluation.local_epochs} epochs of " if evaluation.local_epochs > 1 else ""
    steps = f"{evaluation.local_steps} local step{'s' if evaluation.local_steps > 1 else ''}"
    return f"{epochs}{steps} of {optimiser(evaluation.local_optimiser, evaluation.local_momentum)}, lr {evaluation.local_lr:g}"


def known(run: Run, cells: Sequence[Cell]) -> list[str]:
    """What attacks on one defence are told, in words, beside what the server sees; of several, what any of them is. What only a bound is handed is not
    among it (`cells.beyond`)."""
    trained, evaluation, progress = cells[0].trained, run.recipe.evaluation, cells[0].snapshot.progress
    defence, delta = trained.training.defence, evaluation.release == "delta"
    encoded = bool(searched_of(defence.encoders, run.setting.dataset.image_shape, evaluation.batch_size))
    more_than_cross_entropy = defence.own_terms or (defence.noise_shape is not None and not defence.cross_entropy_alone(progress))

    def labels(attack: Any) -> str:
        return getattr(attack, "labels", "none")

    def adapts(attack: Any) -> bool:
        return observe.adapts(attack) or isinstance(attack, config.LearnedInversion)

    def terms(attack: Any) -> str:
        matches = isinstance(attack, config.NaiveMatching) or observe.own(attack)
        return observe.terms(run, trained, attack, progress=progress) if matches else evaluation.released_loss if isinstance(attack, config.LearnedInversion) else "utility"

    def simulates(attack: Any) -> bool:
        return delta and (observe.own(attack) or (isinstance(attack, config.NaiveMatching) and not isinstance(attack, config.SurrogateModel)))

    def told_steps(attack: Any) -> bool:  # a surrogate model has no use for them but to recover labels, others for the rate of the one step that they read
        reads = isinstance(attack, (config.Analytic, config.LatentDecoding, config.LearnedInversion))
        return delta and (reads or (isinstance(attack, config.SurrogateModel) and labels(attack) == "recovered"))

    facts = {
        "the labels": lambda attack: labels(attack) == "known",
        "the label counts": lambda attack: labels(attack) == "counts",
        "the noise law": lambda attack: defence.noise_shape is not None and (isinstance(attack, DRAW_NOISE) or observe.own(attack)),
        "the client's loss": lambda attack: more_than_cross_entropy and terms(attack) == "client",
        "the change of updates": lambda attack: (bool(defence.transforms) or defence.budget is not None) and adapts(attack),
        "the encoding of images": lambda attack: encoded and adapts(attack),
        "public images": lambda attack: isinstance(attack, FROM_PUBLIC) or observe.taken_apart(trained, attack) is not None or (getattr(attack, "decoder", "") == "surrogate" and observe.keeps_decoder(run, trained)),
        "the local steps": lambda attack: simulates(attack) or told_steps(attack),
        "the order of the local batches": lambda attack: simulates(attack) and evaluation.local_steps > 1 and labels(attack) == "known",
        "who of the cohort has which label": lambda attack: labels(attack) == "known" and observe.places(run, trained, attack, progress=progress)[1] > 1,
    }
    return [what for what, holds in facts.items() if any(holds(cell.attack) for cell in cells)]


def _knowledge(knows: list[str], handed: list[str]) -> str:
    """In one clause; handed: as `cells.beyond` says it."""
    nouns = knows + [text.removeprefix("knows ") for text in handed if text.startswith("knows ")]
    given = [text for text in handed if not text.startswith("knows ")]
    listed = " and ".join(filter(None, (", ".join(nouns[:-1]), *nouns[-1:])))
    without = not given and not {"the labels", "the label counts"} & set(knows)
    if listed:
        given.append(f"knows {listed}{' but no labels' if without else ''}")
    return ", ".join(given) or "knows no labels"


def _norms(run: Run, cell: Cell) -> tuple[str, dict[str, str]]:
    """What a threat model says of the client's BatchNorm, and what the attack knows of its statistics: in words, and for the row."""
    moves, frozen = cell.trained.training.participation.moves_statistics, cell.trained.training.frozen
    if not moves and not frozen:
        return "no BatchNorm", {"batch_norm": "none in the model"}
    kind = observe.statistics_known(run, cell.trained, cell.snapshot, cell.attack)
    said = "BatchNorm in train mode" if moves else "BatchNorm frozen (eval mode)"
    return f"{said}, {STATISTICS[kind]}", {"batch_norm": "train" if moves else "eval", "statistics": kind}
