"""Both sides of a distributed run over a link in memory: the simulator's bits, and what may go wrong."""

import json

import pytest
import torch
from folders import client_values
from test_simulation import metrics

from spafl.algorithms import ALGORITHMS as REGISTERED
from spafl.config import deep_merge, resolve_config
from spafl.errors import UserError
from spafl.flower.client import ClientSide, Site, refusal, run_digest
from spafl.flower.disk import ClientDisk, ClientState
from spafl.flower.link import Link
from spafl.flower.parcel import pack, unpack
from spafl.flower.roster import Roster, check_start
from spafl.flower.server import open_run, run_identity, telling_why
from spafl.merge import TooFewUploads
from spafl.simulation import RunFolder, run
from spafl.simulation.checkpoint import load_latest
from spafl.wire import WireError, encode
from spafl_kernels import __version__


class Memory(Link):
    """Nodes of this process: a client side each, made anew for every message, as a process of its own would be.

    Attributes:
        online: node to configuration, client number, state folder and :class:`Site`'s ``metrics``.
        script: called before and after each delivery with (when, kind, node, round): may raise to lose it.
    """

    def __init__(self, roster, online):
        super().__init__(roster)
        self.online, self.said, self.script = dict(online), [], lambda *_: None
        self.sides, self.traffic = {}, []

    def nodes(self):
        return set(self.online)

    def side(self, node):
        config, client, state, metrics, *data = self.online[node]
        key = (run_digest(config), client, state, metrics)
        if key not in self.sides:
            self.sides[key] = ClientSide(Site(config, data[0] if data else None, state, metrics), client)
        self.sides[key]._resident = None  # nothing but the disk survives
        return self.sides[key]

    def send(self, kind, messages, seconds):
        replies = {}
        for node, raw in messages.items():
            round = unpack(raw)[0].get("round")
            try:
                self.script("before", kind, node, round)
                replies[node] = self.answer(kind, node, raw)
                self.traffic.append((kind, node, raw, replies[node]))
                self.script("after", kind, node, round)
            except ConnectionError as lost:
                replies[node] = str(lost)
        return replies

    def answer(self, kind, node, raw):
        try:
            return self.side(node).answer(kind, raw)
        except UserError as error:
            return refusal(error)

    def say(self, text):
        self.said.append(text)


class Killed(Exception):
    pass


@pytest.fixture
def problem(small, tmp_path):
    """``problem(section={...})``: configuration of three clients, all in every round."""
    tables = deep_merge(
        small,
        {"partition": {"clients": 3}, "sampling": {"clients_per_round": 3}, "flower": {"patience": 0}},
    )
    return lambda **changes: resolve_config(deep_merge(tables, changes))


def online(config, state, metrics=True):
    return {100 + k: (config, k, state, metrics) for k in range(config.partition.clients)}


def serve(config, out, state, script=None, nodes=None, resume=False, link=Memory):
    """A server from start to end (or until the script kills it); returns link and summary."""
    folder = RunFolder(out, resume)
    try:
        roster = Roster(config, run_identity(folder))
        link = link(roster, online(config, state) if nodes is None else nodes)
        link.script = script or link.script
        with telling_why(link):
            return link, open_run(config, folder, link).run()
    finally:
        folder.close()


def server_tensors(folder):
    return load_latest(folder / "checkpoints").server


def client_tensors(folder, state, client):
    run = json.loads((folder / "flower.json").read_text())["run"]
    return ClientDisk(state, run, client)


