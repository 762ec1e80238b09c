"""Reads a run folder (``config.toml``, ``partition.json``, ``metrics.jsonl``, ``summary.json``) into a :class:`Run`.

Only the curves and the last round's per-client values are kept, so that a run of many rounds and
clients stays small in memory. Whatever is missing or malformed raises :class:`ReportError`, one line
naming the file, the line and the field.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..client_results import FIELDS, results_path
from ..cost import MODELLED, RECORDED, Cost
from ..errors import UserError
from ..outcomes import OUTCOMES
from .steering import Steering, of_lines

__all__ = [
    "ClientGaps", "FilterMasks", "Point", "ReportError", "Run", "Turns", "labels", "load_run", "method_name", "methods",
    "seed_groups",
]  # fmt: skip

_SEED = re.compile(r"[\s,_-]*seed[\s_=-]*\d+$")  # in the names that tables of experiments give their runs
_ROUNDING = 1e-6  # a mean over float32 values may exceed 1 by this much


class ReportError(ValueError):
    """A run folder cannot be reported; the message is one line saying which file and why."""


@dataclass(frozen=True)
class Point:
    """One round. Accuracies and densities are fractions in 0..1; None where the round was not evaluated
    (accuracy) or the algorithm has no thresholds (density)."""

    round: int
    cost: Cost
    accuracy: float | None = None
    accuracy_std: float | None = None
    accuracy_worst: float | None = None
    density: float | None = None
    density_parameters: float | None = None
    layer_density: dict[str, float] | None = None
    trained: int | None = None
    """Clients that have trained at least once so far."""


@dataclass(frozen=True)
class ClientGaps:
    """Train minus test accuracy ``(clients,)`` of a round and, if recorded, layer-mean density ``(clients,)``."""

    round: int
    gap: np.ndarray
    density: np.ndarray | None


@dataclass(frozen=True)
class FilterMasks:
    """Which filters each client kept in a round: by layer, bool ``(clients, filters)``."""

    round: int
    layers: dict[str, np.ndarray]

    @property
    def most_varied(self) -> str:
        """The layer in whose filters two clients differ most often; of layers in which none do, the sparsest."""

        def order(layer: str) -> tuple[float, float]:
            share = self.layers[layer].mean(axis=0)
            return float((share * (1 - share)).mean()), float((1 - share).mean())

        return max(self.layers, key=order)

    @property
    def everywhere(self) -> np.ndarray:
        """All layers side by side: bool ``(clients, filters of the model)``."""
        return np.concatenate(list(self.layers.values()), axis=1)


@dataclass(frozen=True)
class Turns:
    """Turns of a run's clients.

    Attributes:
        classes: class of device by client.
        outcomes: whole numbers ``(clients, len(OUTCOMES))``, how many turns ended how.
        seconds, joules: ``(clients,)`` in all.
    """

    classes: Sequence[str]
    outcomes: np.ndarray
    seconds: np.ndarray
    joules: np.ndarray

    def count(self, outcome: str) -> np.ndarray:
        """Turns that ended so, by client."""
        return self.outcomes[:, OUTCOMES.index(outcome)]

    @property
    def absent(self) -> np.ndarray:
        """Clients none of whose uploads was merged."""
        return np.flatnonzero(self.count("in time") == 0)


@dataclass(frozen=True)
class BudgetMet:
    """A budget of a run, and the mean of what was spent in the last tenth of its rounds (None: no turn was in them).

    ``name``: the class of devices, or :data:`~spafl.budgets.EVERYBODY`; ``kind``: ``density``, ``macs`` (a share) or
    ``seconds`` (of a turn).
    """

    name: str
    kind: str
    budget: float
    reached: float | None


@dataclass(frozen=True)
class Run:
    """A loaded run folder. ``train`` and ``test`` count samples ``(clients, classes)``; ``accuracies`` ``(tested,)``
    belong to ``evaluated``, the last evaluated round; ``history`` holds the rounds ``(r,)`` in which all clients were
    tested and their accuracies, float32 ``(r, clients)``; ``notes`` say what was incomplete."""

    folder: Path
    name: str
    algorithm: str
    model: str
    data: str
    config: str
    train: np.ndarray
    test: np.ndarray
    points: tuple[Point, ...]
    accuracies: np.ndarray | None
    gaps: ClientGaps | None
    masks: FilterMasks | None
    history: tuple[np.ndarray, np.ndarray] | None
    completed: bool
    environment: dict[str, Any]
    notes: tuple[str, ...]
    turns: Turns | None = None
    steering: tuple[Steering, ...] = ()
    budgets: tuple[BudgetMet, ...] = ()
    class_names: tuple[str, ...] | None = None
    confused: bool = False
    """Whether the last evaluated round recorded confusion matrices."""

    @property
    def clients(self) -> int:
        return len(self.train)

    @property
    def evaluated(self) -> Point | None:
        """The last evaluated round, or None."""
        return next((p for p in reversed(self.points) if p.accuracy is not None), None)

    @property
    def last(self) -> Point:
        """The round a table row speaks of: the last evaluated one, so that costs belong to the accuracy beside them."""
        return self.evaluated or self.points[-1]

    def curve(self, name: str) -> tuple[list[Point], np.ndarray]:
        """The rounds that recorded the field ``name`` of :class:`Point`, and its values float64 ``(rounds,)``."""
        points = [p for p in self.points if getattr(p, name) is not None]
        return points, np.array([getattr(p, name) for p in points], dtype=np.float64)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have thresholds, in the order recorded."""
        return list(dict.fromkeys(layer for p in self.points for layer in p.layer_density or ()))


