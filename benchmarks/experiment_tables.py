"""Tables of ``experiments/results`` as the README and the docs show them: fewer columns than those of ``spafl table``.

Nothing is run here; ``python -m benchmarks.readme`` fills the pages from the CSV files.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from benchmarks import common
from spafl.algorithms import find_algorithm
from spafl.experiment import load_experiment
from spafl.table import brief, in_points, over_seeds, paired_difference, with_interval

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
SWEEPS = ("fmnist-lenet5-sweep",)
NAMES = ("fmnist-lenet5", "fmnist-lenet5-further", "fmnist-lenet5-500", "fmnist32-conv4", "digits")
FIRST = {  # the rows of the README's first table, all of the first experiment
    "spafl-paper": "SpaFL, the paper's setting on standardised pixels",
    "spafl-fmnist": "SpaFL as published, on raw pixels",
    "local": "Local: each client alone, dense",
    "fedp3": "FedP3: some layers shared, the rest and the classifier personal",
    "fedspa": "FedSpa: personal masks on shared weights",
    "heterofl": "HeteroFL: nested widths, physically small",
    "fedavg": "FedAvg: one dense model",
}
WHAT = {
    "spafl-paper": "SpaFL `paper`",
    "spafl-fmnist": "SpaFL `fmnist`, as published",
    "spafl-tuned": "SpaFL `tuned`: `paper` with a dense classifier",
    "spafl-c-.0005": "SpaFL `tuned` with a quarter of the penalty",
    "spafl-no-exchange": "`paper` without exchange: thresholds stay at the client",
    "spafl-no-importance": "`paper` without the importance update",
    "spafl-thresholds-only": "`paper`, thresholds only: weights stay as drawn",
    "spafl-fixed": "`paper` with fixed thresholds: half of every layer's filters, by first scores",
    "fedavg": "FedAvg: one dense model",
    "local": "Local: every client alone, dense",
    "fedpm": "FedPM: one mask on weights as drawn",
    "heterofl": "HeteroFL: nested widths",
    "fjord": "FjORD: nested widths, drawn anew",
    "feddst": "FedDST: one sparse model",
    "fedspa": "FedSpa: personal masks on shared weights",
    "fedp3": "FedP3: some layers shared, the rest and the classifier personal",
    "fedprox": "FedProx: FedAvg with a pull to the global model",
    "ditto": "Ditto: a personal model beside FedAvg's",
    "fedper": "FedPer: FedAvg with a personal classifier",
    "scaffold": "SCAFFOLD: FedAvg with control variates",
}
NOT_SECONDS = "†"


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
    seeds = {len(own["accuracy"]) for own in found.values()}
    body = []
    for label, own in found.items():
        dense = not own["density_layers"]
        dagger = "" if find_algorithm(rows[label].tables["algorithm"]["name"]).macs_are_seconds else f" {NOT_SECONDS}"
        density = "1, 1" if dense else ", ".join(mean(own[c], 3) for c in ("density_layers", "density_parameters"))
        short = f" (of seed {', '.join(map(str, own['accuracy']))})" if len(own["accuracy"]) < max(seeds) else ""
        itself = label == experiment.reference
        body.append([
            WHAT[label] + short, f"{over_seeds(own['accuracy'], 1)} ({mean(own['best_accuracy'], 1)})",
            over_seeds(own["accuracy_worst_10pct"], 1), density + dagger, mean(own["executed_gmacs"], 0),
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
    body = [
        [brief(label), over_seeds(own["accuracy"], 1), over_seeds(own["accuracy_worst_10pct"], 1),
         ", ".join(mean(own[c], 3) for c in ("density_layers", "density_parameters")), mean(own["executed_gmacs"], 0)]
        for label, own in figures_of(name).items()
    ]  # fmt: skip
    return common.markdown(["", "accuracy %", "worst 10 %", "density by layer, by parameters", "GMACs executed"], body)


def first() -> str:
    """The README's first table."""
    body = []
    for label, what in FIRST.items():
        own = figures_of(NAMES[0])[label]
        best, last = (own[c] for c in ("best_accuracy", "accuracy"))
        apart = _mean(best) - _mean(last) >= 1
        size = _mean(own["payload_mb"])
        body.append([
            what, over_seeds(last, 1) + (f" (best round: {mean(best, 1)})" if apart else ""),
            mean(own["accuracy_worst_10pct"], 1), f"{_mean(own['executed_gmacs']) / 1e3:.1f}e12",
            f"{size / 1e3:.1f} GB" if size >= 1e3 else f"{size:.0f} MB" if size else "0",
        ])  # fmt: skip
    head = ["", "accuracy %", "worst 10 % of clients", "operations executed", "sent and received"]
    return common.markdown(head, body)


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)


def mean(values: Mapping[int, float], digits: int) -> str:
    return f"{_mean(values):,.{digits}f}" if values else ""
