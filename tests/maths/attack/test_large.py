"""The first-order form on a module as it is, against double backward in the vectorised program. Tiny nets, float64."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from gidef.attack import Searched, drain, joint, naive, run_chunk, select
from gidef.attack.batch import UNTOLD
from gidef.attack.large import _dot, _Passes, invert_large, on_module
from gidef.attack.matching import distance
from gidef.errors import InputError
from gidef.types import Observation

STEP = {"difference_step": 1e-6}


class Block(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused, self.runs = fused, 0
        self.norm, self.norm2, self.qkv, self.project = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, tokens):
        self.runs += 1
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        tokens = tokens + self.project(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.patch, self.place = nn.Conv2d(2, 8, 2, 2), nn.Parameter(torch.zeros(1, 9, 8))
        self.blocks, self.head = nn.ModuleList([Block(fused) for _ in range(3)]), nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


class Kinks(nn.Module):
    """Every kind of kink, in place and out of place; `again` calls one module twice. With timm's switch for checkpointing."""

    def __init__(self, again=False):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.relu, self.leaky, self.six, self.box = nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.ReLU6(), nn.Hardtanh(-0.3, 0.7)
        self.relu2 = self.relu if again else nn.ReLU()
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(54, 3)
        self.grad_checkpointing, self.runs = False, 0

    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    def front(self, images):
        self.runs += 1
        return self.relu(self.first(images))

    def middle(self, first):
        return self.relu2(self.second(first)) + self.leaky(first - 0.2) + self.box(first - 0.5)

    def end(self, second):
        return self.head(self.pool(self.six(4 * self.third(second))).flatten(1))

    def forward(self, values):
        for stage in (self.front, self.middle, self.end):
            values = checkpoint(stage, values, use_reentrant=False) if self.grad_checkpointing else stage(values)
        return values


def gradient_of(model):
    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(functional_call(model, p, (images,) if noise is None else (images, noise)), labels))(params)

    return simulate


@pytest.fixture
def transformer(tiny):
    """(the module, with fused attention; its twin without; an observation)"""
    twin = Transformer(fused=False).double()
    params = tiny.weights(twin)
    model = Transformer().double()
    return model, twin, tiny.observe(gradient_of(twin), params, size=2)[0]


@pytest.fixture
def smooth(tiny):
    """(a convolutional net without kinks, an observation)"""
    model = tiny.Net(activation=nn.Tanh).double()
    return model, tiny.observe(gradient_of(model), tiny.weights(model), size=2)[0]


def double_backward(observation, model, settings, chunk=((0, 0),), simulate=None):
    return drain(run_chunk(chunk, [observation], simulate or gradient_of(model), settings, seed=3, dtype=torch.float64))


def large(observation, model, settings, **options):
    return drain(invert_large(observation, model, settings, seed=3, **options))


def same(found, reference, tolerance=1e-4):
    assert found.keys() == reference.keys()
    for name in reference:
        assert found[name].dtype == reference[name].dtype, name
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[name], reference[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=message)


# --- against double backward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "l2", "cosine_layers"])
def test_images_are_those_of_double_backward(tiny, smooth, name):
    model, observation = smooth
    settings = naive(iterations=8, distance=name, snapshots=2, **STEP, **tiny.settings)
    found = large(observation, model, settings)
    same(found, double_backward(observation, model, settings))
    assert found["loss"] < found["losses"][0, 0] and not torch.equal(found["images"][0], found["snapshots"][0, 0].float())


def test_fused_attention_is_attacked_as_plain_attention_is(tiny, transformer):
    model, twin, observation = transformer
    settings = naive(iterations=8, **STEP, **tiny.settings)
    same(large(observation, model, settings), double_backward(observation, twin, settings))


