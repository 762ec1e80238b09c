"""What an encoding of uploads saves and costs: bytes and accuracy over seeds, on real digits.

    python -m benchmarks.encodings [--seeds 1 2 3 4 5] [--algorithms spafl fedavg] [--rounds 60] [--out FILE.csv]

The packaged setting ``digits.toml`` (20 clients, 10 a round, LeNet-5) under every ``communication.encoding``;
``fedavg`` is the same setting with that algorithm. Nothing is timed, so any machine will do; equal seeds give equal
data, parts, initial models and samplings. Bytes are per client and round, mean over rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row
from spafl.config import load_config
from spafl.simulation import run
from spafl.wire import ENCODINGS

KEY = ("algorithm", "encoding", "seed")


def measure(algorithm: str, encoding: str, seed: int, rounds: int) -> dict[str, object]:
    """One run, one row."""
    settings = [
        f"communication.encoding={encoding}", f"seed={seed}", f"rounds={rounds}", "simulation.device=cpu",
        "simulation.workers=1", f"simulation.checkpoint_every={rounds}",
    ]  # fmt: skip
    packaged = resources.files("spafl").joinpath("configs/digits.toml")
    with resources.as_file(packaged) as path, tempfile.TemporaryDirectory() as folder:
        if algorithm != "spafl":
            text = path.read_text().replace('variant = "paper"\npenalty = 0.003\n', "")
            path = Path(folder) / "digits.toml"
            path.write_text(text.replace('name = "spafl"', f'name = "{algorithm}"'))
        config = load_config(path, settings)
        summary = run(config, Path(folder) / "run", quiet=True)
    final, turns = summary["final"], rounds * config.sampling.clients_per_round
    accuracy, density = final["evaluation"]["accuracy"], final["density"]
    cost = final["cost"]
    return {
        "algorithm": algorithm,
        "encoding": encoding,
        "seed": seed,
        "rounds": rounds,
        "accuracy": round(100 * accuracy["mean"], 3),
        "worst_10pct": round(100 * accuracy["worst_10pct"], 3),
        "density": round(density["layer_mean"], 4) if density else "",
        "up_payload_bytes": round(cost["payload"]["up_bytes"] / turns, 1),
        "up_frame_bytes": round(cost["framed"]["up_bytes"] / turns, 1),
        "down_payload_bytes": round(cost["payload"]["down_bytes"] / turns, 1),
        "wrong": f"{summary['rejected_uploads']} uploads rejected" if summary["rejected_uploads"] else "",
    }


def table(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over seeds by algorithm and encoding."""

    def spread(group: Sequence[Row], column: str, digits: int = 1) -> str:
        values = [float(row[column]) for row in group if row[column]]
        if not values:
            return ""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"

    lines = []
    for algorithm, encoding in dict.fromkeys((row["algorithm"], row["encoding"]) for row in rows):
        group = [row for row in rows if (row["algorithm"], row["encoding"]) == (algorithm, encoding)]
        sizes = [f"{float(group[0][c]):,.0f}" for c in ("up_payload_bytes", "up_frame_bytes", "down_payload_bytes")]
        figures = [spread(group, "accuracy"), spread(group, "worst_10pct"), spread(group, "density", 3)]
        lines.append([algorithm, encoding, str(len(group)), *sizes, *figures])
    header = ["algorithm", "encoding", "seeds", "up, B", "up with framing, B", "down, B", "accuracy, %",
              "worst 10 %", "density"]  # fmt: skip
    return common.markdown(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.encodings", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--algorithms", nargs="+", choices=["spafl", "fedavg"], default=["spafl", "fedavg"])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.algorithms, args.rounds = [1], ["spafl"], 1
    rows = common.start(args, KEY)
    for algorithm in args.algorithms:
        for seed in args.seeds:
            for encoding in ENCODINGS:
                row = measure(algorithm, encoding, seed, args.rounds)
                common.tell(
                    rows, row, "{algorithm:6} {encoding:4} seed {seed}",
                    "accuracy {accuracy:6.2f} %  density {density}  up {up_payload_bytes:.0f} B", "counted",
                )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)
