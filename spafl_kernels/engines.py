"""The engines that can train a model, and the choice between them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn
from torch.nn import functional as F

from . import settings
from .captured import CapturedTrainer
from .compact import CompactTrainer
from .compact.captures import Batch, Verdict
from .compact.plan.estimate import Judge
from .compact.verify import Verify
from .training import Loss, MaskedTrainer, Trainer, Unsupported

__all__ = ["Engine", "make_trainer"]

Engine = Literal["auto", "masked", "compact"]


def make_trainer(
    model: nn.Module,
    engine: Engine = "auto",
    loss: Loss = F.cross_entropy,
    *,
    strict: bool | None = None,
    verify: Verify = "first",
    verdicts: Mapping[Batch, Verdict] | None = None,
) -> Trainer:
    """A trainer for ``model``; its ``engine`` and ``reason`` say what runs and why.

    Args:
        model: the resident model, on its final device.
        engine: ``"masked"``, ``"compact"``, or ``"auto"``: compact where it runs the model exactly and is expected to
            gain, else masked. What is expected comes from a table of prices (:mod:`.compact.plan.estimate`), the masks
            and the batch, never from a clock: a training that is repeated, in whichever process, makes the same choice.
            On a GPU "auto" is the masked model, whose steps are replayed from CUDA graphs
            (:class:`~spafl_kernels.captured.CapturedTrainer`): the compact engine runs there too, but asks the host at
            every step whether a mask changed.
        loss: see :class:`spafl_kernels.training.Trainer`.
        strict: raise where the compact engine cannot run the model instead of taking the masked one; by default what
            the environment variable ``SPAFL_STRICT`` says. Where it can and is not expected to gain, "auto" is masked.
        verify: when the compact engine compares itself with the masked one, see
            :class:`~spafl_kernels.compact.CompactTrainer`.
        verdicts: of a copy of ``model``, see :meth:`~spafl_kernels.compact.CompactTrainer.verdicts_on`.

    Raises:
        ValueError: unknown engine or ``verify``.
        Unsupported: strict, and the compact engine cannot run this model.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}; got {engine!r}")
    if strict is None:
        strict = settings.strict()
    if engine == "masked":
        return MaskedTrainer(model, loss)
    device = next((p.device.type for p in model.parameters()), "cpu")
    if engine == "auto" and device != "cpu":
        return CapturedTrainer(model, loss) if device == "cuda" else MaskedTrainer(model, loss, f"it runs on {device}")
    try:
        judge = Judge() if engine == "auto" else None
        return CompactTrainer(model, loss, strict, verify=verify, judge=judge, verdicts=verdicts)
    except Unsupported as error:
        if strict:
            raise
        if engine == "compact":
            warnings.warn(f"engine 'compact' cannot run this model, using 'masked': {error}", stacklevel=2)
        return MaskedTrainer(model, loss, reason=str(error))
