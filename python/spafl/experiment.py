"""Experiments: many runs from one file, a method and a seed each, of which only the missing ones are made.

A file holds ``title``, the settings of all runs under ``[run]``, and under ``[methods.NAME]`` what a method lays over
them (``note`` is a remark for the table). ``reference`` names the method that the others are compared with;
``[published]`` gives figures of a paper by method; ``[sweep]`` lists values by dotted key, see :mod:`spafl.sweep`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import RunConfig, deep_merge, load_config, parse_assignment, read_toml, resolve_config
from .errors import UserError
from .simulation.files import write_atomic
from .simulation.same_run import first_difference

# `python -m spafl` that saves its state and ends when this process is gone, even killed.
_SPAFL = (
    "import sys; from spafl.signals import stop_with_input; stop_with_input(); "
    "from spafl.__main__ import main; sys.exit(main())"
)
_KEYS = {"title", "note", "reference", "run", "methods", "published", "sweep"}


@dataclass(frozen=True)
class Row:
    """A method of an experiment: a row of its table."""

    label: str
    tables: dict[str, Any]
    """Nested settings, complete but for the seed."""
    note: str = ""

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.label)


@dataclass(frozen=True)
class Experiment:
    """What a file asks for.

    Attributes:
        name: of the file, without its ending.
        reference: label of the row that differences are taken from.
        published: figures of the paper by label, as text.
        sweep: values by dotted key.
        note: what a reader of the whole table has to know.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    reference: str
    published: Mapping[str, str]
    sweep: Mapping[str, Sequence[Any]]
    note: str = ""

    def only(self, labels: Iterable[str]) -> Experiment:
        """The experiment with these rows alone, in the order of the file.

        Where the reference is not among them, it is the first row of SpaFL that is, or else the first.

        Raises:
            UserError: no such method.
        """
        wanted = list(labels)
        known = [row.label for row in self.rows]
        for label in wanted:
            if label not in known:
                raise UserError(f"--methods: {self.name} has no method {label!r}; it has {', '.join(known)}")
        rows = tuple(row for row in self.rows if row.label in wanted)
        spafl = [row.label for row in rows if row.tables["algorithm"]["name"] == "spafl"]
        kept = [row.label for row in rows]
        reference = self.reference if self.reference in kept else [*spafl, *kept, self.reference][0]
        return replace(self, rows=rows, reference=reference)


def load_experiment(path: Path, assignments: Iterable[str] = ()) -> Experiment:
    """Read an experiment and check the settings of every run in it.

    Args:
        assignments: ``section.key=value``, laid over the settings of every run.

    Raises:
        UserError: the file cannot be read, has an unknown or missing key, or a method whose settings are wrong.
    """
    raw = read_toml(path)
    unknown = sorted(raw.keys() - _KEYS)
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]}; known: {', '.join(sorted(_KEYS))}")
    for key in ("run", "methods"):
        if not isinstance(raw.get(key), Mapping) or not raw[key]:
            raise UserError(f"{path}: an experiment needs a table [{key}] that is not empty")
    rows = []
    for label, settings in raw["methods"].items():
        if not isinstance(settings, Mapping):
            raise UserError(f"{path}: methods.{label} must be a table of settings; got {settings!r}")
        tables = deep_merge(raw["run"], {key: value for key, value in settings.items() if key != "note"})
        for assignment in assignments:
            tables = deep_merge(tables, parse_assignment(assignment))
        row = Row(label, tables, str(settings.get("note", "")))
        config_of(row, 1, f"{path}: methods.{label}")
        rows.append(row)
    reference = raw.get("reference", rows[0].label)
    if reference not in raw["methods"]:
        raise UserError(
            f"{path}: reference must name one of the methods {', '.join(raw['methods'])}; got {reference!r}"
        )
    return Experiment(
        path.stem, str(raw.get("title", path.stem)), tuple(rows), reference,
        {label: str(figure) for label, figure in raw.get("published", {}).items()}, raw.get("sweep", {}),
        str(raw.get("note", "")),
    )  # fmt: skip


