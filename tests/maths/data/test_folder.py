import numpy as np
import pytest
import torch
from PIL import Image

from gidef.data import load_dataset
from gidef.errors import InputError

DRAWS = np.random.default_rng(0)


def picture(path, *, size=(12, 10), mode="RGB", **options):
    """A random image of (width, height); returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = DRAWS.integers(0, 256, (size[1], size[0], *((3,) if mode == "RGB" else ())), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def load(path, **options):
    return load_dataset("mine", path=path, notice=options.pop("notice", print), **options)


def test_splits_and_classes_are_read_from_the_folders(tmp_path):
    expected = {}
    for split, count in [("train", 4), ("val", 1), ("test", 2)]:
        for number, kind in enumerate(["cat", "dog", "eel"]):
            for row in range(count):
                expected[split, number, row] = picture(tmp_path / split / kind / f"{row}.png")
    dataset = load(tmp_path)
    assert (dataset.name, load_dataset("bloodmnist", path=tmp_path, notice=print).name) == ("mine", tmp_path.name)
    assert dataset.class_names == ("cat", "dog", "eel") and dataset.image_shape == (3, 10, 12)
    for split, count in [("train", 4), ("val", 1), ("test", 2)]:
        part = getattr(dataset, split)
        assert part.labels.tolist() == sorted([0, 1, 2] * count)
        pixels = np.stack([expected[split, number, row] for number in range(3) for row in range(count)])
        assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), pixels)


def test_without_splits_seventy_ten_and_twenty_percent_are_cut_by_class(tmp_path, same, notices):
    for kind in "ab":
        for row in range(20):
            picture(tmp_path / kind / f"{row:02}.bmp", mode="L")
    dataset = load(tmp_path, notice=notices.append)
    assert [torch.bincount(part.labels).tolist() for part in (dataset.train, dataset.val, dataset.test)] == [[14, 14], [2, 2], [4, 4]]
    assert dataset.image_shape == (1, 10, 12) and "70 / 10 / 20" in notices[0]
    assert same(load(tmp_path), dataset) and not same(load(tmp_path, seed=1), dataset)
    everything = torch.cat([part.images for part in (dataset.train, dataset.val, dataset.test)])
    assert len(everything.flatten(1).unique(dim=0)) == 40


def test_train_and_test_alone_get_a_validation_split(tmp_path):
    for split, count in [("train", 20), ("test", 3)]:
        for kind in "ab":
            for row in range(count):
                picture(tmp_path / split / kind / f"{row}.png")
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (36, 4, 6)


def test_sizes_and_colours_are_brought_together_and_said(tmp_path, notices):
    for row in range(6):
        picture(tmp_path / "a" / f"{row}.png")
        picture(tmp_path / "b" / f"{row}.jpg", size=(30, 40), mode="L")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    dataset = load(tmp_path, notice=notices.append)
    assert dataset.image_shape == (3, 10, 12)
    assert any("6 of 12 images resized to 12x10" in note for note in notices)
    assert any("mixed" in note for note in notices) and any("1 files that are no images" in note for note in notices)
    grey = dataset.train[dataset.train.labels == 1].images
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert load(tmp_path, size=16).image_shape == (3, 16, 16)


def test_the_checksum_follows_bytes_and_names(tmp_path):
    for kind in "ab":
        for row in range(5):
            picture(tmp_path / kind / f"{row}.png")
    before = load(tmp_path).md5
    assert load(tmp_path).md5 == before
    (tmp_path / "a" / "4.png").rename(tmp_path / "a" / "5.png")
    assert load(tmp_path).md5 != before


def test_broken_and_deep_images_are_named(tmp_path):
    for kind in "ab":
        for row in range(5):
            picture(tmp_path / kind / f"{row}.png")
    whole = (tmp_path / "b" / "2.png").read_bytes()
    (tmp_path / "b" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"b/2\.png: not a readable"):
        load(tmp_path)
    Image.fromarray(np.full((10, 12), 40000, dtype=np.uint16)).save(tmp_path / "b" / "2.png")
    with pytest.raises(InputError, match=r"b/2\.png: mode I;16 has more than 8 bits"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found 0 class folders"),
        (["a/0.png", "a/1.png"], "found 1 class folders"),
        (["train/a/0.png", "train/b/0.png"], "train/ alone"),
        (["train/a/0.png", "train/b/0.png", "val/a/0.png"], "no test images"),
        (["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"], "this class has no folder"),
        (["train/a/0.png", "train/b/0.png", "test/a/notes.txt"], "holds no images"),
        (["train/a/0.png", "train/a/1.png", "train/b/notes.txt", "test/a/0.png"], "class 1 .b. has no training image"),
    ],
)
def test_a_wrong_layout_is_explained(tmp_path, files, message):
    (tmp_path / "root").mkdir()
    for name in files:
        picture(tmp_path / "root" / name) if name.endswith("png") else (
            (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True),
            (tmp_path / "root" / name).write_text("x"),
        )
    with pytest.raises(InputError, match=message):
        load(tmp_path / "root")


def test_large_photographs_need_a_size(tmp_path):
    for kind in "ab":
        for row in range(5):
            picture(tmp_path / kind / f"{row}.png", size=(700, 20))
    with pytest.raises(InputError, match="700x20 pixels; pass size"):
        load(tmp_path)
    assert load(tmp_path, size=28).image_shape == (3, 28, 28)
