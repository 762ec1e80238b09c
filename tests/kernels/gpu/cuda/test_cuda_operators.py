"""The operators around the kernels: bad input, opcheck, fake tensors, torch.compile."""

# ruff: noqa: E501  (the tables of faults: one line each)

from __future__ import annotations

import re

import cuda_build
import pytest
import torch
from torch import library as registry
from torch._subclasses.fake_tensor import FakeTensorMode

from spafl_kernels.gpu import cuda_ops


def pass_arguments(device="cpu"):
    """Arguments of threshold_pass_cuda, by name: two layers, two clients."""

    def empty(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    return {
        "weights": [empty(2, 5, 3), empty(2, 4, 2, 3, 3)],
        "thresholds": [empty(2, 5), empty(2, 4)],
        "compare": False,
        "pad_to": 4,
        "scores": empty(2, 9),
        "mask": empty(2, 9, dtype=torch.bool),
        "flipped": empty(2, 9, dtype=torch.bool),
        "active": empty(2, 9, dtype=torch.int32),
        "inverse": empty(2, 9, dtype=torch.int32),
        "counts": empty(2, 2, dtype=torch.int32),
        "changed": empty(2, 2, dtype=torch.bool),
        "packed": [empty(2, 8, 3), empty(2, 4, 2, 3, 3)],
    }


def step_arguments():
    shapes, others = [(2, 5, 3), (2, 4, 2, 3, 3)], [(2, 7)]

    def zeros(shapes):
        return [torch.zeros(s) for s in shapes]

    masks = pass_arguments()
    return {
        "weights": zeros(shapes),
        "weight_grads": zeros(shapes),
        "weight_momenta": zeros(shapes),
        "thresholds": zeros([s[:2] for s in shapes]),
        "threshold_grads": zeros([s[:2] for s in shapes]),
        "threshold_momenta": zeros([s[:2] for s in shapes]),
        "others": zeros(others),
        "other_grads": zeros(others),
        "other_momenta": zeros(others),
        "learning_rate": torch.zeros(1, dtype=torch.float64),
        "penalty": torch.zeros(2, dtype=torch.float64),
        "momentum": 0.9,
        "weight_decay": 0.0,
        "max_norm": 3.0,
        "partials": torch.zeros(2, 3, dtype=torch.float64),
        "norms": torch.zeros(2, dtype=torch.float64),
        **{name: masks[name] for name in ("scores", "mask", "flipped")},
    }


def copy_arguments():
    return {
        "full": [torch.zeros(2, 5, 1, 4, 9), torch.zeros(2, 4, 1, 1, 1)],
        "compact": [torch.zeros(2, 3, 1, 2, 9), torch.zeros(2, 2, 1, 1, 1)],
        "active": torch.zeros(2, 9, dtype=torch.int32),
        "counts": torch.zeros(2, 2, dtype=torch.int32),
        "filters": [5, 4],
        "row_layers": [0, 1],
        "column_layers": [1, -1],
        "short_by": torch.zeros(2, 2, dtype=torch.int32),
    }


def operator(name):
    return getattr(getattr(torch.ops, cuda_build.NAMESPACE), name).default


def swapped(make, name, value, index=None):
    arguments = make()
    if index is None:
        arguments[name] = value
    else:
        arguments[name][index] = value
    return list(arguments.values())


f32, f64 = torch.float32, torch.float64
PASS_FAULTS = [
    ("weights", [], None, "weights must name at least one layer"),
    ("weights", torch.zeros(2, 5), 0, "weights[0] must have shape (clients, filters, ...) with 3 dimensions or more; got (2, 5)"),
    ("weights", torch.zeros(2, 0, 3), 0, "weights[0] must have no dimension of size 0; got (2, 0, 3)"),
    ("weights", torch.zeros(0, 5, 3), 0, "weights[0] must have no dimension of size 0; got (0, 5, 3)"),
    ("weights", torch.zeros(2, 5, 3, dtype=torch.int32), 0, "weights[0] must be float64, float32, float16 or bfloat16; got int32"),
    ("weights", torch.zeros(2, 4, 2, 3, 3, dtype=f64), 1, "weights[1] must be float32; got float64"),
    ("weights", torch.zeros(3, 4, 2, 3, 3), 1, "weights[1] must have 2 clients like weights[0]; got 3"),
    ("weights", torch.zeros(2, 5, 6)[..., ::2], 0, "weights[0] must keep each client in one block of memory; shape (2, 5, 3) has strides (30, 6, 2)"),
    ("weights", torch.zeros(2, 3, 5).mT, 0, "weights[0] must keep each filter in one block of memory; shape (2, 5, 3) has strides (15, 1, 5)"),
    ("weights", torch.zeros(1, 5, 3).expand(2, 5, 3), 0, "weights[0] must keep its clients apart in memory"),
    ("thresholds", [torch.zeros(2, 5)], None, "thresholds must have 2 entries; got 1"),
    ("thresholds", torch.zeros(2, 6), 0, "thresholds[0] must have one value per filter, shape (2, 5); got (2, 6)"),
    ("thresholds", torch.zeros(2, 5, dtype=f64), 0, "thresholds[0] must be float32; got float64"),
    ("thresholds", torch.zeros(2, 10)[:, ::2], 0, "thresholds[0] must keep each client in one block of memory"),
    ("pad_to", 0, None, "pad_to must be 1 or more; got 0"),
    ("scores", torch.zeros(2, 9, dtype=f64), None, "scores must be float32; got float64"),
    ("mask", torch.zeros(2, 9), None, "mask must be bool; got float32"),
    ("flipped", torch.zeros(2, 8, dtype=torch.bool), None, "flipped must have shape (2, 9); got (2, 8)"),
    ("active", torch.zeros(2, 9, dtype=torch.int64), None, "active must be int32; got int64"),
    ("inverse", torch.zeros(9, 2, dtype=torch.int32).T, None, "inverse must be contiguous"),
    ("counts", torch.zeros(2, 3, dtype=torch.int32), None, "counts must have shape (2, 2); got (2, 3)"),
    ("changed", torch.zeros(2, dtype=torch.bool), None, "changed must have shape (2, 2); got (2,)"),
    ("packed", [torch.zeros(2, 8, 3)], None, "packed must have 2 entries; got 1"),
    ("packed", torch.zeros(2, 5, 3), 0, "packed[0] must have shape (2, 8, 3) (filters rounded up to a multiple of 4); got (2, 5, 3)"),
    ("packed", torch.zeros(2, 4, 3, 3, 2).movedim(-1, 2), 1, "packed[1] must have the memory order of weights[1], strides (72, 18, 9, 3, 1)"),
]  # fmt: skip
STEP_FAULTS = [
    ("momentum", 1.0, None, "momentum must be in [0, 1); got 1"),
    ("momentum", -0.1, None, "momentum must be in [0, 1); got -0.1"),
    ("momentum", 0.0, None, "weight_momenta (none without momentum) must have 0 entries; got 2"),
    ("weight_decay", -1.0, None, "weight_decay must be 0 or more; got -1"),
    ("max_norm", 0.0, None, "max_norm must be positive, or None for no clipping; got 0"),
    ("max_norm", float("nan"), None, "max_norm must be positive, or None for no clipping; got nan"),
    ("weights", torch.zeros(2, 5, 3, dtype=torch.bfloat16), 0, "thresholds[0] must be bfloat16; got float32"),
    ("weight_grads", [], None, "weight_grads must have 2 entries; got 0"),
    ("weight_grads", torch.zeros(2, 5, 4), 0, "weight_grads[0] must have the shape of weights[0], (2, 5, 3); got (2, 5, 4)"),
    ("weight_grads", torch.zeros(2, 4, 3, 3, 2).movedim(-1, 2), 1, "weight_grads[1] must have the memory order of weights[1], strides (72, 18, 9, 3, 1); got (72, 18, 1, 6, 2)"),
    ("weight_momenta", torch.zeros(2, 5, 3, dtype=f64), 0, "weight_momenta[0] must be float32; got float64"),
    ("threshold_grads", torch.zeros(2, 4), 0, "threshold_grads[0] must have the shape of thresholds[0], (2, 5); got (2, 4)"),
    ("others", torch.zeros(3, 7), 0, "others[0] must have 2 clients in its leading dimension and no dimension of size 0; got (3, 7)"),
    ("other_grads", torch.zeros(2, 8), 0, "other_grads[0] must have the shape of others[0], (2, 7); got (2, 8)"),
    ("other_momenta", [], None, "other_momenta (none without momentum) must have 1 entries; got 0"),
    ("learning_rate", torch.zeros(3, dtype=f64), None, "learning_rate must have shape (2,); got (3,)"),
    ("learning_rate", torch.zeros(1), None, "learning_rate must be float64; got float32"),
    ("penalty", torch.zeros((), dtype=f64), None, "penalty must have shape (2,); got ()"),
    ("partials", torch.zeros(2, 4, dtype=f64), None, "partials must have shape (2, 3); got (2, 4)"),
    ("norms", torch.zeros(1, dtype=f64), None, "norms must have shape (2,); got (1,)"),
]  # fmt: skip
COPY_FAULTS = [
    ("full", [], None, "full must name at least one tensor"),
    ("full", torch.zeros(2, 5, 36), 0, "full[0] must have shape (2, rows, outer, columns, inner) with no dimension of size 0; got (2, 5, 36)"),
    ("full", torch.zeros(2, 5, 1, 9, 4).mT, 0, "full[0] must be contiguous within a client"),
    ("full", torch.zeros(2, 6, 1, 4, 9), 0, "full[0] has 6 where layer 0 of row_layers has 5 filters"),
    ("full", torch.zeros(2, 5, 1, 3, 9), 0, "full[0] has 3 where layer 1 of column_layers has 4 filters"),
    ("compact", torch.zeros(2, 3, 1, 2, 4), 0, "compact[0] must have the outer and inner sizes of full[0]"),
    ("compact", torch.zeros(2, 2, 1, 1, 1, dtype=f64), 1, "compact[1] must be float32; got float64"),
    ("row_layers", [0], None, "row_layers must have 2 entries; got 1"),
    ("row_layers", [0, 2], None, "row_layers[1] must be -1 (keep all) or the number of a layer, 0 to 1; got 2"),
    ("filters", [5, 0], None, "filters must be 1 or more for every layer; got 0"),
    ("active", torch.zeros(2, 8, dtype=torch.int32), None, "active must have shape (2, 9); got (2, 8)"),
    ("short_by", torch.zeros(2, 1, dtype=torch.int32), None, "short_by must have shape (2, 2); got (2, 1)"),
]  # fmt: skip
FAULTS = [
    *(("threshold_pass_cuda", pass_arguments, *fault) for fault in PASS_FAULTS),
    *(("fused_step_cuda", step_arguments, *fault) for fault in STEP_FAULTS),
    *(("compact_gather_cuda", copy_arguments, *fault) for fault in COPY_FAULTS),
    *(("compact_scatter_cuda", copy_arguments, *fault) for fault in COPY_FAULTS[:3]),
]
OPERATORS = {
    "threshold_pass_cuda": pass_arguments,
    "fused_step_cuda": step_arguments,
    "compact_gather_cuda": copy_arguments,
    "compact_scatter_cuda": copy_arguments,
}


@pytest.mark.parametrize("name, make, argument, value, index, message", FAULTS)
def test_bad_input_is_refused_before_any_launch(library, name, make, argument, value, index, message):
    before = library.emu_launches()
    arguments = swapped(make, argument, value, index)
    with pytest.raises(RuntimeError, match=re.escape(f"{name}: {message}")):
        operator(name)(*arguments)
    assert library.emu_launches() == before


@pytest.mark.parametrize("name", OPERATORS)
def test_the_arguments_that_the_faults_start_from_are_good(library, name):
    operator(name)(*OPERATORS[name]().values())


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(library, name):
    registry.opcheck(operator(name), tuple(OPERATORS[name]().values()))


def test_fake_cuda_tensors(library):
    with FakeTensorMode():
        arguments = pass_arguments("cuda")
        weights, thresholds = arguments["weights"], arguments["thresholds"]
        state = cuda_ops.mask_state(weights, 4)
        assert [tuple(p.shape) for p in state.packed] == [(2, 8, 3), (2, 4, 2, 3, 3)]
        cuda_ops.threshold_pass(weights, thresholds, state)
        with pytest.raises(RuntimeError, match="threshold_pass_cuda: thresholds must have 2 entries; got 1"):
            cuda_ops.threshold_pass(weights, thresholds[:1], state)
        with pytest.raises(RuntimeError, match="all tensors must be on one device; got cpu, cuda:0"):
            cuda_ops.threshold_pass(weights, [torch.zeros(t.shape) for t in thresholds], state)
        step = cuda_ops.step_state(weights, thresholds, learning_rate=0.1, momentum=0.9)
        cuda_ops.fused_step(weights, weights, thresholds, thresholds, [], [], step, state, momentum=0.9, max_norm=1.0)
        cuda_ops.active_lists(weights, state)


def test_compiled_equals_eager(one_schedule):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 6, 5, generator=generator), torch.randn(2, 3, 7, generator=generator)]
    thresholds = [torch.full(w.shape[:2], 0.8) for w in weights]

    def work(weights, thresholds):
        state = cuda_ops.mask_state(weights, 2)
        cuda_ops.threshold_pass([2 * w for w in weights], thresholds, state, compare=False)
        return state.counts + 1, state.scores, state.active

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for eager, other in zip(work(weights, thresholds), compiled(weights, thresholds)):
        assert torch.equal(eager, other)


def test_wrappers_name_bad_arguments(library):
    with pytest.raises(ValueError, match="weights must name at least one layer"):
        cuda_ops.mask_state([])
    with pytest.raises(ValueError, match=re.escape("weights[0] must have shape (clients, filters, ...); got (4, 3)")):
        cuda_ops.mask_state([torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="pad_to must be 1 or more; got 0"):
        cuda_ops.mask_state([torch.zeros(1, 4, 3)], pad_to=0)
    with pytest.raises(FileNotFoundError, match="no library at /nowhere"):
        cuda_ops.load("/nowhere.so")


def test_without_the_library_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cuda_ops, "_reason", "no extension _C*.so in here: it was not built")
    assert not cuda_ops.available()
    assert cuda_ops.why_not() == "no extension _C*.so in here: it was not built"
    with pytest.raises(RuntimeError, match="threshold_pass_cuda: the CUDA operators are not available: no extension"):
        state = cuda_ops.mask_state([torch.zeros(1, 2, 3)])
        cuda_ops.threshold_pass([torch.zeros(1, 2, 3)], [torch.zeros(1, 2)], state)
