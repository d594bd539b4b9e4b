"""Every knob of a recipe, as frozen dataclasses, on one page. Standard library only; `build` turns them into objects.

A choice is a union of dataclasses, so that a knob exists only where it means something. Every field can be overridden
on the command line under its dotted name with dashes, e.g. `--rounds.cohort-size 5`; which member of a union it is, e.g.
Dirichlet instead of Iid, is said in the recipe's file.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gidef.config.attacks import (  # noqa: F401  (the page of attacks, under this page's name)
    ATTACKS,
    IDS,
    PRESETS,
    READS,
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
    ReadLatent,
    ReadNoise,
    SkipLayers,
    Standard,
    StatisticsMatching,
    SurrogateModel,
    Tuned,
    ZeroedLevel,
    controlled,
    standard,
    weight_of_variation,
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
    SecureAggregation,
    Sign,
    Soteria,
    Undefended,
    trains,
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
    stream: bool = False
    """Clients read their images from WebDataset shards of their own while they train: `path` with a {client} in it, such as
    "shards/client-{client:05d}-*.tar", a folder that `gidef data convert --clients` filled, or `client_shards`. `partition` has no say."""
    client_shards: tuple[str, ...] = ()
    """One shard pattern per client, in the place of `path`."""
    stream_sample: int = 4000
    """Of streams: images that stay in memory, of all clients, for victims, tuning, judge and, without shards of their own, validation and test."""
    stream_buffer: int = 1024
    """Of streams: examples that are shuffled among one another; a client with no more trains in the order, and to the bits, of images in memory."""


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
    norm: Literal["group", "keep", "frozen"] = "group"
    """"group" turns BatchNorm into GroupNorm. "frozen" leaves it, as a fixed affine map by its running statistics, those of the `pretrained` file or
    the initial 0 and 1, in training too; weight and bias are trained. "keep" trains by each batch's statistics and predicts by running ones: these are
    sent with the update and averaged by examples where the layer is shared, and stay with the client where it is private (as FedBN's, Li et al. 2021)."""
    activation: Literal["leaky_relu", "none"] = "leaky_relu"
    """Of the small net only."""
    neck: int | None = None
    """Of the small net only: a linear layer to so many features before its head; a late, small latent for cut="neck"."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keyword arguments of the model's constructor, e.g. {"depth": 6}, or of your own callable; not its dropout, which is off. timm's ResNets start each residual
    branch at nought, so that of an untrained one hardly a gradient depends on the image: {"zero_init_last": False} starts them as torchvision does."""
    normalise: Literal["half", "timm", "none"] = "half"
    """What the net makes of pixels in [0, 1] first: (x - 0.5) / 0.25, the mean and std of the timm model's own
    configuration (for pretrained weights), or nothing."""
    pretrained: str | None = None
    """A local .safetensors file with the backbone's weights."""
    noisy_prediction: bool = True
    """Validation and test predict with the noise that a client trains with. False: from the latent without it, as whoever predicts for himself
    does, since nothing leaves him then; what is released in training, and attacked, has its noise either way."""


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
    """Largest global gradient norm of a step, over private layers as well as shared ones; 0 switches clipping off, which noise with a certificate asks for
    while private layers train."""
    accumulate: int = 1
    """Batches whose gradients are averaged before one step."""
    proximal: float = 0.0
    """FedProx's weight of (1/2)|w - w_server|^2."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """tf32: on a GPU, products with factors rounded to 10 bits of mantissa. bfloat16: autocast of the forward pass; parameters stay float32."""


@_config
class SingleGradient:
    """One gradient at one batch; the update is -lr times it (FedSGD)."""

    batch_size: int = 64
    lr: float = 0.1
    grad_clip: float = 0.0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"


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
class Mean:
    """Weighted by examples, summed exactly."""


@_config
class Median:
    """Of every coordinate over the clients; Yin et al. 2018. Holds while fewer than half of them lie."""


@_config
class TrimmedMean:
    """Of every coordinate, without the smallest and the largest values; Yin et al. 2018."""

    share: float = 0.1
    """Of the cohort, left out at each end, in [0, 1/2), rounded up to clients."""


@_config
class Krum:
    """The update nearest to its neighbours, or the mean of several; Blanchard et al. 2017."""

    byzantine: int = 1
    """Clients f that may lie; the cohort has at least 2 f + 3."""
    chosen: int = 1
    """Updates that are averaged; more than 1 is Multi-Krum."""


@_config
class Rounds:
    """How many rounds, over how many clients, and the server's step."""

    count: int | None = None
    """Rounds; None takes as many as `local_steps` allow, between 5 and 60."""
    local_steps: int = 2000
    """With count None: optimiser steps of all clients together."""
    cohort_size: int | None = None
    """Clients drawn per round without replacement; None takes all."""
    cohort_share: float | None = None
    """The same as a share of all clients, in (0, 1], rounded, one at least; where cohort_size is None."""
    server: FedAvg | FedAdam | FedYogi | FedAdagrad | Scaffold = FedAvg()
    aggregate: Mean | Median | TrimmedMean | Krum = Mean()
    """What becomes of the cohort's updates; all but the mean need every client's own, and count no examples."""
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
    """Images in one observed batch; intervals and the verdict count batches."""
    checkpoints: tuple[Literal["untrained", "early", "final"], ...] = ("untrained",)
    strengths: tuple[float, ...] = (1.0,)
    """kappa of the evaluation: times the level of the noise on the latent that a defence was trained with, its floor included, in what the victims
    release and in the accuracy of the row; 0 is no noise. Attackers know it. Defences without such noise are evaluated once."""
    release: Literal["gradient", "delta"] = "gradient"
    """What the server observes of the victim: one gradient (FedSGD), or the delta of local training (FedAvg), in whose steps a private front moves
    too, by the same optimiser, and a private decoder stands still."""
    local_steps: int = 1
    """Of a released delta: steps of one epoch, on consecutive batches."""
    local_epochs: int = 1
    """Of a released delta: passes over these batches, in the same order; noise is drawn afresh in each, unless the defence freezes it, and images
    that are encoded are so once."""
    local_lr: float = 0.01
    local_optimiser: Literal["sgd", "adam"] = "sgd"
    """Of a released delta, begun afresh; the clients' own training takes `clients.optimiser`, and a row says where that is another, or has another rate,
    weight decay, a proximal term or clipped gradients, which the delta has not."""
    local_momentum: float = 0.0
    """Of sgd."""
    released_loss: Literal["client", "utility"] = "client"
    """The client's whole loss, or its cross-entropy alone."""
    control: bool = False
    """Beside the attacks, one of them (the first naive one, else the first that matches gradients) on a shuffled gradient of public images of the
    victims' labels, per defence and checkpoint: what its priors draw by themselves is a bound, and whoever gets no more is warned of. An ensemble has its own."""
    judge_epochs: int = 6
    judges: tuple[str, ...] = ()
    """Further judges, each with a column of its own: "judge" (the evaluator's own net), "small", any timm model or "package.module:callable", as
    NAME or NAME@EPOCHS, e.g. ("judge@2", "resnet18@4"); without epochs those of `judge_epochs`."""

    def named(self, defence: str, strength: float) -> str:
        """Of a defence at one of `strengths`."""
        return defence if strength == 1 else f"{defence} at strength {strength:g}"

    def judge_named(self, text: str) -> tuple[str, int]:
        """(network, epochs) of one of `judges`.  Raises: ValueError for epochs that are no positive whole number."""
        name, at, epochs = text.partition("@")
        if not name or (at and not (epochs.isdecimal() and int(epochs) > 0)):
            raise ValueError(f"evaluation.judges holds {text!r}: expected NAME or NAME@EPOCHS, e.g. resnet18@4.")
        return name, int(epochs) if at else self.judge_epochs


@_config
class Choose:
    """Which defence of a recipe's grid to take: of those within `points` of the undefended net the one whose strongest attack gets least.

    Validation accuracy is looked at, and attacks on the images kept for tuning (`evaluation.num_tuning`): they stand in the victims' place, which
    are left alone for the comparison to come, as long as that has no more victims.
    """

    points: float = 2.0
    """Of validation accuracy, in hundredths."""


@_config
class Speed:
    """May change the seconds, not the science."""

    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:1"."""
    threads: int = 1
    """Threads inside one operator. One by default on every machine, because it changes the last bits; cores are used by `workers`."""
    workers: int = 0
    """Clients (or attack chunks) that a rank works on at the same time; 0 takes the rank's share of the cores, 1 on a GPU."""
    clients_at_once: int = 1
    """K: clients that a worker trains as one program, to rounding what 1, a loop, gives. 0 finds it by a short calibration on the first cohort,
    kept in the run's folder; it pays for small nets and batches. Clients that cannot be vectorised take the loop, and the run says so."""
    attacks_at_once: int = 0
    """K: attacks in one program; 0 finds it by a short calibration, whose table is shown and kept in the run's folder."""
    attack_mode: Literal["auto", "loop", "vmap", "traced", "compiled"] = "auto"
    """How a program runs, see gidef.attack.program; auto takes the fastest in the calibration."""
    compile: bool = False
    """Let the calibration try compiled programs: worth it for long attacks, as compiling takes up to minutes."""
    decoders: int = 2
    """Threads that read and decode images for each client that streams them."""
    attack_precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the simulated client's pass, behind a parity gate on victims kept for tuning; the matching loss is float32 always. tf32 needs a GPU."""
    schedule: Literal["longest_first", "static", "dynamic"] = "longest_first"
    """How attacks are dealt out to ranks: by expected cost, in turn, or from a common queue as ranks become free."""
    clients_schedule: Literal["longest_first", "static", "dynamic"] = "longest_first"
    """How clients are dealt out to ranks for training: by the seconds that they took in earlier rounds (at first, by their examples), in turn,
    or from a common queue as ranks become free. The model's bits are the same."""
    fused_optimisers: bool = False
    """Clients' optimisers as one kernel each, a decoder's too (with schedule="simultaneous" it always is one); other last bits than the default's."""
    channels_last: bool = False
    """Images and convolutions with the channels last in memory; other last bits."""
    small_maps: bool = True
    """On a CPU, products for the weights' gradients of large convolutions over maps of at most 2×2, as backbones made for 224 pixels end with at
    28 or 32: a step of ResNet-18 with ImageNet's stem takes three quarters of the time; other last bits. Not in shards, compiled programs or DP-SGD, nor with several clients at once."""
    compile_training: bool = False
    """Clients' steps as compiled programs, on a GPU as CUDA graphs: for long trainings, as compiling takes up to minutes; other last bits. Defences
    that no program serves run as they are and say so."""
    reduction: Literal["fixed_point", "float32"] = "fixed_point"
    """How updates are added up: exactly, in eight bytes per parameter, so that the model's bits do not depend on ranks; or in four, so that they do."""
    sharded_server: bool = False
    """Each rank keeps and steps a slice of the server's optimiser: for very large models. The bits are the same."""
    overlap_evaluation: bool = True
    """Evaluate a round while the next one is computed, on a GPU and on a CPU with a core that no worker uses, to the same bits; takes one further
    copy of the model, and a chunk's activations beside a client's, and a kill costs one round more. Evaluated in line all the same: clients on several
    ranks (shard_size), whose network is one and whose passes are collectives; compile_training; TF32 on a GPU, whose switch is the process'; rounds
    after which patience may end the training."""
    checkpoints_kept: int = 2
    """Newest checkpoints of a training that stay on disk, at least 1, with the clients' states that they refer to: one is written after every round, and
    a resumed run takes the newest that is not damaged. Another number may be given when a run is resumed."""
    deterministic: bool = False
    """No kernel on a GPU but deterministic ones, and an error where there is none; convolutions have no others in any case."""
    timeout_s: float = 180.0
    """A rank that gives no sign of life for so long (stopped, cut off) ends the run, with its name; one that was killed is noticed at once."""
    stall_s: float = 3600.0
    """Longest wait for a rank that is alive but does not come: above the longest attack chunk, and the longest training of one client."""
    shard_size: int = 1
    """G ranks train one client together, its network in G slices, for networks larger than a GPU; the run's ranks must fill whole groups. Results
    agree over shard sizes but for rounding, and at equal shard size bit by bit for any number of ranks. Attacks that can run on the network itself (A0 by
    descent, A3 where cross-entropy alone is matched, of single gradients) have it in slices, too; the others need it whole on every rank."""
    shard_backend: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """With shard_size above 1."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """Of deepspeed: what is cut: nothing, the optimiser's state, the gradients as well, the parameters as well."""
    offload: Literal["none", "cpu"] = "none"
    """Of deepspeed, stages 1 to 3: cpu keeps the optimiser's state in main memory and steps there."""


Partition = Iid | Dirichlet | Shards | QuantitySkew
Server = FedAvg | FedAdam | FedYogi | FedAdagrad | Scaffold
Aggregate = Mean | Median | TrimmedMean | Krum
Clients = LocalTraining | SingleGradient


@_config
class Recipe:
    """One experiment: train each defence on the same data and seeds, attack it, report.

    `defences` maps a name to one of `gidef.config.defences`, to a dataclass of your own (see `gidef.defence`), or to a tuple
    of them: at most one that changes the training (beside a DPSGD of images: and noise on the latent), and any that change the updates, in order. `attacks` maps a name to one of this page's attacks.
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
    choose: Choose | None = None
    """Attack the images kept for tuning instead of the victims, and say which defence to take."""
    speed: Speed = Speed()
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    """Train and attack only these of the recipe's defences."""
    out: str | None = None
    """The run's folder; runs/<recipe>/<time> by default."""
    resume: bool = False
    """Continue the run in `out`."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """What follows the record beside the tables: event files for TensorBoard, an offline run of Weights & Biases (extras of these names)."""

    @property
    def cohort(self) -> int:
        """Clients drawn per round."""
        size, share = self.rounds.cohort_size, self.rounds.cohort_share
        return size or (max(1, round(share * self.data.num_clients)) if share else self.data.num_clients)

    @property
    def chosen(self) -> dict[str, Any]:
        """The defences to run."""
        return {name: defence for name, defence in self.defences.items() if not self.only or name in self.only}


# --- to JSON and back ------------------------------------------------------------------------------------------------


def to_json(config: Any) -> Any:
    """A recipe or part of it as plain JSON values; each dataclass says its "type"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        name = type(config).__name__ if ours(type(config)) else _place(type(config))
        return {"type": name, **{spec.name: to_json(getattr(config, spec.name)) for spec in dataclasses.fields(config)}}
    if isinstance(config, dict):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"a recipe holds plain values and dataclasses; found {config!r}")


def ours(cls: type) -> bool:
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


LAST_BITS = ("threads", "clients_at_once", "fused_optimisers", "channels_last", "small_maps", "compile_training", "reduction", "deterministic")
"""Fields of `speed` that a resumed run takes over, as they decide the last bits."""
NOT_SCIENCE = ("speed", "out", "resume", "log")
"""Fields of a recipe that may differ between a run and its resumption."""


def science(recipe: Recipe | dict[str, Any]) -> str:
    """The scientific fields of a recipe, or of one as JSON, as canonical text: two recipes with equal text give the same results."""
    values = recipe if isinstance(recipe, dict) else to_json(recipe)
    return json.dumps({key: value for key, value in values.items() if key not in NOT_SCIENCE}, sort_keys=True)


from gidef.config.checks import fits, is_more_than_a_step, problems  # noqa: E402, F401  (they read all of the above)
