"""Local training against plain loops. All images are synthetic."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gidef.clients.local import LocalSettings, batches, load_parameters, train_locally
from gidef.errors import Diverged
from gidef.types import Client

CLASSES = 3


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_client(number=4, examples=22):
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(256, (examples, 2, 4, 4), generator=draw, dtype=torch.uint8)
    return Client(number, images, torch.randint(CLASSES, (examples,), generator=draw))


def make_net(dtype=torch.float64):
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)


def weights(net, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw, dtype=p.dtype) for name, p in net.named_parameters()}


class Learner:
    """Cross-entropy in the dtype of its weights; remembers the batches that it was given."""

    kept = None

    def __init__(self, model=None):
        self.model, self.seen = model or make_net(), []

    def begin(self, client, *, seed, round, progress, first):
        pass

    def loss(self, images, labels, *, rows, epoch):
        self.seen.append((epoch, rows))
        return F.cross_entropy(self.model(images.to(next(self.model.parameters()).dtype)), labels)


def plain_loop(start, client, seen, settings, shift=None):
    """Delta, steps and mean loss of the same batches, as one would write it down."""
    net = make_net()
    load_parameters(net, start)
    names, parameters = zip(*net.named_parameters(), strict=True)
    if settings.optimiser == "adam":
        optimiser = torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay, foreach=False)
    else:
        optimiser = torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=False)
    groups = []
    for epoch in range(settings.epochs):
        rows = [r for e, r in seen if e == epoch]
        groups += [rows[first : first + settings.accumulate] for first in range(0, len(rows), settings.accumulate)]
    losses = []
    for group in groups:
        each = [F.cross_entropy(net((client.images[rows] / 255).double()), client.labels[rows]) for rows in group]
        losses += [loss.detach() for loss in each]
        gradients = torch.autograd.grad(sum(each) / len(each), parameters)
        length = sum(g.square().sum() for g in gradients).sqrt()
        if settings.grad_clip and length > settings.grad_clip:
            gradients = [g * settings.grad_clip / (length + 1e-6) for g in gradients]
        for name, p, g in zip(names, parameters, gradients, strict=True):
            p.grad = g + settings.proximal * (p.detach() - start[name]) + (shift[name] if shift else 0)
        optimiser.step()
    delta = {name: p.detach() - start[name] for name, p in zip(names, parameters, strict=True)}
    return delta, len(groups), float(sum(losses) / len(losses))


SGD = {"optimiser": "sgd", "lr": 0.1, "batch_size": 4, "grad_clip": 0.0}
CASES = {  # 22 examples: five batches of 4 and one of 2 an epoch
    "sgd": SGD,
    "momentum": SGD | {"momentum": 0.9, "epochs": 2},
    "adam": SGD | {"optimiser": "adam", "lr": 0.01, "epochs": 3},
    "sgd with weight decay": SGD | {"weight_decay": 0.2, "momentum": 0.5},
    "adam with weight decay": SGD | {"optimiser": "adam", "weight_decay": 0.2},
    "clipping": SGD | {"grad_clip": 0.3, "epochs": 2},
    "accumulation that divides an epoch": SGD | {"accumulate": 3, "epochs": 2},
    "accumulation with a rest in each epoch": SGD | {"accumulate": 4, "epochs": 3},
    "accumulation beyond an epoch": SGD | {"accumulate": 50, "epochs": 2},
    "clipping of the average": SGD | {"accumulate": 4, "grad_clip": 0.3},
    "fedprox": SGD | {"proximal": 0.7, "epochs": 2},
    "fedprox is not clipped": SGD | {"proximal": 5.0, "grad_clip": 0.1, "epochs": 2},
    "one batch": SGD | {"batch_size": 100, "epochs": 4},
    "everything": SGD | {"momentum": 0.9, "weight_decay": 0.1, "grad_clip": 0.5, "accumulate": 4, "proximal": 0.3, "epochs": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_local_training_equals_a_plain_loop(case):
    settings, client, player = LocalSettings(**CASES[case]), make_client(), Learner()
    start = weights(player.model)
    before = {name: tensor.clone() for name, tensor in start.items()}
    result = train_locally(player, start, client, settings, seed=1, round=2)
    delta, steps, loss = plain_loop(before, client, player.seen, settings)
    assert len(player.seen) == settings.epochs * -(-22 // settings.batch_size)
    assert (result.steps, set(result.delta)) == (steps, set(start))
    assert result.loss == pytest.approx(loss, rel=1e-12)
    for name in start:
        torch.testing.assert_close(result.delta[name], delta[name], rtol=1e-9, atol=1e-12)
        assert result.delta[name].abs().max() > 0
        assert torch.equal(start[name], before[name])
        torch.testing.assert_close(dict(player.model.named_parameters())[name].detach(), start[name] + result.delta[name])


@pytest.mark.parametrize(
    ("steps", "accumulate", "batches_used"),
    [(1, 1, 1), (4, 1, 4), (8, 1, 8), (1, 4, 4), (2, 4, 6), (3, 4, 10), (100, 4, 18)],  # with 4: a group of 4, then an epoch's rest of 2
)
def test_training_stops_after_so_many_steps_wherever_it_stands(steps, accumulate, batches_used):
    settings, client, player = LocalSettings(**SGD | {"epochs": 3, "accumulate": accumulate, "steps": steps}), make_client(), Learner()
    start = weights(player.model)
    result = train_locally(player, start, client, settings, seed=1, round=0)
    delta, taken, loss = plain_loop(start, client, player.seen, settings)
    assert (len(player.seen), result.steps) == (batches_used, min(steps, 6 if accumulate == 4 else 18))
    assert taken == result.steps and result.loss == pytest.approx(loss)
    for name in start:
        torch.testing.assert_close(result.delta[name], delta[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"grad_clip": 0.3, "epochs": 2}])
def test_plain_sgd_has_the_bits_of_pytorch_s_optimiser_and_clip(more):
    settings, client, player = LocalSettings(**SGD | {"epochs": 2} | more), make_client(), Learner(make_net(torch.float32))
    start = weights(player.model)
    found = train_locally(player, start, client, settings, seed=1, round=2).delta
    net = make_net(torch.float32)
    load_parameters(net, start)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=True)
    for _, rows in player.seen:
        optimiser.zero_grad()
        F.cross_entropy(net(client.images[rows].float().div_(255)), client.labels[rows]).backward()
        if settings.grad_clip:
            assert nn.utils.clip_grad_norm_(net.parameters(), settings.grad_clip, foreach=True) > settings.grad_clip
        optimiser.step()
    assert all(torch.equal(found[name], p.detach() - start[name]) for name, p in net.named_parameters())


def test_a_correction_is_added_to_every_step_after_clipping():
    settings, client, player = LocalSettings(**SGD | {"grad_clip": 0.2, "epochs": 2}), make_client(), Learner()
    start, shift = weights(player.model), weights(player.model, seed=9)
    result = train_locally(player, start, client, settings, seed=1, round=2, correction=shift.__getitem__)
    delta, _, _ = plain_loop(start, client, player.seen, settings, shift)
    for name in start:
        torch.testing.assert_close(result.delta[name], delta[name], rtol=1e-9, atol=1e-12)


def test_a_result_has_the_same_bits_in_another_thread_and_on_a_player_that_trained_others():
    settings = LocalSettings(epochs=2, batch_size=4, optimiser="adam")
    start = weights(make_net(torch.float32))
    client, found = make_client(5), {}

    def fresh():
        found["fresh"] = train_locally(Learner(make_net(torch.float32)), start, client, settings, seed=3, round=7)

    def used():
        player = Learner(make_net(torch.float32))
        for other in (1, 2):
            train_locally(player, weights(player.model, seed=other), make_client(other, 30), settings, seed=3, round=6)
        found["used"] = train_locally(player, start, client, settings, seed=3, round=7)

    fresh()
    here = found.pop("fresh")
    threads = [threading.Thread(target=target) for target in (fresh, used)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for there in (found["fresh"], found["used"]):
        assert (there.steps, there.loss) == (here.steps, here.loss)
        assert all(torch.equal(there.delta[name], here.delta[name]) for name in start)


@pytest.mark.parametrize(("examples", "size"), [(22, 4), (20, 4), (3, 64), (1, 1)])
def test_batches_hold_every_example_once_an_epoch(examples, size):
    drawn = list(batches(make_client(examples=examples), batch_size=size, epochs=3, seed=0, round=0))
    assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)
    for epoch in range(3):
        rows = [r for e, r in drawn if e == epoch]
        assert sorted(torch.cat(rows).tolist()) == list(range(examples))
        assert all(len(r) == size for r in rows[:-1]) and 1 <= len(rows[-1]) <= size


def test_the_order_changes_with_epoch_round_client_and_seed_and_with_nothing_else():
    def order(number=0, **changed):
        drawn = batches(make_client(number, 30), **{"batch_size": 30, "epochs": 2, "seed": 0, "round": 0} | changed)
        return [rows.tolist() for _, rows in drawn]

    assert order() == order()
    assert order()[0] != order()[1]
    for other in (order(round=1), order(number=1), order(seed=1)):
        assert other[0] != order()[0]
    torch.rand(1)
    assert order() == order()


def test_a_loss_that_diverges_is_bad_input_that_names_the_client_and_the_cure():
    class Growing(Learner):
        def loss(self, images, labels, *, rows, epoch):
            return self.model[1](images.flatten(1).double()).square().mean()

    player = Growing()
    settings = LocalSettings(epochs=60, batch_size=4, optimiser="sgd", lr=1e3, grad_clip=0)
    with pytest.raises(Diverged, match=r"client 4's loss is (inf|nan) in round 3: training diverged\. Lower clients\.lr"):
        train_locally(player, weights(player.model), make_client(), settings, seed=0, round=3)


def test_bfloat16_computes_the_forward_pass_and_keeps_float32_parameters():
    seen = set()

    class Recorder(Learner):
        def loss(self, images, labels, *, rows, epoch):
            logits = self.model(images)
            seen.add(logits.dtype)
            return F.cross_entropy(logits, labels)

    start = weights(make_net(torch.float32))
    results = {}
    for precision in ("float32", "bfloat16"):
        player, settings = Recorder(make_net(torch.float32)), LocalSettings(**SGD | {"precision": precision})
        results[precision] = train_locally(player, start, make_client(), settings, seed=0, round=0).delta
        assert {p.dtype for p in player.model.parameters()} == {t.dtype for t in results[precision].values()} == {torch.float32}
    assert seen == {torch.float32, torch.bfloat16}
    for name in start:
        full, half = results["float32"][name], results["bfloat16"][name]
        assert not torch.equal(full, half)
        assert (full - half).norm() < 0.05 * full.norm()


def test_under_bfloat16_a_player_that_steps_inside_its_loss_meets_its_new_weights():
    # autocast's cache of rounded weights would hide them until the end of the batch
    class Inner(Learner):
        def __init__(self):
            super().__init__(make_net(torch.float32))
            self.kept = nn.Linear(32, 1)

        def loss(self, images, labels, *, rows, epoch):
            before = self.kept(images.flatten(1))
            with torch.no_grad():
                self.kept.bias += 1
            difference = self.kept(images.flatten(1)) - before
            torch.testing.assert_close(difference, torch.ones_like(difference), atol=0.1, rtol=0)
            return super().loss(images, labels, rows=rows, epoch=epoch)

    player = Inner()
    train_locally(player, weights(player.model), make_client(), LocalSettings(**SGD | {"precision": "bfloat16"}), seed=0, round=0)


def test_parameters_are_loaded_by_name_in_place_and_unknown_names_are_refused():
    net = make_net()
    tensors, place = {"3.bias": torch.ones(CLASSES, dtype=torch.float32)}, net[3].bias.data_ptr()
    weight = net[3].weight.detach().clone()
    load_parameters(net, tensors)
    assert net[3].bias.tolist() == [1.0] * CLASSES and net[3].bias.data_ptr() == place
    assert torch.equal(net[3].weight, weight)
    with pytest.raises(KeyError):
        load_parameters(net, {"4.bias": torch.ones(CLASSES)})


def test_weights_without_a_gradient_stay_where_they_are():
    class Half(Learner):
        def loss(self, images, labels, *, rows, epoch):
            return F.cross_entropy(self.model[3](self.model[1](images.flatten(1).double()).detach()), labels)

    player = Half()
    result = train_locally(player, weights(player.model), make_client(), LocalSettings(batch_size=4), seed=0, round=0)
    assert result.delta.keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert result.delta["1.weight"].count_nonzero() == 0 and result.delta["3.weight"].count_nonzero() > 0
