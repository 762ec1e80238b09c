"""SpaFL (NeurIPS 2024, arXiv 2406.00431): clients keep their own weights, only thresholds travel.

A variant is data: :data:`VARIANTS` lists every choice in which the published folders (``fmnist``, ``cifar10``,
``cifar100``) and the paper differ; each can be overridden alone. The choices of ``paper``, one by one:

* estimator ``identity`` and normaliser ``row`` (``n_in``), as the paper writes them;
* importance update before local training, for the sampled clients, with the latest change of the global thresholds:
  those clients receive thresholds anyway, so nobody else has to be reached (the FMNIST code does the same);
* no warm-up of the penalty and no clipping: neither is in the paper's objective;
* fresh momentum in every round: the thresholds it belongs to have just been replaced;
* the collapse guard of the code: the penalty only pushes thresholds up, so a layer that died could not come back;
* standardised pixels. The FMNIST and CIFAR-10 code feeds raw 0..255 values without augmentation, which makes a run a
  lottery: on Fashion-MNIST, one partition and one first model gave 51 % or 70 % after 45 rounds, by the order of the
  batches alone (output neurons, that is whole classes, are pruned early and come back late). Standardised and at a
  learning rate of .01, training is calm.

``tuned`` is ``paper`` with half of the penalty and a dense classifier: of the penalties tried on Fashion-MNIST, on
three seeds of their own, the one of fewest operations that stays within a point of training alone on each
(``docs/experiments.md``).

Which layers have thresholds is the published models' business: LeNet-5 and Conv4 prune their classifier, ResNet-18 and
ViT keep it dense. ``prune_head`` changes that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from spafl_kernels import ThresholdLinear, convert, to_dense
from spafl_kernels.functional import importance_update_, threshold_layers
from spafl_kernels.layers import ThresholdLayer
from spafl_kernels.reference import Estimator, filter_scores
from spafl_kernels.training import Options as TrainerOptions

from ..budgets import EXECUTED, by_class, kinds_of
from ..cost import Cost
from ..wire import Message
from .aggregate import AggregationOptions, robust_mean
from .base import Algorithm, ServerState, Training, Upload
from .budget import (
    FLOOR,
    SPARED,
    Budget,
    Steering,
    asked_for,
    budget_for,
    check_skips,
    check_target,
    corrected,
    densities_of,
    first_set_point,
    predicted,
    push_for,
    pushed,
    share_of_dense,
    travel_of,
)
from .client import Client, Evaluation

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "fmnist": {
        "algorithm": {
            "penalty": 0.002, "estimator": "identity", "penalty_warmup": "sigmoid", "importance": "before-training",
            "importance_normaliser": "kernel", "momentum_lifetime": "run", "collapse_floor": 0.01,
            "count_threshold_macs": True,
        },
        "training": {"lr": 0.001, "momentum": 0.9, "batch_size": 64, "epochs": 5},
        "data": {"pixels": "raw", "augment": "none"},
    },
    "cifar10": {
        "algorithm": {
            "penalty": 0.00015, "estimator": "window", "penalty_warmup": "none", "importance": "after-merge",
            "importance_normaliser": "kernel", "momentum_lifetime": "round", "collapse_floor": 0.01,
            "count_threshold_macs": True,
        },
        "training": {
            "lr": 0.01, "momentum": 0.9, "batch_size": 16, "epochs": 5, "max_grad_norm": 3.0, "drop_last": True,
        },
        "data": {"pixels": "raw", "augment": "none"},
    },
    "cifar100": {
        "algorithm": {
            "penalty": 0.0007, "estimator": "window", "penalty_warmup": "sigmoid", "importance": "after-merge",
            "importance_normaliser": "kernel", "momentum_lifetime": "round", "collapse_floor": 0.01,
            "count_threshold_macs": False,
        },
        "training": {
            "lr": 0.01, "momentum": 0.9, "batch_size": 64, "epochs": 7, "max_grad_norm": 15.0, "drop_last": True,
            "lr_decay": 0.993, "lr_floor": 0.0001,
        },
        "sampling": {"stream": "published-cifar100"},
        "data": {"pixels": "standard"},
    },
    "paper": {
        "algorithm": {
            "penalty": 0.002, "estimator": "identity", "penalty_warmup": "none", "importance": "before-training",
            "importance_normaliser": "row", "momentum_lifetime": "round", "collapse_floor": 0.01,
            "count_threshold_macs": True,
        },
        "data": {"pixels": "standard"},
    },
    "tuned": {
        "algorithm": {
            "penalty": 0.001, "estimator": "identity", "penalty_warmup": "none", "importance": "before-training",
            "importance_normaliser": "row", "momentum_lifetime": "round", "collapse_floor": 0.01,
            "count_threshold_macs": True, "prune_head": False,
        },
        "training": {"lr": 0.01, "momentum": 0.9, "batch_size": 64, "epochs": 5},
        "data": {"pixels": "standard"},
    },
}  # fmt: skip


class SpaFLOptions(AggregationOptions):
    """Settings of SpaFL; ``variant`` fills in what is not given."""

    variant: Literal["fmnist", "cifar10", "cifar100", "paper", "tuned"] = "paper"
    penalty: float = Field(ge=0, le=1e6)
    """Coefficient ``c`` of ``sum exp(-tau)``; 0 switches pruning pressure off."""
    estimator: Estimator
    penalty_warmup: Literal["none", "sigmoid"]
    """``sigmoid``: the coefficient is scaled by ``1 / (1 + exp(5 - 10 r / warmup_rounds))`` in round ``r``."""
    warmup_rounds: float = Field(default=1.0, ge=1e-3, le=1e9)
    importance: Literal["before-training", "after-merge", "none"]
    """When and for whom: sampled clients before they train, or every client after aggregation."""
    importance_normaliser: Literal["kernel", "row"]
    momentum_lifetime: Literal["run", "round"]
    """``run``: the state of a client's optimiser (momentum, Adam's moments) survives from one turn to its next."""
    collapse_floor: float | None = Field(ge=0, lt=1)
    """A layer at or below this density gets all thresholds set to 0 at its next training step; None: never."""
    count_threshold_macs: bool
    """Whether the published counter of this folder counts what thresholds cost: one operation per threshold and batch,
    and one per weight and local training."""
    exchange: bool = True
    """Whether thresholds travel; False leaves them at the client (does communication help at all?)."""
    trained: Literal["both", "thresholds", "weights"] = "both"
    """What local training changes: ``thresholds`` freezes all else as it was drawn, ``weights`` the thresholds."""
    initial_density: float = Field(default=1.0, gt=0, le=1)
    """Share of each layer's filters that the first thresholds keep, by score; 1: all thresholds are 0."""
    target: dict[str, Any] | None = None
    """A budget, for all clients or by class of device, in place of ``penalty`` and its warm-up: ``{density = .3}``,
    ``{macs = .25}``, ``{seconds = 20}``, ``{phone = {macs = .5}, "raspberry-pi-4" = {seconds = 20}}``. Every client's
    coefficient is then steered, see :mod:`spafl.algorithms.budget`."""
    prune_head: bool | Literal["as-built"] = "as-built"
    """Whether the classifier (the linear layer registered last) has thresholds; ``as-built``: as the model has it."""

    @field_validator("target")
    @classmethod
    def _a_target_is_a_budget(cls, target: dict[str, Any] | None) -> dict[str, Any] | None:
        if target is not None:
            try:
                check_target(target)
            except ValueError as error:
                raise PydanticCustomError("together", "{reason}", {"reason": str(error)}) from None
        return target

    @model_validator(mode="after")
    def _ablations_are_possible(self) -> SpaFLOptions:
        if self.importance != "none" and not self.exchange:
            raise ValueError("exchange = false leaves no change of global thresholds; it needs importance = none")
        if self.importance != "none" and self.trained == "thresholds":
            raise ValueError("trained = thresholds freezes weights, which importance moves; it needs importance = none")
        return self


