"""Every method on equal terms: the same start, clients, batches and tests; its own rules against arithmetic by hand."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from spafl.algorithms import ALGORITHMS, Client, Samples, Upload, find_algorithm, narrow
from spafl.algorithms import masks as m
from spafl.algorithms.client import steps_of_momentum
from spafl.client_results import results_path
from spafl.config import deep_merge, resolve_config
from spafl.data import Transform
from spafl.errors import UserError
from spafl.export import client_model
from spafl.models import MODELS, build_model, register_model
from spafl.simulation import run
from spafl.simulation.checkpoint import load_latest
from spafl.simulation.ledger import Ledger
from spafl.simulation.problem import build_problem
from spafl.simulation.resident import ClientSetting, Resident
from spafl.wire import payload_bytes
from spafl_kernels import ThresholdConv2d, ThresholdLinear


class Tiny(nn.Module):
    """Two convolutions with BatchNorm, a hidden linear layer and a classifier, for 8x8 images."""

    def __init__(self, classes, in_channels):
        super().__init__()
        self.conv1 = ThresholdConv2d(in_channels, 5, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = ThresholdConv2d(5, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.hidden = ThresholdLinear(32, 10, bias=False)
        self.head = ThresholdLinear(10, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = F.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.fixture(autouse=True)
def tiny():
    register_model("tiny", Tiny, 8)
    yield
    del MODELS["tiny"]


CASES = {
    "spafl": {"name": "spafl"},
    "spafl-no-importance": {"name": "spafl", "importance": "none"},
    "spafl-no-exchange": {"name": "spafl", "exchange": False, "importance": "none"},
    "spafl-thresholds": {"name": "spafl", "trained": "thresholds", "importance": "none"},
    "spafl-fixed": {"name": "spafl", "trained": "weights", "initial_density": 0.6},
    "fedpm": {"name": "fedpm", "reset_every": 2},
    "feddst": {"name": "feddst", "adjust_every": 2, "sparsity": 0.5},
    "fedp3": {"name": "fedp3", "layers": 1},
} | {
    name: {"name": name}
    for name in ("fedavg", "local", "fedprox", "ditto", "fedper", "scaffold", "heterofl", "fjord", "fedspa")
}


def some(*fast):
    """All methods, these in the fast tier too."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def tiny_config(case, **changes):
    tables = {
        "name": "tiny", "seed": 7, "rounds": 4,
        "data": {"name": "synthetic", "image": 8, "train": 300, "test": 120, "classes": 4},
        "partition": {"clients": 6, "alpha": 0.7, "min_train": 10, "min_test": 4},
        "model": {"name": "tiny"}, "algorithm": CASES[case],
        "training": {"lr": 0.05, "batch_size": 8, "epochs": 2, "momentum": 0.5, "drop_last": True},
        "sampling": {"clients_per_round": 3},
        "simulation": {"workers": 1, "engine": "masked", "device": "cpu", "checkpoint_every": 1},
    }  # fmt: skip
    return resolve_config(deep_merge(tables, changes))


