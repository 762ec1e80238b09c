"""The server's side of a distributed run: the simulator's round, its records and its checkpoints, over any link.

A round is saved once it is merged and before anybody hears of it: a server that dies after that goes on with the next
one, and clients that had trained in an unfinished round answer again without training again.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..algorithms import Evaluation, Training
from ..config import RunConfig, load_config
from ..cost import Cost
from ..errors import UserError, WriteError
from ..merge import Rejection, Reply, TooFewUploads, merge_replies
from ..simulation.announcements import AnnouncementLog
from ..simulation.checkpoint import Checkpoints, State
from ..simulation.files import write_atomic
from ..simulation.ledger import FinishedRound, Ledger, run_summary, without_final_evaluation
from ..simulation.metrics import client_record, environment
from ..simulation.placement import CPU
from ..simulation.problem import build_method
from ..simulation.runfolder import RunFolder
from ..simulation.same_run import first_difference
from ..simulation.same_run import run_digest as decisive_digest
from ..simulation.sampling import evaluated_clients, sample_clients
from ..wire import Message, WireError, decode, encode, payload_bytes
from .client import cost_of
from .link import Link
from .parcel import number
from .roster import Form, Roster, arithmetics, check_start, read_reply, unmerged_rounds

_PAUSE = 1.0  # seconds between two looks at who has come


def run_identity(folder: RunFolder) -> str:
    """The name under which clients keep their state of this run: 32 hexadecimal digits, drawn once.

    Raises:
        UserError: the folder's ``flower.json`` is damaged.
    """
    path = folder.path / "flower.json"
    if not path.exists():
        write_atomic(path, json.dumps({"run": uuid.uuid4().hex}))
    try:
        run = json.loads(path.read_text())["run"]
        if len(run) != 32 or int(run, 16) < 0:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: it should name the run") from None
    return run


@dataclass
class TrainingRound:
    """A round that has been prepared.

    Attributes:
        absent: sampled clients that are not there.
        sent: messages by client.
        parcels: the same, packed with what the client has missed.
        cost: of sending them.
        began: when they were ready to be sent, on a steady clock.
    """

    round: int
    sampled: list[int]
    absent: list[int]
    sent: dict[int, Message] = field(default_factory=dict)
    parcels: dict[int, bytes] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    began: float = field(default_factory=time.monotonic)


class Coordinator:
    """The server of a run.

    Args:
        config: of the run.
        folder: an opened run folder, new or to be resumed.
        roster: with at least one client, which tells what the data look like.
        link: to the clients.

    Raises:
        UserError: the folder holds another run, a damaged checkpoint, or the model does not fit.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, roster: Roster, link: Link) -> None:
        assert roster.form is not None
        self.config, self.folder, self.roster, self.link = config, folder, roster, link
        form = roster.form
        self.method = build_method(config, form.outputs, form.samples, form.dtype)
        if f"{self.method.uplink.model:016x}" != form.model:
            raise UserError(f"clients have another model than the server: fingerprint {form.model}")
        self.clients = config.partition.clients
        stored = folder.path / "config.toml"
        self.checkpoints = Checkpoints(
            folder.checkpoints, decisive_digest(config), 1, config.simulation.keep_checkpoints
        )
        self.round = -1
        self.server: dict[str, Tensor] = self.method.algorithm.server_state(self.method.model)
        self.log = AnnouncementLog(heard=[0] * self.clients)
        self.ledger = Ledger(self.method.layer_weights)
        lines: list[dict[str, Any]] = []
        if stored.exists():
            difference = first_difference(load_config(stored, stored=True), config)
            if difference:
                raise UserError(f"run folder {folder.path} holds a run of another configuration: {difference}")
            lines = folder.read_metrics()
            saved, refused = self.checkpoints.load(finished=len(lines) - 1)
            for reason in refused:
                link.say(reason)
            if saved is not None:
                self.round, self.server, self.log = saved.state.round, saved.server, saved.state.log
                self.ledger = Ledger(self.method.layer_weights, saved.state.cost)
            lines = [without_final_evaluation(line, config) for line in lines[: self.round + 1]]
        folder.begin(config.to_toml(), json.dumps(self._partition(form)), lines)
        self._merged = {client: line["round"] for line in lines for client in line["merged"]}
        self._noted = {(each["client"], each["round"]) for line in lines for each in line.get("unmerged", [])}

    def _partition(self, form: Form) -> dict[str, Any]:
        """How many samples each client has; of which classes, and how they are normalised, is its own business."""
        counts = [self.roster.seats[k].samples if k in self.roster.seats else 0 for k in range(self.clients)]
        numbers = form.targets == "numbers"
        classes = 1 if numbers else form.outputs
        rows = [[count] + [0] * (classes - 1) for count in counts]
        return {
            "classes": classes,
            "targets": {"outputs": form.outputs, "edges": []} if numbers else None,
            "image": list(form.samples),
            "dtype": form.dtype,
            "class_names": None,
            "normalisation": None,
            "train": rows,
            "test": rows,
            "labels": "not told",
        }

    # -- the run

    def run(self) -> dict[str, Any]:
        """All remaining rounds; returns, and writes, the summary.

        Raises:
            TooFewUploads: fewer good uploads than ``sampling.min_uploads`` came back in a round.
        """
        timeout = self.config.flower.round_timeout
        lines = self.folder.read_metrics()
        line = lines[-1] if lines else None
        unfinished = line is not None and self.config.evaluates(self.round) and line["evaluation"] is None
        while unfinished or self.round + 1 < self.config.rounds:
            if line is None or not unfinished:  # else the server died over the evaluation
                asked = self.ask()
                line = self.take(asked, self.link.exchange("train", asked.parcels, timeout))
            if self.config.evaluates(self.round):
                self.take_evaluation(line, self.link.exchange("evaluate", self.ask_evaluation(line), timeout))
            unfinished = False
            shown = line["evaluation"]
            accuracy = "" if shown is None else f", accuracy {100 * shown['accuracy']['mean']:.1f} %"
            self.link.say(f"round {self.round + 1} of {self.config.rounds}: {len(line['merged'])} uploads{accuracy}")
        return self._summarise()

    def ask(self) -> TrainingRound:
        """Prepare the next round: waits for its sampled clients, and says what each that is there is sent."""
        config, round = self.config, self.round + 1
        self.log.forget_heard()
        sampled = sample_clients(config, round)
        present = self.link.gather(sampled, config.flower.patience)
        asked = TrainingRound(round, sampled, [k for k in sampled if k not in present])
        for k in sampled:
            if k in present:
                asked.sent[k] = self.method.algorithm.broadcast(self.server, round, k)
                asked.parcels[k], tensors = self._parcel(k, round, asked.sent[k])
                asked.cost += Cost(down_bytes=tensors, down_frame_bytes=len(asked.parcels[k]))
        return asked

    def take(self, asked: TrainingRound, answers: Mapping[int, bytes | str]) -> dict[str, Any]:
        """Merge what came back, save, and return the round's line of the metrics.

        Args:
            answers: replies by client, or why there is none.

        Raises:
            TooFewUploads: the state is as before.
        """
        round, algorithm = asked.round, self.method.algorithm
        replies, told, lost, refused = [], {}, [], []
        trained_before: list[tuple[int, int]] = []
        for k in asked.sent:
            raw = answers.get(k, "no answer")
            if isinstance(raw, str):
                lost.append(Rejection(k, raw))
                continue
            try:
                header, frames = read_reply(raw, self.roster.digest)
                if number(header, "client") != k:
                    raise WireError(f"client {header['client']} answered for client {k}")
                if len(frames) != 1:
                    raise WireError(f"an upload is one frame; got {len(frames)}")
                told[k], heard, unmerged = _training(header), number(header, "heard"), unmerged_rounds(header)
            except WireError as error:
                refused.append(Rejection(k, str(error)))
                continue
            self._heard(k, heard)
            trained_before += [(k, r) for r in unmerged]
            replies.append(Reply(k, header.get("samples"), frames[0]))  # type: ignore[arg-type]
        merged = merge_replies(
            algorithm, self.server, round, asked.sent, replies, self.method.uplink, self.clients,
            self.config.sampling.min_uploads, [*lost, *refused],
        )  # fmt: skip
        cost = asked.cost + Cost(
            paper_bits=algorithm.paper_bits(self.server, len(asked.sent)),
            up_bytes=merged.up_bytes,
            up_frame_bytes=sum(len(raw) for raw in answers.values() if isinstance(raw, bytes)),
            train_seconds=time.monotonic() - asked.began,
        )
        cost += Cost.sum(told[k].cost for k in told)
        self.server, self.round = merged.server, round
        if merged.announcement:
            self.log.announce(round, encode(merged.announcement, round, self.method.uplink.model))
        trained = [k for k in merged.accepted if not math.isnan(told[k].loss)]
        trainings = [told[k] for k in trained]
        rejected = [*refused, *merged.rejected]
        line = self.ledger.book(FinishedRound(round, asked.sampled, trainings, rejected, cost, None, trained))
        line |= {
            "merged": list(merged.accepted),
            "absent": asked.absent,
            "lost": [{"client": r.client, "reason": r.reason} for r in lost],
            "unmerged": [],
        }
        self._note_unmerged(line, trained_before)
        self._merged |= dict.fromkeys(merged.accepted, round)
        for r in (*lost, *rejected):
            self.link.say(f"round {round + 1}: client {r.client}: {r.reason}")
        self.folder.append_metrics(line)
        self._save()
        return line

    def _parcel(self, client: int, round: int, message: Message, **more: Any) -> tuple[bytes, int]:
        """A client's message with the announcements it has not heard, and the bytes of their tensors."""
        first = self.log.made - len(self.log.pending)
        # The client's own word: it may have heard one whose receipt was lost, or have started anew.
        known = self.log.heard[client] = min(max(self.roster.seats[client].heard, first), self.log.made)
        missed = self.log.pending[known - first :]
        header = {
            "client": client, "round": round, "first": known, "rounds": [a.round for a in missed],
            "merged": self._merged.get(client, -1), **more,
        }  # fmt: skip
        frame = encode(message, round, self.method.uplink.model)
        tensors = payload_bytes(message) + sum(payload_bytes(decode(a.frame)) for a in missed)
        return self.roster.parcel(header, [frame, *(a.frame for a in missed)]), tensors

    def _heard(self, client: int, count: int) -> None:
        self.log.heard[client] = min(count, self.log.made)
        self.roster.seats[client] = replace(self.roster.seats[client], heard=count)

    def _note_unmerged(self, line: dict[str, Any], told: Sequence[tuple[int, int]]) -> None:
        """Write down, once, in which rounds clients have trained that were merged without them."""
        for client, round in told:
            if self._merged.get(client, -1) < round <= line["round"] and (client, round) not in self._noted:
                self._noted.add((client, round))
                line["unmerged"].append({"client": client, "round": round})

    def ask_evaluation(self, line: Mapping[str, Any]) -> dict[int, bytes]:
        """What clients are sent to be tested after the round of ``line``, and brought up to date."""
        round = line["round"]
        chosen = evaluated_clients(self.config, round)
        present = self.link.gather(chosen, self.config.flower.patience)
        message = self.method.algorithm.evaluation_message(self.server, round)
        train_data = self.config.tests_training_data(round)
        return {k: self._parcel(k, round, message, train_data=train_data)[0] for k in chosen if k in present}

    def take_evaluation(self, line: dict[str, Any], answers: Mapping[int, bytes | str]) -> None:
        """Enter what clients told; an evaluation is of all that were to be tested or none."""
        evaluations: list[Evaluation] = []
        chosen = evaluated_clients(self.config, line["round"])
        for k in chosen:
            raw = answers.get(k, "not there")
            try:
                if isinstance(raw, str):
                    raise WireError(raw)
                header, _ = read_reply(raw, self.roster.digest)
                if number(header, "client") != k:
                    raise WireError(f"client {header['client']} answered for client {k}")
                self._heard(k, number(header, "heard"))
                self._note_unmerged(line, [(k, round) for round in unmerged_rounds(header)])
                evaluation = _evaluation(header.get("evaluation"), set(self.method.layer_weights))
                if evaluations and (evaluation.densities or {}).keys() != (evaluations[0].densities or {}).keys():
                    raise WireError("densities must be those of the layers that other clients tell")
                evaluations.append(evaluation)
            except WireError as error:
                line["lost"].append({"client": k, "reason": f"evaluation: {error}"})
                self.link.say(f"round {line['round'] + 1}: evaluation of client {k}: {error}")
        if len(evaluations) == len(chosen):
            records = (client_record(k, e) for k, e in zip(chosen, evaluations, strict=True))
            self.folder.write_results(line["round"], records)
            self.ledger.evaluated(line, evaluations)
        self._replace_last(line)

    # -- records

    def _replace_last(self, line: dict[str, Any]) -> None:
        self.folder.rewrite_metrics([*self.folder.read_metrics()[:-1], line])

    def _save(self) -> None:
        self.checkpoints.save(State(self.round, self.ledger.cost, self.log), self.server)

    def _summarise(self) -> dict[str, Any]:
        lines = self.folder.read_metrics()
        name, where = self.config.algorithm["name"], environment(CPU, len(self.roster.seats))
        where["clients"] = arithmetics(self.roster)
        if any(line["evaluation"] for line in lines):
            summary = run_summary(self.config.name, name, lines, where)
        else:  # clients keep their figures to themselves
            summary = {"name": self.config.name, "algorithm": name, "rounds": len(lines), "completed": True}
            summary |= {"final": lines[-1], "best": {}, "environment": where}
        write_atomic(self.folder.summary, json.dumps(summary, indent=1))
        return summary


