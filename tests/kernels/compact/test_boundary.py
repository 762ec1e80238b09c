"""What a captured model is assumed to be: reading it changes nothing, and what changes afterwards is noticed."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from helpers import prune
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d, ThresholdLinear, convert, threshold_layers, to_dense
from spafl_kernels.compact import CompactModule, CompactTrainer, audit, export, trace_flow
from spafl_kernels.compact.run.fusion import prefers_channels_last
from spafl_kernels.engines import make_trainer
from spafl_kernels.training import MaskedTrainer, SGDOptions, Unsupported

OPTIONS = SGDOptions(lr=0.1, momentum=0.9, weight_decay=0.01, penalty=0.05, collapse_floor=0.01)


def net(**kwargs):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5)]
    return prune(convert(nn.Sequential(*layers), **kwargs).double(), 0.5)


def data(count=3, shape=(6,), batch=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(batch, *shape, generator=generator, dtype=torch.float64), torch.arange(batch) % 5)
        for _ in range(count)
    ]


def together(
    model, change=None, options=OPTIONS, batches=None, kinds=("step", "evaluate"), strict=False, verify="never"
):
    """Trains twins, with ``change`` made to both after the first batch; returns the compact trainer."""
    twin = copy.deepcopy(model)
    masked, compact = MaskedTrainer(twin), make_trainer(model, strict=strict, verify=verify)
    for round in range(2):
        for t in (masked, compact):
            t.begin(options)
        for k, (x, y) in enumerate(batches or data()):
            if k == 1 and not round and change is not None:
                change(twin), change(model)
            for kind in kinds:
                values = []
                for t in (masked, compact):
                    torch.manual_seed(k)
                    values.append(getattr(t, kind)(x, y))
                torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9, equal_nan=True)
        a, b = masked.finish(), compact.finish()
        assert a.densities == b.densities and a.steps == b.steps
        assert a.momentum.keys() == b.momentum.keys()
        for name, v in a.momentum.items():
            torch.testing.assert_close(b.momentum[name], v, rtol=1e-9, atol=1e-9)
        same_state(twin, model)
    return compact


def same_state(twin, model):
    for (key, p), q in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def same_calls(model, x=None, change=None, **kwargs):
    """CompactModule against the model, in both modes, with and without gradients; returns the module."""
    x = data(1)[0][0] if x is None else x
    twin = copy.deepcopy(model)
    compact = CompactModule(model, **{"verify": "never", **kwargs})
    for again in range(2):
        for training in (True, False):
            twin.train(training), compact.train(training)
            for gradients in (True, False):
                results = []
                for m in (twin, compact):
                    m.zero_grad()
                    torch.manual_seed(3)
                    with torch.set_grad_enabled(gradients):
                        out = m(x)
                        if gradients:
                            out.square().sum().backward()
                    results.append(out.detach())
                torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
                for (key, p), q in zip(twin.named_parameters(), model.named_parameters(), strict=True):
                    a, b = (t.grad if t.grad is not None else torch.zeros_like(t) for t in (p, q[1]))
                    torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")
                same_state(twin, model)
        if change is not None and not again:
            change(twin), change(model)
    return compact


# -- reading changes nothing -------------------------------------------------------------------------------------------


class Assigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.register_buffer("mean", torch.zeros(6))
        self.calls, self.log, self.last = 0, [], None

    def forward(self, x):
        return self.act(x)


class AssignsBuffer(Assigns):
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.fc(x - self.mean)


class CountsInBuffer(Assigns):
    def forward(self, x):
        self.mean += 1
        return self.fc(x)


class CopiesIntoBuffer(Assigns):
    def forward(self, x):
        self.mean.copy_(x.mean(0).detach())
        return self.fc(x - self.mean)


class Counts(Assigns):
    def forward(self, x):
        self.calls += 1
        return self.fc(x)


class Logs(Assigns):
    def forward(self, x):
        self.log.append(self.calls)
        return self.fc(x)


class KeepsActivations(Assigns):
    def forward(self, x):
        self.last = self.fc(x)
        return self.last


class DrawsNumbers(Assigns):
    def forward(self, x):
        return self.fc(x + torch.rand(6))


class DrawsPython(Assigns):
    def forward(self, x):
        return self.fc(x * random.random())


class DrawsFromItsOwn(Assigns):
    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        return self.fc(x * (next(self.source) if hasattr(self.source, "__next__") else self.source.random()))


class Fails(Assigns):
    def forward(self, x):
        self.mean += 1
        self.calls += 1
        torch.rand(1)
        return self.fc(x) if x.sum() > 0 else x


WRITERS = [
    AssignsBuffer, CountsInBuffer, CopiesIntoBuffer, Counts, Logs, KeepsActivations, DrawsNumbers, DrawsPython, Fails,
]  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_forward_that_writes_or_draws_runs_masked_and_is_left_alone(kind):
    model = convert(kind()).double()
    before = copy.deepcopy(model)
    hidden = {name: (id(m._buffers.get("mean")), m.training) for name, m in model.named_modules()}
    state, numbers = torch.get_rng_state(), random.getstate()
    for attempt in (
        lambda: make_trainer(model, strict=True),
        lambda: trace_flow(model, (6,)),
        lambda: export(model, (6,)),
    ):
        with pytest.raises(Unsupported):
            attempt()
    module = CompactModule(model)
    assert module.engine == "masked"
    assert torch.equal(state, torch.get_rng_state()) and numbers == random.getstate()
    assert hidden == {name: (id(m._buffers.get("mean")), m.training) for name, m in model.named_modules()}
    assert (model.calls, model.log, model.last) == (0, [], None)
    same_state(before, model)
    trainer = make_trainer(model)
    assert trainer.engine == "masked"
    if kind is DrawsPython:
        return
    for x, _ in data():
        torch.manual_seed(5)
        a = before(x)
        torch.manual_seed(5)
        assert torch.equal(module(x), a)
    same_state(before, model)


@pytest.mark.parametrize("kind", ["python", "numpy", "iterator"])
def test_a_generator_of_the_models_own_is_not_frozen(kind):
    source = {"python": random.Random(0), "numpy": np.random.default_rng(0), "iterator": itertools.count(1.0)}[kind]
    model = convert(DrawsFromItsOwn(source)).double()
    twin, module = copy.deepcopy(model), CompactModule(model)
    for x, _ in data():
        assert torch.equal(module(x), twin(x))
    assert module.reason == "forward writes to 'source'"


def test_reading_draws_no_numbers_and_leaves_statistics_alone():
    model = net()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    trace_flow(model, (6,))
    export(model, (6,))
    module = CompactModule(model)
    assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in model.modules())
    same_state(before, model)
    x = data(1)[0][0]
    module(x)  # with the check
    assert int(model[1].num_batches_tracked) == 1


# -- what has changed is noticed ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Reads numbers, tuples, lists and a configuration from everywhere."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.scale, self.dims, self.scales, self.mode = 0.5, (1,), [1.0, 2.0], "relu"
        self.options = {"slope": 0.1, "deep": [1.0]}
        self.config = type("Config", (), {})()
        self.config.shift, self.unread = 0.25, 0
        self.table = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
        self.register_buffer("weights", torch.linspace(1, 2, 8, dtype=torch.float64))
        self.act = nn.GELU()

    def forward(self, x):
        y = self.a(x) * self.scale + self.config.shift
        y = F.leaky_relu(y, self.options["slope"]) * self.scales[0] + self.options["deep"][0]
        y = F.relu(y) if self.mode == "relu" else torch.tanh(y)
        return self.b(self.act(y) * self.table * self.weights * self.factor * GLOBAL["gain"])


GLOBAL = {"gain": 1.0}


def _set(path, value):
    def change(m):
        *parents, name = path.split(".")
        for parent in parents:
            m = getattr(m, parent)
        setattr(m, name, value)

    return change


CHANGES = {
    "number": _set("scale", -0.7),
    "text": _set("mode", "tanh"),
    "list": lambda m: m.scales.__setitem__(0, 3.0),
    "list replaced": _set("scales", [-2.0]),
    "dictionary": lambda m: m.options.update(slope=0.9),
    "deeper": lambda m: m.options["deep"].__setitem__(0, 0.3),
    "configuration": _set("config.shift", -0.4),
    "class attribute shadowed": _set("factor", 2.5),
    "table": lambda m: m.table.mul_(-1),
    "table replaced": lambda m: setattr(m, "table", m.table * 3),
    "buffer": lambda m: m.weights.mul_(0.3),
    "buffer replaced": lambda m: setattr(m, "weights", m.weights * 3),
    "activation": _set("act", nn.Tanh()),
    "activation's setting": _set("act.approximate", "tanh"),
    "mask_bias": _set("a.mask_bias", True),
    "estimator": _set("a.estimator", "window"),
    "hook": lambda m: m.a.register_forward_hook(lambda module, inputs, out: out * 2) and None,
    "hook before": lambda m: m.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,)) and None,
    "hook on gradients": lambda m: m.b.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)) and None,
    "frozen": _set("a.weight.requires_grad", False),
    "threshold frozen": _set("a.threshold.requires_grad", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_calls(name):
    torch.manual_seed(0)
    model = prune(convert(Scaled()).double(), 0.5)
    same_calls(model, change=CHANGES[name])


@pytest.mark.parametrize("name", [n for n in CHANGES if "frozen" not in n])
def test_what_changes_in_the_middle_of_a_training(name):
    torch.manual_seed(0)
    model = prune(convert(Scaled()).double(), 0.5)
    together(model, CHANGES[name])


def test_a_global_and_a_class_attribute(monkeypatch):
    torch.manual_seed(0)
    model = prune(convert(Scaled()).double(), 0.5)
    same_calls(model, change=lambda m: monkeypatch.setitem(GLOBAL, "gain", -2.0))
    same_calls(model, change=lambda m: monkeypatch.setattr(Scaled, "factor", 0.5))


def test_an_attribute_that_nobody_reads_costs_no_new_capture():
    model = prune(convert(Scaled()).double(), 0.5)
    module = CompactModule(model, strict=True)
    x = data(1)[0][0]
    module(x)
    ((_, captured),) = module._captures
    model.unread, model.other = 7, "new"
    module(x)
    assert [known for _, known in module._captures] == [captured]


SETTINGS = {
    "dropout": lambda m: setattr(m[3], "p", 0.1),
    "dropout off": lambda m: setattr(m[3], "p", 0.0),
    "momentum": lambda m: setattr(m[1], "momentum", 1.0),
    "eps": lambda m: setattr(m[1], "eps", 1.0),
    "no affine part": lambda m: setattr(m[1], "bias", None),
    "statistics off": lambda m: setattr(m[1], "track_running_stats", False),
    "norm frozen": lambda m: m[1].eval() and None,
    "dropout frozen": lambda m: m[3].eval() and None,
    "activation": lambda m: m.__setitem__(2, nn.Tanh()),
    "layer inserted": lambda m: m.insert(3, nn.Sigmoid()) and None,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_modules(name):
    same_calls(net(estimator="window"), change=SETTINGS[name])
    if name not in ("no affine part", "layer inserted"):
        together(net(), SETTINGS[name], kinds=("step",))


def test_a_gradient_hook_is_called():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        model = net(estimator="window")
        mask = torch.ones(8, 6, dtype=torch.float64)
        mask[0] = 0

        def hook(m, register=register, mask=mask):
            def after(p):
                p.grad.mul_(mask)

            getattr(m[0].weight, register)((lambda g: g * mask) if register == "register_hook" else after)

        trainer = together(model, hook)
        assert trainer.engine == "masked" and "hook" in trainer.reason
        hook(model)
        with pytest.raises(Unsupported, match="hook"):
            CompactTrainer(model, strict=True)


class FrozenNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_a_norm_with_fixed_statistics_in_a_training_model(estimator):
    torch.manual_seed(0)
    model = prune(convert(FrozenNorm(), estimator=estimator).double(), 0.5)
    model.norm.running_mean.fill_(-1.0)
    images = data(shape=(2, 5, 5))
    trainer = together(copy.deepcopy(model), batches=images, strict=True)
    assert trainer.engine == "compact" and int(trainer.model.norm.num_batches_tracked) == 0
    same_calls(model, images[0][0], strict=True)


def test_gradients_in_eval_mode_and_behind_inference_mode():
    for estimator in ("identity", "window"):
        same_calls(net(estimator=estimator), strict=True)
    module = CompactModule(net(), strict=True)
    x, y = data(1)[0]
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    trainer = CompactTrainer(net(), strict=True, verify="never")
    trainer.begin(OPTIONS)
    with torch.inference_mode():
        trainer.evaluate(x, y)
    assert trainer.step(x, y).isfinite()
    with torch.inference_mode():
        assert trainer.finish().steps == 1


def test_another_dtype_later():
    module = CompactModule(net().float(), strict=True).eval()
    x = data(1)[0][0]
    assert module(x.float()).dtype == torch.float32
    module.double()
    out = module(x)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, module.model(x), rtol=1e-12, atol=1e-12)
    model = net().float()
    trainer = CompactTrainer(model, strict=True)
    x, y = data(1)[0]
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        trainer.begin(OPTIONS)
        assert trainer.step(x.to(dtype), y).dtype == dtype
        trainer.finish()


def test_an_empty_batch_and_another_image_size():
    x, y = data(1)[0]
    trainer = together(net(estimator="window"), batches=[(x[:0], y[:0]), (x, y), (x[:0], y[:0])], kinds=("evaluate",))
    torch.manual_seed(0)
    model = convert(
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    )
    model = prune(model.double(), 0.5)
    images = [*data(2, (2, 5, 5)), *data(1, (2, 8, 6)), *data(1, (2, 5, 5))]
    trainer = together(model, batches=images, strict=True)
    assert trainer.engine == "compact"
    empty = [(images[0][0][:0], images[0][1][:0]), images[0]]
    together(model, batches=empty, kinds=("step",))
    assert CompactModule(model)(images[0][0][:0]).shape == (0, 5)


def test_one_bad_input_does_not_end_it():
    module = CompactModule(net())
    x, y = data(1)[0]
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5, dtype=torch.float64))
    assert module.engine == "masked"
    module(x)
    assert module.engine == "compact"
    trainer = CompactTrainer(net())
    trainer.begin(OPTIONS)
    with pytest.raises(RuntimeError):
        trainer.step(torch.randn(4, 5, dtype=torch.float64), y)
    assert trainer.engine == "masked"
    trainer.step(x, y)
    assert trainer.engine == "compact" and trainer.finish().steps == 1
    sizes = CompactModule(nn.Sequential(ThresholdConv2d(1, 2, 1), nn.ReLU()), verify="never")
    for size in range(1, 20):
        sizes(torch.randn(1, 1, size, 2))
    assert len(sizes._captures) <= 8


# -- causes stay local -------------------------------------------------------------------------------------------------


class Local(nn.Module):
    """``part`` makes one part that cannot be followed; the rest can."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.a, self.b, self.c = ThresholdLinear(6, 8), ThresholdLinear(8, 8), ThresholdLinear(8, 8)
        self.head, self.side = ThresholdLinear(8, 5), ThresholdLinear(8, 3)
        if part == "tied":
            self.c.weight = self.b.weight
        if part == "tied thresholds":
            self.c.threshold = self.b.threshold
        if part == "frozen":
            self.b.weight.requires_grad_(False)
        if part == "frozen threshold":
            self.b.threshold.requires_grad_(False)
        if part == "all frozen but one":
            self.requires_grad_(False)
            self.head.requires_grad_(True)
        if part == "unused":
            self.extra = nn.Parameter(torch.zeros(3))
        if part == "norm twice":
            self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        if self.part == "twice":
            x = F.relu(self.b(x))
        if self.part == "norm twice":
            x = self.norm(0.5 * self.norm(x))
        if self.part == "read":
            x = x * self.b.weight.mean()
        x = F.relu(self.c(x))
        if self.part == "side computed":
            self.side(x)
        return self.head(x)


