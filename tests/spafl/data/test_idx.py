"""MNIST-like files, crafted here: every way to be wrong gets its own line."""

import gzip
import struct

import numpy as np
import pytest

from spafl.data import DataError, load_dataset
from spafl.data.idx import NAMES

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
        (NAMES[0], GOOD + b"x", "followed by something else"),
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


def test_checksums_are_on_unless_switched_off(tmp_path):
    write(tmp_path, packed=True)
    with pytest.raises(DataError, match=r"MD5 [0-9a-f]{32} of \d+ bytes, published f68b3c2dcbeaaa9fbdd348bbdeb94873"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(DataError, match="published 8d4fb7e6c68d591d4c3dfef9ec88bf0d"):
        load_dataset("fashion-mnist", tmp_path)


def test_unpacked_files_must_have_the_published_size(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="7 entries, published 60000"):
        load_dataset("mnist", tmp_path)


def test_nothing_there_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tmp_path)
    message = str(caught.value)
    assert f"{tmp_path}/MNIST/raw/{NAMES[0]}.gz is missing" in message
    assert "https://ossci-datasets.s3.amazonaws.com/mnist/" in message and "\n" not in message
    with pytest.raises(DataError, match="mnist needs a data root"):
        load_dataset("mnist")
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        load_dataset("mnist", tmp_path / "nowhere")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        load(tmp_path)
