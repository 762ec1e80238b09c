"""What a federated algorithm is. One algorithm is one file; the round loop, the workers and Flower only call this.

Life of a round ``r``::

    server                                      client
    broadcast(server, r, k)  ── message ──▶     train(client, message, r)
    merge(server, r, uploads) ◀── upload ──
             └── announcement, to every client ──▶  receive(client, announcement, r)

Server and client code exchange nothing but messages (:mod:`spafl.wire`), so every byte is seen and counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..checked import CheckedModel
from ..cost import Cost
from ..wire import Message
from .client import Client, Evaluation, LocalTraining
from .objective import Objective

ServerState = dict[str, Tensor]


class BaseOptions(CheckedModel):
    """Base of an algorithm's own settings; unknown keys are refused."""


@dataclass(frozen=True)
class Upload:
    """What one client sends back after training, and what the server may know about it."""

    client: int
    message: Message
    samples: int
    """Training samples of the client: the usual aggregation weight."""


@dataclass(frozen=True)
class Training:
    """What a client's local training amounts to; ``message`` is uploaded, the rest is measured by the simulator."""

    message: Message
    loss: float
    """Mean over batches of the data loss."""
    cost: Cost
    """Of this client's turn: steps and multiply-accumulates; bytes and seconds are the simulator's to count."""
    figures: dict[str, float] = field(default_factory=dict)
    """Anything else worth a line in the metrics."""


class Algorithm(ABC):
    """Base class of every federated algorithm. Instances are immutable and picklable: state lives in the arguments.

    Class attributes:
        Options: settings of the ``[algorithm]`` section (beyond ``name``).
        presets: for algorithms with published variants: complete settings by variant name, laid under the user's.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions
    presets: ClassVar[dict[str, dict[str, dict[str, object]]]] = {}
    """``presets[variant][section][key]`` is the value of that variant; see :mod:`spafl.config`."""
    upload_limit: ClassVar[float] = 1e15
    """Magnitude that no entry of an upload may exceed: sums and squares over all clients stay finite in float32."""
    steady_uploads: ClassVar[bool] = True
    """Whether an entry of an upload stands for the same thing in every round, as a lossy encoding has to assume."""
    macs_are_seconds: ClassVar[bool] = True
    """Whether what runs is as small as what the method's formula counts; tables say where it is not."""
    needs_skipping: bool = False
    """Whether pruned filters have to be left out of what is executed: engine ``auto`` is then ``compact``, also where
    that is expected to be no faster."""
    later: ClassVar[Mapping[str, object]] = {}
    """Options that came after the first runs, and the value that means what the algorithm did before, oldest first:
    a run of then is continued with it (:mod:`spafl.later`)."""
    local: LocalTraining | None = None
    """The run's ``[training]`` section, set by who builds a run, for methods that keep the optimiser's state."""

    def __init__(self, options: BaseOptions) -> None:
        self.options = options

    # -- set-up -------------------------------------------------------------------------------------------------

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        """The model this algorithm trains, from the configured threshold model (dense methods drop the thresholds).

        Args:
            model: as configured; may be changed.
            sample: one input ``(1, channels, height, width)``, to see what the model does with it.

        Raises:
            ValueError: the algorithm cannot work with this model, or with how it is to be trained (:attr:`local`); one
                sentence.
        """
        return model

    def objective_fault(self, objective: Objective) -> str | None:
        """Why the algorithm cannot learn this, in words; None: it can."""
        return None

    @abstractmethod
    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Initial tensors that each client keeps for ever, by name.

        Names of the model's state dict live in ``client.model``; all others in ``client.memory``. An algorithm whose
        clients keep nothing returns ``{}``.
        """

    @abstractmethod
    def server_state(self, model: nn.Module) -> ServerState:
        """Initial tensors of the server."""

    # -- a round ------------------------------------------------------------------------------------------------

    @abstractmethod
    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        """What a sampled client receives before it trains."""

    @abstractmethod
    def train(self, client: Client, message: Message, round: int) -> Training:
        """Local training of one client."""

    def expected_upload(self, server: ServerState, round: int, client: int) -> Message:
        """Tensors with the names, shapes and dtypes of what a sampled client has to send back; values do not matter.

        By default those of its broadcast. Uploads that look otherwise are rejected (:mod:`spafl.merge`). With a lossy
        ``communication.encoding`` an entry must stand for the same thing in every round, at the same place.
        """
        return self.broadcast(server, round, client)

    def upload_fault(self, server: ServerState, message: Message) -> str | None:
        """What else is wrong with an upload that has the expected form and finite entries, in words; None: nothing."""
        return None

    @abstractmethod
    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        """The server's next state, and an announcement to *every* client (empty: none).

        Args:
            server: the state before the round; not to be changed.
            uploads: at least one, each as :meth:`expected_upload` says, with finite entries; ascending by client.
            clients: how many there are, sampled or not.
        """

    def receive(self, client: Client, announcement: Message, round: int) -> None:
        """What a client does with an announcement of ``round``; called once each, in order."""
        raise NotImplementedError(f"{type(self).__name__} announces but does not receive")

    def timed(self, client: Client, seconds: float) -> dict[str, float]:
        """What a client does with the modelled time of the turn it has just had; figures of it."""
        return {}

    # -- evaluation ---------------------------------------------------------------------------------------------

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        """What a client needs to be evaluated (a global model, say); not counted as traffic."""
        return {}

    @abstractmethod
    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        """Test one client on its own data, and on its training data too if ``train_data``.

        The tensors are a copy: whatever happens to them here is forgotten, so that no evaluation changes a run.
        """

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        """The model that the client is tested with, to be exported; None if it has nothing yet.

        By default the prepared model with what the client keeps, completed by what the server holds.

        Args:
            model: prepared, with the weights of the run's first model; may be changed.
            own: what the client keeps; empty if it has not had a turn yet.
        """
        state = dict(server) | dict(own)
        names = model.state_dict().keys()
        if not names <= state.keys():
            return None
        model.load_state_dict({name: state[name] for name in names})
        return model

    # -- cost by the paper's formulas ---------------------------------------------------------------------------

    @abstractmethod
    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Communication of one round by the formula of the method's paper, in bits."""
