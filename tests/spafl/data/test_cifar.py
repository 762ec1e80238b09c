"""CIFAR files, crafted here, in all published forms; and pickles that try to run code."""

import hashlib
import io
import os
import pickle
import struct
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
from bounds import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from spafl.data import DataError, inert, load_dataset
from spafl.data import files as data_files
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
    good = pickled()
    assert good.count(b"latin1") == 1
    raw = good.replace(b"X\x06\x00\x00\x00latin1", b"X\x05\x00\x00\x00rot13")
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


@pytest.mark.parametrize("where", ["folder", "archive"])
@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("cifar10", "python3", "data_batch_1: MD5 .*published c99cafc152244af753f735de768cd75f"),
        ("cifar100", "python2", "train: MD5 .*published 16019d7e3df5f24257cddd939b257f8d"),
        ("cifar10", "binary", "data_batch_1.bin: MD5 .*published 5dd7e06a14cb22eb9f671a540d1b7c25"),
        ("cifar100", "binary", "train.bin: MD5 .*published 6172c7755cfe09b2fe270c85cebc1b15"),
    ],
)
def test_crafted_files_are_not_the_published_ones(tmp_path, name, form, where, message):
    write(tmp_path, name, form, where)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(name, tmp_path)
    assert "data.verify_checksums = false" in str(caught.value)


@pytest.mark.parametrize("where", ["folder", "archive"])
@pytest.mark.parametrize("form", ["python3", "binary"])
def test_every_file_is_verified_however_it_is_packed(tmp_path, monkeypatch, form, where):
    write(tmp_path, "cifar10", form, where)
    made = files("cifar10", form)
    for file, raw in made.items():
        monkeypatch.setitem(published("cifar10", form).md5, file, hashlib.md5(raw).hexdigest())
    assert len(load_dataset("cifar10", tmp_path).train_y) == 15
    for file in made:
        with monkeypatch.context() as m, pytest.raises(DataError, match=f"{file}: MD5"):
            m.setitem(published("cifar10", form).md5, file, "0" * 32)
            load_dataset("cifar10", tmp_path)


def test_a_missing_batch_is_named(tmp_path):
    write(tmp_path, "cifar10", "python3", "folder", lambda made: made.pop("test_batch"))
    with pytest.raises(DataError, match=r"cifar-10-batches-py/test_batch is missing; get it with: curl"):
        load(tmp_path)


def test_nothing_there_says_the_command_that_gets_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar100", tmp_path)
    assert str(caught.value).endswith(
        f"get it with: curl -fL --create-dirs -o {tmp_path}/cifar-100-python.tar.gz "
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    )
    with pytest.raises(DataError, match="cifar10: no data_batch_1 in any folder; get it with: curl"):
        load_dataset("cifar10")


def test_any_place_that_has_it_will_do(tmp_path, monkeypatch):
    empty, place = tmp_path / "empty", tmp_path / "place"
    empty.mkdir()
    place.mkdir()
    write(place, "cifar10", "binary", "archive")
    monkeypatch.setenv("SPAFL_DATA", str(place))
    assert len(load(empty).train_y) == 15 == len(load(None).train_y)


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_is_read_or_refused_in_words(protocol):
    x = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    for array in (x, x.copy()):
        array.flags.writeable = array is x
        raw = python3("labels", array, [3, 1, 2], protocol)
        got, labels = parse_pickle("file", raw, key="labels", classes=10)
        assert np.array_equal(got, x) and labels.tolist() == [3, 1, 2]
    out_of_band = pickle.dumps({"data": pickle.PickleBuffer(x)}, protocol=5, buffer_callback=lambda b: None)
    with pytest.raises(DataError, match=r"opcode (NEXT|READONLY)_BUFFER, which no CIFAR file needs"):
        parse_pickle("file", out_of_band, key="labels", classes=10)


# -- files that ask for more than they have


def bytearray8(n):
    return b"\x80\x05\x96" + struct.pack("<Q", n) + b"."


