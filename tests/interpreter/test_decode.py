"""Triton decode and sampled_dot against the native kernels, byte for byte."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import decode as gpu
from gemmascope_fast.backends.gpu.encode import FixedLatents

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, d, d_sae, share of features that fire
SHAPES = [(1, 1, 1, 1.0), (1, 65, 40, 0.5), (7, 130, 33, 0.2), (3, 64, 50, 1.0), (33, 31, 40, 0.1), (33, 514, 9, 0.3)]


def pattern(N, F, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, F, generator=g) <= share
    mask[N // 2] = False if N > 1 else mask[N // 2]  # an empty row
    crow = torch.zeros(N + 1, dtype=torch.int64)
    crow[1:] = mask.sum(1).cumsum(0)
    col = mask.nonzero()[:, 1].to(torch.int32)
    return crow, col, torch.randn(col.numel(), generator=g)


def weights(F, d, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (F, d), dtype=torch.int8, generator=g), torch.rand(F, generator=g)
    return torch.randn(F, d, generator=g).to(dtype), None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_decode_equals_the_native_kernel(shape, dtype, same_bytes):
    N, d, F, share = shape
    csr = pattern(N, F, share)
    W, scale = weights(F, d, dtype)
    b = torch.randn(d) if SHAPES.index(shape) % 2 else None
    same_bytes(gpu.decode(*csr, W, b, scale), ops.decode(*csr, W, b, scale))


def test_decode_keeps_signed_zeros_and_nan(same_bytes):
    crow, col, _ = pattern(3, 8, 1.0)
    values = torch.full((col.numel(),), -1e-30)
    W = torch.full((8, 5), 1e-30)
    W[3, 2], W[1, 4] = float("nan"), float("inf")
    same_bytes(gpu.decode(crow, col, values, W), ops.decode(crow, col, values, W))


def test_rows_beyond_the_capacity_are_nan(same_bytes):
    crow, col, values = pattern(6, 20, 0.5)
    W, _ = weights(20, 33, torch.float32)
    whole = gpu.decode(crow, col, values, W)
    for row in (1, 5):
        cut = int(crow[row + 1]) - 1
        fixed = FixedLatents(crow, col[:cut], values[:cut], 20)
        got = gpu.decode_fixed(fixed, W)
        fits = crow[1:] <= cut
        assert not bool(fits[row])
        same_bytes(got[fits], whole[fits])
        assert bool(got[~fits].isnan().all())


@pytest.mark.parametrize("shape", SHAPES[:-2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_dot_equals_the_native_kernel(shape, dtype, same_bytes):
    N, d, F, share = shape
    crow, col, _ = pattern(N, F, share)
    x, (rows, _) = torch.randn(N, d).to(dtype), weights(F, d, dtype)
    for bias in (None, torch.randn(F)):
        same_bytes(gpu.sampled_dot(x, rows, bias, crow, col), ops.sampled_dot(x, rows, bias, crow, col))


def test_rows_by_length(monkeypatch, same_bytes):
    """Rows start longest first where there are many: the same bytes, row by row; long rows run further ahead."""
    monkeypatch.setattr(gpu, "ORDERED_ROWS", 5)
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 1, 50, 3, 16, 17, 0, 47])
    crow = torch.zeros(9, dtype=torch.int64)
    crow[1:] = lengths.cumsum(0)
    col = torch.cat([torch.randperm(60, generator=g)[:n].sort().values for n in lengths]).int()
    csr, (W, _) = (crow, col, torch.randn(len(col), generator=g)), weights(60, 33, torch.float32)
    same_bytes(gpu.decode(*csr, W), ops.decode(*csr, W, None, None))


def test_offsets_beyond_31_bits(same_bytes):
    """Row 1,100,000 of 2,048 int8 columns lies beyond 2^31; pages that nobody touches are never there."""
    F, d = 1_100_000, 2048
    assert (F - 1) * d > 2**31
    W = torch.empty(F, d, dtype=torch.int8)
    W[F - 1] = torch.randint(-127, 128, (d,), dtype=torch.int8)
    scale = torch.ones(F)
    csr = (torch.tensor([0, 1]), torch.tensor([F - 1], dtype=torch.int32), torch.tensor([0.5]))
    same_bytes(gpu.decode(*csr, W, None, scale)[0], 0.5 * W[F - 1].float())


def test_backward_without_float_atomics(same_bytes):
    """The gradients of decode are sampled dots and a decode of the transposed pattern: the same bytes again."""
    crow, col, values = pattern(9, 20, 0.4)
    W, _ = weights(20, 33, torch.float32)
    grad = torch.randn(9, 33)
    values.requires_grad_()
    W.requires_grad_()
    ops.decode(crow, col, values, W, None, None).backward(grad)
    ccol, rows, order = ops.csr_transpose(crow, col, 20)
    same_bytes(gpu.sampled_dot(grad, W.detach(), None, crow, col), values.grad)
    same_bytes(gpu.decode(ccol, rows, values.detach()[order], grad), W.grad)


def test_bad_arguments():
    crow, col, values = pattern(3, 8, 0.5)
    W, _ = weights(8, 5, torch.float32)
    with pytest.raises(IndexError, match="col_indices"):
        gpu.decode(crow, col + 8, values, W)
    with pytest.raises(ValueError, match="row_scale"):
        gpu.decode(crow, col, values, W.to(torch.int8))
    with pytest.raises(ValueError, match="b_dec"):
        gpu.decode(crow, col, values, W, torch.zeros(4))
    with pytest.raises(TypeError, match="W_dec"):
        gpu.decode(crow, col, values, W.double())
