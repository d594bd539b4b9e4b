"""An empty home, no network, and small made-up archives."""

import numpy as np
import pytest
import torch

from gidef.data import Dataset, Images, medmnist_sets
from gidef.data import cifar as cifar_module
from gidef.data.download import Unreachable


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A home without caches."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("GIDEF_DATA", raising=False)
    monkeypatch.delenv("GIDEF_OFFLINE", raising=False)
    return folder


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The addresses that were asked for; no download succeeds."""
    urls = []

    def refuse(url, path, **_):
        urls.append(url)
        raise Unreachable("no network in tests")

    monkeypatch.setattr(medmnist_sets, "fetch", refuse)
    monkeypatch.setattr(cifar_module, "fetch", refuse)
    return urls


@pytest.fixture
def make_arrays():
    """make_arrays((train, val, test)) -> arrays under MedMNIST's keys; labels run through the classes."""

    def make(counts=(24, 8, 8), *, classes=4, side=12, seed=0):
        draws, made = np.random.default_rng(seed), {}
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            made[f"{split}_images"] = draws.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
            made[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
        return made

    return make


@pytest.fixture
def arrays(make_arrays):
    return make_arrays()


@pytest.fixture
def save(tmp_path):
    """save(arrays, "name.npz") -> path"""

    def write(arrays, name="set.npz", folder=None):
        folder = folder or tmp_path
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / name, **arrays)
        return folder / name

    return write


@pytest.fixture
def notices():
    return []


@pytest.fixture
def make_dataset():
    def make(counts=(40, 10, 12), *, classes=4, channels=3, side=12, seed=0, labels=None):
        draws = torch.Generator().manual_seed(seed)
        parts = {}
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            images = torch.randint(0, 256, (count, channels, side, side), generator=draws, dtype=torch.uint8)
            parts[split] = Images(images, torch.arange(count) % classes)
        if labels is not None:
            parts["train"] = Images(parts["train"].images[: len(labels)], labels)
        names = tuple(f"kind {number}" for number in range(classes))
        return Dataset("made", "made up", "none", names, **parts, source="a test", md5=None, synthetic=True, notes=("random pixels",))

    return make


@pytest.fixture
def same():
    """same(a, b): equal bits in every split."""

    def compare(left, right):
        pairs = [(getattr(left, split), getattr(right, split)) for split in ("train", "val", "test")]
        return all(torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) for one, other in pairs)

    return compare
