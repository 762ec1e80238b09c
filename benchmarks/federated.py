"""Whole federated rounds as density falls: compact engine, masked engine, and training as published.

    python -m benchmarks.federated [--settings fmnist cifar10] [--densities 1 .5 ...] [--rounds 3] [--out FILE.csv]

The published settings (LeNet-5, batch 64, identity estimator; Conv4, batch 16, window, clip 3; 100 clients, 10 a round,
5 local epochs, Dirichlet .2 and .1) on synthetic data of that shape, with fewer samples than the real sets (a half and
an eighth) so that a round is short: what a round costs per client weighs more here than in a full run. Thresholds are
raised between rounds so that the density of all layers but the last falls to the wanted one; training moves masks from
there, and the mean density shown was measured.

Rivals run the same rounds in turn, round by round, and begin them in another order each time: ``compact`` and
``masked`` with two workers of one thread, ``published`` in one process with two threads, the published training loop
with its masks materialised. Nothing is timed at a density unless the trainers agree over a few steps at it, in float64
and float32; and a round is reported only if all rivals, which begin it with the same tensors, end it with the same
thresholds and the same training loss, to float32 rounding.

Run it on an idle machine: where other work takes a core, the two threads wait for one another. A round in which that is
plain to see (more than three times ``masked``'s seconds) gives no speed-up over ``published``.

No round is started more than ``--budget`` seconds after the begin; every round is in the file once it is measured.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import cases, common
from benchmarks.common import COLOURS, Row
from spafl.config import resolve_config
from spafl.simulation.loop import Simulation
from spafl.simulation.pool import Pool
from spafl.simulation.runfolder import RunFolder
from spafl_kernels import threshold_layers

KEY = ("setting", "target", "round")
SETTINGS: dict[str, dict[str, Any]] = {
    "fmnist": {
        "data": {"image": 28, "channels": 1, "train": 30_000},
        "partition": {"alpha": 0.2},
        "model": {"name": "lenet5"},
        "algorithm": {"name": "spafl", "variant": "fmnist"},
    },
    "cifar10": {
        "data": {"image": 32, "channels": 3, "train": 6_000},
        "partition": {"alpha": 0.1, "min_train": 16},
        "model": {"name": "conv4"},
        "algorithm": {"name": "spafl", "variant": "cifar10"},
    },
}
TOLERANCE = 1e-3  # of thresholds, relative, after a round in float32
LOSS_TOLERANCE = 5e-3  # of the mean training loss, which gathers the rounding of all steps (2e-4 was seen)
# Two threads do the work of the two workers and materialise masks: at most a few ten per cent more is to be expected.
DISTURBED = 3.0


@dataclass(frozen=True)
class Style:
    """How a rival runs."""

    engine: str
    workers: int
    threads: int
    published: bool = False


RIVALS = {
    "published": Style("masked", 1, 2, published=True),
    "masked": Style("masked", 2, 1),
    "compact": Style("compact", 2, 1),
}
LINES = {"compact": (COLOURS[0], "-"), "masked": (COLOURS[1], "--"), "published": ("#666666", ":")}


@dataclass(frozen=True)
class Round:
    """What a round took and gave: seconds, mean density of the clients that trained, their mean loss."""

    seconds: float
    density: float
    loss: float


class Rival:
    """One simulation that is advanced a round at a time."""

    def __init__(self, setting: str, style: Style, folder: Path, samples: int | None = None) -> None:
        self.threads = style.threads
        tables = SETTINGS[setting]
        data = {"name": "synthetic", "classes": 10, "test": 500, **tables["data"]}
        config = resolve_config(
            {
                **tables,
                "rounds": 10**6,
                "data": data | ({"train": samples} if samples else {}),
                "partition": {"scheme": "dirichlet", "clients": 100, **tables["partition"]},
                "evaluation": {"every": 10**6},
                "simulation": {
                    "workers": style.workers,
                    "engine": style.engine,
                    "device": "cpu",
                    "checkpoint_every": 10**6,
                },
            }
        )
        self.folder = RunFolder(folder, resume=False)
        self.simulation = Simulation(config, self.folder, quiet=True)
        self.pool = Pool(self.simulation.worker_setup(), style.workers)
        if style.published:
            assert self.pool._own is not None
            resident = self.pool._own.resident
            resident.trainer = cases.RIVALS["published"](resident.model)
        self.round = 0

    def raise_thresholds(self, density: float) -> None:
        """Set the global thresholds to the scores' quantiles of the initial model, and go back to round 1.

        The same clients are sampled at each density, so that rounds differ in density alone.
        """
        self.round = 1
        layers = list(threshold_layers(self.simulation.problem.model))
        for name, layer in layers:
            # The last layer stays as it is: without its neurons there is no class to predict.
            last = name == layers[-1][0]
            scores = layer.scores()
            level = 0.0 if last or density >= 1 else torch.quantile(scores, 1 - density).item()
            self.simulation.server[f"{name}.threshold"] = torch.full_like(scores, level)

    def follow(self, other: Rival) -> None:
        """Begin the next round from another's state: rounding moves masks, and must not add up over rounds."""
        mine, theirs = self.simulation, other.simulation
        mine.server = {name: tensor.clone() for name, tensor in theirs.server.items()}
        mine.log = copy.deepcopy(theirs.log)
        assert mine.store is not None and theirs.store is not None
        for client in range(mine.clients):
            if theirs.store.touched(client):
                for name, tensor in theirs.store.load(client).items():
                    mine.store.buffer[name].copy_(tensor)
                mine.store.save(client)

    def run_round(self) -> Round:
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        line = self.simulation.ledger.book(self.simulation.run_round(self.pool, self.round))
        seconds = time.perf_counter() - begin
        torch.set_num_threads(1)
        self.round += 1
        return Round(seconds, line["figures"]["density"], line["train_loss"])

    @property
    def thresholds(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self.simulation.server.items() if name.endswith(".threshold")}

    def close(self) -> None:
        self.pool.close()
        self.folder.close()


