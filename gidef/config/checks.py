"""What is wrong with a recipe, as far as can be known without its data. Under the name of the page, `gidef.config`."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from gidef.config import (
    ATS,
    ATTACKS,
    CVB,
    DCS,
    DEFENCES,
    DPSGD,
    READS,
    CapacityNoise,
    Censor,
    DecoderAware,
    DeepLeakage,
    Evaluation,
    GradDefense,
    GradientNoise,
    GradInversion,
    InstaHide,
    IsotropicNoise,
    Krum,
    LearnedPerturbation,
    LocalTraining,
    Matched,
    Mean,
    ModernInvertingGradients,
    Precode,
    Pruning,
    Quantisation,
    ReadNoise,
    Recipe,
    Scaffold,
    SecureAggregation,
    SingleGradient,
    Soteria,
    Standard,
    SurrogateModel,
    TrimmedMean,
    Tuned,
    Undefended,
    controlled,
    ours,
    trains,
)

_AT_LEAST = {  # field name -> smallest allowed value; applied to every dataclass of these pages that has the field
    "num_clients": 1, "min_examples": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "count": 1, "cohort_size": 1, "patience": 1,
    "per_client": 1, "byzantine": 0, "chosen": 1, "stream_sample": 1, "stream_buffer": 1, "decoders": 1, "decoder_steps": 0, "decoder_sketch": 1, "decoder_steps_first": 0, "iterations": 1, "restarts": 1, "steps": 1, "num_victims": 1,
    "num_tuning": 0, "local_steps": 1, "local_epochs": 1, "judge_epochs": 1, "threads": 1, "workers": 0, "attacks_at_once": 0, "clients_at_once": 0, "size": 8, "halving": 1, "warmup": 0, "langevin": 0,
    "history": 1, "pixel_norm": 0, "group": 0, "max_shift": 0, "closeness": 0, "code": 1, "fit_steps": 1, "surrogate_steps": 1, "code_share": 0, "rounds": 1,
    "shadow_steps": 1, "bits_weight": 0, "trials": 1, "points": 0, "neck": 1, "samples": 1, "gradients": 1, "sketch": 1, "bins": 2,
    "statistics_weight": 0, "proximal": 0, "weight_decay": 0, "grad_clip": 0, "tv": 0, "strength": 0, "dependence_weight": 0, "std_floor": 0, "kl_weight": 0,
    "std": 0, "x_weight": 0, "y_weight": 0, "y_ratio": 0, "width": 1, "kernel": 1,
    "bits": 2, "draws": 1, "slices": 1, "noisy": 1,  # of defences that change updates
    "shard_size": 1, "checkpoints_kept": 1, "noise_weight": 0, "tv_boost": 1, "split_seed": 0, "momentum": 0, "local_momentum": 0, "beta1": 0, "beta2": 0, "ramp": 0, "ssim_threshold": 0, "mse_cap": 0,
}  # fmt: skip
_MORE_THAN = dict.fromkeys(("lr", "alpha", "std_init", "decoder_lr", "decoder_width", "noise_lr", "local_lr", "timeout_s", "stall_s", "tau", "kink_width", "alpha_lr", "code_lr", "bound"), 0)
_LESS_THAN = dict.fromkeys(("momentum", "local_momentum", "beta1", "beta2"), 1)
_AT_LEAST |= {"noise_multiplier": 0}
_MORE_THAN |= dict.fromkeys(("clip", "target_epsilon", "delta"), 0)
_LESS_THAN |= {"delta": 1, "dropouts": 1}
_AT_LEAST |= {"dropouts": 0, "strengths": 0}
_AT_LEAST |= {"mixing": 0, "mixed": 1, "concealed": 0, "z_weight": 0, "blend": 0, "apart": 0}  # of defences that change data


def problems(recipe: Recipe, *, trained: bool = False) -> list[str]:
    """Everything wrong with a recipe that can be known without its data: what was given, what was expected, what to change. trained: its searches are over."""
    found: list[str] = []
    _check_fields(recipe, "", found)
    if found := found or _defence_problems(recipe):  # what follows compares fields, and takes them for sound
        return found
    searched = {name: one for name, one in recipe.defences.items() if isinstance(one, Matched)}
    if not searched:
        return _plain_problems(recipe)
    unreferenced = [] if trained else _unreferenced(recipe)
    low, high = ([*unreferenced, *_problems_at(recipe, end)] for end in ("low", "high"))
    told = [text if text in high else _told_of(text, searched, "low") for text in low]
    return list(dict.fromkeys(told + [_told_of(text, searched, "high") for text in high if text not in low]))


def _problems_at(recipe: Recipe, end: Literal["low", "high"]) -> list[str]:
    """What is wrong with the recipe that has each search's defence at that end of its range; what lies between is as good as both."""
    defences = {name: one.at(getattr(one, end)) if isinstance(one, Matched) else one for name, one in recipe.defences.items()}
    plain, found = dataclasses.replace(recipe, defences=defences), []
    _check_fields(plain, "", found)
    return found or _plain_problems(plain)


