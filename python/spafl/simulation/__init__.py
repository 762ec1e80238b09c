"""The federated simulator: round loop, workers, client store, checkpoints."""

from .loop import run
from .runfolder import RunFolder
from .sampling import sample_clients

__all__ = ["RunFolder", "run", "sample_clients"]
