"""The error term: x̂ + (x − x̂) equals x, so forward returns x unchanged, and only backward uses x̂."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.ops._exact import exact_product, put
from gemmascope_fast.ops._transforms import asked_for, derivative_wanted, requested
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.jumprelu import JumpReLUSkipTranscoder

NO_VMAP = "vmap cannot run over a model with attached SAEs: pass the samples as a batch of the model"


class _ErrorTerm(torch.autograd.Function):
    """Forward: x [N, d_out], bit for bit.  Backward: on the selected rows that of x̂ plus a constant (latents [n] are
    theirs, in order), on the others the identity."""

    @staticmethod
    def forward(x, values, W_dec, b_dec, x_in, W_skip, crow, col, chosen, unit):
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, values, W_dec, b_dec, x_in, W_skip, crow, col, chosen, ctx.unit = inputs
        ctx.backend, ctx.zeros = requested(), zeros_like(x)
        saved = (values, W_dec, x_in, W_skip, crow, col, chosen)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)
        ctx.dtypes = (b_dec.dtype, x_in.dtype if x_in is not None else None)

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        if grad is None:
            return (None,) * 10
        values, W_dec, x_in, W_skip, crow, col, chosen = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = None
        if need[0] and chosen is not None:
            dx = grad.masked_fill(chosen[:, None], 0)
        own = (grad if chosen is None else grad[chosen]).to(W_dec.device, torch.float32).contiguous()
        own = own if ctx.unit is None else own * ctx.unit
        with asked_for(ctx.backend):
            dvalues = ops.sampled_dot.step(own, W_dec, None, crow, col).to(values.dtype) if need[1] else None
            dW = _decoder_grad(own, values, crow, col, W_dec) if need[2] else None
        db = own.sum(0).to(ctx.dtypes[0]) if need[3] else None
        dx_in = exact_product(own, W_skip.t()).to(ctx.dtypes[1]) if W_skip is not None and need[4] else None
        dskip = exact_product(x_in.t(), own).to(W_skip.dtype) if W_skip is not None and need[5] else None
        return dx, dvalues, dW, db, dx_in, dskip, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx, dvalues, dW, db, dx_in, dskip, _crow, _col, _chosen, _unit):  # type: ignore[override]
        values, W_dec, x_in, W_skip, crow, col, chosen = ctx.saved_tensors
        parts = [] if db is None else [db.float().expand(crow.numel() - 1, -1)]
        with asked_for(ctx.backend):
            if dvalues is not None:
                parts.append(ops.decode.step(crow, col, dvalues, W_dec, None, None))
            if dW is not None:
                parts.append(ops.decode.step(crow, col, values, dW, None, None))
        if dx_in is not None and W_skip is not None:
            parts.append(exact_product(dx_in, W_skip))
        if dskip is not None:
            parts.append(exact_product(x_in, dskip))
        drecon = sum(parts[1:], parts[0]) if parts else None
        if drecon is not None and ctx.unit is not None:
            drecon = drecon * ctx.unit
        return tangent_on_rows(dx, drecon, chosen, ctx.zeros)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(NO_VMAP)


def zeros_like(x: Tensor) -> Callable[[], Tensor]:
    """What is needed to make zeros of x's shape, without keeping x."""
    return partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device)


def tangent_on_rows(
    dx: Tensor | None, drecon: Tensor | None, chosen: Tensor | None, zeros: Callable[[], Tensor]
) -> Tensor:
    """Tangent of the output: on the selected rows that of the reconstruction [N, d], on the others that of x."""
    out = zeros()
    if dx is not None and chosen is not None:
        out = dx.masked_fill(chosen[:, None], 0)
    if drecon is None:
        return out
    drecon = drecon.to(out.device, out.dtype)
    return drecon if chosen is None else put(out, (chosen.nonzero()[:, 0],), drecon)


def _decoder_grad(own: Tensor, values: Tensor, crow: Tensor, col: Tensor, W_dec: Tensor) -> Tensor:
    ccol, rows, order = ops.csr_transpose.step(crow, col, W_dec.shape[0])
    return ops.decode.step(ccol, rows, values[order], own, None, None).to(W_dec.dtype)


def with_sae_gradient(
    x: Tensor,
    sae: Coder,
    latents: SparseLatents,
    x_in: Tensor,
    chosen: Tensor | None,
    unit: Tensor | float | None = None,
) -> Tensor:
    """Return x [N, d_out] with the gradient of the SAE's output, where the error is held constant.

    latents: of the n selected rows (chosen: bool [N], None for all); x_in [n, d_in]: what they were encoded from; unit:
    factor for the SAE's units at this place (None: 1).  Without autograd, x itself is returned.
    """
    skip = sae.W_skip if isinstance(sae, JumpReLUSkipTranscoder) else None
    graph = (x, latents.values, sae.W_dec, sae.b_dec, skip)
    if not derivative_wanted(*graph):
        return x
    mask = None if chosen is None else chosen.to(x.device)
    return _ErrorTerm.apply(
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
