"""What a report says in words: the headline of a page, and what each picture shows, for readers who do not see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from .confusion import last_confusions
from .figures.sparsity import MOST_COMPARED, compared, rank_correlation
from .figures.style import with_varied_masks
from .run_data import Run, labels, methods
from .table import duration, quantity


def headline(runs: Sequence[Run]) -> str:
    """One sentence with the result: of one run, or which of several methods is best at what, means over their seeds.
    Empty before any evaluation."""
    done = [run for run in runs if run.evaluated is not None]
    if not done:
        return ""
    if len(runs) == 1:
        return _of_one(runs[0])
    found = methods(done)
    accuracy = _means(found, lambda run: run.last.accuracy)
    sent = _means(found, lambda run: run.last.cost.payload_bytes)
    macs = _means(found, lambda run: run.last.cost.executed_macs)
    seconds = _means(found, lambda run: run.last.cost.total_seconds)
    best, least, quick = max(accuracy, key=accuracy.__getitem__), _least(sent), _least(seconds)
    parts = [
        f"Most accurate: {_told(best, _percent(accuracy[best]))}",
        f"least sent: {_told(least, quantity(sent[least], 'B'))}",
    ]
    if macs:
        parts.append(f"fewest executed MACs: {_told(_least(macs), quantity(min(macs.values())))}")
    parts.append(f"least time: {_told(quick, duration(seconds[quick]))}")
    return "; ".join(parts) + ". Each at its last evaluated round."


def _means(found: Sequence[tuple[str, Sequence[Run]]], figure: Callable[[Run], float | None]) -> dict[str, float]:
    """By method; one of whose runs any lacks the figure is left out."""
    values = {name: [figure(run) for run in own] for name, own in found}
    return {name: fmean(v for v in own if v is not None) for name, own in values.items() if None not in own}


def _least(figures: Mapping[str, float]) -> str:
    return min(figures, key=figures.__getitem__)


def _told(method: str, figure: str) -> str:
    """``name (figure)``, and ``name (3 seeds; figure)``."""
    return f"{method[:-1]}; {figure})" if method.endswith(" seeds)") else f"{method} ({figure})"


def _of_one(run: Run) -> str:
    last = run.last
    sparse = "" if last.density is None else f" with {_percent(last.density)} of the filters active"
    macs = "" if last.cost.executed_macs is None else f", {quantity(last.cost.executed_macs)} multiply-accumulates"
    return (
        f"After {last.round + 1} rounds the {run.clients} clients' models are {_percent(last.accuracy)} accurate on "
        f"average and {_percent(last.accuracy_worst)} over the worst tenth{sparse}. It took "
        f"{quantity(last.cost.payload_bytes, 'B')} sent{macs} and {duration(last.cost.total_seconds)}."
    )


def description(stem: str, runs: Sequence[Run]) -> str:
    """What the picture of this file name shows of the runs it can show: the alternative text of its image."""
    say = _SAYS[stem]
    told = [(label, say(run)) for label, run in zip(labels(runs), runs)]
    return "; ".join(f"{label}: {text}" for label, text in told if text)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _ends(run: Run) -> str:
    if run.evaluated is None:
        return ""
    points, accuracy = run.curve("accuracy")
    return (
        f"accuracy from {_percent(accuracy[0])} in round {points[0].round + 1} to {_percent(accuracy[-1])} in round "
        f"{points[-1].round + 1}, highest {_percent(accuracy.max())}"
    )


def _costs(run: Run) -> str:
    if run.evaluated is None:
        return ""
    cost = run.last.cost
    macs = "operations not counted" if cost.executed_macs is None else f"{quantity(cost.executed_macs)} executed MACs"
    sent = quantity(cost.payload_bytes, "B")
    return f"{_percent(run.last.accuracy)} for {sent} sent, {macs} and {duration(cost.total_seconds)}"


def _spread(run: Run) -> str:
    if run.accuracies is None:
        return ""
    low, middle, high = np.quantile(run.accuracies, (0, 0.5, 1))
    return f"clients from {_percent(low)} to {_percent(high)}, half of them above {_percent(middle)}"


def _clients(run: Run) -> str:
    if run.history is None or run.accuracies is None:
        return ""
    values = run.history[1][-1]
    link = rank_correlation(run.train.sum(axis=1), values)
    return f"{_spread(run)}; rank correlation of accuracy with the number of training samples {link:+.2f}"


def _confusion(run: Run) -> str:
    matrices = last_confusions(run)
    if not matrices:
        return ""
    total = np.sum(list(matrices.values()), axis=0)
    names = run.class_names or [str(k) for k in range(len(total))]
    wrong = total - np.diag(np.diag(total))
    label, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    if not wrong.any():
        return "no test sample is taken for another class"
    return (
        f"most often {names[label]} is taken for {names[predicted]}, {wrong[label, predicted]} of "
        f"{total[label].sum()} times"
    )


def _density(run: Run) -> str:
    last = next((p.layer_density for p in reversed(run.points) if p.layer_density), None)
    if not last:
        return ""
    parameters = next((p.density_parameters for p in reversed(run.points) if p.density_parameters is not None), None)
    whole = "" if parameters is None else f", by parameters {parameters:.3f}"
    return "in the end " + ", ".join(f"{layer} {value:.2f}" for layer, value in last.items()) + whole


def _masks(run: Run) -> str:
    if run.masks is None:
        return ""
    layer = run.masks.most_varied
    kept = run.masks.layers[layer]
    everybody, nobody = int(kept.all(axis=0).sum()), int((~kept.any(axis=0)).sum())
    return f"of {kept.shape[1]} filters of {layer} all clients keep {everybody} and none keeps {nobody}"


def _overlap(run: Run) -> str:
    if not with_varied_masks(run):
        return ""
    pairs = np.triu_indices(min(run.clients, MOST_COMPARED), 1)
    overlap, alike = (matrix[pairs] for matrix in compared(run))
    linked = rank_correlation(alike, overlap)
    return f"mean overlap {overlap.mean():.2f}, rank correlation with likeness of labels {linked:+.2f}"


def _budgets(run: Run) -> str:
    return ", ".join(
        f"{path.kind} {path.budget:g} of {path.clients}: {_percent(path.spent[-1, 1])} of it spent in the end, at a "
        f"coefficient of {path.coefficient[-1, 1]:.2g} (medians)"
        for path in run.steering
    )


def _gap(run: Run) -> str:
    if run.gaps is None:
        return ""
    return f"training accuracy exceeds test accuracy by {100 * run.gaps.gap.mean():.1f} points on average"


def _partition(run: Run) -> str:
    sizes, classes = run.train.sum(axis=1), (run.train > 0).sum(axis=1)
    return (
        f"{run.clients} clients with {sizes.min()} to {sizes.max()} training samples, "
        f"{np.median(classes):g} of {run.train.shape[1]} classes each (median)"
    )


_SAYS: dict[str, Callable[[Run], str]] = {
    "accuracy_rounds": _ends,
    "pareto": _costs,
    "accuracy_payload": _costs,
    "accuracy_seconds": _costs,
    "accuracy_spread": _spread,
    "clients": _clients,
    "confusion": _confusion,
    "density": _density,
    "steering": _budgets,
    "filters": _masks,
    "overlap": _overlap,
    "gap": _gap,
    "partition": _partition,
}
