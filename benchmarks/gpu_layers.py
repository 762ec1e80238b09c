"""Threshold layers on one GPU: ours beside dense, masked dense and compact, with the roofline next to every figure.

    python benchmarks/gpu_layers.py                    # every layer of the four models, bfloat16; under 8 minutes
    python benchmarks/gpu_layers.py --list             # the layers, without a GPU
    python benchmarks/gpu_layers.py --dtype tf32 --models conv4

Providers (all channels last, no bias; none goes through autograd, so that every mode is exactly its kernels):

dense     cuDNN or cuBLAS on the full weight; the rival. ``dense-again`` is the same once more: the noise.
masked    what the published code does: mask times weight, dense operator, dense gradients, gradients of the mask.
compact   cuDNN or cuBLAS on the active filters only (count rounded up to 8), output left compact: an oracle, not a
          drop-in layer.
ours      threshold pass, packed forward and backward. ``whole`` includes the pass.

Modes: forward, dgrad, wgrad (with all mask gradients), whole = forward and both gradients. Every ours row is gated: no
time is reported for a result that differs from the masked reference in float32. A row says what was measured, and the
roofline floor of the same work: ``max(FLOP / peak, bytes / bandwidth)`` with the constants below, which are data-sheet
arithmetic and not measurements. Losses are rows like any other.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from spafl.models import MODELS
from spafl_kernels import ThresholdConv2d, ThresholdLinear, reference
from spafl_kernels.triton.geometry import Geometry

DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)
BATCHES = (128, 16)
MODES = ("forward", "dgrad", "wgrad", "whole")
MODEL_NAMES = ("conv4", "resnet18-full", "lenet5", "vit")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Dense peak in FLOP/s and bandwidth in bytes/s of an H200, for the roofline columns only.
PEAK = {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 60e12}
BANDWIDTH = 4.3e12
# Root mean square error of a result against float32, relative; above it the row has no time.
GATE = {"bf16": 2e-2, "fp16": 4e-3, "tf32": 4e-3, "fp32": 1e-4}
COLUMNS = [
    "model", "layer", "shape", "batch", "dtype", "density", "count", "tile_density", "mode", "provider", "graph", "us",
    "us_p20", "us_p80", "floor_us", "share_of_floor", "speedup_vs_dense", "ceiling", "one_over_density", "gate",
    "error", "gpu", "torch", "triton", "cuda", "commit", "time",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layer:
    """One distinct layer shape; ``rows`` is how many images, or rows of a linear layer, one sample gives."""

    model: str
    name: str
    out: int
    geometry: Geometry
    rows: int
    linear: bool

    @property
    def shape(self) -> str:
        g = self.geometry
        if self.linear:
            return f"{g.channels}->{self.out}"
        return f"{g.kernel[0]}x{g.kernel[1]} {g.channels}->{self.out} @{g.height}x{g.width} s{g.stride[0]}"


def model_layers(name: str) -> list[Layer]:
    """Every distinct threshold layer of a model, in order of execution."""
    info, channels = MODELS[name], 1 if name == "lenet5" else 3
    model = info.build(classes=10, in_channels=channels).eval()
    found: dict[tuple[int, Geometry, int], Layer] = {}

    def note(label: str) -> Callable[..., None]:
        def hook(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
            x = args[0]
            if isinstance(layer, ThresholdConv2d):
                steps: list[Any] = [layer.kernel_size, layer.stride, layer.padding, layer.dilation]
                g = Geometry(x.shape[1], *x.shape[2:], *steps)
                rows, linear = 1, False
            else:
                g, rows, linear = Geometry(x.shape[-1]), x[..., 0].numel(), True
            key = (layer.weight.shape[0], g, rows)  # type: ignore[union-attr]
            found.setdefault(key, Layer(name, label, key[0], g, rows, linear))

        return hook

    for label, module in model.named_modules():
        if isinstance(module, ThresholdConv2d | ThresholdLinear):
            module.register_forward_hook(note(label))
    with torch.no_grad():
        model(torch.zeros(1, channels, info.image, info.image))
    return list(found.values())


# ------------------------------------------------------------------------------------------------- arithmetic
def floor_us(layer: Layer, n: int, dtype: str, mode: str, density: float, compact: bool = False) -> float:
    """Roofline floor: work of active filters; dense layout of outputs, or only active channels if ``compact``."""
    g = layer.geometry
    positions, size = n * g.output[0] * g.output[1], torch.finfo(DTYPES[dtype]).bits // 8
    flop = 2.0 * positions * layer.out * g.n_in * density
    x = n * g.channels * g.height * g.width * size
    y = positions * layer.out * size * (density if compact else 1.0)
    w = layer.out * g.n_in * size * density
    products = {"forward": 1, "dgrad": 1, "wgrad": 1, "whole": 3}[mode]
    traffic = x + y + w  # each product reads two of the three and writes the third
    return 1e6 * products * max(flop / PEAK[dtype], traffic / BANDWIDTH)


def tile_density(count: int, out: int) -> float:
    """Share of filters that the tiles of the forward kernel multiply."""
    whole, left = divmod(count, 64)
    return min(1.0, (64 * whole + (0 if not left else next(t for t in (16, 32, 64) if left <= t))) / out)


# ------------------------------------------------------------------------------------------------- the work
class Case:
    """Tensors of one layer at one batch and density, and what every provider does with them."""

    def __init__(self, layer: Layer, batch: int, dtype: str, density: float, device: str) -> None:
        g, kind = layer.geometry, DTYPES[dtype]
        generator = torch.Generator(device).manual_seed(hash((layer.out, g, batch)) % 2**31)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(kind)

        self.layer, self.dtype, self.tf32 = layer, dtype, dtype == "tf32"
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

    def ours(self, mode: str) -> tuple[torch.Tensor | None, ...]:
        """The same through the kernels; plan and packed weights are made once, except in ``whole``."""
        from spafl_kernels.triton import layer_backward, layer_forward, plan_layer

        g, w = self.layer.geometry, self.weight.unsqueeze(0)
        if mode == "whole" or not hasattr(self, "state"):
            self.state = plan_layer(w, self.threshold.unsqueeze(0), "identity")[:2]
        plan, packed = self.state
        x, y, gradients = self.x.unsqueeze(0), None, (None, None, None, None)
        if mode in ("forward", "whole"):
            y = layer_forward(x, packed, plan, None, g, tf32=self.tf32)[0]
        if mode != "forward":
            gradients = layer_backward(
                self.grad.unsqueeze(0), x, w, packed, plan, None, g, tf32=self.tf32, need_input=mode != "wgrad",
                need_weight=mode != "dgrad",
            )  # type: ignore[assignment]  # fmt: skip
        dx, dw, dtau, _ = (None if r is None else r[0] for r in gradients)
        return y, dx, dw, dtau

    def gate(self) -> float:
        """Largest relative error of ``whole`` against the masked reference in float32 without tf32."""
        got = self.ours("whole")
        exact = Case.__new__(Case)
        exact.__dict__ = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in vars(self).items()
        }
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            want = exact.masked("whole")
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
        worst = 0.0
        for a, b in zip(got, want, strict=True):
            assert a is not None and b is not None
            b = b.reshape(a.shape)
            error = float((a.float() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-20))
            worst = max(worst, error if math.isfinite(error) else math.inf)
        pruned = ~self.keep
        y = got[0]
        assert y is not None
        if bool(pruned.any()) and float(y[:, pruned].abs().max()) != 0.0:
            worst = math.inf
        return worst


# ------------------------------------------------------------------------------------------------- measuring
def time_gpu(call: Callable[[], object], repeats: int = 5, slice_ms: float = 3.0) -> list[float]:
    """Microseconds per call, sorted, one figure per repeat; each repeat is a stretch of about ``slice_ms``."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def stretch(count: int) -> float:
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    count = max(1, min(200, int(slice_ms / max(stretch(3) / 3, 1e-3))))
    return sorted(1e3 * stretch(count) / count for _ in range(repeats))


