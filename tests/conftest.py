"""Fixtures that several test files share."""

import pytest

from gemmascope_fast import backends


@pytest.fixture(params=["plain", "avx2", "avxvnni", "avx512"])
def isa(request):
    """Every instruction-set level this machine has, forced in turn."""
    if request.param not in backends.supported_isas():
        pytest.skip(f"this machine does not have {request.param}")
    with backends.forced_isa(request.param):
        yield request.param
