"""A short visit to a GPU: stages in processes of their own, everything written at once, a table at the end.

python -m benchmarks.gpu.report --out FOLDER                 all stages, useful after 3, 6 and 9 minutes
python -m benchmarks.gpu.report --out FOLDER --seconds 180   what fits into three minutes
python -m benchmarks.gpu.report --out FOLDER --stages values steps-conv4
python -m benchmarks.gpu.report --list                       the stages; needs no GPU
python -m benchmarks.gpu.report --out FOLDER --rehearse      on a machine without a GPU: small cases, no times
"""

from __future__ import annotations

import argparse
import faulthandler
import pathlib
import sys
import tempfile
import time

from . import prepare, runner, stages, summary
from .folder import FILES, Folder


def one_stage(name: str, folder: Folder, seconds: float, rehearsal: bool) -> int:
    """The process of a stage."""
    from .device import Visit, ready

    faulthandler.enable()
    ready(rehearsal)
    (stage,) = (s for s in stages.STAGES if s.name == name)
    visit = Visit(name, folder, seconds, rehearsal)
    stage.load()(visit, *stage.arguments)
    return runner.RED if visit.red else 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: all stages ended well; 1: one did not; 2: wrong arguments, or no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder of the report; appended to if it is there")
    parser.add_argument("--stages", nargs="+", choices=stages.NAMES, metavar="STAGE", help="only these")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all stages together (default 540)")
    parser.add_argument("--files", type=int, default=len(FILES), help=f"how many files at most, of {', '.join(FILES)}")
    parser.add_argument("--megabytes", type=float, default=15.0, help="how large each file may become (default 15)")
    parser.add_argument("--list", action="store_true", help="print the stages")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--stage", choices=stages.NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.list:
        for stage in stages.STAGES:
            print(f"{stage.seconds:5.0f} s  {stage.name:<20} {stage.about}")
        return 0
    if options.out is None:
        parser.error("--out names the folder of the report")
    try:
        folder = Folder(options.out, options.files, options.megabytes)
    except ValueError as error:
        parser.error(str(error))
    if options.stage:
        return one_stage(options.stage, folder, options.seconds, options.rehearse)
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("error: the report measures a CUDA GPU and this machine has none (--rehearse)", file=sys.stderr)
            return 2
    fits = prepare.prepare(folder)
    chosen = [
        s for s in stages.STAGES
        if (options.stages is None and not (fits and s.name == prepare.COMPILE)) or s.name in (options.stages or ())
    ]  # fmt: skip
    arguments = ["--out", str(options.out), "--files", str(options.files), "--megabytes", str(options.megabytes)]
    arguments += ["--rehearse"] * options.rehearse
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        compilations = prepare.Compilations(folder, pathlib.Path(scratch))

        def after(stage: str) -> None:
            compilations.end(stage)
            folder.summarise(summary.text(folder.rows()))

        ended = runner.run(
            folder, chosen, options.seconds, arguments, say=lambda line: print(line, flush=True),
            before=compilations.begin, after=after, patience=runner.PATIENCE if options.rehearse else 1.0,
        )  # fmt: skip
    print(summary.text(folder.rows()))
    print(f"{time.monotonic() - began:.0f} s; {options.out}")
    return 1 if any(e.state not in ("ok", "no time") for e in ended) else 0


if __name__ == "__main__":
    sys.exit(main())
