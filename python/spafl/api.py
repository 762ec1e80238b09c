"""Runs from Python: start one, or open a finished one, and look at what it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .client_results import listed_in, results_path
from .config import RunConfig, deep_merge, load_run_config, read_toml, resolve_config
from .errors import UserError
from .export import Exported, client_model, export_client
from .plugins import Code
from .report.figures import PICTURES
from .report.run_data import Run
from .report.run_data import load_run as read_folder
from .report.table import comparison_html, comparison_table
from .simulation import run as simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Configuration = str | os.PathLike[str] | Mapping[str, Any] | RunConfig


class RunResult:
    """What a run folder holds. Files are read when asked for; nothing of the folder is executed.

    Attributes:
        folder: the run folder.
        code: modules of the user's that :meth:`model` and :meth:`export` may import.
    """

    def __init__(self, folder: Path, code: Code | None = None) -> None:
        self.folder = folder
        self.code = code
        self._data: Run | None = None

    @property
    def data(self) -> Run:
        """Curves and last per-client values, read and checked; see :class:`spafl.report.run_data.Run`."""
        if self._data is None:
            self._data = read_folder(self.folder)
        return self._data

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return load_run_config(self.folder, code=None)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: the last and the best evaluation, and where the run was made.

        Raises:
            UserError: the run is not complete.
        """
        path = self.folder / "summary.json"
        if not path.exists():
            raise UserError(f"run folder {self.folder} has no summary.json: the run is going on or was stopped")
        return json.loads(path.read_text())

    def records(self) -> list[dict[str, Any]]:
        """One flat dict per round: what :meth:`frame` shows."""
        return [_flat(point) for point in self.data.points]

    def frame(self) -> DataFrame:
        """A row per round, in the order of the rounds (pandas).

        ``round`` counts from 1; accuracies and densities are fractions, missing where the round was not evaluated;
        costs are cumulative, with the names of :class:`spafl.cost.Cost`; ``density.NAME`` is a layer's density.
        """
        return _pandas().DataFrame.from_records(self.records())

    def clients(self) -> DataFrame:
        """A row per client and evaluated round (pandas): ``round`` (from 1), ``client``, ``accuracy``, ``loss``,
        ``train_accuracy`` and ``density`` where recorded, and the sizes of its parts, ``train_samples`` and
        ``test_samples``."""
        return _pandas().DataFrame.from_records(self.client_records())

    def client_records(self) -> list[dict[str, Any]]:
        """One dict per client and evaluated round: what :meth:`clients` shows."""
        train, test = self.data.train.sum(1), self.data.test.sum(1)
        rows = []
        for round, client, values in client_values(self.folder):
            row = {"round": round + 1, "client": client, **values}
            rows.append(row | {"train_samples": int(train[client]), "test_samples": int(test[client])})
        return rows

    def plot(self, picture: str = "accuracy", *others: RunResult) -> Figure:
        """A picture of the report, of this run alone or beside others.

        Args:
            picture: the name of one of :data:`~spafl.report.figures.PICTURES`, or how it begins: ``accuracy`` is
                accuracy over rounds, ``pareto`` what accuracy costs.

        Raises:
            UserError: there is no such picture, or none of the runs recorded what it shows.
        """
        chosen = next((p for p in PICTURES if p.stem == picture), None)
        chosen = chosen or next((p for p in PICTURES if p.stem.startswith(f"{picture}_")), None)
        if chosen is None:
            raise UserError(f"there is no picture {picture!r}; there are {', '.join(p.stem for p in PICTURES)}")
        runs = [self.data, *(other.data for other in others)]
        if not any(chosen.shows(run) for run in runs):
            raise UserError(f"{chosen.title.lower()} cannot be shown: {chosen.lacking}")
        return chosen.draw(runs)

    def model(self, client: int) -> nn.Module:
        """A client's model as of the last checkpoint, with its threshold layers, in eval mode."""
        return client_model(self.folder, client, self.code)[0]

    def export(self, client: int, out: Path | str | None = None, onnx: bool = False) -> Exported:
        """Write a client's model as a small dense one; see :func:`spafl.export.export_client`.

        Args:
            out: folder; ``export`` in the run folder by default.
            onnx: write an ONNX file too, checked in onnxruntime.
        """
        return export_client(self.folder, client, Path(out) if out else self.folder / "export", onnx, self.code)

    def __repr__(self) -> str:
        return comparison_table([self.folder])

    def _repr_html_(self) -> str:
        return comparison_html([self.data])


def run(
    config: Configuration,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> RunResult:
    """Run a configuration, or continue it.

    Args:
        config: a TOML file, nested tables, or a configuration.
        out: run folder; ``runs/NAME`` by default.
        resume: continue the run in the folder.
        quiet: no line per round.
        settings: laid over the configuration: ``rounds=20``, ``training={"lr": 0.02}`` or
            ``**{"training.lr": 0.02}``.

    Raises:
        UserError: a mistake that can be mended, found before work starts.
        FloatingPointError: the training diverged.
    """
    resolved = _resolve(config, settings)
    folder = Path(out) if out is not None else Path("runs") / resolved.name
    simulate(resolved, folder, resume=resume, quiet=quiet)
    return RunResult(folder, Code.only(resolved.code.values()))


def load_run(path: Path | str, allow_code: bool | Iterable[str] = False) -> RunResult:
    """Open a run folder.

    Args:
        allow_code: whether models may be built with code that the run's configuration names, or the modules that may
            be imported for it. Nothing else is ever executed.

    Raises:
        ReportError: it is missing or damaged; says which file and why.
    """
    code = Code(bool(allow_code)) if isinstance(allow_code, bool) else Code.only(allow_code)
    result = RunResult(Path(path), code)
    result.data  # noqa: B018  a damaged folder is refused here, not at the first look
    return result


def _resolve(config: Configuration, settings: Mapping[str, Any]) -> RunConfig:
    if isinstance(config, RunConfig):
        if not settings:
            return config
        raw: Mapping[str, Any] = config.model_dump()
    elif isinstance(config, Mapping):
        raw = config
    else:
        raw = read_toml(Path(config))
    for name, value in settings.items():
        keys = name.split(".")
        for key in reversed(keys):
            value = {key: value}
        raw = deep_merge(raw, value)
    return resolve_config(raw)


def client_values(folder: Path) -> list[tuple[int, int, dict[str, Any]]]:
    """``(round, client, values)`` of every evaluated round, rounds from 0 as recorded."""
    names = ("accuracy", "loss", "train_accuracy", "density")
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["evaluation"] is None:
            continue
        round, listed = record["round"], listed_in(record)
        if listed is None:
            clients = [json.loads(text) for text in results_path(folder, round).read_text().splitlines()]
        else:
            count = len(listed["accuracy"])
            clients = [{"client": k} | {n: listed[n][k] for n in names if n in listed} for k in range(count)]
        found += [(round, values["client"], {n: values.get(n) for n in names}) for values in clients]
    return found


def _flat(point: Any) -> dict[str, Any]:
    row = {"round": point.round + 1}
    for name in ("accuracy", "accuracy_std", "accuracy_worst", "density", "density_parameters"):
        row[name] = getattr(point, name)
    row |= vars(point.cost)
    row |= {f"density.{layer}": value for layer, value in (point.layer_density or {}).items()}
    return row


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("tables need pandas (pip install 'spafl-kernels[pandas]'); records() does not") from None
    return pandas
