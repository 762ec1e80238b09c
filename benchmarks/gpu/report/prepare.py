"""What travelled with the checkout, put to use before the first stage: kernels, extension, Python packages."""

from __future__ import annotations

import importlib.util
import os
import pathlib

from .folder import Folder

# The stage that has nothing to do where kernels were compiled ahead.
COMPILE = "compile"


def prepare(folder: Folder) -> bool:
    """Unpack what ``benchmarks.gpu.ahead.pack`` made, if anything travelled; whether its kernels fit.

    This process and those it starts use it from then on. What was found is a line of the report.
    """
    from ..ahead.unpack import unpack

    found = unpack()
    if found is None:
        folder.add("prepare", "packed", kernels="nothing was packed: kernels are compiled here", fits=False)
        return False
    if importlib.util.find_spec("triton") is None:
        folder.add("prepare", "packed", kernels="triton is not installed", fits=False)
        return False
    from ..ahead import store

    words = store.install(found.cache)
    fits = store.fits(found.cache) and store.triton.__version__ == store.VERSION
    folder.add("prepare", "packed", kernels=words, fits=fits, extension=found.extension)
    return fits


class Compilations:
    """How many kernels each stage had to compile, by a log of its own."""

    def __init__(self, folder: Folder, scratch: pathlib.Path) -> None:
        self._folder, self._scratch = folder, scratch

    def begin(self, stage: str) -> None:
        """Before a stage."""
        from ..ahead import store

        os.environ[store.LOG] = str(self._scratch / stage)

    def end(self, stage: str) -> None:
        """After it: a line of the report, and what the next pack should hold."""
        from ..ahead import store

        counts = store.counts(self._scratch / stage)
        if counts.loaded or counts.compiled:
            self._folder.add(
                stage, "kernels", loaded=len(counts.loaded), compiled=len(counts.compiled),
                seconds=round(counts.seconds, 1),
            )  # fmt: skip
        self._folder.compiled((self._scratch / stage).read_text() if counts.specs else "")
