"""MNIST-like files, crafted here: every way to be wrong gets its own line."""

import gzip
import hashlib
import shlex
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import bounded

from spafl.data import DataError, files, load_dataset
from spafl.data.dataset import channel_statistics
from spafl.data.idx import MD5, NAMES

RNG = np.random.default_rng(0)
CONTENT = {
    NAMES[0]: RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8),
    NAMES[1]: np.array([0, 9, 1, 2, 3, 4, 5], dtype=np.uint8),
    NAMES[2]: RNG.integers(0, 256, (2, 28, 28), dtype=np.uint8),
    NAMES[3]: np.array([8, 7], dtype=np.uint8),
}


def idx(array, magic=None):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim if magic is None else magic, *array.shape)
    return header + array.tobytes()


def write(folder, packed=False, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in CONTENT.items():
        raw = changes.get(name, idx(array))
        if raw is not None:
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


def load(root, name="mnist"):
    return load_dataset(name, root, verify_checksums=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "."), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_reads_plain_and_packed_from_both_layouts(tmp_path, packed, name, folder):
    write(tmp_path / folder, packed)
    data = load(tmp_path, name)
    assert data.name == name and data.classes == 10 and data.shape == (1, 28, 28)
    assert np.array_equal(data.train_x[:, 0], CONTENT[NAMES[0]]) and np.array_equal(
        data.test_x[:, 0], CONTENT[NAMES[2]]
    )
    assert data.train_y.tolist() == [0, 9, 1, 2, 3, 4, 5] and data.test_y.tolist() == [8, 7]
    data.train_x[0] = 0  # writable, as torch.from_numpy wants it


def test_the_sets_own_folder_wins_over_the_root(tmp_path):
    write(tmp_path / "FashionMNIST/raw")
    write(tmp_path, **{NAMES[3]: idx(np.array([1, 1], dtype=np.uint8))})
    assert load(tmp_path, "fashion-mnist").test_y.tolist() == [8, 7]
    assert load(tmp_path, "mnist").test_y.tolist() == [1, 1]


def test_a_missing_file_is_not_taken_from_another_folder(tmp_path):
    write(tmp_path / "FashionMNIST/raw", **{NAMES[3]: None})
    write(tmp_path)
    with pytest.raises(DataError, match=rf"FashionMNIST/raw/{NAMES[3]}.gz is missing"):
        load(tmp_path, "fashion-mnist")


GOOD = idx(CONTENT[NAMES[0]])


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (NAMES[0], GOOD[:-1], r"5503 bytes, expected 5504 for 7 entries; the data are truncated"),
        (NAMES[0], GOOD + b"x", "5504 bytes of 7 entries are followed by something else"),
        (NAMES[0], GOOD[:9], "9 bytes, too short for an IDX header of 16"),
        (NAMES[0], b"", "0 bytes, too short"),
        (NAMES[0], idx(CONTENT[NAMES[0]], magic=0xD03), r"magic number 3331, expected 2051"),
        (NAMES[0], idx(CONTENT[NAMES[0]][:, :27]), "images of 27x28, expected 28x28"),
        (NAMES[0], idx(CONTENT[NAMES[1]]), "magic number 2049, expected 2051"),
        (NAMES[1], GOOD, "magic number 2051, expected 2049"),
        (NAMES[1], idx(CONTENT[NAMES[1]][:6]), "6 labels for 7 images"),
        (NAMES[3], idx(np.array([3, 10], dtype=np.uint8)), "label 10 at position 1, expected 0..9"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damage_is_named(tmp_path, packed, name, raw, message):
    write(tmp_path, packed, **{name: raw})
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip", lambda b: b[:40] + b"\0" * 60])
def test_a_broken_gzip_is_named(tmp_path, damage):
    write(tmp_path, packed=True)
    path = tmp_path / f"{NAMES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path}: not a complete gzip file"):
        load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_checksums_are_of_the_content_and_on_unless_switched_off(tmp_path, packed):
    write(tmp_path, packed)
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tmp_path)
    raw = idx(CONTENT[NAMES[0]])
    found = hashlib.md5(raw).hexdigest()
    assert f"MD5 {found} of {len(raw)} bytes, published 6bbc9ace898e44ae57da46a324031adb" in str(caught.value)
    assert "data.verify_checksums = false" in str(caught.value)
    with pytest.raises(DataError, match="published f4a8712d7a061bf5bd6d2ca38dc4d50a"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_how_a_file_was_packed_does_not_matter(tmp_path, monkeypatch, packed):
    write(tmp_path, packed)
    monkeypatch.setitem(MD5, "mnist", tuple(hashlib.md5(idx(CONTENT[name])).hexdigest() for name in NAMES))
    assert len(load_dataset("mnist", tmp_path).train_y) == 7
    name = NAMES[2]
    changed = idx(CONTENT[name] ^ 1)
    (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(changed) if packed else changed)
    with pytest.raises(DataError, match=f"{name}.*MD5"):
        load_dataset("mnist", tmp_path)


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist")
def test_debians_fashion_mnist_is_the_published_one(monkeypatch):
    monkeypatch.setattr(files, "SYSTEM", (Path("/usr/share/datasets"),))
    data = load_dataset("fashion-mnist")
    assert data.train_x.shape == (60_000, 1, 28, 28) and data.test_x.shape == (10_000, 1, 28, 28)
    assert np.bincount(data.train_y).tolist() == [6000] * 10
    mean, std = channel_statistics(data.train_x)
    assert abs(mean[0] - data.transform.mean[0]) < 1e-4 and abs(std[0] - data.transform.std[0]) < 1e-4


@pytest.mark.parametrize(("image", "channels"), [(28, 3), (32, 1), (32, 3), (64, 1)])
def test_images_can_be_enlarged(tmp_path, image, channels):
    write(tmp_path)
    data = load_dataset("mnist", tmp_path, verify_checksums=False, image=image, channels=channels)
    assert data.shape == (channels, image, image) and data.train_x.dtype == np.uint8
    assert (data.train_x == data.train_x[:, :1]).all()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(CONTENT[NAMES[0]][:, None]).double(), size=(image, image), mode="bilinear"
    )
    assert np.abs(data.train_x[:, :1] - expected.numpy()).max() <= 0.5 + 1e-9
    batch = data.transform(torch.from_numpy(data.train_x), torch.float64)
    assert batch.shape[1] == channels
    if image != 28:
        assert abs(batch.mean()) < 1e-10 and abs(batch.std(correction=0) - 1) < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image": 27}, "image must be 28 to 64 for mnist; got 27"), ({"channels": 2}, "channels must be 1 or 3")],
)
def test_impossible_sizes_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", tmp_path, **options)


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    asked, variable, here, system = (tmp_path / name for name in ("asked", "variable", "cwd/data", "system"))
    for label, folder in enumerate((asked, variable, here, system)):
        write(folder / "mnist", **{NAMES[3]: idx(np.array([label, label], dtype=np.uint8))})
    monkeypatch.setenv("SPAFL_DATA", str(variable))
    monkeypatch.setattr(files, "SYSTEM", (system,))
    monkeypatch.chdir(here.parent)
    for label, folder in enumerate((asked, variable, here, system)):
        assert load(asked).test_y[0] == label
        if label:
            assert load(None).test_y[0] == label
        shutil.rmtree(folder / "mnist")
    with pytest.raises(DataError, match=rf"mnist: no {NAMES[0]}.gz in {asked}, {variable}, data, {system}; get it"):
        load(asked)
    monkeypatch.setenv("SPAFL_DATA", str(tmp_path / "mistyped"))
    with pytest.raises(DataError, match=r"SPAFL_DATA .*mistyped is not a folder"):
        load(asked)


