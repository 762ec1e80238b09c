"""The comparison of runs as text and as HTML, from the same rows."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from ..latex import escaped, tabular
from .run_data import Point, ReportError, Run, labels, load_run, methods

__all__ = ["comparison_html", "comparison_table", "comparison_tex", "duration", "quantity", "targets_html"]

ABSENT = "-"
_Cell = Callable[[Point], str]


def quantity(value: float | None, unit: str = "") -> str:
    """``value`` to three digits with a decimal prefix (k = 1000): ``quantity(2.1e9, "B")`` is ``2.10 GB``."""
    if value is None:
        return ABSENT
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    step = 0
    # 999.5 would be printed as 1000 and belongs to the next prefix
    while value >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    digits = 0 if value == 0 or value >= 99.95 or (step == 0 and value == int(value)) else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[step]}{unit}".strip()


def duration(seconds: float) -> str:
    """Seconds as ``12.3 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


# The groups keep the kinds of cost apart: formulas, bytes and operations counted, seconds measured.
_COLUMNS: list[tuple[str, str, _Cell]] = [
    ("", "round", lambda p: str(p.round + 1)),
    ("accuracy (%)", "mean", lambda p: _percent(p.accuracy)),
    ("accuracy (%)", "std", lambda p: _percent(p.accuracy_std)),
    ("accuracy (%)", "worst 10 %", lambda p: _percent(p.accuracy_worst)),
    ("density", "layer mean", lambda p: _share(p.density)),
    ("density", "parameters", lambda p: _share(p.density_parameters)),
    ("paper's formulas", "MACs", lambda p: quantity(p.cost.paper_macs)),
    ("paper's formulas", "traffic", lambda p: quantity(p.cost.paper_bits, "bit")),
    ("executed", "MACs", lambda p: quantity(p.cost.executed_macs)),
    ("payload", "up", lambda p: quantity(p.cost.up_bytes, "B")),
    ("payload", "down", lambda p: quantity(p.cost.down_bytes, "B")),
    ("measured", "time", lambda p: duration(p.cost.total_seconds)),
]


def comparison_table(runs: Sequence[Run | Path | str]) -> str:
    """Aligned text, one row per run (loaded, or the path of its folder), with a note for every incomplete run.

    A row speaks of the last evaluated round; its costs are cumulative up to that round. Accuracy is over clients, each
    with its own model on its own test data. Raises :class:`ReportError` for an empty list or a bad run folder.
    """
    loaded = _loaded(runs)
    groups, header, rows = _rows(loaded)
    names = 1 + ("algorithm" in header)  # leading columns that hold words
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [_group_line(groups, widths)]
    for row in [header, *rows]:
        cells = [c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(2, "-" * max(map(len, lines)))
    lines += [f"note: {label}: {note}" for label, run in zip(labels(loaded), loaded) for note in run.notes]
    return "\n".join(line.rstrip() for line in lines)


def targets(runs: Sequence[Run]) -> list[float]:
    """Mean accuracies worth asking the price of, whole percents as fractions: for several methods what all of them
    reached and what two did, with all their seeds; for one 90 % and 99 % of its best."""
    done = [run for run in runs if run.evaluated is not None]
    best = sorted(min(max(run.curve("accuracy")[1]) for run in own) for _, own in methods(done))
    if not best:
        return []
    wanted = [best[0], best[-2]] if len(best) > 1 else [0.9 * best[0], 0.99 * best[0]]
    return sorted({math.floor(100 * value) / 100 for value in wanted} - {0.0})


def reached(run: Run, target: float) -> Point | None:
    """The first evaluated round whose mean accuracy is at least ``target``, or None."""
    return next((p for p in run.points if p.accuracy is not None and p.accuracy >= target), None)


# What it took to get there: the value of a run, and how the mean over seeds is written.
_PRICES: list[tuple[str, Callable[[Point], float | None], Callable[[float], str]]] = [
    ("round", lambda p: p.round + 1, lambda v: f"{v:.0f}"),
    ("payload, up + down", lambda p: p.cost.payload_bytes, lambda v: quantity(v, "B")),
    ("executed MACs", lambda p: p.cost.executed_macs, quantity),
    ("measured time", lambda p: p.cost.total_seconds, duration),
]
# On the clients' devices, where a run models them.
_MODELLED: list[tuple[str, Callable[[Point], float | None], Callable[[float], str]]] = [
    ("modelled time", lambda p: p.cost.modelled_seconds or None, duration),
    (
        "modelled energy",
        lambda p: p.cost.modelled_joules if p.cost.modelled_seconds else None,
        lambda v: quantity(v, "J"),
    ),
]


def targets_html(runs: Sequence[Run], wanted: Sequence[float] | None = None) -> str:
    """Rounds, bytes, operations and time that each method needed to reach each accuracy that is ``wanted``, or each of
    :func:`targets`; means over its seeds, empty without any. Where not all seeds reached it, there is no mean."""
    rows = []
    modelled = any(run.turns is not None for run in runs)
    prices, compared = _PRICES + (_MODELLED if modelled else []), methods(runs)
    for target in targets(runs) if wanted is None else sorted(set(wanted)):
        for name, own in compared:
            found = [point for point in (reached(run, target) for run in own) if point is not None]
            if len(found) == len(own):
                values = [[price(point) for point in found] for _, price, _ in prices]
                cells = [_mean(v, write) for v, (_, _, write) in zip(values, prices)]
            else:
                cells = [f"reached by {len(found)} of {len(own)}" if found else "not reached"]
                cells += [ABSENT] * (len(prices) - 1)
            rows.append([f"{100 * target:.4g} %", name, *cells])
    if not rows:
        return ""
    return _table_html(["accuracy", "run", *(name for name, *_ in prices)], rows)


def _mean(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    known = [v for v in values if v is not None]
    return write(fmean(known)) if len(known) == len(values) else ABSENT


def _table_html(header: Sequence[str], rows: Sequence[Sequence[str]], above: str = "") -> str:
    """``above``: lines of the head over the names of the columns. Only the column of runs may break its lines."""
    marks = [' class="run"' if name == "run" else "" for name in header]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, cells))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return f"<table>\n<thead>{above}<tr>{line('th', header)}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def comparison_html(runs: Sequence[Run]) -> str:
    """The same rows as a ``<table>``; every name is escaped."""
    groups, header, rows = _rows(_loaded(runs))
    top = "".join(f'<th colspan="{span}">{html.escape(name)}</th>' for name, span in _spans(groups))
    return _table_html(header, rows, f"<tr>{top}</tr>\n")


