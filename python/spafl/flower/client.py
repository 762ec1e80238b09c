"""The client's side of a distributed run: bytes in, bytes out; it trains exactly as a worker of the simulator does.

What leaves a client is what the algorithm's file sends, its sample count and its training cost; and, unless its owner
said ``metrics=false``, its loss, accuracies and densities. Everything else stays on its disk.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spafl_kernels import __version__

from .. import plugins
from ..algorithms import Client, Samples
from ..config import RunConfig
from ..cost import Cost
from ..data import DataError, Dataset
from ..errors import UserError
from ..simulation.placement import pick_device
from ..simulation.problem import (
    Method,
    build_method,
    check_single_samples,
    cut_data,
    load_data,
    model_input,
    objective_of,
)
from ..simulation.resident import ClientSetting, Resident
from ..wire import WireError, decode
from .disk import ClientDisk, ClientState, digest
from .parcel import number, pack, unpack
from .refusals import DataRefused, told, unexplained, without_quotes

PROTOCOL = 1
"""Of the headers; a server and a client of different ones, or of different releases, refuse each other."""

# Of a configuration, what the machines of a run may have different from one another.
_OWN = {"rounds", "simulation", "flower"}

LOG = logging.getLogger("flwr")  # Flower's, where there is one


def run_digest(config: RunConfig) -> str:
    """64 bits of what server and clients have to agree on."""
    told = config.model_dump(mode="json", exclude=_OWN)
    told["data"].pop("root", None)
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Site:
    """What one machine brings to a run.

    Attributes:
        config: the run's configuration, with this machine's engine and device.
        data: import path ``package.module:function`` of a function without arguments that returns a
            :class:`~spafl.data.Dataset`, all of which is this client's; None: the client's part of the configured data.
        state: folder of the clients' private state.
        metrics: whether loss, accuracies and densities may be told.
    """

    config: RunConfig
    data: str | None
    state: Path
    metrics: bool = True

    def samples(self, client: int) -> tuple[Dataset, Samples, Samples]:
        """The client's data set, training and test samples.

        Raises:
            UserError: data missing or corrupt, an unknown function, or no samples.
        """
        config = self.config
        if self.data is not None:
            dataset = _called(self.data)
            train, test = (None, None)
        else:
            dataset = _configured(config)
            parts = cut_data(config, dataset)
            train, test = (torch.from_numpy(part[client]) for part in (parts.train, parts.test))
        samples = [
            Samples(torch.from_numpy(x), torch.from_numpy(y), index)
            for x, y, index in ((dataset.train_x, dataset.train_y, train), (dataset.test_x, dataset.test_y, test))
        ]
        for kind, part in zip(("training", "test"), samples, strict=True):
            if not len(part):
                raise UserError(f"client {client} has no {kind} samples")
        return dataset, samples[0], samples[1]


def _configured(config: RunConfig) -> Dataset:
    try:
        return load_data(config)
    except UserError as error:
        raise DataRefused(str(error), without_quotes(str(error))) from None


def _called(path: str) -> Dataset:
    load = plugins.find("data", path)
    try:
        made = load()
    except (DataError, UserError) as error:  # of this package, which checks what makes a data set
        raise DataRefused(
            f"data: {path} failed: {error}", f"data: {path} failed: {without_quotes(str(error))}"
        ) from None
    except Exception as error:  # the owner's code may raise anything
        what = f"data: {path} failed"
        raise DataRefused(f"{what}: {plugins.explain(error)}", f"{what}: {unexplained(error)}") from None
    if not isinstance(made, Dataset):
        raise UserError(f"data: {path} must return a spafl.data.Dataset; got {type(made).__name__}")
    return made


class ClientSide:
    """Client number ``client`` of a run; see :meth:`answer`.

    Raises:
        UserError: no such client, a device that is not there, or data or model that do not fit; see :class:`Site`.
    """

    def __init__(self, site: Site, client: int) -> None:
        clients = site.config.partition.clients
        if not 0 <= client < clients:
            raise UserError(f"client-id must be 0 to {clients - 1} in this run; got {client}")
        self.site, self.client = site, client
        self.device, _ = pick_device(site.config)
        self.digest = run_digest(site.config)
        self.dataset, self._train, self._test = site.samples(client)
        self.method: Method = build_method(
            site.config, self.dataset.outputs, self.dataset.shape, str(self.dataset.train_x.dtype)
        )
        self.objective = replace(objective_of(site.config, self.dataset), confusion=0)
        sample = model_input(site.config, self.dataset.shape, str(self.dataset.train_x.dtype))
        check_single_samples(site.config, self.method.model, sample, {client: len(self._train)})
        self._resident: Resident | None = None

    def answer(self, kind: str, raw: object) -> bytes:
        """What the client replies to a message of the server.

        A refusal is a reply too, with ``error`` in its header; the private state is as it was then.

        Args:
            kind: ``"query"``, ``"train"`` or ``"evaluate"``.
            raw: a parcel.
        """
        acts: dict[str, Callable[[dict[str, Any], list[bytes], ClientDisk], bytes]] = {
            "query": self._query,
            "train": self._train_round,
            "evaluate": self._evaluate,
        }
        try:
            header, frames = unpack(raw)
            self._check(kind, header)
            disk = ClientDisk(self.site.state, _run_name(header), self.client)
            # A process whose node was killed may still be at work; the server waits no longer than this either.
            with disk.turn(self.site.config.flower.round_timeout):
                reply = acts[kind](header, frames, disk)
                if kind == "evaluate":
                    disk.keep_test(pack(header, frames))
                return reply
        except (UserError, WireError, ArithmeticError) as error:
            LOG.error("spafl: %s", error)
            return self._reply({"error": told(error)})
        except Exception as error:  # of the owner's plug-ins, or of PyTorch
            LOG.exception("spafl: %s", plugins.explain(error))
            return self._reply({"error": told(error)})

    # -- acts

    def _query(self, header: dict[str, Any], frames: list[bytes], disk: ClientDisk) -> bytes:
        state = disk.load(self.method.client_state)
        samples = {"image": list(self.dataset.shape), "dtype": str(self.dataset.train_x.dtype)}
        # Its own normalisation tells of its data, and stays here.
        described = {"classes": self.dataset.outputs, **samples, **self.dataset.about()}
        disk.describe(self.site.config.to_toml(), json.dumps(described))
        if not disk.path.exists():
            disk.save(state)  # from here on the client has its instance
        return self._reply(
            {
                "instance": state.instance,
                "heard": state.heard,
                "trained": state.trained,
                "outputs": self.dataset.outputs,
                "numbers": not self.dataset.classes,
                **samples,
                "model": f"{self.method.uplink.model:016x}",
                "samples": len(self._train),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__,
            }
        )

    def _train_round(self, header: dict[str, Any], frames: list[bytes], disk: ClientDisk) -> bytes:
        round = number(header, "round")
        if not frames:
            raise WireError("a training message without thresholds or weights: its frame is missing")
        state = disk.load(self.method.client_state)
        task = digest(frames[0])
        if round == state.trained and task == state.task:
            return state.reply  # the server has not seen the answer, or forgotten it; training again would be wrong
        if round <= state.trained:
            raise WireError(
                f"round {round + 1} is over for this client: it has trained in round {state.trained + 1} already"
            )
        message = decode(frames[0], round, self.method.uplink.model)
        client = self._lend(state)
        self._listen(client, state, header, frames[1:])
        training = self.method.algorithm.train(client, message, round)
        stream = client.stream("rounding", round)
        frame = self.method.uplink.pack(training.message, frames[0], round, client.memory, stream)
        self._take_back()
        before = _after_merge(state.unmerged, header)
        answer: dict[str, Any] = {
            "round": round,
            "heard": state.heard,
            **_unmerged(before),
            "samples": len(self._train),
            "cost": asdict(replace(training.cost, train_seconds=0)),
        }
        if self.site.metrics:
            answer |= {"loss": training.loss, "figures": training.figures}
        state.unmerged = (*before, round)
        state.trained, state.task, state.reply = round, task, self._reply(answer, [frame])
        disk.save(state)
        return state.reply

    def _evaluate(self, header: dict[str, Any], frames: list[bytes], disk: ClientDisk) -> bytes:
        round = number(header, "round")
        if not frames:
            raise WireError("an evaluation message without its frame")
        state = disk.load(self.method.client_state)
        message = decode(frames[0], round, self.method.uplink.model)
        answer: dict[str, Any] = {"round": round, "heard": state.heard}
        answer |= _unmerged(_after_merge(state.unmerged, header))
        if self.site.metrics:
            # Nothing is kept: an evaluation changes no client, and what it hears here it hears again when it trains.
            client = self._lend(state)
            self._listen(client, state, header, frames[1:])
            result = self.method.algorithm.evaluate(client, message, header.get("train_data") is True)
            if not math.isfinite(result.loss):
                raise ArithmeticError(
                    f"the test loss of client {self.client} became {result.loss} in round {round + 1}"
                )
            answer["evaluation"] = asdict(replace(result, masks=None))
        return self._reply(answer)

    # -- parts of acts

    def _check(self, kind: str, header: Mapping[str, Any]) -> None:
        if header.get("protocol") != PROTOCOL:
            raise WireError(f"the server speaks protocol {header.get('protocol')}; this client speaks {PROTOCOL}")
        if header.get("version") != __version__:
            raise WireError(f"the server runs version {header.get('version')} of spafl; this client has {__version__}")
        if header.get("config") != self.digest:
            raise WireError(
                f"the server runs another configuration ({header.get('config')}) than client {self.client} has "
                f"({self.digest})"
            )
        if "refused" in header:
            raise UserError(f"the server refused this client: {header['refused']}")
        if "stopped" in header:
            raise UserError(f"the server stopped the run: {header['stopped']}")
        if kind != "query" and header.get("client") != self.client:
            raise WireError(f"a message for client {header.get('client')} came to client {self.client}")

    def _reply(self, told: dict[str, Any], frames: Sequence[bytes] = ()) -> bytes:
        who = {"protocol": PROTOCOL, "version": __version__, "config": self.digest, "client": self.client}
        return pack({**who, **told}, frames)

    def _lend(self, state: ClientState) -> Client:
        if self._resident is None:
            config = self.site.config
            setting = ClientSetting(
                config.local_training(), self.dataset.transform, self.method.macs, config.seed, self.device,
                objective=self.objective,
            )  # fmt: skip
            self._resident = Resident(
                self.method.algorithm,
                copy.deepcopy(self.method.model),
                config.simulation.engine,
                setting,
                self.method.client_state,
            )
        return self._resident.lend(self.client, state.tensors, self._train, self._test)

    def _take_back(self) -> None:
        assert self._resident is not None
        self._resident.take_back()

    def _listen(self, client: Client, state: ClientState, header: Mapping[str, Any], frames: list[bytes]) -> None:
        """Announcements the client has missed, oldest first, each once."""
        for round, frame in missed(state.heard, header, frames):
            self.method.algorithm.receive(client, decode(frame, round, self.method.uplink.model), round)
            state.heard += 1


def _after_merge(rounds: Sequence[int], header: Mapping[str, Any]) -> tuple[int, ...]:
    """Of rounds that were trained in, those later than the last one that the server has merged."""
    merged = number(header, "merged", -1) if "merged" in header else -1
    return tuple(round for round in rounds if round > merged)


def _unmerged(rounds: Sequence[int]) -> dict[str, Any]:
    return {"unmerged": list(rounds)} if rounds else {}


def refusal(error: Exception) -> bytes:
    """The reply of a client that cannot even be made: no data, a wrong setting."""
    LOG.error("spafl: %s", error)
    return pack({"protocol": PROTOCOL, "version": __version__, "error": told(error)})


def missed(heard: int, header: Mapping[str, Any], frames: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Of the announcements in a message, with their rounds, those after the first ``heard`` of the run.

    Raises:
        WireError: some are not there.
    """
    first, rounds = number(header, "first"), header.get("rounds")
    if first > heard:
        raise WireError(f"announcements {heard} to {first - 1} are missing: the server has to send them again")
    if not isinstance(rounds, list) or len(rounds) != len(frames):
        raise WireError(f"rounds must name the rounds of {len(frames)} announcements; got {rounds!r}")
    return list(zip(rounds, frames, strict=True))[heard - first :]


def _run_name(header: Mapping[str, Any]) -> str:
    name = header.get("run")
    # It names a folder here: nothing but what a server draws.
    if not isinstance(name, str) or len(name) != 32 or set(name) - set("0123456789abcdef"):
        raise WireError(f"run must be 32 hexadecimal digits; got {name!r}")
    return name


def cost_of(told: object) -> Cost:
    """The cost in a reply's header.

    Raises:
        WireError: it is not one.
    """
    if not isinstance(told, dict):
        raise WireError(f"cost must be a table; got {told!r}")
    amounts = {}
    for name in ("paper_macs", "executed_macs", "steps"):
        value = told.get(name, 0)
        fine = value is None and name == "executed_macs"
        fine |= isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
        if not fine:
            raise WireError(f"cost.{name} must be a number >= 0; got {value!r}")
        amounts[name] = value
    return Cost(**amounts)
