"""Models drawn at random (random_models.py): trained, called, evaluated and exported they equal the masked model.

Thresholds move in between, so that filters die and come back.
"""

import copy
import random
from functools import partial
from unittest import mock

import pytest
import torch
from random_models import call, draw, fix_norms, mask, usable

from spafl_kernels.compact import CompactModule, CompactTrainer
from spafl_kernels.compact.export import _exported
from spafl_kernels.compact.train.session import Session
from spafl_kernels.training import MaskedTrainer, SGDOptions, Unsupported

TOLERANCE = 1e-8
FAST, ALL = range(8), range(300)


def loss_of(out, y=None):
    """Depends on every number in another way."""
    total = 0
    for t in out.values() if isinstance(out, dict) else [out]:
        weights = torch.cos(torch.arange(t.numel(), dtype=t.dtype).view(t.shape) * 1.7)
        total = total + (t * weights).sum() / len(t) + 0.05 * (t * t).mean()
    return total


def assert_close(ours, right, what):
    if isinstance(right, dict):
        assert ours.keys() == right.keys(), what
        for key, value in right.items():
            assert_close(ours[key], value, f"{what} {key}")
    elif ours is not None or right is not None:
        ours = torch.zeros_like(right) if ours is None else ours
        right = torch.zeros_like(ours) if right is None else right
        scale = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(ours, right, rtol=0, atol=TOLERANCE * scale, msg=lambda text: f"{what}: {text}")


def assert_same_state(twin, model, what, gradients=False):
    for kind in ("named_parameters", "named_buffers"):
        for (name, right), (_, ours) in zip(getattr(twin, kind)(), getattr(model, kind)(), strict=True):
            assert_close(ours, right, f"{what}: {name}")
            if gradients and kind == "named_parameters":
                assert_close(ours.grad, right.grad, f"{what}: gradient of {name}")


def samples(shapes, count, generator):
    return [torch.randn(count, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def new_masks(models, seed):
    for model in models:
        mask(model, random.Random(seed), torch.Generator().manual_seed(seed))


def called(model, shapes, seed):
    """A CompactModule in a loop of its own, with gradients in eval mode too."""
    twin, choice, generator = copy.deepcopy(model), random.Random(seed), torch.Generator().manual_seed(seed)
    compact = CompactModule(model, strict=True, multiple=choice.choice([1, 8]), verify="never")
    sides = []
    for m, run in ((twin, twin), (model, compact)):
        fix_norms(m)
        trained = [p for p in m.parameters() if p.requires_grad]
        sides.append((m, run, torch.optim.SGD(trained, lr=3e-3, momentum=0.9, weight_decay=1e-3)))
    for k in range(5):
        if k % 2:
            new_masks((twin, model), seed + k)
        if k == 3:
            twin.eval(), model.eval()
        batch, results = samples(shapes, 3, generator), []
        for _, run, optimiser in sides:
            optimiser.zero_grad()
            inputs = [t.clone().requires_grad_() for t in batch]
            torch.manual_seed(k)
            out = call(run, inputs)
            loss_of(out).backward()
            results.append((out, inputs))
        (right, right_inputs), (ours, our_inputs) = results
        assert_close(ours, right, f"output {k}")
        for a, b in zip(our_inputs, right_inputs):
            assert_close(a.grad, b.grad, f"gradient of an input {k}")
        assert_same_state(twin, model, f"call {k}", gradients=True)
        for _, _, optimiser in sides:
            optimiser.step()
    with torch.no_grad():
        for count in (1, 4):
            batch, results = samples(shapes, count, generator), []
            for run in (twin, compact):
                torch.manual_seed(count)
                results.append(call(run, batch))
            assert_close(results[1], results[0], f"evaluation of {count}")
    assert compact.engine == "compact"


def trained(model, shapes, seed):
    twin, choice, generator = copy.deepcopy(model), random.Random(seed), torch.Generator().manual_seed(seed)
    kind = choice.choice(["compiled", "plain", "gpu"])
    momentum = choice.choice([0, 0.9, 0.9])
    options = SGDOptions(
        lr=3e-3, momentum=momentum, nesterov=momentum > 0 and choice.random() < 0.3, weight_decay=choice.choice([0,
        0.01]),
        max_grad_norm=choice.choice([None, 5.0]), penalty=choice.choice([0.0, 0.1, 0.1]),
        collapse_floor=choice.choice([None, 0.05]), threshold_lr=choice.choice([None, None, 0.02]),
    )  # fmt: skip
    settings = {"multiple": choice.choice([1, 8]), "patience": choice.choice([0, 0.1, 1e9])}
    compact = CompactTrainer(model, loss_of, True, compiled=kind == "compiled", verify="never", **settings)
    masked = MaskedTrainer(twin, loss_of)
    masked.counts_macs = False
    masked.hits = compact.hits = lambda out, y: out.sum()
    momenta = [None, None]
    if momentum and choice.random() < 0.5:
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        start = {n: 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters}
        momenta = [start, {name: v.clone() for name, v in start.items()}]
    densities, sides = None, (masked, compact)

    def both(what, do):
        results = []
        for trainer in sides:
            torch.manual_seed(k)
            results.append(do(trainer))
        assert_close(results[1], results[0], f"{kind}, training {part}, {what} {k}")
        for trainer in sides:
            fix_norms(trainer.model)

    # Plans and memory order as a GPU wants them.
    with mock.patch("spafl_kernels.compact.trainer.Session", partial(Session, gpu=kind == "gpu")):
        for part in range(3):
            if part:
                new_masks((twin, model), seed + part)
            for trainer, buffers in zip(sides, momenta):
                trainer.begin(options, buffers, densities)
                fix_norms(trainer.model)
            for k in range(4):
                (x,) = samples(shapes, 3, generator)
                both("step", lambda trainer: trainer.step(x, x))  # noqa: B023
                if k % 2:
                    y = torch.zeros(3, dtype=torch.int64)
                    both("evaluation", lambda trainer: trainer.evaluate(x, y)[0])  # noqa: B023
            right, ours = (trainer.finish() for trainer in sides)
            if not all(bool(p.isfinite().all()) for p in twin.parameters()):
                return  # it ran away
            assert_same_state(twin, model, f"{kind}, training {part}")
            assert ours.densities == right.densities
            assert_close(dict(ours.momentum), dict(right.momentum), f"{kind}, training {part}, momentum")
            densities = right.densities
    assert compact.engine == "compact"


def exported(model, shapes, seed):
    small = _exported(model.eval(), shapes[0])
    with torch.no_grad():
        for count in (1, 4):
            (x,) = samples(shapes, count, torch.Generator().manual_seed(seed))
            results = []
            for run in (model, small):
                torch.manual_seed(count)
                results.append(run(x))
            assert_close(results[1], results[0], f"export, batch {count}")


@pytest.mark.filterwarnings("ignore:every filter of")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("seeds", [FAST, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("way", [called, trained, exported])
def test_a_random_model_is_the_masked_model(seeds, way):
    compared = 0
    for seed in seeds:
        model, shapes = draw(seed)
        if not usable(model, shapes) or (len(shapes) > 1 and way is not called):
            continue
        try:
            way(copy.deepcopy(model), shapes, seed)
        except Unsupported as error:
            # Its parts are; only a model of which all threshold layers stand apart is not.
            assert "no threshold layer" in str(error)
            continue
        except Exception as error:
            error.add_note(f"draw({seed})")
            raise
        compared += 1
    assert compared > len(seeds) / 3
