"""The game with both steps at once, against both losses written down with graphs of their own. All images are synthetic."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gidef.clients.local import LocalSettings, train_locally
from gidef.clients.participate import Participation, shared_names
from gidef.clients.store import ClientStore
from gidef.defence import LearnedDefence
from gidef.defence.encode import EncodedPlayer
from gidef.defence.perturbation import MinimaxSettings
from gidef.models import SplitModel, decoder_for
from gidef.rng import generator
from gidef.similarity import DEPENDENCE, dependence, ssim
from gidef.types import Client, ServerState

CLASSES, SHAPE, LATENT, BATCH = 3, (2, 8, 8), (8, 4, 4), 6
ROWS = torch.arange(BATCH)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.Tanh())
        self.back = nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        return self.head(self.back(self.front(images)))


def filled(module, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "level" not in name:
                p.copy_(torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return module


def make_defence(dtype=torch.float64, **settings):
    settings = {"schedule": "simultaneous", "ramp": 0.0, "dependence_weight": 1.3} | settings
    model = SplitModel(filled(Backbone(), 0), cut="front", perturbation={"std_init": 0.7}, image_shape=SHAPE, num_classes=CLASSES)
    decoder = filled(decoder_for(LATENT, 1, SHAPE, size="loop", width_factor=0.25), 3)
    return LearnedDefence(model.to(dtype), decoder.to(dtype), MinimaxSettings(**settings))


def make_client(number=4, examples=2 * BATCH):
    draw = torch.Generator().manual_seed(number)
    return Client(number, torch.randint(256, (examples, *SHAPE), generator=draw, dtype=torch.uint8), torch.randint(CLASSES, (examples,), generator=draw))


def a_batch(seed=0, dtype=torch.float64, size=BATCH):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(size, *SHAPE, generator=draw, dtype=torch.float64).to(dtype), torch.randint(CLASSES, (size,), generator=draw)


def begun(defence, *, progress=0.5, first=False, device="cpu"):
    player = defence.player()
    for module in (player.model, player.kept):
        if module is not None:
            module.to(device)
    player.begin(make_client(), seed=7, round=2, progress=progress, first=first)
    return player


def opponents_loss(images, reconstruction, measure):
    error = (images - reconstruction).square().mean()
    return error if measure == "mse" else error + (1 - ssim(images, reconstruction).mean()) / 2


def written_down(model, decoder, settings, images, labels, noise):
    """(L_c, gradients of the model, gradients of the decoder), each from a graph of its own, all at the weights as they are."""
    outputs = model.run(images, noise)
    loss = F.cross_entropy(outputs.logits, labels)
    if settings.dependence != "cka" or len(images) >= 4:
        options = {"ssim_threshold": settings.ssim_threshold, "mse_cap": settings.mse_cap}
        loss = loss + settings.dependence_weight * dependence(settings.dependence, images, decoder(outputs.perturbed), **options)
    if settings.kl_weight:
        loss = loss + settings.kl_weight * (0.5 * (outputs.std**2 + outputs.latent**2 - 1) - outputs.std.log()).mean()
    mine = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        perturbed = model.run(images, noise).perturbed
    theirs = torch.autograd.grad(opponents_loss(images, decoder(perturbed), settings.decoder_loss), list(decoder.parameters()))
    return loss.detach(), mine, theirs


CASES = [(measure, loss) for measure in DEPENDENCE for loss in ("mse_ssim", "mse")]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize(("measure", "loss"), CASES)
def test_both_players_step_by_the_gradients_of_their_own_losses_at_the_same_weights(measure, loss, kl, steps):
    defence = make_defence(dependence=measure, decoder_loss=loss, kl_weight=kl, decoder_steps=steps, mse_cap=0.086, ssim_threshold=-1.0)
    player, draws = begun(defence), generator(7, "noise", 2, 4)
    for number in range(2):
        model, decoder, opponent = copy.deepcopy(player.model), copy.deepcopy(player.kept), copy.deepcopy(player._decoder_step.state_dict()["state"])
        images, labels = a_batch(number)
        told = player.loss(images, labels, rows=ROWS, epoch=0)
        player.model.zero_grad()
        player.backward()

        noise = model.perturbation.draw(BATCH, generator=draws, dtype=torch.float64)
        errors = (decoder(model.run(images, noise).perturbed) - images).square().mean((1, 2, 3))
        assert 0 < (errors > 0.086).sum() < BATCH  # images on both sides of the cap
        expected, mine, theirs = written_down(model, decoder, defence.settings, images, labels, noise)
        torch.testing.assert_close(told, expected, rtol=1e-12, atol=1e-12)
        for p, gradient in zip(player.model.parameters(), mine, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-13)
            assert gradient.count_nonzero()
        adam = torch.optim.Adam(decoder.parameters(), lr=defence.settings.decoder_lr, foreach=False)
        adam.load_state_dict({**adam.state_dict(), "state": opponent})
        with torch.no_grad():
            perturbed = model.run(images, noise).perturbed
        for step in range(steps):
            if step:
                theirs = torch.autograd.grad(opponents_loss(images, decoder(perturbed), loss), list(decoder.parameters()))
            for p, gradient in zip(decoder.parameters(), theirs, strict=True):
                p.grad = gradient
            adam.step()
        for p, q in zip(player.kept.parameters(), decoder.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
            assert p.grad is None and p.requires_grad


def test_the_client_plays_against_the_decoder_of_before_its_step():
    """Where the two schedules part: the same losses in the first step, and others once the decoder has stepped first."""
    images, labels = a_batch()
    at_once, in_turn = begun(make_defence(decoder_lr=0.1)), begun(make_defence(decoder_lr=0.1, schedule="alternating"))
    first, after = at_once.loss(images, labels, rows=ROWS, epoch=0), in_turn.loss(images, labels, rows=ROWS, epoch=0)
    frozen = begun(make_defence(decoder_steps=0)).loss(images, labels, rows=ROWS, epoch=0)
    torch.testing.assert_close(first, frozen, rtol=1e-12, atol=0)
    assert abs(first - after) > 1e-4


@pytest.mark.parametrize("settings", [{"dependence": "cka"}, {"ramp": 1.0}, {"ramp": 1.0, "dependence": "neg_mse", "decoder_loss": "mse"}])
def test_where_the_client_does_not_look_at_the_decoder_the_decoder_still_learns(settings):
    size = 3 if settings.get("dependence") == "cka" else BATCH
    defence = make_defence(**settings)
    player, plain = begun(defence, progress=0.0), begun(make_defence(**settings | {"schedule": "alternating"}), progress=0.0)
    images, labels = a_batch(size=size)
    told = player.loss(images, labels, rows=ROWS[:size], epoch=0)
    player.backward()
    expected = plain.loss(images, labels, rows=ROWS[:size], epoch=0)
    expected.backward()
    torch.testing.assert_close(told, expected.detach(), rtol=1e-12, atol=0)
    for players in ((player.model, plain.model), (player.kept, plain.kept)):  # without R the schedules are one
        for p, q in zip(*(module.parameters() for module in players), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    before = make_defence(**settings).decoder.parameters()
    assert all((p - q).abs().max() > 0 for p, q in zip(player.kept.parameters(), before, strict=True))


def test_without_decoder_steps_the_decoder_stands_still():
    defence = make_defence(decoder_steps=0, decoder_steps_first=2)
    player, plain = begun(defence), begun(make_defence(decoder_steps=0, schedule="alternating"))
    images, labels = a_batch()
    player.loss(images, labels, rows=ROWS, epoch=0)
    player.backward()
    plain.loss(images, labels, rows=ROWS, epoch=0).backward()
    for p, q in zip(player.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert all(torch.equal(p, q) for p, q in zip(player.kept.parameters(), defence.decoder.parameters(), strict=True))
    first = begun(defence, first=True)
    first.loss(images, labels, rows=ROWS, epoch=0)
    first.backward()
    assert not all(torch.equal(p, q) for p, q in zip(first.kept.parameters(), defence.decoder.parameters(), strict=True))


def passes(step):
    """Floating-point operations of the convolutions and products in a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_one_pass_serves_both_players():
    """In units of each part: encoder and predictor run once forward and back, the decoder once forward; back once where reversed."""
    images, labels = a_batch(dtype=torch.float32)
    found = {}
    for name, settings in {
        "reversed": {"dependence": "neg_mse", "decoder_loss": "mse", "mse_cap": 1.0}, "shared": {}, "alternating": {"schedule": "alternating"},
    }.items():  # fmt: skip
        player = begun(make_defence(torch.float32, **settings))

        def step(player=player):
            loss = player.loss(images, labels, rows=ROWS, epoch=0)
            (player.backward if hasattr(player, "backward") else loss.backward)()

        found[name] = passes(step)
    reference = make_defence(torch.float32)
    model, decoder = reference.model, reference.decoder
    noise = torch.zeros(BATCH, *LATENT)
    plain = passes(lambda: F.cross_entropy(model(images, noise), labels).backward())
    perturbed = model.run(images, noise).perturbed.detach()
    forward = passes(lambda: decoder(perturbed))
    weights = passes(lambda: decoder(perturbed).sum().backward()) - forward
    decoder.requires_grad_(False)
    inputs = passes(lambda: decoder(perturbed.requires_grad_()).sum().backward()) - forward
    decoder.requires_grad_(True)
    both = passes(lambda: decoder(perturbed).sum().backward()) - forward
    structural = found["alternating"] - plain  # with SSIM's products, which are counted as well
    assert found["reversed"] == plain + forward + both
    assert found["shared"] - found["reversed"] >= weights + inputs - both
    assert structural - (found["shared"] - plain) == forward