def comparison_tex(runs: Sequence[Run]) -> str:
    """The same rows as a LaTeX ``tabular`` with rules of the booktabs package; notes are comments."""
    loaded = _loaded(runs)
    groups, header, rows = _rows(loaded)
    words = 1 + ("algorithm" in header)
    heads, rules, at = [], [], 1
    for name, span in _spans(groups):
        heads.append(rf"\multicolumn{{{span}}}{{c}}{{{escaped(name)}}}" if name else "& " * (span - 1))
        if name and span > 1:
            rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
        at += span
    top = [" & ".join(heads) + r" \\", " ".join(rules), " & ".join(map(escaped, header)) + r" \\"]
    notes = [f"{label}: {note}" for label, run in zip(labels(loaded), loaded) for note in run.notes]
    return tabular("l" * words + "r" * (len(header) - words), top, rows, notes)


def _loaded(runs: Sequence[Run | Path | str]) -> list[Run]:
    if not runs:
        raise ReportError("runs must name at least one run folder; got none")
    return [run if isinstance(run, Run) else load_run(run) for run in runs]


def _rows(runs: Sequence[Run]) -> tuple[list[str], list[str], list[list[str]]]:
    """Group of each column, header, and a row of cells per run."""
    titles = labels(runs)
    words = [["run", *titles]]
    if any(title != run.algorithm for title, run in zip(titles, runs)):
        words.append(["algorithm", *(run.algorithm for run in runs)])
    groups = [""] * len(words) + [group for group, _, _ in _COLUMNS]
    header = [column[0] for column in words] + [name for _, name, _ in _COLUMNS]
    rows = [[c[i + 1] for c in words] + [cell(run.last) for _, _, cell in _COLUMNS] for i, run in enumerate(runs)]
    return groups, header, rows


def _spans(groups: Sequence[str]) -> list[tuple[str, int]]:
    spans: list[tuple[str, int]] = []
    for group in groups:
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1] + 1)
        else:
            spans.append((group, 1))
    return spans


def _group_line(groups: Sequence[str], widths: list[int]) -> str:
    """The line of group names; widens a group's last column where the name would not fit."""
    parts, start = [], 0
    for name, span in _spans(groups):
        width = sum(widths[start : start + span]) + 2 * (span - 1)
        widths[start + span - 1] += max(0, len(name) - width)
        parts.append(name.rjust(max(width, len(name))))
        start += span
    return "  ".join(parts)
