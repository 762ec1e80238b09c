"""Traces of availability: when clients are there, read from a JSON file.

``{"period": 86400, "clients": {"0": [[0, 3600], [7200, 9000]], ...}}``: by client number, the times from and to which
it is there, in seconds since the start of the run, ascending and apart. With a ``period`` the trace repeats itself.
Clients that are not listed are always there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checked import short
from ..errors import UserError

__all__ = ["Trace", "read_trace"]

MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Trace:
    """When clients are there.

    Args:
        period: seconds after which it repeats; infinity: never.
        spans: by client, ``(from, to)`` in seconds.
    """

    period: float
    spans: Mapping[int, Sequence[tuple[float, float]]]

    def until(self, client: int, time: float) -> float | None:
        """Until when a client that is there at ``time`` stays (infinity: for ever); None: it is not there."""
        if client not in self.spans:
            return math.inf
        start, at = self._split(time)
        for begin, end in self.spans[client]:
            if begin <= at < end:
                if end == self.period and self._whole(client):
                    return math.inf
                # A span that ends with the period goes on where the next begins at 0.
                if end == self.period and self.spans[client][0][0] == 0:
                    end += self.spans[client][0][1]
                return start + end
        return None

    def next(self, client: int, time: float) -> float:
        """When a client is there next, from ``time`` on; infinity: never again."""
        if self.until(client, time) is not None:
            return time
        start, at = self._split(time)
        later = [begin for begin, _ in self.spans[client] if begin > at]
        if later:
            return start + min(later)
        spans = self.spans[client]
        return start + self.period + spans[0][0] if spans and math.isfinite(self.period) else math.inf

    def _split(self, time: float) -> tuple[float, float]:
        """Start of the present repetition, and the time since."""
        if not math.isfinite(self.period):
            return 0.0, time
        start = math.floor(time / self.period) * self.period
        return start, time - start

    def _whole(self, client: int) -> bool:
        return list(self.spans[client]) == [(0.0, self.period)]


def read_trace(path: Path, clients: int) -> Trace:
    """Read a trace of availability.

    Raises:
        UserError: it cannot be read, or is not as the module describes; one line.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"system.trace: {path} has more than {MAX_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"system.trace: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"system.trace: {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("clients"), dict):
        raise UserError(
            f'system.trace: {path} must hold {{"period": seconds, "clients": {{number: [[from, to], ...]}}}}'
        )
    if unknown := sorted(content.keys() - {"period", "clients"}):
        raise UserError(f"system.trace: {path} holds {short(unknown[0])}, which is neither period nor clients")
    period = content.get("period")
    if period is not None and not (_is_time(period) and period > 0):
        raise UserError(f"system.trace: {path}: period must be seconds above 0 or null; got {short(period)}")
    end = math.inf if period is None else float(period)
    spans = {}
    for name, given in content["clients"].items():
        if not (name.isascii() and name.isdigit() and int(name) < clients):
            raise UserError(f"system.trace: {path}: {short(name)} is no client of 0 to {clients - 1}")
        spans[int(name)] = _spans(path, name, given, end)
    return Trace(end, spans)


def _spans(path: Path, client: str, given: object, end: float) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    last = 0.0
    for span in given if isinstance(given, list) else [None]:
        if not (isinstance(span, list) and len(span) == 2 and all(map(_is_time, span)) and last <= span[0] < span[1]):
            raise UserError(
                f"system.trace: {path}: client {client} needs [from, to] pairs of seconds, ascending and apart; "
                f"got {short(span)}"
            )
        if span[1] > end:
            raise UserError(f"system.trace: {path}: client {client} has a time after the period; got {short(span)}")
        last = float(span[1])
        found.append((float(span[0]), last))
    return found


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
