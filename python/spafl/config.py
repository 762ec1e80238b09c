"""The configuration of a run: sections, defaults, ranges, and one-line errors.

A run is described by a TOML file. Values come, later over earlier, from the defaults here, the algorithm's variant
(:attr:`spafl.algorithms.Algorithm.presets`), the file, and ``--set section.key=value``. The resolved configuration,
with every value spelled out, is saved in the run folder.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from . import plugins
from .algorithms import Algorithm, LocalTraining, Loss, Objective, find_algorithm
from .budgets import EXECUTED, by_class, kinds_of
from .callbacks.registry import CALLBACKS
from .checked import CheckedModel, alternatives, short
from .data import DATASETS, MAX_ALPHA, MIN_ALPHA, SCHEMES
from .errors import UserError
from .later import LATER, completed
from .models import MODELS
from .plugins import Code
from .system import PRESETS, Device, System, read_trace
from .wire import Encoding

# Above what any machine or study needs: past these, memory or time explode, or float32 ends.
MANY = 10_000_000
LARGE = 1e30


class _Section(CheckedModel):
    pass


def _in_float32(value: float) -> float:
    if value < 1e-30:
        raise PydanticCustomError("vanishing", "input should be 1e-30 or more, or it is 0 in float32")
    return value


Positive = Annotated[float, Field(gt=0, le=LARGE), AfterValidator(_in_float32)]


class DataConfig(_Section):
    name: str
    root: str | None = None
    """Folder that holds the data files; datasets that are embedded or synthetic need none."""
    image: int | None = Field(default=None, ge=8, le=1024)
    channels: int | None = Field(default=None, ge=1, le=64)
    classes: int | None = Field(default=None, ge=2, le=100_000)
    train: int | None = Field(default=None, ge=1, le=MANY)
    test: int | None = Field(default=None, ge=1, le=MANY)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    augment: Literal["none", "crop-flip"] | None = None
    """Training augmentation; by default what is usual for the data set."""
    pixels: Literal["standard", "unit", "raw"] | None = None
    """What the model sees: standardised values (the default), 0..1, or stored bytes as they are."""
    verify_checksums: bool | None = None
    file: str | None = None
    """File or folder of a reader (``npz``, ``csv``, ...) or of a plug-in."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of a registered data set or of a plug-in, by the parameters of its function."""


