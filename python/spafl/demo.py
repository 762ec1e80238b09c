"""The demo: SpaFL, FedAvg and Local on real handwritten digits, compared.

    python -m spafl.demo [--seeds 1 2 3] [--rounds 60] [--out runs/demo]

SpaFL is run twice, with and without its penalty, so that what the sparsity costs in accuracy can be seen.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import one_line

if TYPE_CHECKING:  # what is slow to import is imported when it is used: see .cli
    from .config import RunConfig

METHODS: dict[str, dict[str, Any]] = {
    "spafl": {},
    "spafl-no-penalty": {"algorithm": {"penalty": 0.0}},
    "fedavg": {"algorithm": {"name": "fedavg"}},
    "local": {"algorithm": {"name": "local"}},
}


def demo_config(method: str, seed: int, rounds: int | None = None) -> RunConfig:
    """The demo's configuration of one method."""
    from .config import deep_merge, resolve_config

    raw = tomllib.loads(resources.files("spafl").joinpath("configs/digits.toml").read_text("utf-8"))
    change = METHODS[method]
    if "name" in change.get("algorithm", {}):
        raw["algorithm"] = {}  # another algorithm has other settings
    raw = deep_merge(raw, change)
    raw = deep_merge(raw, {"name": method, "seed": seed})
    if rounds is not None:
        raw["rounds"] = rounds
    return resolve_config(raw)


def seed_table(summaries: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds of the last evaluation, one line per method."""
    import numpy as np

    lines = [f"{'method':<18}{'accuracy %':>16}{'worst 10 % %':>16}{'density (layers)':>18}{'MACs (formula)':>16}"]
    for method, runs in summaries.items():
        final = [summary["final"] for summary in runs]

        def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
            array = scale * np.asarray(values)
            return f"{array.mean():.{digits}f} ± {array.std(ddof=1) if len(array) > 1 else 0.0:.{digits}f}"

        density = [f["density"]["layer_mean"] if f["density"] else 1.0 for f in final]
        lines.append(
            f"{method:<18}"
            f"{spread([f['evaluation']['accuracy']['mean'] for f in final], 100):>16}"
            f"{spread([f['evaluation']['accuracy']['worst_10pct'] for f in final], 100):>16}"
            f"{spread(density, 1, 2):>18}"
            f"{np.mean([f['cost']['paper']['macs'] for f in final]):>16.3g}"
        )
    return "\n".join(lines)


def _run(seeds: list[int], rounds: int | None, folder: Path) -> int:
    from .report import comparison_table, write_report
    from .simulation import run

    summaries: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in seeds:
        folders = []
        for method in METHODS:
            out = folder / f"{method}-seed{seed}"
            if (out / "config.toml").exists():
                shutil.rmtree(out)
            start = time.perf_counter()
            summary = run(demo_config(method, seed, rounds), out)
            accuracy = summary["final"]["evaluation"]["accuracy"]["mean"]
            print(f"{method}, seed {seed}: accuracy {100 * accuracy:.1f} %, {time.perf_counter() - start:.0f} s")
            summaries[method].append(summary)
            folders.append(out)
        print()
        print(comparison_table(folders))
        print(f"report: {write_report(folders, folder / f'report-seed{seed}')}")
    if len(seeds) > 1:
        print()
        print(seed_table(summaries))
    return 0


def main(arguments: list[str] | None = None, own_process: bool = False) -> int:
    """Command line entry; see :func:`spafl.cli.one_line`."""
    parser = argparse.ArgumentParser(prog="python -m spafl.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=None, help="fewer rounds for a quick look (default 60)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder; its old demo runs are replaced")
    args = parser.parse_args(arguments)
    return one_line(lambda: _run(args.seeds, args.rounds, args.out), own_process)


if __name__ == "__main__":
    sys.exit(main(own_process=True))
