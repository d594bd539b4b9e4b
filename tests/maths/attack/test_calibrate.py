import json

import pytest
import torch

from gidef.attack import Programs, calibrate, joint, naive, run
from gidef.attack.calibrate import Calibration, Candidate, _forget_peak, _seconds, _worth_trying, available_bytes, fitting
from gidef.errors import InputError


def width(tensor):
    """Attacks that a simulator is called for at once; 0 outside a vectorised program."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return functorch.get_unwrapped(tensor).shape[functorch.maybe_get_bdim(tensor)]
        tensor = functorch.get_unwrapped(tensor)
    return 0


@pytest.fixture
def case(tiny):
    model = tiny.Net(sigma=0.5)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    observations = [tiny.observe(simulate, params, seed=seed, noise=tiny.draw_noise(seed))[0] for seed in range(4)]
    return observations, simulate, joint(noise_shape=(1, *tiny.latent), iterations=50, restarts=2, **tiny.settings)


class Clock:
    """Time that only the simulator's calls and a price per attack make pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def priced(simulate, clock, price):
    def called(params, known, images, labels, noise):
        clock.now += price(width(images) > 0)
        return simulate(params, known, images, labels, noise)

    return called


def test_the_mode_that_would_finish_first_is_chosen(case):
    observations, simulate, settings = case
    for price, mode in ((lambda batched: 10.0 if batched else 1.0, "loop"), (lambda batched: 1.0, "vmap")):
        clock = Clock()
        chosen = calibrate(observations, priced(simulate, clock, price), settings, seed=0, modes=("loop", "vmap"), clock=clock, budget_s=1e9)
        assert chosen.mode == mode, chosen
    assert chosen.at_once == 8 and [one.at_once for one in chosen.candidates] == [1, 1, 2, 4, 8]
    lines = chosen.lines()
    assert len(lines) == 5 and [line.endswith("<- chosen") for line in lines] == [False] * 4 + [True]


def test_attacks_are_shared_out_over_workers_before_a_program_grows(case):
    observations, simulate, settings = case
    chosen = calibrate(observations, simulate, settings, seed=0, modes=("vmap",), workers=4, iterations=1)
    assert max(one.at_once for one in chosen.candidates) == 2


def test_recording_and_compiling_are_tried_about_the_best_size_only():
    found = [Candidate("vmap", size, ms, 0.0) for size, ms in ((1, 9.0), (2, 5.0), (4, 3.0), (8, 4.0))]
    sizes = [1, 2, 4, 8, 16]
    assert [_worth_trying(mode, sizes, found) for mode in ("loop", "vmap", "traced", "compiled")] == [[1], sizes, [2, 4, 8], [4]]
    assert _worth_trying("compiled", sizes, []) == sizes


def test_recording_and_compiling_count_and_so_does_the_padding_of_the_last_program(tiny):
    settings = naive(iterations=99, **tiny.settings)
    assert _seconds(Candidate("traced", 8, 2.0, 3.0), 9, settings) == pytest.approx(3.0 + 16 * 0.2)
    assert _seconds(Candidate("vmap", 8, 2.0, 0.5), 9, settings) == pytest.approx(0.5 + 9 * 0.2)


def test_halving_counts_the_starts_that_are_left_and_a_program_for_each_rung(tiny):
    settings = naive(iterations=64, restarts=4, halving=2, **tiny.settings)
    # three observations, two a chunk: 8, 4 and 2 of them in a program, until iterations 16, 32 and 64, and the last evaluation
    assert _seconds(Candidate("traced", 9, 1.0, 3.0), 12, settings) == pytest.approx(3 * 3.0 + 1e-3 * (16 * 16 + 16 * 8 + 33 * 4))
    assert _seconds(Candidate("vmap", 9, 1.0, 3.0), 12, settings) == pytest.approx(3.0 + 1e-3 * (16 * 12 + 16 * 6 + 33 * 3))


