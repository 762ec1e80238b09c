"""Flower's client app: one client of a run; its private state is on this machine's disk.

Settings of the node (``flower-supernode --node-config 'client-id=3 state-dir="/var/lib/spafl"'``):

===============  ====================================================================================================
``client-id``    number of the client; by default Flower's ``partition-id``
``state-dir``    folder of the private state; by default ``$SPAFL_STATE``, else ``~/.spafl/clients``
``data``         ``package.module:function`` that returns this client's own :class:`~spafl.data.Dataset`; by default the
                 client's part of the data that the run's configuration names
``data-root``    where that data lies on this machine
``engine``       ``auto``, ``masked`` or ``compact``; by default as configured
``device``       ``cpu`` (the default), ``cuda`` or ``auto``
``metrics``      ``false``: loss, accuracies and densities are not told
===============  ====================================================================================================
"""

from __future__ import annotations

import functools
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from .lean import without_triton
from .message import config_text, unwrap, wrap

if TYPE_CHECKING:
    from .client import ClientSide

app = ClientApp()

# In a process that serves many clients (a simulation) so many are kept at hand.
_KEPT = 16


@functools.lru_cache(maxsize=_KEPT)
def _side(config: str, node: tuple[tuple[str, Any], ...]) -> ClientSide:
    """The client side of a configuration (TOML) and a node's settings."""
    from ..config import deep_merge, resolve_config
    from ..errors import UserError
    from .client import ClientSide, Site

    own = dict(node)
    client = own.get("client-id", own.get("partition-id"))
    if not isinstance(client, int) or isinstance(client, bool):
        raise UserError(f"the node's configuration needs client-id, a whole number; got {client!r}")
    if not config:
        raise UserError("the app's configuration lacks spafl-config; start runs with python -m spafl.flower")
    local: dict[str, Any] = {"simulation": {"device": own.get("device", "cpu")}}
    if "engine" in own:
        local["simulation"]["engine"] = own["engine"]
    if "data-root" in own:
        local["data"] = {"root": own["data-root"]}
    state = Path(own.get("state-dir") or os.environ.get("SPAFL_STATE") or Path.home() / ".spafl" / "clients")
    site = Site(resolve_config(deep_merge(tomllib.loads(config), local)), own.get("data"), state,
                own.get("metrics", True) is not False)  # fmt: skip
    return ClientSide(site, client)


def _answer(kind: str, message: Message, context: Context) -> Message:
    if context.node_config.get("device", "cpu") == "cpu":
        without_triton()
    # Only now: whether Triton is there is asked once, when the engines are imported.
    import torch

    from ..errors import UserError
    from .client import refusal

    torch.set_num_threads(1)  # the same arithmetic as everywhere else
    try:
        side = _side(config_text(context), tuple(sorted(context.node_config.items())))
        raw = side.answer(kind, unwrap(message))
    except tomllib.TOMLDecodeError as error:
        raw = refusal(UserError(f"spafl-config is not valid TOML: {error}"))
    except UserError as error:
        raw = refusal(error)
    return Message(wrap(raw), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who this is."""
    return _answer("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """A test on this client's own data."""
    return _answer("evaluate", message, context)
