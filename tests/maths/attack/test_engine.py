import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad

from gidef.attack import Matching, averaged, drain, invert, joint, naive, plan, run, run_chunk, select
from gidef.attack.batch import KEPT, LOST
from gidef.attack.lbfgs import Lbfgs
from gidef.attack.matching import kink_width, step_factor, tv_weight
from gidef.errors import InputError
from gidef.types import Observation

DOUBLE = {"seed": 3, "dtype": torch.float64}


@pytest.fixture
def case(tiny):
    """Three defended observations of one model, its simulator, and settings for the joint attack."""
    model = tiny.Net(sigma=0.5)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    made = [tiny.observe(simulate, params, size=2, seed=seed, noise=tiny.draw_noise(seed, 2)) for seed in range(3)]
    settings = joint(noise_shape=(2, *tiny.latent), iterations=8, restarts=2, **tiny.settings)
    return [one[0] for one in made], simulate, settings, [one[1] for one in made]


def assert_same(left, right, **tolerance):
    for one, other in zip(left, right, strict=True):
        assert one.restart == other.restart and one.status == other.status
        for name in ("images", "labels", "losses", "restart_losses", "restart_images"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


@pytest.mark.parametrize("change", [{}, {"distance": "l2"}, {"signed": True, "decay": "step"}, {"kink_width": None}, {"noise_shape": None}])
def test_one_program_gives_the_numbers_of_a_plain_loop(case, change):
    observations, simulate, settings, _ = case
    settings = dataclasses.replace(settings, **change)
    made = [run(observations, lambda: simulate, settings, mode=mode, at_once=4, **DOUBLE) for mode in ("vmap", "loop")]
    assert_same(*made)
    assert made[0][0].loss < float(made[0][0].losses[0])


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_results_do_not_depend_on_how_attacks_are_cut_into_chunks(case, at_once):
    observations, simulate, settings, _ = case
    reference = run(observations, lambda: simulate, settings, at_once=3, **DOUBLE)
    assert_same(reference, run(observations, lambda: simulate, settings, at_once=at_once, **DOUBLE))


def test_results_do_not_depend_on_the_order_of_attacks_or_of_chunks(case):
    observations, simulate, settings, _ = case
    one = [drain(run_chunk(chunk, observations, simulate, settings, **DOUBLE)) for chunk in plan(3, 2, 6)]
    other = [drain(run_chunk(chunk, observations, simulate, settings, **DOUBLE)) for chunk in [((2, 1), (0, 0)), ((1, 1), (0, 1), (2, 0), (1, 0))]]
    assert_same(select(one, 3), select(other, 3))


def test_another_seed_starts_elsewhere_and_restarts_differ(case):
    observations, simulate, settings, _ = case
    settings = dataclasses.replace(settings, iterations=0)
    first, again, other = (run(observations, lambda: simulate, settings, seed=seed)[0].restart_images for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_what_an_averaging_attack_draws_is_fresh_in_every_iteration_and_start_and_repeats_with_the_seed(case, tiny):
    observations, simulate, settings, _ = case
    settings = dataclasses.replace(settings, noise_shape=None, iterations=3, drawn={"draws": lambda draw: torch.randn(2, 2, *tiny.latent, generator=draw)})

    def drawn(seed):
        seen = []

        def recording(params, known, images, labels, noise):
            if not any(torch.equal(known["draws"], one) for one in seen):
                seen.append(known["draws"].clone())
            return averaged(simulate)(params, known, images, labels, noise)

        run(observations[:1], lambda: recording, settings, seed=seed, mode="loop", dtype=torch.float64)
        return seen

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert len(first) == len(again) == 2 * 4  # of two starts, at the beginning and after each of three steps
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True)) and not any(torch.equal(one, two) for one in first for two in other)