def _told_of(text: str, searched: dict[str, Matched], end: str) -> str:
    """A problem of one end of a search, with that end."""
    names = [name for name in searched if any(text.startswith(f"defences.{name}{mark}") for mark in ":. ")]
    return f"{text} The search tries {end}={getattr(searched[max(names, key=len)], end)}." if names else text


def _unreferenced(recipe: Recipe) -> list[str]:
    """Searches below an undefended net that is not there."""
    if any(isinstance(one, Undefended) for one in recipe.chosen.values()):
        return []
    searched = {name: one for name, one in recipe.chosen.items() if isinstance(one, Matched) and one.accuracy is None}
    return [f"defences.{name}: points={one.points} are below the undefended net, which is not trained: add Undefended(), or give accuracy." for name, one in searched.items()]


def _defence_problems(recipe: Recipe) -> list[str]:
    """What among the defences is none, and what is wrong with searches in themselves."""
    found: list[str] = []
    for name, defence in recipe.defences.items():
        if isinstance(defence, tuple) and not defence:
            found.append(f"defences.{name} is an empty tuple: give the defences that it combines.")
        searched, called = (defence.defence, "defence=") if isinstance(defence, Matched) else (defence, "")
        wrong = [f"defences.{name}: {called}{text}" for part in (searched if isinstance(searched, tuple) else (searched,)) if (text := _no_defence(part))]
        if isinstance(defence, Matched) and not wrong:
            wrong = [f"defences.{name}: {text}" for text in defence.problems()]
        found += wrong
    return found


def _no_defence(part: Any) -> str:
    """Why a member of a combination, or a defence by itself, is none; "" if it is one."""
    if isinstance(part, Matched):
        return f"Matched(field={part.field!r}) is no member of another defence: write one Matched(defence=(..., ...), field={part.field!r}) around the whole combination."
    if isinstance(part, type):
        return f"{part.__name__} is a class: write {part.__name__}(), with its fields where they differ from their defaults."
    if isinstance(part, (tuple, list)):
        return f"{part!r:.80} is a {type(part).__name__} and no defence: a combination is one tuple, without another inside."
    own = (("changes_update", ("apply", "reveals", "imitate")), ("changes_data", ("encode", "unknowns", "imitate")))
    acts = any(getattr(part, kind, False) and all(callable(getattr(part, one, None)) for one in needed) for kind, needed in own)
    if isinstance(part, DEFENCES) or dataclasses.is_dataclass(part) and (acts or callable(getattr(part, "build", None))):
        return ""
    return f"{part!r:.80} is no defence: use one of gidef.config, or a dataclass with a method build(make_model)."


