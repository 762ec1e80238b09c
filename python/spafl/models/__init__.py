"""The models published with SpaFL, with the published tensor names, and the registry that builds them by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from spafl_kernels import convert
from spafl_kernels.functional import threshold_layers

from .. import plugins
from ..checked import short
from ..errors import UserError
from .conv4 import Conv4
from .lenet import LeNet5
from .resnet import ResNet18
from .vit import ViT

__all__ = ["MODELS", "Conv4", "LeNet5", "ModelInfo", "ResNet18", "ViT", "build_model", "fit_model", "register_model"]


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


def build_model(
    name: str,
    classes: int,
    in_channels: int,
    seed: int | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a registered model, or one of the user's by import path.

    Args:
        name: a registered name, or ``module:Net``: a class or function that returns an ``nn.Module``. It gets what it
            has parameters for of ``classes``, ``in_channels``, ``shape`` (of one sample, as the model sees it),
            ``image`` (the height of square images) and ``features`` (numbers in one sample), and its ``options``.
        seed: the initialisation repeats, and global random state is left alone.
        shape: of one sample; ``(in_channels, size, size)`` of a registered model by default.
        options: the rest of its parameters, checked against its signature.

    Raises:
        ValueError: unknown name, options that do not fit, or a plug-in that fails; says which line of whose code.
    """
    if name not in MODELS and not plugins.is_path(name):
        raise ValueError(f"unknown model {short(name)}; known: {', '.join(MODELS)}")
    where = "model.name"
    build = plugins.find(where, name) if plugins.is_path(name) else MODELS[name].build
    if shape is None:
        size = MODELS[name].image if name in MODELS else 32
        shape = (in_channels, size, size)
    given: dict[str, Any] = {"classes": classes, "in_channels": in_channels, "shape": shape, "features": prod(shape)}
    if len(shape) == 3 and shape[1] == shape[2] and plugins.is_path(name):
        given["image"] = shape[1]
    with contextlib.ExitStack() as repeated:
        if seed is not None:
            repeated.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed)
        if not plugins.is_path(name) and not options:
            return build(classes=classes, in_channels=in_channels)
        model = plugins.call(where, build, given, options or {})
        if not isinstance(model, nn.Module):
            raise UserError(
                f"{where}: {plugins.place(build)} must return an nn.Module; it returned a {type(model).__name__}"
            )
        return model


def fit_model(name: str, model: nn.Module, sample: Tensor, outputs: int) -> nn.Module:
    """A model that takes ``sample``, with threshold layers: a plain one of the user's is converted.

    Args:
        name: of :func:`build_model`, for messages.
        sample: two inputs ``(2, *shape)``.
        outputs: numbers the model must give for each.

    Raises:
        UserError: the model has no ``forward``, fails on the sample or gives something else.
    """
    what = f"model.name: {plugins.place(model)}" if plugins.is_path(name) else f"model {name}"
    training = model.training
    try:
        # Lazy layers get their weights here. In eval mode no running statistic moves.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = model.eval()(sample)
    except NotImplementedError:
        raise UserError(f"{what} has no forward") from None
    except Exception as error:
        shape = ", ".join(map(str, sample.shape[1:]))
        raise UserError(f"{what} does not take inputs of shape (n, {shape}): {plugins.explain(error)}") from None
    finally:
        model.train(training)
    if not isinstance(out, Tensor) or out.shape != (len(sample), outputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise UserError(f"{what} must return (n, {outputs}) for n samples; for {len(sample)} it returned {got}")
    if plugins.is_path(name) and not any(True for _ in threshold_layers(model)):
        return convert(model, inplace=True)
    return model
