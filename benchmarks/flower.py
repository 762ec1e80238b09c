"""What Flower costs: socket bytes beside payload, seconds a round beside the simulator, for SpaFL and FedAvg.

    .venv-flower/bin/python -m benchmarks.flower [--rounds 5] [--cases NAME ...] [--out FILE.csv]

Three clients on this machine (``make flower`` sets the environment up): a SuperLink without TLS, so that bytes can be
looked at, and a SuperNode for every client behind a proxy that keeps what passes. All cases: LeNet-5, synthetic data,
one local epoch. Bytes are per client and round, up to the server and down, of rounds after the first (SpaFL's first
message down is half as long as the later ones): of sockets the median over clients and rounds, of payload the mean.
They are those of the calls that carry the round's messages (:mod:`benchmarks.flower_traffic`); what a node asks while
it waits is told apart, as bytes of one such call. ``zipped`` is the size of the same bytes if each node's messages were
compressed as one stream (zlib, level 6), which bounds what compressing metadata can give; the ``tested`` case tests all
clients after every round, a second message: what it adds is what sending both in one would save.

Bytes do not depend on the machine. Seconds do: ``load`` is the mean number of processes that wanted a core meanwhile,
``cores`` how many there were. ``simulator_seconds`` is the same round in the simulator, one process. Peak resident
memory is of a node's long-lived process, and of the largest process that it starts for a message.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row
from benchmarks.flower_traffic import BEAT, PULL, Call, Delivery, Proxy, calls, messages, zipped
from spafl.config import RunConfig, deep_merge, resolve_config
from spafl.simulation import run

KEY = ("case",)
CLIENTS = 3
CASES: dict[str, dict[str, Any]] = {
    "spafl": {"algorithm": {"name": "spafl", "penalty": 0.002}},
    "spafl, int8": {"algorithm": {"name": "spafl", "penalty": 0.002}, "communication": {"encoding": "int8"}},
    "spafl, tested": {"algorithm": {"name": "spafl", "penalty": 0.002}, "evaluation": {"every": 1}},
    "fedavg": {"algorithm": {"name": "fedavg"}},
}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_LOG_LEVEL": "INFO"}


def settings(case: str, rounds: int) -> RunConfig:
    """The configuration of a case."""
    tables = {
        "name": "flower", "seed": 1, "rounds": rounds,
        "data": {"name": "synthetic", "image": 28, "channels": 1, "classes": 10, "train": 300, "test": 90, "seed": 1},
        "partition": {"clients": CLIENTS, "alpha": 1.0, "min_train": 20, "min_test": 5},
        "model": {"name": "lenet5"},
        "training": {"lr": 0.02, "batch_size": 16, "epochs": 1},
        "sampling": {"clients_per_round": CLIENTS},
        "evaluation": {"every": 1000, "train_data": "never"},
        "simulation": {"engine": "masked", "device": "cpu", "workers": 1},
        "flower": {"patience": 600.0, "round_timeout": 600.0},
    }  # fmt: skip
    return resolve_config(deep_merge(tables, CASES[case]))


@contextlib.contextmanager
def started(log: Path, home: Path, command: Sequence[object]) -> Iterator[subprocess.Popen[bytes]]:
    """A program of Flower's, ended with its children."""
    bin = Path(sys.executable).parent
    path = os.pathsep.join([str(bin), os.environ.get("PATH", "")])
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}
    with log.open("a") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def wait_for(what: str, condition: Any, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def peaks(group: int) -> tuple[float, float]:
    """Peak resident MB of a process, and of the largest of its group beside it."""
    own, others = 0.0, [0.0]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if os.getpgid(int(entry.name)) != group:
                continue
            peak = int((entry / "status").read_text().split("VmHWM:")[1].split()[0]) / 1024
            if int(entry.name) == group:
                own = peak
            else:
                others.append(peak)
    return own, max(others)


class Federation:
    """A SuperLink and a SuperNode for every client, each behind a proxy."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, port = folder, free_port()
        for name in ("home", "home-link", *(f"home-{k}" for k in range(CLIENTS))):
            (folder / name).mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink.deploy]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        bin = Path(sys.executable).parent
        stack.enter_context(started(folder / "link.log", folder / "home-link", [
            bin / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port,
            "--disable-runtime-dependency-installation",
        ]))  # fmt: skip
        wait_for("the SuperLink", lambda: answers(port))
        self.proxies = [Proxy(port) for _ in range(CLIENTS)]
        self.nodes = [
            stack.enter_context(started(folder / f"node{k}.log", folder / f"home-{k}", [
                bin / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{proxy.port}", "--port",
                free_port(), "--node-config", f'client-id={k} state-dir="{folder / "state"}"',
            ])) for k, proxy in enumerate(self.proxies)
        ]  # fmt: skip
        for k in range(CLIENTS):
            wait_for("a SuperNode", lambda k=k: "SuperNode ID" in (folder / f"node{k}.log").read_text())

    def carry_out(self, case: str, config: RunConfig) -> dict[str, Any]:
        """One run; its figures."""
        name = case.replace(", ", "-")
        out, path = self.folder / name, self.folder / f"{name}.toml"
        path.write_text(config.to_toml())
        command = [sys.executable, "-m", "spafl.flower", path, "--out", out, "--federation", "deploy"]
        stamps: list[float] = []
        loads: list[float] = []
        largest: list[tuple[float, float]] = [(0.0, 0.0)] * CLIENTS
        end = time.monotonic() + 3000
        with started(self.folder / f"{name}.log", self.folder / "home", command) as process:
            while not (out / "summary.json").exists():
                lines = _lines(out)
                if len(lines) > len(stamps):
                    stamps.append(time.monotonic())
                    loads.append(os.getloadavg()[0])
                now = [peaks(node.pid) for node in self.nodes]
                largest = [tuple(map(max, a, b)) for a, b in zip(largest, now, strict=True)]  # type: ignore[misc]
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(f"{case}: the run did not end; see {self.folder}")
                time.sleep(0.05)
        lines = _lines(out)
        gone = [lost for line in lines for lost in line["lost"] + line["rejected"]]
        all_sent, waiting = zip(*(messages(calls(proxy.kept)) for proxy in self.proxies), strict=True)
        sent = [[each for each in node if each.run == node[-1].run] for node in all_sent]
        payload = [line["cost"]["payload"] for line in lines]
        rounds = (len(lines) - 1) * CLIENTS
        return {
            "wrong": f"client {gone[0]['client']}: {gone[0]['reason']}" if gone else "",
            **of_rounds(sent, config),
            "seconds": round(statistics.median(b - a for a, b in itertools.pairwise(stamps)), 2),
            "load": round(statistics.mean(loads), 1),
            "cores": os.cpu_count(),
            **{f"payload_{way}": (payload[-1][way] - payload[0][way]) // rounds for way in ("up_bytes", "down_bytes")},
            "node_mb": round(max(own for own, _ in largest)),
            "message_process_mb": round(max(other for _, other in largest)),
            **of_waiting([call for each in waiting for call in each]),
        }


def _lines(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def of_rounds(nodes: Sequence[Sequence[Delivery]], config: RunConfig) -> dict[str, int]:
    """Bytes of sockets per client and round, rounds after the first, median over both; and the same compressed."""
    kinds = {"train"} | ({"evaluate"} if config.evaluation.every == 1 else set())
    figures: dict[str, list[int]] = {"up_bytes": [], "down_bytes": [], "zipped_up_bytes": [], "zipped_down_bytes": []}
    for node in nodes:
        wanted = [each for each in node if each.kind in kinds]
        small = dict(zip(map(id, node), zipped(node), strict=True))
        if len(wanted) != config.rounds * len(kinds):
            raise RuntimeError(f"a node got {len(wanted)} messages in {config.rounds} rounds: {[d.kind for d in node]}")
        rounds = [wanted[at : at + len(kinds)] for at in range(len(kinds), len(wanted), len(kinds))]
        for deliveries in rounds:
            sizes = [(*each.bytes(), *small[id(each)]) for each in deliveries]
            for name, values in zip(figures, zip(*sizes, strict=True), strict=True):
                figures[name].append(sum(values))
    return {name: round(statistics.median(values)) for name, values in figures.items()}


def of_waiting(made: Sequence[Call]) -> dict[str, int]:
    """Bytes of a look for messages that finds none, and of a heartbeat."""
    found = {}
    for name, path in (("look", PULL), ("beat", BEAT)):
        kind = [call for call in made if call.path == path]
        for way in ("up", "down"):
            found[f"{name}_{way}_bytes"] = round(statistics.median([len(getattr(call, way)) for call in kind] or [0]))
    return found


def simulated(config: RunConfig) -> float:
    """Seconds of a round in the simulator, in one process: median over rounds after the first."""
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run(config, Path(folder) / "run", quiet=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        stamps = [json.loads(line)["cost"]["seconds"]["total"] for line in lines]
    return statistics.median(b - a for a, b in itertools.pairwise(stamps))


def table(rows: Sequence[Row]) -> str:
    """One line a case."""
    lines = [
        [
            row["case"],
            *(f"{int(row[c]):,}" for c in ("payload_up_bytes", "up_bytes", "zipped_up_bytes")),
            *(f"{int(row[c]):,}" for c in ("payload_down_bytes", "down_bytes", "zipped_down_bytes")),
            row["seconds"], row["load"], row["simulator_seconds"],
        ]
        for row in common.right(rows)
    ]  # fmt: skip
    header = [
        "case", "payload up, B", "sockets", "zlib", "payload down, B", "sockets", "zlib", "s a round",
        "load", "simulator, s",
    ]  # fmt: skip
    return common.markdown(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = common.options("benchmarks.flower", __doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2; got {args.rounds}")
    if args.quick:
        args.rounds, args.cases = 2, args.cases[:1]
    rows = common.start(args, KEY)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever ends it, Flower's programs end too
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        federation = Federation(Path(folder), stack)
        for case in args.cases:
            config = settings(case, args.rounds)
            found = federation.carry_out(case, config)
            row = {
                "case": case, "rounds": args.rounds, **found,
                "simulator_seconds": round(simulated(config), 3),
            }  # fmt: skip
            common.tell(
                rows, row, "{case:16}",
                "up {payload_up_bytes} -> {up_bytes} B  down {payload_down_bytes} -> {down_bytes} B  "
                "{seconds} s at load {load}",
                "measured",
            )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)
