import os
import pickle
import sys

import numpy as np
import pytest
import torch

from gidef.data import available, check_dataset, load_dataset, medmnist_sets
from gidef.data import cifar as cifar_module
from gidef.data.npz import md5_of
from gidef.errors import InputError


def blood(arrays_maker, seed=0):
    return arrays_maker((24, 8, 8), classes=8, side=28, seed=seed)


@pytest.fixture
def official(monkeypatch):
    """official(name, path): from now on, medmnist's table lists this file's MD5."""

    def declare(name, path):
        table = medmnist_sets.info() | {name: medmnist_sets.info()[name] | {"MD5": md5_of(path)}}
        monkeypatch.setattr(medmnist_sets, "info", lambda: table)

    return declare


def test_the_folder_comes_before_the_cache_and_the_cache_before_a_download(tmp_path, home, save, official, asked, monkeypatch, notices, make_arrays):
    cached = save(blood(make_arrays, 1), "bloodmnist.npz", home / ".medmnist")
    official("bloodmnist", cached)
    assert load_dataset("bloodmnist", notice=notices.append).source == str(cached)
    assert notices == [] and asked == []

    resplit = save(blood(make_arrays, 2), "bloodmnist_resplit.npz", tmp_path / "data")
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "data"))
    dataset = load_dataset("bloodmnist", notice=notices.append)
    assert dataset.source == str(resplit) and "re-split" in notices[-1] and "re-split" in dataset.title

    named = save(blood(make_arrays, 3), "bloodmnist.npz", tmp_path / "data")
    dataset = load_dataset("bloodmnist", notice=notices.append)
    assert dataset.source == str(named) and dataset.title == "BloodMNIST" and "not an official" in notices[-1]
    assert dataset.class_names[:2] == ("basophil", "eosinophil") and dataset.class_names[3] == "immature granulocytes"
    assert asked == []


def test_a_path_comes_before_everything_and_never_falls_back(tmp_path, save, monkeypatch, asked, notices, make_arrays):
    save(blood(make_arrays), "bloodmnist.npz", tmp_path / "data")
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "data"))
    mine = save(make_arrays(), "mine.npz")
    dataset = load_dataset("bloodmnist", path=mine, notice=notices.append)
    assert (dataset.name, dataset.title, dataset.num_classes) == ("mine", "mine", 4)  # the default name does not lend its class names
    for missing in ("nowhere.npz", "nowhere", "nowhere/shard-{0..3}.tar"):
        with pytest.raises(InputError, match="no such file"):
            load_dataset("bloodmnist", path=tmp_path / missing, notice=notices.append)
    mine.write_bytes(b"PK\3\4 no longer an archive")
    with pytest.raises(InputError, match=r"mine\.npz"):
        load_dataset("bloodmnist", path=mine, notice=notices.append)
    assert asked == []


def test_a_broken_file_in_the_folder_or_the_cache_is_an_error(tmp_path, home, save, monkeypatch, notices, make_arrays):
    save(blood(make_arrays), "bloodmnist.npz", home / ".medmnist")
    with pytest.raises(InputError, match=r"bloodmnist\.npz: MD5 .* instead of 7053d0359d879ad8a5505303e11de1dc"):
        load_dataset("bloodmnist", notice=notices.append)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bloodmnist.npz").write_bytes(b"")
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"data/bloodmnist\.npz"):
        load_dataset("bloodmnist", notice=notices.append)
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="is no folder"):
        load_dataset("bloodmnist", notice=notices.append)


def test_bloodmnist_falls_back_to_synthetic_images_and_says_so_loudly(asked, notices):
    dataset = load_dataset("bloodmnist", size=8, notice=notices.append)
    assert dataset.synthetic and "synthetic" in dataset.title and dataset.name == "synthetic"
    assert asked == ["https://zenodo.org/records/10519652/files/bloodmnist.npz?download=1"]
    fallback = next(text for text in notices if "SYNTHETIC" in text)
    assert all(word in fallback for word in ("GIDEF_DATA", ".medmnist", "no network in tests")) and fallback in dataset.notes
    with pytest.warns(UserWarning) as warned:  # nobody listens: a warning
        load_dataset("bloodmnist", size=8, download=False)
    assert any("SYNTHETIC" in str(warning.message) and warning.filename == __file__ for warning in warned)


def test_asking_for_synthetic_gives_it_in_silence(asked):
    dataset = load_dataset("synthetic", size=8)
    assert dataset.synthetic and dataset.image_shape == (3, 8, 8) and asked == []


