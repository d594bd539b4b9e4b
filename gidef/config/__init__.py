"""Every knob of a recipe, as frozen dataclasses, on one page. Standard library only; `build` turns them into objects.

A choice is a union of dataclasses, so that a knob exists only where it means something. Every field can be overridden
on the command line under its dotted name with dashes, e.g. `--rounds.cohort-size 5`; which member of a union it is, e.g.
Dirichlet instead of Iid, is said in the recipe's file.
"""

import dataclasses
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gidef.config.attacks import (  # noqa: F401  (the page of attacks, under this page's name)
    ATTACKS,
    IDS,
    PRESETS,
    Analytic,
    DecoderAware,
    DeepLeakage,
    EotMatching,
    GenerativePrior,
    GradInversion,
    ImprintServer,
    InvertingGradients,
    JointMatching,
    LatentDecoding,
    LearnedInversion,
    ModernInvertingGradients,
    MultiRound,
    NaiveMatching,
    PostHocDecoder,
    SkipLayers,
    Standard,
    SurrogateModel,
    ZeroedLevel,
    standard,
)
from gidef.config.defences import (  # noqa: F401  (the page of defences)
    ATS,
    CVB,
    DCS,
    DEFENCES,
    DPSGD,
    BiDO,
    CapacityNoise,
    Censor,
    Clipping,
    GradDefense,
    GradientNoise,
    InstaHide,
    IsotropicNoise,
    LearnedPerturbation,
    Matched,
    MixUp,
    Precode,
    Pruning,
    Quantisation,
    Sign,
    Soteria,
    Undefended,
)

_config = dataclass(frozen=True, kw_only=True, slots=True)


# --- data and its partition into clients ---------------------------------------------------------------------------


@_config
class Iid:
    """Every client draws from the same distribution, equal sizes."""


@_config
class Dirichlet:
    """Class proportions over clients drawn from Dirichlet(alpha), per class."""

    alpha: float = 0.5
    """> 0; small is heterogeneous."""


@_config
class Shards:
    """Sorted by label, cut into shards, dealt out: the pathological split of McMahan et al. 2017."""

    per_client: int = 2
    """Shards that each client receives."""


@_config
class QuantitySkew:
    """Client sizes drawn from Dirichlet(alpha), classes alike."""

    alpha: float = 1.0
    """> 0; small is skewed."""


@_config
class Data:
    """Which images, and how they are spread over clients."""

    name: str = "bloodmnist"
    """A 2-D MedMNIST set, "cifar10", "synthetic", or "package.module:callable" that returns a gidef Dataset."""
    path: str | None = None
    """An .npz file in MedMNIST layout, a folder of images, or a WebDataset shard pattern. Missing or broken: an error."""
    size: int | None = None
    """Image side in pixels; None keeps the native size (28 for MedMNIST)."""
    download: bool = True
    """Fetch a MedMNIST set or CIFAR-10 that is not on this machine."""
    num_clients: int = 10
    partition: Iid | Dirichlet | Shards | QuantitySkew = Iid()
    min_examples: int = 1
    """Each client holds at least this many images."""
    split_seed: int = 0
    """Seeds the partition, the victims and a missing validation split; the same for all `seeds`."""


# --- model ---------------------------------------------------------------------------------------------------------


@_config
class Model:
    """The client's network and the place where it is cut into encoder and predictor."""

    name: str = "small"
    """"small", any timm model name, or "package.module:callable"."""
    cut: str | None = None
    """Named module whose output is the latent, e.g. "layer1" or "blocks.2"; None takes the model's default."""
    small_stem: bool = True
    """Stem for images of about 32 pixels (stride 1, no pooling; patch 4), where the model has one to change."""
    norm: Literal["group", "keep"] = "group"
    """"group" turns BatchNorm into GroupNorm."""
    activation: Literal["leaky_relu", "none"] = "leaky_relu"
    """Of the small net only."""
    neck: int | None = None
    """Of the small net only: a linear layer to so many features before its head; a late, small latent for cut="neck"."""
    normalise: Literal["half", "timm", "none"] = "half"
    """What the net makes of pixels in [0, 1] first: (x - 0.5) / 0.25, the mean and std of the timm model's own
    configuration (for pretrained weights), or nothing."""
    pretrained: str | None = None
    """A local .safetensors file with the backbone's weights."""


