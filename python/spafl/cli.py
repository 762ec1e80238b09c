"""The ``spafl`` command."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from spafl_kernels import __version__

from .errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spafl", description="Federated learning whose sparsity saves real time.")
    parser.add_argument("--version", action="version", version=f"spafl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a configuration", description="Run a federated simulation.")
    run.add_argument("config", type=Path, help="configuration file (TOML)")
    run.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE",
                     help="override a setting, e.g. --set training.lr=0.02 (repeatable)")  # fmt: skip
    run.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], help="same as --set simulation.device=...")
    run.add_argument("--data-root", help="folder with the data files; same as --set data.root=...")
    run.add_argument("--resume", action="store_true", help="continue the run in the folder from its last checkpoint")
    run.add_argument("--quiet", action="store_true", help="no progress line")
    run.add_argument("--no-report", action="store_true", help="do not write the report at the end")

    report = commands.add_parser("report", help="pictures and one HTML page of one or several runs")
    report.add_argument("runs", type=Path, nargs="+", help="run folders; several are compared")
    report.add_argument("--out", type=Path, help="folder of the report (default: RUN/report)")

    export = commands.add_parser("export", help="a client's model as a small dense one")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--client", type=int, required=True, help="number of the client, from 0")
    export.add_argument("--onnx", action="store_true", help="write an ONNX file too, checked in onnxruntime")
    export.add_argument("--out", type=Path, help="folder (default: RUN/export)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from .config import load_config
    from .report import comparison_table, write_report
    from .simulation import run

    assignments = list(args.assignments)
    if args.device:
        assignments.append(f"simulation.device={args.device}")
    if args.data_root:
        assignments.append(f"data.root={args.data_root}")
    config = load_config(args.config, assignments)
    out = args.out or Path("runs") / config.name
    run(config, out, resume=args.resume, quiet=args.quiet)
    print(comparison_table([out]))
    if not args.no_report:
        print(f"report: {write_report([out])}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import comparison_table, write_report

    print(comparison_table(args.runs))
    print(f"report: {write_report(args.runs, args.out)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from .export import export_client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporters warn of their own internals
        done = export_client(args.run, args.client, args.out or args.run / "export", args.onnx)
    (weights, small_weights), (macs, small_macs) = done.parameters, done.macs
    print(f"parameters {weights:,} -> {small_weights:,}; multiply-accumulates per sample {macs:,} -> {small_macs:,}")
    print(f"largest difference from the client's model: {done.difference:.1e} of the largest output")
    for file in done.files:
        print(file)
    return 0


COMMANDS = {"run": _run, "report": _report, "export": _export}


def _on_one_line(error: Exception) -> str:
    """An error's text; what it quotes of files and paths may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the console command; exit status 0 done, 1 broken machine, 2 a mistake the user can mend."""
    args = _parser().parse_args(arguments)
    from .merge import TooFewUploads
    from .report import ReportError
    from .simulation.pool import WorkerDied

    try:
        return COMMANDS[args.command](args)
    except (UserError, ReportError, FloatingPointError, TooFewUploads) as error:
        print(f"spafl: error: {_on_one_line(error)}", file=sys.stderr)
        return 2
    except WorkerDied as error:
        print(f"spafl: error: {_on_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spafl: interrupted; continue with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
