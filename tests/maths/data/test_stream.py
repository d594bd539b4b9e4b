"""Clients that stream from shards: order, bits, memory, what is broken. Images are random pixels."""

import io
import itertools
import json
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from gidef.clients.local import batches
from gidef.data import partition, places_of_clients, stream, tar_stream, write_webdataset
from gidef.data.decode import decode_array
from gidef.data.stream import ClientShards, scan
from gidef.errors import InputError
from gidef.parallel import World
from gidef.streams import _key, load_streamed
from gidef.types import Client

DRAWS = np.random.default_rng(0)


def png(value=None, side=9):
    pixels = DRAWS.integers(0, 256, (side, side, 3), dtype=np.uint8) if value is None else np.full((side, side, 3), value, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return str(path)


def numbered(rows):
    """Examples whose pixels are their number."""
    return [member for row in rows for member in [(f"{row:03}.png", png(row)), (f"{row:03}.cls", str(row % 3).encode())]]


def shards(tmp_path, sizes=(10, 7, 13), ending="tar"):
    first = list(itertools.accumulate(sizes, initial=0))
    return [tar(tmp_path / f"{k}.{ending}", numbered(range(first[k], first[k + 1]))) for k in range(len(sizes))]


def source(places, client=3, **options):
    found = scan(client, places, size=None, keep=4, seed=0)
    left_out = tuple(map(frozenset, found.broken))
    return ClientShards(client, tuple(places), found.sizes, left_out, found.shape, **{"buffer": 1024, **options})


def drawn(source, *, batch_size=4, epochs=2, seed=5, round=6):
    return list(source.batches(batch_size=batch_size, epochs=epochs, seed=seed, round=round))


def numbers(found):
    """Of each batch's images, by what their pixels say."""
    return [images[:, 0, 0, 0].tolist() for _, _, images, _ in found]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_client_that_fits_the_buffer_sees_the_batches_of_one_in_memory_bit_for_bit(tmp_path, ending):
    """Read at their places (.tar) and from end to end (.tar.gz)."""
    images = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 9, 9)
    client, found = Client(3, images, torch.arange(30) % 3), drawn(source(shards(tmp_path, ending=ending)))
    expected = list(batches(client, batch_size=4, epochs=2, seed=5, round=6))
    assert len(found) == len(expected) == 16
    for (epoch, rows, pixels, labels), (wanted_epoch, wanted) in zip(found, expected, strict=True):
        assert epoch == wanted_epoch and torch.equal(rows, wanted)
        assert torch.equal(pixels, images[wanted]) and torch.equal(labels, client.labels[wanted])


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_with_a_small_buffer_every_example_comes_once_an_epoch_in_an_order_of_seed_round_and_client_alone(tmp_path, ending):
    places = shards(tmp_path, ending=ending)
    found = drawn(source(places, buffer=8))
    for epoch in (0, 1):
        seen = [n for (e, *_), batch in zip(found, numbers(found), strict=True) if e == epoch for n in batch]
        assert sorted(seen) == list(range(30)) and seen != sorted(seen)
    assert [len(batch) for batch in numbers(found)] == [4] * 7 + [2] + [4] * 7 + [2]
    again = drawn(source(places, buffer=8, decoders=5))
    assert numbers(again) == numbers(found) and all(torch.equal(a[1], b[1]) for a, b in zip(again, found, strict=True))
    others = [drawn(source(places, buffer=8), seed=4), drawn(source(places, buffer=8), round=7), drawn(source(places, buffer=8, client=4))]
    assert len({str(numbers(one)) for one in [found, *others]}) == 4
    assert numbers(found)[:8] != numbers(found)[8:], "a fresh order every epoch"


def test_the_order_does_not_depend_on_how_shards_are_read(tmp_path):
    (tmp_path / "gz").mkdir()
    plain, packed = (drawn(source(shards(folder, ending=ending), buffer=8)) for folder, ending in ((tmp_path, "tar"), (tmp_path / "gz", "tar.gz")))
    assert numbers(plain) == numbers(packed)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_no_more_than_the_batches_ahead_and_three_windows_are_read_before_they_are_needed(tmp_path, monkeypatch, ending):
    read, whole = [], stream.image_of
    monkeypatch.setattr(stream, "image_of", lambda sample: read.append(1) or whole(sample))
    found = source(shards(tmp_path, sizes=(60, 60), ending=ending), buffer=10)
    opened, samples = [], tar_stream.ShardReader.samples

    def counted(self, place, expected=None):
        for sample in samples(self, place, expected):
            opened.append(1)
            yield sample

    monkeypatch.setattr(tar_stream.ShardReader, "samples", counted)
    read.clear()
    running = found.batches(batch_size=2, epochs=1, seed=0, round=0)
    next(running)
    for _ in range(100):  # time enough to run ahead, if it did
        threading.Event().wait(0.002)
    assert len(read) <= 2 * (stream.AHEAD + 3)
    assert len(opened) == 0 if ending == "tar" else len(opened) <= 4 * 10
    before = threading.active_count()
    running.close()
    assert threading.active_count() < before, "closing ends the threads"


