"""Clients' steps as compiled programs, and the other ways to the same step: fused optimisers, channels last. All images are synthetic."""

import dataclasses

import pytest
import torch
from test_simultaneous import BATCH, CLASSES, SHAPE, Backbone, a_batch, begun, filled, make_client, make_defence

from gidef import build
from gidef.clients.local import LocalSettings, train_locally
from gidef.config import LearnedPerturbation, MixUp
from gidef.defence import Defence
from gidef.defence.compiled import Compiled
from gidef.defence.encode import EncodedPlayer
from gidef.models import SplitModel
from gidef.parallel import World
from tests.small_run import RECIPE, start

GAMES = {
    "shared": {}, "three steps of one scalar": {"decoder_steps": 3, "dependence": "neg_mse", "decoder_loss": "mse", "mse_cap": 0.086, "kl_weight": 0.05},
    "before the ramp": {"ramp": 1e9}, "alternating": {"schedule": "alternating"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(before)


def silence(text):
    raise AssertionError(text)


def stepped(player, seed, size=BATCH):
    """The loss of a batch, once its gradients are in place."""
    weight = next(player.model.parameters())
    images, labels = (tensor.to(weight.device) for tensor in a_batch(seed, size=size, dtype=weight.dtype))
    player.model.zero_grad()
    loss = player.loss(images, labels, rows=torch.arange(size), epoch=0)
    (player.backward if hasattr(player, "backward") else loss.backward)()
    return loss.detach()


@pytest.mark.parametrize("game", ["shared", *(pytest.param(game, marks=pytest.mark.slow) for game in GAMES if game != "shared")])
def test_a_compiled_step_has_the_gradients_of_the_step_as_it_is(game):
    plain, program = begun(make_defence(**GAMES[game])), begun(make_defence(**GAMES[game]))
    program.compile(notice=silence, backend="aot_eager")
    for number, size in enumerate((BATCH, BATCH, 3)):  # the last one is not the shape that was compiled
        torch.testing.assert_close(stepped(program, number, size), stepped(plain, number, size), rtol=1e-10, atol=1e-12)
        for (name, p), q in zip(program.model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        for p, q in zip(program.kept.parameters(), plain.kept.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


def test_only_the_first_shapes_are_compiled():
    seen = []

    def backend(graph, example):
        seen.append(tuple(example[0].shape))
        return graph.forward

    double = Compiled(lambda x: 2 * x, notice=silence, backend=backend)
    for size in (4, 4, 3, 4, 5):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert seen == [(4,)]


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once():
    def backend(graph, example):
        raise RuntimeError("no compiler here\nand more")

    said = []
    player, plain = begun(make_defence()), begun(make_defence())
    player.compile(notice=said.append, backend=backend)
    for number in range(2):
        torch.testing.assert_close(stepped(player, number), stepped(plain, number), rtol=1e-10, atol=1e-12)
    assert len(said) == 1 and "no compiler here" in said[0] and "and more" not in said[0]

    def wrong(x):
        raise ValueError("the function's own error")

    with pytest.raises(ValueError, match="own error"):
        Compiled(wrong, notice=silence, backend="eager")(torch.ones(2))


def test_the_undefended_client_compiles_and_so_does_one_with_encoded_batches():
    model = SplitModel(filled(Backbone(), 0), cut="front", image_shape=SHAPE, num_classes=CLASSES).double()
    plain, program = Defence(model).player(), EncodedPlayer(Defence(model).player(), lambda images, labels, **_: (images, labels))
    program.compile(notice=silence, backend="aot_eager")
    program.begin(make_client(), seed=0, round=0, progress=0.0, first=True)
    torch.testing.assert_close(stepped(program, 0), stepped(plain, 0), rtol=1e-12, atol=0)
    for p, q in zip(program.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("game", GAMES)
def test_a_step_of_cuda_graphs_has_the_gradients_of_the_step_as_it_is(game):
    plain, program = (begun(make_defence(**GAMES[game]), device="cuda") for _ in range(2))
    program.compile(notice=silence, graphs=True)
    for number, size in enumerate((BATCH, BATCH, 3, BATCH)):
        torch.testing.assert_close(stepped(program, number, size), stepped(plain, number, size), rtol=1e-10, atol=1e-12)
        for (name, p), q in zip(program.model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        for p, q in zip(program.kept.parameters(), plain.kept.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)
        with torch.no_grad():  # what a round does between batches: weights change in place
            for one in (program, plain):
                for p in one.model.parameters():
                    p.mul_(0.9)


@pytest.mark.slow
@pytest.mark.parametrize("game", ["shared", "alternating"])
def test_the_real_compiler_gives_the_same_step(game):
    plain, program = begun(make_defence(torch.float32, **GAMES[game])), begun(make_defence(torch.float32, **GAMES[game]))
    program.compile(notice=silence)
    for number in range(2):
        torch.testing.assert_close(stepped(program, number), stepped(plain, number), rtol=1e-5, atol=1e-6)
        for p, q in zip(program.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("way", ["fused", "channels_last"])
@pytest.mark.parametrize("game", ["shared", "alternating"])
def test_fused_optimisers_and_channels_last_end_where_the_default_ends(way, optimiser, game):
    defence, deltas = make_defence(torch.float32, **GAMES[game]), []
    for changes in ({}, {way: True}):
        player = begun(defence)
        if changes.get("channels_last"):
            player.model.to(memory_format=torch.channels_last)
        settings = LocalSettings(batch_size=4, epochs=2, optimiser=optimiser, lr=0.01, momentum=0.9 * (optimiser == "sgd"), weight_decay=0.01, **changes)
        result = train_locally(player, defence.initial_model(), make_client(), settings, seed=1, round=2)
        if changes.get("channels_last"):
            assert player.model.get_parameter("backbone.back.0.weight").is_contiguous(memory_format=torch.channels_last)
        assert all(step.is_contiguous() for step in result.delta.values())
        deltas.append(torch.cat([step.flatten() for step in result.delta.values()]))
    assert (deltas[0] - deltas[1]).norm() < 1e-3 * deltas[0].norm()


@pytest.mark.parametrize("game", ["shared", "alternating"])
def test_a_fused_step_of_the_decoder_ends_where_the_default_ends(game):
    plain, fused = begun(make_defence(**GAMES[game])), make_defence(**GAMES[game]).player()
    fused.fuse()
    fused.begin(make_client(), seed=7, round=2, progress=0.5, first=False)
    for number in range(3):
        stepped(plain, number), stepped(fused, number)
    for p, q in zip(fused.kept.parameters(), plain.kept.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(("schedule", "fused", "kinds"), [
    ("alternating", False, ["foreach", "foreach"]), ("alternating", True, ["fused", "fused"]), ("simultaneous", False, ["foreach", "fused"]),
])  # fmt: skip
def test_the_setting_reaches_the_optimisers_of_clients_and_of_their_decoders(schedule, fused, kinds, encoded, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, speed=dataclasses.replace(RECIPE.speed, fused_optimisers=fused))
    game = LearnedPerturbation(schedule=schedule)
    setting = start(recipe, tmp_path).setting
    training = build.make_training(setting, (game, MixUp()) if encoded else game, seed=0, world=World(), state_folder=tmp_path)
    made, adam = [], torch.optim.Adam

    def spied(parameters, **options):
        parameters = list(parameters)
        decoder = {id(p) for p in training.participation.players[0].kept.parameters()}
        made.append(("decoder" if id(parameters[0]) in decoder else "client", [name for name in ("foreach", "fused") if options.get(name)]))
        return adam(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", spied)
    training.participation.train(training.server, setting.clients[0])
    assert dict(made) == {"client": kinds[:1], "decoder": kinds[1:]}
