"""Messages between server and clients: named tensors, their exact size in bytes, and their framed binary form.

Frame (little endian): magic ``SPFL``, version u8, tensor count u16, then per tensor: name length u8, name (UTF-8),
dtype code u8, rank u8, dimensions u32 each; then the CRC-32 u32 of the payload and the payload, tensors in order.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

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
        rank = tensor.dim()
        layout = f"<B{len(raw_name)}sBB{rank}I"
        head.append(struct.pack(layout, len(raw_name), raw_name, _CODE[tensor.dtype], rank, *tensor.shape))
        flat = tensor.detach().cpu()
        if flat.dtype is torch.bfloat16:  # NumPy does not know it
            flat = flat.view(torch.int16)
        body.append(flat.numpy().tobytes())
    payload = b"".join(body)
    return b"".join([*head, struct.pack("<I", zlib.crc32(payload)), payload])


def decode(frame: bytes) -> dict[str, Tensor]:
    """The message in a frame; the tensors share one copy of the payload.

    Raises:
        WireError: not a frame, another version, truncated, trailing bytes, or a checksum that does not match.
    """
    if frame[:4] != MAGIC:
        raise WireError("not a SpaFL message")
    at = 4

    def unpack(layout: str) -> tuple[Any, ...]:
        nonlocal at
        start, at = at, at + struct.calcsize(layout)
        if at > len(frame):
            raise WireError(f"message truncated: {at} bytes expected, {len(frame)} received")
        return struct.unpack_from(layout, frame, start)

    version, count = unpack("<BH")
    if version != VERSION:
        raise WireError(f"message format version {version}; this program speaks {VERSION}")
    table: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for _ in range(count):
        (length,) = unpack("<B")
        raw_name, code, rank = unpack(f"<{length}sBB")
        try:
            name = raw_name.decode()
        except UnicodeDecodeError:
            raise WireError("message corrupt: a tensor's name is not UTF-8") from None
        if code >= len(_DTYPES):
            raise WireError(f"tensor {name!r}: unknown dtype code {code}")
        table.append((name, _DTYPES[code], unpack(f"<{rank}I")))
    (checksum,) = unpack("<I")
    payload = bytearray(memoryview(frame)[at:])
    if zlib.crc32(payload) != checksum:
        raise WireError("message corrupt: its checksum does not match")
    message: dict[str, Tensor] = {}
    start = 0
    for name, dtype, shape in table:
        elements = math.prod(shape)
        size = elements * dtype.itemsize
        if start + size > len(payload):
            raise WireError(f"message truncated inside tensor {name!r}")
        if not size:
            tensor = torch.empty(0, dtype=dtype)
        elif start % dtype.itemsize:
            tensor = torch.frombuffer(payload[start : start + size], dtype=dtype)  # a copy: loads must be aligned
        else:
            tensor = torch.frombuffer(payload, dtype=dtype, count=elements, offset=start)
        message[name] = tensor.reshape(shape)
        start += size
    if start != len(payload):
        raise WireError(f"message has {len(payload) - start} bytes too many")
    return message
