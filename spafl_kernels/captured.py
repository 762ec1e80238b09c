"""Local training by CUDA graphs: one step is recorded for each size of batch, and replayed in one launch.

An eager step of a small model is a hundred launches and more, which take the host ten times as long as the device takes
for what they start. A recorded step is all of them at once, with the masks that there are when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from . import backend, eager
from .compact.captures import Batch, Captured, Captures, Recent
from .compact.graph.inputs import ONE, Form, inputs_of
from .compact.graph.watch import modes_of
from .gpu.choice import recording, tf32
from .gpu.graphs import CudaRecorder, Recorder, era
from .optimisers import Options, SGDOptions
from .shared_pass import share
from .tensor_sgd import TensorSGD
from .training import Extra, Given, Loss, MaskedTrainer, TrainResult, Unsupported, arguments_of

__all__ = ["CapturedTrainer"]

REPLAYED = "steps are replayed from CUDA graphs"
MOST = 256  # recorded steps: each kind and size of batch has one
# A replay may differ from the eager step by sums in another order, as two eager steps may.
TOLERANCE = 1e-2


class _Recordings(Recent[Hashable, Any]):
    """What was recorded, by what it is."""

    most = MOST


class _Met(Recent[Hashable, None]):
    """What has run eagerly once."""

    most = 4 * MOST


class _Same:
    """A key that is equal to itself alone, whatever it holds."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


@dataclass(frozen=True)
class _Place:
    """What a recorded step has taken in besides the model's code: addresses, and settings that are no tensors."""

    tensors: tuple[tuple[str, int], ...]
    trained: tuple[str, ...]
    settings: tuple[Hashable, ...]

    @classmethod
    def of(cls, model: nn.Module, trained: Mapping[str, Tensor], options: SGDOptions) -> _Place:
        o = options
        settings = o.momentum, o.weight_decay, o.nesterov, o.max_grad_norm, o.collapse_floor, o.penalty_scales is None
        return cls(_addresses(model), tuple(trained), (*settings, bool(o.penalty), _spared(options)))


def _spared(options: SGDOptions) -> frozenset[str]:
    """The layers that the penalty leaves alone: where ``exp(-tau)`` is infinite, a coefficient of 0 would give NaN."""
    return frozenset(name for name in options.penalty_scales or () if not options.penalty_of(name))


def _addresses(model: nn.Module) -> tuple[tuple[str, int], ...]:
    return tuple((name, t.data_ptr()) for name, t in (*model.named_parameters(), *model.named_buffers()))


