"""A8: search the code of a generator that was trained on public images, instead of pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator as Draws
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from gidef.attack.learned import image_loss, public_images
from gidef.attack.matching import Start
from gidef.errors import InputError
from gidef.models.prior import AutoEncoder, Critic, Generator
from gidef.rng import generator
from gidef.types import Reconstruction

# N images, B images of one attack, D numbers of a code
Render = Callable[[Tensor], Tensor]
"""render(codes (B, D)) → images (B, C, H, W) in [0, 1]. Pure, differentiable and vmappable."""


def fit_autoencoder(
    autoencoder: AutoEncoder, images: Tensor, *, steps: int, seed: int, batch_size: int = 64, lr: float = 1e-3, kl_weight: float = 1e-2,
) -> Iterator[int]:  # fmt: skip
    """Fit a variational auto-encoder in place on public images; yields the steps done.

        mean over images of   MSE + ½ (1 − SSIM) + kl_weight · KL(N(μ, σ²) ‖ N(0, 1)) / D,   code = μ + σ ε

    The KL term makes codes of images look like N(0, 1) draws, which is where a search begins and what its prior expects; the smaller it
    is, the sharper the images. Adam with the rate falling to zero along a cosine; half of the images are mirrored.

    Args:    images: (P, C, H, W), uint8 or floating in [0, 1].  kl_weight: at least 0, per number of the code; 0 still draws codes.
    Source:  Kingma and Welling 2014, arXiv:1312.6114.  Deviates: SSIM in the loss, KL per number.
    """
    _check(images, autoencoder.image_shape)
    device, draws = next(autoencoder.parameters()).device, generator(seed, "autoencoder")
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    autoencoder.train()
    for step in range(1, steps + 1):
        batch = _batch(images, batch_size, draws, device)
        mean, log_variance = autoencoder.encode(batch)
        codes = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=draws).to(device)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        optimiser.zero_grad(set_to_none=True)
        (image_loss(autoencoder.generator(codes), batch).mean() + kl_weight * divergence).backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            yield step
    autoencoder.eval()
    yield steps


def fit_gan(
    model: Generator, critic: Critic, images: Tensor, *, steps: int, seed: int, batch_size: int = 64, lr: float = 2e-4, critic_steps: int = 1
) -> Iterator[int]:
    """Fit a generator and its critic in place on public images, with the hinge loss; yields the generator's steps done.

        critic     min  E max(0, 1 − C(x)) + E max(0, 1 + C(G(code)))
        generator  min  −E C(G(code)),   code ~ N(0, 1)

    Adam with β₁ = 0 and β₂ = 0.9. The generator ends as the mean of its weights over the last half of the steps, which moves less.

    Args:    images: (P, C, H, W), uint8 or floating in [0, 1].  critic_steps: per step of the generator.
    Source:  Miyato et al. 2018, arXiv:1802.05957 (spectral norm and hinge loss); averaging: Yazıcı et al. 2019, arXiv:1806.04498.
    """
    _check(images, model.image_shape)
    device, draws = next(model.parameters()).device, generator(seed, "gan")
    players = {one: torch.optim.Adam(one.parameters(), lr=lr, betas=(0.0, 0.9), foreach=True) for one in (model, critic)}
    mean, counted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    model.train()
    critic.train()

    def made() -> Tensor:
        return model(torch.randn(batch_size, model.code_dim, generator=draws).to(device))

    for step in range(1, steps + 1):
        for _ in range(critic_steps):
            with torch.no_grad():
                fakes = made()
            players[critic].zero_grad(set_to_none=True)
            real, fake = critic(_batch(images, batch_size, draws, device)), critic(fakes)
            ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()).backward()
            players[critic].step()
        players[model].zero_grad(set_to_none=True)
        (-critic(made()).mean()).backward()
        players[model].step()
        if step > steps // 2:
            counted += 1
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    mean[name].lerp_(parameter, 1 / counted)
        if step % 20 == 0:
            yield step
    with torch.no_grad():
        for name, parameter in model.named_parameters() if counted else ():
            parameter.copy_(mean[name])
    model.eval()
    critic.eval()
    yield steps


def renderer(model: Generator | nn.Module, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Render:
    """render(codes (B, D)) → images: a frozen copy of a generator, in the attack's dtype. Threads must not share one."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval().to(device=device, dtype=dtype)

    def render(codes: Tensor) -> Tensor:
        return frozen(codes)

    return render


