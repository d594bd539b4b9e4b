"""The only place where a recipe becomes objects."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gidef import config
from gidef.checkpoint import load_export
from gidef.clients.cohort import draw_cohort
from gidef.clients.local import LocalSettings, load_parameters
from gidef.clients.participate import Participation, shared_names
from gidef.clients.sharded import Engine, Fsdp, PartPlayer, SlicedStore, train_sharded
from gidef.clients.store import ClientStore
from gidef.clients.zero import Zero
from gidef.data import Dataset, Roles, class_counts, load_dataset, partition, places_of_clients, split_roles
from gidef.defence import ClipAndNoise, Defence, LearnedDefence, PrivateDefence, PrivateNoise
from gidef.defence.accounting import Budget, Schedule, budget, needs_opacus
from gidef.defence.bido import BiDODefence, BiDOSettings
from gidef.defence.bottleneck import variational_bottleneck
from gidef.defence.censor import Orthogonal
from gidef.defence.clipping import Clip
from gidef.defence.concealing import Conceal
from gidef.defence.encode import EncodedPlayer, Encoder
from gidef.defence.instahide import Hide
from gidef.defence.isotropic import isotropic_noise
from gidef.defence.mixup import Mix
from gidef.defence.noise import AddNoise
from gidef.defence.perturbation import MinimaxSettings
from gidef.defence.pruning import Prune
from gidef.defence.quantisation import Quantise
from gidef.defence.secure_sum import SecureCohorts
from gidef.defence.seeing import SeeingDecoder
from gidef.defence.share import Transform
from gidef.defence.sign import SignOnly
from gidef.defence.slices import NoisySlices
from gidef.defence.soteria import PruneFeatures
from gidef.defence.transformations import Transformed
from gidef.errors import InputError
from gidef.models import (
    ConvBottleneck,
    LinearBottleneck,
    SplitModel,
    decoder_for,
    freeze_batch_norm,
    frozen_statistics,
    has_batch_statistics,
    make_backbone,
    move_batch_norm,
    moving_statistics,
    multiply_over_small_maps,
    running_statistics,
)
from gidef.parallel import Costs, Layout, World, mean_over_mesh, mean_over_world, robust_over_world
from gidef.parallel.plan import longest_first
from gidef.parallel.seats import allowed_cores
from gidef.parallel.sharded_server import Slices, own, sharded_step, whole
from gidef.parallel.traffic import Traffic
from gidef.rng import stream_seed
from gidef.rounds import robust
from gidef.rounds import server as servers
from gidef.rounds.algorithm import run_round
from gidef.spans import span
from gidef.streams import load_streamed
from gidef.types import Client, ServerState, Tensors


@dataclass(frozen=True, slots=True)
class Setting:
    """What all defences and seeds of a recipe share: the images and who sees which."""

    recipe: config.Recipe
    dataset: Dataset
    parts: list[torch.Tensor]
    counts: torch.Tensor
    roles: Roles
    clients: list[Client]
    positions: torch.Tensor | None = None
    """Of streamed clients, of whose images `dataset.train` and `parts` hold those in memory: each row's position in its client's data."""

    @property
    def rounds(self) -> int:
        """The recipe's number of rounds, or what its budget of local steps allows with these clients: no clock is asked."""
        recipe = self.recipe
        if recipe.rounds.count is not None:
            return recipe.rounds.count
        settings, cohort = local_settings(recipe.clients), recipe.cohort
        steps = [settings.steps_in_round(client.num_examples) for client in self.clients]
        return min(60, max(5, round(recipe.rounds.local_steps / (cohort * sum(steps) / len(steps)))))

    def owner(self, row: int) -> tuple[int, int]:
        """(client, position in the client's data) of a training image."""
        for number, part in enumerate(self.parts):
            position = int(torch.searchsorted(part, row))
            if position < len(part) and int(part[position]) == row:
                return number, position if self.positions is None else int(self.positions[row])
        raise KeyError(row)


