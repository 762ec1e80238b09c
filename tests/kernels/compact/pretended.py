"""A pretended accelerator: tensors that compute on the CPU, say they are elsewhere, and tell what a step asks of them.

PyTorch without CUDA refuses tensors of device ``cuda``, so they claim to be on ``meta``: every branch on a device that
is not the CPU is taken, values stay real, and autograd runs. What is not seen is what only a CUDA kernel does.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from spafl_kernels.compact.graph import inputs

aten = torch.ops.aten
WHERE = torch.device("meta")
# Operators that wait for the device, because the host needs a value or the size of a result.
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.isin, aten.bincount,
}  # fmt: skip


class Pretended(torch.Tensor):
    """``held`` computes."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=WHERE
        )
        self.held = held
        return self

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.to("cpu").tolist()

    def __repr__(self):
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of an Accelerator")


inputs.PLAIN.add(Pretended)  # it stands for a plain tensor of another device


class _Factory(TorchFunctionMode):
    """``torch.tensor``, which is no operator."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == WHERE:
            self.asked["torch.tensor to the device"] += 1
            return Pretended(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class Accelerator(TorchDispatchMode):
    """Runs what is pretended while the context is open; there is at most one.

    Attributes:
        asked: what waited for the device or moved data between it and the host, and how often.
        ran: operators by name, and how often.

    Raises:
        AssertionError: an operator got tensors of both devices.
    """

    def __init__(self):
        super().__init__()
        self.asked, self.ran = Counter(), Counter()
        self._factory = _Factory(self.asked)

    def __enter__(self):
        self._factory.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._factory.__exit__(*error)

    @property
    def waits(self):
        """How often the host has waited."""
        return sum(n for what, n in self.asked.items() if not what.endswith("not waiting"))

    def forget(self):
        self.asked.clear()
        self.ran.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        there = any(isinstance(v, Pretended) for v in leaves)
        stays = there
        if kwargs.get("device") is not None:
            stays = torch.device(kwargs["device"]) == WHERE
            if leaves and stays != there:
                free = ", not waiting" if stays and kwargs.get("non_blocking") else ""
                self.asked[f"{func} {'to' if stays else 'from'} the device{free}"] += 1
        if there:
            self._check(func, args, kwargs, leaves)
        if there or stays:
            self.ran[func.overloadpacket] += 1
        made = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        out = func(*tree_map(_held, args), **tree_map(_held, made))
        if not stays:
            return out
        out = tree_map(lambda v: Pretended(v) if isinstance(v, torch.Tensor) else v, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out

    def _check(self, func, args, kwargs, leaves):
        packet, host = func.overloadpacket, [v for v in leaves if not isinstance(v, Pretended)]
        if packet is aten.copy_ and host:
            self.asked[f"{func} {'to' if isinstance(args[0], Pretended) else 'from'} the device"] += 1
            return
        assert all(v.dim() == 0 for v in host), f"{func} got tensors of two devices: {[v.shape for v in host]}"
        waits = packet in WAITS or (packet is aten.repeat_interleave and kwargs.get("output_size") is None)
        if packet in (aten.index, aten.index_put_, aten.index_put):
            waits = any(v is not None and v.dtype == torch.bool for v in args[1])
            waits = waits and not (packet is aten.index_put_ and args[2].numel() == 1)  # masked_fill
        if waits:
            self.asked[str(func)] += 1


def _held(value):
    return value.held if isinstance(value, Pretended) else value


def moved(value):
    """A tensor, or a copy of a model, on the pretended device."""
    if isinstance(value, torch.Tensor):
        return Pretended(value)
    model = copy.deepcopy(value)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(Pretended(p.detach()))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = Pretended(b)
    return model


def back(model):
    """Parameters and buffers of a model on the pretended device, by name."""
    return {n: t.held for n, t in (*model.named_parameters(), *model.named_buffers())}
