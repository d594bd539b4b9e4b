"""From an attack's dataclass to what the engine runs: observations, a simulator, settings. One `match` over the attacks that match gradients.

An attack of one's own is a dataclass with a method `plan(case) -> Plan`; see the README. It is granted what A3 is, private parts of the client included,
which make it a bound; a field `decoder` says otherwise of the decoder, as A3's.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from gidef import attack as attacks
from gidef import config, observe
from gidef.attack import Matching, Searched, Simulate
from gidef.attack.labels import LocalSteps
from gidef.attack.latent import match_latent, read_latent
from gidef.attack.matching import HELD, Point, Unordered
from gidef.attack.optimisers import Adam
from gidef.attack.predictor import Predictor
from gidef.attack.priors import Prior, bn_statistics, decoder_aware, proxy_statistics
from gidef.attack.row_spaces import ROWS, row_spaces, within_rows
from gidef.attack.simulate import DRAWS, MEMBERS, along, of_round
from gidef.attack.starts import STARTS, from_images
from gidef.attack.surgery import STATISTICS, batch_statistics, norm_names, prepare, running_statistics
from gidef.clients.participate import DECODER
from gidef.defence.encode import ENCODED, searched_of
from gidef.defence.share import SEEN
from gidef.errors import InputError
from gidef.metrics.bounds import class_means, mean_image
from gidef.models.bottleneck import Bottleneck
from gidef.rng import generator, stream_seed
from gidef.runs import Run, Snapshot, Trained
from gidef.types import Observation, Tensors

PUBLIC = 512
"""Public images, at most, of which statistics are estimated."""
READING = 400
"""Iterations of the search for a latent where none can be written down."""
PLACE, SHARE, BACKWARD = "read/place", "read/share", "read/backward"
"""In `known`, of attacks that read: the latent, or where the noise leads to; 1 where that was read, else 0; ∂ cross-entropy / ∂ latent there."""
READ = 1e-4
"""Cosine distance from the predictor's gradient up to which a latent counts as read."""
ALIKE = 0.1
"""Relative distance up to which two searches for a latent have found the same."""
SMOOTHER = 10 / 3
"""Where `ReadLatent` holds candidates to row spaces, what its weight of the total variation is multiplied by. Small net, synthetic cells of 16 px, 200 iterations,
undefended in batches of 8 before and after training and of 16 after: 19.2, 18.2 and 14.8 dB without, 29.1, 27.3 and 22.3 with, where A0 has 18.1 and 13.9 after training, and
with as much of it 23.7 and 18.2; BiDO in batches of 4 23.1 and 31.1, where A3 has 29.1 with as much."""
CODES, TIGHTNESS = f"{HELD}images", f"{HELD}weight"
"""Of `GenerativePrior` under noise on updates: the images of its codes, and the weight of a candidate's distance to them."""
MIXTURE = "mixture"
"""Of `MultiRound` against mixtures: a round's own."""
LENGTH = 0.1
"""There, what the length of an update weighs beside its direction, which leaves the labels' shares open up to a factor. MixUp (α = 1), untrained small net, batch 1,
4 synthetic cells of 16 px, 4 rounds, 250 iterations: 25.5 dB without, 27.7 with."""
REST = 0.05
"""Standard deviation, in pixels' units, of what a generator is taken to leave of a private image. Untrained small net, batch 1, 3 synthetic cells of 16 px, 200
iterations, `AddNoise` of std 1 and 0.1: at 0.05 23.1 and 29.1 dB, at 0.1 22.7 and 29.3, without a law 21.8 and 29.6."""
SNAPSHOTS = 8
"""Candidates on the way that are kept of every attack, for the evaluator's curves."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine is given. refine: settings of a second stage, which starts where the first one ended; None for none.
    note: what was found on the way to it, for the attack's row.  read: observations whose latent was read first; None for attacks that read none."""

    observations: list[Observation]
    make_simulate: Callable[[], Simulate]
    matching: Matching
    refine: Matching | None = None
    note: str = ""
    read: int | None = None

    @property
    def stages(self) -> list[Matching]:
        return [self.matching] if self.refine is None else [self.matching, self.refine]

    @property
    def whole(self) -> Matching:
        """Settings with the iterations and snapshots of all stages."""
        iterations, snapshots = (sum(getattr(stage, name) for stage in self.stages) for name in ("iterations", "snapshots"))
        return dataclasses.replace(self.stages[-1], iterations=iterations, snapshots=snapshots)


