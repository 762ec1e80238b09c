"""Steps under a fixed plan, as the GPU benchmark captures them: on the CPU, and on a pretended device that tells."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from helpers import prune
from pretended import Accelerator, back, moved
from torch.nn import functional as F

from benchmarks.gpu import captured, steps
from benchmarks.gpu.captured import CapturedCohort, CapturedCompact
from benchmarks.gpu.cohort import Loop
from spafl.models import Conv4, LeNet5, ResNet18
from spafl_kernels import threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.training import MaskedTrainer, SGDOptions

EVERYTHING = SGDOptions(0.01, 0.9, weight_decay=1e-3, max_grad_norm=0.5, penalty=1e-3, collapse_floor=0.01)
IMAGE = {LeNet5: (1, 28, 28), Conv4: (3, 32, 32), ResNet18: (3, 32, 32)}
CASES = [
    (LeNet5, "identity", steps.SETTINGS["lenet5"].options),
    (Conv4, "window", steps.SETTINGS["conv4"].options),
    (ResNet18, "window", steps.SETTINGS["resnet18-full"].options),
    (ResNet18, "identity", EVERYTHING),
]


def case(kind, estimator, density, batch=2, count=3):
    torch.manual_seed(0)
    model = kind(10, IMAGE[kind][0], *(8,) * (kind is ResNet18)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bn" in name and name.endswith("bias"):
                p.uniform_(-0.3, 0.3)
    model = steps.pruned(model, density, 0, estimator).to(memory_format=torch.channels_last)
    data = [(torch.randn(batch, *IMAGE[kind], dtype=torch.float64), torch.randint(10, (batch,))) for _ in range(count)]
    return model, data


def momenta(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {n: 1e-3 * torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}


def same(got, want, what):
    for (name, a), b in zip(got.items(), want.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{what}, {n}: {text}")


def state(model):
    return {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.sweep
@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("kind, estimator, options", CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_while_no_mask_changes_it_is_the_trainer(kind, estimator, options, density):
    model, data = case(kind, estimator, density)
    twins = [model, copy.deepcopy(model), copy.deepcopy(model)]
    start = [momenta(model) for _ in twins]
    masked, compact = MaskedTrainer(twins[0]), CompactTrainer(twins[1], strict=True)
    for trainer, buffers in ((masked, start[0]), (compact, start[1])):
        trainer.begin(options, buffers)
    fixed = CapturedCompact(twins[2], options, IMAGE[kind], momentum=start[2])
    for x, y in data:
        want = masked.step(x, y)
        torch.testing.assert_close(compact.step(x, y), want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(fixed.step(x, y), want, rtol=1e-9, atol=1e-11)
    masked.finish(), fixed.finish()
    assert compact.finish().rebuilds == 0
    for twin, buffers, name in ((twins[1], start[1], "compact"), (twins[2], start[2], "captured")):
        same(state(twin), state(model), name)
        same(buffers, start[0], f"{name}, momentum")


@pytest.mark.parametrize(
    "kind, estimator, options",
    [c if c[0] is not ResNet18 else pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:]],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_step_asks_nothing_and_moves_no_tensor(kind, estimator, options):
    """Two warm-up steps as a capture wants them; then nothing may wait, and every tensor that stays has its address."""
    model, data = case(kind, estimator, 0.5, count=3)
    # One layer is reset in every step, and stays collapsed as its weights are 0.
    name, layer = list(threshold_layers(model))[2]
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.ones_(layer.threshold)
    start = {n: v * (n != f"{name}.weight") for n, v in momenta(model).items()}
    plain = copy.deepcopy(model)
    fixed = CapturedCompact(plain, options, IMAGE[kind], momentum=copy.deepcopy(start))
    with Accelerator() as device:
        there = moved(model)
        start = {n: moved(v) for n, v in start.items()}
        runner = CapturedCompact(there, options, IMAGE[kind], momentum=start)
        assert runner.session._collapsed and runner.session._dropped.moving
        for i, (x, y) in enumerate(data):
            px, py = moved(x), moved(y)
            if i == 2:
                device.forget()
                before = addresses(runner)
            loss = runner.step(px, py)
            torch.testing.assert_close(loss.held, fixed.step(x, y), rtol=1e-9, atol=1e-11)
        assert sum(device.ran.values()) > 100 and not device.asked
        # The gradient of a look-up by index sorts on a GPU.
        assert torch.ops.aten.index_put not in device.ran
        assert addresses(runner) == before and len(before) > 20
        runner.finish()
    fixed.finish()
    same(back(there), state(plain), "pretended")


def addresses(runner):
    """Of everything that a recorded step reads or writes and that outlives it."""
    session = runner.session
    arena = session._arena
    slots = [part.slot for part in session._parts]
    tensors = [
        arena.flat, arena.velocity, arena.grad, session._scores, session._tau, session._keep, session._active,
        session._needed, runner.changed, runner.steps, *session.leaves, *session._loose.params, *session._loose.momenta,
        *(v for slot in slots for v in vars(slot).values() if isinstance(v, torch.Tensor)),
    ]  # fmt: skip
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("kind, estimator, options", CASES[:3], ids=lambda v: getattr(v, "__name__", ""))
def test_products_have_whole_blocks_of_channels_and_images_their_order(kind, estimator, options):
    model, data = case(kind, estimator, 0.4, count=1)
    runner = CapturedCompact(model, options, IMAGE[kind])
    shapes = {
        n: tuple(slot.weight.shape[:2]) for n, slot in ((la.name, la.slot) for la in runner.session._layers.values())
    }
    assert len(shapes) == len(list(threshold_layers(model))) + (kind is ResNet18)
    for name, (rows, columns) in shapes.items():
        full = model.get_submodule(name).weight.shape
        assert rows % 8 == 0 or rows == full[0], (name, rows)
        assert columns % 8 == 0 or columns == full[1], (name, columns)
        assert rows < full[0] or full[0] <= 16 or name == "linear", (name, rows)
    orders = set()
    stock = F.conv2d

    def conv2d(x, weight, *rest):
        orders.add((is_last(x), is_last(weight), is_last(y := stock(x, weight, *rest))))
        return y

    with mock.patch.object(F, "conv2d", conv2d):
        runner.step(*data[0])
    assert orders == {(True, True, True)}


def is_last(x):
    """Whether nothing has to be moved to have the channels of these images, or the inputs of these filters, last."""
    return x.is_contiguous(memory_format=torch.channels_last)


def test_what_a_step_asks_is_seen():
    model, data = case(LeNet5, "identity", 0.5, count=1)
    with Accelerator() as device:
        runner = CapturedCompact(moved(model), EVERYTHING, IMAGE[LeNet5])
        runner.loss = lambda out, y: F.cross_entropy(out, y) * float(out.detach().max())
        device.forget()
        runner.step(*map(moved, data[0]))
        assert device.asked == {"aten._local_scalar_dense.default": 1}
        with pytest.raises(AssertionError, match="two devices"):
            runner.step(moved(data[0][0]), data[0][1])


# ------------------------------------------------------------------------------------------------ the flag
@pytest.mark.sweep
@pytest.mark.parametrize("estimator", ["identity", "window"])
@pytest.mark.parametrize("seed", range(3))
def test_the_flag_is_up_once_the_trainer_has_other_masks(estimator, seed):
    """Narrow margins, masks that flip both ways, rows that are kept for a positive beta."""
    model, data = case(ResNet18, estimator, 1.0, count=12)
    prune(model, 0.5, seed, spread=0.01)
    options = SGDOptions(0.02, 0.9, penalty=2e-3)
    twin = copy.deepcopy(model)
    trainer = CompactTrainer(twin, strict=True, patience=0)
    trainer.begin(options)
    runner = CapturedCompact(model, options, IMAGE[ResNet18])
    first = runner.session._active
    flags, changes = [], []
    for x, y in data:
        want, got = trainer.step(x, y), runner.step(x, y)
        flags.append(bool(runner.changed))
        changes.append(trainer._session.rebuilds > 0 or not torch.equal(trainer._session._active, first))
        if not flags[-1]:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        elif not flags[-2]:
            break
    assert flags == changes and flags[-1] and not flags[0]
    with pytest.raises(RuntimeError, match="may have changed"):
        runner.finish()


def test_the_flag_knows_of_rows_that_nobody_computes():
    """Momentum alone brings a pruned row back: ``k`` steps move it by ``.1 * (.9 + .81 + ...) = .9 * (1 - .9^k)``."""
    model, _ = case(LeNet5, "identity", 0.5, count=0)
    with torch.no_grad():
        layer = model.fc3
        row = int((layer.mask() == 0).nonzero()[0])
        layer.threshold[row] = layer.scores()[row] * 1.05
        start = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        start["fc3.weight"][row] = -0.1 * layer.weight[row]
    runner = CapturedCompact(model, SGDOptions(0.1, 0.9), IMAGE[LeNet5], momentum=start)

    def drifts(clock, most=100):
        return bool(runner.session.drift(torch.tensor(clock), most))

    assert [drifts(k) for k in (0, 7, 8, 100)] == [False, False, True, True]
    # Beyond what the table of powers was made for nobody knows.
    assert not drifts(5, most=5) and drifts(6, most=5)


# ------------------------------------------------------------------------------------------------ a cohort
def test_a_captured_cohort_trains_as_its_clients_one_by_one():
    models = [steps.pruned_model("lenet5", d, i, "cpu", torch.float64) for i, d in enumerate((1.0, 0.5, 0.25))]
    x, y = steps.batches("lenet5", 3, 2, "cpu", torch.float64)
    options = steps.SETTINGS["lenet5"].options
    loop, cohort = Loop(models, options), CapturedCohort(models, options, IMAGE[LeNet5])
    for _ in range(3):
        torch.testing.assert_close(cohort.step(x, y), loop.step(x, y), rtol=1e-10, atol=1e-10)
    cohort.finish()
    for got, want in zip(cohort.models, loop.models, strict=True):
        same(state(got), state(want), "cohort")


def test_branches_begin_after_what_is_there_and_end_before_what_follows(monkeypatch):
    models = [steps.pruned_model("lenet5", 0.5, i, "cpu", torch.float64) for i in range(3)]
    x, y = steps.batches("lenet5", 3, 2, "cpu", torch.float64)
    options = steps.SETTINGS["lenet5"].options
    cohort, plain = (CapturedCohort(copy.deepcopy(models), options, IMAGE[LeNet5]) for _ in range(2))
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append((self.name, "waits for", other.name))

    @contextlib.contextmanager
    def on(stream):
        said.append((stream.name, "works"))
        yield

    monkeypatch.setattr(captured.torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(captured.torch.cuda, "stream", on)
    cohort._streams = [Stream("a"), Stream("b")]
    torch.testing.assert_close(cohort.step(x, y), plain.step(x, y), rtol=0, atol=0)
    assert said == [
        ("a", "waits for", "main"), ("b", "waits for", "main"), ("a", "works"), ("b", "works"), ("a", "works"),
        ("main", "waits for", "a"), ("main", "waits for", "b"),
    ]  # fmt: skip


def test_products_in_bfloat16():
    model, data = case(Conv4, "window", 0.5, batch=8, count=1)
    model.float()
    x, y = data[0][0].float(), data[0][1]
    full = CapturedCompact(copy.deepcopy(model), EVERYTHING, IMAGE[Conv4])
    half = CapturedCompact(model, EVERYTHING, IMAGE[Conv4], autocast=torch.bfloat16)
    a, b = full.step(x, y), half.step(x, y)
    assert 0 < abs(a - b) < 0.05 * a
    half.finish()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
