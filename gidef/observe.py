"""From victims to observations: what the server sees of them, and what each attack is granted. The evaluator's side of the wall."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gidef import config
from gidef.attack import local_adam, local_sgd
from gidef.attack.simulate import MEMBERS, cohort_mean
from gidef.attack.surgery import STATISTICS, norm_names
from gidef.clients.local import load_parameters
from gidef.clients.participate import DECODER
from gidef.defence.base import Defence
from gidef.defence.encode import Encoder, imitating
from gidef.defence.perturbation import LearnedDefence, still_parts
from gidef.defence.share import imitated, left_out, noise_share, revealed, settled, trust_of, trusted
from gidef.models import moving, moving_statistics
from gidef.rng import generator, stream_seed
from gidef.runs import Run, Snapshot, Trained
from gidef.types import Client, Observation, Own, Tensors

Simulate = Callable[..., Tensors]


@dataclass(frozen=True, slots=True)
class Victims:
    """Private batches in one release. O batches of B images; rows: of the training split, int64 (O, B); owners: a client per batch.

    images: float32 (O, B, C, H, W) in [0, 1].  labels: int64 (O, B).  noise: each batch's draw, (B, *latent_shape) or with
    a leading axis of local steps (`noise_shape`), or None.  private: what the client keeps.  updates: what it released; where the server sees sums alone, the mean
    over a cohort.  company: the other clients of each batch's cohort then, else empty.  statistics: the change of the shared running statistics that
    leaves beside each update (the cohort's mean), {} where there are none.
    """

    rows: Tensor
    owners: list[int]
    images: Tensor
    labels: Tensor
    noise: list[Tensor | None]
    private: list[Tensors]
    updates: list[Tensors]
    company: list[Company] = field(default_factory=list)
    statistics: list[Tensors] = field(default_factory=list)

    def all_labels(self, batch: int) -> Tensor:
        """Of everybody in the observed sum, the victims' first: int64 (M · B,)."""
        return torch.cat([self.labels[batch], self.company[batch].labels.flatten()]) if self.company else self.labels[batch]


@dataclass(frozen=True, slots=True)
class Company:
    """The M − 1 other clients in the sum with a batch, B images each: images (M − 1, B, C, H, W), labels int64 (M − 1, B); noise, private: of each."""

    owners: list[int]
    images: Tensor
    labels: Tensor
    noise: list[Tensor | None]
    private: list[Tensors]


def observed_simulator(
    run: Run, trained: Trained, snapshot: Snapshot, *, terms: str, adaptive: bool = False, drawn: Generator | None = None
) -> Callable[[], Simulate]:
    """A factory of simulators of the update: one gradient, or the delta of local training.

    adaptive: with the changes before it leaves, and those of what is trained on.  drawn: as the client itself computes it, before these changes, with
    the noise of its steps from this generator where they have any.
    """
    return released_of(run, trained, adaptive=adaptive, drawn=drawn)(trained.training.defence.simulator(terms=terms, progress=snapshot.progress))


def released_of(
    run: Run, trained: Trained, *, adaptive: bool = False, drawn: Generator | None = None
) -> Callable[[Callable[[], Simulate]], Callable[[], Simulate]]:
    """From a factory of simulators of one pass's gradient that of `observed_simulator`. It is bound to numbers: attacks hold it, and a run holds the images."""
    evaluation, defence, moving = run.recipe.evaluation, trained.training.defence, trained_names(trained)

    def of(make: Callable[[], Simulate]) -> Callable[[], Simulate]:
        if adaptive or drawn is not None:
            make = defence.stepped(make, generator=drawn)
        unrolled = make if evaluation.release == "gradient" else lambda: local_training(evaluation, make(), moving=moving)
        if not adaptive:
            return unrolled
        return lambda: imitating(imitated(unrolled(), defence.transforms, summed=defence.secure is not None), defence.encoders)

    return of


def local_training(evaluation: config.Evaluation, gradient: Simulate, *, moving: frozenset[str] = frozenset()) -> Simulate:
    """A simulator of the delta that is released, from one of a step's gradient: the same for the victims' clients and for whoever plays them. It is bound
    to numbers: attacks hold it, and a run holds the images. moving: of the model, as `trained_names`."""
    settings = {"steps": _steps(evaluation), "epochs": evaluation.local_epochs, "lr": evaluation.local_lr, "moving": moving}
    return local_adam(gradient, **settings) if evaluation.local_optimiser == "adam" else local_sgd(gradient, momentum=evaluation.local_momentum, **settings)


def trained_names(trained: Trained) -> frozenset[str]:
    """Names of the model's tensors that a client's steps move, shared or private: all but a frozen front and a level that stands still."""
    defence = trained.training.defence
    still = set(still_parts(defence.model, defence.settings)) if isinstance(defence, LearnedDefence) else set()
    return frozenset(name for name, parameter in defence.model.named_parameters() if parameter.requires_grad and name not in still)


def as_gradient(evaluation: config.Evaluation, update: Tensors) -> Tensors:
    """The gradient that a release of one step holds: a gradient as it is, and Δ / −lr of a delta Δ = −lr · g, as the server knows the rate that it asked for."""
    return update if evaluation.release == "gradient" else {name: tensor / -evaluation.local_lr for name, tensor in update.items()}


def members(run: Run, trained: Trained) -> int:
    """M, clients in an observed update: those that stay of a cohort where the server sees sums alone, else 1."""
    return 1 if trained.training.defence.secure is None else len(trained.training.draw(0))


def cohort_simulator(run: Run, trained: Trained, make: Callable[[], Simulate], *, stepped: bool | None = None, in_turn: bool = False) -> Callable[[], Simulate]:
    """A factory of simulators of what the server sees, from one of a client's update.

    stepped: whether the update's noise has a leading axis of local steps; None: if a delta is released.  in_turn: see `cohort_mean`.
    """
    return cohort_of(run, trained, stepped=stepped, in_turn=in_turn)(make)


def cohort_of(run: Run, trained: Trained, *, stepped: bool | None = None, in_turn: bool = False) -> Callable[[Callable[[], Simulate]], Callable[[], Simulate]]:
    """What `cohort_simulator` makes of a factory. It is bound to numbers: attacks hold it, and a run holds the images."""
    if trained.training.defence.secure is None:
        return lambda make: make
    count, stepped = members(run, trained), run.recipe.evaluation.release == "delta" if stepped is None else stepped
    return lambda make: lambda: cohort_mean(make(), count, stepped=stepped, in_turn=in_turn)


def noise_shape(run: Run, trained: Trained, *, members: int = 1) -> tuple[int, ...] | None:
    """Shape of one observation's noise: (M · B, *latent), for a delta with a leading axis of steps; None without noise. The steps are those of all
    local epochs, or of one where every image keeps its draw."""
    evaluation, latent = run.recipe.evaluation, trained.training.defence.noise_shape
    if latent is None:
        return None
    if evaluation.release == "gradient":
        return (members * evaluation.batch_size, *latent)
    return (evaluation.local_steps * draws_in_release(run, trained), members * evaluation.batch_size // evaluation.local_steps, *latent)


def draws_in_release(run: Run, trained: Trained) -> int:
    """How often the noise of an image is drawn for one release: in each epoch of a delta, unless every image keeps one draw for ever."""
    if run.recipe.evaluation.release == "gradient":
        return 1
    return 1 if keeps_noise(run, trained) else run.recipe.evaluation.local_epochs


def keeps_noise(run: Run, trained: Trained) -> bool:
    """Whether every image keeps one draw of the noise on the latent for ever, in all releases."""
    data = run.setting.dataset.val
    return trained.training.defence.frozen_noise(Client(-1, data.images[:1], data.labels[:1]), seed=0) is not None


def cross_entropy_behind(run: Run, trained: Trained) -> bool:
    """Whether the predictor's released gradient is that of the cross-entropy, and of no term of the defence's own, which vanish where a step has one image."""
    evaluation = run.recipe.evaluation
    return not trained.training.defence.own_terms or evaluation.released_loss == "utility" or evaluation.batch_size // evaluation.local_steps == 1


def taken_apart(trained: Trained, attack: Any) -> Encoder | None:
    """The encoder whose mixtures A9 takes apart (see `defence.encode.Encoder`). None where there is none, where others stand beside it or clients are summed, and
    where labels are not known, which tell the shares."""
    encoders = trained.training.defence.encoders
    alone = isinstance(attack, config.MultiRound) and len(encoders) == 1 and trained.training.defence.secure is None
    return encoders[0] if alone and hasattr(encoders[0], "unmixed") and attack.labels == "known" else None


def settles(run: Run, trained: Trained) -> bool:
    """Whether all releases of a batch at the same weights are of one update, so that entries on which two of them agree bit for bit are that update's."""
    defence = trained.training.defence
    return defence.spares and (defence.noise_shape is None or keeps_noise(run, trained))


def settled_releases(releases: Sequence[Victims]) -> tuple[Victims, list[Tensors]]:
    """What several releases, that settle, tell together, as one; and of every batch how much noise its update has left."""
    each = [settled(updates) for updates in zip(*(one.updates for one in releases), strict=True)]
    return dataclasses.replace(releases[0], updates=[update for update, _ in each]), [variances for _, variances in each]


def release(run: Run, trained: Trained, snapshot: Snapshot, *, seed: int, repeat: int = 0, control: bool = False) -> Victims:
    """Let the victims' clients compute what they would send, at a checkpoint, with fresh noise from (seed, checkpoint, batch, repeat).

    repeat: number of a release of the same batch at the same weights, for attacks over several rounds.

    Where the defence encodes what is trained on, partners come from the batch's client, draws from (seed, checkpoint, batch, repeat); `images`
    stay the private ones, against which attacks are scored.

    A batch belongs to the client that holds its first image: that client's decoder and front are used. Images, and so rows, are
    sorted by owner before they are cut into batches; with more images per batch than victims per client, a batch mixes clients.

    Where the server sees sums alone, other clients are drawn into each batch's cohort, and of each as many of its images, from (seed, checkpoint,
    batch); what is released is the mean over the cohort, with equal weights.

    control: what says nothing of any private image but its label. Clients compute it of public images of the same labels, of which encoders take their
    partners too, and every tensor of an update leaves with its entries in another order; statistics are those of the public images. `images` stay the
    private ones.
    """
    setting, recipe, device = run.setting, run.recipe, run.world.device
    size, defence, participation = recipe.evaluation.batch_size, trained.training.defence, trained.training.participation
    train = setting.dataset.train
    order = setting.roles.victims if size == 1 else torch.tensor(sorted(setting.roles.victims.tolist(), key=setting.owner))
    rows = order.view(-1, size)
    images = train.images[rows.flatten()].to(device, torch.float32).div_(255).view(*rows.shape, *setting.dataset.image_shape)
    labels = train.labels[rows.flatten()].to(device).view(rows.shape)
    steps = Generator()
    simulate = observed_simulator(run, trained, snapshot, terms=recipe.evaluation.released_loss, drawn=steps)()
    shape, model = noise_shape(run, trained), copy.deepcopy(defence.model)
    owners, noises, privates, updates, companies, statistics = [], [], [], [], [], []
    participation.versions = dict(snapshot.versions)
    again = [repeat] if repeat else []

    def sent(owner: int, images: Tensor, labels: Tensor, frozen: Tensor | None, batch: int | str) -> tuple[Tensor | None, Tensors, Tensors, Tensors]:
        """(noise, private, update, change of the running statistics) of a client and its batch."""
        private = {name: tensor.to(device) for name, tensor in participation.state(owner).items()}
        images = _stand_ins(run, labels, seed=seed, batch=batch) if control else images
        noise = frozen
        if shape is not None:
            if noise is None:
                count = math.prod(shape[: len(shape) - len(defence.noise_shape)])
                noise = defence.draw_noise(count, generator=generator(seed, "victim-noise", snapshot.name, batch, *again))
            noise = noise.view(shape).to(device)
        steps.manual_seed(stream_seed(seed, "victim-steps", snapshot.name, batch, *again))
        inputs, targets = trained_on(run, trained, snapshot, images, labels, owner=owner, private=private, batch=batch, seed=seed, repeat=repeat, public=control)
        update = simulate(snapshot.params, private, inputs, targets, noise)
        draw = generator(seed, "victim-share", snapshot.name, batch, *again)
        own = at_hand(run, model, {**private, **snapshot.params}, inputs, targets.argmax(1))
        changed = defence.share({name: tensor.detach() for name, tensor in update.items()}, generator=draw, own=own)
        return noise, private, changed, _moved_statistics(run, trained, snapshot, private, inputs, targets, noise)

    for batch, row in enumerate(rows.tolist()):
        owner = setting.owner(row[0])[0]
        noise, private, update, moved = sent(owner, images[batch], labels[batch], _frozen(run, trained, row, seed=seed), batch)
        if defence.secure is not None:
            company, beside, also = _company(run, trained, snapshot, sent, owner=owner, batch=batch, seed=seed)
            update, moved = (
                {name: torch.stack([tensor, *(other[name] for other in others)]).mean(0) for name, tensor in own.items()}
                for own, others in ((update, beside), (moved, also))
            )
            companies.append(company)
        owners.append(owner)
        noises.append(noise)
        privates.append(private)
        updates.append(shuffled(update, seed=seed, batch=batch, repeat=repeat) if control else update)
        statistics.append(moved)
    return Victims(rows, owners, images, labels, noises, privates, updates, companies, statistics)


def _stand_ins(run: Run, labels: Tensor, *, seed: int, batch: int | str) -> Tensor:
    """Public images for private ones, float32 (B, C, H, W) in [0, 1]: each drawn among those of its label, or among all where there is none. They are the
    same in all rounds that release a batch."""
    public, draw = run.setting.dataset.val, generator(seed, "stand-ins", batch)
    rows = []
    for label in labels.tolist():
        alike = (public.labels == label).nonzero().flatten()
        count = len(alike) or len(public)
        place = int(torch.randint(count, (), generator=draw))
        rows.append(int(alike[place]) if len(alike) else place)
    return public.images[torch.tensor(rows, device=public.images.device)].to(run.world.device, torch.float32).div_(255)


def shuffled(update: Tensors, *, seed: int, batch: int, repeat: int = 0) -> Tensors:
    """Every tensor with its entries in another order, drawn from (seed, batch, repeat, name)."""
    found, again = {}, [repeat] if repeat else []
    for name, tensor in update.items():
        order = torch.randperm(tensor.numel(), generator=generator(seed, "shuffled", batch, *again, name)).to(tensor.device)
        found[name] = tensor.flatten()[order].view_as(tensor)
    return found


def _moved_statistics(
    run: Run, trained: Trained, snapshot: Snapshot, private: Tensors, images: Tensor, targets: Tensor, noise: Tensor | None
) -> Tensors:  # fmt: skip
    """What a client's passes over a batch, one for each step, change of the running statistics that it shares."""
    if not snapshot.statistics:
        return {}
    defence = trained.training.defence
    model, simulate = copy.deepcopy(defence.model), defence.simulator(terms=run.recipe.evaluation.released_loss, progress=snapshot.progress)()
    load_parameters(model, {name: tensor for name, tensor in {**private, **snapshot.statistics}.items() if not name.startswith(DECODER)})

    def move(weights: Tensors, some: Tensor, drawn: Tensor | None) -> None:
        load_parameters(model, {name: tensor for name, tensor in weights.items() if not name.startswith(DECODER)})
        with torch.no_grad(), moving(model):
            model(some, drawn)

    def step(weights: Tensors, known: Tensors, some: Tensor, their: Tensor, drawn: Tensor | None) -> Tensors:
        move(weights, some, drawn)
        return simulate(weights, known, some, their, drawn)

    if run.recipe.evaluation.release == "gradient":
        move(snapshot.params, images, noise)
    else:
        local_training(run.recipe.evaluation, step, moving=trained_names(trained))(snapshot.params, private, images, targets, noise)
    after = moving_statistics(model)
    return {name: after[name].detach() - tensor for name, tensor in snapshot.statistics.items()}


def _steps(evaluation: config.Evaluation) -> int:
    """Of all local epochs."""
    return evaluation.local_steps * evaluation.local_epochs if evaluation.release == "delta" else 1


def statistics_known(run: Run, trained: Trained, snapshot: Snapshot, attack: Any) -> Literal["batch", "running", "proxy", "none"]:
    """What an attack knows of BatchNorm's statistics: those of the victim's batch, which the change of the running ones tells where it leaves the client;
    the running ones that the server holds; estimates from public images; or nothing of use. See `config.GradInversion.statistics`."""
    asked, told = getattr(attack, "statistics", "released"), run.recipe.model.pretrained is not None
    if asked == "proxy":
        return "proxy" if norm_names(trained.training.defence.model) else "none"
    if asked != "none" and snapshot.statistics and (asked == "released" or told or snapshot.round > 0):
        return "batch" if asked == "released" else "running"
    return "running" if asked != "none" and trained.training.frozen and told else "none"


def read_off(run: Run, trained: Trained, snapshot: Snapshot, change: Tensors) -> Tensors:
    """The batch's statistics, without Bessel's correction, from the change of the running ones: "statistics.<layer>.mean" and ".var" (channels,).

        r' = (1 − μ)^U r + μ Σ_u (1 − μ)^(U − u) s_u,    s̄ = (r' − (1 − μ)^U r) / (1 − (1 − μ)^U)

    over U passes, one for each local step of every epoch: of several, their mean with these weights. With momentum None, r' = Σ_u s_u / U.
    """
    model, steps, size = trained.training.defence.model, _steps(run.recipe.evaluation), run.recipe.evaluation.batch_size * run.recipe.evaluation.local_epochs
    layers = {name: layer for name, layer in model.named_modules() if f"{name}.running_mean" in change}
    counts: dict[str, list[int]] = {name: [] for name in layers}
    probe = copy.deepcopy(model)
    for name in layers:
        probe.get_submodule(name).register_forward_pre_hook(lambda module, given, name=name: counts[name].append(given[0].numel() // module.num_features))
    with torch.no_grad():
        probe(torch.zeros((size // steps, *run.setting.dataset.image_shape), device=run.world.device))
    found: Tensors = {}
    for name, layer in layers.items():
        left = 0.0 if layer.momentum is None else (1 - layer.momentum) ** (steps * len(counts[name]))
        if not counts[name] or left == 1:  # a layer that is not used, or never moves
            continue
        for which, short in (("running_mean", "mean"), ("running_var", "var")):
            before = snapshot.statistics[f"{name}.{which}"]
            found[f"{STATISTICS}{name}.{short}"] = (before + change[f"{name}.{which}"] - left * before) / (1 - left)
        count = counts[name][0]
        found[f"{STATISTICS}{name}.var"] = found[f"{STATISTICS}{name}.var"] * ((count - 1) / count)
    return found


def _company(
    run: Run, trained: Trained, snapshot: Snapshot, sent: Callable[..., Any], *, owner: int, batch: int, seed: int
) -> tuple[Company, list[Tensors], list[Tensors]]:
    """The other clients of a batch's cohort, their updates, and the changes of their running statistics."""
    setting, size, device = run.setting, run.recipe.evaluation.batch_size, run.world.device
    draw = generator(seed, "victim-company", snapshot.name, batch)
    others = [client for client in torch.randperm(len(setting.clients), generator=draw).tolist() if client != owner]
    owners = sorted(others[: members(run, trained) - 1])
    images, labels, found = [], [], []
    for number in owners:
        client = setting.clients[number]
        rows = torch.randint(client.num_examples, (size,), generator=draw)
        images.append(client.images[rows.to(client.images.device)].to(device, torch.float32).div_(255))
        labels.append(client.labels[rows.to(client.labels.device)].to(device))
        table = trained.training.defence.frozen_noise(client, seed=seed)
        found.append(sent(number, images[-1], labels[-1], None if table is None else table[rows], f"{batch} beside {number}"))
    noises, privates, updates, moved = ([one[place] for one in found] for place in range(4))
    return Company(owners, torch.stack(images), torch.stack(labels), noises, privates), updates, moved


def trained_on(
    run: Run, trained: Trained, snapshot: Snapshot, images: Tensor, labels: Tensor, *, owner: int, private: Tensors, batch: int | str, seed: int, repeat: int = 0,
    public: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a victim's client computes its update of: its batch and the classes as probabilities, encoded where the defence encodes. public: with public
    images for partners, in the place of the client's."""
    defence, targets = trained.training.defence, F.one_hot(labels, run.setting.dataset.num_classes).to(images.dtype)
    if not defence.encoders:
        return images, targets
    held = {name: tensor for name, tensor in {**private, **snapshot.params}.items() if not name.startswith(DECODER)}
    draw = generator(seed, "victim-encode", snapshot.name, batch, *([repeat] if repeat else []))
    client, beside = run.setting.clients[owner], run.setting.dataset.val
    client = Client(client.id, beside.images, beside.labels) if public else client
    return defence.encode(images, targets, client=client, generator=draw, model=copy.deepcopy(defence.model), params=held)


def at_hand(run: Run, model: nn.Module, tensors: Tensors, images: Tensor, labels: Tensor) -> Own:
    """What a client looks at when it changes the update of these images."""
    evaluation, weights = run.recipe.evaluation, {name: tensor for name, tensor in tensors.items() if not name.startswith(DECODER)}
    return Own(model, weights, images, labels, lr=evaluation.local_lr if evaluation.release == "gradient" else None)


def changed(run: Run, trained: Trained, simulate: Simulate, *, seed: int) -> Simulate:
    """The simulator of an attacker who plays the client on public images: updates as they would leave, their changes drawn one after another,
    and those of the images, with public ones for partners.

    Not differentiable, nor fit for vmap; the simulator itself where nothing changes.
    """
    defence, public = trained.training.defence, run.setting.dataset.val
    if not defence.transforms and not defence.encoders:
        return simulate
    model, draws, mixes = copy.deepcopy(defence.model), generator(seed, "attacker's share"), generator(seed, "attacker's encode")
    pool = Client(-1, public.images, public.labels)

    def released(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        held = {name: tensor for name, tensor in {**known, **params}.items() if not name.startswith(DECODER)}
        images, labels = defence.encode(images, labels, client=pool, generator=mixes, model=model, params=held)
        own = at_hand(run, model, held, images, labels.argmax(1))
        return defence.share(simulate(params, known, images, labels, noise), generator=draws, own=own)

    return released


def _frozen(run: Run, trained: Trained, members: list[int], *, seed: int) -> Tensor | None:
    """The lifelong noise of some training images, where the defence freezes it."""
    drawn = []
    for row in members:
        client, position = run.setting.owner(row)
        table = trained.training.defence.frozen_noise(run.setting.clients[client], seed=seed)
        if table is None:
            return None
        drawn.append(table[position])
    return torch.stack(drawn)


def observations(
    run: Run, trained: Trained, snapshot: Snapshot, attack: config.NaiveMatching, victims: Victims, *, surrogate: Tensors | None = None,
    variances: Sequence[Tensors] | None = None,
) -> list[Observation]:
    """What a matching attack is given of each batch: the update it matches, the weights, and what its threat model grants.

    Tensors that the attack does not match are moved from `params` to `known`, so that its simulator need not return them:
    the naive attack leaves out the parameters of the noise and the decoder's, which its noise-free model does not have; the joint attack
    without the decoder matches the predictor alone; and those that adapt leave out what `hidden_names` says. The private front under `head` is the common initialisation for the naive attack, and the true one (a bound) for the joint one.
    An attack of one's own is given what the joint one is. variances: of the noise left in every entry of each batch's update, see `settled_releases`; None:
    what the changes of updates say of one release.

    Raises: ValueError if the attack guesses a private decoder and no `surrogate` is given: the true one must not stand in.
    """
    joint, asked = granted_as_joint(attack), decoder_of(attack)
    guessed = joint and asked == "surrogate"
    if guessed and surrogate is None and any(name.startswith(DECODER) for private in victims.private for name in private):
        raise ValueError("decoder=surrogate without the surrogate's tensors")
    training = trained.training
    hidden = hidden_names(trained, snapshot, attack)
    matched = [name for name in matched_names(trained, snapshot, attack) if name not in hidden]
    initial = training.defence.initial()
    params = {name: snapshot.params[name] for name in matched}  # one map for all, so that the engine keeps one copy
    rest = {name: tensor for name, tensor in snapshot.params.items() if name not in params}
    others = [name for name in ordered(trained, snapshot) if name not in params and (isinstance(attack, config.SkipLayers) or name in hidden)]
    told = isinstance(attack, config.GradInversion) and statistics_known(run, trained, snapshot, attack) == "batch"

    def trust(batch: int, update: Tensors) -> Tensors:
        if variances is not None:
            return trust_of({name: variances[batch][name] for name in update}, update)
        return trusted(training.defence.transforms, update) if adapts(attack) else {}

    found = []
    for batch, (private, update) in enumerate(zip(victims.private, victims.updates, strict=True)):
        labels = victims.all_labels(batch)
        if not joint:
            granted = {name: initial[name].to(run.world.device) for name in private if not name.startswith(DECODER)}
        else:
            everybody = [private, *(victims.company[batch].private if victims.company else ())]
            if own(attack) and asked == "unused":
                everybody = [{name: tensor for name, tensor in one.items() if not name.startswith(DECODER)} for one in everybody]
            granted = [{name: surrogate[name].to(t) if guessed and name.startswith(DECODER) else t for name, t in one.items()} for one in everybody]
            granted = {MEMBERS + name: torch.stack([one[name] for one in granted]) for name in granted[0]} if victims.company else granted[0]
        matched_update = {name: update[name] for name in matched}
        weights = trust(batch, matched_update)
        found.append(
            Observation(
                params=params,
                update=matched_update,
                num_examples=len(labels),
                kind=run.recipe.evaluation.release,
                labels=_granted_labels(attack, labels),
                known={**snapshot.statistics, **rest, **granted, **(read_off(run, trained, snapshot, victims.statistics[batch]) if told else {}), **(revealed(training.defence.transforms, matched_update, summed=training.defence.secure is not None) if adapts(attack) else {})},
                unmatched={name: update[name] for name in others},
                scaled=scale_told(trained, victims, batch),
                trust=weights,
                noise=_noise_of(run, trained, victims, batch, matched_update, weights) if adapts(attack) and variances is None else 0.0,
            )
        )
    return found


def _noise_of(run: Run, trained: Trained, victims: Victims, batch: int, update: Tensors, trust: Tensors) -> float:
    """See `Observation.noise`."""
    released = None if victims.company else victims.updates[batch]
    found = {"released": released, "stepped": stepped_variance(run.recipe.evaluation, trained.training.defence), "clients": members(run, trained)}
    return noise_share(trained.training.defence.transforms, update, trust, **found)


def stepped_variance(evaluation: config.Evaluation, defence: Defence) -> float:
    """Of the noise that one client's steps leave on an entry of what it releases, before that is changed: 0 without such noise, or behind Adam, of whose steps the
    law tells no variance.

        gradient  s²        delta of T steps of SGD with momentum μ  s² η² Σ_t ((1 − μ^t) / (1 − μ))²,  t = 1 … T

    with s of a step's images. That later gradients are taken where earlier noise led is left out of account.
    """
    if evaluation.release == "gradient":
        return defence.gradient_noise(evaluation.batch_size) ** 2
    level = defence.gradient_noise(evaluation.batch_size // evaluation.local_steps)
    if not level or evaluation.local_optimiser == "adam":
        return 0.0
    lasts = [sum(evaluation.local_momentum**k for k in range(t)) for t in range(1, _steps(evaluation) + 1)]
    return (level * evaluation.local_lr) ** 2 * sum(last**2 for last in lasts)


def scale_told(trained: Trained, victims: Victims, batch: int) -> bool:
    """Whether a batch's update has the scale that its clients' gradient or delta had, as far as the defence and all that left tell."""
    return trained.training.defence.keeps_scale(None if victims.company else victims.updates[batch])


def adapts(attack: Any) -> bool:
    """Whether an attack simulates the changes of an update: the naive one overlooks them, like the noise."""
    return isinstance(attack, (config.EotMatching, config.SkipLayers)) or granted_as_joint(attack)


def own(attack: Any) -> bool:
    """Whether it is an attack of one's own."""
    return callable(getattr(attack, "plan", None))


def granted_as_joint(attack: Any) -> bool:
    """Whether an attack matches what A3 does, by the same terms of the loss and with the same private parts: A3's kind, and one's own."""
    return isinstance(attack, config.JointMatching) or own(attack)


def decoder_of(attack: Any) -> Literal["known", "surrogate", "unused"]:
    """What an attack that is granted as A3 is does about a private decoder, see `config.JointMatching.decoder`; in one of one's own a field of this name may
    be anything else, and is then none of this."""
    asked = getattr(attack, "decoder", "known")
    return asked if asked in ("surrogate", "unused") else "known"


def places(run: Run, trained: Trained, attack: Any, *, progress: float) -> tuple[int, int]:
    """(local batches, clients) among which it makes a difference to an attack that simulates the update where a label lies; 1 where it makes none.

    Of one gradient of each client it makes none where the simulated one is the mean of those of the client's images, by the same weights for all clients.
    """
    evaluation, defence, count = run.recipe.evaluation, trained.training.defence, members(run, trained)
    if not (isinstance(attack, config.NaiveMatching) or own(attack)):
        return 1, 1
    local = evaluation.release == "delta" and not isinstance(attack, config.SurrogateModel)
    batches = evaluation.local_steps if local else 1
    told = terms(run, trained, attack, progress=progress)
    apart = trained.training.participation.moves_statistics or (local and config.is_more_than_a_step(evaluation))
    if adapts(attack):
        apart |= defence.couples_images(told, progress) or not all(getattr(one, "linear", False) for one in defence.transforms)
    if granted_as_joint(attack) and progress > 0:  # before training, what clients keep is the same for all
        decoders = keeps_decoder(run, trained) and told == "client" and decoder_of(attack) == "known" and defence.needs_decoder(progress)
        apart |= decoders or not trained_names(trained) <= set(trained.training.shared)
    return batches, count if apart else 1


def dealt(run: Run, trained: Trained, attack: Any, *, progress: float) -> tuple[int, int]:
    """The `places` to which an attack deals labels of which it does not know where they lie; 1 where it knows, or searches them with the images."""
    guessed = getattr(attack, "labels", "known") in ("counts", "recovered", "soft")
    return places(run, trained, attack, progress=progress) if guessed else (1, 1)


def _granted_labels(attack: config.NaiveMatching, labels: Tensor) -> Tensor | None:
    """What the threat model grants: the private images' classes, also where soft labels are trained on; of counts, the order within the batch,
    over the local steps and over the clients of a sum stays unknown (`dealt`)."""
    if attack.labels == "counts":
        return labels.sort().values
    return labels if attack.labels == "known" else None


def matched_names(trained: Trained, snapshot: Snapshot, attack: Any) -> list[str]:
    """Released tensors that an attack matches, the classifier's last, where label recovery looks for them."""
    defence, names = trained.training.defence, ordered(trained, snapshot)
    if granted_as_joint(attack):
        return [name for name in names if name in set(defence.model.parts["predictor"])] if decoder_of(attack) == "unused" else names
    match attack:
        case config.SkipLayers():
            return [name for name in names if name in set(defence.model.parts["encoder"])]
        case config.EotMatching():
            return [name for name in names if not name.startswith(DECODER)]
    layer = defence.model.perturbation
    noise = tuple("perturbation." + prefix for prefix in layer.noise_only) if layer is not None else ()
    return [name for name in names if not name.startswith((*noise, DECODER))]


def hidden_names(trained: Trained, snapshot: Snapshot, attack: Any) -> set[str]:
    """Of `matched_names`, those that an attack which adapts leaves out, as what was done to them can be neither seen nor simulated; none where no matrix
    or kernel would be left."""
    defence = trained.training.defence
    hidden = left_out(defence.transforms, defence.model, summed=defence.secure is not None) if adapts(attack) else set()
    if not hidden:
        return hidden
    matched = matched_names(trained, snapshot, attack)
    rest = any(snapshot.params[name].ndim > 1 for name in matched if name not in hidden)
    return hidden.intersection(matched) if rest else set()


def ordered(trained: Trained, snapshot: Snapshot) -> list[str]:
    """Released tensors in the model's order, what is no backbone's first."""
    order = {name: place for place, name in enumerate(trained.training.defence.initial())}
    return sorted(snapshot.params, key=lambda name: (name.startswith("backbone."), order[name]))


def keeps_decoder(run: Run, trained: Trained) -> bool:
    """Whether clients have a decoder that the server does not see."""
    return trained.training.defence.decoder is not None and run.recipe.share_policy != "all"


def terms(run: Run, trained: Trained, attack: Any, *, progress: float) -> str:
    """Which of the client's loss terms an attack simulates: the naive one cross-entropy only, the joint one and one's own what was released; A1, and A5 by
    matching, that too, but where a decoder is in it that stays with the client. progress: share of the rounds that were over at the release."""
    released = run.recipe.evaluation.released_loss
    if granted_as_joint(attack):
        return "utility" if decoder_of(attack) == "unused" else released
    hidden = keeps_decoder(run, trained) and trained.training.defence.needs_decoder(progress)
    return released if isinstance(attack, (config.EotMatching, config.ReadLatent)) and not hidden else "utility"