@dataclass(frozen=True, slots=True)
class Case:
    """All that an attack is given. The private images are in none of it, nor can they be reached from it.

    attack: its dataclass.  rounds: observations of every batch, one list per release of the same batches; most attacks see one, as does
    A9 of releases that settle (`observe.settles`).
    simulator, gradient: factories of simulators of what was released, of the loss terms that this attack simulates (`observe.terms`), and of
    one gradient of the cross-entropy.  step, released: the first one's two halves, a factory of simulators of one pass's gradient, and what makes of such a
    factory one of what was released.  noise_shape: of one observation's noise, or None.  draw_noise(count, generator=…): as the client draws it,
    (count, *latent_shape).  model, decoder: architectures, with the weights that training began with.
    fitted: what was trained on public images for this attack: "surrogate" (the decoder's tensors), "generator" (a module); and "latents", what
    `latents_of` read of each observation, where that was done beforehand.
    """

    attack: Any
    rounds: list[list[Observation]]
    simulator: Callable[[], Simulate]
    gradient: Callable[[], Simulate]
    step: Callable[[], Simulate]
    released: Callable[[Callable[[], Simulate]], Callable[[], Simulate]]
    image_shape: tuple[int, int, int]
    num_classes: int
    noise_shape: tuple[int, ...] | None
    latent_shape: tuple[int, ...] | None
    draw_noise: Callable[..., Tensor | None]
    model: nn.Module
    decoder: nn.Module | None
    seed: int
    fitted: Mapping[str, Any] = field(default_factory=dict)
    searched: Mapping[str, Searched] = field(default_factory=dict)
    """Of what the client did to its images and labels, where the attack adapts; `simulator` looks for them in `known`."""
    statistics: Literal["batch", "running", "proxy", "none"] = "none"
    """What is known of BatchNorm's statistics, see `observe.statistics_known`."""
    moves_statistics: bool = False
    """Whether the client normalises by its batches."""
    steps: int = 1
    """Local steps of one epoch behind a release."""
    epochs: int = 1
    """Local epochs behind it, over the same batches."""
    members: int = 1
    """M, clients in an observed update, whose images stand one client after another."""
    dealt: tuple[int, int] = (1, 1)
    """Local batches and clients to which labels are dealt by guess, see `observe.dealt`."""
    local: LocalSteps | None = None
    """What is told of all of them where the release is a delta of SGD."""
    keeps_noise: bool = False
    """Whether all releases of an image have the same noise on the latent."""
    public: Tensor | None = None
    """Public images (n, C, H, W) in [0, 1], for an attack that estimates statistics."""
    readable: bool = True
    """Whether the predictor's gradient is that of the cross-entropy alone, of which latents are read."""
    mixes: Any = None
    """The client's encoder, where A9 takes its mixtures apart (`observe.taken_apart`)."""
    means: Tensor | None = None
    """There, of public images by class, (K, C, H, W)."""

    @property
    def observations(self) -> list[Observation]:
        """Of the first release."""
        return self.rounds[0]

    def fields(self, **changes: Any) -> dict[str, Any]:
        """The attack's own fields as settings of the engine, with changes."""
        fields = {spec.name for spec in dataclasses.fields(Matching)}
        own = {spec.name: getattr(self.attack, spec.name) for spec in dataclasses.fields(self.attack) if spec.name in fields}
        if "tv" in own:
            own["tv"] = config.weight_of_variation(self.attack, noise=self.noise_shape is not None)
        if getattr(self.attack, "soft_sign", False):
            own["signed"] = "soft"
        sign = {False: "none", True: "hard"}.get(own.get("signed", False), "soft")
        over = own["iterations"] if sign == "soft" and getattr(self.attack, "sharpening", False) else None
        if (langevin := getattr(self.attack, "langevin", 0.0)) or over is not None:
            own["optimiser"] = Adam(sign=sign, soft_over=over, langevin=langevin)
        granted = getattr(self.attack, "labels", "known")
        own |= {name: True for name, asked in (("search_labels", "searched"), ("soft_labels", "soft")) if granted == asked}
        common = {"image_shape": self.image_shape, "num_classes": self.num_classes, "snapshots": SNAPSHOTS, "searched": self.searched, "local": self.local}
        common["unordered"] = self.unordered()
        return {**common, **own, **changes}

    def unordered(self) -> Unordered | None:
        """How the labels lie over the local batches and clients, where nobody granted it and it makes a difference."""
        batches, clients = self.dealt
        return Unordered(batches=batches, clients=clients, latent_dims=len(self.latent_shape or ())) if batches * clients > 1 else None

    def matching(self, **changes: Any) -> Matching:
        return Matching(**self.fields(**changes))