# --- what a client does in a round -----------------------------------------------------------------------------------


@_config
class LocalTraining:
    """Local epochs from the server's weights; the update is the difference (FedAvg)."""

    epochs: int = 1
    batch_size: int = 64
    optimiser: Literal["adam", "sgd"] = "adam"
    """Fresh in every round."""
    lr: float = 1e-3
    momentum: float = 0.0
    """Of sgd."""
    weight_decay: float = 0.0
    grad_clip: float = 5.0
    """Largest global gradient norm of a step; 0 switches clipping off."""
    accumulate: int = 1
    """Batches whose gradients are averaged before one step."""
    proximal: float = 0.0
    """FedProx's weight of (1/2)|w - w_server|^2."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward pass; parameters stay float32."""


@_config
class SingleGradient:
    """One gradient at one batch; the update is -lr times it (FedSGD)."""

    batch_size: int = 64
    lr: float = 0.1
    grad_clip: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"


# --- rounds and the server -------------------------------------------------------------------------------------------


@_config
class FedAvg:
    """w <- w + lr * (momentum-averaged) mean update; McMahan et al. 2017, with momentum Hsu et al. 2019."""

    lr: float = 1.0
    momentum: float = 0.0


@_config
class FedAdam:
    """Reddi et al. 2021."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


@_config
class FedYogi:
    """Reddi et al. 2021."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


@_config
class FedAdagrad:
    """Reddi et al. 2021."""

    lr: float = 1e-2
    beta1: float = 0.0
    tau: float = 1e-3


@_config
class Scaffold:
    """Control variates, Karimireddy et al. 2020, option II; needs clients that take plain sgd steps."""

    lr: float = 1.0


@_config
class Rounds:
    """How many rounds, over how many clients, and the server's step."""

    count: int | None = None
    """Rounds; None takes as many as `local_steps` allow, between 5 and 60."""
    local_steps: int = 2000
    """With count None: optimiser steps of all clients together."""
    cohort_size: int | None = None
    """Clients drawn per round without replacement; None takes all."""
    server: FedAvg | FedAdam | FedYogi | FedAdagrad | Scaffold = FedAvg()
    patience: int | None = 40
    """Stop after so many rounds without a better validation accuracy; None never stops early. The best round's model is kept."""


# --- evaluation, speed, the recipe -----------------------------------------------------------------------------------


@_config
class Evaluation:
    """Who is attacked, when, and by whom the reconstructions are judged."""

    num_victims: int = 16
    """Training images whose gradients are attacked; fixed, stratified over classes."""
    num_tuning: int = 16
    """Further images kept out of the judge's training, for tuning attacks."""
    batch_size: int = 1
    """Images in one observed batch."""
    checkpoints: tuple[Literal["untrained", "early", "final"], ...] = ("untrained",)
    release: Literal["gradient", "delta"] = "gradient"
    """What the server observes of the victim: one gradient (FedSGD), or the delta of local sgd steps (FedAvg). In a delta only
    the shared tensors move: a private front and the decoder stand still during the victim's steps."""
    local_steps: int = 1
    """Of a released delta: plain sgd steps on consecutive batches."""
    local_lr: float = 0.01
    released_loss: Literal["client", "utility"] = "client"
    """The client's whole loss, or its cross-entropy alone."""
    judge_epochs: int = 6