def gate(rivals: dict[str, Rival], rounds: dict[str, Round]) -> str:
    """Empty if all rivals hold the thresholds and had the loss of the masked one, else what differs."""
    expected = rivals["masked"].thresholds
    for name, rival in rivals.items():
        for key, value in expected.items():
            if not torch.allclose(rival.thresholds[key], value, rtol=TOLERANCE, atol=1e-5):
                return f"{name}: {key} differs by {(rival.thresholds[key] - value).abs().max():.1e}"
        loss = rounds["masked"].loss
        if not abs(rounds[name].loss - loss) <= LOSS_TOLERANCE * max(1.0, abs(loss)):
            return f"{name}: training loss {rounds[name].loss} instead of {loss}"
    return ""


def measure(setting: str, densities: Sequence[float], args: Any, rows: common.Rows, end: float) -> None:
    """Add a row per round."""
    case = cases.CASES[SETTINGS[setting]["model"]["name"]]
    with tempfile.TemporaryDirectory() as folder:
        rivals: dict[str, Rival] = {}
        try:
            for name, style in args.styles.items():
                rivals[name] = Rival(setting, style, Path(folder) / name, args.samples)
                rivals[name].run_round()  # warm-up: processes start, kernels are chosen
            for target in densities:
                if wrong := _steps_differ(case, target):
                    rows.add({"setting": setting, "target": target, "round": 0, "wrong": wrong})
                    print(f"{setting} at {target:g} WRONG, not timed: {wrong}", flush=True)
                    continue
                for rival in rivals.values():
                    rival.raise_thresholds(target)
                for number in range(args.rounds):
                    if time.monotonic() > end:
                        print(f"{setting} from round {number} at {target:g} on: left out, out of time", flush=True)
                        return
                    row = _round(rivals, number)
                    rows.add({"setting": setting, "target": target, "round": number} | row)
                    print(_line(setting, target, row), flush=True)
        finally:
            for rival in rivals.values():
                rival.close()


def _steps_differ(case: cases.Case, density: float) -> str:
    for name in ("published", "compact"):
        if wrong := cases.gate(case, functools.partial(case.pruned, density), name):
            return wrong
    return ""


