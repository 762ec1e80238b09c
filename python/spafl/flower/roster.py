"""Who takes part in a distributed run: which node speaks for which client."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from spafl_kernels import __version__

from ..config import RunConfig
from ..errors import UserError
from ..wire import WireError
from .client import PROTOCOL, run_digest
from .parcel import number, pack, unpack


@dataclass(frozen=True)
class Seat:
    """A client that is there.

    Attributes:
        node: where it is reached.
        instance: of its private state.
        heard: how many announcements it has received.
        samples: of training, as it tells.
        arithmetic: instruction set and PyTorch; clients of different ones compute different last bits.
    """

    node: int
    instance: str
    heard: int
    samples: int
    arithmetic: str = ""


class Form(NamedTuple):
    """What data look like, and the model for them.

    Attributes:
        outputs: numbers that a model gives for a sample: one for each class, or those to predict.
        targets: ``classes`` or ``numbers``.
        samples: shape of one.
        dtype: of the stored samples.
        model: fingerprint.
    """

    outputs: int
    targets: str
    samples: tuple[int, ...]
    dtype: str
    model: str


class Roster:
    """The clients of a run.

    Args:
        run: 32 hexadecimal digits, drawn when the run was started.

    Attributes:
        seats: by client.
        refused: by node: why it takes no part. It is asked again only under another number.
        replaced: nodes whose seat went to another one with the same private state: restarted, if all is well.
        form: of the first client's data and model, which all others have to share; None before it.

    Raises:
        UserError: the configuration models devices, where real ones take part.
    """

    def __init__(self, config: RunConfig, run: str) -> None:
        if config.system is not None:
            raise UserError("[system] models devices, and a distributed run has real ones; take it out")
        self.config, self.run = config, run
        self.digest = run_digest(config)
        self.seats: dict[int, Seat] = {}
        self.refused: dict[int, str] = {}
        self.replaced: set[int] = set()
        self.form: Form | None = None

    def parcel(self, header: dict[str, Any], frames: Collection[bytes] = ()) -> bytes:
        """A message of this run."""
        who = {"protocol": PROTOCOL, "version": __version__, "config": self.digest, "run": self.run}
        return pack({**who, **header}, list(frames))

    def strangers(self, nodes: Collection[int]) -> list[int]:
        """Nodes that have not been asked who they are, ascending; who has left is forgotten."""
        gone = [client for client, seat in self.seats.items() if seat.node not in nodes]
        for client in gone:
            del self.seats[client]
        for node in [node for node in self.refused if node not in nodes]:
            del self.refused[node]
        self.replaced &= set(nodes)
        known = {seat.node for seat in self.seats.values()} | self.refused.keys()
        return sorted(set(nodes) - known)

    def meet(self, node: int, raw: object) -> str | None:
        """Take in the answer of a node that was asked who it is; returns why it is refused, in one line."""
        try:
            reason = self._meet(node, raw)
        except WireError as error:
            reason = str(error)
        if reason is not None:
            self.refused[node] = reason
        return reason

    def _meet(self, node: int, raw: object) -> str | None:
        told, _ = read_reply(raw, self.digest)
        client = number(told, "client")
        clients = self.config.partition.clients
        if client >= clients:
            return f"client {client} in a run of clients 0 to {clients - 1}"
        arithmetic = f"{str(told.get('cpu'))[:20]}, PyTorch {str(told.get('torch'))[:20]}"
        seat = Seat(node, str(told.get("instance")), number(told, "heard"), number(told, "samples", 1), arithmetic)
        sitting = self.seats.get(client)
        if sitting is not None and sitting.node != node:
            if sitting.instance != seat.instance:
                where = "from another machine or folder"
                return f"client {client} is here already, {where}; every client needs its own number"
            if node in self.replaced:  # it was not restarted: both answer
                where = "from the same folder"
                return f"client {client} is here already, {where}; every client needs one node alone"
            self.replaced.add(sitting.node)
        image = told.get("image")
        if not isinstance(image, list) or not 0 < len(image) <= 8 or not all(type(n) is int and n > 0 for n in image):
            return f"client {client} tells no shape of its samples: {image!r}"
        if told.get("dtype") not in ("uint8", "float32", "int64"):
            return f"client {client} has samples of unknown dtype {told.get('dtype')!r}"
        targets = "numbers" if told.get("numbers") is True else "classes"
        outputs = number(told, "outputs", 1 if targets == "numbers" else 2)
        form = Form(outputs, targets, tuple(image), str(told["dtype"]), str(told.get("model")))
        if self.form is None:
            self.form = form
        elif form != self.form:
            name, mine, theirs = next(f for f in zip(Form._fields, form, self.form, strict=True) if f[1] != f[2])
            return f"client {client} differs from the run in {name}: {mine} instead of {theirs}"
        self.seats[client] = seat
        return None


def read_reply(raw: object, digest: str) -> tuple[dict[str, Any], list[bytes]]:
    """Header and frames of a client's reply.

    Raises:
        WireError: it is damaged, a refusal, or of another protocol, release or configuration.
    """
    told, frames = unpack(raw)
    if told.get("protocol") != PROTOCOL:
        raise WireError(f"the client speaks protocol {told.get('protocol')}; this server speaks {PROTOCOL}")
    if "error" in told:
        raise WireError("the client refuses: " + " ".join(str(told["error"]).split())[:300])
    if told.get("version") != __version__:
        raise WireError(f"the client runs version {told.get('version')} of spafl; this server has {__version__}")
    if told.get("config") != digest:
        raise WireError(f"the client has another configuration ({told.get('config')}) than the server ({digest})")
    return told, frames


def unmerged_rounds(told: Mapping[str, Any]) -> tuple[int, ...]:
    """Rounds that a client tells it has trained in since its last merged upload.

    Raises:
        WireError: not ascending whole numbers.
    """
    rounds = told.get("unmerged", [])
    if (
        not isinstance(rounds, list)
        or not all(type(r) is int and r >= 0 for r in rounds)
        or rounds != sorted(set(rounds))
    ):
        raise WireError(f"unmerged must be ascending rounds; got {str(rounds)[:80]}")
    return tuple(rounds)


def arithmetics(roster: Roster) -> dict[str, list[int]]:
    """Which clients compute alike, down to the last bit: clients by instruction set and version of PyTorch."""
    alike: dict[str, list[int]] = {}
    for client, seat in sorted(roster.seats.items()):
        alike.setdefault(seat.arithmetic, []).append(client)
    return alike


def check_start(roster: Roster) -> None:
    """Refuse to start with fewer clients than asked for.

    Raises:
        UserError: names how many are there, and the first reason why another one is not.
    """
    wanted = roster.config.flower.start_clients or roster.config.partition.clients
    if len(roster.seats) < wanted:
        why = "".join(f"; refused: {reason}" for reason in list(roster.refused.values())[:1])
        raise UserError(
            f"flower.start_clients: {wanted} clients are needed to start; {len(roster.seats)} came within "
            f"flower.patience = {roster.config.flower.patience:g} s{why}"
        )