def _plain_problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe without searches whose fields are sound."""
    data, rounds, found = recipe.data, recipe.rounds, []
    if rounds.cohort_size is not None and rounds.cohort_size > data.num_clients:
        found.append(
            f"rounds.cohort_size={rounds.cohort_size} exceeds data.num_clients={data.num_clients}: a round draws clients without "
            "replacement. Lower one or raise the other."
        )
    if rounds.cohort_share is not None and rounds.cohort_size is not None:
        found.append(f"rounds.cohort_size={rounds.cohort_size} and rounds.cohort_share={rounds.cohort_share} both say how many clients a round draws: give one.")
    if rounds.cohort_share is not None and not 0 < rounds.cohort_share <= 1:
        found.append(f"rounds.cohort_share={rounds.cohort_share}: expected a share of the clients in (0, 1].")
    found.extend(_norm_problems(recipe))
    found.extend(_stream_problems(recipe))
    found.extend(_shard_problems(recipe))
    found.extend(_aggregate_problems(recipe))
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
        elif name[0] in "+-":
            found.append(f"name {name!r} of a defence or attack begins with {name[0]!r}, which spreadsheets read as a formula in table.csv: begin with a letter or digit.")
    if recipe.model.neck is not None and recipe.model.name != "small":
        found.append(f"model.neck={recipe.model.neck} is the small net's, not {recipe.model.name}'s: leave it out, or set model.name=small.")
    if drops := [option for option in recipe.model.options if "drop" in option]:
        found.append(f"model.options: networks are trained and attacked without dropout, so {drops} cannot be set. Leave them out.")
    if isinstance(rounds.server, Scaffold):
        plain = isinstance(recipe.clients, SingleGradient) or (recipe.clients.optimiser == "sgd" and recipe.clients.momentum == 0)
        if not plain:
            found.append("rounds.server=Scaffold corrects plain sgd steps: set clients.optimiser=sgd and clients.momentum=0, or take another server.")
    if isinstance(recipe.clients, LocalTraining) and recipe.clients.optimiser == "adam" and recipe.clients.momentum:
        found.append(f"clients.momentum={recipe.clients.momentum} is sgd's: set clients.optimiser=sgd, or momentum to 0 for adam.")
    for name, defence in recipe.defences.items():
        parts = defence if isinstance(defence, tuple) else (defence,)
        found.extend(_privacy_problems(f"defences.{name}", parts, recipe))
        found += [f"defences.{name}: {text}" for text in _data_problems(parts)]
        found += [f"defences.{name}: {text}" for text in _sum_problems(parts, recipe)]
        found += [f"defences.{name}: {text}" for text in _update_problems(parts)]
        training = [part for part in parts if trains(part)]
        others = [part for part in training if not isinstance(part, DPSGD)]
        if len(others) > 1 or (len(others) < len(training) and any(isinstance(part, Undefended) for part in others)):
            found.append(
                f"defences.{name} combines {', '.join(type(part).__name__ for part in parts)}: at most one may change the training, beside a DPSGD of images, and the others "
                "change updates or data. Keep one of them."
            )
        for part in parts:
            if isinstance(part, CapacityNoise):
                still = [f"{what}={how}" for what, how in (("front", part.front), ("level", part.level)) if how in ("frozen", "fixed")]
                if still and getattr(recipe.clients, "weight_decay", 0):
                    found.append(f"defences.{name}: {' and '.join(still)}, but clients.weight_decay={recipe.clients.weight_decay} moves it: set weight_decay=0.")
                if not part.std_floor:
                    found.append(f"defences.{name}: std_floor=0 lets the capacity grow without bound: set it above 0.")
            if isinstance(part, CVB) and part.kernel % 2 == 0:
                found.append(f"defences.{name}.kernel={part.kernel} is even: give an odd number, so that maps keep their size.")
            if isinstance(part, LearnedPerturbation):
                if part.law == "laplace" and part.kl_weight:
                    found.append(f"defences.{name}: kl_weight={part.kl_weight} needs law=gaussian; the KL term has no Laplace form here.")
                if part.kl_weight and not part.strength and not part.std_floor:
                    found.append(f"defences.{name}: the KL term (kl_weight={part.kl_weight}) is infinite at strength=0 and std_floor=0: raise one.")
                if part.decoder_sees == "gradient" and part.dependence_weight and name in recipe.chosen:
                    found += [f"defences.{name}: decoder_sees=gradient {text}" for text in _seeing_problems(part, recipe)]
                if part.dependence == "cka" and part.dependence_weight and recipe.clients.batch_size < 4:
                    found.append(f"defences.{name}: dependence=cka needs 4 images or more, not clients.batch_size={recipe.clients.batch_size}.")
    for name, attack in _each_attack(recipe, found):
        if not isinstance(attack, ATTACKS):
            if not callable(getattr(attack, "plan", None)):
                found.append(f"attacks.{name}={attack!r} is no attack: use one of gidef.config.attacks, or a dataclass with a method plan(case).")
            continue
        if isinstance(attack, SurrogateModel) and recipe.evaluation.release != "delta":
            found.append(f"attacks.{name}: a surrogate model stands in for local training, and evaluation.release={recipe.evaluation.release}: set it to delta.")
        if isinstance(attack, DeepLeakage) and attack.labels == "counts":
            found.append(f"attacks.{name}.labels=counts: L-BFGS attacks take known, recovered, soft or searched labels.")
        if isinstance(attack, DeepLeakage) and attack.langevin:
            found.append(f"attacks.{name}.langevin={attack.langevin}: L-BFGS takes no noise in its steps. Set it to 0, or take another attack.")
        if isinstance(attack, DeepLeakage) and (attack.signed or attack.soft_sign):
            found.append(f"attacks.{name}: L-BFGS steps by no signs. Set signed and soft_sign to false, or take another attack.")
        if isinstance(attack, ModernInvertingGradients) and attack.opponents and attack.tv_boost != 1:
            found.append(f"attacks.{name}.tv_boost={attack.tv_boost}: the total variation of colours keeps its weight. Set tv_boost=1, or opponents=False.")
        if isinstance(attack, GradInversion) and attack.restarts < 2 and attack.group:
            found.append(f"attacks.{name}: the consistency of restarts needs two or more, not restarts={attack.restarts}: raise it, or set group=0.")
        if isinstance(attack, DecoderAware) and attack.begin == "decoded" and (attack.labels not in ("known", "recovered") or is_more_than_a_step(recipe.evaluation)):
            found.append(
                f"attacks.{name}.begin=decoded reads a latent from one gradient whose labels are known or recovered, not labels={attack.labels} and "
                f"evaluation.local_steps={recipe.evaluation.local_steps}, local_epochs={recipe.evaluation.local_epochs}, local_optimiser={recipe.evaluation.local_optimiser}: "
                "set begin=drawn, or change these."
            )
        if isinstance(attack, READS) and attack.labels not in ("known", "recovered"):
            found.append(f"attacks.{name}.labels={attack.labels}: a latent is read with labels that are known or recovered. Set one of these.")
        if isinstance(attack, ReadNoise) and attack.decoder == "unused":
            found.append(f"attacks.{name}.decoder=unused matches the predictor alone, and this attack all but the predictor: set known or surrogate.")
        if recipe.evaluation.local_optimiser == "adam" and (isinstance(attack, SurrogateModel) or getattr(attack, "labels", "") == "soft"):
            what = "a surrogate model follows" if isinstance(attack, SurrogateModel) else "labels=soft reads"
            found.append(f"attacks.{name}: {what} a sum of gradients, which a delta of evaluation.local_optimiser=adam is not: set it to sgd, or leave the attack out.")
    if recipe.evaluation.control and controlled(recipe.attacks) is None and not any(isinstance(attack, Standard) for attack in recipe.attacks.values()):
        found.append("evaluation.control shuffles the gradient of an attack that matches it, and there is none in attacks: add a naive one, or set it to false.")
    found.extend(_delta_problems(recipe.evaluation))
    if recipe.evaluation.num_victims % recipe.evaluation.batch_size:
        found.append(
            f"evaluation.num_victims={recipe.evaluation.num_victims} is no multiple of evaluation.batch_size={recipe.evaluation.batch_size}: "
            "victims are observed in full batches. Change one of them."
        )
    for text in recipe.evaluation.judges:
        try:
            recipe.evaluation.judge_named(text)
        except ValueError as error:
            found.append(str(error))
    if len(set(recipe.evaluation.judges)) != len(recipe.evaluation.judges):
        found.append(f"evaluation.judges={recipe.evaluation.judges} repeats one. Remove the repetition.")
    if len(set(recipe.evaluation.checkpoints)) != len(recipe.evaluation.checkpoints):
        found.append(f"evaluation.checkpoints={recipe.evaluation.checkpoints} repeats one. Remove the repetition.")
    found.extend(_choice_problems(recipe))
    if not recipe.evaluation.checkpoints:
        found.append('evaluation.checkpoints is empty: give some of "untrained", "early", "final".')
    return list(dict.fromkeys(found + _strength_problems(recipe)))


def _delta_problems(evaluation: Evaluation) -> list[str]:
    """What is wrong with the local training behind a released delta, or asked of a gradient that has none."""
    neutral = {"local_steps": 1, "local_epochs": 1, "local_optimiser": "sgd", "local_momentum": 0}
    if evaluation.release == "gradient":
        asked = {name: getattr(evaluation, name) for name, value in neutral.items() if getattr(evaluation, name) != value}
        return [f"evaluation.{name}={value} is of a released delta: set evaluation.release=delta, or {name}={neutral[name]}." for name, value in asked.items()]
    found = []
    if evaluation.batch_size % evaluation.local_steps:
        found.append(
            f"evaluation.batch_size={evaluation.batch_size} is no multiple of evaluation.local_steps={evaluation.local_steps}: "
            "each local step takes an equal slice of the batch. Change one of them."
        )
    if evaluation.local_optimiser == "adam" and evaluation.local_momentum:
        found.append(f"evaluation.local_momentum={evaluation.local_momentum} is sgd's: set evaluation.local_optimiser=sgd, or local_momentum to 0 for adam.")
    return found


def is_more_than_a_step(evaluation: Evaluation) -> bool:
    """Whether a released delta is more than one gradient times a learning rate."""
    return evaluation.local_steps * evaluation.local_epochs > 1 or evaluation.local_optimiser == "adam"


def _seeing_problems(part: LearnedPerturbation, recipe: Recipe) -> list[str]:
    """What a decoder that sees each image's own gradient cannot be played against with."""
    found = []
    if part.schedule != "alternating":
        found.append(f"is played in turn, not schedule={part.schedule}: set schedule=alternating.")
    if recipe.model.norm == "keep":
        found.append("needs gradients of single images, which model.norm=keep does not have: set model.norm=group or frozen.")
    if recipe.share_policy == "head":
        found.append(
            "tells the decoder no more than the latent does where only the predictor's gradient leaves, and would put images into that: set "
            "decoder_sees=latent, or share_policy=full."
        )
    if recipe.speed.shard_size > 1:
        found.append(f"needs the whole network on a rank, not speed.shard_size={recipe.speed.shard_size}: set it to 1.")
    return found


