"""Every attack of a recipe. The ids are those of the literature's families, A0 … A12, as the tables show them.

Names of starts, distances and decays are those of `gidef.attack.matching`; the docstrings there say what each setting does.
"""

import itertools
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

_config = dataclass(frozen=True, kw_only=True, slots=True)


# --- gradient matching ----------------------------------------------------------------------------------------------------


@_config
class NaiveMatching:
    """A0: match the gradient of the noise-free model, with tuned settings (see gidef.attack.matching)."""

    iterations: int = 2000
    restarts: int = 1
    distance: Literal["cosine", "l2", "cosine_layers"] = "cosine"
    lr: float = 0.1
    """Adam's first step, in image units [0, 1]."""
    signed: bool = False
    """Step by the sign of the pixels' gradient."""
    soft_sign: bool = False
    """Step by a smooth sign of it instead."""
    langevin: float = 0.0
    """Standard deviation of the noise that each step adds to the pixels, in step sizes (Langevin dynamics, as in GradInversion)."""
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "quadratic"
    """Of the step size."""
    warmup: int = 0
    """Iterations over which the step size rises."""
    tv: float = 3e-3
    """Weight of the total variation."""
    tv_boost: float = 100.0
    """Times the weight at the start; it falls to 1 over the first 3/4."""
    kink_width: tuple[float, float] | None = (1.0, 0.1)
    """First and last width of the curvature given to ReLU's kinks; None: autograd's flat kinks, as in published attacks."""
    start: str = "normal"
    """Of the images: normal, uniform, grey, smooth, patterned-4, …"""
    halving: int = 1
    """h > 1: all but the best 1/h of the restarts stop early, again and again (successive halving)."""
    patience: int | None = None
    """An attack without progress over so many iterations stops."""
    choose_by: Literal["objective", "fit", "tv"] = "objective"
    """What picks among restarts: the attacker's loss, its distance alone, or the smoothness of the result (of the restarts that ran longest)."""
    form: Literal["double_backward", "forward_over_reverse", "central_difference"] = "double_backward"
    """How the attacker differentiates the client's gradient; the first-order forms need no second derivatives of the model's operators."""
    labels: Literal["known", "counts", "recovered", "searched", "soft"] = "known"
    """What the threat model grants: each image's label, how often each occurs, or nothing: then they are recovered from the last layer, as classes or,
    for clients that train on mixed labels, as probabilities ("soft"), or searched with the images. Over several local steps, and over the clients of a sum
    where it matters whose they are, the order of labels that are counted or recovered is guessed, anew for each restart: take several."""


@_config
class InvertingGradients(NaiveMatching):
    """A0 exactly as published: signed Adam, step decay, constant total variation, flat kinks (Geiping et al. 2020)."""

    iterations: int = 4800
    signed: bool = True
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "step"
    tv: float = 1e-2
    tv_boost: float = 1.0
    kink_width: tuple[float, float] | None = None


@_config
class ModernInvertingGradients(InvertingGradients):
    """A0 with a smooth sign, warm-up, cosine decay, a patterned start and a total variation of colours (the later settings of its authors' code)."""

    iterations: int = 24_000
    signed: bool = False
    soft_sign: bool = True
    sharpening: bool = True
    """Of the smooth sign: the authors', tanh(s g) / s with s from 1 to 0 over the iterations, which is g itself where |g| ≪ 1; else tanh(g / rms(g))."""
    tv: float = 0.1
    opponents: bool = True
    """The total variation is isotropic, and over the channels and their differences (double opponents); else anisotropic, over the channels."""
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "cosine"
    warmup: int = 50
    start: str = "patterned-4"


@_config
class DeepLeakage(NaiveMatching):
    """A0, DLG (Zhu et al. 2019): squared distance, L-BFGS, images and labels searched together. labels=recovered makes it iDLG (Zhao et al. 2020)."""

    iterations: int = 300
    distance: Literal["cosine", "l2", "cosine_layers"] = "l2"
    lr: float = 1.0
    """Of L-BFGS, before its line search; one iteration is twenty evaluations."""
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "constant"
    tv: float = 0.0
    tv_boost: float = 1.0
    kink_width: tuple[float, float] | None = None
    history: int = 20
    """Pairs that L-BFGS keeps."""
    labels: Literal["known", "counts", "recovered", "searched", "soft"] = "searched"


