"""What passes between a node of Flower's and its SuperLink, call by call.

Flower's nodes speak HTTP/1.1: on a connection, a request and its response follow each other. A :class:`Proxy` hands
bytes on and keeps them; :func:`calls` cuts them into calls, and :func:`messages` sorts these by the message of a run
that they carry. What a node asks while it waits (a look for messages that finds none, a heartbeat, an object that is
not there yet) belongs to no message, however many such calls there are: figures do not depend on a machine's speed.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PULL, OBJECT, BEAT = "/v1/fleet/pull-messages", "/v1/fleet/pull-object", "/v1/fleet/send-node-heartbeat"


@dataclass
class Call:
    """A request and its response, as they travelled."""

    up: bytes = b""
    down: bytes = b""

    @property
    def path(self) -> str:
        return self.up.split(b" ", 2)[1].decode()

    @property
    def body(self) -> bytes:
        """Of the response.

        Raises:
            ValueError: it has none of a length that its head tells.
        """
        head, _, body = self.down.partition(b"\r\n\r\n")
        if f"content-length: {len(body)}".encode() not in head.lower().split(b"\r\n"):
            raise ValueError(f"response to {self.path}: {len(body)} bytes are not what its head announces: {head!r}")
        return body


@dataclass
class Delivery:
    """A message of a run and its answer, at one node.

    Attributes:
        kind: ``train``, say.
        run: Flower's number of the run.
        calls: that carry it, in the order in which they ended.
    """

    kind: str
    run: int
    calls: list[Call] = field(default_factory=list)

    def bytes(self) -> tuple[int, int]:
        """Up and down."""
        return sum(len(call.up) for call in self.calls), sum(len(call.down) for call in self.calls)


class Proxy(threading.Thread):
    """Hands bytes on between a node and the SuperLink, and keeps them: ``kept`` are (connection, is up, bytes)."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.kept: list[tuple[int, bool, bytes]] = []
        self.start()

    def run(self) -> None:
        count = 0
        with selectors.DefaultSelector() as ready:
            ready.register(self._server, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fileobj is self._server:
                        node, _ = self._server.accept()
                        server = socket.create_connection(("127.0.0.1", self._target))
                        ready.register(node, selectors.EVENT_READ, (count, True, server))
                        ready.register(server, selectors.EVENT_READ, (count, False, node))
                        count += 1
                    elif key.data is not None:
                        self._hand_on(ready, key)

    def _hand_on(self, ready: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        source: Any = key.fileobj
        number, up, target = key.data
        chunk = b""
        with contextlib.suppress(OSError):
            chunk = source.recv(1 << 16)
            if chunk:
                self.kept.append((number, up, chunk))  # before anybody can answer it
                target.sendall(chunk)
                return
        for end in (source, target):
            with contextlib.suppress(KeyError, ValueError):
                ready.unregister(end)
            end.close()


def calls(kept: Iterable[tuple[int, bool, bytes]]) -> list[Call]:
    """What a proxy kept, as calls, in the order of their last bytes; one without a response is left out."""
    at: dict[int, tuple[int, Call]] = {}
    done: list[tuple[int, Call]] = []
    for position, (number, up, chunk) in enumerate(kept):
        last, call = at.get(number, (position, Call()))
        if up and call.down:
            done.append((last, call))
            call = Call()
        if up:
            call.up += chunk
        else:
            call.down += chunk
        at[number] = position, call
    done += [each for each in at.values() if each[1].down]
    return [call for _, call in sorted(done, key=lambda each: each[0])]


def of_flower(call: Call) -> tuple[str, int] | bool:
    """A message's kind and run, where a call fetches one; else whether the call belongs to a message at all."""
    from flwr.proto.fleet_pb2 import PullMessagesResponse
    from flwr.proto.message_pb2 import PullObjectResponse

    if call.path == PULL:
        found = PullMessagesResponse.FromString(call.body).messages_list
        return (found[0].metadata.message_type, found[0].metadata.run_id) if found else False
    if call.path == OBJECT:
        return bool(PullObjectResponse.FromString(call.body).object_available)
    return call.path != BEAT


def messages(
    made: Iterable[Call], read: Callable[[Call], tuple[str, int] | bool] = of_flower
) -> tuple[list[Delivery], list[Call]]:
    """A node's messages with the calls that carry them, and the calls it made while it waited.

    Calls before its first message (it registers) belong to neither.
    """
    found: list[Delivery] = []
    waiting = []
    for call in made:
        what = read(call)
        if isinstance(what, tuple):
            found.append(Delivery(*what))
        if what is False:
            waiting.append(call)
        elif found:
            found[-1].calls.append(call)
    return found, waiting


def zipped(deliveries: Sequence[Delivery]) -> list[tuple[int, int]]:
    """Bytes up and down of each, if what a node sends, and what it gets, were each one compressed stream (zlib, 6)."""
    packers = zlib.compressobj(6), zlib.compressobj(6)

    def size(packer: Any, raw: bytes) -> int:
        return len(packer.compress(raw)) + len(packer.flush(zlib.Z_SYNC_FLUSH))

    sizes = []
    for delivery in deliveries:
        both = [(size(packers[0], call.up), size(packers[1], call.down)) for call in delivery.calls]
        sizes.append((sum(up for up, _ in both), sum(down for _, down in both)))
    return sizes
