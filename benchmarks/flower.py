"""What Flower costs: socket bytes beside payload, seconds a round beside the simulator, for SpaFL and FedAvg.

    .venv-flower/bin/python -m benchmarks.flower [--rounds 5] [--cases NAME ...] [--out FILE.csv]

Three clients on this machine (``make flower`` sets the environment up): a SuperLink without TLS, so that bytes can be
looked at, and a SuperNode for every client behind a proxy that counts what passes. All cases: LeNet-5, synthetic data,
one local epoch. Bytes are per client and round, up to the server and down: of sockets the median over rounds after the
first, of payload the mean over all (SpaFL's first message down is half as long as the later ones). What
nodes exchange while nothing happens is measured before and taken off. ``zipped`` is the size of the same bytes if each
node's traffic were compressed as one stream (zlib, level 6), which bounds what compressing metadata can give; the
``tested`` case tests all clients after every round, a second message: what it adds is what sending both in one would
save. ``simulator_seconds`` is the same round in the simulator, one process. Peak resident memory is of a node's
long-lived process, and of the largest process that it starts for a message.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row
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
IDLE_SECONDS = 30.0
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


class Proxy(threading.Thread):
    """Hands bytes on between a node and the server, and counts them.

    Attributes:
        up, down: bytes so far.
        zipped_up, zipped_down: the same, had each direction been compressed as one stream.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.up = self.down = self.zipped_up = self.zipped_down = 0
        self._zip = {"up": zlib.compressobj(6), "down": zlib.compressobj(6)}
        self.start()

    def run(self) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(self._server, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fileobj is self._server:
                        node, _ = self._server.accept()
                        server = socket.create_connection(("127.0.0.1", self._target))
                        ready.register(node, selectors.EVENT_READ, (server, "up"))
                        ready.register(server, selectors.EVENT_READ, (node, "down"))
                    elif key.data is not None:
                        self._hand_on(ready, key)

    def _hand_on(self, ready: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        source: Any = key.fileobj
        target, way = key.data
        try:
            chunk = source.recv(1 << 16)
            if chunk:
                target.sendall(chunk)
        except OSError:
            chunk = b""
        if not chunk:
            for end in (source, target):
                with contextlib.suppress(KeyError, ValueError):
                    ready.unregister(end)
                end.close()
            return
        packer = self._zip[way]
        zipped = len(packer.compress(chunk)) + len(packer.flush(zlib.Z_SYNC_FLUSH))
        if way == "up":
            self.up, self.zipped_up = self.up + len(chunk), self.zipped_up + zipped
        else:
            self.down, self.zipped_down = self.down + len(chunk), self.zipped_down + zipped

    def counts(self) -> tuple[int, int, int, int]:
        return self.up, self.down, self.zipped_up, self.zipped_down


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

    def idle(self, seconds: float) -> list[list[float]]:
        """Bytes a second of each node while nothing happens, as :meth:`Proxy.counts`."""
        time.sleep(2.0)
        before, begin = [p.counts() for p in self.proxies], time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - begin
        return [
            [(b - a) / took for a, b in zip(old, new.counts(), strict=True)]
            for old, new in zip(before, self.proxies, strict=True)
        ]

    def carry_out(self, case: str, config: RunConfig, idle: list[list[float]]) -> dict[str, Any]:
        """One run; its figures."""
        name = case.replace(", ", "-")
        out, path = self.folder / name, self.folder / f"{name}.toml"
        path.write_text(config.to_toml())
        command = [sys.executable, "-m", "spafl.flower", path, "--out", out, "--federation", "deploy"]
        metrics = out / "metrics.jsonl"
        marks: list[tuple[float, list[tuple[int, int, int, int]]]] = []
        largest: list[tuple[float, float]] = [(0.0, 0.0)] * CLIENTS
        end = time.monotonic() + 3000
        with started(self.folder / f"{name}.log", self.folder / "home", command) as process:
            while len(marks) < config.rounds:
                # A tested round is over when its line has its evaluation.
                text = metrics.read_text() if metrics.exists() else ""
                lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
                wanted = config.evaluation.every == 1
                done = sum(line["evaluation"] is not None or not wanted for line in lines)
                if done > len(marks):
                    marks.append((time.monotonic(), [p.counts() for p in self.proxies]))
                now = [peaks(node.pid) for node in self.nodes]
                largest = [tuple(map(max, a, b)) for a, b in zip(largest, now, strict=True)]  # type: ignore[misc]
                if time.monotonic() > end or (process.poll() is not None and len(marks) < config.rounds and not done):
                    raise RuntimeError(f"{case}: the run did not end; see {self.folder}")
                time.sleep(0.05)
        gone = [lost for line in lines for lost in line["lost"] + line["rejected"] if line is not lines[-1]]
        figures: dict[str, list[float]] = {"up": [], "down": [], "zipped_up": [], "zipped_down": [], "seconds": []}
        for (before, old), (after, new) in itertools.pairwise(marks):
            figures["seconds"].append(after - before)
            for k in range(CLIENTS):
                for at, way in enumerate(("up", "down", "zipped_up", "zipped_down")):
                    figures[way].append(new[k][at] - old[k][at] - idle[k][at] * (after - before))
        last = lines[-1]["cost"]["payload"]
        return {
            "wrong": f"client {gone[0]['client']}: {gone[0]['reason']}" if gone else "",
            **{f"{way}_bytes": round(statistics.median(figures[way])) for way in list(figures)[:4]},
            "seconds": round(statistics.median(figures["seconds"]), 2),
            "payload_up_bytes": round(last["up_bytes"] / config.rounds / CLIENTS),
            "payload_down_bytes": round(last["down_bytes"] / config.rounds / CLIENTS),
            "node_mb": round(max(own for own, _ in largest)),
            "message_process_mb": round(max(other for _, other in largest)),
        }


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
            row["seconds"], row["simulator_seconds"],
        ]
        for row in common.right(rows)
    ]  # fmt: skip
    header = [
        "case", "payload up, B", "sockets", "zlib", "payload down, B", "sockets", "zlib", "s a round", "simulator, s",
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
        idle = federation.idle(IDLE_SECONDS)
        for case in args.cases:
            config = settings(case, args.rounds)
            found = federation.carry_out(case, config, idle)
            row = {
                "case": case, "rounds": args.rounds, **found,
                "idle_up_bytes_s": round(statistics.median(each[0] for each in idle)),
                "idle_down_bytes_s": round(statistics.median(each[1] for each in idle)),
                "simulator_seconds": round(simulated(config), 3),
            }  # fmt: skip
            common.tell(
                rows, row, "{case:16}",
                "up {payload_up_bytes} -> {up_bytes} B  down {payload_down_bytes} -> {down_bytes} B  {seconds} s",
                "measured",
            )  # fmt: skip
    return rows.failed()


if __name__ == "__main__":
    common.alone(main)
