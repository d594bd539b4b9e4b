"""Restarts, variants, halving, patience and couplings: which starts run how long, and which one is chosen. Tiny nets, float64."""

import dataclasses
from collections import Counter

import pytest
import torch

from gidef.attack import Programs, drain, joint, naive, plan, run, run_chunk, select
from gidef.attack.batch import LOST
from gidef.errors import InputError

DOUBLE = {"seed": 3, "dtype": torch.float64}


@pytest.fixture
def case(tiny):
    model = tiny.Net(sigma=0.5)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    observations = [tiny.observe(simulate, params, size=2, seed=seed, noise=tiny.draw_noise(seed, 2))[0] for seed in range(3)]
    return observations, simulate, joint(noise_shape=(2, *tiny.latent), iterations=16, **tiny.settings)


def rows_of(case, chunk, settings, **options):
    observations, simulate, _ = case
    return drain(run_chunk(chunk, observations, simulate, settings, **DOUBLE, **options))


def every(settings, observations=3):
    return tuple((o, s) for o in range(observations) for s in range(settings.starts))


# --- halving ---------------------------------------------------------------------------------------------------------


def test_halving_stops_the_worse_starts_and_changes_nothing_for_the_ones_that_go_on(case):
    settings = dataclasses.replace(case[2], restarts=4, halving=2)
    full = rows_of(case, every(settings), dataclasses.replace(settings, halving=1))
    halved = rows_of(case, every(settings), settings)
    for observation in range(3):
        mine = slice(4 * observation, 4 * observation + 4)
        # rungs at 4 and 8 of 16 iterations: two starts stop at the first, one at the second
        assert sorted(halved["iterations"][mine].tolist()) == [4, 4, 8, 17]
        last = 4 * observation + int(halved["iterations"][mine].argmax())
        torch.testing.assert_close(halved["images"][last], full["images"][last], rtol=1e-5, atol=1e-6)
        at_the_rung = [float(full["losses"][row, :4].min()) for row in range(4 * observation, 4 * observation + 4)]
        gone = [row for row in range(4) if halved["iterations"][mine][row] == 4]
        assert max(sorted(at_the_rung)[:2]) <= min(at_the_rung[row] for row in gone)
    assert halved["losses"].isnan().any() and not full["losses"].isnan().any()


def test_halving_does_not_depend_on_how_many_attacks_run_at_once(case):
    settings = dataclasses.replace(case[2], restarts=4, halving=2)
    together = rows_of(case, every(settings), settings)
    for at_once, mode in ((3, "vmap"), (5, "traced")):
        in_turns = rows_of(case, every(settings), settings, at_once=at_once, mode=mode)
        assert torch.equal(together["iterations"], in_turns["iterations"])
        torch.testing.assert_close(together["images"], in_turns["images"], rtol=1e-5, atol=1e-6)


def test_a_failed_start_is_the_first_to_go(case, tiny):
    observations, simulate, settings = case

    def trapped(params, known, images, labels, noise):
        return {name: tensor + 0 * torch.log(1.0 - known["trap"] * images.max()) for name, tensor in simulate(params, {}, images, labels, noise).items()}

    observations = [dataclasses.replace(o, known={"trap": torch.tensor(0.0)}) for o in observations]

    def start(observation, restart):
        return torch.full((2, *tiny.shape), 0.2 + 0.2 * restart), None

    settings = dataclasses.replace(settings, restarts=4, halving=4, start=start)
    healthy = drain(run_chunk(((0, 0), (0, 1), (0, 2), (0, 3)), observations, trapped, settings, **DOUBLE))
    best = int(healthy["iterations"].argmax())
    trap = [dataclasses.replace(observations[0], known={"trap": torch.tensor(1 / (0.2 + 0.2 * best))})]
    rows = drain(run_chunk(((0, 0), (0, 1), (0, 2), (0, 3)), trap, trapped, settings, **DOUBLE))
    assert rows["loss"][best] == torch.inf and (rows["images"][best] == 0.5).all() and rows["given_up"].tolist() == (rows["iterations"] < 17).tolist()
    assert rows["failure"][best] != 0 and rows["iterations"][best] < 17 and int(rows["iterations"].max()) == 17


