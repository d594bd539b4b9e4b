"""Arithmetic on updates. All data are synthetic."""

import itertools
import math
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gidef import updates as updates_module
from gidef.errors import Diverged, InputError
from gidef.types import Client, Update
from gidef.updates import FixedPointSum, Float32Sum, add, mean_over, norm, scale, subtract
from tests.stand_in import DEVICE, watched

SHAPES = {"scalar": (), "empty": (0, 3), "bias": (7,), "weight": (4, 3, 2)}


def draw(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype) for name, shape in SHAPES.items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def test_subtract_undoes_add_and_scale_by_zero_is_zero() -> None:
    left, right = draw(0, torch.float64), draw(1, torch.float64)
    back = subtract(add(left, right), right)
    assert all(torch.allclose(back[name], left[name], rtol=0, atol=1e-14) for name in left)
    assert float(norm(scale(left, 0.0))) == 0.0
    with pytest.raises(ValueError, match="only right"):
        subtract({}, right)
    with pytest.raises(ValueError, match="shape"):
        add(left, {**right, "bias": torch.zeros(8)})


def test_norm_is_that_of_all_entries_in_a_row_whatever_the_order_of_names() -> None:
    tensors = draw(2)
    everything = torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    assert math.isclose(float(norm(tensors)), math.sqrt(float((everything**2).sum())), rel_tol=1e-14)
    assert float(norm(tensors)) == float(norm(dict(reversed(tensors.items()))))
    assert float(norm({})) == 0.0
    tensors["bias"].requires_grad_()
    (gradient,) = torch.autograd.grad(norm(tensors), tensors["bias"])
    assert torch.allclose(gradient, tensors["bias"] / norm(tensors).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_agrees_with_the_naive_one_in_double_and_keeps_dtypes_and_order(dtype: torch.dtype) -> None:
    updates, weights = [draw(seed, dtype) for seed in range(5)], [1, 17, 400, 3, 64]
    total = FixedPointSum(updates[0], metric_names=("loss", "accuracy"), max_terms=5)
    for seed, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        total.add(update, weight, {"accuracy": 0.1 * seed, "loss": -2.0})
    mean, weight, metrics = total.mean()
    assert weight == sum(weights) and total.count == 5 and list(mean) == list(SHAPES)
    assert math.isclose(metrics["accuracy"], sum(0.1 * k * n for k, n in enumerate(weights)) / sum(weights), abs_tol=1e-9)
    assert math.isclose(metrics["loss"], -2.0, abs_tol=1e-9)
    for name, tensor in mean.items():
        naive = sum(update[name].double() * n for update, n in zip(updates, weights, strict=True)) / sum(weights)
        assert tensor.dtype == dtype and tensor.shape == SHAPES[name]
        assert torch.allclose(tensor.double(), naive, rtol=torch.finfo(dtype).eps, atol=2.0**-32)


def test_every_order_and_every_split_into_partial_sums_gives_the_same_bits_where_float32_does_not() -> None:
    updates, weights = [draw(seed, spread=10.0 ** (seed - 2)) for seed in range(4)], [3, 1, 250, 7]
    seen, naive = [], set()
    for order in itertools.permutations(range(4)):
        total = FixedPointSum(updates[0], max_terms=4)
        for index in order:
            total.add(updates[index], weights[index], {})
        seen.append(total.mean()[0])
        naive.add(tuple(sum(updates[index]["weight"] * weights[index] for index in order).flatten().tolist()))
    parts = [FixedPointSum(updates[0], max_terms=4) for _ in range(3)]  # the third has no client
    for index in range(4):
        parts[index % 2].add(updates[index], weights[index], {})
    for part in parts[1:]:
        parts[0].buffer.add_(part.buffer)
    assert all(same_bits(mean, seen[0]) for mean in [*seen, parts[0].mean()[0]])
    assert len(naive) > 1, "the case does not show what the fixed point is for"


@pytest.mark.parametrize("make", [FixedPointSum, Float32Sum])
def test_a_mean_taken_as_its_parts_arrive_has_the_same_bits_and_touches_nothing_too_early(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(updates_module.AT_ONCE, "cpu", 5)  # parts that cut tensors and hold several
    updates = [{**draw(seed), "half": draw(seed + 9)["weight"].bfloat16()} for seed in range(3)]
    total = make(updates[0], metric_names=("loss",), max_terms=3)
    for update in updates:
        total.add(update, 7, {"loss": 1.0})
    whole = total.mean()
    for step in (1, 4, 5, 100):
        sums = total.body.clone()
        total.body.zero_()

        def arrive(step: int = step, sums: torch.Tensor = sums) -> Iterator[int]:
            for first in range(0, len(sums), step):
                total.body[first : first + step] = sums[first : first + step]
                yield min(first + step, len(sums))

        mean, *rest = total.mean(arriving=arrive())
        assert same_bits(mean, whole[0]) and rest == list(whole[1:])
    with pytest.raises(ValueError, match="stopped arriving"):
        total.mean(arriving=[3])


def test_threads_that_add_at_once_give_the_bits_of_one_thread() -> None:
    updates = [draw(seed) for seed in range(24)]
    serial, shared = (FixedPointSum(updates[0], metric_names=["loss"], max_terms=24) for _ in range(2))
    for update in updates:
        serial.add(update, 5, {"loss": 1.5})
    threads = [
        threading.Thread(target=lambda start=start: [shared.add(update, 5, {"loss": 1.5}) for update in updates[start::4]]) for start in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(serial.buffer, shared.buffer) and shared.count == 24


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["weight", "metric"])
def test_what_cannot_be_summed_is_refused_by_name_and_leaves_the_sum_alone(bad: float, where: str) -> None:
    total = FixedPointSum(draw(0), metric_names=["loss"], max_terms=10)
    total.add(draw(1), 8, {"loss": 0.5})
    before = total.buffer.clone()
    update = draw(2)
    if where == "weight":
        update["weight"][1, 2, 0] = bad
    with pytest.raises(Diverged, match=f"client 7: {'weight' if where == 'weight' else 'metric loss'} .*diverged"):
        total.add(update, 8, {"loss": bad if where == "metric" else 0.5}, client=7)
    assert torch.equal(total.buffer, before)


@pytest.mark.parametrize("most", [2**24, 5], ids=["one part", "parts that cut tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_peaks_by_part_as_on_a_gpu_let_pass_and_refuse_what_peaks_by_tensor_do(most: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(updates_module.AT_ONCE, "cpu", most)
    template = {**draw(0), "none": torch.zeros(0), "metric loss": torch.zeros(2)}
    good = {name: tensor.to(dtype) if name != "bias" else tensor.double() for name, tensor in {**draw(1), "none": torch.zeros(0), "metric loss": torch.ones(2)}.items()}
    by_tensor, by_part = (FixedPointSum(template, metric_names=["loss"], max_terms=10) for _ in range(2))
    by_part._in_parts = True
    for total in (by_tensor, by_part):
        total.add(good, 8, {"loss": 0.5})
    assert torch.equal(by_part.buffer, by_tensor.buffer)
    limit = 2.0**62 / 10 / 2.0**32 / 8
    for name, value, metric in (
        ("weight", math.nan, 0.5), ("bias", -math.inf, 0.5), ("bias", limit * 1.001, 0.5), ("metric loss", math.nan, 0.5), ("metric loss", 1.0, math.inf),
    ):  # fmt: skip
        bad = {key: tensor.clone() for key, tensor in good.items()}
        bad[name].flatten()[-1] = value  # a view
        told = []
        for total in (by_tensor, by_part):
            with pytest.raises(InputError, match=f"client 3: {name} ") as caught:
                total.add(bad, 8, {"loss": metric}, client=3)
            told.append(str(caught.value))
        assert told[0] == told[1]
    just = {**good, "bias": torch.full_like(good["bias"], limit * (1 - 1e-9))}
    for total in (by_tensor, by_part):
        total.add(just, 8, {"loss": 0.5})
    assert torch.equal(by_part.buffer, by_tensor.buffer) and by_part.count == 2


def test_an_update_on_a_device_takes_few_launches_and_one_wait_however_many_tensors_it_has() -> None:
    """On the stand-in for a GPU; views launch nothing."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            out = (kwargs or {}).get("device")
            if any(one.device == DEVICE for one in tensors) or out is not None and torch.device(out) == DEVICE:
                if out is not None and torch.device(out).type == "cpu" or function is torch.ops.aten._local_scalar_dense.default:
                    waits.append(function)
                elif out is not None and tensors and not any(one.device == DEVICE for one in tensors):
                    waits.append(function)  # a copy to the device
                elif not function.is_view:
                    launches.append(function)
            return function(*args, **(kwargs or {}))

    spent = []
    for count in (1, 60):
        update = {f"layer{index}": torch.zeros(3, 4, device=DEVICE) for index in range(count)}
        total, launches, waits = FixedPointSum(update, metric_names=["loss"], max_terms=9), [], []
        total._in_parts = True
        with watched(), Counted():
            for _ in range(3):
                total.add(update, 5, {"loss": 1.0})
        spent.append((len(launches), len(waits)))
        assert len(waits) == 3 and len(launches) <= 3 * 10, (launches, waits)
    assert spent[0] == spent[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_that_add_at_once_on_a_gpu_give_the_bits_of_the_cpu() -> None:
    updates = [{name: tensor.repeat(50_000, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor for name, tensor in draw(seed).items()} for seed in range(12)]
    there = [{name: tensor.cuda() for name, tensor in update.items()} for update in updates]
    torch.cuda.synchronize()
    serial, shared = (FixedPointSum(of[0], metric_names=["loss"], max_terms=12) for of in (updates, there))

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for update in there[start::4]:
                shared.add(update, 5, {"loss": 1.5})

    for update in updates:
        serial.add(update, 5, {"loss": 1.5})
    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(serial.buffer, shared.buffer.cpu()) and shared.count == 12


def test_the_largest_terms_allowed_do_not_overflow_and_a_little_more_is_refused() -> None:
    template = {"w": torch.zeros(2, dtype=torch.float64)}
    for terms in (1, 3, 64, 1000):
        most = 2.0**62 / terms / 2.0**32
        total = FixedPointSum(template, max_terms=terms)
        for _ in range(terms):
            total.add({"w": torch.tensor([most, -most], dtype=torch.float64) * (1 - 1e-12)}, 1, {})
        assert torch.allclose(total.mean()[0]["w"], torch.tensor([most, -most], dtype=torch.float64), rtol=1e-9)
        with pytest.raises(InputError, match="allows"):
            FixedPointSum(template, max_terms=terms).add({"w": torch.full((2,), most * (1 + 1e-6), dtype=torch.float64)}, 1, {})


def test_defects_of_the_caller_are_value_errors() -> None:
    with pytest.raises(ValueError, match="integer tensors.*steps"):
        FixedPointSum({"steps": torch.tensor(3)}, max_terms=1)
    with pytest.raises(ValueError, match="max_terms=0"):
        mean_over(lambda client, worker: None, [], template=draw(0))
    total = FixedPointSum(draw(0), metric_names=["loss"], max_terms=1, counters=2)
    with pytest.raises(ValueError, match="names"):
        total.add({}, 1, {"loss": 0.0})
    with pytest.raises(ValueError, match="'bias' has shape"):
        total.add({**draw(0), "bias": torch.zeros(6)}, 1, {"loss": 0.0})
    with pytest.raises(ValueError, match="metrics"):
        total.add(draw(0), 1, {"accuracy": 0.0})
    with pytest.raises(ValueError, match="negative"):
        total.add(draw(0), -1, {"loss": 0.0})
    assert int(total.buffer.abs().sum()) == 0
    with pytest.raises(InputError, match="0 examples"):
        total.mean()
    total.add(draw(0), 2, {"loss": 0.0})
    with pytest.raises(ValueError, match="max_terms=1"):
        total.add(draw(0), 2, {"loss": 0.0})
    total.counters.add_(5)
    assert total.buffer[-2:].tolist() == [5, 5] and total.mean()[1] == 2
    total.buffer.mul_(2)  # two ranks with one term each
    with pytest.raises(ValueError, match="2 updates"):
        total.mean()


def test_the_serial_executor_weights_by_examples_and_works_as_worker_zero() -> None:
    clients = [Client(k, torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)) for k, n in enumerate((2, 6))]
    workers = []

    def shared_update(client: Client, worker: int) -> Update:
        workers.append(worker)
        return Update({"w": torch.full((3,), float(client.id))}, client.num_examples, {"loss": float(client.id)})

    result = mean_over(shared_update, clients, template={"w": torch.zeros(3)}, metric_names=["loss"])
    assert result.delta["w"].tolist() == [0.75] * 3 and result.metrics == {"loss": 0.75}
    assert (result.num_examples, result.count, workers) == (8, 2, [0, 0])


def test_eleven_million_parameters_take_well_under_a_second_per_client() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        update = {f"layer{index}": torch.full((190_000,), 1e-3) for index in range(58)}
        total = FixedPointSum(update, max_terms=3)
        total.add(update, 64, {})
        started = time.process_time()
        total.add(update, 64, {})
        assert time.process_time() - started < 0.8  # 0.09 s measured
    finally:
        torch.set_num_threads(before)
