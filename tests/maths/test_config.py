"""Recipes as plain values: their checks, and their way to JSON and back."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from gidef import config, importing
from gidef.config import (
    ATS,
    CVB,
    DCS,
    DPSGD,
    PRESETS,
    Analytic,
    BiDO,
    CapacityNoise,
    Censor,
    Clipping,
    Data,
    DeepLeakage,
    Dirichlet,
    EotMatching,
    Evaluation,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedYogi,
    GenerativePrior,
    GradDefense,
    GradientNoise,
    GradInversion,
    Iid,
    InstaHide,
    InvertingGradients,
    IsotropicNoise,
    JointMatching,
    LatentDecoding,
    LearnedInversion,
    LearnedPerturbation,
    LocalTraining,
    Matched,
    MixUp,
    Model,
    ModernInvertingGradients,
    MultiRound,
    NaiveMatching,
    PostHocDecoder,
    Precode,
    Pruning,
    Quantisation,
    QuantitySkew,
    ReadLatent,
    ReadNoise,
    Recipe,
    Rounds,
    Scaffold,
    SecureAggregation,
    Shards,
    Sign,
    SingleGradient,
    Soteria,
    Speed,
    StatisticsMatching,
    SurrogateModel,
    Undefended,
    from_json,
    problems,
    science,
    standard,
    to_json,
)
from gidef.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Own:
    """A user's own defence: its `size` is no image size."""

    size: float = 0.5
    inner: Any = Undefended()

    def build(self, make_model):
        return make_model()


@dataclass(frozen=True, kw_only=True)
class Coupled(Own):
    """One whose loss is no mean over images."""

    couples_batch: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Bare:
    """What looks like a defence, and has nothing of one."""


@dataclass(frozen=True, kw_only=True)
class Sent(Bare):
    """One of updates, with what gidef.defence.share asks for."""

    changes_update: ClassVar[bool] = True

    def apply(self, update, *, generator, own):
        return update

    def reveals(self, update):
        return {}

    def imitate(self, update, known):
        return update


CLASSES = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind)]
SGD = LocalTraining(optimiser="sgd")


def learned(**fields):
    return {"x": LearnedPerturbation(**fields)}


def through_text(value, **options):
    return from_json(json.loads(json.dumps(to_json(value))), **options)


def recipes():
    """Recipes that between them hold every dataclass, away from its defaults."""
    yield Recipe()
    yield Recipe(
        data=Data(name="cifar10", path="a.npz", size=32, download=False, num_clients=3, partition=Dirichlet(alpha=math.inf), split_seed=2),
        model=Model(name="resnet18", cut="layer1", small_stem=False, norm="frozen", pretrained="w.safetensors"),
        clients=LocalTraining(epochs=2, optimiser="sgd", momentum=0.9, precision="bfloat16"),
        rounds=Rounds(count=7, cohort_size=2, server=FedAdam(lr=0.5), patience=None),
        defences={"a": LearnedPerturbation(law="laplace", mean=True), "b c": Undefended(), "p": Pruning(share=0.5), "c": CapacityNoise(bits_weight=0.1, frozen=True, front="frozen"),
            "m": Matched(defence=(CapacityNoise(), Pruning()), field="share", low=0.1, high=0.9, accuracy=0.8), "a + p": (LearnedPerturbation(), Pruning())},
        attacks={"n": NaiveMatching(kink_width=None), "i": InvertingGradients(), "j": JointMatching(decoder="unused"), "d": PostHocDecoder(steps=3)},
        evaluation=Evaluation(checkpoints=("untrained", "final"), num_victims=8, batch_size=4, release="delta", local_steps=2),
        share_policy="head", speed=Speed(workers=3), seeds=(3, 1), only=("a",), out="runs/a", resume=True,
    )  # fmt: skip
    for partition, server in ((Shards(per_client=3), FedYogi()), (QuantitySkew(alpha=0.1), FedAdagrad()), (Iid(), FedAvg(momentum=0.9))):
        yield Recipe(data=Data(partition=partition), clients=SingleGradient(lr=0.2), rounds=Rounds(server=server))
    yield Recipe(clients=SGD, rounds=Rounds(server=Scaffold(lr=0.5)))
    for rule in (config.Median(), config.TrimmedMean(share=0.3), config.Krum(byzantine=2, chosen=3)):
        streamed = Data(stream=True, client_shards=tuple(f"{k}.tar" for k in range(10)), stream_buffer=9, stream_sample=8)
        yield Recipe(data=streamed, rounds=Rounds(aggregate=rule), speed=Speed(clients_schedule="dynamic", sharded_server=True, decoders=1))
    yield Recipe(defences={
        "i": IsotropicNoise(std=0.0, law="laplace", frozen=True, cut="stage:1"), "b": BiDO(measure="coco", x_weight=1.0, y_weight=50.0, norm="frobenius"), "r": BiDO(y_ratio=20.0),
        "p": Precode(width=8, kl_weight=0.0, cut="blocks.2"), "c": CVB(kernel=3, kl_weight=5e-5, cut="blocks.1"), "l": LearnedPerturbation(cut="before:head"),
    })  # fmt: skip
    changed = (GradientNoise(std=0.2, law="laplace", relative=False), Clipping(bound=2.0, per_tensor=True), Sign(), Quantisation(bits=8, norm="l2"))
    yield Recipe(defences={"of updates": changed, "inside": (Censor(draws=3), Soteria(share=0.5, layer="backbone.head"), GradDefense(slices=4, noisy=2))})
    yield Recipe(defences={"d": DPSGD(clip=0.5, noise_multiplier=1.0, target_epsilon=None), "p": (Pruning(), DPSGD(level="client", delta=1e-3))})
    of_data = (MixUp(mixing=0.5), ATS(policy=("cifar100-convnet", "rotate 2, invert 0")), InstaHide(mixed=2, largest=0.7, signs=False), DPSGD(level="client"))
    yield Recipe(defences={"m": of_data, "c": (DCS(concealed=2, iterations=5, x_weight=0.1, z_weight=0.1, blend=1.0, lr=0.2, apart=9.0), Sign())})
    private = DPSGD(level="client")
    yield Recipe(defences={"d": (Soteria(), Pruning(), private), "n": (private, GradientNoise(relative=False)), "i": (DPSGD(), Pruning(), Sign(), GradientNoise())})
    yield Recipe(defences={"s": (LearnedPerturbation(), Pruning(), SecureAggregation(dropouts=0.3)), "d": (DPSGD(level="client"), SecureAggregation())})
    single = {name: attack for name, attack in PRESETS.items() if not isinstance(attack, SurrogateModel)}
    yield Recipe(attacks=single)
    yield Recipe(attacks={"t": config.Tuned(attack=config.EotMatching(), grid={"lr": (0.1, 1), "start": ("grey", "patterned-4"), "signed": (True, False), "patience": (None, 9)})})
    yield Recipe(defences={"u": Undefended(), "b": BiDO()}, attacks={"n": NaiveMatching()}, choose=config.Choose(points=1.0))
    yield Recipe(attacks={"s": SurrogateModel()}, evaluation=Evaluation(release="delta", local_steps=1))


