"""Where a run computes: which device, how many worker processes, and why."""

from __future__ import annotations

import os

import torch

from spafl_kernels.gpu.tables import engines

from .. import plugins
from ..config import RunConfig
from ..errors import UserError

CPU = torch.device("cpu")


def pick_device(config: RunConfig) -> tuple[torch.device, str | None]:
    """The device of a run, and why, where ``auto`` had a choice.

    ``auto`` takes a GPU only where a table shows the simulation to be faster there than on the CPU; see
    :mod:`spafl_kernels.gpu.tables.engines`.

    Raises:
        UserError: CUDA was asked for and there is none, or the device's table is not usable.
    """
    wanted = config.simulation.device
    if config.training.dtype == "float64" and wanted != "cpu":
        if wanted == "cuda":
            raise UserError("simulation.device: training.dtype = float64 runs on a CPU alone")
        return CPU, None
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("simulation.device: cuda was asked for, but this PyTorch sees no CUDA device")
    if wanted != "auto":
        return torch.device(wanted), None
    if not torch.cuda.is_available():
        return CPU, None
    faster, why = _gpu_is_faster(config)
    if faster:
        return torch.device("cuda"), f"device cuda: {why}"
    return CPU, f"device cpu: {why}; simulation.device = cuda runs on the GPU"


def _gpu_is_faster(config: RunConfig) -> tuple[bool, str]:
    try:
        table = engines.SHELF.given() or engines.SHELF.for_index(torch.cuda.current_device())
    except ValueError as error:
        raise UserError(f"simulation.device: {error}") from None
    if table is None:
        name = torch.cuda.get_device_name(torch.cuda.current_device())
        return False, f"no simulation was measured to be faster on this GPU ({name})"
    engine = config.simulation.engine
    if engine != "auto":
        return False, f"measured speeds are those of engine = auto, and this run has engine = {engine}"
    return table.gpu_is_faster(config.model.name, config.training.batch_size, pick_workers(config, CPU))


def pick_workers(config: RunConfig, device: torch.device) -> int:
    """Worker processes of a run: as configured, else one per core (CPU) or one (GPU); never more than can be busy."""
    if config.simulation.workers:
        return min(config.simulation.workers, config.partition.clients)  # more would never have anything to do
    if any(plugins.module_of(path) == "__main__" for path in config.code.values()):
        return 1  # classes of a notebook or script travel by value, where more workers are asked for
    if device.type != "cpu":
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), config.sampling.clients_per_round))
