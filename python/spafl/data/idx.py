"""MNIST and Fashion-MNIST: four IDX files, plain or gzipped.

IDX (http://yann.lecun.com/exdb/mnist/): two zero bytes, a type byte (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the values.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from .builtin import DIGITS, enlarge
from .dataset import DataError, Dataset, channel_statistics
from .files import MAX_BYTES, Content, Source, check_published, missing, places
from .transform import Transform

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = {
    "mnist": DIGITS,
    "fashion-mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip
IMAGE = 28
MAX_IMAGE = 64

# MD5 of the unpacked files in the order of NAMES: packed again, as Debian does, the same content has another .gz.
# Fashion-MNIST's are those of the published .gz files (8d4fb7e6... in torchvision/datasets/mnist.py), unpacked; MNIST's
# are in general circulation (e.g. secml/data/loader/c_dataloader_mnist.py).
MD5 = {
    "mnist": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "fashion-mnist": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}
FILES = tuple(file for name in NAMES for file in (f"{name}.gz", name))


def _source(folder: str, name: str, url: str, package: str | None) -> Source:
    return Source(FILES, (folder, name, "."), tuple(f"{url}{file}.gz" for file in NAMES), package)


SOURCES = {
    "mnist": _source("MNIST/raw", "mnist", "https://ossci-datasets.s3.amazonaws.com/mnist/", None),
    "fashion-mnist": _source(
        "FashionMNIST/raw",
        "fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "dataset-fashion-mnist",
    ),
}
# Training-set statistics in common use; MNIST's as in pytorch/examples mnist/main.py. Fashion-MNIST's .2860 and .3530
# are the values in general circulation.
TRANSFORMS = {"mnist": Transform((0.1307,), (0.3081,)), "fashion-mnist": Transform((0.2860,), (0.3530,))}


def load_idx(
    name: str, root: Path | None = None, *, image: int = IMAGE, channels: int = 1, verify_checksums: bool = True
) -> Dataset:
    """Read ``name`` ("mnist" or "fashion-mnist") from the first of :func:`~spafl.data.files.places` that has it.

    Args:
        name: the set; 28x28 grey images of 10 classes.
        root: searched first, and torchvision's folder in it.
        image: 28, or larger up to 64: images are enlarged bilinearly, and standardised by their own statistics.
        channels: 1, or 3 equal ones.
        verify_checksums: compare the content of every file, packed or not, with its published MD5. Magic number,
            dimensions, exact length and label range are checked always.

    Raises:
        DataError: one line naming the file, what is wrong, what is expected, how to get it.
    """
    if not IMAGE <= image <= MAX_IMAGE:
        raise DataError(f"image must be {IMAGE} to {MAX_IMAGE} for {name}; got {image!r}")
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3 for {name}; got {channels!r}")
    source = SOURCES[name]
    folder = next((found for place in places(root) if (found := source.folder(place))), None)
    if folder is None:
        raise missing(name, source, root)
    arrays: list[np.ndarray] = []
    for stem, md5, url in zip(NAMES, MD5[name], source.urls):
        path = next((folder / file for file in (f"{stem}.gz", stem) if (folder / file).is_file()), None)
        if path is None:
            raise missing(name, source, root, folder / f"{stem}.gz")
        with Content(path) as content:
            array = read_idx(content, image=(IMAGE, IMAGE) if "images" in stem else ())
            if verify_checksums:
                check_published(str(path), content.md5.hexdigest(), content.position, md5, url)
        if "labels" in stem:
            _check_labels(path, array, images=len(arrays[-1]))
        arrays.append(array)
    train_x, train_y, test_x, test_y = arrays
    transform = TRANSFORMS[name]
    if image != IMAGE:
        train_x, test_x = enlarge(train_x, image, white=255), enlarge(test_x, image, white=255)
        transform = Transform(*channel_statistics(train_x[:, None]))
    train_x, test_x = (np.repeat(x[:, None], channels, axis=1) for x in (train_x, test_x))
    transform = Transform(transform.mean * channels, transform.std * channels)
    train_y, test_y = train_y.astype(np.int64), test_y.astype(np.int64)
    return Dataset(name, train_x, train_y, test_x, test_y, 10, transform, class_names=CLASSES[name])


def read_idx(content: Content, image: tuple[int, ...]) -> np.ndarray:
    """The uint8 array (n, *image) in an IDX file.

    Raises:
        DataError: wrong magic number or dimensions, more than :data:`MAX_BYTES` announced, or more or fewer bytes than
            announced.
    """
    path, ndim = content.path, 1 + len(image)
    magic = 0x0800 + ndim
    start = 4 + 4 * ndim
    header = content.take(start)
    found = int.from_bytes(header[:4], "big")
    if len(header) >= 4 and found != magic:
        raise DataError(f"{path}: magic number {found}, expected {magic} (unsigned bytes, {ndim} dimensions)")
    if len(header) < start:
        raise DataError(f"{path}: {len(header)} bytes, too short for an IDX header of {start}; the file is truncated")
    n, *dims = struct.unpack(f">{ndim}I", header[4:])
    if tuple(dims) != image:
        raise DataError(f"{path}: images of {'x'.join(map(str, dims))}, expected {'x'.join(map(str, image))}")
    expected = n * math.prod(image)
    if start + expected > MAX_BYTES:
        raise DataError(f"{path}: announces {n} entries, {expected} bytes; at most {MAX_BYTES} are read of one file")
    values = content.take_array(expected)
    if len(values) < expected:
        problem = f"{start + len(values)} bytes, expected {start + expected} for {n} entries; the data are truncated"
        raise DataError(f"{path}: {problem}")
    if content.skip(1):
        raise DataError(f"{path}: the {start + expected} bytes of {n} entries are followed by something else")
    return np.frombuffer(values, dtype=np.uint8).reshape(n, *image)


def _check_labels(path: Path, labels: np.ndarray, images: int) -> None:
    if len(labels) != images:
        raise DataError(f"{path}: {len(labels)} labels for {images} images")
    if len(labels) and labels.max() > 9:
        at = int(labels.argmax())
        raise DataError(f"{path}: label {labels[at]} at position {at}, expected 0..9")
