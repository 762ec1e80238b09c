"""How uploads travel: as they are, or as differences in a lossy encoding with error feedback at the client.

What a client uploads is close to what it received, so with ``fp16`` and ``int8`` a tensor that has a counterpart of the
same name, shape and dtype in the received message travels as its difference from it; one without travels itself. What
the encoding loses is kept at the client, in its row, and added to its next upload (Seide et al., Interspeech 2014;
Karimireddy et al., ICML 2019). The server adds the difference to what it had sent.

The way down is exact in every encoding: all clients have to hold the same thresholds as the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .encoding import Encoding
from .frame import Frame, Message, WireError, encode, read_frame

PREFIX = "feedback."
"""Of the names under which a client's row holds what its uploads have lost so far."""


@dataclass(frozen=True)
class Uplink:
    """The way up of a run.

    Args:
        encoding: of the floating-point tensors of an upload.
        model: :func:`spafl.wire.fingerprint` of the model.
    """

    encoding: Encoding = "fp32"
    model: int = 0

    def client_state(self, expected: Iterable[Message]) -> dict[str, Tensor]:
        """What a client's row holds for the error feedback: zeros, flat, named after the tensor.

        Args:
            expected: messages with the names, shapes and dtypes of the uploads of all clients that share a layout;
                clients may send parts of different sizes, so the largest of each tensor is what counts.
        """
        if self.encoding == "fp32":
            return {}
        sizes: dict[str, Tensor] = {}
        for message in expected:
            for name, tensor in message.items():
                known = sizes.get(name)
                if tensor.is_floating_point() and (known is None or known.numel() < tensor.numel()):
                    sizes[name] = tensor
        return {PREFIX + name: torch.zeros(tensor.numel(), dtype=tensor.dtype) for name, tensor in sizes.items()}

    def pack(
        self,
        upload: Message,
        received: bytes,
        round: int,
        memory: MutableMapping[str, Tensor],
        stream: np.random.Generator,
    ) -> bytes:
        """The frame of an upload.

        Args:
            upload: what the algorithm sends.
            received: the frame this client was sent in this round. Its bytes, because training may have changed the
                tensors that were read from it.
            memory: holds the tensors of :meth:`client_state`; they are changed in place.
            stream: random numbers for the rounding, of this client and round.

        Raises:
            ValueError: what :func:`spafl.wire.encode` cannot carry; or a tensor for which the row has no room.
        """
        if self.encoding == "fp32":
            return encode(upload, round, self.model)
        known = read_frame(received).message
        wanted: dict[str, Tensor] = {}
        for name, tensor in upload.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                wanted[name] = tensor
                continue
            value = tensor.detach().cpu()
            base = _counterpart(name, value, known)
            wanted[name] = (value if base is None else value - base) + self._lost(memory, name, value).cpu()
        frame = encode(wanted, round, self.model, self.encoding, stream)
        for name, carried in read_frame(frame).message.items():
            if carried.is_floating_point():
                error = wanted[name] - carried
                if error.isfinite().all():  # of an upload that is refused, nothing is to be made up for
                    self._lost(memory, name, carried).copy_(error)
        return frame

    def unpack(self, frame: bytes, sent: Message, round: int) -> Frame:
        """The frame of an upload, its message complete.

        Args:
            frame: from a client.
            sent: what this client was sent in this round.

        Raises:
            WireError: see :func:`spafl.wire.read_frame`; or another encoding than agreed.
        """
        got = read_frame(frame, round, self.model)
        if got.encoding != self.encoding:
            raise WireError(f"message in encoding {got.encoding}; {self.encoding} was agreed")
        if self.encoding == "fp32":
            return got
        whole = {}
        for name, tensor in got.message.items():
            base = _counterpart(name, tensor, sent) if tensor.is_floating_point() else None
            whole[name] = tensor if base is None else base + tensor
        return replace(got, message=whole)

    def _lost(self, memory: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
        """The part of the row that belongs to a tensor, in its shape."""
        row = memory.get(PREFIX + name)
        if row is None or row.numel() < like.numel() or row.dtype != like.dtype:
            raise ValueError(
                f"communication.encoding = {self.encoding} keeps what an upload lost at the client, but its row has no "
                f"room for tensor {name!r} of shape {tuple(like.shape)}: uploads must look as the algorithm's "
                "expected_upload says; communication.encoding = fp32 takes any"
            )
        return row[: like.numel()].view(like.shape)


def _counterpart(name: str, tensor: Tensor, message: Message) -> Tensor | None:
    base = message.get(name)
    same = base is not None and base.shape == tensor.shape and base.dtype == tensor.dtype
    return base if same else None
