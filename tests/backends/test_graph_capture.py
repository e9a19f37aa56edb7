"""What a first call computes and caches must not be made inside a CUDA graph, where it is empty before a replay."""

import pytest
import torch
from torch import nn

from gemmascope_fast import BackendError, ops
from gemmascope_fast.backends.gpu import launch, screen
from gemmascope_fast.quant.linear import MatryoshkaLinear


@pytest.fixture
def capture(monkeypatch):
    """A switch: while it is on, every stream is being captured."""
    state = {"on": False}
    monkeypatch.setattr(launch, "capturing", lambda device: state["on"])
    return state


def test_the_mean_of_a_nested_layer(capture):
    layer, x = MatryoshkaLinear.from_linear(nn.Linear(96, 40), 32, mean=torch.randn(96)), torch.randn(2, 96)
    capture["on"] = True
    with pytest.raises(BackendError, match="the mean's part of the bias: cached by the first call"):
        layer(x)
    capture["on"] = False
    want = layer(x)
    capture["on"] = True
    assert torch.equal(layer(x), want)
    capture["on"] = False
    layer.set_bits(4)  # folds another part
    capture["on"] = True
    with pytest.raises(BackendError, match="first call"):
        layer(x)


def test_the_codes_of_a_screen(capture, monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    g = torch.Generator().manual_seed(0)
    W, b, theta = torch.randn(20, 40, generator=g), torch.randn(40, generator=g), torch.rand(40, generator=g)
    code, code2, table = ops.screen_rows(W, b, theta, None, True)
    args = (W.device, W, code, code2, table, None, None)
    capture["on"] = True
    with pytest.raises(BackendError, match="the screen's codes by rows: cached by the first call"):
        screen._arrays(*args)
    capture["on"] = False
    made = screen._arrays(*args)
    capture["on"] = True
    assert screen._arrays(*args) is made


def test_no_device_is_not_capturing():
    assert not launch.capturing(torch.device("cpu"))
