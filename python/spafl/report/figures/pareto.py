"""Accuracy against what it cost: where each run ends, and which of them no other beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from ..run_data import Point, Run, seed_groups
from .style import MARKERS, NOT_EVALUATED, WIDTH, chosen_runs, evaluated, group_name, in_style, legend, percent_axis

_COSTS: tuple[tuple[str, str, Callable[[Point], float | None]], ...] = (
    ("payload, up and down", "B", lambda p: p.cost.payload_bytes),
    ("executed MACs", "", lambda p: p.cost.executed_macs),
    ("measured time", "s", lambda p: p.cost.total_seconds),
)


def front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Positions, by rising cost, of the points ``(costs, values)`` that no other point beats: none is both at most as
    dear and at least as good, and better in one of the two."""
    best, kept = -np.inf, []
    for i in np.lexsort((-values, costs)):
        if values[i] > best:
            best = values[i]
            kept.append(i)
    return np.array(kept, dtype=int)


@in_style
def accuracy_against_costs(runs: Sequence[Run]) -> Figure:
    """A panel per kind of cost: each run's way to its last evaluated round, faint, the end point with its name, and the
    Pareto front of the end points. A run that does not pay a cost stands at the left edge."""
    chosen = chosen_runs(runs, evaluated, NOT_EVALUATED)
    figure = Figure(figsize=(WIDTH, 4.4))
    panels = figure.subplots(1, len(_COSTS), sharey=True)
    groups = seed_groups([run for run, _, _ in chosen])
    named = []
    for axes, (label, unit, cost) in zip(panels, _COSTS):
        ways = [[(cost(p), p.accuracy) for p in run.points if p.accuracy is not None] for run, _, _ in chosen]
        ends = [(i, way[-1]) for i, way in enumerate(ways) if way[-1][0] is not None]
        x = np.array([end[0] for _, end in ends], dtype=float)
        y = np.array([end[1] for _, end in ends], dtype=float)
        paid = x[x > 0]
        logarithmic = len(paid) > 0 and paid.max() > 30 * paid.min()
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        edge = paid.min() / 10 if logarithmic else 0.0
        shown = np.where(x > 0, x, edge)
        for (i, _), at, value in zip(ends, shown, y):
            style = chosen[i][2]
            way = np.array([(c if c else edge, a) for c, a in ways[i] if c is not None], dtype=float)
            axes.plot(way[:, 0], way[:, 1], alpha=0.25, linewidth=1, color=style["color"], linestyle=style["linestyle"])
            group = next(group for group in groups if i in group)
            axes.plot(at, value, marker=_marker(group), color=style["color"], linestyle="none", markersize=7)
        if len(ends) > 1:
            best = front(shown, y)
            axes.step(shown[best], y[best], where="post", color="#888888", linewidth=1, linestyle=":", zorder=0)
        named.append((axes, _ends_of_groups(groups, chosen, [i for i, _ in ends], x, shown, y)))
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(unit, places=0 if logarithmic else None, sep=" "))
        axes.margins(x=0.12)
        if not ends:
            axes.text(0.5, 0.5, "not counted", transform=axes.transAxes, ha="center", color="#666666")
            axes.set_xticks([])
    percent_axis(panels[0], "test accuracy, mean over clients (%)")
    handles, names = [], []
    for group in groups:
        _, name, style = chosen[group[0]]
        handles += panels[0].plot([], [], marker=_marker(group), color=style["color"], linestyle="none")
        names.append(group_name([chosen[i][0] for i in group], name))
    legend(figure, handles, names)
    figure.draw_without_rendering()  # names are set apart in points: the panels must have their size
    for axes, names_and_places in named:
        _name_ends(axes, *names_and_places)
    return figure


def _marker(group: Sequence[int]) -> str:
    return MARKERS[group[0] % len(MARKERS)]


def _ends_of_groups(
    groups: Sequence[Sequence[int]],
    chosen: Sequence[Any],
    there: Sequence[int],
    x: np.ndarray,
    shown: np.ndarray,
    y: np.ndarray,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Name and place of each group of seeds of which a member is ``there``: the middle of its end points."""
    names, middles = [], []
    for group in groups:
        mine = [there.index(i) for i in group if i in there]
        if mine:
            name = group_name([chosen[i][0] for i in group], chosen[group[0]][1])
            names.append(name if x[mine].any() else f"{name} (none)")
            middles.append((np.median(shown[mine]), np.median(y[mine])))
    places = np.array(middles).reshape(-1, 2)
    return names, places[:, 0], places[:, 1]


def _name_ends(axes: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Write each name beside its point, pushed apart where points are close in height."""
    if not len(names):
        return
    middle = np.sqrt(x.min() * x.max()) if axes.get_xscale() == "log" else (x.min() + x.max()) / 2
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    ceiling = np.inf
    # From the highest downwards, each at least a line of text below the one before.
    for i in np.argsort(-y, kind="stable"):
        at = (y[i] - low) / max(high - low, 1e-9) * height
        ceiling = min(at, ceiling - 10)
        left = x[i] > middle
        axes.annotate(
            names[i], (x[i], y[i]), fontsize=8, color="#333333", va="center", ha="right" if left else "left",
            xytext=(-7 if left else 7, ceiling - at), textcoords="offset points",
        )  # fmt: skip
