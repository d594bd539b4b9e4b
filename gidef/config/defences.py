"""The defences that a recipe may choose. Those with `changes_update` act on what leaves, those with `changes_data` on what is trained on, those
with `changes_sum` on what of a cohort the server sees; all combine with any other in a tuple."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

_config = dataclass(frozen=True, kw_only=True, slots=True)


@_config
class Undefended:
    """Cross-entropy, and everything leaves as it is."""


@_config
class LearnedPerturbation:
    """Noise of learned level on the latent, played against a decoder: arXiv 2503.16542, as reconstructed in the docs of `defence`."""

    strength: float = 1.0
    """kappa, multiplies the learned level; the latent has unit RMS."""
    dependence: Literal["pearson2", "ssim", "neg_mse", "dcor", "cka"] = "pearson2"
    """R(image, reconstruction), which the client minimises."""
    dependence_weight: float = 1.0
    """lambda, against cross-entropy in nats; 0 learns the level without a decoder."""
    ramp: float = 0.1
    """Share of the rounds over which lambda rises linearly from 0."""
    level: Literal["global", "conditional"] = "global"
    """A level per channel, or one computed from the latent by a 1x1 convolution."""
    law: Literal["gaussian", "laplace"] = "gaussian"
    frozen: bool = False
    """One noise draw per image for ever, against averaging over rounds."""
    mean: bool = False
    """Also learn a shift of the latent."""
    std_init: float = 1.0
    std_floor: float = 0.1
    """sigma_min, enforced by the client whatever the server sends."""
    kl_weight: float = 0.0
    """beta, on KL(N(m, sigma^2) || N(0, 1)) per latent entry; Gaussian only."""
    decoder_steps: int = 1
    decoder_steps_first: int = 5
    """Decoder steps per batch in a client's first epoch."""
    decoder_lr: float = 1e-3
    decoder_width: float = 1.0
    """Multiplies the decoder's channels."""
    decoder_sees: Literal["latent", "gradient"] = "latent"
    """What the decoder of the game is handed: the perturbed latent, or with it each image's own gradient of the cross-entropy, sketched (slower; ours)."""
    decoder_sketch: int = 1024
    """Numbers that such a gradient is hashed to."""
    decoder_loss: Literal["mse_ssim", "mse"] = "mse_ssim"
    """L_d: MSE + (1 - SSIM) / 2, or the MSE alone, for which with dependence="neg_mse" both players play for one scalar."""
    schedule: Literal["alternating", "simultaneous"] = "alternating"
    """Whose step comes first. alternating: the decoder's, then the client's against the new decoder. simultaneous: both from one pass, at the same
    weights, then the decoder's further steps: faster, and another algorithm."""
    ssim_threshold: float = 0.1
    mse_cap: float = 0.1
    cut: str | None = None
    """The noise's place, as `model.cut`, which None takes; also "stage:0" for the first stage's output, "before:classifier" for the last
    layer's input. Under the share policy `head`, what is shared begins there: a later place keeps more of the net with each client, and
    defences with different places share different tensors."""

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of an image depends on the rest of its batch."""
        return self.dependence in ("dcor", "cka") and self.dependence_weight > 0


@_config
class IsotropicNoise:
    """The control: the latent norm and isotropic noise of a stated level; no decoder, and nothing of the noise is learned or shared."""

    std: float = 1.0
    """sigma, against a latent of unit RMS; 0 is the net with the latent norm alone."""
    law: Literal["gaussian", "laplace"] = "gaussian"
    frozen: bool = False
    """One noise draw per image for ever, against averaging over rounds."""
    cut: str | None = None
    """The noise's place, see LearnedPerturbation."""


@_config
class BiDO:
    """Little dependence of hidden features on the images, much on the labels: Peng et al. 2022, made against model inversion. A batch of
    one image is undefended."""

    couples_batch: ClassVar[bool] = True
    measure: Literal["hsic", "coco"] = "hsic"
    x_weight: float = 0.05
    """lambda_x, against cross-entropy in nats; published with y_weight: hsic (0.05, 0.5) and (0.1, 2), coco (1, 50)."""
    y_weight: float = 0.5
    """lambda_y, unless y_ratio is given."""
    y_ratio: float | None = None
    """lambda_y / lambda_x, so that a search over x_weight keeps it; published: 10 and 20 (hsic), 50 (coco)."""
    norm: Literal["spectral", "frobenius"] = "spectral"
    """Of coco: the paper's, or the one of its authors' code."""

    @property
    def label_weight(self) -> float:
        """lambda_y."""
        return self.y_weight if self.y_ratio is None else self.y_ratio * self.x_weight


