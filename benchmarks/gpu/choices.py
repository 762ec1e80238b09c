"""Makes the tables by which ``auto`` picks a backend, :mod:`spafl_kernels.gpu.tables.choices`, from measured rows."""

from __future__ import annotations

from collections.abc import Iterable

from spafl_kernels.gpu.tables.choices import Choice, Table, Way

from .results import latest, origin

# A choice may cost at most this much more than dense, on any measured layer; see `misses`.
ALLOWED = 1.03


def _times(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows with a time, of layers as a user calls them, by everything that tells one cell from another."""
    return {
        (r["gpu"], r["shape_class"], r["dtype"], r["graph"], r["model"], r["layer"], r["batch"], r["provider"],
         f"{float(r['density']):g}"): r
        for r in latest(rows)
        if r["kind"] == "layer" and r["mode"] == "module" and r["us"] and not r["gate"].startswith("fail")
    }  # fmt: skip


# Which provider's times speak for a choice; masked dense speaks for "reference".
SPEAKERS: dict[str, Choice] = {"ours": "triton", "narrow": "narrow"}


def make(rows: Iterable[dict[str, str]]) -> list[Table]:
    """One table per device.

    A choice is safe at a density where, on every layer of the class, its 80th percentile is below the 20th of masked
    dense, there and at every lower density that was measured: what the host knows of a density is an upper bound.
    Masked dense, which computes the same function, does not depend on the density. Of several safe ones the table
    names the one whose worst ratio to masked dense is the smallest.

    Raises:
        ValueError: no row has what a table needs.
    """
    times = _times(rows)
    # By cell and density, then by choice: ratio to masked dense, and whether it is faster beyond the spread, per layer.
    verdicts: dict[tuple[str, str, str, Way, float], dict[Choice, list[tuple[float, bool]]]] = {}
    made: dict[str, dict[str, str]] = {}
    for (gpu, shape, dtype, graph, model, layer, batch, provider, density), row in times.items():
        dense = times.get((gpu, shape, dtype, graph, model, layer, batch, "masked", "1"))
        if provider not in SPEAKERS or dense is None:
            continue
        way: Way = "graph" if graph == "1" else "eager"
        verdict = float(row["us"]) / float(dense["us"]), float(row["us_p80"]) < float(dense["us_p20"])
        cell = verdicts.setdefault((gpu, shape, dtype, way, float(density)), {})
        cell.setdefault(SPEAKERS[provider], []).append(verdict)
        made[gpu] = origin(row)
    if not verdicts:
        raise ValueError("no layer has the times of both the packed kernels and masked dense in mode module")
    tables: dict[str, dict[str, dict[str, dict[str, dict[float, Choice]]]]] = {}
    lost: set[tuple[str, str, str, Way, Choice]] = set()
    for (gpu, shape, dtype, way, density), cell in sorted(verdicts.items()):
        safe: dict[Choice, float] = {}
        for choice, found in cell.items():
            if not all(faster for _, faster in found):
                lost.add((gpu, shape, dtype, way, choice))
            if (gpu, shape, dtype, way, choice) not in lost:
                safe[choice] = max(ratio for ratio, _ in found)
        ways = tables.setdefault(gpu, {}).setdefault(shape, {}).setdefault(dtype, {})
        ways.setdefault(way, {})[density] = min(safe, key=safe.__getitem__) if safe else "reference"
    return [Table(gpu, made[gpu], entries) for gpu, entries in tables.items()]


def misses(rows: Iterable[dict[str, str]], table: Table) -> list[str]:
    """Measured layers on which the table's choice is more than 3 % slower than the plain dense operator, in words."""
    times, found = _times(rows), []
    for (gpu, shape, dtype, graph, model, layer, batch, provider, density), row in times.items():
        if provider != "ours" or gpu != table.device:
            continue
        way: Way = "graph" if graph == "1" else "eager"
        key = (gpu, shape, dtype, graph, model, layer, batch)
        chosen = table.look_up(shape, dtype, way, float(density))[0]
        speaker = {"triton": row, "narrow": times.get((*key, "narrow", density))}
        taken = speaker.get(chosen, times.get((*key, "masked", "1")))
        dense = times.get((*key, "dense", "1"))
        if taken is None or dense is None:
            continue
        ratio = float(taken["us"]) / float(dense["us"])
        if ratio > ALLOWED:
            found.append(
                f"{model}.{layer} batch {batch} {dtype} {way} at density {density}: {chosen} takes {ratio:.2f} times "
                "as long as plain dense"
            )
    return found
