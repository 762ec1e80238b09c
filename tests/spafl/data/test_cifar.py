"""CIFAR files, crafted here, in all published forms; and pickles that try to run code."""

import hashlib
import io
import os
import pickle
import struct
import subprocess
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spafl.data import DataError, load_dataset
from spafl.data.cifar import FORMS, parse_pickle

CLASSES = {"cifar10": 10, "cifar100": 100}
KEY = {"cifar10": "labels", "cifar100": "fine_labels"}


def content(name, per_file=3):
    """(file stem, images, labels) of each file, train first."""
    rng = np.random.default_rng(0)
    form = FORMS[name][0]
    return [
        (
            file,
            rng.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8),
            rng.integers(0, CLASSES[name], per_file).tolist(),
        )
        for file in form.train + form.test
    ]


def python3(key, x, labels, protocol=2):
    entry = {"data": x.reshape(len(x), -1), key: labels, "batch_label": "crafted", "filenames": ["a.png"] * len(x)}
    return pickle.dumps(entry, protocol=protocol)


def python2(key, x, labels):
    """The opcodes of the published files: Python 2 strings, numpy's old module names."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01M" + struct.pack("<H", len(x)) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", x.nbytes) + x.tobytes() + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([v]) for v in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key.encode()) + listed + b"u."


def binary(name, x, labels):
    coarse = b"\x07" if name == "cifar100" else b""
    return b"".join(coarse + bytes([y]) + image.tobytes() for image, y in zip(x, labels))


def files(name, form):
    parts = content(name)
    if form == "binary":
        return {f"{file}.bin": binary(name, x, y) for file, x, y in parts}
    encode = {"python2": python2, "python3": python3}[form]
    return {file: encode(KEY[name], x, y) for file, x, y in parts}


def published(name, form):
    return FORMS[name][1 if form == "binary" else 0]


def write(root, name, form, where, change=None):
    """Write crafted files as a folder, loose, or as an archive; ``change`` edits the dict of files first."""
    made = files(name, form)
    if change:
        change(made)
    layout = published(name, form)
    if where == "archive":
        with tarfile.open(root / layout.archive, "w:gz") as tar:
            for file, raw in made.items():
                member = tarfile.TarInfo(f"{layout.folder}/{file}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
        return
    folder = root / (layout.folder if where == "folder" else ".")
    folder.mkdir(exist_ok=True)
    for file, raw in made.items():
        (folder / file).write_bytes(raw)


def load(root, name="cifar10"):
    return load_dataset(name, root, verify_checksums=False)


@pytest.mark.parametrize("where", ["folder", "loose", "archive"])
@pytest.mark.parametrize("form", ["python2", "python3", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_reads_every_published_form(tmp_path, name, form, where):
    write(tmp_path, name, form, where)
    data = load(tmp_path, name)
    *train, (_, test_x, test_y) = content(name)
    assert data.classes == CLASSES[name] and data.shape == (3, 32, 32)
    assert np.array_equal(data.train_x, np.concatenate([x for _, x, _ in train]))
    assert data.train_y.tolist() == [label for _, _, y in train for label in y]
    assert np.array_equal(data.test_x, test_x) and data.test_y.tolist() == test_y
    assert data.transform.augment == "crop-flip"
    assert load_dataset(name, tmp_path, augment="none", verify_checksums=False).transform.augment is None
    data.train_x[0] = 0  # writable, as torch.from_numpy wants it


def test_the_crafted_python2_pickle_is_what_numpy_reads():
    _, x, y = content("cifar10")[0]
    entry = pickle.loads(python2("labels", x, y), encoding="latin1")
    assert np.array_equal(entry["data"].reshape(x.shape), x) and entry["labels"] == y


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (lambda p: Call(os.system, f"touch {p}"), "system"),
        (lambda p: Call(subprocess.check_call, ["touch", p]), "subprocess.check_call"),
        (lambda p: Call(eval, f"open({p!r}, 'w')"), "builtins.eval"),
        (lambda p: Call(getattr, p, "upper"), "builtins.getattr"),
        (lambda p: Call(np.save, p, np.zeros(1)), "numpy.save"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_unexecuted(tmp_path, attack, named):
    mark = tmp_path / "executed"

    def change(made):
        made["data_batch_1"] = pickle.dumps({"data": attack(str(mark)), "labels": []})

    write(tmp_path, "cifar10", "python3", "folder", change)
    with pytest.raises(DataError, match=rf"it names \S*{named}, which no CIFAR file needs"):
        load(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["numpy\n_core", "numpy\nndarray.tofile", "_codecs\ndecode", "numpy\nfromfile"])
def test_only_the_listed_names_pass(tmp_path, name):
    raw = b"\x80\x02c%b\n." % name.encode()
    write(tmp_path, "cifar10", "python3", "folder", lambda made: made.update(data_batch_2=raw))
    with pytest.raises(DataError, match="which no CIFAR file needs"):
        load(tmp_path)


def test_the_stand_in_for_encode_does_nothing_else(tmp_path):
    raw = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    write(tmp_path, "cifar10", "python3", "folder", lambda made: made.update(data_batch_2=raw))
    with pytest.raises(DataError, match="refused encoding 'rot13'"):
        load(tmp_path)


def pickled(key="labels", **changes):
    entry = {"data": np.zeros((3, 3072), np.uint8), key: [0, 1, 2]}
    entry.update(changes)
    return pickle.dumps({k: v for k, v in entry.items() if v is not None}, protocol=2)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickled()[:-100], "not a readable CIFAR pickle"),
        (b"", "not a readable CIFAR pickle"),
        (b"\x89PNG", "not a readable CIFAR pickle"),
        (pickle.dumps([1, 2]), "not a readable CIFAR pickle"),
        (pickled(key="fine_labels"), "no entry 'labels' in the pickle"),
        (pickled(data=np.zeros((3, 3071), np.uint8)), r"shape \(3, 3071\), expected \(n, 3072\)"),
        (pickled(data=np.zeros((3, 3072), np.int16)), "not a C-ordered uint8 array"),
        (pickled(data=np.zeros((3, 3072), np.uint8, order="F")), "not a C-ordered uint8 array"),
        (pickled(data="zeros"), "not a readable CIFAR pickle"),
        (pickled(labels=[0, 1]), "2 labels for 3 images"),
        (pickled(labels=[0, 1, 10]), "label 10 at position 2, expected 0..9"),
        (pickled(labels=[0, -1, 3]), "label -1 at position 1, expected 0..9"),
        (pickled(labels=[0, 1, 2**70]), "a label does not fit 64 bits"),
        (pickled(labels=[0.5, 1, 2]), "'labels' is not a list of whole numbers"),
        (pickled(labels=[[0], [1], [2]]), "'labels' is not a list of whole numbers"),
        (pickled(labels=7), "'labels' is not a list of whole numbers"),
    ],
)
def test_a_damaged_pickle_is_named(tmp_path, raw, message):
    write(tmp_path, "cifar10", "python3", "folder", lambda made: made.update(data_batch_3=raw))
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "cifar-10-batches-py" / "data_batch_3") in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_pickle_damaged_anywhere_loads_or_is_refused(data):
    raw = bytearray(pickled(data=np.zeros((1, 3072), np.uint8), labels=[1]))
    # half the hits in what is not pixels
    places = st.one_of(st.integers(0, len(raw) - 1), st.integers(0, 150), st.integers(len(raw) - 40, len(raw) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(places)] = data.draw(st.integers(0, 255))
    try:
        x, y = parse_pickle("file", bytes(raw), key="labels", classes=10)
    except DataError as error:
        assert "\n" not in str(error) and str(error).startswith("file: ")
    else:
        assert x.shape == (1, 3, 32, 32) and x.dtype == np.uint8 and y.shape == (1,) and 0 <= y[0] < 10


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("cifar10", b"\0" * 3072, r"3072 bytes, expected a multiple of 3073"),
        ("cifar10", b"", "0 bytes, expected a multiple of 3073"),
        ("cifar10", b"\x0a" + b"\0" * 3072, "label 10 at position 0, expected 0..9"),
        ("cifar100", b"\0" * 3073, "3073 bytes, expected a multiple of 3074"),
        ("cifar100", b"\0\x64" + b"\0" * 3072, "label 100 at position 0, expected 0..99"),
    ],
)
def test_a_damaged_binary_file_is_named(tmp_path, name, raw, message):
    last = published(name, "binary").test[0]
    write(tmp_path, name, "binary", "folder", lambda made: made.update({last: raw}))
    with pytest.raises(DataError, match=rf"{last}: {message}"):
        load(tmp_path, name)


def test_damaged_archives_are_named(tmp_path):
    write(tmp_path, "cifar10", "python3", "archive", lambda made: made.pop("data_batch_4"))
    with pytest.raises(DataError, match="has no cifar-10-batches-py/data_batch_4"):
        load(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    for raw in (archive.read_bytes()[:5000], b"not an archive", b""):
        archive.write_bytes(raw)
        with pytest.raises(DataError, match=r"not a complete .tar.gz"):
            load(tmp_path)


def test_links_and_stray_members_of_an_archive_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(files("cifar10", "python3")["data_batch_1"])
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for file, raw in files("cifar10", "python3").items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{file}")
            if file == "data_batch_1":
                member.type, member.linkname = tarfile.SYMTYPE, str(secret)
            else:
                member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
        stray = tarfile.TarInfo("../escaped")
        tar.addfile(stray, io.BytesIO(b""))
    with pytest.raises(DataError, match="has no cifar-10-batches-py/data_batch_1"):
        load(tmp_path)
    assert not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize(
    ("name", "form", "where", "message"),
    [
        ("cifar10", "python3", "folder", "data_batch_1: MD5 .*published c99cafc152244af753f735de768cd75f"),
        ("cifar10", "python3", "archive", "python.tar.gz: MD5 .*published c58f30108f718f92721af3b95e74349a"),
        ("cifar100", "python3", "folder", "train: MD5 .*published 16019d7e3df5f24257cddd939b257f8d"),
        ("cifar100", "binary", "archive", "binary.tar.gz: MD5 .*published 03b5dce01913d631647c71ecec9e9cb8"),
        ("cifar10", "binary", "folder", "15 train and 3 test images, published 50000 and 10000"),
    ],
)
def test_crafted_files_are_not_the_published_ones(tmp_path, name, form, where, message):
    write(tmp_path, name, form, where)
    with pytest.raises(DataError, match=message):
        load_dataset(name, tmp_path)


def test_files_with_the_right_checksum_pass_it(tmp_path, monkeypatch):
    write(tmp_path, "cifar10", "python3", "folder")
    for form in FORMS["cifar10"]:
        for file in form.md5:
            path = tmp_path / form.folder / file
            if path.is_file():
                monkeypatch.setitem(form.md5, file, hashlib.md5(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="15 train and 3 test images"):  # past the checksums, stopped by the size
        load_dataset("cifar10", tmp_path)


def test_a_missing_batch_is_named(tmp_path):
    write(tmp_path, "cifar10", "python3", "folder", lambda made: made.pop("test_batch"))
    with pytest.raises(DataError, match=r"cifar-10-batches-py/test_batch is missing: put cifar-10-python\.tar\.gz"):
        load(tmp_path)


def test_nothing_there_says_what_to_fetch(tmp_path):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar100", tmp_path)
    message = str(caught.value)
    assert f"{tmp_path}/cifar-100-python.tar.gz is missing" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message and f"into {tmp_path}" in message
    with pytest.raises(DataError, match="cifar10 needs a data root"):
        load_dataset("cifar10")
