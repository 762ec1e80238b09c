"""A small federated problem that runs in a second or two."""

import copy
import signal

import pytest
from small_problem import SMALL

from spafl.config import resolve_config


@pytest.fixture
def small():
    """The raw tables of the small problem, free to change."""
    return copy.deepcopy(SMALL)


@pytest.fixture
def small_config(small):
    """``small_config(section={...})``: the small problem, resolved, with changes."""
    from spafl.config import deep_merge

    return lambda **changes: resolve_config(deep_merge(small, changes))


@pytest.fixture(autouse=True)
def interruptible():
    """Tests that run in the background inherit a SIGINT that is ignored, under nohup a SIGHUP; runs respect that."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
