"""What methods with single weights pruned share: budgets per layer, masks as bits, sparse messages, prune and grow."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from spafl_kernels import to_dense
from spafl_kernels.training import SGDOptions

from ..cost import Cost
from ..wire import Message
from .client import Client, Evaluation

# No module of a model can have a colon and a dot in these places.
MASK, VALUES, SHAPE = "mask:", "values:", "shape:"
Budget = Literal["erk", "uniform"]


def weight_layers(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all convolutions and linear layers by the name of the layer: what can be pruned."""
    found = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if not found:
        raise ValueError("the model has no convolution or linear layer whose weights could be pruned")
    return found


def prunable(model: nn.Module) -> nn.Module:
    """The configured model without thresholds; ``ValueError`` if it has no weights that could be pruned."""
    model = to_dense(model)
    weight_layers(model)
    return model


def seed_of(model: nn.Module) -> int:
    """A number that is the model's: for draws that server and clients make alike, another in every run."""
    seed = 0
    for tensor in model.state_dict().values():
        seed = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), seed)
    return seed


def budgets(weights: Mapping[str, Tensor], density: float, how: Budget) -> dict[str, int]:
    """How many weights each layer keeps, together ``density`` of all (up to rounding); at least one each.

    ``erk``: the density of a layer is proportional to ``sum of its sizes / product of its sizes``; layers that would
    have more than all are dense (Evci et al., ICML 2020).
    """
    sizes = {name: w.numel() for name, w in weights.items()}
    if how == "uniform":
        return {name: max(1, round(density * size)) for name, size in sizes.items()}
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    dense: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        unit = left / max(sum(raw[n] * sizes[n] for n in sizes if n not in dense), 1e-300)
        over = {name for name in sizes if name not in dense and raw[name] * unit > 1}
        if not over:
            break
        dense |= over
    return {n: s if n in dense else min(s, max(1, round(raw[n] * unit * s))) for n, s in sizes.items()}


def random_masks(weights: Mapping[str, Tensor], kept: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Bool masks with so many ones in each layer, at random places."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, w in weights.items():
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[torch.randperm(w.numel(), generator=generator)[: kept[name]]] = True
        masks[name] = mask.view(w.shape)
    return masks


def largest(values: Tensor, count: int) -> Tensor:
    """Bool, as ``values``: its ``count`` largest entries."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[torch.topk(values.flatten(), count).indices] = True
    return mask.view(values.shape)


def prune_and_grow(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Drop the ``share`` of smallest kept weights, and grow as many by ``|gradient|``, dropped ones among them.

    Returns:
        What of the mask stays, and the new mask: this and what is grown, together as many ones as before.
    """
    kept = int(mask.sum())
    stay = kept - min(round(share * kept), mask.numel() - kept)
    stays = largest(torch.where(mask, weight.abs(), -1.0), stay)
    return stays, stays | largest(torch.where(stays, -1.0, gradient.abs()), kept - stay)


def cosine(start: float, round: int, end: int) -> float:
    """``start / 2 * (1 + cos(pi round / end))``, 0 from ``end`` on."""
    return 0.0 if round >= end else start / 2 * (1 + math.cos(math.pi * round / end))


# -- as messages

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as uint8, eight entries in each, the first in the lowest bit; on the CPU."""
    flat = mask.cpu().flatten()
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8)
    padded[: flat.numel()] = flat
    return (padded.view(-1, 8) * _BITS).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of a shape that :func:`pack` has packed; what is beyond it is not looked at."""
    size = torch.Size(shape)
    flat = (bits.unsqueeze(1) & _BITS.to(bits.device)).ne(0).flatten()
    return flat[: size.numel()].view(size)


def weight_name(layer: str) -> str:
    """The name of a layer's weight in a state dict; a model that is one layer has no prefix."""
    return f"{layer}.weight" if layer else "weight"


def layers_of(message: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Names of the layers that have a tensor with this prefix."""
    return [name.removeprefix(prefix) for name in message if name.startswith(prefix)]


def rest_of(message: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are sent whole."""
    return {name: t for name, t in message.items() if not name.startswith((MASK, VALUES))}


def sparse_values(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kept weights of every layer as vectors, in the order of the dense tensor."""
    return {VALUES + name: weights[name][mask].detach().cpu().clone() for name, mask in masks.items()}


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """The dense tensor of some kept weights."""
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense[mask.to(values.device)] = values
    return dense


@torch.no_grad()
def load_sparse(model: nn.Module, message: Message, masks: Mapping[str, Tensor]) -> None:
    """Fill a model from kept values, with zeros elsewhere, and from tensors that were sent whole."""
    own = model.state_dict()
    for name, mask in masks.items():
        own[weight_name(name)].copy_(scattered(message[VALUES + name], mask))
    for name, tensor in rest_of(message).items():
        own[name].copy_(tensor)


def mask_fault(message: Mapping[str, Tensor], server: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the masks of a message that has the right form: their number of ones; None if nothing is.

    Args:
        server: holds the shapes of the layers.
    """
    for layer in layers_of(message, MASK):
        ones = int(unpack(message[MASK + layer], server[SHAPE + layer].tolist()).sum())
        if ones != len(message[VALUES + layer]):
            return f"the mask of layer {layer!r} keeps {ones} weights and {len(message[VALUES + layer])} are sent"
    return None


def densities_of(masks: Mapping[str, Tensor], evaluation: Evaluation) -> Evaluation:
    """The evaluation, with the share of each layer that the masks keep."""
    evaluation.densities = {name: mask.double().mean().item() for name, mask in masks.items()}
    return evaluation


# -- at the client


def dense_gradients(client: Client, layers: Iterable[str], round: int) -> tuple[dict[str, Tensor], Cost]:
    """Gradients of the loss of one batch for whole weights, whatever is masked; the model is left as it was.

    The batch is one of the client's at random, not augmented. The cost is that of one step.
    """
    model, n = client.model, len(client.train)
    chosen = client.stream("regrow", round).permutation(n)[: client.local.batch_size]
    x, y = client.train[torch.from_numpy(chosen)]
    x = client.as_input(x)
    found: dict[str, Tensor] = {}

    def keep(parameters: Mapping[str, nn.Parameter]) -> None:
        for layer in layers:
            p = parameters[weight_name(layer)]
            found[layer] = torch.zeros_like(p) if p.grad is None else p.grad.clone()

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # A step of length 0 has the trainer's checks and its count.
    client.trainer.begin(SGDOptions(lr=0.0), extra=keep)
    client.run_sgd(round, [(x, y.to(x.device))])
    result = client.trainer.finish()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    macs = 3.0 * len(chosen) * sum(client.macs.values())
    return found, Cost(paper_macs=macs, executed_macs=result.macs)
