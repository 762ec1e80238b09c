"""Runs on Flower itself: its simulation engine, and a deployment on loopback in which machines die.

These need an environment of their own (``make flower``); everywhere else the module is left out. All are slow: every
message of a deployment starts a process that imports PyTorch.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("flwr")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import RecordDict

from spafl.algorithms import ALGORITHMS
from spafl.config import resolve_config
from spafl.flower.__main__ import main
from spafl.flower.bundle import write_app
from spafl.flower.local import simulation_link
from spafl.flower.message import wrap
from spafl.flower.roster import Roster
from spafl.flower.strategy import GridLink
from spafl.simulation import loop, run
from spafl.simulation.checkpoint import load_latest

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
CLIENTS, ROUNDS = 3, 5
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def configured(**changes):
    tables = {
        "name": "flower", "seed": 3, "rounds": ROUNDS,
        "data": {"name": "synthetic", "image": 28, "channels": 1, "classes": 10, "train": 160, "test": 60, "seed": 1},
        "partition": {"clients": CLIENTS, "alpha": 0.5, "min_train": 8, "min_test": 2},
        "model": {"name": "lenet5"},
        "algorithm": {"name": "spafl", "variant": "cifar10", "penalty": 0.05},
        "training": {"lr": 0.02, "batch_size": 16, "epochs": 1},
        "sampling": {"clients_per_round": CLIENTS},
        "evaluation": {"every": ROUNDS},
        "simulation": {"engine": "masked", "device": "cpu", "workers": 1},
        "flower": {"patience": 240.0, "round_timeout": 400.0},
    }  # fmt: skip
    return resolve_config(tables | changes)


def lines(out):
    path = out / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")] if path.exists() else []


def assert_simulator_bits(config, out, tmp_path, monkeypatch):
    """The simulator, given who trained in which round and who was merged, ends with the same bits."""
    merged = [set(line["merged"]) for line in lines(out)]
    assert len(merged) == config.rounds
    trained = [set(clients) for clients in merged]
    for each in (each for line in lines(out) for each in line["unmerged"]):
        trained[each["round"]].add(each["client"])
    original = loop.merge_replies

    def merge(algorithm, server, round, messages, replies, *more):
        return original(algorithm, server, round, messages, [r for r in replies if r.client in merged[round]], *more)

    monkeypatch.setattr(loop, "sample_clients", lambda config, round: sorted(trained[round]))
    monkeypatch.setattr(loop, "merge_replies", merge)
    run(config, tmp_path / "simulator", quiet=True)
    ours = load_latest(out / "checkpoints").server
    theirs = load_latest(tmp_path / "simulator" / "checkpoints").server
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


class Machine:
    """A long-running command in a process group of its own, with its log."""

    def __init__(self, log, command, **environment):
        self.log, self.command = log, [str(part) for part in command]
        self.environment = {**os.environ, **QUIET, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
        self.process = None

    def start(self):
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        return self

    def kill(self):
        """As the power plug would."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def keep_alive(self, sign):
        """Start it until its log says ``sign``, as a service manager would."""
        before = self.log.read_text().count(sign)
        end = time.monotonic() + 900
        while self.log.read_text().count(sign) == before:
            assert time.monotonic() < end, f"{self.command[0]} did not come back"
            if self.process is None or self.process.poll() is not None:
                self.kill()  # what it may have left behind
                self.start()
            time.sleep(2)

    def said(self, text):
        return text in self.log.read_text()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def certificates(folder):
    """A certificate authority, the server's certificate for 127.0.0.1, and a key pair for every node."""
    now = datetime.datetime.now(datetime.UTC)
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def signed(subject, key, extensions):
        builder = (
            x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("authority"))
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=2))
        )  # fmt: skip
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    own = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    (folder / "ca.pem").write_bytes(
        signed("authority", authority, [(x509.BasicConstraints(True, None), True), (usage, True), (own, False)])
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    (folder / "server.pem").write_bytes(
        signed("server", server, [(address, False), (x509.BasicConstraints(False, None), True), (by, False)])
    )
    plain = serialization.NoEncryption()
    (folder / "server.key").write_bytes(
        server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    for node in range(CLIENTS):
        key = ec.generate_private_key(ec.SECP384R1())
        ssh = serialization.PrivateFormat.OpenSSH
        (folder / f"node{node}").write_bytes(key.private_bytes(serialization.Encoding.PEM, ssh, plain))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"node{node}.pub").write_bytes(public)


@pytest.fixture
def federation(tmp_path):
    """A SuperLink and three SuperNodes with TLS and node authentication; and the command that starts a run there."""
    certificates(tmp_path)
    port = free_port()
    tls = ["--ssl-certfile", tmp_path / "server.pem", "--ssl-keyfile", tmp_path / "server.key",
           "--ssl-ca-certfile", tmp_path / "ca.pem"]  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.deploy]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{tmp_path / "ca.pem"}"\n'
    )
    link = Machine(
        tmp_path / "link.log",
        [BIN / "flower-superlink", *tls, "--host", "127.0.0.1", "--port", port, "--enable-supernode-auth",
         "--disable-runtime-dependency-installation", "--database", tmp_path / "link.db"],
        FLWR_HOME=str(tmp_path / "home-link"),
    ).start()  # fmt: skip
    nodes = []

    def up():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        until(up, 300, "the SuperLink")
        for k in range(CLIENTS):
            register = [BIN / "flwr", "supernode", "register", tmp_path / f"node{k}.pub", "deploy"]
            environment = {**os.environ, **QUIET, "FLWR_HOME": str(home)}
            subprocess.run(register, check=True, env=environment, capture_output=True, timeout=300)
            nodes.append(
                Machine(
                    tmp_path / f"node{k}.log",
                    [BIN / "flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates",
                     tmp_path / "ca.pem", *tls, "--port", free_port(), "--auth-supernode-private-key",
                     tmp_path / f"node{k}", "--node-config", f'client-id={k} state-dir="{tmp_path / "state"}"'],
                    FLWR_HOME=str(tmp_path / f"home-{k}"),
                ).start()
            )  # fmt: skip
        for node in nodes:
            until(lambda node=node: node.said("SuperNode ID"), 300, "a SuperNode")

        def submit(config, out):
            (tmp_path / "run.toml").write_text(config.to_toml())
            command = [sys.executable, "-m", "spafl.flower", tmp_path / "run.toml", "--out", out]
            return Machine(tmp_path / "run.log", [*command, "--federation", "deploy"], FLWR_HOME=str(home)).start()

        yield link, nodes, submit, up
    finally:
        for machine in (link, *nodes):
            machine.kill()