@pytest.mark.parametrize("width", [None, (1.0, 0.1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kinks_are_held_flat_or_curved_as_in_double_backward(tiny, width, checkpointing):
    model = Kinks(again=not checkpointing).double()
    observation = tiny.observe(gradient_of(copy.deepcopy(model)), tiny.weights(model), size=2)[0]
    # wide enough a step that free gates would open and close within it
    settings = naive(iterations=6, kink_width=width, difference_step=1e-4, **tiny.settings)
    found = large(observation, model, settings, checkpointing=checkpointing)
    # three forward passes an iteration, and three recomputations
    assert model.runs == (6 if checkpointing else 3) * 7 and not model.grad_checkpointing
    assert not any("forward" in vars(module) for module in model.modules())
    same(found, double_backward(observation, copy.deepcopy(model), settings))


def test_a_module_that_checkpointing_calls_twice_keeps_its_kinks_free(tiny):
    model = Kinks(again=True).double()
    observation = tiny.observe(gradient_of(copy.deepcopy(model)), tiny.weights(model))[0]
    settings = naive(iterations=10, difference_step=0.03, **tiny.settings)
    found = large(observation, model, settings, checkpointing=True)
    assert found["failure"] == 0 and found["loss"] < 0.7 * found["losses"][0, 0]


def test_restarts_variants_halving_and_patience_run_as_in_the_vectorised_program(tiny, smooth):
    model, observation = smooth
    settings = naive(iterations=8, restarts=2, halving=2, variants=({"tv": 1e-3}, {"tv": 1e-2}), patience=2, **STEP, **tiny.settings)
    chunk = tuple((0, start) for start in range(settings.starts))
    found, reference = large(observation, model, settings, chunk=chunk), double_backward(observation, model, settings, chunk)
    same(found, reference)
    assert (found["iterations"] < 9).any() and select([found], 1)[0].restart == select([reference], 1)[0].restart


def test_noise_labels_and_priors_are_those_of_the_vectorised_program(tiny):
    model = tiny.Net(sigma=0.5, activation=nn.Tanh).double()
    simulate = gradient_of(model)
    observation = tiny.observe(simulate, tiny.weights(model), size=2, noise=tiny.draw_noise(0, 2))[0]
    priors = ((0.1, lambda point: (point.images - 0.4).square().mean() + point.noise.mean() ** 2 + 0 * point.params["encoder.0.bias"].sum()),)
    settings = joint(noise_shape=(2, *tiny.latent), search_labels=True, iterations=8, priors=priors, **STEP, **tiny.settings)
    same(large(observation, model, settings), double_backward(observation, model, settings))


def test_a_code_is_searched_and_what_renders_it_collects_no_gradients(tiny, smooth):
    model, observation = smooth
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 72), nn.Sigmoid(), nn.Unflatten(1, tiny.shape)).double()
    settings = naive(iterations=8, render=network, code_shape=(5,), **STEP, **tiny.settings)
    same(large(observation, model, settings), double_backward(observation, model, settings))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_coupling_sees_all_starts(tiny, smooth):
    model, observation = smooth

    def together(images, groups, done, *_):
        apart = images - images.mean(0, keepdim=True)
        return apart.square().sum((1, 2, 3, 4)), 2 * apart

    settings = naive(iterations=5, restarts=2, coupling=together, **STEP, **tiny.settings)
    chunk = ((0, 0), (0, 1))
    same(large(observation, model, settings, chunk=chunk), double_backward(observation, model, settings, chunk))


def test_only_the_released_tensors_are_matched_and_only_granted_parameters_are_set(tiny, smooth):
    model, observation = smooth
    kept = {name: tensor for name, tensor in observation.update.items() if "predictor.3" not in name}
    known = {name: observation.params[name] for name in observation.params if "predictor.3" in name}
    shared = {name: observation.params[name] for name in kept}
    observation = dataclasses.replace(observation, params=shared, update=kept, known=known)
    settings = naive(iterations=6, **STEP, **tiny.settings)

    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(functional_call(model, {**known, **p}, (images,)), labels))(params)

    same(large(observation, model, settings), double_backward(observation, model, settings, simulate=simulate))


