"""The tensor mode against fp64: within the derived tolerance, and the support equal outside it."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import tensor as gpu
from gemmascope_fast.ops.encode_tensor import tolerance

SHAPES = [(1, 33, 70), (5, 70, 31), (17, 20, 97)]


def case(T, d, F, dtype, shift=0.0):
    g = torch.Generator().manual_seed(T * d + F)
    x, rows = torch.randn(T, d, generator=g), torch.randn(F, d, generator=g)
    b = torch.randn(F, generator=g) + shift
    return x, rows.to(dtype).t(), b.to(dtype), torch.rand(F, generator=g).to(dtype)


def check(got, x, W, b, theta):
    z = x.double() @ W.double() + b.double()
    near = tolerance(x, W, b)
    tau = theta.double().clamp(min=0)
    crow, col, values = got
    fired = torch.zeros_like(z, dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(len(x)), crow.diff())
    fired[row, col.long()] = True
    sure = (z - tau).abs() > near
    assert torch.equal(fired[sure], (z > tau)[sure])
    assert bool(((values.double() - z[fired]).abs() <= near[fired]).all())
    assert bool((values.double() > tau[col.long()]).all())
    return sure


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_the_tolerance(shape, dtype):
    args = case(*shape, dtype)
    sure = check(gpu.encode_tensor(*args), *args)
    assert float(sure.double().mean()) > 0.8
    check(ops.encode_tensor_reference(*args), *args)


@pytest.mark.parametrize("T", [1, 18])
def test_beyond_the_slots_nothing_is_cut_off(T):
    args = case(T, 20, 67, torch.bfloat16, shift=100.0)
    got = gpu.encode_tensor(*args)
    assert got[1].numel() == T * 67
    check(got, *args)


def test_a_redone_value_stays_above_its_threshold():
    """Tensor cores let a pair fire whose exact dot does not: beyond the slots too its value is above θ."""
    x, W, b, theta = case(1, 20, 32, torch.bfloat16, shift=100.0)
    z = (x.bfloat16().double() @ W.double() + b.double())[0]
    theta = (z.float() * (1 - 2.0**-20)).to(torch.float32)
    got = gpu.encode_tensor(x, W, b, theta)
    exact = ops.encode(x, W, b, theta, None)
    assert got[1].numel() > exact[1].numel()
    assert bool((got[2] > theta[got[1].long()]).all())


def test_fp16_takes_what_is_beyond_its_range():
    x, W, b, theta = case(3, 40, 64, torch.float16)
    x = x * torch.tensor([[1e6], [1.0], [1e-6]])
    check(gpu.encode_tensor(x, W, b, theta), x, W, b, theta)


def test_fixed_capacity(same_bytes):
    args = case(3, 20, 67, torch.bfloat16)
    got = gpu.encode_tensor_fixed(*args, capacity=3 * 67).sparse()
    same_bytes((got.crow_indices, got.col_indices, got.values), gpu.encode_tensor(*args))


def test_gradients_are_those_of_the_stored_pairs(same_bytes):
    x, W, b, theta = case(3, 20, 67, torch.float32)
    for t in (x, W, b):
        t.requires_grad_()
    crow, col, values = ops.encode_tensor(x, W, b, theta)
    grad = torch.randn_like(values)
    values.backward(grad)
    row = torch.repeat_interleave(torch.arange(3), crow.diff())
    dense = torch.zeros(3, 67).index_put((row, col.long()), grad)
    torch.testing.assert_close(x.grad, dense @ W.detach().t())
    torch.testing.assert_close(b.grad, dense.sum(0))
