"""The one model of a process, lent to one client after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spafl_kernels.training import Trainer, make_trainer

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
    """A model and its trainer; :meth:`lend` makes them one client's, in place.

    Args:
        model: already prepared by the algorithm.
        engine: ``"auto"``, ``"masked"`` or ``"compact"``.
    """

    def __init__(self, algorithm: Algorithm, model: nn.Module, engine: str, setting: ClientSetting) -> None:
        self.algorithm = algorithm
        self.setting = setting
        self.model = model.to(setting.device, setting.dtype)
        self.trainer: Trainer = make_trainer(self.model, engine)  # type: ignore[arg-type]
        self._tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @contextmanager
    def lend(self, id: int, tensors: Mapping[str, Tensor], train: Samples, test: Samples) -> Iterator[Client]:
        """The client's turn: changes to the model and to ``client.memory`` end up in ``tensors``.

        Args:
            tensors: the client's own tensors on the CPU; names of the model's state dict are bound to the model, the
                others become ``client.memory``. Model tensors that are not among them keep what they hold.
        """
        device = self.setting.device
        here = device.type == "cpu"
        memory: dict[str, Tensor] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for name, own in tensors.items():
            if name in self._tensors:
                if here:
                    self._tensors[name].data = own
                else:
                    self._tensors[name].data.copy_(own)
                    copies.append((own, self._tensors[name].data))
            else:
                memory[name] = own if here else own.to(device)
                if not here:
                    copies.append((own, memory[name]))
        s = self.setting
        client = Client(
            id, self.model, memory, train, test, self.trainer, s.local, s.transform, s.macs, s.seed, device, s.dtype
        )
        yield client
        for own, there in copies:
            own.copy_(there)