def test_a_deployment_in_which_machines_die_has_the_bits_of_the_simulator(federation, tmp_path, monkeypatch):
    """Five rounds: a SuperNode is killed and restarted in the middle, then the SuperLink; nothing is lost."""
    link, nodes, submit, up = federation
    config, out = configured(), tmp_path / "run"
    client = submit(config, out)
    try:
        until(lambda: len(lines(out)) >= 2, 900, "two rounds")
        nodes[1].kill()
        done = len(lines(out))
        # Flower lets a node in again once it has missed its heartbeats, after about a minute.
        nodes[1].keep_alive("SuperNode ID")
        until(lambda: len(lines(out)) > done, 900, "a round after the SuperNode was killed")
        link.kill()
        link.start()
        client.kill()
        before = lines(out)
        assert len(before) < ROUNDS
        until(up, 300, "the SuperLink again")
        client = submit(config, out)
        until(lambda: (out / "summary.json").exists(), 900, "the end of the run")
    finally:
        client.kill()
        for log in tmp_path.glob("*.log"):
            print(f"== {log.name}\n" + "\n".join(log.read_text().splitlines()[-25:]))
    after = lines(out)
    assert after[: len(before)] == before
    assert after[-1]["evaluation"] is not None and not any(line["rejected"] for line in after)
    assert all(len(line["merged"]) >= 2 for line in after)
    assert_simulator_bits(config, out, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A SuperLink for Flower's simulation engine."""
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(folder / "home"))
        patch.setenv("SPAFL_STATE", str(folder / "state"))
        for name, value in QUIET.items():
            patch.setenv(name, value)
        with simulation_link(folder / "home") as link:
            yield link


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_flowers_simulation_engine_has_the_bits_of_the_simulator(engine, tmp_path, monkeypatch, name):
    encoding = "int8" if name in ("spafl", "fedavg") else "fp32"
    config = configured(algorithm={"name": name}, rounds=2, communication={"encoding": encoding})
    (tmp_path / "run.toml").write_text(config.to_toml())
    out = tmp_path / "run"
    command = [str(tmp_path / "run.toml"), "--out", str(out), "--federation", engine]
    size = f"num-supernodes={CLIENTS} client-resources-num-cpus=1"
    assert main([*command, "--", "--federation-config", size]) == 0
    assert_simulator_bits(config, out, tmp_path, monkeypatch)


class Replies:
    """A grid: node 1 answers, node 2 never does, node 3 reports an error, node 4 sends something else."""

    def push_messages(self, nodes):
        self.open = {f"message {node}": node for node in nodes}
        return list(self.open)

    def pull_messages(self, ids):
        taken = {id: self.open.pop(id) for id in ids if self.open.get(id, 2) != 2}
        return [self.reply(id, node) for id, node in taken.items()]

    @staticmethod
    def reply(id, node):
        return SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id=id),
            has_error=lambda: node == 3,
            error=SimpleNamespace(code=7, reason="it broke\nbadly"),
            has_content=lambda: True,
            content=wrap(b"answer") if node == 1 else RecordDict(),
        )


def test_a_straggler_is_waited_for_no_longer_than_said(monkeypatch):
    monkeypatch.setattr(GridLink, "message", lambda self, kind, node, parcel, seconds: node)
    link = GridLink(Roster(configured(), "0" * 32), Replies(), print)
    begin = time.monotonic()
    replies = link.send("train", dict.fromkeys((1, 2, 3, 4), b"message"), 1.0)
    assert 1.0 <= time.monotonic() - begin < 10
    assert replies == {
        1: b"answer",
        2: "no answer within 1 s",
        3: "Flower reports error 7: it broke badly",
        4: "the reply holds no SpaFL parcel",
    }


def test_the_app_is_what_flower_takes(tmp_path):
    folder = write_app(tmp_path / "app", configured(), tmp_path / "run")
    built = subprocess.run([BIN / "flwr", "build", "--app", folder], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
