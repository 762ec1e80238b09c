"""The pictures of a report: each a pure function of loaded runs that returns a matplotlib Figure.

A function raises :class:`ReportError` where no run has anything to show. A run keeps its colour and
line style in every picture. Nothing here touches pyplot or the user's matplotlib settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from .run_data import ClientGaps, FilterMasks, Point, ReportError, Run, labels

__all__ = [
    "PICTURES",
    "Picture",
    "accuracy_over_payload",
    "accuracy_over_rounds",
    "accuracy_over_seconds",
    "accuracy_spread",
    "density_per_layer",
    "first_layer_filters",
    "generalisation_gap",
    "partition",
]

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
LINE, LINES = 250, 8  # clients beside each other in one strip of filters, and most strips per run
MANY_LAYERS = 7  # beyond this a line per layer cannot be told apart

NOT_EVALUATED = "no run has been evaluated yet"

_Draw = Callable[[Sequence[Run]], Figure]


def in_style(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` under matplotlib's defaults and ``STYLE``, whatever the user's own settings are."""

    @functools.wraps(function)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with matplotlib.style.context(["default", STYLE]):
            return function(*args, **kwargs)

    return styled


def plain(text: str, limit: int = 40) -> str:
    """``text`` as matplotlib shows it literally: no formula between dollars, no hiding after ``_``, not too long."""
    half = limit // 2
    text = text if len(text) <= limit else f"{text[: half - 1]}…{text[-half:]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _chosen(runs: Sequence[Run], shows: Callable[[Run], Any], why: str) -> list[tuple[Run, str, dict[str, Any]]]:
    """The runs a picture can show, with label and line style; the style depends on the place among all runs."""
    found = [
        (run, plain(label), {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]})
        for i, (run, label) in enumerate(zip(runs, labels(runs)))
        if shows(run)
    ]
    if not found:
        raise ReportError(why)
    return found


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))
    figure.legend(list(handles), list(names), loc="outside upper left", ncols=columns, handlelength=2.8)


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


