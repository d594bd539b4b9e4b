"""The attack engine on a GPU beside the CPU: the same numbers, no waiting, less at once when memory runs out, every attack of a job."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_syncs import PROGRAMS as SYNCED
from torch import nn
from torch.func import functional_call, grad

from gidef.attack import (
    Matching,
    averaged,
    deep_leakage,
    drain,
    gradinversion,
    joint,
    naive,
    run_chunk,
)
from gidef.attack.client import gradient_of, observed
from gidef.attack.engine import CURVE_POINTS
from gidef.attack.ladder import climb
from gidef.attack.lbfgs import Lbfgs
from gidef.attack.optimisers import Momentum
from gidef.attack.predictor import Reader
from gidef.attack.unmix import latent_basis
from gidef.metrics import psnr_db
from gidef.types import Observation

DEVICE = torch.device("cuda:0")
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

MODES = ("loop", "vmap", "traced")


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """As jobs have it: PyTorch's default rounds a GPU's convolutions to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


NOISE = {"noise_shape": (2, 4, 3, 3)}


def moved(observation: Observation, device=DEVICE) -> Observation:
    """An observation as a run on that device makes it: all of it is there, labels included."""
    places = {place: {name: t.to(device) for name, t in getattr(observation, place).items()} for place in ("params", "update", "known")}
    return dataclasses.replace(observation, **places, labels=observation.labels.to(device))


def posed(tiny, count=3, size=2, activation=nn.Tanh, dtype=torch.float64):
    """(observations on the CPU, private images, a simulator with its loss) of one net with noise on its latent."""
    model = tiny.Net(sigma=0.5, activation=activation)
    params = tiny.weights(model)

    def loss(params, known, images, labels, noise):
        return F.cross_entropy(functional_call(model, params, (images, noise)), labels)

    def simulate(params, known, images, labels, noise):
        return grad(loss)(params, known, images, labels, noise)

    simulate.loss = loss
    seen = [tiny.observe(simulate, params, size=size, seed=seed, noise=tiny.draw_noise(seed, size)) for seed in range(count)]
    short = {name: t.to(dtype) for name, t in params.items()}
    found = [dataclasses.replace(one, params=short, update={name: t.to(dtype) for name, t in one.update.items()}) for one, _, _ in seen]
    return found, torch.stack([images for _, images, _ in seen]), simulate


def attacked(observations, simulate, settings: Matching, device=DEVICE, **options):
    """Every start of every observation in one chunk."""
    chunk = tuple((o, start) for o in range(len(observations)) for start in range(settings.starts))
    here = [moved(one, device) for one in observations]
    shared = {id(one.params): moved_params.params for one, moved_params in zip(observations, here, strict=True)}
    here = [dataclasses.replace(one, params=shared[id(before.params)]) for one, before in zip(here, observations, strict=True)]
    return drain(run_chunk(chunk, here, simulate, settings, seed=0, device=device, **options))


def mean_psnr(result, truth):
    rows = result["attacks"][:, 0]
    return float(psnr_db(result["images"].flatten(0, 1), truth[rows].float().flatten(0, 1)).mean())