def make_case(
    run: Run, trained: Trained, snapshot: Snapshot, attack: Any, releases: list[observe.Victims], *, seed: int, fitted: Mapping[str, Any] | None = None
) -> Case:
    """What an attack is given of the victims' releases, as its threat model grants it. The last place that sees both sides."""
    defence, fitted, recipe = trained.training.defence, dict(fitted or {}), run.recipe
    variances = None
    if isinstance(attack, config.MultiRound) and len(releases) > 1 and observe.settles(run, trained):
        release, variances = observe.settled_releases(releases)
        releases = [release]
    seen = [observe.observations(run, trained, snapshot, attack, release, surrogate=fitted.get("surrogate"), variances=variances) for release in releases]
    model, decoder = (copy.deepcopy(module) for module in (defence.model, defence.decoder))
    unknowns = searched_of(defence.encoders, run.setting.dataset.image_shape, recipe.evaluation.batch_size) if observe.adapts(attack) else {}
    mixes = observe.taken_apart(trained, attack)
    step = defence.simulator(terms=observe.terms(run, trained, attack, progress=snapshot.progress), progress=snapshot.progress)
    alone, cohort = observe.released_of(run, trained, adaptive=observe.adapts(attack)), observe.cohort_of(run, trained)

    def released(make: Callable[[], Simulate]) -> Callable[[], Simulate]:
        return cohort(alone(make))

    return Case(
        attack=attack, rounds=seen, simulator=released(step), step=step, released=released,
        gradient=observe.cohort_simulator(run, trained, _without(defence.simulator(terms="utility", progress=snapshot.progress), SEEN, ENCODED), stepped=False),
        members=observe.members(run, trained), dealt=observe.dealt(run, trained, attack, progress=snapshot.progress), image_shape=run.setting.dataset.image_shape,
        num_classes=run.setting.dataset.num_classes, noise_shape=observe.noise_shape(run, trained, members=observe.members(run, trained)), latent_shape=defence.noise_shape,
        draw_noise=defence.draw_noise, model=model, decoder=decoder, seed=seed, fitted=fitted,
        searched={name: Searched(**dataclasses.asdict(one)) for name, one in unknowns.items()},
        statistics=observe.statistics_known(run, trained, snapshot, attack), moves_statistics=trained.training.participation.moves_statistics,
        steps=recipe.evaluation.local_steps, epochs=recipe.evaluation.local_epochs, local=_declared(recipe.evaluation),
        readable=observe.cross_entropy_behind(run, trained), mixes=mixes, means=None if mixes is None else _class_means(run),
        keeps_noise=observe.keeps_noise(run, trained), public=_public(run, seed=seed) if getattr(attack, "statistics", "") == "proxy" else None,
    )  # fmt: skip


def _class_means(run: Run) -> Tensor:
    """Of the validation split, (K, C, H, W) on the device; of a class that has no image there, of all."""
    public, count = run.setting.dataset.val, run.setting.dataset.num_classes
    images, labels = public.images.to(run.world.device, torch.float32) / 255, public.labels.to(run.world.device)
    there = labels.unique()
    means = mean_image(images, count)
    means[there] = class_means(images, labels, there)
    return means


def _declared(evaluation: config.Evaluation) -> LocalSteps | None:
    """What label recovery is told of the local training: steps along gradients, which Adam's are not."""
    if evaluation.release == "gradient" or evaluation.local_optimiser == "adam":
        return None
    return LocalSteps(lr=evaluation.local_lr, steps=evaluation.local_steps * evaluation.local_epochs, momentum=evaluation.local_momentum)


def _public(run: Run, *, seed: int) -> Tensor:
    """Some of the validation split, on the device."""
    images = run.setting.dataset.val.images
    some = torch.randperm(len(images), generator=generator(seed, "public images for statistics"))[:PUBLIC]
    return images[some].to(run.world.device, torch.float32) / 255


def plan(case: Case) -> Plan:
    """The plan of an attack that matches gradients. Candidates on the way are kept in both stages by their shares of the iterations."""
    made = _planned(case)
    if made.refine is None or made.refine.snapshots != made.matching.snapshots or made.matching.snapshots < 2:
        return made
    total = made.matching.snapshots
    first = round(total * made.matching.iterations / max(1, made.whole.iterations))
    first = min(max(first, 1), total - 1)
    return dataclasses.replace(
        made, matching=dataclasses.replace(made.matching, snapshots=first), refine=dataclasses.replace(made.refine, snapshots=total - first)
    )


def _planned(case: Case) -> Plan:
    attack = case.attack
    if callable(getattr(attack, "plan", None)):
        return attack.plan(case)
    seen, make = case.observations, case.simulator
    match attack:
        case config.DeepLeakage():
            return Plan(seen, _noise_free(make), attacks.deep_leakage(history=attack.history, **case.fields(search_labels=attack.labels == "searched")))
        case config.GradInversion():
            own = {name: getattr(attack, name) for name in ("pixel_norm", "group", "max_shift", "statistics_weight", "langevin")}
            prior, copy_of_thread = _statistics(case)
            if prior is not None:
                make = _beside_statistics(make, copy_of_thread)
            return Plan(seen, _noise_free(make), attacks.gradinversion(**own, statistics=prior, **case.fields()))
        case config.ModernInvertingGradients():
            return Plan(seen, _noise_free(make), attacks.modern_inverting_gradients(opponents=attack.opponents, sharpening=attack.sharpening, **case.fields()))
        case config.EotMatching():
            return Plan(seen, lambda: attacks.averaged(make()), case.matching(drawn={DRAWS: lambda draw: _draws(case, attack.samples, draw)}))
        case config.SurrogateModel():
            alpha = Searched(start=0.5, lr=attack.alpha_lr, low=0.0, high=1.0)
            seen = [attacks.with_final_weights(one) for one in seen]
            return Plan(seen, lambda: attacks.surrogate_model(attacks.without_noise(case.gradient())), case.matching(searched={"alpha": alpha}))
        case config.MultiRound() if len(case.rounds) < attack.rounds:  # they settled
            return Plan(seen, make, case.matching(noise_shape=case.noise_shape))
        case config.MultiRound():
            return _multi_round(case, make) if case.mixes is None else _unmixed(case, make)
        case config.GenerativePrior():
            return _generative(case, seen, make)
        case config.DecoderAware():
            return _decoder_aware(case, seen, make)
        case config.ReadNoise():
            return _read_noise(case, seen)
        case config.ReadLatent():
            return _read_latent(case, seen, _noise_free(make))
        case config.JointMatching():
            return Plan(seen, make, case.matching(noise_shape=case.noise_shape))
    return Plan(seen, _noise_free(make), case.matching())


