"""Budgets: the path of the penalty's coefficient, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..run_data import Run
from ..steering import ALL
from .style import COLOURS, DASHES, WIDTH, chosen_runs, in_style, legend, plain, round_axis, with_budgets

TOLERANCE = 0.05
WORDS = {"density": "density", "macs": "operations", "seconds": "time"}


@in_style
def steered(runs: Sequence[Run]) -> Figure:
    """Coefficient, set point, and what was spent as a share of the budget, over rounds: a line for every budget of
    every run, the median over its clients' turns, with a band between the quartiles."""
    chosen = chosen_runs(runs, with_budgets, "no run has budgets")
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, 3)
    handles, names = [], []
    paths = [(name, path) for run, name, _ in chosen for path in run.steering]
    for i, (name, path) in enumerate(paths):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
        for panel, values in zip(panels, (path.coefficient, path.set_point, path.spent), strict=True):
            low, middle, high = values.T
            (line,) = panel.plot(path.rounds + 1, middle, marker="." if len(middle) < 3 else None, **style)
            panel.fill_between(path.rounds + 1, low, high, color=style["color"], alpha=0.15, linewidth=0)
        handles.append(line)
        of = f"{WORDS[path.kind]} {path.budget:g}" + ("" if path.clients == ALL else f", {plain(path.clients)}")
        names.append(of if len(chosen) == 1 else f"{name}: {of}")
    coefficient, set_point, spent = panels
    coefficient.set_ylabel("coefficient of the penalty")
    coefficient.axhline(0, color="#666666", linewidth=0.8, zorder=0)
    coefficient.ticklabel_format(axis="y", scilimits=(-2, 3))
    set_point.set_ylabel("set point")
    spent.set_ylabel("spent, % of the budget")
    spent.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="#999999", alpha=0.3, linewidth=0, zorder=0)
    spent.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    for panel in panels:
        round_axis(panel)
    legend(figure, handles, names)
    return figure
