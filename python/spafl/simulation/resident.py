"""The one model of a process, lent to one client after another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from spafl_kernels.compact.captures import Batch, Verdict
from spafl_kernels.engines import Engine, make_trainer
from spafl_kernels.functional import threshold_layers
from spafl_kernels.training import Trainer

from ..algorithms import Algorithm, Client, LocalTraining, Objective, Samples
from ..algorithms.objective import CLASSES
from ..data import Transform
from ..system import System


@dataclass(frozen=True)
class ClientSetting:
    """What all clients of a run have in common."""

    local: LocalTraining
    transform: Transform
    macs: dict[str, int]
    seed: int
    device: torch.device
    system: System | None = None
    objective: Objective = CLASSES
    verdicts: Mapping[Batch, Verdict] = field(default_factory=dict)
    """What was verified already of the model of the run."""


class Resident:
    """A model, its trainer, and the tensors of the client whose turn it is.

    Args:
        model: already prepared by the algorithm.
        engine: ``"auto"``, ``"masked"`` or ``"compact"``.
        tensors: what a client keeps, on the CPU; see :meth:`lend`.
    """

    def __init__(
        self, algorithm: Algorithm, model: nn.Module, engine: str, setting: ClientSetting, tensors: Mapping[str, Tensor]
    ) -> None:
        self.algorithm = algorithm
        self.setting = setting
        self.model = model.to(setting.device, setting.local.torch_dtype)
        self._own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self._memory: dict[str, Tensor] = {}
        self._there: dict[str, Tensor] = {}  # on a device that is not the CPU
        self._here: Mapping[str, Tensor] = {}
        if setting.device.type != "cpu":
            self._there = {name: tensor.to(setting.device) for name, tensor in tensors.items()}
            self._bind(self._there)
        self._layers = dict(threshold_layers(self.model))
        self._engine = cast(Engine, "compact" if engine == "auto" and algorithm.needs_skipping else engine)
        self.trainer: Trainer = self._make_trainer(self.model, setting.verdicts)
        self._others: dict[Hashable, tuple[nn.Module, Trainer]] = {}
        self._counts: dict[str, float] = {}

    def _make_trainer(self, model: nn.Module, verdicts: Mapping[Batch, Verdict] | None = None) -> Trainer:
        objective = self.setting.objective
        trainer = make_trainer(model, self._engine, objective.function, verdicts=verdicts)
        trainer.hits = objective.hits
        return trainer

    def _bind(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self._own:
                self._own[name].data = tensor
            else:
                self._memory[name] = tensor

    def lend(self, id: int, tensors: Mapping[str, Tensor], train: Samples, test: Samples) -> Client:
        """The client that owns ``tensors``: CPU tensors by the names of ``Algorithm.client_state``.

        On a CPU the model's parameters become these very tensors; on a GPU they are copied there, and back by
        :meth:`take_back`. Names that are not the model's become ``client.memory``.
        """
        if self._there:
            for name, tensor in tensors.items():
                self._there[name].copy_(tensor)
        elif tensors is not self._here:
            self._bind(tensors)
        self._here = tensors
        s = self.setting
        return Client(
            id,
            self.model,
            self._memory,
            train,
            test,
            self.trainer,
            s.local,
            s.transform,
            s.macs,
            s.seed,
            s.device,
            self._layers,
            self._others,
            self._make_trainer,
            self._counts,
            None if s.system is None else s.system.classes[id],
            s.objective,
        )

    def take_back(self) -> None:
        """End the client's turn: the tensors it was lent with hold its state again."""
        for name, tensor in self._there.items():
            self._here[name].copy_(tensor)
