"""FjORD (Horvath et al., NeurIPS 2021): ordered dropout; a client trains nested sub-models up to what it can afford.

Client ``k`` affords the ``(k mod number of widths)``-th width and holds a model of that size. Every batch draws a width
up to it, uniformly, and trains the first ``ceil(width * channels)`` outputs of each hidden layer. There is one
BatchNorm for each width. The server averages every entry, by sample counts, over the clients that have it. A client is
tested at the width it affords.

The paper's self-distillation, which it leaves out of some of its own results too, is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, field_validator
from torch import Tensor, nn

from spafl_kernels import to_dense
from spafl_kernels.computed import ComputedConv2d, ComputedLinear, ComputedWeight

from ..cost import Cost
from ..wire import Message
from . import narrow
from .base import Algorithm, BaseOptions, ServerState, Training, Upload
from .client import Client, Evaluation
from .dense import load_state, local_sgd, snapshot

SHAPES = "shapes:"


class FjORDOptions(BaseOptions):
    """Settings of FjORD."""

    widths: tuple[float, ...] = Field(default=(0.2, 0.4, 0.6, 0.8, 1.0), min_length=1)
    """Widths, ascending, the last one 1; client k affords the (k mod number of widths)-th."""

    @field_validator("widths")
    @classmethod
    def _ascending(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] != 1:
            raise ValueError("widths must ascend from above 0 to 1")
        return widths


class _Layer(ComputedWeight):
    """The first filters on the first channels: of the weight, the corner of ``shapes[width]``."""

    shapes: tuple[tuple[int, ...], ...]
    width: int

    def like(self) -> Tensor:
        return self.weight[narrow.box(self.shapes[self.width])]

    def computed_weight(self) -> Tensor:
        return self.like().contiguous()

    def computed_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias[: self.shapes[self.width][0]]


class OrderedConv2d(_Layer, ComputedConv2d):
    """A convolution of that kind."""


class OrderedLinear(_Layer, ComputedLinear):
    """A linear layer of that kind."""


class NormPerWidth(nn.Module):
    """A BatchNorm for each width."""

    width: int

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.at = nn.ModuleList(norms)
        self.width = len(norms) - 1

    def forward(self, x: Tensor) -> Tensor:
        return self.at[self.width](x)


_Ordered = (OrderedConv2d, OrderedLinear, NormPerWidth)


def ordered(model: nn.Module, shapes: Sequence[narrow.Shapes]) -> nn.Module:
    """A dense model, in place, that can be run at several widths.

    Args:
        shapes: of its tensors, for each width.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            norms = []
            for width in shapes:
                of_norm = {n: width[f"{name}.{n}"] for n in module.state_dict()}
                norms.append(narrow.resized(_copy(module), of_norm))
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = NormPerWidth(norms)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.__class__ = OrderedConv2d if isinstance(module, nn.Conv2d) else OrderedLinear
            module.shapes = tuple(width[f"{name}.weight"] for width in shapes)  # type: ignore[assignment]
            module.width = len(shapes) - 1  # type: ignore[assignment]
    return model


def _copy(norm: nn.Module) -> nn.Module:
    new = type(norm)(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)  # type: ignore[arg-type, call-arg]
    new.load_state_dict(norm.state_dict())
    return new


def set_width(model: nn.Module, width: int) -> None:
    """Have the model compute at one of its widths from now on."""
    for module in model.modules():
        if isinstance(module, _Ordered):
            module.width = width


