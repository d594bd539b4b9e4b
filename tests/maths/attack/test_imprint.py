"""A malicious server: the imprint block, and a noise level set to nothing. Images are made up unless GIDEF_DATA names a folder."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.func import functional_call

from gidef.attack.imprint import Imprinted, craft, imprint, invert_imprint, read_bins, zeroed_level
from gidef.data import synthetic_blood_cells
from gidef.errors import InputError
from gidef.models import SplitModel, make_backbone
from gidef.types import Observation

CLASSES = 8
TINY = (1, 2, 2)


@pytest.fixture(scope="module")
def cells():
    """(private images, their labels, public images), [0, 1]."""
    path = Path(os.environ.get("GIDEF_DATA", "")) / "bloodmnist_resplit.npz"
    if path.is_file():
        with np.load(path) as archive:
            private, labels, public = (archive[key][:400] for key in ("train_images", "train_labels", "val_images"))
        private, public = (torch.tensor(one).permute(0, 3, 1, 2).float() / 255 for one in (private, public))
        return private, torch.tensor(labels[:, 0]).long(), public
    made = synthetic_blood_cells(train=200, val=200, test=8)
    return made.train.images.float() / 255, made.train.labels, made.val.images.float() / 255


def tiny_net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def observe(model, images, targets, *noise, **fields):
    params = dict(model.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(model(images, *noise), targets), list(params.values()), allow_unused=True)
    update = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}
    return Observation({n: p.detach() for n, p in params.items()}, update, len(images), **fields)


def paired_psnr_db(found, truth):
    """(B,), each true image with a reconstruction of its own."""
    error = (found.double()[:, None] - truth.double()[None]).square().flatten(2).mean(2)
    rows, columns = linear_sum_assignment(error.numpy())
    return -10 * error[rows, columns].clamp(min=1e-14).log10()


def batch_of(cells, size, seed, dtype=torch.float32):
    rows = torch.randperm(len(cells[0]), generator=torch.Generator().manual_seed(seed))[:size]
    return cells[0][rows].to(dtype), cells[1][rows]


def perturbed_net(dtype=torch.float32):
    net = make_backbone("small", num_classes=CLASSES, image_shape=(3, 28, 28))
    statistics = {"input_mean": (0.5, 0.5, 0.5), "input_std": (0.2, 0.2, 0.2)}
    return SplitModel(net, perturbation={}, image_shape=(3, 28, 28), num_classes=CLASSES, **statistics).to(dtype)


@pytest.mark.parametrize(
    ("size", "bins", "dtype"), [(1, 128, torch.float32), (16, 128, torch.float32), (16, 256, torch.float64), (64, 1024, torch.float32)]
)
def test_most_images_of_a_batch_are_read_off_whatever_the_defence_behind_the_block(cells, size, bins, dtype):
    shares = []
    for seed in range(3 if size == 16 else 1):
        images, labels = batch_of(cells, size, seed, dtype)
        net = perturbed_net(dtype)
        model = imprint(net, image_shape=(3, 28, 28), bins=bins, public=cells[2])
        noise = torch.randn(size, *net.latent_shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        found = invert_imprint(observe(model, images, labels, noise, labels=labels), image_shape=(3, 28, 28), num_classes=CLASSES)
        assert found.status == "ok" and found.images.shape == images.shape and torch.equal(found.labels, labels) and found.loss < 0.5
        shares.append(float((paired_psnr_db(found.images, images) > 40).double().mean()))
    assert sum(shares) / len(shares) > 0.8


@pytest.mark.parametrize("skip", [True, False])
def test_bins_are_named_and_hold_the_images_between_their_edges(skip):
    """Brightness is uniform on [0, 1] in public, so the edges of ten bins are tenths."""
    public = torch.linspace(0, 1, 1001, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, *TINY)
    model = imprint(tiny_net(), image_shape=TINY, bins=10, skip=skip, public=public)
    images = torch.rand(4, *TINY, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    images = images - images.mean((1, 2, 3), keepdim=True) + torch.tensor([0.95, 0.33, 0.04, 0.77], dtype=torch.float64).view(-1, 1, 1, 1)
    found = read_bins(observation := observe(model, images, torch.tensor([0, 1, 2, 0])))
    assert found.index.tolist() == [0, 3, 7, 9] and found.single.all()
    torch.testing.assert_close(found.low[1:], torch.tensor([0.3, 0.7, 0.9], dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.high[:3], torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64), rtol=0, atol=1e-3)
    assert found.low[0] < 0 and found.high[3] == torch.inf
    torch.testing.assert_close(found.images, images[[2, 1, 3, 0]].flatten(1), rtol=0, atol=1e-9)
    result = invert_imprint(observation, image_shape=TINY, num_classes=3)
    torch.testing.assert_close(result.images, images[[2, 1, 3, 0]].float())
    assert result.loss == 0


def test_a_bin_of_two_images_is_noticed_and_comes_last():
    public = torch.linspace(0, 1, 1001, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, *TINY)
    model = imprint(tiny_net(), image_shape=TINY, bins=20, public=public)
    images = torch.rand(3, *TINY, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.1
    images = images - images.mean((1, 2, 3), keepdim=True) + torch.tensor([0.31, 0.34, 0.62], dtype=torch.float64).view(-1, 1, 1, 1)
    observation = observe(model, images, torch.tensor([0, 1, 2]))
    found = read_bins(observation)
    assert found.index.tolist() == [6, 12] and found.single.tolist() == [False, True]
    result = invert_imprint(observation, image_shape=TINY, num_classes=3)
    torch.testing.assert_close(result.images[0], images[2].float())
    assert result.loss == pytest.approx(2 / 3)


def test_identical_images_share_a_bin_and_are_all_recovered():
    model = imprint(tiny_net(), image_shape=TINY, bins=20, mean=0.5, std=0.2)
    images = torch.rand(1, *TINY, dtype=torch.float64).expand(5, -1, -1, -1)
    result = invert_imprint(observe(model, images, torch.tensor([0, 1, 2, 1, 1])), image_shape=TINY, num_classes=3)
    torch.testing.assert_close(result.images, images.float())


def test_edges_are_the_quantiles_of_the_public_law():
    params = dict(Imprinted(tiny_net(), image_shape=TINY, bins=8).double().named_parameters())
    shares = np.arange(1, 8) / 8
    laws = {"normal": scipy.stats.norm(0.6, 0.1), "laplace": scipy.stats.laplace(0.6, 0.1 / 2**0.5)}
    for law, reference in laws.items():
        edges = -craft(params, mean=0.6, std=0.1, law=law)["imprint.measure.bias"]
        np.testing.assert_allclose(edges[1:].numpy(), reference.ppf(shares), atol=1e-4)
        assert edges[0] < 0.6 - 10 * 0.1
    few = torch.rand(3, *TINY, dtype=torch.float64)
    edges = -craft(params, public=few)["imprint.measure.bias"]
    assert (edges.diff() > 0).all()
    np.testing.assert_allclose(edges[1:].numpy(), np.quantile(few.mean((1, 2, 3)).numpy(), shares), atol=1e-4)


def test_craft_makes_equal_rows_and_columns_and_leaves_its_inputs_and_the_backbone_alone():
    model = Imprinted(tiny_net(), image_shape=TINY, bins=6).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in params.items()}
    measure = torch.tensor([1.0, -1.0, 2.0, 0.0]).view(TINY)
    made = craft(params, mean=0.0, std=1.0, measure=measure, gain=0.3, seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in params.items())
    assert torch.equal(made["backbone.1.weight"], params["backbone.1.weight"])
    torch.testing.assert_close(made["imprint.measure.weight"], measure.double().flatten().expand(6, 4))
    assert (made["imprint.back"] == made["imprint.back"][:, :1]).all() and (made["imprint.back"].abs() == 0.3 / 6).all()
    images = torch.rand(2, *TINY, dtype=torch.float64)
    active = (images.flatten(1) @ measure.double().flatten())[:, None] + made["imprint.measure.bias"]
    pattern = active.clamp(min=0).sum(1)[:, None] * made["imprint.back"][:, 0]
    expected = model.backbone(images + pattern.view_as(images))
    torch.testing.assert_close(functional_call(model, made, (images,)), expected)
    widths = -made["imprint.measure.bias"].diff()
    limited = torch.minimum(active.clamp(min=0), torch.cat([widths, torch.tensor([torch.inf])])).sum(1)[:, None] * made["imprint.back"][:, 0]
    sparse = Imprinted(model.backbone, image_shape=TINY, bins=6, sparse=True, skip=False).double()
    torch.testing.assert_close(functional_call(sparse, made, (images,)), model.backbone(limited.view_as(images)))


@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float32, 35), (torch.float64, 100)])
def test_a_delta_of_several_local_steps_and_epochs_is_read_off_the_sparse_block(cells, dtype, least_db):
    images, labels = batch_of(cells, 16, 0, dtype)
    net = make_backbone("small", num_classes=CLASSES, image_shape=(3, 28, 28)).to(dtype)
    model = imprint(net, image_shape=(3, 28, 28), bins=256, sparse=True, public=cells[2], gain=0.1)
    sent = {name: p.detach() for name, p in model.named_parameters()}
    weights = sent
    for rows in [slice(first, first + 4) for first in (0, 4, 8, 12)] * 2:
        weights = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        loss = F.cross_entropy(functional_call(model, weights, (images[rows],)), labels[rows])
        weights = {n: w - 0.05 * g for (n, w), g in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True)}
    delta = {name: (weights[name] - sent[name]).detach() for name in sent}
    observation = Observation(sent, delta, 16, kind="delta")
    found = invert_imprint(observation, image_shape=(3, 28, 28), num_classes=CLASSES, sparse=True)
    assert float((paired_psnr_db(found.images, images) > least_db).double().mean()) > 0.7
    nothing = {name: 1e-22 * tensor for name, tensor in delta.items()}
    lost = invert_imprint(dataclasses.replace(observation, update=nothing), image_shape=(3, 28, 28), num_classes=CLASSES, sparse=True)
    assert lost.status == "failed" and "beyond rounding" in lost.error


def test_one_step_of_sgd_is_as_good_as_a_gradient():
    model = imprint(tiny_net(), image_shape=TINY, bins=50, mean=0.5, std=0.2)
    images = torch.rand(3, *TINY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    observation = observe(model, images, torch.tensor([0, 1, 2]))
    delta = {name: -0.1 * tensor for name, tensor in observation.update.items()}
    found = invert_imprint(dataclasses.replace(observation, update=delta, kind="delta"), image_shape=TINY, num_classes=3)
    assert paired_psnr_db(found.images, images).min() > 100


def test_zero_and_broken_updates_fail_and_other_models_and_shapes_are_refused():
    model = imprint(tiny_net(), image_shape=TINY, bins=8, mean=0.5, std=0.2)
    good = observe(model, torch.rand(2, *TINY, dtype=torch.float64), torch.tensor([2, 1]), labels=torch.tensor([2, 1]))
    for value, reason in ((0.0, "is zero"), (torch.nan, "not finite"), (torch.inf, "not finite")):
        update = {**good.update, "imprint.measure.weight": torch.full_like(good.update["imprint.measure.weight"], value)}
        found = invert_imprint(dataclasses.replace(good, update=update), image_shape=TINY, num_classes=3)
        assert found.status == "failed" and reason in found.error and (found.images == 0.5).all() and found.labels.tolist() == [2, 1]
    with pytest.raises(InputError, match="4 pixels"):
        invert_imprint(good, image_shape=(1, 3, 3), num_classes=3)
    plain = {name: tensor for name, tensor in good.update.items() if not name.startswith("imprint")}
    for change in ({"update": plain}, {"params": plain}):
        with pytest.raises(InputError, match="not one of an Imprinted model"):
            invert_imprint(dataclasses.replace(good, **change), image_shape=TINY, num_classes=3)
    other = {**good.params, "imprint.measure.weight": torch.zeros(7, 4), "imprint.measure.bias": torch.zeros(7)}
    with pytest.raises(InputError, match="not one of this model"):
        read_bins(dataclasses.replace(good, params=other))


def test_statistics_that_cannot_make_bins_are_refused():
    params = dict(Imprinted(tiny_net(), image_shape=TINY, bins=8).named_parameters())
    for statistics, reason in (
        ({}, "public images, or mean and std"),
        ({"mean": 0.5, "std": 0.0}, "std above 0"),
        ({"mean": 0.5, "std": torch.nan}, "finite"),
        ({"public": torch.ones(3, *TINY)}, "std above 0"),
        ({"mean": 0.5, "std": 1.0, "law": "cauchy"}, "'cauchy'"),
        ({"mean": 0.5, "std": 1.0, "gain": 0.0}, "gain"),
        ({"mean": 0.5, "std": 1.0, "measure": torch.ones(3)}, "measure of 3"),
    ):
        with pytest.raises(InputError, match=reason):
            craft(params, **statistics)
    with pytest.raises(InputError, match="missing in params"):
        craft({"weight": torch.zeros(2)}, mean=0.5, std=1.0)
    with pytest.raises(InputError, match="bins=1"):
        Imprinted(tiny_net(), image_shape=TINY, bins=1)


@pytest.mark.parametrize("perturbation", [{}, {"mean": True}, {"mode": "conditional"}, {"mode": "conditional", "mean": True, "law": "laplace"}])
def test_a_zeroed_level_leaves_the_client_s_floor_and_nothing_below(perturbation):
    net = make_backbone("small", num_classes=CLASSES, image_shape=(3, 8, 8))
    model = SplitModel(net, perturbation=perturbation, image_shape=(3, 8, 8), num_classes=CLASSES)
    params = {name: p.detach() for name, p in model.named_parameters()}
    images, noise = torch.rand(2, 3, 8, 8), torch.ones(2, *model.latent_shape)
    honest = functional_call(model, params, (images, noise), {"full": True})
    assert (honest.std > 0.9).all()
    sent = zeroed_level(params)
    assert all(torch.equal(sent[name], params[name]) for name in params if not name.startswith("perturbation."))
    assert not any((sent[name] != 0).any() for name in sent if "shift" in name)
    off = functional_call(model, sent, (images, noise), {"full": True})
    assert (off.std == model.perturbation.std_floor).all() and model.perturbation.std_floor == pytest.approx(0.1)
    torch.testing.assert_close(off.perturbed - off.latent, torch.full_like(off.latent, 0.1))
    model.perturbation.std_floor = 0.0  # only an evaluator may: the level itself is nothing
    assert (functional_call(model, sent, (images, noise), {"full": True}).std == 0).all()


@pytest.mark.parametrize("level", [-1e4, -1e30, -torch.inf, -3.0])
@pytest.mark.parametrize("mode", ["global", "conditional"])
def test_the_floor_holds_whatever_level_is_sent(level, mode):
    net = make_backbone("small", num_classes=CLASSES, image_shape=(3, 8, 8))
    model = SplitModel(net, perturbation={"mode": mode, "mean": True}, image_shape=(3, 8, 8), num_classes=CLASSES)
    draw = torch.Generator().manual_seed(0)
    params = {}
    for name, p in model.named_parameters():
        wild = 100 * torch.randn(p.shape, generator=draw) if name.startswith("perturbation.") else p.detach()
        params[name] = torch.full_like(p, level) if name in ("perturbation.level", "perturbation.level.bias") else wild
    std = functional_call(model, params, (torch.rand(2, 3, 8, 8),), {"full": True}).std
    assert (std >= model.perturbation.std_floor).all()


def test_a_model_without_a_level_cannot_have_it_zeroed():
    with pytest.raises(InputError, match=r"'perturbation\.level' is missing"):
        zeroed_level({"backbone.weight": torch.zeros(2), "perturbation.shift.weight": torch.zeros(2)})