PARTS = [
    "tied",
    "tied thresholds",
    "frozen",
    "frozen threshold",
    "all frozen but one",
    "unused",
    "twice",
    "norm twice",
    "read",
]


@pytest.mark.parametrize("penalty", [0.0, 0.05])
@pytest.mark.parametrize("part", [*PARTS, "side unused", "side computed"])
def test_one_part_runs_as_it_stands(part, penalty):
    torch.manual_seed(0)
    model = prune(Local(part).double(), 0.5)
    options = SGDOptions(0.1, 0.9, 0.01, max_grad_norm=0.5, penalty=penalty, collapse_floor=0.2)
    trainer = together(copy.deepcopy(model), options=options, strict=True)
    assert trainer.engine == "compact"
    if part not in ("all frozen but one", "tied", "tied thresholds"):
        assert "head: input columns from" in trainer.explain()
    assert (
        "runs at full width" in trainer.explain()
        or "as it stands" in trainer.explain()
        or part in ("unused", "norm twice")
    )
    same_calls(model, strict=True)


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.head, self.side = kind, ThresholdLinear(6, 8), nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, inputs, mask=None, *, scale: float = 1.0):
        if mask is not None:
            inputs = inputs * mask
        x = F.relu(self.a(inputs)) * scale
        out, side = self.head(x), self.side(x)
        return {"tuple": (out, side), "dict": {"out": out, "side": [side, x]}, "one": out}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "one"])
