"""CIFAR-10 and CIFAR-100: the Python pickles or the binary version, unpacked or straight from the .tar.gz.

Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. A pickle can run code when it is loaded, so these are read by an
unpickler that knows five names and gives them inert stand-ins: no function named by a file is ever called.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .dataset import DataError, Dataset
from .files import Source, check_root, missing, one_line, read
from .transform import Transform

URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32
MAX_MEMBER = 1 << 28  # bytes; the largest published file has 155 million


@dataclass(frozen=True)
class Form:
    """One published form: ``train`` and ``test`` files in ``folder``, packed in ``archive``; MD5 by file name."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    md5: dict[str, str]
    parse: Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]


class _Array:
    """Stands in for numpy's array: keeps the state a pickle gives it."""

    def __init__(self, *args: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Rebuild from the state (version, shape, dtype, fortran order, bytes)."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Dtype) or dtype.code != "u1" or fortran:
            raise ValueError("'data' is not a C-ordered uint8 array")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


class _Dtype:
    def __init__(self, code: object = None, *args: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: tuple) -> None:
        pass


def _encode(text: object, encoding: object = None) -> bytes:
    """What Python 3 writes for bytes in protocol 2: ``_codecs.encode(text, "latin1")``, and nothing else."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"refused encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *args: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *args: _Array(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):
    """The Python implementation: its memo is a dict, so that no index in a file can make it allocate gigabytes."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file needs") from None


def parse_pickle(path: str, raw: bytes, *, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one CIFAR pickle; ``path`` is for messages.

    Raises:
        DataError: not a pickle, a pickle that names anything unexpected, or not CIFAR's shape or label range.
    """
    try:
        # latin1 maps every byte to itself: how Python 2's strings survive
        content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
        x = content["data"].array()
        labels = content[key]
        if not isinstance(labels, list) or not all(type(v) is int for v in labels):
            raise ValueError(f"'{key}' is not a list of whole numbers")
    except KeyError as error:
        raise DataError(f"{path}: no entry {error} in the pickle; expected 'data' and '{key}'") from error
    except Exception as error:  # a damaged pickle can raise anything
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


# Archive MD5s: published by the authors at URL. Those of the pickles: torchvision/datasets/cifar.py. For single .bin
# files none is published: they are checked for size and labels.
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
FORMS = {
    "cifar10": (
        Form(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            _BATCHES,
            ("test_batch",),
            {
                "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
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
            {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
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
                "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
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
            {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
            partial(parse_bin, label_bytes=2, classes=100),
        ),
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}
# Training-set statistics. CIFAR-10: as in PyTorch's tutorial (pytorch/tutorials pull request 2405). CIFAR-100: the
# values in general circulation (weiaicunzai/pytorch-cifar100), to four places.
TRANSFORMS = {
    "cifar10": Transform((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), augment="crop-flip"),
    "cifar100": Transform((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), augment="crop-flip"),
}


def load_cifar(name: str, root: Path | None = None, *, verify_checksums: bool = True) -> Dataset:
    """Read ``name`` ("cifar10" or "cifar100", fine labels) from ``root``: 3x32x32 images, channels red, green, blue.

    Looked for in this order, in ``root`` and in the folder its archive makes: the Python pickles, the Python archive,
    the binary files, the binary archive. ``verify_checksums`` compares what has a published MD5 with it, and the
    number of images with the published 50,000 and 10,000; shapes, lengths and labels are checked always.

    Raises:
        DataError: one line naming the file, what is wrong, what is expected, where it is published.
    """
    hint = f"put {FORMS[name][0].archive} (packed or unpacked) from {URL} into {root or 'ROOT'}"
    root = check_root(name, root, hint)
    for form in FORMS[name]:
        files = Source(form.train + form.test, (form.folder, "."), URL)
        folder = files.folder(root)
        if folder is not None:
            members = _from_folder(name, form, folder, verify_checksums, hint)
        elif (root / form.archive).is_file():
            members = _from_archive(form, root / form.archive, verify_checksums)
        else:
            continue
        train_x, train_y = _joined(form, form.train, members)
        test_x, test_y = _joined(form, form.test, members)
        if verify_checksums and (len(train_y), len(test_y)) != (50_000, 10_000):
            raise DataError(
                f"{name} in {root}: {len(train_y)} train and {len(test_y)} test images, "
                f"published 50000 and 10000; {hint}"
            )
        return Dataset(name, train_x, train_y, test_x, test_y, CLASSES[name], TRANSFORMS[name])
    raise missing(name, root / FORMS[name][0].archive, hint)


def _from_folder(name: str, form: Form, folder: Path, verify: bool, hint: str) -> dict[str, tuple[str, bytes]]:
    members = {}
    for file in form.train + form.test:
        path = folder / file
        if not path.is_file():
            raise missing(name, path, hint)
        members[file] = (str(path), read(path, form.md5.get(file) if verify else None, URL))
    return members


def _from_archive(form: Form, archive: Path, verify: bool) -> dict[str, tuple[str, bytes]]:
    """Read the members by exact name; nothing is written to disk, links and other members are not followed."""
    content = read(archive, form.md5[form.archive] if verify else None, URL)
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            for member in tar:
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                if folder == form.folder and file in form.train + form.test and member.isreg():
                    if member.size > MAX_MEMBER:
                        raise DataError(f"{archive}: {member.name} has {member.size} bytes; at most {MAX_MEMBER}")
                    members[file] = (f"{archive}:{member.name}", tar.extractfile(member).read())  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: not a complete .tar.gz: {one_line(error)}; fetch it again from {URL}") from error
    for file in form.train + form.test:
        if file not in members:
            raise DataError(f"{archive}: has no {form.folder}/{file}; fetch it again from {URL}")
    return members


def _joined(form: Form, files: tuple[str, ...], members: dict[str, tuple[str, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    parts = [form.parse(*members[file]) for file in files]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
