"""Threshold layers, training steps and cohorts on one GPU, beside their rivals and the roofline.

    python -m benchmarks.gpu                 measure, the most telling cells first; under 8 minutes
    python -m benchmarks.gpu --list          what would be measured, in order; needs no GPU
    python -m benchmarks.gpu --plots         pictures of what was measured, next to the CSV; needs no GPU
    python -m benchmarks.gpu --targets       what was aimed at, and whether it was reached; needs no GPU
    python -m benchmarks.gpu --tune          measure tile sizes instead; before the rest, whose times depend on them
    python -m benchmarks.gpu --tables        tables of tiles and of ``auto``'s choices from what was measured; no GPU
    python -m benchmarks.gpu --engines FILE  the table by which a simulation takes a GPU, from the lines of a report

Rows are appended to benchmarks/results/gpu.csv as they come, with device, versions and commit; losses are rows like any
other. A run that is stopped keeps what it has. What a provider or a mode is: benchmarks/gpu/layers.py and steps.py.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import torch

from spafl_kernels.gpu import tables
from spafl_kernels.gpu.tables.choices import SHELF as CHOICES
from spafl_kernels.gpu.tables.engines import SHELF as ENGINES
from spafl_kernels.gpu.tables.tiles import SHELF as TILES

from . import choices, results, roofline, schedule, targets, tiles
from .clock import Cuda, tf32

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
NAMES = tuple(dict.fromkeys(model for part in schedule.SCHEDULE for model in part.models))


def warm_in_parallel(arguments: list[str], workers: int, seconds: float) -> None:
    """Compile the kernels in several processes, which meet again in Triton's cache on disk.

    What is not compiled after ``seconds`` is compiled when it is measured.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    running = [subprocess.Popen([*command, "--warm", f"{i}/{workers}"]) for i in range(workers)]
    deadline = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def warm(work: list[schedule.Job], part: str) -> None:
    """Run the kernels of every ``parts``-th job once."""
    number, parts = map(int, part.split("/"))
    distinct = list({job.kernels: job for job in work}.values())
    device = Cuda()
    for job in distinct[number::parts]:
        try:
            job.warm(device)
        except Exception as error:
            print(f"{job.label}: {type(error).__name__}: {error}", file=sys.stderr)


def measure(options: argparse.Namespace, work: list[schedule.Job]) -> int:
    """Compile, measure, and say how it went; the exit code."""
    began = time.monotonic()
    if options.workers > 1:
        arguments = ["--tune"] * options.tune + (["--models", *options.models] if options.models else [])
        # Tiles are many kernels, each measured for a moment.
        warm_in_parallel(arguments, options.workers, options.seconds / (2 if options.tune else 3))
        print(f"kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
    device = Cuda()
    machine = roofline.machine(device.name)
    facts = results.environment(device.name, machine.source if machine else "unknown device: no floors")
    with results.Recorder(options.out, facts) as recorder:
        left = options.seconds - (time.monotonic() - began)
        outcome = schedule.run(work, device, machine, recorder, left, say=lambda line: print(line, flush=True))
    if not options.tune:
        print(*targets.judge(results.read([options.out])), sep="\n")
    if outcome.left_out:
        print(f"no time for: {'; '.join(outcome.left_out)}")
    print(f"{outcome.rows} rows in {options.out}; {time.monotonic() - began:.0f} s; red: {len(outcome.red)}")
    return 1 if outcome.red else 0


def measured(path: pathlib.Path, parser: argparse.ArgumentParser) -> list[dict[str, str]]:
    """The rows of the CSV; exits in one line where there are none."""
    if not path.is_file():
        parser.error(f"{path} does not exist: nothing was measured yet")
    try:
        return results.read([path])
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=None, choices=NAMES, metavar="MODEL", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=420.0, help="for compiling and measuring (default 420)")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "gpu.csv", help="CSV to append to")
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    parser.add_argument("--plots", action="store_true", help="draw what was measured")
    parser.add_argument("--targets", action="store_true", help="compare what was measured with what was aimed at")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes")
    parser.add_argument(
        "--tables", action="store_true", help="write tables of tiles and choices from what was measured"
    )
    parser.add_argument(
        "--engines", type=pathlib.Path, metavar="REPORT", help="write a table of engines from a report.jsonl"
    )
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    work = schedule.jobs(schedule.TUNING if options.tune else schedule.SCHEDULE, options.models)
    if options.list:
        for job in work:
            p = job.part
            ways = "+".join("graph" if g else "eager" for g in p.graphs)
            print(f"{job.label}  {','.join(p.modes) if job.layer else 'step'}  {ways}  {p.densities}")
        return 0
    if options.plots:
        from . import plots

        rows = measured(options.out, parser)
        for path in plots.draw(rows, options.out.with_suffix("")):
            print(path)
    if options.tables:
        rows = measured(options.out, parser)
        try:
            tuned = [TILES.write(table, tables.FOLDER) for table in tiles.make(rows)]
            # A run that only measured tiles says nothing of choices.
            only_tiles = bool(tuned) and all(r["kind"] == "tile" for r in rows)
            chosen = [] if only_tiles else choices.make(rows)
        except ValueError as error:
            parser.error(f"{options.out}: {error}")
        print(*tuned, sep="\n", end="\n" if tuned else "")
        for table in chosen:
            print(CHOICES.write(table, tables.FOLDER))
            for miss in choices.misses(rows, table):
                print(f"  above 3 %: {miss}")
    if options.targets:
        print(*targets.judge(measured(options.out, parser)), sep="\n")
    if options.engines:
        from .report import speeds

        try:
            lines = [json.loads(line) for line in options.engines.read_text().splitlines()]
        except (OSError, ValueError) as error:
            parser.error(f"{options.engines}: {error}")
        table = speeds.table(lines)
        if table is None:
            parser.error(f"{options.engines} has no speeds of both the GPU and the CPU (stage speeds)")
        print(ENGINES.write(table, tables.FOLDER))
    if options.plots or options.tables or options.targets or options.engines:
        return 0
    if not torch.cuda.is_available():
        print("error: benchmarks.gpu measures a CUDA GPU and this machine has none (--list works)", file=sys.stderr)
        return 2
    # The arithmetic of the rows called tf32; products of 16-bit numbers do not change.
    with tf32(True, benchmark=True):
        if options.warm:
            warm(work, options.warm)
            return 0
        return measure(options, work)


if __name__ == "__main__":
    sys.exit(main())