@_config
class GradInversion(NaiveMatching):
    """A0, GradInversion (Yin et al. 2021): squared distance, total variation, pixel norm, and consistency of the restarts after registration,
    and noise in the steps.

    Its BatchNorm prior needs a net with BatchNorm, that is, model.norm keep or frozen (see gidef.attack.priors.bn_statistics).
    """

    iterations: int = 20_000
    restarts: int = 4
    distance: Literal["cosine", "l2", "cosine_layers"] = "l2"
    langevin: float = 0.2
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "cosine"
    warmup: int = 50
    tv: float = 1e-4
    tv_boost: float = 1.0
    kink_width: tuple[float, float] | None = None
    pixel_norm: float = 1e-6
    """Weight of the images' mean square."""
    group: float = 1e-2
    """Weight of the distance to the registered mean of the restarts."""
    max_shift: float = 4.0
    """Pixels by which restarts may be shifted against one another."""
    statistics: Literal["released", "running", "proxy", "none"] = "released"
    """What it matches the candidate's BatchNorm statistics with: those that the change of the running statistics tells of the batch, where this leaves
    the client (model.norm=keep), else the running ones that the server holds; these in any case; "proxy": those that public images have under the same
    weights, in batches of the victim's size; or nothing. Running ones of 0 and 1, of random weights, tell nothing and are left out."""
    statistics_weight: float = 0.1
    """Of that prior."""


@_config
class StatisticsMatching(GradInversion):
    """A0 with GradInversion's prior on BatchNorm's statistics, and tuned settings for all else: those of `NaiveMatching`. Left out where nothing is known of the
    statistics, as it is A0 there. Batches of 4 on a net of three layers with BatchNorm, synthetic cells of 16 px, released statistics, 150 iterations: 23.6 dB, where
    A0 has 15.4 and, in 200 iterations, `GradInversion` 18.2; after training 26.5 in 200, A0 20.7 in 400."""

    iterations: int = 2000
    restarts: int = 1
    distance: Literal["cosine", "l2", "cosine_layers"] = "cosine"
    langevin: float = 0.0
    decay: Literal["constant", "step", "linear", "quadratic", "cosine"] = "quadratic"
    warmup: int = 0
    tv: float = 3e-3
    tv_boost: float = 100.0
    kink_width: tuple[float, float] | None = (1.0, 0.1)
    pixel_norm: float = 0.0
    group: float = 0.0


@_config
class EotMatching(NaiveMatching):
    """A1: match the mean gradient over draws of the noise, fresh in every iteration (expectation over transformation): that of the released loss, or where a
    decoder is in it that stays with the client, of its cross-entropy alone."""

    samples: int = 8


@_config
class SkipLayers(NaiveMatching):
    """A2: match only the tensors before the noise, with the noise-free model."""


@_config
class JointMatching(NaiveMatching):
    """A3: match over the images and the noise together. The one to beat."""

    tv: float | None = None
    """Weight of the total variation; None: 1e-3 where there is noise on the latent to search, since under much noise more draws less, else as A0's."""
    noise_lr: float = 0.3
    """Adam's first step on the noise, in its standard deviations."""
    noise_weight: float = 1e-3
    """Weight of the noise's mean square."""
    decoder: Literal["known", "surrogate", "unused"] = "known"
    """The private decoder in the released loss: granted (an upper bound on the attacker), replaced by one that the
    attacker trains on public data, or avoided by matching only the predictor's part with cross-entropy."""
    surrogate_steps: int = 600
    """Of that decoder's training."""


@_config
class DecoderAware(JointMatching):
    """A6: A3 that also stays close to what the decoder makes of the candidate, D(z̃(x)), or starts from its output. Under share policy `all` the decoder
    is the server's."""

    closeness: float = 1e-2
    """Weight of the mean square distance to D(z̃(x))."""
    begin: Literal["drawn", "decoded"] = "drawn"
    """First candidates: as `start` says, or what the decoder makes of the latent that the predictor's gradients tell (A5); of one gradient, not of a
    delta of several steps, and with labels known or recovered."""


@_config
class ReadNoise(JointMatching):
    """A3 without a search for the noise, where A5 reads the perturbed latent z̃ off the predictor's gradient: of a candidate x the noise is then what leads from x
    to z̃, (z̃ − m(x)) / σ(x), and the tensors before the noise alone are matched, since the others are explained. Of a delta of several steps of SGD
    in one epoch, with known labels, z̃ of every step is read, each at the weights that it met. Where z̃ cannot be read (the reading does
    not end within 1e-4 of the predictor's gradient, as in large batches or behind changes of the update), it is A3, and the run says for how many."""

    tv: float | None = 3e-3
    """Weight of the total variation; A0's, as nothing but the images is searched."""