def time_graph(call: Callable[[], object]) -> list[float]:
    """As :func:`time_gpu`, the call captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    times = time_gpu(graph.replay)
    del graph, kept
    return times


def measure(call: Callable[[], object], graph: bool) -> dict[str, object]:
    """Median, 20th and 80th percentile in microseconds, or the error in words."""
    try:
        times = time_graph(call) if graph else time_gpu(call)
    except Exception as error:  # one broken provider must not lose the others
        torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]}
    pick = statistics.quantiles(times, n=5, method="inclusive")
    return {"us": statistics.median(times), "us_p20": pick[0], "us_p80": pick[3]}


def run_layer(layer: Layer, batch: int, dtype: str, environment: dict[str, str]) -> Iterator[dict[str, object]]:
    """All rows of one layer at one batch size."""
    dense_us: dict[tuple[str, bool], float] = {}
    for density in DENSITIES:
        case = Case(layer, batch, dtype, density, "cuda")
        error = case.gate()
        passed = error < GATE[dtype]
        providers: dict[str, Callable[[str], object]] = {"compact": case.compact, "ours": case.ours}
        if density == 1.0:  # their time does not depend on the mask
            providers = {"dense": case.dense, "masked": case.masked, **providers, "dense-again": case.dense}
        for mode in MODES:
            for provider, call in providers.items():
                for graph in (False, True):
                    floor = floor_us(layer, case.n, dtype, mode, case.count / layer.out, provider == "compact")
                    row: dict[str, object] = {
                        **environment, "model": layer.model, "layer": layer.name, "shape": layer.shape, "batch": batch,
                        "dtype": dtype, "density": density, "count": case.count, "mode": mode, "provider": provider,
                        "tile_density": round(tile_density(case.count, layer.out), 4), "graph": int(graph),
                        "floor_us": round(floor, 3), "one_over_density": round(layer.out / case.count, 3),
                        "ceiling": round(floor_us(layer, case.n, dtype, mode, 1.0) / floor, 3),
                        "gate": "-" if provider != "ours" else "pass" if passed else f"fail {error:.1e}",
                    }  # fmt: skip
                    if provider != "ours" or passed:
                        row.update(measure(lambda call=call, mode=mode: call(mode), graph))  # type: ignore[misc]
                    us = row.get("us")
                    if isinstance(us, float):
                        if provider == "dense":
                            dense_us[mode, graph] = us
                        row["share_of_floor"] = round(floor / us, 4)
                        if (mode, graph) in dense_us:
                            row["speedup_vs_dense"] = round(dense_us[mode, graph] / us, 4)
                        row.update({k: round(row[k], 3) for k in ("us", "us_p20", "us_p80")})  # type: ignore[call-overload]
                    yield row


def environment() -> dict[str, str]:
    """What a figure depends on."""
    import triton

    root = pathlib.Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": str(torch.version.cuda), "commit": done.stdout.strip() or "unknown",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def warm_in_parallel(jobs: list[tuple[Layer, int]], arguments: list[str], workers: int) -> None:
    """Compile the kernels of all jobs in several processes; they meet again in Triton's cache on disk."""
    command = [sys.executable, os.path.abspath(__file__), *arguments]
    running = [subprocess.Popen([*command, "--warm", f"{i}/{workers}"]) for i in range(min(workers, len(jobs)))]
    for process in running:
        process.wait()  # a worker that fails only leaves compilation to the measurement