@_config
class Precode:
    """A linear variational bottleneck before the last layer: Scheliga et al. 2022."""

    width: int = 256
    """Entries of the noisy code."""
    kl_weight: float = 1e-3
    """beta, on the KL term in bits, summed over the code."""
    cut: str | None = None
    """Its place, see LearnedPerturbation; None is before the last layer. Under `head` the bottleneck stays with the client."""


@_config
class CVB:
    """A convolutional variational bottleneck after the first stage, of half its channels: Scheliga et al. 2023."""

    kernel: int = 5
    """Odd."""
    kl_weight: float = 0.1
    """beta, on the KL term in nats, summed over channels; published: 0.1 for a small net, 5e-5 for a ResNet-18."""
    cut: str | None = None
    """Its place, see LearnedPerturbation; None is after the first stage. Under `head` the bottleneck stays with the client."""


@_config
class CapacityNoise:
    """Gaussian noise on a late, small latent, its level learned by cross-entropy + bits_weight × the channel's capacity, in bits.

    Under share policy `head` it carries a certificate (see gidef.defence.capacity): no attack learns more bits of an image beyond its label.
    """

    bits_weight: float = 5e-3
    """beta, nats of cross-entropy per bit of capacity."""
    std_init: float = 1.0
    std_floor: float = 0.1
    """sigma_min, enforced by the client whatever the server sends."""
    frozen: bool = False
    """One noise draw per image for ever; with front="frozen" the level stands still as well, and the whole training is one release."""
    level: Literal["learned", "fixed"] = "learned"
    """"fixed" keeps std_init. With front="frozen" the bits of all releases of an image then add up to a lifetime bound; a level that learns from
    the images would tell of them beside the noise."""
    front: Literal["trained", "frozen"] = "trained"
    """Of the private front: trained by the client, or kept as it is, e.g. as model.pretrained has it."""
    cut: str | None = None
    """The noise's place, see LearnedPerturbation."""


# --- of updates: what happens before they leave ------------------------------------------------------------------------


@_config
class Pruning:
    """Only the largest entries of every tensor leave; the others are zero (Zhu et al. 2019; Lin et al. 2018)."""

    changes_update: ClassVar[bool] = True
    share: float = 0.9
    """Of a tensor's entries that are set to zero, in [0, 1]."""


@_config
class GradientNoise:
    """Noise is added to every entry (Zhu et al. 2019)."""

    changes_update: ClassVar[bool] = True
    std: float = 0.1
    """Standard deviation; 0 adds none."""
    law: Literal["gaussian", "laplace"] = "gaussian"
    relative: bool = True
    """std counts in 95th percentiles of each tensor's absolute values, zeros left out; else in the update's units."""


@_config
class Clipping:
    """Updates of a larger L2 norm are scaled down to it (McMahan et al. 2018)."""

    changes_update: ClassVar[bool] = True
    bound: float = 1.0
    """Largest norm, in the update's units."""
    per_tensor: bool = False
    """Each tensor by itself, instead of the whole update."""


@_config
class Sign:
    """Only signs leave, times each tensor's mean absolute value (signSGD, Bernstein et al. 2018)."""

    changes_update: ClassVar[bool] = True


@_config
class Quantisation:
    """Entries are rounded at random, right on average (QSGD, Alistarh et al. 2017)."""

    changes_update: ClassVar[bool] = True
    bits: int = 4
    """Of an entry, its sign included, in [2, 16]."""
    norm: Literal["max", "l2"] = "max"
    """What the largest level stands for."""


@_config
class Censor:
    """A random direction orthogonal to each tensor leaves in its place, the best of some draws (Zhang et al. 2025)."""

    changes_update: ClassVar[bool] = True
    draws: int = 20


@_config
class Soteria:
    """Of one linear layer's gradient, the columns of the features that tell most of the image are zero (Sun et al. 2021)."""

    changes_update: ClassVar[bool] = True
    share: float = 0.8
    """Of the features that are pruned, in [0, 1]."""
    layer: str | None = None
    """Name of a linear layer, e.g. backbone.head; the classifier by default."""


@_config
class GradDefense:
    """Slices of the update that tell equally much of the image; some of them get Gaussian noise (Wang et al. 2022)."""

    changes_update: ClassVar[bool] = True
    std: float = 0.1
    relative: bool = True
    """As in GradientNoise."""
    slices: int = 10
    noisy: int = 5
    """Slices that get noise, at most `slices`."""