class PartitionConfig(_Section):
    scheme: str = "dirichlet"
    clients: int = Field(default=100, ge=1, le=MANY)
    alpha: float | None = Field(default=None, ge=MIN_ALPHA, le=MAX_ALPHA)
    """Concentration of the Dirichlet draws (schemes ``dirichlet`` and ``size``); small is uneven."""
    classes_per_client: int | None = Field(default=None, ge=1, le=100_000)
    """Classes of each client (scheme ``pathological``)."""
    min_train: int = Field(default=1, ge=1, le=MANY)
    min_test: int = Field(default=1, ge=1, le=MANY)
    max_draws: int = Field(default=100, ge=1, le=10_000)
    sizes: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Relative amounts of data, one for each client (scheme ``size``)."""
    file: str | None = None
    """A JSON file with every client's samples (scheme ``file``); see :func:`spafl.data.read_partition`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of a registered scheme or of a plug-in, by the parameters of its function."""

    @model_validator(mode="before")
    @classmethod
    def _a_file_is_a_scheme(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("file") is not None and raw.get("scheme", "file") == "file":
            return {**raw, "scheme": "file"}
        return raw

    @model_validator(mode="after")
    def _a_scheme_of_files(self) -> PartitionConfig:
        if (self.scheme == "file") != (self.file is not None):
            raise PydanticCustomError("file", "scheme = 'file' and file = 'split.json' need each other")
        return self


class ModelConfig(_Section):
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Further parameters of the model's class or function."""


class TrainingConfig(_Section):
    """Local training; see :class:`spafl.algorithms.LocalTraining` for what every setting does."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.01
    threshold_lr: Positive | None = None
    """Learning rate of the thresholds, scheduled as ``lr`` is; by default ``lr``."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of ``sgd`` alone."""
    nesterov: bool = False
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Of ``adam`` and ``adamw`` alone, as is ``eps``."""
    eps: Positive = 1e-8
    weight_decay: float = Field(default=0.0, ge=0, le=LARGE)
    batch_size: int = Field(default=32, ge=1, le=1_000_000)
    epochs: int | float = Field(default=5, gt=0, le=100_000)
    """Passes over a client's samples in a turn; fractions are rounded to batches, at least one."""
    steps: int | None = Field(default=None, ge=1, le=MANY)
    """Optimiser steps of a turn, in place of ``epochs``."""
    early_stopping: int | None = Field(default=None, ge=1, le=100_000)
    """A client ends its turn after so many passes in a row whose mean training loss was not better than the best."""
    min_improvement: float = Field(default=0.0, ge=0, lt=1)
    """Better is below ``(1 - min_improvement)`` times the best so far."""
    schedule: Literal["exponential", "step", "cosine"] = "exponential"
    """Of the learning rate, over the rounds of the run."""
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    """``exponential``: ``max(lr * lr_decay ** r, lr_floor)`` in round r; ``step``: the same every ``step_rounds``."""
    lr_floor: float = Field(default=0.0, ge=0, le=LARGE)
    step_rounds: int | None = Field(default=None, ge=1, le=MANY)
    cosine_rounds: int | None = Field(default=None, ge=1, le=MANY)
    """Rounds in which ``cosine`` comes down to ``lr_floor``; by default those of the run after the warm-up."""
    warmup_rounds: int = Field(default=0, ge=0, le=MANY)
    """The learning rate rises linearly over so many rounds, to ``lr`` in the next, where the schedule begins."""
    max_grad_norm: Positive | None = None
    drop_last: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    """What models compute in, and what messages hold; ``float64`` is for comparisons in which rounding is to decide
    nothing: on a CPU, with messages of twice the size."""
    loss: Loss = "cross-entropy"
    """Of classes cross-entropy; of numbers mse, mae or huber."""

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> TrainingConfig:
        def refuse(reason: str) -> None:
            raise PydanticCustomError("together", "{reason}", {"reason": reason})

        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            refuse(
                "nesterov = true needs optimizer = sgd and a momentum above 0; "
                f"got {self.optimizer} and momentum = {self.momentum}"
            )
        if self.schedule == "step" and self.step_rounds is None:
            refuse("schedule = step needs step_rounds, after which the learning rate is multiplied by lr_decay")
        for key, schedule in (("step_rounds", "step"), ("cosine_rounds", "cosine")):
            if getattr(self, key) is not None and self.schedule != schedule:
                refuse(f"{key} belongs to schedule = {schedule}; got schedule = {self.schedule}")
        if self.schedule == "cosine" and self.lr_decay != 1:
            refuse(f"schedule = cosine takes no lr_decay; got {self.lr_decay}")
        if self.schedule == "cosine" and self.lr_floor > self.lr:
            refuse(f"schedule = cosine comes down to lr_floor = {self.lr_floor}, which is above lr = {self.lr}")
        if self.min_improvement and self.early_stopping is None:
            refuse("min_improvement needs early_stopping")
        return self


class SamplingConfig(_Section):
    clients_per_round: int = Field(default=10, ge=1, le=MANY)
    stream: Literal["seeded", "published-cifar100"] = "seeded"
    """``published-cifar100``: NumPy's legacy generator reseeded with the round, whatever the run's seed."""
    min_uploads: int = Field(default=1, ge=1, le=MANY)
    """A round with fewer good uploads stops the run; bad ones are left out (:mod:`spafl.merge`)."""


class CommunicationConfig(_Section):
    encoding: Encoding = "fp32"
    """Of uploads; see :mod:`spafl.wire.encoding`. The way down is exact."""


class EvaluationConfig(_Section):
    every: int = Field(default=1, ge=1, le=MANY)
    """Evaluate every so many rounds, and after the last."""
    clients: Any = "all"
    """How many clients are tested then: ``all``, or a number, drawn anew for each evaluation."""
    confusion: bool = False
    """Whether to count, client by client, which class is taken for which."""
    tolerance: Positive | None = None
    """Of predicted numbers: each at most so far from its target counts as right."""
    train_data: Literal["final", "always", "never"] = "final"
    """When to measure accuracy on the training data too (for the generalisation gap)."""

    @field_validator("clients")
    @classmethod
    def _all_or_some(cls, value: Any) -> Any:
        if value == "all" or (type(value) is int and 1 <= value <= MANY):
            return value
        raise PydanticCustomError("clients", f"all, or a whole number from 1 to {MANY}")


class SimulationConfig(_Section):
    workers: int = Field(default=0, ge=0, le=256)
    """Worker processes of one thread each; 0: one per core on a CPU, one on a GPU."""
    engine: Literal["auto", "masked", "compact"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where a table of measured speeds shows the run to be faster there, else the CPU."""
    store: Literal["auto", "memory", "file"] = "auto"
    """Where clients' tensors live between turns; auto: in memory if they need at most a quarter of what is free."""
    checkpoint_every: int = Field(default=10, ge=1, le=MANY)
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)


class DeviceConfig(_Section):
    """A class of devices; see :class:`spafl.system.Device`."""

    flops: Positive
    down: Positive
    up: Positive
    memory: Positive
    watts: float = Field(default=0.0, ge=0, le=LARGE)
    down_watts: float = Field(default=0.0, ge=0, le=LARGE)
    up_watts: float = Field(default=0.0, ge=0, le=LARGE)


class SystemConfig(_Section):
    """Devices of the clients, and the rules of a round on them (:class:`spafl.system.System`)."""

    devices: dict[str, Positive] = Field(min_length=1)
    """Share of the clients by class of device, relative to each other."""
    classes: dict[str, DeviceConfig] = Field(default_factory=dict)
    """Classes of one's own; they come before presets of the same name."""
    clients: tuple[str, ...] | None = None
    """The class of every client, in place of a draw."""
    spread: float = Field(default=0.0, ge=0, le=3)
    """Standard deviation of the logarithm of a client's speed around that of its class."""
    availability: float = Field(default=1.0, gt=0, le=1)
    trace: str | None = None
    """A JSON file that says when clients are there (:mod:`spafl.system.trace`)."""
    failure: float = Field(default=0.0, ge=0, lt=1)
    deadline: Positive | None = None
    over_selection: float = Field(default=1.0, ge=1, le=100)
    idle: Positive = 60.0

    def device(self, name: str) -> Device:
        """Figures of a class."""
        own = self.classes.get(name)
        return PRESETS[name] if own is None else Device(**own.model_dump())


class CallbackConfig(_Section):
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the callback's class."""


class FlowerConfig(_Section):
    """Distributed runs (:mod:`spafl.flower`) alone."""

    start_clients: int | None = Field(default=None, ge=1, le=MANY)
    """So many clients have to be there before the first round; by default all."""
    patience: float = Field(default=60.0, ge=0, le=1e6)
    """Seconds to wait for sampled clients that are not there, and for the start; the round goes on without them."""
    round_timeout: float = Field(default=600.0, gt=0, le=1e6)
    """Seconds for training, and again for evaluation; answers that come later are not merged."""


class RunConfig(_Section):
    """Everything that defines a run. ``algorithm`` is checked against its own options class."""

    name: str = Field(default="run", min_length=1)
    seed: int = Field(default=1, ge=0, lt=2**32)
    rounds: int = Field(default=100, ge=1, le=MANY)
    data: DataConfig
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig
    algorithm: dict[str, Any]
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    communication: CommunicationConfig = CommunicationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    simulation: SimulationConfig = SimulationConfig()
    system: SystemConfig | None = None
    """None: clients answer at once, and nothing is modelled."""
    flower: FlowerConfig = FlowerConfig()
    callbacks: tuple[CallbackConfig, ...] = ()
    """Who is told of finished rounds; they change nothing of a run."""

    @field_validator("name")
    @classmethod
    def _stays_below_the_runs(cls, name: str) -> str:
        """The name becomes a folder of ``runs/``, and must not lead out of it."""
        parts = name.split("/")
        if not name.isprintable() or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
            raise PydanticCustomError(
                "name", "a name of a folder below runs/ is needed: printable, relative, without '.' and '..'"
            )
        return name

    def evaluates(self, round: int) -> bool:
        """Whether clients are tested after a round."""
        return (round + 1) % self.evaluation.every == 0 or round + 1 == self.rounds

    def tests_training_data(self, round: int) -> bool:
        """Whether an evaluation after this round is on the training data too."""
        wanted = self.evaluation.train_data
        return wanted == "always" or (wanted == "final" and round + 1 == self.rounds)

    def build_algorithm(self) -> Algorithm:
        """The algorithm object these settings describe."""
        options = {key: value for key, value in self.algorithm.items() if key != "name"}
        name = self.algorithm["name"]
        cls = find_algorithm(name)
        try:
            algorithm = cls(cls.Options(**options))
        except Exception as error:
            if not plugins.is_path(name):
                raise
            raise UserError(f"algorithm.name: {plugins.place(cls)} failed: {plugins.explain(error)}") from None
        algorithm.local = self.local_training()
        return algorithm

    @property
    def code(self) -> dict[str, str]:
        """The import paths this configuration names, by setting."""
        return plugins.named(self.model_dump())

    def local_training(self) -> LocalTraining:
        """The ``[training]`` section as the clients use it."""
        return LocalTraining(**self.training.model_dump(exclude={"loss"}))

    def objective(self, classes: int) -> Objective:
        """What clients learn: ``classes``, or numbers (0)."""
        e = self.evaluation
        return Objective(self.training.loss, e.tolerance or 0.0, classes if e.confusion else 0)

    def build_system(self) -> System | None:
        """The model of the clients' devices, if there is one.

        Raises:
            UserError: the trace cannot be read.
        """
        s, clients = self.system, self.partition.clients
        if s is None:
            return None
        trace = None if s.trace is None else read_trace(Path(s.trace).expanduser(), clients)
        return System(
            clients, self.seed, {name: s.device(name) for name in s.devices}, s.devices, s.clients, s.spread,
            s.availability, trace, s.failure, math.inf if s.deadline is None else s.deadline, s.over_selection, s.idle,
        )  # fmt: skip

    def to_toml(self) -> str:
        """The resolved configuration, complete: reading it back gives an equal one."""
        return tomli_w.dumps(_swap(self.model_dump(), None, OFF))


MAX_FILE = 1 << 20  # bytes of a configuration

# TOML has no null. The word is needed because leaving a key out means "as the variant says".
OFF = "off"


def _swap(value: Any, old: Any, new: Any) -> Any:
    """``value`` with every ``old`` inside it replaced by ``new``."""
    if isinstance(value, Mapping):
        return {key: _swap(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):  # of tables; the words of a list are its own
        return [_swap(item, old, new) if isinstance(item, Mapping) else item for item in value]
    return new if value == old and type(value) is type(old) else value


def deep_merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, table by table."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_assignment(text: str) -> dict[str, Any]:
    """``a.b=value`` as a nested table; the value is read as TOML, and as plain text where that fails.

    ``off`` clears an optional value (``training.max_grad_norm=off``), here as in a file.
    """
    path, equals, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys) or len(keys) > 8:
        raise UserError(f"--set takes section.key=value; got {short(text)}")
    if not text.isprintable():  # a line break would begin another setting
        raise UserError(f"--set takes printable characters on one line; got {short(text)}")
    parsed: Any
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except RecursionError:
        raise UserError(f"--set {path}: the value is nested too deeply") from None
    except ValueError:  # no TOML: a plain text, or a number as people write it (.5)
        parsed = value.strip()
        if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", parsed, re.ASCII):
            parsed = float(parsed)
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


def load_config(
    path: Path, assignments: Iterable[str] = (), code: Code | None = None, stored: bool = False
) -> RunConfig:
    """Read, complete and check a configuration file.

    Args:
        path: the file.
        assignments: ``section.key=value``, laid over it.
        code: where the file is not trusted, the modules that may be imported; what ``assignments`` name may be too.
        stored: see :func:`resolve_config`.

    Raises:
        UserError: file missing or not TOML, unknown key (the nearest valid one is named), wrong type or range, or code
            that may not be imported.
    """
    raw = read_toml(path)
    given: dict[str, Any] = {}
    for assignment in assignments:
        given = deep_merge(given, parse_assignment(assignment))
    raw = deep_merge(raw, given)
    if code is not None:
        asked = Code.only(plugins.named(given).values()).modules
        _check_code(str(path), raw, Code(code.everything, code.modules | asked))
    return resolve_config(raw, stored=stored)


def _check_code(what: str, raw: Mapping[str, Any], code: Code, needed: Iterable[str] | None = None) -> None:
    for setting, name in plugins.named(raw).items():
        if (needed is None or setting in needed) and not code.allows(name):
            raise UserError(
                f"{what} names code ({setting} = {name!r}), which a run folder does not run unasked; allow it with "
                f"--allow-code, or this module with --allow-module {plugins.module_of(name)}"
            )


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file in UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it cannot be read, is larger than :data:`MAX_FILE`, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"configuration file {path} is a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"configuration file {short(str(path))} cannot be read: {reason}") from None
    if len(content) > MAX_FILE:
        raise UserError(f"configuration file {path} has more than {MAX_FILE} bytes")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of more digits than Python reads
        raise UserError(f"{path} is not valid TOML: {error}") from None


def load_run_config(run: Path, code: Code | None) -> RunConfig:
    """The configuration in a run folder.

    Args:
        run: the folder.
        code: modules that may be imported for its models: a folder from somewhere else must not execute code unasked.
            None imports nothing and leaves the settings of an algorithm from elsewhere unchecked, for looking at a run.

    Raises:
        UserError: as :func:`load_config`, or the run names code that ``code`` does not allow.
    """
    path = run / "config.toml"
    if not path.exists():
        raise UserError(f"{run} is not a run folder: it has no config.toml")
    raw = read_toml(path)
    if code is not None:
        _check_code(f"run folder {run}", raw, code, ("model.name", "algorithm.name"))
    return resolve_config(raw, imports=code is not None, stored=True)


def resolve_config(raw: Mapping[str, Any], imports: bool = True, stored: bool = False) -> RunConfig:
    """Complete and check a configuration given as nested tables; errors as :func:`load_config`.

    Names may be classes and functions themselves instead of their import paths. Without ``imports`` nothing of the
    user's is imported, and the settings of an algorithm that is named by import path stay as they are. ``stored``: the
    tables are complete, from a run folder; what they lack did not exist when they were written (:mod:`.later`).
    """
    try:
        return _resolve(_swap(raw, OFF, None), imports, stored)
    except RecursionError:
        raise UserError("the configuration is nested too deeply") from None


def _with_paths(raw: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with the import paths of classes and functions in their place, and ``algorithm.options`` unpacked."""
    for setting in plugins.SETTINGS:
        section, _, key = setting.partition(".")
        table = raw.get(section)
        if isinstance(table, Mapping) and (name := table.get(key)) is not None and callable(name):
            raw = {**raw, section: {**table, key: plugins.path_of(setting, name)}}
    entries = raw.get("callbacks")
    if isinstance(entries, list | tuple):
        raw = {**raw, "callbacks": [_callback(at, entry) for at, entry in enumerate(entries)]}
    algorithm = raw.get("algorithm")
    if isinstance(algorithm, Mapping) and isinstance(algorithm.get("options"), Mapping):
        flat = {key: value for key, value in algorithm.items() if key != "options"}
        if twice := sorted(flat.keys() & algorithm["options"].keys()):
            raise UserError(f"algorithm.options.{twice[0]}: it is set in [algorithm] too")
        raw = {**raw, "algorithm": {**flat, **algorithm["options"]}}
    return raw


def _callback(at: int, entry: Any) -> Any:
    """An entry of ``callbacks`` as a table: a name or a class alone will do."""
    table = entry if isinstance(entry, Mapping) else {"name": entry}
    if callable(table.get("name")):
        table = {**table, "name": plugins.path_of(f"callbacks.{at}.name", table["name"])}
    return table


def _resolve(raw: dict[str, Any], imports: bool, stored: bool) -> RunConfig:
    raw = _with_paths(raw)
    if stored:
        raw = completed(raw, LATER)
    algorithm = raw.get("algorithm")
    if not isinstance(algorithm, Mapping) or not isinstance(algorithm.get("name"), str):
        _check_keys(raw, RunConfig, "")
        raise UserError('configuration needs [algorithm] with name = "spafl" (or another algorithm)')
    if plugins.is_path(algorithm["name"]) and not imports:
        config = _validate(RunConfig, raw, "")
        _check_names(config)
        return config
    try:
        cls = find_algorithm(algorithm["name"])
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"algorithm.name: {error}") from None
    if stored:
        raw = {**raw, "algorithm": completed(raw["algorithm"], cls.later)}
        algorithm = raw["algorithm"]
    variant = algorithm.get("variant")
    if variant is None and "variant" in cls.Options.model_fields:
        variant = cls.Options.model_fields["variant"].default
    preset = cls.presets.get(variant, {}) if isinstance(variant, str) else {}
    merged = deep_merge(preset, raw)
    config = _validate(RunConfig, merged, "")
    options = {key: value for key, value in merged["algorithm"].items() if key != "name"}
    checked = _validate(cls.Options, options, "algorithm")
    training = config.training
    if training.schedule == "cosine" and training.cosine_rounds is None:
        # Written down: a run that is resumed for more rounds must not have had another learning rate before.
        length = max(1, config.rounds - training.warmup_rounds)
        training = training.model_copy(update={"cosine_rounds": length})
    named = {"name": algorithm["name"], **checked.model_dump()}
    config = config.model_copy(update={"algorithm": named, "training": training})
    _check_names(config)
    return config


def _check_names(config: RunConfig) -> None:
    names: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("data.name", config.data.name, DATASETS),
        ("model.name", config.model.name, MODELS),
        ("partition.scheme", config.partition.scheme, SCHEMES),
        *((f"callbacks.{at}.name", entry.name, CALLBACKS) for at, entry in enumerate(config.callbacks)),
    )
    for where, name, known in names:
        if name not in known and not plugins.is_path(name):
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
            raise UserError(f"{where}: unknown name {short(name)}; did you mean {near[0]!r}? known: {', '.join(known)}")
    if config.sampling.clients_per_round > config.partition.clients:
        raise UserError(
            f"sampling.clients_per_round: {config.sampling.clients_per_round} clients cannot be sampled from "
            f"partition.clients = {config.partition.clients}"
        )
    if config.evaluation.clients != "all" and config.evaluation.clients > config.partition.clients:
        raise UserError(
            f"evaluation.clients: {config.evaluation.clients} clients cannot be drawn from "
            f"partition.clients = {config.partition.clients}"
        )
    if config.sampling.min_uploads > config.sampling.clients_per_round:
        raise UserError(
            f"sampling.min_uploads: {config.sampling.min_uploads} uploads cannot come from "
            f"sampling.clients_per_round = {config.sampling.clients_per_round}"
        )
    _check_devices(config)
    if (config.flower.start_clients or 1) > config.partition.clients:
        raise UserError(
            f"flower.start_clients: {config.flower.start_clients} clients cannot come from "
            f"partition.clients = {config.partition.clients}"
        )


def _check_devices(config: RunConfig) -> None:
    """Names of classes of devices, in ``[system]`` and in ``algorithm.target``."""
    system, target = config.system, config.algorithm.get("target")
    if system is not None:
        known = [*system.classes, *PRESETS]
        for name in system.devices:
            if name not in known:
                raise UserError(f"system.devices: unknown class {short(name)}; known: {', '.join(known)}")
        if unused := sorted(system.classes.keys() - system.devices.keys()):
            raise UserError(f"system.classes.{unused[0]}: no client has it; name it in system.devices")
        if system.clients is not None:
            if len(system.clients) != config.partition.clients:
                raise UserError(
                    f"system.clients: one class for each of partition.clients = {config.partition.clients} is needed; "
                    f"got {len(system.clients)}"
                )
            if other := sorted(set(system.clients) - system.devices.keys()):
                raise UserError(f"system.clients: {short(other[0])} is not in system.devices")
    if not isinstance(target, Mapping):
        return
    there = [] if system is None else list(system.devices)
    for name in target if by_class(target) else ():
        if name not in there:
            words = f"system.devices has {', '.join(there)}" if there else "there is no [system]"
            raise UserError(f"algorithm.target.{name}: no client has such a device; {words}")
    kinds = kinds_of(target)
    if "seconds" in kinds and system is None:
        raise UserError("algorithm.target: seconds are those of modelled devices; they need [system]")
    if kinds & EXECUTED and config.simulation.engine == "masked":
        raise UserError(
            "algorithm.target: the masked engine computes pruned filters too; macs and seconds need another"
        )


def _section_of(model: type[BaseModel], loc: Iterable[Any]) -> type[BaseModel]:
    """The model class that owns the last key of an error's location."""
    for key in list(loc)[:-1]:
        field = model.model_fields.get(str(key))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _unknown_key(path: str, valid: Iterable[str]) -> UserError:
    prefix, _, key = path.rpartition(".")
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)
    dotted = f"{prefix}.{near[0]}" if prefix and near else near[0] if near else None
    return UserError(f"unknown key {path}" + (f"; did you mean {dotted}?" if dotted else ""))


def _check_keys(raw: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key in raw:
        if key not in model.model_fields:
            raise _unknown_key(f"{prefix}.{key}" if prefix else str(key), model.model_fields)


def _allowed(model: type[BaseModel], key: str) -> str:
    """Plain words for what a field takes, from its annotation."""
    field = model.model_fields.get(key)
    if field is None:
        return ""
    choices: list[str] = []
    for part in alternatives(field.annotation):
        if typing.get_origin(part) is Literal:
            choices += [str(choice) for choice in typing.get_args(part)]
        elif part is bool:
            choices += ["true", "false"]
        else:
            return "input should be a table" if isinstance(part, type) and issubclass(part, BaseModel) else ""
    return "one of " + ", ".join(choices) if choices != ["true", "false"] else "true or false"


def _validate(model: type[BaseModel], raw: Mapping[str, Any], prefix: str) -> Any:
    try:
        return model.model_validate(dict(raw))
    except ValidationError as caught:
        # The first problem only: one line, one thing to mend. Unknown keys first: they explain missing ones.
        errors = sorted(caught.errors(), key=lambda e: e["type"] != "extra_forbidden")
        error = errors[0]
        path = ".".join(str(part) for part in ([prefix] if prefix else []) + list(error["loc"]))
        owner = _section_of(model, error["loc"])
        if error["type"] == "extra_forbidden":
            valid = list(owner.model_fields) + (["name"] if prefix == "algorithm" else [])
            raise _unknown_key(path, valid) from None
        if error["type"] == "together":
            raise UserError(f"{path}: {error['msg']}") from None
        if error["type"] == "missing":
            raise UserError(f"missing key {path}") from None
        own_words = error["type"] in ("file", "name", "vanishing")
        allowed = _allowed(owner, str(error["loc"][-1])) if error["loc"] and not own_words else ""
        said = allowed or error["msg"][0].lower() + error["msg"][1:]
        raise UserError(f"{path}: {said}; got {short(error['input'])}") from None