def test_observations_with_weights_and_knowledge_of_their_own_are_attacked_with_their_own(tiny):
    model = tiny.Net(sigma=0.5)
    simulate, observations = tiny.simulator(model), []
    for seed in range(3):
        known = {"noise": tiny.draw_noise(seed)}
        observations.append(tiny.observe(simulate, tiny.weights(model, seed), seed=seed, known=known)[0])
    settings = naive(iterations=10, **tiny.settings)
    together = run(observations, lambda: simulate, settings, at_once=3, **DOUBLE)
    for index, found in enumerate(together):
        alone = drain(run_chunk(((index, 0),), observations, simulate, settings, **DOUBLE))
        torch.testing.assert_close(found.images, alone["images"][0], rtol=1e-5, atol=1e-6)


def test_the_reported_loss_is_the_lowest_of_the_curve_and_that_of_the_returned_images(case):
    """At this step size candidates jump from wall to wall: the last point is not the best, and neighbours have other losses."""
    observations, simulate, settings, _ = case
    steps = {"lr": 2.0, "noise_lr": 1.0, "signed": True, "decay": "step", "iterations": 7, "restarts": 1}
    settings = dataclasses.replace(settings, distance="l2", tv=0.01, noise_weight=0.1, tv_boost=10.0, **steps)
    rows = drain(run_chunk(((0, 0), (1, 0), (2, 0)), observations, simulate, settings, **DOUBLE))
    assert (rows["losses"][:, -1] > rows["loss"] + 1e-4).any()
    for index, observation in enumerate(observations):
        images, noise = rows["images"][index].double(), rows["noise"][index].double()
        update = simulate(observation.params, {}, images, F.one_hot(observation.labels, 3).double(), noise)
        apart = sum((update[k] - t).square().sum() for k, t in observation.update.items())
        apart = apart / sum(t.square().sum() for t in observation.update.values())
        roughness = images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
        expected = apart + 0.01 * roughness + 0.1 * noise.square().mean()
        torch.testing.assert_close(rows["loss"][index].double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(rows["loss"][index], rows["losses"][index].min())


def test_candidates_stay_in_the_box_however_large_the_steps(case):
    observations, simulate, settings, _ = case
    settings = dataclasses.replace(settings, lr=5.0, iterations=3)
    for found in run(observations, lambda: simulate, settings, seed=0):
        assert found.restart_images.min() >= 0 and found.restart_images.max() <= 1 and found.images.dtype == torch.float32


def test_a_broken_update_fails_alone_with_its_reason_and_mid_grey_images(case):
    observations, simulate, settings, _ = case
    healthy = run(observations, lambda: simulate, settings, at_once=6, **DOUBLE)
    nothing = {name: torch.zeros_like(t) for name, t in observations[0].update.items()}
    broken = {**observations[2].update, "encoder.0.bias": torch.full((4,), torch.nan)}
    changed = [dataclasses.replace(observations[0], update=nothing), observations[1], dataclasses.replace(observations[2], update=broken)]
    found = run(changed, lambda: simulate, settings, at_once=6, **DOUBLE)
    assert_same(found[1:2], healthy[1:2])
    for one, reason in ((found[0], "zero"), (found[2], "not finite")):
        assert one.status == "failed" and reason in one.error and (one.images == 0.5).all() and one.loss == torch.inf
        assert one.restart_losses.tolist() == [torch.inf] * 2 and one.images.shape == (2, 2, 6, 6)


def test_an_update_that_holds_nothing_fails_alone_although_its_labels_cannot_be_recovered(case):
    observations, simulate, settings, _ = case
    nothing = {name: torch.zeros_like(t) for name, t in observations[0].update.items()}
    hidden = [dataclasses.replace(o, labels=None) for o in observations]
    found = run([dataclasses.replace(hidden[0], update=nothing), *hidden[1:]], lambda: simulate, settings, at_once=6, **DOUBLE)
    assert [one.status for one in found] == ["failed", "ok", "ok"]


def test_a_last_layer_that_was_pruned_away_hides_the_labels_and_fails_its_attack_alone(case):
    observations, simulate, settings, _ = case
    pruned = {name: torch.zeros_like(t) if name.startswith("predictor.3.") else t for name, t in observations[0].update.items()}
    hidden = [dataclasses.replace(o, labels=None) for o in observations]
    found = run([dataclasses.replace(hidden[0], update=pruned), *hidden[1:]], lambda: simulate, settings, at_once=6, **DOUBLE)
    assert [one.status for one in found] == ["failed", "ok", "ok"] and "labels cannot be recovered" in found[0].error and (found[0].images == 0.5).all()
    (granted,) = run([dataclasses.replace(observations[0], update=pruned)], lambda: simulate, settings, at_once=6, **DOUBLE)
    assert granted.status == "ok"


def test_identical_images_in_a_batch_are_one_answer_twice(tiny):
    """With labels alike too, the update is that of one image, and any pair of images with that mean gradient will do."""
    model = tiny.Net(activation=torch.nn.Tanh)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    image = tiny.observe(simulate, params)[1]
    images, labels = image.repeat(2, 1, 1, 1), torch.tensor([1, 1])
    update = simulate(params, {}, images, F.one_hot(labels, 3).double(), None)
    observation = Observation(params, update, 2)  # labels recovered: a duplicate
    (found,) = run([observation], lambda: simulate, naive(iterations=200, tv=0.0, restarts=2, **tiny.settings), **DOUBLE)
    assert found.status == "ok" and found.labels.tolist() == [1, 1] and found.fit < 0.05 * found.first_fit


def test_more_restarts_than_fit_into_a_chunk_and_a_batch_above_the_classes(tiny):
    model = tiny.Net()
    simulate, params = tiny.simulator(model), tiny.weights(model)
    observation, _, labels = tiny.observe(simulate, params, size=7)  # three classes
    observation = dataclasses.replace(observation, labels=None)
    (found,) = run([observation], lambda: simulate, naive(iterations=3, restarts=5, **tiny.settings), at_once=2, **DOUBLE)
    assert len(found.restart_losses) == 5 and found.images.shape[0] == 7 and len(found.labels) == 7


@pytest.mark.parametrize("size", [1, 4, 8, 16, 32])
def test_batches_of_every_size_are_matched_with_the_labels_that_their_update_tells(tiny, size):
    """Of three classes: most batches are larger, and labels repeat."""
    model = tiny.Net()
    simulate, params = tiny.simulator(model), tiny.weights(model)
    observation, _, labels = tiny.observe(simulate, params, size=size)
    settings = naive(iterations=12, tv=0.0, **tiny.settings)
    granted, hidden = run([observation], lambda: simulate, settings, **DOUBLE), run([dataclasses.replace(observation, labels=None)], lambda: simulate, settings, **DOUBLE)
    assert torch.equal(granted[0].labels, labels) and hidden[0].images.shape == (size, 2, 6, 6)
    counts, true = (torch.bincount(one, minlength=3) for one in (hidden[0].labels, labels))
    assert int((counts - true).abs().sum()) <= 2 * (size // 4)  # of a batch, only the counts are told, and those of large ones nearly
    for (one,) in (granted, hidden):
        assert one.status == "ok" and one.fit < 0.8 * one.first_fit


def test_a_loss_that_becomes_nan_on_the_way_ends_that_attack_alone_which_says_when(tiny):
    model = tiny.Net()
    gradient = tiny.simulator(model)

    def simulate(params, known, images, labels, noise):
        trap = 0 * torch.log(known["limit"] - (images - 0.5).abs().max())
        return {name: tensor + trap for name, tensor in gradient(params, {}, images, labels, noise).items()}

    params = tiny.weights(model)
    observations = [tiny.observe(gradient, params, seed=seed)[0] for seed in range(3)]
    limits = torch.tensor([1.0, 0.35, 1.0], dtype=torch.float64)
    observations = [dataclasses.replace(o, known={"limit": limit}) for o, limit in zip(observations, limits, strict=True)]
    settings = naive(iterations=20, start=lambda observation, restart: (torch.full((1, *tiny.shape), 0.5), None), **tiny.settings)
    found = run(observations, lambda: simulate, settings, at_once=3, **DOUBLE)
    assert [one.status for one in found] == ["ok"] * 3 and [one.error for one in found[::2]] == ["", ""]
    iteration = int(re.search(r"NaN at iteration (\d+); the best", found[1].error)[1])
    assert 1 < iteration < 20 and found[1].losses[:iteration].isfinite().all() and not found[1].losses[iteration].isfinite()
    without = run(observations[::2], lambda: simulate, settings, **DOUBLE)
    assert_same(found[::2], without)


def nan_at(*iterations):
    """What a single attack draws in each iteration: NaN in some of them. The first draw is the check before them all."""
    drawn = []

    def draw(generator):
        drawn.append(0)
        return torch.tensor(torch.nan if len(drawn) - 2 in iterations else 0.0)

    return {"trap": draw}


def trapped(tiny):
    """(observation, simulate) of a client whose loss is NaN where the drawn trap is."""
    model = tiny.Net(sigma=0.5)

    def loss(params, known, images, labels, noise):
        return F.cross_entropy(functional_call(model, params, (images, noise)), labels) * (1 + known["trap"])

    def simulate(params, *others):
        return grad(lambda p: loss(p, *others))(params)

    simulate.loss = loss
    return tiny.observe(tiny.simulator(model), tiny.weights(model), size=2, noise=tiny.draw_noise(0, 2))[0], simulate


def lost_and_whole(tiny, iterations, mode="vmap", **change):
    """An attack whose loss is NaN at some iterations, and the same one without, with its best image after each iteration."""
    observation, simulate = trapped(tiny)
    settings = dataclasses.replace(joint(noise_shape=(2, *tiny.latent), iterations=12, **tiny.settings), snapshots=12, **change)
    drawn = [nan_at(*iterations), nan_at()]
    return [run([observation], lambda: simulate, dataclasses.replace(settings, drawn=one), at_once=1, mode=mode, **DOUBLE)[0] for one in drawn]


@pytest.mark.parametrize("change", [
    {"mode": "loop"}, {"mode": "vmap"}, {"mode": "traced"}, {"form": "forward_over_reverse"}, {"form": "central_difference"}, {"patience": 3}, {"optimiser": Lbfgs(max_evaluations=4)},
])  # fmt: skip
def test_an_attack_whose_loss_becomes_nan_keeps_its_best_point(tiny, change):
    lost, whole = lost_and_whole(tiny, range(9, 13), **change)
    assert (lost.status, whole.status, whole.error) == ("ok", "ok", "") and "NaN at iteration 9; " in lost.error
    best = float(whole.losses[:9].min())
    assert lost.loss == pytest.approx(best, rel=1e-5) and best < float(whole.losses[0]) and lost.fit < lost.first_fit
    torch.testing.assert_close(lost.images, whole.snapshots[7].float(), rtol=0, atol=1e-3)  # the best after eight iterations
    assert lost.restart_losses.tolist() == [lost.loss] and torch.equal(lost.restart_images[0], lost.images)


def test_an_attack_whose_loss_is_nan_but_once_and_that_goes_on_keeps_the_best_of_both_sides(tiny):
    """L-BFGS moves nowhere from a point without a loss, and goes on from it with the next one."""
    lost, _ = lost_and_whole(tiny, [4], optimiser=Lbfgs(max_evaluations=4))
    assert lost.status == "ok" and "NaN at iteration 4; " in lost.error and lost.losses.isnan().tolist() == [place == 4 for place in range(13)]
    assert lost.loss == float(lost.losses[~lost.losses.isnan()].min()) < float(lost.losses[:4].min())


def test_searched_labels_and_noise_of_the_best_point_are_kept_with_it(tiny):
    observation, simulate = trapped(tiny)
    observation = dataclasses.replace(observation, labels=None)
    settings = dataclasses.replace(joint(noise_shape=(2, *tiny.latent), iterations=6, **tiny.settings), search_labels=True)
    lost, whole = (
        drain(run_chunk(((0, 0),), [observation], simulate, dataclasses.replace(settings, drawn=nan_at(*at)), **DOUBLE)) for at in (range(1, 7), ())
    )
    assert lost["failure"] == LOST and lost["failed_at"] == 1 and lost["loss"][0] == whole["losses"][0, 0]
    first = drain(run_chunk(((0, 0),), [observation], simulate, dataclasses.replace(settings, iterations=0, drawn=nan_at()), **DOUBLE))
    for name in ("images", "noise", "logits", "labels", "fit"):
        assert torch.equal(lost[name], first[name]), name


def test_an_attack_that_has_seen_no_finite_loss_fails_with_mid_grey_images(tiny):
    lost, _ = lost_and_whole(tiny, range(13))
    assert lost.status == "failed" and lost.error.endswith("iteration 0") and (lost.images == 0.5).all() and lost.loss == torch.inf


def test_an_observation_of_another_model_is_refused_before_the_first_iteration(case, tiny):
    observations, simulate, settings, _ = case
    for change in (
        {"encoder.0.weight": torch.zeros(4, 3, 3, 3)},
        {"extra": torch.zeros(1)},
    ):
        wrong = dataclasses.replace(observations[1], update={**observations[1].update, **change})
        running = invert([observations[0], wrong], lambda: simulate, settings, seed=0, dtype=torch.float64)
        with pytest.raises(InputError, match="does not fit"):
            next(running)
    fewer = dataclasses.replace(observations[0], update={k: t for k, t in observations[0].update.items() if k != "encoder.0.bias"})
    with pytest.raises(InputError, match=r"encoder\.0\.bias.*missing in the observation"):
        run([fewer], lambda: simulate, settings, **DOUBLE)


def test_observations_that_differ_in_size_or_names_and_labels_out_of_range_are_refused(case, tiny):
    observations, simulate, settings, _ = case
    single = tiny.observe(simulate, observations[0].params, size=1)[0]
    with pytest.raises(InputError, match="separate calls"):
        run([observations[0], single], lambda: simulate, settings, **DOUBLE)
    with pytest.raises(InputError, match="separate calls"):
        run([observations[0], dataclasses.replace(observations[1], known={"x": torch.ones(1)})], lambda: simulate, settings, **DOUBLE)
    for labels in (torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0])):
        with pytest.raises(InputError, match="granted labels"):
            run([dataclasses.replace(observations[0], labels=labels)], lambda: simulate, settings, **DOUBLE)


