"""Remembered launches: what reaches the driver is what Triton itself would send, and a layer's call stays short.

The driver is a stand-in (see ``benchmarks/gpu/pretended.py``); Triton's compiler, C launchers and specialisation are
real. It is a library of the whole process, so these tests have one of their own.
"""

import collections
import contextlib
import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.compile_only
OWN = "SPAFL_TEST_PRETENDED_GPU"

if os.environ.get(OWN) != "1":

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is pretended where there is none")
    def test_launches_on_a_pretended_gpu():
        environment = {**os.environ, OWN: "1", "TRITON_INTERPRET": "0", "PYTEST_ADDOPTS": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", os.path.abspath(__file__)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"

else:
    import triton
    from support import compile_only
    from triton.runtime.jit import JITFunction

    import spafl_kernels
    from benchmarks.gpu import pretended
    from spafl_kernels import ThresholdConv2d, ThresholdLinear, eager, env
    from spafl_kernels.gpu import direct
    from spafl_kernels.gpu.geometry import Geometry
    from spafl_kernels.gpu.triton import backward, launch, layer_backward, layer_forward, select_layer
    from spafl_kernels.shared_pass import SharedPass

    LAST = torch.channels_last

    @pytest.fixture(autouse=True)
    def gpu():
        with pretended.device():
            yield
        pretended.record(())

    @pytest.fixture
    def plain(monkeypatch):
        """How many launches took Triton's own way."""
        seen, stock = [], JITFunction.run
        monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (seen.append(self), stock(self, *a, **k))[1])
        return seen

    @pytest.fixture
    def compared(monkeypatch):
        """Every remembered launch is compared with a plain one of the same arguments; gives the kernels' names."""
        names, stock = [], launch.Launch.__call__

        def call(self, stream, *tensors):
            assert stream is not None
            arguments = (*tensors, *self.integers)
            # What Triton chooses for these arguments, found out anew.
            kernel = self.kernel.run(*arguments, grid=self.grid, warmup=True, **self.constants)
            types = [t for t in kernel.src.signature.values() if t != "constexpr"]
            stock(self, stream, *tensors)
            pretended.record([8 if t.startswith("*") or t == "i64" else 4 for t in types])
            self.kernel[self.grid](*arguments, **self.constants)
            want = pretended.last(len(types))
            before = pretended.launches()
            with monkeypatch.context() as patch:
                patch.setattr(JITFunction, "run", None)
                stock(self, stream, *tensors)
            assert pretended.launches() == before + 1
            assert pretended.last(len(types)) == want, self.kernel.__name__
            assert int.from_bytes(want[:8], "little") == kernel.function
            names.append(self.kernel.__name__)
            pretended.record(())

        monkeypatch.setattr(launch.Launch, "__call__", call)
        monkeypatch.setattr(launch.Program, "__call__", launch.Program.apart)  # so that each is seen
        return names

    def shifted(tensor, elements):
        """The same tensor at an address that is so many elements behind a multiple of 16 bytes."""
        memory = torch.empty(tensor.numel() + 16 + elements, dtype=tensor.dtype)
        begin = -memory.data_ptr() % 16 // tensor.element_size() + elements
        there = memory[begin : begin + tensor.numel()].as_strided(tensor.shape, tensor.stride())
        return there.copy_(tensor)

    CASES = {
        # out, geometry, images, clients, dtype, tf32, bias
        "linear": (10, Geometry(16), 4, 1, torch.float32, True, True),
        "odd linear": (7, Geometry(5), 3, 2, torch.bfloat16, False, False),
        "convolution": (16, Geometry(16, 6, 6, (3, 3), (1, 1), (1, 1)), 2, 1, torch.float16, False, True),
        "strided": (9, Geometry(3, 7, 6, (3, 2), (2, 1), (1, 0), (1, 2)), 1, 3, torch.float32, False, True),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_what_reaches_the_driver_is_what_triton_would_send(name, compared):
        out, g, n, clients, dtype, tf32, bias = CASES[name]
        weight = torch.randn(clients, out, g.channels, *g.kernel, dtype=dtype)
        threshold = torch.zeros(clients, out, dtype=dtype)
        x = torch.randn(clients, n, g.channels, g.height, g.width, dtype=dtype)
        b = torch.zeros(clients, out, dtype=dtype) if bias else None
        grad = torch.randn(clients, n, out, *g.output, dtype=dtype)
        for at in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (8, 8, 8, 8), (0, 0, 0, 0)):
            w, t, i, dy = (shifted(value, k) for value, k in zip((weight, threshold, x, grad), at, strict=True))
            selection, packed, _ = select_layer(w, t, "identity", dtype)
            layer_forward(i, packed, selection, b, g, False, tf32)
            layer_backward(dy, i, w, packed, selection, b, g, False, tf32)
        assert len(compared) == 7 * 8

    def test_launches_that_come_together_are_those_one_by_one(monkeypatch, plain):
        """The quick way of a whole backward pass: same kernels and numbers; scratch memories do not overlap."""
        out, g, n, clients, dtype, tf32, _ = CASES["convolution"]
        weight, threshold = torch.randn(clients, out, 16, 3, 3).to(dtype), torch.zeros(clients, out, dtype=dtype)
        x, grad = (torch.randn(clients, n, 6, 6, 16).to(dtype).permute(0, 1, 4, 2, 3) for _ in range(2))
        selection, packed, _ = select_layer(weight, threshold, "identity", dtype)
        programs, stock = [], launch.Program.__init__
        monkeypatch.setattr(launch.Program, "__init__", lambda self, *a: (programs.append(self), stock(self, *a))[1])
        backward.prepare.cache_clear()
        layer_backward(grad, x, weight, packed, selection, None, g, False, tf32)
        (program,), sent = programs, []

        def spied(known):
            run, *rest = known
            return (lambda *arguments: (sent.append(arguments), run(*arguments))[1], *rest)

        program._ready = [spied(known) for known in program._ready]
        del plain[:]
        before = pretended.launches()
        results = layer_backward(grad, x, weight, packed, selection, None, g, False, tf32)
        assert pretended.launches() == before + 6 and not plain
        given = [grad, x, weight, packed, weight, selection.data, selection.data, *results[:3], results[2]]
        addresses = dict(enumerate(t.data_ptr() for t in given))
        for arguments, (one, pick) in zip(sent, program.stages, strict=True):
            _, grid, rest, values = one.known
            places = pick(range(backward.SLABS + 1))
            assert arguments[:3] == grid and arguments[3] == 0 and arguments[4 : 4 + len(rest)] == rest
            assert arguments[-len(values) :] == values and len(places) + len(values) == len(one.kernel.arg_names)
            for place, address in zip(places, arguments[4 + len(rest) : -len(values)], strict=True):
                assert addresses.setdefault(place, address) == address
        assert sorted(addresses) == list(range(backward.SLABS + 1))
        # An address that is no multiple of 16 needs another kernel.
        layer_backward(shifted(grad, 1), x, weight, packed, selection, None, g, False, tf32)
        assert plain
        found = sorted((addresses[backward.EXTENDED + i], m.bytes) for i, m in enumerate(program.scratch))
        assert all(begin % launch.ALIGNMENT == 0 for begin, _ in found)
        assert all(begin + size <= following for (begin, size), (following, _) in itertools.pairwise(found))

    def test_the_layers_of_a_shared_pass_are_aligned():
        """Or their launches would need kernels of their own, and would not come together."""
        layers = [ThresholdLinear(5, out) for out in (7, 10, 3)]
        with SharedPass(layers).open(torch.empty(3, dtype=torch.float64)):
            for layer in layers:
                assert all(t.data_ptr() % launch.ALIGNMENT == 0 and t.is_contiguous() for t in layer.selected)

    @pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
    def test_hooks_on_launches_see_every_launch(hook):
        layer, x, seen = ThresholdLinear(16, 8), torch.randn(4, 16), []
        for _ in range(2):
            layer(x)
        chain = getattr(triton.knobs.runtime, hook)
        chain.add(seen.append)
        try:
            layer(x)
        finally:
            chain.remove(seen.append)
        chain.calls.clear()
        assert len(seen) == 2

    def test_another_driver_is_not_given_what_was_remembered(plain):
        layer, x = ThresholdLinear(16, 8), torch.randn(4, 16)
        for _ in range(2):
            layer(x)
        del plain[:]
        with compile_only.compiling() as log:
            layer(x)
        assert [one.name for one in log] == ["threshold_pass_layer", "threshold_forward"]
        assert len(plain) == 2

    def test_other_parts_of_triton_than_expected_are_said_and_not_used(monkeypatch, plain):
        from triton.backends.nvidia import driver

        for cached in (launch.why_not, launch._quick):
            monkeypatch.setattr(launch, cached.__name__, functools.cache(cached.__wrapped__))
        monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKp")
        assert "its C launchers take 'iiiKKp'" in env.report()["launches"]
        layer, x = ThresholdLinear(16, 8), torch.randn(4, 16)
        for _ in range(3):
            layer(x)
        assert len(plain) == 6

    # ------------------------------------------------------------------------------------------- the host's work
    HOME = os.path.dirname(spafl_kernels.__file__)

    def own_calls(function):
        """Calls of the library's Python functions, and C functions that they call; what PyTorch does is not counted."""
        counts = collections.Counter()

        def note(frame, event, argument):
            counts[event] += frame.f_code.co_filename.startswith(HOME)

        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(None)
        return counts["call"] + counts["c_call"]

    LAYERS = {
        "linear": (lambda: ThresholdLinear(120, 84), (4, 120)),
        "convolution": (lambda: ThresholdConv2d(6, 16, 5).to(memory_format=LAST), (4, 6, 14, 14)),
    }

    # Calls forward and backward. Without anything remembered there are several hundred each; see the test below.
    BOUNDS = {False: (66, 39), True: (51, 39)}

    def measured(name, shared):
        """:func:`own_calls` of a layer's call and of the backward pass."""
        make, shape = LAYERS[name]
        layer, x = make(), torch.randn(shape)
        x = (x.to(memory_format=LAST) if x.dim() == 4 else x).requires_grad_()
        densities = torch.empty(1, dtype=torch.float64)
        with SharedPass([layer]).open(densities) if shared else contextlib.nullcontext():
            gradient = torch.empty_like(layer(x))
            for _ in range(3):
                layer(x).backward(gradient)
            y = layer(x)
            return own_calls(lambda: layer(x)), own_calls(lambda: y.backward(gradient))

    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("shared", [False, True])
    def test_a_call_stays_short(name, shared, plain):
        """A bound on what the host does per layer, which no clock disturbs. Bounds are a fifth above what is needed."""
        forward, backward = measured(name, shared)
        print(name, shared, forward, backward)
        assert forward <= BOUNDS[shared][0] and backward <= BOUNDS[shared][1], (forward, backward)
        before = len(plain)
        measured(name, shared)
        # Every launch is remembered, also by another layer of these sizes; the pass of a model is each model's own.
        assert len(plain) == before + shared

    class Forgetful(dict):
        def get(self, key, default=None):
            return default

    def test_the_bound_sees_what_it_is_for(monkeypatch, plain):
        """Through the dispatcher, and without remembered facts, a call exceeds it; other launches are seen as such."""
        for module, attribute, value, slower in (
            (eager, "unseen", lambda: False, (True, True)),
            (direct, "same_as", lambda *tensors: None, (True, False)),  # facts of a single gradient are as fast to read
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, attribute, value)
                found = measured("linear", False)
            assert tuple(a > b for a, b in zip(found, BOUNDS[False], strict=True)) == slower, (attribute, found)
        del plain[:]
        monkeypatch.setattr(launch, "_quick", lambda: None)
        measured("linear", False)
        assert len(plain) > 30