def kinds_in(value):
    if isinstance(value, dict):
        return ({value["type"]} if "type" in value else set()).union(*map(kinds_in, value.values()))
    return set().union(*map(kinds_in, value)) if isinstance(value, list) else set()


def test_every_recipe_survives_json_and_has_no_problem():
    seen = set()
    for recipe in recipes():
        assert through_text(recipe) == recipe
        assert problems(recipe) == []
        seen |= kinds_in(to_json(recipe))
    assert seen == {kind.__name__ for kind in CLASSES} and len(seen) > 20


def test_every_field_is_in_the_json():
    for kind in CLASSES:
        assert set(to_json(kind())) == {"type"} | {spec.name for spec in dataclasses.fields(kind)}


IMPOSSIBLE = [
    # (recipe, what was given, what to change)
    (Recipe(data=Data(num_clients=3), rounds=Rounds(cohort_size=4)), "rounds.cohort_size=4 exceeds data.num_clients=3", "Lower one"),
    (Recipe(rounds=Rounds(cohort_size=4, cohort_share=0.5)), "rounds.cohort_size=4 and rounds.cohort_share=0.5", "give one"),
    (Recipe(rounds=Rounds(cohort_share=1.5)), "rounds.cohort_share=1.5", "in (0, 1]"),
    (Recipe(rounds=Rounds(cohort_share=0.0)), "rounds.cohort_share=0.0", "in (0, 1]"),
    (Recipe(seeds=()), "seeds is empty", "--seeds 0"),
    (Recipe(seeds=(1, 2, 1)), "seeds=(1, 2, 1) repeats", "Remove"),
    (Recipe(defences={}), "defences is empty", "give at least one"),
    (Recipe(only=("undefended", "gone")), "only=['gone']", "['undefended']"),
    (Recipe(defences={"a/b": Undefended()}), "'a/b'", "use letters"),
    (Recipe(attacks={"..": NaiveMatching()}), "'..'", "use letters"),
    (Recipe(attacks={"": NaiveMatching()}), "name ''", "use letters"),
    (Recipe(attacks={" a": NaiveMatching()}), "' a'", "use letters"),
    *((Recipe(**{kind: {name: one}}), f"name {name!r} of a defence or attack begins with {name[0]!r}", "begin with a letter or digit")
      for kind, one in (("defences", Undefended()), ("attacks", NaiveMatching())) for name in ("+1+1", "-joint")),
    (Recipe(rounds=Rounds(server=Scaffold())), "rounds.server=Scaffold", "set clients.optimiser=sgd"),
    (Recipe(rounds=Rounds(server=Scaffold()), clients=replace(SGD, momentum=0.9)), "rounds.server=Scaffold", "clients.momentum=0"),
    (Recipe(clients=LocalTraining(momentum=0.9)), "clients.momentum=0.9 is sgd's", "set clients.optimiser=sgd"),
    (Recipe(defences=learned(law="laplace", kl_weight=0.1)), "defences.x: kl_weight=0.1", "law=gaussian"),
    (Recipe(defences=learned(strength=0.0, std_floor=0.0, kl_weight=0.1)), "defences.x: the KL term (kl_weight=0.1)", "raise one"),
    (Recipe(defences=learned(dependence="cka"), clients=replace(SGD, batch_size=3)), "defences.x: dependence=cka", "clients.batch_size=3"),
    (Recipe(defences={"x": CVB(kernel=4)}), "defences.x.kernel=4 is even", "odd number"),
    (Recipe(speed=Speed(checkpoints_kept=0)), "speed.checkpoints_kept=0", "at least 1"),
    (Recipe(defences={"x": IsotropicNoise(std=-0.1)}), "defences.x.std=-0.1", "at least 0"),
    (Recipe(defences={"x": BiDO(y_weight=-1.0)}), "defences.x.y_weight=-1.0", "at least 0"),
    (Recipe(defences={"x": BiDO(y_ratio=-1.0)}), "defences.x.y_ratio=-1.0", "at least 0"),
    (Recipe(defences={"u": Undefended(), "b": BiDO()}, choose=config.Choose()), "choose needs", "an attack"),
    (Recipe(defences={"u": Undefended()}, attacks={"n": NaiveMatching()}, choose=config.Choose()), "choose needs", "another defence"),
    (Recipe(attacks={"t": config.Tuned(attack=config.Standard())}), "attacks.t", "one attack"),
    (Recipe(attacks={"t": config.Tuned(grid={})}), "attacks.t", "grid is empty"),
    (Recipe(attacks={"t": config.Tuned(grid={"tv_weight": (0.1, 0.2)})}), "attacks.t", "'tv_weight'"),
    (Recipe(attacks={"t": config.Tuned(grid={"lr": (0.1, 0.1)})}), "grid.lr=", "twice"),
    (Recipe(attacks={"t": config.Tuned(grid={"lr": 0.1})}), "grid.lr=0.1", "a tuple"),
    (Recipe(attacks={"t": config.Tuned(grid={"start": ("a/b",)})}), "grid.start=", "folders"),
    (Recipe(attacks={"t": config.Tuned(grid={"decoder": ("known", "unused")})}), "attacks.t", "granted"),
    (Recipe(attacks={"t": config.Tuned(grid={"lr": (0.1, -0.1)})}), "attacks.t.attack.lr=-0.1", "above 0"),
    (Recipe(attacks={"t": config.Tuned(grid={"iterations": (10, "many")})}), "attacks.t.attack.iterations='many'", "a whole number"),
    (Recipe(attacks={"t": config.Tuned()}, evaluation=Evaluation(num_tuning=0)), "num_tuning=0", "raise it"),
    (Recipe(defences={"u": Undefended(), "b": BiDO()}, attacks={"t": config.Tuned()}, choose=config.Choose()), "attacks.t", "nothing is left"),
    (Recipe(choose=config.Choose(points=-1.0)), "choose.points=-1.0", "at least 0"),
    (Recipe(defences={"u": Undefended(), "b": BiDO()}, attacks={"n": NaiveMatching()}, choose=config.Choose(), evaluation=Evaluation(num_tuning=6, batch_size=4)), "num_tuning=6", "a multiple"),
    (Recipe(defences={"u": Undefended(), "b": IsotropicNoise()}, attacks={"n": NaiveMatching()}, choose=config.Choose(), evaluation=Evaluation(strengths=(0.5, 2.0))), "strengths=(0.5, 2.0)", "Add 1"),
    (Recipe(defences={"x": Precode(width=0)}), "defences.x.width=0", "at least 1"),
    (Recipe(defences={"x": MixUp(mixing=-1.0)}), "defences.x.mixing=-1.0", "at least 0"),
    (Recipe(defences={"x": InstaHide(largest=0.25)}), "defences.x: largest=0.25", "at least 0.312"),
    (Recipe(defences={"x": ATS(policy=("rotate 11",))}), "defences.x: policy holds 'rotate 11'", "a level each"),
    (Recipe(defences={"x": DCS(blend=1.1)}), "defences.x: blend=1.1", "[0, 1]"),
    (Recipe(defences={"x": (DCS(), LearnedPerturbation())}), "defences.x: DCS adds images", "leave one out"),
    (Recipe(defences={"x": (MixUp(), DPSGD())}), "defences.x: MixUp changes the images", "level=client"),
    (Recipe(defences={"both": (Undefended(), Undefended())}), "defences.both", "Keep one"),
    (Recipe(defences={"d": DPSGD(noise_multiplier=1.0)}), "defences.d: noise_multiplier=1.0 and target_epsilon=8.0", "exactly one"),
    (Recipe(defences={"d": DPSGD(target_epsilon=None)}), "defences.d: noise_multiplier=None and target_epsilon=None", "exactly one"),
    (Recipe(defences={"d": DPSGD()}, clients=LocalTraining(accumulate=2)), "defences.d: clients.accumulate=2", "Set it to 1"),
    (Recipe(defences={"d": DPSGD()}, clients=SingleGradient(precision="bfloat16")), "defences.d: clients.precision=bfloat16", "set it to float32"),
    (Recipe(defences={"d": DPSGD(level="client")}, clients=SGD, rounds=Rounds(server=Scaffold())), "defences.d: rounds.server=Scaffold", "take another"),
    (Recipe(defences={"d": (DPSGD(level="client"), DPSGD(level="client"))}), "defences.d holds 2 DPSGD", "keep one"),
    (Recipe(defences={"d": (Coupled(), DPSGD())}), "defences.d: the loss of Coupled couples the images", "Leave one out"),
    (Recipe(defences={"d": (LearnedPerturbation(dependence="dcor"), DPSGD())}), "defences.d: the loss of LearnedPerturbation couples", "Leave one out"),
    (Recipe(defences={"d": (DPSGD(), Soteria())}), "defences.d: Soteria chooses what leaves by the images themselves", "Leave one out"),
    (Recipe(defences={"d": (Censor(), DPSGD())}), "defences.d: Censor chooses what leaves by the images themselves", "Leave one out"),
    (Recipe(defences={"d": (DPSGD(level="client"), GradDefense())}), "defences.d: GradDefense behind DPSGD chooses", "Put it before DPSGD"),
    (Recipe(defences={"d": (DPSGD(level="client"), Pruning())}), "defences.d: Pruning behind DPSGD changes each client's update", "Put it before DPSGD"),
    (Recipe(defences={"d": (DPSGD(level="client"), GradientNoise())}), "defences.d: GradientNoise behind DPSGD", "Put it before DPSGD"),
    (Recipe(defences={"d": DPSGD(clip=0.0)}), "defences.d.clip=0.0", "larger"),
    (Recipe(defences={"d": DPSGD(delta=1.0)}), "defences.d.delta=1.0", "smaller"),
    (Recipe(attacks={"x": Undefended()}), "attacks.x=Undefended()", "use one of gidef.config.attacks"),
    (Recipe(attacks={"x": ModernInvertingGradients(tv_boost=10.0)}), "attacks.x.tv_boost=10.0", "opponents=False"),
    (Recipe(attacks={"x": SurrogateModel()}), "attacks.x: a surrogate model", "set it to delta"),
    (Recipe(attacks={"x": GradInversion(restarts=1)}), "attacks.x: the consistency of restarts", "set group=0"),
    (Recipe(attacks={"x": DeepLeakage(labels="counts")}), "attacks.x.labels=counts", "searched"),
    (Recipe(attacks={"x": DeepLeakage(langevin=0.2)}), "attacks.x.langevin=0.2: L-BFGS takes no noise", "Set it to 0"),
    (Recipe(attacks={"x": DeepLeakage(signed=True)}), "attacks.x: L-BFGS steps by no signs", "Set signed and soft_sign to false"),
    (Recipe(attacks={"x": NaiveMatching(langevin=-1.0)}), "attacks.x.langevin=-1.0 is too small", "at least 0"),
    (Recipe(evaluation=Evaluation(local_steps=2)), "evaluation.local_steps", "set evaluation.release=delta"),
    (Recipe(evaluation=Evaluation(local_epochs=2)), "evaluation.local_epochs=2 is of a released delta", "set evaluation.release=delta"),
    (Recipe(evaluation=Evaluation(local_momentum=0.5)), "evaluation.local_momentum=0.5 is of a released delta", "or local_momentum=0"),
    (Recipe(evaluation=Evaluation(local_optimiser="adam")), "evaluation.local_optimiser=adam is of a released delta", "or local_optimiser=sgd"),
    (Recipe(evaluation=Evaluation(release="delta", local_optimiser="adam", local_momentum=0.5)), "evaluation.local_momentum=0.5 is sgd's", "set evaluation.local_optimiser=sgd"),
    (Recipe(attacks={"s": SurrogateModel()}, evaluation=Evaluation(release="delta", local_optimiser="adam")), "attacks.s: a surrogate model follows", "set it to sgd"),
    (Recipe(attacks={"n": NaiveMatching(labels="soft")}, evaluation=Evaluation(release="delta", local_optimiser="adam")), "attacks.n: labels=soft reads", "set it to sgd"),
    (Recipe(evaluation=Evaluation(num_victims=10, batch_size=4)), "num_victims=10 is no multiple of evaluation.batch_size=4", "Change one"),
    (Recipe(evaluation=Evaluation(release="delta", local_steps=3, batch_size=4)), "is no multiple of evaluation.local_steps=3", "equal slice"),
    (Recipe(evaluation=Evaluation(checkpoints=())), "evaluation.checkpoints is empty", '"untrained"'),
    *((Recipe(defences={"x": (Pruning(), SecureAggregation())}, rounds=Rounds(aggregate=rule)), f"defences.x: {type(rule).__name__} needs the single updates", "set rounds.aggregate=Mean")
      for rule in (config.Median(), config.TrimmedMean(), config.Krum())),
    (Recipe(defences={"x": (Matched(defence=IsotropicNoise(), field="std"), Pruning())}), "defences.x: Matched(field='std') is no member", "Matched(defence=(..., ...), field='std')"),
    (Recipe(defences={"x": Matched(defence=Matched(), accuracy=0.5)}), "defences.x: defence=Matched(field='strength') is no member", "around the whole combination"),
    (Recipe(defences={"x": ((IsotropicNoise(), Pruning()), Sign())}), "defences.x: (IsotropicNoise(", "a combination is one tuple"),
    (Recipe(defences={"x": [Pruning(), Sign()]}), "defences.x: [Pruning(", "a combination is one tuple"),
    (Recipe(defences={"x": IsotropicNoise}), "defences.x: IsotropicNoise is a class", "write IsotropicNoise()"),
    (Recipe(defences={"x": (Pruning, Sign())}), "defences.x: Pruning is a class", "write Pruning()"),
    (Recipe(defences={"x": Matched(defence=IsotropicNoise, field="std", accuracy=0.5)}), "defences.x: defence=IsotropicNoise is a class", "write IsotropicNoise()"),
    (Recipe(defences={"x": Own}), "defences.x: Own is a class", "write Own()"),
    (Recipe(defences={"x": Bare()}), "defences.x: Bare() is no defence", "a method build(make_model)"),
    (Recipe(defences={"x": "none"}), "defences.x: 'none' is no defence", "use one of gidef.config"),
    (Recipe(defences={"x": Soteria(share=1.1)}), "defences.x: share=1.1 of Soteria", "[0, 1]"),
    (Recipe(defences={"x": (Sign(), Pruning(share=-0.1))}), "defences.x: share=-0.1 of Pruning", "[0, 1]"),
    (Recipe(defences={"x": Quantisation(bits=17)}), "defences.x: bits=17 of Quantisation", "2 to 16"),
    (Recipe(defences={"x": GradDefense(noisy=6, slices=5)}), "defences.x: noisy=6 of slices=5", "raise slices"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "given", "cure"), IMPOSSIBLE, ids=[given for _, given, _ in IMPOSSIBLE])