def test_nothing_there_says_the_command_that_gets_it(tmp_path, monkeypatch):
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tmp_path)
    message = str(caught.value)
    command = shlex.split(message.partition("get it with: ")[2])
    assert command[0] == "curl" and f"{tmp_path}/MNIST/raw/#1" in command
    assert command[-1].startswith("https://ossci-datasets.s3.amazonaws.com/mnist/{train-images") and "\n" not in message
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DataError, match=r"get it with: apt-get install dataset-fashion-mnist$"):
        load_dataset("fashion-mnist")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match=r"get it with: curl .*http://fashion-mnist"):
        load_dataset("fashion-mnist")
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        load_dataset("mnist", tmp_path / "nowhere")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_web_page_is_called_one(tmp_path, packed):
    write(tmp_path, packed)
    page = b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>404 Not Found</body></html>"
    (tmp_path / (NAMES[0] + ".gz" * packed)).write_bytes(page)
    with pytest.raises(DataError, match=f"{NAMES[0]}.*: a web page"):
        load(tmp_path)


def header(n):
    return struct.pack(">4I", 0x803, n, 28, 28)


def zeros(path, start, size):
    """A .gz of ``start`` and ``size`` zeros, without holding them."""
    pack = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        file.write(pack.compress(start))
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            file.write(pack.compress(block))
        file.write(pack.flush())


@pytest.mark.parametrize(
    ("n", "size", "message"),
    [
        (7, 1 << 26, "followed by something else"),  # a small header before much
        (6_000_000, 1 << 26, "announces 6000000 entries, 4704000000 bytes; at most"),
        (2**32 - 1, 0, "announces 4294967295 entries"),
        (600_000, 1 << 21, "the data are truncated"),  # announced, within the limit, and not there
    ],
)
def test_a_header_and_a_bomb_cost_no_memory(tmp_path, n, size, message):
    write(tmp_path, packed=True)
    zeros(tmp_path / f"{NAMES[0]}.gz", header(n), size)
    with bounded(20 << 20, seconds=5), pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_gzip_of_nothing_ends(tmp_path):
    write(tmp_path, packed=True)
    path = tmp_path / f"{NAMES[0]}.gz"
    path.write_bytes(gzip.compress(header(7)) + gzip.compress(b"") * 200_000)
    with bounded(50 << 20, seconds=20), pytest.raises(DataError, match="more than 100000 gzip files"):
        load(tmp_path)
    raw = idx(CONTENT[NAMES[0]])
    path.write_bytes(b"".join(gzip.compress(raw[i : i + 100]) for i in range(0, len(raw), 100)) + bytes(512))
    assert len(load(tmp_path).train_y) == 7  # many members and padding are fine
    path.write_bytes(gzip.compress(raw) + b"more")
    with pytest.raises(DataError, match="not a complete gzip file"):
        load(tmp_path)


def test_a_sparse_file_is_not_read_to_its_end(tmp_path):
    write(tmp_path)
    with (tmp_path / NAMES[0]).open("r+b") as file:
        file.truncate(1 << 40)
    with bounded(20 << 20, seconds=5), pytest.raises(DataError, match="followed by something else"):
        load(tmp_path)
