"""A client's model out of a run: small, dense, and free of this package; its files say what they take and give.

Both files carry :func:`metadata` as JSON: in ONNX under the key ``spafl``, in ``torch.export`` as the extra file
``spafl.json``.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spafl_kernels import to_dense
from spafl_kernels.compact import export as export_compact
from spafl_kernels.cost import layer_macs
from spafl_kernels.functional import threshold_layers
from spafl_kernels.training import Unsupported

from .algorithms import Algorithm, Samples
from .config import RunConfig, load_run_config
from .data import Transform, blank
from .errors import UserError, one_line
from .plugins import Code
from .simulation.announcements import Announcement
from .simulation.checkpoint import load_latest
from .simulation.files import writing
from .simulation.problem import first_model, model_input
from .simulation.resident import ClientSetting, Resident
from .simulation.same_run import run_digest
from .wire import decode

# Largest difference from the masked model that counts as rounding, relative to the largest output.
TOLERANCE = 1e-4
INPUT, OUTPUT = "image", "logits"
OPSETS = range(18, 24)
"""Versions of ONNX's operators that PyTorch's exporter can be asked for."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what the client's model became."""

    files: list[Path]
    parameters: tuple[int, int]
    """Before and after."""
    macs: tuple[int, int]
    """Multiply-accumulates per sample, before and after."""
    difference: float
    """Largest difference of outputs on random images, relative to the largest output."""
    metadata: dict[str, Any]
    """What the files say of themselves; see :func:`metadata`."""


@dataclass(frozen=True)
class Source:
    """What a run records of its samples."""

    outputs: int
    """Numbers that a model gives: one for each class, or those to predict."""
    of_classes: bool
    shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...] | None
    normalisation: dict[str, Any] | None
    """See :attr:`spafl.data.Dataset.normalisation`; None in runs of versions that did not record it."""


class Normalised(nn.Module):
    """A model behind its input normalisation, ``model((x / scale - mean) / std)`` along a sample's first dimension.

    Takes values as they are in the source: bytes of images, columns of a table.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, normalisation: Mapping[str, Any], shape: Sequence[int]) -> None:
        super().__init__()
        self.model, self.scale = model, float(normalisation["scale"])
        self.identity = not normalisation["mean"]
        along = (-1, *(1 for _ in shape[1:]))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(normalisation[name], dtype=torch.float32).view(along))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return self.model(x if self.identity else (x / self.scale - self.mean) / self.std)


def client_model(run: Path, client: int, code: Code | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """A client's model as it is tested after the last checkpoint of a run, in eval mode, and the shape of one input.

    Args:
        code: modules of the user's that the run may import; by default none.

    Raises:
        UserError: no run or checkpoint there, no such client, a client that has not been touched yet, or a run that
            needs code that ``code`` does not allow.
    """
    model, sample = _client_model(run, client, code)
    return model, tuple(sample.shape[1:])


def _client_model(run: Path, client: int, code: Code | None) -> tuple[nn.Module, Tensor]:
    """As :func:`client_model`, with one input of zeros, ``(1, *shape)``.

    Raises:
        UserError: no run or good checkpoint there, no such client, or a client that has not trained yet.
    """
    code = Code.only(()) if code is None else code
    from .flower.export import AtTheClient, Elsewhere, holds_clients, kept_model  # which needs this module

    if holds_clients(run):
        return kept_model(run, client, code)
    config = load_run_config(run, code)
    if not 0 <= client < config.partition.clients:
        raise UserError(f"--client must be 0 to {config.partition.clients - 1} in this run; got {client}")
    source = described(run / "partition.json")
    checkpoint = load_latest(run / "checkpoints", run_digest(config), client)
    if checkpoint is None:
        raise UserError(f"run folder {run} has no checkpoint yet")
    algorithm = config.build_algorithm()
    # With the weights of the first model: an algorithm may keep some of them as they are, in no message and no row.
    sample = model_input(config, source.shape, source.dtype)
    model = algorithm.prepare_model(first_model(config, source.outputs, source.shape, source.dtype), sample)
    tensors: Mapping[str, Tensor] = checkpoint.client(client) or {}
    if (run / "flower.json").exists() and algorithm.client_state(model):
        tensors = Elsewhere()
    try:
        if isinstance(tensors, dict) and tensors:
            hear(algorithm, model, config, client, tensors, checkpoint.state.log.missed(client))
        own = algorithm.client_model(model, checkpoint.server, tensors, client)
    except AtTheClient:
        raise UserError(
            f"client {client} keeps to itself what makes its model: export it on its machine, spafl export STATE-DIR/"
            f"{json.loads((run / 'flower.json').read_text())['run']} --client {client}"
        ) from None
    except RuntimeError as error:  # shapes: the model's code is not that of the run
        raise UserError(f"{checkpoint.path} does not fit model {config.model.name}: {one_line(error)}") from None
    if own is None:
        raise UserError(f"client {client} has not trained up to round {checkpoint.state.round + 1}")
    return own.float().eval(), blank(1, source.shape, source.dtype)


def _description(run: Path, client: int) -> Path:
    """Where a run folder, or a folder of clients' state, says what samples are."""
    whole = run / "partition.json"
    return whole if whole.exists() else run / f"client-{client:05d}.json"