@_config
class ReadLatent(NaiveMatching):
    """A5 with the front itself for a decoder, where the latent z has no noise: z is read off the predictor's gradient, as by A5. Then of a candidate x the front's
    gradient at z, ∂⟨m(x), ∂L/∂z⟩/∂θ, is matched, which holds what lies behind at its true value, and its own latent m(x) is drawn to z. Of several local steps
    (as for `ReadNoise`) all of that holds at the weights that each met. Where z cannot be read (as there) or the gradient does not tell it, it is A0, by all terms of the client's loss, and what layers read of a candidate is held to the row
    spaces of their weights' gradients, as far as these tell them (`attack.row_spaces`); the run says for how many. Ours; a feature inversion (Mahendran and
    Vedaldi 2015) beside gradient matching."""

    closeness: float = 1.0
    """Weight of ‖m(x) − z‖² / ‖z‖²."""


@_config
class GenerativePrior(JointMatching):
    """A8: A3 over the codes of a generator trained on public images, instead of pixels; then pixels from there. Signs and noise of steps are those of pixels.

    Where the defence's law tells of noise on the update, pixels that are free would fit the noise: of the iterations that are left for them a share as large as
    that of noise in the release's squared norm goes to the codes as well, and pixels are held to the codes' images by as much as the law makes likely."""

    code: int = 64
    """Numbers per image."""
    generator: Literal["autoencoder", "gan"] = "autoencoder"
    fit_steps: int = 1500
    """Of its training."""
    code_lr: float = 0.05
    code_share: float = 0.3
    """Of the iterations: spent on codes, before pixels; more under noise on updates."""


@_config
class MultiRound(JointMatching):
    """A9: A3 over several rounds that released the same images at the checkpoint's weights, all that a defence draws drawn afresh: noise on the latent or
    on updates, what quantisation rounds, how images are encoded. Each round's draw is searched by itself, as far as A3 searches it. So are the mixtures of
    MixUp or InstaHide, where labels are known and no other change of images stands beside: the image is then the likeliest behind them all, by the shares that their
    soft labels tell and the means of public images by class (`defence.encode.from_mixtures`). Elsewhere one candidate stands for the rounds' different ones. Where nothing
    is drawn there is nothing to gain, and it is left out; noise that every image keeps for ever is searched as the one draw that it is. Where a defence leaves part of an update as it
    is, another in every release (GradDefense), and nothing else is drawn, the releases are matched as one: entries on which two agree bit for bit are exact,
    the others averaged, and trusted by their spread."""

    rounds: int = 4


@_config
class SurrogateModel(NaiveMatching):
    """A10: the delta of local training as one gradient at a model between its first and last weights (Zhu et al. 2023). For evaluation.release=delta;
    the other attacks simulate the local steps there."""

    alpha_lr: float = 0.01


# --- without gradient matching --------------------------------------------------------------------------------------------


@_config
class Analytic:
    """A4: in closed form, where the model has a biased linear layer or patch embedding at its input, or is a small chain of convolutions (R-GAP)."""

    labels: Literal["known", "recovered"] = "known"


@_config
class LatentDecoding:
    """A5: the latent, perturbed or not, from the predictor's gradients, then a decoder trained on public images. The attack under share policy `head`, whatever
    the defence; where the front is shared, only for noise on the latent."""

    iterations: int = 1000
    """Of the free search, from each start, where no layer tells the span of a batch's latents or none of that explains the update. They do not bound the search
    in that span, which comes first for at most 8 images: at most 32 starts of 42 and of 72 steps in turn, mostly one."""
    restarts: int = 1
    steps: int = 1500
    """Of the decoder's training."""
    batch_size: int = 64
    """Of the decoder's training."""
    front: Literal["shadow", "known"] = "shadow"
    """Under `head`: a front that the attacker trains under the known predictor on public images, or the true one (a bound)."""
    shadow_steps: int = 500
    labels: Literal["known", "recovered"] = "known"


@_config
class LearnedInversion:
    """A7: a network trained on the defended gradients of public images."""

    steps: int = 2000
    gradients: int = 4000
    """Gradients of public images that are simulated, each with fresh noise."""
    sketch: int = 8192
    """Numbers that a gradient is hashed to, where it has many more."""
    surrogate_steps: int = 600
    """Of the training of a decoder that stands in for a private one."""
    labels: Literal["known", "recovered"] = "known"


