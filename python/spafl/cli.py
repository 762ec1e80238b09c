"""The ``spafl`` command."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .signals import Stopped, catching, exit_status, in_one_line

# Nothing slow is imported before main() runs: torch takes seconds, in which Ctrl-C is one line too.


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from spafl_kernels import __version__

        print(f"spafl {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spafl", description="Federated learning whose sparsity saves real time.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a configuration", description="Run a federated simulation.")
    run.add_argument("config", type=Path, help="configuration file (TOML), or with --resume a run folder")
    run.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE",
                     help="override a setting, e.g. --set training.lr=0.02 (repeatable)")  # fmt: skip
    run.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], help="same as --set simulation.device=...")
    run.add_argument("--data-root", help="folder with the data files; same as --set data.root=...")
    run.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    run.add_argument("--quiet", action="store_true", help="no progress")
    run.add_argument("--no-report", action="store_true", help="do not write the report at the end")
    run.add_argument("--callback", action="append", default=[], metavar="NAME",
                     help="csv, tensorboard, wandb or module:Class, beside those configured (repeatable)")  # fmt: skip

    _allow_code(run, "--resume: ")

    report = commands.add_parser("report", help="pictures and one HTML page of one or several runs")
    report.add_argument("runs", type=Path, nargs="+", help="run folders; several are compared")
    report.add_argument("--out", type=Path, help="folder of the report (default: RUN/report)")
    report.add_argument(
        "--accuracy",
        metavar="A,...",
        help="accuracies whose price is told, as fractions: .85,.9 (default: some reached)",
    )
    report.add_argument("--csv", action="store_true", help="tables of rounds, clients and confusions too")
    report.add_argument("--latex", action="store_true", help="the comparison as a LaTeX table too")
    report.add_argument("--pdf", action="store_true", help="the pictures, and all of them in one file, as PDF too")

    export = commands.add_parser("export", help="a client's model as a small dense one")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--client", type=int, required=True, help="number of the client, from 0")
    export.add_argument("--onnx", action="store_true", help="write an ONNX file too, checked in onnxruntime")
    export.add_argument("--normalise", action="store_true",
                        help="take samples as stored (bytes of images) and normalise them in the graph")  # fmt: skip
    export.add_argument("--opset", type=int, help="version of ONNX's operators")
    export.add_argument("--out", type=Path, help="folder (default: RUN/export)")
    _allow_code(export)

    predict = commands.add_parser("predict", help="what an exported model says of images")
    predict.add_argument("model", type=Path, help="file that export wrote: .onnx, or .pt2 with --allow-code")
    predict.add_argument("images", type=Path, nargs="+", help="images, folders of images, .npy arrays of samples")
    predict.add_argument("--top", type=int, default=1, help="so many classes of each (default: 1)")
    predict.add_argument("--resize", action="store_true", help="scale images of another size")
    predict.add_argument("--csv", type=Path, help="write a table to this file instead of lines to the terminal")
    predict.add_argument("--allow-code", action="store_true", help="load a .pt2, which PyTorch reads with pickle")

    for name, does in (
        ("table", "make an experiment's missing runs and its table"),
        ("sweep", "the same over settings"),
    ):
        command = commands.add_parser(name, help=does)
        command.add_argument("experiments", type=Path, nargs="+", help="experiment files (TOML)")
        command.add_argument("--seeds", default="1", help="such as 1..5 or 1,4,9 (default: 1)")
        command.add_argument("--methods", help="only these rows, separated by commas")
        command.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE",
                             help="override a setting of all runs (repeatable)")  # fmt: skip
        command.add_argument("--runs", type=Path, default=Path("runs/tables"), help="where the run folders are")
        command.add_argument("--out", type=Path, help="where the tables go (default: as --runs)")
        command.add_argument("--jobs", type=int, help="runs at a time (default: one for each core)")
        command.add_argument("--no-run", action="store_true", help="only the table of the runs that are there")
        if name == "sweep":
            command.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE,VALUE",
                                 help="values of a setting (repeatable: all combinations)")  # fmt: skip
    return parser


def _allow_code(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument("--allow-code", action="store_true",
                        help=f"{when}import the modules that the run's configuration names")  # fmt: skip
    parser.add_argument("--allow-module", action="append", default=[], metavar="MODULE",
                        help=f"{when}import this module if the run's configuration names it (repeatable)")  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    from .config import load_config, resolve_config
    from .errors import UserError
    from .plugins import Code
    from .report import comparison_table, write_report
    from .simulation import run

    assignments = list(args.assignments)
    if args.device:
        assignments.append(f"simulation.device={args.device}")
    if args.data_root:
        assignments.append(f"data.root={args.data_root}")
    # A configuration to begin with is the user's own; what is resumed may come from a run folder of somebody else.
    code = Code(args.allow_code, frozenset(args.allow_module)) if args.resume else None
    source, out = args.config, args.out
    if args.resume and source.is_dir():  # a run folder holds its configuration
        if out is not None and out.resolve() != source.resolve():
            raise UserError(f"--out {out}: a run is continued in its own folder, {source}")
        source, out = source / "config.toml", source
        if not source.exists():
            raise UserError(f"run folder {out} holds no run to resume")
    config = load_config(source, assignments, code, stored=source is not args.config)
    there = [callback.name for callback in config.callbacks]
    if added := [name for name in args.callback if name not in there]:
        raw = config.model_dump()
        config = resolve_config({**raw, "callbacks": [*raw["callbacks"], *added]})
    out = out or Path("runs") / config.name
    run(config, out, resume=args.resume, quiet=args.quiet)
    print(comparison_table([out]))
    if not args.no_report:
        print(f"report: {write_report([out])}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .errors import UserError
    from .report import comparison_table, write_report

    accuracies = None
    if args.accuracy is not None:
        try:
            accuracies = [float(value) for value in args.accuracy.split(",")]
        except ValueError:
            raise UserError(f"--accuracy must be numbers between commas, as .85,.9; got {args.accuracy!r}") from None
    print(comparison_table(args.runs))
    print(f"report: {write_report(args.runs, args.out, accuracies)}")
    if args.csv or args.latex or args.pdf:
        from .report.formats import write_csv_tables, write_latex, write_pdf

        files = write_csv_tables(args.runs, args.out) if args.csv else []
        files += [write_latex(args.runs, args.out)] if args.latex else []
        files += write_pdf(args.runs, args.out)[:1] if args.pdf else []
        for file in files:
            print(file)
    return 0


def _export(args: argparse.Namespace) -> int:
    from .export import export_client
    from .plugins import Code

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporters warn of their own internals
        code = Code(args.allow_code, frozenset(args.allow_module))
        out = args.out or args.run / "export"
        done = export_client(args.run, args.client, out, args.onnx, code, args.normalise, args.opset)
    (weights, small_weights), (macs, small_macs) = done.parameters, done.macs
    print(f"parameters {weights:,} -> {small_weights:,}; multiply-accumulates per sample {macs:,} -> {small_macs:,}")
    print(f"largest difference from the client's model: {done.difference:.1e} of the largest output")
    for file in done.files:
        print(file)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from .csv_files import write_csv
    from .predict import Model, as_rows, as_text, predict

    found = predict(Model(args.model, args.allow_code), args.images, args.top, args.resize)
    if args.csv is None:
        print(as_text(found))
    else:
        write_csv(args.csv, as_rows(found))
        print(args.csv)
    return 0


def _table(args: argparse.Namespace) -> int:
    from .errors import UserError
    from .experiment import load_experiment, parse_seeds
    from .sweep import parse_values, swept
    from .table import make_table

    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be 1 or more; got {args.jobs}")
    seeds = parse_seeds(args.seeds)
    experiments = [load_experiment(path, args.assignments) for path in args.experiments]
    if args.methods:
        experiments = [experiment.only(args.methods.split(",")) for experiment in experiments]
    if args.command == "sweep":
        varied = parse_values(args.vary)
        experiments = [swept(experiment, varied or experiment.sweep) for experiment in experiments]
    for experiment in experiments:
        print(make_table(experiment, seeds, args.runs, args.out or args.runs, args.jobs, not args.no_run))
    return 0


COMMANDS = {"run": _run, "report": _report, "export": _export, "predict": _predict, "table": _table, "sweep": _table}


def _status_of(error: Exception) -> int | None:
    """Exit status of an error that one line explains; None: of any other."""
    from .errors import UserError, WriteError
    from .merge import TooFewUploads
    from .report import ReportError
    from .simulation.pool import WorkerDied

    if isinstance(error, OSError | WriteError):
        return 3
    if isinstance(error, WorkerDied):
        return 1
    return 2 if isinstance(error, UserError | ReportError | FloatingPointError | TooFewUploads) else None


@contextlib.contextmanager
def _pictures_are_files() -> Iterator[None]:
    """Keep matplotlib from a notebook's backend in the environment: where it is not installed, the import fails."""
    before = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MPLBACKEND"] = before


def one_line(command: Callable[[], int], own_process: bool = False) -> int:
    """Run a command whose errors and stops are one line each; returns its exit status.

    Args:
        own_process: the process ends afterwards, so that signals need not be left as they were.

    0 done, 1 broken machine, 2 a mistake the user can mend, 3 a file that cannot be read or written, 128 + the
    number of the signal that stopped it.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    try:
        with catching(second_exits=True, to_the_end=own_process), _pictures_are_files():
            return command()
    except (KeyboardInterrupt, Stopped) as stop:
        with contextlib.suppress(OSError):  # the terminal is gone
            print(f"spafl: {in_one_line(stop)}", file=sys.stderr)
        return exit_status(stop)
    except Exception as error:
        status = _status_of(error)
        if status is None:
            raise
        print(f"spafl: error: {in_one_line(error)}", file=sys.stderr)
        return status


def main(arguments: Sequence[str] | None = None, own_process: bool = False) -> int:
    """Entry of the console command; see :func:`one_line`."""
    args = _parser().parse_args(arguments)
    return one_line(lambda: COMMANDS[args.command](args), own_process)


if __name__ == "__main__":
    sys.exit(main(own_process=True))
