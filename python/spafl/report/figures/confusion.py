"""What is taken for what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..confusion import last_confusions
from ..run_data import Run
from .style import WIDTH, chosen_runs, in_style, plain, with_confusion

MOST_NAMED = 20  # classes; more of them are numbered


@in_style
def confusion(runs: Sequence[Run]) -> Figure:
    """The confusion matrices of each run, all tested clients together, a row in shares of its class."""
    chosen = chosen_runs(runs, with_confusion, "no run recorded what was taken for what")
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    side = WIDTH / 2 - 0.2
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH * 0.62, rows * side * (1 if columns > 1 else 1.1)))
    for at, (run, name, _) in enumerate(chosen, 1):
        total = np.sum(list(last_confusions(run).values()), axis=0)
        classes = len(total)
        seen = total.sum(1, keepdims=True)
        shares = np.ma.masked_where(np.broadcast_to(seen == 0, total.shape), total / np.maximum(seen, 1))
        axes = figure.add_subplot(rows, columns, at)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        axes.set_title(name)
        axes.set_xlabel("predicted")
        axes.set_ylabel("class")
        if classes <= MOST_NAMED:
            names = [plain(text, 14) for text in run.class_names or map(str, range(classes))]
            axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(classes), names)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if classes <= 12:
            for label in range(classes):
                for predicted in range(classes):
                    if total[label, predicted]:
                        share = shares[label, predicted]
                        colour = "white" if share > 0.55 else "#222222"
                        axes.text(
                            predicted, label, f"{100 * share:.0f}", ha="center", va="center", size=7, color=colour
                        )
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="% of the class")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure
