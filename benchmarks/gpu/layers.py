"""One layer: ours beside dense, masked dense and compact.

Providers (all channels last, no bias; but for ``module`` none goes through autograd: a mode is exactly its kernels):

dense     cuDNN or cuBLAS on the full weight; the rival. ``dense-again`` is the same once more: the noise.
masked    what the published code does: mask times weight, dense operator, dense gradients, gradients of the mask.
compact   cuDNN or cuBLAS on the active filters only (count rounded up to 8), output left compact: an oracle, not a
          drop-in layer.
narrow    mode ``module`` only, eager only: the drop-in layer on cuDNN or cuBLAS, the host reading the counts.
ours      threshold pass, packed forward and backward. ``whole`` includes the pass.

Modes: forward, dgrad, wgrad (with all mask gradients), whole = forward and both gradients, and module = whole as a user
has it: the drop-in layer (``masked``: on dense operators; ``dense``: the plain layer), operators and autograd included.
Every ours row is gated: no time is reported for a result that differs from the masked reference in float32.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from spafl_kernels import ThresholdConv2d, ThresholdLinear, backend, reference
from spafl_kernels.gpu.packing import capacity
from spafl_kernels.gpu.tables.classes import shape_class
from spafl_kernels.gpu.tables.tiles import Tile
from spafl_kernels.gpu.triton.tiles import arithmetic, choose, filters_of

from .clock import Device, measure, tf32
from .results import Row, finish
from .roofline import DTYPES, Machine, ceiling, floor_us, tile_density
from .shapes import Layer

MODES = ("forward", "dgrad", "wgrad", "whole", "module")
GATED = ("ours", "narrow")
# What layers of a provider ask for.
REQUESTS: dict[str, backend.Request] = {
    "dense": "reference", "masked": "reference", "ours": "triton", "narrow": "narrow",
}  # fmt: skip
# Root mean square error of a result against float32, relative; above it the row has no time.
GATE = {"bf16": 2e-2, "fp16": 4e-3, "tf32": 4e-3, "fp32": 1e-4}
# One rounding of what is added up: as good, where a sum cancels to next to nothing (dL/dtau where one filter is left).
ROUNDING = {"bf16": 2.0**-9, "fp16": 2.0**-11, "tf32": 2.0**-11, "fp32": 2.0**-24}


class Case:
    """Tensors of one layer at one batch and density, and what every provider does with them.

    Args:
        kernels: holds ``select_layer``, ``layer_forward`` and ``layer_backward``; those of the package by default.
    """

    def __init__(self, layer: Layer, batch: int, dtype: str, density: float, device: str, kernels: Any = None) -> None:
        g, kind = layer.geometry, DTYPES[dtype]
        generator = torch.Generator(device).manual_seed(hash((layer.out, g, batch)) % 2**31)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(kind)

        self.modules: dict[str, nn.Module] = {}
        self.layer, self.dtype, self.tf32 = layer, dtype, dtype == "tf32"
        self.kernels = kernels or importlib.import_module("spafl_kernels.gpu.triton")
        self.n = batch * layer.rows
        self.count = max(1, round(density * layer.out))
        # Channels last in memory: (N, H, W, C) seen as (N, C, H, W).
        self.x = randn(self.n, g.height, g.width, g.channels).permute(0, 3, 1, 2)
        self.weight = randn(layer.out, *g.kernel, g.channels).permute(0, 3, 1, 2) / math.sqrt(g.n_in)
        high, wide = g.output
        self.grad = randn(self.n, high, wide, layer.out).permute(0, 3, 1, 2)
        self.keep = torch.rand(layer.out, generator=generator, device=device).argsort() < self.count
        scores = reference.filter_scores(self.weight)
        self.threshold = torch.where(self.keep, 0.5 * scores, 2.0 * scores)
        # Behind a ReLU the gradient of a pruned filter is 0: the case in which its row costs nothing.
        self.grad = self.grad * self.keep.to(kind).view(1, -1, 1, 1)
        index = self.keep.nonzero().flatten()
        padded = -(-self.count // 8) * 8
        compact = self.weight.new_zeros(padded, *g.kernel, g.channels).permute(0, 3, 1, 2)
        compact[: self.count] = self.weight[index]
        self.compact_weight = compact
        self.compact_grad = self.grad.new_zeros(self.n, high, wide, padded).permute(0, 3, 1, 2)
        self.compact_grad[:, : self.count] = self.grad[:, index]

    def tile_filters(self) -> int:
        """Filters of a tile of the forward kernel, as its launcher takes it for this layer on this device."""
        kind, device = arithmetic(DTYPES[self.dtype], self.tf32), self.x.device
        tile = choose("forward", kind, self.layer.geometry, self.layer.out, self.n, device, listed=False)
        return filters_of(tile, capacity(self.layer.out))

    # dense operator, in the form that the library would be called
    def _dense(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        g = self.layer.geometry
        if self.layer.linear:
            return F.linear(x.flatten(1), w.flatten(1))
        return F.conv2d(x, w, None, g.stride, g.padding, g.dilation)

    def _gradients(self, dy: torch.Tensor, w: torch.Tensor, need: tuple[bool, bool]) -> tuple[torch.Tensor | None, ...]:
        g = self.layer.geometry
        if self.layer.linear:
            rows = dy.flatten(1)
            dx = rows @ w.flatten(1) if need[0] else None
            dw = rows.t() @ self.x.flatten(1) if need[1] else None
            return dx, dw
        return torch.ops.aten.convolution_backward(
            dy, self.x, w, None, g.stride, g.padding, g.dilation, False, (0, 0), 1, (*need, False)
        )[:2]

    def dense(self, mode: str, w: torch.Tensor | None = None, dy: torch.Tensor | None = None) -> object:
        w, dy = self.weight if w is None else w, self.grad if dy is None else dy
        if mode == "forward":
            return self._dense(self.x, w)
        if mode == "whole":
            return self._dense(self.x, w), self._gradients(dy, w, (True, True))
        return self._gradients(dy, w, (mode == "dgrad", mode == "wgrad"))

    def compact(self, mode: str) -> object:
        return self.dense(mode, self.compact_weight, self.compact_grad)

    def masked(self, mode: str) -> tuple[torch.Tensor | None, ...]:
        """``(y, dx, dw, dtau)``, None where the mode does not ask for it."""
        mask = (reference.filter_scores(self.weight) > self.threshold).to(self.weight.dtype)
        w = self.weight * mask.view(-1, 1, 1, 1)
        y = self._dense(self.x, w) if mode in ("forward", "whole") else None
        if mode == "forward":
            return y, None, None, None
        dx, dw = self._gradients(self.grad, w, (mode != "wgrad", mode != "dgrad"))
        if mode == "dgrad":
            return y, dx, None, None
        assert dw is not None
        return y, dx, *reference.mask_gradients(self.weight, self.threshold, dw.view_as(self.weight), "identity")

    def ours(self, mode: str, tile: Tile | None = None) -> tuple[torch.Tensor | None, ...]:
        """The same through the kernels; selection and packed weights are made once, except in ``whole``.

        ``tile``: for the products of the mode, instead of those that the kernels choose.
        """
        g, w, sizes = self.layer.geometry, self.weight.unsqueeze(0), {} if tile is None else {"tile": tile}
        if mode == "whole" or not hasattr(self, "state"):
            self.state = self.kernels.select_layer(w, self.threshold.unsqueeze(0), "identity")[:2]
        selection, packed = self.state
        x, y, gradients = self.x.unsqueeze(0), None, (None, None, None, None)
        if mode in ("forward", "whole"):
            y = self.kernels.layer_forward(x, packed, selection, None, g, tf32=self.tf32, **sizes)[0]
        if mode != "forward":
            gradients = self.kernels.layer_backward(
                self.grad.unsqueeze(0), x, w, packed, selection, None, g, tf32=self.tf32, need_input=mode != "wgrad",
                need_weight=mode != "dgrad", **sizes,
            )  # type: ignore[assignment]  # fmt: skip
        dx, dw, dtau, _ = (None if r is None else r[0] for r in gradients)
        return y, dx, dw, dtau

    def _layer(self, provider: str) -> nn.Module:
        g, plain, (device, kind) = self.layer.geometry, provider == "dense", (self.x.device, self.x.dtype)
        layer: nn.Module
        if self.layer.linear:
            layer = (nn.Linear if plain else ThresholdLinear)(g.channels, self.layer.out, False, device, kind)
        else:
            layer = (nn.Conv2d if plain else ThresholdConv2d)(
                g.channels, self.layer.out, g.kernel, g.stride, g.padding, g.dilation, bias=False, device=device,
                dtype=kind,
            )  # fmt: skip
        with torch.no_grad():
            # The tensors themselves, so that the memory order is theirs.
            layer.weight = nn.Parameter(self.weight.flatten(1) if self.layer.linear else self.weight)
            if not plain:
                layer.threshold.copy_(self.threshold)  # type: ignore[operator,union-attr]
        return layer

    def module(self, provider: str) -> tuple[torch.Tensor, ...]:
        """``(y, dx, dw[, dtau])`` of the layer as a user calls it; ``provider``: of :data:`REQUESTS`."""
        if provider not in self.modules:
            self.modules[provider] = self._layer(provider)
        layer = self.modules[provider]
        x = (self.x.flatten(1) if self.layer.linear else self.x).detach().requires_grad_()
        with backend.requesting(REQUESTS[provider]):
            y = layer(x)
        gradients = torch.autograd.grad(y, (x, *layer.parameters()), self.grad.view_as(y))
        return y.detach(), *gradients

    def _in_float32(self, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """``(y, dx, dw, dtau)`` of the masked reference without tf32, from tensors that are changed before."""
        case = Case.__new__(Case)
        case.__dict__ = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in vars(self).items()
        }
        case.x, case.weight, case.grad = change(case.x), change(case.weight), change(case.grad)
        with tf32(False):
            return case.masked("whole")

    @functools.cached_property
    def exact(self) -> tuple[torch.Tensor | None, ...]:
        """What is right."""
        return self._in_float32(lambda t: t)

    @functools.cached_property
    def added_up(self) -> tuple[torch.Tensor | None, ...]:
        """How large what is right would be if nothing cancelled."""
        return self._in_float32(torch.abs)

    def error(self, got: Sequence[torch.Tensor | None]) -> float:
        """Largest relative error of what there is of ``(y, dx, dw, dtau)``; infinite if a pruned output is not 0.

        A sum that cancels counts by its error in roundings of what is added up, one of which is :data:`GATE`.
        """
        worst = 0.0
        for i, (a, b) in enumerate(zip(got, self.exact, strict=True)):
            if a is None:
                continue
            assert b is not None
            difference = (a.float() - b.reshape(a.shape)).square().mean().sqrt()
            error = float(difference / b.square().mean().sqrt().clamp_min(1e-20))
            if error >= GATE[self.dtype] and (added := self.added_up[i]) is not None:
                unit = ROUNDING[self.dtype] * added.square().mean().sqrt().clamp_min(1e-20)
                error = min(error, GATE[self.dtype] * float(difference / unit))
            worst = max(worst, error if math.isfinite(error) else math.inf)
        y, pruned = got[0], ~self.keep
        if y is not None and bool(pruned.any()) and float(y.reshape(self.grad.shape)[:, pruned].abs().max()) != 0.0:
            return math.inf
        return worst

    def gate(self) -> float:
        """Largest error of ``whole`` and ``module``.

        ``module`` of ours and of narrow both, so that the times of neither are reported if one is wrong.
        """
        return max(self.error(got) for got in (self.ours("whole"), self.module("ours"), self.module("narrow")))


def class_of(layer: Layer, n: int) -> str:
    """The shape class under which the layer's times are filed for the choice of a backend."""
    g = layer.geometry
    return shape_class(g.kernel, g.stride, g.channels, layer.out, n * g.output[0] * g.output[1])


