"""SpaFL beside its authors' code on Fashion-MNIST: agreement round by round, and seconds.

    git clone https://github.com/news-vt/SpaFL_NeruIPS_2024 AUTHORS && git -C AUTHORS checkout d3639ab
    python -m benchmarks.side_by_side AUTHORS [--rounds 12] [--dtype float32] [--workers 2] [--out FILE.csv]

The checkout stays as it is and outside of this repository. What its FMNIST folder imports and does not need here
(``torchvision``, ``wandb``) is replaced by empty modules; its own client, server, model and round are what runs. It is
given our clients' data (read by our loader, raw pixels), our first weights, our sampled clients and our batches, drawn
by its own data loaders from samplers of ours. Everything else is its own, the time it takes included.

Both run in this process, a round of each in turn and each first in every other round. The authors' code uses
as many threads as ours has workers. Both test all clients after every round, as the published code does.

Two comparisons, one after the other:

* ``float64``: do they compute the same? A round agrees if accuracy is within half a point and density within .005.
* ``float32``, as published: seconds. Here rounding decides on which side of its threshold a filter falls whose score is
  next to it, on raw pixels soon about whole classes, and such differences grow; how far apart they are is shown, and is
  no judgement of either.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from benchmarks import common
from benchmarks.common import Row
from spafl import rng
from spafl.config import RunConfig, resolve_config
from spafl.errors import UserError
from spafl.simulation.loop import Simulation
from spafl.simulation.pool import Pool
from spafl.simulation.problem import Problem
from spafl.simulation.runfolder import RunFolder
from spafl.simulation.sampling import sample_clients

KEY = ("dtype", "round")
DTYPES = ("float64", "float32")
POINTS, DENSITY = 0.5, 0.005  # what agrees
# What the published run gives (main/fmnist/run_command.txt).
SETTINGS: dict[str, Any] = {
    "data": {"name": "fashion-mnist"},
    "partition": {"scheme": "dirichlet", "clients": 100, "alpha": 0.2, "min_train": 16, "min_test": 4},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl", "variant": "fmnist"},
    "sampling": {"clients_per_round": 10},
    "evaluation": {"every": 1},
}


class Shuffled(Sampler[int]):
    """A client's samples in the order in which our simulator takes them in a round: another one in every epoch."""

    def __init__(self, seed: int, client: int, samples: int) -> None:
        self.seed, self.client, self.samples = seed, client, samples
        self.begin(0)

    def begin(self, round: int) -> None:
        self.stream = rng.numpy_stream(self.seed, "shuffle", round, self.client)

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.stream.permutation(self.samples).tolist())


@contextlib.contextmanager
def their_modules(folder: Path) -> Iterator[types.SimpleNamespace]:
    """Import what a round needs from the authors' FMNIST folder.

    Raises:
        UserError: it is not there.
    """
    if not (folder / "client" / "Client_Class.py").is_file():
        raise UserError(
            f"{folder} is not the FMNIST folder of the authors' repository: client/Client_Class.py is missing"
        )
    before = set(sys.modules)
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "wandb"):
        sys.modules.setdefault(name, types.ModuleType(name))
    vision: Any = sys.modules["torchvision"]
    vision.datasets, vision.transforms = sys.modules["torchvision.datasets"], sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms"].ToTensor = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    try:
        with contextlib.chdir(folder):  # utils/ looks at the current folder
            yield types.SimpleNamespace(
                **{
                    name: importlib.import_module(module)
                    for name, module in (
                        ("client", "client.Client_Class"), ("server", "server.Server_Class"),
                        ("model", "model.lenet"), ("data", "Split_Data"),
                    )
                }
            )  # fmt: skip
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {"client", "server", "model", "Split_Data", "torchvision", "wandb"}:
                del sys.modules[name]


