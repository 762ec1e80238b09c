"""Sparsity: density of layers, masks of clients, and the generalisation gap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..run_data import Run, seed_groups
from .style import (
    COLOURS,
    DASHES,
    MARKERS,
    WIDTH,
    chosen_runs,
    client_axis,
    group_name,
    in_style,
    legend,
    percent_axis,
    plain,
    round_axis,
    with_density,
    with_gaps,
    with_pruned_filters,
    with_varied_masks,
)

LINE, LINES = 250, 8  # clients beside each other in one strip of filters, and most strips per run
MOST_COMPARED = 300
MANY_LAYERS = 7  # beyond this a line per layer cannot be told apart
PARAMETERS = "by parameters"
MANY_FILTERS = 80  # beyond this rows are thin: those of filters that nobody keeps are left out


@in_style
def density_per_layer(runs: Sequence[Run]) -> Figure:
    """Density (share of active filters, mean over clients) over rounds: one run's layers in one axes, else an axes per
    layer with a line per run; and the density of the model by parameters."""
    chosen = chosen_runs(runs, with_density, "no run has thresholds")
    layers = list(dict.fromkeys(layer for run, _, _ in chosen for layer in run.layers))
    if len(chosen) == 1 and len(layers) <= MANY_LAYERS:
        return _density_of_one(chosen[0][0], layers)
    titles = [*layers, PARAMETERS]
    columns = min(4, len(titles)) if len(titles) > 4 else min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + (1.5 if columns > 2 else 2.1) * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    shown, alike = {}, [run for run, _, _ in chosen]
    names = {
        i: group_name([alike[j] for j in members], chosen[members[0]][1])
        for members in seed_groups(alike) for i in members
    }  # fmt: skip
    for panel, layer in zip(panels, titles):
        panel.set_title(layer if layer == PARAMETERS else plain(layer))
        for i, (run, _, style) in enumerate(chosen):
            x, y = _parameter_curve(run) if layer == PARAMETERS else _layer_curve(run, layer)
            if len(x):
                (shown[names[i]],) = panel.plot(x, y, marker="." if len(x) < 3 else None, **style)
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for i in range(len(titles)):
        panels[i].xaxis.set_tick_params(labelbottom=i + columns >= len(titles))  # the lowest of each column
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 5, 10]))
    figure.supylabel("density (mean over clients)", fontsize=10)
    figure.supxlabel("round", fontsize=10)
    legend(figure, list(shown.values()), list(shown))
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
    x = [p.round + 1 for p in points]
    handles += axes.plot(x, mean, color="#999999", linewidth=4, alpha=0.6, zorder=1, marker="." if len(x) < 3 else None)
    x, y = _parameter_curve(run)
    if len(x):
        handles += axes.plot(x, y, color="black", linewidth=2.5, linestyle=":", marker="." if len(x) < 3 else None)
    axes.set_ylim(-0.03, 1.03)
    round_axis(axes)
    axes.set_ylabel("density (mean over clients)")
    legend(figure, handles, [*map(plain, layers), "mean of layers", *[PARAMETERS] * (len(x) > 0)])
    return figure


def _parameter_curve(run: Run) -> tuple[list[int], list[float]]:
    pairs = [(p.round, p.density_parameters) for p in run.points if p.density_parameters is not None]
    return [round_ + 1 for round_, _ in pairs], [density for _, density in pairs]


def _layer_curve(run: Run, layer: str) -> tuple[list[int], list[float]]:
    pairs = [(p.round, p.layer_density[layer]) for p in run.points if p.layer_density and layer in p.layer_density]
    return [round_ + 1 for round_, _ in pairs], [density for _, density in pairs]


@in_style
def filters_by_client(runs: Sequence[Run]) -> Figure:
    """Per run an image of the layer in which clients differ most, a column per client and a row per filter, dark where
    the client keeps the filter; beside it the share of clients keeping each filter. More than ``LINE`` clients wrap
    like text; of more than ``MANY_FILTERS`` filters, those that nobody keeps are counted in the title instead."""
    chosen = chosen_runs(runs, with_pruned_filters, "no run has clients that lack a filter")
    strips = []
    for run, name, style in chosen:
        assert run.masks is not None  # chosen for having them
        layer = run.masks.most_varied
        kept = run.masks.layers[layer]
        clients, filters = kept.shape
        rows = np.arange(filters)
        title = f"{name}: {plain(layer)}, round {run.masks.round + 1}"
        if filters > MANY_FILTERS and kept.any() and not kept.any(axis=0).all():
            rows = np.flatnonzero(kept.any(axis=0))
            title += f"; {len(rows)} of its {filters} filters, nobody keeps the others"
        count = min(LINES, -(-clients // LINE))
        parts = np.array_split(np.arange(clients), count)
        strips += [(kept[:, rows], rows, part, title if i == 0 else "", style["color"]) for i, part in enumerate(parts)]
    heights = [min(3.6, max(1.3, 0.11 * len(rows))) for _, rows, *_ in strips]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.65 * len(strips)))
    grid = figure.add_gridspec(len(strips), 2, width_ratios=[6, 1], height_ratios=heights)
    for row, (kept, rows, part, title, colour) in enumerate(strips):
        axes = figure.add_subplot(grid[row, 0])
        image = kept[part].T
        edges = (part[0] - 0.5, part[-1] + 0.5, len(rows) - 0.5, -0.5)
        axes.imshow(image, aspect="auto", cmap=ListedColormap(["#eeeeee", colour]), vmin=0, vmax=1, extent=edges)
        client_axis(axes)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        axes.yaxis.set_major_formatter(partial(_number_of_row, rows))
        if len(part) <= 60 and len(rows) <= MANY_FILTERS:  # white gaps between cells while cells are big enough
            axes.set_xticks(part[:-1] + 0.5, minor=True)
            axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=0.7)
            axes.tick_params(which="minor", length=0)
        axes.set_title(title)
        axes.set_ylabel("filter")
        axes.set_xlabel("client")
        share = figure.add_subplot(grid[row, 1], sharey=axes)
        share.barh(np.arange(len(rows)), 100 * image.mean(axis=1), height=0.8, color=colour)
        share.set_xlim(0, 100)
        share.set_xlabel("% of these\nclients keep it")
        share.grid(axis="y", visible=False)
        share.tick_params(axis="y", which="both", labelleft=False, left=False)
    return figure


def _number_of_row(filters: np.ndarray, row: float, _: int | None) -> str:
    return str(filters[int(row)]) if row in range(len(filters)) else ""


@in_style
def generalisation_gap(runs: Sequence[Run]) -> Figure:
    """Train minus test accuracy against density, a point per client; runs without densities stand in a strip beside."""
    chosen = chosen_runs(runs, with_gaps, "no round recorded train accuracies")
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
        panels[0].set_xlim(-0.02, 1.02)  # the whole range: densities that differ little should look it
    if any(bare):
        panels[-1].set_xlabel("no thresholds")
        panels[-1].set_xticks([])
        panels[-1].set_xlim(-0.5, column - 0.5)
    percent_axis(panels[0], "train minus test accuracy\n(percentage points)")
    legend(figure, handles, [f"{name}, round {gap.round + 1}" for (_, name, _), gap in zip(chosen, gaps)])
    return figure


@in_style
def masks_and_labels(runs: Sequence[Run]) -> Figure:
    """Do clients with like labels keep like filters? Per run an image of how much the filters of each pair of clients,
    all layers together, overlap, one of how alike their labels are, clients in the same order in both, and a point per
    pair."""
    chosen = chosen_runs(runs, with_varied_masks, "no run has clients that keep different filters")
    figure = Figure(figsize=(WIDTH, 0.5 + 3.1 * len(chosen)))
    panels = figure.subplots(len(chosen), 3, squeeze=False)
    for (left, middle, right), (run, name, style) in zip(panels, chosen):
        assert run.masks is not None
        overlap, alike = compared(run)
        for axes, matrix, title in ((left, overlap, "overlap of masks"), (middle, alike, "likeness of labels")):
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
            axes.grid(False)
            axes.set_title(title)
            axes.set_xlabel("client, by main class")
            client_axis(axes)
            figure.colorbar(image, ax=axes, shrink=0.8).outline.set_visible(False)  # type: ignore[operator]
        some = f", {len(overlap)} of {run.clients} clients" if len(overlap) < run.clients else ""
        left.set_ylabel(f"{name}, round {run.masks.round + 1}{some}")
        pairs = np.triu_indices(len(overlap), 1)
        right.scatter(alike[pairs], overlap[pairs], s=6, alpha=0.3, color=style["color"], linewidths=0)
        right.set_title(f"rank correlation {rank_correlation(alike[pairs], overlap[pairs]):+.2f}")
        right.set_xlabel("likeness of labels")
        right.set_ylabel("overlap of masks")
        right.set_xlim(-0.03, 1.03)
        right.set_ylim(-0.03, 1.03)
    return figure


def compared(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Overlap of masks and likeness of labels of each pair of clients, clients of one main class together.

    Pairs grow with the square of the clients: of more than ``MOST_COMPARED``, so many evenly spread by number.
    """
    assert run.masks is not None
    some = np.unique(np.linspace(0, run.clients - 1, min(run.clients, MOST_COMPARED)).astype(int))
    counts = run.train[some]
    some = some[np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))]
    return mask_overlap(run.masks.everywhere[some]), label_similarity(run.train[some])


def mask_overlap(kept: np.ndarray) -> np.ndarray:
    """Jaccard index of each pair of rows of ``kept``, bool ``(clients, filters)``: filters both keep, of those either
    keeps; 1 for two clients that keep none."""
    both = kept.astype(np.float64) @ kept.T.astype(np.float64)
    count = kept.sum(axis=1)
    either = count[:, None] + count[None, :] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def label_similarity(counts: np.ndarray) -> np.ndarray:
    """Cosine between the class counts ``(clients, classes)`` of each pair of clients; 0 beside one without samples."""
    length = np.linalg.norm(counts, axis=1, keepdims=True)
    unit = counts / np.maximum(length, 1e-12)
    return np.clip(unit @ unit.T, 0, 1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two samples, ties at their mean rank; 0 where one of them does not vary."""
    from scipy.stats import spearmanr  # slow to import, and not every report asks

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
