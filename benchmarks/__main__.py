"""The benchmarks by name, and all that need no GPU in one go.

    python -m benchmarks                list them
    python -m benchmarks all            run those for a CPU, one after the other; results and README are rewritten
    python -m benchmarks all --quick    a smoke run: nothing is kept

Each is a program of its own, ``python -m benchmarks.NAME --help``.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In the order in which they run; each in a process of its own, as it would alone.
CPU = (
    "training_step", "rebuild", "estimators", "memory", "inference", "federated", "workers", "simulator", "native_cpu",
    "encodings", "layer", "scale", "checkpoint", "leakage", "client", "zoo", "rivals", "generalisation",
)  # fmt: skip
# What the others need that is not here.
NEEDS = {
    "gpu": "a GPU",
    "side_by_side": "a checkout of the authors' code",
    "flower": "Flower's environment",
    "against": "another commit",
}


def summary(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing it."""
    path = HERE / name / "__main__.py" if (HERE / name).is_dir() else HERE / f"{name}.py"
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return doc.split("\n")[0]


def run(name: str, *arguments: str) -> int:
    """The exit status of a benchmark in a process of its own."""
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=HERE.parent).returncode


def run_all(quick: bool, run: Callable[..., int] = run) -> int:
    """Run the CPU benchmarks, then redraw what is made from their results; 1 if one failed."""
    failed = []
    for name in CPU:
        print(f"== {name}: {summary(name)}", flush=True)
        if run(name, *(["--quick"] if quick else [])):
            failed.append(name)
    if not quick and run("readme"):
        failed.append("readme")
    print(f"failed: {', '.join(failed)}" if failed else "all done")
    return int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="list", choices=["list", "all"])
    parser.add_argument("--quick", action="store_true", help="with all: a smoke run of seconds each")
    args = parser.parse_args(argv)
    if args.what == "all":
        return run_all(args.quick)
    for name in (*CPU, *NEEDS):
        print(f"{name:14} {summary(name)}{f' (needs {NEEDS[name]})' if name in NEEDS else ''}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
