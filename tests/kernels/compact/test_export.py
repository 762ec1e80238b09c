"""Exported models: equal in eval, small, free of this package, and the same in ONNX Runtime."""

import io
import pickle
import subprocess
import sys

import pytest
import torch
from graphs import GRAPHS
from helpers import prune
from test_module import MODELS
from test_trainer import Branch, warm_norms
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d, convert, threshold_layers
from spafl_kernels.compact import export
from spafl_kernels.training import Unsupported

ALL = {name: (lambda g=g: convert(g()), (3, 8, 8)) for name, g in GRAPHS.items()} | MODELS


def pruned(name, density, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = ALL[name]
    return prune(warm_norms(build().to(dtype)), density).eval(), shape


@pytest.mark.sweep
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("density", [0.0, 0.3, 0.7, 1.0])
def test_equal_in_eval(name, density):
    model, shape = pruned(name, density)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = export(model, shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(type(m).__module__.startswith("spafl") for m in small.modules())
    if density < 1:
        count = sum(p.numel() for p in small.parameters())
        assert count < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_channels_with_constants_of_which_none_is_dropped(kind):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 6, 3), kind(3, 4, 3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x))[:, :3])

    model = convert(Half().double()).eval()
    with torch.no_grad():
        model.first.threshold[3:] = 10
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(export(model, (3, 8, 8))(x), model(x), rtol=1e-9, atol=1e-10)


def test_sizes_are_those_of_the_active_filters():
    model, shape = pruned("conv4", 0.25)
    small = export(model, shape)
    active = {name: int(layer.mask().sum()) for name, layer in threshold_layers(model)}
    assert small.conv2.weight.shape == (active["conv2"], active["conv1"], 5, 5)
    assert small.dense1.weight.shape == (active["dense1"], active["conv4"] * 4)
    # Seven layers with biases into which every norm is folded.
    assert len(list(small.parameters())) == 14
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in small.modules())


@pytest.mark.parametrize("width, gathers", [(16, 0), (2048, 1)])
def test_rows_are_expanded_only_where_that_is_cheaper_than_computing_zeros(width, gathers):
    """A linear layer in front of a residual sum: its result is needed at full width."""

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(width, 8)
            self.stream = torch.nn.Linear(width, 8)

        def forward(self, x):
            return self.inner(x) + torch.softmax(self.stream(x), -1)

    model = convert(Residual(), where=lambda name, module: name == "inner").double()
    model = prune(model, 0.5).eval()
    small = export(model, (3, width))
    assert sum(node.target is torch.index_select for node in small.graph.nodes) == gathers
    x = torch.randn(2, 3, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-10)


def test_loads_without_this_package(tmp_path):
    model, shape = pruned("padded", 0.5, torch.float32)
    small = export(model, shape)
    x = torch.randn(2, *shape)
    torch.save((small, x, small(x)), tmp_path / "small.pt")
    code = (
        "import sys, torch; sys.modules['spafl_kernels'] = sys.modules['spafl'] = None\n"
        f"small, x, y = torch.load({str(tmp_path / 'small.pt')!r}, weights_only=False)\n"
        "assert torch.equal(small(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["lenet", "conv4", "resnet", "padded", "mobilenet", "densenet"])
def test_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, shape = pruned(name, 0.4, torch.float32)
    small = export(model, shape)
    x = torch.randn(3, *shape)
    file = io.BytesIO()
    torch.onnx.export(
        small, (x[:1],), file, input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        dynamo=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(Unsupported, match="cannot be traced"):
        export(Branch(), (4,))


@pytest.mark.parametrize("middle", [torch.nn.PReLU(), torch.nn.Softmax2d()], ids=["followed", "expanded"])
def test_onnx_of_an_adaptive_pool(middle):
    """Named inputs alone, and a size that the exporter must know behind channels at full width."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), middle, torch.nn.AdaptiveAvgPool2d((3, 2))]
    model = prune(convert(torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(48, 5))), 0.5).eval()
    x, file = torch.randn(3, 3, 8, 8), io.BytesIO()
    torch.onnx.export(
        export(model, (3, 8, 8)), (x[:1],), file, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False
    )
    (y,) = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


class OfSizes(nn.Module):
    """Constants of pruned channels (a kept bias) meet a middle part whose result may depend on the size of images."""

    def __init__(self, middle):
        super().__init__()
        self.a, self.b = ThresholdConv2d(3, 8, 3, stride=2, padding=1), ThresholdConv2d(8, 5, 3, padding=1)
        self.c, self.middle = ThresholdConv2d(8, 5, 1), middle

    def forward(self, x):
        return self.middle(self, torch.sigmoid(self.a(x)))


def _padded_conv(m, y):
    return m.b(y).mean((2, 3))


def _mean_of_padded(m, y):
    return m.c(F.pad(y, (1, 1, 1, 1)).mean((2, 3), keepdim=True))


def _tokens(m, y):
    n, c, _, _ = y.shape
    return F.linear(y.view(n, c, -1).transpose(1, 2), m.c.weight[:, :, 0, 0]).mean(1)


def _there_and_back(m, y):
    return m.c(torch.sigmoid(m.c(y)).new_ones(1) * y.flatten(2).unflatten(2, y.shape[2:])).amax((2, 3))


def _written(m, y):
    out = y.clone()
    out[:, ::3] = 0.5
    return m.c(out * y.mean((2, 3), keepdim=True)).mean((2, 3))


@pytest.mark.parametrize("middle", [_padded_conv, _mean_of_padded, _tokens, _there_and_back, _written])
@pytest.mark.parametrize("size", [2, 8])
def test_other_sizes_are_right_or_refused(middle, size):
    torch.manual_seed(0)
    model = prune(OfSizes(middle).double(), 0.5).eval()
    small, refused = export(model, (3, size, size)), []
    for other in (1, 2, 4, 8, 12):
        x = torch.randn(3, 3, other, other, dtype=torch.float64)
        try:
            ours = small(x)
        except (AssertionError, RuntimeError):
            refused.append(other)
            continue
        torch.testing.assert_close(ours, model(x), rtol=1e-9, atol=1e-11)
    assert size not in refused and (not refused or middle in (_padded_conv, _mean_of_padded, _there_and_back))


def test_what_writes_at_an_index_loads_without_this_package():
    model = prune(OfSizes(_written).double(), 0.5).eval()
    small, x = export(model, (3, 8, 8)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), model(x), rtol=1e-9, atol=1e-11)
    assert "spafl_kernels" not in small.code
