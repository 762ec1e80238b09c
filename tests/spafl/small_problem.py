"""The raw tables of a federated problem that runs in a second or two."""

from typing import Any

SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "rounds": 3,
    "data": {
        "name": "synthetic",
        "image": 28,
        "channels": 1,
        "classes": 10,
        "train": 160,
        "test": 60,
        "seed": 1,
        "pixels": "standard",
    },
    "partition": {"scheme": "dirichlet", "clients": 5, "alpha": 0.5, "min_train": 8, "min_test": 2},
    "model": {"name": "lenet5"},
    "algorithm": {"name": "spafl", "variant": "fmnist", "penalty": 0.05},
    "training": {"lr": 0.02, "batch_size": 16, "epochs": 1},
    "sampling": {"clients_per_round": 3},
    "simulation": {"workers": 1, "engine": "masked", "device": "cpu", "checkpoint_every": 1},
}