def assert_same_thresholds(a, b):
    a, b = server_tensors(a), server_tensors(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ALGORITHMS = {
    "fmnist": {"name": "spafl", "variant": "fmnist", "penalty": 0.05},
    "cifar10": {"name": "spafl", "variant": "cifar10", "penalty": 0.05},
    "fedavg": {"name": "fedavg"},
    "local": {"name": "local"},
}


@pytest.mark.parametrize("name", [*ALGORITHMS])
def test_a_distributed_run_has_the_bits_of_the_simulator(small, problem, tmp_path, name):
    small["algorithm"].clear()
    encoding = "int8" if name in ("fmnist", "fedavg") else "fp32"
    tested = 2 if name == "local" else "all"
    config = problem(
        algorithm=ALGORITHMS[name], rounds=2, communication={"encoding": encoding}, evaluation={"clients": tested}
    )
    _, summary = serve(config, tmp_path / "flower", tmp_path / "state")
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "flower", tmp_path / "simulator")
    clients = load_latest(tmp_path / "simulator" / "checkpoints")
    for k in range(3):
        row = clients.client(k) or {}
        mine = client_tensors(tmp_path / "flower", tmp_path / "state", k).load(row).tensors
        assert all(torch.equal(row[n], mine[n]) for n in row)
    ours, theirs = metrics(tmp_path / "flower"), metrics(tmp_path / "simulator")
    for a, b in zip(ours, theirs, strict=True):
        assert a["evaluation"]["accuracy"] == b["evaluation"]["accuracy"] and a["density"] == b["density"]
        assert a["train_loss"] == pytest.approx(b["train_loss"])
        assert a["cost"]["payload"]["up_bytes"] == b["cost"]["payload"]["up_bytes"]
        assert a["cost"]["paper"] == b["cost"]["paper"] and a["cost"]["executed"] == b["cost"]["executed"]
    assert summary["final"]["evaluation"]["train_accuracy"] == theirs[-1]["evaluation"]["train_accuracy"]
    told = [
        [(k, values["accuracy"]) for _, k, values in client_values(tmp_path / who)] for who in ("flower", "simulator")
    ]
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_every_registered_algorithm_is_distributed_with_the_bits_of_the_simulator(small, problem, tmp_path, name):
    small["algorithm"].clear()
    config = problem(algorithm={"name": name}, rounds=2)
    serve(config, tmp_path / "flower", tmp_path / "state")
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "flower", tmp_path / "simulator")
    ours, theirs = metrics(tmp_path / "flower"), metrics(tmp_path / "simulator")
    assert [a["evaluation"]["accuracy"] for a in ours] == [b["evaluation"]["accuracy"] for b in theirs]
    assert ours[-1]["cost"]["payload"]["up_bytes"] == theirs[-1]["cost"]["payload"]["up_bytes"]


def test_nothing_leaves_a_client_but_what_its_algorithm_sends(problem, tmp_path):
    config = problem(rounds=1)
    nodes = online(config, tmp_path / "state", metrics=False)
    link, _ = serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    thresholds = {"conv1.threshold", "conv2.threshold", "fc3.threshold", "fc4.threshold"}
    from spafl.wire import decode

    for kind, _, _, reply in link.traffic:
        header, frames = unpack(reply)
        allowed = {"protocol", "version", "config", "client", "round", "heard"}
        allowed |= {"train": {"samples", "cost"}, "evaluate": set()}.get(
            kind, {"instance", "trained", "outputs", "numbers", "image", "dtype", "model", "samples", "cpu", "torch"}
        )
        assert set(header) <= allowed
        assert [set(decode(frame)) for frame in frames] == ([thresholds] if kind == "train" else [])
    line = metrics(tmp_path / "run")[-1]
    assert line["evaluation"] is None and line["train_loss"] is None and line["merged"] == [0, 1, 2]