def _round(rivals: dict[str, Rival], number: int) -> dict[str, object]:
    names, first = list(rivals), number % len(rivals)
    for name, rival in rivals.items():
        if name != "masked":
            rival.follow(rivals["masked"])
    found = {name: rivals[name].run_round() for name in names[first:] + names[:first]}
    if wrong := gate(rivals, found):
        return {"wrong": wrong}
    return {"density": round(found["compact"].density, 3)} | figures({name: found[name].seconds for name in names})


def figures(seconds: dict[str, float]) -> dict[str, object]:
    """Seconds of a round and what they say; no speed-up over a rival that was kept from working."""
    disturbed = seconds["published"] > DISTURBED * seconds["masked"]
    return {
        **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
        "vs_published": "" if disturbed else round(seconds["published"] / seconds["compact"], 2),
        "vs_masked": round(seconds["masked"] / seconds["compact"], 2),
        "wrong": "",
    }


def _line(setting: str, target: float, row: dict[str, object]) -> str:
    if row["wrong"]:
        return f"{setting:8} at {target:<4g} WRONG, not reported: {row['wrong']}"
    over = f"x{row['vs_published']} over" if row["vs_published"] else "disturbed, so no figure over"
    return (
        f"{setting:8} at {target:<4g} density {row['density']:<5}  published {row['published_s']:7.2f} s  masked "
        f"{row['masked_s']:7.2f} s  compact {row['compact_s']:7.2f} s  {over} published  "
        f"x{row['vs_masked']} over masked"
    )


def _cells(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """By setting and target: the rounds that were right."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in common.right(rows):
        found.setdefault((row["setting"], float(row["target"])), []).append(row)
    return found


def _median(rows: Sequence[Row], column: str) -> float:
    """NaN where no row has a figure."""
    found = [float(row[column]) for row in rows if row[column]]
    return statistics.median(found) if found else math.nan


def table(rows: Sequence[Row]) -> str:
    """Seconds per round and speed-ups, medians over rounds."""
    lines = []
    for (setting, target), mine in _cells(rows).items():
        seconds = (f"{_median(mine, f'{name}_s'):.2f}" for name in ("published", "masked", "compact"))
        speed = (f"{_median(mine, name):.3g}x".replace("nanx", "-") for name in ("vs_published", "vs_masked"))
        lines.append([setting, f"{target:g}", f"{_median(mine, 'density'):.2f}", *seconds, *speed])
    densities = ("density set", "mean over layers and clients")
    times = ("as published, s a round", "masked", "compact")
    return common.markdown(["setting", *densities, *times, "over published", "over masked"], lines)


@common.in_style
def plot(rows: Sequence[Row]) -> Figure:
    """Rounds per minute against measured density."""
    cells = _cells(rows)
    settings = list(dict.fromkeys(setting for setting, _ in cells))
    figure = Figure(figsize=(4.2 * max(len(settings), 1), 3.4))
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings):
        mine = sorted((found for (of, _), found in cells.items() if of == setting), key=lambda r: _median(r, "density"))
        x = [_median(found, "density") for found in mine]
        for name, (colour, style) in LINES.items():
            used = [[row for row in found if name != "published" or row["vs_published"]] for found in mine]
            y = [60 / _median(found, f"{name}_s") for found in used]
            axes.plot(x, y, style, color=colour, marker="o", markersize=4, label=name)
        axes.set_title(setting)
        axes.set_xlabel("density, mean over layers and clients")
        axes.set_ylabel("rounds per minute")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.invert_xaxis()
        axes.legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.federated", __doc__)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=3, help="rounds per density")
    parser.add_argument("--samples", type=int, help="training samples of all 100 clients together")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no new density is started")
    args = parser.parse_args(argv)
    common.check_densities(parser, args.densities)
    args.styles = RIVALS
    if args.quick:
        args.settings, args.densities, args.rounds, args.samples = ["fmnist"], [0.5], 1, 1500
        args.styles = {name: Style(s.engine, 1, 1, s.published) for name, s in RIVALS.items()}  # no processes to start
    rows = common.start(args, KEY)
    end = time.monotonic() + args.budget
    for setting in args.settings:
        measure(setting, args.densities, args, rows, end)
    common.picture(rows, plot)
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)
