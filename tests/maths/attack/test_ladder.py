"""When memory runs out. Simulators that run out beyond a limit; tiny nets."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad
from torch.overrides import _get_current_function_mode_stack

from gidef.attack import drain, naive, run_chunk
from gidef.attack.ladder import climb, rungs
from gidef.attack.program import LowProducts

CHUNK = tuple((o, 0) for o in range(4))


def width(tensor):
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return functorch.get_unwrapped(tensor).shape[functorch.maybe_get_bdim(tensor)]
        tensor = functorch.get_unwrapped(tensor)
    return 1


@pytest.fixture
def case(tiny):
    model = tiny.Net(activation=torch.nn.Tanh)
    params = {name: tensor.float() for name, tensor in tiny.weights(model).items()}

    def loss(params, known, images, labels, noise):
        return F.cross_entropy(functional_call(model, params, (images,)), labels)

    def simulate(params, *rest):
        return grad(loss)(params, *rest)

    made = [tiny.observe(tiny.simulator(model), tiny.weights(model), seed=seed)[0] for seed in range(4)]
    observations = [dataclasses.replace(one, params=params) for one in made]
    return observations, simulate, loss, naive(iterations=12, **tiny.settings)


def hungry(simulate, loss, *, most=1, low_only=False, error=torch.OutOfMemoryError("CUDA out of memory.")):
    """Runs out of memory with more attacks at once, or unless products are in bfloat16."""

    def limited(params, known, images, labels, noise):
        low = any(isinstance(mode, LowProducts) for mode in _get_current_function_mode_stack())
        inside = torch._C._functorch.is_functorch_wrapped_tensor(images)  # of a program, not of the check before it
        if inside and (width(images) > most or (low_only and not low)):
            raise error
        return simulate(params, known, images, labels, noise)

    if loss is not None:
        limited.loss = loss
    return limited


def climbed(case, simulate, **options):
    observations, _, _, settings = case
    told = []
    return drain(climb(CHUNK, observations, simulate, settings, notice=told.append, seed=0, **options)), told


def test_fewer_attacks_at_once_give_the_same_result(case):
    observations, simulate, loss, settings = case
    plain = drain(run_chunk(CHUNK, observations, simulate, settings, seed=0))
    for most, steps in ((4, 0), (2, 1), (1, 2)):
        rows, told = climbed(case, hungry(simulate, None, most=most))
        assert len(told) == steps, told
        torch.testing.assert_close(rows["images"], plain["images"], rtol=1e-4, atol=1e-5)
    assert "2 attacks at once" in told[0] and "1 attack at once" in told[1]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_a_cpu_s_lack_of_memory_counts_too(case, error):
    _, simulate, _, _ = case
    _, told = climbed(case, hungry(simulate, None, most=2, error=error))
    assert len(told) == 1


def test_then_parameters_and_targets_in_bfloat16(case):
    observations, simulate, loss, settings = case
    rows, told = climbed(case, hungry(simulate, None, low_only=True))
    assert "bfloat16_all" in told[-1] and len(told) == 3
    plain = drain(run_chunk(CHUNK, observations, simulate, settings, seed=0))
    assert rows["losses"].dtype == torch.float32 and (rows["loss"] < rows["losses"][:, 0]).all()
    torch.testing.assert_close(rows["losses"][:, 0], plain["losses"][:, 0], rtol=0.05, atol=0)


def test_at_last_the_module_itself_or_where_there_is_none_without_second_derivatives(case):
    _, simulate, loss, _ = case
    rows, told = climbed(case, hungry(simulate, loss, most=0))
    assert "central difference instead of double backward" in told[-1] and (rows["loss"] < rows["losses"][:, 0]).all()

    def never(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    def large(chunk):
        yield from ()
        return {"of": chunk}

    never.loss = never
    rows, told = climbed(case, never, large=large)
    assert rows == {"of": CHUNK} and "on the module itself" in told[-1]
    assert not any("central difference" in step for step in told), "that finds less, and the module form does not"
    with pytest.raises(torch.OutOfMemoryError):
        climbed(case, never)


def test_other_errors_are_raised_at_once(case):
    _, simulate, _, _ = case
    told = []
    observations, _, _, settings = case
    with pytest.raises(RuntimeError, match="broken"):
        drain(climb(CHUNK, observations, hungry(simulate, None, most=0, error=RuntimeError("broken")), settings, notice=told.append, seed=0))
    assert told == []


def test_a_coupling_keeps_its_starts_together(case):
    _, simulate, _, settings = case
    coupled = dataclasses.replace(settings, coupling=lambda images, groups, done, labels: (torch.zeros(len(images)), torch.zeros_like(images)))
    assert [rung.at_once for rung in rungs(coupled, simulate, 8, "float32", large=False)] == [8, 8]
