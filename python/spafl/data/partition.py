"""Who holds which samples: cut a data set into one train and one test part per client.

A scheme draws an owner for every sample. Draws that leave a client with too little are repeated, a bounded number of
times; then the best draw is repaired by moving samples. So a partition always ends, and never leaves a client empty.
"""

from __future__ import annotations

import functools
import heapq
import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import plugins
from ..checked import short

Owners = tuple[np.ndarray, np.ndarray]
"""Owner (client number) of every train and of every test sample, int64."""


class _Labels(tuple):
    """Labels of train and of test, and what every draw asks of them."""

    @functools.cached_property
    def by_class(self) -> list[list[np.ndarray]]:
        """For train and for test, the samples of each class, in stored order."""
        classes = 1 + max(int(y.max()) for y in self)
        return [_by_class(y, classes) for y in self]


MAX_TABLE = 20_000_000  # clients x classes, of which the run folder keeps a table
MAX_FILE = 1 << 28  # bytes of a partition file

# Outside, draws degenerate: the gamma numbers behind a Dirichlet draw leave the range of floats.
MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6


class PartitionError(ValueError):
    """The partition asked for cannot be made: one line with the argument, what was given and what is possible."""


@dataclass(frozen=True, eq=False)
class Partition:
    """``train[k]`` and ``test[k]``: sorted int64 indices of client k's samples into the stored order of the data set.

    Disjoint, and together every sample. ``draws`` is how many draws were made; ``moved`` how many (train, test) samples
    the repair had to move afterwards, (0, 0) if the last draw was good as it was.
    """

    train: list[np.ndarray]
    test: list[np.ndarray]
    draws: int = 1
    moved: tuple[int, int] = (0, 0)

    @property
    def clients(self) -> int:
        return len(self.train)

    def counts(self, labels: np.ndarray, classes: int, part: str = "train") -> np.ndarray:
        """How many samples of each class each client holds, (clients, classes) int64.

        Args:
            labels: labels of that part's data, (n,) integers in 0..classes-1.
            part: ``"train"`` or ``"test"``.
        """
        if part not in ("train", "test"):
            raise ValueError(f"part must be 'train' or 'test'; got {part!r}")
        parts: list[np.ndarray] = getattr(self, part)
        client = np.repeat(np.arange(self.clients), [len(index) for index in parts])
        entry = client * classes + labels[np.concatenate(parts)]
        return np.bincount(entry, minlength=self.clients * classes).reshape(self.clients, classes)


@dataclass(frozen=True)
class Scheme:
    """``draw(labels, clients, rng, **options) -> Owners`` with ``labels = (train_y, test_y)``; or a :class:`Partition`,
    which is taken as it is.

    ``required`` and ``optional`` name the options it takes. Its arguments are checked by ``partition`` except for what
    only the scheme knows; it raises PartitionError for that.
    """

    draw: Callable[..., Owners | Partition]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


SCHEMES: dict[str, Scheme] = {}


def register_scheme(name: str, scheme: Scheme) -> None:
    """Make ``partition(..., scheme=name)`` use ``scheme``. Raises ValueError if the name is taken."""
    if name in SCHEMES:
        raise ValueError(f"a partition scheme named {name!r} exists already")
    SCHEMES[name] = scheme