def test_a_start_that_was_lost_before_the_rung_goes_however_good_its_best_point_was(case, tiny):
    """It keeps the loss of its best point, the lower one here; the healthy start runs to the end all the same."""
    observations, simulate, settings = case
    truth, drawn = tiny.observe(simulate, observations[0].params, size=2, seed=0)[1], []

    def start(observation, restart):
        return (truth if restart == 0 else torch.full((2, *tiny.shape), 0.5)), tiny.draw_noise(0, 2)

    def draw(generator):  # two draws at a time, the first ones for the check before the first iteration
        drawn.append(divmod(len(drawn) - 2, 2))
        return torch.tensor(torch.nan if drawn[-1] == lost else 0.0)

    def trapped(params, known, images, labels, noise):
        return {name: tensor * (1 + known["trap"]) for name, tensor in simulate(params, {}, images, labels, noise).items()}

    settings = dataclasses.replace(settings, restarts=2, halving=2, start=start, drawn={"trap": draw})
    lost = None
    whole = drain(run_chunk(((0, 0), (0, 1)), observations, trapped, settings, **DOUBLE))
    rung = int(whole["iterations"][1])
    assert whole["given_up"].tolist() == [False, True] and 1 < rung < 16
    lost = (rung - 1, 0)
    drawn.clear()
    rows = drain(run_chunk(((0, 0), (0, 1)), observations, trapped, settings, **DOUBLE))
    assert rows["failure"].tolist() == [LOST, 0] and float(rows["loss"][0]) < float(whole["loss"][1])
    assert rows["given_up"].tolist() == [True, False] and rows["iterations"].tolist() == [rung, 17]


def test_starts_that_halving_gave_up_are_not_chosen_for_their_smoothness_but_are_kept_for_the_evaluator(case, tiny):
    observations, simulate, settings = case

    def start(observation, restart):  # all but the flat one are near the truth, so that it is the first to go
        truth = tiny.observe(simulate, observations[0].params, size=2, seed=observation)[1]
        return torch.full((2, *tiny.shape), 0.5) if restart == 1 else truth * (1 - 0.1 * restart), tiny.draw_noise(observation, 2)

    settings = dataclasses.replace(settings, restarts=4, halving=2, lr=1e-6, noise_lr=1e-6, start=start, tv=0.0, choose_by="tv")
    rows = rows_of(case, every(settings), settings)
    ran = rows["iterations"].view(3, 4)
    assert (ran[:, 1] == 4).all() and torch.equal(rows["given_up"], rows["iterations"] < 17)
    for observation, one in enumerate(select([rows], 3, choose_by="tv")):
        assert int(ran[observation, one.restart]) == 17
        torch.testing.assert_close(one.restart_images, rows["images"].view(3, 4, *rows["images"].shape[1:])[observation])
        torch.testing.assert_close(one.restart_images[1], torch.full((2, *tiny.shape), 0.5), rtol=0, atol=1e-4)


class Counting(Programs):
    """Counts what the inner steps evaluate: rows by width of the program, padding included."""

    def __init__(self):
        super().__init__()
        self.rows = Counter()

    def get(self, simulate, matching, dims, inputs, **options):
        evaluate, width = super().get(simulate, matching, dims, inputs, **options), len(inputs[3])

        def counted(*inputs):
            self.rows[width] += width
            return evaluate(*inputs)

        return counted

    @property
    def recorded(self):
        return len(self._made)


@pytest.mark.parametrize("mode", ["loop", "vmap", "traced"])
@pytest.mark.parametrize(("starts", "rate", "cost"), [(8, 2, 2.5), (16, 4, 2.5), (4, 2, 2.0)])
def test_the_cost_of_halving_is_that_of_few_full_starts(case, mode, starts, rate, cost):
    """What is evaluated costs, not what is reported: padding counts."""
    settings, counting = dataclasses.replace(case[2], restarts=starts, halving=rate, iterations=64), Counting()
    rows = rows_of(case, tuple((0, s) for s in range(starts)), settings, mode=mode, at_once=starts, programs=counting)
    assert int(rows["iterations"].sum()) == counting.rows.total()
    assert counting.rows.total() - 1 == pytest.approx(64 * cost, rel=0.15)


