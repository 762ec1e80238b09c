"""The table of an experiment: methods by row, figures over seeds, as Markdown, CSV and LaTeX, and its picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats  # scikit-learn needs it too

from .algorithms import find_algorithm
from .budgets import EVERYBODY
from .equal_work import difference_at_equal_work
from .errors import UserError
from .experiment import Experiment, Job, carry_out, jobs_of
from .latex import escaped, tabular
from .report.figures.pareto import accuracy_against_costs
from .report.run_data import Point, Run, load_run
from .simulation.files import write_together

Figure = Callable[[Run], float | None]
CONFIDENCE = 0.95


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def best_point(run: Run) -> Point:
    """The evaluated round of the highest mean accuracy, the first of equals: the headline figure of the paper."""
    return max((p for p in run.points if p.accuracy is not None), key=lambda p: p.accuracy or 0.0)


@dataclass(frozen=True)
class Column:
    """A figure of a run; ``digits`` after the point where it is printed."""

    key: str
    title: str
    of: Figure
    digits: int


COLUMNS = (
    Column("accuracy", "accuracy %", lambda r: _percent(r.last.accuracy), 1),
    Column("accuracy_std_clients", "std over clients", lambda r: _percent(r.last.accuracy_std), 1),
    Column("accuracy_worst_10pct", "worst 10 %", lambda r: _percent(r.last.accuracy_worst), 1),
    Column("best_accuracy", "best round %", lambda r: _percent(best_point(r).accuracy), 1),
    Column("best_round", "its number", lambda r: best_point(r).round + 1, 0),
    Column("density_layers", "density by layer", lambda r: r.last.density, 3),
    Column("density_parameters", "by parameters", lambda r: r.last.density_parameters, 3),
    Column("formula_gbit", "Gbit by formula", lambda r: _scaled(r.last.cost.paper_bits, 1e9), 3),
    Column("payload_mb", "payload MB", lambda r: _scaled(r.last.cost.payload_bytes, 1e6), 2),
    Column("formula_gmacs", "GMACs by formula", lambda r: _scaled(r.last.cost.paper_macs, 1e9), 1),
    Column("executed_gmacs", "GMACs executed", lambda r: _scaled(r.last.cost.executed_macs, 1e9), 1),
    Column("train_seconds", "seconds of training", lambda r: r.last.cost.train_seconds, 1),
)
NOT_SECONDS = "†"


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        values: of every column, ``{seed: figure}`` of the runs that are complete.
        difference: of the accuracy to the reference's with the same seed: mean and half the width of its confidence
            interval, both in points; the second is None with fewer than two seeds. None for the reference itself.
        at_equal_work: the difference of every seed, in points, where both runs had executed as many MACs.
        faults: why runs are missing, by seed.
        budgets: what was spent of every budget, by seed.
    """

    label: str
    note: str
    not_seconds: bool
    published: str
    values: dict[str, dict[int, float]]
    difference: tuple[float, float | None] | None
    at_equal_work: dict[int, float]
    faults: dict[int, str]
    budgets: dict[tuple[str, str, float], dict[int, float]]


def paired_difference(own: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float | None] | None:
    """Mean of ``own - other`` over the seeds of both, and half the width of its confidence interval (Student's t)."""
    return with_interval([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])


def with_interval(numbers: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean, and half the width of its confidence interval, None for one number; None for no number."""
    if not numbers:
        return None
    return float(np.mean(numbers)), None if len(numbers) < 2 else half_width(numbers)


def half_width(numbers: Sequence[float] | np.ndarray) -> float:
    """Half the width of the confidence interval of the numbers' mean (Student's t); at least two are needed."""
    spread = np.std(numbers, ddof=1) / math.sqrt(len(numbers))
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(numbers) - 1) * spread)


def runs_of(jobs: Sequence[Job]) -> dict[str, dict[int, Run]]:
    """The runs that are complete, by label and seed, each called by its label, settings of a sweep without their
    sections; every label is there."""
    runs: dict[str, dict[int, Run]] = {job.row.label: {} for job in jobs}
    for job in jobs:
        if job.state == "done":
            # The configuration as resolved today: runs of one row are alike, whenever they were made.
            run = replace(load_run(job.folder), name=brief(job.row.label), config=job.config.to_toml())
            runs[job.row.label][job.seed] = run
    return runs


def brief(label: str) -> str:
    """A row's name for a picture: the settings of a sweep without their sections, unless two would be called alike."""
    parts = [part.partition("=") for part in label.split(" ")]
    short = [f"{key.rpartition('.')[2]}{equals}{value}" if equals else key for key, equals, value in parts]
    clear = len({part.partition("=")[0] for part in short}) == len(short)
    return " ".join(short) if clear else label