# --- the same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_float64_is_the_cpus(tiny, mode):
    observations, _, simulate = posed(tiny)
    settings = joint(**NOISE, iterations=20, restarts=2, snapshots=3, **tiny.settings)
    expected = attacked(observations, simulate, settings, torch.device("cpu"), dtype=torch.float64)
    found = attacked(observations, simulate, settings, dtype=torch.float64, mode=mode, at_once=4)
    assert (found["failure"] == 0).all() and all(tensor.device.type == "cpu" for tensor in found.values())
    for name in ("images", "noise", "losses", "loss", "fit"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6, equal_nan=True)
    for name in ("attacks", "labels", "iterations", "failure"):
        assert torch.equal(found[name], expected[name])
    torch.testing.assert_close(found["snapshots"], expected["snapshots"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["halving", "patience", "recovered labels", "searched labels", "L-BFGS", "consistent restarts", "l2", "per layer"])
def test_float64_is_the_cpus_with_other_settings(tiny, kind):
    observations, _, simulate = posed(tiny, count=2)
    quiet = lambda params, known, images, labels, noise: simulate(params, known, images, labels, None)  # noqa: E731
    settings = {
        "halving": lambda: naive(iterations=16, restarts=4, halving=2, **tiny.settings),
        "patience": lambda: naive(iterations=16, restarts=2, patience=2, **tiny.settings),
        "recovered labels": lambda: naive(iterations=8, **tiny.settings),
        "searched labels": lambda: naive(iterations=8, search_labels=True, **tiny.settings),
        "L-BFGS": lambda: deep_leakage(iterations=3, optimiser=Lbfgs(history=3, max_evaluations=4, max_search=3), **tiny.settings),
        "consistent restarts": lambda: gradinversion(iterations=10, restarts=3, **tiny.settings),
        "l2": lambda: naive(iterations=8, distance="l2", **tiny.settings),
        "per layer": lambda: naive(iterations=8, distance="cosine_layers", **tiny.settings),
    }[kind]()
    granted = [dataclasses.replace(one, labels=None) for one in observations] if kind.endswith("labels") else observations

    def run(device):
        here = [dataclasses.replace(moved(one, device), labels=two.labels) for one, two in zip(observations, granted, strict=True)]
        chunk = tuple((o, start) for o in range(len(here)) for start in range(settings.starts))
        return drain(run_chunk(chunk, here, quiet, settings, seed=0, device=device, dtype=torch.float64))

    expected, found = run(torch.device("cpu")), run(DEVICE)
    for name in ("attacks", "labels", "failure", "iterations"):
        assert torch.equal(found[name], expected[name]), name
    for name in ("images", "loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_modes_in_float32_reach_the_same_psnr(tiny):
    observations, truth, simulate = posed(tiny, dtype=torch.float32)
    settings = joint(**NOISE, iterations=50, restarts=2, **tiny.settings)
    cpu = mean_psnr(attacked(observations, simulate, settings, torch.device("cpu")), truth)
    found = {mode: mean_psnr(attacked(observations, simulate, settings, mode=mode), truth) for mode in MODES}
    assert all(abs(value - cpu) < 0.2 for value in found.values()), (cpu, found)


@pytest.mark.slow
def test_a_compiled_program_reaches_the_same_psnr_and_is_told_of_if_it_cannot(tiny):
    from gidef.attack import Programs

    observations, truth, simulate = posed(tiny, dtype=torch.float32)
    settings, programs = joint(**NOISE, iterations=50, restarts=2, **tiny.settings), Programs()
    expected = mean_psnr(attacked(observations, simulate, settings), truth)
    found = attacked(observations, simulate, settings, mode="compiled", at_once=4, programs=programs)
    assert abs(mean_psnr(found, truth) - expected) < 0.2 and programs.notices == []


@pytest.mark.parametrize(("form", "tolerance"), [("forward_over_reverse", 1e-7), ("central_difference", 1e-4)])
def test_first_order_forms_have_the_gradient_of_double_backward(tiny, form, tolerance):
    observations, _, simulate = posed(tiny)
    settings = joint(**NOISE, iterations=4, optimiser=Momentum(momentum=0.0), lr=10.0, difference_step=1e-6, **tiny.settings)
    expected = attacked(observations, simulate, settings, dtype=torch.float64)
    assert (expected["images"] - attacked(observations, simulate, dataclasses.replace(settings, iterations=0), dtype=torch.float64)["images"]).abs().max() > 0.01
    for mode in MODES:
        found = attacked(observations, simulate, dataclasses.replace(settings, form=form), dtype=torch.float64, mode=mode)
        for name in ("images", "noise", "losses"):
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def test_a_latent_is_read_in_closed_form():
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 8, 4, 4, generator=draw, dtype=torch.float64)
    layer = nn.Conv2d(8, 24, 3, padding=1).double()
    slope = torch.randn(1, 24, 4, 4, generator=draw, dtype=torch.float64)
    weight, bias = torch.autograd.grad((layer(latent) * slope).sum(), list(layer.parameters()))
    found = latent_basis({"weight": weight.to(DEVICE), "bias": bias.to(DEVICE)}, Reader("weight", "bias", (3, 3), (1, 1), (1, 1)), (8, 4, 4), 1)
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu(), latent, rtol=1e-6, atol=1e-6)


# --- the host does not wait ----------------------------------------------------------------------------------------------