def partition(
    train_y: np.ndarray,
    test_y: np.ndarray,
    scheme: str,
    clients: int,
    rng: np.random.Generator,
    *,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    sizes: Sequence[float] | None = None,
    min_train: int = 1,
    min_test: int = 1,
    max_draws: int = 100,
    file: Path | str | None = None,
    **others: object,
) -> Partition:
    """Split train and test samples over clients.

    Schemes:
        ``iid``: a random equal share of everything (sizes differ by one at most).
        ``dirichlet`` (``alpha``): per class one draw p ~ Dir(alpha, ..., alpha) over the clients cuts the shuffled
            class at ``int(cumsum(p) * n)``, for train *and* test, so local tests follow local training data. The
            published SpaFL split; its CIFAR-10 code also redraws until every client has a batch: ``min_train=16``.
        ``pathological`` (``classes_per_client``): every client has that many classes, every class about the same number
            of clients, among whom it is shared equally.
        ``size`` (``alpha`` or ``sizes``): classes mixed as in ``iid``, unequal amounts: in proportion to ``sizes`` (one
            positive number per client), or to a draw from Dir(alpha, ..., alpha).
        ``natural``: the users to whom the data say that their samples belong, the first ``clients`` of them.
        ``file`` (``file``): what a JSON file lists; see :func:`read_partition`.
        ``module:function``: one of the user's. It is called with ``labels`` (those of train and of test), ``clients``
            and ``rng``, and its options, and returns the owner of every train and of every test sample, two arrays, or
            a :class:`Partition`, which is taken as it is.

    Args:
        train_y, test_y: labels, (n,) non-negative integers.
        clients: number of parts.
        rng: the only source of randomness; the same state and arguments give the same partition.
        min_train, min_test: least samples per client, at least 1 and 0.
        max_draws: draws tried before the one that misses least is repaired: clients that lack samples take them from
            the richest ones, of classes they hold already where possible.
        others: options of a scheme that ``register_scheme`` added.

    Raises:
        PartitionError: before any drawing, if an argument is wrong or no such partition exists.
    """
    labels = _Labels((_check_labels("train_y", train_y), _check_labels("test_y", test_y)))
    given = {"alpha": alpha, "classes_per_client": classes_per_client, "sizes": sizes, "file": file, **others}
    options = {name: value for name, value in given.items() if value is not None}
    _check_arguments(scheme, clients, options, max_draws)
    minimum = (_check_whole("min_train", min_train, 1), _check_whole("min_test", min_test, 0))
    classes = 1 + max(int(y.max()) for y in labels)
    if clients * classes > MAX_TABLE:
        raise PartitionError(f"{clients} clients with {classes} classes make a table of more than {MAX_TABLE} entries")
    draw = SCHEMES[scheme].draw if scheme in SCHEMES else _draw_of(scheme)
    for name, y, least in zip(("train", "test"), labels, minimum):
        if clients * least > len(y):
            raise PartitionError(
                f"{clients} clients with min_{name}={least} need {clients * least} {name} samples; there are {len(y)}"
            )

    best: tuple[int, Owners] | None = None
    draws = 0
    while draws < max_draws and (best is None or best[0] > 0):
        draws += 1
        owners = draw(labels, clients, rng, **options)
        if isinstance(owners, Partition):  # as it is: nothing is repaired that somebody listed
            return _checked(f"partition scheme {scheme!r}", owners.train, owners.test, labels, clients, minimum)
        _check_owners(scheme, owners, labels, clients)
        lacking = sum(
            int(np.maximum(least - np.bincount(owner, minlength=clients), 0).sum())
            for owner, least in zip(owners, minimum)
        )
        if best is None or lacking < best[0]:
            best = lacking, owners
    assert best is not None
    owners, moved = best[1], (0, 0)
    if best[0]:
        moved = _repair(labels, owners, clients, minimum)
    return Partition(_parts(owners[0], clients), _parts(owners[1], clients), draws, moved)


def _draw_of(scheme: str) -> Callable[..., Owners | Partition]:
    """A user's function as the ``draw`` of a scheme."""
    function = plugins.find("partition.scheme", scheme)

    def draw(labels: Owners, clients: int, rng: np.random.Generator, **options: Any) -> Owners | Partition:
        given = {"labels": labels, "clients": clients, "rng": rng}
        made = plugins.call("partition.scheme", function, given, options)
        if isinstance(made, Partition):
            return made
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise PartitionError(
                f"{plugins.place(function)} must return the owners of the train and of the test samples, two "
                f"arrays, or a Partition; it returned a {type(made).__name__}"
            )
        return np.asarray(made[0]), np.asarray(made[1])

    return draw


