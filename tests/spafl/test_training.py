"""The ``[training]`` section: schedules against torch's, length of a turn, early stopping, optimisers in whole runs."""

import math
from dataclasses import replace

import pytest
import torch

from spafl.algorithms import Client, LocalTraining, Samples
from spafl.algorithms.client import steps_of_momentum
from spafl.algorithms.dense import dense_paper_macs
from spafl.config import RunConfig, deep_merge, resolve_config
from spafl.data import Transform
from spafl.errors import UserError
from spafl.simulation import run
from spafl_kernels.training import AdamOptions, SGDOptions

PLAIN = LocalTraining(0.4, 0.9, 0.0, 4, 2, 1.0, 0.0, None, False)


def with_torch(make, rounds):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.4)
    schedule = make(optimiser)
    found = []
    for _ in range(rounds):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found


S = torch.optim.lr_scheduler
SCHEDULES = {
    "exponential": ({"lr_decay": 0.9}, lambda o: S.ExponentialLR(o, 0.9)),
    "step": ({"schedule": "step", "lr_decay": 0.3, "step_rounds": 4}, lambda o: S.StepLR(o, 4, 0.3)),
    "cosine": (
        {"schedule": "cosine", "cosine_rounds": 13, "lr_floor": 0.05},
        lambda o: S.CosineAnnealingLR(o, 13, eta_min=0.05),
    ),
    "warm-up and cosine": (
        {"schedule": "cosine", "cosine_rounds": 8, "warmup_rounds": 5},
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 1 / 6, 1.0, 5), S.CosineAnnealingLR(o, 8)], [5]),
    ),
}


@pytest.mark.filterwarnings("ignore:.*scheduler.*")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_torch(name):
    settings, make = SCHEDULES[name]
    local = replace(PLAIN, **settings)
    expected = with_torch(make, 13)
    assert [local.lr_at(r) for r in range(13)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    own = replace(local, threshold_lr=0.04)
    assert [own.options_at(r).threshold_lr for r in range(13)] == pytest.approx([lr / 10 for lr in expected], abs=1e-12)
    assert local.options_at(3).threshold_lr is None


def test_the_end_of_a_cosine_and_the_floor():
    local = replace(PLAIN, schedule="cosine", cosine_rounds=10, lr_floor=0.1)
    assert local.lr_at(10) == local.lr_at(1000) == pytest.approx(0.1)
    assert replace(PLAIN, schedule="step", step_rounds=2, lr_decay=0.1, lr_floor=0.1).lr_at(7) == 0.1


class Losses:
    """A trainer whose losses are given."""

    def __init__(self, losses=()):
        self.losses = iter(losses)

    def step(self, x, y):
        return torch.tensor(float(next(self.losses, 1.0)))


def client(local, samples=10, losses=()):
    x, y = torch.arange(samples, dtype=torch.float32).view(-1, 1, 1, 1), torch.zeros(samples, dtype=torch.int64)
    data = Samples(x, y)
    nothing = torch.nn.Module()
    macs = {"a": 7}
    return Client(
        0, nothing, {}, data, data, Losses(losses), local, Transform(), macs, 1, torch.device("cpu"), layers={}
    )


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"epochs": 2}, 6),  # 4 + 4 + 2 samples a pass
        ({"epochs": 0.5}, 2),
        ({"epochs": 1.7}, 5),
        ({"epochs": 0.01}, 1),
        ({"steps": 7}, 7),
        ({"steps": 7, "drop_last": True}, 7),
        ({"epochs": 1.5, "drop_last": True}, 3),
        ({"steps": 3, "batch_size": 64}, 3),
    ],
)
def test_a_turn_is_as_long_as_asked(settings, steps):
    some = client(replace(PLAIN, **settings))
    batches = [x.flatten().tolist() for x, _ in some.training_batches(0)]
    assert len(batches) == some.planned_steps == steps
    length = some.batches_per_epoch()
    for start in range(0, steps - length + 1, length):  # every pass has every sample once
        seen = [v for batch in batches[start : start + length] for v in batch]
        assert len(seen) == len(set(seen)) == (8 if settings.get("drop_last") else 10)
    # A shorter turn is the beginning of a longer one.
    longer = [x.flatten().tolist() for x, _ in client(replace(some.local, steps=steps + 4)).training_batches(0)]
    assert longer[:steps] == batches
    assert some.run_sgd(0)[1] == steps
    assert dense_paper_macs(some, steps) == pytest.approx(3 * steps / length * 10 * 7)


@pytest.mark.parametrize(
    "passes, settings, steps",
    [
        ([3, 2, 2, 1, 1, 1], {"early_stopping": 1}, 9),
        ([3, 2, 2, 1, 1, 1], {"early_stopping": 2}, 18),
        ([3, 2, 2, 2, 1, 1], {"early_stopping": 2}, 12),
        ([3, 2, 1.9, 1.2, 1.1], {"early_stopping": 1, "min_improvement": 0.1}, 9),
        ([3, 3, 3], {}, 9),
        ([5, 4, 3], {"early_stopping": 1}, 9),
    ],
)
def test_a_client_stops_when_its_loss_stays(passes, settings, steps):
    losses = [loss + shift for loss in passes for shift in (-0.5, 0.0, 0.5)]
    some = client(replace(PLAIN, epochs=len(passes), **settings), losses=losses)
    loss, done = some.run_sgd(0)
    assert done == steps
    assert loss == pytest.approx(sum(losses[:steps]) / steps)