@_config
class PostHocDecoder:
    """A12: a larger decoder trained after the fact on public images; it is given the perturbed latent (an upper bound)."""

    steps: int = 1500
    batch_size: int = 64
    lr: float = 1e-3


@_config
class ImprintServer:
    """A11: a malicious server puts a linear layer that bins images by their brightness before the model (Robbing the Fed, Fowl et al. 2022). Of a
    delta, the sparse block of its variant for FedAvg, trained by plain SGD with the model.

    The whole client's update goes through the defence, which the attack overlooks. Labels are recovered. Of the sum over a cohort the bins are read as of
    one larger batch: several times as many of them as its images tell these apart.
    """

    bins: int = 128


@_config
class ZeroedLevel(JointMatching):
    """A11: a malicious server sends a noise level of nought, and matches by A3 over the images and the noise that the client's floor keeps. Where no
    noise is left, it finds in the gradient of cross-entropy what A0 does."""

    tv: float | None = 3e-3


@_config
class Standard:
    """version="standard": the fixed ensemble with fixed budgets, so that nobody evaluates a defence with a weak attack by accident.

    Naive (A0; where they are known, with BatchNorm's statistics), EoT (A1), joint (A3, with three weights of the total variation, and with the noise read), analytic (A4), the latent read (A5; behind a private front decoded by a guessed one), learned (A7), under noise on updates codes of a
    generator (A8), multi-round (A9), post-hoc decoder (A12); the worst case per victim counts, and a control that matches a shuffled gradient tells what the priors alone would draw.
    """

    version: Literal["standard", "quick", "smoke"] = "standard"
    """"quick": the same attacks with budgets for a first look, never for a claim; "smoke": a few steps, to see that all of it runs."""
    labels: Literal["known", "recovered"] = "known"


@_config
class Tuned:
    """An attack whose settings are sought on the images kept for tuning (`evaluation.num_tuning`), for each defence and checkpoint.

    Every point of the grid attacks these images with all seeds; the one with the best mean PSNR there attacks the victims, and stands in the row's note.
    """

    attack: Any = JointMatching()
    """One of this page but an ensemble, or one of your own."""
    grid: dict[str, tuple[Any, ...]] = field(default_factory=lambda: {"lr": (0.03, 0.1, 0.3), "tv": (1e-3, 3e-3, 1e-2)})
    """Fields of the attack, each with the values to try; all combinations are tried."""

    def points(self) -> list[dict[str, Any]]:
        """All combinations, the last field fastest."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def at(self, point: dict[str, Any]) -> Any:
        """The attack with the fields of a point."""
        return replace(self.attack, **point)

    def problems(self) -> list[str]:
        """What is wrong with the search, without the recipe's name for it."""
        if not is_dataclass(self.attack) or isinstance(self.attack, (type, Standard, Tuned)):
            return [f"attack={self.attack!r} has no settings to tune: give one attack."]
        names, found = {spec.name for spec in fields(self.attack)}, []
        if not self.grid:
            found.append("grid is empty: give fields of the attack with values to try.")
        for name, values in self.grid.items():
            if name not in names:
                found.append(f"grid names {name!r}, which the attack lacks: there are {', '.join(sorted(names))}.")
            if name in GRANTED:
                found.append(f"grid varies {name}, which is what the attacker is granted, no setting of his: make it attacks of their own.")
            if not isinstance(values, (tuple, list)):
                found.append(f"grid.{name}={values!r}: give a tuple of values.")
                continue
            if not values or len(set(map(repr, values))) != len(values):
                found.append(f"grid.{name}={values!r}: give one value or more, none of them twice.")
            if not all(value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and value and all(c.isalnum() or c in "-_" for c in value)) for value in values):
                found.append(f"grid.{name}={values!r}: give numbers, True, False, None or words, as they name folders.")
        return found


GRANTED = ("labels", "decoder", "rounds", "front")
"""Fields of the threat model."""
MATCHING = (NaiveMatching,)
ATTACKS = (NaiveMatching, Analytic, LatentDecoding, LearnedInversion, PostHocDecoder, ImprintServer, Standard)
IDS = {
    NaiveMatching: "A0", InvertingGradients: "A0", ModernInvertingGradients: "A0", DeepLeakage: "A0", GradInversion: "A0",
    StatisticsMatching: "A0", EotMatching: "A1", SkipLayers: "A2",
    JointMatching: "A3", ReadNoise: "A3", Analytic: "A4", LatentDecoding: "A5", ReadLatent: "A5", DecoderAware: "A6", LearnedInversion: "A7", GenerativePrior: "A8", MultiRound: "A9",
    SurrogateModel: "A10", ImprintServer: "A11", ZeroedLevel: "A11", PostHocDecoder: "A12", Standard: "standard",
}  # fmt: skip