def test_outputs_and_arguments(kind):
    torch.manual_seed(0)
    model = prune(Outputs(kind).double(), 0.5)
    x = data(1)[0][0]
    module = CompactModule(model, strict=True)
    calls = [((x,), {}), ((), {"inputs": x})]
    for args, kwargs in calls:
        out = module(*args, **kwargs)
        torch.testing.assert_close(out, model(*args, **kwargs), rtol=1e-9, atol=1e-11)
        assert type(out) is type(model(x)) and module.engine == "compact"
    for args, kwargs in [((x, x), {}), ((x,), {"mask": x}), ((x,), {"scale": 3.0}), ((), {"inputs": x, "mask": x})]:
        torch.testing.assert_close(module(*args, **kwargs), model(*args, **kwargs), rtol=1e-9, atol=1e-11)
        assert module.engine == "compact"
    if kind != "one":
        losses = [lambda out, y: F.cross_entropy(out["out"] if kind == "dict" else out[0], y)] * 2
        twin = copy.deepcopy(model)
        for t in (MaskedTrainer(twin, losses[0]), CompactTrainer(model, losses[1], strict=True)):
            t.begin(SGDOptions(lr=0.1))
            t.step(x, torch.arange(4))
            t.finish()
        same_state(twin, model)


def test_whole_numbers_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), ThresholdLinear(18, 8), nn.ReLU(), ThresholdLinear(8, 5))
    model = prune(model.double(), 0.5)
    batches = [(torch.randint(0, 11, (4, 3)), torch.arange(4)) for _ in range(3)]
    assert together(copy.deepcopy(model), batches=batches, strict=True).engine == "compact"
    assert same_calls(model, batches[0][0], strict=True).engine == "compact"