def test_labels_that_are_not_granted_are_recovered_and_used(case):
    observations, simulate, settings, _ = case
    hidden = [dataclasses.replace(o, labels=None) for o in observations]
    for found, observation in zip(run(hidden, lambda: simulate, settings, **DOUBLE), observations, strict=True):
        assert found.labels.tolist() == sorted(observation.labels.tolist())


def test_the_private_images_cannot_reach_an_attack(case):
    """They are no field of the observation; overwriting them, after it was made, changes no bit."""
    observations, simulate, settings, truth = case
    assert {field.name for field in dataclasses.fields(Observation)} == {"params", "update", "num_examples", "kind", "labels", "known", "unmatched", "scaled", "trust", "noise"}
    before = run(observations, lambda: simulate, settings, **DOUBLE)
    for images in truth:
        images.copy_(images.flip(0).roll(1, 2))
    assert_same(before, run(observations, lambda: simulate, settings, **DOUBLE), rtol=0, atol=0)


def test_an_attack_modifies_none_of_its_inputs(case):
    observations, simulate, settings, _ = case
    kept = copy.deepcopy(observations)
    run(observations, lambda: simulate, settings, **DOUBLE)
    for one, other in zip(observations, kept, strict=True):
        assert all(torch.equal(one.params[k], other.params[k]) and torch.equal(one.update[k], other.update[k]) for k in kept[0].params)


