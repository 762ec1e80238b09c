"""wgmma: matrix products of four warps, the right operand in shared memory, finished only when they are waited for.

Each warp of the four computes its 16 rows, when it comes by. Operands are read at once and compared at the wait: who
overwrites them in between is found (``Hazard``). Accumulators hold NaN until the wait that covers the last product
into them.
"""

import dataclasses
import re

import numpy as np

from .errors import Hazard, Unsupported
from .warp import OPERANDS, from_accumulators, left_operand, to_accumulators

ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of a swizzled tile, by the two highest bits of a descriptor
CHUNK = 16  # bytes that swizzling moves together


def operand_offsets(lines, columns, size, descriptor, transposed):
    """Addresses of a (lines, columns) operand in shared memory, columns being the reduced dimension.

    A tile has 8 rows of 16 to 128 bytes along the dimension that is contiguous; the descriptor holds where it begins,
    and the distances to the next tile in either direction, in units of 16 bytes.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Unsupported("a matrix descriptor with an offset of its base")
    swizzle = descriptor >> 62
    width = ROW[swizzle]
    line, column = np.arange(lines)[:, None], np.arange(columns)[None, :]
    along, across = (line, column) if transposed else (column, line)
    inside, tile = along * size % width, along * size // width
    group, row = across // 8, across % 8
    if swizzle == 0 and transposed:  # the two distances change places
        leading, stride = stride, leading
    offsets = start + tile * leading + group * stride + row * width + inside
    # Swizzling: the chunk within a row is exchanged by the number of the row, which is in the address above bit 7.
    return (offsets ^ ((offsets >> 7 & (width // CHUNK - 1)) * CHUNK)).astype(np.uint32)


@dataclasses.dataclass
class _Flying:
    group: int
    value: np.ndarray  # (registers, 32)
    write: object  # of these registers


class Products:
    """What is in flight, per warp: groups, accumulators by their registers, operands that must stay."""

    def __init__(self, warps, shared):
        self.shared, self.groups = shared, np.zeros(warps, np.int64)
        self.values, self.operands = {}, []

    def reset(self):
        self.groups.fill(0)
        self.values.clear()
        self.operands.clear()

    def commit(self, warps):
        self.groups[warps] += 1

    def wait(self, warps, left):
        for warp in warps:
            done = self.groups[warp] - left
            stay = []
            for entry in self.operands:
                if entry[0] != warp or entry[1] >= done:
                    stay.append(entry)
                elif not np.array_equal(self.shared.windows[entry[2].itemsize][entry[3]], entry[2]):
                    raise Hazard("shared memory that a wgmma reads was overwritten before the wait for it")
            self.operands = stay
            for key in [key for key, entry in self.values.items() if key[0] == warp and entry.group < done]:
                flying = self.values.pop(key)
                flying.write(slice(32 * warp, 32 * warp + 32), flying.value)


def product(k, i, parts):
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
    kind = parts[6]
    if shape is None or parts[5] != "f32" or kind not in OPERANDS or parts[7] != kind:
        raise Unsupported(i.opcode)
    n, depth = int(shape[1]), int(shape[2])
    item, decode = OPERANDS[kind]
    size = np.dtype(item).itemsize
    accumulators = i.operands[0]
    read, write = k.registers.several(accumulators, np.float32)
    in_registers = isinstance(i.operands[1], tuple)
    a = k.registers.several(i.operands[1], np.uint32)[0] if in_registers else k.registers.read(i.operands[1], np.uint64)
    b = k.registers.read(i.operands[2], np.uint64)
    keep = k.registers.read(i.operands[3], np.bool_)
    if i.operands[4:6] != ("1", "1"):
        raise Unsupported(f"{i.opcode} of negated operands")
    # Which operands lie with their rows along the reduced dimension; tf32 and operands in registers have no choice.
    transposed = [o == "1" for o in i.operands[6:]]
    transposed = [False] * (2 - len(transposed)) + transposed
    cache = {}

    def operand(lines, descriptor, flipped):
        key = lines, descriptor, flipped
        if key not in cache:
            addresses = operand_offsets(lines, depth, size, descriptor, flipped)
            cache[key] = k.shared.index(addresses, size, "wgmma operand")
        places = cache[key]
        return places, k.shared.windows[size][places]

    def step(m):
        flying = k.products
        for warp in k.warps_of(m):
            lanes = slice(32 * warp, 32 * warp + 32)
            first = 32 * warp
            key, group = (warp, accumulators), int(flying.groups[warp])
            if in_registers:
                left = left_operand(a(lanes), item)[0]
            else:
                places, whole = operand(64, int(a[first]), transposed[0])
                mine = slice(16 * (warp % 4), 16 * (warp % 4) + 16)
                left = whole[mine].view(item)
                flying.operands.append((warp, group, whole[mine], places[mine]))
            places, right = operand(n, int(b[first]), transposed[1])
            flying.operands.append((warp, group, right, places))
            out = decode(left) @ decode(right.view(item)).T
            if keep[first]:
                before = flying.values[key].value if key in flying.values else read(lanes)
                out = out + from_accumulators(before)[0]
            flying.values[key] = _Flying(group, to_accumulators(out[None]), write)
            write(lanes, np.nan)

    return step


def warpgroup(k, i, parts):
    """The family of wgmma; fences order what is in order here anyway."""
    if parts[1] == "mma_async":
        return product(k, i, parts)
    if parts[1] == "fence":
        return lambda m: k.whole_warps(m)
    if parts[1] == "commit_group":
        return lambda m: k.products.commit(k.warps_of(m))
    if parts[1] == "wait_group":
        left = int(i.operands[0])
        return lambda m: k.products.wait(k.warps_of(m), left)
    raise Unsupported(i.opcode)