@pytest.mark.parametrize("name", ["dermamnist", "cifar10"])
def test_no_other_set_falls_back(name, asked):
    with pytest.raises(InputError) as caught:
        load_dataset(name, notice=print)
    assert len(asked) == 1
    assert all(word in str(caught.value) for word in ("was not found", "no network in tests", f"gidef data download {name}", "GIDEF_DATA"))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_download_can_be_switched_off(how, asked, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("GIDEF_OFFLINE", "1")
    with pytest.raises(InputError, match="switched off"):
        load_dataset("dermamnist", download=how != "argument", notice=print)
    assert asked == []


def test_a_download_lands_in_the_cache_of_medmnist(home, save, official, monkeypatch, notices, make_arrays):
    source = save(make_arrays((14, 7, 7), classes=7, side=28), "there.npz")
    official("dermamnist", source)

    def fetch(url, path, *, md5, progress):
        assert url.endswith("dermamnist.npz?download=1") and md5 == md5_of(source) and progress is print
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())

    monkeypatch.setattr(medmnist_sets, "fetch", fetch)
    dataset = load_dataset("dermamnist", progress=print, notice=notices.append)
    assert dataset.source == str(home / ".medmnist" / "dermamnist.npz") and dataset.modality == "dermatoscopy"
    assert "trying https://zenodo.org" in notices[0]


def test_official_sizes_are_files_of_their_own_and_others_are_made(tmp_path, save, monkeypatch, asked, notices, make_arrays):
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "data"))
    save(make_arrays((14, 7, 7), classes=7, side=28), "dermamnist.npz", tmp_path / "data")
    save(make_arrays((14, 7, 7), classes=7, side=64), "dermamnist_64.npz", tmp_path / "data")
    assert load_dataset("dermamnist", size=64, notice=notices.append).image_shape == (3, 64, 64)
    assert not any("resized" in note for note in notices)
    assert load_dataset("dermamnist", size=32, notice=notices.append).image_shape == (3, 32, 32)
    assert any("28x28 to 32x32" in note for note in notices)
    with pytest.raises(InputError, match=r"no dermamnist_128\.npz"):
        load_dataset("dermamnist", size=128, notice=notices.append)
    assert asked == ["https://zenodo.org/records/10519652/files/dermamnist_128.npz?download=1"]


def test_any_archive_in_the_folder_can_be_named(tmp_path, save, monkeypatch, make_arrays):
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path / "data"))
    save(make_arrays(), "clinic.npz", tmp_path / "data")
    assert load_dataset("clinic", notice=print).class_names == ("class 0", "class 1", "class 2", "class 3")
    assert load_dataset("clinic", size=16, notice=print).image_shape == (3, 16, 16)
    with pytest.raises(InputError, match="give files and folders as path"):
        load_dataset("../data/clinic", notice=print)


