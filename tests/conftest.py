"""Fixtures that several test files share."""

from importlib.util import find_spec

import pytest
import torch

from gemmascope_fast import backends

# these run in environments of their own: `make test-saelens`, `make test-vllm`
# (a folder named vllm on the path has a spec too, but no origin)
collect_ignore = [
    folder
    for folder, needs in (("saelens", "sae_lens"), ("vllm", "vllm"))
    if getattr(find_spec(needs), "origin", None) is None
]


@pytest.fixture(params=backends.ISAS)
def isa(request):
    """Every instruction-set level this machine has, forced in turn."""
    if request.param not in backends.supported_isas():
        pytest.skip(f"this machine does not have {request.param}")
    with backends.forced_isa(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Shapes this small gain nothing from several, and wait for each other where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
