"""The cells of an evaluation: every (defence, seed, checkpoint, attack), what its results depend on, and where they are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gidef import config, observe
from gidef.attack import Calibration
from gidef.defence.bido import BiDODefence
from gidef.defence.clipping import Clip
from gidef.defence.encode import searched_of
from gidef.defence.instahide import Hide
from gidef.defence.mixup import Mix
from gidef.defence.seeing import SeeingDecoder
from gidef.runs import Run, Snapshot, Trained, run_key
from gidef.types import Reconstruction

NEEDS_NOISE = (config.EotMatching, config.SkipLayers, config.ReadNoise, config.ZeroedLevel, config.PostHocDecoder, config.LatentDecoding)
"""Attacks on the noise or through it, left out where there is none: a latent without noise gives the image away by construction, and where the front is
shared, A0 matches it as well. Under `head` A0 has no front to match by, and A5 reads the latent whatever the defence."""
CONTROL = "shuffled gradient"
BLIND = "the update of public images of the same labels, every tensor's entries in another order: what the priors draw by themselves"


@dataclass(frozen=True, slots=True)
class Task:
    """cost: in iterations of work, for the division over ranks and for the progress bar.  do: do(worker, report(units))."""

    name: str
    cost: float
    path: Path
    do: Callable[[int, Callable[[float], None]], None]


@dataclass(slots=True)
class Cell:
    """One entry of the table for one seed. `twin`: another cell with the same computation, whose result serves for both."""

    defence: str
    seed: int
    checkpoint: str
    name: str
    attack: Any
    trained: Trained
    snapshot: Snapshot
    folder: Path
    ensemble: str = ""
    """Name of the ensemble that it is a member of."""
    control: bool = False
    """Matches a shuffled update, of public images: what the attacker's priors draw by themselves."""
    note: str = ""
    read: int | None = None
    """Observations whose latent the attack read first, see `methods.Plan`."""
    twin: Cell | None = None
    releases: list[observe.Victims] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """One per observation and start: observation, start, iterations, status, error, loss, fit, seconds (its share of its chunk's), mark. iterations: of
    a search; the steps of the network's training for A7 and A12, whose victims share it; 0 for closed forms (A4, A11's bins), for a start that was not
    needed, and where the program raised."""
    failure: str = ""
    """Why none of its attacks could begin; they are failed rows."""
    calibration: Calibration | None = None
    in_loop_psnr_db: float | None = None
    """Of the decoder that the clients trained against, beside a post-hoc one."""
    seconds: float = 0.0
    tuned: dict[str, Any] | None = None
    """How its settings were chosen, see `gidef.tuned_attacks`; None where they were given."""

    @property
    def label(self) -> str:
        return f"{self.defence} / {self.name} / {self.checkpoint} / seed {self.seed}"

    @property
    def attack_id(self) -> str:
        return "control" if self.control else attack_id(self.attack)

    @property
    def victims(self) -> observe.Victims:
        return self.releases[0]

    @property
    def matches(self) -> bool:
        """Whether the engine runs it."""
        return isinstance(self.attack, config.NaiveMatching) or callable(getattr(self.attack, "plan", None))


def attack_id(attack: Any) -> str:
    """Of the literature's family, which a subclass with other settings stays in; of an attack of one's own what it calls itself."""
    family = () if callable(getattr(attack, "plan", None)) else type(attack).__mro__
    return config.IDS.get(type(attack)) or getattr(attack, "id", None) or next((config.IDS[one] for one in family if one in config.IDS), "own")


def chosen_attacks(recipe: config.Recipe) -> dict[str, tuple[Any, str, bool]]:
    """The recipe's attacks by name, ensembles in their members, and the control: (attack, name of its ensemble, whether it is the control)."""
    found: dict[str, tuple[Any, str, bool]] = {}
    for name, attack in recipe.attacks.items():
        if not isinstance(attack, config.Standard):
            found[name] = attack, "", False
            continue
        members = config.standard(attack.version, attack.labels)
        found |= {f"{name} - {member}": (one, name, False) for member, one in members.items()}
        found[f"{name} - {CONTROL}"] = members["naive"], name, True
    if recipe.evaluation.control and not any(control for _, _, control in found.values()):
        found[CONTROL] = recipe.attacks[config.controlled(recipe.attacks)], "", True
    return found


