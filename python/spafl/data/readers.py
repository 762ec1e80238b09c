"""Readers for files of one's own: arrays, CSV, folders of images, LEAF's JSON, data sets of Hugging Face and Flower.

Each makes arrays of what it reads and leaves the rest to :func:`~spafl.data.dataset.as_dataset`. Where a source has no
test part, one is drawn: ``test_share`` of the samples of every class, by ``seed``.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from .dataset import PARTS, DataError, Dataset, as_dataset
from .files import places, read_whole

MAX_ARRAYS = 1 << 31  # bytes of all arrays of a file; more is memory-mapped from .npy files
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


def load_npz(root: Path | None = None, *, file: Any = None, test_share: float = 0.2, seed: int = 0) -> Dataset:
    """The arrays of a ``.npz`` file: ``train_x``, ``train_y``, ``test_x``, ``test_y`` (or ``x_train``, ...), or ``x``
    and ``y``, of which a test part is drawn.

    Raises:
        DataError: no such file, not a npz, an array that is missing, holds objects or is larger than it has bytes for.
    """
    path = _found("npz", root, file)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            alias = {part: part if part in names else "_".join(reversed(part.split("_"))) for part in PARTS}
            if all(name in names for name in alias.values()):
                wanted = alias
            elif {"x", "y"} <= names.keys():
                wanted = {"x": "x", "y": "y"}
            else:
                raise DataError(f"{path}: needs train_x, train_y, test_x, test_y, or x, y; has {_listed(names)}")
            left = MAX_ARRAYS
            arrays = {}
            for part, name in wanted.items():
                arrays[part] = _member(path, archive, names[name], left)
                left -= arrays[part].nbytes
    except DataError:
        raise
    except Exception as error:  # a damaged or hostile archive can raise anything
        raise DataError(f"{path}: not a readable .npz: {one_line(error)}") from error
    return _completed("npz", arrays, test_share, seed)


def _member(path: Path, archive: zipfile.ZipFile, name: str, left: int) -> np.ndarray:
    """One array of a npz; its header is believed only as far as the archive has the bytes."""
    info = archive.getinfo(name)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)  # type: ignore[arg-type]
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject:
            raise DataError(f"{path}: {name} holds Python objects, which are not read")
        if size > left:
            raise DataError(f"{path}: {name} asks for {size} bytes; at most {left} of {MAX_ARRAYS} are left for it")
        raw = file.read(size + 1)
        if len(raw) != size:
            raise DataError(f"{path}: {name} has other than the {size} bytes its header announces")
    return np.frombuffer(bytearray(raw), dtype).reshape(shape, order="F" if fortran else "C")


def load_npy(root: Path | None = None, *, file: Any = None) -> Dataset:
    """The four arrays ``train_x.npy``, ``train_y.npy``, ``test_x.npy``, ``test_y.npy`` of a folder, memory-mapped: they
    may be larger than memory."""
    folder = _found("npy", root, file, folder=True)
    arrays = {}
    for part in PARTS:
        path = folder / f"{part}.npy"
        try:
            arrays[part] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except Exception as error:
            raise DataError(f"{path}: not a readable .npy: {one_line(error)}") from error
    return as_dataset("npy", arrays)


def load_csv(
    root: Path | None = None,
    *,
    file: Any = None,
    test_file: str = "",
    label: str = "label",
    target: Any = None,
    delimiter: str = ",",
    standardise: bool = True,
    test_share: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """A table with a header line: one column is the class (any text), or some are numbers to predict; all others are
    numbers.

    Args:
        test_file: a table of the same columns for the test part.
        label: name of the column of classes; they are numbered in sorted order, whole numbers by size.
        target: instead of ``label``, name of the column to predict, or a list of several.
        standardise: subtract every column's training mean and divide by its deviation.
    """
    targets = [target] if isinstance(target, str) else target
    if targets is not None and (
        not isinstance(targets, list | tuple) or not targets or not all(isinstance(name, str) for name in targets)
    ):
        raise DataError(f"target must be the name of a column, or a list of such; got {target!r}")
    train_x, train_names, columns = _table(_found("csv", root, file), label, targets, delimiter)
    tables: dict[str, Any] = {"x": train_x, "y": train_names}
    if test_file:
        path = _found("csv", root, test_file)
        test_x, test_names, others = _table(path, label, targets, delimiter)
        if others != columns:
            raise DataError(f"{path}: its columns are not those of {file}: {_listed(set(others) ^ set(columns))}")
        tables = {"train_x": train_x, "train_y": train_names, "test_x": test_x, "test_y": test_names}
    classes: dict[str, int] | None = None
    if targets is None:
        labels = {part: names for part, names in tables.items() if part.endswith("y")}
        classes = {name: at for at, name in enumerate(_in_order({n for names in labels.values() for n in names}))}
        for part, names in labels.items():
            tables[part] = np.array([classes[name] for name in names], dtype=np.int64)
    parts = _parts(tables, test_share, seed)
    statistics = None
    if standardise:
        mean, std = parts["train_x"].mean(0), parts["train_x"].std(0)
        std[std == 0] = 1.0  # a constant column tells nothing, and stays 0
        parts |= {part: (parts[part] - mean) / std for part in ("train_x", "test_x")}
        statistics = (mean.tolist(), std.tolist())
    return as_dataset("csv", parts, class_names=None if classes is None else tuple(classes), standardised=statistics)


def _table(
    path: Path, label: str, targets: Sequence[str] | None, delimiter: str
) -> tuple[np.ndarray, list[str] | np.ndarray, list[str]]:
    """Numbers, classes as written or the columns ``targets``, and the names of the columns of numbers."""
    try:
        text = io.StringIO(read_whole(path).decode("utf-8-sig"), newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(reader, [])
        option = "label" if targets is None else "target"
        for name in [label] if targets is None else targets:
            if name not in header:
                raise DataError(f"{path}: has no column {name!r} (option {option}); has {_listed(header)}")
        at = header.index(label) if targets is None else None
        columns = [name for place, name in enumerate(header) if place != at]
        rows, names = [], []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{path}:{reader.line_num}: {len(row)} values for {len(header)} columns")
            if at is not None:
                names.append(row.pop(at).strip())
            try:
                rows.append(np.array(row, dtype=np.float64))
            except ValueError:
                wrong = next(c for c, value in zip(columns, row) if not _is_number(value))
                value = row[columns.index(wrong)]
                raise DataError(f"{path}:{reader.line_num}: column {wrong!r} has {value[:40]!r}, no number") from None
    except DataError:
        raise
    except (UnicodeDecodeError, csv.Error, TypeError) as error:
        raise DataError(f"{path}: not a readable table: {one_line(error)}") from error
    if not rows or not columns:
        raise DataError(f"{path}: has no rows, or no column beside {label!r}")
    table = np.stack(rows)
    if targets is None:
        return table, names, columns
    chosen = [columns.index(name) for name in targets]
    rest = [place for place in range(len(columns)) if place not in chosen]
    if not rest:
        raise DataError(f"{path}: has no column beside {_listed(targets)} to predict from")
    return table[:, rest], table[:, chosen], [columns[place] for place in rest]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_order(names: Iterable[str]) -> list[str]:
    names = list(names)
    if all(name.lstrip("-").isascii() and name.lstrip("-").isdigit() and len(name) < 19 for name in names):
        return sorted(names, key=int)
    return sorted(names)


def load_images(
    root: Path | None = None,
    *,
    file: Any = None,
    image: int = 0,
    channels: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """A folder with a folder of images for each class, or with such folders in ``train`` and ``test`` (or ``val``).

    Classes are numbered by the names of their folders, in sorted order.

    Args:
        image: height and width to which images are resized (bilinear); by default they stay as they are, any rectangle,
            and must be equal.
        channels: 1 or 3; by default what the first image has.
    """
    folder = _found("images", root, file, folder=True)
    if not 0 <= image <= 1024:
        raise DataError(f"image must be 0 (as stored) to 1024; got {image}")
    if channels not in (0, 1, 3):
        raise DataError(f"channels must be 0 (as stored), 1 or 3; got {channels}")
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    reading = _Images(image, channels)
    if (folder / "train").is_dir() and test is not None:
        names = _subfolders(folder / "train")
        if names != _subfolders(test):
            raise DataError(f"{test}: has other classes than train: {_listed(set(names) ^ set(_subfolders(test)))}")
        parts = dict(zip(PARTS, (*reading.of(folder / "train", names), *reading.of(test, names))))
    else:
        names = _subfolders(folder)
        parts = dict(zip(("x", "y"), reading.of(folder, names)))
    return _completed("images", parts, test_share, seed, names)


class _Images:
    """Reads images to one size and number of channels, that of the first where none is asked for."""

    def __init__(self, image: int, channels: int) -> None:
        self.size = (image, image) if image else None
        self.resize = bool(image)
        self.mode = {0: None, 1: "L", 3: "RGB"}[channels]
        self.left = MAX_ARRAYS

    def of(self, folder: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, c, h, w) and classes of the folders ``names``."""
        if not names:
            raise DataError(f"{folder}: has no folders of images, one for each class")
        images, labels = [], []
        for label, name in enumerate(names):
            for path in sorted((folder / name).iterdir()):
                if path.suffix.lower() in IMAGES:
                    images.append(self.read(path))
                    labels.append(label)
        if not images:
            raise DataError(f"{folder}: its folders hold no images ({', '.join(IMAGES)})")
        return np.stack(images), np.array(labels, dtype=np.int64)

    def read(self, path: Path) -> np.ndarray:
        import warnings

        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as picture:
                    if self.mode is None:
                        self.mode = "L" if picture.mode in ("1", "L", "I", "I;16", "F") else "RGB"
                    if self.size is None:
                        self.size = picture.size
                    if picture.size != self.size and not self.resize:
                        raise DataError(
                            f"{path}: {picture.size[0]}x{picture.size[1]} pixels, others have {self.size[0]}x"
                            f"{self.size[1]}; data.image resizes them"
                        )
                    plain = picture.convert(self.mode)
                    if self.resize:
                        plain = plain.resize(self.size, Image.Resampling.BILINEAR)
                    array = np.asarray(plain, dtype=np.uint8)
        except DataError:
            raise
        except Exception as error:  # whatever a damaged image makes of a decoder
            raise DataError(f"{path}: not a readable image: {one_line(error)}") from error
        self.left -= array.nbytes
        if self.left < 0:
            raise DataError(
                f"{path}: with it the images take more than {MAX_ARRAYS} bytes; data.image makes them smaller"
            )
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def load_leaf(root: Path | None = None, *, file: Any = None, shape: Any = None) -> Dataset:
    """The JSON files of a LEAF data set (arXiv 1812.01097): a folder with ``train`` and ``test``.

    The users are the natural clients: ``partition.scheme = "natural"``. Texts become sequences of character numbers, by
    the sorted characters of the training part; a character that is not among them becomes the number after the last.

    Args:
        shape: of a sample, e.g. ``[1, 28, 28]``; by default as listed.
    """
    folder = _found("leaf", root, file, folder=True)
    users: dict[str, int] = {}
    train, test = (_leaf(folder / part, users) for part in ("train", "test"))
    texts = all(isinstance(x, str) for x in train[0] + test[0])
    made: dict[str, Any] = {}
    if texts:
        known = {c: at for at, c in enumerate(sorted({c for x in train[0] for c in x}))}
        if len({len(x) for x in train[0] + test[0]}) != 1:
            raise DataError(f"{folder}: texts differ in length")
    for part, (xs, ys, _) in (("train", train), ("test", test)):
        try:
            x = (
                np.array([[known.get(c, len(known)) for c in x] for x in xs])
                if texts
                else np.array(xs, dtype=np.float32)
            )
            made[f"{part}_x"] = x if shape is None else x.reshape(len(x), *shape)
        except (ValueError, TypeError) as error:
            raise DataError(f"{folder / part}: samples are not arrays of one shape: {one_line(error)}") from error
        made[f"{part}_y"] = ys
    classes = {y: at for at, y in enumerate(_in_order({str(y) for y in train[1] + test[1]}))}
    for part in ("train_y", "test_y"):
        made[part] = np.array([classes[str(y)] for y in made[part]], dtype=np.int64)
    return as_dataset("leaf", made, (np.array(train[2]), np.array(test[2])), tuple(classes))


