"""The federated simulator: round loop, workers, client store, checkpoints."""

from .loop import run, sample_clients
from .runfolder import RunFolder

__all__ = ["RunFolder", "run", "sample_clients"]
