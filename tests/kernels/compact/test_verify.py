"""The engine checks itself: faults put into its rules on purpose do not reach a number that anybody sees."""

import copy
import dataclasses
import time

import pytest
import torch
from graphs import GRAPHS
from helpers import prune
from test_boundary import Around as Detached
from test_boundary import FrozenNorm, Local
from test_trainer import Padded, Thin, warm_norms, with_estimator
from torch import nn
from torch.nn import functional as F

from spafl.models import LeNet5
from spafl_kernels import ThresholdConv2d, ThresholdLinear, convert, threshold_layers
from spafl_kernels.compact import CompactModule, CompactTrainer, export, module, verify
from spafl_kernels.compact.captures import Batch
from spafl_kernels.compact.graph import follow, layout, trace
from spafl_kernels.compact.graph.calls import Call
from spafl_kernels.compact.graph.inputs import ONE, Input
from spafl_kernels.compact.kinds import dropout as dropouts
from spafl_kernels.compact.kinds import grouped as groups
from spafl_kernels.compact.kinds import pools
from spafl_kernels.compact.kinds.attention import Attention
from spafl_kernels.compact.kinds.base import Const
from spafl_kernels.compact.kinds.channelwise import Activation, Relu
from spafl_kernels.compact.kinds.grouped import Depthwise
from spafl_kernels.compact.kinds.layers import Layer
from spafl_kernels.compact.kinds.moves import Concatenation, Flatten, Item
from spafl_kernels.compact.kinds.norms import BatchNorm
from spafl_kernels.compact.kinds.pools import Pool
from spafl_kernels.compact.kinds.sums import Sum
from spafl_kernels.compact.kinds.whole import Whole
from spafl_kernels.compact.plan import conditions, rows, state
from spafl_kernels.compact.small import Small
from spafl_kernels.compact.train import session
from spafl_kernels.compact.train.dropped import DroppedRows
from spafl_kernels.training import MaskedTrainer, SGDOptions, Unsupported