def test_a_candidate_that_runs_out_of_memory_is_left_out_and_named(case):
    observations, simulate, settings = case

    def greedy(params, known, images, labels, noise):
        if width(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return simulate(params, known, images, labels, noise)

    chosen = calibrate(observations, greedy, settings, seed=0, modes=("vmap",), iterations=1)
    assert chosen.at_once in (1, 2) and "out of memory" in chosen.candidates[-1].error and "out of memory" in chosen.lines()[-1]


def test_on_a_cpu_programs_stay_within_the_memory_that_is_free(case):
    if not _forget_peak():
        pytest.skip("this machine does not let a process forget its peak")
    observations, simulate, settings = case
    clock = Clock()

    def wide(params, known, images, labels, noise):
        torch.ones(max(1, width(images)), 2**24)  # 64 MiB per attack, for a moment
        return simulate(params, known, images, labels, noise)

    how = {"seed": 0, "modes": ("vmap",), "clock": clock, "budget_s": 1e9, "iterations": 1}
    chosen = calibrate(observations, priced(wide, clock, lambda batched: 1.0), settings, memory_bytes=400 * 2**20, **how)
    assert [one.at_once for one in chosen.candidates] == [1, 2, 4, 8] and chosen.at_once == 4 and "would not fit" in chosen.candidates[-1].error
    peaks = [one.peak_bytes / 2**20 for one in chosen.candidates[:3]]
    assert all(64 * size - 8 <= peak < 64 * size + 60 for size, peak in zip((1, 2, 4), peaks, strict=True)), peaks
    free = calibrate(observations, priced(wide, clock, lambda batched: 1.0), settings, **how)  # of this machine's own
    assert free.at_once == 8
    assert [fitting(one, 400 * 2**20) for one in (chosen.candidates[2], Candidate("vmap", 1, 1.0, 0.0, 2**30), Candidate("vmap", 1, 1.0, 0.0))][1:] == [1, 1024]
    assert 4 <= fitting(chosen.candidates[2], 400 * 2**20) <= 6


@pytest.mark.parametrize(
    ("line", "files", "free"),
    [
        ("0::/", {}, 8000),
        ("0::/job/step", {"job/memory.max": "max", "job/memory.current": "5", "job/memory.stat": "inactive_file 1"}, 8000),
        ("0::/job/step", {"job/memory.max": "4000000", "job/memory.current": "3000000", "job/memory.stat": "anon 7\ninactive_file 24000"}, 1000),
        ("4:cpuset,memory:/a/b", {"memory/a/memory.limit_in_bytes": "3072000", "memory/a/memory.usage_in_bytes": "1024000", "memory/a/memory.stat": "total_inactive_file 0"}, 2000),
        ("4:cpuset:/a/b", {"memory/a/memory.limit_in_bytes": "1024", "memory/a/memory.usage_in_bytes": "0", "memory/a/memory.stat": "x 0"}, 8000),
    ],
)  # fmt: skip
def test_free_memory_ends_where_a_control_group_s_limit_does(line, files, free, tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    8000 kB\n")
    (proc / "self" / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{text}\n")
    assert available_bytes(proc, groups) == 1024 * free
    assert available_bytes(tmp_path / "nowhere", groups) is None


def test_no_usable_candidate_is_an_error_with_the_reason(case):
    observations, simulate, settings = case

    def never(params, known, images, labels, noise):
        if width(images):
            raise RuntimeError("no batching rule for this operator")
        return simulate(params, known, images, labels, noise)

    with pytest.raises(InputError, match="no batching rule"):
        calibrate(observations, never, settings, seed=0, modes=("vmap",))


def test_a_calibration_survives_json_and_its_programs_serve_the_attack(case):
    observations, simulate, settings = case
    programs = Programs()
    chosen = calibrate(observations, simulate, settings, seed=0, modes=("traced",), at_once=4, iterations=1, programs=programs)
    assert Calibration.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    run(observations, lambda: simulate, settings, seed=0, mode=chosen.mode, at_once=chosen.at_once, programs=programs)
    assert len(programs._made) == 1