def test_an_impossible_combination_is_one_message_with_what_was_given_and_what_to_change(recipe, given, cure):
    [message] = problems(recipe)
    assert given in message and cure in message and message.endswith(".")


def test_what_is_possible_beside_it_is_allowed():
    for recipe in (
        Recipe(data=Data(num_clients=3), rounds=Rounds(cohort_size=3)),
        Recipe(rounds=Rounds(server=Scaffold()), clients=SingleGradient()),
        Recipe(defences=learned(dependence="cka"), clients=replace(SGD, batch_size=4)),
        Recipe(defences=learned(strength=0.0, kl_weight=0.1)),
        Recipe(defences=learned(strength=0.0, std_floor=0.0)),
        Recipe(defences=learned(law="laplace")),
        Recipe(evaluation=Evaluation(release="delta", local_steps=4, batch_size=8)),
        Recipe(evaluation=Evaluation(release="delta", local_steps=4, local_epochs=5, local_momentum=0.9, batch_size=8)),
        Recipe(attacks={"n": NaiveMatching(labels="recovered")}, evaluation=Evaluation(release="delta", local_optimiser="adam")),
        Recipe(seeds=[0, 1]),
        Recipe(defences={"learned + pruning-2": Undefended(), "_a": Undefended()}),
        Recipe(defences={"own": Own(), "sent": (Own(), Sent(), Pruning()), "searched": Matched(defence=(Own(), Sent()), field="size", accuracy=0.5), "masked": SecureAggregation()}),
    ):
        assert problems(recipe) == []