def make_cells(
    run: Run, trained: dict[tuple[str, int], Trained], folder: Path, *, tuned: Mapping[tuple[str, str, str], dict[str, Any]] | None = None, tell: bool = True
) -> list[Cell]:
    """Of every defence, seed and checkpoint those attacks that have something to attack there, and are simulated there. tuned: what was chosen for each (defence, checkpoint, attack) whose
    settings are tuned.  tell: say on the console which attacks are left out everywhere."""
    cells: list[Cell] = []
    hindered: dict[str, str] = {}
    for (defence, seed), one in trained.items():
        for checkpoint in run.recipe.evaluation.checkpoints:
            here: list[Cell] = []
            for name, (attack, ensemble, control) in chosen_attacks(run.recipe).items():
                sought = isinstance(attack, config.Tuned)
                if hindrance := _hindrance(run, one, attack.attack if sought else attack, member=bool(ensemble)):
                    hindered.setdefault(name, hindrance)
                    continue
                found = (tuned or {})[defence, checkpoint, name] if sought else None
                attack = attack.at(found["setting"]) if sought else attack
                place = folder / run_key(defence, seed) / checkpoint / name
                cell = Cell(defence, seed, checkpoint, name, attack, one, one.snapshots[checkpoint], place, ensemble, control, tuned=found)
                cell.note = BLIND if control else note_of(run, one, attack, progress=one.snapshots[checkpoint].progress)
                if not control:
                    cell.twin = next((other for other in here if _same_work(run, one, other, attack)), None)
                here.append(cell)
            cells += here
    if not tell:
        return cells
    idle = {name: hindered[name] for name in sorted(hindered.keys() - {cell.name for cell in cells})}
    for name in (name for name in idle if name in run.recipe.attacks):
        run.console.notice(f"{name} was left out: {idle[name]}.")
    for ensemble in (name for name, attack in run.recipe.attacks.items() if isinstance(attack, config.Standard)):
        members = {name: reason for name, reason in idle.items() if name.startswith(f"{ensemble} - ")}
        for reason in dict.fromkeys(members.values()):
            names = ", ".join(name.removeprefix(f"{ensemble} - ") for name in members if members[name] == reason)
            run.console.notice(f"{ensemble} goes without {names}: {reason}.")
    return cells


def not_applicable(run: Run, trained: dict[tuple[str, int], Trained]) -> list[dict[str, Any]]:
    """Attacks that have nothing to attack in a defence, or are not simulated there, with the reason: {defence, attack, attack_id, reason}, once for all seeds and checkpoints."""
    found = []
    for defence, one in {defence: one for (defence, _), one in trained.items()}.items():
        for name, (attack, ensemble, control) in chosen_attacks(run.recipe).items():
            attack = attack.attack if isinstance(attack, config.Tuned) else attack
            if not control and (reason := _hindrance(run, one, attack, member=bool(ensemble))):
                found.append({"defence": defence, "attack": name, "attack_id": attack_id(attack), "reason": reason})
    return found


