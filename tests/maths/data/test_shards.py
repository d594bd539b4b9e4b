import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from gidef.data import load_dataset, tar_stream, webdataset_shards, write_webdataset
from gidef.data.npz import md5_of
from gidef.errors import InputError

DRAWS = np.random.default_rng(0)


def load(path, notice=print, **options):
    return load_dataset("mine", path=str(path), notice=notice, **options)


def png(*, size=(9, 8), mode="RGB", kind="PNG"):
    pixels = DRAWS.integers(0, 256, (*size, 3) if mode == "RGB" else size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def examples(count=20, classes=2, **options):
    return [member for row in range(count) for member in [(f"{row:03}.png", png(**options)), (f"{row:03}.cls", str(row % classes).encode())]]


@pytest.mark.parametrize(("channels", "per_shard", "shards"), [(1, 7, 6 + 2 + 2), (3, 1000, 3)])
def test_written_and_read_again_every_bit_and_name_is_there(tmp_path, make_dataset, same, channels, per_shard, shards):
    dataset = make_dataset(channels=channels)
    paths = write_webdataset(dataset, tmp_path / "shards", examples_per_shard=per_shard)
    assert len(paths) == shards and all(path.is_file() for path in paths)
    notices = []
    again = load(tmp_path / "shards", notices.append)
    assert same(dataset, again)
    assert (again.name, again.title, again.modality, again.class_names) == (dataset.name, dataset.title, dataset.modality, dataset.class_names)
    assert again.synthetic and again.notes == ("random pixels",) == tuple(notices) and again.source.endswith("(from a test)")


def test_equal_data_sets_give_equal_bytes(tmp_path, make_dataset):
    first, second = (write_webdataset(make_dataset(), tmp_path / name, examples_per_shard=9) for name in "ab")
    assert [md5_of(path) for path in first] == [md5_of(path) for path in second]
    assert load(tmp_path / "a").md5 == load(tmp_path / "b").md5


def test_a_pattern_reads_the_same_as_the_folder(tmp_path, make_dataset, same):
    write_webdataset(make_dataset(), tmp_path, examples_per_shard=20)
    folder = load(tmp_path)
    assert same(load(tmp_path / "{train-{00000..00001},val-00000,test-00000}.tar"), folder)
    assert same(load(tmp_path / "*.tar"), folder)
    assert len(load(tmp_path / "{train-00000,val-00000,test-00000}.tar").train) == 20  # some of the shards, on purpose


def test_an_existing_set_is_not_mixed_with_another(tmp_path, make_dataset):
    write_webdataset(make_dataset(), tmp_path, examples_per_shard=20)
    with pytest.raises(InputError, match="holds shards already"):
        write_webdataset(make_dataset(), tmp_path, examples_per_shard=20)
    with pytest.raises(InputError, match="examples_per_shard=0"):
        write_webdataset(make_dataset(), tmp_path / "new", examples_per_shard=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_webdataset(make_dataset(), tmp_path / "file" / "x", examples_per_shard=5)


def test_foreign_shards_are_split_by_name_or_by_seed(tmp_path, same):
    tar(tmp_path / "named" / "train-0.tar", examples(20))
    tar(tmp_path / "named" / "test-0.tar.gz", examples(6))
    dataset = load(tmp_path / "named")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (18, 2, 6) and dataset.class_names == ("class 0", "class 1")
    assert dataset.image_shape == (3, 9, 8)
    tar(tmp_path / "all" / "0.tar", examples(20))
    first, other = (load(tmp_path / "all" / "0.tar", seed=seed) for seed in (0, 1))
    assert (len(first.train), len(first.val), len(first.test)) == (14, 2, 4) and not same(first, other)
    assert load(tmp_path / "all" / "0.tar", size=16).image_shape == (3, 16, 16)


def test_jpeg_grey_and_json_labels_are_understood(tmp_path):
    members = examples(10)
    for row in range(10, 20):
        members += [(f"{row}.JPG", png(mode="L", kind="JPEG")), (f"{row}.json", json.dumps({"label": row % 2}).encode())]
    notices = []
    dataset = load(tar(tmp_path / "0.tar", members), notices.append)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 20 and any("mixed" in note for note in notices)


BROKEN = {
    "cut image": [("x.png", png()[:60]), ("x.cls", b"1")],
    "no image at all": [("x.png", b"GIF89a"), ("x.cls", b"1")],
    "an image of another format": [("x.png", png(kind="TIFF")), ("x.cls", b"1")],
    "no class": [("x.png", png())],
    "no image": [("x.cls", b"1")],
    "words": [("x.png", png()), ("x.cls", b"one")],
    "negative class": [("x.png", png()), ("x.cls", b"-1")],
    "fractional class": [("x.png", png()), ("x.json", b'{"label": 0.5}')],
    "a list": [("x.png", png()), ("x.json", b"[1]")],
    "broken json": [("x.png", png()), ("x.json", b"{")],
    "twice": [("x.png", png()), ("x.png", png()), ("x.cls", b"7" * 30)],
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_examples_are_skipped_and_counted(tmp_path, case):
    notices = []
    dataset = load(tar(tmp_path / "0.tar", [*examples(20), *BROKEN[case]]), notices.append)
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == 20
    assert any(f"{2 if case == 'twice' else 1} broken examples were skipped (first: " in note for note in notices)


class _Spy:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_and_other_members_are_never_decoded(tmp_path):
    trace = tmp_path / "trace"
    evil = pickle.dumps(_Spy(trace))
    members = examples(20)
    for kind in ("pyd", "pickle", "pth", "npy"):
        members.append((f"x{kind}.{kind}", evil))
    members += [("evil.png", evil), ("evil.cls", evil), ("evil.json", evil)]
    path = tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as file:  # a link out of the archive
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    notices = []
    dataset = load(path, notices.append)
    assert not trace.exists() and len(dataset.train) == 14
    assert any("4 members of other kinds" in note and "pyd" in note for note in notices)
    assert any("2 broken" in note for note in notices)  # what calls itself npy, and what calls itself png


@pytest.mark.parametrize(
    "address", ["pipe:touch {trace}", "pipe:touch {trace} #.tar", "PIPE:touch {trace}", "s3://bucket/0.tar", "file:///0.tar", "hf://x/0.tar"]
)
def test_addresses_that_run_commands_are_refused(tmp_path, monkeypatch, address):
    trace = tmp_path / "trace"
    monkeypatch.setenv("GOPEN_REWRITE", f"/=pipe:touch {trace};")
    with pytest.raises(InputError, match="expected a local path or an http"):
        load(address.replace("{trace}", str(trace)))
    with pytest.raises(InputError, match="no such file"):
        load("/no/such/0.tar")  # webdataset would rewrite it into a command
    assert not trace.exists()


def cut_at(fraction):
    return lambda data: data[: int(fraction * len(data))]


def broken_header(data):
    place = 1024 * (len(data) // 2048)
    while data[place + 257 : place + 262] != b"ustar":
        place += 512
    return data[:place] + b"\xff" * 512 + data[place + 512 :]


def cut_at_member(data):
    place = 512 * (len(data) // 1024)
    while data[place + 257 : place + 262] != b"ustar":
        place += 512
    return data[:place]


@pytest.mark.parametrize(
    "spoil", [cut_at(0), cut_at(0.3), cut_at(0.61), cut_at_member, broken_header, lambda data: b"\x00" * 10240, lambda data: b"no tar" * 500]
)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_broken_or_cut_archive_is_an_error(tmp_path, spoil, ending):
    path = tar(tmp_path / "0.tar", examples(60))
    data = spoil(path.read_bytes())
    path = tmp_path / f"1.{ending}"
    path.write_bytes(gzip.compress(data) if ending == "tar.gz" else data)
    with pytest.raises(InputError, match=r"1\.tar"):
        load(path)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.98, 0.9999])
def test_a_cut_compressed_archive_is_an_error(tmp_path, fraction):
    path = tar(tmp_path / "0.tar.gz", examples(60))
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(InputError, match="not a whole tar archive"):
        load(path)


def test_the_index_notices_missing_foreign_and_shortened_shards(tmp_path, make_dataset):
    paths = write_webdataset(make_dataset(), tmp_path, examples_per_shard=10)
    whole = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(InputError, match=r"1 shards .* missing, first train-00001\.tar"):
        load(tmp_path)
    paths[1].write_bytes(paths[0].read_bytes())
    load(tmp_path)  # as many examples: only the checksum in dataset.md5 can tell
    tar(paths[1], examples(4))
    with pytest.raises(InputError, match=f"4 examples, {webdataset_shards.INDEX} says 10"):
        load(tmp_path)
    paths[1].write_bytes(whole)
    tar(tmp_path / "train-00009.tar", examples(4))
    with pytest.raises(InputError, match=r"does not know train-00009\.tar"):
        load(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index.pop("class_names"),
        lambda index: index.update(class_names=3),
        lambda index: index.update(class_names=[1, 2, 3, 4]),
        lambda index: index["splits"].update(train=["train-00000.tar"]),
        lambda index: index["splits"]["train"].update({"train-00000.tar": "ten"}),
        lambda index: index.update(title=None),
        lambda index: index["splits"].update(more={}),
    ],
)
def test_a_broken_index_is_an_error(tmp_path, make_dataset, spoil):
    write_webdataset(make_dataset(), tmp_path, examples_per_shard=100)
    index = json.loads((tmp_path / "dataset.json").read_text())
    spoil(index)
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"dataset\.json"):
        load(tmp_path)


def test_a_foreign_index_is_ignored_with_a_notice(tmp_path):
    tar(tmp_path / "0.tar", examples(20))
    (tmp_path / "dataset.json").write_text('{"anything": 1}')
    notices = []
    load(tmp_path, notices.append)
    assert any("not gidef's" in note for note in notices)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.txt", b"x")], "no example has both"),
        ([], "no example has both"),
        ([("0.png", b"x"), ("0.cls", b"1")], "no example has both .* 1 broken"),
        (examples(20, classes=1), "1 class"),
        ([*examples(20), ("x.png", png()), ("x.cls", b"9")], "class 2 .* has no training image"),
        ([*examples(20), ("x.png", png()), ("x.cls", b"2000000000")], "leaves classes empty"),
    ],
)
def test_shards_without_a_usable_set_are_errors(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        load(tar(tmp_path / "0.tar", members))


@pytest.mark.parametrize("pattern", ["{0..3.tar", "x-{0..2}.tar", "*.tar", "{0..200000}.tar"])
def test_patterns_without_shards_are_errors(tmp_path, pattern):
    with pytest.raises(InputError):
        load(tmp_path / pattern)


def test_shards_behind_an_address_are_streamed(tmp_path, make_dataset, same, monkeypatch):
    """The network is a folder here."""
    dataset = make_dataset()
    write_webdataset(dataset, tmp_path, examples_per_shard=20)

    class Response(io.BytesIO):
        length = 0

    def open_url(url):
        if not (tmp_path / url.rpartition("/")[2].partition("?")[0]).is_file():
            raise OSError("404")
        return Response((tmp_path / url.rpartition("/")[2].partition("?")[0]).read_bytes())

    for module in (tar_stream, webdataset_shards):
        monkeypatch.setattr(module, "open_url", open_url)
    address = "https://example.org/some/{train-{00000..00001},val-00000,test-00000}.tar"
    assert same(load(address), dataset)
    (tmp_path / "dataset.json").unlink()
    assert torch.equal(load(address).test.images, dataset.test.images)
    with pytest.raises(InputError, match="404"):
        load("https://example.org/some/train-{00000..00007}.tar")
    with pytest.raises(InputError, match="only WebDataset shards"):
        load("https://example.org/some/bloodmnist.npz")
    Response.length = 5
    with pytest.raises(InputError, match="broke off 5 bytes"):
        load(address)