def _multi_round(case: Case, make: Callable[[], Simulate], **searched: Searched) -> Plan:
    """A9: one candidate for all rounds, and in each what the client draws and what else is searched."""
    rounds, shape, kept = case.attack.rounds, case.noise_shape, case.keeps_noise
    merged = [attacks.merge_rounds(batch) for batch in zip(*case.rounds, strict=True)]
    every = {f"{number}/{name}": one for number in range(rounds) for name, one in {**case.searched, **searched}.items()}
    matching = case.matching(distance=attacks.rounds_apart, noise_shape=shape if shape is None or kept else (rounds, *shape), searched=every)
    return Plan(merged, lambda: attacks.multi_round(make(), rounds, keeps_noise=kept), matching)


def _unmixed(case: Case, make: Callable[[], Simulate]) -> Plan:
    """A9 of mixtures: each round's is searched by itself, as by A3. The candidate has no part in the match: it is drawn to what the mixtures tell together."""
    attack, encoder, means, size = case.attack, case.mixes, case.means, case.observations[0].num_examples

    def made() -> Simulate:
        simulate = make()

        def of_mixture(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
            return simulate(params, {name: tensor for name, tensor in known.items() if name != MIXTURE}, known[MIXTURE], labels, noise)

        return of_mixture

    def apart(point: Point) -> Tensor:
        mixtures, labels = [], []
        for number in range(attack.rounds):
            own = {name: tensor.detach() for name, tensor in of_round(point.known, number).items()}
            prefix = f"{ENCODED}0/"
            found = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
            mixtures.append(own[MIXTURE])
            labels.append(encoder.imitate(own[MIXTURE], point.labels, found)[1] if found else point.labels)
        told = encoder.unmixed(torch.stack(mixtures), torch.stack(labels), point.labels, means.to(point.images))
        return (point.images - told).square().mean()

    smooth = float(getattr(encoder, "smooth", True)) / attack.rounds  # the distance is a mean over rounds
    mixture = Searched(shape=(size, *case.image_shape), start=STARTS[attack.start], lr=attack.lr, low=0.0, high=1.0, smooth=smooth)
    plan = _multi_round(case, made, **{MIXTURE: mixture})
    changes: dict[str, Any] = {"priors": ((1.0, apart),)}
    if all(one.scaled for one in plan.observations):
        changes["distance"] = functools.partial(attacks.rounds_apart, length=LENGTH)
    return dataclasses.replace(plan, matching=dataclasses.replace(plan.matching, **changes))


def _noise_free(make: Callable[[], Simulate]) -> Callable[[], Simulate]:
    return lambda: attacks.without_noise(make())


def _without(make: Callable[[], Simulate], *prefixes: str) -> Callable[[], Simulate]:
    """Of simulators to whose `known` these names mean nothing: they are left out of it."""

    def own(known: Tensors) -> Tensors:
        return {name: tensor for name, tensor in known.items() if not name.startswith(prefixes)}

    def made() -> Simulate:
        simulate = make()

        def plain(params: Tensors, known: Tensors, *rest: Any) -> Tensors:
            return simulate(params, own(known), *rest)

        if hasattr(simulate, "loss"):
            plain.loss = lambda params, known, *rest: simulate.loss(params, own(known), *rest)
        return plain

    return made


def _beside_statistics(make: Callable[[], Simulate], copy_of_thread: Callable[[], nn.Module]) -> Callable[[], Simulate]:
    """Of simulators whose `known` may hold a batch's statistics, which no network has under such names. With each the thread's copy for the prior is
    made: once a program is recorded, it is too late."""
    plain = _without(make, STATISTICS)

    def made() -> Simulate:
        simulate, _ = plain(), copy_of_thread()
        return simulate

    return made


def _statistics(case: Case) -> tuple[Prior | None, Callable[[], nn.Module]]:
    """GradInversion's prior on the statistics of BatchNorm's inputs, None where nothing of use is known, or no layer's statistics are; and the copy of the
    network, one a thread, that it runs.

    Of several local steps the candidate's are the mean over its slices, by the weights with which the running ones keep them (in every epoch
    in the same proportions), at the server's weights; of a sum of clients, that over all of them.
    """
    train = case.statistics == "batch" or case.moves_statistics
    mine = _per_thread(lambda: prepare(case.model, batch_norm="train" if train else "eval")[0])
    names, known = norm_names(case.model), case.observations[0].known
    if case.statistics == "none":
        return None, mine
    wanted = [place for place, name in enumerate(names) if case.statistics in ("running", "proxy") or f"{STATISTICS}{name}.mean" in known]
    if not wanted:
        return None, mine
    momenta = [case.model.get_submodule(names[place]).momentum or 0.0 for place in wanted]
    weights = [[(1 - momentum) ** (case.steps - 1 - step) for step in range(case.steps)] * case.members for momentum in momenta]

    def of_a_pass(params: Tensors, known: Tensors, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = batch_statistics(mine(), params, images, known)
        return [found[place] for place in wanted]

    def statistics_of(params: Tensors, known: Tensors, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        each = [of_a_pass(params, known, part) for part in images.split(len(images) // (case.members * case.steps))]
        return [
            tuple(sum(w * one[place][which] for w, one in zip(own, each, strict=True)) / sum(own) for which in range(2))
            for place, own in enumerate(weights)
        ]

    if case.statistics == "proxy":
        first = case.observations[0]
        found = proxy_statistics(of_a_pass, first.params, first.known, case.public, batch_size=first.num_examples // (case.members * case.steps))
        return bn_statistics(statistics_of, found, source="proxy"), mine

    def target(params: Tensors, known: Tensors) -> list[tuple[Tensor, Tensor]]:
        if case.statistics == "running":
            return running_statistics(mine(), known)
        return [(known[f"{STATISTICS}{names[place]}.mean"], known[f"{STATISTICS}{names[place]}.var"]) for place in wanted]

    return bn_statistics(statistics_of, target, source=case.statistics), mine


def _draws(case: Case, samples: int, draw: torch.Generator) -> Tensor:
    """Noise as the client draws it: (samples, *noise_shape)."""
    each = case.noise_shape[: len(case.noise_shape) - len(case.latent_shape)]
    return case.draw_noise(samples * math.prod(each), generator=draw).view(samples, *case.noise_shape)


def _per_thread(make: Callable[[], Any]) -> Callable[[], Any]:
    """A module of each thread's own: functional calls swap a module's tensors while they last."""
    own = threading.local()

    def mine() -> Any:
        if not hasattr(own, "made"):
            own.made = make()
        return own.made

    return mine


def _decoder_aware(case: Case, seen: list[Observation], make: Callable[[], Simulate]) -> Plan:
    """A6: A3 with a prior towards D(z̃(x)), if asked from D's output of the latent that A5 reads."""
    frozen = [copy.deepcopy(module).requires_grad_(False).eval() for module in (case.model, case.decoder)]
    frozen[0].train(case.moves_statistics)
    mine = _per_thread(lambda: copy.deepcopy(frozen))
    names = {*frozen[0].state_dict(), *frozen[1].state_dict(prefix=DECODER)}

    def decode(params: Tensors, known: Tensors, images: Tensor, noise: Tensor | None) -> Tensor:
        if case.members == 1:
            return of_one(params, known, images, noise)
        stepped = noise is not None and noise.ndim > len(case.latent_shape) + 1
        images, noises = images.chunk(case.members), [None] * case.members if noise is None else noise.chunk(case.members, dim=1 if stepped else 0)
        every = [{**known, **{name.removeprefix(MEMBERS): t[k] for name, t in known.items() if name.startswith(MEMBERS)}} for k in range(case.members)]
        return torch.cat([of_one(params, own, *pair) for own, *pair in zip(every, images, noises, strict=True)])

    def of_one(params: Tensors, known: Tensors, images: Tensor, noise: Tensor | None) -> Tensor:
        model, decoder = mine()
        every = {name: tensor for name, tensor in {**known, **params}.items() if name in names}  # not what updates reveal, nor what is searched
        weights = {name: tensor for name, tensor in every.items() if not name.startswith(DECODER)}
        epochs = 1
        if noise is not None and noise.ndim > len(case.latent_shape) + 1:  # local steps: one image after another, in every epoch that has its own noise
            noise = noise.flatten(0, 1)
            epochs = len(noise) // len(images)
        perturbed = functional_call(model, weights, (images.repeat(epochs, 1, 1, 1), noise), {"full": True}).perturbed
        own = {name.removeprefix(DECODER): tensor for name, tensor in every.items() if name.startswith(DECODER)}
        return functional_call(decoder, own, (perturbed,)).clamp(0, 1).unflatten(0, (epochs, -1)).mean(0)

    matching = case.matching(noise_shape=case.noise_shape, priors=((case.attack.closeness, decoder_aware(decode)),))
    return Plan(seen, make, matching if case.attack.begin == "drawn" else dataclasses.replace(matching, start=_decoded(case, seen, lambda: mine()[1])))


def _decoded(case: Case, seen: list[Observation], decoder: Callable[[], nn.Module]) -> Callable[[int, int], tuple[Tensor, None]]:
    """A start at D's output of each observation's latent, read by whoever attacks it first; the restarts beside it are `from_images`'."""
    adam = case.observations[0].kind == "delta" and case.local is None
    if case.steps * case.epochs > 1 or adam or case.attack.labels not in ("known", "recovered"):
        raise InputError('begin="decoded" reads a latent from one gradient whose labels are known or recovered: set begin="drawn", or evaluation to one local step of sgd.')
    lock, starts = threading.Lock(), {}

    def start(observation: int, restart: int) -> tuple[Tensor, None]:
        with lock:
            if observation not in starts:
                one = seen[observation]
                own = {n.removeprefix(DECODER): t.float() for n, t in {**one.known, **one.params}.items() if n.startswith(DECODER)}
                latents, *_ = latents_of(case, one, observation)
                with torch.no_grad():
                    images = functional_call(decoder(), own, (latents,)).clamp(0, 1)
                starts[observation] = from_images([images], seed=stream_seed(case.seed, "decoded", observation))
            return starts[observation](0, restart)

    return start


def latents_of(case: Case, one: Observation, number: int) -> tuple[Tensor, float, Tensor]:
    """What `reading` returns."""
    return attacks.drain(reading(case, one, number))


def reading(case: Case, one: Observation, number: int) -> Generator[float, None, tuple[Tensor, float, Tensor]]:
    """Reads float32 (B, *latent) on the observation's device, as A5 does, how far from the predictor's gradient its own is, and the labels int64 (B,) on the CPU it
    was read with; yields the share that is over. number: the observation's, from which it draws. ∞ without a search where the case is not `readable`.

    A latent that is to be matched itself (`ReadLatent`) has to be told, not only explain the gradient: where nothing but a search has found it, one from
    another start must find the same, within ALIKE, or it is as far as any, ∞. Behind a pooling layer, or of a ViT's tokens, starts differ by what stays as it began.
    """
    whole = {"params": {name: one.known[name] for name in one.unmatched} | one.params, "update": one.update | one.unmatched}
    predictor, device = Predictor(case.model, local=case.local), next(iter(one.params.values())).device
    if not case.readable:
        return torch.zeros(one.num_examples, *predictor.latent_shape, device=device), math.inf, torch.zeros(one.num_examples, dtype=torch.int64)
    seen, common = [dataclasses.replace(one, **whole)], {"iterations": READING, "device": device, "numbers": [number]}
    matched = yield from read_latent(seen, predictor, seed=case.seed, **common)
    latents, loss = matched.latents[0], float(matched.loss[0])
    if isinstance(case.attack, config.ReadLatent) and loss <= READ and bool(matched.free[0]):
        again = match_latent(seen, predictor, seed=stream_seed(case.seed, "again"), **common)
        while True:
            try:
                next(again)
            except StopIteration as end:
                other = end.value.latents[0].double()
                break
            yield 1.0
        loss = loss if float((other - latents).norm()) <= ALIKE * float(latents.norm()) else math.inf
    return latents.to(device, torch.float32), loss, matched.labels[0]


def _read_noise(case: Case, seen: list[Observation]) -> Plan:
    """A3 in which z̃ is read first, of every local step. Where it was, the noise is a function of the candidate and of the weights that it meets, and what lies behind it is
    matched already: there both sides are nought."""
    frozen = copy.deepcopy(case.model).requires_grad_(False).eval()
    frozen.train(case.moves_statistics)
    mine = _per_thread(lambda: copy.deepcopy(frozen))
    names, perturbation = set(frozen.state_dict()), frozen.perturbation
    behind = {*frozen.parts["predictor"], *(name for name in names if name.startswith("perturbation.back."))}

    def told(one: Observation, latents: Tensor, loss: float, labels: Tensor) -> Observation:
        weights = {name: tensor for name, tensor in {**one.known, **one.params}.items() if name in names}
        place = _code(latents, weights, perturbation.channel_dim) if isinstance(perturbation, Bottleneck) else latents
        return _with_place(one, place, labels, behind, read=loss <= READ)

    def step() -> Simulate:
        gradient, model = case.step(), mine()

        def with_noise_read(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, place: Tensor) -> Tensors:
            share = known[SHARE]
            known = {name: tensor for name, tensor in known.items() if name != SHARE}
            weights = {name: tensor for name, tensor in {**known, **params}.items() if name in names}
            out = functional_call(model, weights, (images, torch.zeros_like(place)), {"full": True})
            leading = (place - out.latent) / out.std.clamp(min=torch.finfo(place.dtype).tiny ** 0.5)
            return gradient(params, known, images, labels, share * leading + (1 - share) * place)

        return with_noise_read

    def made() -> Simulate:
        simulate = case.released(step)()

        def released(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor) -> Tensors:
            share, place = known[SHARE], known[PLACE].view_as(noise)
            known = {name: tensor for name, tensor in known.items() if name != PLACE}
            update = simulate(params, known, images, labels, share * place + (1 - share) * noise)  # in the noise's place, what it is to lead to
            return {name: tensor * (1 - share) if name in behind else tensor for name, tensor in update.items()}

        return released

    each = [told(one, *found) for one, found in zip(seen, _read(case, seen), strict=True)]
    return Plan(each, made, case.matching(noise_shape=case.noise_shape), **_read_in(each, "its noise is searched, as by A3"))


def _read(case: Case, seen: list[Observation]) -> list[tuple[Tensor, float, Tensor]]:
    """What `latents_of` reads of every observation."""
    return case.fitted.get("latents") or [latents_of(case, one, number) for number, one in enumerate(seen)]


def _with_place(one: Observation, place: Tensor, labels: Tensor, behind: set[str], *, read: bool) -> Observation:
    """With what was read in `known`, and, where it counts as read, without the part of the update that it explains."""
    share = place.new_tensor(float(read))
    update = {name: tensor * (1 - share) if name in behind else tensor for name, tensor in one.update.items()}
    granted = labels if read and one.labels is None else one.labels  # what they would be recovered from is nought there
    return dataclasses.replace(one, update=update, labels=granted, known={**one.known, PLACE: place, SHARE: share})


def _read_in(each: list[Observation], otherwise: str) -> dict[str, Any]:
    """Of a plan: in how many observations the latent was read, and a note of it."""
    count = sum(int(one.known[SHARE]) for one in each)
    return {"read": count, "note": f"the latent was read in {count} of {len(each)} observations" + ("" if count == len(each) else f"; in the others {otherwise}")}


def _read_latent(case: Case, seen: list[Observation], make: Callable[[], Simulate]) -> Plan:
    """A5 by matching. Where z was read, the front's gradient at z is matched, a function of ∂L/∂z there, and what lies behind left out on both sides."""
    frozen = copy.deepcopy(case.model).requires_grad_(False).eval()
    frozen.train(case.moves_statistics)
    mine, predictor = _per_thread(lambda: copy.deepcopy(frozen)), Predictor(case.model, local=case.local)
    names, behind = set(frozen.state_dict()), {*frozen.parts["predictor"]}

    def latent(params: Tensors, known: Tensors, images: Tensor) -> Tensor:
        weights = {name: tensor for name, tensor in {**known, **params}.items() if name in names}
        return functional_call(mine(), weights, (images, None), {"full": True}).latent

    def told(one: Observation, latents: Tensor, loss: float, labels: Tensor) -> Observation:
        targets = F.one_hot(labels, case.num_classes).to(latents)
        weights = {name: tensor.float() for name, tensor in {**one.known, **one.params}.items() if name in behind}
        predictor.to(latents.device, torch.float32)
        one = dataclasses.replace(one, known={**one.known, BACKWARD: predictor.backward(weights, latents, targets)})
        return _with_place(one, latents, labels, behind, read=loss <= READ)

    each = [told(one, *found) for one, found in zip(seen, _read(case, seen), strict=True)]
    shares = {float(one.known[SHARE]) for one in each}
    each, layers = _with_rows(case, frozen, each)
    said = _read_in(each, "it is A0" + (f", held to what the weights of {len(layers)} layers tell of their inputs" if layers else ""))
    if shares == {0.0} and not layers:
        return Plan(seen, make, case.matching(), **said)
    scale = 1.0 if case.local is None else -case.local.lr  # of a delta

    def walk(params: Tensors, known: Tensors, images: Tensor) -> tuple[Tensors, list[Tensors]]:
        """Sum of the steps' gradients at the latents that were read, and the weights that each step met."""

        def front(weights: Tensors, images: Tensor, backward: Tensor) -> Tensors:
            return grad(lambda own: (latent(own, known, images) * backward).sum())(weights)

        return along(front, params, predictor.local, images, known[BACKWARD])

    gradient_of = _per_thread(case.step)

    def made() -> Simulate:
        simulate = make()
        if layers and predictor.local:
            gradient_of()  # the prior's, which cannot be made within a program

        def with_latent_read(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
            share, others = known[SHARE], {}
            if shares != {1.0}:
                others = simulate(params, {name: tensor for name, tensor in known.items() if not name.startswith(("read/", ROWS))}, images, labels, noise)
            if shares == {0.0}:
                return others
            found, _ = walk(params, known, images)
            if shares == {1.0}:
                return {name: scale * tensor for name, tensor in found.items()}
            return {name: share * scale * found[name] + (1 - share) * tensor for name, tensor in others.items()}

        return with_latent_read

    def passes(point: Point) -> list[tuple[Tensors, Tensor]]:
        """Weights and images of every step of a candidate; the steps are taken as they are, not followed back."""
        known = {name: tensor for name, tensor in point.known.items() if not name.startswith(("read/", ROWS))}
        found = [point.params]
        if predictor.local:
            _, found = along(lambda weights, *rows: gradient_of()(weights, known, *rows, None), point.params, predictor.local, point.images, point.labels)
        each = ({name: tensor.detach() for name, tensor in {**known, **weights}.items() if name in names} for weights in found)
        return list(zip(each, point.images.chunk(len(found)), strict=True))

    def apart(point: Point) -> Tensor:
        place, path = point.known[PLACE], walk(point.params, point.known, point.images)[1] if predictor.local else [point.params]
        own = [latent({name: tensor.detach() for name, tensor in weights.items()}, point.known, part) for weights, part in zip(path, point.images.chunk(len(path)), strict=True)]
        return point.known[SHARE] * (torch.cat(own) - place).square().sum() / place.square().sum().clamp_min(torch.finfo(place.dtype).tiny)

    priors = [(case.attack.closeness, apart)] if shares != {0.0} else []
    if layers:
        within = within_rows(mine, layers, passes)
        priors.append((1.0, lambda point: (1 - point.known[SHARE]) * within(point)))
    matching = case.matching(priors=tuple(priors))
    return Plan(each, made, dataclasses.replace(matching, tv=SMOOTHER * matching.tv) if layers else matching, **said)


def _with_rows(case: Case, model: nn.Module, each: list[Observation]) -> tuple[list[Observation], list[str]]:
    """Of observations whose latent was not read, with the row spaces of weights in `known`, nought where an observation does not tell one; and these layers' names."""
    found = [
        {} if float(one.known[SHARE]) else row_spaces(model, {**one.update, **one.unmatched}, case.image_shape, one.num_examples, case.num_classes) for one in each
    ]  # fmt: skip
    like = {name: space for spaces in found for name, space in spaces.items()}
    spaces = [{f"{ROWS}{name}": own.get(name, torch.zeros_like(space)) for name, space in like.items()} for own in found]
    return [dataclasses.replace(one, known={**one.known, **own}) for one, own in zip(each, spaces, strict=True)], sorted(like)


def _code(latents: Tensor, weights: Tensors, channel_dim: int) -> Tensor:
    """A bottleneck's code (B, *noise_shape) from what its layer `back` made of it (B, *latent_shape), by least squares: exact where the code is no longer."""
    weight, bias = (weights[f"perturbation.back.{name}"] for name in ("weight", "bias"))
    flat = latents.flatten(1) if weight.ndim == 2 else latents.movedim(channel_dim, -1)
    found = (flat - bias).double() @ torch.linalg.pinv(weight.flatten(1).double()).mT
    return (found if weight.ndim == 2 else found.movedim(-1, 1)).to(latents.dtype)


def _generative(case: Case, seen: list[Observation], make: Callable[[], Simulate]) -> Plan:
    """A8: codes first, by Adam as it is, then pixels from the image of the best code, with the signs and the noise that the attack asks for: both are of pixels.

    Under noise on the update, of a share ρ of its squared norm, codes also take ρ of the iterations that are left for pixels, which are then held to the
    codes' images by `tightness`: both go to nought with the noise.
    """
    attack = case.attack
    frozen = copy.deepcopy(case.fitted["generator"]).requires_grad_(False).eval()
    mine = _per_thread(lambda: copy.deepcopy(frozen))

    def render(code: Tensor) -> Tensor:
        return mine()(code)

    noise = sum(one.noise for one in seen) / len(seen)
    codes = max(1, round((1 - (1 - attack.code_share) * (1 - noise)) * attack.iterations))
    common = {"noise_shape": case.noise_shape}
    first = case.matching(
        **common, render=render, code_shape=(attack.code,), code_weight=1e-3, lr=attack.code_lr, iterations=codes, kink_width=attack.kink_width,
        signed=False, optimiser=None,
    )  # fmt: skip
    pixels = case.matching(**common, iterations=max(1, attack.iterations - codes))
    if noise == 0:
        return Plan(seen, make, first, refine=pixels)
    size = seen[0].num_examples * math.prod(case.image_shape)
    held = {CODES: Searched(shape=(seen[0].num_examples, *case.image_shape)), **pixels.searched}
    pixels = dataclasses.replace(pixels, searched=held, priors=(*pixels.priors, (1.0, _beside_codes)))
    told = [dataclasses.replace(one, known={**one.known, TIGHTNESS: next(iter(one.update.values())).new_tensor(tightness(one, size))}) for one in seen]
    return Plan(told, _without(make, HELD), first, refine=pixels)


def tightness(one: Observation, size: int) -> float:
    """Weight of the mean square distance to a generator's images, of so many entries, beside a cosine distance.

        N / 2τ² · ρ / (D √(1 − ρ)),   ρ = `Observation.noise`, D entries of the update, τ = REST

    Of noise N(0, s²) on an update g, and g of the norm that is left when the noise's is taken out of the release r, the likelihood's logarithm is
    −‖g‖‖r‖ / s² · (1 − cos) and a constant, with s² = ρ‖r‖² / D; that of pixels around the generator's is −‖x − G(code)‖² / 2τ². 0 without noise.
    """
    entries = sum(tensor.numel() for tensor in one.update.values())
    return size / (2 * REST**2) * one.noise / (entries * math.sqrt(1 - one.noise))


def _beside_codes(point: Point) -> Tensor:
    return point.known[TIGHTNESS] * (point.images - point.known[CODES].detach()).square().mean()


def refined(plan: Plan, first: Tensors) -> Matching:
    """Settings of the second stage: everything that both stages search starts where the first one ended, attack for attack; after a failure, unknowns
    begin as ever."""
    place = {tuple(attack): row for row, attack in enumerate(first["attacks"].tolist())}
    others = [name for name in (*(["logits"] if plan.refine.search_labels else []), *plan.refine.searched) if name in first]

    def start(observation: int, number: int) -> tuple[Tensor, Tensor | None, Tensors]:
        row = place[observation, number]
        held = {CODES: first["images"][row]} if CODES in plan.refine.searched else {}
        if int(first["failure"][row]):
            return first["images"][row], None, held
        return first["images"][row], first["noise"][row] if "noise" in first else None, held | {name: first[name][row] for name in others}

    start.of_variants = True
    unordered = plan.refine.unordered
    if unordered is not None:
        unordered = dataclasses.replace(unordered, first=lambda observation, number: first["order"][place[observation, number]])
    return dataclasses.replace(plan.refine, start=start, unordered=unordered)
