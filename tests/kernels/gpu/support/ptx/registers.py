"""Registers of all threads of a block: one row per register, one column per thread (a lane)."""

import re

import numpy as np

from .errors import Unsupported
from .memory import SHARED_BASE

BANKS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
KINDS = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    **{f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}").type
       for letter, kind in (("b", "u"), ("u", "u"), ("s", "i")) for bits in (8, 16, 32, 64)},
}  # fmt: skip
SYMBOLS = {"global_smem": SHARED_BASE}
POISON = 0xFFC0  # of a register that nobody wrote: NaN in float32, bfloat16 and float16, an odd negative integer


def number(text):
    """The bits of an immediate operand."""
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return int(found[1] or found[2], 16)
    try:
        return int(text.removesuffix("U"), 0)
    except ValueError:
        raise Unsupported(f"operand {text}") from None


class Registers:
    def __init__(self, program, lanes):
        self.lanes, self.rows, self.banks, self.places = lanes, {}, {}, {}
        for bits, kind in BANKS.items():
            names = [name for name, width in program.registers.items() if width == bits]
            bank = self.banks[bits] = np.empty((len(names), lanes), kind)
            self.rows |= dict(zip(names, bank))
            self.places |= dict(zip(names, range(len(names))))
        self.block = {axis: np.zeros(lanes, np.uint32) for axis in "xyz"}
        self.blocks = {axis: np.zeros(lanes, np.uint32) for axis in "xyz"}
        lane = np.arange(lanes, dtype=np.uint32)
        zero, one = np.zeros_like(lane), np.ones_like(lane)
        self.special = {
            "%tid.x": lane, "%tid.y": zero, "%tid.z": zero, "%ntid.x": one * lanes, "%ntid.y": one, "%ntid.z": one,
            "%laneid": lane % 32, "%warpid": lane // 32,
            **{f"%ctaid.{axis}": row for axis, row in self.block.items()},
            **{f"%nctaid.{axis}": row for axis, row in self.blocks.items()},
        }  # fmt: skip

    def poison(self, random):
        for bits, bank in self.banks.items():
            if bits == 1:
                bank[:] = random.random(bank.shape[:1])[:, None] < 0.5
            else:
                bank.view(np.uint16 if bits > 8 else np.uint8).fill(POISON if bits > 8 else POISON >> 8)

    def several(self, names, kind):
        """What reads and writes several registers of 32 bits at once, of some lanes: (registers, lanes)."""
        rows, bank = [self.places[name] for name in names], self.banks[32].view(kind)
        if any(self.rows[name].itemsize != 4 for name in names):
            raise Unsupported(f"registers {names} as {kind}")

        def read(lanes):
            return bank[rows, lanes] if isinstance(lanes, slice) else bank[np.ix_(rows, lanes)]

        def write(lanes, values):
            bank[(rows, lanes) if isinstance(lanes, slice) else np.ix_(rows, lanes)] = values

        return read, write

    def is_number(self, operand):
        return operand not in self.rows and operand not in self.special

    def read(self, operand, kind):
        """The values of an operand, one per lane; of a register that is wider, its low part."""
        kind = np.dtype(kind)
        row = self.rows.get(operand, self.special.get(operand))
        if row is None:
            bits = SYMBOLS[operand] if operand in SYMBOLS else number(operand)
            if kind == np.bool_:
                return np.full(self.lanes, bool(bits))
            unsigned = np.dtype(f"u{kind.itemsize}")
            return np.full(self.lanes, bits & ((1 << 8 * kind.itemsize) - 1), unsigned).view(kind)
        if (row.dtype == np.bool_) != (kind == np.bool_) or row.itemsize < kind.itemsize:
            raise Unsupported(f"operand {operand} read as {kind}")
        return row.view(kind)[:: row.itemsize // kind.itemsize]

    def write(self, name, kind):
        """The whole register, for results of this kind: assignment extends them by its sign."""
        kind = np.dtype(kind)
        row = self.rows.get(name)
        if row is None or (row.dtype == np.bool_) != (kind == np.bool_) or row.itemsize < kind.itemsize:
            raise Unsupported(f"result {name} written as {kind}")
        if kind.kind == "f" and row.itemsize != kind.itemsize:
            raise Unsupported(f"result {name} written as {kind}")
        letter = kind.kind if row.itemsize == kind.itemsize or kind.kind == "i" else "u"
        return row if kind == np.bool_ else row.view(f"{letter}{row.itemsize}")
