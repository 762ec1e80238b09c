"""One message of bytes per client and direction: a small header and the frames of :mod:`spafl.wire`.

Little endian: magic ``SPFP``, version u8, parts u16, length u32 of each part, the parts, CRC-32 u32 of all before.
The first part is the header, JSON; the others are frames, which name their round, model and encoding themselves.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..wire import WireError

MAGIC = b"SPFP"
VERSION = 1

_HEAD = struct.Struct("<4sBH")
_CHECKSUM = struct.Struct("<I")
MAX_FRAMES = 2**16 - 2


def pack(header: Mapping[str, Any], frames: Sequence[bytes] = ()) -> bytes:
    """The bytes of a header and frames.

    Raises:
        ValueError: more than 65,534 frames.
    """
    if len(frames) > MAX_FRAMES:
        raise ValueError(f"a parcel holds {MAX_FRAMES} frames; got {len(frames)}")
    parts = [json.dumps(header, separators=(",", ":")).encode(), *frames]
    head = _HEAD.pack(MAGIC, VERSION, len(parts)) + struct.pack(f"<{len(parts)}I", *map(len, parts))
    body = b"".join([head, *parts])
    return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack(raw: object) -> tuple[dict[str, Any], list[bytes]]:
    """Header and frames.

    Raises:
        WireError: not a parcel, of another version, or damaged; nothing else.
    """
    if not isinstance(raw, bytes) or raw[:4] != MAGIC:
        raise WireError("not a SpaFL parcel")
    if len(raw) > 4 and raw[4] != VERSION:
        raise WireError(f"parcel of format version {raw[4]}; this program speaks version {VERSION} only")
    end = len(raw) - _CHECKSUM.size
    if end < _HEAD.size or zlib.crc32(memoryview(raw)[:end]) != _CHECKSUM.unpack_from(raw, end)[0]:
        raise WireError("parcel damaged or cut off: its checksum does not match")
    _, _, count = _HEAD.unpack_from(raw)
    at = _HEAD.size + 4 * count
    if not count or at > end:
        raise WireError("parcel damaged: its table of parts does not fit")
    sizes = struct.unpack_from(f"<{count}I", raw, _HEAD.size)
    if at + sum(sizes) != end:
        raise WireError("parcel damaged: its parts do not fill it")
    parts = []
    for size in sizes:
        parts.append(raw[at : at + size])
        at += size
    try:
        header = json.loads(parts[0])
    except (ValueError, RecursionError):
        raise WireError("parcel damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise WireError("parcel damaged: its header is not a table")
    return header, parts[1:]


def number(header: Mapping[str, Any], key: str, least: int = 0) -> int:
    """A whole number of a header.

    Raises:
        WireError: it is missing, no whole number or below ``least``.
    """
    value = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise WireError(f"{key} must be a whole number from {least}; got {value!r}")
    return value