TOO_SMALL = [
    (Recipe(rounds=Rounds(count=0)), "rounds.count=0"),
    (Recipe(rounds=Rounds(cohort_size=0)), "rounds.cohort_size=0"),
    (Recipe(rounds=Rounds(patience=0)), "rounds.patience=0"),
    (Recipe(data=Data(num_clients=0)), "data.num_clients=0"),
    (Recipe(data=Data(size=7)), "data.size=7"),
    (Recipe(data=Data(partition=Dirichlet(alpha=0.0))), "data.partition.alpha=0.0"),
    (Recipe(data=Data(partition=Shards(per_client=0))), "data.partition.per_client=0"),
    (Recipe(clients=LocalTraining(epochs=0)), "clients.epochs=0"),
    (Recipe(clients=LocalTraining(lr=0.0)), "clients.lr=0.0"),
    (Recipe(clients=LocalTraining(lr=math.nan)), "clients.lr=nan"),
    (Recipe(clients=LocalTraining(grad_clip=math.inf)), "clients.grad_clip=inf"),
    (Recipe(clients=SingleGradient(batch_size=0)), "clients.batch_size=0"),
    (Recipe(clients=replace(SGD, momentum=1.0)), "clients.momentum=1.0"),
    (Recipe(rounds=Rounds(server=FedAdam(beta2=1.0))), "rounds.server.beta2=1.0"),
    (Recipe(rounds=Rounds(server=FedYogi(tau=0.0))), "rounds.server.tau=0.0"),
    (Recipe(defences=learned(std_init=0.0)), "defences.x.std_init=0.0"),
    (Recipe(defences=learned(std_floor=-0.1)), "defences.x.std_floor=-0.1"),
    (Recipe(defences=learned(decoder_steps=-1)), "defences.x.decoder_steps=-1"),
    (Recipe(attacks={"n": NaiveMatching(iterations=0)}), "attacks.n.iterations=0"),
    (Recipe(attacks={"n": NaiveMatching(kink_width=(1.0, 0.0))}), "attacks.n.kink_width=0.0"),
    (Recipe(attacks={"d": PostHocDecoder(steps=0)}), "attacks.d.steps=0"),
    (Recipe(evaluation=Evaluation(batch_size=0)), "evaluation.batch_size=0"),
    (Recipe(evaluation=Evaluation(release="delta", local_steps=0)), "evaluation.local_steps=0"),
    (Recipe(evaluation=Evaluation(release="delta", local_epochs=0)), "evaluation.local_epochs=0"),
    (Recipe(evaluation=Evaluation(release="delta", local_momentum=1.0)), "evaluation.local_momentum=1.0"),
    (Recipe(evaluation=Evaluation(release="delta", local_momentum=-0.1)), "evaluation.local_momentum=-0.1"),
    (Recipe(speed=Speed(threads=0)), "speed.threads=0"),
]


