"""Every kernel once, on small odd shapes, for a tool that watches memory: ``python smoke.py [--device cpu] [--plant]``.

``--plant`` writes one element behind the end of a tensor: what a tool must find before its silence means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from spafl_kernels.gpu import cuda_ops
from spafl_kernels.gpu.geometry import Geometry
from spafl_kernels.gpu.packing import Selection
from spafl_kernels.gpu.triton import ModelPass, layer_backward, layer_forward, select_layer
from support import cases

SHAPES = {
    "linear": (21, Geometry(37), 9),
    "large": (123, Geometry(300), 3),  # more weights than one program takes
    "strided": (18, Geometry(16, 7, 6, (3, 3), (2, 2), (1, 1)), 2),
    "uneven": (17, Geometry(5, 9, 8, (3, 2), (3, 2), (2, 1), (2, 3)), 1),
    "pointwise": (40, Geometry(16, 4, 3), 2),
}


@triton.jit
def write_behind(x, n):
    tl.store(x + n, 1.0)


def layers(device: str) -> None:
    """Pass, forward and backward of every shape, with and without a list of input channels.

    On a CPU, where ``test_interpreter.py`` runs more of them, the shapes that take every kernel.
    """
    for name in SHAPES if device != "cpu" else ("large", "strided"):
        out, geometry, n = SHAPES[name]
        case = cases.make(out, geometry, n, out // 3, clients=2)
        x, w, t, b, dy = (getattr(case, f).to(device) for f in ("x", "weight", "threshold", "bias", "grad"))
        selection, packed, _ = select_layer(w, t, "identity")
        channels = geometry.channels
        keep = torch.arange(channels, device=device) % 2
        inputs = Selection.empty(2, channels, device)
        inputs.count.fill_(int(keep.sum()))
        inputs.index[:, : int(keep.sum())] = keep.nonzero().flatten().int()
        inputs.inverse.copy_(torch.where(keep > 0, keep.cumsum(0) - 1, -1).int())
        inputs.flags.copy_(keep.int())
        for listed in (None, inputs):
            y = layer_forward(x, packed, selection, b, geometry, input_selection=listed)
            gradients = layer_backward(dy, x, w, packed, selection, b, geometry, input_selection=listed)
            assert all(r.isfinite().all() for r in (y, *gradients)), name


def strict(device: str, *tensors: torch.Tensor):
    """On a CPU, the interpreter with its checks; without them it also fails on NumPy 2.4 and newer.

    ``tensors``: those that kernels reach through a table of addresses.
    """
    if device != "cpu":
        return contextlib.nullcontext()
    from support import interpreter

    interpreter.install()
    return interpreter.options(also=tensors)


def model_pass(device: str) -> None:
    """All layers in one table."""
    weights = [torch.randn(s, device=device) for s in ((20, 1, 5, 5), (50, 20, 5, 5), (123, 300), (10, 123))]
    thresholds = [torch.full((len(w),), 0.7, device=device) for w in weights]
    with strict(device, *weights, *thresholds):
        selections = ModelPass(weights, thresholds)()
    assert all(0 <= int(selection.count) <= selection.out for selection in selections)


def cuda_kernels() -> bool:
    """The CUDA C++ kernels, if the extension has them; whether it does."""
    if not cuda_ops.available():
        return False
    weights = [torch.randn(2, *s, device="cuda") for s in ((11, 3), (40, 11, 3, 3))]
    thresholds = [torch.full((2, w.shape[1]), 0.8, device="cuda") for w in weights]
    masks = cuda_ops.mask_state(weights, pad_to=8)
    cuda_ops.threshold_pass(weights, thresholds, masks, compare=False)
    state = cuda_ops.step_state(weights, thresholds, learning_rate=0.1, penalty=0.01, momentum=0.9)
    cuda_ops.fused_step(
        *(weights, [0.1 * w for w in weights], thresholds, [0.1 * t for t in thresholds], [], [], state, masks),
        momentum=0.9, max_norm=1.0,
    )  # fmt: skip
    cuda_ops.active_lists(weights, masks)
    full = weights[1].view(2, 40, 1, 11, 9)
    compact = torch.empty_like(full)
    cuda_ops.compact_gather([full], [compact], masks, [1], [0])
    cuda_ops.compact_scatter([full], [compact], masks, [1], [0])
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plant", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.plant:
        # A whole page of its own: the next bytes belong to nobody.
        x = torch.empty(1 << 20, device=options.device)
        write_behind[(1,)](x, x.numel() + (1 << 20))
        torch.cuda.synchronize()
        return
    with strict(options.device):
        layers(options.device)
    model_pass(options.device)
    extension = options.device == "cuda" and cuda_kernels()
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"every kernel ran on {options.device}; CUDA C++ kernels: {'yes' if extension else 'no'}")


if __name__ == "__main__":
    main()