class _Fixed:
    """Tensors that recorded steps work on, besides the model's: they stay where they are from training to training."""

    def __init__(
        self, options: SGDOptions, parameters: Mapping[str, nn.Parameter], layers: list[tuple[str, Any]],
        densities: Tensor, thresholds: set[str],
    ) -> None:  # fmt: skip
        self.densities = densities
        self.recorded = _Recordings()
        self.met = _Met()
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()} if options.momentum else {}
        self.optimiser = TensorSGD(parameters, thresholds, self.momentum, options)
        self.shared = share([layer for _, layer in layers])
        trained = {name: layer.threshold for name, layer in layers if layer.threshold.requires_grad}
        spared = _spared(options)
        self._thresholds, self._names = list(trained.values()), [name for name in trained if name not in spared]
        self._pulled = [trained[name] for name in self._names]
        self._each = options.penalty_scales is not None
        kind = self._thresholds[0] if self._thresholds else densities
        self._penalties = torch.zeros(len(self._names) if self._each else 1, dtype=kind.dtype, device=kind.device)
        self.extra: Extra | None = self._pull if options.penalty and self._thresholds else None

    @torch.no_grad()
    def start(self, options: SGDOptions, densities: Tensor, momentum: Mapping[str, Tensor]) -> None:
        """Take what a training begins with; ``momentum`` is empty where it begins without."""
        self.densities.copy_(densities)
        if self.momentum and momentum:
            torch._foreach_copy_(list(self.momentum.values()), [momentum[name] for name in self.momentum])
        elif self.momentum:
            torch._foreach_zero_(list(self.momentum.values()))
        self.optimiser.set_rates(options)
        values = [options.penalty_of(name) for name in self._names] if self._each else [options.penalty]
        self._penalties.copy_(torch.tensor(values, dtype=self._penalties.dtype))

    @torch.no_grad()
    def store(self, momentum: Mapping[str, Tensor]) -> None:
        """Write the momentum into these tensors."""
        torch._foreach_copy_([momentum[name] for name in self.momentum], list(self.momentum.values()))

    def _pull(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the penalty's gradient ``-c exp(-tau)``, whose coefficients are on the device."""
        for tau in self._thresholds:
            if tau.grad is None:
                tau.grad = torch.zeros_like(tau)
        if not self._pulled:
            return
        grads: list[Any] = [tau.grad for tau in self._pulled]
        pull = torch._foreach_neg(self._pulled)
        torch._foreach_exp_(pull)
        torch._foreach_mul_(pull, list(self._penalties.unbind()) if self._each else self._penalties[0])
        torch._foreach_sub_(grads, pull)


@dataclass
class _Recorded:
    """What was recorded: of which reading of the model, what it reads, what runs it, and where its results are."""

    captured: Captured[None]
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Any
    numbers: int
    era: int = field(default_factory=era)


class CapturedTrainer(MaskedTrainer):
    """Equal to :class:`~spafl_kernels.training.MaskedTrainer` on a CUDA device, most of its steps replayed.

    The first step of every size of batch runs eagerly; then it is recorded, and the first recording of a model is
    compared with an eager step before any is used. The forwards of evaluations are recorded in the same way. Recordings
    hold for any weights, masks, rates and penalties. What the model was read to be, by the same means as for the
    compact engine, is compared with what it is before every step.

    Eager run, and ``reason`` says why: models that cannot be read so, or that wait for the device; Adam; trainings with
    an extra gradient term; steps that somebody watches (modes, hooks on saved tensors, anomaly detection, autocast).
    The loss must be a function of its arguments alone: of tensors that it holds the contents are read at every step,
    numbers are not.

    Args:
        model, loss: see :class:`~spafl_kernels.training.Trainer`.
        recorder: what records; on a CUDA device CUDA graphs by default.
    """

    engine = "captured"

    def __init__(self, model: nn.Module, loss: Loss = F.cross_entropy, recorder: Recorder | None = None) -> None:
        super().__init__(model, loss, reason=REPLAYED)
        self._recorder = recorder
        self._captures: Captures[None] = Captures(model, "training", "never", lambda flow, tensors: None)
        self._places: Recent[_Place, _Fixed] = Recent()
        self._fixed: _Fixed | None = None  # of this training, if anything of it can be recorded
        self._given: dict[str, Tensor] = {}
        self._compared: dict[str, Captured[None]] = {}  # by what was recorded: of which reading one has been compared
        self._refused: tuple[Captured[None], str] | None = None

    # -- a training ------------------------------------------------------------------------------------------------

    def _hold(self, densities: Tensor, momentum: dict[str, Tensor]) -> None:
        self._fixed = None
        if (reason := _never(self._options, self._extra)) is not None:
            self.engine, self.reason = "masked", reason
            super()._hold(densities, momentum)
            return
        assert isinstance(self._options, SGDOptions)
        place = _Place.of(self.model, self._params, self._options)
        fixed = self._places.get(place)
        if fixed is None:
            layers, thresholds = self._layers, self._threshold_names()
            fixed = _Fixed(self._options, self._params, layers, densities.clone(), thresholds)
            self._places[place] = fixed
        fixed.start(self._options, densities, momentum)
        self._fixed, self._given = fixed, momentum
        self._densities, self._momentum, self._optimizer = fixed.densities, fixed.momentum, fixed.optimiser
        self._shared, self._extra = fixed.shared, fixed.extra
        self.engine, self.reason = "captured", REPLAYED

    def finish(self) -> TrainResult:
        if self._result is None and self._open and self._fixed is not None:
            if self._given:
                self._fixed.store(self._given)
                self._momentum = self._given
            self._fixed = None
        return super().finish()

    def _objective(self, loss: Tensor) -> Tensor:
        return super()._objective(loss) if self._fixed is None else loss

    # -- steps and forwards ----------------------------------------------------------------------------------------

    def _step(self, x: Given, y: Any) -> Tensor:
        def step(x: Given, y: Any) -> Tensor:
            # The counting is within that of the caller, so that a recording has it all.
            with self._executed.counting(), recording():
                return super(CapturedTrainer, self)._step(x, y)

        if not isinstance(y, Tensor) or not torch.is_grad_enabled():
            return step(x, y)
        return self._through("step", step, x, y, (_Same(self.loss),))  # type: ignore[no-any-return]

    @torch.no_grad()
    def evaluate(self, x: Given, y: Tensor) -> tuple[Tensor, Tensor]:
        self._modes = modes_of(self.model)
        return super().evaluate(x, y)

    def _answer(self, x: Given) -> Any:
        def answer(x: Given, y: None) -> Any:
            with recording():
                return super(CapturedTrainer, self)._answer(x)

        return self._through("answer", answer, x, None, ())

    def _through(self, what: str, run: Callable[[Given, Any], Any], x: Given, y: Tensor | None, more: Hashable) -> Any:
        """``run(x, y)``: eagerly, or by what was recorded of it."""
        fixed = self._fixed
        if fixed is None or not _unwatched(self._densities):
            return run(x, y)
        kind, tensors = self._kind_of(x)
        captured = None if kind is None else self._read(kind, tensors, what)
        if kind is None or captured is None:
            self.engine = "masked"
            return run(x, y)
        self.engine, self.reason = "captured", REPLAYED
        inputs = [*tensors] if y is None else [*tensors, y]
        shapes = tuple((t.shape, t.dtype, t.stride()) for t in inputs)
        key = what, kind, shapes, more, self._surroundings()
        recorded = fixed.recorded.get(key)
        if recorded is not None and recorded.captured is captured and recorded.era == era():
            for mine, given in zip(recorded.inputs, inputs, strict=True):
                mine.copy_(given)
            recorded.replay()
            self._executed.numbers += recorded.numbers
            return tree_map_only(Tensor, Tensor.clone, recorded.result)
        if key not in fixed.met:
            fixed.met[key] = None
            return run(x, y)
        return self._record(what, key, captured, kind, inputs, run, x, y)

    def _record(
        self, what: str, key: Hashable, captured: Captured[None], kind: Batch, inputs: list[Tensor],
        run: Callable[[Given, Any], Any], x: Given, y: Tensor | None,
    ) -> Any:  # fmt: skip
        """Run eagerly, and record that for those that follow."""
        assert self._fixed is not None
        compare = self._compared.get(what) is not captured
        before = self._state() if compare else {}
        if self._recorder is None:
            self._recorder = CudaRecorder(self._densities.device)
        with self._recorder.watching() as waits:
            eagerly = run(x, y)
        if waits:
            return self._refuse(captured, f"it waits for the device ({waits[0]})", eagerly)
        addresses, numbers = _addresses(self.model), self._executed.numbers
        mine = [torch.empty_like(t).copy_(t) for t in inputs]
        args, kwargs = kind.form.call(mine if y is None else mine[:-1])
        call: Given = mine[0] if kind.form is ONE else kwargs or args
        try:
            replay, result = self._recorder(lambda: run(call, None if y is None else mine[-1]))
        except RuntimeError as error:
            return self._refuse(captured, f"it cannot be recorded: {str(error).splitlines()[0]}", eagerly)
        numbers, self._executed.numbers = self._executed.numbers - numbers, numbers
        if _addresses(self.model) != addresses:
            return self._refuse(captured, "a forward puts other tensors in place of the model's buffers", eagerly)
        if compare:
            after = self._state() | _results(eagerly)
            self._put(before)
            replay()
            off = _difference(self._state() | _results(result), after, before)
            self._put(after)
            if not off <= TOLERANCE:
                return self._refuse(captured, f"a recorded step differs from an eager one by {off:.1e}", eagerly)
            self._compared[what] = captured
        self._fixed.recorded[key] = _Recorded(captured, mine, replay, result, numbers)
        return eagerly

    def _refuse(self, captured: Captured[None], reason: str, result: Any) -> Any:
        self._refused, self.engine, self.reason = (captured, reason), "masked", reason
        for p in self._params.values():  # in memory that belongs to the recording
            p.grad = None
        return result

    def _read(self, kind: Batch, tensors: list[Tensor], what: str) -> Captured[None] | None:
        """What the model was read to be for such batches; None if nothing is to be recorded."""
        pattern = 0 if what == "step" else 1
        captured = self._captures.get(kind)
        if captured is None or captured.changed(pattern) is not None:
            modes = self._modes if pattern else modes_of(self.model)
            try:
                captured = self._captures.of(kind, tensors, modes, pattern)
            except Unsupported as error:
                self.reason = str(error)
                return None
        if self._refused is not None and self._refused[0] is captured:
            self.reason = self._refused[1]
            return None
        return captured

    def _kind_of(self, x: Given) -> tuple[Batch | None, list[Tensor]]:
        try:
            form, tensors = Form.of(*arguments_of(x))
        except Unsupported as error:
            self.reason = str(error)
            return None, []
        return Batch(form, inputs_of(tensors)[0], variant=self.form), tensors

    def _surroundings(self) -> Hashable:
        """Settings by which PyTorch and this package choose what runs."""
        known = tuple(layer.known_density for _, layer in self._layers)
        frozen = tuple(p.requires_grad for p in self._parameters.values())
        return (
            known, frozen, backend.REQUESTED, tf32(True), tf32(False), torch.get_deterministic_debug_mode(),
            torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic(),
        )  # fmt: skip

    # -- comparing -------------------------------------------------------------------------------------------------

    def _live(self) -> dict[str, Tensor]:
        assert self._fixed is not None
        found: dict[str, Tensor] = {f"parameter {n}": p.data for n, p in self.model.named_parameters()}
        found |= {f"buffer {n}": b for n, b in self.model.named_buffers()}
        found |= {f"momentum {n}": v for n, v in self._fixed.momentum.items()}
        found |= {f"executed {i}": t for i, t in enumerate(self._executed.sums())}
        return found | {"densities": self._fixed.densities}

    def _state(self) -> dict[str, Tensor]:
        """A copy of all that a step changes."""
        state = {name: t.detach().clone() for name, t in self._live().items()}
        device = self._densities.device
        state["generator"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        return state

    @torch.no_grad()
    def _put(self, state: Mapping[str, Tensor]) -> None:
        for name, t in self._live().items():
            if name in state:
                t.copy_(state[name])
            else:  # made by the step
                t.zero_()
        device = self._densities.device
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["generator"], device)
        else:
            torch.set_rng_state(state["generator"])


def _never(options: Options, extra: Extra | None) -> str | None:
    """Why no step of such a training is recorded."""
    if not isinstance(options, SGDOptions):
        return "Adam counts its steps on the host"
    if extra is not None:
        return "the training has an extra gradient term, whose tensors are not known"
    return None


def _unwatched(there: Tensor) -> bool:
    """Whether nobody looks at the operators that run where this tensor is, and nothing changes what they are."""
    return (
        eager.unseen()
        and not torch.is_inference_mode_enabled()
        and not torch.is_anomaly_enabled()
        and not torch.is_autocast_enabled(there.device.type)
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not (there.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _results(found: Any) -> dict[str, Tensor]:
    """Tensors that something returned, as part of a state."""
    return {f"result {i}": t.detach().clone() for i, t in enumerate(tree_leaves(found)) if isinstance(t, Tensor)}


def _difference(now: Mapping[str, Tensor], eager: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """The largest root mean square difference of a tensor, over how far the eager step moved it.

    Tensors that hardly moved count as if they had moved by a thousandth of what the parameter did that moved most.
    """
    off, moved = {}, {}
    for name in (now.keys() & eager.keys()) - {"generator"}:
        a, b = now[name].double().flatten(), eager[name].double().flatten()
        c = before[name].double().flatten() if name in before else torch.zeros_like(b)
        off[name], moved[name] = (a - b).norm().item(), (b - c).norm().item()
    least = 1e-3 * max((m for name, m in moved.items() if name.startswith("parameter")), default=0.0)
    # What is not a number compares as if it were infinite.
    shares = [0.0 if o == 0 else o / max(moved[name], least, 1e-30) for name, o in off.items()]
    return max((share if share == share else math.inf for share in shares), default=0.0)