def test_broken_examples_are_skipped_and_counted_and_do_not_shift_the_others(tmp_path):
    members = numbered(range(10))
    members[6:6] = [("bad.png", png()[:50]), ("bad.cls", b"1")]
    members += [("x.png", png()), ("y.pickle", pickle.dumps(print)), ("z.npy", pickle.dumps(print)), ("z.cls", b"1")]
    found = scan(0, [tar(tmp_path / "0.tar", members)], size=None, keep=100, seed=0)
    assert found.sizes == (13,) and found.broken == ((3, 11, 12),)
    assert found.counts == {0: 4, 1: 3, 2: 3} and len(found.kept) == 10
    assert any("3 broken examples were skipped" in note for note in found.notes) and any("pickle" in note for note in found.notes)
    one = ClientShards(0, (str(tmp_path / "0.tar"),), found.sizes, tuple(map(frozenset, found.broken)), found.shape, 1024)
    assert one.num_examples == 10
    for _, rows, images, _ in drawn(one):
        assert torch.equal(images[:, 0, 0, 0], rows.to(torch.uint8))
    assert [one.position(kept.shard, kept.index) for kept in found.kept] == list(range(10))


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_broken_archive_is_an_error_and_so_is_one_that_changes_later(tmp_path, ending):
    places = shards(tmp_path, ending=ending)
    path, found = tmp_path / f"1.{ending}", source(places)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="1.tar.*not a whole tar archive"):
        scan(0, places, size=None, keep=4, seed=0)
    with pytest.raises(InputError, match="1.tar"):
        drawn(found)
    tar(path, numbered(range(10, 16)))  # one example less
    with pytest.raises(InputError, match="not what it was when the run began"):
        drawn(found)


def test_what_stays_in_memory_is_a_draw_of_seed_and_client_with_rare_classes_in_it(tmp_path):
    members = [member for row in range(120) for member in [(f"{row}.png", png(row)), (f"{row}.cls", b"1" if row in (17, 90) else b"0")]]
    place = tar(tmp_path / "0.tar", members)
    found = scan(0, [place], size=None, keep=20, seed=0)
    assert 20 <= len(found.kept) <= 22 and {kept.index for kept in found.kept if kept.label == 1} == {17, 90}
    assert all(int(kept.image[0, 0, 0]) == kept.index for kept in found.kept)

    def indices(**options):
        return [kept.index for kept in scan(**{"client": 0, "places": [place], "size": None, "keep": 20, "seed": 0, **options}).kept]

    assert indices(decoders=3) == indices() and len({str(indices(**one)) for one in ({}, {"client": 1}, {"seed": 1})}) == 3
    assert indices() == sorted(indices()) and max(indices()) > 100


def test_arrays_are_taken_as_they_are_and_pickles_and_lies_are_refused():
    array = DRAWS.integers(0, 256, (3, 9, 8), dtype=np.uint8)
    assert torch.equal(decode_array(npy(array)), torch.from_numpy(array))
    assert torch.equal(decode_array(npy(np.ascontiguousarray(array.transpose(1, 2, 0)))), torch.from_numpy(array))
    assert torch.equal(decode_array(npy(array[0])), torch.from_numpy(array[:1]))
    whole = npy(array)
    for bad in (
        whole[:-1], whole + b"x", whole[:60], b"", npy(array.astype(np.float32)), npy(np.array([print], dtype=object), allow_pickle=True),
        pickle.dumps(array), npy(np.asfortranarray(array)), npy(array[None]), npy(np.zeros((5, 9, 5), np.uint8)), npy(np.uint8(3)),
        whole.replace(b"(3, 9, 8)", b"(3, 9, 9)"), whole.replace(b"(3, 9, 8)", b"(-3,-9,8"[:9].ljust(9)),
    ):  # fmt: skip
        with pytest.raises(InputError, match="npy"):
            decode_array(bad)


