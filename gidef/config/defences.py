"""The defences that a recipe may choose. Those with `changes_update` act on what leaves, and combine with any other in a tuple."""

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    ssim_threshold: float = 0.1
    mse_cap: float = 0.1


# --- of updates: what happens before they leave ------------------------------------------------------------------------


@_config
class Pruning:
    """Only the largest entries of every tensor leave; the others are zero (Zhu et al. 2019; Lin et al. 2018)."""

    changes_update: ClassVar[bool] = True
    share: float = 0.9
    """Of a tensor's entries that are set to zero, in [0, 1]."""


# --- of gradients with a certificate: differential privacy --------------------------------------------------------------


@_config
class DPSGD:
    """Differential privacy, of images (DP-SGD, Abadi et al. 2016) or of clients (DP-FedAvg, McMahan et al. 2018); needs the extra `dp` (Opacus).

    Give exactly one of noise_multiplier and target_epsilon. (epsilon, delta) is of the whole schedule of rounds, for the client that is worst
    off; what a victim of the evaluation releases comes on top. clients.grad_clip still bounds the noisy gradient: 0 leaves it alone.
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
    cohort. Updates then count alike, whatever the clients' sizes."""
    accountant: Literal["prv", "rdp"] = "prv"
    """Of Opacus; rdp is faster and says a little more epsilon."""

    @property
    def changes_update(self) -> bool:
        return self.level == "client"


DEFENCES = (Undefended, LearnedPerturbation, Pruning, DPSGD)
