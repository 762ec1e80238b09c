"""SpaFL beside its authors' code on Fashion-MNIST: agreement round by round, and seconds.

    git clone https://github.com/news-vt/SpaFL_NeruIPS_2024 AUTHORS && git -C AUTHORS checkout d3639ab
    python -m benchmarks.side_by_side AUTHORS [--rounds 12] [--dtype float32] [--workers 2] [--out FILE.csv]
    python -m benchmarks.side_by_side AUTHORS --rounds 500 --dtype float32 --workers 1 --keep FOLDER

The checkout stays as it is and outside of this repository. What its FMNIST folder imports and does not need here
(``torchvision``, ``wandb``) is replaced by empty modules; its own client, server, model and round are what runs. It is
given our clients' data (read by our loader, raw pixels), our first weights, our sampled clients and our batches, drawn
by its own data loaders from samplers of ours. Everything else is its own, the time it takes included.

Both run in this process, a round of each in turn and each first in every other round. The authors' code uses
as many threads as ours has workers. Both test all clients after every round, as the published code does. With
``--keep`` both are saved every ten rounds, outside of their seconds, and a comparison that was cut off goes on from
there.

Two comparisons, one after the other:

* ``float64``: do they compute the same? A round agrees if accuracy is within half a point and density within .005.
* ``float32``, as published: seconds. Here rounding decides on which side of its threshold a filter falls whose score is
  next to it, on raw pixels soon about whole classes, and such differences grow; how far apart they are is shown, and is
  no judgement of either.
"""

from __future__ import annotations

import contextlib
import decimal
import importlib
import itertools
import logging
import os
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