def described(path: Path) -> Source:
    """What ``partition.json``, or a client's own description, records of the samples.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        classes, shape, dtype = found["classes"], tuple(found["image"]), found.get("dtype", "uint8")
        if not shape or not all(type(n) is int and n > 0 for n in (classes, *shape)) or not isinstance(dtype, str):
            raise ValueError("classes and image must be positive numbers")
        names, norm, targets = found.get("class_names"), found.get("normalisation"), found.get("targets")
        outputs = classes if targets is None else targets["outputs"]
        if type(outputs) is not int or outputs < 1:
            raise ValueError("targets.outputs must be a positive number")
        if names is not None and (len(names) != classes or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"class_names must be {classes} names")
        if norm is not None:
            numbers = [norm["scale"], *norm["mean"], *norm["std"]]
            if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers) or not all(
                len(norm[part]) in (0, shape[0]) for part in ("mean", "std")
            ):
                raise ValueError("normalisation must be a scale, and one mean and std for each channel")
        return Source(outputs, targets is None, shape, dtype, tuple(names) if names else None, norm)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


def hear(
    algorithm: Algorithm,
    model: nn.Module,
    config: RunConfig,
    client: int,
    own: dict[str, Tensor],
    missed: Sequence[Announcement],
) -> None:
    """Apply to a client's tensors, in place, what was announced since it trained."""
    if not missed:
        return
    setting = ClientSetting(config.local_training(), Transform(), {}, config.seed, torch.device("cpu"))
    resident = Resident(algorithm, copy.deepcopy(model), "masked", setting, own)
    nothing = Samples(torch.empty(0), torch.empty(0))
    listener = resident.lend(client, own, nothing, nothing)
    for announcement in missed:
        algorithm.receive(listener, decode(announcement.frame, announcement.round), announcement.round)
    resident.take_back()


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def metadata(config: RunConfig, client: int, source: Source, normalised: bool) -> dict[str, Any]:
    """What an exported file says of itself.

    ``format`` (1), ``run``, ``client``, ``model``, ``algorithm``, ``version`` of this package; ``input``: ``name``,
    ``shape`` of a sample, ``dtype`` and ``normalisation`` (``(x / scale - mean) / std`` along the first dimension of a
    sample; None: not recorded), ``normalised_in_graph``: whether the file's graph does it, and takes values as stored;
    ``output``: ``name``, ``numbers`` (how many), and ``class_names``, None where numbers are predicted.
    """
    from . import __version__

    names = list(source.class_names or map(str, range(source.outputs))) if source.of_classes else None
    return {
        "format": 1,
        "run": config.name,
        "client": client,
        "model": config.model.name,
        "algorithm": config.algorithm["name"],
        "version": __version__,
        "input": {
            "name": INPUT,
            "shape": list(source.shape),
            "dtype": source.dtype if normalised or source.dtype == "int64" else "float32",
            "stored": source.dtype,
            "normalisation": source.normalisation,
            "normalised_in_graph": normalised,
        },
        "output": {"name": OUTPUT, "numbers": source.outputs, "class_names": names},
    }


