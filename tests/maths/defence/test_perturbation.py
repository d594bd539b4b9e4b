"""The learned perturbation: the game against its decoder, and what an attacker simulates of it. All images are synthetic."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from gidef.clients.local import LocalSettings, load_parameters, train_locally
from gidef.defence import Defence, LearnedDefence
from gidef.defence.perturbation import MinimaxSettings
from gidef.models import SplitModel, decoder_for
from gidef.rng import generator
from gidef.similarity import DEPENDENCE, dependence, ssim
from gidef.types import Client

CLASSES, SHAPE, LATENT = 3, (2, 8, 8), (8, 4, 4)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Backbone(nn.Module):
    """Two convolutions and a linear layer, with smooth activations: the smallest net with a map for a latent."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.Tanh())
        self.back = nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        return self.head(self.back(self.front(images)))


def filled(module, seed=0):
    """Weights of about unit gain that depend on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "level" not in name:
                p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return module


def make_model(dtype=torch.float64, *, perturbation=True, **options):
    layer = {"std_init": 0.7} | options if perturbation else None
    model = SplitModel(filled(Backbone()), cut="front", perturbation=layer, image_shape=SHAPE, num_classes=CLASSES)
    if perturbation and options.get("mode") == "conditional":
        filled(model.perturbation, seed=1)
        with torch.no_grad():  # a level that varies with the latent
            model.perturbation.level.weight.copy_(0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))
    return model.to(dtype)


def make_defence(settings=None, dtype=torch.float64, *, decoder=True, **options):
    opponent = filled(decoder_for(LATENT, 1, SHAPE, size="loop", width_factor=0.25), seed=3).to(dtype) if decoder else None
    return LearnedDefence(make_model(dtype, **options), opponent, settings or MinimaxSettings())


def make_client(number=4, examples=12):
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(256, (examples, *SHAPE), generator=draw, dtype=torch.uint8)
    return Client(number, images, torch.randint(CLASSES, (examples,), generator=draw))


def a_batch(size=4, seed=0, dtype=torch.float64):
    """images, labels (int64), noise."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(size, *SHAPE, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (size,), generator=draw)
    return images.to(dtype), labels, torch.randn(size, *LATENT, generator=draw, dtype=torch.float64).to(dtype)


# --- the game, written down once more --------------------------------------------------------------------------------


def plain_forward(model, images, noise):
    """logits, m, σ, z̃ by the parts' own layers."""
    backbone, layer = model.backbone, model.perturbation
    z = backbone.front(images)

    def per_position(linear):
        return torch.einsum("oc,bchw->bohw", linear.weight, z) + linear.bias[:, None, None]

    s = layer.level[:, None, None] if layer.mode == "global" else per_position(layer.level)
    shifted = z if layer.shift is None else z + per_position(layer.shift)
    mean, variance = shifted.mean((1, 2, 3), keepdim=True), shifted.var((1, 2, 3), keepdim=True, unbiased=False)
    m = (shifted - mean) / (variance + 1e-8).sqrt()
    std = torch.maximum(layer.strength * torch.log1p(torch.exp(s)), torch.tensor(layer.std_floor, dtype=z.dtype))
    perturbed = m + std * noise
    return backbone.head(backbone.back(perturbed)), m, std, perturbed


def squared_pearson(x, y):
    x, y = ((image - image.mean((2, 3), keepdim=True)).flatten(1) for image in (x, y))
    return ((x * y).sum(1) ** 2 / (x.square().sum(1) * y.square().sum(1))).mean()


def plain_decoder_loss(images, reconstruction):
    return (images - reconstruction).square().mean() + (1 - ssim(images, reconstruction).mean()) / 2


def plain_client_loss(model, decoder, images, targets, noise, *, weight, settings):
    logits, m, std, perturbed = plain_forward(model, images, noise)
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    if weight:
        reconstruction = decoder(perturbed)
        if settings.dependence == "pearson2":
            loss = loss + weight * squared_pearson(images, reconstruction)
        else:
            options = {"ssim_threshold": settings.ssim_threshold, "mse_cap": settings.mse_cap}
            loss = loss + weight * dependence(settings.dependence, images, reconstruction, **options)
    if settings.kl_weight:
        loss = loss + settings.kl_weight * ((std**2 + m**2 - 1) / 2 - std.log()).mean()
    return loss


def gradients(loss, module):
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def one_hot(labels, dtype=torch.float64):
    return F.one_hot(labels, CLASSES).to(dtype)


