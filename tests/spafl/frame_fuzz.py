"""Fuzzing of the frame decoder.

    python tests/spafl/frame_fuzz.py --frames 1000000        # coverage-guided, with atheris; else by mutation alone

A decoder of frames from anywhere may do two things: raise ``WireError``, or return tensors that encode to an equal
message. Mutations that keep the checksum right are what gets past the first gate, so the fuzzer's inputs get theirs
sealed in every second case.
"""

import argparse
import struct
import sys
import time
import zlib

import numpy as np
import torch

from spafl.wire import WireError, encode, read_frame


def seal(frame: bytes) -> bytes:
    """The frame with the checksum of what it now holds."""
    body = frame[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def check_frame(frame: bytes) -> bool:
    """Whether a frame was accepted; anything but the two permitted outcomes raises."""
    try:
        got = read_frame(frame)
    except WireError as error:
        assert "\n" not in str(error).replace("\\n", "")
        return False
    for tensor in got.message.values():
        tensor.clone()  # reads every byte: a view beyond its memory would show
    if got.encoding == "fp32":
        assert encode(got.message, got.round, got.model) == frame
    return True


def seeds() -> list[bytes]:
    """Frames of all kinds to start from."""
    generator = torch.Generator().manual_seed(0)
    messages = [
        {},
        {"t": torch.randn(3, generator=generator)},
        {"conv1.threshold": torch.randn(5, generator=generator), "e": torch.empty(0, 2), "n": torch.tensor(3)},
        {"m": torch.tensor([True, False]), "h": torch.ones(2, 2).half(), "b": torch.ones(1).bfloat16(),
         "d": torch.ones(1, 1, 1).double(), "i": torch.ones(2).int(), "u": torch.ones(3).byte(),
         "c": torch.ones(1).char()},
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    return [encode(m, 3, 2**63, encoding, rng) for m in messages for encoding in ("fp32", "fp16", "int8")]


_BYTES = (0, 1, 2, 7, 8, 9, 127, 128, 254, 255)


def mutated_frames(seed: int, count: int):
    """Frames with bytes changed, cut, doubled, inserted or taken from another frame; most with a right checksum."""
    rng = np.random.default_rng(seed)
    start = seeds()
    for _ in range(count):
        frame = bytearray(start[rng.integers(len(start))])
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(5 if len(frame) > 5 and rng.random() < 0.9 else 0, max(len(frame), 1)))
            kind = rng.integers(6)
            if kind == 0 and frame:
                frame[at] = int(rng.choice(_BYTES))
            elif kind == 1 and frame:
                frame[at] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                del frame[at : at + int(rng.integers(1, 9))]
            elif kind == 3:
                frame[at:at] = rng.bytes(int(rng.integers(1, 9)))
            elif kind == 4:
                frame[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**16, 2**31, 2**32 - 1])))
            else:
                other = start[rng.integers(len(start))]
                frame[at : at + 8] = other[at : at + 8]
        yield seal(bytes(frame)) if len(frame) > 4 and rng.random() < 0.9 else bytes(frame)


def _guided(frames: int) -> None:
    """Under atheris, which ends the process."""
    import atheris

    import spafl.wire.encoding
    import spafl.wire.frame

    for module in (spafl.wire.frame, spafl.wire.encoding):
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, name, atheris.instrument_func(value))

    def one(data: bytes) -> None:
        if len(data) > 5 and data[0] & 1:
            check_frame(seal(data[1:]))
        else:
            check_frame(data[1:])

    import tempfile
    from pathlib import Path

    corpus = Path(tempfile.mkdtemp())
    for number, frame in enumerate(seeds()):
        (corpus / str(number)).write_bytes(b"\1" + frame)
    atheris.Setup([sys.argv[0], f"-runs={frames}", "-max_len=4096", "-print_final_stats=1", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--mutations", action="store_true", help="mutation alone, without atheris")
    args = parser.parse_args()
    if not args.mutations:
        try:
            import atheris  # noqa: F401
        except ImportError:
            print("atheris is not installed: mutations alone")
        else:
            _guided(args.frames)
    start = time.perf_counter()
    accepted = sum(check_frame(frame) for frame in mutated_frames(seed=0, count=args.frames))
    print(f"{args.frames} frames in {time.perf_counter() - start:.0f} s: {accepted} accepted, the others WireError")


if __name__ == "__main__":
    main()