@pytest.mark.parametrize("variant", ["fmnist", "cifar10"])
def test_a_client_that_missed_rounds_catches_up_exactly(problem, tmp_path, variant):
    """Client 1 is away in rounds 1 and 2; the simulator is given the logged participation."""
    config = problem(algorithm={"variant": variant}, rounds=4, evaluation={"every": 9})
    gone = {}

    def script(when, kind, node, round):
        if node == 101 and round in (1, 2):
            gone[round] = True
            raise ConnectionError("Node Unavailable")

    serve(config, tmp_path / "flower", tmp_path / "state", script)
    lines = metrics(tmp_path / "flower")
    assert [line["merged"] for line in lines] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2]]
    assert lines[1]["lost"] == [{"client": 1, "reason": "Node Unavailable"}]
    import spafl.simulation.loop as loop

    original = loop.sample_clients
    loop.sample_clients = lambda config, round: lines[round]["merged"]
    try:
        run(config, tmp_path / "simulator", quiet=True)
    finally:
        loop.sample_clients = original
    assert_same_thresholds(tmp_path / "flower", tmp_path / "simulator")
    row = load_latest(tmp_path / "simulator" / "checkpoints").client(1)
    mine = client_tensors(tmp_path / "flower", tmp_path / "state", 1).load(row).tensors
    assert all(torch.equal(row[n], mine[n]) for n in row)


@pytest.mark.parametrize(
    "moment",
    [
        ("after", "train", 102, 1),
        pytest.param(("before", "train", 101, 1), marks=pytest.mark.slow),
        ("after", "evaluate", 100, 1),
        pytest.param(("before", "evaluate", 100, 2), marks=pytest.mark.slow),
    ],
)
def test_a_server_killed_at_any_moment_goes_on_without_training_anybody_twice(problem, tmp_path, moment):
    config = problem(algorithm={"variant": "cifar10"}, rounds=3)
    run(config, tmp_path / "simulator", quiet=True)

    def script(*now):
        if now == moment:
            raise Killed

    with pytest.raises(Killed):
        serve(config, tmp_path / "flower", tmp_path / "state", script)
    serve(config, tmp_path / "flower", tmp_path / "state", resume=True)
    assert_same_thresholds(tmp_path / "flower", tmp_path / "simulator")
    ours, theirs = metrics(tmp_path / "flower"), metrics(tmp_path / "simulator")
    assert [a["evaluation"] for a in ours] == [b["evaluation"] for b in theirs]
    summary = json.loads((tmp_path / "flower" / "summary.json").read_text())
    assert summary["best"] == json.loads((tmp_path / "simulator" / "summary.json").read_text())["best"]


def test_report_and_table_read_a_distributed_run(problem, tmp_path):
    from spafl.report import comparison_table, write_report

    serve(problem(rounds=1), tmp_path / "run", tmp_path / "state")
    assert "small" in comparison_table([tmp_path / "run"])
    assert write_report([tmp_path / "run"], tmp_path / "out").exists()


# -- refusals, on both sides, with the state unchanged


@pytest.fixture
def pair(problem, tmp_path):
    config = problem(rounds=2, algorithm={"variant": "cifar10"})
    side = ClientSide(Site(config, None, tmp_path / "state"), 0)
    return Roster(config, "0" * 32), side, config


def error_of(raw):
    return unpack(raw)[0]["error"]


def training(roster, side, round=0, **header):
    state = side.method.algorithm.server_state(side.method.model)
    frame = encode(side.method.algorithm.broadcast(state, round, 0), round, side.method.uplink.model)
    return roster.parcel({"client": 0, "round": round, "first": 0, "rounds": [], **header}, [frame])


def test_a_client_asked_again_answers_again_and_late_rounds_are_refused(pair, tmp_path):
    roster, side, _ = pair
    first = side.answer("train", training(roster, side))
    saved = (tmp_path / "state" / ("0" * 32) / "client-00000.safetensors").read_bytes()
    assert side.answer("train", training(roster, side)) == first
    other = roster.parcel(
        {"client": 0, "round": 0, "first": 0, "rounds": []}, [encode({}, 0, side.method.uplink.model)]
    )
    assert "round 1 is over for this client" in error_of(side.answer("train", other))
    side.answer("train", training(roster, side, 1))
    later = (tmp_path / "state" / ("0" * 32) / "client-00000.safetensors").read_bytes()
    assert later != saved
    assert "has trained in round 2 already" in error_of(side.answer("train", training(roster, side, 0)))
    assert (tmp_path / "state" / ("0" * 32) / "client-00000.safetensors").read_bytes() == later