# -- writes in place, memory -------------------------------------------------------------------------------------------


class Writes(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.norm, self.relu, self.selu = nn.Identity(), nn.ReLU(True), nn.SELU(True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.a(x)
        y = getattr(self, self.how)(x)
        return self.b(x + y).mean((2, 3))

    def identity(self, x):
        return self.relu(self.norm(x))

    def clone(self, x):
        return self.selu(x.clone())

    def twice(self, x):
        return self.drop(self.selu(self.norm(self.norm(x))))

    def same_view(self, x):
        return F.relu_(x.view(x.size(0), 8, 5, 5))

    def view(self, x):
        return F.relu_(x.view(x.size(0), 8, 25)).view(x.size(0), 8, 5, 5)

    def flat(self, x):
        return F.relu(torch.flatten(x, 1), inplace=True).view(x.size(0), 8, 5, 5)

    def contiguous(self, x):
        return x.contiguous().mul_(2)

    def part(self, x):
        x[:, :4].relu_()
        return x

    def chunk(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a.tanh_(), b], 1)

    def dropped(self, x):
        return self.relu(self.drop(x))

    def transposed(self, x):
        return x.transpose(2, 3).clamp_(-0.1, 0.1)

    def added(self, x):
        y = self.norm(x)
        y += 0.5
        return F.gelu(y)

    def item(self, x):
        x[:, 0] = 1.0
        return x


@pytest.mark.parametrize("how", [k for k in vars(Writes) if not k.startswith("_") and k != "forward"])
def test_writes_to_other_names_of_the_same_memory(how):
    torch.manual_seed(0)
    model = prune(convert(Writes(how)).double(), 0.5)
    images = data(shape=(2, 5, 5))
    try:
        model(images[0][0]).sum().backward()
    except RuntimeError:  # PyTorch itself refuses the backward pass
        return
    module = same_calls(copy.deepcopy(model), images[0][0])
    if how in ("identity", "clone", "twice", "same_view", "added"):
        assert module.engine == "compact"
    together(copy.deepcopy(model), batches=images)
    model.eval()
    try:
        small = export(model, (2, 5, 5))
    except Unsupported:
        assert how not in ("identity", "clone", "twice", "same_view", "added")
    else:
        torch.testing.assert_close(small(images[0][0]), model(images[0][0]), rtol=1e-9, atol=1e-11)


def test_a_write_to_the_input_is_refused():
    model = nn.Sequential(nn.ReLU(True), ThresholdLinear(6, 5))
    with pytest.raises(Unsupported, match="forward writes to 'input'"):
        trace_flow(model, (6,))


class Strides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = ThresholdConv2d(2, 8, 3)

    def forward(self, x):
        x = self.a(x)
        return x.as_strided((4, 5), (1, 2))


def test_how_a_tensor_lies_in_memory_is_not_ours_to_say():
    with pytest.raises(Unsupported, match="lies in memory"):
        trace_flow(Strides(), (2, 5, 5))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Around(nn.Module):
    """Parts of ``forward`` whose meaning is not in a graph."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, ThresholdLinear(6, 8), ThresholdLinear(8, 5)

    def forward(self, x):
        if self.how == "no gradients":
            with torch.no_grad():
                y = self.a(x)
        elif self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.a(x).to(x.dtype)
        else:
            y = self.a(x)
        if self.how == "own backward":
            y = Reverse.apply(y)
        if self.how == "data":
            y.data = y.data * 2
        if self.how == "detach":
            y = y.detach()
        return self.b(F.relu(y))


@pytest.mark.parametrize("how", ["no gradients", "autocast", "own backward", "data", "detach"])
def test_what_a_graph_does_not_hold(how):
    torch.manual_seed(0)
    model = prune(Around(how).double(), 0.5)
    module = same_calls(copy.deepcopy(model))
    assert module.engine == "masked" or how == "detach"
    trainer = together(copy.deepcopy(model), verify="first")  # nobody sees the detached gradient but the check
    assert trainer.engine == "masked"
    if how != "detach":
        with pytest.raises(Unsupported):
            trace_flow(model, (6,))


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, inside, outside", [(2, 2, 16), (4, 8, 8), (8, 8, 8), (8, 8, 16), (2, 4, 2)])
def test_convolutions_in_groups_keep_their_places(groups, inside, outside):
    torch.manual_seed(0)
    layers = [ThresholdConv2d(inside, outside, 3, groups=groups), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, ThresholdLinear(outside, 5)).double()
    x = torch.randn(4, inside, 5, 5, dtype=torch.float64)
    for density in (0.1, 0.5, 0.9):
        prune(model, density)
        same_calls(copy.deepcopy(model), x, strict=True, multiple=1)
        torch.testing.assert_close(export(model.eval(), (inside, 5, 5))(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("place", ["pruned", "column", "plain", "late"])
def test_what_is_not_a_number_spoils_the_result(place):
    """In the masked model 0 times NaN is NaN, wherever it stands."""
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)),
                    where=lambda name, layer: name != "4", estimator="window").double()  # fmt: skip
    prune(model, 0.5)
    row = int((~model[0].mask()).nonzero()[0])

    def spoil(m):
        with torch.no_grad():
            if place in ("pruned", "late"):
                m[0].weight[row, 0] = float("nan")
            elif place == "column":
                m[2].weight[int(m[2].mask().nonzero()[0]), row] = float("nan")
            else:
                m[4].weight[0, int((~m[2].mask()).nonzero()[0])] = float("nan")

    x, y = data(1)[0]
    if place == "late":
        trainer = CompactTrainer(model, strict=True)
        trainer.begin(SGDOptions(lr=0.1))
        trainer.step(x, y)
        trainer.step(x * float("nan"), y)
        assert not trainer.step(x, y).isfinite()  # the masked model does not recover
        return
    module = CompactModule(model, strict=True)
    assert module(x).isfinite().all()
    spoil(model)
    assert not model(x).isfinite().all()
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(module(x).isnan(), model(x).isnan())
        with torch.no_grad():
            torch.testing.assert_close(module(x).isnan(), model(x).isnan())
    trainer = CompactTrainer(model, strict=True)
    trainer.begin(SGDOptions(lr=0.1))
    assert not trainer.step(x, y).isfinite()
    with pytest.raises(Unsupported, match="not finite"):
        export(model, (6,))


class Scaling(nn.Module):
    """Zeros of pruned channels meet a masked bias, the scale of a norm, a slope, a parameter and a buffer."""

    def __init__(self, estimator):
        super().__init__()
        self.a = ThresholdLinear(6, 8, mask_bias=True, estimator=estimator)
        self.norm, self.slope = nn.BatchNorm1d(8), nn.PReLU(8)
        self.b = ThresholdLinear(8, 8, bias=False, estimator=estimator)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("map", torch.ones(8))
        self.c = nn.Linear(8, 5)

    def forward(self, x):
        return self.c(F.relu(self.b(self.slope(self.norm(self.a(x))))) * self.scale * self.map)


@pytest.mark.sweep
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("name", ["a.bias", "norm.weight", "slope.weight", "scale", "map", "a.threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_multiplies_pruned_channels_spoils_the_result(name, value, estimator):
    torch.manual_seed(0)
    model = prune(Scaling(estimator).double(), 0.5)
    place = model.a if name[0] in "ans" and name != "scale" else model.b
    tensor = dict((*model.named_parameters(), *model.named_buffers()))[name].data
    module = CompactModule(model, strict=True, verify="never")
    x, y = data(1)[0]
    assert module(x).isfinite().all()
    tensor[int((~place.mask()).nonzero()[0])] = value
    twin = copy.deepcopy(model)
    for training in (True, False):
        for m in (module, twin):
            m.train(training)
        torch.testing.assert_close(module(x), twin(x), rtol=1e-9, atol=1e-9, equal_nan=True)
        with torch.no_grad():
            torch.testing.assert_close(module(x), twin(x), rtol=1e-9, atol=1e-9, equal_nan=True)
    assert name == "a.threshold" or not twin(x).isfinite().all()
    losses = []
    for m, kind in ((twin, MaskedTrainer), (model, lambda m: CompactTrainer(m, strict=True, verify="never"))):
        trainer = kind(m)
        if name == "a.threshold":
            with pytest.raises(ValueError, match="finite"):
                trainer.begin(SGDOptions(lr=0.1))
            return
        trainer.begin(SGDOptions(lr=0.1))
        losses.append(trainer.step(x, y))
    assert losses[0].isnan() and losses[1].isnan()


def test_a_module_inside_another_saves_and_loads():
    whole = nn.ModuleDict({"net": CompactModule(net()), "other": nn.Linear(2, 2)})
    plain = nn.ModuleDict({"net": net(), "other": nn.Linear(2, 2)})
    saved = {k: v.clone() for k, v in whole.state_dict().items()}
    assert saved.keys() == plain.state_dict().keys()
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(1)
    whole.load_state_dict(saved)
    assert all(torch.equal(v, saved[k]) for k, v in whole.state_dict().items())
    plain.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="Missing key"):
        whole.load_state_dict({k: v for k, v in saved.items() if k != "net.0.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        whole.load_state_dict({**saved, "net.nothing": torch.zeros(1)})
    deep = nn.Sequential(nn.Sequential(CompactModule(net())))
    deep.load_state_dict({f"0.0.{k}": v for k, v in net().state_dict().items()})


def test_explain_says_what_is_computed_though_pruned():
    x = torch.randn(4, 6)
    for estimator, text in (("identity", "8 of 8 rows are computed, 4 are active; estimator 'identity'"),
                            ("window", "4 of 8 rows are computed, 4 are active")):  # fmt: skip
        model = convert(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)), estimator=estimator)
        module = CompactModule(prune(model, 0.5))
        module(x)
        assert f"0: {text}" in module.explain()
        trainer = CompactTrainer(model)
        trainer.begin(SGDOptions(lr=0.1))
        trainer.step(x, torch.arange(4))
        assert f"0: {text}" in trainer.explain()


def test_subclasses_of_layers():
    class Doubled(ThresholdLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(6, 8), nn.ReLU(), ThresholdLinear(8, 5))
    prune(model, 0.5)
    x = torch.randn(3, 6)
    dense = to_dense(model)
    assert torch.equal(dense(x), model(x)) and type(dense[0]) is Doubled and type(dense[2]) is nn.Linear
    module = CompactModule(model)
    assert torch.equal(module(x), model(x)) and "Doubled" in module.reason
    assert len(list(threshold_layers(dense))) == 1


class AutoEncoder(nn.Module):
    """A transposed convolution in groups, whose filters do not lie side by side, between other layers."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(2, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.up, self.line = nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2), nn.Conv1d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.up(torch.relu(self.norm(self.down(x))))
        return self.head(torch.relu(self.line(torch.relu(h).flatten(2))).mean(2))


@pytest.mark.parametrize("estimator", ["identity", "window"])
def test_a_transposed_convolution_in_groups_is_followed(estimator):
    torch.manual_seed(0)
    model = convert(AutoEncoder(), estimator=estimator).double()
    assert len(list(threshold_layers(model))) == 4
    prune(model, 0.4)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    same_calls(copy.deepcopy(model), x, strict=True, multiple=1)
    twin = copy.deepcopy(model).eval()
    small = export(twin, (2, 8, 8))
    torch.testing.assert_close(small(x), twin(x), rtol=1e-9, atol=1e-11)
    assert not list(threshold_layers(small))
    assert {a.name: a.compact_macs < a.masked_macs for a in audit(twin, x, 1).layers} == dict.fromkeys(
        ("down", "up", "line", "head"), True
    )
    options, results = SGDOptions(lr=0.05, momentum=0.9, weight_decay=1e-3, penalty=0.1, collapse_floor=0.1), []
    for engine in ("masked", "compact"):
        twin = copy.deepcopy(model)
        trainer = make_trainer(twin, engine, strict=True)
        trainer.begin(options)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(4, 2, 8, 8, generator=generator, dtype=torch.float64)
            trainer.step(x, torch.arange(4))
        trainer.evaluate(x, torch.arange(4))
        results.append((trainer.finish(), twin.state_dict()))
    for edge in ("up: input columns from down", "line: input columns from up", "head: input columns from line"):
        assert edge in trainer.explain()
    (a, right), (b, ours) = results
    assert a.densities == b.densities and a.macs >= b.macs
    for name, value in right.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("frozen", [False, True])
def test_group_norm_of_what_has_no_gradient(frozen):
    """Of a channels-last image PyTorch's backward ends the process on a CPU."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 3, 1).requires_grad_(False)] if frozen else []
    body = [ThresholdConv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), ThresholdLinear(128, 5)]
    model = prune(nn.Sequential(*stem, nn.GroupNorm(1, 3), *body).double(), 0.5)
    assert not prefers_channels_last(trace_flow(model, (3, 6, 6)))
    together(model, batches=data(shape=(3, 6, 6)), strict=True)


# -- what else reads and writes the model during a training ------------------------------------------------------------


def proximal(model, start):
    def loss(out, y):
        return F.cross_entropy(out, y) + 0.1 * sum((p - q).square().sum() for p, q in zip(model.parameters(), start))

    return loss


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("given", [False, True])
def test_a_loss_that_reads_parameters_runs_masked(when, given):
    """From its first step on; the forward that showed it has drawn random numbers and moved statistics, once."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 6),
        nn.BatchNorm1d(6, momentum=None),
    ]
    model = prune(convert(nn.Sequential(*layers, nn.Linear(6, 5))).double(), 0.5)
    twin, start = copy.deepcopy(model), [p.detach() + 0.1 for p in model.parameters()]
    sides = [(MaskedTrainer(twin), twin), (CompactTrainer(model, verify="never"), model)]
    momenta = [{n: torch.ones_like(p) for n, p in m.named_parameters()} if given else None for _, m in sides]
    engines, results = [], []
    for trainer, momentum in zip((t for t, _ in sides), momenta):
        trainer.begin(OPTIONS, momentum)
    for k, (x, y) in enumerate(data(5)):
        losses = []
        for trainer, m in sides:
            trainer.loss = F.cross_entropy if k < when or k == 4 else trainer.loss if k > when else proximal(m, start)
            torch.manual_seed(k)
            losses.append(trainer.step(x, y))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
        engines.append(sides[1][0].engine)
        assert engines[-1] == "compact" or "the loss reads parameter" in sides[1][0].reason
    results = [trainer.finish() for trainer, _ in sides]
    assert engines == ["compact"] * when + ["masked"] * (4 - when) + ["compact"]
    assert results[0].densities == results[1].densities and results[0].steps == results[1].steps
    for name, v in results[0].momentum.items():
        torch.testing.assert_close(results[1].momentum[name], v, rtol=1e-9, atol=1e-9)
    same_state(twin, model)