def test_survivors_of_all_chunks_share_a_program_a_rung_and_a_short_chunk_is_padded_to_it(case):
    settings, counting = dataclasses.replace(case[2], restarts=4, halving=2), Counting()
    observations, simulate, _ = case
    found = run(observations, lambda: simulate, settings, at_once=10, mode="traced", programs=counting, **DOUBLE)
    # chunks of two observations and of one; rungs at 4 and 8 of 16 iterations, and the last evaluation
    assert counting.rows == {8: 2 * 8 * 4, 4: 2 * 4 * 4, 2: 2 * 2 * 9} and counting.recorded == 3
    plain = run(observations, lambda: simulate, settings, at_once=10, **DOUBLE)
    for one, other in zip(found, plain, strict=True):
        assert one.restart == other.restart and one.iterations == other.iterations
        torch.testing.assert_close(one.images, other.images, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("at_once", "starts", "rows"), [(3, 4, {2: 2 * 2 * 4 + 2 * 4, 1: 9}), (5, 9, {5: 2 * 5 + 5, 3: 2 * 3, 2: 4 * 2, 1: 9})])
def test_more_starts_than_fit_at_once_run_in_equal_turns(case, at_once, starts, rows):
    settings, counting = dataclasses.replace(case[2], restarts=starts, halving=2), Counting()
    turns = rows_of(case, tuple((0, s) for s in range(starts)), settings, mode="traced", at_once=at_once, programs=counting)
    whole = rows_of(case, tuple((0, s) for s in range(starts)), settings)
    assert max(counting.rows) <= at_once and torch.equal(turns["iterations"], whole["iterations"])
    torch.testing.assert_close(turns["images"], whole["images"], rtol=1e-5, atol=1e-6)
    assert counting.rows == rows


def test_progress_counts_every_iteration_that_is_done_or_given_up(case):
    observations, simulate, settings = case
    settings = dataclasses.replace(settings, restarts=4, halving=2)
    running, seen = run_chunk(every(settings), observations, simulate, settings, at_once=5, every=3, **DOUBLE), []
    while True:
        try:
            seen.append(next(running).done)
        except StopIteration:
            break
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 12 * 16


# --- variants --------------------------------------------------------------------------------------------------------


