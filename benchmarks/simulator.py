"""What the simulator itself costs: seconds per client beside the training steps, and memory with many clients.

    python -m benchmarks.simulator [--clients 1000] [--rounds 5] [--sampled 100] [--engine auto] [--store auto]
        [--out FILE.csv]

One process, one thread, LeNet-5, two batches of 16 per client and round, so that the framework is not hidden behind the
training. Overhead is everything a client's turn takes except the trainer's own work (``step``, and ``begin`` and
``finish``, which are listed apart) and the importance update, a pass over all weights that is SpaFL's own: message
coding, fetching and keeping the client's tensors, shuffling, normalisation, merging and metrics, without evaluation.
Times are wall-clock: run it on an idle machine. A client's first turn also allocates its row; that is listed apart as
well. The memory is the peak after all clients have been evaluated, rows in memory included.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from spafl.algorithms import spafl as spafl_algorithm
from spafl.config import resolve_config
from spafl.simulation.loop import Simulation
from spafl.simulation.pool import Pool
from spafl.simulation.runfolder import RunFolder
from spafl_kernels import training

KEY = ("clients", "sampled", "engine", "store")


class StepClock:
    """Adds up the time spent inside a trainer's methods and in SpaFL's importance update."""

    def __init__(self, trainer: training.Trainer) -> None:
        self.seconds: dict[str, float] = {}
        for owner, name in (
            *((trainer, name) for name in ("step", "begin", "finish")),
            (spafl_algorithm, "importance_update_"),
        ):
            self.seconds[name] = 0.0
            setattr(owner, name, self._timed(name, getattr(owner, name)))

    def _timed(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call


def measure(clients: int, sampled: int, rounds: int, engine: str, store: str = "auto") -> dict[str, Any]:
    """Run the rounds and return one row."""
    config = resolve_config(
        {
            "name": "overhead", "rounds": rounds + 1,
            "data": {
                "name": "synthetic", "image": 28, "channels": 1, "classes": 10,
                "train": 32 * clients, "test": 2 * clients,
            },
            "partition": {"scheme": "iid", "clients": clients},
            "model": {"name": "lenet5"},
            "algorithm": {"name": "spafl", "variant": "fmnist"},
            "training": {"batch_size": 16, "epochs": 1, "lr": 0.001},
            "sampling": {"clients_per_round": sampled},
            "evaluation": {"every": rounds + 2, "train_data": "never"},
            "simulation": {"workers": 1, "engine": engine, "store": store, "device": "cpu",
                           "checkpoint_every": rounds + 2},
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run_folder = RunFolder(Path(folder) / "run", resume=False)
        simulation = Simulation(config, run_folder, quiet=True)
        seconds = 0.0
        with Pool(simulation.worker_setup(), 1) as pool:
            assert pool._own is not None and pool._own.store is not None and simulation.store is not None
            simulation.run_round(pool, 0)  # warm-up: kernels are chosen, rows of the store are new
            start = time.perf_counter()
            for k in range(clients):
                turn = simulation.store.turn(k)
                pool._own.store.take(turn.source, turn.written)
                pool._own.store.keep(turn.written)
            simulation.store.abandon()
            first_write = (time.perf_counter() - start) / clients
            clock = StepClock(pool._own.resident.trainer)
            for number in range(1, rounds):
                start = time.perf_counter()
                simulation.run_round(pool, number)
                seconds += time.perf_counter() - start
            turns = (rounds - 1) * sampled
            simulation.evaluate(pool, rounds, train_data=False)
        row, in_memory = simulation.store.row_bytes, simulation.store.file.in_memory
        run_folder.close()
    inside = clock.seconds
    return {
        "clients": clients,
        "sampled": sampled,
        "engine": engine,
        "store": "memory" if in_memory else "file",
        "turns": turns,
        "overhead_ms": round(1e3 * (seconds - sum(inside.values())) / turns, 3),
        "update_ms": round(1e3 * inside["importance_update_"] / turns, 3),
        "first_write_ms": round(1e3 * first_write, 3),
        "trainer_ms": round(1e3 * (inside["begin"] + inside["finish"]) / turns, 3),
        "step_ms": round(1e3 * inside["step"] / turns, 3),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "row_mb": round(row / 1e6, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.simulator", __doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--sampled", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="auto", choices=["auto", "masked", "compact"])
    parser.add_argument("--store", default="auto", choices=["auto", "memory", "file"])
    args = parser.parse_args(argv)
    if args.quick:
        args.clients, args.sampled, args.rounds = 20, 5, 2
    rows = common.start(args, KEY)
    row = measure(args.clients, args.sampled, args.rounds, args.engine, args.store)
    rows.add(row)
    for name, value in row.items():
        print(f"{name:>16}: {value}")
    return 0


if __name__ == "__main__":
    common.alone(main)
