"""A data set in memory, and the registry that loads one by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .transform import AUGMENTATIONS, PIXELS, Transform


class DataError(ValueError):
    """A data set cannot be loaded: one line with the file or option, what is wrong and what is expected."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as stored and their labels.

    ``train_x`` and ``test_x`` are (n, c, h, w), uint8 as stored or float32 on the 0..1 scale; ``train_y`` and
    ``test_y`` are (n,) int64 in 0..classes-1. ``transform`` turns a batch of ``*_x`` into what a model takes.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    transform: Transform

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.ndim != 4 or x.dtype not in (np.uint8, np.float32):
                raise DataError(f"{self.name}: {part}_x must be uint8 or float32 (n, c, h, w); got {x.dtype} {x.shape}")
            if y.shape != (len(x),) or y.dtype != np.int64:
                raise DataError(
                    f"{self.name}: {part}_y must be int64 ({len(x)},) like {part}_x; got {y.dtype} {y.shape}"
                )
            if len(y) == 0:
                raise DataError(f"{self.name}: the {part} part is empty")
            if y.min() < 0 or y.max() >= self.classes:
                raise DataError(f"{self.name}: {part} labels must be 0..{self.classes - 1}; got {y.min()}..{y.max()}")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: train and test images differ in shape: {self.shape} and {self.test_x.shape[1:]}"
            )
        if self.transform.mean and len(self.transform.mean) != self.shape[0]:
            raise DataError(
                f"{self.name}: transform is for {len(self.transform.mean)} channels; images have {self.shape[0]}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        c, h, w = self.train_x.shape[1:]
        return c, h, w

    def with_transform(self, **changes: object) -> Dataset:
        """The same data with fields of the transform replaced, e.g. ``with_transform(augment=None)``."""
        return dataclasses.replace(self, transform=dataclasses.replace(self.transform, **changes))  # type: ignore[arg-type]


Loader = Callable[..., Dataset]
"""``loader(root, **options)``: its keyword-only parameters are the options; a value must have its default's type."""

DATASETS: dict[str, Loader] = {}


def register_dataset(name: str, load: Loader) -> None:
    """Make ``load_dataset(name, root, **options)`` call ``load(root, **options)``.

    Raises:
        ValueError: the name is taken.
    """
    if name in DATASETS:
        raise ValueError(f"a data set named {name!r} exists already")
    DATASETS[name] = load


def dataset_options(name: str) -> dict[str, object]:
    """The options ``load_dataset(name, root, ...)`` takes beside ``augment``, with their defaults."""
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}{_nearest(name, DATASETS)}; known: {', '.join(DATASETS)}")
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def load_dataset(
    name: str, root: Path | str | None = None, *, augment: str | None = None, pixels: str | None = None,
    **options: object,
) -> Dataset:  # fmt: skip
    """Load a registered data set.

    Args:
        name: ``digits`` and ``synthetic`` need no files; ``mnist``, ``fashion-mnist``, ``cifar10`` and ``cifar100``
            read theirs from ``root``; and whatever ``register_dataset`` added.
        root: folder with the published files, loose or in the folders torchvision makes. Nothing is downloaded.
        augment: None keeps the data set's usual training augmentation, ``"none"`` switches it off,
            ``"crop-flip"`` switches it on.
        pixels: what the model sees: ``"standard"`` (the default) subtracts the training mean and divides by the
            deviation, ``"unit"`` only divides stored bytes by 255, ``"raw"`` leaves values as stored (0..255).
        options: see ``dataset_options(name)``.

    Raises:
        DataError: unknown name or option, or a file that is missing, damaged or not what it should be.
    """
    allowed = dataset_options(name)
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) or "none"
            raise DataError(f"data set {name!r} has no option {option!r}{_nearest(option, allowed)}; options: {known}")
        wanted = type(allowed[option])
        if type(options[option]) is not wanted:  # not isinstance: True is an int, and would pass for a size
            raise DataError(f"{option} of data set {name!r} must be {wanted.__name__}; got {options[option]!r}")
    if augment not in (None, "none", *AUGMENTATIONS):
        raise DataError(f"augment must be 'none' or 'crop-flip'; got {augment!r}")
    if pixels is not None and pixels not in PIXELS:
        raise DataError(f"pixels must be one of {', '.join(PIXELS)}; got {pixels!r}")
    dataset = DATASETS[name](None if root is None else Path(root), **options)
    if augment is not None:
        dataset = dataset.with_transform(augment=None if augment == "none" else augment)
    if pixels in (None, "standard"):
        return dataset
    channels = dataset.shape[0]
    # Without mean and deviation nothing is divided by 255 either.
    mean, std = ((0.0,) * channels, (1.0,) * channels) if pixels == "unit" else ((), ())
    return dataset.with_transform(mean=mean, std=std)


def _nearest(given: str, known: dict) -> str:
    match = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 ``images`` (n, c, h, w), on the 0..1 scale.

    From the histogram, so exact integer sums and no float copy of the images.
    """
    values = np.arange(256)
    means, stds = [], []
    for channel in range(images.shape[1]):
        histogram = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1000):  # bincount makes int64 of what it counts
            histogram += np.bincount(images[start : start + 1000, channel].ravel(), minlength=256)
        mean = float(histogram @ values / histogram.sum())
        variance = float(histogram @ (values - mean) ** 2 / histogram.sum())
        means.append(mean / 255)
        stds.append(max(variance, 1.0) ** 0.5 / 255)  # constant images: do not divide by zero
    return tuple(means), tuple(stds)
