"""Both implementations of every operator pass the same tests."""

import pytest
import torch

from spafl_kernels import native
from spafl_kernels.cpu import compiled


@pytest.fixture(params=["native", "torch"])
def backend(request):
    if request.param == "native" and not native.available():
        pytest.skip(native.why_not())
    return request.param


@pytest.fixture
def poison():
    """Uninitialised memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def extension():
    if not compiled.ready():
        pytest.skip(native.why_not())
    return torch.ops.spafl