class _Value:
    """A parsed value that knows where it stands, so that every complaint can say so."""

    def __init__(self, value: Any, where: str, path: str = "") -> None:
        self.value, self.where, self.path = value, where, path

    def fail(self, wanted: str) -> ReportError:
        shown = json.dumps(self.value, default=str)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ReportError(f"{self.where}: {self.path or 'the value'} must be {wanted}; got {shown}")

    def __getitem__(self, key: str) -> _Value:
        if not isinstance(self.value, dict):
            raise self.fail("a table of named values")
        path = f"{self.path}.{key}" if self.path else key
        if key not in self.value:
            raise ReportError(f"{self.where}: {path} is missing")
        return _Value(self.value[key], self.where, path)

    def holds(self, key: str) -> bool:
        """Whether this is a table with ``key``."""
        return isinstance(self.value, dict) and key in self.value

    def __bool__(self) -> bool:
        return self.value is not None

    def items(self) -> Iterator[tuple[str, _Value]]:
        if not isinstance(self.value, dict):
            raise self.fail("a table of named values")
        return ((key, self[key]) for key in self.value)

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            raise self.fail("a non-empty string")
        return self.value

    def number(self, high: float = math.inf) -> float:
        """A finite number in 0..high."""
        good = isinstance(self.value, (int, float)) and not isinstance(self.value, bool) and math.isfinite(self.value)
        if not good or not 0 <= self.value <= high + _ROUNDING:
            raise self.fail("a number >= 0" if math.isinf(high) else f"a number in 0..{high:g}")
        return self.value

    def integer(self) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < 0:
            raise self.fail("a whole number >= 0")
        return self.value

    def list(self, length: int | None = None) -> list[_Value]:
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            raise self.fail("a list" if length is None else f"a list of {length} entries")
        return [_Value(v, self.where, f"{self.path}[{i}]") for i, v in enumerate(self.value)]

    def fractions(self, length: int) -> np.ndarray:
        return np.array([v.number(high=1.0) for v in self.list(length)], dtype=np.float64)


def load_run(folder: str | Path) -> Run:
    """Read and check the run folder; raises :class:`ReportError` for anything missing, malformed or inconsistent."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such run folder")
    config, toml = _config(folder / "config.toml")
    train, test, names = _partition(folder / "partition.json")
    points, details, notes = _metrics(folder / "metrics.jsonl", len(train))
    turns = details["turns"] = _turns(folder, len(train))
    details["steering"] = _steering(folder, config["algorithm"], turns)
    completed, environment, budgets, summary_notes = _summary(folder / "summary.json", points)
    return Run(
        folder=folder,
        name=config["name"].text(),
        algorithm=config["algorithm"]["name"].text(),
        model=config["model"]["name"].text(),
        data=config["data"]["name"].text(),
        config=toml,
        train=train,
        test=test,
        points=tuple(points),
        completed=completed,
        environment=environment,
        notes=(*notes, *summary_notes),
        budgets=budgets,
        class_names=names,
        confused=_confused(folder, points),
        **details,
    )


def seed_groups(runs: Sequence[Run]) -> list[list[int]]:
    """Positions of runs that are the same experiment: equal configurations but for the name, and different seeds."""
    groups: dict[str, list[tuple[int, int]]] = {}
    stored = [tomllib.loads(run.config) for run in runs]
    kinds = {(run.algorithm, frozenset(_keys(settings))) for run, settings in zip(runs, stored)}
    one_release = len(kinds) == len({algorithm for algorithm, _ in kinds})
    for i, config in enumerate(stored if one_release else map(_understood, stored)):
        seed = config.pop("seed", None)
        config.pop("name", None)
        members = groups.setdefault(json.dumps(config, sort_keys=True, default=str), [])
        members.append((i, seed))
    found = []
    for members in groups.values():
        distinct = len({seed for _, seed in members}) == len(members)
        found += [[i for i, _ in members]] if distinct else [[i] for i, _ in members]
    return sorted(found)


def _understood(settings: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the settings that did not exist then; as it is, where it cannot be understood."""
    try:
        from ..config import resolve_config  # needs torch, and reports of one release do not

        return resolve_config(settings, imports=False, stored=True).model_dump()
    except (ImportError, UserError):
        return settings


