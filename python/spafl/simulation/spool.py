"""The data of a run as files that every worker maps: written once, shared by all processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..algorithms import Samples
from ..data import Dataset, Partition
from .files import writing

_DATA = ("train_x", "train_y", "test_x", "test_y")


def write_data(folder: Path, dataset: Dataset, parts: Partition) -> None:
    """Write arrays (``.npy``) and the clients' parts (``.npz``) into ``folder``."""
    for name in _DATA:
        path = folder / f"{name}.npy"
        array = np.ascontiguousarray(getattr(dataset, name))
        with writing(path), path.open("wb") as file:
            # Not numpy.save: where the disk is full it tells how many items are missing, but not why.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.reshape(-1).view(np.uint8).data)
    arrays = {}
    for split in ("train", "test"):
        indices: Sequence[np.ndarray] = getattr(parts, split)
        arrays[f"{split}_index"] = np.concatenate(indices)
        arrays[f"{split}_cut"] = np.cumsum([len(i) for i in indices])[:-1]
    with writing(folder / "partition.npz"):
        np.savez(folder / "partition.npz", **arrays)


def map_samples(folder: Path) -> dict[str, list[Samples]]:
    """The samples of every client by split (``"train"``, ``"test"``), mapped from what :func:`write_data` wrote."""
    # Copy-on-write maps: shared between processes, and torch may call them writable.
    data = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in _DATA}
    parts = np.load(folder / "partition.npz")
    return {
        split: [
            Samples(data[f"{split}_x"], data[f"{split}_y"], torch.from_numpy(index))
            for index in np.split(parts[f"{split}_index"], parts[f"{split}_cut"])
        ]
        for split in ("train", "test")
    }