def test_variants_of_a_start_begin_alike_and_each_follows_its_own_settings(case):
    changes = ({"tv": 0.1}, {"lr": 0.01, "noise_lr": 0.02}, {})
    settings = dataclasses.replace(case[2], restarts=2, variants=changes)
    rows = rows_of(case, every(settings, 1), settings)
    for number, change in enumerate(changes):
        # the objective that is reported keeps the settings' own weights, so only paths and images are compared
        alone = rows_of(case, every(case[2], 1)[:1], dataclasses.replace(case[2], restarts=2, **change))
        if "tv" not in change:
            torch.testing.assert_close(rows["losses"][2 * number], alone["losses"][0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(rows["images"][2 * number], alone["images"][0], rtol=1e-5, atol=1e-6)
    assert rows["losses"][:2, 0].tolist() == rows["losses"][2:4, 0].tolist() != rows["losses"][:2, 0].flip(0).tolist()
    assert not torch.allclose(rows["losses"][0, -1], rows["losses"][4, -1])
    assert len(run(case[0], lambda: case[1], settings, **DOUBLE)[0].restart_losses) == 6


def test_only_numbers_that_a_program_can_hold_side_by_side_may_vary(case):
    with pytest.raises(InputError, match="iterations"):
        dataclasses.replace(case[2], variants=({"iterations": 3},))
    with pytest.raises(InputError, match="tv_boost=0.5"):
        dataclasses.replace(case[2], variants=({"tv_boost": 0.5},))


# --- choice, patience, coupling ---------------------------------------------------------------------------------------


def test_starts_can_be_chosen_by_fit_or_by_total_variation(case, tiny):
    """Total variation as a score of restarts raises in the best-known peer."""
    observations, simulate, settings = case

    def start(observation, restart):  # flat images are the smoothest there are, and fit badly
        flat = torch.full((2, *tiny.shape), 0.5)
        return (flat if restart == 1 else torch.rand(2, *tiny.shape, generator=torch.Generator().manual_seed(restart))), None

    settings = dataclasses.replace(settings, restarts=3, iterations=1, lr=1e-6, noise_lr=1e-6, start=start, tv=0.0)
    for choose_by in ("objective", "fit", "tv"):
        found = run(observations, lambda: simulate, dataclasses.replace(settings, choose_by=choose_by), **DOUBLE)
        for one in found:
            expected = 1 if choose_by == "tv" else int(one.restart_losses.argmin())
            assert one.restart == expected


def test_an_attack_without_progress_stops_alone_and_keeps_its_best(case, tiny):
    observations, simulate, settings = case
    truth = tiny.observe(simulate, observations[0].params, size=2, seed=0)[1]

    def start(observation, restart):  # the first attack is at its goal from the beginning
        images = truth if observation == 0 else torch.full((2, *tiny.shape), 0.5)
        return images, tiny.draw_noise(observation, 2) if observation == 0 else torch.zeros(2, *tiny.latent)

    settings = dataclasses.replace(settings, start=start, tv=0.0, noise_weight=0.0, iterations=40, patience=4, lr=0.01, noise_lr=0.02)
    chunk = ((0, 0), (1, 0), (2, 0))
    rows, full = rows_of(case, chunk, settings), rows_of(case, chunk, dataclasses.replace(settings, patience=None))
    assert rows["iterations"][0] == 6 and (rows["iterations"][1:] > 6).all()
    assert rows["losses"][0, 7:].isnan().all() and rows["loss"][0] < 1e-12
    ran = int(rows["iterations"][1])
    torch.testing.assert_close(rows["losses"][1, :ran], full["losses"][1, :ran], rtol=1e-5, atol=1e-8)
    kept = rows_of(case, ((0, 0),), dataclasses.replace(settings, snapshots=4), every=5)
    torch.testing.assert_close(kept["snapshots"][0, -1].float(), kept["images"][0], rtol=0, atol=1e-3)
    alone = rows_of(case, ((0, 0),), settings, every=5)
    assert torch.equal(alone["iterations"], rows["iterations"][:1])


def test_a_coupling_pulls_the_starts_of_an_observation_and_sees_them_all(case):
    observations, simulate, settings = case
    seen = []

    def to_the_mean(images, groups, progress, labels):
        seen.append((len(images), groups, progress))
        assert labels.shape == images.shape[:2]
        loss, slope = torch.zeros(len(images), dtype=images.dtype), torch.zeros_like(images)
        for group in groups:
            apart = images[group] - images[group].mean(0)
            loss[group], slope[group] = apart.square().flatten(1).mean(1), 2 * apart / apart[0].numel()
        return loss, slope

    settings = dataclasses.replace(settings, restarts=3)
    strong = dataclasses.replace(settings, coupling=lambda *a: tuple(100 * t for t in to_the_mean(*a)))
    assert strong.together and plan(2, 3, 2, together=True) == [((0, 0), (0, 1), (0, 2)), ((1, 0), (1, 1), (1, 2))]
    free, pulled = (run(observations, lambda: simulate, one, at_once=3, **DOUBLE) for one in (settings, strong))
    spread = [sum(float(found.restart_images.std(0).mean()) for found in one) for one in (free, pulled)]
    assert spread[1] < 0.5 * spread[0], spread
    assert seen[0] == (3, [[0, 1, 2]], 0.0) and seen[-1][2] == 1.0


def test_snapshots_show_the_best_candidate_on_the_way(case):
    settings = dataclasses.replace(case[2], snapshots=4)
    rows = rows_of(case, ((0, 0), (1, 0)), settings)
    assert rows["snapshots"].shape == (2, 4, 2, 2, 6, 6)
    torch.testing.assert_close(rows["snapshots"][:, -1].float(), rows["images"], rtol=0, atol=1e-3)
    assert not torch.equal(rows["snapshots"][:, 0], rows["snapshots"][:, -1])
    few = rows_of(case, ((0, 0),), dataclasses.replace(settings, iterations=3, snapshots=8))["snapshots"][0]
    # of iterations 0, 0, 1, 1, 1, 2, 2, 3
    assert [torch.equal(few[place], few[place + 1]) for place in range(7)] == [True, False, True, True, False, True, False]


def test_a_plan_leaves_out_what_is_done():
    assert plan(2, 2, 3, done=[(0, 1)]) == [((0, 0), (1, 0), (1, 1))]
    assert plan(2, 2, 4, together=True, done=[(0, 0), (0, 1)]) == [((1, 0), (1, 1))]
    assert plan(2, 1, 1, done=[(0, 0), (1, 0)]) == []


def test_published_attacks_can_start_from_zero_iterations(case):
    rows = rows_of(case, ((0, 0),), naive(iterations=0, **{k: getattr(case[2], k) for k in ("image_shape", "num_classes")}))
    assert rows["iterations"].tolist() == [1] and select([rows], 1)[0].loss == float(rows["losses"][0, 0])
