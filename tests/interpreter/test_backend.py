"""`gemmascope_fast.backend("triton")` in the interpreter, and its errors when it cannot run."""

from types import SimpleNamespace

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import decode, encode, launch, loop, matryoshka, planes, screen, tensor


def test_triton_serves_when_asked_by_name(same_bytes):
    x, rows, b, theta = torch.randn(3, 20), torch.randn(40, 20), torch.randn(40), torch.rand(40)
    want = ops.encode(x, rows.t(), b, theta, None)
    out = ops.decode(*want, rows, None, None)
    with gsf.backend("triton"):
        same_bytes(ops.encode(x, rows.t(), b, theta, None), want)
        same_bytes(ops.decode(*want, rows, None, None), out)
        same_bytes(ops.sampled_dot(x, rows, b, want[0], want[1]), want[2])
        with pytest.raises(gsf.errors.BackendError, match="it has no triton kernel"):
            ops.csr_transpose(want[0], want[1], 40)


def test_cuda_says_what_is_missing():
    x, rows, b, theta = torch.randn(3, 20), torch.randn(40, 20), torch.randn(40), torch.rand(40)
    with gsf.backend("cuda"), pytest.raises(gsf.errors.BackendError, match="tensors on cuda"):
        ops.encode(x, rows.t(), b, theta, None)


def test_an_old_device_is_named():
    with pytest.raises(gsf.errors.BackendError, match=r"8\.0 or newer, got 7\.5"):
        launch.check_capability((7, 5), "cuda:0")
    launch.check_capability((8, 0), "cuda:0")


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="on meta"):
        launch.check_devices(torch.zeros(1), torch.zeros(1, device="meta"))


def weights():
    x, rows, b, theta = torch.randn(3, 20), torch.randn(40, 20), torch.randn(40), torch.rand(40)
    return x, rows.t(), b, theta


def calls():
    """Every launcher by name: the call and the tensors that it takes."""
    x, W, b, theta = weights()
    rows, bias = W.t().contiguous(), torch.randn(20)
    crow, col, values = ops.encode(x, W, b, theta, None)
    code, code2, table = ops.screen_rows(W, b, theta, bias, True)
    from test_matryoshka import layer_args

    x8, bits, *rest = layer_args(16, 64, 3, 8, group_size=32)
    edits = loop.EditTable.of([], 40)
    return {
        "encode": (encode.encode, [x, W, b, theta]),
        "encode_fixed": (lambda *a: encode.encode_fixed(*a, 9), [x, W, b, theta]),
        "encode_tensor": (tensor.encode_tensor, [x, W, b, theta]),
        "encode_screened": (screen.encode_screened, [x, W, b, theta, code, code2, table, bias]),
        "decode": (decode.decode, [crow, col, values, rows, bias, b]),
        "sampled_dot": (decode.sampled_dot, [x, rows, b, crow, col]),
        "splice": (lambda *a: loop.splice(*a, edits), [x, W, b, theta, rows, bias]),
        "matryoshka_linear": (lambda x8, plane, scale, zero, bias, mean: matryoshka.matryoshka_linear(
            x8, [plane, *bits[1:]], scale, zero, bias, mean, *rest[4:]), [x8, bits[0], *rest[:4]]),
        "matryoshka_slice": (lambda *a: planes.matryoshka_slice(list(a), 16, 64, 8, 0), bits),
        "matryoshka_dequantize": (
            lambda *a: planes.matryoshka_dequantize(list(a[:5]), *a[5:], 16, 64, 32, 8, 0), [*bits, *rest[:2]],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls())
def test_each_tensor_on_another_device_is_refused_at_the_call(name):
    function, tensors = calls()[name]
    function(*tensors)
    for i, t in enumerate(tensors):
        with pytest.raises((ValueError, gsf.errors.BackendError), match=r"expected .* on .*|pinned host memory"):
            function(*tensors[:i], t.to("meta"), *tensors[i + 1 :])


def test_an_old_device_is_refused_before_a_launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    on_it = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(gsf.errors.BackendError, match=r"cuda:0: expected compute capability 8\.0 or newer, got 7\.5"):
        launch.kernels("encode", on_it)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert launch.kernels("encode", on_it).encode_kernel
    with pytest.raises(gsf.errors.BackendError, match="tensors on cuda, got one on xpu"):
        launch.kernels("encode", SimpleNamespace(device=torch.device("xpu", 0)))


def test_a_grid_beyond_the_limit_is_refused_at_the_call(monkeypatch):
    """No tensor here is that large: the limit is brought down to it."""
    x, W, b, theta = weights()
    monkeypatch.setattr(launch, "MAX_GRID", 1)
    with pytest.raises(ValueError, match="encode: expected at most 1 programs in a grid, got"):
        encode.encode(x, W, b, theta)


def test_a_grid_beyond_the_limit_is_refused():
    assert launch.grid(2**31 - 1, "encode") == (2**31 - 1,)
    with pytest.raises(ValueError, match="encode: expected at most"):
        launch.grid(2**31, "encode")


def test_no_triton_is_said_at_the_call(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gsf.errors.BackendError, match="triton is not installed"):
        launch.kernels("decode", torch.zeros(1))
    with pytest.raises(gsf.errors.BackendError, match="triton is not installed"):
        encode.encode(*weights())
