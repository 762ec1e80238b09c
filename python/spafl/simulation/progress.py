"""Live progress: one line that changes on a terminal, a line per round elsewhere, all on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

from tqdm import tqdm

# Seconds after which something is said even though no round has ended.
SILENCE = 60.0


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.5 kB`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def say(text: str) -> None:
    """A line of its own on standard error, above the progress line if there is one."""
    # The terminal may be gone (SIGHUP): no reason to lose a run.
    with contextlib.suppress(OSError):
        tqdm.write(f"spafl: {text}", file=sys.stderr)


class ProgressLine:
    """Round, time left, accuracy, density and payload so far.

    Args:
        name, rounds: of the run.
        done: rounds that were finished before.
        quiet: say nothing.
    """

    def __init__(self, name: str, rounds: int, done: int, quiet: bool = False) -> None:
        self._name, self._rounds, self._done, self._first = name, rounds, done, done
        self._quiet = quiet
        self._start = self._last = self._warm = time.monotonic()
        self._pace = 0.0  # seconds per round
        self._bar: tqdm | None = None
        self._closed = threading.Event()
        if quiet:
            return
        if sys.stderr.isatty():
            self._bar = tqdm(total=rounds, initial=done, desc=name, unit="round", file=sys.stderr)
        else:
            threading.Thread(target=self._break_silence, name="progress", daemon=True).start()

    def update(self, line: dict[str, Any]) -> None:
        """Show a finished round's metrics."""
        self._done += 1
        now, done = time.monotonic(), self._done - self._first
        if done == 1:  # it is longer than others: workers start, kernels are chosen
            self._warm, self._pace = now, now - self._start
        else:
            self._pace = (now - self._warm) / (done - 1)
        if self._quiet:
            return
        shown = {}
        if line["evaluation"] is not None:
            shown["accuracy"] = f"{100 * line['evaluation']['accuracy']['mean']:.1f}%"
        if line["density"] is not None:
            shown["density"] = f"{line['density']['layer_mean']:.2f}"
        payload = line["cost"]["payload"]
        shown["sent"] = human_bytes(payload["up_bytes"] + payload["down_bytes"])
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_postfix(shown, refresh=False)
                self._bar.update()
        else:
            figures = "".join(f", {name} {value}" for name, value in shown.items())
            self._line(f"round {self._done} of {self._rounds}{figures}")

    def _line(self, what: str) -> None:
        self._last = time.monotonic()
        spent = tqdm.format_interval(self._last - self._start)
        left = "time left unknown"
        if self._done > self._first:
            left = f"{tqdm.format_interval(self._pace * (self._rounds - self._done))} left"
        with contextlib.suppress(OSError):
            print(f"{self._name}: {what}; {spent} so far, {left}", file=sys.stderr, flush=True)

    def _break_silence(self) -> None:
        while not self._closed.wait(max(0.0, self._last + SILENCE - time.monotonic())):
            if time.monotonic() - self._last >= SILENCE and self._done < self._rounds:
                self._line(f"in round {self._done + 1} of {self._rounds}")
            elif self._done >= self._rounds:
                return

    def say(self, text: str) -> None:
        """A line of its own; nothing when quiet."""
        if not self._quiet:
            say(text)

    def close(self) -> None:
        self._closed.set()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