def test_a_loss_that_reads_parameters_is_an_error_in_strict_mode_and_later_in_any():
    model = net()
    trainer = CompactTrainer(model, proximal(model, list(model.parameters())), strict=True, verify="never")
    trainer.begin(OPTIONS)
    with pytest.raises(Unsupported, match=r"the loss reads parameter '.*' of the model"):
        trainer.step(*data()[0])
    trainer.finish()
    weight = [0.0]
    trainer = CompactTrainer(
        model,
        lambda out, y: F.cross_entropy(out, y) + (weight[0] and weight[0] * model[4].weight.sum()),
        verify="never",
    )
    trainer.begin(OPTIONS)
    trainer.step(*data()[0])
    weight[0] = 0.1
    with pytest.raises(RuntimeError, match=r"the loss reads parameter '4\.weight'"):
        trainer.step(*data()[1])


@pytest.mark.parametrize("written", ["in place", "replaced"])
def test_statistics_that_somebody_else_writes_are_not_lost_without_a_word(written):
    model = net()
    trainer = CompactTrainer(model, strict=True, verify="never")
    trainer.begin(OPTIONS)
    trainer.step(*data()[0])
    if written == "in place":
        model[1].reset_running_stats()
    else:
        model[1].running_var = torch.ones(8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the statistics of norm '1' were changed by somebody else"):
        trainer.step(*data()[1])
        trainer.finish()


def images(**settings):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.AlphaDropout(0.2), nn.Conv2d(8, 5, 3)]
    model = convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), **settings).double()
    with torch.no_grad():
        model[0].bias.zero_()
    return prune(model, 0.5)