def test_a_simulator_s_own_trainable_parameters_hold_no_graph(tiny):
    model = tiny.Net()
    gradient, params, gain = tiny.simulator(model), tiny.weights(model), torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def simulate(params, known, images, labels, noise):
        return {name: gain * tensor for name, tensor in gradient(params, {}, images, labels, noise).items()}

    observation = tiny.observe(gradient, params)[0]
    running = run_chunk(((0, 0),), [observation], simulate, naive(iterations=3, **tiny.settings), **DOUBLE)
    next(running)
    assert torch.is_grad_enabled()
    assert not any(tensor.requires_grad for tensor in drain(running).values())


def row(observation, restart, loss, failure=0):
    images = torch.full((1, 1, 2, 2), 0.1 * restart)
    tensors = {"images": images, "labels": torch.tensor([0]), "loss": torch.tensor(loss), "losses": torch.ones(3), "failure": torch.tensor(failure)}
    tensors |= {"fit": torch.tensor(10 * restart - loss), "first_fit": torch.tensor(1.0), "iterations": torch.tensor(3)}
    return {name: t[None] for name, t in {**tensors, "attacks": torch.tensor([observation, restart]), "failed_at": torch.tensor(7)}.items()}


def test_the_restart_of_the_lowest_own_loss_is_chosen_and_a_failed_one_never_while_another_lives():
    rows = [row(1, 0, torch.inf, 3), row(0, 2, 0.3), row(1, 2, torch.inf, 3), row(0, 0, 0.2), row(1, 1, 9.0), row(0, 1, 0.1)]
    first, second = select(rows, 2)
    assert (first.restart, second.restart, second.status) == (1, 1, "ok")
    torch.testing.assert_close(first.restart_losses, torch.tensor([0.2, 0.1, 0.3]))
    assert torch.equal(first.images, first.restart_images[1]) and second.restart_losses.tolist() == [torch.inf, 9.0, torch.inf]
    (failed,) = select([row(0, 0, torch.inf, 3)], 1)
    assert failed.status == "failed" and failed.error.endswith("iteration 7")


