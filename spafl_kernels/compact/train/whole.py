"""The session of a model without thresholds: nothing is ever pruned, so it trains on the model's own tensors.

What is gained is what the engine does besides skipping: fused operations, convolutions of few channels, channels last.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...optimisers import Options, torch_optimiser, write_back
from ...training import Extra, step_on_gradients
from ..graph.flow import Flow
from ..graph.trace import kept_random_state
from ..plan.plan import Plan
from ..plan.rows import layer_states, norm_states
from ..plan.state import channels_of_norm, slots_of
from ..run.fusion import prefers_channels_last
from ..run.program import Program
from ..run.scope import Scope
from .session import settings_of

__all__ = ["WholeSession"]


class WholeSession:
    """One training after another; the interface is :class:`~spafl_kernels.compact.train.session.Session`'s.

    The optimiser is ``torch.optim``'s, as in the masked engine: any of them, and an extra gradient term.

    Args:
        flow: of a model without threshold layers.
        multiple, compiled, patience: see :class:`~spafl_kernels.compact.CompactTrainer`; there is nothing to wait for.
    """

    rebuilds = 0
    copied: Mapping[nn.Parameter, str] = {}  # every parameter is the model's own

    def __init__(self, flow: Flow, multiple: int, compiled: bool, patience: float) -> None:
        self.flow, self.settings = flow, settings_of(flow)
        self._layers, self._norms = layer_states(flow), norm_states(flow)
        plan = Plan(flow, {}, multiple)
        for norm in self._norms.values():
            norm.set_channels(channels_of_norm(norm, flow, plan))
        slots = slots_of(self._layers), slots_of(self._norms)
        with kept_random_state():  # weights that are computed may be drawn
            self._fill()
        self.program = Program(Scope(flow, plan, *slots, prefers_channels_last(flow), compiled))

    def _fill(self) -> None:
        """Let the forward pass read the model."""
        for layer in self._layers.values():
            layer.lend_whole()
        for norm in self._norms.values():
            m, slot = norm.module, norm.slot
            slot.weight, slot.bias = m.weight, m.bias
            slot.running_mean, slot.running_var = m.running_mean, m.running_var

    def load(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: Options,
        momentum: Mapping[str, Tensor],
        fresh: bool,
        extra: Extra | None = None,
    ) -> None:
        """Take hold of the model's tensors.

        Args:
            parameters: all of the model's, by name.
            options: settings of the training.
            momentum: the optimiser's state; empty where it has none.
            fresh: it starts at 0, and whatever it holds is to be overwritten.
            extra: see :meth:`spafl_kernels.training.Trainer.begin`.
        """
        self.options, self._momentum, self._extra = options, momentum, extra
        self._params = {name: p for name, p in parameters.items() if p.requires_grad}
        self.leaves: list[Tensor] = list(self._params.values())
        if fresh:
            for buffer in momentum.values():
                buffer.zero_()
        self._optimiser = torch_optimiser(options, self._params, (), momentum)
        for norm in self._norms.values():
            norm.read({})

    def refresh(self) -> None:
        """What happens at the start of a forward."""
        self._fill()

    def penalty(self) -> Tensor | None:
        return None

    def rows(self) -> dict[str, tuple[Tensor, Tensor, str]]:
        return {}

    def advance(self, grads: list[Tensor | None]) -> None:
        """One step with the gradients of ``leaves``; the list is emptied."""
        for p, g in zip(self._params.values(), grads, strict=True):
            p.grad = g
        grads.clear()
        step_on_gradients(self._optimiser, self._params, self.options, self._extra)
        self._optimiser.zero_grad()

    def store(self) -> None:
        """Complete the model: all but the number of batches is there after every step."""
        for norm in self._norms.values():
            norm.count_batches()

    def store_momentum(self) -> None:
        """Complete the optimiser's state, after :meth:`store`."""
        write_back(self._optimiser, self._params, self._momentum)
