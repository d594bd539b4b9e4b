import pickle

import numpy as np
import pytest
import torch

from gidef.data import load_dataset
from gidef.errors import InputError


def load(path, notices=None):
    return load_dataset("mine", path=path, notice=(notices if notices is not None else []).append)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_archive_comes_back_bit_for_bit_with_channels_first(arrays, save, channels):
    if channels == 1:
        arrays |= {key: value[..., 0] for key, value in arrays.items() if key.endswith("images")}
    dataset = load(save(arrays))
    for split in ("train", "val", "test"):
        part = getattr(dataset, split)
        expected = arrays[f"{split}_images"].reshape(len(part), 12, 12, channels)
        assert part.images.dtype == torch.uint8 and part.images.is_contiguous()
        assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), expected)
        assert part.labels.dtype == torch.int64 and part.labels.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
    assert (dataset.name, dataset.image_shape, dataset.num_classes) == ("mine", (channels, 12, 12), 4)
    assert not dataset.synthetic and len(dataset.md5) == 32


def test_labels_may_be_flat_and_of_any_integer_type(arrays, save, same):
    reference = load(save(arrays))
    arrays |= {key: value[:, 0].astype(np.int32) for key, value in arrays.items() if key.endswith("labels")}
    assert same(load(save(arrays, "flat.npz")), reference)


def test_a_missing_validation_split_is_cut_from_train_and_said(arrays, save, notices):
    del arrays["val_images"], arrays["val_labels"]
    dataset = load(save(arrays), notices)
    assert (len(dataset.train), len(dataset.val)) == (20, 4)  # one of each of four classes rather than 2.4 images
    assert torch.bincount(dataset.val.labels).tolist() == [1, 1, 1, 1]
    rows = torch.cat([dataset.train.images, dataset.val.images]).flatten(1)
    original = torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2).flatten(1)
    assert torch.equal(rows.unique(dim=0), original.unique(dim=0))  # nothing lost, nothing twice
    assert dataset.notes == tuple(notices) and "validation" in notices[0]


def test_the_cut_depends_on_the_seed_alone(arrays, save, same):
    del arrays["val_images"], arrays["val_labels"]
    path = save(arrays)
    first, again, other = (load_dataset("mine", path=path, seed=seed, notice=print) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)


def wrong(key, value):
    return lambda arrays: arrays.__setitem__(key, value(arrays[key]))


WRONG = {
    "a missing key": (lambda arrays: arrays.pop("train_labels"), "train_labels is missing"),
    "no test split": (lambda arrays: (arrays.pop("test_labels"), arrays.pop("test_images")), "test_images is missing"),
    "half a validation split": (lambda arrays: arrays.pop("val_images"), "val_images is missing"),
    "float images": (wrong("train_images", lambda x: x / 255.0), "train_images has dtype float64"),
    "channels first": (wrong("test_images", lambda x: x.transpose(0, 3, 1, 2)), "test_images has shape"),
    "flat images": (wrong("train_images", lambda x: x.reshape(len(x), -1)), "train_images has shape"),
    "four channels": (wrong("train_images", lambda x: np.concatenate([x, x[..., :1]], -1)), "train_images has shape"),
    "other size in test": (wrong("test_images", lambda x: x[:, :8]), "test_images have shape"),
    "float labels": (wrong("train_labels", lambda y: y.astype(np.float32)), "train_labels has dtype float32"),
    "negative labels": (wrong("val_labels", lambda y: y.astype(np.int64) - 1), "val_labels holds -1"),
    "a gap": (wrong("train_labels", lambda y: np.where(y == 2, 3, y)), "train_labels: class 2"),
    "a far gap": (wrong("train_labels", lambda y: y.astype(np.int64) + 10**12), "number them without gaps"),
    "a class in test alone": (wrong("test_labels", lambda y: y + 1), "train_labels: class 4"),
    "lengths": (wrong("train_labels", lambda y: y[:-1]), "train_labels has shape"),
    "several labels": (wrong("train_labels", lambda y: np.repeat(y, 3, 1)), "train_labels has shape"),
    "empty split": (wrong("test_images", lambda x: x[:0]), "test_images has shape"),
    "pickled objects": (wrong("train_images", lambda x: x.astype(object)), "train_images cannot be read (pickled"),
    "one class": (wrong("train_labels", lambda y: y * 0), "class"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_archive_is_one_error_with_file_and_key(arrays, save, case):
    spoil, message = WRONG[case]
    spoil(arrays)
    path = save(arrays)
    with pytest.raises(InputError) as caught:
        load(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_an_error(arrays, save, keep):
    path = save(arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(InputError, match=r"set\.npz"):
        load(path)


def test_a_flipped_byte_in_the_pixels_is_an_error(arrays, save):
    path = save(arrays)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 4] ^= 0xFF
    path.write_bytes(bytes(whole))
    with pytest.raises(InputError, match=r"set\.npz"):
        load(path)


class _Spy:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_called_npz_is_refused_unread(tmp_path):
    path, trace = tmp_path / "evil.npz", tmp_path / "trace"
    path.write_bytes(pickle.dumps(_Spy(trace)))
    with pytest.raises(InputError, match=r"evil\.npz"):
        load(path)
    assert not trace.exists()


def test_a_single_array_and_other_files_are_refused(tmp_path, arrays):
    np.save(tmp_path / "array.npy", arrays["train_images"])
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(InputError, match="single array"):
        load(tmp_path / "array.npz")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="unknown kind of file"):
        load(tmp_path / "notes.txt")


def test_size_resizes_with_antialiasing_and_says_so(arrays, save, notices):
    arrays = {key: (np.full_like(value, 77) if key.endswith("images") else value) for key, value in arrays.items()}
    stripes = arrays["train_images"]
    stripes[:, :, ::2], stripes[:, :, 1::2] = 0, 200  # finer than the small image can show
    dataset = load_dataset("mine", path=save(arrays), size=8, notice=notices.append)
    assert dataset.image_shape == (3, 8, 8) and any("12x12 to 8x8" in note for note in notices)
    assert set(dataset.test.images.unique().tolist()) == {77}
    assert dataset.train.images.min() > 50 and dataset.train.images.max() < 150  # without it: 0 and 200 remain
