"""What a run works on: data, parts, model and algorithm, loaded and checked to fit before any work starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spafl_kernels.cost import layer_macs
from spafl_kernels.functional import threshold_layers

from .. import rng
from ..algorithms import Algorithm, Objective
from ..config import RunConfig
from ..data import Dataset, Partition, blank, load_dataset, partition
from ..errors import UserError
from ..models import MODELS, build_model, fit_model
from ..wire import Uplink, fingerprint


@dataclass
class Method:
    """Model and algorithm of a run: all of it that does not take data to build.

    Attributes:
        model: the initial model, prepared by the algorithm.
        uplink: how uploads travel.
        client_state: initial tensors of a client's row: the algorithm's, and the uplink's.
        macs: dense multiply-accumulates per sample of each threshold layer (published counting).
        layer_weights: number of weights of each convolution and linear layer of the configured model.
    """

    model: nn.Module
    algorithm: Algorithm
    uplink: Uplink
    client_state: dict[str, Tensor]
    macs: dict[str, int]
    layer_weights: dict[str, int]


@dataclass
class Problem(Method):
    """A method, its data, and the parts of it that are the clients'."""

    dataset: Dataset
    parts: Partition

    def class_counts(self) -> dict[str, Any]:
        """How many samples of each class every client has, and what samples are, as ``partition.json`` records it."""
        data, parts = self.dataset, self.parts
        counted = data.classes or 1 + len(data.edges)
        return {
            "classes": counted,
            "image": list(data.shape),
            "dtype": str(data.train_x.dtype),
            **data.about(),
            "train": parts.counts(data.strata("train"), counted).tolist(),
            "test": parts.counts(data.strata("test"), counted, "test").tolist(),
        }


def build_method(config: RunConfig, outputs: int, shape: tuple[int, ...], dtype: str = "float32") -> Method:
    """Model and algorithm for samples of ``shape``: ``(channels, height, width)``, say.

    Args:
        outputs: numbers that a model gives for a sample: one for each class, or those to predict.
        dtype: of the stored samples; ``int64`` is tokens.

    Raises:
        UserError: a model that does not take these samples, or an algorithm that does not take this model.
    """
    model = first_model(config, outputs, shape, dtype)
    algorithm = config.build_algorithm()
    sample = model_input(config, shape, dtype)
    counts = layer_macs(model, sample, per_token=False)
    layers = dict(threshold_layers(model))
    weights = {name: model.get_submodule(name).weight.numel() for name in counts}  # type: ignore[operator, union-attr]
    try:
        model = algorithm.prepare_model(model, sample)
    except ValueError as error:
        raise UserError(f"algorithm {config.algorithm['name']}: {error}") from None
    layers |= dict(threshold_layers(model))  # an algorithm may put thresholds on more layers
    macs = {name: count for name, count in counts.items() if name in layers}
    uplink = Uplink(config.communication.encoding, fingerprint(model.state_dict()))
    state = algorithm.client_state(model) | _feedback(config, uplink, algorithm, model)
    return Method(model, algorithm, uplink, state, macs, weights)


def build_problem(config: RunConfig) -> Problem:
    """Load the data, cut it into clients and build the model.

    Raises:
        UserError: data missing or corrupt, an impossible partition, or a model that does not take these images.
    """
    dataset = load_data(config)
    objective_of(config, dataset)
    parts = cut_data(config, dataset)
    method = build_method(config, dataset.outputs, dataset.shape, str(dataset.train_x.dtype))
    sizes = {k: len(part) for k, part in enumerate(parts.train)}
    check_single_samples(config, method.model, model_input(config, dataset.shape, str(dataset.train_x.dtype)), sizes)
    return Problem(**vars(method), dataset=dataset, parts=parts)