def test_labels_that_are_not_granted_are_recovered(tiny, smooth):
    model, observation = smooth
    settings = naive(iterations=2, **STEP, **tiny.settings)
    hidden = dataclasses.replace(observation, labels=None)
    same(large(hidden, model, settings), double_backward(hidden, model, settings))


# --- modules as they come ---------------------------------------------------------------------------------------------


def test_blocks_are_checkpointed_with_the_same_numbers(tiny, transformer):
    model, _, observation = transformer
    settings = naive(iterations=4, **STEP, **tiny.settings)
    plain = large(observation, model, settings)
    runs = [block.runs for block in model.blocks]
    again = large(observation, model, settings, checkpointing=True)
    assert [block.runs for block in model.blocks] == [3 * count for count in runs], "twice as many runs as before"
    same(again, plain, 1e-7)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_compiled_module_is_attacked_under_its_plain_names(tiny, smooth):
    model, observation = smooth
    settings = naive(iterations=3, **STEP, **tiny.settings)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    same(large(observation, compiled, settings), large(observation, model, settings), 1e-6)


def test_parameters_in_bfloat16_keep_scalars_and_images_in_float32(tiny, transformer):
    model, _, observation = transformer
    settings = naive(iterations=20, **tiny.settings)
    plain = large(observation, copy.deepcopy(model).float(), settings)
    low = copy.deepcopy(model).bfloat16()
    found = large(observation, low, settings)
    for name, parameter in low.named_parameters():
        assert torch.equal(parameter, observation.params[name].bfloat16()), name
    assert found["images"].dtype == found["losses"].dtype == torch.float32
    torch.testing.assert_close(found["losses"][:, 0], plain["losses"][:, 0], rtol=0.02, atol=0)
    assert found["loss"] < 0.5 * found["losses"][0, 0] and plain["loss"] < 0.5 * plain["losses"][0, 0]


