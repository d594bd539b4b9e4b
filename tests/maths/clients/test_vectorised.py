"""K clients as one program against each of them alone. All images are synthetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from gidef.clients.local import LocalSettings, train_locally
from gidef.clients.recorded import Recorder
from gidef.clients.vectorised import cut_into_groups, train_together
from gidef.errors import Diverged
from gidef.rng import generator
from gidef.types import Client

CLASSES, SIZES = 3, (7, 22, 1, 13, 22)
FIRST = (True, False, True, False, True)
SGD = {"optimiser": "sgd", "lr": 0.1, "batch_size": 4, "grad_clip": 0.0}
CASES = {
    "sgd": SGD,
    "momentum": SGD | {"momentum": 0.9, "epochs": 2},
    "adam": SGD | {"optimiser": "adam", "lr": 0.01, "epochs": 3},
    "weight decay": SGD | {"weight_decay": 0.2, "momentum": 0.5},
    "adam with weight decay": SGD | {"optimiser": "adam", "weight_decay": 0.2},
    "clipping": SGD | {"grad_clip": 0.3, "epochs": 2},
    "accumulation with a rest in each epoch": SGD | {"accumulate": 4, "epochs": 3, "momentum": 0.5},
    "accumulation with adam": SGD | {"optimiser": "adam", "accumulate": 2, "epochs": 3},
    "fedprox is not clipped": SGD | {"proximal": 5.0, "grad_clip": 0.1, "epochs": 2},
    "one step": SGD | {"steps": 1, "epochs": 1},
    "some steps": SGD | {"steps": 4, "accumulate": 2, "epochs": 5},
    "one batch": SGD | {"batch_size": 100, "epochs": 2},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_client(number, examples):
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(256, (examples, 2, 4, 4), generator=draw, dtype=torch.uint8)
    return Client(number, images, torch.randint(CLASSES, (examples,), generator=draw))


class Game:
    """A noisy net beside a linear decoder that steps first, as a player and as functions. One parameter is frozen, one is not used."""

    kept_lr = 0.01

    def __init__(self, decoder=True):
        self.model = nn.ModuleDict({"front": nn.Linear(32, 6), "head": nn.Linear(6, CLASSES), "idle": nn.Linear(2, 2)}).double()
        self.model["front"].bias.requires_grad_(False)
        self.kept = nn.Linear(6, 32).double() if decoder else None

    def run(self, params, images, noise):
        front, head = ({n: params[f"{part}.{n}"] for n in ("weight", "bias")} for part in ("front", "head"))
        latent = functional_call(self.model["front"], front, (images.flatten(1).double(),)).tanh() + noise
        return functional_call(self.model["head"], head, (latent,)), latent

    def decode(self, kept, latent, images):
        return (functional_call(self.kept, kept, (latent,)) - images.flatten(1)).square().mean(1)

    # as a player
    def begin(self, client, *, seed, round, progress, first):
        self.draw, self.is_new = generator(seed, "noise", round, client.id), first
        if self.kept is not None:
            self.adam = torch.optim.Adam(self.kept.parameters(), lr=self.kept_lr)

    def loss(self, images, labels, *, rows, epoch):
        noise = torch.randn(len(rows), 6, generator=self.draw, dtype=torch.float64)
        logits, latent = self.run(dict(self.model.named_parameters()), images, noise)
        loss = F.cross_entropy(logits, labels)
        if self.kept is None:
            return loss
        for _ in range(3 if self.is_new and epoch == 0 else 1):
            self.adam.zero_grad()
            self.decode(dict(self.kept.named_parameters()), latent.detach(), images).mean().backward()
            self.adam.step()
        return loss - 0.5 * self.decode({n: p.detach() for n, p in self.kept.named_parameters()}, latent, images).mean()

    def stacked(self):
        return StackedGame(self)


class StackedGame:
    steady = True

    def __init__(self, game):
        self.game, self.model, self.kept, self.kept_lr = game, game.model, game.kept, game.kept_lr

    def begin(self, clients, *, seed, round, progress, first):
        self.draws, self.first = [generator(seed, "noise", round, client.id) for client in clients], first

    def noise(self, place, rows):
        return torch.randn(len(rows), 6, generator=self.draws[place], dtype=torch.float64)

    def kept_steps(self, place, epoch):
        return 3 if self.first[place] and epoch == 0 else 1

    def forward(self, params, images, noise):
        return self.game.run(params, images, noise)

    def kept_loss(self, kept, outputs, images, share):
        return (self.game.decode(kept, outputs[1], images) * share).sum()

    def loss(self, outputs, kept, images, labels, share):
        loss = (F.cross_entropy(outputs[0], labels, reduction="none") * share).sum()
        return loss - 0.5 * self.kept_loss(kept, outputs, images, share) if self.kept is not None else loss


def weights(module, seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw, dtype=p.dtype) for name, p in module.named_parameters()}


class Counting(Recorder):
    """What was asked for, and the recordings that were made."""

    def __init__(self):
        super().__init__()
        self.asked, self.given = 0, []

    def get(self, *args):
        self.asked += 1
        self.given.append(super().get(*args))
        return self.given[-1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decoder", [False, True])
def test_every_client_ends_where_it_ends_alone(case, decoder):
    recorder = Counting()
    settings, game = LocalSettings(**CASES[case]), Game(decoder)
    clients = [make_client(10 + k, size) for k, size in enumerate(SIZES)]
    starts, kept = [weights(game.model, k) for k in range(5)], [weights(game.kept, 50 + k) if decoder else {} for k in range(5)]
    shifts = [weights(game.model, 90 + k) for k in range(5)] if case == "momentum" else None
    before = {name: tensor.clone() for name, tensor in starts[1].items()}
    found = train_together(
        game.stacked(), starts, kept, clients, settings, seed=1, round=2, progress=0.5, first=FIRST,
        corrections=[shift.__getitem__ for shift in shifts] if shifts else None, recorder=recorder,
    )  # fmt: skip
    # between a decoder's steps there is nothing to record, and a batch of 100 is never full
    assert (recorder.asked > 0) == (not decoder and settings.batch_size == 4) and None not in recorder.given and len(set(recorder.given)) <= 1
    for k, client in enumerate(clients):
        if decoder:
            with torch.no_grad():
                for name, p in game.kept.named_parameters():
                    p.copy_(kept[k][name])
        game.begin(client, seed=1, round=2, progress=0.5, first=FIRST[k])
        alone = train_locally(game, starts[k], client, settings, seed=1, round=2, correction=shifts[k].__getitem__ if shifts else None)
        result, end = found[k]
        assert result.steps == alone.steps and result.loss == pytest.approx(alone.loss, rel=1e-9)
        for name in starts[k]:
            torch.testing.assert_close(result.delta[name], alone.delta[name], rtol=1e-7, atol=1e-10)
        for name, p in game.kept.named_parameters() if decoder else ():
            torch.testing.assert_close(end[name], p.detach(), rtol=1e-7, atol=1e-10)
            assert not torch.equal(end[name], kept[k][name])
    assert all(torch.equal(starts[1][name], before[name]) for name in before)


def test_a_client_s_bits_are_those_of_its_group_whatever_ran_before():
    settings, clients = LocalSettings(**SGD | {"epochs": 2}), [make_client(10 + k, size) for k, size in enumerate(SIZES)]

    def deltas(game):
        starts, kept = [weights(game.model, k) for k in range(5)], [weights(game.kept, k) for k in range(5)]
        return train_together(game.stacked(), starts, kept, clients, settings, seed=1, round=0, progress=0.0, first=FIRST)

    fresh, used = Game(), Game()
    deltas(used)
    for (one, _), (other, _) in zip(deltas(fresh), deltas(used), strict=True):
        assert all(torch.equal(one.delta[name], other.delta[name]) for name in one.delta)


def test_steps_are_recorded_once_per_shape_where_the_game_is_steady():
    class Moving(StackedGame):
        steady = False

    settings, clients = LocalSettings(**SGD | {"epochs": 2}), [make_client(10 + k, 8) for k in range(3)]
    game, recorder = Game(decoder=False), Counting()

    def deltas(stacked, recorder, seed=1):
        found = train_together(stacked, [weights(game.model, 5)] * 3, [{}] * 3, clients, settings, seed=seed, round=0, progress=0.0, first=(True,) * 3, recorder=recorder)
        return [result.delta for result, _ in found]

    plain, moving = deltas(game.stacked(), None), Counting()
    recorded = deltas(game.stacked(), recorder)
    deltas(game.stacked(), recorder, seed=2)
    assert recorder.asked == 8 and len(set(recorder.given)) == 1 and None not in recorder.given
    for one, other in zip(recorded, plain, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(deltas(game.stacked(), recorder), recorded, strict=True) for name in one)
    deltas(Moving(game), moving)
    assert moving.asked == 0


def test_what_cannot_be_recorded_trains_as_it_is():
    class Refused(StackedGame):
        def loss(self, outputs, kept, images, labels, share):
            if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
                raise NotImplementedError("not in a graph")
            return super().loss(outputs, kept, images, labels, share)

    settings, clients, game, recorder = LocalSettings(**SGD), [make_client(10 + k, 8) for k in range(3)], Game(decoder=False), Counting()
    options = {"seed": 1, "round": 0, "progress": 0.0, "first": (True,) * 3}
    found = train_together(Refused(game), [weights(game.model, 5)] * 3, [{}] * 3, clients, settings, **options, recorder=recorder)
    plain = train_together(game.stacked(), [weights(game.model, 5)] * 3, [{}] * 3, clients, settings, **options)
    assert recorder.given == [None, None]
    assert all(torch.equal(one.delta[name], other.delta[name]) for (one, _), (other, _) in zip(found, plain, strict=True) for name in one.delta)


def test_a_client_that_diverges_is_named():
    class Growing(StackedGame):
        def loss(self, outputs, kept, images, labels, share):
            return outputs[0].square().sum() * images.mean()

    clients = [make_client(3, 8), make_client(4, 22)]
    clients[0].images.zero_()  # its loss is 0
    game, settings = Game(decoder=False), LocalSettings(**SGD | {"lr": 1e9, "epochs": 20})
    with pytest.raises(Diverged, match=r"client 4's loss is (inf|nan) in round 3: training diverged\. Lower clients\.lr"):
        train_together(Growing(game), [weights(game.model, 0)] * 2, [{}] * 2, clients, settings, seed=0, round=3, progress=0.0, first=(True, True))


@pytest.mark.parametrize(("count", "at_once", "sizes"), [(9, 4, [3, 3, 3]), (10, 8, [5, 5]), (9, 2, [2, 2, 2, 2, 1]), (3, 8, [3]), (4, 1, [1] * 4)])
def test_groups_hold_everyone_once_the_costliest_together(count, at_once, sizes):
    costs = [(7 * k) % 5 for k in range(count)]
    groups = cut_into_groups(costs, at_once)
    assert sorted(place for group in groups for place in group) == list(range(count))
    assert [len(group) for group in groups] == sizes
    flat = [costs[place] for group in groups for place in group]
    assert flat == sorted(flat, reverse=True)
