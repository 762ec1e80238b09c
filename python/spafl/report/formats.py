"""A report for other programs: CSV tables, a LaTeX table, and the pictures as vector graphics."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..csv_files import csv_text
from ..records import client_rows, lines_of, round_row
from .confusion import confusion_rows
from .figures import PICTURES, in_style
from .figures.style import plain
from .page import put
from .run_data import ReportError, Run, labels, load_run
from .table import comparison_table, comparison_tex
from .words import headline

__all__ = ["write_csv_tables", "write_latex", "write_pdf"]


def write_csv_tables(runs: Sequence[Path | str], out: Path | str | None = None) -> list[Path]:
    """Write ``rounds.csv``, ``clients.csv`` and, where a run recorded them, ``confusion.csv``; returns their paths.

    A row per round, per client and evaluated round, and per client, class and predicted class of the last evaluated
    round; the first column names the run. Columns as in :meth:`spafl.api.RunResult.frame` and ``clients``.

    Raises:
        ReportError: as :func:`~spafl.report.write_report`.
    """
    loaded, folder = _loaded(runs, out)
    tables: dict[str, list[dict[str, Any]]] = {"rounds": [], "clients": [], "confusion": []}
    for name, run in zip(labels(loaded), loaded):
        train, test = run.train.sum(1), run.test.sum(1)
        for line in lines_of(run.folder):
            tables["rounds"].append({"run": name, **round_row(line)})
            for row in client_rows(run.folder, line):
                sizes = {"train_samples": int(train[row["client"]]), "test_samples": int(test[row["client"]])}
                tables["clients"].append({"run": name, **row, **sizes})
        tables["confusion"] += [{"run": name, **row} for row in confusion_rows(run)]
    files = {f"{name}.csv": csv_text(rows).encode() for name, rows in tables.items() if rows}
    return put(folder, files, [f"{name}.csv" for name in tables if f"{name}.csv" not in files])


def write_latex(runs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the comparison as ``comparison.tex``, a ``tabular`` with the rules of the booktabs package."""
    loaded, folder = _loaded(runs, out)
    return put(folder, {"comparison.tex": comparison_tex(loaded).encode()})[0]


@in_style
def write_pdf(runs: Sequence[Path | str], out: Path | str | None = None) -> list[Path]:
    """Write every picture as ``NAME.pdf``, and ``report.pdf`` with the table and all of them; returns the paths,
    ``report.pdf`` first."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    loaded, folder = _loaded(runs, out)
    files: dict[str, bytes] = {}
    book = io.BytesIO()
    # Without a date the same run gives the same bytes; letters stay letters.
    undated = {"CreationDate": None, "Producer": None, "Creator": None}
    with rc_context({"pdf.fonttype": 42}), warnings.catch_warnings(), PdfPages(book, metadata=undated) as pages:
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        pages.savefig(_title_page(loaded))
        for picture in PICTURES:
            if not any(map(picture.shows, loaded)):
                continue
            figure, single = picture.draw(loaded), io.BytesIO()
            figure.savefig(single, format="pdf", metadata=undated)
            files[f"{picture.stem}.pdf"] = single.getvalue()
            figure.suptitle(picture.title, x=0.01, ha="left", fontweight="bold")
            pages.savefig(figure)
    files = {"report.pdf": book.getvalue(), **files}
    return put(folder, files, [f"{p.stem}.pdf" for p in PICTURES if f"{p.stem}.pdf" not in files])


def _title_page(runs: Sequence[Run]) -> Any:
    import textwrap

    from matplotlib.figure import Figure

    names = [plain(name, 80) for name in labels(runs)]
    title = "Comparison of " + ", ".join(names) if len(runs) > 1 else names[0]
    table = comparison_table(runs)
    widest = max(map(len, table.splitlines()))
    figure = Figure(figsize=(11, 4 + 0.2 * len(runs)))
    text = "\n".join(textwrap.wrap(title, 90))
    figure.text(0.02, 0.96, text, va="top", fontsize=14, fontweight="bold", parse_math=False)
    words = "\n".join(textwrap.wrap(headline(runs), 120))
    figure.text(0.02, 0.8, words, va="top", fontsize=10, parse_math=False)
    # A monospaced letter is .6 of its size wide: 72 points an inch, 10.5 inches.
    size = min(9.0, 10.5 * 72 / (0.61 * widest))
    figure.text(0.02, 0.62, table, va="top", family="monospace", fontsize=size, parse_math=False)
    return figure


def _loaded(runs: Sequence[Path | str], out: Path | str | None) -> tuple[list[Run], Path]:
    if not runs:
        raise ReportError("runs must name at least one run folder; got none")
    if out is None and len(runs) > 1:
        raise ReportError(f"out must name a folder when several runs are compared; got {len(runs)} runs and no out")
    return [load_run(run) for run in runs], Path(out) if out is not None else Path(runs[0]) / "report"
