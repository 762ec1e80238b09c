"""Which clients train in a round, and which are tested."""

from __future__ import annotations

import numpy as np

from .. import rng
from ..config import RunConfig


def sample_clients(config: RunConfig, round: int) -> list[int]:
    """Clients of a round, without replacement, in the order they are drawn."""
    clients, count = config.partition.clients, config.sampling.clients_per_round
    if config.sampling.stream == "published-cifar100":
        return np.random.RandomState(round).choice(clients, count, replace=False).tolist()
    return rng.numpy_stream(config.seed, "sampling", round).choice(clients, count, replace=False).tolist()


def evaluated_clients(config: RunConfig, round: int) -> list[int]:
    """Clients that are tested after a round, ascending."""
    clients, count = config.partition.clients, config.evaluation.clients
    if count == "all":
        return list(range(clients))
    chosen = rng.numpy_stream(config.seed, "evaluation", round).choice(clients, count, replace=False, shuffle=False)
    return sorted(chosen.tolist())
