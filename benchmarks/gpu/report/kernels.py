"""Stage: where the time of a layer and of a training step goes, kernel by kernel; and steps in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..captured import CapturedCompact
from ..clock import Device, tf32
from ..layers import Case
from ..shapes import layers_of
from ..steps import SETTINGS, DenseTrainer, batches, pruned_model
from .device import Visit, median_us

LAYERS = (("conv4", "conv2"), ("resnet18-full", "layer3.0.conv2"), ("lenet5", "conv1"))
STEPS = (("conv4", 128), ("resnet18-full", 128))
TURNS = 5


def run(visit: Visit) -> None:
    device = visit.device()
    with tf32(True, benchmark=True):
        for model, batch in STEPS[: 1 if visit.rehearsal else None]:
            _steps(visit, device, model, 2 if visit.rehearsal else batch)
        if visit.rehearsal:
            print("no kernels to look at without a GPU")
            return
        for model, name in LAYERS:
            (layer,) = (layer for layer in layers_of(model) if layer.name == name)
            for density in (1.0, 0.5):
                case = Case(layer, 128, "bf16", density, "cuda")
                for provider in ("dense", "ours"):
                    _split(
                        visit, f"{model}.{name}", density, provider, lambda c=case, p=provider: getattr(c, p)("whole")
                    )  # type: ignore[misc]


def _steps(visit: Visit, device: Device, model: str, batch: int) -> None:
    """Steps of a dense model and of the compact engine, in tf32 and under autocast, captured; and their kernels."""
    setting = SETTINGS[model]
    x, y = (t[0] for t in batches(model, 1, batch, device.where, torch.float32))
    x = x.contiguous(memory_format=torch.channels_last)
    for density in (1.0, 0.5, 0.25):
        stock = pruned_model(model, density, 0, device.where, torch.float32)
        for arithmetic, kind in (("tf32", None), ("bf16", torch.bfloat16)):
            made: dict[str, Callable[[], Tensor]] = {}
            if density == 1.0:
                dense = DenseTrainer(copy.deepcopy(stock), setting.options, kind)
                made["dense"] = lambda d=dense: d.step(x, y)  # type: ignore[misc]
            compact = CapturedCompact(copy.deepcopy(stock), setting.options, setting.sample, autocast=kind)
            made["compact-fixed"] = lambda c=compact: c.step(x, y)  # type: ignore[misc]
            for provider, call in made.items():
                us = median_us(device, call, graph=True)
                visit.add(
                    "captured",
                    model=model,
                    batch=batch,
                    density=density,
                    arithmetic=arithmetic,
                    provider=provider,
                    us=us,
                )
                if not visit.rehearsal and (density == 0.5 or provider == "dense"):
                    _split(visit, f"step of {model} {arithmetic}", density, provider, call)


def _split(visit: Visit, of: str, density: float, provider: str, call: Callable[[], object]) -> None:
    for kernel, us, count in split(call):
        visit.add("kernel", of=of, density=density, provider=provider, kernel=kernel, us=us, launches=count)


def split(call: Callable[[], object]) -> list[tuple[str, float, float]]:
    """``(kernel, microseconds, launches)`` per call, the slowest first."""
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
