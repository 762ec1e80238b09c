"""What the channels of a tensor are made of: ranges of the filters of threshold layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """``count`` channels, each ``repeat`` times in a row.

    ``sources``: threshold layers and the filters of theirs that end in the first channel, ascending by name. Channel
    ``i`` is dropped where every one of them drops its filter ``start + i``; never, if there is none.
    """

    sources: tuple[tuple[str, int], ...]
    count: int
    repeat: int = 1

    @property
    def width(self) -> int:
        return self.count * self.repeat

    def part(self, start: int, count: int) -> Segment:
        """``count`` channels from ``start``, both without repetition."""
        return Segment(tuple((name, first + start) for name, first in self.sources), count, self.repeat)


@dataclass(frozen=True)
class Layout:
    """What the channel dimension ``dim`` of a tensor is made of."""

    dim: int
    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        return sum(s.width for s in self.segments)

    @property
    def sources(self) -> tuple[str, ...]:
        """The threshold layers, in order of their first channel; ``""`` for channels that are never dropped."""
        return tuple(dict.fromkeys(name for s in self.segments for name, _ in s.sources or (("", 0),)))

    @property
    def summed(self) -> bool:
        """Whether a channel may belong to several layers."""
        return any(len(s.sources) > 1 for s in self.segments)

    def repeated(self, times: int, dim: int) -> Layout:
        return Layout(dim, tuple(Segment(s.sources, s.count, s.repeat * times) for s in self.segments))

    def narrow(self, start: int, stop: int) -> Layout | None:
        """Channels ``start:stop``, or None if that would cut through a repeated channel."""
        parts, at = [], 0
        for s in self.segments:
            low, high = max(start, at), min(stop, at + s.width)
            if low < high:
                if (low - at) % s.repeat or (high - at) % s.repeat:
                    return None
                parts.append(s.part((low - at) // s.repeat, (high - low) // s.repeat))
            at += s.width
        return Layout(self.dim, tuple(parts))

    def take(self, index: Sequence[int], merge: bool = True) -> tuple[Segment, ...]:
        """What the channels ``index`` are made of; neighbours are put together, unless ``merge`` is False."""
        every = [
            tuple((name, first + k // s.repeat) for name, first in s.sources)
            for s in self.segments
            for k in range(s.width)
        ]
        runs: list[list[tuple[tuple[str, int], ...]]] = []
        for sources in (every[i] for i in index):
            run = runs[-1] if runs and merge else []
            if run and sources == tuple((name, first + 1) for name, first in run[-1]):
                run.append(sources)
            else:
                runs.append([sources])
        return tuple(Segment(run[0], len(run)) for run in runs)

    def plus(self, other: Layout) -> Layout | None:
        """The layout of a sum of equally wide tensors, or None if their channels are not repeated alike."""
        if self.dim != other.dim:
            return None
        parts, rest = [], [list(self.segments), list(other.segments)]
        while rest[0]:
            a, b = (segments.pop(0) for segments in rest)
            if a.repeat != b.repeat:
                return None
            count = min(a.count, b.count)
            # Never dropped in one of them is never dropped in the sum.
            both = {*a.sources, *b.sources} if a.sources and b.sources else ()
            parts.append(Segment(tuple(sorted(both)), count, a.repeat))
            for segments, s in zip(rest, (a, b)):
                if s.count > count:
                    segments.insert(0, s.part(count, s.count - count))
        return Layout(self.dim, tuple(parts))
