"""`gemmascope_fast.backend("triton")` in the interpreter, and what it says where it cannot serve."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.gpu import launch


def test_triton_serves_when_asked_by_name(same_bytes):
    x, rows, b, theta = torch.randn(3, 20), torch.randn(40, 20), torch.randn(40), torch.rand(40)
    want = ops.encode(x, rows.t(), b, theta, None)
    out = ops.decode(*want, rows, None, None)
    with gsf.backend("triton"):
        same_bytes(ops.encode(x, rows.t(), b, theta, None), want)
        same_bytes(ops.decode(*want, rows, None, None), out)
        same_bytes(ops.sampled_dot(x, rows, b, want[0], want[1]), want[2])
        with pytest.raises(gsf.errors.BackendError, match="no triton kernel is written"):
            ops.csr_transpose(want[0], want[1], 40)


def test_cuda_says_what_is_missing():
    x, rows, b, theta = torch.randn(3, 20), torch.randn(40, 20), torch.randn(40), torch.rand(40)
    with gsf.backend("cuda"), pytest.raises(gsf.errors.BackendError, match="for tensors on cuda"):
        ops.encode(x, rows.t(), b, theta, None)


def test_an_old_device_is_named():
    with pytest.raises(gsf.errors.BackendError, match=r"8\.0 or newer, got 7\.5"):
        launch.check_capability((7, 5), "cuda:0")
    launch.check_capability((8, 0), "cuda:0")


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="on meta"):
        launch.check_devices(torch.zeros(1), torch.zeros(1, device="meta"))


def test_a_grid_beyond_the_limit_is_refused():
    assert launch.grid(2**31 - 1, "encode") == (2**31 - 1,)
    with pytest.raises(ValueError, match="encode: expected at most"):
        launch.grid(2**31, "encode")


def test_no_triton_is_said_at_the_call(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gsf.errors.BackendError, match="triton is not installed"):
        launch.kernels("decode", torch.zeros(1))
