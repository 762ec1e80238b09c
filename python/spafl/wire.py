"""Messages between server and clients: named tensors, their exact size in bytes, and their framed binary form.

Frame (little endian): magic ``SPFL``, version u8, tensor count u16, then per tensor: name length u8, name (UTF-8),
dtype code u8, rank u8, dimensions u32 each; then the CRC-32 u32 of the payload and the payload, tensors in order.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

MAGIC = b"SPFL"
VERSION = 1

# Codes are part of the format: append, never renumber.
_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool,
)  # fmt: skip
_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}

Message = Mapping[str, Tensor]
"""What travels: tensors by name, on the CPU. An empty message costs nothing and is not sent."""


class WireError(ValueError):
    """A frame that is truncated, corrupt, or from another version."""


def payload_bytes(message: Message) -> int:
    """Bytes of the tensors alone, without names and framing."""
    return sum(t.numel() * t.element_size() for t in message.values())


def encode(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        ValueError: a tensor of a dtype that has no code, or a name longer than 255 bytes.
    """
    head = [MAGIC, struct.pack("<BH", VERSION, len(message))]
    body = []
    for name, tensor in message.items():
        if tensor.dtype not in _CODE:
            raise ValueError(f"tensor {name!r}: dtype {tensor.dtype} cannot be sent")
        raw_name = name.encode()
        if len(raw_name) > 255:
            raise ValueError(f"tensor name of {len(raw_name)} bytes; at most 255 can be sent")
        head.append(struct.pack("<B", len(raw_name)) + raw_name)
        head.append(struct.pack(f"<BB{tensor.dim()}I", _CODE[tensor.dtype], tensor.dim(), *tensor.shape))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        body.append(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    payload = b"".join(body)
    return b"".join([*head, struct.pack("<I", zlib.crc32(payload)), payload])


def decode(frame: bytes) -> dict[str, Tensor]:
    """The message in a frame; the tensors own their memory.

    Raises:
        WireError: not a frame, another version, truncated, trailing bytes, or a checksum that does not match.
    """
    view = memoryview(frame)
    at = 0

    def take(count: int) -> memoryview:
        nonlocal at
        if at + count > len(view):
            raise WireError(f"message truncated: {at + count} bytes expected, {len(view)} received")
        at += count
        return view[at - count : at]

    def unpack(layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, take(struct.calcsize(layout)))

    if bytes(take(4)) != MAGIC:
        raise WireError("not a SpaFL message")
    version, count = unpack("<BH")
    if version != VERSION:
        raise WireError(f"message format version {version}; this program speaks {VERSION}")
    table: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for _ in range(count):
        (length,) = unpack("<B")
        name = bytes(take(length)).decode()
        code, rank = unpack("<BB")
        if code >= len(_DTYPES):
            raise WireError(f"tensor {name!r}: unknown dtype code {code}")
        table.append((name, _DTYPES[code], unpack(f"<{rank}I")))
    (checksum,) = unpack("<I")
    raw = take(len(view) - at)
    payload = np.frombuffer(raw, dtype=np.uint8)
    if zlib.crc32(raw) != checksum:
        raise WireError("message corrupt: its checksum does not match")
    message: dict[str, Tensor] = {}
    start = 0
    for name, dtype, shape in table:
        size = math.prod(shape) * dtype.itemsize
        if start + size > len(payload):
            raise WireError(f"message truncated inside tensor {name!r}")
        # A copy, because a payload offset need not be aligned for the dtype.
        chunk = torch.from_numpy(payload[start : start + size].copy())
        message[name] = (chunk.view(dtype) if size else torch.empty(0, dtype=dtype)).reshape(shape)
        start += size
    if start != len(payload):
        raise WireError(f"message has {len(payload) - start} bytes too many")
    return message