def _hindrance(run: Run, one: Trained, attack: Any, *, member: bool = False) -> str:
    """Why an attack has nothing to do, or is not simulated; "" if it runs. member: of an ensemble, which takes A8 against noise on updates alone, and A5's decoder under `head`."""
    noisy = one.training.defence.noise_shape is not None
    if isinstance(attack, (config.LearnedInversion, config.LatentDecoding, config.Analytic)) and config.is_more_than_a_step(run.recipe.evaluation):
        return "it reads single gradients, and evaluation.release is a delta of more than one step of SGD"
    if isinstance(attack, config.READS) and config.is_more_than_a_step(run.recipe.evaluation):
        if run.recipe.evaluation.local_optimiser == "adam" or run.recipe.evaluation.local_epochs > 1 or one.training.defence.secure is not None:
            return "it reads the latents of steps of SGD in one epoch of one client"
        if attack.labels != "known":
            return "it reads the latent of every local step, and has to know the labels of each"
    reads_head = isinstance(attack, config.LatentDecoding) and run.recipe.share_policy == "head"
    if member and isinstance(attack, config.LatentDecoding) and not reads_head:
        return "the front is shared, and other members invert it"
    if isinstance(attack, NEEDS_NOISE) and not noisy and not reads_head:
        return "it needs a defence with noise on the latent"
    if isinstance(attack, config.MultiRound) and not noisy and not one.training.defence.random:
        return "it needs a defence that draws something in every release"
    if member and isinstance(attack, config.GenerativePrior) and not one.training.defence.noises_updates:
        return "the updates carry no noise that a prior could see through"
    guessed = observe.decoder_of(attack) != "known"
    if (isinstance(attack, config.DecoderAware) or guessed) and one.training.defence.decoder is None:
        return "it needs a defence with a decoder"
    if isinstance(attack, config.DecoderAware) and isinstance(one.training.defence.decoder, SeeingDecoder):
        return "it needs a decoder that is handed the latent alone"
    if isinstance(attack, config.ZeroedLevel) and not any(name.startswith("perturbation.level") for name in one.training.shared):
        return "it needs a noise level that the server sends"
    if isinstance(attack, (config.ImprintServer, config.ZeroedLevel, config.SkipLayers, *config.READS)) and run.recipe.share_policy == "head":
        return "it needs a front that is shared, and share_policy is head"
    if isinstance(attack, config.ReadLatent) and noisy and not _silent(one):
        return "it needs a latent without noise, and where there is noise read-noise reads it"
    if isinstance(attack, config.ReadNoise) and _silent(one):
        return "the noise is none at this strength, and read-latent reads the latent"
    if isinstance(attack, config.ReadLatent) and one.training.defence.decoder is not None and run.recipe.evaluation.released_loss == "client":
        return "it matches the front's gradient of the cross-entropy, and the decoder's term is in the released one"
    if isinstance(attack, config.READS) and one.training.defence.secure is not None and one.training.defence.own_terms:
        return "it reads the latents of a sum as those of one batch, and the defence's own terms are of each client's batch"
    if isinstance(attack, config.StatisticsMatching) and all(observe.statistics_known(run, one, snapshot, attack) == "none" for snapshot in one.snapshots.values()):
        return "it needs BatchNorm's statistics, of the batch or running ones, and nothing is known of any"
    if isinstance(attack, config.ReadLatent) and not _leaves_as_computed(one, attack):
        return "it reads the latent of an update that leaves as it was computed, but for its length, and a defence changes it or the images"
    if isinstance(attack, config.ReadNoise) and isinstance(one.training.defence.decoder, SeeingDecoder):
        return "it reads the latent off the gradient of the cross-entropy alone, and the decoder's term is in the predictor's"
    if isinstance(attack, config.ImprintServer) and run.recipe.evaluation.local_optimiser == "adam":
        return "it reads an image off the ratio of two changes, and steps of Adam are as long for both"
    return ""


def _silent(one: Trained) -> bool:
    """Whether the noise on the latent is multiplied by 0, its floor as well."""
    layer = one.training.defence.model.perturbation
    return getattr(layer, "strength", 1.0) == 0 and getattr(layer, "std_floor", 1.0) == 0


def _leaves_as_computed(one: Trained, attack: config.ReadLatent) -> bool:
    """Whether clients send their gradient of their own images, but for a length that the attack's distance does not see."""
    defence = one.training.defence
    shortened = all(isinstance(change, Clip) and not change.per_tensor for change in defence.transforms) and attack.distance == "cosine"
    return (not defence.transforms or shortened) and not defence.encoders and defence.budget is None


def beyond(run: Run, one: Trained, attack: Any) -> list[str]:
    """What an attack is handed that the run's adversary does not have, in words; an attack with any is a bound on attackers."""
    if isinstance(attack, config.PostHocDecoder):
        return ["is given the latent"]
    said, joint = [], observe.granted_as_joint(attack)
    if run.recipe.share_policy == "head" and (joint or getattr(attack, "front", "") == "known"):
        said.append("knows the private front")
    if joint and observe.keeps_decoder(run, one) and observe.decoder_of(attack) == "known":
        said.append("knows the private decoder")
    return said