@_config
class Speed:
    """May change the seconds, not the science."""

    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:1"."""
    threads: int = 1
    """Threads inside one operator. One by default on every machine, because it changes the last bits; cores are used by `workers`."""
    workers: int = 0
    """Clients (or attack chunks) that a rank works on at the same time; 0 takes the rank's share of the cores, 1 on a GPU."""
    attacks_at_once: int = 0
    """K: attacks in one program; 0 finds it by a short calibration, whose table is shown and kept in the run's folder."""
    attack_mode: Literal["auto", "loop", "vmap", "traced", "compiled"] = "auto"
    """How a program runs, see gidef.attack.program; auto takes the fastest in the calibration."""
    compile: bool = False
    """Let the calibration try compiled programs: worth it for long attacks, as compiling takes up to minutes."""
    attack_precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the simulated client's pass, behind a parity gate on victims kept for tuning; the matching loss is float32 always. tf32 needs a GPU."""
    schedule: Literal["longest_first", "static", "dynamic"] = "longest_first"
    """How attacks are dealt out to ranks: by expected cost, in turn, or from a common queue as ranks become free."""
    deterministic: bool = False
    """Deterministic kernels on a GPU (slower)."""
    timeout_s: float = 3600.0
    """A collective that waits longer ends the run with an error. A rank that died is noticed at once; this bounds a silent cut, and
    must exceed the longest single attack chunk, for which idle ranks wait."""
    shard_size: int = 1
    """G ranks train one client together, its network in G slices, for networks larger than a GPU; the run's ranks must fill whole groups. Results
    agree over shard sizes but for rounding, and at equal shard size bit by bit for any number of ranks."""
    shard_backend: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """With shard_size above 1."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """Of deepspeed: what is cut: nothing, the optimiser's state, the gradients as well, the parameters as well."""
    offload: Literal["none", "cpu"] = "none"
    """Of deepspeed, stages 1 to 3: cpu keeps the optimiser's state in main memory and steps there."""


Partition = Iid | Dirichlet | Shards | QuantitySkew
Server = FedAvg | FedAdam | FedYogi | FedAdagrad | Scaffold
Clients = LocalTraining | SingleGradient


@_config
class Recipe:
    """One experiment: train each defence on the same data and seeds, attack it, report.

    `defences` maps a name to one of `gidef.config.defences`, to a dataclass of your own (see `gidef.defence`), or to a tuple
    of them: at most one that changes the training, and any that change the updates, in order. `attacks` maps a name to one of this page's attacks.
    """

    data: Data = Data()
    model: Model = Model()
    clients: LocalTraining | SingleGradient = LocalTraining()
    rounds: Rounds = Rounds()
    defences: dict[str, Any] = field(default_factory=lambda: {"undefended": Undefended()})
    share_policy: Literal["full", "head", "all"] = "full"
    """Which modules leave the client: all of the classifier, the predictor only, or the decoder as well."""
    attacks: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    speed: Speed = Speed()
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    """Train and attack only these of the recipe's defences."""
    out: str | None = None
    """The run's folder; runs/<recipe>/<time> by default."""
    resume: bool = False
    """Continue the run in `out`."""

    @property
    def chosen(self) -> dict[str, Any]:
        """The defences to run."""
        return {name: defence for name, defence in self.defences.items() if not self.only or name in self.only}


# --- checks ----------------------------------------------------------------------------------------------------------

