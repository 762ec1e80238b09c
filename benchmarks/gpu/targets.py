"""What was aimed at on an H200, and what the rows say of it: met, missed, or not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from .results import latest

Rows = list[dict[str, str]]
DTYPES = ("bf16", "tf32")
SHARE_OF_CEILING = 0.75
SPEEDUPS = {0.5: 1.8, 0.25: 3.0}  # over dense channels last, where the ceiling allows it
OVER_EAGER_LOOP, OVER_GRAPH_LOOP = 30.0, 3.0
STEP_MODELS = ("conv4", "resnet18-full")  # whose captured compact steps at batch 128 are judged


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One target: what it asks for, how many cells were measured, and those that miss it, in words."""

    target: str
    measured: int
    missed: tuple[str, ...]

    def __str__(self) -> str:
        if not self.measured:
            return f"not measured  {self.target}"
        if not self.missed:
            return f"met           {self.target} ({self.measured} of {self.measured})"
        met = self.measured - len(self.missed)
        return f"missed        {self.target} ({met} of {self.measured}): {'; '.join(self.missed)}"


def _judge(target: str, cells: Iterable[tuple[str, float, float]]) -> Verdict:
    """``cells``: name, what was measured, what is asked for at least."""
    found = list(cells)
    missed = tuple(f"{name} {got:.2f} < {least:.2f}" for name, got, least in found if got < least)
    return Verdict(target, len(found), missed)


def _layers(rows: Rows, dtype: str) -> Iterable[tuple[str, float, float, float]]:
    """Name, density, speed-up over dense and ceiling of whole layers at batch 128 in a graph, below density 1."""
    for r in rows:
        wanted = {"kind": "layer", "dtype": dtype, "batch": "128", "graph": "1", "mode": "whole", "provider": "ours"}
        if all(r[k] == v for k, v in wanted.items()) and r["speedup_vs_dense"] and r["ceiling"]:
            density = float(r["density"])
            if density < 1.0:
                name = f"{r['model']}.{r['layer']} at {density:g}"
                yield name, density, float(r["speedup_vs_dense"]), float(r["ceiling"])


def _cohorts(rows: Rows, loop_graph: str) -> Iterable[tuple[str, float]]:
    """Name, and how many times the loop (eager or in a graph) takes as long as the best cohort step in a graph."""
    times: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for r in rows:
        if r["kind"] == "cohort" and r["us"] and r["clients"] == "10" and not r["gate"].startswith("fail"):
            times.setdefault((r["model"], r["density"]), {})[r["provider"], r["graph"]] = float(r["us"])
    for (model, density), us in times.items():
        ours = [t for (provider, graph), t in us.items() if provider.startswith(("cohort", "compact")) and graph == "1"]
        loop = us.get(("loop", loop_graph))
        if ours and loop:
            yield f"{model} at {float(density):g}", loop / min(ours)


def _steps(rows: Rows) -> Iterable[tuple[str, float, float]]:
    """Name, density and speed-up over captured dense of captured compact steps at batch 128, below density 1."""
    wanted = {"kind": "step", "batch": "128", "graph": "1", "provider": "compact-fixed"}
    for r in rows:
        density = float(r["density"])
        judged = r["model"] in STEP_MODELS and all(r[k] == v for k, v in wanted.items()) and density < 1.0
        if judged and r["speedup_vs_dense"]:
            yield f"{r['model']} at {density:g}", density, float(r["speedup_vs_dense"])


def judge(rows: Iterable[dict[str, str]]) -> list[Verdict]:
    """Every target against the newest row of every cell."""
    found = latest(rows)
    verdicts = []
    for dtype in DTYPES:
        cells = list(_layers(found, dtype))
        verdicts.append(
            _judge(
                f"layers reach {SHARE_OF_CEILING:.0%} of the roofline ceiling, {dtype}, batch 128",
                ((name, speed, SHARE_OF_CEILING * ceiling) for name, _, speed, ceiling in cells),
            )
        )
        verdicts += [
            _judge(
                f"layers are {least:g} times as fast as dense at density {at:g}, {dtype}, batch 128",
                ((name, s, least) for name, density, s, ceiling in cells if density == at and ceiling >= least),
            )
            for at, least in SPEEDUPS.items()
        ]
    verdicts += [
        _judge(
            f"captured compact steps are {least:g} times as fast as captured dense at density {at:g}, batch 128",
            ((name, speed, least) for name, density, speed in _steps(found) if density == at),
        )
        for at, least in SPEEDUPS.items()
    ]
    for words, graph, least in (("eager", "0", OVER_EAGER_LOOP), ("in a graph", "1", OVER_GRAPH_LOOP)):
        verdicts.append(
            _judge(
                f"a cohort's step is {least:g} times as fast as the masked loop, {words}",
                ((name, ratio, least) for name, ratio in _cohorts(found, graph)),
            )
        )
    return verdicts
