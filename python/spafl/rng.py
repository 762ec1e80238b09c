"""Random streams keyed by (seed, purpose, round, client): the same numbers whoever asks, in whatever order.

Results therefore do not depend on the number of workers, and a resumed run needs no saved generator state.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def _entropy(seed: int, purpose: str, round: int, client: int) -> np.random.SeedSequence:
    # crc32 turns the purpose into a number that is the same in every process (hash() is not).
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), round, client])


def numpy_stream(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """A NumPy generator for this key; all numbers must be >= 0."""
    return np.random.Generator(np.random.PCG64(_entropy(seed, purpose, round, client)))


def stream_seed(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed for this key, for ``torch.manual_seed``."""
    return int(_entropy(seed, purpose, round, client).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_stream(seed: int, purpose: str, round: int = 0, client: int = 0) -> torch.Generator:
    """A CPU torch generator for this key."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, round, client))
