"""What steps the parameters: the masked trainer against ``torch.optim`` bit for bit, the compact one against it."""

import copy
import warnings

import pytest
import torch
from tape import Tape
from torch import nn
from torch.nn import functional as F

from spafl_kernels import AdamOptions, SGDOptions, ThresholdConv2d, ThresholdLinear, threshold_layers, threshold_penalty
from spafl_kernels.captured import CapturedTrainer
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.engines import make_trainer
from spafl_kernels.training import MaskedTrainer, Unsupported

LR, TAU_LR = 0.05, 0.011
OPTIMISERS = {
    "nesterov": (
        SGDOptions(LR, 0.9, 1e-3, penalty=0.02, nesterov=True),
        lambda groups: torch.optim.SGD(groups, LR, momentum=0.9, weight_decay=1e-3, nesterov=True),
    ),
    "sgd": (SGDOptions(LR, penalty=0.02), lambda groups: torch.optim.SGD(groups, LR)),
    "adam": (
        AdamOptions(LR, (0.8, 0.99), 1e-6, 1e-3, penalty=0.02),
        lambda groups: torch.optim.Adam(groups, LR, (0.8, 0.99), 1e-6, 1e-3),
    ),
    "adamw": (
        AdamOptions(LR, weight_decay=0.1, max_grad_norm=0.5, decoupled=True),
        lambda groups: torch.optim.AdamW(groups, LR, weight_decay=0.1),
    ),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = ThresholdConv2d(1, 6, 3, padding=1, bias=False)
        self.norm, self.pool = nn.BatchNorm2d(6), nn.AvgPool2d(3)
        self.hidden = ThresholdLinear(24, 12)
        self.last = ThresholdLinear(12, 4, bias=False)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv(x)))).flatten(1)
        return self.last(F.relu(self.hidden(x)))


def small(dtype=torch.float32, density=0.6):
    torch.manual_seed(0)
    model = Small().to(dtype)
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            scores = layer.scores()
            layer.threshold.fill_(scores.sort().values[round((1 - density) * len(scores))].item() * 0.999)
    return model


