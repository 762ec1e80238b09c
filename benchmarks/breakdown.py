"""Where a compact step's time goes beside what its multiply-accumulates promise: by kind of operator, and by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from spafl_kernels.compact import LayerAudit, audit
from spafl_kernels.training import Unsupported

__all__ = ["by_kind", "excess", "report"]

# Kind of work: parts of operator names, the first that matches counts.
KINDS = {
    "convolution": ("conv",),
    "matrix products of layers": ("::mm", "::addmm", "::mv", "::addmv"),
    "matrix products of attention": ("::bmm", "::baddbmm"),
    "threshold pass and update": ("threshold_step", "threshold_pass", "SGD", "vector_norm", "sgd_step"),
    "normalisation": ("batch_norm", "layer_norm"),
    "activation and pooling": ("pool", "relu", "gelu", "clamp", "threshold_backward", "softmax"),
    "gather, scatter, copy": ("index", "copy", "cat", "fill", "zero", "scatter", "gather", "clone", "pad", "repeat"),
}
OTHER = "other operators"
OUTSIDE = "between operators"


def by_kind(step: Callable[[], object], seconds: float, repeat: int = 3) -> dict[str, float]:
    """Seconds of one step by kind of operator; ``between operators`` is what is left of the measured ``seconds``."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(repeat):
            step()
    found = dict.fromkeys((*KINDS, OTHER, OUTSIDE), 0.0)
    for event in trace.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(p in event.key for p in parts)), OTHER)
        found[kind] += event.self_cpu_time_total / repeat / 1e6
    found[OUTSIDE] = max(0.0, seconds - sum(found.values()))
    return found


def excess(rival: dict[str, float], ours: dict[str, float], ideal: float) -> dict[str, float]:
    """By kind: our seconds beyond the rival's divided by the ideal speed-up, largest first."""
    beyond = {kind: ours[kind] - rival[kind] / ideal for kind in ours}
    return dict(sorted(beyond.items(), key=lambda item: -item[1]))


def report(
    model: nn.Module,
    x: Tensor,
    steps: Mapping[str, Callable[[], object]],
    seconds: Mapping[str, float],
    ideal: float,
    top: int = 4,
) -> str:
    """Lines that say what keeps a compact step from the ideal.

    Args:
        model: with thresholds; not changed.
        x: a batch.
        steps: one step of ``"published"`` and of ``"compact"``.
        seconds: what such a step took when it was measured.
        ideal: the speed-up by multiply-accumulates.
        top: how many causes and layers are named.
    """
    kinds = {name: by_kind(steps[name], seconds[name]) for name in ("published", "compact")}
    goal = seconds["published"] / ideal
    gap = seconds["compact"] - goal
    lines = [
        f"  ideal x{ideal:.2f} = {1e3 * goal:.2f} ms, measured {1e3 * seconds['compact']:.2f} ms: "
        f"{goal / seconds['compact']:.0%} realised, {1e3 * gap:+.2f} ms"
    ]
    for kind, more in list(excess(kinds["published"], kinds["compact"], ideal).items())[:top]:
        if more < 0.01 * seconds["compact"]:
            break
        mine, theirs = kinds["compact"][kind], kinds["published"][kind]
        lines.append(
            f"    {kind}: {1e3 * mine:.2f} ms ({mine / seconds['compact']:.0%} of the step), as published "
            f"{1e3 * theirs:.2f} ms; {1e3 * more:+.2f} ms"
        )
    try:
        layers = audit(copy.deepcopy(model), x).layers
    except Unsupported as error:
        return "\n".join([*lines, f"    layers: {error}"])

    def beyond(layer: LayerAudit) -> float:
        return layer.compact_seconds - layer.masked_seconds * layer.ideal

    for layer in sorted(layers, key=beyond, reverse=True)[:top]:
        if beyond(layer) >= 0.01 * seconds["compact"]:
            lines.append(
                f"    layer {layer.name}: {layer.ideal:.1%} of its MACs in {layer.measured:.1%} of its time; "
                f"{1e3 * beyond(layer):+.2f} ms"
            )
    return "\n".join(lines)
