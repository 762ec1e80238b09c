"""The round loop: sample, broadcast, train, merge, announce, evaluate. It knows no algorithm by name."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plugins
from ..algorithms import Evaluation
from ..algorithms.budget import budget_for, reached
from ..callbacks import Callback
from ..config import RunConfig, read_toml, resolve_config
from ..cost import Cost
from ..errors import UserError, WriteError
from ..merge import Merged, Reply, merge_replies
from ..signals import Stopped, catching, held
from ..system import Usage
from ..wire import Message, encode, payload_bytes
from .announcements import AnnouncementLog
from .callbacks import Callbacks, build_callbacks
from .checkpoint import Checkpoint, Checkpoints, State, saved_rounds
from .files import write_atomic
from .ledger import FinishedRound, Ledger, run_summary, without_final_evaluation
from .metrics import client_record, environment
from .placement import pick_device, pick_workers
from .pool import Pool, WorkerDied, spare_processes
from .problem import build_problem, objective_of
from .process import WorkerProcess
from .progress import ProgressLine
from .resident import ClientSetting
from .rows import ClientRows, Turn
from .runfolder import RunFolder
from .same_run import first_difference, run_digest
from .sampling import evaluated_clients, sample_clients
from .spool import write_data
from .tasks import EvaluateOutcome, EvaluateTask, TrainOutcome, TrainTask, WorkerSetup, verified

# Clients per evaluation task: enough to make the cost of a task small, few enough to balance.
_CLIENTS_PER_TASK = 8


class Simulation:
    """A run in its folder.

    Args:
        config: what to run.
        folder: an opened run folder.
        resume: continue from the folder's last checkpoint.
        quiet: no progress line even on a terminal, and no line that says why a device was chosen.
        callbacks: who is told of finished rounds, beside those of the configuration.
        spare: where worker processes are to be put that :meth:`run` takes; None: it starts them itself.

    Attributes:
        round: last finished round, -1 before the first.
        saved: round of the last checkpoint, or -1.
        server: the server's tensors.
        log: announcements that clients have yet to hear.
        ledger: what the rounds cost so far.
        dirty: clients whose tensors changed since the last checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        resume: bool = False,
        quiet: bool = False,
        callbacks: Sequence[Callback] = (),
        spare: list[WorkerProcess] | None = None,
    ) -> None:
        self.callbacks = Callbacks([*build_callbacks(config.callbacks), *callbacks], folder.path)
        self.config = config
        self.folder = folder
        self.quiet = quiet
        self.device, why = pick_device(config)
        if why and not quiet:
            print(f"spafl: {why}", file=sys.stderr)
        self.workers = pick_workers(config, self.device)
        self._spare = spare
        if spare is not None and self.workers > 1:  # they import while the data are read
            spare += [WorkerProcess() for _ in range(self.workers)]
        self.problem = build_problem(config)
        self.system = config.build_system()
        self.algorithm = self.problem.algorithm
        self._check_budgets()
        self.clients = config.partition.clients
        s = config.simulation
        self.checkpoints = Checkpoints(folder.checkpoints, run_digest(config), s.checkpoint_every, s.keep_checkpoints)
        saved, lines = self._continued() if resume else (None, [])

        scratch = folder.fresh_scratch()
        write_data(scratch, self.problem.dataset, self.problem.parts)
        initial = self.problem.client_state
        kind, busy = config.simulation.store, config.sampling.clients_per_round
        self.store = ClientRows(scratch / "clients.bin", initial, self.clients, kind, busy) if initial else None
        self.dirty: set[int] = set()
        self._whole = True  # state, books and metrics are of the same round
        if saved is None:
            self.round = -1
            self.server: dict[str, Tensor] = self.algorithm.server_state(self.problem.model)
            self.log = AnnouncementLog(heard=[0] * self.clients)
            self.ledger = Ledger(self.problem.layer_weights)
        else:
            self.round, self.server, self.log = saved.state.round, saved.server, saved.state.log
            self.ledger = Ledger(self.problem.layer_weights, saved.state.cost)
            if self.store is not None:
                saved.restore(self.store)
        self.saved = self.round
        # Nothing in the folder was touched so far; from here on it holds this run.
        described = self.problem.class_counts()
        if self.system is not None:
            described["devices"] = self.system.classes
        folder.begin(config.to_toml(), json.dumps(described), lines)
        self._before = lines

    def _continued(self) -> tuple[Checkpoint | None, list[dict[str, Any]]]:
        """What to continue from, and the metrics up to there as this run would have written them."""
        config, where = self.config, f"run folder {self.folder.path}"
        raw = read_toml(self.folder.path / "config.toml")
        # Asked first: code that only the folder names must not be imported.
        there, here = plugins.named(raw), config.code
        other = next((s for s in plugins.SETTINGS if there.get(s) != here.get(s)), None)
        difference = other and f"{other} is {there.get(other)!r} there and {here.get(other)!r} here"
        difference = difference or first_difference(resolve_config(raw, stored=True), config)
        if difference:
            raise UserError(f"{where} holds a run of another configuration: {difference}")
        self._check_same_data()
        lines = self.folder.read_metrics()
        saved, refused = self.checkpoints.load(finished=len(lines) - 1)
        done = saved.state.round + 1 if saved else 0
        if done > config.rounds:
            raise UserError(f"{where} holds {done} finished rounds; rounds must be at least that, got {config.rounds}")
        for reason in refused:
            print(f"spafl: {reason}", file=sys.stderr)
        if refused:
            until = max(len(lines), 1 + max(saved_rounds(self.folder.checkpoints)))
            assert saved is not None
            print(f"spafl: {saved.path} is used; rounds {done} to {until - 1} are repeated", file=sys.stderr)
        return saved, [without_final_evaluation(line, config) for line in lines[:done]]

    def _check_budgets(self) -> None:
        """Refuse budgets of time that sending alone exceeds."""
        target, system = self.config.algorithm.get("target"), self.system
        if target is None or system is None:
            return
        server = self.algorithm.server_state(self.problem.model)
        for k, name in enumerate(system.classes):
            budget = budget_for(target, name)
            if budget is None or budget.kind != "seconds":
                continue
            down = payload_bytes(self.algorithm.broadcast(server, 0, k))
            up = payload_bytes(self.algorithm.expected_upload(server, 0, k))
            least = system.seconds(Usage(k, 0, down, up, 0))
            if least >= budget.value:
                raise UserError(
                    f"algorithm.target: {budget.value:g} seconds are not enough for client {k} on a {name}, which "
                    f"takes {least:.3g} to receive and send"
                )

    def _check_same_data(self) -> None:
        """Refuse to go on with other data: a file or a user's loader may give something else than it gave before."""
        now = self.problem.class_counts()
        try:
            then = json.loads((self.folder.path / "partition.json").read_text())
            same = all(then[part] == now[part] for part in ("train", "test"))
        except (OSError, ValueError, KeyError, TypeError):
            return  # not there or damaged: written anew
        if not same:
            raise UserError(
                f"run folder {self.folder.path} holds a run on other data: its clients' samples per class "
                "(partition.json) are not those that data and partition give now"
            )

    def worker_setup(self) -> WorkerSetup:
        """What a worker needs to carry out this run's tasks."""
        setting = ClientSetting(
            self.config.local_training(),
            self.problem.dataset.transform,
            self.problem.macs,
            self.config.seed,
            self.device,
            system=self.system,
            objective=objective_of(self.config, self.problem.dataset),
        )
        setup = WorkerSetup(
            self.algorithm,
            self.problem.model,
            self.config.simulation.engine,
            setting,
            self.problem.uplink,
            self.problem.client_state,
            self.folder.scratch,
            self.store.file if self.store is not None else None,
            self.store.rows if self.store is not None else 0,
        )
        return verified(setup) if self.workers > 1 else setup

    def run(self) -> dict[str, Any]:
        """Run the remaining rounds; returns (and writes) the summary.

        Raises:
            FloatingPointError: a client's loss became NaN or infinite; names client and round.
            TooFewUploads: fewer good uploads than ``sampling.min_uploads`` came back in a round.
            WorkerDied: workers die again and again.
            KeyboardInterrupt, Stopped: a signal came; the round in progress is given up, the finished ones are saved.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same arithmetic in this process as in a worker
        progress = ProgressLine(self.config.name, self.config.rounds, self.round + 1, self.quiet)
        summary = None
        try:
            with held():  # a signal cuts the tasks of a round, nothing else
                try:
                    self.callbacks.start(self.config.name, self.config.rounds, self.config.model_dump(), self._before)
                    with Pool(self.worker_setup(), self.workers, self._spare) as pool:
                        for round in range(self.round + 1, self.config.rounds):
                            self._finish(self.run_round(pool, round), progress)
                        self._evaluate_last(pool)
                    self.checkpoints.tidy(self.saved)  # after a process that was killed when only this was left to do
                except WriteError:
                    raise  # not again
                except BaseException as error:
                    self._save_unfinished(error)
                    raise
            summary = self._summarise()
            return summary
        finally:
            with held():
                self.callbacks.end(summary)
            progress.close()
            torch.set_num_threads(threads)
            if self.store is not None:
                self.store.close()

    def _finish(self, done: FinishedRound, progress: ProgressLine) -> None:
        """Book a round, write its metrics and, if it is time to, a checkpoint."""
        line = self.ledger.book(done)
        self.folder.append_metrics(line)
        self._whole = True
        for rejected in line["rejected"]:
            progress.say(
                f"round {done.round + 1}: upload of client {rejected['client']} left out: {rejected['reason']}"
            )
        progress.update(line)
        self.callbacks.round(line)
        if (done.round + 1) % self.config.simulation.checkpoint_every == 0 or done.round + 1 == self.config.rounds:
            self.save()

    def _save_unfinished(self, error: BaseException) -> None:
        """Save what was finished before the run was cut short, and tell the error."""
        if not self._whole:  # cut by somebody else's signal handler, in the middle of the books
            return
        if self.round > self.saved:
            self.save()
        done = self.round + 1
        what = f"{done} of {self.config.rounds} rounds are finished and saved" if done else "no round was finished"
        stopped = isinstance(error, KeyboardInterrupt | Stopped | WorkerDied)
        error.add_note(f"{what}; continue with --resume" if stopped else what)

    def run_round(self, pool: Pool, round: int) -> FinishedRound:
        """Train the sampled clients of a round, merge what they send, and evaluate if it is time to.

        If it is cut short by an exception, the run is as it was at the end of the round before.
        """
        before = self.server, self.log.copy(), set(self.dirty)
        try:
            done = self._run_round(pool, round)
        except BaseException:
            self.server, self.log, self.dirty = before
            if self.store is not None:
                self.store.abandon()
            raise
        self._whole = False
        if self.store is not None:
            self.store.commit()
        self.round = round
        return done

    def _run_round(self, pool: Pool, round: int) -> FinishedRound:
        config, algorithm = self.config, self.algorithm
        start = time.perf_counter()
        needed, away, clock = config.sampling.clients_per_round, 0, self.ledger.cost.modelled_seconds
        if self.system is None:
            sampled = sample_clients(config, round)
        else:
            sampled, away = self.system.asked(round, clock, needed)
        tasks, messages, sent = self._broadcast(round, sampled)
        sizes = [len(self.problem.parts.train[k]) for k in sampled]
        outcomes: list[TrainOutcome] = pool.run(tasks, sizes)
        played, kept, came = None, set(sampled), set(sampled)
        if self.system is not None:
            played = self.system.play(round, clock, needed, [o.usage for o in outcomes if o.usage], away)
            kept, came = played.kept, played.merged
            sent += Cost(modelled_seconds=played.seconds, modelled_joules=played.joules)
        for task in tasks:
            if task.client in kept:  # a turn that broke off has never been
                self._stage(task.client, task.turn)
        self.log.forget_heard()

        replies = [Reply(o.client, o.samples, o.frame) for o in outcomes if o.client in came]
        minimum = config.sampling.min_uploads
        if played is not None and len(replies) < minimum:  # nothing comes of the round but the time it took
            merged = Merged(self.server, {}, (), (), 0, 0)
        else:
            merged = merge_replies(
                algorithm, self.server, round, messages, replies, self.problem.uplink, self.clients, minimum
            )
        sent += Cost(
            paper_bits=algorithm.paper_bits(self.server, len(sampled)),
            up_bytes=merged.up_bytes,
            up_frame_bytes=merged.up_frame_bytes,
        )
        self.server, announcement = merged.server, merged.announcement
        if announcement:
            frame = self._encode(announcement, round)
            self.log.announce(round, frame)
            sent += Cost(
                down_bytes=payload_bytes(announcement) * self.clients, down_frame_bytes=len(frame) * self.clients
            )
        trained = time.perf_counter()

        evaluations = None
        if config.evaluates(round):
            evaluations = self.evaluate(pool, round, config.tests_training_data(round))
        seconds = Cost(train_seconds=trained - start, evaluate_seconds=time.perf_counter() - trained)
        cost = Cost.sum(o.training.cost for o in outcomes) + sent + seconds
        done = [o for o in outcomes if o.client in merged.accepted]
        trainings, accepted = [o.training for o in done], [o.client for o in done]
        return FinishedRound(round, sampled, trainings, merged.rejected, cost, evaluations, accepted, played)

    def _turn(self, client: int, changes: bool = True) -> Turn | None:
        return self.store.turn(client, changes) if self.store is not None else None

    def _stage(self, client: int, turn: Turn | None) -> None:
        self.dirty.add(client)
        self.log.mark_heard(client)
        if self.store is not None and turn is not None:
            self.store.stage(client, turn)

    def _encode(self, message: Message, round: int) -> bytes:
        return encode(message, round, self.problem.uplink.model)

    def _broadcast(self, round: int, sampled: list[int]) -> tuple[list[TrainTask], dict[int, Message], Cost]:
        """The tasks of the sampled clients, their messages by client, and what these cost."""
        shared: tuple[Message, bytes] = ({}, self._encode({}, round))  # one for all clients that get the same tensors
        tasks, messages, sent = [], {}, Cost()
        for k in sampled:
            message = messages[k] = self.algorithm.broadcast(self.server, round, k)
            if not _same_tensors(message, shared[0]):
                shared = (message, self._encode(message, round))
            frame = shared[1]
            if message:
                sent += Cost(down_bytes=payload_bytes(message), down_frame_bytes=len(frame))
            tasks.append(TrainTask(round, k, frame, self.log.missed(k), self._turn(k), bool(message)))
        return tasks, messages, sent

    def evaluate(self, pool: Pool, round: int, train_data: bool) -> list[Evaluation]:
        """Test clients as they would start their next turn, and record what each got; nothing of the run changes."""
        chosen = evaluated_clients(self.config, round)
        frame = self._encode(self.algorithm.evaluation_message(self.server, round), round)
        tasks, weights = [], []
        for first in range(0, len(chosen), _CLIENTS_PER_TASK):
            chunk = tuple(chosen[first : first + _CLIENTS_PER_TASK])
            announced = tuple(self.log.missed(k) for k in chunk)
            turns = tuple(self._turn(k, changes=False) for k in chunk)
            tasks.append(EvaluateTask(round, chunk, announced, turns, frame, train_data))
            weights.append(float(sum(len(self.problem.parts.test[k]) for k in chunk)))
        outcomes: list[EvaluateOutcome] = pool.run(tasks, weights)
        evaluations = [evaluation for outcome in outcomes for evaluation in outcome.evaluations]
        self.folder.write_results(round, (client_record(k, e) for k, e in zip(chosen, evaluations, strict=True)))
        return evaluations

    def _evaluate_last(self, pool: Pool) -> None:
        """Make up for the last evaluation, where a run of more rounds, which has none there, was cut to these."""
        lines = self.folder.read_metrics()
        wanted = self.config.tests_training_data(self.round)
        evaluation = lines[-1]["evaluation"]
        if evaluation is not None and (evaluation["train_accuracy"] is not None or not wanted):
            return
        start = time.perf_counter()
        evaluations = self.evaluate(pool, self.round, wanted)
        self.ledger.evaluated(lines[-1], evaluations, Cost(evaluate_seconds=time.perf_counter() - start))
        self.folder.rewrite_metrics(lines)

    def save(self) -> None:
        """Write a checkpoint of the last finished round."""
        self.checkpoints.save(State(self.round, self.ledger.cost, self.log), self.server, self.store, self.dirty)
        self.dirty.clear()
        self.saved = self.round

    def _summarise(self) -> dict[str, Any]:
        where = environment(self.device, self.workers)
        lines = self.folder.read_metrics()
        summary = run_summary(self.config.name, self.config.algorithm["name"], lines, where)
        if (target := self.config.algorithm.get("target")) is not None:
            summary["budget"] = reached(target, lines, self.system.classes if self.system else None)
        write_atomic(self.folder.summary, json.dumps(summary, indent=1))
        return summary


def _same_tensors(a: Message, b: Message) -> bool:
    return a.keys() == b.keys() and all(tensor is b[name] for name, tensor in a.items())


def run(
    config: RunConfig, out: Path, resume: bool = False, quiet: bool = False, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run a configuration in a folder, or resume it there; returns the summary.

    Raises:
        UserError: anything the user can mend, found before work starts.
        FloatingPointError: the training diverged.
        WriteError: a file of the run could not be written.
        WorkerDied: workers die again and again.
        KeyboardInterrupt, Stopped: SIGINT; SIGTERM or SIGHUP (see :mod:`spafl.signals`).
    """
    folder: RunFolder | None = None
    with catching(), spare_processes() as spare:
        try:
            with held():
                folder = RunFolder(out, resume)
            return Simulation(config, folder, resume, quiet, callbacks, spare).run()
        except WriteError as error:
            saved = saved_rounds(folder.checkpoints) if folder is not None else []
            error.add_note(f"rounds 0 to {saved[-1]} are saved" if saved else "no round was saved yet")
            if folder is not None and (folder.path / "config.toml").exists():
                error.add_note("--resume continues")
            raise
        finally:
            if folder is not None:
                with held():
                    folder.close()