@contextmanager
def telling_why(link: Link) -> Iterator[None]:
    """Have clients know why a run stopped, too."""
    try:
        yield
    except (UserError, TooFewUploads, WriteError) as error:
        link.stop(str(error))
        raise


def open_run(config: RunConfig, folder: RunFolder, link: Link) -> Coordinator:
    """The server of a run, once ``flower.start_clients`` clients are there.

    Raises:
        UserError: too few came within ``flower.patience``, or see :class:`Coordinator`.
    """
    wanted = config.flower.start_clients or config.partition.clients
    end = time.monotonic() + config.flower.patience
    while len(link.gather((), config.flower.patience)) < wanted and time.monotonic() < end:
        time.sleep(_PAUSE)
    check_start(link.roster)
    alike = arithmetics(link.roster)
    if len(alike) > 1:
        who = "; ".join(f"{name}: clients {', '.join(map(str, clients[:9]))}" for name, clients in alike.items())
        link.say(f"no single machine has all bits of this run, because clients compute differently ({who})")
    return Coordinator(config, folder, link.roster, link)


def _training(header: Mapping[str, Any]) -> Training:
    """What a client tells of its training; NaN for a loss that it keeps to itself.

    Raises:
        WireError: a figure that is none.
    """
    loss, figures = header.get("loss", math.nan), header.get("figures", {})
    if not _is_number(loss) and not (isinstance(loss, float) and math.isnan(loss)):
        raise WireError(f"loss must be a finite number; got {loss!r}")
    if not isinstance(figures, dict) or not all(_is_number(value) for value in figures.values()):
        raise WireError("figures must be finite numbers by name")
    return Training({}, float(loss), cost_of(header.get("cost", {})), figures)


def _evaluation(told: object, layers: Collection[str]) -> Evaluation:
    """A client's evaluation.

    Raises:
        WireError: it keeps it to itself, or tells nonsense.
    """
    if told is None:
        raise WireError("keeps its figures to itself")
    if not isinstance(told, dict):
        raise WireError(f"evaluation must be a table; got {told!r}")
    accuracy: Any = told.get("accuracy")
    trained, densities = told.get("train_accuracy"), told.get("densities")
    if densities is not None and (not isinstance(densities, dict) or not set(layers) >= set(densities) > set()):
        raise WireError("densities must be those of the model's layers")
    shares: Sequence[Any] = [accuracy, *([] if trained is None else [trained]), *(densities or {}).values()]
    if not all(_is_number(share) and 0 <= share <= 1 for share in shares):
        raise WireError("accuracies and densities must be shares from 0 to 1")
    loss: Any = told.get("loss")
    if not _is_number(loss):
        raise WireError(f"loss must be a finite number; got {loss!r}")
    return Evaluation(number(told, "samples", 1), loss, accuracy, trained, densities)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
