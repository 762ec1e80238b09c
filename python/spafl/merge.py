"""The way from what came back in a round to the server's next state; it trusts no client.

One place for all algorithms, used by the simulator and by Flower: an upload that is not what its algorithm expects is
left out and told, the rest is merged in the order of client numbers, and the server's state stays where too few remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .algorithms import Algorithm, ServerState, Upload
from .wire import Message, Uplink, WireError

MAX_SAMPLES = 2**40
"""Above any data set: counts are weights, and a weight must not swallow all others."""


class TooFewUploads(RuntimeError):
    """Fewer good uploads came back than the run asks for; the server's state has not changed."""


@dataclass(frozen=True)
class Reply:
    """What came back from somewhere in the name of a client."""

    client: int
    samples: int
    """Training samples, as the client tells."""
    frame: bytes


@dataclass(frozen=True)
class Rejection:
    """A reply that was left out."""

    client: int
    reason: str
    """One line."""


@dataclass(frozen=True)
class Merged:
    """A round's outcome at the server."""

    server: ServerState
    announcement: Message
    accepted: tuple[int, ...]
    """Clients whose uploads were merged, ascending."""
    rejected: tuple[Rejection, ...]
    """In the order in which the replies came."""
    up_bytes: int
    """Bytes of the tensors of all replies that could be read, accepted or not, as they travelled."""
    up_frame_bytes: int
    """Bytes of all replies; one without tensors is not sent by a method that has nothing to send."""


def upload_fault(message: Message, expected: Message, limit: float) -> str | None:
    """What is wrong with an upload, in words; None if nothing is.

    Args:
        message: as it came.
        expected: tensors with the names, shapes and dtypes it has to have; see ``Algorithm.expected_upload``.
        limit: bound of the magnitude of an entry.
    """
    missing = sorted(expected.keys() - message.keys())
    if missing:
        return f"tensor {missing[0]!r} is missing"
    foreign = sorted(message.keys() - expected.keys())
    if foreign:
        return f"tensor {foreign[0]!r} was not asked for"
    for name, wanted in expected.items():
        tensor = message[name]
        if not isinstance(tensor, Tensor):
            return f"{name!r} is not a tensor but {type(tensor).__name__}"
        if tensor.shape != wanted.shape:
            return f"tensor {name!r} has shape {tuple(tensor.shape)}; {tuple(wanted.shape)} was expected"
        if tensor.dtype != wanted.dtype:
            return f"tensor {name!r} is {tensor.dtype}; {wanted.dtype} was expected"
        if tensor.dtype is torch.bool or not tensor.numel():
            continue
        largest = tensor.double().abs().max().item()  # NaN, where there is one
        if not math.isfinite(largest):
            return f"tensor {name!r} has entries that are not finite"
        if largest > limit:
            return f"tensor {name!r} has an entry of magnitude {largest:.3g}; at most {limit:g} is allowed"
    return None


def _sender_fault(client: object, samples: object, sampled: Iterable[int], seen: Iterable[int]) -> str | None:
    if not isinstance(client, int) or isinstance(client, bool) or client not in sampled:
        return "the client was not sampled in this round"
    if client in seen:
        return "a second upload of the same client"
    if not isinstance(samples, int) or isinstance(samples, bool) or not 0 < samples <= MAX_SAMPLES:
        return f"samples must be a whole number from 1 to 2**40; got {samples!r}"
    return None


def merge_replies(
    algorithm: Algorithm,
    server: ServerState,
    round: int,
    sent: Mapping[int, Message],
    replies: Iterable[Reply],
    uplink: Uplink,
    clients: int,
    min_uploads: int = 1,
    missing: Sequence[Rejection] = (),
) -> Merged:
    """Check what came back in a round and merge what is good.

    Args:
        server: the state before the round; it is not changed.
        sent: what each sampled client was sent, by client: an upload may be a difference from it.
        replies: in any order. Of several in one client's name the first good one counts.
        uplink: how uploads are encoded.
        clients: how many there are, sampled or not.
        min_uploads: so many have to be good.
        missing: clients without a reply, and why; named where too few remain.

    Raises:
        TooFewUploads: fewer were; names what was wrong with the others.
    """
    uploads: dict[int, Upload] = {}
    rejected: list[Rejection] = []
    payload = framed = 0
    for reply in replies:
        framed += len(reply.frame)
        fault = _sender_fault(reply.client, reply.samples, sent, uploads)
        if fault is None:
            try:
                frame = uplink.unpack(reply.frame, sent[reply.client], round)
            except WireError as error:
                fault = str(error)
            else:
                payload += frame.payload
                framed -= 0 if frame.message else len(reply.frame)
                expected = algorithm.expected_upload(server, round, reply.client)
                fault = upload_fault(frame.message, expected, algorithm.upload_limit)
                fault = fault or algorithm.upload_fault(server, frame.message)
        if fault is None:
            uploads[reply.client] = Upload(reply.client, frame.message, reply.samples)
        else:
            rejected.append(Rejection(reply.client, fault))
    if len(uploads) < min_uploads:
        bad = [*missing, *rejected]
        told = "; ".join(f"client {r.client}: {r.reason}" for r in bad[:3]) or "none came"
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise TooFewUploads(
            f"round {round + 1}: {len(uploads)} of {len(sent)} uploads are good and sampling.min_uploads is "
            f"{min_uploads} ({told}{more})"
        )
    accepted = sorted(uploads)
    # Sums of floating-point numbers depend on their order, and replies come in any.
    state, announcement = algorithm.merge(server, round, [uploads[client] for client in accepted], clients)
    return Merged(state, announcement, tuple(accepted), tuple(rejected), payload, framed)
