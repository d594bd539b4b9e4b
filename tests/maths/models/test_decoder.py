"""Decoders from latents of every kind, on random latents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gidef.errors import InputError
from gidef.models import SplitModel, decoder_for, make_backbone
from gidef.rng import generator

torch.set_num_threads(1)

LATENTS = [((64, 7, 7), 1), ((64, 8, 8), 1), ((512, 1, 1), 1), ((65, 192), -1), ((64, 192), -1), ((7, 7, 96), -1), ((64,), -1), ((24, 9, 5), 1)]
IMAGES = [(3, 28, 28), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 20, 12)]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", ["loop", "posthoc"])
@pytest.mark.parametrize("image_shape", IMAGES)
@pytest.mark.parametrize(("latent_shape", "channel_dim"), LATENTS)
def test_any_latent_is_decoded_to_images_in_0_to_1(latent_shape, channel_dim, image_shape, size):
    decoder = decoder_for(latent_shape, channel_dim, image_shape, size=size, width_factor=0.25)
    images = decoder(100 * torch.randn((2, *latent_shape), generator=generator(0)))
    assert images.shape == (2, *image_shape) and images.isfinite().all() and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(("latent_shape", "channel_dim"), [((64, 56, 56), 1), ((197, 192), -1), ((7, 7, 768), -1), ((512, 1, 1), 1)])
def test_latents_of_large_images_are_decoded_too(latent_shape, channel_dim):
    decoder = decoder_for(latent_shape, channel_dim, (3, 224, 224), size="loop")
    assert decoder(torch.zeros(1, *latent_shape)).shape == (1, 3, 224, 224)
    assert decoder_for(latent_shape, channel_dim, (3, 224, 224), size="posthoc", width_factor=0.25)(torch.zeros(1, *latent_shape)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("latent_shape", "channel_dim"), LATENTS)
def test_every_entry_of_the_latent_reaches_the_image(latent_shape, channel_dim):
    """The class token included: an adversary that ignored part of the latent would flatter the defence."""
    decoder = decoder_for(latent_shape, channel_dim, (3, 28, 28), size="loop")
    latent = torch.randn((1, *latent_shape), generator=generator(0), requires_grad=True)
    (decoder(latent) * torch.rand((1, 3, 28, 28), generator=generator(1))).sum().backward()
    assert (latent.grad != 0).all()


def test_maps_with_channels_last_are_read_like_those_with_channels_first():
    first = decoder_for((64, 7, 7), 1, (3, 28, 28), size="loop", seed=5)
    last = decoder_for((7, 7, 64), -1, (3, 28, 28), size="loop", seed=5)
    latent = torch.randn((2, 64, 7, 7), generator=generator(0))
    torch.testing.assert_close(first(latent), last(latent.permute(0, 2, 3, 1)))


def test_loop_decoder_of_the_small_net_has_about_30_k_parameters():
    for latent, image in [((64, 7, 7), 28), ((64, 8, 8), 32)]:
        assert 25_000 <= count(decoder_for(latent, 1, (3, image, image), size="loop")) <= 35_000


@pytest.mark.parametrize(("latent_shape", "channel_dim"), LATENTS[:-1])
def test_posthoc_decoder_has_half_a_million_to_one_and_a_half_million_parameters(latent_shape, channel_dim):
    for image in (28, 32):
        assert 5e5 <= count(decoder_for(latent_shape, channel_dim, (3, image, image), size="posthoc")) <= 1.5e6


def test_width_factor_scales_the_channels():
    narrow, usual, wide = (decoder_for((64, 7, 7), 1, (3, 28, 28), size="posthoc", width_factor=f) for f in (0.25, 1, 2))
    assert count(narrow) < 0.2 * count(usual) and count(wide) > 3 * count(usual)


def test_minimax_step_of_the_small_net_costs_at_most_three_plain_steps_in_flops():
    """Plain: forward and backward of the net. Minimax: besides, a decoder step on the detached latent, and the client's
    gradient through the frozen decoder. Measured in time on one thread, with SSIM: 2.3 plain steps."""
    model = SplitModel(make_backbone("small", num_classes=8, image_shape=(3, 28, 28)), perturbation={}, image_shape=(3, 28, 28), num_classes=8)
    decoder = decoder_for(model.latent_shape, model.channel_dim, model.image_shape, size="loop")
    images, labels = torch.rand((64, 3, 28, 28), generator=generator(0)), torch.arange(64) % 8
    with FlopCounterMode(display=False) as plain:
        F.cross_entropy(model(images), labels).backward()
    with FlopCounterMode(display=False) as minimax:
        outputs = model.run(images)
        F.mse_loss(decoder(outputs.perturbed.detach()), images).backward()
        decoder.requires_grad_(False)
        (F.cross_entropy(outputs.logits, labels) - F.mse_loss(decoder(outputs.perturbed), images)).backward()
    assert minimax.get_total_flops() <= 3 * plain.get_total_flops()


def test_decoder_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    state = torch.get_rng_state()
    one, two, other = (decoder_for((64,), -1, (1, 28, 28), size="loop", seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["grid.spread.weight"], other["grid.spread.weight"])


@pytest.mark.parametrize("size", ["loop", "posthoc"])
def test_a_decoder_learns_to_invert_an_easy_latent(size):
    """The latent is the image in 4×4 patches, a pixel unshuffle, plus a class token of zeros when read as tokens."""
    images = F.interpolate(torch.rand((32, 1, 4, 4), generator=generator(0)), 16, mode="bilinear")
    latent = F.pixel_unshuffle(images, 4).flatten(2).transpose(1, 2)  # (32, 16 tokens, 16)
    latent = torch.cat([torch.zeros(32, 1, 16), latent], 1)
    decoder = decoder_for((17, 16), -1, (1, 16, 16), size=size, width_factor=1.0 if size == "loop" else 0.25)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=3e-3, foreach=True)
    for _ in range(200):
        optimiser.zero_grad()
        loss = F.mse_loss(decoder(latent), images)
        loss.backward()
        optimiser.step()
    assert loss < 0.1 * images.var()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"size": "huge"}, "size='huge'"), ({"size": "loop", "width_factor": 0.0}, "width_factor"), ({"size": "loop", "latent_shape": (2, 3, 4, 5)}, "latent")],
)
def test_bad_decoder_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        decoder_for(**({"latent_shape": (64,), "channel_dim": -1, "image_shape": (1, 28, 28)} | arguments))
