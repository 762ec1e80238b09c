"""Replay a recorded run of the published code in float64 and compare every figure it holds.

    python -m spafl.conformance FILE.npz [--engine NAME] [--tolerance 1e-6]

The file holds the clients' data in batch order, one initial state, the clients sampled in each round, and after each
round the global thresholds, the norm and the sum of every tensor of every client, its test loss and accuracy, its
density and the published FLOP counter (``tests/golden/README.md``). The run is repeated through the same algorithm
code as any simulation. Exit status 0: everything agrees; 1: the first deviation is printed; 2: unusable input.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spafl_kernels.cost import layer_macs
from spafl_kernels.functional import threshold_layers

from .algorithms import Client, Evaluation, LocalTraining, Samples, Upload
from .algorithms.spafl import VARIANTS, SpaFL, SpaFLOptions
from .data import Transform
from .errors import UserError
from .models import build_model
from .simulation.resident import ClientSetting, Resident

FIGURES = ("threshold", "l2", "sum", "loss", "accuracy", "density", "flops")

# By the beginning of the recorded name.
_MODEL_NAMES = {"lenet": "lenet5", "conv4": "conv4", "resnet": "resnet18", "vit": "vit"}


@dataclass
class Deviation:
    """Where a replayed figure is off."""

    figure: str
    round: int
    client: int | None
    tensor: str | None
    expected: float
    got: float
    relative: float

    def __str__(self) -> str:
        where = f"round {self.round + 1}"
        where += ", server" if self.client is None else f", client {self.client}"
        if self.tensor:
            where += f", {self.tensor}"
        return f"{where}: {self.figure} is {self.got!r}, recorded {self.expected!r} (relative {self.relative:.2e})"


class Recording:
    """A recorded run, read from its file.

    Raises:
        UserError: the file is missing, not a recording, or lacks something.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self.arrays = {key: file[key] for key in file.files}
            self.meta: dict[str, Any] = json.loads(bytes(self.arrays["meta"]).decode())
            self.variant: str = self.meta["variant"]
            self.config: dict[str, Any] = self.meta["config"]
            self.rounds: list[dict[str, Any]] = self.meta["rounds"]
            self.clients = int(self.config["num_clients"])
            recorded = str(self.config["model"]).lower()
            self.model_name = next(name for start, name in _MODEL_NAMES.items() if recorded.startswith(start))
        except FileNotFoundError:
            raise UserError(f"recording {path} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, StopIteration, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a recording of a published run: {error!r}") from None
        if self.variant not in VARIANTS:
            raise UserError(f"{path}: unknown variant {self.variant!r}; known: {', '.join(VARIANTS)}")
        missing = [f"{p}/{k}" for k in range(self.clients) for p in ("train_x", "train_y", "test_x", "test_y")
                   if f"{p}/{k}" not in self.arrays]  # fmt: skip
        if missing:
            raise UserError(f"{path}: recording lacks {missing[0]}")

    def samples(self, split: str, client: int) -> Samples:
        """A client's data as stored: float64 images, int64 classes."""
        x, y = self.arrays[f"{split}_x/{client}"], self.arrays[f"{split}_y/{client}"]
        return Samples(torch.from_numpy(x.astype(np.float64)), torch.from_numpy(y.astype(np.int64)))

    def initial(self) -> dict[str, Tensor]:
        """The common initial state, floating tensors as float64."""
        state = {}
        for key, array in self.arrays.items():
            if key.startswith("init/"):
                tensor = torch.from_numpy(np.asarray(array))
                state[key.removeprefix("init/")] = tensor.double() if tensor.is_floating_point() else tensor
        return state

    def options(self) -> tuple[SpaFLOptions, LocalTraining]:
        """Settings of the variant with the recording's own numbers."""
        preset, config = VARIANTS[self.variant], self.config
        options = {**preset["algorithm"], "variant": self.variant, "penalty": config["th_coeff"]}
        if "penalty_scheduler" in config:
            options["warmup_rounds"] = config["penalty_scheduler"]
        if not config.get("th_update", 1):
            options["importance"] = "none"
        training = preset["training"]
        local = LocalTraining(
            lr=config["learning_rate"],
            momentum=config["momentum"],
            weight_decay=config["weight_decay"],
            batch_size=config["batch_size"],
            epochs=config["local_epoch"],
            lr_decay=config.get("lr_decay", training.get("lr_decay", 1.0)),
            lr_floor=training.get("lr_floor", 0.0),
            max_grad_norm=config.get("clip", training.get("max_grad_norm")),
            drop_last=training.get("drop_last", False),
            shuffle=False,
        )
        return SpaFLOptions(**options), local


