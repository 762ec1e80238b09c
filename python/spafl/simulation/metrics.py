"""Client results summed up: accuracy and its spread, densities, masks, and where a run was made."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..algorithms import Evaluation


def worst_tenth(values: Sequence[float]) -> float:
    """Mean of the worst 10 % (rounded up, at least one)."""
    count = max(1, -(-len(values) // 10))
    return float(np.sort(np.asarray(values))[:count].mean())


def evaluation_summary(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Number of clients tested, and accuracy over them: unweighted mean, standard deviation, worst 10 %."""
    accuracies = [e.accuracy for e in evaluations]
    trained = [e.train_accuracy for e in evaluations if e.train_accuracy is not None]
    return {
        "clients": len(evaluations),
        "accuracy": {
            "mean": float(np.mean(accuracies)),
            "std": float(np.std(accuracies)),
            "worst_10pct": worst_tenth(accuracies),
        },
        "loss": {"mean": float(np.mean([e.loss for e in evaluations]))},
        "train_accuracy": float(np.mean(trained)) if len(trained) == len(evaluations) else None,
    }


def client_record(client: int, evaluation: Evaluation) -> dict[str, Any]:
    """A client's line of :mod:`spafl.client_results`."""
    densities = evaluation.densities
    confusion = {} if evaluation.confusion is None else {"confusion": evaluation.confusion}
    return {
        "client": client,
        "samples": evaluation.samples,
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "train_accuracy": evaluation.train_accuracy,
        "density": None if densities is None else float(np.mean(list(densities.values()))),
        "masks": evaluation.masks or None,
        **confusion,
    }


def density_summary(evaluations: Sequence[Evaluation], sizes: dict[str, int]) -> dict[str, Any] | None:
    """Densities averaged over clients: unweighted over layers (as published), and weighted by parameters.

    Args:
        evaluations: one per client.
        sizes: number of weights of each layer, at least of those that have densities.
    """
    densities = [e.densities for e in evaluations]
    if not densities or None in densities:
        return None
    names = list(densities[0])  # type: ignore[arg-type]
    layers = {name: float(np.mean([d[name] for d in densities])) for name in names}  # type: ignore[index]
    clients = [float(np.mean(list(d.values()))) for d in densities]  # type: ignore[union-attr]
    return {
        "layer_mean": float(np.mean(clients)),
        "parameters": sum(layers[name] * sizes[name] for name in names) / sum(sizes[name] for name in names),
        "layers": layers,
    }


def environment(device: torch.device, workers: int) -> dict[str, Any]:
    """What a reader needs to place the seconds of a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "workers": workers,
    }