@pytest.mark.parametrize(
    ("name", "reason"), [("chestmnist", "several labels"), ("organmnist3d", "3-D"), ("bloodmnst", "Did you mean bloodmnist"), ("", "unknown")]
)
def test_unsupported_and_unknown_names_are_explained(name, reason):
    with pytest.raises(InputError, match=reason):
        load_dataset(name, notice=print)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 28.0}, {"size": 10**6}, {"validation_fraction": 0.0}, {"validation_fraction": 0.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        load_dataset("synthetic", **options)


def test_the_list_names_every_two_dimensional_medmnist_set():
    entries = {entry.name: entry for entry in available()}
    supported = [name for name, entry in entries.items() if entry.supported]
    assert len([name for name in supported if name.endswith("mnist")]) == 11 and {"cifar10", "synthetic"} <= set(supported)
    assert entries["retinamnist"].task == "ordinal-regression" and entries["retinamnist"].num_classes == 5
    assert entries["bloodmnist"].sizes == (28, 64, 128, 224) and entries["bloodmnist"].modality == "blood-cell microscopy"
    assert "several labels" in entries["chestmnist"].why_not and "3-D" in entries["nodulemnist3d"].why_not
    assert all(entry.modality != "unknown" for entry in entries.values())


def test_your_own_data_set_is_imported_called_and_checked(tmp_path, monkeypatch):
    (tmp_path / "own_images.py").write_text(
        "import torch\nfrom gidef.data import Dataset, Images\n"
        "def part(n): return Images(torch.zeros(n, 1, 9, 9, dtype=torch.uint8), torch.arange(n) % 2)\n"
        "def make(): return Dataset('own', 'own', 'x', ('a', 'b'), part(6), part(2), part(2), 'code', None, False)\n"
        "def gap(): return Dataset('own', 'own', 'x', ('a', 'b', 'c'), part(6), part(2), part(2), 'code', None, False)\n"
        "def other(): return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_dataset("own_images:make", notice=print).image_shape == (1, 9, 9)
    assert load_dataset("own_images:make", size=18, notice=print).image_shape == (1, 18, 18)
    for name, message in [("gap", "class 2 .c. has no training image"), ("other", "returned int"), ("absent", "cannot load")]:
        with pytest.raises(InputError, match=message):
            load_dataset(f"own_images:{name}", notice=print)
    with pytest.raises(InputError, match="cannot load"):
        load_dataset("no_such_module_here:make", notice=print)
    with pytest.raises(InputError, match="one of the two"):
        load_dataset("own_images:make", path="x.npz", notice=print)
    sys.modules.pop("own_images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: type(part)(part.images.float(), part.labels), "expected uint8"),
        (lambda part: type(part)(part.images[:, :2], part.labels), "1 or 3 channels"),
        (lambda part: type(part)(part.images, part.labels.int()), "expected int64"),
        (lambda part: type(part)(part.images, part.labels[:-1]), "one class number per image"),
        (lambda part: type(part)(part.images[:0], part.labels[:0]), "is empty"),
        (lambda part: type(part)(part.images[..., :5], part.labels), "same .C, H, W."),
        (lambda part: type(part)(part.images, part.labels - 1), "class -1"),
        (lambda part: type(part)(part.images, part.labels + 1), "class 4"),
    ],
)
def test_the_check_names_the_split(make_dataset, change, message):
    import dataclasses

    dataset = make_dataset()
    check_dataset(dataset)
    with pytest.raises(InputError, match=message) as caught:
        check_dataset(dataclasses.replace(dataset, test=change(dataset.test)))
    assert "test_" in str(caught.value) and "a test" in str(caught.value)


@pytest.fixture
def torchvision_files(monkeypatch):
    """CIFAR-10 in torchvision's own layout, with four images in each file, and their checksums declared."""
    from torchvision.datasets import CIFAR10

    folder = cifar_module.cache() / CIFAR10.base_folder
    folder.mkdir(parents=True)
    draws, pixels = np.random.default_rng(0), {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return md5_of(folder / name)

    class Small(CIFAR10):
        train_list, test_list = [], []
        meta = {**CIFAR10.meta, "md5": write("batches.meta", {"label_names": list(cifar_module.CLASS_NAMES)})}

    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        pixels[name] = draws.integers(0, 256, (4, 3072), dtype=np.uint8)
        md5 = write(name, {"data": pixels[name], "labels": [(4 * number + row) % 10 for row in range(4)]})
        (Small.test_list if name == "test_batch" else Small.train_list).append([name, md5])
    monkeypatch.setattr(cifar_module, "_set", lambda: Small)
    return folder, pixels


def test_cifar_is_read_from_the_files_of_torchvision(torchvision_files, asked):
    folder, pixels = torchvision_files
    dataset = load_dataset("cifar10", notice=print)
    assert dataset.image_shape == (3, 32, 32) and dataset.class_names[6] == "frog" and asked == []
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (10, 10, 4)  # one image of every class to validate on
    assert torch.equal(dataset.test.images.flatten(1), torch.from_numpy(pixels["test_batch"]))
    assert dataset.test.labels.tolist() == [0, 1, 2, 3]


def test_changed_cifar_files_are_never_unpickled(torchvision_files, tmp_path):
    folder, _ = torchvision_files
    trace = tmp_path / "trace"

    class Spy:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    (folder / "data_batch_3").write_bytes(pickle.dumps(Spy()))
    with pytest.raises(InputError, match="delete the folder"):
        load_dataset("cifar10", notice=print)
    assert not trace.exists()


def test_a_broken_cifar_archive_is_an_error_without_a_download(asked):
    cifar_module.cache().mkdir(parents=True)
    (cifar_module.cache() / "cifar-10-python.tar.gz").write_bytes(b"half")
    with pytest.raises(InputError, match="MD5 differs"):
        load_dataset("cifar10", notice=print)
    assert asked == []


REAL = os.environ.get("GIDEF_DATA")  # read before the fixture empties the environment


@pytest.mark.parametrize("name", ["bloodmnist", "breastmnist", "pneumoniamnist", "cifar10"])
def test_real_sets_load_and_pass_the_check(name, monkeypatch, notices):
    """On real images where GIDEF_DATA has the set; on synthetic ones for bloodmnist elsewhere."""
    if REAL:
        monkeypatch.setenv("GIDEF_DATA", REAL)
    entry = next(entry for entry in available() if entry.name == name)
    try:
        dataset = load_dataset(name, size=None if REAL else 8, download=False, notice=notices.append)
    except InputError:
        if REAL and any(os.path.exists(os.path.join(REAL, f"{name}{ending}.npz")) for ending in ("", "_resplit")):
            raise
        pytest.skip(f"{name} is not in GIDEF_DATA")
    check_dataset(dataset)
    assert dataset.num_classes == entry.num_classes
    means = dataset.train.images.float().mean((0, 2, 3))
    if name == "bloodmnist":
        assert means[0] > 150 and means[1] < means[0]  # stained smears are pale and pinkish, drawn ones too
    assert all(10 < value < 245 for value in means)


def test_a_set_that_is_here_is_found_without_reading_or_downloading(tmp_path, monkeypatch):
    from gidef.data import find_local

    monkeypatch.setattr("gidef.data.load.medmnist_sets.cached", lambda name, size: None)
    monkeypatch.setenv("GIDEF_DATA", str(tmp_path))
    assert find_local("bloodmnist") is None
    (tmp_path / "bloodmnist_resplit.npz").write_bytes(b"")
    assert find_local("bloodmnist") == tmp_path / "bloodmnist_resplit.npz"
    (tmp_path / "bloodmnist.npz").write_bytes(b"")
    assert find_local("bloodmnist") == tmp_path / "bloodmnist.npz"
