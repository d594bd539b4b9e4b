import copy
import math

import pytest
import torch

from gidef.rounds.server import CONTROL, fed_adagrad, fed_adam, fed_avg, fed_yogi, scaffold
from gidef.types import ServerState

WRONG = [{"lr": 0.0}, {"lr": math.nan}, {"lr": math.inf}, {"lr": 1, "beta1": 1.0}, {"lr": 1, "beta1": -0.1}, {"lr": 1, "tau": 0.0}]
STEPS = {
    "fed_avg": fed_avg(),
    "momentum": fed_avg(lr=0.5, momentum=0.9),
    "fed_adagrad": fed_adagrad(lr=0.1),
    "fed_adam": fed_adam(lr=0.1),
    "fed_yogi": fed_yogi(lr=0.1),
}


def tensors(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=draw).to(dtype), "b": torch.randn(2, generator=draw).to(dtype)}


def with_control(delta):
    return delta | {CONTROL + name: 0.5 * tensor for name, tensor in delta.items()}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_names_shapes_and_dtypes_are_kept_rounds_count_and_inputs_stay(name, dtype):
    state, delta = ServerState(tensors(0, dtype), round=4, slots={"other": {"x": torch.ones(1)}}), tensors(1, dtype)
    middle = STEPS[name](state, delta)
    kept = copy.deepcopy(middle)
    after = STEPS[name](middle, delta)
    assert after.round == 6 and state.round == 4
    assert {k: (t.shape, t.dtype) for k, t in after.params.items()} == {k: (t.shape, t.dtype) for k, t in state.params.items()}
    assert after.slots["other"]["x"] is state.slots["other"]["x"] and set(state.slots) == {"other"}
    for source, fresh in ((state.params, tensors(0, dtype)), (delta, tensors(1, dtype))):
        assert all(torch.equal(source[key], fresh[key]) for key in fresh)
    for left, right in ((middle.params, kept.params), *((middle.slots[slot], kept.slots[slot]) for slot in kept.slots)):
        assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize("name", STEPS)
def test_the_server_moves_towards_the_clients_and_stays_without_an_update(name):
    state = ServerState({"w": torch.zeros(3)})
    moved = STEPS[name](state, {"w": torch.tensor([1.0, -2.0, 0.0])}).params["w"]
    assert torch.equal(moved.sign(), torch.tensor([1.0, -1.0, 0.0]))
    assert STEPS[name](state, {"w": torch.zeros(3)}).params["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", STEPS)
def test_counters_are_carried_over_whether_the_update_holds_them_or_not(name):
    counter = torch.tensor(7)
    state = ServerState(tensors(0) | {"steps": counter})
    for delta in (tensors(1), tensors(1) | {"steps": torch.tensor(3)}):
        after = STEPS[name](state, delta)
        assert after.params["steps"] is counter
        assert "steps" not in after.slots.get("m", {})


def test_plain_averaging_reaches_the_mean_client_and_keeps_no_slot():
    state = ServerState(tensors(0))
    clients = [tensors(1), tensors(2)]
    mean = {name: sum(c[name] - w for c in clients) / 2 for name, w in state.params.items()}
    after = fed_avg()(state, mean)
    for name in mean:
        torch.testing.assert_close(after.params[name], (clients[0][name] + clients[1][name]) / 2)
    assert after.slots == {}


def test_an_update_in_another_precision_arrives_in_the_parameters():
    state = ServerState(tensors(0))
    after = fed_adam(lr=0.1)(state, tensors(1, torch.float64))
    assert {t.dtype for t in (*after.params.values(), *after.slots["m"].values(), *after.slots["v"].values())} == {torch.float32}


def test_scaffold_moves_the_model_and_its_control_apart():
    state = ServerState(tensors(0) | {"steps": torch.tensor(1)})
    delta = tensors(1)
    step = scaffold(lr=0.5, participation=0.25)
    after = step(step(state, with_control(delta)), with_control(delta))
    for name in delta:
        torch.testing.assert_close(after.params[name], state.params[name] + 2 * 0.5 * delta[name])
        torch.testing.assert_close(after.slots["control"][name], 2 * 0.25 * 0.5 * delta[name])
    assert set(after.params) == {"w", "b", "steps"} and set(after.slots) == {"control"}


def test_scaffolds_control_stays_the_mean_of_the_clients_controls():
    # four clients, two a round: c must equal the mean of all c_i at any time (Karimireddy et al. 2020, section 3)
    draw = torch.Generator().manual_seed(0)
    controls = {k: torch.zeros(3, dtype=torch.float64) for k in range(4)}
    state, step = ServerState({"w": torch.zeros(3, dtype=torch.float64)}), scaffold(participation=2 / 4)
    for cohort in ((0, 1), (1, 3), (2, 3), (0, 2)):
        change = {k: torch.randn(3, generator=draw, dtype=torch.float64) for k in cohort}
        controls |= {k: controls[k] + change[k] for k in cohort}
        state = step(state, {"w": torch.zeros(3), CONTROL + "w": sum(change.values()) / 2})
        torch.testing.assert_close(state.slots["control"]["w"], sum(controls.values()) / 4)


def test_updates_and_slots_that_do_not_fit_are_refused():
    state = ServerState(tensors(0))
    for name, step in STEPS.items():
        with pytest.raises(ValueError, match="differ in names"):
            step(state, {"w": tensors(1)["w"]})
        with pytest.raises(ValueError, match="differ in names"):
            step(state, tensors(1) | {"extra": torch.ones(1)})
        with pytest.raises(ValueError, match="has shape"):
            step(state, tensors(1) | {"b": torch.ones(3)})
        if name != "fed_avg":
            with pytest.raises(ValueError, match="slot 'm'"):
                step(ServerState(tensors(0), slots={"m": {"w": torch.ones(3, 2)}}), tensors(1))
    with pytest.raises(ValueError, match="differ in names"):
        scaffold(participation=1)(state, tensors(1))


@pytest.mark.parametrize("make", [fed_adagrad, fed_adam, fed_yogi])
@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_out_of_range_are_refused(make, wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]}="):
        make(**wrong)


def test_the_other_ranges_are_kept_too():
    for make in (fed_adam, fed_yogi):
        with pytest.raises(ValueError, match="beta2=1"):
            make(lr=0.1, beta2=1)
    for wrong in ({"lr": -1}, {"momentum": 1.0}, {"momentum": -0.5}):
        with pytest.raises(ValueError, match="expected a finite number"):
            fed_avg(**wrong)
    for participation in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"participation=.*in \(0, 1\]"):
            scaffold(participation=participation)
