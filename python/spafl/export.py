"""A client's model out of a run: small, dense, and free of this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

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
from .simulation.problem import first_model
from .simulation.resident import ClientSetting, Resident
from .simulation.same_run import run_digest
from .wire import decode

# Largest difference from the masked model that counts as rounding, relative to the largest output.
TOLERANCE = 1e-4


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
    from .flower.export import holds_clients, kept_model  # which needs this module

    if holds_clients(run):
        return kept_model(run, client, code)
    config = load_run_config(run, code)
    if not 0 <= client < config.partition.clients:
        raise UserError(f"--client must be 0 to {config.partition.clients - 1} in this run; got {client}")
    classes, shape, dtype = described(run / "partition.json")
    checkpoint = load_latest(run / "checkpoints", run_digest(config), client)
    if checkpoint is None:
        raise UserError(f"run folder {run} has no checkpoint yet")
    algorithm = config.build_algorithm()
    # With the weights of the first model: an algorithm may keep some of them as they are, in no message and no row.
    sample = blank(1, shape, dtype)
    model = algorithm.prepare_model(first_model(config, classes, shape, dtype), sample)
    tensors = checkpoint.client(client) or {}
    try:
        if tensors:
            hear(algorithm, model, config, client, tensors, checkpoint.state.log.missed(client))
        own = algorithm.client_model(model, checkpoint.server, tensors, client)
    except RuntimeError as error:  # shapes: the model's code is not that of the run
        raise UserError(f"{checkpoint.path} does not fit model {config.model.name}: {one_line(error)}") from None
    if own is None and (run / "flower.json").exists():
        raise UserError(
            f"client {client} keeps its model to itself: export it on its machine, spafl export STATE-DIR/"
            f"{json.loads((run / 'flower.json').read_text())['run']} --client {client}"
        )
    if own is None:
        raise UserError(f"client {client} has not trained up to round {checkpoint.state.round}")
    return own.eval(), sample


def described(path: Path) -> tuple[int, tuple[int, ...], str]:
    """Number of classes, and shape and dtype of one input, as ``partition.json`` records them."""
    try:
        found = json.loads(path.read_bytes())
        classes, shape, dtype = found["classes"], tuple(found["image"]), found.get("dtype", "uint8")
        if shape and all(type(n) is int and n > 0 for n in (classes, *shape)) and isinstance(dtype, str):
            return classes, shape, dtype
        raise ValueError("classes and image must be positive numbers")
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


def export_client(run: Path, client: int, out: Path, onnx: bool = False, code: Code | None = None) -> Exported:
    """Write a client's model as ``client-K.pt2`` (``torch.export``), and as ``client-K.onnx`` if ``onnx``.

    The small model is compared with the client's masked model before anything is written, the ONNX file with it after.
    A model of tokens is written dense: its pruned rows are zeros, they are not taken out.

    Raises:
        UserError: see :func:`client_model`; or ONNX packages are missing.
        WriteError: the files cannot be written.
    """
    if onnx:
        # torch.onnx would notice what it lacks much later.
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise UserError(f"--onnx needs {', '.join(missing)} (pip install 'spafl-kernels[onnx]')")
    model, sample = _client_model(run, client, code)
    x = sample.expand(4, *sample.shape[1:]).contiguous()
    if sample.is_floating_point():
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    if not list(threshold_layers(model)):
        small = model
    elif sample.is_floating_point():
        try:
            small = export_compact(model, tuple(sample.shape[1:]))
        except Unsupported as error:
            raise UserError(f"the model of client {client} cannot be made small: {error}") from None
    else:
        small = to_dense(model)
    with torch.no_grad():
        expected = model(x)
        difference = _relative(small(x), expected)
    if not expected.isfinite().all():
        raise UserError(f"the model of client {client} gives outputs that are not finite; nothing was written")
    if difference > TOLERANCE:
        raise RuntimeError(f"the exported model differs from the client's by {difference:.1e}; nothing was written")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    files = [out / f"client-{client}.pt2"]
    with writing(files[0]), files[0].open("wb") as file:
        torch.export.save(program, file)
    if onnx:
        files.append(out / f"client-{client}.onnx")
        torch.onnx.export(
            small, (x,), str(files[1]), input_names=["image"], output_names=["logits"], dynamo=True, verbose=False,
            dynamic_shapes=({0: batch},), external_data=False,
        )  # fmt: skip
        import onnxruntime

        session = onnxruntime.InferenceSession(str(files[1]), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"image": x.numpy()})
        difference = max(difference, _relative(torch.from_numpy(got), expected))
        if difference > TOLERANCE:
            files[1].unlink()
            raise RuntimeError(f"the ONNX model differs from the client's by {difference:.1e}; it was removed")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    macs = [sum(layer_macs(m, x[:1]).values()) for m in (model, small)]
    return Exported(files, (sizes[0], sizes[1]), (macs[0], macs[1]), difference)