class Theirs:
    """The authors' clients and server, fed with ours."""

    def __init__(self, code: types.SimpleNamespace, config: RunConfig, problem: Problem, threads: int) -> None:
        self.config, self.threads = config, threads
        local, options = config.local_training(), problem.algorithm.options
        dtype = local.torch_dtype
        args = types.SimpleNamespace(
            model="lenet5", num_clients=config.partition.clients, schedulingsize=config.sampling.clients_per_round,
            batch_size=local.batch_size, comm_rounds=config.rounds, learning_rate=local.lr, momentum=local.momentum,
            weight_decay=local.weight_decay, local_epoch=local.epochs, th_coeff=options.penalty, th_update=1,
            penalty_scheduler=options.warmup_rounds,
        )  # fmt: skip
        device, loss, data = torch.device("cpu"), torch.nn.CrossEntropyLoss(), problem.dataset
        first = code.model.LeNet_5_Masked()
        first.to(dtype).load_state_dict(problem.model.state_dict())
        self.server = code.server.Server(args, first)
        self.samplers, self.clients = [], []
        for k, (train, test) in enumerate(zip(problem.parts.train, problem.parts.test, strict=True)):
            model = code.model.LeNet_5_Masked()
            model.to(dtype).load_state_dict(problem.model.state_dict())
            own = code.data.Non_iid(torch.as_tensor(data.train_x[train][:, 0]), torch.as_tensor(data.train_y[train]))
            sampler = Shuffled(config.seed, k, len(own))
            loader = DataLoader(own, batch_size=local.batch_size, sampler=sampler)
            held_out = code.data.Non_iid(torch.as_tensor(data.test_x[test][:, 0]), torch.as_tensor(data.test_y[test]))
            for samples in (own, held_out):
                samples.x_data = samples.x_data.to(dtype)
            tests = DataLoader(held_out, batch_size=local.batch_size)
            self.samplers.append(sampler)
            self.clients.append(code.client.Client(args, model, loss, k, loader, tests, device))

    def run_round(self, round: int) -> tuple[float, float, float]:
        """Seconds, mean accuracy in per cent and mean density: the body of the published loop."""
        sampled = sample_clients(self.config, round)
        for k in sampled:
            self.samplers[k].begin(round)
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        self.server.broadcast(self.clients, sampled)
        for k in sampled:
            self.clients[k].th_update(self.server.global_difference)
        for k in sampled:
            self.clients[k].local_training(round)
        self.server.aggregation(self.clients, sampled)
        tested = [client.local_test() for client in self.clients]
        seconds = time.perf_counter() - begin
        torch.set_num_threads(1)
        return seconds, float(np.mean([t[0] for t in tested])), float(np.mean([t[2] for t in tested]))


class Ours:
    """The simulator, a round at a time."""

    def __init__(self, simulation: Simulation, pool: Pool) -> None:
        self.simulation, self.pool = simulation, pool

    def run_round(self, round: int) -> tuple[float, float, float]:
        begin = time.perf_counter()
        line = self.simulation.ledger.book(self.simulation.run_round(self.pool, round))
        seconds = time.perf_counter() - begin
        return seconds, 100 * line["evaluation"]["accuracy"]["mean"], line["density"]["layer_mean"]


