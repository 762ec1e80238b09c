"""The framed binary form of a message.

Version 2, little endian::

    magic "SPFL" | version u8 | encoding u8 | tensors u16 | round u32 | model u64 | bytes of names u32
    names, UTF-8, separated by NUL | dtype code u8 each | rank u8 each | dimensions u32 each
    payload, tensors in order
    CRC-32 u32 of everything before it

With an encoding other than ``fp32``, a floating-point tensor is a float32 scale and its codes (:mod:`.encoding`); all
others are their bytes. The checksum finds accidents, not forgers: authentication is the transport's (TLS).

Version 1 had no round, no model and no encoding, and its checksum left out the header; such frames are refused.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .encoding import CODES, ENCODINGS, SCALE_BYTES, Encoding, dequantise, quantise

MAGIC = b"SPFL"
VERSION = 2

MAX_TENSORS = 2**16 - 1
MAX_NAME = 255
"""Bytes of a name."""
MAX_RANK = 8
MAX_ELEMENTS = 2**48
"""Bound of the product of a tensor's dimensions that are not 0: strides of an empty tensor are products of them."""

_HEAD = struct.Struct("<4sBBHIQI")
_CHECKSUM = struct.Struct("<I")
_SCALE = struct.Struct("<f")

# Codes are part of the format: append, never renumber.
_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool,
)  # fmt: skip
_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}

Message = Mapping[str, Tensor]
"""What travels: tensors by name, on the CPU. An empty message costs nothing and is not sent."""


class WireError(ValueError):
    """A frame that is truncated, corrupt, from another version, or not the one that was expected."""


@dataclass(frozen=True)
class Frame:
    """A frame read back."""

    round: int
    model: int
    """:func:`fingerprint` of the sender's model."""
    encoding: Encoding
    payload: int
    """Bytes of the tensors as they travelled, scales included, without names and framing."""
    message: dict[str, Tensor]


def payload_bytes(message: Message) -> int:
    """Bytes of the tensors as they are, without names and framing."""
    return sum(t.numel() * t.element_size() for t in message.values())