_AT_LEAST = {  # field name -> smallest allowed value; applied to every dataclass of this page that has the field
    "num_clients": 1, "min_examples": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "count": 1, "cohort_size": 1, "patience": 1,
    "per_client": 1, "decoder_steps": 0, "decoder_steps_first": 0, "iterations": 1, "restarts": 1, "steps": 1, "num_victims": 1,
    "num_tuning": 0, "local_steps": 1, "judge_epochs": 1, "threads": 1, "workers": 0, "attacks_at_once": 0, "size": 8, "halving": 1, "warmup": 0,
    "history": 1, "pixel_norm": 0, "group": 0, "max_shift": 0, "closeness": 0, "code": 1, "fit_steps": 1, "code_share": 0, "rounds": 1,
    "shadow_steps": 1, "bits_weight": 0, "trials": 1, "points": 0, "neck": 1, "samples": 1, "gradients": 1, "sketch": 1, "bins": 2,
    "proximal": 0, "weight_decay": 0, "grad_clip": 0, "tv": 0, "strength": 0, "dependence_weight": 0, "std_floor": 0, "kl_weight": 0,
    "std": 0, "x_weight": 0, "y_weight": 0, "width": 1, "kernel": 1,
    "bits": 2, "draws": 1, "slices": 1, "noisy": 1,  # of defences that change updates
    "shard_size": 1, "noise_weight": 0, "tv_boost": 1, "split_seed": 0, "momentum": 0, "beta1": 0, "beta2": 0, "ramp": 0, "ssim_threshold": 0, "mse_cap": 0,
}  # fmt: skip
_MORE_THAN = dict.fromkeys(("lr", "alpha", "std_init", "decoder_lr", "decoder_width", "noise_lr", "local_lr", "timeout_s", "tau", "kink_width", "alpha_lr", "code_lr", "bound"), 0)
_LESS_THAN = dict.fromkeys(("momentum", "beta1", "beta2"), 1)
_AT_LEAST |= {"noise_multiplier": 0}
_MORE_THAN |= dict.fromkeys(("clip", "target_epsilon", "delta"), 0)
_LESS_THAN |= {"delta": 1}
_AT_LEAST |= {"mixing": 0, "mixed": 1, "concealed": 0, "z_weight": 0, "blend": 0, "apart": 0}  # of defences that change data