def compare(code: types.SimpleNamespace, config: RunConfig, workers: int, rows: common.Rows) -> None:
    """Add a row for every round."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run", resume=False)
        simulation = Simulation(config, folder, quiet=True)
        try:
            with Pool(simulation.worker_setup(), workers) as pool:
                ours, theirs = Ours(simulation, pool), Theirs(code, config, simulation.problem, workers)
                for round in range(config.rounds):
                    turns = [ours, theirs] if round % 2 else [theirs, ours]
                    found = {type(who).__name__: who.run_round(round) for who in turns}
                    rows.add(row_of(config.training.dtype, round, found["Ours"], found["Theirs"]))
                    print(_line(rows.measured[-1]), flush=True)
        finally:
            if simulation.store is not None:
                simulation.store.close()
            folder.close()


def row_of(
    dtype: str, round: int, ours: tuple[float, float, float], theirs: tuple[float, float, float]
) -> dict[str, object]:
    """What a round gave, as a line of the CSV file; ``wrong`` says where the two do not agree, if they have to."""
    names = ("seconds", "accuracy", "density")
    figures: dict[str, object] = {
        f"{name}_{who}": float(f"{value:.6g}")
        for who, values in (("ours", ours), ("theirs", theirs)) for name, value in zip(names, values)
    }  # fmt: skip
    apart = {name: abs(a - b) for name, a, b in zip(names, ours, theirs)}
    wrong = ""
    if dtype == "float64":
        bounds = {"accuracy": POINTS, "density": DENSITY}
        wrong = "; ".join(f"{name} differs by {apart[name]:.3g}" for name in bounds if not apart[name] <= bounds[name])
        figures["seconds_ours"] = figures["seconds_theirs"] = ratio = ""  # nobody trains in it
    else:
        ratio = f"{theirs[0] / ours[0]:.4g}"
    differences = {f"{name}_apart": f"{apart[name]:.3g}" for name in ("accuracy", "density")}
    return {"dtype": dtype, "round": round + 1, **figures, "ratio": ratio, **differences, "wrong": wrong}


def _line(row: Row) -> str:
    accuracy, density = (f"{row[f'{name}_ours']:>7} and {row[f'{name}_theirs']:>7}" for name in ("accuracy", "density"))
    seconds = f"; {row['seconds_ours']} and {row['seconds_theirs']} s, {row['ratio']}x" if row["ratio"] else ""
    return f"{row['dtype']}, round {row['round']:>3}: accuracy {accuracy} %, density {density}{seconds} {row['wrong']}"


def table(rows: Sequence[Row]) -> str:
    """Agreement and seconds of all rounds, a line for each dtype."""
    body = []
    for dtype in DTYPES:
        own = [row for row in rows if row["dtype"] == dtype]
        if not own:
            continue

        def values(name: str, own: Sequence[Row] = own) -> list[float]:
            return [float(row[name]) for row in own]

        speed = ["", "", ""]
        if dtype == "float32":
            low, middle, high = common.quartiles(values("ratio"))
            seconds = [f"{common.quartiles(values(f'seconds_{who}'))[1]:.2f}" for who in ("theirs", "ours")]
            speed = [*seconds, f"{middle:.1f}x ({low:.1f} to {high:.1f})"]
        apart = [f"<= {max(values(f'{name}_apart')):.2g}" for name in ("accuracy", "density")]
        body.append([dtype, str(len(own)), *apart, *speed])
    return common.markdown(
        ["dtype", "rounds", "accuracy, points apart", "density apart", "authors' code, s a round", "ours", "faster"],
        body,
    )


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.side_by_side", __doc__)
    parser.add_argument("code", type=Path, help="a checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this comparison")
    args = parser.parse_args(argv)
    small = {"data": {"name": "synthetic", "image": 28, "classes": 10, "train": 1200, "test": 600},
             "partition": {"scheme": "dirichlet", "clients": 4, "alpha": 1.0, "min_train": 16, "min_test": 4},
             "sampling": {"clients_per_round": 2}} if args.quick else {}  # fmt: skip
    run = {"rounds": 2 if args.quick else args.rounds, "seed": args.seed, "simulation": {"device": "cpu"}}
    logging.disable(logging.INFO)
    try:
        configs = [
            resolve_config(SETTINGS | run | small | {"training": {"dtype": dtype}})
            for dtype in DTYPES if dtype in (args.dtype or DTYPES)
        ]  # fmt: skip
        with their_modules(args.code.expanduser().resolve() / "main" / "fmnist") as code:
            rows = common.start(args, KEY)
            for config in configs:
                compare(code, config, 1 if args.quick else args.workers, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows.measured))
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)