def penalty_at(options: SpaFLOptions, round: int) -> float:
    """The penalty's coefficient in a round, warm-up included."""
    if options.penalty_warmup == "none":
        return options.penalty
    return options.penalty / (1.0 + math.exp(5.0 - 10.0 * round / options.warmup_rounds))


@torch.no_grad()
def set_density(layer: ThresholdLayer, density: float) -> None:
    """Have a layer keep the ``round(density * filters)`` filters of the largest scores, at least one."""
    scores = torch.sort(filter_scores(layer.weight), descending=True).values  # type: ignore[arg-type]
    kept = max(1, round(density * len(scores)))
    if kept < len(scores):
        # Half-way to the first that is pruned: a score must be above its threshold.
        layer.threshold.fill_(((scores[kept - 1] + scores[kept]) / 2).item())


def with_pruned_head(model: nn.Module, pruned: bool) -> nn.Module:
    """``model``, changed in place, with or without thresholds on its classifier: the linear layer registered last.

    Raises:
        ValueError: the model has no linear layer inside, or one that cannot be masked (its weight is computed).
    """
    linear = [m for m in model.modules() if type(m) in (nn.Linear, ThresholdLinear) and m is not model]
    if not linear:
        raise ValueError("prune_head needs a model that contains a linear layer as its classifier; this one has none")
    head = linear[-1]
    if pruned == isinstance(head, ThresholdLinear):
        return model
    alone = nn.Sequential(head)
    if pruned:
        changed = convert(alone, where=lambda _, module: module is head, inplace=True)
    else:
        changed = to_dense(alone, inplace=True)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is head:
                parent._modules[name] = changed[0]  # type: ignore[index]
    return model


