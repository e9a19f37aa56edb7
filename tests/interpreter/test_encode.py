"""Triton encode against the native kernel, byte for byte: both keep the one order of summation."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import encode as gpu
from gemmascope_fast.errors import BackendError

# tokens, d_in, d_sae: one token, primes, words cut short, tiles of tokens cut short
SHAPES = [(1, 1, 1), (1, 33, 70), (3, 16, 32), (5, 17, 31), (13, 40, 97), (17, 48, 64), (19, 31, 33)]


def case(T, d, F, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(T, d, generator=g), torch.randn(F, d, generator=g)
    b = torch.randn(F, generator=g)
    theta = torch.rand(F, generator=g) * 2 - 0.5
    return x.to(dtype), rows.to(dtype).t(), b.to(dtype), theta.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_native_kernel(shape, dtype, same_bytes):
    args = case(*shape, dtype=dtype)
    same_bytes(gpu.encode(*args), ops.encode(*args, None))


@pytest.mark.parametrize("T", [1, 4, 18])
def test_every_feature_fires_beyond_the_slots(T, same_bytes):
    x, W, b, theta = case(T, 20, 67)
    b = b + 100
    got = gpu.encode(x, W, b, theta)
    assert got[1].numel() == T * 67
    same_bytes(got, ops.encode(x, W, b, theta, None))


def test_no_feature_fires(same_bytes):
    x, W, b, theta = case(5, 20, 67)
    got = gpu.encode(x, W, b, theta + 1000)
    assert got[1].numel() == 0
    same_bytes(got, ops.encode(x, W, b, theta + 1000, None))


def test_nan_and_infinity(same_bytes):
    x, W, b, theta = case(6, 20, 67)
    x[1, 3], x[2, 5], x[3, 19], x[4, 0], x[4, 1] = float("nan"), float("inf"), -float("inf"), float("inf"), 3e38
    same_bytes(gpu.encode(x, W, b, theta), ops.encode(x, W, b, theta, None))


@pytest.mark.parametrize("T", [0, 3])
def test_nothing_to_encode(T, same_bytes):
    x, W, b, theta = case(T, 20, 0 if T else 5)
    same_bytes(gpu.encode(x, W, b, theta), ops.encode(x, W, b, theta, None))


def test_threshold_met_exactly_does_not_fire(same_bytes):
    x, W, b, _ = case(2, 16, 40)
    crow, col, z = ops.encode(x, W, b, torch.full((40,), 0.0), None)
    theta = torch.zeros(40)
    theta[col[: int(crow[1])].long()] = z[: int(crow[1])]
    got = gpu.encode(x[:1], W, b, theta)
    assert got[1].numel() == 0
    same_bytes(got, ops.encode(x[:1], W, b, theta, None))


@pytest.mark.parametrize("bandwidth", [0.01, 1.0])
def test_bandwidth_keeps_the_pairs_near_the_threshold(bandwidth, same_bytes):
    args = case(5, 20, 67)
    same_bytes(gpu.encode(*args, bandwidth), ops.encode(*args, bandwidth))


def test_chunks_of_tokens_join(monkeypatch, same_bytes):
    args = case(23, 20, 67)
    monkeypatch.setattr(gpu, "chunk_tokens", lambda F: 5)
    same_bytes(gpu.encode(*args), ops.encode(*args, None))


def test_strided_input(same_bytes):
    x, W, b, theta = case(8, 20, 67)
    same_bytes(gpu.encode(x[::2], W.contiguous(), b, theta), ops.encode(x[::2], W, b, theta, None))


def test_float64_is_rounded_to_float32(same_bytes):
    x, W, b, theta = case(3, 20, 67)
    same_bytes(gpu.encode(x.double(), W, b, theta), ops.encode(x, W, b, theta, None))


@pytest.mark.parametrize("T", [3, 21])
def test_fixed_capacity_says_when_it_overflows(T, same_bytes):
    args = case(T, 20, 67)
    crow, col, values = ops.encode(*args, None)
    room = gpu.encode_fixed(*args, capacity=col.numel() + 7)
    assert not bool(room.overflow)
    sparse = room.sparse()
    same_bytes((sparse.crow_indices, sparse.col_indices, sparse.values), (crow, col, values))
    short = gpu.encode_fixed(*args, capacity=col.numel() - 1)
    assert bool(short.overflow)
    assert int(short.count) == col.numel()
    same_bytes((short.crow_indices, short.col_indices), (crow, col[:-1]))
    with pytest.raises(BackendError, match="do not fit"):
        short.sparse()


def test_chunks_keep_every_index_within_31_bits():
    for F in (1, 16384, 2**20, 2**31 - 1):
        T = gpu.chunk_tokens(F)
        words = -(-F // 32)
        assert T >= gpu.FEW
        assert T * words < 2**31


def test_bad_arguments():
    x, W, b, theta = case(3, 20, 67)
    with pytest.raises(ValueError, match="d_in = 20"):
        gpu.encode(x[:, :19], W, b, theta)
    with pytest.raises(ValueError, match="threshold"):
        gpu.encode(x, W, b, theta[:-1])
    with pytest.raises(TypeError, match="W_enc"):
        gpu.encode(x, W.double(), b, theta)
    with pytest.raises(ValueError, match="capacity"):
        gpu.encode_fixed(x, W, b, theta, -1)