def warm(jobs: list[tuple[Layer, int]], dtype: str) -> None:
    """Run every kernel of the jobs once."""
    for layer, batch in jobs:
        try:
            Case(layer, batch, dtype, 0.5, "cuda").ours("whole")
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{layer.model}.{layer.name} batch {batch}: {type(error).__name__}: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the threshold layers on one GPU.")
    parser.add_argument("--models", nargs="+", default=list(MODEL_NAMES), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=430.0, help="stop starting layers after so long (default 430)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "gpu_layers.csv"
    )
    parser.add_argument("--list", action="store_true", help="print the layers and stop; needs no GPU")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.batches) < 1:
        parser.error(f"--batches must be positive; got {options.batches}")
    began = time.monotonic()
    jobs = [(layer, batch) for batch in options.batches for name in options.models for layer in model_layers(name)]
    if options.list:
        for layer, batch in jobs:
            print(f"{layer.model:14} {layer.name:34} batch {batch:4} {layer.shape}")
        return 0
    if not torch.cuda.is_available():
        print("error: gpu_layers.py measures a CUDA GPU and this machine has none (--list works)", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = options.dtype == "tf32"
    if options.warm:
        part, parts = map(int, options.warm.split("/"))
        warm(jobs[part::parts], options.dtype)
        return 0
    if options.workers > 1:
        batches = [str(b) for b in options.batches]
        arguments = ["--models", *options.models, "--dtype", options.dtype, "--batches", *batches]
        warm_in_parallel(jobs, arguments, options.workers)
        print(f"kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not options.out.exists() or not options.out.stat().st_size
    facts, failed, skipped = environment(), 0, []
    with open(options.out, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for layer, batch in jobs:
            label = f"{layer.model}.{layer.name} batch {batch}"
            if time.monotonic() - began > options.seconds:
                skipped.append(label)
                continue
            try:
                rows = list(run_layer(layer, batch, options.dtype, facts))
            except Exception as error:
                failed += 1
                print(f"{label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            writer.writerows(rows)
            file.flush()
            bad = [row for row in rows if str(row["gate"]).startswith("fail") or row.get("error")]
            failed += bool(bad)
            shown = {
                row["density"]: row.get("speedup_vs_dense", "-")
                for row in rows
                if row["provider"] == "ours" and row["mode"] == "whole" and row["graph"]
            }
            print(f"{label} {layer.shape}: whole, graph, dense/ours by density {shown}" + (" RED" if bad else ""))
            sys.stdout.flush()
    if skipped:
        print(f"left out after {options.seconds:.0f} s: {'; '.join(skipped)}")
    print(f"rows in {options.out}; {time.monotonic() - began:.0f} s; layers with a failure: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
