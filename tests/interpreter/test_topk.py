"""Ops `encode_topk` and `encode_topk_screened` in Triton's interpreter: the bytes of the native kernels."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import topk as gpu
from gemmascope_fast.dev.testing import same_bytes


def problem(T, d, F, dtype=torch.float32):
    g = torch.Generator().manual_seed(T + d + F)
    W = torch.randn(F, d, generator=g).to(dtype).t()
    W[:, F // 2] = W[:, 0]
    b = (0.2 * torch.randn(F, generator=g)).to(dtype)
    b[F // 2] = b[0]
    return torch.randn(T, d, generator=g).to(dtype), W, b


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize(("T", "d", "F", "k"), [(0, 16, 40, 3), (1, 20, 70, 5), (6, 20, 40, 40)])
def test_the_k_greatest(T, d, F, k, per_batch):
    x, W, b = problem(T, d, F)
    if T > 4:
        x[2, 3] = float("nan")
        x[3] = 0.0
    want = ops.encode_topk(x, W, b, k, per_batch)
    assert same_bytes(gpu.encode_topk(x, W, b, k, per_batch), want)
    code, code2, table = ops.screen_rows(W, b, torch.zeros_like(b), None, True, None, None)
    *got, stats = gpu.encode_topk_screened(x, W, b, k, code, code2, table, None, 0, None, False, None, per_batch)
    assert same_bytes(got, want)
    assert stats[2] == 0


def test_parts_of_a_batch(monkeypatch):
    x, W, b = problem(11, 20, 70)
    monkeypatch.setattr(gpu, "POSITIVE", 4 * 70)
    for per_batch in (False, True):
        assert same_bytes(gpu.encode_topk(x, W, b, 6, per_batch), ops.encode_topk(x, W, b, 6, per_batch))


def test_bad_k_is_named():
    x, W, b = problem(2, 20, 70)
    with pytest.raises(ValueError, match="k: expected 1 to d_sae = 70, got 0"):
        gpu.encode_topk(x, W, b, 0)