class Watched:
    """An optimiser after whose step `first` nothing may wait for the device, until its step `last` is over."""

    def __init__(self, real, first, last):
        self._real, self._first, self._last, self.begin, self.steps = real, first, last, real.begin, 0

    def step(self, *arguments, **named):
        result = self._real.step(*arguments, **named)
        self.steps += 1
        if self.steps == self._first:
            torch.cuda.set_sync_debug_mode("error")
        if self.steps == self._last:
            torch.cuda.set_sync_debug_mode("default")
        return result


PROGRAMS = SYNCED | {"Adam": lambda tiny: naive(**tiny.settings), "patience": lambda tiny: naive(patience=30, **tiny.settings)}


@pytest.mark.parametrize(("name", "mode"), [*((name, "vmap") for name in PROGRAMS), ("joint", "traced"), ("joint", "loop"), ("central difference", "traced")])
def test_no_step_waits_for_the_device_between_reports(tiny, name, mode):
    observations, _, simulate = posed(tiny, count=1, dtype=torch.float32)
    settings = dataclasses.replace(PROGRAMS[name](tiny), iterations=12)
    watched = Watched(settings.descent(), 5, 11)
    settings = dataclasses.replace(settings, optimiser=watched)
    if name == "drawn":
        known_noise = simulate
        simulate = averaged(lambda params, known, images, labels, noise: known_noise(params, known, images, labels, noise))
    elif settings.noise_shape is None:
        plain = simulate
        simulate = lambda params, known, images, labels, noise: plain(params, known, images, labels, None)  # noqa: E731
        simulate.loss = lambda params, known, images, labels, noise: plain.loss(params, known, images, labels, None)
    try:
        found = attacked(observations, simulate, settings, mode=mode, every=10**6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched.steps == 12 and (found["failure"] == 0).all() and found["losses"].shape[1] == min(13, CURVE_POINTS)


def test_a_step_that_waits_is_noticed(tiny):
    """The guard can fail: in a loop, where a prior that reads a value runs."""
    observations, _, simulate = posed(tiny, count=1, dtype=torch.float32)

    def asking(point):
        return point.images.square().mean() * (2.0 if float(point.labels.detach().sum()) > 0 else 1.0)

    settings = joint(**NOISE, priors=((1.0, asking),), iterations=12, **tiny.settings)
    settings = dataclasses.replace(settings, optimiser=Watched(settings.descent(), 5, 11))
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            attacked(observations, simulate, settings, mode="loop", every=10**6)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- when memory runs out ------------------------------------------------------------------------------------------------


def test_a_lack_of_memory_leads_to_fewer_attacks_at_once(tiny):
    observations, _, simulate = posed(tiny, count=4)
    settings, told, left = joint(**NOISE, iterations=6, **tiny.settings), [], [1]

    def hungry(params, known, images, labels, noise):
        if left[0] and torch._C._functorch.is_functorch_wrapped_tensor(images):
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return simulate(params, known, images, labels, noise)

    chunk = tuple((o, 0) for o in range(4))
    here = [moved(one) for one in observations]
    options = {"seed": 0, "device": DEVICE, "dtype": torch.float64}
    expected = drain(run_chunk(chunk, here, simulate, settings, **options))
    found = drain(climb(chunk, here, hungry, settings, notice=told.append, **options))
    assert len(told) == 1 and "2 attacks at once" in told[0]
    torch.testing.assert_close(found["images"], expected["images"], rtol=1e-6, atol=1e-6)


def test_a_real_lack_of_memory_does_so_too():
    """32 attacks on wide convolutions of 64 pixels take more than a GiB, few of them less than half of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 256, 3, padding=1), nn.Tanh(), nn.Conv2d(256, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).to(DEVICE)
    seen = observed(model, torch.rand(1, 1, 64, 64, device=DEVICE), torch.tensor([1], device=DEVICE))
    settings, told, chunk = naive(image_shape=(1, 64, 64), num_classes=3, iterations=1, restarts=32), [], tuple((0, start) for start in range(32))
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(DEVICE) + 400 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(DEVICE).total_memory, DEVICE)
    try:
        found = drain(climb(chunk, [seen], gradient_of(model), settings, notice=told.append, seed=0, device=DEVICE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        torch.cuda.empty_cache()
    assert told and told[0].startswith("memory ran out with 32 attacks at once") and "bfloat16" not in told[-1], told
    assert len(found["attacks"]) == 32 and (found["failure"] == 0).all() and found["images"].isfinite().all()


# --- precisions ----------------------------------------------------------------------------------------------------------


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "bfloat16_all"])
@pytest.mark.parametrize("mode", MODES)
def test_lower_precisions_run_and_leave_the_switches_as_they_were(tiny, precision, mode):
    observations, truth, simulate = posed(tiny, dtype=torch.float32)
    settings, before = joint(**NOISE, iterations=30, **tiny.settings), flags()
    expected = attacked(observations, simulate, settings)
    found = attacked(observations, simulate, settings, precision=precision, mode=mode)
    assert flags() == before and (found["failure"] == 0).all()
    assert abs(mean_psnr(found, truth) - mean_psnr(expected, truth)) < 2.0
    assert (found["loss"] < found["losses"][:, 0]).all()


def test_switches_are_as_they_were_after_an_error_in_tf32(tiny):
    observations, _, simulate = posed(tiny, dtype=torch.float32)
    before, seen = flags(), []

    def broken(params, known, images, labels, noise):
        if torch._C._functorch.is_functorch_wrapped_tensor(images):
            seen.append(flags())
            raise ValueError("broken")
        return simulate(params, known, images, labels, noise)

    with pytest.raises(ValueError, match="broken"):
        attacked(observations, broken, joint(**NOISE, iterations=3, **tiny.settings), precision="tf32")
    assert seen == [(True, True)] and flags() == before


@pytest.mark.parametrize("form", ["double_backward", "central_difference"])
def test_attention_fused_where_no_second_derivative_is_asked_for_gives_the_same_update(form):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=8, depth=1, embed_dim=16, num_heads=2).eval().to(DEVICE)
    labels = torch.tensor([1, 0], device=DEVICE)
    seen = observed(model, torch.rand(2, 3, 16, 16, device=DEVICE), labels)
    settings = naive(image_shape=(3, 16, 16), num_classes=3, iterations=5, form=form)
    plain, fused = gradient_of(model), gradient_of(model, fused_attention=form != "double_backward")
    options = {"seed": 0, "device": DEVICE, "mode": "loop"}
    expected = drain(run_chunk(((0, 0),), [seen], plain, dataclasses.replace(settings, form="double_backward"), **options))
    found = drain(run_chunk(((0, 0),), [seen], fused, settings, **options))
    assert (found["failure"] == 0).all() and found["losses"].isfinite().all()
    torch.testing.assert_close(found["first_fit"], expected["first_fit"], rtol=1e-2, atol=1e-6)


# --- whole jobs ----------------------------------------------------------------------------------------------------------


def job(folder: Path, device, **changes):
    """results.json of a small run."""
    from gidef.config import JointMatching, LearnedPerturbation, NaiveMatching, Speed, Undefended
    from gidef.job import run_recipe
    from tests.small_run import RECIPE

    short = {"iterations": 10, "restarts": 1}
    evaluation = dataclasses.replace(RECIPE.evaluation, checkpoints=("untrained", "final"), judge_epochs=1)
    fields = {
        "defences": {"undefended": Undefended(), "learned": LearnedPerturbation()}, "attacks": {"naive": NaiveMatching(**short), "joint": JointMatching(**short)},
        "evaluation": evaluation, "speed": Speed(device=str(device), workers=1, attack_mode="vmap", attacks_at_once=2), "out": str(folder),
    } | changes  # fmt: skip
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        return run_recipe(dataclasses.replace(RECIPE, **fields), "on a gpu")
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


def failures(folder: Path) -> set[tuple[str, str, str]]:
    """(defence, attack, error) of the attacks of a run's record that failed."""
    from tests.ranks.launch import record

    return {(line["defence"], line["attack"], line["error"]) for line in record(folder) if line["kind"] == "attack" and line["status"] != "ok"}


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIDEF_OFFLINE", "1")


def test_a_job_finds_what_it_finds_on_the_cpu(tmp_path):
    found, expected = job(tmp_path / "gpu", DEVICE), job(tmp_path / "cpu", "cpu")
    assert not failures(tmp_path / "gpu")
    key = lambda row: (row["defence"], row["attack"], row["checkpoint"])  # noqa: E731
    theirs = {key(row): row for row in expected["rows"]}
    assert {key(row) for row in found["rows"]} == theirs.keys() and len(theirs) >= 6
    for row in found["rows"]:
        if row["checkpoint"] == "untrained" or row["defence"] == "undefended":  # training with noise draws it on the device, other than a CPU
            assert row["psnr_db"]["mean"] == pytest.approx(theirs[key(row)]["psnr_db"]["mean"], abs=0.3), key(row)


@pytest.mark.parametrize("part", range(3))
def test_every_defence_is_attacked(tmp_path, part):
    from gidef import config
    from tests.small_run import RECIPE

    short = {"iterations": 2, "restarts": 1}
    defences = {
        "mixup": config.MixUp(), "instahide": config.InstaHide(), "ats": config.ATS(), "dcs": config.DCS(iterations=3), "pruning": config.Pruning(), "noise": config.GradientNoise(),
        "clipping": config.Clipping(), "sign": config.Sign(), "quantised": config.Quantisation(), "censor": config.Censor(), "soteria": config.Soteria(), "graddefense": config.GradDefense(),
        "isotropic": config.IsotropicNoise(), "bido": config.BiDO(), "precode": config.Precode(), "cvb": config.CVB(), "capacity": config.CapacityNoise(), "secure": config.SecureAggregation(),
        "together": (config.MixUp(), config.LearnedPerturbation(ramp=0.0), config.Pruning(share=0.5)),
    }  # fmt: skip
    defences = {name: one for place, (name, one) in enumerate(defences.items()) if place % 3 == part}  # a contact sheet of all would be too wide
    attacks = {"naive": config.NaiveMatching(**short), "joint": config.JointMatching(**short)}
    few = dataclasses.replace(RECIPE.evaluation, checkpoints=("final",), num_victims=2, batch_size=2, judge_epochs=1)
    rows = job(tmp_path / "run", DEVICE, defences=defences, attacks=attacks, evaluation=few)["rows"]
    assert {row["defence"] for row in rows} == set(defences) and not failures(tmp_path / "run")


@pytest.mark.parametrize("mode", ["traced", "compiled"])
def test_guessed_masks_and_two_stages_are_one_graph_and_find_what_vectorised_programs_do(tmp_path, mode, capsys):
    from gidef import config

    defences = {"guessed": (config.Pruning(share=0.5), config.GradientNoise(std=1e-3))}
    attacks = {
        "joint": config.JointMatching(iterations=20, restarts=1), "generative": config.GenerativePrior(iterations=20, restarts=1, fit_steps=20, code_share=0.5),
    }  # fmt: skip
    found = {}
    for one in ("vmap", mode):
        speed = config.Speed(device=str(DEVICE), workers=1, attack_mode=one, attacks_at_once=2)
        found[one] = {row["attack"]: row for row in job(tmp_path / one, DEVICE, defences=defences, attacks=attacks, speed=speed)["rows"] if row["attack"] in attacks}
        assert found[one].keys() == attacks.keys() and not failures(tmp_path / one)
    said = capsys.readouterr()
    assert "could not be" not in said.out + said.err  # recorded, compiled, captured
    for attack in attacks:
        assert found[mode][attack]["psnr_db"]["mean"] == pytest.approx(found["vmap"][attack]["psnr_db"]["mean"], abs=0.5), attack


def test_every_attack_runs_and_none_fails_for_the_device_s_sake(tmp_path):
    from gidef.config import PRESETS
    from tests.ranks.launch import results, run
    from tests.recipes.test_suite import attack

    folder = tmp_path / "tiny" / "run"
    run(1, "tiny.py", "--out", str(folder), "--evaluation.checkpoints", "untrained", "--speed.device", str(DEVICE))
    names = [name for name in PRESETS if name not in ("standard", "quick", "smoke", "surrogate-model")]
    common = ("--device", str(DEVICE), "--mode", "vmap", "--at-once", "2", "--iterations", "3", "--steps", "4", "--victims", "2")
    attack(folder, tmp_path / "out", "--attack", *names, *common)
    rows = results(tmp_path / "out")["rows"]
    assert {row["attack"] for row in rows if row["defence"] == "learned"} == set(names) - {"analytic"}  # no biased layer sees the image
    assert not failures(tmp_path / "out")
    attack(folder, tmp_path / "deltas", "--attack", "surrogate-model", "naive", "--release", "delta", "--local-steps", "2", "--batch-size", "2", *common)
    assert {row["attack"] for row in results(tmp_path / "deltas")["rows"]} == {"surrogate-model", "naive"} and not failures(tmp_path / "deltas")
