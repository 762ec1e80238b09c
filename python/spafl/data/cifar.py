"""CIFAR-10 and CIFAR-100: the Python pickles or the binary version, unpacked or straight from the .tar.gz.

Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. A pickle can run code when it is loaded, so these are read as data
(:mod:`spafl.data.inert`): no function named by a file is ever called.
"""

from __future__ import annotations

import hashlib
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from . import inert
from .dataset import DataError, Dataset
from .files import Content, Source, check_published, missing, places, read_whole
from .inert import Call, InertPickleError, Name
from .transform import Transform

URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32
MAX_MEMBER = 1 << 28  # bytes; the largest published file has 155 million
MAX_MEMBERS = 1000  # of an archive; the published ones have at most nine


@dataclass(frozen=True)
class Form:
    """One published form: ``train`` and ``test`` files in ``folder``, packed in ``archive``; MD5 by file name."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    md5: dict[str, str]
    parse: Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]

    @property
    def url(self) -> str:
        return URL.rpartition("/")[0] + "/" + self.archive

    @property
    def source(self) -> Source:
        return Source(self.train + self.test, (self.folder, "."), (self.url,))


_MULTIARRAY = [Name(module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")]
_FROM_BUFFER = [Name(module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")]
_NDARRAY, _DTYPE, _ENCODE = Name("numpy", "ndarray"), Name("numpy", "dtype"), Name("_codecs", "encode")
_ALLOWED = (*_MULTIARRAY, *_FROM_BUFFER, _NDARRAY, _DTYPE, _ENCODE)


def _bytes(value: Any) -> bytes:
    """Bytes in any of the forms pickles have for them."""
    if isinstance(value, Call) and value.name == _ENCODE:  # what Python 3 writes in protocol 2
        text, encoding = value.arguments if len(value.arguments) == 2 else (None, None)
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError(f"refused encoding {str(encoding)[:40]!r}")
        return text.encode("latin1")
    if isinstance(value, str):  # of Python 2
        return value.encode("latin1")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise ValueError("'data' holds no bytes")


def _array(value: Any) -> np.ndarray:
    """The uint8 array that a pickle describes: numpy's own form, and that of protocol 5."""
    if not isinstance(value, Call):
        raise ValueError("'data' is no array")
    if value.name in _MULTIARRAY and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, fortran, content = value.state
    elif value.name in _FROM_BUFFER and len(value.arguments) == 4:
        content, dtype, shape, order = value.arguments
        fortran = order != "C"
    else:
        raise ValueError("'data' is no array")
    code = dtype.arguments[0] if isinstance(dtype, Call) and dtype.name == _DTYPE and dtype.arguments else None
    if code not in ("u1", b"u1") or fortran:
        raise ValueError("'data' is not a C-ordered uint8 array")
    raw = _bytes(content)
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n <= len(raw) for n in shape):
        raise ValueError("'data' has a shape that its bytes do not fill")
    if math.prod(shape[:32]) != len(raw) or len(shape) > 32:
        raise ValueError("'data' has a shape that its bytes do not fill")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def parse_pickle(path: str, raw: bytes, *, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one CIFAR pickle; ``path`` is for messages.

    Raises:
        DataError: not a pickle, a pickle that names anything unexpected, or not CIFAR's shape or label range.
    """
    try:
        content = inert.load(raw, _ALLOWED)
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
        for entry in ("data", key):
            if entry not in content:
                raise DataError(f"{path}: no entry {entry!r} in the pickle; expected 'data' and '{key}'")
        x, labels = _array(content["data"]), content[key]
        if not isinstance(labels, list) or not all(type(v) is int for v in labels):
            raise ValueError(f"'{key}' is not a list of whole numbers")
    except DataError:
        raise
    except (InertPickleError, ValueError) as error:
        raise DataError(f"{path}: not a readable CIFAR pickle ({one_line(error)}); see {URL}") from error
    if x.ndim != 2 or x.shape[1] != PIXELS:
        raise DataError(f"{path}: 'data' has shape {x.shape}, expected (n, {PIXELS})")
    return _checked(path, x, np.array(labels), classes)


def parse_bin(path: str, raw: bytes, *, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from the binary version: records of ``label_bytes`` labels (the last one counts) and 3,072 pixels."""
    record = label_bytes + PIXELS
    if not raw or len(raw) % record:
        raise DataError(f"{path}: {len(raw)} bytes, expected a multiple of {record} (one record); it may be truncated")
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, record)
    return _checked(path, records[:, label_bytes:], records[:, label_bytes - 1], classes)