def _strength_problems(recipe: Recipe) -> list[str]:
    """What stands in the way of evaluating defences at other strengths than they are trained at."""
    evaluation = recipe.evaluation
    strengths, found = tuple(evaluation.strengths), []
    if not strengths:
        found.append("evaluation.strengths is empty: give at least one; 1 is the trained strength.")
    if len({evaluation.named("", strength) for strength in strengths}) != len(strengths):
        found.append(f"evaluation.strengths={strengths} repeats one, in the six digits by which rows are named. Remove the repetition.")
    if strengths == (1.0,) or found:
        return found
    levels, foreign = False, False
    for name, defence in recipe.chosen.items():
        for part in defence if isinstance(defence, tuple) else (defence,):
            levels |= isinstance(part, (LearnedPerturbation, IsotropicNoise, CapacityNoise))
            foreign |= not ours(type(part))
            if isinstance(part, (Precode, CVB)):
                found.append(
                    f"defences.{name}: evaluation.strengths={strengths} multiply a level against a latent of unit RMS, and {type(part).__name__}'s code has the scale "
                    "that its net gives it: leave them at 1, or the defence out (only)."
                )
            if 0 in strengths and isinstance(part, CapacityNoise):
                found.append(f"defences.{name}: without noise, at evaluation.strengths=0, CapacityNoise has no capacity that is finite, nor a loss: leave 0 out, or take IsotropicNoise.")
            if 0 in strengths and isinstance(part, LearnedPerturbation) and part.kl_weight and evaluation.released_loss == "client":
                found.append(f"defences.{name}: the KL term (kl_weight={part.kl_weight}) is infinite at evaluation.strengths=0: leave 0 out, or set evaluation.released_loss=utility.")
        found += [
            f"defences.{evaluation.named(name, strength)} has the name of {name!r} at strength {strength:g} (evaluation.strengths): rename it."
            for strength in strengths if strength != 1 and evaluation.named(name, strength) in recipe.chosen
        ]  # fmt: skip
    if not levels and not foreign:
        found.append(f"evaluation.strengths={strengths}, but no defence here has noise on the latent to multiply: leave them at 1, or add LearnedPerturbation().")
    return found


