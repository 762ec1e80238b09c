"""Pictures of measured rows, from the CSV alone."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .results import latest

Rows = list[dict[str, str]]
COLUMNS = 4
# Okabe and Ito's colours, told apart with every common colour vision.
OURS, COMPACT, IDEAL, CEILING = "#0072B2", "#009E73", "#999999", "#D55E00"


def curve(rows: Iterable[dict[str, str]], provider: str, y: str) -> list[tuple[float, float]]:
    """``(density, y)`` of a provider where it was measured, by rising density."""
    return sorted((float(r["density"]), float(r[y])) for r in rows if r["provider"] == provider and r[y])


def _grid(panels: int) -> tuple[Figure, Sequence[Any]]:
    """A figure, and the axes of its panels in reading order; places that are left over stay blank."""
    lines = -(-panels // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.6 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes


def _logarithmic(axis: Any, densities: Iterable[float]) -> None:
    """Both axes logarithmic: densities where they were measured, plain numbers at 1, 2 and 5 times powers of ten."""
    ticks = sorted(set(densities))
    axis.set(xscale="log", yscale="log", xlabel="density")
    axis.set_xticks(ticks, [f"{d:g}" for d in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(lambda y, _: "")


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, beside them."""
    found = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[0] != "_"}
    figure.legend(found.values(), found.keys(), fontsize=8, loc="outside right upper")


def layers(rows: Rows, dtype: str, batch: str, graph: str, mode: str) -> Figure | None:
    """Speed-up over dense by density, one panel per layer, beside 1/density and the ceiling; None without a time.

    A red panel title marks a layer where ours is slower than dense somewhere: a loss.
    """
    wanted = {"kind": "layer", "dtype": dtype, "batch": batch, "graph": graph, "mode": mode}
    chosen = [r for r in latest(rows) if all(r[k] == v for k, v in wanted.items())]
    panels: dict[tuple[str, str], Rows] = {}
    for row in chosen:
        panels.setdefault((row["model"], row["layer"]), []).append(row)
    panels = {k: found for k, found in panels.items() if curve(found, "ours", "speedup_vs_dense")}
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for axis, ((model, name), found) in zip(axes, panels.items(), strict=False):
        ideal = curve(found, "ours", "one_over_density")
        axis.plot(*zip(*ideal, strict=True), "--", color=IDEAL, label="1 / density")
        if ceiling := curve(found, "ours", "ceiling"):
            axis.plot(*zip(*ceiling, strict=True), ":", color=CEILING, label="roofline ceiling")
        if narrow := curve(found, "compact", "speedup_vs_dense"):
            axis.plot(*zip(*narrow, strict=True), "s-", color=COMPACT, ms=4, label="compact + cuDNN (oracle)")
        ours = curve(found, "ours", "speedup_vs_dense")
        axis.plot(*zip(*ours, strict=True), "o-", color=OURS, ms=4, label="ours")
        axis.axhline(1.0, color="black", lw=0.6)
        _logarithmic(axis, (d for d, _ in ours))
        axis.set_ylabel("times faster than dense")
        loss = min(speed for _, speed in ours) < 1.0
        axis.set_title(f"{model} {name}\n{found[0]['shape']}", fontsize=8, color="#CC0000" if loss else "black")
    _legend(figure, axes)
    way = "CUDA graph" if graph == "1" else "eager"
    figure.suptitle(f"{mode}, {dtype}, batch {batch}, {way}, {'; '.join(sorted({r['gpu'] for r in chosen}))}")
    return figure


def steps(rows: Rows, kind: str) -> Figure | None:
    """Milliseconds of whole training steps (``step``) or of a cohort (``cohort``); None without a time."""
    chosen = [r for r in latest(rows) if r["kind"] == kind and r["us"]]
    panels: dict[tuple[str, str, str], Rows] = {}
    for row in chosen:
        panels.setdefault((row["model"], row["batch"], row["graph"]), []).append(row)
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    # One legend serves all panels, so a provider has one colour also where another was not measured.
    colours = {p: f"C{i}" for i, p in enumerate(dict.fromkeys(r["provider"] for r in chosen))}
    for axis, ((model, batch, graph), found) in zip(axes, sorted(panels.items()), strict=False):
        for provider in dict.fromkeys(r["provider"] for r in found):
            points = curve(found, provider, "us")
            y = [us / 1e3 for _, us in points]
            axis.plot([d for d, _ in points], y, "o-", ms=4, color=colours[provider], label=provider)
        _logarithmic(axis, (float(r["density"]) for r in found))
        axis.set_ylabel("ms per step")
        axis.set_title(f"{model}, batch {batch}, {'CUDA graph' if graph == '1' else 'eager'}", fontsize=9)
    _legend(figure, axes)
    clients = sorted({r["clients"] for r in chosen})
    what = "training step" if kind == "step" else f"step of a cohort of {', '.join(clients)} clients"
    figure.suptitle(f"{what}, {'; '.join(sorted({r['gpu'] for r in chosen}))}")
    return figure


def draw(rows: Rows, folder: pathlib.Path) -> Sequence[pathlib.Path]:
    """Every picture that the rows have times for, as PNG files; returns them."""
    pictures: dict[str, Figure | None] = {kind: steps(rows, kind) for kind in ("step", "cohort")}
    cells = {(r["dtype"], r["batch"], r["graph"], r["mode"]) for r in rows if r["kind"] == "layer"}
    for dtype, batch, graph, mode in sorted(cells):
        name = f"layers-{mode}-{dtype}-batch{batch}-{'graph' if graph == '1' else 'eager'}"
        pictures[name] = layers(rows, dtype, batch, graph, mode)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in pictures.items():
        if figure is not None:
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=110)
    return drawn