@pytest.mark.parametrize(("recipe", "given"), TOO_SMALL, ids=[given for _, given in TOO_SMALL])
def test_a_number_out_of_range_is_named_with_its_place(recipe, given):
    [message] = problems(recipe)
    assert message.startswith(given) and "give" in message


WRONG_TYPES = [
    (Recipe(data=Data(num_clients="5")), "data.num_clients='5'", "a whole number"),
    (Recipe(clients=LocalTraining(epochs=1.5)), "clients.epochs=1.5", "a whole number"),
    (Recipe(clients=LocalTraining(epochs=None)), "clients.epochs=None", "a whole number"),
    (Recipe(clients=LocalTraining(lr=True)), "clients.lr=True", "a number"),
    (Recipe(rounds=Rounds(cohort_size="5")), "rounds.cohort_size='5'", "a whole number or None"),
    (Recipe(data=Data(name=5)), "data.name=5", "text"),
    (Recipe(data=Data(download="yes")), "data.download='yes'", "True or False"),
    (Recipe(data=Data(partition=FedAvg())), "data.partition=FedAvg", "Iid or Dirichlet or Shards or QuantitySkew"),
    (Recipe(data=Data), "data=<class", "Data"),
    (Recipe(rounds=Rounds(server="FedAvg")), "rounds.server='FedAvg'", "FedAvg or FedAdam"),
    (Recipe(clients=LocalTraining(precision="float16")), "clients.precision='float16'", "one of 'float32', 'tf32', 'bfloat16'"),
    (Recipe(share_policy="none"), "share_policy='none'", "'full', 'head', 'all'"),
    (Recipe(seeds=0), "seeds=0", "a tuple, each of it a whole number"),
    (Recipe(seeds=("0",)), "seeds=('0',)", "a tuple, each of it a whole number"),
    (Recipe(evaluation=Evaluation(checkpoints=("late",))), "evaluation.checkpoints=('late',)", "'untrained', 'early', 'final'"),
    (Recipe(evaluation=Evaluation(checkpoints="final")), "evaluation.checkpoints='final'", "a tuple"),
    (Recipe(attacks={"n": NaiveMatching(kink_width=(1.0,))}), "attacks.n.kink_width=(1.0,)", "a tuple of 2"),
    (Recipe(defences=[Undefended()]), "defences=[Undefended()]", "a dict"),
    (Recipe(defences=learned(law="cauchy")), "defences.x.law='cauchy'", "'gaussian', 'laplace'"),
]