class Replay:
    """A recorded run, repeated round by round through the SpaFL algorithm."""

    def __init__(self, recording: Recording, engine: str) -> None:
        self.recording = recording
        options, self.local = recording.options()
        self.algorithm = SpaFL(options, guard_evaluations=True)
        initial = recording.initial()
        head = "linear.weight" if "linear.weight" in initial else "mlp_head.1.weight"
        last = initial[head] if head in initial else list(initial.values())[-2]
        first = recording.samples("train", 0).x
        model = build_model(recording.model_name, last.shape[0], first.shape[1], seed=0).double()
        try:
            model.load_state_dict(initial)
        except RuntimeError as error:
            raise UserError(f"recorded initial state does not fit {recording.model_name}: {error}") from None
        model = self.algorithm.prepare_model(model, first[:1])
        layers = dict(threshold_layers(model))
        macs = layer_macs(model, first[:1], per_token=False)
        setting = ClientSetting(
            replace(self.local, dtype="float64"), Transform(), {n: macs[n] for n in layers}, 0, torch.device("cpu")
        )
        self.server = self.algorithm.server_state(model)
        fresh = self.algorithm.client_state(model)
        self.tensors = [{n: t.clone() for n, t in fresh.items()} for _ in range(recording.clients)]
        self.buffers = {n: t.clone() for n, t in fresh.items()}
        self.resident = Resident(self.algorithm, model, engine, setting, self.buffers)
        self.flops = [0.0] * recording.clients

    @contextmanager
    def _lend(self, client: int) -> Iterator[Client]:
        """A client's turn, on tensors kept in memory."""
        for name, tensor in self.buffers.items():
            tensor.copy_(self.tensors[client][name])
        samples = self.recording.samples
        yield self.resident.lend(client, self.buffers, samples("train", client), samples("test", client))
        self.resident.take_back()
        for name, tensor in self.buffers.items():
            self.tensors[client][name].copy_(tensor)

    def round(self, number: int) -> list[Evaluation]:
        """One round over the recorded clients, then every client's evaluation."""
        sampled = self.recording.rounds[number]["sampled"]
        uploads = []
        for k in sampled:
            with self._lend(k) as client:
                training = self.algorithm.train(client, self.algorithm.broadcast(self.server, number, k), number)
                uploads.append(Upload(k, training.message, len(client.train)))
                self.flops[k] += training.cost.paper_macs
        self.server, announcement = self.algorithm.merge(self.server, number, uploads, self.recording.clients)
        evaluations = []
        for k in range(self.recording.clients):
            with self._lend(k) as client:
                if announcement:
                    self.algorithm.receive(client, announcement, number)
                evaluations.append(self._evaluate(client))
        return evaluations

    def _evaluate(self, client: Client) -> Evaluation:
        """As the algorithm does, with the published batch size: the loss is a mean over batches."""
        client.evaluation_batch = self.local.batch_size
        return self.algorithm.evaluate(client, {}, False)


