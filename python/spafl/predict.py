"""Predictions of an exported model for images or stored arrays: ``spafl predict MODEL IMAGES``.

What the file says of itself (:func:`spafl.export.metadata`) is all that is needed: size and channels of its input, its
normalisation, the names of its classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data.readers import IMAGES
from .errors import UserError, one_line

BATCH = 64
MAX_ARRAY = 1 << 31  # bytes of a .npy file


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample: classes, most probable first, with their probabilities; or numbers."""

    sample: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    numbers: tuple[float, ...] = ()


class Model:
    """An exported file, ready to be asked.

    Args:
        path: ``.onnx``, or ``.pt2`` of ``torch.export``.
        allow_code: whether a ``.pt2`` may be loaded: PyTorch reads it with pickle, which can execute code.

    Attributes:
        metadata: what the file says of itself.

    Raises:
        UserError: no such file, another kind, one without metadata, or a missing package.
    """

    def __init__(self, path: Path, allow_code: bool = False) -> None:
        openers = {".onnx": _open_onnx, ".pt2": _open_pt2}
        if path.suffix not in openers:
            raise UserError(f"{path}: an exported model is a .onnx or .pt2 file")
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        if path.suffix == ".pt2" and not allow_code:
            raise UserError(f"{path}: PyTorch reads .pt2 with pickle, which can execute code; --allow-code permits it")
        self._run, text = openers[path.suffix](path)
        try:
            self.metadata = json.loads(text)
            about = self.metadata["input"]
            self.shape = tuple(int(n) for n in about["shape"])
            names = self.metadata["output"]["class_names"]
            self.names = None if names is None else [str(name) for name in names]
            self.outputs = int(self.metadata["output"]["numbers"])
            self._in_graph, self._normalisation = about["normalised_in_graph"], about["normalisation"]
            self._dtype, self._stored = np.dtype(about["dtype"]), np.dtype(about["stored"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: does not say what it takes ({one_line(error)}); models of `spafl export` do"
            ) from None
        self.path = path

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Outputs ``(n, outputs)`` for samples ``(n, *shape)`` as stored in the source: bytes of images, say."""
        if self._in_graph:
            return self._run(x.astype(self._dtype))
        if self._stored == np.int64:
            return self._run(x.astype(np.int64))
        x = x.astype(np.float32)
        norm = self._normalisation
        if norm is None:
            raise UserError(f"{self.path}: does not say how its input is normalised; export it with --normalise")
        if norm["mean"]:
            along = (-1, *(1 for _ in self.shape[1:]))
            mean, std = (np.array(norm[part], np.float32).reshape(along) for part in ("mean", "std"))
            x = (x / np.float32(norm["scale"]) - mean) / std
        return self._run(x)


def _open_onnx(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs onnxruntime (pip install 'spafl-kernels[onnx]')") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own
        raise UserError(f"{path}: not an ONNX model that onnxruntime takes: {one_line(error)}") from None
    name = session.get_inputs()[0].name
    text = session.get_modelmeta().custom_metadata_map.get("spafl", "{}")
    return lambda x: session.run(None, {name: x})[0], text


def _open_pt2(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    import torch

    extra = {"spafl.json": ""}
    try:
        module = torch.export.load(str(path), extra_files=extra).module()
    except Exception as error:
        raise UserError(f"{path}: not a model that torch.export takes: {one_line(error)}") from None

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    text = extra["spafl.json"]
    return run, text.decode() if isinstance(text, bytes) else text or "{}"


def predict(model: Model, sources: Sequence[Path], top: int = 1, resize: bool = False) -> list[Prediction]:
    """What the model says of images, folders of images, and ``.npy`` arrays of stored samples.

    Args:
        top: so many classes of each.
        resize: scale images of another size (bilinear) instead of refusing them.

    Raises:
        UserError: a file that is missing, cannot be read or does not fit the model.
    """
    if not 1 <= top <= len(model.names or [0]):
        if model.names is None:
            raise UserError(f"--top is for classes; {model.path} predicts numbers")
        raise UserError(f"--top must be 1 to {len(model.names)}, the number of classes; got {top}")
    samples = list(_samples(model, sources, resize))
    found = []
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        logits = model(np.stack([x for _, x in batch])).astype(np.float64)
        if model.names is None:
            found += [Prediction(name, numbers=tuple(row.tolist())) for (name, _), row in zip(batch, logits)]
            continue
        odds = np.exp(logits - logits.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        for (name, _), row in zip(batch, odds):
            best = np.argsort(-row, kind="stable")[:top]
            found.append(Prediction(name, tuple(model.names[k] for k in best), tuple(float(row[k]) for k in best)))
    return found


def _samples(model: Model, sources: Sequence[Path], resize: bool) -> Iterator[tuple[str, np.ndarray]]:
    for source in sources:
        if source.suffix == ".npy":
            yield from _of_array(model, source)
            continue
        for path in _images(source):
            yield str(path), _image(model, path, resize)


def _images(source: Path) -> Iterable[Path]:
    if not source.is_dir():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGES)
    if not found:
        raise UserError(f"{source}: holds no images ({', '.join(IMAGES)})")
    return found


def _of_array(model: Model, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes of it
        raise UserError(f"{path}: not a readable .npy: {one_line(error)}") from None
    if array.shape[1:] != model.shape or array.dtype.kind not in "uifb" or array.nbytes > MAX_ARRAY:
        expected = ", ".join(map(str, ("n", *model.shape)))
        raise UserError(f"{path}: the model takes an array ({expected}) of numbers; got {array.dtype} {array.shape}")
    for at in range(len(array)):
        yield f"{path}[{at}]", np.asarray(array[at])


def _image(model: Model, path: Path, resize: bool) -> np.ndarray:
    if len(model.shape) != 3 or model.shape[0] not in (1, 3):
        shape = "x".join(map(str, model.shape))
        raise UserError(f"{path}: the model takes samples of shape {shape}, no images; a .npy array (n, ...) has them")
    import warnings

    from PIL import Image

    channels, height, width = model.shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.size != (width, height) and not resize:
                    size = f"{picture.size[0]}x{picture.size[1]}"
                    raise UserError(f"{path}: has {size} pixels, the model takes {width}x{height}; --resize scales it")
                plain = picture.convert("L" if channels == 1 else "RGB")
                if plain.size != (width, height):
                    plain = plain.resize((width, height), Image.Resampling.BILINEAR)
                array = np.asarray(plain, dtype=np.uint8)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # whatever a damaged image makes of a decoder
        raise UserError(f"{path}: not a readable image: {one_line(error)}") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def as_text(predictions: Sequence[Prediction]) -> str:
    """A line per sample: its name, then classes with their probabilities, separated by tabs."""
    lines = []
    for p in predictions:
        said = [f"{name} {odds:.3f}" for name, odds in zip(p.classes, p.probabilities)]
        said += [f"{number:.6g}" for number in p.numbers]
        lines.append("\t".join([p.sample, *said]))
    return "\n".join(lines)


def as_rows(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One dict per sample: ``sample``, ``class_1``, ``probability_1``, ``class_2``, ...; or ``number_1``, ..."""
    rows = []
    for p in predictions:
        row: dict[str, Any] = {"sample": p.sample}
        for at, (name, odds) in enumerate(zip(p.classes, p.probabilities), 1):
            row |= {f"class_{at}": name, f"probability_{at}": odds}
        row |= {f"number_{at}": number for at, number in enumerate(p.numbers, 1)}
        rows.append(row)
    return rows