def load_setting(recipe: config.Recipe, *, world: World, notice: Callable[[str], None], folder: Path | None = None) -> Setting:
    """Load the images, cut them into clients and roles. Images live as uint8 on the device when they fit, else in main memory.

    Rank 0 loads first, so that one rank downloads and the others find the file. folder: the run's, where scans of streamed shards are kept. Raises: InputError on every rank, see
    data.load_dataset, the partitions and roles.
    """
    data, device, failed = recipe.data, world.device, None
    if data.stream:
        return _streamed_setting(recipe, world=world, notice=notice, folder=folder)
    if world.rank != 0:
        world.broadcast_json(None)  # rank 0 has loaded, or failed
    arguments = {"path": data.path, "size": data.size, "seed": data.split_seed, "download": data.download, "notice": notice}
    try:
        dataset = load_dataset(data.name, **arguments)
    except InputError as error:
        failed = str(error)
    if world.rank == 0:
        world.broadcast_json(None)
    failures = {f"rank {rank}: {text}" if world.size > 1 else text for rank, text in enumerate(world.all_gather_json(failed)) if text}
    if failures:
        raise InputError(sorted(failures)[0])
    labels = dataset.train.labels
    shared = {"num_clients": data.num_clients, "seed": data.split_seed, "min_examples": data.min_examples}
    match data.partition:
        case config.Iid():
            parts = partition.iid(labels, **shared)
        case config.Dirichlet(alpha=alpha):
            parts = partition.dirichlet(labels, alpha=alpha, **shared)
        case config.Shards(per_client=per_client):
            parts = partition.shards(labels, shards_per_client=per_client, **shared)
        case config.QuantitySkew(alpha=alpha):
            parts = partition.quantity_skew(labels, alpha=alpha, **shared)
    roles = _roles(recipe, dataset)
    train = dataset.train.to(_home(dataset.train.images, device, notice))
    clients = [Client(k, train.images[part.to(train.images.device)], train.labels[part.to(train.images.device)]) for k, part in enumerate(parts)]
    _check_batches(recipe, clients)
    return Setting(recipe, dataset, parts, class_counts(labels, parts, dataset.num_classes), roles, clients)


def _streamed_setting(recipe: config.Recipe, *, world: World, notice: Callable[[str], None], folder: Path | None) -> Setting:
    """The same where clients stream their images. See streams.load_streamed."""
    data = recipe.data
    found = load_streamed(
        places_of_clients(data.path, data.client_shards, data.num_clients), name=data.name, size=data.size, keep=data.stream_sample, seed=data.split_seed,
        buffer=data.stream_buffer, decoders=recipe.speed.decoders, world=world, notice=notice, folder=folder,
    )  # fmt: skip
    small = [client.id for client in found.clients if client.num_examples < data.min_examples]
    if small:
        raise InputError(f"clients {small[:5]} train on fewer than data.min_examples={data.min_examples} images: lower it, or give them more.")
    _check_batches(recipe, found.clients)
    return Setting(recipe, found.dataset, found.parts, found.counts, _roles(recipe, found.dataset), found.clients, found.positions)


def _roles(recipe: config.Recipe, dataset: Dataset) -> Roles:
    """Who is attacked: the victims, or where the recipe chooses among its defences the images kept for tuning in their place."""
    evaluation = recipe.evaluation
    roles = split_roles(dataset, num_victims=evaluation.num_victims, num_tuning=evaluation.num_tuning, seed=recipe.data.split_seed)
    return roles if recipe.choose is None else dataclasses.replace(roles, victims=roles.tuning)


def _check_batches(recipe: config.Recipe, clients: list[Client]) -> None:
    """Raises InputError if a client would normalise a batch of one image by its own statistics."""
    size, all_of_it = recipe.clients.batch_size, isinstance(recipe.clients, config.LocalTraining)
    alone = [client.id for client in clients if client.num_examples == 1 or (all_of_it and client.num_examples % size == 1)]
    if recipe.model.norm == "keep" and alone:
        raise InputError(
            f"clients {alone[:5]} have batches of one image at clients.batch_size={size}, which model.norm=keep cannot normalise by its statistics: "
            "change clients.batch_size by one, raise data.min_examples, or set model.norm=frozen or group."
        )


