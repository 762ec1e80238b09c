"""Gather and scatter between full and compact tensors against plain indexing."""

from __future__ import annotations

import pytest
import torch

from spafl_kernels.gpu import cuda_ops

NAN = float("nan")
FILTERS = (11, 40, 6)


def lists(clients, density, seed=2):
    """A mask state with random lists, as a threshold pass leaves them."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.rand(clients, f, 1, generator=generator) + 0.1 for f in FILTERS]
    thresholds = []
    for weight in weights:
        keep = torch.rand(weight.shape[:2], generator=generator) < density
        thresholds.append(weight[..., 0] * torch.where(keep, 0.5, 2.0))
    masks = cuda_ops.mask_state(weights)
    cuda_ops.threshold_pass(weights, thresholds, masks, compare=False)
    return masks


def tensors(clients, dtype, masks, seed=4):
    """A convolution after layer 0, its channels_last twin, its bias, a linear layer after a flattened 2 x 2 map, and a
    first layer."""
    generator = torch.Generator().manual_seed(seed)
    full_shapes = [(40, 1, 11, 9), (40, 9, 11, 1), (40, 1, 1, 1), (6, 1, 40, 4), (11, 1, 3, 25)]
    row_layers, column_layers = [1, 1, 1, 2, 0], [0, 0, -1, 1, -1]
    most = masks.counts.max(dim=0).values.tolist()

    def capacity(layer, size):
        return size if layer < 0 else max(8, -(-most[layer] // 8) * 8)  # rounded up as the compact engine does

    full = [torch.randn(clients, *s, generator=generator).to(dtype) for s in full_shapes]
    compact = [
        torch.full((clients, capacity(r, s[0]), s[1], capacity(c, s[2]), s[3]), NAN, dtype=dtype)
        for s, r, c in zip(full_shapes, row_layers, column_layers)
    ]
    return full, compact, row_layers, column_layers


def kept(masks, layer, client, size):
    if layer < 0:
        return torch.arange(size)
    return masks.layer(masks.mask, layer)[client].nonzero().flatten()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clients", [1, 3])
def test_gather_then_scatter(one_schedule, clients, density, dtype):
    masks = lists(clients, density)
    full, compact, row_layers, column_layers = tensors(clients, dtype, masks)
    before = one_schedule.emu_launches()
    short = cuda_ops.compact_gather(full, compact, masks, row_layers, column_layers)
    assert one_schedule.emu_launches() - before == 1
    assert short.tolist() == [[0] * len(full)] * clients
    for f, t, r, c in zip(full, compact, row_layers, column_layers):
        for client in range(clients):
            rows, columns = kept(masks, r, client, f.shape[1]), kept(masks, c, client, f.shape[3])
            expected = torch.zeros_like(t[client])
            expected[: len(rows), :, : len(columns)] = f[client][rows][:, :, columns]
            assert torch.equal(t[client], expected)

    changed = [2 * t + 1 for t in compact]  # padding is no longer zero: it must not be written back
    target = [f.clone() for f in full]
    short = cuda_ops.compact_scatter(target, changed, masks, row_layers, column_layers)
    assert not short.any()
    for f, new, t, r, c in zip(full, target, changed, row_layers, column_layers):
        for client in range(clients):
            rows, columns = kept(masks, r, client, f.shape[1]), kept(masks, c, client, f.shape[3])
            expected = f[client].clone()
            grid = torch.meshgrid(rows, columns, indexing="ij")
            expected[grid[0], :, grid[1]] = t[client][: len(rows), :, : len(columns)].transpose(1, 2)
            assert torch.equal(new[client], expected)


def test_too_little_room_is_reported(one_schedule):
    masks = lists(2, 1.0)
    full = torch.randn(2, 40, 1, 11, 9)
    compact = torch.full((2, 38, 1, 8, 9), NAN)
    for copy in (cuda_ops.compact_gather, cuda_ops.compact_scatter):
        assert copy([full], [compact], masks, [1], [0]).tolist() == [[5], [5]]  # 2 rows and 3 columns
    assert torch.equal(compact, full[:, :38, :, :8])


def test_clients_in_an_arena(one_schedule):
    masks = lists(3, 0.5)
    arena = torch.randn(3, 1000)
    full = arena[:, 3 : 3 + 40 * 11].view(3, 40, 1, 11, 1)
    compact = torch.full((3, 40, 1, 11, 1), NAN)
    untouched = arena.clone()
    cuda_ops.compact_gather([full], [compact], masks, [1], [0])
    cuda_ops.compact_scatter([full], [compact], masks, [1], [0])
    assert torch.equal(arena, untouched)


def test_more_tensors_than_one_launch_holds(one_schedule):
    masks = lists(2, 0.5)
    full = [torch.randn(2, 6, 1, 2, 1) for _ in range(100)]
    compact = [torch.full((2, 6, 1, 2, 1), NAN) for _ in full]
    short = cuda_ops.compact_gather(full, compact, masks, [2] * 100, [-1] * 100)
    assert not short.any()
    for client in range(2):
        rows = kept(masks, 2, client, 6)
        for f, t in zip(full, compact):
            assert torch.equal(t[client, : len(rows)], f[client, rows])
            assert (t[client, len(rows) :] == 0).all()
