"""MNIST and Fashion-MNIST: four IDX files, plain or gzipped.

IDX (http://yann.lecun.com/exdb/mnist/): two zero bytes, a type byte (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the values.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np

from .dataset import DataError, Dataset
from .files import Source, check_root, missing, one_line, read
from .transform import Transform

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PUBLISHED_COUNTS = (60_000, 60_000, 10_000, 10_000)

# MD5 of the .gz files in the order of NAMES, as in torchvision/datasets/mnist.py; none is published for unpacked files.
MD5 = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
FILES = tuple(file for name in NAMES for file in (f"{name}.gz", name))
SOURCES = {
    "mnist": Source(FILES, ("MNIST/raw", "."), "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": Source(
        FILES, ("FashionMNIST/raw", "."), "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    ),
}
# Training-set statistics in common use; MNIST's as in pytorch/examples mnist/main.py. Fashion-MNIST's .2860 and .3530
# are the values in general circulation.
TRANSFORMS = {"mnist": Transform((0.1307,), (0.3081,)), "fashion-mnist": Transform((0.2860,), (0.3530,))}


def load_idx(name: str, root: Path | None = None, *, verify_checksums: bool = True) -> Dataset:
    """Read ``name`` ("mnist" or "fashion-mnist") from ``root`` or torchvision's folder in it: 1x28x28, 10 classes.

    A ``.gz`` file is preferred to an unpacked one beside it because it can be verified. ``verify_checksums`` compares
    the .gz files with their published MD5 and every file with the published number of images; magic number,
    dimensions, exact length and label range are checked always.

    Raises:
        DataError: one line naming the file, what is wrong, what is expected, where it is published.
    """
    source = SOURCES[name]
    hint = f"put {', '.join(f'{n}.gz' for n in NAMES)} from {source.url} into {root or 'ROOT'}/{source.folders[0]}"
    root = check_root(name, root, hint)
    folder = source.folder(root)
    if folder is None:
        raise missing(name, root / source.folders[0] / f"{NAMES[0]}.gz", hint)
    arrays: list[np.ndarray] = []
    for stem, count, md5 in zip(NAMES, PUBLISHED_COUNTS, MD5[name]):
        path = folder / f"{stem}.gz"
        if path.is_file():
            raw = _unpack(path, read(path, md5 if verify_checksums else None, source.url))
        elif (path := folder / stem).is_file():
            raw = read(path, None, source.url)
        else:
            raise missing(name, folder / f"{stem}.gz", hint)
        array = parse_idx(path, raw, image=(28, 28) if "images" in stem else ())
        if verify_checksums and len(array) != count:
            raise DataError(f"{path}: {len(array)} entries, published {count}; fetch it again from {source.url}")
        if "labels" in stem:
            _check_labels(path, array, images=len(arrays[-1]))
        arrays.append(array)
    train_x, train_y, test_x, test_y = arrays
    return Dataset(
        name, train_x[:, None], train_y.astype(np.int64), test_x[:, None], test_y.astype(np.int64), 10, TRANSFORMS[name]
    )


def parse_idx(path: Path, raw: bytes, image: tuple[int, ...]) -> np.ndarray:
    """The uint8 array (n, *image) in the IDX bytes ``raw``; ``path`` is for messages.

    Raises:
        DataError: wrong magic number or dimensions, or more or fewer bytes than the header announces.
    """
    ndim = 1 + len(image)
    magic = 0x0800 + ndim
    start = 4 + 4 * ndim
    found = int.from_bytes(raw[:4], "big")
    if len(raw) >= 4 and found != magic:
        raise DataError(f"{path}: magic number {found}, expected {magic} (unsigned bytes, {ndim} dimensions)")
    if len(raw) < start:
        raise DataError(f"{path}: {len(raw)} bytes, too short for an IDX header of {start}; the file is truncated")
    n, *dims = struct.unpack(f">{ndim}I", raw[4:start])
    if tuple(dims) != image:
        raise DataError(f"{path}: images of {'x'.join(map(str, dims))}, expected {'x'.join(map(str, image))}")
    expected = start + n * int(np.prod(image, dtype=np.int64))
    if len(raw) != expected:
        problem = "truncated" if len(raw) < expected else "followed by something else"
        raise DataError(f"{path}: {len(raw)} bytes, expected {expected} for {n} entries; the data are {problem}")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(n, *image).copy()  # a writable one


def _unpack(path: Path, packed: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file: {one_line(error)}") from error


def _check_labels(path: Path, labels: np.ndarray, images: int) -> None:
    if len(labels) != images:
        raise DataError(f"{path}: {len(labels)} labels for {images} images")
    if len(labels) and labels.max() > 9:
        at = int(labels.argmax())
        raise DataError(f"{path}: label {labels[at]} at position {at}, expected 0..9")
