"""Limits of memory and time for hostile input."""

import time
import tracemalloc
from contextlib import contextmanager


@contextmanager
def bounded(memory, seconds):
    """Fail if the block takes more than ``memory`` bytes at its peak, or more than ``seconds``."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        taken, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory, f"{peak} bytes"
    assert taken < seconds, f"{taken:.1f} s"