def test_the_module_comes_back_bit_by_bit_with_its_flags_and_buffers(tiny):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model[0].weight.requires_grad_(False)
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    update = {name: torch.randn_like(tensor) for name, tensor in params.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    observation = Observation(params, update, 2, labels=torch.tensor([0, 1]))
    for checkpointing in (False, True):
        large(observation, model, naive(iterations=3, **tiny.settings), checkpointing=checkpointing)
        assert all(torch.equal(parameter, params[name]) and parameter.grad is None for name, parameter in model.named_parameters())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        assert [parameter.requires_grad for parameter in model.parameters()] == [False, *[True] * 5]


@pytest.mark.parametrize("call", [2, 3])
def test_an_error_while_parameters_are_moved_puts_them_back(tiny, smooth, call):
    model, observation = smooth
    calls, seen = [], []

    def loss(logits, labels):
        calls.append(0)
        seen.append(model.predictor[1].weight.detach().clone())
        if len(calls) == call:
            raise torch.OutOfMemoryError("out of memory")
        return F.cross_entropy(logits, labels)

    with pytest.raises(torch.OutOfMemoryError):
        large(observation, model, naive(iterations=3, **tiny.settings), loss=loss)
    assert not torch.equal(seen[0], seen[-1]), "the error came before anything moved"
    assert all(torch.equal(parameter, observation.params[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_and_the_observed_update_are_not_copied_and_theta_rests_in_the_gradient(tiny, smooth, monkeypatch):
    model, observation = smooth
    observation = dataclasses.replace(observation, params={name: parameter.detach() for name, parameter in model.named_parameters()})
    places, watched = [parameter.data_ptr() for parameter in model.parameters()], []
    move = _Passes._move

    def watching(self, residuals, *rest):
        inside = [residual.data_ptr() for residual in residuals]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        move(self, residuals, *rest)
        assert [residual.data_ptr() for residual in residuals] == inside
        assert all(torch.equal(residual, theta) for residual, theta in zip(residuals, before, strict=True))
        watched.append([tensor.data_ptr() for tensor in self.observed])

    monkeypatch.setattr(_Passes, "_move", watching)
    large(observation, model, naive(iterations=2, **tiny.settings))
    assert watched[-1] == [tensor.data_ptr() for tensor in observation.update.values()]
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["cosine", "l2", "cosine_layers"])
def test_the_streamed_distance_its_slope_and_its_length_are_those_of_autograd(tiny, smooth, name):
    model, observation = smooth
    draw = torch.Generator().manual_seed(0)
    update = {key: torch.randn(tensor.shape, generator=draw, dtype=torch.float64) for key, tensor in observation.update.items()}
    update["encoder.1.bias"].zero_()
    gradients = {key: 3 * tensor + torch.randn(tensor.shape, generator=draw, dtype=torch.float64) for key, tensor in update.items()}
    norm = sum(tensor.square().sum() for tensor in update.values()).sqrt()
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in gradients.items()}
    expected = distance(name, leaves, {key: tensor / norm for key, tensor in update.items()}, 1 / norm)
    slopes = torch.autograd.grad(expected, list(leaves.values()))

    settings = naive(distance=name, **tiny.settings)
    passes = _Passes(model, dict(model.named_parameters()), dataclasses.replace(observation, update=update), settings, F.cross_entropy)
    residuals = list(gradients.values())
    with torch.no_grad():
        fit, parts, length = passes._residuals(residuals)
    torch.testing.assert_close(fit, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(length, sum(slope.square().sum() for slope in slopes).sqrt(), rtol=1e-9, atol=0)
    for slope, residual, observed, (a, b) in zip(slopes, residuals, update.values(), parts, strict=True):
        torch.testing.assert_close(a * residual + b * observed, slope, rtol=1e-8, atol=1e-12)


def test_long_tensors_are_summed_in_stretches(monkeypatch):
    monkeypatch.setattr("gidef.attack.large.STRETCH", 7)
    left, right = torch.rand(5, 4, 3), torch.rand(5, 4, 3)
    torch.testing.assert_close(_dot(left, right.bfloat16()), (left.double() * right.bfloat16().double()).sum(), rtol=1e-6, atol=0)
    assert _dot(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


# --- failures and bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [0.0, float("nan"), float("inf")])
def test_an_update_without_anything_to_match_fails_without_a_pass(tiny, smooth, update):
    model, observation = smooth
    observation = dataclasses.replace(observation, update={name: torch.full_like(tensor, update) for name, tensor in observation.update.items()})
    settings = naive(iterations=3, snapshots=1, **tiny.settings)
    reference = double_backward(observation, model, settings)
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    found = large(observation, model, settings)
    assert found.keys() == reference.keys()
    for name in ("failure", "failed_at", "images", "labels", "loss", "fit"):
        torch.testing.assert_close(found[name], reference[name])


def test_a_last_layer_that_tells_no_labels_fails_as_in_the_vectorised_program(tiny, smooth):
    model, observation = smooth
    pruned = {name: torch.zeros_like(t) if name.startswith("predictor.3.") else t for name, t in observation.update.items()}
    hidden, settings = dataclasses.replace(observation, update=pruned, labels=None), naive(iterations=2, **tiny.settings)
    found, reference = large(hidden, model, settings), double_backward(hidden, model, settings)
    assert found["failure"].tolist() == reference["failure"].tolist() == [UNTOLD]


@pytest.mark.parametrize("healthy", [2, 0])
def test_a_loss_that_becomes_nan_keeps_the_best_point_and_leaves_the_parameters(tiny, smooth, healthy):
    model, observation = smooth
    settings = naive(iterations=5, snapshots=5, **tiny.settings)

    def loss(logits, labels, calls=[]):  # noqa: B006
        calls.append(0)
        return F.cross_entropy(logits, labels) * (torch.nan if len(calls) > 3 * healthy else 1)  # three passes in an iteration

    found, whole = large(observation, model, settings, loss=loss), large(observation, model, settings)
    assert found["failure"] == 3 and found["failed_at"] == healthy
    if healthy:
        assert found["loss"] == whole["losses"][:, :healthy].min() > whole["loss"]
        torch.testing.assert_close(found["images"], whole["snapshots"][:, healthy - 2].float(), rtol=0, atol=1e-3)
    else:
        assert (found["images"] == 0.5).all() and found["loss"] == torch.inf
    assert all(torch.equal(parameter, observation.params[name]) for name, parameter in model.named_parameters())


def test_a_module_refuses_to_trust_some_tensors_more(tiny, smooth):
    observation = dataclasses.replace(smooth[1], trust={next(iter(smooth[1].update)): torch.tensor(0.5)})
    with pytest.raises(InputError, match="leave trust empty"):
        large(observation, smooth[0], naive(iterations=1, **tiny.settings))


def test_what_does_not_fit_is_refused_before_the_first_pass(tiny, smooth):
    model, observation = smooth
    settings = naive(iterations=1, **tiny.settings)
    extra, less = {**observation.update, "extra": torch.zeros(2)}, {"encoder.0.bias": observation.params["encoder.0.bias"]}
    cases = [
        (dataclasses.replace(observation, kind="delta"), {}, "kind 'delta'"),
        (dataclasses.replace(observation, update=extra), {}, r"update do not fit the model: 'extra' is \(2,\) there and missing"),
        (dataclasses.replace(observation, params={**observation.params, "encoder.0.bias": torch.zeros(5)}), {}, "params do not fit"),
        (dataclasses.replace(observation, params=less), {}, "which its params lack"),
        (dataclasses.replace(observation, update={}), {}, "nothing to match"),
        (observation, {"distance": lambda update, target, scale: scale}, "distance of one's own"),
        (observation, {"searched": {"alpha": Searched()}}, r"searched=\['alpha'\]"),
        (observation, {"drawn": {"noise1": lambda draw: torch.zeros(1)}}, r"drawn=\['noise1'\]"),
    ]
    for given, change, text in cases:
        with pytest.raises(InputError, match=text):
            large(given, model, dataclasses.replace(settings, **change))
    with pytest.raises(InputError, match="starts of one observation"):
        large(observation, model, settings, chunk=((0, 0), (1, 0)))
    with pytest.raises(InputError, match="neither a switch of its own nor a list of blocks"):
        linear = dataclasses.replace(observation, params={"weight": torch.zeros(3, 6)}, update={"weight": torch.ones(3, 6)})
        large(linear, nn.Linear(6, 3), settings, checkpointing=True)


# --- as the last rung of the ladder -----------------------------------------------------------------------------------


def test_several_observations_are_attacked_in_turn_with_the_rows_of_the_vectorised_program(tiny):
    model = tiny.Net(activation=nn.Tanh).double()
    made = [tiny.observe(gradient_of(model), tiny.weights(model, seed), seed=seed)[0] for seed in range(2)]
    made[1] = dataclasses.replace(made[1], update={name: torch.zeros_like(tensor) for name, tensor in made[1].update.items()})
    settings = naive(iterations=4, restarts=2, **STEP, **tiny.settings)
    chunk, asked, reports = ((1, 0), (0, 1), (1, 1), (0, 0)), [], []
    module = tiny.Net(activation=nn.Tanh).double()
    running = on_module(made, lambda: asked.append(0) or module, settings, seed=3, every=2)(chunk)
    while True:
        try:
            reports.append(next(running))
        except StopIteration as end:
            found = end.value
            break
    reference = drain(run_chunk(chunk, made, gradient_of(model), settings, seed=3, dtype=torch.float64))
    assert len(asked) == 1
    for name in ("attacks", "images", "labels", "loss", "fit", "failure"):
        torch.testing.assert_close(found[name], reference[name], rtol=1e-4, atol=1e-4)
    assert [report.done for report in reports] == sorted(report.done for report in reports) and reports[-1].done == 16
    assert {report.attacks for report in reports} == {4} and reports[-1].failed == 2