def _keys(table: Mapping[str, Any], above: str = "") -> set[str]:
    inner = [_keys(value, f"{above}{key}.") for key, value in table.items() if isinstance(value, Mapping)]
    return {above + key for key in table}.union(*inner)


def method_name(runs: Sequence[Run], label: str) -> str:
    """What to call runs that differ in their seed alone: the name that they share but for the seed, or else the
    ``label`` of the first."""
    names = {_SEED.sub("", " ".join(run.name.split())) for run in runs}
    return label if len(runs) == 1 or len(names) > 1 else names.pop()


def methods(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by method, seeds together: what to call them (``name (3 seeds)``), and the runs."""
    named = labels(runs)
    groups = [([runs[i] for i in members], named[members[0]]) for members in seed_groups(runs)]
    names = [method_name(own, label) for own, label in groups]
    found = []
    for (own, label), name in zip(groups, names):
        distinct = name if names.count(name) == 1 else label
        found.append((distinct if len(own) == 1 else f"{distinct} ({len(own)} seeds)", own))
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """One distinct one-line label per run: its name; where names repeat, the folder's name is added, then a number."""
    names = [" ".join(run.name.split()) for run in runs]
    folders = [" ".join(run.folder.resolve().name.split()) for run in runs]
    tagged = [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders)]
    return [f"{tag} #{tagged[: i + 1].count(tag)}" if tagged.count(tag) > 1 else tag for i, tag in enumerate(tagged)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ReportError(f"{path}: the file is missing; is {path.parent} a run folder?") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None


def _bytes(path: Path) -> bytes:
    with _reading(path):
        return path.read_bytes()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _reading(path), path.open("rb") as file:
        yield from enumerate(file, 1)


def _json(data: bytes, where: str) -> _Value:
    try:
        return _Value(json.loads(data), where)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: not valid JSON ({str(error).splitlines()[0]})") from None


def _config(path: Path) -> tuple[_Value, str]:
    data = _bytes(path)
    try:
        text = data.decode()
        return _Value(tomllib.loads(text), str(path)), text
    except ValueError as error:
        raise ReportError(f"{path}: not valid TOML ({str(error).splitlines()[0]})") from None


def _partition(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    value = _json(_bytes(path), str(path))
    classes = value["classes"].integer()
    clients = len(value["train"].list())
    if clients == 0:
        raise value["train"].fail("a list with at least one client")
    train, test = (
        np.array([[c.integer() for c in client.list(classes)] for client in value[part].list(clients)], dtype=np.int64)
        for part in ("train", "test")
    )
    names = None
    if value.holds("class_names") and value["class_names"]:
        names = tuple(name.text() for name in value["class_names"].list(classes))
    return train, test, names


def _confused(folder: Path, points: Sequence[Point]) -> bool:
    """Whether the clients of the last evaluated round have confusion matrices."""
    last = next((p.round for p in reversed(points) if p.accuracy is not None), None)
    path = results_path(folder, last or 0)
    if last is None or not path.exists():
        return False
    number, text = next(_lines(path), (0, b"{}"))
    record = _json(text, f"{path} line {number}")
    return record.holds("confusion") and record["confusion"].value is not None


def _metrics(path: Path, clients: int) -> tuple[list[Point], dict[str, Any], list[str]]:
    points: list[Point] = []
    details: dict[str, Any] = {"accuracies": None, "gaps": None, "masks": None, "history": None}
    notes: list[str] = []
    trained: set[int] = set()
    history: list[tuple[int, np.ndarray]] = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = _json(line, where)
        except ReportError:
            if line.endswith(b"\n"):  # it was written to its end, so it is damaged rather than half written
                raise
            notes.append(f"the last line of metrics.jsonl (line {number}) is half written and was ignored")
            continue
        point, of_clients = _line(value, clients, path.parent)
        if points:
            _follows(points[-1], point, where)
        trained.update(client.integer() for client in value["sampled"].list())
        points.append(replace(point, trained=len(trained)))
        everybody = of_clients.pop("everybody", False)
        details.update(of_clients)
        if everybody:
            history.append((point.round, of_clients["accuracies"].astype(np.float32)))
    if not points:
        raise ReportError(f"{path}: holds no complete round yet")
    if history:
        details["history"] = np.array([r for r, _ in history]), np.stack([values for _, values in history])
    return points, details, notes


def _line(line: _Value, clients: int, folder: Path) -> tuple[Point, dict[str, Any]]:
    """One metrics line as its point on the curves and those of its per-client values that are there."""
    number, cost = line["round"].integer(), line["cost"]
    amounts: dict[str, Any] = {}
    for name, (group, key) in RECORDED.items():
        value = cost[group][key]
        amounts[name] = value.number() if value or name != "executed_macs" else None
    if "modelled" in cost.value:
        amounts |= {name: cost[group][key].number() for name, (group, key) in MODELLED.items()}
    costs = Cost(**amounts)
    fields: dict[str, Any] = {}
    density, evaluation = line["density"], line["evaluation"]
    if density:
        fields["density"] = density["layer_mean"].number(high=1)
        fields["density_parameters"] = density["parameters"].number(high=1)
        fields["layer_density"] = {name: value.number(high=1) for name, value in density["layers"].items()}
    if not evaluation:
        return Point(number, costs, **fields), {}
    accuracy = evaluation["accuracy"]
    fields["accuracy"] = accuracy["mean"].number(high=1)
    fields["accuracy_std"] = accuracy["std"].number(high=1)
    fields["accuracy_worst"] = accuracy["worst_10pct"].number(high=1)
    return Point(number, costs, **fields), _of_clients(line, number, clients, folder)


def _turns(folder: Path, clients: int) -> Turns | None:
    """What became of the clients' turns, if the run models their devices."""
    partition = _json(_bytes(folder / "partition.json"), str(folder / "partition.json"))
    if "devices" not in partition.value:
        return None
    classes = [name.text() for name in partition["devices"].list(clients)]
    outcomes = np.zeros((clients, len(OUTCOMES)), dtype=np.int64)
    seconds, joules = np.zeros(clients), np.zeros(clients)
    path = folder / "metrics.jsonl"
    for number, line in _lines(path):
        if not line.endswith(b"\n") or not line.strip():
            continue
        played = _json(line, f"{path} line {number}")["system"]
        asked = [k.integer() for k in played["clients"].list()]
        columns = ((played[name].list(len(asked))) for name in ("outcomes", "client_seconds", "client_joules"))
        for k, outcome, time, energy in zip(asked, *columns, strict=True):
            if k >= clients or outcome.value not in OUTCOMES:
                raise outcome.fail(f"one of {', '.join(OUTCOMES)}, of one of {clients} clients")
            outcomes[k, OUTCOMES.index(outcome.value)] += 1
            seconds[k] += time.number()
            joules[k] += energy.number()
    return Turns(classes, outcomes, seconds, joules)


def _steering(folder: Path, algorithm: _Value, turns: Turns | None) -> tuple[Steering, ...]:
    """The paths of clients with a budget."""
    target = algorithm.value.get("target") if isinstance(algorithm.value, dict) else None
    path = folder / "metrics.jsonl"
    try:
        return of_lines(target, (text for _, text in _lines(path)), None if turns is None else turns.classes)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ReportError(f"{path}: turns are not those of algorithm.target = {target}") from None


def _of_clients(line: _Value, number: int, clients: int, folder: Path) -> dict[str, Any]:
    """What the clients got that were tested in a round; what needs all of them is left out where some were not."""
    evaluation, density = line["evaluation"], line["density"]
    lists: dict[str, _Value | None]
    first = line["first_layer"] if line.holds("first_layer") else None  # here and below: of earlier versions
    if evaluation["accuracy"].holds("clients"):
        tested = clients
        lists = {
            "accuracy": evaluation["accuracy"]["clients"],
            "train_accuracy": evaluation["train_accuracy"] or None,
            "density": density["clients"] if density else None,
            "first_layer": first["masks"] if first else None,
        }
    else:
        tested = evaluation["clients"].integer()
        lists = _results(results_path(folder, number), tested, clients)
    accuracies = lists["accuracy"].fractions(tested)  # type: ignore[union-attr]
    trained, densities = lists["train_accuracy"], lists["density"]
    found: dict[str, Any] = {"accuracies": accuracies, "everybody": tested == clients}
    kept = densities.fractions(tested) if densities is not None else None
    if trained:
        found["gaps"] = ClientGaps(number, trained.fractions(tested) - accuracies, kept)
    if tested == clients and (masks := _masks(lists, first, number, clients)) is not None:
        found["masks"] = masks
    return found


def _results(path: Path, tested: int, clients: int) -> dict[str, _Value | None]:
    """The columns of a file of :mod:`spafl.client_results`; None where nothing was measured."""
    columns: dict[str, list[Any]] = {name: [] for name in (*FIELDS, "first_layer")}
    last = -1
    for number, text in _lines(path):
        where = f"{path} line {number}"
        record = _json(text, where)
        client = record["client"].integer()
        if not last < client < clients:
            raise ReportError(f"{where}: client must be above {last} and below {clients}; got {client}")
        last = client
        for name, values in columns.items():
            values.append(None if name in _EITHER and not record.holds(name) else record[name].value)
    if len(columns["accuracy"]) != tested:
        raise ReportError(
            f"{path}: holds {len(columns['accuracy'])} clients; metrics.jsonl says that {tested} were tested"
        )
    return {
        name: None if all(v is None for v in values) else _Value(values, str(path), name)
        for name, values in columns.items()
    }


_EITHER = ("masks", "first_layer")  # a client's line has one of them


def _masks(lists: dict[str, _Value | None], first: _Value | None, number: int, clients: int) -> FilterMasks | None:
    by_client, of_first = lists.get("masks"), lists["first_layer"]
    if by_client:
        rows = by_client.list(clients)
        layers = {name: [row[name] for row in rows] for name, _ in rows[0].items()}
    elif of_first and first:
        layers = {first["name"].text(): of_first.list(clients)}
    else:
        return None
    return FilterMasks(number, {name: _bits(rows) for name, rows in layers.items()})


def _bits(rows: Sequence[_Value]) -> np.ndarray:
    """Strings of zeros and ones as bool ``(rows, characters)``."""
    width = len(rows[0].text())
    for row in rows:
        if len(row.text()) != width or set(row.value) - {"0", "1"}:
            raise row.fail(f"a string of {width} zeros and ones, as for the first client")
    bits = np.frombuffer("".join(row.value for row in rows).encode(), dtype=np.uint8)
    return bits.reshape(len(rows), width) == ord("1")


def _follows(before: Point, after: Point, where: str) -> None:
    if after.round <= before.round:
        raise ReportError(f"{where}: round {after.round} must come after round {before.round} of the line before")
    for name, value in vars(after.cost).items():
        earlier = getattr(before.cost, name)
        if value is not None and earlier is not None and value < earlier:
            raise ReportError(f"{where}: cost {name} must be cumulative; it falls from {earlier:g} to {value:g}")


def _summary(path: Path, points: Sequence[Point]) -> tuple[bool, dict[str, Any], tuple[BudgetMet, ...], list[str]]:
    if not path.exists():
        return (
            False,
            {},
            (),
            [f"the run has no summary.json: it is going on or was stopped; read up to round {points[-1].round + 1}"],
        )
    value = _json(_bytes(path), str(path))
    completed, environment, final = value["completed"].value, value["environment"], value["final"]
    environment.items()
    if not isinstance(completed, bool):
        raise value["completed"].fail("true or false")
    notes = [] if completed else [f"summary.json says the run is not complete; read up to round {points[-1].round + 1}"]
    last = next((p.round for p in reversed(points) if p.accuracy is not None), None)
    if final and final["round"].integer() != last:
        found = "none" if last is None else f"round {last + 1}"
        notes.append(
            f"summary.json ends at round {final['round'].integer() + 1}, but the last evaluated round in "
            f"metrics.jsonl is {found}; metrics.jsonl was used"
        )
    budgets = value["budget"].items() if value.holds("budget") else ()
    return completed, environment.value, tuple(_budget(*pair) for pair in budgets), notes


def _budget(name: str, told: _Value) -> BudgetMet:
    reached = told["reached"]
    mean = None if reached.value is None else reached.number()
    return BudgetMet(name, told["kind"].text(), told["budget"].number(), mean)
