"""Op `encode_topk_screened`: the same bytes as op `encode_topk`, in about the time of reading an 8-bit copy of W_enc.

The 8-bit codes give each pair an interval that contains its pre-activation.  A pair whose upper end is below the lower
ends of k pairs of its token cannot be among the k largest.  The rest are computed as in `encode` (docs/how/screen.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._library import register, register_autograd
from gemmascope_fast.ops.encode import backward_of_encode, save_for_encode, tangent_of_encode
from gemmascope_fast.ops.encode_screened import Screened, cost_of_screened, fake_of_screened
from gemmascope_fast.ops.encode_topk import check_encode_topk, encode_topk_reference

SCHEMA = (
    "encode_topk_screened(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor code, Tensor? code2, Tensor table,"
    " Tensor? centre, int digits=0, Tensor? directions=None, bool mapped=False, Tensor? scales=None,"
    " bool per_batch=False)"
    " -> (Tensor crow_indices, Tensor col_indices, Tensor values, Tensor stats)"
)


def encode_topk_screened_reference(
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
) -> Screened:
    """The results of `encode_topk`, and the stats int64 [4] of `encode_screened`.

    code, code2, table, centre, directions, scales: from `screen_rows` on these weights, with thresholds of at most 0.
    digits, mapped: as in `encode_screened`.  The reference does not screen: it computes every pair in full precision.
    """
    check_encode_topk(x, W_enc, b_enc, k)
    pairs = x.shape[0] * W_enc.shape[1]
    stats = torch.tensor([pairs, pairs, 0, 0], dtype=torch.int64, device=x.device)
    return (*encode_topk_reference(x, W_enc, b_enc, k, per_batch), stats)


encode_topk_screened = register(SCHEMA, encode_topk_screened_reference, fake_of_screened, cost_of_screened, ragged=True)


def _backward(ctx, needs, _grad_crow, _grad_col, grad, _grad_stats):
    return (*backward_of_encode(ctx, needs, grad), *(None,) * 10)


def _jvp(ctx, dx, dW, db, *_rest):
    return None, None, tangent_of_encode(ctx, dx, dW, db), None


register_autograd(encode_topk_screened, save_for_encode, _backward, _jvp)
