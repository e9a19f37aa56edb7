"""Op `encode_screened`: gives the same bytes as op `encode`, in about the time of reading an 8-bit copy of W_enc.

It discards pairs that the codes of `screen_rows` prove to stay below threshold, and computes the rest as `encode` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.ops._library import Cost, register, register_autograd
from gemmascope_fast.ops.encode import (
    backward_of_encode,
    check_encode,
    encode_reference,
    fake_of_encode,
    save_for_encode,
    tangent_of_encode,
)

SCHEMA = (
    "encode_screened(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor code, Tensor? code2, Tensor table,"
    " Tensor? centre, int digits=0, float? bandwidth=None, Tensor? directions=None, bool mapped=False,"
    " Tensor? scales=None)"
    " -> (Tensor crow_indices, Tensor col_indices, Tensor values, Tensor stats)"
)
Screened = tuple[Tensor, Tensor, Tensor, Tensor]


def encode_screened_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    code: Tensor,
    code2: Tensor | None,
    table: Tensor,
    centre: Tensor | None,
    digits: int = 0,
    bandwidth: float | None = None,
    directions: Tensor | None = None,
    mapped: bool = False,
    scales: Tensor | None = None,
) -> Screened:
    """The results of `encode`, and stats int64 [4]: pairs left after the first stage, pairs computed in full precision,
    how many of those were outside their bound (if any, the screen is of other weights), tokens that skipped the screen.

    code, code2, table, centre, directions, scales: from `screen_rows` on these weights.  digits: use 1 or 2 digits of
    the activations in the first stage, and code2 if there is one; 0: choose what is faster.  mapped: the rows are in a
    mapped file, so code2 is always used if there is one, and the rows to compute are prefetched; the bytes are the
    same.  The reference does not screen: it computes every pair in full precision.
    """
    check_encode(x, W_enc, b_enc, threshold, bandwidth)
    pairs = x.shape[0] * W_enc.shape[1]
    stats = torch.tensor([pairs, pairs, 0, 0], dtype=torch.int64, device=x.device)
    return (*encode_reference(x, W_enc, b_enc, threshold, bandwidth), stats)


def fake_of_screened(*inputs: Any) -> Screened:
    return (*fake_of_encode(*inputs[:4]), inputs[0].new_empty(4, dtype=torch.int64))


def cost_of_screened(x: Tensor, W_enc: Tensor, b_enc: Tensor, _given: object, code: Tensor, *_: object) -> Cost:
    """Without the rows that refine: their number depends on the data (`stats`)."""
    return Cost(bytes=code.numel() + x.numel() * x.element_size(), flops=2 * x.shape[0] * W_enc.numel())


encode_screened = register(SCHEMA, encode_screened_reference, fake_of_screened, cost_of_screened, ragged=True)


def _backward(ctx, needs, _grad_crow, _grad_col, grad, _grad_stats):
    return (*backward_of_encode(ctx, needs, grad), *(None,) * 10)


def _jvp(ctx, dx, dW, db, *_rest):
    return None, None, tangent_of_encode(ctx, dx, dW, db), None


register_autograd(encode_screened, save_for_encode, _backward, _jvp)