def _each_attack(recipe: Recipe, found: list[str]) -> list[tuple[str, Any]]:
    """Every attack by name, tuned ones at each of their points; what is wrong with their search goes to `found`."""
    each: list[tuple[str, Any]] = []
    for name, attack in recipe.attacks.items():
        if not isinstance(attack, Tuned):
            each.append((name, attack))
            continue
        wrong, evaluation = attack.problems(), recipe.evaluation
        if recipe.choose is not None:
            wrong.append("a recipe with choose attacks the images kept for tuning, so that nothing is left to tune on. Give the attack by itself.")
        elif evaluation.num_tuning < evaluation.batch_size:
            wrong.append(f"evaluation.num_tuning={evaluation.num_tuning} gives no batch of evaluation.batch_size={evaluation.batch_size} to tune on: raise it.")
        points = [] if wrong else [attack.at(point) for point in attack.points()]
        for one in points:
            if ours(type(one)):
                _check_fields(one, f"attacks.{name}.attack.", wrong)
        found += [text if text.startswith("attacks.") else f"attacks.{name}: {text}" for text in dict.fromkeys(wrong)]
        each += [(name, one) for one in points] if not wrong else []
    return each


def _choice_problems(recipe: Recipe) -> list[str]:
    """What stands in the way of a choice among the recipe's defences."""
    evaluation, found = recipe.evaluation, []
    if recipe.choose is None:
        return found
    if not evaluation.num_tuning or evaluation.num_tuning % evaluation.batch_size:
        found.append(
            f"evaluation.num_tuning={evaluation.num_tuning}: a recipe with choose attacks these images, in full batches of evaluation.batch_size={evaluation.batch_size}. "
            "Give a multiple of it."
        )
    plain = [isinstance(one, Undefended) for one in recipe.chosen.values()]
    if not any(plain) or all(plain) or not recipe.attacks:
        found.append("choose needs Undefended(), another defence to take, and an attack: add what is missing, or leave choose out.")
    if 1 not in evaluation.strengths:
        found.append(f"evaluation.strengths={tuple(evaluation.strengths)}: choose takes a defence by the attacks on it as it was trained. Add 1 to them, or leave choose out.")
    return found


