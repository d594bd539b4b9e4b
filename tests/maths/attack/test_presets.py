"""Published attacks on cases with a known answer. Tiny smooth nets, float64; random images."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gidef import config
from gidef.attack import deep_leakage, gradinversion, improved_deep_leakage, inverting_gradients, modern_inverting_gradients, run
from gidef.attack.client import gradient_of, observed
from gidef.attack.optimisers import Adam
from gidef.attack.priors import bn_statistics
from gidef.attack.registration import group_consistency
from gidef.attack.surgery import batch_statistics, granted_statistics
from gidef.errors import InputError

DOUBLE = {"seed": 0, "dtype": torch.float64, "at_once": 16}


@pytest.fixture
def case(tiny):
    """Four undefended single images of a net of sigmoids, as in the paper of DLG."""
    model = tiny.Net(activation=nn.Sigmoid)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    made = [tiny.observe(simulate, params, seed=seed) for seed in range(4)]
    return [one[0] for one in made], simulate, [one[1] for one in made], [one[2] for one in made]


def errors(found, truth):
    return torch.stack([(one.images.double() - images).square().mean() for one, images in zip(found, truth, strict=True)])


def test_dlg_finds_images_and_labels_that_nobody_told_it(tiny, case):
    observations, simulate, truth, labels = case
    hidden = [dataclasses.replace(one, labels=None) for one in observations]
    found = run(hidden, lambda: simulate, deep_leakage(iterations=25, restarts=3, **tiny.settings), **DOUBLE)
    assert (errors(found, truth) < 1e-4).sum() >= 3, errors(found, truth)  # random images on [0, 1] are 0.17 apart
    assert sum(one.labels.tolist() == label.tolist() for one, label in zip(found, labels, strict=True)) >= 3


def test_idlg_recovers_the_labels_first_and_the_images_to_many_digits(tiny, case):
    observations, simulate, truth, labels = case
    hidden = [dataclasses.replace(one, labels=None) for one in observations]
    found = run(hidden, lambda: simulate, improved_deep_leakage(iterations=25, restarts=2, **tiny.settings), **DOUBLE)
    assert [one.labels.tolist() for one in found] == [label.tolist() for label in labels]
    assert errors(found, truth).median() < 1e-6, errors(found, truth)


def test_gradinversion_agrees_on_a_consensus_and_finds_the_images(tiny, case):
    observations, simulate, truth, _ = case
    settings = gradinversion(iterations=250, restarts=3, tv=0.0, group=0.05, max_shift=1.0, **tiny.settings)
    free = dataclasses.replace(settings, coupling=None)
    pulled, alone = (run(observations, lambda: simulate, one, **DOUBLE) for one in (settings, free))
    assert errors(pulled, truth).mean() < 0.03
    spread = [sum(float(one.restart_images.std(0).mean()) for one in found) for found in (pulled, alone)]
    assert spread[0] < spread[1], spread


def smooth(seed, shift=0):
    """A picture (3, 32, 32) of blobs, moved by whole pixels along both sides."""
    draw = torch.Generator().manual_seed(seed)
    places, colours = torch.rand(6, 2, generator=draw, dtype=torch.float64) * 20 + 6 + shift, torch.rand(6, 3, generator=draw, dtype=torch.float64)
    u = torch.arange(32, dtype=torch.float64)
    blobs = torch.exp(-((u - places[:, 0, None, None]) ** 2 + (u[:, None] - places[:, 1, None, None]) ** 2) / 30)
    return (colours[:, :, None, None] * blobs[:, None]).sum(0)


def test_gradinversion_s_restarts_agree_once_they_are_registered_and_images_of_one_label_are_in_their_places(tiny):
    coupling = gradinversion(group=1.0, **tiny.settings).coupling
    plain = group_consistency(1.0, register_images=False)
    moved = torch.stack([smooth(0, shift) for shift in (0, 2, -2)])[:, None]
    swapped = torch.stack([torch.stack([smooth(1), smooth(2)]), torch.stack([smooth(2), smooth(1)]), torch.stack([smooth(1), smooth(2)])])
    for images, labels in ((moved, [1]), (swapped, [2, 2])):
        labels = torch.tensor(labels).expand(3, -1)
        found, without = (one(images, [[0, 1, 2]], 1.0, labels)[0] for one in (coupling, plain))
        assert without.min() > 1e-3 and found.max() < 0.05 * without.min(), (found, without)
        assert (coupling(images, [[0, 1, 2]], 0.0, labels)[0] == 0).all()
    apart = coupling(swapped, [[0, 1, 2]], 1.0, torch.tensor([[1, 2]]).expand(3, -1))[0]
    assert apart.max() > 1e-3  # other labels hold them where they are


def test_a_published_attack_has_the_same_settings_as_a_dataclass_and_as_a_function(tiny):
    """And none of what makes this engine's own attacks stronger."""
    made = {
        config.InvertingGradients: inverting_gradients(**tiny.settings), config.ModernInvertingGradients: modern_inverting_gradients(opponents=False, **tiny.settings),
        config.DeepLeakage: deep_leakage(**tiny.settings), config.GradInversion: gradinversion(**tiny.settings),
    }  # fmt: skip
    for kind, settings in made.items():
        for name in ("iterations", "restarts", "distance", "lr", "decay", "warmup", "tv", "tv_boost", "kink_width"):
            assert getattr(kind(), name) == getattr(settings, name), (kind, name)
        assert settings.kink_width is None and settings.tv_boost == 1.0
    settings = made[config.GradInversion]  # as published: 20,000 iterations of Adam 0.1, warm-up 50, cosine decay, noise 0.2, weights 1e-4, 1e-6, 0.1, 0.01
    assert (settings.iterations, settings.lr, settings.decay, settings.warmup, settings.tv) == (20_000, 0.1, "cosine", 50, 1e-4)
    assert settings.priors[0][0] == 1e-6 and settings.coupling is not None and settings.descent() == Adam(langevin=0.2)
    assert (config.GradInversion().langevin, config.GradInversion().statistics_weight, config.GradInversion().group) == (0.2, 0.1, 1e-2)
    assert gradinversion(langevin=0.0, **tiny.settings).descent() == Adam() and gradinversion(signed=True, **tiny.settings).descent() == Adam(sign="hard", langevin=0.2)