@pytest.mark.parametrize(("recipe", "given", "expected"), WRONG_TYPES, ids=[given for _, given, _ in WRONG_TYPES])
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(recipe, given, expected):
    [message] = problems(recipe)
    assert message.startswith(given) and expected in message


def test_all_wrong_fields_are_told_at_once():
    found = problems(Recipe(rounds=Rounds(count=-1), clients=LocalTraining(lr=-1.0), defences=learned(std_init=0.0), seeds=()))
    assert [message.partition("=")[0] for message in found] == ["clients.lr", "rounds.count", "defences.x.std_init"]
    assert len(problems(Recipe(seeds=(), only=("gone",), clients=LocalTraining(momentum=0.5)))) == 3


def test_a_defence_of_your_own_has_ranges_of_its_own():
    assert problems(Recipe(defences={"own": Own(size=0.01)})) == []


def test_science_ignores_speed_and_place_and_nothing_else():
    base = Recipe()
    same = replace(base, speed=Speed(workers=9, device="cuda"), out="elsewhere", resume=True, log=("tensorboard",))
    assert science(same) == science(base)
    changes = {
        "data": Data(split_seed=1), "model": Model(norm="keep"), "clients": SGD, "rounds": Rounds(patience=3), "defences": {"u": Undefended()},
        "share_policy": "head", "attacks": {"n": NaiveMatching()}, "evaluation": Evaluation(judge_epochs=1), "choose": config.Choose(), "seeds": (1,), "only": ("undefended",),
    }  # fmt: skip
    assert changes.keys() == {spec.name for spec in dataclasses.fields(Recipe)} - {"speed", "out", "resume", "log"}
    assert len({science(base), *(science(replace(base, **{name: value})) for name, value in changes.items())}) == len(changes) + 1