def compare(recording: Recording, engine: str) -> Iterator[tuple[int, dict[str, Deviation]]]:
    """Per round: the largest deviation of every kind of figure."""
    replay = Replay(recording, engine)
    for number, recorded in enumerate(recording.rounds):
        evaluations = replay.round(number)
        worst: dict[str, Deviation] = {}

        def note(
            figure: str, expected: float, got: float, client: int | None, tensor: str | None, scale: float,
            number: int = number, worst: dict[str, Deviation] = worst,
        ) -> None:  # fmt: skip
            # A NaN on one side only must count as a deviation, so it is not left to ">".
            same = expected == got or (np.isnan(expected) and np.isnan(got))
            relative = 0.0 if same else abs(got - expected) / scale if scale else float("inf")
            relative = float("inf") if np.isnan(relative) else relative
            if figure not in worst or relative > worst[figure].relative:
                worst[figure] = Deviation(figure, number, client, tensor, expected, got, relative)

        prefix = f"round{number}/"
        for key, array in recording.arrays.items():
            if not key.startswith(prefix):
                continue
            kind, _, tensor = key.removeprefix(prefix).partition("/")
            if kind == "global":
                got = replay.server[tensor].numpy()
                expected = array.astype(np.float64)
                scale = max(float(np.abs(expected).max()), 1e-12)
                at = int(np.argmax(np.abs(got - expected)))
                note("threshold", float(expected[at]), float(got[at]), None, f"{tensor}[{at}]", scale)
            elif kind.startswith("client"):
                client = int(kind.removeprefix("client"))
                name = tensor.partition("/")[2]
                mine = replay.tensors[client][name]
                norm, total = float(array[0]), float(array[1])
                note("l2", norm, mine.norm().item(), client, name, max(norm, 1e-12))
                # Entries cancel in a sum, so its deviation is taken relative to the sum of magnitudes.
                note("sum", total, mine.sum().item(), client, name, max(mine.abs().sum().item(), 1e-12))
        for k in range(recording.clients):
            e = evaluations[k]
            assert e.densities is not None
            note("loss", recorded["loss"][k], e.loss, k, None, max(abs(recorded["loss"][k]), 1e-12))
            note("accuracy", recorded["accuracy"][k], 100 * e.accuracy, k, None, 100.0)
            density = float(np.mean(list(e.densities.values())))
            note("density", recorded["density"][k], density, k, None, 1.0)
            note("flops", recorded["flops"][k], replay.flops[k], k, None, max(recorded["flops"][k], 1.0))
        yield number, worst
    yield from _compare_final(recording, replay)


def _compare_final(recording: Recording, replay: Replay) -> Iterator[tuple[int, dict[str, Deviation]]]:
    """The tensors of client 0 after the last round, entry by entry."""
    last = len(recording.rounds) - 1
    worst: dict[str, Deviation] = {}
    for key, array in recording.arrays.items():
        if not key.startswith("final/client0/"):
            continue
        name = key.removeprefix("final/client0/")
        expected = array.astype(np.float64).reshape(-1)
        got = replay.tensors[0][name].double().numpy().reshape(-1)
        scale = max(float(np.abs(expected).max()), 1e-12)
        at = int(np.argmax(np.abs(got - expected)))
        relative = float(abs(got[at] - expected[at])) / scale
        relative = float("inf") if np.isnan(relative) else relative
        if "entries" not in worst or relative > worst["entries"].relative:
            worst["entries"] = Deviation(
                "entry", last, 0, f"{name}[{at}]", float(expected[at]), float(got[at]), relative
            )
    if worst:
        yield last, worst


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m spafl.conformance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="recorded run (.npz)")
    parser.add_argument("--engine", default="masked", choices=["auto", "masked", "compact"])
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest relative deviation (default 1e-6)")
    args = parser.parse_args(arguments)
    if not args.tolerance >= 0:
        parser.error(f"--tolerance must be a number >= 0; got {args.tolerance}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first: Deviation | None = None
    try:
        recording = Recording(args.file)
        print(f"{args.file.name}: {recording.variant}, {recording.model_name}, engine {args.engine}")
        print("round  " + "".join(f"{figure:>11}" for figure in FIGURES))
        for number, worst in compare(recording, args.engine):
            if "entries" in worst:
                print(f"final  client 0, every entry of its small tensors: {worst['entries'].relative:.1e}")
            else:
                print(f"{number + 1:>5}  " + "".join(f"{worst[f].relative:>11.1e}" for f in FIGURES))
            if first is None:
                beyond = [d for d in worst.values() if d.relative > args.tolerance]
                # Within a round, weights are the cause and losses the effect: name them in the order of FIGURES.
                first = beyond[0] if beyond else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    if first is not None:
        print(f"DIFFERS beyond {args.tolerance:g}: first in {first}")
        return 1
    print(f"agrees within {args.tolerance:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
