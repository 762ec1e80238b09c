"""Accuracy: over rounds, payload and time, and how it is spread over clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from ..run_data import Point, Run, seed_groups
from .style import (
    MARKERS,
    NOT_EVALUATED,
    WIDTH,
    chosen_runs,
    evaluated,
    group_name,
    in_style,
    legend,
    percent_axis,
    round_axis,
    with_history,
)


def _accuracy_against(runs: Sequence[Run], cost: Callable[[Point], float], label: str, unit: str = "") -> Figure:
    """Mean accuracy over clients against a cost. A run that never pays it is a level line at its last accuracy."""
    chosen = chosen_runs(runs, evaluated, NOT_EVALUATED)
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.add_subplot()
    handles, names, spent = [], [], []
    for run, name, style in chosen:
        points, y = run.curve("accuracy")
        x = np.array([cost(p) for p in points], dtype=np.float64)
        if x[-1] == 0:
            handles.append(axes.axhline(y[-1], alpha=0.7, **{**style, "linewidth": 1.2}))
            names.append(f"{name} (none)")
            continue
        spent.append(x[x > 0])
        handles += axes.plot(x, y, marker="o" if len(x) < 3 else None, **style)
        names.append(name)
    if not spent:
        axes.set_xticks([])
    # thresholds and whole models differ by orders of magnitude: on a linear axis the cheaper run would be a point
    elif max(x[-1] for x in spent) > 30 * min(x[-1] for x in spent):
        axes.set_xscale("log")
    if spent:
        axes.xaxis.set_major_formatter(EngFormatter(unit) if unit else FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(label)
    percent_axis(axes, "test accuracy, mean over clients (%)")
    legend(figure, handles, names)
    return figure


@in_style
def accuracy_over_rounds(runs: Sequence[Run]) -> Figure:
    """Test accuracy against rounds: the mean over all clients, and beside it the mean of the worst tenth of them. Under
    them the share of clients that have trained at all. Runs that differ in their seed alone are a mean and a band."""
    chosen = chosen_runs(runs, evaluated, NOT_EVALUATED)
    figure = Figure(figsize=(WIDTH, 5.2))
    (mean, worst), (trained, below) = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[4, 1])
    handles, names = [], []
    groups = seed_groups([run for run, _, _ in chosen])
    for group in groups:
        members, (_, name, style) = [chosen[i][0] for i in group], chosen[group[0]]
        line = _over_seeds(mean, members, "accuracy", style)
        _over_seeds(worst, members, "accuracy_worst", style)
        for axes in (trained, below):
            _over_seeds(axes, members, "trained", style, scale=1 / members[0].clients)
        handles.append(line)
        names.append(group_name(members, name))
    for axes, title in ((mean, "all clients"), (worst, "worst 10 % of the clients")):
        axes.set_title(title)
    for axes in (trained, below):
        axes.set_ylim(-0.05, 1.05)
        round_axis(axes)
    percent_axis(mean, "test accuracy, mean (%)")
    percent_axis(trained, "clients that\nhave trained (%)")
    legend(figure, handles, names)
    return figure


def _over_seeds(axes: Axes, runs: Sequence[Run], name: str, style: dict[str, Any], scale: float = 1.0) -> Line2D:
    """A run's curve, or the mean of several over the rounds they share, with a band from the lowest to the highest."""
    curves = [{p.round + 1: getattr(p, name) * scale for p in run.curve(name)[0]} for run in runs]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[r] for r in rounds] for curve in curves]).reshape(len(runs), len(rounds))
    if len(runs) > 1:
        axes.fill_between(rounds, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    (line,) = axes.plot(rounds, values.mean(0), marker="o" if len(rounds) < 3 else None, **style)
    return line


@in_style
def accuracy_by_client(runs: Sequence[Run]) -> Figure:
    """Per run an image of every client's test accuracy: a column per evaluated round, a row per client, sorted by the
    last; and beside it the last accuracy against the client's number of training samples."""
    chosen = chosen_runs(runs, with_history, "no run was evaluated for all clients")
    height = 2.6
    figure = Figure(figsize=(WIDTH, 0.5 + height * len(chosen)))
    panels = figure.subplots(len(chosen), 2, width_ratios=[2.2, 1], squeeze=False)
    for (over, against), (run, name, style) in zip(panels, chosen):
        assert run.history is not None
        rounds, values = run.history
        order = np.argsort(values[-1], kind="stable")
        edges = np.arange(len(rounds) + 1), np.arange(run.clients + 1)
        image = over.pcolormesh(*edges, values.T[order], vmin=0, vmax=1, cmap="viridis", rasterized=True)
        ticks = np.unique(np.linspace(0, len(rounds) - 1, min(6, len(rounds))).astype(int))
        over.set_xticks(ticks + 0.5, [str(rounds[i] + 1) for i in ticks])
        over.grid(False)
        over.set_title(name)
        over.set_xlabel("round")
        over.set_ylabel("client, sorted")
        over.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=over, format=FuncFormatter(lambda value, _: f"{100 * value:g}"), pad=0.01)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label("accuracy (%)")
        against.scatter(run.train.sum(axis=1), values[-1], color=style["color"], s=18, alpha=0.65, linewidths=0)
        against.set_xlabel("training samples of the client")
        against.set_ylim(-0.03, 1.03)
        percent_axis(against, f"accuracy in round {rounds[-1] + 1} (%)")
    return figure


@in_style
def accuracy_over_payload(runs: Sequence[Run]) -> Figure:
    """Mean test accuracy over clients against bytes sent so far, up and down together."""
    return _accuracy_against(runs, lambda p: p.cost.payload_bytes, "payload sent so far, up and down (bytes)", "B")


@in_style
def accuracy_over_seconds(runs: Sequence[Run]) -> Figure:
    """Mean test accuracy over clients against measured wall-clock time, in the unit that suits the longest run."""
    longest = max((run.last.cost.total_seconds for run in runs), default=0)
    unit, size = ("seconds", 1) if longest <= 300 else ("minutes", 60) if longest <= 3 * 3600 else ("hours", 3600)
    return _accuracy_against(runs, lambda p: p.cost.total_seconds / size, f"measured time ({unit})")


@in_style
def accuracy_spread(runs: Sequence[Run]) -> Figure:
    """Every client's test accuracy in the last evaluated round, sorted: one rising curve per run."""
    chosen = chosen_runs(runs, evaluated, NOT_EVALUATED)
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.add_subplot()
    axes.axvspan(0, 10, color="#eeeeee", zorder=0)
    above = axes.get_xaxis_transform()
    axes.text(5, 1.01, "worst 10 %", transform=above, ha="center", va="bottom", color="#666666", fontsize=9)
    handles = []
    for i, (run, _, style) in enumerate(chosen):
        y = np.sort(np.asarray(run.accuracies))
        x = 100 * (np.arange(len(y)) + 0.5) / len(y)
        handles += axes.plot(x, y, marker=MARKERS[i % len(MARKERS)] if len(y) <= 50 else None, markersize=4, **style)
    axes.set_xlim(0, 100)
    axes.set_xlabel("clients, from the least to the most accurate (% of clients)")
    percent_axis(axes, "test accuracy of the client (%)")
    legend(figure, handles, [name for _, name, _ in chosen])
    return figure
