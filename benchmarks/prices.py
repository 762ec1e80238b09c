"""Fit the prices by which engine "auto" chooses to the figures of ``benchmarks.zoo``; nothing is measured.

    python -m benchmarks.prices [--check] [RESULTS.csv ...]

The seconds of every measured step, masked, compact, and compact without the extension, are explained by what the step
does (:mod:`spafl_kernels.compact.plan.estimate`) with prices that are not negative, to the smallest sum of squared
relative errors; ``spafl_kernels/compact/plan/estimate.json`` is written, and how far the estimates are off is printed.
``--check`` writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmarks import common
from benchmarks.common import Row
from benchmarks.zoo_models import ZOO
from spafl_kernels.compact.graph.flow import Flow
from spafl_kernels.compact.graph.follow import follow_thresholds
from spafl_kernels.compact.graph.inputs import Input
from spafl_kernels.compact.graph.trace import check_traceable
from spafl_kernels.compact.plan.estimate import ENGINES, FEATURES, PRICES, plan_of, work
from spafl_kernels.compact.plan.rows import Rows


def amounts(rows: Sequence[Row]) -> dict[str, list[list[float]]]:
    """By engine and row, how much of every feature a step has."""
    flows: dict[tuple[str, str], Flow] = {}
    found: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
    for row in rows:
        one = dataclasses.replace(ZOO[row["model"]], estimator=row["estimator"], batch=int(row["batch"]))  # type: ignore[arg-type]
        if (row["model"], row["estimator"]) not in flows:
            model, (x, _) = one.pruned(1.0), next(one.batches(1))
            inputs = (Input(tuple(x.shape[1:]), x.dtype),)
            flows[row["model"], row["estimator"]] = follow_thresholds(model, inputs, check_traceable(model), 2)
        flow = flows[row["model"], row["estimator"]]
        one.prune_(flow.model, float(row["density"]))
        keep = Rows(flow).of_model(gradients=True).keep
        for engine in ENGINES:
            plan = None if engine == "masked" else plan_of(flow, keep, engine == "compact")
            done = work(flow, plan, one.batch).values()
            found[engine].append([sum(part.get(feature, 0.0) for part in done) for feature in FEATURES])
    return found


def fit(amount: np.ndarray, seconds: np.ndarray, least: np.ndarray | float = 0.0) -> np.ndarray:
    """Prices that explain the seconds best, none below ``least``."""
    known = amount @ np.broadcast_to(least, amount.shape[1])
    return least + nnls(amount / seconds[:, None], 1 - known / seconds)[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prices", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, default=[common.RESULTS / "zoo.csv"])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    rows = common.right(row for path in args.results for row in common.read(path))
    amount = {engine: np.array(values) for engine, values in amounts(rows).items()}
    prices, estimated = {}, {}
    found: dict[str, np.ndarray] = {}
    for engine in ENGINES:
        measured = np.array([float(row.get(f"{engine}_ms") or "nan") / 1e3 for row in rows])
        known = ~np.isnan(measured)
        # Without the extension nothing is cheaper than with it.
        price = fit(amount[engine][known], measured[known], found["compact"] if engine == "plain" else 0.0)
        found[engine] = price
        prices[engine] = {feature: float(f"{value:.3g}") for feature, value in zip(FEATURES, price)}
        estimated[engine] = amount[engine] @ price
        off = np.abs(estimated[engine] / measured - 1)[known]
        usual, large = np.quantile(off, [0.5, 0.9])
        print(f"{engine:8} {known.sum():3} steps: off by {usual:.0%} in the middle, {large:.0%} in one of ten")
    for row, gain in zip(rows, estimated["masked"] / estimated["compact"]):
        real = float(row["compact_over_masked"])
        if (gain < 1) != (real < 1) and not 0.97 < real < 1.03:
            print(f"wrong side: {row['model']}, batch {row['batch']}, {row['estimator']}, density {row['density']}: "
                  f"expected {gain:.2f}x, measured {real:.2f}x")  # fmt: skip
    if not args.check:
        PRICES.write_text(json.dumps({"fitted": "python -m benchmarks.prices", "seconds": prices}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
