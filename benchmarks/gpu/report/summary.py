"""The table at the end of a report, from its rows alone: it is made anew after every stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Rows = Iterable[dict[str, Any]]


def text(rows: Rows) -> str:
    """The whole summary."""
    found = list(rows)
    parts = (_stages, _device, _values, _steps, _layers, _kernels, _runs, _red)
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part(found)))) + "\n"


def _of(rows: Rows, kind: str) -> list[dict[str, Any]]:
    return [r for r in rows if r["kind"] == kind]


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _stages(rows: Rows) -> Iterator[str]:
    kernels = {r["stage"]: f"  {r['loaded']} kernels loaded, {r['compiled']} compiled" for r in _of(rows, "kernels")}
    for r in _of(rows, "stage"):
        yield f"{r['stage']:<20} {r['state']:<8} {r['seconds']:6.0f} s{kernels.get(r['stage'], '')}"


def _device(rows: Rows) -> Iterator[str]:
    for r in _of(rows, "device"):
        yield ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("stage", "kind"))
    for kind in ("packed", "extension", "triton", "ceiling", "launch"):
        for r in _of(rows, kind):
            yield f"{kind}: " + ", ".join(f"{k} {_number(v)}" for k, v in r.items() if k not in ("stage", "kind"))


def _values(rows: Rows) -> Iterator[str]:
    for r in (*_of(rows, "worst"), *_of(rows, "pass"), *_of(rows, "tests"), *_of(rows, "sanitizer")):
        facts = ", ".join(f"{k} {_number(v)}" for k, v in r.items() if k not in ("stage", "kind"))
        yield f"{r['stage']}: {facts}"


def _benchmark(rows: Rows, *kinds: str) -> list[dict[str, Any]]:
    return [r for r in _of(rows, "row") if r.get("what") in kinds]


def _steps(rows: Rows) -> Iterator[str]:
    chosen = _benchmark(rows, "step", "cohort")
    if chosen:
        yield f"{'step':<28} {'density':>7} {'provider':<16} {'eager us':>10} {'graph us':>10}  over the rival"
    cells: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for r in chosen:
        key = (
            f"{r['model']} b{r['batch']}" + (f" x{r['clients']}" if r["what"] == "cohort" else ""),
            r["density"],
            r["provider"],
        )
        cells.setdefault(key, {})[r["graph"]] = r
    for (name, density, provider), ways in cells.items():
        times = [_us(ways.get(way)) for way in (0, 1)]
        ratios = ", ".join(_number(ways[way].get("speedup_vs_dense", "-")) for way in (0, 1) if way in ways)
        yield f"{name:<28} {density:>7} {provider:<16} {times[0]:>10} {times[1]:>10}  {ratios}"


def _us(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row.get("us") is not None:
        return f"{row['us']:.0f}"
    return "error" if row.get("error") else row["gate"][:10]


def _layers(rows: Rows) -> Iterator[str]:
    chosen = [r for r in _benchmark(rows, "layer") if r["provider"] in ("dense", "ours", "compact")]
    if not chosen:
        return
    columns = ("dense us", "compact", "ours us", "ratio", "ceiling")
    yield f"{'layer':<44} {'dtype':<5} {'mode':<8} {'density':>7} " + " ".join(f"{c:>8}" for c in columns)
    dense, cells = {}, dict[tuple[Any, ...], dict[str, dict[str, Any]]]()
    for r in chosen:
        if r["provider"] == "dense":
            dense[r["model"], r["layer"], r["dtype"], r["mode"]] = r
        cells.setdefault((r["model"], r["layer"], r["dtype"], r["mode"], r["density"]), {})[r["provider"]] = r
    for key, found in cells.items():
        ours = found.get("ours")
        ratios = [_number((ours or {}).get(name, "-")) for name in ("speedup_vs_dense", "ceiling")]
        cell = (_us(dense.get(key[:4])), _us(found.get("compact")), _us(ours), *ratios)
        yield f"{key[0] + '.' + key[1]:<44} {key[2]:<5} {key[3]:<8} {key[4]:>7} " + " ".join(f"{c:>8}" for c in cell)


def _kernels(rows: Rows) -> Iterator[str]:
    for r in _of(rows, "captured"):
        yield f"{r['model']} b{r['batch']} {r['arithmetic']} at {r['density']}: {r['provider']} {_number(r['us'])} us"
    sums: dict[tuple[Any, ...], float] = {}
    for r in _of(rows, "kernel"):
        key = (r["of"], r["density"], r["provider"])
        sums[key] = sums.get(key, 0.0) + r["us"]
        if sums[key] > r["us"] and r["us"] < 0.04 * sums[key]:
            continue
        where = f"{r['of']:<28} {r['density']:>5} {r['provider']:<14}"
        yield f"{where} {r['us']:8.1f} us {r['launches']:5.1f}x  {r['kernel'][:60]}"
    for (of, density, provider), us in sums.items():
        yield f"{of:<28} {density:>5} {provider:<14} {us:8.1f} us in all"


def _runs(rows: Rows) -> Iterator[str]:
    for r in _of(rows, "run"):
        seconds = ", ".join(f"{s:.2f}" for s in r["round_seconds"])
        what = f"{r.get('data', 'digits')} on {r['where']}, {r['engine']}"
        yield f"{what}: rounds of {seconds} s, accuracy {r['accuracy']:.3f}"

    for r in _of(rows, "speed"):
        what = f"{r['model']} b{r['batch']} at {r['density']}"
        yield f"{what}: {r['steps_per_second']:.0f} steps/s of a simulation, one worker on {r['where']}"


def _red(rows: Rows) -> Iterator[str]:
    for r in _of(rows, "red"):
        yield f"RED {r['stage']}: {r['what']}"
