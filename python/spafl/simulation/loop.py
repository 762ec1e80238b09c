"""The round loop: sample, broadcast, train, merge, announce, evaluate, record. It knows no algorithm by name."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spafl_kernels.cost import layer_macs
from spafl_kernels.functional import threshold_layers

from .. import rng
from ..algorithms import Algorithm, Evaluation, Upload
from ..config import RunConfig, load_config
from ..data import Dataset, Partition, load_dataset, partition
from ..errors import UserError
from ..models import MODELS, build_model
from ..wire import Message, decode, encode, payload_bytes
from . import checkpoint
from .checkpoint import Announcement, Progress
from .metrics import density_summary, environment, evaluation_summary, first_layer_masks
from .placement import pick_device, pick_workers
from .pool import Pool
from .progress import ProgressLine
from .resident import ClientSetting
from .runfolder import RunFolder, write_atomic
from .store import ClientStore
from .tasks import (
    DATA_PARTS,
    Announced,
    EvaluateOutcome,
    EvaluateTask,
    TrainOutcome,
    TrainTask,
    WorkerSetup,
)

# Undelivered announcements are kept in memory: past this many, everybody is brought up to date.
MAX_PENDING = 16

# Clients per evaluation task: enough to make the cost of a task small, few enough to balance.
_CLIENTS_PER_TASK = 8


def sample_clients(config: RunConfig, round: int) -> list[int]:
    """Clients of a round, without replacement, in the order they are drawn."""
    clients, count = config.partition.clients, config.sampling.clients_per_round
    if config.sampling.stream == "published-cifar100":
        return np.random.RandomState(round).choice(clients, count, replace=False).tolist()
    return rng.numpy_stream(config.seed, "sampling", round).choice(clients, count, replace=False).tolist()


@dataclass
class Problem:
    """What a run works on: data, parts, model and algorithm, all checked to fit."""

    dataset: Dataset
    parts: Partition
    model: nn.Module
    algorithm: Algorithm
    macs: dict[str, int]


def build_problem(config: RunConfig) -> Problem:
    """Load the data, cut it into clients and build the model.

    Raises:
        UserError: data missing or corrupt, an impossible partition, or a model that does not take these images.
    """
    options = config.data.model_dump(exclude={"name", "root"}, exclude_none=True)
    root = Path(config.data.root).expanduser() if config.data.root else None
    try:
        dataset = load_dataset(config.data.name, root, **options)
    except ValueError as error:
        raise UserError(f"data: {error}") from None
    info = MODELS[config.model.name]
    channels, *image = dataset.train_x.shape[1:]
    if list(image) != [info.image, info.image]:
        raise UserError(
            f"model {config.model.name} takes {info.image}x{info.image} images; data {config.data.name} has "
            f"{image[0]}x{image[1]}"
        )
    p = config.partition
    try:
        parts = partition(
            dataset.train_y, dataset.test_y, p.scheme, p.clients, rng.numpy_stream(config.seed, "partition"),
            alpha=p.alpha, classes_per_client=p.classes_per_client, min_train=p.min_train, min_test=p.min_test,
            max_draws=p.max_draws,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"partition: {error}") from None
    algorithm = config.build_algorithm()
    model = build_model(config.model.name, dataset.classes, channels, rng.stream_seed(config.seed, "initial model"))
    sample = torch.zeros(1, channels, *image)
    layers = dict(threshold_layers(model))
    macs = {name: count for name, count in layer_macs(model, sample, per_token=False).items() if name in layers}
    try:
        model = algorithm.prepare_model(model)
    except ValueError as error:
        raise UserError(f"algorithm {config.algorithm['name']}: {error}") from None
    _check_single_samples(config, model, sample, parts)
    return Problem(dataset, parts, model, algorithm, macs)


def _check_single_samples(config: RunConfig, model: nn.Module, sample: Tensor, parts: Partition) -> None:
    """Refuse parts that leave a training batch of one sample to a model that cannot normalise over one."""
    size, drop = config.training.batch_size, config.training.drop_last
    lone = [
        k for k, part in enumerate(parts.train) if len(part) == 1 or (len(part) % size == 1 and not drop) or size == 1
    ]
    if not lone:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(sample)
    except ValueError:
        raise UserError(
            f"training: client {lone[0]} has {len(parts.train[lone[0]])} samples, so with batch_size = {size} a batch "
            f"of one sample is left, which {config.model.name} cannot normalise; set training.drop_last = true, "
            "another training.batch_size or a larger partition.min_train"
        ) from None


class Simulation:
    """A run in its folder.

    Args:
        config: what to run.
        folder: an opened run folder.
        resume: continue from the folder's last checkpoint.
        quiet: no progress line even on a terminal, and no line that says why a device was chosen.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, resume: bool = False, quiet: bool = False) -> None:
        self.config = config
        self.folder = folder
        self.quiet = quiet
        self.device, why = pick_device(config)
        if why and not quiet:
            print(f"spafl: {why}", file=sys.stderr)
        self.workers = pick_workers(config, self.device)
        self.problem = build_problem(config)
        self.algorithm = self.problem.algorithm
        self.clients = config.partition.clients
        saved = self._saved_state() if resume else None
        self._start_folder(resume)

        scratch = folder.fresh_scratch()
        self._write_data(scratch)
        initial = self.algorithm.client_state(self.problem.model)
        kind = config.simulation.store
        self.store = ClientStore.create(scratch / "clients.bin", initial, self.clients, kind) if initial else None
        self.server: dict[str, Tensor] = self.algorithm.server_state(self.problem.model)
        self.progress = Progress(received=[0] * self.clients)
        self.pending: list[Announcement] = []
        self.dirty: set[int] = set()
        if saved is not None:
            self.progress, self.server, self.pending = saved.progress, saved.server, saved.pending
            if self.store is not None:
                saved.restore(self.store)
        self.folder.keep_metrics_until(self.progress.round)

    # -- set-up -------------------------------------------------------------------------------------------------

    def _saved_state(self) -> checkpoint.Checkpoint | None:
        stored = load_config(self.folder.path / "config.toml")
        difference = first_difference(stored, self.config)
        if difference:
            raise UserError(f"run folder {self.folder.path} holds a run of another configuration: {difference}")
        return checkpoint.load_latest(self.folder.checkpoints)

    def _start_folder(self, resume: bool) -> None:
        write_atomic(self.folder.path / "config.toml", self.config.to_toml())
        data, parts = self.problem.dataset, self.problem.parts
        counts = {
            "classes": data.classes,
            "image": list(data.train_x.shape[1:]),
            "train": [np.bincount(data.train_y[i], minlength=data.classes).tolist() for i in parts.train],
            "test": [np.bincount(data.test_y[i], minlength=data.classes).tolist() for i in parts.test],
        }
        write_atomic(self.folder.path / "partition.json", json.dumps(counts))

    def _write_data(self, scratch: Path) -> None:
        for part in DATA_PARTS:
            np.save(scratch / f"{part}.npy", getattr(self.problem.dataset, part))
        arrays = {}
        for split in ("train", "test"):
            indices: Sequence[np.ndarray] = getattr(self.problem.parts, split)
            arrays[f"{split}_index"] = np.concatenate(indices)
            arrays[f"{split}_cut"] = np.cumsum([len(i) for i in indices])[:-1]
        np.savez(scratch / "partition.npz", **arrays)

    def _worker_setup(self) -> WorkerSetup:
        setting = ClientSetting(
            self.config.local_training(),
            self.problem.dataset.transform,
            self.problem.macs,
            self.config.seed,
            self.device,
        )
        return WorkerSetup(
            self.algorithm,
            self.problem.model,
            self.config.simulation.engine,
            setting,
            self.clients,
            self.folder.scratch,
            self.store.file if self.store is not None else None,
        )

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run the remaining rounds; returns (and writes) the summary.

        Raises:
            FloatingPointError: a client's loss became NaN or infinite; names client and round.
        """
        config = self.config
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same arithmetic in this process as in a worker
        line = ProgressLine(config.name, config.rounds, self.progress.round + 1, self.quiet)
        last: dict[str, Any] | None = None
        try:
            with Pool(self._worker_setup(), self.workers) as pool:
                for round in range(self.progress.round + 1, config.rounds):
                    last = self._round(pool, round)
                    self.folder.append_metrics(last)
                    line.update(last)
                    if (round + 1) % config.simulation.checkpoint_every == 0 or round + 1 == config.rounds:
                        self._save()
        finally:
            line.close()
            torch.set_num_threads(threads)
            if self.store is not None:
                self.store.close()
        return self._summarise()

    def _round(self, pool: Pool, round: int) -> dict[str, Any]:
        config, algorithm = self.config, self.algorithm
        start = time.perf_counter()
        sampled = sample_clients(config, round)
        shared: tuple[Message, bytes] = ({}, encode({}))  # one encoding for all clients that get the same tensors
        tasks, down_payload, down_frames = [], 0, 0
        for k in sampled:
            message = algorithm.broadcast(self.server, round, k)
            if not _same_tensors(message, shared[0]):
                shared = (message, encode(message))
            frame = shared[1]
            if message:
                down_payload += payload_bytes(message)
                down_frames += len(frame)
            tasks.append(TrainTask(round, k, frame, self._take_announced(k)))
        sizes = [len(self.problem.parts.train[k]) for k in sampled]
        outcomes: list[TrainOutcome] = pool.run(tasks, sizes)
        self.dirty |= set(sampled)

        uploads = [Upload(o.client, decode(o.frame), o.samples) for o in outcomes]
        paper_bits = algorithm.paper_bits(self.server, len(sampled))
        self.server, announcement = algorithm.merge(self.server, round, uploads)
        if announcement:
            frame = encode(announcement)
            self.pending.append(Announcement(round, frame))
            self.progress.announced_until += 1
            down_payload += payload_bytes(announcement) * self.clients
            down_frames += len(frame) * self.clients
        trained = time.perf_counter()

        final = round + 1 == config.rounds
        evaluations = None
        if final or (round + 1) % config.evaluation.every == 0:
            train_data = config.evaluation.train_data
            evaluations = self._visit_all(
                pool, round, True, train_data == "always" or (train_data == "final" and final)
            )
        elif len(self.pending) >= MAX_PENDING:
            self._visit_all(pool, round, False, False)
        end = time.perf_counter()

        executed = [o.training.executed_macs for o in outcomes]
        self._add_cost(
            paper_bits=paper_bits,
            paper_macs=sum(o.training.paper_macs for o in outcomes),
            executed_macs=sum(m for m in executed if m is not None),
            up_bytes=sum(payload_bytes(u.message) for u in uploads),
            down_bytes=down_payload,
            up_frame_bytes=sum(len(o.frame) for o, u in zip(outcomes, uploads, strict=True) if u.message),
            down_frame_bytes=down_frames,
            train_seconds=trained - start,
            evaluate_seconds=end - trained,
            steps=sum(o.training.steps for o in outcomes),
        )
        self.progress.round = round
        line: dict[str, Any] = {
            "round": round,
            "sampled": sampled,
            "train_loss": float(np.mean([o.training.loss for o in outcomes])),
            "evaluation": None if evaluations is None else evaluation_summary(evaluations),
            "density": None if evaluations is None else density_summary(evaluations, self._layer_sizes()),
            "first_layer": None if evaluations is None else first_layer_masks(evaluations, self._first_layer()),
            "cost": self._cost_line(counted=None not in executed),
            "figures": _mean_figures([o.training.figures for o in outcomes]),
        }
        if evaluations is not None and line["evaluation"]["accuracy"]["mean"] > self.progress.best.get(
            "accuracy", -1.0
        ):
            self.progress.best = {"round": round, "accuracy": line["evaluation"]["accuracy"]["mean"]}
        return line

    def _take_announced(self, client: int) -> Announced:
        """Announcements the client has not received yet; from now on it has."""
        missed = self.progress.announced_until - self.progress.received[client]
        self.progress.received[client] = self.progress.announced_until
        recent = self.pending[len(self.pending) - missed :] if missed else []
        return Announced(tuple((a.round, a.frame) for a in recent))

    def _visit_all(self, pool: Pool, round: int, evaluate: bool, train_data: bool) -> list[Evaluation]:
        """Deliver what is pending to every client, and test it if asked to."""
        frame = encode(self.algorithm.evaluation_message(self.server, round) if evaluate else {})
        tasks, weights = [], []
        for first in range(0, self.clients, _CLIENTS_PER_TASK):
            chunk = tuple(range(first, min(first + _CLIENTS_PER_TASK, self.clients)))
            announced = tuple(self._take_announced(k) for k in chunk)
            tasks.append(EvaluateTask(round, chunk, announced, frame, evaluate, train_data))
            weights.append(float(sum(len(self.problem.parts.test[k]) for k in chunk)))
        outcomes: list[EvaluateOutcome] = pool.run(tasks, weights)
        self.pending.clear()
        evaluations = []
        for outcome in outcomes:
            self.dirty |= {k for k, moved in zip(outcome.clients, outcome.changed, strict=True) if moved}
            evaluations += [e for e in outcome.evaluations if e is not None]
        return evaluations

    # -- records ------------------------------------------------------------------------------------------------

    def _layer_sizes(self) -> dict[str, int]:
        return {n: layer.weight.numel() for n, layer in threshold_layers(self.problem.model)}  # type: ignore[operator, misc]

    def _first_layer(self) -> str | None:
        return next((name for name, _ in threshold_layers(self.problem.model)), None)

    def _add_cost(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.progress.cost[name] = self.progress.cost.get(name, 0) + amount

    def _cost_line(self, counted: bool) -> dict[str, Any]:
        cost = self.progress.cost
        if not counted:
            cost["executed_macs"] = float("nan")  # one uncounted client makes the sum unknown, for good
        executed = cost["executed_macs"]
        return {
            "paper": {"communication_bits": cost["paper_bits"], "macs": cost["paper_macs"]},
            "payload": {"up_bytes": cost["up_bytes"], "down_bytes": cost["down_bytes"]},
            "framed": {"up_bytes": cost["up_frame_bytes"], "down_bytes": cost["down_frame_bytes"]},
            "executed": {"macs": None if executed != executed else executed, "steps": cost["steps"]},
            "seconds": {
                "total": cost["train_seconds"] + cost["evaluate_seconds"],
                "train": cost["train_seconds"],
                "evaluate": cost["evaluate_seconds"],
            },
        }

    def _save(self) -> None:
        keep = self.config.simulation.keep_checkpoints
        checkpoint.save(self.folder.checkpoints, self.progress, self.server, self.pending, self.store, self.dirty, keep)
        self.dirty.clear()

    def _summarise(self) -> dict[str, Any]:
        lines = [json.loads(text) for text in (self.folder.path / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line for line in lines if line["evaluation"] is not None]
        summary = {
            "name": self.config.name,
            "algorithm": self.config.algorithm["name"],
            "rounds": len(lines),
            "completed": True,
            "final": evaluated[-1],
            "best": self.progress.best,
            "environment": environment(self.device, self.workers),
        }
        write_atomic(self.folder.path / "summary.json", json.dumps(summary, indent=1))
        return summary


def _same_tensors(a: Message, b: Message) -> bool:
    return a.keys() == b.keys() and all(tensor is b[name] for name, tensor in a.items())


def _mean_figures(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    names = {name for entry in figures for name in entry}
    return {n: float(np.mean([entry[n] for entry in figures if n in entry])) for n in sorted(names)}


# Settings that do not change any result, so a resumed run may have others.
_FREE = {"rounds", "simulation", "data.root"}


def first_difference(stored: RunConfig, given: RunConfig) -> str | None:
    """The first setting in which two configurations would give different results, in words; None if they agree."""

    def compare(a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in a.keys() | b.keys():
                where = f"{path}.{key}" if path else str(key)
                if where not in _FREE and (found := compare(a.get(key), b.get(key), where)):
                    return found
            return None
        return None if a == b else f"{path} is {a!r} there and {b!r} here"

    difference = compare(stored.model_dump(), given.model_dump(), "")
    if difference is None and stored.simulation.engine != given.simulation.engine:
        # Engines agree to rounding, not to the last bit.
        return compare(stored.simulation.engine, given.simulation.engine, "simulation.engine")
    return difference


def run(config: RunConfig, out: Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a configuration in a folder, or resume it there; returns the summary.

    Raises:
        UserError: anything the user can mend, found before work starts.
        FloatingPointError: the training diverged.
    """
    folder = RunFolder(out, resume)
    try:
        return Simulation(config, folder, resume, quiet).run()
    finally:
        folder.close()
