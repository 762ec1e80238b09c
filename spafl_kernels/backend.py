"""Which implementation a layer uses, and why: nothing falls back without saying so.

``SPAFL_STRICT`` in the environment turns every fallback on a GPU into an error. ``SPAFL_BACKEND``, read at import,
asks for one implementation whatever is known about times; that is then no fallback:

reference  the masked dense operator
triton     the packed kernels (:mod:`spafl_kernels.gpu.packed`)
narrow     dense operators on the active filters (:mod:`spafl_kernels.gpu.narrow`, :mod:`spafl_kernels.cpu.skip`)

``auto``, the default, leaves it to :mod:`spafl_kernels.gpu.choice`, or on a CPU to :mod:`spafl_kernels.cpu.skip`, where
``triton`` means the same as ``auto``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

from . import settings

Backend = Literal["reference", "triton", "narrow"]
Request = Literal["auto", "reference", "triton", "narrow"]


def _requested() -> str:
    return settings.one_of("SPAFL_BACKEND", get_args(Request))


REQUESTED = _requested()


@contextlib.contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Behave as if ``SPAFL_BACKEND`` were ``request`` while the context is open. Not safe between threads."""
    global REQUESTED
    before, REQUESTED = REQUESTED, request
    try:
        yield
    finally:
        REQUESTED = before


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation a layer uses on an input (``backend``), and ``reason`` in words.

    ``fallback``: the kernels were wanted and cannot run; strict mode refuses that.
    """

    backend: Backend
    reason: str
    fallback: bool = False

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"
