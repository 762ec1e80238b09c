"""What the compact trainer asks of a device that is not the CPU, and that it computes the same there."""

import copy

import pytest
import torch
from helpers import batches, prune
from pretended import WHERE, Accelerator, back, moved
from random_models import CLASSES, IMAGE, draw, usable
from torch import nn

from spafl.models import LeNet5, ResNet18, ViT
from spafl_kernels import ThresholdConv2d, ThresholdLinear
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.compact.run.spread import Spread
from spafl_kernels.training import MaskedTrainer, SGDOptions

EVERYTHING = SGDOptions(lr=0.02, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0, penalty=0.003, collapse_floor=0.01)
MODELS = {
    "lenet5": (LeNet5, (1, 28, 28)),
    "resnet18": (lambda: ResNet18(10, width=8), (3, 32, 32)),
    "vit": (lambda: ViT(10, image=16, dim=32, depth=2, heads=2), (3, 16, 16)),
}


@pytest.mark.parametrize("name, spread", [("lenet5", 0.05), ("resnet18", 0.02), ("vit", 1.0)])
def test_a_step_waits_once_while_the_masks_stay(name, spread):
    """And trains as the masked model does."""
    torch.manual_seed(0)
    build, image = MODELS[name]
    model = prune(build().double(), 0.6, spread=spread)
    masked = MaskedTrainer(copy.deepcopy(model))
    masked.begin(EVERYTHING)
    waits = []
    with Accelerator() as device:
        there = moved(model)
        trainer = CompactTrainer(there, strict=True, verify="never")
        trainer.begin(EVERYTHING)
        for x, y in batches(image, 4, 2):
            device.forget()
            got, want = trainer.step(moved(x), moved(y)), masked.step(x, y)
            torch.testing.assert_close(got.held, want, rtol=1e-9, atol=1e-9)
            waits.append(device.waits)
        trainer.finish(), masked.finish()
    for (key, got), want in zip(back(there).items(), masked.model.parameters()):
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}")
    # The second also makes the table of powers that pruned rows move by.
    assert waits[1:] == [2 if name != "vit" else 1, 1, 1]