def export_client(
    run: Path,
    client: int,
    out: Path,
    onnx: bool = False,
    code: Code | None = None,
    normalise: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a client's model as ``client-K.pt2`` (``torch.export``), and as ``client-K.onnx`` if ``onnx``.

    The small model is compared with the client's masked model before anything is written, the ONNX file before it takes
    its name. A model of tokens is written dense: its pruned rows are zeros, they are not taken out.

    Args:
        normalise: take samples as they are in the source (bytes of images) and normalise them in the graph.
        opset: of ONNX, in :data:`OPSETS`; by default what the exporter of PyTorch takes.

    Raises:
        UserError: see :func:`client_model`; ONNX packages are missing, an opset that cannot be had, or a run that did
            not record its normalisation.
        WriteError: the files cannot be written.
    """
    if opset is not None and (not onnx or opset not in OPSETS):
        said = f"must be {OPSETS.start} to {OPSETS.stop - 1}; got {opset}" if onnx else "needs --onnx"
        raise UserError(f"--opset {said}")
    if onnx:
        # torch.onnx would notice what it lacks much later.
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise UserError(f"--onnx needs {', '.join(missing)} (pip install 'spafl-kernels[onnx]')")
    model, sample = _client_model(run, client, code)
    config, source = load_run_config(run, None), described(_description(run, client))
    x = _examples(source, normalise)
    small = _small(model, sample, client)
    if normalise:
        if source.normalisation is None:
            raise UserError(
                f"--normalise: run folder {run} does not record how its samples were normalised (it is of an earlier "
                "version); resuming it once records it"
            )
        model, small = (Normalised(m, source.normalisation, source.shape).eval() for m in (model, small))
    with torch.no_grad():
        expected = model(x)
        difference = _relative(small(x), expected)
    if not expected.isfinite().all():
        raise UserError(f"the model of client {client} gives outputs that are not finite; nothing was written")
    if difference > TOLERANCE:
        raise RuntimeError(f"the exported model differs from the client's by {difference:.1e}; nothing was written")
    about = metadata(config, client, source, normalise)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(small, (x,), dynamic_shapes=dynamic)
    files = [out / f"client-{client}.pt2"]
    with writing(files[0]), files[0].open("wb") as file:
        torch.export.save(program, file, extra_files={"spafl.json": json.dumps(about)})
    if onnx:
        files.append(out / f"client-{client}.onnx")
        difference = max(difference, _write_onnx(files[1], small, x, expected, about, dynamic, opset))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    macs = [sum(layer_macs(m, x[:1]).values()) for m in (model, small)]
    return Exported(files, (sizes[0], sizes[1]), (macs[0], macs[1]), difference, about)


def _examples(source: Source, normalise: bool) -> Tensor:
    """Four random inputs of an exported file."""
    generator = torch.Generator().manual_seed(0)
    if source.dtype == "int64":
        return torch.zeros(4, *source.shape, dtype=torch.int64)
    if normalise and source.dtype == "uint8":
        return torch.randint(256, (4, *source.shape), generator=generator).to(torch.uint8)
    return torch.randn(4, *source.shape, generator=generator)


def _small(model: nn.Module, sample: Tensor, client: int) -> nn.Module:
    if not list(threshold_layers(model)):
        return model
    if not sample.is_floating_point():
        return to_dense(model)
    try:
        return export_compact(model, tuple(sample.shape[1:]))
    except Unsupported as error:
        raise UserError(f"the model of client {client} cannot be made small: {error}") from None


def _write_onnx(
    path: Path, small: nn.Module, x: Tensor, expected: Tensor, about: dict[str, Any], dynamic: Any, opset: int | None
) -> float:
    """Write the file and return its difference from ``expected`` in onnxruntime; a wrong one is never there."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    program = torch.onnx.export(
        small, (x,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False, dynamic_shapes=dynamic,
        opset_version=opset,
    )  # fmt: skip
    assert program is not None
    program.model.doc_string = f"client {about['client']} of run {about['run']}"
    got_opset = program.model.opset_imports.get("", 0)
    if opset is not None and got_opset != opset:
        raise UserError(f"--opset: this model cannot be written with opset {opset} (it needs {got_opset})")
    about["opset"] = got_opset
    program.model.metadata_props["spafl"] = json.dumps(about)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder, writing(path):
        written = Path(folder) / path.name
        program.save(written, external_data=False)
        session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {INPUT: x.numpy()})
        difference = _relative(torch.from_numpy(got), expected)
        if difference > TOLERANCE:
            raise RuntimeError(f"the ONNX model differs from the client's by {difference:.1e}; it was not kept")
        written.replace(path)
    return difference
