"""A test file that needs a process of its own may run in parts (:mod:`support.process`)."""

import pytest
from support.process import PART


@pytest.hookimpl(trylast=True)  # after what the tier leaves out
def pytest_collection_modifyitems(items):
    number, parts = PART
    items[:] = items[number::parts]