def test_a_new_plan_waits_as_often_whatever_the_layers():
    """Questions are put to copies on the host, not to the device layer by layer."""
    waits = []
    for blocks in (1, 5):
        body = [
            part for _ in range(blocks) for part in (ThresholdConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        ]
        layers = [ThresholdConv2d(2, 8, 3), nn.ReLU(), *body, nn.Flatten(), ThresholdLinear(8 * 25, 5)]
        model = prune(nn.Sequential(*layers).double(), 0.5)
        data = list(batches((2, 7, 7), 2, 2, classes=5))
        with Accelerator() as device:
            trainer = CompactTrainer(moved(model), strict=True, verify="never", patience=0)
            trainer.begin(EVERYTHING)
            trainer.step(*map(moved, data[0]))
            tau = trainer._session._tau
            tau.copy_(tau.flip(0))
            device.forget()
            trainer.step(*map(moved, data[1]))
            assert trainer._session.rebuilds == 1
            waits.append(device.waits)
    assert waits[0] == waits[1] < 20, waits


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("constants, stream", [(False, False), (True, False), (False, True), (True, True)])
def test_channels_are_moved_without_a_product(order, constants, stream):
    """A product in tf32 would round them."""
    torch.manual_seed(0)
    place = torch.tensor([1, 2, 5])
    x, c, into = torch.randn(2, 4, 3, 3).to(memory_format=order), torch.randn(3), torch.randn(2, 6, 3, 3)
    want = into.to(memory_format=order) if stream else torch.zeros(2, 6, 3, 3)
    want = want.index_add(1, place, x[:, :3])
    if constants:
        want = want.index_add(1, torch.tensor([0, 3, 4]), c.view(1, 3, 1, 1).expand(2, 3, 3, 3))
    with Accelerator() as device:
        spread = Spread(place, 6, 1, False, WHERE)
        leaves = [moved(t).requires_grad_() for t in (x, c, into)]
        got = spread(leaves[0], leaves[1] if constants else None, leaves[2] if stream else None)
        assert torch.equal(got.detach().held, want)
        assert got.is_contiguous(memory_format=order)
        used = [leaf for leaf, there in zip(leaves, (True, constants, stream)) if there]
        grads = torch.autograd.grad(got.sum(), used)
        assert torch.equal(grads[0].held[:, :3], torch.ones(2, 3, 3, 3)) and not grads[0].held[:, 3].any()
        assert not any("mm" in str(op) for op in device.ran)


def plain(seed):
    """A random model that draws no numbers, makes no tensors, writes nowhere, and is trained as a whole; else None."""
    model, shapes = draw(seed)
    text = " ".join(f"{step} {step.function}" for step in model.steps)
    other = len(shapes) > 1 or any(word in text for word in ("ropout", "of_map", "in_place", "inplace=True"))
    other = other or model.fixed or not all(p.requires_grad for p in model.parameters()) or not usable(model, shapes)
    return None if other or model(torch.zeros(2, *IMAGE, dtype=torch.float64)).shape != (2, CLASSES) else model


@pytest.mark.parametrize("patience, seeds", [(0, range(0, 20)), (0.1, range(20, 40)), (1e9, range(40, 60))])
def test_random_graphs_elsewhere(seeds, patience):
    """No operator gets tensors of two devices, and all state is that of the masked model, through changes of masks."""
    models = [model for seed in seeds if (model := plain(seed)) is not None][:4]
    for model in models:
        elsewhere(model, patience)


def elsewhere(model, patience):
    options = SGDOptions(lr=1e-3, momentum=0.9, weight_decay=0.01, max_grad_norm=5.0, penalty=0.1, collapse_floor=0.05)
    masked = MaskedTrainer(copy.deepcopy(model))
    start = {n: torch.full_like(p, 0.01) for n, p in model.named_parameters()}
    masked.begin(options, start)
    with Accelerator():
        there = moved(model)
        trainer = CompactTrainer(there, strict=True, verify="never", patience=patience)
        momentum = {n: moved(torch.full_like(p, 0.01)) for n, p in model.named_parameters()}
        trainer.begin(options, momentum)
        for x, y in batches(IMAGE, 3, 3, classes=CLASSES):
            trainer.step(moved(x), moved(y)), masked.step(x, y)
            for got, want in zip(trainer.evaluate(moved(x), moved(y)), masked.evaluate(x, y), strict=True):
                torch.testing.assert_close(got.held, want, rtol=1e-7, atol=1e-7)
        trainer.finish(), masked.finish()
    state = dict(masked.model.named_parameters()) | dict(masked.model.named_buffers())
    for name, got in back(there).items():
        torch.testing.assert_close(got, state[name].detach(), rtol=1e-7, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")
    for name, got in momentum.items():
        torch.testing.assert_close(got.held, start[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("density", [1.0, 0.6])
def test_tensors_begin_where_kernels_of_a_gpu_can_read_them(multiple, density):
    """A classifier with ten biases had moved every weight behind them off 16 bytes, and cuDNN's kernels failed."""
    torch.manual_seed(0)
    body = [ThresholdConv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), ThresholdConv2d(9, 7, 3), nn.ReLU()]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(7 * 9, 10))
    prune(model.double(), density)
    masked = MaskedTrainer(copy.deepcopy(model))
    masked.begin(EVERYTHING)
    with Accelerator():
        there = moved(model)
        trainer = CompactTrainer(there, strict=True, verify="never", multiple=multiple)
        trainer.begin(EVERYTHING)
        for x, y in batches((3, 5, 5), 4, 3):
            got, want = trainer.step(moved(x), moved(y)), masked.step(x, y)
            torch.testing.assert_close(got.held, want, rtol=1e-9, atol=1e-9)
        arena = trainer._session._arena
        pieces = [piece for share in arena.shares.values() for piece in share.pieces]
        assert len(pieces) > 6 and all(piece.at * arena.flat.element_size() % 32 == 0 for piece in pieces)
        for start, size in arena.gaps:
            for flat in (arena.flat, arena.grad, arena.velocity):
                assert not flat.held[start : start + size].any()
        assert arena.gaps if multiple == 1 else True
        trainer.finish(), masked.finish()
    for (key, got), want in zip(back(there).items(), masked.model.parameters()):
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}")