def _home(images: torch.Tensor, device: torch.device, notice: Callable[[str], None]) -> torch.device:
    """The device if the images take at most half of its free memory (they are cut into clients once: twice their size at the peak)."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    if 2 * images.nbytes > free // 2:
        notice(f"{images.nbytes / 2**30:.1f} GiB of images stay in main memory: {device} has {free / 2**30:.1f} GiB free.")
        return torch.device("cpu")
    return device


# --- models and defences ---------------------------------------------------------------------------------------------


def make_model(recipe: config.Recipe, dataset: Dataset | Shape, *, seed: int, perturbation: Any = None, cut: str | None = None) -> SplitModel:
    """The recipe's network; with `perturbation` (keyword arguments of models.Perturbation, or what else SplitModel takes) also the noise.

    cut: in the place of the recipe's.
    """
    model, backbone = recipe.model, make_net(recipe, dataset, seed=seed)
    mean, std = _input_statistics(model.normalise, backbone, dataset.image_shape[0])
    return SplitModel(
        backbone, cut=model.cut if cut is None else cut, perturbation=perturbation, image_shape=dataset.image_shape, num_classes=dataset.num_classes,
        input_mean=mean, input_std=std,
    )  # fmt: skip


def make_net(recipe: config.Recipe, dataset: Dataset | Shape, *, seed: int, untouched: bool = False) -> torch.nn.Module:
    """The recipe's backbone, with BatchNorm as `model.norm` has it. untouched: see `make_backbone`; BatchNorm is PyTorch's own then, in train mode for
    norm=keep, in eval mode for frozen."""
    model = recipe.model
    backbone = make_backbone(
        model.name, num_classes=dataset.num_classes, image_shape=dataset.image_shape, small_stem=model.small_stem, norm="group" if model.norm == "group" else "keep",
        pretrained=model.pretrained, activation=model.activation if model.name == "small" else None, seed=stream_seed(seed, "weights") % 2**31,
        options=model.options if model.neck is None else model.options | {"neck": model.neck}, untouched=untouched,
    )  # fmt: skip
    if untouched:
        return backbone.train(model.norm == "keep")
    if model.norm == "frozen":
        freeze_batch_norm(backbone)
    elif model.norm == "keep":
        move_batch_norm(backbone).train()
    elif has_batch_statistics(backbone):
        raise InputError(f"model.norm=group leaves {model.name} with running statistics that are no BatchNorm's: replace their layers in the model.")
    return backbone


def _input_statistics(normalise: str, backbone: torch.nn.Module, channels: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if normalise == "none":
        return None, None
    if normalise == "half":
        return (0.5,) * channels, (0.25,) * channels
    known = getattr(backbone, "pretrained_cfg", None) or {}
    if len(known.get("mean", ())) != channels:
        raise InputError(f"model.normalise=timm, but {type(backbone).__name__} has no timm configuration for {channels} channel(s): use half or none.")
    return tuple(known["mean"]), tuple(known["std"])


def make_defence(chosen: Any, recipe: config.Recipe, dataset: Dataset | Shape, *, seed: int, spends: Budget | None = None) -> Defence:
    """A defence from its dataclass, or from a tuple of them: one `match`; your own offers `build(make_model)`. spends: see `privacy_budget`;
    a private defence without it can be looked at, not trained."""
    parts = chosen if isinstance(chosen, tuple) else (chosen,)
    private = next((part for part in parts if isinstance(part, config.DPSGD) and config.trains(part)), None)
    trained = [part for part in parts if config.trains(part) and part is not private]
    first = trained[0] if trained else private or config.Undefended()
    defence = _make_trained(first, recipe, dataset, seed=seed, spends=spends)
    if private is not None and first is not private:
        defence = PrivateNoise(defence, clip=private.clip, noise_multiplier=spends and spends.noise_multiplier)
    defence.transforms = tuple(_make_transform(part, recipe, spends) for part in parts if getattr(part, "changes_update", False))
    defence.encoders = tuple(_make_encoder(part, dataset.num_classes) for part in parts if getattr(part, "changes_data", False))
    secure = [part for part in parts if isinstance(part, config.SecureAggregation)]
    defence.secure = SecureCohorts(secure[0].dropouts, seed) if secure else None
    defence.budget = spends
    return defence


def _make_encoder(chosen: Any, num_classes: int) -> Encoder:
    match chosen:
        case config.MixUp():
            return Mix(num_classes, mixing=chosen.mixing)
        case config.InstaHide():
            return Hide(num_classes, mixed=chosen.mixed, largest=chosen.largest, signs=chosen.signs)
        case config.ATS():
            return Transformed(chosen.parsed())
        case config.DCS():
            own = {spec.name: getattr(chosen, spec.name) for spec in dataclasses.fields(chosen)}
            return Conceal(num_classes, **own)
    missing = [name for name in ("encode", "unknowns", "imitate") if not callable(getattr(chosen, name, None))]
    if missing:
        raise InputError(f"{type(chosen).__name__} has changes_data, but no {', '.join(missing)}: see gidef.defence.encode.")
    return chosen


def _make_transform(chosen: Any, recipe: config.Recipe, spends: Budget | None) -> Transform:
    match chosen:
        case config.Pruning():
            return Prune(share=chosen.share)
        case config.GradientNoise():
            return AddNoise(std=chosen.std, law=chosen.law, relative=chosen.relative)
        case config.Clipping():
            return Clip(bound=chosen.bound, per_tensor=chosen.per_tensor)
        case config.Sign():
            return SignOnly()
        case config.Quantisation():
            return Quantise(bits=chosen.bits, norm=chosen.norm)
        case config.Censor():
            return Orthogonal(draws=chosen.draws)
        case config.Soteria():
            return PruneFeatures(share=chosen.share, layer=chosen.layer)
        case config.GradDefense():
            return NoisySlices(std=chosen.std, relative=chosen.relative, slices=chosen.slices, noisy=chosen.noisy)
        case config.DPSGD():
            noise, cohort_size = spends and spends.noise_multiplier, recipe.cohort
            return ClipAndNoise(clip=chosen.clip, noise_multiplier=noise, cohort_size=cohort_size)
    missing = [name for name in ("apply", "reveals", "imitate") if not callable(getattr(chosen, name, None))]
    if missing:
        raise InputError(f"{type(chosen).__name__} has changes_update, but no {', '.join(missing)}: see gidef.defence.share.")
    return chosen


def _make_trained(chosen: Any, recipe: config.Recipe, dataset: Dataset | Shape, *, seed: int, spends: Budget | None) -> Defence:
    build_model = functools.partial(make_model, recipe, dataset, seed=seed)
    match chosen:
        case config.Undefended():
            return Defence(build_model())
        case config.DPSGD():
            return PrivateDefence(build_model(), clip=chosen.clip, noise_multiplier=spends and spends.noise_multiplier, form=chosen.form)
        case config.LearnedPerturbation():
            model = build_model(
                cut=chosen.cut, perturbation={
                    "mode": chosen.level, "law": chosen.law, "mean": chosen.mean, "std_init": chosen.std_init,
                    "std_floor": chosen.std_floor, "strength": chosen.strength,
                },
            )  # fmt: skip
            decoder = None
            if chosen.dependence_weight > 0:
                sees = chosen.decoder_sees == "gradient"
                make = functools.partial(SeeingDecoder, sketch=chosen.decoder_sketch) if sees else functools.partial(decoder_for, size="loop")
                decoder = make(
                    model.latent_shape, model.channel_dim, dataset.image_shape, width_factor=chosen.decoder_width, seed=stream_seed(seed, "decoder") % 2**31
                )
                if sees and chosen.decoder_sketch < (tensors := len(list(model.parameters()))):
                    raise InputError(f"decoder_sketch={chosen.decoder_sketch} cannot hold the gradient of {tensors} tensors: give at least as many numbers.")
            fields = {spec.name for spec in dataclasses.fields(MinimaxSettings)} & {spec.name for spec in dataclasses.fields(chosen)}
            return LearnedDefence(model, decoder, MinimaxSettings(**{name: getattr(chosen, name) for name in fields}))
        case config.CapacityNoise():
            model = build_model(cut=chosen.cut, perturbation={"std_init": chosen.std_init, "std_floor": chosen.std_floor})
            own = MinimaxSettings(
                dependence_weight=0.0, frozen=chosen.frozen, bits_weight=chosen.bits_weight, front_frozen=chosen.front == "frozen",
                level_frozen=chosen.level == "fixed",
            )
            return LearnedDefence(model, None, own)
        case config.IsotropicNoise():
            level = {"mode": "fixed", "law": chosen.law, "std_init": chosen.std, "std_floor": 0.0}
            return isotropic_noise(build_model(cut=chosen.cut, perturbation=level), frozen=chosen.frozen)
        case config.BiDO():
            return BiDODefence(build_model(), BiDOSettings(chosen.measure, chosen.x_weight, chosen.label_weight, chosen.norm))
        case config.Precode():
            make = functools.partial(LinearBottleneck, width=chosen.width, seed=stream_seed(seed, "bottleneck") % 2**31)
            return variational_bottleneck(build_model(cut=chosen.cut or "before:classifier", perturbation=make), kl_weight=chosen.kl_weight)
        case config.CVB():
            make = functools.partial(ConvBottleneck, kernel=chosen.kernel, seed=stream_seed(seed, "bottleneck") % 2**31)
            return variational_bottleneck(build_model(cut=chosen.cut or "stage:0", perturbation=make), kl_weight=chosen.kl_weight)
    if callable(getattr(chosen, "build", None)):
        return chosen.build(build_model)
    raise InputError(f"{type(chosen).__name__} is no defence: use one of gidef.config, or a dataclass with a method build(make_model).")


def privacy_budget(setting: Setting, chosen: Any, *, seed: int) -> Budget | None:
    """What the training of a defence with a DPSGD spends, None of another: over all rounds, also those that patience may leave out.

    Every client takes part in the rounds whose cohorts it is drawn into, which the server knows, and so draws of clients amplify nothing: of images those
    of batches do, and under a DPSGD of clients a round is one step of who is in its cohort.
    Raises: InputError without Opacus, or for a target that no noise reaches.
    """
    private = next((part for part in (chosen if isinstance(chosen, tuple) else (chosen,)) if isinstance(part, config.DPSGD)), None)
    if private is None:
        return None
    needs_opacus()
    recipe, rounds, settings = setting.recipe, setting.rounds, local_settings(setting.recipe.clients)
    size = recipe.cohort
    cohorts = [draw_cohort(num_clients=recipe.data.num_clients, size=size, seed=seed, round=number) for number in range(rounds)]
    taken = Counter(number for cohort in cohorts for number in cohort)
    if private.level == "client":
        schedules = [Schedule(1.0, taken[client.id]) for client in setting.clients]
    else:
        schedules = [
            Schedule(min(1.0, settings.batch_size / client.num_examples), taken[client.id] * settings.steps_in_round(client.num_examples))
            for client in setting.clients
        ]
    return budget(
        schedules, noise_multiplier=private.noise_multiplier, target_epsilon=private.target_epsilon, delta=private.delta,
        unit="image" if private.level == "sample" else "client", accountant=private.accountant,
    )  # fmt: skip


def load_model(path: str | Path, *, device: torch.device | str = "cpu", load_code: Callable[[str], Any] | None = None) -> tuple[SplitModel, dict[str, Any]]:
    """A trained model from a run's `models/<defence>-<seed>.safetensors`, in eval mode, with the file's metadata.

    Under `head` the file holds a front per client (`client-00012/<name>`); the first client's is loaded.

    Args:    load_code: imports what a recipe of your own names (`gidef.importing.load`); None refuses such recipes.
    Raises:  InputError if the file is missing, damaged, no export, or of a recipe with code of its own.
    """
    tensors, meta = load_export(path, device)
    try:
        # the images are not needed, nor code that makes them, nor the weights that training began with
        plain = {**meta["recipe"], "data": config.to_json(config.Data()), "model": {**meta["recipe"]["model"], "pretrained": None}}
        recipe = config.from_json(plain, load=load_code)
        chosen = config.from_json(meta["as_trained"], load=load_code) if "as_trained" in meta else recipe.defences[meta["defence"]]
        defence = make_defence(chosen, recipe, Shape(meta["num_classes"], tuple(meta["image_shape"])), seed=meta["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its recipe cannot be built: {error}") from error
    first = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith("client-00000/")}
    model = defence.model.to(device)
    load_parameters(model, {name: {**first, **tensors}[name] for name in [*(name for name, _ in model.named_parameters()), *running_statistics(model)]})
    return model.eval(), meta


class Shape(NamedTuple):
    """What a network needs to know of a data set."""

    num_classes: int
    image_shape: tuple[int, ...]


# --- federated training ----------------------------------------------------------------------------------------------


def server_step(server: config.Server, *, num_clients: int, cohort_size: int) -> Callable[[ServerState, Tensors], ServerState]:
    match server:
        case config.FedAvg():
            return servers.fed_avg(lr=server.lr, momentum=server.momentum)
        case config.FedAdam():
            return servers.fed_adam(lr=server.lr, beta1=server.beta1, beta2=server.beta2, tau=server.tau)
        case config.FedYogi():
            return servers.fed_yogi(lr=server.lr, beta1=server.beta1, beta2=server.beta2, tau=server.tau)
        case config.FedAdagrad():
            return servers.fed_adagrad(lr=server.lr, beta1=server.beta1, tau=server.tau)
        case config.Scaffold():
            return servers.scaffold(lr=server.lr, participation=cohort_size / num_clients)


def robust_rule(aggregate: config.Aggregate) -> robust.Rule | None:
    """None for the mean, which needs no single updates."""
    match aggregate:
        case config.Mean():
            return None
        case config.Median():
            return robust.median()
        case config.TrimmedMean(share=share):
            return robust.trimmed_mean(share=share)
        case config.Krum(byzantine=byzantine, chosen=chosen):
            return robust.krum(byzantine=byzantine, chosen=chosen)


def local_settings(clients: config.Clients) -> LocalSettings:
    match clients:
        case config.SingleGradient():
            return LocalSettings(
                batch_size=clients.batch_size, optimiser="sgd", lr=clients.lr, grad_clip=clients.grad_clip, precision=clients.precision, steps=1
            )
        case config.LocalTraining():
            fields = {spec.name for spec in dataclasses.fields(config.LocalTraining)}
            return LocalSettings(**{name: getattr(clients, name) for name in fields})


def lacks_tf32(recipe: config.Recipe, world: World) -> bool:
    """Whether clients are to train in TF32 on a device that has none: they train in float32."""
    return recipe.clients.precision == "tf32" and world.device.type != "cuda"


def num_workers(recipe: config.Recipe, world: World) -> int:
    """Clients or chunks that this rank works on at the same time."""
    if world.mesh is not None:
        return 1
    if recipe.speed.workers:
        return recipe.speed.workers
    if world.device.type == "cuda":
        return 1
    return max(1, (world.cores or len(allowed_cores())) // recipe.speed.threads)


def overlaps_evaluation(recipe: config.Recipe, world: World) -> bool:
    """Whether this rank can evaluate a round while the next one is computed, see `config.Speed.overlap_evaluation`."""
    gpu = world.device.type == "cuda"
    # the switch to TF32 is the process', and a CUDA graph is not captured while another thread uses the device
    shared = world.mesh is not None or recipe.speed.compile_training or (gpu and recipe.clients.precision == "tf32")
    free = (world.cores or len(allowed_cores())) >= (num_workers(recipe, world) + 1) * recipe.speed.threads
    return recipe.speed.overlap_evaluation and not shared and (gpu or free)


def shards(setting: Setting, ranks: int, *, seed: int, round: int) -> list[list[int]]:
    """Each rank's clients in a round as it is planned before anything is measured, by number. A queue gives them out about like the plan by size."""
    recipe = setting.recipe
    cohort = draw_cohort(num_clients=recipe.data.num_clients, size=recipe.cohort, seed=seed, round=round)
    size = recipe.speed.shard_size  # the ranks of a group have the same clients
    if recipe.speed.clients_schedule == "static":
        parts = [cohort[group :: ranks // size] for group in range(ranks // size)]
    else:
        parts = [[cohort[place] for place in part] for part in longest_first([setting.clients[k].num_examples for k in cohort], ranks // size)]
    return [parts[rank // size] for rank in range(ranks)]


def traffic(recipe: config.Recipe, server: ServerState, template: Tensors) -> Traffic:
    """What a round sends between ranks. server: after a step, with its slots.  template: of an update, as a rank sums it."""
    rule, speed = robust_rule(recipe.rounds.aggregate), recipe.speed
    return Traffic(
        entries=sum(tensor.numel() for tensor in template.values()), cohort=recipe.cohort,
        entry_bytes=8 if speed.reduction == "fixed_point" else 4, robust=rule is not None, chosen=getattr(recipe.rounds.aggregate, "chosen", 0),
        sharded_server=speed.sharded_server, slots=len(server.slots),
    )  # fmt: skip


def bytes_per_round(training: Training, recipe: config.Recipe) -> int:
    """Between clients and server: the shared tensors in float32 down to every client of a cohort, and up what the defence makes of an update, of those who
    stay (see defence.upload). That is of the federation that is simulated; what the simulation's ranks send one another is `traffic`."""
    template, unchanged = training.participation.template(), moving_statistics(training.defence.model)
    count = training.sharded.layout.numel if training.sharded else lambda tensors: sum(tensor.numel() for tensor in tensors.values())
    entries = {name: count({name: tensor}) for name, tensor in template.items()}
    changed = {name: entries[name] for name in training.shared if name not in unchanged}
    bits = training.defence.upload_bits(changed, {name: size for name, size in entries.items() if name not in changed})
    cohort = recipe.cohort
    staying = cohort if training.defence.secure is None else len(training.defence.secure.stayed(range(cohort), 0))
    return cohort * sum(entries[name] * tensor.itemsize for name, tensor in template.items()) + staying * -(-bits // 8)


@dataclass(frozen=True, slots=True)
class Sharded:
    """A client on the ranks of a group.

    layout: how tensors lie.  initial: what a client starts from, in slices.  engine: holds the network.  player: its only one.
    train: the twin of `train_locally`.  share: of slices, changed as whole tensors: every rank draws the same, and keeps its part.
    """

    layout: Layout
    initial: Tensors
    engine: Engine
    player: Any
    train: Callable[..., Any]
    share: Callable[..., Tensors]


@dataclass(frozen=True, slots=True)
class Training:
    """One defence and seed, ready for `rounds.federate`."""

    defence: Defence
    participation: Participation
    store: ClientStore
    server: ServerState
    draw: Callable[[int], list[int]]
    run: Callable[..., Any]
    shared: tuple[str, ...]
    costs: Costs
    """What the next round's plan goes by."""
    slices: Slices | None = None
    """Which of the server's slots this rank holds; None: all."""
    sharded: Sharded | None = None
    """Where a client spans several ranks: the server's and the clients' tensors are then slices."""
    frozen: Tensors = dataclasses.field(default_factory=dict)
    """Running statistics of frozen BatchNorm, by name, whole and in main memory: what the model has beside its parameters."""

    def to_save(self, server: ServerState) -> ServerState:
        """The server with whole slots, on the first rank. Every rank calls this together."""
        return server if self.slices is None else whole(server, self.slices)

    def taken_up(self, server: ServerState) -> ServerState:
        """The server as this rank holds it, from one with whole slots."""
        return server if self.slices is None else own(server, self.slices)


def make_training(setting: Setting, chosen: Any, *, seed: int, world: World, state_folder: Path, frozen: Tensors | None = None) -> Training:
    """On one rank per client, or where the world has a mesh, on a group of ranks per client.

    frozen: the running statistics that the training began with, in the place of those that the model has now.
    """
    recipe = setting.recipe
    defence = make_defence(chosen, recipe, setting.dataset, seed=seed, spends=privacy_budget(setting, chosen, seed=seed))
    if frozen:
        load_parameters(defence.model, frozen)
    frozen = {name: tensor.detach().cpu().clone() for name, tensor in frozen_statistics(defence.model).items()}
    if world.mesh is None:  # else a player's copy goes to the devices in slices
        defence.model.to(world.device)
    if defence.decoder is not None:
        defence.decoder.to(world.device)
    cohort_size = recipe.cohort
    workers = min(num_workers(recipe, world), cohort_size)
    sharded = _sharded(defence, chosen, recipe, world) if world.mesh is not None else None
    initial = sharded.initial if sharded else defence.initial()
    moved, behind = tuple(moving_statistics(defence.model)), (*defence.model.parts["predictor"], *defence.model.statistics["predictor"])
    shared = shared_names(initial, behind, recipe.share_policy)
    store = ClientStore(state_folder, memory=cohort_size)
    players = [defence.encoded_player() for _ in range(0 if sharded else workers)]
    settings = dataclasses.replace(local_settings(recipe.clients), fused=recipe.speed.fused_optimisers, channels_last=recipe.speed.channels_last)
    if lacks_tf32(recipe, world):
        settings = dataclasses.replace(settings, precision="float32")
    for player in players:
        if recipe.speed.channels_last:
            player.model.to(memory_format=torch.channels_last)
        if recipe.speed.small_maps and not recipe.speed.compile_training and world.device.type == "cpu" and not hasattr(player, "fill_gradients"):
            multiply_over_small_maps(player.model)
        if recipe.speed.fused_optimisers:
            getattr(player, "fuse", lambda: None)()  # what it optimises by itself
    participation = Participation(
        [sharded.player] if sharded else players, initial, shared, settings,
        SlicedStore(store, sharded.layout, world.mesh.shard) if sharded else store,
        seed=seed, rounds=setting.rounds, scaffold=isinstance(recipe.rounds.server, config.Scaffold),
        share=(sharded.share if sharded else defence.share) if defence.transforms else None,
        alike=defence.budget is not None and defence.budget.unit == "client", statistics=moved, **({"train_player": sharded.train} if sharded else {}),
    )  # fmt: skip
    costs = Costs()
    dealt = {
        "workers": workers, "threads": recipe.speed.threads, "costs": costs, "learn": costs.learn, "schedule": recipe.speed.clients_schedule,
        "groups": participation.groups,
    }  # fmt: skip
    rule = robust_rule(recipe.rounds.aggregate)
    slices = Slices(world, participation.template()) if recipe.speed.sharded_server else None
    if sharded:
        over_ranks = mean_over_mesh(world.mesh, costs=costs, learn=costs.learn)
    elif rule is not None:
        over_ranks = robust_over_world(world, rule, **dealt)
    else:
        over_ranks = mean_over_world(world, **dealt, reduction=recipe.speed.reduction, slices=slices)
    over_cohort = functools.partial(
        over_ranks,
        template=participation.template(), metric_names=("loss",),
    )  # fmt: skip
    step = server_step(recipe.rounds.server, num_clients=recipe.data.num_clients, cohort_size=cohort_size)
    if averaged := frozenset(moved).intersection(shared):
        step = servers.averaging(step, averaged)
    if slices is not None:
        step = sharded_step(step, slices, sliced=rule is None)
    draw = drawn = functools.partial(_draw, num_clients=recipe.data.num_clients, size=cohort_size, seed=seed)
    train = participation.train if sharded else participation.train_group
    run = functools.partial(span("round")(run_round), train=train, step=step, over_cohort=over_cohort)
    if defence.secure is not None:
        draw, run = (lambda number: defence.secure.stayed(drawn(number), number)), functools.partial(_run_summed, defence.secure, drawn, run, over_cohort)
    return Training(
        defence=defence, participation=participation, store=store, shared=shared, costs=costs, slices=slices,
        server=ServerState({name: initial[name] for name in shared}),
        draw=draw, run=run, sharded=sharded, frozen=frozen,
    )  # fmt: skip


def _draw(number: int, *, num_clients: int, size: int, seed: int) -> list[int]:
    return draw_cohort(num_clients=num_clients, size=size, seed=seed, round=number)


def _run_summed(
    secure: SecureCohorts, drawn: Callable[[int], list[int]], run: Callable[..., Any], over_cohort: Callable[..., Any], server: ServerState, cohort: list[Client]
) -> Any:  # fmt: skip
    """A round of those who stayed of its cohort, whose sum alone the server sees."""
    sum_of = secure.sum_of(drawn(server.round), [client.id for client in cohort], server.round)
    return run(server, cohort, over_cohort=functools.partial(over_cohort, sum_of=sum_of))


def compile_steps(training: Training, recipe: config.Recipe, *, notice: Callable[[str], None]) -> None:
    """The clients' steps as compiled programs; CUDA graphs overwrite gradients with every batch, so batches that are added up go without; and
    several workers, whose threads would replay on one stream, do too."""
    players = training.participation.players
    if training.participation.moves_statistics:
        notice("speed.compile_training: steps that move BatchNorm's running statistics run uncompiled.")
        return
    graphs = next(players[0].model.parameters()).is_cuda and getattr(recipe.clients, "accumulate", 1) == 1 and len(players) == 1
    for player in players:
        if getattr(player, "compile", None) is None:
            notice(f"speed.compile_training: the steps of {type(training.defence).__name__} run uncompiled.")
            return
        player.compile(graphs=graphs, notice=notice)
    if not graphs:  # a thread that records would hinder another that calls what torch.compile made
        training.participation.recorder = None


_MEANS = (
    config.Undefended, config.LearnedPerturbation, config.IsotropicNoise, config.CapacityNoise, config.Precode, config.CVB, config.DPSGD,
)  # fmt: skip
"""Defences whose loss is a mean over examples, unless they say that it couples a batch. One of your own may be none."""


def _sharded(defence: Defence, chosen: Any, recipe: config.Recipe, world: World) -> Sharded:
    """The group's ranks share out a batch where the loss is a mean over examples, else each computes all of it; encoders see whole batches."""
    mesh = world.mesh
    layout = Layout(mesh, {name: p.shape for name, p in defence.model.named_parameters()})
    initial = layout.slices(defence.initial(), world.device)
    parts = chosen if isinstance(chosen, tuple) else (chosen,)
    trained = [part for part in parts if not getattr(part, "changes_update", False) and not getattr(part, "changes_data", False)]
    split = all(isinstance(part, _MEANS) and not getattr(part, "couples_batch", False) for part in trained)
    inner = defence.player()
    defence.model.to("meta")  # the player's copy holds the weights, and attacks build their own
    gc.collect()  # a SplitModel is a cycle, through its hook: those that were built to look at would stay until much later
    player = PartPlayer(inner, mesh.shard, split=split)
    speed, axis = recipe.speed, mesh.device_mesh["shard"]
    if speed.shard_backend == "deepspeed":
        engine = Zero(
            inner.model, layout, mesh.shard, local_settings(recipe.clients), process_group=axis.get_group(), device=world.device,
            stage=speed.zero_stage, offload=speed.offload == "cpu",
        )  # fmt: skip
        inner.model = engine.model
    else:
        engine = Fsdp(inner.model, axis, mesh.shard)

    def share(update: Tensors, *, generator: torch.Generator, own: Any = None) -> Tensors:
        return layout.slices(defence.share(layout.gathered(update), generator=generator))

    whole = EncodedPlayer(player, defence.encode) if defence.encoders else player
    return Sharded(layout, initial, engine, whole, train_sharded(engine, mesh.shard), share)