@pytest.mark.parametrize("where", ["input", "weights", "one channel"])
def test_random_numbers_are_drawn_in_the_order_of_the_models_memory(where):
    model, last = images(), torch.channels_last
    shape = (3, 6, 6)
    if where == "one channel":
        shape, model[0] = (1, 6, 6), prune(convert(nn.Conv2d(1, 8, 3, padding=1, bias=False)).double(), 0.5)
    model = model.to(memory_format=last) if where == "weights" else model
    given = [(x if where == "weights" else x.to(memory_format=last), y) for x, y in data(3, shape)]
    plain = [(x.contiguous(), y) for x, y in given]
    for batches in (given, plain + given):
        same_calls(copy.deepcopy(model), x=batches[-1][0], strict=True)
        assert together(copy.deepcopy(model), batches=batches, strict=True).engine == "compact"


class Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func is F.relu else result


def test_a_tensor_of_a_class_of_its_own_runs_masked():
    model, (x, y) = net(), data(1)[0]
    model.eval()
    module, right = CompactModule(model, verify="never"), copy.deepcopy(model)
    torch.testing.assert_close(module(x), right(x))
    ours, theirs = (m(x.as_subclass(Doubled)) for m in (module, right))
    assert type(ours) is Doubled and torch.equal(ours, theirs)
    assert module.engine == "masked" and "a Doubled, a tensor of a class of its own" in module.reason
    trainer = CompactTrainer(model)
    trainer.begin(OPTIONS)
    trainer.step(x.as_subclass(Doubled), y)
    assert trainer.engine == "masked"
    trainer.step(x, y)
    assert trainer.engine == "compact"


