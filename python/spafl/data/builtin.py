"""Data sets that need no files: real handwritten digits, and synthetic images of any shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import DataError, Dataset, channel_statistics
from .transform import Transform

MAX_SYNTHETIC = 1 << 31  # bytes of images
DIGITS = tuple("0123456789")


def load_digits(root: Path | None = None, *, image: int = 28, channels: int = 1) -> Dataset:
    """The 1,797 handwritten digits that come with scikit-learn (the test part of the UCI optical digits set).

    8x8 images of 0..16 are enlarged bilinearly to ``image`` x ``image`` and scaled to 0..255. In exact integer
    arithmetic, because a float that lies on a rounding tie would differ between machines. ``channels=3`` repeats
    the grey image. The split depends on nothing: of every class, in stored order, each fifth sample (the 5th, 10th,
    ...) is test: 1,442 train, 355 test. Mean and std are those of the training part.
    """
    from sklearn.datasets import load_digits as stored  # a second to import; only this data set needs it

    if image not in (28, 32):
        raise DataError(f"image must be 28 or 32; got {image!r}")
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3; got {channels!r}")
    digits = stored()
    x = enlarge(digits.images.astype(np.int64), image, white=16)
    x = np.repeat(x[:, None], channels, axis=1)
    y = digits.target.astype(np.int64)
    is_test = np.zeros(len(y), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(y == label)[4::5]] = True
    mean, std = channel_statistics(x[~is_test])
    return Dataset("digits", x[~is_test], y[~is_test], x[is_test], y[is_test], 10, Transform(mean, std),
                   class_names=DIGITS)  # fmt: skip


def enlarge(images: np.ndarray, size: int, white: int) -> np.ndarray:
    """Bilinear enlargement of integer ``images`` (n, s, s) to uint8 (n, size, size), ``white`` becoming 255.

    Pixel centres as in ``torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False)``; rounded half up.
    """
    small = images.shape[-1]
    # Target pixel i lies at (2i+1) * small / (2 * size) - 1/2; times 2 * size that is the integer `place`.
    place = np.clip((2 * np.arange(size) + 1) * small - size, 0, 2 * size * (small - 1))
    left, fraction = np.divmod(place, 2 * size)
    weights = np.zeros((size, small), dtype=np.int64)
    weights[np.arange(size), left] = 2 * size - fraction
    weights[np.arange(size), np.minimum(left + 1, small - 1)] += fraction
    total = white * (2 * size) ** 2
    out = np.empty((len(images), size, size), dtype=np.uint8)
    for start in range(0, len(images), 1000):  # in pieces: the arithmetic takes eight bytes a pixel
        # Whole numbers far below 2**53, so floating-point products, which are fast, are exact.
        piece = weights.astype(float) @ images[start : start + 1000].astype(float) @ weights.T.astype(float)
        out[start : start + 1000] = (piece.astype(np.int64) * (2 * 255) + total) // (2 * total)
    return out


def load_synthetic(
    root: Path | None = None,
    *,
    image: int = 28,
    channels: int = 1,
    classes: int = 10,
    train: int = 1000,
    test: int = 200,
    seed: int = 0,
) -> Dataset:
    """Noisy class prototypes, for speed work and tests; classes equally often (+-1), training makes progress.

    A pixel is a quarter prototype (blocks of 4x4 pixels, uniform 0..255) and three quarters uniform noise. Train and
    test share the prototypes only. The same arguments give the same data.
    """
    sizes = {"image": image, "channels": channels, "classes": classes, "train": train, "test": test}
    for name, value in sizes.items():
        if value < 1:
            raise DataError(f"{name} must be 1 or more; got {value}")
    if seed < 0:
        raise DataError(f"seed must be 0 or more; got {seed}")
    if classes > train:
        raise DataError(f"classes must be at most the {train} training samples; got {classes}")
    size = (classes + train + test) * channels * image**2
    if size > MAX_SYNTHETIC:
        raise DataError(
            f"image, channels, classes, train and test ask for {size} bytes of images; at most {MAX_SYNTHETIC}"
        )
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (classes, channels, -(-image // 4), -(-image // 4)), dtype=np.uint8)
    prototypes = blocks.repeat(4, axis=2).repeat(4, axis=3)[:, :, :image, :image] // 4

    def part(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.permutation(np.arange(n) % classes)
        x = rng.integers(0, 192, (n, channels, image, image), dtype=np.uint8)
        for start in range(0, n, 1000):  # in pieces: one indexed copy of all prototypes would double the memory
            x[start : start + 1000] += prototypes[y[start : start + 1000]]
        return x, y

    train_x, train_y = part(train)
    test_x, test_y = part(test)
    mean, std = channel_statistics(train_x)
    return Dataset("synthetic", train_x, train_y, test_x, test_y, classes, Transform(mean, std))
