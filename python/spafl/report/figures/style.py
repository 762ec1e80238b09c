"""What all pictures have in common: colours, line styles, axes, and which runs a picture can show."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..run_data import ClientGaps, ReportError, Run, labels, method_name, seed_groups

# Okabe and Ito's colours, told apart with every common colour vision; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.2, 1.2, 1.2)), (0, (1.5, 1)))
MARKERS = "osD^vPX"
STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
WIDTH = 9.0  # inches; shown about 1000 pixels wide


NOT_EVALUATED = "no run has been evaluated yet"


def in_style(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` under matplotlib's defaults and ``STYLE``, whatever the user's own settings are."""

    @functools.wraps(function)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with matplotlib.style.context(["default", STYLE]):
            return function(*args, **kwargs)

    return styled


_NAME = 40  # characters of a run's name that fit into a legend


def plain(text: str, limit: int = _NAME) -> str:
    """``text`` as matplotlib shows it literally: no formula between dollars, no hiding after ``_``, not too long."""
    half = limit // 2
    text = text if len(text) <= limit else f"{text[: half - 1]}…{text[-half:]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def chosen_runs(
    runs: Sequence[Run], shows: Callable[[Run], Any], why: str, limit: int = _NAME
) -> list[tuple[Run, str, dict[str, Any]]]:
    """The runs a picture can show, with label (of at most ``limit`` characters) and line style; the style depends on
    the place among all runs, and runs that differ in their seed alone share it."""
    place = {i: g for g, group in enumerate(seed_groups(runs)) for i in group}
    found = [
        (
            run,
            plain(label, limit),
            {"color": COLOURS[place[i] % len(COLOURS)], "linestyle": DASHES[place[i] % len(DASHES)]},
        )
        for i, (run, label) in enumerate(zip(runs, labels(runs)))
        if shows(run)
    ]
    if not found:
        raise ReportError(why)
    return found


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))
    figure.legend(list(handles), list(names), loc="outside upper left", ncols=columns, handlelength=2.8)


def percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


def group_name(runs: Sequence[Run], name: str, limit: int = _NAME) -> str:
    """What to call runs that differ in their seed alone; ``name`` is the label of the first."""
    if len(runs) == 1:
        return name
    return f"{plain(method_name(runs, name), limit)} ({len(runs)} seeds)"


def round_axis(axes: Axes) -> None:
    """Whole rounds, counted from 1."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def client_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(False)


def evaluated(run: Run) -> bool:
    return run.evaluated is not None


def with_confusion(run: Run) -> bool:
    """Whether the last evaluated round recorded confusion matrices."""
    return run.confused


def with_density(run: Run) -> bool:
    return bool(run.layers)


def with_gaps(run: Run) -> bool:
    return isinstance(run.gaps, ClientGaps)


def with_pruned_filters(run: Run) -> bool:
    """Whether any client lacks a filter; where all keep all, a picture of them is a solid block."""
    return run.masks is not None and not all(kept.all() for kept in run.masks.layers.values())


def with_history(run: Run) -> bool:
    """Whether every client's accuracy is known in at least one round."""
    return run.history is not None


def with_budgets(run: Run) -> bool:
    """Whether clients were steered to a budget."""
    return bool(run.steering)


def with_varied_masks(run: Run) -> bool:
    """Whether clients keep different filters; where all keep the same there is nothing to compare."""
    return run.masks is not None and any((kept != kept[:1]).any() for kept in run.masks.layers.values())
