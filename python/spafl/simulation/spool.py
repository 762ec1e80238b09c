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


class Parts:
    """The clients' samples of one split by number, made when asked for: a hundred thousand take long, and memory."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, index: np.ndarray, cuts: np.ndarray) -> None:
        self._x, self._y, self._index = x, y, torch.from_numpy(index)
        self._ends = [0, *cuts.tolist(), len(index)]

    def __getitem__(self, client: int) -> Samples:
        return Samples(self._x, self._y, self._index[self._ends[client] : self._ends[client + 1]])


def map_samples(folder: Path) -> dict[str, Parts]:
    """The samples of every client by split (``"train"``, ``"test"``), mapped from what :func:`write_data` wrote."""
    # Copy-on-write maps: shared between processes, and torch may call them writable.
    data = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in _DATA}
    parts = np.load(folder / "partition.npz")
    return {
        split: Parts(data[f"{split}_x"], data[f"{split}_y"], parts[f"{split}_index"], parts[f"{split}_cut"])
        for split in ("train", "test")
    }
