"""Launchers of exact top-k on a GPU: `encode` or its screened form at threshold 0, then a selection among positives.

About half of all pairs are positive, so the screen discards only the other half. On CPU it discards more, because a
lower bound rises as features are processed (csrc/cpu/ops_topk.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu.encode import encode
from gemmascope_fast.backends.gpu.screen import encode_screened
from gemmascope_fast.ops.encode import Csr
from gemmascope_fast.ops.encode_topk import check_encode_topk, greatest_of
from gemmascope_fast.ops.latents import SparseLatents

POSITIVE = 64 << 20  # possibly positive pairs at a time: 12 bytes each, plus what the sort needs


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, per_batch: bool = False) -> Csr:
    """Op `encode_topk` (see ops/encode_topk.py): the same bytes as the native CPU kernel."""
    check_encode_topk(x, W_enc, b_enc, k)
    zeros = torch.zeros_like(b_enc)
    parts = [encode(part, W_enc, b_enc, zeros) for part in _parts(x, W_enc)]
    return _chosen(parts, W_enc.shape[1], k, per_batch)


def encode_topk_screened(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    code: Tensor,
    code2: Tensor | None,
    table: Tensor,
    centre: Tensor | None,
    digits: int = 0,
    directions: Tensor | None = None,
    mapped: bool = False,
    scales: Tensor | None = None,
    per_batch: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `encode_topk_screened`: the same bytes."""
    check_encode_topk(x, W_enc, b_enc, k)
    zeros = torch.zeros_like(b_enc)
    parts, stats = [], torch.zeros(4, dtype=torch.int64, device=x.device)
    for part in _parts(x, W_enc):
        crow, col, values, counts = encode_screened(
            part, W_enc, b_enc, zeros, code, code2, table, centre, digits, None, directions, mapped, scales
        )
        parts.append((crow, col, values))
        stats += counts
    return (*_chosen(parts, W_enc.shape[1], k, per_batch), stats)


def _parts(x: Tensor, W_enc: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, POSITIVE // max(1, W_enc.shape[1])))


def _chosen(parts: list[Csr], F: int, k: int, per_batch: bool) -> Csr:
    if not per_batch:
        parts = [greatest_of(crow, col, values, k) for crow, col, values in parts]
    whole = SparseLatents.cat([SparseLatents(*csr, shape=(csr[0].numel() - 1, F)) for csr in parts])
    csr = whole.crow_indices, whole.col_indices, whole.values
    return greatest_of(*csr, k=k, per_batch=True) if per_batch else csr
