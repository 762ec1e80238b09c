"""A data set in memory, and the registry that loads one by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import plugins
from .transform import AUGMENTATIONS, PIXELS, Transform


class DataError(ValueError):
    """A data set cannot be loaded: one line with the file or option, what is wrong and what is expected."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples as stored and their targets; arrays may be memory-mapped.

    ``train_x`` and ``test_x`` are (n, ...): images (n, c, h, w), uint8 or float32 on the 0..1 scale; vectors or
    anything else, float32; tokens, int64. ``train_y`` and ``test_y`` are classes, (n,) int64 in 0..classes-1, or
    numbers to predict, (n, outputs) float32, with ``classes`` 0. ``transform`` turns a batch of ``*_x`` into what a
    model takes.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    transform: Transform
    owners: tuple[np.ndarray, np.ndarray] | None = None
    """Users to whom the train and the test samples belong, numbers from 0, where the data have such: their natural
    clients."""
    class_names: tuple[str, ...] | None = None
    """What the classes are called, by number, where the data say so."""
    standardised: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and deviation of the columns that a reader has standardised already, where the transform does not."""

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            plain = not self.transform.mean and self.transform.augment is None
            image = x.ndim == 4 and x.dtype in (np.uint8, np.float32)
            other = x.ndim >= 2 and x.dtype in (np.float32, np.int64) and plain
            if not (image or other) or 0 in x.shape[1:]:
                raise DataError(
                    f"{self.name}: {part}_x must be uint8 or float32 images (n, c, h, w), or, without standardisation "
                    f"and augmentation, float32 or int64 (n, ...); got {x.dtype} {x.shape}"
                )
            numbers = self.classes == 0
            if y.ndim != 1 + numbers or len(y) != len(x) or y.dtype != self._target_dtype:
                wanted = f"float32 ({len(x)}, outputs)" if numbers else f"int64 ({len(x)},)"
                raise DataError(f"{self.name}: {part}_y must be {wanted} like {part}_x; got {y.dtype} {y.shape}")
            if len(y) == 0:
                raise DataError(f"{self.name}: the {part} part is empty")
            if not numbers and (y.min() < 0 or y.max() >= self.classes):
                raise DataError(f"{self.name}: {part} labels must be 0..{self.classes - 1}; got {y.min()}..{y.max()}")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: train and test images differ in shape: {self.shape} and {self.test_x.shape[1:]}"
            )
        if self.train_x.dtype != self.test_x.dtype:
            raise DataError(f"{self.name}: train and test differ in dtype: {self.train_x.dtype}, {self.test_x.dtype}")
        if self.transform.mean and len(self.transform.mean) != self.shape[0]:
            raise DataError(
                f"{self.name}: transform is for {len(self.transform.mean)} channels; images have {self.shape[0]}"
            )
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise DataError(f"{self.name}: {len(self.class_names)} class names for {self.classes} classes")

    @property
    def _target_dtype(self) -> np.dtype:
        return np.dtype(np.int64 if self.classes else np.float32)

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a sample: one for each class, or those to predict."""
        return self.classes or int(self.train_y.shape[1])

    @functools.cached_property
    def edges(self) -> list[float]:
        """Of numbers to predict: the nine values of the first that cut the training part into tenths; else empty."""
        if self.classes:
            return []
        return np.unique(np.quantile(self.train_y[:, 0], np.arange(1, 10) / 10)).tolist()

    def strata(self, part: str) -> np.ndarray:
        """Whole numbers ``(n,)`` by which the samples of ``"train"`` or ``"test"`` are shared out to clients: their
        classes, or of numbers the tenth in which the first lies."""
        y = getattr(self, f"{part}_y")
        return y if self.classes else np.searchsorted(self.edges, y[:, 0], side="right").astype(np.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample; (channels, height, width) of an image."""
        return self.train_x.shape[1:]

    @property
    def normalisation(self) -> dict[str, Any]:
        """What is done to a sample as it is in the source before a model sees it: ``(x / scale - mean) / std`` along
        its first dimension, or nothing where ``mean`` and ``std`` are empty."""
        mean, std = self.standardised or (self.transform.mean, self.transform.std)
        scale = 255.0 if self.transform.mean and self.train_x.dtype == np.uint8 else 1.0
        return {"scale": scale, "mean": list(mean), "std": list(std)}

    def about(self) -> dict[str, Any]:
        """What a reader of a run needs to know of the samples, for JSON: names of the classes, normalisation, and of
        numbers to predict how many there are and the edges of their tenths."""
        return {
            "targets": None if self.classes else {"outputs": self.outputs, "edges": self.edges},
            "class_names": list(self.class_names) if self.class_names else None,
            "normalisation": self.normalisation,
        }

    def with_transform(self, **changes: object) -> Dataset:
        """The same data with fields of the transform replaced, e.g. ``with_transform(augment=None)``."""
        return dataclasses.replace(self, transform=dataclasses.replace(self.transform, **changes))  # type: ignore[arg-type]


def blank(n: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """``n`` samples of zeros as a model takes them, of data stored as ``dtype``."""
    return torch.zeros(n, *shape, dtype=torch.int64 if dtype == "int64" else torch.float32)


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
    if augment not in (None, "none", *AUGMENTATIONS):
        raise DataError(f"augment must be 'none' or 'crop-flip'; got {augment!r}")
    if pixels is not None and pixels not in PIXELS:
        raise DataError(f"pixels must be one of {', '.join(PIXELS)}; got {pixels!r}")
    place = None if root is None else Path(root)
    if plugins.is_path(name):
        load = plugins.find("data.name", name)
        made = plugins.call("data.name", load, {"root": place}, options)
        try:
            dataset = as_dataset(name, made)
        except DataError as error:
            raise DataError(f"{error} (from {plugins.place(load)})") from None
    else:
        _check_options(name, options)
        dataset = DATASETS[name](place, **options)
    if augment is not None:
        dataset = dataset.with_transform(augment=None if augment == "none" else augment)
    if pixels in (None, "standard"):
        return dataset
    # Without mean and deviation nothing is divided by 255 either. What is not bytes has no other scale than its own.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if pixels == "unit" and dataset.train_x.dtype == np.uint8:
        mean, std = (0.0,) * dataset.shape[0], (1.0,) * dataset.shape[0]
    return dataset.with_transform(mean=mean, std=std)


def _check_options(name: str, options: Mapping[str, object]) -> None:
    allowed = dataset_options(name)
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) or "none"
            raise DataError(f"data set {name!r} has no option {option!r}{_nearest(option, allowed)}; options: {known}")
        wanted = type(allowed[option])
        if wanted is type(None):
            continue  # an option without a default says itself what it takes
        if type(options[option]) is not wanted:  # not isinstance: True is an int, and would pass for a size
            raise DataError(f"{option} of data set {name!r} must be {wanted.__name__}; got {options[option]!r}")


def as_dataset(
    name: str,
    made: object,
    owners: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    standardised: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Dataset:
    """What a user's loader returned, as a data set.

    Args:
        name: of the set.
        made: a :class:`Dataset`; or ``(train_x, train_y, test_x, test_y)``, as a tuple or a dict of these names; or a
            pair of ``torch.utils.data.Dataset`` objects, train and test, that give ``(x, y)``. Arrays or tensors:
            images (n, h, w) or (n, c, h, w), anything else (n, ...). Bytes are images and get standardised by their
            own mean and deviation; other numbers stay as they are, floats as float32, integers as int64. Whole
            numbers from 0 as labels (n,) are classes; floats (n,) or (n, outputs) are numbers to predict.
        owners, class_names, standardised: see :class:`Dataset`.

    Raises:
        DataError: it is none of these, lengths differ, a value is not finite, or a label is no class.
    """
    if isinstance(made, Dataset):
        return made
    if isinstance(made, tuple | list) and len(made) == 2:
        made = (*_collected(name, "train", made[0]), *_collected(name, "test", made[1]))
    if isinstance(made, Mapping):
        if missing := [part for part in PARTS if part not in made]:
            raise DataError(f"{name}: the loader's dict has no {missing[0]!r}; needed: {', '.join(PARTS)}")
        made = tuple(made[part] for part in PARTS)
    if not isinstance(made, tuple | list) or len(made) != 4:
        raise DataError(
            f"{name}: the loader must return a Dataset, ({', '.join(PARTS)}) or two torch data sets; it returned a "
            f"{type(made).__name__}"
        )
    train_x, train_y, test_x, test_y = (_array(name, part, values) for part, values in zip(PARTS, made))
    x = {"train_x": _features(name, "train_x", train_x), "test_x": _features(name, "test_x", test_x)}
    y = {"train_y": _labels(name, "train_y", train_y), "test_y": _labels(name, "test_y", test_y)}
    if y["train_y"].dtype != y["test_y"].dtype or y["train_y"].shape[1:] != y["test_y"].shape[1:]:
        raise DataError(
            f"{name}: train_y and test_y must be of one kind, classes (whole numbers) or as many numbers to predict "
            f"(floats); got {train_y.dtype} {train_y.shape} and {test_y.dtype} {test_y.shape}"
        )
    classes = 0
    if y["train_y"].dtype == np.int64:
        labels = 1 + max(int(part.max(initial=0)) for part in y.values())
        classes = max(2, labels, len(class_names or ()))
        if class_names is not None and len(class_names) == labels == 1:
            class_names = None  # there are two outputs, and a name for one of them
    transform = Transform()
    if x["train_x"].dtype == np.uint8 and x["train_x"].ndim == 4:
        transform = Transform(*channel_statistics(x["train_x"]))
    names = None if class_names is None else tuple(map(str, class_names))
    applied = None if standardised is None else (tuple(map(float, standardised[0])), tuple(map(float, standardised[1])))
    arrays = x["train_x"], y["train_y"], x["test_x"], y["test_y"]
    return Dataset(name, *arrays, classes, transform, owners, names, applied)


PARTS = ("train_x", "train_y", "test_x", "test_y")


def _collected(name: str, part: str, samples: object) -> tuple[object, object]:
    """All samples of a torch data set, stacked."""
    try:
        count = len(samples)  # type: ignore[arg-type]
        pairs = [samples[i] for i in range(count)]  # type: ignore[index]
        xs, ys = zip(*((np.asarray(x), np.asarray(y)) for x, y in pairs))
        return np.stack(xs), np.stack(ys)
    except Exception as error:
        raise DataError(
            f"{name}: the {part} part is no data set of (x, y) samples of one shape: {plugins.explain(error)}"
        ) from None


def _array(name: str, part: str, values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.dtype.kind not in "uifb":
        raise DataError(f"{name}: {part} must be an array of numbers; got {array.dtype} {array.shape}")
    return array


def _features(name: str, part: str, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x[:, None] if x.ndim == 3 else x
    if x.dtype.kind in "iub":
        return x.astype(np.int64, copy=False)
    for start in range(0, len(x), 1000):
        if not np.isfinite(x[start : start + 1000]).all():
            raise DataError(f"{name}: {part} has a value that is not finite among samples {start} to {start + 999}")
    return x.astype(np.float32, copy=False)


def _labels(name: str, part: str, y: np.ndarray) -> np.ndarray:
    if y.dtype.kind == "f" and y.ndim in (1, 2) and 0 not in y.shape[1:]:
        y = y.astype(np.float32, copy=False).reshape(len(y), -1)
        if not np.isfinite(y).all():
            raise DataError(f"{name}: {part} has a number that is not finite in float32")
        return y
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            f"{name}: {part} must be classes, whole numbers (n,), or numbers to predict, floats (n,) or (n, outputs); "
            f"got {y.dtype} {y.shape}"
        )
    return y.astype(np.int64, copy=False)


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