def test_what_a_client_refuses(pair):
    roster, side, _ = pair
    good = training(roster, side)
    frame = unpack(good)[1][0]
    cases = {
        b"junk": "not a SpaFL parcel",
        good[:-1]: "damaged or cut off",
        pack({**unpack(good)[0], "protocol": 9}, [frame]): "the server speaks protocol 9; this client speaks 1",
        pack({**unpack(good)[0], "version": "9"}, [frame]): "the server runs version 9 of spafl; this client has",
        pack({**unpack(good)[0], "config": "f" * 16}, [frame]): "another configuration",
        pack({**unpack(good)[0], "client": 2}, [frame]): "a message for client 2 came to client 0",
        pack({**unpack(good)[0], "run": "../../etc"}, [frame]): "run must be 32 hexadecimal digits",
        pack({**unpack(good)[0], "round": -1}, [frame]): "round must be a whole number from 0",
        pack({**unpack(good)[0], "round": 1}, [frame]): "of round 1; round 2 was expected",
        pack(unpack(good)[0], []): "frame is missing",
        pack({**unpack(good)[0], "first": 3}, [frame]): "announcements 0 to 2 are missing",
        pack({**unpack(good)[0], "rounds": [1]}, [frame]): "rounds must name the rounds of 0 announcements",
        pack(unpack(good)[0], [encode({}, 0, 77)]): "another model",
    }
    for raw, said in cases.items():
        assert said in error_of(side.answer("train", raw))
    disk = ClientDisk(side.site.state, "0" * 32, 0)
    assert not disk.path.exists()
    assert "refused this client: because" in error_of(side.answer("query", roster.parcel({"refused": "because"})))


def test_two_clients_of_one_number_are_told_apart(problem, tmp_path):
    config = problem(rounds=1)
    nodes = online(config, tmp_path / "state") | {200: (config, 1, tmp_path / "elsewhere", True)}
    link, _ = serve(config, tmp_path / "run", tmp_path / "state", nodes=nodes)
    assert any("client 1 is here already" in text for text in link.said)
    assert any(node == 200 and "refused this client" in error_of(reply) for _, node, raw, reply in link.traffic
               if "refused" in unpack(raw)[0])  # fmt: skip
    assert metrics(tmp_path / "run")[0]["merged"] == [0, 1, 2]


def test_a_restarted_client_is_known_under_its_new_node(problem, tmp_path):
    config = problem(rounds=2)
    roster = Roster(config, "1" * 32)
    link = Memory(roster, online(config, tmp_path / "state"))
    link.gather(range(3), 0)
    link.online[300] = link.online[101]  # the old node is still listed
    link.gather(range(3), 0)
    assert roster.seats[1].node == 300 and not roster.refused
    del link.online[101]
    assert link.gather(range(3), 0) == {0, 1, 2}


def test_modelled_devices_are_refused_where_real_ones_take_part(problem):
    with pytest.raises(UserError, match=r"\[system\] models devices, and a distributed run has real ones"):
        Roster(problem(system={"devices": {"phone": 1.0}}), "2" * 32)