def code_prior(codes: Tensor, weight: float) -> Tensor:
    """weight · mean code², a scalar: −ln N(0, 1) up to a constant and the number of entries."""
    return weight * codes.square().mean()


def normal_codes(shape: tuple[int, ...], draws: Draws) -> Tensor:
    """Codes to begin from, N(0, 1), of shape (B, D)."""
    return torch.randn(shape, generator=draws)


@torch.no_grad()
def encoded(autoencoder: AutoEncoder, images: Tensor) -> Tensor:
    """Codes (B, D) of images (B, C, H, W) in [0, 1], such as another attack's result: where a search can begin."""
    some = next(autoencoder.parameters())
    return autoencoder.encode(images.to(some))[0]


def start_from(reconstructions: Sequence[Reconstruction]) -> Start:
    """A start at what an earlier attack found of the same observations, for a second phase on pixels: images that no code gives.

    Returns: start(observation, restart) → the images of that restart, or the chosen ones where there are no more restarts; no noise.
    """

    def start(observation: int, restart: int) -> tuple[Tensor, None]:
        found = reconstructions[observation]
        if found.restart_images is not None and restart < len(found.restart_images):
            return found.restart_images[restart], None
        return found.images, None

    return start


def project(
    render: Render, images: Tensor, code_dim: int, *, seed: int, iterations: int = 300, lr: float = 0.1, starts: int = 4, weight: float = 1e-4,
) -> Tensor:  # fmt: skip
    """Codes (N, D) whose images are closest to given ones, by Adam from several N(0, 1) draws: how near a generator's range comes.

        min over code   MSE(render(code), image) + weight · mean code²

    Args:    images: (N, C, H, W) in [0, 1], of the render's device and dtype.  starts: chosen by that objective.
    """
    draws = generator(seed, "project")
    codes = torch.randn(len(images) * starts, code_dim, generator=draws).to(images)
    targets = images.repeat_interleave(starts, 0)

    def objective(code: Tensor, target: Tensor) -> Tensor:
        return (render(code[None])[0] - target).square().mean() + code_prior(code, weight)

    evaluate, m, v = vmap(grad_and_value(objective)), torch.zeros_like(codes), torch.zeros_like(codes)
    best, lowest = codes, torch.full((len(codes),), torch.inf).to(images)
    for iteration in range(iterations + 1):
        gradients, losses = evaluate(codes, targets)
        best = torch.where((losses < lowest)[:, None], codes, best)
        lowest = torch.minimum(losses, lowest)
        m, v = 0.9 * m + 0.1 * gradients, 0.999 * v + 0.001 * gradients.square()
        moved = lr * (1 - iteration / max(iterations, 1)) * (m / (1 - 0.9 ** (iteration + 1))) / ((v / (1 - 0.999 ** (iteration + 1))).sqrt() + 1e-12)
        codes = codes - moved
    chosen = lowest.view(-1, starts).argmin(1) + torch.arange(len(images), device=images.device) * starts
    return best[chosen]


def _batch(images: Tensor, size: int, draws: Draws, device: torch.device) -> Tensor:
    """Random public images as floats, half of them mirrored."""
    batch = public_images(images, torch.randint(len(images), (size,), generator=draws), device)
    mirrored = (torch.rand(size, generator=draws) < 0.5).to(device)
    return torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)


def _check(images: Tensor, image_shape: tuple[int, int, int]) -> None:
    if images.shape[1:] != image_shape or not len(images):
        raise InputError(f"public images {tuple(images.shape)} for a network of images {image_shape}: build it for the images' shape.")