def test_the_shards_of_clients_are_found_by_pattern_folder_and_list(tmp_path, make_dataset):
    dataset = make_dataset()
    clients = partition.iid(dataset.train.labels, num_clients=3, seed=0)
    write_webdataset(dataset, tmp_path / "s", examples_per_shard=6, clients=clients, kind="npy")
    folder = places_of_clients(str(tmp_path / "s"), (), 3)
    assert [len(places) for places in folder] == [3, 3, 3]
    assert places_of_clients(str(tmp_path / "s" / "client-{client:05d}-*.tar"), (), 3) == folder
    assert places_of_clients(None, [str(tmp_path / "s" / f"client-0000{k}-{{00000..00002}}.tar") for k in range(3)], 3) == folder
    assert places_of_clients("https://example.org/{client}/{0..1}.tar", (), 2)[1] == ["https://example.org/1/0.tar", "https://example.org/1/1.tar"]
    for path, listed, count, text in (
        (str(tmp_path / "s"), (), 4, "shards of 3 clients"), (None, ("a.tar",), 2, "shards of 1 clients"), (str(tmp_path / "s-*.tar"), (), 3, "client"),
        ("pipe:touch {client}.tar", (), 1, "would run commands"), (str(tmp_path / "s" / "client-{client:05d}-*.tar"), (), 4, "matches no shards"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            places_of_clients(path, listed, count)


def load(lists, **options):
    notices = []
    chosen = {"name": "mine", "size": None, "keep": 60, "seed": 0, "buffer": 1024, "decoders": 1, "world": World(), "notice": notices.append}
    return load_streamed(lists, **{**chosen, **options}), notices


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_a_converted_set_streams_the_very_images_of_the_one_in_memory(tmp_path, make_dataset, kind):
    dataset = make_dataset()
    clients = partition.iid(dataset.train.labels, num_clients=3, seed=0)
    write_webdataset(dataset, tmp_path, examples_per_shard=6, clients=clients, kind=kind)
    found, notices = load(places_of_clients(str(tmp_path), (), 3))
    assert found.dataset.class_names == dataset.class_names and found.dataset.synthetic and not notices
    assert torch.equal(found.dataset.val.images, dataset.val.images) and torch.equal(found.dataset.test.labels, dataset.test.labels)
    assert torch.equal(found.counts, torch.stack([torch.bincount(dataset.train.labels[part], minlength=4) for part in clients]))
    for client, part in zip(found.clients, clients, strict=True):
        assert client.num_examples == len(part)
        for _, rows, images, labels in client.source.batches(batch_size=5, epochs=1, seed=1, round=2):
            assert torch.equal(images, dataset.train.images[part[rows]]) and torch.equal(labels, dataset.train.labels[part[rows]])
        for row, image in zip(found.parts[client.id].tolist(), client.images, strict=True):
            assert torch.equal(image, dataset.train.images[part[found.positions[row]]])


def test_without_shards_of_their_own_validation_and_test_are_held_out_of_training(tmp_path):
    lists = [[tar(tmp_path / f"{k}-{s}.tar", numbered(range(60 * k + 30 * s, 60 * k + 30 * s + 30))) for s in (0, 1)] for k in (0, 1)]
    found, _ = load(lists, keep=40)
    held_out = {int(image[0, 0, 0]) for part in (found.dataset.val, found.dataset.test) for image in part.images}
    assert len(held_out) == len(found.dataset.val) + len(found.dataset.test) >= 8
    trained = {n for client in found.clients for batch in numbers(drawn(client.source, epochs=1)) for n in batch}
    assert trained == set(range(120)) - held_out
    assert int(found.counts.sum()) == len(trained) == sum(client.num_examples for client in found.clients)
    for client in found.clients:
        by_position = {int(row): int(image[0, 0, 0]) for _, rows, images, _ in drawn(client.source) for row, image in zip(rows, images, strict=True)}
        for row, image in zip(found.parts[client.id].tolist(), client.images, strict=True):
            assert by_position[int(found.positions[row])] == int(image[0, 0, 0])


def test_clients_of_unlike_images_need_a_size_and_become_alike_with_one(tmp_path):
    grey = npy(DRAWS.integers(0, 256, (12, 12), dtype=np.uint8))
    lists = [[tar(tmp_path / "0.tar", numbered(range(40)))], [tar(tmp_path / "1.tar", [m for k in range(40) for m in ((f"{k}.npy", grey), (f"{k}.json", json.dumps({"label": k % 3}).encode()))])]]
    with pytest.raises(InputError, match="set data.size"):
        load(lists)
    found, notices = load(lists, size=10)
    assert found.dataset.image_shape == (3, 10, 10) and any("client 1: 40 of 40 images are resized" in note for note in notices)
    assert next(found.clients[1].source.batches(batch_size=2, epochs=1, seed=0, round=0))[2].shape == (2, 3, 10, 10)


def test_remote_shards_are_streamed_and_a_transfer_that_breaks_is_an_error(tmp_path, monkeypatch):
    """The network is a folder here."""
    shards(tmp_path)

    class Response(io.BytesIO):
        length = 0

    monkeypatch.setattr(tar_stream, "open_url", lambda url: Response((tmp_path / url.rpartition("/")[2]).read_bytes()))
    local, far = (source([f"{base}/{k}.tar" for k in range(3)], buffer=8) for base in (tmp_path, "https://example.org"))
    assert numbers(drawn(far)) == numbers(drawn(local))
    monkeypatch.setattr(Response, "length", 5)
    with pytest.raises(InputError, match="broke off 5 bytes"):
        drawn(far)


def test_a_later_start_finds_what_the_scan_found_unless_a_shard_or_a_choice_changed(tmp_path, monkeypatch):
    """Client 1 has one broken example, greys and colours."""
    lists = [[tar(tmp_path / f"{k}-{s}.tar", numbered(range(60 * k + 30 * s, 60 * k + 30 * s + 30))) for s in (0, 1)] for k in (0, 1)]
    lists[1].append(tar(tmp_path / "1-2.tar", [("a.png", b"no picture"), ("a.cls", b"0"), ("b.npy", npy(np.full((9, 9), 77, np.uint8))), ("b.cls", b"2")]))
    scanned = []
    monkeypatch.setattr("gidef.streams.scan", lambda client, places, **options: scanned.append(client) or scan(client, places, **options))

    def again(**options):
        scanned.clear()
        found, notices = load(lists, keep=40, folder=tmp_path / "run", **options)
        return found, notices, list(scanned)

    first, said, who = again()
    assert who == [0, 1] and any("1 broken" in note for note in said)
    later, told, who = again()
    assert who == [] and told == said and later.dataset.md5 == first.dataset.md5
    for split in ("train", "val", "test"):
        mine, theirs = getattr(later.dataset, split), getattr(first.dataset, split)
        assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)
    assert torch.equal(later.counts, first.counts) and torch.equal(later.positions, first.positions)
    for mine, theirs in zip(later.clients, first.clients, strict=True):
        assert torch.equal(mine.images, theirs.images)
        for (_, rows, images, labels), (_, rows_then, images_then, labels_then) in zip(drawn(mine.source), drawn(theirs.source), strict=True):
            assert torch.equal(rows, rows_then) and torch.equal(images, images_then) and torch.equal(labels, labels_then)

    assert again(seed=1)[2] == [0, 1] and again(seed=1)[2] == []
    assert again(seed=1, size=12)[2] == [0, 1] and again(decoders=2, size=12, seed=1)[2] == []
    again()
    os.utime(lists[0][1], ns=(1, 1))
    assert again()[2] == [0] and again()[2] == []
    changed = tar(tmp_path / "1-0.tar", numbered(range(200, 229)))
    os.utime(changed, ns=(2, 2))
    found, _, who = again()
    assert who == [1] and int(found.counts.sum()) == int(first.counts.sum()) - 1 and found.dataset.md5 != first.dataset.md5


def test_a_kept_scan_that_is_damaged_is_made_anew_and_one_that_cannot_be_kept_is_said(tmp_path, monkeypatch):
    lists = [[tar(tmp_path / "0.tar", numbered(range(60)))]]
    found, _ = load(lists, folder=tmp_path / "run")
    kept = tmp_path / "run" / "scans" / "client-00000.safetensors"
    for damage in (b"", kept.read_bytes()[:-3], bytes(kept.stat().st_size)):
        kept.write_bytes(damage)
        assert torch.equal(load(lists, folder=tmp_path / "run")[0].dataset.train.images, found.dataset.train.images)
        assert kept.stat().st_size > len(damage) or kept.read_bytes() != damage
    (tmp_path / "file").write_text("")
    again, notices = load(lists, folder=tmp_path / "file")
    assert torch.equal(again.dataset.train.images, found.dataset.train.images) and any("cannot be written" in note for note in notices)


def test_remote_shards_are_scanned_at_every_start(tmp_path):
    assert _key([tar(tmp_path / "0.tar", numbered(range(3)))], {"seed": 0})
    assert _key(["https://example.org/0.tar"], {"seed": 0}) is None and _key([str(tmp_path / "gone.tar")], {"seed": 0}) is None