def test_a_loss_that_is_not_finite_is_found_after_a_stop_too():
    some = client(replace(PLAIN, epochs=9, early_stopping=1), losses=[1, 1, math.nan, 1, 1, 1])
    with pytest.raises(FloatingPointError, match="step 3"):
        some.run_sgd(0)


def test_the_options_of_a_round():
    adamw = replace(PLAIN, optimizer="adamw", betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=2.0)
    assert adamw.options_at(0) == AdamOptions(0.4, (0.8, 0.9), 1e-8, 0.1, 2.0, decoupled=True)
    assert not replace(adamw, optimizer="adam").options_at(0).decoupled
    assert replace(PLAIN, nesterov=True).options_at(0) == SGDOptions(0.4, 0.9, nesterov=True)


@pytest.mark.parametrize("nesterov", [False, True])
def test_how_far_a_constant_gradient_moves(nesterov):
    p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimiser = torch.optim.SGD([p], 1.0, momentum=0.8, nesterov=nesterov)
    for _ in range(9):
        p.grad = torch.ones_like(p)
        optimiser.step()
    assert steps_of_momentum(9, 0.8, nesterov) == pytest.approx(-p.item())


@pytest.mark.parametrize(
    "settings, text",
    [
        (
            {"nesterov": True, "momentum": 0.0},
            "training: nesterov = true needs optimizer = sgd and a momentum above 0; ",
        ),
        ({"nesterov": True, "optimizer": "adam"}, "got adam"),
        ({"schedule": "step"}, "training: schedule = step needs step_rounds"),
        ({"step_rounds": 3}, "training: step_rounds belongs to schedule = step; got schedule = exponential"),
        ({"cosine_rounds": 3}, "cosine_rounds belongs to schedule = cosine"),
        ({"schedule": "cosine", "lr_decay": 0.9}, "schedule = cosine takes no lr_decay; got 0.9"),
        ({"schedule": "cosine", "lr_floor": 5.0}, "which is above lr"),
        ({"min_improvement": 0.1}, "min_improvement needs early_stopping"),
        ({"optimizer": "lion"}, "training.optimizer: one of sgd, adam, adamw; got"),
        ({"epochs": 0}, "training.epochs"),
        ({"epochs": "two"}, "training.epochs: input should be a valid integer or number"),
        ({"steps": 0}, "training.steps"),
        ({"betas": [0.9]}, "training.betas"),
        ({"betas": [0.9, 1.0]}, "training.betas.1"),
        ({"threshold_lr": 0.0}, "training.threshold_lr"),
        ({"early_stopping": 0}, "training.early_stopping"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(small, settings, text):
    with pytest.raises(UserError) as caught:
        resolve_config(deep_merge(small, {"training": settings}))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_cosine_lasts_as_long_as_the_run_and_is_written_down(small):
    config = resolve_config(deep_merge(small, {"training": {"schedule": "cosine", "warmup_rounds": 1}}))
    assert config.training.cosine_rounds == 2 and "cosine_rounds = 2" in config.to_toml()
    again = resolve_config(deep_merge(small, {"training": {"schedule": "cosine", "cosine_rounds": 9}}))
    assert isinstance(again, RunConfig) and again.local_training().lr_at(9) == 0


def test_scaffold_needs_sgd(small, tmp_path):
    small["algorithm"] = {"name": "scaffold"}
    with pytest.raises(UserError, match=r"control variates .* need training\.optimizer = sgd, got adam"):
        run(resolve_config(deep_merge(small, {"training": {"optimizer": "adam"}})), tmp_path / "run")


CASES = {
    "adamw": {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.01},
    "nesterov": {
        "nesterov": True, "threshold_lr": 0.05, "schedule": "cosine", "cosine_rounds": 9, "warmup_rounds": 1,
        "epochs": 1.5, "early_stopping": 1,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_cut_and_resumed_is_the_whole_run(small, tmp_path, name):
    """With ``momentum_lifetime = run`` the optimiser's state is in the clients' rows and in the checkpoint."""
    from folders import assert_same_folders

    tables = deep_merge(small, {"training": CASES[name], "rounds": 3})
    run(resolve_config(tables), tmp_path / "whole")
    run(resolve_config({**tables, "rounds": 1}), tmp_path / "cut")
    run(resolve_config(tables), tmp_path / "cut", resume=True)
    assert_same_folders(tmp_path / "whole", tmp_path / "cut")
    if name == "adamw":
        from spafl.simulation.checkpoint import load_latest

        state = load_latest(tmp_path / "cut" / "checkpoints")
        trained = [c for k in range(5) if (c := state.client(k))]
        assert max(c["momentum.step.conv1.weight"].item() for c in trained) > 3  # of more than one turn
