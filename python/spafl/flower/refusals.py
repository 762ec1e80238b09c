"""What a client says when it refuses: the server is told why, and its own log the rest.

A refusal leaves the client, so it holds the reasons that this package gives and nothing that may quote the client's
data: of an error of the owner's code only the kind is told, of an error in the data nothing that stands in quotation
marks, and of a path on this machine only the last part.
"""

from __future__ import annotations

import re

from ..errors import UserError
from ..wire import WireError

_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s'\":;,()/]+/)*([^\s'\":;,()/]+)/?")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_OURS = (UserError, WireError, ArithmeticError)  # their texts are written in this package


class DataRefused(UserError):
    """The client's data cannot be used.

    Args:
        text: for the owner.
        told: for the server.
    """

    def __init__(self, text: str, told: str) -> None:
        super().__init__(text)
        self.told = told


def without_quotes(text: str) -> str:
    """A text without what it quotes."""
    return _QUOTED.sub("...", text)


def told(error: Exception) -> str:
    """What the server is told of an error, in one line."""
    if isinstance(error, DataRefused):
        text = error.told
    elif isinstance(error, _OURS):
        text = str(error) or type(error).__name__
    else:
        text = unexplained(error)
    return _PATH.sub(r"\1", text.splitlines()[0])


def unexplained(error: Exception) -> str:
    """The kind of an error."""
    return f"{type(error).__name__}; the client's log says more"
