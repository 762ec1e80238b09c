"""Runs a kernel: blocks one after another in random order, the threads of a block as lanes of NumPy arrays.

Every lane has its own program counter; the lanes with the lowest one go on together, which joins what diverged as soon
as that is possible. A step is decoded once, to a function of the mask of active lanes, True meaning all of them.

Control instructions return something: the number of the next step, a branch that lanes take differently, or _BARRIER
or _EXIT with the lanes they concern.
"""

import functools

import numpy as np

from .errors import PtxError, Stuck, Unsupported
from .memory import Copies, Shared
from .parse import parse
from .registers import Registers
from .scalar import SCALAR
from .transfer import TRANSFER
from .warp import WARP, synchronize
from .warpgroup import Products, warpgroup

_BARRIER, _EXIT = object(), object()
END = 1 << 30  # behind every program
BRANCHES = 5_000_000  # of one block; more is taken for a loop without end


def _branch(k, i, parts):
    target = k.program.labels[i.operands[0]]
    if i.guard is None:
        return lambda m: target
    guard = k.registers.read(i.guard, np.bool_)

    def step(m):
        taken = guard != i.unless if m is True else m & (guard != i.unless)
        count = np.count_nonzero(taken)
        if count == 0:
            return None
        return target if count == (k.lanes if m is True else np.count_nonzero(m)) else (target, taken)

    return step


def _stop(k, i, parts):
    """bar.sync 0 and ret."""
    if parts[0] == "bar" and (parts[1:] != ["sync"] or i.operands != ("0",)):
        raise Unsupported(i.text)
    what = _BARRIER if parts[0] == "bar" else _EXIT
    if i.guard is None:
        return lambda m: (what, m)
    guard = k.registers.read(i.guard, np.bool_)

    def step(m):
        taken = guard != i.unless if m is True else m & (guard != i.unless)
        return (what, taken) if taken.any() else None

    return step


CONTROL = {"bra": _branch, "bar": _stop, "ret": _stop}
DECODE = {
    **SCALAR, **TRANSFER, **WARP, **CONTROL, "wgmma": warpgroup, "fence": synchronize, "membar": synchronize,
}  # fmt: skip


def _guarded(k, i, step):
    guard = k.registers.read(i.guard, np.bool_)

    def guarded(m):
        active = guard != i.unless if m is True else m & (guard != i.unless)
        count = np.count_nonzero(active)
        if count:
            step(True if count == k.lanes else active)

    return guarded


