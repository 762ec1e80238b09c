"""What was packed, where it is used: kernels, extension and Python packages from ``build/gpu``."""

from __future__ import annotations

import dataclasses
import filecmp
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
        extension: whether the extension in the library is the packed one, and not one that was built here.
    """

    cache: pathlib.Path
    packages: pathlib.Path
    extension: bool


def unpack(root: pathlib.Path = ROOT) -> Unpacked | None:
    """Unpack what travelled with a checkout, unless that was done before; None if nothing did.

    A new pack replaces the extension in the library; the same pack leaves one that was built here since. The packed one
    is only copied to its place: whether it loads in the PyTorch that is here, its first use shows.
    """
    packed, target = root / PACKED, root / UNPACKED
    if not (packed / KERNELS).is_file():
        return None
    stamp = _stamp(packed)
    fresh = not (target / "stamp").is_file() or (target / "stamp").read_text() != stamp
    if fresh:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(dir=target.parent))
        _archive(packed / KERNELS, made / "cache")
        _archive(packed / EXTENSION, made / "extension")
        for wheel in sorted((packed / WHEELS).glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(made / "packages")
        (made / "stamp").write_text(stamp)
        made.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    packages = target / "packages"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if packages.is_dir() and str(packages) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), str(packages)])
    return Unpacked(target / "cache", packages, _place(target / "extension", root / "spafl_kernels", fresh))


def _place(extension: pathlib.Path, library: pathlib.Path, replace: bool) -> bool:
    """Put the extension and its record into the library; whether it is there then."""
    (packed,) = extension.glob("_C*.so")
    if replace or not any(library.glob("_C*.so")):
        for source in extension.iterdir():
            if not _same(source, library / source.name):
                # Not in place: another process may have it loaded.
                copy = library / f".{source.name}"
                shutil.copyfile(source, copy)
                copy.rename(library / source.name)
    return _same(packed, library / packed.name)


def _same(a: pathlib.Path, b: pathlib.Path) -> bool:
    return b.is_file() and filecmp.cmp(a, b, shallow=False)


def _archive(path: pathlib.Path, into: pathlib.Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(into, filter="data")


def _stamp(packed: pathlib.Path) -> str:
    """Changes when what is packed changes."""
    files = [path for path in sorted(packed.rglob("*")) if path.is_file()]
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.relative_to(packed)}\n" for p in files)