class Pooled(nn.Module):
    """Biased filters, so that pruned channels are constants, in front of what treats constants in some way."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.second = ThresholdConv2d(2, 8, 3, padding=1), ThresholdConv2d(8, 8, 3, padding=1)
        self.fc, self.operation = ThresholdLinear(8, 5), operation

    def forward(self, x):
        return self.fc(F.relu(self.second(self.operation(self.first(x)))).mean((2, 3)))


def conv(name, estimator="window"):
    return lambda: (with_estimator(convert(GRAPHS[name]()), estimator), (3, 8, 8))


def pooled(operation):
    return lambda: (with_estimator(Pooled(operation), "window"), (2, 7, 7))


def padded(estimator, **kwargs):
    return lambda: (with_estimator(Padded(**kwargs), estimator), (2, 7, 8))


def grouped():
    layers = [ThresholdConv2d(6, 8, 3, groups=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return with_estimator(nn.Sequential(*layers, ThresholdLinear(8, 5)), "window"), (6, 6, 6)


def far():
    """Margins of about 3."""
    model, shape = padded("window")()
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            layer.weight.mul_(1000)
    return model, shape


def local(part):
    return lambda: (with_estimator(Local(part), "window"), (6,))


def dropout():
    layers = [ThresholdLinear(6, 8, bias=False), nn.ReLU(), nn.Dropout(0.5), ThresholdLinear(8, 5)]
    return nn.Sequential(*layers), (6,)


def twice(x):
    a, b = torch.chunk(x, 2, 1)
    return torch.cat([F.gelu(b), a], 1)


def in_place(x):
    y = nn.functional.gelu(x)
    z = y.view(y.shape)
    z.mul_(2)
    return y + z


# -- faults: what is done to a rule, a model that has it, which engines show it -------------------------------------


def after(kind, change):
    """What a call has made is changed: ``change(kept channels, constants)``."""

    def put(patch):
        build = kind.build

        def wrong(self, scope, i):
            run = build(self, scope, i)

            def call(env, training):
                run(env, training)
                env.kept[i], env.constants[i] = change(env.kept[i], env.constants[i])

            return call

        patch.setattr(kind, "build", wrong)

    return put


def instead(owner, name, make):
    return lambda patch: patch.setattr(
        owner, name, make(owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name))
    )


def flag(kind, **values):
    """After a rule for channels its result is changed."""

    def put(patch):
        rule = kind.follow

        def wrong(self, flow):
            rule(self, flow)
            if self.layout is not None:
                for key, value in values.items():
                    setattr(self, key, value)

        patch.setattr(kind, "follow", wrong)

    return put


def no_constants(x, c):
    return x, None if c is None else torch.zeros_like(c)


def a_little_more(x, c):
    return x * 1.001 if isinstance(x, torch.Tensor) and x.requires_grad else x, c


def other_constants(x, c):
    return x, None if c is None else 1.01 * c + 0.01


both = ("trainer", "module")
every = (*both, "export")

FAULTS = {
    "constants of a layer are forgotten": (flag(Layer, const=Const.ZERO), padded("window", bias=True), both),
    "constants of a norm are forgotten": (flag(BatchNorm, const=Const.ZERO), padded("window"), both),
    "constants of a pool are forgotten": (
        flag(Pool, const=Const.ZERO),
        pooled(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        both,
    ),
    "a sum has constants of one side": (
        flag(Sum, const=Const.ZERO),
        conv("joined"),
        both,
    ),
    "cat in another order": (
        instead(Concatenation, "follow", lambda rule: _reversed(rule)),
        conv("joined"),
        every,
    ),
    "cat without constants": (flag(Concatenation, const=Const.ZERO), conv("chunks"), both),
    "a pool's divisor is not looked at": (
        instead(pools, "_keeps_constants", lambda rule: lambda *a: True),
        pooled(nn.AvgPool2d(2, divisor_override=1)),
        every,
    ),
    "a pool's padding counts": (
        instead(pools, "_keeps_constants", lambda rule: lambda *a: True),
        pooled(nn.AvgPool2d(3, 1, 1)),
        every,
    ),
    "alpha of a sum": (
        instead(Call, "of", lambda of: _without(of, "alpha", 1)),
        pooled(lambda x: torch.add(x, F.gelu(x), alpha=2)),
        every,
    ),
    "dropout's flag": (
        instead(Call, "of", lambda of: _without(of, "training", False)),
        pooled(lambda x: F.dropout(F.relu(x), 0.5)),
        every,
    ),
    "dropout's scale": (after(dropouts.Dropout, lambda x, c: (x * 0.5, c)), dropout, both),
    "a flattened channel is too short": (
        instead(layout.Layout, "repeated", lambda f: lambda self, times, dim: f(self, 1, dim)),
        conv("vgg"),
        both,
    ),
    "a sum keeps one side's channels": (
        instead(layout.Layout, "plus", lambda f: lambda self, other: self),
        conv("basic"),
        both,
    ),
    "a chunk is another chunk": (after(Item, lambda x, c: (x.flip(1), c)), pooled(twice), both),
    "gradients of pruned rows are taken for 0": (
        instead(follow._Follower, "proof", lambda f: lambda self, layer: (("", None),)),
        padded("identity", act=nn.GELU),
        both,
    ),
    "no rows are carried": (
        instead(conditions.Condition, "carry", lambda f: lambda *a: None),
        padded("identity"),
        both,
    ),
    "beta is not looked at": (
        instead(session.Session, "in_front", lambda f: _minus(f)),
        padded("identity"),
        ("trainer",),
    ),
    "beta is not looked at by the module": (
        instead(rows.OfParameters, "in_front", lambda f: _minus(f)),
        padded("identity"),
        ("module",),
    ),
    "groups lose their places": (
        instead(groups, "_packing", lambda f: lambda *a: _mixed(f(*a))),
        grouped,
        every,
    ),
    "fixed statistics are taken for those of the batch": (
        instead(trace.Trace, "of", lambda f: lambda self, m: (True, False)[: len(self.modes)]),
        lambda: (with_estimator(convert(FrozenNorm()), "window"), (2, 5, 5)),
        ("trainer",),
    ),
    "relu forgets constants": (after(Relu, no_constants), padded("window", bias=True), both),
    "a norm's constants": (after(BatchNorm, other_constants), padded("window"), both),
    "a norm's result": (after(BatchNorm, lambda x, c: (x * 1.0001, c)), padded("window"), both),
    "a pool's result": (after(Pool, lambda x, c: (x + 1e-6, c)), padded("window"), both),
    "a sum's result": (after(Sum, lambda x, c: (x * 1.001, c)), conv("basic"), both),
    "a sum's constants": (after(Sum, other_constants), conv("joined"), both),
    "a concatenation's constants": (after(Concatenation, other_constants), conv("joined"), both),
    "a flattened tensor": (after(Flatten, lambda x, c: (x.flip(1), c)), conv("vgg"), both),
    "flattened constants": (after(Flatten, other_constants), padded("window", bias=True, act=nn.GELU), both),
    "what runs as it stands": (after(Whole, a_little_more), conv("grouped"), both),
    "a depthwise layer": (after(Depthwise, lambda x, c: (x.roll(1, 1), c)), conv("mobilenet"), both),
    "attention": (after(Attention, lambda x, c: (x * 1.01, c)), conv("attentions"), both),
    "activations": (after(Activation, lambda x, c: (x * 1.01, c)), padded("window", act=nn.GELU), both),
    "writes in place are not seen": (
        instead(follow, "give_writes_a_value", lambda f: lambda *a: set()),
        pooled(in_place),
        every,
    ),
    "dropped rows do not decay": (
        instead(DroppedRows, "catch_up", lambda f: lambda self, rows: None),
        padded("window"),
        ("trainer",),
    ),
    "statistics of dropped channels": (
        instead(state.NormState, "store_statistics", lambda f: _kept_only(f)),
        padded("window"),
        ("trainer",),
    ),
    "the count of batches": (
        instead(session.Session, "store", lambda f: _uncounted(f)),
        padded("window"),
        ("trainer",),
    ),
    "the penalty of a layer that runs as it stands": (
        instead(session.Session, "penalty", lambda f: lambda self: None),
        local("twice"),
        ("trainer",),
    ),
    "the gradient of what is loose": (
        instead(session.Session, "advance", lambda f: _tight(f)),
        conv("grouped"),
        ("trainer",),
    ),
    "statistics are not put back": (
        instead(module, "_norm_put", lambda f: lambda *a: lambda: None),
        padded("window"),
        ("module",),
    ),
    "the estimator's term of the weights": (
        instead(module._GatherRows, "backward", lambda f: _wrong_gradient(f, 0)),
        padded("identity"),
        ("module",),
    ),
    "the gradient of thresholds": (
        instead(module._GatherRows, "backward", lambda f: _wrong_gradient(f, 1)),
        padded("identity"),
        ("module",),
    ),
    "the window": (instead(rows, "WINDOW", lambda f: 1e9), far, ("module",)),
    "the trainer's window": (instead(session, "WINDOW", lambda f: 1e9), far, ("trainer",)),
    "a gradient that is cut": (
        lambda patch: None,
        lambda: (with_estimator(Detached("detach"), "window"), (6,)),
        ("trainer",),
    ),
    "export: a folded norm": (
        lambda patch: _export(patch, BatchNorm, "numbers", lambda r: (r[0] * 1.01, r[1], r[2])),
        padded("window"),
        ("export",),
    ),
    "export: constants of a norm": (
        lambda patch: _export(patch, BatchNorm, "numbers", lambda r: (*r[:2], None)),
        padded("window"),
        ("export",),
    ),
    "export: rows in another order": (lambda patch: _export_rows(patch), padded("window"), ("export",)),
    "export: another activation": (lambda patch: _export(patch, Small, "module", None), conv("mobilenet"), ("export",)),
}


def _reversed(rule):
    def wrong(self, flow):
        rule(self, flow)
        if self.layout is not None:
            self.layout = layout.Layout(self.layout.dim, self.layout.segments[::-1])

    return wrong


def _without(of, name, value):
    def wrong(node, signature):
        call = of.__func__(Call, node, signature)
        for values in (call.values, call.elsewhere) if call is not None else ():
            if values and name in values:
                values[name] = value
        return call

    return staticmethod(wrong)


def _mixed(packing):
    return dataclasses.replace(packing, rows=packing.rows.roll(1))


def _minus(f):
    return lambda self, *args, **kwargs: -f(self, *args, **kwargs)


def _kept_only(f):
    def wrong(self):
        lost, self.slot.mean_dropped = self.slot.mean_dropped, self.slot.mean_dropped
        if lost is not None:
            lost.mul_(1.5)
        f(self)

    return wrong


def _uncounted(f):
    def wrong(self, steps=None):
        counts = [n.module.num_batches_tracked.clone() for n in self._norms.values()]
        f(self, steps)
        for n, count in zip(self._norms.values(), counts):
            n.module.num_batches_tracked.copy_(count)

    return wrong


def _tight(f):
    def wrong(self, grads):
        count = len(self._arena.leaves)
        grads[count : count + len(self._loose_leaves)] = [None] * len(self._loose_leaves)
        f(self, grads)

    return wrong


def _wrong_gradient(f, place):
    def backward(ctx, *grads):
        result = list(f.__func__(ctx, *grads))
        result[place] = result[place] * 1.01
        return tuple(result)

    return staticmethod(backward)


def _export(patch, owner, name, change):
    rule = getattr(owner, name)
    if change is None:

        def wrong(self, target, m, *args):
            return rule(self, target, nn.ReLU() if isinstance(m, nn.ReLU6) else m, *args)

        patch.setattr(owner, name, wrong)
        patch.setattr(nn.ReLU, "forward", lambda self, x: x * 0.99)
    else:
        patch.setattr(owner, name, lambda self, *args: change(rule(self, *args)))


def _export_rows(patch):
    from spafl_kernels.compact.kinds import layers

    rows = layers.take_rows_of
    patch.setattr(layers, "take_rows_of", lambda full, channels: rows(full, channels).flip(0))


def built(make):
    torch.manual_seed(0)
    model, shape = make()
    model = warm_norms(prune(model.double(), 0.5))
    x = torch.randn(4, *shape, dtype=torch.float64)
    return model, x


def changes_a_number(model, x, engine):
    """Whether the engine, unchecked, is not the masked model."""
    try:
        return _differs(model, x, engine)
    except Exception:
        return True


def _differs(model, x, engine):
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    y = torch.arange(4) % 5
    values = []
    if engine == "trainer":
        for t in (MaskedTrainer(twin), CompactTrainer(other, strict=True, verify="never")):
            t.begin(SGDOptions(lr=0.1, momentum=0.9, weight_decay=0.01, penalty=0.05))
            torch.manual_seed(1)
            values.append([t.step(x, y), t.evaluate(x, y)[0]])
            t.finish()
            values[-1] += t.model.state_dict().values()
    elif engine == "module":
        for m in (twin, CompactModule(other, strict=True, verify="never")):
            torch.manual_seed(1)
            out = m(x)
            out.square().sum().backward()
            values.append([out, *(p.grad for p in m.parameters()), *m.state_dict().values()])
            with torch.no_grad():
                m.eval()
                values[-1].append(m(x))
    else:
        from spafl_kernels.compact.export import _exported

        for m in (twin.eval(), _exported(other.eval(), tuple(x.shape[1:]))):
            torch.manual_seed(1)
            values.append([m(x)])
    return any(
        (a is None) != (b is None) or (a is not None and (a - b).abs().max() > 1e-9 * max(1, float(a.abs().max())))
        for a, b in zip(*values, strict=True)
    )


def is_caught(model, x, engine):
    """Whether the engine finds out by itself and says so."""
    y = torch.arange(4) % 5
    if engine == "export":
        with pytest.raises(Unsupported):
            export(model.eval(), tuple(x.shape[1:]))
        return True
    if engine == "trainer":
        trainer = CompactTrainer(model)
        trainer.begin(SGDOptions(lr=0.1))
        trainer.step(x, y)
        return trainer.engine == "masked" and trainer.reason
    compact = CompactModule(model)
    compact(x)
    first = compact.engine
    with torch.no_grad():
        compact.eval()(x)
    return "masked" in (first, compact.engine) and compact.reason


# Of faults that show in both, the trainer's and the module's in turn.
CASES = [
    (name, engine)
    for i, (name, (_, _, engines)) in enumerate(FAULTS.items())
    for engine in engines
    if engine == "export" or len(engines) == 1 or engine == both[i % 2]
]


@pytest.mark.parametrize("name, engine", CASES)
def test_a_fault_that_changes_a_number_is_found(name, engine, monkeypatch):
    put, make, _ = FAULTS[name]
    model, x = built(make)
    put(monkeypatch)
    assert changes_a_number(model, x, engine), "the fault changes nothing"
    model, x = built(make)
    assert is_caught(model, x, engine)


def test_there_are_enough_faults():
    assert len(FAULTS) >= 40 and len(CASES) >= 50


def test_the_reason_names_the_operation(monkeypatch):
    after(Pool, lambda x, c: (x + 1e-3, c))(monkeypatch)
    model, x = built(padded("window"))
    compact = CompactModule(model)
    assert torch.equal(compact(x), model(x).detach()) or compact.engine == "masked"
    assert "the output differs by" in compact.reason and "first at net_7 (pool)" in compact.reason
    with pytest.raises(Unsupported, match="first at net_7"):
        CompactModule(model, strict=True)(x)
    trainer = CompactTrainer(model)
    trainer.begin(SGDOptions(lr=0.1))
    trainer.step(x, torch.arange(4))
    assert "first at net_7 (pool)" in trainer.reason


def test_when_it_is_checked(monkeypatch):
    counts = []
    for owner, name in (
        (module, "differs"),
        (__import__("spafl_kernels.compact.trainer", fromlist=["x"]), "differs_in_training"),
    ):
        check = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, check=check, **k: counts.append(1) or check(*a, **k))
    model, x = built(lambda: (Thin(), (1, 12, 12)))
    y = torch.arange(4)
    for when, trainings, calls, plans in (("first", 1, 3, 0), ("always", 3, 3, 1), ("never", 0, 0, 0)):
        counts.clear()
        trainer = CompactTrainer(copy.deepcopy(model), strict=True, verify=when)
        for _ in range(3):
            trainer.begin(SGDOptions(lr=1e-6))
            for _ in range(2):
                trainer.step(x, y)
            trainer.evaluate(x, y)
            trainer.finish()
        assert len(counts) == trainings
        counts.clear()
        compact = CompactModule(copy.deepcopy(model), strict=True, verify=when)
        for _ in range(2):
            compact(x)
            compact.eval()(x)
            with torch.no_grad():
                compact(x)
            compact.train()
        assert len(counts) == calls
        next(iter(threshold_layers(compact.model)))[1].threshold.data.mul_(1.5)
        compact(x)
        assert len(counts) == calls + plans
    for bad in (CompactTrainer, CompactModule):
        with pytest.raises(ValueError, match="verify must be one of first, always, never; got 'often'"):
            bad(model, verify="often")


def test_the_check_leaves_no_trace():
    model, x = built(padded("identity"))
    before, state_ = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trainer = CompactTrainer(model, strict=True)
    kind = Batch(ONE, (Input(tuple(x.shape[1:]), x.dtype),))
    flow = trainer._captures.of(kind, [x]).flow
    assert verify.differs_in_training(flow, [x], 8, True, 0.5) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state_, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


class Single(nn.Module):
    """Computes with fewer digits than it is given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = ThresholdLinear(6, 8), ThresholdLinear(8, 5)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).float().double())


def test_a_model_that_rounds_is_compared_as_closely_as_it_computes():
    model, x = built(lambda: (Single(), (6,)))
    assert CompactModule(model, strict=True)(x).dtype == torch.float64


def test_watching_costs_little():
    """A bound that a slow machine keeps: the benchmark measures the share of a step."""
    watch = trace.check_traceable(LeNet5()).watch
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            assert watch.changed() is None and watch.hooked() is None
        best = min(best, (time.perf_counter() - start) / 50)
    assert best < 100e-6