READS = (ReadNoise, ReadLatent)
"""Attacks that match gradients behind a latent that is read first."""


def weight_of_variation(attack: NaiveMatching, *, noise: bool) -> float:
    """An attack's `tv`, or what None stands for. noise: whether there is noise on the latent to search."""
    return attack.tv if attack.tv is not None else 1e-3 if noise else NaiveMatching().tv


def controlled(attacks: dict[str, object]) -> str | None:
    """Name of the attack that the control repeats on a shuffled gradient: the first naive one (A0), else the first that matches gradients; None without."""
    matching = [name for name, attack in attacks.items() if isinstance(attack, NaiveMatching) or callable(getattr(attack, "plan", None))]
    return next((name for name in matching if IDS.get(type(attacks[name])) == "A0"), matching[0] if matching else None)


def standard(version: str = "standard", labels: str = "known") -> dict[str, object]:
    """The members of the fixed ensemble, by name. Budgets are part of the version: a change of them is another version."""
    # iterations, restarts, noise draws of EoT, rounds, training steps of the learned attack, of the decoder (and the generator) and of the guessed one, simulated gradients
    budgets = {"standard": (4000, 4, 16, 4, 3000, 3000, 600, 4000), "quick": (300, 1, 4, 2, 200, 150, 150, 400), "smoke": (3, 2, 2, 2, 2, 2, 2, 40)}
    iterations, restarts, draws, rounds, learned, decoder, surrogate, gradients = budgets[version]
    matching = {"iterations": iterations, "restarts": restarts, "halving": 2, "labels": labels}
    few = {"restarts": 1, "labels": labels}
    return {
        "naive": NaiveMatching(**matching),
        "statistics": StatisticsMatching(**matching),
        "eot": EotMatching(iterations=max(1, iterations // 4), samples=draws, **few),
        "joint": JointMatching(**matching),
        "joint smooth": JointMatching(**matching, tv=3e-3),  # of the total variation no weight is the best on every net
        "joint smoother": JointMatching(**matching, tv=1e-2),
        "joint guessed decoder": JointMatching(**matching, decoder="surrogate", surrogate_steps=surrogate),
        "read noise": ReadNoise(**matching),
        "read noise guessed decoder": ReadNoise(**matching, decoder="surrogate", surrogate_steps=surrogate),
        "read latent": ReadLatent(**matching),
        "latent": LatentDecoding(iterations=max(1, iterations // 4), steps=decoder, shadow_steps=surrogate, labels=labels),
        "generative": GenerativePrior(iterations=iterations, fit_steps=decoder, **few),
        "rounds": MultiRound(iterations=max(1, iterations // 2), rounds=rounds, **few),
        "analytic": Analytic(labels=labels),
        "learned": LearnedInversion(steps=learned, gradients=gradients, surrogate_steps=surrogate, labels=labels),
        "decoder": PostHocDecoder(steps=decoder),
    }


PRESETS = {
    "naive": NaiveMatching(), "inverting-gradients": InvertingGradients(), "modern": ModernInvertingGradients(), "dlg": DeepLeakage(),
    "idlg": DeepLeakage(labels="recovered"), "gradinversion": GradInversion(), "statistics": StatisticsMatching(), "eot": EotMatching(), "skip": SkipLayers(), "joint": JointMatching(restarts=4, halving=2),
    "read-noise": ReadNoise(restarts=4, halving=2), "read-latent": ReadLatent(),
    "analytic": Analytic(), "latent": LatentDecoding(), "decoder-aware": DecoderAware(), "learned": LearnedInversion(), "generative": GenerativePrior(),
    "rounds": MultiRound(), "surrogate-model": SurrogateModel(), "imprint": ImprintServer(), "zeroed": ZeroedLevel(), "decoder": PostHocDecoder(),
    "standard": Standard(), "quick": Standard(version="quick"), "smoke": Standard(version="smoke"),
}  # fmt: skip
"""Attacks by name, for `gidef attack RUN --attack NAME` on runs whose recipe has no attack of that name."""