def test_a_start_that_was_lost_on_the_way_competes_with_its_best_point():
    lost, whole = select([row(0, 0, 0.1, LOST), row(0, 1, 0.2), row(1, 0, 0.3, LOST), row(1, 1, 0.2)], 2)
    assert (lost.restart, lost.status, lost.error) == (0, "ok", f"the attacker's loss became infinite or NaN at iteration 7{KEPT}")
    assert (whole.restart, whole.status, whole.error) == (1, "ok", "")
    torch.testing.assert_close(whole.restart_losses, torch.tensor([0.3, 0.2]))


def test_total_variation_chooses_among_the_starts_that_ran_longest():
    def noisy(start, roughness, ran, *, given_up=False, failure=0, loss=0.1):
        one = row(0, start, loss, failure)
        one["images"] = torch.zeros(1, 1, 1, 2, 2)
        one["images"][..., 0] = roughness
        return one | {"iterations": torch.tensor([ran]), "given_up": torch.tensor([given_up]), "failed_at": torch.tensor([ran])}

    stopped, lost, nothing = {"given_up": True}, {"failure": LOST}, {"failure": LOST, "loss": torch.inf}
    for starts, expected in (
        ([(0.1, 4, stopped), (0.3, 17, {}), (0.2, 17, {})], 2),
        ([(0.1, 8, {}), (0.3, 17, {})], 0),  # patience ended the first
        ([(0.1, 4, stopped), (0.0, 9, lost), (0.2, 17, {})], 2),
        ([(0.1, 4, stopped), (0.3, 8, stopped), (0.2, 8, stopped), (0.0, 17, nothing)], 2),
        ([(0.1, 4, stopped), (0.3, 9, lost), (0.0, 17, nothing)], 1),
        ([(0.1, 4, stopped), (0.0, 17, nothing)], 0),
    ):
        (one,) = select([noisy(number, roughness, ran, **more) for number, (roughness, ran, more) in enumerate(starts)], 1, choose_by="tv")
        assert one.restart == expected and len(one.restart_images) == len(starts), starts