def encoded(levels):
    """A text through ``_codecs.encode`` again and again; each level would copy what the one before made."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    call = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    return b"\x80\x02" + text + b"q\x00](" + call * levels + b"e."


def nested(levels):
    """Tuples of two references to the tuple before: a text of it would have ``2 ** levels`` parts."""
    parts = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02K\x01q\x00" + parts


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (bytearray8(1 << 32), "expected 4294967296 bytes in a bytearray8, but only 1 remain"),
        (bytearray8((1 << 63) - 1), "but only 1 remain"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "expected .* bytes in a bytes8"),
        (b"\x80\x02r\xff\xff\xff\xff.", "value that is not there"),  # the memo of the C unpickler would be 64 GB
        (b"\x80\x02Nr\xff\xff\xff\xff.", "holds no dict"),
        (b"p" + b"9" * 5000 + b"\n.", "not a readable CIFAR pickle"),
        (b"I" + b"9" * 5000 + b"\n.", "not a readable CIFAR pickle"),
        (encoded(3000), "holds no dict"),
        (nested(200) + b".", "holds no dict"),
        (nested(200) + b"c_codecs\nencode\nX\x01\x00\x00\x00ah\xc8\x86R.", "holds no dict"),
        (b"\x80\x02" + b"]" * 40_000 + b"a" * 39_999 + b".", "more than 70000 opcodes"),
        (b"\x80\x02" + b"(" * 70_000, "more than 70000 opcodes"),
        (b"\x80\x02" + b"(" * 30_000 + b"l" * 30_000 + b".", "holds no dict"),  # so deep that a walk would overflow
    ],
)
def test_a_pickle_gets_no_more_than_its_bytes(monkeypatch, raw, message):
    assert inert.MAX_OPCODES == 1_000_000  # a few seconds; fewer are as good to see that they are counted
    monkeypatch.setattr(inert, "MAX_OPCODES", 70_000)
    with bounded(20 << 20, seconds=20), pytest.raises(DataError, match=message) as caught:
        parse_pickle("file", raw, key="labels", classes=10)
    assert len(str(caught.value)) < 400


def array_of(data):
    """The opcodes of an array, with other ones in place of its state."""
    return b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        # BUILD on a function, a class, an instance: attributes would be set on what the reader itself uses
        (b"\x80\x02c_codecs\nencode\n}X\x0c\x00\x00\x00__defaults__K\x01\x85sb.", "state to what takes none"),
        (b"\x80\x02cnumpy\ndtype\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.", "state to what takes none"),
        (b"\x80\x02}}X\x04\x00\x00\x00dataK\x01sb.", "state to what takes none"),
        (b"\x80\x02" + array_of(b"(K\x01tb(K\x02tb."), "state to what takes none"),
        (b"\x80\x02" + array_of(b"}X\x09\x00\x00\x00__class__K\x01sb."), "holds no dict"),
        # calls: of a call's result, of a class by NEWOBJ, INST, OBJ, of what a registry or a caller knows
        (b"\x80\x02" + array_of(b")R."), "calls what is no name"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "opcode NEWOBJ,"),
        (b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93)}\x92.", "opcode NEWOBJ_EX,"),
        (b"(inumpy\ndtype\n.", "opcode INST,"),
        (b"(ios\nsystem\n.", "opcode INST,"),
        (b"(cnumpy\ndtype\no.", "opcode OBJ,"),
        (b"\x80\x02\x82\x01.", "opcode EXT1,"),
        (b"Pname\n.", "opcode PERSID,"),
        (b"\x80\x02K\x01Q.", "opcode BINPERSID,"),
        (b"\x80\x04\x8f(K\x01\x90.", "opcode EMPTY_SET,"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "it names os.system"),
        (b"\x80\x04\x8c\x02os\x94h\x00\x8c\x06system\x93.", "it names os.system"),
        (b"\x80\x04K\x01K\x02\x93.", r"it names \?\.\?"),
        (b"\x80\x02cnumpy\nndarray.__reduce__\n.", "it names numpy.ndarray.__reduce__"),
        (b"\x80\x02}K\x01K\x02s.", "a key is not a text"),
        (b"\x80\x02}(U\x01au.", "items are set on what is no dict"),
        (b"\x80\x02](K\x01K\x02u.", "items are set on what is no dict"),
        (b"\x80\x02K\x01K\x02a.", "appended to what is no list"),
        (b"\x80\x02K\x01(a.", "value that is not there"),
        (b"\x80\x02(.", "value that is not there"),
        (b"\x80\x02t.", "value that is not there"),
        (b"\x80\x02h\x07.", "value that is not there"),
        (b"\x80\x02]", "STOP"),
    ],
)
def test_well_formed_exploits_are_refused(raw, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_pickle("file", raw, key="labels", classes=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape", ["K\x03M\x01\x0c\x86", "J\xff\xff\xff\xffM\x00\x0c\x86", "G\x40\x08\0\0\0\0\0\0M\x00\x0c\x86"]
)
def test_a_shape_that_the_bytes_do_not_fill_is_refused(shape):
    raw = python2("labels", np.zeros((3, 3, 32, 32), np.uint8), [1, 2, 3])
    changed = raw.replace(b"M\x03\x00M\x00\x0c\x86", shape.encode("latin1"))
    assert changed != raw
    with pytest.raises(DataError, match="shape that its bytes do not fill"):
        parse_pickle("file", changed, key="labels", classes=10)


def hostile_archive(path, headers):
    """A .tar.gz of raw headers, each followed by its size in zeros, made without holding them."""
    pack = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    with path.open("wb") as file:
        for header, size in headers:
            file.write(pack.compress(header))
            for _ in range(-(-size // len(block))):
                file.write(pack.compress(block))
        file.write(pack.flush())


def tar_header(name, size, kind):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        # an extended header of gigabytes, which tarfile would read into memory and search
        ([(tar_header("././@PaxHeader", 5 << 30, b"x"), 1 << 26)], "goes on past the 16777216 bytes"),
        ([(tar_header("global", 5 << 30, b"g"), 1 << 26)], "goes on past"),
        ([(tar_header("././@LongLink", 5 << 30, b"L"), 1 << 26)], "goes on past"),
        ([(tar_header("cifar-10-batches-py/data_batch_1", 5 << 30, b"0"), 0)], "has 5368709120 bytes; at most"),
        ([(tar_header("cifar-10-batches-py/data_batch_1", 1 << 27, b"0"), 1 << 20)], "ends in the middle of a file"),
        ([(tar_header("stray", 5 << 30, b"0"), 1 << 26)], "goes on past"),
        ([(tar_header("x", 0, b"x"), 0)] * 5000, "more than 1000 members"),
        ([(tar_header("empty", 0, b"0"), 0)] * 5000, "more than 1000 members"),
        ([(tar_header("empty", -512, b"0"), 0)], "not a complete .tar.gz: a member of -512 bytes"),
    ],
)
def test_an_archive_gets_no_more_than_its_members(tmp_path, monkeypatch, headers, message):
    monkeypatch.setattr(data_files, "MAX_BYTES", 1 << 24)
    hostile_archive(tmp_path / "cifar-10-python.tar.gz", headers)
    with bounded(30 << 20, seconds=20), pytest.raises(DataError, match=message):
        load(tmp_path)


def test_extended_headers_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for file, raw in files("cifar10", "python3").items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{file}")
            member.size, member.mtime, member.pax_headers = len(raw), 1.5, {"comment": "x" * 3000}
            tar.addfile(member, io.BytesIO(raw))
    assert len(load(tmp_path).train_y) == 15


@pytest.mark.parametrize("where", ["folder", "archive"])
def test_a_web_page_is_called_one(tmp_path, where):
    page = b"<html><head><title>404</title></head></html>"
    if where == "folder":
        write(tmp_path, "cifar10", "python3", "folder", lambda made: made.update(data_batch_2=page))
    else:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(page)
    with pytest.raises(DataError, match=r"(data_batch_2|cifar-10-python\.tar\.gz): a web page \(HTML\)"):
        load(tmp_path)