def test_what_a_server_refuses(problem, tmp_path):
    config, other = problem(), problem(training={"lr": 0.5})
    roster = Roster(config, "2" * 32)
    link = Memory(roster, {1: (other, 0, tmp_path / "a", True), 2: (config, 2, tmp_path / "b", True)})
    assert link.gather([2], 0) == {2}
    assert "another configuration" in link.said[0]
    with pytest.raises(UserError, match=r"3 clients are needed to start; 1 came within .* refused: the client refuses"):
        check_start(roster)
    assert roster.meet(7, b"noise") == "not a SpaFL parcel"
    told = {"protocol": 1, "version": __version__, "config": roster.digest, "client": 1, "instance": "x", "heard": 0,
            "samples": 5,
            "outputs": 10, "image": [1, 28, 28], "dtype": roster.form.dtype, "model": "0" * 16}  # fmt: skip
    for change, said in [
        ({}, "differs from the run in model"), ({"outputs": 9}, "differs from the run in outputs: 9 instead of 10"),
        ({"client": 3}, "client 3 in a run of clients 0 to 2"),
        ({"samples": 0}, "samples must be a whole number from 1"),
        ({"image": "big"}, "no shape"), ({"protocol": 2}, "speaks protocol 2; this server speaks 1"),
        ({"version": "0.1"}, "the client runs version 0.1 of spafl; this server has"),
    ]:  # fmt: skip
        assert said in roster.meet(8, pack({**told, **change}))


def test_a_client_without_data_and_an_unknown_one_are_refused(problem, tmp_path):
    with pytest.raises(UserError, match="client-id must be 0 to 2 in this run; got 3"):
        ClientSide(Site(problem(), None, tmp_path), 3)
    with pytest.raises(UserError, match=r"data: module 'nowhere' cannot be imported"):
        ClientSide(Site(problem(), "nowhere:make", tmp_path), 0)
    with pytest.raises(UserError, match=r"must return a spafl\.data\.Dataset; got int"):
        ClientSide(Site(problem(), "builtins:int", tmp_path), 0)


def test_too_few_uploads_stop_the_run_and_keep_the_state(problem, tmp_path):
    config = problem(rounds=3, sampling={"min_uploads": 2})

    def script(when, kind, node, round):
        if round == 1 and node != 100:
            raise ConnectionError("no answer within 1 s")

    with pytest.raises(
        TooFewUploads, match=r"round 2: 1 of 3 uploads are good .* \(client [12]: no answer within 1 s; client "
    ):
        serve(config, tmp_path / "run", tmp_path / "state", script)
    assert load_latest(tmp_path / "run" / "checkpoints").state.round == 0
    serve(config, tmp_path / "run", tmp_path / "state", resume=True)
    run(config, tmp_path / "simulator", quiet=True)
    assert_same_thresholds(tmp_path / "run", tmp_path / "simulator")


# -- the client's disk


def test_private_state_is_whole_or_refused(tmp_path):
    initial = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "none": torch.empty(0)}
    disk = ClientDisk(tmp_path, "3" * 32, 4)
    with disk.turn():
        state = disk.load(initial)
        state.tensors["w"] += 1
        disk.save(ClientState(state.tensors, 5, 6, "task", b"reply", state.instance))
        with pytest.raises(UserError, match="in use by another process"), disk.turn():
            pass
    back = disk.load(initial)
    assert (back.heard, back.trained, back.task, back.reply, back.instance) == (5, 6, "task", b"reply", state.instance)
    assert all(torch.equal(back.tensors[name], state.tensors[name]) for name in initial)
    whole = disk.path.read_bytes()
    for at in range(0, len(whole), 7):
        bad = bytearray(whole)
        bad[at] ^= 4
        disk.path.write_bytes(bytes(bad))
        with pytest.raises(UserError, match="client state"):
            disk.load(initial)
    disk.path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        disk.load(initial)
    disk.path.write_bytes(whole)
    with pytest.raises(UserError, match="another model or method"):
        disk.load({"w": torch.zeros(2)})


def test_parcels(tmp_path):
    raw = pack({"a": 1}, [b"x", b"", b"yz"])
    assert unpack(raw) == ({"a": 1}, [b"x", b"", b"yz"])
    for bit in range(8 * len(raw)):
        bad = bytearray(raw)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack(bytes(bad))
    for cut in range(len(raw)):
        with pytest.raises(WireError):
            unpack(raw[:cut])
    with pytest.raises(ValueError, match="65534 frames"):
        pack({}, [b""] * 65535)
