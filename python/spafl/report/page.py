"""Writes a report: the pictures as PNGs and one HTML page that holds everything and needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .devices import devices_html
from .figures import PICTURES, Picture, in_style
from .run_data import ReportError, Run, labels, load_run, methods
from .table import comparison_html, targets_html
from .words import description, headline

__all__ = ["write_report"]

DPI = 150
TALLEST = 60_000  # pixels; matplotlib draws no picture of 65,536 or more
_CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --soft: #666666; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --back: #16181b; --soft: #a0a0a0; --line: #44484d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 1200px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .8rem; white-space: nowrap; }
th, td { padding: .25rem .45rem; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .run { text-align: left; }
.run { white-space: normal; min-width: 11rem; } thead th { font-weight: 600; }
thead tr:first-child th { text-align: center; color: var(--soft); font-weight: 400; }
thead tr th.run { text-align: left; }
thead tr:last-child th { border-bottom: 1px solid var(--line); }
nav ul { columns: 2; padding-left: 1.2rem; } .headline { font-size: 1.1rem; }
figure { margin: 0; max-width: 1020px; }
figure img { width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
details { margin: .5rem 0; } pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--line); font-size: .8rem; }
"""


def write_report(
    runs: Sequence[Path | str], out: Path | str | None = None, accuracies: Sequence[float] | None = None
) -> Path:
    """Write the report of one run folder or the comparison of several; returns the path of ``report.html``.

    ``out`` is the folder to write into, by default ``<run>/report`` for one run; for several it must be named.
    ``accuracies`` are fractions of which the page says what they cost; by default some that the runs reached.
    Everything is read and drawn before the first file is written, and each file is replaced whole, so a failed
    report leaves the former one as it was. Raises :class:`ReportError` with one line for bad input or an
    unwritable ``out``.
    """
    if isinstance(runs, (str, Path)):
        runs = [runs]
    if not runs:
        raise ReportError("runs must name at least one run folder; got none")
    if out is None and len(runs) > 1:
        raise ReportError(f"out must name a folder when several runs are compared; got {len(runs)} runs and no out")
    if bad := [a for a in accuracies or () if not 0 < a <= 1]:
        raise ReportError(f"accuracies must be fractions above 0, at most 1; got {bad[0]:g}")
    loaded = [load_run(run) for run in runs]
    folder = Path(out) if out is not None else Path(runs[0]) / "report"
    pictures = {picture: _png(picture, loaded) for picture in PICTURES if any(map(picture.shows, loaded))}
    page = _page(loaded, pictures, accuracies)
    files = {f"{picture.stem}.png": png for picture, png in pictures.items()}
    former = [f"{picture.stem}.png" for picture in PICTURES if picture not in pictures]
    return put(folder, {**files, "report.html": page.encode()}, former)[-1]


def put(folder: Path, files: Mapping[str, bytes], former: Iterable[str] = ()) -> list[Path]:
    """Write files of a report, each whole, and remove those of a former one, which would contradict them.

    Raises:
        ReportError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _write(folder / name, data)
        for name in former:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"{folder}: the report cannot be written ({error.strerror})") from None
    return [folder / name for name in files]


@in_style
def _png(picture: Picture, runs: Sequence[Run]) -> bytes:
    buffer = io.BytesIO()
    figure = picture.draw(runs)
    dpi = min(DPI, TALLEST / figure.get_figheight())
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _page(runs: Sequence[Run], pictures: dict[Picture, bytes], accuracies: Sequence[float] | None) -> str:
    titles = labels(runs)
    title = "Comparison of " + ", ".join(name for name, _ in methods(runs)) if len(runs) > 1 else titles[0]
    notes = [f"{name}: {note}" for name, run in zip(titles, runs) for note in run.notes]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *([f'<p class="headline">{html.escape(headline(runs))}</p>'] if headline(runs) else []),
        *(f'<p class="soft">{html.escape(about)}</p>' for about in _about(runs, titles)),
        _contents(pictures),
        '<h2 id="results">Results</h2>',
        f'<div class="wide">{comparison_html(runs)}</div>',
        '<p class="soft">Each row speaks of the last evaluated round and of the costs up to it. Accuracy is over '
        "clients, each with its own model on its own test data. The kinds of cost do not add up: the paper's "
        "formulas, operations and bytes as executed and sent, and measured time.</p>",
        *(f"<p><strong>Note.</strong> {html.escape(note)}</p>" for note in notes),
    ]
    prices = targets_html(runs, accuracies)
    if prices:
        parts.append(
            f'<h2 id="targets">What an accuracy costs</h2>\n<div class="wide">{prices}</div>\n'
            '<p class="soft">The first evaluated round whose mean accuracy is as high, and the costs up to it; means '
            "over seeds, where all of them got there.</p>"
        )
    devices = devices_html(titles, [run.turns for run in runs])
    if devices:
        parts.append(
            f'<h2 id="devices">Devices</h2>\n{devices}\n'
            '<p class="soft">Time and energy are modelled, from the operations that were executed and the bytes that '
            "were sent; no clock was read. Clients count from 0.</p>"
        )
    parts += [_section(picture, runs, titles, png) for picture, png in pictures.items()]
    left_out = [f"{p.title.lower()} ({p.lacking})" for p in PICTURES if p not in pictures]
    if left_out:
        parts.append(f'<p class="soft">Not shown: {html.escape(", ".join(left_out))}.</p>')
    parts.append('<h2 id="configuration">Configuration</h2>')
    for name, run in zip(titles, runs):
        parts.append(_folded(f"{name}: config.toml", run.config))
        if run.environment:
            parts.append(_folded(f"{name}: environment", json.dumps(run.environment, indent=2, ensure_ascii=False)))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _about(runs: Sequence[Run], titles: Sequence[str]) -> list[str]:
    """What was run, a line for each method of whose seeds the same is to be said, or else for each run."""
    label = {id(run): name for run, name in zip(runs, titles)}
    lines: list[str] = []
    for name, own in methods(runs):
        said = [
            f"{run.algorithm}, model {run.model}, data {run.data}, {run.clients} clients, "
            f"{len(run.points)} rounds recorded, {'completed' if run.completed else 'not completed'}"
            for run in own
        ]
        if len(runs) == 1:
            lines += said
        elif len(set(said)) == 1:
            lines.append(f"{name}: {said[0]}")
        else:
            lines += [f"{label[id(run)]}: {text}" for run, text in zip(own, said)]
    return lines


def _section(picture: Picture, runs: Sequence[Run], titles: Sequence[str], png: bytes) -> str:
    absent = [name for name, run in zip(titles, runs) if not picture.shows(run)]
    missing = f" Not in the picture ({picture.lacking}): {', '.join(absent)}." if absent else ""
    data = base64.b64encode(png).decode()
    title, caption = html.escape(picture.title), html.escape(picture.caption + missing)
    shown = description(picture.stem, [run for run in runs if picture.shows(run)])
    image = f'<img alt="{title}. {html.escape(shown)}" src="data:image/png;base64,{data}">'
    return f'<h2 id="{picture.stem}">{title}</h2>\n<figure>{image}\n<figcaption>{caption}</figcaption></figure>'


def _contents(pictures: Iterable[Picture]) -> str:
    links = [("results", "Results"), *((p.stem, p.title) for p in pictures), ("configuration", "Configuration")]
    items = "".join(f'<li><a href="#{anchor}">{html.escape(title)}</a></li>' for anchor, title in links)
    return f"<nav><ul>{items}</ul></nav>"


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def _write(path: Path, data: bytes) -> None:
    """Replace ``path`` whole: a reader sees the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files private; a report is as readable as any other file of its owner
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