def test_the_later_settings_of_inverting_gradients_are_those_of_its_authors_code(tiny):
    """breaching, config/attack/modern.yaml: Adam 0.1, soft sign, 24,000 iterations, warm-up 50, cosine decay, boxed, start patterned-4, total variation 0.1
    with inner_exp 2, outer_exp 0.5 and double opponents; its soft sign is tanh(s g) / s with s = 1 − iteration / iterations."""
    one = modern_inverting_gradients(**tiny.settings)
    assert (one.iterations, one.lr, one.decay, one.warmup, one.start, one.distance, one.restarts) == (24_000, 0.1, "cosine", 50, "patterned-4", "cosine", 1)
    assert one.descent() == Adam(sign="soft", soft_over=24_000) and modern_inverting_gradients(iterations=60, **tiny.settings).descent().soft_over == 60
    ((weight, prior),) = one.priors
    images = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = [*images.unbind(1), images[:, 0] - images[:, 1], images[:, 0] - images[:, 2], images[:, 1] - images[:, 2]]
    roughness = 0.0
    for channel in channels:
        across, down = torch.zeros_like(channel), torch.zeros_like(channel)
        across[..., :-1], down[:, :-1] = channel[..., 1:] - channel[..., :-1], channel[:, 1:] - channel[:, :-1]
        roughness += float((across**2 + down**2 + 1e-8).sqrt().mean()) / 6
    assert weight == 0.1 and one.tv == 0.0 and float(prior(SimpleNamespace(images=images))) == pytest.approx(roughness, abs=2e-4)
    before = modern_inverting_gradients(opponents=False, sharpening=False, tv=1e-2, iterations=4_800, **tiny.settings)
    assert before.descent() == Adam(sign="soft") and before.priors == () and before.tv == 1e-2
    for wrong in ({"tv_boost": 10.0}, {"variants": ({"tv": 1e-3}, {"tv": 1e-2})}):
        with pytest.raises(InputError, match="one weight"):
            modern_inverting_gradients(**wrong, **tiny.settings)
    assert modern_inverting_gradients(opponents=False, tv_boost=10.0, **tiny.settings).tv_boost == 10.0


def test_the_named_presets_have_what_their_papers_and_the_method_say():
    """method: 3 to 5 starts of the joint attack; the dataclass itself keeps one."""
    joint, gradinversion = config.PRESETS["joint"], config.PRESETS["gradinversion"]
    assert 3 <= joint.restarts <= 5 and joint.halving == 2 and dataclasses.replace(joint, restarts=1, halving=1) == config.JointMatching()
    assert gradinversion == config.GradInversion() and gradinversion.langevin == 0.2
    assert config.PRESETS["modern"] == config.ModernInvertingGradients() and config.PRESETS["modern"].opponents and config.PRESETS["modern"].sharpening
    assert config.PRESETS["inverting-gradients"].iterations == 4_800 and config.PRESETS["dlg"].labels == "searched" and config.PRESETS["idlg"].labels == "recovered"


@pytest.mark.parametrize("make", [inverting_gradients, modern_inverting_gradients])
def test_the_sign_attacks_come_near_the_images_of_a_smooth_net(tiny, case, make):
    observations, simulate, truth, _ = case
    found = run(observations, lambda: simulate, make(iterations=250, tv=0.0, warmup=10 if make is modern_inverting_gradients else 0, **tiny.settings), **DOUBLE)
    assert errors(found, truth).mean() < 0.06, errors(found, truth)


class BatchNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh())
        self.head = nn.Linear(54, 3)

    def forward(self, images):
        return self.head(self.features(images).flatten(1))


def test_gradinversion_in_train_mode_uses_the_batch_s_granted_statistics(tiny):
    """At the truth both the distance and the prior are nought; elsewhere the prior tells; and it helps the attack."""
    model = BatchNormNet().double()
    draws = torch.Generator().manual_seed(3)
    images, labels = torch.rand(3, *tiny.shape, generator=draws, dtype=torch.float64), torch.tensor([0, 1, 2])
    seen = observed(model, images, labels, mode="train", statistics="batch")
    simulate = gradient_of(model, mode="train")
    prior = bn_statistics(
        lambda params, known, x: batch_statistics(simulate.model, params, x, known), lambda params, known: granted_statistics(model, known),
        source="batch",
    )  # fmt: skip
    settings = gradinversion(statistics=prior, statistics_weight=1.0, group=0.0, restarts=1, tv=0.0, pixel_norm=0.0, iterations=0, **tiny.settings)
    (at_truth,) = run([seen], lambda: simulate, dataclasses.replace(settings, start=lambda o, r: (images, None)), **DOUBLE)
    assert at_truth.loss < 1e-12
    other = torch.rand(3, *tiny.shape, generator=draws, dtype=torch.float64)
    (elsewhere,) = run([seen], lambda: simulate, dataclasses.replace(settings, start=lambda o, r: (other, None)), **DOUBLE)
    assert elsewhere.loss - elsewhere.fit > 1e-3
    (with_prior,) = run([seen], lambda: simulate, dataclasses.replace(settings, iterations=150), **DOUBLE)
    assert with_prior.loss < 0.2 * float(with_prior.losses[0])