def test_unknown_types_and_fields_are_refused_by_name():
    good = to_json(Recipe())
    for wrong in ("FedSomething", "Recipe2", "problems", "Any", "json"):
        with pytest.raises(ValueError, match=f"unknown type '{wrong}'.*another version"):
            from_json(good | {"rounds": good["rounds"] | {"server": {"type": wrong}}})
    with pytest.raises(ValueError, match=r"Rounds has unknown fields \['rate'\]"):
        from_json(good | {"rounds": good["rounds"] | {"rate": 1}})


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(defences={"own": Own()}),
        Recipe(defences={"own": Own(inner=Own())}),
        Recipe(data=Data(name="os:getcwd")),
        Recipe(model=Model(name="folder/net.py:Net")),
    ],
    ids=["defence", "nested", "data", "model"],
)
def test_code_of_your_own_is_imported_only_if_asked_for(recipe):
    loaded = []

    def load(name):
        loaded.append(name)
        return importing.load(name)

    with pytest.raises(ValueError, match="names code of its own.*--allow-code"):
        through_text(recipe)
    assert not loaded
    assert through_text(recipe, load=load) == recipe
    assert set(loaded) <= {f"{__name__}:Own"}


@pytest.mark.parametrize(("name", "folder_of"), [("nowhere:Defence", "nowhere.py or nowhere/"), ("nowhere.deep:Defence", "nowhere.py or nowhere/")])
def test_code_that_is_not_on_the_path_says_what_to_set(name, folder_of):
    with pytest.raises(InputError, match=f"cannot load '{name}'.*Set PYTHONPATH to the folder that holds {folder_of}"):
        from_json({"type": name}, load=importing.load)
    with pytest.raises(InputError, match="Expected package.module:attribute"):
        from_json({"type": "os:nothing_of_that_name"}, load=importing.load)


def test_a_name_that_is_no_dataclass_is_refused_even_where_code_is_allowed():
    with pytest.raises(ValueError, match="unknown type 'os:getcwd'"):
        from_json({"type": "os:getcwd"}, load=importing.load)


def test_values_that_json_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="plain values"):
        to_json(Recipe(defences={"x": object()}))


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seeds = (1,)


