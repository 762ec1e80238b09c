"""Turn the layers of any model into threshold layers, and back into plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from . import reference
from .layers import ThresholdConv1d, ThresholdConv2d, ThresholdConvTranspose2d, ThresholdLayer, ThresholdLinear
from .reference import Estimator

_THRESHOLD_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ThresholdConv1d,
    nn.Conv2d: ThresholdConv2d,
    nn.ConvTranspose2d: ThresholdConvTranspose2d,
    nn.Linear: ThresholdLinear,
}
_NAMES = "nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d and nn.Linear"
_PLAIN_CLASS = {threshold: plain for plain, threshold in _THRESHOLD_CLASS.items()}


def _replace(model: nn.Module, change: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Apply ``change`` to every module once; a module used in several places is replaced by one object everywhere."""
    replaced: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        replaced[id(module)] = change(name, module)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replaced[id(child)]
    return replaced[id(model)]


def _with_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A module of class ``cls`` with the parameters, hooks, mode and settings of ``module`` (not copied)."""
    new = cls.__new__(cls)
    new.__dict__ = {
        key: copy.copy(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()
    }
    return new


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. A weight that hooks compute (weight norm, pruning) is no leaf, and is copied as it is."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _is_computed(module: nn.Module) -> bool:
    """Whether weight or bias is made by hooks before every call, from other parameters."""
    return any(name not in module._parameters and hasattr(module, name) for name in ("weight", "bias"))


def _is_lazy(module: nn.Module) -> bool:
    """Whether a layer of a class that is converted has no weight yet."""
    known = isinstance(module, LazyModuleMixin) and isinstance(module, tuple(_THRESHOLD_CLASS))
    return known and module.has_uninitialized_params()  # type: ignore[misc, operator]


def _call_the_layers_of(model: nn.Module) -> None:
    """``nn.TransformerEncoderLayer`` has a fast path in eval mode that reads the weights of its linear layers without
    calling them, so that no mask would reach them. It is taken only for activations it knows by number."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):  # gives its layers nested tensors, for the same fast path
            name, off = "use_nested_tensor", False
        else:
            continue
        if any(isinstance(m, ThresholdLayer) for m in module.modules()):
            if getattr(module, name, None):
                module.__dict__[_FAST_PATH] = getattr(module, name)
                setattr(module, name, off)
        elif _FAST_PATH in module.__dict__:
            setattr(module, name, module.__dict__.pop(_FAST_PATH))


_FAST_PATH = "_setting_of_the_fast_path"


def convert(
    model: nn.Module,
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    estimator: Estimator = "identity",
    mask_bias: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Replace convolutions and linear layers of a model by threshold layers with the same weights.

    Args:
        model: any module; left alone unless ``inplace``.
        where: ``where(name, layer)`` says whether to convert this layer. By default all plain ``nn.Conv1d``,
            ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``nn.Linear`` are; their subclasses (parametrised layers,
            ``nn.MultiheadAttention.out_proj``) and layers whose weight or bias is computed by hooks (weight norm,
            spectral norm, pruning) stay as they are.
        estimator, mask_bias: passed to the new layers.
        inplace: change ``model`` itself (its Parameters stay the same objects).

    Returns:
        The converted model. Thresholds are 0, so it computes what it did before; that of a frozen weight is frozen too.
        A ``nn.TransformerEncoderLayer`` with converted layers calls them in eval mode too: its fast path does not.

    Raises:
        ValueError: ``where`` names a layer whose weight is computed (a parametrisation such as weight norm), or one
            that its parent reads without calling it (``nn.MultiheadAttention.out_proj``); a mask could not reach it.
            Or a layer to convert is lazy and has no weight yet.
    """
    reference.check_estimator(estimator)
    if not inplace:
        model = copy_of(model)

    def change(name: str, module: nn.Module) -> nn.Module:
        cls = _THRESHOLD_CLASS.get(type(module))
        if _is_lazy(module) and (where is None or where(name, module)):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet; run the model once before it is converted")
        if cls is None:
            # A subclass of a convertible class is skipped by default, and refused when asked for by name.
            kin = isinstance(module, tuple(_THRESHOLD_CLASS)) and not isinstance(module, ThresholdLayer)
            if kin and where and where(name, module):
                raise ValueError(
                    f"layer {name!r} is a {type(module).__name__}, which cannot be converted: only plain "
                    f"{_NAMES} can (parametrised layers and layers that are not called cannot be masked)"
                )
            return module
        if where and not where(name, module):
            return module
        if _is_computed(module):
            if where is None:
                return module
            raise ValueError(
                f"layer {name!r} has a computed weight or bias (weight norm or pruning); remove that first"
            )
        new = _with_class(module, cls)
        new._init_threshold(estimator, mask_bias)  # type: ignore[operator]
        new.threshold.requires_grad_(bool(module.weight.requires_grad))  # type: ignore[operator, union-attr]
        return new

    model = _replace(model, change)
    _call_the_layers_of(model)
    return model


def to_dense(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every threshold layer by the plain layer that computes the same, its mask burned into the weight.

    Args:
        model: any module; left alone unless ``inplace``.
        inplace: change ``model`` itself.

    Returns:
        A model without threshold layers and with the same shapes; pruned rows of weights are 0. Subclasses of the
        threshold layers compute something of their own, which no plain layer does: they are kept as they are.
    """
    if not inplace:
        model = copy_of(model)

    def change(name: str, module: nn.Module) -> nn.Module:
        cls = _PLAIN_CLASS.get(type(module))
        if cls is None or "forward" in module.__dict__:
            return module
        assert isinstance(module, ThresholdLayer)
        with torch.no_grad():
            weight, bias = reference.mask_weight_and_bias(
                module.weight,
                module.threshold,
                module.bias,
                module.estimator,
                module.mask_bias,
                module.transposed_groups,
            )
        new = _with_class(module, cls)
        del new._parameters["threshold"], new.__dict__["estimator"], new.__dict__["mask_bias"]
        new.register_parameter("weight", nn.Parameter(weight, module.weight.requires_grad))
        if bias is not None:
            new.register_parameter("bias", nn.Parameter(bias.detach(), module.bias.requires_grad))
        return new

    model = _replace(model, change)
    _call_the_layers_of(model)
    return model