class SpaFL(Algorithm):
    """Threshold-only federated learning of sparse personal models."""

    Options = SpaFLOptions
    presets: ClassVar[dict[str, dict[str, dict[str, Any]]]] = VARIANTS
    options: SpaFLOptions
    upload_limit: ClassVar[float] = 1e4
    """A threshold is compared with a mean of weights' magnitudes, which is below 1 in any model that trains."""

    def __init__(self, options: SpaFLOptions, guard_evaluations: bool = False) -> None:
        """``guard_evaluations``: the collapse guard acts in evaluations too and changes the client there.

        So does the published code. Only its recordings are replayed that way (:mod:`spafl.conformance`): in a
        simulation a run would depend on when it is tested.
        """
        super().__init__(options)
        self.guard_evaluations = guard_evaluations
        self.needs_skipping = bool(kinds_of(options.target or {}) & EXECUTED)

    # -- set-up

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        if self.options.prune_head != "as-built":
            model = with_pruned_head(model, self.options.prune_head)
        layers = list(threshold_layers(model))
        if self.options.target is not None:
            self._check_steerable()
        if not layers:
            raise ValueError("SpaFL needs a model with threshold layers; this one has none (see spafl_kernels.convert)")
        for _, layer in layers:
            layer.estimator = self.options.estimator  # type: ignore[assignment]
            if self.options.initial_density < 1:
                set_density(layer, self.options.initial_density)
        thresholds = {id(layer.threshold) for _, layer in layers}
        for p in model.parameters():
            if self.options.trained != "both" and not self._holds:
                p.requires_grad_((id(p) in thresholds) == (self.options.trained == "thresholds"))
        return model

    @property
    def _holds(self) -> bool:
        """Whether parameters that training leaves alone have a learning rate of 0 in place of being frozen.

        It is the same training, and one that the compact engine runs small; unless their gradients count in a norm that
        is clipped, or their momentum lies in the client's state.
        """
        plain = self.local is not None and self.local.optimizer == "sgd" and self.local.max_grad_norm is None
        return plain and self.options.trained != "both" and self.options.momentum_lifetime != "run"

    def _check_steerable(self) -> None:
        if self.local is not None and self.local.optimizer != "sgd":
            raise ValueError(
                "target steers how far the penalty moves thresholds, which Adam does whatever the coefficient is; it "
                f"needs training.optimizer = sgd, got {self.local.optimizer}"
            )
        if self.options.trained == "weights":
            raise ValueError("target steers thresholds, which trained = weights freezes")

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if self.options.momentum_lifetime == "run":
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            fresh = {name: torch.zeros_like(p) for name, p in trained.items()}
            if self.local is not None:
                fresh = self.local.options_at(0).fresh_state(trained)
            state |= {f"momentum.{name}": tensor for name, tensor in fresh.items()}
        if self.options.collapse_floor is not None:
            # Density of each layer in its previous forward pass, which the guard looks at.
            state["density"] = torch.ones(len(list(threshold_layers(model))), dtype=torch.float64)
        if self.options.target is not None:
            # The controller's set point (0: not begun), what the last turn was asked for, and whether it was limited.
            state["budget"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        return state

    def server_state(self, model: nn.Module) -> ServerState:
        if not self.options.exchange:
            return {}
        return {f"{name}.threshold": layer.threshold.detach().clone() for name, layer in threshold_layers(model)}

    # -- server

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        thresholds = self._thresholds(server)
        if self.options.importance == "before-training":
            # Most sampled clients do not hold the previous thresholds, so the change has to travel too.
            return thresholds | self._deltas(server)
        return thresholds

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        merged: ServerState = {}
        how = self.options.aggregation
        for name in self._thresholds(server):
            values = torch.stack([upload.message[name] for upload in uploads])
            mean = values.mean(dim=0) if how == "mean" else robust_mean(values, how, self.options.trim)
            if self.options.target is not None:
                mean = mean.clamp_min(FLOOR)  # where clients begin: importance must not see them come back up to it
            merged[name] = mean
            if self.options.importance != "none":
                merged[name.removesuffix("threshold") + "delta"] = mean - server[name]
        if self.options.importance == "after-merge":
            return merged, self._deltas(merged)
        return merged, {}

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        return self._thresholds(server)

    @staticmethod
    def _thresholds(server: Message) -> dict[str, Tensor]:
        return {name: t for name, t in server.items() if name.endswith(".threshold")}

    @staticmethod
    def _deltas(message: Message) -> dict[str, Tensor]:
        return {name: t for name, t in message.items() if name.endswith(".delta")}

    # -- client

    def train(self, client: Client, message: Message, round: int) -> Training:
        layers = client.layers
        with torch.no_grad():
            for name, layer in layers.items():
                if self.options.exchange:
                    layer.threshold.copy_(message[f"{name}.threshold"])  # type: ignore[operator]
        self.receive(client, self._deltas(message), round)
        budget = budget_for(self.options.target, client.device_class)
        steering = None if budget is None else self._steer(client, budget, round)

        momentum = {n.removeprefix("momentum."): t for n, t in client.memory.items() if n.startswith("momentum.")}
        client.trainer.begin(
            self._sgd_options(client, round, steering),
            momentum=momentum or None,
            densities=self._densities(client),
        )
        loss, steps = client.run_sgd(round)
        result = client.trainer.finish()
        self._remember(client, result.densities)
        upload = {}
        if self.options.exchange:
            upload = {f"{name}.threshold": layer.threshold.detach().cpu().clone() for name, layer in layers.items()}
        figures = {"density": sum(result.densities.values()) / len(result.densities)}
        if budget is not None and steering is not None:
            figures |= self._steered(client, budget, steering, figures["density"], result.macs)
        macs = self._paper_macs(client, result.densities, steps)
        return Training(upload, loss, Cost(steps=steps, paper_macs=macs, executed_macs=result.macs), figures)

    def receive(self, client: Client, announcement: Message, round: int) -> None:
        for name, delta in announcement.items():
            layer = client.layers[name.removesuffix(".delta")]
            normaliser: Any = self.options.importance_normaliser
            importance_update_(layer.weight, delta.to(layer.weight.device), normaliser, layer.transposed_groups)

    @torch.no_grad()
    def _steer(self, client: Client, budget: Budget, round: int) -> Steering:
        """The coefficient of a turn, by the client's set point; moves thresholds where it cannot."""
        set_point, before, _ = client.memory["budget"].tolist()
        set_point = set_point or first_set_point(budget)
        layers = client.layers
        scores = [layer.scores().detach() for layer in layers.values()]
        thresholds = [layer.threshold.detach().clamp_min_(FLOOR) for layer in layers.values()]
        spent = partial(predicted, budget.kind, macs=[client.macs[name] for name in layers])
        asked = asked_for(set_point, before, spent(densities_of(scores, thresholds)))
        spared = max(SPARED, self.options.collapse_floor or 0.0)
        push = push_for(scores, thresholds, spent, asked, spared)
        travel = travel_of(client, round, self.options.momentum_lifetime == "run")
        coefficient = push.common / travel if travel else 0.0
        ahead = push.common < 0 or (budget.kind in EXECUTED and by_class(self.options.target or {}))
        for threshold, own in zip(thresholds, push.layers, strict=True):
            if ahead or own < 0:
                threshold.copy_(pushed(threshold, own))
        scales = None
        if not ahead and coefficient and any(own != push.common for own in push.layers):
            scales = {name: max(own, 0.0) / push.common for name, own in zip(layers, push.layers, strict=True)}
        return Steering(set_point, asked, push.limited, coefficient, scales, ahead)

    def _steered(
        self, client: Client, budget: Budget, steering: Steering, density: float, macs: int
    ) -> dict[str, float]:
        """Correct the set point by what the turn has brought, time apart (:meth:`timed`); figures of it."""
        figures = {"coefficient": steering.coefficient, "set_point": steering.set_point}
        set_point = steering.set_point
        if budget.kind != "seconds":
            measured = density
            if budget.kind == "macs":
                measured = figures["macs_share"] = share_of_dense(client, macs)
            if not steering.limited:
                set_point = corrected(set_point, steering.asked, budget, measured)
        state = [set_point, steering.asked, float(steering.limited)]
        client.memory["budget"].copy_(torch.tensor(state, dtype=torch.float64))
        return figures

    def timed(self, client: Client, seconds: float) -> dict[str, float]:
        budget = budget_for(self.options.target, client.device_class)
        if budget is None or budget.kind != "seconds":
            return {}
        check_skips(client)
        state = client.memory["budget"]
        set_point, asked, limited = state.tolist()
        if not limited:
            state[0] = corrected(set_point, asked, budget, seconds)
        return {"turn_seconds": seconds}

    def _sgd_options(self, client: Client, round: int, steering: Steering | None = None) -> TrainerOptions:
        floor = self.options.collapse_floor
        options = client.sgd_options(round)
        if self._holds and self.options.trained == "weights":
            options = replace(options, threshold_lr=0.0)
        elif self._holds:
            options = replace(options, lr=0.0, threshold_lr=options.rate_of_thresholds)
        if steering is not None:
            c, scales = 0.0 if steering.ahead else steering.coefficient, steering.scales
            return replace(options, penalty=c, penalty_scales=scales, collapse_floor=floor)
        penalty = penalty_at(self.options, round)
        return replace(options, penalty=penalty, collapse_floor=floor)

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        if self.guard_evaluations:
            options = self._sgd_options(client, 0)
            evaluation, result = client.evaluate_model(train_data, options, self._densities(client))
            self._remember(client, result.densities)
        else:
            evaluation = client.evaluate_model(train_data)[0]
        masks = {name: layer.mask() for name, layer in client.layers.items()}
        evaluation.densities = {name: mask.double().mean().item() for name, mask in masks.items()}
        evaluation.masks = {n: "".join("1" if kept else "0" for kept in mask.tolist()) for n, mask in masks.items()}
        return evaluation

    def _densities(self, client: Client) -> dict[str, float] | None:
        if "density" not in client.memory:
            return None
        return dict(zip(client.layers, client.memory["density"].tolist(), strict=True))

    def _remember(self, client: Client, densities: dict[str, float]) -> None:
        if "density" in client.memory:
            client.memory["density"].copy_(torch.tensor(list(densities.values()), dtype=torch.float64))

    # -- cost

    def _paper_macs(self, client: Client, densities: dict[str, float], steps: int | None = None) -> float:
        """The published counter: the masks of the last batch stand for the whole round, inputs count as dense.

        ``steps``: that were done; by default the epochs that are set.
        """
        epochs = client.local.epochs if steps is None else client.epochs_of(steps)
        per_sample = sum(density * client.macs[name] for name, density in densities.items())
        layers = client.layers.values()
        total = 3.0 * epochs * len(client.train) * per_sample
        if self.options.count_threshold_macs:
            total += sum(layer.weight.numel() for layer in layers)  # type: ignore[misc, operator]
            total += sum(len(layer.threshold) for layer in layers) * client.batches_per_epoch()  # type: ignore[arg-type]
        return total

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        thresholds = sum(t.numel() for name, t in server.items() if name.endswith(".threshold"))
        return 2 * sampled * 32 * thresholds