def problems(recipe: Recipe) -> list[str]:
    """Everything wrong with a recipe that can be known without its data: what was given, what was expected, what to change."""
    found: list[str] = []
    _check_fields(recipe, "", found)
    if found:  # what follows compares fields, and takes them for sound
        return found
    data, rounds = recipe.data, recipe.rounds
    if rounds.cohort_size is not None and rounds.cohort_size > data.num_clients:
        found.append(
            f"rounds.cohort_size={rounds.cohort_size} exceeds data.num_clients={data.num_clients}: a round draws clients without "
            "replacement. Lower one or raise the other."
        )
    if not recipe.seeds:
        found.append("seeds is empty: give at least one, e.g. --seeds 0.")
    if len(set(recipe.seeds)) != len(recipe.seeds):
        found.append(f"seeds={recipe.seeds} repeats a seed: each seed is one training. Remove the repetition.")
    if not recipe.defences:
        found.append('defences is empty: give at least one, e.g. {"undefended": Undefended()}.')
    unknown = [name for name in recipe.only if name not in recipe.defences]
    if unknown:
        found.append(f"only={unknown} names no defence of this recipe, which has {sorted(recipe.defences)}.")
    for name in [*recipe.defences, *recipe.attacks]:
        if not name or name == "type" or any(not (c.isalnum() or c in "-_+ .") for c in name) or name.strip(". ") != name:
            found.append(f"name {name!r} of a defence or attack becomes a folder: use letters, digits, spaces, '-', '_', '+', '.'.")
    if recipe.model.neck is not None and recipe.model.name != "small":
        found.append(f"model.neck={recipe.model.neck} is the small net's, not {recipe.model.name}'s: leave it out, or set model.name=small.")
    if isinstance(rounds.server, Scaffold):
        plain = isinstance(recipe.clients, SingleGradient) or (recipe.clients.optimiser == "sgd" and recipe.clients.momentum == 0)
        if not plain:
            found.append("rounds.server=Scaffold corrects plain sgd steps: set clients.optimiser=sgd and clients.momentum=0, or take another server.")
    found.extend(_shard_problems(recipe))
    if isinstance(recipe.clients, LocalTraining) and recipe.clients.optimiser == "adam" and recipe.clients.momentum:
        found.append(f"clients.momentum={recipe.clients.momentum} is sgd's: set clients.optimiser=sgd, or momentum to 0 for adam.")
    for name, defence in recipe.defences.items():
        if isinstance(defence, Matched):
            wrong = defence.problems()
            found += [f"defences.{name}: {text}" for text in wrong]
            if wrong:
                continue
            if defence.accuracy is None and not any(isinstance(one, Undefended) for one in recipe.chosen.values()):
                found.append(f"defences.{name}: points={defence.points} are below the undefended net, which is not trained: add Undefended(), or give accuracy.")
            defence = defence.defence
        parts = defence if isinstance(defence, tuple) else (defence,)
        if not parts:
            found.append(f"defences.{name} is an empty tuple: give the defences that it combines.")
        found.extend(_privacy_problems(f"defences.{name}", parts, recipe))
        found += [f"defences.{name}: {text}" for text in _data_problems(parts)]
        if sum(not getattr(part, "changes_update", False) and not getattr(part, "changes_data", False) for part in parts) > 1 and not _coupled(parts):
            found.append(f"defences.{name} combines {', '.join(type(part).__name__ for part in parts)}: at most one may change the training, the others change updates or data. Keep one of them.")
        for part in parts:
            if isinstance(part, CapacityNoise):
                if part.front == "frozen" and getattr(recipe.clients, "weight_decay", 0):
                    found.append(f"defences.{name}: front=frozen, but clients.weight_decay={recipe.clients.weight_decay} moves it: set weight_decay=0.")
                if not part.std_floor:
                    found.append(f"defences.{name}: std_floor=0 lets the capacity grow without bound: set it above 0.")
            if isinstance(part, CVB) and part.kernel % 2 == 0:
                found.append(f"defences.{name}.kernel={part.kernel} is even: give an odd number, so that maps keep their size.")
            if isinstance(part, LearnedPerturbation):
                if part.law == "laplace" and part.kl_weight:
                    found.append(f"defences.{name}: kl_weight={part.kl_weight} needs law=gaussian; the KL term has no Laplace form here.")
                if part.kl_weight and not part.strength and not part.std_floor:
                    found.append(f"defences.{name}: the KL term (kl_weight={part.kl_weight}) is infinite at strength=0 and std_floor=0: raise one.")
                if part.dependence == "cka" and part.dependence_weight and recipe.clients.batch_size < 4:
                    found.append(f"defences.{name}: dependence=cka needs 4 images or more, not clients.batch_size={recipe.clients.batch_size}.")
    for name, attack in recipe.attacks.items():
        if not isinstance(attack, ATTACKS):
            if not callable(getattr(attack, "plan", None)):
                found.append(f"attacks.{name}={attack!r} is no attack: use one of gidef.config.attacks, or a dataclass with a method plan(case).")
            continue
        if isinstance(attack, SurrogateModel) and recipe.evaluation.release != "delta":
            found.append(f"attacks.{name}: a surrogate model stands in for local training, and evaluation.release={recipe.evaluation.release}: set it to delta.")
        if isinstance(attack, DeepLeakage) and attack.labels == "counts":
            found.append(f"attacks.{name}.labels=counts: L-BFGS attacks take known, recovered or searched labels.")
        if isinstance(attack, GradInversion) and attack.restarts < 2 and attack.group:
            found.append(f"attacks.{name}: the consistency of restarts needs two or more, not restarts={attack.restarts}: raise it, or set group=0.")
        if isinstance(attack, (MultiRound, ImprintServer)) and recipe.evaluation.release != "gradient":
            found.append(f"attacks.{name} ({type(attack).__name__}) reads single gradients: set evaluation.release=gradient, or leave it out.")
    if recipe.evaluation.release == "gradient" and recipe.evaluation.local_steps != 1:
        found.append("evaluation.local_steps counts the steps of a released delta: set evaluation.release=delta, or local_steps to 1.")
    if recipe.evaluation.num_victims % recipe.evaluation.batch_size:
        found.append(
            f"evaluation.num_victims={recipe.evaluation.num_victims} is no multiple of evaluation.batch_size={recipe.evaluation.batch_size}: "
            "victims are observed in full batches. Change one of them."
        )
    if recipe.evaluation.release == "delta" and recipe.evaluation.batch_size % recipe.evaluation.local_steps:
        found.append(
            f"evaluation.batch_size={recipe.evaluation.batch_size} is no multiple of evaluation.local_steps={recipe.evaluation.local_steps}: "
            "each local step takes an equal slice of the batch. Change one of them."
        )
    if len(set(recipe.evaluation.checkpoints)) != len(recipe.evaluation.checkpoints):
        found.append(f"evaluation.checkpoints={recipe.evaluation.checkpoints} repeats one. Remove the repetition.")
    if not recipe.evaluation.checkpoints:
        found.append('evaluation.checkpoints is empty: give some of "untrained", "early", "final".')
    return found