@pytest.mark.parametrize("rows", [[(0, 0)], [(0, 0), (1, 0), (1, 1)], [(0, 0), (1, 0), (1, 0)], [(0, 0), (1, 0), (2, 0)]])
def test_missing_doubled_and_foreign_attacks_are_noticed(rows):
    with pytest.raises(ValueError, match="once each"):
        select([row(o, r, 0.1) for o, r in rows], 2)


def test_progress_comes_every_so_often_and_at_the_end_and_curves_are_thinned(case):
    observations, simulate, settings, _ = case
    settings = dataclasses.replace(settings, iterations=25, restarts=1)
    running, seen = invert(observations, lambda: simulate, settings, seed=0, at_once=2, every=10), []
    try:
        while True:
            seen.append(next(running))
    except StopIteration as end:
        found = end.value
    assert [(p.chunk, p.iteration, p.attacks) for p in seen] == [(0, i, 2) for i in (0, 10, 20, 25)] + [(1, i, 1) for i in (0, 10, 20, 25)]
    assert all(p.chunks == 2 and p.iterations == 25 and p.failed == 0 for p in seen) and seen[3].loss < seen[0].loss
    assert found[0].losses.shape == (26,) and found[0].losses.dtype == torch.float32
    long = run(observations[:1], lambda: simulate, dataclasses.replace(settings, iterations=220, noise_shape=None, kink_width=None), seed=0)
    assert long[0].losses.shape == (200,)


