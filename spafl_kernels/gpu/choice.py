"""Which implementation a layer uses on a GPU, by what runs there and by the tables of :mod:`.tables.choices`.

A choice of the dense operator by measurement is no fallback. Without any table the packed kernels run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, settings
from ..backend import Backend, Explanation
from .tables import choices, classes

# Present does not mean imported: importing triton is left to the first kernel launch.
HAS_TRITON = importlib.util.find_spec("triton") is not None
LOWEST_CAPABILITY = (8, 0)
NO_TRANSPOSED = "transposed convolutions have no packed kernels"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a choice by measured tables depends on, all of it known to the host.

    ``positions``: output positions of the batch, or rows of a linear layer. ``density``: the largest share of active
    filters that the layer may be taken to have; 1 if nobody looked.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    channels: int
    out: int
    positions: int
    dtype: str
    density: float = 1.0


def on_gpu(tensor: Tensor) -> bool:
    """Whether a layer with this weight takes the operators."""
    return tensor.is_cuda


def unsupported(input: Tensor, weight: Tensor, groups: int = 1) -> str | None:
    """Why the Triton kernels cannot run this layer on this GPU tensor, or None if they can."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'spafl-kernels[triton]')"
    if torch.version.hip is not None:
        return "the kernels are written for CUDA, this is a ROCm build of PyTorch"
    if groups != 1:
        return f"groups must be 1 for the packed kernels; got groups={groups}"
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            return f"{name} must be float32, float16 or bfloat16 for the kernels; got {tensor.dtype}"
    if not torch.compiler.is_compiling() and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(input.device)
        if capability < LOWEST_CAPABILITY:
            return f"the kernels need compute capability 8.0 or newer; this device has {capability[0]}.{capability[1]}"
    return None


def table_of(index: int) -> choices.Table | None:
    """The table for the device with this index, or None."""
    return choices.SHELF.given() or choices.SHELF.for_index(index)


def _measured(index: int) -> bool:
    return table_of(index) is not None


def _look_up(index: int, way: choices.Way, *work: Any) -> tuple[Backend, str]:
    """Choice and reason for the fields of a :class:`Work`; integers and words only, for ``torch.compile``."""
    table = table_of(index)
    assert table is not None
    high, wide, down, right, channels, out, positions, dtype, step = work
    shape = classes.shape_class((high, wide), (down, right), channels, out, positions)
    return table.look_up(shape, dtype, way, classes.DENSITIES[step])


# torch.compile calls them once and keeps the answers: a table does not change while a program runs.
_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]
_look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _host_unknowing() -> str | None:
    """Why the host cannot look at a count now, or None if it can."""
    if torch._C._are_functorch_transforms_active():
        return "under torch.func transforms"
    if torch.compiler.is_compiling():
        return "in compiled code"
    if _recording or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return "while a CUDA graph is captured"
    return None


# Whether what runs eagerly now is what will be recorded next.
_recording = False


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Layers choose as they do while a CUDA graph is captured, so that an eager step is what its recording will be."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def way() -> choices.Way:
    """How a layer runs now: compiled code waits for launches no more than a CUDA graph does."""
    return "eager" if _host_unknowing() is None else "graph"


def choose(input: Tensor, weight: Tensor, groups: int, work: Work) -> Explanation:
    """The choice for GPU tensors; raises nothing and warns about nothing."""
    if backend.REQUESTED == "reference":
        return Explanation("reference", "SPAFL_BACKEND=reference asks for it")
    blind = _host_unknowing()
    if backend.REQUESTED == "narrow" and groups == 1 and blind is None:
        return Explanation("narrow", "SPAFL_BACKEND=narrow asks for it")
    if backend.REQUESTED == "narrow":
        reason = f"groups must be 1; got groups={groups}" if groups != 1 else f"the host cannot see counts {blind}"
        return Explanation("reference", reason, fallback=True)
    missing = unsupported(input, weight, groups)
    if missing is not None:
        return Explanation("reference", missing, fallback=True)
    if backend.REQUESTED == "triton":
        return Explanation("triton", "SPAFL_BACKEND=triton asks for it")
    if torch._C._are_functorch_transforms_active():
        return Explanation("triton", "under torch.func transforms the packed kernels run; tables are about one layer")
    index = input.device.index or 0
    if not _measured(index):
        return Explanation(
            "triton", "the packed kernels run, which skip pruned filters; no times were measured on this device"
        )
    # By comparisons, so that a symbolic size of torch.compile becomes a number that holds for the whole class.
    sizes = (
        *(classes.exact(n) for n in (*work.kernel, *work.stride)),
        *(classes.power_up(work.channels), classes.power_up(work.out), classes.power_down(work.positions)),
    )
    found, why = _look_up(index, way(), *sizes, work.dtype, classes.density_step(work.density))
    return Explanation(found, why)


_warned: set[str] = set()


def fall_back(reason: str) -> None:
    """Say, once per reason, that a layer on a GPU runs the dense operator; an error in strict mode.

    Raises:
        RuntimeError: ``SPAFL_STRICT`` is set.
    """
    message = f"a threshold layer on the GPU runs the dense operator on masked weights, without skipping: {reason}"
    if settings.strict():
        raise RuntimeError(f"SPAFL_STRICT is set, and {message}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, stacklevel=5)


_CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_MATMUL: Any = torch.backends.cuda.matmul


def tf32(conv: bool) -> bool:
    """Whether PyTorch's own operator would round float32 operands to tf32.

    ``allow_tf32`` sets ``fp32_precision``; but reading ``allow_tf32`` raises once the newer setting has been used.
    """
    return (_CONV if conv else _MATMUL).fp32_precision == "tf32"  # type: ignore[no-any-return]


tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the getter is C++, which cannot be traced


def arithmetic(input: Tensor, conv: bool) -> str:
    """Name of the arithmetic of a layer on this input, as tables have it; autocast counts."""
    kind, device = input.dtype, input.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    if kind == torch.float32:
        return "tf32" if tf32(conv) else "fp32"
    return "bf16" if kind == torch.bfloat16 else "fp16"


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def linear_work(input: Tensor, weight: Tensor, density: float) -> Work:
    """What a linear layer does with ``input`` of ``(..., in)``."""
    rows = input.numel() // max(1, input.shape[-1])
    return Work((1, 1), (1, 1), weight.shape[1], weight.shape[0], rows, arithmetic(input, conv=False), density)


def conv_work(
    input: Tensor, weight: Tensor, stride: int | Sequence[int], padding: int | Sequence[int] | str,
    dilation: int | Sequence[int], density: float,
) -> Work:  # fmt: skip
    """What a convolution does with ``input`` of ``(N, in, H, W)`` or ``(in, H, W)``."""
    kernel, steps, dilations = (weight.shape[2], weight.shape[3]), _pair(stride), _pair(dilation)
    positions = input.shape[0] if input.dim() == 4 else 1
    for i in (0, 1):
        size, reach = input.shape[i - 2], dilations[i] * (kernel[i] - 1)
        both = reach if padding == "same" else 0 if isinstance(padding, str) else 2 * _pair(padding)[i]
        positions *= (size + both - reach - 1) // max(1, steps[i]) + 1
    return Work(kernel, steps, weight.shape[1], weight.shape[0], positions, arithmetic(input, conv=True), density)