def _coupled(parts: tuple[Any, ...]) -> list[str]:
    """Defences beside a DPSGD of images whose loss is no mean over images: no image has a gradient of its own that could be clipped."""
    if not any(isinstance(part, DPSGD) and part.level == "sample" for part in parts):
        return []
    coupled = [part for part in parts if getattr(part, "couples_batch", False) or getattr(part, "dependence", "") in ("dcor", "cka")]
    return [type(part).__name__ for part in coupled]


def _shard_problems(recipe: Recipe) -> list[str]:
    """What a client in shards cannot do."""
    speed, clients, found = recipe.speed, recipe.clients, []
    if speed.offload != "none" and (speed.shard_backend != "deepspeed" or speed.zero_stage == 0):
        found.append(f"speed.offload={speed.offload} needs speed.shard_backend=deepspeed and a speed.zero_stage above 0.")
    if speed.shard_backend == "deepspeed" and speed.shard_size == 1:
        found.append("speed.shard_backend=deepspeed shards one client over ranks: set speed.shard_size above 1, or shard_backend=fsdp2.")
    if speed.shard_size == 1:
        return found
    if speed.workers > 1:
        found.append(f"speed.workers={speed.workers}: a rank of a group works on one client at a time: set it to 0 or 1.")
    if speed.shard_backend == "deepspeed":
        unlike = [name for name in ("accumulate", "proximal") if getattr(clients, name, 0) > (name == "accumulate")]
        unlike = [f"clients.{name}={getattr(clients, name)}" for name in unlike]
        unlike += ["clients.precision=bfloat16"] * (clients.precision == "bfloat16") + ["rounds.server=Scaffold"] * isinstance(recipe.rounds.server, Scaffold)
        if unlike:
            found.append(f"{', '.join(unlike)}: the step of speed.shard_backend=deepspeed knows none of it. Set shard_backend=fsdp2.")
    for name, defence in recipe.chosen.items():
        parts = defence if isinstance(defence, tuple) else (getattr(defence, "defence", defence),)
        for part in parts:
            if isinstance(part, DPSGD) and part.level == "sample" or isinstance(part, (Soteria, Censor, GradDefense, DCS)):
                found.append(f"defences.{name}: {type(part).__name__} looks into a client's network as a whole: set speed.shard_size=1.")
    return found


