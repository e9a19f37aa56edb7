"""Executed counts of whole kernels against what the specification says that they compute and read."""

import pytest
import torch
from ptx_counts import executed

from gemmascope_fast.backends.gpu import decode, encode
from gemmascope_fast.dev.gpu.devices import DEVICES
from gemmascope_fast.dev.gpu.model import Executed, executed_times

D, F = 256, 64


def problem(T):
    g = torch.Generator().manual_seed(T)
    x, rows = torch.randn(T, D, generator=g), torch.randn(F, D, generator=g)
    return x, rows.t(), torch.zeros(F), torch.full((F,), 1e9)


@pytest.mark.parametrize("T", [1, 4, 16])
def test_encode(T):
    with executed() as kernels:
        encode.encode(*problem(T))
    found = kernels["encode_kernel"]
    # the 16 lanes of a dot may be folded by FMAs too
    assert T * D * F <= found.fma <= T * (D + 16) * F
    assert found.sectors * 32 >= 4 * D * F  # all weights, once
    assert found.wavefronts >= found.ideal_wavefronts > 0
    assert 1 <= found.sectors_per_request <= 16
    assert found.bank_conflicts >= 1


def test_decode():
    crow, col = torch.tensor([0, 40]), torch.arange(40, dtype=torch.int32)
    with executed() as kernels:
        decode.decode(crow, col, torch.ones(40), torch.randn(F, D))
    found = kernels["decode_kernel"]
    assert found.fma == 40 * D
    assert found.sectors * 32 >= 40 * D * 4
    assert found.shared_requests == 0


def test_times_of_the_counts():
    h100 = next(d for d in DEVICES if d.name == "H100")
    work = Executed(instructions=10**9, wavefronts=10**6, sectors=10**6)
    times = executed_times(h100, work, 3_350_000_000)
    assert times["memory"] == pytest.approx(1e-3)
    assert times["issue"] == pytest.approx(10**9 / (132 * 4 * h100.clock))
    assert times["shared"] == pytest.approx(10**6 / (132 * h100.clock))
    assert h100.clock == pytest.approx(1.98e9, rel=0.01)