def config_of(row: Row, seed: int, where: str = "") -> RunConfig:
    """The configuration of a row's run with a seed: one worker, so that runs can be made side by side."""
    own = {"seed": seed, "name": f"{row.label} seed {seed}"}
    tables = deep_merge({"simulation": {"workers": 1}}, row.tables)
    try:
        return resolve_config(deep_merge(tables, own))
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def parse_seeds(text: str) -> list[int]:
    """``1..5``, ``1,4,9`` or a mixture, as a list without repeats.

    Raises:
        UserError: not that.
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dots, last = part.partition("..")
            seeds += range(int(first), int(last) + 1) if dots else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds takes whole numbers such as 1..5 or 1,4,9; got {text!r}")
    return list(dict.fromkeys(seeds))


@dataclass(frozen=True)
class Job:
    """A run of an experiment."""

    row: Row
    seed: int
    config: RunConfig
    folder: Path

    @property
    def state(self) -> str:
        """``done``, ``cut off`` or ``missing``.

        Raises:
            UserError: the folder holds another run.
        """
        if not (self.folder / "config.toml").exists():
            return "missing"
        stored = load_config(self.folder / "config.toml", stored=True)
        difference = first_difference(stored, self.config)
        if difference is None and stored.rounds > self.config.rounds:
            difference = f"rounds is {stored.rounds} there and {self.config.rounds} here"
        if difference:
            raise UserError(f"run folder {self.folder} holds a run of another configuration: {difference}; set --runs")
        ended = (self.folder / "summary.json").exists() and stored.rounds == self.config.rounds
        return "done" if ended else "cut off"


def jobs_of(experiment: Experiment, seeds: Sequence[int], runs: Path) -> list[Job]:
    """All runs of an experiment, seed by seed, so that a table of few seeds is there first.

    Args:
        runs: holds a folder for each experiment.
    """
    return [
        Job(row, seed, config_of(row, seed), runs / experiment.name / row.folder / f"seed-{seed}")
        for seed in seeds for row in experiment.rows
    ]  # fmt: skip


def carry_out(jobs: Sequence[Job], parallel: int | None = None) -> dict[Path, str]:
    """Make the runs that are missing and go on with those that were cut off.

    A run is a process with one worker and one thread: with as many at a time as there are cores all of them are busy
    from beginning to end, which workers of one run are not, that wait for each other at the end of each round.

    Args:
        parallel: runs at a time; one for each core by default.

    Returns:
        Why runs failed (diverged, say), by folder; the others were made all the same.

    Raises:
        UserError: a folder holds another run.
    """
    states = {job.folder: job.state for job in jobs}
    waiting = [job for job in jobs if states[job.folder] != "done"]
    failed: dict[Path, str] = {}
    if not waiting:
        return failed
    lanes = parallel or len(os.sched_getaffinity(0))
    print(f"spafl: {len(jobs) - len(waiting)} of {len(jobs)} runs are there; {lanes} at a time", file=sys.stderr)
    running: set[subprocess.Popen[str]] = set()

    def make(job: Job) -> tuple[Job, str, float]:
        start = time.perf_counter()
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        asked = job.folder.with_suffix(".toml")
        write_atomic(asked, job.config.to_toml())
        command = [sys.executable, "-c", _SPAFL, "run", str(asked), "--out", str(job.folder), "--quiet", "--no-report"]
        command += ["--resume"] if states[job.folder] == "cut off" else []
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(
            command, stdin=pipe, stdout=nothing, stderr=pipe, text=True, env=os.environ | one_thread
        ) as process:
            running.add(process)
            said = process.stderr.read() if process.stderr is not None else ""
        running.discard(process)
        lines = [line for line in said.splitlines() if line.strip()]
        return job, "" if process.returncode == 0 else (lines or ["it gave no reason"])[-1], time.perf_counter() - start

    pool = ThreadPoolExecutor(lanes)
    try:
        for at, (job, fault, seconds) in enumerate(_as_made(pool, make, waiting), 1):
            how = f"failed: {fault}" if fault else f"done in {seconds:.0f} s"
            print(f"spafl: [{at}/{len(waiting)}] {job.row.label}, seed {job.seed}: {how}", file=sys.stderr)
            if fault:
                failed[job.folder] = fault
    except BaseException:
        # Each run saves checkpoints and ends with the next signal; what it has made is gone on with next time.
        for process in list(running):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    return failed


def _as_made(pool: ThreadPoolExecutor, make: Any, jobs: Sequence[Job]) -> Iterator[tuple[Job, str, float]]:
    futures = [pool.submit(make, job) for job in jobs]
    for future in as_completed(futures):
        yield future.result()