def lines_of(
    experiment: Experiment, runs: Mapping[str, Mapping[int, Run]], missing: Sequence[tuple[Job, str]]
) -> list[Line]:
    """The rows of the table from the runs that are complete, and the others with what they lack."""
    faults: dict[str, dict[int, str]] = {row.label: {} for row in experiment.rows}
    for job, fault in missing:
        faults[job.row.label][job.seed] = fault
    values = {
        label: {
            column.key: {seed: found for seed, run in by_seed.items() if (found := column.of(run)) is not None}
            for column in COLUMNS
        }
        for label, by_seed in runs.items()
    }
    reference = values.get(experiment.reference, {}).get("accuracy", {})
    reference_runs = runs.get(experiment.reference, {})
    budgets: dict[str, dict[tuple[str, str, float], dict[int, float]]] = {row.label: {} for row in experiment.rows}
    for label, by_seed in runs.items():
        for seed, run in by_seed.items():
            for met in run.budgets:
                if met.reached is not None:
                    budgets[label].setdefault((met.name, met.kind, met.budget), {})[seed] = met.reached
    lines = []
    for row in experiment.rows:
        own = values[row.label]["accuracy"]
        difference = None if row.label == experiment.reference else paired_difference(own, reference)
        at_equal_work = {} if row.label == experiment.reference else _at_equal_work(runs[row.label], reference_runs)
        lines.append(
            Line(
                row.label, row.note, not find_algorithm(row.tables["algorithm"]["name"]).macs_are_seconds,
                experiment.published.get(row.label, ""), values[row.label], difference, at_equal_work,
                faults[row.label], budgets[row.label],
            )
        )  # fmt: skip
    return lines


def _at_equal_work(own: Mapping[int, Run], other: Mapping[int, Run]) -> dict[int, float]:
    """In points, by seed; without the seeds that have no such difference."""
    found = {seed: difference_at_equal_work(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())}
    return {seed: 100 * value for seed, value in found.items() if value is not None}


# -- as text


def over_seeds(values: Mapping[int, float], digits: int, sign: str = "") -> str:
    """``mean ± standard deviation`` over seeds; the mean alone of one. ``sign="+"``: the mean always has one."""
    if not values:
        return "-"
    numbers = np.array(list(values.values()), dtype=np.float64)
    mean = f"{numbers.mean():{sign},.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {numbers.std(ddof=1):,.{digits}f}"


def in_points(found: tuple[float, float | None] | None) -> str:
    """A difference, with its interval where there is one."""
    if found is None:
        return "-"
    mean, half = found
    return f"{mean:+.1f}" if half is None else f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def header(experiment: Experiment) -> list[str]:
    """Titles of the columns."""
    own = [f"difference to {experiment.reference}", "at equal work", *(["published"] if experiment.published else [])]
    return ["method", *(column.title for column in COLUMNS), *own]


def cells(experiment: Experiment, line: Line) -> list[str]:
    """A row as text."""
    figures = [over_seeds(line.values[column.key], column.digits) for column in COLUMNS]
    at = [column.key for column in COLUMNS].index("formula_gmacs")
    if line.not_seconds and figures[at] != "-":
        figures[at] += f" {NOT_SECONDS}"
    differences = [in_points(line.difference), in_points(with_interval(list(line.at_equal_work.values())))]
    return [line.label, *figures, *differences, *([line.published or "-"] if experiment.published else [])]


