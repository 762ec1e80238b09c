"""Live progress on a terminal; silent when the output is not one."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.5 kB`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


class ProgressLine:
    """One line: round, time left, accuracy, density and payload so far."""

    def __init__(self, name: str, rounds: int, done: int, quiet: bool = False) -> None:
        self._quiet = quiet
        # disable=None: tqdm itself looks whether the output is a terminal.
        self._bar = tqdm(total=rounds, initial=done, desc=name, unit="round", disable=True if quiet else None)

    def update(self, line: dict[str, Any]) -> None:
        """Show a finished round's metrics."""
        shown = {}
        if line["evaluation"] is not None:
            shown["accuracy"] = f"{100 * line['evaluation']['accuracy']['mean']:.1f}%"
        if line["density"] is not None:
            shown["density"] = f"{line['density']['layer_mean']:.2f}"
        payload = line["cost"]["payload"]
        shown["sent"] = human_bytes(payload["up_bytes"] + payload["down_bytes"])
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """A line of its own on standard error, above the progress line; nothing when quiet."""
        if not self._quiet:
            tqdm.write(f"spafl: {text}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
