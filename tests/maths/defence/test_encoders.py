"""What clients train on instead of their images: against NumPy, Pillow, and mixtures whose parts can be read off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from gidef.config import ATS
from gidef.config.defences import ATS_POLICIES, ATS_TRANSFORMATIONS
from gidef.defence.concealing import SPREAD, Conceal, beside
from gidef.defence.encode import encode_all, from_mixtures, imitating, searched_of, softened
from gidef.defence.instahide import Hide, coefficients
from gidef.defence.mixup import Mix
from gidef.defence.transformations import TRANSFORMATIONS, Transformed
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Client

CLASSES = 9
VALUES = np.arange(CLASSES) * 30 / 255


def one_value_each() -> Client:
    """A client whose image of class k is 30 k everywhere, but for the last class, which has none."""
    labels = torch.arange(CLASSES - 1)
    return Client(3, (labels * 30).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 5, 4).contiguous(), labels)


def encoded(encoder, count=4000, label=CLASSES - 1, stream=0):
    """Encoder on white images of the last class, which no partner has."""
    images, labels = torch.ones(count, 2, 5, 4), torch.full((count,), label)
    return [found.numpy() for found in encoder.encode(images, labels, client=one_value_each(), generator=generator(stream, "test"))]


def photograph(seed=0, size=(3, 16, 16)) -> np.ndarray:
    """uint8 (H, W, C), smooth, of the whole range."""
    noise = torch.rand((1, *size), generator=generator(seed, "photograph"))
    smooth = F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="reflect"), 5, stride=1)[0]
    smooth = (smooth - smooth.amin()) / (smooth.amax() - smooth.amin())
    return (smooth * 255).round().byte().permute(1, 2, 0).numpy()


# --- mixtures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_mixup_is_the_papers_mixture_with_shares_of_its_beta_law(alpha):
    images, labels = encoded(Mix(CLASSES, mixing=alpha))
    share, partner = labels[:, -1], labels[:, :-1].argmax(1)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    assert ((labels[:, :-1] > 1e-7).sum(1) <= 1).all()
    expected = share + (1 - share) * VALUES[partner]
    np.testing.assert_allclose(images, np.broadcast_to(expected[:, None, None, None], images.shape), atol=1e-6)
    drawn = np.random.default_rng(7).beta(alpha, alpha, size=100_000)
    for level in (0.1, 0.25, 0.5, 0.9):
        assert abs((share < level).mean() - (drawn < level).mean()) < 0.03
    counts = np.bincount(partner[share < 0.999], minlength=CLASSES - 1)
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_a_batch_of_one_is_mixed_too():
    images, labels = encoded(Mix(CLASSES), count=1)
    assert 0 < labels[0, -1] < 1 and images.max() < 1


@pytest.mark.parametrize("signs", [False, True])
def test_the_image_behind_several_mixtures_is_the_likeliest_one(signs):
    """Against the least squares of its docstring, a pixel at a time."""
    rng, (rounds, classes) = np.random.default_rng(0), (5, 3)
    means, encoded = rng.uniform(0.6, 0.9, (classes, 1, 2, 2)), rng.uniform(0.55, 0.95, (rounds, 1, 1, 2, 2))
    labels = np.array([[0.3, 0.7, 0.0], [0.5, 0.2, 0.3], [0.64, 0.0, 0.36], [1.0, 0.0, 0.0], [0.1, 0.0, 0.9]])
    found = from_mixtures(
        *(torch.from_numpy(array).float() for array in (np.where(rng.random(encoded.shape) < 0.5, 1 - encoded, encoded) if signs else encoded, labels[:, None], np.eye(classes)[:1], means)),
        mixed=4, largest=0.65, signs=signs,
    )  # fmt: skip
    shares = [0.3, 0.5, 0.64, 0.5, 0.1]  # the fourth label is of two images of the class
    for place in np.ndindex(1, 2, 2):
        rows, goals = [1.0], [means[0][place]]
        for share, label, picture in zip(shares, labels, encoded[:, 0], strict=True):
            beside = label - share * np.eye(classes)[0]
            others = sum(weight * mean[place] for weight, mean in zip(beside / beside.sum(), means, strict=True))
            deviation = (1 - share) / np.sqrt(3)
            rows.append(share / deviation)
            goals.append((picture[place] - (1 - share) * others) / deviation)
        (expected,), *_ = np.linalg.lstsq(np.array(rows)[:, None], np.array(goals), rcond=None)
        assert abs(float(found[(0, *place)]) - min(max(expected, 0), 1)) < 1e-4


def test_many_encodings_of_instahide_give_the_image_better_than_its_class_does():
    truth, means = torch.rand(1, 1, 8, 8, generator=generator(0)), torch.full((CLASSES, 1, 8, 8), 0.5)
    means[0] = (0.4 + 0.2 * truth[0]).clamp(0, 1)
    encoder = Hide(CLASSES, mixed=2)
    shares, draw = torch.tensor([0.6, 0.5, 0.4] * 10)[:, None], generator(1)
    others = torch.rand(30, 1, 1, 8, 8, generator=draw)
    encoded = torch.lerp(others, truth, shares[..., None, None, None])
    encoded = torch.where(torch.rand(encoded.shape, generator=draw) < 0.5, 1 - encoded, encoded)
    labels = torch.zeros(30, 1, CLASSES)
    labels[:, 0, 0], labels[:, 0, 1] = shares[:, 0], 1 - shares[:, 0]
    told = encoder.unmixed(encoded, labels, torch.eye(CLASSES)[:1], means)
    assert (told - truth).square().mean() < 0.5 * (means[:1] - truth).square().mean()
    alone = Hide(CLASSES, mixed=1).unmixed(torch.where(torch.rand(4, 1, 1, 8, 8, generator=draw) < 0.5, 1 - truth, truth), labels[:4], torch.eye(CLASSES)[:1], means)
    assert torch.equal(alone, torch.where((means[:1] - 0.5) * (truth - 0.5) < 0, 1 - truth, truth)) and not encoder.smooth


@pytest.mark.parametrize(("mixed", "largest"), [(2, 0.65), (4, 0.65), (6, 0.3)])
def test_coefficients_are_bounded_shares_of_half_normal_draws(mixed, largest):
    found, rng = coefficients(3000, mixed, largest, generator=generator(0, "c")).numpy(), np.random.default_rng(1)
    drawn = np.abs(rng.normal(size=(400_000, mixed)))
    drawn /= drawn.sum(1, keepdims=True)
    drawn = drawn[drawn.max(1) <= largest]
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert found.max() <= largest and found.min() >= 0
    for level in np.quantile(drawn[:, 0], [0.1, 0.5, 0.9]):
        assert abs((found[:, 0] < level).mean() - (drawn[:, 0] < level).mean()) < 0.03
    assert np.array_equal(coefficients(5, 1, 0.65, generator=generator(0, "c")).numpy(), np.ones((5, 1)))


@pytest.mark.parametrize("mixed", [1, 2, 4])
def test_instahide_flips_the_mixture_about_the_middle_of_the_range(mixed):
    images, labels = encoded(Hide(CLASSES, mixed=mixed))
    if mixed == 1:
        assert np.array_equal(labels, np.full(4000, CLASSES - 1))
        labels = np.eye(CLASSES)[labels]
    values = np.append(VALUES[:-1], 1.0)
    mixture = labels @ values  # every class has one value, and so the labels tell the mixture
    np.testing.assert_allclose(np.abs(2 * images - 1), np.broadcast_to(np.abs(2 * mixture - 1)[:, None, None, None], images.shape), atol=2e-6)
    clear = np.abs(2 * mixture - 1) > 1e-3
    flipped = np.sign(images[clear] - 0.5) != np.sign(mixture[clear] - 0.5)[:, None, None, None]
    assert np.abs(flipped.mean(0) - 0.5).max() < 0.05  # of every entry, every channel by itself
    assert abs(np.corrcoef(flipped[:, 0, 0, 0], flipped[:, 1, 0, 0])[0, 1]) < 0.06
    plain, same = encoded(Hide(CLASSES, mixed=mixed, signs=False))
    np.testing.assert_allclose(plain[:, 0, 0, 0], mixture, atol=2e-6)
    assert np.array_equal(same, labels) or mixed == 1


def test_strength_zero_returns_what_was_given():
    images, labels, client = torch.rand(6, 3, 8, 8), torch.arange(6), one_value_each()
    for encoder in (Mix(CLASSES, mixing=0.0), Hide(CLASSES, mixed=1, signs=False), Transformed(())):
        found = encoder.encode(images, labels, client=client, generator=generator(0))
        assert found[0] is images and found[1] is labels and encoder.unknowns((3, 8, 8), 6) == {}
    assert Conceal(CLASSES, concealed=0).encode(images, labels, client=client, generator=generator(0), model=None, params={})[0] is images


def test_draws_are_a_function_of_the_generator_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    for encoder in (Mix(CLASSES), Hide(CLASSES), Transformed(ATS(policy=("rotate 4, color 9", "shearX 3")).parsed())):
        images, labels = torch.rand(8, 2, 5, 4, generator=generator(1)), torch.arange(8)
        first, again, other = (encoder.encode(images, labels, client=one_value_each(), generator=generator(seed, "e"))[0] for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, images)
        assert torch.equal(images, torch.rand(8, 2, 5, 4, generator=generator(1)))  # not changed in place
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_is_refused():
    for make in (lambda: Mix(CLASSES, mixing=-1), lambda: Hide(CLASSES, mixed=4, largest=0.25), lambda: Transformed(((("blur", 3),),)),
                 lambda: Transformed(((("rotate", 10),),)), lambda: Conceal(CLASSES, blend=1.5)):  # fmt: skip
        with pytest.raises(InputError, match="expected|there are"):
            make()


# --- transformations ---------------------------------------------------------------------------------------------------

PIXELWISE = {
    "invert": lambda image, amount, sign: ImageOps.invert(image), "equalize": lambda image, amount, sign: ImageOps.equalize(image),
    "autocontrast": lambda image, amount, sign: ImageOps.autocontrast(image), "posterize": lambda image, amount, sign: ImageOps.posterize(image, int(amount)),
    "solarize": lambda image, amount, sign: ImageOps.solarize(image, amount),
    "color": lambda image, amount, sign: ImageEnhance.Color(image).enhance(1 + sign * amount),
    "contrast": lambda image, amount, sign: ImageEnhance.Contrast(image).enhance(1 + sign * amount),
    "brightness": lambda image, amount, sign: ImageEnhance.Brightness(image).enhance(1 + sign * amount),
    "sharpness": lambda image, amount, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * amount),
}  # fmt: skip
AFFINE = {
    "shearX": lambda amount, sign, n: (1, sign * amount, 0, 0, 1, 0), "shearY": lambda amount, sign, n: (1, 0, 0, sign * amount, 1, 0),
    "translateX": lambda amount, sign, n: (1, 0, sign * amount * n, 0, 1, 0), "translateY": lambda amount, sign, n: (1, 0, 0, 0, 1, sign * amount * n),
}  # fmt: skip


def transformed(name, level, image, sign):
    apply, amounts = TRANSFORMATIONS[name]
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    return apply(tensor, amounts[level], torch.full((1, 1, 1, 1), float(sign)))[0].permute(1, 2, 0).numpy() * 255, amounts[level]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", PIXELWISE)
def test_what_changes_values_is_pillows(name, sign):
    for level in (0, 3, 7, 9):
        image = photograph(level, (3, 40, 40))  # with more pixels than values, or equalising does nothing
        found, amount = transformed(name, level, image, sign)
        expected = np.asarray(PIXELWISE[name](Image.fromarray(image), amount, sign)).astype(float)
        assert name in ("posterize", "autocontrast") or level == 0 or np.abs(expected - image).max() > 3
        exact = name in ("invert", "equalize", "posterize", "solarize")
        assert np.abs(found - expected).max() < (1e-3 if exact else 2.01), (name, level)  # Pillow rounds grey values and means
        assert exact or np.abs(found - expected).mean() < 0.8


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", [*AFFINE, "rotate"])
def test_what_moves_pixels_is_pillows_bilinear_inside(name, sign):
    for level in (2, 5, 9):
        image = photograph(level)
        found, amount = transformed(name, level, image, sign)
        inside, _ = transformed(name, level, np.full_like(image, 255), sign)
        picture = Image.fromarray(image)
        moved = picture.rotate(amount, Image.BILINEAR) if name == "rotate" else picture.transform(picture.size, Image.AFFINE, AFFINE[name](amount, sign, 16), Image.BILINEAR)
        clear = inside > 254.9
        assert clear.mean() > 0.4 and np.abs(found - np.asarray(moved))[clear].max() < 1.01, (name, level)
        assert np.abs(found - image).max() > 5
        outside, _ = transformed(name, level, np.full_like(image, 255), sign)
        corner = 128 if name == "rotate" else 0
        assert outside.min() < 254 or name == "rotate"
        assert outside.min() >= corner - 1e-3


def test_a_flat_or_grey_image_survives_what_divides_by_its_range():
    flat = torch.full((2, 1, 6, 6), 0.5)
    for name in ("autocontrast", "equalize", "color"):
        apply, amounts = TRANSFORMATIONS[name]
        torch.testing.assert_close(apply(flat, amounts[5], torch.ones(2, 1, 1, 1)), flat)


def test_a_policy_draws_one_alternative_for_each_image():
    images = torch.rand(600, 3, 6, 6, generator=generator(0))
    found, labels = Transformed(ATS(policy=("invert 0", "invert 3, invert 3", "solarize 9")).parsed()).encode(images, torch.arange(600), client=None, generator=generator(0, "t"))
    assert torch.equal(labels, torch.arange(600))
    inverted, kept = ((found - other).abs().amax((1, 2, 3)) < 1e-6 for other in (1 - images, images))
    assert int(inverted.sum() + kept.sum()) == 600 and 330 < int(inverted.sum()) < 470  # solarising at level 9 inverts everything


def test_the_pages_names_and_policies_are_those_of_the_transformations():
    assert set(ATS_TRANSFORMATIONS) == set(TRANSFORMATIONS) and all(len(amounts) == 10 for _, amounts in TRANSFORMATIONS.values())
    assert ATS().parsed() == ((("translateX", 9), ("contrast", 6), ("translateY", 2)), (("translateY", 3), ("contrast", 7), ("contrast", 7)))
    for name in ATS_POLICIES:
        Transformed(ATS(policy=(name,)).parsed())
    for text in ("blur 2", "rotate 10", "rotate", "", "rotate 2 3", "rotate -1"):
        with pytest.raises(ValueError, match="policy holds"):
            ATS(policy=(text,)).parsed()
    np.testing.assert_allclose(TRANSFORMATIONS["posterize"][1], np.round(np.linspace(8, 4, 10)))
    np.testing.assert_allclose(TRANSFORMATIONS["translateX"][1], np.linspace(0, 150 / 331, 10))


def test_an_attacker_searches_among_all_sequences_that_a_policy_draws():
    encoder = Transformed(ATS(policy=("rotate 4, shearX 5", "color 9, solarize 4, translateY 2")).parsed())
    draws = encoder.draws()
    assert [len(draw) for draw in draws] == [2, 2, 3, 3, 3, 3] and len({tuple(draw) for draw in draws}) == 6
    images = torch.rand(40, 3, 9, 9, generator=generator(0))
    found, _ = encoder.encode(images, torch.arange(40), client=None, generator=generator(1, "draws"))
    each = torch.stack([encoder.imitate(images, None, {"draw": 1e3 * F.one_hot(torch.full((40,), k), 6)})[0] for k in range(6)])
    assert ((each - found).abs().amax((2, 3, 4)) < 1e-5).sum(0).eq(1).all()  # each image went through exactly one of them
    even, _ = encoder.imitate(images, None, {"draw": torch.zeros(40, 6)})
    np.testing.assert_allclose(even.numpy(), each.numpy().mean(0), atol=1e-6)
    assert encoder.unknowns((3, 9, 9), 40)["draw"].shape == (40, 6)
    assert Transformed((tuple(("shearX", 1) for _ in range(6)),)).unknowns((3, 9, 9), 40) == {}  # 64 of them


# --- concealing images -------------------------------------------------------------------------------------------------

K, D = 4, (1, 3, 3)


def linear_client() -> tuple[nn.Module, dict, Client, torch.Tensor, torch.Tensor]:
    draw = generator(5, "linear")
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, K))
    params = {name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}
    client = Client(0, torch.randint(256, (12, *D), generator=draw, dtype=torch.uint8), torch.randint(K, (12,), generator=draw))
    return model, params, client, torch.rand(2, *D, generator=draw), torch.tensor([1, 3])


def reference(moved, start, x, y, theirs, params, encoder) -> float:
    """The objective in NumPy: the gradient of a linear softmax classifier in closed form."""
    weight, bias = (params[name].double().numpy() for name in ("1.weight", "1.bias"))
    one = np.eye(K)

    def outputs(images):
        return images.reshape(len(images), -1) @ weight.T + bias

    def gradient(images, labels):
        logits = outputs(images)
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - one[labels]) / len(images)
        return np.concatenate([(error.T @ images.reshape(len(images), -1)).ravel(), error.sum(0)])

    hidden = start + SPREAD * moved
    each = x.repeat(encoder.concealed, axis=0)
    a, b = gradient(hidden, theirs), gradient(x, y)
    apart = np.linalg.norm((hidden - each).reshape(len(each), -1), axis=1).mean() / SPREAD
    theta = np.linalg.norm(outputs(hidden) - outputs(each), axis=1) / np.linalg.norm(outputs(each), axis=1)
    return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) + np.exp(-encoder.x_weight * apart) + encoder.z_weight * theta.mean()


@pytest.mark.parametrize("concealed", [1, 2])
def test_the_search_for_concealing_images_goes_down_the_papers_objective(concealed):
    model, params, client, x, y = linear_client()
    settings = {"concealed": concealed, "x_weight": 0.3, "z_weight": 0.2}

    def run(**more):
        encoder = Conceal(K, **settings, **more)
        images, labels = encoder.encode(x, y, client=client, generator=generator(2, "d"), model=model, params=params)
        return encoder, images.view(2, 1 + concealed, *D), labels.view(2, 1 + concealed, K)

    encoder, images, labels = run(iterations=0)
    assert torch.equal(images[:, 0], x) and torch.equal(labels[:, 0], F.one_hot(y, K).float())
    theirs = (labels[:, 1:] - 0.3 * F.one_hot(y, K)[:, None]).flatten(0, 1) / 0.7
    torch.testing.assert_close(theirs.amax(1), torch.ones(2 * concealed))
    theirs = theirs.argmax(1).numpy()
    start = images[:, 1:].flatten(0, 1).double().numpy()
    partner = (start - 0.3 * x.double().numpy().repeat(concealed, axis=0)) / 0.7 * 255  # an image of the client, with its label
    for image, label in zip(partner, theirs, strict=True):
        match = np.abs(client.images.numpy() - image).max((1, 2, 3)) < 1e-3
        assert match.sum() == 1 and int(client.labels[match.argmax()]) == label

    def value(moved):
        return reference(moved, start, x.double().numpy(), y.numpy(), theirs, params, encoder)

    slope, step = np.zeros_like(start), 1e-6
    for place in np.ndindex(start.shape):
        bump = np.zeros_like(start)
        bump[place] = step
        slope[place] = (value(bump) - value(-bump)) / (2 * step)
    _, images, _ = run(iterations=1)
    moved = (images[:, 1:].flatten(0, 1).double().numpy() - start) / SPREAD
    clear = np.abs(slope) > 1e-4
    assert clear.mean() > 0.8
    np.testing.assert_allclose(moved[clear], -0.1 * np.sign(slope[clear]), rtol=1e-3)  # the first step of Adam is its rate
    _, images, _ = run(iterations=60)
    assert value((images[:, 1:].flatten(0, 1).double().numpy() - start) / SPREAD) < value(np.zeros_like(start)) - 0.1


def test_the_search_ends_where_the_images_are_far_enough_apart():
    model, params, client, x, y = linear_client()
    one, ended, long = (
        Conceal(K, **how).encode(x, y, client=client, generator=generator(2, "d"), model=model, params=params)[0]
        for how in ({"iterations": 1}, {"iterations": 30, "apart": 0.0}, {"iterations": 30})
    )
    assert torch.equal(one, ended) and not torch.equal(one, long)


# --- the attacker's side -----------------------------------------------------------------------------------------------


def test_searched_draws_reach_the_simulator_as_what_the_client_trained_on():
    encoders = (Mix(K), Conceal(K, concealed=2))
    searched = searched_of(encoders, D, 3)
    assert {name: one.shape for name, one in searched.items()} == {"encode/0/labels": (3, K), "encode/1/images": (6, *D), "encode/1/labels": (6, K)}
    seen = {}

    def simulate(params, known, images, labels, noise):
        seen.update(known=set(known), images=images, labels=labels)
        return {}

    known = {"other": torch.zeros(1)} | {name: torch.randn(one.shape, generator=generator(0, name)) for name, one in searched.items()}
    images, labels = torch.rand(3, *D), F.one_hot(torch.tensor([0, 2, 2]), K).float()
    imitating(simulate, encoders)({}, known, images, labels, None)
    assert seen["known"] == {"other"}
    assert torch.equal(seen["images"], beside(images, known["encode/1/images"])) and seen["images"].shape == (9, *D)
    logits, prior = known["encode/0/labels"].double().numpy(), np.full((3, K), 0.5 / K) + 0.5 * labels.numpy()
    expected = prior * np.exp(logits) / (prior * np.exp(logits)).sum(1, keepdims=True)
    np.testing.assert_allclose(seen["labels"][::3].numpy(), expected, rtol=1e-5)
    assert torch.allclose(seen["labels"].sum(1), torch.ones(9))
    imitating(simulate, encoders)({}, {}, images, labels, None)  # nothing searched: as it is
    assert seen["images"] is images and seen["labels"] is labels
    assert imitating(simulate, ()) is simulate
    assert float(softened(labels, torch.zeros(3, K))[0, 0]) == pytest.approx(0.5 + 0.5 / K)


def test_encoders_act_one_after_another():
    images, labels, client = torch.rand(5, 2, 5, 4), torch.arange(5), one_value_each()
    first, second = Transformed(((("invert", 0),),)), Mix(CLASSES)
    draw = generator(3, "both")
    halfway = first.encode(images, labels, client=client, generator=draw)
    expected = second.encode(*halfway, client=client, generator=draw)
    found = encode_all((first, second), images, labels, client=client, generator=generator(3, "both"), model=None, params={})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(a is b for a, b in zip(encode_all((), images, labels, client=client, generator=draw, model=None, params={}), (images, labels), strict=True))
