"""The choice of a backend by choices. Every table here is made up; none that ships is."""

import dataclasses
import json

import pytest
import torch

import spafl_kernels
from spafl_kernels import ThresholdConv2d, ThresholdLinear, backend, ops, reference
from spafl_kernels.gpu import choice, operators, single
from spafl_kernels.gpu.tables import FOLDER, choices, classes, file_name

CLASS = "conv1x1/1 in8 out8 positions4"
CONV = "conv3x3/2 in4 out8 positions16"


def made_up(row=None, dtype="fp32", way="eager", shape=CLASS):
    return choices.Table(
        "made-up GPU", {"commit": "abc"}, {shape: {dtype: {way: row or {0.5: "triton", 1.0: "reference"}}}}
    )


@pytest.fixture(autouse=True)
def triton_wanted(monkeypatch):
    """The kernels could run, nobody asked for a backend, and products of float32 are exact."""
    monkeypatch.setattr(choice, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "REQUESTED", "auto")
    monkeypatch.setattr(choice, "tf32", lambda conv: False)


@pytest.fixture
def calls(monkeypatch):
    """Which implementation each call of a layer took."""
    taken = []
    for name in ("threshold_linear", "threshold_conv2d"):
        stock = getattr(reference, name)
        monkeypatch.setattr(
            reference, name, lambda *a, stock=stock, **k: (taken.append("reference"), stock(*a, **k))[1]
        )
    stock_narrow = single.narrow
    monkeypatch.setattr(single, "narrow", lambda *a: (taken.append("narrow"), stock_narrow(*a))[1])
    for name in ("call_linear", "call_conv2d"):
        stock = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, stock=stock: (taken.append("triton"), stock(*a))[1])
    return taken


def run(layer, x):
    """What the layer does with a CUDA tensor, on a CPU tensor."""
    if isinstance(layer, torch.nn.Linear):
        return ops.linear(x, layer.weight, layer.threshold, layer.bias, "identity", False, layer.known_density)
    return ops.conv2d(
        x, layer.weight, layer.threshold, layer.bias, layer.stride, layer.padding, layer.dilation, 1, "identity", False,
        layer.known_density,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "out", "positions", "name"),
    [
        ((3, 3), (2, 2), 48, 130, 100, "conv3x3/2 in64 out256 positions64"),
        ((5, 3), (1, 2), 1, 1, 0, "conv5x3/1x2 in1 out1 positions1"),
        ((1, 1), (1, 1), 64, 64, 128, "conv1x1/1 in64 out64 positions128"),
    ],
)
def test_classes(kernel, stride, channels, out, positions, name):
    assert classes.shape_class(kernel, stride, channels, out, positions) == name


@pytest.mark.parametrize(
    ("density", "choice"),
    [(0.01, "triton"), (0.5, "triton"), (0.500001, "reference"), (0.7, "reference"), (1.0, "reference")],
)
def test_the_choice_holds_up_to_its_density(density, choice):
    assert made_up().look_up(CLASS, "fp32", "eager", density)[0] == choice


def test_what_was_not_measured_stays_dense_and_says_so():
    table = made_up({0.5: "triton"})
    for question in ((CONV, "fp32", "eager", 0.1), (CLASS, "bf16", "eager", 0.1), (CLASS, "fp32", "graph", 0.1)):
        choice, reason = table.look_up(*question)
        assert choice == "reference" and "is not in the table of made-up GPU" in reason
    choice, reason = table.look_up(CLASS, "fp32", "eager", 0.75)
    assert choice == "reference" and "was measured up to density 0.5" in reason


def test_a_file_comes_back_as_it_was(tmp_path, monkeypatch):
    table = made_up()
    path = tmp_path / file_name("NVIDIA H200 (80 GB)", "choices")
    assert path.name == "nvidia-h200-80-gb.choices.json"
    path.write_text(json.dumps(choices.SHELF.contents(table)))
    assert choices.SHELF.load(path) == table
    monkeypatch.setenv("SPAFL_TABLES", str(tmp_path))
    choices.SHELF.forget()
    try:
        assert choices.SHELF.for_device("NVIDIA H200 (80 GB)") == table
        assert choices.SHELF.for_device("another") is None
    finally:
        choices.SHELF.forget()