def test_local_training_takes_the_players_own_backward_pass(tmp_path):
    """Two steps of local training, in whole and under share policy `head`, against the player's own calls."""
    defence, client = make_defence(torch.float32), make_client()
    settings = LocalSettings(batch_size=BATCH, optimiser="sgd", lr=0.1, grad_clip=0.0)
    player, start = begun(defence), defence.initial_model()
    result = train_locally(player, start, client, settings, seed=1, round=2)

    again = begun(defence)
    order = torch.randperm(client.num_examples, generator=generator(1, "order", 2, client.id)).split(BATCH)
    losses, sgd = [], torch.optim.SGD(again.model.parameters(), lr=0.1, foreach=True)
    for rows in order:
        losses.append(again.loss(client.images[rows].float().div(255), client.labels[rows], rows=rows, epoch=0))
        again.model.zero_grad()
        again.backward()
        sgd.step()
    assert result.loss == pytest.approx(float(sum(losses) / 2), rel=1e-6)
    for mine, theirs in ((player.model, again.model), (player.kept, again.kept)):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert all(torch.equal(step, player.model.get_parameter(name) - start[name]) for name, step in result.delta.items())

    initial = defence.initial()
    kept = {}
    for policy in ("full", "head"):
        shared = shared_names(initial, defence.model.parts["predictor"], policy)
        taking = Participation([defence.player()], initial, shared, settings, ClientStore(tmp_path / policy, memory=1), seed=1, rounds=3)
        update = taking.train(ServerState({name: initial[name] for name in shared}, round=2), client)
        assert set(update.delta) == set(shared)
        taking.versions[client.id] = 2
        kept[policy] = {**initial, **{name: initial[name] + step for name, step in update.delta.items()}, **taking.state(client.id)}
    assert all(torch.equal(kept["full"][name], kept["head"][name]) for name in initial)  # the policy moves tensors, not the game
    assert any(name.startswith("decoder.") and not torch.equal(kept["full"][name], initial[name]) for name in initial)


