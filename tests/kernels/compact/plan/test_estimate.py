"""Engine "auto" runs compact where that is expected to gain; a training that runs masked instead is the masked one."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d, ThresholdLinear, make_trainer
from spafl_kernels.compact import CompactTrainer, trace_flow, trainer
from spafl_kernels.compact.plan import estimate
from spafl_kernels.compact.plan.rows import Rows
from spafl_kernels.training import MaskedTrainer, SGDOptions

OPTIONS = SGDOptions(lr=0.05, momentum=0.9, penalty=1e-2, max_grad_norm=1.0, collapse_floor=0.3)


def net(seed=0, estimator="window"):
    torch.manual_seed(seed)
    return nn.Sequential(
        ThresholdConv2d(8, 8, 3, padding=1, estimator=estimator), nn.BatchNorm2d(8), nn.ReLU(),
        ThresholdConv2d(8, 16, 3, padding=1, estimator=estimator), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ThresholdLinear(16, 4, estimator=estimator),
    ).double()  # fmt: skip


def pruned(seed=0, keep=0.5):
    model = net(seed)
    with torch.no_grad():
        for m in model:
            if hasattr(m, "threshold"):
                m.threshold.copy_(m.scores().quantile(1 - keep).expand(len(m.threshold)))
    return model


def batch(i, count=6):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(count, 8, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (count,), generator=generator)


@pytest.fixture
def judged(monkeypatch):
    """Sets the expected gain; returns the batches that were asked about."""

    def set_gain(gain):
        asked = []

        def answer(self, flow, keep, batch):
            asked.append(batch)
            return gain(batch) if callable(gain) else gain

        monkeypatch.setattr(estimate.Judge, "gain", answer)
        return asked

    return set_gain


def train(one, steps, evaluate_first=False, rounds=2):
    """Losses, results and the state after some trainings."""
    seen, momentum = [], None
    for turn in range(rounds):
        one.begin(OPTIONS, momentum)
        if evaluate_first:
            seen.append(one.evaluate(*batch(99, 12))[0])
        seen += [one.step(*batch(100 * turn + i)) for i in range(steps)]
        result = one.finish()
        momentum = dict(result.momentum)
    return torch.stack(seen), result, one.model.state_dict(), momentum


def same(a, b):
    for x, y in zip(a, b):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                torch.testing.assert_close(x[key], y[key], rtol=1e-9, atol=1e-9)
        elif isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
        else:
            assert (x.steps, x.macs) == (y.steps, y.macs) and x.densities == pytest.approx(y.densities)


@pytest.mark.parametrize("evaluate_first", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_without_gain_the_training_is_the_masked_one(evaluate_first, strict, judged):
    judged(0.8)
    model = pruned()
    auto = make_trainer(copy.deepcopy(model), strict=strict)
    found = train(auto, 4, evaluate_first)
    assert auto.engine == "masked"
    assert auto.reason.startswith("a compact step is expected to take 1.25 times as long as a masked one (batch 6, ")
    assert auto.explain().startswith(f"masked: {auto.reason}")
    same(found, train(MaskedTrainer(model), 4, evaluate_first))


@pytest.mark.parametrize("at_large", [0.8, 1.2])
def test_the_batches_of_the_training_decide_not_those_of_an_evaluation(at_large, judged):
    judged(lambda batch: at_large if batch == 12 else 2.0 - at_large)
    auto = make_trainer(pruned())
    auto.begin(OPTIONS)
    auto.evaluate(*batch(99, 12))
    assert auto.engine == ("masked" if at_large < 1 else "compact")
    auto.step(*batch(0))
    assert auto.engine == ("compact" if at_large < 1 else "masked")
    auto.finish()
    found = train(make_trainer(pruned()), 3, True)
    expected = train(MaskedTrainer(pruned()), 3, True)
    same(found[:1] + found[2:], expected[:1] + expected[2:])


def test_it_is_asked_again_as_the_masks_move(judged, monkeypatch):
    monkeypatch.setattr(trainer, "AGAIN", 3)
    gain, counted = [0.5], []
    judged(lambda batch: gain[0])
    auto = make_trainer(pruned())
    auto.begin(OPTIONS)
    for i in range(12):
        if auto.engine == "masked":  # other masks, so that the last answer is not the one
            auto.model[0].threshold.data[i % 8] = 0.0
        gain[0] = 0.5 if i < 7 else 1.5
        auto.step(*batch(i))
        counted.append(auto.engine)
    assert auto.finish().steps == 12
    assert counted[:7] == ["masked"] * 7 and counted[-1] == "compact"


def test_compact_that_was_asked_for_is_compact(judged):
    judged(0.1)
    one = make_trainer(pruned(), "compact")
    one.begin(OPTIONS)
    one.step(*batch(0))
    assert one.engine == "compact"
    one.finish()


def test_the_work_of_a_step_is_what_is_counted():
    model = pruned(keep=0.5).float()
    x, y = batch(0, 16)
    counts = []
    for one in (MaskedTrainer(copy.deepcopy(model)), CompactTrainer(copy.deepcopy(model), strict=True)):
        one.begin(SGDOptions(lr=0.0))
        one.step(x.float(), y)
        counts.append(one.finish().macs)
    flow = trace_flow(model, (8, 5, 5))
    plan = estimate.plan_of(flow, Rows(flow).of_model(gradients=True).keep, native=False)
    for done, count, room in zip((estimate.work(flow, p, 16) for p in (None, plan)), counts, (0.0, 0.02)):
        macs = sum(part.get(name, 0) for part in done.values() for name in ("convolution", "grouped", "linear"))
        assert macs == pytest.approx(count, rel=room)  # constants of dropped channels are not in the products


def test_a_price_list_that_lacks_one_is_refused(monkeypatch, tmp_path):
    seconds = {e: dict(p) for e, p in estimate.prices().items()}
    del seconds["compact"]["elements"]
    (tmp_path / "prices.json").write_text(json.dumps({"seconds": seconds}))
    monkeypatch.setattr(estimate, "PRICES", tmp_path / "prices.json")
    estimate.prices.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"prices\.json must have a price for step, calls"):
            estimate.prices()
    finally:
        estimate.prices.cache_clear()


def test_large_layers_gain_by_fewer_filters():
    wide = nn.Sequential(ThresholdConv2d(8, 64, 3), nn.ReLU(), ThresholdConv2d(64, 64, 3), nn.ReLU())
    flow, gains = trace_flow(wide, (8, 20, 20)), []
    for share in (1.0, 0.5, 0.25):
        keep = {name: torch.arange(64) < 64 * share for name in ("0", "2")}
        gains.append(estimate.Judge().gain(flow, keep, 16))
    assert 0.9 < gains[0] < gains[1] < gains[2]


def test_loss_functions_may_change_between_trainings(judged):
    judged(0.5)
    auto, masked = make_trainer(pruned()), MaskedTrainer(pruned())
    for loss in (F.cross_entropy, lambda out, y: 2 * F.cross_entropy(out, y)):
        auto.loss = masked.loss = loss
        same(train(auto, 2, rounds=1)[:1], train(masked, 2, rounds=1)[:1])