def test_a_measured_device_stands_in_for_those_that_were_not(tmp_path, monkeypatch):
    from spafl_kernels import env

    facts = {"device_count": 1, "is_available": True, "get_device_capability": (9, 0)}
    for name, value in {**facts, "get_device_name": "GPU of tomorrow"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    table = dataclasses.replace(made_up(), device=choices.INSTEAD)
    monkeypatch.setenv("SPAFL_TABLES", str(tmp_path))
    choices.SHELF.forget()
    try:
        assert choices.SHELF.for_index(0) is None
        choices.SHELF.forget()
        choices.SHELF.write(table, tmp_path)
        choice, reason = choices.SHELF.for_index(0).look_up(CLASS, "fp32", "eager", 0.5)
        assert choice == "triton"
        assert f"on {choices.INSTEAD}, which stands in for GPU of tomorrow (commit abc)" in reason
        assert choices.SHELF.best_for(choices.INSTEAD) == table
        said = env.report()["measured"]["GPU of tomorrow"]
        assert said == f"{choices.INSTEAD}, which stands in for GPU of tomorrow: commit abc, ?"
        choices.SHELF.forget()
        choices.SHELF.write(dataclasses.replace(table, device="GPU of tomorrow"), tmp_path)
        assert choices.SHELF.for_index(0).device == "GPU of tomorrow"
    finally:
        choices.SHELF.forget()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format must be 1; got 2"),
        ({"device": None}, "it needs a device and entries"),
        (
            {"entries": {CLASS: {"fp8": {"eager": {"1": "triton"}}}}},
            "dtype must be one of bf16, fp16, tf32, fp32; got 'fp8'",
        ),
        (
            {"entries": {CLASS: {"bf16": {"fast": {"1": "triton"}}}}},
            "a way to run must be one of eager, graph; got 'fast'",
        ),
        (
            {"entries": {CLASS: {"bf16": {"eager": {"1": "cudnn"}}}}},
            "a choice must be one of triton, narrow, reference; got 'cudnn'",
        ),
        (
            {"entries": {CLASS: {"bf16": {"graph": {"1": "narrow"}}}}},
            "a choice must be one of triton, reference; got 'narrow'",
        ),
        ({"entries": {CLASS: {"bf16": {"eager": {"1.5": "triton"}}}}}, r"a density must be in \(0, 1\]; got 1.5"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**choices.SHELF.contents(made_up()), **change}))
    with pytest.raises(ValueError, match=f"gpu.json is not a table of measured choices: {message}"):
        choices.SHELF.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"gpu.json is not JSON"):
        choices.SHELF.load(path)


def test_a_linear_layer_runs_what_the_table_says_and_gives_the_same(calls):
    layer, x = ThresholdLinear(7, 6), torch.randn(5, 7)
    results = []
    with choices.SHELF.using(made_up()):
        for layer.known_density in (1.0, 0.5, 0.25, 0.75):
            results.append(run(layer, x))
    with choices.SHELF.using(made_up({1.0: "narrow"})):
        results.append(run(layer, x))
    assert calls == ["reference", "triton", "triton", "reference", "narrow"]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    run(layer, x)  # no table of this device: the kernels
    assert calls[-1] == "triton"


@pytest.mark.parametrize("padding", [1, "valid"])
def test_a_convolution_is_filed_by_its_output_positions(calls, padding):
    layer, side = ThresholdConv2d(3, 6, 3, stride=2, padding=padding), 8 if padding == 1 else 9
    with choices.SHELF.using(made_up({1.0: "triton"}, shape=CONV)):
        run(layer, torch.randn(1, 3, side, side))  # 4x4 outputs
        run(layer, torch.randn(1, 3, 2 * side, 2 * side))
        run(layer, torch.randn(3, side, side))
    assert calls == ["triton", "reference", "triton"]


def test_same_padding_keeps_the_size():
    x, w = torch.zeros(2, 3, 6, 7), torch.zeros(4, 3, 4, 3)
    assert choice.conv_work(x, w, 1, "same", (1, 2), 1.0).positions == 2 * 6 * 7


def test_arithmetic_and_way_are_told_apart(calls, monkeypatch):
    layer, x = ThresholdLinear(7, 6), torch.randn(5, 7)
    with choices.SHELF.using(made_up({1.0: "triton"}, dtype="tf32", way="graph")):
        run(layer, x)
        monkeypatch.setattr(choice, "tf32", lambda conv: True)
        run(layer, x)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run(layer, x)
    assert calls == ["reference", "reference", "triton"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choice.arithmetic(x, conv=True) == "bf16"
    assert choice.arithmetic(x.half(), conv=True) == "fp16"


def test_a_request_is_stronger_than_a_table(calls):
    layer, x = ThresholdLinear(7, 6), torch.randn(5, 7)
    with choices.SHELF.using(made_up({1.0: "reference"})), backend.requesting("triton"):
        run(layer, x)
    with choices.SHELF.using(made_up({1.0: "triton"})), backend.requesting("reference"):
        run(layer, x)
    assert calls == ["triton", "reference"]
    assert backend.REQUESTED == "auto"


def test_narrow_needs_a_host_that_can_look(calls, monkeypatch):
    layer, x = ThresholdLinear(7, 6), torch.randn(5, 7)
    monkeypatch.setenv("SPAFL_STRICT", "1")
    with backend.requesting("narrow"):
        run(layer, x)
        with pytest.raises(
            RuntimeError, match=r"SPAFL_STRICT is set, and .* cannot see counts under torch.func transforms"
        ):
            torch.func.vmap(lambda x: run(layer, x))(x)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="the host cannot see counts while a CUDA graph is captured"):
            run(layer, x)
    assert calls == ["narrow"]