def _axis_of_clients(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(False)


# --- accuracy ---------------------------------------------------------------------------------------------------


def _accuracy_against(runs: Sequence[Run], cost: Callable[[Point], float], label: str, unit: str = "") -> Figure:
    """Mean accuracy over clients against a cost. A run that never pays it is a level line at its last accuracy."""
    chosen = _chosen(runs, _evaluated, NOT_EVALUATED)
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
    _percent_axis(axes, "test accuracy, mean over clients (%)")
    _legend(figure, handles, names)
    return figure


@in_style
def accuracy_over_rounds(runs: Sequence[Run]) -> Figure:
    """Test accuracy against rounds: the mean over all clients, and beside it the mean of the worst tenth of them."""
    chosen = _chosen(runs, _evaluated, NOT_EVALUATED)
    figure = Figure(figsize=(WIDTH, 4.2))
    mean, worst = figure.subplots(1, 2, sharex=True, sharey=True)
    handles = []
    for run, _, style in chosen:
        points, accuracy = run.curve("accuracy")
        rounds, marker = [p.round for p in points], "o" if len(points) < 3 else None
        handles += mean.plot(rounds, accuracy, marker=marker, **style)
        worst.plot(rounds, run.curve("accuracy_worst")[1], marker=marker, **style)
    for axes, title in ((mean, "all clients"), (worst, "worst 10 % of the clients")):
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent_axis(mean, "test accuracy, mean (%)")
    _legend(figure, handles, [name for _, name, _ in chosen])
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
    chosen = _chosen(runs, _evaluated, NOT_EVALUATED)
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
    _percent_axis(axes, "test accuracy of the client (%)")
    _legend(figure, handles, [name for _, name, _ in chosen])
    return figure


@in_style
def generalisation_gap(runs: Sequence[Run]) -> Figure:
    """Train minus test accuracy against density, a point per client; runs without densities stand in a strip beside."""
    chosen = _chosen(runs, _with_gaps, "no round recorded train accuracies")
    gaps = [run.gaps for run, _, _ in chosen if run.gaps is not None]
    dense, bare = any(g.density is not None for g in gaps), [g.density is None for g in gaps]
    figure = Figure(figsize=(WIDTH, 4.2))
    widths = [4.0] * dense + [0.4 + 0.35 * sum(bare)] * any(bare)
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    panels = [figure.add_subplot(grid[0])]
    panels += [figure.add_subplot(grid[i], sharey=panels[0]) for i in range(1, len(widths))]
    handles, column = [], 0
    for i, ((_, _, style), gap) in enumerate(zip(chosen, gaps)):
        mark = {"color": style["color"], "marker": MARKERS[i % len(MARKERS)], "alpha": 0.65, "linewidths": 0, "s": 26}
        if gap.density is not None:
            handles.append(panels[0].scatter(gap.density, gap.gap, **mark))
        else:
            # spread by client number, so that equal gaps do not hide each other
            x = column + 0.6 * (np.arange(len(gap.gap)) + 0.5) / len(gap.gap) - 0.3
            handles.append(panels[-1].scatter(x, gap.gap, **mark))
            column += 1
    for panel in panels:
        panel.axhline(0, color="#666666", linewidth=0.8, zorder=0)
        panel.yaxis.set_tick_params(labelleft=panel is panels[0])
    if dense:
        panels[0].set_xlabel("density of the client's model (layer mean)")
    if any(bare):
        panels[-1].set_xlabel("no thresholds")
        panels[-1].set_xticks([])
        panels[-1].set_xlim(-0.5, column - 0.5)
    _percent_axis(panels[0], "train minus test accuracy\n(percentage points)")
    _legend(figure, handles, [f"{name}, round {gap.round}" for (_, name, _), gap in zip(chosen, gaps)])
    return figure


# --- sparsity ---------------------------------------------------------------------------------------------------


@in_style
def density_per_layer(runs: Sequence[Run]) -> Figure:
    """Density (share of active filters, mean over clients) over rounds: one run's layers in one axes, else an axes per
    layer with a line per run."""
    chosen = _chosen(runs, _with_density, "no run has thresholds")
    layers = list(dict.fromkeys(layer for run, _, _ in chosen for layer in run.layers))
    if len(chosen) == 1 and len(layers) <= MANY_LAYERS:
        return _density_of_one(chosen[0][0], layers)
    columns = min(4, len(layers)) if len(layers) > 4 else min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + (1.5 if columns > 2 else 2.1) * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    shown = {}
    for panel, layer in zip(panels, layers):
        panel.set_title(plain(layer))
        for run, name, style in chosen:
            x, y = _layer_curve(run, layer)
            if len(x):
                (shown[name],) = panel.plot(x, y, marker="." if len(x) < 3 else None, **style)
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    for i in range(len(layers)):
        panels[i].xaxis.set_tick_params(labelbottom=i + columns >= len(layers))  # the lowest of each column
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    figure.supylabel("density (mean over clients)", fontsize=10)
    figure.supxlabel("round", fontsize=10)
    _legend(figure, list(shown.values()), list(shown))
    return figure


def _density_of_one(run: Run, layers: Sequence[str]) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.add_subplot()
    handles = []
    for i, layer in enumerate(layers):
        x, y = _layer_curve(run, layer)
        handles += axes.plot(
            x, y, color=COLOURS[i], linestyle=DASHES[i % len(DASHES)], marker="." if len(x) < 3 else None
        )
    points, mean = run.curve("density")
    x = [p.round for p in points]
    handles += axes.plot(x, mean, color="#999999", linewidth=4, alpha=0.6, zorder=1, marker="." if len(x) < 3 else None)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("round")
    axes.set_ylabel("density (mean over clients)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, handles, [*map(plain, layers), "mean of layers"])
    return figure


def _layer_curve(run: Run, layer: str) -> tuple[list[int], list[float]]:
    pairs = [(p.round, p.layer_density[layer]) for p in run.points if p.layer_density and layer in p.layer_density]
    return [round_ for round_, _ in pairs], [density for _, density in pairs]


@in_style
def first_layer_filters(runs: Sequence[Run]) -> Figure:
    """Per run an image of the first layer, a column per client and a row per filter, dark where the client keeps the
    filter; beside it the share of clients keeping each filter. More than ``LINE`` clients wrap like text."""
    chosen = _chosen(runs, _with_masks, "no run recorded which filters of its first layer are kept")
    strips = []
    for run, name, style in chosen:
        masks = run.masks
        assert isinstance(masks, FilterMasks)  # chosen for having them
        clients, filters = masks.kept.shape
        count = min(LINES, -(-clients // LINE))
        parts = np.array_split(np.arange(clients), count)
        title = f"{name}: {plain(masks.layer)}, round {masks.round}"
        strips += [(masks, part, title if i == 0 else "", style["color"]) for i, part in enumerate(parts)]
    heights = [min(3.6, max(1.3, 0.11 * masks.kept.shape[1])) for masks, *_ in strips]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.65 * len(strips)))
    grid = figure.add_gridspec(len(strips), 2, width_ratios=[6, 1], height_ratios=heights)
    for row, (masks, part, title, colour) in enumerate(strips):
        axes = figure.add_subplot(grid[row, 0])
        image, filters = masks.kept[part].T, masks.kept.shape[1]
        edges = (part[0] - 0.5, part[-1] + 0.5, filters - 0.5, -0.5)
        axes.imshow(image, aspect="auto", cmap=ListedColormap(["#eeeeee", colour]), vmin=0, vmax=1, extent=edges)
        _axis_of_clients(axes)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        if len(part) <= 60 and filters <= 80:  # white gaps between cells while cells are big enough
            axes.set_xticks(part[:-1] + 0.5, minor=True)
            axes.set_yticks(np.arange(filters - 1) + 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=0.7)
            axes.tick_params(which="minor", length=0)
        axes.set_title(title)
        axes.set_ylabel("filter")
        axes.set_xlabel("client")
        share = figure.add_subplot(grid[row, 1], sharey=axes)
        share.barh(np.arange(filters), 100 * image.mean(axis=1), height=0.8, color=colour)
        share.set_xlim(0, 100)
        share.set_xlabel("% of these\nclients keep it")
        share.grid(axis="y", visible=False)
        share.tick_params(axis="y", which="both", labelleft=False, left=False)
    return figure


# --- data -------------------------------------------------------------------------------------------------------


@in_style
def partition(runs: Sequence[Run]) -> Figure:
    """Samples per client and class as images (a column per client, a row per class) for training and test data, and the
    training samples per client. Runs that share a partition share the pictures."""
    chosen = _chosen(runs, lambda run: True, "there is no run")
    groups: dict[tuple[bytes, bytes, tuple[int, ...]], tuple[Run, list[str]]] = {}
    for run, name, _ in chosen:
        key = (run.train.tobytes(), run.test.tobytes(), run.train.shape)
        groups.setdefault(key, (run, []))[1].append(name)
    rows = 3 * len(groups)
    height = [0.9, 1.7, 1.7]
    # from a visible tint upwards, so that one sample differs from none, which stays white
    shades = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.18, 1, 256)))
    figure = Figure(figsize=(WIDTH, (sum(height) + 1.7) * len(groups)))
    grid = figure.add_gridspec(rows, 2, height_ratios=height * len(groups), width_ratios=[1, 0.02])
    for g, (run, names) in enumerate(groups.values()):
        total = figure.add_subplot(grid[3 * g, 0])
        total.stairs(run.train.sum(axis=1), np.arange(run.clients + 1) - 0.5, fill=True, color="#777777")
        total.set_ylim(bottom=0)
        total.grid(axis="x", visible=False)
        total.set_ylabel("training\nsamples")
        whose = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        total.set_title(f"{plain(run.data)}, {run.clients} clients" + (f": {whose}" if len(runs) > 1 else ""))
        total.xaxis.set_tick_params(labelbottom=False)
        for i, (part, counts) in enumerate((("training", run.train), ("test", run.test)), 1):
            axes = figure.add_subplot(grid[3 * g + i, 0], sharex=total)
            none_left_out = np.ma.masked_equal(counts.T, 0)
            image = axes.imshow(
                none_left_out, aspect="auto", cmap=shades, vmin=1, vmax=max(2, counts.max()), origin="lower"
            )
            _axis_of_clients(axes)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
            axes.set_ylabel(f"class\n({part})")
            bar = figure.colorbar(image, cax=figure.add_subplot(grid[3 * g + i, 1]), label="samples")
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            bar.outline.set_visible(False)  # type: ignore[operator]
            axes.xaxis.set_tick_params(labelbottom=part == "test")
        axes.set_xlabel("client")
    return figure


