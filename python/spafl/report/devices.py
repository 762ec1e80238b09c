"""What became of the clients' turns on their devices, where a run models them: who was late, who never took part."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from .run_data import Turns
from .table import duration, quantity

__all__ = ["devices_html", "devices_text"]

SHOWN = 10  # clients that a sentence names


_HEADER = [
    "class", "clients", "turns", "in time", "late", "broke off", "too large", "never took part", "time of a turn",
    "energy of a turn",
]  # fmt: skip


def _rows(turns: Turns) -> list[list[str]]:
    rows = []
    classes = np.array(turns.classes)
    for name in dict.fromkeys(turns.classes):
        own = classes == name
        total = int(turns.outcomes[own].sum())
        late, fine = int(turns.count("late")[own].sum()), int(turns.count("in time")[own].sum())
        large = int(turns.count("too large")[own].sum())
        mean = [duration(turns.seconds[own].sum() / total), quantity(turns.joules[own].sum() / total, "J")]
        rows.append([
            name, str(int(own.sum())), str(total), str(fine), str(late), str(total - fine - late - large), str(large),
            str(int((turns.count("in time")[own] == 0).sum())), *(mean if total else ["-", "-"]),
        ])  # fmt: skip
    return rows


def devices_text(turns: Turns) -> str:
    """Who is late most often and who never takes part, in a sentence or two; clients are numbered from 0."""
    late, asked = turns.count("late"), turns.outcomes.sum(1)
    slowest = [k for k in np.argsort(-late, kind="stable")[:SHOWN].tolist() if late[k]]
    said = [f"client {k} ({turns.classes[k]}) in {late[k]} of {asked[k]} turns" for k in slowest]
    absent = turns.absent.tolist()
    more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
    names = ", ".join(f"{k} ({turns.classes[k]})" for k in absent[:SHOWN])
    return " ".join([
        f"Most often late: {'; '.join(said)}." if said else "Nobody was late.",
        f"Never took part: {names}{more}." if absent else "Everybody took part.",
    ])  # fmt: skip


def devices_html(titles: Sequence[str], turns: Sequence[Turns | None]) -> str:
    """A table by class of device and the sentence for every run that models devices; empty without any."""
    parts = []
    for title, of_run in zip(titles, turns, strict=True):
        if of_run is None:
            continue
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADER)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in _rows(of_run)
        )
        about = f"{title}: {devices_text(of_run)}" if len(titles) > 1 else devices_text(of_run)
        parts.append(
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
            f"<p>{html.escape(about)}</p>"
        )
    return "\n".join(parts)