# --- of data: what a client trains on -----------------------------------------------------------------------------------


@_config
class MixUp:
    """Every image is mixed with another of its client, labels alike (Zhang et al. 2018)."""

    changes_data: ClassVar[bool] = True
    mixing: float = 1.0
    """alpha of Beta(alpha, alpha), from which the shares come; 0 mixes nothing."""


@_config
class InstaHide:
    """Every image is mixed with others of its client, and every entry of the mixture gets a random sign (Huang et al. 2020)."""

    changes_data: ClassVar[bool] = True
    mixed: int = 4
    """k, images in a mixture; 1 mixes nothing."""
    largest: float = 0.65
    """Bound of a mixture's coefficients; at least 1.25 / mixed."""
    signs: bool = True
    """Of the image scaled to [-1, 1]."""


@_config
class ATS:
    """Every image goes through one of some sequences of transformations (Gao et al. 2021)."""

    changes_data: ClassVar[bool] = True
    policy: tuple[str, ...] = ("cifar100-resnet20",)
    """Alternatives: names of published policies, or transformations with levels 0 to 9, e.g. "translateX 9, contrast 6, translateY 2"; () changes
    nothing. There are shearX, shearY, translateX, translateY, rotate, color, posterize, solarize, contrast, sharpness, brightness, autocontrast,
    equalize and invert."""

    def parsed(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """Alternatives, each a sequence of (transformation, level).  Raises: ValueError for one that is none."""
        texts = [text for entry in self.policy for text in ATS_POLICIES.get(entry, (entry,))]
        found = []
        for text in texts:
            steps = [step.split() for step in text.split(",")]
            if not all(len(step) == 2 and step[0] in ATS_TRANSFORMATIONS and step[1] in "0123456789" and len(step[1]) == 1 for step in steps):
                names = ", ".join(ATS_POLICIES)
                raise ValueError(f"policy holds {text!r}: expected {names}, or transformations with a level each, like \"rotate 2, contrast 6\".")
            found.append(tuple((name, int(level)) for name, level in steps))
        return tuple(found)


ATS_TRANSFORMATIONS = (
    "shearX", "shearY", "translateX", "translateY", "rotate", "color", "posterize", "solarize", "contrast", "sharpness", "brightness",
    "autocontrast", "equalize", "invert",
)  # fmt: skip
ATS_POLICIES = {
    "cifar100-resnet20": ("translateX 9, contrast 6, translateY 2", "translateY 3, contrast 7, contrast 7"),
    "cifar100-convnet": ("translateX 5, brightness 5, translateX 9", "translateY 2, sharpness 1, brightness 9"),
}
"""3-1-7+43-18-18, of the authors' benchmark, and 21-13-3+7-4-15, as Wu et al. 2024 attack it, in the numbers of the authors' list."""


@_config
class DCS:
    """Beside every image others are trained on, of nearly the same gradient and unlike to look at (DCS-2, Wu et al. 2024). Every batch costs about
    3 x iterations more."""

    changes_data: ClassVar[bool] = True
    concealed: int = 1
    """Such images per image; 0 is none."""
    iterations: int = 100
    """Of their search; published: 1000."""
    x_weight: float = 0.01
    """lambda_x, of being unlike."""
    z_weight: float = 0.01
    """lambda_z, of logits alike; published: 0.01 on CIFAR-10."""
    blend: float = 0.7
    """lambda_y, share of the foreign image and label in the start and the label."""
    lr: float = 0.1
    """In units of 0.25 of the pixels' range."""
    apart: float = 150.0
    """Mean distance from the private images at which the search ends, in the same units."""


# --- of gradients with a certificate: differential privacy --------------------------------------------------------------


@_config
class DPSGD:
    """Differential privacy, of images (DP-SGD, Abadi et al. 2016) or of clients (DP-FedAvg, McMahan et al. 2018); needs the extra `dp` (Opacus).

    Give exactly one of noise_multiplier and target_epsilon. (epsilon, delta) is of the whole schedule of rounds, for the client that is worst
    off; what a victim of the evaluation releases comes on top. clients.grad_clip still bounds the noisy gradient: 0 leaves it alone. A DPSGD of images
    stands in a tuple with noise on the latent that has no decoder (IsotropicNoise, LearnedPerturbation(dependence_weight=0), CapacityNoise, Precode, CVB),
    and with no change of updates that looks at the images (Soteria, Censor, GradDefense), which no noise covers. Before a DPSGD of clients any change of
    updates may stand, behind it a GradientNoise of absolute size alone: others would change each client's share of the noise.
    """

    clip: float = 1.0
    """C > 0: largest norm of an image's own gradient, or of a client's update."""
    noise_multiplier: float | None = None
    """sigma; the noise on the sum of a batch, or of a cohort, has standard deviation sigma C."""
    target_epsilon: float | None = 8.0
    """The smallest sigma is taken that keeps within it."""
    delta: float = 1e-5
    level: Literal["sample", "client"] = "sample"
    """"sample" hides an image, by every step that a client takes; "client" hides a client, by its update, from all who see only the mean of a
    cohort, and may know who is in it: no draw of cohorts amplifies. Updates then count alike, whatever the clients' sizes."""
    accountant: Literal["prv", "rdp"] = "prv"
    """Of Opacus; rdp is faster and says a little more epsilon."""
    form: Literal["per_sample", "ghost"] = "per_sample"
    """Of level="sample": every image's own gradient, or norms alone and two backward passes (gidef.defence.ghost): the same sums, less memory."""

    @property
    def changes_update(self) -> bool:
        return self.level == "client"


# --- of sums: what the server sees at all --------------------------------------------------------------------------------


@_config
class SecureAggregation:
    """The server learns the sum of a cohort and no update of it: pairwise masks over exact sums (Bonawitz et al. 2017), simulated.

    Attacks are given the mean over a cohort: of the victims' batch and of as many images of every other client in it. Where nobody drops out, the
    model is that of the open sum, bit for bit. Two clients or more.
    """

    changes_sum: ClassVar[bool] = True
    dropouts: float = 0.0
    """Share of a drawn cohort that drops out of a round after masks were agreed, rounded down; at most a third, so that the others can unmask the sum."""


def trains(part: Any) -> bool:
    """Whether a defence is one of training: not of what leaves, of what is trained on, or of sums."""
    return not any(getattr(part, name, False) for name in ("changes_update", "changes_data", "changes_sum"))


# --- at a wanted accuracy ----------------------------------------------------------------------------------------------


@_config
class Matched:
    """A defence at the strength that costs a wanted accuracy, found by bisection over whole trainings with the first seed.

    Validation accuracy alone is looked at. It may fall or rise with the field: both ends of the range are tried first. A target that no trial comes
    within a point of is told, and the nearest is taken; of a defence that costs too little throughout, the strongest, or where it is not known at which
    end that is (`private_end`) the nearest, which is told as well. A trial that diverges counts as accuracy 0.
    """

    defence: Any = LearnedPerturbation()
    """One of this page, or a tuple of them."""
    field: str = "strength"
    """The number that is searched, of the defence or of the one member of a tuple that has it. Of whole numbers only such are tried, of CVB.kernel odd
    ones. Of DPSGD's noise_multiplier and target_epsilon the other one is None then."""
    low: float = 0.1
    high: float = 10.0
    """The search's ends, both above 0; it is logarithmic."""
    accuracy: float | None = None
    """Wanted validation accuracy in [0, 1]; None: `points` below the undefended net of the same recipe."""
    points: float = 1.0
    """Of accuracy, in hundredths in [0, 100), that the defence may cost. What is left has to be above chance."""
    trials: int = 6
    """Trainings of the search, at most."""

    @property
    def private_end(self) -> Literal["low", "high"] | None:
        """The end of the range at which the defence protects most; None where that is not known (`PROTECTS`), as of a defence that is not of this page."""
        owner = next((part for part in self._parts if self.field in _fields(part)), None)
        more, less, _ = next((names for kind, names in PROTECTS.items() if isinstance(owner, kind)), ((), (), ()))
        return "high" if self.field in more else "low" if self.field in less else None

    @property
    def step(self) -> int:
        """How far apart the field's values are: 1 of whole numbers, 2 of odd ones, 0 where any number is one."""
        owner = next((part for part in self._parts if self.field in _fields(part)), None)
        if owner is None or self.field not in _fields(owner, WHOLE):
            return 0
        return 2 if isinstance(owner, CVB) and self.field == "kernel" else 1

    def value(self, number: float) -> float:
        """A number as the field has it: whole ones stay whole, whatever they were read from."""
        if not self.step:
            return float(number)
        return int(number) if float(number).is_integer() else number

    def at(self, value: float) -> Any:
        """The defence with the field at a value."""
        found = tuple(replace(part, **self._changes(part, value)) if self.field in _fields(part) else part for part in self._parts)
        return found if isinstance(self.defence, tuple) else found[0]

    def _changes(self, part: Any, value: float) -> dict[str, Any]:
        other = EITHER.get(self.field) if isinstance(part, DPSGD) else None
        return {self.field: self.value(value), **({other: None} if other else {})}

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.defence if isinstance(self.defence, tuple) else (self.defence,)

    def problems(self) -> list[str]:
        """What is wrong with the search, without the recipe's name for it."""
        parts = self._parts
        found, having = [], [part for part in parts if is_dataclass(part) and self.field in _fields(part)]
        if not parts or not all(is_dataclass(part) and not isinstance(part, (Matched, type)) for part in parts):
            return [f"defence={self.defence!r} is no defence to search: give one, or a tuple of them."]
        if len(having) != 1:
            names = sorted({name for part in parts for name in _fields(part)})
            found.append(f"field={self.field!r} names a number of exactly one defence to search; there are {', '.join(names) or 'none'}.")
        if not 0 < self.low < self.high:
            found.append(f"low={self.low}, high={self.high}: expected 0 < low < high, as the search is logarithmic.")
        elif len(having) == 1 and self.step and not (float(self.low).is_integer() and float(self.high).is_integer()):
            found.append(f"low={self.low}, high={self.high}: {self.field} is a whole number of {type(having[0]).__name__}. Give whole ends.")
        if self.accuracy is not None and not 0 < self.accuracy <= 1:
            found.append(f"accuracy={self.accuracy}: expected a share in (0, 1].")
        if not 0 <= self.points < 100:
            found.append(f"points={self.points}: expected hundredths of accuracy in [0, 100). Lower it.")
        return found


WHOLE = ("int", "int | None")
EITHER = {"noise_multiplier": "target_epsilon", "target_epsilon": "noise_multiplier"}
"""Fields of DPSGD of which one follows from the other."""


def _fields(part: Any, kinds: tuple[str, ...] = (*WHOLE, "float", "float | None")) -> set[str]:
    """Names of the number fields of a defence."""
    return {spec.name for spec in fields(part) if (spec.type if isinstance(spec.type, str) else getattr(spec.type, "__name__", str(spec.type))) in kinds}


DEFENCES = (Undefended, LearnedPerturbation, IsotropicNoise, CapacityNoise, BiDO, Precode, CVB, Pruning, GradientNoise, Clipping, Sign, Quantisation, Censor, Soteria, GradDefense, DPSGD)
DEFENCES += (MixUp, InstaHide, ATS, DCS, SecureAggregation)
PROTECTS: dict[type, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    LearnedPerturbation: (
        ("strength", "dependence_weight", "std_init", "std_floor", "mse_cap"), ("ramp", "ssim_threshold"),
        ("kl_weight", "decoder_steps", "decoder_steps_first", "decoder_lr", "decoder_width", "decoder_sketch"),  # KL draws the level to 1 from both sides
    ),
    IsotropicNoise: (("std",), (), ()),
    CapacityNoise: (("bits_weight", "std_init", "std_floor"), (), ()),
    BiDO: (("x_weight",), (), ("y_weight", "y_ratio")),
    Precode: (("kl_weight",), ("width",), ()),
    CVB: (("kl_weight",), (), ("kernel",)),
    Pruning: (("share",), (), ()),
    GradientNoise: (("std",), (), ()),
    Clipping: ((), ("bound",), ()),
    Quantisation: ((), ("bits",), ()),
    Censor: ((), (), ("draws",)),
    Soteria: (("share",), (), ()),
    GradDefense: (("std", "noisy"), ("slices",), ()),  # of more slices, as many noisy ones are a smaller part
    DPSGD: (("noise_multiplier",), ("target_epsilon", "delta"), ("clip",)),  # epsilon does not depend on the clip
    MixUp: (("mixing",), (), ()),
    InstaHide: (("mixed",), ("largest",), ()),
    DCS: (("concealed", "blend", "apart"), (), ("iterations", "x_weight", "z_weight", "lr")),
    SecureAggregation: ((), ("dropouts",), ()),  # fewer clients are left in the sum
}  # fmt: skip
"""Number fields of theirs: those that protect more where they rise, those that protect less, and those of which neither is known."""
