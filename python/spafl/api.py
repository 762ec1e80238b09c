"""Runs from Python: start one, or open a finished one, and look at what it holds."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .callbacks import Callback
from .config import RunConfig, deep_merge, load_run_config, read_toml, resolve_config
from .errors import UserError
from .export import Exported, client_model, export_client
from .plugins import Code
from .records import client_rows, lines_of, round_row
from .report.confusion import confusions
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
        self.data  # noqa: B018  what is damaged is named by file and line
        return [round_row(line) for line in lines_of(self.folder)]

    def frame(self) -> DataFrame:
        """A row per round, in the order of the rounds (pandas).

        The columns are those of :func:`spafl.records.round_row`.
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
        rows = [row for line in lines_of(self.folder) for row in client_rows(self.folder, line)]
        return [
            {**row, "train_samples": int(train[row["client"]]), "test_samples": int(test[row["client"]])}
            for row in rows
        ]

    def confusion(self, client: int | None = None, round: int | None = None) -> np.ndarray:
        """How many test samples of a class were taken for which: int64 ``(classes, classes)``, rows are true classes.

        Args:
            client: one of them; by default all that were tested, together.
            round: from 1; by default the last evaluated one.

        Raises:
            UserError: not recorded (``evaluation.confusion = true`` does), or not of this client or round.
        """
        last = self.data.evaluated
        at = round - 1 if round is not None else -1 if last is None else last.round
        found = confusions(self.folder, at, self.data.train.shape[1])
        if not found:
            which = "the last evaluated round" if round is None else f"round {round}"
            raise UserError(
                f"no confusion matrices of {which} in {self.folder}; evaluation.confusion = true records them"
            )
        if client is None:
            return np.sum(list(found.values()), axis=0)
        if client not in found:
            raise UserError(f"client must be one of those tested in round {at + 1}; got {client}")
        return found[client]

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
        figure = chosen.draw(runs)
        # A notebook knows how to show figures of pyplot alone, and these are none.
        figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
        return figure

    def model(self, client: int) -> nn.Module:
        """A client's model as of the last checkpoint, with its threshold layers, in eval mode."""
        return client_model(self.folder, client, self.code)[0]

    def export(
        self,
        client: int,
        out: Path | str | None = None,
        onnx: bool = False,
        normalise: bool = False,
        opset: int | None = None,
    ) -> Exported:
        """Write a client's model as a small dense one; see :func:`spafl.export.export_client`.

        Args:
            out: folder; ``export`` in the run folder by default.
            onnx: write an ONNX file too, checked in onnxruntime.
            normalise: take samples as they are in the source and normalise them in the graph.
            opset: of ONNX; by default what PyTorch's exporter takes.
        """
        folder = Path(out) if out else self.folder / "export"
        return export_client(self.folder, client, folder, onnx, self.code, normalise, opset)

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
    callbacks: Iterable[Any] | None = None,
    **settings: Any,
) -> RunResult:
    """Run a configuration, or continue it.

    Args:
        config: a TOML file, nested tables, or a configuration.
        out: run folder; ``runs/NAME`` by default.
        resume: continue the run in the folder.
        quiet: no line per round.
        callbacks: who is told of finished rounds, instead of those of the configuration: names, tables with ``name``
            and ``options``, or classes, which are stored in the configuration; or objects of
            :class:`~spafl.callbacks.Callback`, which are not.
        settings: laid over the configuration: ``rounds=20``, ``training={"lr": 0.02}`` or
            ``**{"training.lr": 0.02}``.

    Raises:
        UserError: a mistake that can be mended, found before work starts.
        FloatingPointError: the training diverged.
    """
    objects: list[Callback] = []
    if callbacks is not None:
        given = list(callbacks)
        objects = [entry for entry in given if isinstance(entry, Callback)]
        settings["callbacks"] = [entry for entry in given if not isinstance(entry, Callback)]
    resolved = _resolve(config, settings)
    folder = Path(out) if out is not None else Path("runs") / resolved.name
    simulate(resolved, folder, resume=resume, quiet=quiet, callbacks=objects)
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    return buffer.getvalue()


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("tables need pandas (pip install 'spafl-kernels[pandas]'); records() does not") from None
    return pandas