def data(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(0, 4, (8,), generator=generator)


def with_threshold_lr(options, lr):
    return type(options)(**{**vars(options), "threshold_lr": lr})


@pytest.mark.parametrize("own_lr", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_masked_trainer_is_torch_optim_bit_for_bit(name, own_lr):
    options, build = OPTIMISERS[name]
    model, twin = small(), small()
    parameters = dict(twin.named_parameters())
    taus = [p for n, p in parameters.items() if n.endswith("threshold")]
    others = [p for n, p in parameters.items() if not n.endswith("threshold")]
    optimiser = build([{"params": others}, {"params": taus, "lr": TAU_LR}] if own_lr else list(parameters.values()))
    trainer = MaskedTrainer(model)
    trainer.begin(with_threshold_lr(options, TAU_LR) if own_lr else options)
    for x, y in data(12):
        trainer.step(x, y)
        optimiser.zero_grad()
        (F.cross_entropy(twin(x), y) + options.penalty * threshold_penalty(twin)).backward()
        if options.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm)
        optimiser.step()
    state = trainer.finish().momentum
    for (n, p), q in zip(model.named_parameters(), parameters.values(), strict=True):
        assert torch.equal(p, q), n
        own = optimiser.state[q]
        if "exp_avg" in own:
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(state[f"{key}.{n}"], own[key]), (key, n)
        elif own.get("momentum_buffer") is not None:
            assert torch.equal(state[n], own["momentum_buffer"]), n


@pytest.mark.sweep
@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("engine", ["masked", "compact"])
def test_the_state_is_carried_from_training_to_training(name, engine):
    """Cut in two with the state handed on, a training is the whole one; without, it is not."""
    options = OPTIMISERS[name][0]
    results = {}
    for cut in ("whole", "handed on", "fresh"):
        model = small(torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer = make_trainer(model, engine)
        state = options.fresh_state(dict(model.named_parameters()))
        densities = None
        for part in ([0, 12],) if cut == "whole" else ([0, 5], [5, 12]):
            trainer.begin(options, state if cut == "handed on" else None, densities)
            for x, y in list(data(12, torch.float64))[slice(*part)]:
                trainer.step(x, y)
            densities = trainer.finish().densities
        results[cut] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(results["handed on"], results["whole"], rtol=1e-10, atol=1e-12)
    stateful = name != "sgd"
    assert (results["fresh"] - results["whole"]).abs().max().gt(1e-6).item() == stateful


@pytest.mark.sweep
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("own_lr, scales", [(None, None), (0.3, None), (None, {"conv": 0.1, "hidden": -0.5})])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_compact_trainer_equals_the_masked_one(nesterov, own_lr, scales, compiled):
    """With masks that change, filters that come back, weight decay and clipping; a second training begins plain."""
    first = SGDOptions(
        0.1, 0.9, 1e-2, max_grad_norm=1.0, penalty=0.05, collapse_floor=0.1, nesterov=nesterov, threshold_lr=own_lr,
        penalty_scales=scales,
    )  # fmt: skip
    masked, compact = small(torch.float64), small(torch.float64)
    trainers = (
        MaskedTrainer(masked),
        CompactTrainer(compact, strict=True, verify="never", compiled=compiled, patience=0),
    )
    flips, rebuilds = set(), 0
    for options in (first, SGDOptions(0.05, 0.5), first):
        state = [options.fresh_state(dict(m.named_parameters())) for m in (masked, compact)]
        for trainer, own in zip(trainers, state, strict=True):
            trainer.begin(options, own)
        for x, y in data(25, torch.float64):
            a, b = (trainer.step(x, y) for trainer in trainers)
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
            flips.add(tuple(trainers[0]._densities.tolist()))
        results = [trainer.finish() for trainer in trainers]
        assert results[0].densities == results[1].densities
        rebuilds += results[1].rebuilds
        for (n, p), q in zip(masked.state_dict().items(), compact.state_dict().values(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=n)
        for n, v in results[0].momentum.items():
            torch.testing.assert_close(results[1].momentum[n], v, rtol=1e-9, atol=1e-9, msg=n)
    assert trainers[1].engine == "compact" and len(flips) > 4 and rebuilds > 0


def test_adam_runs_masked_and_says_why():
    model = small()
    trainer = make_trainer(model, "compact")
    trainer.begin(AdamOptions(0.01))
    for x, y in data(2):
        trainer.step(x, y)
    assert trainer.finish().steps == 2
    assert trainer.engine == "masked" and "no linear map" in trainer.explain()
    trainer.begin(SGDOptions(0.01))  # the reason has gone
    trainer.step(x, y)
    assert trainer.engine == "compact"
    trainer.finish()
    strict = make_trainer(copy.deepcopy(model), "compact", strict=True)
    strict.begin(AdamOptions(0.01))
    with pytest.raises(Unsupported, match="no linear map"):
        strict.step(x, y)


def test_batches_of_another_shape_in_the_middle_keep_adams_state():
    models = [nn.Sequential(ThresholdConv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model, engine in zip(models, ("masked", "compact"), strict=True):
        trainer = make_trainer(model, engine)
        trainer.begin(AdamOptions(0.01))
        for side in (8, 8, 10, 8):
            torch.manual_seed(side)
            trainer.step(torch.randn(4, 1, side, side), torch.arange(4))
        results.append(trainer.finish())
    for key, t in results[0].momentum.items():
        assert torch.equal(results[1].momentum[key], t), key
    assert results[1].momentum["step.0.weight"].item() == 4


def test_the_penalty_of_a_layer_is_scaled():
    model, twin = small(), small()
    trainer = MaskedTrainer(model)
    trainer.begin(SGDOptions(LR, penalty=0.02, penalty_scales={"conv": 0.25, "last": -2.0}))
    (x, y), *_ = data(1)
    trainer.step(x, y)
    trainer.finish()
    parts = {"conv": 0.25, "hidden": 1.0, "last": -2.0}
    penalty = sum(s * twin.get_submodule(n).threshold.neg().exp().sum() for n, s in parts.items())
    (F.cross_entropy(twin(x), y) + 0.02 * penalty).backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - LR * q.grad, msg=n)
    with pytest.raises(ValueError, match=r"penalty_scales must name threshold layers of the model; 'fc' is none"):
        trainer.begin(SGDOptions(LR, penalty_scales={"fc": 1.0}))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("engine", ["masked", "compact", "captured"])
def test_a_layer_without_penalty_may_have_thresholds_of_any_depth(engine, apart):
    """``exp(-tau)`` of a threshold below -88 is infinite in float32, and 0 times that would be no number."""
    model, twin = small(), small()
    scales = {"conv": 0.0, "last": 0.5}
    with torch.no_grad():
        for net in (model, twin):
            net.conv.threshold.copy_(torch.tensor([-1e9, -100.0, -89.0, 0.1, 0.2, -1.0]))
            net.conv.weight.requires_grad_(
                not apart
            )  # where it is frozen, the compact engine leaves the layer as it is
    trainer = {
        "masked": lambda: MaskedTrainer(model),
        "compact": lambda: CompactTrainer(model, verify="never", patience=0),
        "captured": lambda: CapturedTrainer(model, recorder=Tape()),
    }[engine]()
    plain = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], LR, momentum=0.9)
    trainer.begin(SGDOptions(LR, 0.9, penalty=0.02, penalty_scales=scales))
    for x, y in data(6):
        trainer.step(x, y)
        plain.zero_grad()
        penalty = twin.hidden.threshold.neg().exp().sum() + 0.5 * twin.last.threshold.neg().exp().sum()
        (F.cross_entropy(twin(x), y) + 0.02 * penalty).backward()
        plain.step()
    trainer.finish()
    assert trainer.engine == engine
    assert engine != "compact" or apart == ("conv: as it stands, at full width" in trainer.explain())
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=n)
    assert model.conv.threshold.isfinite().all()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: SGDOptions(0.1, nesterov=True), "nesterov needs a momentum > 0; got momentum = 0.0"),
        (lambda: SGDOptions(0.1, threshold_lr=-1.0), "threshold_lr must be None or a finite number >= 0; got -1.0"),
        (lambda: SGDOptions(0.1, penalty_scales={"a": float("inf")}), r"penalty_scales\['a'\] must be a finite number"),
        (lambda: AdamOptions(0.1, (0.9, 1.0)), r"betas must be two numbers in \[0, 1\); got \(0.9, 1.0\)"),
        (lambda: AdamOptions(0.1, 0.9), "betas must be two numbers"),
        (lambda: AdamOptions(0.1, eps=0.0), "eps must be a finite number > 0; got 0.0"),
        (lambda: AdamOptions(float("nan")), "lr must be a finite number >= 0"),
    ],
)
def test_bad_options_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_state_of_another_form_is_refused():
    model = small()
    trainer = MaskedTrainer(model)
    with pytest.raises(ValueError, match=r"momentum must have one buffer for every trainable parameter"):
        trainer.begin(AdamOptions(0.1), SGDOptions(0.1, 0.9).fresh_state(dict(model.named_parameters())))