def load_data(config: RunConfig) -> Dataset:
    """The data set of a run; UserError if it cannot be had, or has more classes than samples."""
    data = config.data
    options = data.model_dump(exclude={"name", "root", "options"}, exclude_none=True)
    if twice := sorted(options.keys() & data.options.keys()):
        raise UserError(f"data.options.{twice[0]}: it is set in [data] too")
    root = Path(data.root).expanduser() if data.root else None
    try:
        return load_dataset(data.name, root, **options, **data.options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data: {error}") from None


def objective_of(config: RunConfig, dataset: Dataset) -> Objective:
    """What a run learns from these data.

    Raises:
        UserError: its loss is not for such targets, or numbers have no tolerance.
    """
    objective = config.objective(dataset.classes)
    if objective.of_classes != bool(dataset.classes):
        if dataset.classes:
            raise UserError(
                f"training.loss: {objective.loss} needs numbers to predict (floats); "
                f"data {config.data.name} has classes"
            )
        raise UserError(
            f"training.loss: data {config.data.name} has numbers to predict (floats), so it must say mse, mae or "
            "huber; classes are whole numbers"
        )
    if not dataset.classes and config.evaluation.tolerance is None:
        raise UserError("evaluation.tolerance: with numbers to predict it must say how far off still counts as right")
    if dataset.classes and config.evaluation.tolerance is not None:
        raise UserError(f"evaluation.tolerance: is for numbers to predict; data {config.data.name} has classes")
    if not dataset.classes and config.evaluation.confusion:
        raise UserError(f"evaluation.confusion: needs classes; data {config.data.name} has numbers to predict")
    if fault := config.build_algorithm().objective_fault(objective):
        raise UserError(fault)
    return objective


def cut_data(config: RunConfig, dataset: Dataset) -> Partition:
    """The clients' parts of a run's data; UserError if they cannot be had."""
    p = config.partition
    given: dict[str, Any] = {name: getattr(p, name) for name in ("alpha", "classes_per_client", "sizes", "file")}
    if p.scheme == "natural":
        given["owners"] = dataset.owners
    if twice := sorted(given.keys() & p.options.keys()):
        raise UserError(f"partition.options.{twice[0]}: it is a key of [partition]")
    try:
        return partition(
            dataset.strata("train"), dataset.strata("test"), p.scheme, p.clients,
            rng.numpy_stream(config.seed, "partition"),
            min_train=p.min_train, min_test=p.min_test, max_draws=p.max_draws, **given, **p.options,
        )  # fmt: skip
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"partition: {error}") from None


def first_model(config: RunConfig, outputs: int, shape: tuple[int, ...], dtype: str) -> nn.Module:
    """The initial model of a run, not prepared yet: takes samples of ``shape``, gives ``outputs`` numbers for each.

    Raises:
        UserError: a registered model for images of another size, or a plug-in that does not fit.
    """
    name = config.model.name
    info = MODELS.get(name)
    if info is not None and (len(shape) != 3 or shape[1:] != (info.image, info.image)):
        has = "x".join(map(str, shape[1:])) + " images" if len(shape) == 3 else f"samples of shape {shape}"
        raise UserError(f"model {name} takes {info.image}x{info.image} images; data {config.data.name} has {has}")
    seed = rng.stream_seed(config.seed, "initial model")
    try:
        model = build_model(name, outputs, shape[0], seed, shape=shape, options=config.model.options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    return fit_model(name, model, blank(2, shape, dtype), outputs).to(config.local_training().torch_dtype)


def model_input(config: RunConfig, shape: tuple[int, ...], dtype: str) -> Tensor:
    """One sample of zeros, ``(1, *shape)``, as the model of a run takes it, of data stored as ``dtype``."""
    sample = blank(1, shape, dtype)
    return sample.to(config.local_training().torch_dtype) if sample.is_floating_point() else sample


def _feedback(config: RunConfig, uplink: Uplink, algorithm: Algorithm, model: nn.Module) -> dict[str, Tensor]:
    """What clients keep for a lossy encoding; refuses methods whose uploads mean something else in every round."""
    if uplink.encoding == "fp32":
        return {}
    if config.training.dtype != "float32":
        raise UserError(
            f"communication.encoding: {uplink.encoding} is for uploads of float32, and training.dtype is "
            f"{config.training.dtype}; fp32 leaves them as they are"
        )
    server = algorithm.server_state(model)

    def form(round: int) -> dict[str, tuple[Any, ...]]:
        expected = algorithm.expected_upload(server, round, 0)
        return {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}

    steady = algorithm.steady_uploads
    if not steady or any(form(0) != form(round) for round in range(1, min(config.rounds, 4))):
        raise UserError(
            f"communication.encoding: {uplink.encoding} keeps what an upload lost for the next one, but uploads of "
            f"algorithm {config.algorithm['name']} change their form from round to round; fp32 takes any"
        )
    return uplink.client_state(algorithm.expected_upload(server, 0, k) for k in range(config.partition.clients))


def check_single_samples(config: RunConfig, model: nn.Module, sample: Tensor, sizes: Mapping[int, int]) -> None:
    """Refuse parts that leave a training batch of one sample to a model that cannot normalise over one.

    Args:
        sample: one sample, as the model takes it.
        sizes: training samples by client.

    Raises:
        UserError: names the first such client.
    """
    size, drop = config.training.batch_size, config.training.drop_last
    lone = [k for k, count in sizes.items() if count == 1 or (count % size == 1 and not drop) or size == 1]
    if not lone:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(sample)
    except ValueError:
        raise UserError(
            f"training: client {lone[0]} has {sizes[lone[0]]} samples, so with batch_size = {size} a batch "
            f"of one sample is left, which {config.model.name} cannot normalise; set training.drop_last = true, "
            "another training.batch_size or a larger partition.min_train"
        ) from None