def fingerprint(tensors: Message) -> int:
    """64 bits of a model: the names, dtypes and shapes of its tensors, in order; not their values."""
    told = "\n".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return int.from_bytes(hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _scaled(dtype: torch.dtype, elements: int, encoding: Encoding) -> bool:
    """Whether a tensor travels as a scale and codes."""
    return encoding != "fp32" and dtype.is_floating_point and elements > 0


def encode(
    message: Message,
    round: int = 0,
    model: int = 0,
    encoding: Encoding = "fp32",
    stream: np.random.Generator | None = None,
) -> bytes:
    """The frame of a message.

    Args:
        message: dense tensors by name.
        round: of the run, from 0.
        model: :func:`fingerprint` of the model the message is about; 0: none.
        encoding: of the floating-point tensors; see :mod:`spafl.wire.encoding`.
        stream: random numbers of a rounding encoding.

    Raises:
        ValueError: what the format cannot carry: more than 65,535 tensors, a name that is longer than 255 bytes, holds
            NUL or is not Unicode, a dtype without a code, a tensor that is not dense, more than 8 dimensions or a
            dimension from 2**32 on; a round or model out of range; an unknown encoding.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}; got {encoding!r}")
    if not 0 <= round < 2**32:
        raise ValueError(f"round must be 0 to 2**32 - 1; got {round}")
    if not 0 <= model < 2**64:
        raise ValueError(f"model must be a fingerprint of 64 bits; got {model}")
    if len(message) > MAX_TENSORS:
        raise ValueError(f"a message can hold {MAX_TENSORS} tensors; got {len(message)}")
    names: list[bytes] = []
    codes, ranks = bytearray(), bytearray()
    dimensions: list[int] = []
    body: list[bytes] = []
    for name, tensor in message.items():
        names.append(_checked_name(name))
        _check_tensor(name, tensor)
        codes.append(_CODE[tensor.dtype])
        ranks.append(tensor.dim())
        dimensions += tensor.shape
        flat = tensor.detach().resolve_neg().cpu()
        if _scaled(tensor.dtype, tensor.numel(), encoding):
            scale, flat = quantise(flat, encoding, stream)
            body.append(_SCALE.pack(scale))
        if flat.dtype is torch.bfloat16:  # NumPy does not know it
            flat = flat.view(torch.int16)
        body.append(flat.numpy().tobytes())
    table = b"\0".join(names)
    head = _HEAD.pack(MAGIC, VERSION, ENCODINGS.index(encoding), len(names), round, model, len(table))
    frame = b"".join([head, table, codes, ranks, struct.pack(f"<{len(dimensions)}I", *dimensions), *body])
    return frame + _CHECKSUM.pack(zlib.crc32(frame))


def _checked_name(name: object) -> bytes:
    if not isinstance(name, str):
        raise ValueError(f"a tensor's name must be text; got {name!r}")
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"tensor name {name!r} holds half a character (a surrogate) and cannot be sent") from None
    if len(raw) > MAX_NAME:
        raise ValueError(f"a tensor name can have {MAX_NAME} bytes; got {len(raw)}: {name[:40]!r}...")
    if b"\0" in raw:
        raise ValueError(f"tensor name {name!r} holds a NUL character and cannot be sent")
    return raw


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _CODE:
        raise ValueError(f"tensor {name!r}: dtype {tensor.dtype} cannot be sent")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"tensor {name!r}: only dense tensors with values can be sent; this one is {kind}")
    if tensor.dim() > MAX_RANK:
        raise ValueError(f"tensor {name!r}: {MAX_RANK} dimensions can be sent; got {tensor.dim()}")
    if max(tensor.shape, default=0) >= 2**32 or _extent(tuple(tensor.shape)) > MAX_ELEMENTS:
        raise ValueError(f"tensor {name!r}: shape {tuple(tensor.shape)} is too large to be sent")


def _extent(shape: tuple[int, ...]) -> int:
    return math.prod(max(size, 1) for size in shape)


def decode(frame: bytes, round: int | None = None, model: int | None = None) -> dict[str, Tensor]:
    """The message in a frame; see :func:`read_frame`."""
    return read_frame(frame, round, model).message


def read_frame(frame: bytes, round: int | None = None, model: int | None = None) -> Frame:
    """Read a frame; its tensors share one copy of the payload where their place in it allows.

    Time and memory are bounded by the length of the frame: nothing is allocated that it only announces.

    Args:
        frame: bytes from anywhere.
        round, model: what the header has to say; None: anything.

    Raises:
        WireError: not a frame, another version, truncated, trailing bytes, a wrong checksum, a table that breaks the
            rules of :func:`encode`, or another round or model than expected.
    """
    try:
        raw = frame if isinstance(frame, bytes) else bytes(memoryview(frame))
    except TypeError:
        raise WireError(f"a message must be bytes; got {type(frame).__name__}") from None
    if raw[:4] != MAGIC:
        raise WireError("not a SpaFL message")
    if len(raw) > 4 and raw[4] != VERSION:
        raise WireError(f"message of format version {raw[4]}; this program speaks version {VERSION} only")
    end = len(raw) - _CHECKSUM.size
    if end < _HEAD.size:
        raise WireError(f"message truncated: {len(raw)} bytes; an empty one has {_HEAD.size + _CHECKSUM.size}")
    if zlib.crc32(memoryview(raw)[:end]) != _CHECKSUM.unpack_from(raw, end)[0]:
        raise WireError("message corrupt or truncated: its checksum does not match")
    _, _, encoding_code, count, sent_round, sent_model, names_size = _HEAD.unpack_from(raw)
    if encoding_code >= len(ENCODINGS):
        raise WireError(f"message of unknown encoding {encoding_code}")
    if round is not None and sent_round != round:
        raise WireError(f"message of round {sent_round + 1}; round {round + 1} was expected")
    if model is not None and sent_model != model:
        raise WireError(f"message about another model: fingerprint {sent_model:016x}; {model:016x} was expected")
    encoding = ENCODINGS[encoding_code]
    names, kinds, start = _read_table(raw, end, count, names_size, encoding)
    return Frame(sent_round, sent_model, encoding, end - start, _read_payload(raw, start, end, names, kinds))


class _Kind:
    """What is common to all tensors of one dtype and shape; checked once for all of them."""

    def __init__(self, code: int, shape: tuple[int, ...], encoding: Encoding) -> None:
        self.dtype, self.shape = _DTYPES[code], shape
        self.elements = math.prod(shape)
        self.scaled = _scaled(self.dtype, self.elements, encoding)
        self.stored = CODES[encoding] if self.scaled else torch.uint8 if self.dtype is torch.bool else self.dtype
        self.scale = SCALE_BYTES * self.scaled
        self.size = self.elements * self.stored.itemsize
        self.empty: Tensor | None = None
        if not self.elements:
            if _extent(shape) > MAX_ELEMENTS:
                raise WireError(f"message corrupt: an empty tensor of shape {shape}")
            # Shared by all that are alike: there is nothing to write in them, and 65,535 take no time.
            self.empty = torch.empty(shape, dtype=self.dtype)


def _read_table(
    raw: bytes, end: int, count: int, names_size: int, encoding: Encoding
) -> tuple[list[str], list[_Kind], int]:
    """Names and kinds of the tensors, and where the payload starts."""
    at = _HEAD.size
    if at + names_size + 2 * count > end:
        raise WireError("message truncated inside its table of tensors")
    try:
        text = raw[at : at + names_size].decode()
    except UnicodeDecodeError:
        raise WireError("message corrupt: a tensor's name is not UTF-8") from None
    names = text.split("\0") if count else []
    if len(names) != count or (text and not count):
        raise WireError(f"message corrupt: {count} tensors, {len(names)} names")
    if len(set(names)) != count:
        raise WireError("message corrupt: two tensors have one name")
    # A character has at most four bytes, so only where a name is long its bytes have to be counted.
    if max(map(len, names), default=0) > MAX_NAME // 4 and any(len(name.encode()) > MAX_NAME for name in names):
        raise WireError(f"message corrupt: a tensor's name has more than {MAX_NAME} bytes")
    at += names_size
    codes, ranks = raw[at : at + count], raw[at + count : at + 2 * count]
    at += 2 * count
    if max(codes, default=0) >= len(_DTYPES):
        raise WireError(f"message corrupt: unknown dtype code {max(codes)}")
    if max(ranks, default=0) > MAX_RANK:
        raise WireError(f"message corrupt: a tensor of {max(ranks)} dimensions; at most {MAX_RANK} are allowed")
    if at + 4 * sum(ranks) > end:
        raise WireError("message truncated inside its table of tensors")
    kinds: list[dict[bytes, _Kind]] = [{} for _ in _DTYPES]
    table: list[_Kind] = []
    for code, rank in zip(codes, ranks):
        stop = at + 4 * rank
        kind = kinds[code].get(raw[at:stop])
        if kind is None:
            kind = kinds[code][raw[at:stop]] = _Kind(code, struct.unpack_from(f"<{rank}I", raw, at), encoding)
        table.append(kind)
        at = stop
    return names, table, at


def _read_payload(raw: bytes, start: int, end: int, names: list[str], kinds: list[_Kind]) -> dict[str, Tensor]:
    payload = bytearray(memoryview(raw)[start:end])
    message: dict[str, Tensor] = {}
    at = 0
    for name, kind in zip(names, kinds):
        if kind.empty is not None:
            message[name] = kind.empty
            continue
        first = at + kind.scale
        if first + kind.size > len(payload):
            raise WireError(f"message truncated inside tensor {name!r}")
        if first % kind.stored.itemsize:  # a copy: loads must be aligned
            tensor = torch.frombuffer(payload[first : first + kind.size], dtype=kind.stored)
        else:
            tensor = torch.frombuffer(payload, dtype=kind.stored, count=kind.elements, offset=first)
        if kind.scaled:
            (scale,) = _SCALE.unpack_from(payload, at)
            if scale < 0 or math.isinf(scale):
                raise WireError(f"message corrupt: scale {scale} of tensor {name!r}")
            tensor = dequantise(scale, tensor, kind.dtype)
        elif kind.dtype is torch.bool:
            if int(tensor.max()) > 1:
                raise WireError(f"message corrupt: tensor {name!r} holds booleans other than 0 and 1")
            tensor = tensor.view(torch.bool)
        message[name] = tensor.reshape(kind.shape)
        at = first + kind.size
    if at != len(payload):
        raise WireError(f"message has {len(payload) - at} bytes too many")
    return message
