"""Tables of ``experiments/results`` as the README and the docs show them: fewer columns than those of ``spafl table``.

Nothing is run here; ``python -m benchmarks.readme`` fills the pages from the CSV files.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks import common
from spafl.algorithms import find_algorithm
from spafl.experiment import load_experiment
from spafl.table import NOT_SECONDS, brief, in_points, over_seeds, paired_difference, with_interval

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
SWEEPS = ("fmnist-lenet5-sweep",)
NAMES = ("fmnist-lenet5", "fmnist-lenet5-further", "fmnist-lenet5-500", "fmnist32-conv4", "digits")
WHAT = {
    "spafl-paper": "SpaFL `paper`",
    "spafl-fmnist": "SpaFL `fmnist`, as published",
    "spafl-tuned": "SpaFL `tuned`: half of the penalty, a dense classifier",
    "spafl-c-.002": "`tuned` with twice its penalty: `paper` with a dense classifier",
    "spafl-c-.0005": "`tuned` with half of its penalty",
    "spafl-density-.4": "`paper` with a budget of .4 for the density in place of the penalty",
    "spafl-density-.5": "`paper` with a budget of .5 for the density in place of the penalty",
    "spafl-no-exchange": "`paper` without exchange: thresholds stay at the client",
    "spafl-no-importance": "`paper` without the importance update",
    "spafl-thresholds-only": "`paper`, thresholds only: weights stay as drawn",
    "spafl-fixed": "`paper` with fixed thresholds: half of every layer's filters, by first scores",
    "fedavg": "FedAvg: one dense model",
    "local": "Local: every client alone, dense",
    "fedpm": "FedPM: one mask on weights as drawn",
    "heterofl": "HeteroFL: nested widths, physically small",
    "fjord": "FjORD: nested widths, drawn anew",
    "feddst": "FedDST: one sparse model",
    "fedspa": "FedSpa: personal masks on shared weights",
    "fedp3": "FedP3: some layers shared, the rest and the classifier personal",
    "fedprox": "FedProx: FedAvg with a pull to the global model",
    "ditto": "Ditto: a personal model beside FedAvg's",
    "fedper": "FedPer: FedAvg with a personal classifier",
    "scaffold": "SCAFFOLD: FedAvg with control variates",
}
FIRST = {  # the rows of the README's first table, all of the first experiment
    "spafl-paper": "SpaFL, the paper's setting on standardised pixels",
    "spafl-tuned": "SpaFL, half of that penalty and a dense classifier (`tuned`)",
    "spafl-fmnist": "SpaFL as published, on raw pixels",
    **{label: WHAT[label] for label in ("local", "fedp3", "fedspa", "heterofl", "fedavg")},
}


def figures_of(name: str) -> dict[str, dict[str, dict[int, float]]]:
    """The figures of an experiment's runs by method, column and seed, methods in the table's order."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            own = found.setdefault(row.pop("method"), {})
            seed = int(row.pop("seed"))
            for column, value in row.items():
                own.setdefault(column, {})
                if value:
                    own[column][seed] = float(value)
    return found


def table(name: str) -> str:
    """A line for each method of an experiment."""
    experiment = load_experiment(EXPERIMENTS / f"{name}.toml")
    rows, found = {row.label: row for row in experiment.rows}, figures_of(name)
    reference = found[experiment.reference]["accuracy"]
    seeds = max(len(own["accuracy"]) for own in found.values())
    body = []
    for label, own in found.items():
        dagger = "" if find_algorithm(rows[label].tables["algorithm"]["name"]).macs_are_seconds else f" {NOT_SECONDS}"
        itself = label == experiment.reference
        body.append([
            WHAT[label] + fewer(own, seeds), f"{over_seeds(own['accuracy'], 1)} ({mean(own['best_accuracy'], 1)})",
            over_seeds(own["accuracy_worst_10pct"], 1), densities(own) + dagger, mean(own["executed_gmacs"], 0),
            mean(own["payload_mb"], 1 if any(own["payload_mb"].values()) else 0),
            "" if itself else in_points(paired_difference(own["accuracy"], reference)),
            "" if itself else in_points(with_interval(list(own["difference_at_equal_work"].values()))),
        ])  # fmt: skip
    to = f"to {WHAT[experiment.reference].removeprefix('SpaFL ')}, points"
    head = ["", "accuracy % (best round)", "worst 10 %", "density by layer, by parameters", "GMACs executed",
            "payload MB", to, "at equal work"]  # fmt: skip
    return common.markdown(head, body)


def sweep(name: str) -> str:
    """A line for each combination of settings of a sweep."""
    found = figures_of(name)
    seeds = max(len(own["accuracy"]) for own in found.values())
    body = [
        [brief(label) + fewer(own, seeds), over_seeds(own["accuracy"], 1), over_seeds(own["accuracy_worst_10pct"], 1),
         densities(own), mean(own["executed_gmacs"], 0)]
        for label, own in found.items()
    ]  # fmt: skip
    return common.markdown(["", "accuracy %", "worst 10 %", "density by layer, by parameters", "GMACs executed"], body)


def first() -> str:
    """The README's first table."""
    body, found = [], figures_of(NAMES[0])
    for label, what in FIRST.items():
        own = found[label]
        best, last = (own[c] for c in ("best_accuracy", "accuracy"))
        apart = fmean(best.values()) - fmean(last.values()) >= 1
        size = fmean(own["payload_mb"].values())
        body.append([
            what, over_seeds(last, 1) + (f" (best round: {mean(best, 1)})" if apart else ""),
            mean(own["accuracy_worst_10pct"], 1), f"{fmean(own['executed_gmacs'].values()) / 1e3:.1f}e12",
            f"{size / 1e3:.1f} GB" if size >= 1e3 else f"{size:.0f} MB" if size else "0",
        ])  # fmt: skip
    head = ["", "accuracy %", "worst 10 % of clients", "operations executed", "sent and received"]
    return common.markdown(head, body)


def fewer(own: Mapping[str, Mapping[int, float]], seeds: int) -> str:
    """The seeds of a row that has fewer than the table."""
    return f" (of seed {', '.join(map(str, own['accuracy']))})" if len(own["accuracy"]) < seeds else ""


def mean(values: Mapping[int, float], digits: int) -> str:
    return f"{fmean(values.values()):,.{digits}f}"


def densities(own: Mapping[str, Mapping[int, float]]) -> str:
    """By layer and by parameters; a model without thresholds or masks is dense."""
    if not own["density_layers"]:
        return "1, 1"
    return ", ".join(mean(own[column], 3) for column in ("density_layers", "density_parameters"))


TABLES: dict[str, Callable[[], str]] = {
    "first": first,
    **{name: partial(table, name) for name in NAMES},
    **{name: partial(sweep, name) for name in SWEEPS},
}
