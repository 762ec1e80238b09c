"""Accuracy against what it cost: where each run ends, and which of them no other beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from ..run_data import Point, Run, seed_groups
from .style import (
    COLOURS,
    MARKERS,
    NOT_EVALUATED,
    WIDTH,
    chosen_runs,
    evaluated,
    group_name,
    in_style,
    legend,
    percent_axis,
)

_COSTS: tuple[tuple[str, str, Callable[[Point], float | None]], ...] = (
    ("payload, up and down", "B", lambda p: p.cost.payload_bytes),
    ("executed MACs", "", lambda p: p.cost.executed_macs),
    ("measured time", "s", lambda p: p.cost.total_seconds),
)
_ASIDE = 60  # characters of a name in a column of its own
_BESIDE = 6, 24  # more runs, or longer names, do not fit into panels beside each other: names stand in a column


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
    Pareto front of the end points. Runs that differ in their seed alone are one: the medians of their ways and ends,
    and thin lines from the least end to the largest. A run that does not pay a cost stands at the left edge. Of many
    runs the panels stand below each other, show the heights at which runs end, and have the names at their right."""
    chosen = chosen_runs(runs, evaluated, NOT_EVALUATED, _ASIDE)
    groups = _groups_of(chosen)
    many = len(groups) > _BESIDE[0] or max(len(group.name) for group in groups) > _BESIDE[1]
    figure = Figure(figsize=(WIDTH, 0.5 + max(3.0, 0.2 * len(groups)) * len(_COSTS)) if many else (WIDTH, 4.4))
    shape = (len(_COSTS), 1) if many else (1, len(_COSTS))
    panels = figure.subplots(*shape, sharey=True)
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
        middles = _ends_of(groups, [i for i, _ in ends], x, shown, y)
        for end in middles:
            mine = [[(c if c else edge, a) for c, a in ways[i] if c is not None] for i in end.there]
            group, colour = end.group, end.group.colour
            for way in _middle_way(mine):
                axes.plot(way[:, 0], way[:, 1], alpha=0.3, linewidth=1, color=colour, linestyle=group.dashes)
            axes.plot(end.x, end.y, marker=group.marker, color=colour, linestyle="none", markersize=7, zorder=3)
            if len(end.there) > 1:
                for across, along in ((end.across, (end.y, end.y)), ((end.x, end.x), end.along)):
                    axes.plot(across, along, color=colour, linewidth=0.9, solid_capstyle="butt")
        if len(middles) > 1:
            at, height = (np.array([getattr(end, axis) for end in middles]) for axis in "xy")
            best = front(at, height)
            axes.step(at[best], height[best], where="post", color="#888888", linewidth=1, linestyle=":", zorder=0)
        named.append((axes, middles))
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(unit, places=0 if logarithmic else None, sep=" "))
        axes.margins(x=0.03 if many else 0.12)
        if not ends:
            axes.text(0.5, 0.5, "not counted", transform=axes.transAxes, ha="center", color="#666666")
            axes.set_xticks([])
    for axes in panels if many else panels[:1]:
        percent_axis(axes, "test accuracy (%)" if many else "test accuracy, mean over clients (%)")
    if many:
        heights = [run.last.accuracy or 0.0 for run, _, _ in chosen]
        room = max(max(heights) - min(heights), 0.05)  # of accuracy
        panels[0].set_ylim(max(0.0, min(heights) - 0.3 * room), max(heights) + 0.1 * room)
        for axes, named_ends in named:
            _name_ends_aside(axes, named_ends)
    else:
        handles = [h for g in groups for h in panels[0].plot([], [], marker=g.marker, color=g.colour, linestyle="none")]
        legend(figure, handles, [group.name for group in groups])
        figure.draw_without_rendering()  # names are set apart in points: the panels must have their size
        for axes, named_ends in named:
            _name_ends(axes, named_ends)
    return figure


@dataclass(frozen=True)
class _Group:
    """Runs that differ in their seed alone: their places among the runs shown, and how they are called and drawn."""

    members: Sequence[int]
    name: str
    marker: str
    colour: str
    dashes: Any


def _groups_of(chosen: Sequence[tuple[Run, str, dict[str, Any]]]) -> list[_Group]:
    found = []
    for number, members in enumerate(seed_groups([run for run, _, _ in chosen])):
        _, label, style = chosen[members[0]]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # another one where the colours come round
        name = group_name([chosen[i][0] for i in members], label, _ASIDE)
        found.append(_Group(members, name, marker, style["color"], style["linestyle"]))
    return found


@dataclass(frozen=True)
class _End:
    """Where a group ends: the middle of its end points, in the units of the axes; ``name`` says if it paid nothing.

    ``there``: the runs of which the cost is known; ``across`` and ``along``: their least and largest end.
    """

    group: _Group
    name: str
    x: float
    y: float
    there: Sequence[int]
    across: tuple[float, float]
    along: tuple[float, float]


def _ends_of(
    groups: Sequence[_Group], there: Sequence[int], x: np.ndarray, shown: np.ndarray, y: np.ndarray
) -> list[_End]:
    """The end of each group of which a member is ``there``, the highest first."""
    found = []
    for group in groups:
        mine = [there.index(i) for i in group.members if i in there]
        if mine:
            name = group.name if x[mine].any() else f"{group.name} (none)"
            at, height = shown[mine], y[mine]
            found.append(
                _End(
                    group, name, float(np.median(at)), float(np.median(height)), [there[k] for k in mine],
                    (float(at.min()), float(at.max())), (float(height.min()), float(height.max())),
                )
            )  # fmt: skip
    return sorted(found, key=lambda end: -end.y)


def _middle_way(ways: Sequence[Sequence[tuple[float, float]]]) -> list[np.ndarray]:
    """The ways of some runs as one of medians, ``(evaluations, 2)``; each by itself where some were evaluated more
    often than others."""
    if len({len(way) for way in ways}) == 1:
        return [np.median(np.array(ways, dtype=float), axis=0)]
    return [np.array(way, dtype=float) for way in ways]


def _name_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """Write each name beside its point, pushed apart where points are close in height."""
    if not ends:
        return
    least, most = min(end.x for end in ends), max(end.x for end in ends)
    middle = np.sqrt(least * most) if axes.get_xscale() == "log" else (least + most) / 2
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    ceiling = np.inf
    for end in ends:  # each at least a line of text below the one before
        at = (end.y - low) / max(high - low, 1e-9) * height
        ceiling = min(at, ceiling - 10)
        left = end.x > middle
        axes.annotate(
            end.name, (end.x, end.y), fontsize=8, color="#333333", va="center", ha="right" if left else "left",
            xytext=(-7 if left else 7, ceiling - at), textcoords="offset points",
        )  # fmt: skip


def _name_ends_aside(axes: Axes, ends: Sequence[_End]) -> None:
    """Write the names in a column at the right of the panel, in the order of their heights, each behind its mark."""
    line = min(0.07, 1 / max(len(ends), 1))  # of the height of the panel
    for number, end in enumerate(ends):
        at = 1 - (number + 0.5) * line
        axes.plot(
            1.025, at, transform=axes.transAxes, marker=end.group.marker, color=end.group.colour, linestyle="none",
            markersize=6, clip_on=False,
        )  # fmt: skip
        axes.text(1.045, at, end.name, transform=axes.transAxes, fontsize=8, color="#333333", va="center")