@pytest.mark.parametrize("options", [{}, {"mode": "conditional", "mean": True}, {"law": "laplace"}], ids=["global", "conditional", "laplace"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_of_the_game_equals_the_alternation_written_down(options, first):
    settings = MinimaxSettings(kl_weight=0.0 if options.get("law") else 0.05, decoder_steps=2, decoder_steps_first=3, dependence_weight=1.5, ramp=0.5)
    player = make_defence(settings, **options).player()
    client = make_client()
    model, decoder = copy.deepcopy(player.model), copy.deepcopy(player.kept)
    opponent = torch.optim.Adam(decoder.parameters(), lr=settings.decoder_lr, foreach=False)
    draws = generator(7, "noise", 2, client.id)
    player.begin(client, seed=7, round=2, progress=0.2, first=first)
    for number, epoch in enumerate((0, 0, 1)):
        images, labels, _ = a_batch(seed=number)
        loss = player.loss(images, labels, rows=torch.arange(4), epoch=epoch)
        player.model.zero_grad()
        loss.backward()

        noise = model.perturbation.draw(4, generator=draws, dtype=torch.float64)
        perturbed = plain_forward(model, images, noise)[3].detach()
        for _ in range(3 if first and epoch == 0 else 2):
            opponent.zero_grad()
            plain_decoder_loss(images, decoder(perturbed)).backward()
            opponent.step()
        expected = plain_client_loss(model, decoder, images, one_hot(labels), noise, weight=1.5 * 0.2 / 0.5, settings=settings)

        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        for name, gradient in gradients(expected, model).items():
            torch.testing.assert_close(player.model.get_parameter(name).grad, gradient, rtol=1e-8, atol=1e-11)
            assert gradient.count_nonzero()
        for (name, mine), theirs in zip(player.kept.named_parameters(), decoder.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
            assert mine.grad is None and mine.requires_grad  # frozen for the client's loss, free for the next step


def test_the_dependence_weight_rises_linearly_over_the_first_share_of_the_rounds():
    settings = MinimaxSettings(dependence_weight=3.0, ramp=0.1)
    assert [settings.weight(progress) for progress in (0, 0.025, 0.05, 0.1, 0.5, 1)] == pytest.approx([0, 0.75, 1.5, 3, 3, 3])
    assert MinimaxSettings(dependence_weight=3.0, ramp=0).weight(0.0) == 3
    images, labels, _ = a_batch()
    losses = []
    for progress in (0.0, 0.05, 0.1, 1.0):
        player = make_defence(MinimaxSettings(decoder_steps=0, decoder_steps_first=0)).player()
        player.begin(make_client(), seed=0, round=0, progress=progress, first=True)
        losses.append(float(player.loss(images, labels, rows=torch.arange(4), epoch=0).detach()))
    none, half, full, later = losses
    assert full > none and later == full
    assert half - none == pytest.approx((full - none) / 2)


class Forbidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, latent):
        raise AssertionError("the decoder was called")


def test_without_a_dependence_weight_the_decoder_is_never_called():
    images, labels, noise = a_batch()
    free = MinimaxSettings(dependence_weight=0.0, decoder_steps=0, decoder_steps_first=0, kl_weight=0.1)
    player = LearnedDefence(make_model(), Forbidden(), free).player()
    player.begin(make_client(), seed=0, round=0, progress=1.0, first=True)
    player.loss(images, labels, rows=torch.arange(4), epoch=0).backward()
    alone = LearnedDefence(make_model(), None, free)
    assert alone.player().kept is None and not any(name.startswith("decoder.") for name in alone.initial())
    for defence, terms, progress in (
        (alone, "client", 1.0),
        (LearnedDefence(make_model(), Forbidden(), free), "client", 1.0),
        (LearnedDefence(make_model(), Forbidden(), MinimaxSettings()), "utility", 1.0),
        (LearnedDefence(make_model(), Forbidden(), MinimaxSettings()), "client", 0.0),  # before the ramp
    ):
        simulate = defence.simulator(terms=terms, progress=progress)()
        simulate(defence.initial_model(), {}, images, one_hot(labels), noise)
    called = LearnedDefence(make_model(), Forbidden(), MinimaxSettings())
    with pytest.raises(AssertionError, match="was called"):
        called.simulator(progress=1.0)()(called.initial_model(), {"decoder.weight": torch.zeros(1)}, images, one_hot(labels), noise)


@pytest.mark.parametrize(("first", "expected"), [(True, [5, 5, 1, 1]), (False, [1, 1, 1, 1])])
def test_the_decoder_takes_more_steps_in_a_client_s_first_epoch_only(first, expected):
    player = make_defence(dtype=torch.float32).player()
    learning = []
    player.kept.register_forward_hook(lambda module, inputs, output: learning.append(next(module.parameters()).requires_grad))
    player.begin(make_client(), seed=0, round=0, progress=1.0, first=first)
    images, labels, _ = a_batch(dtype=torch.float32)
    steps = []
    for epoch in (0, 0, 1, 2):
        learning.clear()
        player.loss(images, labels, rows=torch.arange(4), epoch=epoch)
        steps.append(sum(learning))
        assert len(learning) == steps[-1] + 1 and not learning[-1]  # the last call is the client's, with ψ frozen
    assert steps == expected


def test_a_batch_too_small_for_cka_goes_without_it():
    images, labels, noise = a_batch(size=3)
    defence = make_defence(MinimaxSettings(dependence="cka"))
    known = {name: tensor for name, tensor in defence.initial().items() if name.startswith("decoder.")}
    place = (defence.initial_model(), known, images, one_hot(labels), noise)
    client, utility = (defence.simulator(terms=terms, progress=1.0)()(*place) for terms in ("client", "utility"))
    assert all(torch.equal(client[name], utility[name]) for name in client)


# --- noise -----------------------------------------------------------------------------------------------------------


def noise_of(player, client, rows, *, seed=0, round=0, batches=1):
    """What the model is given in the last of some batches."""
    given, run = [], player._forward
    player._forward = lambda images, noise: given.append(noise) or run(images, noise)
    player.begin(client, seed=seed, round=round, progress=1.0, first=round == 0)
    for _ in range(batches):
        player.loss((client.images[rows] / 255), client.labels[rows], rows=rows, epoch=0)
    player._forward = run
    return given[-1]


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_frozen_noise_stays_with_the_image_over_batches_rounds_and_workers(law):
    defence, client = make_defence(MinimaxSettings(frozen=True), torch.float32, law=law), make_client(4)
    some, all_rows = torch.tensor([5, 2]), torch.arange(12)
    first = noise_of(defence.player(), client, some)
    later = noise_of(defence.player(), client, all_rows, round=9, batches=2)
    assert torch.equal(first, later[some]) and torch.equal(later, defence.frozen_noise(client, seed=0))
    assert len({tuple(row.flatten().tolist()) for row in later}) == 12
    other = noise_of(defence.player(), make_client(5), all_rows)
    assert not torch.equal(later, other) and not torch.equal(later, noise_of(defence.player(), client, all_rows, seed=1))


def test_noise_is_otherwise_fresh_in_every_batch_round_and_client_and_a_function_of_them():
    defence, rows = make_defence(dtype=torch.float32), torch.arange(4)
    assert defence.frozen_noise(make_client(), seed=0) is None
    place = {"client": make_client(4), "rows": rows, "seed": 0, "round": 3, "batches": 1}
    draws = [noise_of(defence.player(), **place | change) for change in ({}, {"batches": 2}, {"round": 4}, {"client": make_client(5)}, {"seed": 1})]
    for index, draw in enumerate(draws):
        assert all(not torch.equal(draw, other) for other in draws[:index])
    torch.rand(1)
    used = defence.player()
    noise_of(used, make_client(6), rows)
    assert torch.equal(noise_of(used, **place), draws[0])


@pytest.mark.parametrize("mode", ["global", "conditional"])
@pytest.mark.parametrize("sent", [-1e4, -3.0, 2.0])
def test_the_floor_holds_whatever_level_the_server_sends(mode, sent):
    defence = make_defence(dtype=torch.float32, mode=mode, std_floor=0.25, mean=True)
    assert not {"strength", "std_floor"} & {name.rpartition(".")[2] for name in defence.initial()}
    player, (images, _, noise) = defence.player(), a_batch(dtype=torch.float32)
    tensors = defence.initial_model()
    levels = {name: torch.full_like(tensor, sent) for name, tensor in tensors.items() if "level" in name}
    shifts = {name: 1e3 * tensor for name, tensor in tensors.items() if "shift" in name}
    load_parameters(player.model, tensors | levels | shifts)
    outputs = player.model.run(images, noise)
    assert outputs.std.min() >= 0.25
    if sent == -1e4:
        torch.testing.assert_close(outputs.perturbed - outputs.latent, 0.25 * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.latent.square().mean((1, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)  # no μ outgrows the noise


@pytest.mark.parametrize("options", [{}, {"mode": "conditional", "mean": True}, {"law": "laplace"}], ids=["global", "conditional", "laplace"])
def test_strength_zero_below_the_floor_gives_the_noise_free_loss_bit_for_bit(options):
    settings = MinimaxSettings(decoder_steps=0, decoder_steps_first=0)
    defence = make_defence(settings, torch.float32, strength=0.0, std_floor=0.0, **options)
    player, (images, labels, noise) = defence.player(), a_batch(dtype=torch.float32)
    player.begin(make_client(), seed=0, round=0, progress=1.0, first=True)
    loss = player.loss(images, labels, rows=torch.arange(4), epoch=0)
    clean = player.model.run(images, None)
    assert torch.equal(loss, F.cross_entropy(clean.logits, labels) + dependence("pearson2", images, player.kept(clean.latent)))
    known = {name: tensor for name, tensor in defence.initial().items() if name.startswith("decoder.")}
    simulate = defence.simulator(progress=1.0)()
    noisy, free = (simulate(defence.initial_model(), known, images, one_hot(labels, torch.float32), e) for e in (noise, None))
    assert all(torch.equal(noisy[name], free[name]) for name in free if "level" not in name)
    loud = make_defence(settings, torch.float32, strength=0.5, std_floor=0.0, **options).player()
    loud.begin(make_client(), seed=0, round=0, progress=1.0, first=True)
    assert not torch.equal(loss, loud.loss(images, labels, rows=torch.arange(4), epoch=0))


def test_evaluation_noise_has_the_latent_s_shape_and_comes_from_its_generator():
    defence = make_defence()
    assert defence.noise_shape == LATENT and Defence(make_model(perturbation=False)).noise_shape is None
    draws = [defence.draw_noise(3, generator=generator(seed, "x")) for seed in (0, 0, 1)]
    assert draws[0].shape == (3, *LATENT) and draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert Defence(make_model(perturbation=False)).draw_noise(3, generator=generator(0, "x")) is None


# --- what an attacker simulates --------------------------------------------------------------------------------------


def split_by_policy(defence, policy):
    """(params, known) as the observation of a share policy would hold them."""
    every, predictor = defence.initial(), defence.model.parts["predictor"]
    shared = [name for name in every if policy == "all" or (name in predictor if policy == "head" else not name.startswith("decoder."))]
    return {name: every[name] for name in shared}, {name: tensor for name, tensor in every.items() if name not in shared}


def check_simulator(defence, policy, terms, *, progress=1.0):
    settings, (images, labels, noise) = defence.settings, a_batch()
    params, known = split_by_policy(defence, policy)
    found = defence.simulator(terms=terms, progress=progress)()(params, known, images, one_hot(labels), noise)

    model, decoder = copy.deepcopy(defence.model), copy.deepcopy(defence.decoder)
    client = terms == "client"
    quiet = settings if client else MinimaxSettings()
    weight = settings.weight(progress) if client else 0.0
    expected = gradients(plain_client_loss(model, decoder, images, one_hot(labels), noise, weight=weight, settings=quiet), model)
    opponent = gradients(plain_decoder_loss(images, decoder(plain_forward(model, images, noise)[3])), decoder)
    expected |= {f"decoder.{name}": gradient for name, gradient in opponent.items()}
    assert list(found) == list(params)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    return found


@pytest.mark.parametrize("policy", ["full", "head", "all"])
@pytest.mark.parametrize("terms", ["client", "utility"])
@pytest.mark.parametrize("measure", DEPENDENCE)
def test_the_simulator_equals_plain_autograd(measure, terms, policy):
    defence = make_defence(MinimaxSettings(dependence=measure, dependence_weight=2.0, ramp=0.5, kl_weight=0.05, mse_cap=10.0, ssim_threshold=-1.0))
    found = check_simulator(defence, policy, terms, progress=0.3)
    assert all(gradient.count_nonzero() for gradient in found.values())


@pytest.mark.parametrize("mode", ["global", "conditional"])
@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize("policy", ["full", "all"])
def test_the_simulator_equals_plain_autograd_for_every_level_and_law(policy, law, mode):
    settings = MinimaxSettings(kl_weight=0.1 if law == "gaussian" else 0.0)
    check_simulator(make_defence(settings, mode=mode, law=law, mean=mode == "conditional", strength=0.8), policy, "client")


def test_the_simulated_gradient_is_what_a_client_releases_in_one_step():
    # λ is at 0 in the first round, so the decoder's own steps do not matter
    settings = MinimaxSettings(kl_weight=0.1)
    defence, client = make_defence(settings, torch.float32), make_client(4, 6)
    player = defence.player()
    player.begin(client, seed=0, round=0, progress=0.0, first=True)
    sgd = LocalSettings(batch_size=6, optimiser="sgd", lr=0.1, grad_clip=0.0, steps=1)
    rows = []
    loss = player.loss
    player.loss = lambda images, labels, **where: rows.append(where["rows"]) or loss(images, labels, **where)
    delta = train_locally(player, defence.initial_model(), client, sgd, seed=0, round=0).delta
    noise = defence.draw_noise(6, generator=generator(0, "noise", 0, client.id))
    found = defence.simulator(progress=0.0)()(
        defence.initial_model(), {}, client.images[rows[0]] / 255, one_hot(client.labels[rows[0]], torch.float32), noise
    )
    for name in delta:
        torch.testing.assert_close(delta[name], -0.1 * found[name], rtol=1e-4, atol=1e-7)


def test_the_undefended_simulator_equals_plain_autograd_with_any_part_known():
    defence, (images, labels, _) = Defence(make_model(perturbation=False)), a_batch()
    model, params = copy.deepcopy(defence.model), defence.initial()
    assert params.keys() == dict(model.named_parameters()).keys()
    expected = gradients(F.cross_entropy(model(images), labels), model)
    for shared in (set(params), {"backbone.head.weight"}):
        known = {name: tensor for name, tensor in params.items() if name not in shared}
        found = defence.simulator()()({name: params[name] for name in shared}, known, images, one_hot(labels), None)
        assert found.keys() == shared
        for name in shared:
            torch.testing.assert_close(found[name], expected[name])
    player = defence.player()
    torch.testing.assert_close(player.loss(images, labels, rows=torch.arange(4), epoch=0), F.cross_entropy(model(images), labels))


@pytest.mark.parametrize("policy", ["full", "all"])
@pytest.mark.parametrize("measure", DEPENDENCE)
def test_the_simulator_runs_under_vmap_and_differentiates_twice(measure, policy):
    defence = make_defence(MinimaxSettings(dependence=measure, kl_weight=0.05, mse_cap=10.0, ssim_threshold=-1.0), mode="conditional")
    params, known = split_by_policy(defence, policy)
    simulate = defence.simulator(progress=1.0)()

    def fit(images, noise, targets):
        return sum(gradient.square().sum() for gradient in simulate(params, known, images, targets, noise).values())

    batches = [a_batch(seed=seed) for seed in range(2)]
    images, noise, targets = (torch.stack(parts) for parts in zip(*[(x, e, one_hot(y)) for x, y, e in batches], strict=True))
    together = vmap(grad(fit, argnums=(0, 1, 2)))(images, noise, targets)
    for index in range(2):
        alone = grad(fit, argnums=(0, 1, 2))(images[index], noise[index], targets[index])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(all_of_them[index], one, rtol=1e-7, atol=1e-10)
            assert one.isfinite().all() and one.count_nonzero()
    step, direction = 1e-5, torch.randn(images[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = (fit(images[0] + step * direction, noise[0], targets[0]) - fit(images[0] - step * direction, noise[0], targets[0])) / (2 * step)
    torch.testing.assert_close((together[0][0] * direction).sum(), slope, rtol=1e-4, atol=1e-7)


def test_two_simulators_of_one_factory_do_not_disturb_one_another_in_two_threads():
    defence = make_defence(MinimaxSettings(kl_weight=0.05))
    make = defence.simulator(progress=1.0)
    params, known = split_by_policy(defence, "all")
    places = []
    for seed in range(2):
        images, labels, noise = a_batch(seed=seed)
        places.append(({name: tensor * (1 + seed) for name, tensor in params.items()}, known, images, one_hot(labels), noise))
    expected = [make()(*place) for place in places]
    wrong, gate = [], threading.Barrier(2)

    def work(number):
        simulate = make()
        gate.wait()
        for _ in range(15):
            found = simulate(*places[number])
            wrong.extend(name for name in found if not torch.equal(found[name], expected[number][name]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p.requires_grad for p in defence.model.parameters()) and all(p.requires_grad for p in defence.decoder.parameters())


# --- what a defence hands out ----------------------------------------------------------------------------------------


def test_initial_tensors_and_players_are_copies():
    defence = make_defence()
    tensors = defence.initial()
    assert tensors.keys() == defence.initial_model().keys() | {f"decoder.{name}" for name, _ in defence.decoder.named_parameters()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    player, other = defence.player(), defence.player()
    for tensor in (*tensors.values(), *(p.data for p in (*player.model.parameters(), *player.kept.parameters()))):
        tensor.zero_()
    again = defence.initial()
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in other.model.named_parameters())


def test_a_defence_without_its_parts_is_refused():
    with pytest.raises(ValueError, match="perturbation layer"):
        LearnedDefence(make_model(perturbation=False), None, MinimaxSettings(dependence_weight=0.0))
    with pytest.raises(ValueError, match="needs a decoder"):
        LearnedDefence(make_model(), None, MinimaxSettings())
