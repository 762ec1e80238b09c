"""The layers that are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from spafl.models import MODELS
from spafl_kernels import ThresholdConv2d, ThresholdLinear
from spafl_kernels.gpu.geometry import Geometry

MODEL_NAMES = ("conv4", "resnet18-full", "lenet5", "vit")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One distinct layer shape.

    ``rows``: images, or rows of a linear layer, that one sample gives. ``repeats``: how often the model has the shape.
    """

    model: str
    name: str
    out: int
    geometry: Geometry
    rows: int
    linear: bool
    repeats: int = 1

    @property
    def shape(self) -> str:
        g = self.geometry
        if self.linear:
            return f"{g.channels}->{self.out}"
        return f"{g.kernel[0]}x{g.kernel[1]} {g.channels}->{self.out} @{g.height}x{g.width} s{g.stride[0]}"


def model_layers(name: str) -> list[Layer]:
    """Every distinct threshold layer of a model of ours, in order of execution."""
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
            before = found.get(key)
            found[key] = (
                dataclasses.replace(before, repeats=before.repeats + 1)
                if before
                else Layer(name, label, key[0], g, rows, linear)
            )

        return hook

    for label, module in model.named_modules():
        if isinstance(module, ThresholdConv2d | ThresholdLinear):
            module.register_forward_hook(note(label))
    with torch.no_grad():
        model(torch.zeros(1, channels, info.image, info.image))
    return list(found.values())


# ImageNet ResNet-50, images of 224x224, stride on the 3x3 convolutions: blocks per stage, width of the 3x3, image size.
_STAGES = ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))


def resnet50_layers() -> list[Layer]:
    """The 23 distinct convolutions and the linear layer of ImageNet ResNet-50."""

    def conv(name: str, size: int, kernel: int, stride: int, c: int, out: int, repeats: int) -> Layer:
        half = kernel // 2
        g = Geometry(c, size, size, (kernel, kernel), (stride, stride), (half, half))
        return Layer("resnet50", name, out, g, 1, False, repeats)

    layers = [conv("stem", 224, 7, 2, 3, 64, 1)]
    before = 64
    for number, (blocks, width, size) in enumerate(_STAGES, 1):
        wide, stride, outer = 4 * width, 1 if number == 1 else 2, size if number == 1 else 2 * size
        stage = f"stage{number}"
        layers.append(conv(f"{stage}.first.reduce", outer, 1, 1, before, width, 1))
        same_spatial = blocks if stride == 1 else blocks - 1
        if stride == 2:
            layers.append(conv(f"{stage}.first.spatial", outer, 3, 2, width, width, 1))
        layers.append(conv(f"{stage}.spatial", size, 3, 1, width, width, same_spatial))
        # In the first stage the shortcut has the shape of the expansion: 1x1 64->256 @56x56.
        layers.append(conv(f"{stage}.expand", size, 1, 1, width, wide, blocks + (stride == 1)))
        if stride == 2:
            layers.append(conv(f"{stage}.shortcut", outer, 1, 2, before, wide, 1))
        layers.append(conv(f"{stage}.reduce", size, 1, 1, wide, width, blocks - 1))
        before = wide
    layers.append(Layer("resnet50", "fc", 1000, Geometry(2048), 1, True))
    return layers


def layers_of(name: str) -> list[Layer]:
    """The distinct layers of a model by name, ``resnet50`` included."""
    return resnet50_layers() if name == "resnet50" else model_layers(name)