def _norm_problems(recipe: Recipe) -> list[str]:
    """What clients cannot do whose BatchNorm normalises by batches and moves running statistics."""
    evaluation, found, ways = recipe.evaluation, [], "Set model.norm=frozen or group"
    if recipe.model.norm != "keep":
        return []
    if recipe.clients.batch_size < 2:
        found.append(f"clients.batch_size={recipe.clients.batch_size}: model.norm=keep normalises by a batch's statistics, and one image has none. {ways}, or raise it.")
    seen = evaluation.batch_size // evaluation.local_steps
    if recipe.attacks and seen < 2:
        found.append(
            f"evaluation.batch_size={evaluation.batch_size} in {evaluation.local_steps} step(s) observes batches of {seen} image(s): model.norm=keep normalises by a batch's "
            f"statistics, and no client trains on one image. {ways}, or raise it."
        )
    if recipe.speed.shard_size > 1:
        found.append(f"speed.shard_size={recipe.speed.shard_size}: each rank of a group would normalise its part of a batch (model.norm=keep) by itself. {ways}.")
    if recipe.speed.sharded_server:
        found.append(f"speed.sharded_server=True steps every tensor alike, and running statistics (model.norm=keep) are averaged. {ways}, or leave it out.")
    for name, defence in recipe.defences.items():
        parts = defence if isinstance(defence, tuple) else (defence,)
        if any(isinstance(part, DPSGD) for part in parts):
            found.append(f"defences.{name}: DPSGD clips and noises gradients, and running statistics (model.norm=keep) would tell of the images beside them. {ways}.")
        if any(isinstance(part, Soteria) for part in parts):
            found.append(f"defences.{name}: Soteria prunes by what each image alone makes of a feature, and batches (model.norm=keep) mix images. {ways}.")
        if any(isinstance(part, CapacityNoise) and part.front == "frozen" for part in parts):
            found.append(f"defences.{name}: front=frozen stands still, and its running statistics (model.norm=keep) would move. {ways}.")
    return found


def _stream_problems(recipe: Recipe) -> list[str]:
    """What stands in the way of streaming clients."""
    data, found = recipe.data, []
    if not data.stream:
        return ["data.client_shards names shards to stream from: set data.stream=True, or leave it out."] if data.client_shards else []
    if (data.path is None) == (not data.client_shards):
        found.append("data.stream needs the clients' shards: give data.path with a {client}, or data.client_shards, and not both.")
    for name, defence in recipe.defences.items():
        parts = defence if isinstance(defence, tuple) else (defence,)
        if any(isinstance(part, DPSGD) and part.level == "sample" for part in parts):
            found.append(f"defences.{name}: a DPSGD of images draws each step from all of a client's images: set level=client, or data.stream=False.")
    return found


