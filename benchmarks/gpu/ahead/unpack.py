"""What was packed, where it is used: kernels, extension and Python packages from ``build/gpu``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Folder of what travels; names of archives in it.
PACKED = pathlib.Path("build", "gpu")
KERNELS, EXTENSION, WHEELS = "kernels.tar.xz", "extension.tar.xz", "wheels"
# Where it is unpacked, once.
UNPACKED = pathlib.Path("build", "gpu-unpacked")


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Where things lie.

    Attributes:
        cache: folder of kernels, for :func:`benchmarks.gpu.ahead.store.install`.
        packages: folder of Python packages, on the path of processes started from now on.
        extension: whether the packed one was put into the library; it was not if there was one before.
    """

    cache: pathlib.Path
    packages: pathlib.Path
    extension: bool


def unpack(root: pathlib.Path = ROOT) -> Unpacked | None:
    """Unpack what travelled with a checkout, unless that was done before; None if nothing did.

    The extension is only copied to its place. Whether it loads in the PyTorch that is here, its first use shows.
    """
    packed, target = root / PACKED, root / UNPACKED
    if not (packed / KERNELS).is_file():
        return None
    stamp = _stamp(packed)
    if not (target / "stamp").is_file() or (target / "stamp").read_text() != stamp:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(dir=target.parent))
        _archive(packed / KERNELS, fresh / "cache")
        for wheel in sorted((packed / WHEELS).glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(fresh / "packages")
        (fresh / "stamp").write_text(stamp)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    there = any((root / "spafl_kernels").glob("_C*.so"))
    if not there and (packed / EXTENSION).is_file():
        _archive(packed / EXTENSION, root / "spafl_kernels")
    packages = target / "packages"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if packages.is_dir() and str(packages) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), str(packages)])
    return Unpacked(target / "cache", packages, not there and (packed / EXTENSION).is_file())


def _archive(path: pathlib.Path, into: pathlib.Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as archive:
        archive.extractall(into, filter="data")


def _stamp(packed: pathlib.Path) -> str:
    """Changes when what is packed changes."""
    files = [path for path in sorted(packed.rglob("*")) if path.is_file()]
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.relative_to(packed)}\n" for p in files)
