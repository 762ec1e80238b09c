"""Stage: every kernel against the definition in float64, with errors, not only verdicts; the same bits in every run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import toolkit
from ..clock import tf32
from .device import Visit

# Repeats whose bits are compared; more for the pass, whose programs wait for one another.
REPEATS, PASSES = 3, 20


def launches(where: str, rehearsal: bool) -> list[tuple[str, Callable[[], object]]]:
    """A name and a call that launches its kernels, for every case."""
    _find_tests(rehearsal)
    return [
        (name, lambda c=case, a=allowed, e=estimator, m=mask_bias: _once(_moved(c, where), a, e, m))  # type: ignore[misc]
        for name, _, case, _, allowed, estimator, mask_bias in _cases(rehearsal)
    ]


def _find_tests(rehearsal: bool) -> None:
    """Cases and their definition are those of the tests."""
    toolkit.import_from_tests()
    if rehearsal:
        from support import interpreter

        interpreter.install()


def run(visit: Visit) -> None:
    _assembler(visit)
    _find_tests(visit.rehearsal)
    where = "cpu" if visit.rehearsal else "cuda"
    worst: dict[str, dict[str, float]] = {}
    for name, kind, case, bound, allowed, estimator, mask_bias in _cases(visit.rehearsal):
        if visit.left() < 3:
            visit.wrong(f"no time for {name} and what comes after it")
            break
        try:
            errors, same = _one(case, where, allowed, estimator, mask_bias)
        except Exception as error:
            visit.wrong(f"{name}: {type(error).__name__}: {error}"[:300])
            if "CUDA error" in str(error) or "misaligned" in str(error):
                break  # nothing works in this process any more
            continue
        visit.add("value", case=name, arithmetic=kind, bound=bound, same_bits=same, **errors)
        for what, error in errors.items():
            worst.setdefault(kind, {})[what] = max(error, worst.get(kind, {}).get(what, 0.0))
        if not max(errors.values()) < bound:
            visit.wrong(f"{name}: {max(errors, key=errors.__getitem__)} is off by {max(errors.values()):.1e}")
        if not same:
            visit.wrong(f"{name}: other bits in another run")
    for kind, errors in worst.items():
        visit.add("worst", arithmetic=kind, **errors)
    if visit.left() > 3:
        _whole_model(visit, where)


def _assembler(visit: Visit) -> None:
    """With SPAFL_TOOLKIT_PTXAS=1, kernels are assembled by the toolkit's ptxas instead of Triton's."""
    if os.environ.get("SPAFL_TOOLKIT_PTXAS") != "1":
        return
    path = toolkit.program("ptxas")
    visit.add("assembler", toolkit=path is not None)
    if path is None:
        visit.wrong("the toolkit has no ptxas: nothing is repeated")
    else:
        os.environ["TRITON_PTXAS_PATH"] = path


def _cases(rehearsal: bool) -> Iterator[tuple[str, str, Any, float, bool, Any, bool]]:
    """Name, arithmetic, case, bound, tf32, estimator, mask_bias."""
    import test_gpu
    from support import cases

    for kind, (dtype, allowed, bound) in test_gpu.KINDS.items():
        for shape, (out, geometry, n) in test_gpu.SHAPES.items():
            if rehearsal and (kind != "fp32" or shape != "linear"):
                continue
            all_counts = cases.counts(out)
            # Two densities a shape in every arithmetic, all of them in the most sensitive one.
            chosen = all_counts if kind == "fp32" and not rehearsal else all_counts[2:4]
            for seed, count in enumerate(chosen):
                case = cases.make(out, geometry, n, count, 2, dtype, seed)
                yield (f"{shape} {count}/{out} {kind}", kind, case, bound, allowed,
                       ("identity", "window")[seed % 3 == 1], bool(seed % 2))  # fmt: skip


def _moved(case: Any, where: str) -> Any:
    fields = (f.name for f in dataclasses.fields(case) if f.name != "geometry")
    return dataclasses.replace(case, **{name: getattr(case, name).to(where) for name in fields})


def _once(case: Any, allowed: bool, estimator: Any, mask_bias: bool) -> list[torch.Tensor]:
    """Output and gradients by the kernels."""
    from support import cases

    with tf32(allowed):
        _, _, y, gradients = cases.run(case, estimator, True, mask_bias, allowed)
    return [y, *(g for g in gradients if g is not None)]


def _one(case: Any, where: str, allowed: bool, estimator: Any, mask_bias: bool) -> tuple[dict[str, float], bool]:
    """Errors of output and gradients, and whether repeats gave the same bits."""
    from support import cases

    moved, repeats = _moved(case, where), REPEATS - 1 if where == "cuda" else 0
    got = _once(moved, allowed, estimator, mask_bias)
    again = [_once(moved, allowed, estimator, mask_bias) for _ in range(repeats)]
    same = all(torch.equal(a, b) for other in again for a, b in zip(got, other, strict=True))
    selection, _ = case.selection(estimator)
    want = [cases.expected_output(case, True, mask_bias), *cases.expected_gradients(case, selection, True, mask_bias)]
    names = ("y", "dx", "dw", "dtau", "dbias")
    return {n: cases.error(a.cpu(), b) for n, a, b in zip(names, got, want, strict=True)}, same


def _whole_model(visit: Visit, where: str) -> None:
    """The pass of a model, launch after launch."""
    from support import cases

    from spafl_kernels.gpu import closed_form
    from spafl_kernels.gpu.geometry import Geometry
    from spafl_kernels.gpu.triton import ModelPass

    sizes = ((20, 1, 5, 0), (50, 20, 5, 31)) if visit.rehearsal else (
        (1000, 300, 3, 412), (20, 1, 5, 0), (4096, 64, 1, 4096), (500, 800, 1, 77))  # fmt: skip
    made = [cases.make(out, Geometry(c, k, k, (k, k)), 1, count, 3, seed=out) for out, c, k, count in sizes]
    weights, thresholds = ([getattr(c, n).to(where) for c in made] for n in ("weight", "threshold"))
    model = ModelPass(weights, thresholds)
    want = [closed_form.selection_and_packed(c.weight, c.threshold, "identity", torch.float32) for c in made]
    right = 0
    for turn in range(1 if visit.rehearsal else PASSES):
        if visit.rehearsal:
            from support import interpreter

            with interpreter.options(also=[*weights, *thresholds]):
                model()
        else:
            model()
        right += all(
            torch.equal(selection.count.cpu(), c.keep.sum(1).int()) and torch.equal(packed.cpu(), rows)
            for selection, packed, c, (_, rows) in zip(model.selections, model.packed, made, want, strict=True)
        )
        if right <= turn:
            visit.wrong(f"the pass of a model is wrong in launch {turn}")
            break
    visit.add("pass", launches=turn + 1, right=right)