KEY = ("dtype", "threads", "round")
DTYPES = ("float64", "float32")
POINTS, DENSITY = 0.5, 0.005  # what agrees
SAVED_EVERY = 10  # rounds
# What the published run gives (main/fmnist/run_command.txt).
SETTINGS: dict[str, Any] = {
    "data": {"name": "fashion-mnist"},
    "partition": {"scheme": "dirichlet", "clients": 100, "alpha": 0.2, "min_train": 16, "min_test": 4},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl", "variant": "fmnist"},
    "sampling": {"clients_per_round": 10},
    "evaluation": {"every": 1},
    "simulation": {"device": "cpu", "checkpoint_every": SAVED_EVERY},
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

    def save(self, folder: Path, round: int) -> None:
        """Keep what another round needs beside what was kept before."""
        state = {
            "server": (self.server.global_thresholds, self.server.global_difference),
            "clients": [
                (client.model.state_dict(), client.optimizer.state_dict(), _ratios(client.model))
                for client in self.clients
            ],
        }
        torch.save(state, folder / "part")
        os.replace(folder / "part", _theirs(folder, round))
        _theirs(folder, round - 2 * SAVED_EVERY).unlink(missing_ok=True)  # ours may be as far as the one between

    def restore(self, folder: Path, round: int) -> None:
        state = torch.load(_theirs(folder, round), weights_only=True)
        self.server.global_thresholds, self.server.global_difference = state["server"]
        for client, (model, optimizer, ratios) in zip(self.clients, state["clients"], strict=True):
            client.model.load_state_dict(model)
            client.optimizer.load_state_dict(optimizer)
            for name, layer in client.model.named_modules():
                if name in ratios:
                    layer.ratio = ratios[name]


def _theirs(folder: Path, round: int) -> Path:
    return folder / f"theirs-{round:04}.pt"


def _ratios(model: torch.nn.Module) -> dict[str, Any]:
    """Density of each layer in its last pass: the next one asks for it."""
    return {name: layer.ratio for name, layer in model.named_modules() if hasattr(layer, "ratio")}


class Ours:
    """The simulator, a round at a time."""

    def __init__(self, simulation: Simulation, pool: Pool) -> None:
        self.simulation, self.pool = simulation, pool

    def run_round(self, round: int) -> tuple[float, float, float]:
        begin = time.perf_counter()
        self.line = self.simulation.ledger.book(self.simulation.run_round(self.pool, round))
        seconds = time.perf_counter() - begin
        return seconds, 100 * self.line["evaluation"]["accuracy"]["mean"], self.line["density"]["layer_mean"]


def compare(code: types.SimpleNamespace, config: RunConfig, workers: int, keep: Path, rows: common.Rows) -> None:
    """Add a row for every round that is not yet in ``keep``."""
    again = (keep / "ours" / "config.toml").is_file()
    folder = RunFolder(keep / "ours", resume=again)
    simulation = Simulation(config, folder, resume=again, quiet=True)
    try:
        with Pool(simulation.worker_setup(), workers) as pool:
            ours, theirs = Ours(simulation, pool), Theirs(code, config, simulation.problem, workers)
            if simulation.round >= 0:
                theirs.restore(keep, simulation.round)
            for round in range(simulation.round + 1, config.rounds):
                turns = [ours, theirs] if round % 2 else [theirs, ours]
                found = {type(who).__name__: who.run_round(round) for who in turns}
                rows.add(row_of(config.training.dtype, workers, round, found["Ours"], found["Theirs"]))
                print(_line(rows.measured[-1]), flush=True)
                folder.append_metrics(ours.line)
                if (round + 1) % SAVED_EVERY == 0:
                    theirs.save(keep, round)  # first: where ours goes on from, theirs can
                    simulation.save()
    finally:
        if simulation.store is not None:
            simulation.store.close()
        folder.close()


def row_of(
    dtype: str, threads: int, round: int, ours: tuple[float, float, float], theirs: tuple[float, float, float]
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
    where = {"dtype": dtype, "threads": threads, "round": round + 1}
    return where | figures | {"ratio": ratio, **differences, "wrong": wrong}


def _line(row: Row) -> str:
    accuracy, density = (f"{row[f'{name}_ours']:>7} and {row[f'{name}_theirs']:>7}" for name in ("accuracy", "density"))
    seconds = f"; {row['seconds_ours']} and {row['seconds_theirs']} s, {row['ratio']}x" if row["ratio"] else ""
    return f"{row['dtype']}, round {row['round']:>3}: accuracy {accuracy} %, density {density}{seconds} {row['wrong']}"


def table(rows: Sequence[Row]) -> str:
    """Agreement and seconds of all rounds, a line for each comparison."""
    body = []
    for dtype, threads in itertools.product(DTYPES, sorted({row["threads"] for row in rows}, key=int, reverse=True)):
        own = [row for row in rows if (row["dtype"], row["threads"]) == (dtype, threads)]
        if not own:
            continue

        def values(name: str, own: Sequence[Row] = own) -> list[float]:
            return [float(row[name]) for row in own]

        speed = [""] * 6
        if dtype == "float32":
            low, middle, high = common.quartiles(values("ratio"))
            both = [values(f"seconds_{who}") for who in ("theirs", "ours")]
            a_round = [f"{common.quartiles(seconds)[1]:.2f}" for seconds in both]
            whole = [sum(seconds) for seconds in both]
            speed = [*a_round, f"{middle:.1f}x ({low:.1f} to {high:.1f})"]
            speed += [*(f"{seconds / 60:.1f}" for seconds in whole), f"{whole[0] / whole[1]:.1f}x"]
        apart = [f"<= {at_most(max(values(f'{name}_apart')))}" for name in ("accuracy", "density")]
        body.append([dtype, threads, str(len(own)), *apart, *speed])
    return common.markdown(
        ["dtype", "threads of each", "rounds", "accuracy, points apart", "density apart", "authors' code, s a round",
         "ours", "faster", "all rounds, min", "ours", "faster"],
        body,
    )  # fmt: skip


def at_most(value: float) -> str:
    """Two digits, rounded up: what is said to be a bound has to be one."""
    if not value:
        return "0"
    context = decimal.Context(prec=2, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(f'{value:.6g}')):.2g}"


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.side_by_side", __doc__)
    parser.add_argument("code", type=Path, help="a checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="of ours, and threads of the authors' code")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this comparison")
    parser.add_argument("--keep", type=Path, help="a folder to go on from (default: each comparison begins anew)")
    args = parser.parse_args(argv)
    small = {"data": {"name": "synthetic", "image": 28, "classes": 10, "train": 1200, "test": 600},
             "partition": {"scheme": "dirichlet", "clients": 4, "alpha": 1.0, "min_train": 16, "min_test": 4},
             "sampling": {"clients_per_round": 2}} if args.quick else {}  # fmt: skip
    run = {"rounds": 2 if args.quick else args.rounds, "seed": args.seed}
    logging.disable(logging.INFO)
    try:
        configs = [
            resolve_config(SETTINGS | run | small | {"training": {"dtype": dtype}})
            for dtype in DTYPES if dtype in (args.dtype or DTYPES)
        ]  # fmt: skip
        keep = args.keep.expanduser().resolve() if args.keep else None
        with their_modules(args.code.expanduser().resolve() / "main" / "fmnist") as code:
            rows = common.start(args, KEY)
            for config in configs:
                kept = contextlib.nullcontext(str(keep / config.training.dtype)) if keep else None
                with kept or tempfile.TemporaryDirectory() as folder:
                    compare(code, config, 1 if args.quick else args.workers, Path(folder), rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows.rows if keep else rows.measured))
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)
