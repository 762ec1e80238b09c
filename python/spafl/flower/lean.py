"""What keeps a client's process small; it imports nothing itself."""

import sys


def without_triton() -> None:
    """Have this process take Triton for not installed, unless it is imported already.

    PyTorch imports it where it is installed, with its FLOP counter and its optimisers: seconds and tens of megabytes
    for a client that computes on a CPU.
    """
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