class FjORD(Algorithm):
    """Sub-models run physically small: multiply-accumulates and seconds are theirs."""

    Options = FjORDOptions
    options: FjORDOptions

    def prepare_model(self, model: nn.Module, sample: Tensor) -> nn.Module:
        model = to_dense(model)
        shapes = [narrow.shapes_at(model, sample, width) for width in self.options.widths]
        model = ordered(model, shapes)
        # What a client that affords a width holds: all layers at it, and the norms of all widths up to it.
        model.narrow_shapes = [self._held(model, shapes, at) for at in range(len(shapes))]  # type: ignore[assignment]
        return model

    @staticmethod
    def _held(model: nn.Module, shapes: Sequence[narrow.Shapes], at: int) -> narrow.Shapes:
        held: narrow.Shapes = {}
        for name, tensor in model.state_dict().items():
            if name in shapes[at]:
                held[name] = shapes[at][name]
            elif int(name.split(".")[-2]) <= at:  # "NORM.at.WIDTH.tensor"
                held[name] = tuple(tensor.shape)
        return held

    def client_state(self, model: nn.Module) -> dict[str, Tensor]:
        return {}

    def server_state(self, model: nn.Module) -> ServerState:
        return snapshot(model) | {SHAPES: narrow.as_table(list(model.state_dict()), model.narrow_shapes)}  # type: ignore[arg-type]

    def _affords(self, client: int) -> int:
        return client % len(self.options.widths)

    # -- server

    def broadcast(self, server: ServerState, round: int, client: int) -> Message:
        return self._part(server, client)

    def _part(self, server: Mapping[str, Tensor], client: int) -> dict[str, Tensor]:
        names = [name for name in server if name != SHAPES]
        shapes = narrow.from_table(server[SHAPES], names, self._affords(client))
        return {name: server[name][narrow.box(shape)].contiguous() for name, shape in shapes.items()}

    def merge(
        self, server: ServerState, round: int, uploads: Sequence[Upload], clients: int
    ) -> tuple[ServerState, Message]:
        tensors = {name: t for name, t in server.items() if name != SHAPES}
        return dict(server) | narrow.merged_tensors(tensors, uploads, [float(u.samples) for u in uploads]), {}

    # -- client

    def _small(self, model: nn.Module, at: int, message: Message) -> nn.Module:
        for module in model.modules():
            if isinstance(module, NormPerWidth):
                module.at = module.at[: at + 1]
        small = narrow.resized(model, {name: t.shape for name, t in message.items()})
        set_width(small, at)
        return small

    def _turn(self, client: Client, message: Message) -> Client:
        at = self._affords(client.id)
        turn = client.on(("width", at), lambda model: self._small(model, at, message))
        load_state(turn.model, message)
        set_width(turn.model, at)
        return turn

    def train(self, client: Client, message: Message, round: int) -> Training:
        turn, at = self._turn(client, message), self._affords(client.id)
        draw = client.stream("width", round)
        paper = [3.0 * self._macs(client, width) for width in range(at + 1)]
        spent = 0.0

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal spent
            for x, y in client.training_batches(round):
                width = int(draw.integers(at + 1))
                set_width(turn.model, width)
                turn.trainer.form = width
                spent += len(y) * paper[width]
                yield x, y

        loss, cost = local_sgd(turn, round, batches=batches())
        set_width(turn.model, at)
        figures = {"width": self.options.widths[at]}
        return Training(snapshot(turn.model), loss, cost + Cost(paper_macs=spent), figures)

    def _macs(self, client: Client, width: int) -> float:
        """Multiply-accumulates of a sample at a width, counted over the layers that SpaFL would mask."""
        shapes: narrow.Shapes = client.model.narrow_shapes[width]  # type: ignore[index, assignment]
        share = narrow.shares(client.model, shapes)
        return sum(share[name] * macs for name, macs in client.macs.items())

    # -- evaluation and cost

    def evaluation_message(self, server: ServerState, round: int) -> Message:
        return server

    def evaluate(self, client: Client, message: Message, train_data: bool) -> Evaluation:
        turn = self._turn(client, self._part(message, client.id))
        return turn.evaluate_model(train_data)[0]

    def client_model(
        self, model: nn.Module, server: ServerState, own: Mapping[str, Tensor], client: int
    ) -> nn.Module | None:
        tensors = self._part(server, client)
        small = self._small(model, self._affords(client), tensors)
        load_state(small, tensors)
        return small

    def paper_bits(self, server: ServerState, sampled: int) -> int:
        """Expected for clients whose width is drawn: what they hold, both ways."""
        return narrow.both_ways(sampled, [self._part(server, k) for k in range(len(self.options.widths))])
