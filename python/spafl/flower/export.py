"""A client's model out of its private state, on the machine where that lies; the rest is :mod:`spafl.export`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..algorithms import Algorithm
from ..config import load_run_config
from ..data import blank
from ..errors import UserError, one_line
from ..export import described, hear
from ..plugins import Code
from ..simulation.announcements import Announcement
from ..simulation.problem import build_method
from ..wire import WireError, decode
from .client import missed
from .disk import ClientDisk
from .parcel import number, unpack


def holds_clients(folder: Path) -> bool:
    """Whether this is a folder of clients' private state, ``state-dir/RUN``, and no run folder."""
    return not (folder / "partition.json").exists() and any(folder.glob("client-*.safetensors"))


class AtTheClient(LookupError):
    """Asked for what only a client has."""


class Elsewhere(Mapping[str, Tensor]):
    """What a client keeps, seen from the server: whatever looks into it raises :class:`AtTheClient`."""

    def __getitem__(self, name: str) -> Tensor:
        raise AtTheClient

    def __iter__(self) -> Iterator[str]:
        raise AtTheClient

    def __len__(self) -> int:
        raise AtTheClient


def _enough(algorithm: Algorithm, model: nn.Module) -> bool:
    """Whether the message of a test and what the client keeps are all that its model is made of."""
    if type(algorithm).client_model is Algorithm.client_model:
        return True  # it says itself if a tensor of the model is missing
    server = algorithm.server_state(model)
    return algorithm.evaluation_message(server, 0).keys() == server.keys()


def kept_model(folder: Path, client: int, code: Code) -> tuple[nn.Module, Tensor]:
    """A client's model as it was tested last, in eval mode, and one input of zeros, ``(1, *shape)``.

    Args:
        folder: of the clients' state of one run, ``state-dir/RUN``.
        code: modules of the user's that the run may import.

    Raises:
        UserError: no such client here or damaged state, a client that has not trained, or that was not tested since and
            whose model is not all its own, or a method whose models are the server's.
    """
    disk = ClientDisk(folder.parent, folder.name, client)
    if not disk.path.exists():
        here = sorted(int(path.stem.removeprefix("client-")) for path in folder.glob("client-*.safetensors"))
        raise UserError(f"--client must be one whose state is in {folder}: {', '.join(map(str, here))}; got {client}")
    config = load_run_config(folder, code)
    source = described(disk.path.with_suffix(".json"))
    method = build_method(config, source.outputs, source.shape, source.dtype)
    state = disk.load(method.client_state)
    if state.trained < 0:
        raise UserError(f"client {client} has not trained yet")
    held: dict[str, Tensor] = {}
    try:
        if raw := disk.last_test():
            header, frames = unpack(raw)
            round = number(header, "round")
            if round >= state.trained:  # else the client has trained since, and this is of the past
                held = dict(decode(frames[0], round, method.uplink.model))
                news = [Announcement(*each) for each in missed(state.heard, header, frames[1:])]
                hear(method.algorithm, method.model, config, client, state.tensors, news)
        model = None
        if _enough(method.algorithm, method.model):
            model = method.algorithm.client_model(method.model, held, state.tensors, client)
    except (OSError, WireError, IndexError) as error:
        raise UserError(f"the last test of client {client} in {folder} cannot be read: {one_line(error)}") from None
    if model is None:
        raise UserError(
            f"the model of client {client} is made of what the server holds ({config.algorithm['name']}): export it "
            "from the run folder there, or test the client once more"
        )
    return model.float().eval(), blank(1, source.shape, source.dtype)
