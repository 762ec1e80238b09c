"""Stage: where the time of a layer goes, kernel by kernel."""

from __future__ import annotations

import torch

from ..clock import tf32
from ..layers import Case
from ..shapes import layers_of
from .device import Visit

LAYERS = (("conv4", "conv2"), ("resnet18-full", "layer3.0.conv2"), ("lenet5", "conv1"))
TURNS = 5


def run(visit: Visit) -> None:
    if visit.rehearsal:
        print("no kernels to look at without a GPU")
        return
    for model, name in LAYERS:
        (layer,) = (layer for layer in layers_of(model) if layer.name == name)
        for density in (1.0, 0.5):
            case = Case(layer, 128, "bf16", density, "cuda")
            for provider in ("dense", "ours"):
                with tf32(True, benchmark=True):
                    for kernel, us, count in split(lambda c=case, p=provider: getattr(c, p)("whole")):  # type: ignore[misc]
                        visit.add(
                            "kernel", layer=f"{model}.{name}", density=density, provider=provider, kernel=kernel,
                            us=us, launches=count,
                        )  # fmt: skip


def split(call: object) -> list[tuple[str, float, float]]:
    """``(kernel, microseconds, launches)`` per call, the slowest first."""
    assert callable(call)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TURNS):
            call()
        torch.cuda.synchronize()
    found = [
        (event.key[:80], event.self_device_time_total / TURNS, event.count / TURNS)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda f: -f[1])