def notes_of(lines: Sequence[Line], seeds: Sequence[int], note: str = "") -> list[str]:
    """What a reader has to know beside the table; ``note`` is that of the experiment."""
    notes = [
        f"Seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds, of the last evaluated round. "
        "Accuracy is the unweighted mean over clients, each tested on its own data. Differences are paired by seed, in "
        f"points, with their {CONFIDENCE:.0%} confidence interval; at equal work: at all the MACs of the run that "
        "executed fewer of the two, interpolated between evaluated rounds."
    ]
    if any(line.not_seconds for line in lines):
        notes.append(f"{NOT_SECONDS} counted by formula only: what runs is dense, so these MACs are not seconds.")
    for line in lines:
        for (name, kind, budget), reached in line.budgets.items():
            of = "" if name == EVERYBODY else f" of {name}"
            notes.append(
                f"{line.label}: the budget{of} is {kind} {budget:g}; in the last tenth of the rounds "
                f"{over_seeds(reached, 3)} was spent."
            )
    notes += [note] * bool(note) + [f"{line.label}: {line.note}" for line in lines if line.note]
    notes += [f"{line.label}, seed {seed}: {fault}" for line in lines for seed, fault in line.faults.items()]
    return notes


def markdown(experiment: Experiment, lines: Sequence[Line], seeds: Sequence[int]) -> str:
    """Title, table and notes."""
    rows = [header(experiment), *(cells(experiment, line) for line in lines)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in escaped) for i in range(len(escaped[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in escaped]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(
        [f"# {experiment.title}", "", *text, "", *(f"* {n}" for n in notes_of(lines, seeds, experiment.note)), ""]
    )


def latex(experiment: Experiment, lines: Sequence[Line], seeds: Sequence[int]) -> str:
    """A ``tabular`` with rules of the booktabs package, notes as comments."""
    columns = "l" + "r" * (len(header(experiment)) - 1)
    head = " & ".join(map(escaped, header(experiment))) + r" \\"
    notes = [experiment.title, *notes_of(lines, seeds, experiment.note)]
    return tabular(columns, [head], [cells(experiment, line) for line in lines], notes)


def raw_csv(lines: Sequence[Line]) -> str:
    """One line for each run, with all digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seed", *(column.key for column in COLUMNS), "difference_at_equal_work"])
    for line in lines:
        for seed in sorted(line.values["accuracy"]):
            figures = (line.values[c.key].get(seed, "") for c in COLUMNS)
            writer.writerow([line.label, seed, *figures, line.at_equal_work.get(seed, "")])
    return out.getvalue()


def picture(runs: Mapping[str, Mapping[int, Run]]) -> bytes:
    """Accuracy against bytes, MACs and seconds, as PNG."""
    out = io.BytesIO()
    accuracy_against_costs([run for by_seed in runs.values() for run in by_seed.values()]).savefig(out, dpi=110)
    return out.getvalue()


def make_table(
    experiment: Experiment, seeds: Sequence[int], runs: Path, out: Path, parallel: int | None = None, run: bool = True
) -> str:
    """Make the runs that are missing, write ``NAME.md``, ``NAME.csv``, ``NAME.tex`` and ``NAME.png``, accuracy against
    what it cost, into ``out``; returns the first.

    Args:
        run: False makes the table of what is there; without a complete run that of the published figures, if the
            experiment has any, with no picture.

    Raises:
        UserError: a run folder holds another run, or there is no complete run.
    """
    jobs = jobs_of(experiment, seeds, runs)
    failed = carry_out(jobs, parallel) if run else {}
    made = runs_of(jobs)
    missing = [(j, failed.get(j.folder, "not made yet")) for j in jobs if j.seed not in made[j.row.label]]
    lines = lines_of(experiment, made, missing)
    there = any(line.values["accuracy"] for line in lines)
    if not there and (run or not experiment.published):
        reasons = [fault for line in lines for fault in line.faults.values()]
        raise UserError(f"{experiment.name}: no run is complete; the first says: {reasons[0]}")
    if not there:
        lines = [line for line in lines if line.published]
    text = markdown(experiment, lines, seeds)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str | bytes] = {
        "md": text, "csv": raw_csv(lines), "tex": latex(experiment, lines, seeds)
    }  # fmt: skip
    if there:
        files["png"] = picture(made)
    write_together({out / f"{experiment.name}.{ending}": content for ending, content in files.items()})
    return text
