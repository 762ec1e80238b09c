"""The one model of a process, lent to one client after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spafl_kernels.engines import make_trainer
from spafl_kernels.training import Trainer

from ..algorithms import Algorithm, Client, LocalTraining, Samples
from ..data import Transform


@dataclass(frozen=True)
class ClientSetting:
    """What all clients of a run have in common."""

    local: LocalTraining
    transform: Transform
    macs: dict[str, int]
    seed: int
    device: torch.device
    dtype: torch.dtype = torch.float32


class Resident:
    """A model, its trainer, and the tensors of the client whose turn it is.

    Args:
        model: already prepared by the algorithm.
        engine: ``"auto"``, ``"masked"`` or ``"compact"``.
        tensors: buffers on the CPU for what a client keeps. On a CPU the model's parameters become these very tensors;
            on a GPU they are copied there by :meth:`lend` and back by :meth:`take_back`. Names that are not the model's
            become ``client.memory``.
    """

    def __init__(
        self, algorithm: Algorithm, model: nn.Module, engine: str, setting: ClientSetting, tensors: Mapping[str, Tensor]
    ) -> None:
        self.algorithm = algorithm
        self.setting = setting
        self.model = model.to(setting.device, setting.dtype)
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self._memory: dict[str, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # (on the CPU, on the device)
        for name, tensor in tensors.items():
            there = tensor if setting.device.type == "cpu" else tensor.to(setting.device)
            if name in own:
                own[name].data = there
            else:
                self._memory[name] = there
            if there is not tensor:
                self._copies.append((tensor, there))
        self.trainer: Trainer = make_trainer(self.model, engine)  # type: ignore[arg-type]

    def lend(self, id: int, train: Samples, test: Samples) -> Client:
        """The client whose tensors are in the buffers now."""
        for here, there in self._copies:
            there.copy_(here)
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
            s.dtype,
        )

    def take_back(self) -> None:
        """End the client's turn: the buffers hold its tensors again."""
        for here, there in self._copies:
            here.copy_(there)