def test_reading_a_recipe_and_its_help_needs_neither_torch_nor_the_rooms():
    code = """
import sys
import gidef.config, gidef.main
loaded = {"torch", "numpy", "timm", "gidef.build", "gidef.data"} & set(sys.modules)
assert not loaded, loaded
try:
    gidef.main.main(gidef.config.Recipe(), args=["--help"])
except SystemExit as end:
    assert end.code in (0, None)
assert not {"torch", "timm", "gidef.build"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "--rounds.cohort-size" in done.stdout


def test_a_models_options_survive_json_and_its_dropout_is_refused():
    model = Model(name="resnet18", options={"zero_init_last": False, "act_layer": "gelu", "output_stride": 16})
    assert from_json(json.loads(json.dumps(to_json(Recipe(model=model))))).model == model
    (found,) = problems(Recipe(model=Model(name="resnet18", options={"drop_rate": 0.1})))
    assert "['drop_rate']" in found and "without dropout" in found


# --- the fixed ensemble --------------------------------------------------------------------------------------------------

MEMBERS = ("naive", "statistics", "eot", "joint", "joint smooth", "joint smoother", "joint guessed decoder", "read noise", "read noise guessed decoder", "read latent", "latent", "generative", "rounds", "analytic", "learned", "decoder")
VERSIONS = {
    "standard": (
        NaiveMatching(iterations=4000, restarts=4, halving=2), StatisticsMatching(iterations=4000, restarts=4, halving=2), EotMatching(iterations=1000, restarts=1, samples=16), JointMatching(iterations=4000, restarts=4, halving=2),
        JointMatching(iterations=4000, restarts=4, halving=2, tv=3e-3), JointMatching(iterations=4000, restarts=4, halving=2, tv=1e-2),
        JointMatching(iterations=4000, restarts=4, halving=2, decoder="surrogate", surrogate_steps=600),
        ReadNoise(iterations=4000, restarts=4, halving=2), ReadNoise(iterations=4000, restarts=4, halving=2, decoder="surrogate", surrogate_steps=600), ReadLatent(iterations=4000, restarts=4, halving=2),
        LatentDecoding(iterations=1000, steps=3000, shadow_steps=600), GenerativePrior(iterations=4000, restarts=1, fit_steps=3000), MultiRound(iterations=2000, restarts=1, rounds=4), Analytic(),
        LearnedInversion(steps=3000, gradients=4000, surrogate_steps=600), PostHocDecoder(steps=3000),
    ),
    "quick": (
        NaiveMatching(iterations=300, restarts=1, halving=2), StatisticsMatching(iterations=300, restarts=1, halving=2), EotMatching(iterations=75, restarts=1, samples=4), JointMatching(iterations=300, restarts=1, halving=2),
        JointMatching(iterations=300, restarts=1, halving=2, tv=3e-3), JointMatching(iterations=300, restarts=1, halving=2, tv=1e-2),
        JointMatching(iterations=300, restarts=1, halving=2, decoder="surrogate", surrogate_steps=150),
        ReadNoise(iterations=300, restarts=1, halving=2), ReadNoise(iterations=300, restarts=1, halving=2, decoder="surrogate", surrogate_steps=150), ReadLatent(iterations=300, restarts=1, halving=2),
        LatentDecoding(iterations=75, steps=150, shadow_steps=150), GenerativePrior(iterations=300, restarts=1, fit_steps=150), MultiRound(iterations=150, restarts=1, rounds=2), Analytic(),
        LearnedInversion(steps=200, gradients=400, surrogate_steps=150), PostHocDecoder(steps=150),
    ),
    "smoke": (
        NaiveMatching(iterations=3, restarts=2, halving=2), StatisticsMatching(iterations=3, restarts=2, halving=2), EotMatching(iterations=1, restarts=1, samples=2), JointMatching(iterations=3, restarts=2, halving=2),
        JointMatching(iterations=3, restarts=2, halving=2, tv=3e-3), JointMatching(iterations=3, restarts=2, halving=2, tv=1e-2),
        JointMatching(iterations=3, restarts=2, halving=2, decoder="surrogate", surrogate_steps=2),
        ReadNoise(iterations=3, restarts=2, halving=2), ReadNoise(iterations=3, restarts=2, halving=2, decoder="surrogate", surrogate_steps=2), ReadLatent(iterations=3, restarts=2, halving=2),
        LatentDecoding(iterations=1, steps=2, shadow_steps=2), GenerativePrior(iterations=3, restarts=1, fit_steps=2), MultiRound(iterations=1, restarts=1, rounds=2), Analytic(),
        LearnedInversion(steps=2, gradients=40, surrogate_steps=2), PostHocDecoder(steps=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("labels", ["known", "recovered"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_budgets_of_a_fixed_ensemble_are_part_of_its_version(version, labels):
    members = standard(version, labels)
    assert list(members) == list(MEMBERS)
    for (name, member), expected in zip(members.items(), VERSIONS[version], strict=True):
        assert member == (replace(expected, labels=labels) if name != "decoder" else expected), name