def read_partition(path: Path, labels: Owners, clients: int, minimum: tuple[int, int] = (1, 0)) -> Partition:
    """The partition a JSON file lists: ``{"train": [[0, 7, ...], ...], "test": [[3, ...], ...]}``.

    One list of sample numbers per client, from 0 in the stored order of the data set. Samples may be left out, and
    belong to several clients, but not twice to one.

    Raises:
        PartitionError: the file cannot be read or is none; other numbers of clients; a number that is no sample; a
            client with fewer samples than ``minimum``.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise PartitionError(f"{path}: more than {MAX_FILE} bytes")
        listed = json.loads(content)
    except OSError as error:
        raise PartitionError(f"{path}: cannot be read: {error.strerror}") from None
    except PartitionError:
        raise
    except (ValueError, RecursionError) as error:
        raise PartitionError(f"{path}: is no JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(listed, dict) or not all(isinstance(listed.get(part), list) for part in ("train", "test")):
        raise PartitionError(f'{path}: must hold {{"train": [[...], ...], "test": [[...], ...]}}')
    return _checked(str(path), listed["train"], listed["test"], labels, clients, minimum)


def _checked(
    where: str,
    train: Sequence[Any],
    test: Sequence[Any],
    labels: Owners,
    clients: int,
    minimum: tuple[int, int],
) -> Partition:
    """Lists of sample numbers as a partition, if they are one."""
    parts: list[list[np.ndarray]] = []
    for name, lists, y, least in zip(("train", "test"), (train, test), labels, minimum):
        if len(lists) != clients:
            raise PartitionError(f"{where}: lists {len(lists)} clients under {name}; partition.clients is {clients}")
        parts.append([])
        for client, numbers in enumerate(lists):
            try:
                index = np.array(numbers)
            except ValueError:
                index = np.array("ragged")
            if index.size == 0:
                index = index.astype(np.int64)
            if index.ndim != 1 or index.dtype.kind not in "iu":
                raise PartitionError(f"{where}: {name} of client {client} is no list of sample numbers")
            index = np.sort(index.astype(np.int64))
            if len(index) and (index[0] < 0 or index[-1] >= len(y)):
                wrong = index[0] if index[0] < 0 else index[-1]
                raise PartitionError(f"{where}: {name} of client {client} has sample {wrong}, not in 0..{len(y) - 1}")
            if (index[1:] == index[:-1]).any():
                twice = index[:-1][index[1:] == index[:-1]][0]
                raise PartitionError(f"{where}: {name} of client {client} has sample {twice} twice")
            if len(index) < least:
                raise PartitionError(
                    f"{where}: client {client} has {len(index)} {name} samples; partition.min_{name} is {least}"
                )
            parts[-1].append(index)
    return Partition(parts[0], parts[1])


def _parts(owner: np.ndarray, clients: int) -> list[np.ndarray]:
    """Indices by owner; a stable sort keeps each client's in stored order."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _repair(labels: Owners, owners: Owners, clients: int, minimum: tuple[int, int]) -> tuple[int, int]:
    """Move samples until every client has the minimum, train first; return how many. Changes ``owners`` in place.

    Deterministic. The receiver's classes are preferred (for test: those it trains on), then the richest donor, then
    that donor's largest class, then the samples stored last. A donor never falls below the minimum.
    """
    classes = 1 + max(int(y.max(initial=0)) for y in labels)
    liked: np.ndarray | None = None  # (clients, classes): classes the client trains on
    moved = []
    for y, owner, least in zip(labels, owners, minimum):
        table = np.bincount(owner * classes + y, minlength=clients * classes).reshape(clients, classes)
        likes = table > 0 if liked is None else liked
        moved.append(_give(y, owner, table, likes, least))
        liked = table > 0
    return moved[0], moved[1]