def test_encoded_batches_reach_both_players():
    images, labels = a_batch(dtype=torch.float32)
    defence = make_defence(torch.float32)
    darker = EncodedPlayer(defence.player(), lambda images, labels, **_: (images / 2, labels))
    darker.begin(make_client(), seed=7, round=2, progress=0.5, first=False)
    plain = begun(defence)
    for player, seen in ((darker, images), (plain, images / 2)):
        player.loss(seen, labels, rows=ROWS, epoch=0)
        player.backward()
    for mine, theirs in ((darker.model, plain.model), (darker.kept, plain.kept)):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert not hasattr(EncodedPlayer(make_defence(schedule="alternating").player(), None), "backward")


@pytest.mark.parametrize("settings", [{}, {"dependence": "neg_mse", "decoder_loss": "mse", "mse_cap": 1.0}, {"decoder_steps": 2}])
def test_bfloat16_goes_where_float32_goes(settings):
    defence, client = make_defence(torch.float32, **settings), make_client()
    deltas = {}
    for precision in ("float32", "bfloat16"):
        player = begun(defence)
        options = LocalSettings(batch_size=BATCH, optimiser="sgd", lr=0.1, precision=precision, grad_clip=0.0)
        result = train_locally(player, defence.initial_model(), client, options, seed=1, round=2)
        assert all(p.dtype == torch.float32 for p in [*player.model.parameters(), *player.kept.parameters()])
        deltas[precision] = torch.cat([step.flatten() for step in result.delta.values()])
    assert F.cosine_similarity(deltas["float32"], deltas["bfloat16"], dim=0) > 0.98
    assert not torch.equal(deltas["float32"], deltas["bfloat16"])


class Reads(TorchDispatchMode):
    """Counts the values that are read out of tensors: each would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"dependence": "neg_mse", "decoder_loss": "mse", "decoder_steps": 2}, {"frozen": True, "dependence": "cka"}])
def test_no_step_waits_for_a_value(settings):
    defence, found = make_defence(torch.float32, **settings), []
    for epochs in (1, 3):
        player = begun(defence)
        with Reads() as reads:
            options = LocalSettings(batch_size=BATCH, epochs=epochs, optimiser="sgd", lr=0.1, fused=True)
            train_locally(player, defence.initial_model(), make_client(), options, seed=1, round=2)
        found.append(reads.count)
    assert found[0] == found[1] <= 3  # once a client: whether its loss is finite


def test_no_graph_outlives_its_step():
    player = begun(make_defence(torch.float32))
    images, labels = a_batch(dtype=torch.float32)
    gone = weakref.ref(images)
    player.loss(images, labels, rows=ROWS, epoch=0)
    player.backward()
    del images
    gc.collect()
    assert gone() is None