def _aggregate_problems(recipe: Recipe) -> list[str]:
    """What stands in the way of an aggregation that needs single updates."""
    rule, size, found = recipe.rounds.aggregate, recipe.cohort, []
    if recipe.speed.sharded_server and isinstance(recipe.rounds.server, Scaffold):
        found.append("speed.sharded_server=True: every client needs the whole of Scaffold's control variate. Take another server, or leave it out.")
    if isinstance(rule, Mean):
        return found
    name = type(rule).__name__
    if recipe.speed.reduction != "fixed_point":
        found.append(f"speed.reduction={recipe.speed.reduction}: {name} adds nothing up. Leave it at fixed_point.")
    if isinstance(recipe.rounds.server, Scaffold):
        found.append(f"rounds.aggregate={name}: Scaffold's control variate is the mean of the clients', which no other rule keeps. Take another server.")
    for key, defence in recipe.defences.items():
        parts = defence if isinstance(defence, tuple) else (defence,)
        if any(isinstance(part, SecureAggregation) for part in parts):
            found.append(f"defences.{key}: {name} needs the single updates of a cohort, which SecureAggregation masks: leave it out, or set rounds.aggregate=Mean.")
        if any(isinstance(part, DPSGD) and part.level == "client" for part in parts):
            found.append(f"defences.{key}: the noise of a DPSGD of clients is measured out for their mean, not for {name}: set level=sample, or aggregate=Mean.")
    if isinstance(rule, TrimmedMean) and (not 0 <= rule.share < 0.5 or 2 * math.ceil(rule.share * size - 1e-9) >= size):
        found.append(f"rounds.aggregate.share={rule.share} of a cohort of {size} is negative or leaves no client in the middle: change it, or draw more clients.")
    if isinstance(rule, Krum) and size < 2 * rule.byzantine + 3:
        found.append(f"rounds.aggregate.byzantine={rule.byzantine} needs a cohort of {2 * rule.byzantine + 3} or more, not {size}: lower it, or draw more.")
    elif isinstance(rule, Krum) and rule.chosen > size - rule.byzantine:
        found.append(f"rounds.aggregate.chosen={rule.chosen} of {size} clients with byzantine={rule.byzantine}: give at most {size - rule.byzantine}.")
    return found


def _looks_at_images(part: Any) -> bool:
    return isinstance(part, (Soteria, Censor, GradDefense)) or getattr(part, "needs_own", False)


def _behind_dpsgd(part: Any) -> str:
    """Why a change of updates cannot come after a DPSGD of clients; "" if it can, as what leaves the update's noise as it is does."""
    if not getattr(part, "changes_update", False) or (isinstance(part, GradientNoise) and not part.relative):
        return ""
    if _looks_at_images(part):
        return f"{type(part).__name__} behind DPSGD chooses what leaves by the images themselves, which no noise covers then. Put it before DPSGD."
    return (
        f"{type(part).__name__} behind DPSGD changes each client's update by itself, its share of the cohort's noise with it, which epsilon counts as a whole in the "
        "sum. Put it before DPSGD."
    )


def _beside_dpsgd(part: Any, private: DPSGD) -> str:
    """Why a defence of training has no place beside a DPSGD of images; "" if it has one."""
    name = type(part).__name__
    if getattr(part, "couples_batch", False):
        return f"the loss of {name} couples the images of a batch, so that none has a gradient of its own to clip. Leave one out."
    if isinstance(part, LearnedPerturbation) and part.dependence_weight:
        return (
            f"{name}'s decoder learns from the images by steps that are neither clipped nor noised, and every later gradient depends on it, which epsilon does not "
            "count: set dependence_weight=0, which learns the level without it, or level=client."
        )
    if not isinstance(part, (LearnedPerturbation, IsotropicNoise, CapacityNoise, Precode, CVB)):
        return f"whether {name}'s loss is a mean over images, none of which enters the others' parts, is not known here: leave one out, or set level=client."
    if private.form == "ghost":
        return f"form=ghost has norms of the cross-entropy of a net without noise, and {name} has noise: set form=per_sample."
    return ""


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
    alone = {
        "clients_schedule": "longest_first", "reduction": "fixed_point", "sharded_server": False, "clients_at_once": 1, "fused_optimisers": False,
        "channels_last": False, "compile_training": False,
    }  # fmt: skip
    for name, plain in alone.items():
        if getattr(speed, name) != plain:
            found.append(f"speed.{name}={getattr(speed, name)} is for clients on one rank each: leave it at {plain}, or set speed.shard_size=1.")
    if recipe.data.stream:
        found.append("data.stream=True is for clients on one rank each: keep the images in memory, or set speed.shard_size=1.")
    if not isinstance(recipe.rounds.aggregate, Mean):
        found.append(f"rounds.aggregate={type(recipe.rounds.aggregate).__name__} needs whole updates: take Mean, or set speed.shard_size=1.")
    if speed.shard_backend == "deepspeed":
        unlike = [name for name in ("accumulate", "proximal") if getattr(clients, name, 0) > (name == "accumulate")]
        unlike = [f"clients.{name}={getattr(clients, name)}" for name in unlike]
        unlike += ["clients.precision=bfloat16"] * (clients.precision == "bfloat16") + ["rounds.server=Scaffold"] * isinstance(recipe.rounds.server, Scaffold)
        if unlike:
            found.append(f"{', '.join(unlike)}: the step of speed.shard_backend=deepspeed knows none of it. Set shard_backend=fsdp2.")
    for name, defence in recipe.chosen.items():
        parts = defence if isinstance(defence, tuple) else (defence,)
        for part in parts:
            if getattr(part, "schedule", "") == "simultaneous":
                found.append(f"defences.{name}: schedule=simultaneous routes gradients itself: take alternating, or set speed.shard_size=1.")
            if isinstance(part, SecureAggregation):
                found.append(f"defences.{name}: masks cancel in whole sums: leave SecureAggregation out, or set speed.shard_size=1.")
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
    apart = [part for part in parts if trains(part) and not isinstance(part, Undefended)]
    if any(isinstance(part, DCS) for part in data) and apart:
        found.append(f"DCS adds images to a batch, whose noise and terms {type(apart[0]).__name__} counts by the private ones: leave one out.")
    return found