def metrics(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["cost"]["seconds"]
    return lines


def test_every_method_that_is_registered_is_tested_here():
    assert {case["name"] for case in CASES.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("case, share", [("spafl-fixed", 0.5), ("spafl-thresholds", 0.7)])
def test_what_is_held_at_a_rate_of_0_is_as_good_as_frozen_and_runs_small(case, share, tmp_path, monkeypatch):
    fixed = {
        "algorithm": {"variant": "paper", "initial_density": 0.5, "penalty": 0.05}, "rounds": 2,
        "evaluation": {"every": 1}, "model": {"name": "lenet5"}, "data": {"image": 28},
        "training": {"weight_decay": 0.01},
    }  # fmt: skip
    for engine in ("masked", "compact"):
        run(tiny_config(case, **fixed, simulation={"engine": engine}), tmp_path / engine)
    monkeypatch.setattr(find_algorithm("spafl"), "_holds", False)
    run(tiny_config(case, **fixed), tmp_path / "frozen")
    held, small, frozen = (metrics(tmp_path / name) for name in ("masked", "compact", "frozen"))
    assert held == frozen
    for own, other in zip(small, held, strict=True):
        assert own["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert own["density"]["layers"] == other["density"]["layers"]
        assert own["cost"]["executed"]["macs"] < share * other["cost"]["executed"]["macs"]


# -- equal terms


def seen_in(case, folder, monkeypatch):
    """What a run of a method starts from, which clients it samples, which batches they get, what they are tested on."""
    batches, tests = {}, {}
    real_batches, real_test = Client.training_batches, Client.evaluate_model

    def training_batches(self, round):
        for at, (x, y) in enumerate(real_batches(self, round)):
            batches.setdefault((round, self.id, at), set()).add((y.numpy().tobytes(), x.numpy().tobytes()))
            yield x, y

    def evaluate_model(self, *args, **kwargs):
        tests.setdefault(self.id, set()).add((self.test.x.numpy().tobytes(), self.test.y.numpy().tobytes()))
        return real_test(self, *args, **kwargs)

    monkeypatch.setattr(Client, "training_batches", training_batches)
    monkeypatch.setattr(Client, "evaluate_model", evaluate_model)
    run(tiny_config(case), folder)
    lines = metrics(folder)
    return [line["sampled"] for line in lines], batches, tests


@pytest.mark.parametrize("case", some("spafl", "ditto", "fjord", "fedpm"))
def test_methods_of_a_seed_share_clients_batches_and_tests(case, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        sampled, batches, tests = seen_in("fedavg", tmp_path / "first", patch)
    assert all(len(contents) == 1 for contents in batches.values()) and len(tests) == 6
    other_sampled, other_batches, other_tests = seen_in(case, tmp_path / "other", monkeypatch)
    assert (other_sampled, other_tests) == (sampled, tests)
    assert other_batches == batches  # Ditto's second training too: sets with one entry


@pytest.mark.parametrize("case", CASES)
def test_methods_of_a_seed_start_from_the_same_weights(case):
    raw = build_model("tiny", 4, 1, seed=0).state_dict()
    problem = build_problem(tiny_config(case))
    start = build_problem(tiny_config("fedavg")).model.state_dict()
    state = problem.model.state_dict()
    for name in ("conv1.weight", "conv2.weight", "hidden.weight", "head.weight"):
        if case == "fedpm":  # keeps the signs
            assert torch.equal(state[name] > 0, start[name] > 0)
        else:
            assert torch.equal(state[name], start[name])
        assert raw[name].shape == start[name].shape and not torch.equal(raw[name], start[name])


# -- whole runs


@pytest.mark.parametrize("case", some("spafl-no-exchange", "fedpm", "fedp3", "scaffold"))
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(case, tmp_path, monkeypatch):
    config = tiny_config(case)
    run(config, tmp_path / "whole")
    book = Ledger.book

    def cut(self, done):
        if done.round == 2:
            raise KeyboardInterrupt
        return book(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "book", cut)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    run(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    ends = [load_latest(tmp_path / name / "checkpoints") for name in ("whole", "cut")]
    assert ends[0].server.keys() == ends[1].server.keys()
    assert all(torch.equal(tensor, ends[1].server[name]) for name, tensor in ends[0].server.items())
    for file in (ends[0].path / "clients").iterdir():
        mine, other = load_file(file), load_file(ends[1].path / "clients" / file.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("case", some("spafl-no-exchange", "fedper", "fedspa", "fjord", "heterofl", "feddst"))
def test_what_is_exported_is_what_was_tested(case, tmp_path):
    """Also where a client's tensors are split between it and the server, or its model is smaller."""
    config = tiny_config(case, rounds=3)
    run(config, tmp_path / "run")
    accuracy = [json.loads(text)["accuracy"] for text in results_path(tmp_path / "run", 2).read_text().splitlines()]
    problem = build_problem(config)
    parts, data = problem.parts.test, problem.dataset
    sampled = {k for line in metrics(tmp_path / "run") for k in line["sampled"]}
    for k in range(6):
        if k not in sampled and (case in ("local", "ditto", "fedper", "fedp3") or case.startswith("spafl")):
            continue
        model, image = client_model(tmp_path / "run", k)
        assert tuple(image) == (1, 8, 8)
        x = data.transform(torch.from_numpy(data.test_x[parts[k]]))
        y = torch.from_numpy(data.test_y[parts[k]])
        with torch.no_grad():
            assert (model(x).argmax(1) == y).double().mean().item() == pytest.approx(accuracy[k])


# What a method needs to get anywhere in six rounds of a tiny net.
LEARNING = {
    "scaffold": {"training": {"momentum": 0.0, "lr": 0.1}},
    "heterofl": {"algorithm": {"rates": [1.0, 0.5]}},
    "fjord": {"algorithm": {"widths": [0.5, 1.0]}},
    "fedpm": {"model": {"name": "lenet5"}, "data": {"image": 28}, "training": {"lr": 0.1}},
}


@pytest.mark.parametrize("case", some("fedper", "fedprox", "fedspa", "scaffold"))
def test_every_method_learns(case, tmp_path):
    easy = {
        "rounds": 6, "data": {"train": 400}, "partition": {"scheme": "iid", "alpha": "off"},
        "sampling": {"clients_per_round": 6}, "evaluation": {"every": 6},
    }  # fmt: skip
    config = tiny_config(case, **deep_merge(easy, LEARNING.get(case, {})))
    summary = run(config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    # Thresholds alone can only leave filters of random weights out.
    assert lines[-1]["train_loss"] < (0.99 if case == "spafl-thresholds" else 0.9) * lines[0]["train_loss"]
    if case != "spafl-thresholds":
        assert summary["final"]["evaluation"]["accuracy"]["mean"] > 0.35  # a guess is right in .25


# -- bytes and work by formula


TOTAL = 5 * 9 + 8 * 45 + 10 * 32 + 4 * 10  # weights of Tiny
NORMS = 4 * (5 + 8)  # scale, shift, mean, variance
COUNTERS = 2 * 8  # num_batches_tracked, int64
REST = 4 * (NORMS + 4) + COUNTERS  # and the classifier's bias


def payload(case, tmp_path, **changes):
    run(tiny_config(case, rounds=3, **changes), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    return lines, lines[-1]["cost"]["payload"], lines[-1]["cost"]["paper"]["communication_bits"]


@pytest.mark.parametrize("case", ["fedavg", "fedprox", "ditto"])
def test_bytes_of_methods_that_send_the_model(case, tmp_path):
    _, sent, bits = payload(case, tmp_path)
    assert sent == {"up_bytes": 9 * (4 * TOTAL + REST), "down_bytes": 9 * (4 * TOTAL + REST)}
    assert bits == 8 * sum(sent.values())


def test_bytes_of_scaffold(tmp_path):
    _, sent, bits = payload("scaffold", tmp_path)
    trained = TOTAL + 2 * (5 + 8) + 4
    assert sent["up_bytes"] == sent["down_bytes"] == 9 * (4 * TOTAL + REST + 4 * trained)
    assert bits == 8 * sum(sent.values())


def test_bytes_of_fedper(tmp_path):
    _, sent, bits = payload("fedper", tmp_path)
    assert sent["up_bytes"] == sent["down_bytes"] == 9 * (4 * TOTAL + REST - 4 * 44)
    assert bits == 8 * sum(sent.values())


@pytest.mark.parametrize("case", ["local", "spafl-no-exchange"])
def test_nothing_travels(case, tmp_path):
    _, sent, bits = payload(case, tmp_path)
    assert sent == {"up_bytes": 0, "down_bytes": 0} and bits == 0


def packed(sizes):
    return sum(math.ceil(size / 8) for size in sizes)


SIZES = (45, 360, 320, 40)


def test_bytes_of_fedpm(tmp_path):
    """Up a bit for a weight, down a float; the running statistics both ways."""
    _, sent, bits = payload("fedpm", tmp_path)
    statistics = 4 * NORMS // 2 + COUNTERS
    assert sent == {"up_bytes": 9 * (packed(SIZES) + statistics), "down_bytes": 9 * (4 * TOTAL + statistics)}
    assert bits == 9 * (33 * TOTAL + 16 * statistics)


def test_bytes_of_feddst(tmp_path):
    """Rounds 0 and 1 keep the mask, round 2 changes it: only then it goes up."""
    lines, _, _ = payload("feddst", tmp_path)
    kept = sum(m.budgets(dict(zip("abcd", shapes_of(), strict=True)), 0.5, "erk").values())
    up, down = 4 * kept + REST, 4 * kept + REST + packed(SIZES)
    got = [line["cost"]["payload"] for line in lines]
    assert got[1] == {"up_bytes": 6 * up, "down_bytes": 6 * down}
    assert got[2]["up_bytes"] == 6 * up + 3 * (up + packed(SIZES))
    bits = [line["cost"]["paper"]["communication_bits"] for line in lines]
    assert bits == [2 * 3 * 8 * up, 2 * 6 * 8 * up, 2 * 9 * 8 * up + 2 * 3 * TOTAL]
    assert abs(kept - TOTAL / 2) <= 4


def shapes_of():
    return [torch.zeros(5, 1, 3, 3), torch.zeros(8, 5, 3, 3), torch.zeros(10, 32), torch.zeros(4, 10)]


def test_bytes_of_fedspa(tmp_path):
    _, sent, bits = payload("fedspa", tmp_path)
    kept = sum(m.budgets(dict(zip("abcd", shapes_of(), strict=True)), 0.5, "erk").values())
    assert sent == {"up_bytes": 9 * (4 * kept + REST + packed(SIZES)), "down_bytes": 9 * (4 * kept + REST)}
    assert bits == 9 * (16 * (4 * kept + REST) + TOTAL)


def test_bytes_of_fedp3(tmp_path):
    """Down one hidden layer whole and nine tenths of the others with their masks, up the whole one."""
    lines, sent, bits = payload("fedp3", tmp_path)
    weights, norms, kept = SIZES[:3], (4 * 4 * 5 + 8, 4 * 4 * 8 + 8, 0), (40, 324, 288)
    whole = [4 * size + norm for size, norm in zip(weights, norms, strict=True)]
    pruned = [4 * n + math.ceil(size / 8) + norm for size, norm, n in zip(weights, norms, kept, strict=True)]
    trained = [k % 3 for line in lines for k in line["sampled"]]
    assert len(set(trained)) == 3 and sent["up_bytes"] == sum(whole[at] for at in trained)
    assert sent["down_bytes"] == sum(whole[at] + sum(pruned) - pruned[at] for at in trained)
    expected = [8 * (0.9 * 4 * size + norm) + size for size, norm in zip(weights, norms, strict=True)]
    assert bits == 3 * round(3 * (2 * 8 * sum(whole) + 2 * sum(expected)) / 3)


@pytest.mark.parametrize("case", ["fedavg", "ditto", "fedprox", "scaffold", "fedper", "fedp3", "feddst", "fedspa"])
def test_work_by_formula(case, tmp_path):
    """Three forwards a sample and epoch, of a layer only what its mask keeps; a dense batch where a mask is changed."""
    lines, *_ = payload(case, tmp_path)
    parts = build_problem(tiny_config(case)).parts.train
    layers = (36 * 45, 16 * 360, 320, 40)  # per sample, outputs of 6x6 and 4x4
    kept = m.budgets(dict(zip(range(4), shapes_of(), strict=True)), 0.5, "erk")
    sparse = [n / size for n, size in zip(kept.values(), SIZES, strict=True)]
    expected = 0.0
    for round, line in enumerate(lines):
        for k in line["sampled"]:
            # FedP3: one hidden layer whole, nine tenths of the others, the classifier whole
            pruned = [1.0 if k % 3 == i else n / size for i, (n, size) in enumerate(zip((40, 324, 288), SIZES))] + [1.0]
            share = {"fedp3": pruned, "feddst": sparse, "fedspa": sparse}.get(case, [1.0] * 4)
            trainings = 2 if case == "ditto" else 1
            expected += 3 * 2 * len(parts[k]) * trainings * sum(s * n for s, n in zip(share, layers, strict=True))
            if case == "fedspa" or (case == "feddst" and round == 2):
                expected += 3 * 8 * sum(layers)
        assert line["cost"]["paper"]["macs"] == pytest.approx(expected, rel=1e-12), round
    if case == "ditto":
        executed = sum(2 * (len(parts[k]) // 8 * 8) for line in lines for k in line["sampled"])
        assert lines[-1]["cost"]["executed"]["macs"] == 2 * executed * (3 * sum(layers) - layers[0])


def test_bytes_and_work_of_heterofl(tmp_path):
    """Sub-models are small: what travels, what is counted by formula and what runs."""
    rates = [1.0, 0.5]
    lines, sent, bits = payload("heterofl", tmp_path, algorithm={"rates": rates}, partition={"clients": 6})
    half = 3 * 9 + 4 * 3 * 9 + 5 * 16 + 4 * 5
    of = [4 * TOTAL + REST, 4 * half + 4 * (4 * (3 + 4) + 4) + COUNTERS]
    trained = [k for line in lines for k in line["sampled"]]
    assert sent["down_bytes"] == sum(of[k % 2] for k in trained)
    assert sent["up_bytes"] == sent["down_bytes"] + 4 * len(trained)  # which of the four classes it has
    assert bits == 3 * round(2 * 3 * 8 * sum(of) / 2)
    parts = build_problem(tiny_config("heterofl")).parts.train
    # Per sample: outputs of 6x6 and 4x4; no gradient of the input at the first layer.
    macs = [(36 * 45, 16 * 360, 320, 40), (36 * 27, 16 * 108, 80, 20)]
    steps = [2 * (len(parts[k]) // 8 * 8) for k in trained]
    executed = sum(n * (3 * sum(macs[k % 2]) - macs[k % 2][0]) for n, k in zip(steps, trained, strict=True))
    assert lines[-1]["cost"]["executed"]["macs"] == executed
    paper = sum(3 * 2 * len(parts[k]) * sum(macs[k % 2]) for k in trained)
    assert lines[-1]["cost"]["paper"]["macs"] == pytest.approx(paper)


def test_work_of_fjord_is_that_of_the_widths_drawn(tmp_path):
    lines, sent, bits = payload("fjord", tmp_path, algorithm={"widths": [0.5, 1.0]})
    half = 3 * 9 + 4 * 3 * 9 + 5 * 16 + 4 * 5
    small = 4 * (half + 4 + 4 * (3 + 4)) + COUNTERS
    large = 4 * (TOTAL + 4 + 4 * (5 + 8 + 3 + 4)) + 2 * COUNTERS
    trained = [k for line in lines for k in line["sampled"]]
    assert sent["up_bytes"] == sent["down_bytes"] == sum((small, large)[k % 2] for k in trained)
    assert bits == 3 * (2 * 3 * 8 * (small + large) // 2)
    executed, macs = lines[-1]["cost"]["executed"]["macs"], [(36 * 45, 16 * 360, 320, 40), (36 * 27, 16 * 108, 80, 20)]
    per_sample = [3 * sum(of) - of[0] for of in macs]
    parts = build_problem(tiny_config("fjord")).parts.train
    samples = {k: 2 * (len(parts[k]) // 8 * 8) for k in trained}
    least = sum(samples[k] * per_sample[1] for k in trained)
    most = sum(samples[k] * per_sample[1 - k % 2] for k in trained)
    assert least < executed < most and (executed - least) % (8 * (per_sample[0] - per_sample[1])) == 0


# -- local work against loops written out


def lent(case, config=None, **training):
    """A method's client on the tiny model in float64, its parts, and what it starts from."""
    config = config or tiny_config(case, training=training)
    problem = build_problem(config)
    algorithm, local = problem.algorithm, config.local_training()
    state = {n: t.double() if t.is_floating_point() else t for n, t in problem.client_state.items()}
    setting = ClientSetting(replace(local, dtype="float64"), Transform(), problem.macs, 7, torch.device("cpu"))
    server = {
        n: t.double() if t.dtype == torch.float32 else t for n, t in algorithm.server_state(problem.model).items()
    }
    resident = Resident(algorithm, problem.model, "masked", setting, state)
    generator = torch.Generator().manual_seed(1)
    samples = [Samples(torch.randn(20, 1, 8, 8, generator=generator).double(), torch.arange(20) % 4) for _ in range(2)]
    return algorithm, resident.lend(0, state, *samples), server


def by_hand(client, start, lr, momentum, gradient=lambda name, p, g: g):
    """SGD on the client's batches of round 0, written out; ``gradient(name, p, g)`` is what becomes of a gradient."""
    model = copy.deepcopy(client.model).train()
    model.load_state_dict(start)
    v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in client.training_batches(0):
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
        with torch.no_grad():
            for (name, p), g in zip(named.items(), grads, strict=True):
                v[name] = momentum * v[name] + gradient(name, p, g)
                p -= lr * v[name]
    return model.state_dict()


def assert_same(got, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_fedprox_is_sgd_on_the_proximal_objective():
    algorithm, client, server = lent("fedprox", lr=0.1)
    message = algorithm.broadcast(server, 0, 0)
    expected = by_hand(client, server, 0.1, 0.5, lambda name, p, g: g + 0.01 * (p - server[name]))
    assert_same(algorithm.train(client, message, 0).message, expected)


def test_ditto_trains_two_models_on_the_same_batches():
    algorithm, client, server = lent("ditto", lr=0.1)
    own = {name: tensor + 0.01 for name, tensor in client.model.state_dict().items() if tensor.is_floating_point()}
    client.model.load_state_dict(client.model.state_dict() | own)
    start = {name: t.clone() for name, t in client.model.state_dict().items()}
    shared = by_hand(client, server, 0.1, 0.5)
    personal = by_hand(client, start, 0.1, 0.5, lambda name, p, g: g + 1.0 * (p - server[name]))
    training = algorithm.train(client, algorithm.broadcast(server, 0, 0), 0)
    assert_same(training.message, shared)
    assert_same(client.model.state_dict(), personal)
    assert training.cost.steps == 2 * 2 * (20 // 8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffold_steps_along_the_corrected_gradient(momentum):
    algorithm, client, server = lent("scaffold", lr=0.05, momentum=momentum)
    generator = torch.Generator().manual_seed(3)
    for name in list(server):
        if name.startswith("control:"):
            server[name] = 0.1 * torch.randn(server[name].shape, generator=generator, dtype=torch.float64)
            client.memory[name].copy_(0.1 * torch.randn(server[name].shape, generator=generator, dtype=torch.float64))
    own = {name: tensor.clone() for name, tensor in client.memory.items()}
    model = {name: t for name, t in server.items() if ":" not in name}
    expected = by_hand(
        client, model, 0.05, momentum, lambda name, p, g: g + (server["control:" + name] - own["control:" + name])
    )
    upload = algorithm.train(client, algorithm.broadcast(server, 0, 0), 0).message
    assert_same(upload, expected)
    steps = 2 * (20 // 8)
    moved = sum(sum(momentum**j for j in range(k + 1)) for k in range(steps))  # of a constant gradient
    assert steps_of_momentum(steps, momentum) == pytest.approx(moved)
    for name in client.model.state_dict():
        if "control:" + name in own:
            new = own["control:" + name] - server["control:" + name] + (server[name] - expected[name]) / (0.05 * moved)
            torch.testing.assert_close(client.memory["control:" + name], new)
            torch.testing.assert_close(upload["control:" + name], new - own["control:" + name])


@pytest.mark.parametrize("case", ["feddst", "fedspa", "fedp3"])
def test_masked_training_is_sgd_on_the_weights_of_the_mask(case):
    algorithm, client, server = lent(case, lr=0.1, weight_decay=0.0)
    message = algorithm.broadcast(server, 0, 0)
    masks, start = {}, {}
    for name, tensor in client.model.state_dict().items():
        layer = name.removesuffix(".weight")
        if case == "fedp3" and layer.startswith("head"):  # personal
            start[name] = tensor.clone()
            continue
        bits = [message.get(key, server.get(key)) for key in (f"mask:{layer}", f"mask:{name}")]
        values = [message.get(key) for key in (f"values:{layer}", f"values:{name}")]
        if name in message:
            start[name] = message[name]
            continue
        bits, values = (next(t for t in found if t is not None) for found in (bits, values))
        masks[name] = m.unpack(bits, tensor.shape)
        start[name] = torch.zeros_like(tensor)
        start[name][masks[name]] = values
    assert masks
    dense = by_hand(client, start, 0.1, 0.5)
    expected = by_hand(client, start, 0.1, 0.5, lambda name, p, g: g * masks.get(name, 1.0))
    algorithm.train(client, message, 0)
    assert_same(client.model.state_dict(), expected)
    assert any(not torch.equal(dense[name], expected[name]) for name in masks)


def test_fedpm_trains_scores_through_samples():
    """The gradient of a score is that of the weight it lets through, times weight and slope of the sigmoid."""
    _, client, _ = lent("fedpm")
    layer = client.model.head
    c = math.e / math.sqrt(10)
    torch.testing.assert_close(layer.weight.abs(), torch.full_like(layer.weight, c))
    client.model.train()
    x = torch.randn(6, 10, dtype=torch.float64)
    torch.manual_seed(5)
    out = layer(x)
    torch.manual_seed(5)
    p = 1 / (1 + torch.exp(-layer.scores.detach()))
    sampled = (torch.rand(p.shape, dtype=torch.float64) < p).double()
    torch.testing.assert_close(out, x @ (layer.weight * sampled).T)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, layer.scores, upstream)
    torch.testing.assert_close(grad, (upstream.T @ x) * layer.weight * p * (1 - p))
    scores = torch.cat([q.flatten() for q in client.model.parameters() if q.requires_grad])
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.1  # standard normal
    trained = {name for name, p in client.model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.scores" for name in ("conv1", "conv2", "hidden", "head")}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fedpm_trains_scores_with_adam_unless_told_otherwise(optimizer):
    """Against a loop with ``torch.optim``, which meets the same random masks."""
    other = {} if optimizer == "adam" else {"optimizer": optimizer}
    config = tiny_config("fedpm", training={"lr": 0.1, "max_grad_norm": 0.01, **other})
    algorithm, client, server = lent("fedpm", config=config)
    message = algorithm.broadcast(server, 0, 0)
    model = copy.deepcopy(client.model).train()
    model.load_state_dict(message, strict=False)
    scores = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adam":
        steps = torch.optim.Adam(scores, lr=0.1)
    else:
        steps = torch.optim.SGD(scores, lr=0.1, momentum=0.5)
    for x, y in client.training_batches(0):
        steps.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(scores, 0.01)
        steps.step()
    algorithm.train(client, message, 0)
    assert_same(client.model.state_dict(), model.state_dict())


def test_heterofl_tests_the_global_model_without_the_classes_that_a_client_does_not_have():
    config = tiny_config("heterofl", algorithm={"rates": [0.5, 1.0]})
    algorithm, client, server = lent("heterofl", config=config)
    client.train = Samples(client.train.x[:8], torch.arange(8) % 2)  # classes 0 and 1 of four
    whole = algorithm.client_model(copy.deepcopy(client.model), server, {}, 0).eval()
    assert whole.hidden.weight.shape == (10, 32)
    before = algorithm.evaluate(client, server, False)
    x, y = client.test[:]
    torch.testing.assert_close(before.loss, F.cross_entropy(whole(x), y).item())
    upload = algorithm.train(client, algorithm.broadcast(server, 0, 0), 0).message
    assert upload["hidden.weight"].shape == (5, 16) and upload["classes:head"].tolist() == [1, 1, 0, 0]
    logits = whole(x).masked_fill(torch.tensor([False, False, True, True]), 0.0)
    after = algorithm.evaluate(client, server, False)
    torch.testing.assert_close(after.loss, F.cross_entropy(logits, y).item())
    exported = algorithm.client_model(copy.deepcopy(client.model), server, client.memory, 0).eval()
    torch.testing.assert_close(exported(x), logits)
    own = find_algorithm("heterofl")(find_algorithm("heterofl").Options(rates=(0.5, 1.0), tested="rate"))
    assert own.client_model(copy.deepcopy(client.model), server, {}, 0).hidden.weight.shape == (5, 16)


# -- merging by hand


def uploads(*messages, samples=(1, 3, 2)):
    return [Upload(k, message, samples[k]) for k, message in enumerate(messages)]


def algorithm_of(case):
    return tiny_config(case).build_algorithm()


def test_fedavg_equals_centralised_sgd(tmp_path):
    """All clients, one local step on all their samples: the mean by sample counts is a step on the union."""
    config = tiny_config(
        "fedavg", model={"name": "lenet5"}, data={"image": 28}, sampling={"clients_per_round": 6},
        training={"epochs": 1, "batch_size": 300, "momentum": 0.0, "drop_last": False, "lr": 0.1}, rounds=3,
    )  # fmt: skip
    run(config, tmp_path / "run")
    problem = build_problem(config)
    model, data = problem.model, problem.dataset
    x, y = data.transform(torch.from_numpy(data.train_x)), torch.from_numpy(data.train_y)
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    server = load_latest(tmp_path / "run" / "checkpoints").server
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(server[name], tensor, rtol=1e-4, atol=1e-6)


def test_scaffold_merges_with_the_share_of_clients():
    server = {"w": torch.tensor([1.0]), "control:w": torch.tensor([0.5])}
    sent = uploads(*({"w": torch.tensor([w]), "control:w": torch.tensor([c])} for w, c in ((2.0, 0.1), (4.0, 0.3))))
    merged, _ = algorithm_of("scaffold").merge(server, 0, sent, 10)
    assert merged["w"].item() == 3.0 and merged["control:w"].item() == pytest.approx(0.5 + 2 / 10 * 0.2)
    slow = find_algorithm("scaffold")(find_algorithm("scaffold").Options(server_lr=0.5))
    assert slow.merge(server, 0, sent, 10)[0]["w"].item() == 2.0


def test_parts_of_a_tensor_are_averaged_where_somebody_has_them():
    old = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    parts = [torch.tensor([[10.0, 20.0]]), torch.tensor([[40.0], [50.0]])]
    assert narrow.merged_parts(old, parts, [1, 1]).tolist() == [[25.0, 20.0, 3.0], [50.0, 5.0, 6.0]]
    assert narrow.merged_parts(old, parts, [3, 1]).tolist() == [[17.5, 20.0, 3.0], [50.0, 5.0, 6.0]]
    rows = [torch.tensor([True]), torch.tensor([False, True])]
    assert narrow.merged_parts(old, parts, [1, 1], rows).tolist() == [[10.0, 20.0, 3.0], [50.0, 5.0, 6.0]]
    assert [narrow.part_of(5, 0.2), narrow.part_of(5, 0.21), narrow.part_of(64, 0.0625), narrow.part_of(1, 0.1)] == [
        1,
        2,
        4,
        1,
    ]


def test_heterofl_merges_entries_alike_and_fjord_by_samples():
    for case, weights in (("heterofl", [1, 1]), ("fjord", [1, 3])):
        problem = build_problem(tiny_config(case))
        algorithm, server = problem.algorithm, problem.algorithm.server_state(problem.model)
        sent = [algorithm.expected_upload(server, 0, k) for k in (0, 1)]
        moved = [{n: t + k + 1 if t.is_floating_point() else t for n, t in msg.items()} for k, msg in enumerate(sent)]
        if case == "heterofl":
            for message, classes in zip(moved, ([1, 1, 0, 0], [0, 1, 1, 0]), strict=True):
                message["classes:head"] = torch.tensor(classes, dtype=torch.uint8)
        merged, _ = algorithm.merge(server, 0, uploads(*moved), 6)
        assert merged.keys() == server.keys()
        old, new = server["hidden.weight"], merged["hidden.weight"]
        parts = [message["hidden.weight"] for message in moved]
        assert parts[0].shape != parts[1].shape
        torch.testing.assert_close(new, narrow.merged_parts(old, parts, weights))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(new, narrow.merged_parts(old, parts, [2, 1]))
        if case == "heterofl":  # rows of a class by those who have it: by +1, +1 and +2, +2, nobody
            change = merged["head.bias"] - server["head.bias"]
            torch.testing.assert_close(change, torch.tensor([1.0, 1.5, 2.0, 0.0]))
            whole = merged["head.weight"] - server["head.weight"]
            torch.testing.assert_close(whole[:, 0], change)
            torch.testing.assert_close(whole[2, 5:], torch.zeros(5))  # the second client has half of the columns


def test_feddst_averages_over_those_who_have_a_weight_and_keeps_the_largest():
    algorithm = algorithm_of("feddst")
    shape = {"shape:a": torch.tensor([2, 3]), "adjusting": torch.tensor(1)}
    masks = [torch.tensor([[1, 1, 0], [0, 0, 1]]).bool(), torch.tensor([[1, 0, 0], [1, 0, 1]]).bool()]
    values = [torch.tensor([1.0, -5.0, 2.0]), torch.tensor([3.0, 0.5, -6.0])]
    server = shape | {"values:a": torch.zeros(3), "mask:a": m.pack(masks[0])}
    sent = uploads(*({"values:a": v, "mask:a": m.pack(mask)} for v, mask in zip(values, masks, strict=True)))
    merged, _ = algorithm.merge(server, 2, sent, 6)
    # Means by samples 1:3 where both have it: 2.5, -5, -, .5, -, -4; the three largest stay.
    assert merged["values:a"].tolist() == [2.5, -5.0, -4.0]
    assert m.unpack(merged["mask:a"], (2, 3)).int().tolist() == [[1, 1, 0], [0, 0, 1]]
    plain, _ = algorithm.merge(server, 1, uploads(*({"values:a": v} for v in values)), 6)
    assert plain["values:a"].tolist() == [2.5, -0.875, -4.0] and plain["adjusting"].item() == 1
    bad = {"values:a": values[0], "mask:a": m.pack(torch.ones(2, 3).bool())}
    assert algorithm.upload_fault(server, bad) == "the mask of layer 'a' keeps 6 weights and 3 are sent"
    assert algorithm.upload_fault(server, sent[0].message) is None


def test_fedspa_adds_the_mean_change_and_remembers_masks():
    algorithm = algorithm_of("fedspa")
    first = torch.tensor([1, 1, 0, 0]).bool()
    other = torch.tensor([0, 1, 1, 0]).bool()
    server = {"a.weight": torch.tensor([1.0, 2.0, 3.0, 4.0]), "mask:a": m.pack(first), "mask:1:a": m.pack(other)}
    assert algorithm.broadcast(server, 5, 0)["values:a"].tolist() == [1.0, 2.0]
    assert algorithm.broadcast(server, 5, 1)["values:a"].tolist() == [2.0, 3.0]
    sent = uploads(
        {"values:a": torch.tensor([2.0, 2.5]), "mask:a": m.pack(other)},
        {"values:a": torch.tensor([4.0, 3.0]), "mask:a": m.pack(other)},
    )
    merged, _ = algorithm.merge(server, 5, sent, 6)
    assert merged["a.weight"].tolist() == [1.5, 3.25, 3.0, 4.0]  # + (1, .5, 0, 0)/2 + (0, 2, 0, 0)/2
    assert torch.equal(merged["mask:0:a"], m.pack(other)) and torch.equal(merged["mask:a"], m.pack(first))


def test_fedpm_counts_ones_and_zeros_since_the_reset():
    algorithm = algorithm_of("fedpm")  # resets every second round
    scores = {"a.scores": torch.zeros(4), "ones:a.scores": torch.zeros(4), "zeros:a.scores": torch.zeros(4)}
    server = scores | {"seed:": torch.tensor(3)}
    rounds = [([1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0]), ([0, 1, 0, 0], [1, 1, 0, 1], [1, 0, 1, 0])]
    totals = [torch.tensor([3, 2, 1, 1.0]), torch.tensor([5, 4, 2, 2.0])]
    for round, (bits, ones) in enumerate(zip(rounds, totals, strict=True)):
        sent = uploads(*({"mask:a.scores": m.pack(torch.tensor(b).bool())} for b in bits))
        server, _ = algorithm.merge(server, round, sent, 6)
        theta = 0.01 + 0.98 * ones / (3 * (round + 1))  # a bit counts as .01 or .99
        torch.testing.assert_close(torch.sigmoid(server["a.scores"]), theta)
    server, _ = algorithm.merge(server, 2, sent, 6)
    theta = 0.01 + 0.98 * torch.tensor([2 / 3, 2 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(torch.sigmoid(server["a.scores"]), theta)


def test_fedp3_averages_layers_over_those_who_sent_them():
    problem = build_problem(tiny_config("fedp3"))
    algorithm, server = problem.algorithm, problem.algorithm.server_state(problem.model)
    expected = [algorithm.expected_upload(server, 0, k) for k in range(3)]
    own = [{"conv1", "bn1"}, {"conv2", "bn2"}, {"hidden"}]
    assert [{name.split(".")[0] for name in message} for message in expected] == own
    assert not any(name.startswith("head") for k in range(3) for name in algorithm.broadcast(server, 0, k))
    two = find_algorithm("fedp3")(find_algorithm("fedp3").Options(layers=2))
    assert {name.split(".")[0] for name in two.expected_upload(server, 0, 5)} == own[2] | own[0]
    sent = [{n: t + k + 1 if t.is_floating_point() else t for n, t in msg.items()} for k, msg in enumerate(expected)]
    merged, _ = algorithm.merge(server, 0, uploads(*sent[:2]), 6)  # nobody sent "hidden"
    for name, old in server.items():
        holders = [k + 1 for k, message in enumerate(expected[:2]) if name in message]
        if old.is_floating_point():
            torch.testing.assert_close(merged[name], old + (np.mean(holders) if holders else 0.0))


# -- masks


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_budgets_follow_the_shapes_and_add_up(density):
    weights = dict(zip("abcd", shapes_of(), strict=True))
    kept = m.budgets(weights, density, "erk")
    assert abs(sum(kept.values()) - density * TOTAL) <= 4 or density < 0.05
    raw = {n: sum(w.shape) / w.numel() for n, w in weights.items()}
    inside = [n for n in weights if kept[n] < weights[n].numel()]
    ratios = [kept[n] / weights[n].numel() / raw[n] for n in inside]
    assert all(r == pytest.approx(ratios[0], rel=0.1, abs=0.02) for r in ratios)
    masks = m.random_masks(weights, kept, 3)
    assert {n: int(mask.sum()) for n, mask in masks.items()} == kept
    assert not torch.equal(masks["b"], m.random_masks(weights, kept, 4)["b"]) or density == 1


def test_prune_and_grow_keeps_the_count():
    weight = torch.tensor([5.0, 1.0, -3.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    gradient = torch.tensor([0.0, 0.0, 0.0, 2.0, -9.0, 1.0])
    for share, stays, new in (
        (1 / 3, [1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]),
        (2 / 3, [1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]),
        (0.0, [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
    ):
        assert [t.int().tolist() for t in m.prune_and_grow(weight, mask, gradient, share)] == [stays, new]
    # What was dropped may come back, and is told from what stayed.
    gradient[1] = 20.0
    stays, new = m.prune_and_grow(weight, mask, gradient, 1 / 3)
    assert new.int().tolist() == [1, 1, 1, 0, 0, 0] and stays.int().tolist() == [1, 0, 1, 0, 0, 0]
    assert m.prune_and_grow(weight, torch.ones(6).bool(), gradient, 0.5)[1].all()
    assert m.cosine(0.5, 0, 10) == 0.5 and m.cosine(0.5, 5, 10) == pytest.approx(0.25) and m.cosine(0.5, 10, 10) == 0


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 3, 3)])
def test_masks_are_one_bit_each(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    bits = m.pack(mask)
    assert bits.dtype == torch.uint8 and payload_bytes({"b": bits}) == math.ceil(mask.numel() / 8)
    assert torch.equal(m.unpack(bits, shape), mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.flatten().numpy(), bitorder="little"))


def test_gradients_for_growing_are_dense_and_leave_the_model_alone():
    _, client, _ = lent("feddst")
    before = {name: tensor.clone() for name, tensor in client.model.state_dict().items()}
    gradients, cost = m.dense_gradients(client, ["conv1", "head"], 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in client.model.state_dict().items())
    chosen = client.stream("regrow", 4).permutation(20)[:8]
    x, y = client.train[torch.from_numpy(chosen)]
    model = copy.deepcopy(client.model).train()
    loss = F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, [model.conv1.weight, model.head.weight])
    torch.testing.assert_close([gradients["conv1"], gradients["head"]], list(expected))
    assert cost.paper_macs == 3 * 8 * sum(client.macs.values())


def test_the_mask_of_feddst_moves_and_that_of_a_client_of_fedspa_too(tmp_path):
    for case, moving in (("feddst", "mask:"), ("fedspa", "mask:")):
        run(tiny_config(case, rounds=3), tmp_path / case)
        problem = build_problem(tiny_config(case))
        start = problem.algorithm.server_state(problem.model)
        end = load_latest(tmp_path / case / "checkpoints").server
        first = [name for name in start if name.startswith(moving)]
        if case == "feddst":
            assert any(not torch.equal(start[name], end[name]) for name in first)
        else:
            own = [name for name in end if name.startswith("mask:") and name.count(":") == 2]
            assert own and any(not torch.equal(end[name], start["mask:" + name.split(":")[2]]) for name in own)


# -- what cannot work


@pytest.mark.parametrize("name", ["fjord", "heterofl"])
def test_models_that_cannot_be_narrowed_are_refused_before_training(name, tmp_path):
    config = tiny_config("fedavg", model={"name": "vit"}, data={"image": 32, "channels": 3}, algorithm={"name": name})
    config = resolve_config(
        deep_merge(config.model_dump(exclude_none=True), {"algorithm": {"name": name}}) | {"algorithm": {"name": name}}
    )
    with pytest.raises(UserError, match=f"algorithm {name}: its model cannot be narrowed") as caught:
        run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


class Chunked(nn.Module):
    """A layer whose outputs are cut in two: the first half of the channels is no half of either."""

    def __init__(self):
        super().__init__()
        self.both, self.head = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.both(x.flatten(1)).chunk(2, dim=1)
        return self.head(a * b)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.same(self.same(x.flatten(1))))


@pytest.mark.parametrize(("model", "said"), [(Chunked, "mixes channels up"), (Twice, "called twice")])
def test_a_model_that_reads_its_channels_in_another_way_is_refused(model, said):
    with pytest.raises(ValueError, match=said):
        narrow.shapes_at(model(), torch.zeros(1, 1, 1, 6), 0.5)


@pytest.mark.parametrize("name", ["lenet5", "conv4", "resnet18"])
def test_published_models_can_be_narrowed(name):
    from spafl_kernels import to_dense

    channels = 1 if name == "lenet5" else 3
    model = to_dense(build_model(name, 10, channels, seed=0))
    shapes = narrow.shapes_at(model, torch.zeros(1, channels, *[MODELS[name].image] * 2), 0.25)
    small = narrow.resized(copy.deepcopy(model), shapes).eval()
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small, model)]
    assert sizes[0] / sizes[1] < 0.1
    assert small(torch.zeros(1, channels, *[MODELS[name].image] * 2)).shape == (1, 10)


def test_too_many_personal_layers_are_refused():
    with pytest.raises(UserError, match="personal = 4 leaves nothing to share: the model has 4 layers"):
        build_problem(tiny_config("fedper", algorithm={"personal": 4}))


@pytest.mark.parametrize("case", ["feddst", "fedspa", "fedp3"])
def test_lossy_encodings_are_refused_where_entries_change_their_meaning(case):
    with pytest.raises(UserError, match=r"communication\.encoding"):
        build_problem(tiny_config(case, communication={"encoding": "int8"}))
