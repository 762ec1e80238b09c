"""Models of several clients for the threshold pass, poisoned state, and what its lists must hold."""

from __future__ import annotations

import torch

from spafl_kernels import reference
from spafl_kernels.gpu import cuda_ops

NAN = float("nan")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Filters that are no multiple of a block (8 and 32), rows of one element, odd rows, rows longer than one round of a
# warp.
SHAPES = [(37, 3, 5, 5), (8, 129), (1, 1), (33, 1), (70, 6), (5, 1031), (32, 64)]
POISON = -77


def cohort(clients, density, dtype=torch.float64, shapes=SHAPES, seed=3):
    """Weights in one arena (clients far apart), and thresholds that leave exactly round(density * O) random filters
    active."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(torch.Size(s).numel() for s in shapes)
    arena = torch.randn(clients, size + 16, generator=generator, dtype=torch.float64).to(dtype)
    weights, thresholds, start = [], [], 0
    for shape in shapes:
        end = start + torch.Size(shape).numel()
        weights.append(arena[:, start:end].view(clients, *shape))
        start = end
        scores = torch.stack([reference.filter_scores(w) for w in weights[-1].double()])
        order = torch.rand(scores.shape, generator=generator).argsort(dim=1)
        keep = 1 / shape[0] if density == "one" else density
        active = order < round(keep * shape[0])
        thresholds.append((scores * torch.where(active, 0.7, 1.4)).to(dtype))
    return weights, thresholds


def poisoned(weights, pad_to=None):
    """Output buffers in which any element that is not written shows."""
    state = cuda_ops.mask_state(weights, pad_to)
    for tensor in (state.scores, *state.packed):
        tensor.fill_(NAN)
    for tensor in (state.active, state.inverse, state.counts):
        tensor.fill_(POISON)
    for tensor in (state.mask, state.flipped, state.changed):
        tensor.view(torch.uint8).fill_(0xCB)
    return state


def check_lists(state, weights, masks, former=None):
    """Everything that follows from the masks."""
    for l, weight in enumerate(weights):
        for c in range(weight.shape[0]):
            mask = masks[l][c]
            active = mask.nonzero().flatten()
            filters, count = len(mask), len(active)
            got = state.layer(state.active, l)[c]
            assert got[:count].tolist() == active.tolist()
            assert (got[count:] == -1).all()
            inverse = torch.full((filters,), -1, device=mask.device)
            inverse[active] = torch.arange(count, device=mask.device)
            assert state.layer(state.inverse, l)[c].tolist() == inverse.tolist()
            assert state.counts[c, l] == count
            flipped = torch.ones_like(mask) if former is None else mask != former[l][c]
            assert state.layer(state.flipped, l).view(torch.uint8)[c].tolist() == flipped.int().tolist()
            assert state.changed.view(torch.uint8)[c, l] == int(flipped.any())
            if state.packed:
                packed, padded = state.packed[l][c], -(-count // state.pad_to) * state.pad_to
                assert torch.equal(packed[:count], weight[c][active])
                assert (packed[count:padded] == 0).all()
                assert packed[padded:].isnan().all()  # traffic in proportion to the count: the rest is not touched