def _checked(path: str, x: np.ndarray, y: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    if y.shape != (len(x),):
        raise DataError(f"{path}: {y.size} labels for {len(x)} images")
    if y.dtype.kind not in "iu":
        raise DataError(f"{path}: a label does not fit 64 bits; expected 0..{classes - 1}")
    wrong = np.flatnonzero((y < 0) | (y >= classes))
    if len(wrong):
        raise DataError(f"{path}: label {y[wrong[0]]} at position {wrong[0]}, expected 0..{classes - 1}")
    return x.reshape(-1, 3, 32, 32), y.astype(np.int64)


# MD5 of the unpacked files, so an archive that was packed again is as good. Those of the pickles are in
# torchvision/datasets/cifar.py, those of the binary files in rai-project/dldataset (vision/cifar10.go, cifar100.go).
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
FORMS = {
    "cifar10": (
        Form(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            _BATCHES,
            ("test_batch",),
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
            partial(parse_pickle, key="labels", classes=10),
        ),
        Form(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"{batch}.bin" for batch in _BATCHES),
            ("test_batch.bin",),
            {
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
                "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
            },
            partial(parse_bin, label_bytes=1, classes=10),
        ),
    ),
    "cifar100": (
        Form(
            "cifar-100-python.tar.gz",
            "cifar-100-python",
            ("train",),
            ("test",),
            {
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            },
            partial(parse_pickle, key="fine_labels", classes=100),
        ),
        Form(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            ("train.bin",),
            ("test.bin",),
            {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15", "test.bin": "4499cfba6c016c1be1438163640a0898"},
            partial(parse_bin, label_bytes=2, classes=100),
        ),
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}
# In the order of the labels, as batches.meta.txt and fine_label_names.txt list them.
NAMES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
        can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
        lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
        seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
        tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
        worm
    """,
}
# Training-set statistics. CIFAR-10: as in PyTorch's tutorial (pytorch/tutorials pull request 2405). CIFAR-100: the
# values in general circulation (weiaicunzai/pytorch-cifar100), to four places.
TRANSFORMS = {
    "cifar10": Transform((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), augment="crop-flip"),
    "cifar100": Transform((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), augment="crop-flip"),
}


def load_cifar(name: str, root: Path | None = None, *, verify_checksums: bool = True) -> Dataset:
    """Read ``name`` ("cifar10" or "cifar100", fine labels) from ``root``: 3x32x32 images, channels red, green, blue.

    Looked for in the :func:`~spafl.data.files.places`, ``root`` first; in each, directly and in the folder its archive
    makes: the Python pickles, the Python archive, the binary files, the binary archive. ``verify_checksums`` compares
    every file, unpacked or in its archive, with its published MD5; shapes, lengths and labels are checked always.

    Raises:
        DataError: one line naming the file, what is wrong, what is expected, how to get it.
    """
    for place in places(root):
        for form in FORMS[name]:
            folder = form.source.folder(place)
            if folder is not None:
                members = _from_folder(name, form, folder, root)
            elif (place / form.archive).is_file():
                members = _from_archive(form, place / form.archive)
            else:
                continue
            if verify_checksums:
                for file, (path, raw) in members.items():
                    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
                    check_published(path, found, len(raw), form.md5[file], form.url)
            train_x, train_y = _joined(form, form.train, members)
            test_x, test_y = _joined(form, form.test, members)
            arrays, names = (train_x, train_y, test_x, test_y), tuple(NAMES[name].split())
            return Dataset(name, *arrays, CLASSES[name], TRANSFORMS[name], class_names=names)
    raise missing(name, FORMS[name][0].source, root)


Members = dict[str, tuple[str, bytes]]
"""By file name: what to call the file in messages, and its bytes."""


def _from_folder(name: str, form: Form, folder: Path, root: Path | None) -> Members:
    members = {}
    for file in form.train + form.test:
        path = folder / file
        if not path.is_file():
            raise missing(name, form.source, root, path)
        members[file] = (str(path), read_whole(path, MAX_MEMBER))
    return members


def _from_archive(form: Form, archive: Path) -> Members:
    """Read the members by exact name; nothing is written to disk.

    Headers are read one block at a time: what extended headers say (long names, links, sizes) is passed over like the
    content of any other member, so that none of them can ask for memory.
    """
    wanted = form.train + form.test
    members: Members = {}
    block = tarfile.BLOCKSIZE
    with Content(archive) as content:
        for _ in range(MAX_MEMBERS):
            header = content.take(block)
            if len(header) == block and not header.strip(b"\0"):
                break  # the end mark
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise _incomplete(archive, form, one_line(error)) from error
            folder, _, file = info.name.removeprefix("./").rpartition("/")
            size = info.size
            if size < 0:
                raise _incomplete(archive, form, f"a member of {size} bytes")
            if folder == form.folder and file in wanted and info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                if size > MAX_MEMBER:
                    raise DataError(f"{archive}: {file} has {size} bytes; at most {MAX_MEMBER}")
                raw = content.take(size)
                members[file] = (f"{archive}:{form.folder}/{file}", raw)
                size -= len(raw)
                if size:
                    raise _incomplete(archive, form, "it ends in the middle of a file")
            padding = -info.size % block
            if content.skip(size + padding) < size + padding:
                raise _incomplete(archive, form, "it ends in the middle of a file")
        else:
            raise DataError(f"{archive}: has more than {MAX_MEMBERS} members")
    for file in wanted:
        if file not in members:
            raise DataError(f"{archive}: has no {form.folder}/{file}; fetch it again from {form.url}")
    return members


def _incomplete(archive: Path, form: Form, why: str) -> DataError:
    return DataError(f"{archive}: not a complete .tar.gz: {why}; fetch it again from {form.url}")


def _joined(form: Form, files: tuple[str, ...], members: Members) -> tuple[np.ndarray, np.ndarray]:
    parts = [form.parse(*members[file]) for file in files]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
