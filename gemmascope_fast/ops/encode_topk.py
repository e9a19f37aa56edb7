"""Op `encode_topk`: the k largest positive pre-activations of each token, as compressed sparse rows.

z = x @ W_enc + b_enc.  Of a token's pairs with z > 0 or z NaN, the k largest are stored. NaN ranks above every
number; ties go to the lower feature index.  A ReLU before or after the selection gives the same result, since only
positive values are stored.  With `per_batch` the k·N largest of the whole batch are stored; ties go to the earlier
token (as BatchTopK is trained: Bussmann et al., arXiv 2412.06410).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import from_mask, row_indices
from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._library import register, register_autograd
from gemmascope_fast.ops.encode import (
    Csr,
    backward_of_encode,
    check_encode,
    cost_of_encode,
    fake_of_encode,
    save_for_encode,
    tangent_of_encode,
)

SCHEMA = (
    "encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, int k, bool per_batch=False)"
    " -> (Tensor crow_indices, Tensor col_indices, Tensor values)"
)


def encode_topk_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, per_batch: bool = False) -> Csr:
    """Dense eager fp32 and a stable sort.  It sums in torch's order, not in the fixed order.

    x [N, d_in], W_enc [d_in, d_sae], b_enc [d_sae]; 16-bit inputs are widened first.  k from 1 to d_sae.
    Returns crow_indices int64 [N+1], col_indices int32 [nnz] ascending in a row, pre-activations fp32 [nnz].
    Raises ValueError for k out of range, or if shapes or devices do not match.
    """
    check_encode_topk(x, W_enc, b_enc, k)
    z = exact_product(x, W_enc) + b_enc.float()
    crow, col = from_mask(greatest(z.detach(), k, per_batch))
    return crow, col, z[row_indices(crow), col.long()]


def greatest(z: Tensor, k: int, per_batch: bool = False) -> Tensor:
    """Mask of the k largest entries of each row of z [N, d_sae] that are positive or NaN: bool [N, d_sae]."""
    candidate = ~(z <= 0)
    ranked = torch.where(candidate, z, 0.0)
    if per_batch:
        ranked, k = ranked.reshape(1, -1), min(k * z.shape[0], z.numel())
    # stable: ties go to the first; NaN sorts above every number
    first = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, first, True)
    return chosen.reshape(z.shape) & candidate


def greatest_of(crow: Tensor, col: Tensor, values: Tensor, k: int, per_batch: bool = False) -> Csr:
    """Keep the k latents of each row that are largest in magnitude (with per_batch: k a row over the whole batch).

    NaN ranks first; ties go to the first.  Columns stay in ascending order.
    """
    rows, n = row_indices(crow), crow.numel() - 1
    order = torch.sort(values.detach().float().abs(), descending=True, stable=True).indices
    if per_batch:
        order = order[: k * n]
    else:
        order = order[torch.sort(rows[order], stable=True).indices]
        rank = torch.arange(order.numel(), device=col.device) - crow[rows[order]]
        order = order[rank < k]
    keep = torch.sort(order).values
    kept = torch.zeros_like(crow)
    kept[1:] = torch.bincount(rows[keep], minlength=n).cumsum(0)
    return kept, col[keep], values[keep]


def check_encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> None:
    """Raise the same errors as the native kernel."""
    check_encode(x, W_enc, b_enc, b_enc, None)
    if not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"k: expected 1 to d_sae = {W_enc.shape[1]}, got {k}")


encode_topk = register(SCHEMA, encode_topk_reference, fake_of_encode, cost_of_encode, ragged=True)


def _backward(ctx, needs, _grad_crow, _grad_col, grad):
    return (*backward_of_encode(ctx, needs, grad), None, None)


def _jvp(ctx, dx, dW, db, *_rest):
    return None, None, tangent_of_encode(ctx, dx, dW, db)


register_autograd(encode_topk, save_for_encode, _backward, _jvp)