def _providers(case: Case, mode: str, graph: bool, all_of_them: bool) -> dict[str, Callable[[], object]]:
    """What is timed in a mode; ``all_of_them`` with those whose time does not depend on the mask, dense first."""
    calls: dict[str, Callable[..., object]]
    if mode == "module":
        names = ("dense", "ours", "narrow", "masked", "dense-again")
        calls = {name: functools.partial(case.module, name.removesuffix("-again")) for name in names}
        if graph:  # the host cannot read a count while a graph is replayed
            del calls["narrow"]
    else:
        calls = {
            "dense": case.dense, "ours": case.ours, "compact": case.compact, "masked": case.masked,
            "dense-again": case.dense,
        }  # fmt: skip
        calls = {name: functools.partial(call, mode) for name, call in calls.items()}
    return {name: call for name, call in calls.items() if all_of_them or name in ("ours", "narrow", "compact")}


def layer_rows(
    device: Device,
    machine: Machine | None,
    layer: Layer,
    batch: int,
    dtype: str,
    densities: Sequence[float],
    modes: Sequence[str],
    graphs: Sequence[bool],
    kernels: Any = None,
) -> Iterator[Row]:
    """Rows of one layer at one batch size; density 1 first, for the others are compared with it."""
    dense_us: dict[tuple[str, bool], float] = {}
    for density in sorted({1.0, *densities}, reverse=True):
        case = Case(layer, batch, dtype, density, device.where, kernels)
        error = case.gate()
        passed = error < GATE[dtype]
        for mode in modes:
            for graph in graphs:
                for provider, call in _providers(case, mode, graph, density == 1.0).items():
                    share, short = case.count / layer.out, provider == "compact"
                    row: Row = {
                        "kind": "layer", "model": layer.model, "layer": layer.name, "shape": layer.shape,
                        "shape_class": class_of(layer, case.n), "clients": 1, "batch": batch, "dtype": dtype,
                        "density": density, "count": case.count, "mode": mode, "provider": provider,
                        "tile_density": round(tile_density(case.count, layer.out, case.tile_filters()), 4),
                        "graph": int(graph),
                        "one_over_density": round(1 / share, 3),
                        "gate": "-" if provider not in GATED else "pass" if passed else f"fail {error:.1e}",
                    }  # fmt: skip
                    if machine is not None:
                        row["floor_us"] = round(floor_us(machine, layer, case.n, dtype, mode, share, short), 3)
                        row["ceiling"] = round(ceiling(machine, layer, case.n, dtype, mode, share, short), 3)
                    if provider not in GATED or passed:
                        row.update(measure(device, call, graph))
                    us = row.get("us")
                    if provider == "dense" and isinstance(us, float):
                        dense_us[mode, graph] = us
                    yield finish(row, dense_us.get((mode, graph)))
