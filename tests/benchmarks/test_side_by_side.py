"""The comparison with the authors' code, as far as it goes without that code."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import side_by_side
from benchmarks.side_by_side import Shuffled, row_of
from spafl.algorithms import Client, Samples
from spafl.config import resolve_config
from spafl.simulation.problem import build_problem

SMALL = {"data": {"name": "synthetic", "image": 28, "classes": 10, "train": 200, "test": 100},
         "partition": {"scheme": "dirichlet", "clients": 3, "alpha": 1.0, "min_train": 16, "min_test": 4},
         "sampling": {"clients_per_round": 2}, "rounds": 2}  # fmt: skip


def test_the_other_code_gets_the_batches_of_our_clients():
    config = resolve_config(side_by_side.SETTINGS | SMALL)
    problem = build_problem(config)
    local, device = config.local_training(), torch.device("cpu")
    for k, part in enumerate(problem.parts.train):
        x, y = torch.as_tensor(problem.dataset.train_x), torch.as_tensor(problem.dataset.train_y)
        samples = Samples(x, y, torch.as_tensor(part))
        client = Client(
            k, problem.model, {}, samples, samples, None, local, problem.dataset.transform, {}, config.seed, device
        )
        order = Shuffled(config.seed, k, len(part))
        for round in (0, 5):
            order.begin(round)
            theirs = itertools.chain.from_iterable(iter(order) for _ in range(local.epochs))
            ours = torch.cat([batch for batch, _ in client.training_batches(round)])
            assert torch.equal(ours, samples.x[list(theirs)].float())


class Layer(torch.nn.Linear):
    ratio = 1.0


class Mover(SimpleNamespace):
    """As much of the authors' client as is kept between rounds."""

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 3)).square().sum().backward()
        self.optimizer.step()


def _their_side(seed: int) -> side_by_side.Theirs:
    torch.manual_seed(seed)
    clients = []
    for _ in range(2):
        model = torch.nn.Sequential(Layer(3, 2))
        clients.append(Mover(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)))
    found = object.__new__(side_by_side.Theirs)
    found.clients, found.server = clients, SimpleNamespace(global_thresholds={}, global_difference={})
    return found


def test_the_other_code_goes_on_from_what_was_kept(tmp_path):
    """Weights, momentum, densities and the server's thresholds: the next step is that of one that was not cut off."""
    first, other = _their_side(1), _their_side(2)
    for client in first.clients:
        client.step()
    first.clients[1].model[0].ratio = torch.tensor(0.005)
    first.server.global_difference = {"fc.threshold": torch.tensor([0.5])}
    for round in (9, 19, 29):
        first.save(tmp_path, round)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs-0019.pt", "theirs-0029.pt"]
    other.restore(tmp_path, 29)
    assert other.server.global_difference == first.server.global_difference
    assert [client.model[0].ratio for client in other.clients] == [1.0, torch.tensor(0.005)]
    for a, b in zip(first.clients, other.clients, strict=True):
        a.step()
        b.step()
        assert torch.equal(a.model[0].weight, b.model[0].weight)


def test_a_round_agrees_within_half_a_point_and_no_further():
    judged = functools.partial(row_of, "float64", 2)
    row = judged(0, (2.0, 50.0, 0.5), (9.0, 50.5, 0.504))
    assert row["wrong"] == row["ratio"] == row["seconds_ours"] == "" and row["density_apart"] == "0.004"
    row = judged(3, (2.0, 50.0, 0.5), (9.0, 50.6, 0.5))
    assert row["wrong"] == "accuracy differs by 0.6" and row["round"] == 4
    assert judged(0, (2.0, 50.0, 0.5), (9.0, 50.0, 0.506))["wrong"] == "density differs by 0.006"
    assert "accuracy" in judged(0, (2.0, float("nan"), 0.5), (9.0, 50.0, 0.5))["wrong"]


def test_float32_is_timed_and_not_judged():
    row = row_of("float32", 2, 3, (2.0, 50.0, 0.5), (9.0, 53.0, 0.5))
    assert row["wrong"] == "" and row["accuracy_apart"] == "3" and row["ratio"] == "4.5" and row["seconds_ours"] == 2.0


def test_a_folder_that_is_something_else_is_refused(tmp_path, capsys):
    assert side_by_side.main([str(tmp_path), "--quick"]) == 2
    assert "is not the FMNIST folder of the authors' repository" in capsys.readouterr().err


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_table_takes_the_largest_difference_and_the_median_time(rounds):
    rows = [row_of(dtype, 2, i, (2.0, 50.0, 0.5), (6.0 + i, 50.0 + 0.1 * i, 0.5))
            for dtype in ("float32", "float64") for i in range(rounds)]  # fmt: skip
    text = side_by_side.table([{name: str(value) for name, value in row.items()} for row in rows])
    agreement, speed = text.splitlines()[2:]
    assert agreement.startswith(f"| float64 | 2 | {rounds} | <= {0.1 * (rounds - 1):.2g} | <= 0 |")
    assert "x" not in agreement
    assert speed.startswith("| float32 |") and ("3.5x" if rounds == 3 else "3.0x") in speed


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0"), (0.0124, "0.013"), (4.2, "4.2"), (7.41e-6, "7.5e-06"), (0.30000000000000004, "0.3")]
)
def test_a_bound_is_rounded_up(value, said):
    assert side_by_side.at_most(value) == said
