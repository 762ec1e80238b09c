"""The models published with SpaFL, with the published tensor names, and the registry that builds them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .conv4 import Conv4
from .lenet import LeNet5
from .resnet import ResNet18
from .vit import ViT

__all__ = ["MODELS", "Conv4", "LeNet5", "ModelInfo", "ResNet18", "ViT", "build_model", "register_model"]


@dataclass(frozen=True)
class ModelInfo:
    """``build(classes=..., in_channels=...)`` makes the model; ``image`` is the height and width it takes."""

    build: Callable[..., nn.Module]
    image: int


MODELS: dict[str, ModelInfo] = {
    "lenet5": ModelInfo(LeNet5, 28),
    "conv4": ModelInfo(Conv4, 32),
    "resnet18": ModelInfo(ResNet18, 32),
    "resnet18-full": ModelInfo(partial(ResNet18, width=64), 32),
    "vit": ModelInfo(ViT, 32),
}


def register_model(name: str, build: Callable[..., nn.Module], image: int) -> None:
    """Make ``model.name = "name"`` available to runs; ``build(classes=, in_channels=)`` returns the model."""
    if name in MODELS:
        raise ValueError(f"a model named {name!r} exists already")
    MODELS[name] = ModelInfo(build, image)


def build_model(name: str, classes: int, in_channels: int, seed: int | None = None) -> nn.Module:
    """Build a registered model; with ``seed`` its initialisation repeats and leaves global random state alone."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    if seed is None:
        return MODELS[name].build(classes=classes, in_channels=in_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].build(classes=classes, in_channels=in_channels)
