"""What a loss reads of a model past its output: a proximal term, a regulariser written into the loss.

During a compact training the model's own tensors are not complete, and nobody asks for their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["read_outside"]


def read_outside(loss: Tensor, out: Any, names: Mapping[nn.Parameter, str]) -> str | None:
    """Name of a parameter that ``loss`` depends on otherwise than through ``out``; None if there is none.

    Args:
        loss: with its graph.
        out: what the model returned.
        names: of the parameters that are looked for.
    """
    seen = {t.grad_fn for t in tree_leaves(out) if isinstance(t, Tensor)}
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (name := names.get(getattr(node, "variable", None))) is not None:  # type: ignore[arg-type]
            return name
        pending += [before for before, _ in node.next_functions]
    return None