def test_what_measures_leaves_the_generators_alone():
    model, (x, y) = net(), data(1)[0]
    module, trainer = CompactModule(model, verify="never"), CompactTrainer(model, verify="never")
    module(x)
    trainer.begin(OPTIONS)
    trainer.step(x, y)
    state = torch.get_rng_state()
    with torch.no_grad():
        for measure in (lambda: audit(model, x, 1), lambda: module.explain(x), lambda: trainer.explain(x)):
            measure()
            assert torch.equal(state, torch.get_rng_state())


def test_a_first_batch_of_one_sample_is_verified_with_more():
    model = net()
    trainer = CompactTrainer(model, strict=True)
    trainer.begin(OPTIONS)
    (x, y), state = data(1)[0], copy.deepcopy(model[1].num_batches_tracked)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        trainer.step(x[:1], y[:1])
    trainer.step(x, y)
    trainer.finish()
    assert trainer.engine == "compact" and model[1].num_batches_tracked == state + 2


def test_what_is_frozen_and_trained_again_keeps_its_momentum():
    def freeze(on):
        return lambda m: m[4].requires_grad_(not on) and None

    model = net()
    twin, change = copy.deepcopy(model), [None, freeze(True), None, freeze(False), None]
    results = []
    for trainer in (MaskedTrainer(twin), CompactTrainer(model, strict=True, verify="never")):
        trainer.begin(OPTIONS)
        for k, ((x, y), do) in enumerate(zip(data(5), change)):
            if do is not None:
                do(trainer.model)
            torch.manual_seed(k)
            trainer.step(x, y)
        results.append(trainer.finish())
    same_state(twin, model)
    for name, v in results[0].momentum.items():
        torch.testing.assert_close(results[1].momentum[name], v, rtol=1e-9, atol=1e-9)
    model[0].requires_grad_(False)
    trainer.begin(OPTIONS)
    trainer.step(x, y)
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'0\.bias' was frozen when this training began"):
        trainer.step(x, y)


def test_exports_are_compared_as_closely_as_their_digits_allow():
    model, x = net().bfloat16().eval(), data(1)[0][0].bfloat16()
    torch.testing.assert_close(export(model, (6,))(x), model(x), rtol=0.05, atol=0.05)
