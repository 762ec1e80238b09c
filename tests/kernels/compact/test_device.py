"""What the compact trainer asks of a device that is not the CPU, and that it computes the same there."""

import copy

import pytest
import torch
from helpers import batches, prune
from pretended import Accelerator, back, moved

from spafl.models import LeNet5, ResNet18, ViT
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.compact.spread import Spread
from spafl_kernels.training import MaskedTrainer, SGDOptions

EVERYTHING = SGDOptions(lr=0.02, momentum=0.9, weight_decay=1e-3, max_grad_norm=1.0, penalty=0.003, collapse_floor=0.01)
MODELS = {
    "lenet5": (LeNet5, (1, 28, 28)),
    "resnet18": (lambda: ResNet18(10, width=8), (3, 32, 32)),
    "vit": (lambda: ViT(10), (3, 32, 32)),
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
        trainer = CompactTrainer(there, strict=True)
        trainer.begin(EVERYTHING)
        for x, y in batches(image, 4, 2):
            device.forget()
            got, want = trainer.step(moved(x), moved(y)), masked.step(x, y)
            torch.testing.assert_close(got.held, want, rtol=1e-9, atol=1e-9)
            waits.append(sum(device.asked.values()))
        trainer.finish(), masked.finish()
    for (key, got), want in zip(back(there).items(), masked.model.parameters()):
        torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}")
    # The second also makes the table of powers that pruned rows move by.
    assert waits[1:] == [2 if name != "vit" else 1, 1, 1]


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
        spread = Spread(moved(place), 6, 1, False)
        leaves = [moved(t).requires_grad_() for t in (x, c, into)]
        got = spread(leaves[0], leaves[1] if constants else None, leaves[2] if stream else None)
        assert torch.equal(got.detach().held, want)
        assert got.is_contiguous(memory_format=order)
        used = [leaf for leaf, there in zip(leaves, (True, constants, stream)) if there]
        grads = torch.autograd.grad(got.sum(), used)
        assert torch.equal(grads[0].held[:, :3], torch.ones(2, 3, 3, 3)) and not grads[0].held[:, 3].any()
        assert not any("mm" in str(op) for op in device.ran)
