"""Global memory (the storage of CPU tensors), shared memory of one block, and copies on their way to it."""

import bisect

import numpy as np

from .errors import Misaligned, OutOfBounds

ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # one item per access, only moved
SHARED_BASE = 1024  # where dynamic shared memory begins on a device of compute capability 9


class _Raw:
    """Memory that is there already, as an array of items."""

    def __init__(self, address, items, dtype):
        self.__array_interface__ = {
            "version": 3, "data": (address, False), "shape": (items,), "typestr": np.dtype(dtype).str
        }  # fmt: skip


class Global:
    """Loads and stores at real addresses, allowed only within the given tensors."""

    def __init__(self, tensors):
        """tensors: (name, CPU tensor); bounds are the first and last element, not the storage behind it."""
        spans = []
        for name, t in tensors:
            if t.numel():
                last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name))
        self.spans = []
        for start, end, name in sorted(spans):
            if self.spans and start < self.spans[-1][1]:  # two views of one storage
                before = self.spans[-1]
                self.spans[-1] = before[0], max(end, before[1]), f"{before[2]}, {name}"
            else:
                self.spans.append((start, end, name))
        self.keep = [t for _, t in tensors]
        self.starts = [start for start, _, _ in self.spans]
        self.base = self.starts[0] & ~15 if self.spans else 0
        length = self.spans[-1][1] - self.base if self.spans else 0
        # One window over all tensors and what lies between them, which no checked access touches.
        self.windows = {size: np.asarray(_Raw(self.base, -(-length // size), kind)) for size, kind in ITEMS.items()}

    def check(self, addresses, size, what):
        """An error if an address is outside of every tensor, or misaligned."""
        if addresses.size:
            self._index(addresses, size, what)

    def _index(self, addresses, size, what):
        low, high = int(addresses.min()), int(addresses.max())
        at = bisect.bisect_right(self.starts, low) - 1
        if at < 0 or high + size > self.spans[at][1]:
            for address in map(int, addresses):  # several tensors by one instruction, or a fault
                at = bisect.bisect_right(self.starts, address) - 1
                if at < 0 or address + size > self.spans[at][1]:
                    raise OutOfBounds(f"{what} of {size} bytes at {address:#x}, {self._nearest(address, size)}")
        if (addresses & np.uint64(size - 1)).any():
            bad = next(int(a) for a in addresses if int(a) % size)
            raise Misaligned(f"{what} of {size} bytes at {bad:#x}, {self._nearest(bad, size)}")
        return (addresses - np.uint64(self.base)) >> np.uint64(size.bit_length() - 1)

    def _nearest(self, address, size):
        if not self.spans:
            return "and the launch has no tensor"

        def distance(span):
            return max(span[0] - address, address + size - span[1])

        start, end, name = min(self.spans, key=distance)
        return f"{address - start} bytes after the start of {name}, which has {end - start} bytes"

    def load(self, addresses, size):
        return self.windows[size][self._index(addresses, size, "load")]

    def store(self, addresses, size, items):
        self.windows[size][self._index(addresses, size, "store")] = items


class Shared:
    """The shared memory of a block; filled with 0xFF, which is NaN in every float format, before each block."""

    def __init__(self, size):
        self.size = size
        room = np.empty(-(-max(size, 1) // 16) * 16 + 16, np.uint8)
        aligned = room[-room.ctypes.data % 16 :][: room.size - 16]
        self.windows = {size: aligned.view(kind) for size, kind in ITEMS.items()}
        self.poison()

    def poison(self):
        self.windows[1].fill(0xFF)

    def index(self, addresses, size, what):
        """addresses: uint32, so that what lies before the base is far behind the end."""
        offsets = addresses - np.uint32(SHARED_BASE)
        if int(offsets.max()) + size > self.size:
            bad = int(offsets.max()) + SHARED_BASE & 0xFFFFFFFF
            raise OutOfBounds(f"{what} of {size} bytes at {bad:#x}, {self.size} bytes are from {SHARED_BASE:#x} on")
        if size > 1 and (offsets & np.uint32(size - 1)).any():
            bad = next(int(o) for o in offsets.reshape(-1) if o % size)
            raise Misaligned(f"{what} of {size} bytes at byte {bad} of shared memory")
        return offsets >> np.uint32(size.bit_length() - 1)

    def load(self, addresses, size):
        return self.windows[size][self.index(addresses, size, "load")]

    def store(self, addresses, size, items):
        self.windows[size][self.index(addresses, size, "store")] = items


class Copies:
    """cp.async: read at once, in shared memory only when the thread waits for the group; until then there is 0xFF.

    Groups belong to threads, so every copy keeps the thread and the number of its group.
    """

    def __init__(self, lanes, shared):
        self.shared, self.groups, self.flying = shared, np.zeros(lanes, np.int64), []

    def reset(self):
        self.groups.fill(0)
        self.flying.clear()

    def issue(self, lanes, addresses, size, data):
        """data: (lanes, size) bytes."""
        self.shared.store(addresses, size, np.full(data.shape, 0xFF, np.uint8).view(ITEMS[size])[:, 0])
        self.flying.append((lanes, self.groups[lanes], addresses, size, data))

    def commit(self, mask):
        self.groups += mask

    def wait(self, mask, left):
        """All but the newest ``left`` groups of these threads arrive."""
        stay, newest = [], int(self.groups.max()) - left
        for copy in self.flying:
            lanes, group, addresses, size, data = copy
            ready = True if mask is True else mask[lanes]
            if group.min() >= newest or not np.any(ready):  # nearly always: later, or other warps'
                stay.append(copy)
                continue
            ready = ready & (group < self.groups[lanes] - left)
            if ready.any():
                self.shared.store(addresses[ready], size, data[ready].view(ITEMS[size])[:, 0])
            if not ready.all():
                stay.append((lanes[~ready], group[~ready], addresses[~ready], size, data[~ready]))
        self.flying = stay
