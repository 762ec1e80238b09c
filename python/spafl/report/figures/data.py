"""The clients' data."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..run_data import Run
from .style import WIDTH, chosen_runs, client_axis, in_style, plain


@in_style
def partition(runs: Sequence[Run]) -> Figure:
    """Samples per client and class as images (a column per client, a row per class) for training and test data, and the
    training samples per client. Runs that share a partition share the pictures."""
    chosen = chosen_runs(runs, lambda run: True, "there is no run")
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
            client_axis(axes)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
            axes.set_ylabel(f"class\n({part})")
            bar = figure.colorbar(image, cax=figure.add_subplot(grid[3 * g + i, 1]), label="samples")
            bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            bar.outline.set_visible(False)  # type: ignore[operator]
            axes.xaxis.set_tick_params(labelbottom=part == "test")
        axes.set_xlabel("client")
    return figure