def test_a_dense_choice_is_no_fallback(calls, monkeypatch, recwarn):
    monkeypatch.setenv("SPAFL_STRICT", "1")
    with choices.SHELF.using(made_up({1.0: "reference"})):
        run(ThresholdLinear(7, 6), torch.randn(5, 7))
    assert calls == ["reference"] and not recwarn.list


def test_a_cohort_takes_the_kernels(calls):
    x, w, t = torch.randn(2, 5, 7), torch.randn(2, 6, 7), torch.zeros(2, 6)
    with choices.SHELF.using(made_up({1.0: "reference"})):
        torch.func.vmap(lambda x, w, t: ops.linear(x, w, t, None, "identity", False, 1.0))(x, w, t)
    assert calls == ["triton"]


def test_a_compiled_layer_keeps_the_choice():
    layer, x = ThresholdLinear(7, 6), torch.randn(5, 7)
    for chosen in ("triton", "reference"):
        graphs = []

        def keep(graph, _, graphs=graphs):
            graphs.append(graph.code)
            return graph.forward

        torch._dynamo.reset()
        with choices.SHELF.using(made_up({1.0: chosen}, way="graph")):
            got = torch.compile(lambda x: run(layer, x), fullgraph=True, backend=keep, dynamic=True)(x)
        assert ("spafl" in graphs[0]) == (chosen == "triton")
        torch.testing.assert_close(got, layer(x))
    torch._dynamo.reset()


def test_observe_tells_layers_their_density():
    model = torch.nn.Sequential(ThresholdLinear(7, 8), torch.nn.ReLU(), ThresholdLinear(8, 8))
    with torch.no_grad():
        model[0].threshold[2:].fill_(10.0)  # 2 of 8 active
        model[2].threshold[:3].fill_(10.0)  # 5 of 8
    before = model.state_dict().keys()
    assert model[0].known_density == 1.0
    assert spafl_kernels.observe(model) == {"0": 0.25, "2": 0.625}
    assert (model[0].known_density, model[2].known_density) == (0.25, 0.75)
    assert model.state_dict().keys() == before
    assert spafl_kernels.observe(torch.nn.ReLU()) == {}


def test_explain_tells_the_choice_and_the_measurement(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    conv, linear = ThresholdConv2d(3, 6, 3, stride=2, padding=1), ThresholdLinear(7, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layer in (conv, linear):
            layer.weight = torch.nn.Parameter(torch.empty(layer.weight.shape, device="cuda"))
        x, rows = torch.empty(1, 3, 8, 8, device="cuda"), torch.empty(5, 7, device="cuda")
        assert "no times were measured on this device" in spafl_kernels.explain(conv, x).reason
        with choices.SHELF.using(made_up({0.5: "triton", 1.0: "reference"}, shape=CONV)):
            said = spafl_kernels.explain(conv, x)
            assert said.backend == "reference" and not said.fallback
            assert "nothing was measured to be faster than masked dense at density 1" in said.reason
            conv.known_density = 0.25
            said = spafl_kernels.explain(conv, x)
            assert (
                said.backend == "triton" and f"at density 0.5 for {CONV} in fp32, eager, on made-up GPU" in said.reason
            )
            assert "is not in the table" in spafl_kernels.explain(linear, rows).reason


def test_nothing_ships_that_nobody_measured():
    """Tables that ship say on what, with what and when they were measured."""
    paths = {path.name: path for path in FOLDER.glob("*.choices.json")}
    assert file_name(choices.INSTEAD, "choices") in paths
    for path in paths.values():
        table = choices.SHELF.load(path)
        assert path.name == file_name(table.device, "choices")
        assert {"commit", "torch", "triton", "time"} <= table.made.keys()


def test_the_environment_report_says_what_was_measured(monkeypatch, tmp_path, capsys):
    from spafl_kernels import env

    for name, value in {"device_count": 2, "is_available": True, "get_device_capability": (7, 5)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("made-up GPU", "another GPU")[i])
    (tmp_path / "made-up-gpu.choices.json").write_text(json.dumps(choices.SHELF.contents(made_up())))
    monkeypatch.setenv("SPAFL_TABLES", str(tmp_path))
    choices.SHELF.forget()
    try:
        assert env.main([]) == 0
        text = capsys.readouterr().out
        assert "choice      made-up GPU: commit abc, ?" in text
        assert "tiles       another GPU: not measured; the kernels choose them by rule" in text
        assert "choice      another GPU: no times were measured; layers take the Triton kernels" in text
        assert "the best GPU here has 7.5" in text and "SPAFL_BACKEND=auto, SPAFL_STRICT=0" in text
        choices.SHELF.forget()
        (tmp_path / "another-gpu.choices.json").write_text("{}")
        assert "not usable" in env.report()["measured"]["another GPU"]
    finally:
        choices.SHELF.forget()