def optimiser(name: str, momentum: float) -> str:
    """What takes local steps, in words."""
    return {"adam": "Adam", "sgd": "SGD"}[name] + (f" with momentum {momentum:g}" if momentum else "")


def _trained_otherwise(recipe: config.Recipe) -> str:
    """Where the clients of the recipe take other steps than those behind the released delta; "" where not, or where a gradient is released."""
    seen, clients = recipe.evaluation, recipe.clients
    if seen.release == "gradient":
        return ""
    ours = optimiser(seen.local_optimiser, seen.local_momentum)
    single = isinstance(clients, config.SingleGradient)
    theirs = "send single gradients" if single else f"train with {optimiser(clients.optimiser, clients.momentum)}"
    said = [] if theirs == f"train with {ours}" else [f"the recipe's clients {theirs}, and the delta that is attacked is of {ours}"]
    beside = {} if single else {"weight decay": clients.weight_decay, "a proximal term of weight": clients.proximal}
    beside["gradients clipped at norm"] = clients.grad_clip
    if named := [f"{what} {value:g}" for what, value in beside.items() if value]:
        said.append(f"the recipe's clients have {', '.join(named)}, and the delta that is attacked has no such thing")
    if clients.lr != seen.local_lr:
        said.append(f"the recipe's clients step at rate {clients.lr:g}, and the delta that is attacked is of rate {seen.local_lr:g}")
    return "; ".join(said)


def note_of(run: Run, one: Trained, attack: Any, *, progress: float = 1.0) -> str:
    """What sets an attack apart, above all what it is granted beyond the threat model. progress: share of the rounds that were over at the release."""
    said = []
    if isinstance(attack, config.JointMatching) and not observe.own(attack) and one.training.defence.noise_shape is None:
        said.append("no noise to search")
    if observe.granted_as_joint(attack):
        if run.recipe.share_policy == "head":
            said.append("private front known: a bound")
        if observe.keeps_decoder(run, one):
            words = {"known": "private decoder known: a bound", "surrogate": "decoder guessed from public data", "unused": "predictor only"}
            said.append(words[observe.decoder_of(attack)])
    if isinstance(one.training.defence.decoder, SeeingDecoder) and (isinstance(attack, config.LatentDecoding) or getattr(attack, "decoder", "") == "unused"):
        said.append("matches the gradient of cross-entropy alone, and the decoder's term is in the released one")
    vanish = isinstance(one.training.defence, BiDODefence) and run.recipe.evaluation.batch_size // run.recipe.evaluation.local_steps == 1
    if isinstance(attack, config.LatentDecoding) and one.training.defence.own_terms and run.recipe.evaluation.released_loss == "client" and not vanish:
        said.append("matches the gradient of cross-entropy alone, and the defence's own terms are in the released one")
    if vanish:
        what = "local steps" if run.recipe.evaluation.local_steps > 1 else "a batch"
        said.append(f"BiDO's terms vanish in {what} of one image: it is undefended")
    if one.training.defence.encoders:
        said.append("the client trains on encoded images; scored against the private ones")
    if one.training.defence.secure is not None and not isinstance(attack, config.PostHocDecoder):
        said.append(f"the sum of {observe.members(run, one)} clients; scored by what of it fits the victim best")
    if (otherwise := _trained_otherwise(run.recipe)) and not isinstance(attack, config.PostHocDecoder):
        said.append(otherwise)
    if run.recipe.evaluation.release == "delta" and run.recipe.evaluation.local_optimiser == "adam" and not isinstance(attack, config.PostHocDecoder):
        said.append("steps of Adam tell little more than signs; the slope that the attack follows is a surrogate")
    batches, clients = observe.dealt(run, one, attack, progress=progress)
    if over := " and ".join(["clients"] * (clients > 1) + ["local steps"] * (batches > 1)):
        count = getattr(attack, "restarts", 1)
        said.append(f"the order of the labels over the {over} was guessed ({count} assignment{'s' if count > 1 else ''} to begin with, exchanges tried on the way)")
    if any(observe.hidden_names(one, snapshot, attack) for snapshot in one.snapshots.values()):
        said.append("the layer whose columns Soteria prunes is not matched: which they are is not to be seen")
    if isinstance(attack, config.MultiRound):
        said.append(f"{attack.rounds} releases of the same images at one checkpoint's weights{_common(run, one, attack)}")
    if isinstance(attack, config.LatentDecoding) and run.recipe.share_policy == "head":
        said.append({"shadow": "front guessed on public images", "known": "private front known: a bound"}[attack.front])
    if isinstance(attack, config.ImprintServer):
        said.append(f"the server changes the model: {attack.bins} bins before its first layer")
        if one.training.defence.transforms or one.training.defence.budget is not None:
            said.append("what leaves is defended, bins and all, and the attack reads it as if it were not")
    if isinstance(attack, config.ZeroedLevel):
        floor = getattr(one.training.defence.model.perturbation, "std_floor", None)
        said.append("the server sends a noise level of nought; " + ("the client has no floor" if floor is None else "the client's floor holds"))
    return "; ".join(said)


