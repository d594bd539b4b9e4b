"""A client's part in a round: what it sends, what it keeps, and SCAFFOLD. All images are synthetic."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gidef.clients.cohort import draw_cohort
from gidef.clients.evaluate import CHUNK, num_chunks, predict_chunk
from gidef.clients.local import LocalSettings, load_parameters
from gidef.clients.participate import Participation, shared_names
from gidef.clients.store import ClientStore
from gidef.rounds.algorithm import federate, run_round
from gidef.rounds.server import fed_avg, scaffold
from gidef.types import Client, ServerState
from gidef.updates import mean_over

CLASSES = 3
FRONT, HEAD, DECODER = ("front.weight",), ("head.weight", "head.bias"), ("decoder.weight", "decoder.bias")
POLICIES = {"full": (FRONT + HEAD, DECODER), "head": (HEAD, FRONT + DECODER), "all": (FRONT + HEAD + DECODER, ())}
SGD = LocalSettings(batch_size=4, optimiser="sgd", lr=0.1, grad_clip=0.0)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_client(number, examples=10):
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(256, (examples, 1, 3, 3), generator=draw, dtype=torch.uint8)
    return Client(number, images, torch.randint(CLASSES, (examples,), generator=draw))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.head = nn.Linear(9, 5, bias=False), nn.Linear(5, CLASSES)

    def forward(self, images):
        return self.head(self.front(images.flatten(1).to(self.front.weight.dtype)).tanh())


class Learner:
    """Cross-entropy, beside a linear decoder of the front's output; remembers what it began with and was given."""

    def __init__(self, dtype=torch.float64, decoder=True):
        self.model, self.kept = Net().to(dtype), nn.Linear(5, 9).to(dtype) if decoder else None
        self.begun, self.batches = [], []

    def begin(self, client, *, seed, round, progress, first):
        decoder = {f"decoder.{name}": p.detach().clone() for name, p in self.kept.named_parameters()} if self.kept else {}
        self.begun.append({"client": client.id, "round": round, "progress": progress, "first": first, "decoder": decoder})

    def loss(self, images, labels, *, rows, epoch):
        if self.begun and "model" not in self.begun[-1]:
            self.begun[-1]["model"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.batches.append((self.begun[-1]["client"], self.begun[-1]["round"], rows))
        if self.kept is not None:
            flat = images.flatten(1).to(self.kept.weight.dtype)
            self.kept.zero_grad()
            (self.kept(self.model.front(flat).detach()) - flat).square().mean().backward()
            with torch.no_grad():
                for p in self.kept.parameters():
                    p -= 0.1 * p.grad
            self.kept.zero_grad()
        return F.cross_entropy(self.model(images), labels)


def initial(dtype=torch.float64, decoder=True):
    draw, player = torch.Generator().manual_seed(0), Learner(dtype, decoder)
    tensors = dict(player.model.named_parameters())
    tensors |= {f"decoder.{name}": p for name, p in player.kept.named_parameters()} if decoder else {}
    return {name: torch.randn(p.shape, generator=draw, dtype=dtype) for name, p in tensors.items()}


def participation(folder, policy="full", settings=SGD, *, workers=1, dtype=torch.float64, decoder=True, **options):
    start = initial(dtype, decoder)
    shared = shared_names(start, HEAD, policy)
    players = [Learner(dtype, decoder) for _ in range(workers)]
    part = Participation(players, start, shared, settings, ClientStore(folder, memory=2), **{"seed": 3, "rounds": 10} | options)
    return part, ServerState({name: start[name] for name in shared})


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_sends_its_names_and_the_client_keeps_the_rest(policy, tmp_path):
    sent, kept = POLICIES[policy]
    part, server = participation(tmp_path, policy)
    before = {name: tensor.clone() for name, tensor in server.params.items()}
    assert tuple(part.template()) == shared_names(initial(), HEAD, policy) and set(part.template()) == set(sent)
    update = part.train(server, make_client(4))
    assert set(update.delta) == set(sent) and update.num_examples == 10 and set(update.metrics) == {"loss"}
    assert all(delta.count_nonzero() for delta in update.delta.values())
    part.versions[4] = 0
    stored = part._store.get(4, 0) if kept else None
    assert (set(stored) if stored else set()) == set(kept) == set(part.state(4))
    assert all(not torch.equal(tensor, initial()[name]) for name, tensor in part.state(4).items())
    assert len(list(tmp_path.iterdir())) == bool(kept)
    assert all(torch.equal(server.params[name], before[name]) for name in sent)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_leaves_and_what_stays_together_are_the_trained_client(policy, tmp_path):
    part, server = participation(tmp_path, policy)
    update, player = part.train(server, make_client(4)), part.players[0]
    part.versions[4] = 0
    after = {name: server.params[name] + delta for name, delta in update.delta.items()} | part.state(4)
    trained = dict(player.model.named_parameters()) | {f"decoder.{name}": p for name, p in player.kept.named_parameters()}
    assert after.keys() == trained.keys()
    for name in after:
        torch.testing.assert_close(after[name], trained[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["full", "head"])
def test_a_client_goes_on_from_what_it_kept_and_from_the_server_s_weights(policy, tmp_path):
    part, server = participation(tmp_path, policy)
    for number in (0, 1):
        part.train(ServerState(server.params, round=number), make_client(4 + number))
        part.versions[4 + number] = number
    kept = part.state(4)
    moved = ServerState({name: tensor + 1 for name, tensor in server.params.items()}, round=6)
    part.train(moved, make_client(4))
    began = part.players[0].begun[-1]
    for name, tensor in (began["decoder"] | began["model"]).items():
        assert torch.equal(tensor, kept[name] if name in kept else moved.params[name]), name
    assert any(not torch.equal(kept[name], initial()[name]) for name in kept)
    told = [(b["client"], b["round"], b["first"], b["progress"]) for b in part.players[0].begun]
    assert told == [(4, 0, True, 0.0), (5, 1, True, 0.1), (4, 6, False, 0.6)]


@pytest.mark.parametrize("policy", POLICIES)
def test_updates_and_kept_state_do_not_depend_on_the_worker(policy, tmp_path):
    settings = LocalSettings(batch_size=4, optimiser="adam", epochs=2)
    outcomes = []
    for name, workers in (("one", (0, 0, 0, 0)), ("many", (1, 0, 2, 1))):
        part, server = participation(tmp_path / name, policy, settings, workers=3, dtype=torch.float32)
        updates = []
        for number, (client, worker) in enumerate(zip((0, 1, 0, 1), workers, strict=True)):
            updates.append(part.train(ServerState(server.params, round=number), make_client(client), worker))
            part.versions[client] = number
        outcomes.append((updates, [part.state(0), part.state(1)]))
    (one, kept_one), (many, kept_many) = outcomes
    for left, right in zip(one, many, strict=True):
        assert left.metrics == right.metrics
        assert all(torch.equal(left.delta[name], right.delta[name]) for name in left.delta)
    for left, right in zip(kept_one, kept_many, strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_workers_train_at_the_same_time_with_the_bits_of_one_after_another(tmp_path):
    settings = LocalSettings(batch_size=2, optimiser="adam", epochs=5)
    alone, server = participation(tmp_path / "a", "head", settings, dtype=torch.float32)
    together, _ = participation(tmp_path / "b", "head", settings, workers=3, dtype=torch.float32)
    expected = [alone.train(server, make_client(k, 30)).delta for k in range(3)]
    found, gate = {}, threading.Barrier(3)

    def work(k):
        gate.wait()
        found[k] = together.train(server, make_client(k, 30), worker=k).delta

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        assert all(torch.equal(found[k][name], expected[k][name]) for name in expected[k])


def test_clients_that_are_not_drawn_keep_nothing(tmp_path):
    part, server = participation(tmp_path, "head", rounds=2)
    clients = [make_client(k) for k in range(5)]
    cohorts = [[0, 3], [3]]

    def run(server, cohort):
        def over(shared_update, chosen):
            return mean_over(shared_update, chosen, template=part.template(), metric_names=("loss",))

        return run_round(server, cohort, train=part.train, step=fed_avg(), over_cohort=over)

    for number, _, cohort, _ in federate(server, clients, rounds=2, draw=cohorts.__getitem__, run=run):
        part.versions |= dict.fromkeys(cohort, number)
    assert sorted(path.name[:12] for path in tmp_path.iterdir()) == ["client-00000", "client-00003", "client-00003"]
    for k in (1, 2, 4):
        assert part._store.get(k, None) is None
        assert all(torch.equal(tensor, initial()[name]) for name, tensor in part.state(k).items())
    assert part.versions == {0: 0, 3: 1}


@pytest.mark.parametrize("policy", ["full", "head"])
def test_one_sgd_step_sends_minus_lr_times_the_gradient(policy, tmp_path):
    settings = LocalSettings(batch_size=4, optimiser="sgd", lr=0.3, grad_clip=0.0, epochs=7, steps=1)
    part, server = participation(tmp_path, policy, settings)
    client = make_client(2)
    update, player = part.train(server, client), part.players[0]
    [(_, _, rows)] = player.batches
    net = Net().double()
    load_parameters(net, {name: tensor for name, tensor in initial().items() if "decoder" not in name})
    F.cross_entropy(net((client.images[rows] / 255).double()), client.labels[rows]).backward()
    for name in update.delta:
        torch.testing.assert_close(update.delta[name], -0.3 * net.get_parameter(name).grad, rtol=1e-12, atol=1e-14)


# --- SCAFFOLD --------------------------------------------------------------------------------------------------------


def rounds_of(part, server, clients, cohorts, step):
    for number, cohort in enumerate(cohorts):
        mean = mean_over(
            lambda client, worker, at=server: part.train(at, client, worker), [clients[k] for k in cohort],
            template=part.template(), metric_names=("loss",),
        )  # fmt: skip
        server = step(server, mean.delta)
        part.versions |= dict.fromkeys(cohort, number)
    return server


def published_scaffold(clients, cohorts, batches, *, lr, server_lr):
    """Karimireddy et al. 2020, algorithm 1, option II, on the batches that were recorded; returns x and c."""
    net = Net().double()
    names = [name for name, _ in net.named_parameters()]
    x = {name: initial()[name] for name in names}
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    own = {k: dict(c) for k in range(len(clients))}
    for number, cohort in enumerate(cohorts):
        moves, drifts = [], []
        for k in cohort:
            y, client = dict(x), clients[k]
            mine = [rows for owner, at, rows in batches if (owner, at) == (client.id, number)]
            for rows in mine:
                load_parameters(net, y)
                net.zero_grad()
                F.cross_entropy(net((client.images[rows] / 255).double()), client.labels[rows]).backward()
                y = {name: y[name] - lr * (net.get_parameter(name).grad - own[k][name] + c[name]) for name in names}
            new = {name: own[k][name] - c[name] + (x[name] - y[name]) / (len(mine) * lr) for name in names}
            moves.append({name: y[name] - x[name] for name in names})
            drifts.append({name: new[name] - own[k][name] for name in names})
            own[k] = new
        x = {name: x[name] + server_lr / len(cohort) * sum(move[name] for move in moves) for name in names}
        c = {name: c[name] + sum(drift[name] for drift in drifts) / len(clients) for name in names}
    return x, c


def test_scaffold_equals_the_published_algorithm(tmp_path):
    clients, cohorts = [make_client(k, examples) for k, examples in enumerate((10, 22, 7))], [[0, 1], [1, 2], [0, 2]]
    settings = LocalSettings(batch_size=4, optimiser="sgd", lr=0.2, grad_clip=0.0, epochs=2)
    part, server = participation(tmp_path, "full", settings, decoder=False, scaffold=True)
    server = rounds_of(part, server, clients, cohorts, scaffold(lr=0.7, participation=2 / 3))
    x, c = published_scaffold(clients, cohorts, part.players[0].batches, lr=0.2, server_lr=0.7)
    for name in x:  # the mean is in fixed point, 2^-33
        torch.testing.assert_close(server.params[name], x[name], rtol=0, atol=1e-8)
        torch.testing.assert_close(server.slots["control"][name], c[name], rtol=0, atol=1e-8)
        assert c[name].abs().max() > 1e-3


def test_scaffold_with_one_client_is_plain_sgd(tmp_path):
    clients, cohorts = [make_client(0, 22)], [[0]] * 3
    plain, server = participation(tmp_path / "plain", "full", decoder=False)
    expected = rounds_of(plain, server, clients, cohorts, fed_avg())
    part, server = participation(tmp_path / "scaffold", "full", decoder=False, scaffold=True)
    found = rounds_of(part, server, clients, cohorts, scaffold(participation=1.0))
    for name in expected.params:
        torch.testing.assert_close(found.params[name], expected.params[name], rtol=0, atol=1e-7)
        assert (found.params[name] - initial()[name]).abs().max() > 1e-2


@pytest.mark.parametrize("policy", ["full", "head"])
def test_scaffold_corrects_shared_weights_only_and_its_control_is_no_part_of_the_kept_model(policy, tmp_path):
    sent, kept = POLICIES[policy]
    part, server = participation(tmp_path, policy, scaffold=True)
    server = rounds_of(part, server, [make_client(k) for k in range(2)], [[0, 1], [0]], scaffold(participation=0.5))
    assert set(part.template()) == set(sent) | {f"control/{name}" for name in sent}
    assert set(part._store.get(0, 1)) == set(kept) | {f"control/{name}" for name in sent}
    assert part.state(0).keys() == part.state(5).keys() == set(kept)
    correction, _ = part._correction(server, part._kept(0))
    for name in FRONT + HEAD:
        assert bool(correction(name).count_nonzero()) == (name in sent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", POLICIES)
def test_on_a_gpu_what_comes_back_from_the_store_meets_the_server_s_weights(policy, tmp_path):
    part, server = participation(tmp_path, policy, scaffold=True)
    part._initial = {name: tensor.cuda() for name, tensor in part._initial.items()}
    for player in part.players:
        player.model.cuda(), player.kept.cuda()
    server = ServerState({name: tensor.cuda() for name, tensor in server.params.items()})
    server = rounds_of(part, server, [make_client(k) for k in range(2)], [[0, 1], [0], [1]], scaffold(participation=0.5))
    assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in (*server.params.values(), *server.slots["control"].values()))


# --- cohorts and predictions -----------------------------------------------------------------------------------------


def test_a_cohort_is_drawn_without_replacement_from_seed_and_round_alone():
    drawn = [draw_cohort(num_clients=20, size=7, seed=1, round=number) for number in range(30)]
    assert all(cohort == sorted(set(cohort)) and len(cohort) == 7 and cohort[0] >= 0 and cohort[-1] < 20 for cohort in drawn)
    assert drawn == [draw_cohort(num_clients=20, size=7, seed=1, round=number) for number in range(30)]
    assert len(set(map(tuple, drawn))) == 30 and set(sum(drawn, [])) == set(range(20))
    assert drawn[0] != draw_cohort(num_clients=20, size=7, seed=2, round=0)
    assert draw_cohort(num_clients=4, size=4, seed=0, round=0) == [0, 1, 2, 3]
    for size in (0, 5):
        with pytest.raises(ValueError, match=rf"{size} is not in \[1, 4\]"):
            draw_cohort(num_clients=4, size=size, seed=0, round=0)


def test_predictions_of_the_chunks_are_those_of_the_whole_split():
    net, images = Net(), make_client(0, CHUNK + 3).images
    assert num_chunks(images) == 2 and num_chunks(images[:CHUNK]) == 1 and num_chunks(images[:0]) == 0
    parts = [predict_chunk(net, images, chunk, lambda count, chunk: None) for chunk in range(2)]
    torch.testing.assert_close(torch.cat(parts), net(images / 255).detach())
    assert not parts[0].requires_grad

    class Noisy(Net):
        def forward(self, images, noise):
            return super().forward(images) + noise

    asked = []
    noisy = predict_chunk(Noisy(), images, 1, lambda count, chunk: asked.append((count, chunk)) or torch.full((count, CLASSES), 1e3))
    assert asked == [(3, 1)] and noisy.min() > 900