def _leaf(folder: Path, users: dict[str, int]) -> tuple[list[Any], list[Any], list[int]]:
    """Samples, labels and user numbers of all JSON files of a folder; new users are added to ``users``."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: LEAF's folders are train and test")
    xs: list[Any] = []
    ys: list[Any] = []
    owners: list[int] = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(read_whole(path))
            for user, data in content["user_data"].items():
                if len(data["x"]) != len(data["y"]):
                    raise DataError(
                        f"{path}: user {user[:40]!r} has {len(data['x'])} samples and {len(data['y'])} labels"
                    )
                number = users.setdefault(user, len(users))
                xs += data["x"]
                ys += data["y"]
                owners += [number] * len(data["x"])
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a LEAF file: {one_line(error)}") from error
    if not xs:
        raise DataError(f"{folder}: has no samples in *.json")
    return xs, ys, owners


def load_huggingface(
    root: Path | None = None,
    *,
    file: Any = None,
    x: str = "",
    y: str = "label",
    train: str = "train",
    test: str = "test",
    test_share: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """A data set that ``datasets.save_to_disk`` wrote (needs the package ``datasets``); nothing is downloaded.

    Args:
        x, y: columns of samples (by default the only one beside ``y``) and of classes.
        train, test: names of the splits; without a test split one is drawn.
    """
    splits = _saved_splits("huggingface", root, file, train)
    first = columns_of(splits[train], x, y)
    names = _class_names(splits[train], y)
    if test not in splits:
        return _completed("huggingface", dict(zip(("x", "y"), first)), test_share, seed, names)
    parts = dict(zip(PARTS, (*first, *columns_of(splits[test], x, y))))
    return as_dataset("huggingface", parts, class_names=names)


def _saved_splits(name: str, root: Path | None, file: Any, train: str) -> Mapping[str, Any]:
    """The splits of what ``datasets.save_to_disk`` wrote, ``train`` among them."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} needs the package datasets (pip install datasets)") from None
    folder = _found(name, root, file, folder=True)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: not a saved data set: {one_line(error)}") from error
    splits = loaded if isinstance(loaded, Mapping) else {train: loaded}
    if train not in splits:
        raise DataError(f"{folder}: has no split {train!r}; has {_listed(splits)}")
    return splits