def _data_problems(parts: tuple[Any, ...]) -> list[str]:
    """What is wrong with the defences of data among a combination, without its name."""
    found, data = [], [part for part in parts if getattr(part, "changes_data", False)]
    for part in data:
        if isinstance(part, InstaHide) and part.mixed > 1 and part.largest * part.mixed < 1.25:
            found.append(f"largest={part.largest} leaves next to no coefficients of {part.mixed} images: give at least {1.25 / part.mixed:.3g}.")
        if isinstance(part, ATS):
            try:
                part.parsed()
            except ValueError as error:
                found.append(str(error))
        if isinstance(part, DCS) and part.blend > 1:
            found.append(f"blend={part.blend}: expected a share in [0, 1].")
    if data and any(isinstance(part, DPSGD) and part.level == "sample" for part in parts):
        found.append(f"{type(data[0]).__name__} changes the images of a batch that DPSGD counts one by one: take level=client, or leave one out.")
    apart = [part for part in parts if not getattr(part, "changes_update", False) and part not in data and not isinstance(part, Undefended)]
    if any(isinstance(part, DCS) for part in data) and apart:
        found.append(f"DCS adds images to a batch, whose noise and terms {type(apart[0]).__name__} counts by the private ones: leave one out.")
    return found


def _privacy_problems(name: str, parts: tuple[Any, ...], recipe: Recipe) -> list[str]:
    """What stands in the way of a defence's DPSGD, alone or combined with others."""
    private, clients, found = [part for part in parts if isinstance(part, DPSGD)], recipe.clients, []
    if not private:
        return []
    if len(private) > 1:
        return [f"{name} holds {len(private)} DPSGD, whose epsilons are not added up here: keep one."]
    noise, target = private[0].noise_multiplier, private[0].target_epsilon
    if (noise is None) == (target is None):
        found.append(f"{name}: noise_multiplier={noise} and target_epsilon={target}: one follows from the other. Set exactly one to None.")
    if isinstance(recipe.rounds.server, Scaffold):
        found.append(f"{name}: rounds.server=Scaffold would carry the noise of a round, in control variates, into all later steps: take another server.")
    if private[0].level == "client":
        return found
    if getattr(clients, "accumulate", 1) > 1:
        found.append(f"{name}: clients.accumulate={clients.accumulate}: a step is one Poisson sample, as epsilon counts them. Set it to 1, and raise batch_size.")
    if clients.precision == "bfloat16":
        found.append(f"{name}: clients.precision=bfloat16 rounds the norms that bound each image's part by up to 0.4 %: set it to float32.")
    found += [f"{name}: the loss of {kind} couples the images of a batch, so that none has a gradient of its own to clip. Leave one out." for kind in _coupled(parts)]
    return found


def _check_fields(config: Any, prefix: str, found: list[str]) -> None:
    """Type and range of every field, wherever it stands; dataclasses of your own check themselves."""
    hints = typing.get_type_hints(type(config))
    for spec in dataclasses.fields(config):
        value, name, hint = getattr(config, spec.name), f"{prefix}{spec.name}", hints[spec.name]
        if not _fits(value, hint):
            found.append(f"{name}={value!r} is not {_words(hint)}: give one.")
            continue
        items = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        for place, item in items.items():
            for part in item if isinstance(item, (tuple, list)) else (item,):
                if dataclasses.is_dataclass(part):
                    if _ours(type(part)):
                        _check_fields(part, place + ".", found)
                elif isinstance(part, (int, float)):
                    found.extend(_range_problem(place, spec.name, part))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. A whole number is a number, a bool is not; a list serves as a tuple."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in choices
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is tuple:
        members = choices[:1] * len(value) if isinstance(value, (tuple, list)) and choices[-1] is Ellipsis else choices
        return isinstance(value, (tuple, list)) and len(value) == len(members) and all(map(_fits, value, members))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def fits(value: Any, cls: type, name: str) -> bool:
    """Whether a value is of the type of a dataclass's field."""
    return _fits(value, typing.get_type_hints(cls)[name])