def _give(y: np.ndarray, owner: np.ndarray, table: np.ndarray, likes: np.ndarray, least: int) -> int:
    """:func:`_repair` of one part; keeps ``table``, (clients, classes), and returns how many samples were moved.

    The richest donor is found in a heap per class, whose outdated entries are dropped when they come up: looking
    through the table for every sample took seconds with 10,000 clients. Who received never gives.
    """
    classes = table.shape[1]
    total = table.sum(1).tolist()
    held = np.argsort(owner * classes + y, kind="stable")  # samples by client and class, in stored order
    ends = np.cumsum(table.ravel())
    richest = [[(-total[k], int(k)) for k in np.flatnonzero(column) if total[k] > least] for column in table.T]
    for heap in richest:
        heapq.heapify(heap)

    def donor_of(wanted: Sequence[int]) -> tuple[int, int] | None:
        found = []
        for label in wanted:
            heap = richest[label]
            while heap and (-heap[0][0] != total[heap[0][1]] or not table[heap[0][1], label]):
                heapq.heappop(heap)
            if heap:
                found.append(heap[0])
        return min(found, default=None)

    moved = 0
    for receiver in np.flatnonzero(table.sum(1) < least).tolist():
        own = np.flatnonzero(likes[receiver]).tolist()
        while (lack := least - total[receiver]) > 0:
            wanted, found = own, donor_of(own)
            if found is None:
                wanted = range(classes)
                found = donor_of(wanted)
            assert found is not None, "there are samples for everybody"
            donor = found[1]
            label = max(wanted, key=lambda c: table[donor, c])  # the first of equals
            amount = min(lack, total[donor] - least, int(table[donor, label]))
            end = ends[donor * classes + label]
            owner[held[end - amount : end]] = receiver
            ends[donor * classes + label] -= amount
            table[donor, label] -= amount
            table[receiver, label] += amount
            total[donor] -= amount
            total[receiver] += amount
            moved += amount
            if total[donor] > least:
                for other in np.flatnonzero(table[donor]):
                    heapq.heappush(richest[other], (-total[donor], donor))
    return moved


def _cut(cumulated: np.ndarray, n: int) -> np.ndarray:
    """Owners of n shuffled samples cut at ``int(cumulated * n)``; the last client takes the rest."""
    cuts = np.minimum((cumulated[:-1] * n).astype(np.int64), n)  # a sum may round to just over 1
    return np.cumsum(np.bincount(cuts, minlength=n + 1)[:n])  # a sample's owner: the number of cuts before it


def _iid(labels: Owners, clients: int, rng: np.random.Generator) -> Owners:
    train, test = (rng.permutation(np.arange(len(y)) % clients) for y in labels)
    return train, test


def _dirichlet(labels: _Labels, clients: int, rng: np.random.Generator, alpha: float) -> Owners:
    owners = tuple(np.empty(len(y), dtype=np.int64) for y in labels)
    concentration = np.full(clients, alpha)
    for of_class in zip(*labels.by_class):
        if not any(map(len, of_class)):
            continue
        shares = np.cumsum(rng.dirichlet(concentration))
        for index, owner in zip(of_class, owners):
            owner[rng.permutation(index)] = _cut(shares, len(index))
    return owners[0], owners[1]


def _by_class(y: np.ndarray, classes: int) -> list[np.ndarray]:
    """The samples of each class, in stored order."""
    narrow = y.astype(np.uint16) if classes <= 1 << 16 else y  # which NumPy sorts by counting, ten times as fast
    return np.split(np.argsort(narrow, kind="stable"), np.cumsum(np.bincount(y, minlength=classes))[:-1])