def _common(run: Run, one: Trained, attack: config.MultiRound) -> str:
    """What the releases that A9 reads have in common, or are taken to have; "" where every draw is fresh, and searched by itself."""
    defence, said = one.training.defence, []
    if observe.keeps_noise(run, one):
        said.append("the same noise on the latent" if defence.random else "all the same, as the noise is drawn once for ever")
    if observe.taken_apart(one, attack) is not None:
        said.append("each of another mixture, which is searched by itself; of all of them the image, by the labels' shares and means of public images by class")
    elif any(isinstance(encoder, (Mix, Hide)) and encoder.random for encoder in defence.encoders):
        said.append("each of another encoding, for all of which one image is searched")
    if attack.rounds > 1 and observe.settles(run, one):
        said.append("read as one: exact where two agree bit for bit, averaged elsewhere")
    return "".join(f", {text}" for text in said)


def _same_work(run: Run, one: Trained, other: Cell, attack: Any) -> bool:
    """Whether an attack is, where there is no noise to search, the naive one of the same settings; or one that an ensemble has as well."""
    if other.control or other.twin is not None:
        return False
    if other.attack == attack:
        return True
    # under `head` the joint attack alone is given the private front
    defence = one.training.defence
    if defence.noise_shape is not None or defence.transforms or searched_of(defence.encoders, run.setting.dataset.image_shape, 1) or defence.budget is not None or (defence.own_terms and run.recipe.evaluation.released_loss == "client") or run.recipe.share_policy == "head":
        return False
    if type(attack) is not config.JointMatching or type(other.attack) is not config.NaiveMatching:
        return False
    shared = [spec.name for spec in dataclasses.fields(config.NaiveMatching) if spec.name != "tv"]
    smooth = [config.weight_of_variation(one, noise=False) for one in (other.attack, attack)]
    return smooth[0] == smooth[1] and all(getattr(other.attack, name) == getattr(attack, name) for name in shared)


def evaluated(run: Run) -> dict[str, Any]:
    """What results depend on of the evaluation, as JSON."""
    return {name: value for name, value in config.to_json(run.recipe.evaluation).items() if name != "control"}


def mark(run: Run, cell: Cell) -> str:
    """SHA-256 of everything that a cell's saved result depends on: recipe and data, attack, evaluation, defence, seed, checkpoint."""
    text = json.dumps([run.fingerprint, config.to_json(cell.attack), evaluated(run), cell.defence, cell.seed, cell.checkpoint, cell.control and BLIND], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def effort(attack: Any) -> str:
    """An attack's budget in words."""
    if isinstance(attack, config.Tuned):
        return f"{effort(attack.attack)}, the best of {len(attack.points())} settings on images kept for tuning"
    if isinstance(attack, config.Standard):
        return f"the {attack.version} ensemble"
    if hasattr(attack, "iterations"):
        rounds = f", {attack.rounds} rounds" if isinstance(attack, config.MultiRound) else ""
        return f"{attack.iterations} iterations, {attack.restarts} start{'s' if attack.restarts > 1 else ''}{rounds}"
    return f"{attack.steps} training steps" if hasattr(attack, "steps") else "closed form"