def _update_problems(parts: tuple[Any, ...]) -> list[str]:
    """Ranges of the defences of updates among a combination that their fields' names do not say, without its name."""
    found = []
    for part in parts:
        if isinstance(part, (Pruning, Soteria)) and not 0 <= part.share <= 1:
            found.append(f"share={part.share} of {type(part).__name__}: expected a share in [0, 1].")
        if isinstance(part, Quantisation) and part.bits > 16:
            found.append(f"bits={part.bits} of Quantisation: expected 2 to 16.")
        if isinstance(part, GradDefense) and part.noisy > part.slices:
            found.append(f"noisy={part.noisy} of slices={part.slices} of GradDefense: expected at most as many. Lower noisy, or raise slices.")
    return found


def _sum_problems(parts: tuple[Any, ...], recipe: Recipe) -> list[str]:
    """What stands in the way of a combination's secure aggregation, without its name."""
    secure, size = [part for part in parts if isinstance(part, SecureAggregation)], recipe.cohort
    if not secure:
        return []
    found = [f"holds {len(secure)} SecureAggregation: keep one."] if len(secure) > 1 else []
    if recipe.speed.reduction != "fixed_point" or recipe.speed.sharded_server:
        found.append("masks cancel in whole fixed-point sums: leave speed.reduction at fixed_point and speed.sharded_server out.")
    if size < 2:
        found.append(f"a sum hides a client among others, and a cohort has {size} clients (rounds.cohort_size, cohort_share or data.num_clients): give at least 2.")
    gone = int(secure[0].dropouts * size)
    if size - gone < min(size, 2 * size // 3 + 1):
        found.append(f"dropouts={secure[0].dropouts} leave {size - gone} of {size} clients, fewer than the {2 * size // 3 + 1} that restore a sum: lower it.")
    if any(getattr(part, "changes_data", False) for part in parts):
        found.append("attacks on the sums of encoded batches are not simulated: leave SecureAggregation or the defence of data out.")
    if gone and any(isinstance(part, DPSGD) and part.level == "client" for part in parts):
        found.append(f"dropouts={secure[0].dropouts} take a part of DPSGD's noise along, which epsilon counts: set dropouts=0.")
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
        return found + [f"{name}: {why}" for part in parts[parts.index(private[0]) + 1 :] if (why := _behind_dpsgd(part))]
    looking = [type(part).__name__ for part in parts if _looks_at_images(part)]
    found += [f"{name}: {one} chooses what leaves by the images themselves, which no noise of DPSGD covers. Leave one out." for one in looking]
    if getattr(clients, "accumulate", 1) > 1:
        found.append(f"{name}: clients.accumulate={clients.accumulate}: a step is one Poisson sample, as epsilon counts them. Set it to 1, and raise batch_size.")
    if (share := {"tf32": 0.05, "bfloat16": 0.4}.get(clients.precision)) is not None:
        found.append(f"{name}: clients.precision={clients.precision} rounds the norms that bound each image's part by up to {share} %: set it to float32.")
    others = [part for part in parts if trains(part) and not isinstance(part, (DPSGD, Undefended))]
    return found + [f"{name}: {why}" for part in others if (why := _beside_dpsgd(part, private[0]))]


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
                    if ours(type(part)):
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