def test_step_sizes_fall_tenfold_after_three_five_and_seven_eighths():
    step = Matching(image_shape=(1, 2, 2), num_classes=2, iterations=80, decay="step")
    assert [round(step_factor(step, i), 6) for i in (0, 29, 30, 49, 50, 69, 70, 79)] == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    smooth = dataclasses.replace(step, decay="quadratic")
    assert step_factor(smooth, 0) == 1 and step_factor(smooth, 40) == 0.25 and step_factor(dataclasses.replace(step, decay="linear"), 60) == 0.25


def test_the_smoothing_schedules_run_from_their_first_to_their_last_value():
    settings = Matching(image_shape=(1, 2, 2), num_classes=2, iterations=80, tv=0.01, tv_boost=100.0, kink_width=(1.0, 0.01))
    assert [round(tv_weight(settings, i), 6) for i in (0, 30, 60, 80)] == [1.0, 0.1, 0.01, 0.01]
    assert [round(kink_width(settings, i), 6) for i in (0, 40, 80)] == [1.0, 0.1, 0.01]
    assert kink_width(dataclasses.replace(settings, kink_width=None), 5) is None


@pytest.mark.parametrize(
    "wrong",
    [{"distance": "l1"}, {"decay": "none"}, {"start": "truth"}, {"restarts": 0}, {"iterations": -1}, {"tv": -1.0}, {"lr": 0.0},
     {"noise_lr": float("nan")}, {"image_shape": (6, 6)}, {"num_classes": 1}, {"kink_width": (1.0, 0.0)}, {"tv_boost": 0.5},
     {"noise_weight": float("inf")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)).split("_")[0]):
        Matching(**{"image_shape": (1, 2, 2), "num_classes": 2, **wrong})


def test_unknown_modes_and_empty_chunks_are_refused(case):
    observations, simulate, settings, _ = case
    with pytest.raises(InputError, match="mode"):
        run(observations, lambda: simulate, settings, mode="map", **DOUBLE)
    with pytest.raises(InputError, match="at_once=0"):
        plan(3, 1, 0)
    with pytest.raises(InputError, match="start gave"):
        run(observations, lambda: simulate, dataclasses.replace(settings, start=lambda o, r: (torch.zeros(1, 2, 6, 6), None)), **DOUBLE)
