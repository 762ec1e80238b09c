"""Run the masked and the compact trainer side by side and compare everything they keep."""

from __future__ import annotations

import copy

import torch
from torch import nn

from spafl_kernels import threshold_layers
from spafl_kernels.compact import CompactTrainer
from spafl_kernels.training import MaskedTrainer, SGDOptions


def prune(model: nn.Module, density: float, seed: int = 0, spread: float = 0.0) -> nn.Module:
    """Set thresholds so that ``density`` of each layer's filters are active (random ones); the rest sit above."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in threshold_layers(model):
            scores = layer.scores()
            rows = len(scores)
            active = torch.zeros(rows, dtype=torch.bool)
            active[torch.randperm(rows, generator=generator)[: round(density * rows)]] = True
            noise = 1 + spread * torch.rand(rows, generator=generator, dtype=scores.dtype)
            layer.threshold.copy_(torch.where(active, scores * (0.97 / noise), scores * 1.03 * noise))
    return model


def batches(shape, count, batch, classes=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(0, classes, (batch,), generator=generator)


def compare(
    model: nn.Module,
    options: SGDOptions,
    data,
    *,
    evaluate_every: int = 0,
    start_momentum: float = 0.0,
    rounds: int = 1,
    tolerance: float = 1e-9,
    trainer: CompactTrainer | None = None,
    meddle=None,
):
    """Train twins and assert equality; returns (masked result, compact result, compact trainer, mask flips)."""
    data = list(data)
    twin = copy.deepcopy(model)
    masked, compact = MaskedTrainer(twin), trainer or CompactTrainer(model, strict=True, verify="never")
    momentum = [None, None]
    if options.momentum:
        generator = torch.Generator().manual_seed(5)
        start = {
            n: start_momentum * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in model.named_parameters()
        }
        momentum = [start, {n: v.clone() for n, v in start.items()}]
    densities = None
    flips, last = 0, None
    for part in range(rounds):
        if meddle is not None and part:
            meddle(twin)
            meddle(model)
        for t, m in zip((masked, compact), momentum):
            t.begin(options, m, densities)
        for k, (x, y) in enumerate(data[part::rounds]):
            torch.manual_seed(k)
            a = masked.step(x, y)
            torch.manual_seed(k)
            b = compact.step(x, y)
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=_at(f"loss at step {k}"))
            now = masked._densities.tolist()
            flips += last is not None and now != last
            last = now
            if evaluate_every and k % evaluate_every == evaluate_every - 1:
                for p, q in zip(masked.evaluate(x, y), compact.evaluate(x, y), strict=True):
                    torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
        ra, rb = masked.finish(), compact.finish()
        assert_equal_state(twin, model, ra, rb, tolerance)
        densities = ra.densities
    assert compact.engine == "compact"
    return ra, rb, compact, flips


def compare_steps(model: nn.Module, options: SGDOptions, data, tolerance: float = 1e-9) -> None:
    """Single steps from equal states: each step starts from what the masked trainer left."""
    twin = copy.deepcopy(model)
    masked, compact = MaskedTrainer(twin), CompactTrainer(model, strict=True, verify="never")
    momentum = [{n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    densities = None
    for k, (x, y) in enumerate(data):
        results = []
        for trainer, buffers in zip((masked, compact), momentum):
            trainer.begin(options, buffers, densities)
            torch.manual_seed(k)
            loss = trainer.step(x, y)
            results.append((loss, trainer.finish()))
        (a, ra), (b, rb) = results
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        assert_equal_state(twin, model, ra, rb, tolerance)
        model.load_state_dict(twin.state_dict())
        for name, v in momentum[0].items():
            momentum[1][name].copy_(v)
        densities = ra.densities


def _at(where):
    return lambda text: f"{where}: {text}"


def assert_equal_state(twin, model, ra, rb, tolerance):
    for (name, p), q in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance, msg=_at(name))
    assert ra.densities == rb.densities
    assert ra.steps == rb.steps
    assert ra.momentum.keys() == rb.momentum.keys()
    for name, v in ra.momentum.items():
        torch.testing.assert_close(rb.momentum[name], v, rtol=tolerance, atol=tolerance, msg=_at(f"momentum {name}"))