# --- the pictures of a report -----------------------------------------------------------------------------------


def _evaluated(run: Run) -> bool:
    return run.evaluated is not None


def _with_density(run: Run) -> bool:
    return bool(run.layers)


def _with_gaps(run: Run) -> bool:
    return isinstance(run.gaps, ClientGaps)


def _with_masks(run: Run) -> bool:
    return run.masks is not None


@dataclass(frozen=True)
class Picture:
    """A picture on the page: file stem, heading, how to read it, what draws it, which runs it shows and what the
    others lack."""

    stem: str
    title: str
    caption: str
    draw: _Draw
    shows: Callable[[Run], bool] = _evaluated
    lacking: str = "not evaluated yet"


PICTURES = (
    Picture(
        "accuracy_rounds",
        "Accuracy over rounds",
        "Left the mean over all clients, each with its own model on its own test data; right the mean over the tenth "
        "of them that is worst off in that round.",
        accuracy_over_rounds,
    ),
    Picture(
        "accuracy_payload",
        "Accuracy over payload",
        "Further left is cheaper: mean accuracy against all bytes sent so far in both directions; "
        "a level line is the last accuracy of a run that sends nothing.",
        accuracy_over_payload,
    ),
    Picture(
        "accuracy_seconds",
        "Accuracy over time",
        "Further left is faster: mean accuracy against the wall-clock time measured where the simulation ran, "
        "evaluation included.",
        accuracy_over_seconds,
    ),
    Picture(
        "accuracy_spread",
        "Accuracy spread over clients",
        "Every client's accuracy in the last evaluated round, sorted: a flat curve means that all clients fare alike.",
        accuracy_spread,
    ),
    Picture(
        "density",
        "Density per layer",
        "The share of filters that are active, mean over clients: a line that falls is a layer that is being pruned.",
        density_per_layer,
        _with_density,
        "no thresholds",
    ),
    Picture(
        "first_layer",
        "First-layer filters, client by client",
        "A column is a client, a row a filter, coloured where the client keeps it: full rows are filters that "
        "everybody keeps, broken rows are personal.",
        first_layer_filters,
        _with_masks,
        "no first-layer masks recorded",
    ),
    Picture(
        "gap",
        "Generalisation gap against density",
        "A point is a client; higher means more over-fitted (train minus test accuracy), further left means sparser.",
        generalisation_gap,
        _with_gaps,
        "no train accuracies recorded",
    ),
    Picture(
        "partition",
        "Partition",
        "A column is a client, a row a class, darker means more samples and white none: a column with few cells "
        "is a client that has few classes.",
        partition,
        lambda run: True,
        "",
    ),
)