class Machine:
    """One kernel for one number of threads; decoded once, run as often as wanted."""

    def __init__(self, ptx, lanes, shared_bytes):
        self.program, self.lanes = parse(ptx), lanes
        self.registers, self.shared = Registers(self.program, lanes), Shared(shared_bytes)
        self.copies, self.products = Copies(lanes, self.shared), Products(lanes // 32, self.shared)
        self.memory, self.parameters = None, {}
        self.every = np.arange(lanes)
        self.pc, self.stopped = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.ready, self.alive = np.zeros(lanes, bool), np.zeros(lanes, bool)
        self.steps = [self._decode(i) for i in self.program.instructions]
        self.next_control = [END] * len(self.steps)
        for at, i in reversed(list(enumerate(self.program.instructions))):
            own = i.opcode.split(".")[0] in CONTROL and not i.opcode.startswith("bar.warp")
            self.next_control[at] = at if own else self.next_control[at + 1]

    def _decode(self, i):
        parts = i.opcode.split(".")
        if parts[:2] == ["bar", "warp"]:
            parts = ["fence", *parts]
        try:
            step = DECODE[parts[0]](self, i, parts) if parts[0] in DECODE else None
            if step is None:
                raise Unsupported(f"no such opcode: {i.opcode}")
        except (PtxError, KeyError, IndexError, ValueError) as error:
            raise Unsupported(f"line {i.line}: {i.text}: {error}") from error
        return step if i.guard is None or parts[0] in CONTROL else _guarded(self, i, step)

    # ------------------------------------------------------------------ masks
    def whole_warps(self, m):
        """The lanes of a mask, as an index; an error if a warp is not complete."""
        if m is True:
            return slice(None)
        rows = m.reshape(-1, 32)
        if (rows.any(1) != rows.all(1)).any():
            raise Stuck("a part of a warp is at an instruction of the whole warp")
        lanes = np.flatnonzero(m)
        whole = lanes[-1] + 1 - lanes[0] == lanes.size
        return slice(int(lanes[0]), int(lanes[-1]) + 1) if whole else lanes

    def warps_of(self, m):
        self.whole_warps(m)
        return range(self.lanes // 32) if m is True else np.flatnonzero(m.reshape(-1, 32)[:, 0]).tolist()

    # ------------------------------------------------------------------ running
    def run(self, grid, parameters, memory, seed=0, warp_by_warp=False):
        """parameters: their bytes, in order. warp_by_warp: every warp runs alone up to the next barrier, in random
        order, where otherwise all run side by side: a barrier that is missing shows."""
        names = [name for name, _ in self.program.parameters]
        if len(names) != len(parameters):
            raise PtxError(f"{self.program.name} takes {len(names)} parameters, got {len(parameters)}")
        self.parameters, self.memory = dict(zip(names, parameters)), memory
        random = np.random.default_rng(seed)
        for axis, size in zip("xyz", grid):
            self.registers.blocks[axis][:] = size
        with np.errstate(all="ignore"):
            for linear in random.permutation(int(np.prod(grid))):
                block = linear % grid[0], linear // grid[0] % grid[1], linear // (grid[0] * grid[1])
                self._run_block(tuple(map(int, block)), random, warp_by_warp)

    def _run_block(self, block, random, warp_by_warp):
        for axis, index in zip("xyz", block):
            self.registers.block[axis][:] = index
        self.registers.poison(random)
        self.shared.poison()
        self.copies.reset()
        self.products.reset()
        self.pc.fill(0)
        self.ready.fill(True)
        self.alive.fill(True)
        warps = self.every // 32
        teams = [warps == w for w in range(self.lanes // 32)] if warp_by_warp else [np.ones(self.lanes, bool)]
        self.left = BRANCHES
        while self.alive.any():
            for team in random.permutation(len(teams)):
                self._run_team(teams[team], block)
            if len(set(self.stopped[self.alive].tolist())) > 1:
                lines = sorted({self.program.instructions[at].line for at in self.stopped[self.alive]})
                raise Stuck(f"{self.program.name}, block {block}: threads wait at different barriers, lines {lines}")
            self.ready[:] = self.alive

    def _run_team(self, team, block):
        """Until every lane of the team waits at a barrier or has ended."""
        while (ready := self.ready & team).any():
            at = int(self.pc[ready].min())
            group = ready & (self.pc == at)
            others = ready & ~group
            limit = int(self.pc[others].min()) if others.any() else END
            try:
                at = self._run_group(True if group.all() else group, at, limit)
            except PtxError as error:
                i = self.program.instructions[self.at]
                where = f"{self.program.name}, block {block}, line {i.line}: {i.text}"
                raise type(error)(f"{where}: {error}") from error

    def _run_group(self, m, at, limit):
        """Lanes side by side from one step on, until they part, stop, or reach others."""
        steps, mine = self.steps, slice(None) if m is True else m
        while at < limit:
            control = self.next_control[at]
            for self.at in range(at, min(limit, control)):
                steps[self.at](m)
            at = self.at = min(limit, control)
            if at == limit:
                break
            outcome = steps[at](m)
            if outcome is None:
                at += 1
                continue
            self.left -= 1
            if self.left < 0:
                raise Stuck(f"more than {BRANCHES} branches")
            if type(outcome) is int:
                at = outcome
                continue
            what, lanes = outcome
            if what is _BARRIER and lanes is True:
                at += 1
                continue
            self.pc[mine] = at + 1
            where = slice(None) if lanes is True else lanes
            if what is _EXIT:
                self.alive[where] = self.ready[where] = False
            elif what is _BARRIER:
                self.ready[where] = False
                self.stopped[where] = at
            else:
                self.pc[where] = what
            return
        self.pc[mine] = at


@functools.lru_cache(maxsize=64)
def machine(ptx, lanes, shared_bytes):
    return Machine(ptx, lanes, shared_bytes)