def _words(hint: Any) -> str:
    """A field's type for people."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, choices))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, choices))
    if origin is tuple:
        return f"a tuple{'' if choices[-1] is Ellipsis else f' of {len(choices)}'}, each of it {_words(choices[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None", dict: "a dict"}
    return names.get(origin or hint) or hint.__name__


def _range_problem(name: str, key: str, value: float) -> list[str]:
    if not math.isfinite(value) and not (key == "alpha" and value > 0):  # Dirichlet(inf) is even
        return [f"{name}={value} is not finite: give a number."]
    if key in _AT_LEAST and value < _AT_LEAST[key]:
        return [f"{name}={value} is too small: give at least {_AT_LEAST[key]}."]
    if key in _MORE_THAN and value <= _MORE_THAN[key]:
        return [f"{name}={value} is not above {_MORE_THAN[key]}: give a larger value."]
    if key in _LESS_THAN and value >= _LESS_THAN[key]:
        return [f"{name}={value} is not below {_LESS_THAN[key]}: give a smaller value."]
    return []


# --- to JSON and back ------------------------------------------------------------------------------------------------


def to_json(config: Any) -> Any:
    """A recipe or part of it as plain JSON values; each dataclass says its "type"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        name = type(config).__name__ if _ours(type(config)) else _place(type(config))
        return {"type": name, **{spec.name: to_json(getattr(config, spec.name)) for spec in dataclasses.fields(config)}}
    if isinstance(config, dict):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"a recipe holds plain values and dataclasses; found {config!r}")


def _ours(cls: type) -> bool:
    """Whether a dataclass is one of these pages'."""
    return cls.__module__ in (__name__, NaiveMatching.__module__, Undefended.__module__)


def _place(cls: type) -> str:
    """Where a class of your own can be imported from: `package.module:Name`, or `/folder/recipe.py:Name` for the script that runs."""
    module = sys.modules[cls.__module__]
    script = cls.__module__ == "__main__" and getattr(module, "__file__", None)
    return f"{os.path.abspath(script) if script else cls.__module__}:{cls.__qualname__}"


def code_in(value: Any) -> list[str]:
    """Names of code of your own in a recipe's JSON: types, data sets and models written as `place:name`."""
    if isinstance(value, dict):
        named = [value.get("type")] + ([value.get("name")] if value.get("type") in ("Data", "Model") else [])
        return [name for name in named if isinstance(name, str) and ":" in name] + [name for item in value.values() for name in code_in(item)]
    return [name for item in value for name in code_in(item)] if isinstance(value, list) else []


def from_json(value: Any, *, load: Callable[[str], Any] | None = None) -> Any:
    """The inverse of `to_json`.

    Args:    load: imports code of your own by name (`gidef.importing.load`), which runs it; None refuses recipes that name any.
    Raises:  ValueError for such a recipe, and for types and fields that this version does not know.
    """
    foreign = code_in(value)
    if foreign and load is None:
        raise ValueError(f"the recipe names code of its own, {', '.join(foreign)}: pass --allow-code if you trust where it comes from.")
    return _from_json(value, load)


def _from_json(value: Any, load: Callable[[str], Any] | None) -> Any:
    if isinstance(value, dict) and "type" in value:
        kind = value["type"]
        cls = load(kind) if ":" in kind else globals().get(kind)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ValueError(f"the recipe names an unknown type {kind!r}: it was written by another version of gidef.")
        extra = set(value) - {spec.name for spec in dataclasses.fields(cls)} - {"type"}
        if extra:
            raise ValueError(f"the recipe's {kind} has unknown fields {sorted(extra)}: it was written by another version of gidef.")
        return cls(**{key: _from_json(item, load) for key, item in value.items() if key != "type"})
    if isinstance(value, dict):
        return {key: _from_json(item, load) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_from_json(item, load) for item in value)
    return value


NOT_SCIENCE = ("speed", "out", "resume")
"""Fields of a recipe that may differ between a run and its resumption."""


def science(recipe: Recipe | dict[str, Any]) -> str:
    """The scientific fields of a recipe, or of one as JSON, as canonical text: two recipes with equal text give the same results."""
    values = recipe if isinstance(recipe, dict) else to_json(recipe)
    return json.dumps({key: value for key, value in values.items() if key not in NOT_SCIENCE}, sort_keys=True)
