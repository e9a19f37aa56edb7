"""The error term: x̂ + (x − x̂) is x, so x is handed on as it is and only the backward knows of x̂."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.jumprelu import JumpReLUSkipTranscoder


class _Carry(torch.autograd.Function):
    """Forward: x [N, d_out], bit for bit.  Backward: that of x̂ plus a constant on the chosen rows (latents [n] of
    them, in order), the identity on the others."""

    @staticmethod
    def forward(ctx: Any, x, values, W_dec, b_dec, x_in, W_skip, crow, col, chosen, unit):
        ctx.save_for_backward(values, W_dec, x_in, W_skip, crow, col, chosen)
        ctx.unit = unit
        ctx.dtypes = (b_dec.dtype, x_in.dtype if x_in is not None else None)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        values, W_dec, x_in, W_skip, crow, col, chosen = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = None
        if need[0] and chosen is not None:
            dx = grad.masked_fill(chosen[:, None], 0)
        own = (grad if chosen is None else grad[chosen]).to(W_dec.device, torch.float32).contiguous()
        own = own if ctx.unit is None else own * ctx.unit
        dvalues = ops.sampled_dot(own, W_dec, None, crow, col).to(values.dtype) if need[1] else None
        dW = _decoder_grad(own, values, crow, col, W_dec) if need[2] else None
        db = own.sum(0).to(ctx.dtypes[0]) if need[3] else None
        dx_in = (own @ W_skip.float().t()).to(ctx.dtypes[1]) if W_skip is not None and need[4] else None
        dskip = (x_in.float().t() @ own).to(W_skip.dtype) if W_skip is not None and need[5] else None
        return dx, dvalues, dW, db, dx_in, dskip, None, None, None, None


def _decoder_grad(own: Tensor, values: Tensor, crow: Tensor, col: Tensor, W_dec: Tensor) -> Tensor:
    ccol, rows, order = ops.csr_transpose(crow, col, W_dec.shape[0])
    return ops.decode(ccol, rows, values[order], own, None, None).to(W_dec.dtype)


def carry(
    x: Tensor,
    sae: Coder,
    latents: SparseLatents,
    x_in: Tensor,
    chosen: Tensor | None,
    unit: Tensor | float | None = None,
) -> Tensor:
    """x [N, d_out] whose gradient is that of the SAE's output with the error held constant.

    latents: of the n chosen rows (chosen: bool [N], None for all); x_in [n, d_in]: what they were encoded from; unit:
    what the SAE's own units are multiplied by at this place (None: 1).  Outside of autograd x itself is returned.
    """
    if not torch.is_grad_enabled():
        return x
    skip = sae.W_skip if isinstance(sae, JumpReLUSkipTranscoder) else None
    graph = (x, latents.values, sae.W_dec, sae.b_dec, skip)
    if not any(t is not None and t.requires_grad for t in graph):
        return x
    mask = None if chosen is None else chosen.to(x.device)
    return _Carry.apply(
        x,
        latents.values,
        sae.W_dec,
        sae.b_dec,
        x_in if skip is not None else None,
        skip,
        latents.crow_indices,
        latents.col_indices,
        mask,
        unit,
    )
