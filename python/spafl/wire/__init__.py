"""Messages between server and clients: named tensors, their exact size in bytes, and their framed binary form."""

from .encoding import ENCODINGS, Encoding
from .frame import Frame, Message, WireError, decode, encode, fingerprint, payload_bytes, read_frame
from .uplink import Uplink

__all__ = [
    "ENCODINGS",
    "Encoding",
    "Frame",
    "Message",
    "Uplink",
    "WireError",
    "decode",
    "encode",
    "fingerprint",
    "payload_bytes",
    "read_frame",
]