def _pathological(labels: Owners, clients: int, rng: np.random.Generator, classes_per_client: int) -> Owners:
    present = np.union1d(*labels)
    if classes_per_client > len(present):
        raise PartitionError(
            f"classes_per_client must be 1 to {len(present)} (classes there are); got {classes_per_client}"
        )
    if clients * classes_per_client < len(present):
        raise PartitionError(
            f"{clients} clients with classes_per_client={classes_per_client} cannot hold all {len(present)} classes"
        )
    takers = np.zeros((clients, len(present)), dtype=bool)
    count = np.zeros(len(present), dtype=np.int64)
    for client in range(clients):  # the classes with the fewest takers so far, ties at random
        taken = np.lexsort((rng.random(len(present)), count))[:classes_per_client]
        takers[client, taken] = True
        count[taken] += 1
    owners = tuple(np.empty(len(y), dtype=np.int64) for y in labels)
    for column, label in enumerate(present):
        holders = rng.permutation(np.flatnonzero(takers[:, column]))
        for y, owner in zip(labels, owners):
            index = rng.permutation(np.flatnonzero(y == label))
            owner[index] = holders[np.arange(len(index)) * len(holders) // max(len(index), 1)]
    return owners[0], owners[1]


def _size(
    labels: Owners,
    clients: int,
    rng: np.random.Generator,
    alpha: float | None = None,
    sizes: Sequence[float] | None = None,
) -> Owners:
    if (alpha is None) == (sizes is None):
        raise PartitionError("scheme 'size' needs either alpha or sizes")
    shares = rng.dirichlet(np.full(clients, alpha)) if sizes is None else np.asarray(sizes, dtype=float) / np.sum(sizes)
    train, test = (rng.permutation(_cut(np.cumsum(shares), len(y))) for y in labels)
    return train, test


def _natural(labels: Owners, clients: int, rng: np.random.Generator, owners: Owners | None = None) -> Partition:
    if owners is None:
        raise PartitionError("scheme 'natural' needs data whose samples belong to users; these do not say to whom")
    users = 1 + max(int(owner.max()) for owner in owners)
    if clients > users:
        raise PartitionError(f"scheme 'natural': {clients} clients, but the data have {users} users")
    train, test = (_parts(owner, users)[:clients] for owner in owners)
    return Partition(train, test)


def _file(labels: Owners, clients: int, rng: np.random.Generator, file: Path | str) -> Partition:
    return read_partition(Path(file), labels, clients)


register_scheme("iid", Scheme(_iid))
register_scheme("dirichlet", Scheme(_dirichlet, required=("alpha",)))
register_scheme("pathological", Scheme(_pathological, required=("classes_per_client",)))
register_scheme("size", Scheme(_size, optional=("alpha", "sizes")))
register_scheme("natural", Scheme(_natural, optional=("owners",)))
register_scheme("file", Scheme(_file, required=("file",)))


def _check_owners(scheme: str, owners: Owners, labels: Owners, clients: int) -> None:
    for owner, y in zip(owners, labels):
        if owner.shape != y.shape or owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= clients:
            raise PartitionError(
                f"partition scheme {scheme!r} must give each of {len(y)} samples an owner in 0..{clients - 1}; "
                f"it gave {owner.dtype} {owner.shape}, {owner.min()}..{owner.max()}"
            )


def _check_labels(name: str, y: np.ndarray) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) == 0 or y.min() < 0:
        raise PartitionError(f"{name} must be a non-empty vector of labels 0 or more; got {y.dtype} {y.shape}")
    return y.astype(np.int64, copy=False)


def _check_whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise PartitionError(f"{name} must be a whole number, {least} or more; got {value!r}")
    return int(value)


def _check_arguments(name: str, clients: int, options: dict, max_draws: int) -> None:
    if name not in SCHEMES and not plugins.is_path(name):
        raise PartitionError(f"unknown partition scheme {name!r}; known: {', '.join(SCHEMES)}")
    _check_whole("clients", clients, 1)
    _check_whole("max_draws", max_draws, 1)
    if plugins.is_path(name):
        return  # its own function says what its options are
    scheme = SCHEMES[name]
    for option in scheme.required:
        if option not in options:
            raise PartitionError(f"partition scheme {name!r} needs {option}")
    for option in options:
        if option not in scheme.required + scheme.optional:
            raise PartitionError(f"partition scheme {name!r} takes no {option}; got {short(options[option])}")
    if "classes_per_client" in options:
        _check_whole("classes_per_client", options["classes_per_client"], 1)
    alpha = options.get("alpha", 1.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.number) or not 0 < alpha < np.inf:
        raise PartitionError(f"alpha must be a positive number; got {alpha!r}")
    if not MIN_ALPHA <= alpha <= MAX_ALPHA:
        raise PartitionError(f"alpha must be {MIN_ALPHA:g} to {MAX_ALPHA:g}, outside draws degenerate; got {alpha!r}")
    if "sizes" in options:
        try:
            sizes = np.asarray(options["sizes"], dtype=float)
        except (TypeError, ValueError):
            sizes = np.empty(0)
        if sizes.shape != (clients,) or not (np.isfinite(sizes) & (sizes > 0)).all():
            raise PartitionError(
                f"sizes must be {clients} positive numbers, one per client; got {reprlib.repr(options['sizes'])}"
            )