def load_flwr_datasets(
    root: Path | None = None,
    *,
    file: Any = None,
    partitioner: str = "IidPartitioner",
    arguments: Any = None,
    x: str = "",
    y: str = "label",
    train: str = "train",
    test_share: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """A data set that ``datasets.save_to_disk`` wrote, cut by a partitioner of flwr-datasets (needs that package).

    Its partitions are the natural clients: ``partition.scheme = "natural"``. Of each, ``test_share`` of the samples are
    drawn for testing, by ``seed``.

    Args:
        partitioner: name of a class of ``flwr_datasets.partitioner``.
        arguments: its parameters, a table.
        x, y: columns of samples (by default the only one beside ``y``) and of classes.
        train: name of the split.
    """
    try:
        from flwr_datasets import partitioner as found
    except ImportError:
        raise DataError("flwr-datasets needs the package flwr-datasets (pip install flwr-datasets)") from None
    known = sorted(name for name in dir(found) if name.endswith("Partitioner") and name != "Partitioner")
    if partitioner not in known:
        raise DataError(f"partitioner must be one of {', '.join(known)}; got {partitioner!r}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise DataError(f"arguments must be a table of the partitioner's parameters; got {arguments!r}")
    if not 0 < test_share < 1:
        raise DataError(f"test_share must be between 0 and 1; got {test_share!r}")
    table = _saved_splits("flwr-datasets", root, file, train)[train]
    xs, ys = columns_of(table, x, y)
    owner = np.full(len(ys), -1)
    try:
        cut = getattr(found, partitioner)(**(arguments or {}))
        cut.dataset = table.add_column("spafl row", list(range(len(table))))
        for client in range(cut.num_partitions):
            owner[cut.load_partition(client)["spafl row"]] = client
    except Exception as error:  # the partitioner's own words
        raise DataError(f"{partitioner} cannot cut {file}: {one_line(error)}") from None
    xs, ys, owner = xs[owner >= 0], ys[owner >= 0], owner[owner >= 0]
    rng, is_test = np.random.default_rng(seed), np.zeros(len(ys), dtype=bool)
    for client in range(cut.num_partitions):
        members = rng.permutation(np.flatnonzero(owner == client))
        if len(members) < 2:
            raise DataError(
                f"{partitioner}: partition {client} has {len(members)} samples; 2 are needed, one for testing"
            )
        is_test[members[: min(max(1, round(test_share * len(members))), len(members) - 1)]] = True
    parts = {"train_x": xs[~is_test], "train_y": ys[~is_test], "test_x": xs[is_test], "test_y": ys[is_test]}
    return as_dataset("flwr-datasets", parts, (owner[~is_test], owner[is_test]), _class_names(table, y))


def columns_of(table: Any, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples and classes of a table that has ``column_names`` and gives rows as dicts (datasets, flwr-datasets)."""
    names = list(table.column_names)
    if y not in names:
        raise DataError(f"huggingface: has no column {y!r} (option y); has {_listed(names)}")
    others = [name for name in names if name != y]
    if not x and len(others) != 1:
        raise DataError(f"huggingface: option x must name the column of samples; there are {_listed(others)}")
    x = x or others[0]
    if x not in names:
        raise DataError(f"huggingface: has no column {x!r} (option x); has {_listed(names)}")
    rows = [table[at] for at in range(len(table))]
    try:
        samples = np.stack([_pixels(row[x]) for row in rows])
    except ValueError as error:
        raise DataError(f"huggingface: column {x!r} holds no arrays of one shape: {one_line(error)}") from error
    return samples, np.array([row[y] for row in rows])


def _class_names(table: Any, y: str) -> Sequence[str] | None:
    """What a column of a ``ClassLabel`` calls its classes."""
    return getattr((getattr(table, "features", None) or {}).get(y), "names", None)


def _pixels(value: Any) -> np.ndarray:
    """An image as (c, h, w) bytes, anything else as an array."""
    array = np.asarray(value)
    is_picture = hasattr(value, "convert")  # PIL's
    return array.transpose(2, 0, 1) if is_picture and array.ndim == 3 else array


def _found(name: str, root: Path | None, file: Any, folder: bool = False) -> Path:
    """The file, or folder, that ``data.file`` names: as it is, or in one of the places for data."""
    kind = "folder" if folder else "file"
    if not isinstance(file, str) or not file:
        raise DataError(f"{name} needs data.file, the {kind} to read; got {file!r}")
    path = Path(file).expanduser()
    for place in (Path(), *places(root)):
        try:
            if (place / path).is_dir() if folder else (place / path).is_file():
                return place / path
        except (OSError, ValueError):
            break
    searched = ", ".join(["the current folder", *map(str, places(root))])
    raise DataError(f"{name}: there is no {kind} {str(path)[:200]!r} in {searched}")


def _listed(names: Iterable[Any]) -> str:
    shown = [str(name)[:40] for name in names]
    return ", ".join(sorted(shown)[:12]) + (", ..." if len(shown) > 12 else "") or "nothing"


def _completed(
    name: str, arrays: Mapping[str, Any], test_share: float, seed: int, class_names: Sequence[str] | None = None
) -> Dataset:
    return as_dataset(name, _parts(arrays, test_share, seed), class_names=class_names)


def _parts(arrays: Mapping[str, Any], test_share: float, seed: int) -> dict[str, Any]:
    """``arrays`` if they have train and test; else ``x`` and ``y`` cut into such, class by class, at least one each."""
    if "x" not in arrays:
        return dict(arrays)
    if not 0 < test_share < 1:
        raise DataError(f"test_share must be between 0 and 1; got {test_share!r}")
    if seed < 0:
        raise DataError(f"seed must be 0 or more; got {seed}")
    x, y = np.asarray(arrays["x"]), np.asarray(arrays["y"])
    if (y.ndim != 1 and y.dtype.kind != "f") or len(x) != len(y):
        raise DataError(f"x and y must have one entry for each sample; got {x.shape} and {y.shape}")
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(y), dtype=bool)
    if y.dtype.kind == "f":  # numbers to predict
        is_test[rng.permutation(len(y))[: max(1, round(test_share * len(y)))]] = True
        return {"train_x": x[~is_test], "train_y": y[~is_test], "test_x": x[is_test], "test_y": y[is_test]}
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        if len(members) > 1:
            is_test[members[: min(max(1, round(test_share * len(members))), len(members) - 1)]] = True
    return {"train_x": x[~is_test], "train_y": y[~is_test], "test_x": x[is_test], "test_y": y[is_test]}
